/* What belongs to the host is the same after the library worked and was torn down: signal handlers and mask, floating-point
   environment, locale, working folder, environment, file descriptors, umask; no socket was opened.
   Argument: a model folder. */
#include "world.h"

#include <dirent.h>
#include <fenv.h>
#include <locale.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

extern char **environ;

typedef struct {
  struct sigaction actions[65];
  sigset_t mask;
  fenv_t floating;
  unsigned control;
  char locale[256], folder[4096];
  uint64_t environment;
  mode_t creation;
  int descriptors, sockets;
} state;

static void count_descriptors(state *seen) {
  DIR *folder = opendir("/proc/self/fd");
  struct dirent *entry;
  CHECK(folder);
  seen->descriptors = seen->sockets = 0;
  while ((entry = readdir(folder))) {
    char name[300], target[512];
    ssize_t length;
    snprintf(name, sizeof name, "/proc/self/fd/%s", entry->d_name);
    length = readlink(name, target, sizeof target - 1);
    if (length > 0) {
      target[length] = 0;
      seen->descriptors++;
      seen->sockets += !strncmp(target, "socket:", 7);
    }
  }
  CHECK(closedir(folder) == 0);
}

static void look(state *seen) {
  memset(seen, 0, sizeof *seen);
  for (int number = 1; number <= 64; number++) {
    sigaction(number, NULL, &seen->actions[number]); /* fails for the two that libc keeps */
  }
  CHECK(sigprocmask(SIG_BLOCK, NULL, &seen->mask) == 0);
  CHECK(fegetenv(&seen->floating) == 0);
  __asm__ volatile("stmxcsr %0" : "=m"(seen->control));
  seen->control &= ~0x3fu; /* the exception flags say what was computed, not how to */
  snprintf(seen->locale, sizeof seen->locale, "%s", setlocale(LC_ALL, NULL));
  CHECK(getcwd(seen->folder, sizeof seen->folder));
  for (char **variable = environ; *variable; variable++) {
    for (const char *letter = *variable; *letter; letter++) {
      seen->environment = seen->environment * 1099511628211u + (unsigned char)*letter;
    }
  }
  seen->creation = umask(0);
  umask(seen->creation);
  count_descriptors(seen);
}

static void compare(const state *before, const state *after) {
  for (int number = 1; number <= 64; number++) {
    CHECK(before->actions[number].sa_handler == after->actions[number].sa_handler);
    CHECK(before->actions[number].sa_flags == after->actions[number].sa_flags);
  }
  CHECK(memcmp(&before->mask, &after->mask, sizeof before->mask) == 0);
  CHECK(before->floating.__control_word == after->floating.__control_word);
  CHECK(before->control == after->control);
  CHECK(strcmp(before->locale, after->locale) == 0);
  CHECK(strcmp(before->folder, after->folder) == 0);
  CHECK(before->environment == after->environment);
  CHECK(before->creation == after->creation);
  CHECK(after->sockets == before->sockets);
}

/* ONNX Runtime starts no thread before there is a model: no telemetry, in particular. */
static void no_threads(void) {
  macula_runtime *runtime = NULL;
  FILE *status;
  char line[256];
  int threads = 0;
  OK(macula_runtime_create(NULL, &runtime));
  status = fopen("/proc/self/status", "r");
  CHECK(status);
  while (fgets(line, sizeof line, status) && sscanf(line, "Threads: %d", &threads) != 1) {
  }
  CHECK(fclose(status) == 0 && threads == 1);
  OK(macula_runtime_free(runtime));
}

static void work(const char *model, const char *folder) {
  world_create(model, folder);
  EXPECT(MACULA_STATUS_NOT_FOUND, "", macula_concept_load("/nowhere", &world_macula_concept));
  world_free();
}

int main(int argc, char **argv) {
  state before, first, second;
  char folder[] = "/tmp/macula-state-XXXXXX", file[64];
  CHECK(argc == 2 && mkdtemp(folder));
  signal(SIGUSR1, SIG_IGN);
  CHECK(setlocale(LC_ALL, "C") != NULL);
  look(&before);
  no_threads();
  work(argv[1], folder);
  look(&first);
  compare(&before, &first);
  /* ONNX Runtime stays loaded and may keep descriptors of its own; working again may not add any. */
  work(argv[1], folder);
  look(&second);
  compare(&first, &second);
  CHECK(second.descriptors == first.descriptors);
  snprintf(file, sizeof file, "%s/world.safetensors", folder);
  CHECK(remove(file) == 0 && rmdir(folder) == 0);
  return 0;
}
