/* From a case to its data: tensors with their strides, index tensors, what a correct call writes.
 *
 * SPDX-License-Identifier: MIT
 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fixture.h"

/* ---- random numbers (splitmix64) ------------------------------------------------------------------ */

uint64_t fkda_random_bits(fkda_random *random) {
  uint64_t z = random->state += UINT64_C(0x9e3779b97f4a7c15);
  z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
  return z ^ z >> 31;
}

void fkda_random_seed(fkda_random *random, uint64_t seed) {
  *random = (fkda_random){.state = seed};
  random->state = fkda_random_bits(random); /* neighbouring seeds: unrelated streams */
}

double fkda_random_uniform(fkda_random *random) {
  return (double)(fkda_random_bits(random) >> 11) * 0x1p-53;
}

double fkda_random_normal(fkda_random *random) {
  if (random->has_spare) {
    random->has_spare = false;
    return random->spare;
  }
  const double radius = sqrt(-2 * log(1 - fkda_random_uniform(random)));
  const double angle = 6.283185307179586 * fkda_random_uniform(random);
  random->spare = radius * sin(angle);
  random->has_spare = true;
  return radius * cos(angle);
}

static int64_t random_below(fkda_random *random, int64_t bound) {
  return (int64_t)(fkda_random_bits(random) >> 1) % bound;
}

/* One element; `repeated`, the table of the kinds that repeat a vector, or NULL. */
static double draw(fkda_random *random, fkda_dist dist, int64_t token, int64_t inner, int64_t size,
                   const double *repeated) {
  switch (dist.kind) {
    case FKDA_DIST_UNIFORM: return dist.a + (dist.b - dist.a) * fkda_random_uniform(random);
    case FKDA_DIST_CONSTANT: return dist.a;
    case FKDA_DIST_EITHER: return fkda_random_bits(random) >> 63 ? dist.a : dist.b;
    case FKDA_DIST_REPEAT:
    case FKDA_DIST_REPEAT_EVEN:
    case FKDA_DIST_TILE16: return repeated ? *repeated : dist.b * fkda_random_normal(random);
    case FKDA_DIST_RAMP:
      return dist.b * fkda_random_normal(random) * (0.1 + 2 * (double)inner / (double)size);
    case FKDA_DIST_SPARSE: {
      const double x = dist.b * fkda_random_normal(random);
      return token % 3 == 2 ? 0 : x;
    }
    case FKDA_DIST_SWITCH: return token / 5 % 2 ? dist.b : dist.a;
    default: return dist.a + dist.b * fkda_random_normal(random);
  }
}

static void fill_unit(fkda_random *random, const fkda_tensor *tensor, double length) {
  const int32_t last = tensor->ndim - 1;
  const int64_t size = tensor->shape[last];
  const int64_t rows = size ? fkda_tensor_elements(tensor) / size : 0;
  fkda_tensor outer = *tensor;
  double vector[1024];
  fkda_walk walk = {0};
  outer.shape[last] = 1;
  for (int64_t r = 0; r < rows; r++) {
    double sum = 0;
    for (int64_t i = 0; i < size; i++) {
      vector[i] = fkda_random_normal(random);
      sum += vector[i] * vector[i];
    }
    for (int64_t i = 0; i < size; i++) {
      fkda_store(tensor->data, tensor->dtype, walk.offset + i * tensor->stride[last],
                 vector[i] * length / sqrt(sum));
    }
    fkda_walk_step(&walk, &outer);
  }
}

void fkda_random_fill(fkda_random *random, const fkda_tensor *tensor, fkda_dist dist, int32_t token,
                      int32_t head) {
  const int64_t count = fkda_tensor_elements(tensor);
  const int32_t last = tensor->ndim - 1;
  const int64_t size = tensor->shape[last];
  double *table = NULL;
  if (count == 0) return;
  if (dist.kind == FKDA_DIST_UNIT && size <= 1024) {
    fill_unit(random, tensor, dist.a);
    return;
  }
  const int64_t period = dist.kind == FKDA_DIST_TILE16 ? 16 : 1;
  const bool even = dist.kind == FKDA_DIST_REPEAT_EVEN;
  if ((dist.kind == FKDA_DIST_TILE16 || dist.kind == FKDA_DIST_REPEAT || even) && token >= 0 &&
      head >= 0) {
    const int64_t entries = period * tensor->shape[head] * size;
    table = malloc((size_t)entries * sizeof *table);
    for (int64_t i = 0; table && i < entries; i++) table[i] = dist.b * fkda_random_normal(random);
  }
  fkda_walk walk = {0};
  for (int64_t i = 0; i < count; i++) {
    const int64_t t = token >= 0 ? walk.index[token] : 0, inner = walk.index[last];
    const double *repeated =
        table && !(even && walk.index[head] % 2)
            ? &table[(t % period * tensor->shape[head] + walk.index[head]) * size + inner]
            : NULL;
    fkda_store(tensor->data, tensor->dtype, walk.offset,
               draw(random, dist, t, inner, size, repeated));
    fkda_walk_step(&walk, tensor);
  }
  free(table);
}

/* ---- buffers ---------------------------------------------------------------------------------- */

