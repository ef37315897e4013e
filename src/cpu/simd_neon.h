/* Vector shim: NEON (AArch64). See src/cpu/kernels.h for what a shim provides. */
#ifndef FKDA_CPU_SIMD_H
#define FKDA_CPU_SIMD_H

#include <arm_neon.h>
#include <stdbool.h>
#include <stdint.h>

#define ISA_NAME "neon"
#define LANES 4
#define TILE_ROWS 4 /* 4 x 4 accumulators of 32 registers */
#define TILE_VECTORS 4

typedef float32x4_t vec;

static inline vec v_load(const float *p) { return vld1q_f32(p); }
static inline void v_store(float *p, vec a) { vst1q_f32(p, a); }
static inline vec v_set(float a) { return vdupq_n_f32(a); }
static inline vec v_add(vec a, vec b) { return vaddq_f32(a, b); }
static inline vec v_sub(vec a, vec b) { return vsubq_f32(a, b); }
static inline vec v_mul(vec a, vec b) { return vmulq_f32(a, b); }
static inline vec v_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
static inline vec v_fnma(vec a, vec b, vec c) { return vfmsq_f32(c, a, b); }
static inline vec v_max(vec a, vec b) { return vmaxq_f32(a, b); } /* NaN in either gives NaN */
static inline vec v_min(vec a, vec b) { return vminq_f32(a, b); }
static inline vec v_unless_below(vec a, vec limit, vec x) {
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vcltq_f32(a, limit)));
}
static inline vec v_abs(vec a) { return vabsq_f32(a); }
static inline vec v_rsqrt(vec a) { return vdivq_f32(v_set(1), vsqrtq_f32(a)); }
static inline vec v_reciprocal(vec a) { return vdivq_f32(v_set(1), a); }
static inline vec v_round(vec a) { return vrndnq_f32(a); }
static inline float v_sum(vec a) { return vaddvq_f32(a); }

/* n in [-127, 127]: the exponent field of 2^n; -127 gives zero. */
static inline vec v_scale2(vec a, vec n) {
  const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
  return v_mul(a, vreinterpretq_f32_s32(vshlq_n_s32(biased, 23)));
}

static inline bool v_any_not_below(vec a, vec limit) {
  return vminvq_u32(vcleq_f32(a, limit)) == 0;
}

static inline vec v_load_bf16(const uint16_t *p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

/* Rounded to bf16 in the upper halves; the lower ones are anything. */
static inline uint32x4_t v_round_bf16(vec a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vbslq_u32(vceqq_f32(a, a), rounded, quiet);
}

static inline void v_store_bf16(uint16_t *p, vec a) {
  vst1_u16(p, vshrn_n_u32(v_round_bf16(a), 16));
}

static inline void v_load2_bf16(const uint16_t *p, vec x[2]) {
  const uint32x4_t bits = vreinterpretq_u32_u16(vld1q_u16(p));
  x[0] = vreinterpretq_f32_u32(vshlq_n_u32(bits, 16));
  x[1] = vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff0000)));
}

static inline void v_store2_bf16(uint16_t *p, const vec x[2]) {
  const uint32x4_t both = vsriq_n_u32(v_round_bf16(x[1]), v_round_bf16(x[0]), 16);
  vst1q_u16(p, vreinterpretq_u16_u32(both));
}

static inline vec v_load_f16(const uint16_t *p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

static inline void v_store_f16(uint16_t *p, vec a) {
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a)));
}

/* out[j][i] = in[i][j], 4 x 4. */
static inline void v_transpose(vec r[LANES]) {
  const float32x4x2_t low = vtrnq_f32(r[0], r[1]), high = vtrnq_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(low.val[0]), vget_low_f32(high.val[0]));
  r[1] = vcombine_f32(vget_low_f32(low.val[1]), vget_low_f32(high.val[1]));
  r[2] = vcombine_f32(vget_high_f32(low.val[0]), vget_high_f32(high.val[0]));
  r[3] = vcombine_f32(vget_high_f32(low.val[1]), vget_high_f32(high.val[1]));
}

#endif
