/* FlashKDA: Kimi Delta Attention, exact and fast, behind a plain C ABI.
 *
 * SPDX-License-Identifier: MIT
 *
 * This header is the specification. It compiles as C11 and as C++.
 *
 * MATHEMATICS (docs/math.md derives and numbers it)
 *
 *   q, k [B,T,H,K]   v, out [B,T,HV,V]   g [B,T,HV,K]   beta [B,T,HV]   S [N,HV,V,K]
 *   HV is a multiple of H: value head j reads q and k of head j*H/HV (grouped value attention).
 *
 *   (1) q <- q / sqrt(sum q^2 + 1e-6), k likewise                              (l2norm)
 *   (2) bounded   g <- lower_bound * sigmoid(exp(A_log) * (g + dt_bias))       lower_bound in [-5, 0)
 *       softplus  g <- -exp(A_log) * softplus(g + dt_bias)
 *       direct    g as given (natural logarithm of the decay, <= 0)
 *       A token's g is clamped to [-100, 0] in every form.
 *   (3) beta <- sigmoid(beta) (beta_is_logit), times 2 with allow_neg_eigval
 *   per token:
 *   (4) S <- S * diag(exp g)
 *   (5) u  = beta * (v - S k)
 *   (6) S <- S + u k^T
 *   (7) o  = scale * S q                                                       scale defaults to K^-1/2
 *
 *   Sources: Kimi Linear, arXiv 2510.26692; gated delta rule, arXiv 2412.06464.
 *
 * CONVENTIONS
 *
 * - Every entry point validates first. On any status but FKDA_OK nothing has been written, and
 *   fkda_last_error() names the argument, what it was and what is expected.
 * - Nothing here prints (unless FLASHKDA_LOG asks for it), exits, aborts or throws.
 * - All functions may be called from any thread, several at once.
 * - Tensors belong to the caller and must outlive the call (on CUDA: the work on the stream).
 *   Inputs are never written.
 * - A run never allocates device memory, never synchronises and never reads device memory on the
 *   host, so that every call can be captured in a CUDA graph.
 * - What lies in device memory cannot be validated by the host. The CPU backends check it
 *   (cu_seqlens, indices, offsets); the CUDA backends clamp cu_seqlens and skip indices out of range.
 * - Two sequences writing one state slot, or one reading what another writes, is undefined.
 *
 * ENVIRONMENT (read when a call is planned)
 *
 *   FLASHKDA_BACKEND      as the field `backend` below, for calls that leave it NULL
 *   FLASHKDA_CPU_ISA      scalar | avx2 | avx512 | neon: the only CPU instruction set to consider
 *   FLASHKDA_NUM_THREADS  size of the built-in CPU pool (default: the CPUs this process may use); read
 *                         once, when first needed
 *   FLASHKDA_LOG          plan: one line on stderr for every call's plan
 */
#ifndef FLASHKDA_FLASHKDA_H
#define FLASHKDA_FLASHKDA_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define FKDA_API __attribute__((visibility("default")))
#else
#define FKDA_API
#endif

/* ---- version -------------------------------------------------------------------------------- */

#define FKDA_VERSION_MAJOR 0
#define FKDA_VERSION_MINOR 1
#define FKDA_VERSION_PATCH 0

/** Version of the loaded library: major * 10000 + minor * 100 + patch. */
FKDA_API int32_t fkda_version(void);
/** The same as text, for example "0.1.0". Static storage. */
FKDA_API const char *fkda_version_string(void);

/* ---- status --------------------------------------------------------------------------------- */

/* X(name, value, text). Values are pinned: never changed, never reused. */
#define FKDA_STATUS_LIST(X)                                                                        \
  X(FKDA_OK, 0, "success")                                                                         \
  X(FKDA_ERROR_INVALID_ARGUMENT, 1, "invalid argument")                                            \
  X(FKDA_ERROR_INVALID_DTYPE, 2, "invalid dtype")                                                  \
  X(FKDA_ERROR_UNSUPPORTED, 3, "unsupported")                                                      \
  X(FKDA_ERROR_WORKSPACE, 4, "workspace too small")                                                \
  X(FKDA_ERROR_OUT_OF_MEMORY, 5, "out of host memory")                                             \
  X(FKDA_ERROR_NO_DEVICE, 6, "no usable device or driver")                                         \
  X(FKDA_ERROR_DEVICE, 7, "device error")                                                          \
  X(FKDA_ERROR_INTERNAL, 8, "internal error")

