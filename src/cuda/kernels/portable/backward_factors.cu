/* Backward, first launch: what the walks need of a chunk of 32 tokens and a value head, whatever the state is.
 *
 * A block is a chunk and head; behind the walk of the row sm90 a few blocks do those that it has left. A thread has the tokens lane / 4 + 8 b and pairs of channels 2 (lane % 4) of its
 * warp's, which is how 8 x 8 matrices are stored without a conflict and without a shuffle.
 *
 * M and P of (9) come from two 16-token squares on the diagonal, each measured from the anchor in its middle, and
 * the square below them, measured from the first half's end, where every exponent is <= 0. Where gates leave
 * the anchor's range the diagonal squares are summed over a tree of anchors as in prefill.cu. P's diagonal, which no decay
 * is in, comes from the raw rows: with strong gates little else is left of (22), on which d_beta hangs.
 *
 * In place of (I + A)^-1 it is Z = (I + M diag(beta))^-1 M, by forward substitution in f32:
 *   E = R - Z diag(beta) R of R = V - K~ S^T,   diag(beta)^-1 dV = dU - Z^T diag(beta) dU
 * so that both need no division by a beta, and what they change little is not rounded. */
#include "cuda/kernels/portable/backward.cuh"

namespace fkda {
namespace {

constexpr int FACTOR_WARPS = FKDA_BACKWARD_FACTORS_THREADS / 32;
constexpr int FACTOR_JOBS = 3; /* a warp's tiles of 16 x 8 of M and P: six squares, four warps */

template <int K>
struct FactorsShared {
  bf16 k_row[STEP * K], q_row[STEP * K]; /* k e^{G - m}, q e^{G - m}, by 16 tokens */
  bf16 k_column[STEP * K];               /* k e^{m - G} */
  bf16 k_late[16 * K], q_late[16 * K];   /* tokens 16..31 from the middle on */
  bf16 k_early[16 * K];                  /* tokens 0..15 up to the middle */
  float M[STEP][STEP + 4];
  float squares[3][FACTOR_WARPS][STEP]; /* each warp's part of |k|^2, |q|^2, q k */
  float norm_k[STEP], norm_q[STEP], beta[STEP];
  float neighbours[STEP];                         /* product of a key and the one before */
  uint32_t chunks[FKDA_BACKWARD_FACTORS_THREADS]; /* of heads that are left; 0: of others */
};

__device__ __forceinline__ float squares_of(const float (&parts)[FACTOR_WARPS][STEP], int token) {
  return (parts[0][token] + parts[1][token]) + (parts[2][token] + parts[3][token]);
}

/* Rows and columns of a warp's job: tile `half` of 8 columns of a square: 0, 1 on the diagonal, 2 below. */
struct FactorJob {
  int of_q, square, half;
  __device__ __forceinline__ FactorJob(int warp, int i) {
    const int job = (warp & 1) * FACTOR_JOBS + i;
    of_q = warp >> 1;
    square = job >> 1;
    half = job & 1;
  }
};

template <int K>
__device__ __forceinline__ void multiply(int thread, float (&acc)[4], const FactorsShared<K> &s,
                                         const FactorJob &job) {
  const int lane = thread & 31;
  const bf16 *rows = job.square == 2 ? (job.of_q ? s.q_late : s.k_late)
                                     : (job.of_q ? s.q_row : s.k_row) + job.square * 16 * K;
  const bf16 *columns = job.square == 2 ? s.k_early : s.k_column + job.square * 16 * K;
  const int b_at =
      (lane >> 4) * SQUARE + (2 * job.half + (lane >> 3 & 1)) * MATRIX + (lane & 7) * 8;
  float odd[4] = {0, 0, 0, 0};
#pragma unroll
  for (int k = 0; k < K / 16; k += 2) {
    uint32_t r0[4], r1[4], b[4];
    load_square(r0, rows, k);
    load_square(r1, rows, k + 1);
    load_matrices(b, columns + k * SQUARE + b_at);
    const uint32_t a0[4] = {r0[0], r0[2], r0[1], r0[3]}, a1[4] = {r1[0], r1[2], r1[1], r1[3]};
    mma(acc, a0, b[0], b[1]);
    mma(odd, a1, b[2], b[3]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] += odd[i];
}

/* Z in place of M, negative. One warp, a column a lane: z_i = M_ic - sum_{j<i} M_ij beta_j z_j. */
template <int K>
__device__ __forceinline__ void solve(int thread, FactorsShared<K> &s, bf16 *Z_high, bf16 *Z_low) {
  const int lane = thread & 31;
  float x[STEP];
#pragma unroll
  for (int i = 0; i < STEP; ++i) x[i] = i > lane ? s.M[i][lane] : 0;
#pragma unroll
  for (int j = 0; j < STEP; j += 4) {
    const float4 beta = *reinterpret_cast<const float4 *>(&s.beta[j]);
    const float z0 = -beta.x * x[j];
    float z1 = 0, z2 = 0, z3 = 0;
#pragma unroll
    for (int i = j + 1; i < STEP; ++i) {
      const float4 r = *reinterpret_cast<const float4 *>(&s.M[i][j]);
      x[i] = fmaf(r.x, z0, x[i]);
      if (i > j + 1) x[i] = fmaf(r.y, z1, x[i]);
      if (i > j + 2) x[i] = fmaf(r.z, z2, x[i]);
      if (i > j + 3) x[i] = fmaf(r.w, z3, x[i]);
      if (i == j + 1) z1 = -beta.y * x[i];
      if (i == j + 2) z2 = -beta.z * x[i];
      if (i == j + 3) z3 = -beta.w * x[i];
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < STEP; ++i) s.M[i][lane] = -x[i];
  __syncwarp();
#pragma unroll
  for (int row = 0; row < STEP / 8; ++row)
#pragma unroll
    for (int column = 0; column < STEP / 8; ++column) {
      const int place = tile_at<STEP>(8 * row, 8 * column) + lane * 2;
      const float2 z = *reinterpret_cast<const float2 *>(
          &s.M[8 * row + (lane >> 2)][8 * column + 2 * (lane & 3)]);
      uint32_t high, low;
      split(z.x, z.y, high, low);
      *reinterpret_cast<uint32_t *>(Z_high + place) = high;
      *reinterpret_cast<uint32_t *>(Z_low + place) = low;
    }
}

/* A thread's elements: [b][c], token lane / 4 + 8 b, channels 2 (lane % 4) and + 1 of the warp's tile c of 8. */
template <int K>
struct Mine {
  static constexpr int C = K / 32;
  uint32_t q[4][C], k[4][C];
  float g[4][C][2]; /* raw, then log2-decays, then their running sums */
};

/* Rows of pairs of channels; zeros beyond the sequence. Element: what a pair is. */
template <int K, class Element, class Pair>
__device__ __forceinline__ void load_pairs(int thread, Pair (&to)[4][K / 32], const fkda_rows &rows,
                                           int64_t first, int tokens) {
  const int lane = thread & 31;
  const Element *from = static_cast<const Element *>(rows.data) + first +
                        (lane >> 2) * rows.stride_t + thread / 32 * (K / 4) + 2 * (lane & 3);
#pragma unroll
  for (int b = 0; b < 4; ++b) {
#pragma unroll
    for (int c = 0; c < K / 32; ++c) {
      Pair pair = {};
      if (8 * b + (lane >> 2) < tokens) pair = __ldg(reinterpret_cast<const Pair *>(from + 8 * c));
      to[b][c] = pair;
    }
    from += 8 * rows.stride_t;
  }
}

template <int K>
__device__ __forceinline__ void load_elements(int thread, uint32_t (&to)[4][K / 32],
                                              const fkda_rows &rows, int64_t first, int tokens) {
  const int lane = thread & 31;
  first += thread / 32 * (K / 4) + 2 * (lane & 3);
#pragma unroll
  for (int b = 0; b < 4; ++b)
#pragma unroll
    for (int c = 0; c < K / 32; ++c) {
      const int token = 8 * b + (lane >> 2);
      const uint16_t *at =
          static_cast<const uint16_t *>(rows.data) + first + token * rows.stride_t + 8 * c;
      to[b][c] = token < tokens ? __ldg(at) | (uint32_t)__ldg(at + 1) << 16 : 0;
    }
}

template <int K>
__device__ __forceinline__ void load_mine(int thread, Mine<K> &mine, const Backward &x,
                                          const fkda_span &span, int64_t t, int tokens, int head) {
  const fkda_problem &p = x.problem;
  const int qk_head = qk_head_of(p, head);
  const int64_t q = row_of(p.q, span, t, qk_head), k = row_of(p.k, span, t, qk_head);
  const int64_t g = row_of(p.g, span, t, head);
  constexpr int C = K / 32;
  if (p.g.dtype == FKDA_F32) {
    float2 raw[4][C];
    if (x.aligned_g) {
      load_pairs<K, float>(thread, raw, p.g, g, tokens);
    } else {
      const int lane = thread & 31;
      const float *from =
          static_cast<const float *>(p.g.data) + g + thread / 32 * (K / 4) + 2 * (lane & 3);
#pragma unroll
      for (int b = 0; b < 4; ++b)
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const int token = 8 * b + (lane >> 2);
          const float *at = from + token * p.g.stride_t + 8 * c;
          raw[b][c] = token < tokens ? make_float2(__ldg(at), __ldg(at + 1)) : make_float2(0, 0);
        }
    }
    if (x.aligned_q && x.aligned_k) {
      load_pairs<K, bf16>(thread, mine.k, p.k, k, tokens);
      load_pairs<K, bf16>(thread, mine.q, p.q, q, tokens);
    } else {
      load_elements<K>(thread, mine.k, p.k, k, tokens);
      load_elements<K>(thread, mine.q, p.q, q, tokens);
    }
#pragma unroll
    for (int b = 0; b < 4; ++b)
#pragma unroll
      for (int c = 0; c < C; ++c) mine.g[b][c][0] = raw[b][c].x, mine.g[b][c][1] = raw[b][c].y;
  } else {
    uint32_t raw[4][C];
    if (x.aligned_q && x.aligned_k && x.aligned_g) {
      load_pairs<K, bf16>(thread, raw, p.g, g, tokens);
      load_pairs<K, bf16>(thread, mine.k, p.k, k, tokens);
      load_pairs<K, bf16>(thread, mine.q, p.q, q, tokens);
    } else {
      load_elements<K>(thread, raw, p.g, g, tokens);
      load_elements<K>(thread, mine.k, p.k, k, tokens);
      load_elements<K>(thread, mine.q, p.q, q, tokens);
    }
#pragma unroll
    for (int b = 0; b < 4; ++b)
#pragma unroll
      for (int c = 0; c < C; ++c)
        mine.g[b][c][0] = low_of(raw[b][c]), mine.g[b][c][1] = high_of(raw[b][c]);
  }
}

/* (2), no decay beyond the sequence. */
template <int MODE, int K>
__device__ __forceinline__ void apply_gate(int thread, Mine<K> &mine, const fkda_problem &p,
                                           int tokens, int head) {
  const int lane = thread & 31;
  const float exp_A = exp_A_of(p, head);
  float bias[K / 32][2];
#pragma unroll
  for (int c = 0; c < K / 32; ++c)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      bias[c][e] =
          p.dt_bias.data
              ? load_float(p.dt_bias.data, p.dt_bias.dtype,
                           (int64_t)head * K + thread / 32 * (K / 4) + 8 * c + 2 * (lane & 3) + e)
              : 0.0f;
#pragma unroll
  for (int c = 0; c < K / 32; ++c)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Gate gate(p, MODE, exp_A, bias[c][e]);
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const float y = gate.decay<MODE>(mine.g[b][c][e]);
        mine.g[b][c][e] = 8 * b + (lane >> 2) < tokens ? y : 0;
      }
    }
}

/* G after each eight tokens. */
template <int K>
__device__ __forceinline__ void get_ends(int thread, float (&ends)[4], const Mine<K> &mine, int c,
                                         int e) {
#pragma unroll
  for (int b = 0; b < 4; ++b)
    ends[b] = __shfl_sync(0xffffffffu, mine.g[b][c][e], 28 | (thread & 3));
}

__device__ __forceinline__ void put(bf16 *tile, int place, uint32_t pair) {
  *reinterpret_cast<uint32_t *>(tile + place) = pair;
}
__device__ __forceinline__ void put(bf16 *tile, int place, float a, float b) {
  put(tile, place, pack(a, b));
}

/* (8): tiles of the walks to the record, operands of the triangles to shared memory. LEVELS: those of the diagonal
 * squares come later. */
template <bool LEVELS, int K>
__device__ __forceinline__ void make_tiles(int thread, const Mine<K> &mine, FactorsShared<K> &s,
                                           char *record, const float (&norm_q)[4]) {
  const int warp = thread / 32, lane = thread & 31;
  bf16 *const k_start = reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_K_START(K));
  bf16 *const k_end = reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_K_END(K));
  bf16 *const q_start = reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_Q_START(K));
