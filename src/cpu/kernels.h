/* What one instruction set offers to the CPU backend.
 *
 * The algorithms stand once, in chunk.h (prefill, summary), decode.h and backward.h, over a vector shim:
 * simd_avx512.h, simd_avx2.h, simd_neon.h or simd_scalar.h. kernels_<isa>.c includes one shim and both
 * texts, is compiled with that ISA's flags, and exports one table. A shim provides
 *
 *   ISA_NAME, LANES            floats in a vec
 *   TILE_ROWS, TILE_VECTORS    register tile of the matrix products, TILE_ROWS divides LANES
 *   v_load v_store v_set v_add v_sub v_mul v_fma (a*b+c) v_fnma (c-a*b) v_abs v_sum
 *   v_max v_min                of a NaN and a number: the second operand (x86) or NaN; so the argument
 *                              that may be NaN is always written second
 *   v_round, v_scale2 (a*2^n)  n rounded, in [-127, 127]
 *   v_reciprocal, v_rsqrt      to about one ulp
 *   v_unless_below(a, l, x)    x, or 0 where a < l; of a NaN in a: x
 *   v_any_not_below            true if some a <= limit does not hold (NaN included)
 *   v_load_bf16, v_store_bf16, v_load_f16, v_store_f16, v_transpose
 */
#ifndef FKDA_CPU_KERNELS_H
#define FKDA_CPU_KERNELS_H

#include "check/problem.h"

struct fkda_plan_t;

/* Tokens a chunk. 16 keeps |G| <= 80 for lower_bound -5, and its triangle cheap. */
#define FKDA_CPU_CHUNK 16

/* One sequence and value head, or a part of its value columns. */
typedef struct fkda_cpu_job {
  const fkda_problem *problem;
  int64_t n, head;        /* sequence, value head */
  int64_t v_begin, v_end; /* value columns */
  int64_t checkpoint_row; /* checkpoints by interval: the sequence's first row */
  bool identity;          /* initial state I instead of problem->initial (summary's M) */
} fkda_cpu_job;

typedef struct fkda_cpu_kernels {
  const char *isa;
  int32_t panel; /* value columns worked on together; parts of V start at multiples of it */
  size_t (*prefill_scratch)(int64_t K, int64_t V); /* bytes, a multiple of 64 */
  void (*prefill)(const fkda_cpu_job *job, void *scratch);
  void (*decode)(const fkda_cpu_job *job);
  /* All of V; job->head is a head of q and k. d_gate [HV][1 + K]: the sequence's parts of d_A_log and d_dt_bias
   * are added. */
  size_t (*backward_scratch)(const fkda_problem *problem);
  void (*backward)(const fkda_cpu_job *job, void *scratch, double *d_gate);
} fkda_cpu_kernels;

/* Planning and running a backward over any of these (backward.c). */
void fkda_cpu_backward_plan(const fkda_cpu_kernels *kernels, const fkda_problem *problem,
                            struct fkda_plan_t *plan);
fkda_status fkda_cpu_backward_launch(const fkda_cpu_kernels *kernels, const fkda_problem *problem,
                                     const struct fkda_plan_t *plan);

extern const fkda_cpu_kernels fkda_cpu_kernels_scalar, fkda_cpu_kernels_avx2,
    fkda_cpu_kernels_avx512, fkda_cpu_kernels_neon;

#endif