typedef enum fkda_status {
#define FKDA_STATUS_ENUM(name, value, text) name = value,
  FKDA_STATUS_LIST(FKDA_STATUS_ENUM)
#undef FKDA_STATUS_ENUM
} fkda_status;

/** Short text of a status; "unknown status" for a value this library does not know. Static storage. */
FKDA_API const char *fkda_status_string(fkda_status status);
/** Detail of the last call on this thread that did not return FKDA_OK, for example
 *  "k: shape [1,64,4,64], expected [1,64,4,128] to match q". Empty before the first. Valid until the
 *  thread's next failing call. */
FKDA_API const char *fkda_last_error(void);

/* ---- tensors -------------------------------------------------------------------------------- */

/* X(name, value, bytes, text). */
#define FKDA_DTYPE_LIST(X)                                                                         \
  X(FKDA_F32, 1, 4, "float32")                                                                     \
  X(FKDA_BF16, 2, 2, "bfloat16")                                                                   \
  X(FKDA_F16, 3, 2, "float16")                                                                     \
  X(FKDA_F64, 4, 8, "float64")                                                                     \
  X(FKDA_I32, 5, 4, "int32")                                                                       \
  X(FKDA_I64, 6, 8, "int64")                                                                       \
  X(FKDA_BOOL, 7, 1, "bool")

typedef enum fkda_dtype {
  FKDA_NONE = 0, /* the tensor is absent */
#define FKDA_DTYPE_ENUM(name, value, bytes, text) name = value,
  FKDA_DTYPE_LIST(FKDA_DTYPE_ENUM)
#undef FKDA_DTYPE_ENUM
} fkda_dtype;

/** Text of a dtype ("bfloat16"); "none" for FKDA_NONE, "unknown" otherwise. Static storage. */
FKDA_API const char *fkda_dtype_string(int32_t dtype);
/** Bytes of one element; 0 for FKDA_NONE and unknown values. */
FKDA_API size_t fkda_dtype_size(int32_t dtype);

#define FKDA_MAX_DIMS 5

/** A strided view of memory that the caller owns. An all-zero fkda_tensor is an absent tensor. */
typedef struct fkda_tensor {
  void *data;    /* first element, aligned to its size. May be NULL in queries, and if empty */
  int32_t dtype; /* fkda_dtype; FKDA_NONE: absent */
  int32_t ndim;  /* 1 to FKDA_MAX_DIMS */
  int64_t shape[FKDA_MAX_DIMS];  /* elements, >= 0 */
  int64_t stride[FKDA_MAX_DIMS]; /* in elements, >= 0; ignored where the shape is <= 1 */
} fkda_tensor;

/** A contiguous (row-major) view of `data` with the given shape; `ndim` entries are read. */
FKDA_API fkda_tensor fkda_tensor_contiguous(void *data, int32_t dtype, int32_t ndim,
                                            const int64_t *shape);

/* ---- options -------------------------------------------------------------------------------- */

/* Device numbers are DLPack's. */
typedef enum fkda_device_type { FKDA_DEVICE_CPU = 1, FKDA_DEVICE_CUDA = 2 } fkda_device_type;

typedef enum fkda_op {
  FKDA_OP_PREFILL = 1,
  FKDA_OP_DECODE = 2,
  FKDA_OP_SUMMARY = 3, /* experimental */
  FKDA_OP_BACKWARD = 4,
} fkda_op;

typedef enum fkda_gate {
  FKDA_GATE_BOUNDED = 0,  /* (2) with lower_bound, A_log, dt_bias */
  FKDA_GATE_SOFTPLUS = 1, /* (2) with A_log, dt_bias */
  FKDA_GATE_DIRECT = 2,   /* g is the log-decay itself; A_log and dt_bias must be absent */
} fkda_gate;

typedef enum fkda_state_layout {
  FKDA_STATE_VK = 0, /* a head's state is [V,K], K contiguous */
  FKDA_STATE_KV = 1, /* a head's state is [K,V], V contiguous */
} fkda_state_layout;

