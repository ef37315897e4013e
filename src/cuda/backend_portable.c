/* The backend row "portable": mma.sync kernels for every GPU since Ampere (kernels/portable). */
#include <stdatomic.h>
#include <stddef.h>

#include "cuda/backend.h"
#include "cuda/backward.h"
#include "cuda/kernels/portable/params.h"
#include "cuda/module.h"
#include "run/backend.h"

static const fkda_cuda_capabilities capabilities = {80, FKDA_CUDA_AND_NEWER};

/* ---- the kernels ------------------------------------------------------------------------------------ */

#define PREFILL_KERNEL(K, part) {"portable/prefill", "fkda_portable_prefill_k" #K "_v" #part},
#define PREFILL_SHAPE(K, part) {K, part, FKDA_PORTABLE_PREFILL_SHARED(K, part)},
#define DECODE_KERNEL(layout, K) {"portable/decode", "fkda_portable_decode_" #layout "_k" #K},
#define DECODE_SHAPE(layout, K) {LAYOUT_##layout, K},
#define LAYOUT_vk FKDA_STATE_VK
#define LAYOUT_kv FKDA_STATE_KV

static const fkda_cuda_kernel table[] = {FKDA_PORTABLE_PREFILL_LIST(PREFILL_KERNEL)
                                             FKDA_PORTABLE_DECODE_LIST(DECODE_KERNEL)};
static const struct {
  int32_t K, part, shared;
} prefill_shapes[] = {FKDA_PORTABLE_PREFILL_LIST(PREFILL_SHAPE)};
static const struct {
  fkda_state_layout layout;
  int32_t K;
} decode_shapes[] = {FKDA_PORTABLE_DECODE_LIST(DECODE_SHAPE)};

#define COUNT(array) ((int32_t)(sizeof(array) / sizeof(array)[0]))
#define PREFILL_KERNELS COUNT(prefill_shapes)

static int32_t shared_of(const fkda_cuda_device *device, int32_t kernel) {
  (void)device;
  return kernel < PREFILL_KERNELS ? prefill_shapes[kernel].shared : 0;
}

static fkda_cuda_kernels kernels = {.kernels = table, .count = COUNT(table), .shared = shared_of};

/* supports() and plan() let nothing come here that has no kernel. */
static int32_t prefill_kernel(int64_t K, int64_t part) {
  int32_t i = 0;
  while (prefill_shapes[i].K != K || prefill_shapes[i].part != part) ++i;
  return i;
}

static int32_t decode_kernel(int64_t K, fkda_state_layout layout) {
  int32_t i = 0;
  while (decode_shapes[i].K != K || decode_shapes[i].layout != layout) ++i;
  return PREFILL_KERNELS + i;
}

/* ---- what can run where? ---------------------------------------------------------------------------- */

static bool on_device(const fkda_backend *self, int32_t device_id, char *reason, size_t capacity) {
  (void)self;
  return fkda_cuda_on_device(&capabilities, device_id, reason, capacity);
}

static bool available(const fkda_backend *self, char *reason, size_t capacity) {
  (void)self;
  return fkda_cuda_available(&capabilities, reason, capacity);
}

/* A head's value columns do not depend on one another, so that a block may own a part of them; results
 * are the same to the bit. In prefill each part repeats the factors (8)-(10), which pays where there
 * are too few heads to give every processor one: parts of 32 columns while each has a processor of its
 * own, parts of 64 below two thirds of the processors. */

static int32_t split_of(const fkda_problem *p) {
  if (p->op == FKDA_OP_DECODE)
    return fkda_portable_decode_split(p->N, p->HV, p->V, FKDA_CUDA_PROCESSORS);
  const int64_t heads = p->N * p->HV;
  if (heads * (p->V / 32) <= FKDA_CUDA_PROCESSORS) return (int32_t)(p->V / 32);
  return p->V == 128 && 3 * heads < 2 * (int64_t)FKDA_CUDA_PROCESSORS ? 2 : 1;
}

