/* flashkda check: the case table on this machine's backends.
 *
 * SPDX-License-Identifier: MIT
 */
#include <fnmatch.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "safetensors.h"

static const char help[] =
    "Usage: flashkda check [OPTION...]\n\n"
    "Runs the case table on each backend that this machine can run and compares with the token\n"
    "recurrence in double precision. Exit status 1 if a case fails. Cases that the contract lets "
    "a\n"
    "backend refuse are skipped.\n\n"
    "  --backend NAME,...   only these backends (all)\n"
    "  --case PATTERN       only cases whose name matches, for example \"gate/*\" or \"*_bf16\";\n"
    "                       several times: those that match one of them\n"
    "  --no-guards          GPU buffers of exactly their size, without guard zones: for memory\n"
    "                       checkers\n"
    "  --threads N          CPU threads\n"
    "  --list               print the cases and do not run them\n"
    "  --json               print one JSON object\n"
    "  --save FILE          write inputs, options and gold outputs of the one matching case, do "
    "not run;\n"
    "                       \"flashkda run\" reads the file, tensors gold.* aside\n"
    "  --save-dir DIR       the same for every matching case, DIR/GROUP.NAME.safetensors";

enum { MAX_BACKENDS = 16, MAX_RANGES = 128, MAX_PATTERNS = 64 };

/* Sums over the cases of one backend. */
typedef struct tally {
  int passed, failed, skipped;
} tally;

typedef struct range_error {
  const char *range;
  double out[2], state[2]; /* largest; [0] fp32 io, [1] 16-bit io; negative: none */
} range_error;

typedef struct job {
  const char *backend, *save, *save_dir;
  const char *patterns[MAX_PATTERNS];
  int pattern_count;
  bool list, json, no_guards;
  const char *backends[MAX_BACKENDS];
  const fkda_memory *memories[MAX_BACKENDS];
  fkda_memory device; /* the GPU's, if a backend wants it */
  int backend_count;
  tally groups[MAX_BACKENDS][FKDA_GROUPS];
  double worst[MAX_BACKENDS][FKDA_GROUPS][2]; /* largest of all errors; [0] where all is fp32 */
  range_error ranges[MAX_BACKENDS][MAX_RANGES];
  int range_count;
  fkda_json out;
} job;

/* ---- describing cases --------------------------------------------------------------------------- */

static void describe(fkda_json *j, const fkda_case *c) {
  int64_t numbers[FKDA_CASE_NUMBERS];
  int64_t count = 0;
  char error[160], value[64];
  for (int i = 0; i < FKDA_CASE_NUMBERS; i++) {
    if (c->numbers[i]) numbers[count++] = c->numbers[i];
  }
  fkda_json_text(j, "name", c->name);
  fkda_json_text(j, "group", fkda_group_name(c->group));
  fkda_json_ints(j, "numbers", numbers, count);
  fkda_json_text(j, "range", c->range);
  fkda_json_text(j, "op", fkda_op_name(c->op));
  fkda_json_int(j, "B", c->B);
  if (c->lens) {
    fkda_json_ints(j, "lens", c->lens, c->lens_count);
  } else {
    fkda_json_int(j, "T", c->T);
  }
  fkda_json_int(j, "H", c->H);
  fkda_json_int(j, "HV", c->HV);
  fkda_json_int(j, "K", c->K);
  fkda_json_int(j, "V", c->V);
  fkda_fixture *f = c->T * c->H * c->K > 1 << 21
                        ? NULL
                        : fkda_fixture_new(c, fkda_memory_host(), error, sizeof error);
  fkda_call small; /* of a large case only the options are of interest; they need no data */
  if (!f) {
    fkda_case tiny = *c;
    tiny.T = 32;
    f = fkda_fixture_new(&tiny, fkda_memory_host(), error, sizeof error);
  }
  if (!f) return;
  small = *fkda_fixture_call(f);
  fkda_json_open(j, "dtypes", '{');
  for (int i = 0; i < FKDA_FIELDS; i++) {
    if (!fkda_call_has(&small, (fkda_field)i)) continue;
    fkda_json_text(j, fkda_field_name((fkda_field)i),
                   fkda_dtype_string(fkda_call_tensor_const(&small, (fkda_field)i)->dtype));
  }
  fkda_json_close(j, '}');
  fkda_json_open(j, "options", '{');
  const char *name;
  for (int i = 0; (name = fkda_call_option(&small, i, value, sizeof value)) != NULL; i++) {
    if (*value) fkda_json_text(j, name, value);
  }
  fkda_json_close(j, '}');
  fkda_fixture_free(f);
}

