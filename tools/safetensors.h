/* Reader and writer of .safetensors files.
 *
 * A file is an 8-byte little-endian header length, a JSON object of that length, and the data:
 *
 *   {"__metadata__": {"key": "value", ...},
 *    "name": {"dtype": "F32", "shape": [2,3], "data_offsets": [begin, end]}, ...}
 *
 * The reader trusts nothing: every offset lies inside the file, the tensors cover the data without
 * gap or overlap, every size equals shape times element size, names are unique, nesting and lengths are
 * bounded. A file that breaks a rule is refused with a message that says which.
 *
 * All functions return 0 for success and -1 with a message in `error` otherwise.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef FKDA_TOOLS_SAFETENSORS_H
#define FKDA_TOOLS_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>

#include "flashkda/flashkda.h"

typedef struct fkda_st fkda_st;

/** Reads a file into memory. *out is to be closed with fkda_st_close(). */
int fkda_st_open(const char *path, fkda_st **out, char *error, size_t capacity);
/** The same from `size` bytes at `data`, which are copied. */
int fkda_st_open_memory(const void *data, size_t size, fkda_st **out, char *error, size_t capacity);
void fkda_st_close(fkda_st *file);

/** Number of tensors in the file, in the order of their data. */
size_t fkda_st_count(const fkda_st *file);
/** Name of the index-th tensor; NULL past the end. Lives as long as the file. */
const char *fkda_st_name(const fkda_st *file, size_t index);
/** The file's own word for the index-th tensor's dtype ("F32", "F8_E4M3", ...); NULL past the end. */
const char *fkda_st_dtype(const fkda_st *file, size_t index);
/** Is there a tensor of that name, of whatever dtype and rank? */
bool fkda_st_has(const fkda_st *file, const char *name);
/** A contiguous view of a tensor, valid until the file is closed, aligned to 64 bytes where the file's
 *  offset is and to its element in any case. false if there is none of that name, or if its
 *  dtype has no fkda_dtype, or if its rank is over FKDA_MAX_DIMS. A scalar (rank 0) becomes [1]. */
bool fkda_st_find(const fkda_st *file, const char *name, fkda_tensor *out);

/** Value of a __metadata__ key; NULL if absent. */
const char *fkda_st_metadata(const fkda_st *file, const char *key);
size_t fkda_st_metadata_count(const fkda_st *file);
/** Key of the index-th metadata pair, its value to *value. NULL past the end. */
const char *fkda_st_metadata_at(const fkda_st *file, size_t index, const char **value);

typedef struct fkda_st_entry {
  const char *name;
  fkda_tensor tensor; /* any strides; written contiguously */
} fkda_st_entry;

typedef struct fkda_st_pair {
  const char *key, *value;
} fkda_st_pair;

/** Writes a file. Names must be unique; text is UTF-8. On failure no regular file is left behind. */
int fkda_st_write(const char *path, const fkda_st_entry *entries, size_t count,
                  const fkda_st_pair *metadata, size_t metadata_count, char *error,
                  size_t capacity);

#endif
