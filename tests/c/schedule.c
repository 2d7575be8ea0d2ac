/* Schedules from C: read, written, looked at, refused; a draw with one, and the same picture by a loop of the host's own.
   Arguments: a model folder with a decomposed process; a folder of pictures; a folder to write in. */
#include "check.h"

static macula_runtime *runtime;
static macula_pipeline *pipeline;
static macula_schedule *schedule;

enum { STEPS = 4, MOST = 3 * 64 * 64 };

static void reading_and_writing(void) {
  macula_schedule *again = NULL;
  macula_schedule_info info = MACULA_SCHEDULE_INFO_INIT, other = MACULA_SCHEDULE_INFO_INIT;
  OK(macula_schedule_get_info(schedule, &info));
  OK(macula_schedule_from_json(info.json, &again));
  OK(macula_schedule_get_info(again, &other));
  CHECK(!strcmp(info.json, other.json) && strstr(info.json, "\"turning_points\""));
  CHECK(info.stage_count == other.stage_count && info.stage_count > 1);
  CHECK(info.attenuation_r > 0 && info.attenuation_r <= 1 && info.attenuation_q >= 1);
  OK(macula_schedule_free(again));
  EXPECT(MACULA_STATUS_INVALID_FILE, "JSON", macula_schedule_from_json("{", &again));
  EXPECT(MACULA_STATUS_INVALID_FILE, "turning_points holds 720 before 360",
         macula_schedule_from_json("{\"turning_points\": [720, 360]}", &again));
  EXPECT(MACULA_STATUS_INVALID_FILE, "attenuation: r is 2",
         macula_schedule_from_json("{\"turning_points\": [360], \"attenuation\": {\"r\": 2}}", &again));
  EXPECT(MACULA_STATUS_UNSUPPORTED, "LCMScheduler",
         macula_schedule_from_json("{\"turning_points\": [360], \"_class_name\": \"LCMScheduler\"}", &again));
}

static void stages_and_components(void) {
  macula_schedule_info info = MACULA_SCHEDULE_INFO_INIT;
  macula_stage_info stage = MACULA_STAGE_INFO_INIT;
  macula_component_info fine = MACULA_COMPONENT_INFO_INIT, coarse = MACULA_COMPONENT_INFO_INIT;
  size_t next = 0, last;
  OK(macula_schedule_get_info(schedule, &info));
  last = info.stage_count - 1;
  for (size_t at = 0; at <= last; at++) {
    OK(macula_schedule_get_stage(schedule, at, &stage));
    CHECK(stage.first_time == next && stage.last_time >= stage.first_time && stage.side == (size_t)64 >> at);
    next = stage.last_time + 1;
  }
  CHECK(next == info.train_timesteps + 1);
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "stage is", macula_schedule_get_stage(schedule, last + 1, &stage));
  OK(macula_schedule_get_component(schedule, 0, 200, &fine));
  OK(macula_schedule_get_component(schedule, last, 200, &coarse));
  CHECK(fine.sigma == coarse.sigma && fine.signal < coarse.signal && fine.drop_error < coarse.drop_error);
  CHECK(fine.kernel_scale < 1 && fine.kernel_variance > 0);
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "time 0", macula_schedule_get_component(schedule, 0, 0, &fine));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "component is", macula_schedule_get_component(schedule, last + 1, 1, &fine));
}

static void checking(void) {
  macula_schedule *foreign = NULL;
  OK(macula_schedule_check(schedule, pipeline, 0, 0, 2, NULL));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "32", macula_schedule_check(schedule, pipeline, 32, 32, 0, NULL));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "batch is 513", macula_schedule_check(schedule, pipeline, 0, 0, 513, NULL));
  OK(macula_schedule_from_json("{\"turning_points\": [400]}", &foreign));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "another model's", macula_schedule_check(foreign, pipeline, 0, 0, 0, NULL));
  OK(macula_schedule_free(foreign));
}

