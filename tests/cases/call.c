/* SPDX-License-Identifier: MIT */
#include "call.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- tensors by name ---------------------------------------------------------------------------- */

enum { ABSENT = -1 };

/* Offset of each field in the structs. */
typedef struct field_row {
  int32_t prefill, decode, summary, backward;
} field_row;

#define P(field) (int32_t) offsetof(fkda_prefill_args, field)
#define D(field) (int32_t) offsetof(fkda_decode_args, field)
#define S(field) (int32_t) offsetof(fkda_summary_args, field)
#define G(field) (int32_t) offsetof(fkda_backward_args, field)
#define GRADIENT(field) [FKDA_FIELD_##field] = {ABSENT, ABSENT, ABSENT, G(field)}

static const field_row fields[FKDA_FIELDS] = {
    [FKDA_FIELD_q] = {P(q), D(q), ABSENT, G(q)},
    [FKDA_FIELD_k] = {P(k), D(k), S(k), G(k)},
    [FKDA_FIELD_v] = {P(v), D(v), S(v), G(v)},
    [FKDA_FIELD_g] = {P(g), D(g), S(g), G(g)},
    [FKDA_FIELD_beta] = {P(beta), D(beta), S(beta), G(beta)},
    [FKDA_FIELD_A_log] = {P(A_log), D(A_log), S(A_log), G(A_log)},
    [FKDA_FIELD_dt_bias] = {P(dt_bias), D(dt_bias), S(dt_bias), G(dt_bias)},
    [FKDA_FIELD_cu_seqlens] = {P(cu_seqlens), ABSENT, S(cu_seqlens), G(cu_seqlens)},
    [FKDA_FIELD_initial_state] = {P(initial_state), D(initial_state), ABSENT, G(initial_state)},
    [FKDA_FIELD_initial_state_indices] = {P(initial_state_indices), D(initial_state_indices),
                                          ABSENT, ABSENT},
    [FKDA_FIELD_final_state_indices] = {P(final_state_indices), D(final_state_indices), ABSENT,
                                        ABSENT},
    [FKDA_FIELD_has_initial_state] = {P(has_initial_state), D(has_initial_state), ABSENT, ABSENT},
    [FKDA_FIELD_num_accepted_tokens] = {ABSENT, D(num_accepted_tokens), ABSENT, ABSENT},
    [FKDA_FIELD_checkpoint_offsets] = {P(checkpoint_offsets), ABSENT, ABSENT, ABSENT},
    [FKDA_FIELD_checkpoint_indptr] = {P(checkpoint_indptr), ABSENT, ABSENT, ABSENT},
    [FKDA_FIELD_checkpoint_state_indices] = {P(checkpoint_state_indices), ABSENT, ABSENT, ABSENT},
    [FKDA_FIELD_out] = {P(out), D(out), ABSENT, ABSENT},
    [FKDA_FIELD_final_state] = {P(final_state), ABSENT, ABSENT, ABSENT},
    [FKDA_FIELD_checkpoint_state] = {P(checkpoint_state), ABSENT, ABSENT, ABSENT},
    [FKDA_FIELD_state] = {ABSENT, D(state), ABSENT, ABSENT},
    [FKDA_FIELD_M] = {ABSENT, ABSENT, S(M), ABSENT},
    [FKDA_FIELD_b] = {ABSENT, ABSENT, S(b), ABSENT},
    GRADIENT(d_out),
    GRADIENT(d_final_state),
    GRADIENT(d_q),
    GRADIENT(d_k),
    GRADIENT(d_v),
    GRADIENT(d_g),
    GRADIENT(d_beta),
    GRADIENT(d_A_log),
    GRADIENT(d_dt_bias),
    GRADIENT(d_initial_state),
};

static const char *const field_names[FKDA_FIELDS] = {
#define FIELD_NAME(name) #name,
    FKDA_FIELD_LIST(FIELD_NAME)
#undef FIELD_NAME
};

const char *fkda_field_name(fkda_field field) {
  return field < FKDA_FIELDS ? field_names[field] : NULL;
}

fkda_field fkda_field_of(const char *name) {
  int i = 0;
  while (i < FKDA_FIELDS && strcmp(field_names[i], name) != 0) i++;
  return (fkda_field)i;
}

