/* Portable prefill: mma.sync on bf16 with f32 accumulation, sm_80 and newer.
 *
 * A block is one sequence, value head and part of the value columns. Its warps play two roles:
 *
 *   factor warps      two groups of four on alternate chunks of 16 tokens: gates (2), running sums against the
 *                     anchor in the chunk's middle, decayed operands (8), the triangles A and P (9), and
 *                     T = (I + A)^-1 by forward substitution in f32, its warps in turn (with few
 *                     state warps: a warp of its own for both groups)
 *   state warps       own 16 value rows of S each, in f32 accumulators for the whole sequence, transposed so
 *                     that value rows are the M dimension: X = S [K~ Q~]^T, U (10), O (11), S (12)
 *
 * Factor warps own 32 channels each and state warps 16 value columns, loads and stores included, so that
 * only the triangles need a barrier inside a group, and state warps none. Each group hands its factors over
 * in a buffer of its own, guarded by barriers in shared memory.
 *
 * Frames. Per channel, G is the running sum of log2-decays and m its value after the chunk's eighth token:
 *   K' = k e^{G-m}   Q' = q e^{G-m}   K^ = k e^{m-G}   K- = k e^{G_C-G}
 *   X = (S e^m) K'^T,  S <- S e^{G_C} + U^T K-
 * so exponents stay within +-40 for a bounded gate. Where a chunk's gates leave +-ANCHOR_RANGE (softplus and
 * direct gates can), the triangles are summed over a tree of anchors instead, all exponents <= 0:
 * factors_by_levels(). The choice is a chunk's and head's own.
 *
 * Norms (1) are factors of rows and columns, applied in f32 after the products: operands are rounded from
 * the raw bf16 k once, so that nearly collinear keys stay collinear (docs/math.md).
 */
#include "cuda/kernels/portable/params.h"
#include "cuda/kernels/portable/pieces.cuh"

namespace fkda {
namespace {

constexpr int CHUNK = FKDA_PORTABLE_CHUNK;
constexpr int GROUPS = 2;      /* of factor warps, on alternate chunks */
constexpr int GROUP_WARPS = 4; /* each owns 32 channels; with K = 64 two of them have none */
constexpr int GROUP_THREADS = 32 * GROUP_WARPS;
constexpr int V_STAGES = FKDA_PORTABLE_V_STAGES; /* chunks of v in shared memory */

using Mbarrier = uint64_t; /* in shared memory */

constexpr int FACTOR_BARRIER = 1; /* + group; 0 is that of __syncthreads() */

/* ---- shared memory ------------------------------------------------------------------------------- */

/* Tiles of bf16 [16][K] lie in blocks of 16 channels, so that an ldmatrix of the next 16 channels has the same
 * address but for a constant. A block's rows of 32 bytes are permuted, and their two halves swapped, such
 * that neither the eight rows of an ldmatrix nor what a factor warp touches at once (two rows of two blocks)
 * share a bank. */
constexpr int BLOCK = CHUNK * 16 + 16;
template <int K>
constexpr int TILE = K / 16 * BLOCK;
__device__ __forceinline__ int at(int row, int column) {
  const int half = (column >> 3 ^ row >> 2) & 1, place = row ^ row >> 3 << 1;
  return (column >> 4) * BLOCK + place * 16 + half * 8 + (column & 7);
}

template <int K>
struct Factors { /* what passes from factor to state warps */
  bf16 k[TILE<K>];           /* K' */
  bf16 q[TILE<K>];           /* Q' */
  bf16 k_end[TILE<K>];       /* K- = high + low: this and the next */
  bf16 k_end_low[TILE<K>];
  bf16 T_high[CHUNK * CHUNK]; /* (I + A)^-1 = high + low, [j][i]: columns are contiguous */
  bf16 T_low[CHUNK * CHUNK];
  bf16 P[CHUNK * CHUNK];     /* lower(Q' K^^T), raw norms */
  float to_anchor[K];        /* e^m */
  float decay[K];            /* e^{G_C} */
  float norm_k[CHUNK];       /* 1/|k|, or 1 */
  float norm_q[CHUNK];       /* scale/|q|, or scale */
  float beta[CHUNK];
};

/* A task, and what of it the copies go by. */
struct BlockTask : Task {
  const bf16 *q, *k; /* row of token 0 */
  const char *g, *beta;
  const bf16 *v; /* the block's first value column of token 0 */
  bf16 *out;
  float scale;
};

/* What a group of factor warps works on. */
template <int K>
struct Group {
  static constexpr int A_PITCH = CHUNK + 4; /* rows stay 16-byte aligned */
  Factors<K> factors;
  float g[CHUNK * K]; /* f32 by rows, or a bf16 tile */
  bf16 q[TILE<K>];
  bf16 k[TILE<K>];
  bf16 k_inverse[TILE<K>]; /* K^ */
  float A[CHUNK][A_PITCH];
  float squares[3][CHUNK][GROUP_WARPS]; /* [k, q, product]: each warp's part of |k|^2, |q|^2, q k */
};

template <int K, int VP>
struct Shared {
  static constexpr int STATE_WARPS = VP / 16;
  static constexpr int STATES = GROUPS * GROUP_THREADS; /* first thread of the state warps */
  /* Up to twelve warps leave a thread 168 registers: it holds addresses and lengths, which are made anew elsewhere.
   * Where even one warp more leaves as many, it solves for both groups; elsewhere a group's warps do it in turn. */
  static constexpr bool ROOMY = VP <= 64, HAS_SOLVER = VP == 32;
  static constexpr int SOLVER = STATES + 32 * STATE_WARPS; /* its first thread */
  static constexpr int THREADS = SOLVER + (HAS_SOLVER ? 32 : 0);
  static constexpr int V_PITCH = 16 + 8; /* one 16-byte piece more: conflict-free ldmatrix */
  BlockTask task;
  /* A phase is a chunk of the group. Its factor warps arrive when all but the triangles is there, when the
   * triangles are, and, with the solver, when all is; the state warps when they need it no more. */
  Mbarrier factored[GROUPS], triangles[GROUPS], solved[GROUPS], empty[GROUPS];
  Group<K> groups[GROUPS];
  bf16 v[V_STAGES][STATE_WARPS][CHUNK * V_PITCH]; /* receives O */
};

/* ---- barriers ------------------------------------------------------------------------------------- */

/* Barriers are PTX of our own: CUTLASS's wrappers are breakpoints below sm_90. */
__device__ __forceinline__ void group_sync(int group) {
  asm volatile("barrier.cta.sync.aligned %0, %1;"
               :
               : "r"(FACTOR_BARRIER + group), "n"(GROUP_THREADS)
               : "memory");
}
/* The same, and true if any thread brings true. */
__device__ __forceinline__ bool group_sync_or(int group, bool mine) {
  int any;
  asm volatile(
      "{ .reg .pred p, q;\n setp.ne.s32 p, %1, 0;\n barrier.cta.red.or.pred q, %2, %3, p;\n"
      " selp.s32 %0, 1, 0, q; }\n"
      : "=r"(any)
      : "r"((int)mine), "r"(FACTOR_BARRIER + group), "n"(GROUP_THREADS)
      : "memory");
  return any != 0;
}

__device__ __forceinline__ void init(Mbarrier &barrier, int warps) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;"
               :
               : "r"(cute::cast_smem_ptr_to_uint(&barrier)), "r"(warps * ARRIVING_LANES)
               : "memory");
}
/* A warp's arrival: what its lanes have read and written so far comes before what a waiter does next. */
__device__ __forceinline__ void arrive(Mbarrier &barrier) {
  __syncwarp();
  if (lane_arrives())
    asm volatile("{ .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0]; }"
                 :
                 : "r"(cute::cast_smem_ptr_to_uint(&barrier))
                 : "memory");
}
#if __CUDA_ARCH__ >= 900
#define MBARRIER_TEST "mbarrier.try_wait.parity" /* sleeps a while */
#else
#define MBARRIER_TEST "mbarrier.test_wait.parity"
#endif
/* Waits until phase `turn` (0, 1, ...) of a barrier has ended. The barrier is never two phases ahead. */
__device__ __forceinline__ void wait(Mbarrier &barrier, int turn) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p;\n " MBARRIER_TEST ".shared.b64 p, [%1], %2;\n"
                 " selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(cute::cast_smem_ptr_to_uint(&barrier)), "r"(turn & 1)
                 : "memory");
  } while (!done);
  __syncwarp();
}

