#!/usr/bin/env bash
# clang-tidy over every C file that the release build compiles; any warning is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test lint
cmake --preset release >/dev/null
db=build/release/compile_commands.json
mapfile -t files < <(sed -n 's/^ *"file": "\(.*\)",\{0,1\}$/\1/p' "$db" | sort -u)
printf '%s\n' "${files[@]}" |
  xargs -P "${JOBS:-$(nproc)}" -n 1 clang-tidy-14 -p build/release --quiet --warnings-as-errors='*' \
    2> >(grep -vE 'warnings? generated|^Suppressed|^Use -header-filter' >&2)
echo "${#files[@]} files without a warning"
