/* Decode on the CPU: the token recurrence (4)-(7) on 1 to 8 tokens, in one pass over the state.
 *
 * The work is the state's traffic, so each part of it is read once and written once whatever the number
 * of tokens. [V,K] states go row by row (a row's K channels, all tokens, back to memory); [K,V] states
 * go by groups of value columns, which stay in the first-level cache for all tokens.
 */
#include "cpu/kernels.h"
#include "cpu/vector_math.h"

#define MAX_TOKENS FKDA_DECODE_MAX_TOKENS
#define ROWS_TOGETHER 4 /* value rows in flight: independent sums hide the latency of each */
#define PREFETCH_ROWS                                                                              \
  16 /* rows asked for ahead, so that memory works through the second pass too */
#define COLUMNS_TOGETHER 64 /* value columns of a [K,V] state in flight: 64 KB at K = 256 */

typedef struct decode_tokens {
  int64_t T, K, Kp, V, Vp;
  float decay[MAX_TOKENS][FKDA_MAX_DIM];  /* exp g */
  float k[MAX_TOKENS][FKDA_MAX_DIM];      /* (1) */
  float q[MAX_TOKENS][FKDA_MAX_DIM];      /* (1), times scale */
  float v[MAX_TOKENS][FKDA_MAX_DIM + 16]; /* value columns of this job */
  float o[MAX_TOKENS][FKDA_MAX_DIM + 16];
  float beta[MAX_TOKENS < LANES ? LANES : MAX_TOKENS];
} decode_tokens;

/* Where the state of a sequence comes from and where it goes after each token. */
typedef struct decode_slots {
  bool load;
  int64_t from;           /* element offset of the head's state */
  int64_t to[MAX_TOKENS]; /* the same after each token; -1: not stored */
} decode_slots;

static void normalise(float *row, int64_t padded, bool l2norm, float scale) {
  vec factor = v_set(scale);
  if (l2norm) { /* (1) */
    vec sum = v_set(0);
    for (int64_t i = 0; i < padded; i += LANES) sum = v_fma(v_load(row + i), v_load(row + i), sum);
    factor = v_mul(factor, v_rsqrt(v_set(v_sum(sum) + (float)FKDA_L2NORM_EPS)));
  }
  for (int64_t i = 0; i < padded; i += LANES) v_store(row + i, v_mul(v_load(row + i), factor));
}

INLINE void decay_row(float *row, const float *bias, int64_t padded, fkda_gate gate, vec exp_A,
                      vec lower_bound) {
  for (int64_t i = 0; i < padded; i += LANES)
    v_store(row + i, v_exp(log_decay(gate, v_load(row + i), v_load(bias + i), exp_A, lower_bound)));
}

/* Elements with even index first, then those with odd, in every 2 * LANES: what v_load2_bf16() makes of a
 * row of the state. */
static void split_pairs(float *row, int64_t count) {
  for (float *at = row; at < row + count; at += 2 * LANES) {
    float both[2 * LANES];
    for (int i = 0; i < LANES; ++i) {
      both[i] = at[2 * i];
      both[LANES + i] = at[2 * i + 1];
    }
    memcpy(at, both, sizeof both);
  }
}

INLINE void load_pair(const char *from, int32_t dtype, vec x[2]) {
  if (dtype == FKDA_BF16) {
    v_load2_bf16((const uint16_t *)(const void *)from, x);
  } else {
    x[0] = v_load((const float *)(const void *)from);
    x[1] = v_load((const float *)(const void *)from + LANES);
  }
}

INLINE void store_pair(char *to, int32_t dtype, const vec x[2]) {
  if (dtype == FKDA_BF16) {
    v_store2_bf16((uint16_t *)(void *)to, x);
  } else {
    v_store((float *)(void *)to, x[0]);
    v_store((float *)(void *)to + LANES, x[1]);
  }
}