/* Every case that matches, in the table's order; NULL past the last. */
static const fkda_case *next_case(const job *j, int *index) {
  const fkda_case *c;
  while ((c = fkda_case_at((*index)++)) != NULL) {
    bool wanted = !j->pattern_count;
    for (int i = 0; i < j->pattern_count && !wanted; i++)
      wanted = fnmatch(j->patterns[i], c->name, 0) == 0;
    if (wanted) return c;
  }
  return NULL;
}

static int list_cases(job *j) {
  const fkda_case *c;
  int index = 0;
  if (j->json) fkda_json_open(&j->out, NULL, '[');
  while ((c = next_case(j, &index)) != NULL) {
    if (j->json) {
      fkda_json_open(&j->out, NULL, '{');
      describe(&j->out, c);
      fkda_json_close(&j->out, '}');
    } else {
      puts(c->name);
    }
  }
  if (j->json) fkda_json_close(&j->out, ']');
  return FKDA_EXIT_OK;
}

/* ---- saving ------------------------------------------------------------------------------------- */

/* Is the output's memory part of what the call is given: a pool, or a tensor written in place? */
static bool output_is_input(const fkda_case *c, const fkda_call *call, fkda_field field,
                            bool in_place) {
  if (field == FKDA_FIELD_state || field == FKDA_FIELD_checkpoint_state) return true;
  (void)c;
  return field == FKDA_FIELD_final_state && !in_place && call->prefill.final_state_indices.dtype;
}

static int save_case(const fkda_case *c, const char *path) {
  enum { CAPACITY = 2 * FKDA_FIELDS, PAIRS = 32 };
  fkda_st_entry entries[CAPACITY];
  fkda_st_pair pairs[PAIRS];
  char names[FKDA_FIELDS][32], values[PAIRS][64], error[512];
  size_t count = 0, pair_count = 0;
  fkda_fixture *f = fkda_fixture_new(c, fkda_memory_host(), error, sizeof error);
  if (!f) return fkda_cli_error("%s: %s", c->name, error);
  fkda_call call = *fkda_fixture_call(f);
  const bool prefill = c->op == FKDA_OP_PREFILL;
  const bool in_place = prefill && call.prefill.final_state.dtype &&
                        call.prefill.initial_state.dtype &&
                        call.prefill.final_state.data == call.prefill.initial_state.data;
  int status = FKDA_EXIT_OK;
  for (int i = 0; i < FKDA_FIELDS && status == FKDA_EXIT_OK; i++) {
    const fkda_field field = (fkda_field)i;
    if (!fkda_call_has(&call, field)) continue;
    const fkda_tensor *tensor = fkda_call_tensor(&call, field);
    if (field < FKDA_FIRST_OUTPUT || output_is_input(c, &call, field, in_place)) {
      entries[count++] = (fkda_st_entry){fkda_field_name(field), *tensor};
    }
    if (field < FKDA_FIRST_OUTPUT) continue;
    const double *gold = fkda_fixture_gold(f, field, error, sizeof error);
    if (!gold) {
      status = fkda_cli_error("%s: %s", c->name, error);
      break;
    }
    snprintf(names[i], sizeof names[i], "gold.%s", fkda_field_name(field));
    entries[count++] = (fkda_st_entry){
        names[i],
        fkda_tensor_contiguous((void *)(uintptr_t)gold, FKDA_F64, tensor->ndim, tensor->shape)};
  }
  pairs[pair_count++] = (fkda_st_pair){"case", c->name};
  pairs[pair_count++] = (fkda_st_pair){"op", fkda_op_name(c->op)};
  const char *name;
  for (int i = 0; (name = fkda_call_option(&call, i, values[pair_count], sizeof values[0])) != NULL;
       i++) {
    if (!*values[pair_count]) continue;
    pairs[pair_count] = (fkda_st_pair){name, values[pair_count]};
    pair_count++;
  }
  if (prefill) {
    pairs[pair_count++] =
        (fkda_st_pair){"final_state_dtype", call.prefill.final_state.dtype
                                                ? fkda_dtype_string(call.prefill.final_state.dtype)
                                                : "none"};
    pairs[pair_count++] = (fkda_st_pair){"in_place", in_place ? "1" : "0"};
  }
  const double limit = fkda_fixture_state_limit(f);
  if (limit > 0) {
    snprintf(values[pair_count], sizeof values[0], "%.3e", limit);
    pairs[pair_count] = (fkda_st_pair){"state_limit", values[pair_count]};
    pair_count++;
  }
  if (status == FKDA_EXIT_OK &&
      fkda_st_write(path, entries, count, pairs, pair_count, error, sizeof error)) {
    status = fkda_cli_error("%s", error);
  }
  fkda_fixture_free(f);
  return status;
}

