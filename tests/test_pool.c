/* The CPU thread pool: every index once, nesting, several host threads, the hook, resizing, fork.
 * Meant to run under ThreadSanitizer too.
 *
 * SPDX-License-Identifier: MIT
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "cpu/pool.h"
#include "flashkda/flashkda.h"

#define CALLS_MAX 1000

/* ---- runs of counted tasks --------------------------------------------------------------------- */

typedef struct counted {
  atomic_int hits[CALLS_MAX];
} counted;

static void count_hit(void *arg, int32_t index) {
  counted *c = arg;
  atomic_fetch_add(&c->hits[index], 1);
}

static void reset(counted *c) {
  for (int i = 0; i < CALLS_MAX; ++i) atomic_store(&c->hits[i], 0);
}

/* Every index below `count` was called `times` times and none above it. Used from threads and children
 * too, where cmocka's assertions must not be. */
static bool hit_exactly(counted *c, int32_t count, int times) {
  for (int32_t i = 0; i < CALLS_MAX; ++i)
    if (atomic_load(&c->hits[i]) != (i < count ? times : 0)) return false;
  return true;
}

static int restore_defaults(void **state) {
  (void)state;
  assert_int_equal(fkda_set_parallel_for(NULL, NULL, 0), FKDA_OK);
  assert_int_equal(fkda_set_num_threads(0), FKDA_OK);
  return 0;
}

static void every_index_runs_once(void **state) {
  (void)state;
  static counted c;
  static const int32_t threads[] = {1, 2, 5, 3, 1, 8}; /* grows and shrinks */
  static const int32_t counts[] = {0, 1, 2, 3, 7, 64, CALLS_MAX};
  for (size_t t = 0; t < sizeof threads / sizeof *threads; ++t) {
    assert_int_equal(fkda_set_num_threads(threads[t]), FKDA_OK);
    assert_int_equal(fkda_num_threads(), threads[t]);
    for (size_t n = 0; n < sizeof counts / sizeof *counts; ++n) {
      reset(&c);
      fkda_pool_run(counts[n], count_hit, &c);
      assert_true(hit_exactly(&c, counts[n], 1));
    }
  }
}

/* Two tasks that wait for one another: they can only both finish if they run at the same time. */
typedef struct meeting {
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  int arrived;
  int missed;
} meeting;

static void meet(void *arg, int32_t index) {
  (void)index;
  meeting *m = arg;
  struct timespec deadline;
  (void)clock_gettime(CLOCK_REALTIME, &deadline);
  deadline.tv_sec += 20;
  pthread_mutex_lock(&m->mutex);
  ++m->arrived;
  pthread_cond_broadcast(&m->changed);
  while (m->arrived < 2)
    if (pthread_cond_timedwait(&m->changed, &m->mutex, &deadline) != 0) {
      ++m->missed;
      break;
    }
  pthread_mutex_unlock(&m->mutex);
}

static void tasks_run_at_the_same_time(void **state) {
  (void)state;
  meeting m = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
  assert_int_equal(fkda_set_num_threads(2), FKDA_OK);
  fkda_pool_run(2, meet, &m);
  assert_int_equal(m.arrived, 2);
  assert_int_equal(m.missed, 0);
}

static void nested_outer(void *arg, int32_t index) {
  (void)index;
  fkda_pool_run(50, count_hit, arg);
}

static void tasks_may_run_tasks(void **state) {
  (void)state;
  static counted c;
  assert_int_equal(fkda_set_num_threads(4), FKDA_OK);
  reset(&c);
  fkda_pool_run(20, nested_outer, &c);
  assert_true(hit_exactly(&c, 50, 20));
}

static void *run_many(void *arg) {
  atomic_int *wrong = arg;
  counted *c = malloc(sizeof *c);
  if (!c) {
    atomic_fetch_add(wrong, 1);
    return NULL;
  }
  for (int32_t i = 0; i < 200; ++i) {
    const int32_t count = i % 37;
    reset(c);
    fkda_pool_run(count, count_hit, c);
    if (!hit_exactly(c, count, 1)) atomic_fetch_add(wrong, 1);
  }
  free(c);
  return NULL;
}

