/* What the host hands to a portable kernel, by value, and how it launches it. Plain C, shared by launcher
 * and kernels, so that neither has a number of its own. */
#ifndef FKDA_CUDA_PORTABLE_PARAMS_H
#define FKDA_CUDA_PORTABLE_PARAMS_H

#include "check/problem.h"

typedef struct fkda_portable_params {
  fkda_problem problem;
  int32_t value_split; /* blocks that share a head's V; a block's part is V / value_split columns */
  /* 1 where base and row strides are multiples of 16 bytes, so that rows can be copied in 16-byte
   * pieces; else the kernel copies element by element. */
  int32_t aligned_q, aligned_k, aligned_v, aligned_g, aligned_out;
  /* decode: 1 where the pool's strides are multiples of 4 elements and its base of 4 elements' bytes */
  int32_t aligned_state;
} fkda_portable_params;

/* Grids are one-dimensional: block = (n * HV + head) * value_split + part. */

#define FKDA_PORTABLE_CHUNK 16 /* tokens a chunk */
/* 8 factor warps, part / 16 state warps, and a solver beside parts of 32. */
#define FKDA_PORTABLE_PREFILL_THREADS(part) (256 + 2 * (part) + ((part) == 32 ? 32 : 0))
#define FKDA_PORTABLE_DECODE_THREADS 128 /* shared memory is static */

/* X(K, part): K channels, `part` value columns a block. The entry point is
 * fkda_portable_prefill_k<K>_v<part>. */
#define FKDA_PORTABLE_PREFILL_LIST(X)                                                              \
  X(64, 32) X(64, 64) X(64, 128) X(128, 32) X(128, 64) X(128, 128)

/* X(layout, K): layout vk or kv, K channels. The entry point is fkda_portable_decode_<layout>_k<K>. */
#define FKDA_PORTABLE_DECODE_LIST(X) X(vk, 64) X(vk, 128) X(kv, 64) X(kv, 128)

/* The value_split of decode: parts of 64 columns, or of 32 (no other is built) while those of 64 are too
 * few to give every processor two blocks. Results do not depend on it, bit for bit. */
FKDA_HOST_DEVICE static inline int32_t fkda_portable_decode_split(int64_t N, int64_t HV, int64_t V,
                                                                  int32_t processors) {
  return (int32_t)(N * HV * (V / 64) < 2 * (int64_t)processors ? V / 32 : V / 64);
}

#define FKDA_PORTABLE_V_STAGES 2 /* chunks of v in shared memory: one in work, one on its way */

/* Dynamic shared memory of a prefill block in bytes: sizeof(Shared<K, part>) of prefill.cu, which
 * asserts it. The task, barriers, two groups of factor warps, v. sm_86, 89 and 120 lend a block 99 KB. */
#define FKDA_PORTABLE_PREFILL_SHARED(K, part)                                                      \
  (128 + 64 + 2 * (7 * 34 * (K) + 3 * 512 + 8 * (K) + 192 + 64 * (K) + 2048) +                     \
   FKDA_PORTABLE_V_STAGES * 2 * 24 * (part))

#endif
