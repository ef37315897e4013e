/* flashkda bench: shapes or presets, against what the machine can do: the fp32 matrix product of OpenBLAS
 * for prefill, reading and writing memory in place for decode.
 *
 * Machines change their speed within seconds, and shared ones more than others. So nothing is
 * compared that was not measured right after the other: a row is timed in rounds, in each of which every number of
 * threads has a window of our runs beside a window of the yardstick on as many threads. Ratios are
 * formed inside a round; the medians over the rounds are what is reported.
 *
 * SPDX-License-Identifier: MIT
 */
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "cli.h"
#include "rates.h"

static const char help[] =
    "Usage: flashkda bench [--preset NAME | SHAPE OPTION...] [OPTION...]\n\n"
    "Times the kernels on random inputs: in rounds, each beside what the machine can do at that "
    "moment\n"
    "(OpenBLAS's sgemm, reading and writing memory) and on every number of threads. Medians over "
    "the\n"
    "rounds, of the ratios too; in brackets their middle half.\n\n"
    "  --preset NAME         cpu, paper, serving, long or decode (comma-separated for several)\n"
    "  --lens L,L,...        prefill of one ragged batch, or\n"
    "  --T T --B B           prefill of B sequences of T tokens (4096, 1)\n"
    "  --decode N            decode of N sequences, --T tokens each (1)\n"
    "  --heads H             (32)      --value-heads HV   (H)\n"
    "  --dim D               (128)     --gate STRENGTH    weak, medium, strong (medium)\n"
    "  --dtype TYPE          (bfloat16)\n\n"
    "  --backend NAME|all    (the best)\n"
    "  --threads N,N,...     (1 and as many as this process may use)\n"
    "  --seconds S           time spent on a row, as much again on what it is compared with (1)\n"
    "  --rounds N            that it is divided into (5)\n"
    "  --no-check            do not compare two heads with the double-precision reference\n"
    "  --no-sgemm            do not measure OpenBLAS\n"
    "  --json FILE           also write the results to FILE (- for standard output)\n"
    "  --commit TEXT         recorded in FILE";

static FILE *text; /* where the table goes: stderr if standard output takes the JSON */

enum { MAX_ROWS = 256, MAX_THREADS = 8, MAX_ROUNDS = 64, NAME = 48 };

typedef struct shape {
  char name[NAME];
  fkda_op op;
  const int64_t *lens; /* NULL: N sequences of T tokens */
  int64_t N, T, H, HV, D;
  const char *gate;
  int32_t io, state_dtype;
  fkda_state_layout layout;
  const char *variant;
} shape;

/* What was seen in each round, and sorted: its quartiles. */
typedef struct series {
  double rounds[MAX_ROUNDS];
  int count;
  double low, median, high;
} series;

typedef struct row {
  shape s;
  int32_t threads;
  fkda_plan_info plan;
  series ms;        /* a call */
  series yardstick; /* sgemm in GFLOP/s or memory in GB/s; empty if it was not measured */
  series ratio;     /* of our rate to it */
  series speedup;   /* over one thread; empty in its own row */
  double work;      /* of a call: GFLOP, or GB of states read and written */
  double error_o, error_state;
} row;

typedef struct bench {
  shape shapes[MAX_ROWS];
  int shape_count;
  row rows[MAX_ROWS];
  int row_count;
  const char *backend, *json, *commit;
  bool all_backends, check, sgemm;
  double seconds;
  int64_t rounds;
  int64_t *threads, thread_count;
} bench;

/* ---- shapes ------------------------------------------------------------------------------------- */

static const int64_t paper_lens[] = {1300, 547, 2048, 963, 271, 3063};
static int64_t one_long_lens[41];

static shape *add_shape(bench *b, fkda_op op, int64_t N, int64_t T, int64_t H, const char *gate) {
  if (b->shape_count == MAX_ROWS) return &b->shapes[MAX_ROWS - 1];
  shape *s = &b->shapes[b->shape_count++];
  *s = (shape){.op = op,
               .N = N,
               .T = T,
               .H = H,
               .HV = H,
               .D = 128,
               .gate = gate,
               .io = FKDA_BF16,
               .state_dtype = FKDA_F32,
               .variant = ""};
  if (op == FKDA_OP_DECODE) {
    snprintf(s->name, NAME, "decode_N%" PRId64 "_T%" PRId64 "_H%" PRId64, N, T, H);
  } else if (N == 1) {
    snprintf(s->name, NAME, "T%" PRId64 "_H%" PRId64, T, H);
  } else {
    snprintf(s->name, NAME, "%" PRId64 "x%" PRId64 "_H%" PRId64, N, T, H);
  }
  return s;
}

