/* Finding and starting the CUDA driver. */
#include "cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/images.h"
#include "run/backend.h"

static const char library[] = "libcuda.so.1";
static const char fork_reason[] =
    "CUDA was started before this process was forked off; start it in the child only, or spawn";

static fkda_cuda_driver driver;
static char refusal[FKDA_REASON_CAPACITY]; /* why there is no driver */

enum { UNKNOWN, STARTING, FOUND, MISSING };
static _Atomic int progress = UNKNOWN;
static _Atomic bool forked;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* held while STARTING */

/* The driver's threads and mappings stay behind in the parent. A child forked while another thread was
 * starting the driver is no better off, and finds the mutex held for ever: `forked` is asked first. */
static void note_fork(void) {
  const int reached = atomic_load(&progress);
  if (reached == STARTING || reached == FOUND) atomic_store(&forked, true);
}

bool fkda_cuda_forked(void) { return atomic_load_explicit(&forked, memory_order_relaxed); }

static const char *error_name(int result) {
  const char *text = NULL;
  return driver.api.get_error_name(result, &text) == FKDA_CU_SUCCESS && text ? text
                                                                             : "unknown error";
}

static const char *error_text(int result) {
  const char *text = NULL;
  return driver.api.get_error_string(result, &text) == FKDA_CU_SUCCESS && text ? text : "no text";
}

fkda_status fkda_cuda_fail(const fkda_cuda_driver *d, int result, const char *what) {
  (void)d;
  return fkda_fail(FKDA_ERROR_DEVICE, "%s: %s, error %d (%s)", what, error_name(result), result,
                   error_text(result));
}

#define REFUSE(...) return fkda_refuse(refusal, sizeof refusal, __VA_ARGS__)

/* cuFuncLoad and the like are found as data; C has no cast from that to a function that is not warned of. */
static void find(void *handle, const char *symbol, void *function) {
  void *address = dlsym(handle, symbol);
  memcpy(function, &address, sizeof address);
}

static bool find_functions(void *handle) {
  const char *missing = NULL;
#define FIND(name, symbol, parameters)                                                             \
  find(handle, symbol, &driver.api.name);                                                          \
  if (!driver.api.name && !missing) missing = symbol;
  FKDA_CU_LIST(FIND)
#undef FIND
#define FIND(name, symbol, parameters) find(handle, symbol, &driver.api.name);
  FKDA_CU_OPTIONAL_LIST(FIND)
#undef FIND
  if (missing) REFUSE("the NVIDIA driver (%s) is too old: it has no %s", library, missing);
  return true;
}

/* The driver branch in which CUDA <major>.0 came out: CUDA release notes, "CUDA Toolkit and
 * Corresponding Driver Versions". */
static const char *driver_branch(int32_t major) {
  return major == 12 ? " (NVIDIA driver 525)" : major == 13 ? " (NVIDIA driver 580)" : "";
}

/* Machine code of a toolkit runs with every driver of the same major version or a newer one ("minor
 * version compatibility"). */
static bool check_version(void) {
  const int result = driver.api.driver_get_version(&driver.version);
  if (result != FKDA_CU_SUCCESS)
    REFUSE("the NVIDIA driver does not tell its version: %s", error_name(result));
  const int32_t needed = fkda_cuda_toolkit_version / 1000;
  if (driver.version / 1000 < needed)
    REFUSE("the NVIDIA driver is too old: it supports CUDA %d.%d, expected %d.0 or newer%s",
           (int)(driver.version / 1000), (int)(driver.version % 1000 / 10), (int)needed,
           driver_branch(needed));
  return true;
}

static bool start(void) {
  const int result = driver.api.init(0);
  switch (result) {
    case FKDA_CU_SUCCESS: return true;
    case FKDA_CU_ERROR_NO_DEVICE:
      REFUSE("no CUDA device: the NVIDIA driver sees none (CUDA_VISIBLE_DEVICES hides devices)");
    case FKDA_CU_ERROR_NOT_INITIALIZED: /* the caller's own CUDA, before we were asked */
      REFUSE("%s", fork_reason);
    case FKDA_CU_ERROR_STUB_LIBRARY:
      REFUSE("%s is the toolkit's stub, not a driver: take it out of LD_LIBRARY_PATH", library);
    case FKDA_CU_ERROR_SYSTEM_DRIVER_MISMATCH:
      REFUSE(
          "%s and the kernel's NVIDIA module are of different versions (restart after an update)",
          library);
    default:
      REFUSE("the NVIDIA driver does not start: %s, error %d (%s)", error_name(result), result,
             error_text(result));
  }
}

