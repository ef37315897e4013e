/* The CPU rows of the backend table: one for each instruction set, over kernels.h. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "run/backend.h"

/* Of the workspace and of each thread's scratch: a cache line, a 512-bit vector. */
#define ALIGNMENT 64

/* ---- which instruction sets does this processor have? ------------------------------------------- */

#if defined(__x86_64__)
#include <cpuid.h>

static bool has_f16c(void) {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

static bool available_avx2(const fkda_backend *self, char *reason, size_t capacity) {
  (void)self;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return true;
  snprintf(reason, capacity, "this processor lacks AVX2, FMA or F16C");
  return false;
}

static bool available_avx512(const fkda_backend *self, char *reason, size_t capacity) {
  (void)self;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_f16c())
    return true;
  snprintf(reason, capacity, "this processor lacks AVX-512 F, BW, DQ or VL");
  return false;
}
#endif

static bool available_always(const fkda_backend *self, char *reason, size_t capacity) {
  (void)self, (void)reason, (void)capacity;
  return true;
}

/* ---- what can the kernels do? --------------------------------------------------------------------- */

static bool is_f64(int32_t dtype) { return dtype == FKDA_F64; }

static bool supports(const fkda_backend *self, const fkda_problem *p, char *reason,
                     size_t capacity) {
  (void)self;
  if (is_f64(p->io_dtype) || is_f64(p->g.dtype) || is_f64(p->beta.dtype) || is_f64(p->out.dtype) ||
      is_f64(p->A_log.dtype) || is_f64(p->dt_bias.dtype) || is_f64(p->initial.dtype) ||
      is_f64(p->final.dtype) || is_f64(p->checkpoints.state.dtype) || is_f64(p->summary_M.dtype) ||
      is_f64(p->summary_b.dtype) || is_f64(p->d_out.dtype) || is_f64(p->d_final.dtype) ||
      is_f64(p->d_q.dtype) || is_f64(p->d_k.dtype) || is_f64(p->d_v.dtype) ||
      is_f64(p->d_g.dtype) || is_f64(p->d_beta.dtype) || is_f64(p->d_A_log.dtype) ||
      is_f64(p->d_dt_bias.dtype) || is_f64(p->d_initial.dtype)) {
    snprintf(reason, capacity, "computes in float32; only the reference takes float64");
    return false;
  }
  return true;
}

/* ---- planning --------------------------------------------------------------------------------------- */

/* Into how many parts of V should a head be cut, so that `heads` of them keep `threads` busy longest?
 * The factors (8), (9) are made again for each part: about a quarter of a whole head's time. */
static int32_t choose_split(int64_t heads, int64_t panels, int32_t threads) {
  int32_t best = 1;
  double best_time = 0;
  for (int32_t split = 1; split <= panels; ++split) {
    if (panels % split) continue;
    const int64_t rounds = (heads * split + threads - 1) / threads;
    const double time = (double)rounds * (0.25 + 0.75 / split);
    if (split == 1 || time < 0.97 * best_time) {
      best = split;
      best_time = time;
    }
    if (heads * split >= 8 * (int64_t)threads) break;
  }
  return best;
}

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Value columns of one part; a multiple of the panel. */
static int64_t part_columns(int64_t V, int32_t panel, int32_t split) {
  return ceil_div(ceil_div(V, panel), split) * panel;
}

typedef struct sequence_order {
  int64_t length, n;
} sequence_order;

