#!/usr/bin/env bash
# The shared library exports exactly the symbols of abi/symbols.txt, beside experimental ones, and needs only libc, libm and libpthread.
# Usage: test_symbols.sh SOURCE_DIR LIBRARY
set -euo pipefail
source=$1 library=$2
names() { sed 's/#.*//; s/ *$//; /^$/d' "$1" | LC_ALL=C sort; }
exported=$(nm -D --defined-only "$library" | awk '{ print $3 }' | LC_ALL=C sort)
experimental=$(names "$source/abi/symbols-experimental.txt")
stable=$(LC_ALL=C comm -23 <(echo "$exported") <(echo "$experimental"))
if ! diff <(names "$source/abi/symbols.txt") <(echo "$stable"); then
  echo "FAILED: abi/symbols.txt (<) and the exports of $library (>) differ"
  exit 1
fi
if echo "$exported" | grep -v '^fkda_'; then
  echo "FAILED: $library exports names without the prefix fkda_"
  exit 1
fi
extra=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' |
  grep -vxE 'lib(c|m|pthread)\.so\.[0-9]+|ld-linux.*' || true)
if [ -n "$extra" ]; then
  echo "FAILED: $library needs more than libc, libm and libpthread: $extra"
  exit 1
fi
echo "$(wc -l <<<"$exported") symbols, as listed"
