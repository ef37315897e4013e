/* Planning: description in, printable plan out. Touches no device and no tensor memory. */
#ifndef FKDA_PLAN_PLAN_H
#define FKDA_PLAN_PLAN_H

#include "check/problem.h"

struct fkda_backend;

#define FKDA_REASON_CAPACITY 160 /* bytes for one backend's reason for refusing */

typedef struct fkda_plan_t {
  const struct fkda_backend *backend;
  int32_t backend_index;
  int32_t chunk;       /* tokens a chunk; 1 for token recurrences */
  int32_t threads;     /* CPU threads, CUDA blocks */
  int32_t value_split; /* parts of V */
  int64_t tasks;       /* independent pieces of work */
  size_t workspace_size;
} fkda_plan_t;

/* FKDA_OK, or FKDA_ERROR_UNSUPPORTED / _INVALID_ARGUMENT (unknown backend) / _NO_DEVICE with the detail set. */
fkda_status fkda_plan_make(const fkda_problem *problem, fkda_plan_t *plan);

/* The text of fkda_plan_describe(); returns its full length. The reasons why the other backends were not
 * taken are worked out here, not by fkda_plan_make(), which is part of every call. */
size_t fkda_plan_print(const fkda_problem *problem, const fkda_plan_t *plan, char *buffer,
                       size_t capacity);

/* The same in one line, without the other backends: what FLASHKDA_LOG=plan prints. */
size_t fkda_plan_line(const fkda_problem *problem, const fkda_plan_t *plan, char *buffer,
                      size_t capacity);

#endif
