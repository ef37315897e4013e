/* The helper warps: copies in and out, and solvers. */
#ifndef FKDA_CUDA_SM90_HELPERS_CUH
#define FKDA_CUDA_SM90_HELPERS_CUH

#include "cuda/kernels/sm90/shared.cuh"
#include "cuda/kernels/sm90/solver.cuh"

namespace fkda {

/* ---- the loader: one warp that publishes tasks and copies their q, k and g in ------------------------------ */

__device__ __forceinline__ bool is_sorted(const fkda_problem &p) {
  return p.cu_seqlens.data && p.N <= MAX_SORTED;
}

/* The lengths of the N sequences, where q will be. All threads of the block. */
template <class S>
__device__ __forceinline__ int *read_lengths(const fkda_problem &p, Shared<S> &shared, int N) {
  int *lengths = reinterpret_cast<int *>(shared.slots[0]);
  static_assert(sizeof(shared.slots[0]) >= MAX_SORTED * sizeof(int), "scratch");
  for (int n = threadIdx.x; n < N; n += S::THREADS) lengths[n] = (int)clamped_span(p, n).length;
  __syncthreads();
  return lengths;
}

/* shared.order of sequences with these lengths, longest first. */
template <class S>
__device__ void sort_sequences(Shared<S> &shared, const int *lengths, int N) {
  for (int n = threadIdx.x; n < N; n += S::THREADS) {
    const int length = lengths[n];
    int before = 0;
    for (int m = 0; m < N; ++m) before += lengths[m] > length || (lengths[m] == length && m < n);
    shared.order[before] = (uint16_t)n;
  }
}

/* The i-th of the tasks that are dealt to block `block` of `blocks` back and forth. */
__device__ __forceinline__ int64_t dealt_task(int64_t i, int block, int blocks) {
  return i * blocks + (i & 1 ? blocks - 1 - block : block);
}

/* Those to whom tasks are dealt: blocks, or pairs of them. */
template <class S>
__device__ __forceinline__ int dealt_to() {
  return blockIdx.x / S::BLOCKS;
}
template <class S>
__device__ __forceinline__ int dealt_among() {
  return gridDim.x / S::BLOCKS;
}
/* Parts of a head that are dealt each for itself. */
template <class S, class Params>
__device__ __forceinline__ int dealt_parts(const Params &params) {
  return S::PAIR ? 1 : params.value_split;
}

/* What is dealt when there is none any more. */
__device__ __forceinline__ Task no_task() {
  Task none;
  none.n = -1;
  none.chunks = 0;
  return none;
}

/* Where the share of `pairs` pairs' i-th begins: in chunks of `rows` sequences of `chunks`, one after the other. A sequence is cut
 * only where enough of it is left on either side; its state's way in and out counts as chunks before its first. */
__device__ __forceinline__ uint32_t share_begin(uint32_t i, uint32_t pairs, uint32_t rows,
                                                uint32_t chunks) {
  constexpr uint32_t LEAST_BEFORE = 4, LEAST = FKDA_SM90_LEAST_REST, STATE = FKDA_SM90_STATE_COST;
  const uint32_t cost = chunks + STATE, begin = i * (rows * cost) / pairs, row = begin / cost;
  const uint32_t within = begin - row * cost, cut = within < STATE ? 0 : within - STATE;
  return row * chunks + (cut < LEAST / 2               ? 0
                         : cut < LEAST                 ? LEAST
                         : chunks - cut < LEAST_BEFORE ? chunks
                                                       : cut);
}

/* The pair's i-th task where all have equal shares, by McNaughton's rule. A share that begins within a sequence starts
 * with the sequence's first chunks, as many as the share before does not have; that one ends with the others, when the
 * state has long come. The last pair has the first share, so that none waits for a pair that is started after it. */
template <class S>
__device__ Task deal_cut_task(const fkda_sm90_params &params, int64_t i) {
  const fkda_problem &p = params.problem;
  const uint32_t chunks = (uint32_t)((p.T + CHUNK - 1) / CHUNK);
  const uint32_t rows = (uint32_t)(p.N * p.HV), pairs = dealt_among<S>();
  const uint32_t share = pairs - 1 - dealt_to<S>();
  const uint32_t begin = share_begin(share, pairs, rows, chunks);
  const uint32_t end = share_begin(share + 1, pairs, rows, chunks);
  const uint32_t position = i ? (begin / chunks + (uint32_t)i) * chunks : begin;
  if (position >= end) return no_task();
  const uint32_t row = position / chunks, n = row / (uint32_t)p.HV;
  Task task = make_task(p, n, (int)(row - n * (uint32_t)p.HV), cluster_rank(), S::V, CHUNK);
  const uint32_t before = position - row * chunks, there = end - row * chunks;
  if (before) { /* the share before has as many */
    task.cut = BEFORE_CUT;
    task.chunks = (int)(chunks - before);
    task.length = task.chunks * CHUNK;
  } else if (there < chunks) {
    task.cut = BEHIND_CUT;
    task.chunks = (int)there;
    task.begin += (chunks - there) * CHUNK;
    task.length -= (int)(chunks - there) * CHUNK;
  }
  if (task.skip) task.chunks = 0;
  return task;
}

/* The block's i-th task; n < 0 if there is none. */
template <class S>
__device__ Task deal_task(const fkda_sm90_params &params, const Shared<S> &shared, int64_t i) {
  if (S::PAIR && params.equal_shares) return deal_cut_task<S>(params, i);
  const fkda_problem &p = params.problem;
  const int parts = dealt_parts<S>(params);
  const int64_t per_sequence = p.HV * parts;
  const Deal &deal = shared.deal;
  const bool rest = i >= deal.own;
  const int64_t position =
      rest ? deal.rest_begin + i - deal.own : dealt_task(i, dealt_to<S>(), dealt_among<S>());
  if (rest && position >= deal.rest_end) return no_task();
  int64_t n = position / per_sequence;
  const int within = (int)(position - n * per_sequence), head = within / parts;
  if (is_sorted(p)) n = shared.order[n];
  const int part = S::PAIR ? cluster_rank() : within - head * parts;
  Task task = make_task(p, n, head, part, S::V, CHUNK);
  if (task.skip) task.chunks = 0;
  return task;
}

/* Has a block its first task before its roles start? Then all that dealing takes is done while barriers are made. Not of walks. */
__device__ __forceinline__ bool is_dealt_ahead(const fkda_sm90_params &params) {
  return !is_sorted(params.problem);
}

/* The whole warp goes along, with operands that it has in common: the copy engine takes them from uniform registers, which
 * take a loop of instructions each to fill from one lane's. */
template <class S, class Params>
__device__ void run_loader(const Params &params, Shared<S> &shared) {
  Ring<S::SLOTS> ring;
  int count = 0;
  int passed = first_chunk<S>(0); /* of a pair: chunks of the task before the block's first */
#pragma unroll 1
  for (int i = 0;; ++i) {
    Task &task = shared.tasks[i % TASKS];
    if (i >= TASKS) wait_idly(shared.task_free[i % TASKS], (i / TASKS & 1) ^ 1);
    __syncwarp(); /* all lanes have seen it free */
    if (fresh_lane() == 0) {
      if (i || !is_dealt_ahead(params)) task = deal_task<S>(params, shared, i);
      arrive(shared.task_full[i % TASKS]);
    }
    __syncwarp();
    if (task.n < 0) break;
    const int head = uniform(task.head), qk_head = uniform(task.qk_head), b = uniform((int)task.b);
    const bool queries = has_queries<S>(task);
    int token = (int)task.begin + place_of<S>(task, S::PAIR ? passed : 0) * CHUNK;
    const int step = S::BLOCKS * (S::WALK && task.backward ? -CHUNK : CHUNK);
    int left = task.chunks - (S::PAIR ? passed : 0);
#pragma unroll 1
    for (; left > 0; left -= S::BLOCKS, ring.next(), token += step) {
      const int stage = uniform(ring.stage), first = uniform(token);
      const Barrier &full = shared.slot_full[stage];
      if (count < S::SLOTS)
        ++count;
      else
        wait_idly(shared.slot_free[stage], ring.parity ^ 1);
      if (!cute::elect_one_sync()) continue;
      full.arrive_and_expect_tx(S::SLICES * TILE * ((S::GATE_BYTES == 2 ? 2 : 3) + queries));
      char *slot = shared.slots[stage];
#pragma unroll
      for (int slice = 0; slice < S::SLICES; ++slice, slot += S::SLICE) {
        load_box(params.k, full, slot + SLICE_K, 64 * slice, first, qk_head, b);
        if (queries) load_box(params.q, full, slot + SLICE_Q, 64 * slice, first, qk_head, b);
        if (S::GATE_BYTES == 2) {
          load_box(params.g, full, slot + SLICE_G, 64 * slice, first, head, b);
        } else {
          load_box(params.g, full, slot + SLICE_G32, 64 * slice, first, head, b);
          load_box(params.g, full, slot + SLICE_G32 + TILE, 64 * slice + 32, first, head, b);
        }
      }
    }
    passed = -left;
  }
}

/* ---- one warp for v in and, from its place, o out; for walks, forward: v, backward: d_out, d_v ------------- */

__device__ __forceinline__ const fkda_tensor_map &map_in(const fkda_sm90_params &x, const Task &) {
  return x.v;
}
__device__ __forceinline__ const fkda_tensor_map &map_out(const fkda_sm90_params &x) {
  return x.out;
}
__device__ __forceinline__ const fkda_rows &rows_out(const fkda_sm90_params &x) {
  return x.problem.out;
}
template <class S, class Params>
struct ValueMover {
  const Params &params;
  Shared<S> &shared;
  int in_task = -1, in_chunk = 0, in_count = 0,
      in_chunks = 0; /* the next v to load, among all of the block */
  int out_count = 0; /* chunks whose o is on its way */

