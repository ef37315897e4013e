/* Validation through the public API: every refusal with its words, nothing written by any of them
 * (case 22), and the unusual calls that must be taken. */
#include <math.h>

#include "args.h"
#include "check/checker.h"

#define INVALID FKDA_ERROR_INVALID_ARGUMENT
#define DTYPE FKDA_ERROR_INVALID_DTYPE

/* make() is one of the valid calls of args.h; the statements then break `a`.
 * REFUSED: by a query too. REFUSED_IN_RUN: only a run sees it. TAKEN: still valid. */
#define REFUSED(make, status, message, ...)                                                        \
  do {                                                                                             \
    __auto_type a = make();                                                                        \
    __VA_ARGS__;                                                                                   \
    expect_failure(&a, true, status, message, __FILE__, __LINE__);                                 \
  } while (0)
#define REFUSED_IN_RUN(make, status, message, ...)                                                 \
  do {                                                                                             \
    __auto_type a = make();                                                                        \
    __VA_ARGS__;                                                                                   \
    expect_failure(&a, false, status, message, __FILE__, __LINE__);                                \
  } while (0)
#define TAKEN(make, ...)                                                                           \
  do {                                                                                             \
    __auto_type a = make();                                                                        \
    __VA_ARGS__;                                                                                   \
    expect_success(&a, __FILE__, __LINE__);                                                        \
  } while (0)

static void test_valid_calls(void **state) {
  (void)state;
  const fkda_tensor none = {0};
  TAKEN(plain_prefill, (void)a);
  TAKEN(ragged_prefill, (void)a);
  TAKEN(plain_decode, (void)a);
  TAKEN(speculative_decode, (void)a);
  TAKEN(plain_summary, (void)a);
  TAKEN(plain_backward, (void)a);
  TAKEN(plain_backward, a.d_out = none); /* zero, as what no loss depends on has */
  TAKEN(plain_backward, (a.d_q = a.d_beta = a.d_dt_bias = none));
}

/* ---- the struct itself ---- */

static void test_struct_size(void **state) {
  (void)state;
  REFUSED(plain_prefill, INVALID, "struct_size: 0, expected at least 48 (use the INIT macro)",
          a.struct_size = 0);
  REFUSED(plain_prefill, INVALID, "struct_size: 47, expected at least 48 (use the INIT macro)",
          a.struct_size = 47);

  /* an older caller: what it does not know keeps its default, whatever lies behind the struct */
  fkda_prefill_args a = plain_prefill();
  memset(&a.checkpoint_every, 0x5a, sizeof a - offsetof(fkda_prefill_args, checkpoint_every));
  a.struct_size = offsetof(fkda_prefill_args, checkpoint_every);
  expect_success(&a, __FILE__, __LINE__);
  fkda_decode_args d = plain_decode(); /* before write_state there was one default: 1 */
  d.initial_state_indices = (fkda_tensor){0};
  memset(&d.write_state, 0x5a, sizeof d - offsetof(fkda_decode_args, write_state));
  d.struct_size = offsetof(fkda_decode_args, write_state);
  expect_failure(&d, true, INVALID, "state: absent, expected a tensor [N,HV,V,K]", __FILE__,
                 __LINE__);

  /* a newer caller: fields beyond ours must be zero */
  struct {
    fkda_prefill_args args;
    char more[24];
  } newer;
  memset(&newer, 0, sizeof newer);
  newer.args = plain_prefill();
  newer.args.struct_size = sizeof newer;
  expect_success(&newer, __FILE__, __LINE__);
  newer.args = plain_prefill();
  newer.args.struct_size = sizeof newer;
  newer.more[23] = 1;
  char message[200];
  snprintf(message, sizeof message,
           "struct_size: %u with options set beyond byte %u, expected none that this library (%s) "
           "does not know",
           (unsigned)sizeof newer, (unsigned)sizeof newer.args, fkda_version_string());
  expect_failure(&newer, true, INVALID, message, __FILE__, __LINE__);
}

static void test_header(void **state) {
  (void)state;
  REFUSED(plain_prefill, INVALID, "device_type: 7, expected 1 (CPU) or 2 (CUDA)",
          a.device_type = 7);
  REFUSED(plain_prefill, INVALID, "device_id: 1, expected 0 on the CPU", a.device_id = 1);
  REFUSED(plain_prefill, INVALID, "device_id: -1, expected at least 0",
          (a.device_type = FKDA_DEVICE_CUDA, a.device_id = -1));
  REFUSED(plain_prefill, INVALID, "stream: *, expected NULL on the CPU", a.stream = &a);
  if (!cuda_in_build())
    REFUSED(plain_prefill, FKDA_ERROR_UNSUPPORTED,
            "device_type: CUDA, expected CPU (this build has no kernels for CUDA)",
            a.device_type = FKDA_DEVICE_CUDA);
  REFUSED(plain_prefill, INVALID, "reserved0: 1, expected 0", a.reserved0 = 1);
  REFUSED(plain_decode, INVALID, "reserved0: 1, expected 0", a.reserved0 = 1);
  REFUSED(plain_summary, INVALID, "reserved0: 1, expected 0", a.reserved0 = 1);
  REFUSED(plain_backward, INVALID, "reserved0: 1, expected 0", a.reserved0 = 1);
}

static void test_options(void **state) {
  (void)state;
  REFUSED(plain_prefill, INVALID, "gate: 3, expected 0 (bounded), 1 (softplus) or 2 (direct)",
          a.gate = 3);
  REFUSED(plain_prefill, INVALID, "gate: -1, expected 0 (bounded), 1 (softplus) or 2 (direct)",
          a.gate = -1);
  REFUSED(plain_prefill, INVALID, "l2norm: 2, expected 0 or 1", a.l2norm = 2);
  REFUSED(plain_prefill, INVALID, "beta_is_logit: -1, expected 0 or 1", a.beta_is_logit = -1);
  REFUSED(plain_decode, INVALID, "allow_neg_eigval: 2, expected 0 or 1", a.allow_neg_eigval = 2);
  REFUSED(plain_prefill, INVALID, "batch_invariant: 2, expected 0 or 1", a.batch_invariant = 2);
  REFUSED(plain_decode, INVALID, "batch_invariant: 2, expected 0 or 1", a.batch_invariant = 2);
  REFUSED(plain_decode, INVALID, "write_state: 2, expected 0 or 1", a.write_state = 2);
  REFUSED(plain_prefill, INVALID, "state_layout: 2, expected 0 (V,K) or 1 (K,V)",
          a.state_layout = 2);
  REFUSED(plain_summary, INVALID, "state_layout: -1, expected 0 (V,K) or 1 (K,V)",
          a.state_layout = -1);

  REFUSED(plain_prefill, INVALID, "lower_bound: 0, expected a number in [-5,0)", a.lower_bound = 0);
  REFUSED(plain_prefill, INVALID, "lower_bound: -5.001, expected a number in [-5,0)",
          a.lower_bound = -5.001);
  REFUSED(plain_prefill, INVALID, "lower_bound: *nan, expected a number in [-5,0)",
          a.lower_bound = NAN);
  TAKEN(plain_prefill, a.lower_bound = -1e-30);
  TAKEN(plain_prefill, (a.gate = FKDA_GATE_SOFTPLUS, a.lower_bound = NAN));
  REFUSED(plain_prefill, INVALID, "scale: inf, expected a finite number", a.scale = INFINITY);
  REFUSED(plain_decode, INVALID, "scale: *nan, expected a finite number", a.scale = NAN);
  TAKEN(plain_prefill, a.scale = -2);
}

/* ---- tensors ---- */

