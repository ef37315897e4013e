/* Vector shim: AVX2, FMA and F16C. See src/cpu/kernels.h for what a shim provides. */
#ifndef FKDA_CPU_SIMD_H
#define FKDA_CPU_SIMD_H

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>

#define ISA_NAME "avx2"
#define LANES 8
#define TILE_ROWS 4 /* 4 x 2 accumulators of 16 registers: enough for latency 4 on 2 ports */
#define TILE_VECTORS 2

typedef __m256 vec;

static inline vec v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, vec a) { _mm256_storeu_ps(p, a); }
static inline vec v_set(float a) { return _mm256_set1_ps(a); }
static inline vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
static inline vec v_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
static inline vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec v_fnma(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }
static inline vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec v_min(vec a, vec b) { return _mm256_min_ps(a, b); }
static inline vec v_unless_below(vec a, vec limit, vec x) {
  return _mm256_and_ps(_mm256_cmp_ps(a, limit, _CMP_NLT_UQ), x);
}
static inline vec v_abs(vec a) { return _mm256_andnot_ps(v_set(-0.0f), a); }
static inline vec v_rsqrt(vec a) { return _mm256_div_ps(v_set(1), _mm256_sqrt_ps(a)); }
static inline vec v_reciprocal(vec a) { return _mm256_div_ps(v_set(1), a); }
static inline vec v_round(vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* n in [-127, 127]: the exponent field of 2^n; -127 gives zero. */
static inline vec v_scale2(vec a, vec n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return v_mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}

static inline float v_sum(vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline bool v_any_not_below(vec a, vec limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, limit, _CMP_NLE_UQ)) != 0;
}

static inline vec v_load_bf16(const uint16_t *p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

/* Rounded to bf16 in the upper halves; the lower ones are anything. */
static inline __m256i v_round_bf16(vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}

static inline void v_store_bf16(uint16_t *p, vec a) {
  const __m256i result = _mm256_srli_epi32(v_round_bf16(a), 16);
  _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(result),
                                                  _mm256_extracti128_si256(result, 1)));
}

static inline void v_load2_bf16(const uint16_t *p, vec x[2]) {
  const __m256i bits = _mm256_loadu_si256((const __m256i *)p);
  x[0] = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  x[1] = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int)0xffff0000)));
}

static inline void v_store2_bf16(uint16_t *p, const vec x[2]) {
  const __m256i even = _mm256_srli_epi32(v_round_bf16(x[0]), 16);
  _mm256_storeu_si256((__m256i *)p, _mm256_blend_epi16(even, v_round_bf16(x[1]), 0xaa));
}

static inline vec v_load_f16(const uint16_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

static inline void v_store_f16(uint16_t *p, vec a) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

/* out[j][i] = in[i][j], 8 x 8: pairs, quads, then 128-bit halves. */
static inline void v_transpose(vec r[LANES]) {
  vec s[LANES];
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const vec low = r[i], high = r[i + 4];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

#endif
