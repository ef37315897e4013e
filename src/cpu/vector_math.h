/* Vector functions that the algorithm texts share, over whichever shim was included before. */
#ifndef FKDA_CPU_VECTOR_MATH_H
#define FKDA_CPU_VECTOR_MATH_H

#include <math.h>
#include <string.h>

#include "check/problem.h"
#include "cpu/convert.h"

#define INLINE static inline __attribute__((always_inline))

/* e^x for |x| <= 88, relative error below 2e-7.
 * x = n ln2 + r, |r| <= ln2/2; e^r = 1 + r + r^2 p(r), p minimax of degree 4 (error 7.5e-9). */
INLINE vec v_exp_in_range(vec x) {
  const vec n = v_round(v_mul(x, v_set(1.44269504f)));
  /* ln2 in two parts: n times the first is exact */
  vec r = v_fnma(n, v_set(0.693145751953125f), x);
  r = v_fnma(n, v_set(1.42860677e-6f), r);
  vec p = v_set(1.39411476628e-3f);
  p = v_fma(p, r, v_set(8.36319252024e-3f));
  p = v_fma(p, r, v_set(4.16663748583e-2f));
  p = v_fma(p, r, v_set(1.66665769024e-1f));
  p = v_fma(p, r, v_set(5.00000002699e-1f));
  p = v_fma(p, v_mul(r, r), r);
  return v_scale2(v_add(p, v_set(1)), n);
}

INLINE vec v_exp(vec x) { return v_exp_in_range(v_max(v_set(-88.0f), v_min(v_set(88.0f), x))); }

INLINE vec v_sigmoid(vec x) { return v_reciprocal(v_add(v_set(1), v_exp(v_sub(v_set(0), x)))); }

/* log(1 + e^x) = max(x, 0) + log1p(e^-|x|); log1p(y) = 2 atanh(s), s = y / (2 + y) in [0, 1/3],
 * 2 atanh(s) = s q(s^2), q minimax of degree 4 (error 8e-9). */
INLINE vec v_softplus(vec x) {
  const vec y = v_exp(v_sub(v_set(0), v_abs(x)));
  const vec s = v_mul(y, v_reciprocal(v_add(v_set(2), y)));
  const vec z = v_mul(s, s);
  vec q = v_set(0.2819154961037639f);
  q = v_fma(q, z, v_set(0.2795766525963916f));
  q = v_fma(q, z, v_set(0.40025114361268205f));
  q = v_fma(q, z, v_set(0.6666631014408443f));
  q = v_fma(q, z, v_set(2.0000000080787173f));
  return v_fma(s, q, v_max(v_set(0), x));
}

/* (2): log-decay of one vector of channels; gate is a constant wherever this is inlined. */
INLINE vec log_decay(fkda_gate gate, vec raw, vec bias, vec exp_A, vec lower_bound) {
  vec g = raw;
  if (gate == FKDA_GATE_BOUNDED) { /* in [-5, 0] as it is */
    const vec x = v_mul(v_sub(v_set(0), exp_A), v_add(raw, bias));
    return v_mul(lower_bound, v_reciprocal(v_add(v_set(1), v_exp(x))));
  }
  if (gate == FKDA_GATE_SOFTPLUS) g = v_sub(v_set(0), v_mul(exp_A, v_softplus(v_add(raw, bias))));
  return v_max(v_set((float)FKDA_GATE_CLAMP), v_min(v_set(0), g));
}

INLINE const void *element_at(const void *data, int32_t dtype, int64_t offset) {
  return (const char *)data + offset * (dtype == FKDA_F32 ? 4 : 2);
}

INLINE vec load_as(const void *from, int32_t dtype) {
  if (dtype == FKDA_BF16) return v_load_bf16(from);
  if (dtype == FKDA_F16) return v_load_f16(from);
  return v_load(from);
}

INLINE void store_as(void *to, int32_t dtype, vec a) {
  if (dtype == FKDA_BF16)
    v_store_bf16(to, a);
  else if (dtype == FKDA_F16)
    v_store_f16(to, a);
  else
    v_store(to, a);
}

INLINE void load_row_as(float *to, const char *from, int32_t dtype, int64_t count, int64_t padded) {
  const int64_t size = dtype == FKDA_F32 ? 4 : 2;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) v_store(to + i, load_as(from + i * size, dtype));
  if (i < count) {
    float tail[LANES] = {0};
    uint16_t tail16[LANES] = {0};
    if (dtype == FKDA_F32)
      memcpy(tail, from + i * size, (size_t)((count - i) * size));
    else
      memcpy(tail16, from + i * size, (size_t)((count - i) * size));
    v_store(to + i, load_as(dtype == FKDA_F32 ? (const void *)tail : tail16, dtype));
    i += LANES;
  }
  for (; i < padded; i += LANES) v_store(to + i, v_set(0));
}