static void test_presence(void **state) {
  (void)state;
  const fkda_tensor none = {0};
  REFUSED(plain_prefill, INVALID, "q: absent, expected a tensor [B,T,H,K]", a.q = none);
  REFUSED(plain_decode, INVALID, "q: absent, expected a tensor [N,T,H,K]", a.q = none);
  REFUSED(plain_prefill, INVALID, "k: absent, expected a tensor [B,T,H,K]", a.k = none);
  REFUSED(plain_prefill, INVALID, "v: absent, expected a tensor [B,T,HV,V]", a.v = none);
  REFUSED(plain_prefill, INVALID, "g: absent, expected a tensor [B,T,HV,K]", a.g = none);
  REFUSED(plain_prefill, INVALID, "beta: absent, expected a tensor [B,T,HV]", a.beta = none);
  REFUSED(plain_prefill, INVALID, "out: absent, expected a tensor [B,T,HV,V]", a.out = none);
  REFUSED(plain_decode, INVALID, "state: absent, expected a tensor [P,HV,V,K]", a.state = none);
  REFUSED(plain_summary, INVALID, "k: absent, expected a tensor [B,T,H,K]", a.k = none);
  REFUSED(plain_summary, INVALID, "M: absent, expected a tensor [N,HV,K,K]", a.M = none);
  REFUSED(plain_summary, INVALID, "b: absent, expected a tensor [N,HV,V,K]", a.b = none);
  REFUSED(plain_backward, INVALID,
          "checkpoint_state: absent, expected a tensor with checkpoint_every",
          a.checkpoint_every = 16);
  REFUSED(plain_backward, INVALID,
          "checkpoint_state: given, expected none without checkpoint_every",
          a.checkpoint_state = INPUT(FKDA_F32, 2, HV, V, K));
  REFUSED(plain_backward, INVALID, "checkpoint_every: 8, expected 0 or a multiple of 16",
          a.checkpoint_every = 8);
  REFUSED(plain_prefill, DTYPE,
          "A_log: dtype none with ndim 1, expected a dtype (an absent tensor is all zero)",
          a.A_log.dtype = FKDA_NONE);
  REFUSED_IN_RUN(plain_prefill, DTYPE,
                 "A_log: dtype none with data, expected a dtype (an absent tensor is all zero)",
                 (a.A_log.dtype = FKDA_NONE, a.A_log.ndim = 0));
  TAKEN(plain_prefill, (a.A_log = a.dt_bias = a.initial_state = a.final_state = none));
}

static void test_dtypes(void **state) {
  (void)state;
  REFUSED(plain_prefill, DTYPE, "q: dtype int32, expected float32, bfloat16 or float16",
          a.q.dtype = FKDA_I32);
  REFUSED(plain_prefill, DTYPE, "q: dtype 99 (unknown), expected float32, bfloat16 or float16",
          a.q.dtype = 99);
  REFUSED(plain_prefill, DTYPE, "q: dtype -1 (unknown), expected float32, bfloat16 or float16",
          a.q.dtype = -1);
  REFUSED(plain_prefill, DTYPE,
          "q: dtype float64, expected float32, bfloat16 or float16, or backend \"reference\"",
          a.q.dtype = FKDA_F64);
  REFUSED(plain_prefill, DTYPE, "k: dtype float32, expected bfloat16 (the dtype of q)",
          a.k.dtype = FKDA_F32);
  REFUSED(plain_prefill, DTYPE, "v: dtype float16, expected bfloat16 (the dtype of q)",
          a.v.dtype = FKDA_F16);
  REFUSED(plain_prefill, DTYPE, "g: dtype int32, expected bfloat16 (the dtype of q) or float32",
          a.g.dtype = FKDA_I32);
  REFUSED(plain_prefill, DTYPE,
          "beta: dtype float16, expected bfloat16 (the dtype of q) or float32",
          a.beta.dtype = FKDA_F16);
  REFUSED(plain_prefill, DTYPE, "out: dtype float32, expected bfloat16 (the dtype of q)",
          a.out.dtype = FKDA_F32);
  REFUSED(plain_summary, DTYPE, "v: dtype float32, expected bfloat16 (the dtype of k)",
          a.v.dtype = FKDA_F32);
  REFUSED(plain_prefill, DTYPE, "A_log: dtype float16, expected float32 or bfloat16",
          a.A_log.dtype = FKDA_F16);
  REFUSED(plain_prefill, DTYPE, "dt_bias: dtype int64, expected float32 or bfloat16",
          a.dt_bias.dtype = FKDA_I64);
  REFUSED(plain_prefill, DTYPE, "initial_state: dtype float16, expected float32 or bfloat16",
          a.initial_state.dtype = FKDA_F16);
  REFUSED(plain_prefill, DTYPE,
          "final_state: dtype float64, expected float32 or bfloat16, or backend \"reference\"",
          a.final_state.dtype = FKDA_F64);
  REFUSED(ragged_prefill, DTYPE, "cu_seqlens: dtype float32, expected int32 or int64",
          a.cu_seqlens.dtype = FKDA_F32);
  REFUSED(ragged_prefill, DTYPE, "initial_state_indices: dtype bool, expected int32 or int64",
          a.initial_state_indices.dtype = FKDA_BOOL);
  REFUSED(ragged_prefill, DTYPE, "has_initial_state: dtype int32, expected bool",
          a.has_initial_state.dtype = FKDA_I32);
  REFUSED(speculative_decode, DTYPE, "num_accepted_tokens: dtype float32, expected int32 or int64",
          a.num_accepted_tokens.dtype = FKDA_F32);
  REFUSED(plain_summary, DTYPE, "M: dtype bfloat16, expected float32", a.M.dtype = FKDA_BF16);
  REFUSED(plain_backward, DTYPE,
          "d_q: dtype float16, expected bfloat16 (the dtype of q) or float32",
          a.d_q.dtype = FKDA_F16);
  REFUSED(plain_backward, DTYPE, "d_A_log: dtype bfloat16, expected float32",
          a.d_A_log.dtype = FKDA_BF16);
  REFUSED_IN_RUN(plain_backward, INVALID,
                 "checkpoint_state: 1 rows, expected at least 2 (one for every 16 tokens)",
                 (a.checkpoint_every = 16, a.checkpoint_state = INPUT(FKDA_F32, 1, HV, V, K)));
  REFUSED_IN_RUN(plain_backward, INVALID, "d_v: overlaps v, expected memory of its own",
                 a.d_v = a.v);

  /* the reference, named as such, takes float64 anywhere */
  TAKEN(plain_prefill, (a.backend = "reference", a.out = OUTPUT(FKDA_F64, B, T, HV, V),
                        a.final_state = OUTPUT(FKDA_F64, 1, HV, V, K)));
  TAKEN(plain_summary, (a.backend = "reference", a.M = OUTPUT(FKDA_F64, 1, HV, K, K)));
  REFUSED(plain_prefill, DTYPE,
          "out: dtype float64, expected bfloat16 (the dtype of q), or backend \"reference\"",
          (a.backend = "cpu", a.out.dtype = FKDA_F64));
  REFUSED(plain_prefill, DTYPE, "out: dtype float16, expected bfloat16 (the dtype of q) or float64",
          (a.backend = "reference", a.out.dtype = FKDA_F16));
  TAKEN(plain_prefill,
        (a.q.dtype = a.k.dtype = a.v.dtype = a.g.dtype = a.beta.dtype = a.out.dtype = FKDA_F16));
}

