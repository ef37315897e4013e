/* SPDX-License-Identifier: MIT */
#include "rates.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
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
  return load();
}

const char *fkda_sgemm_core(void) { return corename ? corename() : NULL; }
const char *fkda_sgemm_config(void) { return config ? config() : NULL; }

static void rest(void) {
  const struct timespec pause = {0, 150000000}; /* idle workers of either pool go to sleep */
  nanosleep(&pause, NULL);
}

double fkda_sgemm_gflops(int threads) {
  enum { SIZE = 2048, RUNS = 7, ROW_MAJOR = 101, NO_TRANS = 111 };
  const size_t count = (size_t)SIZE * SIZE;
  float *a = malloc(3 * count * sizeof *a);
  double times[RUNS];
  if (!a) return 0;
  float *b = a + count, *c = b + count;
  fkda_random random;
  fkda_random_seed(&random, 7);
  for (size_t i = 0; i < 3 * count; i++) a[i] = (float)fkda_random_uniform(&random) - 0.5f;
  rest();
  set_threads(threads);
  for (int i = -1; i < RUNS; i++) {
    const double start = fkda_cli_now();
    sgemm(ROW_MAJOR, NO_TRANS, NO_TRANS, SIZE, SIZE, SIZE, 1, a, SIZE, b, SIZE, 0, c, SIZE);
    if (i >= 0) times[i] = fkda_cli_now() - start;
  }
  free(a);
  rest();
  return 2.0 * SIZE * SIZE * SIZE / fkda_cli_median(times, RUNS) / 1e9;
}

/* ---- memory ------------------------------------------------------------------------------------- */

typedef struct sweep {
  pthread_t thread;
  pthread_mutex_t *gate; /* closed until all threads exist */
  float *data;
  size_t count;
  int passes;
  double begin, end;
} sweep;

static void scale(float *restrict x, size_t count, float factor) {
  for (size_t i = 0; i < count; i++) x[i] *= factor;
}

static void *sweep_main(void *argument) {
  sweep *s = argument;
  pthread_mutex_lock(s->gate);
  pthread_mutex_unlock(s->gate);
  s->begin = fkda_cli_now();
  for (int i = 0; i < s->passes; i++) scale(s->data, s->count, i % 2 ? 1.0001f : 0.9999f);
  s->end = fkda_cli_now();
  return NULL;
}

double fkda_memory_gbps(int threads) {
  enum { PASSES = 6, MOST = 256 };
  const size_t count = (size_t)1 << 28; /* 1 GiB */
  sweep sweeps[MOST];
  pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
  if (threads > MOST) threads = MOST;
  float *data = malloc(count * sizeof *data);
  if (!data) return 0;
  for (size_t i = 0; i < count; i++) data[i] = 1 + (float)(i & 1023) * 1e-3f;
  int started = 0;
  pthread_mutex_lock(&gate);
  for (; started < threads; started++) {
    const size_t first = count / (size_t)threads * (size_t)started;
    const size_t last =
        started + 1 == threads ? count : count / (size_t)threads * (size_t)(started + 1);
    sweeps[started] =
        (sweep){.gate = &gate, .data = data + first, .count = last - first, .passes = PASSES};
    if (pthread_create(&sweeps[started].thread, NULL, sweep_main, &sweeps[started])) break;
  }
  pthread_mutex_unlock(&gate);
  double begin = 1e300, end = 0;
  for (int i = 0; i < started; i++) {
    pthread_join(sweeps[i].thread, NULL);
    begin = sweeps[i].begin < begin ? sweeps[i].begin : begin;
    end = sweeps[i].end > end ? sweeps[i].end : end;
  }
  free(data);
  if (started < threads) return 0;
  return 2.0 * PASSES * (double)(count * sizeof *data) / (end - begin) / 1e9;
}
