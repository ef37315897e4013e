/* The factor groups: gates (2), decayed operands (8) in place, the squares (9). */
#ifndef FKDA_CUDA_SM90_FACTORS_CUH
#define FKDA_CUDA_SM90_FACTORS_CUH

#include "cuda/kernels/sm90/shared.cuh"
#include "cuda/kernels/sm90/wgmma.cuh"

namespace fkda {

__device__ __forceinline__ void group_sync(int group) {
  cutlass::arch::NamedBarrier::sync(128, group);
}

enum Queries { NO_QUERIES, QUERIES, QUERIES_WITH_NORM };

/* (2), (8) over one slot, in place of k, q, g: K' = k e^{G-m}, Q' = q e^{G-m}, K^ = k e^{m-G}, m being G after the
 * chunk's first half. A thread owns two channels and one half; it walks away from the anchor, so that its sum
 * of gates is the exponent: 15, 14, .. 0 before the anchor (without the token's own gate), 16, 17, .. 31
 * behind it (with it). Row 15 ^ t or 16 ^ t is token t of the walk, so that all its addresses are one
 * address xor a constant, and the two rows that a warp touches at once lie in different banks. `norm` of walks: that of
 * the lane's token, which goes into Q'. */
template <class S, int MODE, Queries WITH>
__device__ __forceinline__ void decay_operands(uint32_t slot, int warp, int lane,
                                               const Gate (&gate)[2], float (&sum)[2],
                                               float norm = 1) {
  const bool behind = lane >> 4;
  const int column = 32 * (warp & 1) + 2 * (lane & 15);
  uint32_t at = slot + (warp >> 1) * S::SLICE + in_tile(behind ? 16 : 15, column);
  /* g of f32: 32 channels a tile */
  uint32_t g_at = slot + (warp >> 1) * S::SLICE + SLICE_G32 + (warp & 1) * TILE +
                  in_tile(behind ? 16 : 15, (lane & 15) * 4);
  const float unit = MODE == FKDA_GATE_BOUNDED ? gate[0].factor : 1.0f;
  const float step = behind ? unit : -unit;
  sum[0] = sum[1] = SHIFT;
  constexpr int BATCH = MODE == FKDA_GATE_BOUNDED ? 4 : 2;
#pragma unroll 1
  for (int i = 0; i < HALF; i += BATCH) {
    uint32_t k[BATCH], q[BATCH], g[BATCH];
    float2 g_pair[BATCH];
#pragma unroll
    for (int t = 0; t < BATCH; ++t) {
      k[t] = load_shared((at ^ (t * 144)) + SLICE_K);
      if (WITH != NO_QUERIES) q[t] = load_shared((at ^ (t * 144)) + SLICE_Q);
      if (S::GATE_BYTES == 2)
        g[t] = load_shared((at ^ (t * 144)) + SLICE_G);
      else
        g_pair[t] = load_shared_pair(g_at ^ (t * 144));
    }
#pragma unroll
    for (int t = 0; t < BATCH; ++t) {
      const float raw0 = S::GATE_BYTES == 2 ? low_of(g[t]) : g_pair[t].x;
      const float raw1 = S::GATE_BYTES == 2 ? high_of(g[t]) : g_pair[t].y;
      const float g0 = gate[0].unit<MODE>(raw0), g1 = gate[1].unit<MODE>(raw1);
      const float next0 = fmaf(step, g0, sum[0]), next1 = fmaf(step, g1, sum[1]);
      const float D0 = behind ? next0 : sum[0], D1 = behind ? next1 : sum[1];
      sum[0] = next0, sum[1] = next1;
      const float e0 = exp2_approx(D0), e1 = exp2_approx(D1);
      const float f0 = exp2_approx(-D0), f1 = exp2_approx(-D1);
      const float k0 = low_of(k[t]), k1 = high_of(k[t]);
      store_shared((at ^ (t * 144)) + SLICE_K, pack(k0 * e0, k1 * e1));
      if (WITH == QUERIES)
        store_shared((at ^ (t * 144)) + SLICE_Q, pack(low_of(q[t]) * e0, high_of(q[t]) * e1));
      if (WITH == QUERIES_WITH_NORM) {
        const float r = __shfl_sync(0xffffffffu, norm, (behind ? 16 : 15) ^ (i + t));
        store_shared((at ^ (t * 144)) + SLICE_Q,
                     pack(low_of(q[t]) * (e0 * r), high_of(q[t]) * (e1 * r)));
      }
      store_shared((at ^ (t * 144)) + SLICE_G, pack(k0 * f0, k1 * f1));
    }
    const int next = in_tile(i ^ (i + BATCH), 0); /* bits of row and place alike */
    at ^= next;
    if (S::GATE_BYTES == 4) g_at ^= next;
  }
}

/* Rows from `left` on of a slot, made such that nothing comes of them: zeros, and a raw gate without decay. */
template <class S>
__device__ __noinline__ void clear_rows(char *slot, int left, bool direct) {
  const uint32_t no_decay = direct ? 0 : S::GATE_BYTES == 2 ? 0xff80ff80 : 0xff800000; /* -inf */
  const uint4 gates = make_uint4(no_decay, no_decay, no_decay, no_decay);
  for (int i = left * 8 + (threadIdx.x & 127); i < CHUNK * 8; i += 128)
    for (int slice = 0; slice < S::SLICES; ++slice) {
      uint4 *tile = reinterpret_cast<uint4 *>(slot + slice * S::SLICE + i * 16);
      tile[SLICE_K / 16] = tile[SLICE_Q / 16] = make_uint4(0, 0, 0, 0);
      tile[(S::GATE_BYTES == 2 ? SLICE_G : SLICE_G32) / 16] = gates;
      if (S::GATE_BYTES == 4) tile[(SLICE_G32 + TILE) / 16] = gates;
    }
}

/* [K; Q] X^T, 64 x 32, on its way; X lies at `columns_at` of a slice. */
template <class S>
__device__ __forceinline__ void start_squares(float (&square)[16], uint32_t slot,
                                              int columns_at = SLICE_G) {
  const uint64_t rows = tile_descriptor(slot + SLICE_K),
                 columns = tile_descriptor(slot + columns_at);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < S::K; k += 16) {
    const uint32_t step = (k / 64 * S::SLICE + k % 64 * 2) / 16;
    multiply(square, rows + step, columns + step, k > 0);
  }
  cute::warpgroup_commit_batch();
}

