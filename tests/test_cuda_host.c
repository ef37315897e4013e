/* The CUDA host code against a driver made up for it (fake_driver.h), so on machines without a GPU too:
 * refusals in words (case 25), launches and what they carry, loading once under many threads (24),
 * contexts, capture (23), fork. Tensors lie at addresses that no host memory has: nothing may look.
 * The first two devices are of compute capability 8.6 unless a scenario says otherwise. */
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* after the above, which it needs */
#include <setjmp.h>

#include <cmocka.h>

#include "cuda/driver.h"
#include "cuda/images.h"
#include "cuda/kernels/portable/backward_params.h"
#include "cuda/kernels/portable/params.h"
#include "cuda/kernels/sm90/backward_params.h"
#include "cuda/kernels/sm90/params.h"
#include "fake_driver.h"
#include "flashkda/flashkda.h"

/* ---- each scenario in a process of its own ---- */

#define CHECK(condition)                                                                           \
  do {                                                                                             \
    if (!(condition)) fail_child(__LINE__, #condition);                                            \
  } while (0)
#define CHECK_INT(actual, expected)                                                                \
  do {                                                                                             \
    const long long is_ = (long long)(actual), should_ = (long long)(expected);                    \
    if (is_ != should_) {                                                                          \
      fprintf(stderr, "%lld, expected %lld\n", is_, should_);                                      \
      fail_child(__LINE__, #actual);                                                               \
    }                                                                                              \
  } while (0)
#define CHECK_TEXT(actual, expected)                                                               \
  do {                                                                                             \
    if (strcmp(actual, expected) != 0) {                                                           \
      fprintf(stderr, "\"%s\",\nexpected \"%s\"\n", actual, expected);                             \
      fail_child(__LINE__, #actual);                                                               \
    }                                                                                              \
  } while (0)
#define CHECK_FAILS(call, expected_status, message)                                                \
  do {                                                                                             \
    CHECK_INT(call, expected_status);                                                              \
    CHECK_TEXT(fkda_last_error(), message);                                                        \
  } while (0)
#define CHECK_OK(call)                                                                             \
  do {                                                                                             \
    if ((call) != FKDA_OK) fail_child(__LINE__, fkda_last_error());                                \
  } while (0)

static void fail_child(int line, const char *what) {
  fprintf(stderr, "%s:%d: %s\n", __FILE__, line, what);
  _exit(1);
}

static size_t params_size(const char *entry) {
  if (strncmp(entry, "fkda_sm90_backward_", 19) == 0) return sizeof(fkda_sm90_backward_params);
  if (strncmp(entry, "fkda_sm90_", 10) == 0) return sizeof(fkda_sm90_params);
  return strncmp(entry, "fkda_portable_backward_", 23) == 0 ? sizeof(fkda_portable_backward_params)
                                                            : sizeof(fkda_portable_params);
}

static void run_in_child(void (*scenario)(void)) {
  fflush(NULL);
  const pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    fake.version = fkda_cuda_toolkit_version / 1000 * 1000;
    fake.params_size = params_size;
    scenario();
    CHECK_INT(atomic_load(&fake.pushes), atomic_load(&fake.pops));
    CHECK_INT(fake_depth(), 0);
    CHECK_INT(fake_capture_mode(), 0);
    CHECK_TEXT(fake.mistake, "");
    _exit(0);
  }
  int status = -1;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status));
  assert_int_equal(WEXITSTATUS(status), 0);
}

#define SCENARIO(name)                                                                             \
  static void name(void);                                                                          \
  static void test_##name(void **state) {                                                          \
    (void)state;                                                                                   \
    run_in_child(name);                                                                            \
  }                                                                                                \
  static void name(void)

/* ---- calls ---- */

static uintptr_t next_address;

static fkda_tensor place(int32_t dtype, int32_t ndim, const int64_t *shape) {
  int64_t bytes = (int64_t)fkda_dtype_size(dtype);
  for (int32_t i = 0; i < ndim; ++i) bytes *= shape[i] ? shape[i] : 1;
  next_address += ((uintptr_t)bytes + 511) / 256 * 256;
  return fkda_tensor_contiguous((void *)(next_address - ((uintptr_t)bytes + 255) / 256 * 256),
                                dtype, ndim, shape);
}
#define PLACE(dtype, ...)                                                                          \
  place(dtype, (int32_t)(sizeof(int64_t[]){__VA_ARGS__} / sizeof(int64_t)),                        \
        (const int64_t[]){__VA_ARGS__})

static fake_stream stream_of[FAKE_DEVICES] = {{0, 0}, {1, 0}, {2, 0}};

/* N sequences of 20 tokens, packed. */
static fkda_prefill_args prefill(int64_t N, int64_t HV, int64_t K, int64_t V) {
  fkda_prefill_args a = FKDA_PREFILL_ARGS_INIT;
  next_address = (uintptr_t)1 << 46;
  a.device_type = FKDA_DEVICE_CUDA;
  a.stream = &stream_of[0];
  a.q = PLACE(FKDA_BF16, 1, 20 * N, HV / 2, K);
  a.k = PLACE(FKDA_BF16, 1, 20 * N, HV / 2, K);
  a.v = PLACE(FKDA_BF16, 1, 20 * N, HV, V);
  a.g = PLACE(FKDA_F32, 1, 20 * N, HV, K);
  a.beta = PLACE(FKDA_BF16, 1, 20 * N, HV);
  a.out = PLACE(FKDA_BF16, 1, 20 * N, HV, V);
  a.cu_seqlens = PLACE(FKDA_I32, N + 1);
  a.initial_state = PLACE(FKDA_F32, N, HV, V, K);
  a.final_state = PLACE(FKDA_BF16, N, HV, V, K);
  return a;
}

static fkda_decode_args decode(int64_t N, int64_t HV, int64_t K, int64_t V, int32_t layout) {
  fkda_decode_args a = FKDA_DECODE_ARGS_INIT;
  next_address = (uintptr_t)1 << 46;
  a.device_type = FKDA_DEVICE_CUDA;
  a.stream = &stream_of[0];
  a.q = PLACE(FKDA_BF16, N, 2, HV, K);
  a.k = PLACE(FKDA_BF16, N, 2, HV, K);
  a.v = PLACE(FKDA_BF16, N, 2, HV, V);
  a.g = PLACE(FKDA_BF16, N, 2, HV, K);
  a.beta = PLACE(FKDA_F32, N, 2, HV);
  a.out = PLACE(FKDA_BF16, N, 2, HV, V);
  a.state_layout = layout;
  a.state =
      layout == FKDA_STATE_VK ? PLACE(FKDA_F32, N + 3, HV, V, K) : PLACE(FKDA_F32, N + 3, HV, K, V);
  a.initial_state_indices = PLACE(FKDA_I64, N);
  return a;
}

/* The gradients of prefill(), with grouped value heads if H < HV; all of them wanted. */
static fkda_backward_args backward(int64_t N, int64_t H, int64_t HV, int64_t K, int64_t V) {
  const int64_t T = 100 * N;
  fkda_backward_args a = FKDA_BACKWARD_ARGS_INIT;
  next_address = (uintptr_t)1 << 46;
  a.device_type = FKDA_DEVICE_CUDA;
  a.stream = &stream_of[0];
  a.q = PLACE(FKDA_BF16, 1, T, H, K);
  a.k = PLACE(FKDA_BF16, 1, T, H, K);
  a.v = PLACE(FKDA_BF16, 1, T, HV, V);
  a.g = PLACE(FKDA_BF16, 1, T, HV, K);
  a.beta = PLACE(FKDA_BF16, 1, T, HV);
  a.A_log = PLACE(FKDA_F32, HV);
  a.dt_bias = PLACE(FKDA_F32, HV, K);
  a.cu_seqlens = PLACE(FKDA_I32, N + 1);
  a.initial_state = PLACE(FKDA_F32, N, HV, V, K);
  a.d_out = PLACE(FKDA_BF16, 1, T, HV, V);
  a.d_final_state = PLACE(FKDA_F32, N, HV, V, K);
  a.d_q = PLACE(FKDA_BF16, 1, T, H, K);
  a.d_k = PLACE(FKDA_F32, 1, T, H, K);
  a.d_v = PLACE(FKDA_BF16, 1, T, HV, V);
  a.d_g = PLACE(FKDA_BF16, 1, T, HV, K);
  a.d_beta = PLACE(FKDA_F32, 1, T, HV);
  a.d_A_log = PLACE(FKDA_F32, HV);
  a.d_dt_bias = PLACE(FKDA_F32, HV, K);
  a.d_initial_state = PLACE(FKDA_BF16, N, HV, V, K);
  return a;
}

/* Gives it what it asks for. */
static void give_workspace(fkda_backward_args *a) {
  size_t bytes = 0;
  a->workspace = NULL;
  a->workspace_size = 0;
  CHECK_OK(fkda_workspace_size(a, &bytes));
  a->workspace = (void *)((uintptr_t)1 << 45);
  a->workspace_size = bytes;
}

/* What the last launch carried. */
static fkda_portable_params params(void) {
  fkda_portable_params p;
  memcpy(&p, fake.launch.params, sizeof p);
  return p;
}

static fkda_sm90_params sm90_params(void) {
  fkda_sm90_params p;
  memcpy(&p, fake.launch.params, sizeof p);
  return p;
}

/* Of a directory of kernels, "" for all. */
static int images(const char *family) {
  int count = 0;
  for (const fkda_cuda_image *image = fkda_cuda_images; image->name; ++image)
    count += strncmp(image->name, family, strlen(family)) == 0;
  return count;
}

#define COUNT(...) (sizeof((char[]){__VA_ARGS__}))
#define ONE(...) 1,
enum {
  /* Prefill and decode are loaded together, in two images; the backward by itself, of each row. */
  PORTABLE_KERNELS = COUNT(FKDA_PORTABLE_PREFILL_LIST(ONE)) + COUNT(FKDA_PORTABLE_DECODE_LIST(ONE)),
  PORTABLE_IMAGES = 2,
  BACKWARD_KERNELS = 4 * COUNT(FKDA_BACKWARD_BY_K(ONE)) + COUNT(FKDA_BACKWARD_BY_K_V(ONE)),
  SM90_KERNELS = COUNT(FKDA_SM90_PREFILL_LIST(ONE) FKDA_SM90_PAIR_LIST(ONE)),
  SM90_IMAGES = 1,
  SM90_BACKWARD_KERNELS = COUNT(FKDA_SM90_BACKWARD_LIST(ONE) FKDA_SM90_BACKWARD_PAIR_LIST(ONE)),
  KERNELS = PORTABLE_KERNELS + BACKWARD_KERNELS + SM90_KERNELS + SM90_BACKWARD_KERNELS,
};

static void be_hopper(int device) {
  fake.capability[device].major = 9;
  fake.capability[device].minor = 0;
}

/* ---- refusals ---- */

/* What the row sm90 says of a device that is not Hopper's. */
#define NOT_HOPPER(device, capability)                                                             \
  "sm90: device_id: " device " (Fake " device ") has compute capability " capability               \
  ", expected 9.0; "

/* rows: who gives the reason, and what others say before. */
static void check_no_device_but(const char *rows, const char *reason) {
  char message[400];
  fkda_prefill_args a = prefill(1, 2, 128, 128);
  fkda_decode_args d = decode(1, 2, 128, 128, FKDA_STATE_VK);
  snprintf(message, sizeof message, "device_type: CUDA, which cannot be used here: %s: %s", rows,
           reason);
  CHECK_FAILS(fkda_prefill(&a), FKDA_ERROR_NO_DEVICE, message);
  CHECK_FAILS(fkda_query(&a), FKDA_ERROR_NO_DEVICE, message);
  CHECK_FAILS(fkda_decode(&d), FKDA_ERROR_NO_DEVICE, message);
  snprintf(message, sizeof message, "device_type: CUDA, which cannot be used here: %s", reason);
  CHECK_FAILS(fkda_warmup(FKDA_DEVICE_CUDA, 0), FKDA_ERROR_NO_DEVICE, message);
  snprintf(message, sizeof message, "portable: %s", reason);
  CHECK_FAILS(fkda_backend_available("portable"), FKDA_ERROR_NO_DEVICE, message);
  CHECK_OK(fkda_warmup(FKDA_DEVICE_CPU, 0));
  CHECK_INT(fake.retains, 0);
  CHECK_INT(fake.loads, 0);
  CHECK_INT(fake.launches, 0);
}

