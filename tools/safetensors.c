/* SPDX-License-Identifier: MIT */
#define _POSIX_C_SOURCE 200809L

#include "safetensors.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MAX_HEADER ((uint64_t)100 * 1000 * 1000) /* bytes, the format's own limit */
#define MAX_TENSORS ((size_t)1 << 20)
#define MAX_RANK 16
#define ALIGNMENT 64

/* Every dtype that the format knows; those without an fkda_dtype are listed but never found. */
typedef struct dtype_row {
  const char *name;
  int32_t dtype;
  uint32_t bits;
} dtype_row;

static const dtype_row dtypes[] = {
    {"F64", FKDA_F64, 64},   {"F32", FKDA_F32, 32},     {"F16", FKDA_F16, 16},
    {"BF16", FKDA_BF16, 16}, {"I64", FKDA_I64, 64},     {"I32", FKDA_I32, 32},
    {"BOOL", FKDA_BOOL, 8},  {"I16", FKDA_NONE, 16},    {"I8", FKDA_NONE, 8},
    {"U8", FKDA_NONE, 8},    {"U16", FKDA_NONE, 16},    {"U32", FKDA_NONE, 32},
    {"U64", FKDA_NONE, 64},  {"F8_E4M3", FKDA_NONE, 8}, {"F8_E5M2", FKDA_NONE, 8},
    {"C64", FKDA_NONE, 64},  {"F8_E8M0", FKDA_NONE, 8}, {"F4", FKDA_NONE, 4},
};

static const dtype_row *dtype_by_name(const char *name) {
  for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
    if (strcmp(dtypes[i].name, name) == 0) return &dtypes[i];
  }
  return NULL;
}

static const char *dtype_name(int32_t dtype) {
  for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
    if (dtype != FKDA_NONE && dtypes[i].dtype == dtype) return dtypes[i].name;
  }
  return NULL;
}

typedef struct st_tensor {
  char *name;
  const dtype_row *dtype;
  uint32_t rank;
  uint64_t shape[MAX_RANK];
  uint64_t begin, end; /* bytes of the data section */
  void *copy;          /* where the file's offset does not suit the element size */
} st_tensor;

struct fkda_st {
  unsigned char *data; /* the data section, ALIGNMENT-aligned */
  uint64_t data_size;
  st_tensor *tensors; /* sorted by begin */
  size_t count, capacity;
  st_tensor **by_name;
  fkda_st_pair *metadata;
  size_t metadata_count, metadata_capacity;
};

