#!/usr/bin/env bash
# Every test: ctest on the release build, a short fuzz run where clang can, the wheel and pytest.
# Ends with the line 'N passed, N failed'. Nothing stops early, so that the line counts everything.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=${JOBS:-$(nproc)}
results=build/results
scripts/setup.sh test python fla
rm -rf "$results" && mkdir -p "$results"
files=()

title() { printf '\n== %s\n' "$*"; }

# check NAME COMMAND...: a step that is itself one test, recorded as JUnit.
check() {
  local name=$1 outcome=""
  shift
  title "$name"
  "$@" || outcome="<failure/>"
  echo "<testsuite><testcase name=\"$name\">$outcome</testcase></testsuite>" >"$results/$name.xml"
  files+=("$results/$name.xml")
  [ -z "$outcome" ]
}

build() { cmake --preset "$1" >"build/$1-configure.log" || { cat "build/$1-configure.log"; return 1; }
  cmake --build --preset "$1" -j "$jobs"; }

run_ctest() { # PRESET ARGUMENTS...
  local preset=$1
  shift
  files+=("$results/ctest-$preset.xml")
  title "ctest ($preset)"
  ctest --preset "$preset" -j "$jobs" --output-junit "$PWD/$results/ctest-$preset.xml" "$@" || true
}

if check build build release; then run_ctest release; fi

if scripts/has_libfuzzer.sh; then
  if check build-fuzz build fuzz; then run_ctest fuzz; fi
else
  echo "no clang with libFuzzer here: the fuzz targets ran over their seed corpora only"
fi

if check wheel scripts/wheel.sh --install; then
  check readme-python build/venv/bin/python examples/prefill.py || true
  title pytest
  files+=("$results/pytest.xml")
  FLASHKDA_TOOL=$PWD/build/release/flashkda build/venv/bin/python -m pytest tests/python -q -n "$jobs" \
    --dist worksteal --junitxml="$results/pytest.xml" -p no:cacheprovider --durations=10 || true
  title "pytest with $(sed 's/^/fla-core /' tests/python/fla-versions.txt | paste -sd, | sed 's/,/, /g')"
  # Versions side by side, each in a process of its own.
  # shellcheck disable=SC2016 # the inner shell expands
  xargs -P "$jobs" -I VERSION bash -c '
    PYTHONPATH=$PWD/build/fla/VERSION build/venv/bin/python -m pytest -q -p no:cacheprovider \
      tests/python/test_fla.py tests/python/test_examples.py::test_fla_on_the_cpu \
      tests/python/test_transformers.py::test_through_flas_functions \
      --junitxml="$1/pytest-fla-VERSION.xml" >"$1/pytest-fla-VERSION.log" 2>&1
    { echo "fla-core VERSION"; cat "$1/pytest-fla-VERSION.log"; }' _ "$results" \
    <tests/python/fla-versions.txt || true
  while read -r version; do files+=("$results/pytest-fla-$version.xml"); done <tests/python/fla-versions.txt
fi

echo
exec python3 scripts/summary.py "${files[@]}"
