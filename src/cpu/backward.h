/* Gradients on the CPU: the chunk form (22)-(28), written once over the vector shims, after chunk.h.
 *
 * A job is one sequence and head of q and k, with all value heads that read it, one after the other, so
 * that the sums over a group have an order. A value head goes from its last chunk to its first, with the
 * gradient of the state in scratch all along. The state before each chunk is made again: first, once
 * through the sequence, one state every `segment` chunks (unless the prefill has kept them), then, one
 * segment at a time, one state for each of its chunks. So memory grows with the square root of the length.
 *
 *   per chunk of 16 tokens
 *     load      as in prefill, and the rows of d_out
 *     factors   as in prefill, and each decay by itself
 *     panels    (10) E and U, (22) dU, (23) dV by back substitution, (24) dM and dP, (25), (26)
 *     channels  (27), (28), a channel a lane; then (19)-(21) and the rows of the gradients
 *
 * Numerics. As in prefill exponents are differences G_i - G_j with i >= j, from an anchor where that is safe,
 * and both substitutions are f32. No two terms of (28) cancel by construction, so that gradients of strong
 * gates are as exact as those of weak ones. d_A_log and d_dt_bias are summed in double over chunks, then over
 * sequences in their order. Nothing depends on the number of threads.
 */
#define TRANSPOSED (3 * CHUNK) /* columns of X^K, X^Q and X^K- side by side */

typedef struct backward_buffers {
  chunk_buffers b;        /* state: the one that a replay carries along */
  int64_t size;           /* floats of a state */
  int64_t segment;        /* chunks whose states lie in `states` */
  float *marks;           /* [chunks/segment][size] states before each segment */
  float *states;          /* [segment][size] states before each chunk of one segment */
  float *d_state;         /* [size] */
  float *k, *q;           /* [16][Kp] (1): normalised, q times scale */
  float *from_start;      /* [16][Kp] e^{G_i} */
  float *to_end;          /* [16][Kp] e^{G_C - G_i} */
  float *after;           /* [16][Kp] e^{G_i - m}; pair by pair: g_i */
  float *before;          /* [16][Kp] e^{m - G_i}; pair by pair: unused */
  float *d_out;           /* [16][Vp] */
  float *E, *U;           /* [16][PANEL] */
  float *R;               /* [32][PANEL] -dV, dO */
  float *R_t;             /* [PANEL][32] the same, transposed */
  float *U_t;             /* [PANEL][16] */
  float *X_t;             /* [Kp][48] (25) -dV S, dO S, U dS, transposed */
  float *overlap;         /* [Kp][LANES] sum_v S dS of (28), before its last sum */
  float *triangles;       /* [32][16] (24) dM, dP: whole squares */
  float *d_beta;          /* [16][LANES] (23), before its last sum */
  float *d_q, *d_k, *d_g; /* [16][Kp] (27), (28) */
  float *sum_bias;        /* [Kp] of one chunk */
  float *sum_q, *sum_k;   /* [T][Kp] over a group's value heads */
} backward_buffers;

