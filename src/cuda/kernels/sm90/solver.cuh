/* The solver warps: T = (I - L)^-1 of a chunk, L strictly lower, 32 x 32, f32. */
#ifndef FKDA_CUDA_SM90_SOLVER_CUH
#define FKDA_CUDA_SM90_SOLVER_CUH

#include <cute/arch/mma_sm80.hpp>

#include "cuda/kernels/sm90/cluster.cuh"
#include "cuda/kernels/sm90/shared.cuh"

namespace fkda {

/* Operands of m16n8k16 as two bf16 parts, so that products keep 16 bits. */
template <int N>
struct Split {
  uint32_t high[N], low[N];
  __device__ __forceinline__ void set(int i, float a, float b) {
    high[i] = pack(a, b);
    low[i] = pack_rest(a, b, high[i]);
  }
  __device__ __forceinline__ void clear(int i) { high[i] = low[i] = 0; }
};

__device__ __forceinline__ void multiply_split(float (&d)[4], const Split<4> &a,
                                               const Split<2> &b) {
  using Mma = cute::SM80_16x8x16_F32BF16BF16F32_TN;
  float e[4] = {0, 0, 0, 0};
  d[0] = d[1] = d[2] = d[3] = 0;
  Mma::fma(e[0], e[1], e[2], e[3], a.low[0], a.low[1], a.low[2], a.low[3], b.high[0], b.high[1],
           e[0], e[1], e[2], e[3]);
  Mma::fma(d[0], d[1], d[2], d[3], a.high[0], a.high[1], a.high[2], a.high[3], b.high[0], b.high[1],
           d[0], d[1], d[2], d[3]);
  Mma::fma(e[0], e[1], e[2], e[3], a.high[0], a.high[1], a.high[2], a.high[3], b.low[0], b.low[1],
           e[0], e[1], e[2], e[3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += e[i];
}

/* By blocks: the four 8 x 8 on the diagonal by forward substitution, a column a lane; then, for 8 and for 16,
 * T21 = T22 L21 T11 as (T11^T L21^T) T22^T, whose first product has the layout of the second's operand.
 * Columns of T take the place of L: T[i][j] lies at L[j][i] within diagonal blocks. Leaves T_ij r_j beta_j. */
template <class H>
__device__ __forceinline__ void invert(float (&L)[CHUNK][CHUNK + 4], H &to, int lane) {
  const uint32_t T_high = address(to.T_high), T_low = address(to.T_low);
  const auto store_pair = [&](int i, int j, float a,
                              float b) { /* T[i][j], T[i + 1][j] */
                                         const float scale = to.column[j];
                                         const uint32_t high = pack(a * scale, b * scale);
                                         store_shared(T_high + in_square(j, i), high);
                                         store_shared(T_low + in_square(j, i),
                                                      pack_rest(a * scale, b * scale, high));
  };
  {
    const int block = lane & 24, c = lane & 7;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i == c ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j += 4)
#pragma unroll
      for (int i = j + 1; i < 8; ++i) {
        const float4 row = *reinterpret_cast<const float4 *>(&L[block + i][block + j]);
        x[i] = fmaf(row.x, x[j], x[i]);
        if (i > j + 1) x[i] = fmaf(row.y, x[j + 1], x[i]);
        if (i > j + 2) x[i] = fmaf(row.z, x[j + 2], x[i]);
        if (i > j + 3) x[i] = fmaf(row.w, x[j + 3], x[i]);
      }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i += 4)
      *reinterpret_cast<float4 *>(&L[lane][block + i]) =
          make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    const float scale = to.column[lane];
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float a = x[2 * i] * scale, b = x[2 * i + 1] * scale;
      high[i] = pack(a, b);
      low[i] = pack_rest(a, b, high[i]);
    }
    store_shared(T_high + in_square(lane, block), high[0], high[1], high[2], high[3]);
    store_shared(T_low + in_square(lane, block), low[0], low[1], low[2], low[3]);
  }
  __syncwarp();
  const int g = lane >> 2, t = 2 * (lane & 3);
  const auto pair_at = [&](int row, int column) {
    return *reinterpret_cast<const float2 *>(&L[row][column]);
  };
  { /* two pairs of 8 at once: the one in rows and k 0-7 of the product, the other in 8-15 */
    Split<4> a;
    Split<2> b;
    a.clear(1), a.clear(2);
    float y[4];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const float2 T11 = pair_at(16 * pair + g, 16 * pair + t),
                   L21 = pair_at(16 * pair + 8 + g, 16 * pair + t);
      a.set(3 * pair, T11.x, T11.y);
      b.set(pair, L21.x, L21.y);
    }
    multiply_split(y, a, b);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      a.set(3 * pair, y[2 * pair], y[2 * pair + 1]);
      const int first = 16 * pair + 8;
      b.set(pair, L[first + t][first + g], L[first + t + 1][first + g]);
    }
    multiply_split(y, a, b);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      *reinterpret_cast<float2 *>(&L[16 * pair + g][16 * pair + 8 + t]) =
          make_float2(y[2 * pair], y[2 * pair + 1]);
      store_pair(16 * pair + 8 + t, 16 * pair + g, y[2 * pair], y[2 * pair + 1]);
    }
  }
  __syncwarp();
  {
    Split<4> a, y; /* y: T11^T L21^T, 8 columns after the other */
    const float2 a0 = pair_at(g, t), a2 = pair_at(g, 8 + t), a3 = pair_at(8 + g, 8 + t);
    a.set(0, a0.x, a0.y), a.clear(1), a.set(2, a2.x, a2.y), a.set(3, a3.x, a3.y);
    y.clear(0), y.clear(1), y.clear(2), y.clear(3);
    /* Loops, for the sake of the instruction cache, which all roles share. */
#pragma unroll 1
    for (int n = 0; n < 16; n += 8) {
      Split<2> b;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 L21 = pair_at(16 + n + g, t + 8 * i);
        b.set(i, L21.x, L21.y);
      }
      float d[4];
      multiply_split(d, a, b);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        y.high[i] = y.high[i + 2], y.low[i] = y.low[i + 2];
        y.set(i + 2, d[2 * i], d[2 * i + 1]);
      }
    }