static void test_shapes(void **state) {
  (void)state;
  REFUSED(plain_prefill, INVALID, "q: shape [32,2,16], expected [B,T,H,K]",
          a.q = INPUT(FKDA_BF16, T, H, K));
  REFUSED(plain_prefill, INVALID, "q: ndim 0, expected [B,T,H,K]", a.q.ndim = 0);
  REFUSED(plain_prefill, INVALID, "q: ndim 6, expected [B,T,H,K]", a.q.ndim = 6);
  REFUSED(plain_prefill, INVALID, "q: ndim -2147483648, expected [B,T,H,K]", a.q.ndim = INT32_MIN);
  REFUSED(plain_prefill, INVALID, "q: shape [1,-32,2,16], expected [B,T,H,K]", a.q.shape[1] = -32);
  REFUSED(plain_prefill, INVALID, "q: 0 heads, expected at least 1", a.q.shape[2] = 0);
  REFUSED(plain_prefill, INVALID, "q: K = 0, expected 1 to 256", a.q.shape[3] = 0);
  REFUSED(plain_prefill, INVALID, "q: K = 257, expected 1 to 256",
          (a.q.shape[3] = 257, a.q.stride[2] = 257));
  REFUSED(plain_prefill, INVALID, "k: shape [1,32,2,8], expected [1,32,2,16] to match q",
          a.k.shape[3] = 8);
  REFUSED(plain_prefill, INVALID, "k: shape [32,2,16], expected [1,32,2,16] to match q",
          a.k = INPUT(FKDA_BF16, T, H, K));
  REFUSED(plain_prefill, INVALID, "v: shape [1,31,4,8], expected [1,32,HV,V] to match q",
          a.v.shape[1] = 31);
  REFUSED(plain_prefill, INVALID, "v: HV = 3, expected a multiple of H = 2, the heads of q",
          a.v.shape[2] = 3);
  REFUSED(plain_prefill, INVALID, "v: HV = 0, expected a multiple of H = 2, the heads of q",
          a.v.shape[2] = 0);
  REFUSED(plain_prefill, INVALID, "v: V = 0, expected 1 to 256", a.v.shape[3] = 0);
  REFUSED(plain_prefill, INVALID, "g: shape [1,32,2,16], expected [1,32,4,16] to match k and v",
          a.g.shape[2] = 2);
  REFUSED(plain_prefill, INVALID, "beta: shape [1,32,2], expected [1,32,4] to match v",
          a.beta.shape[2] = 2);
  REFUSED(plain_prefill, INVALID, "beta: shape [1,32,4,1], expected [1,32,4] to match v",
          a.beta = INPUT(FKDA_BF16, B, T, HV, 1));
  REFUSED(plain_prefill, INVALID, "out: shape [1,32,4,16], expected [1,32,4,8] to match v",
          a.out.shape[3] = 16);
  REFUSED(plain_decode, INVALID, "q: T = 0, expected 1 to 8 tokens a sequence in decode",
          a.q.shape[1] = 0);
  REFUSED(plain_decode, INVALID, "q: T = 9, expected 1 to 8 tokens a sequence in decode",
          (a.q.shape[1] = 9, a.q.stride[0] = 9 * H * K));
  REFUSED(plain_prefill, INVALID, "A_log: shape [3], expected HV = 4 elements",
          a.A_log.shape[0] = 3);
  REFUSED(plain_prefill, INVALID, "dt_bias: shape [4,-16], expected HV*K = 64 elements",
          a.dt_bias.shape[1] = -16);
  REFUSED(plain_prefill, INVALID, "A_log: ndim 6, expected 1 to 5", a.A_log.ndim = 6);
  TAKEN(plain_prefill, (a.A_log = INPUT(FKDA_BF16, 1, 1, HV, 1), a.dt_bias = INPUT(FKDA_F32, 64)));
  REFUSED(plain_prefill, INVALID, "A_log: given, expected none with the direct gate",
          a.gate = FKDA_GATE_DIRECT);
  REFUSED(plain_prefill, INVALID, "dt_bias: given, expected none with the direct gate",
          (a.gate = FKDA_GATE_DIRECT, a.A_log = (fkda_tensor){0}));

  REFUSED(ragged_prefill, INVALID, "cu_seqlens: shape [2,2], expected [N+1]",
          a.cu_seqlens = reshaped(a.cu_seqlens, SHAPE(2, 2)));
  REFUSED(ragged_prefill, INVALID, "cu_seqlens: shape [0], expected [N+1], at least 1 element",
          a.cu_seqlens.shape[0] = 0);
  REFUSED(
      ragged_prefill, INVALID,
      "cu_seqlens: given with B = 2, expected B = 1 (sequences packed along T)",
      (a.q = reshaped(a.q, SHAPE(2, 16, H, K)), a.k = reshaped(a.k, SHAPE(2, 16, H, K)),
       a.v = reshaped(a.v, SHAPE(2, 16, HV, V)), a.g = reshaped(a.g, SHAPE(2, 16, HV, K)),
       a.beta = reshaped(a.beta, SHAPE(2, 16, HV)), a.out = reshaped(a.out, SHAPE(2, 16, HV, V))));
}

static void test_state_shapes(void **state) {
  (void)state;
  const fkda_tensor none = {0};
  REFUSED(plain_prefill, INVALID,
          "initial_state: shape [2,4,8,16], expected [1,4,8,16] = [N,HV,V,K]",
          a.initial_state = INPUT(FKDA_F32, 2, HV, V, K));
  REFUSED(plain_prefill, INVALID,
          "initial_state: shape [1,4,8,16], expected [1,4,16,8] = [N,HV,K,V]",
          a.state_layout = FKDA_STATE_KV);
  REFUSED(plain_prefill, INVALID, "final_state: shape [4,8,16], expected [1,4,8,16] = [N,HV,V,K]",
          a.final_state = OUTPUT(FKDA_F32, HV, V, K));
  REFUSED(ragged_prefill, INVALID,
          "final_state: shape [5,2,8,16], expected [P,4,8,16] = [P,HV,V,K]",
          a.final_state.shape[1] = 2);
  REFUSED(ragged_prefill, INVALID,
          "initial_state: shape [5,4,8,16], expected [3,4,8,16] = [N,HV,V,K]",
          a.initial_state_indices = none);
  REFUSED(ragged_prefill, INVALID, "initial_state_indices: shape [4], expected [3] = [N]",
          a.initial_state_indices = I32(0, 1, 2, 3));
  REFUSED(ragged_prefill, INVALID, "initial_state_indices: shape [3,1], expected [3] = [N]",
          a.initial_state_indices = reshaped(a.initial_state_indices, SHAPE(3, 1)));
  REFUSED(ragged_prefill, INVALID,
          "initial_state_indices: given, expected none without initial_state",
          a.initial_state = none);
  REFUSED(ragged_prefill, INVALID, "final_state_indices: given, expected none without final_state",
          a.final_state = none);
  REFUSED(ragged_prefill, INVALID, "has_initial_state: given, expected none without initial_state",
          (a.initial_state = none, a.initial_state_indices = none));
  REFUSED(ragged_prefill, INVALID, "has_initial_state: shape [2], expected [3] = [N]",
          a.has_initial_state.shape[0] = 2);

  REFUSED(plain_decode, INVALID, "state: shape [6,4,8,16], expected [3,4,8,16] = [N,HV,V,K]",
          a.initial_state_indices = none);
  REFUSED(plain_decode, INVALID, "initial_state_indices: shape [2], expected [3] = [N]",
          a.initial_state_indices.shape[0] = 2);
  REFUSED(plain_decode, INVALID, "final_state_indices: shape [2], expected [3] = [N]",
          (a.final_state_indices = a.initial_state_indices, a.initial_state_indices = none,
           a.final_state_indices.shape[0] = 2));
  REFUSED(plain_decode, INVALID,
          "final_state_indices: shape [3,2], expected [3] to match initial_state_indices",
          a.final_state_indices = reshaped(I32(0, 1, 2, 3, 4, 5), SHAPE(3, 2)));
  REFUSED(speculative_decode, INVALID,
          "final_state_indices: shape [3,2], expected [3,3] to match initial_state_indices",
          a.final_state_indices = reshaped(I32(0, 1, 2, 3, 4, 5), SHAPE(3, 2)));
  REFUSED(speculative_decode, INVALID, "initial_state_indices: 1 columns, expected at least T = 2",
          a.initial_state_indices = reshaped(I32(0, 1, 2), SHAPE(3, 1)));
  REFUSED(speculative_decode, INVALID, "num_accepted_tokens: shape [1], expected [3] = [N]",
          a.num_accepted_tokens.shape[0] = 1);
  REFUSED(plain_decode, INVALID,
          "num_accepted_tokens: given, expected none without two-dimensional state indices",
          a.num_accepted_tokens = I32(1, 1, 1));
  REFUSED(plain_summary, INVALID, "M: shape [1,4,8,16], expected [1,4,16,16] = [N,HV,K,K]",
          a.M = a.b);
  REFUSED(plain_summary, INVALID, "b: shape [1,4,8,16], expected [1,4,16,8] = [N,HV,K,V]",
          a.state_layout = FKDA_STATE_KV);

  REFUSED(plain_backward, INVALID, "d_q: shape [1,32,4,8], expected [1,32,2,16] to match q",
          a.d_q = OUTPUT(FKDA_BF16, B, T, HV, V));
  REFUSED(plain_backward, INVALID, "d_g: shape [1,32,4,8], expected [1,32,4,16] to match g",
          a.d_g = OUTPUT(FKDA_F32, B, T, HV, V));
  REFUSED(plain_backward, INVALID, "d_dt_bias: shape [64], expected [4,16] = [HV,K]",
          a.d_dt_bias = OUTPUT(FKDA_F32, 64));
  REFUSED(plain_backward, INVALID,
          "d_initial_state: shape [2,4,8,16], expected [1,4,8,16] = [N,HV,V,K]",
          a.d_initial_state = OUTPUT(FKDA_F32, 2, HV, V, K));
  REFUSED(plain_backward, INVALID, "d_A_log: given, expected none with the direct gate",
          (a.gate = FKDA_GATE_DIRECT, a.A_log = none));
}