fkda_tensor fkda_fixture_view(const fkda_fixture *f, fkda_field field, unsigned char *image) {
  fkda_tensor tensor = *fkda_call_tensor_const(&f->host, field);
  const fkda_buffer *buffer = &f->buffers[f->buffer_of[field]];
  tensor.data = image + ((unsigned char *)tensor.data - buffer->before);
  return tensor;
}

/* A new buffer of `extent` bytes, `shift` bytes off its alignment; -1 on failure. */
static int new_buffer(fkda_fixture *f, size_t extent, size_t shift) {
  fkda_buffer *buffer = &f->buffers[f->buffer_count];
  const size_t guard = f->memory->guard;
  buffer->offset = guard + shift;
  buffer->extent = extent;
  const size_t rounded = (buffer->offset + extent + guard + 63) / 64 * 64;
  buffer->bytes = guard ? rounded : buffer->offset + extent;
  buffer->before = aligned_alloc(64, rounded + 64); /* never 0 bytes */
  buffer->after = aligned_alloc(64, rounded + 64);
  buffer->base = aligned_alloc(64, rounded + 64);
  buffer->device = f->memory->alloc(f->memory, buffer->bytes);
  f->buffer_count++; /* counted even if incomplete: fkda_fixture_free releases what is there */
  if (!buffer->before || !buffer->after || !buffer->base || !buffer->device) return -1;
  memset(buffer->before, FKDA_POISON, buffer->bytes);
  return f->buffer_count - 1;
}

/* Row-major strides with `gap` elements after every entry of every dimension but the last. */
static fkda_tensor padded(int32_t dtype, int32_t ndim, const int64_t *shape, int64_t gap) {
  fkda_tensor tensor = fkda_tensor_contiguous(NULL, dtype, ndim, shape);
  int64_t stride = 1;
  for (int32_t d = ndim - 1; d >= 0; d--) {
    tensor.stride[d] = stride;
    stride = stride * (shape[d] > 0 ? shape[d] : 1) + gap;
  }
  return tensor;
}

/* Puts the field's tensor at `bytes` into a buffer. */
static void place_in(fkda_fixture *f, fkda_field field, fkda_tensor tensor, int buffer,
                     size_t bytes) {
  fkda_buffer *x = &f->buffers[buffer];
  f->buffer_of[field] = buffer;
  tensor.data = x->before + x->offset + bytes;
  *fkda_call_tensor(&f->host, field) = tensor;
  tensor.data = x->device + x->offset + bytes;
  *fkda_call_tensor(&f->device, field) = tensor;
}

static bool place(fkda_fixture *f, fkda_field field, fkda_tensor tensor) {
  const size_t shift = f->c->strides == FKDA_STRIDES_MISALIGNED ? fkda_dtype_size(tensor.dtype) : 0;
  const int buffer = new_buffer(f, fkda_tensor_extent(&tensor), shift);
  if (buffer < 0) return false;
  place_in(f, field, tensor, buffer, 0);
  return true;
}

/* q, k, v, g, beta, out: strides by the case. */
static fkda_tensor token_tensor(const fkda_case *c, fkda_field field, int32_t dtype, int64_t T,
                                int64_t heads, int64_t dim) {
  const int64_t shape[4] = {c->B, T, heads, dim};
  const int32_t ndim = dim ? 4 : 3; /* beta has no dim */
  fkda_tensor tensor = padded(dtype, ndim, shape, c->strides == FKDA_STRIDES_PADDED ? 5 : 0);
  if (c->strides == FKDA_STRIDES_HEAD_MAJOR && dim) {
    tensor.stride[0] = heads * T * dim;
    tensor.stride[1] = dim;
    tensor.stride[2] = T * dim;
  }
  if (c->strides == FKDA_STRIDES_BROADCAST) {
    if (field == FKDA_FIELD_q || field == FKDA_FIELD_k) tensor.stride[0] = 0;
    if (field == FKDA_FIELD_beta) tensor.stride[1] = 0;
  }
  if (c->strides == FKDA_STRIDES_FUSED && field == FKDA_FIELD_beta) {
    tensor.stride[1] = 6288;
    tensor.stride[0] = 6288 * T;
  }
  return tensor;
}

/* Of the gradients, those that the case asks for. */
static bool wanted_output(const fkda_case *c, fkda_field field) {
  return field < FKDA_FIELD_d_q || c->only == FKDA_FIELDS || c->only == field;
}

