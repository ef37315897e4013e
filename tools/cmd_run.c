/* flashkda run: inputs from a .safetensors file to outputs in another.
 *
 * SPDX-License-Identifier: MIT
 */
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "safetensors.h"

static const char help[] =
    "Usage: flashkda run IN.safetensors [OPTION...]\n\n"
    "Runs prefill, decode or summary on the tensors of a file. Tensors have the names of the C "
    "fields\n"
    "(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, ...); what may be absent in C "
    "may be\n"
    "absent in the file. Options come from the file's metadata, or from here:\n\n"
    "  --op prefill|decode|summary      default prefill\n"
    "  --gate bounded|softplus|direct   --l2norm 0|1          --beta-is-logit 0|1\n"
    "  --allow-neg-eigval 0|1           --lower-bound X       --scale X\n"
    "  --state-layout vk|kv             --write-state 0|1     --batch-invariant 0|1\n"
    "  --checkpoint-every N             --checkpoint-before 0|1\n"
    "  --checkpoint-dtype TYPE          of checkpoint_state, if the file has none (float32)\n"
    "  --final-state-dtype TYPE|none    of final_state, if the file has none (float32)\n"
    "  --in-place 0|1                   final_state is initial_state\n\n"
    "An output that the file holds (a state pool, say) is the memory written to; others are "
    "allocated.\n\n"
    "  -o, --output FILE   write out, final_state, checkpoint_state, state, M, b to a .safetensors "
    "file\n"
    "  --backend NAME      one of \"flashkda info\"; default: the best\n"
    "  --threads N         CPU threads\n"
    "  --repeat R          time R runs and print the median (1)\n"
    "  --check             compare with the reference in double precision; exit status 1 if the "
    "error is\n"
    "                      over 2e-5 (float32), 1e-3 (float16) or 2.5e-3 (bfloat16)\n"
    "  --json              print one JSON object";

typedef struct output {
  void *before, *data; /* contents before and after; NULL where the call has no such output */
  size_t bytes;
  double error; /* against gold; negative: not compared */
} output;

typedef struct job {
  const char *input, *output, *backend;
  int64_t threads, repeat;
  bool check, json;
  fkda_st *file;
  fkda_call call;
  int32_t final_dtype, checkpoint_dtype;
  bool in_place;
  output outputs[FKDA_FIELDS];
  double seconds;
  bool passed;
} job;

/* Values from --op and the option flags, in the metadata's form. */
typedef struct setting {
  const char *name, *value;
} setting;

enum { MAX_SETTINGS = 32 };

/* ---- from file to call -------------------------------------------------------------------------- */

static const char *lookup(const job *j, const setting *settings, int count, const char *name) {
  for (int i = count - 1; i >= 0; i--) {
    if (strcmp(settings[i].name, name) == 0) return settings[i].value;
  }
  return fkda_st_metadata(j->file, name);
}

static bool apply_options(job *j, const setting *settings, int count) {
  char error[160], name[32];
  const char *op = lookup(j, settings, count, "op");
  const int32_t number = op ? fkda_op_of(op) : FKDA_OP_PREFILL;
  if (!number || !fkda_call_init(&j->call, number)) {
    fkda_cli_error("op: \"%.40s\", expected prefill, decode, summary or backward", op);
    return false;
  }
  const char *option;
  for (int i = 0; (option = fkda_call_option(&j->call, i, name, sizeof name)) != NULL; i++) {
    const char *value = lookup(j, settings, count, option);
    if (!value) continue;
    if (!fkda_call_set(&j->call, option, value, error, sizeof error)) {
      fkda_cli_error("%s", error);
      return false;
    }
  }
  const char *final = lookup(j, settings, count, "final_state_dtype");
  const char *checkpoint = lookup(j, settings, count, "checkpoint_dtype");
  const char *in_place = lookup(j, settings, count, "in_place");
  j->final_dtype = final ? fkda_cli_dtype(final) : FKDA_F32;
  j->checkpoint_dtype = checkpoint ? fkda_cli_dtype(checkpoint) : FKDA_F32;
  j->in_place = in_place && (!strcmp(in_place, "1") || !strcmp(in_place, "true"));
  if (final && !j->final_dtype && strcmp(final, "none") != 0) {
    fkda_cli_error("final_state_dtype: \"%.40s\", expected float32, bfloat16 or none", final);
    return false;
  }
  if (!j->checkpoint_dtype) {
    fkda_cli_error("checkpoint_dtype: \"%.40s\", expected float32, bfloat16 or float16",
                   checkpoint);
    return false;
  }
  return true;
}

