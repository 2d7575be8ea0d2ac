/*
 * macula.hpp - macula.h for C++17 and later: one header, nothing to link but the library
 *
 * SPDX-License-Identifier: MIT OR Apache-2.0
 *
 *     #include <macula.hpp>
 *
 *     int main() {
 *       auto runtime = macula::Runtime::create().value();
 *       auto pipeline = macula::Pipeline::open(runtime, "models/emoji/onnx").value();
 *       auto apple = macula::Concept::load("models/concepts/green-apple.safetensors").value();
 *       pipeline.compose({apple}).value();
 *       auto images = pipeline.draw("a <s1> apple on a blue background").value();
 *       images.write_png(0, "apple.png").value();
 *     }
 *
 * Errors, by exception or not, as each call wants: everything that can fail returns a `Result`. Its `value()` throws an
 * `Exception`; who does without exceptions asks `if (result)`, then takes `*result` or `result.error()`. The header also
 * compiles with -fno-exceptions; `value()` is then not there.
 *
 * Ownership. Each class owns one handle of macula.h, is move-only, and frees the handle when it ends; `get()` lends it to
 * functions of macula.h. What was moved from, or closed, is empty: every call on it fails with `INVALID_ARGUMENT`. The
 * rules of macula.h on threads and lifetimes hold; a pipeline must not end during a job of another thread.
 *
 * Options are the structs of macula.h with their defaults filled in, so every field of theirs is there, under its name.
 */
#ifndef MACULA_HPP
#define MACULA_HPP

#include <macula.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace macula {

/* ==============================================================================================================
 * Errors
 * ============================================================================================================== */

/** Why a call failed. */
struct Error {
  /** What a program can do about it. */
  macula_status status;
  /** What was wrong, what was expected and where, for a person. */
  std::string message;
};

/** An `Error` that was thrown. */
class Exception : public std::runtime_error {
 public:
  explicit Exception(const Error &error) : std::runtime_error(error.message), status_(error.status) {}
  macula_status status() const noexcept { return status_; }

 private:
  macula_status status_;
};

/** What a call gave, or why it failed. */
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : held_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : held_(std::in_place_index<1>, std::move(error)) {}

  bool has_value() const noexcept { return held_.index() == 0; }
  explicit operator bool() const noexcept { return has_value(); }
  /** What the call gave; only if it succeeded. */
  T &operator*() & noexcept { return *std::get_if<0>(&held_); }
  const T &operator*() const & noexcept { return *std::get_if<0>(&held_); }
  T &&operator*() && noexcept { return std::move(*std::get_if<0>(&held_)); }
  T *operator->() noexcept { return std::get_if<0>(&held_); }
  const T *operator->() const noexcept { return std::get_if<0>(&held_); }
  /** Why it failed; only if it did. */
  const Error &error() const noexcept { return *std::get_if<1>(&held_); }
#ifdef __cpp_exceptions
  /** What the call gave; throws an `Exception` if it failed. */
  T value() && { return has_value() ? std::move(**this) : throw Exception(error()); }
  T &value() & { return has_value() ? **this : throw Exception(error()); }
#endif

 private:
  std::variant<T, Error> held_;
};

/** That a call succeeded, or why it failed. */
template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Error error) : error_(std::move(error)) {}

  bool has_value() const noexcept { return !error_; }
  explicit operator bool() const noexcept { return has_value(); }
  const Error &error() const noexcept { return *error_; }
#ifdef __cpp_exceptions
  void value() const {
    if (error_) throw Exception(*error_);
  }
#endif

 private:
  std::optional<Error> error_;
};

/* ==============================================================================================================
 * Spans and tensors
 * ============================================================================================================== */

/** A view of an array that somebody else owns: of a vector, an array, or a pointer and a size. */
template <class T>
class Span {
 public:
  constexpr Span() noexcept = default;
  constexpr Span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
  template <class C, class = std::enable_if_t<!std::is_same_v<std::decay_t<C>, Span> &&
                                              std::is_convertible_v<decltype(std::data(std::declval<C &>())), T *>>>
  constexpr Span(C &&container) noexcept : data_(std::data(container)), size_(std::size(container)) {}

