/* A C++ host that uses every part of macula.hpp with a real model. Arguments: a model folder with a decomposed process, a
   folder of four pictures, a folder to write in. */
#include <macula.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);       \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (0)

using macula::Concept, macula::Flow, macula::Images, macula::Pipeline, macula::Runtime, macula::Schedule,
    macula::Trajectory;

template <class... T>
constexpr bool move_only =
    ((std::is_nothrow_move_constructible_v<T> && std::is_nothrow_move_assignable_v<T> &&
      !std::is_copy_constructible_v<T> && !std::is_copy_assignable_v<T>)&&...);
static_assert(move_only<Runtime, Pipeline, Concept, Schedule, Trajectory, macula::Embedding, macula::CancelToken>);
static_assert(std::is_move_constructible_v<Images> && !std::is_copy_constructible_v<Images>);

static macula::DrawOptions quick() {
  macula::DrawOptions options;
  options.steps = 2;
  options.guidance = 1.0;
  options.seed = 7;
  return options;
}

static std::vector<std::uint8_t> pixels(const Images &images) {
  auto view = images[0].pixels();
  return {view.begin(), view.end()};
}

/* The first `count` weights of every projection of a pipeline. */
static Concept first_weights(const Pipeline &pipeline, std::uint32_t count) {
  std::vector<std::uint32_t> indices(count);
  for (std::uint32_t at = 0; at < count; ++at) indices[at] = at;
  macula_pipeline_info info = pipeline.info().value();
  std::vector<macula_layer> layers;
  for (std::size_t at = 0; at < info.projection_count; ++at) {
    macula_layer_info projection = pipeline.projection(at).value();
    layers.push_back({projection.path, projection.out_features, projection.in_features, indices.data(), count, nullptr});
  }
  macula::ConceptOptions options;
  options.fingerprint = info.fingerprint;
  options.title = "a test";
  options.trigger = "cat";
  return Concept::create(layers, options).value();
}

static void errors_come_both_ways(const Runtime &runtime) {
  auto missing = Pipeline::open(runtime, "/nowhere");
  CHECK(!missing && missing.error().status == MACULA_STATUS_NOT_FOUND);
  CHECK(missing.error().message.find("/nowhere") != std::string::npos);
  try {
    (void)Concept::load("/nowhere.safetensors").value();
    CHECK(!"an exception");
  } catch (const macula::Exception &exception) {
    CHECK(exception.status() == MACULA_STATUS_NOT_FOUND);
    CHECK(std::strstr(exception.what(), "/nowhere.safetensors"));
  }
}

static void what_was_closed_or_moved_is_empty(const Runtime &runtime, const std::string &model) {
  Pipeline first = Pipeline::open(runtime, model).value();
  Pipeline second = std::move(first);
  CHECK(first.get() == nullptr && first.info().error().status == MACULA_STATUS_INVALID_ARGUMENT);
  second.close().value();
  CHECK(second.draw("a cat").error().status == MACULA_STATUS_INVALID_ARGUMENT);
  CHECK(second.close());
}

static void progress_is_told_and_stops(Pipeline &pipeline) {
  std::vector<std::uint64_t> done;
  auto images = pipeline.draw("a cat", quick(), [&](const macula_progress &progress) {
    if (!std::strcmp(progress.stage, "denoise")) done.push_back(progress.done);
    return Flow::proceed;
  });
  CHECK(images && images->size() == 1);
  CHECK((done == std::vector<std::uint64_t>{0, 1, 2}));
  auto stopped = pipeline.draw("a cat", quick(), [](const macula_progress &) { return Flow::stop; });
  CHECK(stopped.error().status == MACULA_STATUS_CANCELLED);
  try {
    (void)pipeline.draw("a cat", quick(), [](const macula_progress &) -> Flow { throw 7; });
    CHECK(!"what the lambda threw");
  } catch (int thrown) {
    CHECK(thrown == 7);
  }
  CHECK(pixels(*pipeline.draw("a cat", quick())) == pixels(*images));
}

