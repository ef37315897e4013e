/* The table. Each block names what it covers; numbers refer to the list of cases that must be tested.
 *
 * SPDX-License-Identifier: MIT
 */
#include "cases.h"

#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CAPACITY = 2048 };

static fkda_case table[CAPACITY];
static int count;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static const char *const group_names[FKDA_GROUPS] = {
#define GROUP_NAME(name, text) #name,
    FKDA_CASE_GROUP_LIST(GROUP_NAME)
#undef GROUP_NAME
};
static const char *const group_texts[FKDA_GROUPS] = {
#define GROUP_TEXT(name, text) text,
    FKDA_CASE_GROUP_LIST(GROUP_TEXT)
#undef GROUP_TEXT
};

const char *fkda_group_name(fkda_case_group group) {
  return group < FKDA_GROUPS ? group_names[group] : NULL;
}
const char *fkda_group_text(fkda_case_group group) {
  return group < FKDA_GROUPS ? group_texts[group] : NULL;
}

const char *fkda_dtype_short(int32_t dtype) {
  switch (dtype) {
    case FKDA_F32: return "f32";
    case FKDA_BF16: return "bf16";
    case FKDA_F16: return "f16";
    case FKDA_F64: return "f64";
    case FKDA_I32: return "i32";
    case FKDA_I64: return "i64";
    case FKDA_BOOL: return "bool";
    default: return "none";
  }
}

static const int32_t io_dtypes[] = {FKDA_F32, FKDA_BF16, FKDA_F16};

static fkda_dist normal(double mean, double deviation) {
  return (fkda_dist){FKDA_DIST_NORMAL, mean, deviation};
}
static fkda_dist uniform(double low, double high) {
  return (fkda_dist){FKDA_DIST_UNIFORM, low, high};
}
static fkda_dist constant(double value) { return (fkda_dist){FKDA_DIST_CONSTANT, value, 0}; }

/* A new case with the defaults: a small prefill, plain in every respect, gates of medium strength,
 * fp32 initial and final state. */
static fkda_case *add(fkda_case_group group, int number, int32_t io, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static fkda_case *add(fkda_case_group group, int number, int32_t io, const char *format, ...) {
  if (count == CAPACITY) abort(); /* CAPACITY is to be raised */
  fkda_case *c = &table[count];
  va_list list;
  int n = snprintf(c->name, sizeof c->name, "%s/", group_names[group]);
  va_start(list, format);
  n += vsnprintf(c->name + n, sizeof c->name - (size_t)n, format, list);
  va_end(list);
  snprintf(c->name + n, sizeof c->name - (size_t)n, "_%s", fkda_dtype_short(io));
  c->group = group;
  c->numbers[0] = number;
  c->seed = (uint64_t)++count;
  c->op = FKDA_OP_PREFILL;
  c->B = 1;
  c->T = 80;
  c->H = c->HV = 2;
  c->K = c->V = 64;
  c->io = c->g_dtype = c->beta_dtype = io;
  c->A_log_dtype = c->dt_bias_dtype = FKDA_F32;
  c->initial_dtype = c->final_dtype = FKDA_F32;
  c->checkpoint_dtype = FKDA_F32;
  c->index_dtype = FKDA_I64;
  c->gate = FKDA_GATE_BOUNDED;
  c->l2norm = c->beta_is_logit = true;
  c->lower_bound = -5;
  c->q = c->k = c->v = normal(0, 1);
  c->g = normal(-1, 1.5);
  c->beta = normal(0, 1.5);
  c->A_log = uniform(-0.7, 0.7);
  c->dt_bias = uniform(-2, 0.5);
  c->initial = normal(0, 1);
  c->write_state = true;
  c->nan_field = c->only = FKDA_FIELDS;
  return c;
}

/* K or V of a case that is not about sizes: odd ones in fp32, those that every backend has in bf16. */
static int64_t size_for(int32_t io, int64_t size) {
  return io != FKDA_BF16 ? size : size <= 64 ? 64 : 128;
}

static void direct(fkda_case *c, fkda_dist g) {
  c->gate = FKDA_GATE_DIRECT;
  c->A_log_dtype = c->dt_bias_dtype = FKDA_NONE;
  c->g = g;
}

/* ---- gate: 1 bounded over all ranges, 4 softplus, direct ---------------------------------------- */

static void gate_cases(void) {
  static const struct {
    const char *name;
    fkda_dist dist;
  } raws[] = {{"-8", {FKDA_DIST_CONSTANT, -8, 0}},     {"-4", {FKDA_DIST_CONSTANT, -4, 0}},
              {"0", {FKDA_DIST_CONSTANT, 0, 0}},       {"8", {FKDA_DIST_CONSTANT, 8, 0}},
              {"U(-8,8)", {FKDA_DIST_UNIFORM, -8, 8}}, {"N(0,8)", {FKDA_DIST_NORMAL, 0, 8}}},
    biases[] = {{"-8", {FKDA_DIST_CONSTANT, -8, 0}}, {"-4", {FKDA_DIST_CONSTANT, -4, 0}},
                {"0", {FKDA_DIST_CONSTANT, 0, 0}},   {"4", {FKDA_DIST_CONSTANT, 4, 0}},
                {"8", {FKDA_DIST_CONSTANT, 8, 0}},   {"U(-8,8)", {FKDA_DIST_UNIFORM, -8, 8}},
                {"N(0,8)", {FKDA_DIST_NORMAL, 0, 8}}},
    softs[] = {{"U(0,40)", {FKDA_DIST_UNIFORM, 0, 40}}, {"40", {FKDA_DIST_CONSTANT, 40, 0}},
               {"U(-8,8)", {FKDA_DIST_UNIFORM, -8, 8}}, {"N(0,8)", {FKDA_DIST_NORMAL, 0, 8}},
               {"-20", {FKDA_DIST_CONSTANT, -20, 0}},   {"switch", {FKDA_DIST_SWITCH, 40, -12}}},
    scales[] = {{"0", {FKDA_DIST_CONSTANT, 0, 0}},
                {"log16", {FKDA_DIST_CONSTANT, 2.772588722239781, 0}},
                {"U(0,log16)", {FKDA_DIST_UNIFORM, 0, 2.772588722239781}}},
    directs[] = {{"0", {FKDA_DIST_CONSTANT, 0, 0}},
                 {"U(-0.01,0)", {FKDA_DIST_UNIFORM, -0.01, 0}},
                 {"U(-1,0)", {FKDA_DIST_UNIFORM, -1, 0}},
                 {"U(-5,0)", {FKDA_DIST_UNIFORM, -5, 0}},
                 {"U(-60,0)", {FKDA_DIST_UNIFORM, -60, 0}},
                 {"-200", {FKDA_DIST_CONSTANT, -200, 0}}, /* the clamp */
                 {"0or-90", {FKDA_DIST_EITHER, 0, -90}},
                 {"switch", {FKDA_DIST_SWITCH, -1e-3, -90}}};
  static char labels[64][40];
  int label = 0;
  for (size_t i = 0; i < sizeof raws / sizeof raws[0]; i++) {
    snprintf(labels[label], sizeof labels[0], "bounded raw %s", raws[i].name);
    for (size_t j = 0; j < sizeof biases / sizeof biases[0]; j++) {
      for (int d = 0; d < 2; d++) {
        fkda_case *c = add(FKDA_GROUP_gate, 1, io_dtypes[d], "bounded_raw%s_bias%s", raws[i].name,
                           biases[j].name);
        c->range = labels[label];
        c->g = raws[i].dist;
        c->dt_bias = biases[j].dist;
        c->A_log = constant(0);
      }
    }
    label++;
  }
  for (size_t i = 0; i < sizeof softs / sizeof softs[0]; i++) {
    snprintf(labels[label], sizeof labels[0], "softplus raw %s", softs[i].name);
    for (size_t j = 0; j < sizeof scales / sizeof scales[0]; j++) {
      for (int d = 0; d < 3; d++) { /* fp32; bf16; bf16 with an fp32 gate */
        fkda_case *c = add(FKDA_GROUP_gate, 4, io_dtypes[d > 0], "softplus_raw%s_A%s%s",
                           softs[i].name, scales[j].name, d == 2 ? "_g32" : "");
        c->range = labels[label];
        c->gate = FKDA_GATE_SOFTPLUS;
        c->g = softs[i].dist;
        c->A_log = scales[j].dist;
        c->dt_bias = uniform(-1, 1);
        if (d == 2) c->g_dtype = FKDA_F32;
      }
    }
    label++;
  }
  for (size_t i = 0; i < sizeof directs / sizeof directs[0]; i++) {
    snprintf(labels[label], sizeof labels[0], "direct %s", directs[i].name);
    for (int d = 0; d < 3; d++) {
      fkda_case *c = add(FKDA_GROUP_gate, 4, io_dtypes[d > 0], "direct%s%s", directs[i].name,
                         d == 2 ? "_g32" : "");
      c->range = labels[label];
      direct(c, directs[i].dist);
      if (d == 2) c->g_dtype = FKDA_F32;
    }
    label++;
  }
  for (size_t i = 0; i < 2; i++) { /* fp16 */
    fkda_case *c = add(FKDA_GROUP_gate, 1, FKDA_F16, "bounded_raw%s_bias0", raws[4 + i].name);
    c->range = i ? "bounded raw N(0,8)" : "bounded raw U(-8,8)";
    c->g = raws[4 + i].dist;
    c->dt_bias = constant(0);
  }
  for (int d = 0; d < 3; d++) { /* other bounds */
    fkda_case *c = add(FKDA_GROUP_gate, 1, io_dtypes[d], "bounded_lb-1");
    c->range = "bounded lb -1";
    c->lower_bound = -1;
    c = add(FKDA_GROUP_gate, 1, io_dtypes[d], "bounded_lb-0.01");
    c->range = "bounded lb -0.01";
    c->lower_bound = -0.01;
  }
}

/* ---- numbers: 2 collinear keys, 3 weak decay, 5 extreme values, 7 asymmetric data ------------------ */

static void collinear(fkda_case *c) {
  c->H = c->HV = 1;
  c->q_is_k = true;
  c->k = (fkda_dist){FKDA_DIST_REPEAT, 0, 1};
  c->v = (fkda_dist){FKDA_DIST_TILE16, 0, 1};
  c->g = constant(-12);
  c->beta = constant(8);
  c->A_log_dtype = c->dt_bias_dtype = FKDA_NONE;
  c->initial_dtype = FKDA_NONE;
}

static void number_cases(void) {
  for (int d = 0; d < 2; d++) {
    fkda_case *c = add(FKDA_GROUP_numbers, 2, io_dtypes[d], "collinear_T16384");
    collinear(c);
    c->T = 16384;
    c->range = "collinear keys";
    /* The state is v k^T and hardly decays, so rounding across k is never corrected, and the same
     * rounding, every 16 tokens again, adds up to 1e-4 in fp32 (docs/kernels/cpu.md). */
    c->same_precision = true;
    c = add(FKDA_GROUP_numbers, 2, io_dtypes[d], "collinear_weak_decay_T16384");
    collinear(c);
    c->T = 16384;
    c->g = normal(-7, 0.5); /* about -5e-3 a token */
    c->range = "collinear keys";
    c = add(FKDA_GROUP_numbers, 3, io_dtypes[d], "weak_decay_T65536");
    c->H = c->HV = 1;
    c->T = 65536;
    c->g = normal(-8.55, 0.25); /* mean -1e-3 a token */
    c->A_log = constant(0);
    c->dt_bias_dtype = FKDA_NONE;
    c->range = "weak decay -1e-3";
  }
  for (int d = 0; d < 3; d++) {
    fkda_case *c = add(FKDA_GROUP_numbers, 2, io_dtypes[d], "collinear_D128");
    collinear(c);
    c->T = 400;
    c->K = c->V = 128;
    c->range = "collinear keys";
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "beta_0_and_1");
    c->beta_is_logit = false;
    c->beta = (fkda_dist){FKDA_DIST_EITHER, 0, 1};
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "beta_0");
    c->beta_is_logit = false;
    c->beta = constant(0);
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "beta_1");
    c->beta_is_logit = false;
    c->beta = constant(1);
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "beta_logit_extremes");
    c->beta = (fkda_dist){FKDA_DIST_EITHER, 120, -120};
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "neg_eigval_logit");
    c->allow_neg_eigval = true;
    c->beta = normal(1, 3);
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "neg_eigval_beta");
    c->allow_neg_eigval = true;
    c->beta_is_logit = false;
    c->beta = uniform(0, 1);
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "zero_k");
    c->k = constant(0);
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "zero_q");
    c->q = constant(0);
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "some_zero_qk");
    c->q = c->k = (fkda_dist){FKDA_DIST_SPARSE, 0, 1};
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "zero_k_no_norm");
    c->l2norm = false;
    c->k = constant(0);
    c->q = (fkda_dist){FKDA_DIST_UNIT, 0.9, 0};
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "all_zero");
    c->q = c->k = c->v = constant(0);
    c->initial_dtype = FKDA_NONE;
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "zero_v");
    c->v = constant(0);
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "tiny_qk");
    c->q = c->k = normal(0, 1e-3); /* the 1e-6 of (1) counts */
    c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "large_qk");
    c->q = c->k = normal(0, 300);
    if (io_dtypes[d] != FKDA_F16) {
      c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "huge_v");
      c->v = normal(0, 1e30);
      c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "huge_v_strong_gate");
      c->v = normal(0, 1e30);
      c->g = constant(8);
      c->initial_dtype = FKDA_NONE;
      c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "huge_v_direct_gate");
      direct(c, (fkda_dist){FKDA_DIST_SWITCH, -0.5, -90});
      c->v = normal(0, 1e30);
    }
    for (int layout = 0; layout < 2; layout++) {
      for (int wide = 0; wide < 3; wide++) {
        static const int64_t dims[3][2] = {{64, 64}, {128, 64}, {64, 128}};
        c = add(FKDA_GROUP_numbers, 7, io_dtypes[d], "asymmetric_%s_K%d_V%d", layout ? "kv" : "vk",
                (int)dims[wide][0], (int)dims[wide][1]);
        c->layout = layout ? FKDA_STATE_KV : FKDA_STATE_VK;
        c->K = dims[wide][0];
        c->V = dims[wide][1];
        c->T = 50;
        c->q = c->k = c->v = c->initial = (fkda_dist){FKDA_DIST_RAMP, 0, 1};
      }
    }
  }
}