/* Of a warp's rows of a product of 32 x 32 (rows 16-31 if `low`) what lies on the diagonal in row lane / 4 + 8 h, which is `odd` or
 * not: in the lane with lane % 4 == lane / 8. */
__device__ __forceinline__ float on_diagonal(const float (&square)[16], bool low, bool odd, int h) {
  const float even_one = low ? square[4 * (2 + h) + 2 * h] : square[4 * h + 2 * h];
  const float odd_one = low ? square[4 * (2 + h) + 2 * h + 1] : square[4 * h + 2 * h + 1];
  return odd ? odd_one : even_one;
}

/* q k and |q|^2 of a chunk's tokens: the diagonals of [k; q] q^T. By wgmma, as mma would wait for all that other groups
 * have given the tensor cores. */
template <class S>
__device__ __forceinline__ void measure_queries(typename Shared<S>::Tokens &tokens, uint32_t slot,
                                                int warp, int lane) {
  float square[16];
  start_squares<S>(square, slot, SLICE_Q);
  cute::warpgroup_wait<0>();
  fence(square);
  if ((lane & 3) != lane >> 3) return;
  float *to = (warp < 2 ? tokens.product : tokens.square) + 16 * (warp & 1) + (lane >> 2);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    to[8 * h] = on_diagonal(square, warp & 1, lane >> 2 & 1, h);
  }
}

