#!/usr/bin/env bash
# The kernels' entry points: the same for every architecture, and those that entry_points.txt lists. A new
# one is a decision, made there. Usage: test_entry_points.sh LIST "ARCHITECTURE..." LOG... (ptxas -v)
set -euo pipefail
list=$1
architectures=$2
shift 2
for arch in ${architectures//;/ }; do
  sed -n "s/.*Compiling entry function '\(.*\)' for 'sm_$arch'.*/\1/p" "$@" | sort |
    diff --label "$list" --label "sm_$arch" <(sort "$list") - || { echo "sm_$arch: entry points differ"; exit 1; }
done
compiled=$(cat "$@" | grep -c "Compiling entry function")
expected=$(($(wc -l <"$list") * $(wc -w <<<"${architectures//;/ }")))
[ "$compiled" = "$expected" ] || { echo "$compiled entry points compiled, expected $expected"; exit 1; }
echo "$(wc -l <"$list") entry points for each of: $architectures"