static void host_threads_run_at_once(void **state) {
  (void)state;
  pthread_t hosts[4];
  atomic_int wrong = 0;
  assert_int_equal(fkda_set_num_threads(3), FKDA_OK);
  for (int i = 0; i < 4; ++i)
    assert_int_equal(pthread_create(&hosts[i], NULL, run_many, &wrong), 0);
  /* Settings change meanwhile. */
  for (int32_t i = 0; i < 200; ++i) assert_int_equal(fkda_set_num_threads(1 + i % 4), FKDA_OK);
  for (int i = 0; i < 4; ++i) assert_int_equal(pthread_join(hosts[i], NULL), 0);
  assert_int_equal(wrong, 0);
}

/* ---- settings ------------------------------------------------------------------------------------ */

static void thread_counts_are_checked(void **state) {
  (void)state;
  assert_int_equal(fkda_set_num_threads(2), FKDA_OK);
  assert_int_equal(fkda_set_num_threads(-1), FKDA_ERROR_INVALID_ARGUMENT);
  assert_non_null(strstr(fkda_last_error(), "num_threads"));
  assert_non_null(strstr(fkda_last_error(), "-1"));
  assert_int_equal(fkda_set_num_threads(1025), FKDA_ERROR_INVALID_ARGUMENT);
  assert_non_null(strstr(fkda_last_error(), "1025"));
  assert_int_equal(fkda_num_threads(), 2); /* a refused call changed nothing */
  assert_int_equal(fkda_set_num_threads(0), FKDA_OK);
  assert_in_range(fkda_num_threads(), 1, 1024);
}

/* The environment is read once, so each value gets a process of its own. Runs before every other test,
 * while the parent has not asked yet either. */
