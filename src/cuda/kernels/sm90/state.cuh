/* The state groups: X = S1 [K' Q']^T, U (10), O (11), S (12). */
#ifndef FKDA_CUDA_SM90_STATE_CUH
#define FKDA_CUDA_SM90_STATE_CUH

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>

#include "cuda/kernels/sm90/cluster.cuh"
#include "cuda/kernels/sm90/shared.cuh"
#include "cuda/kernels/sm90/wgmma.cuh"

namespace fkda {

/* A phase of a barrier. An answer takes a hundred cycles, so where they count one asks early, and later waits if it was
 * not over. */
struct Awaited {
  const Barrier &barrier;
  uint32_t parity;
  __device__ __forceinline__ bool over() const { return barrier.test_wait(parity); }
  __device__ __forceinline__ void wait(bool over = false) const {
    if (!over) barrier.wait(parity);
    asm volatile("" ::: "memory");
  }
};

/* Where a state group finds the chunk that it is at. */
template <class S, bool PAIR = S::PAIR>
struct Position {
  Ring<S::SLOTS> ring;
  __device__ __forceinline__ int slot() const { return ring.stage; }
  __device__ __forceinline__ int handover() const { return place_in<S::HANDOVERS>(ring).stage; }
  __device__ __forceinline__ int value() const { return place_in<S::VALUES>(ring).stage; }
  __device__ __forceinline__ void next() { ring.next(); }

  __device__ __forceinline__ Awaited factors(const Shared<S> &shared) const {
    const Ring<S::HANDOVERS> in = place_in<S::HANDOVERS>(ring);
    return {shared.handover_full[in.stage], in.parity};
  }
  __device__ __forceinline__ Awaited values(const Shared<S> &shared) const {
    const Ring<S::VALUES> in = place_in<S::VALUES>(ring);
    return {shared.value_full[in.stage], in.parity};
  }
  __device__ __forceinline__ void give_back_slot(const Shared<S> &shared) const {
    arrive_warp(shared.slot_free[slot()]);
  }
  __device__ __forceinline__ void give_back_handover(const Shared<S> &shared) const {
    arrive_warp(shared.handover_free[handover()]);
  }
  /* Before the state groups overwrite what has served: one thread of the block. */
  __device__ __forceinline__ void overwrite(Shared<S> &) const {}
};

/* Of a pair: every other chunk is the block's own, the rest come from the other block. Numbers count from 0 on for either. */
template <class S>
struct Position<S, true> {
  static_assert(S::FOREIGN == 2 && S::SLOTS == S::VALUES, "rings");
  uint32_t chunk = 0, rank = cluster_rank(); /* chunk: of all of the pair's */

  __device__ __forceinline__ bool own() const { return chunk % 2 == rank; }
  __device__ __forceinline__ uint32_t number() const { return chunk / 2; }
  __device__ __forceinline__ int slot() const {
    return own() ? number() % S::SLOTS : S::SLOTS + number() % S::FOREIGN;
  }
  __device__ __forceinline__ int handover() const {
    return own() ? number() % S::HANDOVERS : S::HANDOVERS + number() % S::FOREIGN;
  }
  __device__ __forceinline__ int value() const { return chunk % S::VALUES; }
  __device__ __forceinline__ void next() { ++chunk; }