/* Every tensor of the file to its field. "gold.*" is for tests and passed over. */
static bool bind_tensors(job *j) {
  const char *name;
  for (size_t i = 0; (name = fkda_st_name(j->file, i)) != NULL; i++) {
    const fkda_field field = fkda_field_of(name);
    if (strncmp(name, "gold.", 5) == 0) continue;
    fkda_tensor *tensor = field < FKDA_FIELDS ? fkda_call_tensor(&j->call, field) : NULL;
    if (!tensor) {
      fkda_cli_error("%s: tensor \"%.60s\" is none of %s's", j->input, name,
                     fkda_op_name(j->call.header.op));
      return false;
    }
    if (!fkda_st_find(j->file, name, tensor)) {
      fkda_cli_error("%s: %s: dtype %s or rank not supported", j->input, name,
                     fkda_st_dtype(j->file, i));
      return false;
    }
  }
  return true;
}

/* ---- outputs ------------------------------------------------------------------------------------ */

static bool elements_fit(const fkda_tensor *tensor, size_t *bytes) {
  size_t total = fkda_dtype_size(tensor->dtype);
  for (int32_t d = 0; d < tensor->ndim; d++) {
    if (tensor->shape[d] < 0 || __builtin_mul_overflow(total, (size_t)tensor->shape[d], &total))
      return false;
  }
  *bytes = total;
  return total < (size_t)1 << 46;
}

/* Memory for an output; contents from the file if it holds the tensor, else zero. */
static bool own_output(job *j, fkda_field field, fkda_tensor tensor) {
  output *o = &j->outputs[field];
  const fkda_tensor *given = fkda_call_tensor_const(&j->call, field);
  if (given->dtype) tensor = *given;
  bool good = elements_fit(&tensor, &o->bytes);
  const size_t room = (o->bytes + 63) / 64 * 64 + 64;
  if (good) {
    o->before = aligned_alloc(64, room);
    o->data = aligned_alloc(64, room);
    good = o->before && o->data;
  }
  if (!good) {
    fkda_cli_error("out of memory for %s", fkda_field_name(field));
    return false;
  }
  if (given->dtype && o->bytes) {
    memcpy(o->before, given->data, o->bytes);
  } else {
    memset(o->before, 0, o->bytes);
  }
  tensor.data = o->data;
  *fkda_call_tensor(&j->call, field) = tensor;
  return true;
}

static int64_t sequences(const fkda_call *call) {
  const fkda_tensor *cu = fkda_call_tensor_const(call, FKDA_FIELD_cu_seqlens);
  if (cu && cu->dtype) return cu->shape[0] > 0 ? cu->shape[0] - 1 : 0;
  return fkda_call_tensor_const(call, FKDA_FIELD_k)->shape[0];
}

static bool is_integer(const fkda_tensor *tensor) {
  return tensor && (tensor->dtype == FKDA_I32 || tensor->dtype == FKDA_I64);
}

/* Slots that an index tensor asks for. */
static int64_t slots_of(const fkda_tensor *indices) {
  int64_t most = 0;
  for (int64_t i = 0; is_integer(indices) && i < fkda_tensor_elements(indices); i++) {
    const double slot = fkda_load(indices->data, indices->dtype, i);
    if (slot >= (double)most && slot < 1e15) most = (int64_t)slot + 1;
  }
  return most;
}

static fkda_tensor states(const fkda_call *call, int32_t dtype, int64_t slots) {
  const fkda_tensor *k = fkda_call_tensor_const(call, FKDA_FIELD_k);
  const fkda_tensor *v = fkda_call_tensor_const(call, FKDA_FIELD_v);
  const bool vk = fkda_call_layout(call) == FKDA_STATE_VK;
  const int64_t shape[4] = {slots, v->shape[2], vk ? v->shape[3] : k->shape[3],
                            vk ? k->shape[3] : v->shape[3]};
  return fkda_tensor_contiguous(NULL, dtype, 4, shape);
}

