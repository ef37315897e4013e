/* Tensor maps of rows of tokens: boxes of a chunk's tokens and 128 bytes. */
#include "cuda/tensor_map.h"

#include "cuda/kernels/sm90/params.h"
#include "run/backend.h"

#define COPY_UNIT 16                  /* bytes: the copy engine's alignment */
#define MAX_STRIDE (INT64_C(1) << 40) /* bytes, of a tensor map */
#define MAX_EXTENT (INT64_C(1) << 32)

static int64_t size_at(const fkda_problem *p, size_t place) {
  return *(const int64_t *)((const char *)p + place);
}

const fkda_rows *fkda_cuda_mapped_rows(const fkda_problem *p, const fkda_cuda_mapped *tensor) {
  return (const fkda_rows *)((const char *)p + tensor->rows);
}

typedef struct extents {
  int64_t of[3], bytes[3]; /* T, heads, B, and the strides of each in bytes */
} extents;

static extents extents_of(const fkda_problem *p, const fkda_cuda_mapped *tensor) {
  const fkda_rows *x = fkda_cuda_mapped_rows(p, tensor);
  const int64_t size = (int64_t)fkda_dtype_size(x->dtype);
  return (extents){{p->T, size_at(p, tensor->heads), p->B},
                   {x->stride_t * size, x->stride_h * size, x->stride_b * size}};
}

static bool needs_map(const fkda_problem *p, const fkda_cuda_mapped *tensor) {
  return p->T > 0 && p->B > 0 && fkda_cuda_mapped_rows(p, tensor)->dtype != FKDA_NONE;
}

static bool can_be_mapped(const fkda_problem *p, const fkda_cuda_mapped *tensor, char *reason,
                          size_t capacity) {
  static const char *const dimensions[] = {"T", "heads", "B"};
  const void *data = fkda_cuda_mapped_rows(p, tensor)->data;
  if ((uintptr_t)data % COPY_UNIT)
    return fkda_refuse(reason, capacity, "%s: data %p, expected a multiple of %d", tensor->name,
                       data, COPY_UNIT);
  const extents e = extents_of(p, tensor);
  for (int i = 0; i < 3; ++i) {
    if (e.of[i] <= 1) continue;
    if (e.of[i] >= MAX_EXTENT)
      return fkda_refuse(reason, capacity, "%s: %s = %lld, expected less than 2^32", tensor->name,
                         dimensions[i], (long long)e.of[i]);
    if (e.bytes[i] < COPY_UNIT || e.bytes[i] % COPY_UNIT || e.bytes[i] >= MAX_STRIDE)
      return fkda_refuse(
          reason, capacity,
          "%s: stride of %s is %lld bytes, expected a multiple of %d, less than 2^40", tensor->name,
          dimensions[i], (long long)e.bytes[i], COPY_UNIT);
  }
  return true;
}

bool fkda_cuda_can_be_mapped(const fkda_problem *p, const fkda_cuda_mapped *tensors, int32_t count,
                             int32_t box, char *reason, size_t capacity) {
  const int64_t most = INT32_MAX - box;
  if (p->T > most)
    return fkda_refuse(reason, capacity, "T = %lld, expected at most %lld", (long long)p->T,
                       (long long)most);
  for (int32_t i = 0; i < count; ++i)
    if (needs_map(p, &tensors[i]) && !can_be_mapped(p, &tensors[i], reason, capacity)) return false;
  return true;
}

static fkda_status make_map(const fkda_cuda_driver *driver, const fkda_problem *p,
                            const fkda_cuda_mapped *tensor, void *map) {
  const fkda_rows *x = fkda_cuda_mapped_rows(p, tensor);
  const extents e = extents_of(p, tensor);
  uint64_t sizes[4] = {(uint64_t)size_at(p, tensor->dim)}, strides[3];
  for (int i = 0; i < 3; ++i) {
    sizes[i + 1] = (uint64_t)e.of[i];
    strides[i] = e.of[i] > 1 ? (uint64_t)e.bytes[i] : COPY_UNIT; /* of one element: never used */
  }
  const uint32_t box[4] = {FKDA_SM90_BOX_BYTES / (uint32_t)fkda_dtype_size(x->dtype),
                           FKDA_SM90_CHUNK, 1, 1};
  const uint32_t every[4] = {1, 1, 1, 1};
  const int result = driver->api.tensor_map_encode_tiled(
      map, x->dtype == FKDA_F32 ? FKDA_CU_TENSOR_MAP_FLOAT32 : FKDA_CU_TENSOR_MAP_BFLOAT16, 4,
      x->data, sizes, strides, box, every, FKDA_CU_TENSOR_MAP_INTERLEAVE_NONE,
      FKDA_CU_TENSOR_MAP_SWIZZLE_128B, FKDA_CU_TENSOR_MAP_L2_PROMOTION_256B,
      FKDA_CU_TENSOR_MAP_OOB_FILL_NONE);
  return result ? fkda_cuda_fail(driver, result, "cuTensorMapEncodeTiled") : FKDA_OK;
}

fkda_status fkda_cuda_make_maps(const fkda_cuda_driver *driver, const fkda_problem *p,
                                const fkda_cuda_mapped *tensors, int32_t count, void *params) {
  fkda_status status = FKDA_OK;
  for (int32_t i = 0; i < count && !status; ++i)
    if (needs_map(p, &tensors[i]))
      status = make_map(driver, p, &tensors[i], (char *)params + tensors[i].map);
  return status;
}
