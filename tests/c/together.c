/* Tuning together from C: what it refuses, that it can be stopped, that what it makes are concepts with the weights of the
   given ones, and that the pipeline draws as before.
   Arguments: the shipped model's folder, the folder of its subjects, a folder to write in. */
#include "check.h"

enum { SUBJECTS = 2, PICTURES = 2 };

#define REFUSED(call, status, part)                                                                                    \
  do {                                                                                                                 \
    CHECK((call) == (status));                                                                                         \
    CHECK(strstr(macula_last_error(), (part)));                                                                        \
    CHECK(!tuned[0] && !tuned[1]);                                                                                     \
  } while (0)

static int stop_at = -1, steps;

static int32_t tell(void *userdata, const macula_progress *progress) {
  CHECK(userdata == &steps);
  if (strcmp(progress->stage, "tune")) return 0;
  CHECK(progress->total == 4);
  steps = (int)progress->done;
  return steps == stop_at;
}

static void draw(macula_pipeline *pipeline, macula_images **images) {
  macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
  options.prompt = "a <s1> animal and a <s2> apple on a blue background";
  options.steps = 2;
  options.width = options.height = 32;
  options.class_label = 4;
  OK(macula_pipeline_draw(pipeline, &options, images));
}

int main(int argc, char **argv) {
  static const char *const names[SUBJECTS] = {"octopus", "green-apple"}, *const triggers[SUBJECTS] = {"<s1>", "<s2>"},
                           *const nouns[SUBJECTS] = {"animal", "apple"};
  macula_runtime *runtime = NULL;
  macula_pipeline *pipeline = NULL;
  macula_images *files[SUBJECTS][PICTURES] = {{NULL}}, *before = NULL, *after = NULL;
  macula_image pictures[SUBJECTS][PICTURES];
  macula_concept *found[SUBJECTS] = {NULL}, *tuned[SUBJECTS] = {NULL};
  macula_companion companions[SUBJECTS] = {{NULL, NULL, 0, NULL}};
  macula_together_options options = MACULA_TOGETHER_OPTIONS_INIT;
  char path[4096];
  CHECK(argc == 4);
  OK(macula_runtime_create(NULL, &runtime));
  OK(macula_pipeline_open(runtime, argv[1], NULL, &pipeline));
  for (int at = 0; at < SUBJECTS; at++) {
    macula_discover_options search = MACULA_DISCOVER_OPTIONS_INIT;
    for (int picture = 0; picture < PICTURES; picture++) {
      snprintf(path, sizeof path, "%s/%s/%d.png", argv[2], names[at], picture + 1);
      OK(macula_images_read(path, 32, 32, &files[at][picture]));
      OK(macula_images_get(files[at][picture], 0, &pictures[at][picture]));
    }
    search.pictures = pictures[at];
    search.picture_count = PICTURES;
    search.trigger = triggers[at];
    search.class_noun = nouns[at];
    search.class_label = 4;
    search.batches = search.batch = 2;
    search.embedding_steps = at == 0;
    search.method = MACULA_METHOD_SALIENCY;
    OK(macula_discover(pipeline, &search, &found[at]));
    companions[at].subject = found[at];
    companions[at].pictures = pictures[at];
    companions[at].picture_count = PICTURES;
  }
  {
    macula_term composed = MACULA_TERM_INIT;
    composed.subject = found[0];
    composed.strength = 0.5f;
    OK(macula_compose(pipeline, &composed, 1));
  }
  draw(pipeline, &before);

  options.class_label = 4;
  options.batch = 2;
  options.steps = 4;
  options.scenes = 6;
  REFUSED(macula_tune_together(pipeline, NULL, tuned), MACULA_STATUS_INVALID_ARGUMENT, "options is NULL");
  REFUSED(macula_tune_together(pipeline, &options, tuned), MACULA_STATUS_INVALID_ARGUMENT, "0 concepts");
  options.companion_count = SUBJECTS;
  REFUSED(macula_tune_together(pipeline, &options, tuned), MACULA_STATUS_INVALID_ARGUMENT, "options.companions is NULL");
  options.companions = companions;
  REFUSED(macula_tune_together(pipeline, &options, NULL), MACULA_STATUS_INVALID_ARGUMENT, "out_concepts");
  companions[1].subject = NULL;
  REFUSED(macula_tune_together(pipeline, &options, tuned), MACULA_STATUS_INVALID_ARGUMENT, "companions[1].subject");
  companions[1].subject = found[0];
  REFUSED(macula_tune_together(pipeline, &options, tuned), MACULA_STATUS_INVALID_ARGUMENT, "two concepts have the trigger");
  companions[1].subject = found[1];
  companions[1].picture_count = 0;
  REFUSED(macula_tune_together(pipeline, &options, tuned), MACULA_STATUS_INVALID_ARGUMENT, "companions[1].picture_count");
  companions[1].picture_count = PICTURES;
  options.values = MACULA_VALUES_NONE;
  REFUSED(macula_tune_together(pipeline, &options, tuned), MACULA_STATUS_INVALID_ARGUMENT, "options.values");
  options.values = MACULA_VALUES_QUATERNARY;
  options.scenes = 5000;
  REFUSED(macula_tune_together(pipeline, &options, tuned), MACULA_STATUS_INVALID_ARGUMENT, "5000 scenes");
  options.scenes = 6;
  options.rate = 0;
  REFUSED(macula_tune_together(pipeline, &options, tuned), MACULA_STATUS_INVALID_ARGUMENT, "rate 0");
  options.rate = 0.1;
  options.timestep_power = 0;
  REFUSED(macula_tune_together(pipeline, &options, tuned), MACULA_STATUS_INVALID_ARGUMENT, "power 0");
  options.timestep_power = 0.5;
  options.reserved = 1;
  REFUSED(macula_tune_together(pipeline, &options, tuned), MACULA_STATUS_INVALID_ARGUMENT, "options.reserved");
  options.reserved = 0;
  {
    const char *prompts[PICTURES] = {"a <s2> apple on a red background", "an apple"};
    companions[1].prompts = prompts;
    REFUSED(macula_tune_together(pipeline, &options, tuned), MACULA_STATUS_INVALID_ARGUMENT, "\"an apple\"");
    companions[1].prompts = NULL;
  }
  options.progress = tell;
  options.progress_userdata = &steps;
  stop_at = 2;
  snprintf(path, sizeof path, "%s/kept", argv[3]);
  options.checkpoint = path;
  CHECK(macula_tune_together(pipeline, &options, tuned) == MACULA_STATUS_CANCELLED && !tuned[0] && steps == 2);
  draw(pipeline, &after);
  CHECK(same(before, after));
  OK(macula_images_free(after));
  stop_at = -1;
  OK(macula_tune_together(pipeline, &options, tuned));
  CHECK(steps == 4);
  for (int at = 0; at < SUBJECTS; at++) {
    macula_concept_info given = MACULA_CONCEPT_INFO_INIT, made = MACULA_CONCEPT_INFO_INIT;
    macula_overlap shared;
    OK(macula_concept_get_info(found[at], &given));
    OK(macula_concept_get_info(tuned[at], &made));
    OK(macula_concept_overlap(found[at], tuned[at], &shared, NULL, 0));
    CHECK(made.neurons == given.neurons && shared.jaccard == 1.0);
    CHECK(given.values == MACULA_VALUES_NONE && made.values == MACULA_VALUES_QUATERNARY);
    CHECK(!strcmp(made.trigger, triggers[at]));
  }
  draw(pipeline, &after);
  CHECK(same(before, after));
  {
    macula_term terms[SUBJECTS] = {MACULA_TERM_INIT, MACULA_TERM_INIT};
    terms[0].subject = tuned[0];
    terms[1].subject = tuned[1];
    OK(macula_compose(pipeline, terms, SUBJECTS));
    OK(macula_images_free(after));
    draw(pipeline, &after);
    CHECK(!same(before, after));
  }
  for (int at = 0; at < SUBJECTS; at++) {
    for (int picture = 0; picture < PICTURES; picture++) OK(macula_images_free(files[at][picture]));
    OK(macula_concept_free(found[at]));
    OK(macula_concept_free(tuned[at]));
  }
  OK(macula_images_free(before));
  OK(macula_images_free(after));
  OK(macula_pipeline_free(pipeline));
  OK(macula_runtime_free(runtime));
  return 0;
}
