/* The main job from C: plain, composed and ablated pictures; A then B then A; a sampler of the host's own by single steps;
   statuses of wrong use; log, preview and memory.
   Arguments: a model folder that draws in pixel space, a folder to write in, a model folder that ONNX Runtime refuses. */
#include "world.h"

#include <math.h>

static macula_runtime *runtime;
static macula_pipeline *pipeline;
static macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;

static uint64_t draw_hash(void) {
  macula_images *images = NULL;
  macula_image image;
  uint64_t hash = 14695981039346656037u;
  size_t count = 0;
  OK(macula_pipeline_draw(pipeline, &options, &images));
  OK(macula_images_count(images, &count));
  CHECK(count == options.batch);
  for (size_t at = 0; at < count; at++) {
    OK(macula_images_get(images, at, &image));
    for (size_t byte = 0; byte < (size_t)image.width * image.height * 3; byte++) {
      hash = (hash ^ image.rgb[byte]) * 1099511628211u;
    }
  }
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "index is", macula_images_get(images, count, &image));
  OK(macula_images_free(images));
  return hash;
}

static macula_term term_of(const macula_concept *subject) {
  macula_term term = MACULA_TERM_INIT;
  term.subject = subject;
  return term;
}

static void compositions(void) {
  macula_concept *a = concept_for(pipeline, 200, MACULA_ROLE_IMPLANT);
  macula_concept *b = concept_for(pipeline, 77, MACULA_ROLE_IMPLANT);
  macula_concept *erased = concept_for(pipeline, 300, MACULA_ROLE_ERASE);
  macula_concept *foreign = concept_of(BASE_A, NULL, 0);
  macula_term terms[2];
  uint64_t plain = draw_hash(), with_a, with_both;

  terms[0] = term_of(a);
  terms[1] = term_of(b);
  OK(macula_compose(pipeline, terms, 1));
  with_a = draw_hash();
  CHECK(with_a != plain);
  OK(macula_composition_clear(pipeline));
  CHECK(draw_hash() == plain); /* plain, composed, plain */
  OK(macula_compose(pipeline, terms + 1, 1));
  CHECK(draw_hash() != with_a);
  OK(macula_compose(pipeline, terms, 1));
  CHECK(draw_hash() == with_a); /* A, B, A */
  OK(macula_compose(pipeline, terms, 2));
  with_both = draw_hash();
  CHECK(with_both == with_a); /* b's weights are among a's, and shut is shut */
  OK(macula_compose(pipeline, NULL, 0));
  CHECK(draw_hash() == plain);

  terms[0].strength = 0.0f;
  OK(macula_compose(pipeline, terms, 1));
  CHECK(draw_hash() == plain);
  terms[0].strength = 1.5f;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "strength", macula_compose(pipeline, terms, 1));
  terms[0].strength = 1.0f;
  terms[0].scope = 9;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "scope is 9", macula_compose(pipeline, terms, 1));

  terms[0] = term_of(a);
  terms[0].scope = MACULA_SCOPE_LOCAL; /* its trigger is "cat", which the prompt holds */
  OK(macula_compose(pipeline, terms, 1));
  CHECK(draw_hash() != plain && draw_hash() != with_a);
  {
    uint64_t local = draw_hash();
    terms[0].words = "dog, cat";
    OK(macula_compose(pipeline, terms, 1));
    CHECK(draw_hash() == local);
  }
  terms[0].words = "dog";
  OK(macula_compose(pipeline, terms, 1));
  {
    macula_images *images = NULL;
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "dog", macula_pipeline_draw(pipeline, &options, &images));
  }

  OK(macula_composition_clear(pipeline));
  terms[0] = term_of(erased);
  OK(macula_ablate(pipeline, terms, 1));
  CHECK(draw_hash() != plain);
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "ablate it", macula_compose(pipeline, terms, 1));
  terms[0] = term_of(a);
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "compose it", macula_ablate(pipeline, terms, 1));
  terms[0] = term_of(foreign);
  EXPECT(MACULA_STATUS_WRONG_BASE, BASE_A, macula_compose(pipeline, terms, 1));
  OK(macula_composition_clear(pipeline));
  CHECK(draw_hash() == plain);
  OK(macula_concept_free(a));
  OK(macula_concept_free(b));
  OK(macula_concept_free(erased));
  OK(macula_concept_free(foreign));
}

