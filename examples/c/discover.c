/*
 * Finds the concept neurons of a subject from a folder of pictures, and writes them as a concept file.
 *
 *   discover MODEL PICTURES TRIGGER NOUN OUT.safetensors [options]
 *     --density P     share of the weights that may be shut; 0 for the one of the lowest held-out loss  (0.01)
 *     --batches N     batches of the search                  (60)
 *     --batch N       noisy pictures in a batch              (8)
 *     --embed N       steps in which the embedding of TRIGGER is learnt before the search; about 100 do (0)
 *     --tune N        steps of tuning: the found weights get values instead of being shut; 200 draw the subject much
 *                     more like itself                       (0)
 *     --values NAME   how values are kept: binary, quaternary, float16 or float32 (float16)
 *     --side N        pixels of a side; 0 for the model's    (0)
 *     --class N       class label, for a UNet that takes one (0)
 *     --scope NAME    global or local                        (local)
 *     --seed N                                               (0)
 *
 * PICTURES holds PNG, JPEG or WebP files of one subject. Beside each picture there may be a file of the same name that
 * ends in .txt: one line that says what the picture shows, with the trigger, e.g. "a TRIGGER NOUN on a blue background".
 * What a caption says need not be learnt as part of the subject. TRIGGER is a word of the model's tokenizer that stands for nothing
 * yet, NOUN what the subject is: afterwards "a TRIGGER NOUN" draws it when the concept is composed. Ctrl-C ends the
 * search and leaves no file.
 *
 *   cc -std=c11 -I include examples/c/discover.c -L target/release -lmacula -o discover
 */
#define _POSIX_C_SOURCE 200809L

#include "pictures.h"

#include <macula.h>

#include <signal.h>
#include <time.h>

static volatile sig_atomic_t interrupted;

static void interrupt(int signal_number) {
  (void)signal_number;
  interrupted = 1;
}

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* When the present stage began, for the time that is left. */
typedef struct {
  char stage[32];
  double began;
} clock_of_stage;

static int32_t show_progress(void *userdata, const macula_progress *progress) {
  clock_of_stage *stage = userdata;
  if (strcmp(stage->stage, progress->stage)) {
    if (*stage->stage) fputc('\n', stderr);
    snprintf(stage->stage, sizeof stage->stage, "%s", progress->stage);
    stage->began = seconds();
  }
  fprintf(stderr, "\r%s %llu of %llu", progress->stage, (unsigned long long)progress->done,
          (unsigned long long)progress->total);
  if (progress->loss == progress->loss) fprintf(stderr, ", loss %.4f", progress->loss);
  if (progress->done) {
    double each = (seconds() - stage->began) / (double)progress->done;
    fprintf(stderr, ", %.0f s left ", each * (double)(progress->total - progress->done));
  }
  return interrupted;
}

/* How many of each projection's weights were found. */
static void print_layers(const macula_concept *concept, size_t count) {
  macula_layer_info layer = MACULA_LAYER_INFO_INIT;
  for (size_t i = 0; i < count && !macula_concept_get_layer(concept, i, &layer); ++i) {
    double weights = (double)layer.out_features * (double)layer.in_features;
    printf("  %6.3f %%  %s\n", 100.0 * (double)layer.neurons / weights, layer.path);
  }
}

typedef struct {
  const char *model, *pictures, *trigger, *noun, *out;
  macula_discover_options search;
  unsigned side;
} request;