  __device__ __forceinline__ Awaited factors(const Shared<S> &shared) const {
    const uint32_t use = own() ? number() / S::HANDOVERS : number() / S::FOREIGN;
    return {shared.handover_full[handover()], use & 1};
  }
  __device__ __forceinline__ Awaited values(const Shared<S> &shared) const {
    return {shared.value_full[value()], chunk / S::VALUES & 1};
  }
  __device__ __forceinline__ void give_back_slot(const Shared<S> &) const {} /* see below */
  /* Slot and handover, to the block that has made them. */
  __device__ __forceinline__ void give_back_handover(const Shared<S> &shared) const {
    arrive_warp_at(shared.slot_free[number() % S::SLOTS], chunk % 2);
  }
  /* The block that made the chunk waits until the other one, which does the same at the same chunk, has its copy. A barrier for
   * each of two chunks: the other block may be ahead by no more. */
  __device__ __forceinline__ void overwrite(Shared<S> &shared) const {
    const int which = number() % S::FOREIGN;
    if (own())
      wait(shared.has_copy[which], shared.copies[which]++ & 1);
    else
      shared.has_copy[which].arrive(1 - rank);
  }
};

/* S[v,k] *= decay[k] */
template <int K>
__device__ __forceinline__ void decay_state(float (&s)[K / 2], const float *decay, int lane) {
#pragma unroll
  for (int n = 0; n < K / 8; ++n) {
    const float2 d = *reinterpret_cast<const float2 *>(&decay[8 * n + 2 * (lane & 3)]);
    s[4 * n] *= d.x, s[4 * n + 1] *= d.y, s[4 * n + 2] *= d.x, s[4 * n + 3] *= d.y;
  }
}

/* The same where it is, see scale_in_place(). */
template <int K>
__device__ __forceinline__ void decay_in_place(float (&s)[K / 2], const float *decay) {
  const uint32_t at = address(decay) + 8 * (fresh_lane() & 3);
#pragma unroll
  for (int n = 0; n < K / 8; ++n) {
    const float2 d = load_shared_pair(at + 32 * n);
    asm volatile(
        "mul.f32 %0, %0, %4;\n mul.f32 %1, %1, %5;\n mul.f32 %2, %2, %4;\n mul.f32 %3, %3, %5;"
        : "+f"(s[4 * n]), "+f"(s[4 * n + 1]), "+f"(s[4 * n + 2]), "+f"(s[4 * n + 3])
        : "f"(d.x), "f"(d.y));
  }
}

/* x *= factor where it is: in rare branches the compiler would otherwise copy S about. */
template <int N>
__device__ __forceinline__ void scale_in_place(float (&x)[N], float factor) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("mul.f32 %0, %0, %1;" : "+f"(x[i]) : "f"(factor));
}

/* What K^ lost by rounding, in place of K', which has served: k e^{m-G} as decay_operands() makes it, from device
 * memory anew. All state warps of the block. */
template <class S>
__device__ __forceinline__ void rest_of_keys(const fkda_problem &p, const Task &task, int done,
                                             uint32_t slot) {
  const auto sync = [] {
    cutlass::arch::NamedBarrier::sync(32 * S::STATE_WARPS, S::FACTOR_GROUPS);
  };
  sync(); /* K' is free */
  int thread; /* anew: threadIdx.x would hold a register from the top of the chunk on, and there is none left */
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  const int warp = thread / 32, lane = thread & 31;
  if (32 * warp < S::K) {
    const bool behind = lane >> 4;
    const int channel = 32 * warp + 2 * (lane & 15);
    const uint32_t tile = slot + (warp >> 1) * S::SLICE;
    const float exp_A =
        p.A_log.data ? expf(load_float(p.A_log.data, p.A_log.dtype, task.head)) : 1.0f;
    float bias[2] = {0, 0}, sum[2] = {SHIFT, SHIFT};
    if (p.dt_bias.data)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        bias[i] =
            load_float(p.dt_bias.data, p.dt_bias.dtype, (int64_t)task.head * S::K + channel + i);
    const int mode = S::BOUNDED ? FKDA_GATE_BOUNDED : p.gate;
    const Gate gate[2] = {{p, mode, exp_A, bias[0]}, {p, mode, exp_A, bias[1]}};
    const float step = (behind ? 1.0f : -1.0f) * (S::BOUNDED ? gate[0].factor : 1.0f);
    const int64_t g_first = first_row(p.g, task, task.head) + done * p.g.stride_t + channel;
    const bf16 *k_first = static_cast<const bf16 *>(p.k.data) + first_row(p.k, task, task.qk_head) +
                          done * p.k.stride_t + channel;
    const int left = task.length - done;
    constexpr int BATCH = 4;
#pragma unroll 1
    for (int i = 0; i < HALF; i += BATCH) {
      uint32_t k[BATCH];
      float raw[BATCH][2];
#pragma unroll
      for (int t = 0; t < BATCH; ++t) { /* beyond the sequence the last one's, for nothing */
        const int row = behind ? HALF + i + t : HALF - 1 - i - t;
        const int there = row < left ? row : left - 1;
        k[t] = *reinterpret_cast<const uint32_t *>(k_first + there * p.k.stride_t);
#pragma unroll
        for (int c = 0; c < 2; ++c)
          raw[t][c] = load_float(p.g.data, S::GATE_BYTES == 4 ? FKDA_F32 : FKDA_BF16,
                                 g_first + there * p.g.stride_t + c);
      }
#pragma unroll
      for (int t = 0; t < BATCH; ++t) {
        const int row = behind ? HALF + i + t : HALF - 1 - i - t;
        if (row >= left) continue;
        const uint32_t at = tile + in_tile(row, channel & 63), high = load_shared(at + SLICE_G);
        float rest[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float x = raw[t][c];
          const float g = S::BOUNDED ? gate[c].template unit<FKDA_GATE_BOUNDED>(x)
                          : p.gate == FKDA_GATE_SOFTPLUS
                              ? gate[c].template unit<FKDA_GATE_SOFTPLUS>(x)
                              : gate[c].template unit<FKDA_GATE_DIRECT>(x);
          const float next = fmaf(step, g, sum[c]);
          const float f = exp2_approx(behind ? -next : -sum[c]);
          sum[c] = next;
          rest[c] = fmaf(c ? high_of(k[t]) : low_of(k[t]), f, c ? -high_of(high) : -low_of(high));
        }
        store_shared(at + SLICE_K, pack(rest[0], rest[1]));
      }
    }
  }
  fence_async();
  sync();
}