/* ---- options: 6 every combination; dtypes of gate, beta, parameters; scale --------------------------- */

static void option_cases(void) {
  static const char *const gates[] = {"bounded", "softplus", "direct"};
  for (int bits = 0; bits < 3 * 16; bits++) {
    const int gate = bits / 16, l2norm = bits & 1, logit = bits >> 1 & 1, A = bits >> 2 & 1,
              bias = bits >> 3 & 1;
    if (gate == FKDA_GATE_DIRECT && (A || bias)) continue; /* must be absent there */
    for (int d = 0; d < 2; d++) {
      fkda_case *c =
          add(FKDA_GROUP_options, 6, io_dtypes[d], "%s%s%s%s%s", gates[gate],
              l2norm ? "_l2norm" : "", logit ? "_logit" : "", A ? "_A" : "", bias ? "_bias" : "");
      c->B = 2;
      c->T = 37;
      c->K = size_for(c->io, 32);
      c->V = size_for(c->io, 48);
      c->gate = (fkda_gate)gate;
      c->l2norm = l2norm;
      c->beta_is_logit = logit;
      if (!l2norm) c->q = c->k = (fkda_dist){FKDA_DIST_UNIT, 0.9, 0};
      if (!logit) c->beta = uniform(0, 1);
      if (!A) c->A_log_dtype = FKDA_NONE;
      if (!bias) c->dt_bias_dtype = FKDA_NONE;
      if (gate == FKDA_GATE_DIRECT) direct(c, uniform(-3, 0));
    }
  }
  for (int d = 0; d < 3; d++) {
    fkda_case *c = add(FKDA_GROUP_options, 6, io_dtypes[d], "A_log_bf16_dt_bias_bf16");
    c->A_log_dtype = c->dt_bias_dtype = FKDA_BF16;
    c = add(FKDA_GROUP_options, 6, io_dtypes[d], "A_log_bf16");
    c->A_log_dtype = FKDA_BF16;
    c = add(FKDA_GROUP_options, 6, io_dtypes[d], "scale_1");
    c->scale = 1;
    c = add(FKDA_GROUP_options, 6, io_dtypes[d], "scale_negative");
    c->scale = -0.25;
    if (d) {
      c = add(FKDA_GROUP_options, 6, io_dtypes[d], "g_f32");
      c->g_dtype = FKDA_F32;
      c = add(FKDA_GROUP_options, 6, io_dtypes[d], "beta_f32");
      c->beta_dtype = FKDA_F32;
      c = add(FKDA_GROUP_options, 6, io_dtypes[d], "g_f32_beta_f32_direct");
      direct(c, uniform(-2, 0));
      c->g_dtype = c->beta_dtype = FKDA_F32;
      c->beta_is_logit = false;
      c->beta = uniform(0, 1);
    }
    c = add(FKDA_GROUP_options, 6, io_dtypes[d], "no_states");
    c->initial_dtype = c->final_dtype = FKDA_NONE;
    c = add(FKDA_GROUP_options, 6, io_dtypes[d], "no_initial_state");
    c->initial_dtype = FKDA_NONE;
    c = add(FKDA_GROUP_options, 6, io_dtypes[d], "no_final_state");
    c->final_dtype = FKDA_NONE;
    c = add(FKDA_GROUP_options, 6, io_dtypes[d], "batch_invariant");
    c->batch_invariant = true;
    c->B = 3;
  }
}

/* ---- shapes: 8 -------------------------------------------------------------------------------------- */

