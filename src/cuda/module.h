/* Kernels on devices: loaded once for each device, launched into the caller's stream.
 *
 * Everything happens in the device's primary context, which is the one that the CUDA runtime and
 * through it every framework uses; the caller's current context is the same before and after.
 *
 * Loading allocates device memory and may synchronise, so it cannot happen during a stream capture: the
 * first launch on a device, or fkda_warmup(), loads all kernels of the backend, and later launches only
 * launch. What is loaded stays until the process ends; resetting the primary context
 * (cudaDeviceReset) behind the library's back leaves it with kernels that are gone.
 */
#ifndef FKDA_CUDA_MODULE_H
#define FKDA_CUDA_MODULE_H

#include "cuda/driver.h"

typedef struct fkda_cuda_kernel {
  const char *image; /* fkda_cuda_image's name */
  const char *entry;
} fkda_cuda_kernel;

struct fkda_cuda_loaded; /* one device's functions */

/* A backend's kernels. */
typedef struct fkda_cuda_kernels {
  const fkda_cuda_kernel *kernels;
  int32_t count;
  /* dynamic shared memory of a block in bytes, at most */
  int32_t (*shared)(const fkda_cuda_device *device, int32_t kernel);
  struct fkda_cuda_loaded *_Atomic loaded; /* newest first, one for each device */
} fkda_cuda_kernels;

typedef struct fkda_cuda_launch {
  fkda_cuda_kernels *kernels;
  int32_t kernel; /* index into them */
  uint32_t blocks, threads;
  uint32_t shared; /* dynamic shared memory of a block in bytes; 0: as the kernels have it */
  void *params;    /* the kernel's one parameter, by value */
  /* The kernel itself waits for what is before it in the stream (griddepcontrol.wait), and may be started
   * while that is ending. Heeded where device and driver can do it, in graphs too. */
  bool waits;
  /* What of params is to be made in the device's context; NULL: nothing. Its failure is the launch's. */
  fkda_status (*prepare)(const fkda_cuda_driver *driver, void *params);
} fkda_cuda_launch;

/* The image of that name; NULL if this build has none. */
const void *fkda_cuda_image_of(const char *name);

/* Loads the kernels on a device if that has not happened yet. */
fkda_status fkda_cuda_kernels_load(fkda_cuda_kernels *kernels, const fkda_cuda_driver *driver,
                                   int32_t device_id);

/* Launches one after the other into the caller's stream. What is not loaded yet is loaded before the first of
 * them, unless the stream is capturing: that fails, and nothing is launched. */
fkda_status fkda_cuda_launch_all(const fkda_cuda_driver *driver, int32_t device_id, void *stream,
                                 const fkda_cuda_launch *launches, int32_t count);

#endif
