/* Prefill on the CPU: the chunk form (8)-(12), written once over the vector shims.
 *
 * A job is one sequence and value head, or a part of its value columns. Its state stays in scratch in
 * f32 for the whole sequence, cut into panels of PANEL value columns, [panel][k][PANEL], so that a
 * panel (16 KB at K = 128) is read and written from the first-level cache while a chunk works on it.
 *
 *   per chunk of 16 tokens
 *     load      rows of q, k, g, beta as f32, tokens beyond the sequence zero
 *     gates     (2) and G, the running sum of log-decays, a channel a lane
 *     factors   (8) decayed q and k, (9) the two triangles A and P
 *     panels    X = [K~; Q~] S, (10) U by forward substitution, (11) O, (12) S
 *     store     rows of out
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

typedef struct chunk_buffers {
  int64_t K, Kp;      /* channels, and rounded up to LANES: the rest is zero */
  int64_t V, Vp;      /* value columns of this job, and rounded up to PANEL */
  float *state;       /* [Vp/PANEL][Kp][PANEL] S, transposed: k rows, v columns */
  float *anchored;    /* [32][Kp] k, q as loaded; then k e^{G-m}, scale q e^{G-m} */
  float *decayed;     /* [32][Kp] K~, Q~ (8) */
  float *gates;       /* [16][Kp] g, then G; then K- (8) */
  float *inverse_k;   /* [Kp][16] K^ = k e^{m-G}, transposed */
  float *values;      /* [16][Vp] v, then o */
  float *bias;        /* [Kp] dt_bias */
  float *total_decay; /* [Kp] exp(G_C) */
  float *X;           /* [32][PANEL] K~ S^T, Q~ S^T of one panel */
  float *U;           /* [16][PANEL] */
  float *triangles;   /* [32][16] A = strictlower(beta K~ K^^T), P = lower(Q~ K^^T) (9) */
  float *block;       /* [LANES][max(Kp, Vp)] for transposing states */
  float beta[CHUNK];
  float norm_k[CHUNK], norm_q[CHUNK]; /* factors of the rows: 1/|k|, scale/|q|, or 1, scale */
  float exp_A;
} chunk_buffers;

/* Sizing and placing are one walk: base NULL gives the size. */
static size_t place_buffers(chunk_buffers *b, char *base, int64_t K, int64_t V) {
  b->K = K;
  b->V = V;
  b->Kp = round_up(K, LANES);
  b->Vp = round_up(V, PANEL);
  const int64_t widest = b->Kp > b->Vp ? b->Kp : b->Vp;
  size_t offset = 0;
#define PLACE(field, count)                                                                        \
  do {                                                                                             \
    b->field = base ? (float *)(void *)(base + offset) : NULL;                                     \
    offset += (size_t)round_up((count) * (int64_t)sizeof(float), 64);                              \
  } while (0)
  PLACE(state, b->Vp * b->Kp);
  PLACE(anchored, 2 * CHUNK * b->Kp);
  PLACE(decayed, 2 * CHUNK * b->Kp);
  PLACE(gates, CHUNK * b->Kp);
  PLACE(inverse_k, CHUNK * b->Kp);
  PLACE(values, CHUNK * b->Vp);
  PLACE(bias, b->Kp);
  PLACE(total_decay, b->Kp);
  PLACE(X, 2 * CHUNK * PANEL);
  PLACE(U, CHUNK * PANEL);
  PLACE(triangles, 2 * CHUNK * CHUNK);
  PLACE(block, LANES * widest);
#undef PLACE
  return offset;
}

static size_t prefill_scratch(int64_t K, int64_t V) {
  chunk_buffers b;
  return place_buffers(&b, NULL, K, V);
}

/* ---- states: [V,K] or [K,V] in memory <-> panels --------------------------------------------- */

static void clear_state(chunk_buffers *b) {
  for (int64_t i = 0; i < b->Vp * b->Kp; i += LANES) v_store(b->state + i, v_set(0));
}

/* Column v_begin + i of the job is value column i of the state; for the identity, V = K. */
static void identity_state(chunk_buffers *b, int64_t v_begin) {
  clear_state(b);
  for (int64_t i = 0; i < b->V; ++i)
    b->state[(i / PANEL * b->Kp + v_begin + i) * PANEL + i % PANEL] = 1;
}