#pragma unroll
  for (int c = 0; c < K / 32; ++c) {
    const int column = warp * (K / 4) + 8 * c;
    float ends[2][4], from_start[2][2], to_end[2][2], middle[2][2]; /* [e][first, second half] */
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      get_ends(thread, ends[e], mine, c, e);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float m = ends[e][2 * h];
        from_start[e][h] = exp2_approx(m);
        to_end[e][h] = exp2_approx(ends[e][3] - m);
        middle[e][h] = exp2_approx(h ? m - ends[e][1] : ends[e][1] - m);
      }
    }
    if (lane < 4)
      *reinterpret_cast<float2 *>(record + FKDA_BACKWARD_DECAY(K) + 4 * (column + 2 * lane)) =
          make_float2(exp2_approx(ends[0][3]), exp2_approx(ends[1][3]));
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int place = tile_at<K>(8 * b, column) + lane * 2; /* of 32 tokens */
      const int place16 = tile_at<K>(8 * (b & 1), column) + lane * 2;
      const int h = b >> 1;
      const float(&G)[2] = mine.g[b][c];
      float start[2], end[2], late[2]; /* e^G, e^{G_C - G}, and against the chunk's middle */
      const float k0 = low_of(mine.k[b][c]), k1 = high_of(mine.k[b][c]);
      const float q0 = low_of(mine.q[b][c]), q1 = high_of(mine.q[b][c]);
      if (!LEVELS) {
        float after[2], before[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float d = G[e] - ends[e][2 * h];
          after[e] = exp2_approx(d), before[e] = exp2_approx(-d);
          start[e] = after[e] * from_start[e][h];
          end[e] = before[e] * to_end[e][h];
          late[e] = (h ? after[e] : before[e]) * middle[e][h];
        }
        put(s.k_row, place, k0 * after[0], k1 * after[1]);
        put(s.q_row, place, q0 * after[0], q1 * after[1]);
        put(s.k_column, place, k0 * before[0], k1 * before[1]);
      } else {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          start[e] = exp2_approx(G[e]);
          end[e] = exp2_approx(ends[e][3] - G[e]);
          late[e] = exp2_approx(h ? G[e] - ends[e][1] : ends[e][1] - G[e]);
        }
      }
      put(k_start, place, k0 * start[0], k1 * start[1]);
      put(k_end, place, k0 * end[0], k1 * end[1]);
      put(q_start, place, q0 * start[0] * norm_q[b], q1 * start[1] * norm_q[b]);
      put(h ? s.k_late : s.k_early, place16, k0 * late[0], k1 * late[1]);
      if (h) put(s.q_late, place16, q0 * late[0], q1 * late[1]);
    }
  }
}

