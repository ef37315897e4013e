/* Prefill on the CPU: the chunk form (8)-(12), written once over the vector shims.
 *
 * A job is one sequence and value head, or a part of its value columns. Its state stays in scratch in
 * f32 for the whole sequence, cut into panels of PANEL value columns, [panel][k][PANEL], so that a
 * panel (16 KB at K = 128) is read and written from the first-level cache while a chunk works on it.
 * What is left over and fits one vector is a panel of LANES columns.
 *
 *   per chunk of 16 tokens
 *     factors: all that does not depend on the state
 *       load      rows of q, k, g, beta as f32, tokens beyond the sequence zero
 *       gates     (2) and G, the running sum of log-decays, a channel a lane
 *       factors   (8) decayed q and k, (9) the two triangles A and P
 *     apply: one chunk after the other
 *       load      rows of v
 *       panels    X = [K~; Q~] S, (10) U by forward substitution, (11) O, (12) S
 *       store     rows of out
 *
 * Numerics. Differences of G are taken against an anchor m = G at the chunk's middle, so that
 * exp(G - m) and exp(m - G) stay within e^+-40 for any bounded gate. Where a chunk's gates leave
 * e^+-ANCHOR_RANGE (softplus and direct gates can) or are NaN, its triangles are summed pair by pair
 * from exp(G_i - G_j), i >= j, which cannot overflow, whatever the gates. The choice is made for each
 * chunk and head from its own gates alone, so an earlier chunk never depends on a later token.
 * The substitution is f32 and never forms a power series of A, which nearly collinear keys overflow.
 *
 * Every value column goes through the same operations in the same order wherever it lies, so that
 * neither the split of V nor the number of threads changes a bit.
 */
#include "cpu/kernels.h"
#include "cpu/vector_math.h"

#define CHUNK FKDA_CPU_CHUNK
#define PANEL (TILE_VECTORS * LANES)
#define ANCHOR_RANGE 44.0f

/* What the value columns need of a chunk. */
typedef struct chunk_factors {
  float *decayed;     /* [32][Kp] K~, Q~ (8); before that the chunk's g in the first half */
  float *k_bar;       /* [16][Kp] G, then K- (8) */
  float *total_decay; /* [Kp] exp(G_C) */
  float *triangles;   /* [32][16] A = strictlower(beta K~ K^^T), P = lower(Q~ K^^T) (9) */
  float *beta;        /* [16] */
} chunk_factors;

/* Rows of a later chunk that are to be in the second-level cache by then: CHUNK of each kind. */
typedef struct rows_ahead {
  int64_t kinds, asked, at_once; /* asked for: so far, and with each fetch_ahead() */
  struct {
    const char *at;
    int64_t step, bytes;
  } kind[5];
} rows_ahead;

/* A thread's own memory. */
typedef struct chunk_buffers {
  int64_t K, Kp;     /* channels, and rounded up to LANES: the rest is zero */
  int64_t V, Vp;     /* value columns of this job, and rounded up to panels */
  float *state;      /* [Vp/PANEL][Kp][PANEL] S, transposed: k rows, v columns; not in scratch */
  chunk_factors own; /* of jobs that nobody shares */
  float *anchored;   /* [32][Kp] k, q as loaded; then k e^{G-m}, scale q e^{G-m} */
  float *inverse_k;  /* [Kp][16] K^ = k e^{m-G}, transposed */
  float *values;     /* [16][Vp] v, then o */
  float *bias;       /* [Kp] dt_bias */
  float *X;          /* [32][PANEL] K~ S^T, Q~ S^T of one panel */
  float *U;          /* [16][PANEL] */
  float *block;      /* [LANES][max(Kp, Vp)] for transposing states */
  rows_ahead ahead;
  float norm_k[CHUNK], norm_q[CHUNK]; /* factors of the rows: 1/|k|, scale/|q|, or 1, scale */
  float exp_A;
} chunk_buffers;

INLINE int64_t padded_columns(int64_t V) {
  const int64_t left = V % PANEL;
  return V - left + (left > LANES ? PANEL : left > 0 ? LANES : 0);
}

/* Sizing and placing are one walk: base NULL gives the size. */
#define PLACE(field, count)                                                                        \
  do {                                                                                             \
    (field) = base ? (float *)(void *)(base + offset) : NULL;                                      \
    offset += (size_t)round_up((count) * (int64_t)sizeof(float), 64);                              \
  } while (0)

static size_t place_factors(chunk_factors *f, char *base, int64_t Kp) {
  size_t offset = 0;
  PLACE(f->decayed, 2 * CHUNK * Kp);
  PLACE(f->k_bar, CHUNK * Kp);
  PLACE(f->total_decay, Kp);
  PLACE(f->triangles, 2 * CHUNK * CHUNK);
  PLACE(f->beta, CHUNK);
  return offset;
}

