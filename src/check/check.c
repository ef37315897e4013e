/* Validation: public argument structs in, fkda_problem out. Part of every call, so that text is made on
 * failure only. Order: the struct itself, options, tensors one by one (each against the sizes that q
 * and v have fixed), then memory: overlap and, on the CPU, contents. */
#include <math.h>

#include "check/checker.h"

typedef long long ll;

#define TRY(call)                                                                                  \
  do {                                                                                             \
    const fkda_status try_ = (call);                                                               \
    if (try_ != FKDA_OK) return try_;                                                              \
  } while (0)

#define INVALID FKDA_ERROR_INVALID_ARGUMENT

/* ---- the struct itself ---- */

typedef struct args_header {
  FKDA_ARGS_HEADER;
} args_header;

typedef union any_args {
  fkda_prefill_args prefill;
  fkda_decode_args decode;
  fkda_summary_args summary;
  fkda_backward_args backward;
} any_args;

static const char *op_name(int32_t op) {
  switch (op) {
    case FKDA_OP_PREFILL: return "prefill";
    case FKDA_OP_DECODE: return "decode";
    case FKDA_OP_SUMMARY: return "summary";
    case FKDA_OP_BACKWARD: return "backward";
    default: return "unknown";
  }
}

static size_t args_size(int32_t op) {
  switch (op) {
    case FKDA_OP_PREFILL: return sizeof(fkda_prefill_args);
    case FKDA_OP_DECODE: return sizeof(fkda_decode_args);
    case FKDA_OP_SUMMARY: return sizeof(fkda_summary_args);
    case FKDA_OP_BACKWARD: return sizeof(fkda_backward_args);
    default: return 0;
  }
}

static void args_defaults(int32_t op, any_args *args) {
  switch (op) {
    case FKDA_OP_PREFILL: args->prefill = fkda_prefill_args_init(); break;
    case FKDA_OP_DECODE: args->decode = fkda_decode_args_init(); break;
    case FKDA_OP_SUMMARY: args->summary = fkda_summary_args_init(); break;
    default: args->backward = fkda_backward_args_init(); break;
  }
}

/* Makes *args point to a whole struct of this library's version: the caller's own, or `storage` with the
 * defaults of what an older caller does not know. A newer caller's extra fields must be 0, which
 * every later field's default must mean. */
static fkda_status open_args(const void **args, int32_t op, args_header *header,
                             any_args *storage) {
  const char *bytes = *args;
  if (!bytes) return fkda_fail(INVALID, "args: NULL, expected an argument struct");
  if ((uintptr_t)bytes % _Alignof(any_args))
    return fkda_fail(INVALID, "args: %p, expected a multiple of %d", *args,
                     (int)_Alignof(any_args));
  uint32_t size;
  memcpy(&size, bytes, sizeof size);
  if (size < sizeof(args_header))
    return fkda_fail(INVALID, "struct_size: %u, expected at least %u (use the INIT macro)", size,
                     (unsigned)sizeof(args_header));
  memcpy(header, bytes, sizeof *header);
  const size_t known = args_size(header->op);
  if (known == 0)
    return fkda_fail(INVALID, "op: %d, expected an fkda_op (set by the INIT macro)",
                     (int)header->op);
  if (op != FKDA_ANY_OP && op != header->op)
    return fkda_fail(INVALID, "op: %d (%s), expected %d (%s), which the function called is for",
                     (int)header->op, op_name(header->op), (int)op, op_name(op));
  for (size_t i = known; i < size; ++i)
    if (bytes[i])
      return fkda_fail(INVALID,
                       "struct_size: %u with options set beyond byte %u, expected none that this "
                       "library (%s) does not know",
                       size, (unsigned)known, fkda_version_string());
  if (size < known) {
    args_defaults(header->op, storage);
    memcpy(storage, bytes, size);
    *args = storage;
  }
  return FKDA_OK;
}

static fkda_status check_header(const args_header *h, fkda_checker *c) {
  fkda_problem *p = c->problem;
  const bool cpu = h->device_type == FKDA_DEVICE_CPU;
  if (!cpu && h->device_type != FKDA_DEVICE_CUDA)
    return fkda_fail(INVALID, "device_type: %d, expected %d (CPU) or %d (CUDA)",
                     (int)h->device_type, FKDA_DEVICE_CPU, FKDA_DEVICE_CUDA);
  if (cpu ? h->device_id != 0 : h->device_id < 0)
    return fkda_fail(INVALID, "device_id: %d, expected %s", (int)h->device_id,
                     cpu ? "0 on the CPU" : "at least 0");
  if (cpu && h->stream)
    return fkda_fail(INVALID, "stream: %p, expected NULL on the CPU", h->stream);
  p->op = (fkda_op)h->op;
  p->device_type = h->device_type;
  p->device_id = h->device_id;
  p->stream = h->stream;
  p->backend = h->backend;
  c->wide = h->backend && strcmp(h->backend, "reference") == 0;
  if (!c->for_run) return FKDA_OK;

  const uintptr_t begin = (uintptr_t)h->workspace;
  const uintptr_t alignment = cpu ? 64 : 256;
  uintptr_t end;
  if (!h->workspace && h->workspace_size)
    return fkda_fail(INVALID, "workspace: NULL with workspace_size %llu, expected memory or size 0",
                     (unsigned long long)h->workspace_size);
  if (begin % alignment)
    return fkda_fail(INVALID, "workspace: %p, expected a multiple of %d", h->workspace,
                     (int)alignment);
  if (h->workspace_size > (size_t)FKDA_MAX_EXTENT ||
      __builtin_add_overflow(begin, (uintptr_t)h->workspace_size, &end))
    return fkda_fail(INVALID, "workspace_size: %llu, expected an end inside the address space",
                     (unsigned long long)h->workspace_size);
  p->workspace = h->workspace;
  p->workspace_size = h->workspace_size;
  if (h->workspace_size)
    c->region[c->regions++] =
        (fkda_region){.name = "workspace", .begin = begin, .end = end, .written = true};
  return FKDA_OK;
}

