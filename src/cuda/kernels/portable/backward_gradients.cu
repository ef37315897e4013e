/* Backward, third launch: all gradients of a block of 64 tokens and value head but dV, from the state before it, the
 * gradient of the state behind it, E and dW of its tokens.
 *
 * A warp has 16 channels of 32 tokens, channels as the M dimension of every product, so that running sums,
 * gates and (27), (28) stay inside a warp and its pair, which has the other half of the tokens. The X of (25) start
 * three accumulators: of q and k as the later ones of two tokens (from the block's start), of k as the earlier one
 * (to its end).
 *
 * Pairs of (27). Tokens 32.. against ..31, 16..31 against ..15, 48.. against 32..47, then 16 with themselves: a pair
 * belongs to one such level, which has an anchor a between the two, and e^{G_i - G_j} = e^{G_i - a} e^{a - G_j}.
 * The 16 with themselves have their anchor in the middle, or where gates leave its range, levels of their own
 * down to neighbours.
 *
 * (28). With L_i, E_j the sums over pairs in which i is the later, j the earlier token,
 *   dg_t = sum_{i>=t} (Q~X^Q + K~X^K + L - E - K-X^K-)_i + sum_all K-X^K- + e^{G_C} sum_v S dS
 * Pairs on one side of t occur twice with opposite signs. They are made of the same rounded factors both times, so they
 * cancel to f32's rounding, strong gates or weak. */
#include "cuda/kernels/portable/backward.cuh"

namespace fkda {
namespace {

__device__ __forceinline__ uint32_t processors() {
  uint32_t n;
  asm("mov.u32 %0, %%nsmid;" : "=r"(n));
  return n;
}
/* Into the second-level cache: the line of an address; or contiguous bytes, by a warp or from Hopper on by one lane of it. */
__device__ __forceinline__ void prefetch(const char *at) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(at));
}
__device__ __forceinline__ void prefetch(const char *from, int bytes, int lane) {
#if __CUDA_ARCH__ >= 900
  if (lane == 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(from), "r"(bytes));
#else
  for (int i = 128 * lane; i < bytes; i += 128 * 32) prefetch(from + i);
#endif
}

/* The gates come again while d_q and d_k are stored; from sm_100 on the compiler would spill for it. */
#if __CUDA_ARCH__ >= 1000
constexpr bool GATES_EARLY = false;
#else
constexpr bool GATES_EARLY = true;
#endif

constexpr int TILES = STEP / 8, SQUARES = STEP / 16; /* of a warp's tokens */

/* How many tasks a block has in shared memory. With two, the next one's rows arrive while one is worked on. */
#if __CUDA_ARCH__ < 900
constexpr bool FOR_ALL = true;
#else
constexpr bool FOR_ALL = false;
#endif
#ifdef __CUDA_ARCH__
constexpr int STAGES = FKDA_BACKWARD_GRADIENTS_STAGES(__CUDA_ARCH__ / 100);
#else
constexpr int STAGES = 1;
#endif

__device__ __forceinline__ void wait_for_copies() {
  cute::cp_async_fence();
  cute::cp_async_wait<0>();
  __syncthreads();
}

/* The gradients of a block of tokens and value head. */
struct GradientsTask {
  Block block; /* no tokens: nobody's */
  uint32_t id; /* row * HV + head: its place in each part of the workspace */
  int head, qk_head;
  int64_t q, k, g, d_out; /* first elements */
};
__device__ __forceinline__ uint32_t tasks_of(const Backward &x) {
  return (uint32_t)x.rows * heads_of(x.problem);
}
__device__ __forceinline__ char *place_of(char *part, int64_t size, uint32_t id) {
  return part + id * size;
}
__device__ __forceinline__ GradientsTask task_of(const Backward &x, uint32_t id) {
  GradientsTask task = {};
  task.id = id;
  task.head = (int)(id % heads_of(x.problem));
  const fkda_problem &p = x.problem;
  const Block &block = task.block;
  if (id >= tasks_of(x) || !find_block(p, id / heads_of(p), task.block)) {
    task.block.tokens = 0;
    return task;
  }
  task.qk_head = qk_head_of(p, task.head);
  task.q = row_of(p.q, block.span, block.t, task.qk_head);
  task.k = row_of(p.k, block.span, block.t, task.qk_head);
  task.g = row_of(p.g, block.span, block.t, task.head);
  task.d_out = row_of(p.d_out, block.span, block.t, task.head);
  return task;
}

/* Shared memory of a task. */
template <int K, int V>
struct GradientsShared {
  static constexpr int COLUMNS = K / 16; /* warps side by side */
  bf16 q[BLOCK_TOKENS * K], k[BLOCK_TOKENS * K];
  union {
    struct {
      bf16 d_out[BLOCK_TOKENS * V], E[BLOCK_TOKENS * V], dW[BLOCK_TOKENS * V];
    };
    struct
    { /* operands over the middle of the block: of the first half's keys, of the second half's q and k */
      uint4 columns[COLUMNS][SQUARES][32], rows[COLUMNS][2][SQUARES][32];
      float always[2][K]; /* what all tokens get in (28), halves to be added */
      float behind[K];    /* what the first half gets from the second */
      float along[2][BLOCK_TOKENS]; /* sum q dq / |q|^2, sum k dk / |k|^2 */
    };
  };
  bf16 g[STAGES > 1 ? BLOCK_TOKENS * K : 8]; /* raw, if they come in pieces */
  /* Weights of raw pairs: scale dP_ij / |q_i| |k_j| and dM_ij / |k_i| |k_j|, below the diagonal; squares (i, j) of
   * the lower triangle by rows. */
  union {
    struct {
      bf16 P[10 * SQUARE], M[10 * SQUARE];
    };
    struct {
      float sum_bias[2][K], sum_A[2 * COLUMNS];
    };
  };
  union {
    float ends[TILES][16]; /* G after each eight tokens, from the warp's first token */
    float parts[2][STEP];  /* sum q dq, sum k dk over the warp's channels */
  } by_warp[2][COLUMNS];
  float whole[2][K];  /* G of each half */
  /* Numbers of each token, as they lie in the records of the factors. */
  struct alignas(16) Half {
    float beta[STEP], norm_k[STEP], norm_q[STEP];
    int parallel; /* are the keys nearly parallel to their neighbours? */
  } of[2];
  float P_diagonal[BLOCK_TOKENS]; /* weight of q_i k_i */
  float d_beta[BLOCK_TOKENS];
  GradientsTask task, coming; /* STAGES 2: `coming` will be here when `task` is done */
  float exp_A, bias[K];
  int levels;    /* not 0: one anchor for 16 tokens does not do */
  uint32_t zero; /* a number that the compiler does not know */
};
/* Rows of a gradient on their way out, over everything from q on but the gates. */
template <int K>
constexpr int OUT_PITCH = K + 4;

__device__ __forceinline__ constexpr int lower_square(int i, int j) { return i * (i + 1) / 2 + j; }

/* Every term of a token's dg has the factor e^g. Below this it is less than the rounding of f32 sums, of which the slope
 * of a softplus would make much: 0 is closer. The clamp of g, whose gradient is 0, lies lower still. */
constexpr float NEGLIGIBLE = -16;
static_assert(FKDA_GATE_CLAMP < -16, "the clamp");

