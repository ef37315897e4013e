/* The ordered backend table. */
#include "run/backend.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>

extern const fkda_backend fkda_backend_cuda_sm90, fkda_backend_cuda_portable;
extern const fkda_backend fkda_backend_cpu_avx512, fkda_backend_cpu_avx2, fkda_backend_cpu_neon,
    fkda_backend_cpu_scalar, fkda_backend_reference;

/* clang-format off */
static const fkda_backend *const backends[] = {
#if FKDA_WITH_CUDA
    &fkda_backend_cuda_sm90,
    &fkda_backend_cuda_portable,
#endif
#if defined(__x86_64__)
    &fkda_backend_cpu_avx512,
    &fkda_backend_cpu_avx2,
#elif defined(__aarch64__)
    &fkda_backend_cpu_neon,
#endif
    &fkda_backend_cpu_scalar,
    &fkda_backend_reference,
};
/* clang-format on */

const fkda_backend *fkda_backend_at(int32_t index) {
  const int32_t count = (int32_t)(sizeof backends / sizeof backends[0]);
  return index >= 0 && index < count ? backends[index] : NULL;
}

bool fkda_backend_usable(int32_t index, char *reason, size_t capacity) {
  static _Atomic signed char known[sizeof backends / sizeof backends[0]]; /* 1 yes, -1 no */
  signed char usable = atomic_load_explicit(&known[index], memory_order_relaxed);
  if (usable == 0 || (usable < 0 && capacity)) {
    usable = backends[index]->available(backends[index], reason, capacity) ? 1 : -1;
    atomic_store_explicit(&known[index], usable, memory_order_relaxed);
  }
  return usable > 0;
}

bool fkda_refuse(char *reason, size_t capacity, const char *format, ...) {
  if (capacity == 0) return false;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(reason, capacity, format, arguments);
  va_end(arguments);
  return false;
}
