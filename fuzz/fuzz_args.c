/* Fuzzes the public entry points: calls of every operation built from bytes, valid ones in many forms and
 * nearly valid ones. Whatever the call, it must not crash, what fails must write nothing and say why,
 * and what succeeds must write nothing but its outputs' elements.
 *
 * Every tensor has heap memory of exactly its extent, so that a sanitizer sees each byte beyond; bytes in
 * the gaps of strided tensors are compared here. Bytes of the input below ODD keep the call valid.
 *
 * SPDX-License-Identifier: MIT
 */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "flashkda/flashkda.h"

#define REQUIRE(condition)                                                                         \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      (void)fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #condition,         \
                    fkda_last_error());                                                            \
      abort();                                                                                     \
    }                                                                                              \
  } while (0)

/* ---- the input ---- */

enum { ODD = 244 }; /* bytes from here on break something */

static const uint8_t *input;
static size_t input_left;

static uint8_t byte(void) {
  if (input_left == 0) return 0;
  --input_left;
  return *input++;
}
static int below(int n) { return byte() % n; }
static bool odd(void) { return byte() >= ODD; }

static int64_t odd_size(void) {
  static const int64_t sizes[] = {
      0,         1,         2,         3,         15,        16,        17,
      255,       256,       257,       -1,        -16,       1LL << 20, 1LL << 31,
      1LL << 38, 1LL << 40, 1LL << 61, 1LL << 62, INT64_MAX, INT64_MIN, INT64_MAX / 16 * 16};
  return sizes[below((int)(sizeof sizes / sizeof sizes[0]))];
}

static uint32_t random_state;
static uint32_t random_bits(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state;
}

/* ---- memory ---- */

typedef struct block {
  unsigned char *start, *before, *writable;
  size_t bytes;
} block;

enum { MAX_BLOCKS = 32, MAX_BYTES = 1 << 20 };
static block blocks[MAX_BLOCKS];
static int block_count;

static unsigned char *new_block(size_t bytes) {
  REQUIRE(block_count < MAX_BLOCKS);
  block *b = &blocks[block_count++];
  b->bytes = bytes;
  b->start = malloc(bytes ? bytes : 1);
  b->before = malloc(bytes ? bytes : 1);
  b->writable = calloc(bytes ? bytes : 1, 1);
  REQUIRE(b->start && b->before && b->writable);
  memset(b->start, 0xff, bytes ? bytes : 1); /* NaN in every floating-point type */
  return b->start;
}

static void free_blocks(void) {
  for (int i = 0; i < block_count; ++i) {
    free(blocks[i].start);
    free(blocks[i].before);
    free(blocks[i].writable);
  }
  block_count = 0;
}

static void remember_blocks(void) {
  for (int i = 0; i < block_count; ++i) memcpy(blocks[i].before, blocks[i].start, blocks[i].bytes);
}

static void allow_bytes(const unsigned char *at, size_t bytes) {
  for (int i = 0; i < block_count; ++i)
    if (at >= blocks[i].start && at < blocks[i].start + blocks[i].bytes)
      memset(blocks[i].writable + (at - blocks[i].start), 1, bytes);
}

/* The elements of an output. */
static void allow_tensor(const fkda_tensor *t) {
  const int64_t size = (int64_t)fkda_dtype_size(t->dtype);
  int64_t index[FKDA_MAX_DIMS] = {0}, count = 1;
  if (t->dtype == FKDA_NONE) return;
  for (int i = 0; i < t->ndim; ++i) count *= t->shape[i];
  for (int64_t n = 0; n < count; ++n) {
    int64_t at = 0;
    for (int i = 0; i < t->ndim; ++i)
      if (t->shape[i] > 1) at += index[i] * t->stride[i];
    allow_bytes((unsigned char *)t->data + at * size, (size_t)size);
    for (int i = t->ndim - 1; i >= 0 && ++index[i] == t->shape[i]; --i) index[i] = 0;
  }
}

static void require_untouched(bool all) {
  for (int i = 0; i < block_count; ++i)
    for (size_t j = 0; j < blocks[i].bytes; ++j)
      REQUIRE(blocks[i].start[j] == blocks[i].before[j] || (!all && blocks[i].writable[j]));
}