/* (20): dg becomes the gradient by the raw gate; returns what A_log gets. */
template <int MODE>
__device__ __forceinline__ float gate_back(const fkda_problem &p, float raw, float bias,
                                           float exp_A, float &dg) {
  const float y = raw + bias;
  if (MODE == FKDA_GATE_BOUNDED) {
    const float z = exp_A * y, e = exp2_approx(-LOG2E * fabsf(z)), r = reciprocal(1 + e);
    dg *= (float)p.lower_bound * exp_A * (e * (r * r));
    return dg * y;
  }
  if (MODE == FKDA_GATE_SOFTPLUS) {
    const float g = -exp_A * softplus(y);
    const float inside = g < NEGLIGIBLE ? 0 : dg;
    dg = -inside * exp_A * sigmoid(y);
    return inside * g;
  }
  if (raw < NEGLIGIBLE || raw > 0) dg = 0;
  return 0;
}

template <int K, int V>
struct Gradients {
  /* Whether a block does more than one task. The image for sm_80 does whatever the number of blocks is: where it is the only one,
   * the host may think of Hopper's. */
  static constexpr bool LOOP = STAGES > 1 || FOR_ALL;
  static constexpr int COLUMNS = K / 16, WARPS = 2 * COLUMNS, THREADS = 32 * WARPS;
  using Shared = GradientsShared<K, V>;
  const Backward &x;
  const fkda_problem &p;
  Shared &s;
  const Block &block;
  int half, warp, lane; /* the warp's tokens and channels */
  /* Accumulators, as all arrays [TILES][4]: tile n, i: token 32 half + 8 n + 2 (lane % 4) + i % 2, channel
   * 16 warp + lane / 4 + 8 (i / 2). */
  float q[TILES][4], k[TILES][4]; /* dq, dk */
  float D[TILES][4];              /* what is summed over i >= t in (28) */
  float G[TILES][4];
  float overlap[2]; /* sum_v S dS, in parts; of a channel in one lane of four */

  __device__ __forceinline__ Gradients(const Backward &x, Shared &s)
      : x(x), p(x.problem), s(s), block(s.task.block) {
    refresh(0);
  }
  /* At the beginning of each part, with another `n`: or the compiler holds its addresses in registers from the start. */
  __device__ __forceinline__ void refresh(int n) {
    const uint32_t thread = thread_again(n);
    half = thread / 32 / COLUMNS, warp = thread / 32 % COLUMNS, lane = thread % 32;
  }
  /* From a parameter, it is there sooner than from shared memory. */
  __device__ __forceinline__ uint32_t thread_again(int n) const {
    return threadIdx.x + (STAGES > 1 ? x.stages == -100 - n : opaque_zero());
  }
  __device__ __forceinline__ void load_square(uint32_t (&r)[4], const bf16 *tile,
                                              int square) const {
    load_matrices(r, tile + square * SQUARE + lane * 8);
  }
  __device__ __forceinline__ void load_square_transposed(uint32_t (&r)[4], const bf16 *tile,
                                                         int square) const {
    load_transposed(r, tile + square * SQUARE + lane * 8);
  }

  /* True; but the compiler cannot know, and does not begin with what follows before. It otherwise computes all
   * exponentials first, for which there are no registers. `n`: another one at each place, or it would know the second time. In
   * a loop the kernel ends where it is false: what is not computed else would remain from the round before. */
  __device__ __forceinline__ bool in_turn(int n) const {
    if (!LOOP) return opaque_zero() == 0;
    if (STAGES > 1 ? x.stages == -1 - n : opaque_zero() != 0) {
      asm volatile("exit;");
      __builtin_unreachable();
    }
    return true;
  }
  __device__ __forceinline__ uint32_t opaque_zero() const {
    return *const_cast<const volatile uint32_t *>(&s.zero);
  }

  __device__ __forceinline__ int head() const { return s.task.head; }

  /* Two of the numbers of the half's tokens. */
  __device__ __forceinline__ float2 of_tokens(const float *vector, int n) const {
    return *reinterpret_cast<const float2 *>(vector + 8 * n + 2 * (lane & 3));
  }
  __device__ __forceinline__ int channel(int h) const { return 16 * warp + (lane >> 2) + 8 * h; }

  /* The raw q or k of 16 tokens, as A operand: pair 2 n + h is of tile n and channel h. */
  __device__ __forceinline__ void load_raw(uint32_t (&r)[4], const bf16 *tile, int square) const {
    load_square_transposed(r, tile, (SQUARES * half + square) * (K / 16) + warp);
  }

  /* A part of a task's rows, asynchronously where rows come in pieces. All threads. */
  enum { OF_Q = 1, OF_K = 2, OF_D_OUT = 4, OF_G = 8, OF_WALKS = 16, OF_ALL = 31 };
  template <int PART>
  __device__ __forceinline__ static void load(const Backward &x, Shared &to,
                                              const GradientsTask &task) {
    const fkda_problem &p = x.problem;
    const int tokens = task.block.tokens;
    const uint32_t thread = fresh(threadIdx.x);
    if (PART & OF_Q)
      load_tile<BLOCK_TOKENS, K, THREADS>(to.q, p.q, task.q, tokens, x.aligned_q, thread);
    if (PART & OF_K)
      load_tile<BLOCK_TOKENS, K, THREADS>(to.k, p.k, task.k, tokens, x.aligned_k, thread);
    if (PART & OF_D_OUT)
      load_tile<BLOCK_TOKENS, V, THREADS>(to.d_out, p.d_out, task.d_out, tokens, x.aligned_d_out,
                                          thread);
    if (PART & OF_G && STAGES > 1 && x.aligned_g)
      load_tile<BLOCK_TOKENS, K, THREADS>(to.g, p.g, task.g, tokens, true, thread);
    if (!(PART & OF_WALKS)) return;
    const Workspace<K> w(x);
    copy_bytes<BLOCK_TOKENS * V * 2, THREADS>(
        reinterpret_cast<char *>(to.E),
        place_of(w.differences, w.sizes.differences, task.id), thread);
    copy_bytes<BLOCK_TOKENS * V * 2, THREADS>(
        reinterpret_cast<char *>(to.dW),
        place_of(w.d_updates, w.sizes.d_updates, task.id), thread);
    using Half = typename Shared::Half;
    static_assert(FKDA_BACKWARD_NORM_K(K) == FKDA_BACKWARD_BETA(K) + offsetof(Half, norm_k) &&
                      FKDA_BACKWARD_NORM_Q(K) == FKDA_BACKWARD_BETA(K) + offsetof(Half, norm_q) &&
                      FKDA_BACKWARD_PARALLEL(K) == FKDA_BACKWARD_BETA(K) + offsetof(Half, parallel) &&
                      FKDA_BACKWARD_FORWARD_BYTES(K) == FKDA_BACKWARD_BETA(K) + sizeof(Half),
                  "a record's end");
    if (thread < 64 && thread % 32 < sizeof(Half) / 16)
      copy_piece(reinterpret_cast<char *>(&to.of[thread / 32]) + thread % 32 * 16,
                 place_of(w.factors, w.sizes.factors, task.id) +
                     thread / 32 * FKDA_BACKWARD_RECORD(K) + FKDA_BACKWARD_BETA(K) +
                     thread % 32 * 16,
                 true);
  }

