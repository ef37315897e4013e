#!/usr/bin/env bash
# clang-format over every C file. With --check: changes nothing, fails where a file differs.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh lint
mapfile -t files < <(scripts/c_files.sh)
if [ "${1:-}" = --check ]; then
  clang-format-14 --dry-run --Werror "${files[@]}"
  echo "${#files[@]} files formatted"
else
  clang-format-14 -i "${files[@]}"
fi
