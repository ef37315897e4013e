/* Conversions between bf16, f16, f32 and f64, rounding to nearest, ties to even.
 *
 * NaN stays NaN (made quiet), infinities and the sign of zero are kept, subnormals are exact in one
 * direction and rounded once in the other, what is too large becomes infinite. Nothing here depends
 * on the instruction set or on flush-to-zero modes, so every backend may use it at its edges.
 */
#ifndef FKDA_CPU_CONVERT_H
#define FKDA_CPU_CONVERT_H

#include <stdint.h>
#include <string.h>

#include "flashkda/flashkda.h"

static inline uint32_t fkda_f32_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float fkda_f32_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* ---- to wider types: exact ------------------------------------------------------------------- */

static inline float fkda_bf16_to_f32(uint16_t x) { return fkda_f32_from_bits((uint32_t)x << 16); }

static inline float fkda_f16_to_f32(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000) << 16;
  const uint32_t exponent = (x >> 10) & 0x1f;
  const uint32_t mantissa = x & 0x3ff;
  if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24 */
    return fkda_f32_from_bits(sign | fkda_f32_bits((float)mantissa * 0x1p-24f));
  }
  if (exponent == 31) { /* infinite or NaN */
    const uint32_t quiet = mantissa ? 0x400000u : 0;
    return fkda_f32_from_bits(sign | 0x7f800000u | quiet | mantissa << 13);
  }
  return fkda_f32_from_bits(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
}

/* ---- to narrower types ----------------------------------------------------------------------- */

static inline uint16_t fkda_f32_to_bf16(float x) {
  const uint32_t bits = fkda_f32_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t fkda_f32_to_f16(float x) {
  const uint32_t bits = fkda_f32_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x1ff));
  if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00); /* 2^16 and more */
  if (magnitude < 0x38800000u) { /* below 2^-14: a multiple of 2^-24, the last place of [0.5, 1) */
    const uint32_t half = 0x3f000000u;
    return (uint16_t)(sign | (fkda_f32_bits(fkda_f32_from_bits(magnitude) + 0.5f) - half));
  }
  magnitude += 0xfff + (magnitude >> 13 & 1); /* may carry into the exponent, up to infinity */
  return (uint16_t)(sign | ((magnitude >> 13) - ((127 - 15) << 10)));
}

/* f64 to f32 "rounded to odd": cut off, and the last bit set if anything was lost. Rounding that to
 * a type at least two bits shorter equals rounding the f64 directly, without a double rounding. */
static inline float fkda_f64_to_f32_odd(double x) {
  const float nearest = (float)x;
  const double error = (double)nearest - x;
  if (error == 0 || error != error) return nearest; /* exact, infinite or NaN */
  uint32_t bits = fkda_f32_bits(nearest);
  const int away_from_zero = x < 0 ? error < 0 : error > 0;
  if (away_from_zero) bits -= 1;
  return fkda_f32_from_bits(bits | 1);
}

static inline uint16_t fkda_f64_to_bf16(double x) {
  return fkda_f32_to_bf16(fkda_f64_to_f32_odd(x));
}
static inline uint16_t fkda_f64_to_f16(double x) { return fkda_f32_to_f16(fkda_f64_to_f32_odd(x)); }

/* ---- rows of any floating-point dtype -------------------------------------------------------- */

/* to[i] = data[offset + i] for i in [0, n); data holds elements of `dtype`. */
static inline void fkda_load_f64(double *to, const void *data, int32_t dtype, int64_t offset,
                                 int64_t n) {
  switch (dtype) {
    case FKDA_F64: memcpy(to, (const double *)data + offset, (size_t)n * sizeof *to); break;
    case FKDA_F32:
      for (int64_t i = 0; i < n; i++) to[i] = ((const float *)data)[offset + i];
      break;
    case FKDA_BF16:
      for (int64_t i = 0; i < n; i++)
        to[i] = fkda_bf16_to_f32(((const uint16_t *)data)[offset + i]);
      break;
    case FKDA_F16:
      for (int64_t i = 0; i < n; i++) to[i] = fkda_f16_to_f32(((const uint16_t *)data)[offset + i]);
      break;
    default: break;
  }
}

/* data[offset + i] = from[i], rounded once. */
static inline void fkda_store_f64(void *data, int32_t dtype, int64_t offset, const double *from,
                                  int64_t n) {
  switch (dtype) {
    case FKDA_F64: memcpy((double *)data + offset, from, (size_t)n * sizeof *from); break;
    case FKDA_F32:
      for (int64_t i = 0; i < n; i++) ((float *)data)[offset + i] = (float)from[i];
      break;
    case FKDA_BF16:
      for (int64_t i = 0; i < n; i++) ((uint16_t *)data)[offset + i] = fkda_f64_to_bf16(from[i]);
      break;
    case FKDA_F16:
      for (int64_t i = 0; i < n; i++) ((uint16_t *)data)[offset + i] = fkda_f64_to_f16(from[i]);
      break;
    default: break;
  }
}

#endif