static void check_no_device(const char *reason) {
  check_no_device_but("sm90, portable", reason);
  char message[400];
  snprintf(message, sizeof message, "sm90: %s", reason);
  CHECK_FAILS(fkda_backend_available("sm90"), FKDA_ERROR_NO_DEVICE, message);
}

SCENARIO(old_driver) {
  fake.version = 1000 * (fkda_cuda_toolkit_version / 1000 - 1) + 80;
  char reason[200];
  snprintf(reason, sizeof reason,
           "the NVIDIA driver is too old: it supports CUDA %d.8, expected %d.0 or newer%s",
           fake.version / 1000, (int)(fkda_cuda_toolkit_version / 1000),
           fkda_cuda_toolkit_version / 1000 == 13 ? " (NVIDIA driver 580)" : "");
  check_no_device(reason);
  CHECK_INT(fake.inits, 0);
}

/* An older driver of the toolkit's major version runs its machine code. */
SCENARIO(minor_version) {
  fake.version = fkda_cuda_toolkit_version / 1000 * 1000;
  CHECK_OK(fkda_backend_available("portable"));
}

SCENARIO(no_devices) {
  fake.device_count = 0;
  check_no_device(
      "no CUDA device: the NVIDIA driver sees none (CUDA_VISIBLE_DEVICES hides devices)");
}

SCENARIO(old_architecture) {
  fake.capability[0].major = 7;
  fake.capability[0].minor = 5;
  check_no_device_but(NOT_HOPPER("0", "7.5") "portable",
                      "device_id: 0 (Fake 0) has compute capability 7.5, expected 8.0 or newer");
}

SCENARIO(driver_in_a_fork) {
  fake.failing = "cuInit";
  fake.failure = 3;
  check_no_device(
      "CUDA was started before this process was forked off; start it in the child only, "
      "or spawn");
}

SCENARIO(stub_driver) {
  fake.failing = "cuInit";
  fake.failure = 34;
  check_no_device(
      "libcuda.so.1 is the toolkit's stub, not a driver: take it out of LD_LIBRARY_PATH");
}

SCENARIO(mismatched_driver) {
  fake.failing = "cuInit";
  fake.failure = 803;
  check_no_device(
      "libcuda.so.1 and the kernel's NVIDIA module are of different versions (restart after "
      "an update)");
}

SCENARIO(broken_driver) {
  fake.failing = "cuInit";
  fake.failure = 999;
  check_no_device(
      "the NVIDIA driver does not start: CUDA_ERROR_FAKE, error 999 (made up for a test)");
}

SCENARIO(broken_device) {
  fake.failing = "cuDeviceGetAttribute";
  fake.failure = 999;
  check_no_device("CUDA device 0 cannot be asked: CUDA_ERROR_FAKE");
}

/* The devices of one machine are told apart. */
SCENARIO(device_numbers) {
  fake.device_count = 3; /* the third has 7.5 */
  fkda_prefill_args a = prefill(1, 2, 128, 128);
  a.device_id = 2;
  a.stream = &stream_of[2];
  CHECK_FAILS(fkda_prefill(&a), FKDA_ERROR_NO_DEVICE,
              "device_type: CUDA, which cannot be used here: " NOT_HOPPER(
                  "2", "7.5") "portable: device_id: 2 (Fake 2) has compute capability 7.5, "
                              "expected 8.0 or newer");
  CHECK_INT(fkda_query(&a), FKDA_ERROR_NO_DEVICE);
  CHECK_INT(fkda_warmup(FKDA_DEVICE_CUDA, 2), FKDA_ERROR_NO_DEVICE);
  a.device_id = 3;
  CHECK_FAILS(fkda_prefill(&a), FKDA_ERROR_NO_DEVICE,
              "device_type: CUDA, which cannot be used here: sm90, portable: device_id: 3, "
              "expected 0 to 2 (3 CUDA devices here)");
  CHECK_FAILS(fkda_warmup(FKDA_DEVICE_CUDA, 3), FKDA_ERROR_NO_DEVICE,
              "device_type: CUDA, which cannot be used here: device_id: 3, expected 0 to 2 (3 CUDA "
              "devices here)");
  CHECK_INT(fake.retains, 0);
  a.device_id = 1;
  a.stream = &stream_of[1];
  CHECK_OK(fkda_query(&a));
  CHECK_INT(fake.retains, 0); /* questions touch no device */
  CHECK_OK(fkda_prefill(&a));
  CHECK_INT(fake.launch.device, 1);
}

static void check_unsupported(const void *args, const char *reason) {
  char message[400];
  snprintf(message, sizeof message,
           "no backend can run this call: " NOT_HOPPER("0", "8.6") "portable: %s", reason);
  CHECK_FAILS(fkda_query(args), FKDA_ERROR_UNSUPPORTED, message);
}

SCENARIO(unsupported_calls) {
  fkda_prefill_args a = prefill(1, 2, 96, 128);
  check_unsupported(&a, "K = 96, V = 128, expected each 64 or 128");
  CHECK_INT(fkda_prefill(&a), FKDA_ERROR_UNSUPPORTED);
  a = prefill(1, 2, 64, 256);
  check_unsupported(&a, "K = 64, V = 256, expected each 64 or 128");
  a = prefill(1, 2, 64, 64);
  a.q.dtype = a.k.dtype = a.v.dtype = a.beta.dtype = a.out.dtype = FKDA_F16;
  check_unsupported(&a, "q, k, v, out: float16, expected bfloat16");
  a = prefill(1, 2, 64, 64);
  a.checkpoint_every = 16;
  a.checkpoint_state = PLACE(FKDA_F16, 2, 2, 64, 64);
  check_unsupported(&a, "checkpoint_state: float16, expected bfloat16 or float32");
  a.checkpoint_state.dtype = FKDA_BF16;
  CHECK_OK(fkda_query(&a));
  fkda_decode_args d = decode(INT64_C(1) << 24, 64, 128, 128, FKDA_STATE_VK);
  check_unsupported(&d, "N*HV = 16777216*64 takes 2147483648 blocks, expected at most 2147483647");
  fkda_summary_args s = FKDA_SUMMARY_ARGS_INIT;
  a = prefill(1, 2, 64, 64);
  s.device_type = FKDA_DEVICE_CUDA;
  s.k = a.k, s.v = a.v, s.g = a.g, s.beta = a.beta;
  s.M = PLACE(FKDA_F32, 1, 2, 64, 64);
  s.b = PLACE(FKDA_F32, 1, 2, 64, 64);
  check_unsupported(&s, "has kernels for prefill, decode and backward only");
  fkda_backward_args b = backward(1, 2, 2, 64, 48);
  check_unsupported(&b, "K = 64, V = 48, expected each 64 or 128");
  b = backward(1, 2, 2, 64, 64);
  fkda_tensor *io[] = {&b.q, &b.k, &b.v, &b.g, &b.beta, &b.d_out, &b.d_q, &b.d_v, &b.d_g};
  for (int i = 0; i < 9; ++i) io[i]->dtype = FKDA_F32;
  check_unsupported(&b, "q, k, v: float32, expected bfloat16");
  b = backward(1, 2, 2, 64, 64);
  b.q.shape[1] = b.k.shape[1] = b.v.shape[1] = b.g.shape[1] = b.beta.shape[1] = INT64_C(1) << 35;
  b.d_out = b.d_q = b.d_k = b.d_v = b.d_beta = (fkda_tensor){0};
  b.d_g.shape[1] = INT64_C(1) << 35;
  check_unsupported(&b, "N*HV = 1*2 takes 2147483652 blocks, expected at most 2147483647");
  CHECK_INT(fake.loads, 0);
}

/* ---- launches ---- */

static void check_launch(const char *entry, unsigned blocks, unsigned threads, unsigned shared) {
  CHECK_TEXT(fake.launch.entry, entry);
  CHECK_INT(fake.launch.grid[0], blocks);
  CHECK_INT(fake.launch.grid[1], 1);
  CHECK_INT(fake.launch.grid[2], 1);
  CHECK_INT(fake.launch.block[0], threads);
  CHECK_INT(fake.launch.block[1], 1);
  CHECK_INT(fake.launch.block[2], 1);
  CHECK_INT(fake.launch.shared, shared);
}