static int64_t chunks_of(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

/* 2 sqrt(chunks) states in memory at a time; short sequences are replayed once only. */
static int64_t segment_of(int64_t chunks) {
  int64_t segment = 32;
  while (segment * segment < chunks) ++segment;
  return segment < chunks ? segment : chunks > 0 ? chunks : 1;
}

/* Sizing and placing are one walk: base NULL gives the size. `length` bounds every sequence. */
static size_t place_backward(backward_buffers *x, char *base, const fkda_problem *p,
                             int64_t length) {
  size_t offset = place_buffers(&x->b, base, p->K, p->V, round_up(p->V, PANEL));
  const int64_t Kp = x->b.Kp, Vp = x->b.Vp, chunks = chunks_of(length);
  x->size = Kp * Vp;
  x->segment = segment_of(chunks);
#define PLACE(field, count)                                                                        \
  do {                                                                                             \
    x->field = base ? (float *)(void *)(base + offset) : NULL;                                     \
    offset += (size_t)round_up((count) * (int64_t)sizeof(float), 64);                              \
  } while (0)
  PLACE(states, x->segment * x->size);
  PLACE(marks, chunks > x->segment ? (chunks / x->segment + 1) * x->size : 0);
  PLACE(d_state, x->size);
  PLACE(b.state, x->size);
  PLACE(k, CHUNK * Kp);
  PLACE(q, CHUNK * Kp);
  PLACE(from_start, CHUNK * Kp);
  PLACE(to_end, CHUNK * Kp);
  PLACE(after, CHUNK * Kp);
  PLACE(before, CHUNK * Kp);
  PLACE(d_out, CHUNK * Vp);
  PLACE(E, CHUNK * PANEL);
  PLACE(U, CHUNK * PANEL);
  PLACE(R, 2 * CHUNK * PANEL);
  PLACE(R_t, 2 * CHUNK * PANEL);
  PLACE(U_t, CHUNK * PANEL);
  PLACE(X_t, TRANSPOSED * Kp);
  PLACE(overlap, LANES * Kp);
  PLACE(triangles, 2 * CHUNK * CHUNK);
  PLACE(d_beta, CHUNK * LANES);
  PLACE(d_q, CHUNK * Kp);
  PLACE(d_k, CHUNK * Kp);
  PLACE(d_g, CHUNK * Kp);
  PLACE(sum_bias, Kp);
  /* Used where HV > H. Counted from HV alone: a size must not shrink where H grows. Pages that nobody
   * touches cost nothing. */
  PLACE(sum_q, p->HV > 1 ? length * Kp : 0);
  PLACE(sum_k, p->HV > 1 ? length * Kp : 0);
#undef PLACE
  return offset;
}

static size_t backward_scratch(const fkda_problem *p) {
  backward_buffers x;
  return place_backward(&x, NULL, p, p->T);
}

/* ---- products ------------------------------------------------------------------------------------ */

/* to[m][n] = sum_s a[m*a_row + s*a_step] b[s*b_step + n], added to what is there with `add`. columns is a
 * multiple of LANES, rows one of TILE_ROWS; both, and add, are constants where this is inlined. */
INLINE void product(float *to, int64_t to_row, bool add, int64_t rows, int64_t columns,
                    const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step,
                    int64_t steps) {
  for (int64_t m0 = 0; m0 < rows; m0 += TILE_ROWS)
    for (int64_t n0 = 0; n0 < columns;) {
      const int vectors = columns - n0 >= PANEL ? TILE_VECTORS : 1;
      float *tile = to + m0 * to_row + n0;
      vec acc[TILE_ROWS][TILE_VECTORS];
      for (int m = 0; m < TILE_ROWS; ++m)
        for (int n = 0; n < TILE_VECTORS; ++n)
          acc[m][n] = add && n < vectors ? v_load(tile + m * to_row + n * LANES) : v_set(0);
      if (vectors == TILE_VECTORS)
        multiply_tile(acc, TILE_VECTORS, a + m0 * a_row, a_row, a_step, b + n0, b_step, steps);
      else
        multiply_tile(acc, 1, a + m0 * a_row, a_row, a_step, b + n0, b_step, steps);
      for (int m = 0; m < TILE_ROWS; ++m)
        for (int n = 0; n < vectors; ++n) v_store(tile + m * to_row + n * LANES, acc[m][n]);
      n0 += vectors * LANES;
    }
}

/* to[k][v] = from[k][v] decay[k] + sum_s a[s][k] b[s][v], of one panel; to and from may be the same. */
INLINE void carry_panel(float *to, const float *from, const float *decay, int64_t Kp,
                        const float *a, const float *b, int64_t steps) {
  for (int64_t k = 0; k < Kp; k += TILE_ROWS) {
    vec acc[TILE_ROWS][TILE_VECTORS];
    for (int m = 0; m < TILE_ROWS; ++m)
      for (int n = 0; n < TILE_VECTORS; ++n)
        acc[m][n] = v_mul(v_set(decay[k + m]), v_load(from + (k + m) * PANEL + n * LANES));
    multiply_tile(acc, TILE_VECTORS, a + k, 1, Kp, b, PANEL, steps);
    for (int m = 0; m < TILE_ROWS; ++m)
      for (int n = 0; n < TILE_VECTORS; ++n) v_store(to + (k + m) * PANEL + n * LANES, acc[m][n]);
  }
}

/* to[n][m] = from[m][n]; rows and columns are multiples of LANES. */
static void transpose(float *to, int64_t to_row, const float *from, int64_t from_row, int64_t rows,
                      int64_t columns) {
  for (int64_t m = 0; m < rows; m += LANES)
    for (int64_t n = 0; n < columns; n += LANES) {
      vec t[LANES];
      for (int i = 0; i < LANES; ++i) t[i] = v_load(from + (m + i) * from_row + n);
      v_transpose(t);
      for (int i = 0; i < LANES; ++i) v_store(to + (n + i) * to_row + m, t[i]);
    }
}

/* ---- one chunk: factors --------------------------------------------------------------------------- */

/* (1) applied, and the decays (8) is made of, from what accumulate_gates() has left. */
static void keep_decays(backward_buffers *x, bool anchored) {
  const chunk_buffers *b = &x->b;
  const int64_t Kp = b->Kp;
  for (int64_t k = 0; k < Kp; k += LANES) {
    const vec m = v_load(b->own.k_bar + (CHUNK / 2 - 1) * Kp + k);
    const vec start = v_exp(m), end = v_exp(v_sub(v_load(b->own.k_bar + (CHUNK - 1) * Kp + k), m));
    vec left = v_set(0); /* G_C - G_i */
    for (int64_t c = CHUNK - 1; c >= 0; --c) {
      const int64_t at = c * Kp + k;
      v_store(x->k + at, v_mul(v_load(b->anchored + at), v_set(b->norm_k[c])));
      v_store(x->q + at, v_mul(v_load(b->anchored + CHUNK * Kp + at), v_set(b->norm_q[c])));
      if (anchored) {
        const vec decay = v_exp_in_range(v_sub(v_load(b->own.k_bar + at), m));
        const vec inverse = v_reciprocal(decay);
        v_store(x->after + at, decay);
        v_store(x->before + at, inverse);
        v_store(x->from_start + at, v_mul(decay, start));
        v_store(x->to_end + at, v_mul(inverse, end));
      } else {
        const vec g = v_load(b->own.decayed + at);
        v_store(x->after + at, g);
        v_store(x->from_start + at, v_exp(v_load(b->own.k_bar + at)));
        v_store(x->to_end + at, v_exp(left));
        left = v_add(left, g);
      }
    }
  }
}

/* Loads a chunk and makes (8) and M, P of (9). Returns whether the anchor is safe. */
static bool make_factors(backward_buffers *x, const fkda_cpu_job *job, const fkda_span *span,
                         int64_t t, int64_t tokens, bool keep) {
  chunk_buffers *b = &x->b;
  chunk_factors *f = &b->own;
  load_chunk(b, f, job, span, t, tokens);
  load_values(b, job, span, t, tokens);
  const bool anchored = accumulate_gates(b, f, job->problem, tokens);
  if (keep) keep_decays(x, anchored);
  if (anchored) {
    decay_factors_anchored(b, f);
    triangles_anchored(b, f);
  } else {
    factors_pairwise(b, f);
  }
  return anchored;
}

/* (10) as e_i = v_i - x_i - sum_{j<i} M_ij u_j, u_i = beta_i e_i, for one vector of value columns. */
INLINE void substitute_differences(const backward_buffers *x, const float *values, int64_t column) {
  const chunk_buffers *b = &x->b;
  vec e[CHUNK];
#pragma GCC unroll 16
  for (int i = 0; i < CHUNK; ++i)
    e[i] = v_sub(v_load(values + i * b->Vp), v_load(b->X + i * PANEL + column));
#pragma GCC unroll 16
  for (int j = 0; j < CHUNK; ++j) {
    const vec u = v_mul(v_set(b->own.beta[j]), e[j]);
    v_store(x->E + j * PANEL + column, e[j]);
    v_store(x->U + j * PANEL + column, u);
#pragma GCC unroll 16
    for (int i = j + 1; i < CHUNK; ++i)
      e[i] = v_fnma(v_set(b->own.triangles[i * CHUNK + j]), u, e[i]);
  }
}

/* X = K~ S^T of one panel, then E and U. */
static void differences(const backward_buffers *x, const float *panel, int64_t v) {
  const chunk_buffers *b = &x->b;
  product(b->X, PANEL, false, CHUNK, PANEL, b->own.decayed, b->Kp, 1, panel, PANEL, b->Kp);
  for (int64_t column = 0; column < PANEL; column += LANES)
    substitute_differences(x, b->values + v + column, column);
}

/* ---- states again ---------------------------------------------------------------------------------- */

/* The state before token t to `to`, if the prefill has kept it. */
static bool load_kept(const backward_buffers *x, const fkda_cpu_job *job, int64_t t, float *to) {
  const fkda_checkpoints *c = &job->problem->checkpoints;
  if (c->mode != FKDA_CHECKPOINT_EVERY || t % c->every) return false;
  chunk_buffers b = x->b;
  b.state = to;
  load_state(&b, &c->state, job->problem->layout,
             (job->checkpoint_row + t / c->every) * c->state.stride_slot +
                 job->head * c->state.stride_head,
             0);
  return true;
}

/* The state before chunk c + 1 from the one before chunk c, as prefill computes it, to the bit; the same memory is
 * allowed. */
static void step_chunk(backward_buffers *x, const fkda_cpu_job *without_q, const fkda_span *span,
                       int64_t c, const float *from, float *to) {
  const chunk_buffers *b = &x->b;
  const int64_t t = c * CHUNK, left = span->length - t;
  if (load_kept(x, without_q, t + CHUNK, to)) return;
  make_factors(x, without_q, span, t, left < CHUNK ? left : CHUNK, false);
  scale_triangle(&x->b.own);
  for (int64_t v = 0; v < b->Vp; v += PANEL) {
    const int64_t at = v * b->Kp;
    read_state(b, &b->own, from + at, TILE_VECTORS, CHUNK);
    for (int64_t column = 0; column < PANEL; column += LANES)
      substitute(b, &b->own, b->values + v + column, column, PANEL, false);
    carry_panel(to + at, from + at, b->own.total_decay, b->Kp, b->own.k_bar, b->U,
                CHUNK); /* (12) */
  }
}

/* ---- one chunk: panels ------------------------------------------------------------------------------- */

/* (22) from Y = K- dS^T in X, (23): dw_j = du_j - sum_{i>j} M_ij dv_i, dv_j = beta_j dw_j, right-looking, for one
 * vector of value columns. `values` receives dV, R -dV and dO. */
INLINE void substitute_back(const backward_buffers *x, float *values, const float *d_out,
                            int64_t column) {
  const chunk_buffers *b = &x->b;
  const float *M = b->own.triangles, *P = b->own.triangles + CHUNK * CHUNK;
  vec du[CHUNK];
#pragma GCC unroll 16
  for (int j = 0; j < CHUNK; ++j) du[j] = v_load(b->X + j * PANEL + column);
#pragma GCC unroll 16
  for (int i = 0; i < CHUNK; ++i) {
    const vec o = v_load(d_out + i * b->Vp);
    v_store(x->R + (CHUNK + i) * PANEL + column, o);
#pragma GCC unroll 16
    for (int j = 0; j <= i; ++j) du[j] = v_fma(v_set(P[i * CHUNK + j]), o, du[j]);
  }
#pragma GCC unroll 16
  for (int j = CHUNK - 1; j >= 0; --j) {
    const vec dv = v_mul(v_set(b->own.beta[j]), du[j]);
    float *d_beta = x->d_beta + j * LANES;
    v_store(d_beta, v_fma(du[j], v_load(x->E + j * PANEL + column), v_load(d_beta)));
    v_store(values + j * b->Vp, dv);
    v_store(x->R + j * PANEL + column, v_sub(v_set(0), dv));
#pragma GCC unroll 16
    for (int i = 0; i < j; ++i) du[i] = v_fnma(v_set(M[j * CHUNK + i]), dv, du[i]);
  }
}

/* What of a chunk is wanted beyond dV and the gradient of the state. */
typedef struct wanted {
  bool states; /* beta, or below */
  bool keys;   /* q, k, or below */
  bool gates;  /* g, A_log, dt_bias */
} wanted;

static void panel_back(const backward_buffers *x, const wanted *w, const float *S, float *dS,
                       int64_t v) {
  const chunk_buffers *b = &x->b;
  const int64_t Kp = b->Kp;
  if (w->states) differences(x, S, v);
  product(b->X, PANEL, false, CHUNK, PANEL, b->own.k_bar, Kp, 1, dS, PANEL, Kp);
  for (int64_t column = 0; column < PANEL; column += LANES)
    substitute_back(x, b->values + v + column, x->d_out + v + column, column);
  if (w->keys) {
    transpose(x->R_t, 2 * CHUNK, x->R, PANEL, 2 * CHUNK, PANEL);
    transpose(x->U_t, CHUNK, x->U, PANEL, CHUNK, PANEL);
    /* (24), whole squares */
    product(x->triangles, CHUNK, true, 2 * CHUNK, CHUNK, x->R, PANEL, 1, x->U_t, CHUNK, PANEL);
    /* (25) */
    product(x->X_t, TRANSPOSED, true, Kp, 2 * CHUNK, S, PANEL, 1, x->R_t, 2 * CHUNK, PANEL);
    product(x->X_t + 2 * CHUNK, TRANSPOSED, true, Kp, CHUNK, dS, PANEL, 1, x->U_t, CHUNK, PANEL);
  }
  if (w->gates) /* the last term of (28) */
    for (int64_t k = 0; k < Kp; ++k) {
      vec sum = v_load(x->overlap + k * LANES);
      for (int64_t n = 0; n < PANEL; n += LANES)
        sum = v_fma(v_load(S + k * PANEL + n), v_load(dS + k * PANEL + n), sum);
      v_store(x->overlap + k * LANES, sum);
    }
  carry_panel(dS, dS, b->own.total_decay, Kp, b->own.decayed, x->R, 2 * CHUNK); /* (26) */
}

/* ---- one chunk: channels ------------------------------------------------------------------------------ */

/* [LANES channels][CHUNK] of X_t to a vector of channels for each token. */
INLINE void load_transposed(vec to[CHUNK], const float *from) {
  for (int c = 0; c < CHUNK; c += LANES) {
    for (int i = 0; i < LANES; ++i) to[c + i] = v_load(from + i * TRANSPOSED + c);
    v_transpose(to + c);
  }
}

/* The sums of LANES rows of LANES floats. */
INLINE vec row_sums(const float *rows) {
  vec t[LANES];
  for (int i = 0; i < LANES; ++i) t[i] = v_load(rows + i * LANES);
  v_transpose(t);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) t[i] = v_add(t[i], t[i + width]);
  return t[0];
}

