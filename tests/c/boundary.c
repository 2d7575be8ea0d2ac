/* The boundary without any model: versions, statuses, last errors, handles, struct sizes, tokens and concepts.
   Argument: a folder to write in. */
#include "check.h"

#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

static char path[4096];

static const char *in(const char *folder, const char *name) {
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

static void *other_thread(void *unused) {
  (void)unused;
  CHECK(strcmp(macula_last_error(), "") == 0);
  return NULL;
}

static void versions_and_statuses(void) {
  char text[32];
  CHECK(macula_version_number() == MACULA_VERSION_MAJOR * 1000000 + MACULA_VERSION_MINOR * 1000 + MACULA_VERSION_PATCH);
  snprintf(text, sizeof text, "%d.%d.%d", MACULA_VERSION_MAJOR, MACULA_VERSION_MINOR, MACULA_VERSION_PATCH);
  CHECK(strcmp(macula_version_string(), text) == 0);
  CHECK(strcmp(macula_status_name(MACULA_STATUS_WRONG_BASE), "MACULA_STATUS_WRONG_BASE") == 0);
  CHECK(strcmp(macula_status_name(-1), "MACULA_STATUS_UNKNOWN") == 0);
  CHECK(strcmp(macula_status_name(2147483647), "MACULA_STATUS_UNKNOWN") == 0);
  for (int32_t status = 0; status <= MACULA_STATUS_PANIC; status++) {
    CHECK(strncmp(macula_status_name(status), "MACULA_STATUS_", 14) == 0);
    CHECK(strcmp(macula_status_name(status), "MACULA_STATUS_UNKNOWN") != 0);
    CHECK(strlen(macula_status_message(status)) > 5);
  }
}

static void last_errors(void) {
  pthread_t thread;
  macula_concept *made = (macula_concept *)(uintptr_t)0x1234;
  CHECK(strcmp(macula_last_error(), "") == 0);
  EXPECT(MACULA_STATUS_NOT_FOUND, "/nowhere/x.safetensors", macula_concept_load("/nowhere/x.safetensors", &made));
  CHECK((uintptr_t)made == 0x1234); /* written only on success */
  OK(macula_concept_free(NULL));
  CHECK(strstr(macula_last_error(), "macula_concept_load") != NULL); /* a success leaves it */
  CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0 && pthread_join(thread, NULL) == 0);
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "not UTF-8", macula_concept_load("\xff", &made));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "empty path", macula_concept_load("", &made));
}

static void handles(void) {
  macula_cancel_token *token = NULL;
  macula_concept *made = concept_of(BASE_A, NULL, 0);
  int32_t cancelled = 7;
  OK(macula_cancel_token_create(&token));
  OK(macula_cancel_token_is_cancelled(token, &cancelled));
  CHECK(cancelled == 0);
  OK(macula_cancel_token_cancel(token));
  OK(macula_cancel_token_is_cancelled(token, &cancelled));
  CHECK(cancelled == 1);
  OK(macula_cancel_token_reset(token));
  OK(macula_cancel_token_is_cancelled(token, &cancelled));
  CHECK(cancelled == 0);
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "something else", macula_cancel_token_cancel((macula_cancel_token *)made));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "something else", macula_concept_free((macula_concept *)token));
  OK(macula_cancel_token_free(token));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "freed", macula_cancel_token_free(token));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "freed", macula_cancel_token_cancel(token));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "no live", macula_cancel_token_cancel((macula_cancel_token *)&cancelled));
  OK(macula_concept_free(made));
}