static size_t place_buffers(chunk_buffers *b, char *base, int64_t K, int64_t V, int64_t Vp) {
  b->K = K;
  b->V = V;
  b->Kp = round_up(K, LANES);
  b->Vp = Vp;
  b->ahead.at_once = 0;
  const int64_t widest = b->Kp > b->Vp ? b->Kp : b->Vp;
  size_t offset = 0;
  PLACE(b->anchored, 2 * CHUNK * b->Kp);
  PLACE(b->inverse_k, CHUNK * b->Kp);
  PLACE(b->values, CHUNK * b->Vp);
  PLACE(b->bias, b->Kp);
  PLACE(b->X, 2 * CHUNK * PANEL);
  PLACE(b->U, CHUNK * PANEL);
  PLACE(b->block, LANES * widest);
  return offset + place_factors(&b->own, base ? base + offset : NULL, b->Kp);
}
#undef PLACE

static size_t factors_size(int64_t K) {
  chunk_factors f;
  return place_factors(&f, NULL, round_up(K, LANES));
}

static size_t state_size(int64_t K, int64_t V) {
  return (size_t)(round_up(K, LANES) * round_up(V, PANEL)) * sizeof(float);
}

static size_t scratch_size(int64_t K, int64_t V) {
  chunk_buffers b;
  return place_buffers(&b, NULL, K, V, round_up(V, PANEL));
}

/* ---- states: [V,K] or [K,V] in memory <-> panels --------------------------------------------- */

/* The vector of columns v .. v+LANES-1 of the state at k = 0, and how far it is to the next k. */
INLINE float *state_vector(const chunk_buffers *b, int64_t v, int64_t *step) {
  const int64_t panel = v - v % PANEL;
  *step = b->Vp - panel < PANEL ? LANES : PANEL;
  return b->state + panel * b->Kp + (v - panel);
}

static void clear_state(chunk_buffers *b) {
  for (int64_t i = 0; i < b->Vp * b->Kp; i += LANES) v_store(b->state + i, v_set(0));
}

/* Column v_begin + i of the job is value column i of the state; for the identity, V = K. */
static void identity_state(chunk_buffers *b, int64_t v_begin) {
  clear_state(b);
  for (int64_t i = 0; i < b->V; ++i) {
    int64_t step;
    float *at = state_vector(b, i - i % LANES, &step);
    at[(v_begin + i) * step + i % LANES] = 1;
  }
}

static void load_state(chunk_buffers *b, const fkda_states *from, fkda_state_layout layout,
                       int64_t offset, int64_t v_begin) {
  if (layout == FKDA_STATE_KV) {
    clear_state(b); /* rows beyond K */
    for (int64_t k = 0; k < b->K; ++k) {
      load_row(b->block, from->data, from->dtype, offset + k * from->stride_row + v_begin, b->V,
               b->Vp);
      for (int64_t v = 0; v < b->Vp; v += LANES) {
        int64_t step;
        float *at = state_vector(b, v, &step);
        v_store(at + k * step, v_load(b->block + v));
      }
    }
    return;
  }
  for (int64_t v = 0; v < b->Vp; v += LANES) {
    for (int64_t i = 0; i < LANES; ++i)
      if (v + i < b->V)
        load_row(b->block + i * b->Kp, from->data, from->dtype,
                 offset + (v_begin + v + i) * from->stride_row, b->K, b->Kp);
      else
        memset(b->block + i * b->Kp, 0, (size_t)b->Kp * sizeof *b->block);
    int64_t step;
    float *at = state_vector(b, v, &step);
    for (int64_t k = 0; k < b->Kp; k += LANES) {
      vec t[LANES];
      for (int i = 0; i < LANES; ++i) t[i] = v_load(b->block + i * b->Kp + k);
      v_transpose(t);
      for (int i = 0; i < LANES; ++i) v_store(at + (k + i) * step, t[i]);
    }
  }
}

static void store_state(const chunk_buffers *b, const fkda_states *to, fkda_state_layout layout,
                        int64_t offset, int64_t v_begin) {
  if (layout == FKDA_STATE_KV) {
    for (int64_t k = 0; k < b->K; ++k) {
      for (int64_t v = 0; v < b->Vp; v += LANES) {
        int64_t step;
        const float *at = state_vector(b, v, &step);
        v_store(b->block + v, v_load(at + k * step));
      }
      store_row(to->data, to->dtype, offset + k * to->stride_row + v_begin, b->block, b->V);
    }
    return;
  }
  for (int64_t v = 0; v < b->V; v += LANES) {
    int64_t step;
    const float *at = state_vector(b, v, &step);
    for (int64_t k = 0; k < b->Kp; k += LANES) {
      vec t[LANES];
      for (int i = 0; i < LANES; ++i) t[i] = v_load(at + (k + i) * step);
      v_transpose(t);
      for (int i = 0; i < LANES; ++i) v_store(b->block + i * b->Kp + k, t[i]);
    }
    for (int64_t i = 0; i < LANES && v + i < b->V; ++i)
      store_row(to->data, to->dtype, offset + (v_begin + v + i) * to->stride_row,
                b->block + i * b->Kp, b->K);
  }
}