  __device__ ValueMover(const Params &params, Shared<S> &shared) : params(params), shared(shared) {}

  /* Loads v for every place that is free: all but the last store have been read. Goes on to tasks that are
   * published, and waits for none. */
  __device__ void load() {
    while (in_count < (out_count ? out_count - 1 : 0) + S::VALUES) {
      if (in_chunk == in_chunks) {
        const int next = in_task + 1;
        /* one answer for the warp, which goes on together */
        if (!uniform(shared.task_full[next % TASKS].try_wait(next / TASKS & 1))) return;
        if (shared.tasks[next % TASKS].n < 0) return;
        in_task = next, in_chunk = 0, in_chunks = shared.tasks[next % TASKS].chunks;
        continue;
      }
      const Task &task = shared.tasks[in_task % TASKS];
      const int stage = uniform(in_count) % S::VALUES, column = uniform(task.v_begin);
      const int token = uniform((int)task.begin + place_of<S>(task, in_chunk) * CHUNK);
      const int head = uniform(task.head), b = uniform((int)task.b);
      if (cute::elect_one_sync()) {
        const Barrier &full = shared.value_full[stage];
        full.arrive_and_expect_tx(S::VALUE);
#pragma unroll
        for (int i = 0; i < S::STATE_GROUPS; ++i)
          load_box(map_in(params, task), full, shared.values[stage] + i * TILE, column + 64 * i,
                   token, head, b);
      }
      ++in_chunk, ++in_count;
    }
  }

