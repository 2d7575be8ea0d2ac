/*
 * A plug-in for GIMP 2.10 that draws with Macula: File > Create > Draw with Macula, and the procedure `macula-draw` for
 * scripts. This file is what GIMP calls; dialog.c asks the user, painter.c draws.
 *
 *     (macula-draw RUN-NONINTERACTIVE -1 -1 "models/emoji/onnx" "a <s1> apple on a blue background"
 *                  1 #("models/concepts/green-apple.safetensors") 1 #(1.0) 20 4.0 7)
 */
#include "dialog.h"

#include <libgimp/gimp.h>
#include <libgimp/gimpui.h>

#include <string.h>

static const gchar *const PROCEDURE = "macula-draw";

/* The procedure's parameters, in their order. */
enum { RUN_MODE, IMAGE, DRAWABLE, MODEL, PROMPT, CONCEPT_COUNT, CONCEPTS, STRENGTH_COUNT, STRENGTHS, STEPS, GUIDANCE, SEED,
       PARAMETERS };

static void query(void) {
  static const GimpParamDef parameters[PARAMETERS] = {
    {GIMP_PDB_INT32, "run-mode", "The run mode { RUN-INTERACTIVE (0), RUN-NONINTERACTIVE (1), RUN-WITH-LAST-VALS (2) }"},
    {GIMP_PDB_IMAGE, "image", "The image that gets a new layer; -1 for a new image"},
    {GIMP_PDB_DRAWABLE, "drawable", "Not used"},
    {GIMP_PDB_STRING, "model", "Folder of a text-to-image model in the diffusers ONNX layout"},
    {GIMP_PDB_STRING, "prompt", "What to draw"},
    {GIMP_PDB_INT32, "num-concepts", "The number of concept files, 0 to 16"},
    {GIMP_PDB_STRINGARRAY, "concepts", "Concept files"},
    {GIMP_PDB_INT32, "num-strengths", "The number of strengths: that of the concept files"},
    {GIMP_PDB_FLOATARRAY, "strengths", "The strength of each concept, 0 to 1"},
    {GIMP_PDB_INT32, "steps", "Denoising steps, at least 1"},
    {GIMP_PDB_FLOAT, "guidance", "Guidance scale; 1 does without"},
    {GIMP_PDB_INT32, "seed", "The same seed draws the same picture"},
  };
  static const GimpParamDef results[] = {
    {GIMP_PDB_IMAGE, "image", "The image"},
    {GIMP_PDB_LAYER, "layer", "Its new layer"},
  };
  gimp_install_procedure(PROCEDURE, "Draw a picture from a prompt",
                         "Draws with an ONNX text-to-image model whose cross-attention is steered by concepts: small files "
                         "that make it draw a subject, or forget one. The picture becomes a new layer or a new image.",
                         "The Macula authors", "MIT or Apache 2.0", "2026", "Draw with _Macula…", "", GIMP_PLUGIN,
                         G_N_ELEMENTS(parameters), G_N_ELEMENTS(results), parameters, results);
  gimp_plugin_menu_register(PROCEDURE, "<Image>/File/Create/Acquire");
}

/* ----------------------------------------------------------------------------------------------------------------
 * Results
 * ---------------------------------------------------------------------------------------------------------------- */

/* What GIMP reads after `run` has returned. */
static GimpParam returned[3];
static gint returned_count;

static void give(GimpPDBStatusType status) {
  returned[0].type = GIMP_PDB_STATUS;
  returned[0].data.d_status = status;
  returned_count = 1;
}

/* GIMP shows the message, as that of this procedure, and takes the text over. */
static void give_error(GimpPDBStatusType status, const gchar *message) {
  give(status);
  returned[1].type = GIMP_PDB_STRING;
  returned[1].data.d_string = g_strdup(message);
  returned_count = 2;
}

static void give_picture(gint32 image, gint32 layer) {
  give(GIMP_PDB_SUCCESS);
  returned[1].type = GIMP_PDB_IMAGE;
  returned[1].data.d_image = image;
  returned[2].type = GIMP_PDB_LAYER;
  returned[2].data.d_layer = layer;
  returned_count = 3;
}

/* Puts a picture into the middle of an image, above its active layer, or into a new image (-1). */
static void place(const macula_images *images, gint32 image, const gchar *prompt, GimpRunMode mode) {
  macula_image picture;
  GeglBuffer *buffer;
  gint width, height;
  gint32 layer;
  gboolean is_new = image == -1;
  if (macula_images_get(images, 0, &picture)) {
    give_error(GIMP_PDB_EXECUTION_ERROR, macula_last_error());
    return;
  }
  width = (gint)picture.width;
  height = (gint)picture.height;
  if (is_new) {
    image = gimp_image_new(width, height, GIMP_RGB);
    gimp_image_undo_disable(image);
  } else {
    gimp_image_undo_group_start(image);
  }
  layer = gimp_layer_new(image, prompt, width, height, is_new ? GIMP_RGB_IMAGE : GIMP_RGBA_IMAGE, 100,
                         gimp_image_get_default_new_layer_mode(image));
  buffer = gimp_drawable_get_buffer(layer);
  gegl_buffer_set(buffer, GEGL_RECTANGLE(0, 0, width, height), 0, babl_format("R'G'B' u8"), picture.rgb, width * 3);
  g_object_unref(buffer);
  gimp_layer_set_offsets(layer, (gimp_image_width(image) - width) / 2, (gimp_image_height(image) - height) / 2);
  gimp_image_insert_layer(image, layer, -1, -1);
  if (is_new) {
    gimp_image_undo_enable(image);
  } else {
    gimp_image_undo_group_end(image);
  }
  if (mode != GIMP_RUN_NONINTERACTIVE) {
    if (is_new) {
      gimp_display_new(image);
    }
    gimp_displays_flush();
  }
  give_picture(image, layer);
}

