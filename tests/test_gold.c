/* The files of tests/gold (make_gold.py: a recurrence in NumPy sharing nothing with the library)
 * through the public API: the reference in double precision, then every backend of this machine.
 *
 * Inputs carry the names of the argument structs' fields, options are metadata, "gold.NAME" is what
 * the output NAME must be. NaN in gold: that element must not be written. */
#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "../tools/safetensors.h"
#include "cpu/convert.h"
#include "flashkda/flashkda.h"

#define TOLERANCE_F64 1e-12   /* reference, outputs in f64 */
#define TOLERANCE_F32 2e-5    /* q, k, v and out in f32 */
#define TOLERANCE_HALF 2.5e-3 /* q, k, v and out in bf16 or f16 */

typedef union any_args {
  fkda_prefill_args prefill;
  fkda_decode_args decode;
  fkda_summary_args summary;
} any_args;

/* ---- fields by name -------------------------------------------------------------------------- */

typedef struct field {
  const char *name;
  size_t offset;
  enum { INPUT, OUTPUT, IN_PLACE, FLAG, INT64, DOUBLE, GATE, LAYOUT } kind;
} field;

#define COMMON_FIELDS(T)                                                                           \
  {"k", offsetof(T, k), INPUT}, {"v", offsetof(T, v), INPUT}, {"g", offsetof(T, g), INPUT},        \
      {"beta", offsetof(T, beta), INPUT}, {"A_log", offsetof(T, A_log), INPUT},                    \
      {"dt_bias", offsetof(T, dt_bias), INPUT}, {"gate", offsetof(T, gate), GATE},                 \
      {"l2norm", offsetof(T, l2norm), FLAG}, {"beta_is_logit", offsetof(T, beta_is_logit), FLAG},  \
      {"allow_neg_eigval", offsetof(T, allow_neg_eigval), FLAG},                                   \
      {"lower_bound", offsetof(T, lower_bound), DOUBLE}, {                                         \
    "state_layout", offsetof(T, state_layout), LAYOUT                                              \
  }
