/* The state groups of the backward's walks. Forward, from a sequence's first chunk to its last: S, E of (23). Backward:
 * the gradient of S, dW = diag(beta)^-1 dV, dV. Frames as in the prefill (prefill.cu), with U' = diag(r) U:
 *
 *   forward    S1 = S e^m          W = V - r S1 K'^T           U' = W T^T       S <- (S1 + U'^T K^) e^{G_C-m}
 *   backward   dS1 = dS e^{G_C-m}  Y = dS1 K^^T + dO^T P       dV = Y T         dS <- (dS1 + dO^T Q' - r dV^T K') e^m
 *
 * Y is the gradient of U', T the prefill's, P and Q' have the queries' norms here. U'_i = r_i beta_i E_i, so that E and dW come
 * by a division by r beta, which is never 0 (LEAST_BETA).
 *
 * Chunks that need more than this - keys nearly parallel to their neighbours, gates out of the anchor's range, values so
 * huge that something overflows - are not worked on with care: the task says so, and the launches that follow do its head
 * anew. An overflow never leaves a state. */
#ifndef FKDA_CUDA_SM90_WALK_CUH
#define FKDA_CUDA_SM90_WALK_CUH

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>

#include "cuda/kernels/portable/backward_workspace.cuh"
#include "cuda/kernels/sm90/factors.cuh"
#include "cuda/kernels/sm90/shared.cuh"
#include "cuda/kernels/sm90/state.cuh"
#include "cuda/kernels/sm90/wgmma.cuh"

namespace fkda {

template <class S>
struct Walker {
  static constexpr int K = S::K;
  using Rows = StateRows<K>;
  using Handover = typename Shared<S>::Handover;

  const fkda_portable_backward_params &x;
  Shared<S> &shared;
  int matrix_at; /* of ldmatrix and stmatrix: tokens 0-7 v 0-7, tokens 0-7 v 8-15, tokens 8-15 likewise */
  Position<S> at;
  bool failed;
  float s[K / 2]; /* S or its gradient, 16 value rows a warp, as StateRows */

  __device__ __forceinline__ Walker(const fkda_portable_backward_params &x, Shared<S> &shared)
      : x(x), shared(shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    matrix_at =
        warp / 4 * TILE + in_tile((lane & 7) + ((lane >> 4) << 3), 16 * (warp & 3) + (lane & 8));
  }

  __device__ __forceinline__ int v_square(const Task &task) const {
    return task.v_begin / 16 + fresh_warp();
  }

  /* Where the state and what a token leaves go, of the block of the chunk that is worked on. */
  char *states, *tokens;
  __device__ __forceinline__ void start_blocks(const Task &task) {
    const Workspace<K> w(x);
    const int64_t row = first_block(x.problem, task.b, task.begin, task.n) +
                        (task.backward ? task.chunks / 2 - 1 : 0);
    states = Workspace<K>::at(task.backward ? w.d_states : w.states, w.sizes.states, row, w.heads,
                              task.head);
    tokens = Workspace<K>::at(task.backward ? w.d_updates : w.differences, w.sizes.differences, row,
                              w.heads, task.head);
  }
  template <int BY>
  __device__ __forceinline__ void next_block() {
    const fkda_problem &p = x.problem;
    const int64_t cells = p.HV * p.V * 2;
    states += BY * K * cells;
    tokens += BY * FKDA_BACKWARD_BLOCK * cells;
  }

  /* What lies where of the chunk that is to be worked on, once its factors are there. */
  __device__ __forceinline__ const Handover &next_factors() const {
    at.factors(shared).wait();
    return shared.handover[uniform(at.handover())];
  }
  __device__ __forceinline__ uint32_t slot() const {
    return address(shared.slots[uniform(at.slot())]);
  }

  /* d[v,i] = sum_c s[v,c] tile[i,c], a tile of 32 tokens in the slot; on its way. */
  __device__ __forceinline__ void look_up(float (&d)[16], uint32_t (&a)[K / 4], int tile) {
#pragma unroll
    for (int i = 0; i < K / 4; ++i) a[i] = pack(s[2 * i], s[2 * i + 1]);
    const uint64_t rows = tile_descriptor(slot() + tile);
    fence(a);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < K; k += 16)
      multiply<Major::K>(d, a + k / 4, rows + (k / 64 * S::SLICE + k % 64 * 2) / 16, k > 0);
    cute::warpgroup_commit_batch();
  }