/* The squares of a chunk whose gates are too strong for one anchor, and what its state groups need. Two different
 * rows i > j part at the highest bit in which i and j differ; the block of 2 width rows that this bit splits has its
 * anchor there, and e^{G_i-a}, e^{a-G_j} are both <= 1: of each row there is one, so that K' serves as K^ too. First the
 * diagonal, then five widths; last (width 32) K' and Q' in the frame of the chunk's begin, K^ in those of the ends of
 * its halves, which the state is decayed to before it takes them. Every pass overwrites k and q, so that the copy engine
 * brings them anew. `sums`: what the thread's channels decay by in its half, `first_half` in the first. Registers are
 * short: own[128 e] is the thread's accumulator e. */
template <class S, class Params>
__device__ __forceinline__ void factors_by_levels(const Params &params, Shared<S> &shared,
                                                  const Task &task, int begin, int stage,
                                                  const Gate (&gate)[2], const float *sums,
                                                  const float *first_half, float *own) {
  const fkda_problem &p = problem_of(params);
  const auto group = [] { return fresh_warp() / 4 - S::STATE_GROUPS; };
  const auto channel_of = [] { return 32 * (fresh_warp() & 3) + 2 * (fresh_lane() & 15); };
  const auto half_of_thread = [] { return fresh_lane() >> 4 << 4; }; /* its first row */
#pragma unroll
  for (int e = 0; e < 16; ++e) own[e * 128] = 0;
#pragma unroll 1
  for (int width = 0; width <= CHUNK; width = width ? 2 * width : 1) {
    group_sync(group()); /* nobody's products read what this pass overwrites */
    if (width != 1) {    /* that of 0 left them as they are: six times, an even number */
      const Barrier &full = shared.reloaded[group()];
      if ((fresh(threadIdx.x) & 127) == 0) {
        const bool gates = width == 0 && S::GATE_BYTES == 2; /* which the walk has overwritten */
        full.arrive_and_expect_tx(S::SLICES * TILE * (gates ? 3 : 2));
        char *slot = shared.slots[stage];
#pragma unroll 1
        for (int slice = 0; slice < S::SLICES; ++slice, slot += S::SLICE) {
          load_box(params.k, full, slot + SLICE_K, 64 * slice, task.begin + begin, task.qk_head,
                   task.b);
          load_box(params.q, full, slot + SLICE_Q, 64 * slice, task.begin + begin, task.qk_head,
                   task.b);
          if (gates)
            load_box(params.g, full, slot + SLICE_G, 64 * slice, task.begin + begin, task.head,
                     task.b);
        }
      }
      wait(full, width == 0 || width == 4 || width == 16 ? 0 : 1);
    }
#pragma unroll 1
    for (int back = 0; width && channel_of() < S::K && back < (width == CHUNK ? 1 : 2); ++back) {
      float sum[2] = {0, 0};
#pragma unroll 1
      for (int i = 0; i < HALF; ++i) {
        const int row = half_of_thread() + (back ? HALF - 1 - i : i);
        const bool mine = width == CHUNK || (row & width ? !back : back);
        if (!mine) continue;
        if (width < CHUNK && (row & (width - 1)) == (back ? width - 1 : 0)) sum[0] = sum[1] = 0;
        const uint32_t slice = address(shared.slots[stage]) + channel_of() / 64 * S::SLICE;
        const uint32_t at = slice + in_tile(row, channel_of() & 63);
        uint32_t k = load_shared(at + SLICE_K), q = load_shared(at + SLICE_Q);
        float2 raw;
        if (S::GATE_BYTES == 4) {
          raw = load_shared_pair(slice + SLICE_G32 + (channel_of() >> 5 & 1) * TILE +
                                 in_tile(row, (channel_of() & 31) * 2));
        } else {
          const uint32_t pair = load_shared(at + SLICE_G);
          raw = make_float2(low_of(pair), high_of(pair));
        }
        float2 decay;
        if (p.gate == FKDA_GATE_SOFTPLUS)
          decay = make_float2(gate[0].template decay<FKDA_GATE_SOFTPLUS>(raw.x),
                              gate[1].template decay<FKDA_GATE_SOFTPLUS>(raw.y));
        else
          decay = make_float2(gate[0].template decay<FKDA_GATE_DIRECT>(raw.x),
                              gate[1].template decay<FKDA_GATE_DIRECT>(raw.y));
        if (begin + row >= task.length) { /* rows of whatever follows the sequence */
          k = q = 0;
          decay = make_float2(0, 0);
        }
        if (!back) sum[0] += decay.x, sum[1] += decay.y;
        float2 before = make_float2(0, 0);
        if (width == CHUNK && half_of_thread())
          before = load_shared_pair(address(first_half) + 4 * channel_of());
        const float e0 = exp2_approx(before.x + sum[0]), e1 = exp2_approx(before.y + sum[1]);
        if (back) sum[0] += decay.x, sum[1] += decay.y;
        store_shared(at + SLICE_K, pack(low_of(k) * e0, high_of(k) * e1));
        if (!back) store_shared(at + SLICE_Q, pack(low_of(q) * e0, high_of(q) * e1));
        if (width == CHUNK) /* a difference of two sums: its error is far below bf16's */
          store_shared(at + SLICE_G, pack(low_of(k) * exp2_approx(sums[0] - sum[0]),
                                          high_of(k) * exp2_approx(sums[1] - sum[1])));
      }
    }
    fence_async();
    if (width == CHUNK) break;
    group_sync(group());
    float level[16];
    start_squares<S>(level, address(shared.slots[uniform(stage)]), SLICE_K);
    cute::warpgroup_wait<0>();
    fence(level);
    const int first = 16 * (fresh_warp() & 1) + (fresh_lane() >> 2);
    const int apart_first = first ^ 2 * (fresh_lane() & 3);
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const int apart = apart_first ^ (8 * (e >> 1 & 1) ^ 8 * (e >> 2) ^ (e & 1));
      const bool there = begin + first + 8 * (e >> 1 & 1) < task.length;
      if (there && (width ? apart >= width && apart < 2 * width : apart == 0))
        own[e * 128] = level[e];
    }
  }
}

