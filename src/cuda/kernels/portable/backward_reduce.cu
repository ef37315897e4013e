/* Backward, last launches: sums over the blocks of all sequences and over the value heads of a group, in fixed orders. */
#include "cuda/kernels/portable/backward.cuh"

namespace fkda {
namespace {

constexpr int SLICES = 8;

/* d_dt_bias and d_A_log of a head: each slice of threads adds every eighth row. */
template <int K>
__device__ __forceinline__ void reduce(const Backward &x) {
  __shared__ float parts[SLICES][K], parts_A[SLICES];
  const fkda_problem &p = x.problem;
  const int head = blockIdx.x, channel = threadIdx.x % K, slice = threadIdx.x / K;
  const Workspace<K> w(x);
  float sum = 0, sum_A = 0;
#pragma unroll 4
  for (int64_t row = slice; row < x.rows; row += SLICES) {
    const float *sums =
        reinterpret_cast<const float *>(Workspace<K>::at(w.sums, w.sizes.sums, row, w.heads, head));
    sum += sums[channel];
    if (channel == 0) sum_A += sums[K];
  }
  parts[slice][channel] = sum;
  if (channel == 0) parts_A[slice] = sum_A;
  __syncthreads();
  if (slice) return;
#pragma unroll
  for (int i = 1; i < SLICES; ++i) sum += parts[i][channel];
  if (p.d_dt_bias.data) static_cast<float *>(p.d_dt_bias.data)[(int64_t)head * K + channel] = sum;
  if (channel || !p.d_A_log.data) return;
#pragma unroll
  for (int i = 1; i < SLICES; ++i) sum_A += parts_A[i];
  static_cast<float *>(p.d_A_log.data)[head] = sum_A;
}

__device__ __forceinline__ void store_float(const fkda_rows &to, int64_t at, float y) {
  if (to.dtype == FKDA_F32)
    static_cast<float *>(to.data)[at] = y;
  else
    static_cast<bf16 *>(to.data)[at] = __float2bfloat16_rn(y);
}

/* d_q and d_k of a block and head of q and k. */
template <int K>
__device__ __forceinline__ void add_group(const Backward &x) {
  const fkda_problem &p = x.problem;
  const int head = (int)(blockIdx.x % (uint32_t)p.H), group = (int)((uint32_t)p.HV / (uint32_t)p.H);
  const int64_t row = blockIdx.x / (uint32_t)p.H;
  Block block;
  if (!find_block(p, row, block)) return;
  const Workspace<K> w(x);
#pragma unroll 1
  for (int of_k = 0; of_k < 2; ++of_k) {
    const fkda_rows &to = of_k ? p.d_k : p.d_q;
    if (!to.data) continue;
    const int64_t first = row_of(to, block.span, block.t, head);
#pragma unroll 2
    for (int i = threadIdx.x; i < block.tokens * K; i += FKDA_BACKWARD_GROUP_THREADS) {
      float sum = 0;
      for (int member = 0; member < group; ++member)
        sum += reinterpret_cast<const float *>(
            w.record(row, head * group + member, 0))[of_k * BLOCK_TOKENS * K + i];
      store_float(to, first + i / K * to.stride_t + i % K, sum);
    }
  }
}

}  // namespace
}  // namespace fkda

#define FKDA_ENTRY(K)                                                                              \
  extern "C" __global__ void __launch_bounds__(FKDA_BACKWARD_REDUCE_THREADS(K))                    \
      fkda_portable_backward_reduce_k##K(                                                          \
          const __grid_constant__ fkda_portable_backward_params x) {                               \
    fkda::reduce<K>(x);                                                                            \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(FKDA_BACKWARD_GROUP_THREADS)                        \
      fkda_portable_backward_group_k##K(const __grid_constant__ fkda_portable_backward_params x) { \
    fkda::add_group<K>(x);                                                                         \
  }
FKDA_BACKWARD_BY_K(FKDA_ENTRY)