/* Turning points from four pictures: a greater budget drops earlier and costs less. */
static void choosing(const char *pictures, const char *folder) {
  macula_images *read[4] = {NULL, NULL, NULL, NULL};
  macula_image images[4];
  macula_choose_options options = MACULA_CHOOSE_OPTIONS_INIT;
  macula_schedule *chosen[2] = {NULL, NULL};
  macula_stage_info stage[2] = {MACULA_STAGE_INFO_INIT, MACULA_STAGE_INFO_INIT};
  double cost[2];
  char path[4096], line[8] = "";
  FILE *plot;
  for (int at = 0; at < 4; at++) {
    snprintf(path, sizeof path, "%s/%d.png", pictures, at + 1);
    OK(macula_images_read(path, 64, 64, &read[at]));
    OK(macula_images_get(read[at], 0, &images[at]));
  }
  options.pictures = images;
  options.picture_count = 4;
  snprintf(path, sizeof path, "%s/plot.svg", folder);
  options.plot = path;
  for (int at = 0; at < 2; at++) {
    options.drop_error = at ? 1e-2 : 1e-3;
    OK(macula_schedule_choose(pipeline, &options, &cost[at], &chosen[at]));
    OK(macula_schedule_get_stage(chosen[at], 0, &stage[at]));
    CHECK(stage[at].lift_std > 0 && stage[at].last_time < 999);
    OK(macula_schedule_free(chosen[at]));
  }
  CHECK(stage[1].last_time < stage[0].last_time && cost[1] < cost[0] && cost[0] < 1);
  plot = fopen(path, "r");
  CHECK(plot && fgets(line, 5, plot) && !strcmp(line, "<svg"));
  fclose(plot);
  options.plot = NULL;
  options.drop_error = 0;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "budget is 0", macula_schedule_choose(pipeline, &options, NULL, &chosen[0]));
  options.drop_error = 1e-3;
  options.attenuation_r = 1.5;
  EXPECT(MACULA_STATUS_INVALID_FILE, "r = 1.5", macula_schedule_choose(pipeline, &options, NULL, &chosen[0]));
  options.attenuation_r = 1;
  options.turning_points = 7;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "2^7", macula_schedule_choose(pipeline, &options, NULL, &chosen[0]));
  for (int at = 0; at < 4; at++) {
    OK(macula_images_free(read[at]));
  }
}

static macula_tensor state_of(float *data, size_t height, size_t width) {
  macula_tensor tensor = {data, 3 * height * width * sizeof *data, {1, 3, (int64_t)height, (int64_t)width}, 4,
                          MACULA_DTYPE_F32, MACULA_DEVICE_CPU, 0};
  return tensor;
}

typedef struct {
  uint64_t told, total, sides[64];
} course;

static int32_t listen(void *userdata, const macula_progress *progress) {
  course *heard = userdata;
  CHECK(!strcmp(progress->stage, "denoise") && progress->done == heard->told);
  if (progress->latent) {
    CHECK(progress->preview && progress->preview->width == (uint32_t)progress->latent->shape[3]);
    heard->sides[heard->told - 1] = (uint64_t)progress->latent->shape[3];
  }
  heard->told++;
  heard->total = progress->total;
  return 0;
}