/* A warp's part of the state of a sequence that is cut, on its way from one block to another: it lies in rows of out behind the cut, which
 * the other block overwrites with o later; 128 bytes of each, as many as the block's columns take. Behind them, a row a warp, is the mark, which
 * says that it has come. Nothing else writes there before, and what was there at first is not the mark: results are no signaling
 * NaNs. */
template <class S>
struct Relay {
  static constexpr int WARP_ROWS = S::K / 2, ROWS = 4 * WARP_ROWS;
  static_assert(S::V == 64 && (FKDA_SM90_LEAST_REST - 1) * CHUNK >= ROWS + 4, "rows");
  const fkda_rows &out;
  char *first; /* of out, behind the cut */

  /* `row`: of the task, the first one behind the cut. */
  __device__ __forceinline__ Relay(const fkda_problem &p, const Task &task, int row)
      : out(p.out),
        first(reinterpret_cast<char *>(static_cast<bf16 *>(p.out.data) +
                                       row_at(p.out, task, task.head, row) + task.v_begin)) {}

  __device__ __forceinline__ char *at(int row) const {
    return first + row * out.stride_t * (int64_t)sizeof(bf16);
  }
  template <class Move>
  __device__ __forceinline__ void each(Move move) const {
    const int lane = fresh_lane();
    char *to = at(fresh_warp() * WARP_ROWS + lane / 8) + lane % 8 * sizeof(float4);
    const int64_t step = out.stride_t * 4 * (int64_t)sizeof(bf16);
#pragma unroll
    for (int i = 0; i < S::K / 8; ++i, to += step) {
      asm volatile("" : "+l"(to));
      move(i, reinterpret_cast<float4 *>(to));
    }
  }
  __device__ __forceinline__ uint64_t *mark() const {
    return reinterpret_cast<uint64_t *>(at(ROWS + fresh_warp()));
  }

  __device__ __forceinline__ void send(const float (&s)[S::K / 2], uint64_t mark_of_call) const {
    each([&](int i, float4 *to) {
      *to = make_float4(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]);
    });
    __syncwarp();
    if (fresh_lane() == 0) /* what the others have stored is released, too */
      asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(mark()), "l"(mark_of_call)
                   : "memory");
  }
  __device__ __forceinline__ void receive(float (&s)[S::K / 2], uint64_t mark_of_call) const {
    if (fresh_lane() == 0) {
      const uint64_t *from = mark();
      for (;;) {
        uint64_t x;
        asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(from) : "memory");
        if (x == mark_of_call) break;
        __nanosleep(100);
      }
    }
    __syncwarp();
    each([&](int i, float4 *from) {
      const float4 x = __ldcg(from);
      s[4 * i] = x.x, s[4 * i + 1] = x.y, s[4 * i + 2] = x.z, s[4 * i + 3] = x.w;
    });
  }
};

