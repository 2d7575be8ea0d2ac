/* The dialog: a form, a preview, and a thread that draws; see dialog.h. Only the window's thread calls GIMP. */
#include "dialog.h"

#include <libgimp/gimp.h>
#include <libgimp/gimpui.h>

#include <string.h>

enum { PREVIEW = 192 };

/* One concept of the list. */
typedef struct {
  GtkWidget *box;
  GtkAdjustment *strength;
  gchar *file;
} Row;

typedef struct {
  PainterSettings *settings;
  PainterSettings drawn; /* as they were when Draw was pressed: the drawing thread's, while it runs */
  Painter *painter;
  GtkWidget *window, *model, *prompt, *rows_box, *hint, *preview, *bar, *draw;
  GtkObject *steps, *guidance;
  GList *rows;
  gboolean random_seed, draws, closes;
  GThread *thread;
  gint cancelled; /* read and set atomically */
  /* What the drawing thread gives to the window's. */
  GMutex lock;
  gboolean news; /* whether the window was told already that there is some */
  gdouble share;
  GdkPixbuf *picture;
  macula_images *images;
  GError *error;
} Dialog;

/* ----------------------------------------------------------------------------------------------------------------
 * The list of concepts
 * ---------------------------------------------------------------------------------------------------------------- */

static void remove_row(GtkWidget *button, gpointer data) {
  Dialog *dialog = data;
  Row *row = g_object_get_data(G_OBJECT(button), "row");
  dialog->rows = g_list_remove(dialog->rows, row);
  gtk_widget_destroy(row->box);
  g_free(row->file);
  g_free(row);
  gtk_widget_set_visible(dialog->hint, !dialog->rows);
}

static void add_row(Dialog *dialog, const gchar *file, gdouble strength) {
  Row *row = g_new0(Row, 1);
  gchar *name = g_path_get_basename(file), *ending = strrchr(name, '.');
  GtkWidget *label, *scale, *button;
  if (ending) {
    *ending = 0;
  }
  row->file = g_strdup(file);
  row->box = gtk_hbox_new(FALSE, 6);
  label = gtk_label_new(name);
  gtk_misc_set_alignment(GTK_MISC(label), 0, 0.5);
  gtk_widget_set_size_request(label, 130, -1);
  gtk_widget_set_tooltip_text(label, file);
  row->strength = GTK_ADJUSTMENT(gtk_adjustment_new(strength, 0, 1, 0.05, 0.1, 0));
  scale = gtk_hscale_new(row->strength);
  gtk_scale_set_digits(GTK_SCALE(scale), 2);
  gtk_scale_set_value_pos(GTK_SCALE(scale), GTK_POS_RIGHT);
  button = gtk_button_new();
  gtk_button_set_relief(GTK_BUTTON(button), GTK_RELIEF_NONE);
  gtk_container_add(GTK_CONTAINER(button), gtk_image_new_from_stock(GTK_STOCK_REMOVE, GTK_ICON_SIZE_MENU));
  gtk_widget_set_tooltip_text(button, "Draw without this concept");
  g_object_set_data(G_OBJECT(button), "row", row);
  g_signal_connect(button, "clicked", G_CALLBACK(remove_row), dialog);
  gtk_box_pack_start(GTK_BOX(row->box), label, FALSE, FALSE, 0);
  gtk_box_pack_start(GTK_BOX(row->box), scale, TRUE, TRUE, 0);
  gtk_box_pack_start(GTK_BOX(row->box), button, FALSE, FALSE, 0);
  gtk_box_pack_start(GTK_BOX(dialog->rows_box), row->box, FALSE, FALSE, 0);
  gtk_widget_show_all(row->box);
  dialog->rows = g_list_append(dialog->rows, row);
  gtk_widget_hide(dialog->hint);
  g_free(name);
}

static void choose_concepts(GtkWidget *button, gpointer data) {
  Dialog *dialog = data;
  GtkFileFilter *filter = gtk_file_filter_new();
  GtkWidget *chooser = gtk_file_chooser_dialog_new("Add Concepts", GTK_WINDOW(dialog->window), GTK_FILE_CHOOSER_ACTION_OPEN,
                                                   GTK_STOCK_CANCEL, GTK_RESPONSE_CANCEL, GTK_STOCK_ADD, GTK_RESPONSE_OK,
                                                   NULL);
  (void)button;
  gtk_file_chooser_set_select_multiple(GTK_FILE_CHOOSER(chooser), TRUE);
  gtk_file_filter_set_name(filter, "Concepts (*.safetensors)");
  gtk_file_filter_add_pattern(filter, "*.safetensors");
  gtk_file_chooser_add_filter(GTK_FILE_CHOOSER(chooser), filter);
  gtk_dialog_set_default_response(GTK_DIALOG(chooser), GTK_RESPONSE_OK);
  if (gtk_dialog_run(GTK_DIALOG(chooser)) == GTK_RESPONSE_OK) {
    GSList *files = gtk_file_chooser_get_filenames(GTK_FILE_CHOOSER(chooser));
    for (GSList *file = files; file; file = file->next) {
      if (g_list_length(dialog->rows) < PAINTER_CONCEPTS) {
        add_row(dialog, file->data, 1);
      } else {
        g_message("At most %d concepts can be used at once.", PAINTER_CONCEPTS);
        break;
      }
    }
    g_slist_free_full(files, g_free);
  }
  gtk_widget_destroy(chooser);
}