/* Every argument struct begins with these fields. Start from the struct's INIT macro, which sets
 * struct_size, op and the defaults; then fill in the rest. A caller compiled against an older header
 * passes a smaller struct_size and gets the defaults of the fields it does not know. */
#define FKDA_ARGS_HEADER                                                                           \
  uint32_t struct_size; /* sizeof of the struct as the caller knows it */                          \
  int32_t op;           /* fkda_op; set by INIT */                                                 \
  int32_t device_type;  /* fkda_device_type; default FKDA_DEVICE_CPU. All tensors live there */    \
  int32_t device_id;    /* CUDA ordinal; 0 for the CPU */                                          \
  void *stream;         /* CUstream / cudaStream_t; NULL: the legacy default stream. CPU: NULL */  \
  const char *backend;  /* NULL: best supported. "cpu": best CPU one. Else a name of */            \
                        /* fkda_backend_name(), which is then used or the call refused */          \
  void *workspace;      /* at least fkda_workspace_size() bytes on the device, 256-byte aligned */ \
                        /* (64 on the CPU). CPU only: NULL lets the call use host heap memory */   \
  size_t workspace_size /* bytes at workspace */

/* ---- prefill -------------------------------------------------------------------------------- */

/** Arguments of fkda_prefill(): chunked forward over whole sequences.
 *
 * Sizes: B >= 0, T >= 0, H >= 1, HV a multiple of H. K, V: 1..256 on the CPU, 64 or 128 each on CUDA.
 * B*T*HV and N*HV, zeros counted as ones, are at most 2^40.
 * N sequences: without cu_seqlens N = B, all of length T; with it B = 1 and N = len(cu_seqlens) - 1.
 * "io dtype" is the common dtype of q, k, v and out: bf16 everywhere; f16 and f32 on the CPU too.
 * The backend "reference" also takes f64 for any floating-point tensor.
 * Strides are free except that the innermost dimension of q, k, v, g, beta, out and of states is
 * contiguous. out must not overlap any input. */
typedef struct fkda_prefill_args {
  FKDA_ARGS_HEADER;

  fkda_tensor q;    /* [B,T,H,K]  io dtype */
  fkda_tensor k;    /* [B,T,H,K]  io dtype */
  fkda_tensor v;    /* [B,T,HV,V] io dtype */
  fkda_tensor g;    /* [B,T,HV,K] io dtype or f32: raw gate, or log-decay with FKDA_GATE_DIRECT */
  fkda_tensor beta; /* [B,T,HV]   io dtype or f32 */
  fkda_tensor out;  /* [B,T,HV,V] io dtype, written. Rows of no sequence stay untouched */

  int32_t gate;             /* fkda_gate; default FKDA_GATE_BOUNDED */
  int32_t l2norm;           /* (1); default 1 */
  int32_t beta_is_logit;    /* (3); default 1 */
  int32_t allow_neg_eigval; /* (3): 2 * sigmoid, so that beta reaches 2; default 0. Without
                             * beta_is_logit it changes nothing: beta is used as given */
  double lower_bound;       /* [-5,0), bounded gate only; default -5 */
  double scale;             /* (7); finite; default 0, which means K^-1/2 */
  fkda_tensor A_log;        /* HV elements of any shape, contiguous, f32 or bf16; absent: 0 */
  fkda_tensor dt_bias;      /* HV*K elements of any shape, contiguous, f32 or bf16; absent: 0 */

  fkda_tensor cu_seqlens; /* [N+1] i32 or i64 on the device, contiguous: 0 = c0 <= c1 <= ... <= T;
                           * empty sequences anywhere. Absent: N = B */

  /* States are bf16 or f32, each tensor on its own. Absent initial_state: zero. Absent final_state:
   * not stored. Without indices: [N,HV,V,K] ([N,HV,K,V] for FKDA_STATE_KV). With indices: a pool
   * [P,HV,V,K] of which sequence n reads or writes row index[n]; -1 in either skips the sequence
   * altogether: its out rows and slots stay untouched. The final state of an empty sequence is its
   * initial one. initial_state and final_state may be the same memory viewed alike (in place). */
  int32_t state_layout; /* fkda_state_layout of every state tensor; default FKDA_STATE_VK */
  int32_t reserved0;    /* 0 */
  fkda_tensor initial_state;
  fkda_tensor final_state;
  fkda_tensor initial_state_indices; /* [N] i32 or i64 */
  fkda_tensor final_state_indices;   /* [N] i32 or i64 */
  fkda_tensor has_initial_state; /* [N] bool: where 0, start from zero whatever the slot holds */

  /* Checkpoints: copies of the running state, stored to checkpoint_state (bf16, f16 or f32).
   * By offsets: the state after checkpoint_offsets tokens of its sequence, multiples of 16 in
   *   [0, length], -1 = none. Either checkpoint_offsets [N,C] with checkpoint_state [N,C,HV,V,K], or one
   *   a sequence: [N] with [N,HV,V,K], or packed: checkpoint_offsets [R] with checkpoint_indptr [N+1],
   *   contiguous, 0 = indptr[0] <= ... <= R (sequence n owns rows indptr[n] .. indptr[n+1]-1) and
   *   checkpoint_state [R,HV,V,K].
   * By interval: every checkpoint_every tokens (a multiple of 16), sum of ceil(length/every) rows in
   *   sequence order, checkpoint_state [R,HV,V,K] or [B,R/B,HV,V,K]. Row j of a sequence is the state
   *   before token j*every (checkpoint_before = 1), or after token min((j+1)*every, length). R may be
   *   larger than the sum; the rows beyond it stay untouched.
   * With checkpoint_state_indices (the shape of checkpoint_offsets, or [R] by interval) row r goes to
   *   slot index[r] of checkpoint_state [P,HV,V,K], -1 = not stored; checkpoint_state may then also be
   *   the memory of initial_state or final_state, viewed alike, with slots of its own. */
  fkda_tensor checkpoint_state;
  fkda_tensor checkpoint_offsets;       /* i32 or i64 */
  fkda_tensor checkpoint_indptr;        /* i32 or i64 */
  fkda_tensor checkpoint_state_indices; /* i32 or i64 */
  int64_t checkpoint_every;             /* 0: none */
  int32_t checkpoint_before;            /* with checkpoint_every */

  int32_t batch_invariant; /* 1: forbid plans by which a sequence's bits depend on its batch */
} fkda_prefill_args;

