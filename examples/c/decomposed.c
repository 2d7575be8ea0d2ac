/*
 * Draws the same prompts and seeds by the plain and by the decomposed process of a model: one row each, with the picture as
 * it is predicted after some of the steps, on one labelled sheet. Prints how long both took and how many pixels the model
 * saw.
 *
 *   decomposed MODEL OUT.png [options]
 *     --steps N       denoising steps           (25)
 *     --guidance W    classifier-free guidance  (3)
 *     --seed N        seed                      (1)
 *
 * Ctrl-C ends the drawing at the next step and leaves no file.
 *
 *   cc -std=c11 -I include examples/c/decomposed.c -L target/release -lmacula -o decomposed
 */
#include <macula.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "sheet.h"

enum { PROMPTS = 3, ROWS = 2 * PROMPTS, COLUMNS = 5, CELL = 128 };

static const char *const prompts[PROMPTS] = {
  "a tiger on a blue background",
  "a taxi and an apple on a green background",
  "a rocket and a cactus on a yellow background",
};

static volatile sig_atomic_t interrupted;

static void interrupt(int signal_number) {
  (void)signal_number;
  interrupted = 1;
}

typedef struct {
  const char *model, *out;
  int steps;
  double guidance;
  unsigned long long seed;
} command;

static int read_command(int argc, char **argv, command *read) {
  command defaults = {NULL, NULL, 25, 3.0, 1};
  *read = defaults;
  if (argc < 3) {
    return 0;
  }
  read->model = argv[1];
  read->out = argv[2];
  for (int at = 3; at < argc; at += 2) {
    const char *value = at + 1 < argc ? argv[at + 1] : NULL;
    if (!value) {
      return 0;
    } else if (!strcmp(argv[at], "--steps")) {
      read->steps = atoi(value);
    } else if (!strcmp(argv[at], "--guidance")) {
      read->guidance = atof(value);
    } else if (!strcmp(argv[at], "--seed")) {
      read->seed = strtoull(value, NULL, 10);
    } else {
      return 0;
    }
  }
  return 1;
}

/* Where the row that is being drawn goes, and what the model has seen for it. */
typedef struct {
  sheet *onto;
  uint32_t y;
  unsigned long long calls, pixels;
} course;

static uint32_t column_x(int column) { return SHEET_GAP + (uint32_t)column * (CELL + SHEET_GAP); }

/* Copies the prediction to its column after each quarter of the steps. */
static int32_t show_progress(void *userdata, const macula_progress *progress) {
  course *row = userdata;
  if (progress->preview) {
    const macula_image *seen = progress->preview;
    uint64_t quarters = COLUMNS - 1;
    row->calls++;
    row->pixels += (unsigned long long)seen->width * seen->height;
    for (uint64_t column = 0; row->onto && column < quarters; column++) {
      uint64_t step = column * progress->total / quarters;
      if (progress->done == (step ? step : 1)) {
        sheet_picture(row->onto, column_x((int)column), row->y, seen->rgb, seen->width, seen->height, CELL / seen->width);
      }
    }
  }
  return interrupted;
}

static double seconds(void) {
  struct timespec now;
  timespec_get(&now, TIME_UTC);
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* Draws one picture; `schedule` NULL is the plain process. */
static macula_status draw(macula_pipeline *pipeline, const macula_schedule *schedule, const command *asked, int prompt,
                          course *row, double *took) {
  macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
  macula_images *images = NULL;
  macula_image image;
  double began = seconds();
  macula_status status;
  options.prompt = prompts[prompt];
  options.schedule = schedule;
  options.steps = (uint32_t)asked->steps;
  options.guidance = asked->guidance;
  options.seed = asked->seed;
  options.progress = show_progress;
  options.progress_userdata = row;
  options.preview = 1;
  status = macula_pipeline_draw(pipeline, &options, &images);
  *took += seconds() - began;
  status = status ? status : macula_images_get(images, 0, &image);
  if (!status && row->onto) {
    sheet_picture(row->onto, column_x(COLUMNS - 1), row->y, image.rgb, image.width, image.height, CELL / image.width);
  }
  macula_images_free(images);
  return status;
}

static macula_status draw_sheet(macula_pipeline *pipeline, const command *asked, sheet *onto) {
  const char *const names[2] = {"plain", "decomposed"};
  macula_schedule *schedule = NULL;
  course seen[2] = {{NULL, 0, 0, 0}, {NULL, 0, 0, 0}};
  double took[2] = {0, 0};
  uint32_t high = SHEET_LINE + CELL + SHEET_GAP;
  macula_status status = macula_pipeline_get_schedule(pipeline, &schedule);
  if (!status && !sheet_create(onto, column_x(COLUMNS), ROWS * high + SHEET_GAP)) {
    status = MACULA_STATUS_OUT_OF_MEMORY;
  }
  for (int kind = 0; kind < 2 && !status; kind++) { /* once for nothing: the first run at a size takes longer */
    course nowhere = {NULL, 0, 0, 0};
    double ignored = 0;
    status = draw(pipeline, kind ? schedule : NULL, asked, 0, &nowhere, &ignored);
  }
  for (int row = 0; row < ROWS && !status; row++) {
    int kind = row % 2;
    char label[128];
    snprintf(label, sizeof label, "%s: %s", names[kind], prompts[row / 2]);
    sheet_text(onto, SHEET_GAP, SHEET_GAP + (uint32_t)row * high, label);
    seen[kind].onto = onto;
    seen[kind].y = SHEET_GAP + (uint32_t)row * high + SHEET_LINE;
    status = draw(pipeline, kind ? schedule : NULL, asked, row / 2, &seen[kind], &took[kind]);
  }
  for (int kind = 0; kind < 2 && !status; kind++) {
    printf("%-10s  %d pictures in %.2f s, %llu steps, %.2f million pixels seen\n", names[kind], PROMPTS, took[kind],
           seen[kind].calls, (double)seen[kind].pixels / 1e6);
  }
  if (!status) {
    printf("decomposed / plain: %.2f of the time, %.2f of the pixels\n", took[1] / took[0],
           (double)seen[1].pixels / (double)seen[0].pixels);
  }
  macula_schedule_free(schedule);
  return status;
}

int main(int argc, char **argv) {
  macula_runtime *runtime = NULL;
  macula_pipeline *pipeline = NULL;
  sheet drawn = {NULL, 0, 0};
  command asked;
  macula_status status;

  if (!read_command(argc, argv, &asked)) {
    fprintf(stderr, "usage: %s MODEL OUT.png [--steps N] [--guidance W] [--seed N]\n", argv[0]);
    return 2;
  }
  signal(SIGINT, interrupt);
  status = macula_runtime_create(NULL, &runtime);
  status = status ? status : macula_pipeline_open(runtime, asked.model, NULL, &pipeline);
  status = status ? status : draw_sheet(pipeline, &asked, &drawn);
  if (!status) {
    macula_image image = {drawn.pixels, drawn.width, drawn.height};
    status = macula_image_write_png(&image, asked.out);
  }
  if (status) {
    fprintf(stderr, "%s: %s\n", macula_status_name(status), macula_last_error());
  }
  sheet_free(&drawn);
  macula_pipeline_free(pipeline);
  macula_runtime_free(runtime);
  return status ? 1 : 0;
}
