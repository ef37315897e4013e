/* Which backend runs a problem, and how. */
#include "plan/plan.h"

#include <stdlib.h>

#include "check/text.h"
#include "run/backend.h"

/* What may be considered: the caller's wish, else the environment's. */
typedef struct request {
  const char *backend; /* a row's name, "cpu", or NULL for the best */
  const char *from;    /* who asks: "backend", "FLASHKDA_BACKEND" or "FLASHKDA_CPU_ISA" */
  const char *isa;     /* of the CPU rows only this one; NULL: any */
} request;

static const char isa_prefix[] = "cpu-";
static const char *const isas[] = {"scalar", "avx2", "avx512", "neon"};

/* The ISA of a CPU row, NULL for the reference and for other devices. */
static const char *isa_of(const fkda_backend *row) {
  const size_t length = sizeof isa_prefix - 1;
  return strncmp(row->name, isa_prefix, length) == 0 ? row->name + length : NULL;
}

static const char *variable(const char *name) {
  const char *value = getenv(name);
  return value && value[0] ? value : NULL;
}

static const char *device_name(int32_t device_type) {
  return device_type == FKDA_DEVICE_CPU ? "CPU" : "CUDA";
}

static fkda_status fail_unknown_backend(const request *r) {
  char names[256];
  fkda_text text = {names, sizeof names, 0};
  const fkda_backend *row;
  for (int32_t i = 0; (row = fkda_backend_at(i)) != NULL; ++i)
    fkda_text_add(&text, ", \"%s\"", row->name);
  return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "%s: \"%.64s\", expected \"cpu\"%s", r->from,
                   r->backend, names);
}

static fkda_status request_of(const fkda_problem *p, request *r) {
  *r = (request){.backend = p->backend, .from = "backend"};
  if (!r->backend) {
    r->backend = variable("FLASHKDA_BACKEND");
    r->from = "FLASHKDA_BACKEND";
  }
  const bool any_cpu = !r->backend || strcmp(r->backend, "cpu") == 0;
  if (!any_cpu) {
    const fkda_backend *row;
    for (int32_t i = 0; (row = fkda_backend_at(i)) != NULL; ++i)
      if (strcmp(r->backend, row->name) == 0) return FKDA_OK;
    return fail_unknown_backend(r);
  }
  r->isa = p->device_type == FKDA_DEVICE_CPU ? variable("FLASHKDA_CPU_ISA") : NULL;
  if (!r->isa) return FKDA_OK;
  for (size_t i = 0; i < sizeof isas / sizeof isas[0]; ++i)
    if (strcmp(r->isa, isas[i]) == 0) return FKDA_OK;
  return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT,
                   "FLASHKDA_CPU_ISA: \"%.64s\", expected scalar, avx2, avx512 or neon", r->isa);
}

/* May this row be considered at all? */
static bool row_wanted(const fkda_backend *row, const request *r, char *reason, size_t capacity) {
  const char *isa = isa_of(row);
  if (r->backend && strcmp(r->backend, "cpu") != 0 && strcmp(r->backend, row->name) != 0)
    return fkda_refuse(reason, capacity, "%s asks for %s", r->from, r->backend);
  if (r->backend && strcmp(r->backend, "cpu") == 0 && !isa)
    return fkda_refuse(reason, capacity, "%s asks for a row cpu-*", r->from);
  if (r->isa && isa && strcmp(r->isa, isa) != 0)
    return fkda_refuse(reason, capacity, "FLASHKDA_CPU_ISA asks for %s", r->isa);
  return true;
}

/* Does it run on this machine, and on the problem's device there? */
static bool row_has_device(int32_t index, const fkda_problem *p, char *reason, size_t capacity) {
  const fkda_backend *row = fkda_backend_at(index);
  const bool usable = fkda_backend_usable(index, reason, capacity);
  if (!usable && !capacity) return false;
  /* also where the row is of no use: this device's own reason says more than another's */
  return (!row->on_device || row->on_device(row, p->device_id, reason, capacity)) && usable;
}

