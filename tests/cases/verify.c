/* Runs a case on a backend and judges it. Knows the public API only.
 *
 * SPDX-License-Identifier: MIT
 */
#define _POSIX_C_SOURCE 200809L

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "fixture.h"

static bool complain(fkda_result *result, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static bool complain(fkda_result *result, const char *format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(result->message, sizeof result->message, format, list);
  va_end(list);
  result->verdict = FKDA_FAIL;
  return false;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double fkda_tolerance(int32_t io, int32_t dtype) {
  const int32_t both[2] = {io, dtype};
  double tolerance = 2e-5;
  for (int i = 0; i < 2; i++) {
    const double own = both[i] == FKDA_BF16 ? 2.5e-3 : both[i] == FKDA_F16 ? 1e-3 : 2e-5;
    tolerance = own > tolerance ? own : tolerance;
  }
  return tolerance;
}

/* On a GPU matrix products take bf16 operands; decode computes in fp32 there too. */
static double tolerance_of(const fkda_fixture *f, int32_t dtype) {
  if (f->memory->device_type != FKDA_DEVICE_CUDA || f->c->op == FKDA_OP_DECODE)
    return fkda_tolerance(f->c->io, dtype);
  return f->c->numbers[0] == 2 ? 1.5e-2 : 5e-3; /* 2: collinear keys */
}

/* ---- gold --------------------------------------------------------------------------------------- */

/* An output of the gold call: contiguous doubles in the shape of the host call's tensor. */
static bool gold_tensor(fkda_fixture *f, fkda_call *call, fkda_field field) {
  if (!fkda_call_has(&f->host, field)) return true;
  const fkda_tensor *like = fkda_call_tensor_const(&f->host, field);
  const int64_t count = fkda_tensor_elements(like);
  f->gold[field] = malloc((size_t)(count + 1) * sizeof(double));
  if (!f->gold[field]) return false;
  fkda_gather(like, f->gold[field]);
  *fkda_call_tensor(call, field) =
      fkda_tensor_contiguous(f->gold[field], FKDA_F64, like->ndim, like->shape);
  return true;
}

/* What skips a sequence on CUDA is an error on the CPU: indices with -1 for what is no slot of the pool.
 * Returns memory to free; NULL if there is none. */
static int64_t *valid_indices(fkda_call *call, fkda_field field, fkda_field pool) {
  if (!fkda_call_has(call, field)) return NULL;
  fkda_tensor *tensor = fkda_call_tensor(call, field);
  const int64_t slots = fkda_call_tensor(call, pool)->shape[0];
  const int64_t count = fkda_tensor_elements(tensor);
  int64_t *values = malloc((size_t)(count + 1) * sizeof *values);
  if (!values) return NULL;
  for (int64_t i = 0; i < count; i++) { /* index tensors are contiguous */
    values[i] = (int64_t)fkda_load(tensor->data, tensor->dtype, i);
    if (values[i] < 0 || values[i] >= slots) values[i] = -1;
  }
  *tensor = fkda_tensor_contiguous(values, FKDA_I64, tensor->ndim, tensor->shape);
  return values;
}

/* The same of accepted counts: 1 for what is none, and -1 as that sequence's start in `initial`, which
 * valid_indices() has made. */
static int64_t *valid_counts(fkda_call *call, int64_t *initial) {
  if (!fkda_call_has(call, FKDA_FIELD_num_accepted_tokens) || !initial) return NULL;
  fkda_tensor *tensor = &call->decode.num_accepted_tokens;
  const int64_t N = tensor->shape[0], M = call->decode.initial_state_indices.shape[1];
  int64_t *values = malloc((size_t)(N + 1) * sizeof *values);
  for (int64_t n = 0; n < N && values; n++) {
    values[n] = (int64_t)fkda_load(tensor->data, tensor->dtype, n);
    if (values[n] >= 1 && values[n] <= M) continue;
    values[n] = 1;
    initial[n * M] = -1;
  }
  if (values) *tensor = fkda_tensor_contiguous(values, FKDA_I64, 1, &N);
  return values;
}

static bool make_gold(fkda_fixture *f, char *error, size_t capacity) {
  if (f->have_gold) return true;
  const bool decode = f->c->op == FKDA_OP_DECODE;
  fkda_call call = f->host;
  call.header.backend = "reference";
  for (int field = FKDA_FIRST_OUTPUT; field < FKDA_FIELDS; field++) {
    free(f->gold[field]);
    f->gold[field] = NULL;
    if (!gold_tensor(f, &call, (fkda_field)field)) {
      snprintf(error, capacity, "out of memory for gold");
      return false;
    }
  }
  int64_t *indices[3] = {NULL, NULL, NULL};
  if (fkda_slots_bad(f->c->slots)) {
    indices[0] =
        valid_indices(&call, FKDA_FIELD_initial_state_indices,
                      decode && !f->c->final_dtype ? FKDA_FIELD_state : FKDA_FIELD_initial_state);
    indices[1] = valid_indices(&call, FKDA_FIELD_final_state_indices,
                               decode ? FKDA_FIELD_state : FKDA_FIELD_final_state);
    if (decode) indices[2] = valid_counts(&call, indices[0]);
  }
  const fkda_status status = fkda_call_run(&call);
  for (int i = 0; i < 3; i++) free(indices[i]);
  if (status != FKDA_OK) {
    snprintf(error, capacity, "gold: %s: %s", fkda_status_string(status), fkda_last_error());
    return false;
  }
  f->have_gold = true;
  return true;
}

const double *fkda_fixture_gold(fkda_fixture *fixture, fkda_field field, char *error,
                                size_t capacity) {
  return make_gold(fixture, error, capacity) ? fixture->gold[field] : NULL;
}

/* ---- one call ----------------------------------------------------------------------------------- */

static bool reset(fkda_fixture *f) {
  for (int i = 0; i < f->buffer_count; i++) {
    const fkda_buffer *b = &f->buffers[i];
    if (!f->memory->upload(f->memory, b->device, b->before, b->bytes)) return false;
  }
  return true;
}

static bool fetch(fkda_fixture *f) {
  for (int i = 0; i < f->buffer_count; i++) {
    const fkda_buffer *b = &f->buffers[i];
    if (!f->memory->download(f->memory, b->after, b->device, b->bytes)) return false;
  }
  return true;
}

static void protect(const fkda_fixture *f, bool on) {
  if (!f->memory->protect || !f->memory->guard) return;
  for (int i = 0; i < f->buffer_count; i++) {
    const fkda_buffer *b = &f->buffers[i];
    const size_t end = b->offset + b->extent;
    /* The sanitizer's granule is 8 bytes: a guard begins at the next one. */
    f->memory->protect(f->memory, b->device, b->offset / 8 * 8, on);
    f->memory->protect(f->memory, b->device + (end + 7) / 8 * 8, b->bytes - (end + 7) / 8 * 8, on);
  }
}

/* A workspace of exactly the size asked for, between guards. */
typedef struct workspace {
  unsigned char *image, *device;
  size_t bytes;
} workspace;

static bool workspace_new(const fkda_memory *memory, fkda_call *call, workspace *w,
                          fkda_result *result) {
  size_t size = 0;
  memset(w, 0, sizeof *w);
  const fkda_status status = fkda_workspace_size(call, &size);
  if (status != FKDA_OK) {
    return complain(result, "fkda_workspace_size: %s: %s", fkda_status_string(status),
                    fkda_last_error());
  }
  w->bytes = size + 2 * memory->guard;
  w->image = malloc(w->bytes + 1);
  w->device = memory->alloc(memory, w->bytes);
  if (!w->image || !w->device) return complain(result, "out of memory for the workspace");
  memset(w->image, FKDA_POISON, w->bytes);
  if (!memory->upload(memory, w->device, w->image, w->bytes))
    return complain(result, "upload failed");
  call->header.workspace = w->device + memory->guard;
  call->header.workspace_size = size;
  return true;
}

static bool workspace_intact(const fkda_memory *memory, const workspace *w, fkda_result *result) {
  if (!memory->download(memory, w->image, w->device, w->bytes))
    return complain(result, "download failed");
  const size_t guard = memory->guard;
  for (size_t i = 0; i < guard; i++) {
    if (w->image[i] != FKDA_POISON) {
      return complain(result, "workspace: written %zu bytes before its begin", guard - i);
    }
    if (w->image[w->bytes - guard + i] != FKDA_POISON) {
      return complain(result, "workspace: written %zu bytes past its end", i + 1);
    }
  }
  return true;
}

/* One call on device memory as it is now. */
static bool invoke(fkda_fixture *f, const fkda_call *wanted, fkda_status expected,
                   fkda_result *result) {
  fkda_call call = *wanted;
  workspace w = {0};
  const bool with_workspace = !f->memory->null_workspace || f->c->seed % 2;
  bool good = !with_workspace || workspace_new(f->memory, &call, &w, result);
  if (good) {
    protect(f, true);
    const double start = now();
    const fkda_status status = fkda_call_run(&call);
    char error[128];
    if (f->memory->finish && !f->memory->finish(f->memory, error, sizeof error))
      good = complain(result, "the device failed: %s", error);
    result->seconds = now() - start;
    protect(f, false);
    if (good && status != expected) {
      good = complain(result, "returned \"%s\", expected \"%s\": %s", fkda_status_string(status),
                      fkda_status_string(expected), status == FKDA_OK ? "" : fkda_last_error());
    }
  }
  if (good && with_workspace) good = workspace_intact(f->memory, &w, result);
  free(w.image);
  if (w.device) f->memory->free(f->memory, w.device);
  return good;
}

/* ---- judging ------------------------------------------------------------------------------------ */

/* The field whose elements lie at this byte of a buffer, for messages. */
static const char *owner(const fkda_fixture *f, int buffer, size_t byte) {
  const fkda_buffer *b = &f->buffers[buffer];
  static const char *const outside[] = {"guard zone before ", "guard zone after "};
  static _Thread_local char text[96];
  const char *zone = byte < b->offset                ? outside[0]
                     : byte >= b->offset + b->extent ? outside[1]
                                                     : "";
  size_t n = (size_t)snprintf(text, sizeof text, "%s", zone);
  const char *separator = "";
  for (int field = 0; field < FKDA_FIELDS; field++) {
    if (fkda_call_has(&f->host, (fkda_field)field) && f->buffer_of[field] == buffer &&
        n < sizeof text) {
      n += (size_t)snprintf(text + n, sizeof text - n, "%s%s", separator,
                            fkda_field_name((fkda_field)field));
      separator = "/";
    }
  }
  return text;
}

/* Everything but the units that a correct call writes is as it was. */
static bool untouched(fkda_fixture *f, bool nothing_written, fkda_result *result) {
  for (int i = 0; i < f->buffer_count; i++) {
    fkda_buffer *b = &f->buffers[i];
    memcpy(b->base, b->before, b->bytes); /* what is expected */
  }
  for (int field = FKDA_FIRST_OUTPUT; field < FKDA_FIELDS && !nothing_written; field++) {
    if (!fkda_call_has(&f->host, (fkda_field)field)) continue;
    fkda_buffer *b = &f->buffers[f->buffer_of[field]];
    const fkda_tensor tensor = fkda_fixture_view(f, (fkda_field)field, b->base);
    const int64_t count = fkda_tensor_elements(&tensor);
    const int64_t unit = f->units[field] ? count / f->units[field] : 1;
    const size_t size = fkda_dtype_size(tensor.dtype);
    const size_t first = (size_t)((unsigned char *)tensor.data - b->base);
    fkda_walk walk = {0};
    for (int64_t e = 0; e < count; e++) {
      if (f->written[field][e / unit]) {
        const size_t at = first + (size_t)walk.offset * size;
        memcpy(b->base + at, b->after + at, size);
      }
      fkda_walk_step(&walk, &tensor);
    }
  }
  for (int i = 0; i < f->buffer_count; i++) {
    const fkda_buffer *b = &f->buffers[i];
    if (memcmp(b->base, b->after, b->bytes) == 0) continue;
    size_t byte = 0, changed = 0;
    for (size_t j = b->bytes; j-- > 0;) {
      if (b->base[j] != b->after[j]) {
        byte = j;
        changed++;
      }
    }
    return complain(result, "%s: %zu bytes changed that must not, the first at byte %" PRId64,
                    owner(f, i, byte), changed, (int64_t)byte - (int64_t)b->offset);
  }
  return true;
}

/* Of gradients, everything of the NaN's sequence and head, and of the head's sums over sequences. */
static bool gradient_exempt(const fkda_fixture *f, fkda_field field, int64_t row, int64_t head) {
  const fkda_case *c = f->c;
  const int64_t group = c->HV / c->H, n = c->nan_sequence;
  const bool of_keys = field == FKDA_FIELD_d_q || field == FKDA_FIELD_d_k;
  const bool in_keys = c->nan_field == FKDA_FIELD_q || c->nan_field == FKDA_FIELD_k;
  if (of_keys || in_keys) { /* compare heads of q and k */
    if ((of_keys ? head : head / group) != (in_keys ? c->nan_head : c->nan_head / group))
      return false;
  } else if (head != c->nan_head) {
    return false;
  }
  if (field == FKDA_FIELD_d_A_log || field == FKDA_FIELD_d_dt_bias) return true;
  if (field == FKDA_FIELD_d_initial_state) return row == n;
  return row >= f->begins[n] && row < f->begins[n] + f->lengths[n];
}

/* Elements about which nothing is promised. Of out, those before a NaN in its own chunk and head. */
static bool exempt(const fkda_fixture *f, fkda_field field, int64_t row, int64_t head,
                   int32_t chunk) {
  const fkda_case *c = f->c;
  if (c->nan_field == FKDA_FIELDS) return false;
  if (field >= FKDA_FIELD_d_q) return gradient_exempt(f, field, row, head);
  if (field != FKDA_FIELD_out) return false;
  const bool grouped = c->nan_field == FKDA_FIELD_q || c->nan_field == FKDA_FIELD_k;
  if ((grouped ? head * c->H / c->HV : head) != c->nan_head) return false;
  const int64_t at = row - f->begins[c->nan_sequence];
  return at >= c->nan_token / chunk * chunk && at < c->nan_token;
}

/* Which dimension of an output counts heads? */
static int32_t head_dimension(fkda_field field, int32_t ndim) {
  switch (field) {
    case FKDA_FIELD_d_A_log:
    case FKDA_FIELD_d_dt_bias: return 0;
    case FKDA_FIELD_out:
    case FKDA_FIELD_d_q:
    case FKDA_FIELD_d_k:
    case FKDA_FIELD_d_v:
    case FKDA_FIELD_d_g:
    case FKDA_FIELD_d_beta: return 2;
    default: return ndim - 3; /* states */
  }
}

/* RMS(x - gold) / RMS(gold) over written elements [from, to) rows; -1 where there is nothing to compare.
 * false with a message where one is finite and the other is not. x is what the call has written, or
 * `other`, contiguous. */
static bool compare(fkda_fixture *f, fkda_field field, const double *other, int32_t chunk,
                    int64_t from, int64_t to, double *error, fkda_result *result) {
  *error = -1;
  if (!fkda_call_has(&f->host, field)) return true;
  const fkda_buffer *b = &f->buffers[f->buffer_of[field]];
  const fkda_tensor tensor = fkda_fixture_view(f, field, b->after);
  const double *gold = f->gold[field];
  const int64_t count = fkda_tensor_elements(&tensor);
  const int64_t unit = f->units[field] ? count / f->units[field] : 1;
  const int32_t head_at = head_dimension(field, tensor.ndim);
  double difference = 0, power = 0;
  int64_t compared = 0;
  fkda_walk walk = {0};
  for (int64_t e = 0; e < count; e++, fkda_walk_step(&walk, &tensor)) {
    const int64_t row = e / unit;
    if (row < from || row >= to || !f->written[field][row]) continue;
    const double x = other ? other[e] : fkda_load(tensor.data, tensor.dtype, walk.offset);
    if (exempt(f, field, row, walk.index[head_at], chunk)) continue;
    compared++;
    if (isfinite(gold[e]) != isfinite(x)) {
      return complain(result, "%s[%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 "]: %g, gold %g",
                      fkda_field_name(field), walk.index[0], walk.index[1], walk.index[2],
                      tensor.ndim > 3 ? walk.index[3] : 0, x, gold[e]);
    }
    if (!isfinite(gold[e])) continue;
    difference += (x - gold[e]) * (x - gold[e]);
    power += gold[e] * gold[e];
  }
  /* Gradients can be as small as e^-200. A root mean square below 1e-30 counts as that: products of f32
   * numbers lose their digits towards 1e-38. */
  const double least = 1e-60 * (double)compared;
  if (power > 0 && power < least) power = least;
  if (compared) *error = sqrt(power > 0 ? difference / power : difference);
  return true;
}

static bool measure(fkda_fixture *f, fkda_field field, int32_t chunk, int64_t from, int64_t to,
                    double *error, fkda_result *result) {
  return compare(f, field, NULL, chunk, from, to, error, result);
}

static bool within(const char *what, double error, double tolerance, fkda_result *result) {
  if (error <= tolerance) return true; /* -1: nothing to compare */
  return complain(result, "%s: error %.3g, tolerance %.3g", what, error, tolerance);
}

/* Error of the state by equations (4) to (6), token by token in fp32; negative if out of memory. */
static double same_precision_error(const fkda_fixture *f) {
  const fkda_case *c = f->c;
  const int64_t K = c->K, V = c->V;
  const fkda_prefill_args *p = &f->host.prefill;
  float *S = calloc((size_t)(V * K), sizeof *S);
  float *k = malloc((size_t)K * sizeof *k), *decay = malloc((size_t)K * sizeof *decay);
  double difference = 0, power = 0;
  for (int64_t t = 0; t < c->T && S && k && decay; t++) {
    float norm = 0;
    for (int64_t i = 0; i < K; i++) {
      k[i] = (float)fkda_load(p->k.data, p->k.dtype, t * p->k.stride[1] + i);
      norm += k[i] * k[i];
      const float raw = (float)fkda_load(p->g.data, p->g.dtype, t * p->g.stride[1] + i);
      decay[i] = expf((float)c->lower_bound / (1 + expf(-raw)));
    }
    const float scale = 1 / sqrtf(norm + 1e-6f);
    for (int64_t i = 0; i < K; i++) k[i] *= scale;
    const float logit = (float)fkda_load(p->beta.data, p->beta.dtype, t * p->beta.stride[1]);
    for (int64_t v = 0; v < V; v++) {
      float u = 0;
      for (int64_t i = 0; i < K; i++) {
        S[v * K + i] *= decay[i]; /* (4) */
        u += S[v * K + i] * k[i];
      }
      u = ((float)fkda_load(p->v.data, p->v.dtype, t * p->v.stride[1] + v) - u) /
          (1 + expf(-logit));                                   /* (5) */
      for (int64_t i = 0; i < K; i++) S[v * K + i] += u * k[i]; /* (6) */
    }
  }
  for (int64_t i = 0; i < V * K && S; i++) {
    const double gold = f->gold[FKDA_FIELD_final_state][i];
    difference += (S[i] - gold) * (S[i] - gold);
    power += gold * gold;
  }
  const double error = S && k && decay ? sqrt(difference / power) : -1;
  free(S);
  free(k);
  free(decay);
  return error;
}

double fkda_fixture_state_limit(fkda_fixture *f) {
  char error[256];
  if (!f->c->same_precision || !fkda_fixture_gold(f, FKDA_FIELD_final_state, error, sizeof error))
    return 0;
  return 2 * same_precision_error(f);
}

/* The error that rounding gold to the field's dtype has by itself: with a few large elements, as gradients by
 * beta have, more than the 1.7e-3 of a normal distribution in bf16. */
static double rounding_error(const fkda_fixture *f, fkda_field field) {
  const fkda_tensor *tensor = fkda_call_tensor_const(&f->host, field);
  const int64_t count = fkda_tensor_elements(tensor);
  const int64_t unit = f->units[field] ? count / f->units[field] : 1;
  double difference = 0, power = 0;
  for (int64_t e = 0; e < count; e++) {
    const double gold = f->gold[field][e];
    uint64_t bits = 0;
    if (!f->written[field][e / unit] || !isfinite(gold)) continue;
    fkda_store(&bits, tensor->dtype, 0, gold);
    const double x = fkda_load(&bits, tensor->dtype, 0) - gold;
    difference += x * x;
    power += gold * gold;
  }
  return power > 0 ? sqrt(difference / power) : 0;
}

/* A tensor's values, each off by up to `share` of itself, contiguous; to be freed. */
static double *nudge(fkda_random *random, double share, fkda_tensor *tensor) {
  const int64_t count = fkda_tensor_elements(tensor);
  double *values = malloc((size_t)(count + 1) * sizeof *values);
  if (!values) return NULL;
  fkda_gather(tensor, values);
  for (int64_t i = 0; i < count; i++)
    values[i] *= 1 + share * (2 * fkda_random_uniform(random) - 1);
  *tensor = fkda_tensor_contiguous(values, FKDA_F64, tensor->ndim, tensor->shape);
  return values;
}

/* The error that a gradient has in double precision where the operands of a GPU's matrix products are rounded to
 * bf16 once: root mean square of a few draws, negative on failure. What cancels, as d_A_log does, or has few
 * elements of any size, as d_beta, has more than the operands. Collinear keys (2) stay what they are: rounded
 * to others they would be another problem. */
static double operand_error(fkda_fixture *f, fkda_field field, int32_t chunk) {
  enum { DRAWS = 8, INPUTS = 8 };
  const double share = 0x1p-9, of_keys = f->c->numbers[0] == 2 ? 0 : share;
  const struct {
    fkda_field field;
    double share;
  } inputs[INPUTS] = {{FKDA_FIELD_q, of_keys},
                      {FKDA_FIELD_k, of_keys},
                      {FKDA_FIELD_v, share},
                      {FKDA_FIELD_g, 0},
                      {FKDA_FIELD_beta, 0},
                      {FKDA_FIELD_d_out, share},
                      {FKDA_FIELD_initial_state, share},
                      {FKDA_FIELD_d_final_state, share}};
  fkda_random random;
  fkda_random_seed(&random, f->c->seed);
  double sum = 0;
  bool good = true;
  for (int draw = 0; draw < DRAWS && good; draw++) {
    double *values[INPUTS] = {NULL}, *outputs[FKDA_FIELDS] = {NULL}, error = 0;
    fkda_result ignored;
    fkda_call call = f->host;
    call.header.backend = "reference";
    for (int i = 0; i < INPUTS; i++) {
      if (!fkda_call_has(&call, inputs[i].field)) continue;
      values[i] = nudge(&random, inputs[i].share, fkda_call_tensor(&call, inputs[i].field));
      good = good && values[i];
    }
    for (int i = FKDA_FIRST_OUTPUT; i < FKDA_FIELDS && good; i++) {
      if (!fkda_call_has(&call, (fkda_field)i)) continue;
      fkda_tensor *tensor = fkda_call_tensor(&call, (fkda_field)i);
      outputs[i] = calloc((size_t)fkda_tensor_elements(tensor) + 1, sizeof(double));
      good = outputs[i];
      *tensor = fkda_tensor_contiguous(outputs[i], FKDA_F64, tensor->ndim, tensor->shape);
    }
    good = good && fkda_call_run(&call) == FKDA_OK &&
           compare(f, field, outputs[field], chunk, 0, INT64_MAX, &error, &ignored);
    sum += error * error;
    for (int i = 0; i < INPUTS; i++) free(values[i]);
    for (int i = 0; i < FKDA_FIELDS; i++) free(outputs[i]);
  }
  return good ? sqrt(sum / DRAWS) : -1;
}

/* Every gradient within the tolerance of its own dtype; on a GPU, or within four times what rounding the
 * operands once does to it: on the way to a gradient the states, U, P and their gradients are rounded too, and
 * of few sums one may be off by more than their deviation. */
static bool gradients_accurate(fkda_fixture *f, fkda_result *result) {
  for (int field = FKDA_FIELD_d_q; field <= FKDA_FIELD_d_initial_state; field++) {
    if (!fkda_call_has(&f->host, (fkda_field)field)) continue;
    const int32_t dtype = fkda_call_tensor_const(&f->host, (fkda_field)field)->dtype;
    const bool of_tokens = field <= FKDA_FIELD_d_beta;
    double *most = of_tokens ? &result->error_out : &result->error_state;
    double *tolerance = of_tokens ? &result->tolerance_out : &result->tolerance_state;
    double error;
    if (!measure(f, (fkda_field)field, result->chunk, 0, INT64_MAX, &error, result)) return false;
    if (error > *most) *most = error;
    *tolerance = tolerance_of(f, dtype);
    const double rounding = 1.1 * rounding_error(f, (fkda_field)field);
    if (rounding > *tolerance) *tolerance = rounding;
    if (error > *tolerance && f->memory->device_type == FKDA_DEVICE_CUDA) {
      const double operands = 4 * operand_error(f, (fkda_field)field, result->chunk);
      if (operands > *tolerance) *tolerance = operands;
    }
    if (!within(fkda_field_name((fkda_field)field), error, *tolerance, result)) return false;
  }
  return true;
}

static bool accurate(fkda_fixture *f, fkda_result *result) {
  if (f->c->op == FKDA_OP_BACKWARD) return gradients_accurate(f, result);
  static const fkda_field states[] = {FKDA_FIELD_final_state, FKDA_FIELD_state, FKDA_FIELD_M,
                                      FKDA_FIELD_b};
  double error;
  if (!measure(f, FKDA_FIELD_out, result->chunk, 0, INT64_MAX, &result->error_out, result))
    return false;
  if (!measure(f, FKDA_FIELD_checkpoint_state, result->chunk, 0, INT64_MAX,
               &result->error_checkpoint, result)) {
    return false;
  }
  for (size_t i = 0; i < sizeof states / sizeof states[0]; i++) {
    if (!fkda_call_has(&f->host, states[i])) continue;
    if (!measure(f, states[i], result->chunk, 0, INT64_MAX, &error, result)) return false;
    if (error > result->error_state) result->error_state = error;
    result->tolerance_state = tolerance_of(f, fkda_call_tensor_const(&f->host, states[i])->dtype);
  }
  result->tolerance_out = tolerance_of(f, f->c->io);
  const double limit = fkda_fixture_state_limit(f);
  if (limit > result->tolerance_state) result->tolerance_state = limit;
  result->tolerance_checkpoint = tolerance_of(f, f->c->checkpoint_dtype);
  return within("out", result->error_out, result->tolerance_out, result) &&
         within(f->c->op == FKDA_OP_SUMMARY ? "M or b" : "final state", result->error_state,
                result->tolerance_state, result) &&
         within("checkpoints", result->error_checkpoint, result->tolerance_checkpoint, result);
}

/* ---- claims --------------------------------------------------------------------------------------- */

static bool same_bits(fkda_fixture *f, const char *claim, fkda_result *result) {
  if (!fetch(f)) return complain(result, "%s: download failed", claim);
  for (int i = 0; i < f->buffer_count; i++) {
    const fkda_buffer *b = &f->buffers[i];
    if (memcmp(b->base, b->after, b->bytes) == 0) continue;
    size_t byte = 0;
    while (b->base[byte] == b->after[byte]) byte++;
    return complain(result, "%s: %s differs, first at byte %" PRId64, claim, owner(f, i, byte),
                    (int64_t)byte - (int64_t)b->offset);
  }
  return true;
}

static bool twice(fkda_fixture *f, fkda_result *result) {
  const double seconds = result->seconds;
  const bool good = reset(f) && invoke(f, &f->device, FKDA_OK, result) &&
                    same_bits(f, "the same call twice", result);
  result->seconds = seconds;
  return good;
}

/* The call on tokens [first, first + count) of every batch row. */
static void take_tokens(fkda_call *call, int64_t first, int64_t count) {
  static const fkda_field rows[] = {FKDA_FIELD_q, FKDA_FIELD_k,    FKDA_FIELD_v,
                                    FKDA_FIELD_g, FKDA_FIELD_beta, FKDA_FIELD_out};
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
    fkda_tensor *tensor = fkda_call_tensor(call, rows[i]);
    *tensor = fkda_slice(*tensor, 1, first, count);
  }
}

