/* A search from C: what it refuses, that it can be stopped at any batch, that the same seed finds the same neurons, and
   that the pipeline draws as before.
   Arguments: the shipped model's folder, a folder of pictures of a subject, a folder to write in. */
#include "check.h"

#define REFUSED(call, status, part)                                                                                    \
  do {                                                                                                                 \
    CHECK((call) == (status));                                                                                         \
    CHECK(strstr(macula_last_error(), (part)));                                                                        \
  } while (0)

static int stop_at = -1, told, losses;

static int32_t tell(void *userdata, const macula_progress *progress) {
  (void)userdata;
  CHECK(progress->stage && progress->done <= progress->total);
  if (progress->loss == progress->loss) {
    const char *stage = progress->stage;
    CHECK(!strcmp(stage, "invert") || !strcmp(stage, "search") || !strcmp(stage, "tune"));
    CHECK(progress->done && progress->loss > 0);
    losses++;
  }
  return told++ == stop_at;
}

static void draw(macula_pipeline *pipeline, macula_images **images) {
  macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
  options.prompt = "a <s2> animal on a blue background";
  options.steps = 2;
  options.width = options.height = 32;
  options.class_label = 4;
  OK(macula_pipeline_draw(pipeline, &options, images));
}

int main(int argc, char **argv) {
  macula_runtime *runtime = NULL;
  macula_pipeline *pipeline = NULL;
  macula_images *files[2] = {NULL, NULL}, *before = NULL, *after = NULL, *none = NULL;
  macula_image pictures[2];
  macula_concept *found = NULL, *again = NULL;
  macula_concept_info info = MACULA_CONCEPT_INFO_INIT;
  macula_discover_options options = MACULA_DISCOVER_OPTIONS_INIT;
  macula_overlap shared;
  char path[4096];
  CHECK(argc == 4);

  for (int at = 0; at < 2; at++) {
    snprintf(path, sizeof path, "%s/%d.png", argv[2], at + 1);
    OK(macula_images_read(path, 32, 32, &files[at]));
    OK(macula_images_get(files[at], 0, &pictures[at]));
    CHECK(pictures[at].width == 32 && pictures[at].height == 32);
  }
  REFUSED(macula_images_read(path, 0, 32, &none), MACULA_STATUS_INVALID_ARGUMENT, "0 x 32");
  REFUSED(macula_images_read(argv[2], 32, 32, &none), MACULA_STATUS_IO, argv[2]);
  snprintf(path, sizeof path, "%s/missing.png", argv[2]);
  REFUSED(macula_images_read(path, 32, 32, &none), MACULA_STATUS_NOT_FOUND, "missing.png");
  snprintf(path, sizeof path, "%s/model_index.json", argv[1]);
  REFUSED(macula_images_read(path, 32, 32, &none), MACULA_STATUS_INVALID_FILE, "model_index.json");
  CHECK(!none);

  OK(macula_runtime_create(NULL, &runtime));
  OK(macula_pipeline_open(runtime, argv[1], NULL, &pipeline));
  draw(pipeline, &before);
  options.trigger = "<s2>";
  options.class_noun = "animal";
  options.class_label = 4;
  options.batches = 4;
  options.batch = 2;
  REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "picture_count");
  options.pictures = pictures;
  options.picture_count = 2;
  options.trigger = "unheard";
  REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "unheard");
  options.trigger = "<s2>";
  options.density = 1.5;
  REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "density");
  options.density = 0.01;
  options.batches = 0;
  REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "batches");
  options.batches = 4;
  REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "12 batches");
  options.method = MACULA_METHOD_SALIENCY;
  {
    const char *prompts[] = {"a <s2> animal on a red background", "an animal"};
    options.prompts = prompts;
    options.prompt_count = 1;
    REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "1 prompts for 2");
    options.prompt_count = 2;
    REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "an animal");
    options.prompts = NULL;
    options.prompt_count = 0;
  }
  {
    static float numbers[3 * 32 * 32];
    const macula_tensor latents = {numbers, sizeof numbers, {1, 3, 32, 32}, 4, MACULA_DTYPE_F32, MACULA_DEVICE_CPU, 0};
    const macula_tensor context = {numbers, sizeof numbers, {1, 3, 1024}, 3, MACULA_DTYPE_F32, MACULA_DEVICE_CPU, 0};
    options.latents = &latents;
    REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "options.context");
    options.context = &latents;
    REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "must have 3 dimensions");
    options.context = &context;
    REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "beside pictures");
    options.latents = options.context = NULL;
    options.class_latents = &latents;
    options.class_context = &context;
    REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "without options.latents");
    options.class_latents = options.class_context = NULL;
  }
  options.searched = 3;
  REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "options.searched is 3");
  options.searched = MACULA_SEARCHED_KEYS_AND_VALUES;
  options.attention = 3;
  REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "options.attention is 3");
  options.attention = MACULA_ATTENTION_BOTH;
  REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "the scope must be global");
  options.attention = MACULA_ATTENTION_CROSS;
  options.role = 2;
  options.pictures = NULL;
  options.picture_count = 0;
  REFUSED(macula_discover(pipeline, &options, &found), MACULA_STATUS_INVALID_ARGUMENT, "options.prompts");
  options.role = MACULA_ROLE_IMPLANT;
  options.pictures = pictures;
  options.picture_count = 2;
  options.progress = tell;
  for (stop_at = 0; stop_at < 6; stop_at += 2) {
    told = 0;
    CHECK(macula_discover(pipeline, &options, &found) == MACULA_STATUS_CANCELLED);
    CHECK(told == stop_at + 1 && !found);
  }
  draw(pipeline, &after);
  CHECK(same(before, after));

  stop_at = -1;
  losses = 0;
  OK(macula_discover(pipeline, &options, &found));
  CHECK(losses == 4);
  snprintf(path, sizeof path, "%s/kept", argv[3]);
  options.checkpoint = path;
  OK(macula_discover(pipeline, &options, &again));
  options.checkpoint = NULL;
  OK(macula_concept_get_info(found, &info));
  CHECK(info.neurons > 0 && info.density <= 0.01 && info.role == MACULA_ROLE_IMPLANT);
  CHECK(!strcmp(info.trigger, "<s2>") && !strcmp(info.class_noun, "animal"));
  OK(macula_concept_overlap(found, again, &shared, NULL, 0));
  CHECK(shared.jaccard == 1.0);
  snprintf(path, sizeof path, "%s/found.safetensors", argv[3]);
  OK(macula_concept_save(found, path));

  {
    const char *tigers[] = {"a tiger on a blue background"}, *animals[] = {"an animal on a blue background"};
    macula_discover_options erase = MACULA_DISCOVER_OPTIONS_INIT;
    macula_concept *erased = NULL;
    erase.role = MACULA_ROLE_ERASE;
    erase.trigger = "tiger";
    erase.method = MACULA_METHOD_SALIENCY;
    erase.width = erase.height = 32;
    erase.class_label = 4;
    erase.batches = erase.batch = erase.drawn_pictures = 2;
    erase.prompts = tigers;
    erase.prompt_count = 1;
    REFUSED(macula_discover(pipeline, &erase, &erased), MACULA_STATUS_INVALID_ARGUMENT, "options.anchors");
    erase.anchors = animals;
    erase.pictures = pictures;
    REFUSED(macula_discover(pipeline, &erase, &erased), MACULA_STATUS_INVALID_ARGUMENT, "options.pictures");
    erase.pictures = NULL;
    OK(macula_discover(pipeline, &erase, &erased));
    OK(macula_concept_get_info(erased, &info));
    CHECK(info.neurons > 0 && info.role == MACULA_ROLE_ERASE && !strcmp(info.trigger, "tiger"));
    OK(macula_concept_free(erased));
  }
  {
    macula_term term = MACULA_TERM_INIT;
    macula_images *composed = NULL;
    term.subject = found;
    OK(macula_compose(pipeline, &term, 1));
    draw(pipeline, &composed);
    CHECK(!same(before, composed));
    OK(macula_images_free(composed));
    OK(macula_composition_clear(pipeline));
  }
  OK(macula_images_free(after));
  draw(pipeline, &after);
  CHECK(same(before, after));

  OK(macula_images_free(before));
  OK(macula_images_free(after));
  OK(macula_concept_free(again));
  again = NULL;
  {
    macula_image small = pictures[1];
    small.height = 16;
    options.scope = MACULA_SCOPE_GLOBAL;
    options.drawn_pictures = 0;
    options.class_picture_count = 1;
    REFUSED(macula_discover(pipeline, &options, &again), MACULA_STATUS_INVALID_ARGUMENT, "options.class_pictures");
    options.class_pictures = &small;
    REFUSED(macula_discover(pipeline, &options, &again), MACULA_STATUS_INVALID_ARGUMENT, "32 x 16");
    options.class_pictures = &pictures[1];
    OK(macula_discover(pipeline, &options, &again));
    OK(macula_concept_overlap(found, again, &shared, NULL, 0));
    CHECK(shared.jaccard > 0 && shared.jaccard < 1);
    OK(macula_concept_free(again));
    again = NULL;
    options.class_pictures = NULL;
    options.class_picture_count = 0;
    options.scope = MACULA_SCOPE_DEFAULT;
  }
  options.tune_steps = 3;
  options.values = MACULA_VALUES_NONE;
  REFUSED(macula_discover(pipeline, &options, &again), MACULA_STATUS_INVALID_ARGUMENT, "options.values");
  options.values = MACULA_VALUES_QUATERNARY;
  options.tune_rate = 0;
  REFUSED(macula_discover(pipeline, &options, &again), MACULA_STATUS_INVALID_ARGUMENT, "rate 0");
  options.tune_rate = 0.1;
  losses = 0;
  OK(macula_discover(pipeline, &options, &again));
  CHECK(losses == 4 + 3);
  OK(macula_concept_overlap(found, again, &shared, NULL, 0));
  OK(macula_concept_get_info(again, &info));
  CHECK(shared.jaccard == 1.0 && info.values == MACULA_VALUES_QUATERNARY);
  CHECK(info.token_row_count == 0);
  OK(macula_concept_free(again));
  again = NULL;
  {
    /* The trigger's embedding is learnt, comes with the concept and goes with it. */
    macula_term terms[2] = {MACULA_TERM_INIT, MACULA_TERM_INIT};
    macula_embedding_info encoded = MACULA_EMBEDDING_INFO_INIT;
    macula_embedding *base = NULL, *with_row = NULL, *cleared = NULL;
    macula_concept *joined = NULL;
    macula_tensor row, first;
    options.tune_steps = 0;
    options.embedding_steps = 2;
    options.embedding_rate = 0;
    REFUSED(macula_discover(pipeline, &options, &again), MACULA_STATUS_INVALID_ARGUMENT, "rate 0");
    options.embedding_rate = 0.1;
    losses = 0;
    OK(macula_discover(pipeline, &options, &again));
    CHECK(losses == 2 + 4);
    OK(macula_concept_get_info(again, &info));
    CHECK(info.token_row_count == 1);
    OK(macula_concept_get_token_row(again, 0, &row));
    CHECK(row.rank == 1 && row.dtype == MACULA_DTYPE_F32 && row.byte_len == 4 * (uint64_t)row.shape[0]);
    REFUSED(macula_concept_get_token_row(again, 1, &row), MACULA_STATUS_INVALID_ARGUMENT, "1 learnt rows");
    REFUSED(macula_concept_union(found, again, &joined), MACULA_STATUS_INVALID_ARGUMENT, "a learnt embedding");
    OK(macula_pipeline_encode_prompt(pipeline, "a <s2> animal", NULL, &base));
    terms[0].subject = terms[1].subject = again;
    REFUSED(macula_compose(pipeline, terms, 2), MACULA_STATUS_INVALID_ARGUMENT, "one token, \"<s2>\"");
    OK(macula_compose(pipeline, terms, 1));
    OK(macula_pipeline_encode_prompt(pipeline, "a <s2> animal", NULL, &with_row));
    OK(macula_composition_clear(pipeline));
    OK(macula_pipeline_encode_prompt(pipeline, "a <s2> animal", NULL, &cleared));
    OK(macula_embedding_get_info(base, &encoded));
    first = encoded.context;
    OK(macula_embedding_get_info(with_row, &encoded));
    CHECK(memcmp(first.data, encoded.context.data, first.byte_len) != 0);
    OK(macula_embedding_get_info(cleared, &encoded));
    CHECK(memcmp(first.data, encoded.context.data, first.byte_len) == 0);
    OK(macula_embedding_free(base));
    OK(macula_embedding_free(with_row));
    OK(macula_embedding_free(cleared));
  }
  OK(macula_concept_free(found));
  OK(macula_concept_free(again));
  OK(macula_images_free(files[0]));
  OK(macula_images_free(files[1]));
  OK(macula_pipeline_free(pipeline));
  OK(macula_runtime_free(runtime));
  return 0;
}
