#!/usr/bin/env bash
# Succeeds where clang can link libFuzzer programs.
set -euo pipefail
command -v clang >/dev/null || exit 1
probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
echo '#include <stddef.h>
#include <stdint.h>
int LLVMFuzzerTestOneInput(const uint8_t *d, size_t n) { (void)d; (void)n; return 0; }' >"$probe/f.c"
clang -fsanitize=fuzzer,address,undefined "$probe/f.c" -o "$probe/f" 2>/dev/null
