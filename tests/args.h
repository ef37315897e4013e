/* Calls to break: small, valid argument structs over one arena, whose every byte is compared after a
 * call that must not write. */
#ifndef FKDA_TESTS_ARGS_H
#define FKDA_TESTS_ARGS_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* after the above, which it needs */
#include <setjmp.h>

#include <cmocka.h>

#include "flashkda/flashkda.h"

/* B 1, T 32, H 2, HV 4, K 16, V 8 */
enum { B = 1, T = 32, H = 2, HV = 4, K = 16, V = 8, ARENA_BYTES = 1 << 18 };

static _Alignas(256) unsigned char arena[ARENA_BYTES], arena_before[ARENA_BYTES];
static size_t arena_used;

/* Inputs read as 0.747 in every floating-point type; what a call writes starts as NaN. */
enum { INPUT_BYTE = 0x3f, POISON_BYTE = 0xff };

static inline void arena_reset(void) {
  memset(arena, POISON_BYTE, sizeof arena);
  arena_used = 256;
}

/* A contiguous tensor with 64 bytes of poison behind it. */
static inline fkda_tensor place_filled(int fill, int32_t dtype, int32_t ndim,
                                       const int64_t *shape) {
  size_t bytes = fkda_dtype_size(dtype);
  for (int32_t i = 0; i < ndim; ++i) bytes *= (size_t)shape[i];
  unsigned char *data = arena + arena_used;
  arena_used += (bytes + 127) / 64 * 64;
  assert_true(arena_used <= sizeof arena);
  memset(data, fill, bytes);
  return fkda_tensor_contiguous(data, dtype, ndim, shape);
}

#define SHAPE(...)                                                                                 \
  (int32_t)(sizeof(int64_t[]){__VA_ARGS__} / sizeof(int64_t)), (const int64_t[]) { __VA_ARGS__ }
#define INPUT(dtype, ...) place_filled(INPUT_BYTE, dtype, SHAPE(__VA_ARGS__))
#define OUTPUT(dtype, ...) place_filled(POISON_BYTE, dtype, SHAPE(__VA_ARGS__))

static inline fkda_tensor place_i32(int32_t count, const int32_t *values) {
  const int64_t shape[1] = {count};
  fkda_tensor t = place_filled(0, FKDA_I32, 1, shape);
  memcpy(t.data, values, (size_t)count * sizeof *values);
  return t;
}
#define I32(...)                                                                                   \
  place_i32((int32_t)(sizeof(int32_t[]){__VA_ARGS__} / sizeof(int32_t)),                           \
            (const int32_t[]){__VA_ARGS__})

/* The same elements under another shape. */
static inline fkda_tensor reshaped(fkda_tensor t, int32_t ndim, const int64_t *shape) {
  return fkda_tensor_contiguous(t.data, t.dtype, ndim, shape);
}

static inline void set_i32(fkda_tensor t, int32_t index, int32_t value) {
  ((int32_t *)t.data)[index] = value;
}

/* ---- valid calls ---- */

/* One sequence, bfloat16, with A_log, dt_bias and states. */
static inline fkda_prefill_args plain_prefill(void) {
  fkda_prefill_args a = FKDA_PREFILL_ARGS_INIT;
  arena_reset();
  a.q = INPUT(FKDA_BF16, B, T, H, K);
  a.k = INPUT(FKDA_BF16, B, T, H, K);
  a.v = INPUT(FKDA_BF16, B, T, HV, V);
  a.g = INPUT(FKDA_BF16, B, T, HV, K);
  a.beta = INPUT(FKDA_BF16, B, T, HV);
  a.out = OUTPUT(FKDA_BF16, B, T, HV, V);
  a.A_log = INPUT(FKDA_F32, HV);
  a.dt_bias = INPUT(FKDA_F32, HV, K);
  a.initial_state = INPUT(FKDA_F32, 1, HV, V, K);
  a.final_state = OUTPUT(FKDA_F32, 1, HV, V, K);
  return a;
}

/* Sequences of 17, 0 and 15 tokens over a pool of 5 slots. */
static inline fkda_prefill_args ragged_prefill(void) {
  fkda_prefill_args a = plain_prefill();
  a.cu_seqlens = I32(0, 17, 17, 32);
  a.initial_state = a.final_state = INPUT(FKDA_F32, 5, HV, V, K);
  a.initial_state_indices = I32(4, 0, 1);
  a.final_state_indices = I32(2, 0, 3);
  a.has_initial_state = place_filled(1, FKDA_BOOL, SHAPE(3));
  return a;
}

/* 3 sequences of 2 tokens, a pool of 6 slots. */
static inline fkda_decode_args plain_decode(void) {
  fkda_decode_args a = FKDA_DECODE_ARGS_INIT;
  arena_reset();
  a.q = INPUT(FKDA_BF16, 3, 2, H, K);
  a.k = INPUT(FKDA_BF16, 3, 2, H, K);
  a.v = INPUT(FKDA_BF16, 3, 2, HV, V);
  a.g = INPUT(FKDA_BF16, 3, 2, HV, K);
  a.beta = INPUT(FKDA_BF16, 3, 2, HV);
  a.out = OUTPUT(FKDA_BF16, 3, 2, HV, V);
  a.A_log = INPUT(FKDA_F32, HV);
  a.dt_bias = INPUT(FKDA_F32, HV, K);
  a.state = INPUT(FKDA_F32, 6, HV, V, K);
  a.initial_state_indices = I32(5, 0, 2);
  return a;
}

