/* What the host hands to the portable kernels of the backward, by value, how it launches them, and what lies
 * where in the workspace. Plain C, shared by launcher and kernels.
 *
 * Four launches, one after the other in the stream, all with the same parameters:
 *
 *   factors     per chunk and value head: the operands of (8), Z and P in place of (9), norms
 *   walk        per sequence, value head and part of V: with `forward` the states before each block and E of
 *               (23); the gradients of the states behind each block, diag(beta)^-1 dV, dV and d_initial_state
 *   gradients   per block and value head: everything else; with HV > H its d_q and d_k go to the workspace
 *   reduce      sums over the blocks (d_A_log, d_dt_bias) and, with HV > H, over a group (d_q, d_k)
 *
 * Where only d_v and d_initial_state are wanted, `forward` may be 0 and the last two launches be left out. Where
 * neither d_A_log nor d_dt_bias is wanted and HV = H, reduce may be left out. */
#ifndef FKDA_CUDA_PORTABLE_BACKWARD_PARAMS_H
#define FKDA_CUDA_PORTABLE_BACKWARD_PARAMS_H

#include "check/problem.h"

#define FKDA_BACKWARD_CHUNK 32 /* tokens of a step of the walk */
#define FKDA_BACKWARD_BLOCK                                                                        \
  64 /* tokens of a block, and from one stored state to the next: the plan's chunk */

#define FKDA_BACKWARD_REDO 4 /* directions (backward, forward) times parts of V of the sm90 walk */

typedef struct fkda_portable_backward_params {
  fkda_problem problem;
  char *workspace; /* aligned to 256 bytes */
  int64_t rows;    /* fkda_portable_backward_rows() */
  int32_t
      value_split; /* blocks that share a head's V in the walk: parts of V / value_split columns */
  int32_t stages;  /* chunks in the walk's ring of shared memory, 2 to 8 */
  int32_t forward; /* 1: the walk makes the states and E too */
  /* NULL, or FKDA_BACKWARD_REDO flags of each sequence and value head, [N][HV][FKDA_BACKWARD_REDO]: factors and walk do
   * those heads only of which one is not 0. The row `sm90` has them at the end of the workspace. */
  uint32_t *redo;
  /* 1 where base and strides are multiples of 16 bytes and the type is bf16, so that rows can be copied in
   * 16-byte pieces; d_q, d_k, d_v, d_g: of either type. Else the kernels go element by element. Absent tensors: 0. */
  int32_t aligned_q, aligned_k, aligned_v, aligned_g, aligned_d_out;
  int32_t aligned_d_q, aligned_d_k, aligned_d_v, aligned_d_g;
} fkda_portable_backward_params;

/* ---- workspace -------------------------------------------------------------------------------------
 *
 * Blocks of FKDA_BACKWARD_BLOCK tokens are numbered without looking at the lengths: block j of sequence n is
 * row (b * T + begin) / BLOCK + n + j. So the rows below are enough for every cu_seqlens; some stay idle. Every
 * part of the workspace is an array [rows][HV] of the sizes below, one part after the other. */
FKDA_HOST_DEVICE static inline int64_t fkda_portable_backward_rows(int64_t B, int64_t T,
                                                                   int64_t N) {
  return B * T / FKDA_BACKWARD_BLOCK + N;
}

/* Bytes for a row and value head. */
typedef struct fkda_portable_backward_sizes {
  int64_t
      factors;    /* two chunks' operands; in the end the row's d_q, d_k [2][64][K] f32 if HV > H */
  int64_t states; /* S before the block, bf16 */
  int64_t d_states;    /* dS behind the block, bf16 */
  int64_t differences; /* E [64][V], bf16 */
  int64_t d_updates;   /* diag(beta)^-1 dV [64][V], bf16 */
  int64_t sums;        /* d_dt_bias [K], d_A_log, of the block: f32 */
} fkda_portable_backward_sizes;