static bool describe_device(int ordinal, fkda_cuda_device *device) {
  const fkda_cu_api *api = &driver.api;
  int result = api->device_get(&device->handle, ordinal);
  if (!result) result = api->device_get_name(device->name, sizeof device->name, device->handle);
  const struct {
    int attribute;
    int32_t *value;
  } attributes[] = {{FKDA_CU_COMPUTE_CAPABILITY_MAJOR, &device->major},
                    {FKDA_CU_COMPUTE_CAPABILITY_MINOR, &device->minor},
                    {FKDA_CU_MULTIPROCESSOR_COUNT, &device->processors},
                    {FKDA_CU_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, &device->processor_shared},
                    {FKDA_CU_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &device->block_shared}};
  for (size_t i = 0; i < sizeof attributes / sizeof attributes[0] && !result; ++i)
    result =
        api->device_get_attribute(attributes[i].value, attributes[i].attribute, device->handle);
  if (result) REFUSE("CUDA device %d cannot be asked: %s", ordinal, error_name(result));
  return true;
}

static bool list_devices(void) {
  int count = 0;
  const int result = driver.api.device_get_count(&count);
  if (result != FKDA_CU_SUCCESS)
    REFUSE("the NVIDIA driver does not count its devices: %s", error_name(result));
  if (count < 1)
    REFUSE("no CUDA device: the NVIDIA driver sees none (CUDA_VISIBLE_DEVICES hides devices)");
  fkda_cuda_device *devices =
      calloc((size_t)count, sizeof *devices); /* lives as long as the process */
  if (!devices) REFUSE("no memory for the list of CUDA devices");
  for (int i = 0; i < count; ++i)
    if (!describe_device(i, &devices[i])) {
      free(devices);
      return false;
    }
  driver.devices = devices;
  driver.device_count = count;
  return true;
}

static bool find_driver(void) {
  if (pthread_atfork(NULL, NULL, note_fork)) REFUSE("no memory for a fork handler");
  void *handle =
      dlopen(library, RTLD_NOW | RTLD_LOCAL); /* kept open: the driver cannot be unloaded */
  if (!handle) {
    const char *why = dlerror();
    REFUSE("no NVIDIA driver: %s", why ? why : library);
  }
  return find_functions(handle) && check_version() && start() && list_devices();
}

const fkda_cuda_driver *fkda_cuda_driver_get(char *reason, size_t capacity) {
  if (fkda_cuda_forked()) {
    fkda_refuse(reason, capacity, "%s", fork_reason);
    return NULL;
  }
  int reached = atomic_load_explicit(&progress, memory_order_acquire);
  if (reached != FOUND && reached != MISSING) {
    pthread_mutex_lock(&mutex);
    reached = atomic_load(&progress);
    if (reached == UNKNOWN) {
      atomic_store(&progress, STARTING);
      reached = find_driver() ? FOUND : MISSING;
      atomic_store(&progress, reached);
    }
    pthread_mutex_unlock(&mutex);
  }
  if (reached == FOUND) return &driver;
  fkda_refuse(reason, capacity, "%s", refusal);
  return NULL;
}

bool fkda_cuda_device_usable(const fkda_cuda_driver *d, int32_t ordinal,
                             const fkda_cuda_capabilities *wanted, char *reason, size_t capacity) {
  if (ordinal < 0 || ordinal >= d->device_count)
    return fkda_refuse(reason, capacity, "device_id: %d, expected 0 to %d (%d CUDA device%s here)",
                       (int)ordinal, (int)d->device_count - 1, (int)d->device_count,
                       d->device_count == 1 ? "" : "s");
  const fkda_cuda_device *device = &d->devices[ordinal];
  const int32_t own = device->major * 10 + device->minor;
  if (own < wanted->first || own > wanted->last)
    return fkda_refuse(reason, capacity,
                       "device_id: %d (%s) has compute capability %d.%d, expected %d.%d%s",
                       (int)ordinal, device->name, (int)device->major, (int)device->minor,
                       (int)(wanted->first / 10), (int)(wanted->first % 10),
                       wanted->last == FKDA_CUDA_AND_NEWER ? " or newer" : "");
  return true;
}
