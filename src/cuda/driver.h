/* The CUDA driver, found at run time. The library neither links nor includes anything of CUDA: what it
 * needs of the driver's binary interface is declared here, after cuda.h of CUDA 13.0, with the names
 * of the exported symbols (cuda.h's macros map cuCtxPushCurrent to cuCtxPushCurrent_v2, and so on).
 */
#ifndef FKDA_CUDA_DRIVER_H
#define FKDA_CUDA_DRIVER_H

#include "check/problem.h"

/* CUcontext, CUmodule, CUfunction and CUstream are pointers to opaque structs; CUdevice is an int. */
typedef struct CUctx_st *fkda_cu_context;
typedef struct CUmod_st *fkda_cu_module;
typedef struct CUfunc_st *fkda_cu_function;
typedef struct CUstream_st *fkda_cu_stream;

/* CUresult, CUdevice_attribute, CUfunction_attribute, CUstreamCaptureStatus, CUstreamCaptureMode,
 * CUtensorMap...: the values used here. */
enum {
  FKDA_CU_SUCCESS = 0,
  FKDA_CU_ERROR_NOT_INITIALIZED = 3,
  FKDA_CU_ERROR_STUB_LIBRARY = 34,
  FKDA_CU_ERROR_NO_DEVICE = 100,
  FKDA_CU_ERROR_INVALID_HANDLE = 400, /* a stream of another context */
  FKDA_CU_ERROR_SYSTEM_DRIVER_MISMATCH = 803,
  FKDA_CU_ERROR_STREAM_CAPTURE_IMPLICIT = 906, /* asking about the legacy stream during a capture */

  FKDA_CU_MULTIPROCESSOR_COUNT = 16,
  FKDA_CU_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR = 81,
  FKDA_CU_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
  FKDA_CU_COMPUTE_CAPABILITY_MAJOR = 75,
  FKDA_CU_COMPUTE_CAPABILITY_MINOR = 76,

  FKDA_CU_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,

  FKDA_CU_CAPTURE_NONE = 0,
  FKDA_CU_CAPTURE_MODE_RELAXED = 2,

  FKDA_CU_LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION = 6,

  FKDA_CU_TENSOR_MAP_FLOAT32 = 7,
  FKDA_CU_TENSOR_MAP_BFLOAT16 = 9,
  FKDA_CU_TENSOR_MAP_INTERLEAVE_NONE = 0,
  FKDA_CU_TENSOR_MAP_SWIZZLE_128B = 3,
  FKDA_CU_TENSOR_MAP_L2_PROMOTION_256B = 3,
  FKDA_CU_TENSOR_MAP_OOB_FILL_NONE = 0,
};

/* CUlaunchAttribute, of whose union one member is used here, and CUlaunchConfig. */
typedef struct fkda_cu_launch_attribute {
  int32_t id;
  int32_t padding;
  union {
    char size[64];
    void *alignment;
    int programmatic_stream_serialization_allowed;
  } value;
} fkda_cu_launch_attribute;

typedef struct fkda_cu_launch_config {
  unsigned grid[3], block[3], shared_bytes;
  fkda_cu_stream stream;
  fkda_cu_launch_attribute *attributes;
  unsigned attribute_count;
} fkda_cu_launch_config;

