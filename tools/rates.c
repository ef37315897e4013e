/* SPDX-License-Identifier: MIT */
#include "rates.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli.h"

/* ---- OpenBLAS ----------------------------------------------------------------------------------- */

static const char library_name[] = "libopenblas.so.0";

typedef void sgemm_fn(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                      const float *a, int lda, const float *b, int ldb, float beta, float *c,
                      int ldc);
static sgemm_fn *sgemm;
static void (*set_threads)(int);
static char *(*corename)(void);
static char *(*config)(void);

/* dlsym returns a data pointer; copying its bits is the portable way to a function pointer. */
static bool resolve(void *library, const char *name, void *function) {
  void *symbol = dlsym(library, name);
  memcpy(function, &symbol, sizeof symbol);
  return symbol != NULL;
}

static bool load(void) {
  void *library = dlopen(library_name, RTLD_NOW | RTLD_LOCAL);
  return library && resolve(library, "cblas_sgemm", &sgemm) &&
         resolve(library, "openblas_set_num_threads", &set_threads) &&
         resolve(library, "openblas_get_corename", &corename) &&
         resolve(library, "openblas_get_config", &config);
}

static bool one_of(const char *name, const char *const *names) {
  for (; *names; names++) {
    if (strcmp(name, *names) == 0) return true;
  }
  return false;
}

/* Some releases do not know newer processors and fall back to kernels without AVX, a fifth of the speed.
 * To compare with what OpenBLAS can do, name the right kernels then. It reads the variable only
 * when loaded, so a child process looks first at what it would choose. */
static void choose_core(void) {
  static const char *const avx512[] = {"SkylakeX", "Cooperlake", "SapphireRapids", "Zen", NULL};
  static const char *const avx2[] = {"Haswell", "Zen", "Excavator", "SkylakeX", NULL};
  const bool has512 = fkda_cli_cpu_has("avx512f") && fkda_cli_cpu_has("avx512vl");
  if (getenv("OPENBLAS_CORETYPE") || !fkda_cli_cpu_has("avx2")) return;
  fflush(NULL);
  const pid_t child = fork();
  if (child == 0) _exit(load() && one_of(corename(), has512 ? avx512 : avx2) ? 0 : 1);
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return;
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    setenv("OPENBLAS_CORETYPE", has512 ? "SkylakeX" : "Haswell", 1);
  }
}

bool fkda_sgemm_load(void) {
  choose_core();
  setenv("OPENBLAS_THREAD_TIMEOUT", "4",
         0); /* else its idle threads spin into what is timed next */
  return load();
}

const char *fkda_sgemm_core(void) { return corename ? corename() : NULL; }
const char *fkda_sgemm_config(void) { return config ? config() : NULL; }

double fkda_sgemm_gflops(int threads, double seconds) {
  enum { SIZE = 2048, WARM = 256, ROW_MAJOR = 101, NO_TRANS = 111 };
  static float *a; /* and b and c: made once */
  const size_t count = (size_t)SIZE * SIZE;
  if (!a) {
    if (!(a = malloc(3 * count * sizeof *a))) return 0;
    fkda_random random;
    fkda_random_seed(&random, 7);
    for (size_t i = 0; i < 3 * count; i++) a[i] = (float)fkda_random_uniform(&random) - 0.5f;
  }
  const float *b = a + count;
  float *c = a + 2 * count;
  set_threads(threads);
  sgemm(ROW_MAJOR, NO_TRANS, NO_TRANS, WARM, WARM, WARM, 1, a, SIZE, b, SIZE, 0, c, SIZE);
  const double begin = fkda_cli_now();
  double spent;
  int runs = 0;
  do {
    sgemm(ROW_MAJOR, NO_TRANS, NO_TRANS, SIZE, SIZE, SIZE, 1, a, SIZE, b, SIZE, 0, c, SIZE);
    runs++;
  } while ((spent = fkda_cli_now() - begin) < seconds);
  return 2.0 * SIZE * SIZE * SIZE * runs / spent / 1e9;
}

/* ---- memory ------------------------------------------------------------------------------------- */

typedef struct sweep {
  pthread_t thread;
  pthread_mutex_t *gate; /* closed until all threads exist */
  float *data;
  size_t count;
  double seconds, rate; /* wanted; elements a second */
} sweep;

static void scale(float *restrict x, size_t count, float factor) {
  for (size_t i = 0; i < count; i++) x[i] *= factor;
}

/* Round and round its part of the buffer, in pieces short enough to end in time. */
static void *sweep_main(void *argument) {
  enum { PIECE = 1 << 20 };
  sweep *s = argument;
  pthread_mutex_lock(s->gate);
  pthread_mutex_unlock(s->gate);
  const double begin = fkda_cli_now();
  double spent, done = 0;
  size_t at = 0;
  float factor = 0.9999f;
  do {
    const size_t piece = s->count - at < PIECE ? s->count - at : PIECE;
    scale(s->data + at, piece, factor);
    done += (double)piece;
    at += piece;
    if (at == s->count) {
      at = 0;
      factor = 2 - factor; /* nothing overflows or vanishes */
    }
  } while ((spent = fkda_cli_now() - begin) < s->seconds);
  s->rate = done / spent;
  return NULL;
}

double fkda_memory_gbps(int threads, double seconds) {
  enum { MOST = 256 };
  static float *data;                   /* made once */
  const size_t count = (size_t)1 << 28; /* 1 GiB */
  sweep sweeps[MOST];
  pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
  if (threads > MOST) threads = MOST;
  if (!data) {
    if (!(data = malloc(count * sizeof *data))) return 0;
    for (size_t i = 0; i < count; i++) data[i] = 1 + (float)(i & 1023) * 1e-3f;
  }
  int started = 0;
  pthread_mutex_lock(&gate);
  for (; started < threads; started++) {
    const size_t first = count / (size_t)threads * (size_t)started;
    const size_t last =
        started + 1 == threads ? count : count / (size_t)threads * (size_t)(started + 1);
    sweeps[started] =
        (sweep){.gate = &gate, .data = data + first, .count = last - first, .seconds = seconds};
    if (pthread_create(&sweeps[started].thread, NULL, sweep_main, &sweeps[started])) break;
  }
  pthread_mutex_unlock(&gate);
  double rate = 0;
  for (int i = 0; i < started; i++) {
    pthread_join(sweeps[i].thread, NULL);
    rate += sweeps[i].rate;
  }
  return started < threads ? 0 : 2.0 * sizeof *data * rate / 1e9;
}
