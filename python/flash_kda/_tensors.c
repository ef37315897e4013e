#include "_tensors.h"

#include <stdarg.h>
#include <stdio.h>

/* ---- DLPack, as far as it is used -------------------------------------------------------------
 * Layouts from the DLPack 1.3 specification (dmlc.github.io/dlpack, "C API"); names are theirs. */

typedef struct DLDevice {
  int32_t device_type;
  int32_t device_id;
} DLDevice;

typedef struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;

typedef struct DLTensor {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;
  int64_t *strides; /* elements; NULL: contiguous */
  uint64_t byte_offset;
} DLTensor;

typedef struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
} DLPackVersion;

typedef struct DLManagedTensor { /* capsule "dltensor" */
  DLTensor dl_tensor;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensor *);
} DLManagedTensor;

typedef struct DLManagedTensorVersioned { /* capsule "dltensor_versioned" */
  DLPackVersion version;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensorVersioned *);
  uint64_t flags;
  DLTensor dl_tensor;
} DLManagedTensorVersioned;

typedef struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  struct DLPackExchangeAPIHeader *prev_api;
} DLPackExchangeAPIHeader;

typedef int (*DLPackDLTensorFromPyObjectNoSync)(void *py_object, DLTensor *out);
typedef int (*DLPackCurrentWorkStream)(int32_t device_type, int32_t device_id, void **stream);

typedef struct DLPackExchangeAPI { /* capsule "dlpack_exchange_api" */
  DLPackExchangeAPIHeader header;
  void (*managed_tensor_allocator)(void);
  void (*managed_tensor_from_py_object_no_sync)(void);
  void (*managed_tensor_to_py_object_no_sync)(void);
  DLPackDLTensorFromPyObjectNoSync dltensor_from_py_object_no_sync; /* may be NULL */
  DLPackCurrentWorkStream current_work_stream;
} DLPackExchangeAPI;

enum { DLPACK_MAJOR = 1 };
enum { kDLInt = 0, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };
enum { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLCUDAManaged = 13 };
enum { DLPACK_FLAG_READ_ONLY = 1, DLPACK_FLAG_IS_COPIED = 2 };

/* ---- NumPy's array interface, C side (NumPy reference, "The array interface protocol") -------- */

typedef struct PyArrayInterface {
  int two; /* 2 */
  int nd;
  char typekind;
  int itemsize;
  int flags;
  Py_ssize_t *shape;
  Py_ssize_t *strides; /* bytes */
  void *data;
  PyObject *descr;
} PyArrayInterface;

enum { ARRAY_NOTSWAPPED = 0x200, ARRAY_WRITEABLE = 0x400 };

/* ---- what is known about a Python type -------------------------------------------------------- */

typedef enum source {
  SOURCE_NONE,
  SOURCE_ARRAY,
  SOURCE_EXCHANGE,
  SOURCE_TORCH,
  SOURCE_DLPACK
} source;

typedef struct tensor_type {
  PyTypeObject *type; /* a reference: a type's address must not be reused while it is remembered */
  source source;
  bool has_dlpack;
  bool torch_like;
  DLPackDLTensorFromPyObjectNoSync from_object;
  DLPackCurrentWorkStream current_stream;
} tensor_type;

/* Few types ever take part (Tensor, Parameter, ndarray), so a short scan beats any hashing. Guarded
 * by the GIL, like everything in this file. */
enum { TYPES = 8, DTYPES = 16 };
static tensor_type known_types[TYPES];
static unsigned next_type;

static struct {
  PyObject *object; /* a reference, as above */
  int32_t dtype;
} known_dtypes[DTYPES];
static unsigned next_dtype;

/* Interned attribute names. */
#define NAMES(X)                                                                                   \
  X(__array_struct__)                                                                              \
  X(__dlpack_c_exchange_api__)                                                                     \
  X(__dlpack__)                                                                                    \
  X(__dlpack_device__)                                                                             \
  X(data_ptr)                                                                                      \
  X(element_size)                                                                                  \
  X(shape)                                                                                         \
  X(stride)                                                                                        \
  X(dtype)                                                                                         \
  X(device)                                                                                        \
  X(type)                                                                                          \
  X(index)                                                                                         \
  X(new_empty)
