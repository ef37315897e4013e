/* flashkda info
 *
 * SPDX-License-Identifier: MIT
 */
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"

static const char help[] =
    "Usage: flashkda info [--json]\n\n"
    "Prints the version, the processor, the backends of this build and whether this machine can "
    "run\n"
    "them, and what would run for two typical calls.";

static const char *const isa_flags[] = {
    "avx2",        "fma",         "f16c",     "avx512f", "avx512bw", "avx512dq", "avx512vl",
    "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd",   "asimdhp",  "bf16",     "sve"};
static const char *const variables[] = {"FLASHKDA_BACKEND", "FLASHKDA_CPU_ISA",
                                        "FLASHKDA_NUM_THREADS", "FLASHKDA_LOG"};
#define COUNT(array) (int)(sizeof array / sizeof array[0])

static fkda_tensor shaped(int32_t dtype, int32_t ndim, int64_t a, int64_t b, int64_t c, int64_t d) {
  const int64_t shape[4] = {a, b, c, d};
  return fkda_tensor_contiguous(NULL, dtype, ndim, shape);
}

/* A prefill of one sequence of 4096 tokens, or a decode step of 64: 32 heads of 128, bf16, fp32 states. */
static fkda_call typical_call(int32_t op) {
  const int64_t B = op == FKDA_OP_DECODE ? 64 : 1, T = op == FKDA_OP_DECODE ? 1 : 4096;
  fkda_call call;
  fkda_call_init(&call, op);
  static const fkda_field rows[] = {FKDA_FIELD_q, FKDA_FIELD_k, FKDA_FIELD_v, FKDA_FIELD_g,
                                    FKDA_FIELD_out};
  for (int i = 0; i < COUNT(rows); i++) {
    *fkda_call_tensor(&call, rows[i]) = shaped(FKDA_BF16, 4, B, T, 32, 128);
  }
  *fkda_call_tensor(&call, FKDA_FIELD_beta) = shaped(FKDA_BF16, 3, B, T, 32, 0);
  const fkda_field state = op == FKDA_OP_DECODE ? FKDA_FIELD_state : FKDA_FIELD_final_state;
  *fkda_call_tensor(&call, state) = shaped(FKDA_F32, 4, B, 32, 128, 128);
  return call;
}

/* The plan's text; static message on failure. */
static const char *describe(int32_t op, char *buffer, size_t capacity) {
  const fkda_call call = typical_call(op);
  return fkda_plan_describe(&call, buffer, capacity, NULL) == FKDA_OK ? buffer : fkda_last_error();
}

static void print_text(void) {
  char cpu[256], plan[4096];
  const char *name;
  printf("flashkda  %s\n", fkda_version_string());
  printf("processor %s, %ld CPUs\n", fkda_cli_cpu(cpu, sizeof cpu), sysconf(_SC_NPROCESSORS_ONLN));
  printf("features ");
  for (int i = 0; i < COUNT(isa_flags); i++) {
    if (fkda_cli_cpu_has(isa_flags[i])) printf(" %s", isa_flags[i]);
  }
  printf("\nthreads   %d\n", (int)fkda_num_threads());
  for (int i = 0; i < COUNT(variables); i++) {
    if (getenv(variables[i])) printf("%s=%s\n", variables[i], getenv(variables[i]));
  }
  printf("\nbackends, in order of preference\n");
  for (int32_t i = 0; (name = fkda_backend_name(i)) != NULL; i++) {
    const bool available = fkda_backend_available(name) == FKDA_OK;
    printf("  %-12s %s%s\n", name,
           available ? "available" : "not available: ", available ? "" : fkda_last_error());
  }
  printf("\nprefill of 4096 tokens, 32 heads of 128, bfloat16\n%s",
         describe(FKDA_OP_PREFILL, plan, sizeof plan));
  printf("\ndecode of 64 sequences, the same heads\n%s",
         describe(FKDA_OP_DECODE, plan, sizeof plan));
}

static void print_json(void) {
  char text[4096];
  const char *name;
  fkda_json j = {.stream = stdout};
  fkda_json_open(&j, NULL, '{');
  fkda_json_text(&j, "version", fkda_version_string());
  fkda_json_text(&j, "processor", fkda_cli_cpu(text, sizeof text));
  fkda_json_int(&j, "cpus", sysconf(_SC_NPROCESSORS_ONLN));
  fkda_json_open(&j, "features", '[');
  for (int i = 0; i < COUNT(isa_flags); i++) {
    if (fkda_cli_cpu_has(isa_flags[i])) fkda_json_text(&j, NULL, isa_flags[i]);
  }
  fkda_json_close(&j, ']');
  fkda_json_int(&j, "threads", fkda_num_threads());
  fkda_json_open(&j, "environment", '{');
  for (int i = 0; i < COUNT(variables); i++) {
    if (getenv(variables[i])) fkda_json_text(&j, variables[i], getenv(variables[i]));
  }
  fkda_json_close(&j, '}');
  fkda_json_open(&j, "backends", '[');
  for (int32_t i = 0; (name = fkda_backend_name(i)) != NULL; i++) {
    const bool available = fkda_backend_available(name) == FKDA_OK;
    fkda_json_open(&j, NULL, '{');
    fkda_json_text(&j, "name", name);
    fkda_json_bool(&j, "available", available);
    fkda_json_text(&j, "reason", available ? NULL : fkda_last_error());
    fkda_json_close(&j, '}');
  }
  fkda_json_close(&j, ']');
  fkda_json_text(&j, "plan_prefill", describe(FKDA_OP_PREFILL, text, sizeof text));
  fkda_json_text(&j, "plan_decode", describe(FKDA_OP_DECODE, text, sizeof text));
  fkda_json_close(&j, '}');
}

int fkda_cmd_info(int argc, char **argv) {
  static const struct option options[] = {
      {"json", no_argument, NULL, 'j'}, {"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
  bool json = false;
  int option;
  while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
    if (option == 'h') return puts(help) < 0;
    if (option != 'j') return fkda_cli_usage("info", "wrong usage");
    json = true;
  }
  if (optind < argc) return fkda_cli_usage("info", "unexpected argument \"%s\"", argv[optind]);
  if (json) {
    print_json();
  } else {
    print_text();
  }
  return FKDA_EXIT_OK;
}
