/*
 * Draws with concept neurons: the untouched model, concept A, concept B, both composed, and a third subject untouched and
 * ablated, one row each, four seeds side by side, on one labelled sheet.
 *
 *   compose MODEL A.safetensors B.safetensors ERASE.safetensors OUT.png [options]
 *     --scene TEXT    ends every prompt         (" on a blue background")
 *     --steps N       denoising steps           (20)
 *     --guidance W    classifier-free guidance  (4)
 *     --scope NAME    global, local or default  (default: as each file says)
 *     --seed N        the first of four seeds   (1)
 *
 * Ctrl-C ends the drawing at the next step and leaves no file.
 *
 *   cc -std=c11 -I include examples/c/compose.c -L target/release -lmacula -o compose
 */
#include <macula.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sheet.h"

enum { ROWS = 6, SEEDS = 4, CELL = 192 };

static volatile sig_atomic_t interrupted;

static void interrupt(int signal_number) {
  (void)signal_number;
  interrupted = 1;
}

/* Which of all the drawings is under way. */
typedef struct {
  int done, all;
} course;

static int32_t show_progress(void *userdata, const macula_progress *progress) {
  const course *where = userdata;
  double share = (where->done + (progress->total ? (double)progress->done / (double)progress->total : 0)) / where->all;
  int filled = (int)(share * 40);
  fprintf(stderr, "\r[%.*s%*s] %3d %%  picture %d of %d, step %llu of %llu ", filled,
          "########################################", 40 - filled, "", (int)(share * 100), where->done + 1, where->all,
          (unsigned long long)progress->done, (unsigned long long)progress->total);
  return interrupted;
}

/* One row of the sheet: what is drawn, and which concepts work on it. */
typedef struct {
  char label[64];
  char prompt[512];
  macula_term terms[2];
  size_t term_count;
  int ablates;
} row;

typedef struct {
  const char *model, *concepts[3], *out, *scene, *scope;
  int steps;
  double guidance;
  unsigned long long seed;
} command;

static int read_command(int argc, char **argv, command *read) {
  command defaults = {NULL, {NULL, NULL, NULL}, NULL, " on a blue background", "default", 20, 4.0, 1};
  *read = defaults;
  if (argc < 6) {
    return 0;
  }
  read->model = argv[1];
  memcpy(read->concepts, argv + 2, sizeof read->concepts);
  read->out = argv[5];
  for (int at = 6; at < argc; at += 2) {
    const char *value = at + 1 < argc ? argv[at + 1] : NULL;
    if (!value) {
      return 0;
    } else if (!strcmp(argv[at], "--scene")) {
      read->scene = value;
    } else if (!strcmp(argv[at], "--steps")) {
      read->steps = atoi(value);
    } else if (!strcmp(argv[at], "--guidance")) {
      read->guidance = atof(value);
    } else if (!strcmp(argv[at], "--scope")) {
      read->scope = value;
    } else if (!strcmp(argv[at], "--seed")) {
      read->seed = strtoull(value, NULL, 10);
    } else {
      return 0;
    }
  }
  return 1;
}

/* "a <s1> dog": what a prompt says to mean a concept. */
static macula_status phrase(const macula_concept *subject, char *text, size_t size) {
  macula_concept_info info = MACULA_CONCEPT_INFO_INIT;
  macula_status status = macula_concept_get_info(subject, &info);
  if (!status) {
    const char *between = *info.trigger && *info.class_noun ? " " : "";
    char words[128];
    snprintf(words, sizeof words, "%s%s%s", info.trigger, between, info.class_noun);
    snprintf(text, size, "%s %s", strchr("aeiou", *words) && *words ? "an" : "a", words);
  }
  return status;
}

static macula_term term_of(const macula_concept *subject, const char *scope) {
  macula_term term = MACULA_TERM_INIT;
  term.subject = subject;
  term.scope = !strcmp(scope, "global")  ? MACULA_SCOPE_GLOBAL
               : !strcmp(scope, "local") ? MACULA_SCOPE_LOCAL
                                         : MACULA_SCOPE_DEFAULT;
  return term;
}

static macula_status plan_rows(const command *asked, macula_concept *const *subjects, row *rows) {
  char a[160], b[160], erased[160];
  macula_status status = phrase(subjects[0], a, sizeof a);
  status = status ? status : phrase(subjects[1], b, sizeof b);
  status = status ? status : phrase(subjects[2], erased, sizeof erased);
  if (status) {
    return status;
  }
  memset(rows, 0, ROWS * sizeof *rows);
  snprintf(rows[0].label, sizeof rows[0].label, "base: %.25s and %.25s", a, b);
  snprintf(rows[0].prompt, sizeof rows[0].prompt, "%s and %s%s", a, b, asked->scene);
  snprintf(rows[1].label, sizeof rows[1].label, "A: %.50s", a);
  snprintf(rows[1].prompt, sizeof rows[1].prompt, "%s%s", a, asked->scene);
  rows[1].terms[0] = term_of(subjects[0], asked->scope);
  rows[1].term_count = 1;
  snprintf(rows[2].label, sizeof rows[2].label, "B: %.50s", b);
  snprintf(rows[2].prompt, sizeof rows[2].prompt, "%s%s", b, asked->scene);
  rows[2].terms[0] = term_of(subjects[1], asked->scope);
  rows[2].term_count = 1;
  snprintf(rows[3].label, sizeof rows[3].label, "A + B");
  memcpy(rows[3].prompt, rows[0].prompt, sizeof rows[3].prompt);
  rows[3].terms[0] = rows[1].terms[0];
  rows[3].terms[1] = rows[2].terms[0];
  rows[3].term_count = 2;
  snprintf(rows[4].label, sizeof rows[4].label, "base: %.50s", erased);
  snprintf(rows[4].prompt, sizeof rows[4].prompt, "%s%s", erased, asked->scene);
  rows[5] = rows[4];
  snprintf(rows[5].label, sizeof rows[5].label, "%.40s ablated", erased);
  rows[5].terms[0] = term_of(subjects[2], asked->scope);
  rows[5].term_count = 1;
  rows[5].ablates = 1;
  return MACULA_STATUS_OK;
}