SCENARIO(prefill_launch) {
  static const struct {
    int64_t N, HV, K, V;
    int split;
    const char *entry;
  } cases[] = {
      {1, 2, 128, 128, 4, "fkda_portable_prefill_k128_v32"},
      {1, 32, 128, 128, 4, "fkda_portable_prefill_k128_v32"},
      {1, 34, 128, 128, 2, "fkda_portable_prefill_k128_v64"},
      {1, 86, 128, 128, 2, "fkda_portable_prefill_k128_v64"},
      {1, 88, 128, 128, 1, "fkda_portable_prefill_k128_v128"},
      {3, 96, 128, 128, 1, "fkda_portable_prefill_k128_v128"},
      {1, 2, 128, 64, 2, "fkda_portable_prefill_k128_v32"},
      {2, 34, 128, 64, 1, "fkda_portable_prefill_k128_v64"},
      {1, 2, 64, 128, 4, "fkda_portable_prefill_k64_v32"},
      {3, 12, 64, 128, 2, "fkda_portable_prefill_k64_v64"},
      {3, 96, 64, 128, 1, "fkda_portable_prefill_k64_v128"},
      {5, 4, 64, 64, 2, "fkda_portable_prefill_k64_v32"},
      {17, 4, 64, 64, 1, "fkda_portable_prefill_k64_v64"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    const int64_t N = cases[i].N, HV = cases[i].HV, K = cases[i].K, V = cases[i].V;
    const int split = cases[i].split;
    fkda_prefill_args a = prefill(N, HV, K, V);
    fkda_plan_info info = {.struct_size = sizeof info};
    CHECK_OK(fkda_plan(&a, &info));
    CHECK_TEXT(info.backend, "portable");
    CHECK_INT(info.chunk, 16);
    CHECK_INT(info.value_split, split);
    CHECK_INT(info.tasks, N * HV * split);
    CHECK_INT(info.threads, N * HV * split);
    CHECK_INT(info.workspace_size, 0);
    CHECK_OK(fkda_prefill(&a));
    check_launch(cases[i].entry, (unsigned)(N * HV * split),
                 FKDA_PORTABLE_PREFILL_THREADS(V / split),
                 (unsigned)(FKDA_PORTABLE_PREFILL_SHARED(K, V / split)));
    CHECK(fake.launch.stream == &stream_of[0]);
    const fkda_portable_params p = params();
    CHECK_INT(p.value_split, split);
    CHECK_INT(p.problem.op, FKDA_OP_PREFILL);
    CHECK_INT(p.problem.N, N);
    CHECK_INT(p.problem.T, 20 * N);
    CHECK_INT(p.problem.H, HV / 2);
    CHECK_INT(p.problem.HV, HV);
    CHECK_INT(p.problem.K, K);
    CHECK_INT(p.problem.V, V);
    CHECK(p.problem.q.data == a.q.data && p.problem.out.data == a.out.data);
    CHECK(p.problem.cu_seqlens.data == a.cu_seqlens.data);
    CHECK(p.problem.initial.data == a.initial_state.data);
    CHECK_INT(p.problem.final.dtype, FKDA_BF16);
    CHECK_INT(p.problem.g.stride_t, HV * K);
    CHECK(p.aligned_q && p.aligned_k && p.aligned_v && p.aligned_g && p.aligned_out);
  }
  CHECK_INT(fake.launches, sizeof cases / sizeof cases[0]);
}

/* Rows that do not all begin at multiples of 16 bytes. */
SCENARIO(alignment) {
  fkda_prefill_args a = prefill(2, 4, 128, 128);
  a.q.data = (char *)a.q.data + 8; /* the gap behind every tensor has room */
  a.k.stride[1] += 4;
  a.v.stride[1] += 8;
  a.g.data = (char *)a.g.data + 16;
  a.out.stride[1] += 1;
  CHECK_OK(fkda_query(&a));
  a.k.data = (void *)((uintptr_t)1 << 45);
  a.v.data = (void *)((uintptr_t)1 << 44);
  a.out.data = (void *)((uintptr_t)1 << 43);
  CHECK_OK(fkda_prefill(&a));
  const fkda_portable_params p = params();
  CHECK_INT(p.aligned_q, 0);
  CHECK_INT(p.aligned_k, 0);
  CHECK_INT(p.aligned_v, 1);
  CHECK_INT(p.aligned_g, 1);
  CHECK_INT(p.aligned_out, 0);

  fkda_decode_args d = decode(2, 4, 128, 128, FKDA_STATE_VK);
  CHECK_OK(fkda_decode(&d));
  CHECK_INT(params().aligned_state, 1);
  CHECK_INT(params().aligned_q, 1);
  d.state.data = (char *)d.state.data + 8;
  CHECK_OK(fkda_decode(&d));
  CHECK_INT(params().aligned_state, 0);
  d.state.data = (void *)((uintptr_t)1 << 45);
  d.state.stride[0] += 2;
  CHECK_OK(fkda_decode(&d));
  CHECK_INT(params().aligned_state, 0);
}

SCENARIO(decode_launch) {
  static const struct {
    int64_t N, HV, K, V;
    int layout, split;
    const char *entry;
  } cases[] = {
      {1, 2, 128, 128, FKDA_STATE_VK, 4, "fkda_portable_decode_vk_k128"},
      {64, 32, 128, 128, FKDA_STATE_VK, 2, "fkda_portable_decode_vk_k128"},
      {64, 32, 64, 128, FKDA_STATE_KV, 2, "fkda_portable_decode_kv_k64"},
      {64, 32, 128, 64, FKDA_STATE_KV, 1, "fkda_portable_decode_kv_k128"},
      {3, 4, 64, 64, FKDA_STATE_VK, 2, "fkda_portable_decode_vk_k64"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    const int64_t N = cases[i].N, HV = cases[i].HV;
    fkda_decode_args a = decode(N, HV, cases[i].K, cases[i].V, cases[i].layout);
    CHECK_OK(fkda_decode(&a));
    check_launch(cases[i].entry, (unsigned)(N * HV * cases[i].split), FKDA_PORTABLE_DECODE_THREADS,
                 0);
    const fkda_portable_params p = params();
    CHECK_INT(p.value_split, cases[i].split);
    CHECK_INT(p.problem.op, FKDA_OP_DECODE);
    CHECK_INT(p.problem.T, 2);
    CHECK_INT(p.problem.layout, cases[i].layout);
    CHECK(p.problem.initial.data == a.state.data && p.problem.final.data == a.state.data);
    CHECK_INT(p.problem.initial.slots, N + 3);
    CHECK(p.problem.final_indices.data == a.initial_state_indices.data);
  }
  fkda_decode_args a = decode(2, 2, 128, 128, FKDA_STATE_VK);
  a.write_state = 0;
  CHECK_OK(fkda_decode(&a));
  CHECK(params().problem.final.data == NULL);
}

/* Decode waits for what is before it by itself, prefill does not. */
SCENARIO(early_start) {
  fake.version = fkda_cuda_toolkit_version;
  fake.capability[0].major = 9;
  fkda_decode_args d = decode(1, 2, 128, 128, FKDA_STATE_VK);
  CHECK_OK(fkda_decode(&d));
  CHECK_INT(fake.launch.early, 1);
  fkda_prefill_args p = prefill(1, 2, 128, 128);
  CHECK_OK(fkda_prefill(&p));
  CHECK_INT(fake.launch.early, 0);
}

SCENARIO(no_early_start_before_hopper) {
  fake.version = fkda_cuda_toolkit_version;
  fake.capability[0].major = 8;
  fkda_decode_args d = decode(1, 2, 128, 128, FKDA_STATE_VK);
  CHECK_OK(fkda_decode(&d));
  CHECK_INT(fake.launch.early, 0);
}

SCENARIO(nothing_to_do) {
  fkda_prefill_args a = prefill(0, 2, 128, 128);
  CHECK_OK(fkda_prefill(&a));
  CHECK_INT(fake.launches, 0);
  CHECK_INT(fake.loads, 0);
}

SCENARIO(default_stream) {
  fkda_prefill_args a = prefill(1, 2, 128, 128);
  a.stream = NULL;
  CHECK_OK(fkda_prefill(&a));
  CHECK(fake.launch.stream == NULL);
}

SCENARIO(stream_of_another_device) {
  fake.device_count = 2;
  fkda_prefill_args a = prefill(1, 2, 128, 128);
  a.stream = &stream_of[1];
  CHECK_INT(fkda_prefill(&a), FKDA_ERROR_DEVICE);
  char message[300];
  snprintf(message, sizeof message,
           "stream: %p, expected a stream of device 0's primary context "
           "(fkda_portable_prefill_k128_v32 was refused)",
           a.stream);
  CHECK_TEXT(fkda_last_error(), message);
}

SCENARIO(failed_launch) {
  fkda_prefill_args a = prefill(1, 2, 128, 128);
  fake.failing = "cuLaunchKernelEx";
  fake.failure = 700;
  CHECK_FAILS(fkda_prefill(&a), FKDA_ERROR_DEVICE,
              "fkda_portable_prefill_k128_v32: CUDA_ERROR_FAKE, error 700 (made up for a test)");
}

/* ---- sm90 ---- */

static const char *backend_of(const void *args) {
  static fkda_plan_info info;
  info = (fkda_plan_info){.struct_size = sizeof info};
  CHECK_OK(fkda_plan(args, &info));
  return info.backend;
}

/* The description says of a row that was not taken why. */
static void check_not(const void *args, const char *row, const char *reason) {
  char text[2048], line[300];
  CHECK_OK(fkda_plan_describe(args, text, sizeof text, NULL));
  snprintf(line, sizeof line, "\nnot %s: %s\n", row, reason);
  if (!strstr(text, line)) {
    fprintf(stderr, "%s,\nexpected in it %s", text, line);
    fail_child(__LINE__, "fkda_plan_describe");
  }
}

/* g is float32 in prefill() */
static fkda_prefill_args hopper_prefill(int64_t N, int64_t HV, int64_t K, int64_t V) {
  fkda_prefill_args a = prefill(N, HV, K, V);
  a.g.dtype = FKDA_BF16;
  return a;
}

SCENARIO(capabilities) {
  static const struct {
    int major, minor;
    const char *backend, *reason;
  } cases[] = {
      {8, 0, "portable", "device_id: 0 (Fake 0) has compute capability 8.0, expected 9.0"},
      {8, 9, "portable", "device_id: 0 (Fake 0) has compute capability 8.9, expected 9.0"},
      {9, 0, "sm90", NULL},
      {10, 0, "portable", "device_id: 0 (Fake 0) has compute capability 10.0, expected 9.0"},
      {12, 0, "portable", "device_id: 0 (Fake 0) has compute capability 12.0, expected 9.0"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    fflush(NULL);
    const pid_t child = fork(); /* a driver is asked for its devices once */
    CHECK(child >= 0);
    if (child == 0) {
      fake.capability[0].major = cases[i].major;
      fake.capability[0].minor = cases[i].minor;
      fkda_prefill_args a = hopper_prefill(1, 2, 128, 128);
      CHECK_TEXT(backend_of(&a), cases[i].backend);
      if (cases[i].reason) {
        check_not(&a, "sm90", cases[i].reason);
        char message[200];
        snprintf(message, sizeof message, "sm90: %s", cases[i].reason);
        CHECK_FAILS(fkda_backend_available("sm90"), FKDA_ERROR_NO_DEVICE, message);
      } else {
        check_not(&a, "portable", "sm90 comes first");
        CHECK_OK(fkda_backend_available("sm90"));
      }
      CHECK_OK(fkda_backend_available("portable"));
      fkda_decode_args d = decode(1, 2, 128, 128, FKDA_STATE_VK);
      CHECK_TEXT(backend_of(&d), "portable");
      _exit(0);
    }
    int status = -1;
    CHECK_INT(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}

/* Of two devices each gets its own. */
SCENARIO(mixed_devices) {
  fake.device_count = 2;
  be_hopper(1);
  fkda_prefill_args a = hopper_prefill(1, 2, 128, 128);
  CHECK_TEXT(backend_of(&a), "portable");
  a.device_id = 1;
  a.stream = &stream_of[1];
  CHECK_TEXT(backend_of(&a), "sm90");
  CHECK_OK(fkda_prefill(&a));
  CHECK_INT(fake.launch.device, 1);
  a.device_id = 0;
  a.backend = "sm90";
  CHECK_FAILS(
      fkda_prefill(&a), FKDA_ERROR_NO_DEVICE,
      "backend: \"sm90\" cannot run this call: device_id: 0 (Fake 0) has compute capability "
      "8.6, expected 9.0");
}

typedef struct expected_map {
  const fkda_tensor *tensor;
  fkda_tensor_map map;
  uint64_t strides[3]; /* bytes: T, heads, B */
} expected_map;

static void check_map(const expected_map *expected) {
  const fkda_tensor *t = expected->tensor;
  fake_tensor_map m;
  memcpy(&m, &expected->map, sizeof m);
  CHECK(m.address == t->data);
  CHECK_INT(m.sizes[0], t->shape[3]);
  CHECK_INT(m.sizes[1], t->shape[1]);
  CHECK_INT(m.sizes[2], t->shape[2]);
  CHECK_INT(m.sizes[3], t->shape[0]);
  for (int i = 0; i < 3; ++i) CHECK_INT(m.strides[i], expected->strides[i]);
  CHECK_INT(m.box[0], t->dtype == FKDA_F32 ? 32 : 64);
  CHECK_INT(m.box[1], FKDA_SM90_CHUNK);
  CHECK_INT(m.box[2], 1);
  CHECK_INT(m.box[3], 1);
  CHECK_INT(m.data_type, t->dtype == FKDA_F32 ? 7 : 9);
  CHECK_INT(m.interleave, 0);
  CHECK_INT(m.swizzle, 3);
  CHECK_INT(m.l2_promotion, 3);
  CHECK_INT(m.oob_fill, 0);
}

SCENARIO(sm90_launch) {
  static const struct {
    int64_t N, HV;
    int split;
    const char *entry;
  } cases[] = {
      {1, 2, 2, "fkda_sm90_prefill_k128_v64_pair"},
      {1, 66, 2, "fkda_sm90_prefill_k128_v64_pair"},
      {1, 68, 1, "fkda_sm90_prefill_k128_v128"},
      {3, 96, 1, "fkda_sm90_prefill_k128_v128"},
  };
  be_hopper(0);
  const int64_t K = 128, V = 128;
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    const int64_t N = cases[i].N, HV = cases[i].HV;
    const int split = cases[i].split;
    fkda_prefill_args a = hopper_prefill(N, HV, K, V);
    fkda_plan_info info = {.struct_size = sizeof info};
    CHECK_OK(fkda_plan(&a, &info));
    CHECK_TEXT(info.backend, "sm90");
    CHECK_INT(info.chunk, FKDA_SM90_CHUNK);
    CHECK_INT(info.value_split, split);
    CHECK_INT(info.tasks, N * HV * split);
    const unsigned blocks = N * HV * split < 132 ? (unsigned)(N * HV * split) : 132;
    CHECK_INT(info.threads, blocks);
    CHECK_INT(info.workspace_size, 0);
    CHECK_OK(fkda_prefill(&a));
    check_launch(cases[i].entry, blocks,
                 split == 2 ? FKDA_SM90_PAIR_THREADS : FKDA_SM90_PREFILL_THREADS,
                 FKDA_SM90_PREFILL_SHARED);
    CHECK(fake.launch.stream == &stream_of[0]);
    CHECK_INT(fake.maps, 5 * (i + 1));
    const fkda_sm90_params p = sm90_params();
    CHECK_INT(p.value_split, split);
    CHECK_INT(p.problem.N, N);
    CHECK_INT(p.problem.HV, HV);
    CHECK(p.problem.out.data == a.out.data);
    const uint64_t H = (uint64_t)HV / 2; /* B is 1: its stride is not used, and may be any */
    const expected_map maps[] = {
        {&a.q, p.q, {H * K * 2, H > 1 ? K * 2 : 16, 16}},
        {&a.k, p.k, {H * K * 2, H > 1 ? K * 2 : 16, 16}},
        {&a.g, p.g, {HV * K * 2, K * 2, 16}},
        {&a.v, p.v, {HV * V * 2, V * 2, 16}},
        {&a.out, p.out, {HV * V * 2, V * 2, 16}},
    };
    for (size_t j = 0; j < sizeof maps / sizeof maps[0]; ++j) check_map(&maps[j]);
  }
  CHECK_INT(fake.loads, SM90_IMAGES); /* and nothing of the backward's */
}

/* Which kernel halves 128 value columns: two blocks of a cluster where g is bfloat16, blocks by themselves else. */
SCENARIO(sm90_pairs) {
  static const struct {
    int64_t K, V;
    int g, gate;
    unsigned blocks;
    const char *entry;
  } cases[] = {
      {128, 128, FKDA_BF16, FKDA_GATE_BOUNDED, 4, "fkda_sm90_prefill_k128_v64_pair"},
      {128, 128, FKDA_BF16, FKDA_GATE_SOFTPLUS, 4, "fkda_sm90_prefill_k128_v64_pair_unbounded"},
      {64, 128, FKDA_BF16, FKDA_GATE_BOUNDED, 4, "fkda_sm90_prefill_k64_v64_pair"},
      {64, 128, FKDA_BF16, FKDA_GATE_SOFTPLUS, 4, "fkda_sm90_prefill_k64_v64_pair_unbounded"},
      {128, 128, FKDA_F32, FKDA_GATE_BOUNDED, 4, "fkda_sm90_prefill_k128_v64_g32"},
      {128, 128, FKDA_F32, FKDA_GATE_SOFTPLUS, 4, "fkda_sm90_prefill_k128_v64_g32_unbounded"},
      {64, 128, FKDA_F32, FKDA_GATE_BOUNDED, 4, "fkda_sm90_prefill_k64_v64_g32"},
      {128, 64, FKDA_BF16, FKDA_GATE_BOUNDED, 2, "fkda_sm90_prefill_k128_v64"},
      {64, 64, FKDA_BF16, FKDA_GATE_SOFTPLUS, 2, "fkda_sm90_prefill_k64_v64_unbounded"},
  };
  be_hopper(0);
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    fkda_prefill_args a = hopper_prefill(1, 2, cases[i].K, cases[i].V);
    a.g.dtype = cases[i].g;
    a.gate = cases[i].gate;
    CHECK_OK(fkda_prefill(&a));
    check_launch(
        cases[i].entry, cases[i].blocks,
        strstr(cases[i].entry, "_pair") ? FKDA_SM90_PAIR_THREADS : FKDA_SM90_PREFILL_THREADS,
        FKDA_SM90_PREFILL_SHARED);
  }

  /* An odd number of processors: one is left over. */
  ((fkda_cuda_device *)(uintptr_t)fkda_cuda_driver_get(NULL, 0)->devices)[0].processors = 7;
  fkda_prefill_args a = hopper_prefill(1, 12, 128, 128);
  CHECK_OK(fkda_prefill(&a));
  check_launch("fkda_sm90_prefill_k128_v64_pair", 6, FKDA_SM90_PAIR_THREADS,
               FKDA_SM90_PREFILL_SHARED);
}

/* Where one of many sequences may be long, with whole columns and with halves: the kernels settle which one it is. */
SCENARIO(sm90_by_lengths) {
  static const struct {
    int64_t N, HV, V;
    bool packed;
    int launches;
  } cases[] = {
      {3, 66, 128, true, 2},   {3, 68, 128, true, 1},  {2, 32, 128, true, 1},
      {3, 66, 64, true, 1},    {3, 66, 128, false, 1}, {1024, 2, 128, true, 2},
      {1025, 2, 128, true, 1},
  };
  be_hopper(0);
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    const int64_t N = cases[i].N, HV = cases[i].HV, V = cases[i].V;
    fkda_prefill_args a = hopper_prefill(N, HV, 128, V);
    if (!cases[i].packed) {
      a.cu_seqlens = (fkda_tensor){0};
      fkda_tensor *const tensors[] = {&a.q, &a.k, &a.v, &a.g, &a.beta, &a.out};
      for (size_t j = 0; j < sizeof tensors / sizeof tensors[0]; ++j) {
        fkda_tensor *t = tensors[j];
        t->shape[0] = N;
        t->shape[1] = 20;
        t->stride[0] = 20 * t->stride[1];
      }
    }
    const int launches = fake.launches, maps = fake.maps;
    CHECK_OK(fkda_prefill(&a));
    CHECK_INT(fake.launches - launches, cases[i].launches);
    CHECK_INT(fake.maps - maps, 5);
    const bool both = cases[i].launches == 2, halves = V == 128 && (both || 2 * N * HV <= 132);
    check_launch(halves    ? "fkda_sm90_prefill_k128_v64_pair"
                 : V == 64 ? "fkda_sm90_prefill_k128_v64"
                           : "fkda_sm90_prefill_k128_v128",
                 2 * N * HV < 132 ? (unsigned)(2 * N * HV) : 132,
                 halves ? FKDA_SM90_PAIR_THREADS : FKDA_SM90_PREFILL_THREADS,
                 FKDA_SM90_PREFILL_SHARED);
    const fkda_sm90_params p = sm90_params();
    CHECK_INT(p.value_split, both || (V == 128 && 2 * N * HV <= 132) ? 2 : 1);
    CHECK_INT(p.by_lengths, both ? 132 : 0);
    CHECK(p.problem.out.data == a.out.data);
    const expected_map out = {
        &a.out, p.out, {HV * V * 2, V * 2, cases[i].packed ? 16 : 20 * HV * V * 2}};
    check_map(&out);
  }
}

/* Sequences of one length that processors do not divide are cut, where that pays; never with what it cannot be done with. */
SCENARIO(sm90_equal_shares) {
  enum { PLAIN, PACKED, F32_GATE, CHECKPOINTS };
  static const struct {
    int64_t B, T, HV;
    int with;
    bool shares;
  } cases[] = {
      {1, 8192, 96, PLAIN, true},        {2, 4096, 96, PLAIN, true},
      {1, 8192, 68, PLAIN, true},        {3, 630, 24, PLAIN, true},
      {1, 8192, 66, PLAIN, false},       {1, 8192, 128, PLAIN, false},
      {8, 1024, 96, PLAIN, false},       {3, 608, 24, PLAIN, false},
      {1, 8192, 96, PACKED, false},      {1, 8192, 96, F32_GATE, false},
      {1, 8192, 96, CHECKPOINTS, false}, {1, INT64_C(1) << 28, 96, PLAIN, false},
  };
  be_hopper(0);
  uint64_t last = 0;
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    const int64_t B = cases[i].B, T = cases[i].T, HV = cases[i].HV, K = 128;
    fkda_prefill_args a = hopper_prefill(1, HV, K, K);
    a.q = PLACE(FKDA_BF16, B, T, HV / 2, K);
    a.k = PLACE(FKDA_BF16, B, T, HV / 2, K);
    a.v = PLACE(FKDA_BF16, B, T, HV, K);
    a.g = PLACE(cases[i].with == F32_GATE ? FKDA_F32 : FKDA_BF16, B, T, HV, K);
    a.beta = PLACE(FKDA_BF16, B, T, HV);
    a.out = PLACE(FKDA_BF16, B, T, HV, K);
    if (cases[i].with != PACKED) a.cu_seqlens = (fkda_tensor){0};
    a.initial_state = PLACE(FKDA_F32, B, HV, K, K);
    a.final_state = PLACE(FKDA_F32, B, HV, K, K);
    if (cases[i].with == CHECKPOINTS) {
      a.checkpoint_every = 4096;
      a.checkpoint_state = PLACE(FKDA_F32, 2, HV, K, K);
    }
    fkda_plan_info info = {.struct_size = sizeof info};
    CHECK_OK(fkda_plan(&a, &info));
    const bool halves = cases[i].shares || 2 * B * HV <= 132;
    CHECK_INT(info.value_split, halves ? 2 : 1);
    CHECK_INT(info.workspace_size, 0);
    CHECK_OK(fkda_prefill(&a));
    const fkda_sm90_params p = sm90_params();
    CHECK_INT(p.equal_shares, cases[i].shares);
    if (!cases[i].shares) {
      CHECK_INT(p.mark, 0);
      continue;
    }
    check_launch("fkda_sm90_prefill_k128_v64_pair", 132, FKDA_SM90_PAIR_THREADS,
                 FKDA_SM90_PREFILL_SHARED);
    CHECK(p.mark != last); /* of every call another */
    last = p.mark;
    for (int j = 0; j < 4; ++j) { /* signaling NaNs */
      const uint64_t x = p.mark >> 16 * j;
      CHECK((x & 0x7fc0) == 0x7f80 && (x & 0x3f) != 0);
    }
  }
}

/* Batches, heads outside of tokens, rows with gaps: what the maps are given is what the tensors are. */
SCENARIO(sm90_strides) {
  be_hopper(0);
  fkda_prefill_args a = hopper_prefill(4, 6, 128, 128);
  fkda_tensor *tensors[] = {&a.q, &a.k, &a.v, &a.g, &a.out};
  a.cu_seqlens = (fkda_tensor){0};
  for (int i = 0; i < 5; ++i) { /* 4 * 20 tokens as B 4, T 20 */
    tensors[i]->shape[0] = 4;
    tensors[i]->shape[1] = 20;
    tensors[i]->stride[0] = 20 * tensors[i]->stride[1];
  }
  a.beta = PLACE(FKDA_BF16, 4, 20, 6);
  a.q.stride[2] = 20 * 128; /* [B,H,T,K] in memory */
  a.q.stride[1] = 128;
  a.k.stride[1] += 8;
  a.k.stride[0] = 20 * a.k.stride[1];
  for (int i = 0; i < 5; ++i) tensors[i]->data = (void *)((uintptr_t)(i + 1) << 44);
  CHECK_OK(fkda_prefill(&a));
  const fkda_sm90_params p = sm90_params();
  const expected_map maps[] = {
      {&a.q, p.q, {256, 20 * 256, 3 * 20 * 256}},
      {&a.k, p.k, {3 * 256 + 16, 256, 20 * (3 * 256 + 16)}},
      {&a.v, p.v, {6 * 256, 256, 20 * 6 * 256}},
      {&a.g, p.g, {6 * 256, 256, 20 * 6 * 256}},
      {&a.out, p.out, {6 * 256, 256, 20 * 6 * 256}},
  };
  for (size_t j = 0; j < sizeof maps / sizeof maps[0]; ++j) check_map(&maps[j]);
}

/* What the copy engine cannot reach goes to portable, and the plan says why. */
SCENARIO(sm90_alignment) {
  be_hopper(0);
  for (int i = 0; i < 5; ++i) {
    static const char *const names[] = {"q", "k", "v", "g", "out"};
    fkda_prefill_args a = hopper_prefill(2, 4, 128, 128);
    fkda_tensor *const tensors[] = {&a.q, &a.k, &a.v, &a.g, &a.out}, *const t = tensors[i];
    char reason[200], message[300];
    t->data = (void *)((uintptr_t)(1 + i) << 44);
    t->stride[2] += 8; /* 16 bytes */
    t->stride[1] = 4 * t->stride[2];
    CHECK_TEXT(backend_of(&a), "sm90");
    CHECK_OK(fkda_prefill(&a));
    CHECK_TEXT(fake.launch.entry, "fkda_sm90_prefill_k128_v64_pair");

    t->stride[1] += 1;
    CHECK_TEXT(backend_of(&a), "portable");
    snprintf(reason, sizeof reason,
             "%s: stride of T is %d bytes, expected a multiple of 16, less than 2^40", names[i],
             4 * 136 * 2 + 2);
    check_not(&a, "sm90", reason);
    CHECK_OK(fkda_prefill(&a));
    CHECK_TEXT(fake.launch.entry, "fkda_portable_prefill_k128_v32");
    a.backend = "sm90";
    snprintf(message, sizeof message, "backend: \"sm90\" cannot run this call: %s", reason);
    const int launches = fake.launches;
    CHECK_FAILS(fkda_prefill(&a), FKDA_ERROR_UNSUPPORTED, message);
    CHECK_INT(fake.launches, launches);

    /* the heads' stride; of one head none */
    t->stride[1] = 4 * 136;
    t->stride[2] = 132;
    snprintf(reason, sizeof reason,
             "%s: stride of heads is 264 bytes, expected a multiple of 16, less than 2^40",
             names[i]);
    snprintf(message, sizeof message, "backend: \"sm90\" cannot run this call: %s", reason);
    CHECK_FAILS(fkda_query(&a), FKDA_ERROR_UNSUPPORTED, message);

    /* the address, which a question need not give */
    t->stride[2] = 136;
    t->data = (char *)t->data + 8;
    a.backend = NULL;
    CHECK_TEXT(backend_of(&a), "portable");
    CHECK_OK(fkda_prefill(&a));
    CHECK_TEXT(fake.launch.entry, "fkda_portable_prefill_k128_v32");
    void *const data = t->data;
    t->data = NULL;
    CHECK_TEXT(backend_of(&a), "sm90");
    t->data = data;
    a.backend = "sm90";
    snprintf(message, sizeof message,
             "backend: \"sm90\" cannot run this call: %s: data %p, expected a multiple of 16",
             names[i], t->data);
    CHECK_FAILS(fkda_prefill(&a), FKDA_ERROR_UNSUPPORTED, message);
  }
  /* one row for all heads or tokens: a stride that no tensor map has */
  fkda_prefill_args a = hopper_prefill(2, 4, 128, 128);
  a.k.stride[1] = 0;
  check_not(&a, "sm90", "k: stride of T is 0 bytes, expected a multiple of 16, less than 2^40");
  CHECK_TEXT(backend_of(&a), "portable");
}

SCENARIO(sm90_limits) {
  be_hopper(0);
  fkda_prefill_args a = hopper_prefill(2, 4, 128, 128);
  a.v.stride[1] = INT64_C(1) << 39;
  check_not(&a, "sm90",
            "v: stride of T is 1099511627776 bytes, expected a multiple of 16, less than 2^40");
  a.v.stride[1] -= 8;
  CHECK_TEXT(backend_of(&a), "sm90");
  a = hopper_prefill(INT64_C(1) << 27, 2, 128, 128); /* 20 * 2^27 tokens */
  check_not(&a, "sm90", "T = 2684354560, expected at most 2147483615");
}

SCENARIO(sm90_forced) {
  be_hopper(0);
  fkda_prefill_args a = hopper_prefill(1, 2, 128, 128);
  a.backend = "portable";
  check_not(&a, "sm90", "backend asks for portable");
  CHECK_OK(fkda_prefill(&a));
  CHECK_TEXT(fake.launch.entry, "fkda_portable_prefill_k128_v32");
  a.backend = "sm90";
  CHECK_OK(fkda_prefill(&a));
  CHECK_TEXT(fake.launch.entry, "fkda_sm90_prefill_k128_v64_pair");
  a.backend = NULL;
  setenv("FLASHKDA_BACKEND", "portable", 1);
  CHECK_OK(fkda_prefill(&a));
  CHECK_TEXT(fake.launch.entry, "fkda_portable_prefill_k128_v32");
  setenv("FLASHKDA_BACKEND", "sm90", 1);
  CHECK_OK(fkda_prefill(&a));
  CHECK_TEXT(fake.launch.entry, "fkda_sm90_prefill_k128_v64_pair");
  fkda_decode_args d = decode(1, 2, 128, 128, FKDA_STATE_VK);
  CHECK_FAILS(
      fkda_decode(&d), FKDA_ERROR_UNSUPPORTED,
      "FLASHKDA_BACKEND: \"sm90\" cannot run this call: has kernels for prefill and backward only");
}

SCENARIO(sm90_and_portable_refuse) {
  be_hopper(0);
  fkda_prefill_args a = prefill(1, 2, 96, 128);
  CHECK_FAILS(fkda_query(&a), FKDA_ERROR_UNSUPPORTED,
              "no backend can run this call: sm90, portable: K = 96, V = 128, expected each 64 or "
              "128");
  fkda_decode_args d = decode(1, 2, 96, 128, FKDA_STATE_VK);
  CHECK_FAILS(fkda_query(&d), FKDA_ERROR_UNSUPPORTED,
              "no backend can run this call: sm90: has kernels for prefill and backward only; "
              "portable: K = 96, "
              "V = 128, expected each 64 or 128");
}

/* Sequences without tokens have states all the same; there is nothing to map. */
SCENARIO(sm90_no_tokens) {
  be_hopper(0);
  fkda_prefill_args a = hopper_prefill(3, 2, 128, 128);
  fkda_tensor *tensors[] = {&a.q, &a.k, &a.v, &a.g, &a.out, &a.beta};
  for (int i = 0; i < 6; ++i) {
    tensors[i]->shape[1] = 0;
    tensors[i]->data = NULL;
  }
  CHECK_OK(fkda_prefill(&a));
  CHECK_TEXT(fake.launch.entry, "fkda_sm90_prefill_k128_v64_pair");
  CHECK_INT(fake.maps, 0);
  const fkda_sm90_params p = sm90_params();
  const fkda_tensor_map nothing = {{0}};
  CHECK(memcmp(&p.q, &nothing, sizeof nothing) == 0);
  CHECK(memcmp(&p.out, &nothing, sizeof nothing) == 0);
}

SCENARIO(sm90_failed_map) {
  be_hopper(0);
  fkda_prefill_args a = hopper_prefill(1, 2, 128, 128);
  fake.failing = "cuTensorMapEncodeTiled";
  fake.failure = 1;
  CHECK_FAILS(fkda_prefill(&a), FKDA_ERROR_DEVICE,
              "cuTensorMapEncodeTiled: CUDA_ERROR_FAKE, error 1 (made up for a test)");
  CHECK_INT(fake.launches, 0);
  CHECK_INT(fake_depth(), 0);
}

/* A driver that has no tensor maps. Ours has them, so they are taken away once it is found. */
SCENARIO(sm90_old_driver) {
  be_hopper(0);
  const fkda_cuda_driver *driver = fkda_cuda_driver_get(NULL, 0);
  ((fkda_cuda_driver *)(uintptr_t)driver)->api.tensor_map_encode_tiled = NULL;
  fkda_prefill_args a = hopper_prefill(1, 2, 128, 128);
  check_not(&a, "sm90", "the NVIDIA driver is too old: it has no cuTensorMapEncodeTiled");
  CHECK_OK(fkda_prefill(&a));
  CHECK_TEXT(fake.launch.entry, "fkda_portable_prefill_k128_v32");
}

#define CAPTURE_MESSAGE                                                                            \
  "stream: capturing a graph, and the kernels are not loaded yet: call fkda_warmup() or the "      \
  "function "                                                                                      \
  "itself on this device before the capture"

/* ---- backward ---- */

/* The i-th launch of the last call, which made `count`. */
static const fake_launch *launch_of(int count, int i) {
  return &fake.history[(fake.launches - count + i) % FAKE_HISTORY];
}

static fkda_portable_backward_params backward_params(const fake_launch *launch) {
  fkda_portable_backward_params p;
  memcpy(&p, launch->params, sizeof p);
  return p;
}

static void check_stage(const fake_launch *launch, const char *entry, int64_t blocks, int threads,
                        int shared) {
  char name[64];
  snprintf(name, sizeof name, "fkda_portable_backward_%s", entry);
  CHECK_TEXT(launch->entry, name);
  CHECK_INT(launch->grid[0], blocks);
  CHECK_INT(launch->block[0], threads);
  CHECK_INT(launch->shared, shared);
  CHECK_INT(launch->early, 0);
  CHECK(launch->stream == &stream_of[0]);
}

SCENARIO(backward_launches) {
  static const struct {
    int64_t N, H, HV, K, V;
    int split, stages;
    const char *size; /* k128_v64 */
  } cases[] = {
      {1, 2, 2, 128, 128, 2, 6, "k128_v128"},   {1, 32, 32, 128, 128, 2, 6, "k128_v128"},
      {1, 33, 33, 128, 128, 2, 6, "k128_v128"}, {1, 34, 34, 128, 128, 2, 3, "k128_v128"},
      {2, 48, 96, 128, 128, 2, 2, "k128_v128"}, {3, 2, 4, 64, 128, 2, 8, "k64_v128"},
      {3, 40, 40, 64, 64, 1, 4, "k64_v64"},     {3, 60, 60, 64, 64, 1, 3, "k64_v64"},
      {1, 2, 2, 128, 64, 1, 6, "k128_v64"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    const int64_t N = cases[i].N, H = cases[i].H, HV = cases[i].HV, K = cases[i].K, V = cases[i].V;
    const int64_t rows = 100 * N / FKDA_BACKWARD_BLOCK + N;
    const int64_t walk = 2 * N * HV * cases[i].split;
    char name[64];
    fkda_backward_args a = backward(N, H, HV, K, V);
    fkda_plan_info info = {.struct_size = sizeof info};
    CHECK_OK(fkda_plan(&a, &info));
    CHECK_TEXT(info.backend, "portable");
    CHECK_INT(info.chunk, FKDA_BACKWARD_BLOCK);
    CHECK_INT(info.value_split, cases[i].split);
    CHECK_INT(info.tasks, walk);
    CHECK_INT(info.threads, walk);
    CHECK_INT(info.workspace_size, fkda_portable_backward_workspace(1, 100 * N, N, HV, K, V));
    give_workspace(&a);
    CHECK_INT(a.workspace_size, info.workspace_size);
    const int before = fake.launches, count = HV > H ? 5 : 4;
    CHECK_OK(fkda_backward(&a));
    CHECK_INT(fake.launches, before + count);
    snprintf(name, sizeof name, "factors_k%d", (int)K);
    check_stage(launch_of(count, 0), name, 2 * rows * HV, FKDA_BACKWARD_FACTORS_THREADS, 0);
    snprintf(name, sizeof name, "walk_k%d", (int)K);
    check_stage(launch_of(count, 1), name, walk, FKDA_BACKWARD_WALK_THREADS,
                (int)FKDA_BACKWARD_WALK_SHARED(K, cases[i].stages));
    snprintf(name, sizeof name, "gradients_%s", cases[i].size);
    check_stage(launch_of(count, 2), name, rows * HV, (int)FKDA_BACKWARD_GRADIENTS_THREADS(K),
                (int)FKDA_BACKWARD_GRADIENTS_SHARED(K, V, 1));
    snprintf(name, sizeof name, "reduce_k%d", (int)K);
    check_stage(launch_of(count, 3), name, HV, (int)FKDA_BACKWARD_REDUCE_THREADS(K), 0);
    snprintf(name, sizeof name, "group_k%d", (int)K);
    if (count == 5)
      check_stage(launch_of(count, 4), name, rows * H, FKDA_BACKWARD_GROUP_THREADS, 0);
    for (int j = 0; j < count; ++j) {
      const fkda_portable_backward_params p = backward_params(launch_of(count, j));
      CHECK(p.workspace == a.workspace);
      CHECK_INT(p.rows, rows);
      CHECK_INT(p.value_split, cases[i].split);
      CHECK_INT(p.stages, cases[i].stages);
      CHECK_INT(p.forward, 1);
      CHECK_INT(p.problem.op, FKDA_OP_BACKWARD);
      CHECK_INT(p.problem.HV, HV);
      CHECK(p.problem.d_dt_bias.data == a.d_dt_bias.data);
      CHECK(p.problem.d_initial.data == a.d_initial_state.data);
      CHECK_INT(p.problem.d_k.dtype, FKDA_F32);
      CHECK(p.aligned_q && p.aligned_k && p.aligned_v && p.aligned_g && p.aligned_d_out);
      CHECK(p.aligned_d_q && p.aligned_d_k && p.aligned_d_v && p.aligned_d_g);
    }
  }
  CHECK_INT(fake.functions, BACKWARD_KERNELS); /* and nothing of prefill's */
}

/* Gradients have a block for each processor where two tasks fit, with registers for it; else one for each task. */
SCENARIO(gradients_of_several_tasks) {
  static const struct {
    int device, K, V, stages;
  } cases[] = {{0, 128, 128, 1}, {0, 64, 64, 1},   {1, 128, 128, 2}, {1, 128, 64, 2},
               {1, 64, 64, 2},   {2, 128, 128, 1}, {2, 128, 64, 1}};
  const int majors[] = {8, 9, 10};
  fake.device_count = 3;
  for (int i = 0; i < 3; ++i) fake.capability[i].major = majors[i];
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    for (int64_t tasks = 130; tasks <= 134; tasks += 2) {
      fkda_backward_args a = backward(1, tasks / 2, tasks / 2, cases[i].K, cases[i].V);
      a.device_id = cases[i].device;
      a.stream = &stream_of[a.device_id];
      give_workspace(&a);
      CHECK_OK(fkda_backward(&a));
      const fake_launch *launch = launch_of(2, 0); /* before reduce */
      CHECK(strstr(launch->entry, "_gradients_"));
      CHECK_INT(launch->grid[0], cases[i].stages == 2 && tasks > 132 ? 132 : tasks);
      CHECK_INT(launch->shared,
                FKDA_BACKWARD_GRADIENTS_SHARED(cases[i].K, cases[i].V, cases[i].stages));
    }
  }
}

/* Less shared memory to lend: fewer chunks on their way, never less than two. */
SCENARIO(backward_shared_memory) {
  fake.shared_kilobytes = 100;
  fkda_backward_args a = backward(1, 96, 96, 128, 128);
  give_workspace(&a);
  CHECK_OK(fkda_backward(&a));
  CHECK_INT(backward_params(launch_of(4, 1)).stages, 2);
  CHECK_INT(launch_of(4, 1)->shared, FKDA_BACKWARD_WALK_SHARED(128, 2));
  a = backward(1, 4, 4, 64, 64);
  give_workspace(&a);
  CHECK_OK(fkda_backward(&a));
  CHECK_INT(backward_params(launch_of(4, 1)).stages, 4);
}

/* Only what the wanted gradients need. */
SCENARIO(backward_subsets) {
  const fkda_tensor none = {0};
  const fkda_backward_args all = backward(2, 2, 4, 64, 64);
  fkda_backward_args nothing = all;
  fkda_tensor *const of[] = {
      &nothing.d_q,    &nothing.d_k,     &nothing.d_v,       &nothing.d_g,
      &nothing.d_beta, &nothing.d_A_log, &nothing.d_dt_bias, &nothing.d_initial_state};
  for (int i = 0; i < 8; ++i) *of[i] = none;
  static const struct {
    size_t wanted;
    const char *stages;
  } cases[] = {
      {offsetof(fkda_backward_args, d_q), "factors walk gradients group"},
      {offsetof(fkda_backward_args, d_k), "factors walk gradients group"},
      {offsetof(fkda_backward_args, d_v), "factors walk"},
      {offsetof(fkda_backward_args, d_g), "factors walk gradients"},
      {offsetof(fkda_backward_args, d_beta), "factors walk gradients"},
      {offsetof(fkda_backward_args, d_A_log), "factors walk gradients reduce"},
      {offsetof(fkda_backward_args, d_dt_bias), "factors walk gradients reduce"},
      {offsetof(fkda_backward_args, d_initial_state), "factors walk"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    fkda_backward_args a = nothing;
    memcpy((char *)&a + cases[i].wanted, (const char *)&all + cases[i].wanted, sizeof none);
    give_workspace(&a);
    const int before = fake.launches;
    CHECK_OK(fkda_backward(&a));
    const int count = fake.launches - before;
    char stages[100] = "";
    for (int j = 0; j < count; ++j) {
      char stage[20] = "";
      CHECK_INT(sscanf(launch_of(count, j)->entry, "fkda_portable_backward_%19[a-z]", stage), 1);
      snprintf(stages + strlen(stages), sizeof stages - strlen(stages), "%s%s", j ? " " : "",
               stage);
    }
    CHECK_TEXT(stages, cases[i].stages);
    CHECK_INT(backward_params(launch_of(count, 0)).forward, count > 2);
  }
  const int before = fake.launches;
  give_workspace(&nothing);
  CHECK_OK(fkda_backward(&nothing));
  CHECK_INT(fake.launches, before);
}

/* Sequences without tokens hand their states' gradients on; without sequences the parameters' are 0. */
SCENARIO(backward_of_nothing) {
  fkda_backward_args a = backward(3, 2, 2, 64, 64);
  fkda_tensor *tokens[] = {&a.q,   &a.k,   &a.v,   &a.g,   &a.beta,  &a.d_out,
                           &a.d_q, &a.d_k, &a.d_v, &a.d_g, &a.d_beta};
  for (int i = 0; i < 11; ++i) tokens[i]->shape[1] = 0;
  give_workspace(&a);
  CHECK_OK(fkda_backward(&a));
  CHECK_INT(fake.launches, 2);
  CHECK_TEXT(launch_of(2, 0)->entry, "fkda_portable_backward_walk_k64");
  CHECK_TEXT(launch_of(2, 1)->entry, "fkda_portable_backward_reduce_k64");
  CHECK_INT(backward_params(launch_of(2, 1)).rows, 0); /* nobody has made their sums */
  a.cu_seqlens.shape[0] = 1;
  a.initial_state.shape[0] = a.d_final_state.shape[0] = a.d_initial_state.shape[0] = 0;
  CHECK_OK(fkda_backward(&a));
  CHECK_INT(fake.launches, 3);
  CHECK_TEXT(fake.launch.entry, "fkda_portable_backward_reduce_k64");
}

SCENARIO(backward_alignment) {
  fkda_backward_args a = backward(2, 4, 4, 64, 64);
  a.q.data = (char *)a.q.data + 8;
  a.k.stride[2] += 4;
  a.k.stride[1] = 4 * a.k.stride[2];
  a.k.data = (void *)((uintptr_t)1 << 44);
  a.g.dtype = FKDA_F32;
  a.g.data = (void *)((uintptr_t)1 << 43);
  a.d_out = (fkda_tensor){0};
  a.d_k.data = (char *)a.d_k.data + 4;
  a.d_g = (fkda_tensor){0};
  give_workspace(&a);
  CHECK_OK(fkda_backward(&a));
  const fkda_portable_backward_params p = backward_params(&fake.launch);
  CHECK(!p.aligned_q && !p.aligned_k && p.aligned_v && !p.aligned_g && !p.aligned_d_out);
  CHECK(p.aligned_d_q && !p.aligned_d_k && p.aligned_d_v && !p.aligned_d_g);
}

SCENARIO(backward_workspace) {
  fkda_backward_args a = backward(2, 4, 4, 64, 64);
  char message[100];
  give_workspace(&a);
  const size_t bytes = a.workspace_size;
  snprintf(message, sizeof message, "workspace: %llu bytes, expected at least %llu",
           (unsigned long long)bytes - 1, (unsigned long long)bytes);
  a.workspace_size = bytes - 1;
  CHECK_FAILS(fkda_backward(&a), FKDA_ERROR_WORKSPACE, message);
  a.workspace = NULL;
  a.workspace_size = 0;
  snprintf(message, sizeof message, "workspace: 0 bytes, expected at least %llu",
           (unsigned long long)bytes);
  CHECK_FAILS(fkda_backward(&a), FKDA_ERROR_WORKSPACE, message);
  a.d_q.data = a.workspace = (void *)((uintptr_t)1 << 45);
  a.workspace_size = bytes;
  CHECK_INT(fkda_backward(&a), FKDA_ERROR_INVALID_ARGUMENT); /* they overlap */
  CHECK_INT(fake.launches, 0);
  /* monotone: a longer, wider or more divided batch never needs less */
  size_t least = 0;
  for (int i = 1; i < 6; ++i) {
    a = backward(i, 4, 4, 64, 64);
    give_workspace(&a);
    CHECK(a.workspace_size > least);
    least = a.workspace_size;
  }
  fkda_backward_args wide = backward(5, 4, 8, 64, 64);
  give_workspace(&wide);
  CHECK(wide.workspace_size > least);
}

/* Checkpoints that the prefill has kept are taken, and not needed. */
SCENARIO(backward_checkpoints) {
  fkda_backward_args a = backward(1, 2, 2, 64, 64);
  const int64_t states[] = {7, 2, 64, 64};
  a.checkpoint_state = fkda_tensor_contiguous((void *)((uintptr_t)1 << 44), FKDA_F16, 4, states);
  a.checkpoint_every = 16;
  give_workspace(&a);
  CHECK_OK(fkda_backward(&a));
  CHECK_INT(fake.launches, 4);
}

/* Of a call on Hopper: its walk, then all of portable's launches, of which factors and walk do what is left. */
static fkda_sm90_backward_params sm90_backward_params(const fake_launch *launch) {
  fkda_sm90_backward_params p;
  memcpy(&p, launch->params, sizeof p);
  return p;
}

SCENARIO(sm90_backward_launches) {
  static const struct {
    int64_t N, H, HV, K, V;
    int split;
    const char *part; /* of the entry points' names */
  } cases[] = {
      {1, 2, 2, 128, 128, 2, "k128_v64"},    {1, 33, 33, 128, 128, 2, "k128_v64"},
      {1, 34, 34, 128, 128, 1, "k128_v128"}, {2, 48, 96, 128, 128, 1, "k128_v128"},
      {3, 2, 4, 64, 128, 2, "k64_v64"},      {3, 40, 40, 64, 128, 1, "k64_v128"},
      {1, 2, 2, 128, 64, 1, "k128_v64"},     {1, 2, 2, 64, 64, 1, "k64_v64"},
      {300, 2, 2, 128, 128, 1, "k128_v128"},
  };
  be_hopper(0);
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    const int64_t N = cases[i].N, H = cases[i].H, HV = cases[i].HV, K = cases[i].K, V = cases[i].V;
    const int64_t rows = 100 * N / FKDA_BACKWARD_BLOCK + N, tasks = 2 * N * HV * cases[i].split;
    const int64_t portable = fkda_portable_backward_workspace(1, 100 * N, N, HV, K, V);
    const bool bounded = i % 2 == 0;
    char name[64];
    fkda_backward_args a = backward(N, H, HV, K, V);
    if (!bounded) a.gate = FKDA_GATE_SOFTPLUS;
    fkda_plan_info info = {.struct_size = sizeof info};
    CHECK_OK(fkda_plan(&a, &info));
    CHECK_TEXT(info.backend, "sm90");
    CHECK_INT(info.chunk, FKDA_BACKWARD_BLOCK);
    CHECK_INT(info.value_split, cases[i].split);
    CHECK_INT(info.tasks, tasks);
    CHECK_INT(info.threads, tasks < 132 ? tasks : 132);
    CHECK_INT(info.workspace_size, portable + N * HV * 4 * FKDA_BACKWARD_REDO);
    give_workspace(&a);
    CHECK_INT(a.workspace_size, info.workspace_size);
    const int before = fake.launches, maps = fake.maps, count = HV > H ? 6 : 5;
    CHECK_OK(fkda_backward(&a));
    CHECK_INT(fake.launches, before + count);
    CHECK_INT(fake.maps, maps + 6);

    const fake_launch *walk = launch_of(count, 0);
    const bool pairs = cases[i].split == 2;
    snprintf(name, sizeof name, "fkda_sm90_backward_walk_%s%s%s", cases[i].part,
             pairs ? "_pair" : "", bounded ? "" : "_unbounded");
    CHECK_TEXT(walk->entry, name);
    CHECK_INT(walk->grid[0], tasks < 132 ? tasks : 132);
    CHECK_INT(walk->block[0], pairs ? FKDA_SM90_PAIR_THREADS : FKDA_SM90_PREFILL_THREADS);
    CHECK_INT(walk->shared, FKDA_SM90_PREFILL_SHARED);
    CHECK_INT(walk->early, 0);
    CHECK(walk->stream == &stream_of[0]);
    const fkda_sm90_backward_params p = sm90_backward_params(walk);
    CHECK_INT(p.value_split, cases[i].split);
    const expected_map expected[] = {
        {&a.q, p.q, {H * K * 2, K * 2, 16}},          {&a.k, p.k, {H * K * 2, K * 2, 16}},
        {&a.g, p.g, {HV * K * 2, K * 2, 16}},         {&a.v, p.v, {HV * V * 2, V * 2, 16}},
        {&a.d_out, p.d_out, {HV * V * 2, V * 2, 16}}, {&a.d_v, p.d_v, {HV * V * 2, V * 2, 16}},
    };
    for (size_t j = 0; j < sizeof expected / sizeof expected[0]; ++j) check_map(&expected[j]);
    CHECK((char *)p.backward.redo == (char *)a.workspace + portable);
    CHECK((uintptr_t)p.backward.redo % 16 == 0);

    const int64_t all = 2 * rows * HV, few = (int64_t)FKDA_BACKWARD_REDO_BLOCKS * 132;
    snprintf(name, sizeof name, "factors_k%d", (int)K);
    check_stage(launch_of(count, 1), name, all < few ? all : few, FKDA_BACKWARD_FACTORS_THREADS, 0);
    snprintf(name, sizeof name, "walk_k%d", (int)K);
    check_stage(launch_of(count, 2), name, 2 * N * HV * V / 64, FKDA_BACKWARD_WALK_THREADS,
                (int)FKDA_BACKWARD_WALK_SHARED(K, p.backward.stages));
    snprintf(name, sizeof name, "gradients_k%d_v%d", (int)K, (int)V);
    check_stage(launch_of(count, 3), name, rows * HV < 132 ? rows * HV : 132,
                (int)FKDA_BACKWARD_GRADIENTS_THREADS(K),
                (int)FKDA_BACKWARD_GRADIENTS_SHARED(K, V, 2));
    snprintf(name, sizeof name, "reduce_k%d", (int)K);
    check_stage(launch_of(count, 4), name, HV, (int)FKDA_BACKWARD_REDUCE_THREADS(K), 0);
    snprintf(name, sizeof name, "group_k%d", (int)K);
    if (count == 6)
      check_stage(launch_of(count, 5), name, rows * H, FKDA_BACKWARD_GROUP_THREADS, 0);
    for (int j = 1; j < count; ++j) {
      const fkda_portable_backward_params q = backward_params(launch_of(count, j));
      CHECK(memcmp(&q, &p.backward, sizeof q) == 0);
      CHECK(q.workspace == a.workspace);
      CHECK_INT(q.rows, rows);
      CHECK_INT(q.value_split, V / 64);
      CHECK(q.aligned_q && q.aligned_d_out && q.aligned_d_v);
    }
  }
  CHECK_INT(fake.functions,
            BACKWARD_KERNELS + SM90_BACKWARD_KERNELS); /* and nothing of prefill's */
}

/* Only what the wanted gradients need, in either direction; no map of what is not there. */
SCENARIO(sm90_backward_subsets) {
  be_hopper(0);
  const fkda_tensor none = {0};
  fkda_backward_args a = backward(2, 2, 4, 64, 64);
  a.d_k = a.d_v = a.d_g = a.d_beta = a.d_A_log = a.d_dt_bias = a.d_initial_state = none;
  give_workspace(&a);
  CHECK_OK(fkda_backward(&a)); /* d_q: walk, factors, walk, gradients, group */
  CHECK_INT(fake.launches, 5);
  CHECK_INT(fake.maps, 5);
  fkda_sm90_backward_params p = sm90_backward_params(launch_of(5, 0));
  const fkda_tensor_map nothing = {{0}};
  CHECK(memcmp(&p.d_v, &nothing, sizeof nothing) == 0);
  CHECK_INT(p.backward.forward, 1);
  CHECK_INT(launch_of(5, 0)->grid[0], 2 * 2 * 4);
  a.d_q = none;
  a.d_initial_state = PLACE(FKDA_F32, 2, 4, 64, 64);
  give_workspace(&a);
  CHECK_OK(fkda_backward(&a)); /* d_initial_state: walk, factors, walk */
  CHECK_INT(fake.launches, 8);
  p = sm90_backward_params(launch_of(3, 0));
  CHECK_INT(p.backward.forward, 0);
  CHECK_INT(launch_of(3, 0)->grid[0], 2 * 4);
  a.d_initial_state = none;
  CHECK_OK(fkda_backward(&a));
  CHECK_INT(fake.launches, 8);

  /* one direction has half the tasks, and processors to spare for longer */
  a = backward(1, 66, 66, 128, 128);
  fkda_plan_info info = {.struct_size = sizeof info};
  CHECK_OK(fkda_plan(&a, &info));
  CHECK_INT(info.value_split, 1);
  a.d_q = a.d_k = a.d_g = a.d_beta = a.d_A_log = a.d_dt_bias = none;
  CHECK_OK(fkda_plan(&a, &info));
  CHECK_INT(info.value_split, 2);
  CHECK_INT(info.tasks, 132);
}

/* Sequences without tokens hand their states' gradients on: nothing to map, no factors. */
SCENARIO(sm90_backward_of_nothing) {
  be_hopper(0);
  fkda_backward_args a = backward(3, 2, 2, 64, 64);
  fkda_tensor *tokens[] = {&a.q,   &a.k,   &a.v,   &a.g,   &a.beta,  &a.d_out,
                           &a.d_q, &a.d_k, &a.d_v, &a.d_g, &a.d_beta};
  for (int i = 0; i < 11; ++i) tokens[i]->shape[1] = 0;
  give_workspace(&a);
  CHECK_OK(fkda_backward(&a));
  CHECK_INT(fake.launches, 3);
  CHECK_INT(fake.maps, 0);
  CHECK_TEXT(launch_of(3, 0)->entry, "fkda_sm90_backward_walk_k64_v64");
  CHECK_TEXT(launch_of(3, 1)->entry, "fkda_portable_backward_walk_k64");
  CHECK_TEXT(launch_of(3, 2)->entry, "fkda_portable_backward_reduce_k64");
  CHECK_INT(backward_params(launch_of(3, 2)).rows, 0);
  a.cu_seqlens.shape[0] = 1;
  a.initial_state.shape[0] = a.d_final_state.shape[0] = a.d_initial_state.shape[0] = 0;
  CHECK_OK(fkda_backward(&a));
  CHECK_INT(fake.launches, 4);
  CHECK_TEXT(fake.launch.entry, "fkda_portable_backward_reduce_k64");
}

/* What the copy engine cannot reach or the kernels do not read goes to portable, and the plan says why. */
SCENARIO(sm90_backward_refusals) {
  be_hopper(0);
  for (int i = 0; i < 6; ++i) {
    static const char *const names[] = {"q", "k", "v", "g", "d_out", "d_v"};
    fkda_backward_args a = backward(2, 4, 4, 64, 64);
    fkda_tensor *const tensors[] = {&a.q, &a.k, &a.v, &a.g, &a.d_out, &a.d_v}, *const t =
                                                                                   tensors[i];
    char reason[200], message[300];
    t->data = (void *)((uintptr_t)(1 + i) << 42);
    t->stride[2] += 8; /* 16 bytes */
    t->stride[1] = 4 * t->stride[2];
    CHECK_TEXT(backend_of(&a), "sm90");
    t->stride[1] += 4;
    CHECK_TEXT(backend_of(&a), "portable");
    snprintf(reason, sizeof reason,
             "%s: stride of T is %d bytes, expected a multiple of 16, less than 2^40", names[i],
             4 * 72 * 2 + 8);
    check_not(&a, "sm90", reason);
    give_workspace(&a);
    const int before = fake.launches;
    CHECK_OK(fkda_backward(&a));
    CHECK_INT(fake.launches, before + 4);
    CHECK_TEXT(launch_of(4, 0)->entry, "fkda_portable_backward_factors_k64");
    CHECK(backward_params(launch_of(4, 0)).redo == NULL);
    a.backend = "sm90";
    snprintf(message, sizeof message, "backend: \"sm90\" cannot run this call: %s", reason);
    CHECK_FAILS(fkda_backward(&a), FKDA_ERROR_UNSUPPORTED, message);
    CHECK_INT(fake.launches, before + 4);

    t->stride[1] -= 4;
    t->data = (char *)t->data + 8;
    snprintf(message, sizeof message,
             "backend: \"sm90\" cannot run this call: %s: data %p, expected a multiple of 16",
             names[i], t->data);
    CHECK_FAILS(fkda_query(&a), FKDA_ERROR_UNSUPPORTED, message);
  }
  fkda_backward_args a = backward(2, 4, 4, 64, 64);
  a.g.dtype = FKDA_F32;
  check_not(&a, "sm90", "g: float32, expected bfloat16");
  a = backward(2, 4, 4, 64, 64);
  a.d_out.dtype = FKDA_F32;
  check_not(&a, "sm90", "d_out: float32, expected bfloat16");
  a.d_out = (fkda_tensor){0};
  check_not(&a, "sm90", "d_out: absent, expected bfloat16");
  a = backward(2, 4, 4, 64, 64);
  a.d_v.dtype = FKDA_F32;
  check_not(&a, "sm90", "d_v: float32, expected bfloat16");
  a.d_v = (fkda_tensor){0};
  CHECK_TEXT(backend_of(&a), "sm90");
  a = backward(INT64_C(1) << 25, 2, 2, 64, 64);
  check_not(&a, "sm90", "T = 3355443200, expected at most 2147483583");

  /* a question without gradients is about all of them, on whichever row a call will run */
  a = backward(1, 66, 66, 128, 128);
  a.d_out = a.d_q = a.d_k = a.d_v = a.d_g = a.d_beta = a.d_A_log = a.d_dt_bias = a.d_initial_state =
      (fkda_tensor){0};
  fkda_plan_info info = {.struct_size = sizeof info};
  CHECK_OK(fkda_plan(&a, &info));
  CHECK_TEXT(info.backend, "sm90");
  CHECK_INT(info.tasks, 132);
}

SCENARIO(sm90_backward_forced) {
  be_hopper(0);
  fkda_backward_args a = backward(1, 2, 2, 64, 64);
  check_not(&a, "portable", "sm90 comes first");
  a.backend = "portable";
  check_not(&a, "sm90", "backend asks for portable");
  give_workspace(&a);
  CHECK_OK(fkda_backward(&a));
  CHECK_INT(fake.launches, 4);
  CHECK_TEXT(launch_of(4, 0)->entry, "fkda_portable_backward_factors_k64");
  CHECK(backward_params(launch_of(4, 0)).redo == NULL);
  CHECK_INT(fake.functions, BACKWARD_KERNELS);
  a.backend = "sm90"; /* which has flags behind portable's workspace */
  CHECK_INT(fkda_backward(&a), FKDA_ERROR_WORKSPACE);
  CHECK_INT(fake.launches, 4);
  give_workspace(&a);
  CHECK_OK(fkda_backward(&a));
  CHECK_INT(fake.launches, 9);
  CHECK_TEXT(launch_of(5, 0)->entry, "fkda_sm90_backward_walk_k64_v64");
  CHECK_INT(fake.functions, BACKWARD_KERNELS + SM90_BACKWARD_KERNELS);
  a.backend = NULL;
  setenv("FLASHKDA_BACKEND", "portable", 1);
  CHECK_TEXT(backend_of(&a), "portable");
  setenv("FLASHKDA_BACKEND", "sm90", 1);
  CHECK_TEXT(backend_of(&a), "sm90");
}

/* A capture is refused before the kernels are there, and taken after a warm-up, with so many launches and nothing loaded. */
static void check_capture(const fkda_backward_args *a, int launches) {
  const int before = fake.launches;
  stream_of[0].capture = 1;
  CHECK_FAILS(fkda_backward(a), FKDA_ERROR_DEVICE, CAPTURE_MESSAGE);
  CHECK_INT(fake.launches, before);
  stream_of[0].capture = 0;
  CHECK_OK(fkda_warmup(FKDA_DEVICE_CUDA, 0));
  stream_of[0].capture = 1;
  const int asked = fake.loads + fake.functions;
  CHECK_OK(fkda_backward(a));
  CHECK_INT(fake.launches, before + launches);
  CHECK_INT(fake.loads + fake.functions, asked);
}

/* Nothing is launched in a capture before both rows' kernels are there, nor without all the maps. */
SCENARIO(sm90_backward_capture_and_failure) {
  be_hopper(0);
  fkda_backward_args a = backward(1, 2, 4, 64, 64);
  a.backend = "portable";
  give_workspace(&a);
  CHECK_OK(fkda_backward(&a)); /* loads portable's */
  CHECK_INT(fake.launches, 5);
  a.backend = NULL;
  give_workspace(&a);
  check_capture(&a, 6);
  fake.failing = "cuTensorMapEncodeTiled";
  fake.failure = 1;
  CHECK_FAILS(fkda_backward(&a), FKDA_ERROR_DEVICE,
              "cuTensorMapEncodeTiled: CUDA_ERROR_FAKE, error 1 (made up for a test)");
  CHECK_INT(fake.launches, 11);
  fake.failing = "cuLaunchKernelEx";
  fake.failure = 700;
  CHECK_FAILS(fkda_backward(&a), FKDA_ERROR_DEVICE,
              "fkda_sm90_backward_walk_k64_v64: CUDA_ERROR_FAKE, error 700 (made up for a test)");
  CHECK_INT(fake.launches, 11);
}

/* Nothing is launched in a capture before all is loaded, nor after a launch that has failed. */
SCENARIO(backward_capture_and_failure) {
  fkda_prefill_args prefilled = prefill(1, 2, 64, 64);
  CHECK_OK(fkda_prefill(&prefilled)); /* loads prefill's kernels, not these */
  fkda_backward_args a = backward(1, 2, 4, 64, 64);
  give_workspace(&a);
  check_capture(&a, 5);
  fake.failing = "cuLaunchKernelEx";
  fake.failure = 700;
  CHECK_FAILS(
      fkda_backward(&a), FKDA_ERROR_DEVICE,
      "fkda_portable_backward_factors_k64: CUDA_ERROR_FAKE, error 700 (made up for a test)");
  CHECK_INT(fake.launches, 6);
}

/* ---- loading ---- */

/* The names that the host asks for are the ones that are listed, and so compiled (entry_points). */
SCENARIO(warmup) {
  fake.device_count = 2;
  be_hopper(1);
  CHECK_OK(fkda_warmup(FKDA_DEVICE_CUDA, 1));
  CHECK_OK(fkda_warmup(FKDA_DEVICE_CUDA, 1));
  CHECK_INT(fake.loads, images(""));
  CHECK_INT(fake.functions, KERNELS);
  CHECK_INT(fake.function_loads, KERNELS);
  CHECK_INT(fake.launches, 0);
  FILE *list = fopen(FKDA_ENTRY_POINTS, "r");
  CHECK(list);
  char name[100];
  int listed = 0;
  while (fscanf(list, "%99s", name) == 1) {
    int found = 0;
    for (int i = 0; i < KERNELS; ++i) found += !strcmp(fake.entries[i], name);
    if (found != 1) fail_child(__LINE__, name);
    ++listed;
  }
  fclose(list);
  CHECK_INT(listed, KERNELS);
  int prefill_kernels = 0;
  for (int i = 0; i < KERNELS; ++i) {
    CHECK_INT(fake.entry_device[i], 1);
    int K, part;
    if (sscanf(fake.entries[i], "fkda_portable_prefill_k%d_v%d", &K, &part) == 2) {
      CHECK_INT(fake.entry_shared[i], FKDA_PORTABLE_PREFILL_SHARED(K, part));
      ++prefill_kernels;
    }
    if (strncmp(fake.entries[i], "fkda_sm90_", 10) == 0)
      CHECK_INT(fake.entry_shared[i], FKDA_SM90_PREFILL_SHARED);
    prefill_kernels += strncmp(fake.entries[i], "fkda_sm90_prefill_", 18) == 0;
  }
  CHECK_INT(prefill_kernels, COUNT(FKDA_PORTABLE_PREFILL_LIST(ONE)) + SM90_KERNELS);

  /* elsewhere sm_90a's code is not asked for */
  CHECK_OK(fkda_warmup(FKDA_DEVICE_CUDA, 0));
  CHECK_INT(fake.loads, images("") + images("portable/"));
  CHECK_INT(fake.functions, 2 * KERNELS - SM90_KERNELS - SM90_BACKWARD_KERNELS);
}

enum { THREADS = 8, CALLS = 50 };

static atomic_int thread_failures;
static pthread_barrier_t barrier;

typedef struct caller {
  int number;
  fkda_prefill_args args;
} caller;

static void *call_often(void *arg) {
  const int me = ((caller *)arg)->number;
  fkda_prefill_args a = ((caller *)arg)->args;
  pthread_barrier_wait(&barrier);
  for (int i = 0; i < CALLS; ++i) {
    a.device_id = (me + i) % 2;
    a.stream = &stream_of[a.device_id];
    if (fkda_prefill(&a) != FKDA_OK || fake_depth() != 0 || fake_capture_mode() != 0)
      atomic_fetch_add(&thread_failures, 1);
  }
  return NULL;
}

static void run_threads(void) {
  pthread_t threads[THREADS];
  caller callers[THREADS];
  for (int i = 0; i < THREADS; ++i) {
    callers[i] = (caller){i, prefill(1, 2, 128, 128)};
    CHECK_INT(pthread_create(&threads[i], NULL, call_often, &callers[i]), 0);
  }
  for (int i = 0; i < THREADS; ++i) CHECK_INT(pthread_join(threads[i], NULL), 0);
}

SCENARIO(many_threads) {
  fake.device_count = 2;
  pthread_barrier_init(&barrier, NULL, THREADS);
  run_threads();
  CHECK_INT(thread_failures, 0);
  CHECK_INT(fake.inits, 1);
  CHECK_INT(fake.retains, 2);
  CHECK_INT(fake.releases, 0);
  CHECK_INT(fake.loads, 2 * PORTABLE_IMAGES);
  CHECK_INT(fake.functions, 2 * PORTABLE_KERNELS);
  CHECK_INT(fake.unloads, 0);
  CHECK_INT(fake.launches, THREADS * CALLS);
}

/* A failure to load is told, leaves nothing behind and is not remembered. */
SCENARIO(failed_loading) {
  static const struct {
    const char *function;
    const char *message;
  } cases[] = {
      {"cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRetain"},
      {"cuCtxPushCurrent_v2", "cuCtxPushCurrent"},
      {"cuThreadExchangeStreamCaptureMode", "cuThreadExchangeStreamCaptureMode"},
      {"cuStreamIsCapturing", "cuStreamIsCapturing"},
      {"cuModuleLoadData", "portable/prefill"},
      {"cuModuleGetFunction", "fkda_portable_prefill_k64_v32"},
      {"cuFuncSetAttribute", "fkda_portable_prefill_k64_v32"},
      {"cuFuncLoad", "fkda_portable_prefill_k64_v32"},
  };
  fkda_prefill_args a = prefill(1, 2, 128, 128);
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
    char message[200];
    fake.failing = cases[i].function;
    fake.failure = 209;
    snprintf(message, sizeof message, "%s: CUDA_ERROR_FAKE, error 209 (made up for a test)",
             cases[i].message);
    CHECK_FAILS(fkda_prefill(&a), FKDA_ERROR_DEVICE, message);
    CHECK_INT(fake.loads, fake.unloads);
    CHECK_INT(fake.retains, fake.releases);
    CHECK_INT(fake_depth(), 0);
  }
  fake.failing = NULL;
  fake.loads = fake.unloads = 0;
  CHECK_OK(fkda_prefill(&a));
  CHECK_INT(fake.loads, PORTABLE_IMAGES);
  CHECK_INT(fake.unloads, 0);
  CHECK_INT(fake.retains, fake.releases + 1);
}