/* One chunk's operands, in tiles of bf16; offsets in bytes. What the forward walk reads comes first. */
#define FKDA_BACKWARD_K_START(K) 0          /* k e^{G_i} [32][K] */
#define FKDA_BACKWARD_K_END(K) (64 * (K))   /* k e^{G_C - G_i} [32][K] */
#define FKDA_BACKWARD_Z_HIGH(K) (128 * (K)) /* -Z [32][32] = high + low */
#define FKDA_BACKWARD_Z_LOW(K) (128 * (K) + 2048)
#define FKDA_BACKWARD_DECAY(K) (128 * (K) + 4096)        /* e^{G_C} [K] f32 */
#define FKDA_BACKWARD_BETA(K) (132 * (K) + 4096)         /* [32] f32 */
#define FKDA_BACKWARD_NORM_K(K) (132 * (K) + 4096 + 128) /* 1/|k| or 1 [32] f32 */
#define FKDA_BACKWARD_NORM_Q(K) (132 * (K) + 4096 + 256) /* scale/|q| or scale [32] f32 */
/* Not 0: K_END holds differences of neighbours, each row less the next, for nearly all of them are nearly parallel. */
#define FKDA_BACKWARD_PARALLEL(K) (132 * (K) + 4096 + 384)
#define FKDA_BACKWARD_FORWARD_BYTES(K) (132 * (K) + 4096 + 400)
#define FKDA_BACKWARD_Q_START(K) FKDA_BACKWARD_FORWARD_BYTES(K) /* scale/|q| q e^{G_i} [32][K] */
#define FKDA_BACKWARD_P(K) (196 * (K) + 4096 + 400)             /* P, norms included [32][32] */
#define FKDA_BACKWARD_RECORD_BYTES(K) (196 * (K) + 6144 + 400)
/* From one chunk's record to the next's: room for half of the block's d_q, d_k too. */
#define FKDA_BACKWARD_RECORD(K)                                                                    \
  (FKDA_BACKWARD_RECORD_BYTES(K) > 256 * (K) ? FKDA_BACKWARD_RECORD_BYTES(K) : 256 * (K))

FKDA_HOST_DEVICE static inline fkda_portable_backward_sizes fkda_portable_backward_sizes_of(
    int64_t K, int64_t V) {
  fkda_portable_backward_sizes s;
  s.factors = 2 * FKDA_BACKWARD_RECORD(K);
  s.states = s.d_states = K * V * 2;
  s.differences = s.d_updates = FKDA_BACKWARD_BLOCK * V * 2;
  s.sums = K * 4 + 128;
  return s;
}

FKDA_HOST_DEVICE static inline int64_t fkda_portable_backward_workspace(int64_t B, int64_t T,
                                                                        int64_t N, int64_t HV,
                                                                        int64_t K, int64_t V) {
  const fkda_portable_backward_sizes s = fkda_portable_backward_sizes_of(K, V);
  return fkda_portable_backward_rows(B, T, N) * HV *
         (s.factors + s.states + s.d_states + s.differences + s.d_updates + s.sums);
}

/* ---- launches --------------------------------------------------------------------------------------
 *
 * Grids are one-dimensional. X(K): */
#define FKDA_BACKWARD_BY_K(X) X(64) X(128)
/* X(K, V) */
#define FKDA_BACKWARD_BY_K_V(X) X(64, 64) X(64, 128) X(128, 64) X(128, 128)

/* fkda_portable_backward_factors_k<K>: 2 * rows * HV blocks, with `redo` any number; shared memory is static. */
#define FKDA_BACKWARD_FACTORS_THREADS 128
#define FKDA_BACKWARD_REDO_BLOCKS 3 /* a processor, with `redo` */

/* fkda_portable_backward_walk_k<K>: N * HV * value_split * (forward ? 2 : 1) blocks. */
#define FKDA_BACKWARD_WALK_PART 64 /* value columns of a block: value_split = V / 64 */
#define FKDA_BACKWARD_WALK_THREADS (2 * FKDA_BACKWARD_WALK_PART)
#define FKDA_BACKWARD_WALK_STAGE(K) (FKDA_BACKWARD_RECORD_BYTES(K) + 64 * FKDA_BACKWARD_WALK_PART)
#define FKDA_BACKWARD_WALK_SHARED(K, stages) ((stages)*FKDA_BACKWARD_WALK_STAGE(K))

/* fkda_portable_backward_gradients_k<K>_v<V>: rows * HV tasks. With one stage a block each; with two, on devices (by their
 * major compute capability) with enough shared memory and for which the compiler finds registers enough, a block for each
 * processor, which does them one after the other. */
#define FKDA_BACKWARD_GRADIENTS_THREADS(K) (4 * (K))
#define FKDA_BACKWARD_GRADIENTS_STAGES(major) ((major) == 9 ? 2 : 1)
#define FKDA_BACKWARD_GRADIENTS_STAGE(K, V)                                                        \
  (256 * (K) + 384 * (V) + ((K) > (V) ? 12 * (K) + 512 : 0) + 10240 + 44 * (K) + 1824)
#define FKDA_BACKWARD_GRADIENTS_SHARED(K, V, stages)                                               \
  ((stages) * (FKDA_BACKWARD_GRADIENTS_STAGE(K, V) + ((stages) > 1 ? 128 * (K) : 0)))

/* fkda_portable_backward_reduce_k<K>: HV blocks if d_A_log or d_dt_bias is wanted; then, if HV > H and d_q or d_k is
 * wanted, rows * H blocks in a launch of fkda_portable_backward_group_k<K>. Shared memory is static. */
#define FKDA_BACKWARD_REDUCE_THREADS(K) (8 * (K))
#define FKDA_BACKWARD_GROUP_THREADS 256

#endif