#define DECLARE_NAME(name) static PyObject *str_##name;
NAMES(DECLARE_NAME)
#undef DECLARE_NAME

int tensors_init(void) {
#define INTERN(name)                                                                               \
  if (!str_##name && !(str_##name = PyUnicode_InternFromString(#name))) return -1;
  NAMES(INTERN)
#undef INTERN
  return 0;
}

/* New reference, or NULL without an exception if there is no such attribute. Errors that a property
 * raises count as "no such attribute" too. */
static PyObject *optional_attribute(PyObject *object, PyObject *name) {
  PyObject *value = PyObject_GetAttr(object, name);
  if (!value) PyErr_Clear();
  return value;
}

static bool type_has(PyTypeObject *type, PyObject *name) {
  PyObject *value = optional_attribute((PyObject *)type, name);
  Py_XDECREF(value);
  return value != NULL;
}

static const DLPackExchangeAPI *exchange_api(PyTypeObject *type) {
  PyObject *capsule = optional_attribute((PyObject *)type, str___dlpack_c_exchange_api__);
  if (!capsule) return NULL;
  const DLPackExchangeAPIHeader *header = NULL;
  if (PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
    header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  }
  Py_DECREF(capsule); /* the table itself lives as long as the process */
  while (header && header->version.major != DLPACK_MAJOR) header = header->prev_api;
  const DLPackExchangeAPI *api = (const DLPackExchangeAPI *)header;
  return api && api->dltensor_from_py_object_no_sync ? api : NULL;
}

/* By value: reading a tensor may run Python code, and that may change the table. */
static tensor_type type_of(PyObject *object) {
  PyTypeObject *type = Py_TYPE(object);
  for (int i = 0; i < TYPES; i++) {
    if (known_types[i].type == type) return known_types[i];
  }
  tensor_type entry = {.type = type};
  entry.has_dlpack = type_has(type, str___dlpack__) && type_has(type, str___dlpack_device__);
  entry.torch_like = type_has(type, str_data_ptr) && type_has(type, str_stride);
  const DLPackExchangeAPI *api = exchange_api(type);
  if (type_has(type, str___array_struct__)) {
    entry.source = SOURCE_ARRAY;
  } else if (api) {
    entry.source = SOURCE_EXCHANGE;
    entry.from_object = api->dltensor_from_py_object_no_sync;
    entry.current_stream = api->current_work_stream;
  } else if (entry.torch_like) {
    entry.source = SOURCE_TORCH;
  } else if (entry.has_dlpack) {
    entry.source = SOURCE_DLPACK;
  }
  tensor_type *slot = &known_types[next_type++ % TYPES];
  PyTypeObject *evicted = slot->type;
  Py_INCREF(type);
  *slot = entry;
  Py_XDECREF(evicted);
  return entry;
}

/* ---- dtypes ----------------------------------------------------------------------------------- */

static int32_t dtype_of_name(const char *name) {
  const char *dot = strrchr(name, '.'); /* "torch.bfloat16", "bfloat16" */
  if (dot) name = dot + 1;
#define MATCH(id, value, bytes, text)                                                              \
  if (!strcmp(name, text)) return id;
  FKDA_DTYPE_LIST(MATCH)
#undef MATCH
  return FKDA_NONE;
}

/* The fkda_dtype of object.dtype by its text (torch's, NumPy's and ml_dtypes' all end in the name that
 * this library uses); FKDA_NONE if it is another; -1 with an exception set. */
static int32_t dtype_of_object(PyObject *object) {
  PyObject *dtype = PyObject_GetAttr(object, str_dtype);
  if (!dtype) return -1;
  for (int i = 0; i < DTYPES; i++) {
    if (known_dtypes[i].object == dtype) {
      Py_DECREF(dtype);
      return known_dtypes[i].dtype;
    }
  }
  PyObject *text = PyObject_Str(dtype);
  const char *name = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
  const int32_t id = name ? dtype_of_name(name) : -1;
  Py_XDECREF(text);
  if (id < 0) {
    Py_DECREF(dtype);
    return -1;
  }
  const unsigned slot = next_dtype++ % DTYPES;
  PyObject *evicted = known_dtypes[slot].object;
  known_dtypes[slot].object = dtype;
  known_dtypes[slot].dtype = id;
  Py_XDECREF(evicted);
  return id;
}

static int32_t dtype_of_dlpack(DLDataType type) {
  if (type.lanes != 1) return FKDA_NONE;
  switch (type.code) {
    case kDLFloat:
      return type.bits == 32   ? FKDA_F32
             : type.bits == 16 ? FKDA_F16
             : type.bits == 64 ? FKDA_F64
                               : 0;
    case kDLBfloat: return type.bits == 16 ? FKDA_BF16 : FKDA_NONE;
    case kDLInt: return type.bits == 32 ? FKDA_I32 : type.bits == 64 ? FKDA_I64 : FKDA_NONE;
    case kDLBool: return type.bits == 8 ? FKDA_BOOL : FKDA_NONE;
    default: return FKDA_NONE;
  }
}

/* ---- errors ----------------------------------------------------------------------------------- */

/* Raises `exception`, and marks it as a statement about the tensor. Returns -1. */
static int refuse(tensors *set, PyObject *exception, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  PyErr_FormatV(exception, format, arguments);
  va_end(arguments);
  set->refused = true;
  return -1;
}

/* Puts the argument's name before the message of the exception that a tensor library raised; of several
 * lines (torch adds a C++ stack) the first will do. */
static int name_exception(tensors *set, const char *name) {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (!value || !PyErr_GivenExceptionMatches(value, PyExc_Exception) ||
      PyErr_GivenExceptionMatches(value, PyExc_MemoryError)) {
    PyErr_Restore(type, value, traceback);
    return -1;
  }
  PyObject *message = PyObject_Str(value);
  const char *text = message ? PyUnicode_AsUTF8AndSize(message, NULL) : NULL;
  char line[256];
  snprintf(line, sizeof line, "%.*s", text ? (int)strcspn(text, "\n") : 0, text ? text : "");
  refuse(set, PyExc_ValueError, "%s: %s", name, *line ? line : "not readable as a tensor");
  Py_XDECREF(message);
  PyObject *new_type, *new_value, *new_traceback;
  PyErr_Fetch(&new_type, &new_value, &new_traceback);
  PyErr_NormalizeException(&new_type, &new_value, &new_traceback);
  PyException_SetCause(new_value, value); /* takes the reference */
  PyErr_Restore(new_type, new_value, new_traceback);
  Py_XDECREF(type);
  Py_XDECREF(traceback);
  return -1;
}

static int refuse_dtype(tensors *set, const char *name, PyObject *object) {
  PyObject *dtype = optional_attribute(object, str_dtype);
  PyObject *text = dtype ? PyObject_Str(dtype) : NULL;
  if (!text) PyErr_Clear();
  const char *utf8 = text ? PyUnicode_AsUTF8AndSize(text, NULL) : "of another kind";
  const char *dot = utf8 ? strrchr(utf8, '.') : NULL;
#define LIST_DTYPE(id, value, bytes, text) " " text
  refuse(set, PyExc_TypeError, "%s: dtype %s, expected one of" FKDA_DTYPE_LIST(LIST_DTYPE), name,
         dot ? dot + 1 : utf8);
#undef LIST_DTYPE
  Py_XDECREF(text);
  Py_XDECREF(dtype);
  return -1;
}

static void device_text(char *text, size_t capacity, int32_t type, int32_t id) {
  if (type == FKDA_DEVICE_CPU) {
    snprintf(text, capacity, "cpu");
  } else if (type == FKDA_DEVICE_CUDA) {
    snprintf(text, capacity, "cuda:%d", (int)id);
  } else {
    snprintf(text, capacity, "DLPack %d:%d", (int)type, (int)id);
  }
}

/* ---- reading ---------------------------------------------------------------------------------- */

/* A tensor as its library describes it. */
typedef struct view {
  fkda_tensor *tensor; /* where it goes; dtype FKDA_NONE: a dtype that this library does not have */
  int64_t itemsize;
  DLDevice device;
  bool read_only;
} view;

static int set_rank(tensors *set, const char *name, int64_t ndim, fkda_tensor *tensor) {
  if (ndim < 0 || ndim > FKDA_MAX_DIMS) {
    return refuse(set, PyExc_ValueError, "%s: %lld dimensions, expected at most %d", name,
                  (long long)ndim, FKDA_MAX_DIMS);
  }
  tensor->ndim = (int32_t)ndim;
  if (ndim == 0) { /* a scalar is a vector of one */
    tensor->ndim = 1;
    tensor->shape[0] = tensor->stride[0] = 1;
  }
  return 0;
}

static int view_of_dltensor(tensors *set, const char *name, const DLTensor *source, view *out) {
  out->tensor->data = source->data ? (char *)source->data + source->byte_offset : NULL;
  out->tensor->dtype = dtype_of_dlpack(source->dtype);
  out->itemsize = ((int64_t)source->dtype.bits * source->dtype.lanes + 7) / 8;
  out->device = source->device;
  if (set_rank(set, name, source->ndim, out->tensor)) return -1;
  fkda_tensor *tensor = out->tensor;
  const int64_t *shape = source->shape, *strides = source->strides;
  int64_t contiguous = 1;
  for (int32_t i = source->ndim - 1; i >= 0; i--) {
    tensor->shape[i] = shape[i];
    tensor->stride[i] = strides ? strides[i] : contiguous;
    contiguous *= shape[i];
  }
  return 0;
}

static int view_of_array(tensors *set, const char *name, PyObject *object, view *out) {
  PyObject *capsule = PyObject_GetAttr(object, str___array_struct__);
  if (!capsule) return name_exception(set, name);
  int status = -1;
  const PyArrayInterface *array =
      PyCapsule_IsValid(capsule, NULL) ? PyCapsule_GetPointer(capsule, NULL) : NULL;
  if (!array || array->two != 2) {
    refuse(set, PyExc_ValueError, "%s: unreadable __array_struct__", name);
    goto done;
  }
  out->tensor->data = array->data;
  out->itemsize = array->itemsize;
  out->device = (DLDevice){FKDA_DEVICE_CPU, 0};
  out->read_only = !(array->flags & ARRAY_WRITEABLE);
  const int size = array->itemsize;
  switch (array->typekind) {
    case 'f':
      out->tensor->dtype = size == 4 ? FKDA_F32 : size == 2 ? FKDA_F16 : size == 8 ? FKDA_F64 : 0;
      break;
    case 'i': out->tensor->dtype = size == 4 ? FKDA_I32 : size == 8 ? FKDA_I64 : FKDA_NONE; break;
    case 'b': out->tensor->dtype = size == 1 ? FKDA_BOOL : FKDA_NONE; break;
    case 'V': /* ml_dtypes' types say "void" */
      out->tensor->dtype = dtype_of_object(object);
      if (out->tensor->dtype < 0) {
        name_exception(set, name);
        goto done;
      }
      break;
    default: out->tensor->dtype = FKDA_NONE;
  }
  if (size > 1 && !(array->flags & ARRAY_NOTSWAPPED)) {
    refuse(set, PyExc_ValueError, "%s: byte-swapped, expected native byte order", name);
    goto done;
  }
  if (set_rank(set, name, array->nd, out->tensor)) goto done;
  bool empty = false;
  for (int i = 0; i < array->nd; i++) empty = empty || array->shape[i] == 0;
  for (int i = 0; i < array->nd; i++) {
    out->tensor->shape[i] = array->shape[i];
    if (array->strides[i] % (size ? size : 1)) {
      if (array->shape[i] <= 1 || empty) continue; /* never used */
      refuse(set, PyExc_ValueError,
             "%s: stride of %zd bytes in dimension %d, expected a multiple of the element size %d",
             name, array->strides[i], i, size);
      goto done;
    }
    out->tensor->stride[i] = array->strides[i] / (size ? size : 1);
  }
  status = 0;
done:
  Py_DECREF(capsule);
  return status;
}

/* Dimensions from a tuple of ints. */
static int read_dims(PyObject *object, PyObject *name, bool call, int64_t *dims,
                     Py_ssize_t *count) {
  PyObject *value =
      call ? PyObject_CallMethodObjArgs(object, name, NULL) : PyObject_GetAttr(object, name);
  PyObject *tuple = value ? PySequence_Tuple(value) : NULL;
  Py_XDECREF(value);
  if (!tuple) return -1;
  *count = PyTuple_Size(tuple);
  for (Py_ssize_t i = 0; i < *count && i < FKDA_MAX_DIMS; i++) {
    dims[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
    if (dims[i] == -1 && PyErr_Occurred()) {
      Py_DECREF(tuple);
      return -1;
    }
  }
  Py_DECREF(tuple);
  return 0;
}

static int read_torch_device(PyObject *object, DLDevice *device) {
  PyObject *value = PyObject_GetAttr(object, str_device);
  PyObject *type = value ? PyObject_GetAttr(value, str_type) : NULL;
  PyObject *index = type ? PyObject_GetAttr(value, str_index) : NULL;
  const char *name = index ? PyUnicode_AsUTF8AndSize(type, NULL) : NULL;
  int status = -1;
  if (name) {
    device->device_type = !strcmp(name, "cpu") ? kDLCPU : !strcmp(name, "cuda") ? kDLCUDA : 0;
    const long id = index == Py_None ? 0 : PyLong_AsLong(index);
    if (!PyErr_Occurred() && !device->device_type) {
      PyErr_Format(PyExc_ValueError, "device %s, expected cpu or cuda", name);
    }
    device->device_id = device->device_type == kDLCPU ? 0 : (int32_t)id;
    if (!PyErr_Occurred()) status = 0;
  }
  Py_XDECREF(index);
  Py_XDECREF(type);
  Py_XDECREF(value);
  return status;
}

static int view_of_torch(tensors *set, const char *name, PyObject *object, view *out) {
  Py_ssize_t ndim = 0, strides = 0;
  if (read_torch_device(object, &out->device)) return name_exception(set, name);
  PyObject *address = PyObject_CallMethodObjArgs(object, str_data_ptr, NULL);
  if (!address) return name_exception(set, name);
  out->tensor->data = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  if (PyErr_Occurred()) return name_exception(set, name);
  out->tensor->dtype = dtype_of_object(object);
  if (out->tensor->dtype < 0) return name_exception(set, name);
  if (read_dims(object, str_shape, false, out->tensor->shape, &ndim) ||
      read_dims(object, str_stride, true, out->tensor->stride, &strides)) {
    return name_exception(set, name);
  }
  if (strides != ndim) {
    return refuse(set, PyExc_ValueError, "%s: %zd strides for %zd dimensions", name, strides, ndim);
  }
  if (set_rank(set, name, ndim, out->tensor)) return -1;
  out->itemsize = (int64_t)fkda_dtype_size(out->tensor->dtype);
  if (!out->itemsize) {
    PyObject *size = PyObject_CallMethodObjArgs(object, str_element_size, NULL);
    out->itemsize = size ? PyLong_AsLongLong(size) : -1;
    Py_XDECREF(size);
    if (PyErr_Occurred()) return name_exception(set, name);
  }
  return 0;
}

/* object.__dlpack__(max_version=(1, 0)[, stream=...]), or without max_version where the method is older
 * than that. */
static PyObject *call_dlpack(PyObject *object, void *stream, bool cuda) {
  PyObject *method = PyObject_GetAttr(object, str___dlpack__);
  if (!method) return NULL;
  PyObject *arguments = PyTuple_New(0), *capsule = NULL;
  for (int attempt = 0; arguments && attempt < 2 && !capsule; attempt++) {
    if (attempt) {
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) break;
      PyErr_Clear();
    }
    /* The producer orders its work before this stream; 1 means the legacy default stream. */
    const long long number = stream ? (long long)(intptr_t)stream : 1;
    PyObject *keywords =
        attempt == 0
            ? cuda ? Py_BuildValue("{s:(ii),s:L}", "max_version", DLPACK_MAJOR, 0, "stream", number)
                   : Py_BuildValue("{s:(ii)}", "max_version", DLPACK_MAJOR, 0)
        : cuda ? Py_BuildValue("{s:L}", "stream", number)
               : PyDict_New();
    if (!keywords) break;
    capsule = PyObject_Call(method, arguments, keywords);
    Py_DECREF(keywords);
  }
  Py_XDECREF(arguments);
  Py_DECREF(method);
  return capsule;
}

static int view_of_dlpack(tensors *set, const char *name, PyObject *object, view *out) {
  int type = 0;
  PyObject *device = PyObject_CallMethodObjArgs(object, str___dlpack_device__, NULL);
  PyObject *pair = device ? PySequence_Tuple(device) : NULL; /* the type may be an IntEnum */
  Py_XDECREF(device);
  if (pair && PyTuple_Size(pair) == 2) {
    type = (int)PyLong_AsLong(PyTuple_GetItem(pair, 0));
  }
  Py_XDECREF(pair);
  if (PyErr_Occurred()) return name_exception(set, name);
  PyObject *capsule = call_dlpack(object, set->stream, type == kDLCUDA || type == kDLCUDAManaged);
  if (!capsule) return name_exception(set, name);
  if (set->held_count == TENSORS_MAX_HELD) {
    Py_DECREF(capsule);
    return refuse(set, PyExc_ValueError, "%s: too many DLPack tensors", name);
  }
  set->held[set->held_count++] = capsule; /* not consumed: its destructor frees the tensor */
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    const DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    if (managed->version.major != DLPACK_MAJOR) {
      return refuse(set, PyExc_ValueError, "%s: DLPack version %u, expected %d", name,
                    (unsigned)managed->version.major, DLPACK_MAJOR);
    }
    out->read_only = (managed->flags & (DLPACK_FLAG_READ_ONLY | DLPACK_FLAG_IS_COPIED)) != 0;
    return view_of_dltensor(set, name, &managed->dl_tensor, out);
  }
  if (PyCapsule_IsValid(capsule, "dltensor")) {
    const DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
    return view_of_dltensor(set, name, &managed->dl_tensor, out);
  }
  return refuse(set, PyExc_ValueError, "%s: __dlpack__() returned no DLPack capsule", name);
}

