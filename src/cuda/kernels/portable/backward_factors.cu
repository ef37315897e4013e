/* Backward, first launch: what the walks need of a chunk of 32 tokens and a value head, whatever the state is.
 *
 * A block is a chunk and head. A thread has the tokens lane / 4 + 8 b and pairs of channels 2 (lane % 4) of its
 * warp's, which is how 8 x 8 matrices are stored without a conflict and without a shuffle.
 *
 * M and P of (9) come from two 16-token squares on the diagonal, each measured from the anchor in its middle, and
 * the square below them, measured from the first half's end, where every exponent is <= 0. Where gates leave
 * the anchor's range the diagonal squares are summed over a tree of anchors as in prefill.cu.
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
  float squares[2][FACTOR_WARPS][STEP]; /* [k, q]: each warp's part of |k|^2, |q|^2 */
  float norm_k[STEP], norm_q[STEP], beta[STEP];
};

/* Two neighbouring elements. */
__device__ __forceinline__ uint32_t load_pair(const bf16 *from, bool aligned) {
  if (aligned) return __ldg(reinterpret_cast<const unsigned int *>(from));
  const uint16_t *x = reinterpret_cast<const uint16_t *>(from);
  return __ldg(x) | (uint32_t)__ldg(x + 1) << 16;
}

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
__device__ __forceinline__ void multiply(float (&acc)[4], const FactorsShared<K> &s,
                                         const FactorJob &job) {
  const int lane = threadIdx.x & 31;
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
__device__ __forceinline__ void solve(FactorsShared<K> &s, bf16 *Z_high, bf16 *Z_low) {
  const int lane = threadIdx.x & 31;
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

template <int K>
__device__ __forceinline__ void make_factors(const Backward &x, FactorsShared<K> &s) {
  constexpr int C = K / 32; /* a warp's tiles of 8 channels */
  const fkda_problem &p = x.problem;
  const uint32_t id = blockIdx.x / heads_of(p);
  const int head = (int)(blockIdx.x % heads_of(p)), chunk = (int)(id & 1);
  const int64_t row = id >> 1;
  Block block;
  if (!find_block(p, row, block)) return;
  const int64_t t = block.t + chunk * STEP;
  const int tokens = block.tokens - chunk * STEP; /* may be negative: a chunk of nothing */
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int first = warp * (K / 4) + 2 * (lane & 3), token = lane >> 2;
  const int qk_head = qk_head_of(p, head);
  char *record = Workspace<K>(x).record(row, head, chunk);

  uint32_t q[4][C], k[4][C];
  float g[4][C][2];
  {
    const bool g_is_f32 = p.g.dtype == FKDA_F32;
    const bf16 *q_from = static_cast<const bf16 *>(p.q.data) + row_of(p.q, block.span, t, qk_head);
    const bf16 *k_from = static_cast<const bf16 *>(p.k.data) + row_of(p.k, block.span, t, qk_head);
    const int64_t g_from = row_of(p.g, block.span, t, head);
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const bool valid = 8 * b + token < tokens;
      const int64_t at = 8 * b + token;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int channel = first + 8 * c;
        q[b][c] = k[b][c] = 0;
        g[b][c][0] = g[b][c][1] = 0;
        if (valid) {
          q[b][c] = load_pair(q_from + at * p.q.stride_t + channel, x.aligned_q);
          k[b][c] = load_pair(k_from + at * p.k.stride_t + channel, x.aligned_k);
          const int64_t g_at = g_from + at * p.g.stride_t + channel;
          if (g_is_f32 && x.aligned_g) {
            const float2 pair = __ldg(
                reinterpret_cast<const float2 *>(static_cast<const float *>(p.g.data) + g_at));
            g[b][c][0] = pair.x, g[b][c][1] = pair.y;
          } else if (g_is_f32) {
            g[b][c][0] = __ldg(static_cast<const float *>(p.g.data) + g_at);
            g[b][c][1] = __ldg(static_cast<const float *>(p.g.data) + g_at + 1);
          } else {
            const uint32_t pair =
                load_pair(static_cast<const bf16 *>(p.g.data) + g_at, x.aligned_g);
            g[b][c][0] = low_of(pair), g[b][c][1] = high_of(pair);
          }
        }
      }
    }
  }

  /* |k|^2, |q|^2 */
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    float k2 = 0, q2 = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      k2 = fmaf(low_of(k[b][c]), low_of(k[b][c]), fmaf(high_of(k[b][c]), high_of(k[b][c]), k2));
      q2 = fmaf(low_of(q[b][c]), low_of(q[b][c]), fmaf(high_of(q[b][c]), high_of(q[b][c]), q2));
    }