static void environment_sets_the_default(void **state) {
  (void)state;
  static const struct {
    const char *text;
    int32_t expected; /* 0: as without the variable */
  } cases[] = {{"3", 3}, {"1024", 1024}, {"0", 0}, {"-2", 0}, {"1025", 0}, {"two", 0}, {"", 0}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
      (void)setenv("FLASHKDA_NUM_THREADS", cases[i].text, 1);
      const int32_t threads = fkda_num_threads();
      /* Asked once more, explicitly for the default. */
      const bool stable = fkda_set_num_threads(0) == FKDA_OK && fkda_num_threads() == threads;
      const bool right =
          cases[i].expected ? threads == cases[i].expected : threads >= 1 && threads < 1024;
      _exit(stable && right ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
  }
}

/* ---- the hook -------------------------------------------------------------------------------------- */

typedef struct hook_log {
  int calls;
  int32_t largest;
} hook_log;

/* Backwards: nothing may depend on the order. */
static void backwards(void *context, int32_t count, fkda_task_fn task, void *task_arg) {
  hook_log *log = context;
  ++log->calls;
  if (count > log->largest) log->largest = count;
  for (int32_t i = count - 1; i >= 0; --i) task(task_arg, i);
}

static void hook_replaces_the_pool(void **state) {
  (void)state;
  static counted c;
  hook_log log = {0};
  assert_int_equal(fkda_set_num_threads(2), FKDA_OK);
  assert_int_equal(fkda_set_parallel_for(backwards, &log, 0), FKDA_ERROR_INVALID_ARGUMENT);
  assert_non_null(strstr(fkda_last_error(), "num_threads"));
  assert_int_equal(fkda_num_threads(), 2);
  assert_int_equal(fkda_set_parallel_for(backwards, &log, 7), FKDA_OK);
  assert_int_equal(fkda_num_threads(), 7);
  reset(&c);
  fkda_pool_run(7, count_hit, &c);
  assert_true(hit_exactly(&c, 7, 1));
  assert_int_equal(log.calls, 1);
  assert_int_equal(log.largest, 7);
  assert_int_equal(fkda_set_parallel_for(NULL, NULL, 0), FKDA_OK);
  assert_int_equal(fkda_num_threads(), 2);
  reset(&c);
  fkda_pool_run(7, count_hit, &c);
  assert_true(hit_exactly(&c, 7, 1));
  assert_int_equal(log.calls, 1);
}

/* ---- whole calls ----------------------------------------------------------------------------------- */

enum { T = 100, H = 3, D = 32, IN = T * H * D };

typedef struct call {
  float q[IN], k[IN], v[IN], g[IN], beta[T * H];
  float out[IN], state[H * D * D];
} call;

static void fill(float *x, int count, uint32_t *seed, float scale) {
  for (int i = 0; i < count; ++i) {
    *seed = *seed * 1664525u + 1013904223u;
    x[i] = scale * ((float)(*seed >> 8) / 8388608.0f - 1.0f);
  }
}

static call *new_call(void) {
  call *c = calloc(1, sizeof *c);
  if (!c) return NULL;
  uint32_t seed = 7;
  fill(c->q, IN, &seed, 1);
  fill(c->k, IN, &seed, 1);
  fill(c->v, IN, &seed, 1);
  fill(c->g, IN, &seed, 4);
  fill(c->beta, T * H, &seed, 2);
  return c;
}

static fkda_status prefill(call *c) {
  const int64_t heads[] = {1, T, H, D};
  const int64_t states[] = {1, H, D, D};
  fkda_prefill_args args = FKDA_PREFILL_ARGS_INIT;
  args.q = fkda_tensor_contiguous(c->q, FKDA_F32, 4, heads);
  args.k = fkda_tensor_contiguous(c->k, FKDA_F32, 4, heads);
  args.v = fkda_tensor_contiguous(c->v, FKDA_F32, 4, heads);
  args.g = fkda_tensor_contiguous(c->g, FKDA_F32, 4, heads);
  args.beta = fkda_tensor_contiguous(c->beta, FKDA_F32, 3, heads);
  args.out = fkda_tensor_contiguous(c->out, FKDA_F32, 4, heads);
  args.final_state = fkda_tensor_contiguous(c->state, FKDA_F32, 4, states);
  memset(c->out, 0xff, sizeof c->out); /* NaN */
  memset(c->state, 0xff, sizeof c->state);
  return fkda_prefill(&args);
}

static bool same_results(const call *a, const call *b) {
  return memcmp(a->out, b->out, sizeof a->out) == 0 &&
         memcmp(a->state, b->state, sizeof a->state) == 0;
}

static void results_do_not_depend_on_threads(void **state) {
  (void)state;
  call *one = new_call();
  call *other = new_call();
  assert_non_null(one);
  assert_non_null(other);
  assert_int_equal(fkda_set_num_threads(1), FKDA_OK);
  assert_int_equal(prefill(one), FKDA_OK);
  for (int i = 0; i < IN; ++i) assert_true(one->out[i] == one->out[i]);
  for (int32_t threads = 2; threads <= 6; ++threads) {
    assert_int_equal(fkda_set_num_threads(threads), FKDA_OK);
    assert_int_equal(prefill(other), FKDA_OK);
    assert_true(same_results(one, other));
  }
  for (int32_t threads = 1; threads <= 4; ++threads) {
    hook_log log = {0};
    assert_int_equal(fkda_set_parallel_for(backwards, &log, threads), FKDA_OK);
    assert_int_equal(prefill(other), FKDA_OK);
    assert_true(same_results(one, other));
    assert_in_range(log.largest, threads > 1, threads); /* num_threads bounds count */
  }
  free(one);
  free(other);
}

static void *prefill_many(void *arg) {
  atomic_int *wrong = arg;
  call *first = new_call();
  call *again = new_call();
  bool ok = first && again && prefill(first) == FKDA_OK;
  for (int i = 0; ok && i < 20; ++i) ok = prefill(again) == FKDA_OK && same_results(first, again);
  if (!ok) atomic_fetch_add(wrong, 1);
  free(first);
  free(again);
  return NULL;
}

static void host_threads_prefill_at_once(void **state) {
  (void)state;
  pthread_t hosts[4];
  atomic_int wrong = 0;
  assert_int_equal(fkda_set_num_threads(2), FKDA_OK);
  for (int i = 0; i < 4; ++i)
    assert_int_equal(pthread_create(&hosts[i], NULL, prefill_many, &wrong), 0);
  for (int i = 0; i < 4; ++i) assert_int_equal(pthread_join(hosts[i], NULL), 0);
  assert_int_equal(wrong, 0);
}

/* ---- fork ------------------------------------------------------------------------------------------ */

/* In a child: the pool works, in parallel, and whole calls give the parent's bits. */
static bool works_in_child(const call *expected) {
  static counted c;
  meeting m = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
  reset(&c);
  fkda_pool_run(CALLS_MAX, count_hit, &c);
  if (!hit_exactly(&c, CALLS_MAX, 1)) return false;
  fkda_pool_run(2, meet, &m);
  if (m.missed) return false;
  call *own = new_call();
  if (!own) return false;
  const bool same = prefill(own) == FKDA_OK && same_results(expected, own);
  free(own);
  return same;
}

static void fork_and_check(const call *expected) {
  const pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    alarm(60); /* a lock left held by the fork would hang the child */
    _exit(works_in_child(expected) ? 0 : 1);
  }
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_int_equal(status, 0);
}