static size_t align_up(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* Workspace of a prefill: longest-first order, checkpoint rows, then one scratch a thread. Sized for
 * all threads and all of V, so that it grows with the arguments alone. */
static size_t order_bytes(const fkda_problem *p) {
  return align_up((size_t)p->N * sizeof(sequence_order));
}
static size_t rows_bytes(const fkda_problem *p) {
  return p->checkpoints.mode == FKDA_CHECKPOINT_EVERY ? align_up((size_t)p->N * sizeof(int64_t))
                                                      : 0;
}
static int64_t widest_V(const fkda_problem *p) {
  return p->op == FKDA_OP_SUMMARY && p->K > p->V ? p->K : p->V;
}

#define SERIAL_TOKENS 16         /* (token, head) pairs below which waking a thread costs more */
#define SERIAL_BYTES (256 << 10) /* the same for decode's state traffic */

static void plan(const fkda_backend *self, const fkda_problem *p, fkda_plan_t *plan) {
  const fkda_cpu_kernels *kernels = self->kernels;
  if (p->op == FKDA_OP_BACKWARD) {
    fkda_cpu_backward_plan(kernels, p, plan);
    return;
  }
  const int32_t threads = fkda_pool_threads();
  const int64_t heads = p->N * p->HV, panels = ceil_div(p->V, kernels->panel);
  bool small;
  if (p->op == FKDA_OP_DECODE) {
    small = heads * p->K * p->V * 8 < SERIAL_BYTES;
    plan->chunk = 1;
    plan->workspace_size = 0;
  } else {
    small = p->B * p->T * p->HV < SERIAL_TOKENS;
    plan->chunk = FKDA_CPU_CHUNK;
    plan->workspace_size = order_bytes(p) + rows_bytes(p) +
                           (size_t)threads * kernels->prefill_scratch(p->K, widest_V(p));
  }
  plan->value_split = small ? 1 : choose_split(heads, panels, threads);
  plan->tasks = heads * plan->value_split * (p->op == FKDA_OP_SUMMARY ? 2 : 1);
  plan->threads = small || plan->tasks < 1 ? 1
                  : plan->tasks < threads  ? (int32_t)plan->tasks
                                           : threads;
}

/* ---- running ---------------------------------------------------------------------------------------- */

/* One pass over all sequences and heads. */
typedef struct pass {
  const fkda_problem *problem;
  bool identity;
  int64_t columns; /* value columns of a part */
  int64_t tasks;
} pass;

typedef struct run {
  const fkda_cpu_kernels *kernels;
  pass passes[2]; /* the second: summary's M */
  int32_t split;
  int64_t batch;                  /* tasks claimed at a time */
  const sequence_order *order;    /* NULL: sequence numbers as they come */
  const int64_t *checkpoint_rows; /* NULL: none by interval */
  char *scratch;
  size_t scratch_size;
  atomic_int_least64_t next;
} run;

static void do_task(const run *r, int64_t task, void *scratch) {
  const pass *at = &r->passes[0];
  if (task >= at->tasks) {
    task -= at->tasks;
    ++at;
  }
  const fkda_problem *p = at->problem;
  const int64_t part = task % r->split, head = task / r->split % p->HV,
                position = task / r->split / p->HV;
  fkda_cpu_job job = {.problem = p,
                      .n = r->order ? r->order[position].n : position,
                      .head = head,
                      .v_begin = part * at->columns,
                      .v_end = (part + 1) * at->columns,
                      .identity = at->identity};
  if (job.v_end > p->V) job.v_end = p->V;
  if (job.v_begin >= job.v_end) return;
  if (r->checkpoint_rows) job.checkpoint_row = r->checkpoint_rows[job.n];
  if (p->op == FKDA_OP_DECODE)
    r->kernels->decode(&job);
  else
    r->kernels->prefill(&job, scratch);
}

static void worker(void *arg, int32_t index) {
  run *r = arg;
  void *scratch = r->scratch ? r->scratch + (size_t)index * r->scratch_size : NULL;
  const int64_t total = r->passes[0].tasks + r->passes[1].tasks;
  for (;;) {
    const int64_t first = atomic_fetch_add_explicit(&r->next, r->batch, memory_order_relaxed);
    if (first >= total) return;
    const int64_t last = first + r->batch < total ? first + r->batch : total;
    for (int64_t task = first; task < last; ++task) do_task(r, task, scratch);
  }
}

static void add_pass(run *r, int index, const fkda_problem *p, bool identity) {
  r->passes[index] =
      (pass){p, identity, part_columns(p->V, r->kernels->panel, r->split), p->N * p->HV * r->split};
}

static int longer_first(const void *left, const void *right) {
  const sequence_order *a = left, *b = right;
  if (a->length != b->length) return a->length < b->length ? 1 : -1;
  return a->n < b->n ? -1 : a->n > b->n;
}

static fkda_status launch_decode(const fkda_backend *self, const fkda_problem *p,
                                 const fkda_plan_t *plan) {
  run r = {.kernels = self->kernels, .split = plan->value_split};
  add_pass(&r, 0, p, false);
  r.batch = r.passes[0].tasks / (8 * (int64_t)plan->threads) + 1;
  fkda_pool_run(plan->threads, worker, &r);
  return FKDA_OK;
}

static fkda_status launch(const fkda_backend *self, const fkda_problem *p,
                          const fkda_plan_t *plan) {
  if (p->op == FKDA_OP_BACKWARD) return fkda_cpu_backward_launch(self->kernels, p, plan);
  if (p->N * p->HV == 0) return FKDA_OK;
  if (p->op == FKDA_OP_DECODE) return launch_decode(self, p, plan);

  char *heap = NULL, *workspace = p->workspace;
  if (!workspace) {
    workspace = heap = aligned_alloc(ALIGNMENT, align_up(plan->workspace_size));
    if (!heap)
      return fkda_fail(FKDA_ERROR_OUT_OF_MEMORY,
                       "workspace: %zu bytes of host memory not available", plan->workspace_size);
  }
  run r = {.kernels = self->kernels, .split = plan->value_split, .batch = 1};
  if (p->N > 1) {
    sequence_order *order = (sequence_order *)(void *)workspace;
    for (int64_t n = 0; n < p->N; ++n) order[n] = (sequence_order){fkda_span_of(p, n).length, n};
    if (p->cu_seqlens.data) qsort(order, (size_t)p->N, sizeof *order, longer_first);
    r.order = order;
  }
  if (p->checkpoints.mode == FKDA_CHECKPOINT_EVERY) {
    int64_t *rows = (int64_t *)(void *)(workspace + order_bytes(p)), sum = 0;
    for (int64_t n = 0; n < p->N; ++n) {
      rows[n] = sum;
      sum += ceil_div(fkda_span_of(p, n).length, p->checkpoints.every);
    }
    r.checkpoint_rows = rows;
  }
  r.scratch = workspace + order_bytes(p) + rows_bytes(p);
  r.scratch_size = r.kernels->prefill_scratch(p->K, widest_V(p));

  fkda_problem of_b = *p, of_M = *p;
  if (p->op == FKDA_OP_SUMMARY) {
    /* b: from zero, with v. M: from the identity, with v = 0; as many value rows as channels. */
    of_b.final = p->summary_b;
    of_M.final = p->summary_M;
    of_M.v = (fkda_rows){0};
    of_M.V = p->K;
    of_M.layout = FKDA_STATE_VK;
    add_pass(&r, 0, &of_b, false);
    add_pass(&r, 1, &of_M, true);
  } else {
    add_pass(&r, 0, p, false);
  }
  fkda_pool_run(plan->threads, worker, &r);
  free(heap);
  return FKDA_OK;
}

static fkda_status warmup(const fkda_backend *self, int32_t device_id) {
  (void)self, (void)device_id;
  fkda_pool_start();
  return FKDA_OK;
}

#define CPU_BACKEND(isa, available_function)                                                       \
  const fkda_backend fkda_backend_cpu_##isa = {                                                    \
      .name = "cpu-" #isa,                                                                         \
      .device_type = FKDA_DEVICE_CPU,                                                              \
      .kernels = &fkda_cpu_kernels_##isa,                                                          \
      .available = available_function,                                                             \
      .supports = supports,                                                                        \
      .plan = plan,                                                                                \
      .launch = launch,                                                                            \
      .warmup = warmup,                                                                            \
  }

#if defined(__x86_64__)
CPU_BACKEND(avx512, available_avx512);
CPU_BACKEND(avx2, available_avx2);
#elif defined(__aarch64__)
CPU_BACKEND(neon, available_always); /* part of the base instruction set */
#endif
CPU_BACKEND(scalar, available_always);
