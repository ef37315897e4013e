/* What the host hands to an sm90 kernel, by value, and how it launches it. Plain C, shared by launcher and
 * kernels, so that neither has a number of its own. */
#ifndef FKDA_CUDA_SM90_PARAMS_H
#define FKDA_CUDA_SM90_PARAMS_H

#include "check/problem.h"

/* A CUtensorMap: how the copy engine walks a tensor. */
typedef struct fkda_tensor_map {
#ifdef __cplusplus
  alignas(64) uint64_t opaque[16];
#else
  _Alignas(64) uint64_t opaque[16];
#endif
} fkda_tensor_map;

typedef struct fkda_sm90_params {
  /* [B,T,heads,dim] as (dim, T, heads, B), boxes of 32 tokens and 128 bytes, 128-byte swizzle. Zeros
   * where there is no token. */
  fkda_tensor_map q, k, g, v, out;
  fkda_problem problem;
  int32_t value_split; /* blocks that share a head's V; a block's part is V / value_split columns */
  /* Not 0: the call is launched twice, with V whole and in halves, and one of the two does it, as lengths say that
   * only the device knows. The number of processors. */
  int32_t by_lengths;
  /* Not 0: all pairs have equal shares of the problem's sequences, which are of one length, and cut some of them in two. */
  int32_t equal_shares;
  /* Says that the state of a sequence that is so cut has come: four bf16 that are no results. */
  uint64_t mark;
} fkda_sm90_params;

/* Grids are one-dimensional: a block does tasks, (n * HV + head) * value_split + part, one after the other. */

#define FKDA_SM90_CHUNK 32        /* tokens a chunk */
#define FKDA_SM90_LEAST_REST 10   /* chunks behind a cut: their rows of out take the state */
#define FKDA_SM90_STATE_COST 4    /* chunks: what a pair takes for a state's way in and out */
#define FKDA_SM90_MAX_SORTED 1024 /* sequences; more are taken as they come */
#define FKDA_SM90_BOX_BYTES 128   /* a box's row: one swizzle period */

/* X(K, part, dtype of g, bounded gate?, suffix): K channels, `part` value columns a block. The entry point is
 * fkda_sm90_prefill_k<K>_v<part><suffix>. */
/* clang-format off */
#define FKDA_SM90_PREFILL_SHAPES(X, dtype, bounded, suffix)                        \
  X(64, 64, dtype, bounded, suffix) X(64, 128, dtype, bounded, suffix)             \
  X(128, 64, dtype, bounded, suffix) X(128, 128, dtype, bounded, suffix)
#define FKDA_SM90_PREFILL_LIST(X)                                                  \
  FKDA_SM90_PREFILL_SHAPES(X, FKDA_BF16, 1, )                                      \
  FKDA_SM90_PREFILL_SHAPES(X, FKDA_F32, 1, _g32)                                   \
  FKDA_SM90_PREFILL_SHAPES(X, FKDA_BF16, 0, _unbounded)                            \
  FKDA_SM90_PREFILL_SHAPES(X, FKDA_F32, 0, _g32_unbounded)
/* Of two blocks, a cluster, that do the halves of 128 value columns and share the work on factors: the grid is a
 * multiple of two. */
#define FKDA_SM90_PAIR_LIST(X)                                                     \
  X(64, 64, FKDA_BF16, 1, _pair) X(128, 64, FKDA_BF16, 1, _pair)                   \
  X(64, 64, FKDA_BF16, 0, _pair_unbounded) X(128, 64, FKDA_BF16, 0, _pair_unbounded)
/* clang-format on */

/* Of every prefill kernel: five warpgroups, four in a pair's block, and all the shared memory that a block can have. */
#define FKDA_SM90_PREFILL_THREADS 640
#define FKDA_SM90_PAIR_THREADS 512
#define FKDA_SM90_PREFILL_SHARED 232448

#endif
