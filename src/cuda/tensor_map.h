/* Tensor maps: how Hopper's copy engine walks rows of tokens, and which rows it can walk. */
#ifndef FKDA_CUDA_TENSOR_MAP_H
#define FKDA_CUDA_TENSOR_MAP_H

#include <stddef.h>

#include "cuda/driver.h"

/* Rows of tokens that a kernel gets a map of. All but the name are places: of the rows, the number of heads and the
 * size of a row in a problem, of the map in the kernel's parameters. */
typedef struct fkda_cuda_mapped {
  const char *name;
  size_t rows, heads, dim, map;
} fkda_cuda_mapped;
#define FKDA_CUDA_MAPPED(params, name, heads, dim)                                                 \
  {                                                                                                \
#name, offsetof(fkda_problem, name), offsetof(fkda_problem, heads),                            \
        offsetof(fkda_problem, dim), offsetof(params, name)                                        \
  }

const fkda_rows *fkda_cuda_mapped_rows(const fkda_problem *problem, const fkda_cuda_mapped *tensor);

/* Can maps say where these lie, which coordinates of 32 bits can reach, those of a last box of `box` rows included?
 * Absent ones and problems without a token need no map. */
bool fkda_cuda_can_be_mapped(const fkda_problem *problem, const fkda_cuda_mapped *tensors,
                             int32_t count, int32_t box, char *reason, size_t capacity);

/* Makes their maps, in the device's context; of those that need none, nothing is written. */
fkda_status fkda_cuda_make_maps(const fkda_cuda_driver *driver, const fkda_problem *problem,
                                const fkda_cuda_mapped *tensors, int32_t count, void *params);

#endif
