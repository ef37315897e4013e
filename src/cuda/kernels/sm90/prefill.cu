/* Hopper prefill: wgmma, the tensor copy engine and mbarriers; sm_90a.
 *
 * A task is one sequence, value head and 64 or 128 value columns, or a part of such a sequence; a block does one after the other.
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
#include "cuda/kernels/sm90/roles.cuh"
#include "cuda/kernels/sm90/state.cuh"

namespace fkda {

constexpr int TASK_COST =
    3; /* chunks: what reading and writing a state takes beside the work on a chunk */
__device__ __forceinline__ int cost_of(int length) {
  return (length + CHUNK - 1) / CHUNK + TASK_COST;
}

/* Is the launch the one of two that does the call? A block with half of V's columns takes seven tenths of the time for a
 * chunk in a pair, three quarters alone, and there are twice as many then: worth it where one long sequence would outlast
 * all others. `lengths` of p.N sequences; room for two ints behind them. All threads of the block, and of every block alike. */
template <class S>
__device__ bool is_meant(const fkda_sm90_params &params, int *lengths) {
  const int N = (int)params.problem.N;
  int *sums = lengths + MAX_SORTED, longest = 0, work = 0;
  if (threadIdx.x < 2) sums[threadIdx.x] = 0;
  __syncthreads();
  for (int n = threadIdx.x; n < N; n += S::THREADS) {
    const int cost = cost_of(lengths[n]);
    longest = max(longest, cost), work += cost;
  }
  atomicMax(&sums[0], longest);
  atomicAdd(&sums[1], work);
  __syncthreads();
  longest = sums[0];
  const int64_t share = (sums[1] * params.problem.HV + params.by_lengths - 1) / params.by_lengths;
  const int half = S::GATE_BYTES == 2 ? 14 : 15; /* with g of bf16 halves are done by pairs */
  const int64_t whole = 20 * max((int64_t)longest, share),
                halves = half * max((int64_t)longest, 2 * share);
  return (halves < whole) == (params.value_split == 2);
}

constexpr int MAX_DEALT =
    8; /* tasks a block, of which loads are added up; more come out even by themselves */

/* Where share_short() works, behind the lengths. */
constexpr int MAX_CLASSES = 256; /* more than ints have values of four leading bits */
template <class S>
struct Sharing {
  int loads[S::THREADS], levels[S::THREADS];      /* of blocks */
  int first[MAX_CLASSES + 1], costs[MAX_CLASSES]; /* of a class: its first sequence in the order */
  int64_t work;
};

/* shared.deal where short sequences stand beside longer ones: one block after the other gets as many short tasks as fit below a
 * level of its load, in chunks, that is the same for all and about the lowest at which none is left over. Sequences of nearly
 * the same cost are a class, of which one division says how many fit. Every block computes the same. All threads of the
 * block. */