static void struct_sizes(void) {
  struct {
    macula_concept_options known;
    char unknown[16];
  } options = {MACULA_CONCEPT_OPTIONS_INIT, {0}};
  struct {
    macula_concept_info known;
    uint64_t unknown;
  } info = {MACULA_CONCEPT_INFO_INIT, 7};
  macula_layer layer = {"mid_block.attn2.to_k", 4, 8, NULL, 0, NULL};
  macula_concept *made = NULL;
  options.known.fingerprint = BASE_A;
  options.known.struct_size = sizeof options;
  OK(macula_concept_create(&layer, 1, &options.known, &made));
  info.known.struct_size = sizeof info;
  OK(macula_concept_get_info(made, &info.known));
  CHECK(info.known.struct_size == sizeof info && info.unknown == 0 && info.known.weights == 32);
  OK(macula_concept_free(made));
  options.unknown[3] = 1;
  EXPECT(MACULA_STATUS_UNSUPPORTED, "field at byte", macula_concept_create(&layer, 1, &options.known, &made));
  for (size_t size = 0; size < 3; size++) {
    const size_t sizes[] = {0, sizeof options.known - 1, SIZE_MAX};
    options.known.struct_size = sizes[size];
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "struct_size", macula_concept_create(&layer, 1, &options.known, &made));
  }
}

/* Values are kept as they are said to be, and are not lost where sets are joined. */
static void tuned_values(const macula_concept *shut, const char *folder) {
  const uint32_t indices[] = {1, 2, 30};
  const float wanted[] = {0.5f, -2.0f, 0.1f};
  float values[3] = {9, 9, 9};
  macula_layer layer = {"mid_block.attn2.to_k", 4, 8, indices, 3, wanted};
  macula_concept_options options = MACULA_CONCEPT_OPTIONS_INIT;
  macula_concept_info info = MACULA_CONCEPT_INFO_INIT;
  macula_concept *made = NULL, *read = NULL, *joined = NULL;
  options.fingerprint = BASE_A;
  OK(macula_concept_get_values(shut, 0, values, 3));
  CHECK(values[0] == 0 && values[1] == 0 && values[2] == 0);
  for (options.values = MACULA_VALUES_BINARY; options.values <= MACULA_VALUES_FLOAT32; options.values++) {
    OK(macula_concept_create(&layer, 1, &options, &made));
    OK(macula_concept_save(made, in(folder, "tuned.safetensors")));
    OK(macula_concept_load(in(folder, "tuned.safetensors"), &read));
    OK(macula_concept_get_info(read, &info));
    CHECK(info.values == options.values && info.neurons == 3);
    OK(macula_concept_get_values(read, 0, values, 3));
    CHECK(values[1] == -2.0f && (options.values == MACULA_VALUES_BINARY || values[0] == 0.5f));
    CHECK((options.values == MACULA_VALUES_BINARY) == (values[0] == values[2]));
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "count is 2", macula_concept_get_values(read, 0, values, 2));
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "tuned values", macula_concept_union(shut, read, &joined));
    OK(macula_concept_free(made));
    OK(macula_concept_free(read));
  }
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "options.values is 5", macula_concept_create(&layer, 1, &options, &made));
  options.values = MACULA_VALUES_FLOAT16;
  layer.values = NULL;
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "to_k", macula_concept_create(&layer, 1, &options, &made));
  {
    const float wrong[] = {0.0f, 1e30f, 0.0f};
    layer.values = wrong;
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "to_k", macula_concept_create(&layer, 1, &options, &made));
  }
}