/* Draws one cell and copies it to its place; the first one decides how large the sheet is. */
static macula_status draw_cell(macula_pipeline *pipeline, const command *asked, const row *drawn, int at_row, int at_seed,
                               course *where, sheet *onto) {
  macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
  macula_images *images = NULL;
  macula_image image;
  char label[32];
  macula_status status;
  options.prompt = drawn->prompt;
  options.steps = (uint32_t)asked->steps;
  options.guidance = asked->guidance;
  options.seed = asked->seed + (unsigned)at_seed;
  options.progress = show_progress;
  options.progress_userdata = where;
  status = macula_pipeline_draw(pipeline, &options, &images);
  status = status ? status : macula_images_get(images, 0, &image);
  if (!status) {
    uint32_t scale = image.width < CELL ? CELL / image.width : 1;
    uint32_t wide = image.width * scale + SHEET_GAP, high = image.height * scale + SHEET_LINE + SHEET_GAP;
    if (!onto->pixels && !sheet_create(onto, SEEDS * wide + SHEET_GAP, ROWS * high + SHEET_LINE + 2 * SHEET_GAP)) {
      status = MACULA_STATUS_OUT_OF_MEMORY;
    } else {
      uint32_t x = SHEET_GAP + (uint32_t)at_seed * wide, y = SHEET_GAP + SHEET_LINE + (uint32_t)at_row * high;
      if (at_row == 0) {
        snprintf(label, sizeof label, "seed %llu", asked->seed + (unsigned)at_seed);
        sheet_text(onto, x, SHEET_GAP, label);
      }
      if (at_seed == 0) {
        sheet_text(onto, x, y, drawn->label);
      }
      sheet_picture(onto, x, y + SHEET_LINE, image.rgb, image.width, image.height, scale);
    }
  }
  macula_images_free(images);
  return status;
}

static macula_status draw_sheet(macula_pipeline *pipeline, const command *asked, const row *rows, sheet *onto) {
  course where = {0, ROWS * SEEDS};
  macula_status status = MACULA_STATUS_OK;
  for (int at_row = 0; at_row < ROWS && !status; at_row++) {
    const row *drawn = &rows[at_row];
    status = macula_composition_clear(pipeline);
    if (!status && drawn->term_count) {
      status = drawn->ablates ? macula_ablate(pipeline, drawn->terms, drawn->term_count)
                              : macula_compose(pipeline, drawn->terms, drawn->term_count);
    }
    for (int at_seed = 0; at_seed < SEEDS && !status; at_seed++, where.done++) {
      status = draw_cell(pipeline, asked, drawn, at_row, at_seed, &where, onto);
    }
  }
  fprintf(stderr, "\n");
  return status;
}

int main(int argc, char **argv) {
  macula_runtime *runtime = NULL;
  macula_pipeline *pipeline = NULL;
  macula_concept *subjects[3] = {NULL, NULL, NULL};
  sheet drawn = {NULL, 0, 0};
  row rows[ROWS];
  command asked;
  macula_status status;

  if (!read_command(argc, argv, &asked)) {
    fprintf(stderr, "usage: %s MODEL A.safetensors B.safetensors ERASE.safetensors OUT.png [--scene TEXT] [--steps N]\n"
                    "       [--guidance W] [--scope global|local|default] [--seed N]\n", argv[0]);
    return 2;
  }
  signal(SIGINT, interrupt);
  status = macula_runtime_create(NULL, &runtime);
  status = status ? status : macula_pipeline_open(runtime, asked.model, NULL, &pipeline);
  for (int at = 0; at < 3 && !status; at++) {
    status = macula_concept_load(asked.concepts[at], &subjects[at]);
  }
  status = status ? status : plan_rows(&asked, subjects, rows);
  status = status ? status : draw_sheet(pipeline, &asked, rows, &drawn);
  if (!status) {
    macula_image image = {drawn.pixels, drawn.width, drawn.height};
    status = macula_image_write_png(&image, asked.out);
  }
  if (status) {
    fprintf(stderr, "%s: %s\n", macula_status_name(status), macula_last_error());
  }
  sheet_free(&drawn);
  for (int at = 0; at < 3; at++) {
    macula_concept_free(subjects[at]);
  }
  macula_pipeline_free(pipeline);
  macula_runtime_free(runtime);
  return status ? 1 : 0;
}