static void a_token_stops_from_another_thread(Pipeline &pipeline) {
  auto token = macula::CancelToken::create().value();
  macula::DrawOptions options = quick();
  options.steps = 1000;
  options.cancel = token.get();
  std::atomic<bool> begun{false};
  std::thread other([&] {
    while (!begun) std::this_thread::yield();
    token.cancel().value();
  });
  auto stopped = pipeline.draw("a cat", options, [&](const macula_progress &) { begun = true; return Flow::proceed; });
  other.join();
  CHECK(stopped.error().status == MACULA_STATUS_CANCELLED);
  CHECK(token.is_cancelled().value());
  token.reset().value();
  CHECK(!token.is_cancelled().value());
}

static void concepts_compose_and_clear(Pipeline &pipeline, const std::string &folder) {
  auto base = pixels(*pipeline.draw("a cat", quick()));
  Concept few = first_weights(pipeline, 8), many = first_weights(pipeline, 64);
  pipeline.compose({many, {few, 0.5f}}).value();
  CHECK(pixels(*pipeline.draw("a cat", quick())) != base);
  pipeline.compose({}).value();
  CHECK(pixels(*pipeline.draw("a cat", quick())) == base);
  std::vector<macula::Term> terms{many};
  pipeline.compose(terms).value();
  CHECK(pipeline.ablate({many}).error().status == MACULA_STATUS_INVALID_ARGUMENT);
  pipeline.clear().value();
  CHECK(pixels(*pipeline.draw("a cat", quick())) == base);

  std::string file = folder + "/many.safetensors";
  many.save(file).value();
  Concept read = Concept::load(file).value();
  CHECK(read.metadata("macula.trigger").value() == "cat");
  CHECK(read.info()->neurons == many.info()->neurons && !read.entry(0)->first.empty());
  CHECK((few.indices(0).value() == std::vector<std::uint32_t>{0, 1, 2, 3, 4, 5, 6, 7}));
  CHECK(few.values(0).value() == std::vector<float>(8, 0.0f) && few.info()->values == MACULA_VALUES_NONE);
  CHECK(few.info()->token_row_count == 0 && !few.token_row(0));
  Concept rest = read.without(few).value();
  CHECK(rest.indices(0)->size() == 56 && rest.intersected_with(few)->indices(0)->empty());
  CHECK(rest.united_with(few)->info()->neurons == many.info()->neurons);
  auto overlap = many.overlap(few).value();
  CHECK(overlap.total.jaccard == 8.0 / 64.0 && overlap.layers.size() == many.info()->layer_count);
  CHECK(Concept::load_bytes({reinterpret_cast<const unsigned char *>("no"), 2}).error().status ==
        MACULA_STATUS_INVALID_FILE);
}

static void single_steps_are_denoised(Pipeline &pipeline) {
  macula_pipeline_info info = pipeline.info().value();
  auto rows = static_cast<std::int64_t>(info.height / info.latent_factor);
  auto columns = static_cast<std::int64_t>(info.width / info.latent_factor);
  auto channels = static_cast<std::int64_t>(info.latent_channels);
  std::vector<float> sample(static_cast<std::size_t>(channels * rows * columns), 0.25f), out(sample.size());
  auto embedding = pipeline.encode_prompt("a cat").value();
  macula_embedding_info encoded = embedding.info().value();
  macula_tensor states = macula::input_tensor(sample, {1, channels, rows, columns});
  std::array<std::int64_t, 1> classes{0};
  macula_tensor labels = macula::input_tensor(classes, {1});
  macula::DenoiseInputs inputs;
  inputs.sample = &states;
  inputs.context = &encoded.context;
  inputs.embedding = embedding.get();
  inputs.timestep = 500;
  if (!pipeline.denoise(inputs, macula::output_tensor(out, {1, channels, rows, columns}))) inputs.class_labels = &labels;
  pipeline.denoise(inputs, macula::output_tensor(out, {1, channels, rows, columns})).value();
  CHECK(std::any_of(out.begin(), out.end(), [](float number) { return number != 0.0f; }));
  auto wrong = pipeline.denoise(inputs, macula::output_tensor(out, {1, channels, rows}));
  CHECK(wrong.error().status == MACULA_STATUS_INVALID_ARGUMENT);
  CHECK(pipeline.memory()->weights > 0);
}

