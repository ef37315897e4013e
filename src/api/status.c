/* Texts of statuses and dtypes, and the thread's detail message. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "check/problem.h"

const char *fkda_status_string(fkda_status status) {
  switch (status) {
#define CASE(name, value, text)                                                                    \
  case name: return text;
    FKDA_STATUS_LIST(CASE)
#undef CASE
  }
  return "unknown status";
}

const char *fkda_dtype_string(int32_t dtype) {
  switch (dtype) {
    case FKDA_NONE: return "none";
#define CASE(name, value, bytes, text)                                                             \
  case name: return text;
      FKDA_DTYPE_LIST(CASE)
#undef CASE
    default: return "unknown";
  }
}

size_t fkda_dtype_size(int32_t dtype) {
  switch (dtype) {
#define CASE(name, value, bytes, text)                                                             \
  case name: return bytes;
    FKDA_DTYPE_LIST(CASE)
#undef CASE
    default: return 0;
  }
}

/* Room for the reasons of every backend of the table. */
static _Thread_local char detail[2048];

const char *fkda_last_error(void) { return detail; }

fkda_status fkda_fail(fkda_status status, const char *format, ...) {
  char text[sizeof detail]; /* the arguments may point into the previous detail */
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  memcpy(detail, text, strlen(text) + 1);
  return status;
}
