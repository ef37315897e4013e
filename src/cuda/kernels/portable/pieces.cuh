/* What the portable prefill and backward share: matrix products, copies, the gate. */
#ifndef FKDA_CUDA_PORTABLE_PIECES_CUH
#define FKDA_CUDA_PORTABLE_PIECES_CUH

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "cuda/kernels/device.cuh"

namespace fkda {
namespace {

/* How far a half of 16 tokens may lead from the anchor in their middle, else factors leave f32's range. */
constexpr float ANCHOR_RANGE = 44.0f * LOG2E;

using Mma = cute::SM80_16x8x16_F32BF16BF16F32_TN;

/* Two numbers as the sum of two bf16 pairs each: 16 bits of mantissa. */
__device__ __forceinline__ void split(float x, float y, uint32_t &high, uint32_t &low) {
  high = pack(x, y);
  low = pack_rest(x, y, high);
}

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  Mma::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]);
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const bf16 *p) {
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t *>(p), r[0], r[1], r[2],
                                r[3]);
}
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const bf16 *p) {
  cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t *>(p), r[0], r[1], r[2],
                                r[3]);
}

/* 16 bytes global -> shared, zeros if !valid. */
__device__ __forceinline__ void copy_piece(void *to, const void *from, bool valid) {
  cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
      *static_cast<const cute::uint128_t *>(from), *static_cast<cute::uint128_t *>(to), valid);
}

/* (2) for one channel, in units of log2; constants prepared once. */
struct Gate {
  float slope, offset; /* bounded: -log2(e) exp(A_log) (raw + bias) as one fma. softplus: 1, bias */
  float factor;        /* bounded: lower_bound log2(e). softplus: -log2(e) exp(A_log) */
  __device__ Gate(const fkda_problem &p, int mode, float exp_A, float bias) {
    slope = mode == FKDA_GATE_BOUNDED ? -LOG2E * exp_A : 1.0f;
    offset = slope * bias;
    factor = mode == FKDA_GATE_BOUNDED ? LOG2E * (float)p.lower_bound : -LOG2E * exp_A;
  }
  template <int MODE>
  __device__ __forceinline__ float decay(float raw) const {
    if (MODE == FKDA_GATE_BOUNDED) /* within [-5, 0] log2(e) as it is */
      return factor * reciprocal(1.0f + exp2_approx(fmaf(slope, raw, offset)));
    float g = MODE == FKDA_GATE_SOFTPLUS ? factor * softplus(raw + offset) : LOG2E * raw;
    g = g > 0 ? 0 : g; /* comparisons that keep a NaN, unlike fminf */
    return g < CLAMP ? CLAMP : g;
  }
};

}  // namespace
}  // namespace fkda

#endif