/* (27) and (28) for one vector of channels. */
INLINE void channels_back_as(const backward_buffers *x, int64_t k, bool anchored) {
  const chunk_buffers *b = &x->b;
  const int64_t Kp = b->Kp;
  const float *dM = x->triangles, *dP = x->triangles + CHUNK * CHUNK;
  vec XK[CHUNK], XQ[CHUNK], XE[CHUNK], dg[CHUNK], from_later[CHUNK];
  load_transposed(XK, x->X_t + k * TRANSPOSED);
  load_transposed(XQ, x->X_t + k * TRANSPOSED + CHUNK);
  load_transposed(XE, x->X_t + k * TRANSPOSED + 2 * CHUNK);

  /* to the chunk's end from every token, and from its start: all tokens' decays lie between */
  vec sum = v_mul(v_load(b->own.total_decay + k), row_sums(x->overlap + k * LANES));
  for (int i = CHUNK - 1; i >= 0; --i) {
    const int64_t at = i * Kp + k;
    const vec kn = v_load(x->k + at), start = v_load(x->from_start + at);
    const vec end = v_load(x->to_end + at);
    XK[i] = v_mul(XK[i], start);
    XQ[i] = v_mul(XQ[i], start);
    sum = v_fma(v_load(x->q + at), XQ[i], v_fma(kn, XK[i], sum));
    dg[i] = sum;
    XE[i] = v_mul(XE[i], end);
    from_later[i] = XE[i];
  }
  sum = v_set(0);
  for (int j = 0; j < CHUNK; ++j) {
    dg[j] = v_add(dg[j], sum);
    sum = v_fma(v_load(x->k + j * Kp + k), XE[j], sum);
  }

  for (int i = 0; i < CHUNK; ++i) {
    const vec ki = v_load(x->k + i * Kp + k), qi = v_load(x->q + i * Kp + k);
    const float *dM_i = dM + i * CHUNK, *dP_i = dP + i * CHUNK;
    vec decay[CHUNK]; /* e^{G_i - G_j}; unused without anchor for j = i */
    if (anchored) {
      const vec after = v_load(x->after + i * Kp + k);
      for (int j = 0; j < i; ++j) decay[j] = v_mul(after, v_load(x->before + j * Kp + k));
    } else {
      vec between = v_set(0);
      for (int j = i - 1; j >= 0; --j) {
        between = v_add(between, v_load(x->after + (j + 1) * Kp + k));
        decay[j] = v_exp(between);
      }
    }
    vec p = v_set(0), m = v_set(0);
    for (int j = 0; j < i; ++j) {
      const vec P = v_set(dP_i[j]), M = v_set(dM_i[j]);
      const vec kj = v_mul(v_load(x->k + j * Kp + k), decay[j]);
      p = v_fma(P, kj, p);
      m = v_fma(M, kj, m);
      dg[j + 1] = v_fma(qi, p, v_fma(ki, m, dg[j + 1])); /* the pairs of i with 0..j */
      from_later[j] = v_fma(decay[j], v_fma(P, qi, v_mul(M, ki)), from_later[j]);
    }
    const vec P = v_set(dP_i[i]);
    v_store(x->d_q + i * Kp + k, v_fma(P, ki, v_add(XQ[i], p)));
    from_later[i] = v_fma(P, qi, from_later[i]);
    v_store(x->d_k + i * Kp + k, v_add(XK[i], m)); /* as the later of two keys */
  }
  for (int i = 0; i < CHUNK; ++i) {
    float *d_k = x->d_k + i * Kp + k;
    v_store(d_k, v_add(v_load(d_k), from_later[i]));
    v_store(x->d_g + i * Kp + k, dg[i]);
  }
}