template <class S>
__device__ void run_state(const fkda_sm90_params &params, Shared<S> &shared) {
  const fkda_problem &p = params.problem;
  constexpr int K = S::K;
  using Rows = StateRows<K>;
  /* matrices of ldmatrix and stmatrix: tokens 0-7 v 0-7, tokens 0-7 v 8-15, tokens 8-15 likewise */
  int matrix_at;
  {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    matrix_at =
        warp / 4 * TILE + in_tile((lane & 7) + ((lane >> 4) << 3), 16 * (warp & 3) + (lane & 8));
  }
  constexpr bool ALONE = S::STATE_GROUPS == 1;
  constexpr int PARTS = ALONE ? S::SLICES : 1; /* of S, each with K / PARTS of the channels */
  const auto part_of = [](float(&x)[K / 2], int i) -> float(&)[K / 2 / PARTS] {
    return reinterpret_cast<float(&)[K / 2 / PARTS]>(x[i * K / 2 / PARTS]);
  };
  Position<S> at;
  each_task(shared, [&](const Task &task, int) {
    const auto first_column = [&] { return task.v_begin + 16 * fresh_warp(); };
    float s[K / 2];
    bool received = false;
    if constexpr (S::PAIR) {
      received = task.cut == BEHIND_CUT;
      if (received) Relay<S>(p, task, 0).receive(s, params.mark);
    }
    if (received)
      ;
    else if (task.load_initial)
      Rows::load(s, p.initial, p.layout,
                 task.initial_slot * p.initial.stride_slot + task.head * p.initial.stride_head,
                 first_column());
    else
#pragma unroll
      for (int i = 0; i < K / 2; ++i) s[i] = 0;
    __nv_bfloat162 seen = __float2bfloat162_rn(0); /* the largest |v| so far, and |S| at first */
    if (ALONE) {
      float most = 0;
#pragma unroll
      for (int i = 0; i < K / 2; ++i) most = fmaxf(most, fabsf(s[i]));
      seen = __float2bfloat162_rn(most);
    }
    /* Tokens that are left, and how many will be where a checkpoint is next to be thought of: so counted, one comparison
     * tells an ordinary chunk. */
    int left = task.length, left_at_next = left - Checkpoints(p).next;
    const auto visit = [&](int left_now) {
      if constexpr (S::PAIR)
        if (task.cut == BEFORE_CUT) { /* in such calls there are no checkpoints */
          Relay<S>(p, task, task.length).send(s, params.mark);
          return;
        }
      Checkpoints checkpoints(p);
      checkpoints.next = task.length - left_at_next;
      checkpoints.visit(p, task, task.length - left_now, left_now == 0,
                        [&](const fkda_states &to, int64_t offset) {
                          Rows::store(s, to, p.layout, offset, first_column());
                        });
      left_at_next = task.length - checkpoints.next;
    };

    /* A factor group may ask for a handover only when its use before the last is over (a barrier's parity tells no
     * more): with as many handovers as groups its own last turn says so, else the slot must. */
    constexpr bool SLOT_LAST = S::FACTOR_GROUPS > S::HANDOVERS;
    /* The last of a chunk: places given back, S decayed to the chunk's end. */
    const auto finish = [&](bool huge) {
      if (!SLOT_LAST) at.give_back_slot(shared);
      decay_state<K>(s, shared.handover[at.handover()].to_end, fresh_lane());
      if (huge) scale_in_place(s, 0x1p96f);
      at.give_back_handover(shared);
      if (SLOT_LAST) at.give_back_slot(shared);
      left -= CHUNK;
      at.next();
    };

    uint32_t a[K / 4]; /* S1 = S e^m, as operand */
    float xo[32];      /* X, and O behind it */
    const auto begin = [&] {
      at.factors(shared).wait();
      decay_state<K>(s, shared.handover[at.handover()].to_anchor, fresh_lane());
#pragma unroll
      for (int i = 0; i < K / 4; ++i) a[i] = pack(s[2 * i], s[2 * i + 1]);
    };
    /* O, as it is to be, and into the place of v. */
    const auto load_norms = [](float2(&norms)[4], const float *from) {
      const int lane = fresh_lane();
#pragma unroll
      for (int n = 0; n < 4; ++n)
        norms[n] = *reinterpret_cast<const float2 *>(&from[8 * n + 2 * (lane & 3)]);
    };
    const auto pack_out = [&](uint32_t(&out)[8], const float2(&norms)[4]) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float2 r = norms[n];
        out[2 * n] = pack(xo[16 + 4 * n] * r.x, xo[17 + 4 * n] * r.y);
        out[2 * n + 1] = pack(xo[18 + 4 * n] * r.x, xo[19 + 4 * n] * r.y);
      }
    };
    const auto store_out = [&](const uint32_t(&out)[8], int place) {
      char *tile = shared.values[place] + matrix_at;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        cute::SM90_U16x8_STSM_T::copy(
            out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3],
            *reinterpret_cast<cute::uint128_t *>(tile + i * in_tile(16, 0)));
    };
    const auto release_out = [&](int place) { arrive_warp(shared.value_out[place]); };
    const auto hand_out = [&](bool huge) {
      uint32_t out[8];
      float2 norms[4];
      load_norms(norms, shared.handover[at.handover()].norm_q);
      if (huge)
#pragma unroll
        for (int n = 0; n < 4; ++n) norms[n].x *= 0x1p96f, norms[n].y *= 0x1p96f;
      pack_out(out, norms);
      store_out(out, at.value());
      release_out(at.value());
    };
    /* [X O] (+)= S1 [K' Q']^T, of the channels from `from` up to `end`; on its way. */
    const auto look_up = [&](uint32_t slot, int from, int end) {
      const uint64_t rows = tile_descriptor(slot + SLICE_K);
      static_assert(SLICE_Q == SLICE_K + TILE, "one operand");
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = from; k < end; k += 16)
        multiply<Major::K>(xo, a + k / 4, rows + (k / 64 * S::SLICE + k % 64 * 2) / 16, k > 0);
      cute::warpgroup_commit_batch();
    };

    /* O += u P^T. P stands behind T's low part as Q' does behind K'; what comes to X's place is not looked at. */
    const auto add_scores = [&](const uint32_t(&u)[8], uint64_t T_low) {
      multiply<Major::K>(xo, u, T_low, true);
      multiply<Major::K>(xo, u + 4, T_low + 2, true);
    };
    /* S += u K^, of 16 tokens */
    const auto add_keys = [&](const uint32_t *u, uint64_t keys) {
#pragma unroll
      for (int i = 0; i < PARTS; ++i)
        multiply<Major::MN>(part_of(s, i), u, keys + i * S::SLICE / 16, true);
    };

    /* What seldom happens to a chunk stands behind the loop over ordinary ones: a jump across it would make each
     * of them wait for instructions. */
