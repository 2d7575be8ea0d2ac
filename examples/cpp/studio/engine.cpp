/* The jobs, and the one thread that does them; see engine.hpp. This is all that the program asks of Macula. */
#include "engine.hpp"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <limits>

namespace studio {

namespace fs = std::filesystem;

/** Finished pictures that are kept in memory. */
constexpr std::size_t kept_pictures = 60;

static PicturePointer picture_of(const macula_image &image, const Recipe &recipe, double seconds) {
  auto made = std::make_shared<Picture>();
  made->width = image.width;
  made->height = image.height;
  made->recipe = recipe;
  made->seconds = seconds;
  made->rgba.resize(std::size_t{image.width} * image.height * 4);
  const std::uint8_t *from = image.rgb;
  for (std::size_t to = 0; to < made->rgba.size(); to += 4, from += 3) {
    std::copy(from, from + 3, &made->rgba[to]);
    made->rgba[to + 3] = 255;
  }
  return made;
}

/** The files of a folder with one of some endings, in the order of their names. */
static std::vector<fs::path> files_of(const std::string &folder, std::initializer_list<const char *> endings) {
  std::vector<fs::path> found;
  std::error_code error;
  for (const fs::directory_entry &entry : fs::directory_iterator(folder, error)) {
    std::string ending = entry.path().extension().string();
    std::transform(ending.begin(), ending.end(), ending.begin(), [](unsigned char c) { return std::tolower(c); });
    if (std::find(endings.begin(), endings.end(), ending) != endings.end()) found.push_back(entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

static double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

static std::string with_seconds(const std::string &what, double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, " in %.1f s", seconds);
  return what + text;
}

Engine::Engine(std::function<void()> wake)
    : wake_(std::move(wake)), worker_([this] { work(); }) {}

Engine::~Engine() {
  cancel();
  {
    std::lock_guard lock(mutex_);
    ends_ = true;
  }
  posted_.notify_one();
  worker_.join();
}

State Engine::look() const {
  std::lock_guard lock(mutex_);
  return state_;
}

/* ----------------------------------------------------------------------------------------------------------------
 * Orders, from any thread
 * ---------------------------------------------------------------------------------------------------------------- */

void Engine::open(std::string folder) {
  post([this, folder = std::move(folder)](auto &) { open_now(folder); });
}

void Engine::add_concepts(std::string path) {
  post([this, path = std::move(path)](auto &) { read_concepts(path); });
}

void Engine::draw(Recipe recipe) {
  post([this, recipe = std::move(recipe)](auto &token) { draw_now(recipe, token); });
}

void Engine::find(Search search) {
  post([this, search = std::move(search)](auto &token) { find_now(search, token); });
}

void Engine::save(PicturePointer picture, std::string file) {
  auto write = [this, picture = std::move(picture), file = std::move(file)] {
    std::vector<std::uint8_t> rgb;
    rgb.reserve(picture->rgba.size() / 4 * 3);
    for (std::size_t at = 0; at < picture->rgba.size(); at += 4) {
      rgb.insert(rgb.end(), &picture->rgba[at], &picture->rgba[at + 3]);
    }
    std::error_code error;
    if (fs::path folder = fs::path(file).parent_path(); !folder.empty()) fs::create_directories(folder, error);
    macula::Result<void> written = macula::Image(rgb, picture->width).write_png(file);
    change([&](State &state) {
      state.message = written ? "Saved " + file : written.error().message;
      state.failed = !written;
    });
  };
  std::lock_guard lock(mutex_);
  auto is_done = [](std::future<void> &one) { return one.wait_for(std::chrono::seconds(0)) == std::future_status::ready; };
  saves_.erase(std::remove_if(saves_.begin(), saves_.end(), is_done), saves_.end());
  saves_.push_back(std::async(std::launch::async, std::move(write)));
}

void Engine::cancel() {
  std::lock_guard lock(mutex_);
  jobs_.clear();
  if (running_) (void)running_->cancel();
}

void Engine::post(std::function<void(const macula::CancelToken &)> work) {
  auto token = std::make_shared<macula::CancelToken>(macula::CancelToken::create().value());
  {
    std::lock_guard lock(mutex_);
    jobs_.push_back({std::move(work), std::move(token)});
  }
  posted_.notify_one();
}

/* ----------------------------------------------------------------------------------------------------------------
 * The worker
 * ---------------------------------------------------------------------------------------------------------------- */

void Engine::work() {
  for (;;) {
    Job job;
    {
      std::unique_lock lock(mutex_);
      posted_.wait(lock, [this] { return ends_ || !jobs_.empty(); });
      if (ends_) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
      running_ = job.token;
    }
    job.work(*job.token);
  }
}

template <class Change>
void Engine::change(Change how) {
  {
    std::lock_guard lock(mutex_);
    how(state_);
  }
  wake_();
}

void Engine::begin(Activity activity, std::string stage) {
  change([&](State &state) {
    state.activity = activity;
    state.stage = std::move(stage);
    state.done = state.total = 0;
    state.loss = std::numeric_limits<double>::quiet_NaN();
    state.message.clear();
    state.failed = false;
  });
}

void Engine::end(std::string message, bool failed) {
  change([&](State &state) {
    state.activity = Activity::idle;
    state.preview.reset();
    state.message = std::move(message);
    state.failed = failed;
  });
}

void Engine::end(const macula::Error &error) {
  bool cancelled = error.status == MACULA_STATUS_CANCELLED;
  end(cancelled ? "Cancelled" : error.message, !cancelled);
}

/** Shows how far a job is; pictures that are being drawn are shown as they are predicted, if they come with a recipe. */
macula::Progress Engine::watch(const Recipe *recipe) {
  return [this, recipe](const macula_progress &progress) {
    PicturePointer preview;
    if (recipe && progress.preview) preview = picture_of(*progress.preview, *recipe, 0);
    change([&](State &state) {
      state.stage = progress.stage;
      state.done = progress.done;
      state.total = progress.total;
      state.loss = progress.loss;
      if (preview) state.preview = preview;
    });
    return macula::Flow::proceed;
  };
}

void Engine::open_now(const std::string &folder) {
  begin(Activity::opening, "open");
  if (!runtime_) {
    auto runtime = macula::Runtime::create();
    if (!runtime) return end(runtime.error());
    runtime_ = std::move(*runtime);
  }
  auto began = std::chrono::steady_clock::now();
  macula::SessionOptions session;
  // One core is left to the window, or it would stall while pictures are drawn.
  session.threads = std::max(2u, std::thread::hardware_concurrency()) - 1;
  auto pipeline = macula::Pipeline::open(*runtime_, folder, session);
  if (!pipeline) return end(pipeline.error());
  auto info = pipeline->info();
  auto runtime = runtime_->info();
  if (!info) return end(info.error());
  if (!runtime) return end(runtime.error());
  schedule_.reset();
  if (auto schedule = pipeline->schedule()) schedule_ = std::move(*schedule);
  pipeline_ = std::move(*pipeline);
  concepts_.clear();
  change([&](State &state) {
    state.model = folder;
    state.runtime = std::string("ONNX Runtime ") + runtime->version + ", " + info->provider;
    state.width = static_cast<std::uint32_t>(info->width);
    state.height = static_cast<std::uint32_t>(info->height);
    state.decomposes = schedule_.has_value();
    state.concepts.clear();
  });
  std::error_code error;
  fs::path place = fs::weakly_canonical(folder, error);
  for (int above = 0; above < 3; ++above, place = place.parent_path()) {
    if (fs::is_directory(place / "concepts", error)) {
      read_concepts((place / "concepts").string());
      break;
    }
  }
  end(with_seconds("Opened", seconds_since(began)));
}

void Engine::read_concepts(const std::string &path) {
  std::error_code error;
  std::vector<fs::path> files{path};
  if (fs::is_directory(path, error)) files = files_of(path, {".safetensors"});
  std::string base;
  if (pipeline_) {
    if (auto info = pipeline_->info()) base = info->fingerprint;
  }
  for (const fs::path &file : files) {
    Concept listed;
    listed.file = file.string();
    listed.title = file.stem().string();
    auto read = macula::Concept::load(listed.file);
    if (!read) {
      listed.problem = read.error().message;
    } else if (auto info = read->info(); !info) {
      listed.problem = info.error().message;
    } else {
      listed.words = info->trigger;
      if (*info->class_noun) listed.words += std::string(listed.words.empty() ? "" : " ") + info->class_noun;
      listed.erases = info->role == MACULA_ROLE_ERASE;
      listed.local = info->scope == MACULA_SCOPE_LOCAL;
      listed.neurons = info->neurons;
      if (base != info->fingerprint) listed.problem = "found on another model";
      concepts_.insert_or_assign(listed.file, std::move(*read));
    }
    change([&](State &state) {
      auto same = [&](const Concept &one) { return one.file == listed.file; };
      auto known = std::find_if(state.concepts.begin(), state.concepts.end(), same);
      if (known == state.concepts.end()) {
        state.concepts.push_back(listed);
      } else {
        *known = listed;
      }
    });
  }
}

macula::Result<void> Engine::compose(const Recipe &recipe) {
  std::vector<macula::Term> drawn, erased;
  for (const Use &use : recipe.uses) {
    auto known = concepts_.find(use.file);
    if (known == concepts_.end() || use.strength <= 0) continue;
    auto info = known->second.info();
    if (!info) return info.error();
    bool erases = info->role == MACULA_ROLE_ERASE;
    bool is_local = (use.scope == MACULA_SCOPE_DEFAULT ? info->scope : use.scope) == MACULA_SCOPE_LOCAL;
    // A word that is not in the prompt need not be forgotten there; the library would ask for it.
    if (erases && is_local && recipe.prompt.find(info->trigger) == std::string::npos) continue;
    (erases ? erased : drawn).emplace_back(known->second, use.strength, use.scope);
  }
  if (auto composed = pipeline_->compose(drawn); !composed) return composed;
  return pipeline_->ablate(erased);
}

void Engine::draw_now(const Recipe &recipe, const macula::CancelToken &token) {
  if (!pipeline_) return end("Open a model first", true);
  begin(Activity::drawing, "denoise");
  if (auto composed = compose(recipe); !composed) return end(composed.error());
  macula::DrawOptions options;
  options.steps = static_cast<std::uint32_t>(recipe.steps);
  options.guidance = recipe.guidance;
  options.seed = recipe.seed;
  options.preview = 1;
  options.cancel = token.get();
  options.schedule = recipe.decomposed && schedule_ ? schedule_->get() : nullptr;
  auto began = std::chrono::steady_clock::now();
  auto images = pipeline_->draw(recipe.prompt, options, watch(&recipe));
  if (!images) return end(images.error());
  double seconds = seconds_since(began);
  PicturePointer picture = picture_of((*images)[0], recipe, seconds);
  change([&](State &state) {
    state.pictures.push_back(picture);
    if (state.pictures.size() > kept_pictures) state.pictures.erase(state.pictures.begin());
  });
  end(with_seconds("Drawn", seconds));
}

void Engine::find_now(const Search &search, const macula::CancelToken &token) {
  if (!pipeline_) return end("Open a model first", true);
  begin(Activity::searching, "read pictures");
  auto info = pipeline_->info();
  if (!info) return end(info.error());
  auto width = static_cast<std::uint32_t>(info->width), height = static_cast<std::uint32_t>(info->height);
  std::vector<macula::Images> read;
  std::vector<macula_image> views;
  for (const fs::path &file : files_of(search.pictures, {".png", ".jpg", ".jpeg", ".webp"})) {
    auto images = macula::Images::read(file.string(), width, height);
    if (!images) return end(images.error());
    views.push_back((*images)[0]);
    read.push_back(std::move(*images));
  }
  if (views.empty()) return end("There are no PNG, JPEG or WebP pictures in " + search.pictures, true);
  macula::DiscoverOptions options;
  options.batches = static_cast<std::uint32_t>(search.batches);
  options.cancel = token.get();
  auto found = pipeline_->discover(views, search.trigger, search.class_noun, options, watch(nullptr));
  if (!found) return end(found.error());
  std::error_code error;
  if (fs::path folder = fs::path(search.file).parent_path(); !folder.empty()) fs::create_directories(folder, error);
  if (auto saved = found->save(search.file); !saved) return end(saved.error());
  read_concepts(search.file);
  end("Found “" + search.trigger + " " + search.class_noun + "”, kept in " + search.file);
}

}  // namespace studio
