#!/usr/bin/env bash
# Every check that wants a GPU, and a summary of them: the case table on every CUDA backend that this GPU can
# run, the Python tests on CUDA tensors, compute-sanitizer's four tools over a few small cases of each kind. What
# needs other packages (fla-core and flash-linear-attention, transformers, CuPy, JAX) runs where they are installed;
# the summary says which were there. Without a GPU it says so and does nothing. Exit status 1 if anything failed.
#
#   scripts/gpu_check.sh [SUMMARY.json]     default build/gpu-check.json; logs in build/gpu-check/
#
#   FLASHKDA_BUILD_DIR  a build to use as it is: made elsewhere, with FLASHKDA_CUDA=ON and
#                       FLASHKDA_PYTHON=ON; of it flashkda, libflashkda.so* and python/ are needed
#   FLASHKDA_RACECHECK_BUILD_DIR  the same for racecheck, made with FLASHKDA_CUDA_RACECHECK=ON
#   FLASHKDA_COMMIT     what to call the commit where there is no .git
#   PYTHON              an interpreter with torch (CUDA), numpy, ml_dtypes and pytest (python3)
#   PYTHONPATH          where other packages are, after the build's
set -uo pipefail
here=$PWD
cd "$(dirname "$0")/.." || exit 1
summary=${1:-build/gpu-check.json}
case $summary in /*) ;; *) [ $# -eq 0 ] || summary=$here/$summary ;; esac
python=${PYTHON:-python3}

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  echo "gpu-check: skipped, no NVIDIA GPU here"
  exit 0
fi

title() { printf '\n== %s (%ds)\n' "$*" "$SECONDS"; }

build=${FLASHKDA_BUILD_DIR:-}
if [ -z "$build" ]; then
  build=build/gpu
  title build
  scripts/setup.sh build || exit 1
  cmake -S . -B $build -DCMAKE_BUILD_TYPE=Release -DFLASHKDA_TESTS=OFF -DFLASHKDA_CUDA=ON \
    -DFLASHKDA_PYTHON=ON -DPython_EXECUTABLE="$(command -v "$python")" >build/gpu-configure.log ||
    { cat build/gpu-configure.log; exit 1; }
  cmake --build $build -j "${JOBS:-$(nproc)}" || exit 1
fi
build=$(cd "$build" && pwd) || exit 1
# racecheck sees only arrivals of each thread's own at a barrier: its kernels let every lane arrive.
race_build=${FLASHKDA_RACECHECK_BUILD_DIR:-}
if [ -z "$race_build" ]; then
  race_build=build/gpu-racecheck
  title "build for racecheck"
  cmake -S . -B $race_build -DCMAKE_BUILD_TYPE=Release -DFLASHKDA_TESTS=OFF -DFLASHKDA_CUDA=ON \
    -DFLASHKDA_PYTHON=OFF -DFLASHKDA_CUDA_RACECHECK=ON >build/gpu-racecheck-configure.log ||
    { cat build/gpu-racecheck-configure.log; exit 1; }
  cmake --build $race_build -j "${JOBS:-$(nproc)}" || exit 1
fi
race_build=$(cd "$race_build" && pwd) || exit 1
logs=build/gpu-check
rm -rf $logs && mkdir -p $logs "$(dirname "$summary")" || exit 1
# A build that was made elsewhere looks for the library where it was made.
export LD_LIBRARY_PATH=$build${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$build/python${PYTHONPATH:+:$PYTHONPATH} FLASHKDA_TOOL=$build/flashkda

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem \
  --format=csv,noheader,nounits -i 0 >$logs/device.csv

"$FLASHKDA_TOOL" info | sed -n '/^backends/,/^$/p'
backends=$("$FLASHKDA_TOOL" info | sed -n 's/^  \([a-z0-9-]*\)  *available$/\1/p' |
  grep -vE '^(cpu-.*|reference)$' | paste -sd,)
[ -n "$backends" ] || { echo "gpu-check: no backend runs on this GPU"; exit 1; }

# What has "cuda" in its name; but FLA's model as an example, which tunes its kernels for minutes.
tests() { # NAME SECONDS EXPRESSION FILE...
  local name=$1 seconds=$2 expression=$3
  shift 3
  timeout "$seconds" "$python" -m pytest "${@/#/tests/python/}" -k "$expression" -q -rfE -p no:cacheprovider \
    --durations=5 --junitxml="$logs/$name.xml"
}
# Tests with FLA compile its kernels for the most part: they run beside all that follows.
suites=(python)
rest="(cuda or test_env or test_other) and not fla_model"
if "$python" -c 'import fla.ops.kda' 2>$logs/fla.log; then
  suites+=(python-fla)
  fla='of_fla or fla_trains or test_fla'
  tests python-fla 240 "cuda and ($fla)" test_torch_cuda.py test_fla.py >$logs/python-fla.log 2>&1 &
  rest+=" and not ($fla)"
else
  echo "gpu-check: without flash-linear-attention: $(tail -n 1 $logs/fla.log)"
fi
title "Python tests"
tests python 300 "$rest" \
  test_{cuda,torch_cuda,env,other_libraries,sglang,vllm,transformers,examples,train}.py

sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer)
cases=(
  'gate/bounded_rawU(-8,8)_biasU(-8,8)_bf16' 'gate/softplus_rawswitch_AU(0,log16)_g32_bf16'
  'gate/direct0or-90_bf16' 'numbers/asymmetric_kv_K128_V64_bf16' 'numbers/asymmetric_vk_K64_V128_bf16'
  'options/bounded_l2norm_logit_bf16' 'options/A_log_bf16_dt_bias_bf16_bf16'
  'invariance/crowd_bounded_D128_bf16' 'invariance/crowd_softplus_g32_kv_D128_bf16'
  'shapes/B1_T40_H1_HV1_K128_V128_bf16' 'shapes/T17_bf16' 'ragged/mixed_tail_i32_bf16'
  'strides/misaligned_bf16' 'strides/padded_bf16' 'strides/padded_pool_bf16'
  'indices/out_of_range_bf16' 'indices/apart_skip_has_initial_bf16' 'states/kv_bf16_to_bf16_bf16'
  'checkpoints/packed_to_bf16_slots_bf16' 'checkpoints/every_batch_bf16'
  'decode/bounded_T1_bf16' 'decode/softplus_T8_bf16' 'decode/2d_apart_vk_f32_T3_bf16'
  'decode/out_of_range_kv_bf16_T1_bf16' 'decode/strides5_bf16' 'decode/strides3_bf16'
  'decode/out_of_range_2d_kv_bf16_T3_bf16' 'decode/out_of_range_counts_vk_f32_T3_bf16'
  'decode/draft_bounded_vk_f32_T8_bf16' 'decode/draft_softplus_kv_bf16_T8_bf16' 'ragged/decode_rows_vk_bf16' 'ragged/one_long_i32_bf16'
  'backward/bounded_raw_U(-8,8)_bf16' 'backward/softplus_raw_switch_bf16' 'backward/direct_0_or_-90_bf16'
  'backward/asymmetric_kv_bf16' 'backward/B1_T40_H1_HV1_K128_V128_bf16' 'backward/B2_T50_H2_HV4_K128_V64_bf16'
  'backward/ragged_i32_bf16' 'backward/all_empty_bf16' 'backward/strides_misaligned_bf16'
  'backward/strides_padded_bf16' 'backward/f32_gate_and_gradients_bf16' 'backward/only_d_v_bf16'
  'backward/only_d_dt_bias_bf16' 'backward/T0_bf16' 'backward/collinear_D128_bf16'
  'backward/collinear_heads_bf16'
)
patterns=()
for name in "${cases[@]}"; do patterns+=(--case "$name"); done
sanitize() { # TOOL
  local from=$build
  [ "$1" != racecheck ] || from=$race_build
  LD_LIBRARY_PATH=$from${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} \
    timeout 240 "$sanitizer" --tool "$1" --log-file "$logs/$1.log" \
    "$from/flashkda" check --backend "$backends" --no-guards "${patterns[@]}" --json >"$logs/$1.json"
  echo $? >"$logs/$1.status"
  echo "$1 (${SECONDS}s): $(tail -n 1 "$logs/$1.log")"
}
title "case table on $backends, and at the same time memcheck, racecheck, initcheck, synccheck"
for tool in memcheck racecheck initcheck synccheck; do sanitize $tool & done
timeout 300 "$FLASHKDA_TOOL" check --backend "$backends" --json >$logs/check.json
echo "case table (${SECONDS}s)"
wait
if [ -e $logs/python-fla.log ]; then
  title "Python tests with flash-linear-attention"
  cat $logs/python-fla.log
fi

title summary
commit=${FLASHKDA_COMMIT:-$(git describe --always --dirty --exclude='*' 2>/dev/null)}
"$python" scripts/gpu_summary.py --backends "$backends" --commit "$commit" --sanitized ${#cases[@]} \
  --python "$(IFS=,; echo "${suites[*]}")" $logs "$summary"
status=$?
echo "gpu-check: ${SECONDS} s, $summary"
exit $status
