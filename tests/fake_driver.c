/* The fake libcuda.so.1 of fake_driver.h: the functions that src/cuda/driver.h names, nothing else. */
#include "fake_driver.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  CAPTURE_UNSUPPORTED = 900,

  STATIC_SHARED = 48 << 10, /* dynamic shared memory that needs no opt-in */
};

typedef struct device_context {
  int device;
} device_context;
typedef struct module {
  int device;
  const void *image;
} module;
typedef struct function {
  int device, index, shared, loaded;
} function;

EXPORT fake_driver fake = {.version = 13000,
                           .device_count = 1,
                           .capability = {{8, 6}, {8, 6}, {7, 5}},
                           .shared_kilobytes = 228,
                           .params_size = NULL};

static device_context contexts[FAKE_DEVICES] = {{0}, {1}, {2}};
static module modules[FAKE_FUNCTIONS];
static function functions[FAKE_FUNCTIONS];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local device_context *stack[16];
static _Thread_local int depth;
static _Thread_local int capture_mode; /* 0: CU_STREAM_CAPTURE_MODE_GLOBAL */

EXPORT void *fake_context(int device) { return &contexts[device]; }
EXPORT int fake_depth(void) { return depth; }
EXPORT int fake_capture_mode(void) { return capture_mode; }

static int mistake(const char *what, int result) {
  pthread_mutex_lock(&mutex);
  snprintf(fake.mistake, sizeof fake.mistake, "%s", what);
  pthread_mutex_unlock(&mutex);
  atomic_fetch_add(&fake.mistakes, 1);
  return result;
}

/* Every function begins so. */
#define BEGIN                                                                                      \
  do {                                                                                             \
    if (fake.failing && !strcmp(fake.failing, __func__)) return fake.failure;                      \
  } while (0)
#define BEGIN_STARTED                                                                              \
  do {                                                                                             \
    BEGIN;                                                                                         \
    if (!atomic_load(&fake.inits)) return mistake("called before cuInit", NOT_INITIALIZED);        \
  } while (0)

/* Long enough for every thread of a test to come and find the work unfinished. */
static void take_time(void) { nanosleep(&(struct timespec){.tv_nsec = 3000000}, NULL); }

static device_context *current(void) { return depth ? stack[depth - 1] : NULL; }