  constexpr T *data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return size_; }
  constexpr bool empty() const noexcept { return size_ == 0; }
  constexpr T *begin() const noexcept { return data_; }
  constexpr T *end() const noexcept { return data_ + size_; }
  constexpr T &operator[](std::size_t at) const noexcept { return data_[at]; }

 private:
  T *data_ = nullptr;
  std::size_t size_ = 0;
};

namespace detail {

template <class T>
constexpr macula_dtype dtype() noexcept {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, std::int64_t>, "tensors are of float or std::int64_t");
  return std::is_same_v<T, float> ? MACULA_DTYPE_F32 : MACULA_DTYPE_I64;
}

template <class T>
macula_tensor view(T *data, std::size_t size, std::initializer_list<std::int64_t> shape) noexcept {
  macula_tensor made{};
  made.data = data;
  made.byte_len = size * sizeof(T);
  made.dtype = dtype<T>();
  made.device = MACULA_DEVICE_CPU;
  for (std::int64_t length : shape) {
    if (made.rank < MACULA_MAX_RANK) made.shape[made.rank] = length;
    ++made.rank;
  }
  return made;
}

}  // namespace detail

/** A view of a container's numbers for a call that reads them; the call checks that size and shape fit each other. */
template <class C>
macula_tensor input_tensor(const C &numbers, std::initializer_list<std::int64_t> shape) noexcept {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(std::data(numbers))>>;
  return detail::view(const_cast<T *>(std::data(numbers)), std::size(numbers), shape);
}

/** A view of a container's numbers for a call that writes them. */
template <class C>
macula_tensor output_tensor(C &&numbers, std::initializer_list<std::int64_t> shape) noexcept {
  return detail::view(std::data(numbers), std::size(numbers), shape);
}

namespace detail {

inline Error failed(macula_status status) { return Error{status, macula_last_error()}; }

inline Result<void> outcome(macula_status status) {
  if (status != MACULA_STATUS_OK) return failed(status);
  return {};
}

template <class T>
Result<T> outcome(macula_status status, T value) {
  if (status != MACULA_STATUS_OK) return failed(status);
  return value;
}

template <class T, macula_status (*Free)(T *)>
struct Release {
  void operator()(T *handle) const noexcept { (void)Free(handle); }
};

/** The one owner of a handle. */
template <class T, macula_status (*Free)(T *)>
class Owner {
 public:
  explicit Owner(T *handle) noexcept : handle_(handle) {}

  /** The handle, for functions of macula.h; still owned here. */
  T *get() const noexcept { return handle_.get(); }

  /** Frees the handle now and says whether that worked; if not, it is still owned. */
  Result<void> close() {
    macula_status status = Free(handle_.get());
    if (status == MACULA_STATUS_OK) (void)handle_.release();
    return outcome(status);
  }

 private:
  std::unique_ptr<T, Release<T, Free>> handle_;
};

}  // namespace detail

/* ==============================================================================================================
 * Cancelling and progress
 * ============================================================================================================== */

/** A switch that stops jobs, from any thread; `options.cancel = token.get()`. */
class CancelToken : public detail::Owner<macula_cancel_token, macula_cancel_token_free> {
 public:
  static Result<CancelToken> create() {
    macula_cancel_token *made = nullptr;
    macula_status status = macula_cancel_token_create(&made);
    return detail::outcome(status, CancelToken(made));
  }
  Result<void> cancel() { return detail::outcome(macula_cancel_token_cancel(get())); }
  Result<void> reset() { return detail::outcome(macula_cancel_token_reset(get())); }
  Result<bool> is_cancelled() const {
    std::int32_t cancelled = 0;
    macula_status status = macula_cancel_token_is_cancelled(get(), &cancelled);
    return detail::outcome(status, cancelled != 0);
  }

 private:
  using Owner::Owner;
};

/** What a job does next. */
enum class Flow { proceed, stop };

/**
 * Is told how far a job is, on the thread that made the call, and decides whether it goes on. What it throws ends the job
 * and is thrown again out of the call.
 */
