/* What the subcommands share: messages, progress, JSON, small parsers.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef FKDA_TOOLS_CLI_H
#define FKDA_TOOLS_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "cases/cases.h"

enum { FKDA_EXIT_OK = 0, FKDA_EXIT_FAILED = 1, FKDA_EXIT_USAGE = 2 };

int fkda_cmd_info(int argc, char **argv);
int fkda_cmd_run(int argc, char **argv);
int fkda_cmd_make(int argc, char **argv);
int fkda_cmd_check(int argc, char **argv);
int fkda_cmd_bench(int argc, char **argv);

/** "flashkda: ..." on stderr. Returns FKDA_EXIT_FAILED. */
int fkda_cli_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
/** The same, with a hint at the subcommand's --help. Returns FKDA_EXIT_USAGE. */
int fkda_cli_usage(const char *command, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/** One line on stderr that replaces the last one, if stderr is a terminal; "" clears it. */
void fkda_cli_progress(const char *format, ...) __attribute__((format(printf, 1, 2)));

/** An integer in [low, high], all of `text`. */
bool fkda_cli_integer(const char *text, int64_t low, int64_t high, int64_t *out);
/** Comma-separated integers to a fresh array; NULL if malformed or empty. */
int64_t *fkda_cli_integers(const char *text, int64_t low, int64_t high, int64_t *count);
/** "f32" or "float32" and so on; FKDA_NONE if unknown. */
int32_t fkda_cli_dtype(const char *text);
/** Is it the name of a backend of this build? */
bool fkda_cli_backend(const char *name);

double fkda_cli_now(void);
/** Sorts `values` and returns the middle one. */
double fkda_cli_median(double *values, int count);
/** The processor's name; "unknown processor" if it cannot be found out. */
const char *fkda_cli_cpu(char *buffer, size_t capacity);
/** Is the instruction set extension among the processor's flags? */
bool fkda_cli_cpu_has(const char *flag);

/* JSON, written as it comes. key NULL inside arrays. */
typedef struct fkda_json {
  FILE *stream;
  int depth;
  bool comma;
} fkda_json;

void fkda_json_open(fkda_json *j, const char *key, char bracket);      /* '{' or '[' */
void fkda_json_close(fkda_json *j, char bracket);                      /* '}' or ']' */
void fkda_json_text(fkda_json *j, const char *key, const char *value); /* NULL: null */
void fkda_json_int(fkda_json *j, const char *key, int64_t value);
void fkda_json_real(fkda_json *j, const char *key, double value); /* not finite: null */
void fkda_json_bool(fkda_json *j, const char *key, bool value);
void fkda_json_ints(fkda_json *j, const char *key, const int64_t *values, int64_t count);

/** Parameters of the bounded gate by strength: weak (mean log-decay about -0.003 a token), medium (-0.3)
 *  and strong (-3), for raw gates drawn from N(0,1). false if there is none of that name. */
bool fkda_gate_strength(const char *name, fkda_dist *dt_bias);

#endif
