/* Shared memory of an sm90 block, of the prefill or of the backward's walks: what lies where, and who hands what to whom.
 *
 *   ring      stages  filled by            drained by
 *   slots     SLOTS   copy engine: q k g   a factor group in place, then state groups
 *   values    VALUES  copy engine: v       state groups, which leave o there for the copy engine
 *   handover  HANDOVERS factor groups      state groups
 *   tasks     TASKS   the loader           everybody else
 *   of a pair's other block: FOREIGN more slots and handovers, which that block's solvers fill (cluster.cuh)
 *
 * Every stage of a ring has an mbarrier for "full" and one for "free"; the n-th use of a stage waits for
 * the n-th completion, whose parity is n & 1. Rings run on from task to task: while the state groups finish one,
 * the others work on the next.
 */
#ifndef FKDA_CUDA_SM90_SHARED_CUH
#define FKDA_CUDA_SM90_SHARED_CUH

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/sm90/params.h"

namespace fkda {

constexpr int CHUNK = FKDA_SM90_CHUNK;
constexpr int HALF = CHUNK / 2; /* tokens on either side of the anchor */
constexpr int TILE =
    CHUNK * FKDA_SM90_BOX_BYTES; /* 32 tokens of 64 channels, swizzled by 128 bytes */
constexpr int SQUARE =
    CHUNK * CHUNK * (int)sizeof(bf16); /* 32 rows of 64 bytes, swizzled by 64 bytes */

constexpr int TASKS = 8;
constexpr int MAX_SORTED = FKDA_SM90_MAX_SORTED;
/* K' and Q' carry 2^SHIFT, S1 and K^ 2^-SHIFT: a bounded gate's exponents are then within 2^+-112 on both sides of the
 * anchor, which leaves as much room for large k. */
constexpr float SHIFT = 4;
/* log2: what a half of a chunk may decay by in the frame of the anchor. A bounded gate's fifteen tokens do. */
constexpr float ANCHOR_RANGE = 108.5f;
constexpr int SOLVERS = 2; /* warps, on alternate chunks */

/* WALK: of the backward's walks. PAIR: two blocks, a cluster, do the two halves of the value columns and share the work on
 * factors: of all their chunks each makes those whose number has its rank as remainder, for both. */
template <int K_, int V_, int GATE_BYTES_, bool BOUNDED_, bool WALK_ = false, bool PAIR_ = false>
struct Shape {
  static constexpr int K = K_, V = V_;           /* V: value columns of the block */
  static constexpr int GATE_BYTES = GATE_BYTES_; /* of an element of g: 2 or 4 */
  static constexpr bool BOUNDED = BOUNDED_;      /* does the gate stay within the anchor's range? */
  static constexpr bool WALK = WALK_, PAIR = PAIR_;
  static constexpr int BLOCKS = PAIR ? 2 : 1; /* that share tasks */
  static constexpr int STATE_GROUPS = V / 64; /* warpgroups */
  static constexpr int FACTOR_GROUPS = STATE_GROUPS == 2 || PAIR ? 2 : 3;
  static constexpr int THREADS = 128 * (STATE_GROUPS + FACTOR_GROUPS + 1);
  static constexpr int FIRST_FACTOR = 128 * STATE_GROUPS;
  static constexpr int FIRST_HELPER = FIRST_FACTOR + 128 * FACTOR_GROUPS;
  static constexpr int STATE_WARPS = 4 * STATE_GROUPS;
  static constexpr int CONSUMER_WARPS =
      STATE_WARPS + 4 * FACTOR_GROUPS + SOLVERS + 1; /* of tasks */
  static constexpr int SLOTS = !PAIR && (GATE_BYTES == 2 || K == 64) ? 6 : 4;
  static constexpr int VALUES = PAIR ? SLOTS : SLOTS / 2;
  /* A handover is held from the squares on, over the solver's time and the state's: as many as slots where memory
   * allows. */
  static constexpr int HANDOVERS = V == 64 && (BOUNDED || (PAIR && K == 64)) ? SLOTS : SLOTS / 2;
  static constexpr int FOREIGN = PAIR ? 2 : 0; /* slots and handovers behind those */
  /* Places for L. Those who wait for one must do so in turn, since a barrier tells one phase from the next only: either
   * the same group comes again, or it has waited for the handover of the use before. For the same reason a place has a
   * barrier for each solver that comes to it. */
  static constexpr int SYSTEMS = FACTOR_GROUPS < HANDOVERS ? FACTOR_GROUPS : HANDOVERS;
  static constexpr int SYSTEM_TURNS = SYSTEMS % SOLVERS ? SYSTEMS * SOLVERS : SYSTEMS;
  static constexpr int SLICES = K / 64; /* of 64 channels: tiles of k, q, g one after the other */
  static constexpr int SLICE = GATE_BYTES == 2 ? 3 * TILE : 5 * TILE;
  static constexpr int SLOT = SLICES * SLICE;
  static constexpr int VALUE = STATE_GROUPS * TILE;
  /* setmaxnreg shares out what the block was launched with: the sum over its five warpgroups is at most 5 * 96, over a
   * pair's four 4 * 128. */
  static constexpr int STATE_REGISTERS = PAIR                ? 208
                                         : STATE_GROUPS == 2 ? (K == 64 ? 136 : 160)
                                                             : 184;
  static constexpr int FACTOR_REGISTERS = PAIR ? 112 : STATE_GROUPS == 2 ? (K == 64 ? 72 : 56) : 80;
  static constexpr int HELPER_REGISTERS = PAIR ? 80 : STATE_GROUPS == 2 ? (K == 64 ? 64 : 48) : 56;
};

/* Offsets of the tiles of a slice. K^ replaces a g of bf16; one of f32 comes in two tiles of its own. */
constexpr int SLICE_K = 0, SLICE_Q = TILE, SLICE_G = 2 * TILE, SLICE_G32 = 3 * TILE;

using Barrier = cutlass::arch::ClusterTransactionBarrier;

/* Which tasks are the block's. The first `dealt` ones, longest first, go to blocks back and forth; `own` of them are its.
 * After them it does those from rest_begin to rest_end: short ones, more where the others leave time. */
struct Deal {
  int64_t dealt, rest_begin, rest_end;
  int32_t own, longer; /* longer: sequences that are not short */
};

template <class S>
struct Shared {
  /* (9): T = diag(r) (I + A)^-1 diag(beta) as two bf16 parts, [j][i], r_i = 1/|k_i| or 1; P [i][j] */
  struct Handover {
    char T_high[SQUARE], T_low[SQUARE], P[SQUARE];
    float to_anchor[S::K], to_end[S::K]; /* e^m, e^{G_C-m}; 1 in a chunk by levels: */
    float first_half[S::BOUNDED ? 0 : S::K],
        second_half[S::BOUNDED ? 0 : S::K]; /* these two there */
    float norm_k[CHUNK], norm_q[CHUNK];     /* r, and scale/|q| (1) or scale */
    float column[CHUNK];                    /* r beta; in walks in the end 1 / (r beta) */
    float reach[4]; /* of each factor warp: the largest exponent of K^, log2 */
    uint32_t
        collinear; /* are keys of the two halves nearly parallel? 1: some, 2: most; walks: of neighbours */
    float guard;        /* a v of more than |guard| may overflow; negative: collinear */
    uint32_t by_levels; /* are its gates too strong for one anchor? */
    float unused[25];   /* squares begin at multiples of 512 bytes */
  };
  struct Tokens {         /* of a factor group: */
    float square[CHUNK];  /* |q|^2 */
    float product[CHUNK]; /* q k */
    float beta[CHUNK];    /* (3) */
  };
  char slots[S::SLOTS + S::FOREIGN][S::SLOT];
  char values[S::VALUES][S::VALUE];
  Handover handover[S::HANDOVERS + S::FOREIGN];
  Tokens tokens[S::FACTOR_GROUPS][2]; /* on alternate chunks of the group */
  float by_levels[S::BOUNDED ? 0 : S::FACTOR_GROUPS][16]
                 [128];                  /* accumulators, a thread's 16, in chunks by levels */
  float L[S::SYSTEMS][CHUNK][CHUNK + 4]; /* what is to be inverted, then parts of the inverse */
  /* Sequences, longest first. Here, as solvers look below L, for nothing. */
  uint16_t order[MAX_SORTED];
  Barrier slot_full[S::SLOTS], slot_free[S::SLOTS];
  Barrier L_full[S::SYSTEM_TURNS], L_free[S::SYSTEMS];
  Barrier reloaded[S::BOUNDED ? 0 : S::FACTOR_GROUPS]; /* k and q, in chunks by levels */
  Barrier value_full[S::VALUES], value_out[S::VALUES];
  Barrier handover_full[S::HANDOVERS + S::FOREIGN];
  /* A pair gives back slot and handover at once. */
  Barrier handover_free[S::PAIR ? 0 : S::HANDOVERS];
  Barrier has_copy[S::FOREIGN]; /* a pair's other block has what it is to have of the slot: */
  uint32_t copies[S::FOREIGN];  /* how often that was waited for */
  Barrier task_full[TASKS], task_free[TASKS];
  Task tasks[TASKS]; /* n < 0: there is none any more */
  Deal deal;
};

/* The place in a ring: stage, and the parity that tells its uses apart. */
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int by = 1) {
    stage += by;
    if (stage >= STAGES) stage -= STAGES, parity ^= 1;
  }
};