using Progress = std::function<Flow(const macula_progress &)>;

namespace detail {

/** Takes a `Progress` through C. */
class Watch {
 public:
  explicit Watch(const Progress &progress) noexcept : progress_(progress) {}

  /** Puts itself into the options of a job, if there is somebody to tell. */
  template <class Options>
  void join(Options &options) noexcept {
    if (!progress_) return;
    options.progress = tell;
    options.progress_userdata = this;
  }

  /** Throws what the `Progress` threw. */
  void end() const {
#ifdef __cpp_exceptions
    if (thrown_) std::rethrow_exception(thrown_);
#endif
  }

 private:
  static std::int32_t tell(void *userdata, const macula_progress *progress) noexcept {
    Watch &watch = *static_cast<Watch *>(userdata);
#ifdef __cpp_exceptions
    try {
      return watch.progress_(*progress) == Flow::stop;
    } catch (...) {
      watch.thrown_ = std::current_exception();
      return 1;
    }
#else
    return watch.progress_(*progress) == Flow::stop;
#endif
  }

  const Progress &progress_;
  std::exception_ptr thrown_;
};

}  // namespace detail

/* ==============================================================================================================
 * Runtime
 * ============================================================================================================== */

/** Where ONNX Runtime comes from. `log` and `log_userdata` are taken by `Runtime::create` if it is given a `Log`. */
struct RuntimeOptions : macula_runtime_options {
  RuntimeOptions() : macula_runtime_options MACULA_RUNTIME_OPTIONS_INIT {}
};

/** Receives a message: level, target, text. Called on any thread, also on several at once; what it throws is dropped. */
using Log = std::function<void(macula_log_level, const char *, const char *)>;

/** ONNX Runtime, loaded and checked. It must not end inside its own `Log`. */
class Runtime {
 public:
  static Result<Runtime> create(RuntimeOptions options = {}, Log log = {}) {
    auto state = std::make_unique<State>(State{std::move(log), Handle(nullptr)});
    if (state->log) {
      options.log = tell;
      options.log_userdata = state.get();
    }
    macula_runtime *made = nullptr;
    macula_status status = macula_runtime_create(&options, &made);
    state->handle = Handle(made);
    return detail::outcome(status, Runtime(std::move(state)));
  }

  /** What was loaded; the texts stay while this lives. */
  Result<macula_runtime_info> info() const {
    macula_runtime_info info = MACULA_RUNTIME_INFO_INIT;
    macula_status status = macula_runtime_get_info(get(), &info);
    return detail::outcome(status, info);
  }

  /** The handle, for functions of macula.h; still owned here. */
  macula_runtime *get() const noexcept { return state_ ? state_->handle.get() : nullptr; }

 private:
  using Handle = detail::Owner<macula_runtime, macula_runtime_free>;
  /** The handle ends before the log that it calls. */
  struct State {
    Log log;
    Handle handle;
  };

  explicit Runtime(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}

  static void tell(void *userdata, macula_log_level level, const char *target, const char *message) noexcept {
    const Log &log = static_cast<State *>(userdata)->log;
#ifdef __cpp_exceptions
    try {
      log(level, target, message);
    } catch (...) {
    }
#else
    log(level, target, message);
#endif
  }

  std::unique_ptr<State> state_;
};

/* ==============================================================================================================
 * Pictures
 * ============================================================================================================== */

/** A picture that somebody else owns: rows from top to bottom, 3 bytes a pixel. */
struct Image : macula_image {
  Image(const macula_image &view) noexcept : macula_image(view) {}
  Image(Span<const std::uint8_t> pixels, std::uint32_t pixels_in_row) noexcept
      : macula_image{pixels.data(), pixels_in_row,
                     pixels_in_row ? static_cast<std::uint32_t>(pixels.size() / 3 / pixels_in_row) : 0} {}

  Span<const std::uint8_t> pixels() const noexcept { return {rgb, std::size_t{width} * height * 3}; }

  Result<void> write_png(const std::string &file) const {
    return detail::outcome(macula_image_write_png(this, file.c_str()));
  }
};