/** Prefill. Equations (1)-(7) in chunk form. Writes out, final_state and checkpoint_state.
 *  Errors: FKDA_ERROR_INVALID_ARGUMENT, _INVALID_DTYPE, _UNSUPPORTED, _WORKSPACE, _OUT_OF_MEMORY (CPU with
 *  workspace NULL), _NO_DEVICE, _DEVICE. */
FKDA_API fkda_status fkda_prefill(const fkda_prefill_args *args);

/* ---- decode --------------------------------------------------------------------------------- */

/** Arguments of fkda_decode(): T = 1 to 8 new tokens for each of N sequences, states in a pool.
 *  Fields as in fkda_prefill_args unless said otherwise. */
typedef struct fkda_decode_args {
  FKDA_ARGS_HEADER;

  fkda_tensor q;    /* [N,T,H,K] */
  fkda_tensor k;    /* [N,T,H,K] */
  fkda_tensor v;    /* [N,T,HV,V] */
  fkda_tensor g;    /* [N,T,HV,K] */
  fkda_tensor beta; /* [N,T,HV] */
  fkda_tensor out;  /* [N,T,HV,V], written */

  int32_t gate;
  int32_t l2norm;
  int32_t beta_is_logit;
  int32_t allow_neg_eigval;
  double lower_bound;
  double scale;
  fkda_tensor A_log;
  fkda_tensor dt_bias;

  /* The pool, read and written in place: [N,HV,V,K] without indices, else [P,HV,V,K].
   * One-dimensional indices [N]: sequence n starts from row initial[n], and its state after the last
   * token goes to row final[n]. Two-dimensional [N,M], M >= T (speculative decoding): sequence n
   * starts from row initial[n][num_accepted_tokens[n] - 1], and its state after token t goes to row
   * final[n][t]; -1 there leaves that state unstored. -1 as the start row, or as a one-dimensional
   * final row, skips the sequence: out rows and slots stay untouched. One of the two index tensors
   * alone serves both purposes. */
  int32_t state_layout;
  int32_t write_state; /* default 1; 0 leaves the pool as it is (output-only verification) */
  fkda_tensor state;
  fkda_tensor initial_state_indices; /* [N] or [N,M], i32 or i64 */
  fkda_tensor final_state_indices;   /* [N] or [N,M], i32 or i64 */
  fkda_tensor has_initial_state;     /* [N] bool */
  fkda_tensor num_accepted_tokens; /* [N] i32 or i64 in 1..M, with [N,M] indices only; absent: 1 */

  int32_t batch_invariant;
  int32_t reserved0; /* 0 */

  /* Absent: sequences start from rows of `state`. Present: from rows of this tensor, of the same form and
   * under the same indices, but with a dtype and a number of slots of its own; `state` is then only
   * written, and may be absent if write_state is 0. May be the same memory viewed alike. */
  fkda_tensor initial_state;
} fkda_decode_args;