/* The model's own decomposed process is drawn with, and walked by a loop of the host's own. */
static void schedules_are_read_and_walked(Pipeline &pipeline) {
  Schedule schedule = pipeline.schedule().value();
  macula_schedule_info info = schedule.info().value();
  CHECK(info.stage_count > 1 && Schedule::from_json(info.json)->info()->stage_count == info.stage_count);
  CHECK(Schedule::from_json("{").error().status == MACULA_STATUS_INVALID_FILE);
  CHECK(schedule.stage(0)->first_time == 0 && schedule.stage(info.stage_count).error().status == MACULA_STATUS_INVALID_ARGUMENT);
  CHECK(schedule.component(0, 200)->signal < schedule.component(info.stage_count - 1, 200)->signal);
  pipeline.check(schedule).value();
  macula::DrawOptions options = quick();
  options.steps = 4;
  auto plain = pixels(pipeline.draw("a cat", options).value());
  options.schedule = schedule.get();
  CHECK(pixels(pipeline.draw("a cat", options).value()) != plain);

  macula::TrajectoryOptions walk;
  walk.steps = options.steps;
  Trajectory trajectory = schedule.begin(walk).value();
  schedule.close().value();
  std::vector<float> state(3 * 64 * 64, 0.5f), clean(state.size()), noise(state.size(), 0.5f);
  auto part = [](std::vector<float> &numbers, std::size_t height, std::size_t width) {
    return macula::output_tensor(macula::Span<float>(numbers.data(), 3 * height * width),
                                 {1, 3, static_cast<std::int64_t>(height), static_cast<std::int64_t>(width)});
  };
  macula_trajectory_info at = trajectory.info().value();
  trajectory.start(part(noise, at.height, at.width), part(state, at.height, at.width)).value();
  for (; !at.done; at = trajectory.info().value()) {
    macula_tensor now = part(state, at.height, at.width), lift = part(noise, at.next_height, at.next_width);
    macula_tensor shown = part(clean, at.height, at.width);
    macula::StepExtras extras;
    extras.lift_noise = at.lifts ? &lift : nullptr;
    extras.out_clean = &shown;
    trajectory.step(now, now, part(state, at.next_height, at.next_width), extras).value();
  }
  CHECK(at.width == 64 && at.step == at.step_count);
  CHECK(trajectory.step(part(state, 64, 64), part(state, 64, 64), part(state, 64, 64)).error().status ==
        MACULA_STATUS_INVALID_ARGUMENT);
}

static void turning_points_are_chosen(const Pipeline &pipeline, const std::string &pictures) {
  std::vector<Images> read;
  std::vector<macula_image> views;
  for (const char *name : {"/1.png", "/2.png", "/3.png", "/4.png"}) {
    read.push_back(Images::read(pictures + name, 64, 64).value());
    views.push_back(read.back()[0]);
  }
  Pipeline::Choice choice = pipeline.choose_schedule(views).value();
  CHECK(choice.cost > 0 && choice.cost < 1 && choice.schedule.info()->stage_count > 1);
  CHECK(pipeline.choose_schedule({}).error().status == MACULA_STATUS_INVALID_ARGUMENT);
}

static void pictures_are_written_and_read(Pipeline &pipeline, const std::string &folder) {
  macula::DrawOptions two = quick();
  two.batch = 2;
  Images images = pipeline.draw("a cat", two).value();
  CHECK(images.size() == 2);
  for (const macula::Image &image : images) CHECK(image.pixels().size() == std::size_t{image.width} * image.height * 3);
  images.write_png(1, folder + "/picture.png").value();
  Images read = Images::read(folder + "/picture.png", images[1].width, images[1].height).value();
  CHECK(std::equal(read[0].pixels().begin(), read[0].pixels().end(), images[1].pixels().begin()));
  std::array<std::uint8_t, 12> grey{};
  macula::Image(grey, 2).write_png(folder + "/grey.png").value();
  CHECK(Images::read(folder + "/grey.png", 2, 2).value()[0].pixels()[0] == 0);
}

