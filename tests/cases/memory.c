/* SPDX-License-Identifier: MIT */
#include <stdlib.h>
#include <string.h>

#include "cases.h"

#if defined(__SANITIZE_ADDRESS__)
#define HAVE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HAVE_ASAN 1
#endif
#endif

#ifdef HAVE_ASAN
void __asan_poison_memory_region(void const volatile *address, size_t size);
void __asan_unpoison_memory_region(void const volatile *address, size_t size);
#endif

static void *host_alloc(const fkda_memory *memory, size_t size) {
  (void)memory;
  return aligned_alloc(256, (size + 255) / 256 * 256 + 256);
}

static bool host_copy(const fkda_memory *memory, void *to, const void *from, size_t size) {
  (void)memory;
  if (size) memcpy(to, from, size);
  return true;
}

static void host_free(const fkda_memory *memory, void *pointer) {
  (void)memory;
  free(pointer);
}

static void host_protect(const fkda_memory *memory, void *pointer, size_t size, bool on) {
  (void)memory;
#ifdef HAVE_ASAN
  (on ? __asan_poison_memory_region : __asan_unpoison_memory_region)(pointer, size);
#else
  (void)pointer;
  (void)size;
  (void)on;
#endif
}

const fkda_memory *fkda_memory_host(void) {
  static const fkda_memory host = {
      .device_type = FKDA_DEVICE_CPU,
      .null_workspace = true,
      .guard = FKDA_MEMORY_GUARD,
      .alloc = host_alloc,
      .upload = host_copy,
      .download = host_copy,
      .free = host_free,
      .protect = host_protect,
  };
  return &host;
}