static shape *add_ragged(bench *b, const char *name, const int64_t *lens, int64_t N, int64_t H,
                         const char *gate) {
  shape *s = add_shape(b, FKDA_OP_PREFILL, N, 0, H, gate);
  s->lens = lens;
  for (int64_t n = 0; n < N; n++) s->T += lens[n];
  snprintf(s->name, NAME, "%s_H%" PRId64, name, H);
  return s;
}

static bool add_preset(bench *b, const char *name) {
  static const char *const gates[] = {"weak", "medium", "strong"};
  const fkda_op prefill = FKDA_OP_PREFILL, decode = FKDA_OP_DECODE;
  if (!strcmp(name, "cpu")) {
    for (int g = 0; g < 3; g++) add_shape(b, prefill, 1, 4096, 32, gates[g]);
    for (int g = 0; g < 3; g += 2) {
      shape *s = add_shape(b, prefill, 1, 4096, 32, gates[g]);
      s->io = FKDA_F32;
      s->variant = "fp32";
    }
    shape *s = add_shape(b, prefill, 1, 4096, 32, "strong");
    s->HV = 32;
    s->H = 8;
    s->variant = "gva4";
    add_shape(b, prefill, 1, 16384, 1, "weak");
    add_shape(b, prefill, 1, 16384, 1, "strong");
    add_ragged(b, "ragged6", paper_lens, 6, 8, "medium");
    add_shape(b, decode, 256, 1, 32, "medium");
    s = add_shape(b, decode, 512, 1, 32, "medium");
    s->state_dtype = FKDA_BF16;
    s->variant = "bf16state";
    s = add_shape(b, decode, 256, 4, 32, "medium");
    s->variant = "spec4";
    return true;
  }
  if (!strcmp(name, "paper")) {
    static const int64_t heads[] = {96, 64};
    for (int i = 0; i < 2; i++) {
      add_shape(b, prefill, 1, 8192, heads[i], "strong");
      add_ragged(b, "ragged6", paper_lens, 6, heads[i], "strong");
      add_shape(b, prefill, 8, 1024, heads[i], "strong");
    }
    add_shape(b, prefill, 1, 8192, 32, "strong");
    add_shape(b, prefill, 1, 8192, 32, "weak");
    return true;
  }
  if (!strcmp(name, "serving")) {
    one_long_lens[0] = 16384;
    for (int i = 1; i < 41; i++) one_long_lens[i] = 100;
    for (int g = 0; g < 3; g += 2) {
      add_shape(b, prefill, 1, 8192, 12, gates[g]);
      add_shape(b, prefill, 1, 2048, 12, gates[g]);
      add_shape(b, prefill, 64, 128, 32, gates[g]);
      add_ragged(b, "16384+40x100", one_long_lens, 41, 32, gates[g]);
    }
    return true;
  }
  if (!strcmp(name, "long")) {
    for (int g = 0; g < 3; g += 2) {
      add_shape(b, prefill, 1, 65536, 8, gates[g]);
      add_shape(b, prefill, 1, 131072, 4, gates[g]);
    }
    return true;
  }
  if (!strcmp(name, "decode")) {
    static const int64_t sizes[] = {1, 8, 64, 256};
    for (int i = 0; i < 4; i++) add_shape(b, decode, sizes[i], 1, 32, "medium");
    shape *s = add_shape(b, decode, 256, 1, 32, "medium");
    s->state_dtype = FKDA_BF16;
    s->variant = "bf16state";
    s = add_shape(b, decode, 256, 1, 32, "medium");
    s->H = 8;
    s->variant = "gva4";
    s = add_shape(b, decode, 256, 1, 32, "medium");
    s->layout = FKDA_STATE_KV;
    s->variant = "kv";
    for (int T = 2; T <= 8; T *= 2) {
      s = add_shape(b, decode, 128, T, 32, "medium");
      s->variant = T == 2 ? "spec2" : T == 4 ? "spec4" : "spec8";
    }
    return true;
  }
  return false;
}

/* ---- inputs ------------------------------------------------------------------------------------- */

/* Near-normal numbers, fast: hundreds of millions are needed. The sum of four 16-bit uniforms has
 * standard deviation 2^16/sqrt(3). */
static void fill(fkda_random *random, const fkda_tensor *t) {
  const int64_t count = fkda_tensor_elements(t);
  const float scale = 1.7320508f / 65536;
  for (int64_t i = 0; i < count; i++) {
    const uint64_t x = fkda_random_bits(random);
    const int32_t sum =
        (int32_t)((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48));
    const float value = (float)(sum - 131070) * scale;
    if (t->dtype == FKDA_F32) {
      ((float *)t->data)[i] = value;
    } else if (t->dtype == FKDA_BF16) {
      uint32_t bits;
      memcpy(&bits, &value, sizeof bits);
      ((uint16_t *)t->data)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    } else {
      fkda_store(t->data, t->dtype, i, value);
    }
  }
}

