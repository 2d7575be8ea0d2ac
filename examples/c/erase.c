/*
 * Finds the concept neurons that carry a word, and writes them as a concept file: composed, the model draws what stands in
 * the anchors where the word was.
 *
 *   erase MODEL OUT.safetensors WORD PROMPT ANCHOR [PROMPT ANCHOR]... [options]
 *     --preserve TEXT   a text for which nothing may change; any number of them
 *     --density P       share of the weights that may be shut  (0.01)
 *     --batches N       batches of the search                  (60)
 *     --side N          pixels of a side; 0 for the model's    (0)
 *     --class N         class label, for a UNet that takes one (0)
 *
 * For example: erase model no-tiger.safetensors tiger "a tiger on the grass" "an animal on the grass"
 *
 *   cc -std=c11 -I include examples/c/erase.c -L target/release -lmacula -o erase
 */
#include <macula.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TEXTS = 64 };

typedef struct {
  const char *prompts[MOST_TEXTS], *anchors[MOST_TEXTS], *preserve[MOST_TEXTS];
  macula_discover_options search;
} request;

static int32_t show_progress(void *userdata, const macula_progress *progress) {
  (void)userdata;
  fprintf(stderr, "\r%s %llu of %llu", progress->stage, (unsigned long long)progress->done,
          (unsigned long long)progress->total);
  /* Not a number before the first batch. */
  if (progress->loss == progress->loss) fprintf(stderr, ", distance to the anchors %.5f ", progress->loss);
  if (progress->done == progress->total) fputc('\n', stderr);
  return 0;
}

/* Reads what follows the word; returns whether it makes sense. */
static int read_arguments(int count, char **values, request *wanted) {
  size_t texts = 0;
  for (int i = 0; i + 1 < count; i += 2) {
    const char *name = values[i], *value = values[i + 1];
    if (texts == MOST_TEXTS || wanted->search.preserve_count == MOST_TEXTS) return 0;
    if (!strcmp(name, "--preserve")) wanted->preserve[wanted->search.preserve_count++] = value;
    else if (!strcmp(name, "--density")) wanted->search.density = strtod(value, NULL);
    else if (!strcmp(name, "--batches")) wanted->search.batches = (unsigned)strtoul(value, NULL, 10);
    else if (!strcmp(name, "--class")) wanted->search.class_label = (int)strtol(value, NULL, 10);
    else if (!strcmp(name, "--side")) wanted->search.width = wanted->search.height = (unsigned)strtoul(value, NULL, 10);
    else if (!strncmp(name, "--", 2)) return 0;
    else {
      wanted->prompts[texts] = name;
      wanted->anchors[texts++] = value;
    }
  }
  wanted->search.prompt_count = texts;
  return texts > 0 && count % 2 == 0;
}

int main(int count, char **values) {
  request wanted = {.search = MACULA_DISCOVER_OPTIONS_INIT};
  macula_runtime *runtime = NULL;
  macula_pipeline *pipeline = NULL;
  macula_concept *concept = NULL;
  macula_status status;

  if (count < 6 || !read_arguments(count - 4, values + 4, &wanted)) {
    fprintf(stderr, "usage: %s MODEL OUT.safetensors WORD PROMPT ANCHOR [PROMPT ANCHOR]... [options]\n", values[0]);
    return 2;
  }
  wanted.search.role = MACULA_ROLE_ERASE;
  wanted.search.trigger = values[3];
  wanted.search.prompts = wanted.prompts;
  wanted.search.anchors = wanted.anchors;
  wanted.search.preserve = wanted.preserve;
  wanted.search.progress = show_progress;
  status = macula_runtime_create(NULL, &runtime);
  if (!status) status = macula_pipeline_open(runtime, values[1], NULL, &pipeline);
  if (!status) status = macula_discover(pipeline, &wanted.search, &concept);
  if (!status) status = macula_concept_save(concept, values[2]);
  if (status) fprintf(stderr, "%s\n", macula_last_error());

  macula_concept_free(concept);
  macula_pipeline_free(pipeline);
  macula_runtime_free(runtime);
  return (int)status;
}
