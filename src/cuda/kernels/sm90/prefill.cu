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
    const int cost = (lengths[n] + CHUNK - 1) / CHUNK + TASK_COST;
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

/* shared.deal where short sequences stand beside longer ones: each block gets as many short tasks as lift its load, in chunks, to
 * a level that is the same for all and just takes all of them. Every block computes the same; ints of its own lie behind
 * the lengths. All threads of the block. */
template <class S>
__device__ void share_short(const fkda_problem &p, Shared<S> &shared, const int *lengths,
                            int64_t per_sequence) {
  Deal &deal = shared.deal;
  const int N = (int)p.N, blocks = dealt_among<S>(), longer = deal.longer;
  const int64_t dealt = longer * per_sequence, rest = N * per_sequence - dealt;
  const int64_t work = rest * (TASK_COST + 1);
  int *loads = reinterpret_cast<int *>(shared.slots[0]) + MAX_SORTED, *levels = loads + S::THREADS;
  static_assert(sizeof(shared.slots[0]) >= (MAX_SORTED + 2 * S::THREADS) * sizeof(int), "scratch");
  const int block = threadIdx.x;
  if (block < blocks) {
    int load = 0;
    for (int64_t i = 0, task; (task = dealt_task(i, block, blocks)) < dealt; ++i)
      load += (lengths[shared.order[task / per_sequence]] + CHUNK - 1) / CHUNK + TASK_COST;
    loads[block] = load;
  }
  __syncthreads();
  if (block < blocks) {
    /* What fits below this block's load, and from there on with a part of the blocks: too high a level unless all
     * that are lower count, and of those the lowest is the right one. */
    const int load = loads[block];
    int64_t room = 0;
    int lower = 0;
    for (int b = 0; b < blocks; ++b) {
      if (loads[b] > load) continue;
      room += load - loads[b];
      ++lower;
    }
    levels[block] = room > work ? INT32_MAX : load + (int)((work - room + lower - 1) / lower);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t before = 0, own = 0, all = 0;
    int level = INT32_MAX;
    for (int b = 0; b < blocks; ++b) level = levels[b] < level ? levels[b] : level;
    for (int b = 0; b < blocks; ++b) {
      const int room = level > loads[b] ? level - loads[b] : 0;
      if (b < dealt_to<S>()) before += room;
      if (b == dealt_to<S>()) own = room;
      all += room;
    }
    deal.dealt = dealt;
    deal.rest_begin = dealt + rest * before / all;
    deal.rest_end = dealt + rest * (before + own) / all;
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
    for (int i = threadIdx.x; i < N; i += S::THREADS)
      if (lengths[shared.order[i]] > CHUNK && (i + 1 == N || lengths[shared.order[i + 1]] <= CHUNK))
        deal.longer = i + 1;
    __syncthreads();
    if (deal.longer && deal.longer < N && blocks <= S::THREADS &&
        deal.longer * per_sequence <= (int64_t)MAX_DEALT * blocks)
      share_short(p, shared, lengths, per_sequence);
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
