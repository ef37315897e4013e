/* Backward, second launch: two walks over a sequence's chunks, which need nothing of each other.
 *
 *   forward    S from the first chunk to the last: (12). Stores S before each block and E of every token.
 *   backward   dS from the last chunk to the first: (22), (23), (26). Stores dS behind each block, dW = diag(beta)^-1 dV
 *              of every token, dV, and at the end d_initial_state.
 *
 * A block is a sequence, value head, direction and part of the value columns; a warp owns 16 value rows of the
 * state in f32 accumulators from end to end, transposed so that value rows are the M dimension, and needs nothing of
 * the other warps. What it multiplies by was made by the launch before and comes through a ring of chunks in
 * shared memory. All exponents in it are <= 0. Norms of keys are applied to products in f32: what is written
 * into the state and what is looked up in it are roundings of the same raw key. Chunks whose keys are nearly parallel have a
 * step of their own, in which what is rounded does not add up. */
#include "cuda/kernels/portable/backward.cuh"

namespace fkda {
namespace {

struct Walk {
  fkda_span span;
  int64_t n, first; /* sequence; its first row of the workspace */
  int head, v_begin, chunks;
};

template <int K>
struct WalkState {
  float s[K / 8][4]; /* as StateRows */

  __device__ __forceinline__ void init(const fkda_states &from, int layout, int64_t n, int head,
                                       int v_first) {
    if (from.data) {
      StateRows<K>::load(rows(), from, layout, n * from.stride_slot + head * from.stride_head,
                         v_first);
    } else {
      clear(s);
    }
  }
  __device__ __forceinline__ float (&rows())[K / 2] {
    return reinterpret_cast<float(&)[K / 2]>(s[0]);
  }

  __device__ __forceinline__ void keep(char *state, int V, int v_square) {
    keep_state<K>(rows(), state, V, v_square);
  }

  /* X[v,i] = sum_c s[v,c] tile[i,c] of 32 tokens, s <- s decay on the way. WHOLE: s in two parts. */
  template <bool WHOLE>
  __device__ __forceinline__ void look_up(float (&X)[4][4], const bf16 *tile, const float *decay) {
    float odd[4][4];
    clear(X);
    clear(odd);
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
      uint32_t a[4], r0[4], r1[4];
      load_square(r0, tile, k);
      load_square(r1, tile, K / 16 + k);
      pack_operand(a, s[2 * k], s[2 * k + 1]);
      float(&x)[4][4] = k % 2 ? odd : X;
      mma_rows(x[0], x[1], a, r0);
      mma_rows(x[2], x[3], a, r1);
      if (WHOLE) {
        const float(&y)[4] = s[2 * k], (&z)[4] = s[2 * k + 1];
        const uint32_t rest[4] = {pack_rest(y[0], y[1], a[0]), pack_rest(y[2], y[3], a[1]),
                                  pack_rest(z[0], z[1], a[2]), pack_rest(z[2], z[3], a[3])};
        mma_rows(x[0], x[1], rest, r0);
        mma_rows(x[2], x[3], rest, r1);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 d = *reinterpret_cast<const float2 *>(&decay[16 * k + 8 * h + 2 * (lane & 3)]);
        float(&y)[4] = s[2 * k + h];
        y[0] *= d.x, y[1] *= d.y, y[2] *= d.x, y[3] *= d.y;
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) X[n][i] += odd[n][i];
  }

  /* s[v,c] += sum_i u[v,i] tile[i,c]; BOTH: of u + low. */
  template <bool BOTH>
  __device__ __forceinline__ void add(const uint32_t (&u)[2][4], const uint32_t (&low)[2][4],
                                      const bf16 *tile) {
#pragma unroll
    for (int k = 0; k < K / 16; ++k)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t r[4];
        load_square_transposed(r, tile, h * (K / 16) + k);
        mma_columns(s[2 * k], s[2 * k + 1], u[h], r);
        if (BOTH) mma_columns(s[2 * k], s[2 * k + 1], low[h], r);
      }
  }
};

/* w as two bf16 parts, A operands over 32 tokens. */
__device__ __forceinline__ void split_operand(uint32_t (&high)[2][4], uint32_t (&low)[2][4],
                                              const float (&w)[4][4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&x)[4] = w[2 * h + (i >> 1)];
      split(x[2 * (i & 1)], x[2 * (i & 1) + 1], high[h][i], low[h][i]);
    }
}