/* ---- tensors ---- */

/* Bytes that a tensor spans, or -1 if that is too much for us or makes no sense. */
static int64_t extent_of(const fkda_tensor *t) {
  const int64_t size = (int64_t)fkda_dtype_size(t->dtype);
  if (size == 0 || t->ndim < 1 || t->ndim > FKDA_MAX_DIMS) return -1;
  __int128 last = 0;
  for (int i = 0; i < t->ndim; ++i) {
    if (t->shape[i] < 0) return -1;
    if (t->shape[i] == 0) return 0;
  }
  for (int i = 0; i < t->ndim; ++i) {
    if (t->shape[i] == 1) continue;
    if (t->stride[i] < 0) return -1;
    last += (__int128)(t->shape[i] - 1) * t->stride[i];
    if (last > MAX_BYTES) return -1;
  }
  return (int64_t)(last + 1) * size > MAX_BYTES ? -1 : (int64_t)(last + 1) * size;
}

static void fill(void *data, int32_t dtype, int64_t bytes, bool wild) {
  const size_t size = fkda_dtype_size(dtype);
  for (size_t i = 0; size && i + size <= (size_t)bytes; i += size) {
    unsigned char *at = (unsigned char *)data + i;
    const uint32_t bits = random_bits();
    const float value = (float)(int32_t)bits * 1e-9f; /* -2.1 .. 2.1 */
    const double wide = value;
    uint32_t word;
    memcpy(&word, wild ? (const void *)&bits : (const void *)&value, sizeof word);
    const uint16_t bf16 = (uint16_t)(word >> 16), f16 = (uint16_t)(0x3800 | (bits & 0x83ff));
    switch (dtype) {
      case FKDA_F32: memcpy(at, &word, size); break;
      case FKDA_BF16: memcpy(at, &bf16, size); break;
      case FKDA_F16: memcpy(at, &f16, size); break;
      case FKDA_F64: memcpy(at, &wide, size); break;
      case FKDA_BOOL: *at = bits & 1; break;
      default: memset(at, 0, size); break;
    }
  }
}

typedef enum use { READ, WRITTEN, INDEX } use;

/* Outputs of the call, for allow_tensor(). */
static fkda_tensor *outputs[16];
static int output_count;

/* A tensor of the given shape in one of many layouts, with memory of its own. */
static void make(fkda_tensor *t, use how, int32_t dtype, int ndim, const int64_t *shape) {
  *t = fkda_tensor_contiguous(NULL, dtype, ndim, shape);
  int64_t packed = ndim ? shape[ndim - 1] : 1;
  switch (below(8)) {
    case 5: /* padded */
      for (int i = ndim - 2; i >= 0; --i) {
        packed += below(4);
        t->stride[i] = packed;
        packed *= shape[i];
      }
      break;
    case 6: /* the first two dimensions the other way round */
      if (ndim >= 3) {
        t->stride[0] = t->stride[1];
        t->stride[1] = t->stride[0] * shape[0];
      }
      break;
    case 7: /* broadcast */
      if (how != WRITTEN && ndim > 1) t->stride[below(ndim - 1)] = 0;
      break;
    default: break;
  }
  for (int i = 0; i < ndim; ++i)
    if (t->shape[i] <= 1 && byte() & 1) t->stride[i] = odd_size();
  if (odd()) t->dtype = below(10) - 1;
  if (odd()) t->ndim = below(8) - 1;
  if (odd()) t->shape[below(FKDA_MAX_DIMS)] = odd_size();
  if (odd()) t->stride[below(FKDA_MAX_DIMS)] = odd_size();
  const int64_t bytes = extent_of(t);
  const bool shifted = odd(), missing = odd();
  if (bytes >= 0 && !missing) {
    unsigned char *data = new_block((size_t)bytes + shifted) + shifted;
    if (how == READ) fill(data, t->dtype, bytes, odd());
    if (how == INDEX) memset(data, 0, (size_t)bytes);
    t->data = data;
  }
  if (how == WRITTEN) outputs[output_count++] = t;
}

#define MAKE(tensor, how, dtype, ...)                                                              \
  make(tensor, how, dtype, (int)(sizeof(int64_t[]){__VA_ARGS__} / sizeof(int64_t)),                \
       (const int64_t[]){__VA_ARGS__})