/** Decode. The token recurrence (1)-(7). Writes out and, unless write_state is 0, state.
 *  Errors as fkda_prefill(). */
FKDA_API fkda_status fkda_decode(const fkda_decode_args *args);

/* ---- summary (experimental: may change or go in any release) -------------------------------- */

/** Arguments of fkda_summary(): the affine map S_out = S_in M + b of each sequence's tokens, what
 *  context parallelism exchanges between devices. Fields as in fkda_prefill_args. */
typedef struct fkda_summary_args {
  FKDA_ARGS_HEADER;

  fkda_tensor k;    /* [B,T,H,K] */
  fkda_tensor v;    /* [B,T,HV,V] */
  fkda_tensor g;    /* [B,T,HV,K] */
  fkda_tensor beta; /* [B,T,HV] */

  int32_t gate;
  int32_t l2norm;
  int32_t beta_is_logit;
  int32_t allow_neg_eigval;
  double lower_bound;
  fkda_tensor A_log;
  fkda_tensor dt_bias;
  fkda_tensor cu_seqlens;

  fkda_tensor M;        /* [N,HV,K,K] f32, written: row index multiplies S_in's K */
  fkda_tensor b;        /* [N,HV,V,K] f32, written ([N,HV,K,V] for FKDA_STATE_KV) */
  int32_t state_layout; /* of b */
  int32_t reserved0;    /* 0 */
} fkda_summary_args;

/** Summary. Errors as fkda_prefill(). Experimental. */
FKDA_API fkda_status fkda_summary(const fkda_summary_args *args);

/* ---- backward ------------------------------------------------------------------------------- */

/** Arguments of fkda_backward(): gradients of a prefill, docs/math.md "Gradients". Inputs and options are
 *  those of the fkda_prefill_args whose gradients are wanted: fields of the same name mean the same.
 *
 *  With L the loss, the caller passes dL/d(out) and dL/d(final_state) and receives the derivatives by what
 *  the prefill was given: by the raw q, k, g and beta, through (1)-(3), not by what these become. A gradient
 *  is computed only if its tensor is present, and is overwritten, not added to. Where a token's g is
 *  clamped, nothing flows to g, A_log and dt_bias.
 *
 *  Nothing of the prefill but its inputs is needed: states on the way are computed again, from
 *  checkpoint_state where the caller has kept them, else from initial_state.
 *
 *  With grouped value heads d_q and d_k of a head are sums over its group. d_A_log and d_dt_bias are sums over
 *  all sequences. All sums are taken in a fixed order: results depend neither on the number of threads
 *  nor on the run. */