static bool place_tokens(fkda_fixture *f, int64_t T) {
  const fkda_case *c = f->c;
  struct {
    fkda_field field;
    int32_t dtype;
    int64_t heads, dim;
  } const rows[] = {
      {FKDA_FIELD_q, c->io, c->H, c->K},          {FKDA_FIELD_k, c->io, c->H, c->K},
      {FKDA_FIELD_v, c->io, c->HV, c->V},         {FKDA_FIELD_g, c->g_dtype, c->HV, c->K},
      {FKDA_FIELD_beta, c->beta_dtype, c->HV, 0}, {FKDA_FIELD_out, c->io, c->HV, c->V},
      {FKDA_FIELD_d_out, c->io, c->HV, c->V},     {FKDA_FIELD_d_q, c->io, c->H, c->K},
      {FKDA_FIELD_d_k, c->io, c->H, c->K},        {FKDA_FIELD_d_v, c->io, c->HV, c->V},
      {FKDA_FIELD_d_g, c->g_dtype, c->HV, c->K},  {FKDA_FIELD_d_beta, c->beta_dtype, c->HV, 0},
  };
  int64_t row = 0, column = 0;
  int fused = -1;
  for (int i = 0; i < 4; i++) {
    if (rows[i].dtype == c->io) row += rows[i].heads * rows[i].dim;
  }
  row += 24; /* what else such a projection holds */
  if (c->strides == FKDA_STRIDES_FUSED) {
    fused = new_buffer(f, (size_t)(c->B * T * row) * fkda_dtype_size(c->io), 0);
    if (fused < 0) return false;
  }
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
    if (!fkda_call_tensor(&f->host, rows[i].field)) continue; /* summary has no q and no out */
    if (!wanted_output(c, rows[i].field)) continue;
    const bool gradient = rows[i].field >= FKDA_FIELD_d_q && c->gradient_dtype;
    fkda_tensor tensor =
        token_tensor(c, rows[i].field, gradient ? c->gradient_dtype : rows[i].dtype, T,
                     rows[i].heads, rows[i].dim);
    if (fused >= 0 && i < 4 && rows[i].dtype == c->io) {
      tensor.stride[1] = row;
      tensor.stride[0] = row * T;
      place_in(f, rows[i].field, tensor, fused, (size_t)column * fkda_dtype_size(c->io));
      column += rows[i].heads * rows[i].dim;
    } else if (!place(f, rows[i].field, tensor)) {
      return false;
    }
  }
  return true;
}

static fkda_tensor state_tensor(const fkda_case *c, int32_t dtype, int64_t slots) {
  const bool vk = c->layout == FKDA_STATE_VK;
  const int64_t shape[4] = {slots, c->HV, vk ? c->V : c->K, vk ? c->K : c->V};
  return padded(dtype, 4, shape, c->strides == FKDA_STRIDES_PADDED ? 8 : 0);
}

static bool place_integers(fkda_fixture *f, fkda_field field, int32_t dtype, int32_t ndim,
                           int64_t rows, int64_t columns, const int64_t *values) {
  const int64_t shape[2] = {rows, columns};
  if (!place(f, field, fkda_tensor_contiguous(NULL, dtype, ndim, shape))) return false;
  const fkda_tensor *tensor = fkda_call_tensor(&f->host, field);
  const int64_t count = ndim == 1 ? rows : rows * columns;
  for (int64_t i = 0; i < count; i++) fkda_store(tensor->data, dtype, i, (double)values[i]);
  return true;
}

/* ---- sequences and slots -------------------------------------------------------------------------- */

static void find_sequences(fkda_fixture *f, int64_t T) {
  const fkda_case *c = f->c;
  const int64_t N = fkda_case_sequences(c);
  int64_t at = 0;
  for (int64_t n = 0; n < N; n++) {
    f->lengths[n] = c->lens ? c->lens[n] : T;
    f->begins[n] = at;
    at += f->lengths[n];
  }
}

static void shuffle(fkda_random *random, int64_t *values, int64_t count) {
  for (int64_t i = 0; i < count; i++) values[i] = i;
  for (int64_t i = count - 1; i > 0; i--) {
    const int64_t j = random_below(random, i + 1), x = values[i];
    values[i] = values[j];
    values[j] = x;
  }
}

/* Slots of both roles: starts[n], and ends[n*columns + t]; -1 = skipped or not stored. Which pool sizes. */
typedef struct slot_plan {
  int64_t columns; /* 0: one-dimensional */
  int64_t *starts, *ends, *order;
  int64_t *initial_index, *final_index; /* what the index tensors hold */
  int64_t initial_slots, final_slots;
  bool initial_tensor, final_tensor; /* are the index tensors given? */
  bool one_pool;
} slot_plan;

static void free_slots(slot_plan *s) {
  free(s->starts);
  free(s->ends);
  free(s->order);
  free(s->initial_index);
  free(s->final_index);
}

static void plan_pools(const fkda_case *c, int64_t N, int64_t M, slot_plan *s) {
  s->initial_slots = s->final_slots = N;
  s->initial_tensor = s->final_tensor = true;
  switch (c->slots) {
    case FKDA_SLOTS_NONE:
      s->initial_tensor = s->final_tensor = false;
      s->one_pool = c->in_place;
      return;
    case FKDA_SLOTS_INITIAL_ONLY:
      s->initial_slots = N + 3;
      s->final_tensor = false;
      return;
    case FKDA_SLOTS_FINAL_ONLY:
      s->final_slots = N + 3;
      s->initial_tensor = false;
      return;
    case FKDA_SLOTS_TWO_POOLS:
      s->initial_slots = N + 2;
      s->final_slots = N + 5;
      return;
    case FKDA_SLOTS_APART:
    case FKDA_SLOTS_2D_APART: s->initial_slots = 2 * N * M + 3; break;
    case FKDA_SLOTS_ONE_TENSOR:
    case FKDA_SLOTS_2D_ONE_TENSOR:
      s->initial_slots = N * M + 3;
      s->final_tensor = false;
      break;
    default: s->initial_slots = N * M + 3; break;
  }
  s->one_pool = true;
  s->final_slots = s->initial_slots;
}