static void shape_cases(void) {
  static const int64_t lengths[] = {0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000};
  for (int d = 0; d < 2; d++) {
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
      fkda_case *c = add(FKDA_GROUP_shapes, 8, io_dtypes[d], "T%d", (int)lengths[i]);
      c->T = lengths[i];
      c->numbers[1] = 20;
    }
    fkda_case *c = add(FKDA_GROUP_shapes, 8, io_dtypes[d], "T8192_D128");
    c->T = 8192;
    c->H = c->HV = 1;
    c->K = c->V = 128;
  }
  static const struct {
    int64_t B, T, H, HV, K, V;
  } shapes[] = {
      {1, 40, 1, 1, 128, 128}, {1, 40, 2, 2, 64, 128},    {1, 40, 2, 2, 128, 64},
      {8, 19, 3, 3, 64, 64},   {5, 33, 1, 1, 64, 64},     {0, 16, 2, 2, 64, 64},
      {1, 17, 96, 96, 64, 64}, {1, 20, 12, 12, 128, 128}, {2, 50, 2, 4, 64, 64},
      {1, 35, 2, 8, 64, 64},   {1, 18, 24, 96, 64, 64},   {2, 21, 3, 6, 128, 128},
      {1, 34, 1, 4, 128, 64},  {1, 40, 1, 1, 1, 1},       {1, 40, 2, 2, 1, 64},
      {1, 40, 2, 2, 64, 1},    {1, 40, 2, 4, 5, 5},       {2, 37, 1, 2, 24, 96},
      {1, 40, 2, 2, 96, 24},   {1, 37, 1, 1, 200, 200},   {1, 40, 1, 1, 256, 256},
      {1, 40, 1, 1, 256, 1},   {1, 33, 2, 2, 5, 256},     {1, 20, 2, 2, 127, 129},
      {1, 66, 1, 2, 65, 33},   {1, 33, 1, 1, 16, 16},     {1, 33, 1, 1, 8, 17},
      {1, 20, 5, 5, 48, 31},   {1, 300, 1, 1, 128, 128},  {3, 48, 2, 2, 7, 130},
  };
  for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
    for (int d = 0; d < 3; d++) {
      if (d == 2 && i % 4) continue; /* fp16: every fourth */
      fkda_case *c = add(FKDA_GROUP_shapes, 8, io_dtypes[d], "B%d_T%d_H%d_HV%d_K%d_V%d",
                         (int)shapes[i].B, (int)shapes[i].T, (int)shapes[i].H, (int)shapes[i].HV,
                         (int)shapes[i].K, (int)shapes[i].V);
      c->B = shapes[i].B;
      c->T = shapes[i].T;
      c->H = shapes[i].H;
      c->HV = shapes[i].HV;
      c->K = shapes[i].K;
      c->V = shapes[i].V;
      c->numbers[1] = 20;
      c->layout = i % 3 == 1 ? FKDA_STATE_KV : FKDA_STATE_VK;
    }
  }
}

/* ---- ragged: 9 ------------------------------------------------------------------------------------ */

static void ragged(fkda_case *c, const int64_t *lens, int64_t lens_count) {
  c->lens = lens;
  c->lens_count = lens_count;
}

static const int64_t mixed_lens[] = {0, 37, 0, 0, 16, 1, 64, 0, 5, 100, 0};

/* More sequences without work than a GPU has blocks, several times over. */
enum { MANY = 1100 };

/* Slot -1 for nearly all of them. */
static void many_skipped(fkda_case *c) {
  c->H = c->HV = 1;
  c->K = c->V = size_for(c->io, 16);
  c->initial_dtype = c->final_dtype = c->io;
  c->slots = FKDA_SLOTS_PERMUTED;
  c->index_dtype = FKDA_I32;
  c->skip_every = -(MANY / 2);
}

static void ragged_cases(void) {
  static int64_t ones[300], one_long[41], few[MANY];
  static const int64_t empty_lens[] = {0, 0, 0}, single[] = {45}, leading[] = {0, 0, 33},
                       trailing[] = {33, 0, 0}, middle[] = {20, 0, 33},
                       in_a_row[] = {20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 33, 0, 0, 0,
                                     0,  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  1, 17};
  for (int i = 0; i < 300; i++) ones[i] = 1;
  one_long[0] = 700;
  for (int i = 1; i < 41; i++) one_long[i] = (i * 7) % 38;
  few[0] = 20, few[MANY / 2] = 33, few[MANY / 2 + 1] = 1, few[MANY - 1] = 17;
  static const struct {
    const char *name;
    const int64_t *lens;
    int64_t count, tail;
  } rows[] = {
      {"mixed", mixed_lens, 11, 0},
      {"mixed_tail", mixed_lens, 11, 23},
      {"ones", ones, 300, 0},
      {"one_long", one_long, 41, 0},
      {"all_empty", empty_lens, 3, 0},
      {"all_empty_tail", empty_lens, 3, 20},
      {"no_sequence", empty_lens, 0, 20},
      {"single", single, 1, 0},
      {"leading_empty", leading, 3, 0},
      {"trailing_empty", trailing, 3, 5},
      {"middle_empty", middle, 3, 0},
      {"empty_in_a_row", in_a_row, sizeof in_a_row / sizeof in_a_row[0], 0},
  };
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
    for (int d = 0; d < 2; d++) {
      for (int index = 0; index < 2; index++) {
        fkda_case *c =
            add(FKDA_GROUP_ragged, 9, io_dtypes[d], "%s_%s", rows[i].name, index ? "i32" : "i64");
        ragged(c, rows[i].lens, rows[i].count);
        c->tail = rows[i].tail;
        c->index_dtype = index ? FKDA_I32 : FKDA_I64;
        if (index) c->initial_dtype = FKDA_NONE;
        c->K = size_for(c->io, i % 2 ? 64 : 32);
        c->V = size_for(c->io, i % 3 ? 32 : 96);
        c->numbers[1] = 20;
        c->numbers[2] = 21;
      }
    }
  }
  for (int d = 0; d < 2; d++) { /* two states a sequence: small ones */
    fkda_case *c = add(FKDA_GROUP_ragged, 9, io_dtypes[d], "many_empty");
    ragged(c, few, MANY);
    c->H = c->HV = 1;
    c->K = c->V = size_for(c->io, 16);
    c->initial_dtype = FKDA_NONE;
    c->final_dtype = c->io;
    c = add(FKDA_GROUP_ragged, 9, io_dtypes[d], "many_skipped");
    many_skipped(c);
    ragged(c, few, MANY);
    c->tail = 5;
  }
  /* Continuous batching: decode rows beside chunks of prompts, states in a pool that is worked on in
   * place; every second sequence is new. */
  for (int d = 0; d < 2; d++) {
    for (int layout = 0; layout < 2; layout++) {
      static const int64_t serving[] = {1, 1, 64, 1, 0, 1, 33, 1, 1, 128, 1, 17, 1, 1, 1};
      fkda_case *c =
          add(FKDA_GROUP_ragged, 9, io_dtypes[d], "decode_rows_%s", layout ? "kv" : "vk");
      ragged(c, serving, 15);
      c->numbers[1] = 15;
      c->K = c->V = layout ? 64 : 128;
      c->HV = 4;
      c->layout = (fkda_state_layout)layout;
      c->slots = FKDA_SLOTS_PERMUTED;
      c->skip_every = 5;
      c->has_initial = c->batch_invariant = true;
      c->index_dtype = FKDA_I32;
      c->claims = FKDA_CLAIM_ALONE | FKDA_CLAIM_TWICE;
    }
  }
  for (int d = 0; d < 3; d++) {
    fkda_case *c = add(FKDA_GROUP_ragged, 9, io_dtypes[d], "mixed_gva_kv");
    ragged(c, mixed_lens, 11);
    c->HV = 4;
    c->layout = FKDA_STATE_KV;
    c = add(FKDA_GROUP_ragged, 9, io_dtypes[d], "mixed_softplus");
    ragged(c, mixed_lens, 11);
    c->gate = FKDA_GATE_SOFTPLUS;
    c->has_initial = true;
  }
}

/* ---- strides: 10 ---------------------------------------------------------------------------------- */

static void stride_cases(void) {
  static const char *const names[] = {"contiguous", "fused",     "padded",
                                      "head_major", "broadcast", "misaligned"};
  for (int kind = FKDA_STRIDES_FUSED; kind <= FKDA_STRIDES_MISALIGNED; kind++) {
    for (int d = 0; d < 3; d++) {
      fkda_case *c = add(FKDA_GROUP_strides, 10, io_dtypes[d], "%s", names[kind]);
      c->strides = (fkda_strides)kind;
      c->B = 2;
      c->T = 53;
      c->HV = 4;
      c->numbers[1] = 20;
      c->numbers[2] = 21;
      c = add(FKDA_GROUP_strides, 10, io_dtypes[d], "%s_odd", names[kind]);
      c->strides = (fkda_strides)kind;
      c->B = 2;
      c->T = 29;
      c->H = c->HV = 3;
      c->K = 37;
      c->V = 51;
      c->layout = FKDA_STATE_KV;
      c->numbers[1] = 20;
    }
  }
  for (int d = 0; d < 2; d++) {
    fkda_case *c = add(FKDA_GROUP_strides, 10, io_dtypes[d], "fused_ragged_g32");
    c->strides = FKDA_STRIDES_FUSED;
    ragged(c, mixed_lens, 11);
    c->g_dtype = FKDA_F32;
    c->tail = 7;
    c = add(FKDA_GROUP_strides, 10, io_dtypes[d], "padded_pool");
    c->strides = FKDA_STRIDES_PADDED;
    ragged(c, mixed_lens, 11);
    c->slots = FKDA_SLOTS_PERMUTED;
    c = add(FKDA_GROUP_strides, 10, io_dtypes[d], "padded_checkpoints");
    c->strides = FKDA_STRIDES_PADDED;
    ragged(c, mixed_lens, 11);
    c->marks = FKDA_MARKS_OFFSETS;
    c->every = 16;
  }
}

