/* fkda_backward() of the reference against finite differences of fkda_prefill(), both in double precision:
 * the one place where gradients are compared with something that is no adjoint. Every other backend is
 * compared with the reference in the case table. And what must be equal to the bit.
 *
 * SPDX-License-Identifier: MIT
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "flashkda/flashkda.h"

/* X(name): what a gradient may be taken by; d_<name> is the gradient. */
#define INPUT_LIST(X) X(q) X(k) X(v) X(g) X(beta) X(A_log) X(dt_bias) X(initial_state)

typedef enum input {
#define INPUT_ENUM(name) INPUT_##name,
  INPUT_LIST(INPUT_ENUM)
#undef INPUT_ENUM
      INPUTS
} input;

typedef struct setup {
  const char *name;
  int64_t B, T, H, HV, K, V;
  const int32_t *cu_seqlens; /* [sequences + 1]; NULL: none */
  int64_t sequences;
  int32_t gate, l2norm, beta_is_logit, allow_neg_eigval, layout;
  double lower_bound, scale, raw, spread; /* raw gates: mean and standard deviation */
  int absent_parameters, absent_states;
} setup;

static uint64_t random_state;

static double random_uniform(void) {
  random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  return (double)(random_state >> 11) * 0x1p-53;
}

static double random_normal(void) {
  return sqrt(-2 * log(1 - random_uniform())) * cos(6.283185307179586 * random_uniform());
}

static fkda_tensor filled(int32_t ndim, const int64_t *shape, double mean, double deviation) {
  int64_t count = 1;
  for (int32_t i = 0; i < ndim; i++) count *= shape[i];
  double *data = malloc((size_t)(count + 1) * sizeof *data);
  assert_non_null(data);
  for (int64_t i = 0; i < count; i++) data[i] = mean + deviation * random_normal();
  return fkda_tensor_contiguous(data, FKDA_F64, ndim, shape);
}

static int64_t elements(const fkda_tensor *t) {
  int64_t count = t->dtype ? 1 : 0;
  for (int32_t i = 0; i < t->ndim; i++) count *= t->shape[i];
  return count;
}

typedef struct problem {
  fkda_prefill_args forward;
  fkda_backward_args backward;
} problem;

static fkda_tensor *input_of(problem *x, input which) {
#define CASE(name)                                                                                 \
  case INPUT_##name: return &x->forward.name;
  switch (which) {
    INPUT_LIST(CASE)
    default: return NULL;
  }
#undef CASE
}

static fkda_tensor *gradient_of(fkda_backward_args *a, input which) {
#define CASE(name)                                                                                 \
  case INPUT_##name: return &a->d_##name;
  switch (which) {
    INPUT_LIST(CASE)
    default: return NULL;
  }
#undef CASE
}

static const char *const input_names[] = {
#define NAME(name) #name,
    INPUT_LIST(NAME)
#undef NAME
};