static bool supports(const fkda_backend *self, const fkda_problem *p, char *reason,
                     size_t capacity) {
  (void)self;
  if (p->op == FKDA_OP_SUMMARY)
    return fkda_refuse(reason, capacity, "has kernels for prefill, decode and backward only");
  if (p->op == FKDA_OP_BACKWARD) return fkda_cuda_backward_supports(p, reason, capacity);
  if (p->op == FKDA_OP_DECODE && p->final.dtype != FKDA_NONE &&
      p->initial.stride_row != p->final.stride_row)
    return fkda_refuse(reason, capacity,
                       "initial_state, state: rows %lld and %lld elements apart, expected the same",
                       (long long)p->initial.stride_row, (long long)p->final.stride_row);
  return fkda_cuda_supports(p, p->N * p->HV * split_of(p), reason, capacity);
}

/* ---- planning --------------------------------------------------------------------------------------- */

static void plan(const fkda_backend *self, const fkda_problem *p, fkda_plan_t *plan) {
  (void)self;
  if (p->op == FKDA_OP_BACKWARD) {
    fkda_cuda_backward_plan(p, plan);
    return;
  }
  plan->chunk = p->op == FKDA_OP_DECODE ? 1 : FKDA_PORTABLE_CHUNK;
  plan->value_split = split_of(p);
  plan->tasks = p->N * p->HV * plan->value_split;
  plan->threads = (int32_t)plan->tasks;
  plan->workspace_size = 0;
}

/* ---- running ---------------------------------------------------------------------------------------- */

/* The pool: groups of four elements along a row. */
static int32_t aligned_by_four(const fkda_states *x) {
  const uint64_t size = fkda_dtype_size(x->dtype);
  return (uint64_t)(uintptr_t)x->data % (4 * size) == 0 &&
         (x->stride_slot | x->stride_head | x->stride_row) % 4 == 0;
}

static fkda_status launch(const fkda_backend *self, const fkda_problem *p,
                          const fkda_plan_t *plan) {
  (void)self;
  if (p->op == FKDA_OP_BACKWARD) return fkda_cuda_backward_launch(p);
  if (plan->tasks == 0) return FKDA_OK; /* no sequence: nothing to write */
  char reason[FKDA_REASON_CAPACITY];
  const fkda_cuda_driver *driver = fkda_cuda_driver_get(reason, sizeof reason);
  if (!driver) return fkda_fail(FKDA_ERROR_NO_DEVICE, "%s", reason);

  const bool decode = p->op == FKDA_OP_DECODE;
  fkda_portable_params params = {
      .problem = *p,
      .value_split = plan->value_split,
      .aligned_q = fkda_cuda_aligned(&p->q),
      .aligned_k = fkda_cuda_aligned(&p->k),
      .aligned_v = fkda_cuda_aligned(&p->v),
      .aligned_g = fkda_cuda_aligned(&p->g),
      .aligned_out = fkda_cuda_aligned(&p->out),
      .aligned_state =
          decode && aligned_by_four(&p->initial) && (!p->final.data || aligned_by_four(&p->final)),
  };
  const fkda_cuda_launch l = {
      .kernels = &kernels,
      .kernel =
          decode ? decode_kernel(p->K, p->layout) : prefill_kernel(p->K, p->V / plan->value_split),
      .blocks = (uint32_t)plan->tasks,
      .threads = decode ? FKDA_PORTABLE_DECODE_THREADS
                        : FKDA_PORTABLE_PREFILL_THREADS(p->V / plan->value_split),
      .params = &params,
      .waits = decode,
  };
  return fkda_cuda_launch_all(driver, p->device_id, p->stream, &l, 1);
}

static fkda_status warmup(const fkda_backend *self, int32_t device_id) {
  (void)self;
  const fkda_status status = fkda_cuda_warmup(&capabilities, &kernels, device_id);
  return status ? status : fkda_cuda_backward_warmup(device_id);
}

const fkda_backend fkda_backend_cuda_portable = {
    .name = "portable",
    .device_type = FKDA_DEVICE_CUDA,
    .available = available,
    .on_device = on_device,
    .supports = supports,
    .plan = plan,
    .launch = launch,
    .warmup = warmup,
};
