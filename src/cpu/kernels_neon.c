#include "cpu/simd_neon.h"

#define KERNELS fkda_cpu_kernels_neon
#include "cpu/kernels_text.h"