/* ---- options ---- */

static fkda_status check_bool(const char *name, int32_t value) {
  return value == 0 || value == 1 ? FKDA_OK
                                  : fkda_fail(INVALID, "%s: %d, expected 0 or 1", name, (int)value);
}

static fkda_status check_reserved(int32_t value) {
  return value == 0 ? FKDA_OK : fkda_fail(INVALID, "reserved0: %d, expected 0", (int)value);
}

static fkda_status check_layout(fkda_checker *c, int32_t layout) {
  if (layout != FKDA_STATE_VK && layout != FKDA_STATE_KV)
    return fkda_fail(INVALID, "state_layout: %d, expected %d (V,K) or %d (K,V)", (int)layout,
                     FKDA_STATE_VK, FKDA_STATE_KV);
  c->problem->layout = (fkda_state_layout)layout;
  return FKDA_OK;
}

/* ---- what all operations share: tokens and gate ---- */

typedef struct token_args {
  const fkda_tensor *q, *k, *v, *g, *beta, *out; /* summary: q NULL. out NULL where there is none */
  const fkda_tensor *A_log, *dt_bias;
  int32_t gate, l2norm, beta_is_logit, allow_neg_eigval;
  double lower_bound, scale;
} token_args;

#define TOKEN_ARGS(a)                                                                              \
  .k = &(a)->k, .v = &(a)->v, .g = &(a)->g, .beta = &(a)->beta, .A_log = &(a)->A_log,              \
  .dt_bias = &(a)->dt_bias, .gate = (a)->gate, .l2norm = (a)->l2norm,                              \
  .beta_is_logit = (a)->beta_is_logit, .allow_neg_eigval = (a)->allow_neg_eigval,                  \
  .lower_bound = (a)->lower_bound

static fkda_status check_gate_options(fkda_checker *c, const token_args *a) {
  fkda_problem *p = c->problem;
  if (a->gate < FKDA_GATE_BOUNDED || a->gate > FKDA_GATE_DIRECT)
    return fkda_fail(INVALID, "gate: %d, expected %d (bounded), %d (softplus) or %d (direct)",
                     (int)a->gate, FKDA_GATE_BOUNDED, FKDA_GATE_SOFTPLUS, FKDA_GATE_DIRECT);
  TRY(check_bool("l2norm", a->l2norm));
  TRY(check_bool("beta_is_logit", a->beta_is_logit));
  TRY(check_bool("allow_neg_eigval", a->allow_neg_eigval));
  if (a->gate == FKDA_GATE_BOUNDED && !(a->lower_bound >= -5 && a->lower_bound < 0))
    return fkda_fail(INVALID, "lower_bound: %g, expected a number in [-5,0)", a->lower_bound);
  if (!isfinite(a->scale))
    return fkda_fail(INVALID, "scale: %g, expected a finite number", a->scale);
  p->gate = (fkda_gate)a->gate;
  p->l2norm = a->l2norm;
  p->beta_is_logit = a->beta_is_logit;
  p->allow_neg_eigval = a->allow_neg_eigval;
  p->lower_bound = a->lower_bound;
  return FKDA_OK;
}

static fkda_status check_required(fkda_checker *c, const char *name, const fkda_tensor *tensor,
                                  const fkda_form *form) {
  bool present;
  TRY(fkda_check_presence(c, name, tensor, &present));
  if (!present) return fkda_fail(INVALID, "%s: absent, expected a tensor [%s]", name, form->dims);
  return fkda_check_tensor(c, name, tensor, form);
}

static fkda_status check_absent(fkda_checker *c, const char *name, const fkda_tensor *tensor,
                                const char *why) {
  bool present;
  TRY(fkda_check_presence(c, name, tensor, &present));
  return present ? fkda_fail(INVALID, "%s: given, expected none %s", name, why) : FKDA_OK;
}

/* Queries carry no pointers but those of rows, where the alignment may decide which backend it is. */
static void *data_of(const fkda_checker *c, const fkda_tensor *t) {
  return c->for_run ? t->data : NULL;
}

static fkda_rows rows_of(const fkda_tensor *t) {
  int64_t stride[FKDA_MAX_DIMS];
  fkda_resolve_strides(t, stride);
  return (fkda_rows){t->data, t->dtype, stride[0], stride[1], stride[2]};
}

/* A contiguous tensor of any rank. */
static fkda_vector vector_of(const fkda_checker *c, const fkda_tensor *t) {
  return (fkda_vector){data_of(c, t), t->dtype, 1};
}