  /* s[v,c] += sum_i u[v,i] tile[i,c]; on its way. */
  __device__ __forceinline__ void add(const uint32_t (&u)[8], int tile) {
    const uint64_t first = tile_descriptor(slot() + tile, S::SLICE);
    cute::warpgroup_arrive();
    multiply<Major::MN>(s, u, first, true);
    multiply<Major::MN>(s, u + 4, first + HALF * 128 / 16, true);
    cute::warpgroup_commit_batch();
  }

  /* The block's part of v or d_out, 16 value columns of 32 tokens; of `left` tokens. */
  __device__ __forceinline__ void load_values(uint32_t (&w)[8], int left) {
    at.values(shared).wait();
    const char *tile = shared.values[at.value()] + matrix_at;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      cute::SM75_U16x8_LDSM_T::copy(
          *reinterpret_cast<const cute::uint128_t *>(tile + i * in_tile(16, 0)), w[4 * i],
          w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
    if (left < CHUNK) { /* nothing of what lies behind the sequence */
      const int lane = fresh_lane();
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int j = 8 * n + 2 * (lane & 3);
        const uint32_t mask = (j < left ? 0x0000ffffu : 0) | (j + 1 < left ? 0xffff0000u : 0);
        w[2 * n] &= mask, w[2 * n + 1] &= mask;
      }
    }
  }

  /* The same of a gradient, to its place. */
  __device__ __forceinline__ void hand_out(const float (&y)[16]) {
    char *tile = shared.values[at.value()] + matrix_at;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      cute::SM90_U16x8_STSM_T::copy(
          pack(y[8 * i], y[8 * i + 1]), pack(y[8 * i + 2], y[8 * i + 3]),
          pack(y[8 * i + 4], y[8 * i + 5]), pack(y[8 * i + 6], y[8 * i + 7]),
          *reinterpret_cast<cute::uint128_t *>(tile + i * in_tile(16, 0)));
    fence_async();
  }

