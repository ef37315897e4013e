#!/bin/sh
# The command line from outside: help, exit codes, hostile files, a round trip.
#
#   test_cli.sh FLASHKDA [PYTHON]     PYTHON checks JSON, if given
#
# SPDX-License-Identifier: MIT
set -u

flashkda=$1
python=${2:-}
dir=$(mktemp -d "${TMPDIR:-/tmp}/fkda_cli_XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
failed=0
count=0

fail() {
  echo "FAILED: $*" >&2
  failed=$((failed + 1))
}

# expect STATUS ARGUMENT...: runs flashkda, output to $dir/out and $dir/err.
expect() {
  wanted=$1
  shift
  count=$((count + 1))
  "$flashkda" "$@" >"$dir/out" 2>"$dir/err"
  status=$?
  if [ "$status" -ne "$wanted" ]; then
    fail "flashkda $*: exit status $status, expected $wanted"
    cat "$dir/err" >&2
  elif [ "$wanted" -ne 0 ] && ! [ -s "$dir/err" ]; then
    case "$*" in
      *check*) ;; # failed cases are its output
      *) fail "flashkda $*: no message on stderr" ;;
    esac
  fi
}

# has FILE TEXT: what the last command said.
has() {
  grep -q -e "$2" "$dir/$1" || fail "no \"$2\" on $1 of the last command: $(head -5 "$dir/$1")"
}

json() {
  if [ -n "$python" ]; then
    "$python" -c 'import json, sys; json.load(open(sys.argv[1]))' "$dir/out" || fail "not JSON: $1"
  fi
}

# ---- help, version, usage ---------------------------------------------------------------------------

expect 0 --help
has out "Usage: flashkda"
expect 0 --version
has out '^flashkda [0-9]*\.[0-9]*\.[0-9]*$'
for command in info make run check bench; do
  expect 0 "$command" --help
  has out "Usage: flashkda $command"
  [ -s "$dir/err" ] && fail "$command --help writes to stderr"
  expect 2 "$command" --no-such-option
  expect 2 "$command" surplus arguments here
done
expect 2
has err "no command"
expect 2 frobnicate
has err "frobnicate"
expect 2 run
expect 2 run --threads 0 x
expect 2 run --threads many x
expect 2 run --repeat 0 x
expect 2 run --backend nonsense x
has err "nonsense"
expect 2 make
has err "FILE is missing"
expect 2 make -o "$dir/x" --lens 1,,2
expect 2 make -o "$dir/x" --lens ''
expect 2 make -o "$dir/x" --dtype int32
expect 2 make -o "$dir/x" --gate soft
expect 2 make -o "$dir/x" --heads 3 --value-heads 4
expect 2 check --backend nonsense
expect 2 check --backend reference,nonsense
expect 2 check --backend reference,
expect 2 check --case 'no/such*'
expect 2 check --case 'gate/*' --save "$dir/x"
expect 2 bench --preset nonsense
expect 2 bench --gate soft
expect 2 bench --threads 0
expect 2 bench --rounds 0
[ -e "$dir/x" ] && fail "wrong usage wrote a file"

# ---- info -------------------------------------------------------------------------------------------

expect 0 info
has out "reference"
has out "prefill of"
expect 0 info --json
json info
expect 0 info --json
has out '"backends"'

# ---- make, run: a round trip ------------------------------------------------------------------------

expect 0 make -o "$dir/in.safetensors" --lens 30,0,17,64 --heads 2 --value-heads 4 --dim 64 --seed 3
expect 0 make -o "$dir/again.safetensors" --lens 30,0,17,64 --heads 2 --value-heads 4 --dim 64 --seed 3
cmp -s "$dir/in.safetensors" "$dir/again.safetensors" || fail "make: the same seed, another file"
expect 0 make -o "$dir/again.safetensors" --lens 30,0,17,64 --heads 2 --value-heads 4 --dim 64 --seed 4
cmp -s "$dir/in.safetensors" "$dir/again.safetensors" && fail "make: another seed, the same file"
expect 0 run "$dir/in.safetensors" --check -o "$dir/out.safetensors" --repeat 3
has out "lengths  30 0 17 64"
has out "tokens/s"
has out "reference: ok"
[ -s "$dir/out.safetensors" ] || fail "run -o wrote nothing"
grep -q '"final_state":{"dtype":"F32","shape":\[4,4,64,64\]' "$dir/out.safetensors" || fail "no final_state"
expect 0 run "$dir/in.safetensors" -o "$dir/one.safetensors" --threads 1
cmp -s "$dir/out.safetensors" "$dir/one.safetensors" || fail "run: one thread, other bits"
expect 0 run "$dir/in.safetensors" --check --json --final-state-dtype bfloat16 --state-layout kv
has out '"passed": true'
json run
expect 0 run "$dir/in.safetensors" --final-state-dtype none -o "$dir/none.safetensors"
grep -q final_state "$dir/none.safetensors" && fail "final_state written in spite of none"
expect 0 run "$dir/in.safetensors" --checkpoint-every 16 -o "$dir/marks.safetensors" --check
grep -q '"checkpoint_state":{"dtype":"F32","shape":\[8,4,64,64\]' "$dir/marks.safetensors" || fail "no checkpoints"
for backend in $("$flashkda" info | sed -n 's/^  \([a-z0-9-]*\) *available$/\1/p'); do
  expect 0 run "$dir/in.safetensors" --backend "$backend" --check
  has out "backend  $backend"