/* ---- indices: 12 ------------------------------------------------------------------------------------ */

static const char *const slot_names[] = {"none",
                                         "permuted",
                                         "apart",
                                         "initial_only",
                                         "final_only",
                                         "two_pools",
                                         "out_of_range",
                                         "negative",
                                         "2d",
                                         "2d_apart",
                                         "one_tensor",
                                         "2d_one_tensor",
                                         "out_of_range_2d",
                                         "out_of_range_counts"};

static void index_cases(void) {
  for (int slots = FKDA_SLOTS_PERMUTED; slots <= FKDA_SLOTS_NEGATIVE; slots++) {
    for (int variant = 0; variant < 4; variant++) {
      static const char *const variants[] = {"", "_skip", "_has_initial", "_skip_has_initial"};
      for (int d = 0; d < 2; d++) {
        const bool bad = slots == FKDA_SLOTS_OUT_OF_RANGE || slots == FKDA_SLOTS_NEGATIVE;
        if (bad && variant) continue;
        fkda_case *c =
            add(FKDA_GROUP_indices, 12, io_dtypes[d], "%s%s", slot_names[slots], variants[variant]);
        c->slots = (fkda_slots)slots;
        c->skip_every = variant & 1 ? 3 : 0;
        c->has_initial = variant >= 2;
        c->index_dtype = d ? FKDA_I32 : FKDA_I64;
        c->K = size_for(c->io, 32);
        c->V = 64;
        c->layout = variant == 2 ? FKDA_STATE_KV : FKDA_STATE_VK;
        if (slots % 2) {
          ragged(c, mixed_lens, 11);
        } else {
          c->B = 7;
          c->T = 33;
        }
      }
    }
  }
  for (int d = 0; d < 2; d++) {
    fkda_case *c = add(FKDA_GROUP_indices, 12, io_dtypes[d], "has_initial_nan_slot");
    c->B = 4;
    c->has_initial = true;
    c = add(FKDA_GROUP_indices, 12, io_dtypes[d], "has_initial_in_place");
    c->B = 4;
    c->has_initial = c->in_place = true;
    c = add(FKDA_GROUP_indices, 12, io_dtypes[d], "bf16_pool");
    ragged(c, mixed_lens, 11);
    c->slots = FKDA_SLOTS_PERMUTED;
    c->skip_every = 4;
    c->initial_dtype = c->final_dtype = FKDA_BF16;
  }
}

/* ---- states: 13 ------------------------------------------------------------------------------------- */

static void state_cases(void) {
  static const int32_t kinds[] = {FKDA_NONE, FKDA_F32, FKDA_BF16};
  for (int d = 0; d < 2; d++) {
    for (int layout = 0; layout < 2; layout++) {
      const char *name = layout ? "kv" : "vk";
      for (int i = 0; i < 3; i++) {
        for (int j = 0; j < 3; j++) {
          fkda_case *c = add(FKDA_GROUP_states, 13, io_dtypes[d], "%s_%s_to_%s", name,
                             fkda_dtype_short(kinds[i]), fkda_dtype_short(kinds[j]));
          c->layout = (fkda_state_layout)layout;
          c->initial_dtype = kinds[i];
          c->final_dtype = kinds[j];
          c->K = size_for(c->io, 32);
          c->T = 40;
          c->initial = (fkda_dist){FKDA_DIST_RAMP, 0, 1};
          c->B = 2;
        }
      }
      for (int i = 1; i < 3; i++) {
        fkda_case *c = add(FKDA_GROUP_states, 13, io_dtypes[d], "%s_in_place_%s", name,
                           fkda_dtype_short(kinds[i]));
        c->layout = (fkda_state_layout)layout;
        c->initial_dtype = c->final_dtype = kinds[i];
        c->in_place = true;
        c->V = size_for(c->io, 96);
        c->T = 40;
        c->B = 3;
      }
    }
  }
}

/* ---- checkpoints: 17 and the forms of the contract -------------------------------------------------- */

static const int64_t checkpoint_lens[] = {64, 0, 100, 15, 48, 16};

static void checkpoint_cases(void) {
  static const char *const names[] = {"none", "offsets", "packed", "every", "before", "one"};
  static const int32_t kinds[] = {FKDA_F32, FKDA_BF16, FKDA_F16};
  for (int d = 0; d < 2; d++) {
    for (int marks = FKDA_MARKS_OFFSETS; marks <= FKDA_MARKS_ONE; marks++) {
      const bool prefix = marks != FKDA_MARKS_PACKED && marks != FKDA_MARKS_ONE;
      for (int variant = 0; variant < 6; variant++) {
        const int32_t kind = kinds[variant % 3];
        const bool slots = variant >= 3;
        fkda_case *c = add(FKDA_GROUP_checkpoints, 17, io_dtypes[d], "%s_to_%s%s", names[marks],
                           fkda_dtype_short(kind), slots ? "_slots" : "");
        ragged(c, checkpoint_lens, 6);
        c->marks = (fkda_marks)marks;
        c->every = variant % 2 ? 32 : 16;
        c->checkpoint_dtype = kind;
        c->checkpoint_slots = slots;
        c->index_dtype = variant % 2 ? FKDA_I32 : FKDA_I64;
        c->K = size_for(c->io, 32);
        c->HV = 4;
        c->layout = variant == 1 ? FKDA_STATE_KV : FKDA_STATE_VK;
        if (variant == 2) c->initial_dtype = FKDA_NONE;
        if (variant == 4) c->final_dtype = FKDA_NONE;
        if (kind == FKDA_F32 && !slots && prefix) c->claims = FKDA_CLAIM_PREFIX;
      }
      fkda_case *c = add(FKDA_GROUP_checkpoints, 17, io_dtypes[d], "%s_batch", names[marks]);
      c->B = 3;
      c->T = 70;
      c->marks = (fkda_marks)marks;
      c->every = 16;
      c->K = c->V = 128;
      if (prefix) c->claims = FKDA_CLAIM_PREFIX;
      c = add(FKDA_GROUP_checkpoints, 17, io_dtypes[d], "%s_skipped", names[marks]);
      ragged(c, checkpoint_lens, 6);
      c->marks = (fkda_marks)marks;
      c->every = 32;
      c->slots = FKDA_SLOTS_PERMUTED;
      c->skip_every = 3;
    }
  }
}

/* ---- invariance: 14, 15, 16, 19 --------------------------------------------------------------------- */

static void invariance_cases(void) {
  static const char *const gates[] = {"bounded", "softplus", "direct", "weak"};
  for (int d = 0; d < 3; d++) {
    for (int gate = 0; gate < 4; gate++) {
      if (d == 2 && gate) continue;
      for (int wide = 0; wide < 2; wide++) {
        fkda_case *c = add(FKDA_GROUP_invariance, 14, io_dtypes[d], "split_%s_D%d", gates[gate],
                           wide ? 128 : 64);
        c->numbers[1] = 16;
        c->numbers[2] = 19;
        c->B = 2;
        c->T = 203;
        c->HV = wide ? 2 : 4;
        c->K = c->V = wide ? 128 : 64;
        c->claims = FKDA_CLAIM_SPLIT | FKDA_CLAIM_FUTURE | FKDA_CLAIM_TWICE;
        if (gate == FKDA_GATE_SOFTPLUS) {
          c->gate = FKDA_GATE_SOFTPLUS;
          c->g = normal(0, 6);
        } else if (gate == FKDA_GATE_DIRECT) {
          direct(c, uniform(-3, 0));
        } else if (gate == 3) {
          c->dt_bias = constant(-8);
        }
        c = add(FKDA_GROUP_invariance, 15, io_dtypes[d], "alone_%s_D%d", gates[gate],
                wide ? 128 : 64);
        ragged(c, mixed_lens, 11);
        c->K = c->V = wide ? 128 : 64;
        c->batch_invariant = true;
        c->claims = FKDA_CLAIM_ALONE | FKDA_CLAIM_TWICE;
        if (gate == FKDA_GATE_SOFTPLUS) {
          c->gate = FKDA_GATE_SOFTPLUS;
          c->g = normal(0, 6);
        } else if (gate == FKDA_GATE_DIRECT) {
          direct(c, (fkda_dist){FKDA_DIST_SWITCH, -0.1, -80});
        } else if (gate == 3) {
          c->dt_bias = constant(-8);
        }
      }
    }
    fkda_case *c = add(FKDA_GROUP_invariance, 14, io_dtypes[d], "split_bf16_start_kv");
    c->T = 100;
    c->layout = FKDA_STATE_KV;
    c->initial_dtype = FKDA_BF16;
    c->claims = FKDA_CLAIM_SPLIT;
    c = add(FKDA_GROUP_invariance, 14, io_dtypes[d], "split_odd_sizes");
    c->T = 70;
    c->K = 37;
    c->V = 51;
    c->H = c->HV = 3;
    c->claims = FKDA_CLAIM_SPLIT | FKDA_CLAIM_FUTURE;
    c = add(FKDA_GROUP_invariance, 14, io_dtypes[d], "split_strided");
    c->strides = FKDA_STRIDES_PADDED;
    c->B = 3;
    c->T = 70;
    c->claims = FKDA_CLAIM_SPLIT | FKDA_CLAIM_FUTURE | FKDA_CLAIM_TWICE;
    c = add(FKDA_GROUP_invariance, 15, io_dtypes[d], "alone_batch_gva");
    c->B = 5;
    c->T = 50;
    c->HV = 8;
    c->batch_invariant = true;
    c->claims = FKDA_CLAIM_ALONE;
    c = add(FKDA_GROUP_invariance, 16, io_dtypes[d], "future_switching_gate");
    direct(c, (fkda_dist){FKDA_DIST_SWITCH, -0.2, -70});
    c->T = 150;
    c->B = 2;
    c->claims = FKDA_CLAIM_FUTURE;
  }
}

