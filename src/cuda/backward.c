/* Planning and launching the portable kernels of the backward (kernels/portable/backward_params.h): by themselves, or
 * behind the walk of the row "sm90" (backward_sm90.c). */
#include "cuda/backward.h"

#include <stdatomic.h>
#include <stddef.h>

#include "cuda/backend.h"
#include "run/backend.h"

/* ---- the kernels ------------------------------------------------------------------------------------ */

typedef enum stage { FACTORS, WALK, GRADIENTS, REDUCE, GROUP, STAGES } stage;

#define BY_K(X) FKDA_BACKWARD_BY_K(X)
#define BY_K_V(X) FKDA_BACKWARD_BY_K_V(X)
#define ENTRY(stage, size) "fkda_portable_backward_" #stage "_" #size

#define FACTORS_KERNEL(K) {"portable/backward_factors", ENTRY(factors, k##K)},
#define WALK_KERNEL(K) {"portable/backward_walk", ENTRY(walk, k##K)},
#define GRADIENTS_KERNEL(K, V) {"portable/backward_gradients", ENTRY(gradients, k##K##_v##V)},
#define REDUCE_KERNEL(K) {"portable/backward_reduce", ENTRY(reduce, k##K)},
#define GROUP_KERNEL(K) {"portable/backward_reduce", ENTRY(group, k##K)},

static const fkda_cuda_kernel table[] = {BY_K(FACTORS_KERNEL) BY_K(WALK_KERNEL) BY_K_V(
    GRADIENTS_KERNEL) BY_K(REDUCE_KERNEL) BY_K(GROUP_KERNEL)};

/* Of each: the stage, K, and its value columns where it is made for a number of them. */
#define FACTORS_SHAPE(K) {FACTORS, K, 0},
#define WALK_SHAPE(K) {WALK, K, 0},
#define GRADIENTS_SHAPE(K, V) {GRADIENTS, K, V},
#define REDUCE_SHAPE(K) {REDUCE, K, 0},
#define GROUP_SHAPE(K) {GROUP, K, 0},

static const struct {
  stage stage;
  int32_t K, columns;
} shapes[] = {BY_K(FACTORS_SHAPE) BY_K(WALK_SHAPE) BY_K_V(GRADIENTS_SHAPE) BY_K(REDUCE_SHAPE)
                  BY_K(GROUP_SHAPE)};

static int32_t kernel_of(stage stage, int32_t K, int32_t columns) {
  int32_t i = 0;
  while (shapes[i].stage != stage || shapes[i].K != K ||
         (shapes[i].columns && shapes[i].columns != columns))
    ++i;
  return i;
}

/* The walk's ring has as many stages, chunks, as there is shared memory for. */
#define LEAST_STAGES 2
#define MOST_STAGES 8
#define STATIC_SHARED 1024 /* bytes at most that the walk has beside it */
#define SYSTEM_SHARED 1024 /* bytes that a block on a processor costs besides */

static int32_t stages_in(int32_t shared, int32_t K) {
  const int32_t stages = (shared - STATIC_SHARED) / FKDA_BACKWARD_WALK_STAGE(K);
  return stages < MOST_STAGES ? stages : MOST_STAGES;
}

static int32_t shared_of(const fkda_cuda_device *device, int32_t kernel) {
  const int32_t K = shapes[kernel].K, columns = shapes[kernel].columns;
  switch (shapes[kernel].stage) {
    case WALK: return FKDA_BACKWARD_WALK_SHARED(K, stages_in(device->block_shared, K));
    case GRADIENTS:
      return FKDA_BACKWARD_GRADIENTS_SHARED(K, columns,
                                            FKDA_BACKWARD_GRADIENTS_STAGES(device->major));
    default: return 0;
  }
}

static fkda_cuda_kernels kernels = {
    .kernels = table,
    .count = (int32_t)(sizeof table / sizeof table[0]),
    .shared = shared_of,
};

/* ---- planning --------------------------------------------------------------------------------------- */