done
expect 0 run "$dir/in.safetensors" --gate softplus --check
expect 0 make -o "$dir/f32.safetensors" --lens 40 --heads 1 --dtype float32 --gate weak --initial-state
expect 0 run "$dir/f32.safetensors" --check --in-place 1
expect 0 run "$dir/f32.safetensors" --check --l2norm 0 --scale 0.5 --lower-bound=-2

# Options that the library refuses, with its message.
expect 1 run "$dir/in.safetensors" --lower-bound=-6
has err "lower_bound"
expect 1 run "$dir/in.safetensors" --gate sigmoid
has err "bounded, softplus or direct"
expect 1 run "$dir/in.safetensors" --op fly
expect 1 run "$dir/in.safetensors" --scale wide
expect 1 run "$dir/in.safetensors" --l2norm maybe
expect 1 run "$dir/in.safetensors" --gate direct
expect 1 run "$dir/in.safetensors" --checkpoint-every 7
expect 1 run "$dir/in.safetensors" --final-state-dtype int8
expect 1 run "$dir/in.safetensors" --op decode
expect 1 run "$dir/in.safetensors" -o "$dir/missing/out"
has err "missing/out"

# ---- saved cases run like any file ------------------------------------------------------------------

expect 0 check --list
has out "gate/"
expect 0 check --list --json --case 'shapes/T1*'
json list
mkdir "$dir/cases"
for pattern in 'indices/permuted*' 'decode/2d_*f32_T3*' 'summary/bounded*' 'checkpoints/offsets_to_bf16*' \
  'states/kv_in_place*' 'ragged/mixed_tail*' 'strides/fused_*' 'decode/no_write*'; do
  expect 0 check --case "$pattern" --save-dir "$dir/cases"
