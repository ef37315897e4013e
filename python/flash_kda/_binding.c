/* flash_kda._C: the functions of the package, on Python's limited API (one binary for 3.10 and later).
 *
 * A call: match arguments to parameters -> fill the C argument struct -> release the GIL -> run ->
 * raise the C library's message if there is one. Nothing is allocated on the way but what a tensor
 * library itself does for each tensor.
 */
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "_tensors.h"

/* ---- parameters ------------------------------------------------------------------------------- */

/* Every parameter that any function has: X(name, default in the function's signature). */
#define PARAMETERS(X)                                                                              \
  X(q, "None")                                                                                     \
  X(k, "None")                                                                                     \
  X(v, "None")                                                                                     \
  X(g, "None")                                                                                     \
  X(beta, "None")                                                                                  \
  X(scale, "None")                                                                                 \
  X(out, "None")                                                                                   \
  X(A_log, "None")                                                                                 \
  X(dt_bias, "None")                                                                               \
  X(lower_bound, "None")                                                                           \
  X(initial_state, "None")                                                                         \
  X(final_state, "None")                                                                           \
  X(cu_seqlens, "None")                                                                            \
  X(gate, "'bounded'")                                                                             \
  X(l2norm, "True")                                                                                \
  X(beta_is_logit, "True")                                                                         \
  X(allow_neg_eigval, "False")                                                                     \
  X(state_layout, "'vk'")                                                                          \
  X(state_indices, "None")                                                                         \
  X(initial_state_indices, "None")                                                                 \
  X(final_state_indices, "None")                                                                   \
  X(has_initial_state, "None")                                                                     \
  X(checkpoint_state, "None")                                                                      \
  X(checkpoint_offsets, "None")                                                                    \
  X(checkpoint_indptr, "None")                                                                     \
  X(checkpoint_every, "0")                                                                         \
  X(checkpoint_before, "False")                                                                    \
  X(checkpoint_state_indices, "None")                                                              \
  X(batch_invariant, "False")                                                                      \
  X(workspace, "None")                                                                             \
  X(backend, "None")                                                                               \
  X(state, "None")                                                                                 \
  X(num_accepted_tokens, "None")                                                                   \
  X(write_state, "True")                                                                           \
  X(d_out, "None")                                                                                 \
  X(d_final_state, "None")                                                                         \
  X(d_q, "None")                                                                                   \
  X(d_k, "None")                                                                                   \
  X(d_v, "None")                                                                                   \
  X(d_g, "None")                                                                                   \
  X(d_beta, "None")                                                                                \
  X(d_A_log, "None")                                                                               \
  X(d_dt_bias, "None")                                                                             \
  X(d_initial_state, "None")                                                                       \
  X(M, "None")                                                                                     \
  X(b, "None")                                                                                     \
  X(use_gate_in_kernel, "False")                                                                   \
  X(state_v_first, "False")                                                                        \
  X(output_final_state, "False")                                                                   \
  X(op, "'prefill'")                                                                               \
  X(T_total, "None")                                                                               \
  X(H, "None")                                                                                     \
  X(N, "1")

typedef enum parameter {
#define PARAMETER_ID(name, text) P_##name,
  PARAMETERS(PARAMETER_ID)
#undef PARAMETER_ID
      P_COUNT
} parameter;

static const char *const parameter_names[P_COUNT] = {
#define PARAMETER_NAME(name, text) #name,
    PARAMETERS(PARAMETER_NAME)
#undef PARAMETER_NAME
};
static const char *const parameter_defaults[P_COUNT] = {
#define PARAMETER_DEFAULT(name, text) text,
    PARAMETERS(PARAMETER_DEFAULT)
#undef PARAMETER_DEFAULT
};
static PyObject *parameter_strings[P_COUNT]; /* interned, as the names at call sites are */

typedef struct signature {
  const char *name;
  int required;   /* the first ones, without default */
  int positional; /* the first ones, also by position; the rest are keyword-only */
  int count;
  const uint8_t *parameters;
} signature;

#define SIGNATURE(function, required, positional, ...)                                             \
  static const uint8_t function##_parameters[] = {__VA_ARGS__};                                    \
  static const signature function##_signature = {                                                  \
      #function, required, positional, (int)sizeof function##_parameters, function##_parameters}

#define COMMON_OPTIONS P_gate, P_l2norm, P_beta_is_logit, P_allow_neg_eigval, P_state_layout
#define INDEX_OPTIONS                                                                              \
  P_state_indices, P_initial_state_indices, P_final_state_indices, P_has_initial_state
#define CHECKPOINT_OPTIONS                                                                         \
  P_checkpoint_state, P_checkpoint_offsets, P_checkpoint_indptr, P_checkpoint_every,               \
      P_checkpoint_before, P_checkpoint_state_indices
#define CALL_OPTIONS P_batch_invariant, P_workspace, P_backend
#define FWD_PARAMETERS                                                                             \
  P_q, P_k, P_v, P_g, P_beta, P_scale, P_out, P_A_log, P_dt_bias, P_lower_bound, P_initial_state,  \
      P_final_state, P_cu_seqlens, COMMON_OPTIONS, INDEX_OPTIONS, CHECKPOINT_OPTIONS, CALL_OPTIONS

SIGNATURE(fwd, 10, 13, FWD_PARAMETERS);
SIGNATURE(decode, 6, 7, P_q, P_k, P_v, P_g, P_beta, P_state, P_out, INDEX_OPTIONS, P_initial_state,
          P_num_accepted_tokens, P_scale, P_A_log, P_dt_bias, P_lower_bound, COMMON_OPTIONS,
          P_write_state, CALL_OPTIONS);
/* As fwd(), with gradients in the place of out and final_state. */
SIGNATURE(backward, 10, 13, P_q, P_k, P_v, P_g, P_beta, P_scale, P_d_out, P_A_log, P_dt_bias,
          P_lower_bound, P_initial_state, P_d_final_state, P_cu_seqlens, COMMON_OPTIONS,
          P_checkpoint_state, P_checkpoint_every, P_d_q, P_d_k, P_d_v, P_d_g, P_d_beta, P_d_A_log,
          P_d_dt_bias, P_d_initial_state, P_workspace, P_backend);
/* What chunk_kda() and fused_recurrent_kda() call first, see results_of(): l2norm and beta_is_logit have
 * longer names there. */
SIGNATURE(results, 17, 17, P_q, P_k, P_v, P_g, P_beta, P_scale, P_A_log, P_dt_bias, P_lower_bound,
          P_initial_state, P_cu_seqlens, P_use_gate_in_kernel, P_l2norm, P_beta_is_logit,
          P_allow_neg_eigval, P_state_v_first, P_output_final_state);
SIGNATURE(summary, 6, 10, P_k, P_v, P_g, P_beta, P_M, P_b, P_A_log, P_dt_bias, P_lower_bound,
          P_cu_seqlens, COMMON_OPTIONS, P_workspace, P_backend);
/* All that fwd() and decode() take, and of backward() the inputs. */
SIGNATURE(supports, 5, 13, FWD_PARAMETERS, P_op, P_state, P_num_accepted_tokens, P_write_state);
SIGNATURE(plan, 5, 13, FWD_PARAMETERS, P_op, P_state, P_num_accepted_tokens, P_write_state);
SIGNATURE(get_workspace_size, 2, 3, P_T_total, P_H, P_N);

