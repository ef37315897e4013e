#!/usr/bin/env bash
# What the README shows a newcomer: its code blocks are the files below examples/, and the C one compiles
# against an installed copy with pkg-config and with find_package, and runs.
# Usage: test_readme.sh SOURCE_DIR BUILD_DIR
set -euo pipefail
source=$1 build=$2
work=$build/test_readme
rm -rf "$work" && mkdir -p "$work"
cc=${CC:-cc} cxx=${CXX:-c++}

fail() { echo "FAILED: $*"; exit 1; }

# block LANGUAGE: the first fenced block of that language.
block() { awk -v start="\`\`\`$1" '$0 == start { on = 1; next } on && $0 == "```" { exit } on' "$source/README.md"; }
block c >"$work/readme.c"
block python >"$work/readme.py"
diff "$work/readme.c" "$source/examples/prefill.c" || fail "README's C block is not examples/prefill.c"
diff "$work/readme.py" "$source/examples/prefill.py" || fail "README's Python block is not examples/prefill.py"

prefix=$work/prefix
cmake --install "$build" --prefix "$prefix" >/dev/null
libdir=$(dirname "$(find "$prefix" -name libflashkda.so)")
export PKG_CONFIG_PATH=$libdir/pkgconfig LD_LIBRARY_PATH=$libdir

# The example's result: a plan that names a backend, and finite numbers.
runs() {
  local output
  output=$("$@") || fail "$1: exit status $?"
  grep -qE 'cpu-|reference' <<<"$output" || fail "$1 names no backend: $output"
  grep -qE '^out\[0,0,0,0\] = -?[0-9.]+, final_state\[0,0,0,0\] = -?[0-9.]+$' <<<"$output" ||
    fail "$1 prints no result: $output"
}

# pkg-config, shared and static, as strict C11.
strict=(-std=c11 -Wall -Wextra -Wpedantic -Werror)
read -ra flags <<<"$(pkg-config --cflags --libs flashkda)"
"$cc" "${strict[@]}" "$source/examples/prefill.c" "${flags[@]}" -o "$work/prefill"
runs "$work/prefill"
"$cc" "${strict[@]}" "$source/examples/serving.c" "${flags[@]}" -o "$work/serving"
"$work/serving" --requests 20 >/dev/null || fail "examples/serving.c"
"$cc" "${strict[@]}" "$source/examples/decode.c" "${flags[@]}" -lm -o "$work/decode"
"$work/decode" >/dev/null || fail "examples/decode.c"
read -ra flags <<<"$(pkg-config --cflags flashkda)"
private=$(pkg-config --static --libs-only-other --libs-only-l flashkda)
read -ra private <<<"${private/-lflashkda/}"
"$cc" "${strict[@]}" "$source/examples/prefill.c" "${flags[@]}" "$libdir/libflashkda.a" \
  "${private[@]}" -o "$work/prefill_static"
runs "$work/prefill_static"
[ "$(pkg-config --modversion flashkda)" = "$("$prefix/bin/flashkda" --version | grep -oE '[0-9]+\.[0-9]+\.[0-9]+')" ] ||
  fail "flashkda.pc and the command line differ on the version"

# The header alone, as C and as C++.
for standard in c11 c17; do
  echo '#include <flashkda/flashkda.h>' |
    "$cc" -std=$standard -Wall -Wextra -Wpedantic -Werror "${flags[@]}" -fsyntax-only -xc -
done
for standard in c++11 c++17 c++20; do
  echo '#include <flashkda/flashkda.h>' |
    "$cxx" -std=$standard -Wall -Wextra -Wpedantic -Werror "${flags[@]}" -fsyntax-only -xc++ -
done

# find_package.
cmake -S "$source/tests/consumer" -B "$work/consumer" -DCMAKE_PREFIX_PATH="$prefix" \
  -DEXAMPLE="$source/examples/prefill.c" >/dev/null
cmake --build "$work/consumer" >/dev/null
runs "$work/consumer/prefill_flashkda"
runs "$work/consumer/prefill_flashkda_static"
"$work/consumer/version" >/dev/null || fail "C++ consumer"
echo "README, pkg-config and find_package: ok"
