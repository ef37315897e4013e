#include "flashkda/flashkda.h"

fkda_tensor fkda_tensor_contiguous(void *data, int32_t dtype, int32_t ndim, const int64_t *shape) {
  fkda_tensor tensor = {.data = data, .dtype = dtype, .ndim = ndim};
  if (ndim > FKDA_MAX_DIMS) return tensor; /* the call that gets it names the tensor and refuses */
  int64_t stride = 1;
  for (int32_t i = ndim - 1; i >= 0; --i) {
    tensor.shape[i] = shape[i];
    tensor.stride[i] = stride;
    /* a product beyond 63 bits is refused by the call as well, by its extent or by this stride */
    if (__builtin_mul_overflow(stride, shape[i] > 1 ? shape[i] : 1, &stride)) stride = -1;
  }
  return tensor;
}
