/* Loading and launching of kernels. */
#include "cuda/module.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/images.h"

#define TRY(call)                                                                                  \
  do {                                                                                             \
    const fkda_status try_status = (call);                                                         \
    if (try_status) return try_status;                                                             \
  } while (0)

typedef struct fkda_cuda_loaded {
  struct fkda_cuda_loaded *next;
  int32_t device_id;
  fkda_cu_context context;
  struct {
    fkda_cu_function function;
    int32_t shared;
  } kernel[]; /* [count] */
} loaded_kernels;

static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;

static loaded_kernels *find(fkda_cuda_kernels *kernels, int32_t device_id) {
  loaded_kernels *l = atomic_load_explicit(&kernels->loaded, memory_order_acquire);
  while (l && l->device_id != device_id) l = l->next;
  return l;
}

/* ---- the primary context, current while we work --------------------------------------------------- */

static fkda_status enter(const fkda_cuda_driver *d, fkda_cu_context context, bool *pushed) {
  fkda_cu_context current = NULL;
  *pushed = false;
  int result = d->api.context_get_current(&current);
  if (result) return fkda_cuda_fail(d, result, "cuCtxGetCurrent");
  if (current == context) return FKDA_OK;
  if ((result = d->api.context_push(context))) return fkda_cuda_fail(d, result, "cuCtxPushCurrent");
  *pushed = true;
  return FKDA_OK;
}

static void leave(const fkda_cuda_driver *d, bool pushed) {
  fkda_cu_context context;
  if (pushed) (void)d->api.context_pop(&context);
}

/* ---- loading ---------------------------------------------------------------------------------------- */

const void *fkda_cuda_image_of(const char *name) {
  const fkda_cuda_image *image = fkda_cuda_images;
  while (image->name && strcmp(image->name, name) != 0) ++image;
  return image->data;
}

/* The module of kernel i: that of an earlier kernel in the same image, or a new one. */
static fkda_status module_of(const fkda_cuda_driver *d, const fkda_cuda_kernels *kernels, int32_t i,
                             fkda_cu_module *modules) {
  for (int32_t j = 0; j < i; ++j)
    if (strcmp(kernels->kernels[j].image, kernels->kernels[i].image) == 0) {
      modules[i] = modules[j];
      return FKDA_OK;
    }
  const char *name = kernels->kernels[i].image;
  const void *data = fkda_cuda_image_of(name);
  if (!data) return fkda_fail(FKDA_ERROR_INTERNAL, "%s: not in this build", name);
  const int result = d->api.module_load_data(&modules[i], data);
  return result ? fkda_cuda_fail(d, result, name) : FKDA_OK;
}

static fkda_status load_function(const fkda_cuda_driver *d, const char *entry, int32_t shared,
                                 fkda_cu_module module, fkda_cu_function *function) {
  int result = d->api.module_get_function(function, module, entry);
  if (!result && shared)
    result =
        d->api.function_set_attribute(*function, FKDA_CU_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared);
  /* Lazy loading (CUDA_MODULE_LOADING) would leave the rest of the work to the first launch. */
  if (!result && d->api.function_load) result = d->api.function_load(*function);
  return result ? fkda_cuda_fail(d, result, entry) : FKDA_OK;
}

static fkda_status load_functions(const fkda_cuda_driver *d, const fkda_cuda_kernels *kernels,
                                  loaded_kernels *l) {
  fkda_cu_module *modules = calloc((size_t)kernels->count, sizeof *modules);
  if (!modules) return fkda_fail(FKDA_ERROR_OUT_OF_MEMORY, "no memory to load kernels");
  fkda_status status = FKDA_OK;
  int32_t i = 0;
  for (; i < kernels->count && !status; ++i) {
    l->kernel[i].shared = kernels->shared(&d->devices[l->device_id], i);
    status = module_of(d, kernels, i, modules);
    if (!status)
      status = load_function(d, kernels->kernels[i].entry, l->kernel[i].shared, modules[i],
                             &l->kernel[i].function);
  }
  for (int32_t j = 0; status && j < i; ++j) {
    bool first = modules[j] != NULL;
    for (int32_t m = 0; m < j; ++m) first &= modules[m] != modules[j];
    if (first) (void)d->api.module_unload(modules[j]);
  }
  free(modules); /* the modules themselves stay: nothing here is ever unloaded */
  return status;
}

static fkda_status refuse_capture(const fkda_cuda_driver *d, void *stream) {
  int status = FKDA_CU_CAPTURE_NONE;
  const int result = d->api.stream_is_capturing(stream, &status);
  if (result && result != FKDA_CU_ERROR_STREAM_CAPTURE_IMPLICIT)
    return fkda_cuda_fail(d, result, "cuStreamIsCapturing");
  if (!result && status == FKDA_CU_CAPTURE_NONE) return FKDA_OK;
  return fkda_fail(FKDA_ERROR_DEVICE,
                   "stream: capturing a graph, and the kernels are not loaded yet: call "
                   "fkda_warmup() or the function itself on this device before the capture");
}

