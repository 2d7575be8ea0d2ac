/* Calls every export in one of four ways. Included by the program that tests/capi.rs generates from macula.h, after its
   table `walked`.
   Arguments: null, fork, callback or panic; a model folder; a folder to write in. */
#include <sys/wait.h>
#include <unistd.h>

static const size_t walked_count = sizeof walked / sizeof *walked;

static void fail(const char *function, const char *parameter, const char *what, macula_status status) {
  fprintf(stderr, "%s, %s: %s; it gave %s: %s\n", function, parameter, what, macula_status_name(status),
          macula_last_error());
  exit(1);
}

static int is_free(const char *function) {
  const char *end = strstr(function, "_free");
  return end && !end[5];
}

static void walk_null(void) {
  for (size_t at = 0; at < walked_count; at++) {
    const struct walked *one = &walked[at];
    int required = 0, any = 0;
    for (int place = 0; place < one->count; place++) {
      char expected[128];
      macula_status status;
      if (one->places[place] == NUMBER) {
        continue;
      }
      any = 1;
      required |= one->places[place] == REQUIRED;
      status = one->call(place);
      snprintf(expected, sizeof expected, "%s is NULL", one->names[place]);
      if (one->places[place] == NULLABLE && status == MACULA_STATUS_PANIC) {
        fail(one->name, one->names[place], "may be NULL", status);
      }
      if (one->places[place] == REQUIRED && status != MACULA_STATUS_INVALID_ARGUMENT) {
        fail(one->name, one->names[place], "NULL was accepted", status);
      }
      if (one->places[place] == REQUIRED && !strstr(macula_last_error(), expected)) {
        fail(one->name, one->names[place], "the text does not say that it is NULL", status);
      }
    }
    if (any) {
      macula_status status = one->call(ALL);
      if (required ? status != MACULA_STATUS_INVALID_ARGUMENT : status == MACULA_STATUS_PANIC) {
        fail(one->name, "all", "NULL everywhere", status);
      }
    }
  }
}

/* In a forked child every call that can fail answers FORKED, at once, and frees nothing. */
static void walk_fork(void) {
  int ended = 0;
  pid_t child = fork();
  CHECK(child >= 0);
  if (!child) {
    alarm(1); /* a call that waits for a thread of the parent would wait for ever */
    for (size_t at = 0; at < walked_count; at++) {
      macula_status status = walked[at].call(-1);
      if (walked[at].can_fail && status != MACULA_STATUS_FORKED) {
        fail(walked[at].name, "", "worked in a forked child", status);
      }
    }
    exit(0); /* with the exit handlers */
  }
  CHECK(waitpid(child, &ended, 0) == child);
  CHECK(WIFEXITED(ended) && WEXITSTATUS(ended) == 0);
}

static int32_t call_everything(void *userdata, const macula_progress *progress) {
  int *calls = userdata;
  (void)progress;
  if (++*calls > 2) {
    return 0;
  }
  for (size_t at = 0; at < walked_count; at++) {
    macula_status status;
    if (is_free(walked[at].name) && strcmp(walked[at].name, "macula_pipeline_free")) {
      continue; /* these would end what the walk needs */
    }
    status = walked[at].call(-1);
    if (status == MACULA_STATUS_PANIC) {
      fail(walked[at].name, "", "panicked inside a callback", status);
    }
    if (!strcmp(walked[at].name, "macula_pipeline_free") && status != MACULA_STATUS_BUSY) {
      fail(walked[at].name, "", "a pipeline at work was freed", status);
    }
    if (!strcmp(walked[at].name, "macula_cancel_token_cancel")) {
      OK(macula_cancel_token_reset(world_macula_cancel_token));
    }
  }
  return 0;
}

static void walk_callback(void) {
  macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
  macula_images *images = NULL;
  macula_image before, after;
  int calls = 0;
  world_fill_macula_draw_options(&options);
  options.progress = call_everything;
  options.progress_userdata = &calls;
  OK(macula_composition_clear(world_macula_pipeline));
  OK(macula_pipeline_draw(world_macula_pipeline, &options, &images));
  CHECK(calls == 3); /* before the first of two steps, and after each */
  OK(macula_images_get(world_macula_images, 0, &before));
  OK(macula_images_get(images, 0, &after));
  CHECK(memcmp(before.rgb, after.rgb, (size_t)before.width * before.height * 3) == 0);
  OK(macula_images_free(images));
}

#ifdef INJECT
void macula_inject_panic(const char *name, int32_t late);

static void walk_panic(void) {
  macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
  macula_pipeline_info info = MACULA_PIPELINE_INFO_INIT;
  macula_images *images = NULL;
  for (size_t at = 0; at < walked_count; at++) {
    macula_status status;
    macula_inject_panic(walked[at].name, 0);
    status = walked[at].call(-1);
    macula_inject_panic(NULL, 0);
    if (walked[at].can_fail && status != MACULA_STATUS_PANIC) {
      fail(walked[at].name, "", "the panic was not a status", status);
    }
    if (walked[at].can_fail && !strstr(macula_last_error(), walked[at].name)) {
      fail(walked[at].name, "", "the text does not name the function", status);
    }
  }
  /* A panic before a handle was looked up harms none. */
  OK(macula_pipeline_get_info(world_macula_pipeline, &info));
  /* One in the middle of the work makes the handle answer PANIC until it is freed, which works. */
  macula_inject_panic("macula_pipeline_draw", 1);
  world_fill_macula_draw_options(&options);
  EXPECT(MACULA_STATUS_PANIC, "a defect of the library", macula_pipeline_draw(world_macula_pipeline, &options, &images));
  macula_inject_panic(NULL, 0);
  EXPECT(MACULA_STATUS_PANIC, "free it", macula_pipeline_draw(world_macula_pipeline, &options, &images));
  EXPECT(MACULA_STATUS_PANIC, "free it", macula_pipeline_get_info(world_macula_pipeline, &info));
  OK(macula_pipeline_free(world_macula_pipeline));
  OK(macula_pipeline_open(world_macula_runtime, world_model, NULL, &world_macula_pipeline));
  OK(macula_pipeline_draw(world_macula_pipeline, &options, &images));
  OK(macula_images_free(images));
}
#endif

int main(int argc, char **argv) {
  CHECK(argc == 4);
  world_create(argv[2], argv[3]);
  if (!strcmp(argv[1], "null")) {
    walk_null();
  } else if (!strcmp(argv[1], "fork")) {
    walk_fork();
  } else if (!strcmp(argv[1], "callback")) {
    walk_callback();
#ifdef INJECT
  } else if (!strcmp(argv[1], "panic")) {
    walk_panic();
#endif
  } else {
    CHECK(!"a known way");
  }
  world_free();
  return 0;
}