/* ---- checkpoints ------------------------------------------------------------------------------ */

static void store_checkpoint(const chunk_buffers *b, const fkda_cpu_job *job, int64_t row,
                             int64_t own_offset) {
  const fkda_checkpoints *c = &job->problem->checkpoints;
  int64_t offset = own_offset;
  if (c->slots.data) {
    const int64_t slot = c->mode == FKDA_CHECKPOINT_OFFSETS && c->slots.columns
                             ? fkda_index_of(&c->slots, job->n, row - job->n * c->per_sequence)
                             : fkda_index_of(&c->slots, row, 0);
    if (slot < 0) return;
    offset = slot * c->state.stride_slot;
  }
  store_state(b, &c->state, job->problem->layout, offset + job->head * c->state.stride_head,
              job->v_begin);
}

/* Stores every checkpoint that belongs after `done` of `length` tokens. Returns the next count of
 * tokens at which there is one by offsets (INT64_MAX: none), so that chunks between do not search. */
static int64_t store_checkpoints(const chunk_buffers *b, const fkda_cpu_job *job, int64_t done,
                                 int64_t length) {
  const fkda_checkpoints *c = &job->problem->checkpoints;
  if (c->mode == FKDA_CHECKPOINT_NONE) return INT64_MAX;
  if (c->mode == FKDA_CHECKPOINT_EVERY) {
    int64_t j = -1;
    if (c->before)
      j = done % c->every == 0 && done < length ? done / c->every : -1;
    else if (done > 0 && (done % c->every == 0 || done == length))
      j = (done - 1) / c->every;
    if (j >= 0)
      store_checkpoint(b, job, job->checkpoint_row + j,
                       (job->checkpoint_row + j) * c->state.stride_slot);
    return 0; /* every boundary is looked at: one division */
  }
  int64_t first, last, next = INT64_MAX;
  if (c->mode == FKDA_CHECKPOINT_PACKED) {
    first = fkda_int_at(c->indptr.data, c->indptr.dtype, job->n * c->indptr.stride);
    last = fkda_int_at(c->indptr.data, c->indptr.dtype, (job->n + 1) * c->indptr.stride);
  } else {
    first = job->n * c->per_sequence;
    last = first + c->per_sequence;
  }
  for (int64_t row = first; row < last; ++row) {
    const int64_t column = row - first;
    const int64_t at = c->mode == FKDA_CHECKPOINT_PACKED
                           ? fkda_index_of(&c->offsets, row, 0)
                           : fkda_index_of(&c->offsets, job->n, column);
    if (at == done)
      store_checkpoint(b, job, row,
                       c->mode == FKDA_CHECKPOINT_PACKED
                           ? row * c->state.stride_slot
                           : job->n * c->stride_n + column * c->state.stride_slot);
    else if (at > done && at < next)
      next = at;
  }
  return next;
}

/* ---- one chunk: inputs and gates --------------------------------------------------------------- */

INLINE int64_t row_offset(const fkda_rows *rows, const fkda_span *span, int64_t token,
                          int64_t head) {
  return span->b * rows->stride_b + (span->begin + token) * rows->stride_t + head * rows->stride_h;
}

INLINE const char *first_row(const fkda_rows *rows, const fkda_span *span, int64_t token,
                             int64_t head, int64_t column) {
  return element_at(rows->data, rows->dtype, row_offset(rows, span, token, head) + column);
}

INLINE int64_t row_bytes(const fkda_rows *rows) {
  return rows->stride_t * (rows->dtype == FKDA_F32 ? 4 : 2);
}

INLINE void load_rows_as(float *to, int64_t width, const char *from, int64_t step, int32_t dtype,
                         int64_t tokens, int64_t count) {
  for (int64_t c = 0; c < tokens; ++c, to += width, from += step)
    load_row_as(to, from, dtype, count, width);
}

/* to[c][0..width) = `count` elements from `column` on of rows token .. token+tokens-1, then zeros; rows
 * up to CHUNK are zero, all of them if the tensor is absent. */
static void load_rows(float *to, int64_t width, const fkda_rows *rows, const fkda_span *span,
                      int64_t token, int64_t head, int64_t column, int64_t tokens, int64_t count) {
  if (rows->data) {
    const char *from = first_row(rows, span, token, head, column);
    const int64_t step = row_bytes(rows);
    if (rows->dtype == FKDA_BF16)
      load_rows_as(to, width, from, step, FKDA_BF16, tokens, count);
    else if (rows->dtype == FKDA_F16)
      load_rows_as(to, width, from, step, FKDA_F16, tokens, count);
    else
      load_rows_as(to, width, from, step, FKDA_F32, tokens, count);
  } else {
    tokens = 0;
  }
  for (int64_t i = tokens * width; i < CHUNK * width; i += LANES) v_store(to + i, v_set(0));
}

INLINE void store_rows_as(char *to, int64_t step, int32_t dtype, const float *from, int64_t width,
                          int64_t tokens, int64_t count) {
  for (int64_t c = 0; c < tokens; ++c, to += step, from += width)
    store_row_as(to, dtype, from, count);
}

