/* All that the plug-in asks of Macula; see painter.h. */
#include "painter.h"

#include <string.h>

struct Painter {
  macula_runtime *runtime;
  macula_pipeline *pipeline;
  macula_cancel_token *cancel;
  gchar *model; /* the folder that is open */
};

G_DEFINE_QUARK(painter-error-quark, painter_error)

/* Turns a status of the last call on this thread into an error. */
static gboolean worked(macula_status status, GError **error) {
  if (status) {
    g_set_error_literal(error, PAINTER_ERROR, status, macula_last_error());
  }
  return !status;
}

Painter *painter_new(void) {
  Painter *painter = g_new0(Painter, 1);
  if (macula_cancel_token_create(&painter->cancel)) {
    g_error("%s", macula_last_error()); /* as GLib does where memory is short */
  }
  return painter;
}

void painter_free(Painter *painter) {
  if (painter) {
    macula_pipeline_free(painter->pipeline);
    macula_cancel_token_free(painter->cancel);
    macula_runtime_free(painter->runtime);
    g_free(painter->model);
    g_free(painter);
  }
}

static gboolean open_model(Painter *painter, const gchar *model, GError **error) {
  if (!painter->runtime && !worked(macula_runtime_create(NULL, &painter->runtime), error)) {
    return FALSE;
  }
  if (!g_strcmp0(painter->model, model)) {
    return TRUE;
  }
  macula_pipeline_free(painter->pipeline);
  painter->pipeline = NULL;
  g_clear_pointer(&painter->model, g_free);
  if (!worked(macula_pipeline_open(painter->runtime, model, NULL, &painter->pipeline), error)) {
    return FALSE;
  }
  painter->model = g_strdup(model);
  return TRUE;
}

/* Composes the concepts that draw and ablates those that forget, in place of those of the draw before. */
static gboolean set_concepts(Painter *painter, const PainterSettings *settings, GError **error) {
  macula_concept *concepts[PAINTER_CONCEPTS] = {NULL};
  macula_term drawn[PAINTER_CONCEPTS], erased[PAINTER_CONCEPTS];
  size_t drawn_count = 0, erased_count = 0;
  gboolean fine = TRUE;
  for (gint at = 0; at < settings->concept_count && fine; at++) {
    macula_concept_info info = MACULA_CONCEPT_INFO_INIT;
    macula_term term = MACULA_TERM_INIT;
    fine = worked(macula_concept_load(settings->concepts[at].file, &concepts[at]), error) &&
           worked(macula_concept_get_info(concepts[at], &info), error);
    term.subject = concepts[at];
    term.strength = (float)settings->concepts[at].strength;
    if (fine && info.role == MACULA_ROLE_ERASE) {
      erased[erased_count++] = term;
    } else if (fine) {
      drawn[drawn_count++] = term;
    }
  }
  fine = fine && worked(macula_compose(painter->pipeline, drawn, drawn_count), error) &&
         worked(macula_ablate(painter->pipeline, erased, erased_count), error);
  for (gint at = 0; at < settings->concept_count; at++) {
    macula_concept_free(concepts[at]);
  }
  return fine;
}

macula_images *painter_draw(Painter *painter, const PainterSettings *settings, macula_progress_fn told,
                            gpointer userdata, GError **error) {
  macula_draw_options options = MACULA_DRAW_OPTIONS_INIT;
  macula_images *images = NULL;
  (void)macula_cancel_token_reset(painter->cancel);
  if (!open_model(painter, settings->model, error) || !set_concepts(painter, settings, error)) {
    return NULL;
  }
  options.prompt = settings->prompt;
  options.steps = (uint32_t)settings->steps;
  options.guidance = settings->guidance;
  options.seed = settings->seed;
  options.preview = 1;
  options.progress = told;
  options.progress_userdata = userdata;
  options.cancel = painter->cancel;
  return worked(macula_pipeline_draw(painter->pipeline, &options, &images), error) ? images : NULL;
}

void painter_cancel(Painter *painter) {
  (void)macula_cancel_token_cancel(painter->cancel);
}