/* A draw, which is told of every step with its size, and the same walk by a loop of this program's own. */
static void drawing_and_driving(const macula_schedule *schedule, int ordinary) {
  static float start[MOST], state[MOST], seen[MOST], prediction[MOST], clean[MOST],
      lift[MOST];
  macula_trajectory_options walked = MACULA_TRAJECTORY_OPTIONS_INIT;
  macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
  macula_trajectory_info info = MACULA_TRAJECTORY_INFO_INIT;
  macula_embedding_info embedded = MACULA_EMBEDDING_INFO_INIT;
  macula_trajectory *trajectory = NULL;
  macula_embedding *embedding = NULL;
  macula_images *images = NULL;
  macula_tensor noise, sample, shown_to_model, out;
  course heard = {0, 0, {0}};
  uint32_t random = 1;
  size_t taken = 0;
  walked.steps = STEPS;
  OK(macula_schedule_begin(schedule, &walked, &trajectory));
  OK(macula_trajectory_get_info(trajectory, &info));
  CHECK(info.step == 0 && info.stage > 0 && info.width == 64u >> info.stage && !info.done && info.has_class_label);
  for (size_t at = 0; at < MOST; at++) { /* uniform, with the variance of a normal number */
    random = random * 1664525u + 1013904223u;
    start[at] = ((float)(random >> 8) / 8388608.0f - 1.0f) * 1.7320508f;
    lift[at] = start[at];
  }
  noise = state_of(start, info.height, info.width);
  options.prompt = "a tiger on a blue background";
  options.schedule = schedule;
  options.steps = STEPS;
  options.guidance = 1.0;
  options.noise = &noise;
  options.progress = listen;
  options.progress_userdata = &heard;
  options.preview = 1;
  OK(macula_pipeline_draw(pipeline, &options, &images));
  OK(macula_images_free(images));
  CHECK(heard.told == info.step_count + 1 && heard.total == info.step_count);

  OK(macula_pipeline_encode_prompt(pipeline, options.prompt, NULL, &embedding));
  OK(macula_embedding_get_info(embedding, &embedded));
  out = state_of(state, info.height, info.width);
  OK(macula_trajectory_start(trajectory, &noise, NULL, &out));
  for (;; taken++) {
    OK(macula_trajectory_get_info(trajectory, &info));
    if (info.done) {
      break;
    }
    macula_denoise_inputs inputs = MACULA_DENOISE_INPUTS_INIT;
    macula_tensor labels = {&info.class_label, 8, {1}, 1, MACULA_DTYPE_I64, MACULA_DEVICE_CPU, 0};
    macula_tensor predicted = state_of(prediction, info.height, info.width);
    macula_tensor shown = state_of(clean, info.height, info.width);
    macula_tensor lifted = state_of(lift, info.next_height, info.next_width);
    CHECK((info.input_scale == 1.0) == (!ordinary || !info.stage) && heard.sides[taken] == info.width);
    sample = state_of(state, info.height, info.width);
    for (size_t at = 0; at < 3 * info.height * info.width; at++) {
      seen[at] = (float)(info.input_scale * state[at]);
    }
    shown_to_model = state_of(seen, info.height, info.width);
    inputs.sample = &shown_to_model;
    inputs.stage = info.stage;
    inputs.context = &embedded.context;
    inputs.class_labels = &labels;
    inputs.timestep = info.timestep;
    OK(macula_pipeline_denoise(pipeline, &inputs, &predicted));
    out = state_of(state, info.next_height, info.next_width);
    if (info.lifts) {
      CHECK(info.next_width == 2 * info.width);
      EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "lift noise",
             macula_trajectory_step(trajectory, &sample, &predicted, NULL, NULL, &out, NULL));
      EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "out_state",
             macula_trajectory_step(trajectory, &sample, &predicted, NULL, &lifted, &sample, NULL));
    } else {
      EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "overlap",
             macula_trajectory_step(trajectory, &sample, &predicted, NULL, NULL, &out, &out));
    }
    OK(macula_trajectory_step(trajectory, &sample, &predicted, NULL, info.lifts ? &lifted : NULL, &out, &shown));
    for (size_t at = 0; at < 3 * info.height * info.width; at++) {
      CHECK(clean[at] >= -1.0001f && clean[at] <= 1.0001f);
    }
  }
  CHECK(taken == info.step_count && info.stage == 0 && info.width == 64);
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "first step", macula_trajectory_start(trajectory, &out, NULL, &out));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "steps are done",
         macula_trajectory_step(trajectory, &out, &out, NULL, NULL, &out, NULL));
  OK(macula_embedding_free(embedding));
  OK(macula_trajectory_free(trajectory));
  walked.sampler = MACULA_SAMPLER_EULER;
  EXPECT(MACULA_STATUS_UNSUPPORTED, "Euler", macula_schedule_begin(schedule, &walked, &trajectory));
  walked.sampler = MACULA_SAMPLER_DDPM;
  walked.width = 65;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "65", macula_schedule_begin(schedule, &walked, &trajectory));
}

/* The same UNet as ordinary models of pictures of 64 and of 32 pixels, which it knows by their class. */
static void driving_ordinary_models(void) {
  static const char *const JSON =
      "{\"beta_schedule\": \"squaredcos_cap_v2\", \"prediction_type\": \"v_prediction\", \"turning_points\": [500],"
      " \"stage_class_labels\": [0, 4], \"ordinary_models\": true}";
  macula_pipeline_info info = MACULA_PIPELINE_INFO_INIT;
  macula_schedule *ordinary = NULL;
  OK(macula_pipeline_get_info(pipeline, &info));
  CHECK(info.unet_count == 1);
  OK(macula_schedule_from_json(JSON, &ordinary));
  OK(macula_schedule_check(ordinary, pipeline, 0, 0, 0, NULL));
  drawing_and_driving(ordinary, 1);
  OK(macula_schedule_free(ordinary));
}

int main(int argc, char **argv) {
  CHECK(argc == 4);
  OK(macula_runtime_create(NULL, &runtime));
  OK(macula_pipeline_open(runtime, argv[1], NULL, &pipeline));
  OK(macula_pipeline_get_schedule(pipeline, &schedule));
  reading_and_writing();
  stages_and_components();
  checking();
  choosing(argv[2], argv[3]);
  drawing_and_driving(schedule, 0);
  driving_ordinary_models();
  OK(macula_schedule_free(schedule));
  OK(macula_pipeline_free(pipeline));
  OK(macula_runtime_free(runtime));
  return 0;
}
