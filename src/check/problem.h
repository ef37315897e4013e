/* A validated call: what check hands to plan, run and the backends.
 *
 * Everything is resolved here once (defaults, strides, who is absent, which of two index tensors serves
 * both purposes), so that no backend looks at the public structs again. Absent tensors have data
 * NULL and dtype FKDA_NONE. In queries only dtype tells presence: data pointers are NULL but for those of
 * rows, which are what the caller gave, NULL or not, and tell alignment.
 */
#ifndef FKDA_CHECK_PROBLEM_H
#define FKDA_CHECK_PROBLEM_H

#include <stdbool.h>

#include "flashkda/flashkda.h"

/* Tokens that every chunked backend may split at; checkpoint offsets are multiples of it. */
#define FKDA_CHUNK_MULTIPLE 16
#define FKDA_MAX_DIM 256         /* K and V */
#define FKDA_DECODE_MAX_TOKENS 8 /* T of decode */
#define FKDA_GATE_CLAMP (-100.0) /* a token's log-decay, DESIGN "Numerics that must hold" */
#define FKDA_L2NORM_EPS 1e-6     /* (1) */

/* B*T*HV and N*HV, a 0 among them counted as 1, are at most this. Products of them with K, V, K*V and an
 * element size, and every tensor's extent in bytes, therefore fit 63 bits. */
#define FKDA_MAX_ROWS (INT64_C(1) << 40)

/* q, k, v, g, out: [B,T,heads,dim], dim contiguous. beta: [B,T,HV], element (b,t,h). */
typedef struct fkda_rows {
  void *data;
  int32_t dtype;
  int64_t stride_b, stride_t, stride_h; /* elements */
} fkda_rows;

/* A vector. A_log, dt_bias, cu_seqlens and checkpoint_indptr are contiguous; the [N] tensors
 * has_initial and num_accepted_tokens may be strided. Strides of dimensions that have at most one
 * element, and all strides of an empty tensor, are 0 here and in every struct below. */
typedef struct fkda_vector {
  void *data;
  int32_t dtype;
  int64_t stride; /* elements */
} fkda_vector;

/* States: [slots,HV,rows,cols], cols contiguous; rows x cols is V x K or K x V by layout. */
typedef struct fkda_states {
  void *data;
  int32_t dtype;
  int64_t slots;
  int64_t stride_slot, stride_head, stride_row; /* elements */
} fkda_states;

/* Slot numbers, [N] (columns = 0) or [N,columns]. */
typedef struct fkda_indices {
  void *data;
  int32_t dtype; /* FKDA_I32 or FKDA_I64; FKDA_NONE: sequence n uses slot n */
  int64_t columns;
  int64_t stride_n, stride_column;
} fkda_indices;

typedef enum fkda_checkpoint_mode {
  FKDA_CHECKPOINT_NONE,
  FKDA_CHECKPOINT_OFFSETS, /* [N,C] */
  FKDA_CHECKPOINT_PACKED,  /* [R] with indptr */
  FKDA_CHECKPOINT_EVERY,
} fkda_checkpoint_mode;

typedef struct fkda_checkpoints {
  fkda_checkpoint_mode mode;
  fkda_states state;    /* for OFFSETS without indices: stride_slot advances by one checkpoint and
                        * stride_n by one sequence; elsewhere rows are numbered 0..R-1 */
  int64_t stride_n;     /* OFFSETS without indices only, elements; as stride_slot for [N] offsets */
  int64_t rows;         /* R, or N*C; by interval R may exceed the rows that the lengths make */
  int64_t per_sequence; /* C, OFFSETS only; 1 for [N] offsets */
  fkda_indices offsets; /* OFFSETS: [N,C] as columns = C, [N] as 0. PACKED: [R] as columns = 0 */
  fkda_vector indptr;   /* PACKED */
  fkda_indices slots;   /* checkpoint_state_indices; dtype FKDA_NONE: row r goes to its own place */
  int64_t every;
  bool before;
} fkda_checkpoints;