/* The call on one sequence alone. */
static void take_sequence(const fkda_fixture *f, fkda_call *call, int64_t n, int64_t count) {
  static const fkda_field rows[] = {FKDA_FIELD_q, FKDA_FIELD_k,    FKDA_FIELD_v,
                                    FKDA_FIELD_g, FKDA_FIELD_beta, FKDA_FIELD_out};
  static const struct {
    fkda_field states, indices, other; /* other: the index tensor that serves both purposes */
  } pools[] = {
      {FKDA_FIELD_initial_state, FKDA_FIELD_initial_state_indices, FKDA_FIELDS},
      {FKDA_FIELD_final_state, FKDA_FIELD_final_state_indices, FKDA_FIELDS},
      {FKDA_FIELD_state, FKDA_FIELD_initial_state_indices, FKDA_FIELD_final_state_indices},
  };
  static const fkda_field vectors[] = {FKDA_FIELD_initial_state_indices,
                                       FKDA_FIELD_final_state_indices, FKDA_FIELD_has_initial_state,
                                       FKDA_FIELD_num_accepted_tokens};
  if (!f->c->lens) {
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
      fkda_tensor *tensor = fkda_call_tensor(call, rows[i]);
      *tensor = fkda_slice(*tensor, 0, n, 1);
    }
    take_tokens(call, 0, count);
  } else {
    take_tokens(call, f->begins[n], count);
    call->prefill.cu_seqlens = (fkda_tensor){0};
  }
  for (size_t i = 0; i < sizeof pools / sizeof pools[0]; i++) {
    if (!fkda_call_has(call, pools[i].states) || fkda_call_has(call, pools[i].indices) ||
        (pools[i].other != FKDA_FIELDS && fkda_call_has(call, pools[i].other)))
      continue;
    fkda_tensor *tensor = fkda_call_tensor(call, pools[i].states);
    *tensor = fkda_slice(*tensor, 0, n, 1);
  }
  for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++) {
    if (!fkda_call_has(call, vectors[i])) continue;
    fkda_tensor *tensor = fkda_call_tensor(call, vectors[i]);
    *tensor = fkda_slice(*tensor, 0, n, 1);
  }
}

