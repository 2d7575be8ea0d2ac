/* The dialog of the plug-in: settings in, a picture out. */
#ifndef DIALOG_H
#define DIALOG_H

#include "painter.h"

/*
 * Lets the user change the settings and draw, until a picture is drawn or the dialog is closed (NULL). Errors are shown as
 * GIMP's messages and leave the dialog open. `image` is the name of the open image, NULL if there is none; `as_layer` says
 * whether the picture is to become a layer of it.
 */
macula_images *dialog_run(PainterSettings *settings, const gchar *image, gboolean *as_layer);

#endif
