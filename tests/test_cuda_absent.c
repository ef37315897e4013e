/* What the library says where there is no CUDA driver (case 25): its libcuda.so.1 cannot be loaded (the
 * test's environment sees to that), or the build has no CUDA kernels. Nothing may be written. */
#include "args.h"

#define MESSAGE "no NVIDIA driver: *libcuda.so.1*"

static const char *with(const char *text, char (*buffer)[256]) {
  if (!cuda_in_build())
    return "device_type: CUDA, expected CPU (this build has no kernels for CUDA)";
  snprintf(*buffer, sizeof *buffer, "%s" MESSAGE, text);
  return *buffer;
}

static fkda_status expected(void) {
  return cuda_in_build() ? FKDA_ERROR_NO_DEVICE : FKDA_ERROR_UNSUPPORTED;
}

static void test_calls(void **state) {
  (void)state;
  char buffer[256];
  const char *message =
      with("device_type: CUDA, which cannot be used here: sm90, portable: ", &buffer);
  for (int device = 0; device < 2; ++device) {
    fkda_prefill_args prefill = plain_prefill();
    prefill.device_type = FKDA_DEVICE_CUDA;
    prefill.device_id = device;
    expect_failure(&prefill, true, expected(), message, __FILE__, __LINE__);
    fkda_decode_args decode = plain_decode();
    decode.device_type = FKDA_DEVICE_CUDA;
    decode.device_id = device;
    expect_failure(&decode, true, expected(), message, __FILE__, __LINE__);
    fkda_summary_args summary = plain_summary();
    summary.device_type = FKDA_DEVICE_CUDA;
    summary.device_id = device;
    expect_failure(&summary, true, expected(), message, __FILE__, __LINE__);
  }
}

static void test_forced(void **state) {
  (void)state;
  if (!cuda_in_build()) return;
  fkda_prefill_args a = plain_prefill();
  a.device_type = FKDA_DEVICE_CUDA;
  a.backend = "portable";
  expect_failure(&a, true, FKDA_ERROR_NO_DEVICE,
                 "backend: \"portable\" cannot run this call: " MESSAGE, __FILE__, __LINE__);
  a.device_type = FKDA_DEVICE_CPU;
  expect_failure(&a, true, FKDA_ERROR_UNSUPPORTED,
                 "backend: \"portable\" cannot run this call: runs on CUDA; the tensors are on CPU",
                 __FILE__, __LINE__);
}

static void test_questions(void **state) {
  (void)state;
  char buffer[256];
  assert_status(fkda_warmup(FKDA_DEVICE_CUDA, 0), expected(), __FILE__, __LINE__);
  assert_message(with("device_type: CUDA, which cannot be used here: ", &buffer), __FILE__,
                 __LINE__);
  assert_status(fkda_backend_available("portable"),
                cuda_in_build() ? FKDA_ERROR_NO_DEVICE : FKDA_ERROR_INVALID_ARGUMENT, __FILE__,
                __LINE__);
  if (cuda_in_build()) assert_message("portable: " MESSAGE, __FILE__, __LINE__);
}

static void test_cpu_is_not_disturbed(void **state) {
  (void)state;
  fkda_prefill_args a = plain_prefill();
  expect_success(&a, __FILE__, __LINE__);
  assert_status(fkda_warmup(FKDA_DEVICE_CPU, 0), FKDA_OK, __FILE__, __LINE__);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_calls),
      cmocka_unit_test(test_forced),
      cmocka_unit_test(test_questions),
      cmocka_unit_test(test_cpu_is_not_disturbed),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
