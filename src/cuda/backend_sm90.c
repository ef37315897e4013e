/* The backend row "sm90": prefill on Hopper's tensor cores and copy engine (kernels/sm90). */
#include <stdatomic.h>
#include <stddef.h>

#include "cuda/backend.h"
#include "cuda/kernels/sm90/params.h"
#include "cuda/module.h"
#include "run/backend.h"

/* Machine code of sm_90a runs on 9.0 and on nothing else. */
static const fkda_cuda_capabilities capabilities = {90, 90};

/* ---- the kernels ------------------------------------------------------------------------------------ */

#define IMAGE "sm90/prefill"
#define KERNEL(K, part, gate_dtype, bounded, suffix)                                               \
  {IMAGE, "fkda_sm90_prefill_k" #K "_v" #part #suffix},
#define SHAPE(K, part, gate_dtype, bounded, suffix) {K, part, gate_dtype, bounded},

static const fkda_cuda_kernel table[] = {FKDA_SM90_PREFILL_LIST(KERNEL)};
static const struct {
  int32_t K, part, gate_dtype, bounded;
} shapes[] = {FKDA_SM90_PREFILL_LIST(SHAPE)};

#define KERNELS ((int32_t)(sizeof table / sizeof table[0]))

static int32_t shared_of(const fkda_cuda_device *device, int32_t kernel) {
  (void)device, (void)kernel;
  return FKDA_SM90_PREFILL_SHARED;
}

static fkda_cuda_kernels kernels = {.kernels = table, .count = KERNELS, .shared = shared_of};

/* supports() and plan() let nothing come here that has no kernel. */
static int32_t kernel_of(const fkda_problem *p, int64_t part) {
  const bool bounded = p->gate == FKDA_GATE_BOUNDED;
  int32_t i = 0;
  while (shapes[i].K != p->K || shapes[i].part != part || shapes[i].gate_dtype != p->g.dtype ||
         shapes[i].bounded != bounded)
    ++i;
  return i;
}

/* ---- what can run where? ---------------------------------------------------------------------------- */

static bool on_device(const fkda_backend *self, int32_t device_id, char *reason, size_t capacity) {
  (void)self;
  return fkda_cuda_on_device(&capabilities, device_id, reason, capacity);
}

static bool available(const fkda_backend *self, char *reason, size_t capacity) {
  (void)self;
  if (!fkda_cuda_available(&capabilities, reason, capacity)) return false;
  if (!fkda_cuda_image_of(IMAGE))
    return fkda_refuse(reason, capacity,
                       "this build has no kernels for compute capability 9.0 "
                       "(FLASHKDA_CUDA_ARCHITECTURES)");
  if (!fkda_cuda_driver_get(NULL, 0)->api.tensor_map_encode_tiled)
    return fkda_refuse(reason, capacity,
                       "the NVIDIA driver is too old: it has no cuTensorMapEncodeTiled");
  return true;
}

/* A head's value columns do not depend on one another, so that a block may own a part of them; results
 * are the same to the bit. Both parts repeat the factors (8)-(9), which pays while there are processors
 * left over. */
static int32_t split_of(const fkda_problem *p) {
  return p->V == 128 && 2 * p->N * p->HV <= FKDA_CUDA_PROCESSORS ? 2 : 1;
}

/* More tasks than that, but is one of the sequences perhaps so long that its tasks outlast all others, while processors
 * are left over after all? Lengths are known on the device only. */
static bool by_lengths(const fkda_problem *p) {
  return p->V == 128 && split_of(p) == 1 && p->cu_seqlens.data && p->N <= FKDA_SM90_MAX_SORTED &&
         2 * p->HV <= FKDA_CUDA_PROCESSORS;
}

/* Coordinates of tokens are 32 bits wide, also those of the rows that a last box has too many. */
#define MAX_TOKENS (INT32_MAX - FKDA_SM90_CHUNK)
#define COPY_UNIT 16                  /* bytes: the copy engine's alignment */
#define MAX_STRIDE (INT64_C(1) << 40) /* bytes, of a tensor map */
#define MAX_EXTENT (INT64_C(1) << 32)

typedef struct extents {
  int64_t of[3], bytes[3]; /* T, heads, B, and the strides of each in bytes */
} extents;

static extents extents_of(const fkda_problem *p, const fkda_rows *x, int64_t heads) {
  const int64_t size = (int64_t)fkda_dtype_size(x->dtype);
  return (extents){{p->T, heads, p->B},
                   {x->stride_t * size, x->stride_h * size, x->stride_b * size}};
}

/* Where there is no token there is nothing to map. */
static bool is_empty(const fkda_problem *p) { return p->T == 0 || p->B == 0; }

/* Can a tensor map say where x lies? */
static bool can_be_mapped(const fkda_problem *p, const char *name, const fkda_rows *x,
                          int64_t heads, char *reason, size_t capacity) {
  static const char *const dimensions[] = {"T", "heads", "B"};
  if ((uintptr_t)x->data % COPY_UNIT)
    return fkda_refuse(reason, capacity, "%s: data %p, expected a multiple of %d", name, x->data,
                       COPY_UNIT);
  const extents e = extents_of(p, x, heads);
  for (int i = 0; i < 3; ++i) {
    if (e.of[i] <= 1) continue;
    if (e.of[i] >= MAX_EXTENT)
      return fkda_refuse(reason, capacity, "%s: %s = %lld, expected less than 2^32", name,
                         dimensions[i], (long long)e.of[i]);
    if (e.bytes[i] < COPY_UNIT || e.bytes[i] % COPY_UNIT || e.bytes[i] >= MAX_STRIDE)
      return fkda_refuse(
          reason, capacity,
          "%s: stride of %s is %lld bytes, expected a multiple of %d, less than 2^40", name,
          dimensions[i], (long long)e.bytes[i], COPY_UNIT);
  }
  return true;
}

static bool supports(const fkda_backend *self, const fkda_problem *p, char *reason,
                     size_t capacity) {
  (void)self;
  if (p->op != FKDA_OP_PREFILL)
    return fkda_refuse(reason, capacity, "has kernels for prefill only");
  if (!fkda_cuda_supports(p, p->N * p->HV * split_of(p), reason, capacity)) return false;
  if (p->T > MAX_TOKENS)
    return fkda_refuse(reason, capacity, "T = %lld, expected at most %lld", (long long)p->T,
                       (long long)MAX_TOKENS);
  if (is_empty(p)) return true;
  return can_be_mapped(p, "q", &p->q, p->H, reason, capacity) &&
         can_be_mapped(p, "k", &p->k, p->H, reason, capacity) &&
         can_be_mapped(p, "v", &p->v, p->HV, reason, capacity) &&
         can_be_mapped(p, "g", &p->g, p->HV, reason, capacity) &&
         can_be_mapped(p, "out", &p->out, p->HV, reason, capacity);
}

/* ---- planning --------------------------------------------------------------------------------------- */

static void plan(const fkda_backend *self, const fkda_problem *p, fkda_plan_t *plan) {
  (void)self;
  plan->chunk = FKDA_SM90_CHUNK;
  plan->value_split = split_of(p);
  plan->tasks = p->N * p->HV * plan->value_split;
  plan->threads = /* blocks, each of which does tasks in turn: on a full Hopper */
      (int32_t)(plan->tasks < FKDA_CUDA_PROCESSORS ? plan->tasks : FKDA_CUDA_PROCESSORS);
  plan->workspace_size = 0;
}

/* ---- running ---------------------------------------------------------------------------------------- */

static fkda_status make_map(const fkda_cuda_driver *driver, const fkda_problem *p,
                            const fkda_rows *x, int64_t heads, int64_t dim, fkda_tensor_map *map) {
  const extents e = extents_of(p, x, heads);
  uint64_t sizes[4] = {(uint64_t)dim}, strides[3];
  for (int i = 0; i < 3; ++i) {
    sizes[i + 1] = (uint64_t)e.of[i];
    strides[i] = e.of[i] > 1 ? (uint64_t)e.bytes[i] : COPY_UNIT; /* of one element: never used */
  }
  const uint32_t box[4] = {FKDA_SM90_BOX_BYTES / (uint32_t)fkda_dtype_size(x->dtype),
                           FKDA_SM90_CHUNK, 1, 1};
  const uint32_t every[4] = {1, 1, 1, 1};
  const int result = driver->api.tensor_map_encode_tiled(
      map, x->dtype == FKDA_F32 ? FKDA_CU_TENSOR_MAP_FLOAT32 : FKDA_CU_TENSOR_MAP_BFLOAT16, 4,
      x->data, sizes, strides, box, every, FKDA_CU_TENSOR_MAP_INTERLEAVE_NONE,
      FKDA_CU_TENSOR_MAP_SWIZZLE_128B, FKDA_CU_TENSOR_MAP_L2_PROMOTION_256B,
      FKDA_CU_TENSOR_MAP_OOB_FILL_NONE);
  return result ? fkda_cuda_fail(driver, result, "cuTensorMapEncodeTiled") : FKDA_OK;
}

static fkda_status make_maps(const fkda_cuda_driver *driver, void *of) {
  fkda_sm90_params *params = of;
  const fkda_problem *p = &params->problem;
  const struct {
    const fkda_rows *rows;
    int64_t heads, dim;
    fkda_tensor_map *map;
  } tensors[] = {{&p->q, p->H, p->K, &params->q},
                 {&p->k, p->H, p->K, &params->k},
                 {&p->g, p->HV, p->K, &params->g},
                 {&p->v, p->HV, p->V, &params->v},
                 {&p->out, p->HV, p->V, &params->out}};
  fkda_status status = FKDA_OK;
  for (size_t i = 0; !is_empty(p) && i < sizeof tensors / sizeof tensors[0] && !status; ++i)
    status = make_map(driver, p, tensors[i].rows, tensors[i].heads, tensors[i].dim, tensors[i].map);
  return status;
}

/* The second of two launches, from what the first has before it. */
static fkda_status halve(const fkda_cuda_driver *driver, void *of) {
  (void)driver;
  fkda_sm90_params *params = of;
  *params = params[-1];
  params->value_split = 2;
  return FKDA_OK;
}

static fkda_status launch(const fkda_backend *self, const fkda_problem *p,
                          const fkda_plan_t *plan) {
  (void)self;
  if (plan->tasks == 0) return FKDA_OK; /* no sequence: nothing to write */
  char reason[FKDA_REASON_CAPACITY];
  const fkda_cuda_driver *driver = fkda_cuda_driver_get(reason, sizeof reason);
  if (!driver) return fkda_fail(FKDA_ERROR_NO_DEVICE, "%s", reason);

  const int32_t processors = driver->devices[p->device_id].processors; /* a block fills one */
  fkda_sm90_params params[2] = {{.problem = *p,
                                 .value_split = plan->value_split,
                                 .by_lengths = by_lengths(p) ? processors : 0}};
  fkda_cuda_launch launches[2];
  const int32_t count = params[0].by_lengths ? 2 : 1;
  for (int32_t i = 0; i < count; ++i) {
    const int64_t split = plan->value_split << i, tasks = plan->tasks << i;
    launches[i] = (fkda_cuda_launch){
        .kernels = &kernels,
        .kernel = kernel_of(p, p->V / split),
        .blocks = (uint32_t)(tasks < processors ? tasks : processors),
        .threads = FKDA_SM90_PREFILL_THREADS,
        .params = &params[i],
        .prepare = i ? halve : make_maps,
    };
  }
  return fkda_cuda_launch_all(driver, p->device_id, p->stream, launches, count);
}

static fkda_status warmup(const fkda_backend *self, int32_t device_id) {
  (void)self;
  return fkda_cuda_warmup(&capabilities, &kernels, device_id);
}

const fkda_backend fkda_backend_cuda_sm90 = {
    .name = "sm90",
    .device_type = FKDA_DEVICE_CUDA,
    .available = available,
    .on_device = on_device,
    .supports = supports,
    .plan = plan,
    .launch = launch,
    .warmup = warmup,
};