typedef struct {
  uint64_t calls, previews, latents;
} heard;

static int32_t listen(void *userdata, const macula_progress *progress) {
  heard *so_far = userdata;
  macula_images *images = NULL;
  CHECK(!strcmp(progress->stage, "denoise") && progress->done == so_far->calls && progress->total == options.steps);
  so_far->calls++;
  so_far->previews += progress->preview != NULL;
  so_far->latents += progress->latent != NULL;
  if (progress->latent) {
    CHECK(progress->latent->rank == 4 && progress->latent->shape[0] == options.batch);
    CHECK(progress->latent->dtype == MACULA_DTYPE_F32);
  }
  EXPECT(MACULA_STATUS_BUSY, "at work", macula_pipeline_draw(pipeline, &options, &images));
  EXPECT(MACULA_STATUS_BUSY, "at work", macula_composition_clear(pipeline));
  EXPECT(MACULA_STATUS_BUSY, "not freed", macula_pipeline_free(pipeline));
  return 0;
}

static void progress(void) {
  heard so_far = {0, 0, 0};
  options.progress = listen;
  options.progress_userdata = &so_far;
  options.preview = 1;
  options.batch = 2;
  draw_hash();
  CHECK(so_far.calls == options.steps + 1 && so_far.previews == options.steps && so_far.latents == options.steps);
  options.progress = NULL;
  options.preview = 0;
  options.batch = 1;
}

/* One prediction, its shape checks, and the composition acting on it. */
static void single_steps(void) {
  macula_embedding *embedding = NULL;
  macula_embedding_info info = MACULA_EMBEDDING_INFO_INIT;
  macula_pipeline_info about = MACULA_PIPELINE_INFO_INIT;
  macula_denoise_inputs inputs = MACULA_DENOISE_INPUTS_INIT;
  macula_concept *subject = concept_for(pipeline, 200, MACULA_ROLE_IMPLANT);
  macula_term term = term_of(subject);
  macula_tensor sample, prediction;
  float *numbers, *first, *second, *third;
  size_t count, side;
  const uint32_t token = 1;

  OK(macula_pipeline_encode_prompt(pipeline, PROMPT, NULL, &embedding));
  OK(macula_embedding_get_info(embedding, &info));
  OK(macula_pipeline_get_info(pipeline, &about));
  CHECK(info.context.rank == 3 && info.context.shape[0] == 1 && info.own_tokens > 0);
  CHECK(info.context.shape[1] % (int64_t)about.prompt_tokens == 0);
  side = about.width / about.latent_factor;
  count = about.latent_channels * side * side;
  numbers = malloc(4 * count * sizeof *numbers);
  CHECK(numbers);
  first = numbers + count;
  second = numbers + 2 * count;
  third = numbers + 3 * count;
  for (size_t at = 0; at < count; at++) {
    numbers[at] = (float)((at * 7919) % 1000) / 500.0f - 1.0f;
  }
  memset(&sample, 0, sizeof sample);
  sample.data = numbers;
  sample.dtype = MACULA_DTYPE_F32;
  sample.rank = 4;
  sample.shape[0] = 1;
  sample.shape[1] = (int64_t)about.latent_channels;
  sample.shape[2] = sample.shape[3] = (int64_t)side;
  sample.byte_len = count * sizeof *numbers;
  prediction = sample;
  prediction.data = first;
  inputs.sample = &sample;
  inputs.context = &info.context;
  inputs.timestep = 500;
  OK(macula_pipeline_denoise(pipeline, &inputs, &prediction));
  OK(macula_compose(pipeline, &term, 1));
  prediction.data = second;
  OK(macula_pipeline_denoise(pipeline, &inputs, &prediction));
  CHECK(memcmp(first, second, count * sizeof *first) != 0);
  term.scope = MACULA_SCOPE_LOCAL;
  OK(macula_compose(pipeline, &term, 1));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "cat", macula_pipeline_denoise(pipeline, &inputs, &prediction));
  inputs.embedding = embedding; /* now it is known where "cat" stands */
  prediction.data = third;
  OK(macula_pipeline_denoise(pipeline, &inputs, &prediction));
  CHECK(memcmp(second, third, count * sizeof *first) != 0 && memcmp(first, third, count * sizeof *first) != 0);
  term.tokens = &token;
  term.token_count = 1;
  inputs.embedding = NULL;
  OK(macula_compose(pipeline, &term, 1));
  OK(macula_pipeline_denoise(pipeline, &inputs, &prediction));
  OK(macula_composition_clear(pipeline));
  OK(macula_pipeline_denoise(pipeline, &inputs, &prediction));
  CHECK(memcmp(first, third, count * sizeof *first) == 0);

  sample.byte_len -= 4;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "byte_len", macula_pipeline_denoise(pipeline, &inputs, &prediction));
  sample.byte_len += 4;
  sample.rank = 9;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "rank", macula_pipeline_denoise(pipeline, &inputs, &prediction));
  sample.rank = 4;
  sample.dtype = 77;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "dtype", macula_pipeline_denoise(pipeline, &inputs, &prediction));
  sample.dtype = MACULA_DTYPE_F32;
  sample.device = 1;
  EXPECT(MACULA_STATUS_UNSUPPORTED, "device", macula_pipeline_denoise(pipeline, &inputs, &prediction));
  sample.device = MACULA_DEVICE_CPU;
  prediction.shape[0] = 2;
  prediction.byte_len *= 2;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "must be", macula_pipeline_denoise(pipeline, &inputs, &prediction));
  prediction = sample;
  numbers[5] = NAN;
  EXPECT(MACULA_STATUS_NOT_FINITE, "500", macula_pipeline_denoise(pipeline, &inputs, &prediction));
  numbers[5] = 0.0f;
  OK(macula_pipeline_denoise(pipeline, &inputs, &prediction)); /* in place */
  {
    macula_images *images = NULL;
    macula_tensor noise = sample;
    numbers[0] = NAN;
    options.noise = &noise;
    EXPECT(MACULA_STATUS_NOT_FINITE, "step", macula_pipeline_draw(pipeline, &options, &images));
    options.noise = NULL;
  }
  free(numbers);
  OK(macula_embedding_free(embedding));
  OK(macula_concept_free(subject));
}