/* One call on its way. */
typedef struct call {
  PyObject *value[P_COUNT]; /* borrowed; NULL: not given */
  tensors tensors;
  union { /* all begin with FKDA_ARGS_HEADER */
    struct {
      FKDA_ARGS_HEADER;
    } header;
    fkda_prefill_args prefill;
    fkda_decode_args decode;
    fkda_summary_args summary;
    fkda_backward_args backward;
  } args;
} call;

/* Position of keyword `name` in the signature, or -1. Call sites write keywords in the signature's order
 * more often than not: the search starts where the last one ended, and compares addresses first. */
static int find_keyword(const signature *s, PyObject *name, int start) {
  for (int i = 0; i < s->count; i++) {
    int at = start + i;
    if (at >= s->count) at -= s->count;
    if (parameter_strings[s->parameters[at]] == name) return at;
  }
  for (int at = 0; at < s->count;
       at++) { /* not interned: a keyword from a dict built at run time */
    if (PyUnicode_Compare(parameter_strings[s->parameters[at]], name) == 0) return at;
  }
  return -1;
}

static int parse(call *c, const signature *s, PyObject *const *args, Py_ssize_t count,
                 PyObject *keywords) {
  memset(c->value, 0, sizeof c->value);
  memset(&c->tensors, 0, offsetof(tensors, held));
  if (count > s->positional) {
    PyErr_Format(PyExc_TypeError, "%s() takes at most %d positional arguments (%zd given)", s->name,
                 s->positional, count);
    return -1;
  }
  for (Py_ssize_t i = 0; i < count; i++) c->value[s->parameters[i]] = args[i];
  const Py_ssize_t keyword_count = keywords ? PyTuple_Size(keywords) : 0;
  int at = (int)count - 1;
  for (Py_ssize_t i = 0; i < keyword_count; i++) {
    PyObject *name = PyTuple_GetItem(keywords, i);
    at = find_keyword(s, name, at + 1);
    if (at < 0) {
      PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", s->name, name);
      return -1;
    }
    if (c->value[s->parameters[at]]) {
      PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%U'", s->name, name);
      return -1;
    }
    c->value[s->parameters[at]] = args[count + i];
  }
  for (int i = 0; i < s->required; i++) {
    if (c->value[s->parameters[i]]) continue;
    PyErr_Format(PyExc_TypeError, "%s() missing required argument '%s'", s->name,
                 parameter_names[s->parameters[i]]);
    return -1;
  }
  return 0;
}

static bool given(const call *c, parameter p) { return c->value[p] && c->value[p] != Py_None; }

/* ---- option values ---------------------------------------------------------------------------- */

static int wrong_type(const call *c, parameter p, const char *expected) {
  PyObject *name = PyObject_GetAttrString((PyObject *)Py_TYPE(c->value[p]), "__name__");
  PyErr_Format(PyExc_TypeError, "%s: %S, expected %s", parameter_names[p], name ? name : Py_None,
               expected);
  Py_XDECREF(name);
  return -1;
}

static int read_bool(const call *c, parameter p, int32_t *value) {
  PyObject *object = c->value[p];
  if (!object) return 0;
  if (object == Py_True || object == Py_False) return *value = object == Py_True, 0;
  if (!PyLong_Check(object)) return wrong_type(c, p, "a bool");
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) return -1;
  *value = truth;
  return 0;
}

static int read_int(const call *c, parameter p, int64_t *value) {
  PyObject *object = c->value[p];
  if (!object) return 0;
  PyObject *index = PyFloat_Check(object) ? NULL : PyNumber_Index(object);
  if (!index) return wrong_type(c, p, "an int");
  *value = PyLong_AsLongLong(index);
  Py_DECREF(index);
  if (*value == -1 && PyErr_Occurred()) {
    PyErr_Format(PyExc_ValueError, "%s: %S, expected a 64-bit integer", parameter_names[p], object);
    return -1;
  }
  return 0;
}

static int read_double(const call *c, parameter p, double *value) {
  if (!given(c, p)) return 0;
  PyObject *object = c->value[p];
  if (PyUnicode_Check(object)) return wrong_type(c, p, "a number or None");
  *value = PyFloat_AsDouble(object);
  if (*value == -1 && PyErr_Occurred()) return wrong_type(c, p, "a number or None");
  return 0;
}

/* One of `choices` (NULL at the end); *value is its position. */
static int read_choice(const call *c, parameter p, const char *const *choices, int32_t *value) {
  PyObject *object = c->value[p];
  if (!object) return 0;
  const char *text = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, NULL) : NULL;
  if (!text) {
    if (PyErr_Occurred()) return -1;
    return wrong_type(c, p, "a str");
  }
  char list[80] = "";
  for (int32_t i = 0; choices[i]; i++) {
    if (!strcmp(text, choices[i])) return *value = i, 0;
    const size_t used = strlen(list);
    snprintf(list + used, sizeof list - used, "%s'%s'",
             i == 0           ? ""
             : choices[i + 1] ? ", "
                              : " or ",
             choices[i]);
  }
  PyErr_Format(PyExc_ValueError, "%s: '%U', expected %s", parameter_names[p], object, list);
  return -1;
}

static const char *const gate_names[] = {"bounded", "softplus", "direct", NULL}; /* fkda_gate */
static const char *const layout_names[] = {"vk", "kv", NULL}; /* fkda_state_layout */

/* ---- arguments -> C structs ------------------------------------------------------------------- */

static int read_tensor(call *c, parameter p, bool written, fkda_tensor *tensor) {
  return tensors_read(&c->tensors, parameter_names[p], c->value[p], written, tensor);
}

#define TRY(expression)                                                                            \
  do {                                                                                             \
    if (expression) return -1;                                                                     \
  } while (0)
#define READ(field) TRY(read_tensor(c, P_##field, false, &a->field))
#define WRITE(field) TRY(read_tensor(c, P_##field, true, &a->field))

/* Fields that every operation has. */
#define READ_COMMON()                                                                              \
  READ(k);                                                                                         \
  READ(v);                                                                                         \
  READ(g);                                                                                         \
  READ(beta);                                                                                      \
  READ(A_log);                                                                                     \
  READ(dt_bias);                                                                                   \
  TRY(read_choice(c, P_gate, gate_names, &a->gate));                                               \
  TRY(read_bool(c, P_l2norm, &a->l2norm));                                                         \
  TRY(read_bool(c, P_beta_is_logit, &a->beta_is_logit));                                           \
  TRY(read_bool(c, P_allow_neg_eigval, &a->allow_neg_eigval));                                     \
  TRY(read_choice(c, P_state_layout, layout_names, &a->state_layout));                             \
  TRY(read_double(c, P_lower_bound, &a->lower_bound))

static int read_scale(const call *c, double *scale) {
  TRY(read_double(c, P_scale, scale));
  if (given(c, P_scale) && *scale == 0) { /* the C interface writes the default as 0 */
    PyErr_SetString(PyExc_ValueError, "scale: 0, expected None (K^-1/2) or another number");
    return -1;
  }
  return 0;
}