/* ---- contexts, capture, fork ---- */

SCENARIO(callers_context) {
  fake.device_count = 2;
  fkda_prefill_args a = prefill(1, 2, 128, 128);
  a.device_id = 1;
  a.stream = &stream_of[1];
  CHECK_OK(fkda_warmup(FKDA_DEVICE_CUDA, 0)); /* starts the driver */
  CHECK_INT(cuCtxPushCurrent_v2(fake_context(0)), 0);
  CHECK_OK(fkda_prefill(&a));
  CHECK_INT(fake.launch.device, 1);
  void *current;
  CHECK_INT(cuCtxGetCurrent(&current), 0);
  CHECK(current == fake_context(0));
  CHECK_INT(fake_depth(), 1);

  /* nothing to switch where the device is current already */
  CHECK_INT(cuCtxPushCurrent_v2(fake_context(1)), 0);
  const int pushes = fake.pushes;
  CHECK_OK(fkda_prefill(&a));
  CHECK_INT(fake.pushes, pushes);
  CHECK_INT(cuCtxPopCurrent_v2(&current), 0);
  CHECK_INT(cuCtxPopCurrent_v2(&current), 0);
}

SCENARIO(capture) {
  fkda_prefill_args a = prefill(1, 2, 128, 128);
  stream_of[0].capture = 1;
  CHECK_FAILS(fkda_prefill(&a), FKDA_ERROR_DEVICE, CAPTURE_MESSAGE);
  CHECK_INT(fake.loads, 0);
  CHECK_INT(fake.retains, fake.releases);
  stream_of[0].capture = 0;
  CHECK_OK(fkda_warmup(FKDA_DEVICE_CUDA, 0));
  stream_of[0].capture = 1;
  const int asked = fake.loads + fake.functions;
  CHECK_OK(fkda_prefill(&a));
  fkda_decode_args d = decode(1, 2, 64, 64, FKDA_STATE_KV);
  CHECK_OK(fkda_decode(&d));
  CHECK_INT(fake.launches, 2);
  CHECK_INT(fake.loads + fake.functions, asked);
}

