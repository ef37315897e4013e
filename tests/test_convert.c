/* src/cpu/convert.h: every 16-bit value, and rounding against its definition. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cpu/convert.h"

typedef struct format {
  float (*widen)(uint16_t);
  uint16_t (*narrow_f32)(float);
  uint16_t (*narrow_f64)(double);
  uint16_t infinity; /* its pattern; above are NaNs */
} format;

static const format bf16 = {fkda_bf16_to_f32, fkda_f32_to_bf16, fkda_f64_to_bf16, 0x7f80};
static const format f16 = {fkda_f16_to_f32, fkda_f32_to_f16, fkda_f64_to_f16, 0x7c00};

/* A magnitude's value by the format's definition; past the largest, where the next would lie. */
static double by_definition(const format *f, uint32_t magnitude) {
  const int mantissa_bits = f->infinity == 0x7f80 ? 7 : 10;
  const int bias = f->infinity == 0x7f80 ? 127 : 15;
  const uint32_t exponent = magnitude >> mantissa_bits;
  const double mantissa = magnitude & ((1u << mantissa_bits) - 1);
  if (exponent == 0) return ldexp(mantissa, 1 - bias - mantissa_bits);
  return ldexp(mantissa + (1u << mantissa_bits), (int)exponent - bias - mantissa_bits);
}

static void check_round_trip(const format *f) {
  for (uint32_t x = 0; x < 0x10000; x++) {
    const uint32_t magnitude = x & 0x7fff;
    const float wide = f->widen((uint16_t)x);
    if (magnitude > f->infinity) {
      assert_true(isnan(wide));
      assert_true(isnan(f->widen(f->narrow_f32(wide))));
      assert_true(isnan(f->widen(f->narrow_f64(wide))));
      continue;
    }
    const double expected = magnitude == f->infinity ? INFINITY : by_definition(f, magnitude);
    assert_true(fabsf(wide) == expected && !signbit(wide) == !(x & 0x8000));
    assert_int_equal(f->narrow_f32(wide), x);
    assert_int_equal(f->narrow_f64(wide), x);
  }
}

/* Between neighbours a and b: nearest, ties to even, seen from f32 and from closer in f64. */
static void check_rounding(const format *f) {
  for (uint32_t m = 0; m < f->infinity; m++) {
    for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000) {
      const double s = sign ? -1 : 1;
      const double a = by_definition(f, m), b = by_definition(f, m + 1), middle = (a + b) / 2;
      const uint32_t down = sign | m, up = sign | (m + 1), even = m % 2 ? up : down;
      const double below = nextafter(middle, a), above = nextafter(middle, b);
      assert_int_equal(f->narrow_f64(s * middle), even);
      assert_int_equal(f->narrow_f64(s * below), down);
      assert_int_equal(f->narrow_f64(s * above), up);
      const float tie = (float)middle; /* exact: one bit more than a and b */
      if (tie != middle) continue;     /* but where bf16's last place is f32's own */
      assert_int_equal(f->narrow_f32((float)s * tie), even);
      assert_int_equal(f->narrow_f32((float)s * nextafterf(tie, (float)a)), down);
      assert_int_equal(f->narrow_f32((float)s * nextafterf(tie, INFINITY)), up);
    }
  }
}

static void round_trip(void **state) {
  (void)state;
  check_round_trip(&bf16);
  check_round_trip(&f16);
}

static void rounding(void **state) {
  (void)state;
  check_rounding(&bf16);
  check_rounding(&f16);
}

static void extremes(void **state) {
  (void)state;
  const double big[] = {1e39, 1e300, INFINITY};
  for (int i = 0; i < 3; i++) {
    assert_int_equal(fkda_f64_to_bf16(big[i]), 0x7f80);
    assert_int_equal(fkda_f64_to_bf16(-big[i]), 0xff80);
    assert_int_equal(fkda_f64_to_f16(big[i]), 0x7c00);
    assert_int_equal(fkda_f64_to_f16(-big[i]), 0xfc00);
  }
  const double small[] = {0, 1e-300, 4.9e-324};
  for (int i = 0; i < 3; i++) {
    assert_int_equal(fkda_f64_to_bf16(small[i]), 0);
    assert_int_equal(fkda_f64_to_bf16(-small[i]), 0x8000);
    assert_int_equal(fkda_f64_to_f16(small[i]), 0);
    assert_int_equal(fkda_f64_to_f16(-small[i]), 0x8000);
  }
  /* A NaN whose mantissa lies only in the bits that are cut off must not become infinite. */
  assert_true(isnan(fkda_bf16_to_f32(fkda_f32_to_bf16(fkda_f32_from_bits(0x7f800001u)))));
  assert_true(isnan(fkda_f16_to_f32(fkda_f32_to_f16(fkda_f32_from_bits(0x7f800001u)))));
}

static void rows(void **state) {
  (void)state;
  const double from[3] = {1.0 / 3, -2, 0x1p-20};
  const int32_t dtypes[] = {FKDA_F64, FKDA_F32, FKDA_BF16, FKDA_F16};
  const double unit[] = {0, 0x1p-24, 0x1p-8, 0x1p-11}; /* half the last place, relative */
  for (int i = 0; i < 4; i++) {
    double memory[5] = {0}, back[3];
    fkda_store_f64(memory, dtypes[i], 1, from, 3);
    fkda_load_f64(back, memory, dtypes[i], 1, 3);
    for (int j = 0; j < 3; j++) assert_true(fabs(back[j] - from[j]) <= unit[i] * fabs(from[j]));
    fkda_load_f64(back, memory, dtypes[i], 0, 1);
    assert_true(back[0] == 0);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(round_trip),
      cmocka_unit_test(rounding),
      cmocka_unit_test(extremes),
      cmocka_unit_test(rows),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