/* ---- nan: 18 ---------------------------------------------------------------------------------------- */

static void nan_cases(void) {
  static const fkda_field fields[] = {FKDA_FIELD_q, FKDA_FIELD_k, FKDA_FIELD_v, FKDA_FIELD_g,
                                      FKDA_FIELD_beta};
  for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
    for (int d = 0; d < 2; d++) {
      for (int variant = 0; variant < 3; variant++) {
        static const char *const names[] = {"batch", "ragged", "gva_direct"};
        fkda_case *c = add(FKDA_GROUP_nan, 18, io_dtypes[d], "%s_%s", fkda_field_name(fields[i]),
                           names[variant]);
        c->H = c->HV = 3;
        c->nan_field = fields[i];
        c->nan_head = 1;
        c->nan_token = 38;
        if (variant == 1) {
          static const int64_t lens[] = {30, 0, 60, 17, 33};
          ragged(c, lens, 5);
          c->nan_sequence = 2;
        } else {
          c->B = 3;
          c->T = 60;
          c->nan_sequence = 1;
        }
        if (variant == 2) {
          c->HV = 6;
          c->K = c->V = size_for(c->io, 32);
          direct(c, uniform(-2, 0));
        }
      }
    }
  }
}

/* ---- decode ----------------------------------------------------------------------------------------- */

static fkda_case *add_decode(fkda_case_group group, int number, int32_t io, const char *name,
                             int suffix) {
  fkda_case *c = add(group, number, io, "%s%d", name, suffix);
  c->op = FKDA_OP_DECODE;
  c->B = 5;
  c->T = 1;
  c->final_dtype = FKDA_NONE; /* one pool, of initial_dtype */
  c->numbers[1] = 20;
  return c;
}

static void decode_cases(void) {
  static const char *const gates[] = {"bounded_T", "softplus_T", "direct_T"};
  static const int32_t pools[] = {FKDA_F32, FKDA_BF16};
  for (int d = 0; d < 3; d++) {
    const int32_t io = io_dtypes[d];
    for (int T = 1; T <= 8; T++) {
      for (int gate = 0; gate < 3; gate++) {
        fkda_case *c = add_decode(FKDA_GROUP_decode, 8, io, gates[gate], T);
        c->T = T;
        c->gate = (fkda_gate)gate;
        if (gate == FKDA_GATE_DIRECT) direct(c, uniform(-3, 0));
        c->claims = FKDA_CLAIM_TWICE | FKDA_CLAIM_STEPS;
        c->HV = T % 2 ? 2 : 4;
        c->K = T % 3 ? 64 : 128;
        c->V = T % 4 ? 64 : 128;
      }
    }
    for (int layout = 0; layout < 2; layout++) {
      for (int pool = 0; pool < 2; pool++) {
        for (int slots = FKDA_SLOTS_NONE; slots <= FKDA_SLOTS_2D_ACCEPTED; slots++) {
          const bool two = fkda_slots_2d((fkda_slots)slots),
                     bad = fkda_slots_bad((fkda_slots)slots);
          if (slots == FKDA_SLOTS_INITIAL_ONLY || slots == FKDA_SLOTS_FINAL_ONLY ||
              slots == FKDA_SLOTS_TWO_POOLS)
            continue;
          if (d == 2 && (layout || pool)) continue;
          char name[FKDA_CASE_NAME];
          snprintf(name, sizeof name, "%s_%s_%s_T", slot_names[slots], layout ? "kv" : "vk",
                   fkda_dtype_short(pools[pool]));
          fkda_case *c = add_decode(FKDA_GROUP_decode, 12, io, name, two ? 3 : 1 + slots % 3);
          c->T = two ? 3 : 1 + slots % 3;
          c->M = two ? 4 : 0;
          c->B = 7;
          c->slots = (fkda_slots)slots;
          c->layout = (fkda_state_layout)layout;
          c->initial_dtype = pools[pool];
          c->index_dtype = (layout ^ pool) ? FKDA_I32 : FKDA_I64;
          c->skip_every = slots == FKDA_SLOTS_NONE || (two && bad) ? 0 : 3;
          c->has_initial = pool;
          c->initial = (fkda_dist){FKDA_DIST_RAMP, 0, 1};
          c->K = 64;
          if (!bad) c->claims = FKDA_CLAIM_ALONE;
          if (two && !bad) c->claims |= FKDA_CLAIM_VERIFY;
          if (pools[pool] == FKDA_F32 && !bad && slots != FKDA_SLOTS_2D_APART) /* all are stored */
            c->claims |= FKDA_CLAIM_STEPS;
          c->V = size_for(c->io, 32);
        }
      }
    }
    if (d < 2) {
      fkda_case *c = add_decode(FKDA_GROUP_decode, 12, io, "many_skipped_T", 1);
      many_skipped(c);
      c->B = MANY;
      c->final_dtype = FKDA_NONE;
    }
    for (int i = 0; i < 8; i++) { /* states read from a tensor of their own */
      static const fkda_slots kinds[] = {FKDA_SLOTS_NONE, FKDA_SLOTS_TWO_POOLS, FKDA_SLOTS_PERMUTED,
                                         FKDA_SLOTS_2D};
      const bool kv = i % 2;
      char name[FKDA_CASE_NAME];
      snprintf(name, sizeof name, "initial_%s_%s_T", slot_names[kinds[i / 2]], kv ? "kv" : "vk");
      fkda_case *c = add_decode(FKDA_GROUP_decode, 12, io, name, 1 + i % 3);
      c->T = 1 + i % 3;
      c->M = kinds[i / 2] == FKDA_SLOTS_2D ? 4 : 0;
      c->B = 6;
      c->slots = kinds[i / 2];
      c->layout = kv ? FKDA_STATE_KV : FKDA_STATE_VK;
      c->initial_dtype = i % 3 ? FKDA_F32 : FKDA_BF16;
      c->final_dtype = i < 5 ? FKDA_F32 : FKDA_BF16;
      c->index_dtype = i % 3 == 1 ? FKDA_I32 : FKDA_I64;
      c->skip_every = kinds[i / 2] == FKDA_SLOTS_NONE ? 0 : 4;
      c->has_initial = i % 4 == 0;
      c->K = kv ? 128 : 64;
      c->V = kv ? 64 : 128;
      c->write_state = i != 4;
    }
    static const int64_t dims[][2] = {{128, 128}, {1, 1},    {5, 200}, {24, 96},
                                      {256, 256}, {127, 33}, {64, 1},  {200, 5}};
    for (size_t i = 0; i < sizeof dims / sizeof dims[0]; i++) {
      char name[FKDA_CASE_NAME];
      snprintf(name, sizeof name, "K%d_V", (int)dims[i][0]);
      fkda_case *c = add_decode(FKDA_GROUP_decode, 8, io, name, (int)dims[i][1]);
      c->K = dims[i][0];
      c->V = dims[i][1];
      c->T = 2;
      c->B = 2;
      c->HV = i % 2 ? 4 : 2;
      c->layout = i % 3 == 2 ? FKDA_STATE_KV : FKDA_STATE_VK;
    }
    for (int kind = FKDA_STRIDES_FUSED; kind <= FKDA_STRIDES_MISALIGNED; kind++) {
      fkda_case *c = add_decode(FKDA_GROUP_decode, 10, io, "strides", kind);
      c->strides = (fkda_strides)kind;
      c->T = 3;
      c->slots = FKDA_SLOTS_PERMUTED;
      c->layout = kind % 2 ? FKDA_STATE_KV : FKDA_STATE_VK;
      c->claims = FKDA_CLAIM_ALONE | FKDA_CLAIM_STEPS;
      c = add_decode(FKDA_GROUP_decode, 10, io, "strides_2d", kind);
      c->strides = (fkda_strides)kind;
      c->T = 4;
      c->M = 5;
      c->slots = FKDA_SLOTS_2D;
      c->layout = kind % 2 ? FKDA_STATE_VK : FKDA_STATE_KV;
      c->claims = FKDA_CLAIM_VERIFY;
    }
    static const struct {
      const char *name;
      fkda_gate gate;
      int64_t M, H, HV, K, V;
    } drafts[] = {{"draft_bounded", FKDA_GATE_BOUNDED, 8, 1, 2, 128, 128},
                  {"draft_softplus", FKDA_GATE_SOFTPLUS, 9, 2, 2, 128, 64},
                  {"draft_direct", FKDA_GATE_DIRECT, 8, 1, 3, 64, 128}};
    for (size_t i = 0; i < sizeof drafts / sizeof drafts[0] && d < 2; i++) {
      for (int variant = 0; variant < 4; variant++) {
        char name[FKDA_CASE_NAME];
        snprintf(name, sizeof name, "%s_%s_%s_T", drafts[i].name, variant & 1 ? "kv" : "vk",
                 fkda_dtype_short(pools[variant / 2]));
        fkda_case *c = add_decode(FKDA_GROUP_decode, 12, io, name, 8);
        c->B = 4;
        c->T = 8;
        c->M = drafts[i].M;
        c->slots = i == 1 ? FKDA_SLOTS_2D_APART : FKDA_SLOTS_2D;
        c->gate = drafts[i].gate;
        if (c->gate == FKDA_GATE_DIRECT) direct(c, uniform(-3, 0));
        c->H = drafts[i].H;
        c->HV = drafts[i].HV;
        c->K = drafts[i].K;
        c->V = drafts[i].V;
        c->layout = (fkda_state_layout)(variant & 1);
        c->initial_dtype = pools[variant / 2];
        c->batch_invariant = variant == 3;
        c->claims = FKDA_CLAIM_VERIFY | FKDA_CLAIM_ALONE;
        if (variant < 2 && i != 1) c->claims |= FKDA_CLAIM_STEPS;
      }
    }
    fkda_case *c = add_decode(FKDA_GROUP_decode, 12, io, "no_write_T", 4);
    c->T = 4;
    c->write_state = false;
    c->slots = FKDA_SLOTS_PERMUTED;
    c = add_decode(FKDA_GROUP_decode, 12, io, "no_write_2d_T", 4);
    c->T = 4;
    c->M = 6;
    c->write_state = false;
    c->slots = FKDA_SLOTS_2D;
    c = add_decode(FKDA_GROUP_decode, 8, io, "many_sequences_N", 67);
    c->B = 67;
    c->H = c->HV = 1;
    c->slots = FKDA_SLOTS_PERMUTED;
    c = add_decode(FKDA_GROUP_decode, 8, io, "many_heads_N", 1);
    c->B = 1;
    c->H = 24;
    c->HV = 96;
    c = add_decode(FKDA_GROUP_decode, 8, io, "no_sequence_N", 0);
    c->B = 0;
    c = add_decode(FKDA_GROUP_decode, 5, io, "extremes_T", 5);
    c->T = 5;
    c->beta = (fkda_dist){FKDA_DIST_EITHER, 120, -120};
    c->q = c->k = (fkda_dist){FKDA_DIST_SPARSE, 0, 1};
    c->allow_neg_eigval = true;
    c = add_decode(FKDA_GROUP_decode, 4, io, "softplus_strong_T", 6);
    c->T = 6;
    c->gate = FKDA_GATE_SOFTPLUS;
    c->g = uniform(0, 40);
    c->A_log = constant(2.772588722239781);
    c = add_decode(FKDA_GROUP_decode, 6, io, "plain_T", 3);
    c->T = 3;
    c->l2norm = c->beta_is_logit = false;
    c->q = c->k = (fkda_dist){FKDA_DIST_UNIT, 0.9, 0};
    c->beta = uniform(0, 1);
    c->A_log_dtype = c->dt_bias_dtype = FKDA_NONE;
    c->scale = 1;
    if (d) {
      c = add_decode(FKDA_GROUP_decode, 6, io, "g32_beta32_T", 2);
      c->T = 2;
      c->g_dtype = c->beta_dtype = FKDA_F32;
      c->A_log_dtype = c->dt_bias_dtype = FKDA_BF16;
    }
    static const fkda_field fields[] = {FKDA_FIELD_q, FKDA_FIELD_k, FKDA_FIELD_v, FKDA_FIELD_g,
                                        FKDA_FIELD_beta};
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
      char name[FKDA_CASE_NAME];
      snprintf(name, sizeof name, "nan_%s_T", fkda_field_name(fields[i]));
      c = add_decode(FKDA_GROUP_decode, 18, io, name, 4);
      c->T = 4;
      c->HV = 4;
      c->nan_field = fields[i];
      c->nan_sequence = 2;
      c->nan_token = 2;
      c->nan_head = 1;
    }
  }
}