  /* Into the second-level cache, what the task will load that no stage has room for; ordered by a warp each. */
  __device__ __forceinline__ static void prefetch_task(const Backward &x,
                                                       const GradientsTask &task) {
    constexpr int PARTS = 8;
    const fkda_problem &p = x.problem;
    const uint32_t thread = fresh(threadIdx.x); const int part = thread / 32, lane = thread % 32;
    const Block &block = task.block;
    if (part >= PARTS || block.tokens <= 0) return;
    if (part < 4) {
      if (STAGES > 1 && part >= 2) return;
      const Workspace<K> w(x);
      const fkda_portable_backward_sizes &sizes = w.sizes;
      char *const base = part == 0   ? w.states
                         : part == 1 ? w.d_states
                         : part == 2 ? w.differences
                                     : w.d_updates;
      const int64_t size = part < 2 ? sizes.states : sizes.differences;
      prefetch(place_of(base, size, task.id), (int)size, lane);
    } else {
      if (STAGES > 1 && (part != 6 || x.aligned_g)) return;
      const fkda_rows &rows = part == 4 ? p.q : part == 5 ? p.k : part == 6 ? p.g : p.d_out;
      const int size = rows.dtype == FKDA_F32 ? 4 : 2, bytes = (part == 7 ? V : K) * size;
      if (!rows.data) return;
      const int64_t first = part == 4 ? task.q : part == 5 ? task.k : part == 6 ? task.g : task.d_out;
      const char *from = static_cast<const char *>(rows.data) + first * size;
      for (int i = lane; i < block.tokens; i += 32)
        for (int line = 0; line < bytes; line += 128)
          prefetch(from + i * rows.stride_t * size + line);
    }
  }

  /* Weights w of 16 x 16 pairs as bf16, and what a row's column loses by it handed on to the next: sums over columns
   * then lose what one of them does. `last` are the columns that a lane's two rows end with. */
  __device__ __forceinline__ void hand_on_rounding(float (&w)[2][4], const int (&last)[2]) const {
    float lost[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll 1
      for (int l = 0; l < 4; ++l)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float rest = lost[h];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float &y = w[n][2 * h + e];
            const float x = y + rest, rounded = __bfloat162float(__float2bfloat16_rn(x));
            if (8 * n + 2 * l + e > last[h]) continue;
            if ((lane & 3) == l) y = rounded;
            rest = x - rounded;
          }
          lost[h] = __shfl_sync(0xffffffffu, rest, (lane & 28) | l);
        }
  }

  /* (24), (23)'s d_beta. P and M of a square together are fewer loads and wait less for themselves, where there are registers. */
  static constexpr int TOGETHER = STAGES > 1 ? 2 : 1;
  __device__ __forceinline__ void weigh_pairs() {
    refresh(1);
    const int turned = (lane & 7) | (lane & 8) << 1 | (lane & 16) >> 1; /* A operand by rows */
#pragma unroll 1
    for (int job = threadIdx.x / 32; job < 20 / TOGETHER; job += WARPS) {
      bool of_q = job < 10;
      const int square = of_q ? job : job - 10;
      const int i = square >= 6 ? 3 : square >= 3 ? 2 : square >= 1 ? 1 : 0;
      const int j = square - lower_square(i, 0);
      float acc[TOGETHER][2][4];
#pragma unroll
      for (int n = 0; n < TOGETHER; ++n) clear(acc[n]);
#pragma unroll
      for (int v = 0; v < V / 16; ++v) {
        uint32_t a[4], b[4];
        load_square(b, s.E, j * (V / 16) + v);
#pragma unroll
        for (int n = 0; n < TOGETHER; ++n) {
          const bf16 *rows = n ? s.dW : of_q ? s.d_out : s.dW;
          load_matrices(a, rows + (i * (V / 16) + v) * SQUARE + turned * 8);
          mma_rows(acc[n][0], acc[n][1], a, b);
        }
      }
#pragma unroll 1
      for (int n = 1;; ++n) { /* one piece of code */
        keep_weights(of_q, square, i, j, acc[0]);
        if (n == TOGETHER) break;
        of_q = false;
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[0][e / 4][e % 4] = acc[TOGETHER - 1][e / 4][e % 4];
      }
    }
  }
  /* Of the square (i, j): by norms and betas, without the diagonal, whose elements go elsewhere. */
  __device__ __forceinline__ void keep_weights(bool of_q, int square, int i, int j,
                                               float (&acc)[2][4]) {
    const typename Shared::Half &of_rows = s.of[i / 2], &of_columns = s.of[j / 2];
    const int first_row = i % 2 * 16 + (lane >> 2);
    float of_row[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      of_row[h] = of_q ? of_rows.norm_q[first_row + 8 * h]
                       : -(of_rows.norm_k[first_row + 8 * h] * of_rows.beta[first_row + 8 * h]);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = j % 2 * 16 + 8 * n + 2 * (lane & 3);
      const float2 norm = *reinterpret_cast<const float2 *>(&of_columns.norm_k[column]);
      const float2 beta = *reinterpret_cast<const float2 *>(&of_columns.beta[column]);
      const float2 of_column = make_float2(norm.x * beta.x, norm.y * beta.y);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float &w0 = acc[n][2 * h], &w1 = acc[n][2 * h + 1];
        const float y0 = w0, y1 = w1;
        w0 *= of_row[h] * of_column.x, w1 *= of_row[h] * of_column.y;
        if (i != j) continue;
        const int row = 8 * h + (lane >> 2), ahead = row - (8 * n + 2 * (lane & 3));
        float *diagonal = (of_q ? s.P_diagonal : s.d_beta) + 16 * i + row;
        if (ahead == 0) *diagonal = of_q ? w0 : y0;
        if (ahead == 1) *diagonal = of_q ? w1 : y1;
        if (ahead <= 0) w0 = 0;
        if (ahead <= 1) w1 = 0;
      }
    }
    if (of_columns.parallel) {
      const int row = 16 * (i - j) + (lane >> 2), last[2] = {row - 1, row + 7};
      hand_on_rounding(acc, last);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<uint32_t *>((of_q ? s.P : s.M) + square * SQUARE + (2 * h + n) * MATRIX +
                                      lane * 2) = pack(acc[n][2 * h], acc[n][2 * h + 1]);
  }

  /* A and B operands of 16 value rows of S and dS lie as they are needed, 16 bytes a lane; AHEAD of them on their way. */
  static constexpr int AHEAD = STAGES > 1 ? 4 : 2;
  __device__ __forceinline__ const uint4 *states_of(char *part, int64_t size) const {
    return reinterpret_cast<const uint4 *>(place_of(part, size, s.task.id)) +
           warp * (V / 16) * 32 + lane;
  }
  __device__ __forceinline__ void load_states(uint4 (&S)[AHEAD], uint4 (&dS)[AHEAD]) {
    refresh(2);
    const Workspace<K> w(x);
    const uint4 *from = states_of(w.states, w.sizes.states);
    const uint4 *d_from = states_of(w.d_states, w.sizes.d_states);
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) S[j] = __ldg(from + j * 32), dS[j] = __ldg(d_from + j * 32);
  }

  /* (25), and the last term of (28). */
  __device__ __forceinline__ void meet_states(float (&late)[TILES][4], float (&early)[TILES][4],
                                              uint4 (&S)[AHEAD], uint4 (&dS)[AHEAD]) {
    refresh(3);
    const Workspace<K> w(x);
    const uint4 *from = states_of(w.states, w.sizes.states) + AHEAD * 32;
    const uint4 *d_from = states_of(w.d_states, w.sizes.d_states) + AHEAD * 32;
    clear(q);
    clear(late);
    clear(early);
    float S_dS[4] = {0, 0, 0, 0}; /* channels 0..7 and 8..15 with one another; wanted is the diagonal */
#pragma unroll
    for (int v0 = 0; v0 < V / 16; v0 += AHEAD)
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) {
        const int v = v0 + j;
        const uint32_t a[4] = {S[j].x, S[j].y, S[j].z, S[j].w};
        const uint32_t d[4] = {dS[j].x, dS[j].y, dS[j].z, dS[j].w};
        if (v + AHEAD < V / 16) {
          S[j] = __ldg(from), dS[j] = __ldg(d_from);
          from += 32, d_from += 32;
        }
        if (v / (V / 32) == half) {
          const uint32_t a0[4] = {a[0], 0, 0, a[1]}, a1[4] = {a[2], 0, 0, a[3]};
          mma(S_dS, a0, d[0], d[1]);
          mma(S_dS, a1, d[2], d[3]);
        }
#pragma unroll
        for (int i = 0; i < SQUARES; ++i) {
          const int square = (SQUARES * half + i) * (V / 16) + v;
          uint32_t r[4];
          load_square(r, s.d_out, square);
          mma_rows(q[2 * i], q[2 * i + 1], a, r);
          load_square(r, s.dW, square);
          mma_rows(late[2 * i], late[2 * i + 1], a, r);
          load_square(r, s.E, square);
          mma_rows(early[2 * i], early[2 * i + 1], d, r);
        }
      }
    const bool mine = lane >> 3 == (lane & 3), odd = lane & 4;
    overlap[0] = mine ? (odd ? S_dS[1] : S_dS[0]) : 0;
    overlap[1] = mine ? (odd ? S_dS[3] : S_dS[2]) : 0;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const typename Shared::Half &of = s.of[half];
      const float2 norm_q = of_tokens(of.norm_q, n), norm_k = of_tokens(of.norm_k, n),
                   beta = of_tokens(of.beta, n);
      const float by[2] = {norm_k.x * beta.x, norm_k.y * beta.y}, by_q[2] = {norm_q.x, norm_q.y};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        q[n][i] *= by_q[i & 1];
        late[n][i] *= -by[i & 1];
        early[n][i] *= by[i & 1];
      }
    }
  }

  /* The raw gates, 0 beyond the sequence. */
  template <class Element>
  __device__ __forceinline__ void load_gates_as(float (&g)[TILES][4]) const {
    const int64_t stride = p.g.stride_t;
    const int token = STEP * half + 2 * (fresh_lane() & 3);
    const Element *from = static_cast<const Element *>(p.g.data) +
                          row_of(p.g, block.span, block.t + token, head()) + channel(0);
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          Element x = Element(0.0f);
          if (8 * n + token + e < block.tokens) x = __ldg(from + e * stride + 8 * h);
          g[n][2 * h + e] = (float)x;
        }
      from += 8 * stride;
    }
  }
  __device__ __forceinline__ void load_gates(float (&g)[TILES][4]) const {
    if (STAGES > 1 && x.aligned_g) {
#pragma unroll
      for (int i = 0; i < SQUARES; ++i) {
        uint32_t r[4];
        load_raw(r, s.g, i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float(&y)[4] = g[2 * i + (j >> 1)];
          y[2 * (j & 1)] = low_of(r[j]), y[2 * (j & 1) + 1] = high_of(r[j]);
        }
      }
    } else if (p.g.dtype == FKDA_F32)
      load_gates_as<float>(g);
    else
      load_gates_as<bf16>(g);
  }
  __device__ __forceinline__ float bias_of(int h) const { return s.bias[channel(h)]; }
  /* The head's parameters of the gate: on their way, a channel a thread, then to shared memory. */
  static constexpr int KEEPERS = THREADS - K; /* the first: of warps that have little to do in weigh_pairs() */
  struct Parameters {
    float bias, A;
  };
  __device__ __forceinline__ static Parameters load_parameters(const fkda_problem &p, int head) {
    Parameters y = {0, 0};
    const int channel = fresh(threadIdx.x) - KEEPERS;
    if (0 <= channel && channel < K && p.dt_bias.data)
      y.bias = load_float(p.dt_bias.data, p.dt_bias.dtype, (int64_t)head * K + channel);
    if (channel == 0 && p.A_log.data) y.A = load_float(p.A_log.data, p.A_log.dtype, head);
    return y;
  }
  __device__ __forceinline__ static void keep_parameters(Shared &to, const Parameters &y) {
    const int channel = fresh(threadIdx.x) - KEEPERS;
    if (0 <= channel && channel < K) to.bias[channel] = y.bias;
    if (channel == 0) to.exp_A = expf(y.A); /* 1 without A_log */
  }

  /* (2) of the raw gates in G, and its running sums. True if a half of 16 tokens leaves the anchor's range. */
  __device__ __forceinline__ bool sum_gates() {
    if (p.gate == FKDA_GATE_BOUNDED)
      return is_full() ? sum_gates_as<FKDA_GATE_BOUNDED, true>()
                       : sum_gates_as<FKDA_GATE_BOUNDED, false>();
    if (p.gate == FKDA_GATE_SOFTPLUS) return sum_gates_as<FKDA_GATE_SOFTPLUS, false>();
    return sum_gates_as<FKDA_GATE_DIRECT, false>();
  }
  /* FULL: all of the block's tokens are the sequence's, so that nothing need be left out. */
  __device__ __forceinline__ bool is_full() const { return block.tokens == BLOCK_TOKENS; }
  template <int MODE, bool FULL>
  __device__ __forceinline__ bool sum_gates_as() {
    const float exp_A = s.exp_A;
    bool over = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Gate gate(p, MODE, exp_A, bias_of(h));
      float carry = 0;
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        float y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          y[e] = gate.template decay<MODE>(G[n][2 * h + e]);
          if (!FULL && STEP * half + 8 * n + 2 * (lane & 3) + e >= block.tokens) y[e] = 0;
        }
        float sum = y[0] + y[1];
