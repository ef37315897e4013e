/* The memory of a GPU, for the case table: the driver's own calls, found at run time like the library finds
 * them, so that whatever links this needs no CUDA.
 *
 * The device's primary context is current inside these functions only: the library's own calls are made
 * without a current context, and must see to it themselves.
 *
 * SPDX-License-Identifier: MIT
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "cases.h"

/* Types and values of cuda.h, CUDA 13.0: CUdevice is an int, CUdeviceptr 64 bits, the rest pointers. */
typedef unsigned long long device_pointer;
enum { STREAM_NON_BLOCKING = 1 };

/* X(name, symbol, parameters) */
#define FUNCTIONS(X)                                                                               \
  X(get_error_name, "cuGetErrorName", (int, const char **))                                        \
  X(init, "cuInit", (unsigned))                                                                    \
  X(device_get, "cuDeviceGet", (int *, int))                                                       \
  X(device_get_name, "cuDeviceGetName", (char *, int, int))                                        \
  X(primary_context_retain, "cuDevicePrimaryCtxRetain", (void **, int))                            \
  X(context_push, "cuCtxPushCurrent_v2", (void *))                                                 \
  X(context_pop, "cuCtxPopCurrent_v2", (void **))                                                  \
  X(context_synchronize, "cuCtxSynchronize", (void))                                               \
  X(mem_alloc, "cuMemAlloc_v2", (device_pointer *, size_t))                                        \
  X(mem_free, "cuMemFree_v2", (device_pointer))                                                    \
  X(memcpy_to_device, "cuMemcpyHtoD_v2", (device_pointer, const void *, size_t))                   \
  X(memcpy_to_host, "cuMemcpyDtoH_v2", (void *, device_pointer, size_t))                           \
  X(stream_create, "cuStreamCreate", (void **, unsigned))                                          \
  X(stream_synchronize, "cuStreamSynchronize", (void *))

/* Kernels of one fixture run on one stream; several host threads get several. */
enum { STREAMS = 4 };

static struct {
#define MEMBER(name, symbol, parameters) int(*name) parameters;
  FUNCTIONS(MEMBER)
#undef MEMBER
  void *context;
  void *streams[STREAMS];
  atomic_uint next_stream;
  char device[96];
  char failure[256]; /* why there is no such memory here; "" if there is */
} cuda;

static pthread_once_t once = PTHREAD_ONCE_INIT;

static const char *error_name(int result) {
  const char *text = NULL;
  return cuda.get_error_name && !cuda.get_error_name(result, &text) && text ? text
                                                                            : "unknown error";
}

static bool failed(int result, const char *what) {
  if (!result) return false;
  snprintf(cuda.failure, sizeof cuda.failure, "%s: %s, error %d", what, error_name(result), result);
  return true;
}

static bool find_functions(void) {
  void *handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    const char *why = dlerror();
    snprintf(cuda.failure, sizeof cuda.failure, "%s", why ? why : "no libcuda.so.1");
    return false;
  }
#define FIND(name, symbol, parameters)                                                             \
  {                                                                                                \
    void *address = dlsym(handle, symbol);                                                         \
    memcpy(&cuda.name, &address, sizeof address);                                                  \
    if (!address) {                                                                                \
      snprintf(cuda.failure, sizeof cuda.failure, "libcuda.so.1 has no %s", symbol);               \
      return false;                                                                                \
    }                                                                                              \
  }
  FUNCTIONS(FIND)
#undef FIND
  return true;
}

static void start(void) {
  int device = 0;
  void *popped = NULL;
  if (!find_functions()) return;
  if (failed(cuda.init(0), "cuInit") || failed(cuda.device_get(&device, 0), "cuDeviceGet") ||
      failed(cuda.device_get_name(cuda.device, sizeof cuda.device, device), "cuDeviceGetName") ||
      failed(cuda.primary_context_retain(&cuda.context, device), "cuDevicePrimaryCtxRetain") ||
      failed(cuda.context_push(cuda.context), "cuCtxPushCurrent")) {
    return;
  }
  for (int i = 0; i < STREAMS && !*cuda.failure; i++)
    failed(cuda.stream_create(&cuda.streams[i], STREAM_NON_BLOCKING), "cuStreamCreate");
  cuda.context_pop(&popped);
}

/* Runs one driver call, or several, with the context current. */
#define WITH_CONTEXT(result, expression)                                                           \
  do {                                                                                             \
    void *popped_context;                                                                          \
    result = cuda.context_push(cuda.context);                                                      \
    if (result) break;                                                                             \
    result = (expression);                                                                         \
    (void)cuda.context_pop(&popped_context);                                                       \
  } while (0)

static void *cuda_alloc(const fkda_memory *memory, size_t size) {
  device_pointer pointer = 0;
  int result;
  (void)memory;
  WITH_CONTEXT(result, cuda.mem_alloc(&pointer, size ? size : 1));
  return result ? NULL : (void *)(uintptr_t)pointer;
}

/* A copy from pageable memory returns before it has arrived; our streams wait for nothing by themselves. */
static int to_device(device_pointer to, const void *from, size_t size) {
  const int result = cuda.memcpy_to_device(to, from, size);
  return result ? result : cuda.stream_synchronize(NULL);
}

static bool cuda_upload(const fkda_memory *memory, void *device, const void *host, size_t size) {
  int result;
  (void)memory;
  if (!size) return true;
  WITH_CONTEXT(result, to_device((device_pointer)(uintptr_t)device, host, size));
  return !result;
}

static int to_host(void *to, device_pointer from, size_t size) {
  const int result = cuda.context_synchronize();
  return result ? result : cuda.memcpy_to_host(to, from, size);
}

static bool cuda_download(const fkda_memory *memory, void *host, const void *device, size_t size) {
  int result;
  (void)memory;
  if (!size) return true;
  WITH_CONTEXT(result, to_host(host, (device_pointer)(uintptr_t)device, size));
  return !result;
}

static void cuda_free(const fkda_memory *memory, void *device) {
  int result;
  (void)memory;
  WITH_CONTEXT(result, cuda.mem_free((device_pointer)(uintptr_t)device));
  (void)result; /* an error of a kernel has been reported before */
}

static void *cuda_stream(const fkda_memory *memory, uint64_t seed) {
  (void)memory;
  return seed % 4 == 0 ? NULL : cuda.streams[atomic_fetch_add(&cuda.next_stream, 1) % STREAMS];
}

static bool cuda_finish(const fkda_memory *memory, char *error, size_t capacity) {
  int result;
  (void)memory;
  WITH_CONTEXT(result, cuda.context_synchronize());
  if (result) snprintf(error, capacity, "%s, error %d", error_name(result), result);
  return !result;
}

const fkda_memory *fkda_memory_cuda(char *error, size_t capacity) {
  static const fkda_memory device = {
      .device_type = FKDA_DEVICE_CUDA,
      .guard = FKDA_MEMORY_GUARD,
      .alloc = cuda_alloc,
      .upload = cuda_upload,
      .download = cuda_download,
      .free = cuda_free,
      .stream = cuda_stream,
      .finish = cuda_finish,
  };
  pthread_once(&once, start);
  if (!*cuda.failure) return &device;
  snprintf(error, capacity, "%s", cuda.failure);
  return NULL;
}

const char *fkda_memory_cuda_device(void) { return cuda.device; }