static bool is_apart(fkda_slots slots) {
  return slots == FKDA_SLOTS_APART || slots == FKDA_SLOTS_2D_APART;
}

/* Fills the plan; `accepted` [N] is the column to start from plus one. */
static bool plan_slots(fkda_fixture *f, fkda_random *random, const int64_t *accepted,
                       slot_plan *s) {
  const fkda_case *c = f->c;
  const int64_t N = fkda_case_sequences(c), M = s->columns ? s->columns : 1;
  plan_pools(c, N, M, s);
  const int64_t larger = s->initial_slots > s->final_slots ? s->initial_slots : s->final_slots;
  s->starts = calloc((size_t)N + 1, sizeof(int64_t));
  s->ends = calloc((size_t)(N * M) + 1, sizeof(int64_t));
  s->order = calloc((size_t)larger + 1, sizeof(int64_t));
  s->initial_index = calloc((size_t)(N * M) + 1, sizeof(int64_t));
  s->final_index = calloc((size_t)(N * M) + 1, sizeof(int64_t));
  if (!s->starts || !s->ends || !s->order || !s->initial_index || !s->final_index) return false;
  shuffle(random, s->order, s->initial_slots);
  for (int64_t i = 0; i < N * M; i++) {
    s->initial_index[i] = s->initial_tensor ? s->order[i] : i;
    if (s->one_pool && c->slots != FKDA_SLOTS_NONE) {
      s->final_index[i] = is_apart(c->slots) ? s->order[N * M + i] : s->order[i];
    }
  }
  if (!s->one_pool) {
    shuffle(random, s->order, s->final_slots);
    for (int64_t i = 0; i < N * M; i++) s->final_index[i] = s->final_tensor ? s->order[i] : i;
  } else if (c->slots == FKDA_SLOTS_NONE) {
    for (int64_t i = 0; i < N * M; i++) s->final_index[i] = i;
  }
  for (int64_t n = 0; n < N; n++) {
    if (accepted[n] < 1 || accepted[n] > M) continue; /* skipped below */
    const int64_t start = n * M + accepted[n] - 1;
    if (c->skip_every < 0 ? n % c->skip_every
                          : c->skip_every && n % c->skip_every == c->skip_every - 1) {
      /* -1 on either side skips; one-dimensional ones take turns */
      const bool by_start =
          s->columns || !s->final_tensor || (s->initial_tensor && n / c->skip_every % 2 == 0);
      (by_start ? s->initial_index : s->final_index)[start] = -1;
    }
    if (c->slots == FKDA_SLOTS_2D_APART) {
      for (int64_t t = 0; t < M; t++) {
        if ((n + t) % 3 == 1) s->final_index[n * M + t] = -1;
      }
    }
  }
  if (c->slots == FKDA_SLOTS_OUT_OF_RANGE) s->initial_index[N / 2] = s->initial_slots;
  if (c->slots == FKDA_SLOTS_NEGATIVE) s->final_index[N / 2] = -2;
  if (c->slots == FKDA_SLOTS_2D_OUT_OF_RANGE) {
    s->initial_index[accepted[0] - 1] = s->initial_slots;
    s->initial_index[M + accepted[1] - 1] = -2;
    s->final_index[2 * M] = s->final_slots;
    s->final_index[3 * M + c->T - 1] = -2;
  }
  for (int64_t n = 0; n < N; n++) {
    const bool counted = accepted[n] >= 1 && accepted[n] <= M;
    const int64_t start = counted ? s->initial_index[n * M + accepted[n] - 1] : -1;
    const int64_t *ends = s->final_tensor || !s->initial_tensor || c->op != FKDA_OP_DECODE
                              ? s->final_index
                              : s->initial_index; /* one tensor serves both */
    /* Where slots out of range are no error, they skip the sequence like -1. */
    f->skipped[n] = start < 0 || start >= s->initial_slots ||
                    (!s->columns && (ends[n] < 0 || ends[n] >= s->final_slots));
    s->starts[n] = f->skipped[n] ? -1 : start;
    for (int64_t t = 0; t < M; t++) s->ends[n * M + t] = f->skipped[n] ? -1 : ends[n * M + t];
  }
  return true;
}

static bool new_written(fkda_fixture *f, fkda_field field, int64_t units) {
  f->units[field] = units;
  f->written[field] = calloc((size_t)units + 1, 1);
  return f->written[field] != NULL;
}

static void mark(fkda_fixture *f, fkda_field field, int64_t unit) {
  if (unit >= 0 && unit < f->units[field]) f->written[field][unit] = 1;
}

/* Initial values where a sequence starts from; NaN in every other slot and where has_initial_state is
 * false. */
static void fill_initial(fkda_fixture *f, fkda_field field, fkda_random *random,
                         const slot_plan *s) {
  const fkda_case *c = f->c;
  const fkda_tensor *pool = fkda_call_tensor(&f->host, field);
  for (int64_t n = 0; n < fkda_case_sequences(c); n++) {
    fkda_tensor slot;
    if (s->starts[n] < 0 || s->starts[n] >= pool->shape[0]) continue;
    if (c->has_initial && n % 2) continue;
    slot = fkda_slice(*pool, 0, s->starts[n], 1);
    fkda_random_fill(random, &slot, c->initial, -1, -1);
  }
}