static int fail(char *error, size_t capacity, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static int fail(char *error, size_t capacity, const char *format, ...) {
  if (capacity) {
    va_list list;
    va_start(list, format);
    vsnprintf(error, capacity, format, list);
    va_end(list);
  }
  return -1;
}

/* Copies a name for a message: printable ASCII, cut at `capacity`. */
static const char *printable(const char *text, char *buffer, size_t capacity) {
  size_t n = 0;
  for (; text[n] && n + 1 < capacity; n++) {
    buffer[n] = text[n] >= 32 && text[n] < 127 ? text[n] : '?';
  }
  buffer[n] = 0;
  return buffer;
}

static void *aligned_buffer(uint64_t size) {
  const uint64_t rounded = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  if (rounded < size || rounded > SIZE_MAX) return NULL;
  return aligned_alloc(ALIGNMENT, rounded ? (size_t)rounded : ALIGNMENT);
}

/* ---- a strict JSON reader, only as wide as the header's grammar ----------------------------------- */

typedef struct json {
  const unsigned char *begin, *at, *end;
  char *error;
  size_t capacity;
} json;

static int json_fail(json *j, const char *what) {
  return fail(j->error, j->capacity, "header, byte %zu: %s", (size_t)(j->at - j->begin), what);
}

static void json_space(json *j) {
  while (j->at < j->end && (*j->at == ' ' || *j->at == '\n' || *j->at == '\t' || *j->at == '\r')) {
    j->at++;
  }
}

static int json_peek(json *j) {
  json_space(j);
  return j->at < j->end ? *j->at : -1;
}

static int json_expect(json *j, char c) {
  if (json_peek(j) != (unsigned char)c) {
    const char what[] = {'e', 'x', 'p', 'e', 'c', 't', 'e', 'd', ' ', '\'', c, '\'', 0};
    return json_fail(j, what);
  }
  j->at++;
  return 0;
}

static int json_hex4(json *j, uint32_t *out) {
  uint32_t value = 0;
  for (int i = 0; i < 4; i++, j->at++) {
    if (j->at >= j->end) return json_fail(j, "string ends inside an escape");
    const unsigned char c = *j->at;
    uint32_t digit;
    if (c >= '0' && c <= '9') {
      digit = c - '0';
    } else if (c >= 'a' && c <= 'f') {
      digit = c - 'a' + 10;
    } else if (c >= 'A' && c <= 'F') {
      digit = c - 'A' + 10;
    } else {
      return json_fail(j, "bad \\u escape");
    }
    value = value * 16 + digit;
  }
  *out = value;
  return 0;
}

static size_t utf8_put(char *out, uint32_t code) {
  if (code < 0x80) {
    out[0] = (char)code;
    return 1;
  }
  if (code < 0x800) {
    out[0] = (char)(0xC0 | code >> 6);
    out[1] = (char)(0x80 | (code & 63));
    return 2;
  }
  if (code < 0x10000) {
    out[0] = (char)(0xE0 | code >> 12);
    out[1] = (char)(0x80 | (code >> 6 & 63));
    out[2] = (char)(0x80 | (code & 63));
    return 3;
  }
  out[0] = (char)(0xF0 | code >> 18);
  out[1] = (char)(0x80 | (code >> 12 & 63));
  out[2] = (char)(0x80 | (code >> 6 & 63));
  out[3] = (char)(0x80 | (code & 63));
  return 4;
}

/* Bytes of the well-formed UTF-8 sequence at p, 0 if it is none (overlong forms, surrogates and codes
 * over U+10FFFF included). */
static size_t utf8_length(const unsigned char *p, const unsigned char *end) {
  const size_t left = (size_t)(end - p);
  if (p[0] < 0x80) return 1;
  if (p[0] >= 0xC2 && p[0] <= 0xDF) return left >= 2 && (p[1] & 0xC0) == 0x80 ? 2 : 0;
  if (p[0] >= 0xE0 && p[0] <= 0xEF) {
    if (left < 3 || (p[1] & 0xC0) != 0x80 || (p[2] & 0xC0) != 0x80) return 0;
    if (p[0] == 0xE0 && p[1] < 0xA0) return 0;
    if (p[0] == 0xED && p[1] > 0x9F) return 0;
    return 3;
  }
  if (p[0] >= 0xF0 && p[0] <= 0xF4) {
    if (left < 4 || (p[1] & 0xC0) != 0x80 || (p[2] & 0xC0) != 0x80 || (p[3] & 0xC0) != 0x80)
      return 0;
    if (p[0] == 0xF0 && p[1] < 0x90) return 0;
    if (p[0] == 0xF4 && p[1] > 0x8F) return 0;
    return 4;
  }
  return 0;
}

static int json_escape(json *j, uint32_t *code) {
  if (j->at >= j->end) return json_fail(j, "string ends inside an escape");
  const unsigned char c = *j->at++;
  switch (c) {
    case '"':
    case '\\':
    case '/': *code = c; return 0;
    case 'b': *code = '\b'; return 0;
    case 'f': *code = '\f'; return 0;
    case 'n': *code = '\n'; return 0;
    case 'r': *code = '\r'; return 0;
    case 't': *code = '\t'; return 0;
    case 'u': break;
    default: j->at--; return json_fail(j, "unknown escape");
  }
  if (json_hex4(j, code)) return -1;
  if (*code >= 0xDC00 && *code <= 0xDFFF) return json_fail(j, "lone surrogate");
  if (*code >= 0xD800 && *code <= 0xDBFF) {
    uint32_t low = 0;
    if (j->end - j->at < 2 || j->at[0] != '\\' || j->at[1] != 'u') {
      return json_fail(j, "lone surrogate");
    }
    j->at += 2;
    if (json_hex4(j, &low)) return -1;
    if (low < 0xDC00 || low > 0xDFFF) return json_fail(j, "lone surrogate");
    *code = 0x10000 + ((*code - 0xD800) << 10) + (low - 0xDC00);
  }
  if (*code == 0) return json_fail(j, "NUL in a string");
  return 0;
}

/* A string, unescaped, to a fresh buffer. */
static int json_string(json *j, char **out) {
  if (json_expect(j, '"')) return -1;
  const unsigned char *stop = j->at;
  while (stop < j->end && *stop != '"') stop += *stop == '\\' && stop + 1 < j->end ? 2 : 1;
  if (stop >= j->end) return json_fail(j, "unterminated string");
  char *text = malloc((size_t)(stop - j->at) + 1); /* unescaping never lengthens */
  if (!text) return json_fail(j, "out of memory");
  size_t n = 0;
  while (*j->at != '"') {
    if (*j->at == '\\') {
      uint32_t code = 0;
      j->at++;
      if (json_escape(j, &code)) goto bad;
      n += utf8_put(text + n, code);
    } else {
      const size_t length = *j->at < 32 ? 0 : utf8_length(j->at, j->end);
      if (length == 0) {
        json_fail(j, *j->at < 32 ? "control character in a string" : "string is not UTF-8");
        goto bad;
      }
      memcpy(text + n, j->at, length);
      n += length;
      j->at += length;
    }
    if (j->at >= j->end) {
      json_fail(j, "unterminated string");
      goto bad;
    }
  }
  j->at++;
  text[n] = 0;
  *out = text;
  return 0;
bad:
  free(text);
  return -1;
}

/* An integer >= 0 without sign, fraction, exponent or leading zero. */
static int json_unsigned(json *j, uint64_t *out) {
  const int first = json_peek(j);
  if (first < '0' || first > '9') return json_fail(j, "expected an integer >= 0");
  uint64_t value = 0;
  const unsigned char *start = j->at;
  for (; j->at < j->end && *j->at >= '0' && *j->at <= '9'; j->at++) {
    const uint64_t digit = *j->at - '0';
    if (value > (UINT64_MAX - digit) / 10) return json_fail(j, "integer too large");
    value = value * 10 + digit;
  }
  if (first == '0' && j->at - start > 1) return json_fail(j, "integer with a leading zero");
  if (j->at < j->end && (*j->at == '.' || *j->at == 'e' || *j->at == 'E')) {
    return json_fail(j, "expected an integer");
  }
  *out = value;
  return 0;
}

/* After an element of an object or array: true and past the comma if another one follows. */
static int json_more(json *j, char close, bool *more) {
  const int c = json_peek(j);
  if (c != ',' && c != close) return json_fail(j, "expected ',' or a closing bracket");
  j->at++;
  *more = c == ',';
  return 0;
}

static int json_unsigned_array(json *j, uint64_t *out, uint32_t limit, uint32_t *count) {
  bool more = true;
  *count = 0;
  if (json_expect(j, '[')) return -1;
  if (json_peek(j) == ']') {
    j->at++;
    return 0;
  }
  while (more) {
    if (*count == limit) return json_fail(j, "array too long");
    if (json_unsigned(j, &out[(*count)++]) || json_more(j, ']', &more)) return -1;
  }
  return 0;
}

static int parse_metadata(fkda_st *file, json *j) {
  bool more = true;
  if (json_expect(j, '{')) return -1;
  if (json_peek(j) == '}') {
    j->at++;
    return 0;
  }
  while (more) {
    if (file->metadata_count == file->metadata_capacity) {
      const size_t capacity = file->metadata_capacity ? file->metadata_capacity * 2 : 16;
      fkda_st_pair *grown = realloc(file->metadata, capacity * sizeof *grown);
      if (!grown) return json_fail(j, "out of memory");
      file->metadata = grown;
      file->metadata_capacity = capacity;
    }
    fkda_st_pair *pair = &file->metadata[file->metadata_count];
    char *key = NULL, *value = NULL;
    if (json_string(j, &key) || json_expect(j, ':') || json_string(j, &value)) {
      free(key);
      return -1;
    }
    *pair = (fkda_st_pair){key, value};
    file->metadata_count++;
    if (json_more(j, '}', &more)) return -1;
  }
  return 0;
}

/* {"dtype": ..., "shape": ..., "data_offsets": ...} in any order, each once, nothing else. */
static int parse_tensor(json *j, st_tensor *tensor) {
  enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4 };
  int seen = 0;
  bool more = true;
  if (json_expect(j, '{')) return -1;
  if (json_peek(j) == '}') return json_fail(j, "tensor without dtype, shape and data_offsets");
  while (more) {
    char *key;
    int which = 0, bad = 0;
    if (json_string(j, &key)) return -1;
    if (strcmp(key, "dtype") == 0) which = DTYPE;
    if (strcmp(key, "shape") == 0) which = SHAPE;
    if (strcmp(key, "data_offsets") == 0) which = OFFSETS;
    free(key);
    if (!which) return json_fail(j, "unknown key in a tensor");
    if (seen & which) return json_fail(j, "key given twice in a tensor");
    seen |= which;
    if (json_expect(j, ':')) return -1;
    if (which == DTYPE) {
      char *name;
      if (json_string(j, &name)) return -1;
      tensor->dtype = dtype_by_name(name);
      free(name);
      if (!tensor->dtype) return json_fail(j, "unknown dtype");
    } else if (which == SHAPE) {
      bad = json_unsigned_array(j, tensor->shape, MAX_RANK, &tensor->rank);
    } else {
      uint64_t offsets[2];
      uint32_t count;
      if (json_unsigned_array(j, offsets, 2, &count)) return -1;
      if (count != 2) return json_fail(j, "data_offsets: expected two integers");
      tensor->begin = offsets[0];
      tensor->end = offsets[1];
    }
    if (bad || json_more(j, '}', &more)) return -1;
  }
  if (seen != (DTYPE | SHAPE | OFFSETS)) {
    return json_fail(j, "tensor without dtype, shape and data_offsets");
  }
  return 0;
}