/* Entry i of an index tensor made by make(), if it lies in our memory. */
static void set_entry(fkda_tensor *t, int64_t row, int64_t column, int64_t value) {
  const int64_t size = (int64_t)fkda_dtype_size(t->dtype), bytes = extent_of(t);
  if (!t->data || bytes <= 0 || t->ndim < 1) return;
  int64_t at = t->shape[0] > 1 ? row * t->stride[0] : 0;
  if (t->ndim > 1 && t->shape[1] > 1) at += column * t->stride[1];
  if (at < 0 || at * size + size > bytes) return;
  if (odd()) value = byte() & 1 ? odd_size() : value + below(3) - 1;
  const int32_t narrow = (int32_t)value;
  memcpy((unsigned char *)t->data + at * size, size == 8 ? (const void *)&value : &narrow,
         size >= 4 ? (size_t)size : 1);
}

static int32_t index_dtype(void) { return byte() & 1 ? FKDA_I64 : FKDA_I32; }

/* Slots 0 .. n-1 (or their columns) in some order, a few of them -1. */
static void fill_slots(fkda_tensor *t, int64_t rows, int64_t columns, int64_t slots) {
  const int64_t first = slots > 0 ? below((int)slots) : 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t slot = (first + i * columns + j) % (slots > 0 ? slots : 1);
      set_entry(t, i, j, slots == 0 || below(16) == 15 ? -1 : slot);
    }
}

/* ---- calls ---- */

typedef union any_args {
  fkda_prefill_args prefill;
  fkda_decode_args decode;
  fkda_summary_args summary;
  fkda_backward_args backward;
} any_args;

typedef struct sizes {
  int64_t B, T, H, HV, K, V, N;
  int32_t io, side; /* dtypes of q and of g and beta */
  bool kv, reference;
} sizes;

static int32_t state_dtype(const sizes *z) {
  static const int32_t dtypes[] = {FKDA_F32, FKDA_BF16, FKDA_F64};
  return dtypes[below(z->reference ? 3 : 2)];
}

static void make_state(fkda_tensor *t, use how, const sizes *z, int32_t dtype, int64_t slots) {
  MAKE(t, how, dtype, slots, z->HV, z->kv ? z->K : z->V, z->kv ? z->V : z->K);
}

/* Fields that all four structs have under the same names. */
#define COMMON(a)                                                                                  \
  do {                                                                                             \
    (a)->gate = below(3);                                                                          \
    (a)->l2norm = byte() & 1;                                                                      \
    (a)->beta_is_logit = byte() & 1;                                                               \
    (a)->allow_neg_eigval = byte() & 1;                                                            \
    (a)->lower_bound = -(below(5) + 1);                                                            \
    (a)->state_layout = z.kv;                                                                      \
    if (odd()) (a)->gate = below(7) - 2;                                                           \
    if (odd()) (a)->l2norm = below(5) - 1;                                                         \
    if (odd()) (a)->lower_bound = below(3) - 7;                                                    \
    if (odd()) (a)->lower_bound = (double)NAN;                                                     \
    if (odd()) (a)->reserved0 = byte();                                                            \
    if (odd()) (a)->state_layout = below(5) - 1;                                                   \
    MAKE(&(a)->k, READ, z.io, z.B, z.T, z.H, z.K);                                                 \
    MAKE(&(a)->v, READ, z.io, z.B, z.T, z.HV, z.V);                                                \
    MAKE(&(a)->g, READ, z.side, z.B, z.T, z.HV, z.K);                                              \
    MAKE(&(a)->beta, READ, z.side, z.B, z.T, z.HV);                                                \
    if ((a)->gate != FKDA_GATE_DIRECT && byte() & 1) MAKE(&(a)->A_log, READ, FKDA_F32, z.HV);      \
    if ((a)->gate != FKDA_GATE_DIRECT && byte() & 1)                                               \
      MAKE(&(a)->dt_bias, READ, FKDA_BF16, z.HV, z.K);                                             \
  } while (0)