/* What is the same at the end of every operation: device, stream, workspace, backend. */
static int read_call(call *c) {
  c->args.header.device_type = c->tensors.device_of ? c->tensors.device_type : FKDA_DEVICE_CPU;
  c->args.header.device_id = c->tensors.device_of ? c->tensors.device_id : 0;
  c->args.header.stream = c->tensors.stream;
  if (given(c, P_backend)) {
    if (!PyUnicode_Check(c->value[P_backend])) return wrong_type(c, P_backend, "a str or None");
    c->args.header.backend = PyUnicode_AsUTF8AndSize(c->value[P_backend], NULL);
    if (!c->args.header.backend) return -1;
  }
  if (given(c, P_workspace)) {
    void *data;
    size_t size;
    TRY(tensors_read_bytes(&c->tensors, "workspace", c->value[P_workspace], &data, &size));
    /* The C interface wants it aligned; get_workspace_size() has room for that. A given workspace is
     * never NULL there, which would mean "none given". */
    static _Alignas(256) char nothing[1];
    const size_t alignment = c->args.header.device_type == FKDA_DEVICE_CPU ? 64 : 256;
    const size_t skip = (alignment - (uintptr_t)data % alignment) % alignment;
    c->args.header.workspace = size > skip ? (char *)data + skip : nothing;
    c->args.header.workspace_size = size > skip ? size - skip : 0;
  }
  return 0;
}

/* state_indices stands for both index tensors. */
static int read_state_indices(call *c, fkda_tensor *initial, fkda_tensor *final) {
  if (!given(c, P_state_indices)) {
    TRY(read_tensor(c, P_initial_state_indices, false, initial));
    return read_tensor(c, P_final_state_indices, false, final);
  }
  if (given(c, P_initial_state_indices) || given(c, P_final_state_indices)) {
    PyErr_Format(
        PyExc_ValueError, "state_indices: given together with %s, expected one or the other",
        given(c, P_initial_state_indices) ? "initial_state_indices" : "final_state_indices");
    return -1;
  }
  TRY(read_tensor(c, P_state_indices, false, initial));
  *final = *initial;
  return 0;
}

/* In questions about a call, an absent out is one that fits. */
static void assume_out(const fkda_tensor *v, fkda_tensor *out) {
  if (out->dtype != FKDA_NONE || v->dtype == FKDA_NONE) return;
  *out = fkda_tensor_contiguous(NULL, v->dtype, v->ndim, v->shape);
}

static int read_prefill(call *c, bool run) {
  fkda_prefill_args *a = &c->args.prefill;
  memset(a, 0, sizeof *a);
  FKDA_PREFILL_ARGS_DEFAULTS(*a);
  READ(q);
  READ_COMMON();
  TRY(read_tensor(c, P_out, run, &a->out));
  TRY(read_scale(c, &a->scale));
  READ(cu_seqlens);
  READ(initial_state);
  TRY(read_tensor(c, P_final_state, run, &a->final_state));
  TRY(read_state_indices(c, &a->initial_state_indices, &a->final_state_indices));
  READ(has_initial_state);
  TRY(read_tensor(c, P_checkpoint_state, run, &a->checkpoint_state));
  READ(checkpoint_offsets);
  READ(checkpoint_indptr);
  READ(checkpoint_state_indices);
  TRY(read_int(c, P_checkpoint_every, &a->checkpoint_every));
  TRY(read_bool(c, P_checkpoint_before, &a->checkpoint_before));
  TRY(read_bool(c, P_batch_invariant, &a->batch_invariant));
  if (!run) assume_out(&a->v, &a->out);
  return read_call(c);
}

static int read_decode(call *c, bool run) {
  fkda_decode_args *a = &c->args.decode;
  memset(a, 0, sizeof *a);
  FKDA_DECODE_ARGS_DEFAULTS(*a);
  READ(q);
  READ_COMMON();
  TRY(read_tensor(c, P_out, run, &a->out));
  TRY(read_scale(c, &a->scale));
  TRY(read_bool(c, P_write_state, &a->write_state));
  TRY(read_tensor(c, P_state, run && a->write_state, &a->state));
  TRY(read_state_indices(c, &a->initial_state_indices, &a->final_state_indices));
  READ(has_initial_state);
  READ(num_accepted_tokens);
  READ(initial_state);
  TRY(read_bool(c, P_batch_invariant, &a->batch_invariant));
  if (!run) assume_out(&a->v, &a->out);
  return read_call(c);
}

static int read_backward(call *c, bool run) {
  fkda_backward_args *a = &c->args.backward;
  memset(a, 0, sizeof *a);
  FKDA_BACKWARD_ARGS_DEFAULTS(*a);
  READ(q);
  READ_COMMON();
  TRY(read_scale(c, &a->scale));
  READ(cu_seqlens);
  READ(initial_state);
  READ(checkpoint_state);
  TRY(read_int(c, P_checkpoint_every, &a->checkpoint_every));
  if (run) {
    READ(d_out);
    READ(d_final_state);
    WRITE(d_q);
    WRITE(d_k);
    WRITE(d_v);
    WRITE(d_g);
    WRITE(d_beta);
    WRITE(d_A_log);
    WRITE(d_dt_bias);
    WRITE(d_initial_state);
  }
  return read_call(c);
}

static int read_summary(call *c) {
  fkda_summary_args *a = &c->args.summary;
  memset(a, 0, sizeof *a);
  FKDA_SUMMARY_ARGS_DEFAULTS(*a);
  READ_COMMON();
  READ(cu_seqlens);
  WRITE(M);
  WRITE(b);
  return read_call(c);
}

/* ---- running ---------------------------------------------------------------------------------- */

/* The library's message about this thread's last failing call. Where state_indices stood for both index
 * tensors, it says so: "initial_state_indices: ..." -> "state_indices: ...". */
static const char *detail_of(const call *c) {
  const char *detail = fkda_last_error();
  if (!c || !given(c, P_state_indices)) return detail;
  if (!strncmp(detail, "initial_state_indices", 21)) return detail + strlen("initial_");
  if (!strncmp(detail, "final_state_indices", 19)) return detail + strlen("final_");
  return detail;
}

/* NULL for `c`: a function without call. */
static PyObject *raise_status(const call *c, fkda_status status) {
  PyObject *exception = PyExc_RuntimeError;
  switch (status) {
    case FKDA_ERROR_INVALID_ARGUMENT:
    case FKDA_ERROR_WORKSPACE: exception = PyExc_ValueError; break;
    case FKDA_ERROR_INVALID_DTYPE: exception = PyExc_TypeError; break;
    case FKDA_ERROR_OUT_OF_MEMORY: exception = PyExc_MemoryError; break;
    default: break;
  }
  const char *detail = detail_of(c);
  PyErr_SetString(exception, *detail ? detail : fkda_status_string(status));
  return NULL;
}

static fkda_status launch(call *c) {
  switch (c->args.header.op) {
    case FKDA_OP_PREFILL: return fkda_prefill(&c->args.prefill);
    case FKDA_OP_DECODE: return fkda_decode(&c->args.decode);
    case FKDA_OP_SUMMARY: return fkda_summary(&c->args.summary);
    case FKDA_OP_BACKWARD: return fkda_backward(&c->args.backward);
    default: return FKDA_ERROR_INTERNAL;
  }
}

/* Each thread keeps the workspace of its CPU calls, so that only calls larger than any before allocate.
 * What would exceed the limit is left to the library, which frees it after the call. */
