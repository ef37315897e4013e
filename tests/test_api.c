/* The entry points other than validation: texts, planning, environment, threads, start-up. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <unistd.h>

#include "args.h"

#define INVALID FKDA_ERROR_INVALID_ARGUMENT

#define ASSERT_FAILS(call, status, message)                                                        \
  do {                                                                                             \
    assert_status(call, status, __FILE__, __LINE__);                                               \
    assert_message(message, __FILE__, __LINE__);                                                   \
  } while (0)
#define ASSERT_OK(call) assert_status(call, FKDA_OK, __FILE__, __LINE__)

/* ---- texts ---- */

static void test_version(void **state) {
  (void)state;
  char text[32];
  snprintf(text, sizeof text, "%d.%d.%d", FKDA_VERSION_MAJOR, FKDA_VERSION_MINOR,
           FKDA_VERSION_PATCH);
  assert_string_equal(fkda_version_string(), text);
  assert_int_equal(fkda_version(),
                   FKDA_VERSION_MAJOR * 10000 + FKDA_VERSION_MINOR * 100 + FKDA_VERSION_PATCH);
}

/* The numbers are pinned: written out here, not taken from the header. */
static void test_status_strings(void **state) {
  (void)state;
  static const struct {
    int value;
    fkda_status name;
    const char *text;
  } pinned[] = {
      {0, FKDA_OK, "success"},
      {1, FKDA_ERROR_INVALID_ARGUMENT, "invalid argument"},
      {2, FKDA_ERROR_INVALID_DTYPE, "invalid dtype"},
      {3, FKDA_ERROR_UNSUPPORTED, "unsupported"},
      {4, FKDA_ERROR_WORKSPACE, "workspace too small"},
      {5, FKDA_ERROR_OUT_OF_MEMORY, "out of host memory"},
      {6, FKDA_ERROR_NO_DEVICE, "no usable device or driver"},
      {7, FKDA_ERROR_DEVICE, "device error"},
      {8, FKDA_ERROR_INTERNAL, "internal error"},
  };
  int count = 0;
#define COUNT(name, value, text) ++count;
  FKDA_STATUS_LIST(COUNT)
#undef COUNT
  assert_int_equal(count, sizeof pinned / sizeof pinned[0]);
  for (int i = 0; i < count; ++i) {
    assert_int_equal(pinned[i].value, pinned[i].name);
    assert_string_equal(fkda_status_string(pinned[i].name), pinned[i].text);
  }
  assert_string_equal(fkda_status_string((fkda_status)9), "unknown status");
  assert_string_equal(fkda_status_string((fkda_status)77), "unknown status");
}

static void test_dtypes(void **state) {
  (void)state;
  static const struct {
    int value;
    size_t size;
    const char *text;
  } pinned[] = {{-1, 0, "unknown"}, {0, 0, "none"},    {1, 4, "float32"}, {2, 2, "bfloat16"},
                {3, 2, "float16"},  {4, 8, "float64"}, {5, 4, "int32"},   {6, 8, "int64"},
                {7, 1, "bool"},     {8, 0, "unknown"}};
  for (size_t i = 0; i < sizeof pinned / sizeof pinned[0]; ++i) {
    assert_string_equal(fkda_dtype_string(pinned[i].value), pinned[i].text);
    assert_int_equal(fkda_dtype_size(pinned[i].value), pinned[i].size);
  }
}

