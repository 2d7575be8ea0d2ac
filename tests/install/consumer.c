/* A program of someone who has only the installed tree: draws one small picture.
   Arguments: a model folder, the PNG to write; for a statically linked program, the folder of ONNX Runtime. */
#include <macula.h>
#include <stdio.h>

int main(int argc, char **argv) {
  macula_runtime_options where = MACULA_RUNTIME_OPTIONS_INIT;
  macula_runtime_info found = MACULA_RUNTIME_INFO_INIT;
  macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
  macula_runtime *runtime = NULL;
  macula_pipeline *pipeline = NULL;
  macula_images *images = NULL;
  macula_status status;
  if (argc < 3) return 2;
  if (argc > 3) where.library = argv[3];
  options.prompt = "a cat";
  options.steps = 1;
  options.guidance = 1.0;
  status = macula_runtime_create(&where, &runtime);
  if (!status) status = macula_runtime_get_info(runtime, &found);
  if (!status) status = macula_pipeline_open(runtime, argv[1], NULL, &pipeline);
  if (!status) status = macula_pipeline_draw(pipeline, &options, &images);
  if (!status) status = macula_images_write_png(images, 0, argv[2]);
  if (status) fprintf(stderr, "%s\n", macula_last_error());
  else printf("%s %s\n", macula_version_string(), found.library);
  macula_images_free(images);
  macula_pipeline_free(pipeline);
  macula_runtime_free(runtime);
  return status;
}