static void load_tokens(decode_tokens *x, const fkda_cpu_job *job) {
  const fkda_problem *p = job->problem;
  const int64_t qk_head = job->head * p->H / p->HV, n = job->n;
  const vec exp_A = v_set(exp_A_of(p, job->head)), lower_bound = v_set((float)p->lower_bound);
  float bias[FKDA_MAX_DIM];
  x->T = p->T;
  x->K = p->K;
  x->Kp = round_up(p->K, LANES);
  x->V = job->v_end - job->v_begin;
  x->Vp = round_up(x->V, LANES);
  load_bias(bias, p, job->head, x->Kp);
  for (int64_t t = 0; t < x->T; ++t) {
    load_row(x->q[t], p->q.data, p->q.dtype,
             n * p->q.stride_b + t * p->q.stride_t + qk_head * p->q.stride_h, x->K, x->Kp);
    load_row(x->k[t], p->k.data, p->k.dtype,
             n * p->k.stride_b + t * p->k.stride_t + qk_head * p->k.stride_h, x->K, x->Kp);
    load_row(x->v[t], p->v.data, p->v.dtype,
             n * p->v.stride_b + t * p->v.stride_t + job->head * p->v.stride_h + job->v_begin, x->V,
             x->Vp);
    float *row = x->decay[t];
    load_row(row, p->g.data, p->g.dtype,
             n * p->g.stride_b + t * p->g.stride_t + job->head * p->g.stride_h, x->K, x->Kp);
    normalise(x->q[t], x->Kp, p->l2norm, (float)p->scale);
    normalise(x->k[t], x->Kp, p->l2norm, 1);
    if (p->gate == FKDA_GATE_BOUNDED)
      decay_row(row, bias, x->Kp, FKDA_GATE_BOUNDED, exp_A, lower_bound);
    else if (p->gate == FKDA_GATE_SOFTPLUS)
      decay_row(row, bias, x->Kp, FKDA_GATE_SOFTPLUS, exp_A, lower_bound);
    else
      decay_row(row, bias, x->Kp, FKDA_GATE_DIRECT, exp_A, lower_bound);
    x->beta[t] =
        load_scalar(p->beta.data, p->beta.dtype,
                    n * p->beta.stride_b + t * p->beta.stride_t + job->head * p->beta.stride_h);
  }
  if (p->beta_is_logit) { /* (3) */
    const vec factor = v_set(p->allow_neg_eigval ? 2 : 1);
    for (int64_t t = x->T; t % LANES; ++t) x->beta[t] = 0;
    for (int64_t t = 0; t < x->T; t += LANES)
      v_store(x->beta + t, v_mul(factor, v_sigmoid(v_load(x->beta + t))));
  }
}

/* False if the sequence is skipped. */
static bool find_slots(decode_slots *slots, const fkda_cpu_job *job) {
  const fkda_problem *p = job->problem;
  const int64_t n = job->n;
  const bool speculative = p->initial_indices.columns > 0;
  int64_t column = 0;
  if (speculative && p->num_accepted_tokens.data)
    column = fkda_int_at(p->num_accepted_tokens.data, p->num_accepted_tokens.dtype,
                         n * p->num_accepted_tokens.stride) -
             1;
  const int64_t start = fkda_index_of(&p->initial_indices, n, column);
  if (start < 0) return false;
  slots->load = has_initial_state(p, n);
  slots->from = start * p->initial.stride_slot + job->head * p->initial.stride_head;
  for (int64_t t = 0; t < p->T; ++t) {
    int64_t slot = -1;
    if (p->final_indices.columns > 0)
      slot = fkda_index_of(&p->final_indices, n, t);
    else if (t == p->T - 1)
      slot = fkda_index_of(&p->final_indices, n, 0);
    if (p->final_indices.columns == 0 && t == p->T - 1 && slot < 0) return false;
    slots->to[t] = slot < 0 || !p->final.data
                       ? -1
                       : slot * p->final.stride_slot + job->head * p->final.stride_head;
  }
  return true;
}

/* How far it is, in bytes, from value row `row` to the row that will be wanted PREFETCH_ROWS later: of this
 * head or the next one in memory. 0 if there is none. */
INLINE int64_t way_ahead(const fkda_states *states, const fkda_cpu_job *job, int64_t row, int rows,
                         int64_t size) {
  const fkda_problem *p = job->problem;
  if (row + PREFETCH_ROWS + rows <= p->V) return PREFETCH_ROWS * states->stride_row * size;
  const int64_t left = PREFETCH_ROWS - p->V; /* of the next head, from the same row on */
  if (job->head + 1 < p->HV && row + left >= 0 && row + left + rows <= p->V)
    return (states->stride_head + left * states->stride_row) * size;
  return 0;
}

/* `rows` value rows of a [V,K] state from row v on (relative to the job), for every token. `direct` is the
 * pool's dtype if rows can move straight between pool and registers (K a multiple of 2 * LANES, one dtype), so that
 * the one token of plain decode makes two passes over a row and no more; else FKDA_NONE. Such rows
 * go by pairs of vectors, in bf16 with k split as by split_pairs(). */