/* ---- strides, extents, pointers ---- */

#define HUGE_STRIDE INT64_C(4611686018427387904) /* 2^62 */

static void test_strides(void **state) {
  (void)state;
  REFUSED(plain_prefill, INVALID, "k: strides [1024,32,16,2], expected 1 in the last dimension",
          a.k.stride[3] = 2);
  REFUSED(plain_prefill, INVALID, "k: strides [1024,-32,16,1], expected none below 0",
          a.k.stride[1] = -32);
  REFUSED(plain_prefill, INVALID, "beta: strides [128,4,8], expected 1 in the last dimension",
          a.beta.stride[2] = 8);
  REFUSED(plain_prefill, INVALID,
          "final_state: strides [512,128,1,8], expected 1 in the last dimension",
          (a.final_state.stride[2] = 1, a.final_state.stride[3] = 8));
  REFUSED(plain_prefill, INVALID, "A_log: strides [2], expected those of a contiguous tensor",
          a.A_log.stride[0] = 2);
  REFUSED(plain_prefill, INVALID, "dt_bias: strides [1,4], expected those of a contiguous tensor",
          (a.dt_bias.stride[0] = 1, a.dt_bias.stride[1] = 4));
  REFUSED(ragged_prefill, INVALID, "cu_seqlens: strides [2], expected those of a contiguous tensor",
          a.cu_seqlens.stride[0] = 2);
  REFUSED(
      plain_prefill, INVALID,
      "k: shape [1,32,2,16] with strides [1024,4611686018427387904,16,1], expected at most 2^62 "
      "bytes",
      a.k.stride[1] = HUGE_STRIDE);
  REFUSED(
      plain_prefill, INVALID,
      "out: shape [1,32,4,8] with strides [1024,9223372036854775807,8,1], expected at most 2^62 "
      "bytes",
      a.out.stride[1] = INT64_MAX);
  REFUSED(plain_prefill, INVALID, "v: B*T*HV = 1*274877906945*4, expected at most 2^40",
          (a.q.shape[1] = a.k.shape[1] = a.v.shape[1] = (INT64_C(1) << 38) + 1,
           a.q.stride[1] = a.k.stride[1] = a.v.stride[1] = 0));
  REFUSED(
      plain_prefill, INVALID,
      "q: shape [9223372036854775807,9223372036854775807,2,16] with strides [0,0,16,1], expected "
      "at most 2^62 bytes",
      (a.q.shape[0] = a.q.shape[1] = INT64_MAX, a.q.stride[0] = a.q.stride[1] = 0));

  /* outputs whose elements meet */
  REFUSED(plain_prefill, INVALID,
          "out: strides make its elements overlap, expected memory of its own for each",
          a.out.stride[1] = 0);
  REFUSED(plain_prefill, INVALID,
          "out: strides make its elements overlap, expected memory of its own for each",
          a.out.stride[1] = 31);
  REFUSED(plain_prefill, INVALID,
          "final_state: strides make its elements overlap, expected memory of its own for each",
          a.final_state.stride[2] = 15);
  REFUSED(plain_decode, INVALID,
          "state: strides make its elements overlap, expected memory of its own for each",
          a.state.stride[0] = 0);
  TAKEN(plain_decode, (a.state.stride[0] = 0, a.write_state = 0));

  /* strides that are free: broadcast inputs, any order of dimensions, padding, one element */
  TAKEN(plain_prefill, (a.q.stride[1] = a.g.stride[2] = a.initial_state.stride[1] = 0));
  TAKEN(plain_prefill, (a.out.stride[1] = V, a.out.stride[2] = T * V));
  TAKEN(plain_prefill, (a.k.stride[0] = -7, a.initial_state.stride[0] = INT64_MIN));
  TAKEN(plain_decode, (a.state = INPUT(FKDA_F32, 6, HV, V + 3, K), a.state.shape[2] = V));
  TAKEN(ragged_prefill,
        (a.has_initial_state.stride[0] = 0, a.initial_state_indices = I32(4, 9, 0, 9, 1),
         a.initial_state_indices.shape[0] = 3, a.initial_state_indices.stride[0] = 2));
}

/* What an empty tensor's strides and pointer are does not matter. */
static void test_empty(void **state) {
  (void)state;
  fkda_prefill_args a = plain_prefill();
  fkda_tensor *tokens[] = {&a.q, &a.k, &a.v, &a.g, &a.beta, &a.out};
  for (int i = 0; i < 6; ++i) {
    tokens[i]->shape[1] = 0;
    tokens[i]->data = NULL;
    tokens[i]->stride[3] = -5;
    tokens[i]->stride[2] = INT64_MIN;
  }
  expect_success(&a, __FILE__, __LINE__);
  /* the final state of an empty sequence is its initial one */
  assert_memory_equal(a.initial_state.data, a.final_state.data, sizeof(float) * HV * V * K);

  TAKEN(plain_prefill, (a.cu_seqlens = I32(0), a.initial_state = a.final_state = (fkda_tensor){0}));
  TAKEN(plain_decode, (a.q.shape[0] = a.k.shape[0] = a.v.shape[0] = a.g.shape[0] = a.beta.shape[0] =
                           a.out.shape[0] = a.initial_state_indices.shape[0] = 0,
                       a.initial_state_indices.data = NULL));
}

static void test_pointers(void **state) {
  (void)state;
  REFUSED_IN_RUN(plain_prefill, INVALID, "k: data NULL, expected memory of 1024 elements",
                 a.k.data = NULL);
  REFUSED_IN_RUN(plain_prefill, INVALID, "out: data NULL, expected memory of 1024 elements",
                 a.out.data = NULL);
  REFUSED_IN_RUN(ragged_prefill, INVALID, "cu_seqlens: data NULL, expected memory of 4 elements",
                 a.cu_seqlens.data = NULL);
  REFUSED_IN_RUN(ragged_prefill, INVALID,
                 "final_state_indices: data NULL, expected memory of 3 elements",
                 a.final_state_indices.data = NULL);
  REFUSED_IN_RUN(plain_prefill, INVALID, "k: data *, expected a multiple of 2 (bfloat16)",
                 a.k.data = (char *)a.k.data + 1);
  REFUSED_IN_RUN(plain_prefill, INVALID, "final_state: data *, expected a multiple of 4 (float32)",
                 a.final_state.data = (char *)a.final_state.data + 2);
  REFUSED_IN_RUN(
      ragged_prefill, INVALID, "cu_seqlens: data *, expected a multiple of 8 (int64)",
      (a.cu_seqlens.dtype = FKDA_I64, a.cu_seqlens.data = (char *)a.cu_seqlens.data + 4));
  REFUSED_IN_RUN(plain_prefill, INVALID, "out: data *, expected an end inside the address space",
                 a.out.data = (void *)(UINTPTR_MAX - 15));
}

static void *aligned_arena(size_t bytes, size_t offset) {
  unsigned char *start = arena + (arena_used + 255) / 256 * 256;
  arena_used = (size_t)(start - arena) + bytes + 512;
  assert_true(arena_used <= sizeof arena);
  return start + offset;
}