/* A tensor of the call with fresh memory, filled if `random` is given. */
static bool add_tensor(fkda_call *call, fkda_field field, int32_t dtype, int32_t ndim, int64_t a,
                       int64_t b, int64_t c, int64_t d, fkda_random *random) {
  const int64_t dims[4] = {a, b, c, d};
  fkda_tensor *t = fkda_call_tensor(call, field);
  *t = fkda_tensor_contiguous(NULL, dtype, ndim, dims);
  t->data = aligned_alloc(64, (fkda_tensor_extent(t) + 63) / 64 * 64 + 64);
  if (!t->data) return false;
  if (random) {
    fill(random, t);
  } else {
    memset(t->data, 0, fkda_tensor_extent(t)); /* pages exist before the first timed run */
  }
  return true;
}

static void release(fkda_call *call) {
  for (int i = 0; i < FKDA_FIELDS; i++) {
    const fkda_tensor *t = fkda_call_tensor_const(call, (fkda_field)i);
    if (t) free(t->data);
  }
  free(call->header.workspace);
}

static bool make_call(const shape *s, fkda_call *call) {
  const int64_t B = s->lens ? 1 : s->N, T = s->T, D = s->D;
  fkda_random random;
  fkda_dist bias;
  fkda_random_seed(&random, 20240 + (uint64_t)s->H);
  fkda_call_init(call, s->op);
  bool good = add_tensor(call, FKDA_FIELD_q, s->io, 4, B, T, s->H, D, &random) &&
              add_tensor(call, FKDA_FIELD_k, s->io, 4, B, T, s->H, D, &random) &&
              add_tensor(call, FKDA_FIELD_v, s->io, 4, B, T, s->HV, D, &random) &&
              add_tensor(call, FKDA_FIELD_g, s->io, 4, B, T, s->HV, D, &random) &&
              add_tensor(call, FKDA_FIELD_beta, s->io, 3, B, T, s->HV, 0, &random) &&
              add_tensor(call, FKDA_FIELD_A_log, FKDA_F32, 1, s->HV, 0, 0, 0, NULL) &&
              add_tensor(call, FKDA_FIELD_dt_bias, FKDA_F32, 2, s->HV, D, 0, 0, NULL) &&
              add_tensor(call, FKDA_FIELD_out, s->io, 4, B, T, s->HV, D, NULL);
  if (s->op == FKDA_OP_DECODE) {
    call->decode.state_layout = s->layout; /* K = V: the shape is the same */
    good =
        good && add_tensor(call, FKDA_FIELD_state, s->state_dtype, 4, s->N, s->HV, D, D, &random);
  } else {
    good =
        good &&
        add_tensor(call, FKDA_FIELD_initial_state, s->state_dtype, 4, s->N, s->HV, D, D, &random) &&
        add_tensor(call, FKDA_FIELD_final_state, s->state_dtype, 4, s->N, s->HV, D, D, NULL);
  }
  if (good && s->lens) {
    good = add_tensor(call, FKDA_FIELD_cu_seqlens, FKDA_I64, 1, s->N + 1, 0, 0, 0, NULL);
    int64_t *cu = good ? call->prefill.cu_seqlens.data : NULL;
    for (int64_t n = 0; good && n < s->N; n++) cu[n + 1] = cu[n] + s->lens[n];
  }
  if (!good) return false;
  fkda_gate_strength(s->gate, &bias);
  fkda_random_fill(&random, fkda_call_tensor(call, FKDA_FIELD_dt_bias), bias, -1, -1);
  return true;
}

/* ---- error on two heads ------------------------------------------------------------------------- */

static double difference(const fkda_tensor *x, const fkda_tensor *gold, double *power) {
  const int64_t count = fkda_tensor_elements(x);
  double sum = 0;
  fkda_walk walk = {0};
  for (int64_t i = 0; i < count; i++, fkda_walk_step(&walk, x)) {
    const double g = ((const double *)gold->data)[i];
    const double d = fkda_load(x->data, x->dtype, walk.offset) - g;
    sum += d * d;
    *power += g * g;
  }
  return sum;
}

/* The call on value head `head` alone. */
static fkda_call one_head(const fkda_call *call, int64_t H, int64_t HV, int64_t head) {
  static const fkda_field by_value_head[] = {FKDA_FIELD_v, FKDA_FIELD_g, FKDA_FIELD_beta,
                                             FKDA_FIELD_out};
  static const fkda_field states[] = {FKDA_FIELD_initial_state, FKDA_FIELD_final_state,
                                      FKDA_FIELD_state};
  fkda_call one = *call;
  for (int i = 0; i < 2; i++) {
    fkda_tensor *t = fkda_call_tensor(&one, i ? FKDA_FIELD_k : FKDA_FIELD_q);
    *t = fkda_slice(*t, 2, head * H / HV, 1);
  }
  for (int i = 0; i < 4; i++) {
    fkda_tensor *t = fkda_call_tensor(&one, by_value_head[i]);
    *t = fkda_slice(*t, 2, head, 1);
  }
  for (int i = 0; i < 3; i++) {
    fkda_tensor *t = fkda_call_tensor(&one, states[i]);
    if (t) *t = fkda_slice(*t, 1, head, 1);
  }
  for (int i = 0; i < 2; i++) {
    fkda_tensor *t = fkda_call_tensor(&one, i ? FKDA_FIELD_dt_bias : FKDA_FIELD_A_log);
    *t = fkda_slice(*t, 0, head, 1);
  }
  one.header.workspace = NULL;
  one.header.workspace_size = 0;
  return one;
}