INLINE void decode_rows(decode_tokens *x, const fkda_cpu_job *job, const decode_slots *slots,
                        int64_t v, int rows, int32_t direct) {
  const fkda_states *from = &job->problem->initial, *to = &job->problem->final;
  const int64_t row = job->v_begin + v, size = direct == FKDA_F32 ? 4 : 2;
  const int64_t ahead = way_ahead(from, job, row, rows, size),
                to_ahead = way_ahead(to, job, row, rows, size);
  const int vectors = direct ? 2 : 1;
  float S[ROWS_TOGETHER][FKDA_MAX_DIM];
  const char *source[ROWS_TOGETHER] = {NULL};
  char *target[ROWS_TOGETHER] = {NULL};
  for (int r = 0; r < rows; ++r) {
    if (!slots->load)
      memset(S[r], 0, (size_t)x->Kp * sizeof(float));
    else if (direct)
      source[r] = element_at(from->data, direct, slots->from + (row + r) * from->stride_row);
    else
      load_row(S[r], from->data, from->dtype, slots->from + (row + r) * from->stride_row, x->K,
               x->Kp);
  }
  for (int64_t t = 0; t < x->T; ++t) {
    const bool stored = slots->to[t] >= 0;
    const bool from_pool = direct && slots->load && t == 0;
    const bool elsewhere = to->data != from->data || slots->to[t] != slots->from;
    if (direct && stored)
      for (int r = 0; r < rows; ++r)
        target[r] = (char *)element_at(to->data, direct, slots->to[t] + (row + r) * to->stride_row);
    vec sum[ROWS_TOGETHER];
    for (int r = 0; r < rows; ++r) sum[r] = v_set(0);
    for (int64_t k = 0; k < x->Kp; k += vectors * LANES) { /* (4), S k of (5) */
      for (int r = 0; r < rows; ++r) {
        vec s[2];
        if (from_pool) {
          for (int64_t byte = 0; byte < 2 * LANES * size; byte += 64)
            __builtin_prefetch(source[r] + k * size + byte + ahead, 1);
          load_pair(source[r] + k * size, direct, s);
        } else {
          for (int i = 0; i < vectors; ++i) s[i] = v_load(S[r] + k + i * LANES);
        }
        for (int i = 0; i < vectors; ++i) {
          const int64_t at = k + i * LANES;
          s[i] = v_mul(s[i], v_load(x->decay[t] + at));
          v_store(S[r] + at, s[i]);
          sum[r] = v_fma(s[i], v_load(x->k[t] + at), sum[r]);
        }
      }
    }
    vec u[ROWS_TOGETHER];
    for (int r = 0; r < rows; ++r) { /* (5) */
      u[r] = v_set(x->beta[t] * (x->v[t][v + r] - v_sum(sum[r])));
      sum[r] = v_set(0);
    }
    for (int64_t k = 0; k < x->Kp; k += vectors * LANES) { /* (6), (7) */
      for (int r = 0; r < rows; ++r) {
        vec s[2];
        for (int i = 0; i < vectors; ++i) {
          const int64_t at = k + i * LANES;
          s[i] = v_fma(u[r], v_load(x->k[t] + at), v_load(S[r] + at));
          if (t + 1 < x->T || !direct) v_store(S[r] + at, s[i]);
          sum[r] = v_fma(s[i], v_load(x->q[t] + at), sum[r]);
        }
        for (int64_t byte = 0; elsewhere && direct && stored && byte < 2 * LANES * size; byte += 64)
          __builtin_prefetch(target[r] + k * size + byte + to_ahead, 1);
        if (direct && stored) store_pair(target[r] + k * size, direct, s);
      }
    }
    for (int r = 0; r < rows; ++r) {
      x->o[t][v + r] = v_sum(sum[r]);
      if (!direct && stored)
        store_row(to->data, to->dtype, slots->to[t] + (row + r) * to->stride_row, S[r], x->K);
    }
  }
}

INLINE void decode_all_rows(decode_tokens *x, const fkda_cpu_job *job, const decode_slots *slots,
                            int32_t direct) {
  int64_t v = 0;
  for (int64_t t = 0; t < x->T && direct == FKDA_BF16; ++t) {
    split_pairs(x->decay[t], x->Kp);
    split_pairs(x->k[t], x->Kp);
    split_pairs(x->q[t], x->Kp);
  }
  for (; v + ROWS_TOGETHER <= x->V; v += ROWS_TOGETHER)
    decode_rows(x, job, slots, v, ROWS_TOGETHER, direct);
  for (; v < x->V; ++v) decode_rows(x, job, slots, v, 1, direct);
}

/* COLUMNS_TOGETHER value columns of a [K,V] state from column v on, or `columns` < COLUMNS_TOGETHER of
 * them, for every token. `direct` as above, for V a multiple of COLUMNS_TOGETHER. */
