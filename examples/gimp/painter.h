/*
 * Drawing with Macula for a program of GLib's kind: settings in, pictures or a GError out. It knows nothing of GIMP.
 */
#ifndef PAINTER_H
#define PAINTER_H

#include <glib.h>
#include <macula.h>

enum { PAINTER_TEXT = 1024, PAINTER_CONCEPTS = 16 };

/* What to draw; plain memory, so that it can be copied and kept as it is. */
typedef struct {
  gchar model[PAINTER_TEXT];
  gchar prompt[PAINTER_TEXT];
  /* Concept files, each with its strength from 0 to 1. */
  struct {
    gchar file[PAINTER_TEXT];
    gdouble strength;
  } concepts[PAINTER_CONCEPTS];
  gint concept_count;
  gint steps;
  gdouble guidance;
  guint32 seed;
} PainterSettings;

/* Errors have the code of their macula_status. */
#define PAINTER_ERROR painter_error_quark()
GQuark painter_error_quark(void);

/* A model, kept open between draws. */
typedef struct Painter Painter;

Painter *painter_new(void);
void painter_free(Painter *painter);

/*
 * Draws; opens the model if it is another than before. `told` hears of each step on the calling thread, with a preview
 * where the model allows one. NULL on failure; a draw that was cancelled is MACULA_STATUS_CANCELLED.
 */
macula_images *painter_draw(Painter *painter, const PainterSettings *settings, macula_progress_fn told,
                            gpointer userdata, GError **error);

/* Stops a draw that runs on another thread, also in the middle of a step; one that has yet to begin is not stopped. */
void painter_cancel(Painter *painter);

#endif
