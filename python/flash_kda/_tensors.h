/* Python objects -> fkda_tensor: the only place that knows tensor libraries. Linked to none of them.
 *
 * Ways in, tried in this order and remembered for each Python type:
 *   array    __array_struct__ (NumPy's array interface, C side): tells whether the memory is writable
 *   exchange __dlpack_c_exchange_api__ on the type (DLPack 1.3; torch >= 2.10): a plain C call
 *   torch    data_ptr(), shape, stride(), dtype, device (older torch, and what behaves like it)
 *   dlpack   __dlpack_device__() and __dlpack__() (JAX, CuPy, ...)
 */
#ifndef FLASH_KDA_TENSORS_H
#define FLASH_KDA_TENSORS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

#include "flashkda/flashkda.h"

#define TENSORS_MAX_HELD 32 /* more than any call has tensor arguments */

/* What one call's tensors have in common. Starts as all zeros; end with tensors_release(). */
typedef struct tensors {
  const char *device_of; /* the argument that settled the device; NULL: none so far */
  int32_t device_type;   /* fkda_device_type, once device_of is set */
  int32_t device_id;
  void *stream; /* the CUDA stream on which the first tensor's library works now; else NULL */
  bool refused; /* the error that is set is about a tensor's dtype, device, strides or rank */
  int held_count;
  PyObject
      *held[TENSORS_MAX_HELD]; /* DLPack capsules, kept until the call is over; last, see parse() */
} tensors;

/* Reads `object` into *tensor, which is all zeros before; NULL and None leave it absent. `written` asks
 * for writable memory. 0, or -1 with an exception set that names the argument. The view is valid while the
 * caller keeps the object alive. */
int tensors_read(tensors *set, const char *name, PyObject *object, bool written,
                 fkda_tensor *tensor);
/* The bytes of a contiguous, writable tensor of any dtype. */
int tensors_read_bytes(tensors *set, const char *name, PyObject *object, void **data, size_t *size);
/* A new tensor of the shape, dtype and device of `object` (torch or NumPy), contiguous. */
PyObject *tensors_empty_like(const char *name, PyObject *object);
/* New memory of at least that many bytes on the device of `object`, from its library's allocator, which knows
 * the stream; held until tensors_release(). NULL: that library has none that is known here, or there is
 * no memory, and then an exception is set. */
void *tensors_allocate(tensors *set, PyObject *object, size_t bytes);
void tensors_release(tensors *set);
/* Interns attribute names. 0, or -1 with an exception set. */
int tensors_init(void);

#endif