template <class S>
__device__ void share_short(const fkda_problem &p, Shared<S> &shared, const int *lengths,
                            int per_sequence) {
  Deal &deal = shared.deal;
  Sharing<S> &sharing = *reinterpret_cast<Sharing<S> *>(shared.slots[0] + MAX_SORTED * sizeof(int));
  static_assert(sizeof(shared.slots[0]) >= MAX_SORTED * sizeof(int) + sizeof(sharing), "scratch");
  int *loads = sharing.loads, *levels = sharing.levels, *first = sharing.first;
  int *costs = sharing.costs;
  const int N = (int)p.N, blocks = dealt_among<S>(), longer = deal.longer;
  const int dealt = longer * per_sequence, rest = (N - longer) * per_sequence;
  const int lane = threadIdx.x % 32;
  const bool shares = threadIdx.x >= S::THREADS - 32; /* a warp that has hardly a load to add up */
  int classes = 0;
  const auto cost_at = [&](int i) { return cost_of(lengths[shared.order[i]]); };
  if (threadIdx.x < blocks) {
    int load = 0;
    for (int i = 0, task; (task = (int)dealt_task(i, threadIdx.x, blocks)) < dealt; ++i)
      load += cost_at(task / per_sequence);
    loads[threadIdx.x] = load;
  }
  if (shares) {
    const auto leading_bits = [](int cost) {
      const int shift = max(28 - __clz(cost), 0);
      return cost >> shift << shift;
    };
    for (int from = longer; from < N; from += 32) {
      const int i = from + lane;
      const bool begins =
          i < N && (i == longer || leading_bits(cost_at(i)) != leading_bits(cost_at(i - 1)));
      const uint32_t all = __ballot_sync(0xffffffffu, begins);
      if (begins) first[classes + __popc(all & ((1u << lane) - 1))] = i;
      classes += __popc(all);
    }
    if (lane == 0) first[classes] = N;
    __syncwarp();
    int64_t work = 0;
    for (int i = lane; i < classes; i += 32) {
      const int cost = (cost_at(first[i]) + cost_at(first[i + 1] - 1) + 1) / 2;
      costs[i] = cost;
      work += (int64_t)cost * ((first[i + 1] - first[i]) * per_sequence);
    }
    for (int step = 16; step; step /= 2) work += __shfl_xor_sync(0xffffffffu, work, step);
    if (lane == 0) sharing.work = work;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 4 * blocks; i += S::THREADS) { /* four threads a block */
    /* What fits below this block's load, and from there on with a part of the blocks: too high a level unless all
     * that are lower count, and of those the lowest is the right one. */
    const int load = loads[i / 4];
    const int64_t work = sharing.work;
    int64_t room = 0;
    int lower = 0;
    for (int b = i % 4; b < blocks; b += 4) {
      if (loads[b] > load) continue;
      room += load - loads[b];
      ++lower;
    }
    for (int step = 1; step < 4; step *= 2) {
      const uint32_t four = 0xfu << (lane & ~3);
      room += __shfl_xor_sync(four, room, step);
      lower += __shfl_xor_sync(four, lower, step);
    }
    if (i % 4 == 0)
      levels[i / 4] = room > work ? INT32_MAX : load + (int)((work - room + lower - 1) / lower);
  }
  __syncthreads();
  if (shares) {
    int level = INT32_MAX;
    for (int b = lane; b < blocks; b += 32) level = min(level, levels[b]);
    level = __reduce_min_sync(0xffffffffu, level);
    /* Nothing is left over at the level that is higher by the longest task, less one: a block that leaves the next task to
     * others is then at the first level itself. Each lane tries one from here to there. */
    level += lane * ((costs[0] + 29) / 31);
    int at = 0, begin = 0, end = 0, i = 0, left = (first[1] - first[0]) * per_sequence;
    float per_chunk = 1.f / costs[0];
    const auto fit = [&](int room) { return max((int)((room + 0.5f) * per_chunk), 0); };
    int next = loads[0];
#pragma unroll 1
    for (int b = 0; b < blocks; ++b) {
      int room = level - next;
      next = loads[b + 1 < blocks ? b + 1 : b];
      int tasks = fit(room);
      if (b == dealt_to<S>()) begin = at;
      while (tasks >= left) {
        at += left;
        room -= left * costs[i];
        if (++i < classes) {
          left = (first[i + 1] - first[i]) * per_sequence;
          per_chunk = 1.f / costs[i];
        } else { /* no task any more */
          left = 1;
          per_chunk = 0;
        }
        tasks = fit(room);
      }
      at += tasks;
      left -= tasks;
      if (b == dealt_to<S>()) end = at;
    }
    /* Loads beyond what f32 counts might leave some over, or offsets that are none: they are the last block's. */
    const uint32_t enough = __ballot_sync(0xffffffffu, at == rest);
    if (lane == (enough ? __ffs(enough) - 1 : 31)) {
      deal.dealt = dealt;
      deal.rest_begin = dealt + begin;
      deal.rest_end = dealt + (dealt_to<S>() == blocks - 1 ? rest : end);
    }
  }
}

/* How many of the tasks that are dealt back and forth are the block's. */
template <class S>
__device__ __forceinline__ int dealt_to_block(int64_t dealt) {
  const int64_t rounds = dealt / dealt_among<S>();
  return (int)rounds + (dealt_task(rounds, dealt_to<S>(), dealt_among<S>()) < dealt);
}

/* shared.order and shared.deal. A sequence's place is the number of those that are longer, or as long and before it.
 * All threads of the block. */