#pragma unroll 1
    for (int n = 0; n < 16; n += 8) {
      Split<2> b;
      b.set(0, L[16 + t][16 + n + g], L[16 + t + 1][16 + n + g]);
      b.set(1, n ? L[24 + t][24 + g] : 0,
            n ? L[24 + t + 1][24 + g] : 0); /* nothing above T's diagonal */
      float z[4];
      multiply_split(z, y, b);
      store_pair(16 + n + t, g, z[0], z[1]);
      store_pair(16 + n + t, g + 8, z[2], z[3]);
    }
  }
}

/* Are most keys of a chunk so nearly parallel to the one before that a walk leaves its head to the portable kernels? By their
 * measure (backward_factors.cu). A lane has a token; L_ij = -w_i k_i k_j, decay included, w = beta r^2. */
__device__ __forceinline__ bool nearly_parallel(const float (&L)[CHUNK][CHUNK + 4],
                                                const float *column, const float *norm_k,
                                                int tokens, int lane) {
  const int pairs = (tokens < CHUNK ? tokens : CHUNK) - 1;
  const float strength = -L[lane][lane], product = -L[lane][lane ? lane - 1 : 0];
  const float w = column[lane] * norm_k[lane], least = 1 - 0.25f * fminf(strength, 1);
  const float before = __shfl_up_sync(0xffffffffu, strength, 1),
              w_before = __shfl_up_sync(0xffffffffu, w, 1);
  /* k_i k_j > least |k_i| |k_j|, squared: p^2 / w^2 > least^2 (strength / w) (before / w_before) */
  const bool near =
      lane && lane <= pairs && product * w > 0 &&
      product * product * fabsf(w_before) > least * least * (strength * w) * fabsf(before);
  if (4 * __popc(__ballot_sync(0xffffffffu, near)) < 3 * pairs || pairs <= 0) return false;
  const float norm = norm_k[lane <= pairs ? lane : 0];
  const uint32_t most = __reduce_max_sync(0xffffffffu, __float_as_uint(norm)),
                 fewest = __reduce_min_sync(0xffffffffu, __float_as_uint(norm));
  return __uint_as_float(most) <= 2 * __uint_as_float(fewest);
}