static int torch_stream(int32_t device_id, void **stream) {
  PyObject *modules = PyImport_GetModuleDict(); /* borrowed */
  PyObject *torch = modules ? PyDict_GetItemString(modules, "torch") : NULL;
  if (!torch) return 0;
  PyObject *cuda = PyObject_GetAttrString(torch, "cuda");
  PyObject *current =
      cuda ? PyObject_CallMethod(cuda, "current_stream", "i", (int)device_id) : NULL;
  PyObject *address = current ? PyObject_GetAttrString(current, "cuda_stream") : NULL;
  if (address) *stream = PyLong_AsVoidPtr(address);
  Py_XDECREF(address);
  Py_XDECREF(current);
  Py_XDECREF(cuda);
  return PyErr_Occurred() ? -1 : 0;
}

/* The first tensor settles the device; the others must agree. */
static int join_device(tensors *set, const char *name, const tensor_type *type, DLDevice device) {
  char text[32], expected[32];
  if (device.device_type == kDLCUDAHost) device = (DLDevice){kDLCPU, 0};
  if (device.device_type == kDLCUDAManaged) device.device_type = kDLCUDA;
  if (device.device_type == kDLCPU) device.device_id = 0;
  if (set->device_of) {
    if (device.device_type == set->device_type && device.device_id == set->device_id) return 0;
    device_text(text, sizeof text, device.device_type, device.device_id);
    device_text(expected, sizeof expected, set->device_type, set->device_id);
    return refuse(set, PyExc_ValueError, "%s: device %s, expected %s to match %s", name, text,
                  expected, set->device_of);
  }
  if (device.device_type != kDLCPU && device.device_type != kDLCUDA) {
    device_text(text, sizeof text, device.device_type, device.device_id);
    return refuse(set, PyExc_ValueError, "%s: device %s, expected cpu or cuda", name, text);
  }
  set->device_of = name;
  set->device_type = device.device_type;
  set->device_id = device.device_id;
  if (device.device_type != kDLCUDA) return 0;
  if (type->current_stream) {
    if (type->current_stream(kDLCUDA, device.device_id, &set->stream)) {
      return name_exception(set, name);
    }
  } else if (type->torch_like && torch_stream(device.device_id, &set->stream)) {
    return name_exception(set, name);
  }
  return 0;
}