#pragma unroll 1
    for (;;) {
      if (left <= 0 || left <= left_at_next) {
        visit(left > 0 ? left : 0);
        if (left <= 0) break;
      }
      float x[16]; /* U */
      uint32_t u[8];
      bool huge, halfway, rare;
      uint32_t slot;
      int place;     /* of the chunk's handover */
      uint32_t w[8]; /* V, then W; V comes as pairs of tokens, 16 tokens at a time */
      const auto load_v = [&](int begin, int end) {
        char *tile = shared.values[at.value()] + matrix_at;
#pragma unroll
        for (int i = begin; i < end; ++i)
          cute::SM75_U16x8_LDSM_T::copy(
              *reinterpret_cast<const cute::uint128_t *>(tile + i * in_tile(16, 0)), w[4 * i],
              w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
        if (left < CHUNK) { /* nothing of what lies behind the sequence */
          const int lane = fresh_lane();
#pragma unroll
          for (int n = 2 * begin; n < 2 * end; ++n) {
            const int j = 8 * n + 2 * (lane & 3);
            const uint32_t mask = (j < left ? 0x0000ffffu : 0) | (j + 1 < left ? 0xffff0000u : 0);
            w[2 * n] &= mask, w[2 * n + 1] &= mask;
          }
        }
        if (ALONE)
#pragma unroll
          for (int n = 4 * begin; n < 4 * end; ++n)
            seen = __hmax2(seen, __habs2(reinterpret_cast<const __nv_bfloat162 &>(w[n])));
      };
      /* V of the chunk whose X is on its way, and X. */
      const auto finish_looking_up = [&](bool values_there) {
        at.values(shared).wait(values_there);
        load_v(0, ALONE ? 2 : 1);
        cute::warpgroup_wait<0>();
        fence(xo);
      };
      const auto start_chunk = [&] {
        begin();
        fence(a);
        look_up(address(shared.slots[uniform(at.slot())]), 0, K);
        finish_looking_up(false);
      };
      const auto by_levels = [&] {
        return !S::BOUNDED && load_shared(address(&shared.handover[place].by_levels)) != 0;
      };
      /* (11), (12) of any chunk whose U is on its way. */
      const auto finish_products = [&] {
        const typename Shared<S>::Handover &f = shared.handover[place];
        const float guard = f.guard;
        cute::warpgroup_wait<0>();
        fence(x);
        if (huge) {
          scale_in_place(x, 0x1p-96f);
          scale_in_place(xo, 0x1p-96f);
          scale_in_place(s, 0x1p-96f);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) u[i] = pack(x[2 * i], x[2 * i + 1]);
        if (by_levels()) decay_in_place<K>(s, f.first_half);
        const uint64_t T_low = square_descriptor(address(f.T_low));
        const uint64_t K_first = tile_descriptor(slot + SLICE_G, S::SLICE);
        const uint64_t K_second = K_first + HALF * 128 / 16;
        /* Nearly parallel keys: what U loses by rounding adds up in S, and O is the small sum of large terms. So its
         * rest follows, and below that of K^. */
        if (guard < 0) {
          uint32_t rest[8], rest_second[4];
#pragma unroll
          for (int i = 0; i < 8; ++i) rest[i] = pack_rest(x[2 * i], x[2 * i + 1], u[i]);
#pragma unroll
          for (int i = 0; i < 4; ++i) rest_second[i] = halfway ? 0 : rest[4 + i];
          fence(rest);
          fence(rest_second);
          fence(xo);
          fence(s);
          cute::warpgroup_arrive();
          add_scores(rest, T_low);
          add_keys(rest, K_first);
          add_keys(rest_second, K_second);
          cute::warpgroup_commit_batch();
          cute::warpgroup_wait<0>();
        }
        uint32_t u_second[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) u_second[i] = halfway ? 0 : u[4 + i];

        fence(u);
        fence(u_second);
        fence(xo);
        fence(s);
        cute::warpgroup_arrive();
        add_scores(u, T_low);
        cute::warpgroup_commit_batch();
        add_keys(u, K_first);
        add_keys(u_second, K_second);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<1>();
        fence(xo);
        hand_out(huge);
        cute::warpgroup_wait<0>();
        fence(s);
      };
      if (ALONE) start_chunk();
#pragma unroll 1
      for (;;) {
        if (!ALONE) start_chunk();
        const int lane = fresh_lane();
        slot = address(shared.slots[uniform(at.slot())]);
        place = uniform(at.handover());
        const typename Shared<S>::Handover &f = shared.handover[place];
        const float guard = f.guard;

        /* W[v,j] = V[v,j] - r_j X[v,j], in two parts */
        uint32_t w_low[8];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (!ALONE && n == 2) load_v(1, 2);
          const float2 r = *reinterpret_cast<const float2 *>(&f.norm_k[8 * n + 2 * (lane & 3)]);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t v = w[2 * n + h];
            const float w0 = fmaf(-r.x, xo[4 * n + 2 * h], low_of(v));
            const float w1 = fmaf(-r.y, xo[4 * n + 2 * h + 1], high_of(v));
            w[2 * n + h] = pack(w0, w1);
            w_low[2 * n + h] = pack_rest(w0, w1, w[2 * n + h]);
          }
        }
        /* (10) U[v,i] = sum_j W[v,j] T[i,j] */
        const uint64_t T_high = square_descriptor(address(f.T_high)), T_low = T_high + SQUARE / 16;
        fence(w);
        fence(w_low);
        Position<S> next = at;
        bool next_there = false;
        if (ALONE) {
          next.next();
          next_there = next.factors(shared).over();
        }
        cute::warpgroup_arrive();
        multiply_by_parts<Major::MN>(x, w, w_low, T_high, T_low);
        cute::warpgroup_commit_batch();
        /* U^T K^ overflows where v is huge and the second half's gates are strong, though S e^{G_C-m} would not: such
         * rows are worked on times 2^-96. Whatever was huge once may still lie in S; two groups lack the register to
         * remember it, and look at W. */
        if (ALONE) { /* all of the group, which goes one way: its products are joint instructions */
          huge = group_sync_or(S::FACTOR_GROUPS + 1,
                               fmaxf(__low2float(seen), __high2float(seen)) > fabsf(guard));
        } else {
          __nv_bfloat162 largest = __habs2(reinterpret_cast<const __nv_bfloat162 &>(w[0]));
#pragma unroll
          for (int i = 1; i < 8; ++i)
            largest = __hmax2(largest, __habs2(reinterpret_cast<const __nv_bfloat162 &>(w[i])));
          huge = __any_sync(0xffffffffu,
                            fmaxf(__low2float(largest), __high2float(largest)) > fabsf(guard));
        }
        /* A checkpoint after the chunk's first half: S1 without the second half is the state there. By levels S is
         * decayed to the end of each half before it takes U of it. */
        halfway = by_levels() || (left_at_next == left - HALF && left > HALF);
        const bool parallel = guard < 0 && !by_levels() && load_shared(address(&f.collinear)) == 2;
        rare = huge || halfway || parallel;
        const bool last = left <= CHUNK || left - CHUNK <= left_at_next;
        if (ALONE && (rare || last || guard < 0)) break;
        if (ALONE) {
          /* On to the next chunk's S1 and X, a part while the tensor cores are at the other. By two factors: their
           * product may underflow where S does not. */
          constexpr int CHANNELS = K / PARTS;
          constexpr bool EARLY = S::PAIR && S::BOUNDED; /* are there registers for all decays? */
          float2 end[PARTS][CHANNELS / 8], anchor[PARTS][CHANNELS / 8], norms[4];
          const Position<S> here = at;
          at = next;
          const auto load_decays = [&](int part) {
            const float *to_anchor = shared.handover[at.handover()].to_anchor;
            const int lane = fresh_lane();
#pragma unroll
            for (int n = 0; n < CHANNELS / 8; ++n) {
              const int channel = part * CHANNELS + 8 * n + 2 * (lane & 3);
              end[part][n] = *reinterpret_cast<const float2 *>(&f.to_end[channel]);
              anchor[part][n] = *reinterpret_cast<const float2 *>(&to_anchor[channel]);
            }
          };
          at.factors(shared).wait(next_there);
          if (S::PAIR) load_decays(0);
          cute::warpgroup_wait<0>();
          fence(x);
#pragma unroll
          for (int i = 0; i < 8; ++i) u[i] = pack(x[2 * i], x[2 * i + 1]);
          const uint64_t K_first = tile_descriptor(slot + SLICE_G, S::SLICE);
          const uint64_t K_second = K_first + HALF * 128 / 16;
          fence(u);
          fence(xo);
          fence(s);
          cute::warpgroup_arrive();
          add_scores(u, T_low);
          cute::warpgroup_commit_batch();
#pragma unroll
          for (int i = 0; i < PARTS; ++i) {
            multiply<Major::MN>(part_of(s, i), u, K_first + i * S::SLICE / 16, true);
            multiply<Major::MN>(part_of(s, i), u + 4, K_second + i * S::SLICE / 16, true);
            cute::warpgroup_commit_batch();
          }
          if (EARLY)
#pragma unroll
            for (int i = 1; i < PARTS; ++i) load_decays(i);
          load_norms(norms, f.norm_q);
          const bool values_there = at.values(shared).over();
          cute::warpgroup_wait<PARTS>();
          fence(xo);
          uint32_t out[8];
          pack_out(out, norms);
          left -= CHUNK;
          const uint32_t next_slot = address(shared.slots[uniform(at.slot())]);
#pragma unroll
          for (int i = 0; i < PARTS; ++i) {
            if (i ? !EARLY : !S::PAIR) load_decays(i);
            if (i == 0)
              cute::warpgroup_wait<PARTS - 1>();
            else
              cute::warpgroup_wait<1>(); /* what is later: the part of X before */
            float(&t)[CHANNELS / 2] = part_of(s, i);
            fence(t);
#pragma unroll
            for (int n = 0; n < CHANNELS / 8; ++n) {
              t[4 * n] = t[4 * n] * end[i][n].x * anchor[i][n].x;
              t[4 * n + 1] = t[4 * n + 1] * end[i][n].y * anchor[i][n].y;
              t[4 * n + 2] = t[4 * n + 2] * end[i][n].x * anchor[i][n].x;
              t[4 * n + 3] = t[4 * n + 3] * end[i][n].y * anchor[i][n].y;
              a[i * CHANNELS / 4 + 2 * n] = pack(t[4 * n], t[4 * n + 1]);
              a[i * CHANNELS / 4 + 2 * n + 1] = pack(t[4 * n + 2], t[4 * n + 3]);
            }
#pragma unroll
            for (int n = 0; n < CHANNELS / 4; ++n)
              cute::warpgroup_fence_operand(a[i * CHANNELS / 4 + n]);
            look_up(next_slot, i * CHANNELS, (i + 1) * CHANNELS);
            if (i == 0) store_out(out, here.value());
          }
          /* Before the wait for the next V, which two places leave none for until this O has gone. */
          release_out(here.value());
          if (!SLOT_LAST) here.give_back_slot(shared);
          here.give_back_handover(shared);
          if (SLOT_LAST) here.give_back_slot(shared);
          finish_looking_up(values_there);
          continue;
        }
        finish_products();
        if (rare) break;
        finish(false);
        if (last) break;
      }
      if (ALONE) finish_products();
      if (ALONE && !rare) finish(false);
      if (!rare) continue;

      const typename Shared<S>::Handover &f = shared.handover[place];
      const bool parallel = f.guard < 0 && !by_levels() && f.collinear == 2;
      uint32_t second[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) second[i] = u[4 + i];
      if (parallel) {
        if (threadIdx.x == 0) at.overwrite(shared);
        rest_of_keys<S>(p, task, task.length - left, slot);
        const uint64_t rest = tile_descriptor(slot + SLICE_K, S::SLICE);
        uint32_t u_second[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) u_second[i] = halfway ? 0 : u[4 + i];
        fence(u);
        fence(u_second);
        fence(s);
        cute::warpgroup_arrive();
        add_keys(u, rest);
        add_keys(u_second, rest + HALF * 128 / 16);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        fence(s);
      }
      if (halfway) {
        if (left_at_next == left - HALF && left > HALF) {
          const float factor = (huge ? 0x1p96f : 1.0f) * (by_levels() ? 1.0f : exp2_approx(SHIFT));
          scale_in_place(s, factor);
          visit(left - HALF);
          scale_in_place(s, 1 / factor);
        }
        if (by_levels()) decay_in_place<K>(s, f.second_half);
        fence(second);
        fence(s);
        cute::warpgroup_arrive();
        add_keys(second, tile_descriptor(slot + SLICE_G + HALF * 128, S::SLICE));
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        if (parallel) {
          cute::warpgroup_arrive();
          add_keys(second, tile_descriptor(slot + SLICE_K + HALF * 128, S::SLICE));
          cute::warpgroup_commit_batch();
          cute::warpgroup_wait<0>();
        }
        fence(s);
      }
      finish(huge);
    }
  });
}

}  // namespace fkda

#endif