static void channels_back(const backward_buffers *x, bool anchored) {
  for (int64_t k = 0; k < x->b.Kp; k += LANES)
    if (anchored)
      channels_back_as(x, k, true);
    else
      channels_back_as(x, k, false);
}

/* (19) of a row. `factor` is the one of (1), scale included for q; row its product with the raw one. */
static void normalise_back(float *d, const float *row, int64_t Kp, float factor, float scale) {
  vec sum = v_set(0);
  for (int64_t k = 0; k < Kp; k += LANES) sum = v_fma(v_load(d + k), v_load(row + k), sum);
  const vec along = v_set(v_sum(sum) / scale / scale), by = v_set(factor);
  for (int64_t k = 0; k < Kp; k += LANES)
    v_store(d + k, v_mul(by, v_fnma(along, v_load(row + k), v_load(d + k))));
}

/* s(x) s(-x) of the logistic function s, without cancellation: e^-|x| / (1 + e^-|x|)^2. */
INLINE vec v_sigmoid_slope(vec x) {
  const vec y = v_exp(v_sub(v_set(0), v_abs(x)));
  const vec r = v_reciprocal(v_add(v_set(1), y));
  return v_mul(y, v_mul(r, r));
}

/* (20) for one vector of channels: dg becomes the gradient by the raw gate; returns what A_log gets. */
INLINE vec log_decay_back(fkda_gate gate, vec raw, vec bias, vec exp_A, vec lower_bound, vec *dg) {
  const vec y = v_add(raw, bias), zero = v_set(0), clamp = v_set((float)FKDA_GATE_CLAMP);
  if (gate == FKDA_GATE_BOUNDED) {
    const vec slope = v_mul(v_mul(lower_bound, exp_A), v_sigmoid_slope(v_mul(exp_A, y)));
    *dg = v_mul(*dg, slope);
    return v_mul(*dg, y);
  }
  if (gate == FKDA_GATE_SOFTPLUS) {
    const vec g = v_sub(zero, v_mul(exp_A, v_softplus(y)));
    const vec inside = v_unless_below(g, clamp, *dg);
    *dg = v_sub(zero, v_mul(inside, v_mul(exp_A, v_sigmoid(y))));
    return v_mul(inside, g);
  }
  *dg = v_unless_below(raw, clamp, v_unless_below(v_sub(zero, raw), zero, *dg));
  return zero;
}

