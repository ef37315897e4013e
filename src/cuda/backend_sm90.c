/* The backend row "sm90": prefill and backward on Hopper's tensor cores and copy engine (kernels/sm90). */
#include <stdatomic.h>
#include <stddef.h>

#include "cuda/backend.h"
#include "cuda/backward.h"
#include "cuda/kernels/sm90/params.h"
#include "cuda/module.h"
#include "cuda/tensor_map.h"
#include "run/backend.h"

/* Machine code of sm_90a runs on 9.0 and on nothing else. */
static const fkda_cuda_capabilities capabilities = {90, 90};

/* ---- the kernels ------------------------------------------------------------------------------------ */

#define IMAGE "sm90/prefill"
#define KERNEL(K, part, gate_dtype, bounded, suffix)                                               \
  {IMAGE, "fkda_sm90_prefill_k" #K "_v" #part #suffix},
#define SHAPE(K, part, gate_dtype, bounded, suffix) {K, part, gate_dtype, bounded},

/* The pairs' kernels behind those of single blocks. */
static const fkda_cuda_kernel table[] = {FKDA_SM90_PREFILL_LIST(KERNEL)
                                             FKDA_SM90_PAIR_LIST(KERNEL)};
static const struct {
  int32_t K, part, gate_dtype, bounded;
} shapes[] = {FKDA_SM90_PREFILL_LIST(SHAPE) FKDA_SM90_PAIR_LIST(SHAPE)};
#define ONE(...) +1
#define SINGLES (0 FKDA_SM90_PREFILL_LIST(ONE))

#define KERNELS ((int32_t)(sizeof table / sizeof table[0]))

static int32_t shared_of(const fkda_cuda_device *device, int32_t kernel) {
  (void)device, (void)kernel;
  return FKDA_SM90_PREFILL_SHARED;
}

static fkda_cuda_kernels kernels = {.kernels = table, .count = KERNELS, .shared = shared_of};

static int32_t find(const fkda_problem *p, int64_t part, int32_t i, int32_t end) {
  const bool bounded = p->gate == FKDA_GATE_BOUNDED;
  while (i < end && (shapes[i].K != p->K || shapes[i].part != part ||
                     shapes[i].gate_dtype != p->g.dtype || shapes[i].bounded != bounded))
    ++i;
  return i;
}

/* Of blocks that do V / split columns, in pairs where there is such a kernel. supports() and plan() let nothing come here that
 * has no kernel. */
static int32_t kernel_of(const fkda_problem *p, int64_t split) {
  const int32_t pair = split == 2 ? find(p, p->V / 2, SINGLES, KERNELS) : KERNELS;
  return pair < KERNELS ? pair : find(p, p->V / split, 0, SINGLES);
}

#define ROWS(name, heads, dim) FKDA_CUDA_MAPPED(fkda_sm90_params, name, heads, dim)
static const fkda_cuda_mapped mapped[] = {ROWS(q, H, K), ROWS(k, H, K), ROWS(v, HV, V),
                                          ROWS(g, HV, K), ROWS(out, HV, V)};
#define MAPPED ((int32_t)(sizeof mapped / sizeof mapped[0]))

/* ---- what can run where? ---------------------------------------------------------------------------- */

static bool on_device(const fkda_backend *self, int32_t device_id, char *reason, size_t capacity) {
  (void)self;
  return fkda_cuda_on_device(&capabilities, device_id, reason, capacity);
}

static bool available(const fkda_backend *self, char *reason, size_t capacity) {
  (void)self;
  if (!fkda_cuda_available(&capabilities, reason, capacity)) return false;
  if (!fkda_cuda_image_of(IMAGE))
    return fkda_refuse(reason, capacity,
                       "this build has no kernels for compute capability 9.0 "
                       "(FLASHKDA_CUDA_ARCHITECTURES)");
  if (!fkda_cuda_driver_get(NULL, 0)->api.tensor_map_encode_tiled)
    return fkda_refuse(reason, capacity,
                       "the NVIDIA driver is too old: it has no cuTensorMapEncodeTiled");
  return true;
}

/* What a pair of blocks takes for a chunk of both halves of V, and a block for one of all of V, as long as it has but one long
 * sequence to do: measured, docs/kernels/prefill_sm90.md. */
enum { PAIR_TIME = 63, BLOCK_TIME = 100 };

/* Sequences of one length that do not come out even: is the call faster when pairs have equal shares of them, and some
 * sequences are cut in two? Plans are made without data, too: cu_seqlens is there if it has a dtype. */
static bool has_equal_shares(const fkda_problem *p, int32_t processors) {
  const int64_t rows = p->N * p->HV, pairs = processors / 2;
  const int64_t chunks = (p->T + FKDA_SM90_CHUNK - 1) / FKDA_SM90_CHUNK;
  const int64_t cost = chunks + FKDA_SM90_STATE_COST;
  if (p->V != 128 || p->g.dtype != FKDA_BF16 || p->cu_seqlens.dtype != FKDA_NONE ||
      p->checkpoints.mode != FKDA_CHECKPOINT_NONE || rows <= pairs ||
      chunks < INT64_C(2) * FKDA_SM90_LEAST_REST || rows > UINT32_MAX / pairs / cost)
    return false;
  const int64_t share = rows * cost / pairs + INT64_C(2) * FKDA_SM90_STATE_COST;
  const int64_t whole = (rows + processors - 1) / processors * cost;
  return PAIR_TIME * share < BLOCK_TIME * whole;
}

/* A head's value columns do not depend on one another, so that a block may own a part of them; results
 * are the same to the bit. It pays while there are processors left over. */
static int32_t split_of(const fkda_problem *p) {
  return p->V == 128 && (2 * p->N * p->HV <= FKDA_CUDA_PROCESSORS ||
                         has_equal_shares(p, FKDA_CUDA_PROCESSORS))
             ? 2
             : 1;
}

/* 24 bits of `n` in four bfloat16 that no result is: signaling NaNs, which no instruction makes. */
static uint64_t mark_of(uint32_t n) {
  uint64_t mark = 0;
  for (int32_t i = 0; i < 4; ++i)
    mark = mark << 16 | 0x7f81u | (n >> 5 * i & 31) << 1 | (n >> (20 + i) & 1) << 15;
  return mark;
}

/* More tasks than that, but is one of the sequences perhaps so long that its tasks outlast all others, while processors
 * are left over after all? Lengths are known on the device only. */
static bool by_lengths(const fkda_problem *p) {
  return p->V == 128 && split_of(p) == 1 && p->cu_seqlens.data && p->N <= FKDA_SM90_MAX_SORTED &&
         2 * p->HV <= FKDA_CUDA_PROCESSORS;
}

static bool supports(const fkda_backend *self, const fkda_problem *p, char *reason,
                     size_t capacity) {
  (void)self;
  if (p->op == FKDA_OP_BACKWARD) return fkda_cuda_backward_sm90_supports(p, reason, capacity);
  if (p->op != FKDA_OP_PREFILL)
    return fkda_refuse(reason, capacity, "has kernels for prefill and backward only");
  return fkda_cuda_supports(p, p->N * p->HV * split_of(p), reason, capacity) &&
         fkda_cuda_can_be_mapped(p, mapped, MAPPED, FKDA_SM90_CHUNK, reason, capacity);
}

/* ---- planning --------------------------------------------------------------------------------------- */

static void plan(const fkda_backend *self, const fkda_problem *p, fkda_plan_t *plan) {
  (void)self;
  if (p->op == FKDA_OP_BACKWARD) {
    fkda_cuda_backward_sm90_plan(p, plan);
    return;
  }
  plan->chunk = FKDA_SM90_CHUNK;
  plan->value_split = split_of(p);
  plan->tasks = p->N * p->HV * plan->value_split;
  plan->threads = /* blocks, each of which does tasks in turn: on a full Hopper */
      (int32_t)(plan->tasks < FKDA_CUDA_PROCESSORS ? plan->tasks : FKDA_CUDA_PROCESSORS);
  plan->workspace_size = 0;
}

/* ---- running ---------------------------------------------------------------------------------------- */

static fkda_status make_maps(const fkda_cuda_driver *driver, void *of) {
  fkda_sm90_params *params = of;
  return fkda_cuda_make_maps(driver, &params->problem, mapped, MAPPED, params);
}

/* The second of two launches, from what the first has before it. */
static fkda_status halve(const fkda_cuda_driver *driver, void *of) {
  (void)driver;
  fkda_sm90_params *params = of;
  *params = params[-1];
  params->value_split = 2;
  return FKDA_OK;
}

static fkda_status launch(const fkda_backend *self, const fkda_problem *p,
                          const fkda_plan_t *plan) {
  (void)self;
  if (p->op == FKDA_OP_BACKWARD) return fkda_cuda_backward_sm90_launch(p, plan);
  if (plan->tasks == 0) return FKDA_OK; /* no sequence: nothing to write */
  char reason[FKDA_REASON_CAPACITY];
  const fkda_cuda_driver *driver = fkda_cuda_driver_get(reason, sizeof reason);
  if (!driver) return fkda_fail(FKDA_ERROR_NO_DEVICE, "%s", reason);

  const int32_t processors = driver->devices[p->device_id].processors; /* a block fills one */
  static atomic_uint calls;
  const bool shares = plan->value_split == 2 && has_equal_shares(p, processors);
  fkda_sm90_params params[2] = {
      {.problem = *p,
       .value_split = plan->value_split,
       .by_lengths = by_lengths(p) ? processors : 0,
       .equal_shares = shares,
       .mark = shares ? mark_of(atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed)) : 0}};
  fkda_cuda_launch launches[2];
  const int32_t count = params[0].by_lengths ? 2 : 1;
  for (int32_t i = 0; i < count; ++i) {
    const int64_t split = plan->value_split << i, tasks = plan->tasks << i;
    const int32_t kernel = kernel_of(p, split);
    const bool pairs = kernel >= SINGLES;
    const int32_t most = pairs ? processors / 2 * 2 : processors;
    launches[i] = (fkda_cuda_launch){
        .kernels = &kernels,
        .kernel = kernel,
        .blocks = (uint32_t)(tasks < most ? tasks : most),
        .threads = pairs ? FKDA_SM90_PAIR_THREADS : FKDA_SM90_PREFILL_THREADS,
        .params = &params[i],
        .prepare = i ? halve : make_maps,
    };
  }
  return fkda_cuda_launch_all(driver, p->device_id, p->stream, launches, count);
}

static fkda_status warmup(const fkda_backend *self, int32_t device_id) {
  (void)self;
  const fkda_status status = fkda_cuda_warmup(&capabilities, &kernels, device_id);
  return status ? status : fkda_cuda_backward_sm90_warmup(device_id);
}

const fkda_backend fkda_backend_cuda_sm90 = {
    .name = "sm90",
    .device_type = FKDA_DEVICE_CUDA,
    .available = available,
    .on_device = on_device,
    .supports = supports,
    .plan = plan,
    .launch = launch,
    .warmup = warmup,
};