/* The diagonal squares level by level. Two rows i > j part at the highest bit in which they differ; the tokens that
 * this bit splits have their anchor there. */
template <int K>
__device__ __forceinline__ void multiply_by_levels(int thread, float (&acc)[FACTOR_JOBS][4],
                                                   const Mine<K> &mine, FactorsShared<K> &s) {
  const int warp = thread / 32, lane = thread & 31, token = lane >> 2;
#pragma unroll 1
  for (int width = 8; width; width /= 2) {
    const int anchor = ((token & ~(2 * width - 1)) + width - 1) & 7;
#pragma unroll
    for (int c = 0; c < K / 32; ++c) {
      float ends[2][4];
      get_ends(thread, ends[0], mine, c, 0);
      get_ends(thread, ends[1], mine, c, 1);
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const bool after = (8 * (b & 1) + token) & width;
        const int place = tile_at<K>(8 * b, warp * (K / 4) + 8 * c) + lane * 2;
        float e[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float g = mine.g[b][c][h];
          const float near = __shfl_sync(0xffffffffu, g, anchor * 4 + (lane & 3));
          e[h] = exp2_approx(-fabsf(g - (width == 8 ? ends[h][b & 2] : near)));
        }
        /* q not unpacked before the loop: there are no registers for it */
        const uint32_t k = mine.k[b][c], q = fresh(mine.q[b][c]);
        const uint32_t decayed_k = pack(low_of(k) * e[0], high_of(k) * e[1]);
        const uint32_t decayed_q = pack(low_of(q) * e[0], high_of(q) * e[1]);
        put(s.k_row, place, after ? decayed_k : 0);
        put(s.q_row, place, after ? decayed_q : 0);
        put(s.k_column, place, after ? 0 : decayed_k);
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < FACTOR_JOBS; ++n) {
      const FactorJob job(warp, n);
      if (job.square == 2 && width != 1) continue;
      float part[4] = {0, 0, 0, 0};
      multiply<K>(thread, part, s, job);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = token + 4 * (i & 2), column = 8 * job.half + 2 * (lane & 3) + (i & 1);
        const int highest = r == column ? 0 : 1 << (31 - __clz(r ^ column));
        if (job.square == 2 || highest == width) acc[n][i] += part[i];
      }
    }
    __syncthreads();
  }
}