#pragma unroll
    for (int width = 1; width < 4; width *= 2) {
      k2 += __shfl_xor_sync(0xffffffffu, k2, width);
      q2 += __shfl_xor_sync(0xffffffffu, q2, width);
    }
    if ((lane & 3) == 0)
      s.squares[0][warp][8 * b + token] = k2, s.squares[1][warp][8 * b + token] = q2;
  }

  /* (2), then its running sums over tokens; ends: G after each eight tokens */
  float ends[4][C][2];
  {
    const float exp_A = exp_A_of(p, head);
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float bias = p.dt_bias.data ? load_float(p.dt_bias.data, p.dt_bias.dtype,
                                                       (int64_t)head * K + first + 8 * c + e)
                                          : 0.0f;
        const Gate gate(p, p.gate, exp_A, bias);
        float carry = 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          float y = g[b][c][e];
          if (p.gate == FKDA_GATE_BOUNDED)
            y = gate.decay<FKDA_GATE_BOUNDED>(y);
          else if (p.gate == FKDA_GATE_SOFTPLUS)
            y = gate.decay<FKDA_GATE_SOFTPLUS>(y);
          else
            y = gate.decay<FKDA_GATE_DIRECT>(y);
          if (8 * b + token >= tokens) y = 0;
#pragma unroll
          for (int width = 4; width < 32; width *= 2) {
            const float before = __shfl_up_sync(0xffffffffu, y, width);
            if (lane >= width) y += before;
          }
          g[b][c][e] = carry + y;
          carry += __shfl_sync(0xffffffffu, y, 28 | (lane & 3));
          ends[b][c][e] = carry;
        }
      }
  }
  bool over = false;
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int b = 0; b < 4; ++b)
        over |= !((b ? ends[b - 1][c][e] : 0) - ends[b][c][e] <= ANCHOR_RANGE);
  const bool by_levels = __syncthreads_or(over && p.gate != FKDA_GATE_BOUNDED);

  if (threadIdx.x < STEP) {
    const int i = threadIdx.x;
    const float norm_k =
        p.l2norm ? rsqrtf(squares_of(s.squares[0], i) + (float)FKDA_L2NORM_EPS) : 1;
    const float norm_q =
        (float)p.scale *
        (p.l2norm ? rsqrtf(squares_of(s.squares[1], i) + (float)FKDA_L2NORM_EPS) : 1);
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

  bf16 *const k_start = reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_K_START(K));
  bf16 *const k_end = reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_K_END(K));
  bf16 *const q_start = reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_Q_START(K));
  const auto put = [](bf16 *tile, int place, float a, float b) {
    *reinterpret_cast<uint32_t *>(tile + place) = pack(a, b);
  };
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int column = warp * (K / 4) + 8 * c;
    if (token == 0)
      *reinterpret_cast<float2 *>(record + FKDA_BACKWARD_DECAY(K) + 4 * (first + 8 * c)) =
          make_float2(exp2_approx(ends[3][c][0]), exp2_approx(ends[3][c][1]));
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int place = tile_at<K>(8 * b, column) + lane * 2; /* of 32 tokens */
      const int place16 = tile_at<K>(8 * (b & 1), column) + lane * 2;
      const float k0 = low_of(k[b][c]), k1 = high_of(k[b][c]);
      const float q0 = low_of(q[b][c]), q1 = high_of(q[b][c]);
      const float norm_q =
          (float)p.scale *
          (p.l2norm ? rsqrtf(squares_of(s.squares[1], 8 * b + token) + (float)FKDA_L2NORM_EPS) : 1);
      const float(&G)[2] = g[b][c];
      float start[2], end[2], middle[2]; /* e^G, e^{G_C - G}, and against the chunk's middle */
      if (!by_levels) {
        float after[2], before[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float m = ends[b & 2][c][e], a = ends[1][c][e];
          after[e] = exp2_approx(G[e] - m), before[e] = exp2_approx(m - G[e]);
          start[e] = after[e] * exp2_approx(m);
          end[e] = before[e] * exp2_approx(ends[3][c][e] - m);
          middle[e] = b < 2 ? before[e] * exp2_approx(a - m) : after[e] * exp2_approx(m - a);
        }
        put(s.k_row, place, k0 * after[0], k1 * after[1]);
        put(s.q_row, place, q0 * after[0], q1 * after[1]);
        put(s.k_column, place, k0 * before[0], k1 * before[1]);
      } else {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float a = ends[1][c][e];
          start[e] = exp2_approx(G[e]);
          end[e] = exp2_approx(ends[3][c][e] - G[e]);
          middle[e] = exp2_approx(b < 2 ? a - G[e] : G[e] - a);
        }
      }
      put(k_start, place, k0 * start[0], k1 * start[1]);
      put(k_end, place, k0 * end[0], k1 * end[1]);
      put(q_start, place, q0 * start[0] * norm_q, q1 * start[1] * norm_q);
      if (b < 2) {
        put(s.k_early, place16, k0 * middle[0], k1 * middle[1]);
      } else {
        put(s.k_late, place16, k0 * middle[0], k1 * middle[1]);
        put(s.q_late, place16, q0 * middle[0], q1 * middle[1]);
      }
    }
  }

  float acc[FACTOR_JOBS][4];
  clear(acc);
  if (by_levels) {
    /* Two rows i > j part at the highest bit in which they differ; the tokens that this bit splits have their
     * anchor there. Width 0 is the diagonal. */
#pragma unroll 1
    for (int width = 8; width >= 0; width = width > 1 ? width / 2 : width - 1) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int i = 8 * (b & 1) + token;
        const bool after = i & width;
        const int anchor = ((token & ~(2 * width - 1)) + width - 1) & 7;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const int place = tile_at<K>(8 * b, warp * (K / 4) + 8 * c) + lane * 2;
          float e[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float near = __shfl_sync(0xffffffffu, g[b][c][h], anchor * 4 + (lane & 3));
            const float a = width == 8 ? ends[b & 2][c][h] : near;
            e[h] = width ? exp2_approx(after ? g[b][c][h] - a : a - g[b][c][h]) : 1;
          }
          const float row0 = after || !width ? e[0] : 0, row1 = after || !width ? e[1] : 0;
          const float column0 = after ? 0 : e[0], column1 = after ? 0 : e[1];
          put(s.k_row, place, low_of(k[b][c]) * row0, high_of(k[b][c]) * row1);
          put(s.q_row, place, low_of(q[b][c]) * row0, high_of(q[b][c]) * row1);
          put(s.k_column, place, low_of(k[b][c]) * column0, high_of(k[b][c]) * column1);
        }
      }
      __syncthreads();
