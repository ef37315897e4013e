/* The compiled kernels inside the library. cmake/cuda.cmake writes the definitions. */
#ifndef FKDA_CUDA_IMAGES_H
#define FKDA_CUDA_IMAGES_H

#include <stdint.h>

/* One fatbin for each file of src/cuda/kernels. */
typedef struct fkda_cuda_image {
  const char *name; /* "portable/prefill" for portable/prefill.cu */
  const void *data;
} fkda_cuda_image;

extern const fkda_cuda_image fkda_cuda_images[]; /* ends with a name NULL */

/* 1000 * major + 10 * minor of the nvcc that compiled them. */
extern const int32_t fkda_cuda_toolkit_version;

#endif