/* ---- summary ---------------------------------------------------------------------------------------- */

static void summary_cases(void) {
  static const char *const gates[] = {"bounded", "softplus", "direct"};
  for (int d = 0; d < 3; d++) {
    for (int gate = 0; gate < 3; gate++) {
      for (int layout = 0; layout < 2; layout++) {
        fkda_case *c =
            add(FKDA_GROUP_summary, 0, io_dtypes[d], "%s_%s", gates[gate], layout ? "kv" : "vk");
        c->op = FKDA_OP_SUMMARY;
        c->gate = (fkda_gate)gate;
        c->layout = (fkda_state_layout)layout;
        c->B = 2;
        c->T = 41;
        c->HV = 4;
        c->K = 32;
        c->V = 24;
        c->claims = FKDA_CLAIM_AFFINE | FKDA_CLAIM_TWICE;
        if (gate == FKDA_GATE_DIRECT) direct(c, uniform(-1, 0));
      }
    }
    fkda_case *c = add(FKDA_GROUP_summary, 9, io_dtypes[d], "ragged");
    c->op = FKDA_OP_SUMMARY;
    ragged(c, mixed_lens, 11);
    c->tail = 9;
    c->claims = FKDA_CLAIM_AFFINE;
    c = add(FKDA_GROUP_summary, 10, io_dtypes[d], "strided");
    c->op = FKDA_OP_SUMMARY;
    c->strides = FKDA_STRIDES_PADDED;
    c->B = 2;
    c->T = 35;
    c->claims = FKDA_CLAIM_AFFINE;
  }
}

/* ---- backward --------------------------------------------------------------------------------------- */

static fkda_case *add_backward(int number, int32_t io, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static fkda_case *add_backward(int number, int32_t io, const char *format, ...) {
  char name[FKDA_CASE_NAME];
  va_list list;
  va_start(list, format);
  vsnprintf(name, sizeof name, format, list);
  va_end(list);
  fkda_case *c = add(FKDA_GROUP_backward, number, io, "%s", name);
  c->op = FKDA_OP_BACKWARD;
  c->T = 53;
  c->numbers[1] = 20;
  return c;
}

/* Gate forms and ranges, as in gate_cases() but fewer. */
static void backward_gates(int32_t io) {
  static const struct {
    const char *name;
    fkda_gate gate;
    fkda_dist raw, A_log;
  } rows[] = {
      {"bounded raw -8",
       FKDA_GATE_BOUNDED,
       {FKDA_DIST_CONSTANT, -8, 0},
       {FKDA_DIST_CONSTANT, 0, 0}},
      {"bounded raw 0", FKDA_GATE_BOUNDED, {FKDA_DIST_CONSTANT, 0, 0}, {FKDA_DIST_CONSTANT, 0, 0}},
      {"bounded raw 8", FKDA_GATE_BOUNDED, {FKDA_DIST_CONSTANT, 8, 0}, {FKDA_DIST_CONSTANT, 0, 0}},
      {"bounded raw U(-8,8)",
       FKDA_GATE_BOUNDED,
       {FKDA_DIST_UNIFORM, -8, 8},
       {FKDA_DIST_CONSTANT, 0, 0}},
      {"bounded raw N(0,8)",
       FKDA_GATE_BOUNDED,
       {FKDA_DIST_NORMAL, 0, 8},
       {FKDA_DIST_UNIFORM, -1, 1}},
      {"softplus raw U(0,40)",
       FKDA_GATE_SOFTPLUS,
       {FKDA_DIST_UNIFORM, 0, 40},
       {FKDA_DIST_UNIFORM, -1, 1}},
      {"softplus raw U(-8,8)",
       FKDA_GATE_SOFTPLUS,
       {FKDA_DIST_UNIFORM, -8, 8},
       {FKDA_DIST_UNIFORM, 0, 2.77}},
      {"softplus raw -20",
       FKDA_GATE_SOFTPLUS,
       {FKDA_DIST_CONSTANT, -20, 0},
       {FKDA_DIST_CONSTANT, 0, 0}},
      {"softplus raw switch",
       FKDA_GATE_SOFTPLUS,
       {FKDA_DIST_SWITCH, 40, -12},
       {FKDA_DIST_CONSTANT, 2.77, 0}},
      {"direct 0", FKDA_GATE_DIRECT, {FKDA_DIST_CONSTANT, 0, 0}, {FKDA_DIST_CONSTANT, 0, 0}},
      {"direct U(-0.01,0)",
       FKDA_GATE_DIRECT,
       {FKDA_DIST_UNIFORM, -0.01, 0},
       {FKDA_DIST_CONSTANT, 0, 0}},
      {"direct U(-5,0)", FKDA_GATE_DIRECT, {FKDA_DIST_UNIFORM, -5, 0}, {FKDA_DIST_CONSTANT, 0, 0}},
      {"direct U(-60,0)",
       FKDA_GATE_DIRECT,
       {FKDA_DIST_UNIFORM, -60, 0},
       {FKDA_DIST_CONSTANT, 0, 0}},
      {"direct U(-150,1)",
       FKDA_GATE_DIRECT,
       {FKDA_DIST_UNIFORM, -150, 1},
       {FKDA_DIST_CONSTANT, 0, 0}},
      {"direct 0 or -90", FKDA_GATE_DIRECT, {FKDA_DIST_EITHER, 0, -90}, {FKDA_DIST_CONSTANT, 0, 0}},
      {"direct switch",
       FKDA_GATE_DIRECT,
       {FKDA_DIST_SWITCH, -1e-3, -90},
       {FKDA_DIST_CONSTANT, 0, 0}},
  };
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
    char name[FKDA_CASE_NAME];
    snprintf(name, sizeof name, "%s", rows[i].name);
    for (char *x = name; *x; x++) *x = *x == ' ' ? '_' : *x;
    fkda_case *c = add_backward(1, io, "%s", name);
    c->numbers[1] = 4;
    c->range = rows[i].name;
    if (io == FKDA_BF16) c->T = 100; /* what a GPU runs: more than one block */
    c->gate = rows[i].gate;
    c->g = rows[i].raw;
    c->A_log = rows[i].A_log;
    if (c->gate == FKDA_GATE_DIRECT) direct(c, rows[i].raw);
  }
}

