/* What one instruction set offers to the CPU backend.
 *
 * The algorithms stand once, in chunk.h (prefill, summary), decode.h and backward.h, over a vector shim:
 * simd_avx512.h, simd_avx2.h, simd_neon.h or simd_scalar.h. kernels_<isa>.c includes one shim and
 * kernels_text.h, is compiled with that ISA's flags, and exports one table. A shim provides
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
 *   v_load2_bf16, v_store2_bf16  2 * LANES elements, those with even index in x[0], with odd in x[1]
 *   v_load_bf16, v_store_bf16, v_load_f16, v_store_f16, v_transpose
 */
#ifndef FKDA_CPU_KERNELS_H
#define FKDA_CPU_KERNELS_H

#include "check/problem.h"

struct fkda_plan_t;

/* Tokens a chunk. 16 keeps |G| <= 80 for lower_bound -5, and its triangle cheap. */
#define FKDA_CPU_CHUNK 16

/* Of the workspace, its parts and each thread's scratch: a cache line, a 512-bit vector. */
#define FKDA_CPU_ALIGNMENT 64
static inline size_t fkda_cpu_align_up(size_t bytes) {
  return (bytes + FKDA_CPU_ALIGNMENT - 1) / FKDA_CPU_ALIGNMENT * FKDA_CPU_ALIGNMENT;
}

/* One sequence and value head, or a part of its value columns. */
typedef struct fkda_cpu_job {
  const fkda_problem *problem;
  int64_t n, head;        /* sequence, value head */
  int64_t v_begin, v_end; /* value columns */
  int64_t checkpoint_row; /* checkpoints by interval: the sequence's first row */
  bool identity;          /* initial state I instead of problem->initial (summary's M) */
} fkda_cpu_job;

/* Factors of consecutive chunks of one sequence and head: those of chunk c lie in slot c % count. */
typedef struct fkda_cpu_ring {
  char *slots;
  size_t slot_size; /* factors_size() */
  int64_t count;
} fkda_cpu_ring;

typedef struct fkda_cpu_kernels {
  const char *isa;
  /* Parts of V start at multiples of `panel`, the value columns that are worked on together; or they are
   * all `lanes` wide. */
  int32_t panel, lanes;

  /* Bytes of a head's state, of a chunk's factors, and of a thread's own memory. */
  size_t (*state_size)(int64_t K, int64_t V);
  size_t (*factors_size)(int64_t K);
  size_t (*scratch_size)(int64_t K, int64_t V);

  /* A whole job, serially. */
  void (*prefill)(const fkda_cpu_job *job, void *state, void *scratch);
  /* The same in pieces: the factors of chunks first..last-1, in any order and whatever columns the job
   * has; then these chunks' values, in order. `state` is of the whole head, of which the job has its
   * columns' part. The call with first = 0 begins the sequence, the one with its last chunk ends it; an
   * empty sequence has one call, with 0 and 0. *next_checkpoint passes from call to call. */
  void (*make_factors)(const fkda_cpu_job *job, const fkda_cpu_ring *ring, int64_t first,
                       int64_t last, void *scratch);
  void (*apply)(const fkda_cpu_job *job, const fkda_cpu_ring *ring, int64_t first, int64_t last,
                void *state, int64_t *next_checkpoint, void *scratch);

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
                                     const struct fkda_plan_t *plan, char *workspace);

extern const fkda_cpu_kernels fkda_cpu_kernels_scalar, fkda_cpu_kernels_avx2,
    fkda_cpu_kernels_avx512, fkda_cpu_kernels_neon;

#endif