/* Room for states [N,HV,...] on the device, of the type in which the backend keeps its running state:
 * fp32, double for the reference. */
static fkda_tensor middle_state(const fkda_fixture *f) {
  const fkda_case *c = f->c;
  const bool vk = c->layout == FKDA_STATE_VK;
  const int64_t shape[4] = {fkda_case_sequences(c), c->HV, vk ? c->V : c->K, vk ? c->K : c->V};
  const bool reference = f->device.header.backend && !strcmp(f->device.header.backend, "reference");
  fkda_tensor tensor = fkda_tensor_contiguous(NULL, reference ? FKDA_F64 : FKDA_F32, 4, shape);
  tensor.data = f->memory->alloc(f->memory, fkda_tensor_extent(&tensor));
  return tensor;
}

static bool split(fkda_fixture *f, fkda_result *result) {
  const int64_t T = f->c->T, unit = result->chunk > 16 ? result->chunk : 16;
  const int64_t points[3] = {unit, T / 2 / unit * unit, (T - 1) / unit * unit};
  const fkda_tensor middle = middle_state(f);
  bool good = middle.data || complain(result, "split: out of memory");
  for (int i = 0; i < 3 && good; i++) {
    if (points[i] <= 0 || points[i] >= T) {
      good =
          complain(result, "split: T = %" PRId64 " is too short for chunks of %" PRId64, T, unit);
      break;
    }
    fkda_call first = f->device, second = f->device;
    take_tokens(&first, 0, points[i]);
    take_tokens(&second, points[i], T - points[i]);
    first.prefill.final_state = second.prefill.initial_state = middle;
    first.prefill.final_state_indices = second.prefill.initial_state_indices = (fkda_tensor){0};
    second.prefill.has_initial_state = (fkda_tensor){0};
    char claim[64];
    snprintf(claim, sizeof claim, "split at %" PRId64, points[i]);
    good = reset(f) && invoke(f, &first, FKDA_OK, result) && invoke(f, &second, FKDA_OK, result) &&
           same_bits(f, claim, result);
  }
  if (middle.data) f->memory->free(f->memory, middle.data);
  return good;
}