/* ----------------------------------------------------------------------------------------------------------------
 * Running
 * ---------------------------------------------------------------------------------------------------------------- */

static gboolean take_text(gchar *to, const gchar *from, const gchar *what) {
  gboolean fits = from && strlen(from) < PAINTER_TEXT;
  if (fits) {
    strcpy(to, from);
  } else {
    gchar *message = g_strdup_printf("%s must be a text of less than %d bytes", what, PAINTER_TEXT);
    give_error(GIMP_PDB_CALLING_ERROR, message);
    g_free(message);
  }
  return fits;
}

/* Reads the parameters of a script; says itself what is wrong with them. */
static gboolean take_parameters(const GimpParam *given, gint count, PainterSettings *settings) {
  gint concepts;
  if (count != PARAMETERS) {
    give_error(GIMP_PDB_CALLING_ERROR, "macula-draw takes 12 parameters");
    return FALSE;
  }
  concepts = given[CONCEPT_COUNT].data.d_int32;
  if (concepts < 0 || concepts > PAINTER_CONCEPTS || concepts != given[STRENGTH_COUNT].data.d_int32) {
    give_error(GIMP_PDB_CALLING_ERROR, "num-concepts must be 0 to 16, and num-strengths the same");
    return FALSE;
  }
  if (given[STEPS].data.d_int32 < 1) {
    give_error(GIMP_PDB_CALLING_ERROR, "steps must be at least 1");
    return FALSE;
  }
  if (!take_text(settings->model, given[MODEL].data.d_string, "model") ||
      !take_text(settings->prompt, given[PROMPT].data.d_string, "prompt")) {
    return FALSE;
  }
  for (gint at = 0; at < concepts; at++) {
    if (!take_text(settings->concepts[at].file, given[CONCEPTS].data.d_stringarray[at], "a concept file")) {
      return FALSE;
    }
    settings->concepts[at].strength = given[STRENGTHS].data.d_floatarray[at];
  }
  settings->concept_count = concepts;
  settings->steps = given[STEPS].data.d_int32;
  settings->guidance = given[GUIDANCE].data.d_float;
  settings->seed = (guint32)given[SEED].data.d_int32;
  return TRUE;
}

static int32_t show_step(void *userdata, const macula_progress *progress) {
  (void)userdata;
  gimp_progress_update(progress->total ? (gdouble)progress->done / (gdouble)progress->total : 0);
  return 0;
}

/* Draws without asking anything, with GIMP's own progress bar. */
static macula_images *draw_at_once(const PainterSettings *settings) {
  Painter *painter = painter_new();
  GError *error = NULL;
  macula_images *images;
  gimp_progress_init("Drawing with Macula");
  images = painter_draw(painter, settings, show_step, NULL, &error);
  gimp_progress_end();
  if (error) {
    give_error(GIMP_PDB_EXECUTION_ERROR, error->message);
    g_error_free(error);
  }
  painter_free(painter);
  return images;
}

static macula_images *ask_and_draw(PainterSettings *settings, gint32 *image) {
  gboolean as_layer = *image != -1;
  gchar *name = as_layer ? gimp_image_get_name(*image) : NULL;
  macula_images *images;
  gimp_ui_init("macula", FALSE);
  images = dialog_run(settings, name, &as_layer);
  g_free(name);
  if (!as_layer) {
    *image = -1;
  }
  if (!images) {
    give(GIMP_PDB_CANCEL);
  }
  return images;
}

static void run(const gchar *name, gint count, const GimpParam *given, gint *return_count, GimpParam **values) {
  PainterSettings settings = {.prompt = "", .steps = 20, .guidance = 4, .seed = 1};
  GimpRunMode mode = (GimpRunMode)given[RUN_MODE].data.d_int32;
  gint32 image = count > IMAGE ? given[IMAGE].data.d_image : -1;
  macula_images *images = NULL;
  (void)name;
  gegl_init(NULL, NULL);
  *values = returned;
  if (image != -1 && gimp_image_base_type(image) != GIMP_RGB) {
    image = -1; /* a grey or indexed image can't hold it as it is */
  }
  if (mode != GIMP_RUN_NONINTERACTIVE) {
    gimp_get_data(PROCEDURE, &settings);
  }
  if (mode == GIMP_RUN_INTERACTIVE) {
    images = ask_and_draw(&settings, &image);
  } else if (mode == GIMP_RUN_WITH_LAST_VALS || take_parameters(given, count, &settings)) {
    images = draw_at_once(&settings);
  }
  if (images) {
    place(images, image, settings.prompt, mode);
    macula_images_free(images);
    gimp_set_data(PROCEDURE, &settings, sizeof settings);
  }
  *return_count = returned_count;
}

const GimpPlugInInfo PLUG_IN_INFO = {NULL, NULL, query, run};

MAIN()
