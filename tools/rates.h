/* What the machine can do: the yardsticks of `flashkda bench`.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef FKDA_TOOLS_RATES_H
#define FKDA_TOOLS_RATES_H

#include <stdbool.h>

/** Loads libopenblas.so.0; false if it is not there. */
bool fkda_sgemm_load(void);
/** Rate of 2048 x 2048 x 2048 fp32 matrix products on that many threads over at least `seconds`; 0 if there is no
 *  memory for them. */
double fkda_sgemm_gflops(int threads, double seconds);
/** The kernels that OpenBLAS chose ("SkylakeX") and its build description. */
const char *fkda_sgemm_core(void);
const char *fkda_sgemm_config(void);

/** Bytes read plus bytes written a second, in GB, by x = a * x over a buffer larger than any cache, on that
 *  many threads over at least `seconds`; 0 if there is no memory for it. */
double fkda_memory_gbps(int threads, double seconds);

#endif