/* Could it run the problem? */
static bool row_able(int32_t index, const fkda_problem *p, char *reason, size_t capacity) {
  const fkda_backend *row = fkda_backend_at(index);
  if (row->device_type != p->device_type)
    return fkda_refuse(reason, capacity, "runs on %s%s; the tensors are on %s",
                       row->device_type == FKDA_DEVICE_CPU ? "the " : "",
                       device_name(row->device_type), device_name(p->device_type));
  return row_has_device(index, p, reason, capacity) && row->supports(row, p, reason, capacity);
}

/* "name, name: reason; ", of rows that refuse for the same reason. */
static void add_refusal(fkda_text *text, const char *names, const char *reason) {
  if (text->length) fkda_text_add(text, "; ");
  if (*names) fkda_text_add(text, "%s: ", names);
  fkda_text_add(text, "%s", reason);
}

/* No row can: say of each that was wanted why. Rows of other devices only where they were asked for. */
static fkda_status fail_unsupported(const fkda_problem *p, const request *r) {
  char reasons[1536] = "", buffer[128] = "", last[FKDA_REASON_CAPACITY] = "";
  fkda_text text = {reasons, sizeof reasons, 0}, names = {buffer, sizeof buffer, 0};
  const fkda_backend *row;
  bool device_known = false, device_here = p->device_type == FKDA_DEVICE_CPU, any = false;
  for (int32_t i = 0; (row = fkda_backend_at(i)) != NULL; ++i) {
    char reason[FKDA_REASON_CAPACITY] = "";
    const bool same_device = row->device_type == p->device_type;
    device_known |= same_device;
    if (!row_wanted(row, r, NULL, 0) || (!same_device && !r->backend)) continue;
    device_here |= !same_device || row_has_device(i, p, NULL, 0);
    (void)row_able(i, p, reason, sizeof reason);
    const bool named = !r->backend || strcmp(r->backend, row->name) != 0;
    if (any && strcmp(reason, last) != 0) {
      add_refusal(&text, buffer, last);
      names.length = 0;
      buffer[0] = 0;
    }
    if (named) fkda_text_add(&names, "%s%s", names.length ? ", " : "", row->name);
    memcpy(last, reason, sizeof last);
    any = true;
  }
  if (any) add_refusal(&text, buffer, last);
  if (!device_known && !r->backend)
    return fkda_fail(FKDA_ERROR_UNSUPPORTED,
                     "device_type: %s, expected CPU (this build has no kernels for %s)",
                     device_name(p->device_type), device_name(p->device_type));
  if (!text.length) fkda_text_add(&text, "none is in this build");
  const fkda_status status = device_here ? FKDA_ERROR_UNSUPPORTED : FKDA_ERROR_NO_DEVICE;
  if (r->backend)
    return fkda_fail(status, "%s: \"%s\" cannot run this call: %s", r->from, r->backend, reasons);
  if (!device_here)
    return fkda_fail(status, "device_type: %s, which cannot be used here: %s",
                     device_name(p->device_type), reasons);
  return fkda_fail(status, "no backend can run this call: %s", reasons);
}

/* FLASHKDA_CPU_ISA names what cannot run here: falling back to the reference would be a silent crawl. */
static fkda_status check_isa(const request *r) {
  const fkda_backend *row;
  for (int32_t i = 0; (row = fkda_backend_at(i)) != NULL; ++i) {
    const char *isa = isa_of(row);
    if (!isa || strcmp(isa, r->isa) != 0) continue;
    char reason[FKDA_REASON_CAPACITY] = "";
    if (fkda_backend_usable(i, reason, sizeof reason)) return FKDA_OK;
    return fkda_fail(FKDA_ERROR_UNSUPPORTED, "FLASHKDA_CPU_ISA: \"%s\" cannot run here: %s", r->isa,
                     reason);
  }
  return fkda_fail(FKDA_ERROR_UNSUPPORTED, "FLASHKDA_CPU_ISA: \"%s\" is not in this build", r->isa);
}