static void test_workspace(void **state) {
  (void)state;
  REFUSED_IN_RUN(plain_prefill, INVALID,
                 "workspace: NULL with workspace_size 64, expected memory or size 0",
                 a.workspace_size = 64);
  REFUSED_IN_RUN(plain_prefill, INVALID, "workspace: *, expected a multiple of 64",
                 (a.workspace = aligned_arena(4096, 32), a.workspace_size = 4096));
  REFUSED_IN_RUN(plain_prefill, INVALID,
                 "workspace_size: 18446744073709551615, expected an end inside the address space",
                 (a.workspace = aligned_arena(64, 0), a.workspace_size = SIZE_MAX));
  REFUSED_IN_RUN(plain_prefill, INVALID, "workspace: overlaps *, expected memory of its own",
                 (a.workspace = arena, a.workspace_size = sizeof arena));

  /* one byte short, on every backend that wants any */
  for (int32_t i = 0; fkda_backend_name(i); ++i) {
    if (!usable_on_cpu(fkda_backend_name(i))) continue;
    fkda_prefill_args a = ragged_prefill();
    a.backend = fkda_backend_name(i);
    size_t bytes = 0;
    assert_status(fkda_workspace_size(&a, &bytes), FKDA_OK, __FILE__, __LINE__);
    void *workspace = aligned_alloc(64, (bytes + 127) / 64 * 64);
    assert_non_null(workspace);
    a.workspace = workspace;
    if (bytes) {
      char message[80];
      snprintf(message, sizeof message, "workspace: %zu bytes, expected at least %zu", bytes - 1,
               bytes);
      a.workspace_size = bytes - 1;
      expect_failure(&a, false, FKDA_ERROR_WORKSPACE, message, __FILE__, __LINE__);
    }
    a.workspace_size = bytes;
    expect_success(&a, __FILE__, __LINE__);
    a.workspace_size = bytes + 64;
    expect_success(&a, __FILE__, __LINE__);
    free(workspace);
  }
}

/* ---- overlap ---- */

/* q, k, v of one projection: rows of 2*H*K + HV*V elements, and out behind them in the same rows. */
static fkda_prefill_args fused_prefill(void) {
  fkda_prefill_args a = plain_prefill();
  enum { ROW = 2 * H * K + 2 * HV * V };
  const fkda_tensor rows = INPUT(FKDA_BF16, B, T, ROW);
  fkda_tensor *tensors[] = {&a.q, &a.k, &a.v, &a.out};
  const int64_t offsets[] = {0, H * K, 2 * H * K, 2 * H * K + HV * V};
  for (int i = 0; i < 4; ++i) {
    tensors[i]->data = (uint16_t *)rows.data + offsets[i];
    tensors[i]->stride[0] = (int64_t)T * ROW;
    tensors[i]->stride[1] = ROW;
  }
  return a;
}

static void test_overlap(void **state) {
  (void)state;
  REFUSED_IN_RUN(plain_prefill, INVALID, "out: overlaps v, expected memory of its own",
                 a.out.data = a.v.data);
  REFUSED_IN_RUN(plain_prefill, INVALID, "out: overlaps v, expected memory of its own",
                 a.out.data = (uint16_t *)a.v.data + B * T * HV * V - 1);
  REFUSED_IN_RUN(plain_prefill, INVALID, "out: overlaps dt_bias, expected memory of its own",
                 a.out.data = a.dt_bias.data);
  REFUSED_IN_RUN(ragged_prefill, INVALID, "out: overlaps cu_seqlens, expected memory of its own",
                 a.cu_seqlens.data = a.out.data);
  REFUSED_IN_RUN(plain_prefill, INVALID, "final_state: overlaps out, expected memory of its own",
                 a.final_state.data = a.out.data);
  REFUSED_IN_RUN(plain_prefill, INVALID,
                 "final_state: overlaps initial_state, expected memory of its own or the same view",
                 a.final_state.data = (float *)a.initial_state.data + K);
  REFUSED_IN_RUN(plain_prefill, INVALID,
                 "final_state: overlaps initial_state, expected memory of its own or the same view",
                 (a.final_state = a.initial_state, a.final_state.dtype = FKDA_BF16));
  REFUSED_IN_RUN(plain_decode, INVALID, "state: overlaps q, expected memory of its own",
                 a.q.data = a.state.data);
  REFUSED_IN_RUN(plain_decode, INVALID, "out: overlaps state, expected memory of its own",
                 (a.out.data = a.state.data, a.write_state = 0));
  REFUSED_IN_RUN(plain_summary, INVALID, "M: overlaps b, expected memory of its own",
                 a.b.data = a.M.data);
  fkda_backward_args backward = plain_backward();
  backward.d_q = backward.q;
  assert_int_equal(fkda_backward(&backward), INVALID);
  assert_string_equal(fkda_last_error(), "d_q: overlaps q, expected memory of its own");

  TAKEN(plain_prefill, a.q = a.k);
  TAKEN(plain_prefill, a.final_state = a.initial_state);
  TAKEN(plain_prefill, (a.v = INPUT(FKDA_BF16, 2, T, HV, V), a.v.shape[0] = 1,
                        a.out.data = (uint16_t *)a.v.data + B * T * HV * V));
  TAKEN(fused_prefill, (void)a);
  REFUSED_IN_RUN(fused_prefill, INVALID, "out: overlaps v, expected memory of its own",
                 a.out.data = (uint16_t *)a.out.data - 1);
  REFUSED_IN_RUN(fused_prefill, INVALID, "out: overlaps q, expected memory of its own",
                 a.out.data = (uint16_t *)a.out.data + 1);
  TAKEN(fused_prefill, (a.q.stride[0] = 3, a.out.stride[0] = 0)); /* B = 1 */
}

/* The rule against brute force: small strided tensors of every kind over one stretch of bytes. It must
 * never miss an overlap, and must not see one among tensors whose dimensions nest. */
static uint32_t random_state = 1;
static int64_t random_below(int64_t n) {
  random_state = random_state * 1664525u + 1013904223u;
  return (int64_t)(random_state >> 8) % n;
}

enum { BYTES = 4096 };
static bool mark(const fkda_tensor *t, const unsigned char *base, unsigned char *map, int bit) {
  bool again = false;
  int64_t index[3];
  for (index[0] = 0; index[0] < t->shape[0]; ++index[0])
    for (index[1] = 0; index[1] < t->shape[1]; ++index[1])
      for (index[2] = 0; index[2] < t->shape[2]; ++index[2]) {
        const int64_t size = (int64_t)fkda_dtype_size(t->dtype);
        int64_t at = (const unsigned char *)t->data - base;
        for (int i = 0; i < 3; ++i) at += index[i] * t->stride[i] * size;
        for (int64_t i = at; i < at + size; ++i) {
          again |= map[i] & bit;
          map[i] |= (unsigned char)bit;
        }
      }
  return again;
}

static fkda_region region_of(fkda_tensor *t, bool written) {
  int64_t last = 0;
  for (int i = 0; i < 3; ++i) last += (t->shape[i] - 1) * t->stride[i];
  const uintptr_t begin = (uintptr_t)t->data, size = fkda_dtype_size(t->dtype);
  return (fkda_region){.name = written ? "out" : "in",
                       .tensor = t,
                       .begin = begin,
                       .end = begin + (uintptr_t)(last + 1) * size,
                       .written = written};
}