typedef struct fkda_backward_args {
  FKDA_ARGS_HEADER;

  fkda_tensor q;
  fkda_tensor k;
  fkda_tensor v;
  fkda_tensor g;
  fkda_tensor beta;

  int32_t gate;
  int32_t l2norm;
  int32_t beta_is_logit;
  int32_t allow_neg_eigval;
  double lower_bound;
  double scale;
  fkda_tensor A_log;
  fkda_tensor dt_bias;
  fkda_tensor cu_seqlens;
  int32_t state_layout;      /* of every state and state gradient */
  int32_t reserved0;         /* 0 */
  fkda_tensor initial_state; /* [N,HV,V,K] bf16 or f32; absent: zero */

  /* States that the prefill stored with checkpoint_every and checkpoint_before = 1: [R,HV,V,K] or
   * [B,R/B,HV,V,K], bf16, f16 or f32, where row j of a sequence is the state before token j*every. Saves
   * computing them again; with rounded ones the gradients are those of a prefill that rounds there. The CUDA
   * backends have no use for them and compute their own. */
  fkda_tensor checkpoint_state;
  int64_t checkpoint_every; /* a multiple of 16; 0 without checkpoint_state */

  fkda_tensor d_out;         /* [B,T,HV,V] io dtype or f32; absent: 0 */
  fkda_tensor d_final_state; /* [N,HV,V,K] bf16 or f32; absent: 0 */

  /* Written, each in the shape of what it belongs to, innermost dimension contiguous. Rows of no sequence
   * stay untouched. None may overlap any other tensor. */
  fkda_tensor d_q;             /* [B,T,H,K]  io dtype or f32 */
  fkda_tensor d_k;             /* [B,T,H,K]  io dtype or f32 */
  fkda_tensor d_v;             /* [B,T,HV,V] io dtype or f32 */
  fkda_tensor d_g;             /* [B,T,HV,K] io dtype or f32 */
  fkda_tensor d_beta;          /* [B,T,HV]   io dtype or f32 */
  fkda_tensor d_A_log;         /* [HV] f32; absent with the direct gate */
  fkda_tensor d_dt_bias;       /* [HV,K] f32; absent with the direct gate */
  fkda_tensor d_initial_state; /* [N,HV,V,K] bf16 or f32, whether or not initial_state is there */
} fkda_backward_args;

/** Backward. Writes the gradients asked for. The backend "reference" also takes f64 for any floating-point
 *  tensor. Errors as fkda_prefill(). */
FKDA_API fkda_status fkda_backward(const fkda_backward_args *args);

/* ---- initialisers --------------------------------------------------------------------------- */

#define FKDA_PREFILL_ARGS_DEFAULTS(a)                                                              \
  ((a).struct_size = (uint32_t)sizeof(fkda_prefill_args), (a).op = FKDA_OP_PREFILL,                \
   (a).device_type = FKDA_DEVICE_CPU, (a).l2norm = 1, (a).beta_is_logit = 1, (a).lower_bound = -5)
#define FKDA_DECODE_ARGS_DEFAULTS(a)                                                               \
  ((a).struct_size = (uint32_t)sizeof(fkda_decode_args), (a).op = FKDA_OP_DECODE,                  \
   (a).device_type = FKDA_DEVICE_CPU, (a).l2norm = 1, (a).beta_is_logit = 1, (a).lower_bound = -5, \
   (a).write_state = 1)
#define FKDA_SUMMARY_ARGS_DEFAULTS(a)                                                              \
  ((a).struct_size = (uint32_t)sizeof(fkda_summary_args), (a).op = FKDA_OP_SUMMARY,                \
   (a).device_type = FKDA_DEVICE_CPU, (a).l2norm = 1, (a).beta_is_logit = 1, (a).lower_bound = -5)
#define FKDA_BACKWARD_ARGS_DEFAULTS(a)                                                             \
  ((a).struct_size = (uint32_t)sizeof(fkda_backward_args), (a).op = FKDA_OP_BACKWARD,              \
   (a).device_type = FKDA_DEVICE_CPU, (a).l2norm = 1, (a).beta_is_logit = 1, (a).lower_bound = -5)

/* fkda_prefill_args args = FKDA_PREFILL_ARGS_INIT; in C and in C++. */
#define FKDA_DEFINE_ARGS_INIT(type, DEFAULTS)                                                      \
  static inline type type##_init(void) {                                                           \
    type args;                                                                                     \
    memset(&args, 0, sizeof args);                                                                 \
    DEFAULTS(args);                                                                                \
    return args;                                                                                   \
  }