/* ----------------------------------------------------------------------------------------------------------------
 * Drawing, on a thread of its own so that the window goes on
 * ---------------------------------------------------------------------------------------------------------------- */

static GdkPixbuf *scaled_copy(const macula_image *image) {
  gint width = (gint)image->width, height = (gint)image->height, most = MAX(width, height);
  GdkPixbuf *view = gdk_pixbuf_new_from_data(image->rgb, GDK_COLORSPACE_RGB, FALSE, 8, width, height, width * 3, NULL, NULL);
  GdkPixbuf *copy = gdk_pixbuf_scale_simple(view, MAX(width * PREVIEW / most, 1), MAX(height * PREVIEW / most, 1),
                                            most < PREVIEW ? GDK_INTERP_NEAREST : GDK_INTERP_BILINEAR);
  g_object_unref(view);
  return copy;
}

static gboolean show_news(gpointer data) {
  Dialog *dialog = data;
  GdkPixbuf *picture;
  gdouble share;
  g_mutex_lock(&dialog->lock);
  dialog->news = FALSE;
  share = dialog->share;
  picture = g_steal_pointer(&dialog->picture);
  g_mutex_unlock(&dialog->lock);
  gimp_progress_update(share);
  if (picture) {
    gtk_image_set_from_pixbuf(GTK_IMAGE(dialog->preview), picture);
    g_object_unref(picture);
  }
  return G_SOURCE_REMOVE;
}

static int32_t hear_step(void *data, const macula_progress *progress) {
  Dialog *dialog = data;
  GdkPixbuf *picture = progress->preview ? scaled_copy(progress->preview) : NULL;
  g_mutex_lock(&dialog->lock);
  dialog->share = progress->total ? (gdouble)progress->done / (gdouble)progress->total : 0;
  if (picture) {
    g_clear_object(&dialog->picture);
    dialog->picture = picture;
  }
  if (!dialog->news) {
    dialog->news = TRUE;
    g_idle_add(show_news, dialog);
  }
  g_mutex_unlock(&dialog->lock);
  return g_atomic_int_get(&dialog->cancelled);
}

static gboolean end_drawing(gpointer data) {
  Dialog *dialog = data;
  g_thread_join(g_steal_pointer(&dialog->thread));
  gimp_progress_end();
  gtk_widget_set_sensitive(dialog->draw, TRUE);
  dialog->draws = FALSE;
  if (dialog->images || dialog->closes) {
    gtk_main_quit();
  } else if (!g_error_matches(dialog->error, PAINTER_ERROR, MACULA_STATUS_CANCELLED)) {
    gimp_message(dialog->error->message);
  }
  g_clear_error(&dialog->error);
  return G_SOURCE_REMOVE;
}

static gpointer draw_on_thread(gpointer data) {
  Dialog *dialog = data;
  dialog->images = painter_draw(dialog->painter, &dialog->drawn, hear_step, dialog, &dialog->error);
  g_idle_add(end_drawing, dialog); /* after the last news, which were added before */
  return NULL;
}

static void take_settings(Dialog *dialog) {
  PainterSettings *settings = dialog->settings;
  gchar *model = gtk_file_chooser_get_filename(GTK_FILE_CHOOSER(dialog->model));
  g_strlcpy(settings->model, model ? model : "", sizeof settings->model);
  g_free(model);
  g_strlcpy(settings->prompt, gtk_entry_get_text(GTK_ENTRY(dialog->prompt)), sizeof settings->prompt);
  settings->concept_count = 0;
  for (GList *at = dialog->rows; at; at = at->next) {
    const Row *row = at->data;
    gint place = settings->concept_count++;
    g_strlcpy(settings->concepts[place].file, row->file, sizeof settings->concepts[place].file);
    settings->concepts[place].strength = gtk_adjustment_get_value(row->strength);
  }
  settings->steps = (gint)gtk_adjustment_get_value(GTK_ADJUSTMENT(dialog->steps));
  settings->guidance = gtk_adjustment_get_value(GTK_ADJUSTMENT(dialog->guidance));
}