#pragma unroll
        for (int width = 1; width < 4; width *= 2) {
          const float before = __shfl_up_sync(0xffffffffu, sum, width);
          if ((lane & 3) >= width) sum += before;
        }
        float before = __shfl_up_sync(0xffffffffu, sum, 1);
        if ((lane & 3) == 0) before = 0;
        G[n][2 * h] = carry + (before + y[0]);
        G[n][2 * h + 1] = carry + sum;
        const float whole = __shfl_sync(0xffffffffu, sum, lane | 3);
        over |= !(-whole <= ANCHOR_RANGE);
        carry += whole;
        if ((lane & 3) == 0) s.by_warp[half][warp].ends[n][8 * h + (lane >> 2)] = carry;
      }
      if ((lane & 3) == 0) s.whole[half][channel(h)] = carry;
    }
    return over;
  }

  /* The terms of (28) with states; operands for the pairs over the middle of the block. */
  template <int HALF>
  __device__ __forceinline__ void start_sums(float (&late)[TILES][4], float (&early)[TILES][4]) {
    refresh(20 + HALF);
    float a[2], other[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) other[h] = exp2_approx(s.whole[1 - half][channel(h)]);
    anchor(a, TILES - 1);
    float total[2] = {overlap[0] * exp2_approx(a[0]) * other[0],
                      overlap[1] * exp2_approx(a[1]) * other[1]};
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      uint32_t raw[4];
      float e[4];
      const auto put = [&](uint4 *to, const float(&e)[4]) {
        const uint32_t *x = &raw[n % 2 * 2];
        reinterpret_cast<uint2 *>(&to[n / 2 * 32 + lane])[n % 2] =
            make_uint2(pack(low_of(x[0]) * e[0], high_of(x[0]) * e[1]),
                       pack(low_of(x[1]) * e[2], high_of(x[1]) * e[3]));
      };
      const auto element = [&](int i) {
        const uint32_t x = raw[n % 2 * 2 + (i >> 1)];
        return i & 1 ? high_of(x) : low_of(x);
      };
      if (!in_turn(2 * n)) break;
      load_raw(raw, s.k, n / 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) e[i] = exp2_approx(a[i >> 1] - G[n][i]);
      if (!HALF) put(s.columns[warp][0], e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        k[n][i] = early[n][i] * (HALF ? e[i] : e[i] * other[i >> 1]);
        D[n][i] = -element(i) * k[n][i];
        total[i >> 1] -= D[n][i];
      }
      if (!in_turn(2 * n + 1)) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) e[i] = exp2_approx(G[n][i]);
      if (HALF) put(s.rows[warp][1][0], e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float y = late[n][i] * (HALF ? e[i] * other[i >> 1] : e[i]);
        k[n][i] += y;
        D[n][i] = fmaf(element(i), y, D[n][i]);
      }
      load_raw(raw, s.q, n / 2);
      if (HALF) put(s.rows[warp][0][0], e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        q[n][i] *= HALF ? e[i] * other[i >> 1] : e[i];
        D[n][i] = fmaf(element(i), q[n][i], D[n][i]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] += __shfl_xor_sync(0xffffffffu, total[h], 1);
      total[h] += __shfl_xor_sync(0xffffffffu, total[h], 2);
      if ((lane & 3) == 0) s.always[half][channel(h)] = total[h];
    }
  }

  /* e^{G - a} (SIGN 1) or e^{a - G} (SIGN -1) of 16 tokens. */
  template <int SIGN>
  __device__ __forceinline__ void decays(float (&e)[2][4], int square, const float (&a)[2]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float d = G[2 * square + n][i] - a[i >> 1];
        e[n][i] = exp2_approx(SIGN > 0 ? d : -d);
      }
  }
  /* raw e as operand */
  __device__ __forceinline__ static void decayed(uint32_t (&f)[4], const uint32_t (&raw)[4],
                                                 const float (&e)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&x)[4] = e[i >> 1];
      const int h = i & 1;
      f[i] = pack(low_of(raw[i]) * x[2 * h], high_of(raw[i]) * x[2 * h + 1]);
    }
  }
  __device__ __forceinline__ void decayed(uint32_t (&f)[4], const bf16 *raw, int square,
                                          const float (&e)[2][4]) const {
    uint32_t r[4];
    load_raw(r, raw, square);
    decayed(f, r, e);
  }
  /* raw e less the operand */
  __device__ __forceinline__ void rest_of(uint32_t (&f)[4], const bf16 *raw, int square,
                                          const float (&e)[2][4]) const {
    uint32_t r[4], high;
    load_raw(r, raw, square);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&x)[4] = e[i >> 1];
      const int h = i & 1;
      split(low_of(r[i]) * x[2 * h], high_of(r[i]) * x[2 * h + 1], high, f[i]);
    }
  }

  /* What a level's products y of 16 tokens with the others add: to D by the operand f they will meet, to the
   * accumulators by e. */
  template <int SIGN>
  __device__ __forceinline__ void add_to_D(int square, const uint32_t (&f)[4],
                                           const float (&y)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int tile = 2 * square + (i >> 1), h = 2 * (i & 1);
      const float(&z)[4] = y[i >> 1];
      D[tile][h] = fmaf(SIGN * low_of(f[i]), z[h], D[tile][h]);
      D[tile][h + 1] = fmaf(SIGN * high_of(f[i]), z[h + 1], D[tile][h + 1]);
    }
  }
  template <int SIGN>
  __device__ __forceinline__ void add(float (&to)[TILES][4], int square, const uint32_t (&f)[4],
                                      const float (&e)[2][4], const float (&y)[2][4]) {
    add_to_D<SIGN>(square, f, y);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int tile = 2 * square + (i >> 1), h = 2 * (i & 1);
      const float(&z)[4] = y[i >> 1], (&x)[4] = e[i >> 1];
      to[tile][h] = fmaf(x[h], z[h], to[tile][h]);
      to[tile][h + 1] = fmaf(x[h + 1], z[h + 1], to[tile][h + 1]);
    }
  }

  __device__ __forceinline__ void anchor(float (&a)[2], int tile) const {
    a[0] = s.by_warp[half][warp].ends[tile][lane >> 2];
    a[1] = s.by_warp[half][warp].ends[tile][8 + (lane >> 2)];
  }

  /* The square (i, j) of the warp's own tokens. */
  __device__ __forceinline__ int own_square(int i, int j) const {
    return lower_square(i, j) + (half ? 5 + 2 * i : 0);
  }
  __device__ __forceinline__ static void unpack(uint32_t (&f)[4], const uint4 &x) {
    f[0] = x.x, f[1] = x.y, f[2] = x.z, f[3] = x.w;
  }

  /* The pairs over the middle of the block. REST: what the columns' rounding has left out. */
  template <bool REST>
  __device__ __forceinline__ void middle() {
    refresh(22 + REST);
    uint32_t f[4], r[4];
    float e[2][4];
    if (half) {
      /* not the exponentials from above: they would be kept in registers */
      const float zero = STAGES > 1 || REST ? __uint_as_float(opaque_zero()) : 0, start[2] = {zero, zero};
#pragma unroll
      for (int i = 0; i < SQUARES; ++i) {
        if (!in_turn(8 + i + 4 * REST)) break;
        decays<1>(e, i, start);
#pragma unroll
        for (int of_k = 0; of_k < 2; ++of_k) {
          float y[2][4];
          clear(y);
#pragma unroll
          for (int j = 0; j < SQUARES; ++j) {
            unpack(f, s.columns[warp][j][lane]);
            load_square(r, of_k ? s.M : s.P, lower_square(SQUARES + i, j));
            mma_rows(y[0], y[1], f, r);
          }
          unpack(f, s.rows[warp][of_k][i][lane]);
          add<1>(of_k ? k : q, i, f, e, y);
        }
      }
    } else {
      float end[2];
      anchor(end, TILES - 1);
#pragma unroll
      for (int j = 0; j < SQUARES; ++j) {
        float z[2][4];
        if (!in_turn(10 + j + 4 * REST)) break;
        clear(z);
#pragma unroll
        for (int i = 0; i < SQUARES; ++i)
#pragma unroll
          for (int of_k = 0; of_k < 2; ++of_k) {
            unpack(f, s.rows[warp][of_k][i][lane]);
            load_square_transposed(r, of_k ? s.M : s.P, lower_square(SQUARES + i, j));
            mma_columns(z[0], z[1], f, r);
          }
        unpack(f, s.columns[warp][j][lane]);
        if (REST) {
          add_to_D<-1>(j, f, z);
          continue;
        }
        decays<-1>(e, j, end);
        add<-1>(k, j, f, e, z);
      }
    }
  }

  /* The rests in place of the columns of the first half. */
  __device__ __forceinline__ void put_rests() {
    refresh(6);
    float end[2], e[2][4];
    anchor(end, fresh(TILES - 1));
#pragma unroll
    for (int j = 0; j < SQUARES; ++j) {
      uint32_t f[4];
      decays<-1>(e, j, end);
      rest_of(f, s.k, j, e);
      s.columns[warp][j][lane] = make_uint4(f[0], f[1], f[2], f[3]);
    }
  }

  /* The pairs of the warp's square I with its square J, the anchor at the end of a tile. REST as above. */
  template <int I, int J, bool REST>
  __device__ __forceinline__ void level(int tile) {
    refresh(24 + 4 * I + 2 * J + REST);
    uint32_t column[4], row[4], r[4];
    float a[2], y[2][4], z[2][4], e[2][4];
    anchor(a, REST ? fresh(tile) : tile);
    decays<-1>(e, J, a);
    if (REST)
      rest_of(column, s.k, J, e);
    else
      decayed(column, s.k, J, e);
    clear(z);
    decays<1>(e, I, a);
#pragma unroll
    for (int of_k = 0; of_k < 2; ++of_k) {
      decayed(row, of_k ? s.k : s.q, I, e);
      clear(y);
      load_square(r, of_k ? s.M : s.P, own_square(I, J));
      mma_rows(y[0], y[1], column, r);
      load_square_transposed(r, of_k ? s.M : s.P, own_square(I, J));
      mma_columns(z[0], z[1], row, r);
      add<1>(of_k ? k : q, I, row, e, y);
    }
    if (REST) {
      add_to_D<-1>(J, column, z);
      return;
    }
    anchor(a, fresh(tile)); /* or the compiler holds the exponentials from above in registers */
    decays<-1>(e, J, a);
    add<-1>(k, J, column, e, z);
  }

  /* 16 tokens with themselves where one anchor does not do: two of them part at the highest bit in which they
   * differ, and have their anchor there. */
  template <int I>
  __device__ __forceinline__ void by_levels() {
    refresh(40 + I);
#pragma unroll 1
    for (int width = 8; width; width /= 2) {
      float e[2][4], middle[2];
      anchor(middle, 2 * I);
      const int source = (lane & ~3) | (width == 4 ? 1 : width == 2 ? lane & 2 : lane & 3);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float(&g)[4] = G[2 * I + n];
          float a = __shfl_sync(0xffffffffu, width == 1 ? g[2 * h] : g[2 * h + 1], source);
          if (width == 8) a = middle[h];
          e[n][2 * h] = exp2_approx(-fabsf(g[2 * h] - a));
          e[n][2 * h + 1] = exp2_approx(-fabsf(g[2 * h + 1] - a));
        }
      /* pairs of tokens behind their anchor; this level's pairs of the matrices on the diagonal, which are masked
       * like their transposes, and of the one below */
      const uint32_t behind = width == 4   ? (lane & 2 ? 0xffffffffu : 0)
                              : width == 2 ? (lane & 1 ? 0xffffffffu : 0)
                                           : 0xffff0000u;
      uint32_t mask = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int differ = (lane >> 2) ^ (2 * (lane & 3) + i);
        if (differ && 1 << (31 - __clz(differ)) == width) mask |= 0xffffu << 16 * i;
      }
      const uint32_t corner = width == 8 ? 0xffffffffu : 0;
      const auto choose = [&](uint32_t(&r)[4]) {
        r[0] &= mask, r[3] &= mask;
        r[1] = 0, r[2] &= corner;
      };
      uint32_t column[4], row[4], r[4];
      float y[2][4], z[2][4];
      decayed(column, s.k, I, e);