static void concepts(const char *folder) {
  const uint32_t first[] = {0, 3, 31}, second[] = {3, 7}, bad_order[] = {3, 3}, bad_range[] = {32};
  uint32_t indices[3] = {9, 9, 9};
  macula_concept *a = concept_of(BASE_A, first, 3), *b = concept_of(BASE_A, second, 2), *made = NULL, *again = NULL;
  macula_concept *other = concept_of(BASE_B, second, 2);
  macula_concept_info info = MACULA_CONCEPT_INFO_INIT;
  macula_layer_info layer_info = MACULA_LAYER_INFO_INIT;
  macula_concept_options options = MACULA_CONCEPT_OPTIONS_INIT;
  macula_overlap total, layers[1];
  const char *key = NULL, *value = NULL;
  FILE *file;
  char *bytes;
  long length;

  OK(macula_concept_get_info(a, &info));
  CHECK(strcmp(info.fingerprint, BASE_A) == 0 && strcmp(info.trigger, "<s1>") == 0 && strcmp(info.class_noun, "") == 0);
  CHECK(info.neurons == 3 && info.weights == 32 && info.layer_count == 1 && info.density == 3.0 / 32.0);
  CHECK(info.role == MACULA_ROLE_IMPLANT && info.scope == MACULA_SCOPE_GLOBAL && info.entry_count > 5);
  OK(macula_concept_get_layer(a, 0, &layer_info));
  CHECK(strcmp(layer_info.path, "mid_block.attn2.to_k") == 0 && layer_info.neurons == 3);
  CHECK(layer_info.out_features == 4 && layer_info.in_features == 8);
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "1 layers", macula_concept_get_layer(a, 1, &layer_info));
  OK(macula_concept_get_indices(a, 0, indices, 3));
  CHECK(memcmp(indices, first, sizeof first) == 0);
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "count is 2", macula_concept_get_indices(a, 0, indices, 2));
  OK(macula_concept_get_metadata(a, "modelspec.title", &value));
  CHECK(strcmp(value, "a test") == 0);
  EXPECT(MACULA_STATUS_NOT_FOUND, "no.such.key", macula_concept_get_metadata(a, "no.such.key", &value));
  for (size_t entry = 0; entry < info.entry_count; entry++) {
    const char *same = NULL;
    OK(macula_concept_get_entry(a, entry, &key, &value));
    OK(macula_concept_get_metadata(a, key, &same));
    CHECK(strcmp(same, value) == 0);
  }
  {
    macula_tensor row;
    CHECK(info.token_row_count == 0);
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "0 learnt rows", macula_concept_get_token_row(a, 0, &row));
  }
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "entry is", macula_concept_get_entry(a, info.entry_count, &key, &value));

  OK(macula_concept_overlap(a, b, &total, layers, 1));
  CHECK(total.intersection_count == 1 && total.union_count == 4 && total.jaccard == 0.25 && layers[0].jaccard == 0.25);
  OK(macula_concept_overlap(a, b, &total, NULL, 0));
  EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "layer_count is 2", macula_concept_overlap(a, b, &total, layers, 2));
  EXPECT(MACULA_STATUS_WRONG_BASE, BASE_B, macula_concept_overlap(a, other, &total, NULL, 0));
  OK(macula_concept_union(a, b, &made));
  OK(macula_concept_get_info(made, &info));
  CHECK(info.neurons == 4);
  OK(macula_concept_free(made));
  OK(macula_concept_intersection(a, b, &made));
  OK(macula_concept_get_indices(made, 0, indices, 1));
  CHECK(indices[0] == 3);
  OK(macula_concept_free(made));
  OK(macula_concept_difference(a, b, &made));
  OK(macula_concept_get_indices(made, 0, indices, 2));
  CHECK(indices[0] == 0 && indices[1] == 31);
  EXPECT(MACULA_STATUS_WRONG_BASE, BASE_A, macula_concept_union(a, other, &again));
  OK(macula_concept_free(made));

  OK(macula_concept_save(a, in(folder, "a.safetensors")));
  OK(macula_concept_load(in(folder, "a.safetensors"), &made));
  OK(macula_concept_overlap(a, made, &total, NULL, 0));
  CHECK(total.jaccard == 1.0);
  OK(macula_concept_free(made));
  file = fopen(in(folder, "a.safetensors"), "rb");
  CHECK(file && fseek(file, 0, SEEK_END) == 0 && (length = ftell(file)) > 0 && fseek(file, 0, SEEK_SET) == 0);
  bytes = malloc((size_t)length);
  CHECK(bytes && fread(bytes, 1, (size_t)length, file) == (size_t)length && fclose(file) == 0);
  OK(macula_concept_load_bytes(bytes, (size_t)length, &made));
  OK(macula_concept_free(made));
  for (long cut = 0; cut < length; cut++) { /* every truncation */
    CHECK(macula_concept_load_bytes(bytes, (size_t)cut, &made) == MACULA_STATUS_INVALID_FILE);
  }
  bytes[length - 1] = (char)(bytes[length - 1] ^ 1);
  EXPECT(MACULA_STATUS_INVALID_FILE, "damaged", macula_concept_load_bytes(bytes, (size_t)length, &made));
  free(bytes);
  EXPECT(MACULA_STATUS_IO, "/proc/version/a", macula_concept_save(a, "/proc/version/a"));
  file = fopen(in(folder, "large.safetensors"), "wb");
  CHECK(file && ftruncate(fileno(file), ((off_t)1 << 30) + 1) == 0 && fclose(file) == 0);
  EXPECT(MACULA_STATUS_LIMIT_EXCEEDED, "at most", macula_concept_load(in(folder, "large.safetensors"), &made));

  {
    macula_layer layer = {"mid_block.attn2.to_k", 4, 8, bad_order, 2, NULL};
    macula_layer twice[2] = {{"a", 4, 8, NULL, 0, NULL}, {"a", 4, 8, NULL, 0, NULL}};
    options.fingerprint = BASE_A;
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "to_k", macula_concept_create(&layer, 1, &options, &made));
    layer.indices = bad_range;
    layer.count = 1;
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "to_k", macula_concept_create(&layer, 1, &options, &made));
    layer.out_features = SIZE_MAX;
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "too many", macula_concept_create(&layer, 1, &options, &made));
    layer.indices = NULL;
    layer.count = SIZE_MAX;
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "NULL", macula_concept_create(&layer, 1, &options, &made));
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "twice", macula_concept_create(twice, 2, &options, &made));
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "fit into memory", macula_concept_create(twice, SIZE_MAX, &options, &made));
    options.fingerprint = "not hexadecimal";
    EXPECT(MACULA_STATUS_INVALID_ARGUMENT, "", macula_concept_create(twice, 1, &options, &made));
  }
  tuned_values(a, folder);
  OK(macula_concept_free(a));
  OK(macula_concept_free(b));
  OK(macula_concept_free(other));
}