/* Are most keys of a chunk so nearly parallel to the one before that sums of U lose more by rounding U than by differences
 * of the keys? A token's product with the one before has its decay; with beta 1 it is a cosine of 3/4 that counts, with
 * less, sums of U are longer. A key much shorter than others (padding, 0) has a U so much larger, which is in all later
 * sums and would have to cancel in them: then not. */
template <int K>
__device__ __forceinline__ bool nearly_parallel(int thread, const FactorsShared<K> &s, int tokens) {
  const int token = thread & 31, pairs = (tokens < STEP ? tokens : STEP) - 1;
  const float square = squares_of(s.squares[0], token);
  const float before = __shfl_up_sync(0xffffffffu, square, 1);
  const float strength = s.beta[token] * s.norm_k[token] * s.norm_k[token] * square;
  const float least = (1 - 0.25f * fminf(strength, 1)) * sqrtf(square * before);
  const bool near = token && token <= pairs && s.neighbours[token] > least;
  const float norm = s.norm_k[token <= pairs ? token : 0];
  float most_norm = norm, least_norm = norm;
#pragma unroll
  for (int width = 1; width < 32; width *= 2) {
    most_norm = fmaxf(most_norm, __shfl_xor_sync(0xffffffffu, most_norm, width));
    least_norm = fminf(least_norm, __shfl_xor_sync(0xffffffffu, least_norm, width));
  }
  return pairs > 0 && most_norm <= 2 * least_norm &&
         4 * __popc(__ballot_sync(0xffffffffu, near)) >= 3 * pairs;
}

