/* What the examples that learn from a folder of pictures share: reading it with its captions, and the names of values. */
#ifndef PICTURES_H
#define PICTURES_H

#include <macula.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { MOST_PICTURES = 64, LONGEST_CAPTION = 1024 };

static inline int is_picture(const char *name) {
  static const char *const endings[] = {".png", ".jpg", ".jpeg", ".webp"};
  size_t length = strlen(name);
  for (size_t i = 0; i < sizeof endings / sizeof *endings; ++i) {
    size_t ending = strlen(endings[i]);
    if (length > ending && !strcasecmp(name + length - ending, endings[i])) return 1;
  }
  return 0;
}

static inline int by_name(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The paths of the pictures in a folder, sorted; returns how many, -1 if the folder can't be read. */
static inline int list_pictures(const char *folder, char *paths[MOST_PICTURES]) {
  DIR *opened = opendir(folder);
  int count = 0;
  if (!opened) return -1;
  for (struct dirent *entry; (entry = readdir(opened)) && count < MOST_PICTURES;) {
    size_t size = strlen(folder) + strlen(entry->d_name) + 2;
    if (!is_picture(entry->d_name) || !(paths[count] = malloc(size))) continue;
    snprintf(paths[count++], size, "%s/%s", folder, entry->d_name);
  }
  closedir(opened);
  qsort(paths, (size_t)count, sizeof *paths, by_name);
  return count;
}

/* The line in the text file beside a picture; NULL if there is none. */
static inline char *read_caption(const char *picture) {
  size_t stem = (size_t)(strrchr(picture, '.') - picture);
  char *path = malloc(stem + sizeof ".txt"), *line = malloc(LONGEST_CAPTION);
  FILE *file = NULL;
  if (path && line) {
    snprintf(path, stem + sizeof ".txt", "%.*s.txt", (int)stem, picture);
    file = fopen(path, "r");
  }
  if (!file || !fgets(line, LONGEST_CAPTION, file)) {
    free(line);
    line = NULL;
  } else {
    line[strcspn(line, "\r\n")] = '\0';
  }
  if (file) fclose(file);
  free(path);
  return line;
}

static inline int read_values(const char *name, macula_values *values) {
  static const char *const names[] = {"none", "binary", "quaternary", "float16", "float32"};
  for (*values = MACULA_VALUES_BINARY; *values <= MACULA_VALUES_FLOAT32; ++*values) {
    if (!strcmp(name, names[*values])) return 1;
  }
  return 0;
}

#endif