/* scale/|q| (1) or scale of a token. */
template <class S>
__device__ __forceinline__ float norm_of(const fkda_problem &p,
                                         const typename Shared<S>::Tokens &tokens, int token) {
  return p.l2norm ? (float)p.scale * rsqrtf(tokens.square[token] + (float)FKDA_L2NORM_EPS)
                  : (float)p.scale;
}

/* (2), (8) of a slot, whatever the gate. */
template <class S, Queries WITH>
__device__ __forceinline__ void decay_operands(const fkda_problem &p, uint32_t slot, int warp,
                                               int lane, const Gate (&gate)[2], float (&sum)[2],
                                               float norm = 1) {
  if (S::BOUNDED)
    decay_operands<S, FKDA_GATE_BOUNDED, WITH>(slot, warp, lane, gate, sum, norm);
  else if (p.gate == FKDA_GATE_SOFTPLUS)
    decay_operands<S, FKDA_GATE_SOFTPLUS, WITH>(slot, warp, lane, gate, sum, norm);
  else
    decay_operands<S, FKDA_GATE_DIRECT, WITH>(slot, warp, lane, gate, sum, norm);
}

/* A token with beta 0 loses what (10) computes for it, of which the gradient by beta is made; with this one nobody sees it. */
constexpr float LEAST_BETA = 0x1p-60f;

/* Until the place of chunk number `count` may be written. */
template <class S>
__device__ __forceinline__ void wait_for_handover(const Shared<S> &shared,
                                                  const Ring<S::HANDOVERS> &out, uint32_t count) {
  if (count < S::HANDOVERS) return;
  if (!S::PAIR) {
    wait(shared.handover_free[out.stage], out.parity ^ 1);
  } else if (S::HANDOVERS < S::SLOTS) { /* else with the slot, which the loader has waited for */
    const uint32_t before = count - S::HANDOVERS;
    wait(shared.slot_free[before % S::SLOTS], before / S::SLOTS & 1);
  }
}