/* Another stream captures in a mode that forbids even to ask about the legacy stream. */
SCENARIO(capture_beside_the_legacy_stream) {
  fkda_prefill_args a = prefill(1, 2, 128, 128);
  a.stream = NULL;
  fake.legacy_capture = 906;
  CHECK_FAILS(fkda_prefill(&a), FKDA_ERROR_DEVICE, CAPTURE_MESSAGE);
  CHECK_INT(fake.loads, 0);
}

#define FORK_MESSAGE                                                                               \
  "CUDA was started before this process was forked off; start it in the child only, or spawn"

static void call_in_fork(void) {
  fkda_prefill_args a = prefill(1, 2, 128, 128);
  const int launches = fake.launches, current_asked = fake.current_asked;
  CHECK_INT(fkda_prefill(&a), FKDA_ERROR_NO_DEVICE);
  CHECK_TEXT(fkda_last_error(),
             "device_type: CUDA, which cannot be used here: sm90, portable: " FORK_MESSAGE);
  CHECK_INT(fkda_query(&a), FKDA_ERROR_NO_DEVICE);
  CHECK_FAILS(fkda_warmup(FKDA_DEVICE_CUDA, 0), FKDA_ERROR_NO_DEVICE,
              "device_type: CUDA, which cannot be used here: " FORK_MESSAGE);
  CHECK_INT(fake.launches, launches);
  CHECK_INT(fake.current_asked, current_asked); /* the driver is left alone */
  CHECK_OK(fkda_warmup(FKDA_DEVICE_CPU, 0));
}

