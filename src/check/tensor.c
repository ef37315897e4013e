/* The checks of one tensor on its own: presence, dtype, shape, strides, extent, data pointer. */
#include "check/checker.h"
#include "check/text.h"

#define TEXT_CAPACITY 160

static bool is_empty(const fkda_tensor *t) {
  bool empty = false;
  for (int32_t i = 0; i < t->ndim; ++i) empty |= t->shape[i] == 0;
  return empty;
}

void fkda_resolve_strides(const fkda_tensor *tensor, int64_t *stride) {
  const bool empty = is_empty(tensor);
  for (int32_t i = 0; i < tensor->ndim; ++i)
    stride[i] = tensor->shape[i] > 1 && !empty ? tensor->stride[i] : 0;
}

/* ---- dtype ---- */

static const char *dtype_text(int32_t dtype, char *buffer, size_t capacity) {
  if (dtype == FKDA_NONE || fkda_dtype_size(dtype)) return fkda_dtype_string(dtype);
  snprintf(buffer, capacity, "%d (unknown)", (int)dtype);
  return buffer;
}

/* "bfloat16 (the dtype of q) or float32" */
static void add_dtypes(fkda_text *text, uint32_t dtypes, int32_t io_dtype, const char *io_of) {
  int32_t order[FKDA_BOOL + 1];
  int32_t count = 0;
  if (io_dtype) order[count++] = io_dtype;
  for (int32_t dtype = FKDA_F32; dtype <= FKDA_BOOL; ++dtype)
    if (dtypes & FKDA_DTYPE_BIT(dtype) && dtype != io_dtype) order[count++] = dtype;
  for (int32_t i = 0; i < count; ++i) {
    fkda_text_add(text, "%s%s", i == 0 ? "" : (i == count - 1 ? " or " : ", "),
                  fkda_dtype_string(order[i]));
    if (order[i] == io_dtype) fkda_text_add(text, " (the dtype of %s)", io_of);
  }
}

static fkda_status check_dtype(const fkda_checker *c, const char *name, const fkda_tensor *t,
                               uint32_t dtypes, int32_t io_dtype, const char *io_of) {
  const bool floating = dtypes & FKDA_DTYPES_FLOAT;
  const uint32_t allowed = c->wide && floating ? dtypes | FKDA_DTYPE_BIT(FKDA_F64) : dtypes;
  if (t->dtype > FKDA_NONE && t->dtype <= FKDA_BOOL && allowed & FKDA_DTYPE_BIT(t->dtype))
    return FKDA_OK;
  char expected[TEXT_CAPACITY], number[32];
  fkda_text text = {expected, sizeof expected, 0};
  add_dtypes(&text, allowed, io_dtype, io_of);
  if (t->dtype == FKDA_F64 && floating) fkda_text_add(&text, ", or backend \"reference\"");
  return fkda_fail(FKDA_ERROR_INVALID_DTYPE, "%s: dtype %s, expected %s", name,
                   dtype_text(t->dtype, number, sizeof number), expected);
}

/* ---- presence ---- */

fkda_status fkda_check_presence(const fkda_checker *checker, const char *name,
                                const fkda_tensor *tensor, bool *present) {
  *present = tensor->dtype != FKDA_NONE;
  if (*present) return FKDA_OK;
  if (tensor->ndim)
    return fkda_fail(FKDA_ERROR_INVALID_DTYPE,
                     "%s: dtype none with ndim %d, expected a dtype (an absent tensor is all zero)",
                     name, (int)tensor->ndim);
  if (checker->for_run && tensor->data)
    return fkda_fail(FKDA_ERROR_INVALID_DTYPE,
                     "%s: dtype none with data, expected a dtype (an absent tensor is all zero)",
                     name);
  return FKDA_OK;
}

/* ---- shape ---- */

