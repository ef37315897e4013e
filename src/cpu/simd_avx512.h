/* Vector shim: AVX-512 (F, BW, DQ, VL). See src/cpu/kernels.h for what a shim provides. */
#ifndef FKDA_CPU_SIMD_H
#define FKDA_CPU_SIMD_H

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>

#define ISA_NAME "avx512"
#define LANES 16
/* 8 x 2 accumulators, 2 loads and 8 broadcasts for 16 FMAs: bound by the FMAs. */
#define TILE_ROWS 8
#define TILE_VECTORS 2

typedef __m512 vec;

static inline vec v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vec a) { _mm512_storeu_ps(p, a); }
static inline vec v_set(float a) { return _mm512_set1_ps(a); }
static inline vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline vec v_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
static inline vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec v_fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }
static inline vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec v_min(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline vec v_unless_below(vec a, vec limit, vec x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, limit, _CMP_NLT_UQ), x);
}
static inline vec v_abs(vec a) { return _mm512_abs_ps(a); }
static inline vec v_rsqrt(vec a) { return _mm512_div_ps(v_set(1), _mm512_sqrt_ps(a)); }
static inline vec v_round(vec a) { return _mm512_roundscale_ps(a, 8); }
static inline vec v_scale2(vec a, vec n) { return _mm512_scalef_ps(a, n); }
static inline float v_sum(vec a) { return _mm512_reduce_add_ps(a); }

/* One Newton step on 14 bits: within an ulp of the division, at a quarter of its 512-bit cost. */
static inline vec v_reciprocal(vec a) {
  const vec r = _mm512_rcp14_ps(a);
  return v_mul(r, v_fnma(a, r, v_set(2)));
}

static inline bool v_any_not_below(vec a, vec limit) {
  return _mm512_cmp_ps_mask(a, limit, _CMP_NLE_UQ) != 0;
}

static inline vec v_load_bf16(const uint16_t *p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

/* Rounded to bf16 in the upper halves; the lower ones are anything. */
static inline __m512i v_round_bf16(vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}

static inline void v_store_bf16(uint16_t *p, vec a) {
  const __m512i upper = _mm512_srli_epi32(v_round_bf16(a), 16);
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(upper));
}

static inline void v_load2_bf16(const uint16_t *p, vec x[2]) {
  const __m512i bits = _mm512_loadu_si512(p);
  x[0] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  x[1] = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
}

static inline void v_store2_bf16(uint16_t *p, const vec x[2]) {
  const __m512i even = _mm512_srli_epi32(v_round_bf16(x[0]), 16);
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000); /* (odd & upper) | even */
  _mm512_storeu_si512(p, _mm512_ternarylogic_epi32(v_round_bf16(x[1]), upper, even, 0xea));
}

static inline vec v_load_f16(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

static inline void v_store_f16(uint16_t *p, vec a) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

/* out[j][i] = in[i][j], 16 x 16: pairs, quads, then 128-bit quarters. */
static inline void v_transpose(vec r[LANES]) {
  vec s[LANES];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    s[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    s[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    s[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(s[i], s[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(s[i], s[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0xdd);
  }
}

#endif
