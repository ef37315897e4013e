/* What the walks leave in the workspace of the backward for the gradients: where, and in which order of elements. Tiles
 * and squares are those of backward.cuh. */
#ifndef FKDA_CUDA_PORTABLE_BACKWARD_WORKSPACE_CUH
#define FKDA_CUDA_PORTABLE_BACKWARD_WORKSPACE_CUH

#include <cute/arch/copy_sm75.hpp>

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/portable/backward_params.h"

namespace fkda {

template <int K>
struct Workspace {
  fkda_portable_backward_sizes sizes;
  int64_t heads;
  char *factors, *states, *d_states, *differences, *d_updates, *sums;
  __device__ __forceinline__ Workspace(const fkda_portable_backward_params &x)
      : sizes(fkda_portable_backward_sizes_of(K, x.problem.V)), heads(x.problem.HV) {
    const int64_t cells = x.rows * heads;
    factors = x.workspace;
    states = factors + cells * sizes.factors;
    d_states = states + cells * sizes.states;
    differences = d_states + cells * sizes.d_states;
    d_updates = differences + cells * sizes.differences;
    sums = d_updates + cells * sizes.d_updates;
  }
  __device__ __forceinline__ char *record(int64_t row, int head, int half) const {
    return factors + (row * heads + head) * sizes.factors + half * FKDA_BACKWARD_RECORD(K);
  }
  __device__ __forceinline__ static char *at(char *part, int64_t size, int64_t row, int64_t heads,
                                             int head) {
    return part + (row * heads + head) * size;
  }
};

/* The first row of a sequence that begins at token `begin` of batch row b. */
__device__ __forceinline__ int64_t first_block(const fkda_problem &p, int64_t b, int64_t begin,
                                               int64_t n) {
  return (b * p.T + begin) / FKDA_BACKWARD_BLOCK + n;
}

__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  cute::SM75_U32x1_MOVM_T::copy(x, y);
  return y;
}

/* A warp's 16 value rows of a state, accumulators [K / 8][4] as StateRows has them, as A operands of a product with
 * channels as rows over these value rows. */
template <int K>
__device__ __forceinline__ void keep_state(const float (&s)[K / 2], char *state, int V,
                                           int v_square) {
  uint4 *to = reinterpret_cast<uint4 *>(state) + v_square * 32 + (threadIdx.x & 31);
#pragma unroll
  for (int k = 0; k < K / 16; ++k) {
    uint32_t a[4]; /* (v 0-7, c 0-7), (v 8-15, c 0-7), (v 0-7, c 8-15), (v 8-15, c 8-15) */
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = transpose_matrix(pack(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]));
    to[k * (V / 16) * 32] = make_uint4(a[0], a[2], a[1], a[3]);
  }
}

/* A warp's 32 tokens of 16 value columns, accumulators [4][4] as above with tokens for channels, to the half of a tile
 * [64][V]. */
__device__ __forceinline__ void keep_tokens(const float (&y)[16], char *tile, int V, int half,
                                            int v_square) {
  constexpr int MATRIX_BYTES = 128;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t pair = transpose_matrix(pack(y[4 * n + 2 * h], y[4 * n + 2 * h + 1]));
      const int square = (half * 2 + (n >> 1)) * (V / 16) + v_square;
      *reinterpret_cast<uint32_t *>(tile + (4 * square + 2 * (n & 1) + h) * MATRIX_BYTES +
                                    lane * 4) = pair;
    }
}

}  // namespace fkda

#endif
