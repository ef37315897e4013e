/* The CPU thread pool.
 *
 * Workers sleep on a condition variable between runs. A run publishes its task under the mutex, wakes
 * as many workers as it can use, takes part itself, and waits until every worker that joined has left.
 * Indices are claimed from one atomic counter, so a worker that wakes late just finds nothing to do.
 *
 * Why not OpenMP: a second runtime beside torch's makes both slow (DESIGN, dependencies).
 */
#define _GNU_SOURCE
#include "cpu/pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#include "check/problem.h"

#define MAX_THREADS 1024

typedef struct job {
  fkda_task_fn task;
  void *arg;
  int32_t count;
} job;

static struct {
  pthread_mutex_t owner;   /* held by the host thread whose run the workers serve */
  pthread_mutex_t mutex;   /* guards everything below but `next` */
  pthread_cond_t wake;     /* a job was published, or stop */
  pthread_cond_t finished; /* the last joined worker has left */
  pthread_t *threads;
  int32_t started;     /* workers running, the caller not counted */
  uint64_t generation; /* number of the published job */
  int32_t invitations; /* workers that may still join the published job */
  int32_t inside;      /* workers that joined and have not left */
  bool stop;
  job current;
  atomic_int_least32_t next; /* next unclaimed index of the current job */
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .mutex = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .finished = PTHREAD_COND_INITIALIZER};

/* Settings, changed by the public setters. */
static pthread_mutex_t settings_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct {
  int32_t requested; /* fkda_set_num_threads(); 0: default */
  fkda_parallel_for_fn hook;
  void *hook_context;
  int32_t hook_threads;
} settings;
static atomic_int_least32_t default_threads; /* cached; 0: not determined yet */
static atomic_int_least32_t usable_threads;  /* answer of fkda_pool_threads(); 0: not determined */
static pthread_once_t fork_handler_once = PTHREAD_ONCE_INIT;

static int32_t find_default_threads(void) {
  const char *text = getenv("FLASHKDA_NUM_THREADS");
  if (text && *text) {
    char *end;
    const long value = strtol(text, &end, 10);
    if (!*end && value >= 1 && value <= MAX_THREADS) return (int32_t)value;
  }
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    const int count = CPU_COUNT(&set);
    if (count >= 1) return count < MAX_THREADS ? count : MAX_THREADS;
  }
  return 1;
}

int32_t fkda_pool_threads(void) {
  const int32_t known = atomic_load_explicit(&usable_threads, memory_order_relaxed);
  if (known) return known;
  pthread_mutex_lock(&settings_mutex);
  int32_t threads = settings.hook ? settings.hook_threads : settings.requested;
  if (!threads) {
    threads = atomic_load(&default_threads);
    if (!threads) atomic_store(&default_threads, threads = find_default_threads());
  }
  atomic_store(&usable_threads, threads);
  pthread_mutex_unlock(&settings_mutex);
  return threads;
}

fkda_status fkda_pool_set_threads(int32_t num_threads) {
  if (num_threads < 0 || num_threads > MAX_THREADS)
    return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT,
                     "num_threads: %d, expected 1 to %d, or 0 for the default", (int)num_threads,
                     MAX_THREADS);
  pthread_mutex_lock(&settings_mutex);
  settings.requested = num_threads;
  atomic_store(&usable_threads, 0);
  pthread_mutex_unlock(&settings_mutex);
  return FKDA_OK;
}

fkda_status fkda_pool_set_hook(fkda_parallel_for_fn parallel_for, void *context,
                               int32_t num_threads) {
  if (parallel_for && (num_threads < 1 || num_threads > MAX_THREADS))
    return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "num_threads: %d, expected 1 to %d",
                     (int)num_threads, MAX_THREADS);
  pthread_mutex_lock(&settings_mutex);
  settings.hook = parallel_for;
  settings.hook_context = context;
  settings.hook_threads = parallel_for ? num_threads : 0;
  atomic_store(&usable_threads, 0);
  pthread_mutex_unlock(&settings_mutex);
  return FKDA_OK;
}

static void work_on(const job *work) {
  for (;;) {
    const int32_t i = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
    if (i >= work->count) return;
    work->task(work->arg, i);
  }
}