#pragma unroll
      for (int i = 0; i < 4; ++i) column[i] &= width == 8 ? (i < 2 ? 0xffffffffu : 0) : ~behind;
      clear(z);
#pragma unroll
      for (int of_k = 0; of_k < 2; ++of_k) {
        decayed(row, of_k ? s.k : s.q, I, e);
#pragma unroll
        for (int i = 0; i < 4; ++i) row[i] &= width == 8 ? (i < 2 ? 0 : 0xffffffffu) : behind;
        clear(y);
        load_square(r, of_k ? s.M : s.P, own_square(I, I));
        choose(r);
        mma_rows(y[0], y[1], column, r);
        add<1>(of_k ? k : q, I, row, e, y);
        load_square_transposed(r, of_k ? s.M : s.P, own_square(I, I));
        choose(r);
        mma_columns(z[0], z[1], row, r);
        if (!in_turn(16 + of_k)) break;
      }
      add<-1>(k, I, column, e, z);
    }
  }

  __device__ __forceinline__ void sum_pairs() {
    middle<false>();
    /* U telescopes over nearly parallel keys, and so must what keys lose by rounding. */
    if (s.of[0].parallel) {
      __syncthreads();
      if (!half) put_rests();
      __syncthreads();
      middle<true>();
    }
    if (s.of[half].parallel) {
      level<1, 0, true>(1);
      if (!s.levels) {
        level<0, 0, true>(0);
        if (in_turn(18)) level<1, 1, true>(2);
      }
    }
    level<1, 0, false>(1);
    if (s.levels) {
      by_levels<0>();
      by_levels<1>();
    } else {
      level<0, 0, false>(0);
      if (in_turn(19)) level<1, 1, false>(2);
    }
  }

  /* Adds lanes WIDTH apart: each keeps half of its numbers, and gets the other's. */
  template <int COUNT, int WIDTH>
  __device__ __forceinline__ void halve(float (&y)[16]) const {
    const bool upper = lane & WIDTH;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float mine = upper ? y[i + COUNT] : y[i], other = upper ? y[i] : y[i + COUNT];
      y[i] = mine + __shfl_xor_sync(0xffffffffu, other, WIDTH);
    }
  }

  /* Gradients by raw q and k: the diagonal of P, then (19). */
  __device__ __forceinline__ void finish_keys() {
    refresh(9);
    float along[16]; /* [q, k][tile][e] */
#pragma unroll
    for (int i = 0; i < SQUARES; ++i) {
      uint32_t q_raw[4], k_raw[4];
      load_raw(q_raw, s.q, i);
      load_raw(k_raw, s.k, i);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int tile = 2 * i + n;
        const float2 weights = of_tokens(s.P_diagonal + STEP * half, tile);
        float along_q[2] = {0, 0}, along_k[2] = {0, 0};
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const uint32_t qq = q_raw[2 * n + h], kk = k_raw[2 * n + h];
            const float q1 = e ? high_of(qq) : low_of(qq), k1 = e ? high_of(kk) : low_of(kk);
            const float weight = e ? weights.y : weights.x;
            float &dq = q[tile][2 * h + e], &dk = k[tile][2 * h + e];
            dq = fmaf(weight, k1, dq);
            dk = fmaf(weight, q1, dk);
            along_q[e] = fmaf(q1, dq, along_q[e]);
            along_k[e] = fmaf(k1, dk, along_k[e]);
          }
#pragma unroll
        for (int e = 0; e < 2; ++e)
          along[2 * tile + e] = along_q[e], along[8 + 2 * tile + e] = along_k[e];
      }
    }
    if (half) /* for the other half's sums in (28) */
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = 0;
#pragma unroll
        for (int n = 0; n < TILES; ++n) sum += D[n][2 * h] + D[n][2 * h + 1];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if ((lane & 3) == 0) s.behind[channel(h)] = sum;
      }
    halve<8, 16>(along);
    halve<4, 8>(along);
    halve<2, 4>(along);
    __syncwarp(); /* `ends` have been read */