static bool alone(fkda_fixture *f, fkda_result *result) {
  bool good = reset(f);
  for (int64_t n = 0; n < fkda_case_sequences(f->c) && good; n++) {
    fkda_call call = f->device;
    take_sequence(f, &call, n, f->lengths[n]);
    good = invoke(f, &call, FKDA_OK, result);
  }
  return good && same_bits(f, "each sequence alone", result);
}

/* Other finite values in every token after p, gates that a path choice could fall for among them. */
static void change_tokens(const fkda_fixture *f, int64_t p) {
  static const fkda_field rows[] = {FKDA_FIELD_q, FKDA_FIELD_k, FKDA_FIELD_v, FKDA_FIELD_g,
                                    FKDA_FIELD_beta};
  const fkda_case *c = f->c;
  const double extreme = c->gate == FKDA_GATE_DIRECT ? -90 : 60;
  fkda_random random;
  fkda_random_seed(&random, c->seed + (uint64_t)p);
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
    fkda_tensor tensor = fkda_fixture_view(f, rows[i], f->buffers[f->buffer_of[rows[i]]].after);
    fkda_dist dist = {FKDA_DIST_UNIFORM, -0.25, 0.25};
    if (rows[i] == FKDA_FIELD_g) dist = (fkda_dist){FKDA_DIST_EITHER, extreme, -1e-3};
    if (rows[i] == FKDA_FIELD_beta) dist = (fkda_dist){FKDA_DIST_UNIFORM, 0.3, 0.9};
    tensor = fkda_slice(tensor, 1, p + 1, c->T - p - 1);
    fkda_random_fill(&random, &tensor, dist, -1, -1);
  }
}

