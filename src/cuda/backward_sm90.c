/* Planning and launching the backward of the row "sm90": its walks (kernels/sm90/backward_params.h), and behind them the
 * portable kernels, which do the rest, the heads included that the walks have left. */
#include <stdatomic.h>
#include <stddef.h>

#include "cuda/backend.h"
#include "cuda/backward.h"
#include "cuda/kernels/sm90/backward_params.h"
#include "cuda/tensor_map.h"
#include "run/backend.h"

/* ---- the kernels ------------------------------------------------------------------------------------ */

#define KERNEL(K, part, bounded, suffix)                                                           \
  {"sm90/backward_walk", "fkda_sm90_backward_walk_k" #K "_v" #part #suffix},
#define SHAPE(K, part, bounded, suffix) {K, part, bounded},

/* Pairs of blocks, which halve V, have the last. */
static const fkda_cuda_kernel table[] = {FKDA_SM90_BACKWARD_LIST(KERNEL)
                                             FKDA_SM90_BACKWARD_PAIR_LIST(KERNEL)};
static const struct {
  int32_t K, part, bounded;
} shapes[] = {FKDA_SM90_BACKWARD_LIST(SHAPE) FKDA_SM90_BACKWARD_PAIR_LIST(SHAPE)};

#define COUNT(array) ((int32_t)(sizeof(array) / sizeof(array)[0]))
#define ONE(...) +1
#define SINGLES (0 FKDA_SM90_BACKWARD_LIST(ONE))

static int32_t shared_of(const fkda_cuda_device *device, int32_t kernel) {
  (void)device, (void)kernel;
  return FKDA_SM90_PREFILL_SHARED;
}

static fkda_cuda_kernels kernels = {.kernels = table, .count = COUNT(table), .shared = shared_of};

/* supports() and plan() let nothing come here that has no kernel. */
static int32_t kernel_of(const fkda_problem *p, int64_t split) {
  const bool bounded = p->gate == FKDA_GATE_BOUNDED;
  int32_t i = split == 2 ? SINGLES : 0;
  while (shapes[i].K != p->K || shapes[i].part != p->V / split || shapes[i].bounded != bounded) ++i;
  return i;
}

#define ROWS(name, heads, dim) FKDA_CUDA_MAPPED(fkda_sm90_backward_params, name, heads, dim)
static const fkda_cuda_mapped mapped[] = {ROWS(q, H, K),  ROWS(k, H, K),      ROWS(v, HV, V),
                                          ROWS(g, HV, K), ROWS(d_out, HV, V), ROWS(d_v, HV, V)};

/* ---- planning --------------------------------------------------------------------------------------- */

/* Value columns in two parts repeat what does not depend on them, which pays while there are processors left over. */
static int32_t split_of(const fkda_problem *p) {
  return p->V == 128 && 2 * fkda_cuda_backward_walks(p) <= FKDA_CUDA_PROCESSORS ? 2 : 1;
}

bool fkda_cuda_backward_sm90_supports(const fkda_problem *p, char *reason, size_t capacity) {
  if (!fkda_cuda_backward_supports(p, reason, capacity)) return false;
  for (int32_t i = 0; i < COUNT(mapped); ++i) {
    const int32_t dtype = fkda_cuda_mapped_rows(p, &mapped[i])->dtype;
    if (dtype != FKDA_NONE && dtype != FKDA_BF16)
      return fkda_refuse(reason, capacity, "%s: %s, expected bfloat16", mapped[i].name,
                         fkda_dtype_string(dtype));
  }
  if (fkda_cuda_backward_wants_any(p) && p->d_out.dtype == FKDA_NONE)
    return fkda_refuse(reason, capacity, "d_out: absent, expected bfloat16");
  return fkda_cuda_can_be_mapped(p, mapped, COUNT(mapped), FKDA_BACKWARD_BLOCK, reason, capacity);
}

void fkda_cuda_backward_sm90_plan(const fkda_problem *p, fkda_plan_t *plan) {
  plan->chunk = FKDA_BACKWARD_BLOCK;
  plan->value_split = split_of(p);
  plan->tasks = fkda_cuda_backward_walks(p) * plan->value_split;
  plan->threads = /* blocks, each of which does tasks in turn: on a full Hopper */
      (int32_t)(plan->tasks < FKDA_CUDA_PROCESSORS ? plan->tasks : FKDA_CUDA_PROCESSORS);
  plan->workspace_size = (size_t)fkda_sm90_backward_workspace(p->B, p->T, p->N, p->HV, p->K, p->V);
}

/* ---- running ---------------------------------------------------------------------------------------- */

static fkda_status make_maps(const fkda_cuda_driver *driver, void *of) {
  fkda_sm90_backward_params *params = of;
  return fkda_cuda_make_maps(driver, &params->backward.problem, mapped, COUNT(mapped), params);
}

fkda_status fkda_cuda_backward_sm90_launch(const fkda_problem *p, const fkda_plan_t *plan) {
  char reason[FKDA_REASON_CAPACITY];
  const fkda_cuda_driver *driver = fkda_cuda_driver_get(reason, sizeof reason);
  if (!driver) return fkda_fail(FKDA_ERROR_NO_DEVICE, "%s", reason);
  const fkda_cuda_device *device = &driver->devices[p->device_id];
  const int32_t processors = device->processors; /* a block fills one */
  fkda_sm90_backward_params params = {
      .backward = fkda_cuda_backward_params(device, p),
      .value_split = plan->value_split,
  };
  params.backward.redo =
      (uint32_t *)(void *)((char *)p->workspace +
                           fkda_portable_backward_workspace(p->B, p->T, p->N, p->HV, p->K, p->V));
  const int32_t kernel = kernel_of(p, plan->value_split);
  const bool pairs = kernel >= SINGLES;
  const int32_t most = pairs ? processors / 2 * 2 : processors;
  const fkda_cuda_launch walk = {
      .kernels = &kernels,
      .kernel = kernel,
      .blocks = (uint32_t)(plan->tasks < most ? plan->tasks : most),
      .threads = pairs ? FKDA_SM90_PAIR_THREADS : FKDA_SM90_PREFILL_THREADS,
      .params = &params,
      .prepare = make_maps,
  };
  return fkda_cuda_backward_launch_all(driver, &params.backward, &walk);
}

fkda_status fkda_cuda_backward_sm90_warmup(int32_t device_id) {
  const fkda_status status =
      fkda_cuda_kernels_load(&kernels, fkda_cuda_driver_get(NULL, 0), device_id);
  return status ? status : fkda_cuda_backward_warmup(device_id);
}
