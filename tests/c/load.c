/* Loads the library, uses it and unloads it, 100 times: no growth, no crash, also with a model in use across a load.
   Arguments: the library, a model folder. */
#include <dlfcn.h>
#include <macula.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                                               \
  do {                                                                                                                 \
    if (!(condition)) {                                                                                                \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                                          \
      exit(1);                                                                                                         \
    }                                                                                                                  \
  } while (0)

/* A function pointer from an object pointer: what POSIX asks for and ISO C has no cast for. */
#define FIND(name)                                                                                                     \
  do {                                                                                                                 \
    void *found = dlsym(library, #name);                                                                               \
    CHECK(found);                                                                                                      \
    memcpy(&name##_, &found, sizeof found);                                                                            \
  } while (0)

static long resident_kib(void) {
  FILE *status = fopen("/proc/self/statm", "r");
  long all, pages = 0;
  CHECK(status && fscanf(status, "%ld %ld", &all, &pages) == 2 && fclose(status) == 0);
  return pages * 4;
}

int main(int argc, char **argv) {
  long after_ten = 0, after_all;
  CHECK(argc == 3);
  for (int round = 0; round < 100; round++) {
    macula_status (*macula_runtime_create_)(const macula_runtime_options *, macula_runtime **);
    macula_status (*macula_runtime_free_)(macula_runtime *);
    macula_status (*macula_pipeline_open_)(const macula_runtime *, const char *, const macula_pipeline_options *,
                                           macula_pipeline **);
    macula_status (*macula_pipeline_draw_)(macula_pipeline *, const macula_draw_options *, macula_images **);
    macula_status (*macula_images_free_)(macula_images *);
    macula_status (*macula_pipeline_free_)(macula_pipeline *);
    uint32_t (*macula_version_number_)(void);
    macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
    macula_runtime *runtime = NULL;
    macula_pipeline *pipeline = NULL;
    macula_images *images = NULL;
    void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    CHECK(library);
    FIND(macula_version_number);
    FIND(macula_runtime_create);
    FIND(macula_runtime_free);
    FIND(macula_pipeline_open);
    FIND(macula_pipeline_draw);
    FIND(macula_images_free);
    FIND(macula_pipeline_free);
    CHECK(macula_version_number_() >= 1000);
    CHECK(macula_runtime_create_(NULL, &runtime) == MACULA_STATUS_OK);
    if (round % 10 == 0) {
      options.prompt = "a photo of the red cat";
      options.steps = 1;
      options.guidance = 1.0;
      CHECK(macula_pipeline_open_(runtime, argv[2], NULL, &pipeline) == MACULA_STATUS_OK);
      CHECK(macula_pipeline_draw_(pipeline, &options, &images) == MACULA_STATUS_OK);
      CHECK(macula_images_free_(images) == MACULA_STATUS_OK);
      CHECK(macula_pipeline_free_(pipeline) == MACULA_STATUS_OK);
    }
    CHECK(macula_runtime_free_(runtime) == MACULA_STATUS_OK);
    CHECK(dlclose(library) == 0);
    if (round == 10) {
      after_ten = resident_kib();
    }
  }
  after_all = resident_kib();
  CHECK(after_all < after_ten + 16 * 1024);
  return 0;
}
