/* What lies in host memory: sequence boundaries, slot numbers, counts and offsets. Device memory is
 * never read. */
#include <stdio.h>

#include "check/checker.h"

typedef long long ll;

/* x[0] = 0 <= x[1] <= ... <= x[n] <= limit. */
static fkda_status check_boundaries(const char *name, const fkda_vector *x, int64_t n,
                                    int64_t limit, const char *limit_name) {
  int64_t before = 0;
  for (int64_t i = 0; i <= n; ++i) {
    const int64_t value = fkda_int_at(x->data, x->dtype, i);
    if (i == 0 && value != 0)
      return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "%s[0]: %lld, expected 0", name, (ll)value);
    if (value < before)
      return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT,
                       "%s[%lld]: %lld, expected at least %s[%lld] = %lld", name, (ll)i, (ll)value,
                       name, (ll)(i - 1), (ll)before);
    if (value > limit)
      return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "%s[%lld]: %lld, expected at most %s = %lld",
                       name, (ll)i, (ll)value, limit_name, (ll)limit);
    before = value;
  }
  return FKDA_OK;
}

/* An entry's name for a message: "offsets[3]", or "offsets[3][1]" if x is two-dimensional. */
typedef struct entry_name {
  char text[96];
} entry_name;

static entry_name name_of(const char *name, const fkda_indices *x, int64_t row, int64_t column) {
  entry_name e;
  const int n = snprintf(e.text, sizeof e.text, "%s[%lld]", name, (ll)row);
  if (x->columns) snprintf(e.text + n, sizeof e.text - (size_t)n, "[%lld]", (ll)column);
  return e;
}

/* Every entry in [-1, slots). */
static fkda_status check_slots(const char *name, const fkda_indices *x, int64_t rows,
                               const char *pool, int64_t slots) {
  if (!x->data) return FKDA_OK;
  const int64_t columns = x->columns ? x->columns : 1;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t slot = fkda_index_of(x, i, j);
      if (slot >= -1 && slot < slots) continue;
      return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT,
                       "%s: %lld, expected -1 or a slot of %s, which has %lld",
                       name_of(name, x, i, j).text, (ll)slot, pool, (ll)slots);
    }
  }
  return FKDA_OK;
}

static fkda_status check_accepted(const fkda_problem *p) {
  const fkda_vector *x = &p->num_accepted_tokens;
  if (!x->data) return FKDA_OK;
  for (int64_t n = 0; n < p->N; ++n) {
    const int64_t accepted = fkda_int_at(x->data, x->dtype, n * x->stride);
    if (accepted >= 1 && accepted <= p->initial_indices.columns) continue;
    return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT,
                     "num_accepted_tokens[%lld]: %lld, expected 1 to %lld (columns of the indices)",
                     (ll)n, (ll)accepted, (ll)p->initial_indices.columns);
  }
  return FKDA_OK;
}

/* offsets[row][column], which belongs to sequence n. */
static fkda_status check_offset(const fkda_problem *p, int64_t n, int64_t row, int64_t column) {
  const fkda_indices *x = &p->checkpoints.offsets;
  const int64_t offset = fkda_index_of(x, row, column);
  const int64_t length = fkda_span_of(p, n).length;
  if (offset == -1 || (offset >= 0 && offset <= length && offset % FKDA_CHUNK_MULTIPLE == 0))
    return FKDA_OK;
  return fkda_fail(
      FKDA_ERROR_INVALID_ARGUMENT,
      "%s: %lld, expected -1 or a multiple of %d up to %lld, the length of sequence %lld",
      name_of("checkpoint_offsets", x, row, column).text, (ll)offset, FKDA_CHUNK_MULTIPLE,
      (ll)length, (ll)n);
}

/* Rows that checkpoint_every makes: sum of ceil(length / every). */
static int64_t interval_rows(const fkda_problem *p) {
  const int64_t every = p->checkpoints.every;
  if (!p->cu_seqlens.data) return p->N * (p->T / every + (p->T % every != 0));
  int64_t rows = 0;
  for (int64_t n = 0; n < p->N; ++n) {
    const int64_t length = fkda_span_of(p, n).length;
    rows += length / every + (length % every != 0);
  }
  return rows;
}

static fkda_status check_checkpoints(const fkda_problem *p) {
  const fkda_checkpoints *c = &p->checkpoints;
  fkda_status status = FKDA_OK;
  if (c->mode == FKDA_CHECKPOINT_OFFSETS) {
    for (int64_t n = 0; n < p->N; ++n)
      for (int64_t i = 0; i < c->per_sequence; ++i)
        if ((status = check_offset(p, n, n, i))) return status;
  } else if (c->mode == FKDA_CHECKPOINT_PACKED) {
    if ((status = check_boundaries("checkpoint_indptr", &c->indptr, p->N, c->rows,
                                   "the length of checkpoint_offsets")))
      return status;
    for (int64_t n = 0; n < p->N; ++n) {
      const int64_t end = fkda_int_at(c->indptr.data, c->indptr.dtype, n + 1);
      for (int64_t r = fkda_int_at(c->indptr.data, c->indptr.dtype, n); r < end; ++r)
        if ((status = check_offset(p, n, r, 0))) return status;
    }
  } else if (c->mode == FKDA_CHECKPOINT_EVERY) {
    const int64_t rows = interval_rows(p);
    if (rows > c->rows)
      return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT,
                       "%s: %lld rows, expected at least %lld (one for every %lld tokens)",
                       c->slots.dtype ? "checkpoint_state_indices" : "checkpoint_state",
                       (ll)c->rows, (ll)rows, (ll)c->every);
  }
  return check_slots("checkpoint_state_indices", &c->slots, c->slots.columns ? p->N : c->rows,
                     "checkpoint_state", c->state.slots);
}

fkda_status fkda_check_contents(const fkda_checker *checker) {
  const fkda_problem *p = checker->problem;
  fkda_status status;
  if (p->cu_seqlens.data &&
      (status = check_boundaries("cu_seqlens", &p->cu_seqlens, p->N, p->T, "T")))
    return status;
  if ((status = check_slots(checker->initial_indices, &p->initial_indices, p->N, checker->initial,
                            p->initial.slots)))
    return status;
  /* Decode may have one index tensor for both uses, and may write nothing. */
  const bool decode = p->op == FKDA_OP_DECODE,
             same = p->final_indices.data == p->initial_indices.data;
  const fkda_states *final = decode && !p->final.dtype ? &p->initial : &p->final;
  const char *name = decode && same ? checker->initial_indices : "final_state_indices";
  if (!(decode && same && final->slots == p->initial.slots) &&
      (status =
           check_slots(name, &p->final_indices, p->N,
                       final == &p->initial ? checker->initial : checker->final, final->slots)))
    return status;
  if ((status = check_accepted(p))) return status;
  return check_checkpoints(p);
}