static int save_cases(job *j) {
  const fkda_case *c;
  int index = 0, saved = 0;
  char path[4096];
  while ((c = next_case(j, &index)) != NULL) {
    if (j->save && saved) return fkda_cli_usage("check", "--save: more than one case matches");
    if (j->save) {
      /* look ahead: nothing is written if the pattern is not unique */
      int ahead = index;
      if (next_case(j, &ahead))
        return fkda_cli_usage("check", "--save: more than one case matches");
      snprintf(path, sizeof path, "%s", j->save);
    } else {
      const int n = snprintf(path, sizeof path, "%s/", j->save_dir);
      if (n < 0 || (size_t)n + sizeof c->name + 16 > sizeof path)
        return fkda_cli_error("--save-dir: path too long");
      snprintf(path + n, sizeof path - (size_t)n, "%s.safetensors", c->name);
      for (char *p = path + n; *p; p++) *p = *p == '/' ? '.' : *p;
    }
    fkda_cli_progress("saving %s", c->name);
    const int status = save_case(c, path);
    if (status) return status;
    saved++;
  }
  fkda_cli_progress("%s", "");
  printf("%d saved\n", saved);
  return FKDA_EXIT_OK;
}

/* ---- running ------------------------------------------------------------------------------------ */

static void enlarge(double *most, double value) {
  if (value > *most) *most = value;
}

static void count_result(job *j, int b, const fkda_case *c, const fkda_result *r) {
  tally *t = &j->groups[b][c->group];
  const int wide = c->io != FKDA_F32;
  t->passed += r->verdict == FKDA_PASS;
  t->failed += r->verdict == FKDA_FAIL;
  t->skipped += r->verdict == FKDA_SKIP;
  const int32_t states[2] = {c->op == FKDA_OP_DECODE ? c->initial_dtype : c->final_dtype,
                             c->checkpoint_dtype};
  double *worst = j->worst[b][c->group];
  enlarge(&worst[wide], r->error_out);
  enlarge(&worst[wide || states[0] == FKDA_BF16], r->error_state);
  enlarge(&worst[wide || states[1] != FKDA_F32], r->error_checkpoint);
  if (!c->range) return;
  int i = 0;
  while (i < j->range_count && strcmp(j->ranges[b][i].range, c->range) != 0) i++;
  if (i == MAX_RANGES) return;
  if (i == j->range_count) {
    for (int k = 0; k < j->backend_count; k++) {
      j->ranges[k][i] = (range_error){c->range, {-1, -1}, {-1, -1}};
    }
    j->range_count++;
  }
  enlarge(&j->ranges[b][i].out[wide], r->error_out);
  enlarge(&j->ranges[b][i].state[wide], r->error_state);
}