static int parse_header(fkda_st *file, json *j) {
  bool more = true, metadata_seen = false;
  if (json_expect(j, '{')) return -1;
  if (json_peek(j) == '}') {
    j->at++;
    more = false;
  }
  while (more) {
    char *name = NULL;
    if (json_string(j, &name) || !name) return -1;
    if (json_expect(j, ':')) {
      free(name);
      return -1;
    }
    if (strcmp(name, "__metadata__") == 0) {
      free(name);
      if (metadata_seen) return json_fail(j, "__metadata__ given twice");
      metadata_seen = true;
      if (parse_metadata(file, j)) return -1;
    } else {
      if (file->count == file->capacity) {
        const size_t capacity = file->capacity ? file->capacity * 2 : 16;
        st_tensor *grown =
            capacity <= MAX_TENSORS ? realloc(file->tensors, capacity * sizeof *grown) : NULL;
        if (!grown) {
          free(name);
          return json_fail(j, capacity > MAX_TENSORS ? "too many tensors" : "out of memory");
        }
        file->tensors = grown;
        file->capacity = capacity;
      }
      st_tensor *tensor = &file->tensors[file->count++];
      memset(tensor, 0, sizeof *tensor);
      tensor->name = name;
      if (parse_tensor(j, tensor)) return -1;
    }
    if (json_more(j, '}', &more)) return -1;
  }
  if (json_peek(j) != -1) return json_fail(j, "text after the header's object");
  return 0;
}