/* ---- the block's task ----------------------------------------------------------------------------- */

__device__ BlockTask find_task(const fkda_portable_params &params, int VP) {
  const fkda_problem &p = params.problem;
  int64_t id = blockIdx.x;
  const int part = id % params.value_split;
  id /= params.value_split;
  BlockTask task = {make_task(p, id / p.HV, (int)(id % p.HV), part, VP, CHUNK)};
  task.q = static_cast<const bf16 *>(p.q.data) + first_row(p.q, task, task.qk_head);
  task.k = static_cast<const bf16 *>(p.k.data) + first_row(p.k, task, task.qk_head);
  task.g = static_cast<const char *>(p.g.data) +
           first_row(p.g, task, task.head) * (p.g.dtype == FKDA_F32 ? 4 : 2);
  task.beta = static_cast<const char *>(p.beta.data) +
              first_row(p.beta, task, task.head) * (p.beta.dtype == FKDA_F32 ? 4 : 2);
  task.v = static_cast<const bf16 *>(p.v.data) + first_row(p.v, task, task.head) + task.v_begin;
  task.out = static_cast<bf16 *>(p.out.data) + first_row(p.out, task, task.head) + task.v_begin;
  task.scale = (float)p.scale;
  return task;
}

/* A warp copies 16 rows of COLUMNS columns to shared memory element by element, rows from `tokens` on as zeros;
 * `from` is the first element, place(row, column) an element's address there. */
template <int COLUMNS, class Element, class Place>
__device__ __forceinline__ void copy_elements(const Element *from, int64_t stride, int tokens,
                                              Place place) {
#pragma unroll 1
  for (int i = fresh_lane(); i < CHUNK * COLUMNS; i += 32) {
    const int row = i / COLUMNS, column = i % COLUMNS;
    Element x = Element(0.0f);
    if (row < tokens) x = from[row * stride + column];
    *place(row, column) = x;
  }
}

/* ---- factor warps --------------------------------------------------------------------------------- */

/* A thread's channels 2 pair, 2 pair + 1 and its eight tokens 8 half .. 8 half + 7. */
template <int K>
struct FactorThread {
  int group, warp, lane, pair, half;
  __device__ FactorThread() {
    group = threadIdx.x / GROUP_THREADS;
    warp = threadIdx.x / 32 % GROUP_WARPS;
    lane = fresh_lane();
    pair = warp * 16 + (lane & 15);
    half = lane >> 4;
  }
  __device__ bool active() const { return warp * 32 < K; } /* K = 64: two warps have channels */
  /* at(8 half + i, 2 pair) for a constant i, as one of four sums and a constant */
  __device__ __forceinline__ int place(int i) const {
    const int swap = half * 32, piece = (pair & 4) * 2;
    return (pair >> 3) * BLOCK + half * 128 + 2 * (pair & 3) + (i & 2 ? 32 - swap : swap) +
           (i & 4 ? 8 - piece : piece) + (i & 5) * 16;
  }
};

/* |k|^2, |q|^2 and q k of rows lane / 4 and lane / 4 + 8 over the warp's 32 channels, in the lanes of
 * has_squares(): of 8 rows at a time the diagonals of [q; k] times q^T and k^T, for which the A operand of an mma
 * is its B operand too. */
struct Squares {
  float k[2] = {0, 0}, q[2] = {0, 0}, product[2] = {0, 0};
  __device__ __forceinline__ void sum(const bf16 *q_rows, const bf16 *k_rows, int warp, int lane) {
    const bf16 *rows = lane & 8 ? k_rows : q_rows;
    const bool odd = lane & 4; /* columns 2 (lane % 4), + 1 */
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float by_q[4] = {0, 0, 0, 0}, by_k[4] = {0, 0, 0, 0};
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        uint32_t a[4];
        load_matrices(a, rows + at(8 * h + (lane & 7), lane >> 4 << 3) + (2 * warp + block) * BLOCK);
        mma(by_q, a, a[0], a[2]);
        mma(by_k, a, a[1], a[3]);
      }
      q[h] = odd ? by_q[1] : by_q[0];
      product[h] = odd ? by_q[3] : by_q[2];
      k[h] = odd ? by_k[3] : by_k[2];
    }
  }
};
__device__ __forceinline__ bool has_squares(int lane) { return (lane & 3) == lane >> 3; }