template <class S, class Params>
__device__ void run_factors(const Params &params, Shared<S> &shared) {
  const fkda_problem &p = problem_of(params);
  const int first = threadIdx.x / 128 - S::STATE_GROUPS;
  Ring<S::SLOTS> ring;
  ring.next(first);
  int chunk = first_chunk<S>(first); /* of its task; may lie beyond it, in the next */
  uint32_t count = first;            /* chunks that the block makes before this one */
  each_task(shared, [&](const Task &task, int) {
    if (chunk >= task.chunks) {
      chunk -= task.chunks;
      return;
    }
    const float exp_A =
        p.A_log.data ? expf(load_float(p.A_log.data, p.A_log.dtype, task.head)) : 1.0f;
    float bias[2] = {0, 0};
    {
      const int warp = fresh_warp() & 3, lane = fresh_lane();
      if (32 * warp < S::K && p.dt_bias.data)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          bias[i] = load_float(p.dt_bias.data, p.dt_bias.dtype,
                               (int64_t)task.head * S::K + 32 * warp + 2 * (lane & 15) + i);
    }
    const int mode = S::BOUNDED ? FKDA_GATE_BOUNDED : p.gate;
    const Gate gate[2] = {{p, mode, exp_A, bias[0]}, {p, mode, exp_A, bias[1]}};
    /* A lane of warp 2 has a token's beta, loaded a turn ahead: it comes from device memory. */
    const auto load_beta = [&](int which) -> uint32_t {
      const int t = place_of<S>(task, which) * CHUNK + fresh_lane();
      if (t >= task.length || (S::WALK && t < 0)) return 0;
      const int64_t i = first_row(p.beta, task, fresh(task.head)) + (int64_t)t * p.beta.stride_t;
      return p.beta.dtype == FKDA_F32 ? static_cast<const uint32_t *>(p.beta.data)[i]
                                      : static_cast<const uint16_t *>(p.beta.data)[i];
    };
    uint32_t raw_beta = (fresh_warp() & 3) == 2 ? load_beta(chunk) : 0;

#pragma unroll 1
    for (; chunk < task.chunks; chunk += S::BLOCKS * S::FACTOR_GROUPS, count += S::FACTOR_GROUPS,
                                ring.next(S::FACTOR_GROUPS)) {
      float square[16], sum[2] = {0, 0};
      bool by_levels = false;
      { /* what it needs is alive no longer than this: registers are short where chunks go by levels */
        const int left = task.length - place_of<S>(task, chunk) * CHUNK;
        const int warp = fresh_warp() & 3, lane = fresh_lane();
        const int group = fresh_warp() / 4 - S::STATE_GROUPS;
        typename Shared<S>::Tokens &tokens = shared.tokens[group][count / S::FACTOR_GROUPS & 1];
        if (warp == 2) {
          float beta = __uint_as_float(p.beta.dtype == FKDA_F32 ? raw_beta : raw_beta << 16);
          if (p.beta_is_logit) beta = (p.allow_neg_eigval ? 2.0f : 1.0f) * sigmoid(beta);
          if (lane >= left) beta = 0;
          if (S::WALK && fabsf(beta) < LEAST_BETA) beta = copysignf(LEAST_BETA, beta);
          tokens.beta[lane] = beta;
          raw_beta = load_beta(chunk + S::BLOCKS * S::FACTOR_GROUPS);
        }
        wait(shared.slot_full[ring.stage], ring.parity);
        const Ring<S::HANDOVERS> out = place_in<S::HANDOVERS>(ring);
        const uint32_t slot = address(shared.slots[uniform(ring.stage)]);
        typename Shared<S>::Handover &to = shared.handover[out.stage];
        if (left < CHUNK) {
          clear_rows<S>(shared.slots[ring.stage], S::WALK && left < 0 ? 0 : left,
                        p.gate == FKDA_GATE_DIRECT);
          fence_async();
          group_sync(group);
        }
        const bool queries = has_queries<S>(task);
        if (queries) {
          measure_queries<S>(tokens, slot, warp, lane);
          group_sync(group); /* q and k have been read */
        }
        const bool active = 32 * warp < S::K;
        if (active) {
          if (!S::WALK)
            decay_operands<S, QUERIES>(p, slot, warp, lane, gate, sum);
          else if (queries)
            decay_operands<S, QUERIES_WITH_NORM>(p, slot, warp, lane, gate, sum,
                                                 norm_of<S>(p, tokens, lane));
          else
            decay_operands<S, NO_QUERIES>(p, slot, warp, lane, gate, sum);
          if (lane < 16) sum[0] = -sum[0], sum[1] = -sum[1];
        }
        fence_async();
        if (S::BOUNDED) {
          group_sync(group);
          start_squares<S>(square, slot);
        } else {
          const float shift = lane < 16 ? -SHIFT : SHIFT;
          by_levels = group_sync_or(group, active && !(sum[0] - shift >= -ANCHOR_RANGE &&
                                                       sum[1] - shift >= -ANCHOR_RANGE));
          if (!S::WALK && by_levels) {
            wait_for_handover(shared, out, count);
            float *sums =
                &(lane < 16 ? to.first_half : to.second_half)[32 * warp + 2 * (lane & 15)];
            if (active) sums[0] = sum[0] - shift, sums[1] = sum[1] - shift;
            float *own = &shared.by_levels[group][0][threadIdx.x % 128];
            factors_by_levels<S>(params, shared, task, chunk * CHUNK, ring.stage, gate, sums,
                                 to.first_half, own);
            __syncwarp(); /* the other half of the warp has read the sums */
            if (active) sum[0] = sums[0], sum[1] = sums[1];
#pragma unroll
            for (int e = 0; e < 16; ++e) square[e] = own[e * 128];
          } else {
            start_squares<S>(square, slot);
            cute::warpgroup_wait<0>();
            fence(square);
          }
        }
      }

      const int warp = fresh_warp() & 3, lane = fresh_lane();
      const Ring<S::HANDOVERS> out = place_in<S::HANDOVERS>(ring);
      typename Shared<S>::Handover &to = shared.handover[out.stage];
      typename Shared<S>::Tokens &tokens =
          shared.tokens[fresh_warp() / 4 - S::STATE_GROUPS][count / S::FACTOR_GROUPS & 1];
      const bool active = 32 * warp < S::K;
      wait_for_handover(shared, out, count);
      if (active) {
        const int channel = 32 * warp + 2 * (lane & 15);
        const float2 decay = make_float2(exp2_approx(sum[0]), exp2_approx(sum[1]));
        float *decays = lane < 16 ? to.to_anchor : to.to_end;
        *reinterpret_cast<float2 *>(&decays[channel]) =
            !S::WALK && by_levels ? make_float2(1, 1) : decay;
        if (!S::WALK && !S::BOUNDED && by_levels)
          *reinterpret_cast<float2 *>(&(lane < 16 ? to.first_half : to.second_half)[channel]) =
              decay;
      }
      if (!S::WALK) {
        const float least = lane < 16 || !active || by_levels ? 0 : fminf(sum[0], sum[1]);
        const int reach = __reduce_max_sync(0xffffffffu, __float_as_int(fmaxf(-least, 0)));
        if (lane == 0) to.reach[warp] = __int_as_float(reach);
      }
      if (!S::BOUNDED && threadIdx.x % 128 == 0) to.by_levels = by_levels;
      const uint32_t system = count % S::SYSTEMS, turn = count / S::SYSTEMS;
      if (turn) wait(shared.L_free[system], (turn & 1) ^ 1);
      if (S::WALK && warp == 3 && has_queries<S>(task))
        to.norm_q[lane] = norm_of<S>(p, tokens, lane);
      if (warp >= 2)
        arrive_warp(
            shared.L_full[count % S::SYSTEM_TURNS]); /* the solver needs its reach, or norms */
      if (S::BOUNDED) {
        cute::warpgroup_wait<0>();
        fence(square);
      }

      const int g = lane >> 2, t = 2 * (lane & 3);
      if (warp < 2) {
        float largest[2]; /* beta r^2 of the thread's two rows */
        /* L_ij = -beta_i r_i^2 (K' K^^T)_ij, i > j, r_i^2 from the diagonal: (I + A)^-1 = diag(1/r) (I - L)^-1 diag(r) */
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 16 * warp + g + 8 * h;
          float squared = 1;
          if (p.l2norm) {
            squared = __shfl_sync(0xffffffffu, on_diagonal(square, warp, g & 1, h),
                                  (lane & ~3) + (g >> 1)) +
                      (float)FKDA_L2NORM_EPS;
          }
          const float r = rsqrtf(squared), beta = tokens.beta[i], row = -beta * (r * r);
          largest[h] = -row;
          if (t == 0) {
            to.norm_k[i] = r;
            to.column[i] = r * beta;
          }
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int j = 8 * n + t;
            if (n < 2 || warp == 1)
              *reinterpret_cast<float2 *>(&shared.L[system][i][j]) =
                  make_float2(row * square[4 * n + 2 * h], row * square[4 * n + 2 * h + 1]);
          }
        }
        if (!S::WALK && warp == 1) {
          float cosine = 0; /* times beta: of rows 16-31 with columns 0-15 */
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float *row = square + 2 * h;
            cosine = fmaxf(cosine, largest[h] * fmaxf(fmaxf(fabsf(row[0]), fabsf(row[1])),
                                                      fmaxf(fabsf(row[4]), fabsf(row[5]))));
          }
          const bool any = __any_sync(0xffffffffu, cosine > 0.5f);
          const bool throughout =
              __all_sync(0xffffffffu, cosine > 0.5f); /* two rows and four columns a lane */
          if (lane == 0) to.collinear = any + throughout;
        }
        if (S::PAIR) fence_async(); /* the handover goes to the other block, too */
        arrive_warp(shared.L_full[count % S::SYSTEM_TURNS]);
      } else if (has_queries<S>(task)) { /* P = lower(Q' K^^T) */
        if (!S::WALK && warp == 3) to.norm_q[lane] = norm_of<S>(p, tokens, lane);
        const bool low = warp == 3; /* rows 16-31 */
        /* What is kept of tiles of 8 x 8 on the diagonal, and of that and the next two right of the first row's one. */
        const uint32_t triangle = (g >= t ? 0x0000ffffu : 0) | (g > t ? 0xffff0000u : 0);
        const uint32_t kept[3] = {low ? ~0u : triangle, low ? ~0u : 0, low ? triangle : 0};
        const uint32_t at =
            address(to.P) + in_square(low * 16 + (lane & 7), lane >> 3 << 3); /* for stmatrix */
        /* A token meets its own key without decay: what rounding Q' and K^ costs is spared where gates are strong and
         * little else is left. Its product comes into one half of a register of one lane. */
        const bool meets = (lane & 3) == lane >> 3;
        const uint32_t keep = 0x3210, put = g & 1 ? 0x5410 : 0x3254;
        const uint32_t into[2] = {meets && !low ? put : keep, meets && low ? put : keep};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 16 * (warp - 2) + g + 8 * h;
          float product = tokens.product[i];
          if (S::WALK) product *= norm_of<S>(p, tokens, i);
          uint32_t tiles[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const uint32_t pair = pack(square[4 * n + 2 * h], square[4 * n + 2 * h + 1]);
            tiles[n] = n < h ? pair : n - h < 3 ? pair & kept[n - h] : 0;
          }
          tiles[h] = __byte_perm(tiles[h], pack(product, 0), into[0]);
          tiles[h + 2] = __byte_perm(tiles[h + 2], pack(product, 0), into[1]);
          store_matrices(at + in_square(8 * h, 0), tiles[0], tiles[1], tiles[2], tiles[3]);
        }
        fence_async();
      } else if (S::PAIR) { /* these warps' decays go to the other block as well */
        fence_async();
      }
      arrive_warp(shared.handover_full[out.stage]);
    }
    chunk -= task.chunks;
  });
}

}  // namespace fkda

#endif