static void backward_numbers(int32_t io) {
  fkda_case *c;
  for (int weak = 0; weak < 2; weak++) {
    for (int same = 0; same < 2; same++) {
      c = add_backward(2, io, "collinear%s%s", weak ? "_weak_decay" : "", same ? "_q_is_k" : "");
      collinear(c);
      c->T = 300;
      /* What the bounded gate makes of -12 and of about -7. By A_log the loss hardly changes: its gradient
       * is a sum that cancels by five digits, in which there is nothing to compare. */
      direct(c, weak ? uniform(-8e-3, -2e-3) : constant(-3e-5));
      c->range = "collinear keys";
      /* S^T d_out lies along k. With q = k and (1) nothing is left of d_q but rounding, nor would anything of
       * gold: normalised beforehand instead. */
      c->q_is_k = same;
      c->l2norm = !same;
      if (same) c->k.b = 0.125;
    }
  }
  c = add_backward(3, io, "weak_decay_T1500");
  c->H = c->HV = 1;
  c->T = 1500;
  c->g = normal(-8.55, 0.25);
  c->A_log = constant(0);
  c->dt_bias_dtype = FKDA_NONE;
  c = add_backward(5, io, "beta_0_and_1");
  c->beta_is_logit = false;
  c->beta = (fkda_dist){FKDA_DIST_EITHER, 0, 1};
  c = add_backward(5, io, "beta_logit_extremes");
  c->beta = (fkda_dist){FKDA_DIST_EITHER, 120, -120};
  c = add_backward(5, io, "neg_eigval_logit");
  c->allow_neg_eigval = true;
  c->beta = normal(1, 3);
  c = add_backward(5, io, "zero_k");
  c->k = constant(0);
  c = add_backward(5, io, "some_zero_qk");
  c->q = c->k = (fkda_dist){FKDA_DIST_SPARSE, 0, 1};
  c = add_backward(5, io, "tiny_qk");
  c->q = c->k = normal(0, 1e-3);
  c = add_backward(7, io, "asymmetric_kv");
  c->layout = FKDA_STATE_KV;
  c->K = 128;
  c->q = c->k = c->v = c->initial = (fkda_dist){FKDA_DIST_RAMP, 0, 1};
}

static void backward_options(int32_t io) {
  for (int bits = 0; bits < 3 * 4; bits++) {
    static const char *const gates[] = {"bounded", "softplus", "direct"};
    const int gate = bits / 4, l2norm = bits & 1, logit = bits >> 1 & 1;
    fkda_case *c =
        add_backward(6, io, "%s%s%s", gates[gate], l2norm ? "_l2norm" : "", logit ? "_logit" : "");
    c->B = 2;
    c->T = 37;
    c->K = size_for(io, 32);
    c->V = size_for(io, 48);
    c->gate = (fkda_gate)gate;
    c->l2norm = l2norm;
    c->beta_is_logit = logit;
    if (!l2norm) c->q = c->k = (fkda_dist){FKDA_DIST_UNIT, 0.9, 0};
    if (!logit) c->beta = uniform(0, 1);
    if (gate == FKDA_GATE_DIRECT) direct(c, uniform(-3, 0));
    if (bits % 2) c->layout = FKDA_STATE_KV;
  }
  fkda_case *c = add_backward(6, io, "no_parameters");
  c->A_log_dtype = c->dt_bias_dtype = FKDA_NONE;
  c = add_backward(6, io, "bf16_parameters");
  c->A_log_dtype = c->dt_bias_dtype = FKDA_BF16;
  c = add_backward(6, io, "scale_negative");
  c->scale = -0.25;
  c = add_backward(6, io, "no_states");
  c->initial_dtype = c->final_dtype = FKDA_NONE;
  c = add_backward(6, io, "bf16_states");
  c->initial_dtype = c->final_dtype = FKDA_BF16;
  c = add_backward(6, io, "f32_gate_and_gradients");
  c->g_dtype = c->beta_dtype = c->gradient_dtype = FKDA_F32;
  static const fkda_field outputs[] = {
      FKDA_FIELD_d_q,    FKDA_FIELD_d_k,     FKDA_FIELD_d_v,       FKDA_FIELD_d_g,
      FKDA_FIELD_d_beta, FKDA_FIELD_d_A_log, FKDA_FIELD_d_dt_bias, FKDA_FIELD_d_initial_state};
  for (size_t i = 0; i < sizeof outputs / sizeof outputs[0]; i++) {
    c = add_backward(6, io, "only_%s", fkda_field_name(outputs[i]));
    c->only = outputs[i];
    c->HV = 4;
  }
}

static void backward_shapes(int32_t io) {
  static const int64_t lengths[] = {0, 1, 15, 16, 17, 33, 64, 700};
  static const struct {
    int64_t B, T, H, HV, K, V;
  } shapes[] = {{1, 40, 1, 1, 128, 128}, {2, 40, 2, 2, 64, 128},  {0, 16, 2, 2, 64, 64},
                {2, 50, 2, 4, 128, 64},  {1, 35, 2, 8, 64, 64},   {1, 40, 1, 1, 1, 1},
                {1, 40, 2, 4, 5, 5},     {1, 33, 1, 1, 256, 256}, {2, 37, 1, 2, 24, 96},
                {1, 20, 2, 2, 127, 129}, {1, 66, 1, 2, 65, 33},   {1, 100, 1, 2, 128, 128}};
  for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
    fkda_case *c = add_backward(8, io, "T%d", (int)lengths[i]);
    c->T = lengths[i];
    c->claims = FKDA_CLAIM_TWICE;
    if (c->T > 500) c->H = c->HV = 1; /* more than one segment of states */
  }
  for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
    fkda_case *c =
        add_backward(8, io, "B%d_T%d_H%d_HV%d_K%d_V%d", (int)shapes[i].B, (int)shapes[i].T,
                     (int)shapes[i].H, (int)shapes[i].HV, (int)shapes[i].K, (int)shapes[i].V);
    c->B = shapes[i].B;
    c->T = shapes[i].T;
    c->H = shapes[i].H;
    c->HV = shapes[i].HV;
    c->K = shapes[i].K;
    c->V = shapes[i].V;
    /* d_A_log is a single number here: with one draw in fifteen its terms nearly cancel, which leaves f32 no more than
     * four digits on any backend. The data are those of another draw, whatever stands before in the table. */
    if (c->HV * c->K == 1) c->seed = 4000;
    c->layout = i % 3 == 1 ? FKDA_STATE_KV : FKDA_STATE_VK;
    if (c->K == 1) c->l2norm = false; /* of the sign of a number there is no gradient */
  }
  for (int index = 0; index < 2; index++) {
    fkda_case *c = add_backward(9, io, "ragged_%s", index ? "i32" : "i64");
    ragged(c, mixed_lens, 11);
    c->tail = 7;
    c->HV = index ? 4 : 2;
    c->index_dtype = index ? FKDA_I32 : FKDA_I64;
    c->claims = FKDA_CLAIM_TWICE;
  }
  static const int64_t nothing[] = {0, 0};
  fkda_case *c = add_backward(9, io, "all_empty");
  ragged(c, nothing, 2);
  c->tail = 5;
  static const char *const names[] = {"contiguous", "fused",     "padded",
                                      "head_major", "broadcast", "misaligned"};
  for (int kind = FKDA_STRIDES_FUSED; kind <= FKDA_STRIDES_MISALIGNED; kind++) {
    c = add_backward(10, io, "strides_%s", names[kind]);
    c->strides = (fkda_strides)kind;
    c->B = 2;
    c->T = 29;
    c->HV = 4;
    c->K = size_for(io, 37);
    c->V = size_for(io, 51);
    c->numbers[2] = 21;
  }
}