SCENARIO(forked) {
  fkda_prefill_args a = prefill(1, 2, 128, 128);
  CHECK_OK(fkda_prefill(&a));
  run_in_child(call_in_fork);
  CHECK_OK(fkda_prefill(&a));
}

int main(void) {
  const char *variables[] = {"FLASHKDA_BACKEND", "FLASHKDA_CPU_ISA", "FLASHKDA_LOG"};
  for (int i = 0; i < 3; ++i) unsetenv(variables[i]);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_old_driver),
      cmocka_unit_test(test_minor_version),
      cmocka_unit_test(test_no_devices),
      cmocka_unit_test(test_old_architecture),
      cmocka_unit_test(test_driver_in_a_fork),
      cmocka_unit_test(test_stub_driver),
      cmocka_unit_test(test_mismatched_driver),
      cmocka_unit_test(test_broken_driver),
      cmocka_unit_test(test_broken_device),
      cmocka_unit_test(test_device_numbers),
      cmocka_unit_test(test_unsupported_calls),
      cmocka_unit_test(test_prefill_launch),
      cmocka_unit_test(test_alignment),
      cmocka_unit_test(test_decode_launch),
      cmocka_unit_test(test_early_start),
      cmocka_unit_test(test_no_early_start_before_hopper),
      cmocka_unit_test(test_nothing_to_do),
      cmocka_unit_test(test_default_stream),
      cmocka_unit_test(test_stream_of_another_device),
      cmocka_unit_test(test_failed_launch),
      cmocka_unit_test(test_capabilities),
      cmocka_unit_test(test_mixed_devices),
      cmocka_unit_test(test_sm90_launch),
      cmocka_unit_test(test_sm90_pairs),
      cmocka_unit_test(test_sm90_equal_shares),
      cmocka_unit_test(test_sm90_by_lengths),
      cmocka_unit_test(test_sm90_strides),
      cmocka_unit_test(test_sm90_alignment),
      cmocka_unit_test(test_sm90_limits),
      cmocka_unit_test(test_sm90_forced),
      cmocka_unit_test(test_sm90_and_portable_refuse),
      cmocka_unit_test(test_sm90_no_tokens),
      cmocka_unit_test(test_sm90_failed_map),
      cmocka_unit_test(test_sm90_old_driver),
      cmocka_unit_test(test_backward_launches),
      cmocka_unit_test(test_gradients_of_several_tasks),
      cmocka_unit_test(test_backward_shared_memory),
      cmocka_unit_test(test_backward_subsets),
      cmocka_unit_test(test_backward_of_nothing),
      cmocka_unit_test(test_backward_alignment),
      cmocka_unit_test(test_backward_workspace),
      cmocka_unit_test(test_backward_checkpoints),
      cmocka_unit_test(test_sm90_backward_launches),
      cmocka_unit_test(test_sm90_backward_subsets),
      cmocka_unit_test(test_sm90_backward_of_nothing),
      cmocka_unit_test(test_sm90_backward_refusals),
      cmocka_unit_test(test_sm90_backward_forced),
      cmocka_unit_test(test_sm90_backward_capture_and_failure),
      cmocka_unit_test(test_backward_capture_and_failure),
      cmocka_unit_test(test_warmup),
      cmocka_unit_test(test_many_threads),
      cmocka_unit_test(test_failed_loading),
      cmocka_unit_test(test_callers_context),
      cmocka_unit_test(test_capture),
      cmocka_unit_test(test_capture_beside_the_legacy_stream),
      cmocka_unit_test(test_forked),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