template <int K>
__device__ __forceinline__ float sum_of_parts(const float (&squares)[GROUP_WARPS]) {
  const float4 parts = *reinterpret_cast<const float4 *>(squares);
  return K == 128 ? (parts.x + parts.y) + (parts.z + parts.w) : parts.x + parts.y;
}
/* 1 / |row|, or 1 without the norm (1). */
template <int K>
__device__ __forceinline__ float norm_of(const fkda_problem &p, const float (&squares)[GROUP_WARPS]) {
  const float norm = rsqrtf(sum_of_parts<K>(squares) + (float)FKDA_L2NORM_EPS);
  return p.l2norm ? norm : 1;
}

/* Which warp computes which part of the triangles: rows K' (A) or Q' (P), columns 8 (warp & 1) .. + 7. */
template <int K>
__device__ __forceinline__ void multiply_triangle(float (&acc)[4], const bf16 *rows,
                                                  const bf16 *columns, int warp, int lane) {
  float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
  const int a_at = at(lane & 15, (lane >> 4) * 8);
  const int b_at = at((warp & 1) * 8 + (lane & 7), lane & 24);
#pragma unroll
  for (int k = 0; k < K; k += 32) {
    uint32_t a0[4], a1[4], b[4];
    load_matrices(b, columns + b_at + k / 16 * BLOCK);
    load_matrices(a0, rows + a_at + k / 16 * BLOCK);
    load_matrices(a1, rows + a_at + (k / 16 + 1) * BLOCK);
    mma(even, a0, b[0], b[1]);
    mma(odd, a1, b[2], b[3]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = even[i] + odd[i];
}

/* Row and column of the triangle that a thread's accumulator i holds. */
__device__ __forceinline__ int triangle_row(int i, int lane) { return (lane >> 2) + 8 * (i >> 1); }
__device__ __forceinline__ int triangle_column(int i, int lane, int warp) {
  return (warp & 1) * 8 + 2 * (lane & 3) + (i & 1);
}

/* T = (I + L)^-1 by forward substitution in f32, a column a lane: x_i = delta_ic - sum_{j<i} L_ij x_j,
 * right-looking so that the updates of later rows are independent. A holds -L. One warp; its lanes 16..31
 * repeat lanes 0..15. */
template <int K>
__device__ __forceinline__ void invert(Group<K> &shared, int lane) {
  auto &A = shared.A;
  Factors<K> &to = shared.factors;
  const int c = lane & 15;
  float x[CHUNK];
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) x[i] = i == c ? 1.0f : 0.0f;
  /* Blocks of four columns: the block's own triangle, then all rows below it. */
#pragma unroll
  for (int j = 0; j < CHUNK; j += 4) {
#pragma unroll
    for (int i = j + 1; i < CHUNK; ++i) {
      const float4 r = *reinterpret_cast<const float4 *>(&A[i][j]);
      x[i] = fmaf(r.x, x[j], x[i]);
      if (i > j + 1) x[i] = fmaf(r.y, x[j + 1], x[i]);
      if (i > j + 2) x[i] = fmaf(r.z, x[j + 2], x[i]);
      if (i > j + 3) x[i] = fmaf(r.w, x[j + 3], x[i]);
    }
  }
  if (lane < CHUNK) {
    uint32_t high[8], low[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) split(x[2 * i], x[2 * i + 1], high[i], low[i]);
    uint4 *T_high = reinterpret_cast<uint4 *>(&to.T_high[c * CHUNK]);
    uint4 *T_low = reinterpret_cast<uint4 *>(&to.T_low[c * CHUNK]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T_high[h] = make_uint4(high[4 * h], high[4 * h + 1], high[4 * h + 2], high[4 * h + 3]);
      T_low[h] = make_uint4(low[4 * h], low[4 * h + 1], low[4 * h + 2], low[4 * h + 3]);
    }
  }
}

/* The triangles of a chunk whose gates are too strong for one anchor. Two different rows i > j part at the
 * highest bit in which i and j differ; the block of 2 * width rows that this bit splits has its anchor
 * there, and e^{G_i-a}, e^{a-G_j} are both <= 1. Four widths, then the diagonal of P. All factor warps. */
template <int K>
__device__ __noinline__ float4 factors_by_levels(Group<K> &shared) {
  const FactorThread<K> me;
  Factors<K> &to = shared.factors;
  const bf16 *q_raw = shared.q, *k_raw = shared.k;
  const float *g = shared.g; /* log2-decays; a thread reads its own channels and its half's tokens */
  const float2 *g_of = reinterpret_cast<const float2 *>(g + me.half * 8 * K + 2 * me.pair);
  constexpr int G_ROW = K / 2;
  float total[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (int width = 8; width >= 0; width = width > 1 ? width / 2 : width - 1) {
    /* width 0: the diagonal, no decay */
    if (me.active()) {
#pragma unroll 1
      for (int i = 0; i < 8; ++i) {
        const int row = me.half * 8 + i;
        const bool after = row & width; /* a row beyond its block's anchor, or a column before it */
        float2 exponent = make_float2(0, 0);
        if (width) {
          const int anchor = (row & ~(2 * width - 1)) + width; /* first token beyond the anchor */
          const int first = after ? anchor : row + 1, last = after ? row : anchor - 1;
#pragma unroll 1
          for (int r = first; r <= last; ++r) { /* never leaves the thread's half */
            const float2 x = g_of[(r & 7) * G_ROW];
            exponent.x += x.x, exponent.y += x.y;
          }
        }
        const int place = at(row, 2 * me.pair);
        const uint32_t k = *reinterpret_cast<const uint32_t *>(k_raw + place);
        const uint32_t q = *reinterpret_cast<const uint32_t *>(q_raw + place);
        const float e0 = exp2_approx(exponent.x), e1 = exp2_approx(exponent.y);
        const bool as_row = after || !width, as_column = !after || !width;
        *reinterpret_cast<uint32_t *>(to.k + place) =
            as_row ? pack(low_of(k) * e0, high_of(k) * e1) : 0;
        *reinterpret_cast<uint32_t *>(to.q + place) =
            as_row ? pack(low_of(q) * e0, high_of(q) * e1) : 0;
        *reinterpret_cast<uint32_t *>(shared.k_inverse + place) =
            as_column ? pack(low_of(k) * e0, high_of(k) * e1) : 0;
      }
    }
    group_sync(me.group);
    float part[4];
    multiply_triangle<K>(part, me.warp < 2 ? to.k : to.q, shared.k_inverse, me.warp, me.lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = triangle_row(i, me.lane), column = triangle_column(i, me.lane, me.warp);
      const int highest = row == column ? 0 : 1 << (31 - __clz(row ^ column));
      if (highest == width && row >= column) total[i] += part[i];
    }
    group_sync(me.group);
  }
  /* What meets the state: exponents against the chunk's ends. */
  if (me.active()) {
    float2 sum = make_float2(0, 0), whole = make_float2(0, 0);
    for (int r = 0; r < 8; ++r) whole.x += g_of[r * G_ROW].x, whole.y += g_of[r * G_ROW].y;
    const float other0 = __shfl_xor_sync(0xffffffffu, whole.x, 16);
    const float other1 = __shfl_xor_sync(0xffffffffu, whole.y, 16);
    const float before0 = me.half ? other0 : 0, before1 = me.half ? other1 : 0;
    const float behind0 = me.half ? 0 : other0, behind1 = me.half ? 0 : other1;
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      sum.x += g_of[i * G_ROW].x, sum.y += g_of[i * G_ROW].y;
      float rest0 = behind0, rest1 = behind1; /* G_C - G, summed on its own: no cancellation */
#pragma unroll 1
      for (int r = i + 1; r < 8; ++r) rest0 += g_of[r * G_ROW].x, rest1 += g_of[r * G_ROW].y;
      const int place = at(me.half * 8 + i, 2 * me.pair);
      const uint32_t k = *reinterpret_cast<const uint32_t *>(k_raw + place);
      const uint32_t q = *reinterpret_cast<const uint32_t *>(q_raw + place);
      const float e0 = exp2_approx(before0 + sum.x), e1 = exp2_approx(before1 + sum.y);
      *reinterpret_cast<uint32_t *>(to.k + place) = pack(low_of(k) * e0, high_of(k) * e1);
      *reinterpret_cast<uint32_t *>(to.q + place) = pack(low_of(q) * e0, high_of(q) * e1);
      uint32_t high, low;
      split(low_of(k) * exp2_approx(rest0), high_of(k) * exp2_approx(rest1), high, low);
      *reinterpret_cast<uint32_t *>(to.k_end + place) = high;
      *reinterpret_cast<uint32_t *>(to.k_end_low + place) = low;
    }
    if (me.half == 0) {
      to.to_anchor[2 * me.pair] = to.to_anchor[2 * me.pair + 1] = 1;
      to.decay[2 * me.pair] = exp2_approx(whole.x + other0);
      to.decay[2 * me.pair + 1] = exp2_approx(whole.y + other1);
    }
  }
  return make_float4(total[0], total[1], total[2], total[3]);
}

/* g[2 i + c]: in, the raw gate of token 8 half + i and channel 2 pair + c; out, its log2-decay. */
template <int MODE>
__device__ __forceinline__ void apply_gate(float (&g)[16], const Gate &gate0, const Gate &gate1) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    g[2 * i] = gate0.decay<MODE>(g[2 * i]);
    g[2 * i + 1] = gate1.decay<MODE>(g[2 * i + 1]);
  }
}

