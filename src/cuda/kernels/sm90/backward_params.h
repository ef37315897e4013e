/* What the host hands to the sm90 walk of the backward, by value, and how it launches it. Plain C, shared by
 * launcher and kernel.
 *
 * Launches of the row `sm90`, in the stream's order, of which all but the first are those of portable/backward_params.h:
 *
 *   walk            factors and both walks in one: states before each block, E, gradients of the states behind each block,
 *                   dW, dV, d_initial_state, norms and beta; and for each task whether it could
 *   factors, walk   `portable` ones, of the heads where a task could not: keys nearly parallel throughout a chunk, gates
 *                   out of an anchor's range, huge values. Blocks of all other heads end at once
 *   gradients, reduce, group
 */
#ifndef FKDA_CUDA_SM90_BACKWARD_PARAMS_H
#define FKDA_CUDA_SM90_BACKWARD_PARAMS_H

#include "cuda/kernels/portable/backward_params.h"
#include "cuda/kernels/sm90/params.h"

typedef struct fkda_sm90_backward_params {
  /* As fkda_sm90_params has them. d_v: zeros where it is not wanted. */
  fkda_tensor_map q, k, g, v, d_out, d_v;
  fkda_portable_backward_params backward; /* with `redo`, which the walk writes */
  int32_t value_split; /* blocks that share a head's V; a block's part is V / value_split columns */
} fkda_sm90_backward_params;

/* Grid: one-dimensional. A block does tasks one after the other; of N * HV * value_split * (forward ? 2 : 1). */

/* X(K, part, bounded gate?, suffix): K channels, `part` value columns a block; g is bf16. The entry point is
 * fkda_sm90_backward_walk_k<K>_v<part><suffix>. */
#define FKDA_SM90_BACKWARD_SHAPES(X, bounded, suffix)                                              \
  X(64, 64, bounded, suffix)                                                                       \
  X(64, 128, bounded, suffix) X(128, 64, bounded, suffix) X(128, 128, bounded, suffix)
#define FKDA_SM90_BACKWARD_LIST(X)                                                                 \
  FKDA_SM90_BACKWARD_SHAPES(X, 1, ) FKDA_SM90_BACKWARD_SHAPES(X, 0, _unbounded)

/* Of pairs, as the prefill has them. */
#define FKDA_SM90_BACKWARD_PAIR_LIST(X)                                                            \
  X(64, 64, 1, _pair)                                                                              \
  X(128, 64, 1, _pair) X(64, 64, 0, _pair_unbounded) X(128, 64, 0, _pair_unbounded)

/* Threads and shared memory as the prefill kernels have them. */

/* The workspace: portable's, a multiple of 16 bytes, and behind it the flags of `redo`. All of a head's are written, 0
 * for tasks that there are not (one direction only, V whole). */
FKDA_HOST_DEVICE static inline int64_t fkda_sm90_backward_workspace(int64_t B, int64_t T, int64_t N,
                                                                    int64_t HV, int64_t K,
                                                                    int64_t V) {
  return fkda_portable_backward_workspace(B, T, N, HV, K, V) +
         N * HV * FKDA_BACKWARD_REDO * (int64_t)sizeof(uint32_t);
}

#endif