/* A place in a ring is one in a ring of half as many, too. */
template <int TO, int STAGES>
__device__ __forceinline__ Ring<TO> place_in(const Ring<STAGES> &ring) {
  static_assert(TO == STAGES || TO == STAGES / 2, "the ring or half of it");
  const bool second = ring.stage >= TO;
  return {ring.stage - (second ? TO : 0), TO == STAGES ? ring.parity : second};
}

/* Of the chunks that a warp is the `first` in turn to work on, the first one's number. */
template <class S>
__device__ __forceinline__ int first_chunk(int first) {
  return S::PAIR ? 2 * first + cute::block_rank_in_cluster() : first;
}

/* The compiler may move memory accesses across neither of these. */
__device__ __forceinline__ void wait(const Barrier &barrier, uint32_t parity) {
  barrier.wait(parity);
  asm volatile("" ::: "memory");
}
__device__ __forceinline__ void arrive(const Barrier &barrier) {
  asm volatile("" ::: "memory");
  barrier.arrive();
}
/* The same for a warp that nobody hurries: it leaves the issue slots to others meanwhile. */
__device__ __forceinline__ void wait_idly(const Barrier &barrier, uint32_t parity) {
  while (!barrier.try_wait(parity)) __nanosleep(20);
  asm volatile("" ::: "memory");
}
/* One arrival for the warp: such barriers are made by init_warps(). */
__device__ __forceinline__ void arrive_warp(const Barrier &barrier) {
  __syncwarp();
  if (lane_arrives()) arrive(barrier);
}
__device__ __forceinline__ void init_warps(const Barrier &barrier, int warps) {
  barrier.init(warps * ARRIVING_LANES);
}
/* Ordinary stores before, tensor cores or the copy engine after a barrier that follows. */
__device__ __forceinline__ void fence_async() { cutlass::arch::fence_view_async_shared(); }