static int read_view(tensors *set, const char *name, PyObject *object, bool written, view *out) {
  const tensor_type type = type_of(object);
  source from = type.source;
  /* A bare DLTensor does not say whether it may be written; torch's always may. */
  if (from == SOURCE_EXCHANGE && written && !type.torch_like && type.has_dlpack) {
    from = SOURCE_DLPACK;
  }
  switch (from) {
    case SOURCE_ARRAY:
      if (view_of_array(set, name, object, out)) return -1;
      break;
    case SOURCE_EXCHANGE: {
      DLTensor tensor;
      if (type.from_object(object, &tensor)) return name_exception(set, name);
      if (view_of_dltensor(set, name, &tensor, out)) return -1;
      break;
    }
    case SOURCE_TORCH:
      if (view_of_torch(set, name, object, out)) return -1;
      break;
    case SOURCE_DLPACK:
      if (view_of_dlpack(set, name, object, out)) return -1;
      break;
    default: {
      PyObject *type_name = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__");
      PyErr_Format(PyExc_TypeError, "%s: %S, expected a tensor (torch, NumPy or DLPack)", name,
                   type_name ? type_name : Py_None);
      Py_XDECREF(type_name);
      return -1;
    }
  }
  if (written && out->read_only) {
    return refuse(set, PyExc_ValueError, "%s: read-only memory, expected a writable tensor", name);
  }
  return join_device(set, name, &type, out->device);
}

