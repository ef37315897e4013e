/* A call as data: the argument structs of every operation behind one type, with their
 * tensors and options by name. What the case table, the command line's files and JSON share.
 *
 * Uses the public API only.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef FKDA_CASES_CALL_H
#define FKDA_CASES_CALL_H

#include <stdbool.h>

#include "flashkda/flashkda.h"

typedef union fkda_call {
  struct {
    FKDA_ARGS_HEADER;
  } header;
  fkda_prefill_args prefill;
  fkda_decode_args decode;
  fkda_summary_args summary;
  fkda_backward_args backward;
} fkda_call;

/* X(name): every tensor of every operation, by the name of its C field. */
#define FKDA_FIELD_LIST(X)                                                                         \
  X(q)                                                                                             \
  X(k)                                                                                             \
  X(v)                                                                                             \
  X(g)                                                                                             \
  X(beta)                                                                                          \
  X(A_log)                                                                                         \
  X(dt_bias)                                                                                       \
  X(cu_seqlens)                                                                                    \
  X(initial_state)                                                                                 \
  X(initial_state_indices)                                                                         \
  X(final_state_indices)                                                                           \
  X(has_initial_state)                                                                             \
  X(num_accepted_tokens)                                                                           \
  X(checkpoint_offsets)                                                                            \
  X(checkpoint_indptr)                                                                             \
  X(checkpoint_state_indices)                                                                      \
  X(d_out)                                                                                         \
  X(d_final_state)                                                                                 \
  X(out)                                                                                           \
  X(final_state)                                                                                   \
  X(checkpoint_state)                                                                              \
  X(state)                                                                                         \
  X(M)                                                                                             \
  X(b)                                                                                             \
  X(d_q)                                                                                           \
  X(d_k)                                                                                           \
  X(d_v)                                                                                           \
  X(d_g)                                                                                           \
  X(d_beta)                                                                                        \
  X(d_A_log)                                                                                       \
  X(d_dt_bias)                                                                                     \
  X(d_initial_state)

typedef enum fkda_field {
#define FKDA_FIELD_ENUM(name) FKDA_FIELD_##name,
  FKDA_FIELD_LIST(FKDA_FIELD_ENUM)
#undef FKDA_FIELD_ENUM
      FKDA_FIELDS
} fkda_field;

#define FKDA_FIRST_OUTPUT FKDA_FIELD_out /* outputs are the last of the list; state is in and out */

const char *fkda_field_name(fkda_field field);
/** The field of that name; FKDA_FIELDS if there is none. */
fkda_field fkda_field_of(const char *name);

/** Defaults of the operation; false if `op` has no struct here. */
bool fkda_call_init(fkda_call *call, int32_t op);
/** A tensor of the call; NULL if the operation has no such field. */
fkda_tensor *fkda_call_tensor(fkda_call *call, fkda_field field);
const fkda_tensor *fkda_call_tensor_const(const fkda_call *call, fkda_field field);
/** Is the tensor there? */
bool fkda_call_has(const fkda_call *call, fkda_field field);
fkda_status fkda_call_run(const fkda_call *call);
/** Name of an operation ("prefill") and back; NULL and 0 for what is unknown. */
const char *fkda_op_name(int32_t op);
int32_t fkda_op_of(const char *name);

/** Options by name, as text: gate (bounded|softplus|direct), l2norm, beta_is_logit, allow_neg_eigval,
 *  lower_bound, scale, state_layout (vk|kv), write_state, checkpoint_every, checkpoint_before,
 *  batch_invariant. Booleans read 0, 1, false and true. Returns false with a message on a bad value
 *  or an option that the operation does not have. */
bool fkda_call_set(fkda_call *call, const char *name, const char *value, char *error,
                   size_t capacity);
/** The index-th option's name and value as text; NULL past the end, "" in *text if the operation
 *  lacks it. */
const char *fkda_call_option(const fkda_call *call, int index, char *text, size_t capacity);
/** Is that the name of an option, and of a boolean one? */
bool fkda_option_exists(const char *name, bool *boolean);

int32_t fkda_call_layout(const fkda_call *call);

/* ---- elements ------------------------------------------------------------------------------- */

int64_t fkda_tensor_elements(const fkda_tensor *tensor);
/** Bytes from the first to past the last element. */
size_t fkda_tensor_extent(const fkda_tensor *tensor);
/** One element to and from double; conversion to bf16 and f16 rounds to nearest even. `offset` counts
 *  elements. */
double fkda_load(const void *data, int32_t dtype, int64_t offset);
void fkda_store(void *data, int32_t dtype, int64_t offset, double value);
/** The tensor's elements in row-major order to contiguous doubles. */
void fkda_gather(const fkda_tensor *tensor, double *out);
/** The tensor's raw elements in row-major order. */
void fkda_gather_bytes(const fkda_tensor *tensor, void *out);
/** Visits element offsets in row-major order. */
typedef struct fkda_walk {
  int64_t index[FKDA_MAX_DIMS];
  int64_t offset;
} fkda_walk;
void fkda_walk_step(fkda_walk *walk, const fkda_tensor *tensor);

/** A view of `count` entries from `first` of one dimension. */
fkda_tensor fkda_slice(fkda_tensor tensor, int32_t dimension, int64_t first, int64_t count);

#endif