/* [N], strided. */
static fkda_vector strided_vector_of(const fkda_checker *c, const fkda_tensor *t) {
  int64_t stride[FKDA_MAX_DIMS];
  fkda_resolve_strides(t, stride);
  return (fkda_vector){data_of(c, t), t->dtype, stride[0]};
}

/* a*b*c, each 0 taken as 1, within FKDA_MAX_ROWS? */
static bool rows_fit(int64_t a, int64_t b, int64_t c) {
  int64_t rows = a ? a : 1;
  return !__builtin_mul_overflow(rows, b ? b : 1, &rows) &&
         !__builtin_mul_overflow(rows, c ? c : 1, &rows) && rows <= FKDA_MAX_ROWS;
}

/* q (k where there is no q) fixes B, T, H, K and the io dtype; v fixes HV and V; the rest follows. */
static fkda_status check_tokens(fkda_checker *c, const token_args *a) {
  fkda_problem *p = c->problem;
  TRY(check_gate_options(c, a));

  const fkda_tensor *first = a->q ? a->q : a->k;
  const char *first_name = a->q ? "q" : "k";
  fkda_form form = {
      .dims = p->op == FKDA_OP_DECODE ? "N,T,H,K" : "B,T,H,K",
      .ndim = 4,
      .shape = {-1, -1, -1, -1},
      .dtypes = FKDA_DTYPE_BIT(FKDA_BF16) | FKDA_DTYPE_BIT(FKDA_F16) | FKDA_DTYPE_BIT(FKDA_F32),
      .strides = FKDA_STRIDES_INNER,
  };
  TRY(check_required(c, first_name, first, &form));
  p->B = first->shape[0];
  p->T = first->shape[1];
  p->H = first->shape[2];
  p->K = first->shape[3];
  p->io_dtype = first->dtype;
  if (p->H < 1) return fkda_fail(INVALID, "%s: 0 heads, expected at least 1", first_name);
  if (p->K < 1 || p->K > FKDA_MAX_DIM)
    return fkda_fail(INVALID, "%s: K = %lld, expected 1 to %d", first_name, (ll)p->K, FKDA_MAX_DIM);
  if (p->op == FKDA_OP_DECODE && (p->T < 1 || p->T > FKDA_DECODE_MAX_TOKENS))
    return fkda_fail(INVALID, "q: T = %lld, expected 1 to %d tokens a sequence in decode", (ll)p->T,
                     FKDA_DECODE_MAX_TOKENS);

  const uint32_t io = FKDA_DTYPE_BIT(p->io_dtype);
  form.dtypes = io;
  form.io_dtype = p->io_dtype;
  form.io_of = first_name;
  form.match = first_name;
  form.dims = "B,T,HV,V";
  form.shape[0] = p->B;
  form.shape[1] = p->T;
  TRY(check_required(c, "v", a->v, &form));
  p->HV = a->v->shape[2];
  p->V = a->v->shape[3];
  if (p->HV < 1 || p->HV % p->H)
    return fkda_fail(INVALID, "v: HV = %lld, expected a multiple of H = %lld, the heads of %s",
                     (ll)p->HV, (ll)p->H, first_name);
  if (p->V < 1 || p->V > FKDA_MAX_DIM)
    return fkda_fail(INVALID, "v: V = %lld, expected 1 to %d", (ll)p->V, FKDA_MAX_DIM);
  if (!rows_fit(p->B, p->T, p->HV))
    return fkda_fail(INVALID, "v: B*T*HV = %lld*%lld*%lld, expected at most 2^40", (ll)p->B,
                     (ll)p->T, (ll)p->HV);
  p->v = rows_of(a->v);

  if (a->q) {
    form.dims = "B,T,H,K";
    form.shape[2] = p->H;
    form.shape[3] = p->K;
    TRY(check_required(c, "k", a->k, &form));
    p->q = rows_of(a->q);
  }
  p->k = rows_of(a->k);

  form.dims = "B,T,HV,K";
  form.shape[2] = p->HV;
  form.shape[3] = p->K;
  form.dtypes = io | FKDA_DTYPE_BIT(FKDA_F32);
  form.match = "k and v";
  TRY(check_required(c, "g", a->g, &form));
  p->g = rows_of(a->g);

  form.dims = "B,T,HV";
  form.ndim = 3;
  form.match = "v";
  TRY(check_required(c, "beta", a->beta, &form));
  p->beta = rows_of(a->beta);

  if (a->out) {
    form.dims = "B,T,HV,V";
    form.ndim = 4;
    form.shape[3] = p->V;
    form.dtypes = io;
    form.written = true;
    TRY(check_required(c, "out", a->out, &form));
    p->out = rows_of(a->out);
  }
  p->scale = a->scale != 0 ? a->scale : 1 / sqrt((double)p->K);

  const uint32_t vector_dtypes = FKDA_DTYPE_BIT(FKDA_F32) | FKDA_DTYPE_BIT(FKDA_BF16);
  if (p->gate == FKDA_GATE_DIRECT) {
    TRY(check_absent(c, "A_log", a->A_log, "with the direct gate"));
    return check_absent(c, "dt_bias", a->dt_bias, "with the direct gate");
  }
  bool present;
  TRY(fkda_check_presence(c, "A_log", a->A_log, &present));
  if (present) {
    TRY(fkda_check_vector(c, "A_log", a->A_log, p->HV, "HV", vector_dtypes));
    p->A_log = vector_of(c, a->A_log);
  }
  TRY(fkda_check_presence(c, "dt_bias", a->dt_bias, &present));
  if (present) {
    TRY(fkda_check_vector(c, "dt_bias", a->dt_bias, p->HV * p->K, "HV*K", vector_dtypes));
    p->dt_bias = vector_of(c, a->dt_bias);
  }
  return FKDA_OK;
}