bool fkda_call_init(fkda_call *call, int32_t op) {
  memset(call, 0, sizeof *call);
  switch (op) {
    case FKDA_OP_PREFILL: call->prefill = FKDA_PREFILL_ARGS_INIT; return true;
    case FKDA_OP_DECODE: call->decode = FKDA_DECODE_ARGS_INIT; return true;
    case FKDA_OP_SUMMARY: call->summary = FKDA_SUMMARY_ARGS_INIT; return true;
    case FKDA_OP_BACKWARD: call->backward = FKDA_BACKWARD_ARGS_INIT; return true;
    default: return false;
  }
}

static int32_t pick(int32_t op, int32_t prefill, int32_t decode, int32_t summary,
                    int32_t backward) {
  switch (op) {
    case FKDA_OP_PREFILL: return prefill;
    case FKDA_OP_DECODE: return decode;
    case FKDA_OP_SUMMARY: return summary;
    default: return backward;
  }
}

fkda_tensor *fkda_call_tensor(fkda_call *call, fkda_field field) {
  const field_row *row = &fields[field];
  const int32_t offset =
      pick(call->header.op, row->prefill, row->decode, row->summary, row->backward);
  return offset == ABSENT ? NULL : (fkda_tensor *)(void *)((char *)call + offset);
}

const fkda_tensor *fkda_call_tensor_const(const fkda_call *call, fkda_field field) {
  return fkda_call_tensor((fkda_call *)call, field);
}

bool fkda_call_has(const fkda_call *call, fkda_field field) {
  const fkda_tensor *tensor = fkda_call_tensor_const(call, field);
  return tensor && tensor->dtype != FKDA_NONE;
}

fkda_status fkda_call_run(const fkda_call *call) {
  switch (call->header.op) {
    case FKDA_OP_PREFILL: return fkda_prefill(&call->prefill);
    case FKDA_OP_DECODE: return fkda_decode(&call->decode);
    case FKDA_OP_SUMMARY: return fkda_summary(&call->summary);
    default: return fkda_backward(&call->backward);
  }
}

static const char *const op_names[] = {NULL, "prefill", "decode", "summary", "backward"};
enum { OPS = sizeof op_names / sizeof op_names[0] };

const char *fkda_op_name(int32_t op) { return op >= 1 && op < OPS ? op_names[op] : NULL; }

int32_t fkda_op_of(const char *name) {
  for (int32_t op = 1; op < OPS; op++) {
    if (strcmp(op_names[op], name) == 0) return op;
  }
  return 0;
}

/* ---- options by name ---------------------------------------------------------------------------- */

typedef enum option_kind {
  OPTION_GATE,
  OPTION_LAYOUT,
  OPTION_BOOL,
  OPTION_INT64,
  OPTION_DOUBLE
} option_kind;

typedef struct option_row {
  const char *name;
  option_kind kind;
  int32_t prefill, decode, summary, backward;
} option_row;

static const option_row options[] = {
    {"gate", OPTION_GATE, P(gate), D(gate), S(gate), G(gate)},
    {"l2norm", OPTION_BOOL, P(l2norm), D(l2norm), S(l2norm), G(l2norm)},
    {"beta_is_logit", OPTION_BOOL, P(beta_is_logit), D(beta_is_logit), S(beta_is_logit),
     G(beta_is_logit)},
    {"allow_neg_eigval", OPTION_BOOL, P(allow_neg_eigval), D(allow_neg_eigval), S(allow_neg_eigval),
     G(allow_neg_eigval)},
    {"lower_bound", OPTION_DOUBLE, P(lower_bound), D(lower_bound), S(lower_bound), G(lower_bound)},
    {"scale", OPTION_DOUBLE, P(scale), D(scale), ABSENT, G(scale)},
    {"state_layout", OPTION_LAYOUT, P(state_layout), D(state_layout), S(state_layout),
     G(state_layout)},
    {"write_state", OPTION_BOOL, ABSENT, D(write_state), ABSENT, ABSENT},
    {"checkpoint_every", OPTION_INT64, P(checkpoint_every), ABSENT, ABSENT, ABSENT},
    {"checkpoint_before", OPTION_BOOL, P(checkpoint_before), ABSENT, ABSENT, ABSENT},
    {"batch_invariant", OPTION_BOOL, P(batch_invariant), D(batch_invariant), ABSENT, ABSENT},
};
enum { OPTIONS = sizeof options / sizeof options[0] };

static const char *const gate_names[] = {"bounded", "softplus", "direct"};
static const char *const layout_names[] = {"vk", "kv"};

static bool parse_word(const char *value, const char *const *names, int count, int32_t *out) {
  for (int i = 0; i < count; i++) {
    if (strcmp(value, names[i]) == 0) {
      *out = i;
      return true;
    }
  }
  return false;
}