/* Does `mine` hold for any of the threads that share the barrier? */
template <int THREADS = 128>
__device__ __forceinline__ int group_sync_or(int group, bool mine) {
  int any;
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.b32 p, %2, 0;\n barrier.cta.red.or.pred q, %1, %3, p;\n"
      " selp.b32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(group + (int)cutlass::arch::NamedBarrier::ReservedNamedBarrierCount), "r"((int)mine),
        "n"(THREADS)
      : "memory");
  return any;
}

/* Calls visit(task, its number) for every task of the block, in a warp that is one of CONSUMER_WARPS. */
template <class S, class Visit>
__device__ __forceinline__ void each_task(Shared<S> &shared, Visit visit) {
#pragma unroll 1
  for (int i = 0;; ++i) {
    wait(shared.task_full[i % TASKS], i / TASKS & 1);
    const Task &task = shared.tasks[i % TASKS];
    if (task.n < 0) break;
    if (!task.skip) visit(task, i);
    arrive_warp(shared.task_free[i % TASKS]);
  }
}

__device__ __forceinline__ void load_box(const fkda_tensor_map &map, const Barrier &full, void *to,
                                         int channel, int64_t token, int head, int64_t b) {
  const uint64_t once = 0x12F0000000000000; /* cache hint: evict first */
  cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t *>(const_cast<Barrier *>(&full)),
                               once, to, channel, (int32_t)token, head, (int32_t)b);
}