/* A partition of T into N sequences, empty ones among them. */
static void make_cu_seqlens(fkda_tensor *t, const sizes *z) {
  MAKE(t, INDEX, index_dtype(), z->N + 1);
  int64_t at = 0;
  for (int64_t n = 0; n < z->N; ++n) {
    set_entry(t, n, 0, at);
    const int64_t length = n + 1 == z->N ? z->T - at : below((int)z->T + 1);
    if (at + length <= z->T && byte() & 3) at += length;
  }
  set_entry(t, z->N, 0, at);
}

/* Two tensors of a call in one buffer: interleaved rows, or plainly on top of each other. */
static void entangle(fkda_tensor *written, fkda_tensor *read) {
  const int how = below(16);
  if (how < 12 || !written->data || !read->data || written->ndim < 3 || read->ndim != written->ndim)
    return;
  if (how >= 14) {
    const int64_t first = extent_of(read), second = extent_of(written);
    if (first < 0 || second < 0) return;
    read->data = new_block((size_t)(first + second) + 128);
    fill(read->data, read->dtype, first, false);
    written->data = (char *)read->data + (ptrdiff_t)2 * below(64);
    return;
  }
  int64_t row[2] = {1, 1};
  fkda_tensor *t[2] = {written, read};
  for (int i = 0; i < 2; ++i)
    for (int d = 2; d < t[i]->ndim && d < FKDA_MAX_DIMS; ++d) {
      if (t[i]->shape[d] < 1 || t[i]->shape[d] > 256) return;
      row[i] *= t[i]->shape[d];
    }
  const int64_t size = (int64_t)fkda_dtype_size(read->dtype);
  if (written->dtype != read->dtype || written->shape[0] != read->shape[0] ||
      written->shape[1] != read->shape[1] || row[0] + row[1] > 4096 || size == 0)
    return;
  for (int i = 0; i < 2; ++i) {
    int64_t packed = 1;
    for (int d = t[i]->ndim - 1; d >= 2; --d) {
      t[i]->stride[d] = packed;
      packed *= t[i]->shape[d];
    }
    t[i]->stride[1] = row[0] + row[1];
    t[i]->stride[0] = t[i]->stride[1] * t[i]->shape[1];
  }
  const int64_t rows = written->shape[0] * written->shape[1];
  if (rows < 1 || rows * (row[0] + row[1]) * size > MAX_BYTES) return;
  unsigned char *data = new_block((size_t)(rows * (row[0] + row[1]) * size));
  fill(data, read->dtype, rows * (row[0] + row[1]) * size, false);
  read->data = data;
  written->data = data + (row[1] - (how == 13)) * size; /* 13: one element too early */
}

static void build_checkpoints(fkda_prefill_args *a, const sizes *z) {
  static const int32_t dtypes[] = {FKDA_F32, FKDA_BF16, FKDA_F16};
  const int kind = below(8); /* 0 .. 4: none */
  const int32_t dtype = dtypes[below(3)];
  const bool indexed = byte() & 1;
  const int64_t C = below(3), slots = below(12);
  int64_t rows = z->N * C;
  if (kind < 5) return;
  if (kind == 5) { /* [N,C] */
    MAKE(&a->checkpoint_offsets, INDEX, index_dtype(), z->N, C);
    for (int64_t n = 0; n < z->N; ++n)
      for (int64_t i = 0; i < C; ++i)
        set_entry(&a->checkpoint_offsets, n, i, below(4) == 3 ? 16 * below(3) : below(2) - 1);
  } else if (kind == 6) { /* packed */
    MAKE(&a->checkpoint_offsets, INDEX, index_dtype(), rows);
    MAKE(&a->checkpoint_indptr, INDEX, index_dtype(), z->N + 1);
    for (int64_t r = 0; r < rows; ++r)
      set_entry(&a->checkpoint_offsets, r, 0, below(4) == 3 ? 16 * below(3) : below(2) - 1);
    for (int64_t n = 0; n <= z->N; ++n) set_entry(&a->checkpoint_indptr, n, 0, n * C);
  } else {
    a->checkpoint_every = (int64_t)16 * (below(3) + 1);
    a->checkpoint_before = byte() & 1;
    if (odd()) a->checkpoint_every = odd_size();
    rows = z->B * (z->T / 16 + 1) + z->N;
  }
  if (indexed) {
    if (kind == 5)
      MAKE(&a->checkpoint_state_indices, INDEX, index_dtype(), z->N, C);
    else
      MAKE(&a->checkpoint_state_indices, INDEX, index_dtype(), rows);
    fill_slots(&a->checkpoint_state_indices, kind == 5 ? z->N : rows, kind == 5 ? C : 1, slots);
    make_state(&a->checkpoint_state, WRITTEN, z, dtype, slots);
    if (below(4) == 3) a->checkpoint_state = a->final_state;
  } else if (kind == 5) {
    MAKE(&a->checkpoint_state, WRITTEN, dtype, z->N, C, z->HV, z->kv ? z->K : z->V,
         z->kv ? z->V : z->K);
  } else {
    make_state(&a->checkpoint_state, WRITTEN, z, dtype, rows);
  }
  if (odd()) memset(&a->checkpoint_state, 0, sizeof a->checkpoint_state);
  if (odd()) a->checkpoint_before = below(4) - 1;
}