/* A chunk's keys to its end anew, each less the next. What U loses by rounding, and these, then meet differences: with
 * nearly equal keys next to nothing. */
template <int K>
__device__ __forceinline__ void make_differences(int thread, const Mine<K> &mine, char *record) {
  const int warp = thread / 32, lane = thread & 31;
  bf16 *const k_end = reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_K_END(K));
#pragma unroll
  for (int c = 0; c < K / 32; ++c) {
    float first[2] = {0, 0}; /* of the eight tokens behind */
    float ends[2][4];
    get_ends(thread, ends[0], mine, c, 0);
    get_ends(thread, ends[1], mine, c, 1);
#pragma unroll
    for (int b = 3; b >= 0; --b) {
      float own[2], next[2];
      own[0] = low_of(mine.k[b][c]) * exp2_approx(ends[0][3] - mine.g[b][c][0]);
      own[1] = high_of(mine.k[b][c]) * exp2_approx(ends[1][3] - mine.g[b][c][1]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        next[e] = __shfl_down_sync(0xffffffffu, own[e], 4);
        if (lane >= 28) next[e] = first[e];
        first[e] = __shfl_sync(0xffffffffu, own[e], lane & 3);
      }
      put(k_end, tile_at<K>(8 * b, warp * (K / 4) + 8 * c) + lane * 2, own[0] - next[0],
          own[1] - next[1]);
    }
  }
}

