#include "cpu/simd_scalar.h"

#define KERNELS fkda_cpu_kernels_scalar
#include "cpu/kernels_text.h"