/* y += w -Z^T, or y += w -Z: y and w are value rows x tokens. */
template <bool TRANSPOSED>
__device__ __forceinline__ void apply_Z(float (&y)[4][4], const float (&w)[4][4],
                                        const bf16 *Z_high, const bf16 *Z_low) {
  uint32_t high[2][4], low[2][4];
  split_operand(high, low, w);
  float rest[4][4];
  clear(rest);
#pragma unroll
  for (int square = 0; square < 4; ++square) { /* rows i, columns j of Z */
    const int i = square >> 1, j = square & 1;
    if (j > i) continue;
    uint32_t zh[4], zl[4];
    if (TRANSPOSED) { /* over j */
      load_square(zh, Z_high, square);
      load_square(zl, Z_low, square);
      mma_rows(rest[2 * i], rest[2 * i + 1], low[j], zh);
      mma_rows(rest[2 * i], rest[2 * i + 1], high[j], zl);
      mma_rows(y[2 * i], y[2 * i + 1], high[j], zh);
    } else { /* over i */
      load_square_transposed(zh, Z_high, square);
      load_square_transposed(zl, Z_low, square);
      mma_columns(rest[2 * j], rest[2 * j + 1], low[i], zh);
      mma_columns(rest[2 * j], rest[2 * j + 1], high[i], zl);
      mma_columns(y[2 * j], y[2 * j + 1], high[i], zh);
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) y[n][i] += rest[n][i];
}

/* Running sums over 32 tokens, for (29): of a token and all before it, or with BACKWARD all behind it. */
template <bool BACKWARD>
__device__ __forceinline__ void sum_tokens(float (&y)[4][4]) {
  const int quad = threadIdx.x & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float carry = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = BACKWARD ? 3 - i : i;
      float &first = y[n][2 * h + BACKWARD], &second = y[n][2 * h + !BACKWARD];
      float sum = first + second;
#pragma unroll
      for (int width = 1; width < 4; width *= 2) {
        const float other = BACKWARD ? __shfl_down_sync(0xffffffffu, sum, width)
                                     : __shfl_up_sync(0xffffffffu, sum, width);
        if (BACKWARD ? quad + width < 4 : quad >= width) sum += other;
      }
      const float whole = __shfl_sync(0xffffffffu, sum, (threadIdx.x & 28) | (BACKWARD ? 0 : 3));
      first = carry + (sum - second);
      second = carry + sum;
      carry += whole;
    }
  }
}

/* E of 32 tokens, which will be rounded to bf16, so that the sums that S consists of lose no more by it than a token
 * does: what a token loses is handed to the later ones as if its u had been like that: (30). */
__device__ __forceinline__ void hand_on_rounding(float (&y)[4][4], const bf16 *Z_high,
                                                 const float *beta) {
  const int quad = threadIdx.x & 3;
  const uint16_t *const Z = reinterpret_cast<const uint16_t *>(Z_high) + 16 * quad;
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll 1
    for (int l = 0; l < 4; ++l)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 2 * l + e; /* of eight */
        float lost[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float x = y[n][2 * h + e];
          lost[h] = (__bfloat162float(__float2bfloat16_rn(x)) - x) * beta[8 * n + column];
          lost[h] = __shfl_sync(0xffffffffu, lost[h], (threadIdx.x & 28) | l);
        }
#pragma unroll
        for (int m = n; m < 4; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i) { /* Z holds -Z, 0 on and above the diagonal */
            const float z = low_of(Z[tile_at<STEP>(8 * m, 8 * n) + 8 * i + column]);
            y[m][i] = fmaf(z, lost[0], y[m][i]);
            y[m][2 + i] = fmaf(z, lost[1], y[m][2 + i]);
          }
      }
}

/* A warp's 32 tokens of 16 value columns to rows of a gradient; `first` is the element of the first token and the warp's first column. */
__device__ __forceinline__ void store_tokens(const float (&y)[4][4], const fkda_rows &to,
                                             int64_t first, int tokens, bool aligned) {
  const int lane = threadIdx.x & 31;
  if (to.dtype == FKDA_F32) {
    float *rows = static_cast<float *>(to.data) + first + (lane >> 2);
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * n + 2 * (lane & 3) + (i & 1);
        if (token < tokens) rows[token * to.stride_t + 4 * (i & 2)] = y[n][i];
      }
    return;
  }
  if (aligned) {
    store_pieces(y, static_cast<bf16 *>(to.data) + first, to.stride_t, tokens);
    return;
  }
  bf16 *rows = static_cast<bf16 *>(to.data) + first + (lane >> 2);
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 8 * n + 2 * (lane & 3) + (i & 1);
      if (token < tokens) rows[token * to.stride_t + 4 * (i & 2)] = __float2bfloat16_rn(y[n][i]);
    }
}