/* Of a chunk, the first or second of a block with the number `row`. thread: threadIdx.x. */
template <int K>
__device__ __forceinline__ void make_factors(int thread, const Backward &x, FactorsShared<K> &s,
                                             const Block &block, int64_t row, int head, int chunk) {
  constexpr int C = K / 32; /* a warp's tiles of 8 channels */
  const fkda_problem &p = x.problem;
  const int64_t t = block.t + chunk * STEP;
  const int tokens = block.tokens - chunk * STEP; /* may be negative: a chunk of nothing */
  const int warp = thread / 32, lane = thread & 31, token = lane >> 2;
  char *record = Workspace<K>(x).record(row, head, chunk);
  Mine<K> mine;
  load_mine(thread, mine, x, block.span, t, tokens, head);

  if (p.gate == FKDA_GATE_BOUNDED)
    apply_gate<FKDA_GATE_BOUNDED>(thread, mine, p, tokens, head);
  else if (p.gate == FKDA_GATE_SOFTPLUS)
    apply_gate<FKDA_GATE_SOFTPLUS>(thread, mine, p, tokens, head);
  else
    apply_gate<FKDA_GATE_DIRECT>(thread, mine, p, tokens, head);

    /* |k|^2, |q|^2, q k */
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    float k2 = 0, q2 = 0, qk = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const uint32_t k = mine.k[b][c], q = mine.q[b][c];
      k2 = fmaf(low_of(k), low_of(k), fmaf(high_of(k), high_of(k), k2));
      q2 = fmaf(low_of(q), low_of(q), fmaf(high_of(q), high_of(q), q2));
      qk = fmaf(low_of(q), low_of(k), fmaf(high_of(q), high_of(k), qk));
    }
