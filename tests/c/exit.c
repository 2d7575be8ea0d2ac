/* Ends the process in the middle of using the library, without giving anything back: it must exit with 0, at once.
   Arguments: where to end; a model folder. */
#include "world.h"

#include <pthread.h>
#include <unistd.h>

static const char *at;
static macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;

static int32_t leave(void *userdata, const macula_progress *progress) {
  (void)userdata;
  if (progress->done == 1 && !strcmp(at, "drawing")) {
    exit(0);
  }
  if (progress->done == 1 && !strcmp(at, "quick")) {
    _exit(0);
  }
  return 0;
}

static void *draw(void *pipeline) {
  for (;;) {
    macula_images *images = NULL;
    if (macula_pipeline_draw(pipeline, &options, &images)) {
      break; /* the process is ending */
    }
    macula_images_free(images);
  }
  return NULL;
}

int main(int argc, char **argv) {
  macula_runtime *runtime = NULL;
  macula_pipeline *pipeline = NULL;
  macula_images *images = NULL;
  pthread_t thread;
  CHECK(argc == 3);
  at = argv[1];
  if (!strcmp(at, "loaded")) {
    return macula_version_number() == 0;
  }
  OK(macula_runtime_create(NULL, &runtime));
  if (!strcmp(at, "runtime")) {
    return 0;
  }
  OK(macula_pipeline_open(runtime, argv[2], NULL, &pipeline));
  if (!strcmp(at, "pipeline")) {
    return 0;
  }
  options.prompt = PROMPT;
  options.steps = 3;
  options.guidance = 1.0;
  options.progress = leave;
  if (!strcmp(at, "thread")) { /* the process ends while another thread draws */
    CHECK(pthread_create(&thread, NULL, draw, pipeline) == 0);
    usleep(20000);
    return 0;
  }
  OK(macula_pipeline_draw(pipeline, &options, &images));
  CHECK(!strcmp(at, "drawn"));
  return 0;
}