static void report_json(fkda_json *out, const char *backend, const fkda_result *r) {
  static const char *const verdicts[] = {"pass", "fail", "skip"};
  fkda_json_open(out, NULL, '{');
  fkda_json_text(out, "backend", backend);
  fkda_json_text(out, "verdict", verdicts[r->verdict]);
  if (r->error_out >= 0) fkda_json_real(out, "error_out", r->error_out);
  if (r->error_state >= 0) fkda_json_real(out, "error_state", r->error_state);
  if (r->error_checkpoint >= 0) fkda_json_real(out, "error_checkpoint", r->error_checkpoint);
  if (r->verdict == FKDA_PASS) fkda_json_real(out, "ms", 1e3 * r->seconds);
  if (*r->message) fkda_json_text(out, "message", r->message);
  fkda_json_close(out, '}');
}

static void run_case(job *j, const fkda_case *c) {
  char error[256] = "";
  fkda_fixture *f = NULL;
  if (j->json) {
    fkda_json_open(&j->out, NULL, '{');
    fkda_json_text(&j->out, "name", c->name);
    fkda_json_text(&j->out, "range", c->range);
    fkda_json_open(&j->out, "results", '[');
  }
  for (int b = 0; b < j->backend_count; b++) {
    fkda_result r = {
        .verdict = FKDA_FAIL, .error_out = -1, .error_state = -1, .error_checkpoint = -1};
    if (!b || j->memories[b] != j->memories[b - 1]) { /* backends of one memory follow each other */
      fkda_fixture_free(f);
      f = fkda_fixture_new(c, j->memories[b], error, sizeof error);
    }
    if (f) {
      fkda_fixture_run(f, j->backends[b], &r);
    } else {
      snprintf(r.message, sizeof r.message, "%s", error);
    }
    count_result(j, b, c, &r);
    if (j->json) report_json(&j->out, j->backends[b], &r);
    if (r.verdict == FKDA_FAIL) {
      fkda_cli_progress("%s", "");
      fprintf(j->json ? stderr : stdout, "FAILED   %s on %s: %s\n", c->name, j->backends[b],
              r.message);
    }
  }
  if (j->json) {
    fkda_json_close(&j->out, ']');
    fkda_json_close(&j->out, '}');
  }
  fkda_fixture_free(f);
}

static void print_error(double value) {
  if (value < 0) {
    printf("  %9s", "-");
  } else {
    printf("  %9.2e", value);
  }
}

static void print_backend(const job *j, int b) {
  printf("\n%s\n  %-12s %6s %6s %7s  %9s  %9s\n", j->backends[b], "group", "passed", "failed",
         "skipped", "fp32", "16-bit");
  for (int g = 0; g < FKDA_GROUPS; g++) {
    const tally *t = &j->groups[b][g];
    if (!t->passed && !t->failed && !t->skipped) continue;
    printf("  %-12s %6d %6d %7d", fkda_group_name((fkda_case_group)g), t->passed, t->failed,
           t->skipped);
    print_error(j->worst[b][g][0]);
    print_error(j->worst[b][g][1]);
    printf("  %s\n", fkda_group_text((fkda_case_group)g));
  }
  if (!j->range_count) return;
  printf("\n  %-24s %20s  %20s\n  %-24s", "errors by gate range", "fp32 inputs", "16-bit inputs",
         "");
  printf("  %9s  %9s  %9s  %9s\n", "out", "state", "out", "state");
  for (int i = 0; i < j->range_count; i++) {
    const range_error *e = &j->ranges[b][i];
    printf("  %-24s", e->range);
    print_error(e->out[0]);
    print_error(e->state[0]);
    print_error(e->out[1]);
    print_error(e->state[1]);
    putchar('\n');
  }
}