static bool parse_bool(const char *value, int32_t *out) {
  const bool yes =
      strcmp(value, "1") == 0 || strcmp(value, "true") == 0 || strcmp(value, "True") == 0;
  const bool no =
      strcmp(value, "0") == 0 || strcmp(value, "false") == 0 || strcmp(value, "False") == 0;
  *out = yes;
  return yes || no;
}

static bool parse_int64(const char *value, int64_t *out) {
  char *end;
  errno = 0;
  const long long number = strtoll(value, &end, 10);
  *out = number;
  return end != value && *end == 0 && errno == 0;
}

static bool parse_double(const char *value, double *out) {
  char *end;
  *out = strtod(value, &end);
  return end != value && *end == 0;
}

bool fkda_option_exists(const char *name, bool *boolean) {
  for (int i = 0; i < OPTIONS; i++) {
    if (strcmp(options[i].name, name) != 0) continue;
    *boolean = options[i].kind == OPTION_BOOL;
    return true;
  }
  return false;
}

bool fkda_call_set(fkda_call *call, const char *name, const char *value, char *error,
                   size_t capacity) {
  static const char *const expected[] = {[OPTION_GATE] = "bounded, softplus or direct",
                                         [OPTION_LAYOUT] = "vk or kv",
                                         [OPTION_BOOL] = "0 or 1",
                                         [OPTION_INT64] = "an integer",
                                         [OPTION_DOUBLE] = "a number"};
  for (int i = 0; i < OPTIONS; i++) {
    const option_row *row = &options[i];
    if (strcmp(row->name, name) != 0) continue;
    const int32_t offset =
        pick(call->header.op, row->prefill, row->decode, row->summary, row->backward);
    if (offset == ABSENT) {
      snprintf(error, capacity, "%s: %s has no such option", name, fkda_op_name(call->header.op));
      return false;
    }
    void *place = (char *)call + offset;
    bool good = false;
    switch (row->kind) {
      case OPTION_GATE: good = parse_word(value, gate_names, 3, place); break;
      case OPTION_LAYOUT: good = parse_word(value, layout_names, 2, place); break;
      case OPTION_BOOL: good = parse_bool(value, place); break;
      case OPTION_INT64: good = parse_int64(value, place); break;
      case OPTION_DOUBLE: good = parse_double(value, place); break;
    }
    if (!good)
      snprintf(error, capacity, "%s: \"%.40s\", expected %s", name, value, expected[row->kind]);
    return good;
  }
  snprintf(error, capacity, "%.40s: no such option", name);
  return false;
}

const char *fkda_call_option(const fkda_call *call, int index, char *text, size_t capacity) {
  if (index < 0 || index >= OPTIONS) return NULL;
  const option_row *row = &options[index];
  const int32_t offset =
      pick(call->header.op, row->prefill, row->decode, row->summary, row->backward);
  const void *place = (const char *)call + offset;
  text[0] = 0;
  if (offset == ABSENT) return row->name;
  switch (row->kind) {
    case OPTION_GATE: snprintf(text, capacity, "%s", gate_names[*(const int32_t *)place]); break;
    case OPTION_LAYOUT:
      snprintf(text, capacity, "%s", layout_names[*(const int32_t *)place]);
      break;
    case OPTION_BOOL: snprintf(text, capacity, "%d", (int)*(const int32_t *)place); break;
    case OPTION_INT64: snprintf(text, capacity, "%lld", (long long)*(const int64_t *)place); break;
    case OPTION_DOUBLE: snprintf(text, capacity, "%.17g", *(const double *)place); break;
  }
  return row->name;
}

int32_t fkda_call_layout(const fkda_call *call) {
  return pick(call->header.op, call->prefill.state_layout, call->decode.state_layout,
              call->summary.state_layout, call->backward.state_layout);
}

/* ---- elements ----------------------------------------------------------------------------------- */

int64_t fkda_tensor_elements(const fkda_tensor *tensor) {
  int64_t count = 1;
  for (int32_t d = 0; d < tensor->ndim; d++) count *= tensor->shape[d];
  return count;
}

size_t fkda_tensor_extent(const fkda_tensor *tensor) {
  int64_t last = 0;
  if (fkda_tensor_elements(tensor) == 0) return 0;
  for (int32_t d = 0; d < tensor->ndim; d++) {
    if (tensor->shape[d] > 1) last += (tensor->shape[d] - 1) * tensor->stride[d];
  }
  return (size_t)(last + 1) * fkda_dtype_size(tensor->dtype);
}

