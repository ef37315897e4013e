/* Every case of the table on every backend that this machine can run.
 *
 *   test_cases            all groups
 *   test_cases GROUP...   these groups
 *
 * A cmocka test per case. FLASHKDA_TEST_BACKEND restricts to one backend; FLASHKDA_TEST_LARGEST=N leaves out cases whose
 * states take more than N multiply-adds (tokens x heads x K x V): for sanitizers and emulation, ten times and a
 * hundred times slower, to which many tokens show nothing that few do not.
 *
 * SPDX-License-Identifier: MIT
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "cases/cases.h"

enum { MAX_TESTS = 2048 };

/* The table itself: names unique and findable, no group empty, nothing cut off. */
static void table_is_sound(void **state) {
  int per_group[FKDA_GROUPS] = {0};
  (void)state;
  assert_true(fkda_case_count() > 400);
  assert_null(fkda_case_at(-1));
  assert_null(fkda_case_at(fkda_case_count()));
  for (int i = 0; i < fkda_case_count(); i++) {
    const fkda_case *c = fkda_case_at(i);
    const char *group = fkda_group_name(c->group);
    assert_ptr_equal(fkda_case_find(c->name), c);
    assert_true(strlen(c->name) + 1 < sizeof c->name);
    assert_int_equal(strncmp(c->name, group, strlen(group)), 0);
    assert_true(c->name[strlen(group)] == '/');
    per_group[c->group]++;
  }
  for (int g = 0; g < FKDA_GROUPS; g++) assert_true(per_group[g] > 0);
}

/* Every listed case number that a CPU can show is in the table. */
static void numbers_are_covered(void **state) {
  static const int wanted[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 12,
                               13, 14, 15, 16, 17, 18, 19, 20, 21, 24};
  (void)state;
  for (size_t w = 0; w < sizeof wanted / sizeof wanted[0]; w++) {
    int found = 0;
    for (int i = 0; i < fkda_case_count(); i++) {
      for (int j = 0; j < FKDA_CASE_NUMBERS; j++) found += fkda_case_at(i)->numbers[j] == wanted[w];
    }
    if (!found) fail_msg("no case for number %d", wanted[w]);
  }
}

static double rounded(int32_t dtype, double value) {
  uint64_t bits = 0;
  fkda_store(&bits, dtype, 0, value);
  return fkda_load(&bits, dtype, 0);
}

/* The conversions by which every other test judges. */
static void conversions_round(void **state) {
  (void)state;
  assert_true(rounded(FKDA_BF16, 1.0) == 1.0);
  assert_true(rounded(FKDA_BF16, 1.0 + 0x1p-8) == 1.0);                    /* tie to even */
  assert_true(rounded(FKDA_BF16, 1.0 + 0x3p-8) == 1.0 + 0x1p-6);           /* tie to even, up */
  assert_true(rounded(FKDA_BF16, 1.0 + 0x1p-8 + 0x1p-40) == 1.0 + 0x1p-7); /* no double rounding */
  assert_true(rounded(FKDA_BF16, 1.0 + 0x3p-8 - 0x1p-40) == 1.0 + 0x1p-7);
  assert_true(rounded(FKDA_BF16, -1e30) < -0.99e30 && rounded(FKDA_BF16, -1e30) > -1.01e30);
  assert_true(isinf(rounded(FKDA_BF16, 3.4e38)));
  assert_true(isnan(rounded(FKDA_BF16, (double)NAN)));
  assert_true(rounded(FKDA_F16, 1.0 + 0x1p-11) == 1.0);
  assert_true(rounded(FKDA_F16, 1.0 + 0x3p-11) == 1.0 + 0x1p-9);
  assert_true(rounded(FKDA_F16, 1.0 + 0x1p-11 + 0x1p-40) == 1.0 + 0x1p-10);
  assert_true(rounded(FKDA_F16, 65504) == 65504);
  assert_true(rounded(FKDA_F16, 65519.99) == 65504);
  assert_true(isinf(rounded(FKDA_F16, 65520)));
  assert_true(rounded(FKDA_F16, 0x1p-24) == 0x1p-24);
  assert_true(rounded(FKDA_F16, 0x1p-25) == 0);
  assert_true(rounded(FKDA_F16, 0x3p-25) == 0x1p-23);
  assert_true(rounded(FKDA_F16, 0x1p-14 - 0x1p-26) == 0x1p-14);
  assert_true(isnan(rounded(FKDA_F16, (double)NAN)));
  for (uint32_t bits = 0; bits < 0x10000; bits++) { /* every 16-bit number comes back */
    const int32_t dtypes[] = {FKDA_F16, FKDA_BF16};
    for (int d = 0; d < 2; d++) {
      uint16_t in = (uint16_t)bits, out = 0;
      const double value = fkda_load(&in, dtypes[d], 0);
      if (isnan(value)) continue;
      fkda_store(&out, dtypes[d], 0, value);
      assert_int_equal(in, out);
    }
  }
}

/* Changing one element of a result by more than its tolerance, one byte of a gap, or leaving an element
 * out must be noticed; a check that cannot fail is none. Wrapped around the real backends by the hook
 * below: memory whose downloads are tampered with. */