static void test_overlap_rule(void **state) {
  (void)state;
  static _Alignas(8) unsigned char base[BYTES];
  static unsigned char map[BYTES];
  int met = 0, apart = 0, fused_apart = 0;
  for (int i = 0; i < 200000; ++i) {
    fkda_tensor t[2];
    /* half of them: slices of rows of one buffer, which are judged exactly */
    const bool fused = random_below(2);
    const int64_t row = 16 + random_below(17), block = row * (2 + random_below(3));
    for (int j = 0; j < 2; ++j) {
      t[j] = (fkda_tensor){.dtype = random_below(2) || fused ? FKDA_BF16 : FKDA_F32, .ndim = 3};
      for (int d = 0; d < 3; ++d) {
        t[j].shape[d] = 1 + random_below(4);
        t[j].stride[d] = random_below(40);
      }
      t[j].data = base + 4 * random_below(256);
      if (fused) {
        t[j].shape[1] = 1 + random_below(block / row);
        t[j].shape[2] = 1 + random_below(row / 2);
        t[j].stride[0] = block;
        t[j].stride[1] = row;
        t[j].stride[2] = 1;
        t[j].data = base + 2 * random_below(2 * row);
      }
    }
    memset(map, 0, sizeof map);
    const bool self = mark(&t[0], base, map, 1);
    bool both = false;
    (void)mark(&t[1], base, map, 2);
    for (int b = 0; b < BYTES; ++b) both |= map[b] == 3;

    fkda_problem problem = {0};
    fkda_checker checker = {.problem = &problem, .for_run = true, .regions = 2};
    checker.region[0] = region_of(&t[0], true);
    checker.region[1] = region_of(&t[1], false);
    const bool said = fkda_check_overlap(&checker) != FKDA_OK;
    const bool said_self = fkda_check_self_overlap("out", &t[0]) != FKDA_OK;
    if (both) assert_true(said);
    if (self) assert_true(said_self);
    if (fused) assert_int_equal(said, both);
    if (fused) assert_int_equal(said_self, self);
    met += both;
    apart += !said;
    fused_apart += fused && !said && checker.region[0].begin < checker.region[1].end &&
                   checker.region[1].begin < checker.region[0].end;
  }
  /* the draw has seen all kinds */
  assert_true(met > 10000 && apart > 10000 && fused_apart > 1000);
}

/* ---- contents of host memory ---- */

static void test_cu_seqlens(void **state) {
  (void)state;
  REFUSED_IN_RUN(ragged_prefill, INVALID, "cu_seqlens[0]: 1, expected 0",
                 set_i32(a.cu_seqlens, 0, 1));
  REFUSED_IN_RUN(ragged_prefill, INVALID, "cu_seqlens[2]: 16, expected at least cu_seqlens[1] = 17",
                 set_i32(a.cu_seqlens, 2, 16));
  REFUSED_IN_RUN(ragged_prefill, INVALID, "cu_seqlens[3]: 33, expected at most T = 32",
                 set_i32(a.cu_seqlens, 3, 33));
  REFUSED_IN_RUN(ragged_prefill, INVALID, "cu_seqlens[1]: -1, expected at least cu_seqlens[0] = 0",
                 set_i32(a.cu_seqlens, 1, -1));
  TAKEN(ragged_prefill, (set_i32(a.cu_seqlens, 3, 30)));
  /* the same as int64 */
  fkda_prefill_args a = ragged_prefill();
  a.cu_seqlens = place_filled(0, FKDA_I64, SHAPE(4));
  memcpy(a.cu_seqlens.data, (int64_t[]){0, 17, INT64_MAX, 32}, 4 * sizeof(int64_t));
  expect_failure(&a, false, INVALID, "cu_seqlens[2]: 9223372036854775807, expected at most T = 32",
                 __FILE__, __LINE__);
  REFUSED_IN_RUN(plain_summary, INVALID, "cu_seqlens[1]: 64, expected at most T = 32",
                 a.cu_seqlens = I32(0, 64));
}

static void test_indices(void **state) {
  (void)state;
  REFUSED_IN_RUN(ragged_prefill, INVALID,
                 "initial_state_indices[2]: 5, expected -1 or a slot of initial_state, which has 5",
                 set_i32(a.initial_state_indices, 2, 5));
  REFUSED_IN_RUN(ragged_prefill, INVALID,
                 "final_state_indices[0]: -2, expected -1 or a slot of final_state, which has 5",
                 set_i32(a.final_state_indices, 0, -2));
  REFUSED_IN_RUN(plain_decode, INVALID,
                 "initial_state_indices[1]: 6, expected -1 or a slot of state, which has 6",
                 set_i32(a.initial_state_indices, 1, 6));
  REFUSED_IN_RUN(plain_decode, INVALID,
                 "final_state_indices[0]: -7, expected -1 or a slot of state, which has 6",
                 a.final_state_indices = I32(-7, 0, 1));
  REFUSED_IN_RUN(
      plain_decode, INVALID,
      "final_state_indices[1]: 6, expected -1 or a slot of state, which has 6",
      (a.final_state_indices = I32(5, 6, 0), a.initial_state_indices = (fkda_tensor){0}));
  REFUSED_IN_RUN(plain_decode, INVALID,
                 "final_state_indices[2]: 6, expected -1 or a slot of state, which has 6",
                 (a.final_state_indices = I32(5, 1, 6), a.write_state = 0));
  REFUSED_IN_RUN(speculative_decode, INVALID,
                 "initial_state_indices[2][1]: 9, expected -1 or a slot of state, which has 9",
                 set_i32(a.initial_state_indices, 7, 9));
  REFUSED_IN_RUN(speculative_decode, INVALID,
                 "num_accepted_tokens[1]: 4, expected 1 to 3 (columns of the indices)",
                 set_i32(a.num_accepted_tokens, 1, 4));
  REFUSED_IN_RUN(speculative_decode, INVALID,
                 "num_accepted_tokens[0]: 0, expected 1 to 3 (columns of the indices)",
                 set_i32(a.num_accepted_tokens, 0, 0));
  TAKEN(plain_decode, set_i32(a.initial_state_indices, 1, -1));

  /* States read from a tensor of their own: other dtype, other number of slots, the same indices. */
  TAKEN(plain_decode, (a.initial_state = INPUT(FKDA_BF16, 8, HV, V, K)));
  TAKEN(plain_decode, (a.initial_state = a.state));
  TAKEN(plain_decode, (a.initial_state = a.state, a.state = (fkda_tensor){0}, a.write_state = 0));
  TAKEN(plain_decode, (a.initial_state = INPUT(FKDA_F32, 6, HV, V, K), a.write_state = 0));
  REFUSED(plain_decode, INVALID, "state: absent, expected a tensor [P,HV,V,K]",
          (a.initial_state = a.state, a.state = (fkda_tensor){0}));
  REFUSED(plain_decode, INVALID, "state: absent, expected a tensor [P,HV,V,K]",
          (a.state = (fkda_tensor){0}, a.write_state = 0));
  REFUSED(plain_decode, DTYPE, "initial_state: dtype int32, expected float32 or bfloat16",
          (a.initial_state = a.state, a.initial_state.dtype = FKDA_I32));
  REFUSED(plain_decode, INVALID,
          "initial_state: shape [6,4,16,8], expected [P,4,8,16] = [P,HV,V,K]",
          a.initial_state = INPUT(FKDA_F32, 6, HV, K, V));
  REFUSED_IN_RUN(plain_decode, INVALID,
                 "initial_state_indices[0]: 5, expected -1 or a slot of initial_state, which has 5",
                 a.initial_state = INPUT(FKDA_F32, 5, HV, V, K));
  REFUSED_IN_RUN(plain_decode, INVALID,
                 "initial_state_indices[0]: 5, expected -1 or a slot of state, which has 5",
                 (a.initial_state = a.state, a.state = OUTPUT(FKDA_F32, 5, HV, V, K)));
  REFUSED_IN_RUN(plain_decode, INVALID,
                 "state: overlaps initial_state, expected memory of its own or the same view",
                 (a.initial_state = a.state, a.initial_state.stride[1] = 0));
  TAKEN(speculative_decode, (a.num_accepted_tokens = (fkda_tensor){0}));
  TAKEN(ragged_prefill,
        (set_i32(a.final_state_indices, 0, -1), set_i32(a.final_state_indices, 1, -1)));
}

/* ---- checkpoints ---- */