#define WORKSPACE_INITIAL ((size_t)64 << 10)
#define WORKSPACE_LIMIT ((size_t)256 << 20)

typedef struct thread_workspace {
  void *data;
  size_t size;
} thread_workspace;

static pthread_key_t workspace_key;

static void free_workspace(void *pointer) {
  thread_workspace *workspace = pointer;
  free(workspace->data);
  free(workspace);
}

static thread_workspace *thread_workspace_get(void) {
  thread_workspace *workspace = pthread_getspecific(workspace_key);
  if (workspace || !(workspace = calloc(1, sizeof *workspace))) return workspace;
  if (pthread_setspecific(workspace_key, workspace)) {
    free(workspace);
    return NULL;
  }
  return workspace;
}

static void grow_workspace(call *c, thread_workspace *workspace) {
  size_t bytes = 0;
  if (fkda_workspace_size(&c->args, &bytes) != FKDA_OK || bytes > WORKSPACE_LIMIT) return;
  if (bytes < WORKSPACE_INITIAL) bytes = WORKSPACE_INITIAL;
  if (bytes <= workspace->size) return;
  void *data = NULL;
  if (posix_memalign(&data, 64, bytes)) return;
  free(workspace->data);
  workspace->data = data;
  workspace->size = bytes;
}

/* Without the GIL. */
static fkda_status run(call *c) {
  thread_workspace *workspace = NULL;
  if (!c->args.header.workspace && c->args.header.device_type == FKDA_DEVICE_CPU &&
      !given(c, P_workspace)) {
    workspace = thread_workspace_get();
  }
  if (!workspace) return launch(c);
  if (!workspace->data) grow_workspace(c, workspace);
  /* The usual call fits. One that does not says so before it writes anything. */
  c->args.header.workspace = workspace->data;
  c->args.header.workspace_size = workspace->size;
  const fkda_status status = launch(c);
  if (status != FKDA_ERROR_WORKSPACE) return status;
  const size_t before = workspace->size;
  c->args.header.workspace = NULL;
  c->args.header.workspace_size = 0;
  grow_workspace(c, workspace);
  if (workspace->size > before) {
    c->args.header.workspace = workspace->data;
    c->args.header.workspace_size = workspace->size;
  }
  return launch(c);
}

static fkda_status run_without_gil(call *c) {
  fkda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = run(c);
  Py_END_ALLOW_THREADS;
  return status;
}

/* A call on a device that wants a workspace and was given none: from the allocator of the tensors' library.
 * 0: there is one now; -1: there is none, with or without an exception. */
static int allocate_workspace(call *c) {
  const size_t alignment = 256;
  size_t bytes = 0;
  if (c->args.header.device_type == FKDA_DEVICE_CPU || given(c, P_workspace)) return -1;
  if (fkda_workspace_size(&c->args, &bytes) != FKDA_OK) return -1;
  PyObject *first = c->value[P_q] ? c->value[P_q] : c->value[P_k];
  char *data = tensors_allocate(&c->tensors, first, bytes + alignment);
  if (!data) return -1;
  c->args.header.workspace = data + (alignment - (uintptr_t)data % alignment) % alignment;
  c->args.header.workspace_size = bytes;
  return 0;
}

/* With a workspace where that is wanted. Afterwards an exception may be set, too. */
static fkda_status run_with_workspace(call *c) {
  const fkda_status status = run_without_gil(c);
  return status == FKDA_ERROR_WORKSPACE && !allocate_workspace(c) ? run_without_gil(c) : status;
}

/* The result of a call whose arguments were read with `failed`; `result` is borrowed. */
static PyObject *finish(call *c, int failed, PyObject *result) {
  if (!failed) {
    const fkda_status status = run_with_workspace(c);
    if (PyErr_Occurred()) {
      failed = -1;
    } else if (status != FKDA_OK) {
      raise_status(c, status);
      failed = -1;
    }
  }
  tensors_release(&c->tensors);
  if (failed) return NULL;
  Py_INCREF(result);
  return result;
}

static PyObject *fwd(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords) {
  (void)self;
  call c;
  if (parse(&c, &fwd_signature, args, count, keywords)) return NULL;
  return finish(&c, read_prefill(&c, true), Py_None);
}

static PyObject *decode(PyObject *self, PyObject *const *args, Py_ssize_t count,
                        PyObject *keywords) {
  (void)self;
  call c;
  if (parse(&c, &decode_signature, args, count, keywords)) return NULL;
  PyObject *allocated = NULL;
  if (!given(&c, P_out)) {
    allocated = tensors_empty_like("out", c.value[P_v]);
    if (!allocated) return NULL;
    c.value[P_out] = allocated;
  }
  PyObject *result = finish(&c, read_decode(&c, true), c.value[P_out]);
  Py_XDECREF(allocated);
  return result;
}

static PyObject *backward(PyObject *self, PyObject *const *args, Py_ssize_t count,
                          PyObject *keywords) {
  (void)self;
  call c;
  if (parse(&c, &backward_signature, args, count, keywords)) return NULL;
  return finish(&c, read_backward(&c, true), Py_None);
}

static PyObject *summary(PyObject *self, PyObject *const *args, Py_ssize_t count,
                         PyObject *keywords) {
  (void)self;
  call c;
  if (parse(&c, &summary_signature, args, count, keywords)) return NULL;
  return finish(&c, read_summary(&c), Py_None);
}

/* ---- the short way of flash_kda.functional ----------------------------------------------------- */

enum { TORCH_STATES = 8 };

/* What ops.py says of torch: the class, functions, keywords for a contiguous empty_like() and for a new_empty()
 * of float32, and functions with what they answer (None, False, 0, of which there is one each) where torch's
 * dispatcher would do nothing but call us. */
static struct {
  PyTypeObject *tensor;
  PyObject *is_grad_enabled;
  PyObject *empty_like;
  PyObject *contiguous;
  PyObject *float32;
  PyObject *state[TORCH_STATES];
  PyObject *plain[TORCH_STATES];
  int states;
} torch;
static PyObject *str_requires_grad, *str_new_empty;

static PyObject *set_torch(PyObject *self, PyObject *args) {
  (void)self;
  PyObject *states;
  if (!PyArg_ParseTuple(args, "OOOOOO!", &torch.tensor, &torch.is_grad_enabled, &torch.empty_like,
                        &torch.contiguous, &torch.float32, &PyTuple_Type, &states)) {
    return NULL;
  }
  torch.states = 0;
  for (Py_ssize_t i = 0; i < PyTuple_Size(states); i++) {
    if (torch.states == TORCH_STATES ||
        !PyArg_ParseTuple(PyTuple_GetItem(states, i), "OO", &torch.state[i], &torch.plain[i])) {
      return NULL;
    }
    torch.states++;
  }
  Py_INCREF(args); /* with all that it holds, for the process */
  Py_RETURN_NONE;
}

/* Does the function answer this? */
static bool answers(PyObject *function, const PyObject *expected) {
  PyObject *answer = PyObject_CallNoArgs(function);
  Py_XDECREF(answer);
  return answer && answer == expected;
}