static void make(problem *x, const setup *s) {
  fkda_prefill_args *f = &x->forward;
  fkda_backward_args *b = &x->backward;
  random_state = 1 + (uint64_t)strlen(s->name);
  *f = FKDA_PREFILL_ARGS_INIT;
  *b = FKDA_BACKWARD_ARGS_INIT;
  f->backend = b->backend = "reference";
  const int64_t N = s->cu_seqlens ? s->sequences : s->B;
  const int64_t qk[4] = {s->B, s->T, s->H, s->K}, values[4] = {s->B, s->T, s->HV, s->V};
  const int64_t gates[4] = {s->B, s->T, s->HV, s->K};
  const int64_t vk[4] = {N, s->HV, s->V, s->K}, kv[4] = {N, s->HV, s->K, s->V};
  const int64_t *state = s->layout == FKDA_STATE_VK ? vk : kv;
  f->q = filled(4, qk, 0, 0.8);
  f->k = filled(4, qk, 0, 0.8);
  f->v = filled(4, values, 0, 1);
  f->g = filled(4, gates, s->raw, s->spread);
  f->beta = filled(3, values, 0.3, s->beta_is_logit ? 1 : 0.3);
  f->out = filled(4, values, NAN, 0);
  if (s->gate != FKDA_GATE_DIRECT && !s->absent_parameters) {
    f->A_log = filled(1, gates + 2, 0, 0.4);
    f->dt_bias = filled(2, gates + 2, 0, 0.5);
  }
  if (!s->absent_states) {
    f->initial_state = filled(4, state, 0, 1);
    f->final_state = filled(4, state, NAN, 0);
    b->d_final_state = filled(4, state, 0, 1);
  }
  if (s->cu_seqlens) {
    const int64_t length = s->sequences + 1;
    f->cu_seqlens = fkda_tensor_contiguous((void *)(uintptr_t)s->cu_seqlens, FKDA_I32, 1, &length);
  }
  b->d_out = filled(4, values, 0, 1);
#define SAME(field) b->field = f->field
  f->gate = s->gate;
  f->l2norm = s->l2norm;
  f->beta_is_logit = s->beta_is_logit;
  f->allow_neg_eigval = s->allow_neg_eigval;
  f->state_layout = s->layout;
  f->scale = s->scale;
  if (s->lower_bound != 0) f->lower_bound = s->lower_bound;
  SAME(gate), SAME(l2norm), SAME(beta_is_logit), SAME(allow_neg_eigval), SAME(state_layout);
  SAME(scale), SAME(lower_bound), SAME(cu_seqlens);
  SAME(q), SAME(k), SAME(v), SAME(g), SAME(beta), SAME(A_log), SAME(dt_bias), SAME(initial_state);
#undef SAME
  for (int i = 0; i < INPUTS; i++) {
    const fkda_tensor *t = input_of(x, (input)i);
    if (t->dtype) *gradient_of(b, (input)i) = filled(t->ndim, t->shape, NAN, 0);
  }
}

static void release(problem *x) {
  for (int i = 0; i < INPUTS; i++) {
    free(input_of(x, (input)i)->data);
    free(gradient_of(&x->backward, (input)i)->data);
  }
  free(x->forward.out.data);
  free(x->forward.final_state.data);
  free(x->backward.d_out.data);
  free(x->backward.d_final_state.data);
}

static double weighted(const fkda_tensor *x, const fkda_tensor *weights) {
  double sum = 0;
  for (int64_t i = 0; i < elements(x); i++)
    sum += ((const double *)x->data)[i] * ((const double *)weights->data)[i];
  return sum;
}

/* Rows of no sequence count with weight 0. */
static double loss(problem *x, int64_t rows) {
  assert_int_equal(fkda_prefill(&x->forward), FKDA_OK);
  fkda_tensor out = x->forward.out;
  if (x->forward.cu_seqlens.dtype) out.shape[1] = rows;
  double sum = weighted(&out, &x->backward.d_out);
  if (x->forward.final_state.dtype)
    sum += weighted(&x->forward.final_state, &x->backward.d_final_state);
  return sum;
}

static void compare(const setup *s) {
  problem x;
  make(&x, s);
  if (fkda_backward(&x.backward) != FKDA_OK) fail_msg("%s: %s", s->name, fkda_last_error());
  const int64_t rows = s->cu_seqlens ? s->cu_seqlens[s->sequences] : s->T;
  for (int i = 0; i < INPUTS; i++) {
    const fkda_tensor *t = input_of(&x, (input)i);
    const double *gradient = gradient_of(&x.backward, (input)i)->data;
    double *values = t->data, difference = 0, power = 0;
    const int64_t count = elements(t);
    const bool tokens = i <= INPUT_beta && s->cu_seqlens;
    const int64_t inside = tokens ? count / s->T * rows : count; /* B is 1 there */
    for (int64_t e = 0; e < inside; e++) {
      const double value = values[e], step = 1e-5;
      values[e] = value + step;
      const double above = loss(&x, rows);
      values[e] = value - step;
      const double below = loss(&x, rows);
      values[e] = value;
      const double expected = (above - below) / (2 * step);
      difference += (gradient[e] - expected) * (gradient[e] - expected);
      power += expected * expected;
    }
    for (int64_t e = inside; e < count; e++) assert_true(isnan(gradient[e])); /* untouched */
    if (!count) continue;
    assert_true(power > 0 || s->T == 0);
    if (!(sqrt(difference) <= 1e-7 * sqrt(power)))
      fail_msg("%s: d_%s: %g from finite differences of %g", s->name, input_names[i],
               sqrt(difference), sqrt(power));
  }
  release(&x);
}