/* ---- rules over the whole file ---------------------------------------------------------------- */

static int by_place(const void *a, const void *b) {
  const st_tensor *x = a, *y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  if (x->end != y->end) return x->end < y->end ? -1 : 1; /* empty ones first */
  return strcmp(x->name, y->name);
}

static int by_name(const void *a, const void *b) {
  return strcmp((*(st_tensor *const *)a)->name, (*(st_tensor *const *)b)->name);
}

static int by_key(const void *a, const void *b) {
  return strcmp(((const fkda_st_pair *)a)->key, ((const fkda_st_pair *)b)->key);
}

static int check_sizes(fkda_st *file, char *error, size_t capacity) {
  char text[64];
  for (size_t i = 0; i < file->count; i++) {
    const st_tensor *t = &file->tensors[i];
    uint64_t bits = t->dtype->bits;
    bool empty = false, overflow = false;
    for (uint32_t d = 0; d < t->rank; d++) {
      if (t->shape[d] > INT64_MAX) overflow = true;
      if (t->shape[d] == 0) empty = true;
    }
    for (uint32_t d = 0; d < t->rank && !empty && !overflow; d++) {
      overflow = bits > UINT64_MAX / t->shape[d];
      if (!overflow) bits *= t->shape[d];
    }
    printable(t->name, text, sizeof text);
    if (overflow) return fail(error, capacity, "tensor \"%s\": shape overflows", text);
    if (empty) bits = 0;
    if (bits % 8) return fail(error, capacity, "tensor \"%s\": size is no whole byte", text);
    if (t->begin > t->end || t->end > file->data_size) {
      return fail(error, capacity,
                  "tensor \"%s\": data_offsets [%" PRIu64 ",%" PRIu64
                  "] outside the data of %" PRIu64 " bytes",
                  text, t->begin, t->end, file->data_size);
    }
    if (t->end - t->begin != bits / 8) {
      return fail(error, capacity,
                  "tensor \"%s\": data_offsets give %" PRIu64 " bytes, shape and dtype %" PRIu64,
                  text, t->end - t->begin, bits / 8);
    }
  }
  return 0;
}