/** Pictures that a draw made or a file held, all of one size; their memory stays while this lives. */
class Images : public detail::Owner<macula_images, macula_images_free> {
 public:
  /** Takes pictures over that a function of macula.h gave. */
  static Result<Images> adopt(macula_images *handle) {
    Images images(handle);
    std::size_t count = 0;
    macula_status status = macula_images_count(handle, &count);
    for (std::size_t at = 0; at < count && status == MACULA_STATUS_OK; ++at) {
      macula_image view{};
      status = macula_images_get(handle, at, &view);
      images.views_.emplace_back(view);
    }
    return detail::outcome(status, std::move(images));
  }

  /** Reads a PNG, JPEG or WebP file as one picture of a given size. */
  static Result<Images> read(const std::string &file, std::uint32_t width, std::uint32_t height) {
    macula_images *made = nullptr;
    macula_status status = macula_images_read(file.c_str(), width, height, &made);
    if (status != MACULA_STATUS_OK) return detail::failed(status);
    return adopt(made);
  }

  std::size_t size() const noexcept { return views_.size(); }
  const Image &operator[](std::size_t at) const noexcept { return views_[at]; }
  std::vector<Image>::const_iterator begin() const noexcept { return views_.begin(); }
  std::vector<Image>::const_iterator end() const noexcept { return views_.end(); }

  Result<void> write_png(std::size_t at, const std::string &file) const {
    return detail::outcome(macula_images_write_png(get(), at, file.c_str()));
  }

 private:
  using Owner::Owner;
  std::vector<Image> views_;
};

/* ==============================================================================================================
 * Concepts
 * ============================================================================================================== */

/** Where a new concept comes from; `fingerprint` must be given. */
struct ConceptOptions : macula_concept_options {
  ConceptOptions() : macula_concept_options MACULA_CONCEPT_OPTIONS_INIT {}
};

/** A set of concept neurons and where it comes from. It never changes. */
class Concept : public detail::Owner<macula_concept, macula_concept_free> {
 public:
  /** What two concepts have in common, in all and in each projection that either lists. */
  struct Overlap {
    macula_overlap total;
    std::vector<macula_overlap> layers;
  };

  static Result<Concept> load(const std::string &file) {
    macula_concept *made = nullptr;
    macula_status status = macula_concept_load(file.c_str(), &made);
    return detail::outcome(status, Concept(made));
  }

  static Result<Concept> load_bytes(Span<const unsigned char> bytes) {
    macula_concept *made = nullptr;
    macula_status status = macula_concept_load_bytes(bytes.data(), bytes.size(), &made);
    return detail::outcome(status, Concept(made));
  }

  static Result<Concept> create(Span<const macula_layer> layers, const ConceptOptions &options) {
    macula_concept *made = nullptr;
    macula_status status = macula_concept_create(layers.data(), layers.size(), &options, &made);
    return detail::outcome(status, Concept(made));
  }

  Result<void> save(const std::string &file) const {
    return detail::outcome(macula_concept_save(get(), file.c_str()));
  }

  /** What it is; the texts stay while this lives. */
  Result<macula_concept_info> info() const {
    macula_concept_info info = MACULA_CONCEPT_INFO_INIT;
    macula_status status = macula_concept_get_info(get(), &info);
    return detail::outcome(status, info);
  }

  /** One projection, in the order of the paths' bytes. */
  Result<macula_layer_info> layer(std::size_t at) const {
    macula_layer_info info = MACULA_LAYER_INFO_INIT;
    macula_status status = macula_concept_get_layer(get(), at, &info);
    return detail::outcome(status, info);
  }

  /** The indices of one projection's neurons, ascending. */
  Result<std::vector<std::uint32_t>> indices(std::size_t at) const {
    Result<macula_layer_info> info = layer(at);
    if (!info) return info.error();
    std::vector<std::uint32_t> indices(info->neurons + 1);  // one more, because `data()` of none is NULL
    macula_status status = macula_concept_get_indices(get(), at, indices.data(), info->neurons);
    indices.pop_back();
    return detail::outcome(status, std::move(indices));
  }