static float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static double load_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double value;
  if (exponent == 31) {
    value = mantissa ? (double)NAN : (double)INFINITY;
  } else {
    value = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
  }
  return bits & 0x8000 ? -value : value;
}

/* Rounds once, from double; ties to even by nearbyint in the default rounding mode. */
static uint16_t store_f16(double value) {
  const uint16_t sign = signbit(value) ? 0x8000 : 0;
  const double x = fabs(value);
  if (isnan(value)) return 0x7e00;
  if (x >= 65520) return sign | 0x7c00;
  if (x == 0) return sign;
  int exponent;
  frexp(x, &exponent); /* x = m * 2^exponent, m in [0.5, 1) */
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11; /* log2 of the last place */
  const int count = (int)nearbyint(ldexp(x, -unit));          /* in last places, up to 2048 */
  if (unit == -24) return (uint16_t)(sign | count);
  return (uint16_t)(sign | (((unit + 25) << 10) + (count - 1024)));
}

static uint16_t store_bf16(double value) {
  if (isnan(value)) return 0x7fc0;
  if (isinf(value) || value == 0) return (uint16_t)(bits_of_float((float)value) >> 16);
  /* Through float rounded to odd, so that the second rounding is the only one that counts. */
  float nearest = (float)value;
  uint32_t bits = bits_of_float(nearest);
  if ((double)nearest != value && !isinf(nearest)) {
    if (fabs((double)nearest) > fabs(value)) bits--; /* towards zero */
    bits |= 1;
  }
  bits += 0x7fff + (bits >> 16 & 1);
  return (uint16_t)(bits >> 16);
}

double fkda_load(const void *data, int32_t dtype, int64_t offset) {
  switch (dtype) {
    case FKDA_F32: return ((const float *)data)[offset];
    case FKDA_BF16: return float_of_bits((uint32_t)((const uint16_t *)data)[offset] << 16);
    case FKDA_F16: return load_f16(((const uint16_t *)data)[offset]);
    case FKDA_F64: return ((const double *)data)[offset];
    case FKDA_I32: return ((const int32_t *)data)[offset];
    case FKDA_I64: return (double)((const int64_t *)data)[offset];
    default: return ((const uint8_t *)data)[offset];
  }
}

void fkda_store(void *data, int32_t dtype, int64_t offset, double value) {
  switch (dtype) {
    case FKDA_F32: ((float *)data)[offset] = (float)value; break;
    case FKDA_BF16: ((uint16_t *)data)[offset] = store_bf16(value); break;
    case FKDA_F16: ((uint16_t *)data)[offset] = store_f16(value); break;
    case FKDA_F64: ((double *)data)[offset] = value; break;
    case FKDA_I32: ((int32_t *)data)[offset] = (int32_t)value; break;
    case FKDA_I64: ((int64_t *)data)[offset] = (int64_t)value; break;
    default: ((uint8_t *)data)[offset] = value != 0; break;
  }
}

void fkda_walk_step(fkda_walk *walk, const fkda_tensor *tensor) {
  for (int32_t d = tensor->ndim - 1; d >= 0; d--) {
    if (++walk->index[d] < tensor->shape[d]) {
      walk->offset += tensor->stride[d];
      return;
    }
    walk->offset -= (tensor->shape[d] - 1) * tensor->stride[d];
    walk->index[d] = 0;
  }
}

void fkda_gather(const fkda_tensor *tensor, double *out) {
  const int64_t count = fkda_tensor_elements(tensor);
  fkda_walk walk = {0};
  for (int64_t i = 0; i < count; i++) {
    out[i] = fkda_load(tensor->data, tensor->dtype, walk.offset);
    fkda_walk_step(&walk, tensor);
  }
}

void fkda_gather_bytes(const fkda_tensor *tensor, void *out) {
  const int64_t count = fkda_tensor_elements(tensor);
  const size_t size = fkda_dtype_size(tensor->dtype);
  fkda_walk walk = {0};
  for (int64_t i = 0; i < count; i++) {
    memcpy((char *)out + (size_t)i * size, (const char *)tensor->data + walk.offset * (int64_t)size,
           size);
    fkda_walk_step(&walk, tensor);
  }
}

fkda_tensor fkda_slice(fkda_tensor tensor, int32_t dimension, int64_t first, int64_t count) {
  if (count > 0) {
    tensor.data = (char *)tensor.data +
                  first * tensor.stride[dimension] * (int64_t)fkda_dtype_size(tensor.dtype);
  }
  tensor.shape[dimension] = count;
  return tensor;
}