static int read_arguments(int count, char **values, request *wanted) {
  if (count < 6) return 0;
  wanted->model = values[1];
  wanted->pictures = values[2];
  wanted->trigger = values[3];
  wanted->noun = values[4];
  wanted->out = values[5];
  for (int i = 6; i + 1 < count; i += 2) {
    const char *name = values[i], *value = values[i + 1];
    if (!strcmp(name, "--density")) wanted->search.density = strtod(value, NULL);
    else if (!strcmp(name, "--batches")) wanted->search.batches = (unsigned)strtoul(value, NULL, 10);
    else if (!strcmp(name, "--batch")) wanted->search.batch = (unsigned)strtoul(value, NULL, 10);
    else if (!strcmp(name, "--embed")) wanted->search.embedding_steps = (unsigned)strtoul(value, NULL, 10);
    else if (!strcmp(name, "--tune")) wanted->search.tune_steps = (unsigned)strtoul(value, NULL, 10);
    else if (!strcmp(name, "--values") && read_values(value, &wanted->search.values)) continue;
    else if (!strcmp(name, "--side")) wanted->side = (unsigned)strtoul(value, NULL, 10);
    else if (!strcmp(name, "--class")) wanted->search.class_label = (int)strtol(value, NULL, 10);
    else if (!strcmp(name, "--seed")) wanted->search.seed = strtoull(value, NULL, 10);
    else if (!strcmp(name, "--scope") && !strcmp(value, "global")) wanted->search.scope = MACULA_SCOPE_GLOBAL;
    else if (!strcmp(name, "--scope") && !strcmp(value, "local")) wanted->search.scope = MACULA_SCOPE_LOCAL;
    else return 0;
  }
  return count % 2 == 0;
}

int main(int count, char **values) {
  request wanted = {.search = MACULA_DISCOVER_OPTIONS_INIT};
  macula_runtime *runtime = NULL;
  macula_pipeline *pipeline = NULL;
  macula_concept *concept = NULL;
  macula_pipeline_info info = MACULA_PIPELINE_INFO_INIT;
  macula_images *files[MOST_PICTURES] = {0};
  macula_image pictures[MOST_PICTURES];
  char *paths[MOST_PICTURES] = {0}, *captions[MOST_PICTURES] = {0};
  clock_of_stage stage = {0};
  macula_status status;
  int found, captioned = 0;

  if (!read_arguments(count, values, &wanted)) {
    fprintf(stderr, "usage: %s MODEL PICTURES TRIGGER NOUN OUT.safetensors [options]\n", values[0]);
    return 2;
  }
  if ((found = list_pictures(wanted.pictures, paths)) <= 0) {
    fprintf(stderr, "%s: %s\n", wanted.pictures, found ? "can't be read" : "holds no PNG, JPEG or WebP picture");
    return 2;
  }
  for (int i = 0; i < found; ++i) captioned += (captions[i] = read_caption(paths[i])) != NULL;
  if (captioned && captioned < found) {
    fprintf(stderr, "%s: %d of %d pictures have a caption beside them: all must, or none\n", wanted.pictures, captioned,
            found);
    return 2;
  }
  signal(SIGINT, interrupt);
  status = macula_runtime_create(NULL, &runtime);
  if (!status) status = macula_pipeline_open(runtime, wanted.model, NULL, &pipeline);
  if (!status) status = macula_pipeline_get_info(pipeline, &info);
  for (int i = 0; i < found && !status; ++i) {
    unsigned width = wanted.side ? wanted.side : (unsigned)info.width;
    unsigned height = wanted.side ? wanted.side : (unsigned)info.height;
    status = macula_images_read(paths[i], width, height, &files[i]);
    if (!status) status = macula_images_get(files[i], 0, &pictures[i]);
  }
  wanted.search.pictures = pictures;
  wanted.search.picture_count = (size_t)found;
  wanted.search.prompts = captioned ? (const char *const *)captions : NULL;
  wanted.search.prompt_count = (size_t)captioned;
  wanted.search.trigger = wanted.trigger;
  wanted.search.class_noun = wanted.noun;
  wanted.search.progress = show_progress;
  wanted.search.progress_userdata = &stage;
  if (!status) status = macula_discover(pipeline, &wanted.search, &concept);
  if (!status) status = macula_concept_save(concept, wanted.out);
  fputc('\n', stderr);
  if (status) {
    fprintf(stderr, "%s\n", macula_last_error());
  } else {
    macula_concept_info about = MACULA_CONCEPT_INFO_INIT;
    if (!macula_concept_get_info(concept, &about)) {
      printf("%s: %llu neurons from %d pictures\n", wanted.out, (unsigned long long)about.neurons, found);
      print_layers(concept, about.layer_count);
    }
  }

  macula_concept_free(concept);
  for (int i = 0; i < found; ++i) {
    macula_images_free(files[i]);
    free(paths[i]);
    free(captions[i]);
  }
  macula_pipeline_free(pipeline);
  macula_runtime_free(runtime);
  return (int)status;
}