static int check_places(fkda_st *file, char *error, size_t capacity) {
  char text[64];
  uint64_t at = 0;
  if (file->count) qsort(file->tensors, file->count, sizeof *file->tensors, by_place);
  for (size_t i = 0; i < file->count; i++) {
    const st_tensor *t = &file->tensors[i];
    if (t->begin != at) {
      return fail(
          error, capacity, "tensor \"%s\": begins at byte %" PRIu64 ", expected %" PRIu64 " (%s)",
          printable(t->name, text, sizeof text), t->begin, at, t->begin < at ? "overlap" : "gap");
    }
    at = t->end;
  }
  if (at != file->data_size) {
    return fail(error, capacity, "%" PRIu64 " bytes of data belong to no tensor",
                file->data_size - at);
  }
  return 0;
}

static int check_names(fkda_st *file, char *error, size_t capacity) {
  char text[64];
  file->by_name = malloc((file->count + 1) * sizeof *file->by_name);
  if (!file->by_name) return fail(error, capacity, "out of memory");
  for (size_t i = 0; i < file->count; i++) file->by_name[i] = &file->tensors[i];
  if (file->count) qsort(file->by_name, file->count, sizeof *file->by_name, by_name);
  for (size_t i = 1; i < file->count; i++) {
    if (strcmp(file->by_name[i - 1]->name, file->by_name[i]->name) == 0) {
      return fail(error, capacity, "tensor \"%s\" given twice",
                  printable(file->by_name[i]->name, text, sizeof text));
    }
  }
  if (file->metadata_count) {
    qsort(file->metadata, file->metadata_count, sizeof *file->metadata, by_key);
  }
  for (size_t i = 1; i < file->metadata_count; i++) {
    if (strcmp(file->metadata[i - 1].key, file->metadata[i].key) == 0) {
      return fail(error, capacity, "metadata key \"%s\" given twice",
                  printable(file->metadata[i].key, text, sizeof text));
    }
  }
  return 0;
}

/* The format does not align tensors; a view needs its element's alignment, so the odd ones are copied. */
static int align_tensors(fkda_st *file, char *error, size_t capacity) {
  for (size_t i = 0; i < file->count; i++) {
    st_tensor *t = &file->tensors[i];
    const uint64_t size = t->end - t->begin;
    if (size == 0 || t->dtype->dtype == FKDA_NONE || t->begin % (t->dtype->bits / 8) == 0) continue;
    t->copy = aligned_buffer(size);
    if (!t->copy) return fail(error, capacity, "out of memory");
    memcpy(t->copy, file->data + t->begin, (size_t)size);
  }
  return 0;
}

static int check_values(const fkda_st *file, char *error, size_t capacity) {
  char text[64];
  for (size_t i = 0; i < file->count; i++) {
    const st_tensor *t = &file->tensors[i];
    if (t->dtype->dtype != FKDA_BOOL) continue;
    for (uint64_t at = t->begin; at < t->end; at++) {
      if (file->data[at] > 1) {
        return fail(error, capacity, "tensor \"%s\": a BOOL that is neither 0 nor 1",
                    printable(t->name, text, sizeof text));
      }
    }
  }
  return 0;
}

/* `file->data` is filled; takes the header's text. */
static int finish_open(fkda_st *file, const unsigned char *header, size_t header_size, char *error,
                       size_t capacity) {
  json j = {header, header, header + header_size, error, capacity};
  if (header_size == 0 || header[0] != '{')
    return fail(error, capacity, "header does not begin with '{'");
  if (parse_header(file, &j)) return -1;
  if (check_sizes(file, error, capacity) || check_places(file, error, capacity) ||
      check_names(file, error, capacity) || check_values(file, error, capacity)) {
    return -1;
  }
  return align_tensors(file, error, capacity);
}

static uint64_t little_endian(const unsigned char *p) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; i--) value = value << 8 | p[i];
  return value;
}

