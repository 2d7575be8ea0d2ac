/* Cancels draws at 200 moments spread over a draw's length, from another thread, and draws again after each: the next
   picture must be the same, bit for bit. Then the same from the progress callback.
   Argument: a model folder. */
#include "world.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

typedef struct {
  macula_cancel_token *token;
  useconds_t wait;
} later;

static void *cancel_later(void *given) {
  const later *when = given;
  usleep(when->wait);
  OK(macula_cancel_token_cancel(when->token));
  return NULL;
}

typedef struct {
  uint64_t stop_at, seen;
} stop;

static int32_t stop_at(void *userdata, const macula_progress *progress) {
  stop *when = userdata;
  when->seen = progress->done;
  return progress->done >= when->stop_at;
}

static long threads_of_this_process(void) {
  FILE *status = fopen("/proc/self/status", "r");
  char line[256];
  long threads = -1;
  CHECK(status);
  while (fgets(line, sizeof line, status)) {
    if (sscanf(line, "Threads: %ld", &threads) == 1) {
      break;
    }
  }
  CHECK(fclose(status) == 0);
  return threads;
}

static macula_pipeline *pipeline;
static macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
static uint8_t *expected;
static size_t size;

static void draw_the_same(void) {
  macula_images *images = NULL;
  macula_image image;
  OK(macula_pipeline_draw(pipeline, &options, &images));
  OK(macula_images_get(images, 0, &image));
  if (!expected) {
    size = (size_t)image.width * image.height * 3;
    expected = malloc(size);
    CHECK(expected);
    memcpy(expected, image.rgb, size);
  }
  CHECK(memcmp(expected, image.rgb, size) == 0);
  OK(macula_images_free(images));
}

int main(int argc, char **argv) {
  enum { MOMENTS = 200, STEPS = 6 };
  macula_runtime *runtime = NULL;
  macula_cancel_token *token = NULL;
  double begun, length;
  long threads;
  int cancelled = 0;
  uint32_t random = 12345;
  CHECK(argc == 2);
  OK(macula_runtime_create(NULL, &runtime));
  OK(macula_pipeline_open(runtime, argv[1], NULL, &pipeline));
  OK(macula_cancel_token_create(&token));
  options.prompt = PROMPT;
  options.steps = STEPS;
  options.guidance = 3.0;
  draw_the_same();
  begun = now();
  draw_the_same();
  length = now() - begun;
  threads = threads_of_this_process();

  for (int moment = 0; moment < MOMENTS; moment++) {
    later when;
    pthread_t thread;
    macula_images *images = NULL;
    macula_status status;
    random = random * 1664525u + 1013904223u;
    when.token = token;
    when.wait = (useconds_t)((random >> 8) / 16777216.0 * length * 1.1e6);
    CHECK(pthread_create(&thread, NULL, cancel_later, &when) == 0);
    options.cancel = token;
    status = macula_pipeline_draw(pipeline, &options, &images);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(status == MACULA_STATUS_OK || status == MACULA_STATUS_CANCELLED);
    CHECK((status == MACULA_STATUS_OK) == (images != NULL));
    cancelled += status == MACULA_STATUS_CANCELLED;
    OK(macula_images_free(images));
    OK(macula_cancel_token_reset(token));
    options.cancel = NULL;
    draw_the_same();
  }
  CHECK(cancelled > MOMENTS / 4); /* the moments do fall into draws */
  CHECK(threads_of_this_process() == threads);

  /* A token that is cancelled stops the next draw before its first step. */
  options.cancel = token;
  OK(macula_cancel_token_cancel(token));
  {
    macula_images *images = NULL;
    EXPECT(MACULA_STATUS_CANCELLED, "cancelled", macula_pipeline_draw(pipeline, &options, &images));
    CHECK(!images);
  }
  options.cancel = NULL;
  for (uint64_t at = 0; at <= STEPS; at++) {
    stop when = {at, 99};
    macula_images *images = NULL;
    options.progress = stop_at;
    options.progress_userdata = &when;
    EXPECT(MACULA_STATUS_CANCELLED, "cancelled", macula_pipeline_draw(pipeline, &options, &images));
    CHECK(when.seen == at && !images); /* it stopped at that very step */
    options.progress = NULL;
    draw_the_same();
  }
  free(expected);
  OK(macula_cancel_token_free(token));
  OK(macula_pipeline_free(pipeline));
  OK(macula_runtime_free(runtime));
  return 0;
}
