/* Vector shim for any processor: the compiler's own vectors of four floats (SSE2 on x86-64, scalar code
 * where there is nothing better). See src/cpu/kernels.h for what a shim provides.
 *
 * A struct of four floats with loops over the lanes, which needs no extension, ran 40 times slower: gcc
 * 12 keeps such structs in memory. No fused multiply-add: without the instruction fmaf() is a library
 * call. The build fixes -ffp-contract=off, so that results do not depend on the compiler. */
#ifndef FKDA_CPU_SIMD_H
#define FKDA_CPU_SIMD_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "cpu/convert.h"

#define ISA_NAME "scalar"
#define LANES 4
#define TILE_ROWS 4 /* 4 x 2 accumulators of 16 SSE registers */
#define TILE_VECTORS 2

typedef float vec __attribute__((vector_size(16)));
typedef int32_t vec_bits __attribute__((vector_size(16)));

static inline vec v_load(const float *p) {
  vec a;
  memcpy(&a, p, sizeof a);
  return a;
}
static inline void v_store(float *p, vec a) { memcpy(p, &a, sizeof a); }
static inline vec v_set(float a) { return (vec){a, a, a, a}; }
static inline vec v_add(vec a, vec b) { return a + b; }
static inline vec v_sub(vec a, vec b) { return a - b; }
static inline vec v_mul(vec a, vec b) { return a * b; }
static inline vec v_fma(vec a, vec b, vec c) { return a * b + c; }
static inline vec v_fnma(vec a, vec b, vec c) { return c - a * b; }

static inline vec v_choose(vec_bits mask, vec yes, vec no) {
  return (vec)((mask & (vec_bits)yes) | (~mask & (vec_bits)no));
}
static inline vec v_max(vec a, vec b) { return v_choose(a > b, a, b); }
static inline vec v_min(vec a, vec b) { return v_choose(a < b, a, b); }
static inline vec v_unless_below(vec a, vec limit, vec x) {
  return (vec)((vec_bits)x & ~(vec_bits)(a < limit));
}
static inline vec v_abs(vec a) { return (vec)((vec_bits)a & 0x7fffffff); }
static inline vec v_reciprocal(vec a) { return 1 / a; }
static inline vec v_rsqrt(vec a) {
  return 1 / (vec){sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])};
}

/* Adding and taking away 1.5 * 2^23 leaves the nearest integer, ties to even, for |a| < 2^22. */
static inline vec v_round(vec a) { return (a + 12582912.0f) - 12582912.0f; }

/* n in [-127, 127]: the exponent field of 2^n; -127 gives zero. A NaN in n comes with one in a. */
static inline vec v_scale2(vec a, vec n) {
  n = v_choose(n > -127.0f, n, v_set(-127)); /* a NaN may not be converted */
  return a * (vec)((__builtin_convertvector(n, vec_bits) + 127) << 23);
}

static inline float v_sum(vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }

static inline bool v_any_not_below(vec a, vec limit) {
  const vec_bits below = a <= limit;
  return (below[0] & below[1] & below[2] & below[3]) == 0;
}

static inline vec v_load_bf16(const uint16_t *p) {
  return (vec)(vec_bits){(int32_t)((uint32_t)p[0] << 16), (int32_t)((uint32_t)p[1] << 16),
                         (int32_t)((uint32_t)p[2] << 16), (int32_t)((uint32_t)p[3] << 16)};
}
static inline vec v_load_f16(const uint16_t *p) {
  return (vec){fkda_f16_to_f32(p[0]), fkda_f16_to_f32(p[1]), fkda_f16_to_f32(p[2]),
               fkda_f16_to_f32(p[3])};
}
static inline void v_store_bf16(uint16_t *p, vec a) {
  for (int i = 0; i < LANES; ++i) p[i] = fkda_f32_to_bf16(a[i]);
}
static inline void v_load2_bf16(const uint16_t *p, vec x[2]) {
  for (int i = 0; i < 2; ++i)
    x[i] = (vec){fkda_bf16_to_f32(p[i]), fkda_bf16_to_f32(p[i + 2]), fkda_bf16_to_f32(p[i + 4]),
                 fkda_bf16_to_f32(p[i + 6])};
}
static inline void v_store2_bf16(uint16_t *p, const vec x[2]) {
  for (int i = 0; i < 2 * LANES; ++i) p[i] = fkda_f32_to_bf16(x[i % 2][i / 2]);
}
static inline void v_store_f16(uint16_t *p, vec a) {
  for (int i = 0; i < LANES; ++i) p[i] = fkda_f32_to_f16(a[i]);
}

/* out[j][i] = in[i][j], 4 x 4. */
static inline void v_transpose(vec r[LANES]) {
  const vec a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < LANES; ++i) r[i] = (vec){a[i], b[i], c[i], d[i]};
}

#endif