static void test_tensor_contiguous(void **state) {
  (void)state;
  int x = 0;
  const fkda_tensor t = fkda_tensor_contiguous(&x, FKDA_I32, 3, (int64_t[]){2, 3, 4});
  assert_ptr_equal(t.data, &x);
  assert_int_equal(t.dtype, FKDA_I32);
  assert_int_equal(t.ndim, 3);
  assert_int_equal(t.shape[1], 3);
  assert_int_equal(t.stride[0], 12);
  assert_int_equal(t.stride[1], 4);
  assert_int_equal(t.stride[2], 1);
  assert_int_equal(t.shape[3], 0);
  /* an empty dimension leaves the others' strides as for one element */
  const fkda_tensor empty = fkda_tensor_contiguous(NULL, FKDA_F32, 3, (int64_t[]){2, 0, 4});
  assert_int_equal(empty.stride[0], 4);
  /* what cannot be described is left for the call to refuse, under the tensor's name */
  fkda_prefill_args a = plain_prefill();
  a.q = fkda_tensor_contiguous(a.q.data, FKDA_BF16, 6, (int64_t[]){1, 1, 1, 1, 1, 1});
  ASSERT_FAILS(fkda_query(&a), INVALID, "q: ndim 6, expected [B,T,H,K]");
  a.q = fkda_tensor_contiguous(a.q.data, FKDA_BF16, 4,
                               (int64_t[]){1 << 30, INT64_C(1) << 34, INT64_C(1) << 34, 16});
  assert_int_equal(fkda_query(&a), INVALID);
  assert_non_null(strstr(fkda_last_error(), "q: "));
}

/* ---- arguments of the functions themselves ---- */

static void test_null(void **state) {
  (void)state;
  static const char message[] = "args: NULL, expected an argument struct";
  size_t bytes = 7;
  fkda_plan_info info = {.struct_size = sizeof info};
  char text[4] = "abc";
  ASSERT_FAILS(fkda_prefill(NULL), INVALID, message);
  ASSERT_FAILS(fkda_decode(NULL), INVALID, message);
  ASSERT_FAILS(fkda_summary(NULL), INVALID, message);
  ASSERT_FAILS(fkda_backward(NULL), INVALID, message);
  ASSERT_FAILS(fkda_query(NULL), INVALID, message);
  ASSERT_FAILS(fkda_workspace_size(NULL, &bytes), INVALID, message);
  ASSERT_FAILS(fkda_plan(NULL, &info), INVALID, message);
  ASSERT_FAILS(fkda_plan_describe(NULL, text, sizeof text, &bytes), INVALID, message);
  assert_int_equal(bytes, 7);
  assert_string_equal(text, "abc");
  assert_null(info.backend);

  fkda_prefill_args a = plain_prefill();
  ASSERT_FAILS(fkda_workspace_size(&a, NULL), INVALID,
               "bytes: NULL, expected memory for the result");
  ASSERT_FAILS(fkda_plan(&a, NULL), INVALID, "info: NULL, expected an fkda_plan_info");
  ASSERT_FAILS(fkda_plan_describe(&a, NULL, 5, NULL), INVALID,
               "buffer: NULL with capacity 5, expected memory or capacity 0");
  ASSERT_FAILS(fkda_backend_available(NULL), INVALID, "name: NULL, expected the name of a backend");
}

static void test_op(void **state) {
  (void)state;
  fkda_decode_args d = plain_decode();
  ASSERT_FAILS(fkda_prefill((const fkda_prefill_args *)(const void *)&d), INVALID,
               "op: 2 (decode), expected 1 (prefill), which the function called is for");
  fkda_prefill_args a = plain_prefill();
  a.op = 9;
  ASSERT_FAILS(fkda_prefill(&a), INVALID, "op: 9, expected an fkda_op (set by the INIT macro)");
  a.op = FKDA_OP_BACKWARD;
  ASSERT_FAILS(fkda_prefill(&a), INVALID,
               "op: 4 (backward), expected 1 (prefill), which the function called is for");
  ASSERT_FAILS(fkda_summary((const fkda_summary_args *)(const void *)&d), INVALID,
               "op: 2 (decode), expected 3 (summary), which the function called is for");
  ASSERT_FAILS(fkda_prefill((const fkda_prefill_args *)(const void *)((const char *)&a + 1)),
               INVALID, "args: *, expected a multiple of 8");
}

/* ---- the detail message ---- */

static void *fail_elsewhere(void *arg) {
  (void)arg;
  const bool was_empty = fkda_last_error()[0] == 0;
  return was_empty && fkda_query(NULL) && fkda_last_error()[0] ? arg : NULL;
}

