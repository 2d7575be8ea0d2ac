/* A host that brings its own ONNX Runtime: the library works with the host's OrtApiBase, looks for no other one, and
   refuses one that is too old or gives no table. Arguments: the host's ONNX Runtime, a model folder. */
#include "world.h"

#include <dlfcn.h>

/* The first two entries of ONNX Runtime's OrtApiBase, which never change. */
struct api_base {
  const void *(*get_api)(uint32_t version);
  const char *(*get_version)(void);
};

static const void *no_api(uint32_t version) {
  (void)version;
  return NULL;
}
static const char *old(void) { return "1.15.0"; }
static const char *new(void) { return "1.99.0"; }
static const char *odd(void) { return "nightly"; }

static void refused(const struct api_base *base, const char *words) {
  macula_runtime_options options = MACULA_RUNTIME_OPTIONS_INIT;
  macula_runtime *runtime = NULL;
  options.ort_api_base = base;
  EXPECT(MACULA_STATUS_RUNTIME_UNAVAILABLE, words, macula_runtime_create(&options, &runtime));
  CHECK(!runtime && strstr(macula_last_error(), "the host's OrtApiBase"));
}

int main(int argc, char **argv) {
  const struct api_base too_old = {no_api, old}, hollow = {no_api, new}, unknown = {no_api, odd};
  const struct api_base *base;
  const struct api_base *(*get_base)(void);
  struct api_base copy;
  macula_runtime_options options = MACULA_RUNTIME_OPTIONS_INIT;
  macula_runtime_info info = MACULA_RUNTIME_INFO_INIT, again = MACULA_RUNTIME_INFO_INIT;
  macula_draw_options draw = MACULA_DRAW_OPTIONS_INIT;
  macula_runtime *runtime = NULL, *other = NULL;
  macula_pipeline *pipeline = NULL;
  macula_images *images = NULL;
  void *library, *symbol;
  CHECK(argc == 3);
  /* What the host gives comes before every other place. */
  CHECK(setenv("MACULA_ONNXRUNTIME", "/nowhere/libonnxruntime.so", 1) == 0);
  refused(&too_old, "found version 1.15.0; needed: 1.21");
  refused(&hollow, "version 1.99.0 does not give API");
  refused(&unknown, "is no version");

  library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  CHECK(library);
  symbol = dlsym(library, "OrtGetApiBase");
  CHECK(symbol);
  memcpy(&get_base, &symbol, sizeof symbol); /* ISO C has no cast from an object pointer */
  base = get_base();
  options.ort_api_base = base;
  options.library = "/nowhere/libonnxruntime.so";
  OK(macula_runtime_create(&options, &runtime));
  OK(macula_runtime_get_info(runtime, &info));
  CHECK(strcmp(info.version, base->get_version()) == 0);
  CHECK(info.library && strcmp(info.library, argv[1]) == 0);

  OK(macula_pipeline_open(runtime, argv[2], NULL, &pipeline));
  draw.prompt = PROMPT;
  draw.steps = 2;
  OK(macula_pipeline_draw(pipeline, &draw, &images));
  OK(macula_images_free(images));

  /* The same library again, by its table, by its path, or by no wish; and no other one. */
  options.library = NULL;
  OK(macula_runtime_create(&options, &other));
  OK(macula_runtime_free(other));
  options.ort_api_base = NULL;
  options.library = argv[1];
  OK(macula_runtime_create(&options, &other));
  OK(macula_runtime_free(other));
  OK(macula_runtime_create(NULL, &other));
  OK(macula_runtime_get_info(other, &again));
  CHECK(strcmp(again.library, info.library) == 0);
  OK(macula_runtime_free(other));
  copy = *base;
  options.library = NULL;
  options.ort_api_base = &copy;
  EXPECT(MACULA_STATUS_RUNTIME_UNAVAILABLE, "another OrtApiBase", macula_runtime_create(&options, &other));

  OK(macula_pipeline_free(pipeline));
  OK(macula_runtime_free(runtime));
  return 0;
}