/* (20) of a chunk: d_g by the raw gate in place; parts of d_A_log and d_dt_bias to d_gate [1 + K]. */
INLINE void gates_back_as(const backward_buffers *x, const fkda_cpu_job *job, const fkda_span *span,
                          int64_t t, int64_t tokens, double *d_gate, fkda_gate gate) {
  const fkda_problem *p = job->problem;
  const chunk_buffers *b = &x->b;
  const vec exp_A = v_set(b->exp_A), lower_bound = v_set((float)p->lower_bound);
  vec sum_A = v_set(0);
  for (int64_t k = 0; k < b->Kp; k += LANES) v_store(x->sum_bias + k, v_set(0));
  for (int64_t c = 0; c < tokens; ++c) {
    float *raw = b->block, *d_g = x->d_g + c * b->Kp;
    load_row(raw, p->g.data, p->g.dtype, row_offset(&p->g, span, t + c, job->head), b->K, b->Kp);
    for (int64_t k = 0; k < b->Kp; k += LANES) {
      vec dg = v_load(d_g + k);
      const vec dA =
          log_decay_back(gate, v_load(raw + k), v_load(b->bias + k), exp_A, lower_bound, &dg);
      v_store(d_g + k, dg);
      v_store(x->sum_bias + k, v_add(v_load(x->sum_bias + k), dg));
      sum_A = v_add(sum_A, dA);
    }
  }
  d_gate[0] += (double)v_sum(sum_A);
  for (int64_t k = 0; k < b->K; ++k) d_gate[1 + k] += (double)x->sum_bias[k];
}