static void finish_json(job *j, const tally *all) {
  fkda_json_close(&j->out, ']');
  fkda_json_open(&j->out, "ranges", '[');
  for (int b = 0; b < j->backend_count; b++) {
    for (int i = 0; i < j->range_count; i++) {
      const range_error *e = &j->ranges[b][i];
      fkda_json_open(&j->out, NULL, '{');
      fkda_json_text(&j->out, "backend", j->backends[b]);
      fkda_json_text(&j->out, "range", e->range);
      fkda_json_real(&j->out, "fp32_out", e->out[0] < 0 ? (double)NAN : e->out[0]);
      fkda_json_real(&j->out, "fp32_state", e->state[0] < 0 ? (double)NAN : e->state[0]);
      fkda_json_real(&j->out, "half_out", e->out[1] < 0 ? (double)NAN : e->out[1]);
      fkda_json_real(&j->out, "half_state", e->state[1] < 0 ? (double)NAN : e->state[1]);
      fkda_json_close(&j->out, '}');
    }
  }
  fkda_json_close(&j->out, ']');
  fkda_json_int(&j->out, "passed", all->passed);
  fkda_json_int(&j->out, "failed", all->failed);
  fkda_json_int(&j->out, "skipped", all->skipped);
  fkda_json_close(&j->out, '}');
}

static int run_cases(job *j) {
  const fkda_case *c;
  int index = 0, total = 0, done = 0;
  while (next_case(j, &index)) total++;
  for (int b = 0; b < MAX_BACKENDS; b++) {
    for (int g = 0; g < FKDA_GROUPS; g++) j->worst[b][g][0] = j->worst[b][g][1] = -1;
  }
  if (j->json) {
    char cpu[256];
    fkda_json_open(&j->out, NULL, '{');
    fkda_json_text(&j->out, "version", fkda_version_string());
    fkda_json_text(&j->out, "device", fkda_cli_cpu(cpu, sizeof cpu));
    if (j->device.alloc) fkda_json_text(&j->out, "gpu", fkda_memory_cuda_device());
    fkda_json_int(&j->out, "threads", fkda_num_threads());
    fkda_json_open(&j->out, "backends", '[');
    for (int b = 0; b < j->backend_count; b++) fkda_json_text(&j->out, NULL, j->backends[b]);
    fkda_json_close(&j->out, ']');
    fkda_json_open(&j->out, "cases", '[');
  }
  for (index = 0; (c = next_case(j, &index)) != NULL;) {
    fkda_cli_progress("[%d/%d] %s", ++done, total, c->name);
    run_case(j, c);
  }
  fkda_cli_progress("%s", "");
  tally all = {0};
  for (int b = 0; b < j->backend_count; b++) {
    for (int g = 0; g < FKDA_GROUPS; g++) {
      all.passed += j->groups[b][g].passed;
      all.failed += j->groups[b][g].failed;
      all.skipped += j->groups[b][g].skipped;
    }
  }
  if (j->json) {
    finish_json(j, &all);
  } else {
    for (int b = 0; b < j->backend_count; b++) print_backend(j, b);
    printf("\n%d cases", total);
    if (all.skipped) printf("; %d runs skipped: not in the backend's contract", all.skipped);
    printf("\n%d passed, %d failed\n", all.passed, all.failed);
  }
  return all.failed ? FKDA_EXIT_FAILED : FKDA_EXIT_OK;
}

/* The memory of a backend's device; NULL with a message on stderr. */
static const fkda_memory *memory_of(job *j, const char *backend) {
  char error[256];
  if (strncmp(backend, "cpu-", 4) == 0 || strcmp(backend, "reference") == 0) {
    return fkda_memory_host();
  }
  const fkda_memory *device = fkda_memory_cuda(error, sizeof error);
  if (!device) {
    fkda_cli_error("%s: %s", backend, error);
    return NULL;
  }
  j->device = *device;
  if (j->no_guards) j->device.guard = 0;
  return &j->device;
}