#pragma unroll
      for (int n = 0; n < FACTOR_JOBS; ++n) {
        const FactorJob job(warp, n);
        if (job.square == 2 && width) continue;
        float part[4] = {0, 0, 0, 0};
        multiply<K>(part, s, job);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = token + 4 * (i & 2), column = 8 * job.half + 2 * (lane & 3) + (i & 1);
          const int highest = r == column ? 0 : 1 << (31 - __clz(r ^ column));
          if (job.square == 2 || highest == width) acc[n][i] += part[i];
        }
      }
      __syncthreads();
    }
  } else {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < FACTOR_JOBS; ++n) multiply<K>(acc[n], s, FactorJob(warp, n));
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
      float y0 = acc[n][i] * norm * norm_k.x, y1 = acc[n][i + 1] * norm * norm_k.y;
      if (job.of_q) {
        put(P, tile_at<STEP>(row0 + 4 * i, column0 + 8 * job.half) + lane * 2, r >= column ? y0 : 0,
            r > column ? y1 : 0);
      } else {
        s.M[r][column] = r > column ? y0 : 0;
        s.M[r][column + 1] = r > column + 1 ? y1 : 0;
      }
    }
  }
  __syncthreads();
  if (warp == 0)
    solve<K>(s, reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_Z_HIGH(K)),
             reinterpret_cast<bf16 *>(record + FKDA_BACKWARD_Z_LOW(K)));
}

}  // namespace
}  // namespace fkda

#define FKDA_ENTRY(K)                                                                              \
  extern "C" __global__ void __launch_bounds__(FKDA_BACKWARD_FACTORS_THREADS, 2)                   \
      fkda_portable_backward_factors_k##K(                                                         \
          const __grid_constant__ fkda_portable_backward_params x) {                               \
    __shared__ __align__(16) fkda::FactorsShared<K> shared;                                        \
    fkda::make_factors<K>(x, shared);                                                              \
  }
FKDA_BACKWARD_BY_K(FKDA_ENTRY)
