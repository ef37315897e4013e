/* Hopper prefill: wgmma, the tensor copy engine and mbarriers; sm_90a.
 *
 * A task is one sequence, value head and 64 or 128 value columns; a block does one after the other.
 * docs/kernels/prefill_sm90.md draws its schedule.
 *
 *   helper group    a warp deals out tasks and copies q, k, g in; one copies v in and o out; two invert I + A
 *   factor groups   two or three warpgroups on alternate chunks of 32 tokens: norms (1), gates (2), decayed
 *                   operands (8) in place of k, q, g, the squares (9)
 *   state groups    each owns 64 value rows of S in f32 accumulators for the whole sequence, transposed so that
 *                   value rows are the M dimension: X = S1 [K' Q']^T, U (10), O (11), S (12)
 *
 * Frames. Per channel, G is the running sum of log2-decays and m its value after the chunk's sixteenth token:
 *   K' = k e^{G-m}   Q' = q e^{G-m}   K^ = k e^{m-G}
 *   S1 = S e^m,  X = S1 K'^T,  S1 <- S1 + U^T K^,  S <- S1 e^{G_C-m}
 * so exponents of a bounded gate stay within +-80. The two factors of the state are never one: their product
 * underflows where the state does not.
 *
 * Norms (1) are factors of rows and columns, applied in f32 after the products: operands are rounded from
 * the raw bf16 k once, so that nearly collinear keys stay collinear (docs/math.md).
 */
#include <cutlass/arch/reg_reconfig.h>

#include "cuda/kernels/sm90/factors.cuh"
#include "cuda/kernels/sm90/helpers.cuh"
#include "cuda/kernels/sm90/state.cuh"

namespace fkda {

/* At least what all tasks take, with these value columns a block: their share of a processor; and, since the first so many
 * tasks keep every processor busy so many times, what as many take that are no shorter than the last of them. All threads
 * of the block; `lengths` of sequences, room for two ints. */
template <class S>
__device__ int64_t time_of(const fkda_sm90_params &params, const Shared<S> &shared,
                           const int *lengths, int *sums, int state_groups) {
  const int N = (int)params.problem.N, processors = params.by_lengths;
  const int per_sequence = (int)params.problem.HV * (2 / state_groups);
  __syncthreads();
  if (threadIdx.x < 2) sums[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < N; i += S::THREADS) {
    const int cost = cost_of(lengths[shared.order[i]], state_groups);
    atomicMax(&sums[0], cost * (((i + 1) * per_sequence - 1) / processors + 1));
    atomicAdd(&sums[1], cost);
  }
  __syncthreads();
  const int64_t share = ((int64_t)sums[1] * per_sequence + processors - 1) / processors;
  return max((int64_t)sums[0], share);
}

/* Is the launch the one of two that does the call? A block with half of V's columns takes three quarters of the time for a
 * chunk, of which there are twice as many then: worth it where one long sequence would outlast all others. All threads
 * of the block, and of every block alike. */
template <class S>
__device__ bool is_meant(const fkda_sm90_params &params, Shared<S> &shared) {
  int *lengths = scratch(shared), *sums = lengths + MAX_SORTED;
  const int64_t whole = time_of(params, shared, lengths, sums, 2);
  const int64_t halves = time_of(params, shared, lengths, sums + 2, 1);
  return (halves < whole) == (params.value_split == 2);
}

template <class S>
__device__ __forceinline__ void prefill(const fkda_sm90_params &params) {
  Shared<S> &shared = start_block<S>();
  deal_sequences(params.problem, shared, params.problem.HV * params.value_split);
  __syncthreads();
  if (params.by_lengths && !is_meant(params, shared) && threadIdx.x == 0) shared.deal.tasks = 0;
  fence_async();
  __syncthreads();
  if (threadIdx.x < S::FIRST_FACTOR) {
    cutlass::arch::warpgroup_reg_alloc<S::STATE_REGISTERS>();
    run_state<S>(params.problem, shared);
  } else if (threadIdx.x < S::FIRST_HELPER) {
    cutlass::arch::warpgroup_reg_dealloc<S::FACTOR_REGISTERS>();
    run_factors<S>(params, shared);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<S::HELPER_REGISTERS>();
    run_helpers<S>(params, shared);
  }
}

}  // namespace fkda

#define FKDA_ENTRY(K, part, dtype, bounded, suffix)                                                \
  extern "C" __global__ void __launch_bounds__(FKDA_SM90_PREFILL_THREADS, 1)                       \
      fkda_sm90_prefill_k##K##_v##part##suffix(const __grid_constant__ fkda_sm90_params params) {  \
    using S = fkda::Shape<K, part, dtype == FKDA_F32 ? 4 : 2, bounded>;                            \
    static_assert(S::THREADS == FKDA_SM90_PREFILL_THREADS, "threads");                             \
    static_assert(                                                                                 \
        sizeof(fkda::Shared<S>) + fkda::ALIGNMENT - fkda::ALIGNED <= FKDA_SM90_PREFILL_SHARED,     \
        "shared memory");                                                                          \
    fkda::prefill<S>(params);                                                                      \
  }
FKDA_SM90_PREFILL_LIST(FKDA_ENTRY)
