/*
 * Tunes concepts together, so that their subjects can share a picture, and writes each as a file of the same name.
 *
 *   together MODEL OUT CONCEPT PICTURES CONCEPT PICTURES [CONCEPT PICTURES]... [options]
 *     --steps N       steps of tuning; some 75 to 125 for each concept (300)
 *     --scenes N      scenes that are made of the pictures   (128)
 *     --values NAME   how values are kept: binary, quaternary, float16 or float32 (float16)
 *     --side N        pixels of a side; 0 for the model's    (0)
 *     --class N       class label, for a UNet that takes one (0)
 *     --seed N                                               (0)
 *
 * OUT is a folder. Each CONCEPT is a file that discover.c wrote, with a trigger of its own, and PICTURES the folder that it
 * was found in: subjects on a plain ground are cut out and put side by side, under their captions. Ctrl-C leaves no file.
 *
 *   cc -std=c11 -I include examples/c/together.c -L target/release -lmacula -o together
 */
#define _POSIX_C_SOURCE 200809L

#include "pictures.h"

#include <macula.h>

#include <signal.h>

enum { MOST_CONCEPTS = 32 };

static volatile sig_atomic_t interrupted;

static void interrupt(int signal_number) {
  (void)signal_number;
  interrupted = 1;
}

static int32_t show_progress(void *userdata, const macula_progress *progress) {
  (void)userdata;
  fprintf(stderr, "\r%s %llu of %llu", progress->stage, (unsigned long long)progress->done,
          (unsigned long long)progress->total);
  /* Not a number before the first step. */
  if (progress->loss == progress->loss) fprintf(stderr, ", loss %.4f ", progress->loss);
  if (progress->done == progress->total) fputc('\n', stderr);
  return interrupted;
}

/* One concept with its pictures. */
typedef struct {
  const char *file, *folder;
  macula_concept *found, *tuned;
  macula_images *files[MOST_PICTURES];
  macula_image pictures[MOST_PICTURES];
  char *paths[MOST_PICTURES], *captions[MOST_PICTURES];
  int count, captioned;
} subject;

typedef struct {
  const char *model, *out;
  subject subjects[MOST_CONCEPTS];
  size_t count;
  unsigned side;
  macula_together_options options;
} request;

static int read_arguments(int count, char **values, request *wanted) {
  if (count < 7 || count % 2 == 0) return 0;
  wanted->model = values[1];
  wanted->out = values[2];
  for (int i = 3; i + 1 < count; i += 2) {
    const char *name = values[i], *value = values[i + 1];
    if (!strcmp(name, "--steps")) wanted->options.steps = (unsigned)strtoul(value, NULL, 10);
    else if (!strcmp(name, "--scenes")) wanted->options.scenes = (unsigned)strtoul(value, NULL, 10);
    else if (!strcmp(name, "--values") && read_values(value, &wanted->options.values)) continue;
    else if (!strcmp(name, "--side")) wanted->side = (unsigned)strtoul(value, NULL, 10);
    else if (!strcmp(name, "--class")) wanted->options.class_label = (int)strtol(value, NULL, 10);
    else if (!strcmp(name, "--seed")) wanted->options.seed = strtoull(value, NULL, 10);
    else if (!strncmp(name, "--", 2) || wanted->count == MOST_CONCEPTS) return 0;
    else {
      wanted->subjects[wanted->count].file = name;
      wanted->subjects[wanted->count++].folder = value;
    }
  }
  return wanted->count > 1;
}

/* Reads a concept and its pictures; returns whether the folder makes sense, and a status for the rest. */
static int read_subject(subject *one, unsigned width, unsigned height, macula_status *status) {
  one->count = list_pictures(one->folder, one->paths);
  if (one->count <= 0) {
    fprintf(stderr, "%s: %s\n", one->folder, one->count ? "can't be read" : "holds no PNG, JPEG or WebP picture");
    return 0;
  }
  for (int i = 0; i < one->count; ++i) one->captioned += (one->captions[i] = read_caption(one->paths[i])) != NULL;
  if (one->captioned && one->captioned < one->count) {
    fprintf(stderr, "%s: %d of %d pictures have a caption beside them: all must, or none\n", one->folder,
            one->captioned, one->count);
    return 0;
  }
  *status = macula_concept_load(one->file, &one->found);
  for (int i = 0; i < one->count && !*status; ++i) {
    *status = macula_images_read(one->paths[i], width, height, &one->files[i]);
    if (!*status) *status = macula_images_get(one->files[i], 0, &one->pictures[i]);
  }
  return 1;
}

/* Writes a tuned concept into the folder, under the name of the file that it came from. */
static macula_status save(const subject *one, const char *folder) {
  const char *slash = strrchr(one->file, '/'), *name = slash ? slash + 1 : one->file;
  size_t size = strlen(folder) + strlen(name) + 2;
  char *path = malloc(size);
  macula_status status = MACULA_STATUS_OUT_OF_MEMORY;
  if (path) {
    snprintf(path, size, "%s/%s", folder, name);
    status = macula_concept_save(one->tuned, path);
    if (!status) printf("%s\n", path);
  }
  free(path);
  return status;
}

int main(int count, char **values) {
  static request wanted;
  static macula_companion companions[MOST_CONCEPTS];
  const macula_together_options defaults = MACULA_TOGETHER_OPTIONS_INIT;
  macula_concept *tuned[MOST_CONCEPTS] = {0};
  macula_runtime *runtime = NULL;
  macula_pipeline *pipeline = NULL;
  macula_pipeline_info info = MACULA_PIPELINE_INFO_INIT;
  macula_status status;
  int read = 1;

  wanted.options = defaults;
  if (!read_arguments(count, values, &wanted)) {
    fprintf(stderr, "usage: %s MODEL OUT CONCEPT PICTURES CONCEPT PICTURES... [options]\n", values[0]);
    return 2;
  }
  signal(SIGINT, interrupt);
  status = macula_runtime_create(NULL, &runtime);
  if (!status) status = macula_pipeline_open(runtime, wanted.model, NULL, &pipeline);
  if (!status) status = macula_pipeline_get_info(pipeline, &info);
  for (size_t i = 0; i < wanted.count && read && !status; ++i) {
    subject *one = &wanted.subjects[i];
    unsigned width = wanted.side ? wanted.side : (unsigned)info.width;
    unsigned height = wanted.side ? wanted.side : (unsigned)info.height;
    read = read_subject(one, width, height, &status);
    companions[i].subject = one->found;
    companions[i].pictures = one->pictures;
    companions[i].picture_count = (size_t)one->count;
    companions[i].prompts = one->captioned ? (const char *const *)one->captions : NULL;
  }
  wanted.options.companions = companions;
  wanted.options.companion_count = wanted.count;
  wanted.options.progress = show_progress;
  if (read && !status) status = macula_tune_together(pipeline, &wanted.options, tuned);
  for (size_t i = 0; i < wanted.count && read && !status; ++i) {
    wanted.subjects[i].tuned = tuned[i];
    status = save(&wanted.subjects[i], wanted.out);
  }
  if (status) fprintf(stderr, "\n%s\n", macula_last_error());

  for (size_t i = 0; i < wanted.count; ++i) {
    subject *one = &wanted.subjects[i];
    macula_concept_free(one->found);
    macula_concept_free(tuned[i]);
    for (int picture = 0; picture < one->count; ++picture) {
      macula_images_free(one->files[picture]);
      free(one->paths[picture]);
      free(one->captions[picture]);
    }
  }
  macula_pipeline_free(pipeline);
  macula_runtime_free(runtime);
  return read ? (int)status : 2;
}