#pragma unroll
    for (int width = 1; width < 4; width *= 2) {
      k2 += __shfl_xor_sync(0xffffffffu, k2, width);
      q2 += __shfl_xor_sync(0xffffffffu, q2, width);
      qk += __shfl_xor_sync(0xffffffffu, qk, width);
    }
    if ((lane & 3) == 0)
      s.squares[0][warp][8 * b + token] = k2, s.squares[1][warp][8 * b + token] = q2,
      s.squares[2][warp][8 * b + token] = qk;
  }

  /* Running sums over tokens. */
  bool over = false;
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float carry = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        float y = mine.g[b][c][e];
#pragma unroll
        for (int width = 4; width < 32; width *= 2) {
          const float before = __shfl_up_sync(0xffffffffu, y, width);
          if (lane >= width) y += before;
        }
        mine.g[b][c][e] = carry + y;
        over |= lane >= 28 && !(-y <= ANCHOR_RANGE);
        carry = __shfl_sync(0xffffffffu, mine.g[b][c][e], 28 | (lane & 3));
      }
    }
  const bool by_levels = __syncthreads_or(over && p.gate != FKDA_GATE_BOUNDED);

  const float scale = (float)p.scale;
  if (thread < STEP) {
    const int i = thread;
    const float norm_k =
        p.l2norm ? rsqrtf(squares_of(s.squares[0], i) + (float)FKDA_L2NORM_EPS) : 1;
    const float norm_q =
        scale * (p.l2norm ? rsqrtf(squares_of(s.squares[1], i) + (float)FKDA_L2NORM_EPS) : 1);
    float beta = 0;
    if (i < tokens) {
      beta = load_float(p.beta.data, p.beta.dtype, row_of(p.beta, block.span, t + i, head));
      if (p.beta_is_logit) beta = sigmoid(beta) * (p.allow_neg_eigval ? 2.0f : 1.0f);
    }
    s.norm_k[i] = norm_k, s.norm_q[i] = norm_q, s.beta[i] = beta;
    reinterpret_cast<float *>(record + FKDA_BACKWARD_NORM_K(K))[i] = norm_k;
    reinterpret_cast<float *>(record + FKDA_BACKWARD_NORM_Q(K))[i] = norm_q;
    reinterpret_cast<float *>(record + FKDA_BACKWARD_BETA(K))[i] = beta;
  }
  float norm_q[4];
#pragma unroll
  for (int b = 0; b < 4; ++b)
    norm_q[b] =
        scale *
        (p.l2norm ? rsqrtf(squares_of(s.squares[1], 8 * b + token) + (float)FKDA_L2NORM_EPS) : 1);

  float acc[FACTOR_JOBS][4];
  clear(acc);
  if (by_levels) {
    make_tiles<true>(thread, mine, s, record, norm_q);
    multiply_by_levels(thread, acc, mine, s);
  } else {
    make_tiles<false>(thread, mine, s, record, norm_q);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < FACTOR_JOBS; ++n) multiply<K>(thread, acc[n], s, FactorJob(warp, n));
  }

  bf16 *const P = reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_P(K));
#pragma unroll
  for (int n = 0; n < FACTOR_JOBS; ++n) {
    const FactorJob job(warp, n);
    const int row0 = job.square == 0 ? 0 : 16, column0 = job.square == 1 ? 16 : 0;
    const int column = column0 + 8 * job.half + 2 * (lane & 3);
    const float2 norm_k = *reinterpret_cast<const float2 *>(&s.norm_k[column]);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int r = row0 + token + 4 * i;
      const float norm = job.of_q ? s.norm_q[r] : s.norm_k[r];
      const float y0 = acc[n][i] * norm * norm_k.x, y1 = acc[n][i + 1] * norm * norm_k.y;
      if (job.of_q) {
        put(P, tile_at<STEP>(row0 + 4 * i, column0 + 8 * job.half) + lane * 2, r > column ? y0 : 0,
            r > column + 1 ? y1 : 0);
      } else {
        s.M[r][column] = r > column ? y0 : 0;
        s.M[r][column + 1] = r > column + 1 ? y1 : 0;
        if (r == column + 1) s.neighbours[r] = acc[n][i];
        if (r == column + 2) s.neighbours[r] = acc[n][i + 1];
      }
    }
  }
  __syncthreads();
  if (thread < STEP)
    P[tile_at<STEP>(thread, thread)] = __float2bfloat16_rn(
        squares_of(s.squares[2], thread) * s.norm_q[thread] * s.norm_k[thread]);
  const bool differences = nearly_parallel(thread, s, tokens);
  if (thread == 0) *reinterpret_cast<uint32_t *>(record + FKDA_BACKWARD_PARALLEL(K)) = differences;
  if (differences) make_differences(thread, mine, record);
  if (warp == 0)
    solve<K>(thread, s, reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_Z_HIGH(K)),
             reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_Z_LOW(K)));
}