/* Walks leave norms and beta for later, see walk_params.cuh. */
template <class S, class Handover>
__device__ __forceinline__ void keep_in_record(const fkda_sm90_params &, const Task &, int,
                                               const Handover &, int) {}

/* Of a pair: the factors of chunk number `count` of the block, once they are complete, to the other block, once that has
 * given back the places. */
template <class S>
__device__ __forceinline__ void give_to_other(Shared<S> &shared, uint32_t count) {
  constexpr int FOREIGN = S::PAIR ? S::FOREIGN : 1;
  const int number = uniform(count), slot = number % S::SLOTS, handover = number % S::HANDOVERS;
  const int place = number % FOREIGN, before = number - FOREIGN;
  wait_idly(shared.handover_full[handover], number / S::HANDOVERS & 1);
  if (before >= 0) wait_idly(shared.slot_free[before % S::SLOTS], before / S::SLOTS & 1);
  if (cute::elect_one_sync()) {
    const uint32_t other = 1 - cluster_rank();
    const Barrier &full = shared.handover_full[S::HANDOVERS + place];
    full.arrive_and_expect_tx(sizeof shared.slots[0] + sizeof shared.handover[0], other);
    copy_to_block(shared.slots[slot], shared.slots[S::SLOTS + place], sizeof shared.slots[0], full,
                  other);
    copy_to_block(&shared.handover[handover], &shared.handover[S::HANDOVERS + place],
                  sizeof shared.handover[0], full, other);
  }
  __syncwarp();
}

/* A warp: every SOLVERS-th chunk. */
template <class S, class Params>
__device__ void solve(const Params &params, Shared<S> &shared, int solver) {
  int chunk = first_chunk<S>(solver); /* of its task; may lie beyond it, in the next */
  uint32_t count = solver;            /* chunks that the block makes before this one */
  each_task(shared, [&](const Task &task, int) {
#pragma unroll 1
    for (; chunk < task.chunks; chunk += S::BLOCKS * SOLVERS, count += SOLVERS) {
      const int lane = fresh_lane();
      const int stage = count % S::HANDOVERS;
      const int system = S::SYSTEMS == SOLVERS ? solver : count % S::SYSTEMS;
      const int turn = S::SYSTEM_TURNS == SOLVERS ? solver : count % S::SYSTEM_TURNS;
      wait_idly(shared.L_full[turn], count / S::SYSTEM_TURNS & 1);
      typename Shared<S>::Handover &to = shared.handover[stage];
      if (S::WALK) {
        const int place = place_of<S>(task, chunk);
        const bool parallel = nearly_parallel(shared.L[system], to.column, to.norm_k,
                                              task.length - place * CHUNK, lane);
        if (lane == 0) to.collinear = parallel;
        keep_in_record<S>(params, task, place, to, lane);
      }
      invert(shared.L[system], to, lane);
      if (S::WALK) { /* addresses made anew: registers are short */
        __syncwarp();
        float &column = shared.handover[(uint32_t)fresh(count) % S::HANDOVERS].column[fresh_lane()];
        column = reciprocal(column);
      }
      if (!S::WALK && lane == 0) {
        const float4 reach = *reinterpret_cast<const float4 *>(to.reach);
        const float most = fmaxf(fmaxf(reach.x, reach.y), fmaxf(reach.z, reach.w));
        const float limit =
            exp2_approx(fminf(108 - most, 100)); /* U is less than 2^12 times the largest v */
        to.guard = to.collinear ? -limit : limit;
      }
      fence_async();
      arrive_warp(shared.L_free[system]);
      arrive_warp(shared.handover_full[S::WALK ? (uint32_t)fresh(count) % S::HANDOVERS : stage]);
      if (S::PAIR) give_to_other(shared, count);
    }
    chunk -= task.chunks;
  });
}

}  // namespace fkda

#endif