/* What a thread needs of a vector over 32 tokens. */
__device__ __forceinline__ float2 of_tokens(const char *vector, int n) {
  return *reinterpret_cast<const float2 *>(vector + 32 * n + 8 * (threadIdx.x & 3));
}

constexpr int PART = FKDA_BACKWARD_WALK_PART; /* value columns of a block */

template <int K>
struct Walker {
  static constexpr int THREADS = FKDA_BACKWARD_WALK_THREADS;
  static constexpr int STAGE = FKDA_BACKWARD_WALK_STAGE(K);
  const Backward &x;
  const Walk &walk;
  char *ring;
  WalkState<K> S;

  __device__ __forceinline__ Walker(const Backward &x, const Walk &walk, char *ring)
      : x(x), walk(walk), ring(ring) {}

  /* The thread's first piece of the next chunk's rows. */
  const bf16 *rows;
  template <bool FORWARD>
  __device__ __forceinline__ void start_loads(int chunk) {
    const fkda_rows &tensor = FORWARD ? x.problem.v : x.problem.d_out;
    const int lane = threadIdx.x & 31, row = 8 * (threadIdx.x / 32) + (lane & 7);
    rows = static_cast<const bf16 *>(tensor.data) +
           row_of(tensor, walk.span, (int64_t)chunk * STEP + row, walk.head) + walk.v_begin +
           8 * (lane >> 3);
  }

  /* Of chunk after chunk. */
  template <bool FORWARD>
  __device__ __forceinline__ void load(int chunk, int slot) {
    const fkda_rows &tensor = FORWARD ? x.problem.v : x.problem.d_out;
    char *to = ring + slot * STAGE;
    copy_bytes<FORWARD ? FKDA_BACKWARD_FORWARD_BYTES(K) : FKDA_BACKWARD_RECORD_BYTES(K), THREADS>(
        to, Workspace<K>(x).record(walk.first + chunk / 2, walk.head, chunk & 1));
    const int64_t t = (int64_t)chunk * STEP, left = walk.span.length - t;
    bf16 *tile = reinterpret_cast<bf16 *>(to + FKDA_BACKWARD_RECORD_BYTES(K));
    if (FORWARD ? x.aligned_v : x.aligned_d_out) { /* eight rows a warp, as load_tile() */
      static_assert(THREADS == 4 * STEP && PART == 64, "two pieces a thread");
      const int lane = threadIdx.x & 31, row = 8 * (threadIdx.x / 32) + (lane & 7);
      const bool valid = row < left;
      const bf16 *from = valid ? rows : static_cast<const bf16 *>(tensor.data);
      tile += tile_at<PART>(row, 8 * (lane >> 3));
      copy_piece(tile, from, valid);
      copy_piece(tile + 2 * SQUARE, valid ? from + 32 : from, valid);
      rows += (FORWARD ? STEP : -STEP) * tensor.stride_t;
    } else {
      load_tile<STEP, PART, THREADS>(tile, tensor,
                                     row_of(tensor, walk.span, t, walk.head) + walk.v_begin,
                                     (int)(left < STEP ? left : STEP), false);
    }
  }

