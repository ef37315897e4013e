/* The backward's walks on Hopper: factors and both directions in one launch; sm_90a.
 *
 * A task is one sequence, value head, 64 or 128 value columns and a direction; a block does one after the other. Its roles
 * are those of the prefill (prefill.cu), whose factor groups and helpers it shares; state groups of its own
 * (walk.cuh) hold S going forward, its gradient going backward, and leave in the workspace what the gradients' launch reads.
 * The backward direction has the queries, d_out for v, d_v for o, and leaves the norms and beta; the forward
 * direction needs no query. */
#include <cutlass/arch/reg_reconfig.h>

#include "cuda/kernels/sm90/walk_params.cuh"

#include "cuda/kernels/sm90/factors.cuh"
#include "cuda/kernels/sm90/helpers.cuh"
#include "cuda/kernels/sm90/walk.cuh"

namespace fkda {

__device__ __forceinline__ int64_t tasks_of_sequence(const fkda_sm90_backward_params &params) {
  return params.backward.problem.HV * params.value_split * (params.backward.forward ? 2 : 1);
}

/* The task that has this place among all; n < 0 where that is -1. Of a sequence backward tasks, which take longer, come first;
 * alone, it begins with as many forward ones as there are blocks too many for them, which then take another forward one. */
template <class S>
__device__ void start_task(const fkda_sm90_backward_params &params, const Shared<S> &shared,
                           int64_t place, Task &task) {
  task.n = -1;
  if (place < 0) return;
  const fkda_problem &p = params.backward.problem;
  const int per_sequence = (int)tasks_of_sequence(params), heads = (int)p.HV * params.value_split;
  int n = (uint32_t)place / per_sequence;
  int within = (int)((uint32_t)place - n * per_sequence);
  if (is_sorted(p)) n = shared.order[n];
  const int first = p.N == 1 ? max(min((int)gridDim.x, per_sequence) - heads, 0) : 0;
  const bool backward = within >= first && within < first + heads;
  if (backward)
    within -= first;
  else if (within >= first)
    within -= heads;
  const int head = within / params.value_split;
  task = make_task(p, n, head, within - head * params.value_split, S::V, CHUNK);
  task.backward = backward;
  task.skip = false;
  task.chunks = 2 * ((task.length + FKDA_BACKWARD_BLOCK - 1) / FKDA_BACKWARD_BLOCK);
}

template <class S>
__device__ __forceinline__ void backward_walk(const fkda_sm90_backward_params &params) {
  Shared<S> &shared = start_block<S>();
  deal_sequences(params.backward.problem, shared, tasks_of_sequence(params));
  fence_async();
  __syncthreads();
  if (threadIdx.x < S::FIRST_FACTOR) {
    cutlass::arch::warpgroup_reg_alloc<S::STATE_REGISTERS>();
    run_walk<S>(params.backward, shared);
  } else if (threadIdx.x < S::FIRST_HELPER) {
    cutlass::arch::warpgroup_reg_dealloc<S::FACTOR_REGISTERS>();
    run_factors<S>(params, shared);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<S::HELPER_REGISTERS>();
    run_helpers<S>(params, shared);
  }
}

}  // namespace fkda

#define FKDA_ENTRY(K, part, bounded, suffix)                                                       \
  extern "C" __global__ void __launch_bounds__(FKDA_SM90_PREFILL_THREADS, 1)                       \
      fkda_sm90_backward_walk_k##K##_v##part##suffix(                                              \
          const __grid_constant__ fkda_sm90_backward_params params) {                              \
    using S = fkda::Shape<K, part, 2, bounded, true>;                                              \
    static_assert(S::THREADS == FKDA_SM90_PREFILL_THREADS, "threads");                             \
    static_assert(                                                                                 \
        sizeof(fkda::Shared<S>) + fkda::ALIGNMENT - fkda::ALIGNED <= FKDA_SM90_PREFILL_SHARED,     \
        "shared memory");                                                                          \
    fkda::backward_walk<S>(params);                                                                \
  }
FKDA_SM90_BACKWARD_LIST(FKDA_ENTRY)