  /* y[v,i] *= by[i] */
  __device__ __forceinline__ static void scale_tokens(float (&y)[16], const float *by) {
    const int lane = fresh_lane();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 f = *reinterpret_cast<const float2 *>(&by[8 * n + 2 * (lane & 3)]);
      y[4 * n] *= f.x, y[4 * n + 1] *= f.y, y[4 * n + 2] *= f.x, y[4 * n + 3] *= f.y;
    }
  }

  __device__ __forceinline__ void see(const Handover &f) {
    failed |= f.collinear != 0;
    if (!S::BOUNDED) failed |= f.by_levels != 0;
  }

  __device__ __forceinline__ void step_forward(const Task &task, int chunk) {
    const int V = (int)x.problem.V;
    if (chunk % 2 == 0) keep_state<K>(s, states, V, v_square(task));
    const Handover &f = next_factors();
    see(f);
    decay_state<K>(s, f.to_anchor, fresh_lane());
    uint32_t a[K / 4], w[8], w_low[8];
    float y[16];
    look_up(y, a, SLICE_K);
    load_values(w, task.length - chunk * CHUNK);
    arrive_warp(shared.value_out[at.value()]);
    cute::warpgroup_wait<0>();
    fence(y);
    {
      const int lane = fresh_lane();
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 r = *reinterpret_cast<const float2 *>(&f.norm_k[8 * n + 2 * (lane & 3)]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t v = w[2 * n + h];
          const float w0 = fmaf(-r.x, y[4 * n + 2 * h], low_of(v));
          const float w1 = fmaf(-r.y, y[4 * n + 2 * h + 1], high_of(v));
          w[2 * n + h] = pack(w0, w1);
          w_low[2 * n + h] = pack_rest(w0, w1, w[2 * n + h]);
        }
      }
    }
    /* U'[v,i] = sum_j W[v,j] T[i,j] */
    const uint64_t T_high = square_descriptor(address(f.T_high)), T_low = T_high + SQUARE / 16;
    fence(w);
    fence(w_low);
    cute::warpgroup_arrive();
    multiply_by_parts<Major::MN>(y, w, w_low, T_high, T_low);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    fence(y);
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = pack(y[2 * i], y[2 * i + 1]);
    fence(w);
    fence(s);
    add(w, SLICE_G);
    scale_tokens(y, f.column);
    keep_tokens(y, tokens, V, chunk & 1, v_square(task));
    if (chunk % 2) next_block<1>();
    finish(f.to_end);
  }

  /* The last of a chunk: places given back, the state decayed to the chunk's other end. */
  __device__ __forceinline__ void finish(const float *to_end) {
    cute::warpgroup_wait<0>();
    fence(s);
    /* A factor group may ask for a handover only when its use before the last is over, see run_state(). */
    constexpr bool SLOT_LAST = S::FACTOR_GROUPS > S::HANDOVERS;
    if (!SLOT_LAST) at.give_back_slot(shared);
    decay_state<K>(s, to_end, fresh_lane());
    at.give_back_handover(shared);
    if (SLOT_LAST) at.give_back_slot(shared);
    at.next();
  }

  __device__ __forceinline__ void step_backward(const Task &task, int chunk) {
    const int V = (int)x.problem.V;
    if (chunk % 2) keep_state<K>(s, states, V, v_square(task));
    const Handover &f = next_factors();
    see(f);
    decay_state<K>(s, f.to_end, fresh_lane());
    uint32_t a[K / 4], d_out[8];
    float y[16];
    look_up(y, a, SLICE_G);
    load_values(d_out, task.length - chunk * CHUNK);
    const uint64_t T_high = square_descriptor(address(f.T_high)), T_low = T_high + SQUARE / 16;
    const uint64_t P = T_high + 2 * SQUARE / 16;
    fence(d_out);
    fence(s);
    cute::warpgroup_arrive();
    multiply<Major::MN>(y, d_out, P, true);
    multiply<Major::MN>(y, d_out + 4, P + 64, true);
    cute::warpgroup_commit_batch();
    add(d_out, SLICE_Q);
    cute::warpgroup_wait<1>();
    fence(y);
    uint32_t w[8], w_low[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      w[i] = pack(y[2 * i], y[2 * i + 1]);
      w_low[i] = pack_rest(y[2 * i], y[2 * i + 1], w[i]);
    }
    /* dV[v,j] = sum_i Y[v,i] T[i,j] */
    fence(w);
    fence(w_low);
    cute::warpgroup_arrive();
    multiply_by_parts<Major::K>(y, w, w_low, T_high, T_low);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    fence(y);
    fence(s);
    if (x.problem.d_v.data) hand_out(y);
    arrive_warp(shared.value_out[at.value()]);
    scale_tokens(y, f.norm_k);
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = pack(-y[2 * i], -y[2 * i + 1]);
    fence(w);
    add(w, SLICE_K);
    scale_tokens(y, f.column);
    keep_tokens(y, tokens, V, chunk & 1, v_square(task));
    if (chunk % 2 == 0) next_block<-1>();
    finish(f.to_anchor);
  }

  __device__ __forceinline__ void run(const Task &task) {
    const fkda_problem &p = x.problem;
    const auto first_column = [&] { return task.v_begin + 16 * fresh_warp(); };
    const auto of_head = [&](const fkda_states &states) {
      return task.n * states.stride_slot + task.head * states.stride_head;
    };
    const fkda_states &from = task.backward ? p.d_final : p.initial;
    failed = false;
    if (from.data)
      Rows::load(s, from, p.layout, of_head(from), first_column());
    else
#pragma unroll
      for (int i = 0; i < K / 2; ++i) s[i] = 0;
    start_blocks(task);
    if (task.backward)
#pragma unroll 1
      for (int chunk = task.chunks - 1; chunk >= 0; --chunk) step_backward(task, chunk);
    else
#pragma unroll 1
      for (int chunk = 0; chunk < task.chunks; ++chunk) step_forward(task, chunk);
    if (task.backward && p.d_initial.data)
      Rows::store(s, p.d_initial, p.layout, of_head(p.d_initial), first_column());
    float sum = 0; /* of zeros, unless something was no number */
#pragma unroll
    for (int i = 0; i < K / 2; ++i) sum = fmaf(s[i], 0.0f, sum);
    failed |= !(sum == 0);
    report(task);
  }

  /* To all that read it, from any of the state groups' threads. */
  __device__ __forceinline__ void report(const Task &task) {
    const int any = group_sync_or<32 * S::STATE_WARPS>(S::FACTOR_GROUPS, failed);
    if (threadIdx.x) return;
    uint32_t *flags = x.redo + (task.n * x.problem.HV + task.head) * FKDA_BACKWARD_REDO;
    static_assert(FKDA_BACKWARD_REDO == 4, "two directions, two parts");
    const bool whole = S::V == x.problem.V;
    for (int direction = 0; direction < 2; ++direction)
      for (int part = 0; part < 2; ++part)
        if ((direction != (int)task.backward || !x.forward) &&
            (whole || part == task.v_begin / S::V))
          flags[2 * direction + part] = any;
  }
};

template <class S>
__device__ void run_walk(const fkda_portable_backward_params &x, Shared<S> &shared) {
  Walker<S> walker(x, shared);
  each_task(shared, [&](const Task &task, int) { walker.run(task); });
}

}  // namespace fkda

#endif