#pragma unroll
    for (int i = 0; i < 2; ++i) /* of [lane / 16][tile lane / 4 % 4][i] */
      s.by_warp[half][warp].parts[lane >> 4][8 * (lane >> 2 & 3) + 2 * (lane & 3) + i] = along[i];
    __syncthreads();
    if (!p.l2norm) return;
    const int thread = thread_again(51);
    if (thread < 2 * BLOCK_TOKENS) {
      const int of_k = thread / BLOCK_TOKENS, token = thread % BLOCK_TOKENS;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < COLUMNS; ++w) sum += s.by_warp[token / STEP][w].parts[of_k][token % STEP];
      const typename Shared::Half &of = s.of[token / STEP];
      const float norm = of_k ? of.norm_k[token % STEP]
                              : of.norm_q[token % STEP] * reciprocal((float)p.scale);
      s.along[of_k][token] = p.scale != 0 || of_k ? sum * norm * norm : 0;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SQUARES; ++i) {
      uint32_t q_raw[4], k_raw[4];
      load_raw(q_raw, s.q, i);
      load_raw(k_raw, s.k, i);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int tile = 2 * i + (r >> 1), h = r & 1;
        const float2 of_q = of_tokens(s.along[0] + STEP * half, tile),
                     of_k = of_tokens(s.along[1] + STEP * half, tile);
        q[tile][2 * h] = fmaf(-of_q.x, low_of(q_raw[r]), q[tile][2 * h]);
        q[tile][2 * h + 1] = fmaf(-of_q.y, high_of(q_raw[r]), q[tile][2 * h + 1]);
        k[tile][2 * h] = fmaf(-of_k.x, low_of(k_raw[r]), k[tile][2 * h]);
        k[tile][2 * h + 1] = fmaf(-of_k.y, high_of(k_raw[r]), k[tile][2 * h + 1]);
      }
    }
  }

  /* (28), (20): D becomes the gradient by the raw gate; the sum over tokens by the bias too. Returns what A_log gets. */
  template <int MODE, bool FULL>
  __device__ __forceinline__ float finish_gates_as() {
    const float exp_A = s.exp_A;
    float sum_A = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float bias = bias_of(h);
      float carry = s.always[0][channel(h)] + s.always[1][channel(h)], sum_bias = 0;
      if (!half) carry += s.behind[channel(h)];
#pragma unroll
      for (int n = TILES - 1; n >= 0; --n) {
        const float own = D[n][2 * h] + D[n][2 * h + 1];
        float sum = own;
#pragma unroll
        for (int width = 1; width < 4; width *= 2) {
          const float behind = __shfl_down_sync(0xffffffffu, sum, width);
          if ((lane & 3) + width < 4) sum += behind;
        }
        float behind = __shfl_down_sync(0xffffffffu, sum, 1);
        if ((lane & 3) == 3) behind = 0;
        float dg[2];
        dg[1] = carry + (behind + D[n][2 * h + 1]);
        dg[0] = carry + sum;
        carry += __shfl_sync(0xffffffffu, sum, lane & ~3);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!FULL && STEP * half + 8 * n + 2 * (lane & 3) + e >= block.tokens) dg[e] = 0;
          sum_A += gate_back<MODE>(p, G[n][2 * h + e], bias, exp_A, dg[e]);
          sum_bias += dg[e];
          D[n][2 * h + e] = dg[e];
        }
      }
      sum_bias += __shfl_xor_sync(0xffffffffu, sum_bias, 1);
      sum_bias += __shfl_xor_sync(0xffffffffu, sum_bias, 2);
      if ((lane & 3) == 0) s.sum_bias[half][channel(h)] = sum_bias;
    }
    return sum_A;
  }
  __device__ __forceinline__ void finish_gates() {
    refresh(10);
    float sum_A;
    if (p.gate == FKDA_GATE_BOUNDED)
      sum_A = is_full() ? finish_gates_as<FKDA_GATE_BOUNDED, true>()
                        : finish_gates_as<FKDA_GATE_BOUNDED, false>();
    else if (p.gate == FKDA_GATE_SOFTPLUS)
      sum_A = finish_gates_as<FKDA_GATE_SOFTPLUS, false>();
    else
      sum_A = finish_gates_as<FKDA_GATE_DIRECT, false>();
#pragma unroll
    for (int width = 16; width; width /= 2) sum_A += __shfl_xor_sync(0xffffffffu, sum_A, width);
    if (lane == 0) s.sum_A[COLUMNS * half + warp] = sum_A;
    __syncthreads();
    const Workspace<K> w(x);
    float *sums =
        reinterpret_cast<float *>(place_of(w.sums, w.sizes.sums, s.task.id));
    const uint32_t thread = thread_again(52);
    if (thread < K) sums[thread] = s.sum_bias[0][thread] + s.sum_bias[1][thread];
    if (thread == 0) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < WARPS; ++i) sum += s.sum_A[i];
      sums[K] = sum;
    }
  }

  /* Rows of a gradient by way of shared memory: to the tensor, or with `part` to the workspace [64][K]. All threads. */
  __device__ __forceinline__ void store(const float (&y)[TILES][4], const fkda_rows &to,
                                        int of_head, bool aligned, float *part) {
    float *out = reinterpret_cast<float *>(&s);
    static_assert(sizeof(float) * BLOCK_TOKENS * OUT_PITCH<K> <= offsetof(Shared, g), "rows");
    if (!to.data) return;
    refresh(11);
    if (to.dtype == FKDA_BF16 && aligned && !part) {
      store_pieces(y,
                   static_cast<bf16 *>(to.data) +
                       row_of(to, block.span, block.t + STEP * half, of_head) + 16 * warp,
                   to.stride_t, block.tokens - STEP * half);
      return;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        out[(STEP * half + 8 * n + 2 * (lane & 3) + (e & 1)) * OUT_PITCH<K> + channel(e >> 1)] =
            y[n][e];
    __syncthreads();
    const int64_t first = row_of(to, block.span, block.t, of_head);
#pragma unroll 1
    for (int i = threadIdx.x; i < BLOCK_TOKENS * K / 8; i += THREADS) {
      const int token = i / (K / 8), column = i % (K / 8) * 8;
      if (token >= block.tokens) break;
      const float4 a = *reinterpret_cast<const float4 *>(&out[token * OUT_PITCH<K> + column]);
      const float4 b = *reinterpret_cast<const float4 *>(&out[token * OUT_PITCH<K> + column + 4]);
      const int64_t at = first + token * to.stride_t + column;
      if (part) {
        float4 *row = reinterpret_cast<float4 *>(part + token * K + column);
        row[0] = a, row[1] = b;
      } else if (to.dtype == FKDA_F32) {
        float *row = static_cast<float *>(to.data) + at;
        if (aligned) {
          reinterpret_cast<float4 *>(row)[0] = a, reinterpret_cast<float4 *>(row)[1] = b;
        } else {
          row[0] = a.x, row[1] = a.y, row[2] = a.z, row[3] = a.w;
          row[4] = b.x, row[5] = b.y, row[6] = b.z, row[7] = b.w;
        }
      } else {
        const uint4 packed =
            make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
        uint16_t *row = static_cast<uint16_t *>(to.data) + at;
        row[0] = (uint16_t)packed.x, row[1] = (uint16_t)(packed.x >> 16);
        row[2] = (uint16_t)packed.y, row[3] = (uint16_t)(packed.y >> 16);
        row[4] = (uint16_t)packed.z, row[5] = (uint16_t)(packed.z >> 16);
        row[6] = (uint16_t)packed.w, row[7] = (uint16_t)(packed.w >> 16);
      }
    }
  }

  __device__ __forceinline__ void store_beta() const {
    const uint32_t token = thread_again(53);
    if (!p.d_beta.data || token >= block.tokens) return;
    const int64_t t = block.t + token;
    float d = s.d_beta[token];
    if (p.beta_is_logit) {
      const float y = load_float(p.beta.data, p.beta.dtype, row_of(p.beta, block.span, t, head()));
      const float e = exp2_approx(-LOG2E * fabsf(y)), r = reciprocal(1 + e);
      d *= e * (r * r) * (p.allow_neg_eigval ? 2.0f : 1.0f);
    }
    const int64_t at = row_of(p.d_beta, block.span, t, head());
    if (p.d_beta.dtype == FKDA_F32)
      static_cast<float *>(p.d_beta.data)[at] = d;
    else
      static_cast<bf16 *>(p.d_beta.data)[at] = __float2bfloat16_rn(d);
  }

  /* STAGES 2: begins with the next task: its states into the second-level cache, parameters on their way. */
  __device__ __forceinline__ static Parameters begin(const Backward &x, Shared &next) {
    const GradientsTask task = next.coming;
    if (threadIdx.x == 0) next.task = task, next.levels = 0;
    if (task.block.tokens <= 0) return {};
    const Parameters parameters = load_parameters(x.problem, task.head);
    prefetch_task(x, task);
    return parameters;
  }
  /* Asks for a part of the rows of a task that has begun. */
  template <int PART>
  __device__ __forceinline__ static void load_next(const Backward &x, Shared &next) {
    if (STAGES > 1 && next.task.block.tokens > 0) load<PART>(x, next, next.task);
  }

  /* A task. STAGES 2: its rows are there; those of the next one are asked for, bit by bit (more at once than the first-level cache
   * has room for would hold everybody up), and `after` comes here when this is done. Else its rows are still to be loaded,
   * and those of `after` are asked into the second-level cache. */
  __device__ __forceinline__ void run(Shared &next, uint32_t after) {
    uint4 S[AHEAD], dS[AHEAD];
    Parameters parameters;
    if (STAGES > 1) {
      load_states(S, dS);
      parameters = begin(x, next);
      if (threadIdx.x == THREADS - 1) s.coming = task_of(x, after);
    } else {
      load_gates(G); /* what is needed first */
      parameters = load_parameters(p, head());
      load<OF_ALL>(x, s, s.task);
      load_states(S, dS);
      keep_parameters(s, parameters);
      __syncthreads();
      if (sum_gates() && p.gate != FKDA_GATE_BOUNDED) atomicMax(&s.levels, 1);
      wait_for_copies();
      prefetch_task(x, task_of(x, after));
    }
    weigh_pairs();
    if (STAGES > 1) keep_parameters(next, parameters);
    float late[TILES][4],
        early[TILES][4]; /* dk as the later one and as the earlier one of two tokens */
    meet_states(late, early, S, dS);
    if (STAGES > 1) {
      load_gates(G);
      if (sum_gates() && p.gate != FKDA_GATE_BOUNDED) atomicMax(&s.levels, 1);
    }
    __syncthreads(); /* the pairs' weights are there */
    load_next<OF_Q | OF_K>(x, next);
    store_beta();
    if (half)
      start_sums<1>(late, early);
    else
      start_sums<0>(late, early);
    __syncthreads();
    load_next<OF_D_OUT>(x, next);
    sum_pairs();
    load_next<OF_WALKS>(x, next);
    finish_keys();
    load_next<OF_G>(x, next);
    const bool gates = p.d_g.data || p.d_A_log.data || p.d_dt_bias.data;
    float *part_q = nullptr, *part_k = nullptr;
    if (p.HV > p.H) {
      part_q = reinterpret_cast<float *>(place_of(x.workspace, Workspace<K>(x).sizes.factors, s.task.id));
      part_k = part_q + BLOCK_TOKENS * K;
    }
    if (GATES_EARLY && gates) load_gates(G);
    store(q, p.d_q, s.task.qk_head, x.aligned_d_q, part_q);
    store(k, p.d_k, s.task.qk_head, x.aligned_d_k, part_k);
    if (gates) {
      if (!GATES_EARLY) load_gates(G);
      finish_gates();
    }
    store(D, p.d_g, head(), x.aligned_d_g, nullptr);
  }
};