static size_t build_prefill(fkda_prefill_args *a, sizes z) {
  *a = FKDA_PREFILL_ARGS_INIT;
  const bool ragged = byte() & 1;
  z.B = ragged ? 1 : below(3);
  z.T = below(41);
  z.N = ragged ? below(5) : z.B;
  COMMON(a);
  MAKE(&a->q, READ, z.io, z.B, z.T, z.H, z.K);
  MAKE(&a->out, WRITTEN, z.io, z.B, z.T, z.HV, z.V);
  if (ragged) make_cu_seqlens(&a->cu_seqlens, &z);
  a->scale = below(3) - 1;
  a->batch_invariant = byte() & 1;
  const int states = byte();
  const int64_t slots = below(7);
  if (states & 1) {
    make_state(&a->initial_state, READ, &z, state_dtype(&z), states & 2 ? slots : z.N);
    if (states & 2) {
      MAKE(&a->initial_state_indices, INDEX, index_dtype(), z.N);
      fill_slots(&a->initial_state_indices, z.N, 1, slots);
    }
    if (states & 4) MAKE(&a->has_initial_state, READ, FKDA_BOOL, z.N);
  }
  if (states & 8) {
    make_state(&a->final_state, WRITTEN, &z, state_dtype(&z), states & 16 ? slots : z.N);
    if (states & 16) {
      MAKE(&a->final_state_indices, INDEX, index_dtype(), z.N);
      fill_slots(&a->final_state_indices, z.N, 1, slots);
    }
    if ((states & 33) == 33) a->final_state = a->initial_state; /* in place */
  }
  build_checkpoints(a, &z);
  entangle(&a->out, byte() & 1 ? &a->v : &a->k);
  return sizeof *a;
}

static size_t build_decode(fkda_decode_args *a, sizes z) {
  *a = FKDA_DECODE_ARGS_INIT;
  z.B = z.N = below(4);
  z.T = below(4) + 1;
  if (odd()) z.T = below(12);
  COMMON(a);
  MAKE(&a->q, READ, z.io, z.B, z.T, z.H, z.K);
  MAKE(&a->out, WRITTEN, z.io, z.B, z.T, z.HV, z.V);
  const int states = byte();
  const int64_t slots = 1 + below(16), columns = z.T + below(3);
  const bool two = states & 4;
  a->write_state = !(states & 8);
  make_state(&a->state, a->write_state ? WRITTEN : READ, &z, state_dtype(&z),
             states & 3 ? slots : z.N);
  if (states & 64)
    make_state(&a->initial_state, READ, &z, state_dtype(&z), states & 3 ? slots + below(2) : z.N);
  fkda_tensor *indices[] = {&a->initial_state_indices, &a->final_state_indices};
  for (int i = 0; i < 2; ++i) {
    if (!(states >> i & 1)) continue;
    if (two)
      MAKE(indices[i], INDEX, index_dtype(), z.N, columns);
    else
      MAKE(indices[i], INDEX, index_dtype(), z.N);
    fill_slots(indices[i], z.N, two ? columns : 1, slots);
  }
  if (two && states & 3 && states & 16) {
    MAKE(&a->num_accepted_tokens, INDEX, index_dtype(), z.N);
    for (int64_t n = 0; n < z.N; ++n)
      set_entry(&a->num_accepted_tokens, n, 0, 1 + (columns ? below((int)columns) : 0));
  }
  if (states & 32) MAKE(&a->has_initial_state, READ, FKDA_BOOL, z.N);
  if (odd()) a->write_state = below(4) == 3 ? -1 : 0;
  entangle(&a->out, byte() & 1 ? &a->v : &a->k);
  return sizeof *a;
}