static void store_rows(const fkda_rows *rows, const fkda_span *span, int64_t token, int64_t head,
                       int64_t column, const float *from, int64_t width, int64_t tokens,
                       int64_t count) {
  char *to = (char *)first_row(rows, span, token, head, column);
  const int64_t step = row_bytes(rows);
  if (rows->dtype == FKDA_BF16)
    store_rows_as(to, step, FKDA_BF16, from, width, tokens, count);
  else if (rows->dtype == FKDA_F16)
    store_rows_as(to, step, FKDA_F16, from, width, tokens, count);
  else
    store_rows_as(to, step, FKDA_F32, from, width, tokens, count);
}

/* Heads lie side by side in a token, so rows of one head do not follow each other in memory and may lie in
 * a page each: hardware does not fetch them ahead. Asking for a few with every tile of work hides their
 * latency, a tenth of a prefill of many heads; all at once, or a part with every panel, does not. */
INLINE void fetch_ahead(rows_ahead *x) {
  for (int64_t i = 0; i < x->at_once && x->asked < x->kinds * CHUNK; ++i, ++x->asked) {
    const int64_t kind = x->asked % x->kinds, row = x->asked / x->kinds;
    const char *at = x->kind[kind].at + row * x->kind[kind].step;
    for (int64_t byte = 0; byte < x->kind[kind].bytes; byte += 64)
      __builtin_prefetch(at + byte, 0, 2);
  }
}

static void add_ahead(rows_ahead *x, const fkda_rows *rows, const fkda_span *span, int64_t t,
                      int64_t head, int64_t column, int64_t count) {
  if (!rows->data) return;
  x->kind[x->kinds].at = first_row(rows, span, t, head, column);
  x->kind[x->kinds].step = row_bytes(rows);
  x->kind[x->kinds++].bytes = count * (rows->dtype == FKDA_F32 ? 4 : 2);
}

/* What the chunk at t will need, if it is a full one: for its factors, for its values or both, to be asked for
 * in `steps` steps. */
static void plan_ahead(rows_ahead *x, const fkda_cpu_job *job, const fkda_span *span, int64_t t,
                       bool factors, bool values, int64_t steps) {
  const fkda_problem *p = job->problem;
  const int64_t qk_head = job->head * p->H / p->HV, columns = job->v_end - job->v_begin;
  x->kinds = x->asked = x->at_once = 0;
  if (t + CHUNK > span->length || !steps) return;
  if (factors) {
    add_ahead(x, &p->k, span, t, qk_head, 0, p->K);
    add_ahead(x, &p->q, span, t, qk_head, 0, p->K);
    add_ahead(x, &p->g, span, t, job->head, 0, p->K);
  }
  if (values) {
    add_ahead(x, &p->v, span, t, job->head, job->v_begin, columns);
    add_ahead(x, &p->out, span, t, job->head, job->v_begin, columns);
  }
  x->at_once = (x->kinds * CHUNK + steps - 1) / steps;
}

INLINE float sum_of_squares(const float *row, int64_t count) {
  vec sum = v_set(0);
  for (int64_t i = 0; i < count; i += LANES) {
    const vec x = v_load(row + i);
    sum = v_fma(x, x, sum);
  }
  return v_sum(sum);
}

/* Rows of `tokens` tokens from `t` on; (1) as a factor of each row, (3) for beta. */
static void load_chunk(chunk_buffers *b, chunk_factors *f, const fkda_cpu_job *job,
                       const fkda_span *span, int64_t t, int64_t tokens) {
  const fkda_problem *p = job->problem;
  const int64_t qk_head = job->head * p->H / p->HV, Kp = b->Kp;
  float *k = b->anchored, *q = b->anchored + CHUNK * Kp;
  load_rows(k, Kp, &p->k, span, t, qk_head, 0, tokens, b->K);
  load_rows(q, Kp, &p->q, span, t, qk_head, 0, tokens, b->K);
  load_rows(f->k_bar, Kp, &p->g, span, t, job->head, 0, tokens, b->K);
  for (int64_t c = 0; c < tokens; ++c)
    f->beta[c] =
        load_scalar(p->beta.data, p->beta.dtype, row_offset(&p->beta, span, t + c, job->head));
  for (int64_t c = tokens; c < CHUNK; ++c) f->beta[c] = 0;

  if (p->beta_is_logit) { /* (3) */
    const vec factor = v_set(p->allow_neg_eigval ? 2 : 1);
    for (int c = 0; c < CHUNK; c += LANES)
      v_store(f->beta + c, v_mul(factor, v_sigmoid(v_load(f->beta + c))));
  }
  const float scale = (float)p->scale;
  for (int64_t c = 0; c < CHUNK; ++c) {
    b->norm_k[c] = p->l2norm ? sum_of_squares(k + c * Kp, Kp) : 1;
    b->norm_q[c] = p->l2norm ? sum_of_squares(q + c * Kp, Kp) : scale;
  }
  if (p->l2norm) { /* (1) */
    const vec eps = v_set((float)FKDA_L2NORM_EPS);
    for (int c = 0; c < CHUNK; c += LANES) {
      v_store(b->norm_k + c, v_rsqrt(v_add(v_load(b->norm_k + c), eps)));
      v_store(b->norm_q + c, v_mul(v_set(scale), v_rsqrt(v_add(v_load(b->norm_q + c), eps))));
    }
  }
}

