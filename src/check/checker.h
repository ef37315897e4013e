/* Inside src/check: the state of one validation, and the checks of single tensors. */
#ifndef FKDA_CHECK_CHECKER_H
#define FKDA_CHECK_CHECKER_H

#include "check/problem.h"

#define FKDA_CHECKER_REGIONS 24

/* Bytes that one tensor may span or count: sums of two such numbers fit an int64_t. */
#define FKDA_MAX_EXTENT (INT64_C(1) << 62)

/* A tensor's memory, kept until all tensors are known and can be compared. */
typedef struct fkda_region {
  const char *name;
  const fkda_tensor *tensor; /* NULL: plain bytes (the workspace) */
  uintptr_t begin, end;      /* bytes touched: [begin, end) */
  bool written;
  bool state; /* may be the same view as another region with this mark (in place) */
} fkda_region;

typedef struct fkda_checker {
  fkda_problem *problem;
  bool for_run; /* data pointers and what they point to count */
  bool wide;    /* f64 is taken for every floating-point tensor (backend "reference") */
  const char *initial_indices; /* the name under which problem->initial_indices was given */
  const char *initial, *final; /* the names of the state tensors that are read and written */
  int32_t regions;
  fkda_region region[FKDA_CHECKER_REGIONS];
} fkda_checker;

/* Sets of dtypes. */
#define FKDA_DTYPE_BIT(dtype) (1u << (dtype))
#define FKDA_DTYPES_INDEX (FKDA_DTYPE_BIT(FKDA_I32) | FKDA_DTYPE_BIT(FKDA_I64))
#define FKDA_DTYPES_FLOAT                                                                          \
  (FKDA_DTYPE_BIT(FKDA_F32) | FKDA_DTYPE_BIT(FKDA_BF16) | FKDA_DTYPE_BIT(FKDA_F16) |               \
   FKDA_DTYPE_BIT(FKDA_F64))

typedef enum fkda_form_strides {
  FKDA_STRIDES_FREE,
  FKDA_STRIDES_INNER, /* the last dimension is contiguous */
  FKDA_STRIDES_CONTIGUOUS,
} fkda_form_strides;

/* What one tensor has to look like. */
typedef struct fkda_form {
  const char *dims; /* names of the dimensions, "B,T,H,K" */
  int32_t ndim;
  int64_t shape[FKDA_MAX_DIMS]; /* -1: any size */
  const char *match;            /* the tensor that fixed the shape, for the message; may be NULL */
  uint32_t dtypes;
  int32_t
      io_dtype; /* for the message: the one of `dtypes` that stems from tensor io_of, or FKDA_NONE */
  const char *io_of; /* "q" */
  fkda_form_strides strides;
  bool written;
  bool state;
} fkda_form;

/* One present tensor. Records its region when for_run. */
fkda_status fkda_check_tensor(fkda_checker *checker, const char *name, const fkda_tensor *tensor,
                              const fkda_form *form);

/* A present tensor of any rank with `count` elements, contiguous. `what` names the count: "HV". */
fkda_status fkda_check_vector(fkda_checker *checker, const char *name, const fkda_tensor *tensor,
                              int64_t count, const char *what, uint32_t dtypes);

/* Is the tensor there? Fails if it is neither there nor all zero. */
fkda_status fkda_check_presence(const fkda_checker *checker, const char *name,
                                const fkda_tensor *tensor, bool *present);

/* The strides to hand on: 0 where they have no meaning. */
void fkda_resolve_strides(const fkda_tensor *tensor, int64_t *stride);

/* Writes must touch nothing else that the call reads or writes (overlap.c). */
fkda_status fkda_check_overlap(const fkda_checker *checker);
/* No two elements of a written tensor are the same memory. */
fkda_status fkda_check_self_overlap(const char *name, const fkda_tensor *tensor);

/* cu_seqlens, indices, counts and offsets in host memory (contents.c). */
fkda_status fkda_check_contents(const fkda_checker *checker);

#endif