static size_t build_summary(fkda_summary_args *a, sizes z) {
  *a = FKDA_SUMMARY_ARGS_INIT;
  const bool ragged = byte() & 1;
  z.B = ragged ? 1 : below(3);
  z.T = below(41);
  z.N = ragged ? below(5) : z.B;
  COMMON(a);
  if (ragged) make_cu_seqlens(&a->cu_seqlens, &z);
  MAKE(&a->M, WRITTEN, FKDA_F32, z.N, z.HV, z.K, z.K);
  make_state(&a->b, WRITTEN, &z, FKDA_F32, z.N);
  entangle(&a->M, &a->b);
  return sizeof *a;
}

static size_t build_backward(fkda_backward_args *a, sizes z) {
  *a = FKDA_BACKWARD_ARGS_INIT;
  const bool ragged = below(2);
  z.B = ragged ? 1 : below(3);
  z.T = below(40);
  z.N = ragged ? below(5) : z.B;
  COMMON(a);
  if (ragged) make_cu_seqlens(&a->cu_seqlens, &z);
  MAKE(&a->q, READ, z.io, z.B, z.T, z.H, z.K);
  if (below(2)) make_state(&a->initial_state, READ, &z, FKDA_F32, z.N);
  if (below(3) == 0) {
    a->checkpoint_every = 16;
    make_state(&a->checkpoint_state, READ, &z, FKDA_BF16, z.N + 2 + below(3));
  }
  MAKE(&a->d_out, READ, z.io, z.B, z.T, z.HV, z.V);
  MAKE(&a->d_q, WRITTEN, z.io, z.B, z.T, z.H, z.K);
  if (below(2)) MAKE(&a->d_k, WRITTEN, FKDA_F32, z.B, z.T, z.H, z.K);
  if (below(2)) MAKE(&a->d_v, WRITTEN, z.io, z.B, z.T, z.HV, z.V);
  MAKE(&a->d_g, WRITTEN, z.side, z.B, z.T, z.HV, z.K);
  MAKE(&a->d_beta, WRITTEN, z.side, z.B, z.T, z.HV);
  MAKE(&a->d_dt_bias, WRITTEN, FKDA_F32, z.HV, z.K);
  make_state(&a->d_initial_state, WRITTEN, &z, FKDA_F32, z.N);
  entangle(&a->d_q, &a->q);
  return sizeof *a;
}

/* Any parallel-for that keeps the contract: here last task first, on the calling thread. */
static void backwards(void *context, int32_t count, fkda_task_fn task, void *arg) {
  (void)context;
  while (count-- > 0) task(arg, count);
}

static fkda_status call(const void *args, int32_t op) {
  switch (op) {
    case FKDA_OP_PREFILL: return fkda_prefill(args);
    case FKDA_OP_DECODE: return fkda_decode(args);
    case FKDA_OP_SUMMARY: return fkda_summary(args);
    default: return fkda_backward(args);
  }
}

/* The detail starts with a name and a colon, or with that of an entry: "cu_seqlens[3]: ". */
static void require_detail(void) { REQUIRE(strstr(fkda_last_error(), ": ") != NULL); }

