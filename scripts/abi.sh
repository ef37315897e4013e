#!/usr/bin/env bash
# Compares the shared library's ABI with the recorded abi/flashkda.abi; with --update records it.
# What the header calls experimental stays outside (abi/experimental.suppr).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh abi
cmake -S . -B build/abi -DCMAKE_BUILD_TYPE=None "-DCMAKE_C_FLAGS=-g -O1 -ffile-prefix-map=$PWD=." -DFLASHKDA_TESTS=OFF \
  -DFLASHKDA_TOOLS=OFF -DFLASHKDA_CUDA=OFF >/dev/null
cmake --build build/abi --target flashkda -j "${JOBS:-$(nproc)}"
abidw --no-corpus-path --no-comp-dir-path --no-show-locs --no-elf-needed --exported-interfaces-only \
  --headers-dir include --suppressions abi/experimental.suppr \
  --out-file build/abi/flashkda.abi build/abi/libflashkda.so
if [ "${1:-}" = --update ]; then
  cp build/abi/flashkda.abi abi/flashkda.abi
  echo "abi/flashkda.abi recorded"
elif abidiff abi/flashkda.abi build/abi/flashkda.abi; then
  echo "the ABI is the recorded one"
else
  echo "The ABI differs from abi/flashkda.abi. If that is meant: make abi-update, and say so in CHANGELOG.md" >&2
  exit 1
fi