  /* E and the next state from the operands of a chunk. PARALLEL: its K_END holds differences. */
  template <bool PARALLEL>
  __device__ __forceinline__ void step_forward(const char *f, int chunk) {
    const int warp = threadIdx.x / 32, V = (int)x.problem.V;
    const int64_t row = walk.first + chunk / 2;
    const Workspace<K> workspace(x);
    if (chunk % 2 == 0)
      S.keep(Workspace<K>::at(workspace.states, workspace.sizes.states, row, workspace.heads,
                              walk.head),
             V, walk.v_begin / 16 + warp);
    const auto tile = [&](int offset) { return reinterpret_cast<const bf16 *>(f + offset); };
    float R[4][4];
    S.template look_up<false>(R, tile(FKDA_BACKWARD_K_START(K)),
                              reinterpret_cast<const float *>(f + FKDA_BACKWARD_DECAY(K)));
    float w[4][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t v[4];
      load_square_transposed(v, tile(FKDA_BACKWARD_RECORD_BYTES(K)), h * (PART / 16) + warp);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 2 * h + (i >> 1), j = 2 * (i & 1);
        const float2 norm = of_tokens(f + FKDA_BACKWARD_NORM_K(K), n);
        const float2 beta = of_tokens(f + FKDA_BACKWARD_BETA(K), n);
        R[n][j] = fmaf(-norm.x, R[n][j], low_of(v[i]));
        R[n][j + 1] = fmaf(-norm.y, R[n][j + 1], high_of(v[i]));
        w[n][j] = beta.x * R[n][j];
        w[n][j + 1] = beta.y * R[n][j + 1];
      }
    }
    apply_Z<true>(R, w, tile(FKDA_BACKWARD_Z_HIGH(K)), tile(FKDA_BACKWARD_Z_LOW(K)));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 norm = of_tokens(f + FKDA_BACKWARD_NORM_K(K), n);
      const float2 beta = of_tokens(f + FKDA_BACKWARD_BETA(K), n);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        w[n][2 * h] = norm.x * beta.x * R[n][2 * h];
        w[n][2 * h + 1] = norm.y * beta.y * R[n][2 * h + 1];
      }
    }
    if (PARALLEL) { /* (29) */
      sum_tokens<false>(w);
      hand_on_rounding(R, tile(FKDA_BACKWARD_Z_HIGH(K)),
                       reinterpret_cast<const float *>(f + FKDA_BACKWARD_BETA(K)));
    }
    uint32_t u[2][4], u_low[2][4];
    split_operand(u, u_low, w);
    S.template add<false>(u, u, tile(FKDA_BACKWARD_K_END(K)));
    S.template add<false>(u_low, u_low, tile(FKDA_BACKWARD_K_END(K)));
    keep_tokens(reinterpret_cast<const float(&)[16]>(R),
                Workspace<K>::at(workspace.differences, workspace.sizes.differences, row,
                                 workspace.heads, walk.head),
                V, chunk & 1, walk.v_begin / 16 + warp);
  }

  /* dW, dV and the gradient of the state before a chunk. */
  template <bool PARALLEL>
  __device__ __forceinline__ void step_backward(const char *f, int chunk) {
    const fkda_problem &p = x.problem;
    const int warp = threadIdx.x / 32, V = (int)p.V;
    const int64_t row = walk.first + chunk / 2;
    const Workspace<K> workspace(x);
    if (chunk % 2)
      S.keep(Workspace<K>::at(workspace.d_states, workspace.sizes.d_states, row, workspace.heads,
                              walk.head),
             V, walk.v_begin / 16 + warp);
    const auto tile = [&](int offset) { return reinterpret_cast<const bf16 *>(f + offset); };
    float dU[4][4];
    S.template look_up<PARALLEL>(dU, tile(FKDA_BACKWARD_K_END(K)),
                                 reinterpret_cast<const float *>(f + FKDA_BACKWARD_DECAY(K)));
    if (PARALLEL) sum_tokens<true>(dU); /* of differences */
    uint32_t d_out[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      load_square_transposed(d_out[h], tile(FKDA_BACKWARD_RECORD_BYTES(K)), h * (PART / 16) + warp);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 norm = of_tokens(f + FKDA_BACKWARD_NORM_K(K), n);
      dU[n][0] *= norm.x, dU[n][1] *= norm.y, dU[n][2] *= norm.x, dU[n][3] *= norm.y;
    }
#pragma unroll
    for (int square = 0; square < 4; ++square) {
      const int i = square >> 1, j = square & 1;
      if (j > i) continue;
      uint32_t r[4];
      load_square_transposed(r, tile(FKDA_BACKWARD_P(K)), square);
      mma_columns(dU[2 * j], dU[2 * j + 1], d_out[i], r);
    }
    float w[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 beta = of_tokens(f + FKDA_BACKWARD_BETA(K), n);
      w[n][0] = beta.x * dU[n][0], w[n][1] = beta.y * dU[n][1];
      w[n][2] = beta.x * dU[n][2], w[n][3] = beta.y * dU[n][3];
    }
    apply_Z<false>(dU, w, tile(FKDA_BACKWARD_Z_HIGH(K)), tile(FKDA_BACKWARD_Z_LOW(K)));
    uint32_t u[2][4], u_low[2][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 norm = of_tokens(f + FKDA_BACKWARD_NORM_K(K), n);
      const float2 beta = of_tokens(f + FKDA_BACKWARD_BETA(K), n);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        w[n][2 * h] = beta.x * dU[n][2 * h], w[n][2 * h + 1] = beta.y * dU[n][2 * h + 1];
        const int i = 2 * (n & 1) + h;
        split(-norm.x * w[n][2 * h], -norm.y * w[n][2 * h + 1], u[n >> 1][i], u_low[n >> 1][i]);
      }
    }
    S.template add<false>(d_out, d_out, tile(FKDA_BACKWARD_Q_START(K)));
    S.template add<PARALLEL>(u, u_low, tile(FKDA_BACKWARD_K_START(K))); /* dV telescopes too */
    keep_tokens(reinterpret_cast<const float(&)[16]>(dU),
                Workspace<K>::at(workspace.d_updates, workspace.sizes.d_updates, row,
                                 workspace.heads, walk.head),
                V, chunk & 1, walk.v_begin / 16 + warp);
    if (p.d_v.data) {
      const int64_t t = (int64_t)chunk * STEP, left = walk.span.length - t;
      if (left > 0)
        store_tokens(w, p.d_v, row_of(p.d_v, walk.span, t, walk.head) + walk.v_begin + 16 * warp,
                     (int)(left < STEP ? left : STEP), x.aligned_d_v);
    }
  }

  template <bool FORWARD>
  __device__ __forceinline__ void run() {
    const fkda_problem &p = x.problem;
    const int warp = threadIdx.x / 32, chunks = walk.chunks, stages = x.stages;
    const auto place = [&](int i) { return FORWARD ? i : chunks - 1 - i; };
    start_loads<FORWARD>(place(0));
#pragma unroll 1
    for (int i = 0; i < stages - 1; ++i) {
      if (i < chunks) load<FORWARD>(place(i), i);
      cute::cp_async_fence();
    }
    S.init(FORWARD ? p.initial : p.d_final, p.layout, walk.n, walk.head, walk.v_begin + 16 * warp);
    int slot = 0;
#pragma unroll 1
    for (int i = 0; i < chunks; ++i) {
      if (stages == 2)
        cute::cp_async_wait<0>();
      else if (stages == 3)
        cute::cp_async_wait<1>();
      else if (stages == 4)
        cute::cp_async_wait<2>();
      else
        cute::cp_async_wait<3>();
      __syncthreads(); /* the chunk has arrived, and everyone has left the one before */
      const int next = i + stages - 1;
      if (next < chunks) load<FORWARD>(place(next), slot ? slot - 1 : stages - 1);
      cute::cp_async_fence();
      const char *f = ring + slot * STAGE;
      const bool parallel = *reinterpret_cast<const uint32_t *>(f + FKDA_BACKWARD_PARALLEL(K));
      if (FORWARD) {
        if (parallel)
          step_forward<true>(f, place(i));
        else
          step_forward<false>(f, place(i));
      } else {
        if (parallel)
          step_backward<true>(f, place(i));
        else
          step_backward<false>(f, place(i));
      }
      slot = slot + 1 == stages ? 0 : slot + 1;
    }
    if (!FORWARD && p.d_initial.data)
      StateRows<K>::store(S.rows(), p.d_initial, p.layout,
                          walk.n * p.d_initial.stride_slot + walk.head * p.d_initial.stride_head,
                          walk.v_begin + 16 * warp);
  }
};