static void *worker_main(void *unused) {
  (void)unused;
  uint64_t seen = 0;
  pthread_mutex_lock(&pool.mutex);
  for (;;) {
    while (!pool.stop && (pool.generation == seen || pool.invitations == 0))
      pthread_cond_wait(&pool.wake, &pool.mutex);
    if (pool.stop) break;
    seen = pool.generation;
    --pool.invitations;
    ++pool.inside;
    const job work = pool.current;
    pthread_mutex_unlock(&pool.mutex);
    work_on(&work);
    pthread_mutex_lock(&pool.mutex);
    if (--pool.inside == 0) pthread_cond_signal(&pool.finished);
  }
  pthread_mutex_unlock(&pool.mutex);
  return NULL;
}

/* In a forked child the workers do not exist, and a lock may be held by a thread that does not either. */
static void reset_in_child(void) {
  pthread_mutex_init(&pool.owner, NULL);
  pthread_mutex_init(&pool.mutex, NULL);
  pthread_mutex_init(&settings_mutex, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pthread_cond_init(&pool.finished, NULL);
  free(pool.threads);
  pool.threads = NULL;
  pool.started = pool.invitations = pool.inside = 0;
  pool.stop = false;
}

static void install_fork_handler(void) { pthread_atfork(NULL, NULL, reset_in_child); }

/* Under `owner`: has at least `workers` workers running, or as many as the system allows. */
static int32_t ensure_workers(int32_t workers) {
  if (pool.started >= workers) return workers;
  pthread_once(&fork_handler_once, install_fork_handler);
  pthread_t *threads = realloc(pool.threads, (size_t)workers * sizeof *threads);
  if (!threads) return pool.started;
  pool.threads = threads;
  while (pool.started < workers) {
    if (pthread_create(&pool.threads[pool.started], NULL, worker_main, NULL) != 0) break;
    ++pool.started;
  }
  return pool.started;
}

static void run_with_workers(const job *work, int32_t workers) {
  workers = ensure_workers(workers);
  pthread_mutex_lock(&pool.mutex);
  pool.current = *work;
  atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
  pool.invitations = workers;
  ++pool.generation;
  if (workers == 1)
    pthread_cond_signal(&pool.wake);
  else
    pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.mutex);

  work_on(work);

  pthread_mutex_lock(&pool.mutex);
  pool.invitations = 0; /* nobody joins any more: all indices are claimed */
  while (pool.inside) pthread_cond_wait(&pool.finished, &pool.mutex);
  pthread_mutex_unlock(&pool.mutex);
}

void fkda_pool_run(int32_t count, fkda_task_fn task, void *arg) {
  if (count <= 0) return;
  pthread_mutex_lock(&settings_mutex);
  const fkda_parallel_for_fn hook = settings.hook;
  void *const context = settings.hook_context;
  pthread_mutex_unlock(&settings_mutex);
  if (hook && count > 1) {
    hook(context, count, task, arg);
    return;
  }
  const int32_t threads = fkda_pool_threads();
  const int32_t workers = (count < threads ? count : threads) - 1;
  if (workers < 1 || pthread_mutex_trylock(&pool.owner) != 0) {
    for (int32_t i = 0; i < count; ++i) task(arg, i);
    return;
  }
  const job work = {task, arg, count};
  run_with_workers(&work, workers);
  pthread_mutex_unlock(&pool.owner);
}

void fkda_pool_start(void) {
  const int32_t workers = fkda_pool_threads() - 1;
  if (workers < 1 || pthread_mutex_trylock(&pool.owner) != 0) return;
  ensure_workers(workers);
  pthread_mutex_unlock(&pool.owner);
}

/* At exit and before dlclose: the workers' code is about to go. A run still in progress is left alone. */
__attribute__((destructor)) static void stop_workers(void) {
  if (pthread_mutex_trylock(&pool.owner) != 0) return;
  pthread_mutex_lock(&pool.mutex);
  pool.stop = true;
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.mutex);
  for (int32_t i = 0; i < pool.started; ++i) pthread_join(pool.threads[i], NULL);
  pool.started = 0;
  free(pool.threads);
  pool.threads = NULL;
  pthread_mutex_unlock(&pool.owner);
}