static int check_lengths(uint64_t header, uint64_t size, char *error, size_t capacity) {
  if (header > MAX_HEADER) {
    return fail(error, capacity, "header of %" PRIu64 " bytes, expected at most %" PRIu64, header,
                MAX_HEADER);
  }
  if (header > size - 8) {
    return fail(error, capacity, "header of %" PRIu64 " bytes in a file of %" PRIu64, header, size);
  }
  return 0;
}

int fkda_st_open_memory(const void *data, size_t size, fkda_st **out, char *error,
                        size_t capacity) {
  const unsigned char *bytes = data;
  *out = NULL;
  if (size < 8)
    return fail(error, capacity, "no safetensors file: %zu bytes, shorter than its length field",
                size);
  const uint64_t header = little_endian(bytes);
  if (check_lengths(header, size, error, capacity)) return -1;
  fkda_st *file = calloc(1, sizeof *file);
  if (!file) return fail(error, capacity, "out of memory");
  file->data_size = size - 8 - header;
  file->data = aligned_buffer(file->data_size);
  if (!file->data) {
    fkda_st_close(file);
    return fail(error, capacity, "out of memory");
  }
  if (file->data_size) memcpy(file->data, bytes + 8 + header, (size_t)file->data_size);
  if (finish_open(file, bytes + 8, (size_t)header, error, capacity)) {
    fkda_st_close(file);
    return -1;
  }
  *out = file;
  return 0;
}

static int read_exactly(FILE *stream, void *to, uint64_t size) {
  return size == 0 || fread(to, 1, (size_t)size, stream) == size ? 0 : -1;
}

/* Header and data are read to their own places, so that a file of n bytes takes n bytes of memory. */
static int open_stream(FILE *stream, fkda_st *file, char *error, size_t capacity) {
  unsigned char prefix[8];
  if (fseek(stream, 0, SEEK_END) != 0)
    return fail(error, capacity, "cannot seek: %s", strerror(errno));
  const long end = ftell(stream);
  if (end < 0 || fseek(stream, 0, SEEK_SET) != 0) {
    return fail(error, capacity, "cannot seek: %s", strerror(errno));
  }
  if (end >= 8 && read_exactly(stream, prefix, 8)) {
    return fail(error, capacity, "cannot read: %s", strerror(errno));
  }
  if (end < 8) {
    return fail(error, capacity, "no safetensors file: %ld bytes, shorter than its length field",
                end);
  }
  const uint64_t size = (uint64_t)end, header_size = little_endian(prefix);
  if (check_lengths(header_size, size, error, capacity)) return -1;
  unsigned char *header = malloc((size_t)header_size + 1);
  if (!header) return fail(error, capacity, "out of memory");
  int result = -1;
  file->data_size = size - 8 - header_size;
  file->data = aligned_buffer(file->data_size);
  if (!file->data) {
    fail(error, capacity, "out of memory for %" PRIu64 " bytes of data", file->data_size);
  } else if (read_exactly(stream, header, header_size) ||
             read_exactly(stream, file->data, file->data_size)) {
    fail(error, capacity, "cannot read: %s", ferror(stream) ? strerror(errno) : "file ends early");
  } else {
    result = finish_open(file, header, (size_t)header_size, error, capacity);
  }
  free(header);
  return result;
}

int fkda_st_open(const char *path, fkda_st **out, char *error, size_t capacity) {
  *out = NULL;
  FILE *stream = fopen(path, "rb");
  if (!stream) return fail(error, capacity, "%s: %s", path, strerror(errno));
  fkda_st *file = calloc(1, sizeof *file);
  char detail[256] = "out of memory";
  const int result = file ? open_stream(stream, file, detail, sizeof detail) : -1;
  fclose(stream);
  if (result) {
    fkda_st_close(file);
    return fail(error, capacity, "%s: %s", path, detail);
  }
  *out = file;
  return 0;
}

void fkda_st_close(fkda_st *file) {
  if (!file) return;
  for (size_t i = 0; i < file->count; i++) {
    free(file->tensors[i].name);
    free(file->tensors[i].copy);
  }
  for (size_t i = 0; i < file->metadata_count; i++) {
    free((char *)file->metadata[i].key);
    free((char *)file->metadata[i].value);
  }
  free(file->tensors);
  free(file->by_name);
  free(file->metadata);
  free(file->data);
  free(file);
}

/* ---- what is in it ---------------------------------------------------------------------------- */