/* Rows of checkpoint_state; -1 if it cannot be told. */
static int64_t checkpoint_rows(const fkda_prefill_args *p) {
  const bool listed = p->checkpoint_offsets.dtype != FKDA_NONE;
  if (p->checkpoint_state_indices.dtype) return slots_of(&p->checkpoint_state_indices);
  if (listed) return fkda_tensor_elements(&p->checkpoint_offsets);
  if (p->checkpoint_every <= 0) return -1;
  int64_t rows = 0;
  if (!p->cu_seqlens.dtype) {
    const int64_t each =
        p->k.shape[1] / p->checkpoint_every + (p->k.shape[1] % p->checkpoint_every != 0);
    return __builtin_mul_overflow(p->k.shape[0], each, &rows) ? -1 : rows;
  }
  for (int64_t n = 0; is_integer(&p->cu_seqlens) && n + 1 < p->cu_seqlens.shape[0]; n++) {
    const double length = fkda_load(p->cu_seqlens.data, p->cu_seqlens.dtype, n + 1) -
                          fkda_load(p->cu_seqlens.data, p->cu_seqlens.dtype, n);
    if (!(length >= 0 && length <= (double)p->k.shape[1]))
      return -1; /* the call will say what is wrong */
    rows += (int64_t)ceil(length / (double)p->checkpoint_every);
    if (rows > p->k.shape[1] + p->cu_seqlens.shape[0]) return -1;
  }
  return rows;
}

static bool prefill_outputs(job *j) {
  fkda_prefill_args *p = &j->call.prefill;
  const int64_t N = sequences(&j->call);
  if (j->in_place) {
    if (p->final_state.dtype || !p->initial_state.dtype) {
      return fkda_cli_error("in_place: needs initial_state and no final_state"), false;
    }
    p->final_state = p->initial_state;
    if (!own_output(j, FKDA_FIELD_final_state, p->final_state)) return false;
    p->initial_state = p->final_state;
  } else if (p->final_state.dtype || j->final_dtype) {
    int64_t slots = N;
    if (p->final_state_indices.dtype) {
      slots = slots_of(&p->final_state_indices);
      if (p->initial_state.dtype && p->initial_state.shape[0] > slots)
        slots = p->initial_state.shape[0];
    }
    if (!own_output(j, FKDA_FIELD_final_state, states(&j->call, j->final_dtype, slots)))
      return false;
  }
  const bool wanted =
      p->checkpoint_state.dtype || p->checkpoint_offsets.dtype || p->checkpoint_every;
  if (!wanted) return true;
  const int64_t rows = checkpoint_rows(p);
  if (rows < 0 && !p->checkpoint_state.dtype) return true;
  fkda_tensor tensor = states(&j->call, j->checkpoint_dtype, rows < 0 ? 0 : rows);
  if (p->checkpoint_offsets.ndim == 2 && !p->checkpoint_state_indices.dtype) { /* [N,C,...] */
    const int64_t shape[5] = {p->checkpoint_offsets.shape[0], p->checkpoint_offsets.shape[1],
                              tensor.shape[1], tensor.shape[2], tensor.shape[3]};
    tensor = fkda_tensor_contiguous(NULL, j->checkpoint_dtype, 5, shape);
  }
  return own_output(j, FKDA_FIELD_checkpoint_state, tensor);
}

/* Every gradient, of the dtype of what it belongs to; d_A_log and d_dt_bias are f32. */
static bool backward_outputs(job *j) {
  static const struct {
    fkda_field input, gradient;
  } rows[] = {{FKDA_FIELD_q, FKDA_FIELD_d_q},
              {FKDA_FIELD_k, FKDA_FIELD_d_k},
              {FKDA_FIELD_v, FKDA_FIELD_d_v},
              {FKDA_FIELD_g, FKDA_FIELD_d_g},
              {FKDA_FIELD_beta, FKDA_FIELD_d_beta}};
  fkda_call *call = &j->call;
  for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
    const fkda_tensor *input = fkda_call_tensor_const(call, rows[i].input);
    if (!own_output(j, rows[i].gradient,
                    fkda_tensor_contiguous(NULL, input->dtype, input->ndim, input->shape)))
      return false;
  }
  const int64_t shape[2] = {call->backward.v.shape[2], call->backward.k.shape[3]};
  const int32_t initial = call->backward.initial_state.dtype;
  return (call->backward.gate == FKDA_GATE_DIRECT ||
          (own_output(j, FKDA_FIELD_d_A_log, fkda_tensor_contiguous(NULL, FKDA_F32, 1, shape)) &&
           own_output(j, FKDA_FIELD_d_dt_bias,
                      fkda_tensor_contiguous(NULL, FKDA_F32, 2, shape)))) &&
         own_output(j, FKDA_FIELD_d_initial_state,
                    states(call, initial ? initial : FKDA_F32, sequences(call)));
}

