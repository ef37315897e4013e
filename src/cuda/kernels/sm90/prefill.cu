/* Hopper prefill: wgmma, the tensor copy engine and mbarriers; sm_90a.
 *
 * A task is one sequence, value head and 64 or 128 value columns; a block does one after the other.
 * docs/kernels/prefill_sm90.md draws its schedule.
 *
 *   helper group    a warp deals out tasks and copies q, k, g in; one copies v in and o out; two invert I + A
 *   factor groups   two or three warpgroups on alternate chunks of 32 tokens: norms (1), gates (2), decayed
 *                   operands (8) in place of k, q, g, the squares (9)
 *   state groups    each owns 64 value rows of S in f32 accumulators for the whole sequence, transposed so that
 *                   value rows are the M dimension: X = S1 [K' Q']^T, U (10), O (11), S (12)
 *
 * Frames. Per channel, G is the running sum of log2-decays and m its value after the chunk's sixteenth token:
 *   K' = k e^{G-m}   Q' = q e^{G-m}   K^ = k e^{m-G}
 *   S1 = S e^m,  X = S1 K'^T,  S1 <- S1 + U^T K^,  S <- S1 e^{G_C-m}
 * so exponents of a bounded gate stay within +-80. The two factors of the state are never one: their product
 * underflows where the state does not.
 *
 * Norms (1) are factors of rows and columns, applied in f32 after the products: operands are rounded from
 * the raw bf16 k once, so that nearly collinear keys stay collinear (docs/math.md).
 */
#include <cutlass/arch/reg_reconfig.h>

#include "cuda/kernels/sm90/factors.cuh"
#include "cuda/kernels/sm90/helpers.cuh"
#include "cuda/kernels/sm90/state.cuh"

namespace fkda {

constexpr int ALIGNMENT = 2048; /* of the slots: a walk's xor reaches bit 10 */

/* shared.order: a sequence's place is the number of those that are longer, or as long and before it. Lengths lie
 * where q will be. All threads of the block. */
template <class S>
__device__ __noinline__ void sort_sequences(const fkda_problem &p, Shared<S> &shared) {
  if (!is_sorted(p)) return;
  const int N = (int)p.N;
  int *lengths = reinterpret_cast<int *>(shared.slots[0]);
  for (int n = threadIdx.x; n < N; n += S::THREADS) lengths[n] = (int)clamped_span(p, n).length;
  __syncthreads();
  for (int n = threadIdx.x; n < N; n += S::THREADS) {
    const int length = lengths[n];
    int before = 0;
    for (int m = 0; m < N; ++m) before += lengths[m] > length || (lengths[m] == length && m < n);
    shared.order[before] = (uint16_t)n;
  }
}

template <class S>
__device__ __forceinline__ void prefill(const fkda_sm90_params &params) {
  extern __shared__ __align__(1024) char memory[];
  Shared<S> &shared = *reinterpret_cast<Shared<S> *>(memory + (-address(memory) & (ALIGNMENT - 1)));
  static_assert(sizeof(shared.slots[0]) % ALIGNMENT == 0 && sizeof(shared.handover[0]) % 512 == 0,
                "alignment");
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::SLOTS; ++i) {
      shared.slot_full[i].init(1);
      init_warps(shared.slot_free[i], S::STATE_WARPS);
    }
    for (int i = 0; i < S::VALUES; ++i) {
      shared.value_full[i].init(1);
      init_warps(shared.value_out[i], S::STATE_WARPS);
    }
    for (int i = 0; i < S::HANDOVERS; ++i) {
      init_warps(shared.handover_full[i], 4 + 1);
      init_warps(shared.handover_free[i], S::STATE_WARPS);
    }
    if (!S::BOUNDED)
      for (int i = 0; i < S::FACTOR_GROUPS; ++i) shared.reloaded[i].init(1);
    for (int i = 0; i < SOLVERS; ++i) {
      init_warps(shared.L_full[i], 4);
      init_warps(shared.L_free[i], 1);
    }
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
  sort_sequences(params.problem, shared);
  fence_async();
  __syncthreads();
  if (threadIdx.x < S::FIRST_FACTOR) {
    cutlass::arch::warpgroup_reg_alloc<S::STATE_REGISTERS>();
    run_state<S>(params.problem, shared);
  } else if (threadIdx.x < S::FIRST_HELPER) {
    cutlass::arch::warpgroup_reg_dealloc<S::FACTOR_REGISTERS>();
    run_factors<S>(params, shared);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<S::HELPER_REGISTERS>();
    run_helpers<S>(params, shared);
  }
}

}  // namespace fkda

#define FKDA_ENTRY(K, part, dtype, bounded, suffix)                                                \
  extern "C" __global__ void __launch_bounds__(FKDA_SM90_PREFILL_THREADS, 1)                       \
      fkda_sm90_prefill_k##K##_v##part##suffix(const __grid_constant__ fkda_sm90_params params) {  \
    using S = fkda::Shape<K, part, dtype == FKDA_F32 ? 4 : 2, bounded>;                            \
    static_assert(S::THREADS == FKDA_SM90_PREFILL_THREADS, "threads");                             \
    static_assert(sizeof(fkda::Shared<S>) + fkda::ALIGNMENT <= FKDA_SM90_PREFILL_SHARED,           \
                  "shared memory");                                                                \
    fkda::prefill<S>(params);                                                                      \
  }
FKDA_SM90_PREFILL_LIST(FKDA_ENTRY)
