/* The reference: equations (1)-(7) of docs/math.md and their adjoint (13)-(21), token by token, in double
 * precision.
 *
 * This file is the executable definition of the library. Every other backend is tested against it,
 * so it is written to be read, not to be fast. It goes from the mathematics of one token, over the
 * places of a head's data in memory, to one sequence and head, to a whole call.
 *
 * A head's state S is held in double for the whole sequence and rounded only where it is stored. In
 * here it lies as S[k][v] whatever the layout outside, so that the inner loops run over value
 * channels, which do not mix: they vectorise as they stand, and every sum over k is taken in order.
 */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "check/problem.h"
#include "cpu/convert.h"
#include "cpu/pool.h"
#include "run/backend.h"

/* ---- one token ------------------------------------------------------------------------------- */

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

/* log(1 + e^x) without overflow. */
static double softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }

/* (1) */
static void l2norm(double *x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
  const double factor = 1 / sqrt(sum + FKDA_L2NORM_EPS);
  for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

/* (2) and the clamp: a channel's log-decay. Comparisons are such that NaN stays NaN. */
static double log_decay(const fkda_problem *p, double raw, double exp_A, double bias) {
  double g = raw;
  if (p->gate == FKDA_GATE_BOUNDED) g = p->lower_bound * sigmoid(exp_A * (raw + bias));
  if (p->gate == FKDA_GATE_SOFTPLUS) g = -exp_A * softplus(raw + bias);
  return g < FKDA_GATE_CLAMP ? FKDA_GATE_CLAMP : g > 0 ? 0 : g;
}

/* (3). What is given as beta itself is used as it is: the factor 2 belongs to the sigmoid. */
static double activate_beta(const fkda_problem *p, double beta) {
  if (!p->beta_is_logit) return beta;
  return sigmoid(beta) * (p->allow_neg_eigval ? 2 : 1);
}

/* What a token brings to one head, activated; out is what (7) gives back. */
typedef struct token {
  double *q, *k, *decay; /* [K]; decay = exp g */
  double *v, *out;       /* [V] */
  double beta;
} token;

/* (4)-(7). S [K,V]; u [V] is scratch. */
static void step(double *restrict S, int64_t K, int64_t V, const token *x, double scale,
                 double *restrict u) {
  double *restrict out = x->out;
  for (int64_t v = 0; v < V; v++) u[v] = out[v] = 0;

  for (int64_t k = 0; k < K; k++) {
    const double decay = x->decay[k], key = x->k[k];
    double *restrict row = S + k * V;
    for (int64_t v = 0; v < V; v++) {
      row[v] *= decay; /* (4) S[v,k] = S[v,k] * exp(g[k]) */
      u[v] += row[v] * key;
    }
  }
  for (int64_t v = 0; v < V; v++) u[v] = x->beta * (x->v[v] - u[v]); /* (5) u = beta * (v - S k) */

  for (int64_t k = 0; k < K; k++) {
    const double q = x->q[k], key = x->k[k];
    double *restrict row = S + k * V;
    for (int64_t v = 0; v < V; v++) {
      row[v] += u[v] * key; /* (6) S[v,k] = S[v,k] + u[v] * k[k] */
      out[v] += row[v] * q;
    }
  }
  for (int64_t v = 0; v < V; v++) out[v] *= scale; /* (7) o = scale * S q */
}

/* ---- gradients of one token ------------------------------------------------------------------- */

/* By what a token brings to one head, activated; beta and decay as they enter (4)-(7). */
typedef struct token_gradient {
  double *q, *k, *g; /* [K]; g: by the log-decay */
  double *v;         /* [V] */
  double beta;
} token_gradient;

/* (13)-(18), the adjoint of step(). S [K,V]: the state before the token. dS [K,V]: on entry the gradient by
 * the state after it, on return by S. u, du [V] are scratch. */
static void step_back(const double *restrict S, double *restrict dS, int64_t K, int64_t V,
                      const token *x, const double *restrict d_out, double scale, token_gradient *d,
                      double *restrict u, double *restrict du) {
  double *restrict dv = d->v;
  for (int64_t v = 0; v < V; v++) u[v] = du[v] = 0;
  for (int64_t k = 0; k < K; k++) {
    const double decay = x->decay[k], key = x->k[k], query = scale * x->q[k];
    const double *restrict row = S + k * V;
    double *restrict d_row = dS + k * V;
    for (int64_t v = 0; v < V; v++) {
      u[v] += row[v] * decay * key;
      d_row[v] += query * d_out[v]; /* (13) dS = dS + scale * do q^T */
      du[v] += d_row[v] * key;      /* (14) du = dS k */
    }
  }
  d->beta = 0;
  for (int64_t v = 0; v < V; v++) {
    const double difference = x->v[v] - u[v]; /* v - S k of (5) */
    d->beta += du[v] * difference;            /* (15) dbeta = du . (v - S k) */
    dv[v] = x->beta * du[v];                  /* (15) dv = beta * du */
    u[v] = x->beta * difference;              /* (5) */
  }
  for (int64_t k = 0; k < K; k++) {
    const double decay = x->decay[k], key = x->k[k];
    const double *restrict row = S + k * V;
    double *restrict d_row = dS + k * V;
    double dq = 0, dk = 0, dg = 0;
    for (int64_t v = 0; v < V; v++) {
      const double s = row[v] * decay;          /* (4) */
      dq += (s + u[v] * key) * d_out[v];        /* (16) dq = scale * S^T do, S of (6) */
      dk += d_row[v] * u[v] - s * dv[v];        /* (17) dk = dS^T u - S^T dv, S of (4) */
      const double ds = d_row[v] - dv[v] * key; /* by S of (4): dS - dv k^T */
      dg += ds * s;                             /* (18) dg = sum_v dS * S, both of (4) */
      d_row[v] = ds * decay;                    /* by the state before: dS * diag(exp g) */
    }
    d->q[k] = scale * dq;
    d->k[k] = dk;
    d->g[k] = dg;
  }
}

/* (19) d by the normalised x becomes d by x itself. */
static void l2norm_back(const double *x, double *d, int64_t n) {
  double sum = 0, dot = 0;
  for (int64_t i = 0; i < n; i++) {
    sum += x[i] * x[i];
    dot += x[i] * d[i];
  }
  const double square = sum + FKDA_L2NORM_EPS, factor = 1 / sqrt(square);
  for (int64_t i = 0; i < n; i++) d[i] = factor * (d[i] - x[i] * dot / square);
}

/* (20) Of a channel: dg by the log-decay becomes d(raw) = d(bias), and *dA is what A_log gets. */
static double log_decay_back(const fkda_problem *p, double raw, double exp_A, double bias,
                             double dg, double *dA) {
  const double y = raw + bias;
  *dA = 0;
  if (p->gate == FKDA_GATE_BOUNDED) {
    const double x = exp_A * y, slope = p->lower_bound * sigmoid(x) * sigmoid(-x);
    *dA = dg * slope * x;
    return dg * slope * exp_A;
  }
  const double g = p->gate == FKDA_GATE_SOFTPLUS ? -exp_A * softplus(y) : raw;
  if (g < FKDA_GATE_CLAMP || g > 0) return 0;
  if (p->gate == FKDA_GATE_DIRECT) return dg;
  *dA = dg * g;
  return -dg * exp_A * sigmoid(y);
}

/* (21) */
static double beta_back(const fkda_problem *p, double logit, double d) {
  if (!p->beta_is_logit) return d;
  return d * sigmoid(logit) * sigmoid(-logit) * (p->allow_neg_eigval ? 2 : 1);
}

/* ---- a head's data in memory ----------------------------------------------------------------- */

/* One head of `states` at element `offset`: [V,K], or [K,V] for FKDA_STATE_KV. line is scratch. */
static void load_state(const fkda_states *states, int64_t offset, fkda_state_layout layout,
                       double *S, int64_t K, int64_t V, double *line) {
  if (layout == FKDA_STATE_KV) {
    for (int64_t k = 0; k < K; k++) {
      fkda_load_f64(S + k * V, states->data, states->dtype, offset + k * states->stride_row, V);
    }
    return;
  }
  for (int64_t v = 0; v < V; v++) {
    fkda_load_f64(line, states->data, states->dtype, offset + v * states->stride_row, K);
    for (int64_t k = 0; k < K; k++) S[k * V + v] = line[k];
  }
}

static void store_state(const fkda_states *states, int64_t offset, fkda_state_layout layout,
                        const double *S, int64_t K, int64_t V, double *line) {
  if (layout == FKDA_STATE_KV) {
    for (int64_t k = 0; k < K; k++) {
      fkda_store_f64(states->data, states->dtype, offset + k * states->stride_row, S + k * V, V);
    }
    return;
  }
  for (int64_t v = 0; v < V; v++) {
    for (int64_t k = 0; k < K; k++) line[k] = S[k * V + v];
    fkda_store_f64(states->data, states->dtype, offset + v * states->stride_row, line, K);
  }
}

static int64_t head_offset(const fkda_states *states, int64_t slot, int64_t h) {
  return slot * states->stride_slot + h * states->stride_head;
}

static int64_t row_offset(const fkda_rows *rows, int64_t b, int64_t t, int64_t h) {
  return b * rows->stride_b + t * rows->stride_t + h * rows->stride_h;
}

/* One worker's memory. */
typedef struct scratch {
  double *S;            /* [K,V], the state */
  double *M;            /* [K,K], summary: the state that starts from the identity */
  double *exp_A, *bias; /* [1], [K]: the head's gate parameters */
  double *line, *u;     /* [max(K,V)] */
  token x;              /* v and out [max(K,V)]: (4)-(7) run on the K rows of M too */
  /* backward: of tokens t0, t0 + stride, .. and of every token between two of these, the state before */
  double *marks, *between; /* [ceil(longest/stride)][K,V], [stride][K,V] */
  double *dS;              /* [K,V] */
  token_gradient d;
  double *du, *raw_g;      /* [V], [K] */
  double *dq_sum, *dk_sum; /* [longest][K]: over the group's value heads */
} scratch;

/* Tokens between two kept states: memory for 2 sqrt(T) of them instead of T. */
static int64_t mark_stride(int64_t length) {
  int64_t stride = 1;
  while (stride * stride < length) stride++;
  return stride;
}

static int64_t longest_sequence(const fkda_problem *p) {
  int64_t longest = 0;
  for (int64_t n = 0; n < p->N; n++) {
    const int64_t length = fkda_span_of(p, n).length;
    longest = length > longest ? length : longest;
  }
  return longest;
}

/* Lays `s` out from `base`; with base NULL it only counts. Returns the number of doubles. */
static size_t place_scratch(const fkda_problem *p, double *base, scratch *s) {
  const int64_t K = p->K, V = p->V, longest = K > V ? K : V;
  size_t used = 0;
#define PLACE(field, count) (s->field = base ? base + used : NULL, used += (size_t)(count))
  PLACE(S, K * V);
  PLACE(M, p->op == FKDA_OP_SUMMARY ? K * K : 0);
  PLACE(exp_A, 1);
  PLACE(bias, K);
  PLACE(line, longest);
  PLACE(u, longest);
  PLACE(x.q, K);
  PLACE(x.k, K);
  PLACE(x.decay, K);
  PLACE(x.v, longest);
  PLACE(x.out, longest);
  if (p->op == FKDA_OP_BACKWARD) {
    const int64_t tokens = longest_sequence(p), stride = mark_stride(tokens);
    PLACE(marks, (tokens / stride + 1) * K * V);
    PLACE(between, stride * K * V);
    PLACE(dS, K * V);
    PLACE(d.q, K);
    PLACE(d.k, K);
    PLACE(d.g, K);
    PLACE(d.v, V);
    PLACE(du, V);
    PLACE(raw_g, K);
    PLACE(dq_sum, tokens * K);
    PLACE(dk_sum, tokens * K);
  }
#undef PLACE
  return used;
}

/* A_log and dt_bias of value head h. Absent means 0. */
static void load_gate(const fkda_problem *p, int64_t h, scratch *s) {
  double A_log = 0;
  if (p->A_log.data) fkda_load_f64(&A_log, p->A_log.data, p->A_log.dtype, h, 1);
  *s->exp_A = exp(A_log);
  for (int64_t k = 0; k < p->K; k++) s->bias[k] = 0;
  if (p->dt_bias.data) fkda_load_f64(s->bias, p->dt_bias.data, p->dt_bias.dtype, h * p->K, p->K);
}

/* Reads and activates token t of value head h: equations (1)-(3). */
static void load_token(const fkda_problem *p, int64_t b, int64_t t, int64_t h, const scratch *s,
                       token *x) {
  const int64_t h_qk = h / (p->HV / p->H); /* grouped value attention */
  if (p->q.data) {
    fkda_load_f64(x->q, p->q.data, p->q.dtype, row_offset(&p->q, b, t, h_qk), p->K);
    if (p->l2norm) l2norm(x->q, p->K);
  }
  fkda_load_f64(x->k, p->k.data, p->k.dtype, row_offset(&p->k, b, t, h_qk), p->K);
  if (p->l2norm) l2norm(x->k, p->K);

  fkda_load_f64(x->decay, p->g.data, p->g.dtype, row_offset(&p->g, b, t, h), p->K);
  for (int64_t k = 0; k < p->K; k++) {
    x->decay[k] = exp(log_decay(p, x->decay[k], *s->exp_A, s->bias[k]));
  }

  fkda_load_f64(x->v, p->v.data, p->v.dtype, row_offset(&p->v, b, t, h), p->V);
  fkda_load_f64(&x->beta, p->beta.data, p->beta.dtype, row_offset(&p->beta, b, t, h), 1);
  x->beta = activate_beta(p, x->beta);
}

static void store_out(const fkda_problem *p, int64_t b, int64_t t, int64_t h, const token *x) {
  fkda_store_f64(p->out.data, p->out.dtype, row_offset(&p->out, b, t, h), x->out, p->V);
}

/* The state that a sequence starts from: what slot `slot` holds, or zero. */
static void load_initial(const fkda_problem *p, int64_t n, int64_t slot, int64_t h, scratch *s) {
  memset(s->S, 0, sizeof(double) * (size_t)(p->K * p->V));
  const fkda_vector *has = &p->has_initial;
  if (!p->initial.data || (has->data && !((const uint8_t *)has->data)[n * has->stride])) return;
  load_state(&p->initial, head_offset(&p->initial, slot, h), p->layout, s->S, p->K, p->V, s->line);
}

static void store_final(const fkda_problem *p, int64_t slot, int64_t h, scratch *s) {
  if (!p->final.data || slot < 0) return;
  store_state(&p->final, head_offset(&p->final, slot, h), p->layout, s->S, p->K, p->V, s->line);
}

/* ---- checkpoints ----------------------------------------------------------------------------- */

/* A call, and the first row of each sequence for checkpoints by interval. */
typedef struct job {
  const fkda_problem *p;
  const int64_t *every_base; /* [N], FKDA_CHECKPOINT_EVERY only */
  double *d_gate; /* [N,HV,1+K] backward: each sequence's part of d_A_log and d_dt_bias */
  scratch *workers;
  atomic_llong
      next; /* (sequence, value head) pairs handed out so far; backward: (sequence, head of q) */
} job;

/* Stores the state as row r of the checkpoints, r being the column-th of sequence n. */
static void store_row(const fkda_problem *p, int64_t n, int64_t r, int64_t column, int64_t h,
                      scratch *s) {
  const fkda_checkpoints *c = &p->checkpoints;
  const bool by_sequence = c->mode == FKDA_CHECKPOINT_OFFSETS;
  int64_t offset;
  if (c->slots.data) {
    const int64_t slot =
        by_sequence ? fkda_index_of(&c->slots, n, column) : fkda_index_of(&c->slots, r, 0);
    if (slot < 0) return;
    offset = head_offset(&c->state, slot, h);
  } else if (by_sequence) {
    offset = n * c->stride_n + head_offset(&c->state, column, h);
  } else {
    offset = head_offset(&c->state, r, h);
  }
  store_state(&c->state, offset, p->layout, s->S, p->K, p->V, s->line);
}

/* Stores the state after t tokens of sequence n wherever a checkpoint asks for it. */
static void store_checkpoints(const job *j, int64_t n, int64_t t, int64_t length, int64_t h,
                              scratch *s) {
  const fkda_problem *p = j->p;
  const fkda_checkpoints *c = &p->checkpoints;
  switch (c->mode) {
    case FKDA_CHECKPOINT_NONE: break;
    case FKDA_CHECKPOINT_OFFSETS:
      for (int64_t i = 0; i < c->per_sequence; i++) {
        if (fkda_index_of(&c->offsets, n, i) == t) {
          store_row(p, n, n * c->per_sequence + i, i, h, s);
        }
      }
      break;
    case FKDA_CHECKPOINT_PACKED: {
      const fkda_vector *indptr = &c->indptr;
      const int64_t begin = fkda_int_at(indptr->data, indptr->dtype, n * indptr->stride);
      const int64_t end = fkda_int_at(indptr->data, indptr->dtype, (n + 1) * indptr->stride);
      for (int64_t r = begin; r < end; r++) {
        if (fkda_index_of(&c->offsets, r, 0) == t) store_row(p, n, r, r - begin, h, s);
      }
      break;
    }
    case FKDA_CHECKPOINT_EVERY: {
      int64_t i = -1; /* row of this sequence */
      if (c->before && t % c->every == 0 && t < length) i = t / c->every;
      if (!c->before && t > 0 && (t % c->every == 0 || t == length)) i = (t - 1) / c->every;
      if (i >= 0) store_row(p, n, j->every_base[n] + i, i, h, s);
      break;
    }
  }
}

/* ---- one sequence and value head ------------------------------------------------------------- */

static void run_prefill(const job *j, int64_t n, int64_t h, scratch *s) {
  const fkda_problem *p = j->p;
  const fkda_span span = fkda_span_of(p, n);
  const int64_t initial = fkda_index_of(&p->initial_indices, n, 0);
  const int64_t final = fkda_index_of(&p->final_indices, n, 0);
  if (initial < 0 || final < 0) return;

  load_initial(p, n, initial, h, s);
  store_checkpoints(j, n, 0, span.length, h, s);
  for (int64_t t = 0; t < span.length; t++) {
    load_token(p, span.b, span.begin + t, h, s, &s->x);
    step(s->S, p->K, p->V, &s->x, p->scale, s->u);
    store_out(p, span.b, span.begin + t, h, &s->x);
    if ((t + 1) % FKDA_CHUNK_MULTIPLE == 0 || t + 1 == span.length) {
      store_checkpoints(j, n, t + 1, span.length, h, s);
    }
  }
  store_final(p, final, h, s);
}

/* The start column is read before any column is written, so a pool may be worked on in place. */
static void run_decode(const job *j, int64_t n, int64_t h, scratch *s) {
  const fkda_problem *p = j->p;
  const fkda_indices *from = &p->initial_indices, *to = &p->final_indices;
  const fkda_vector *accepted = &p->num_accepted_tokens;
  const int64_t column =
      accepted->data ? fkda_int_at(accepted->data, accepted->dtype, n * accepted->stride) - 1 : 0;
  const int64_t initial = fkda_index_of(from, n, column);
  if (initial < 0 || (to->columns == 0 && fkda_index_of(to, n, 0) < 0)) return;

  load_initial(p, n, initial, h, s);
  for (int64_t t = 0; t < p->T; t++) {
    load_token(p, n, t, h, s, &s->x);
    step(s->S, p->K, p->V, &s->x, p->scale, s->u);
    store_out(p, n, t, h, &s->x);
    if (to->columns > 0) store_final(p, fkda_index_of(to, n, t), h, s);
  }
  if (to->columns == 0) store_final(p, fkda_index_of(to, n, 0), h, s);
}

/* S_out = S_in M + b. b is the state reached from zero; M the one reached from the identity with
 * v = 0, because every row of a state is transformed alike. */
static void run_summary(const job *j, int64_t n, int64_t h, scratch *s) {
  const fkda_problem *p = j->p;
  const fkda_span span = fkda_span_of(p, n);
  load_initial(p, n, n, h, s);
  memset(s->M, 0, sizeof(double) * (size_t)(p->K * p->K));
  for (int64_t k = 0; k < p->K; k++) s->M[k * p->K + k] = 1;

  for (int64_t t = 0; t < span.length; t++) {
    load_token(p, span.b, span.begin + t, h, s, &s->x);
    step(s->S, p->K, p->V, &s->x, p->scale, s->u);
    memset(s->x.v, 0, sizeof(double) * (size_t)p->K);
    step(s->M, p->K, p->K, &s->x, p->scale, s->u);
  }
  store_state(&p->summary_M, head_offset(&p->summary_M, n, h), FKDA_STATE_VK, s->M, p->K, p->K,
              s->line);
  store_state(&p->summary_b, head_offset(&p->summary_b, n, h), p->layout, s->S, p->K, p->V,
              s->line);
}

/* ---- gradients of one sequence and head of q and k --------------------------------------------- */

/* The state before token t, where the caller has kept it. */
static void load_kept(const job *j, int64_t n, int64_t t, int64_t h, scratch *s) {
  const fkda_checkpoints *c = &j->p->checkpoints;
  if (c->mode != FKDA_CHECKPOINT_EVERY || t % c->every) return;
  load_state(&c->state, head_offset(&c->state, j->every_base[n] + t / c->every, h), j->p->layout,
             s->S, j->p->K, j->p->V, s->line);
}

/* Runs (4)-(6) from token `from`, whose state is in s->S, and stores the state before each token t < to that is a
 * multiple of `every` at states[(t - from) / every]. */
static void replay(const job *j, int64_t n, int64_t h, int64_t from, int64_t to, int64_t every,
                   double *states, scratch *s) {
  const fkda_problem *p = j->p;
  const fkda_span span = fkda_span_of(p, n);
  const int64_t size = p->K * p->V;
  for (int64_t t = from; t < to; t++) {
    load_kept(j, n, t, h, s);
    if ((t - from) % every == 0) {
      memcpy(states + (t - from) / every * size, s->S, sizeof(double) * (size_t)size);
    }
    load_token(p, span.b, span.begin + t, h, s, &s->x);
    step(s->S, p->K, p->V, &s->x, p->scale, s->u);
  }
}

/* From the gradients by the activated token to those by what was given; stores or sums them. */
static void token_back(const job *j, int64_t n, int64_t t, int64_t h, scratch *s) {
  const fkda_problem *p = j->p;
  const fkda_span span = fkda_span_of(p, n);
  const int64_t b = span.b, row = span.begin + t, K = p->K, h_qk = h / (p->HV / p->H);
  double *d_gate = j->d_gate + (n * p->HV + h) * (1 + K);

  if (p->l2norm) {
    fkda_load_f64(s->line, p->q.data, p->q.dtype, row_offset(&p->q, b, row, h_qk), K);
    l2norm_back(s->line, s->d.q, K);
    fkda_load_f64(s->line, p->k.data, p->k.dtype, row_offset(&p->k, b, row, h_qk), K);
    l2norm_back(s->line, s->d.k, K);
  }
  for (int64_t k = 0; k < K; k++) {
    s->dq_sum[t * K + k] += s->d.q[k];
    s->dk_sum[t * K + k] += s->d.k[k];
  }
  fkda_load_f64(s->raw_g, p->g.data, p->g.dtype, row_offset(&p->g, b, row, h), K);
  for (int64_t k = 0; k < K; k++) {
    double dA;
    s->d.g[k] = log_decay_back(p, s->raw_g[k], *s->exp_A, s->bias[k], s->d.g[k], &dA);
    d_gate[0] += dA;
    d_gate[1 + k] += s->d.g[k];
  }
  double logit;
  fkda_load_f64(&logit, p->beta.data, p->beta.dtype, row_offset(&p->beta, b, row, h), 1);
  s->d.beta = beta_back(p, logit, s->d.beta);

  if (p->d_g.data) {
    fkda_store_f64(p->d_g.data, p->d_g.dtype, row_offset(&p->d_g, b, row, h), s->d.g, K);
  }
  if (p->d_v.data) {
    fkda_store_f64(p->d_v.data, p->d_v.dtype, row_offset(&p->d_v, b, row, h), s->d.v, p->V);
  }
  if (p->d_beta.data) {
    fkda_store_f64(p->d_beta.data, p->d_beta.dtype, row_offset(&p->d_beta, b, row, h), &s->d.beta,
                   1);
  }
}

/* Tokens from the last to the first. Their states are made again: first one every `stride` tokens, then,
 * from each of these, the ones up to the next. */
static void run_value_head_back(const job *j, int64_t n, int64_t h, scratch *s) {
  const fkda_problem *p = j->p;
  const fkda_span span = fkda_span_of(p, n);
  const int64_t size = p->K * p->V, length = span.length, stride = mark_stride(length);
  load_gate(p, h, s);
  load_initial(p, n, n, h, s);
  replay(j, n, h, 0, length, stride, s->marks, s);

  memset(s->dS, 0, sizeof(double) * (size_t)size);
  if (p->d_final.data) {
    load_state(&p->d_final, head_offset(&p->d_final, n, h), p->layout, s->dS, p->K, p->V, s->line);
  }
  for (int64_t from = (length - 1) / stride * stride; from >= 0 && length > 0; from -= stride) {
    const int64_t to = from + stride < length ? from + stride : length;
    memcpy(s->S, s->marks + from / stride * size, sizeof(double) * (size_t)size);
    replay(j, n, h, from, to, 1, s->between, s);
    for (int64_t t = to - 1; t >= from; t--) {
      load_token(p, span.b, span.begin + t, h, s, &s->x);
      memset(s->x.out, 0, sizeof(double) * (size_t)p->V);
      if (p->d_out.data) {
        fkda_load_f64(s->x.out, p->d_out.data, p->d_out.dtype,
                      row_offset(&p->d_out, span.b, span.begin + t, h), p->V);
      }
      step_back(s->between + (t - from) * size, s->dS, p->K, p->V, &s->x, s->x.out, p->scale, &s->d,
                s->u, s->du);
      token_back(j, n, t, h, s);
    }
  }
  if (p->d_initial.data) {
    store_state(&p->d_initial, head_offset(&p->d_initial, n, h), p->layout, s->dS, p->K, p->V,
                s->line);
  }
}

/* q and k of a head get the sum over the value heads that read them. */
static void run_backward(const job *j, int64_t n, int64_t h_qk, scratch *s) {
  const fkda_problem *p = j->p;
  const fkda_span span = fkda_span_of(p, n);
  const int64_t group = p->HV / p->H, K = p->K;
  const size_t rows = sizeof(double) * (size_t)(span.length * K);
  memset(s->dq_sum, 0, rows);
  memset(s->dk_sum, 0, rows);
  for (int64_t h = h_qk * group; h < (h_qk + 1) * group; h++) run_value_head_back(j, n, h, s);
  for (int64_t t = 0; t < span.length; t++) {
    const int64_t row = span.begin + t;
    if (p->d_q.data) {
      fkda_store_f64(p->d_q.data, p->d_q.dtype, row_offset(&p->d_q, span.b, row, h_qk),
                     s->dq_sum + t * K, K);
    }
    if (p->d_k.data) {
      fkda_store_f64(p->d_k.data, p->d_k.dtype, row_offset(&p->d_k, span.b, row, h_qk),
                     s->dk_sum + t * K, K);
    }
  }
}

/* d_A_log and d_dt_bias: the sequences' parts, summed in their order. */
static void store_gate_gradients(const fkda_problem *p, double *d_gate) {
  const int64_t K = p->K, size = 1 + K;
  if (!p->d_A_log.data && !p->d_dt_bias.data) return;
  for (int64_t h = 0; h < p->HV; h++) {
    double *sum = d_gate + h * size; /* sequence 0's */
    for (int64_t n = 1; n < p->N; n++) {
      for (int64_t i = 0; i < size; i++) sum[i] += d_gate[(n * p->HV + h) * size + i];
    }
    if (p->d_A_log.data) fkda_store_f64(p->d_A_log.data, p->d_A_log.dtype, h, sum, 1);
    if (p->d_dt_bias.data) {
      fkda_store_f64(p->d_dt_bias.data, p->d_dt_bias.dtype, h * K, sum + 1, K);
    }
  }
}

/* ---- a whole call ---------------------------------------------------------------------------- */

/* Of the pairs that are worked on by themselves. */
static int64_t heads_of(const fkda_problem *p) { return p->op == FKDA_OP_BACKWARD ? p->H : p->HV; }

/* A worker takes (sequence, head) pairs until none is left. */
static void work(void *arg, int32_t worker) {
  job *j = arg;
  const fkda_problem *p = j->p;
  scratch *s = &j->workers[worker];
  const int64_t heads = heads_of(p);
  for (;;) {
    const int64_t i = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
    if (i >= p->N * heads) return;
    const int64_t n = i / heads, h = i % heads;
    if (p->op == FKDA_OP_BACKWARD) {
      run_backward(j, n, h, s);
      continue;
    }
    load_gate(p, h, s);
    if (p->op == FKDA_OP_PREFILL) run_prefill(j, n, h, s);
    if (p->op == FKDA_OP_DECODE) run_decode(j, n, h, s);
    if (p->op == FKDA_OP_SUMMARY) run_summary(j, n, h, s);
  }
}

static void number_checkpoints(const fkda_problem *p, int64_t *base) {
  int64_t rows = 0;
  for (int64_t n = 0; n < p->N; n++) {
    base[n] = rows;
    rows += (fkda_span_of(p, n).length + p->checkpoints.every - 1) / p->checkpoints.every;
  }
}

static fkda_status launch(const fkda_backend *self, const fkda_problem *p,
                          const fkda_plan_t *plan) {
  (void)self;
  const bool backward = p->op == FKDA_OP_BACKWARD;
  if (plan->tasks == 0 && !backward) return FKDA_OK; /* without sequences d_A_log is 0 */
  /* All memory first: nothing is written when there is not enough. */
  scratch none;
  const size_t doubles = place_scratch(p, NULL, &none);
  const bool every = p->checkpoints.mode == FKDA_CHECKPOINT_EVERY;
  const int32_t count = plan->threads;
  job j = {.p = p};
  double *memory = calloc((size_t)count * doubles, sizeof *memory);
  int64_t *base = every ? malloc((size_t)(p->N + 1) * sizeof *base) : NULL;
  j.workers = malloc((size_t)count * sizeof *j.workers);
  const int64_t sequences = p->N > 0 ? p->N : 1;
  if (backward) {
    j.d_gate = calloc((size_t)(sequences * p->HV * (1 + p->K)), sizeof *j.d_gate);
  }
  fkda_status status = FKDA_OK;
  if (!memory || !j.workers || (every && !base) || (backward && !j.d_gate)) {
    status = fkda_fail(FKDA_ERROR_OUT_OF_MEMORY, "reference: no memory for %d times %zu bytes",
                       (int)count, doubles * sizeof *memory);
  } else {
    for (int32_t i = 0; i < count; i++) {
      place_scratch(p, memory + (size_t)i * doubles, &j.workers[i]);
    }
    if (every) number_checkpoints(p, base);
    j.every_base = base;
    atomic_init(&j.next, 0);
    fkda_pool_run(count, work, &j);
    if (backward) store_gate_gradients(p, j.d_gate);
  }
  free(j.d_gate);
  free(j.workers);
  free(base);
  free(memory);
  return status;
}

static bool available(const fkda_backend *self, char *reason, size_t capacity) {
  (void)self, (void)reason, (void)capacity;
  return true;
}

static bool supports(const fkda_backend *self, const fkda_problem *p, char *reason,
                     size_t capacity) {
  (void)self;
  if (p->device_type != FKDA_DEVICE_CPU) {
    return fkda_refuse(reason, capacity, "the tensors are not in host memory");
  }
  return true;
}

static void plan(const fkda_backend *self, const fkda_problem *p, fkda_plan_t *out) {
  (void)self;
  const int64_t threads = fkda_pool_threads();
  out->chunk = 1;
  out->value_split = 1;
  out->tasks = p->N * heads_of(p);
  out->threads = (int32_t)(out->tasks < 1 ? 1 : out->tasks < threads ? out->tasks : threads);
  out->workspace_size = 0;
}

const fkda_backend fkda_backend_reference = {
    .name = "reference",
    .device_type = FKDA_DEVICE_CPU,
    .available = available,
    .supports = supports,
    .plan = plan,
    .launch = launch,
};
