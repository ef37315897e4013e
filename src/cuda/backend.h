/* What the rows of the backend table that run on CUDA devices have in common. */
#ifndef FKDA_CUDA_BACKEND_H
#define FKDA_CUDA_BACKEND_H

#include "cuda/module.h"

#define FKDA_CUDA_PROCESSORS 132 /* of a full Hopper: plans are made without a look at the device */

/* Can the device run kernels of these compute capabilities? */
bool fkda_cuda_on_device(const fkda_cuda_capabilities *wanted, int32_t device_id, char *reason,
                         size_t capacity);

/* Is there such a device? If not, the first one's reason is given. */
bool fkda_cuda_available(const fkda_cuda_capabilities *wanted, char *reason, size_t capacity);

/* Loads a row's kernels on a device that it can use. */
fkda_status fkda_cuda_warmup(const fkda_cuda_capabilities *wanted, fkda_cuda_kernels *kernels,
                             int32_t device_id);

/* Sizes and dtypes that every kernel of ours takes, and a grid of `blocks` that can be launched. */
bool fkda_cuda_supports(const fkda_problem *problem, int64_t blocks, char *reason, size_t capacity);

/* Do all rows of x begin at a multiple of 16 bytes? */
int32_t fkda_cuda_aligned(const fkda_rows *x);

#endif