static bool place_index(fkda_fixture *f, fkda_field field, const slot_plan *s,
                        const int64_t *values) {
  return place_integers(f, field, f->c->index_dtype, s->columns ? 2 : 1, fkda_case_sequences(f->c),
                        s->columns, values);
}

static bool place_has_initial(fkda_fixture *f) {
  const int64_t N = fkda_case_sequences(f->c);
  if (!f->c->has_initial) return true;
  if (!place(f, FKDA_FIELD_has_initial_state, fkda_tensor_contiguous(NULL, FKDA_BOOL, 1, &N)))
    return false;
  uint8_t *flags = fkda_call_tensor(&f->host, FKDA_FIELD_has_initial_state)->data;
  for (int64_t n = 0; n < N; n++) flags[n] = n % 2 == 0;
  return true;
}

static bool place_prefill_states(fkda_fixture *f, fkda_random *random) {
  const fkda_case *c = f->c;
  const int64_t N = fkda_case_sequences(c);
  slot_plan s = {0};
  bool good = false;
  int64_t *accepted = calloc((size_t)(N + 1), sizeof *accepted);
  for (int64_t n = 0; accepted && n < N; n++) accepted[n] = 1;
  if (!accepted || !plan_slots(f, random, accepted, &s)) goto done;
  if (c->initial_dtype) {
    if (!place(f, FKDA_FIELD_initial_state, state_tensor(c, c->initial_dtype, s.initial_slots)))
      goto done;
    fill_initial(f, FKDA_FIELD_initial_state, random, &s);
    if (s.initial_tensor && !place_index(f, FKDA_FIELD_initial_state_indices, &s, s.initial_index))
      goto done;
    if (!place_has_initial(f)) goto done;
  }
  if (c->final_dtype) {
    const fkda_tensor tensor = state_tensor(c, c->final_dtype, s.final_slots);
    if (s.one_pool && c->initial_dtype) {
      place_in(f, FKDA_FIELD_final_state, tensor, f->buffer_of[FKDA_FIELD_initial_state], 0);
    } else if (!place(f, FKDA_FIELD_final_state, tensor)) {
      goto done;
    }
    if (s.final_tensor && !place_index(f, FKDA_FIELD_final_state_indices, &s, s.final_index))
      goto done;
    if (!new_written(f, FKDA_FIELD_final_state, s.final_slots)) goto done;
    for (int64_t n = 0; n < N; n++) mark(f, FKDA_FIELD_final_state, s.ends[n]);
  }
  good = true;
done:
  free(accepted);
  free_slots(&s);
  return good;
}

static bool place_decode_states(fkda_fixture *f, fkda_random *random) {
  const fkda_case *c = f->c;
  const int64_t N = c->B;
  const bool two = fkda_slots_2d(c->slots);
  slot_plan s = {.columns = two ? c->M : 0};
  bool good = false;
  int64_t *accepted = calloc((size_t)(N + 1), sizeof *accepted);
  if (!accepted) return false;
  for (int64_t n = 0; n < N; n++) {
    accepted[n] = two && c->slots != FKDA_SLOTS_2D_ONE_TENSOR ? 1 + random_below(random, c->M) : 1;
  }
  if (c->slots == FKDA_SLOTS_2D_ACCEPTED) {
    accepted[1] = 0;
    accepted[2] = c->M + 1;
  }
  if (!plan_slots(f, random, accepted, &s)) goto done;
  const fkda_field read = c->final_dtype ? FKDA_FIELD_initial_state : FKDA_FIELD_state;
  if (!place(f, read, state_tensor(c, c->initial_dtype, s.initial_slots))) goto done;
  fill_initial(f, read, random, &s);
  if (c->final_dtype && c->write_state &&
      !place(f, FKDA_FIELD_state, state_tensor(c, c->final_dtype, s.final_slots)))
    goto done;
  if (s.initial_tensor && !place_index(f, FKDA_FIELD_initial_state_indices, &s, s.initial_index))
    goto done;
  if (s.final_tensor && !place_index(f, FKDA_FIELD_final_state_indices, &s, s.final_index))
    goto done;
  if (!place_has_initial(f)) goto done;
  if (two && c->slots != FKDA_SLOTS_2D_ONE_TENSOR &&
      !place_integers(f, FKDA_FIELD_num_accepted_tokens, c->index_dtype, 1, N, 0, accepted)) {
    goto done;
  }
  if (!new_written(f, FKDA_FIELD_state, c->final_dtype ? s.final_slots : s.initial_slots))
    goto done;
  for (int64_t n = 0; n < N && c->write_state; n++) {
    for (int64_t t = 0; t < (two ? c->T : 1); t++)
      mark(f, FKDA_FIELD_state, s.ends[n * (two ? c->M : 1) + t]);
  }
  good = true;
done:
  free(accepted);
  free_slots(&s);
  return good;
}