static void wrong_draws(void) {
  macula_images *images = NULL;
  macula_draw_options good = options;
  options.steps = 0;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "", macula_pipeline_draw(pipeline, &options, &images));
  options = good;
  options.guidance = -1;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "guidance", macula_pipeline_draw(pipeline, &options, &images));
  options = good;
  options.batch = 0;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "256", macula_pipeline_draw(pipeline, &options, &images));
  options = good;
  options.width = 7;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "width", macula_pipeline_draw(pipeline, &options, &images));
  options = good;
  options.start_step = 1;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "start_step", macula_pipeline_draw(pipeline, &options, &images));
  options = good;
  options.sampler = 99;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "sampler", macula_pipeline_draw(pipeline, &options, &images));
  options = good;
  options.prompt = "\xc3\x28";
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "not UTF-8", macula_pipeline_draw(pipeline, &options, &images));
  options = good;
  CHECK(!images);
}

static void from_a_picture(const char *folder) {
  macula_images *images = NULL;
  macula_image image;
  char path[4096];
  uint64_t plain = draw_hash();
  OK(macula_pipeline_draw(pipeline, &options, &images));
  OK(macula_images_get(images, 0, &image));
  options.start_image = &image;
  options.start_step = 1;
  CHECK(draw_hash() != plain);
  options.start_image = NULL;
  options.start_step = 0;
  snprintf(path, sizeof path, "%s/picture.png", folder);
  OK(macula_images_write_png(images, 0, path));
  OK(macula_image_write_png(&image, path));
  snprintf(path, sizeof path, "%s/nowhere/picture.png", folder);
  EXPECT(MACULA_STATUS_NOT_FOUND, "nowhere", macula_image_write_png(&image, path));
  image.width = 0;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "image", macula_image_write_png(&image, path));
  OK(macula_images_free(images));
}