/* ---- sequences ---- */

/* N: from cu_seqlens, or B. */
static fkda_status check_sequences(fkda_checker *c, const fkda_tensor *cu_seqlens) {
  fkda_problem *p = c->problem;
  bool present;
  p->N = p->B;
  TRY(fkda_check_presence(c, "cu_seqlens", cu_seqlens, &present));
  if (present) {
    const fkda_form form = {.dims = "N+1",
                            .ndim = 1,
                            .shape = {-1},
                            .dtypes = FKDA_DTYPES_INDEX,
                            .strides = FKDA_STRIDES_CONTIGUOUS};
    TRY(fkda_check_tensor(c, "cu_seqlens", cu_seqlens, &form));
    if (cu_seqlens->shape[0] < 1)
      return fkda_fail(INVALID, "cu_seqlens: shape [0], expected [N+1], at least 1 element");
    if (p->B != 1)
      return fkda_fail(INVALID,
                       "cu_seqlens: given with B = %lld, expected B = 1 (sequences packed "
                       "along T)",
                       (ll)p->B);
    p->N = cu_seqlens->shape[0] - 1;
    p->cu_seqlens = vector_of(c, cu_seqlens);
  }
  if (!rows_fit(p->N, p->HV, 1))
    return fkda_fail(INVALID, "cu_seqlens: N*HV = %lld*%lld, expected at most 2^40", (ll)p->N,
                     (ll)p->HV);
  return FKDA_OK;
}

/* ---- states ---- */

#define STATE_DTYPES (FKDA_DTYPE_BIT(FKDA_BF16) | FKDA_DTYPE_BIT(FKDA_F32))

/* Names of a state's dimensions, by what precedes HV and by layout. */
static const char *state_dims(const fkda_problem *p, const char *vk, const char *kv) {
  return p->layout == FKDA_STATE_VK ? vk : kv;
}

/* [slots,HV,V,K] by layout; slots -1: a pool of any size. */
static fkda_form state_form(const fkda_problem *p, int64_t slots, uint32_t dtypes, bool written) {
  const bool vk = p->layout == FKDA_STATE_VK;
  return (fkda_form){
      .dims =
          slots < 0 ? state_dims(p, "P,HV,V,K", "P,HV,K,V") : state_dims(p, "N,HV,V,K", "N,HV,K,V"),
      .ndim = 4,
      .shape = {slots, p->HV, vk ? p->V : p->K, vk ? p->K : p->V},
      .dtypes = dtypes,
      .strides = FKDA_STRIDES_INNER,
      .written = written,
      .state = true,
  };
}

/* The last three dimensions are a state's, the one before them numbers the slots. */
static fkda_states states_of(const fkda_checker *c, const fkda_tensor *t) {
  const int32_t slot = t->ndim - 4;
  int64_t stride[FKDA_MAX_DIMS];
  fkda_resolve_strides(t, stride);
  return (fkda_states){data_of(c, t), t->dtype,         t->shape[slot],
                       stride[slot],  stride[slot + 1], stride[slot + 2]};
}

static fkda_indices indices_of(const fkda_checker *c, const fkda_tensor *t) {
  const bool two = t->ndim == 2;
  int64_t stride[FKDA_MAX_DIMS];
  fkda_resolve_strides(t, stride);
  return (fkda_indices){data_of(c, t), t->dtype, two ? t->shape[1] : 0, stride[0],
                        two ? stride[1] : 0};
}

static fkda_form index_form(int64_t n, const char *dims, const char *match) {
  return (fkda_form){
      .dims = dims, .ndim = 1, .shape = {n}, .match = match, .dtypes = FKDA_DTYPES_INDEX};
}

static fkda_status check_has_initial(fkda_checker *c, const fkda_tensor *t) {
  fkda_problem *p = c->problem;
  bool present;
  TRY(fkda_check_presence(c, "has_initial_state", t, &present));
  if (!present) return FKDA_OK;
  if (!p->initial.dtype)
    return fkda_fail(INVALID, "has_initial_state: given, expected none without initial_state");
  fkda_form form = index_form(p->N, "N", NULL);
  form.dtypes = FKDA_DTYPE_BIT(FKDA_BOOL);
  TRY(fkda_check_tensor(c, "has_initial_state", t, &form));
  p->has_initial = strided_vector_of(c, t);
  return FKDA_OK;
}