static size_t
    tamper_bytes; /* size of the buffer to change: out's, which is the second such after v */
static size_t tamper_at;
static int tamper_seen;
static unsigned char tamper_with;

static bool tampering_download(const fkda_memory *memory, void *host, const void *device,
                               size_t size) {
  (void)memory;
  memcpy(host, device, size);
  if (size == tamper_bytes && ++tamper_seen == 2) ((unsigned char *)host)[tamper_at] ^= tamper_with;
  return true;
}

static void tampering_is_noticed(void **state) {
  (void)state;
  fkda_memory memory = *fkda_memory_host();
  fkda_case c = *fkda_case_find("shapes/T33_f32");
  char error[256];
  fkda_result result;
  memory.download = tampering_download;
  c.V = 63; /* v and out have a size of their own */
  c.final_dtype = FKDA_NONE;
  fkda_fixture *f = fkda_fixture_new(&c, &memory, error, sizeof error);
  assert_non_null(f);
  const size_t extent = (size_t)(c.T * c.HV * c.V) * 4;
  tamper_bytes = (512 + extent + 512 + 63) / 64 * 64;
  tamper_with = 0;
  assert_true(fkda_fixture_run(f, "reference", &result));
  tamper_with = 0x40; /* the exponent */
  tamper_at = 512 + 4 * 1001 + 3;
  tamper_seen = 0;
  assert_false(fkda_fixture_run(f, "reference", &result));
  assert_non_null(strstr(result.message, "out"));
  tamper_at = 511; /* a byte before */
  tamper_seen = 0;
  assert_false(fkda_fixture_run(f, "reference", &result));
  assert_non_null(strstr(result.message, "guard zone before out"));
  tamper_at = 512 + extent;
  tamper_seen = 0;
  assert_false(fkda_fixture_run(f, "reference", &result));
  assert_non_null(strstr(result.message, "guard zone after out"));
  fkda_fixture_free(f);
}

static void run_case(void **state) {
  const fkda_case *c = *state;
  const char *only = getenv("FLASHKDA_TEST_BACKEND");
  char error[256] = "";
  int ran = 0, failed = 0;
  fkda_fixture *f = fkda_fixture_new(c, fkda_memory_host(), error, sizeof error);
  if (!f) fail_msg("%s: %s", c->name, error);
  const char *backend;
  for (int32_t i = 0; (backend = fkda_backend_name(i)) != NULL; i++) {
    fkda_result result;
    if (only && strcmp(only, backend) != 0) continue;
    if (strncmp(backend, "cpu-", 4) != 0 && strcmp(backend, "reference") != 0) continue;
    if (fkda_backend_available(backend) != FKDA_OK) continue;
    fkda_fixture_run(f, backend, &result);
    if (result.verdict == FKDA_FAIL) {
      print_error("%s on %s: %s\n", c->name, backend, result.message);
      failed++;
    }
    ran += result.verdict != FKDA_SKIP;
  }
  fkda_fixture_free(f);
  if (failed) fail();
  if (!ran) fail_msg("%s: no backend ran it", c->name);
}

static bool too_large(const fkda_case *c) {
  const char *largest = getenv("FLASHKDA_TEST_LARGEST");
  return largest && c->B * c->T * c->HV * c->K * c->V > strtoll(largest, NULL, 10);
}

static bool wanted_group(int argc, char **argv, const char *group) {
  for (int i = 1; i < argc; i++) {
    if (strcmp(argv[i], group) == 0) return true;
  }
  return argc == 1;
}

int main(int argc, char **argv) {
  static struct CMUnitTest tests[MAX_TESTS];
  size_t count = 0;
  for (int i = 1; i < argc; i++) {
    bool known = strcmp(argv[i], "table") == 0;
    for (int g = 0; g < FKDA_GROUPS; g++)
      known |= strcmp(argv[i], fkda_group_name((fkda_case_group)g)) == 0;
    if (!known) {
      fprintf(stderr, "test_cases: no group \"%s\"\n", argv[i]);
      return 2;
    }
  }
  if (wanted_group(argc, argv, "table")) {
    tests[count++] = (struct CMUnitTest)cmocka_unit_test(table_is_sound);
    tests[count++] = (struct CMUnitTest)cmocka_unit_test(numbers_are_covered);
    tests[count++] = (struct CMUnitTest)cmocka_unit_test(conversions_round);
    tests[count++] = (struct CMUnitTest)cmocka_unit_test(tampering_is_noticed);
  }
  for (int i = 0; i < fkda_case_count() && count < MAX_TESTS; i++) {
    const fkda_case *c = fkda_case_at(i);
    if (!wanted_group(argc, argv, fkda_group_name(c->group)) || too_large(c)) continue;
    tests[count++] = (struct CMUnitTest){c->name, run_case, NULL, NULL, (void *)(uintptr_t)c};
  }
  if (!count) {
    fprintf(stderr, "test_cases: no case is left\n");
    return 2;
  }
  return _cmocka_run_group_tests("cases", tests, count, NULL, NULL) ? 1 : 0;
}
