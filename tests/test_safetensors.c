/* The .safetensors reader and writer: what is right is read back, what is wrong is refused with a message
 * that says why.
 *
 * SPDX-License-Identifier: MIT
 */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>

#include "safetensors.h"

/* ---- files made by hand --------------------------------------------------------------------------- */

typedef struct blob {
  unsigned char bytes[8192];
  size_t size;
} blob;

static blob file_of(const char *header, size_t header_size, const void *data, size_t size) {
  blob b;
  memset(&b, 0, sizeof b);
  for (int i = 0; i < 8; i++) b.bytes[i] = (unsigned char)((uint64_t)header_size >> 8 * i);
  memcpy(b.bytes + 8, header, header_size);
  if (size) memcpy(b.bytes + 8 + header_size, data, size);
  b.size = 8 + header_size + size;
  return b;
}

/* Opens a file of this header and `size` bytes of data 0, 1, 2, ... */
static fkda_st *open_header(const char *header, size_t size, char *error, size_t capacity) {
  unsigned char data[4096];
  fkda_st *file = NULL;
  for (size_t i = 0; i < sizeof data; i++) data[i] = (unsigned char)i;
  const blob b = file_of(header, strlen(header), data, size);
  /* From the heap, exactly sized, so that reading past the end is noticed by sanitizers. */
  void *exact = malloc(b.size);
  assert_non_null(exact);
  memcpy(exact, b.bytes, b.size);
  error[0] = 0;
  const int result = fkda_st_open_memory(exact, b.size, &file, error, capacity);
  free(exact);
  assert_true(result == 0 ? file != NULL : file == NULL && error[0] != 0);
  return file;
}

static void refuses(const char *header, size_t size, const char *expected) {
  char error[256];
  fkda_st *file = open_header(header, size, error, sizeof error);
  if (file) {
    fkda_st_close(file);
    fail_msg("accepted: %s", header);
  }
  if (!strstr(error, expected))
    fail_msg("%s: message \"%s\", expected \"%s\"", header, error, expected);
}

static fkda_st *accepts(const char *header, size_t size) {
  char error[256];
  fkda_st *file = open_header(header, size, error, sizeof error);
  if (!file) fail_msg("refused: %s: %s", header, error);
  return file;
}

/* ---- what is right ---------------------------------------------------------------------------------- */

static void reads_tensors(void **state) {
  (void)state;
  fkda_tensor t;
  fkda_st *f = accepts(
      "{ \"b\" : {\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[4,28]},\n"
      "\"a\":{\"data_offsets\":[0,4],\"shape\":[1,2],\"dtype\":\"BF16\"} }  ",
      28);
  assert_int_equal(fkda_st_count(f), 2);
  assert_string_equal(fkda_st_name(f, 0), "a"); /* the data's order */
  assert_string_equal(fkda_st_name(f, 1), "b");
  assert_null(fkda_st_name(f, 2));
  assert_string_equal(fkda_st_dtype(f, 0), "BF16");
  assert_null(fkda_st_dtype(f, 2));
  assert_true(fkda_st_find(f, "b", &t));
  assert_int_equal(t.dtype, FKDA_F32);
  assert_int_equal(t.ndim, 2);
  assert_int_equal(t.shape[0], 2);
  assert_int_equal(t.shape[1], 3);
  assert_int_equal(t.stride[0], 3);
  assert_int_equal(t.stride[1], 1);
  assert_int_equal(((unsigned char *)t.data)[0], 4);
  assert_int_equal(((unsigned char *)t.data)[23], 27);
  assert_false(fkda_st_find(f, "c", &t));
  assert_false(fkda_st_find(f, "", &t));
  assert_false(fkda_st_has(f, "aa"));
  assert_true(fkda_st_has(f, "a"));
  fkda_st_close(f);
}

static void reads_empty_files_and_tensors(void **state) {
  (void)state;
  fkda_tensor t;
  fkda_st *f = accepts("{}", 0);
  assert_int_equal(fkda_st_count(f), 0);
  assert_false(fkda_st_find(f, "a", &t));
  assert_null(fkda_st_metadata(f, "a"));
  fkda_st_close(f);
  f = accepts("{\"__metadata__\":{}}", 0);
  assert_int_equal(fkda_st_metadata_count(f), 0);
  fkda_st_close(f);
  f = accepts(
      "{\"x\":{\"dtype\":\"F32\",\"shape\":[0,9223372036854775807],\"data_offsets\":[4,4]},"
      "\"s\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}",
      4);
  assert_true(fkda_st_find(f, "s", &t)); /* a scalar */
  assert_int_equal(t.ndim, 1);
  assert_int_equal(t.shape[0], 1);
  assert_true(fkda_st_find(f, "x", &t));
  assert_int_equal(t.shape[0], 0);
  fkda_st_close(f);
  fkda_st_close(NULL);
}

