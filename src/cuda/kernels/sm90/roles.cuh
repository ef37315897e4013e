/* Who does what in a block: by warpgroups, state groups first, then factor groups, then helpers. */
#ifndef FKDA_CUDA_SM90_ROLES_CUH
#define FKDA_CUDA_SM90_ROLES_CUH

#include <cutlass/arch/reg_reconfig.h>

#include "cuda/kernels/sm90/factors.cuh"
#include "cuda/kernels/sm90/helpers.cuh"

namespace fkda {

/* After start_block(), and what else uses the slots: all threads, barriers are ready, in both blocks of a pair. */
template <class S>
__device__ __forceinline__ void start_roles() {
  fence_async();
  if (S::PAIR)
    cluster_sync();
  else
    __syncthreads();
}
/* Neither block of a pair ends while the other still copies to it or arrives. */
template <class S>
__device__ __forceinline__ void end_roles() {
  if (S::PAIR) cluster_sync();
}

/* `run_states` is what state groups do. */
template <class S, class Params, class States>
__device__ __forceinline__ void run_roles(const Params &params, Shared<S> &shared,
                                          States run_states) {
  if (threadIdx.x < S::FIRST_FACTOR) {
    cutlass::arch::warpgroup_reg_alloc<S::STATE_REGISTERS>();
    run_states();
  } else if (threadIdx.x < S::FIRST_HELPER) {
    cutlass::arch::warpgroup_reg_dealloc<S::FACTOR_REGISTERS>();
    run_factors<S>(params, shared);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<S::HELPER_REGISTERS>();
    run_helpers<S>(params, shared);
  }
}

}  // namespace fkda

#endif
