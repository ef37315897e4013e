/* flashkda make: a file of random inputs for `flashkda run`.
 *
 * SPDX-License-Identifier: MIT
 */
#include <getopt.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "safetensors.h"

static const char help[] =
    "Usage: flashkda make -o FILE.safetensors [OPTION...]\n\n"
    "Writes random inputs of a prefill: q, k, v, raw gates, beta logits, A_log, dt_bias, "
    "cu_seqlens.\n\n"
    "  --lens L,L,...        lengths of the sequences (1300,547,2048,963,271,3063)\n"
    "  --heads H             heads of q and k (8)\n"
    "  --value-heads HV      heads of v, a multiple of H (H)\n"
    "  --dim D               size of a head (128); --key-dim K and --value-dim V set one of them\n"
    "  --dtype TYPE          bfloat16, float16 or float32 (bfloat16)\n"
    "  --gate STRENGTH       weak, medium or strong (medium)\n"
    "  --initial-state       add initial states (float32)\n"
    "  --seed S              (1)";

typedef struct recipe {
  const char *path;
  int64_t *lens, N, H, HV, K, V, seed;
  int32_t dtype;
  fkda_dist dt_bias;
  const char *strength;
  bool initial;
} recipe;

enum { TENSORS = 9 };

#define MAX_TOKENS (INT64_C(1) << 31) /* keeps every size far from overflow */

static int write_file(const recipe *r) {
  int64_t T = 0;
  for (int64_t n = 0; n < r->N; n++) {
    T += r->lens[n];
    if (T > MAX_TOKENS) return fkda_cli_error("--lens: more than %" PRId64 " tokens", MAX_TOKENS);
  }
  const fkda_dist normal = {FKDA_DIST_NORMAL, 0, 1};
  const struct {
    const char *name;
    int32_t dtype, ndim;
    int64_t shape[4];
    fkda_dist dist;
  } rows[TENSORS] = {
      {"q", r->dtype, 4, {1, T, r->H, r->K}, normal},
      {"k", r->dtype, 4, {1, T, r->H, r->K}, normal},
      {"v", r->dtype, 4, {1, T, r->HV, r->V}, normal},
      {"g", r->dtype, 4, {1, T, r->HV, r->K}, normal},
      {"beta", r->dtype, 3, {1, T, r->HV, 0}, normal},
      {"A_log", FKDA_F32, 1, {r->HV, 0, 0, 0}, {FKDA_DIST_UNIFORM, -0.25, 0.25}},
      {"dt_bias", FKDA_F32, 2, {r->HV, r->K, 0, 0}, r->dt_bias},
      {"cu_seqlens", FKDA_I64, 1, {r->N + 1, 0, 0, 0}, normal},
      {"initial_state", FKDA_F32, 4, {r->N, r->HV, r->V, r->K}, normal},
  };
  fkda_st_entry entries[TENSORS];
  const size_t count = r->initial ? TENSORS : TENSORS - 1;
  int status = FKDA_EXIT_OK;
  memset(entries, 0, sizeof entries);
  for (size_t i = 0; i < count && status == FKDA_EXIT_OK; i++) {
    fkda_tensor *tensor = &entries[i].tensor;
    fkda_random random;
    fkda_cli_progress("making %s", rows[i].name);
    entries[i].name = rows[i].name;
    *tensor = fkda_tensor_contiguous(NULL, rows[i].dtype, rows[i].ndim, rows[i].shape);
    tensor->data = malloc(fkda_tensor_extent(tensor) + 1);
    if (!tensor->data) {
      status = fkda_cli_error("out of memory for %s", rows[i].name);
    } else if (rows[i].dtype == FKDA_I64) {
      int64_t *cu = tensor->data;
      cu[0] = 0;
      for (int64_t n = 0; n < r->N; n++) cu[n + 1] = cu[n] + r->lens[n];
    } else {
      fkda_random_seed(&random, (uint64_t)r->seed * TENSORS + i);
      fkda_random_fill(&random, tensor, rows[i].dist, -1, -1);
    }
  }
  char error[512], seed[32];
  snprintf(seed, sizeof seed, "%" PRId64, r->seed);
  const fkda_st_pair metadata[] = {
      {"op", "prefill"}, {"gate", "bounded"}, {"gate_strength", r->strength}, {"seed", seed}};
  fkda_cli_progress("%s", "");
  if (status == FKDA_EXIT_OK &&
      fkda_st_write(r->path, entries, count, metadata, 4, error, sizeof error)) {
    status = fkda_cli_error("%s", error);
  }
  for (size_t i = 0; i < count; i++) free(entries[i].tensor.data);
  if (status == FKDA_EXIT_OK) {
    printf("wrote    %s: %" PRId64 " sequences, %" PRId64 " tokens, H %" PRId64 ", HV %" PRId64
           ", K %" PRId64 ", V %" PRId64 ", %s, %s gates\n",
           r->path, r->N, T, r->H, r->HV, r->K, r->V, fkda_dtype_string(r->dtype), r->strength);
  }
  return status;
}