/* The search itself is tested elsewhere: here that words and pictures arrive, and that it can be stopped. */
static void a_search_takes_pictures_and_stops(Pipeline &pipeline) {
  auto drawn = pipeline.draw("a cat", quick()).value();
  std::vector<macula_image> pictures(drawn.begin(), drawn.end());
  auto unknown = pipeline.discover(pictures, "no such trigger", "cat");
  CHECK(unknown.error().status == MACULA_STATUS_INVALID_ARGUMENT);
  CHECK(unknown.error().message.find("no such trigger") != std::string::npos);
  auto stopped = pipeline.discover(pictures, "<s1>", "cat", {}, [](const macula_progress &) { return Flow::stop; });
  CHECK(stopped.error().status == MACULA_STATUS_CANCELLED);
}

static void concepts_are_tuned_together(Pipeline &pipeline) {
  macula::DrawOptions draw = quick();
  draw.width = draw.height = 32;
  auto drawn = pipeline.draw("a cat", draw).value();
  std::vector<macula_image> pictures(drawn.begin(), drawn.end());
  macula::DiscoverOptions search;
  search.method = MACULA_METHOD_SALIENCY;
  search.batches = search.batch = 1;
  auto cat = pipeline.discover(pictures, "<s1>", "cat", search).value();
  auto dog = pipeline.discover(pictures, "<s2>", "dog", search).value();
  macula::TogetherOptions options;
  options.steps = options.scenes = options.batch = 2;
  auto tuned = pipeline.tune_together({{cat, pictures}, {dog, pictures}}, options).value();
  CHECK(tuned.size() == 2 && tuned[1].info()->neurons == dog.info()->neurons);
  CHECK(std::string(tuned[1].info()->trigger) == "<s2>");
  auto alone = pipeline.tune_together({{cat, pictures}}, options);
  CHECK(alone.error().status == MACULA_STATUS_INVALID_ARGUMENT);
  auto stopped = pipeline.tune_together({{cat, pictures}, {dog, pictures}}, options,
                                        [](const macula_progress &) { return Flow::stop; });
  CHECK(stopped.error().status == MACULA_STATUS_CANCELLED);
}

int main(int argc, char **argv) {
  CHECK(argc == 4);
  std::string model = argv[1], pictures = argv[2], folder = argv[3];
  std::atomic<int> heard{0};
  macula::RuntimeOptions options;
  options.log_level = MACULA_LOG_DEBUG;
  Runtime runtime = Runtime::create(options, [&](macula_log_level, const char *target, const char *) {
                      heard += std::strstr(target, "macula") != nullptr;
                      throw "what a log throws is dropped";
                    }).value();
  CHECK(std::strlen(runtime.info()->version) > 0);
  errors_come_both_ways(runtime);
  what_was_closed_or_moved_is_empty(runtime, model);
  Pipeline pipeline = Pipeline::open(runtime, model).value();
  progress_is_told_and_stops(pipeline);
  a_token_stops_from_another_thread(pipeline);
  concepts_compose_and_clear(pipeline, folder);
  single_steps_are_denoised(pipeline);
  schedules_are_read_and_walked(pipeline);
  turning_points_are_chosen(pipeline, pictures);
  pictures_are_written_and_read(pipeline, folder);
  a_search_takes_pictures_and_stops(pipeline);
  concepts_are_tuned_together(pipeline);
  CHECK(heard > 0);
  runtime = Runtime::create().value();
  int before = heard;
  CHECK(pipeline.draw("a cat", quick()));
  CHECK(heard == before);
  CHECK(!std::strcmp(macula::name(MACULA_STATUS_BUSY), "MACULA_STATUS_BUSY") && *macula::meaning(MACULA_STATUS_BUSY));
  CHECK(std::string(macula::version()).find('.') != std::string::npos);
  CHECK(macula::version_number() ==
        MACULA_VERSION_MAJOR * 1000000u + MACULA_VERSION_MINOR * 1000u + MACULA_VERSION_PATCH);
}