FKDA_DEFINE_ARGS_INIT(fkda_prefill_args, FKDA_PREFILL_ARGS_DEFAULTS)
FKDA_DEFINE_ARGS_INIT(fkda_decode_args, FKDA_DECODE_ARGS_DEFAULTS)
FKDA_DEFINE_ARGS_INIT(fkda_summary_args, FKDA_SUMMARY_ARGS_DEFAULTS)
FKDA_DEFINE_ARGS_INIT(fkda_backward_args, FKDA_BACKWARD_ARGS_DEFAULTS)
#undef FKDA_DEFINE_ARGS_INIT
#define FKDA_PREFILL_ARGS_INIT fkda_prefill_args_init()
#define FKDA_DECODE_ARGS_INIT fkda_decode_args_init()
#define FKDA_SUMMARY_ARGS_INIT fkda_summary_args_init()
#define FKDA_BACKWARD_ARGS_INIT fkda_backward_args_init()

/* ---- questions about a call ----------------------------------------------------------------- */

/* `args` points to any of the argument structs above. These validate like the run itself, but ignore
 * the workspace and what lies in memory: shapes, strides, dtypes and options decide, and on CUDA devices the
 * alignment of data pointers that are not NULL, which may decide which backend it is. */

/** FKDA_OK if the call would run; else the status and fkda_last_error() that it would give. */
FKDA_API fkda_status fkda_query(const void *args);

/** Bytes of workspace that the call needs, to *bytes (0 is possible). Monotone in B, T, H, HV, N:
 *  a buffer sized once for the largest batch serves every smaller one. */
FKDA_API fkda_status fkda_workspace_size(const void *args, size_t *bytes);

/** What would run. Set struct_size before the call. */
typedef struct fkda_plan_info {
  uint32_t struct_size; /* sizeof(fkda_plan_info) */
  int32_t chunk;        /* tokens a chunk; splitting a sequence at a multiple of it, carrying an f32
                         * state, gives the one-shot result bit for bit. 1 for token recurrences */
  int32_t threads;      /* CPU: threads that would work. CUDA: blocks */
  int32_t value_split;  /* parts into which V is split over tasks */
  int64_t tasks;        /* independent pieces of work */
  size_t workspace_size;
  const char *backend; /* static storage */
} fkda_plan_info;
FKDA_API fkda_status fkda_plan(const void *args, fkda_plan_info *info);

/** Prints the plan as text: the backend chosen and why, and for every other candidate why not. Writes at
 *  most `capacity` bytes with a final NUL (buffer may be NULL if capacity is 0) and, if length is not
 *  NULL, the length that the whole text has without the NUL. */
FKDA_API fkda_status fkda_plan_describe(const void *args, char *buffer, size_t capacity,
                                        size_t *length);

/* ---- backends, threads, start-up ------------------------------------------------------------ */

/** Name of the index-th backend of this build in order of preference, "reference" last; NULL past the
 *  end. Static storage. */
FKDA_API const char *fkda_backend_name(int32_t index);
/** FKDA_OK if this machine can run the backend, else FKDA_ERROR_UNSUPPORTED or _NO_DEVICE with the reason in
 *  fkda_last_error(). FKDA_ERROR_INVALID_ARGUMENT for an unknown name. */
FKDA_API fkda_status fkda_backend_available(const char *name);

/** One piece of parallel work; index in [0, count). */
typedef void (*fkda_task_fn)(void *task_arg, int32_t index);
/** Must call task(task_arg, i) once for every i in [0, count), from any threads, concurrently or not,
 *  and return after all have returned. */
typedef void (*fkda_parallel_for_fn)(void *context, int32_t count, fkda_task_fn task,
                                     void *task_arg);
/** Replaces the built-in pool of the CPU backends by the caller's for all later calls of the process;
 *  `num_threads` >= 1 bounds count. NULL restores the built-in pool (num_threads is then ignored).
 *  Results do not depend on it. */
FKDA_API fkda_status fkda_set_parallel_for(fkda_parallel_for_fn parallel_for, void *context,
                                           int32_t num_threads);
/** Sets the number of threads of the built-in pool, the caller's included (1..1024; 0: the default). */
FKDA_API fkda_status fkda_set_num_threads(int32_t num_threads);
/** Threads that CPU calls may use now. */
FKDA_API int32_t fkda_num_threads(void);

/** Does ahead of time what the first call on a device would do: starts the CPU pool, loads the CUDA
 *  module. Call it before capturing a CUDA graph. */
FKDA_API fkda_status fkda_warmup(int32_t device_type, int32_t device_id);

#ifdef __cplusplus
}
#endif

#endif /* FLASHKDA_FLASHKDA_H */