fkda_status fkda_plan_make(const fkda_problem *problem, fkda_plan_t *plan) {
  request r;
  fkda_status status = request_of(problem, &r);
  if (status) return status;
  if (r.isa && (status = check_isa(&r))) return status;
  const fkda_backend *row;
  for (int32_t i = 0; (row = fkda_backend_at(i)) != NULL; ++i) {
    if (!row_wanted(row, &r, NULL, 0) || !row_able(i, problem, NULL, 0)) continue;
    *plan = (fkda_plan_t){.backend = row, .backend_index = i};
    row->plan(row, problem, plan);
    return FKDA_OK;
  }
  return fail_unsupported(problem, &r);
}

/* ---- the plan as text ---- */

static const char *op_text(fkda_op op) {
  static const char *const names[] = {"", "prefill", "decode", "summary", "backward"};
  return names[op];
}

static const char *gate_text(fkda_gate gate) {
  static const char *const names[] = {"bounded", "softplus", "direct"};
  return names[gate];
}

static void add_problem(fkda_text *text, const fkda_problem *p) {
  fkda_text_add(text, "%s: B %lld, T %lld, N %lld, H %lld, HV %lld, K %lld, V %lld, %s, gate %s",
                op_text(p->op), (long long)p->B, (long long)p->T, (long long)p->N, (long long)p->H,
                (long long)p->HV, (long long)p->K, (long long)p->V, fkda_dtype_string(p->io_dtype),
                gate_text(p->gate));
}

static void add_numbers(fkda_text *text, const fkda_plan_t *plan) {
  fkda_text_add(text, "chunk %d, tasks %lld, threads %d, value split %d, workspace %llu bytes",
                (int)plan->chunk, (long long)plan->tasks, (int)plan->threads,
                (int)plan->value_split, (unsigned long long)plan->workspace_size);
}

/* prefill: B 1, T 64, ...
 * backend: cpu-avx2 (first in order of preference that can run this)
 * plan: chunk 16, ...
 * not cpu-avx512: this CPU lacks avx512f
 * not reference: able, but cpu-avx2 comes first */
size_t fkda_plan_print(const fkda_problem *problem, const fkda_plan_t *plan, char *buffer,
                       size_t capacity) {
  fkda_text text = {buffer, capacity, 0};
  request r;
  if (request_of(problem, &r)) r = (request){0}; /* the environment has changed since it was made */
  if (capacity) buffer[0] = 0;
  add_problem(&text, problem);
  fkda_text_add(&text, "\nbackend: %s (", plan->backend->name);
  if (r.backend)
    fkda_text_add(&text, "%s asks for %s", r.from, r.backend);
  else
    fkda_text_add(&text, "first in order of preference that can run this");
  if (r.isa) fkda_text_add(&text, ", FLASHKDA_CPU_ISA for %s", r.isa);
  fkda_text_add(&text, ")\nplan: ");
  add_numbers(&text, plan);
  fkda_text_add(&text, "\n");
  const fkda_backend *row;
  for (int32_t i = 0; (row = fkda_backend_at(i)) != NULL; ++i) {
    if (row == plan->backend) continue;
    char reason[FKDA_REASON_CAPACITY] = "";
    if (row_able(i, problem, reason, sizeof reason) && row_wanted(row, &r, reason, sizeof reason))
      fkda_refuse(reason, sizeof reason, "%s comes first", plan->backend->name);
    fkda_text_add(&text, "not %s: %s\n", row->name, reason);
  }
  return text.length;
}

size_t fkda_plan_line(const fkda_problem *problem, const fkda_plan_t *plan, char *buffer,
                      size_t capacity) {
  fkda_text text = {buffer, capacity, 0};
  if (capacity) buffer[0] = 0;
  add_problem(&text, problem);
  fkda_text_add(&text, " -> %s: ", plan->backend->name);
  add_numbers(&text, plan);
  return text.length;
}