  __device__ void store(const Task &task, int chunk) {
    const int left = task.length - chunk * CHUNK;
    if (left >= CHUNK) {
      const int stage = uniform(out_count) % S::VALUES, column = uniform(task.v_begin);
      const int token = uniform((int)task.begin + chunk * CHUNK);
      const int head = uniform(task.head), b = uniform((int)task.b);
      if (cute::elect_one_sync()) {
#pragma unroll
        for (int i = 0; i < S::STATE_GROUPS; ++i)
          cute::SM90_TMA_STORE_4D::copy(&map_out(params), shared.values[stage] + i * TILE,
                                        column + 64 * i, token, head, b);
      }
    } else { /* the rows behind belong to another sequence */
      const char *tiles = shared.values[out_count % S::VALUES];
      const fkda_rows &rows = rows_out(params);
      bf16 *to = static_cast<bf16 *>(rows.data) + first_row(rows, task, task.head) +
                 (int64_t)chunk * CHUNK * rows.stride_t + task.v_begin;
#pragma unroll 1
      for (int i = fresh_lane(); i < left * (S::V / 8); i += 32) {
        const int row = i / (S::V / 8), piece = i % (S::V / 8);
        *reinterpret_cast<uint4 *>(to + row * rows.stride_t + piece * 8) =
            *reinterpret_cast<const uint4 *>(tiles + piece / 8 * TILE +
                                             in_tile(row, piece % 8 * 8));
      }
      __syncwarp();
    }
  }

  __device__ void run() {
    each_task(shared, [&](const Task &task, int number) {
      /* Tasks without a chunk in between may be gone by now: their places are those of later ones. */
      if (in_task < number - 1) in_task = number - 1;
#pragma unroll 1
      for (int chunk = 0; chunk < task.chunks; ++chunk) {
        load();
        wait_idly(shared.value_out[out_count % S::VALUES], out_count / S::VALUES & 1);
        if (!S::WALK)
          fence_async(); /* for all that stored: they wait for a fence, this warp has time */
        if (S::PAIR && task.cut == BEHIND_CUT && chunk == 0) /* where the state was (Relay), o comes */
          asm volatile("fence.proxy.async;" ::: "memory");
        if (!S::WALK || (task.backward && rows_out(params).data))
          store(task, place_of<S>(task, chunk));
        ++out_count;
        if (cute::elect_one_sync()) { /* the same lane as in store() */
          cute::tma_store_arrive();
          cute::tma_store_wait<1>();
        }
        __syncwarp();
      }
    });
    if (cute::elect_one_sync()) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
};

template <class S, class Params>
__device__ __forceinline__ void run_helpers(const Params &params, Shared<S> &shared) {
  const int warp = threadIdx.x / 32 & 3;
  if (warp < SOLVERS)
    solve<S, Params>(params, shared, warp);
  else if (warp == SOLVERS)
    run_loader<S, Params>(params, shared);
  else
    ValueMover<S, Params>(params, shared).run();
}

}  // namespace fkda

#endif
