#!/usr/bin/env bash
# A family's entry points: the same for every architecture, and those that entry_points.txt lists. A new one
# is a decision, made there. Usage: test_entry_points.sh LIST FAMILY "ARCHITECTURE..." LOG... (ptxas -v)
set -euo pipefail
list=$1
family=$2
architectures=$3
shift 3
listed() { grep "^fkda_${family}_" "$list" | sort; }
for arch in ${architectures//;/ }; do
  sed -n "s/.*Compiling entry function '\(.*\)' for 'sm_$arch'.*/\1/p" "$@" | sort |
    diff --label "$list" --label "sm_$arch" <(listed) - || { echo "sm_$arch: entry points differ"; exit 1; }
done
compiled=$(cat "$@" | grep -c "Compiling entry function")
expected=$(($(listed | wc -l) * $(wc -w <<<"${architectures//;/ }")))
[ "$compiled" = "$expected" ] || { echo "$compiled entry points compiled, expected $expected"; exit 1; }
echo "$(listed | wc -l) entry points of $family for each of: $architectures"