static bool make_outputs(job *j) {
  fkda_call *call = &j->call;
  static const fkda_field needed[] = {FKDA_FIELD_k, FKDA_FIELD_v};
  for (int i = 0; i < 2; i++) {
    const fkda_tensor *tensor = fkda_call_tensor_const(call, needed[i]);
    if (tensor->ndim != 4) {
      fkda_cli_error("%s: %s", fkda_field_name(needed[i]),
                     tensor->dtype ? "expected four dimensions" : "missing from the file");
      return false;
    }
  }
  const fkda_tensor *v = fkda_call_tensor_const(call, FKDA_FIELD_v);
  const int64_t N = sequences(call), K = fkda_call_tensor_const(call, FKDA_FIELD_k)->shape[3];
  if (call->header.op == FKDA_OP_SUMMARY) {
    const int64_t shape[4] = {N, v->shape[2], K, K};
    return own_output(j, FKDA_FIELD_M, fkda_tensor_contiguous(NULL, FKDA_F32, 4, shape)) &&
           own_output(j, FKDA_FIELD_b, states(call, FKDA_F32, N));
  }
  if (call->header.op == FKDA_OP_BACKWARD) return backward_outputs(j);
  if (!own_output(j, FKDA_FIELD_out, fkda_tensor_contiguous(NULL, v->dtype, 4, v->shape)))
    return false;
  if (call->header.op == FKDA_OP_PREFILL) return prefill_outputs(j);
  if (!call->decode.state.dtype && call->decode.initial_state.dtype && !call->decode.write_state)
    return true;
  if (call->decode.state.dtype) return own_output(j, FKDA_FIELD_state, call->decode.state);
  fkda_cli_error("state: missing from the file");
  return false;
}

/* ---- running ------------------------------------------------------------------------------------ */

static void reset_outputs(job *j) {
  for (int i = 0; i < FKDA_FIELDS; i++) {
    if (j->outputs[i].data) memcpy(j->outputs[i].data, j->outputs[i].before, j->outputs[i].bytes);
  }
}

static bool run_repeated(job *j) {
  double *times = malloc((size_t)j->repeat * sizeof *times);
  size_t size = 0;
  if (fkda_workspace_size(&j->call, &size) != FKDA_OK) {
    free(times);
    return fkda_cli_error("%s", fkda_last_error()), false;
  }
  void *workspace = aligned_alloc(64, (size + 63) / 64 * 64 + 64);
  if (!workspace || !times) {
    free(workspace);
    free(times);
    return fkda_cli_error("out of memory for %zu bytes of workspace", size), false;
  }
  j->call.header.workspace = workspace;
  j->call.header.workspace_size = size;
  fkda_status status = FKDA_OK;
  fkda_warmup(FKDA_DEVICE_CPU, 0); /* threads start outside of the timing; a failure shows below */
  if (j->repeat > 1) {
    reset_outputs(j);
    status = fkda_call_run(&j->call);
  }
  for (int64_t i = 0; i < j->repeat && status == FKDA_OK; i++) {
    fkda_cli_progress("run %" PRId64 " of %" PRId64, i + 1, j->repeat);
    reset_outputs(j);
    const double start = fkda_cli_now();
    status = fkda_call_run(&j->call);
    times[i] = fkda_cli_now() - start;
  }
  fkda_cli_progress("%s", "");
  if (status == FKDA_OK) j->seconds = fkda_cli_median(times, (int)j->repeat);
  free(workspace);
  free(times);
  j->call.header.workspace = NULL;
  j->call.header.workspace_size = 0;
  return status == FKDA_OK || (fkda_cli_error("%s", fkda_last_error()), false);
}

/* ---- --check ------------------------------------------------------------------------------------ */