static void load_values(chunk_buffers *b, const fkda_cpu_job *job, const fkda_span *span, int64_t t,
                        int64_t tokens) {
  load_rows(b->values, b->Vp, &job->problem->v, span, t, job->head, job->v_begin, tokens, b->V);
}

/* (2), then G_i = sum of g_j, j <= i, over the chunk. g itself stays in the place of the decayed
 * operands, for factors_pairwise(). True if the anchored factors are safe. */
INLINE bool accumulate_gates_as(const chunk_buffers *b, chunk_factors *f, const fkda_problem *p,
                                int64_t tokens, fkda_gate gate) {
  const vec exp_A = v_set(b->exp_A), lower_bound = v_set((float)p->lower_bound);
  const vec range = v_set(ANCHOR_RANGE);
  bool unsafe = false;
  for (int64_t k = 0; k < b->Kp; k += LANES) {
    const vec bias = v_load(b->bias + k);
    float *at = f->k_bar + k;
    vec G = v_set(0);
    for (int64_t c = 0; c < tokens; ++c, at += b->Kp) {
      const vec g = log_decay(gate, v_load(at), bias, exp_A, lower_bound);
      v_store(f->decayed + c * b->Kp + k, g);
      G = v_add(G, g);
      v_store(at, G);
    }
    for (int64_t c = tokens; c < CHUNK; ++c, at += b->Kp) {
      v_store(f->decayed + c * b->Kp + k, v_set(0));
      v_store(at, G);
    }
    const vec anchor = v_load(f->k_bar + (CHUNK / 2 - 1) * b->Kp + k);
    unsafe |= v_any_not_below(v_sub(v_load(f->k_bar + k), anchor), range);
    unsafe |= v_any_not_below(v_sub(anchor, G), range);
  }
  return !unsafe;
}

static bool accumulate_gates(const chunk_buffers *b, chunk_factors *f, const fkda_problem *p,
                             int64_t tokens) {
  switch (p->gate) {
    case FKDA_GATE_BOUNDED: return accumulate_gates_as(b, f, p, tokens, FKDA_GATE_BOUNDED);
    case FKDA_GATE_SOFTPLUS: return accumulate_gates_as(b, f, p, tokens, FKDA_GATE_SOFTPLUS);
    default: return accumulate_gates_as(b, f, p, tokens, FKDA_GATE_DIRECT);
  }
}

/* ---- one chunk: factors ------------------------------------------------------------------------ */

/* acc[m][n] += sum_p a[m*a_row + p*a_step] * b[p*b_step + n*LANES ..]; vectors is a constant. */
INLINE void multiply_tile(vec acc[TILE_ROWS][TILE_VECTORS], int vectors, const float *a,
                          int64_t a_row, int64_t a_step, const float *b, int64_t b_step,
                          int64_t steps) {
  for (int64_t p = 0; p < steps; ++p, a += a_step, b += b_step) {
    vec row[TILE_VECTORS];
    for (int n = 0; n < vectors; ++n) row[n] = v_load(b + n * LANES);
    for (int m = 0; m < TILE_ROWS; ++m) {
      const vec factor = v_set(a[m * a_row]);
      for (int n = 0; n < vectors; ++n) acc[m][n] = v_fma(factor, row[n], acc[m][n]);
    }
  }
}

/* (8) against the anchor m, and from there the factors that meet the state. */
static void decay_factors_anchored(chunk_buffers *b, chunk_factors *f) {
  const int64_t Kp = b->Kp;
  for (int64_t k = 0; k < Kp; k += LANES) {
    const vec m = v_load(f->k_bar + (CHUNK / 2 - 1) * Kp + k);
    const vec from_start = v_exp(m);                                             /* e^m */
    const vec to_end = v_exp(v_sub(v_load(f->k_bar + (CHUNK - 1) * Kp + k), m)); /* e^{G_C-m} */
    v_store(f->total_decay + k, v_mul(from_start, to_end));
    fetch_ahead(&b->ahead);
    for (int64_t c0 = 0; c0 < CHUNK; c0 += LANES) {
      vec inverse[LANES];
      for (int i = 0; i < LANES; ++i) {
        const int64_t c = c0 + i, at = c * Kp + k;
        const vec decay = v_exp_in_range(v_sub(v_load(f->k_bar + at), m)); /* e^{G-m} */
        const vec kn = v_mul(v_load(b->anchored + at), v_set(b->norm_k[c]));
        const vec qn = v_mul(v_load(b->anchored + CHUNK * Kp + at), v_set(b->norm_q[c]));
        const vec ka = v_mul(kn, decay), qa = v_mul(qn, decay);
        inverse[i] = v_mul(kn, v_reciprocal(decay));
        v_store(b->anchored + at, ka);
        v_store(b->anchored + CHUNK * Kp + at, qa);
        v_store(f->decayed + at, v_mul(ka, from_start));
        v_store(f->decayed + CHUNK * Kp + at, v_mul(qa, from_start));
        v_store(f->k_bar + at, v_mul(inverse[i], to_end)); /* K- over G, no longer needed */
      }
      v_transpose(inverse);
      for (int i = 0; i < LANES; ++i) v_store(b->inverse_k + (k + i) * CHUNK + c0, inverse[i]);
    }
  }
}