static void test_last_error(void **state) {
  (void)state;
  fkda_prefill_args a = plain_prefill();
  a.k.shape[3] = 1;
  assert_int_equal(fkda_prefill(&a), INVALID);
  static const char message[] = "k: shape [1,32,2,1], expected [1,32,2,16] to match q";
  assert_string_equal(fkda_last_error(), message);
  pthread_t thread;
  void *result = NULL;
  assert_int_equal(pthread_create(&thread, NULL, fail_elsewhere, &a), 0);
  assert_int_equal(pthread_join(thread, &result), 0);
  assert_ptr_equal(result, &a);
  assert_string_equal(fkda_last_error(), message);
  /* a call that succeeds leaves it alone */
  a = plain_prefill();
  ASSERT_OK(fkda_prefill(&a));
  assert_string_equal(fkda_last_error(), message);
  /* a name from the caller that is the message itself, and one that is too long */
  ASSERT_FAILS(
      fkda_backend_available(fkda_last_error()), INVALID,
      "name: \"k: shape [1,32,2,1], expected [1,32,2,16] to match q\", expected a name that "
      "fkda_backend_name() gives");
  char name[5000];
  memset(name, 'x', sizeof name);
  name[sizeof name - 1] = 0;
  assert_int_equal(fkda_backend_available(name), INVALID);
  assert_true(strlen(fkda_last_error()) < 200);
  a.backend = name;
  assert_int_equal(fkda_prefill(&a), INVALID);
}

/* ---- questions ---- */

/* Everything but pointers decides: the same answers with every pointer NULL. */
static void test_query_without_data(void **state) {
  (void)state;
  fkda_prefill_args a = ragged_prefill();
  size_t with = 0, without = 1;
  ASSERT_OK(fkda_workspace_size(&a, &with));
  fkda_tensor *tensors[] = {&a.q,
                            &a.k,
                            &a.v,
                            &a.g,
                            &a.beta,
                            &a.out,
                            &a.A_log,
                            &a.dt_bias,
                            &a.cu_seqlens,
                            &a.initial_state,
                            &a.final_state,
                            &a.initial_state_indices,
                            &a.final_state_indices,
                            &a.has_initial_state};
  for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; ++i) tensors[i]->data = NULL;
  ASSERT_OK(fkda_query(&a));
  ASSERT_OK(fkda_workspace_size(&a, &without));
  assert_int_equal(with, without);
  fkda_decode_args d = speculative_decode();
  d.q.data = d.state.data = d.initial_state_indices.data = d.num_accepted_tokens.data = NULL;
  d.k.data = (void *)1; /* never looked at */
  ASSERT_OK(fkda_query(&d));
  ASSERT_FAILS(fkda_decode(&d), INVALID, "q: data NULL, expected memory of 192 elements");
}

/* Larger arguments never need less. */
static void test_workspace_monotone(void **state) {
  (void)state;
  for (int32_t backend = 0; fkda_backend_name(backend); ++backend) {
    if (!usable_on_cpu(fkda_backend_name(backend))) continue;
    size_t previous[5] = {0};
    for (int64_t size = 1; size < 3000; size = size * 5 / 3 + 1) {
      for (int what = 0; what < 5; ++what) { /* B, T, H with HV, HV, N */
        const int64_t b = what == 0 ? size : 1, t = what == 1 ? size : 32;
        const int64_t h = what == 2 ? size : 1, hv = what == 3 ? size : h, n = what == 4 ? size : 1;
        fkda_prefill_args a = FKDA_PREFILL_ARGS_INIT;
        a.backend = fkda_backend_name(backend);
        a.q = a.k = fkda_tensor_contiguous(NULL, FKDA_BF16, 4, (int64_t[]){b, t, h, 64});
        a.v = a.out = a.g = fkda_tensor_contiguous(NULL, FKDA_BF16, 4, (int64_t[]){b, t, hv, 64});
        a.beta = fkda_tensor_contiguous(NULL, FKDA_BF16, 3, (int64_t[]){b, t, hv});
        if (what == 4) a.cu_seqlens = fkda_tensor_contiguous(NULL, FKDA_I32, 1, (int64_t[]){n + 1});
        size_t bytes = 0;
        ASSERT_OK(fkda_workspace_size(&a, &bytes));
        assert_true(bytes >= previous[what]);
        previous[what] = bytes;
      }
    }
  }
}

