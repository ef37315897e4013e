/* wgmma of a warpgroup: m64nNk16, bf16 operands, f32 accumulators. */
#ifndef FKDA_CUDA_SM90_WGMMA_CUH
#define FKDA_CUDA_SM90_WGMMA_CUH

#include <cute/arch/mma_sm90_gmma.hpp>

#include "cuda/kernels/sm90/shared.cuh"

namespace fkda {

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

/* In a cluster, bits 24 and up of an address are the block's rank; descriptors have no room for it. */
__device__ __forceinline__ uint64_t start_address(uint32_t at) { return at >> 4 & 0x3fff; }

/* Descriptors of operands in shared memory, addresses and strides in 16 bytes. Rows of a tile (128 bytes) or
 * a square (64 bytes) are either the operand's M or N rows (K-major) or its K rows (MN-major); groups
 * of 8 rows lie 1024 or 512 bytes apart. `leading`: from one slice of 64 columns to the next, MN-major. */
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t at, uint32_t leading = 16) {
  return start_address(at) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}
__device__ __forceinline__ uint64_t square_descriptor(uint32_t at) {
  return start_address(at) | (uint64_t)1 << 16 | (uint64_t)(512 >> 4) << 32 | (uint64_t)2 << 62;
}

#define FKDA_D4(i) d[i], d[i + 1], d[i + 2], d[i + 3]
#define FKDA_D16(i) FKDA_D4(i), FKDA_D4(i + 4), FKDA_D4(i + 8), FKDA_D4(i + 12)

/* d[64 x N] (+)= A[64 x 16] B[16 x N], A from registers. */
template <Major B>
__device__ __forceinline__ void multiply(float (&d)[16], const uint32_t *a, uint64_t b, bool add) {
  cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<Major::K, B>::fma(
      a[0], a[1], a[2], a[3], b, FKDA_D16(0), add ? ScaleOut::One : ScaleOut::Zero);
}
template <Major B>
__device__ __forceinline__ void multiply(float (&d)[32], const uint32_t *a, uint64_t b, bool add) {
  cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<Major::K, B>::fma(
      a[0], a[1], a[2], a[3], b, FKDA_D16(0), FKDA_D16(16), add ? ScaleOut::One : ScaleOut::Zero);
}
template <Major B>
__device__ __forceinline__ void multiply(float (&d)[64], const uint32_t *a, uint64_t b, bool add) {
  cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, B>::fma(
      a[0], a[1], a[2], a[3], b, FKDA_D16(0), FKDA_D16(16), FKDA_D16(32), FKDA_D16(48),
      add ? ScaleOut::One : ScaleOut::Zero);
}
/* A from shared memory. */
__device__ __forceinline__ void multiply(float (&d)[16], uint64_t a, uint64_t b, bool add) {
  cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_SS<Major::K, Major::K>::fma(
      a, b, FKDA_D16(0), add ? ScaleOut::One : ScaleOut::Zero);
}

/* d[64 x 32] = A[64 x 32] B[32 x 32], both in two bf16 parts, of which the low ones do not meet; B a square. */
template <Major B>
__device__ __forceinline__ void multiply_by_parts(float (&d)[16], const uint32_t (&high)[8],
                                                  const uint32_t (&low)[8], uint64_t b_high,
                                                  uint64_t b_low) {
  constexpr int HALFWAY = (B == Major::K ? 16 * (int)sizeof(bf16) : 16 * 64) / 16;
  multiply<B>(d, low, b_high, false);
  multiply<B>(d, low + 4, b_high + HALFWAY, true);
  multiply<B>(d, high, b_low, true);
  multiply<B>(d, high + 4, b_low + HALFWAY, true);
  multiply<B>(d, high, b_high, true);
  multiply<B>(d, high + 4, b_high + HALFWAY, true);
}

#undef FKDA_D16
#undef FKDA_D4

/* Keeps the compiler from moving accumulators and operands across. */
template <int N>
__device__ __forceinline__ void fence(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(x[i]);
}
template <int N>
__device__ __forceinline__ void fence(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(x[i]);
}

}  // namespace fkda

#endif