/* Is the name in the list, comma-separated? */
static bool is_listed(const char *list, const char *name) {
  const size_t length = strlen(name);
  for (const char *at = list; at; at = strchr(at, ',')) {
    at += *at == ',';
    if (strncmp(at, name, length) == 0 && (!at[length] || at[length] == ',')) return true;
  }
  return false;
}

/* The first name of the list that this build does not have, cut out of it; NULL if it has all. */
static const char *unknown_backend(char *list) {
  for (char *next = list; next;) {
    const char *name = strsep(&next, ",");
    if (!fkda_cli_backend(name)) return name;
  }
  return NULL;
}

static bool pick_backends(job *j) {
  const char *name;
  for (int32_t i = 0; (name = fkda_backend_name(i)) != NULL && j->backend_count < MAX_BACKENDS;
       i++) {
    if (j->backend && !is_listed(j->backend, name)) continue;
    if (fkda_backend_available(name) == FKDA_OK) {
      const fkda_memory *memory = memory_of(j, name);
      if (!memory) return false;
      j->memories[j->backend_count] = memory;
      j->backends[j->backend_count++] = name;
    } else if (j->backend) {
      fkda_cli_error("%s: %s", name, fkda_last_error());
    }
  }
  return j->backend_count > 0;
}

static int check(job *j) {
  int index = 0;
  if (!next_case(j, &index))
    return fkda_cli_usage("check", "--case: no case matches \"%s\"", j->patterns[0]);
  if (j->list) return list_cases(j);
  if (j->save || j->save_dir) return save_cases(j);
  if (!pick_backends(j)) return FKDA_EXIT_FAILED;
  return run_cases(j);
}

int fkda_cmd_check(int argc, char **argv) {
  static const struct option options[] = {
      {"backend", required_argument, NULL, 'b'}, {"case", required_argument, NULL, 'c'},
      {"no-guards", no_argument, NULL, 'g'},     {"threads", required_argument, NULL, 't'},
      {"list", no_argument, NULL, 'l'},          {"json", no_argument, NULL, 'j'},
      {"save", required_argument, NULL, 's'},    {"save-dir", required_argument, NULL, 'd'},
      {"help", no_argument, NULL, 'h'},          {NULL, 0, NULL, 0}};
  job *j = calloc(1, sizeof *j);
  int64_t threads = 0;
  int option, status = FKDA_EXIT_OK;
  if (!j) return fkda_cli_error("out of memory");
  j->out.stream = stdout;
  while (status == FKDA_EXIT_OK && (option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
    switch (option) {
      case 'h': free(j); return puts(help) < 0;
      case 'b': j->backend = strcmp(optarg, "all") ? optarg : NULL; break;
      case 'c':
        if (j->pattern_count < MAX_PATTERNS) {
          j->patterns[j->pattern_count++] = optarg;
        } else {
          status = fkda_cli_usage("check", "--case: more than %d", MAX_PATTERNS);
        }
        break;
      case 'g': j->no_guards = true; break;
      case 't':
        if (!fkda_cli_integer(optarg, 1, 1024, &threads)) {
          status = fkda_cli_usage("check", "--threads: \"%s\", expected 1 to 1024", optarg);
        }
        break;
      case 'l': j->list = true; break;
      case 'j': j->json = true; break;
      case 's': j->save = optarg; break;
      case 'd': j->save_dir = optarg; break;
      default: status = fkda_cli_usage("check", "wrong usage");
    }
  }
  if (!status && optind < argc)
    status = fkda_cli_usage("check", "unexpected argument \"%s\"", argv[optind]);
  if (!status && j->backend) {
    char list[256];
    snprintf(list, sizeof list, "%s", j->backend);
    const char *unknown = unknown_backend(list);
    if (unknown) status = fkda_cli_usage("check", "--backend: no \"%s\" in this build", unknown);
  }
  if (!status && threads && fkda_set_num_threads((int32_t)threads) != FKDA_OK) {
    status = fkda_cli_error("%s", fkda_last_error());
  }
  if (!status) status = check(j);
  free(j);
  return status;
}