/* Heads are shared by threads where whole ones would leave some idle, and only there. */
static void test_plan_shares_heads(void **state) {
  (void)state;
  static const struct {
    int64_t T, H;
    bool shared;
  } cases[] = {{1024, 1, true},  {1024, 3, true},   {1024, 4, false}, {1024, 5, true},
               {1024, 8, false}, {1024, 40, false}, {16, 1, false}};
  ASSERT_OK(fkda_set_num_threads(4));
  for (int32_t backend = 0; fkda_backend_name(backend); ++backend) {
    const char *name = fkda_backend_name(backend);
    if (!usable_on_cpu(name) || strcmp(name, "reference") == 0) continue;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; ++i) {
      const int64_t t = cases[i].T, h = cases[i].H;
      fkda_prefill_args a = FKDA_PREFILL_ARGS_INIT;
      fkda_plan_info info = {.struct_size = sizeof info};
      a.backend = name;
      a.q = a.k = a.v = a.g = a.out =
          fkda_tensor_contiguous(NULL, FKDA_BF16, 4, (int64_t[]){1, t, h, 128});
      a.beta = fkda_tensor_contiguous(NULL, FKDA_BF16, 3, (int64_t[]){1, t, h});
      ASSERT_OK(fkda_plan(&a, &info));
      assert_int_equal(info.value_split > 1, cases[i].shared);
      assert_int_equal(info.tasks, h * info.value_split);
      assert_int_equal(info.threads, t == 16 ? 1 : 4);
    }
  }
  ASSERT_OK(fkda_set_num_threads(0));
}

static void test_plan_info(void **state) {
  (void)state;
  fkda_prefill_args a = plain_prefill();
  struct {
    fkda_plan_info info;
    char newer[16], behind[8];
  } x;
  memset(&x, 0x77, sizeof x);
  x.info.struct_size = sizeof x.info;
  ASSERT_OK(fkda_plan(&a, &x.info));
  assert_int_equal(x.info.struct_size, sizeof x.info);
  assert_true(x.info.chunk == 1 || x.info.chunk % 16 == 0);
  assert_true(x.info.threads >= 1 && x.info.value_split >= 1);
  assert_true(x.info.tasks >= 1);
  assert_true(usable_on_cpu(x.info.backend));
  assert_int_equal(x.newer[0], 0x77);
  size_t bytes = 0;
  ASSERT_OK(fkda_workspace_size(&a, &bytes));
  assert_int_equal(bytes, x.info.workspace_size);

  /* an older caller's struct ends earlier, a newer one's fields become 0 */
  const int32_t chunk = x.info.chunk;
  memset(&x, 0x77, sizeof x);
  x.info.struct_size = offsetof(fkda_plan_info, threads);
  ASSERT_OK(fkda_plan(&a, &x.info));
  assert_int_equal(x.info.chunk, chunk);
  assert_int_equal(x.info.threads, 0x77777777);
  x.info.struct_size = sizeof x.info + sizeof x.newer;
  ASSERT_OK(fkda_plan(&a, &x.info));
  for (size_t i = 0; i < sizeof x.newer; ++i) assert_int_equal(x.newer[i], 0);
  assert_int_equal(x.behind[0], 0x77);
  x.info.struct_size = 3;
  ASSERT_FAILS(fkda_plan(&a, &x.info), INVALID,
               "info: struct_size 3, expected sizeof(fkda_plan_info) = 40");
}