__device__ __forceinline__ uint32_t address(const void *shared) {
  return (uint32_t)__cvta_generic_to_shared(shared);
}
__device__ __forceinline__ uint32_t load_shared(uint32_t at) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at));
  return x;
}
__device__ __forceinline__ float2 load_shared_pair(uint32_t at) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at));
  return x;
}
__device__ __forceinline__ void load_matrices(uint32_t at, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}
__device__ __forceinline__ void store_shared(uint32_t at, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, uint32_t a, uint32_t b, uint32_t c,
                                             uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ void store_matrices(uint32_t at, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

/* Tells the compiler that a warp has one value: addresses of tensor operands then live in uniform registers. */
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

/* Of walks: walk_params.cuh. */
__device__ __forceinline__ const fkda_problem &problem_of(const fkda_sm90_params &x) {
  return x.problem;
}

/* Which chunk of its task is the i-th to be worked on. */
template <class S>
__device__ __forceinline__ int place_of(const Task &task, int i) {
  return S::WALK && task.backward ? task.chunks - 1 - i : i;
}
/* Has it queries? */
template <class S>
__device__ __forceinline__ bool has_queries(const Task &task) {
  return !S::WALK || task.backward;
}

/* Byte offsets of element (row, column) of bf16. */
__device__ __forceinline__ int in_tile(int row, int column) {
  return row * 128 + (((column >> 3) ^ (row & 7)) << 4) + (column & 7) * 2;
}
__device__ __forceinline__ int in_square(int row, int column) {
  return row * 64 + (((column >> 3) ^ ((row >> 1) & 3)) << 4) + (column & 7) * 2;
}

constexpr int ALIGNMENT = 2048; /* of the slots: a walk's xor reaches bit 10 */
constexpr int ALIGNED = 1024;   /* `memory` is already */

/* The block's shared memory, its barriers ready. A __syncthreads() must follow. */
template <class S>
__device__ __forceinline__ Shared<S> &start_block() {
  extern __shared__ __align__(1024) char memory[];
  Shared<S> &shared = *reinterpret_cast<Shared<S> *>(memory + (-address(memory) & (ALIGNMENT - 1)));
  static_assert(sizeof(shared.slots[0]) % ALIGNMENT == 0 && sizeof(shared.handover[0]) % 512 == 0,
                "alignment");
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::SLOTS; ++i) {
      shared.slot_full[i].init(1);
      init_warps(shared.slot_free[i], S::STATE_WARPS * S::BLOCKS);
    }
    for (int i = 0; i < S::VALUES; ++i) {
      shared.value_full[i].init(1);
      init_warps(shared.value_out[i], S::STATE_WARPS);
    }
    for (int i = 0; i < S::HANDOVERS; ++i) {
      init_warps(shared.handover_full[i], 4 + 1);
      if (!S::PAIR) init_warps(shared.handover_free[i], S::STATE_WARPS);
    }
    for (int i = 0; i < S::FOREIGN; ++i) {
      shared.handover_full[S::HANDOVERS + i].init(1);
      shared.has_copy[i].init(1);
      shared.copies[i] = 0;
    }
    if (!S::BOUNDED)
      for (int i = 0; i < S::FACTOR_GROUPS; ++i) shared.reloaded[i].init(1);
    for (int i = 0; i < S::SYSTEM_TURNS; ++i) init_warps(shared.L_full[i], 4);
    for (int i = 0; i < S::SYSTEMS; ++i) init_warps(shared.L_free[i], 1);
    for (int i = 0; i < TASKS; ++i) {
      shared.task_full[i].init(1);
      init_warps(shared.task_free[i], S::CONSUMER_WARPS);
    }
    cutlass::arch::fence_barrier_init();
    fence_async();
  }
  for (int i = threadIdx.x; i < S::HANDOVERS * 2 * SQUARE / 16;
       i += S::THREADS) { /* above T's diagonal */
    typename Shared<S>::Handover &to = shared.handover[i / (2 * SQUARE / 16)];
    reinterpret_cast<uint4 *>(to.T_high)[i % (2 * SQUARE / 16)] = make_uint4(0, 0, 0, 0);
  }
  return shared;
}

}  // namespace fkda

#endif