static void answer(GtkDialog *window, gint response, gpointer data) {
  Dialog *dialog = data;
  (void)window;
  if (response == GTK_RESPONSE_OK && !dialog->draws) {
    take_settings(dialog);
    dialog->drawn = *dialog->settings;
    g_atomic_int_set(&dialog->cancelled, 0);
    dialog->draws = TRUE;
    gtk_widget_set_sensitive(dialog->draw, FALSE);
    gimp_progress_init("Drawing");
    dialog->thread = g_thread_new("draw", draw_on_thread, dialog);
  } else if (response != GTK_RESPONSE_OK && dialog->draws) {
    // Cancel stops the drawing; closing the window also closes it, once the drawing has stopped.
    dialog->closes = response == GTK_RESPONSE_DELETE_EVENT;
    g_atomic_int_set(&dialog->cancelled, 1);
    painter_cancel(dialog->painter);
  } else if (response != GTK_RESPONSE_OK) {
    gtk_main_quit();
  }
}

/* ----------------------------------------------------------------------------------------------------------------
 * The window
 * ---------------------------------------------------------------------------------------------------------------- */

/* A line of the table with an underlined letter that leads to its widget. */
static void attach(GtkTable *table, guint line, const gchar *label, GtkWidget *widget) {
  GtkWidget *name = gtk_label_new_with_mnemonic(label);
  gtk_misc_set_alignment(GTK_MISC(name), 0, 0.5);
  gtk_label_set_mnemonic_widget(GTK_LABEL(name), widget);
  gtk_table_attach(table, name, 0, 1, line, line + 1, GTK_FILL, GTK_FILL, 0, 0);
  gtk_table_attach(table, widget, 1, 3, line, line + 1, GTK_EXPAND | GTK_FILL, GTK_FILL, 0, 0);
}

static GtkWidget *concept_list(Dialog *dialog) {
  GtkWidget *frame = gimp_frame_new("Concepts"), *box = gtk_vbox_new(FALSE, 6);
  GtkWidget *button = gtk_button_new_with_mnemonic("_Add Concepts…"), *line = gtk_hbox_new(FALSE, 0);
  dialog->rows_box = gtk_vbox_new(FALSE, 2);
  dialog->hint = gtk_label_new("None: the model draws as it was trained.");
  gtk_misc_set_alignment(GTK_MISC(dialog->hint), 0, 0.5);
  gtk_widget_set_sensitive(dialog->hint, FALSE);
  g_signal_connect(button, "clicked", G_CALLBACK(choose_concepts), dialog);
  gtk_box_pack_start(GTK_BOX(line), button, FALSE, FALSE, 0);
  gtk_box_pack_start(GTK_BOX(box), dialog->hint, FALSE, FALSE, 0);
  gtk_box_pack_start(GTK_BOX(box), dialog->rows_box, FALSE, FALSE, 0);
  gtk_box_pack_start(GTK_BOX(box), line, FALSE, FALSE, 0);
  gtk_container_add(GTK_CONTAINER(frame), box);
  gtk_widget_show_all(frame);
  for (gint at = 0; at < dialog->settings->concept_count; at++) {
    add_row(dialog, dialog->settings->concepts[at].file, dialog->settings->concepts[at].strength);
  }
  return frame;
}