done
for file in "$dir"/cases/*.safetensors; do
  expect 0 run "$file" --check --backend reference
done
expect 0 check --case 'shapes/T33_f32' --save "$dir/case.safetensors"
grep -q '"gold.out":{"dtype":"F64"' "$dir/case.safetensors" || fail "no gold in a saved case"
expect 0 run "$dir/case.safetensors" --check

# ---- check ------------------------------------------------------------------------------------------

expect 0 check --list --case 'shapes/T1_f32' --case 'shapes/T2_*'
[ "$(wc -l <"$dir/out")" = 3 ] || fail "check: two patterns"
expect 0 check --case 'shapes/T17*'
has out ' passed, 0 failed$'
[ "$(tail -n 1 "$dir/out" | grep -c '^[0-9]* passed, 0 failed$')" = 1 ] || fail "check: last line"
expect 0 check --backend cpu-scalar,reference --case 'shapes/T1_f32'
for backend in cpu-scalar reference; do
  [ "$(grep -c "^$backend$" "$dir/out")" = 1 ] || fail "check: $backend once"
done
has out '^2 passed, 0 failed$'
expect 0 check --backend reference --case 'gate/bounded_raw0*' --json
json check
has out '"failed": 0'

# ---- hostile files ----------------------------------------------------------------------------------

expect 1 run "$dir/nothing.safetensors"
expect 1 run "$dir"
: >"$dir/empty"
expect 1 run "$dir/empty"
printf '\377\377\377\377\377\377\377\377' >"$dir/long"
expect 1 run "$dir/long"
head -c 100 "$dir/in.safetensors" >"$dir/cut"
expect 1 run "$dir/cut"
head -c -1 "$dir/in.safetensors" >"$dir/short"
expect 1 run "$dir/short"
has err "$dir/short"

# header TEXT DATA_BYTES: a file of that header
header() {
  length=${#1}
  low=$(printf '%03o' $((length % 256)))
  high=$(printf '%03o' $((length / 256)))
  printf "\\$low\\$high\\0\\0\\0\\0\\0\\0" >"$dir/hostile"
  printf '%s' "$1" >>"$dir/hostile"
  head -c "$2" /dev/zero >>"$dir/hostile"
}
empty='"data_offsets":[0,0]}'
header '{"nonsense":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' 4
expect 1 run "$dir/hostile"
has err "nonsense"
header '{}' 0
expect 1 run "$dir/hostile"
has err "missing"
header '{"__metadata__":{"op":"decode"}}' 0
expect 1 run "$dir/hostile"
header '{"k":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' 4
expect 1 run "$dir/hostile"
header '{"k":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}' 1
expect 1 run "$dir/hostile"
# Huge sizes next to a zero: nothing to read, much to allocate.
big=4611686018427387904
header "{\"k\":{\"dtype\":\"F32\",\"shape\":[0,0,1,$big],$empty,\"v\":{\"dtype\":\"F32\",\"shape\":[0,$big,$big,$big],$empty}" 0
expect 1 run "$dir/hostile"
header "{\"k\":{\"dtype\":\"F32\",\"shape\":[$big,0,1,$big],$empty,\"v\":{\"dtype\":\"F32\",\"shape\":[$big,0,$big,$big],$empty}" 0
expect 1 run "$dir/hostile"
expect 1 run "$dir/hostile" --op summary
expect 1 run "$dir/hostile" --checkpoint-every 16
# cu_seqlens that lie, indices beyond every pool
inputs='"q":{"dtype":"F32","shape":[1,2,1,1],"data_offsets":[32,40]},"k":{"dtype":"F32","shape":[1,2,1,1],"data_offsets":[40,48]},"v":{"dtype":"F32","shape":[1,2,1,1],"data_offsets":[48,56]},"g":{"dtype":"F32","shape":[1,2,1,1],"data_offsets":[56,64]},"beta":{"dtype":"F32","shape":[1,2,1],"data_offsets":[64,72]}'
numbers() {
  header "{\"cu_seqlens\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[0,16]},\"final_state_indices\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[16,24]},\"checkpoint_state_indices\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[24,32]},$inputs}" 0
  printf "$1" >>"$dir/hostile"
  head -c 40 /dev/zero >>"$dir/hostile"
}
zero='\0\0\0\0\0\0\0\0'
two='\2\0\0\0\0\0\0\0'
minus='\377\377\377\377\377\377\377\377'
large='\377\377\377\377\377\377\377\177'
numbers "$zero$two$zero$zero"
expect 0 run "$dir/hostile" --checkpoint-every 16 --check
numbers "$zero$large$zero$zero"
expect 1 run "$dir/hostile" --checkpoint-every 16
numbers "$two$zero$zero$zero"
expect 1 run "$dir/hostile" --checkpoint-every 16
numbers "$zero$minus$zero$zero"
expect 1 run "$dir/hostile" --checkpoint-every 16
numbers "$zero$two$large$zero"
expect 1 run "$dir/hostile" --checkpoint-every 16
numbers "$zero$two$zero$large"
expect 1 run "$dir/hostile" --checkpoint-every 16

# ---- bench ------------------------------------------------------------------------------------------

expect 0 bench --T 128 --heads 2 --dim 64 --seconds 0 --no-sgemm --threads 1,2 --json "$dir/bench.json"
has out "T128_H2"
cp "$dir/bench.json" "$dir/out"
json bench
has out '"rows"'
if [ -n "$python" ]; then # a pair of every round: both numbers of threads, and for decode what memory does
  expect 0 bench --decode 2 --heads 1 --seconds 0 --rounds 3 --threads 1,2 --no-check --json "$dir/decode.json"
  "$python" - "$dir/bench.json" "$dir/decode.json" <<'EOF' || fail "bench: rounds and ratios"
import json, statistics, sys
prefill, decode = (json.load(open(path))["rows"] for path in sys.argv[1:])
one, two = decode
assert [len(row["ms_rounds"]) for row in prefill + decode] == [5, 5, 3, 3]
assert not prefill[1]["sgemm_ratio_rounds"] and prefill[1]["sgemm_ratio"] is None
assert not one["speedup_rounds"] and len(two["speedup_rounds"]) == 3
close = lambda x, y: abs(x / y - 1) < 1e-4
for i in range(3):
    assert close(two["speedup_rounds"][i], one["ms_rounds"][i] / two["ms_rounds"][i])
    moved = 2 * 2 * 128 * 128 * 4 / 1e6  # N, a state read and written
    assert close(two["memory_ratio_rounds"][i], moved / two["ms_rounds"][i] / two["memory_gbps_rounds"][i])
assert close(two["memory_ratio"], statistics.median(two["memory_ratio_rounds"]))
EOF
fi
expect 0 bench --T 32 --heads 1 --seconds 0 --no-sgemm --threads 1 --json -
json "bench to standard output"
has out '"rows"'
expect 0 bench --decode 4 --heads 2 --seconds 0 --no-sgemm --threads 1
has out "decode_N4"
expect 0 bench --lens 40,0,33 --heads 2 --value-heads 4 --dtype float32 --seconds 0 --no-sgemm --threads 1 --backend all

if [ -c /dev/full ] && "$flashkda" --version >/dev/full 2>/dev/null; then fail "--version to a full device succeeds"; fi

echo "$count commands, $failed failures"
[ "$failed" -eq 0 ]