int tensors_read(tensors *set, const char *name, PyObject *object, bool written,
                 fkda_tensor *tensor) {
  if (!object || object == Py_None) return 0;
  view v = {.tensor = tensor};
  if (read_view(set, name, object, written, &v)) return -1;
  return tensor->dtype == FKDA_NONE ? refuse_dtype(set, name, object) : 0;
}

int tensors_read_bytes(tensors *set, const char *name, PyObject *object, void **data,
                       size_t *size) {
  fkda_tensor tensor = {0};
  view v = {.tensor = &tensor};
  if (read_view(set, name, object, true, &v)) return -1;
  int64_t elements = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; i--) {
    if (tensor.shape[i] > 1 && tensor.stride[i] != elements) {
      return refuse(set, PyExc_ValueError, "%s: strided, expected a contiguous tensor", name);
    }
    elements *= tensor.shape[i];
  }
  *data = tensor.data;
  *size = (size_t)(elements * v.itemsize);
  return 0;
}

PyObject *tensors_empty_like(const char *name, PyObject *object) {
  const tensor_type type = type_of(object);
  PyObject *shape = optional_attribute(object, str_shape), *result = NULL;
  if (shape && type.torch_like && type_has(type.type, str_new_empty)) {
    result = PyObject_CallMethodObjArgs(object, str_new_empty, shape, NULL);
  } else if (shape && type.source == SOURCE_ARRAY) {
    PyObject *numpy = PyImport_ImportModule("numpy");
    PyObject *dtype = numpy ? PyObject_GetAttr(object, str_dtype) : NULL;
    if (dtype) result = PyObject_CallMethod(numpy, "empty", "OO", shape, dtype);
    Py_XDECREF(dtype);
    Py_XDECREF(numpy);
  } else {
    PyErr_Format(PyExc_TypeError,
                 "%s: None, expected a tensor (only torch tensors and NumPy arrays "
                 "can be allocated here)",
                 name);
  }
  Py_XDECREF(shape);
  return result;
}

void *tensors_allocate(tensors *set, PyObject *object, size_t bytes) {
  const tensor_type type = type_of(object);
  if (!type.torch_like || !type_has(type.type, str_new_empty)) return NULL;
  PyObject *size = PyObject_CallMethodObjArgs(object, str_element_size, NULL);
  const size_t unit = size ? PyLong_AsSize_t(size) : 0;
  Py_XDECREF(size);
  if (!unit || unit == (size_t)-1) return NULL;
  PyObject *shape = Py_BuildValue("(n)", (Py_ssize_t)(bytes / unit + 1));
  PyObject *memory = shape ? PyObject_CallMethodObjArgs(object, str_new_empty, shape, NULL) : NULL;
  Py_XDECREF(shape);
  if (!memory) return NULL;
  set->held[set->held_count++] = memory;
  PyObject *address = PyObject_CallMethodObjArgs(memory, str_data_ptr, NULL);
  void *data = address ? PyLong_AsVoidPtr(address) : NULL;
  Py_XDECREF(address);
  return data;
}

void tensors_release(tensors *set) {
  for (int i = 0; i < set->held_count; i++) Py_DECREF(set->held[i]);
  set->held_count = 0;
}