/* The same with two-dimensional indices [3,3] and accepted counts. */
static inline fkda_decode_args speculative_decode(void) {
  fkda_decode_args a = plain_decode();
  const int64_t shape[2] = {3, 3};
  a.state = INPUT(FKDA_F32, 9, HV, V, K);
  a.initial_state_indices = reshaped(I32(0, 1, 2, 3, 4, 5, 6, 7, 8), 2, shape);
  a.num_accepted_tokens = I32(1, 3, 2);
  return a;
}

static inline fkda_summary_args plain_summary(void) {
  fkda_summary_args a = FKDA_SUMMARY_ARGS_INIT;
  arena_reset();
  a.k = INPUT(FKDA_BF16, B, T, H, K);
  a.v = INPUT(FKDA_BF16, B, T, HV, V);
  a.g = INPUT(FKDA_F32, B, T, HV, K);
  a.beta = INPUT(FKDA_F32, B, T, HV);
  a.M = OUTPUT(FKDA_F32, 1, HV, K, K);
  a.b = OUTPUT(FKDA_F32, 1, HV, V, K);
  return a;
}

static inline fkda_backward_args plain_backward(void) {
  fkda_backward_args a = FKDA_BACKWARD_ARGS_INIT;
  arena_reset();
  a.q = INPUT(FKDA_BF16, B, T, H, K);
  a.k = INPUT(FKDA_BF16, B, T, H, K);
  a.v = INPUT(FKDA_BF16, B, T, HV, V);
  a.g = INPUT(FKDA_BF16, B, T, HV, K);
  a.beta = INPUT(FKDA_BF16, B, T, HV);
  a.A_log = INPUT(FKDA_F32, HV);
  a.d_out = INPUT(FKDA_BF16, B, T, HV, V);
  a.d_q = OUTPUT(FKDA_BF16, B, T, H, K);
  a.d_g = OUTPUT(FKDA_F32, B, T, HV, K);
  a.d_beta = OUTPUT(FKDA_BF16, B, T, HV);
  a.d_A_log = OUTPUT(FKDA_F32, HV);
  a.d_dt_bias = OUTPUT(FKDA_F32, HV, K);
  a.d_initial_state = OUTPUT(FKDA_F32, 1, HV, V, K);
  return a;
}

/* Any op's entry point. */
static inline fkda_status call(const void *args) {
  int32_t op; /* at the same place in every struct */
  memcpy(&op, (const char *)args + offsetof(fkda_prefill_args, op), sizeof op);
  switch (op) {
    case FKDA_OP_PREFILL: return fkda_prefill(args);
    case FKDA_OP_DECODE: return fkda_decode(args);
    case FKDA_OP_SUMMARY: return fkda_summary(args);
    default: return fkda_backward(args);
  }
}

static inline bool is_cpu_backend(const char *name) {
  return strncmp(name, "cpu-", 4) == 0 || strcmp(name, "reference") == 0;
}

/* Does the library have backends of other devices than the CPU? */
static inline bool cuda_in_build(void) {
  for (int32_t i = 0; fkda_backend_name(i); ++i)
    if (!is_cpu_backend(fkda_backend_name(i))) return true;
  return false;
}

/* Can tensors in host memory be worked on by this backend, on this machine? */
static inline bool usable_on_cpu(const char *name) {
  return is_cpu_backend(name) && fkda_backend_available(name) == FKDA_OK;
}

/* '*' in the pattern stands for any text (addresses). */
static inline bool text_matches(const char *text, const char *pattern) {
  for (; *pattern; ++pattern, ++text) {
    if (*pattern == '*') {
      for (;; ++text) {
        if (text_matches(text, pattern + 1)) return true;
        if (!*text) return false;
      }
    }
    if (*text != *pattern) return false;
  }
  return !*text;
}

static inline void assert_message(const char *pattern, const char *file, int line) {
  if (text_matches(fkda_last_error(), pattern)) return;
  print_error("message:  %s\nexpected: %s\n", fkda_last_error(), pattern);
  _fail(file, line);
}

static inline void assert_status(fkda_status status, fkda_status expected, const char *file,
                                 int line) {
  if (status == expected) return;
  print_error("status %d (%s), expected %d: %s\n", (int)status, fkda_status_string(status),
              (int)expected, fkda_last_error());
  _fail(file, line);
}

/* The run fails with this status and message and writes nothing. `seen`: what a query sees too (all but
 * pointers, workspace and contents), so that it answers alike; otherwise the query must say yes. */
static inline void expect_failure(const void *args, bool seen, fkda_status status,
                                  const char *message, const char *file, int line) {
  memcpy(arena_before, arena, sizeof arena);
  assert_status(call(args), status, file, line);
  assert_message(message, file, line);
  if (memcmp(arena, arena_before, sizeof arena) != 0) {
    print_error("memory was written by a call that failed: %s\n", message);
    _fail(file, line);
  }
  assert_status(fkda_query(args), seen ? status : FKDA_OK, file, line);
  if (seen) assert_message(message, file, line);
  size_t bytes = 12345;
  char text[8] = "before";
  fkda_plan_info info;
  memset(&info, 0, sizeof info);
  info.struct_size = sizeof info;
  assert_status(fkda_workspace_size(args, &bytes), seen ? status : FKDA_OK, file, line);
  assert_status(fkda_plan(args, &info), seen ? status : FKDA_OK, file, line);
  if (seen && (bytes != 12345 || info.backend)) _fail(file, line);
  if (seen) assert_status(fkda_plan_describe(args, text, sizeof text, &bytes), status, file, line);
  if (seen && (bytes != 12345 || strcmp(text, "before") != 0)) _fail(file, line);
}

static inline void expect_success(const void *args, const char *file, int line) {
  assert_status(call(args), FKDA_OK, file, line);
  assert_status(fkda_query(args), FKDA_OK, file, line);
}

#endif