size_t fkda_st_count(const fkda_st *file) { return file->count; }

const char *fkda_st_name(const fkda_st *file, size_t index) {
  return index < file->count ? file->tensors[index].name : NULL;
}

const char *fkda_st_dtype(const fkda_st *file, size_t index) {
  return index < file->count ? file->tensors[index].dtype->name : NULL;
}

static const st_tensor *find(const fkda_st *file, const char *name) {
  size_t low = 0, high = file->count;
  while (low < high) {
    const size_t middle = low + (high - low) / 2;
    const int order = strcmp(name, file->by_name[middle]->name);
    if (order == 0) return file->by_name[middle];
    if (order < 0) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return NULL;
}

bool fkda_st_has(const fkda_st *file, const char *name) { return find(file, name) != NULL; }

bool fkda_st_find(const fkda_st *file, const char *name, fkda_tensor *out) {
  const st_tensor *t = find(file, name);
  if (!t || t->dtype->dtype == FKDA_NONE || t->rank > FKDA_MAX_DIMS) return false;
  int64_t shape[FKDA_MAX_DIMS] = {1};
  for (uint32_t d = 0; d < t->rank; d++) shape[d] = (int64_t)t->shape[d];
  *out = fkda_tensor_contiguous(t->copy ? t->copy : file->data + t->begin, t->dtype->dtype,
                                t->rank ? (int32_t)t->rank : 1, shape);
  return true;
}

const char *fkda_st_metadata(const fkda_st *file, const char *key) {
  for (size_t i = 0; i < file->metadata_count; i++) {
    if (strcmp(file->metadata[i].key, key) == 0) return file->metadata[i].value;
  }
  return NULL;
}

size_t fkda_st_metadata_count(const fkda_st *file) { return file->metadata_count; }

const char *fkda_st_metadata_at(const fkda_st *file, size_t index, const char **value) {
  if (index >= file->metadata_count) return NULL;
  *value = file->metadata[index].value;
  return file->metadata[index].key;
}

/* ---- writing ---------------------------------------------------------------------------------- */

typedef struct text {
  char *data;
  size_t size, capacity;
  bool failed;
} text;

static void text_add(text *t, const char *bytes, size_t size) {
  if (t->failed) return;
  if (t->capacity - t->size < size) {
    size_t capacity = t->capacity ? t->capacity * 2 : 4096;
    while (capacity - t->size < size) capacity *= 2;
    char *grown = realloc(t->data, capacity);
    if (!grown) {
      t->failed = true;
      return;
    }
    t->data = grown;
    t->capacity = capacity;
  }
  memcpy(t->data + t->size, bytes, size);
  t->size += size;
}

static void text_puts(text *t, const char *s) { text_add(t, s, strlen(s)); }

static void text_number(text *t, uint64_t value) {
  char buffer[32];
  snprintf(buffer, sizeof buffer, "%" PRIu64, value);
  text_puts(t, buffer);
}

static void text_quoted(text *t, const char *s) {
  text_puts(t, "\"");
  for (; *s; s++) {
    const unsigned char c = (unsigned char)*s;
    if (c == '"' || c == '\\') {
      const char escaped[2] = {'\\', *s};
      text_add(t, escaped, 2);
    } else if (c < 32) {
      char escaped[8];
      snprintf(escaped, sizeof escaped, "\\u%04x", c);
      text_puts(t, escaped);
    } else {
      text_add(t, s, 1);
    }
  }
  text_puts(t, "\"");
}

static uint64_t tensor_elements(const fkda_tensor *tensor) {
  uint64_t count = 1;
  for (int32_t d = 0; d < tensor->ndim; d++) count *= (uint64_t)tensor->shape[d];
  return count;
}

static bool write_elements(FILE *stream, const fkda_tensor *t) {
  const size_t size = fkda_dtype_size(t->dtype);
  int64_t index[FKDA_MAX_DIMS] = {0};
  if (tensor_elements(t) == 0) return true;
  /* The longest contiguous run of trailing dimensions goes out in one piece. */
  int32_t outer = t->ndim;
  int64_t run = 1;
  while (outer > 0 && (t->shape[outer - 1] <= 1 || t->stride[outer - 1] == run)) {
    run *= t->shape[--outer];
  }
  for (;;) {
    int64_t offset = 0;
    for (int32_t d = 0; d < outer; d++) offset += index[d] * t->stride[d];
    const char *from = (const char *)t->data + offset * (int64_t)size;
    if (fwrite(from, size, (size_t)run, stream) != (size_t)run) return false;
    int32_t d = outer - 1;
    for (; d >= 0; d--) {
      if (++index[d] < t->shape[d]) break;
      index[d] = 0;
    }
    if (d < 0) return true;
  }
}

/* Larger elements first, so that every tensor is aligned to its element. */
static const size_t element_order[] = {8, 4, 2, 1};
#define ORDERS (sizeof element_order / sizeof element_order[0])

static int make_header(const fkda_st_entry *entries, size_t count, const fkda_st_pair *metadata,
                       size_t metadata_count, text *header, char *error, size_t capacity) {
  uint64_t at = 0;
  const char *separator = "";
  text_puts(header, "{");
  if (metadata_count) {
    text_puts(header, "\"__metadata__\":{");
    for (size_t i = 0; i < metadata_count; i++) {
      if (i) text_puts(header, ",");
      text_quoted(header, metadata[i].key);
      text_puts(header, ":");
      text_quoted(header, metadata[i].value);
    }
    text_puts(header, "}");
    separator = ",";
  }
  for (size_t order = 0; order < ORDERS; order++) {
    for (size_t i = 0; i < count; i++) {
      const fkda_tensor *t = &entries[i].tensor;
      if (fkda_dtype_size(t->dtype) != element_order[order]) continue;
      const uint64_t size = tensor_elements(t) * element_order[order];
      text_puts(header, separator);
      separator = ",";
      text_quoted(header, entries[i].name);
      text_puts(header, ":{\"dtype\":\"");
      text_puts(header, dtype_name(t->dtype));
      text_puts(header, "\",\"shape\":[");
      for (int32_t d = 0; d < t->ndim; d++) {
        if (d) text_puts(header, ",");
        text_number(header, (uint64_t)t->shape[d]);
      }
      text_puts(header, "],\"data_offsets\":[");
      text_number(header, at);
      text_puts(header, ",");
      text_number(header, at += size);
      text_puts(header, "]}");
    }
  }
  text_puts(header, "}");
  while (!header->failed && (8 + header->size) % ALIGNMENT) text_puts(header, " ");
  if (header->failed) return fail(error, capacity, "out of memory");
  if (header->size > MAX_HEADER) return fail(error, capacity, "header too large");
  return 0;
}

static bool write_all(FILE *stream, const text *header, const fkda_st_entry *entries,
                      size_t count) {
  unsigned char prefix[8];
  for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)((uint64_t)header->size >> 8 * i);
  if (fwrite(prefix, 1, 8, stream) != 8) return false;
  if (fwrite(header->data, 1, header->size, stream) != header->size) return false;
  for (size_t order = 0; order < ORDERS; order++) {
    for (size_t i = 0; i < count; i++) {
      const fkda_tensor *t = &entries[i].tensor;
      if (fkda_dtype_size(t->dtype) == element_order[order] && !write_elements(stream, t))
        return false;
    }
  }
  return true;
}