/* beta of token lane & 15 (of the last one beyond the sequence) as it lies in memory: the upper and the lower
 * 16 bits of a float, or twice the bf16. No predicate and no branch, or the loads would be waited for at once. */
struct RawBeta {
  uint16_t upper, lower;
  __device__ __forceinline__ RawBeta(const fkda_problem &p, const BlockTask &task, int chunk, int lane) {
    const int t = chunk * CHUNK + (lane & 15), last = task.length - 1;
    const int is_f32 = p.beta.dtype == FKDA_F32;
    const uint16_t *from = reinterpret_cast<const uint16_t *>(task.beta) +
                           (static_cast<int64_t>(t < last ? t : last) * p.beta.stride_t << is_f32);
    upper = __ldg(from + is_f32);
    lower = __ldg(from);
  }
  /* (3); 0 beyond the sequence. */
  __device__ __forceinline__ float beta(const fkda_problem &p, bool valid) const {
    const float beta =
        __uint_as_float((uint32_t)upper << 16 | (p.beta.dtype == FKDA_F32 ? lower : 0));
    const float factor = p.allow_neg_eigval ? 2.0f : 1.0f;
    return !valid ? 0 : p.beta_is_logit ? factor * sigmoid(beta) : beta;
  }
};

template <int K, int VP>
__device__ void run_factor_warps(const fkda_portable_params &params, Shared<K, VP> &block,
                                 const BlockTask &task) {
  const fkda_problem &p = params.problem;
  constexpr bool ROOMY = Shared<K, VP>::ROOMY, HAS_SOLVER = Shared<K, VP>::HAS_SOLVER;
  FactorThread<K> me;
  Group<K> &shared = block.groups[me.group];
  Factors<K> &to = shared.factors;
  const int held_length = task.length, held_chunks = task.chunks;
  const auto length = [&] { return ROOMY ? held_length : task.length; };
  const auto chunks = [&] { return ROOMY ? held_chunks : task.chunks; };

  const bool g_is_f32 = p.g.dtype == FKDA_F32;
  const float exp_A =
      p.A_log.data ? expf(load_float(p.A_log.data, p.A_log.dtype, task.head)) : 1.0f;
  float bias0 = 0, bias1 = 0;
  if (me.active() && p.dt_bias.data) {
    bias0 = load_float(p.dt_bias.data, p.dt_bias.dtype, (int64_t)task.head * K + 2 * me.pair);
    bias1 = load_float(p.dt_bias.data, p.dt_bias.dtype, (int64_t)task.head * K + 2 * me.pair + 1);
  }
  const Gate gate0(p, p.gate, exp_A, bias0), gate1(p, p.gate, exp_A, bias1);

  /* Where the lane's first pieces of 16 bytes of the group's next chunk lie. */
  const bf16 *q_from, *k_from;
  const char *g_from;
  {
    const int64_t t = me.group * CHUNK + me.lane / 4;
    const int column = me.warp * 32 + me.lane % 4 * 8;
    q_from = task.q + t * p.q.stride_t + column;
    k_from = task.k + t * p.k.stride_t + column;
    g_from = task.g + (g_is_f32 ? 4 * ((me.group * CHUNK + me.lane / 8) * p.g.stride_t + me.warp * 32 +
                                       me.lane % 8 * 4)
                                : 2 * (t * p.g.stride_t + column));
  }
  const bool in_pieces = params.aligned_q && params.aligned_k && params.aligned_g && !g_is_f32;
  const auto load = [&](int chunk) {
    if (me.active()) { /* beyond the sequence: zeros, which nobody reads */
      const int lane = ROOMY ? me.lane : fresh_lane();
      const int first = (ROOMY ? me.warp : fresh_warp() % GROUP_WARPS) * 32;
      const int t = chunk * CHUNK, tokens = length() - t;
      const int row = lane / 4, column = first + lane % 4 * 8;
      const int place0 = at(row, column), place1 = at(row + 8, column);
      bf16 *const g_tile = reinterpret_cast<bf16 *>(shared.g);
      const auto copy_pieces = [&](bf16 *to, const bf16 *from, int64_t stride) {
        copy_piece(to + place0, from, row < tokens); /* what is not valid is not read */
        copy_piece(to + place1, from + 8 * stride, row + 8 < tokens);
      };
      if (in_pieces) {
        copy_pieces(shared.q, q_from, p.q.stride_t);
        copy_pieces(shared.k, k_from, p.k.stride_t);
        copy_pieces(g_tile, reinterpret_cast<const bf16 *>(g_from), p.g.stride_t);
      } else {
        const auto copy_tile = [&](bf16 *to, const bf16 *pieces, const bf16 *rows, int64_t stride,
                                   bool aligned) {
          if (aligned)
            copy_pieces(to, pieces, stride);
          else
            copy_elements<32>(rows + t * stride + first, stride, tokens,
                              [&](int r, int c) { return to + at(r, first + c); });
        };
        copy_tile(shared.q, q_from, task.q, p.q.stride_t, params.aligned_q);
        copy_tile(shared.k, k_from, task.k, p.k.stride_t, params.aligned_k);
        if (!g_is_f32) {
          copy_tile(g_tile, reinterpret_cast<const bf16 *>(g_from),
                    reinterpret_cast<const bf16 *>(task.g), p.g.stride_t, params.aligned_g);
        } else if (params.aligned_g) {
          float *to = &shared.g[lane / 8 * K + first + lane % 8 * 4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            copy_piece(to + 4 * i * K, g_from + 16 * i * p.g.stride_t, lane / 8 + 4 * i < tokens);
        } else {
          copy_elements<32>(reinterpret_cast<const float *>(task.g) + t * p.g.stride_t + first,
                            p.g.stride_t, tokens,
                            [&](int r, int c) { return &shared.g[r * K + first + c]; });
        }
      }
      q_from += GROUPS * CHUNK * p.q.stride_t;
      k_from += GROUPS * CHUNK * p.k.stride_t;
      g_from += GROUPS * CHUNK * p.g.stride_t * (g_is_f32 ? 4 : 2);
    }
    cute::cp_async_fence();
  };

  load(me.group);
#pragma unroll 1
  for (int chunk = me.group; chunk < chunks(); chunk += GROUPS) {
    if (!ROOMY) me = FactorThread<K>();
    const int turn = chunk / GROUPS, tokens = length() - chunk * CHUNK;
    const RawBeta raw_beta(p, task, chunk, me.lane);
    cute::cp_async_wait<0>();
    __syncwarp();
    float g[16];
    if (me.active()) {
      if (g_is_f32) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float2 pair = *reinterpret_cast<const float2 *>(
              &shared.g[(me.half * 8 + i) * K + 2 * me.pair]);
          g[2 * i] = pair.x, g[2 * i + 1] = pair.y;
        }
      } else {
        const bf16 *raw = reinterpret_cast<const bf16 *>(shared.g);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint32_t pair =
              *reinterpret_cast<const uint32_t *>(raw + me.place(i));
          g[2 * i] = low_of(pair), g[2 * i + 1] = high_of(pair);
        }
      }
      if (p.gate == FKDA_GATE_BOUNDED)
        apply_gate<FKDA_GATE_BOUNDED>(g, gate0, gate1);
      else if (p.gate == FKDA_GATE_SOFTPLUS)
        apply_gate<FKDA_GATE_SOFTPLUS>(g, gate0, gate1);
      else
        apply_gate<FKDA_GATE_DIRECT>(g, gate0, gate1);
      if (tokens < CHUNK) /* no decay beyond the sequence */
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (me.half * 8 + i >= tokens) g[2 * i] = g[2 * i + 1] = 0;
    }
    float sum0 = 0, sum1 = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum0 += g[2 * i], sum1 += g[2 * i + 1];
    bool by_levels = false;
    if (p.gate != FKDA_GATE_BOUNDED) /* a bounded gate's half chunk is at least -40 */
      by_levels = group_sync_or(me.group, me.active() && !(-sum0 <= ANCHOR_RANGE && -sum1 <= ANCHOR_RANGE));

    if (by_levels && me.active()) /* the raw gates have been read by everyone: their place holds g now */