static void backward_nan(int32_t io) {
  static const fkda_field fields[] = {FKDA_FIELD_q, FKDA_FIELD_k,    FKDA_FIELD_v,
                                      FKDA_FIELD_g, FKDA_FIELD_beta, FKDA_FIELD_d_out};
  for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
    for (int variant = 0; variant < 2; variant++) {
      fkda_case *c = add_backward(18, io, "nan_%s_%s", fkda_field_name(fields[i]),
                                  variant ? "gva_direct" : "batch");
      c->H = c->HV = 3;
      c->nan_field = fields[i];
      c->nan_head = 1;
      c->nan_token = 38;
      c->B = 3;
      c->nan_sequence = 1;
      if (!variant) continue;
      c->HV = 6;
      direct(c, uniform(-2, 0));
    }
  }
}

static void backward_cases(void) {
  for (int d = 0; d < 2; d++) {
    const int32_t io = io_dtypes[d];
    backward_gates(io);
    backward_numbers(io);
    backward_options(io);
    backward_shapes(io);
    backward_nan(io);
  }
  fkda_case *c = add_backward(2, FKDA_BF16, "collinear_D128"); /* every size of a kernel's tiles */
  collinear(c);
  c->T = 150;
  c->HV = 2;
  c->K = c->V = 128;
  direct(c, uniform(-8e-3, -2e-3));
  c->range = "collinear keys";
  c->q_is_k = false;
  c = add_backward(2, FKDA_BF16, "collinear_heads"); /* and others, which they do not concern */
  static const int64_t lens[] = {70, 0, 33, 100};
  collinear(c);
  ragged(c, lens, 4);
  c->H = 3;
  c->HV = 6;
  c->V = 128;
  c->k.kind = FKDA_DIST_REPEAT_EVEN;
  direct(c, uniform(-8e-3, -2e-3));
  c->range = "collinear keys";
  c->q_is_k = false;
  add_backward(8, FKDA_F16, "plain");
  c = add_backward(9, FKDA_F16, "ragged_gva_kv");
  ragged(c, mixed_lens, 11);
  c->HV = 4;
  c->K = 37;
  c->V = 51;
  c->layout = FKDA_STATE_KV;
}

/* ---- threads: 24 (host threads, fork), 19 ------------------------------------------------------------- */

static void thread_cases(void) {
  static const int64_t few_lens[] = {20, 0, 33, 1};
  for (int d = 0; d < 2; d++) {
    fkda_case *c = add(FKDA_GROUP_threads, 24, io_dtypes[d], "prefill");
    ragged(c, mixed_lens, 11);
    c->H = c->HV = 3;
    c->claims = FKDA_CLAIM_THREADS | FKDA_CLAIM_FORK;
    c = add(FKDA_GROUP_threads, 24, io_dtypes[d], "prefill_one_head");
    c->H = c->HV = 1;
    c->T = 300;
    c->K = c->V = 128;
    c->claims = FKDA_CLAIM_THREADS | FKDA_CLAIM_FORK;
    c = add_decode(FKDA_GROUP_threads, 24, io_dtypes[d], "decode_N", 16);
    c->B = 16;
    c->T = 2;
    c->slots = FKDA_SLOTS_PERMUTED;
    c->claims = FKDA_CLAIM_THREADS | FKDA_CLAIM_FORK;
    c = add(FKDA_GROUP_threads, 24, io_dtypes[d], "summary");
    c->op = FKDA_OP_SUMMARY;
    c->T = 50;
    c->claims = FKDA_CLAIM_THREADS;
    c = add(FKDA_GROUP_threads, 24, io_dtypes[d], "backward");
    c->op = FKDA_OP_BACKWARD;
    ragged(c, few_lens, 4);
    c->H = 2;
    c->HV = 4;
    c->claims = FKDA_CLAIM_THREADS | FKDA_CLAIM_FORK;
  }
}

/* ---- more heads and sequences than a GPU has processors: 8, 9, 15 ----------------------------------- */

/* 144 of them: blocks own all of V, or take turns, where a sequence by itself is cut into parts of V. */
static void crowd_cases(void) {
  static const int64_t lens[] = {40, 1, 33};
  static const struct {
    const char *name;
    fkda_gate gate;
    int32_t K, g_dtype;
    fkda_state_layout layout;
  } rows[] = {
      {"crowd_bounded_D128", FKDA_GATE_BOUNDED, 128, FKDA_BF16, FKDA_STATE_VK},
      {"crowd_softplus_g32_kv_D128", FKDA_GATE_SOFTPLUS, 128, FKDA_F32, FKDA_STATE_KV},
      {"crowd_direct_K64_V128", FKDA_GATE_DIRECT, 64, FKDA_BF16, FKDA_STATE_VK},
  };
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
    fkda_case *c = add(FKDA_GROUP_invariance, 15, FKDA_BF16, "%s", rows[i].name);
    c->numbers[1] = 9;
    c->numbers[2] = 8;
    ragged(c, lens, 3);
    c->H = 24;
    c->HV = 48;
    c->K = rows[i].K;
    c->V = 128;
    c->layout = rows[i].layout;
    c->gate = rows[i].gate;
    if (c->gate == FKDA_GATE_SOFTPLUS) c->g = normal(0, 6);
    if (c->gate == FKDA_GATE_DIRECT) direct(c, (fkda_dist){FKDA_DIST_SWITCH, -0.1, -80});
    c->g_dtype = rows[i].g_dtype;
    c->batch_invariant = true;
    c->claims = FKDA_CLAIM_ALONE | FKDA_CLAIM_TWICE;
  }
  fkda_case *c = add_backward(8, FKDA_BF16, "crowd_K64_V128");
  c->numbers[2] = 9;
  ragged(c, lens, 3);
  c->H = 12;
  c->HV = 24;
  c->V = 128;
}

/* Cases that came later: seeds count on, so those before keep their data. */
static void later_cases(void) {
  for (int d = 1; d < 3; d++) { /* more chunks than there are places for with f32 gates */
    fkda_case *c = add(FKDA_GROUP_shapes, 8, io_dtypes[d], "T300_g32_D128");
    c->T = 300;
    c->K = c->V = 128;
    c->g_dtype = FKDA_F32;
  }
  for (int d = 0; d < 3;
       d++) { /* nearly -80 a half of a chunk: k e^{m-G} is just below 2^108, v grows by column */
    fkda_case *c = add(FKDA_GROUP_numbers, 5, io_dtypes[d], "some_columns_near_overflow");
    c->T = 300;
    c->H = c->HV = 4;
    c->K = c->V = 128;
    c->g = uniform(2.8, 3.4);
    c->A_log = uniform(-0.1, 0.1);
    c->dt_bias_dtype = FKDA_NONE;
    c->v = (fkda_dist){FKDA_DIST_RAMP, 0, 1};
    c->initial_dtype = FKDA_NONE;
  }
  /* 69 equal heads of twenty chunks: no number of processors divides them, so that a GPU cuts some in two. */
  for (int i = 0; i < 2; i++) {
    fkda_case *c = add(FKDA_GROUP_invariance, 15, FKDA_BF16, "%s",
                       i ? "cut_softplus_kv_K64_V128" : "cut_bounded_D128");
    c->numbers[1] = 8;
    c->B = 3;
    c->T = 630;
    c->H = c->HV = 23;
    c->K = i ? 64 : 128;
    c->V = 128;
    if (i) {
      c->gate = FKDA_GATE_SOFTPLUS;
      c->layout = FKDA_STATE_KV;
      c->final_dtype = FKDA_BF16;
    }
    c->batch_invariant = true;
    c->claims = FKDA_CLAIM_ALONE | FKDA_CLAIM_TWICE;
  }
}

static void build(void) {
  gate_cases();
  number_cases();
  option_cases();
  shape_cases();
  ragged_cases();
  stride_cases();
  index_cases();
  state_cases();
  checkpoint_cases();
  invariance_cases();
  nan_cases();
  decode_cases();
  summary_cases();
  backward_cases();
  thread_cases();
  crowd_cases();
  later_cases();
}

int fkda_case_count(void) {
  pthread_once(&once, build);
  return count;
}

const fkda_case *fkda_case_at(int index) {
  return index >= 0 && index < fkda_case_count() ? &table[index] : NULL;
}

const fkda_case *fkda_case_find(const char *name) {
  for (int i = 0; i < fkda_case_count(); i++) {
    if (strcmp(table[i].name, name) == 0) return &table[i];
  }
  return NULL;
}

bool fkda_slots_2d(fkda_slots slots) {
  return slots >= FKDA_SLOTS_2D && slots != FKDA_SLOTS_ONE_TENSOR;
}

bool fkda_slots_bad(fkda_slots slots) {
  return slots == FKDA_SLOTS_OUT_OF_RANGE || slots == FKDA_SLOTS_NEGATIVE ||
         slots == FKDA_SLOTS_2D_OUT_OF_RANGE || slots == FKDA_SLOTS_2D_ACCEPTED;
}

int64_t fkda_case_sequences(const fkda_case *c) { return c->lens ? c->lens_count : c->B; }