/* qemu-user (7.2) does not survive a fork of a process with threads, whatever the program. */
static void skip_under_emulation(void) {
  if (getenv("FKDA_TEST_EMULATED")) skip();
}

static void works_after_fork(void **state) {
  (void)state;
  skip_under_emulation();
  call *expected = new_call();
  assert_non_null(expected);
  assert_int_equal(fkda_set_num_threads(3), FKDA_OK);
  assert_int_equal(prefill(expected), FKDA_OK); /* the workers run now */
  fork_and_check(expected);
  static counted c;
  reset(&c);
  fkda_pool_run(CALLS_MAX, count_hit, &c);
  assert_true(hit_exactly(&c, CALLS_MAX, 1));
  free(expected);
}

static void *run_until(void *arg) {
  const atomic_bool *stop = arg;
  counted *c = malloc(sizeof *c);
  while (c && !atomic_load(stop)) {
    reset(c);
    fkda_pool_run(64, count_hit, c);
  }
  free(c);
  return NULL;
}

static void works_after_fork_during_a_run(void **state) {
  (void)state;
  skip_under_emulation();
  call *expected = new_call();
  atomic_bool stop = false;
  pthread_t host;
  assert_non_null(expected);
  assert_int_equal(fkda_set_num_threads(3), FKDA_OK);
  assert_int_equal(prefill(expected), FKDA_OK);
  assert_int_equal(pthread_create(&host, NULL, run_until, &stop), 0);
  for (int i = 0; i < 20; ++i) fork_and_check(expected);
  atomic_store(&stop, true);
  assert_int_equal(pthread_join(host, NULL), 0);
  free(expected);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(environment_sets_the_default),
      cmocka_unit_test_teardown(every_index_runs_once, restore_defaults),
      cmocka_unit_test_teardown(tasks_run_at_the_same_time, restore_defaults),
      cmocka_unit_test_teardown(tasks_may_run_tasks, restore_defaults),
      cmocka_unit_test_teardown(host_threads_run_at_once, restore_defaults),
      cmocka_unit_test_teardown(thread_counts_are_checked, restore_defaults),
      cmocka_unit_test_teardown(hook_replaces_the_pool, restore_defaults),
      cmocka_unit_test_teardown(results_do_not_depend_on_threads, restore_defaults),
      cmocka_unit_test_teardown(host_threads_prefill_at_once, restore_defaults),
      cmocka_unit_test_teardown(works_after_fork, restore_defaults),
      cmocka_unit_test_teardown(works_after_fork_during_a_run, restore_defaults),
  };
  /* The fork tests reset what an environment variable of the surrounding run would decide. */
  (void)unsetenv("FLASHKDA_NUM_THREADS");
  return cmocka_run_group_tests_name("pool", tests, NULL, NULL);
}