static void gates_back(const backward_buffers *x, const fkda_cpu_job *job, const fkda_span *span,
                       int64_t t, int64_t tokens, double *d_gate) {
  switch (job->problem->gate) {
    case FKDA_GATE_BOUNDED:
      gates_back_as(x, job, span, t, tokens, d_gate, FKDA_GATE_BOUNDED);
      break;
    case FKDA_GATE_SOFTPLUS:
      gates_back_as(x, job, span, t, tokens, d_gate, FKDA_GATE_SOFTPLUS);
      break;
    default: gates_back_as(x, job, span, t, tokens, d_gate, FKDA_GATE_DIRECT); break;
  }
}

/* (21) for the chunk's tokens. */
static void beta_back(const backward_buffers *x, const fkda_cpu_job *job, const fkda_span *span,
                      int64_t t, int64_t tokens) {
  const fkda_problem *p = job->problem;
  float logit[CHUNK] = {0}, d[CHUNK];
  for (int c = 0; c < CHUNK; c += LANES) v_store(d + c, row_sums(x->d_beta + c * LANES));
  if (p->beta_is_logit) {
    const vec factor = v_set(p->allow_neg_eigval ? 2 : 1);
    for (int64_t c = 0; c < tokens; ++c)
      logit[c] =
          load_scalar(p->beta.data, p->beta.dtype, row_offset(&p->beta, span, t + c, job->head));
    for (int c = 0; c < CHUNK; c += LANES)
      v_store(d + c, v_mul(v_load(d + c), v_mul(factor, v_sigmoid_slope(v_load(logit + c)))));
  }
  for (int64_t c = 0; c < tokens; ++c)
    store_scalar(p->d_beta.data, p->d_beta.dtype, row_offset(&p->d_beta, span, t + c, job->head),
                 d[c]);
}