/* (9) as one product of 32 rows: [k e^{G-m}; q e^{G-m}] times K^T, whole squares. */
static void triangles_anchored(chunk_buffers *b, chunk_factors *f) {
  for (int64_t r = 0; r < 2 * CHUNK; r += TILE_ROWS)
    for (int64_t j = 0; j < CHUNK;) {
      const int vectors = CHUNK - j >= PANEL ? TILE_VECTORS : CHUNK / LANES % TILE_VECTORS;
      vec acc[TILE_ROWS][TILE_VECTORS];
      for (int m = 0; m < TILE_ROWS; ++m)
        for (int n = 0; n < TILE_VECTORS; ++n) acc[m][n] = v_set(0);
      if (vectors == TILE_VECTORS)
        multiply_tile(acc, TILE_VECTORS, b->anchored + r * b->Kp, b->Kp, 1, b->inverse_k + j, CHUNK,
                      b->Kp);
      else
        multiply_tile(acc, 1, b->anchored + r * b->Kp, b->Kp, 1, b->inverse_k + j, CHUNK, b->Kp);
      for (int m = 0; m < TILE_ROWS; ++m)
        for (int n = 0; n < vectors; ++n)
          v_store(f->triangles + (r + m) * CHUNK + j + n * LANES, acc[m][n]);
      j += vectors * LANES;
    }
}

/* (8) and (9) for gates of any strength: every exponent is a difference G_i - G_j <= 0, summed from the g
 * between the two. (Subtracting two sums lost 2e-5 where -100 a token met weak gates in one chunk.) */
static void factors_pairwise(chunk_buffers *b, chunk_factors *f) {
  const int64_t Kp = b->Kp;
  float *k_rows = b->anchored, *q_rows = b->anchored + CHUNK * Kp, *difference = b->block;
  const float *g = f->decayed;
  for (int64_t c = 0; c < CHUNK; ++c)
    for (int64_t k = 0; k < Kp; k += LANES) {
      const int64_t at = c * Kp + k;
      v_store(k_rows + at, v_mul(v_load(k_rows + at), v_set(b->norm_k[c])));
      v_store(q_rows + at, v_mul(v_load(q_rows + at), v_set(b->norm_q[c])));
    }
  for (int64_t i = 0; i < CHUNK; ++i) {
    for (int64_t k = 0; k < Kp; k += LANES) v_store(difference + k, v_set(0));
    for (int64_t j = i; j >= 0; --j) {
      vec A = v_set(0), P = v_set(0);
      for (int64_t k = 0; k < Kp; k += LANES) {
        const vec d = v_load(difference + k);
        const vec kj = v_mul(v_load(k_rows + j * Kp + k), v_exp(d));
        A = v_fma(v_load(k_rows + i * Kp + k), kj, A);
        P = v_fma(v_load(q_rows + i * Kp + k), kj, P);
        v_store(difference + k, v_add(d, v_load(g + j * Kp + k))); /* now G_i - G_{j-1} */
      }
      f->triangles[i * CHUNK + j] = v_sum(A);
      f->triangles[(CHUNK + i) * CHUNK + j] = v_sum(P);
    }
  }
  for (int64_t k = 0; k < Kp; k += LANES) {
    vec to_end = v_set(0); /* G_C - G_c */
    v_store(f->total_decay + k, v_exp(v_load(f->k_bar + (CHUNK - 1) * Kp + k)));
    for (int64_t c = CHUNK - 1; c >= 0; --c) {
      const int64_t at = c * Kp + k;
      const vec decay = v_exp(v_load(f->k_bar + at)), kn = v_load(k_rows + at);
      v_store(f->k_bar + at, v_mul(kn, v_exp(to_end)));
      to_end = v_add(to_end, v_load(g + at));
      v_store(f->decayed + at, v_mul(kn, decay));
      v_store(f->decayed + CHUNK * Kp + at, v_mul(v_load(q_rows + at), decay));
    }
  }
}

/* diag(beta) of (9) */
static void scale_triangle(chunk_factors *f) {
  for (int64_t i = 0; i < CHUNK; ++i)
    for (int64_t j = 0; j < CHUNK; j += LANES) {
      float *A = f->triangles + i * CHUNK + j;
      v_store(A, v_mul(v_set(f->beta[i]), v_load(A)));
    }
}

/* ---- one chunk: panels of value columns --------------------------------------------------------- */