static const int32_t ragged[] = {0, 0, 7, 7, 8, 19, 19};

static void finite_differences(void **state) {
  (void)state;
  const setup plain = {.name = "plain",
                       .B = 1,
                       .T = 11,
                       .H = 1,
                       .HV = 1,
                       .K = 3,
                       .V = 4,
                       .l2norm = 1,
                       .beta_is_logit = 1,
                       .raw = -1,
                       .spread = 1};
  setup s = plain;
  compare(&s);
#define WITH(...)                                                                                  \
  do {                                                                                             \
    s = plain;                                                                                     \
    __VA_ARGS__;                                                                                   \
    s.name = #__VA_ARGS__;                                                                         \
    compare(&s);                                                                                   \
  } while (0)
  WITH(s.gate = FKDA_GATE_SOFTPLUS);
  WITH(s.gate = FKDA_GATE_DIRECT, s.raw = -1.5, s.spread = 0.2);
  WITH(s.l2norm = 0);
  WITH(s.l2norm = 0, s.beta_is_logit = 0);
  WITH(s.allow_neg_eigval = 1);
  WITH(s.allow_neg_eigval = 1, s.beta_is_logit = 0);
  WITH(s.layout = FKDA_STATE_KV, s.V = 2);
  WITH(s.scale = -0.7, s.lower_bound = -0.3);
  WITH(s.B = 2, s.H = 2, s.HV = 6, s.T = 5);
  WITH(s.cu_seqlens = ragged, s.sequences = 6, s.T = 21, s.HV = 2);
  WITH(s.absent_parameters = 1);
  WITH(s.absent_parameters = 1, s.gate = FKDA_GATE_SOFTPLUS);
  WITH(s.absent_states = 1);
  WITH(s.T = 1);
#undef WITH
}

/* Beyond the clamp nothing flows back; at its two ends it does. */
static void clamp_stops_gradients(void **state) {
  (void)state;
  static const double raws[] = {-150, -100, -3, 0, 0.5};
  for (size_t i = 0; i < sizeof raws / sizeof raws[0]; i++) {
    const setup s = {.name = "clamp",
                     .B = 1,
                     .T = 3,
                     .H = 1,
                     .HV = 1,
                     .K = 2,
                     .V = 2,
                     .gate = FKDA_GATE_DIRECT,
                     .l2norm = 1,
                     .beta_is_logit = 1,
                     .raw = raws[i]};
    problem x;
    make(&x, &s);
    assert_int_equal(fkda_backward(&x.backward), FKDA_OK);
    const double *d = x.backward.d_g.data;
    const bool clamped = raws[i] < -100 || raws[i] > 0;
    for (int64_t e = 0; e < 6; e++) assert_true((d[e] == 0) == clamped);
    release(&x);
  }
  /* softplus, -16 * 40: nothing to A_log and dt_bias either */
  const setup s = {.name = "clamp",
                   .B = 1,
                   .T = 3,
                   .H = 1,
                   .HV = 1,
                   .K = 2,
                   .V = 2,
                   .gate = FKDA_GATE_SOFTPLUS,
                   .l2norm = 1,
                   .beta_is_logit = 1,
                   .raw = 4000};
  problem x;
  make(&x, &s);
  assert_int_equal(fkda_backward(&x.backward), FKDA_OK);
  assert_true(*(double *)x.backward.d_A_log.data == 0);
  assert_true(*(double *)x.backward.d_dt_bias.data == 0);
  release(&x);
}

