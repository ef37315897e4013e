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

/* Two columns of 8 of T^T, a a pair of T's rows each, times the columns' r beta, to T in two parts. As stmatrix takes them:
 * lanes 0-15 say where rows of the high part are, of `a` and then of `b`, the other lanes the low part's. */
__device__ __forceinline__ void store_parts(uint32_t at, const float (&a)[2], const float (&b)[2],
                                            float a_scale, float b_scale) {
  const float a0 = a[0] * a_scale, a1 = a[1] * a_scale, b0 = b[0] * b_scale, b1 = b[1] * b_scale;
  const uint32_t a_high = pack(a0, a1), b_high = pack(b0, b1);
  store_matrices(at, a_high, b_high, pack_rest(a0, a1, a_high), pack_rest(b0, b1, b_high));
}

/* By blocks: the four 8 x 8 on the diagonal by forward substitution, a column a lane; then, for 8 and for 16,
 * T21 = T22 L21 T11 as (T11^T L21^T) T22^T, whose first product has the layout of the second's operand.
 * Columns of T take the place of L: T[i][j] lies at L[j][i] within diagonal blocks. Leaves T_ij r_j beta_j.
 * Loops, for the sake of the instruction cache, which all roles share; the first ones in pairs only, where solvers have time
 * to spare: with 128 columns a block they cost 1 percent. */
template <bool PAIR, class H>
__device__ __forceinline__ void invert(float (&L)[CHUNK][CHUNK + 4], H &to, int lane) {
  constexpr int PITCH = CHUNK + 4;
  const uint32_t T = address(to.T_high); /* and the low part behind it */
  static_assert(sizeof to.T_high == SQUARE, "parts one after the other");
  {
    const int block = lane & 24, c = lane & 7;
    const float *from = &L[block][block]; /* (j, j) */
    float *column = &L[lane][block];
    uint32_t at = T + in_square(lane, block);
    const float scale = to.column[lane];
    /* From row j on; rows below the block are read, too, and nothing comes of them. */
    float x[8] = {};
#pragma unroll(4)
    for (int j = 0; j < 8; j += 2) {
      float2 l[8];
#pragma unroll
      for (int i = 1; i < 8; ++i) l[i] = *reinterpret_cast<const float2 *>(from + i * PITCH);
      __syncwarp();
      const float x0 = x[0] + (c == j ? 1.0f : 0.0f);
      const float x1 = fmaf(l[1].x, x0, x[1] + (c == j + 1 ? 1.0f : 0.0f));
      *reinterpret_cast<float2 *>(column) = make_float2(x0, x1);
      const float a = x0 * scale, b = x1 * scale;
      const uint32_t high = pack(a, b);
      store_shared(at, high);
      store_shared(at + SQUARE, pack_rest(a, b, high));
#pragma unroll
      for (int i = 2; i < 8; ++i) x[i - 2] = fmaf(l[i].y, x1, fmaf(l[i].x, x0, x[i]));
      x[6] = x[7] = 0;
      from += 2 * PITCH + 2, column += 2, at += 2 * sizeof(bf16);
    }
  }
  __syncwarp();
  const int g = lane >> 2, t = 2 * (lane & 3);
  const int part = lane >> 4, row = lane & 7, second = lane >> 3 & 1; /* for store_parts() */
  const auto pair_at = [&](int row, int column) {
    return *reinterpret_cast<const float2 *>(&L[row][column]);
  };
  /* Of 16 and 16: T11^T but for its blocks of 8 and 8, which come last, and L21^T, 8 columns after the other. */
  Split<4> a;
  Split<2> b[2];
  const auto load_sixteen = [&] {
    const float2 a0 = pair_at(g, t), a3 = pair_at(8 + g, 8 + t);
    a.set(0, a0.x, a0.y), a.clear(1), a.set(3, a3.x, a3.y);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 L21 = pair_at(16 + 8 * n + g, t + 8 * i);
        b[n].set(i, L21.x, L21.y);
      }
  };
  if (PAIR) load_sixteen();
  { /* two pairs of 8 at once: the one in rows and k 0-7 of the product, the other in 8-15 */
    Split<4> c;
    Split<2> d;
    c.clear(1), c.clear(2);
    float y[4];
    constexpr int NEXT = 16 * PITCH + 16; /* from one pair to the other */
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const float2 T11 = pair_at(16 * pair + g, 16 * pair + t);
      y[2 * pair] = T11.x, y[2 * pair + 1] = T11.y;
    }
    const float *from = &L[8 + g][t]; /* L21, then T22 */
    int step = 1;
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        c.set(3 * pair, y[2 * pair], y[2 * pair + 1]);
        d.set(pair, from[pair * NEXT], from[pair * NEXT + step]);
      }
      multiply_split(y, c, d);
      from = &L[8 + t][8 + g], step = PITCH;
    }
    *reinterpret_cast<float2 *>(&L[16 + g][24 + t]) = make_float2(y[2], y[3]);
    store_parts(T + part * SQUARE + in_square(16 * second + row, 16 * second + 8), {y[0], y[1]},
                {y[2], y[3]}, to.column[g], to.column[16 + g]);
    if (!PAIR) load_sixteen();
    a.set(2, y[0], y[1]);
  }
  __syncwarp();
  {
    Split<4> y; /* T11^T L21^T, 8 columns after the other */
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float d[4];
      multiply_split(d, a, b[n]);
#pragma unroll
      for (int i = 0; i < 2; ++i) y.set(2 * n + i, d[2 * i], d[2 * i + 1]);
    }
    const float scale0 = to.column[g], scale8 = to.column[8 + g];