#pragma unroll
      for (int i = 0; i < 8; ++i)
        *reinterpret_cast<float2 *>(&shared.g[(me.half * 8 + i) * K + 2 * me.pair]) =
            make_float2(g[2 * i], g[2 * i + 1]);

    /* Everything that the state warps will read is made before the buffer is asked for: the shorter the
     * way from empty to full, the less they wait. */
    uint32_t k_new[8], q_new[8], k_end[8], k_end_low[8], k_inverse[8];
    Squares squares;
    const auto store_squares = [&] {
      if (me.active() && has_squares(me.lane))
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = (me.lane >> 2) + 8 * h;
          shared.squares[0][row][me.warp] = squares.k[h];
          shared.squares[1][row][me.warp] = squares.q[h];
          shared.squares[2][row][me.warp] = squares.product[h];
        }
    };
    float2 decay; /* half 0: e^m, half 1: e^{G_C} */
    if (me.active()) {
      squares.sum(shared.q, shared.k, me.warp, me.lane);
      uint32_t k2[8], q2[8]; /* all before the first store, which they would wait for */
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        k2[i] = *reinterpret_cast<const uint32_t *>(&shared.k[me.place(i)]);
        q2[i] = *reinterpret_cast<const uint32_t *>(&shared.q[me.place(i)]);
      }
      /* The anchor m is the sum over half 0; R = G_C - m the sum over half 1. */
      const float other0 = __shfl_xor_sync(0xffffffffu, sum0, 16);
      const float other1 = __shfl_xor_sync(0xffffffffu, sum1, 16);
      const float end0 = exp2_approx(me.half ? sum0 : other0);
      const float end1 = exp2_approx(me.half ? sum1 : other1);
      decay = make_float2(exp2_approx(me.half ? other0 + sum0 : sum0),
                          exp2_approx(me.half ? other1 + sum1 : sum1));
      /* D = G - m: behind the anchor a sum from it on; before it, minus the sum up to it. */
      float D0 = me.half ? 0 : -sum0, D1 = me.half ? 0 : -sum1;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        D0 += g[2 * i];
        D1 += g[2 * i + 1];
        const float k0 = low_of(k2[i]), k1 = high_of(k2[i]), q0 = low_of(q2[i]), q1 = high_of(q2[i]);
        const float e0 = exp2_approx(D0), e1 = exp2_approx(D1);
        const float inverse0 = k0 * exp2_approx(-D0), inverse1 = k1 * exp2_approx(-D1);
        k_new[i] = pack(k0 * e0, k1 * e1);
        q_new[i] = pack(q0 * e0, q1 * e1);
        split(inverse0 * end0, inverse1 * end1, k_end[i], k_end_low[i]);
        k_inverse[i] = pack(inverse0, inverse1);
        if (!HAS_SOLVER) /* nobody has read the last chunk's since the group's last barrier */
          *reinterpret_cast<uint32_t *>(&shared.k_inverse[me.place(i)]) = k_inverse[i];
      }
    }
    if (!HAS_SOLVER) store_squares();
    if (!by_levels) { /* the raw rows have been read, by this warp alone */
      __syncwarp();
      load(chunk + GROUPS);
    }
    if (turn) wait(block.empty[me.group], turn - 1);
    if (HAS_SOLVER) store_squares(); /* the last chunk's triangles are behind the whole group only now */
    /* Lane i of a half warp has the norm and beta of token i: -L_ij = -beta_i |k_i|^-1 A_ij |k_j|^-1. */
    const int token = me.lane & 15;
    float norm, beta, L_scale[4], triangle[4];
    const auto scale_triangle = [&] {
      norm = norm_of<K>(p, shared.squares[me.warp >> 1][token]);
      beta = raw_beta.beta(p, chunk * CHUNK + token < length());
      const float factor = -beta * norm;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        L_scale[i] = __shfl_sync(0xffffffffu, factor, triangle_row(i, me.lane)) *
                     __shfl_sync(0xffffffffu, norm, triangle_column(i, me.lane, me.warp));
    };
    if (by_levels) {
      const float4 all = factors_by_levels<K>(shared);
      triangle[0] = all.x, triangle[1] = all.y, triangle[2] = all.z, triangle[3] = all.w;
      arrive(block.factored[me.group]);
      group_sync(me.group);
      scale_triangle();
      load(chunk + GROUPS);
    } else {
      if (me.active()) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int place = me.place(i);
          *reinterpret_cast<uint32_t *>(&to.k[place]) = k_new[i];
          *reinterpret_cast<uint32_t *>(&to.q[place]) = q_new[i];
          *reinterpret_cast<uint32_t *>(&to.k_end[place]) = k_end[i];
          *reinterpret_cast<uint32_t *>(&to.k_end_low[place]) = k_end_low[i];
          if (HAS_SOLVER) *reinterpret_cast<uint32_t *>(&shared.k_inverse[place]) = k_inverse[i];
        }
        *reinterpret_cast<float2 *>(&(me.half ? to.decay : to.to_anchor)[2 * me.pair]) = decay;
      }
      arrive(block.factored[me.group]);
      group_sync(me.group);
      scale_triangle();
      multiply_triangle<K>(triangle, me.warp < 2 ? to.k : to.q, shared.k_inverse, me.warp, me.lane);
    }

    /* (9): -L to the solver; P to the state warps. Above the diagonal zero, whatever the product holds. */
    if (me.warp < 2) {
      if (me.warp == 0 && me.lane < CHUNK) to.norm_k[token] = norm, to.beta[token] = beta;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = triangle_row(i, me.lane), column = triangle_column(i, me.lane, me.warp);
        shared.A[row][column] = row > column ? triangle[i] * L_scale[i] : 0;
      }
    } else {
      if (me.warp == 2 && me.lane < CHUNK) to.norm_q[token] = task.scale * norm;
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = triangle_row(i, me.lane), column = triangle_column(i, me.lane, me.warp);
        *reinterpret_cast<uint32_t *>(&to.P[row * CHUNK + column]) =
            pack(row >= column ? triangle[i] : 0, row > column ? triangle[i + 1] : 0);
      }
      /* A token meets its own key without decay: what rounding Q' and K^ costs is spared where gates are strong
       * and little else is left. */
      if (has_squares(me.lane)) {
        const int row = (me.warp & 1) * 8 + (me.lane >> 2);
        to.P[row * CHUNK + row] = __float2bfloat16_rn(sum_of_parts<K>(shared.squares[2][row]));
      }
    }
    if (HAS_SOLVER) {
      arrive(block.triangles[me.group]);
    } else {
      group_sync(me.group);
      if (me.warp == turn % GROUP_WARPS) invert<K>(shared, me.lane); /* the warps take turns */
    }
    arrive(block.solved[me.group]);
  }
}

