/* The ordered backend table: first row that supports a problem runs it; the reference is last. */
#ifndef FKDA_RUN_BACKEND_H
#define FKDA_RUN_BACKEND_H

#include "check/problem.h"
#include "plan/plan.h"

typedef struct fkda_backend fkda_backend;
struct fkda_backend {
  const char *name;
  int32_t device_type;
  const void *kernels; /* the backend's own table, for instance one ISA's fkda_cpu_kernels */
  /* Can this machine run it at all? If not, writes the reason (<= capacity bytes). In the hot path the
   * reason is not wanted: NULL with capacity 0, which fkda_refuse() answers without formatting. */
  bool (*available)(const fkda_backend *self, char *reason, size_t capacity);
  /* Given that, can this device? NULL: yes. From what available() found out; touches no device. */
  bool (*on_device)(const fkda_backend *self, int32_t device_id, char *reason, size_t capacity);
  /* Pure: can it run this problem? */
  bool (*supports)(const fkda_backend *self, const fkda_problem *problem, char *reason,
                   size_t capacity);
  /* Pure: fills chunk, tasks, value_split, threads, workspace_size of the plan. */
  void (*plan)(const fkda_backend *self, const fkda_problem *problem, fkda_plan_t *plan);
  fkda_status (*launch)(const fkda_backend *self, const fkda_problem *problem,
                        const fkda_plan_t *plan);
  fkda_status (*warmup)(const fkda_backend *self, int32_t device_id); /* may be NULL */
};

/* Formats the reason, if there is room for one, and returns false: `return fkda_refuse(...)`. */
bool fkda_refuse(char *reason, size_t capacity, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* row->available(), asked once per process: the answers take long (CPUID under a hypervisor, a driver to
 * load) and do not change, and every call's plan wants them. */
bool fkda_backend_usable(int32_t index, char *reason, size_t capacity);

/* All rows, in order of preference; NULL past the end. */
const fkda_backend *fkda_backend_at(int32_t index);

#endif