#pragma unroll
    for (int n = 0; n < 16; n += 8) {
      Split<2> c;
      c.set(0, L[16 + t][16 + n + g], L[16 + t + 1][16 + n + g]);
      c.set(1, n ? L[24 + t][24 + g] : 0,
            n ? L[24 + t + 1][24 + g] : 0); /* nothing above T's diagonal */
      float z[4];
      multiply_split(z, y, c);
      store_parts(T + part * SQUARE + in_square(8 * second + row, 16 + n), {z[0], z[1]},
                  {z[2], z[3]}, scale0, scale8);
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

/* Where the factors of chunk number `count` of a pair's block are, and go in the other block. */
template <class S>
struct Gift {
  static constexpr int FOREIGN = S::PAIR ? S::FOREIGN : 1;
  Shared<S> &shared;
  int number, slot, handover, place, before; /* before: whose places it takes */
  __device__ __forceinline__ Gift(Shared<S> &shared, uint32_t count)
      : shared(shared),
        number(uniform(count)),
        slot(number % S::SLOTS),
        handover(number % S::HANDOVERS),
        place(number % FOREIGN),
        before(number - FOREIGN) {}

  __device__ __forceinline__ const Barrier &free() const {
    return shared.slot_free[before % S::SLOTS];
  }
  __device__ __forceinline__ uint32_t free_parity() const { return before / S::SLOTS & 1; }

  /* One thread: the slot, which completes as the handover does. */
  __device__ __forceinline__ void send_slot() const {
    const uint32_t other = 1 - cluster_rank();
    const Barrier &full = shared.handover_full[S::HANDOVERS + place];
    full.arrive_and_expect_tx(sizeof shared.slots[0] + sizeof shared.handover[0], other);
    copy_to_block(shared.slots[slot], shared.slots[S::SLOTS + place], sizeof shared.slots[0], full,
                  other);
  }

  /* Sends the slot ahead, which is complete as soon as there is an L, if the other block has given back the places. Has it? */
  __device__ __forceinline__ bool send_ahead() const {
    if (before >= 0 && !uniform(free().test_wait(free_parity()))) return false;
    if (cute::elect_one_sync()) send_slot();
    __syncwarp();
    return true;
  }

  /* All that has not been sent, once it is complete and the other block has given back the places. */
  __device__ __forceinline__ void send(bool slot_sent) const {
    wait_idly(shared.handover_full[handover], number / S::HANDOVERS & 1);
    if (!slot_sent && before >= 0) wait_idly(free(), free_parity());
    if (cute::elect_one_sync()) {
      if (!slot_sent) send_slot();
      copy_to_block(&shared.handover[handover], &shared.handover[S::HANDOVERS + place],
                    sizeof shared.handover[0], shared.handover_full[S::HANDOVERS + place],
                    1 - cluster_rank());
    }
    __syncwarp();
  }
};

/* A warp: every SOLVERS-th chunk. */
template <class S, class Params>
__device__ void solve(const Params &params, Shared<S> &shared, int solver) {
  int chunk = first_chunk<S>(solver); /* of its task; may lie beyond it, in the next */
  uint32_t count = solver;            /* chunks that the block makes before this one */
  const int own_lane = threadIdx.x & 31;
  each_task(shared, [&](const Task &task, int) {
#pragma unroll 1
    for (; chunk < task.chunks; chunk += S::BLOCKS * SOLVERS, count += SOLVERS) {
      /* A pair's solvers have registers for addresses. */
      const int lane = S::PAIR ? own_lane : fresh_lane();
      const int stage = count % S::HANDOVERS;
      const int system = S::SYSTEMS == SOLVERS ? solver : count % S::SYSTEMS;
      const int turn = S::SYSTEM_TURNS == SOLVERS ? solver : count % S::SYSTEM_TURNS;
      wait_idly(shared.L_full[turn], count / S::SYSTEM_TURNS & 1);
      bool slot_sent = false;
      if (S::PAIR && !S::WALK) slot_sent = Gift<S>(shared, count).send_ahead();
      typename Shared<S>::Handover &to = shared.handover[stage];
      if (S::WALK) {
        const int place = place_of<S>(task, chunk);
        const bool parallel = nearly_parallel(shared.L[system], to.column, to.norm_k,
                                              task.length - place * CHUNK, lane);
        if (lane == 0) to.collinear = parallel;
        keep_in_record<S>(params, task, place, to, lane);
      }
      invert<S::PAIR>(shared.L[system], to, lane);
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
      if (S::PAIR) Gift<S>(shared, count).send(slot_sent);
    }
    chunk -= task.chunks;
  });
}

}  // namespace fkda

#endif