/* Which launches the gradients that are wanted need. */
typedef struct work {
  bool any, tokens, parameters, group; /* `tokens`: more than d_v and d_initial_state */
} work;

static work work_of(const fkda_problem *p) {
  work w = {.parameters = p->d_A_log.dtype || p->d_dt_bias.dtype};
  const bool keys = p->d_q.dtype || p->d_k.dtype;
  w.tokens = keys || p->d_g.dtype || p->d_beta.dtype || w.parameters;
  w.any = w.tokens || p->d_v.dtype || p->d_initial.dtype;
  w.group = keys && p->HV > p->H;
  return w;
}

static bool has_tokens(const fkda_problem *p, const work *wanted) { /* or may have */
  return wanted->any && p->B * p->T > 0 && p->N > 0;
}

bool fkda_cuda_backward_wants_any(const fkda_problem *p) { return work_of(p).any; }

int64_t fkda_cuda_backward_walks(const fkda_problem *p) {
  const work w = work_of(p);
  return p->N * p->HV * (w.tokens || !w.any ? 2 : 1);
}

/* A head's walk is a chain of chunks, in which only its value columns are independent: by parts of 64 of them, of
 * which a processor has registers for three. Each reads the head's factors. */
static int32_t split_of(const fkda_problem *p) { return (int32_t)p->V / FKDA_BACKWARD_WALK_PART; }

static int64_t rows_of(const fkda_problem *p) {
  return fkda_portable_backward_rows(p->B, p->T, p->N);
}

static int64_t walk_blocks(const fkda_problem *p) {
  return fkda_cuda_backward_walks(p) * split_of(p);
}

bool fkda_cuda_backward_supports(const fkda_problem *p, char *reason, size_t capacity) {
  const int64_t factors = 2 * rows_of(p) * p->HV, walk = walk_blocks(p);
  return fkda_cuda_supports(p, factors > walk ? factors : walk, reason, capacity);
}

void fkda_cuda_backward_plan(const fkda_problem *p, fkda_plan_t *plan) {
  plan->chunk = FKDA_BACKWARD_BLOCK;
  plan->value_split = split_of(p);
  plan->tasks = walk_blocks(p);
  plan->threads = (int32_t)plan->tasks;
  plan->workspace_size =
      (size_t)fkda_portable_backward_workspace(p->B, p->T, p->N, p->HV, p->K, p->V);
}

/* ---- running ---------------------------------------------------------------------------------------- */

static int32_t aligned_bf16(const fkda_rows *x) {
  return x->dtype == FKDA_BF16 && fkda_cuda_aligned(x);
}

static int32_t aligned(const fkda_rows *x) { return x->dtype && fkda_cuda_aligned(x); }

/* Where there are more blocks than processors, two or three share one as far as there is room. */
static int32_t stages_of(const fkda_cuda_device *device, int64_t blocks, int32_t K) {
  const int64_t processors = device->processors;
  int32_t together = 1 + (blocks > processors) + (blocks > 2 * processors);
  for (; together > 1; --together) {
    const int32_t room = device->processor_shared / together - SYSTEM_SHARED;
    if (stages_in(room, K) >= LEAST_STAGES) return stages_in(room, K);
  }
  return stages_in(device->block_shared, K);
}

fkda_portable_backward_params fkda_cuda_backward_params(const fkda_cuda_device *device,
                                                        const fkda_problem *p) {
  const work wanted = work_of(p);
  return (fkda_portable_backward_params){
      .problem = *p,
      .workspace = p->workspace,
      .rows = has_tokens(p, &wanted) ? rows_of(p) : 0,
      .value_split = split_of(p),
      .stages = stages_of(device, walk_blocks(p), (int32_t)p->K),
      .forward = wanted.tokens,
      .aligned_q = aligned_bf16(&p->q),
      .aligned_k = aligned_bf16(&p->k),
      .aligned_v = aligned_bf16(&p->v),
      .aligned_g = aligned_bf16(&p->g),
      .aligned_d_out = aligned_bf16(&p->d_out),
      .aligned_d_q = aligned(&p->d_q),
      .aligned_d_k = aligned(&p->d_k),
      .aligned_d_v = aligned(&p->d_v),
      .aligned_d_g = aligned(&p->d_g),
  };
}

