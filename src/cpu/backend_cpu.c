/* The CPU rows of the backend table: one for each instruction set, over kernels.h. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "cpu/kernels.h"
#include "cpu/pipeline.h"
#include "cpu/pool.h"
#include "run/backend.h"

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

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Decode: into how many parts of V should a head be cut, so that `heads` of them keep `threads` busy
 * longest? Each part loads and activates the tokens again, about a tenth of a whole head's time. */
static int32_t choose_split(int64_t heads, int64_t panels, int32_t threads) {
  int32_t best = 1;
  double best_time = 0;
  for (int32_t split = 1; split <= panels; ++split) {
    if (panels % split) continue;
    const int64_t rounds = ceil_div(heads * split, threads);
    const double time = (double)rounds * (0.1 + 0.9 / split);
    if (split == 1 || time < 0.97 * best_time) {
      best = split;
      best_time = time;
    }
    if (heads * split >= 8 * (int64_t)threads) break;
  }
  return best;
}

/* Prefill by pipeline: into how many parts, so that there are enough for all threads but those that make the
 * factors, a quarter of the work? More parts than panels only where these do not suffice. */
static int32_t pipeline_split(const fkda_cpu_kernels *kernels, int64_t V, int64_t streams,
                              int32_t threads) {
  const int64_t wanted = ceil_div(3 * (int64_t)threads, 4 * streams);
  const int64_t panels = ceil_div(V, kernels->panel), each = panels / (wanted > 2 ? wanted : 2);
  return (int32_t)(each ? ceil_div(panels, each) : ceil_div(V, kernels->lanes));
}

/* Value columns of each of `split` parts: a multiple of the panel, or narrower than one. */
static int64_t part_columns(const fkda_cpu_kernels *kernels, int64_t V, int32_t split) {
  const int64_t panels = ceil_div(V, kernels->panel);
  return split <= panels ? ceil_div(panels, split) * kernels->panel : kernels->lanes;
}

typedef struct sequence_order {
  int64_t length, n;
} sequence_order;

/* Workspace of a prefill: longest-first order, checkpoint rows, then what the threads work in. Sized for
 * all threads, all of V and either way of sharing out the work, so that it grows with the arguments
 * alone. */
static size_t order_bytes(const fkda_problem *p) {
  return fkda_cpu_align_up((size_t)p->N * sizeof(sequence_order));
}
static size_t rows_bytes(const fkda_problem *p) {
  return p->checkpoints.mode == FKDA_CHECKPOINT_EVERY
             ? fkda_cpu_align_up((size_t)p->N * sizeof(int64_t))
             : 0;
}
static int64_t widest_V(const fkda_problem *p) {
  return p->op == FKDA_OP_SUMMARY && p->K > p->V ? p->K : p->V;
}
static size_t thread_bytes(const fkda_cpu_kernels *kernels, const fkda_problem *p) {
  return kernels->state_size(p->K, widest_V(p)) + kernels->scratch_size(p->K, widest_V(p));
}

#define SERIAL_TOKENS 16         /* (token, head) pairs below which waking a thread costs more */
#define PIPELINE_TOKENS 64       /* the same for sharing a head */
#define SERIAL_BYTES (256 << 10) /* the same for decode's state traffic */

static void plan_decode(const fkda_cpu_kernels *kernels, const fkda_problem *p, int32_t threads,
                        fkda_plan_t *plan) {
  const int64_t heads = p->N * p->HV;
  const bool small = heads * p->K * p->V * 8 < SERIAL_BYTES;
  plan->chunk = 1;
  plan->workspace_size = 0;
  plan->value_split = small ? 1 : choose_split(heads, ceil_div(p->V, kernels->panel), threads);
  plan->tasks = heads * plan->value_split;
  plan->threads = small || plan->tasks < 1 ? 1
                  : plan->tasks < threads  ? (int32_t)plan->tasks
                                           : threads;
}