static int messages;

static void hear(void *userdata, macula_log_level level, const char *target, const char *message) {
  CHECK(userdata == &messages && level >= MACULA_LOG_ERROR && level <= MACULA_LOG_DEBUG && *target && *message);
  __atomic_fetch_add(&messages, 1, __ATOMIC_SEQ_CST);
}

/* A model may be found wrong when it is opened or when it runs. */
static macula_status open_and_draw(const char *model) {
  macula_pipeline *opened = NULL;
  macula_images *images = NULL;
  macula_status status = macula_pipeline_open(runtime, model, NULL, &opened);
  if (!status) {
    status = macula_pipeline_draw(opened, &options, &images);
    OK(macula_pipeline_free(opened)); /* leaves the last error */
  }
  CHECK(!images);
  return status;
}

static void opening(const char *model, const char *broken) {
  macula_runtime_options logged = MACULA_RUNTIME_OPTIONS_INIT;
  macula_pipeline_options how = MACULA_PIPELINE_OPTIONS_INIT;
  macula_session_options session = MACULA_SESSION_OPTIONS_INIT;
  macula_runtime_info about = MACULA_RUNTIME_INFO_INIT;
  macula_pipeline_info info = MACULA_PIPELINE_INFO_INIT;
  macula_memory_info memory = MACULA_MEMORY_INFO_INIT;
  macula_layer_info layer = MACULA_LAYER_INFO_INIT;
  macula_pipeline *other = NULL;
  macula_runtime *second = NULL;
  OK(macula_runtime_get_info(runtime, &about));
  CHECK(about.version && about.library && about.provider_count > 0 && about.providers[0][0]);
  EXPECT(MACULA_STATUS_NOT_FOUND, "/nowhere", macula_pipeline_open(runtime, "/nowhere", NULL, &other));
  EXPECT(MACULA_STATUS_RUNTIME_FAILED, "ONNX Runtime", open_and_draw(broken));
  how.self_attention = 2;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "self_attention is 2", macula_pipeline_open(runtime, model, &how, &other));
  how.self_attention = 0;
  how.session = &session;
  session.provider = 42;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "provider is 42", macula_pipeline_open(runtime, model, &how, &other));
  session.provider = MACULA_PROVIDER_CUDA;
  EXPECT(MACULA_STATUS_PROVIDER_UNAVAILABLE, "CUDA", macula_pipeline_open(runtime, model, &how, &other));
  logged.log = hear;
  logged.log_userdata = &messages;
  OK(macula_runtime_create(&logged, &second));
  session.allow_fallback = 1;
  OK(macula_pipeline_open(second, model, &how, &other));
  CHECK(messages > 0); /* falling back is told */
  OK(macula_pipeline_get_info(other, &info));
  CHECK(!strcmp(info.provider, "CPUExecutionProvider") && info.fallback_reason && *info.fallback_reason);
  OK(macula_runtime_free(second));
  messages = 0;
  OK(macula_pipeline_free(other));
  OK(macula_pipeline_get_info(pipeline, &info));
  CHECK(strlen(info.fingerprint) == 64 && !info.fallback_reason && info.width > 0 && info.latent_factor == 1);
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "projection is",
         macula_pipeline_get_projection(pipeline, info.projection_count, &layer));
  OK(macula_pipeline_get_memory(pipeline, &memory));
  CHECK(memory.weights > 0 && memory.composition > 0 && memory.process > 0 && memory.process_peak >= memory.process);
  CHECK(messages == 0); /* no callback after the handle was freed */
}

int main(int argc, char **argv) {
  CHECK(argc == 4);
  OK(macula_runtime_create(NULL, &runtime));
  OK(macula_pipeline_open(runtime, argv[1], NULL, &pipeline));
  options.prompt = PROMPT;
  options.steps = 3;
  options.guidance = 2.0;
  options.seed = 7;
  compositions();
  progress();
  single_steps();
  wrong_draws();
  from_a_picture(argv[2]);
  opening(argv[1], argv[3]);
  OK(macula_pipeline_free(pipeline));
  OK(macula_runtime_free(runtime));
  return 0;
}