/* "[1,64,HV,V]": sizes where they are known, else the names in dims. */
static void add_expected_shape(fkda_text *text, const fkda_form *form, bool names) {
  const char *dim = form->dims;
  for (int32_t i = 0; i < form->ndim; ++i) {
    int length = 0;
    while (dim[length] && dim[length] != ',') ++length;
    fkda_text_add(text, i ? "," : "[");
    if (names || form->shape[i] < 0)
      fkda_text_add(text, "%.*s", length, dim);
    else
      fkda_text_add(text, "%lld", (long long)form->shape[i]);
    dim += length + (dim[length] == ',');
  }
  fkda_text_add(text, "]");
}

static fkda_status fail_shape(const char *name, const fkda_tensor *t, const fkda_form *form) {
  char message[2 * TEXT_CAPACITY];
  fkda_text text = {message, sizeof message, 0};
  if (t->ndim < 1 || t->ndim > FKDA_MAX_DIMS) {
    fkda_text_add(&text, "ndim %d", (int)t->ndim);
  } else {
    fkda_text_add(&text, "shape ");
    fkda_text_add_list(&text, t->shape, t->ndim);
  }
  fkda_text_add(&text, ", expected ");
  add_expected_shape(&text, form, false);
  bool sizes = false;
  for (int32_t i = 0; i < form->ndim; ++i) sizes |= form->shape[i] >= 0;
  if (form->match) {
    fkda_text_add(&text, " to match %s", form->match);
  } else if (sizes) {
    fkda_text_add(&text, " = ");
    add_expected_shape(&text, form, true);
  }
  return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "%s: %s", name, message);
}

static fkda_status check_shape(const char *name, const fkda_tensor *t, const fkda_form *form) {
  if (t->ndim != form->ndim) return fail_shape(name, t, form);
  for (int32_t i = 0; i < form->ndim; ++i)
    if (form->shape[i] >= 0 ? t->shape[i] != form->shape[i] : t->shape[i] < 0)
      return fail_shape(name, t, form);
  return FKDA_OK;
}

/* ---- strides, extent, data ---- */

static fkda_status fail_strides(const char *name, const fkda_tensor *t, const char *expected) {
  char strides[TEXT_CAPACITY];
  fkda_text text = {strides, sizeof strides, 0};
  fkda_text_add_list(&text, t->stride, t->ndim);
  return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "%s: strides %s, expected %s", name, strides,
                   expected);
}

static fkda_status fail_size(const char *name, const fkda_tensor *t) {
  char message[2 * TEXT_CAPACITY];
  fkda_text text = {message, sizeof message, 0};
  fkda_text_add(&text, "shape ");
  fkda_text_add_list(&text, t->shape, t->ndim);
  fkda_text_add(&text, " with strides ");
  fkda_text_add_list(&text, t->stride, t->ndim);
  return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "%s: %s, expected at most 2^62 bytes", name,
                   message);
}

/* What a tensor of valid shape takes. */
typedef struct size_of_tensor {
  int64_t element; /* bytes */
  int64_t elements;
  int64_t extent; /* bytes from the first element to the end of the last */
} size_of_tensor;

/* Strides, and with them the sizes: every dimension's step fits what the tensor may span. */
static fkda_status check_strides(const char *name, const fkda_tensor *t, fkda_form_strides strides,
                                 bool written, size_of_tensor *size) {
  const int64_t element = (int64_t)fkda_dtype_size(t->dtype);
  int64_t elements = 1, extent = element;
  bool fits = true, nested = true;
  for (int32_t i = t->ndim - 1; i >= 0; --i) {
    if (t->shape[i] <= 1) continue;
    const int64_t stride = t->stride[i];
    int64_t step = 0;
    if (stride < 0) return fail_strides(name, t, "none below 0");
    if (strides == FKDA_STRIDES_INNER && i == t->ndim - 1 && stride != 1)
      return fail_strides(name, t, "1 in the last dimension");
    if (strides == FKDA_STRIDES_CONTIGUOUS && fits && stride != elements)
      return fail_strides(name, t, "those of a contiguous tensor");
    fits &= !__builtin_mul_overflow(elements, t->shape[i], &elements);
    fits &= !__builtin_mul_overflow(stride, element, &step);
    nested &= step >= extent;
    fits &= !__builtin_mul_overflow(step, t->shape[i] - 1, &step);
    fits &= !__builtin_add_overflow(extent, step, &extent);
  }
  *size = (size_of_tensor){element, elements, extent};
  int64_t bytes = 0;
  fits &= !__builtin_mul_overflow(elements, element, &bytes);
  if (!fits || extent > FKDA_MAX_EXTENT || bytes > FKDA_MAX_EXTENT) return fail_size(name, t);
  /* nearly every tensor has its dimensions in order; only others need a closer look */
  return written && !nested ? fkda_check_self_overlap(name, t) : FKDA_OK;
}