/* Behind another walk, few: mostly they have nothing to do. */
static int64_t factors_blocks(const fkda_cuda_device *device,
                              const fkda_portable_backward_params *params) {
  const int64_t all = 2 * params->rows * params->problem.HV;
  const int64_t few = FKDA_BACKWARD_REDO_BLOCKS * (int64_t)device->processors;
  return params->redo && few < all ? few : all;
}

static int64_t gradients_blocks(const fkda_cuda_device *device,
                                const fkda_portable_backward_params *params) {
  const fkda_problem *p = &params->problem;
  const int64_t all = params->rows * p->HV;
  const bool loop = FKDA_BACKWARD_GRADIENTS_STAGES(device->major) > 1;
  return loop && device->processors < all ? device->processors : all;
}

fkda_status fkda_cuda_backward_launch_all(const fkda_cuda_driver *driver,
                                          fkda_portable_backward_params *params,
                                          const fkda_cuda_launch *first) {
  const fkda_problem *p = &params->problem;
  const work wanted = work_of(p);
  const bool some = has_tokens(p, &wanted), walks = wanted.any && walk_blocks(p) > 0;
  const int32_t K = (int32_t)p->K, V = (int32_t)p->V;
  const struct {
    stage stage;
    bool wanted;
    int32_t columns;
    int64_t blocks;
    int32_t threads, shared; /* shared 0: as the kernel has it */
  } stages[STAGES] = {
      {FACTORS, some, 0, factors_blocks(&driver->devices[p->device_id], params),
       FKDA_BACKWARD_FACTORS_THREADS, 0},
      {WALK, walks, 0, walk_blocks(p), FKDA_BACKWARD_WALK_THREADS,
       FKDA_BACKWARD_WALK_SHARED(K, params->stages)},
      {GRADIENTS, some && wanted.tokens, V,
       gradients_blocks(&driver->devices[p->device_id], params), FKDA_BACKWARD_GRADIENTS_THREADS(K),
       0},
      {REDUCE, wanted.parameters, 0, p->HV, FKDA_BACKWARD_REDUCE_THREADS(K), 0},
      {GROUP, some && wanted.group, 0, params->rows * p->H, FKDA_BACKWARD_GROUP_THREADS, 0},
  };
  fkda_cuda_launch launches[1 + STAGES];
  int32_t count = 0;
  if (first && walks) launches[count++] = *first;
  for (int i = 0; i < STAGES; ++i)
    if (stages[i].wanted)
      launches[count++] = (fkda_cuda_launch){
          .kernels = &kernels,
          .kernel = kernel_of(stages[i].stage, K, stages[i].columns),
          .blocks = (uint32_t)stages[i].blocks,
          .threads = (uint32_t)stages[i].threads,
          .shared = (uint32_t)stages[i].shared,
          .params = params,
      };
  return fkda_cuda_launch_all(driver, p->device_id, p->stream, launches, count);
}

fkda_status fkda_cuda_backward_launch(const fkda_problem *p) {
  char reason[FKDA_REASON_CAPACITY];
  const fkda_cuda_driver *driver = fkda_cuda_driver_get(reason, sizeof reason);
  if (!driver) return fkda_fail(FKDA_ERROR_NO_DEVICE, "%s", reason);
  fkda_portable_backward_params params =
      fkda_cuda_backward_params(&driver->devices[p->device_id], p);
  return fkda_cuda_backward_launch_all(driver, &params, NULL);
}

fkda_status fkda_cuda_backward_warmup(int32_t device_id) {
  return fkda_cuda_kernels_load(&kernels, fkda_cuda_driver_get(NULL, 0), device_id);
}
