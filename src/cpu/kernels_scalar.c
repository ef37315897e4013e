/* The CPU kernels compiled for one instruction set: see kernels.h. */
#include "cpu/simd_scalar.h"

#include "cpu/chunk.h"
#include "cpu/decode.h"
/* over chunk.h */
#include "cpu/backward.h"

const fkda_cpu_kernels fkda_cpu_kernels_scalar = {
    .isa = ISA_NAME,
    .panel = PANEL,
    .prefill_scratch = prefill_scratch,
    .prefill = prefill,
    .decode = decode,
    .backward_scratch = backward_scratch,
    .backward = backward,
};