/* [N,C] = [3,2] offsets of sequences of 17, 0 and 15 tokens */
static fkda_prefill_args offsets_prefill(void) {
  fkda_prefill_args a = ragged_prefill();
  a.checkpoint_offsets = reshaped(I32(0, 16, -1, 0, 0, -1), SHAPE(3, 2));
  a.checkpoint_state = OUTPUT(FKDA_BF16, 3, 2, HV, V, K);
  return a;
}
/* [N]: one a sequence */
static fkda_prefill_args one_prefill(void) {
  fkda_prefill_args a = ragged_prefill();
  a.checkpoint_offsets = I32(16, -1, 0);
  a.checkpoint_state = OUTPUT(FKDA_F32, 3, HV, V, K);
  return a;
}
static fkda_prefill_args packed_prefill(void) {
  fkda_prefill_args a = ragged_prefill();
  a.checkpoint_offsets = I32(0, 16, 0, 77);
  a.checkpoint_indptr = I32(0, 2, 2, 3);
  a.checkpoint_state = OUTPUT(FKDA_F16, 4, HV, V, K);
  return a;
}
static fkda_prefill_args every_prefill(void) {
  fkda_prefill_args a = ragged_prefill();
  a.checkpoint_every = 16;
  a.checkpoint_state = OUTPUT(FKDA_F32, 3, HV, V, K);
  return a;
}

static void test_checkpoint_options(void **state) {
  (void)state;
  const fkda_tensor none = {0};
  TAKEN(offsets_prefill, (void)a);
  TAKEN(one_prefill, (void)a);
  TAKEN(packed_prefill, (void)a);
  TAKEN(every_prefill, (void)a);
  REFUSED(every_prefill, INVALID, "checkpoint_every: 24, expected 0 or a multiple of 16",
          a.checkpoint_every = 24);
  REFUSED(every_prefill, INVALID, "checkpoint_every: -16, expected 0 or a multiple of 16",
          a.checkpoint_every = -16);
  TAKEN(every_prefill, a.checkpoint_every = INT64_MAX / 16 * 16);
  REFUSED(offsets_prefill, INVALID, "checkpoint_every: 16, expected 0 with checkpoint_offsets",
          a.checkpoint_every = 16);
  REFUSED(offsets_prefill, INVALID, "checkpoint_before: 1, expected 0 without checkpoint_every",
          a.checkpoint_before = 1);
  REFUSED(every_prefill, INVALID, "checkpoint_before: 2, expected 0 or 1", a.checkpoint_before = 2);
  REFUSED(packed_prefill, INVALID,
          "checkpoint_indptr: given, expected none without checkpoint_offsets",
          a.checkpoint_offsets = none);
  REFUSED(
      packed_prefill, INVALID,
      "checkpoint_indptr: absent, expected [N+1] with checkpoint_offsets of shape [4], which is "
      "not [N] = [3]",
      a.checkpoint_indptr = none);
  REFUSED(offsets_prefill, INVALID, "checkpoint_offsets: shape [3,2], expected [R]",
          a.checkpoint_indptr = I32(0, 1, 2, 3));
  REFUSED(offsets_prefill, INVALID,
          "checkpoint_state: given, expected none without checkpoint_offsets or checkpoint_every",
          a.checkpoint_offsets = none);
  REFUSED(plain_prefill, INVALID,
          "checkpoint_state_indices: given, expected none without checkpoint_offsets or "
          "checkpoint_every",
          a.checkpoint_state_indices = I32(0));
  REFUSED(offsets_prefill, INVALID,
          "checkpoint_state: absent, expected a tensor with checkpoint_offsets",
          a.checkpoint_state = none);
  REFUSED(every_prefill, INVALID,
          "checkpoint_state: absent, expected a tensor with checkpoint_every",
          a.checkpoint_state = none);
  REFUSED(every_prefill, DTYPE,
          "checkpoint_state: dtype int32, expected float32, bfloat16 or float16",
          a.checkpoint_state.dtype = FKDA_I32);
  REFUSED(packed_prefill, DTYPE, "checkpoint_indptr: dtype bool, expected int32 or int64",
          a.checkpoint_indptr.dtype = FKDA_BOOL);
}

static void test_checkpoint_shapes(void **state) {
  (void)state;
  REFUSED(offsets_prefill, INVALID, "checkpoint_offsets: shape [2,2], expected [3,C] = [N,C]",
          a.checkpoint_offsets.shape[0] = 2);
  REFUSED(offsets_prefill, INVALID,
          "checkpoint_state: shape [3,1,4,8,16], expected [3,2,4,8,16] = [N,C,HV,V,K]",
          a.checkpoint_state.shape[1] = 1);
  REFUSED(offsets_prefill, INVALID,
          "checkpoint_state: shape [6,4,8,16], expected [3,2,4,8,16] = [N,C,HV,V,K]",
          a.checkpoint_state = reshaped(a.checkpoint_state, SHAPE(6, HV, V, K)));
  REFUSED(offsets_prefill, INVALID,
          "checkpoint_state_indices: shape [6], expected [3,2] to match checkpoint_offsets",
          a.checkpoint_state_indices = I32(0, 1, 2, 3, 4, 5));
  REFUSED(offsets_prefill, INVALID,
          "checkpoint_state: shape [3,2,4,8,16], expected [P,4,8,16] = [P,HV,V,K]",
          a.checkpoint_state_indices = reshaped(I32(0, 1, 2, 3, 4, 5), SHAPE(3, 2)));
  REFUSED(one_prefill, INVALID,
          "checkpoint_state: shape [3,1,4,8,16], expected [3,4,8,16] = [N,HV,V,K]",
          a.checkpoint_state = reshaped(a.checkpoint_state, SHAPE(3, 1, HV, V, K)));
  REFUSED(one_prefill, INVALID,
          "checkpoint_state_indices: shape [3,1], expected [3] to match checkpoint_offsets",
          a.checkpoint_state_indices = reshaped(I32(0, 1, 2), SHAPE(3, 1)));
  TAKEN(one_prefill, (a.checkpoint_state_indices = I32(4, 0, 1),
                      a.checkpoint_state = OUTPUT(FKDA_F32, 5, HV, V, K)));
  REFUSED(packed_prefill, INVALID, "checkpoint_indptr: shape [3], expected [4] = [N+1]",
          a.checkpoint_indptr.shape[0] = 3);
  REFUSED(packed_prefill, INVALID,
          "checkpoint_indptr: strides [2], expected those of a contiguous tensor",
          a.checkpoint_indptr.stride[0] = 2);
  REFUSED(packed_prefill, INVALID,
          "checkpoint_state: shape [3,4,8,16], expected [4,4,8,16] = [R,HV,V,K]",
          a.checkpoint_state.shape[0] = 3);
  REFUSED(every_prefill, INVALID,
          "checkpoint_state: shape [3,4,8], expected [R,4,8,16] = [R,HV,V,K]",
          a.checkpoint_state.ndim = 3);
  TAKEN(every_prefill, a.checkpoint_state = reshaped(a.checkpoint_state, SHAPE(1, 3, HV, V, K)));
  TAKEN(every_prefill, a.checkpoint_state = OUTPUT(FKDA_F32, 4, HV, V, K));
  TAKEN(offsets_prefill, (a.checkpoint_offsets.shape[1] = 0, a.checkpoint_state.shape[1] = 0));

  /* batch rows without cu_seqlens: [B,R/B,..] exactly, rows numbered through */
  fkda_prefill_args a = plain_prefill();
  fkda_tensor *tokens[] = {&a.q, &a.k, &a.v, &a.g, &a.beta, &a.out};
  for (int i = 0; i < 6; ++i) {
    int64_t shape[4];
    memcpy(shape, tokens[i]->shape, sizeof shape);
    shape[0] = 2;
    shape[1] = T / 2;
    *tokens[i] = reshaped(*tokens[i], tokens[i]->ndim, shape);
  }
  a.initial_state = a.final_state = (fkda_tensor){0};
  a.checkpoint_every = 16;
  a.checkpoint_state = OUTPUT(FKDA_F32, 2, 2, HV, V, K);
  expect_failure(&a, true, INVALID,
                 "checkpoint_state: shape [2,2,4,8,16], expected [2,1,4,8,16] = [B,R/B,HV,V,K]",
                 __FILE__, __LINE__);
  a.checkpoint_state.shape[1] = 1;
  expect_success(&a, __FILE__, __LINE__);
  a.checkpoint_state = OUTPUT(FKDA_F32, 1, HV, V, K);
  expect_failure(&a, false, INVALID,
                 "checkpoint_state: 1 rows, expected at least 2 (one for every 16 tokens)",
                 __FILE__, __LINE__);
}