  /** What one projection's neurons become: their tuned values, or zeros. */
  Result<std::vector<float>> values(std::size_t at) const {
    Result<macula_layer_info> info = layer(at);
    if (!info) return info.error();
    std::vector<float> values(info->neurons + 1);  // as for `indices`
    macula_status status = macula_concept_get_values(get(), at, values.data(), info->neurons);
    values.pop_back();
    return detail::outcome(status, std::move(values));
  }

  /** The learnt embedding of the trigger for one text encoder, of `info().token_row_count`. */
  Result<std::vector<float>> token_row(std::size_t encoder) const {
    macula_tensor row = {};
    macula_status status = macula_concept_get_token_row(get(), encoder, &row);
    const float *numbers = static_cast<const float *>(row.data);
    return detail::outcome(status, std::vector<float>(numbers, numbers + row.byte_len / sizeof(float)));
  }

  /** One entry of the metadata, in the order of the keys' bytes. */
  Result<std::pair<std::string, std::string>> entry(std::size_t at) const {
    const char *key = "";
    const char *value = "";
    macula_status status = macula_concept_get_entry(get(), at, &key, &value);
    return detail::outcome(status, std::pair<std::string, std::string>(key, value));
  }

  /** One value of the metadata. */
  Result<std::string> metadata(const std::string &key) const {
    const char *value = "";
    macula_status status = macula_concept_get_metadata(get(), key.c_str(), &value);
    return detail::outcome(status, std::string(value));
  }

  /** The weights of either. */
  Result<Concept> united_with(const Concept &other) const { return combine(macula_concept_union, other); }
  /** The weights of both. */
  Result<Concept> intersected_with(const Concept &other) const { return combine(macula_concept_intersection, other); }
  /** The weights that are not the other's. */
  Result<Concept> without(const Concept &other) const { return combine(macula_concept_difference, other); }

  Result<Overlap> overlap(const Concept &other) const {
    std::set<std::string> paths;
    for (const Concept *one : {this, &other}) {
      Result<macula_concept_info> info = one->info();
      if (!info) return info.error();
      for (std::size_t at = 0; at < info->layer_count; ++at) {
        Result<macula_layer_info> layer = one->layer(at);
        if (!layer) return layer.error();
        paths.insert(layer->path);
      }
    }
    Overlap overlap{{}, std::vector<macula_overlap>(paths.size())};
    macula_status status =
        macula_concept_overlap(get(), other.get(), &overlap.total, overlap.layers.data(), overlap.layers.size());
    return detail::outcome(status, std::move(overlap));
  }

 private:
  friend class Pipeline;
  using Owner::Owner;
  using Combine = decltype(&macula_concept_union);

  Result<Concept> combine(Combine how, const Concept &other) const {
    macula_concept *made = nullptr;
    macula_status status = how(get(), other.get(), &made);
    return detail::outcome(status, Concept(made));
  }
};

/** One concept in a composition. The concept, `words` and `tokens` are read when the term is used. */
struct Term : macula_term {
  Term(const Concept &which, float share = 1.0f, macula_scope where = MACULA_SCOPE_DEFAULT)
      : macula_term MACULA_TERM_INIT {
    subject = which.get();
    strength = share;
    scope = where;
  }
};
static_assert(sizeof(Term) == sizeof(macula_term), "terms are handed to C as they lie");

/* ==============================================================================================================
 * Schedules
 * ============================================================================================================== */

/** How a schedule is walked. */
struct TrajectoryOptions : macula_trajectory_options {
  TrajectoryOptions() : macula_trajectory_options MACULA_TRAJECTORY_OPTIONS_INIT {}
};

/** What turning points are chosen by; `Pipeline::choose_schedule` takes the pictures. */
struct ChooseOptions : macula_choose_options {
  ChooseOptions() : macula_choose_options MACULA_CHOOSE_OPTIONS_INIT {}
};