static bool future(fkda_fixture *f, fkda_result *result) {
  const fkda_case *c = f->c;
  const int64_t T = c->T, chunk = result->chunk;
  const int64_t points[3] = {T / 3, T / 2 / 16 * 16 + 2, T - 2};
  const fkda_buffer *b = &f->buffers[f->buffer_of[FKDA_FIELD_out]];
  for (int i = 0; i < 3; i++) {
    const int64_t p = points[i], begin = (p + 1) / chunk * chunk;
    if (!reset(f) || !fetch(f)) return complain(result, "future: copy failed");
    change_tokens(f, p);
    for (int j = 0; j < f->buffer_count; j++) {
      const fkda_buffer *x = &f->buffers[j];
      if (!f->memory->upload(f->memory, x->device, x->after, x->bytes)) {
        return complain(result, "future: upload failed");
      }
    }
    if (!invoke(f, &f->device, FKDA_OK, result)) return false;
    if (!fetch(f)) return complain(result, "future: download failed");
    const fkda_tensor after = fkda_fixture_view(f, FKDA_FIELD_out, b->after);
    const fkda_tensor base = fkda_fixture_view(f, FKDA_FIELD_out, b->base);
    const size_t size = fkda_dtype_size(after.dtype);
    fkda_walk walk = {0};
    for (int64_t e = fkda_tensor_elements(&after); e > 0; e--, fkda_walk_step(&walk, &after)) {
      const int64_t at = walk.offset * (int64_t)size;
      if (walk.index[1] < begin &&
          memcmp((char *)after.data + at, (char *)base.data + at, size) != 0) {
        return complain(result,
                        "future: tokens after %" PRId64 " changed, and with them out[%" PRId64
                        ",%" PRId64 ",%" PRId64 ",%" PRId64 "] of a chunk before",
                        p, walk.index[0], walk.index[1], walk.index[2], walk.index[3]);
      }
    }
    for (int64_t n = 0; n < c->B; n++) {
      double error;
      if (!measure(f, FKDA_FIELD_out, result->chunk, n * T, n * T + p + 1, &error, result) ||
          !within("future: out up to the changed token", error, result->tolerance_out, result)) {
        return false;
      }
      if (begin <= p && (!measure(f, FKDA_FIELD_out, result->chunk, n * T + begin, n * T + p + 1,
                                  &error, result) ||
                         !within("future: out in the changed token's chunk", error,
                                 result->tolerance_out, result))) {
        return false;
      }
    }
  }
  return true;
}

/* Bytes of one state [HV,rows,cols] of a (maybe strided) tensor, contiguous. */
static void state_bytes(fkda_tensor states, int64_t slot, void *out) {
  const fkda_tensor one = fkda_slice(states, 0, slot, 1);
  fkda_gather_bytes(&one, out);
}