/* A set whose indices do not fit into what the process may still map. */
static void out_of_memory(const char *folder) {
  const size_t count = (size_t)1 << 26;
  uint32_t *indices = malloc(count * sizeof *indices);
  struct rlimit before, small;
  macula_layer layer = {"mid_block.attn2.to_k", 1 << 16, 1 << 12, indices, count, NULL};
  macula_concept_options options = MACULA_CONCEPT_OPTIONS_INIT;
  macula_concept *made = NULL;
  FILE *maps;
  long pages = 0;
  (void)folder;
  CHECK(indices);
  for (size_t at = 0; at < count; at++) {
    indices[at] = (uint32_t)(at * 4);
  }
  options.fingerprint = BASE_A;
  maps = fopen("/proc/self/statm", "r");
  CHECK(maps && fscanf(maps, "%ld", &pages) == 1 && fclose(maps) == 0);
  CHECK(getrlimit(RLIMIT_AS, &before) == 0);
  small = before;
  small.rlim_cur = (rlim_t)pages * 4096 + (32 << 20);
  CHECK(setrlimit(RLIMIT_AS, &small) == 0);
  EXPECT(MACULA_STATUS_OUT_OF_MEMORY, "memory", macula_concept_create(&layer, 1, &options, &made));
  CHECK(setrlimit(RLIMIT_AS, &before) == 0);
  OK(macula_concept_create(&layer, 1, &options, &made));
  OK(macula_concept_free(made));
  free(indices);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  versions_and_statuses();
  last_errors();
  handles();
  struct_sizes();
  concepts(argv[1]);
  if (!getenv("UNDER_VALGRIND")) { /* it maps memory of its own, which a limit would hit first */
    out_of_memory(argv[1]);
  }
  return 0;
}