static bool requires_grad(const call *c) {
  static const parameter tensors[] = {P_q,     P_k,      P_v, P_g, P_beta, P_initial_state,
                                      P_A_log, P_dt_bias};
  for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
    if (!given(c, tensors[i])) continue;
    PyObject *needed = PyObject_GetAttr(c->value[tensors[i]], str_requires_grad);
    Py_XDECREF(needed);
    if (needed != Py_False) return true;
  }
  return false;
}

/* Tensors of the plain type without gradients, and torch in its plain state? */
static bool is_plain(const call *c) {
  static const parameter tensors[] = {P_q, P_k, P_v, P_g, P_beta};
  if (!torch.states) return false;
  for (int i = 0; i < 5; i++)
    if (Py_TYPE(c->value[tensors[i]]) != torch.tensor) return false;
  if (given(c, P_initial_state) && Py_TYPE(c->value[P_initial_state]) != torch.tensor) return false;
  for (int i = 0; i < torch.states; i++)
    if (!answers(torch.state[i], torch.plain[i])) return false;
  return answers(torch.is_grad_enabled, Py_False) || !requires_grad(c);
}

/* FLA's gate arguments as ours, which functional.gate_of() does for every other call; -1: not usual. */
static int32_t read_gate(call *c) {
  const PyObject *in_kernel = c->value[P_use_gate_in_kernel];
  if (in_kernel == Py_True) {
    if (given(c, P_lower_bound)) return FKDA_GATE_BOUNDED;
    return given(c, P_A_log) ? FKDA_GATE_SOFTPLUS : -1;
  }
  c->value[P_A_log] = c->value[P_dt_bias] = c->value[P_lower_bound] = NULL;
  return in_kernel == Py_False ? FKDA_GATE_DIRECT : -1;
}

static bool is_contiguous(const fkda_tensor *t) {
  int64_t elements = 1;
  bool dense = true;
  for (int32_t i = t->ndim - 1; i >= 0; i--) {
    dense &= t->shape[i] == 1 || t->stride[i] == elements;
    elements *= t->shape[i];
  }
  return dense || elements == 0; /* strides of what is empty say nothing */
}

/* A new tensor like `object`, which was read into `like`, contiguous. */
static PyObject *empty_like(PyObject *object, const fkda_tensor *like) {
  PyObject *args = PyTuple_Pack(1, object);
  PyObject *result =
      args ? PyObject_Call(torch.empty_like, args, is_contiguous(like) ? NULL : torch.contiguous)
           : NULL;
  Py_XDECREF(args);
  return result;
}

/* A new final state of float32 for these tensors. Where they do not fit each other, what takes it refuses. */
static PyObject *new_state(const call *c, const fkda_tensor *q, const fkda_tensor *v,
                           const fkda_tensor *cu_seqlens, bool v_first) {
  if (q->ndim != 4 || v->ndim != 4) return NULL;
  const int64_t N = cu_seqlens && cu_seqlens->dtype ? cu_seqlens->shape[0] - 1 : v->shape[0];
  const int64_t K = q->shape[3], V = v->shape[3];
  PyObject *shape = Py_BuildValue("(LLLL)", (long long)N, (long long)v->shape[2],
                                  (long long)(v_first ? V : K), (long long)(v_first ? K : V));
  PyObject *method = shape ? PyObject_GetAttr(c->value[P_v], str_new_empty) : NULL;
  PyObject *result = method ? PyObject_Call(method, shape, torch.float32) : NULL;
  Py_XDECREF(method);
  Py_XDECREF(shape);
  return result;
}

/* The usual call with its results allocated, in microseconds less than Python needs for it. Whatever is
 * not usual, float64 and errors included, is left to functional.py and ops.py: NotImplemented. */
static PyObject *results_of(PyObject *const *args, Py_ssize_t count, PyObject *keywords, bool few) {
  call c;
  if (parse(&c, &results_signature, args, count, keywords)) return NULL;
  PyObject *out = NULL, *final = NULL, *result = NULL;
  fkda_prefill_args *p = &c.args.prefill;
  fkda_decode_args *d = &c.args.decode;
  const PyObject *first = c.value[P_state_v_first];
  PyObject *wanted = c.value[P_output_final_state];
  const bool store = wanted == Py_True, v_first = first == Py_True;
  const int32_t gate = read_gate(&c);
  c.value[P_write_state] = wanted;
  if (gate >= 0 && (store || wanted == Py_False) && (v_first || first == Py_False) &&
      (c.value[P_allow_neg_eigval] == Py_False || c.value[P_beta_is_logit] == Py_True) &&
      is_plain(&c) && !(few ? read_decode(&c, true) : read_prefill(&c, true))) {
    const fkda_tensor *v = few ? &d->v : &p->v;
    const fkda_tensor *initial = few ? &d->initial_state : &p->initial_state;
    fkda_tensor *out_tensor = few ? &d->out : &p->out;
    fkda_tensor *final_tensor = few ? &d->state : &p->final_state;
    *(few ? &d->gate : &p->gate) = gate;
    *(few ? &d->state_layout : &p->state_layout) = v_first ? FKDA_STATE_VK : FKDA_STATE_KV;
    /* The decode kernel wants a state to start from. */
    if (v->dtype != FKDA_F64 && (!few || initial->dtype)) {
      out = empty_like(c.value[P_v], v);
    }
    if (out && store) {
      final = initial->dtype == FKDA_F32
                  ? empty_like(c.value[P_initial_state], initial)
                  : new_state(&c, few ? &d->q : &p->q, v, few ? NULL : &p->cu_seqlens, v_first);
    }
    if (out && (final || !store) && !tensors_read(&c.tensors, "out", out, true, out_tensor) &&
        !tensors_read(&c.tensors, "final_state", final, true, final_tensor) &&
        run_with_workspace(&c) == FKDA_OK) {
      result = PyTuple_Pack(2, out, store ? final : Py_None);
    }
  }
  tensors_release(&c.tensors);
  Py_XDECREF(out);
  Py_XDECREF(final);
  if (result) return result;
  PyErr_Clear();
  Py_INCREF(Py_NotImplemented);
  return Py_NotImplemented;
}

static PyObject *prefill_results(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                 PyObject *keywords) {
  (void)self;
  return results_of(args, count, keywords, false);
}

static PyObject *recurrent_results(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                   PyObject *keywords) {
  (void)self;
  return results_of(args, count, keywords, true);
}

/* ---- questions -------------------------------------------------------------------------------- */

static bool in_signature(const signature *s, parameter p) {
  for (int i = 0; i < s->count; i++) {
    if (s->parameters[i] == p) return true;
  }
  return false;
}

/* Reads the arguments of supports() or plan() for their op. */
static int read_question(call *c, const signature *s) {
  static const char *const ops[] = {"prefill", "decode", "backward", NULL};
  static const signature *const runs[] = {&fwd_signature, &decode_signature, &backward_signature};
  int32_t op = 0;
  TRY(read_choice(c, P_op, ops, &op));
  const signature *run = runs[op];
  for (int i = 0; i < s->count; i++) {
    const parameter p = s->parameters[i];
    if (p == P_op || !given(c, p) || in_signature(run, p)) continue;
    PyErr_Format(PyExc_TypeError, "%s() got '%s', which op='%s' does not take", s->name,
                 parameter_names[p], ops[op]);
    return -1;
  }
  return op == 0   ? read_prefill(c, false)
         : op == 1 ? read_decode(c, false)
                   : read_backward(c, false);
}