/* One of initial_state and final_state with its indices. */
static fkda_status check_prefill_state(fkda_checker *c, const char *name, const fkda_tensor *state,
                                       const char *indices_name, const fkda_tensor *indices,
                                       bool written, fkda_states *states, fkda_indices *index) {
  const fkda_problem *p = c->problem;
  bool state_present, indexed;
  TRY(fkda_check_presence(c, name, state, &state_present));
  TRY(fkda_check_presence(c, indices_name, indices, &indexed));
  if (indexed && !state_present)
    return fkda_fail(INVALID, "%s: given, expected none without %s", indices_name, name);
  if (!state_present) return FKDA_OK;
  const fkda_form form = state_form(p, indexed ? -1 : p->N, STATE_DTYPES, written);
  TRY(fkda_check_tensor(c, name, state, &form));
  *states = states_of(c, state);
  if (!indexed) return FKDA_OK;
  const fkda_form index_of_n = index_form(p->N, "N", NULL);
  TRY(fkda_check_tensor(c, indices_name, indices, &index_of_n));
  *index = indices_of(c, indices);
  return FKDA_OK;
}

/* ---- checkpoints ---- */

static fkda_status check_every(int64_t every) {
  return every >= 0 && every % FKDA_CHUNK_MULTIPLE == 0
             ? FKDA_OK
             : fkda_fail(INVALID, "checkpoint_every: %lld, expected 0 or a multiple of %d",
                         (ll)every, FKDA_CHUNK_MULTIPLE);
}

static void set_interval(fkda_checkpoints *x, int64_t every, bool before) {
  /* every interval longer than any sequence means the same: keep it where sums cannot overflow */
  const int64_t longest = 2 * FKDA_MAX_ROWS;
  x->mode = FKDA_CHECKPOINT_EVERY;
  x->every = every < longest ? every : longest;
  x->before = before;
}

/* "checkpoint_state: shape [..], expected .." of the rank that the other options ask for. */
static fkda_status check_checkpoint_state(fkda_checker *c, const fkda_tensor *state, bool indexed,
                                          int64_t rows, bool written) {
  fkda_problem *p = c->problem;
  fkda_checkpoints *x = &p->checkpoints;
  const bool by_sequence = x->mode == FKDA_CHECKPOINT_OFFSETS;
  const bool one_each = by_sequence && x->per_sequence == 1 && x->offsets.columns == 0;
  const uint32_t dtypes = STATE_DTYPES | FKDA_DTYPE_BIT(FKDA_F16);
  fkda_form form = state_form(p, indexed ? -1 : rows, dtypes, written);
  form.state = indexed; /* with slots of its own it may lie in the pool that the call works on */
  if (!indexed && !by_sequence) form.dims = state_dims(p, "R,HV,V,K", "R,HV,K,V");
  const bool five = !indexed && ((by_sequence && !one_each) ||
                                 (x->mode == FKDA_CHECKPOINT_EVERY && state->ndim == 5));
  if (five) {
    form.ndim = 5;
    form.dims = by_sequence ? state_dims(p, "N,C,HV,V,K", "N,C,HV,K,V")
                            : state_dims(p, "B,R/B,HV,V,K", "B,R/B,HV,K,V");
    memmove(form.shape + 2, form.shape + 1, 3 * sizeof form.shape[0]);
    form.shape[0] = by_sequence ? p->N : p->B;
    form.shape[1] = by_sequence ? x->per_sequence : -1;
    /* rows are numbered through, so that batch rows hold exactly what they need */
    if (!by_sequence && p->B > 1) form.shape[1] = p->T / x->every + (p->T % x->every != 0);
  }
  TRY(fkda_check_tensor(c, "checkpoint_state", state, &form));
  x->state = states_of(c, state);
  x->stride_n = x->state.stride_slot; /* one offset a sequence */
  if (!five) return FKDA_OK;
  int64_t stride[FKDA_MAX_DIMS];
  fkda_resolve_strides(state, stride);
  const int64_t stride_n = stride[0];
  if (by_sequence) {
    x->stride_n = stride_n;
    x->state.slots = x->rows;
    return FKDA_OK;
  }
  const int64_t per_row = state->shape[1];
  if (per_row == 1) x->state.stride_slot = stride_n;
  if (per_row > 1 && stride_n && stride_n != per_row * x->state.stride_slot)
    return fkda_fail(
        INVALID,
        "checkpoint_state: strides %lld and %lld of the first two dimensions, expected "
        "the first to be %lld times the second",
        (ll)stride_n, (ll)x->state.stride_slot, (ll)per_row);
  x->state.slots = p->B * per_row;
  return FKDA_OK;
}