static void test_plan_describe(void **state) {
  (void)state;
  fkda_prefill_args a = ragged_prefill();
  a.backend = "reference";
  char text[2048];
  size_t length = 0;
  memset(text, 'x', sizeof text);
  ASSERT_OK(fkda_plan_describe(&a, text, sizeof text, &length));
  assert_int_equal(strlen(text), length);
  print_message("%s", text);
  static const char start[] =
      "prefill: B 1, T 32, N 3, H 2, HV 4, K 16, V 8, bfloat16, gate bounded\n"
      "backend: reference (backend asks for reference)\n"
      "plan: chunk 1, tasks 12, threads ";
  assert_memory_equal(text, start, sizeof start - 1);
  /* one line for each backend that was not taken */
  for (int32_t i = 0; fkda_backend_name(i); ++i) {
    char line[64];
    snprintf(line, sizeof line, "\nnot %s: ", fkda_backend_name(i));
    const bool there = strstr(text, line) != NULL;
    assert_int_equal(there, strcmp(fkda_backend_name(i), "reference") != 0);
  }
  assert_non_null(strstr(text, "\nnot cpu-scalar: backend asks for reference\n"));

  a.backend = NULL;
  fkda_plan_info info = {.struct_size = sizeof info};
  ASSERT_OK(fkda_plan(&a, &info));
  ASSERT_OK(fkda_plan_describe(&a, text, sizeof text, NULL));
  char line[128];
  snprintf(line, sizeof line, "backend: %s (first in order of preference that can run this)\n",
           info.backend);
  assert_non_null(strstr(text, line));
  snprintf(line, sizeof line, "not reference: %s comes first\n", info.backend);
  assert_non_null(strstr(text, line));

  /* cut short: the full length still comes back */
  char cut[16];
  memset(cut, 'x', sizeof cut);
  ASSERT_OK(fkda_plan_describe(&a, cut, 8, &length));
  assert_string_equal(cut, "prefill");
  assert_int_equal(cut[8], 'x');
  assert_int_equal(length, strlen(text));
  ASSERT_OK(fkda_plan_describe(&a, NULL, 0, &length));
  assert_int_equal(length, strlen(text));
}

/* ---- the choice of a backend ---- */

static const char *chosen(const void *args) {
  fkda_plan_info info = {.struct_size = sizeof info};
  return fkda_plan(args, &info) == FKDA_OK ? info.backend : NULL;
}

static void test_backends(void **state) {
  (void)state;
  int32_t count = 0;
  const char *best = NULL, *worst = NULL;
  while (fkda_backend_name(count)) {
    const char *name = fkda_backend_name(count++);
    if (usable_on_cpu(name)) {
      worst = name;
      if (!best && strncmp(name, "cpu-", 4) == 0) best = name;
    }
  }
  assert_true(count >= 2);
  assert_string_equal(fkda_backend_name(count - 1), "reference");
  assert_string_equal(worst, "reference");
  assert_null(fkda_backend_name(-1));
  assert_null(fkda_backend_name(INT32_MAX));
  ASSERT_FAILS(fkda_backend_available("cpu-z80"), INVALID,
               "name: \"cpu-z80\", expected a name that fkda_backend_name() gives");

  fkda_prefill_args a = plain_prefill();
  assert_string_equal(chosen(&a), best);
  a.backend = "cpu";
  assert_string_equal(chosen(&a), best);
  a.backend = "cpu-scalar";
  assert_string_equal(chosen(&a), "cpu-scalar");
  a.backend = "reference";
  assert_string_equal(chosen(&a), "reference");
  for (int32_t i = 0; i < count; ++i) { /* forced, then used or refused */
    a.backend = fkda_backend_name(i);
    if (chosen(&a)) {
      assert_string_equal(chosen(&a), a.backend);
    } else {
      assert_true(fkda_query(&a) == FKDA_ERROR_UNSUPPORTED ||
                  fkda_query(&a) == FKDA_ERROR_NO_DEVICE);
      assert_non_null(strstr(fkda_last_error(), a.backend));
      assert_non_null(strstr(fkda_last_error(), "cannot run this call: "));
    }
  }
  a.backend = "gpu";
  assert_int_equal(fkda_query(&a), INVALID);
  char names[256] = "backend: \"gpu\", expected \"cpu\"";
  for (int32_t i = 0; i < count; ++i) {
    strcat(names, ", \"");
    strcat(names, fkda_backend_name(i));
    strcat(names, "\"");
  }
  assert_string_equal(fkda_last_error(), names);
  a.backend = "";
  assert_int_equal(fkda_query(&a), INVALID);

  a.backend = "cpu-scalar";
  a.device_type = FKDA_DEVICE_CUDA;
  ASSERT_FAILS(
      fkda_query(&a), FKDA_ERROR_UNSUPPORTED,
      "backend: \"cpu-scalar\" cannot run this call: runs on the CPU; the tensors are on CUDA");
}