template <int K>
__device__ __forceinline__ void run_walk(const Backward &x) {
  extern __shared__ __align__(128) char memory[];
  const fkda_problem &p = x.problem;
  uint32_t id = blockIdx.x;
  const uint32_t walks = (uint32_t)(p.N * p.HV) * x.value_split;
  const bool forward = id >= walks;
  if (forward) id -= walks;
  Walk walk;
  walk.v_begin = (int)(id % x.value_split) * PART;
  id /= x.value_split;
  walk.head = (int)(id % heads_of(p));
  walk.n = id / heads_of(p);
  if (x.redo && !is_left(x, id)) return;
  walk.span = clamped_span(p, walk.n);
  walk.first = first_block(p, walk.span, walk.n);
  walk.chunks = (int)((walk.span.length + BLOCK_TOKENS - 1) / BLOCK_TOKENS) * (BLOCK_TOKENS / STEP);
  Walker<K> walker(x, walk, memory);
  if (forward)
    walker.template run<true>();
  else
    walker.template run<false>();
}

}  // namespace
}  // namespace fkda

/* Blocks a processor: three of 71 KB fit Hopper's shared memory, and there the registers suffice without a spill. */
#if __CUDA_ARCH__ == 900
#define FKDA_BLOCKS 3
#else
#define FKDA_BLOCKS 2
#endif
#define FKDA_ENTRY(K)                                                                              \
  extern "C" __global__ void __launch_bounds__(FKDA_BACKWARD_WALK_THREADS, FKDA_BLOCKS)            \
      fkda_portable_backward_walk_k##K(const __grid_constant__ fkda_portable_backward_params x) {  \
    fkda::run_walk<K>(x);                                                                          \
  }
FKDA_BACKWARD_BY_K(FKDA_ENTRY)