/* Heads are shared (value_split > 1) where whole ones would leave a tenth of the threads' time idle. */
static void plan_prefill(const fkda_cpu_kernels *kernels, const fkda_problem *p, int32_t threads,
                         fkda_plan_t *plan) {
  const int64_t streams = p->N * p->HV * (p->op == FKDA_OP_SUMMARY ? 2 : 1);
  const int64_t tokens = p->B * p->T * p->HV, rounds = ceil_div(streams, threads);
  plan->chunk = FKDA_CPU_CHUNK;
  plan->workspace_size = order_bytes(p) + rows_bytes(p);
  plan->workspace_size += threads == 1 ? thread_bytes(kernels, p)
                                       : fkda_pipeline_memory(kernels, p->K, widest_V(p), threads);
  plan->value_split = 1;
  if (streams > 0 && tokens >= PIPELINE_TOKENS && 10 * streams < 9 * rounds * threads)
    plan->value_split = pipeline_split(kernels, p->V, streams, threads);
  plan->tasks = streams * plan->value_split;
  /* For each three parts a thread that makes their factors. */
  const int64_t useful = plan->value_split > 1 ? ceil_div(4 * plan->tasks, 3) : streams;
  plan->threads = tokens < SERIAL_TOKENS || useful < 1 ? 1
                  : useful < threads                   ? (int32_t)useful
                                                       : threads;
}

static void plan(const fkda_backend *self, const fkda_problem *p, fkda_plan_t *plan) {
  const int32_t threads = fkda_pool_threads();
  if (p->op == FKDA_OP_BACKWARD)
    fkda_cpu_backward_plan(self->kernels, p, plan);
  else if (p->op == FKDA_OP_DECODE)
    plan_decode(self->kernels, p, threads, plan);
  else
    plan_prefill(self->kernels, p, threads, plan);
}

/* ---- running ---------------------------------------------------------------------------------------- */

typedef struct run {
  const fkda_cpu_kernels *kernels;
  const fkda_problem *passes[2];  /* over all sequences and heads; the second: summary's M */
  int64_t streams;                /* sequences and heads of both */
  int32_t split;                  /* decode: parts of V */
  int64_t columns;                /* and value columns of each */
  const sequence_order *order;    /* NULL: sequence numbers as they come */
  const int64_t *checkpoint_rows; /* NULL: none by interval */
  char *memory;                   /* a state and a scratch for each thread; decode: NULL */
  size_t state_size, thread_size;
  int64_t batch; /* tasks claimed at a time */
  int64_t tasks;
  atomic_int_least64_t next;
} run;

/* The job of one sequence and head, all of V; false if the sequence is skipped. */
static bool stream_at(const void *context, int64_t index, fkda_cpu_job *job) {
  const run *r = context;
  const int64_t per_pass = r->passes[0]->N * r->passes[0]->HV;
  const fkda_problem *p = r->passes[index / per_pass];
  const int64_t head = index % p->HV, position = index % per_pass / p->HV;
  *job = (fkda_cpu_job){.problem = p,
                        .n = r->order ? r->order[position].n : position,
                        .head = head,
                        .v_end = p->V,
                        .identity = index >= per_pass};
  if (r->checkpoint_rows) job->checkpoint_row = r->checkpoint_rows[job->n];
  return p->op == FKDA_OP_DECODE || (fkda_index_of(&p->initial_indices, job->n, 0) >= 0 &&
                                     fkda_index_of(&p->final_indices, job->n, 0) >= 0);
}

static void do_task(const run *r, int64_t task, char *memory) {
  fkda_cpu_job job;
  if (!stream_at(r, task / r->split, &job)) return;
  if (job.problem->op != FKDA_OP_DECODE) {
    r->kernels->prefill(&job, memory, memory + r->state_size);
    return;
  }
  job.v_begin = task % r->split * r->columns;
  if (job.v_begin + r->columns < job.v_end) job.v_end = job.v_begin + r->columns;
  if (job.v_begin < job.v_end) r->kernels->decode(&job);
}

