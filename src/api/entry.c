/* The entry points: check -> plan -> run, and nothing else. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check/problem.h"
#include "cpu/pool.h"
#include "plan/plan.h"
#include "run/backend.h"

#define INVALID FKDA_ERROR_INVALID_ARGUMENT

static void log_plan(const fkda_problem *problem, const fkda_plan_t *plan) {
  const char *log = getenv("FLASHKDA_LOG");
  if (!log || strcmp(log, "plan") != 0) return;
  char line[512];
  fkda_plan_line(problem, plan, line, sizeof line);
  fprintf(stderr, "flashkda: %s\n", line);
}

static fkda_status run(const void *args, fkda_op op) {
  fkda_problem problem;
  fkda_plan_t plan;
  fkda_status status = fkda_check(args, op, true, &problem);
  if (status) return status;
  if ((status = fkda_plan_make(&problem, &plan))) return status;
  log_plan(&problem, &plan);
  if ((status = fkda_check_workspace(&problem, plan.workspace_size))) return status;
  return plan.backend->launch(plan.backend, &problem, &plan);
}

fkda_status fkda_prefill(const fkda_prefill_args *args) { return run(args, FKDA_OP_PREFILL); }
fkda_status fkda_decode(const fkda_decode_args *args) { return run(args, FKDA_OP_DECODE); }
fkda_status fkda_summary(const fkda_summary_args *args) { return run(args, FKDA_OP_SUMMARY); }
fkda_status fkda_backward(const fkda_backward_args *args) { return run(args, FKDA_OP_BACKWARD); }

/* ---- questions about a call ---- */

static fkda_status plan_of(const void *args, fkda_problem *problem, fkda_plan_t *plan) {
  const fkda_status status = fkda_check(args, FKDA_ANY_OP, false, problem);
  return status ? status : fkda_plan_make(problem, plan);
}

fkda_status fkda_query(const void *args) {
  fkda_problem problem;
  fkda_plan_t plan;
  return plan_of(args, &problem, &plan);
}

fkda_status fkda_workspace_size(const void *args, size_t *bytes) {
  fkda_problem problem;
  fkda_plan_t plan;
  if (!bytes) return fkda_fail(INVALID, "bytes: NULL, expected memory for the result");
  const fkda_status status = plan_of(args, &problem, &plan);
  if (status == FKDA_OK) *bytes = plan.workspace_size;
  return status;
}

fkda_status fkda_plan(const void *args, fkda_plan_info *info) {
  fkda_problem problem;
  fkda_plan_t plan;
  if (!info) return fkda_fail(INVALID, "info: NULL, expected an fkda_plan_info");
  const size_t size = info->struct_size; /* the caller's, older or newer than this library */
  if (size < sizeof info->struct_size)
    return fkda_fail(INVALID, "info: struct_size %u, expected sizeof(fkda_plan_info) = %u",
                     (unsigned)size, (unsigned)sizeof *info);
  const fkda_status status = plan_of(args, &problem, &plan);
  if (status) return status;
  const fkda_plan_info all = {.struct_size = info->struct_size,
                              .chunk = plan.chunk,
                              .threads = plan.threads,
                              .value_split = plan.value_split,
                              .tasks = plan.tasks,
                              .workspace_size = plan.workspace_size,
                              .backend = plan.backend->name};
  memcpy(info, &all, size < sizeof all ? size : sizeof all);
  if (size > sizeof all) memset((char *)info + sizeof all, 0, size - sizeof all);
  return FKDA_OK;
}

fkda_status fkda_plan_describe(const void *args, char *buffer, size_t capacity, size_t *length) {
  fkda_problem problem;
  fkda_plan_t plan;
  if (!buffer && capacity)
    return fkda_fail(INVALID, "buffer: NULL with capacity %llu, expected memory or capacity 0",
                     (unsigned long long)capacity);
  const fkda_status status = plan_of(args, &problem, &plan);
  if (status) return status;
  const size_t full = fkda_plan_print(&problem, &plan, buffer, capacity);
  if (length) *length = full;
  return FKDA_OK;
}

/* ---- backends, threads, start-up ---- */

const char *fkda_backend_name(int32_t index) {
  const fkda_backend *row = fkda_backend_at(index);
  return row ? row->name : NULL;
}

fkda_status fkda_backend_available(const char *name) {
  if (!name) return fkda_fail(INVALID, "name: NULL, expected the name of a backend");
  const fkda_backend *row;
  for (int32_t i = 0; (row = fkda_backend_at(i)) != NULL; ++i) {
    if (strcmp(row->name, name) != 0) continue;
    char reason[FKDA_REASON_CAPACITY] = "";
    if (fkda_backend_usable(i, reason, sizeof reason)) return FKDA_OK;
    const bool cpu = row->device_type == FKDA_DEVICE_CPU;
    return fkda_fail(cpu ? FKDA_ERROR_UNSUPPORTED : FKDA_ERROR_NO_DEVICE, "%s: %s", name, reason);
  }
  return fkda_fail(INVALID, "name: \"%.64s\", expected a name that fkda_backend_name() gives",
                   name);
}

fkda_status fkda_set_parallel_for(fkda_parallel_for_fn parallel_for, void *context,
                                  int32_t num_threads) {
  if (parallel_for && num_threads < 1)
    return fkda_fail(INVALID, "num_threads: %d, expected at least 1", (int)num_threads);
  return fkda_pool_set_hook(parallel_for, context, num_threads);
}

fkda_status fkda_set_num_threads(int32_t num_threads) {
  if (num_threads < 0 || num_threads > 1024)
    return fkda_fail(INVALID, "num_threads: %d, expected 0 to 1024", (int)num_threads);
  return fkda_pool_set_threads(num_threads);
}

int32_t fkda_num_threads(void) { return fkda_pool_threads(); }

fkda_status fkda_warmup(int32_t device_type, int32_t device_id) {
  const bool cpu = device_type == FKDA_DEVICE_CPU;
  if (!cpu && device_type != FKDA_DEVICE_CUDA)
    return fkda_fail(INVALID, "device_type: %d, expected %d (CPU) or %d (CUDA)", (int)device_type,
                     FKDA_DEVICE_CPU, FKDA_DEVICE_CUDA);
  if (cpu ? device_id != 0 : device_id < 0)
    return fkda_fail(INVALID, "device_id: %d, expected %s", (int)device_id,
                     cpu ? "0 on the CPU" : "at least 0");
  bool known = false, here = cpu;
  char reason[FKDA_REASON_CAPACITY] = "";
  const fkda_backend *row;
  for (int32_t i = 0; (row = fkda_backend_at(i)) != NULL; ++i) {
    if (row->device_type != device_type) continue;
    known = true;
    if (!fkda_backend_usable(i, reason, sizeof reason)) continue;
    if (row->on_device && !row->on_device(row, device_id, reason, sizeof reason)) continue;
    here = true;
    const fkda_status status = row->warmup ? row->warmup(row, device_id) : FKDA_OK;
    if (status) return status;
  }
  if (!known)
    return fkda_fail(FKDA_ERROR_UNSUPPORTED,
                     "device_type: CUDA, expected CPU (this build has no kernels for CUDA)");
  if (!here)
    return fkda_fail(FKDA_ERROR_NO_DEVICE, "device_type: CUDA, which cannot be used here: %s",
                     reason);
  if (cpu) fkda_pool_start();
  return FKDA_OK;
}