/* Contiguous doubles in the tensor's shape, filled from it. */
static bool as_gold(fkda_tensor *t) {
  double *data = malloc((size_t)(fkda_tensor_elements(t) + 1) * sizeof *data);
  if (!data) return false;
  fkda_gather(t, data);
  *t = fkda_tensor_contiguous(data, FKDA_F64, t->ndim, t->shape);
  return true;
}

/* Runs the call once from fresh states and compares the first and the last head. */
static bool measure_error(const fkda_call *call, row *r) {
  const shape *s = &r->s;
  const int64_t heads[2] = {0, s->HV - 1};
  const fkda_field state = s->op == FKDA_OP_DECODE ? FKDA_FIELD_state : FKDA_FIELD_final_state;
  double sums[2] = {0, 0}, powers[2] = {0, 0};
  fkda_call golds[2];
  bool good = true;
  int made = 0;
  for (; made < 2 && good; made++) {
    golds[made] = one_head(call, s->H, s->HV, heads[made]);
    golds[made].header.backend = "reference";
    good = as_gold(fkda_call_tensor(&golds[made], FKDA_FIELD_out)) &&
           as_gold(fkda_call_tensor(&golds[made], state));
    good = good && fkda_call_run(&golds[made]) == FKDA_OK;
  }
  good = good && fkda_call_run(call) == FKDA_OK;
  for (int i = 0; i < 2 && good; i++) {
    const fkda_call mine = one_head(call, s->H, s->HV, heads[i]);
    sums[0] += difference(fkda_call_tensor_const(&mine, FKDA_FIELD_out),
                          fkda_call_tensor_const(&golds[i], FKDA_FIELD_out), &powers[0]);
    sums[1] += difference(fkda_call_tensor_const(&mine, state),
                          fkda_call_tensor_const(&golds[i], state), &powers[1]);
  }
  for (int i = 0; i < made; i++) {
    if (fkda_call_tensor(&golds[i], FKDA_FIELD_out)->dtype == FKDA_F64)
      free(fkda_call_tensor(&golds[i], FKDA_FIELD_out)->data);
    if (fkda_call_tensor(&golds[i], state)->dtype == FKDA_F64)
      free(fkda_call_tensor(&golds[i], state)->data);
  }
  r->error_o = sqrt(sums[0] / powers[0]);
  r->error_state = sqrt(sums[1] / powers[1]);
  return good;
}

/* ---- rows --------------------------------------------------------------------------------------- */

static void add(series *x, double value) {
  if (x->count < MAX_ROUNDS) x->rounds[x->count++] = value;
}

