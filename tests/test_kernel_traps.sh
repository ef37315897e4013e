#!/usr/bin/env bash
# The oldest architecture's kernels hold no trap and no breakpoint: that is what CUTLASS puts where it has no
# instruction for an architecture, and no test on a newer GPU would run into it.
# Usage: test_kernel_traps.sh DIRECTORY NVCC OPTION...
set -euo pipefail
directory=$1
shift
for source in "$directory"/*.cu; do
  ptx=$("$@" -arch=compute_80 --ptx -o /dev/stdout "$source")
  grep -q '^\.visible \.entry' <<<"$ptx" || { echo "$source: no entry point"; exit 1; }
  if grep -nE '\b(trap|brkpt)\b' <<<"$ptx"; then echo "$source: traps on sm_80"; exit 1; fi
done
echo "no traps"