/* Initial state, the gradient by the final one, and the gradients that have no rows. */
static bool place_backward_states(fkda_fixture *f, fkda_random *random) {
  const fkda_case *c = f->c;
  const int64_t N = fkda_case_sequences(c), shape[2] = {c->HV, c->K};
  const int32_t d_initial = c->initial_dtype ? c->initial_dtype : FKDA_F32;
  if (c->initial_dtype) {
    if (!place(f, FKDA_FIELD_initial_state, state_tensor(c, c->initial_dtype, N))) return false;
    fkda_random_fill(random, fkda_call_tensor(&f->host, FKDA_FIELD_initial_state), c->initial, -1,
                     -1);
  }
  if (c->final_dtype) {
    const fkda_dist plain = {FKDA_DIST_NORMAL, 0, 1};
    if (!place(f, FKDA_FIELD_d_final_state, state_tensor(c, c->final_dtype, N))) return false;
    fkda_random_fill(random, fkda_call_tensor(&f->host, FKDA_FIELD_d_final_state), plain, -1, -1);
  }
  const bool parameters = c->gate != FKDA_GATE_DIRECT;
  if (parameters && wanted_output(c, FKDA_FIELD_d_A_log) &&
      !place(f, FKDA_FIELD_d_A_log, fkda_tensor_contiguous(NULL, FKDA_F32, 1, shape)))
    return false;
  if (parameters && wanted_output(c, FKDA_FIELD_d_dt_bias) &&
      !place(f, FKDA_FIELD_d_dt_bias, fkda_tensor_contiguous(NULL, FKDA_F32, 2, shape)))
    return false;
  if (wanted_output(c, FKDA_FIELD_d_initial_state) &&
      !place(f, FKDA_FIELD_d_initial_state, state_tensor(c, d_initial, N)))
    return false;
  for (int field = FKDA_FIELD_d_A_log; field <= FKDA_FIELD_d_initial_state; field++) {
    const int64_t units = field == FKDA_FIELD_d_initial_state ? N : 1;
    if (!new_written(f, (fkda_field)field, units)) return false;
    memset(f->written[field], 1, (size_t)units);
  }
  return true;
}

/* ---- checkpoints ---------------------------------------------------------------------------------- */

static bool place_checkpoints(fkda_fixture *f, fkda_random *random) {
  const fkda_case *c = f->c;
  const int64_t N = fkda_case_sequences(c);
  const bool interval = c->marks == FKDA_MARKS_EVERY || c->marks == FKDA_MARKS_BEFORE;
  const bool one = c->marks == FKDA_MARKS_ONE;
  int64_t C = 0, rows = 0;
  if (c->marks == FKDA_MARKS_NONE) return true;
  for (int64_t n = 0; n < N; n++) {
    const int64_t mine = f->lengths[n] / c->every + 1;
    C = mine > C ? mine : C;
    rows += interval ? (f->lengths[n] + c->every - 1) / c->every : one ? 1 : mine;
  }
  if (c->marks == FKDA_MARKS_OFFSETS) rows = N * C;
  const int64_t slots = c->checkpoint_slots ? rows + 2 : rows;
  int64_t *owner = malloc((size_t)(rows + 1) * sizeof *owner);
  int64_t *offsets = malloc((size_t)(rows + 1) * sizeof *offsets);
  int64_t *indptr = malloc((size_t)(N + 2) * sizeof *indptr);
  int64_t *places = malloc((size_t)(slots + 1) * sizeof *places);
  bool good = false;
  if (!owner || !offsets || !indptr || !places) goto done;
  int64_t r = 0;
  for (int64_t n = 0; n < N; n++) {
    const int64_t valid = f->lengths[n] / c->every + 1; /* 0, every, 2 every, ... <= length */
    const int64_t mine = c->marks == FKDA_MARKS_OFFSETS ? C
                         : interval                     ? (f->lengths[n] + c->every - 1) / c->every
                         : one                          ? 1
                                                        : valid;
    indptr[n] = r;
    for (int64_t i = 0; i < mine; i++, r++) {
      /* packed rows of odd sequences come in descending order */
      const int64_t j = c->marks == FKDA_MARKS_PACKED && n % 2 ? mine - 1 - i : i;
      owner[r] = n;
      offsets[r] =
          j < valid && !(c->marks == FKDA_MARKS_OFFSETS && (n + j) % 4 == 3) ? j * c->every : -1;
      if (interval) offsets[r] = 0; /* the offset follows from the row */
      if (one) offsets[r] = n % 4 == 3 ? -1 : (n % 2 ? valid / 2 : valid - 1) * c->every;
    }
  }
  indptr[N] = r;
  if (c->marks == FKDA_MARKS_OFFSETS &&
      !place_integers(f, FKDA_FIELD_checkpoint_offsets, c->index_dtype, 2, N, C, offsets)) {
    goto done;
  }
  if (one && !place_integers(f, FKDA_FIELD_checkpoint_offsets, c->index_dtype, 1, N, 0, offsets)) {
    goto done;
  }
  if (c->marks == FKDA_MARKS_PACKED &&
      (!place_integers(f, FKDA_FIELD_checkpoint_offsets, c->index_dtype, 1, rows, 0, offsets) ||
       !place_integers(f, FKDA_FIELD_checkpoint_indptr, c->index_dtype, 1, N + 1, 0, indptr))) {
    goto done;
  }
  shuffle(random, places, slots);
  for (int64_t i = 0; i < rows; i++) {
    if (!c->checkpoint_slots) places[i] = i;
    if (c->checkpoint_slots && i % 5 == 4) places[i] = -1;
  }
  if (c->checkpoint_slots &&
      !place_integers(f, FKDA_FIELD_checkpoint_state_indices, c->index_dtype,
                      c->marks == FKDA_MARKS_OFFSETS ? 2 : 1,
                      c->marks == FKDA_MARKS_OFFSETS ? N : rows, C, places)) {
    goto done;
  }
  fkda_tensor tensor = state_tensor(c, c->checkpoint_dtype, slots);
  if (c->marks == FKDA_MARKS_OFFSETS && !c->checkpoint_slots) { /* [N,C,HV,rows,cols] */
    const int64_t shape[5] = {N, C, tensor.shape[1], tensor.shape[2], tensor.shape[3]};
    tensor = padded(c->checkpoint_dtype, 5, shape, c->strides == FKDA_STRIDES_PADDED ? 8 : 0);
  }
  if (!place(f, FKDA_FIELD_checkpoint_state, tensor)) goto done;
  if (!new_written(f, FKDA_FIELD_checkpoint_state, slots)) goto done;
  for (int64_t i = 0; i < rows; i++) {
    if (offsets[i] >= 0 && !f->skipped[owner[i]]) mark(f, FKDA_FIELD_checkpoint_state, places[i]);
  }
  good = true;
done:
  free(owner);
  free(offsets);
  free(indptr);
  free(places);
  return good;
}