static fkda_status check_checkpoints(fkda_checker *c, const fkda_prefill_args *a) {
  fkda_problem *p = c->problem;
  fkda_checkpoints *x = &p->checkpoints;
  bool state, offsets, packed, indexed;
  TRY(fkda_check_presence(c, "checkpoint_state", &a->checkpoint_state, &state));
  TRY(fkda_check_presence(c, "checkpoint_offsets", &a->checkpoint_offsets, &offsets));
  TRY(fkda_check_presence(c, "checkpoint_indptr", &a->checkpoint_indptr, &packed));
  TRY(fkda_check_presence(c, "checkpoint_state_indices", &a->checkpoint_state_indices, &indexed));
  TRY(check_bool("checkpoint_before", a->checkpoint_before));
  const bool every = a->checkpoint_every != 0;
  TRY(check_every(a->checkpoint_every));
  if (every && offsets)
    return fkda_fail(INVALID, "checkpoint_every: %lld, expected 0 with checkpoint_offsets",
                     (ll)a->checkpoint_every);
  if (a->checkpoint_before && !every)
    return fkda_fail(INVALID, "checkpoint_before: 1, expected 0 without checkpoint_every");
  if (packed && !offsets)
    return fkda_fail(INVALID, "checkpoint_indptr: given, expected none without checkpoint_offsets");
  if (indexed && !offsets && !every)
    return fkda_fail(INVALID,
                     "checkpoint_state_indices: given, expected none without checkpoint_offsets or "
                     "checkpoint_every");
  if (state && !offsets && !every)
    return fkda_fail(INVALID,
                     "checkpoint_state: given, expected none without checkpoint_offsets or "
                     "checkpoint_every");
  if (!state && (offsets || every))
    return fkda_fail(INVALID, "checkpoint_state: absent, expected a tensor with %s",
                     offsets ? "checkpoint_offsets" : "checkpoint_every");
  if (!state) return FKDA_OK;

  /* Which rows there are. */
  const fkda_tensor *offset = &a->checkpoint_offsets, *slot = &a->checkpoint_state_indices;
  fkda_form index = index_form(-1, "R", NULL);
  if (every) {
    set_interval(x, a->checkpoint_every, a->checkpoint_before);
  } else if (packed) {
    x->mode = FKDA_CHECKPOINT_PACKED;
    TRY(fkda_check_tensor(c, "checkpoint_offsets", offset, &index));
    x->rows = offset->shape[0];
    const fkda_form indptr = {.dims = "N+1",
                              .ndim = 1,
                              .shape = {p->N + 1},
                              .dtypes = FKDA_DTYPES_INDEX,
                              .strides = FKDA_STRIDES_CONTIGUOUS};
    TRY(fkda_check_tensor(c, "checkpoint_indptr", &a->checkpoint_indptr, &indptr));
    x->indptr = vector_of(c, &a->checkpoint_indptr);
  } else {
    x->mode = FKDA_CHECKPOINT_OFFSETS;
    const bool one = offset->ndim == 1;
    if (one && offset->shape[0] != p->N)
      return fkda_fail(INVALID,
                       "checkpoint_indptr: absent, expected [N+1] with checkpoint_offsets of shape "
                       "[%lld], which is not [N] = [%lld]",
                       (ll)offset->shape[0], (ll)p->N);
    index.ndim = one ? 1 : 2;
    index.dims = one ? "N" : "N,C";
    index.shape[0] = p->N;
    index.shape[1] = -1;
    TRY(fkda_check_tensor(c, "checkpoint_offsets", offset, &index));
    x->per_sequence = one ? 1 : offset->shape[1];
    x->rows = p->N * x->per_sequence;
  }
  if (offsets) x->offsets = indices_of(c, offset);

  if (indexed) {
    if (offsets) {
      memcpy(index.shape, offset->shape, sizeof index.shape);
      index.match = "checkpoint_offsets";
    }
    TRY(fkda_check_tensor(c, "checkpoint_state_indices", slot, &index));
    x->slots = indices_of(c, slot);
    if (every) x->rows = slot->shape[0];
  }
  TRY(check_checkpoint_state(c, &a->checkpoint_state, indexed, every ? -1 : x->rows, true));
  if (every && !indexed) x->rows = x->state.slots;
  if (x->mode == FKDA_CHECKPOINT_OFFSETS && x->per_sequence == 0) *x = (fkda_checkpoints){0};
  return FKDA_OK;
}

/* ---- the operations ---- */

static fkda_status check_prefill(fkda_checker *c, const fkda_prefill_args *a) {
  fkda_problem *p = c->problem;
  const token_args tokens = {TOKEN_ARGS(a), .q = &a->q, .out = &a->out, .scale = a->scale};
  TRY(check_reserved(a->reserved0));
  TRY(check_bool("batch_invariant", a->batch_invariant));
  TRY(check_layout(c, a->state_layout));
  TRY(check_tokens(c, &tokens));
  TRY(check_sequences(c, &a->cu_seqlens));
  p->batch_invariant = a->batch_invariant;
  c->initial_indices = "initial_state_indices";
  c->initial = "initial_state";
  c->final = "final_state";
  TRY(check_prefill_state(c, "initial_state", &a->initial_state, "initial_state_indices",
                          &a->initial_state_indices, false, &p->initial, &p->initial_indices));
  TRY(check_prefill_state(c, "final_state", &a->final_state, "final_state_indices",
                          &a->final_state_indices, true, &p->final, &p->final_indices));
  TRY(check_has_initial(c, &a->has_initial_state));
  return check_checkpoints(c, a);
}

