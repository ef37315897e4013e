/* The CPU kernels for one instruction set, whose shim was included before, as the table KERNELS: see
 * kernels.h. */
#include "cpu/chunk.h"
#include "cpu/decode.h"
/* over chunk.h */
#include "cpu/backward.h"

const fkda_cpu_kernels KERNELS = {
    .isa = ISA_NAME,
    .panel = PANEL,
    .lanes = LANES,
    .state_size = state_size,
    .factors_size = factors_size,
    .scratch_size = scratch_size,
    .prefill = prefill,
    .make_factors = make_chunks,
    .apply = apply_chunks,
    .decode = decode,
    .backward_scratch = backward_scratch,
    .backward = backward,
};
