/* Does memory that a call writes meet other memory of the call?
 *
 * Byte ranges that are apart settle nearly every pair. What remains are slices of one fused buffer, whose
 * ranges interleave: those are compared exactly, dimension by dimension, on strides and extents alone. */
#include "check/checker.h"

/* Dimensions of more than one element from the largest stride to the smallest, in bytes; `block` is
 * what lies contiguous below them. */
typedef struct lattice {
  int32_t ndim;
  int64_t count[FKDA_MAX_DIMS], step[FKDA_MAX_DIMS];
  int64_t block;
} lattice;

static lattice lattice_of(const fkda_region *region) {
  lattice a = {.ndim = 0, .block = (int64_t)(region->end - region->begin)};
  const fkda_tensor *t = region->tensor;
  if (!t) return a;
  const int64_t size = (int64_t)fkda_dtype_size(t->dtype);
  for (int32_t i = 0; i < t->ndim; ++i) {
    if (t->shape[i] <= 1 || t->stride[i] == 0)
      continue; /* stride 0 (inputs): the same bytes again */
    int32_t at = a.ndim++;
    for (; at > 0 && a.step[at - 1] < t->stride[i] * size; --at) {
      a.step[at] = a.step[at - 1];
      a.count[at] = a.count[at - 1];
    }
    a.step[at] = t->stride[i] * size;
    a.count[at] = t->shape[i];
  }
  for (a.block = size; a.ndim > 0 && a.step[a.ndim - 1] == a.block; --a.ndim)
    a.block *= a.count[a.ndim - 1];
  return a;
}

/* Bytes from the first to the end of the last element of dimensions first .. ndim-1. */
static int64_t extent_from(const lattice *a, int32_t first) {
  int64_t extent = a->block;
  for (int32_t i = first; i < a->ndim; ++i) extent += (a->count[i] - 1) * a->step[i];
  return extent;
}

/* Positions of b relative to a that are tried before the answer is "they may meet". Slices of one
 * buffer need one or two; only tensors that overlap themselves need many. */
#define MAX_OFFSETS 8

/* Do dimensions ia.. of a, at byte 0, and ib.. of b, at byte `offset`, share a byte? */
static bool meet(const lattice *a, int32_t ia, const lattice *b, int32_t ib, int64_t offset) {
  const int64_t extent_a = extent_from(a, ia), extent_b = extent_from(b, ib);
  if (offset >= extent_a || offset <= -extent_b) return false;

  /* Peel off the largest step from whichever has it: copies i of a and j of b lie m = j - i steps apart,
   * and only those m matter for which the inner extents still meet. */
  const int64_t step_a = ia < a->ndim ? a->step[ia] : 0, step_b = ib < b->ndim ? b->step[ib] : 0;
  const int64_t step = step_a > step_b ? step_a : step_b;
  if (step == 0) return true; /* two blocks are left */
  const int64_t count_a = step_a == step ? a->count[ia] : 1;
  const int64_t count_b = step_b == step ? b->count[ib] : 1;
  const int32_t next_a = ia + (step_a == step), next_b = ib + (step_b == step);
  const int64_t inner_a = extent_from(a, next_a), inner_b = extent_from(b, next_b);
  /* -inner_b < offset + m*step < inner_a. No overflow: see FKDA_MAX_EXTENT. */
  int64_t low = (-inner_b - offset) / step - 1, high = (inner_a - offset) / step + 1;
  if (low < -(count_a - 1)) low = -(count_a - 1);
  if (high > count_b - 1) high = count_b - 1;
  int32_t tried = 0;
  for (int64_t m = low; m <= high; ++m) {
    const int64_t inner_offset = offset + m * step;
    if (inner_offset <= -inner_b || inner_offset >= inner_a) continue;
    if (++tried > MAX_OFFSETS || meet(a, next_a, b, next_b, inner_offset)) return true;
  }
  return false;
}

static bool regions_meet(const fkda_region *a, const fkda_region *b) {
  if (a->end <= b->begin || b->end <= a->begin) return false;
  const lattice la = lattice_of(a), lb = lattice_of(b);
  return meet(&la, 0, &lb, 0, (int64_t)(b->begin - a->begin));
}

/* The same elements under the same indices; only the number of slots may differ. */
static bool same_view(const fkda_tensor *a, const fkda_tensor *b) {
  if (a->data != b->data || a->dtype != b->dtype || a->ndim != b->ndim) return false;
  for (int32_t i = 0; i < a->ndim; ++i) {
    if (i > 0 && a->shape[i] != b->shape[i]) return false;
    if (a->shape[i] > 1 && b->shape[i] > 1 && a->stride[i] != b->stride[i]) return false;
  }
  return true;
}

fkda_status fkda_check_overlap(const fkda_checker *checker) {
  for (int32_t i = 0; i < checker->regions; ++i) {
    const fkda_region *written = &checker->region[i];
    if (!written->written) continue;
    for (int32_t j = 0; j < checker->regions; ++j) {
      const fkda_region *other = &checker->region[j];
      if (j == i || (other->written && j > i) || !regions_meet(written, other)) continue;
      const bool states = written->state && other->state;
      if (states && same_view(written->tensor, other->tensor)) continue;
      return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT, "%s: overlaps %s, expected memory of its own%s",
                       written->name, other->name, states ? " or the same view" : "");
    }
  }
  return FKDA_OK;
}

fkda_status fkda_check_self_overlap(const char *name, const fkda_tensor *tensor) {
  const fkda_region region = {.tensor = tensor};
  lattice a = lattice_of(&region);
  bool apart = true;
  for (int32_t i = 0; i < tensor->ndim; ++i)
    apart &= tensor->shape[i] <= 1 || tensor->stride[i] != 0;
  /* each step clears everything inside it */
  for (int32_t i = 0; i < a.ndim; ++i) apart &= a.step[i] >= extent_from(&a, i + 1);
  if (apart) return FKDA_OK;
  return fkda_fail(FKDA_ERROR_INVALID_ARGUMENT,
                   "%s: strides make its elements overlap, expected memory of its own for each",
                   name);
}