static PyObject *supports(PyObject *self, PyObject *const *args, Py_ssize_t count,
                          PyObject *keywords) {
  (void)self;
  call c;
  if (parse(&c, &supports_signature, args, count, keywords)) return NULL;
  PyObject *result = NULL;
  if (!read_question(&c, &supports_signature)) {
    const fkda_status status = fkda_query(&c.args);
    result = Py_BuildValue("(Os)", status == FKDA_OK ? Py_True : Py_False,
                           status == FKDA_OK ? "" : detail_of(&c));
  } else if (c.tensors.refused) { /* a tensor that no call would take: an answer, not an error */
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    PyObject *reason = PyObject_Str(value);
    if (reason) result = Py_BuildValue("(ON)", Py_False, reason);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
  }
  tensors_release(&c.tensors);
  return result;
}

static PyObject *plan(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *keywords) {
  (void)self;
  call c;
  if (parse(&c, &plan_signature, args, count, keywords)) return NULL;
  PyObject *result = NULL;
  char *text = NULL;
  size_t length = 0;
  if (!read_question(&c, &plan_signature)) {
    fkda_status status = fkda_plan_describe(&c.args, NULL, 0, &length);
    if (status == FKDA_OK) {
      text = malloc(length + 1);
      status = text ? fkda_plan_describe(&c.args, text, length + 1, NULL) : FKDA_OK;
    }
    if (status != FKDA_OK) {
      raise_status(&c, status);
    } else {
      result = text ? PyUnicode_FromString(text) : PyErr_NoMemory();
    }
  }
  free(text);
  tensors_release(&c.tensors);
  return result;
}

/* The largest workspace of the calls that fit the description: any dtypes, gates and batch. */
static PyObject *get_workspace_size(PyObject *self, PyObject *const *args, Py_ssize_t count,
                                    PyObject *keywords) {
  (void)self;
  call c;
  int64_t T = 0, H = 0, N = 1;
  if (parse(&c, &get_workspace_size_signature, args, count, keywords)) return NULL;
  if (read_int(&c, P_T_total, &T) || read_int(&c, P_H, &H) || read_int(&c, P_N, &N)) return NULL;
  if (T < 0 || H < 1 || N < 0 || N == INT64_MAX) {
    return PyErr_Format(PyExc_ValueError,
                        "T_total: %lld, H: %lld, N: %lld, expected at least 0, 1, 0", (long long)T,
                        (long long)H, (long long)N);
  }
  static const int32_t io_dtypes[] = {FKDA_BF16, FKDA_F16, FKDA_F32};
  size_t largest = 0;
  for (int variant = 0; variant < 3 * 3 * 2 * 2; variant++) {
    const int32_t io = io_dtypes[variant % 3];
    const bool packed = variant / 9 % 2;
    const int64_t B = packed ? 1 : N, rows = packed ? T : N ? T / N + (T % N != 0) : 0;
    fkda_prefill_args *a = &c.args.prefill;
    *a = FKDA_PREFILL_ARGS_INIT;
    a->q = fkda_tensor_contiguous(NULL, io, 4, (int64_t[]){B, rows, H, 128});
    a->k = a->v = a->g = a->out = a->q;
    a->beta = fkda_tensor_contiguous(NULL, io, 3, (int64_t[]){B, rows, H});
    if (packed) a->cu_seqlens = fkda_tensor_contiguous(NULL, FKDA_I64, 1, (int64_t[]){N + 1});
    a->gate = variant / 3 % 3;
    a->initial_state = fkda_tensor_contiguous(NULL, variant / 18 ? FKDA_F32 : FKDA_BF16, 4,
                                              (int64_t[]){N, H, 128, 128});
    a->final_state = a->initial_state;
    size_t bytes = 0;
    fkda_status status = fkda_workspace_size(a, &bytes);
    if (status != FKDA_OK) return raise_status(NULL, status);
    if (bytes > largest) largest = bytes;
    if (!N) continue;
    /* decode: up to 8 of the tokens for each of N sequences */
    const int64_t tokens = rows < 1 ? 1 : rows > 8 ? 8 : rows;
    fkda_decode_args *d = &c.args.decode;
    *d = FKDA_DECODE_ARGS_INIT;
    d->q = fkda_tensor_contiguous(NULL, io, 4, (int64_t[]){N, tokens, H, 128});
    d->k = d->v = d->g = d->out = d->q;
    d->beta = fkda_tensor_contiguous(NULL, io, 3, (int64_t[]){N, tokens, H});
    d->state = fkda_tensor_contiguous(NULL, variant / 18 ? FKDA_F32 : FKDA_BF16, 4,
                                      (int64_t[]){N, H, 128, 128});
    d->gate = variant / 3 % 3;
    status = fkda_workspace_size(d, &bytes);
    if (status != FKDA_OK) return raise_status(NULL, status);
    if (bytes > largest) largest = bytes;
  }
  return PyLong_FromSize_t(largest + 256); /* room to align inside any tensor */
}

static PyObject *backends(PyObject *self, PyObject *unused) {
  (void)self, (void)unused;
  PyObject *list = PyList_New(0);
  const char *name;
  for (int32_t i = 0; list && (name = fkda_backend_name(i)); i++) {
    const fkda_status status = fkda_backend_available(name);
    PyObject *row = Py_BuildValue("(sOs)", name, status == FKDA_OK ? Py_True : Py_False,
                                  status == FKDA_OK ? "" : fkda_last_error());
    if (!row || PyList_Append(list, row)) Py_CLEAR(list);
    Py_XDECREF(row);
  }
  return list;
}

static PyObject *set_num_threads(PyObject *self, PyObject *argument) {
  (void)self;
  const long number = PyFloat_Check(argument) ? -1 : PyLong_AsLong(argument);
  if (PyErr_Occurred()) return NULL;
  const int32_t clamped = number < 0 ? -1 : number > INT32_MAX ? INT32_MAX : (int32_t)number;
  const fkda_status status = fkda_set_num_threads(clamped);
  if (status != FKDA_OK) return raise_status(NULL, status);
  Py_RETURN_NONE;
}

static PyObject *get_num_threads(PyObject *self, PyObject *unused) {
  (void)self, (void)unused;
  return PyLong_FromLong(fkda_num_threads());
}

/* torch's current CUDA device, 0 without torch; -1 with an exception set. */
static long current_cuda_device(void) {
  PyObject *modules = PyImport_GetModuleDict(); /* borrowed */
  PyObject *torch = modules ? PyDict_GetItemString(modules, "torch") : NULL;
  if (!torch) return 0;
  PyObject *cuda = PyObject_GetAttrString(torch, "cuda");
  PyObject *index = cuda ? PyObject_CallMethod(cuda, "current_device", NULL) : NULL;
  const long id = index ? PyLong_AsLong(index) : -1;
  Py_XDECREF(index);
  Py_XDECREF(cuda);
  return id;
}