/* X(name, symbol, parameters): the driver functions without which the library does not work. */
#define FKDA_CU_LIST(X)                                                                            \
  X(get_error_name, "cuGetErrorName", (int result, const char **text))                             \
  X(get_error_string, "cuGetErrorString", (int result, const char **text))                         \
  X(init, "cuInit", (unsigned flags))                                                              \
  X(driver_get_version, "cuDriverGetVersion", (int *version))                                      \
  X(device_get_count, "cuDeviceGetCount", (int *count))                                            \
  X(device_get, "cuDeviceGet", (int *device, int ordinal))                                         \
  X(device_get_name, "cuDeviceGetName", (char *name, int capacity, int device))                    \
  X(device_get_attribute, "cuDeviceGetAttribute", (int *value, int attribute, int device))         \
  X(primary_context_retain, "cuDevicePrimaryCtxRetain", (fkda_cu_context * context, int device))   \
  X(primary_context_release, "cuDevicePrimaryCtxRelease_v2", (int device))                         \
  X(context_get_current, "cuCtxGetCurrent", (fkda_cu_context * context))                           \
  X(context_push, "cuCtxPushCurrent_v2", (fkda_cu_context context))                                \
  X(context_pop, "cuCtxPopCurrent_v2", (fkda_cu_context * context))                                \
  X(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode", (int *mode))                       \
  X(stream_is_capturing, "cuStreamIsCapturing", (fkda_cu_stream stream, int *status))              \
  X(module_load_data, "cuModuleLoadData", (fkda_cu_module * module, const void *image))            \
  X(module_unload, "cuModuleUnload", (fkda_cu_module module))                                      \
  X(module_get_function, "cuModuleGetFunction",                                                    \
    (fkda_cu_function * function, fkda_cu_module module, const char *name))                        \
  X(function_set_attribute, "cuFuncSetAttribute",                                                  \
    (fkda_cu_function function, int attribute, int value))                                         \
  X(launch_kernel, "cuLaunchKernelEx",                                                             \
    (const fkda_cu_launch_config *config, fkda_cu_function function, void **parameters,            \
     void **extra))

/* Those that older drivers lack: NULL there. CUDA 12.4; 12.0. */
#define FKDA_CU_OPTIONAL_LIST(X)                                                                   \
  X(function_load, "cuFuncLoad", (fkda_cu_function function))                                      \
  X(tensor_map_encode_tiled, "cuTensorMapEncodeTiled",                                             \
    (void *map, int data_type, uint32_t rank, void *address, const uint64_t *sizes,                \
     const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,                \
     int interleave, int swizzle, int l2_promotion, int oob_fill))

typedef struct fkda_cu_api {
#define FKDA_CU_MEMBER(name, symbol, parameters) int(*name) parameters;
  FKDA_CU_LIST(FKDA_CU_MEMBER)
  FKDA_CU_OPTIONAL_LIST(FKDA_CU_MEMBER)
#undef FKDA_CU_MEMBER
} fkda_cu_api;

typedef struct fkda_cuda_device {
  int handle; /* CUdevice */
  int32_t major, minor, processors;
  int32_t processor_shared,
      block_shared; /* shared memory in bytes: in all, and what a block can have */
  char name[96];
} fkda_cuda_device;

/* The driver and its devices, unchanging once found. */
typedef struct fkda_cuda_driver {
  fkda_cu_api api;
  int32_t version; /* 1000 * major + 10 * minor of the CUDA version that the driver supports */
  int32_t device_count;
  const fkda_cuda_device *devices; /* [device_count] */
} fkda_cuda_driver;

/* Finds and starts the driver at the first call of the process, from whichever thread. NULL if there is
 * none that could run this build's kernels; that answer stays, and so does its reason, of which at
 * most `capacity` bytes are written (none for capacity 0). */
const fkda_cuda_driver *fkda_cuda_driver_get(char *reason, size_t capacity);

/* Compute capabilities, 80 for 8.0. */
typedef struct fkda_cuda_capabilities {
  int32_t first, last;
} fkda_cuda_capabilities;
#define FKDA_CUDA_AND_NEWER INT32_MAX /* as `last` */

/* Is there a device `ordinal`, of one of these capabilities? */
bool fkda_cuda_device_usable(const fkda_cuda_driver *driver, int32_t ordinal,
                             const fkda_cuda_capabilities *wanted, char *reason, size_t capacity);

/* Is this a child forked after the driver was started? CUDA does not work there. */
bool fkda_cuda_forked(void);

/* Fails with FKDA_ERROR_DEVICE: "<what>: CUDA_ERROR_... (...)". */
fkda_status fkda_cuda_fail(const fkda_cuda_driver *driver, int result, const char *what);

#endif