/* Row c of d_q or d_k: over a group, the sum of its value heads, in their order. */
static void store_grouped(const fkda_rows *to, const fkda_cpu_job *job, const fkda_span *span,
                          int64_t t, int64_t tokens, float *rows, float *sums, int64_t Kp) {
  const fkda_problem *p = job->problem;
  const int64_t group = p->HV / p->H, member = job->head % group;
  if (!to->data) return;
  for (int64_t c = 0; c < tokens; ++c) {
    float *row = rows + c * Kp;
    if (group > 1) {
      float *sum = sums + (t + c) * Kp;
      for (int64_t k = 0; k < Kp; k += LANES)
        v_store(sum + k, member ? v_add(v_load(sum + k), v_load(row + k)) : v_load(row + k));
      row = sum;
    }
    if (member == group - 1)
      store_row(to->data, to->dtype, row_offset(to, span, t + c, job->head / group), row, p->K);
  }
}

/* ---- one chunk ---------------------------------------------------------------------------------------- */

static void clear(float *at, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) v_store(at + i, v_set(0));
}

/* S: the state before the chunk. x->d_state: by the state after it, on return by S. */
static void chunk_back(backward_buffers *x, const fkda_cpu_job *job, const fkda_span *span,
                       int64_t t, int64_t tokens, const wanted *w, const float *S, double *d_gate) {
  const fkda_problem *p = job->problem;
  const chunk_buffers *b = &x->b;
  const bool anchored = make_factors(x, job, span, t, tokens, w->keys);
  load_rows(x->d_out, b->Vp, &p->d_out, span, t, job->head, 0, tokens, b->V);
  clear(x->d_beta, CHUNK * LANES);
  if (w->keys) {
    clear(x->triangles, 2 * CHUNK * CHUNK);
    clear(x->X_t, TRANSPOSED * b->Kp);
    clear(x->overlap, LANES * b->Kp);
  }
  for (int64_t v = 0; v < b->Vp; v += PANEL)
    panel_back(x, w, S + v * b->Kp, x->d_state + v * b->Kp, v);

  if (p->d_v.data) store_rows(&p->d_v, span, t, job->head, 0, b->values, b->Vp, tokens, b->V);
  if (p->d_beta.data) beta_back(x, job, span, t, tokens);
  if (!w->keys) return;
  channels_back(x, anchored);
  for (int64_t c = 0; c < tokens; ++c) {
    float *d_q = x->d_q + c * b->Kp, *d_k = x->d_k + c * b->Kp;
    if (p->l2norm) {
      normalise_back(d_q, x->q + c * b->Kp, b->Kp, b->norm_q[c], (float)p->scale);
      normalise_back(d_k, x->k + c * b->Kp, b->Kp, b->norm_k[c], 1);
    } else {
      for (int64_t k = 0; k < b->Kp; k += LANES)
        v_store(d_q + k, v_mul(v_load(d_q + k), v_set(b->norm_q[c])));
    }
  }
  store_grouped(&p->d_q, job, span, t, tokens, x->d_q, x->sum_q, b->Kp);
  store_grouped(&p->d_k, job, span, t, tokens, x->d_k, x->sum_k, b->Kp);
  if (!w->gates) return;
  gates_back(x, job, span, t, tokens, d_gate);
  if (p->d_g.data) store_rows(&p->d_g, span, t, job->head, 0, x->d_g, b->Kp, tokens, b->K);
}