static int compare(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* At `part` of the way through sorted values, in between where there is none. */
static double quantile(const double *sorted, int count, double part) {
  const double at = part * (count - 1);
  const int below = (int)at, above = below + 1 < count ? below + 1 : below;
  return sorted[below] + (at - below) * (sorted[above] - sorted[below]);
}

static void finish_series(series *x) {
  double sorted[MAX_ROUNDS];
  if (!x->count) return;
  memcpy(sorted, x->rounds, sizeof sorted);
  qsort(sorted, (size_t)x->count, sizeof *sorted, compare);
  x->low = quantile(sorted, x->count, 0.25);
  x->median = quantile(sorted, x->count, 0.5);
  x->high = quantile(sorted, x->count, 0.75);
}

/* GFLOP of a prefill; GB of the states that a decode reads and writes. */
static double work_of(const shape *s) {
  const double D = (double)s->D, tokens = (double)(s->lens ? s->T : s->N * s->T);
  if (s->op == FKDA_OP_DECODE)
    return 2e-9 * (double)(s->N * s->HV) * D * D * (double)fkda_dtype_size(s->state_dtype);
  return 1e-9 * tokens * (double)s->HV * (6 * D * D + 8 * 16 * D);
}

static double rate(const row *r) { return r->ms.median > 0 ? 1e3 * r->work / r->ms.median : 0; }

static void print_header(void) {
  fprintf(text, "%-20s %-9s %-7s %-12s %3s %11s %9s %15s %18s %10s %10s\n", "shape", "variant",
          "gate", "backend", "thr", "ms", "GFLOP/s", "ratio", "speed-up", "error out",
          "error state");
}

/* Median and middle half; blank where there is nothing to say. */
static void print_series(const series *x, double factor, int digits, const char *unit) {
  char range[32] = "";
  if (x->count > 1)
    snprintf(range, sizeof range, " (%.*f-%.*f)", digits, factor * x->low, digits,
             factor * x->high);
  if (x->count) {
    fprintf(text, " %5.*f%s%-*s", digits, factor * x->median, unit, 8 + 2 * digits, range);
  } else {
    fprintf(text, " %*s", 14 + 2 * digits, "");
  }
}

static void print_row(const row *r) {
  const bool decode = r->s.op == FKDA_OP_DECODE;
  fprintf(text, "%-20s %-9s %-7s %-12s %3d %11.3f ", r->s.name, r->s.variant, r->s.gate,
          r->plan.backend, (int)r->threads, r->ms.median);
  fprintf(text, decode ? "%5.1fGB/s" : "%9.1f", rate(r));
  print_series(&r->ratio, 100, 0, "%");
  print_series(&r->speedup, 1, 2, "x");
  if (r->error_o >= 0) fprintf(text, " %10.2e %10.2e", r->error_o, r->error_state);
  fputc('\n', text);
  fflush(text);
}

/* ms of a call: of one after the other for `seconds`, the first left out. 0 if it fails. */
static double window(const fkda_call *call, int32_t threads, double seconds) {
  if (fkda_set_num_threads(threads) != FKDA_OK || fkda_call_run(call) != FKDA_OK) return 0;
  const double begin = fkda_cli_now();
  double spent;
  int runs = 0;
  do {
    if (fkda_call_run(call) != FKDA_OK) return 0;
    runs++;
  } while ((spent = fkda_cli_now() - begin) < seconds);
  return 1e3 * spent / runs;
}

/* The plan of every number of threads, and a workspace for all of them. */
static int plan_rows(bench *b, row *rows, fkda_call *call) {
  size_t most = 0;
  free(call->header.workspace);
  call->header.workspace = NULL;
  call->header.workspace_size = 0;
  for (int64_t t = 0; t < b->thread_count; t++) {
    rows[t].threads = (int32_t)b->threads[t];
    rows[t].plan.struct_size = sizeof rows[t].plan;
    if (fkda_set_num_threads(rows[t].threads) != FKDA_OK ||
        fkda_plan(call, &rows[t].plan) != FKDA_OK)
      return fkda_cli_error("%s: %s", rows[t].s.name, fkda_last_error());
    if (rows[t].plan.workspace_size > most) most = rows[t].plan.workspace_size;
  }
  call->header.workspace = aligned_alloc(64, (most + 63) / 64 * 64 + 64);
  call->header.workspace_size = most;
  return call->header.workspace ? FKDA_EXIT_OK : fkda_cli_error("out of memory");
}

/* One row for each number of threads. Every round turns the order round, so that a speed that only falls
 * or rises favours neither side. */
static int measure_rows(bench *b, const shape *s, const char *backend, fkda_call *call) {
  const bool decode = s->op == FKDA_OP_DECODE;
  const double seconds = b->seconds / (double)b->rounds;
  row rows[MAX_THREADS];
  for (int t = 0; t < MAX_THREADS; t++)
    rows[t] = (row){.s = *s, .work = work_of(s), .error_o = -1, .error_state = -1};
  call->header.backend = backend;
  int status = plan_rows(b, rows, call);
  if (status) return status;
  for (int64_t t = 0; b->check && t < b->thread_count; t++) {
    fkda_cli_progress("%s, %d threads: error", s->name, (int)rows[t].threads);
    if (fkda_set_num_threads(rows[t].threads) != FKDA_OK || !measure_error(call, &rows[t]))
      return fkda_cli_error("%s: %s", s->name, fkda_last_error());
  }
  for (int64_t round = 0; round < b->rounds; round++) {
    /* Step by step: of even rows yardstick and ours, of odd ones ours and yardstick. */
    const int64_t steps = 2 * b->thread_count;
    for (int64_t i = 0; i < steps; i++) {
      const int64_t step = round % 2 ? steps - 1 - i : i;
      row *r = &rows[step / 2];
      fkda_cli_progress("%s, round %d of %d", s->name, (int)round + 1, (int)b->rounds);
      if ((step + step / 2) % 2) {
        const double ms = window(call, r->threads, seconds);
        if (ms <= 0) return fkda_cli_error("%s: %s", s->name, fkda_last_error());
        add(&r->ms, ms);
      } else if (decode || b->sgemm) {
        const double found = decode ? fkda_memory_gbps((int)r->threads, seconds)
                                    : fkda_sgemm_gflops((int)r->threads, seconds);
        if (found <= 0) return fkda_cli_error("out of memory");
        add(&r->yardstick, found);
      }
    }
    for (int64_t t = 0; t < b->thread_count; t++) {
      row *r = &rows[t];
      const double ms = r->ms.rounds[round];
      if (r->yardstick.count) add(&r->ratio, 1e3 * r->work / ms / r->yardstick.rounds[round]);
      if (rows[0].threads == 1 && r->threads > 1) add(&r->speedup, rows[0].ms.rounds[round] / ms);
    }
  }
  fkda_cli_progress("%s", "");
  for (int64_t t = 0; t < b->thread_count; t++) {
    finish_series(&rows[t].ms);
    finish_series(&rows[t].yardstick);
    finish_series(&rows[t].ratio);
    finish_series(&rows[t].speedup);
    print_row(&rows[t]);
    if (b->row_count < MAX_ROWS) b->rows[b->row_count++] = rows[t];
  }
  return FKDA_EXIT_OK;
}

static int measure_shape(bench *b, const shape *s) {
  fkda_call call;
  int status = FKDA_EXIT_OK;
  fkda_cli_progress("%s: making inputs", s->name);
  if (!make_call(s, &call)) {
    release(&call);
    return fkda_cli_error("%s: out of memory", s->name);
  }
  const char *name = b->backend;
  for (int32_t i = 0; !status; i++) {
    if (b->all_backends) {
      name = fkda_backend_name(i);
      if (!name) break;
      if (fkda_backend_available(name) != FKDA_OK || strncmp(name, "cpu-", 4) != 0) continue;
    } else if (i) {
      break;
    }
    status = measure_rows(b, s, name, &call);
  }
  release(&call);
  return status;
}

/* ---- results ------------------------------------------------------------------------------------ */

static void json_positive(fkda_json *j, const char *key, double value) {
  fkda_json_real(j, key, value > 0 ? value : (double)NAN);
}

/* "key": median, and beside it what the median is of. */
static void json_series(fkda_json *j, const char *key, const series *x) {
  char name[NAME];
  json_positive(j, key, x ? x->median : 0);
  snprintf(name, sizeof name, "%s_rounds", key);
  fkda_json_open(j, name, '[');
  for (int i = 0; x && i < x->count; i++) fkda_json_real(j, NULL, x->rounds[i]);
  fkda_json_close(j, ']');
}

/* Median over all rounds of all rows on that many threads; 0 if there are none. */
static double yardstick(const bench *b, bool decode, int64_t threads) {
  static double values[MAX_ROWS * MAX_ROUNDS];
  int count = 0;
  for (int i = 0; i < b->row_count; i++) {
    const row *r = &b->rows[i];
    if (r->threads != threads || (r->s.op == FKDA_OP_DECODE) != decode) continue;
    for (int k = 0; k < r->yardstick.count; k++) values[count++] = r->yardstick.rounds[k];
  }
  return count ? fkda_cli_median(values, count) : 0;
}

static void write_row(fkda_json *j, const row *r) {
  const shape *s = &r->s;
  const bool decode = s->op == FKDA_OP_DECODE;
  char plan[160];
  snprintf(plan, sizeof plan, "chunk %d, %" PRId64 " tasks, V in %d", (int)r->plan.chunk,
           r->plan.tasks, (int)r->plan.value_split);
  fkda_json_open(j, NULL, '{');
  fkda_json_text(j, "name", s->name);
  fkda_json_text(j, "op", fkda_op_name(s->op));
  fkda_json_int(j, "N", s->N);
  if (s->lens) {
    fkda_json_ints(j, "lens", s->lens, s->N);
  } else { /* N sequences of T tokens */
    fkda_json_open(j, "lens", '[');
    for (int64_t n = 0; n < s->N; ++n) fkda_json_int(j, NULL, s->T);
    fkda_json_close(j, ']');
  }
  fkda_json_int(j, "H", s->H);
  fkda_json_int(j, "HV", s->HV);
  fkda_json_int(j, "K", s->D);
  fkda_json_int(j, "V", s->D);
  fkda_json_text(j, "gate", s->gate);
  fkda_json_text(j, "backend", r->plan.backend);
  fkda_json_text(j, "variant", s->variant);
  fkda_json_text(j, "dtype", fkda_dtype_short(s->io));
  fkda_json_text(j, "state_dtype", fkda_dtype_short(s->state_dtype));
  fkda_json_text(j, "plan", plan);
  fkda_json_int(j, "threads", r->threads);
  json_series(j, "ms", &r->ms);
  fkda_json_text(j, "floor_ms", NULL);
  json_positive(j, "gflops", decode ? 0 : rate(r));
  json_series(j, "sgemm_gflops", decode ? NULL : &r->yardstick);
  json_series(j, "sgemm_ratio", decode ? NULL : &r->ratio);
  json_positive(j, "state_gbps", decode ? rate(r) : 0);
  json_series(j, "memory_gbps", decode ? &r->yardstick : NULL);
  json_series(j, "memory_ratio", decode ? &r->ratio : NULL);
  json_series(j, "speedup", &r->speedup);
  fkda_json_open(j, "peers_ms", '{');
  fkda_json_close(j, '}');
  fkda_json_real(j, "error_o", r->error_o < 0 ? (double)NAN : r->error_o);
  fkda_json_real(j, "error_state", r->error_state < 0 ? (double)NAN : r->error_state);
  fkda_json_close(j, '}');
}

static int write_json(const bench *b) {
  char cpu[256], date[32];
  struct utsname system;
  const time_t now = time(NULL);
  struct tm utc;
  FILE *stream = strcmp(b->json, "-") ? fopen(b->json, "w") : stdout;
  if (!stream) return fkda_cli_error("%s: cannot write", b->json);
  fkda_json j = {.stream = stream};
  strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
  if (uname(&system)) snprintf(system.machine, sizeof system.machine, "unknown");
  fkda_json_open(&j, NULL, '{');
  fkda_json_text(&j, "commit", b->commit);
  fkda_json_text(&j, "date", date);
  fkda_json_text(&j, "version", fkda_version_string());
  fkda_json_text(&j, "device", fkda_cli_cpu(cpu, sizeof cpu));
  fkda_json_text(&j, "machine", system.machine);
  fkda_json_int(&j, "cpus", sysconf(_SC_NPROCESSORS_ONLN));
  fkda_json_text(&j, "driver", NULL);
  fkda_json_open(&j, "clocks_mhz", '{');
  fkda_json_close(&j, '}');
  json_positive(&j, "copy_gbps", yardstick(b, true, b->threads[b->thread_count - 1]));
  json_positive(&j, "sgemm_gflops", yardstick(b, false, b->threads[b->thread_count - 1]));
  fkda_json_open(&j, "rates", '[');
  for (int64_t i = 0; i < b->thread_count; i++) {
    fkda_json_open(&j, NULL, '{');
    fkda_json_int(&j, "threads", b->threads[i]);
    json_positive(&j, "sgemm_gflops", yardstick(b, false, b->threads[i]));
    json_positive(&j, "memory_gbps", yardstick(b, true, b->threads[i]));
    fkda_json_close(&j, '}');
  }
  fkda_json_close(&j, ']');
  fkda_json_text(&j, "openblas_core", b->sgemm ? fkda_sgemm_core() : NULL);
  fkda_json_text(&j, "openblas_config", b->sgemm ? fkda_sgemm_config() : NULL);
  fkda_json_open(&j, "rows", '[');
  for (int i = 0; i < b->row_count; i++) write_row(&j, &b->rows[i]);
  fkda_json_close(&j, ']');
  fkda_json_close(&j, '}');
  const bool bad = fflush(stream) != 0 || ferror(stream);
  if (stream != stdout && (fclose(stream) != 0 || bad))
    return fkda_cli_error("%s: cannot write", b->json);
  return FKDA_EXIT_OK;
}

static void print_rates(const bench *b) {
  for (int64_t i = 0; i < b->thread_count; i++) {
    const double sgemm = yardstick(b, false, b->threads[i]);
    const double memory = yardstick(b, true, b->threads[i]);
    if (sgemm <= 0 && memory <= 0) continue;
    fprintf(text, "%d thread%s:", (int)b->threads[i], b->threads[i] == 1 ? "" : "s");
    if (sgemm > 0) fprintf(text, " sgemm %.1f GFLOP/s (OpenBLAS, %s)", sgemm, fkda_sgemm_core());
    if (memory > 0) fprintf(text, " memory %.1f GB/s read and written", memory);
    fputc('\n', text);
  }
}

static int run(bench *b) {
  text = b->json && !strcmp(b->json, "-") ? stderr : stdout;
  char cpu[256];
  int status = FKDA_EXIT_OK;
  if (b->sgemm && !fkda_sgemm_load()) {
    fprintf(stderr, "flashkda: libopenblas.so.0 not found; no sgemm rate\n");
    b->sgemm = false;
  }
  fprintf(text, "%s\n", fkda_cli_cpu(cpu, sizeof cpu));
  print_header();
  for (int i = 0; i < b->shape_count && !status; i++) status = measure_shape(b, &b->shapes[i]);
  print_rates(b);
  return !status && b->json ? write_json(b) : status;
}

int fkda_cmd_bench(int argc, char **argv) {
  static const struct option options[] = {{"preset", required_argument, NULL, 'p'},
                                          {"lens", required_argument, NULL, 'l'},
                                          {"T", required_argument, NULL, 'T'},
                                          {"B", required_argument, NULL, 'B'},
                                          {"decode", required_argument, NULL, 'n'},
                                          {"heads", required_argument, NULL, 'H'},
                                          {"value-heads", required_argument, NULL, 'W'},
                                          {"dim", required_argument, NULL, 'D'},
                                          {"gate", required_argument, NULL, 'g'},
                                          {"dtype", required_argument, NULL, 'd'},
                                          {"backend", required_argument, NULL, 'b'},
                                          {"threads", required_argument, NULL, 't'},
                                          {"seconds", required_argument, NULL, 's'},
                                          {"rounds", required_argument, NULL, 'r'},
                                          {"no-check", no_argument, NULL, 'c'},
                                          {"no-sgemm", no_argument, NULL, 'S'},
                                          {"json", required_argument, NULL, 'j'},
                                          {"commit", required_argument, NULL, 'C'},
                                          {"help", no_argument, NULL, 'h'},
                                          {NULL, 0, NULL, 0}};
  bench *b = calloc(1, sizeof *b);
  int64_t T = 0, B = 1, N = 0, H = 32, HV = 0, D = 128, lens_count = 0;
  int64_t *lens = NULL;
  const char *gate = "medium", *preset = NULL;
  int32_t io = FKDA_BF16;
  fkda_dist ignored;
  int option, status = FKDA_EXIT_OK;
  bool good = true;
  char *end;
  if (!b) return fkda_cli_error("out of memory");
  b->check = b->sgemm = true;
  b->seconds = 1;
  b->rounds = 5;
  while (good && (option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
    switch (option) {
      case 'h': free(b); return puts(help) < 0;
      case 'p': preset = optarg; break;
      case 'l':
        free(lens);
        good = (lens = fkda_cli_integers(optarg, 0, INT64_C(1) << 31, &lens_count)) != NULL;
        break;
      case 'T': good = fkda_cli_integer(optarg, 1, INT64_C(1) << 31, &T); break;
      case 'B': good = fkda_cli_integer(optarg, 1, 1 << 20, &B); break;
      case 'n': good = fkda_cli_integer(optarg, 1, 1 << 20, &N); break;
      case 'H': good = fkda_cli_integer(optarg, 1, 4096, &H); break;
      case 'W': good = fkda_cli_integer(optarg, 1, 4096, &HV); break;
      case 'D': good = fkda_cli_integer(optarg, 1, 256, &D); break;
      case 'g': good = fkda_gate_strength(gate = optarg, &ignored); break;
      case 'd': good = (io = fkda_cli_dtype(optarg)) != FKDA_NONE && io != FKDA_F64; break;
      case 'b':
        b->all_backends = !strcmp(optarg, "all");
        b->backend = b->all_backends ? NULL : optarg;
        good = b->all_backends || !strcmp(optarg, "cpu") || fkda_cli_backend(optarg);
        break;
      case 't':
        free(b->threads);
        b->threads = fkda_cli_integers(optarg, 1, 1024, &b->thread_count);
        good = b->threads && b->thread_count <= MAX_THREADS;
        break;
      case 's':
        b->seconds = strtod(optarg, &end);
        good = end != optarg && !*end && b->seconds >= 0 && b->seconds < 1e4;
        break;
      case 'r': good = fkda_cli_integer(optarg, 1, MAX_ROUNDS, &b->rounds); break;
      case 'c': b->check = false; break;
      case 'S': b->sgemm = false; break;
      case 'j': b->json = optarg; break;
      case 'C': b->commit = optarg; break;
      default: status = fkda_cli_usage("bench", "wrong usage"); goto done;
    }
  }
  if (!good) {
    status = fkda_cli_usage("bench", "bad value \"%s\"", optarg);
    goto done;
  }
  if (optind < argc) {
    status = fkda_cli_usage("bench", "unexpected argument \"%s\"", argv[optind]);
    goto done;
  }
  if (HV && HV % H) {
    status = fkda_cli_usage("bench", "--value-heads: expected a multiple of --heads");
    goto done;
  }
  if (preset) {
    char names[128];
    snprintf(names, sizeof names, "%s", preset);
    for (char *name = strtok(names, ","); name && !status; name = strtok(NULL, ",")) {
      if (!add_preset(b, name)) status = fkda_cli_usage("bench", "--preset: no \"%s\"", name);
    }
  } else {
    shape *s = lens ? add_ragged(b, "ragged", lens, lens_count, H, gate)
               : N  ? add_shape(b, FKDA_OP_DECODE, N, T ? T : 1, H, gate)
                    : add_shape(b, FKDA_OP_PREFILL, B, T ? T : 4096, H, gate);
    s->HV = HV ? HV : H;
    s->D = D;
    s->io = io;
    if (s->HV != H) s->variant = "gva";
    if (io != FKDA_BF16) s->variant = fkda_dtype_short(io);
  }
  if (!status && !b->threads) {
    const int32_t most = fkda_num_threads();
    b->threads = malloc(2 * sizeof *b->threads);
    if (b->threads) {
      b->threads[0] = 1;
      b->threads[1] = most;
      b->thread_count = most > 1 ? 2 : 1;
    } else {
      status = fkda_cli_error("out of memory");
    }
  }
  if (!status && b->threads) status = run(b);
done:
  free(b->threads);
  free(lens);
  free(b);
  return status;
}
