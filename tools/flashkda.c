/* flashkda: the command line.
 *
 * SPDX-License-Identifier: MIT
 */
#include <stdio.h>
#include <string.h>

#include "cli.h"

typedef struct command {
  const char *name, *text;
  int (*main)(int argc, char **argv);
} command;

static const command commands[] = {
    {"info", "what this build and this machine can do", fkda_cmd_info},
    {"make", "write a file of random inputs", fkda_cmd_make},
    {"run", "run prefill, decode or summary on a .safetensors file", fkda_cmd_run},
    {"check", "compare this machine's kernels with the double-precision reference", fkda_cmd_check},
    {"bench", "measure", fkda_cmd_bench},
};

static void print_help(void) {
  puts(
      "flashkda: Kimi Delta Attention from the command line\n\n"
      "Usage: flashkda COMMAND [OPTION...]\n");
  for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
    printf("  %-8s %s\n", commands[i].name, commands[i].text);
  }
  puts(
      "\n  --version, --help; \"flashkda COMMAND --help\" explains a command.\n\n"
      "Exit status: 0 success, 1 a failed check or run, 2 wrong usage.\n"
      "Environment: FLASHKDA_BACKEND, FLASHKDA_CPU_ISA, FLASHKDA_NUM_THREADS, FLASHKDA_LOG.");
}

static int dispatch(int argc, char **argv) {
  if (argc < 2) return fkda_cli_usage("", "no command given");
  if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
    print_help();
    return FKDA_EXIT_OK;
  }
  if (!strcmp(argv[1], "--version") || !strcmp(argv[1], "-V")) {
    printf("flashkda %s\n", fkda_version_string());
    return FKDA_EXIT_OK;
  }
  for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
    if (!strcmp(argv[1], commands[i].name)) return commands[i].main(argc - 1, argv + 1);
  }
  return fkda_cli_usage("", "\"%s\" is no command", argv[1]);
}

int main(int argc, char **argv) {
  const int status = dispatch(argc, argv);
  if (fflush(stdout) != 0 || ferror(stdout)) {
    return fkda_cli_error("cannot write to standard output");
  }
  return status;
}