/* RMS(x - gold) / RMS(gold) over what the call changed or gold says it changes. */
static void compare(output *o, const fkda_tensor *tensor, const double *gold) {
  double difference = 0, power = 0;
  const int64_t count = fkda_tensor_elements(tensor);
  for (int64_t i = 0; i < count; i++) {
    const double before = fkda_load(o->before, tensor->dtype, i);
    const double x = fkda_load(tensor->data, tensor->dtype, i);
    const bool same_x = x == before || (isnan(x) && isnan(before));
    const bool same_gold = gold[i] == before || (isnan(gold[i]) && isnan(before));
    if (same_x && same_gold) continue;
    if (isfinite(x) != isfinite(gold[i])) {
      o->error = (double)INFINITY;
      return;
    }
    if (!isfinite(x)) continue;
    difference += (x - gold[i]) * (x - gold[i]);
    power += gold[i] * gold[i];
  }
  o->error = sqrt(power > 0 ? difference / power : difference);
}

static bool check_against_gold(job *j) {
  fkda_call call = j->call;
  double *gold[FKDA_FIELDS] = {NULL};
  bool good = true;
  call.header.backend = "reference";
  for (int i = FKDA_FIRST_OUTPUT; i < FKDA_FIELDS && good; i++) {
    if (!j->outputs[i].data) continue;
    fkda_tensor *tensor = fkda_call_tensor(&call, (fkda_field)i);
    const int64_t count = fkda_tensor_elements(tensor);
    gold[i] = malloc((size_t)(count + 1) * sizeof(double));
    if (!gold[i]) {
      fkda_cli_error("out of memory for the check");
      good = false;
      break;
    }
    for (int64_t e = 0; e < count; e++)
      gold[i][e] = fkda_load(j->outputs[i].before, tensor->dtype, e);
    *tensor = fkda_tensor_contiguous(gold[i], FKDA_F64, tensor->ndim, tensor->shape);
  }
  if (good && j->in_place)
    call.prefill.initial_state.data = j->outputs[FKDA_FIELD_final_state].before;
  fkda_cli_progress("checking against the double-precision reference");
  if (good && fkda_call_run(&call) != FKDA_OK) {
    fkda_cli_error("check: %s", fkda_last_error());
    good = false;
  }
  fkda_cli_progress("%s", "");
  const fkda_tensor *v = fkda_call_tensor_const(&j->call, FKDA_FIELD_v);
  j->passed = good;
  for (int i = FKDA_FIRST_OUTPUT; i < FKDA_FIELDS; i++) {
    if (good && gold[i]) {
      const fkda_tensor *tensor = fkda_call_tensor_const(&j->call, (fkda_field)i);
      compare(&j->outputs[i], tensor, gold[i]);
      if (!(j->outputs[i].error <= fkda_tolerance(v->dtype, tensor->dtype))) j->passed = false;
    }
    free(gold[i]);
  }
  return good;
}

/* ---- results ------------------------------------------------------------------------------------ */

static bool write_outputs(const job *j) {
  fkda_st_entry entries[FKDA_FIELDS];
  fkda_st_pair metadata[2] = {{"op", fkda_op_name(j->call.header.op)},
                              {"flashkda_version", fkda_version_string()}};
  size_t count = 0;
  char error[256];
  for (int i = FKDA_FIRST_OUTPUT; i < FKDA_FIELDS; i++) {
    if (!j->outputs[i].data) continue;
    entries[count++] = (fkda_st_entry){fkda_field_name((fkda_field)i),
                                       *fkda_call_tensor_const(&j->call, (fkda_field)i)};
  }
  if (fkda_st_write(j->output, entries, count, metadata, 2, error, sizeof error)) {
    return fkda_cli_error("%s", error), false;
  }
  return true;
}