/* A panel is `vectors` vectors wide, TILE_VECTORS or 1: a constant wherever these are inlined. */

/* X[r][v] = sum_k [K~; Q~][r][k] S[v][k] */
INLINE void read_state(const chunk_buffers *b, const chunk_factors *f, const float *panel,
                       int vectors, int64_t rows) {
  const int64_t width = vectors * LANES;
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    vec acc[TILE_ROWS][TILE_VECTORS];
    for (int m = 0; m < TILE_ROWS; ++m)
      for (int n = 0; n < vectors; ++n) acc[m][n] = v_set(0);
    multiply_tile(acc, vectors, f->decayed + r * b->Kp, b->Kp, 1, panel, width, b->Kp);
    for (int m = 0; m < TILE_ROWS; ++m)
      for (int n = 0; n < vectors; ++n) v_store(b->X + (r + m) * width + n * LANES, acc[m][n]);
  }
}

/* (10) u_i = beta_i (v_i - x_i) - sum_{j<i} A_ij u_j, right-looking, and (11) o_i = x_i + sum_{j<=i} P_ij u_j
 * for one vector of value columns, the one at `column` of a panel `width` wide. `values` holds v and
 * receives o. */
static void substitute(const chunk_buffers *b, const chunk_factors *f, float *values,
                       int64_t column, int64_t width, bool with_output) {
  vec u[CHUNK];
#pragma GCC unroll 16
  for (int i = 0; i < CHUNK; ++i)
    u[i] = v_mul(v_set(f->beta[i]),
                 v_sub(v_load(values + i * b->Vp), v_load(b->X + i * width + column)));
#pragma GCC unroll 16
  for (int j = 0; j < CHUNK; ++j) {
    v_store(b->U + j * width + column, u[j]);
#pragma GCC unroll 16
    for (int i = j + 1; i < CHUNK; ++i)
      u[i] = v_fnma(v_set(f->triangles[i * CHUNK + j]), u[j], u[i]);
  }
  if (!with_output) return;
  const float *P = f->triangles + CHUNK * CHUNK, *x = b->X + CHUNK * width + column;
#pragma GCC unroll 16
  for (int i = 0; i < CHUNK; ++i) {
    vec o = v_load(x + i * width);
#pragma GCC unroll 16
    for (int j = 0; j <= i; ++j) o = v_fma(v_set(P[i * CHUNK + j]), u[j], o);
    v_store(values + i * b->Vp, o);
  }
}

/* (12) S[v][k] = S[v][k] e^{G_C[k]} + sum_i U[i][v] K-[i][k] */
INLINE void update_state(chunk_buffers *b, const chunk_factors *f, float *panel, int vectors) {
  const int64_t width = vectors * LANES;
  for (int64_t k = 0; k < b->Kp; k += TILE_ROWS) {
    vec acc[TILE_ROWS][TILE_VECTORS];
    fetch_ahead(&b->ahead);
    for (int m = 0; m < TILE_ROWS; ++m) {
      const vec decay = v_set(f->total_decay[k + m]);
      for (int n = 0; n < vectors; ++n)
        acc[m][n] = v_mul(decay, v_load(panel + (k + m) * width + n * LANES));
    }
    multiply_tile(acc, vectors, f->k_bar + k, 1, b->Kp, b->U, width, CHUNK);
    for (int m = 0; m < TILE_ROWS; ++m)
      for (int n = 0; n < vectors; ++n) v_store(panel + (k + m) * width + n * LANES, acc[m][n]);
  }
}

INLINE void run_panel(chunk_buffers *b, const chunk_factors *f, int64_t v, int vectors,
                      bool with_output) {
  float *panel = b->state + v * b->Kp;
  read_state(b, f, panel, vectors, with_output ? 2 * CHUNK : CHUNK);
  for (int n = 0; n < vectors; ++n)
    substitute(b, f, b->values + v + n * LANES, n * LANES, vectors * LANES, with_output);
  update_state(b, f, panel, vectors);
}

/* ---- one chunk ------------------------------------------------------------------------------------ */

/* `tokens` of them from t on; fewer than CHUNK at the end of a sequence. */
static void prepare_chunk(chunk_buffers *b, chunk_factors *f, const fkda_cpu_job *job,
                          const fkda_span *span, int64_t t) {
  const int64_t left = span->length - t, tokens = left < CHUNK ? left : CHUNK;
  load_chunk(b, f, job, span, t, tokens);
  if (accumulate_gates(b, f, job->problem, tokens)) {
    decay_factors_anchored(b, f);
    triangles_anchored(b, f);
  } else {
    factors_pairwise(b, f);
  }
  scale_triangle(f);
}