/** What some steps need or give besides states and prediction; NULL for what is not there. */
struct StepExtras {
  /** Standard normal noise of the state's size, if the step `needs_noise`. */
  const macula_tensor *noise = nullptr;
  /** Standard normal noise of the next size, if the step `lifts`. */
  const macula_tensor *lift_noise = nullptr;
  /** Receives the clean state as it is predicted now. */
  const macula_tensor *out_clean = nullptr;
};

/** A walk from noise to clean states, for hosts with a sampler loop of their own. One call at a time. */
class Trajectory : public detail::Owner<macula_trajectory, macula_trajectory_free> {
 public:
  /** Where it is, and what its coming step needs. */
  Result<macula_trajectory_info> info() const {
    macula_trajectory_info info = MACULA_TRAJECTORY_INFO_INIT;
    macula_status status = macula_trajectory_get_info(get(), &info);
    return detail::outcome(status, info);
  }

  /** The state before the first step, written to the memory of `out`; `clean` is what a later first step starts from. */
  Result<void> start(const macula_tensor &noise, const macula_tensor &out, const macula_tensor *clean = nullptr) const {
    return detail::outcome(macula_trajectory_start(get(), &noise, clean, &out));
  }

  /** Takes the coming step; the next state is written to the memory of `out`. */
  Result<void> step(const macula_tensor &sample, const macula_tensor &prediction, const macula_tensor &out,
                    const StepExtras &extras = {}) {
    return detail::outcome(macula_trajectory_step(get(), &sample, &prediction, extras.noise, extras.lift_noise, &out,
                                                  extras.out_clean));
  }

 private:
  friend class Schedule;
  using Owner::Owner;
};

/** A decomposed process; `options.schedule = schedule.get()` draws with it. It never changes. */
class Schedule : public detail::Owner<macula_schedule, macula_schedule_free> {
 public:
  static Result<Schedule> from_json(const std::string &json) {
    macula_schedule *made = nullptr;
    macula_status status = macula_schedule_from_json(json.c_str(), &made);
    return detail::outcome(status, Schedule(made));
  }

  /** What it is; the text stays while this lives. */
  Result<macula_schedule_info> info() const {
    macula_schedule_info info = MACULA_SCHEDULE_INFO_INIT;
    macula_status status = macula_schedule_get_info(get(), &info);
    return detail::outcome(status, info);
  }

  Result<macula_stage_info> stage(std::size_t at) const {
    macula_stage_info info = MACULA_STAGE_INFO_INIT;
    macula_status status = macula_schedule_get_stage(get(), at, &info);
    return detail::outcome(status, info);
  }

  /** One component, the finest first, at a time from 1 on. */
  Result<macula_component_info> component(std::size_t at, std::size_t time) const {
    macula_component_info info = MACULA_COMPONENT_INFO_INIT;
    macula_status status = macula_schedule_get_component(get(), at, time, &info);
    return detail::outcome(status, info);
  }

  /** Begins to walk it; the schedule may end before the walk. */
  Result<Trajectory> begin(const TrajectoryOptions &options = {}) const {
    macula_trajectory *made = nullptr;
    macula_status status = macula_schedule_begin(get(), &options, &made);
    return detail::outcome(status, Trajectory(made));
  }

 private:
  friend class Pipeline;
  using Owner::Owner;
};

/* ==============================================================================================================
 * Pipelines
 * ============================================================================================================== */

/** How models are run. */
struct SessionOptions : macula_session_options {
  SessionOptions() : macula_session_options MACULA_SESSION_OPTIONS_INIT {}
};

/** What to draw, besides the prompt. */
struct DrawOptions : macula_draw_options {
  DrawOptions() : macula_draw_options MACULA_DRAW_OPTIONS_INIT {}
};

/** How to search, besides what for. */
struct DiscoverOptions : macula_discover_options {
  DiscoverOptions() : macula_discover_options MACULA_DISCOVER_OPTIONS_INIT {}
};

/** How to tune concepts together, besides which. */
struct TogetherOptions : macula_together_options {
  TogetherOptions() : macula_together_options MACULA_TOGETHER_OPTIONS_INIT {}
};

