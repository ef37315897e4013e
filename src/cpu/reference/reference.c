/* The reference: equations (1)-(7) of docs/math.md, token by token, in double precision.
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
} scratch;

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
  scratch *workers;
  atomic_llong next; /* (sequence, value head) pairs handed out so far */
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

/* ---- a whole call ---------------------------------------------------------------------------- */

/* A worker takes (sequence, value head) pairs until none is left. */
static void work(void *arg, int32_t worker) {
  job *j = arg;
  const fkda_problem *p = j->p;
  scratch *s = &j->workers[worker];
  for (;;) {
    const int64_t i = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
    if (i >= p->N * p->HV) return;
    const int64_t n = i / p->HV, h = i % p->HV;
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
  if (plan->tasks == 0) return FKDA_OK;
  /* All memory first: nothing is written when there is not enough. */
  scratch none;
  const size_t doubles = place_scratch(p, NULL, &none);
  const bool every = p->checkpoints.mode == FKDA_CHECKPOINT_EVERY;
  const int32_t count = plan->threads;
  job j = {.p = p};
  double *memory = calloc((size_t)count * doubles, sizeof *memory);
  int64_t *base = every ? malloc((size_t)p->N * sizeof *base) : NULL;
  j.workers = malloc((size_t)count * sizeof *j.workers);
  fkda_status status = FKDA_OK;
  if (!memory || !j.workers || (every && !base)) {
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
  }
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
  if (p->op == FKDA_OP_BACKWARD) return fkda_refuse(reason, capacity, "backward has no kernel yet");
  return true;
}

static void plan(const fkda_backend *self, const fkda_problem *p, fkda_plan_t *out) {
  (void)self;
  const int64_t threads = fkda_pool_threads();
  out->chunk = 1;
  out->value_split = 1;
  out->tasks = p->N * p->HV;
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