static void test_checkpoint_contents(void **state) {
  (void)state;
  REFUSED_IN_RUN(
      offsets_prefill, INVALID,
      "checkpoint_offsets[0][1]: 8, expected -1 or a multiple of 16 up to 17, the length of "
      "sequence 0",
      set_i32(a.checkpoint_offsets, 1, 8));
  REFUSED_IN_RUN(
      offsets_prefill, INVALID,
      "checkpoint_offsets[2][0]: 16, expected -1 or a multiple of 16 up to 15, the length "
      "of sequence 2",
      set_i32(a.checkpoint_offsets, 4, 16));
  REFUSED_IN_RUN(
      offsets_prefill, INVALID,
      "checkpoint_offsets[1][0]: -16, expected -1 or a multiple of 16 up to 0, the length "
      "of sequence 1",
      set_i32(a.checkpoint_offsets, 2, -16));
  REFUSED_IN_RUN(
      packed_prefill, INVALID,
      "checkpoint_offsets[1]: 32, expected -1 or a multiple of 16 up to 17, the length of "
      "sequence 0",
      set_i32(a.checkpoint_offsets, 1, 32));
  REFUSED_IN_RUN(
      one_prefill, INVALID,
      "checkpoint_offsets[2]: 16, expected -1 or a multiple of 16 up to 15, the length of "
      "sequence 2",
      set_i32(a.checkpoint_offsets, 2, 16));
  REFUSED_IN_RUN(packed_prefill, INVALID, "checkpoint_indptr[0]: 1, expected 0",
                 set_i32(a.checkpoint_indptr, 0, 1));
  REFUSED_IN_RUN(packed_prefill, INVALID,
                 "checkpoint_indptr[3]: 5, expected at most the length of checkpoint_offsets = 4",
                 set_i32(a.checkpoint_indptr, 3, 5));
  REFUSED_IN_RUN(packed_prefill, INVALID,
                 "checkpoint_indptr[2]: 1, expected at least checkpoint_indptr[1] = 2",
                 set_i32(a.checkpoint_indptr, 2, 1));
  REFUSED_IN_RUN(every_prefill, INVALID,
                 "checkpoint_state: 2 rows, expected at least 3 (one for every 16 tokens)",
                 a.checkpoint_state.shape[0] = 2);
  REFUSED_IN_RUN(every_prefill, INVALID,
                 "checkpoint_state_indices: 2 rows, expected at least 3 (one for every 16 tokens)",
                 a.checkpoint_state_indices = I32(0, 1));
  REFUSED_IN_RUN(every_prefill, INVALID,
                 "checkpoint_state_indices[1]: 3, expected -1 or a slot of checkpoint_state, which "
                 "has 3",
                 a.checkpoint_state_indices = I32(0, 3, -1));
  REFUSED_IN_RUN(
      offsets_prefill, INVALID,
      "checkpoint_state_indices[2][1]: 7, expected -1 or a slot of checkpoint_state, which "
      "has 6",
      (a.checkpoint_state = OUTPUT(FKDA_F32, 6, HV, V, K),
       a.checkpoint_state_indices = reshaped(I32(0, 1, 2, 3, 4, 7), SHAPE(3, 2))));

  /* in the pool that the call works on: only by slots of its own, and viewed alike */
  TAKEN(every_prefill,
        (a.checkpoint_state = INPUT(FKDA_F32, 9, HV, V, K), a.initial_state = a.checkpoint_state,
         a.final_state = a.checkpoint_state, a.checkpoint_state_indices = I32(6, 7, 8)));
  REFUSED_IN_RUN(every_prefill, INVALID,
                 "checkpoint_state: overlaps initial_state, expected memory of its own",
                 a.checkpoint_state = a.initial_state);
  REFUSED_IN_RUN(every_prefill, INVALID,
                 "checkpoint_state: overlaps initial_state, expected memory of its own or the same "
                 "view",
                 (a.checkpoint_state_indices = I32(0, 1, 2),
                  a.checkpoint_state.data = (float *)a.initial_state.data + K));
  REFUSED_IN_RUN(offsets_prefill, INVALID,
                 "checkpoint_state: overlaps out, expected memory of its own",
                 a.checkpoint_state.data = a.out.data);
}

/* ---- what the backends get ---- */

static void test_problem(void **state) {
  (void)state;
  fkda_problem p;
  fkda_prefill_args a = ragged_prefill();
  a.q.stride[0] = 999; /* B = 1: without meaning */
  assert_int_equal(fkda_check(&a, FKDA_OP_PREFILL, true, &p), FKDA_OK);
  assert_int_equal(p.B, 1);
  assert_int_equal(p.N, 3);
  assert_int_equal(p.q.stride_b, 0);
  assert_int_equal(p.q.stride_t, H * K);
  assert_int_equal(p.initial.slots, 5);
  assert_true(p.scale == 0.25);
  assert_true(p.initial.data == p.final.data && p.initial_indices.data != p.final_indices.data);
  assert_int_equal(p.checkpoints.mode, FKDA_CHECKPOINT_NONE);
  a.scale = 3;
  assert_int_equal(fkda_check(&a, FKDA_ANY_OP, false, &p), FKDA_OK);
  assert_true(p.scale == 3);
  assert_ptr_equal(p.q.data, a.q.data); /* for its alignment */
  assert_null(p.cu_seqlens.data);
  assert_int_equal(p.cu_seqlens.dtype, FKDA_I32);

  a = offsets_prefill();
  assert_int_equal(fkda_check(&a, FKDA_OP_PREFILL, true, &p), FKDA_OK);
  assert_int_equal(p.checkpoints.mode, FKDA_CHECKPOINT_OFFSETS);
  assert_int_equal(p.checkpoints.rows, 6);
  assert_int_equal(p.checkpoints.per_sequence, 2);
  assert_int_equal(p.checkpoints.stride_n, 2 * HV * V * K);
  assert_int_equal(p.checkpoints.state.stride_slot, HV * V * K);
  assert_int_equal(p.checkpoints.state.slots, 6);

  fkda_decode_args d = speculative_decode();
  d.write_state = 0;
  assert_int_equal(fkda_check(&d, FKDA_OP_DECODE, true, &p), FKDA_OK);
  assert_int_equal(p.N, 3);
  assert_int_equal(p.T, 2);
  assert_int_equal(p.initial_indices.columns, 3);
  assert_int_equal(p.initial_indices.stride_n, 3);
  assert_int_equal(p.initial_indices.stride_column, 1);
  assert_true(p.final_indices.data == p.initial_indices.data);
  assert_int_equal(p.final.dtype, FKDA_NONE);
  assert_int_equal(p.initial.dtype, FKDA_F32);
  assert_int_equal(p.A_log.stride, 1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_valid_calls),
      cmocka_unit_test(test_struct_size),
      cmocka_unit_test(test_header),
      cmocka_unit_test(test_options),
      cmocka_unit_test(test_presence),
      cmocka_unit_test(test_dtypes),
      cmocka_unit_test(test_shapes),
      cmocka_unit_test(test_state_shapes),
      cmocka_unit_test(test_strides),
      cmocka_unit_test(test_empty),
      cmocka_unit_test(test_pointers),
      cmocka_unit_test(test_workspace),
      cmocka_unit_test(test_overlap),
      cmocka_unit_test(test_overlap_rule),
      cmocka_unit_test(test_cu_seqlens),
      cmocka_unit_test(test_indices),
      cmocka_unit_test(test_checkpoint_options),
      cmocka_unit_test(test_checkpoint_shapes),
      cmocka_unit_test(test_checkpoint_contents),
      cmocka_unit_test(test_problem),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