static PyObject *warmup(PyObject *self, PyObject *argument) {
  (void)self;
  PyObject *text = PyObject_Str(argument); /* a str or a torch.device */
  const char *name = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
  if (!name) {
    Py_XDECREF(text);
    return NULL;
  }
  const bool cpu = !strcmp(name, "cpu");
  long id = 0;
  char *end = NULL;
  if (!strcmp(name, "cuda")) {
    id = current_cuda_device();
  } else if (!strncmp(name, "cuda:", 5) && name[5] >= '0' && name[5] <= '9') {
    id = strtol(name + 5, &end, 10);
    if (*end || id > INT32_MAX) id = -1;
  } else if (!cpu) {
    id = -1;
  }
  if (id < 0) {
    if (!PyErr_Occurred()) {
      PyErr_Format(PyExc_ValueError, "device: '%U', expected 'cpu', 'cuda' or 'cuda:N'", text);
    }
    Py_DECREF(text);
    return NULL;
  }
  Py_DECREF(text);
  fkda_status status;
  Py_BEGIN_ALLOW_THREADS;
  status = fkda_warmup(cpu ? FKDA_DEVICE_CPU : FKDA_DEVICE_CUDA, (int32_t)id);
  Py_END_ALLOW_THREADS;
  if (status != FKDA_OK) return raise_status(NULL, status);
  Py_RETURN_NONE;
}

/* _time_calls(n, function_name, *args, **keywords): seconds that n calls of the C function take with the
 * struct that fwd() or decode() would pass. bench/python_overhead.py subtracts it from the whole. */
static PyObject *time_calls(PyObject *self, PyObject *const *args, Py_ssize_t count,
                            PyObject *keywords) {
  (void)self;
  call c;
  if (count < 2) return PyErr_Format(PyExc_TypeError, "_time_calls() missing n or function_name");
  const long n = PyLong_AsLong(args[0]);
  const char *name = n == -1 ? NULL : PyUnicode_AsUTF8AndSize(args[1], NULL);
  if (!name) return NULL;
  const bool is_decode = !strcmp(name, "decode");
  if (parse(&c, is_decode ? &decode_signature : &fwd_signature, args + 2, count - 2, keywords)) {
    return NULL;
  }
  fkda_status status = FKDA_OK;
  struct timespec begin = {0}, end = {0};
  const int failed = is_decode ? read_decode(&c, true) : read_prefill(&c, true);
  if (!failed) {
    Py_BEGIN_ALLOW_THREADS;
    status = run(&c); /* leaves a workspace in the struct */
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (long i = 0; i < n && status == FKDA_OK; i++) status = launch(&c);
    clock_gettime(CLOCK_MONOTONIC, &end);
    Py_END_ALLOW_THREADS;
  }
  tensors_release(&c.tensors);
  if (failed) return NULL;
  if (status != FKDA_OK) return raise_status(&c, status);
  return PyFloat_FromDouble((double)(end.tv_sec - begin.tv_sec) +
                            1e-9 * (double)(end.tv_nsec - begin.tv_nsec));
}

/* ---- documentation ---------------------------------------------------------------------------- */

static const char fwd_text[] =
    "Kimi Delta Attention over whole sequences (prefill), into `out` and `final_state`.\n"
    "\n"
    "Tensors are torch tensors, NumPy arrays (bfloat16 through ml_dtypes) or anything that speaks "
    "DLPack,\n"
    "all on one device. Nothing is differentiated: gradients do not flow through this call.\n"
    "\n"
    "    q, k         [B, T, H, K]   bfloat16, float16 or float32: the io dtype\n"
    "    v, out       [B, T, HV, V]  io dtype; HV a multiple of H; out is written\n"
    "    g            [B, T, HV, K]  io dtype or float32: raw gate, or log-decay with "
    "gate='direct'\n"
    "    beta         [B, T, HV]     io dtype or float32\n"
    "    scale        float or None  None: K ** -0.5\n"
    "    A_log        HV elements    float32 or bfloat16, any shape; None: 0\n"
    "    dt_bias      HV*K elements  float32 or bfloat16, any shape; None: 0\n"
    "    lower_bound  float or None  in [-5, 0), for gate='bounded'; None: -5\n"
    "    initial_state, final_state [N, HV, V, K]  float32 or bfloat16 each; None: zero / not "
    "stored.\n"
    "                 May be the same memory\n"
    "    cu_seqlens   [N + 1]        int32 or int64: sequence n is tokens cu_seqlens[n] up to\n"
    "                 cu_seqlens[n+1] of the one batch row (B = 1); None: N = B\n"
    "\n"
    "Keyword-only:\n"
    "    gate              'bounded':  g <- lower_bound * sigmoid(exp(A_log) * (g + dt_bias))\n"
    "                      'softplus': g <- -exp(A_log) * softplus(g + dt_bias)\n"
    "                      'direct':   g as given (natural logarithm, <= 0), without A_log and "
    "dt_bias\n"
    "    l2norm            q and k are divided by sqrt(sum of squares + 1e-6)\n"
    "    beta_is_logit     beta <- sigmoid(beta)\n"
    "    allow_neg_eigval  beta <- 2 beta\n"
    "    state_layout      'vk': states [..., V, K]; 'kv': [..., K, V]\n"
    "    initial_state_indices, final_state_indices  [N] int32 or int64: rows of a state pool\n"
    "                      [P, HV, V, K]; -1 skips the sequence; state_indices is both\n"
    "    has_initial_state [N] bool: start from zero where False, whatever the slot holds\n"
    "    checkpoint_state  copies of the running state, float32, bfloat16 or float16, with either\n"
    "        checkpoint_offsets [N, C], multiples of 16 or -1, into [N, C, HV, V, K]; or [N], one "
    "a\n"
    "            sequence, into [N, HV, V, K]; or packed,\n"
    "            checkpoint_offsets [R] with checkpoint_indptr [N + 1], into [R, HV, V, K]\n"
    "        checkpoint_every n (a multiple of 16), the state after every n tokens and at the end, "
    "or\n"
    "            with checkpoint_before the state before each n tokens\n"
    "        checkpoint_state_indices: slots of checkpoint_state instead; -1 is not stored\n"
    "    batch_invariant   only plans by which a sequence's bits do not depend on its batch\n"
    "    workspace         contiguous memory of get_workspace_size() bytes; None: kept by each "
    "thread\n"
    "    backend           a name of backends(), 'cpu', or None for the best one\n"
    "\n"
    "Per token, with state S [V, K]:  S <- S diag(exp g);  u = beta (v - S k);  S <- S + u k^T;\n"
    "out = scale S q.  Sources: Kimi Linear (arXiv 2510.26692), gated delta rule (arXiv "
    "2412.06464);\n"
    "docs/math.md numbers the equations, flashkda.h is the full specification.\n"
    "\n"
    "Raises ValueError (shapes, strides, devices, values, a workspace that is too small), "
    "TypeError\n"
    "(dtypes, unknown keywords, not a tensor), RuntimeError (no kernel or device for this call),\n"
    "MemoryError. Messages name the argument, what it was and what is expected. On an error "
    "nothing has\n"
    "been written.";