EXPORT int cuGetErrorName(int result, const char **text) {
  *text = result == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_FAKE";
  return SUCCESS;
}
EXPORT int cuGetErrorString(int result, const char **text) {
  (void)result;
  *text = "made up for a test";
  return SUCCESS;
}
EXPORT int cuInit(unsigned flags) {
  BEGIN;
  if (flags) return mistake("cuInit: flags", INVALID_VALUE);
  atomic_fetch_add(&fake.inits, 1);
  take_time();
  return fake.device_count ? SUCCESS : NO_DEVICE;
}
EXPORT int cuDriverGetVersion(int *version) {
  BEGIN;
  *version = fake.version;
  return SUCCESS;
}
EXPORT int cuDeviceGetCount(int *count) {
  BEGIN_STARTED;
  *count = fake.device_count;
  return SUCCESS;
}
/* Handles are not ordinals. */
EXPORT int cuDeviceGet(int *device, int ordinal) {
  BEGIN_STARTED;
  if (ordinal < 0 || ordinal >= fake.device_count) return INVALID_DEVICE;
  *device = ordinal + 100;
  return SUCCESS;
}
EXPORT int cuDeviceGetName(char *name, int capacity, int device) {
  BEGIN_STARTED;
  snprintf(name, (size_t)capacity, "Fake %d", device - 100);
  return SUCCESS;
}
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
  BEGIN_STARTED;
  switch (attribute) {
    case 16: *value = 132; return SUCCESS;
    case 81: *value = fake.shared_kilobytes * 1024; return SUCCESS;
    case 97: *value = (fake.shared_kilobytes - 1) * 1024; return SUCCESS;
    case 75: *value = fake.capability[device - 100].major; return SUCCESS;
    case 76: *value = fake.capability[device - 100].minor; return SUCCESS;
    default: return mistake("cuDeviceGetAttribute: attribute", INVALID_VALUE);
  }
}
EXPORT int cuDevicePrimaryCtxRetain(void **out, int device) {
  BEGIN_STARTED;
  atomic_fetch_add(&fake.retains, 1);
  *out = &contexts[device - 100];
  return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
  BEGIN_STARTED;
  (void)device;
  atomic_fetch_add(&fake.releases, 1);
  return SUCCESS;
}
EXPORT int cuCtxGetCurrent(void **context) {
  BEGIN_STARTED;
  atomic_fetch_add(&fake.current_asked, 1);
  *context = current();
  return SUCCESS;
}
EXPORT int cuCtxPushCurrent_v2(void *context) {
  BEGIN_STARTED;
  if (depth == sizeof stack / sizeof stack[0])
    return mistake("cuCtxPushCurrent: too deep", INVALID_CONTEXT);
  stack[depth++] = context;
  atomic_fetch_add(&fake.pushes, 1);
  return SUCCESS;
}
EXPORT int cuCtxPopCurrent_v2(void **context) {
  BEGIN_STARTED;
  if (!depth) return mistake("cuCtxPopCurrent: nothing pushed", INVALID_CONTEXT);
  *context = stack[--depth];
  atomic_fetch_add(&fake.pops, 1);
  return SUCCESS;
}
EXPORT int cuThreadExchangeStreamCaptureMode(int *mode) {
  BEGIN_STARTED;
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return SUCCESS;
}
EXPORT int cuStreamIsCapturing(void *stream, int *status) {
  BEGIN_STARTED;
  if (!current()) return mistake("cuStreamIsCapturing: no context", INVALID_CONTEXT);
  if (!stream) {
    *status = 0;
    return fake.legacy_capture;
  }
  *status = ((fake_stream *)stream)->capture;
  return SUCCESS;
}
EXPORT int cuModuleLoadData(void **out, const void *image) {
  BEGIN_STARTED;
  if (!current()) return mistake("cuModuleLoadData: no context", INVALID_CONTEXT);
  if (capture_mode != 2)
    return mistake("cuModuleLoadData: capture mode not relaxed", CAPTURE_UNSUPPORTED);
  const int i = atomic_fetch_add(&fake.loads, 1);
  if (i >= FAKE_FUNCTIONS) return mistake("cuModuleLoadData: too many", INVALID_VALUE);
  modules[i] = (module){current()->device, image};
  take_time();
  *out = &modules[i];
  return SUCCESS;
}
EXPORT int cuModuleUnload(void *unloaded) {
  BEGIN_STARTED;
  if (((module *)unloaded)->device < 0) return mistake("cuModuleUnload: twice", INVALID_HANDLE);
  ((module *)unloaded)->device = -1;
  atomic_fetch_add(&fake.unloads, 1);
  return SUCCESS;
}
EXPORT int cuModuleGetFunction(void **out, void *from, const char *name) {
  BEGIN_STARTED;
  const int i = atomic_fetch_add(&fake.functions, 1);
  if (i >= FAKE_FUNCTIONS) return mistake("cuModuleGetFunction: too many", NOT_FOUND);
  snprintf(fake.entries[i], sizeof fake.entries[i], "%s", name);
  fake.entry_device[i] = ((module *)from)->device;
  functions[i] = (function){((module *)from)->device, i, STATIC_SHARED, 0};
  *out = &functions[i];
  return SUCCESS;
}
EXPORT int cuFuncSetAttribute(void *of, int attribute, int value) {
  BEGIN_STARTED;
  if (attribute != 8) return mistake("cuFuncSetAttribute: attribute", INVALID_VALUE);
  ((function *)of)->shared = value;
  fake.entry_shared[((function *)of)->index] = value;
  return SUCCESS;
}
EXPORT int cuFuncLoad(void *loaded) {
  BEGIN_STARTED;
  ((function *)loaded)->loaded = 1;
  atomic_fetch_add(&fake.function_loads, 1);
  return SUCCESS;
}
/* Refuses what the real one refuses, and writes down what it was given. */
EXPORT int cuTensorMapEncodeTiled(void *map, int data_type, uint32_t rank, void *address,
                                  const uint64_t *sizes, const uint64_t *strides,
                                  const uint32_t *box, const uint32_t *element_strides,
                                  int interleave, int swizzle, int l2_promotion, int oob_fill) {
  BEGIN_STARTED;
  if (!current()) return mistake("cuTensorMapEncodeTiled: no context", INVALID_CONTEXT);
  if ((uintptr_t)map % 64) return mistake("cuTensorMapEncodeTiled: map", INVALID_VALUE);
  if (data_type != 7 && data_type != 9)
    return mistake("cuTensorMapEncodeTiled: data type", INVALID_VALUE);
  if (rank != 4) return mistake("cuTensorMapEncodeTiled: rank", INVALID_VALUE);
  if (!address || (uintptr_t)address % 16)
    return mistake("cuTensorMapEncodeTiled: address", INVALID_VALUE);
  fake_tensor_map m = {.address = address,
                       .data_type = data_type,
                       .interleave = interleave,
                       .swizzle = swizzle,
                       .l2_promotion = l2_promotion,
                       .oob_fill = oob_fill};
  for (uint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > UINT64_C(1) << 32)
      return mistake("cuTensorMapEncodeTiled: sizes", INVALID_VALUE);
    if (box[i] < 1 || box[i] > 256) return mistake("cuTensorMapEncodeTiled: box", INVALID_VALUE);
    if (element_strides[i] != 1)
      return mistake("cuTensorMapEncodeTiled: element strides", INVALID_VALUE);
    m.sizes[i] = sizes[i];
    m.box[i] = (uint16_t)box[i];
  }
  for (uint32_t i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 || !strides[i] || strides[i] >= UINT64_C(1) << 40)
      return mistake("cuTensorMapEncodeTiled: strides", INVALID_VALUE);
    m.strides[i] = strides[i];
  }
  if (swizzle == 3 && box[0] * (data_type == 7 ? 4 : 2) > 128)
    return mistake("cuTensorMapEncodeTiled: box wider than the swizzle", INVALID_VALUE);
  memcpy(map, &m, sizeof m);
  atomic_fetch_add(&fake.maps, 1);
  return SUCCESS;
}
/* As cuda.h has them. */
typedef struct launch_attribute {
  int id;
  char pad[4];
  union {
    char pad[64];
    void *pointer;
    int value;
  } value;
} launch_attribute;
typedef struct launch_config {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void *stream;
  launch_attribute *attributes;
  unsigned attribute_count;
} launch_config;