static void print_json(const job *j, const fkda_plan_info *plan, int64_t tokens) {
  fkda_json out = {.stream = stdout};
  const fkda_call *call = &j->call;
  const fkda_tensor *k = fkda_call_tensor_const(call, FKDA_FIELD_k);
  const fkda_tensor *v = fkda_call_tensor_const(call, FKDA_FIELD_v);
  char value[64];
  const char *name;
  fkda_json_open(&out, NULL, '{');
  fkda_json_text(&out, "op", fkda_op_name(call->header.op));
  fkda_json_int(&out, "B", k->shape[0]);
  fkda_json_int(&out, "T", k->shape[1]);
  fkda_json_int(&out, "N", sequences(call));
  fkda_json_int(&out, "H", k->shape[2]);
  fkda_json_int(&out, "HV", v->shape[2]);
  fkda_json_int(&out, "K", k->shape[3]);
  fkda_json_int(&out, "V", v->shape[3]);
  fkda_json_text(&out, "dtype", fkda_dtype_string(v->dtype));
  fkda_json_open(&out, "options", '{');
  for (int i = 0; (name = fkda_call_option(call, i, value, sizeof value)) != NULL; i++) {
    if (*value) fkda_json_text(&out, name, value);
  }
  fkda_json_close(&out, '}');
  fkda_json_text(&out, "backend", plan->backend);
  fkda_json_int(&out, "threads", plan->threads);
  fkda_json_int(&out, "chunk", plan->chunk);
  fkda_json_int(&out, "tasks", plan->tasks);
  fkda_json_int(&out, "workspace_bytes", (int64_t)plan->workspace_size);
  fkda_json_int(&out, "repeat", j->repeat);
  fkda_json_real(&out, "ms", 1e3 * j->seconds);
  fkda_json_int(&out, "tokens", tokens);
  fkda_json_real(&out, "tokens_per_s", (double)tokens / j->seconds);
  if (j->check) {
    fkda_json_open(&out, "errors", '{');
    for (int i = FKDA_FIRST_OUTPUT; i < FKDA_FIELDS; i++) {
      if (j->outputs[i].data)
        fkda_json_real(&out, fkda_field_name((fkda_field)i), j->outputs[i].error);
    }
    fkda_json_close(&out, '}');
    fkda_json_bool(&out, "passed", j->passed);
  }
  fkda_json_text(&out, "output", j->output);
  fkda_json_close(&out, '}');
}

static void print_text(const job *j, const fkda_plan_info *plan, int64_t tokens) {
  const fkda_call *call = &j->call;
  const fkda_tensor *k = fkda_call_tensor_const(call, FKDA_FIELD_k);
  const fkda_tensor *v = fkda_call_tensor_const(call, FKDA_FIELD_v);
  const fkda_tensor *cu = fkda_call_tensor_const(call, FKDA_FIELD_cu_seqlens);
  printf("%-8s B %" PRId64 ", T %" PRId64 ", N %" PRId64 ", H %" PRId64 ", HV %" PRId64
         ", K %" PRId64 ", V %" PRId64 ", %s\n",
         fkda_op_name(call->header.op), k->shape[0], k->shape[1], sequences(call), k->shape[2],
         v->shape[2], k->shape[3], v->shape[3], fkda_dtype_string(v->dtype));
  if (cu && cu->dtype) {
    printf("lengths ");
    for (int64_t n = 0; n < sequences(call) && n < 12; n++) {
      printf(" %.0f", fkda_load(cu->data, cu->dtype, n + 1) - fkda_load(cu->data, cu->dtype, n));
    }
    puts(sequences(call) > 12 ? " ..." : "");
  }
  printf("backend  %s: %d thread%s, %" PRId64 " tasks, chunks of %d\n", plan->backend,
         (int)plan->threads, plan->threads == 1 ? "" : "s", plan->tasks, (int)plan->chunk);
  printf("time     %.3f ms%s\n", 1e3 * j->seconds, j->repeat > 1 ? " (median)" : "");
  printf("speed    %.0f tokens/s\n", (double)tokens / j->seconds);
  if (j->check) {
    printf("error   ");
    for (int i = FKDA_FIRST_OUTPUT; i < FKDA_FIELDS; i++) {
      if (j->outputs[i].data)
        printf(" %s %.2e", fkda_field_name((fkda_field)i), j->outputs[i].error);
    }
    printf(" against the double-precision reference: %s\n", j->passed ? "ok" : "TOO LARGE");
  }
  if (j->output) printf("wrote    %s\n", j->output);
}