static fkda_status check_decode_indices(fkda_checker *c, const fkda_decode_args *a) {
  fkda_problem *p = c->problem;
  const fkda_tensor *initial = &a->initial_state_indices, *final = &a->final_state_indices;
  bool have_initial, have_final, accepted;
  TRY(fkda_check_presence(c, "initial_state_indices", initial, &have_initial));
  TRY(fkda_check_presence(c, "final_state_indices", final, &have_final));
  TRY(fkda_check_presence(c, "num_accepted_tokens", &a->num_accepted_tokens, &accepted));
  /* the first of the two that is there decides between [N] and [N,M] */
  const char *name = have_initial ? "initial_state_indices" : "final_state_indices";
  const fkda_tensor *first = have_initial ? initial : final;
  fkda_form form = index_form(p->N, "N", NULL);
  if (have_initial || have_final) {
    if (first->ndim == 2) {
      form.ndim = 2;
      form.dims = "N,M";
      form.shape[1] = -1;
    }
    TRY(fkda_check_tensor(c, name, first, &form));
    if (first->ndim == 2 && first->shape[1] < p->T)
      return fkda_fail(INVALID, "%s: %lld columns, expected at least T = %lld", name,
                       (ll)first->shape[1], (ll)p->T);
    p->initial_indices = p->final_indices = indices_of(c, first);
    c->initial_indices = name;
  }
  if (have_initial && have_final) {
    form.match = name;
    form.shape[1] = first->shape[1];
    TRY(fkda_check_tensor(c, "final_state_indices", final, &form));
    p->final_indices = indices_of(c, final);
  }
  if (!accepted) return FKDA_OK;
  if (!p->initial_indices.columns)
    return fkda_fail(INVALID,
                     "num_accepted_tokens: given, expected none without two-dimensional state "
                     "indices");
  form = index_form(p->N, "N", NULL);
  TRY(fkda_check_tensor(c, "num_accepted_tokens", &a->num_accepted_tokens, &form));
  p->num_accepted_tokens = strided_vector_of(c, &a->num_accepted_tokens);
  return FKDA_OK;
}

static fkda_status check_decode(fkda_checker *c, const fkda_decode_args *a) {
  fkda_problem *p = c->problem;
  const token_args tokens = {TOKEN_ARGS(a), .q = &a->q, .out = &a->out, .scale = a->scale};
  TRY(check_reserved(a->reserved0));
  TRY(check_bool("batch_invariant", a->batch_invariant));
  TRY(check_bool("write_state", a->write_state));
  TRY(check_layout(c, a->state_layout));
  TRY(check_tokens(c, &tokens));
  p->N = p->B;
  p->batch_invariant = a->batch_invariant;
  TRY(check_decode_indices(c, a));
  bool state, apart;
  TRY(fkda_check_presence(c, "state", &a->state, &state));
  TRY(fkda_check_presence(c, "initial_state", &a->initial_state, &apart));
  fkda_form form = state_form(p, p->initial_indices.dtype ? -1 : p->N, STATE_DTYPES, false);
  if (apart) TRY(fkda_check_tensor(c, "initial_state", &a->initial_state, &form));
  form.written = a->write_state;
  if (state || !apart || a->write_state) TRY(check_required(c, "state", &a->state, &form));
  p->initial = states_of(c, apart ? &a->initial_state : &a->state);
  if (a->write_state) p->final = states_of(c, &a->state);
  c->initial = apart ? "initial_state" : "state";
  c->final = "state";
  return check_has_initial(c, &a->has_initial_state);
}

static fkda_status check_summary(fkda_checker *c, const fkda_summary_args *a) {
  fkda_problem *p = c->problem;
  const token_args tokens = {TOKEN_ARGS(a)};
  TRY(check_reserved(a->reserved0));
  TRY(check_layout(c, a->state_layout));
  TRY(check_tokens(c, &tokens));
  TRY(check_sequences(c, &a->cu_seqlens));
  fkda_form form = state_form(p, p->N, FKDA_DTYPE_BIT(FKDA_F32), true);
  form.state = false;
  TRY(check_required(c, "b", &a->b, &form));
  form.dims = "N,HV,K,K";
  form.shape[2] = form.shape[3] = p->K;
  TRY(check_required(c, "M", &a->M, &form));
  p->summary_M = states_of(c, &a->M);
  p->summary_b = states_of(c, &a->b);
  return FKDA_OK;
}

/* A tensor that need not be there. */
static fkda_status check_optional(fkda_checker *c, const char *name, const fkda_tensor *t,
                                  const fkda_form *form, bool *present) {
  TRY(fkda_check_presence(c, name, t, present));
  return *present ? fkda_check_tensor(c, name, t, form) : FKDA_OK;
}

static fkda_status check_rows(fkda_checker *c, const char *name, const fkda_tensor *t,
                              const fkda_form *form, fkda_rows *rows) {
  bool present;
  TRY(check_optional(c, name, t, form, &present));
  if (present) *rows = rows_of(t);
  return FKDA_OK;
}

static fkda_status check_states(fkda_checker *c, const char *name, const fkda_tensor *t,
                                const fkda_form *form, fkda_states *states) {
  bool present;
  TRY(check_optional(c, name, t, form, &present));
  if (present) *states = states_of(c, t);
  return FKDA_OK;
}

/* States kept by the prefill: its checkpoints by interval, as an input. */
static fkda_status check_kept_states(fkda_checker *c, const fkda_backward_args *a) {
  fkda_checkpoints *x = &c->problem->checkpoints;
  bool present;
  TRY(fkda_check_presence(c, "checkpoint_state", &a->checkpoint_state, &present));
  TRY(check_every(a->checkpoint_every));
  if (present && !a->checkpoint_every)
    return fkda_fail(INVALID, "checkpoint_state: given, expected none without checkpoint_every");
  if (!present && a->checkpoint_every)
    return fkda_fail(INVALID, "checkpoint_state: absent, expected a tensor with checkpoint_every");
  if (!present) return FKDA_OK;
  set_interval(x, a->checkpoint_every, true);
  TRY(check_checkpoint_state(c, &a->checkpoint_state, false, -1, false));
  x->rows = x->state.slots;
  return FKDA_OK;
}

