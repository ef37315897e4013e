#include "cpu/simd_avx512.h"

#define KERNELS fkda_cpu_kernels_avx512
#include "cpu/kernels_text.h"
