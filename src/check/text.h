/* Text built piece by piece into a caller's buffer; keeps counting when the buffer is full. */
#ifndef FKDA_CHECK_TEXT_H
#define FKDA_CHECK_TEXT_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef struct fkda_text {
  char *buffer; /* may be NULL if capacity is 0 */
  size_t capacity;
  size_t length; /* of the whole text, which may exceed what fits */
} fkda_text;

static inline void __attribute__((format(printf, 2, 3)))
fkda_text_add(fkda_text *text, const char *format, ...) {
  const size_t used = text->length < text->capacity ? text->length : text->capacity;
  const size_t room = text->capacity - used;
  va_list arguments;
  va_start(arguments, format);
  const int added = vsnprintf(room ? text->buffer + used : NULL, room, format, arguments);
  va_end(arguments);
  if (added > 0) text->length += (size_t)added;
}

/* "[1,64,4,128]". */
static inline void fkda_text_add_list(fkda_text *text, const int64_t *values, int32_t count) {
  for (int32_t i = 0; i < count; ++i)
    fkda_text_add(text, "%s%lld", i ? "," : "[", (long long)values[i]);
  fkda_text_add(text, count ? "]" : "[]");
}

#endif