static GtkWidget *form(Dialog *dialog, const gchar *image, gint *where) {
  PainterSettings *settings = dialog->settings;
  GtkWidget *box = gtk_vbox_new(FALSE, 12), *table = gtk_table_new(5, 3, FALSE);
  gtk_table_set_col_spacings(GTK_TABLE(table), 6);
  gtk_table_set_row_spacings(GTK_TABLE(table), 6);
  dialog->model = gtk_file_chooser_button_new("Model Folder", GTK_FILE_CHOOSER_ACTION_SELECT_FOLDER);
  gtk_widget_set_tooltip_text(dialog->model, "A text-to-image model in the diffusers ONNX layout");
  if (*settings->model) {
    gtk_file_chooser_set_filename(GTK_FILE_CHOOSER(dialog->model), settings->model);
  }
  dialog->prompt = gtk_entry_new();
  gtk_entry_set_max_length(GTK_ENTRY(dialog->prompt), PAINTER_TEXT / 4 - 1); /* 4 bytes a letter at most */
  gtk_entry_set_text(GTK_ENTRY(dialog->prompt), settings->prompt);
  gtk_entry_set_activates_default(GTK_ENTRY(dialog->prompt), TRUE);
  gtk_entry_set_width_chars(GTK_ENTRY(dialog->prompt), 44);
  attach(GTK_TABLE(table), 0, "_Model folder:", dialog->model);
  attach(GTK_TABLE(table), 1, "_Prompt:", dialog->prompt);
  dialog->steps = gimp_scale_entry_new(GTK_TABLE(table), 0, 2, "_Steps:", 120, 5, settings->steps, 1, 100, 1, 5, 0, TRUE,
                                       0, 0, "More steps take longer and draw more cleanly", NULL);
  dialog->guidance = gimp_scale_entry_new(GTK_TABLE(table), 0, 3, "_Guidance:", 120, 5, settings->guidance, 1, 20, 0.5, 1,
                                          1, TRUE, 0, 0, "How closely the picture follows the prompt", NULL);
  gtk_entry_set_activates_default(GTK_ENTRY(GIMP_SCALE_ENTRY_SPINBUTTON(dialog->steps)), TRUE);
  gtk_entry_set_activates_default(GTK_ENTRY(GIMP_SCALE_ENTRY_SPINBUTTON(dialog->guidance)), TRUE);
  attach(GTK_TABLE(table), 4, "S_eed:", gimp_random_seed_new(&settings->seed, &dialog->random_seed));
  gtk_box_pack_start(GTK_BOX(box), table, FALSE, FALSE, 0);
  gtk_box_pack_start(GTK_BOX(box), concept_list(dialog), FALSE, FALSE, 0);
  if (image) {
    gchar *layer = g_strdup_printf("New _layer of %s", image);
    gtk_box_pack_start(GTK_BOX(box),
                       gimp_int_radio_group_new(TRUE, "Result", G_CALLBACK(gimp_radio_button_update), where, *where, layer,
                                                TRUE, NULL, "New _image", FALSE, NULL, NULL),
                       FALSE, FALSE, 0);
    g_free(layer);
  }
  gtk_widget_show_all(box);
  gtk_widget_set_visible(dialog->hint, !dialog->rows);
  return box;
}

macula_images *dialog_run(PainterSettings *settings, const gchar *image, gboolean *as_layer) {
  Dialog dialog = {.settings = settings, .painter = painter_new()};
  GtkWidget *content, *frame = gtk_frame_new(NULL), *box = gtk_hbox_new(FALSE, 12), *side = gtk_vbox_new(FALSE, 6);
  g_mutex_init(&dialog.lock);
  dialog.window = gimp_dialog_new("Draw with Macula", "macula", NULL, 0, NULL, "macula-draw", GTK_STOCK_CANCEL,
                                  GTK_RESPONSE_CANCEL, NULL);
  dialog.draw = gtk_dialog_add_button(GTK_DIALOG(dialog.window), "_Draw", GTK_RESPONSE_OK);
  gtk_dialog_set_default_response(GTK_DIALOG(dialog.window), GTK_RESPONSE_OK);
  gtk_window_set_resizable(GTK_WINDOW(dialog.window), FALSE);
  gimp_window_set_transient(GTK_WINDOW(dialog.window));
  dialog.preview = gtk_image_new();
  gtk_widget_set_size_request(dialog.preview, PREVIEW, PREVIEW);
  gtk_frame_set_shadow_type(GTK_FRAME(frame), GTK_SHADOW_IN);
  gtk_container_add(GTK_CONTAINER(frame), dialog.preview);
  dialog.bar = gimp_progress_bar_new();
  gtk_box_pack_start(GTK_BOX(side), frame, FALSE, FALSE, 0);
  gtk_box_pack_start(GTK_BOX(side), dialog.bar, FALSE, FALSE, 0);
  gtk_box_pack_start(GTK_BOX(box), form(&dialog, image, as_layer), TRUE, TRUE, 0);
  gtk_box_pack_start(GTK_BOX(box), side, FALSE, FALSE, 0);
  gtk_container_set_border_width(GTK_CONTAINER(box), 12);
  content = gtk_dialog_get_content_area(GTK_DIALOG(dialog.window));
  gtk_box_pack_start(GTK_BOX(content), box, TRUE, TRUE, 0);
  gtk_widget_show(box);
  gtk_widget_show_all(side);
  gtk_widget_grab_focus(dialog.prompt);
  g_signal_connect(dialog.window, "response", G_CALLBACK(answer), &dialog);
  // Closing by the window's own button is a response too; the window itself goes away below.
  g_signal_connect(dialog.window, "delete-event", G_CALLBACK(gtk_true), NULL);
  gtk_widget_show(dialog.window);
  gtk_main();

  while (dialog.rows) {
    Row *row = dialog.rows->data;
    dialog.rows = g_list_delete_link(dialog.rows, dialog.rows);
    g_free(row->file);
    g_free(row);
  }
  if (dialog.images) {
    *settings = dialog.drawn;
  }
  gtk_widget_destroy(dialog.window);
  g_clear_object(&dialog.picture);
  g_mutex_clear(&dialog.lock);
  painter_free(dialog.painter);
  return dialog.images;
}