static void apply_chunk(chunk_buffers *b, const chunk_factors *f, const fkda_cpu_job *job,
                        const fkda_span *span, int64_t t, bool alone) {
  const fkda_problem *p = job->problem;
  const int64_t left = span->length - t, tokens = left < CHUNK ? left : CHUNK;
  const bool with_output = p->out.data != NULL;
  load_values(b, job, span, t, tokens);
  plan_ahead(&b->ahead, job, span, t + CHUNK, alone, true, b->Vp / PANEL * (b->Kp / TILE_ROWS));
  int64_t v = 0;
  for (; v + PANEL <= b->Vp; v += PANEL) run_panel(b, f, v, TILE_VECTORS, with_output);
  if (v < b->Vp) run_panel(b, f, v, 1, with_output);
  if (with_output)
    store_rows(&p->out, span, t, job->head, job->v_begin, b->values, b->Vp, tokens, b->V);
}

/* ---- one sequence ------------------------------------------------------------------------------- */

/* The state before the first token. Returns where the next checkpoint is. */
static int64_t begin_sequence(chunk_buffers *b, const fkda_cpu_job *job, const fkda_span *span) {
  const fkda_problem *p = job->problem;
  if (job->identity)
    identity_state(b, job->v_begin);
  else if (has_initial_state(p, job->n))
    load_state(b, &p->initial, p->layout,
               fkda_index_of(&p->initial_indices, job->n, 0) * p->initial.stride_slot +
                   job->head * p->initial.stride_head,
               job->v_begin);
  else
    clear_state(b);
  return store_checkpoints(b, job, 0, span->length);
}

static void end_sequence(const chunk_buffers *b, const fkda_cpu_job *job) {
  const fkda_problem *p = job->problem;
  if (p->final.data)
    store_state(b, &p->final, p->layout,
                fkda_index_of(&p->final_indices, job->n, 0) * p->final.stride_slot +
                    job->head * p->final.stride_head,
                job->v_begin);
}

static void apply_and_store(chunk_buffers *b, const chunk_factors *f, const fkda_cpu_job *job,
                            const fkda_span *span, int64_t t, int64_t *next_checkpoint) {
  apply_chunk(b, f, job, span, t, f == &b->own);
  const int64_t done = t + CHUNK < span->length ? t + CHUNK : span->length;
  if (done >= *next_checkpoint) *next_checkpoint = store_checkpoints(b, job, done, span->length);
}

static void load_parameters(chunk_buffers *b, const fkda_cpu_job *job) {
  b->exp_A = exp_A_of(job->problem, job->head);
  load_bias(b->bias, job->problem, job->head, b->Kp);
}

static void place_for_job(chunk_buffers *b, char *scratch, const fkda_cpu_job *job) {
  const int64_t V = job->v_end - job->v_begin;
  place_buffers(b, scratch, job->problem->K, V, padded_columns(V));
}

static void prefill(const fkda_cpu_job *job, void *state, void *scratch) {
  const float_mode mode = flush_denormals();
  const fkda_span span = fkda_span_of(job->problem, job->n);
  chunk_buffers b;
  place_for_job(&b, scratch, job);
  b.state = state;
  load_parameters(&b, job);
  int64_t next_checkpoint = begin_sequence(&b, job, &span);
  for (int64_t t = 0; t < span.length; t += CHUNK) {
    prepare_chunk(&b, &b.own, job, &span, t);
    apply_and_store(&b, &b.own, job, &span, t, &next_checkpoint);
  }
  end_sequence(&b, job);
  restore_denormals(mode);
}

/* ---- the same in pieces, for several threads ------------------------------------------------------ */

static void make_chunks(const fkda_cpu_job *job, const fkda_cpu_ring *ring, int64_t first,
                        int64_t last, void *scratch) {
  const float_mode mode = flush_denormals();
  const fkda_span span = fkda_span_of(job->problem, job->n);
  chunk_buffers b;
  place_buffers(&b, scratch, job->problem->K, 0, 0);
  load_parameters(&b, job);
  for (int64_t c = first; c < last; ++c) {
    chunk_factors f;
    place_factors(&f, ring->slots + (size_t)(c % ring->count) * ring->slot_size, b.Kp);
    plan_ahead(&b.ahead, job, &span, (c + 1) * CHUNK, true, false, b.Kp / LANES);
    prepare_chunk(&b, &f, job, &span, c * CHUNK);
  }
  restore_denormals(mode);
}

static void apply_chunks(const fkda_cpu_job *job, const fkda_cpu_ring *ring, int64_t first,
                         int64_t last, void *state, int64_t *next_checkpoint, void *scratch) {
  const float_mode mode = flush_denormals();
  const fkda_span span = fkda_span_of(job->problem, job->n);
  chunk_buffers b;
  place_for_job(&b, scratch, job);
  b.state = (float *)state + job->v_begin * b.Kp;
  if (first == 0) *next_checkpoint = begin_sequence(&b, job, &span);
  for (int64_t c = first; c < last; ++c) {
    chunk_factors f;
    place_factors(&f, ring->slots + (size_t)(c % ring->count) * ring->slot_size, b.Kp);
    apply_and_store(&b, &f, job, &span, c * CHUNK, next_checkpoint);
  }
  if (last * CHUNK >= span.length) end_sequence(&b, job);
  restore_denormals(mode);
}