typedef struct fkda_problem {
  fkda_op op;
  int32_t device_type, device_id;
  void *stream;
  const char *backend; /* as in the args; never from the environment */
  void *workspace;
  size_t workspace_size;

  int64_t B, T, N, H, HV, K, V;
  int32_t io_dtype;
  fkda_rows q, k, v, g, beta, out; /* summary: q and out absent. beta.stride_h may be any */

  fkda_gate gate;
  bool l2norm, beta_is_logit, allow_neg_eigval, batch_invariant;
  double lower_bound, scale;  /* scale resolved: K^-1/2 already filled in */
  fkda_vector A_log, dt_bias; /* [HV], [HV,K] contiguous; data NULL and dtype FKDA_NONE: 0 */

  fkda_vector cu_seqlens; /* absent: sequence n is batch row n, N = B */

  fkda_state_layout layout;
  fkda_states initial, final; /* decode: mostly the same pool; final absent if write_state is 0 */
  fkda_indices initial_indices,
      final_indices;               /* decode: both set if one is, also if final is absent */
  fkda_vector has_initial;         /* bool [N] */
  fkda_vector num_accepted_tokens; /* decode, two-dimensional indices */

  fkda_checkpoints checkpoints;

  fkda_states summary_M, summary_b; /* summary: [N,HV,K,K] f32 and [N,HV,V,K] (layout) f32 */

  /* backward; absent ones are not wanted (d_out, d_final: zero). `checkpoints` is an input there. */
  fkda_rows d_out, d_q, d_k, d_v, d_g, d_beta;
  fkda_states d_initial, d_final;
  fkda_vector d_A_log, d_dt_bias; /* [HV], [HV,K] contiguous */
} fkda_problem;

/* One sequence's place: batch row b, tokens [begin, begin + length). */
typedef struct fkda_span {
  int64_t b, begin, length;
} fkda_span;

#ifdef __CUDACC__
#define FKDA_HOST_DEVICE __host__ __device__
#else
#define FKDA_HOST_DEVICE
#endif

FKDA_HOST_DEVICE static inline int64_t fkda_int_at(const void *data, int32_t dtype, int64_t i) {
  return dtype == FKDA_I64 ? ((const int64_t *)data)[i] : ((const int32_t *)data)[i];
}

/* These read tensor memory: on the host, of the CPU backends and checks only. */
FKDA_HOST_DEVICE static inline fkda_span fkda_span_of(const fkda_problem *p, int64_t n) {
  fkda_span span = {n, 0, p->T};
  if (p->cu_seqlens.data) {
    span.b = 0;
    span.begin = fkda_int_at(p->cu_seqlens.data, p->cu_seqlens.dtype, n);
    span.length = fkda_int_at(p->cu_seqlens.data, p->cu_seqlens.dtype, n + 1) - span.begin;
  }
  return span;
}

FKDA_HOST_DEVICE static inline int64_t fkda_index_of(const fkda_indices *x, int64_t n,
                                                     int64_t column) {
  if (!x->data) return n;
  return fkda_int_at(x->data, x->dtype,
                     n * x->stride_n + (x->columns ? column * x->stride_column : 0));
}

/* Validation (check.c). op: the fkda_op of the entry point, or FKDA_ANY_OP. for_run: also data pointers,
 * the workspace, overlap and, on the CPU, the contents of cu_seqlens, indices and offsets. On failure
 * the status is returned and the thread's detail message set. */
#define FKDA_ANY_OP 0
fkda_status fkda_check(const void *args, int32_t op, bool for_run, fkda_problem *problem);

/* The workspace against what the plan needs: a run's last check. */
fkda_status fkda_check_workspace(const fkda_problem *problem, size_t needed);

/* Sets the thread's detail message and returns `status`. */
fkda_status fkda_fail(fkda_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#endif