static const char decode_text[] =
    "1 to 8 new tokens for each of N sequences; the state pool is read and written in place.\n"
    "\n"
    "    q, k [N, T, H, K]  v, out [N, T, HV, V]  g [N, T, HV, K]  beta [N, T, HV]\n"
    "    state  [N, HV, V, K], or with indices a pool [P, HV, V, K]; float32 or bfloat16\n"
    "    out    None: allocated like v (torch and NumPy)\n"
    "\n"
    "Keyword-only, beside those of fwd():\n"
    "    initial_state_indices, final_state_indices  [N]: sequence n starts from row initial[n] "
    "and\n"
    "        leaves its state in row final[n]; -1 skips it. [N, M], M >= T (speculative decoding): "
    "it\n"
    "        starts from row initial[n][num_accepted_tokens[n] - 1], and its state after token t "
    "goes to\n"
    "        row final[n][t]. One of the two alone serves both purposes; state_indices is both\n"
    "    num_accepted_tokens  [N] int32 or int64 in 1..M; None: 1\n"
    "    write_state          False leaves the pool as it is\n"
    "    initial_state        the states to start from, under the same indices; state is then only "
    "written,\n"
    "                         and may be None with write_state=False. None: state\n"
    "\n"
    "Returns out. Raises as fwd().";

static const char summary_text[] =
    "Experimental. The affine map S_out = S_in M + b of each sequence's tokens, written to\n"
    "M [N, HV, K, K] and b [N, HV, V, K], both float32. The other arguments as in fwd().";

static const char backward_text[] =
    "Gradients of a loss by what fwd() was given, from those by what it wrote.\n"
    "\n"
    "Arguments as in fwd(), in the same places, with\n"
    "    d_out          [B, T, HV, V]  the gradient by out, in q's dtype or float32; None: 0\n"
    "    d_final_state  like final_state; None: 0\n"
    "\n"
    "Keyword-only: options as in fwd(), and\n"
    "    d_q, d_k, d_v, d_g, d_beta  written, if given: shaped like what each belongs to, in q's "
    "dtype or\n"
    "        float32. Rows of no sequence stay untouched\n"
    "    d_A_log [HV], d_dt_bias [HV, K]  float32; not with gate='direct'\n"
    "    d_initial_state                  like initial_state, also without one\n"
    "    checkpoint_state, checkpoint_every  the states that fwd() stored with "
    "checkpoint_before=True:\n"
    "        they need not be computed again\n"
    "    workspace                        None: on a GPU from torch's allocator; else memory on "
    "the "
    "device of as\n"
    "        many bytes as plan(op='backward') says, and 255 more\n"
    "\n"
    "Only what is given is computed. Returns None. Raises as fwd().";

static const char supports_text[] =
    "(True, '') if fwd() - or decode() or backward(), with op='decode' or 'backward' - would take "
    "these\n"
    "arguments, else (False, reason). Looks at shapes, strides, dtypes, device and options, never "
    "at what tensors hold. An "
    "absent\n"
    "out is taken to fit. For op='decode' the pool is state=.";

static const char plan_text[] =
    "What would run, as text: the backend chosen and why, and for every other candidate why not.\n"
    "Arguments as in supports(); raises as fwd().";

static const char workspace_text[] =
    "Bytes of workspace that suffice for every call on the CPU with K = V = 128, at most T_total "
    "tokens in\n"
    "all, at most H value heads and at most N sequences, while the number of threads stays what it "
    "is.";

/* "name(parameters)\n--\n\ntext": the form from which inspect.signature() reads a C function's signature.
 * Made from the table that parse() reads, so that the two cannot differ. Kept for the process. */
static char *documentation(const signature *s, const char *text) {
  const size_t capacity = 2048 + strlen(text);
  char *doc = malloc(capacity);
  if (!doc) return NULL;
  size_t used = (size_t)snprintf(doc, capacity, "%s($module", s->name);
  for (int i = 0; i < s->count; i++) {
    const parameter p = s->parameters[i];
    used +=
        (size_t)snprintf(doc + used, capacity - used, "%s, %s%s%s", i == s->positional ? ", *" : "",
                         parameter_names[p], i < s->required ? "" : "=",
                         i < s->required ? "" : parameter_defaults[p]);
  }
  snprintf(doc + used, capacity - used, ")\n--\n\n%s", text);
  return doc;
}

#define FAST(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef methods[] = {
    {"fwd", FAST(fwd), METH_FASTCALL | METH_KEYWORDS, NULL},
    {"decode", FAST(decode), METH_FASTCALL | METH_KEYWORDS, NULL},
    {"backward", FAST(backward), METH_FASTCALL | METH_KEYWORDS, NULL},
    {"summary", FAST(summary), METH_FASTCALL | METH_KEYWORDS, NULL},
    {"supports", FAST(supports), METH_FASTCALL | METH_KEYWORDS, NULL},
    {"plan", FAST(plan), METH_FASTCALL | METH_KEYWORDS, NULL},
    {"get_workspace_size", FAST(get_workspace_size), METH_FASTCALL | METH_KEYWORDS, NULL},
    {"backends", backends, METH_NOARGS,
     "backends($module)\n--\n\n"
     "[(name, available, reason)] of this build in order of preference, the reference last."},
    {"set_num_threads", set_num_threads, METH_O,
     "set_num_threads($module, num_threads, /)\n--\n\n"
     "Threads of the CPU pool, the caller's included: 1 to 1024, or 0 for the default."},
    {"get_num_threads", get_num_threads, METH_NOARGS,
     "get_num_threads($module)\n--\n\nThreads that CPU calls may use now."},
    {"warmup", warmup, METH_O,
     "warmup($module, device, /)\n--\n\n"
     "Does ahead of time what the first call on a device would do: starts the CPU pool ('cpu'), "
     "loads "
     "the\n"
     "kernels ('cuda', 'cuda:1', a torch.device). Needed before a CUDA graph captures that call."},
    {"_set_torch", set_torch, METH_VARARGS, NULL},
    {"_prefill_results", FAST(prefill_results), METH_FASTCALL | METH_KEYWORDS, NULL},
    {"_recurrent_results", FAST(recurrent_results), METH_FASTCALL | METH_KEYWORDS, NULL},
    {"_time_calls", FAST(time_calls), METH_FASTCALL | METH_KEYWORDS, NULL},
    {NULL, NULL, 0, NULL}};

static const struct {
  const signature *signature;
  const char *text;
} documented[] = {{&fwd_signature, fwd_text},
                  {&decode_signature, decode_text},
                  {&backward_signature, backward_text},
                  {&summary_signature, summary_text},
                  {&supports_signature, supports_text},
                  {&plan_signature, plan_text},
                  {&get_workspace_size_signature, workspace_text}};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "flash_kda._C", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__C(void) {
  static bool ready; /* the interned names, the key and the texts belong to the process */
  if (!ready) {
    if (tensors_init()) return NULL;
    for (int i = 0; i < P_COUNT; i++) {
      parameter_strings[i] = PyUnicode_InternFromString(parameter_names[i]);
      if (!parameter_strings[i]) return NULL;
    }
    str_requires_grad = PyUnicode_InternFromString("requires_grad");
    str_new_empty = PyUnicode_InternFromString("new_empty");
    if (!str_requires_grad || !str_new_empty) return NULL;
    for (size_t i = 0; i < sizeof documented / sizeof *documented; i++) {
      methods[i].ml_doc = documentation(documented[i].signature, documented[i].text);
      if (!methods[i].ml_doc) return PyErr_NoMemory();
    }
    if (pthread_key_create(&workspace_key, free_workspace)) return PyErr_NoMemory();
    ready = true;
  }
  PyObject *module = PyModule_Create(&module_definition);
  if (module && PyModule_AddStringConstant(module, "__version__", fkda_version_string())) {
    Py_CLEAR(module);
  }
  return module;
}