/* The four questions agree with each other; returns their status. */
static fkda_status ask(const void *args, size_t *bytes) {
  const fkda_status status = fkda_query(args);
  if (status) require_detail();
  fkda_plan_info info = {.struct_size = sizeof info};
  *bytes = 0;
  REQUIRE(fkda_workspace_size(args, bytes) == status);
  REQUIRE(fkda_plan(args, &info) == status);
  size_t length = 0;
  const size_t capacity = (size_t)below(256) * 8;
  char *text = malloc(capacity ? capacity : 1);
  REQUIRE(text);
  REQUIRE(fkda_plan_describe(args, text, capacity, &length) == status);
  if (status == FKDA_OK) {
    REQUIRE(info.workspace_size == *bytes && info.chunk >= 1 && info.threads >= 1 &&
            info.tasks >= 0);
    REQUIRE(length > 0);
    if (capacity) REQUIRE(strlen(text) == (length < capacity ? length : capacity - 1));
  }
  free(text);
  return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static bool started;
  if (!started) {
    started = true;
    REQUIRE(fkda_set_parallel_for(backwards, NULL, 3) == FKDA_OK);
  }
  input = data;
  input_left = size;
  output_count = 0;
  random_state = 2463534242u;
  for (size_t i = 0; i < size; ++i) random_state = random_state * 31 + data[i];
  random_state |= 1;

  /* sizes, dtypes, backend */
  static const int64_t dims[] = {16, 8, 1, 2, 7, 17, 32, 64};
  static const int32_t ios[] = {FKDA_BF16, FKDA_F32, FKDA_F16, FKDA_F64};
  static const char *const backends[] = {NULL,         "cpu",      "reference",
                                         "cpu-scalar", "cpu-avx2", "cpu-avx512"};
  const int32_t op = below(4) + 1;
  const int backend = below(6);
  sizes z = {.reference = backend == 2};
  z.io = ios[below(z.reference ? 4 : 3)];
  z.side = byte() & 1 ? FKDA_F32 : z.io;
  z.H = 1 + below(2);
  z.HV = z.H * (1 + (int64_t)below(3));
  z.K = dims[below(8)];
  z.V = dims[below(8)];
  z.kv = byte() & 1;
  if (odd()) z.HV = below(5);
  if (odd()) z.K = (int64_t)257 * below(2);

  any_args built;
  memset(&built, 0, sizeof built);
  size_t bytes = 0;
  switch (op) {
    case FKDA_OP_PREFILL: bytes = build_prefill(&built.prefill, z); break;
    case FKDA_OP_DECODE: bytes = build_decode(&built.decode, z); break;
    case FKDA_OP_SUMMARY: bytes = build_summary(&built.summary, z); break;
    default: bytes = build_backward(&built.backward, z); break;
  }
  /* the header lies alike in all four */
  fkda_prefill_args *header = &built.prefill;
  header->backend = backends[backend];
  if (odd()) header->backend = "";
  if (odd()) header->device_type = below(4);
  if (odd()) header->device_id = below(4) - 2;
  if (odd()) header->op = below(7) - 1;
  if (odd()) header->stream = header;
  size_t struct_size = bytes;
  if (odd()) struct_size = (size_t)below(256) * 8;
  if (odd()) struct_size = bytes + (size_t)byte();
  header->struct_size = (uint32_t)struct_size;
  /* memory of exactly the size that the struct claims */
  unsigned char *args = malloc(struct_size < 8 ? 8 : struct_size);
  REQUIRE(args);
  memset(args, odd(), struct_size < 8 ? 8 : struct_size);
  memcpy(args, &built, struct_size < 8 ? 8 : struct_size < bytes ? struct_size : bytes);

  size_t workspace = 0;
  fkda_status asked = ask(args, &workspace);
  const int place = below(4); /* 0, 1: heap memory of the call */
  bool short_of = false;
  if (asked == FKDA_OK && workspace && place >= 2 && struct_size >= bytes) {
    const size_t shift = odd() ? 8 : 0;
    unsigned char *memory = new_block(workspace + 128);
    memory += 64 - (uintptr_t)memory % 64 + shift;
    short_of = odd();
    header = (fkda_prefill_args *)(void *)args;
    header->workspace = memory;
    header->workspace_size = workspace - short_of;
    if (!short_of && !shift) allow_bytes(memory, workspace);
  }

  remember_blocks();
  const fkda_status status = call(args, op);
  if (status != FKDA_OK) {
    require_detail();
    require_untouched(true);
  } else {
    REQUIRE(asked == FKDA_OK && !short_of);
    for (int i = 0; i < output_count; ++i) allow_tensor(outputs[i]);
    require_untouched(false);
  }
  free(args);
  free_blocks();
  return 0;
}