template <int K, int VP>
__device__ void run_solver(Shared<K, VP> &block, const BlockTask &task) {
  const int chunks = task.chunks;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int group = chunk % GROUPS;
    wait(block.triangles[group], chunk / GROUPS);
    invert<K>(block.groups[group], fresh_lane());
    arrive(block.solved[group]);
  }
}

/* ---- state warps ----------------------------------------------------------------------------------- */

/* A warp's part of S: value rows M tiles of 16, channels K / 8 tiles of 8, in mma accumulator layout.
 * Accumulator i of tile (m, n): value row 16 m + lane / 4 + 8 (i / 2), channel 8 n + 2 (lane % 4) + i % 2. */
template <int K, int M>
struct State {
  float s[M][K / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < K / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
  }
  /* As device.cuh moves them. */
  __device__ __forceinline__ float (&rows())[K / 2] {
    static_assert(M == 1, "one tile of rows");
    return reinterpret_cast<float(&)[K / 2]>(s[0]);
  }
  __device__ __forceinline__ void load(const fkda_states &from, int layout, int64_t offset, int v_first) {
    StateRows<K>::load(rows(), from, layout, offset, v_first);
  }
  __device__ __forceinline__ void store(const fkda_states &to, int layout, int64_t offset, int v_first) {
    StateRows<K>::store(rows(), to, layout, offset, v_first);
  }
};

