#include "cpu/simd_avx2.h"

#define KERNELS fkda_cpu_kernels_avx2
#include "cpu/kernels_text.h"