static void worker(void *arg, int32_t index) {
  run *r = arg;
  char *memory = r->memory ? r->memory + (size_t)index * r->thread_size : NULL;
  for (;;) {
    const int64_t first = atomic_fetch_add_explicit(&r->next, r->batch, memory_order_relaxed);
    if (first >= r->tasks) return;
    const int64_t last = first + r->batch < r->tasks ? first + r->batch : r->tasks;
    for (int64_t task = first; task < last; ++task) do_task(r, task, memory);
  }
}

static int longer_first(const void *left, const void *right) {
  const sequence_order *a = left, *b = right;
  if (a->length != b->length) return a->length < b->length ? 1 : -1;
  return a->n < b->n ? -1 : a->n > b->n;
}

static fkda_status launch_decode(const fkda_backend *self, const fkda_problem *p,
                                 const fkda_plan_t *plan) {
  const fkda_cpu_kernels *kernels = self->kernels;
  run r = {.kernels = kernels,
           .passes = {p},
           .split = plan->value_split,
           .columns = part_columns(kernels, p->V, plan->value_split),
           .tasks = plan->tasks,
           .batch = plan->tasks / (8 * (int64_t)plan->threads) + 1};
  fkda_pool_run(plan->threads, worker, &r);
  return FKDA_OK;
}

/* Prefill and summary. */
static fkda_status launch_prefill(const fkda_cpu_kernels *kernels, const fkda_problem *p,
                                  const fkda_plan_t *plan, char *workspace) {
  run r = {.kernels = kernels, .split = 1, .batch = 1};
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
  r.memory = workspace + order_bytes(p) + rows_bytes(p);

  fkda_problem of_b = *p, of_M = *p;
  r.passes[0] = p;
  r.streams = p->N * p->HV;
  if (p->op == FKDA_OP_SUMMARY) {
    /* b: from zero, with v. M: from the identity, with v = 0; as many value rows as channels. */
    of_b.final = p->summary_b;
    of_M.final = p->summary_M;
    of_M.v = (fkda_rows){0};
    of_M.V = p->K;
    of_M.layout = FKDA_STATE_VK;
    r.passes[0] = &of_b;
    r.passes[1] = &of_M;
    r.streams *= 2;
  }
  if (plan->value_split > 1) {
    fkda_pipeline_run(
        &(fkda_pipeline_args){.kernels = kernels,
                              .K = p->K,
                              .V = widest_V(p),
                              .streams = r.streams,
                              .stream_at = stream_at,
                              .context = &r,
                              .columns = part_columns(kernels, p->V, plan->value_split),
                              .threads = plan->threads,
                              .memory = r.memory});
  } else {
    r.tasks = r.streams;
    r.state_size = kernels->state_size(p->K, widest_V(p));
    r.thread_size = thread_bytes(kernels, p);
    fkda_pool_run(plan->threads, worker, &r);
  }
  return FKDA_OK;
}

static fkda_status launch(const fkda_backend *self, const fkda_problem *p,
                          const fkda_plan_t *plan) {
  const bool backward = p->op == FKDA_OP_BACKWARD;
  if (!backward && p->N * p->HV == 0) return FKDA_OK;
  if (p->op == FKDA_OP_DECODE) return launch_decode(self, p, plan);

  char *heap = NULL, *workspace = p->workspace;
  if (!workspace) {
    workspace = heap = aligned_alloc(FKDA_CPU_ALIGNMENT, fkda_cpu_align_up(plan->workspace_size));
    if (!heap)
      return fkda_fail(FKDA_ERROR_OUT_OF_MEMORY,
                       "workspace: %zu bytes of host memory not available", plan->workspace_size);
  }
  const fkda_status status = backward ? fkda_cpu_backward_launch(self->kernels, p, plan, workspace)
                                      : launch_prefill(self->kernels, p, plan, workspace);
  free(heap);
  return status;
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