/* Offsets [N,C] or an interval, both without slots and in fp32: row by row against the prefix alone. */
static bool prefix(fkda_fixture *f, fkda_result *result) {
  const fkda_case *c = f->c;
  const fkda_buffer *b = &f->buffers[f->buffer_of[FKDA_FIELD_checkpoint_state]];
  fkda_tensor stored = fkda_fixture_view(f, FKDA_FIELD_checkpoint_state, b->base);
  const int64_t per_sequence = stored.ndim == 5 ? stored.shape[1] : 0;
  if (stored.ndim == 5) { /* [N,C,...] -> [N*C,...]; contiguous in these cases */
    const int64_t shape[4] = {stored.shape[0] * stored.shape[1], stored.shape[2], stored.shape[3],
                              stored.shape[4]};
    stored = fkda_tensor_contiguous(stored.data, stored.dtype, 4, shape);
  }
  const size_t bytes = (size_t)(c->HV * c->K * c->V) * 4;
  fkda_tensor middle = middle_state(f); /* room enough for fp32, the checkpoints' type */
  middle.dtype = FKDA_F32;
  unsigned char *expected = malloc(bytes), *got = malloc(bytes);
  bool good = (middle.data && expected && got) || complain(result, "prefix: out of memory");
  int64_t row = 0, checked = 0;
  for (int64_t n = 0; n < fkda_case_sequences(c) && good; n++) {
    const int64_t mine = per_sequence ? per_sequence : (f->lengths[n] + c->every - 1) / c->every;
    for (int64_t j = 0; j < mine && good; j++, row++) {
      int64_t p = c->marks == FKDA_MARKS_EVERY ? (j + 1) * c->every : j * c->every;
      if (c->marks == FKDA_MARKS_EVERY && p > f->lengths[n]) p = f->lengths[n];
      if (!f->written[FKDA_FIELD_checkpoint_state][row] || p % result->chunk) continue;
      fkda_call call = f->device;
      call.prefill.final_state = middle;
      take_sequence(f, &call, n, p);
      call.prefill.final_state = fkda_slice(middle, 0, 0, 1);
      call.prefill.checkpoint_state = call.prefill.checkpoint_offsets = (fkda_tensor){0};
      call.prefill.checkpoint_every = call.prefill.checkpoint_before = 0;
      good = reset(f) && invoke(f, &call, FKDA_OK, result) &&
             f->memory->download(f->memory, got, middle.data, bytes);
      if (!good) break;
      state_bytes(stored, row, expected);
      checked++;
      if (memcmp(expected, got, bytes) != 0) {
        good = complain(result,
                        "prefix: checkpoint of sequence %" PRId64 " at %" PRId64
                        " is not the final state of its prefix",
                        n, p);
      }
    }
  }
  if (good && !checked) good = complain(result, "prefix: no checkpoint at a multiple of the chunk");
  free(expected);
  free(got);
  if (middle.data) f->memory->free(f->memory, middle.data);
  return good;
}

/* ---- claims about decode -------------------------------------------------------------------------- */

/* Slot by the case's index tensors: that sequence n starts from (t < 0), or that its state after token t
 * goes to. -1: the sequence is skipped, or the state not stored. */
static int64_t slot_of(const fkda_fixture *f, int64_t n, int64_t t) {
  const fkda_decode_args *d = &f->host.decode;
  const fkda_tensor *first = t < 0 ? &d->initial_state_indices : &d->final_state_indices;
  const fkda_tensor *second = t < 0 ? &d->final_state_indices : &d->initial_state_indices;
  const fkda_tensor *x = first->dtype ? first : second;
  if (f->skipped[n]) return -1;
  if (!x->dtype) return n;
  int64_t column = t;
  if (t < 0) {
    const fkda_tensor *count = &d->num_accepted_tokens;
    column = count->dtype ? (int64_t)fkda_load(count->data, count->dtype, n) - 1 : 0;
  }
  if (x->ndim == 1) column = 0;
  return (int64_t)fkda_load(x->data, x->dtype, n * x->stride[0] + column);
}

/* Slots [N] or [N,columns] on the device; its `data` is to be freed. */
static fkda_tensor place_slots(const fkda_fixture *f, int64_t columns, const int64_t *values) {
  const int64_t shape[2] = {f->c->B, columns};
  fkda_tensor tensor = fkda_tensor_contiguous(NULL, FKDA_I64, columns ? 2 : 1, shape);
  const size_t bytes = fkda_tensor_extent(&tensor);
  tensor.data = f->memory->alloc(f->memory, bytes);
  if (tensor.data && !f->memory->upload(f->memory, tensor.data, values, bytes)) {
    f->memory->free(f->memory, tensor.data);
    tensor.data = NULL;
  }
  return tensor;
}

/* A call of its own for every token, each starting from the slot to which the one before has stored. */
static bool steps(fkda_fixture *f, fkda_result *result) {
  const fkda_case *c = f->c;
  const char *backend = f->device.header.backend;
  /* The reference's running state is in double, what it stores between two calls is not. */
  if (backend && strcmp(backend, "reference") == 0) return true;
  int64_t *from = calloc((size_t)c->B + 1, sizeof *from),
          *to = calloc((size_t)c->B + 1, sizeof *to);
  bool good = (from && to) || complain(result, "steps: out of memory");
  good = good && (reset(f) || complain(result, "steps: upload failed"));
  for (int64_t n = 0; n < c->B && good; n++) to[n] = slot_of(f, n, -1);
  for (int64_t t = 0; t < c->T && good; t++) {
    for (int64_t n = 0; n < c->B; n++) {
      from[n] = to[n];
      to[n] = slot_of(f, n, t);
    }
    fkda_call call = f->device;
    take_tokens(&call, t, 1);
    const fkda_tensor start = place_slots(f, 0, from), end = place_slots(f, 0, to);
    call.decode.initial_state_indices = start;
    call.decode.final_state_indices = end;
    call.decode.num_accepted_tokens = (fkda_tensor){0};
    if (t) call.decode.has_initial_state = (fkda_tensor){0};
    good = (start.data && end.data) || complain(result, "steps: out of memory");
    good = good && invoke(f, &call, FKDA_OK, result);
    if (start.data) f->memory->free(f->memory, start.data);
    if (end.data) f->memory->free(f->memory, end.data);
  }
  free(from);
  free(to);
  return good && same_bits(f, "one token at a time", result);
}

/* What the buffers hold after a call is what they held after the judged one, but for the pool, which is as
 * before but for slots to[n], which hold what the judged call left in slots as[n]; to[n] < 0: none. */
static bool same_but_pool(fkda_fixture *f, const char *claim, const int64_t *to, const int64_t *as,
                          fkda_result *result) {
  fkda_buffer *pool = &f->buffers[f->buffer_of[FKDA_FIELD_state]];
  unsigned char *judged = pool->base;
  unsigned char *expected = malloc(pool->bytes);
  if (!expected) return complain(result, "%s: out of memory", claim);
  memcpy(expected, pool->before, pool->bytes);
  const fkda_tensor target = fkda_fixture_view(f, FKDA_FIELD_state, expected);
  const fkda_tensor source = fkda_fixture_view(f, FKDA_FIELD_state, judged);
  const size_t size = fkda_dtype_size(target.dtype);
  for (int64_t n = 0; n < f->c->B; n++) {
    if (to[n] < 0) continue;
    const fkda_tensor one = fkda_slice(target, 0, to[n], 1),
                      other = fkda_slice(source, 0, as[n], 1);
    fkda_walk walk = {0};
    for (int64_t e = fkda_tensor_elements(&one); e > 0; e--, fkda_walk_step(&walk, &one)) {
      const size_t at = (size_t)walk.offset * size;
      memcpy((unsigned char *)one.data + at, (unsigned char *)other.data + at, size);
    }
  }
  pool->base = expected;
  const bool good = same_bits(f, claim, result);
  pool->base = judged;
  free(expected);
  return good;
}