/** A concept that is tuned with others, and pictures of its subject, all of one size. */
struct Companion : macula_companion {
  Companion(const Concept &of, Span<const macula_image> shown)
      : macula_companion{of.get(), shown.data(), shown.size(), nullptr} {}
};

/** What one prediction is made from. */
struct DenoiseInputs : macula_denoise_inputs {
  DenoiseInputs() : macula_denoise_inputs MACULA_DENOISE_INPUTS_INIT {}
};

/** A prompt's encoding. It never changes. */
class Embedding : public detail::Owner<macula_embedding, macula_embedding_free> {
 public:
  /** The tensors' memory stays while this lives and must not be written. */
  Result<macula_embedding_info> info() const {
    macula_embedding_info info = MACULA_EMBEDDING_INFO_INIT;
    macula_status status = macula_embedding_get_info(get(), &info);
    return detail::outcome(status, info);
  }

 private:
  friend class Pipeline;
  using Owner::Owner;
};

/** An opened text-to-image model. It does one job at a time. */
class Pipeline : public detail::Owner<macula_pipeline, macula_pipeline_free> {
 public:
  /** Opens a model folder; the runtime may end before the pipeline. Concepts with neurons of self-attention can be composed
   *  if `self_attention` says so. */
  static Result<Pipeline> open(const Runtime &runtime, const std::string &folder, const SessionOptions &session = {},
                               bool self_attention = false) {
    macula_pipeline_options options = MACULA_PIPELINE_OPTIONS_INIT;
    options.session = &session;
    options.self_attention = self_attention;
    macula_pipeline *made = nullptr;
    macula_status status = macula_pipeline_open(runtime.get(), folder.c_str(), &options, &made);
    return detail::outcome(status, Pipeline(made));
  }

  /** What it is; the texts stay while this lives. */
  Result<macula_pipeline_info> info() const {
    macula_pipeline_info info = MACULA_PIPELINE_INFO_INIT;
    macula_status status = macula_pipeline_get_info(get(), &info);
    return detail::outcome(status, info);
  }

  /** One K or V projection, in the order of the paths' bytes. */
  Result<macula_layer_info> projection(std::size_t at) const {
    macula_layer_info info = MACULA_LAYER_INFO_INIT;
    macula_status status = macula_pipeline_get_projection(get(), at, &info);
    return detail::outcome(status, info);
  }

  /** What it and the process take. */
  Result<macula_memory_info> memory() const {
    macula_memory_info info = MACULA_MEMORY_INFO_INIT;
    macula_status status = macula_pipeline_get_memory(get(), &info);
    return detail::outcome(status, info);
  }

  /** Draws concepts together, in place of what was composed before. */
  Result<void> compose(Span<const Term> terms) {
    return detail::outcome(macula_compose(get(), terms.data(), terms.size()));
  }
  Result<void> compose(std::initializer_list<Term> terms) { return compose(Span<const Term>(terms)); }

  /** Draws without concepts, in place of what was ablated before. */
  Result<void> ablate(Span<const Term> terms) {
    return detail::outcome(macula_ablate(get(), terms.data(), terms.size()));
  }
  Result<void> ablate(std::initializer_list<Term> terms) { return ablate(Span<const Term>(terms)); }

  /** Ends composing and ablating. */
  Result<void> clear() { return detail::outcome(macula_composition_clear(get())); }

  /** Draws pictures. */
  Result<Images> draw(const std::string &prompt, DrawOptions options = {}, const Progress &progress = {}) {
    detail::Watch watch(progress);
    options.prompt = prompt.c_str();
    watch.join(options);
    macula_images *made = nullptr;
    macula_status status = macula_pipeline_draw(get(), &options, &made);
    watch.end();
    if (status != MACULA_STATUS_OK) return detail::failed(status);
    return Images::adopt(made);
  }

  /** The schedule that its model was trained for; `NOT_FOUND` if the folder has none. */
  Result<Schedule> schedule() const {
    macula_schedule *made = nullptr;
    macula_status status = macula_pipeline_get_schedule(get(), &made);
    return detail::outcome(status, Schedule(made));
  }

