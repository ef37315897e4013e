/* Which block does which task. Lengths are known on the device only, so that every block works out the same on its own: the
 * tasks of the longest sequence first, each goes to the block that has least to do so far. */
#ifndef FKDA_CUDA_SM90_DEAL_CUH
#define FKDA_CUDA_SM90_DEAL_CUH

#include "cuda/kernels/sm90/shared.cuh"

namespace fkda {

/* What a task takes, in quarters of the time of a chunk with 128 value columns: a chunk with half of them takes three, a
 * state's way in and out as long as some chunks. */
__device__ __forceinline__ int cost_of(int length, int state_groups) {
  const int chunks = (length + CHUNK - 1) / CHUNK;
  return state_groups == 2 ? 4 * (chunks + 4) : 3 * (chunks + 3);
}
constexpr int MAX_COST = 1 << 22; /* of a block: float counts so far with a half to spare */

__device__ __forceinline__ bool is_sorted(const fkda_problem &p) {
  return p.cu_seqlens.data && p.N <= MAX_SORTED;
}

/* Ints that lie where q will be, until the first copy: the lengths of sequences, and some more. */
template <class S>
__device__ __forceinline__ int *scratch(Shared<S> &shared) {
  static_assert(sizeof(shared.slots[0]) >= (MAX_SORTED + 4) * sizeof(int), "scratch");
  return reinterpret_cast<int *>(shared.slots[0]);
}

/* shared.deal and shared.order, of `per_sequence` tasks a sequence. A sequence's place is the number of those that are
 * longer, or as long and before it. Leaves the lengths in scratch(). All threads of the block; a __syncthreads() must
 * follow. */
template <class S>
__device__ __noinline__ void deal_sequences(const fkda_problem &p, Shared<S> &shared,
                                            int64_t per_sequence) {
  Deal &deal = shared.deal;
  if (threadIdx.x == 0) deal = {p.N * per_sequence, per_sequence, 0, 0};
  if (!is_sorted(p)) return;
  const int N = (int)p.N;
  int *lengths = scratch(shared);
  for (int n = threadIdx.x; n < N; n += S::THREADS) lengths[n] = (int)clamped_span(p, n).length;
  __syncthreads();
  for (int n = threadIdx.x; n < N; n += S::THREADS) {
    const int length = lengths[n];
    int before = 0;
    for (int m = 0; m < N; ++m) before += lengths[m] > length || (lengths[m] == length && m < n);
    shared.order[before] = (uint16_t)n;
    const int cost = cost_of(length, S::STATE_GROUPS);
    atomicMax(&deal.longest, cost);
    atomicAdd(&deal.work, cost < MAX_COST / 4 ? cost : MAX_COST / 4);
  }
}

/* The block's tasks one after the other, in a whole warp. */
template <class S>
class Dealer {
  static constexpr int HELD = 5; /* blocks a lane: lane, lane + 32, ... */
  static constexpr int NOBODY = 1 << 30;

  const fkda_problem &p;
  const Shared<S> &shared;
  int load[HELD];   /* what blocks have to do so far; NOBODY where there is no block */
  uint32_t at, end; /* the block's next tasks: until end, */
  uint32_t step;    /* one after the other or every step-th */
  uint32_t dealt;   /* so many have been, to all blocks */

  __device__ __forceinline__ int cost(int place) const {
    return cost_of((int)clamped_span(p, shared.order[place]).length, S::STATE_GROUPS);
  }

  /* How many tasks that cost 1 / `rate` does each of the lane's blocks begin before `level`? */
  __device__ __forceinline__ static int begun(int load, int level, float rate) {
    return __float2int_ru((float)max(level - load, 0) * rate);
  }
  __device__ __forceinline__ int begun(int level, float rate) const {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) sum += begun(load[i], level, rate);
    return __reduce_add_sync(0xffffffffu, sum);
  }

  __device__ __forceinline__ void deal_first() {
#pragma unroll 1
    for (int i = 0; i < HELD; ++i) { /* cost() once: it is long */
      const int block = fresh_lane() + 32 * i;
      const int own = block < (int)gridDim.x ? cost(block / (int)shared.deal.per_sequence) : NOBODY;
#pragma unroll
      for (int j = 0; j < HELD; ++j) load[j] = j == i ? own : load[j];
    }
    dealt = gridDim.x;
  }

  /* Deals the next tasks of equal cost, each to the block with the lowest load. So they all begin below a level, and all
   * that could do so before it do: the level is searched bit by bit. */
  __device__ __forceinline__ void deal_equal() {
    const int lane = fresh_lane(), N = (int)p.N, per_sequence = (int)shared.deal.per_sequence;
    const int place = (int)dealt / per_sequence;
    const int own = cost(min(place + lane, N - 1)), each = __shfl_sync(0xffffffffu, own, 0);
    const uint32_t others = __ballot_sync(0xffffffffu, place + lane >= N || own != each);
    const int count = (place + (others ? __ffs(others) - 1 : 32)) * per_sequence - (int)dealt;
    const float rate = 1.0f / (float)each;

    int level = NOBODY, sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      level = min(level, load[i]);
      sum += load[i] < NOBODY ? load[i] : 0;
    }
    level = __reduce_min_sync(0xffffffffu, level);
    const int mean = (__reduce_add_sync(0xffffffffu, sum) + count * each) / (int)gridDim.x;
#pragma unroll 1
    for (int bit = 1 << (31 - __clz((mean - level) | 1)); bit; bit >>= 1)
      if (begun(level + bit, rate) <= count) level += bit;

    /* Those that begin at the level: as many as are left, in the order of blocks. */
    const int left = count - begun(level, rate);
    int before = 0, mine = 0, candidates = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int block = lane + 32 * i;
      int n = begun(load[i], level, rate);
      const bool next = begun(load[i], level + 1, rate) > n;
      const uint32_t all = __ballot_sync(0xffffffffu, next);
      n += next && candidates + __popc(all & ((1u << lane) - 1)) < left;
      candidates += __popc(all);
      load[i] += n * each;
      before += block < (int)blockIdx.x ? n : 0;
      mine += block == (int)blockIdx.x ? n : 0;
    }
    at = dealt + __reduce_add_sync(0xffffffffu, before);
    end = at + __reduce_add_sync(0xffffffffu, mine);
    dealt += count;
    if (blockIdx.x == gridDim.x - 1) end = dealt; /* whatever rounding does, none is left out */
  }

 public:
  __device__ __forceinline__ Dealer(const fkda_problem &p, const Shared<S> &shared)
      : p(p), shared(shared), at(blockIdx.x), end(shared.deal.tasks), step(gridDim.x), dealt(end) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) load[i] = NOBODY;
    const Deal &deal = shared.deal;
    if (!is_sorted(p) || end <= gridDim.x || gridDim.x > 32 * HELD ||
        deal.work * deal.per_sequence / gridDim.x + deal.longest > MAX_COST)
      return; /* in turn, one after the other */
    end = at + 1, step = 1, dealt = 0;
  }

  /* Is it unknown yet whether the block has another task? Then to be prepared, while there is time and until it is not. */
  __device__ __forceinline__ bool lacks() const { return at >= end && dealt < shared.deal.tasks; }
  __device__ __forceinline__ void prepare() {
    if (dealt)
      deal_equal();
    else
      deal_first();
  }

  /* The next task's place among all, those of the longest sequence first; -1: there is none any more. */
  __device__ __forceinline__ int64_t next() {
    if (at >= end) return -1;
    const int64_t task = at;
    at += step;
    return task;
  }
};

}  // namespace fkda

#endif