/* The same problem in f32 on a CPU backend. */
static void to_f32(problem *x, const char *backend) {
  fkda_tensor *all[3 * INPUTS + 4];
  int count = 0;
  for (int i = 0; i < INPUTS; i++) {
    all[count++] = input_of(x, (input)i);
    all[count++] = gradient_of(&x->backward, (input)i);
  }
  all[count++] = &x->forward.out;
  all[count++] = &x->forward.final_state;
  all[count++] = &x->backward.d_out;
  all[count++] = &x->backward.d_final_state;
  for (int i = 0; i < count; i++) {
    if (!all[i]->dtype) continue;
    const double *from = all[i]->data;
    float *to = all[i]->data; /* in place: an element is read before its bytes are written */
    for (int64_t e = 0; e < elements(all[i]); e++) to[e] = (float)from[e];
    all[i]->dtype = FKDA_F32;
  }
#define SAME(name) x->backward.name = x->forward.name
  SAME(q), SAME(k), SAME(v), SAME(g), SAME(beta), SAME(A_log), SAME(dt_bias), SAME(initial_state);
#undef SAME
  x->forward.backend = x->backward.backend = backend;
}

static fkda_tensor like(const fkda_tensor *t) {
  fkda_tensor copy = filled(t->ndim, t->shape, NAN, 0); /* room for f64 */
  memset(copy.data, 0xff, (size_t)elements(t) * sizeof(double));
  copy.dtype = t->dtype;
  return copy;
}

static void assert_same(const char *what, const fkda_tensor *a, const fkda_tensor *b) {
  if (memcmp(a->data, b->data, (size_t)elements(a) * fkda_dtype_size(a->dtype)) != 0)
    fail_msg("%s: other bits", what);
}

/* What is not asked for changes nothing of what is. */
static void only_one(problem *x) {
  for (int i = 0; i < INPUTS; i++) {
    fkda_backward_args one = x->backward;
    for (int j = 0; j < INPUTS; j++) *gradient_of(&one, (input)j) = (fkda_tensor){0};
    const fkda_tensor *all = gradient_of(&x->backward, (input)i);
    *gradient_of(&one, (input)i) = like(all);
    assert_int_equal(fkda_backward(&one), FKDA_OK);
    assert_same(input_names[i], all, gradient_of(&one, (input)i));
    free(gradient_of(&one, (input)i)->data);
  }
}

/* Runs `args`, which differs from x->backward in its inputs only, and expects the same gradients. */
static void same_gradients(problem *x, const char *what, fkda_backward_args args) {
  for (int i = 0; i < INPUTS; i++)
    *gradient_of(&args, (input)i) = like(gradient_of(&x->backward, (input)i));
  if (fkda_backward(&args) != FKDA_OK) fail_msg("%s: %s", what, fkda_last_error());
  for (int i = 0; i < INPUTS; i++) {
    assert_same(what, gradient_of(&x->backward, (input)i), gradient_of(&args, (input)i));
    free(gradient_of(&args, (input)i)->data);
  }
}

/* States that the prefill has kept serve as well as computing them again, and make up for initial_state. */
static void kept_states(problem *x, int64_t every) {
  fkda_prefill_args forward = x->forward;
  fkda_backward_args args = x->backward;
  const fkda_tensor *state = &forward.initial_state;
  const int64_t rows = (forward.k.shape[1] + every - 1) / every * forward.k.shape[0];
  const int64_t shape[4] = {rows, state->shape[1], state->shape[2], state->shape[3]};
  forward.checkpoint_state = filled(4, shape, NAN, 0);
  forward.checkpoint_state.dtype = state->dtype;
  forward.checkpoint_every = args.checkpoint_every = every;
  forward.checkpoint_before = 1;
  args.checkpoint_state = forward.checkpoint_state;
  assert_int_equal(fkda_prefill(&forward), FKDA_OK);
  args.initial_state = (fkda_tensor){0};
  same_gradients(x, "kept states", args);
  free(forward.checkpoint_state.data);
}

/* An absent upstream gradient is one of zeros. */
static void absent_upstream(problem *x) {
  const fkda_tensor d_out = x->backward.d_out, zero = like(&d_out);
  memset(zero.data, 0, (size_t)elements(&zero) * fkda_dtype_size(zero.dtype));
  x->backward.d_out = zero;
  assert_int_equal(fkda_backward(&x->backward), FKDA_OK);
  fkda_backward_args args = x->backward;
  args.d_out = (fkda_tensor){0};
  same_gradients(x, "no d_out", args);
  x->backward.d_out = d_out;
  free(zero.data);
}