/* `in_place`: the accepted state goes to where the sequence started from, as with one slot a sequence. */
static bool commit(fkda_fixture *f, bool in_place, fkda_result *result) {
  const fkda_case *c = f->c;
  const char *claim = in_place ? "accepted tokens in place" : "accepted tokens to their slot";
  int64_t *start = malloc((size_t)(c->B * c->T + 1) * sizeof *start);
  int64_t *end = malloc((size_t)(c->B * c->T + 1) * sizeof *end);
  int64_t *to = malloc((size_t)(c->B + 1) * sizeof *to),
          *as = malloc((size_t)(c->B + 1) * sizeof *as);
  bool good = (start && end && to && as) || complain(result, "%s: out of memory", claim);
  int64_t stored = 0;
  for (int64_t n = 0; n < c->B && good; n++) {
    const int64_t accepted = 1 + (n + c->T / 2) % c->T;
    as[n] = slot_of(f, n, accepted - 1);
    to[n] = as[n] < 0 ? -1 : in_place ? slot_of(f, n, -1) : as[n];
    stored += to[n] >= 0;
    for (int64_t t = 0; t < c->T; t++) {
      start[n * c->T + t] = t ? -1 : slot_of(f, n, -1);
      end[n * c->T + t] = t == accepted - 1 ? to[n] : -1;
    }
  }
  if (good && !stored) good = complain(result, "%s: no state is stored", claim);
  if (good) {
    fkda_call call = f->device;
    call.decode.initial_state_indices = place_slots(f, c->T, start);
    call.decode.final_state_indices = place_slots(f, c->T, end);
    call.decode.num_accepted_tokens = (fkda_tensor){0};
    void *first = call.decode.initial_state_indices.data;
    void *second = call.decode.final_state_indices.data;
    good = (first && second) || complain(result, "%s: out of memory", claim);
    good = good && reset(f) && invoke(f, &call, FKDA_OK, result) &&
           same_but_pool(f, claim, to, as, result);
    if (first) f->memory->free(f->memory, first);
    if (second) f->memory->free(f->memory, second);
  }
  free(start);
  free(end);
  free(to);
  free(as);
  return good;
}

static bool output_only(fkda_fixture *f, fkda_result *result) {
  int64_t *none = malloc((size_t)(f->c->B + 1) * sizeof *none);
  if (!none) return complain(result, "output only: out of memory");
  for (int64_t n = 0; n < f->c->B; n++) none[n] = -1;
  fkda_call call = f->device;
  call.decode.write_state = 0;
  const bool good = reset(f) && invoke(f, &call, FKDA_OK, result) &&
                    same_but_pool(f, "output only", none, none, result);
  free(none);
  return good;
}

static bool verification(fkda_fixture *f, fkda_result *result) {
  return output_only(f, result) && commit(f, false, result) && commit(f, true, result);
}

/* ---- more claims ---------------------------------------------------------------------------------- */
#define MANY_THREADS_TOKENS 10000 /* (token, head) pairs up to which many runs are quick */

typedef struct thread_task {
  pthread_t thread;
  const fkda_fixture *leader;
  fkda_result result;
  bool good;
} thread_task;

static void *thread_main(void *argument) {
  thread_task *task = argument;
  const fkda_fixture *leader = task->leader;
  task->result = (fkda_result){.chunk = leader->c->op == FKDA_OP_DECODE ? 1 : 16};
  fkda_fixture *f = fkda_fixture_new(leader->c, leader->memory, task->result.message,
                                     sizeof task->result.message);
  if (!f) return NULL;
  f->device.header.backend = leader->device.header.backend;
  for (int i = 0; i < f->buffer_count; i++) {
    memcpy(f->buffers[i].base, leader->buffers[i].base, f->buffers[i].bytes);
  }
  task->good = true;
  for (int round = 0; round < 3 && task->good; round++) {
    task->good = reset(f) && invoke(f, &f->device, FKDA_OK, &task->result) &&
                 same_bits(f, "several host threads at once", &task->result);
  }
  fkda_fixture_free(f);
  return NULL;
}

static bool threads(fkda_fixture *f, fkda_result *result) {
  enum { THREADS = 4 };
  thread_task tasks[THREADS];
  bool good = true;
  int started = 0;
  for (; started < THREADS; started++) {
    tasks[started] = (thread_task){.leader = f};
    if (pthread_create(&tasks[started].thread, NULL, thread_main, &tasks[started])) {
      good = complain(result, "threads: cannot start one");
      break;
    }
  }
  for (int i = 0; i < started; i++) {
    pthread_join(tasks[i].thread, NULL);
    if (good && !tasks[i].good) good = complain(result, "%s", tasks[i].result.message);
  }
  return good;
}

/* A caller's parallel-for that runs one task after another, the last first. */
static void one_by_one(void *context, int32_t count, fkda_task_fn task, void *task_arg) {
  (void)context;
  for (int32_t i = count; i-- > 0;) task(task_arg, i);
}

/* On the CPU the bits depend neither on the number of threads, nor on who runs the tasks. */
static bool any_threads(fkda_fixture *f, fkda_result *result) {
  static const int32_t sizes[] = {1, 3, 8}; /* and 8 one by one */
  enum { SIZES = sizeof sizes / sizeof sizes[0] };
  const int32_t before = fkda_num_threads();
  const double seconds = result->seconds;
  bool good = true;
  for (int i = 0; i <= SIZES && good; i++) {
    char claim[64];
    const int32_t size = i < SIZES ? sizes[i] : sizes[SIZES - 1];
    snprintf(claim, sizeof claim, "%" PRId32 " threads%s", size, i < SIZES ? "" : ", one by one");
    const fkda_status status =
        i < SIZES ? fkda_set_num_threads(size) : fkda_set_parallel_for(one_by_one, NULL, size);
    good = status == FKDA_OK || complain(result, "%s: %s", claim, fkda_last_error());
    good =
        good && reset(f) && invoke(f, &f->device, FKDA_OK, result) && same_bits(f, claim, result);
  }
  if ((fkda_set_parallel_for(NULL, NULL, 0) || fkda_set_num_threads(before)) && good)
    good = complain(result, "threads: cannot restore the pool");
  result->seconds = seconds;
  return good;
}

/* In the child: the pool's threads do not exist there, and a CUDA driver that was started before does not
 * work; the call must notice. */
static bool after_fork(fkda_fixture *f, fkda_result *result) {
  if (f->memory->device_type == FKDA_DEVICE_CUDA) {
    const fkda_status status = fkda_call_run(&f->device);
    return status == FKDA_ERROR_NO_DEVICE && strstr(fkda_last_error(), "fork");
  }
  return reset(f) && invoke(f, &f->device, FKDA_OK, result) && same_bits(f, "fork", result);
}

static bool forked(fkda_fixture *f, fkda_result *result) {
  int status = 0;
  fflush(NULL);
  const pid_t child = fork();
  if (child < 0) return complain(result, "fork failed");
  if (child == 0) {
    alarm(60); /* a child that waits for threads that are not there */
    _exit(after_fork(f, result) ? 0 : 1);
  }
  if (waitpid(child, &status, 0) != child) return complain(result, "fork: waitpid failed");
  if (WIFSIGNALED(status)) {
    return complain(result, "fork: the child died of signal %d%s", WTERMSIG(status),
                    WTERMSIG(status) == SIGALRM ? " (hangs)" : "");
  }
  if (WEXITSTATUS(status))
    return complain(result, "fork: other bits, or an unexpected status, in the child");
  return twice(f, result); /* and the parent still works */
}