#define FIELD(name, kind)                                                                          \
  { #name, offsetof(T, name), kind }

#define T fkda_prefill_args
static const field prefill_fields[] = {
    COMMON_FIELDS(T),
    FIELD(q, INPUT),
    FIELD(out, OUTPUT),
    FIELD(scale, DOUBLE),
    FIELD(cu_seqlens, INPUT),
    FIELD(initial_state, INPUT),
    FIELD(final_state, OUTPUT),
    FIELD(initial_state_indices, INPUT),
    FIELD(final_state_indices, INPUT),
    FIELD(has_initial_state, INPUT),
    FIELD(checkpoint_state, OUTPUT),
    FIELD(checkpoint_offsets, INPUT),
    FIELD(checkpoint_indptr, INPUT),
    FIELD(checkpoint_state_indices, INPUT),
    FIELD(checkpoint_every, INT64),
    FIELD(checkpoint_before, FLAG),
    {NULL, 0, INPUT},
};
#undef T
#define T fkda_decode_args
static const field decode_fields[] = {
    COMMON_FIELDS(T),
    FIELD(q, INPUT),
    FIELD(out, OUTPUT),
    FIELD(scale, DOUBLE),
    FIELD(state, IN_PLACE),
    FIELD(write_state, FLAG),
    FIELD(initial_state_indices, INPUT),
    FIELD(final_state_indices, INPUT),
    FIELD(has_initial_state, INPUT),
    FIELD(num_accepted_tokens, INPUT),
    {NULL, 0, INPUT},
};
#undef T
#define T fkda_summary_args
static const field summary_fields[] = {
    COMMON_FIELDS(T), FIELD(cu_seqlens, INPUT), FIELD(M, OUTPUT),
    FIELD(b, OUTPUT), {NULL, 0, INPUT},
};
#undef T

/* ---- one call from one file ------------------------------------------------------------------ */

/* How the file's tensors are handed over. */
typedef enum form {
  NATIVE,        /* as they are; out like q, states in f32 */
  DOUBLE_OUT,    /* outputs and pools in f64 */
  DOUBLE_IN_OUT, /* every floating-point tensor in f64 */
} form;

enum { MAX_TENSORS = 24 };

typedef struct output {
  const char *name;
  fkda_tensor tensor;
  void *before; /* its bytes before the call */
} output;

typedef struct call {
  fkda_st *file;
  any_args args;
  output outputs[MAX_TENSORS];
  size_t num_outputs;
  void *owned[2 * MAX_TENSORS]; /* to be freed */
  size_t num_owned;
} call;

static int64_t elements(const fkda_tensor *x) {
  int64_t n = 1;
  for (int32_t i = 0; i < x->ndim; i++) n *= x->shape[i];
  return n;
}

static size_t bytes(const fkda_tensor *x) {
  return (size_t)elements(x) * fkda_dtype_size(x->dtype);
}

static bool is_float(const fkda_tensor *x) {
  return x->dtype == FKDA_F32 || x->dtype == FKDA_BF16 || x->dtype == FKDA_F16 ||
         x->dtype == FKDA_F64;
}

/* Exactly as large as needed, so that the address sanitizer sees every step outside. */
static void *own(call *c, size_t size) {
  void *memory = malloc(size);
  assert_non_null(memory);
  assert_true(c->num_owned < sizeof c->owned / sizeof *c->owned);
  return c->owned[c->num_owned++] = memory;
}

static fkda_tensor contiguous(call *c, const fkda_tensor *shape_of, int32_t dtype) {
  fkda_tensor x = fkda_tensor_contiguous(NULL, dtype, shape_of->ndim, shape_of->shape);
  x.data = own(c, bytes(&x));
  return x;
}

static double element(const fkda_tensor *x, const void *data, int64_t i) {
  double value = NAN;
  fkda_load_f64(&value, data, x->dtype, i, 1);
  return value;
}

static fkda_tensor converted(call *c, const fkda_tensor *from, int32_t dtype) {
  fkda_tensor to = contiguous(c, from, dtype);
  if (dtype == from->dtype) {
    memcpy(to.data, from->data, bytes(from));
  } else {
    for (int64_t i = 0; i < elements(from); i++) {
      const double value = element(from, from->data, i);
      fkda_store_f64(to.data, dtype, i, &value, 1);
    }
  }
  return to;
}

static void add_output(call *c, const char *name, fkda_tensor x) {
  assert_true(c->num_outputs < MAX_TENSORS);
  output *out = &c->outputs[c->num_outputs++];
  *out = (output){name, x, own(c, bytes(&x))};
  memcpy(out->before, x.data, bytes(&x));
}

/* Sets one field from the file, if it is there. Returns how many of the file's entries it used. */
static size_t set_field(call *c, const field *f, form form) {
  void *to = (char *)&c->args + f->offset;
  const char *text = fkda_st_metadata(c->file, f->name);
  if (f->kind <= IN_PLACE) {
    fkda_tensor from, gold = {0};
    char gold_name[64];
    snprintf(gold_name, sizeof gold_name, "gold.%s", f->name);
    const bool has_gold = fkda_st_find(c->file, gold_name, &gold);
    const bool has = fkda_st_find(c->file, f->name, &from);
    if (f->kind == INPUT && has) {
      assert_false(has_gold);
      const bool widen = form == DOUBLE_IN_OUT && is_float(&from);
      *(fkda_tensor *)to = converted(c, &from, widen ? FKDA_F64 : from.dtype);
    }
    if (f->kind == IN_PLACE && has) {
      assert_true(has_gold);
      *(fkda_tensor *)to = converted(c, &from, form == NATIVE ? from.dtype : FKDA_F64);
      add_output(c, f->name, *(fkda_tensor *)to);
    }
    if (f->kind == OUTPUT && has_gold) {
      assert_false(has);
      fkda_tensor like;
      const bool io = strcmp(f->name, "out") == 0;
      assert_true(fkda_st_find(c->file, "v", &like));
      fkda_tensor x = contiguous(c, &gold, form != NATIVE ? FKDA_F64 : io ? like.dtype : FKDA_F32);
      memset(x.data, 0x7b, bytes(&x)); /* a finite value in every dtype that no result equals */
      *(fkda_tensor *)to = x;
      add_output(c, f->name, x);
    }
    return (size_t)has + has_gold;
  }
  if (!text) return 0;
  switch (f->kind) {
    case FLAG: *(int32_t *)to = atoi(text); break;
    case INT64: *(int64_t *)to = atoll(text); break;
    case DOUBLE: *(double *)to = strtod(text, NULL); break;
    case GATE:
      *(int32_t *)to = strcmp(text, "bounded") == 0    ? FKDA_GATE_BOUNDED
                       : strcmp(text, "softplus") == 0 ? FKDA_GATE_SOFTPLUS
                       : strcmp(text, "direct") == 0   ? FKDA_GATE_DIRECT
                                                       : -1;
      break;
    case LAYOUT: *(int32_t *)to = strcmp(text, "kv") == 0 ? FKDA_STATE_KV : FKDA_STATE_VK; break;
    default: fail();
  }
  return 1;
}

/* Compares an output with gold: its relative error, and that nothing else has been written. */
static double check_output(const call *c, const output *out) {
  fkda_tensor gold;
  char name[64];
  snprintf(name, sizeof name, "gold.%s", out->name);
  assert_true(fkda_st_find(c->file, name, &gold));
  assert_int_equal(gold.dtype, FKDA_F64);
  assert_int_equal(elements(&gold), elements(&out->tensor));

  const size_t size = fkda_dtype_size(out->tensor.dtype);
  double error = 0, norm = 0;
  for (int64_t i = 0; i < elements(&gold); i++) {
    const double expected = ((const double *)gold.data)[i];
    const double before = element(&out->tensor, out->before, i);
    if (isnan(expected) || expected == before) { /* not to be written, or as it was in a pool */
      if (memcmp((char *)out->tensor.data + (size_t)i * size,
                 (char *)out->before + (size_t)i * size, size) != 0) {
        fail_msg("%s: element %lld was written", out->name, (long long)i);
      }
      continue;
    }
    const double difference = element(&out->tensor, out->tensor.data, i) - expected;
    error += difference * difference;
    norm += expected * expected;
  }
  return norm > 0 ? sqrt(error / norm) : 0; /* NaN if any element is */
}

/* ---- tests ----------------------------------------------------------------------------------- */

typedef struct test {
  char name[320], path[1024];
  const char *backend;
  form form;
} test;

static void run(const test *t, call *c) {
  char message[256];
  if (fkda_st_open(t->path, &c->file, message, sizeof message) != 0) {
    fail_msg("%s: %s", t->path, message);
  }
  const char *op = fkda_st_metadata(c->file, "op");
  assert_non_null(op);
  const field *fields = NULL;
  if (strcmp(op, "prefill") == 0) {
    c->args.prefill = FKDA_PREFILL_ARGS_INIT;
    c->args.prefill.backend = t->backend;
    fields = prefill_fields;
  } else if (strcmp(op, "decode") == 0) {
    c->args.decode = FKDA_DECODE_ARGS_INIT;
    c->args.decode.backend = t->backend;
    fields = decode_fields;
  } else if (strcmp(op, "summary") == 0) {
    c->args.summary = FKDA_SUMMARY_ARGS_INIT;
    c->args.summary.backend = t->backend;
    fields = summary_fields;
  }
  assert_non_null(fields);

  size_t used = 1; /* op */
  for (const field *f = fields; f->name; f++) used += set_field(c, f, t->form);
  /* A misspelt name would test less than it seems to. */
  assert_int_equal(used, fkda_st_count(c->file) + fkda_st_metadata_count(c->file));

  fkda_status status = fkda_query(&c->args);
  if (status == FKDA_ERROR_UNSUPPORTED && fields == summary_fields) {
    print_message("%s: %s\n", t->name, fkda_last_error()); /* experimental: a backend may lack it */
    return;
  }
  if (status == FKDA_OK) {
    if (fields == prefill_fields) status = fkda_prefill(&c->args.prefill);
    if (fields == decode_fields) status = fkda_decode(&c->args.decode);
    if (fields == summary_fields) status = fkda_summary(&c->args.summary);
  }
  if (status != FKDA_OK) fail_msg("%s: %s", fkda_status_string(status), fkda_last_error());

  fkda_tensor v;
  assert_true(fkda_st_find(c->file, "v", &v));
  const double tolerance = t->form != NATIVE     ? TOLERANCE_F64
                           : v.dtype == FKDA_F32 ? TOLERANCE_F32
                                                 : TOLERANCE_HALF;
  assert_true(c->num_outputs > 0);
  for (size_t i = 0; i < c->num_outputs; i++) {
    const double error = check_output(c, &c->outputs[i]);
    print_message("  %-16s error %.1e (<= %.1e)\n", c->outputs[i].name, error, tolerance);
    if (!(error <= tolerance)) fail_msg("%s: error %g > %g", c->outputs[i].name, error, tolerance);
  }
}

static call current; /* of the test that runs; here so that what a failing one owns is freed too */

static void gold(void **state) {
  memset(&current, 0, sizeof current);
  run(*state, &current);
}

static int tear_down(void **state) {
  (void)state;
  for (size_t i = 0; i < current.num_owned; i++) free(current.owned[i]);
  if (current.file) fkda_st_close(current.file);
  return 0;
}

static int is_gold(const struct dirent *entry) {
  const char *dot = strrchr(entry->d_name, '.');
  return dot && strcmp(dot, ".safetensors") == 0;
}

enum { MAX_TESTS = 1024 };
static test tests[MAX_TESTS];
static struct CMUnitTest units[MAX_TESTS];

int main(void) {
  struct dirent **files;
  const int num_files = scandir(FKDA_GOLD_DIR, &files, is_gold, alphasort);
  if (num_files <= 0) {
    fprintf(stderr, "no .safetensors file in %s\n", FKDA_GOLD_DIR);
    return 1;
  }
  size_t count = 0;
  for (int i = 0; i < num_files; i++) {
    const char *backend;
    for (int32_t b = 0; (backend = fkda_backend_name(b)) != NULL; b++) {
      if (fkda_backend_available(backend) != FKDA_OK) continue;
      const bool is_reference = strcmp(backend, "reference") == 0;
      for (form form = NATIVE; form <= (is_reference ? DOUBLE_IN_OUT : NATIVE); form++) {
        static const char *const words[] = {"", ", f64 out", ", f64 in and out"};
        if (count == MAX_TESTS) return 1;
        test *t = &tests[count];
        snprintf(t->name, sizeof t->name, "%s on %s%s", files[i]->d_name, backend, words[form]);
        snprintf(t->path, sizeof t->path, "%s/%s", FKDA_GOLD_DIR, files[i]->d_name);
        t->backend = backend;
        t->form = form;
        units[count++] = (struct CMUnitTest){t->name, gold, NULL, tear_down, t};
      }
    }
    free(files[i]);
  }
  free(files);
  return _cmocka_run_group_tests("gold", units, count, NULL, NULL);
}