/* ---- the whole fixture ------------------------------------------------------------------------------ */

static void set_options(fkda_fixture *f) {
  const fkda_case *c = f->c;
  fkda_call *calls[] = {&f->host, &f->device};
  for (int i = 0; i < 2; i++) {
    fkda_call *call = calls[i];
    fkda_call_init(call, c->op);
#define SET(args)                                                                                  \
  (args).gate = c->gate;                                                                           \
  (args).l2norm = c->l2norm;                                                                       \
  (args).beta_is_logit = c->beta_is_logit;                                                         \
  (args).allow_neg_eigval = c->allow_neg_eigval;                                                   \
  (args).lower_bound = c->lower_bound;                                                             \
  (args).state_layout = c->layout
    if (c->op == FKDA_OP_PREFILL) {
      SET(call->prefill);
      call->prefill.scale = c->scale;
      call->prefill.batch_invariant = c->batch_invariant;
      if (c->marks == FKDA_MARKS_EVERY || c->marks == FKDA_MARKS_BEFORE) {
        call->prefill.checkpoint_every = c->every;
        call->prefill.checkpoint_before = c->marks == FKDA_MARKS_BEFORE;
      }
    } else if (c->op == FKDA_OP_DECODE) {
      SET(call->decode);
      call->decode.scale = c->scale;
      call->decode.batch_invariant = c->batch_invariant;
      call->decode.write_state = c->write_state;
    } else if (c->op == FKDA_OP_SUMMARY) {
      SET(call->summary);
    } else {
      SET(call->backward);
      call->backward.scale = c->scale;
    }
#undef SET
  }
  f->device.header.device_type = f->memory->device_type;
  f->device.header.device_id = f->memory->device_id;
  if (f->memory->stream) f->device.header.stream = f->memory->stream(f->memory, c->seed);
}

static bool place_parameters(fkda_fixture *f) {
  const fkda_case *c = f->c;
  const int64_t shape[2] = {c->HV, c->K};
  if (c->A_log_dtype &&
      !place(f, FKDA_FIELD_A_log, fkda_tensor_contiguous(NULL, c->A_log_dtype, 1, shape))) {
    return false;
  }
  return !c->dt_bias_dtype ||
         place(f, FKDA_FIELD_dt_bias, fkda_tensor_contiguous(NULL, c->dt_bias_dtype, 2, shape));
}

static void fill(fkda_fixture *f, fkda_field field, fkda_dist dist, int32_t token, int32_t head) {
  fkda_random random;
  if (!fkda_call_has(&f->host, field)) return;
  fkda_random_seed(&random, f->c->seed * 64 + (uint64_t)field);
  fkda_random_fill(&random, fkda_call_tensor(&f->host, field), dist, token, head);
}