INLINE void decode_columns(decode_tokens *x, const fkda_cpu_job *job, const decode_slots *slots,
                           int64_t v, int64_t columns, int32_t direct) {
  const fkda_states *from = &job->problem->initial, *to = &job->problem->final;
  const int64_t column = job->v_begin + v, padded = round_up(columns, LANES);
  const int64_t size = direct == FKDA_F32 ? 4 : 2;
  const int vectors = direct ? COLUMNS_TOGETHER / LANES : (int)(padded / LANES);
  float S[FKDA_MAX_DIM][COLUMNS_TOGETHER];
  for (int64_t k = 0; k < x->K && !(direct && slots->load); ++k)
    if (slots->load)
      load_row(S[k], from->data, from->dtype, slots->from + k * from->stride_row + column, columns,
               padded);
    else
      memset(S[k], 0, (size_t)padded * sizeof(float));
  for (int64_t t = 0; t < x->T; ++t) {
    const bool stored = slots->to[t] >= 0, from_pool = direct && slots->load && t == 0;
    const bool elsewhere = to->data != from->data || slots->to[t] != slots->from;
    const char *source =
        from_pool ? element_at(from->data, direct, slots->from + column) : (const char *)S;
    char *target =
        direct && stored ? (char *)element_at(to->data, direct, slots->to[t] + column) : NULL;
    vec sum[COLUMNS_TOGETHER / LANES], u[COLUMNS_TOGETHER / LANES];
    for (int i = 0; i < vectors; ++i) sum[i] = v_set(0);
    for (int64_t k = 0; k < x->K; ++k) { /* (4), S k of (5) */
      const vec decay = v_set(x->decay[t][k]), key = v_set(x->k[t][k]);
      for (int i = 0; i < vectors; ++i) {
        if (from_pool && k + PREFETCH_ROWS < x->K)
          __builtin_prefetch(source + (PREFETCH_ROWS * from->stride_row + i * LANES) * size, 1);
        const vec s =
            v_mul(from_pool ? load_as(source + i * LANES * size, direct) : v_load(S[k] + i * LANES),
                  decay);
        v_store(S[k] + i * LANES, s);
        sum[i] = v_fma(s, key, sum[i]);
      }
      if (from_pool) source += from->stride_row * size;
    }
    for (int i = 0; i < vectors; ++i) { /* (5) */
      u[i] = v_mul(v_set(x->beta[t]), v_sub(v_load(x->v[t] + v + i * LANES), sum[i]));
      sum[i] = v_set(0);
    }
    for (int64_t k = 0; k < x->K; ++k) { /* (6), (7) */
      const vec key = v_set(x->k[t][k]), query = v_set(x->q[t][k]);
      for (int i = 0; i < vectors; ++i) {
        const vec s = v_fma(u[i], key, v_load(S[k] + i * LANES));
        if (t + 1 < x->T || !direct) v_store(S[k] + i * LANES, s);
        if (target) {
          if (elsewhere && k + PREFETCH_ROWS < x->K)
            __builtin_prefetch(target + (PREFETCH_ROWS * to->stride_row + i * LANES) * size, 1);
          store_as(target + i * LANES * size, direct, s);
        }
        sum[i] = v_fma(s, query, sum[i]);
      }
      if (target)
        target += to->stride_row * size;
      else if (stored)
        store_row(to->data, to->dtype, slots->to[t] + k * to->stride_row + column, S[k], columns);
    }
    for (int i = 0; i < vectors; ++i) v_store(x->o[t] + v + i * LANES, sum[i]);
  }
}

INLINE void decode_all_columns(decode_tokens *x, const fkda_cpu_job *job, const decode_slots *slots,
                               int32_t direct) {
  int64_t v = 0;
  for (; v + COLUMNS_TOGETHER <= x->V; v += COLUMNS_TOGETHER)
    decode_columns(x, job, slots, v, COLUMNS_TOGETHER, direct);
  if (v < x->V) decode_columns(x, job, slots, v, x->V - v, FKDA_NONE);
}

static void decode(const fkda_cpu_job *job) {
  const fkda_problem *p = job->problem;
  decode_slots slots;
  if (!find_slots(&slots, job)) return;
  const float_mode mode = flush_denormals();
  decode_tokens x;
  load_tokens(&x, job);
  /* the pool's dtype; FKDA_NONE where what is read and what is written differ in it */
  const int32_t direct =
      p->final.dtype && p->final.dtype != p->initial.dtype ? FKDA_NONE : p->initial.dtype;
  const bool columns = p->layout == FKDA_STATE_KV, whole = columns || x.K % (2 * LANES) == 0;
  if (whole && direct == FKDA_F32)
    columns ? decode_all_columns(&x, job, &slots, FKDA_F32)
            : decode_all_rows(&x, job, &slots, FKDA_F32);
  else if (whole && direct == FKDA_BF16)
    columns ? decode_all_columns(&x, job, &slots, FKDA_BF16)
            : decode_all_rows(&x, job, &slots, FKDA_BF16);
  else
    columns ? decode_all_columns(&x, job, &slots, FKDA_NONE)
            : decode_all_rows(&x, job, &slots, FKDA_NONE);
  for (int64_t t = 0; t < x.T; ++t)
    store_row(
        p->out.data, p->out.dtype,
        job->n * p->out.stride_b + t * p->out.stride_t + job->head * p->out.stride_h + job->v_begin,
        x.o[t], x.V);
  restore_denormals(mode);
}