static void reads_metadata_and_escapes(void **state) {
  (void)state;
  const char *value;
  fkda_st *f = accepts(
      "{\"__metadata__\":{\"op\":\"decode\",\"e\":\"\\\"\\\\\\/"
      "\\b\\f\\n\\r\\t\\u00e9\\u20AC\\ud83d\\ude00\","
      "\"\":\"empty\"}}",
      0);
  assert_string_equal(fkda_st_metadata(f, "op"), "decode");
  assert_string_equal(fkda_st_metadata(f, "e"),
                      "\"\\/\b\f\n\r\t\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
  assert_string_equal(fkda_st_metadata(f, ""), "empty");
  assert_null(fkda_st_metadata(f, "nope"));
  assert_int_equal(fkda_st_metadata_count(f), 3);
  assert_string_equal(fkda_st_metadata_at(f, 2, &value), "op");
  assert_string_equal(value, "decode");
  assert_null(fkda_st_metadata_at(f, 3, &value));
  fkda_st_close(f);
}

/* Offsets need not suit the element size; views must. */
static void realigns(void **state) {
  (void)state;
  fkda_tensor t;
  float values[2];
  fkda_st *f = accepts(
      "{\"a\":{\"dtype\":\"BOOL\",\"shape\":[1],\"data_offsets\":[0,1]},"
      "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[1,9]},"
      "\"c\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[9,17]}}",
      17);
  assert_true(fkda_st_find(f, "b", &t));
  assert_int_equal((uintptr_t)t.data % 4, 0);
  memcpy(values, t.data, sizeof values);
  assert_memory_equal(values, ((const unsigned char[]){1, 2, 3, 4, 5, 6, 7, 8}), 8);
  assert_true(fkda_st_find(f, "c", &t));
  assert_int_equal((uintptr_t)t.data % 8, 0);
  fkda_st_close(f);
}

static void lists_what_it_cannot_view(void **state) {
  (void)state;
  fkda_tensor t;
  fkda_st *f = accepts(
      "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
      "\"b\":{\"dtype\":\"F16\",\"shape\":[1,1,1,1,1,1],\"data_offsets\":[2,4]},"
      "\"c\":{\"dtype\":\"F4\",\"shape\":[2],\"data_offsets\":[4,5]}}",
      5);
  assert_true(fkda_st_has(f, "a"));
  assert_string_equal(fkda_st_dtype(f, 0), "U8");
  assert_false(fkda_st_find(f, "a", &t));
  assert_false(fkda_st_find(f, "b", &t)); /* rank 6 */
  assert_false(fkda_st_find(f, "c", &t));
  fkda_st_close(f);
}

/* ---- what is wrong ---------------------------------------------------------------------------------- */

#define X "{\"x\":{\"dtype\":\"F32\",\"shape\":"

static void refuses_bad_sizes(void **state) {
  (void)state;
  refuses(X "[1],\"data_offsets\":[0,4]}}", 0, "outside the data");
  refuses(X "[1],\"data_offsets\":[0,4]}}", 8, "belong to no tensor");
  refuses(X "[2],\"data_offsets\":[0,4]}}", 4, "shape and dtype 8");
  refuses(X "[1],\"data_offsets\":[4,0]}}", 4, "outside the data");
  refuses(X "[1],\"data_offsets\":[4,8]}}", 8, "gap");
  refuses(
      X
      "[1],\"data_offsets\":[0,4]},\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
      4, "overlap");
  refuses(
      X
      "[1],\"data_offsets\":[0,4]},\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[2,6]}}",
      6, "overlap");
  refuses(X "[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, "overflows");
  refuses(X "[4611686018427387904,4],\"data_offsets\":[0,0]}}", 0, "overflows");
  refuses(X "[9223372036854775808],\"data_offsets\":[0,0]}}", 0, "overflows");
  refuses(X "[0,9223372036854775808],\"data_offsets\":[0,0]}}", 0, "overflows");
  refuses(X "[1],\"data_offsets\":[18446744073709551612,18446744073709551615]}}", 4,
          "outside the data");
  refuses("{\"x\":{\"dtype\":\"F4\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "no whole byte");
  refuses("{\"x\":{\"dtype\":\"BOOL\",\"shape\":[3],\"data_offsets\":[0,3]}}", 3,
          "neither 0 nor 1");
}

static void refuses_bad_json(void **state) {
  (void)state;
  refuses("", 0, "does not begin");
  refuses(" {}", 0, "does not begin");
  refuses("[]", 0, "does not begin");
  refuses("{", 0, "expected '\"'");
  refuses("{}x", 0, "text after");
  refuses("{}{}", 0, "text after");
  refuses("{\"x\"}", 0, "expected ':'");
  refuses("{\"x\":1}", 0, "expected '{'");
  refuses("{\"x\":{}}", 0, "without dtype");
  refuses("{\"x\":{\"dtype\":\"F32\"}}", 0, "without dtype");
  refuses(X "[1],\"data_offsets\":[0,4],\"extra\":1}}", 4, "unknown key");
  refuses(X "[1],\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "given twice");
  refuses(X "[1],\"data_offsets\":[0,4]},}", 4, "expected '\"'");
  refuses(X "[1,],\"data_offsets\":[0,4]}}", 4, "integer");
  refuses(X "[-1],\"data_offsets\":[0,4]}}", 4, "integer");
  refuses(X "[1.0],\"data_offsets\":[0,4]}}", 4, "integer");
  refuses(X "[1e0],\"data_offsets\":[0,4]}}", 4, "integer");
  refuses(X "[01],\"data_offsets\":[0,4]}}", 4, "leading zero");
  refuses(X "[18446744073709551616],\"data_offsets\":[0,4]}}", 4, "too large");
  refuses(X "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 4, "array too long");
  refuses(X "[[[[1]]]],\"data_offsets\":[0,4]}}", 4, "integer");
  refuses(X "[1],\"data_offsets\":[0]}}", 4, "two integers");
  refuses(X "[1],\"data_offsets\":[0,4,8]}}", 4, "array too long");
  refuses(X "[1],\"data_offsets\":[]}}", 4, "two integers");
  refuses(X "[1],\"data_offsets\":[0,4]}", 4, "closing bracket");
  refuses("{\"x\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "unknown dtype");
  refuses("{\"x\":{\"dtype\":32,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "expected '\"'");
  refuses(
      X
      "[1],\"data_offsets\":[0,4]},\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
      8, "\"x\" given twice");
  refuses("{\"__metadata__\":{\"a\":1}}", 0, "expected '\"'");
  refuses("{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, "given twice");
  refuses("{\"__metadata__\":{},\"__metadata__\":{}}", 0, "given twice");
  refuses("{\"__metadata__\":[]}", 0, "expected '{'");
}

static void refuses_bad_strings(void **state) {
  (void)state;
  refuses("{\"__metadata__\":{\"a\":\"\\x\"}}", 0, "unknown escape");
  refuses("{\"__metadata__\":{\"a\":\"\\u12\"}}", 0, "bad \\u escape");
  refuses("{\"__metadata__\":{\"a\":\"\\u0000\"}}", 0, "NUL");
  refuses("{\"__metadata__\":{\"a\":\"\\ud800\"}}", 0, "lone surrogate");
  refuses("{\"__metadata__\":{\"a\":\"\\ude00\"}}", 0, "lone surrogate");
  refuses("{\"__metadata__\":{\"a\":\"\\ud800\\u0041\"}}", 0, "lone surrogate");
  refuses("{\"__metadata__\":{\"a\":\"b\nc\"}}", 0, "control character");
  refuses("{\"__metadata__\":{\"a\":\"b\xff\"}}", 0, "not UTF-8");
  refuses("{\"__metadata__\":{\"a\":\"\xc0\x80\"}}", 0, "not UTF-8");         /* overlong */
  refuses("{\"__metadata__\":{\"a\":\"\xed\xa0\x80\"}}", 0, "not UTF-8");     /* surrogate */
  refuses("{\"__metadata__\":{\"a\":\"\xf4\x90\x80\x80\"}}", 0, "not UTF-8"); /* over U+10FFFF */
  refuses("{\"__metadata__\":{\"a\":\"\xe2\x82\"}}", 0, "not UTF-8");         /* cut off */
  refuses("{\"x", 0, "unterminated");
  refuses("{\"x\\", 0, "unterminated");
  refuses("{\"x\\\"", 0, "unterminated");
}

static void refuses_bad_files(void **state) {
  (void)state;
  char error[256];
  fkda_st *f;
  blob b = file_of("{}", 2, NULL, 0);
  for (size_t size = 0; size < 8; size++) {
    assert_int_not_equal(fkda_st_open_memory(b.bytes, size, &f, error, sizeof error), 0);
    assert_non_null(strstr(error, "shorter"));
  }
  b.bytes[0] = 3; /* one byte more than there is */
  assert_int_not_equal(fkda_st_open_memory(b.bytes, b.size, &f, error, sizeof error), 0);
  assert_non_null(strstr(error, "header of 3 bytes in a file of 10"));
  memset(b.bytes, 0xff, 8);
  assert_int_not_equal(fkda_st_open_memory(b.bytes, b.size, &f, error, sizeof error), 0);
  assert_non_null(strstr(error, "at most 100000000"));
  assert_int_not_equal(fkda_st_open("/nonexistent/file", &f, error, sizeof error), 0);
  assert_non_null(strstr(error, "/nonexistent/file"));
  assert_int_not_equal(fkda_st_open("/", &f, error, sizeof error), 0);
  assert_null(f);
  assert_int_not_equal(fkda_st_open_memory(b.bytes, b.size, &f, NULL, 0),
                       0); /* no room for a message */
}

/* Every prefix of a good file, and every one of its bytes changed, is refused or read, never a crash. */
static void survives_damage(void **state) {
  (void)state;
  static const char header[] =
      "{\"__metadata__\":{\"op\":\"pre\\u0066ill\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,1],"
      "\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[8,10]}}";
  const unsigned char data[10] = {0};
  const blob good = file_of(header, sizeof header - 1, data, sizeof data);
  char error[256];
  fkda_st *f;
  assert_int_equal(fkda_st_open_memory(good.bytes, good.size, &f, error, sizeof error), 0);
  fkda_st_close(f);
  for (size_t size = 0; size < good.size; size++) {
    unsigned char *cut = malloc(size + 1);
    assert_non_null(cut);
    memcpy(cut, good.bytes, size);
    assert_int_not_equal(fkda_st_open_memory(cut, size, &f, error, sizeof error), 0);
    free(cut);
  }
  for (size_t at = 0; at < 8 + sizeof header - 1; at++) {
    for (int bit = 0; bit < 8; bit++) {
      blob bad = good;
      bad.bytes[at] ^= (unsigned char)(1 << bit);
      if (fkda_st_open_memory(bad.bytes, bad.size, &f, error, sizeof error) == 0) {
        fkda_tensor t;
        for (size_t i = 0; i < fkda_st_count(f); i++) fkda_st_find(f, fkda_st_name(f, i), &t);
        fkda_st_close(f);
      }
    }
  }
}

/* ---- writing ---------------------------------------------------------------------------------------- */

static void temporary(char *path, size_t capacity) {
  const char *directory = getenv("TMPDIR");
  snprintf(path, capacity, "%s/fkda_st_XXXXXX", directory ? directory : "/tmp");
  const int file = mkstemp(path);
  assert_true(file >= 0);
  close(file);
}

static void writes_what_it_reads(void **state) {
  (void)state;
  static const int32_t dtypes[] = {FKDA_BOOL, FKDA_F16,  FKDA_F32, FKDA_F64,
                                   FKDA_I32,  FKDA_BF16, FKDA_I64};
  static const char *const names[] = {"bool", "f16", "f32", "f64", "i32", "b\"f\\16", "i\n64"};
  enum { COUNT = sizeof dtypes / sizeof dtypes[0] };
  unsigned char values[COUNT][64];
  fkda_st_entry entries[COUNT + 1];
  const fkda_st_pair metadata[2] = {{"key \"1\"", "va\\lue\x01"}, {"\xc3\xa9", ""}};
  const int64_t shape[3] = {3, 1, 2}, none[2] = {0, 4};
  char path[256], error[256] = "";
  for (int i = 0; i < COUNT; i++) {
    for (int j = 0; j < 64; j++)
      values[i][j] = dtypes[i] == FKDA_BOOL ? j % 2 : (unsigned char)(i * 64 + j);
    entries[i] = (fkda_st_entry){names[i], fkda_tensor_contiguous(values[i], dtypes[i], 3, shape)};
  }
  entries[COUNT] = (fkda_st_entry){"none", fkda_tensor_contiguous(NULL, FKDA_F32, 2, none)};
  temporary(path, sizeof path);
  if (fkda_st_write(path, entries, COUNT + 1, metadata, 2, error, sizeof error))
    fail_msg("%s", error);
  fkda_st *f;
  if (fkda_st_open(path, &f, error, sizeof error)) fail_msg("%s", error);
  assert_int_equal(fkda_st_count(f), COUNT + 1);
  for (int i = 0; i < COUNT; i++) {
    fkda_tensor t;
    assert_true(fkda_st_find(f, names[i], &t));
    assert_int_equal(t.dtype, dtypes[i]);
    assert_int_equal(t.ndim, 3);
    assert_memory_equal(t.data, values[i], 6 * fkda_dtype_size(dtypes[i]));
  }
  assert_string_equal(fkda_st_metadata(f, "key \"1\""), "va\\lue\x01");
  assert_string_equal(fkda_st_metadata(f, "\xc3\xa9"), "");
  fkda_st_close(f);
  remove(path);
}

static void writes_strided(void **state) {
  (void)state;
  float values[2 * 3 * 8];
  char path[256], error[256] = "";
  for (int i = 0; i < 48; i++) values[i] = (float)i;
  fkda_tensor t = {
      .data = values, .dtype = FKDA_F32, .ndim = 3, .shape = {2, 3, 4}, .stride = {24, 8, 2}};
  const fkda_st_entry entry = {"x", t};
  temporary(path, sizeof path);
  if (fkda_st_write(path, &entry, 1, NULL, 0, error, sizeof error)) fail_msg("%s", error);
  fkda_st *f;
  if (fkda_st_open(path, &f, error, sizeof error)) fail_msg("%s", error);
  assert_true(fkda_st_find(f, "x", &t));
  for (int i = 0; i < 24; i++) {
    const int expected = i / 4 * 8 + i % 4 * 2;
    assert_true(((float *)t.data)[i] == (float)expected);
  }
  fkda_st_close(f);
  remove(path);
}

static void reports_write_errors(void **state) {
  (void)state;
  float x = 0;
  const int64_t one = 1;
  char error[256] = "";
  fkda_st_entry entries[2] = {{"x", fkda_tensor_contiguous(&x, FKDA_F32, 1, &one)},
                              {"x", fkda_tensor_contiguous(&x, FKDA_F32, 1, &one)}};
  assert_int_not_equal(fkda_st_write("/nonexistent/x", entries, 1, NULL, 0, error, sizeof error),
                       0);
  assert_non_null(strstr(error, "/nonexistent/x"));
  assert_int_not_equal(fkda_st_write("/nonexistent/x", entries, 2, NULL, 0, error, sizeof error),
                       0);
  assert_non_null(strstr(error, "given twice"));
  entries[0].tensor.dtype = FKDA_NONE;
  assert_int_not_equal(fkda_st_write("/nonexistent/x", entries, 1, NULL, 0, error, sizeof error),
                       0);
  assert_non_null(strstr(error, "cannot be stored"));
  entries[0].tensor.dtype = FKDA_F32;
}

/* A file that cannot be finished is not left behind. (Not tried on /dev/full: a mistake in the removal
 * would take the device away from a machine on which tests run as root.) */
static void removes_unfinished_files(void **state) {
  (void)state;
  static float values[1 << 16];
  const int64_t shape = 1 << 16;
  const fkda_st_entry entry = {"x", fkda_tensor_contiguous(values, FKDA_F32, 1, &shape)};
  char path[256], error[256] = "";
  struct rlimit old, small;
  temporary(path, sizeof path);
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
  small = old;
  small.rlim_cur = 4096;
  void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
  const int result = fkda_st_write(path, &entry, 1, NULL, 0, error, sizeof error);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
  signal(SIGXFSZ, handler);
  assert_int_not_equal(result, 0);
  assert_non_null(strstr(error, "cannot write"));
  assert_int_not_equal(access(path, F_OK), 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(reads_tensors),
      cmocka_unit_test(reads_empty_files_and_tensors),
      cmocka_unit_test(reads_metadata_and_escapes),
      cmocka_unit_test(realigns),
      cmocka_unit_test(lists_what_it_cannot_view),
      cmocka_unit_test(refuses_bad_sizes),
      cmocka_unit_test(refuses_bad_json),
      cmocka_unit_test(refuses_bad_strings),
      cmocka_unit_test(refuses_bad_files),
      cmocka_unit_test(survives_damage),
      cmocka_unit_test(writes_what_it_reads),
      cmocka_unit_test(writes_strided),
      cmocka_unit_test(reports_write_errors),
      cmocka_unit_test(removes_unfinished_files),
  };
  return cmocka_run_group_tests_name("safetensors", tests, NULL, NULL);
}