int fkda_cmd_make(int argc, char **argv) {
  static const struct option options[] = {{"lens", required_argument, NULL, 'l'},
                                          {"heads", required_argument, NULL, 'H'},
                                          {"value-heads", required_argument, NULL, 'W'},
                                          {"dim", required_argument, NULL, 'D'},
                                          {"key-dim", required_argument, NULL, 'K'},
                                          {"value-dim", required_argument, NULL, 'V'},
                                          {"dtype", required_argument, NULL, 'd'},
                                          {"gate", required_argument, NULL, 'g'},
                                          {"initial-state", no_argument, NULL, 'i'},
                                          {"seed", required_argument, NULL, 's'},
                                          {"output", required_argument, NULL, 'o'},
                                          {"help", no_argument, NULL, 'h'},
                                          {NULL, 0, NULL, 0}};
  recipe r = {.H = 8, .K = 128, .V = 128, .seed = 1, .dtype = FKDA_BF16, .strength = "medium"};
  const char *lens = "1300,547,2048,963,271,3063";
  int option;
  bool good = true;
  while (good && (option = getopt_long(argc, argv, "ho:", options, NULL)) != -1) {
    switch (option) {
      case 'h': return puts(help) < 0;
      case 'o': r.path = optarg; break;
      case 'l': lens = optarg; break;
      case 'H': good = fkda_cli_integer(optarg, 1, 4096, &r.H); break;
      case 'W': good = fkda_cli_integer(optarg, 1, 4096, &r.HV); break;
      case 'D':
        good = fkda_cli_integer(optarg, 1, 1024, &r.K);
        r.V = r.K;
        break;
      case 'K': good = fkda_cli_integer(optarg, 1, 1024, &r.K); break;
      case 'V': good = fkda_cli_integer(optarg, 1, 1024, &r.V); break;
      case 's': good = fkda_cli_integer(optarg, 0, INT64_MAX / TENSORS - 1, &r.seed); break;
      case 'd':
        good = (r.dtype = fkda_cli_dtype(optarg)) != FKDA_NONE && r.dtype != FKDA_F64;
        break;
      case 'g': r.strength = optarg; break;
      case 'i': r.initial = true; break;
      default: return fkda_cli_usage("make", "wrong usage");
    }
  }
  if (!good) return fkda_cli_usage("make", "bad value \"%s\"", optarg);
  if (optind < argc) return fkda_cli_usage("make", "unexpected argument \"%s\"", argv[optind]);
  if (!r.path) return fkda_cli_usage("make", "-o FILE is missing");
  if (!r.HV) r.HV = r.H;
  if (r.HV % r.H) return fkda_cli_usage("make", "--value-heads: expected a multiple of --heads");
  if (!fkda_gate_strength(r.strength, &r.dt_bias)) {
    return fkda_cli_usage("make", "--gate: \"%s\", expected weak, medium or strong", r.strength);
  }
  r.lens = fkda_cli_integers(lens, 0, MAX_TOKENS, &r.N);
  if (!r.lens)
    return fkda_cli_usage("make", "--lens: \"%s\", expected lengths separated by commas", lens);
  const int status = write_file(&r);
  free(r.lens);
  return status;
}