static void test_environment(void **state) {
  (void)state;
  fkda_prefill_args a = plain_prefill();
  const char *best = chosen(&a);
  setenv("FLASHKDA_BACKEND", "reference", 1);
  assert_string_equal(chosen(&a), "reference");
  char text[2048];
  ASSERT_OK(fkda_plan_describe(&a, text, sizeof text, NULL));
  assert_non_null(strstr(text, "backend: reference (FLASHKDA_BACKEND asks for reference)\n"));
  a.backend = "cpu-scalar"; /* the field comes first */
  assert_string_equal(chosen(&a), "cpu-scalar");
  a.backend = NULL;
  /* the environment does not open float64 */
  a.out.dtype = FKDA_F64;
  assert_int_equal(fkda_query(&a), FKDA_ERROR_INVALID_DTYPE);
  a.out.dtype = FKDA_BF16;
  setenv("FLASHKDA_BACKEND", "abacus", 1);
  assert_int_equal(fkda_query(&a), INVALID);
  assert_non_null(strstr(fkda_last_error(), "FLASHKDA_BACKEND: \"abacus\", expected \"cpu\""));
  setenv("FLASHKDA_BACKEND", "", 1);
  assert_string_equal(chosen(&a), best);
  unsetenv("FLASHKDA_BACKEND");

  setenv("FLASHKDA_CPU_ISA", "scalar", 1);
  assert_string_equal(chosen(&a), "cpu-scalar");
  a.backend = "cpu";
  assert_string_equal(chosen(&a), "cpu-scalar");
  ASSERT_OK(fkda_plan_describe(&a, text, sizeof text, NULL));
  assert_non_null(
      strstr(text, "backend: cpu-scalar (backend asks for cpu, FLASHKDA_CPU_ISA for scalar)"));
  a.backend = "reference";
  assert_string_equal(chosen(&a), "reference");
  a.backend = NULL;
  setenv("FLASHKDA_CPU_ISA", "mmx", 1);
  ASSERT_FAILS(fkda_query(&a), INVALID,
               "FLASHKDA_CPU_ISA: \"mmx\", expected scalar, avx2, avx512 or neon");
#if defined(__x86_64__)
  setenv("FLASHKDA_CPU_ISA", "neon", 1);
  ASSERT_FAILS(fkda_query(&a), FKDA_ERROR_UNSUPPORTED,
               "FLASHKDA_CPU_ISA: \"neon\" is not in this build");
#endif
  unsetenv("FLASHKDA_CPU_ISA");
  assert_string_equal(chosen(&a), best);
}

static void test_log(void **state) {
  (void)state;
  fkda_prefill_args a = plain_prefill();
  FILE *file = tmpfile();
  assert_non_null(file);
  fflush(stderr);
  const int saved = dup(STDERR_FILENO);
  dup2(fileno(file), STDERR_FILENO);
  const fkda_status silent = fkda_prefill(&a);
  setenv("FLASHKDA_LOG", "plan", 1);
  a.backend = "reference";
  const fkda_status logged = fkda_prefill(&a);
  unsetenv("FLASHKDA_LOG");
  fflush(stderr);
  dup2(saved, STDERR_FILENO);
  close(saved);
  ASSERT_OK(silent);
  ASSERT_OK(logged);
  char text[1024] = "";
  rewind(file);
  const size_t length = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[length] = 0;
  static const char start[] =
      "flashkda: prefill: B 1, T 32, N 1, H 2, HV 4, K 16, V 8, bfloat16, gate bounded -> "
      "reference: "
      "chunk 1, tasks 4, threads ";
  assert_memory_equal(text, start, sizeof start - 1);
  assert_ptr_equal(strchr(text, '\n'), text + length - 1);
}