static fkda_status check_data(fkda_checker *c, const char *name, const fkda_tensor *t,
                              const size_of_tensor *size, bool written, bool state) {
  if (!c->for_run) return FKDA_OK;
  const uintptr_t begin = (uintptr_t)t->data;
  uintptr_t end;
  if (!t->data)
    return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "%s: data NULL, expected memory of %lld elements",
                     name, (long long)size->elements);
  if (begin & (uintptr_t)(size->element - 1)) /* element sizes are powers of two */
    return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "%s: data %p, expected a multiple of %d (%s)",
                     name, t->data, (int)size->element, fkda_dtype_string(t->dtype));
  if (__builtin_add_overflow(begin, (uintptr_t)size->extent, &end))
    return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT,
                     "%s: data %p with %lld bytes, expected an end inside the address space", name,
                     t->data, (long long)size->extent);
  fkda_region *region = &c->region[c->regions++];
  region->name = name;
  region->tensor = t;
  region->begin = begin;
  region->end = end;
  region->written = written;
  region->state = state;
  return FKDA_OK;
}

fkda_status fkda_check_tensor(fkda_checker *checker, const char *name, const fkda_tensor *tensor,
                              const fkda_form *form) {
  size_of_tensor size = {0};
  fkda_status status =
      check_dtype(checker, name, tensor, form->dtypes, form->io_dtype, form->io_of);
  if (status) return status;
  if ((status = check_shape(name, tensor, form))) return status;
  if (is_empty(tensor)) return FKDA_OK; /* strides and data mean nothing */
  if ((status = check_strides(name, tensor, form->strides, form->written, &size))) return status;
  return check_data(checker, name, tensor, &size, form->written, form->state);
}

static fkda_status fail_count(const char *name, const fkda_tensor *t, int64_t count,
                              const char *what) {
  char shape[TEXT_CAPACITY];
  fkda_text text = {shape, sizeof shape, 0};
  fkda_text_add_list(&text, t->shape, t->ndim);
  return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "%s: shape %s, expected %s = %lld elements", name,
                   shape, what, (long long)count);
}

fkda_status fkda_check_vector(fkda_checker *checker, const char *name, const fkda_tensor *tensor,
                              int64_t count, const char *what, uint32_t dtypes) {
  fkda_status status = check_dtype(checker, name, tensor, dtypes, FKDA_NONE, NULL);
  if (status) return status;
  if (tensor->ndim < 1 || tensor->ndim > FKDA_MAX_DIMS)
    return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "%s: ndim %d, expected 1 to %d", name,
                     (int)tensor->ndim, FKDA_MAX_DIMS);
  int64_t elements = 1;
  for (int32_t i = 0; i < tensor->ndim; ++i)
    if (tensor->shape[i] < 1 || __builtin_mul_overflow(elements, tensor->shape[i], &elements))
      return fail_count(name, tensor, count, what);
  if (elements != count) return fail_count(name, tensor, count, what);
  size_of_tensor size = {0};
  if ((status = check_strides(name, tensor, FKDA_STRIDES_CONTIGUOUS, false, &size))) return status;
  return check_data(checker, name, tensor, &size, false, false);
}