template <int K, int VP>
__device__ void run_state_warps(const fkda_portable_params &params, Shared<K, VP> &shared,
                                const BlockTask &task) {
  constexpr int M = 1;        /* tiles of 16 value rows a warp */
  constexpr int COLUMNS = 16; /* value columns a warp */
  constexpr int PITCH = Shared<K, VP>::V_PITCH;
  const fkda_problem &p = params.problem;
  constexpr bool ROOMY = Shared<K, VP>::ROOMY;
  const int held_warp = threadIdx.x / 32, held_lane = threadIdx.x & 31;
  const int held_length = task.length, held_chunks = task.chunks;
  const auto state_warp = [&] {
    return (ROOMY ? held_warp : fresh_warp()) - Shared<K, VP>::STATES / 32;
  };
  const auto get_lane = [&] { return ROOMY ? held_lane : fresh_lane(); };
  const auto length = [&] { return ROOMY ? held_length : task.length; };
  const auto chunks = [&] { return ROOMY ? held_chunks : task.chunks; };
  const auto first_column = [&] { return task.v_begin + state_warp() * COLUMNS; };

  /* A lane moves half a row of 16 columns at a time: its place in v and out, for the next chunk. */
  const auto place_of = [&](int64_t stride, int t) {
    return (t + get_lane() / 2) * stride + state_warp() * COLUMNS + get_lane() % 2 * 8;
  };
  const bf16 *held_v = task.v + place_of(p.v.stride_t, 0);
  bf16 *held_out = task.out + place_of(p.out.stride_t, 0);
  const auto load_pieces = [&](int chunk) { /* zeros beyond the sequence */
    const int t = chunk * CHUNK, row = get_lane() / 2;
    bf16 *to = shared.v[chunk % V_STAGES][state_warp()];
    if (params.aligned_v)
      copy_piece(to + row * PITCH + get_lane() % 2 * 8,
                 ROOMY ? held_v : task.v + place_of(p.v.stride_t, t), row < length() - t);
    if (ROOMY) held_v += CHUNK * p.v.stride_t;
    cute::cp_async_fence();
  };
  const auto load_elements = [&](int chunk) {
    if (!params.aligned_v)
      copy_elements<COLUMNS>(task.v + state_warp() * COLUMNS + chunk * CHUNK * p.v.stride_t,
                             p.v.stride_t, length() - chunk * CHUNK, [&](int r, int c) {
                               return shared.v[chunk % V_STAGES][state_warp()] + r * PITCH + c;
                             });
  };
  load_elements(0);
  load_pieces(0);

  State<K, M> S;
  if (task.load_initial)
    S.load(p.initial, p.layout,
           task.initial_slot * p.initial.stride_slot + task.head * p.initial.stride_head, first_column());
  else
    S.clear();
  Checkpoints checkpoints(p);

#pragma unroll 1
  for (int chunk = 0;; ++chunk) {
    const int done = chunk < chunks() ? chunk * CHUNK : length();
    if (checkpoints.due(done, chunk == chunks()))
      checkpoints.visit(p, task, done, chunk == chunks(),
                        [&](const fkda_states &to, int64_t offset) {
                          S.store(to, p.layout, offset, first_column());
                        });
    if (chunk == chunks()) break;
    load_elements(chunk + 1); /* its place was left by the chunk before */
    wait(shared.factored[chunk % GROUPS], chunk / GROUPS);

    load_pieces(chunk + 1);
    int lane = get_lane();
    const Factors<K> &f0 = shared.groups[chunk % GROUPS].factors;
    /* X[v,i] = sum_k S[v,k] e^m K'[i,k] (n = 0, 1) and Q' (n = 2, 3); S <- S e^{G_C} on the way. */
    float X[M][4][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) X[m][n][i] = 0;
    /* matrices: tokens 0-7 channels 0-7, tokens 0-7 channels 8-15, tokens 8-15 likewise */
    const int b_at = at((lane & 7) + ((lane >> 4) << 3), ((lane >> 3) & 1) * 8);
#pragma unroll
    for (int k = 0; k < K; k += 16) {
      uint32_t bk[4], bq[4];
      load_matrices(bk, f0.k + b_at + k / 16 * BLOCK);
      load_matrices(bq, f0.q + b_at + k / 16 * BLOCK);
      float2 in[2], decay[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        in[h] = *reinterpret_cast<const float2 *>(&f0.to_anchor[k + 8 * h + 2 * (lane & 3)]);
        decay[h] = *reinterpret_cast<const float2 *>(&f0.decay[k + 8 * h + 2 * (lane & 3)]);
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        uint32_t a[4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float(&s)[4] = S.s[m][k / 8 + h];
          a[2 * h] = pack(s[0] * in[h].x, s[1] * in[h].y);
          a[2 * h + 1] = pack(s[2] * in[h].x, s[3] * in[h].y);
          s[0] *= decay[h].x, s[1] *= decay[h].y, s[2] *= decay[h].x, s[3] *= decay[h].y;
        }
        mma(X[m][0], a, bk[0], bk[1]);
        mma(X[m][1], a, bk[2], bk[3]);
        mma(X[m][2], a, bq[0], bq[1]);
        mma(X[m][3], a, bq[2], bq[3]);
      }
    }

    cute::cp_async_wait<1>(); /* this chunk's v: all but the last load */
    const auto again = [&] { return ROOMY ? chunk : fresh(chunk); };
    const int group = again() % GROUPS;
    wait(shared.solved[group], again() / GROUPS);
    const Factors<K> &f = shared.groups[group].factors;
    bf16 *tile = shared.v[again() % V_STAGES][state_warp()];
    lane = get_lane();
    float2 norm_k[2], beta[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      norm_k[n] = *reinterpret_cast<const float2 *>(&f.norm_k[8 * n + 2 * (lane & 3)]);
      beta[n] = *reinterpret_cast<const float2 *>(&f.beta[8 * n + 2 * (lane & 3)]);
    }
    uint32_t T_high[4], T_low[4], P[4];
    {
      const int place = ((lane & 7) + ((lane >> 4) << 3)) * CHUNK + ((lane >> 3) & 1) * 8;
      const int transposed = ((lane & 7) + ((lane >> 3) & 1) * 8) * CHUNK + (lane >> 4) * 8;
      load_transposed(T_high, f.T_high + transposed);
      load_transposed(T_low, f.T_low + transposed);
      load_matrices(P, f.P + place);
    }
    uint32_t U[M][4]; /* U / |k|, as A operand: value rows x tokens */
#pragma unroll
    for (int m = 0; m < M; ++m) {
      uint32_t values[4]; /* tokens 0-7 v 0-7, tokens 0-7 v 8-15, tokens 8-15 likewise; transposed */
      load_transposed(values, tile + ((lane & 7) + ((lane >> 4) << 3)) * PITCH + 16 * m +
                                  ((lane >> 3) & 1) * 8);
      /* W = beta (v - X / |k|), in two bf16 parts: U then keeps f32's accuracy up to its own rounding */
      uint32_t high[4], low[4];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t vv = values[2 * n + h];
          const float w0 = beta[n].x * fmaf(-norm_k[n].x, X[m][n][2 * h], low_of(vv));
          const float w1 = beta[n].y * fmaf(-norm_k[n].y, X[m][n][2 * h + 1], high_of(vv));
          split(w0, w1, high[2 * n + h], low[2 * n + h]);
        }
      /* (10) U[v,i] = sum_j W[v,j] T[i,j] */
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float u[4] = {0, 0, 0, 0}, rest[4] = {0, 0, 0, 0}; /* two chains: low comes after high */
        mma(u, high, T_low[2 * n], T_low[2 * n + 1]);
        mma(u, high, T_high[2 * n], T_high[2 * n + 1]);
        mma(rest, low, T_high[2 * n], T_high[2 * n + 1]);
#pragma unroll
        for (int h = 0; h < 2; ++h)
          U[m][2 * n + h] = pack((u[2 * h] + rest[2 * h]) * norm_k[n].x,
                                 (u[2 * h + 1] + rest[2 * h + 1]) * norm_k[n].y);
      }
    }

    /* (12) S[v,k] += sum_j U[v,j] K-[j,k] */
    const int k_at = at(lane & 15, (lane >> 4) * 8);