static void fill_inputs(fkda_fixture *f) {
  const fkda_case *c = f->c;
  fill(f, FKDA_FIELD_q, c->q, 1, 2);
  fill(f, FKDA_FIELD_k, c->k, 1, 2);
  fill(f, FKDA_FIELD_v, c->v, 1, 2);
  fill(f, FKDA_FIELD_g, c->g, 1, 2);
  fill(f, FKDA_FIELD_beta, c->beta, 1, -1);
  fill(f, FKDA_FIELD_A_log, c->A_log, -1, -1);
  fill(f, FKDA_FIELD_dt_bias, c->dt_bias, -1, -1);
  fill(f, FKDA_FIELD_d_out, (fkda_dist){FKDA_DIST_NORMAL, 0, 1}, 1, 2);
  if (c->q_is_k) {
    const fkda_tensor *q = fkda_call_tensor(&f->host, FKDA_FIELD_q);
    const fkda_tensor *k = fkda_call_tensor(&f->host, FKDA_FIELD_k);
    fkda_walk from = {0}, to = {0};
    for (int64_t i = fkda_tensor_elements(q); i > 0; i--) {
      fkda_store(q->data, q->dtype, to.offset, fkda_load(k->data, k->dtype, from.offset));
      fkda_walk_step(&from, k);
      fkda_walk_step(&to, q);
    }
  }
  if (c->nan_field != FKDA_FIELDS) {
    const fkda_tensor *x = fkda_call_tensor(&f->host, c->nan_field);
    const int64_t b = c->lens ? 0 : c->nan_sequence;
    const int64_t t = (c->lens ? f->begins[c->nan_sequence] : 0) + c->nan_token;
    const int64_t inner = x->ndim == 4 ? x->shape[3] / 2 : 0;
    fkda_store(x->data, x->dtype,
               b * x->stride[0] + t * x->stride[1] + c->nan_head * x->stride[2] + inner,
               (double)NAN);
  }
}

static bool place_all(fkda_fixture *f, int64_t T) {
  const fkda_case *c = f->c;
  const int64_t N = fkda_case_sequences(c);
  fkda_random random;
  fkda_random_seed(&random, c->seed * 64 + 63);
  if (!place_tokens(f, T) || !place_parameters(f)) return false;
  if (c->lens) {
    f->begins[N] = N ? f->begins[N - 1] + f->lengths[N - 1] : 0;
    if (!place_integers(f, FKDA_FIELD_cu_seqlens, c->index_dtype, 1, N + 1, 0, f->begins))
      return false;
  }
  if (c->op == FKDA_OP_PREFILL && !place_prefill_states(f, &random)) return false;
  if (c->op == FKDA_OP_DECODE && !place_decode_states(f, &random)) return false;
  if (c->op == FKDA_OP_PREFILL && !place_checkpoints(f, &random)) return false;
  if (c->op == FKDA_OP_SUMMARY) {
    const int64_t shape[4] = {N, c->HV, c->K, c->K};
    if (!place(f, FKDA_FIELD_M, fkda_tensor_contiguous(NULL, FKDA_F32, 4, shape)) ||
        !place(f, FKDA_FIELD_b, state_tensor(c, FKDA_F32, N)) || !new_written(f, FKDA_FIELD_M, N) ||
        !new_written(f, FKDA_FIELD_b, N)) {
      return false;
    }
    memset(f->written[FKDA_FIELD_M], 1, (size_t)N);
    memset(f->written[FKDA_FIELD_b], 1, (size_t)N);
    return true;
  }
  const bool backward = c->op == FKDA_OP_BACKWARD;
  if (backward && !place_backward_states(f, &random)) return false;
  const int first = backward ? FKDA_FIELD_d_q : FKDA_FIELD_out;
  const int last = backward ? FKDA_FIELD_d_beta : FKDA_FIELD_out;
  for (int field = first; field <= last; field++) {
    if (!new_written(f, (fkda_field)field, c->B * T)) return false;
    for (int64_t n = 0; n < N; n++) {
      for (int64_t t = 0; t < f->lengths[n] && !f->skipped[n]; t++)
        mark(f, (fkda_field)field, f->begins[n] + t);
    }
  }
  return true;
}

fkda_fixture *fkda_fixture_new(const fkda_case *c, const fkda_memory *memory, char *error,
                               size_t capacity) {
  const int64_t N = fkda_case_sequences(c);
  int64_t T = c->T;
  if (c->lens) {
    T = c->tail;
    for (int64_t n = 0; n < N; n++) T += c->lens[n];
  }
  fkda_fixture *f = calloc(1, sizeof *f);
  if (f) {
    f->c = c;
    f->memory = memory;
    f->begins = calloc((size_t)N + 2, sizeof *f->begins);
    f->lengths = calloc((size_t)N + 1, sizeof *f->lengths);
    f->skipped = calloc((size_t)N + 1, sizeof *f->skipped);
  }
  if (!f || !f->begins || !f->lengths || !f->skipped) {
    snprintf(error, capacity, "out of memory");
    fkda_fixture_free(f);
    return NULL;
  }
  set_options(f);
  find_sequences(f, T);
  if (!place_all(f, T)) {
    snprintf(error, capacity, "out of memory");
    fkda_fixture_free(f);
    return NULL;
  }
  fill_inputs(f);
  return f;
}

void fkda_fixture_free(fkda_fixture *f) {
  if (!f) return;
  for (int i = 0; i < f->buffer_count; i++) {
    free(f->buffers[i].before);
    free(f->buffers[i].after);
    free(f->buffers[i].base);
    if (f->buffers[i].device) f->memory->free(f->memory, f->buffers[i].device);
  }
  for (int i = 0; i < FKDA_FIELDS; i++) {
    free(f->written[i]);
    free(f->gold[i]);
  }
  free(f->begins);
  free(f->lengths);
  free(f->skipped);
  free(f);
}

const fkda_call *fkda_fixture_call(const fkda_fixture *fixture) { return &fixture->host; }