/* Two halves, the later one first: its d_initial_state is the earlier one's d_final_state. */
static void two_halves(problem *x, int64_t at) {
  const int64_t T = x->forward.q.shape[1];
  problem parts[2] = {*x, *x};
  const fkda_tensor middle = like(&x->forward.initial_state), d_middle = like(&middle);
  fkda_tensor gradients[INPUTS];
  for (int i = 0; i < INPUTS; i++) gradients[i] = like(gradient_of(&x->backward, (input)i));
  for (int p = 0; p < 2; p++) {
    fkda_backward_args *b = &parts[p].backward;
    for (int i = 0; i < INPUTS; i++) *gradient_of(b, (input)i) = gradients[i];
    b->d_A_log = b->d_dt_bias = (fkda_tensor){0};
    fkda_tensor *rows[] = {&parts[p].forward.q,
                           &parts[p].forward.k,
                           &parts[p].forward.v,
                           &parts[p].forward.g,
                           &parts[p].forward.beta,
                           &parts[p].forward.out,
                           &b->q,
                           &b->k,
                           &b->v,
                           &b->g,
                           &b->beta,
                           &b->d_out,
                           &b->d_q,
                           &b->d_k,
                           &b->d_v,
                           &b->d_g,
                           &b->d_beta};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
      char *data = rows[i]->data;
      const int64_t skip = p ? at * rows[i]->stride[1] : 0;
      rows[i]->data = data + skip * (int64_t)fkda_dtype_size(rows[i]->dtype);
      rows[i]->shape[1] = p ? T - at : at;
    }
  }
  parts[0].forward.final_state = middle;
  assert_int_equal(fkda_prefill(&parts[0].forward), FKDA_OK);
  parts[1].backward.initial_state = middle;
  parts[1].backward.d_initial_state = parts[0].backward.d_final_state = d_middle;
  assert_int_equal(fkda_backward(&parts[1].backward), FKDA_OK);
  assert_int_equal(fkda_backward(&parts[0].backward), FKDA_OK);
  for (int i = 0; i < INPUTS; i++) {
    if (i != INPUT_A_log && i != INPUT_dt_bias)
      assert_same("two halves", gradient_of(&x->backward, (input)i), &gradients[i]);
    free(gradients[i].data);
  }
  free(middle.data);
  free(d_middle.data);
}

/* Equalities to the bit, on every backend of the CPU; 600 tokens are more than one segment of states. */
static void equalities(void **state) {
  (void)state;
  const setup s = {.name = "equal",
                   .B = 2,
                   .T = 600,
                   .H = 1,
                   .HV = 2,
                   .K = 3,
                   .V = 2,
                   .l2norm = 1,
                   .beta_is_logit = 1,
                   .spread = 1};
  const char *backend;
  for (int32_t i = 0; (backend = fkda_backend_name(i)) != NULL; i++) {
    const bool reference = strcmp(backend, "reference") == 0;
    if (!reference && strncmp(backend, "cpu-", 4) != 0) continue;
    if (fkda_backend_available(backend) != FKDA_OK) continue;
    problem x;
    make(&x, &s);
    if (!reference) to_f32(&x, backend);
    if (fkda_backward(&x.backward) != FKDA_OK) fail_msg("%s: %s", backend, fkda_last_error());
    only_one(&x);
    kept_states(&x, 16);
    kept_states(&x, 112);
    kept_states(&x, 592);
    two_halves(&x, 304);
    absent_upstream(&x);
    release(&x);
  }
}

/* No sequence at all: the sums over sequences are zero. */
static void no_sequences(void **state) {
  (void)state;
  const setup s = {.name = "none", .B = 0, .T = 4, .H = 1, .HV = 2, .K = 3, .V = 2, .l2norm = 1};
  problem x;
  make(&x, &s);
  assert_int_equal(fkda_backward(&x.backward), FKDA_OK);
  for (int i = 0; i < 2; i++) assert_true(((double *)x.backward.d_A_log.data)[i] == 0);
  for (int i = 0; i < 6; i++) assert_true(((double *)x.backward.d_dt_bias.data)[i] == 0);
  release(&x);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(finite_differences),
      cmocka_unit_test(clamp_stops_gradients),
      cmocka_unit_test(equalities),
      cmocka_unit_test(no_sequences),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
