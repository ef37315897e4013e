/* libFuzzer target: the .safetensors reader on any bytes. What it accepts must be safe to read in full.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "safetensors.h"

static volatile unsigned char sink; /* what reading leaves behind */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  char error[128] = "";
  fkda_st *file = NULL;
  if (fkda_st_open_memory(data, size, &file, error, sizeof error)) {
    if (file || !error[0] || strlen(error) >= sizeof error) abort();
    return 0;
  }
  for (size_t i = 0; i < fkda_st_count(file); i++) {
    const char *name = fkda_st_name(file, i);
    fkda_tensor tensor;
    if (!fkda_st_has(file, name) || !fkda_st_dtype(file, i)) abort();
    if (!fkda_st_find(file, name, &tensor)) continue;
    size_t bytes = fkda_dtype_size(tensor.dtype);
    if (tensor.ndim < 1 || tensor.ndim > FKDA_MAX_DIMS || bytes == 0) abort();
    if ((uintptr_t)tensor.data % bytes) abort();
    for (int32_t d = 0; d < tensor.ndim; d++) {
      if (tensor.shape[d] < 0) abort();
      bytes = tensor.shape[d] == 0 ? 0 : bytes * (size_t)tensor.shape[d];
      if (bytes == 0) break;
    }
    if (bytes > size) abort(); /* a view may not be larger than the file */
    for (size_t j = 0; j < bytes; j++) sink = sink ^ ((const unsigned char *)tensor.data)[j];
  }
  const char *key, *value;
  for (size_t i = 0; (key = fkda_st_metadata_at(file, i, &value)) != NULL; i++) {
    if (fkda_st_metadata(file, key) != value) abort();
    sink = sink ^ (unsigned char)strlen(value);
  }
  fkda_st_close(file);
  return 0;
}