/* ---- threads ---- */

typedef struct hook_calls {
  int32_t calls, tasks;
} hook_calls;

static void serial_for(void *context, int32_t count, fkda_task_fn task, void *arg) {
  hook_calls *seen = context;
  ++seen->calls;
  seen->tasks += count;
  for (int32_t i = 0; i < count; ++i) task(arg, i);
}

static void test_threads(void **state) {
  (void)state;
  ASSERT_FAILS(fkda_set_num_threads(-1), INVALID, "num_threads: -1, expected 0 to 1024");
  ASSERT_FAILS(fkda_set_num_threads(1025), INVALID, "num_threads: 1025, expected 0 to 1024");
  ASSERT_OK(fkda_set_num_threads(3));
  assert_int_equal(fkda_num_threads(), 3);
  fkda_prefill_args a = plain_prefill();
  ASSERT_OK(fkda_prefill(&a));

  hook_calls seen = {0, 0};
  ASSERT_FAILS(fkda_set_parallel_for(serial_for, &seen, 0), INVALID,
               "num_threads: 0, expected at least 1");
  ASSERT_OK(fkda_set_parallel_for(serial_for, &seen, 2));
  assert_int_equal(fkda_num_threads(), 2);
  ASSERT_OK(fkda_prefill(&a));
  assert_true(seen.calls >= 1 && seen.tasks >= 1);
  ASSERT_OK(fkda_set_parallel_for(NULL, NULL, 0));
  const int32_t calls = seen.calls;
  ASSERT_OK(fkda_prefill(&a));
  assert_int_equal(seen.calls, calls);
  ASSERT_OK(fkda_set_num_threads(0));
  assert_true(fkda_num_threads() >= 1);
}

static void test_warmup(void **state) {
  (void)state;
  ASSERT_OK(fkda_warmup(FKDA_DEVICE_CPU, 0));
  ASSERT_FAILS(fkda_warmup(FKDA_DEVICE_CPU, 1), INVALID, "device_id: 1, expected 0 on the CPU");
  ASSERT_FAILS(fkda_warmup(FKDA_DEVICE_CUDA, -1), INVALID, "device_id: -1, expected at least 0");
  ASSERT_FAILS(fkda_warmup(0, 0), INVALID, "device_type: 0, expected 1 (CPU) or 2 (CUDA)");
  if (!cuda_in_build())
    ASSERT_FAILS(fkda_warmup(FKDA_DEVICE_CUDA, 0), FKDA_ERROR_UNSUPPORTED,
                 "device_type: CUDA, expected CPU (this build has no kernels for CUDA)");
}

int main(void) {
  const char *variables[] = {"FLASHKDA_BACKEND", "FLASHKDA_CPU_ISA", "FLASHKDA_LOG"};
  for (int i = 0; i < 3; ++i) unsetenv(variables[i]);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_version),
      cmocka_unit_test(test_status_strings),
      cmocka_unit_test(test_dtypes),
      cmocka_unit_test(test_tensor_contiguous),
      cmocka_unit_test(test_null),
      cmocka_unit_test(test_op),
      cmocka_unit_test(test_last_error),
      cmocka_unit_test(test_query_without_data),
      cmocka_unit_test(test_workspace_monotone),
      cmocka_unit_test(test_plan_shares_heads),
      cmocka_unit_test(test_plan_info),
      cmocka_unit_test(test_plan_describe),
      cmocka_unit_test(test_backends),
      cmocka_unit_test(test_environment),
      cmocka_unit_test(test_log),
      cmocka_unit_test(test_threads),
      cmocka_unit_test(test_warmup),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