/* ---- one sequence and value head ---------------------------------------------------------------------- */

/* The state before each segment: one pass over the sequence. */
static void mark_segments(backward_buffers *x, const fkda_cpu_job *without_q,
                          const fkda_span *span) {
  const int64_t segment = x->segment, last = (chunks_of(span->length) - 1) / segment;
  for (int64_t s = 0; s < last; ++s) {
    const float *from = x->marks + s * x->size;
    for (int64_t c = s * segment; c < (s + 1) * segment; ++c) {
      float *to = c + 1 == (s + 1) * segment ? x->marks + (s + 1) * x->size : x->b.state;
      step_chunk(x, without_q, span, c, from, to);
      from = to;
    }
  }
}

static void load_begin(backward_buffers *x, const fkda_cpu_job *job, float *to) {
  const fkda_problem *p = job->problem;
  chunk_buffers b = x->b;
  b.state = to;
  if (load_kept(x, job, 0, to)) return;
  if (has_initial_state(p, job->n))
    load_state(&b, &p->initial, p->layout,
               job->n * p->initial.stride_slot + job->head * p->initial.stride_head, 0);
  else
    clear_state(&b);
}

static void head_back(backward_buffers *x, const fkda_cpu_job *job, const fkda_span *span,
                      const wanted *w, double *d_gate) {
  const fkda_problem *p = job->problem;
  fkda_problem keys = *p; /* what a replay reads: no queries */
  fkda_cpu_job without_q = *job;
  keys.q = (fkda_rows){0};
  without_q.problem = &keys;
  x->b.exp_A = exp_A_of(p, job->head);
  load_bias(x->b.bias, p, job->head, x->b.Kp);

  chunk_buffers b = x->b;
  b.state = x->d_state;
  if (p->d_final.data)
    load_state(&b, &p->d_final, p->layout,
               job->n * p->d_final.stride_slot + job->head * p->d_final.stride_head, 0);
  else
    clear_state(&b);

  const int64_t chunks = chunks_of(span->length), last = (chunks - 1) / x->segment;
  if (w->states && chunks > 0) {
    load_begin(x, job, last ? x->marks : x->states);
    if (last) mark_segments(x, &without_q, span);
  }
  for (int64_t s = chunks > 0 ? last : -1; s >= 0; --s) {
    const int64_t first = s * x->segment;
    const int64_t end = first + x->segment < chunks ? first + x->segment : chunks;
    if (w->states) {
      if (last) memcpy(x->states, x->marks + s * x->size, (size_t)x->size * sizeof(float));
      for (int64_t c = first; c + 1 < end; ++c)
        step_chunk(x, &without_q, span, c, x->states + (c - first) * x->size,
                   x->states + (c + 1 - first) * x->size);
    }
    for (int64_t c = end - 1; c >= first; --c) {
      const int64_t t = c * CHUNK, left = span->length - t;
      chunk_back(x, job, span, t, left < CHUNK ? left : CHUNK, w, x->states + (c - first) * x->size,
                 d_gate);
    }
  }
  if (p->d_initial.data)
    store_state(&b, &p->d_initial, p->layout,
                job->n * p->d_initial.stride_slot + job->head * p->d_initial.stride_head, 0);
}

/* job->head is a head of q and k; d_gate [HV][1 + K] are this sequence's parts of d_A_log and d_dt_bias. */
static void backward(const fkda_cpu_job *job, void *scratch, double *d_gate) {
  const fkda_problem *p = job->problem;
  const fkda_span span = fkda_span_of(p, job->n);
  const int64_t group = p->HV / p->H;
  const float_mode mode = flush_denormals();
  wanted w;
  w.gates = p->d_g.data || p->d_A_log.data || p->d_dt_bias.data;
  w.keys = w.gates || p->d_q.data || p->d_k.data;
  w.states = w.keys || p->d_beta.data;
  backward_buffers x;
  place_backward(&x, scratch, p, p->T);
  if (!w.states) clear(x.E, CHUNK * PANEL); /* read, if in vain */
  for (int64_t i = 0; i < group; ++i) {
    fkda_cpu_job of_value = *job;
    of_value.head = job->head * group + i;
    of_value.v_begin = 0;
    of_value.v_end = p->V;
    head_back(&x, &of_value, &span, &w, d_gate + of_value.head * (1 + p->K));
  }
  restore_denormals(mode);
}