/* A task that is nobody's: nothing to add. */
template <int K>
__device__ __forceinline__ void leave(const Backward &x, const GradientsTask &task) {
  const Workspace<K> w(x);
  float *sums = reinterpret_cast<float *>(
      place_of(w.sums, w.sizes.sums, task.id));
  for (int i = threadIdx.x; i <= K; i += FKDA_BACKWARD_GRADIENTS_THREADS(K)) sums[i] = 0;
}

/* From memory: there are no registers for it. */
template <class Shared>
__device__ __forceinline__ uint32_t next_of(const Shared &s) {
  return s.task.id + gridDim.x;
}

template <int K, int V>
__device__ __forceinline__ void gradients(const Backward &x) {
  extern __shared__ __align__(128) char memory[];
  using Task = Gradients<K, V>;
  using Shared = typename Task::Shared;
  static_assert(STAGES * sizeof(Shared) <= FKDA_BACKWARD_GRADIENTS_SHARED(K, V, STAGES),
                "shared memory");
  Shared *const stages = reinterpret_cast<Shared *>(memory);
  uint32_t id = blockIdx.x;
  if (STAGES == 1) {
#pragma unroll 1
    for (; id < tasks_of(x); id = next_of(*stages)) {
      const GradientsTask task = task_of(x, id);
      __syncthreads(); /* the task before has left */
      if (threadIdx.x == 0) stages->task = task, stages->zero = 0, stages->levels = 0;
      __syncthreads();
      if (task.block.tokens > 0)
        Task(x, *stages).run(*stages, id + processors());
      else
        leave<K>(x, task);
      if (!Task::LOOP) break;
    }
    return;
  }
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES; ++i)
      stages[i].zero = 0, stages[i].coming = task_of(x, id + i * gridDim.x);
  __syncthreads();
  Task::keep_parameters(*stages, Task::begin(x, *stages));
  __syncthreads();
  Task::template load_next<Task::OF_ALL>(x, *stages);
  uint32_t stage = 0;
#pragma unroll 1
  for (; id < tasks_of(x); id += gridDim.x, stage ^= 1) {
    wait_for_copies(); /* and for all who have the other stage */
    Shared &s = stages[stage], &next = stages[stage ^ 1];
    const uint32_t after = id + 2 * gridDim.x;
    if (s.task.block.tokens > 0) {
      Task(x, s).run(next, after);
    } else {
      Task::keep_parameters(next, Task::begin(x, next));
      if (threadIdx.x == 0) s.coming = task_of(x, after);
      __syncthreads();
      Task::template load_next<Task::OF_ALL>(x, next);
      leave<K>(x, s.task);
    }
  }
}

}  // namespace
}  // namespace fkda

#define FKDA_ENTRY(K, V)                                                                           \
  extern "C" __global__ void __launch_bounds__(FKDA_BACKWARD_GRADIENTS_THREADS(K), 1)              \
      fkda_portable_backward_gradients_k##K##_v##V(                                                \
          const __grid_constant__ fkda_portable_backward_params x) {                               \
    fkda::gradients<K, V>(x);                                                                      \
  }
FKDA_BACKWARD_BY_K_V(FKDA_ENTRY)
