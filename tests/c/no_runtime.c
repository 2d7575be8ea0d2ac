/* ONNX Runtime that is missing, empty, or something else: a status within a second that says what was tried.
   Argument: a folder to write in. */
#include "check.h"

#include <time.h>

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void expect(const char *library) {
  macula_runtime_options options = MACULA_RUNTIME_OPTIONS_INIT;
  macula_runtime *runtime = NULL;
  double begun = now();
  options.library = library;
  EXPECT(MACULA_STATUS_RUNTIME_UNAVAILABLE, library, macula_runtime_create(&options, &runtime));
  CHECK(now() - begun < 1.0 && !runtime);
}

int main(int argc, char **argv) {
  char path[4096];
  FILE *file;
  macula_runtime_options options = MACULA_RUNTIME_OPTIONS_INIT;
  macula_runtime *runtime = NULL;
  CHECK(argc == 2);
  expect("/nowhere/libonnxruntime.so");
  snprintf(path, sizeof path, "%s/libonnxruntime.so", argv[1]);
  file = fopen(path, "wb");
  CHECK(file && fclose(file) == 0);
  expect(path); /* empty */
  file = fopen(path, "wb");
  CHECK(file && fputs("not a library", file) >= 0 && fclose(file) == 0);
  expect(path);
  snprintf(path, sizeof path, "%s/libmacula.so.0", argv[1]);
  expect(path); /* a library without OrtGetApiBase */
  options.log_level = 99;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "log_level", macula_runtime_create(&options, &runtime));
  OK(macula_runtime_create(NULL, &runtime)); /* and the right one still loads */
  OK(macula_runtime_free(runtime));
  return 0;
}