int fkda_st_write(const char *path, const fkda_st_entry *entries, size_t count,
                  const fkda_st_pair *metadata, size_t metadata_count, char *error,
                  size_t capacity) {
  for (size_t i = 0; i < count; i++) {
    if (!dtype_name(entries[i].tensor.dtype)) {
      return fail(error, capacity, "%s: dtype cannot be stored", entries[i].name);
    }
    for (size_t j = 0; j < i; j++) {
      if (strcmp(entries[i].name, entries[j].name) == 0) {
        return fail(error, capacity, "%s: given twice", entries[i].name);
      }
    }
  }
  text header = {0};
  if (make_header(entries, count, metadata, metadata_count, &header, error, capacity)) {
    free(header.data);
    return -1;
  }
  FILE *stream = fopen(path, "wb");
  if (!stream) {
    free(header.data);
    return fail(error, capacity, "%s: %s", path, strerror(errno));
  }
  bool good = write_all(stream, &header, entries, count);
  const int reason = errno;
  free(header.data);
  good = fclose(stream) == 0 && good;
  if (!good) {
    struct stat status;
    if (lstat(path, &status) == 0 && S_ISREG(status.st_mode)) remove(path); /* no device, no link */
    return fail(error, capacity, "%s: cannot write: %s", path, strerror(reason));
  }
  return 0;
}