template <class S>
__device__ __noinline__ void deal_sequences(const fkda_sm90_params &params, Shared<S> &shared) {
  const fkda_problem &p = params.problem;
  const int64_t per_sequence = p.HV * dealt_parts<S>(params);
  const int N = (int)p.N, blocks = dealt_among<S>();
  Deal &deal = shared.deal;
  if (threadIdx.x == 0) deal = {p.N * per_sequence, 0, 0, 0, 0};
  if (is_sorted(p)) {
    int *lengths = read_lengths(p, shared, N);
    if (params.by_lengths && !is_meant<S>(params, lengths)) {
      if (threadIdx.x == 0) deal.dealt = 0, deal.own = 0;
      __syncthreads();
      return;
    }
    sort_sequences(shared, lengths, N);
    __syncthreads();
    /* Is the i-th one not short? It takes more than a chunk, and a quarter of the longest one's time. */
    const auto is_longer = [&](int i) {
      const int length = lengths[shared.order[i]];
      return length > CHUNK && 4 * cost_of(length) > cost_of(lengths[shared.order[0]]);
    };
    for (int i = threadIdx.x; i < N; i += S::THREADS)
      if (is_longer(i) && (i + 1 == N || !is_longer(i + 1))) deal.longer = i + 1;
    __syncthreads();
    if (deal.longer && deal.longer < N && blocks <= S::THREADS &&
        deal.longer * per_sequence <= (int64_t)MAX_DEALT * blocks)
      share_short(p, shared, lengths, (int)per_sequence);
  }
  __syncthreads();
  if (threadIdx.x == 0) deal.own = dealt_to_block<S>(deal.dealt);
}

/* shared.deal where sequences are taken as they come, and the block's first task. One thread. */
template <class S>
__device__ __noinline__ void deal_ahead(const fkda_sm90_params &params, Shared<S> &shared) {
  const fkda_problem &p = params.problem;
  const int64_t tasks = p.N * p.HV * dealt_parts<S>(params);
  shared.deal = {tasks, 0, 0, dealt_to_block<S>(tasks), 0};
  shared.tasks[0] = deal_task<S>(params, shared, 0);
}

template <class S>
__device__ __forceinline__ void prefill(const fkda_sm90_params &params) {
  Shared<S> &shared = start_block<S>();
  if (!is_dealt_ahead(params))
    deal_sequences(params, shared);
  else if (threadIdx.x == S::FIRST_HELPER) /* in no warp that has barriers to make */
    deal_ahead(params, shared);
  start_roles<S>();
  run_roles(params, shared, [&] { run_state<S>(params, shared); });
  end_roles<S>();
}

}  // namespace fkda

#define FKDA_ENTRY_OF(K, part, dtype, bounded, suffix, threads, pair, cluster)                     \
  extern "C" __global__ void cluster __launch_bounds__(threads, 1)                                 \
      fkda_sm90_prefill_k##K##_v##part##suffix(const __grid_constant__ fkda_sm90_params params) {  \
    using S = fkda::Shape<K, part, dtype == FKDA_F32 ? 4 : 2, bounded, false, pair>;               \
    static_assert(S::THREADS == threads, "threads");                                               \
    static_assert(                                                                                 \
        sizeof(fkda::Shared<S>) + fkda::ALIGNMENT - fkda::ALIGNED <= FKDA_SM90_PREFILL_SHARED,     \
        "shared memory");                                                                          \
    fkda::prefill<S>(params);                                                                      \
  }
#define FKDA_ENTRY(K, part, dtype, bounded, suffix)                                                \
  FKDA_ENTRY_OF(K, part, dtype, bounded, suffix, FKDA_SM90_PREFILL_THREADS, false, )
FKDA_SM90_PREFILL_LIST(FKDA_ENTRY)
#define FKDA_PAIR_ENTRY(K, part, dtype, bounded, suffix)                                           \
  FKDA_ENTRY_OF(K, part, dtype, bounded, suffix, FKDA_SM90_PAIR_THREADS, true,                     \
                __cluster_dims__(2, 1, 1))
FKDA_SM90_PAIR_LIST(FKDA_PAIR_ENTRY)