/* Summary: S_in M + b against the final state of a prefill in double. */
static bool affine(fkda_fixture *f, fkda_result *result) {
  const fkda_case *c = f->c;
  const int64_t N = fkda_case_sequences(c), K = c->K, V = c->V;
  const int64_t shape[4] = {N, c->HV, V, K};
  const int64_t count = N * c->HV * V * K;
  double *start = malloc((size_t)(count + 1) * sizeof *start);
  double *end = malloc((size_t)(count + 1) * sizeof *end);
  const fkda_summary_args *s = &f->host.summary;
  fkda_prefill_args p = FKDA_PREFILL_ARGS_INIT;
  bool good = (start && end) || complain(result, "affine: out of memory");
  double *out = malloc((size_t)(fkda_tensor_elements(&s->v) + 1) * sizeof *out);
  good = good && (out || complain(result, "affine: out of memory"));
  if (good) {
    fkda_random random;
    fkda_random_seed(&random, c->seed + 12345);
    for (int64_t i = 0; i < count; i++) start[i] = fkda_random_normal(&random);
    p.backend = "reference";
    p.q = p.k = s->k;
    p.v = s->v;
    p.g = s->g;
    p.beta = s->beta;
    p.out = fkda_tensor_contiguous(out, FKDA_F64, 4, s->v.shape);
    p.gate = s->gate;
    p.l2norm = s->l2norm;
    p.beta_is_logit = s->beta_is_logit;
    p.allow_neg_eigval = s->allow_neg_eigval;
    p.lower_bound = s->lower_bound;
    p.A_log = s->A_log;
    p.dt_bias = s->dt_bias;
    p.cu_seqlens = s->cu_seqlens;
    p.initial_state = fkda_tensor_contiguous(start, FKDA_F64, 4, shape);
    p.final_state = fkda_tensor_contiguous(end, FKDA_F64, 4, shape);
    const fkda_status status = fkda_prefill(&p);
    if (status != FKDA_OK) good = complain(result, "affine: gold: %s", fkda_last_error());
  }
  if (good) {
    const fkda_tensor M =
        fkda_fixture_view(f, FKDA_FIELD_M, f->buffers[f->buffer_of[FKDA_FIELD_M]].base);
    const fkda_tensor b =
        fkda_fixture_view(f, FKDA_FIELD_b, f->buffers[f->buffer_of[FKDA_FIELD_b]].base);
    const bool vk = c->layout == FKDA_STATE_VK;
    double difference = 0, power = 0;
    for (int64_t nh = 0; nh < N * c->HV; nh++) {
      const int64_t n = nh / c->HV, h = nh % c->HV;
      const int64_t at_m = n * M.stride[0] + h * M.stride[1],
                    at_b = n * b.stride[0] + h * b.stride[1];
      for (int64_t v = 0; v < V; v++) {
        for (int64_t k = 0; k < K; k++) {
          double sum = fkda_load(
              b.data, b.dtype,
              at_b + (vk ? v * b.stride[2] + k * b.stride[3] : k * b.stride[2] + v * b.stride[3]));
          for (int64_t i = 0; i < K; i++) {
            sum += start[(nh * V + v) * K + i] *
                   fkda_load(M.data, M.dtype, at_m + i * M.stride[2] + k * M.stride[3]);
          }
          const double gold = end[(nh * V + v) * K + k];
          difference += (sum - gold) * (sum - gold);
          power += gold * gold;
        }
      }
    }
    const double error = power > 0 ? sqrt(difference / power) : sqrt(difference);
    good = within("S_in M + b", error, fkda_tolerance(c->io, FKDA_F32), result);
  }
  free(start);
  free(end);
  free(out);
  return good;
}

static bool claims_hold(fkda_fixture *f, fkda_result *result) {
  const int claims = f->c->claims;
  return (!(claims & FKDA_CLAIM_TWICE) || twice(f, result)) &&
         (!(claims & FKDA_CLAIM_SPLIT) || split(f, result)) &&
         (!(claims & FKDA_CLAIM_ALONE) || alone(f, result)) &&
         (!(claims & FKDA_CLAIM_FUTURE) || future(f, result)) &&
         (!(claims & FKDA_CLAIM_PREFIX) || prefix(f, result)) &&
         (!(claims & FKDA_CLAIM_THREADS) || threads(f, result)) &&
         (!(claims & FKDA_CLAIM_FORK) || forked(f, result)) &&
         (!(claims & FKDA_CLAIM_AFFINE) || affine(f, result)) &&
         (!(claims & FKDA_CLAIM_STEPS) || steps(f, result)) &&
         (!(claims & FKDA_CLAIM_VERIFY) || verification(f, result));
}

/* ---- a case ------------------------------------------------------------------------------------- */

/* Prefill, decode and backward are what a backend is for; an experimental operation it may lack. The contract
 * lets the CUDA backends refuse sizes and dtypes. */
static bool may_refuse(const fkda_fixture *f) {
  const fkda_case *c = f->c;
  if (c->op == FKDA_OP_SUMMARY) return true;
  if (f->memory->device_type == FKDA_DEVICE_CPU) return false;
  return c->io != FKDA_BF16 || (c->K != 64 && c->K != 128) || (c->V != 64 && c->V != 128) ||
         (c->marks != FKDA_MARKS_NONE && c->checkpoint_dtype == FKDA_F16);
}

static int index_of(const char *backend) {
  const char *name;
  int i = 0;
  while ((name = fkda_backend_name(i)) != NULL && strcmp(name, backend) != 0) i++;
  return i;
}

/* The CUDA rows keep the contract together: one may leave to a later one what it is not made for. */
static bool left_to_another(const fkda_fixture *f, const char *backend) {
  if (f->memory->device_type == FKDA_DEVICE_CPU || !backend) return false;
  fkda_call call = f->device;
  call.header.backend = NULL;
  fkda_plan_info plan = {.struct_size = sizeof plan};
  return fkda_plan(&call, &plan) == FKDA_OK && index_of(plan.backend) > index_of(backend);
}

static bool must_refuse(const fkda_fixture *f) {
  return fkda_slots_bad(f->c->slots) && f->memory->device_type == FKDA_DEVICE_CPU;
}

bool fkda_fixture_run(fkda_fixture *f, const char *backend, fkda_result *result) {
  *result = (fkda_result){.error_out = -1, .error_state = -1, .error_checkpoint = -1};
  f->device.header.backend = backend;
  const fkda_status status = fkda_query(&f->device);
  if (status != FKDA_OK) {
    char reason[sizeof result->message];
    snprintf(reason, sizeof reason, "%s", fkda_last_error());
    if (status != FKDA_ERROR_UNSUPPORTED || !(may_refuse(f) || left_to_another(f, backend)))
      return complain(result, "fkda_query: %s: %s", fkda_status_string(status), reason);
    snprintf(result->message, sizeof result->message, "%s", reason);
    result->verdict = FKDA_SKIP;
    return false;
  }
  fkda_plan_info plan = {.struct_size = sizeof plan};
  if (fkda_plan(&f->device, &plan) != FKDA_OK)
    return complain(result, "fkda_plan: %s", fkda_last_error());
  if (backend && strcmp(plan.backend, backend) != 0 && strcmp(backend, "cpu") != 0) {
    return complain(result, "planned for \"%s\"", plan.backend);
  }
  result->chunk = plan.chunk;
  const bool refuse = must_refuse(f);
  if (!refuse && !make_gold(f, result->message, sizeof result->message)) {
    result->verdict = FKDA_FAIL;
    return false;
  }
  if (!reset(f)) return complain(result, "upload failed");
  if (!invoke(f, &f->device, refuse ? FKDA_ERROR_INVALID_ARGUMENT : FKDA_OK, result)) return false;
  if (!fetch(f)) return complain(result, "download failed");
  if (!untouched(f, refuse, result)) return false;
  if (refuse) return true;
  if (!accurate(f, result)) return false;
  const double seconds = result->seconds;
  bool good = claims_hold(f, result); /* `untouched` has left the outputs in `base` */
  result->seconds = seconds;
  const fkda_case *c = f->c;
  if (good && f->memory->device_type == FKDA_DEVICE_CPU && strcmp(plan.backend, "reference") != 0 &&
      c->B * c->T * c->HV <= MANY_THREADS_TOKENS)
    good = any_threads(f, result);
  return good;
}

bool fkda_case_run(const fkda_case *c, const char *backend, fkda_result *result) {
  *result = (fkda_result){
      .verdict = FKDA_FAIL, .error_out = -1, .error_state = -1, .error_checkpoint = -1};
  fkda_fixture *f =
      fkda_fixture_new(c, fkda_memory_host(), result->message, sizeof result->message);
  if (!f) return false;
  const bool good = fkda_fixture_run(f, backend, result);
  fkda_fixture_free(f);
  return good;
}
