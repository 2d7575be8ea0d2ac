/* Eight threads, a pipeline each, draw what one thread draws; eight threads on one pipeline get a picture or BUSY.
   Argument: a model folder. */
#include "world.h"

#include <pthread.h>

enum { THREADS = 8, ROUNDS = 5 };

static macula_runtime *runtime;
static const char *model;
static macula_pipeline *shared;
static macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
static uint8_t *expected;
static size_t size;

static void check_picture(macula_images *images) {
  macula_image image;
  OK(macula_images_get(images, 0, &image));
  CHECK(memcmp(expected, image.rgb, size) == 0);
  OK(macula_images_free(images));
}

static void *draw_alone(void *unused) {
  macula_pipeline *own = NULL;
  (void)unused;
  OK(macula_pipeline_open(runtime, model, NULL, &own));
  for (int round = 0; round < ROUNDS; round++) {
    macula_images *images = NULL;
    OK(macula_pipeline_draw(own, &options, &images));
    check_picture(images);
  }
  OK(macula_pipeline_free(own));
  return NULL;
}

static void *draw_together(void *drawn) {
  for (int round = 0; round < ROUNDS * 4; round++) {
    macula_images *images = NULL;
    macula_pipeline_info info = MACULA_PIPELINE_INFO_INIT;
    macula_status status = macula_pipeline_draw(shared, &options, &images);
    CHECK(status == MACULA_STATUS_OK || status == MACULA_STATUS_BUSY);
    if (!status) {
      check_picture(images);
      ++*(int *)drawn;
    }
    OK(macula_pipeline_get_info(shared, &info)); /* never waits */
  }
  return NULL;
}

static void together(void *(*body)(void *), int *counts) {
  pthread_t threads[THREADS];
  for (int at = 0; at < THREADS; at++) {
    CHECK(pthread_create(&threads[at], NULL, body, counts ? &counts[at] : NULL) == 0);
  }
  for (int at = 0; at < THREADS; at++) {
    CHECK(pthread_join(threads[at], NULL) == 0);
  }
}

int main(int argc, char **argv) {
  macula_images *images = NULL;
  macula_image image;
  int counts[THREADS] = {0}, all = 0;
  CHECK(argc == 2);
  model = argv[1];
  OK(macula_runtime_create(NULL, &runtime));
  OK(macula_pipeline_open(runtime, model, NULL, &shared));
  options.prompt = PROMPT;
  options.steps = 2;
  options.guidance = 2.0;
  OK(macula_pipeline_draw(shared, &options, &images));
  OK(macula_images_get(images, 0, &image));
  size = (size_t)image.width * image.height * 3;
  expected = malloc(size);
  CHECK(expected);
  memcpy(expected, image.rgb, size);
  OK(macula_images_free(images));
  together(draw_alone, NULL);
  together(draw_together, counts);
  for (int at = 0; at < THREADS; at++) {
    all += counts[at];
  }
  CHECK(all > 0);
  free(expected);
  OK(macula_pipeline_free(shared));
  OK(macula_runtime_free(runtime));
  return 0;
}