/* In the primary context. stream: where the kernels are to be launched at once; NULL for a warm-up. */
static fkda_status load_here(const fkda_cuda_driver *d, fkda_cuda_kernels *kernels,
                             loaded_kernels *l, void *const *stream) {
  bool pushed;
  TRY(enter(d, l->context, &pushed));
  fkda_status status = stream ? refuse_capture(d, *stream) : FKDA_OK;
  if (!status) {
    /* Other threads may be capturing in CU_STREAM_CAPTURE_MODE_GLOBAL, which our loading would spoil. */
    int mode = FKDA_CU_CAPTURE_MODE_RELAXED;
    const int result = d->api.exchange_capture_mode(&mode);
    if (result) {
      status = fkda_cuda_fail(d, result, "cuThreadExchangeStreamCaptureMode");
    } else {
      status = load_functions(d, kernels, l);
      (void)d->api.exchange_capture_mode(&mode);
    }
  }
  leave(d, pushed);
  return status;
}

static fkda_status load(const fkda_cuda_driver *d, fkda_cuda_kernels *kernels, int32_t device_id,
                        void *const *stream) {
  const size_t size =
      sizeof(loaded_kernels) + (size_t)kernels->count * sizeof(((loaded_kernels *)0)->kernel[0]);
  loaded_kernels *l = calloc(1, size);
  if (!l) return fkda_fail(FKDA_ERROR_OUT_OF_MEMORY, "no memory to load kernels");
  l->device_id = device_id;
  const int handle = d->devices[device_id].handle;
  const int result = d->api.primary_context_retain(&l->context, handle);
  fkda_status status = result ? fkda_cuda_fail(d, result, "cuDevicePrimaryCtxRetain")
                              : load_here(d, kernels, l, stream);
  if (status) {
    if (!result) (void)d->api.primary_context_release(handle);
    free(l);
    return status;
  }
  l->next = atomic_load_explicit(&kernels->loaded, memory_order_relaxed);
  atomic_store_explicit(&kernels->loaded, l, memory_order_release);
  return FKDA_OK;
}

/* The device's functions, loaded if need be. The failure of an attempt is not remembered. */
static fkda_status get(const fkda_cuda_driver *d, fkda_cuda_kernels *kernels, int32_t device_id,
                       void *const *stream, loaded_kernels **l) {
  if ((*l = find(kernels, device_id))) return FKDA_OK;
  pthread_mutex_lock(&loading);
  fkda_status status = FKDA_OK;
  if (!(*l = find(kernels, device_id))) {
    status = load(d, kernels, device_id, stream);
    if (!status) *l = find(kernels, device_id);
  }
  pthread_mutex_unlock(&loading);
  return status;
}

fkda_status fkda_cuda_kernels_load(fkda_cuda_kernels *kernels, const fkda_cuda_driver *driver,
                                   int32_t device_id) {
  loaded_kernels *l;
  return get(driver, kernels, device_id, NULL, &l);
}

/* ---- launching -------------------------------------------------------------------------------------- */

/* Programmatic dependent launch: sm_90 and newer. Drivers before CUDA 12.3 do not capture it. */
static bool can_start_early(const fkda_cuda_driver *driver, int32_t device_id) {
  return driver->devices[device_id].major >= 9 && driver->version >= 12030;
}

/* In the primary context. */
static fkda_status launch_one(const fkda_cuda_driver *driver, int32_t device_id, void *stream,
                              const fkda_cuda_launch *launch) {
  const loaded_kernels *l = find(launch->kernels, device_id);
  void *parameters[] = {launch->params};
  fkda_cu_launch_attribute early = {.id = FKDA_CU_LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION,
                                    .value.programmatic_stream_serialization_allowed = 1};
  const fkda_cu_launch_config config = {
      .grid = {launch->blocks, 1, 1},
      .block = {launch->threads, 1, 1},
      .shared_bytes = launch->shared ? launch->shared : (unsigned)l->kernel[launch->kernel].shared,
      .stream = stream,
      .attributes = &early,
      .attribute_count = launch->waits && can_start_early(driver, device_id),
  };
  const int result =
      driver->api.launch_kernel(&config, l->kernel[launch->kernel].function, parameters, NULL);
  const char *entry = launch->kernels->kernels[launch->kernel].entry;
  if (result == FKDA_CU_ERROR_INVALID_HANDLE)
    return fkda_fail(
        FKDA_ERROR_DEVICE,
        "stream: %p, expected a stream of device %d's primary context (%s was refused)", stream,
        (int)device_id, entry);
  return result ? fkda_cuda_fail(driver, result, entry) : FKDA_OK;
}

fkda_status fkda_cuda_launch_all(const fkda_cuda_driver *driver, int32_t device_id, void *stream,
                                 const fkda_cuda_launch *launches, int32_t count) {
  loaded_kernels *l = NULL;
  bool pushed;
  for (int32_t i = 0; i < count; ++i) TRY(get(driver, launches[i].kernels, device_id, &stream, &l));
  if (!l) return FKDA_OK;
  TRY(enter(driver, l->context, &pushed));
  fkda_status status = FKDA_OK;
  for (int32_t i = 0; i < count && !status; ++i)
    if (launches[i].prepare) status = launches[i].prepare(driver, launches[i].params);
  for (int32_t i = 0; i < count && !status; ++i)
    status = launch_one(driver, device_id, stream, &launches[i]);
  leave(driver, pushed);
  return status;
}