static void load_state(chunk_buffers *b, const fkda_states *from, fkda_state_layout layout,
                       int64_t offset, int64_t v_begin) {
  if (layout == FKDA_STATE_KV) {
    clear_state(b); /* rows beyond K */
    for (int64_t k = 0; k < b->K; ++k) {
      load_row(b->block, from->data, from->dtype, offset + k * from->stride_row + v_begin, b->V,
               b->Vp);
      for (int64_t v = 0; v < b->Vp; v += LANES)
        v_store(b->state + (v / PANEL * b->Kp + k) * PANEL + v % PANEL, v_load(b->block + v));
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
    float *panel = b->state + v / PANEL * b->Kp * PANEL + v % PANEL;
    for (int64_t k = 0; k < b->Kp; k += LANES) {
      vec t[LANES];
      for (int i = 0; i < LANES; ++i) t[i] = v_load(b->block + i * b->Kp + k);
      v_transpose(t);
      for (int i = 0; i < LANES; ++i) v_store(panel + (k + i) * PANEL, t[i]);
    }
  }
}

static void store_state(const chunk_buffers *b, const fkda_states *to, fkda_state_layout layout,
                        int64_t offset, int64_t v_begin) {
  if (layout == FKDA_STATE_KV) {
    for (int64_t k = 0; k < b->K; ++k) {
      for (int64_t v = 0; v < b->Vp; v += LANES)
        v_store(b->block + v, v_load(b->state + (v / PANEL * b->Kp + k) * PANEL + v % PANEL));
      store_row(to->data, to->dtype, offset + k * to->stride_row + v_begin, b->block, b->V);
    }
    return;
  }
  for (int64_t v = 0; v < b->V; v += LANES) {
    const float *panel = b->state + v / PANEL * b->Kp * PANEL + v % PANEL;
    for (int64_t k = 0; k < b->Kp; k += LANES) {
      vec t[LANES];
      for (int i = 0; i < LANES; ++i) t[i] = v_load(panel + (k + i) * PANEL);
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

static void zero_rows(float *rows, int64_t from, int64_t width) {
  for (int64_t i = from * width; i < CHUNK * width; i += LANES) v_store(rows + i, v_set(0));
}

INLINE float sum_of_squares(const float *row, int64_t count) {
  vec sum = v_set(0);
  for (int64_t i = 0; i < count; i += LANES) {
    const vec x = v_load(row + i);
    sum = v_fma(x, x, sum);
  }
  return v_sum(sum);
}

/* Rows of `tokens` tokens from `t` on; (1) as a factor of each row, (3) for beta.
 *
 * Tried without gain: prefetching the next chunk's rows (H heads apart, so each lies in a page of its
 * own), all at once before the panels or a part with each panel: 88 and 87 against 91 GFLOP/s a core at
 * T 4096, H 32. */
static void load_chunk(chunk_buffers *b, const fkda_cpu_job *job, const fkda_span *span, int64_t t,
                       int64_t tokens) {
  const fkda_problem *p = job->problem;
  const int64_t qk_head = job->head * p->H / p->HV;
  float *k = b->anchored, *q = b->anchored + CHUNK * b->Kp;
  for (int64_t c = 0; c < tokens; ++c) {
    load_row(k + c * b->Kp, p->k.data, p->k.dtype, row_offset(&p->k, span, t + c, qk_head), b->K,
             b->Kp);
    if (p->q.data)
      load_row(q + c * b->Kp, p->q.data, p->q.dtype, row_offset(&p->q, span, t + c, qk_head), b->K,
               b->Kp);
    load_row(b->gates + c * b->Kp, p->g.data, p->g.dtype, row_offset(&p->g, span, t + c, job->head),
             b->K, b->Kp);
    if (p->v.data)
      load_row(b->values + c * b->Vp, p->v.data, p->v.dtype,
               row_offset(&p->v, span, t + c, job->head) + job->v_begin, b->V, b->Vp);
    b->beta[c] =
        load_scalar(p->beta.data, p->beta.dtype, row_offset(&p->beta, span, t + c, job->head));
  }
  zero_rows(k, tokens, b->Kp);
  zero_rows(q, p->q.data ? tokens : 0, b->Kp);
  zero_rows(b->values, p->v.data ? tokens : 0, b->Vp);
  for (int64_t c = tokens; c < CHUNK; ++c) b->beta[c] = 0;

  if (p->beta_is_logit) { /* (3) */
    const vec factor = v_set(p->allow_neg_eigval ? 2 : 1);
    for (int c = 0; c < CHUNK; c += LANES)
      v_store(b->beta + c, v_mul(factor, v_sigmoid(v_load(b->beta + c))));
  }
  const float scale = (float)p->scale;
  for (int64_t c = 0; c < CHUNK; ++c) {
    b->norm_k[c] = p->l2norm ? sum_of_squares(k + c * b->Kp, b->Kp) : 1;
    b->norm_q[c] = p->l2norm ? sum_of_squares(q + c * b->Kp, b->Kp) : scale;
  }
  if (p->l2norm) { /* (1) */
    const vec eps = v_set((float)FKDA_L2NORM_EPS);
    for (int c = 0; c < CHUNK; c += LANES) {
      v_store(b->norm_k + c, v_rsqrt(v_add(v_load(b->norm_k + c), eps)));
      v_store(b->norm_q + c, v_mul(v_set(scale), v_rsqrt(v_add(v_load(b->norm_q + c), eps))));
    }
  }
}

/* (2), then G_i = sum of g_j, j <= i, over the chunk. g itself stays in the place of the decayed
 * operands, for factors_pairwise(). True if the anchored factors are safe. */
INLINE bool accumulate_gates_as(chunk_buffers *b, const fkda_problem *p, int64_t tokens,
                                fkda_gate gate) {
  const vec exp_A = v_set(b->exp_A), lower_bound = v_set((float)p->lower_bound);
  const vec range = v_set(ANCHOR_RANGE);
  bool unsafe = false;
  for (int64_t k = 0; k < b->Kp; k += LANES) {
    const vec bias = v_load(b->bias + k);
    float *at = b->gates + k;
    vec G = v_set(0);
    for (int64_t c = 0; c < tokens; ++c, at += b->Kp) {
      const vec g = log_decay(gate, v_load(at), bias, exp_A, lower_bound);
      v_store(b->decayed + c * b->Kp + k, g);
      G = v_add(G, g);
      v_store(at, G);
    }
    for (int64_t c = tokens; c < CHUNK; ++c, at += b->Kp) {
      v_store(b->decayed + c * b->Kp + k, v_set(0));
      v_store(at, G);
    }
    const vec anchor = v_load(b->gates + (CHUNK / 2 - 1) * b->Kp + k);
    unsafe |= v_any_not_below(v_sub(v_load(b->gates + k), anchor), range);
    unsafe |= v_any_not_below(v_sub(anchor, G), range);
  }
  return !unsafe;
}

static bool accumulate_gates(chunk_buffers *b, const fkda_problem *p, int64_t tokens) {
  switch (p->gate) {
    case FKDA_GATE_BOUNDED: return accumulate_gates_as(b, p, tokens, FKDA_GATE_BOUNDED);
    case FKDA_GATE_SOFTPLUS: return accumulate_gates_as(b, p, tokens, FKDA_GATE_SOFTPLUS);
    default: return accumulate_gates_as(b, p, tokens, FKDA_GATE_DIRECT);
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
static void decay_factors_anchored(chunk_buffers *b) {
  const int64_t Kp = b->Kp;
  for (int64_t k = 0; k < Kp; k += LANES) {
    const vec m = v_load(b->gates + (CHUNK / 2 - 1) * Kp + k);
    const vec from_start = v_exp(m);                                             /* e^m */
    const vec to_end = v_exp(v_sub(v_load(b->gates + (CHUNK - 1) * Kp + k), m)); /* e^{G_C-m} */
    v_store(b->total_decay + k, v_mul(from_start, to_end));
    for (int64_t c0 = 0; c0 < CHUNK; c0 += LANES) {
      vec inverse[LANES];
      for (int i = 0; i < LANES; ++i) {
        const int64_t c = c0 + i, at = c * Kp + k;
        const vec decay = v_exp_in_range(v_sub(v_load(b->gates + at), m)); /* e^{G-m} */
        const vec kn = v_mul(v_load(b->anchored + at), v_set(b->norm_k[c]));
        const vec qn = v_mul(v_load(b->anchored + CHUNK * Kp + at), v_set(b->norm_q[c]));
        const vec ka = v_mul(kn, decay), qa = v_mul(qn, decay);
        inverse[i] = v_mul(kn, v_reciprocal(decay));
        v_store(b->anchored + at, ka);
        v_store(b->anchored + CHUNK * Kp + at, qa);
        v_store(b->decayed + at, v_mul(ka, from_start));
        v_store(b->decayed + CHUNK * Kp + at, v_mul(qa, from_start));
        v_store(b->gates + at, v_mul(inverse[i], to_end)); /* K- over G, no longer needed */
      }
      v_transpose(inverse);
      for (int i = 0; i < LANES; ++i) v_store(b->inverse_k + (k + i) * CHUNK + c0, inverse[i]);
    }
  }
}

/* (9) as one product of 32 rows: [k e^{G-m}; q e^{G-m}] times K^T, whole squares. */
static void triangles_anchored(chunk_buffers *b) {
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
          v_store(b->triangles + (r + m) * CHUNK + j + n * LANES, acc[m][n]);
      j += vectors * LANES;
    }
}

/* (8) and (9) for gates of any strength: every exponent is a difference G_i - G_j <= 0, summed from the g
 * between the two. (Subtracting two sums lost 2e-5 where -100 a token met weak gates in one chunk.) */
static void factors_pairwise(chunk_buffers *b) {
  const int64_t Kp = b->Kp;
  float *k_rows = b->anchored, *q_rows = b->anchored + CHUNK * Kp, *difference = b->block;
  const float *g = b->decayed;
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
      b->triangles[i * CHUNK + j] = v_sum(A);
      b->triangles[(CHUNK + i) * CHUNK + j] = v_sum(P);
    }
  }
  for (int64_t k = 0; k < Kp; k += LANES) {
    vec to_end = v_set(0); /* G_C - G_c */
    v_store(b->total_decay + k, v_exp(v_load(b->gates + (CHUNK - 1) * Kp + k)));
    for (int64_t c = CHUNK - 1; c >= 0; --c) {
      const int64_t at = c * Kp + k;
      const vec decay = v_exp(v_load(b->gates + at)), kn = v_load(k_rows + at);
      v_store(b->gates + at, v_mul(kn, v_exp(to_end)));
      to_end = v_add(to_end, v_load(g + at));
      v_store(b->decayed + at, v_mul(kn, decay));
      v_store(b->decayed + CHUNK * Kp + at, v_mul(v_load(q_rows + at), decay));
    }
  }
}

/* diag(beta) of (9) */
static void scale_triangle(const chunk_buffers *b) {
  for (int64_t i = 0; i < CHUNK; ++i)
    for (int64_t j = 0; j < CHUNK; j += LANES) {
      float *A = b->triangles + i * CHUNK + j;
      v_store(A, v_mul(v_set(b->beta[i]), v_load(A)));
    }
}

/* ---- one chunk: panels of value columns --------------------------------------------------------- */

/* X[r][v] = sum_k [K~; Q~][r][k] S[v][k] */
static void read_state(const chunk_buffers *b, const float *panel, int64_t rows) {
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    vec acc[TILE_ROWS][TILE_VECTORS];
    for (int m = 0; m < TILE_ROWS; ++m)
      for (int n = 0; n < TILE_VECTORS; ++n) acc[m][n] = v_set(0);
    multiply_tile(acc, TILE_VECTORS, b->decayed + r * b->Kp, b->Kp, 1, panel, PANEL, b->Kp);
    for (int m = 0; m < TILE_ROWS; ++m)
      for (int n = 0; n < TILE_VECTORS; ++n) v_store(b->X + (r + m) * PANEL + n * LANES, acc[m][n]);
  }
}

/* (10) u_i = beta_i (v_i - x_i) - sum_{j<i} A_ij u_j, right-looking, and (11) o_i = x_i + sum_{j<=i} P_ij u_j
 * for one vector of value columns. `values` holds v and receives o. */
static void substitute(const chunk_buffers *b, float *values, int64_t column, bool with_output) {
  vec u[CHUNK];
#pragma GCC unroll 16
  for (int i = 0; i < CHUNK; ++i)
    u[i] = v_mul(v_set(b->beta[i]),
                 v_sub(v_load(values + i * b->Vp), v_load(b->X + i * PANEL + column)));
#pragma GCC unroll 16
  for (int j = 0; j < CHUNK; ++j) {
    v_store(b->U + j * PANEL + column, u[j]);
#pragma GCC unroll 16
    for (int i = j + 1; i < CHUNK; ++i)
      u[i] = v_fnma(v_set(b->triangles[i * CHUNK + j]), u[j], u[i]);
  }
  if (!with_output) return;
  const float *P = b->triangles + CHUNK * CHUNK, *x = b->X + CHUNK * PANEL + column;
#pragma GCC unroll 16
  for (int i = 0; i < CHUNK; ++i) {
    vec o = v_load(x + i * PANEL);
#pragma GCC unroll 16
    for (int j = 0; j <= i; ++j) o = v_fma(v_set(P[i * CHUNK + j]), u[j], o);
    v_store(values + i * b->Vp, o);
  }
}

/* (12) S[v][k] = S[v][k] e^{G_C[k]} + sum_i U[i][v] K-[i][k] */
static void update_state(const chunk_buffers *b, float *panel) {
  for (int64_t k = 0; k < b->Kp; k += TILE_ROWS) {
    vec acc[TILE_ROWS][TILE_VECTORS];
    for (int m = 0; m < TILE_ROWS; ++m) {
      const vec decay = v_set(b->total_decay[k + m]);
      for (int n = 0; n < TILE_VECTORS; ++n)
        acc[m][n] = v_mul(decay, v_load(panel + (k + m) * PANEL + n * LANES));
    }
    multiply_tile(acc, TILE_VECTORS, b->gates + k, 1, b->Kp, b->U, PANEL, CHUNK);
    for (int m = 0; m < TILE_ROWS; ++m)
      for (int n = 0; n < TILE_VECTORS; ++n)
        v_store(panel + (k + m) * PANEL + n * LANES, acc[m][n]);
  }
}

static void run_chunk(chunk_buffers *b, const fkda_cpu_job *job, const fkda_span *span, int64_t t,
                      int64_t tokens) {
  const fkda_problem *p = job->problem;
  const bool with_output = p->out.data != NULL;
  load_chunk(b, job, span, t, tokens);
  if (accumulate_gates(b, p, tokens)) {
    decay_factors_anchored(b);
    triangles_anchored(b);
  } else {
    factors_pairwise(b);
  }
  scale_triangle(b);
  for (int64_t v = 0; v < b->Vp; v += PANEL) {
    float *panel = b->state + v * b->Kp;
    read_state(b, panel, with_output ? 2 * CHUNK : CHUNK);
    for (int64_t column = 0; column < PANEL; column += LANES)
      substitute(b, b->values + v + column, column, with_output);
    update_state(b, panel);
  }
  if (with_output)
    for (int64_t c = 0; c < tokens; ++c)
      store_row(p->out.data, p->out.dtype,
                row_offset(&p->out, span, t + c, job->head) + job->v_begin, b->values + c * b->Vp,
                b->V);
}

/* ---- one sequence ------------------------------------------------------------------------------- */

static void prefill(const fkda_cpu_job *job, void *scratch) {
  const fkda_problem *p = job->problem;
  const int64_t n = job->n;
  const int64_t initial_slot = fkda_index_of(&p->initial_indices, n, 0);
  const int64_t final_slot = fkda_index_of(&p->final_indices, n, 0);
  if (initial_slot < 0 || final_slot < 0) return;
  const float_mode mode = flush_denormals();
  const fkda_span span = fkda_span_of(p, n);
  chunk_buffers b;
  place_buffers(&b, scratch, p->K, job->v_end - job->v_begin);
  b.exp_A = exp_A_of(p, job->head);
  load_bias(b.bias, p, job->head, b.Kp);
  if (job->identity)
    identity_state(&b, job->v_begin);
  else if (has_initial_state(p, n))
    load_state(&b, &p->initial, p->layout,
               initial_slot * p->initial.stride_slot + job->head * p->initial.stride_head,
               job->v_begin);
  else
    clear_state(&b);

  int64_t next_checkpoint = store_checkpoints(&b, job, 0, span.length);
  for (int64_t t = 0; t < span.length; t += CHUNK) {
    const int64_t left = span.length - t, tokens = left < CHUNK ? left : CHUNK;
    run_chunk(&b, job, &span, t, tokens);
    if (t + tokens >= next_checkpoint)
      next_checkpoint = store_checkpoints(&b, job, t + tokens, span.length);
  }
  if (p->final.data)
    store_state(&b, &p->final, p->layout,
                final_slot * p->final.stride_slot + job->head * p->final.stride_head, job->v_begin);
  restore_denormals(mode);
}