/* All chunks, one a block of threads. */
template <int K>
__device__ __forceinline__ void make_all(const Backward &x, FactorsShared<K> &s) {
  const uint32_t id = blockIdx.x / heads_of(x.problem);
  const int head = (int)(blockIdx.x % heads_of(x.problem)), chunk = (int)(id & 1);
  const int64_t row = id >> 1;
  Block block;
  if (find_block(x.problem, row, block)) make_factors(threadIdx.x, x, s, block, row, head, chunk);
}

/* Those of the heads that are left, dealt out to a few blocks of threads. Mostly there are none. */
template <int K>
__device__ __forceinline__ void make_left(const Backward &x, FactorsShared<K> &s) {
  constexpr int THREADS = FKDA_BACKWARD_FACTORS_THREADS;
  const fkda_problem &p = x.problem;
  uint32_t turn = blockIdx.x; /* the next chunk, counted from the first one of head first + i */
#pragma unroll 1
  for (uint32_t first = 0; first < (uint32_t)(p.N * p.HV); first += THREADS) {
    const uint32_t own = first + threadIdx.x;
    uint32_t chunks = 0;
    if (own < (uint32_t)(p.N * p.HV) && is_left(x, own)) {
      const int64_t length = clamped_span(p, own / heads_of(p)).length;
      chunks = (uint32_t)((length + BLOCK_TOKENS - 1) / BLOCK_TOKENS) * (BLOCK_TOKENS / STEP);
    }
    if (!__syncthreads_or(chunks)) continue;
    s.chunks[threadIdx.x] = chunks;
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < THREADS; turn -= s.chunks[i++])
#pragma unroll 1
      for (; turn < s.chunks[i]; turn += gridDim.x) {
        const int64_t n = (first + i) / heads_of(p);
        Block block;
        block.span = clamped_span(p, n);
        block.t = turn / 2 * BLOCK_TOKENS;
        block.tokens = (int)min(block.span.length - block.t, (int64_t)BLOCK_TOKENS);
        /* Hidden from the compiler, which would else keep what all rounds compute of it in registers until it runs
         * out of them. */
        int thread = threadIdx.x;
        asm volatile("" : "+r"(thread));
        make_factors(thread, x, s, block, first_block(p, block.span, n) + turn / 2,
                     (int)((first + i) % heads_of(p)), (int)(turn & 1));
        __syncthreads(); /* all have left the shared memory */
      }
  }
}

}  // namespace
}  // namespace fkda

/* Blocks a processor: as many as registers and, from sm_100 on, the compiler let through without a spill. */
#if __CUDA_ARCH__ >= 1000
#define FKDA_BLOCKS 2
#else
#define FKDA_BLOCKS 3
#endif
#define FKDA_ENTRY(K)                                                                              \
  extern "C" __global__ void __launch_bounds__(FKDA_BACKWARD_FACTORS_THREADS, FKDA_BLOCKS)         \
      fkda_portable_backward_factors_k##K(                                                         \
          const __grid_constant__ fkda_portable_backward_params x) {                               \
    __shared__ __align__(16) fkda::FactorsShared<K> shared;                                        \
    if (x.redo)                                                                                    \
      fkda::make_left<K>(x, shared);                                                               \
    else                                                                                           \
      fkda::make_all<K>(x, shared);                                                                \
  }
FKDA_BACKWARD_BY_K(FKDA_ENTRY)
