/* A libcuda.so.1 for tests: says of itself what the test wants, and records what it is asked to do.
 * It also counts what a real driver would not forgive. One process, one fake driver: tests set it up
 * in a forked child.
 */
#ifndef FKDA_TESTS_FAKE_DRIVER_H
#define FKDA_TESTS_FAKE_DRIVER_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum { FAKE_DEVICES = 3, FAKE_FUNCTIONS = 128, FAKE_PARAMS = 4096, FAKE_HISTORY = 8 };

/* A CUstream. */
typedef struct fake_stream {
  int device;
  int capture; /* CUstreamCaptureStatus */
} fake_stream;

/* What cuTensorMapEncodeTiled of this driver writes: what it was given. A CUtensorMap has 128 bytes. */
typedef struct fake_tensor_map {
  void *address;
  uint64_t sizes[4], strides[3];
  uint16_t box[4];
  int32_t data_type, interleave, swizzle, l2_promotion, oob_fill;
} fake_tensor_map;
_Static_assert(sizeof(fake_tensor_map) <= 128, "a CUtensorMap");

typedef struct fake_launch {
  char entry[64];
  unsigned grid[3], block[3], shared;
  void *stream;
  int early;  /* programmatic stream serialization allowed */
  int device; /* of the current context */
  unsigned char params[FAKE_PARAMS];
} fake_launch;

typedef struct fake_driver {
  /* what it says */
  int version, device_count;
  struct {
    int major, minor;
  } capability[FAKE_DEVICES];
  int shared_kilobytes; /* of a processor; a block can have one less */
  const char *failing;  /* this function answers `failure` */
  int failure;
  size_t (*params_size)(const char *entry); /* bytes of a kernel's parameter */
  int legacy_capture; /* what cuStreamIsCapturing says of stream NULL: a CUresult */

  /* what it was asked */
  atomic_int inits, retains, releases, pushes, pops, loads, unloads, functions, function_loads,
      launches, maps, current_asked;
  char entries[FAKE_FUNCTIONS][64]; /* of cuModuleGetFunction, in order */
  int entry_shared[FAKE_FUNCTIONS];
  int entry_device[FAKE_FUNCTIONS];
  fake_launch launch;                /* the last one */
  fake_launch history[FAKE_HISTORY]; /* launch number i is at i % FAKE_HISTORY */
  atomic_int mistakes;
  char mistake[128]; /* the last one */
} fake_driver;

extern fake_driver fake;

/* The context of a device; what a test makes current itself. */
void *fake_context(int device);
/* Depth of the calling thread's stack of contexts. */
int fake_depth(void);
/* Its CUstreamCaptureMode; 0 (global) at first. */
int fake_capture_mode(void);

/* Those of the driver's functions that tests call themselves. */
int cuCtxPushCurrent_v2(void *context);
int cuCtxPopCurrent_v2(void **context);
int cuCtxGetCurrent(void **context);

#endif