#pragma unroll
    for (int k = 0; k < K; k += 16) {
#pragma unroll
      for (const bf16 *part : {f.k_end_low, f.k_end}) {
        uint32_t b[4]; /* tokens 0-7, 8-15 of channels 0-7, then of channels 8-15 */
        load_transposed(b, part + k_at + k / 16 * BLOCK);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma(S.s[m][k / 8], U[m], b[0], b[1]);
          mma(S.s[m][k / 8 + 1], U[m], b[2], b[3]);
        }
      }
    }

    /* (11) O[v,i] = scale/|q_i| (X[v,i] + sum_j U[v,j] P[i,j]), over V in shared memory */
    float2 norm_q[2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
      norm_q[n] = *reinterpret_cast<const float2 *>(&f.norm_q[8 * n + 2 * (lane & 3)]);
    arrive(shared.empty[group]);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float(&o)[4] = X[m][2 + n];
        mma(o, U[m], P[2 * n], P[2 * n + 1]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t column = pack(o[2 * h] * norm_q[n].x, o[2 * h + 1] * norm_q[n].y);
          uint32_t row; /* 8 x 8 transposed: token lane / 4, value columns 2 (lane % 4), + 1 */
          cute::SM75_U32x1_MOVM_T::copy(column, row);
          *reinterpret_cast<uint32_t *>(tile + (8 * n + (lane >> 2)) * PITCH + 16 * m + 8 * h +
                                        2 * (lane & 3)) = row;
        }
      }
    __syncwarp();
    const int t = chunk * CHUNK, tokens = length() - t;
    if (params.aligned_out) {
      bf16 *to = ROOMY ? held_out : task.out + place_of(p.out.stride_t, t);
      if (lane / 2 < tokens)
        *reinterpret_cast<uint4 *>(to) =
            *reinterpret_cast<const uint4 *>(tile + lane / 2 * PITCH + lane % 2 * 8);
    } else {
      bf16 *to = task.out + state_warp() * COLUMNS + t * p.out.stride_t;
      for (int i = lane; i < CHUNK * COLUMNS && i < tokens * COLUMNS; i += 32)
        to[i / COLUMNS * p.out.stride_t + i % COLUMNS] = tile[i / COLUMNS * PITCH + i % COLUMNS];
    }
    if (ROOMY) held_out += CHUNK * p.out.stride_t;
    __syncwarp();
  }
}

template <int K, int VP>
__device__ __forceinline__ void prefill(const fkda_portable_params &params) {
  extern __shared__ __align__(128) char memory[];
  static_assert(Shared<K, VP>::THREADS == FKDA_PORTABLE_PREFILL_THREADS(VP), "threads");
  static_assert(sizeof(Shared<K, VP>) == FKDA_PORTABLE_PREFILL_SHARED(K, VP),
                "shared memory");
  Shared<K, VP> &shared = *reinterpret_cast<Shared<K, VP> *>(memory);
  if (threadIdx.x == 0) {
    for (int group = 0; group < GROUPS; ++group) {
      init(shared.factored[group], GROUP_WARPS);
      init(shared.triangles[group], GROUP_WARPS);
      init(shared.solved[group], GROUP_WARPS + (Shared<K, VP>::HAS_SOLVER ? 1 : 0));
      init(shared.empty[group], Shared<K, VP>::STATE_WARPS);
    }
    shared.task = find_task(params, VP);
  }
  __syncthreads();
  const BlockTask &task = shared.task;
  if (task.skip) return;
  if (threadIdx.x < Shared<K, VP>::STATES)
    run_factor_warps<K, VP>(params, shared, task);
  else if (Shared<K, VP>::HAS_SOLVER && threadIdx.x >= Shared<K, VP>::SOLVER)
    run_solver<K, VP>(shared, task);
  else
    run_state_warps<K, VP>(params, shared, task);
}

}  // namespace
}  // namespace fkda

#define FKDA_ENTRY(K, VP)                                                                       \
  extern "C" __global__ void __launch_bounds__(FKDA_PORTABLE_PREFILL_THREADS(VP), 1)            \
      fkda_portable_prefill_k##K##_v##VP(const __grid_constant__ fkda_portable_params params) { \
    fkda::prefill<K, VP>(params);                                                                   \
  }
FKDA_PORTABLE_PREFILL_LIST(FKDA_ENTRY)