static int run(job *j, const setting *settings, int count) {
  char error[512];
  if (fkda_st_open(j->input, &j->file, error, sizeof error)) return fkda_cli_error("%s", error);
  if (!apply_options(j, settings, count) || !bind_tensors(j) || !make_outputs(j))
    return FKDA_EXIT_FAILED;
  j->call.header.backend = j->backend;
  if (j->threads && fkda_set_num_threads((int32_t)j->threads) != FKDA_OK) {
    return fkda_cli_error("%s", fkda_last_error());
  }
  fkda_plan_info plan = {.struct_size = sizeof plan};
  if (fkda_plan(&j->call, &plan) != FKDA_OK) return fkda_cli_error("%s", fkda_last_error());
  if (!run_repeated(j)) return FKDA_EXIT_FAILED;
  if (j->check && !check_against_gold(j)) return FKDA_EXIT_FAILED;
  if (j->output && !write_outputs(j)) return FKDA_EXIT_FAILED;
  const fkda_tensor *k = fkda_call_tensor_const(&j->call, FKDA_FIELD_k);
  const fkda_tensor *cu = fkda_call_tensor_const(&j->call, FKDA_FIELD_cu_seqlens);
  const int64_t tokens = cu && cu->dtype ? (int64_t)fkda_load(cu->data, cu->dtype, cu->shape[0] - 1)
                                         : k->shape[0] * k->shape[1];
  if (j->json) {
    print_json(j, &plan, tokens);
  } else {
    print_text(j, &plan, tokens);
  }
  return j->check && !j->passed ? FKDA_EXIT_FAILED : FKDA_EXIT_OK;
}

enum { FIRST_SETTING = 256 };

int fkda_cmd_run(int argc, char **argv) {
  /* From FIRST_SETTING on: the metadata key is the flag with '_' for '-'. */
  static const char *const keys[] = {"op",
                                     "gate",
                                     "l2norm",
                                     "beta_is_logit",
                                     "allow_neg_eigval",
                                     "lower_bound",
                                     "scale",
                                     "state_layout",
                                     "write_state",
                                     "batch_invariant",
                                     "checkpoint_every",
                                     "checkpoint_before",
                                     "checkpoint_dtype",
                                     "final_state_dtype",
                                     "in_place"};
  enum { KEYS = sizeof keys / sizeof keys[0] };
  static const struct option plain[] = {
      {"output", required_argument, NULL, 'o'},  {"backend", required_argument, NULL, 'b'},
      {"threads", required_argument, NULL, 't'}, {"repeat", required_argument, NULL, 'r'},
      {"check", no_argument, NULL, 'c'},         {"json", no_argument, NULL, 'j'},
      {"help", no_argument, NULL, 'h'}};
  enum { PLAIN = sizeof plain / sizeof plain[0] };
  struct option options[PLAIN + KEYS + 1] = {{0}};
  char flags[KEYS][32];
  setting settings[MAX_SETTINGS];
  int count = 0, option;
  job j = {.repeat = 1};
  memcpy(options, plain, sizeof plain);
  for (int i = 0; i < KEYS; i++) {
    snprintf(flags[i], sizeof flags[i], "%s", keys[i]);
    for (char *p = flags[i]; *p; p++) *p = *p == '_' ? '-' : *p;
    options[PLAIN + i] = (struct option){flags[i], required_argument, NULL, FIRST_SETTING + i};
  }
  for (int i = 0; i < FKDA_FIELDS; i++) j.outputs[i].error = -1;
  while ((option = getopt_long(argc, argv, "ho:", options, NULL)) != -1) {
    switch (option) {
      case 'h': return puts(help) < 0;
      case 'o': j.output = optarg; break;
      case 'b': j.backend = optarg; break;
      case 'c': j.check = true; break;
      case 'j': j.json = true; break;
      case 't':
        if (!fkda_cli_integer(optarg, 1, 1024, &j.threads)) {
          return fkda_cli_usage("run", "--threads: \"%s\", expected 1 to 1024", optarg);
        }
        break;
      case 'r':
        if (!fkda_cli_integer(optarg, 1, 100000, &j.repeat)) {
          return fkda_cli_usage("run", "--repeat: \"%s\", expected 1 to 100000", optarg);
        }
        break;
      default:
        if (option < FIRST_SETTING) return fkda_cli_usage("run", "wrong usage");
        if (count == MAX_SETTINGS) return fkda_cli_usage("run", "too many options");
        settings[count++] = (setting){keys[option - FIRST_SETTING], optarg};
    }
  }
  if (optind + 1 != argc) return fkda_cli_usage("run", "expected one input file");
  if (j.backend && strcmp(j.backend, "cpu") != 0 && !fkda_cli_backend(j.backend)) {
    return fkda_cli_usage("run", "--backend: no \"%s\" in this build", j.backend);
  }
  j.input = argv[optind];
  const int status = run(&j, settings, count);
  for (int i = 0; i < FKDA_FIELDS; i++) {
    free(j.outputs[i].before);
    free(j.outputs[i].data);
  }
  fkda_st_close(j.file);
  return status;
}
