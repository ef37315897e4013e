/* SPDX-License-Identifier: MIT */
#include "cli.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- messages ----------------------------------------------------------------------------------- */

static void say(const char *format, va_list list) {
  fkda_cli_progress("%s", "");
  fputs("flashkda: ", stderr);
  vfprintf(stderr, format, list);
  fputc('\n', stderr);
}

int fkda_cli_error(const char *format, ...) {
  va_list list;
  va_start(list, format);
  say(format, list);
  va_end(list);
  return FKDA_EXIT_FAILED;
}

int fkda_cli_usage(const char *command, const char *format, ...) {
  va_list list;
  va_start(list, format);
  say(format, list);
  va_end(list);
  fprintf(stderr, "Try \"flashkda%s%s --help\".\n", *command ? " " : "", command);
  return FKDA_EXIT_USAGE;
}

void fkda_cli_progress(const char *format, ...) {
  static bool shown;
  char text[160];
  va_list list;
  if (!isatty(STDERR_FILENO)) return;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  if (!*text && !shown) return;
  fprintf(stderr, "\r\033[K%.78s", text);
  fflush(stderr);
  shown = *text != 0;
}

/* ---- parsers ------------------------------------------------------------------------------------ */

bool fkda_cli_integer(const char *text, int64_t low, int64_t high, int64_t *out) {
  char *end;
  errno = 0;
  const long long value = strtoll(text, &end, 10);
  if (end == text || *end || errno || value < low || value > high) return false;
  *out = value;
  return true;
}

int64_t *fkda_cli_integers(const char *text, int64_t low, int64_t high, int64_t *count) {
  int64_t n = 1;
  for (const char *p = text; *p; p++) n += *p == ',';
  int64_t *values = malloc((size_t)n * sizeof *values);
  *count = n;
  for (int64_t i = 0; values && i < n; i++) {
    char *end;
    errno = 0;
    const long long value = strtoll(text, &end, 10);
    const bool bad =
        end == text || errno || value < low || value > high || *end != (i + 1 < n ? ',' : 0);
    if (bad) {
      free(values);
      return NULL;
    }
    values[i] = value;
    text = end + 1;
  }
  return values;
}

int32_t fkda_cli_dtype(const char *text) {
  for (int32_t dtype = FKDA_F32; dtype <= FKDA_F64; dtype++) {
    if (strcmp(text, fkda_dtype_string(dtype)) == 0 || strcmp(text, fkda_dtype_short(dtype)) == 0) {
      return dtype;
    }
  }
  return FKDA_NONE;
}

bool fkda_cli_backend(const char *name) {
  const char *known;
  for (int32_t i = 0; (known = fkda_backend_name(i)) != NULL; i++) {
    if (strcmp(known, name) == 0) return true;
  }
  return false;
}

/* ---- time and machine --------------------------------------------------------------------------- */

double fkda_cli_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double fkda_cli_median(double *values, int count) {
  qsort(values, (size_t)count, sizeof *values, by_value);
  return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

/* The text after "key : " in /proc/cpuinfo's first entry. */
static bool cpuinfo(const char *key, char *buffer, size_t capacity) {
  FILE *stream = fopen("/proc/cpuinfo", "r");
  bool found = false;
  if (!stream) return false;
  while (!found && fgets(buffer, (int)capacity, stream)) {
    char *colon = strchr(buffer, ':');
    if (strncmp(buffer, key, strlen(key)) != 0 || !colon) continue;
    buffer[strcspn(buffer, "\n")] = 0;
    colon += strspn(colon, ": \t");
    memmove(buffer, colon, strlen(colon) + 1);
    found = true;
  }
  fclose(stream);
  return found;
}

const char *fkda_cli_cpu(char *buffer, size_t capacity) {
  if (!cpuinfo("model name", buffer, capacity) && !cpuinfo("Processor", buffer, capacity)) {
    snprintf(buffer, capacity, "unknown processor");
  }
  return buffer;
}

bool fkda_cli_cpu_has(const char *flag) {
  char line[8192];
  const size_t n = strlen(flag);
  if (!cpuinfo("flags", line, sizeof line) && !cpuinfo("Features", line, sizeof line)) return false;
  for (char *p = line; (p = strstr(p, flag)) != NULL; p += n) {
    if ((p == line || p[-1] == ' ') && (p[n] == ' ' || p[n] == 0)) return true;
  }
  return false;
}

/* ---- JSON --------------------------------------------------------------------------------------- */

static void put_quoted(FILE *stream, const char *text) {
  fputc('"', stream);
  for (; *text; text++) {
    const unsigned char c = (unsigned char)*text;
    if (c == '"' || c == '\\') {
      fprintf(stream, "\\%c", c);
    } else if (c < 32) {
      fprintf(stream, "\\u%04x", c);
    } else {
      fputc(c, stream);
    }
  }
  fputc('"', stream);
}

static void begin(fkda_json *j, const char *key) {
  if (j->comma) fputc(',', j->stream);
  if (j->depth) fprintf(j->stream, "\n%*s", 2 * j->depth, "");
  if (key) {
    put_quoted(j->stream, key);
    fputs(": ", j->stream);
  }
  j->comma = true;
}

void fkda_json_open(fkda_json *j, const char *key, char bracket) {
  begin(j, key);
  fputc(bracket, j->stream);
  j->depth++;
  j->comma = false;
}

void fkda_json_close(fkda_json *j, char bracket) {
  j->depth--;
  if (j->comma) fprintf(j->stream, "\n%*s", 2 * j->depth, "");
  fputc(bracket, j->stream);
  j->comma = true;
  if (j->depth == 0) fputc('\n', j->stream);
}

void fkda_json_text(fkda_json *j, const char *key, const char *value) {
  begin(j, key);
  if (value) {
    put_quoted(j->stream, value);
  } else {
    fputs("null", j->stream);
  }
}

void fkda_json_int(fkda_json *j, const char *key, int64_t value) {
  begin(j, key);
  fprintf(j->stream, "%lld", (long long)value);
}

void fkda_json_real(fkda_json *j, const char *key, double value) {
  begin(j, key);
  if (isfinite(value)) {
    fprintf(j->stream, "%.6g", value);
  } else {
    fputs("null", j->stream);
  }
}

void fkda_json_bool(fkda_json *j, const char *key, bool value) {
  begin(j, key);
  fputs(value ? "true" : "false", j->stream);
}

void fkda_json_ints(fkda_json *j, const char *key, const int64_t *values, int64_t count) {
  begin(j, key);
  fputc('[', j->stream);
  for (int64_t i = 0; i < count; i++) {
    fprintf(j->stream, "%s%lld", i ? ", " : "", (long long)values[i]);
  }
  fputc(']', j->stream);
}

bool fkda_gate_strength(const char *name, fkda_dist *dt_bias) {
  /* with raw ~ N(0,1), A_log = 0 and lower_bound -5: -5 sigmoid(raw + dt_bias) */
  static const struct {
    const char *name;
    fkda_dist dist;
  } rows[] = {{"weak", {FKDA_DIST_CONSTANT, -8, 0}},
              {"medium", {FKDA_DIST_UNIFORM, -3.5, -2}},
              {"strong", {FKDA_DIST_UNIFORM, 0, 1}}};
  for (int i = 0; i < 3; i++) {
    if (strcmp(rows[i].name, name) == 0) {
      *dt_bias = rows[i].dist;
      return true;
    }
  }
  return false;
}