EXPORT int cuLaunchKernelEx(const launch_config *c, void *launched, void **parameters,
                            void **extra) {
  BEGIN_STARTED;
  const function *f = launched;
  if (!current() || current()->device != f->device)
    return mistake("cuLaunchKernelEx: another device's context", INVALID_CONTEXT);
  if (!f->loaded) return mistake("cuLaunchKernelEx: not loaded", CAPTURE_UNSUPPORTED);
  if (!c->gx || c->gx > INT32_MAX || (int)c->shared > f->shared || extra)
    return mistake("cuLaunchKernelEx: sizes", INVALID_VALUE);
  if (c->attribute_count > 1 || (c->attribute_count && c->attributes[0].id != 6))
    return mistake("cuLaunchKernelEx: attributes", INVALID_VALUE);
  if (c->stream && ((fake_stream *)c->stream)->device != f->device) return INVALID_HANDLE;
  pthread_mutex_lock(&mutex);
  fake.launch = (fake_launch){.grid = {c->gx, c->gy, c->gz},
                              .block = {c->bx, c->by, c->bz},
                              .shared = c->shared,
                              .stream = c->stream,
                              .early = c->attribute_count ? c->attributes[0].value.value : 0,
                              .device = f->device};
  memcpy(fake.launch.entry, fake.entries[f->index], sizeof fake.launch.entry);
  memcpy(fake.launch.params, parameters[0], fake.params_size(fake.launch.entry));
  fake.history[atomic_fetch_add(&fake.launches, 1) % FAKE_HISTORY] = fake.launch;
  pthread_mutex_unlock(&mutex);
  return SUCCESS;
}
