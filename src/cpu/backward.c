/* Planning and running a backward on the CPU: (sequence, head of q and k) pairs over the pool's threads, the
 * longest sequences first, then the sums over sequences. */
#include <stdatomic.h>
#include <stdlib.h>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "plan/plan.h"

typedef struct sequence {
  int64_t length, n;
  int64_t checkpoint_row; /* the first of the states that the prefill has kept */
} sequence;

/* Workspace: the sequences, their parts of d_A_log and d_dt_bias [N][HV][1 + K], one scratch a thread. */
static size_t sequences_bytes(const fkda_problem *p) {
  return fkda_cpu_align_up((size_t)p->N * sizeof(sequence));
}
static size_t parts_bytes(const fkda_problem *p) {
  return fkda_cpu_align_up((size_t)(p->N * p->HV) * (size_t)(1 + p->K) * sizeof(double));
}

void fkda_cpu_backward_plan(const fkda_cpu_kernels *kernels, const fkda_problem *p,
                            fkda_plan_t *plan) {
  const int32_t threads = fkda_pool_threads();
  plan->chunk = FKDA_CPU_CHUNK;
  plan->value_split = 1;
  plan->tasks = p->N * p->H;
  plan->threads = plan->tasks < 1 ? 1 : plan->tasks < threads ? (int32_t)plan->tasks : threads;
  plan->workspace_size =
      sequences_bytes(p) + parts_bytes(p) + (size_t)threads * kernels->backward_scratch(p);
}

typedef struct run {
  const fkda_cpu_kernels *kernels;
  const fkda_problem *problem;
  const sequence *sequences;
  double *parts;
  char *scratch;
  size_t scratch_size;
  int32_t threads;
  atomic_int_least64_t next;
} run;

static void worker(void *arg, int32_t index) {
  run *r = arg;
  const fkda_problem *p = r->problem;
  for (;;) {
    const int64_t task = atomic_fetch_add_explicit(&r->next, 1, memory_order_relaxed);
    if (task >= p->N * p->H) return;
    const sequence *s = &r->sequences[task / p->H];
    const fkda_cpu_job job = {.problem = p,
                              .n = s->n,
                              .head = task % p->H,
                              .v_end = p->V,
                              .checkpoint_row = s->checkpoint_row};
    r->kernels->backward(&job, r->scratch + (size_t)index * r->scratch_size,
                         r->parts + s->n * p->HV * (1 + p->K));
  }
}

/* d_A_log and d_dt_bias: the sequences' parts, in the sequences' order; value heads in turn. */
static void sum_parts(void *arg, int32_t index) {
  const run *r = arg;
  const fkda_problem *p = r->problem;
  const int64_t size = 1 + p->K;
  float *d_A_log = p->d_A_log.data, *d_dt_bias = p->d_dt_bias.data;
  for (int64_t h = index; h < p->HV; h += r->threads)
    for (int64_t i = 0; i < size; ++i) {
      double sum = 0;
      for (int64_t n = 0; n < p->N; ++n) sum += r->parts[(n * p->HV + h) * size + i];
      if (i == 0 && d_A_log) d_A_log[h] = (float)sum;
      if (i > 0 && d_dt_bias) d_dt_bias[h * p->K + i - 1] = (float)sum;
    }
}

static int longer_first(const void *left, const void *right) {
  const sequence *a = left, *b = right;
  if (a->length != b->length) return a->length < b->length ? 1 : -1;
  return a->n < b->n ? -1 : a->n > b->n;
}

fkda_status fkda_cpu_backward_launch(const fkda_cpu_kernels *kernels, const fkda_problem *p,
                                     const fkda_plan_t *plan, char *workspace) {
  sequence *sequences = (sequence *)(void *)workspace;
  int64_t rows = 0;
  for (int64_t n = 0; n < p->N; ++n) {
    const int64_t length = fkda_span_of(p, n).length;
    sequences[n] = (sequence){length, n, rows};
    if (p->checkpoints.mode == FKDA_CHECKPOINT_EVERY)
      rows += length / p->checkpoints.every + (length % p->checkpoints.every != 0);
  }
  if (p->cu_seqlens.data && p->N > 1)
    qsort(sequences, (size_t)p->N, sizeof *sequences, longer_first);
  run r = {.kernels = kernels,
           .problem = p,
           .sequences = sequences,
           .parts = (double *)(void *)(workspace + sequences_bytes(p)),
           .scratch = workspace + sequences_bytes(p) + parts_bytes(p),
           .scratch_size = kernels->backward_scratch(p),
           .threads = plan->threads};
  memset(r.parts, 0, parts_bytes(p));
  if (plan->tasks > 0) fkda_pool_run(plan->threads, worker, &r);
  if (p->d_A_log.data || p->d_dt_bias.data) fkda_pool_run(plan->threads, sum_parts, &r);
  return FKDA_OK;
}
