/* A cluster of two blocks, each of which reaches the other's shared memory. Shared memory is laid out alike in both, so that
 * an address of one's own, with the other's rank, is the same thing there.
 *
 * Data go from one block to the other by the copy engine only, which says so at the mbarrier that it completes. What a
 * block tells the other by arriving at a barrier of it is that something has been read and may be overwritten, never that
 * something has been written: hence no arrival or wait at cluster scope, which fences all of memory and empties L1. */
#ifndef FKDA_CUDA_SM90_CLUSTER_CUH
#define FKDA_CUDA_SM90_CLUSTER_CUH

#include <cute/arch/cluster_sm90.hpp>

#include "cuda/kernels/sm90/shared.cuh"

namespace fkda {

/* The block's rank: of two, the other one's is 1 - rank. */
__device__ __forceinline__ uint32_t cluster_rank() { return cute::block_rank_in_cluster(); }

/* All threads of both blocks, each warp together. */
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();
  cute::cluster_sync();
}

/* One arrival for the warp at the barrier of block `rank`, which may be the own one. */
__device__ __forceinline__ void arrive_warp_at(const Barrier &barrier, uint32_t rank) {
  __syncwarp();
  if (lane_arrives()) {
    asm volatile("" ::: "memory");
    barrier.arrive(rank);
  }
}

/* `bytes` of the own shared memory to where `to` lies in that of block `rank`; completes `full` there, which
 * arrive_and_expect_tx() has told of them. */
__device__ __forceinline__ void copy_to_block(const void *from, void *to, uint32_t bytes,
                                              const Barrier &full, uint32_t rank) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(cute::set_block_rank(address(to), rank)),
      "r"(address(from)), "r"(bytes), "r"(cute::set_block_rank(address(&full), rank))
      : "memory");
}

}  // namespace fkda

#endif