/* to[0..padded) = from[0..count) as f32, then zeros; padded is a multiple of LANES. */
static void load_row(float *to, const void *data, int32_t dtype, int64_t offset, int64_t count,
                     int64_t padded) {
  const char *from = element_at(data, dtype, offset);
  if (dtype == FKDA_BF16)
    load_row_as(to, from, FKDA_BF16, count, padded);
  else if (dtype == FKDA_F16)
    load_row_as(to, from, FKDA_F16, count, padded);
  else
    load_row_as(to, from, FKDA_F32, count, padded);
}

INLINE void store_row_as(char *to, int32_t dtype, const float *from, int64_t count) {
  const int64_t size = dtype == FKDA_F32 ? 4 : 2;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_as(to + i * size, dtype, v_load(from + i));
  if (i < count) {
    float tail[LANES];
    uint16_t tail16[LANES];
    void *const at = dtype == FKDA_F32 ? (void *)tail : tail16;
    store_as(at, dtype, v_load(from + i));
    memcpy(to + i * size, at, (size_t)((count - i) * size));
  }
}

/* data[offset .. offset+count) = from[0..count); from is readable up to the next multiple of LANES. */
static void store_row(void *data, int32_t dtype, int64_t offset, const float *from, int64_t count) {
  char *to = (char *)element_at(data, dtype, offset);
  if (dtype == FKDA_BF16)
    store_row_as(to, FKDA_BF16, from, count);
  else if (dtype == FKDA_F16)
    store_row_as(to, FKDA_F16, from, count);
  else
    store_row_as(to, FKDA_F32, from, count);
}

INLINE float load_scalar(const void *data, int32_t dtype, int64_t offset) {
  const void *from = element_at(data, dtype, offset);
  if (dtype == FKDA_F32) return *(const float *)from;
  const uint16_t bits = *(const uint16_t *)from;
  return dtype == FKDA_BF16 ? fkda_bf16_to_f32(bits) : fkda_f16_to_f32(bits);
}

INLINE void store_scalar(void *data, int32_t dtype, int64_t offset, float x) {
  void *to = (char *)element_at(data, dtype, offset);
  if (dtype == FKDA_F32)
    *(float *)to = x;
  else
    *(uint16_t *)to = dtype == FKDA_BF16 ? fkda_f32_to_bf16(x) : fkda_f32_to_f16(x);
}

/* exp(A_log[head]); an absent A_log is 0. */
INLINE float exp_A_of(const fkda_problem *p, int64_t head) {
  return p->A_log.data ? expf(load_scalar(p->A_log.data, p->A_log.dtype, head)) : 1;
}

/* dt_bias[head][0..K), then zeros; absent: zeros. */
static void load_bias(float *to, const fkda_problem *p, int64_t head, int64_t padded) {
  if (p->dt_bias.data)
    load_row(to, p->dt_bias.data, p->dt_bias.dtype, head * p->K, p->K, padded);
  else
    memset(to, 0, (size_t)padded * sizeof *to);
}

/* Does sequence n start from its initial state, or from zero? */
INLINE bool has_initial_state(const fkda_problem *p, int64_t n) {
  if (!p->initial.data) return false;
  return !p->has_initial.data ||
         ((const uint8_t *)p->has_initial.data)[n * p->has_initial.stride] != 0;
}

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Denormals cost a hundred cycles each and cannot change a result by more than 1e-38: flushed while a
 * job runs. The caller's mode is restored. */
#if defined(__SSE__)
#include <xmmintrin.h>
typedef unsigned int float_mode;
INLINE float_mode flush_denormals(void) {
  const float_mode mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040u); /* FTZ | DAZ */
  return mode;
}
INLINE void restore_denormals(float_mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
typedef uint64_t float_mode;
INLINE float_mode flush_denormals(void) {
  float_mode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  __asm__ volatile("msr fpcr, %0" ::"r"(mode | (UINT64_C(1) << 24)));
  return mode;
}
INLINE void restore_denormals(float_mode mode) { __asm__ volatile("msr fpcr, %0" ::"r"(mode)); }
#else
typedef int float_mode;
INLINE float_mode flush_denormals(void) { return 0; }
INLINE void restore_denormals(float_mode mode) { (void)mode; }
#endif

#endif
