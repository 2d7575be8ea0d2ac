/* One live handle of every kind, and stand-ins for other arguments, for programs that call every export. */
#ifndef WORLD_H
#define WORLD_H

#include "check.h"

static macula_runtime *world_macula_runtime;
static macula_pipeline *world_macula_pipeline;
static macula_concept *world_macula_concept;
static macula_cancel_token *world_macula_cancel_token;
static macula_images *world_macula_images;
static macula_embedding *world_macula_embedding;
static macula_schedule *world_macula_schedule;
static macula_trajectory *world_macula_trajectory;
static char world_file[4096];
static char world_model[4096];

#define PROMPT "a photo of the red cat"

/* Memory for anything that is not a handle, a text or a struct with defaults: a page of zeros. */
static inline void *world_memory(void) {
  static uint64_t memory[8][512];
  static unsigned next;
  next = (next + 1) % 8;
  memset(memory[next], 0, sizeof memory[next]);
  return memory[next];
}

static inline const char *world_text(const char *parameter) {
  return !strcmp(parameter, "file")     ? world_file
         : !strcmp(parameter, "folder") ? world_model
         : !strcmp(parameter, "json")   ? "{\"turning_points\": [400]}"
         : !strcmp(parameter, "key")    ? "modelspec.title"
                                        : PROMPT;
}

#define PLAIN_FILL(type)                                                                                               \
  static inline type *world_fill_##type(type *filled) { return filled; }
PLAIN_FILL(macula_runtime_options)
PLAIN_FILL(macula_runtime_info)
PLAIN_FILL(macula_session_options)
PLAIN_FILL(macula_concept_info)
PLAIN_FILL(macula_layer_info)
PLAIN_FILL(macula_pipeline_options)
PLAIN_FILL(macula_pipeline_info)
PLAIN_FILL(macula_embedding_info)
PLAIN_FILL(macula_memory_info)
PLAIN_FILL(macula_discover_options)
PLAIN_FILL(macula_together_options)
PLAIN_FILL(macula_schedule_info)
PLAIN_FILL(macula_stage_info)
PLAIN_FILL(macula_component_info)
PLAIN_FILL(macula_choose_options)
PLAIN_FILL(macula_trajectory_options)
PLAIN_FILL(macula_trajectory_info)

static inline macula_concept_options *world_fill_macula_concept_options(macula_concept_options *filled) {
  filled->fingerprint = BASE_A;
  return filled;
}

static inline macula_draw_options *world_fill_macula_draw_options(macula_draw_options *filled) {
  filled->prompt = PROMPT;
  filled->steps = 2;
  filled->guidance = 1.0;
  return filled;
}

static inline macula_term *world_fill_macula_term(macula_term *filled) {
  filled->subject = world_macula_concept;
  return filled;
}

static inline macula_denoise_inputs *world_fill_macula_denoise_inputs(macula_denoise_inputs *filled) {
  static macula_tensor nothing;
  filled->sample = &nothing;
  return filled;
}

/* A concept of the pipeline's base with `count` neurons in its first projection. */
static inline macula_concept *concept_for(const macula_pipeline *pipeline, uint32_t count, macula_role role) {
  macula_pipeline_info info = MACULA_PIPELINE_INFO_INIT;
  macula_layer_info projection = MACULA_LAYER_INFO_INIT;
  macula_concept_options options = MACULA_CONCEPT_OPTIONS_INIT;
  macula_concept *made = NULL;
  macula_layer layer;
  uint32_t *indices = malloc(count * sizeof *indices);
  CHECK(indices);
  OK(macula_pipeline_get_info(pipeline, &info));
  CHECK(info.composes && info.projection_count > 0);
  OK(macula_pipeline_get_projection(pipeline, info.projection_count - 1, &projection));
  for (uint32_t at = 0; at < count; at++) {
    indices[at] = at;
  }
  layer.path = projection.path;
  layer.out_features = projection.out_features;
  layer.in_features = projection.in_features;
  layer.indices = indices;
  layer.count = count;
  layer.values = NULL;
  options.fingerprint = info.fingerprint;
  options.title = "a test";
  options.trigger = "cat";
  options.role = role;
  OK(macula_concept_create(&layer, 1, &options, &made));
  free(indices);
  return made;
}

static inline void world_create(const char *model, const char *folder) {
  macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
  snprintf(world_file, sizeof world_file, "%s/world.safetensors", folder);
  snprintf(world_model, sizeof world_model, "%s", model);
  OK(macula_runtime_create(NULL, &world_macula_runtime));
  OK(macula_pipeline_open(world_macula_runtime, model, NULL, &world_macula_pipeline));
  OK(macula_cancel_token_create(&world_macula_cancel_token));
  world_macula_concept = concept_for(world_macula_pipeline, 8, MACULA_ROLE_IMPLANT);
  OK(macula_concept_save(world_macula_concept, world_file));
  OK(macula_pipeline_encode_prompt(world_macula_pipeline, PROMPT, NULL, &world_macula_embedding));
  OK(macula_schedule_from_json(world_text("json"), &world_macula_schedule));
  OK(macula_schedule_begin(world_macula_schedule, NULL, &world_macula_trajectory));
  OK(macula_pipeline_draw(world_macula_pipeline, world_fill_macula_draw_options(&options), &world_macula_images));
}

static inline void world_free(void) {
  OK(macula_images_free(world_macula_images));
  OK(macula_trajectory_free(world_macula_trajectory));
  OK(macula_schedule_free(world_macula_schedule));
  OK(macula_embedding_free(world_macula_embedding));
  OK(macula_concept_free(world_macula_concept));
  OK(macula_cancel_token_free(world_macula_cancel_token));
  OK(macula_pipeline_free(world_macula_pipeline));
  OK(macula_runtime_free(world_macula_runtime));
}

#endif
