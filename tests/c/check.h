/* What the C tests share: checks that say where they failed, and a small concept made from lists. */
#ifndef CHECK_H
#define CHECK_H

#include <macula.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                                               \
  do {                                                                                                                 \
    if (!(condition)) {                                                                                                \
      fprintf(stderr, "%s:%d: not so: %s\n  last error: %s\n", __FILE__, __LINE__, #condition, macula_last_error());   \
      exit(1);                                                                                                         \
    }                                                                                                                  \
  } while (0)

/* Checks a call's status, and that a failure left a text that contains `words`. */
#define EXPECT(status, words, call)                                                                                    \
  do {                                                                                                                 \
    macula_status expect_status = (call);                                                                              \
    if (expect_status != (status) || (expect_status && !strstr(macula_last_error(), (words)))) {                       \
      fprintf(stderr, "%s:%d: %s\n  gave %s: %s\n  expected " #status " with \"%s\"\n", __FILE__, __LINE__, #call,     \
              macula_status_name(expect_status), macula_last_error(), (words));                                        \
      exit(1);                                                                                                         \
    }                                                                                                                  \
  } while (0)

#define OK(call) EXPECT(MACULA_STATUS_OK, "", call)

#define BASE_A "00000000000000000000000000000000000000000000000000000000000000aa"
#define BASE_B "00000000000000000000000000000000000000000000000000000000000000bb"

/* A concept of one projection of 4 x 8 weights. */
static inline macula_concept *concept_of(const char *base, const uint32_t *indices, size_t count) {
  macula_layer layer = {"mid_block.attn2.to_k", 4, 8, indices, count, NULL};
  macula_concept_options options = MACULA_CONCEPT_OPTIONS_INIT;
  macula_concept *made = NULL;
  options.fingerprint = base;
  options.title = "a test";
  options.trigger = "<s1>";
  OK(macula_concept_create(&layer, 1, &options, &made));
  return made;
}

/* Whether two draws of one size gave the same first picture. */
static inline int same(const macula_images *a, const macula_images *b) {
  macula_image x, y;
  OK(macula_images_get(a, 0, &x));
  OK(macula_images_get(b, 0, &y));
  return x.width == y.width && !memcmp(x.rgb, y.rgb, (size_t)x.width * x.height * 3);
}

#endif