  /**
   * Whether a schedule can be walked for pictures of a size (0: the model's own), `batch` states at once (0: one); readies
   * the provider for it.
   */
  Result<void> check(const Schedule &schedule, std::uint32_t width = 0, std::uint32_t height = 0,
                     std::uint32_t batch = 0, const CancelToken *cancel = nullptr) {
    return detail::outcome(
        macula_schedule_check(schedule.get(), get(), width, height, batch, cancel ? cancel->get() : nullptr));
  }

  /** A schedule, and what a walk over all times is predicted to cost, as a share of the plain one's. */
  struct Choice {
    Schedule schedule;
    double cost;
  };

  /** Chooses turning points from pictures like those that the model draws. */
  Result<Choice> choose_schedule(Span<const macula_image> pictures, ChooseOptions options = {}) const {
    options.pictures = pictures.data();
    options.picture_count = pictures.size();
    macula_schedule *made = nullptr;
    double cost = 0;
    macula_status status = macula_schedule_choose(get(), &options, &cost, &made);
    return detail::outcome(status, Choice{Schedule(made), cost});
  }

  /** Finds the neurons of a subject from pictures of it, all of one size. */
  Result<Concept> discover(Span<const macula_image> pictures, const std::string &trigger, const std::string &class_noun,
                           DiscoverOptions options = {}, const Progress &progress = {}) {
    detail::Watch watch(progress);
    options.pictures = pictures.data();
    options.picture_count = pictures.size();
    options.trigger = trigger.c_str();
    options.class_noun = class_noun.c_str();
    watch.join(options);
    macula_concept *made = nullptr;
    macula_status status = macula_discover(get(), &options, &made);
    watch.end();
    return detail::outcome(status, Concept(made));
  }

  /** Gives the weights of several concepts new values, from scenes of their subjects; the new ones come in their order. */
  Result<std::vector<Concept>> tune_together(Span<const Companion> companions, TogetherOptions options = {},
                                             const Progress &progress = {}) {
    detail::Watch watch(progress);
    std::vector<macula_companion> plain(companions.begin(), companions.end());
    options.companions = plain.data();
    options.companion_count = plain.size();
    watch.join(options);
    std::vector<macula_concept *> made(plain.size() + 1, nullptr);
    macula_status status = macula_tune_together(get(), &options, made.data());
    watch.end();
    std::vector<Concept> owned;
    for (std::size_t at = 0; status == MACULA_STATUS_OK && at < plain.size(); ++at) owned.push_back(Concept(made[at]));
    return detail::outcome(status, std::move(owned));
  }
  Result<std::vector<Concept>> tune_together(std::initializer_list<Companion> companions, TogetherOptions options = {},
                                             const Progress &progress = {}) {
    return tune_together(Span<const Companion>(companions), options, progress);
  }

  /** Encodes a prompt of any length. */
  Result<Embedding> encode_prompt(const std::string &prompt, const CancelToken *cancel = nullptr) {
    macula_embedding *made = nullptr;
    macula_status status =
        macula_pipeline_encode_prompt(get(), prompt.c_str(), cancel ? cancel->get() : nullptr, &made);
    return detail::outcome(status, Embedding(made));
  }

  /** One prediction of the UNet, written to the memory of `out`. */
  Result<void> denoise(const DenoiseInputs &inputs, const macula_tensor &out) {
    return detail::outcome(macula_pipeline_denoise(get(), &inputs, &out));
  }

 private:
  using Owner::Owner;
};

/** The version of the library that is loaded, e.g. `"0.1.0"`. */
inline const char *version() noexcept { return macula_version_string(); }

/** The same as one number that grows: `major * 1000000 + minor * 1000 + patch`. */
inline std::uint32_t version_number() noexcept { return macula_version_number(); }

/** The name of a status, e.g. `"MACULA_STATUS_NOT_FOUND"`. */
inline const char *name(macula_status status) noexcept { return macula_status_name(status); }

/** One sentence on what a status means. */
inline const char *meaning(macula_status status) noexcept { return macula_status_message(status); }

}  // namespace macula

#endif  // MACULA_HPP