/* Gradients: each has the shape of what it belongs to. */
static fkda_status check_gradients(fkda_checker *c, const fkda_backward_args *a) {
  fkda_problem *p = c->problem;
  const uint32_t f32 = FKDA_DTYPE_BIT(FKDA_F32);
  fkda_form form = {.dims = "B,T,HV,V",
                    .ndim = 4,
                    .shape = {p->B, p->T, p->HV, p->V},
                    .match = "v",
                    .dtypes = FKDA_DTYPE_BIT(p->io_dtype) | f32,
                    .io_dtype = p->io_dtype,
                    .io_of = "q",
                    .strides = FKDA_STRIDES_INNER};
  TRY(check_rows(c, "d_out", &a->d_out, &form, &p->d_out));
  form.written = true;
  TRY(check_rows(c, "d_v", &a->d_v, &form, &p->d_v));
  form.dims = "B,T,H,K";
  form.match = "q";
  form.shape[2] = p->H;
  form.shape[3] = p->K;
  TRY(check_rows(c, "d_q", &a->d_q, &form, &p->d_q));
  TRY(check_rows(c, "d_k", &a->d_k, &form, &p->d_k));
  form.dims = "B,T,HV,K";
  form.match = "g";
  form.shape[2] = p->HV;
  TRY(check_rows(c, "d_g", &a->d_g, &form, &p->d_g));
  form.dims = "B,T,HV";
  form.match = "beta";
  form.ndim = 3;
  TRY(check_rows(c, "d_beta", &a->d_beta, &form, &p->d_beta));

  form = state_form(p, p->N, STATE_DTYPES, false);
  form.state = false;
  TRY(check_states(c, "d_final_state", &a->d_final_state, &form, &p->d_final));
  form.written = true;
  TRY(check_states(c, "d_initial_state", &a->d_initial_state, &form, &p->d_initial));

  if (p->gate == FKDA_GATE_DIRECT) {
    TRY(check_absent(c, "d_A_log", &a->d_A_log, "with the direct gate"));
    return check_absent(c, "d_dt_bias", &a->d_dt_bias, "with the direct gate");
  }
  bool present;
  form = (fkda_form){.dims = "HV",
                     .ndim = 1,
                     .shape = {p->HV, p->K},
                     .dtypes = f32,
                     .strides = FKDA_STRIDES_CONTIGUOUS,
                     .written = true};
  TRY(check_optional(c, "d_A_log", &a->d_A_log, &form, &present));
  if (present) p->d_A_log = vector_of(c, &a->d_A_log);
  form.dims = "HV,K";
  form.ndim = 2;
  TRY(check_optional(c, "d_dt_bias", &a->d_dt_bias, &form, &present));
  if (present) p->d_dt_bias = vector_of(c, &a->d_dt_bias);
  return FKDA_OK;
}

static fkda_status check_backward(fkda_checker *c, const fkda_backward_args *a) {
  fkda_problem *p = c->problem;
  const token_args tokens = {TOKEN_ARGS(a), .q = &a->q, .scale = a->scale};
  const fkda_tensor none = {0};
  TRY(check_reserved(a->reserved0));
  TRY(check_layout(c, a->state_layout));
  TRY(check_tokens(c, &tokens));
  TRY(check_sequences(c, &a->cu_seqlens));
  TRY(check_prefill_state(c, "initial_state", &a->initial_state, "initial_state_indices", &none,
                          false, &p->initial, &p->initial_indices));
  TRY(check_kept_states(c, a));
  return check_gradients(c, a);
}

fkda_status fkda_check(const void *args, int32_t op, bool for_run, fkda_problem *problem) {
  args_header header = {0};
  any_args storage;
  fkda_checker checker;
  fkda_checker *c = &checker;
  TRY(open_args(&args, op, &header, &storage));

  memset(problem, 0, sizeof *problem);
  c->problem = problem;
  c->for_run = for_run;
  c->initial_indices = c->initial = c->final = NULL;
  c->regions = 0; /* the regions themselves are filled in as they come */
  TRY(check_header(&header, c));
  switch (header.op) {
    case FKDA_OP_PREFILL: TRY(check_prefill(c, args)); break;
    case FKDA_OP_DECODE: TRY(check_decode(c, args)); break;
    case FKDA_OP_SUMMARY: TRY(check_summary(c, args)); break;
    default: TRY(check_backward(c, args)); break;
  }
  if (for_run) {
    TRY(fkda_check_overlap(c));
    if (problem->device_type == FKDA_DEVICE_CPU) TRY(fkda_check_contents(c));
  }
  return FKDA_OK;
}

fkda_status fkda_check_workspace(const fkda_problem *problem, size_t needed) {
  const bool cpu = problem->device_type == FKDA_DEVICE_CPU;
  if (problem->workspace_size >= needed || (cpu && !problem->workspace)) return FKDA_OK;
  return fkda_fail(FKDA_ERROR_WORKSPACE, "workspace: %llu bytes, expected at least %llu",
                   (unsigned long long)problem->workspace_size, (unsigned long long)needed);
}
