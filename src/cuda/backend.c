/* What the CUDA rows have in common: devices, sizes, dtypes. */
#include "cuda/backend.h"

#include "run/backend.h"

#define MAX_BLOCKS INT32_MAX /* of a one-dimensional grid */

bool fkda_cuda_on_device(const fkda_cuda_capabilities *wanted, int32_t device_id, char *reason,
                         size_t capacity) {
  const fkda_cuda_driver *driver = fkda_cuda_driver_get(reason, capacity);
  return driver && fkda_cuda_device_usable(driver, device_id, wanted, reason, capacity);
}

bool fkda_cuda_available(const fkda_cuda_capabilities *wanted, char *reason, size_t capacity) {
  const fkda_cuda_driver *driver = fkda_cuda_driver_get(reason, capacity);
  if (!driver) return false;
  for (int32_t i = 0; i < driver->device_count; ++i)
    if (fkda_cuda_on_device(wanted, i, NULL, 0)) return true;
  return fkda_cuda_on_device(wanted, 0, reason, capacity);
}

fkda_status fkda_cuda_warmup(const fkda_cuda_capabilities *wanted, fkda_cuda_kernels *kernels,
                             int32_t device_id) {
  char reason[FKDA_REASON_CAPACITY];
  if (!fkda_cuda_on_device(wanted, device_id, reason, sizeof reason))
    return fkda_fail(FKDA_ERROR_NO_DEVICE, "%s", reason);
  return fkda_cuda_kernels_load(kernels, fkda_cuda_driver_get(NULL, 0), device_id);
}

static bool is_64_or_128(int64_t size) { return size == 64 || size == 128; }

static bool is_bf16_or_f32(int32_t dtype) { return dtype == FKDA_BF16 || dtype == FKDA_F32; }

bool fkda_cuda_supports(const fkda_problem *p, int64_t blocks, char *reason, size_t capacity) {
  if (!is_64_or_128(p->K) || !is_64_or_128(p->V))
    return fkda_refuse(reason, capacity, "K = %lld, V = %lld, expected each 64 or 128",
                       (long long)p->K, (long long)p->V);
  const bool backward = p->op == FKDA_OP_BACKWARD;
  if (p->io_dtype != FKDA_BF16)
    return fkda_refuse(reason, capacity, "q, k, v%s: %s, expected bfloat16",
                       backward ? "" : ", out", fkda_dtype_string(p->io_dtype));
  const struct {
    const char *name;
    int32_t dtype; /* FKDA_NONE: absent */
  } tensors[] = {{"g", p->g.dtype},
                 {"beta", p->beta.dtype},
                 {"A_log", p->A_log.dtype},
                 {"dt_bias", p->dt_bias.dtype},
                 {"initial_state", p->initial.dtype},
                 {p->op == FKDA_OP_DECODE ? "state" : "final_state", p->final.dtype},
                 {"checkpoint_state", backward ? FKDA_NONE : p->checkpoints.state.dtype}};
  for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; ++i)
    if (tensors[i].dtype != FKDA_NONE && !is_bf16_or_f32(tensors[i].dtype))
      return fkda_refuse(reason, capacity, "%s: %s, expected bfloat16 or float32", tensors[i].name,
                         fkda_dtype_string(tensors[i].dtype));
  if (blocks > MAX_BLOCKS)
    return fkda_refuse(reason, capacity, "N*HV = %lld*%lld takes %lld blocks, expected at most %d",
                       (long long)p->N, (long long)p->HV, (long long)blocks, (int)MAX_BLOCKS);
  return true;
}

int32_t fkda_cuda_aligned(const fkda_rows *x) {
  const uint64_t size = fkda_dtype_size(x->dtype);
  const uint64_t places = (uint64_t)(uintptr_t)x->data | (uint64_t)x->stride_b * size |
                          (uint64_t)x->stride_t * size | (uint64_t)x->stride_h * size;
  return places % 16 == 0;
}
