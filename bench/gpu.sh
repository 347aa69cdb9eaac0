#!/usr/bin/env bash
# Everything that needs one CUDA GPU, unattended, in parts of under ten minutes each:
#   bash bench/gpu.sh         the kernels' check, the 30B model at full depth on one GPU (where 130 GiB
#                             are there), the race of the experts against their peers, GPU tests, a run
#   STEPS=1 bash bench/gpu.sh packed and long documents at full depth, the ladder, FP8, the breakdown
#   TUNE=1 bash bench/gpu.sh  a new table of tiles (tiles.json, to replace
#                             monkey_patch/kernels/scatter_moe/triton/tiles.json)
#   OUT=/tmp/out bash bench/gpu.sh --fake   any of these at tiny size on a CPU, into /tmp/out/fake, to
#                             try the script: its files carry a mark, README's tables refuse them
# Steps come in the order of their worth and go on whatever became of those before: one that fails is
# told, one that hangs is ended at its limit with all that it started. Results go to $OUT (default
# bench/results/gpu): one JSON per benchmark, the race's table ops.md, gpu.log with all that was
# printed, and summary.txt, rewritten with every step: each result file as written, failed or not run.
# BUNDLE=1 packs the results into $OUT/results.tar.gz instead, for machines that give few files back.
# `python bench/ladder.py --table` writes them into README.md; fp8_measured.json is to replace
# qwen3_sft/model/fp8_measured.json. Exit code 0: all is there; 1: something is missing; 3: no GPU.
# It uses the Python that is active (or PYTHON); see environment.sh for making one. On a machine
# without a network, bench/carry.sh packs beforehand what is missing there. TOTAL is the seconds for
# all steps together, of which each has its part.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
readonly WHOLE=585 # what the steps' limits are parts of
part="${STEPS:+_steps}${TUNE:+_tune}"

refuse() { # CODE MESSAGE
  echo "bench/gpu.sh: $2" >&2
  exit "$1"
}
out="${OUT:-bench/results/gpu}"
total="${TOTAL:-$WHOLE}"
fake=""
if [ "$*" = --fake ]; then
  fake=1
  total="${TOTAL:-$((2 * WHOLE))}" # where it is tried, others work too
  measured="$(realpath -m bench/results)"
  case "$(realpath -m "$out")/" in
    "$measured"/*) refuse 2 "--fake needs OUT=FOLDER: $measured is for what was measured" ;;
  esac
  out="$out/fake"
  export CUDA_VISIBLE_DEVICES=""
  export BENCH_MARK="fake: tiny sizes on a CPU, where GPU tests are only collected"
elif [ -n "$*" ]; then
  refuse 2 "$*: the only argument is --fake"
elif ! gib="$(timeout -k 5 90 "$python" -c \
  'import torch; print(torch.cuda.mem_get_info()[1] >> 30)' 2>/dev/null)"; then
  refuse 3 "no CUDA GPU (or no torch that sees one) on this machine; nothing was run"
fi

trap '' HUP PIPE # a terminal or a reader that goes away ends nothing
scratch="$(mktemp -d)" || refuse 3 "no temporary folder"
trap 'rm -rf "$scratch"' EXIT
results="$out"
if [ -n "${BUNDLE:-}" ]; then results="$scratch/results"; fi
mkdir -p "$out" "$results" || refuse 3 "$out: cannot be written"
log="$out/gpu$part.log"
summary="$out/summary$part.txt"
: >"$log"
stamp="$scratch/stamp"
touch "$stamp" # what is older is of an earlier run

names=()          # of the steps, in their order
declare -A files  # by step: the result files that it writes, under $results
declare -A ending # by step: what became of it; "ok" where all is well
phase=list
failed=0
current=""
packages="" # that are missing

processes_of() { # STEP: all that it started, in whatever session or group they are
  # Not by grep's exit code: others end while it reads.
  grep -lzxF "BENCH_STEP=$scratch/$1" /proc/[0-9]*/environ 2>/dev/null | cut -d / -f 3 || true
}

end_processes() { # STEP: at once; what hangs in the driver is left behind
  local tries=0 found
  while ((tries++ < 20)) && found="$(processes_of "$1")" && [ -n "$found" ]; do
    # shellcheck disable=SC2086 # one word per process
    kill -KILL $found 2>/dev/null
    sleep 0.1
  done
}

bundle() {
  if [ -z "${BUNDLE:-}" ]; then return; fi
  tar -C "$results" -czf "$out/results.tar.gz.partial" . 2>/dev/null
  mv -f "$out/results.tar.gz.partial" "$out/results.tar.gz"
}

summarize() {
  local name file lacking="" bad="" said
  {
    echo "bench/gpu.sh${STEPS:+, steps}${TUNE:+, tune}: $SECONDS s of $total${BENCH_MARK:+; $BENCH_MARK}"
    for name in "${names[@]}"; do
      said="${ending[$name]}"
      case "$said" in ok | "not run"* | "is running") ;; *) bad+=" $name" ;; esac
      for file in ${files[$name]}; do
        if [ -s "$results/$file" ] && [ "$results/$file" -nt "$stamp" ]; then
          if [ "$said" = ok ]; then echo "written  $file"; else
            echo "written  $file, but $name $said"
          fi
          continue
        fi
        lacking+=" $file"
        case "$said" in
          "not run"*) echo "not run  $file:${said#not run:}" ;;
          "is running") echo "running  $file: $name" ;;
          ok) echo "failed   $file: $name ended well without it" ;;
          *) echo "failed   $file: $name $said" ;;
        esac
      done
    done
    if [ -n "$packages" ]; then echo "not installed: $packages"; fi
    echo "missing:${lacking:- nothing}${bad:+; failed:$bad}"
  } >"$summary.partial"
  mv -f "$summary.partial" "$summary"
  bundle
}

# shellcheck disable=SC2329 # the traps call it
stopped() { # CODE: from outside
  if [ -n "$current" ]; then
    ending[$current]="was stopped from outside"
    end_processes "$current"
  fi
  end_processes compiling
  summarize
  cat "$summary"
  exit "$1"
}
trap 'stopped 143' TERM
trap 'stopped 130' INT

limited() { # STEP SECONDS COMMAND...: fills `ending`; the output goes to the log
  local name="$1" limit="$2" begin="$SECONDS" from pid code=0 waited=0 last
  shift 2
  from="$(stat -c %s "$log")"
  echo "=== $name: $*" >>"$log"
  set -m # a group of its own, in which SIGINT is not ignored
  BENCH_STEP="$scratch/$name" "$@" >>"$log" 2>&1 </dev/null &
  set +m
  pid="$!"
  while kill -0 "$pid" 2>/dev/null && ((SECONDS - begin < limit)); do
    sleep 0.1
    if ((++waited % 150 == 0)); then bundle; fi
  done
  if kill -0 "$pid" 2>/dev/null; then
    ending[$name]="hung, ended after $limit s"
    kill -INT -- "-$pid" 2>/dev/null # Python writes what it has
    for ((waited = 0; waited < 30; waited++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    disown "$pid" 2>/dev/null
  else
    wait "$pid" 2>/dev/null
    code="$?"
    ending[$name]=ok
    if ((code)); then ending[$name]="failed (exit $code after $((SECONDS - begin)) s)"; fi
  fi
  end_processes "$name"
  last="$(tail -c "+$((from + 1))" "$log" | tail -n +2 | grep -v '^[[:space:]]*$' | tail -n 1)"
  if [ "${ending[$name]}" != ok ]; then ending[$name]+=": ${last:0:300}"; fi
}

step() { # NAME SECONDS "FILE..." COMMAND...
  local name="$1" limit=$(($2 * total / WHOLE)) left=$((total - SECONDS)) file
  if [ "$phase" = list ]; then
    names+=("$name")
    files[$name]="$3"
    ending[$name]="not run: not reached"
    return
  fi
  shift 3
  if ((limit < 1)); then limit=1; fi
  if ((left < 1 || left < 5 * total / WHOLE)); then
    ending[$name]="not run: out of time"
  else
    if ((limit > left)); then limit="$left"; fi
    echo "=== $name (at most $limit s, $left left)"
    current="$name"
    ending[$name]="is running"
    summarize
    limited "$name" "$limit" "$@"
    current=""
  fi
  for file in ${files[$name]}; do
    if [ ! -s "$results/$file" ] || [ ! "$results/$file" -nt "$stamp" ]; then failed=1; fi
  done
  if [ "${ending[$name]}" != ok ]; then
    echo "    ${ending[$name]}"
    failed=1
  fi
  summarize
}

# On a CPU the sizes come last: they replace those before them.
tiny=() cut="full=14,selective=34" rungs=(baseline liger packing scatter_moe router selective compile
  attention fp8)
check_more=() race_more=() run_more=() tune_more=() interpreted=()
racers=(ours sonicmoe liger scattermoe)
fp8_files="fp8.json fp8_measured.json" fp8_more=(--write "$results/fp8_measured.json")
if [ -n "$fake" ]; then
  tiny=(--model demo --layers 4 --max_length 64 --batch 2 --document_tokens 24 --warm_up 1 --steps 1)
  cut="full=1,selective=3" rungs=(baseline packing) racers=(ours)
  check_more=(-m "gpu or kernel"
    "tests/monkey_patch/kernels/test_scatter_moe_stages.py::test_a_library_product_gives_the_same")
  race_more=(--tokens 24 --routing uniform --only ours)
  run_more=(--max_steps 2 --max_length 256)
  tune_more=(--tokens 32 --stages up --candidates 2 --workers 1)
  interpreted=(env TRITON_INTERPRET=1)
  fp8_files=fp8.json fp8_more=() # a CPU emulates it and has no row in the table
fi

kernels_check() { # what the figures rest on; without it none is to be believed
  step check 55 check.xml "$python" -m pytest -m gpu -v -p no:cacheprovider \
    -o junit_suite_name="${BENCH_MARK:-pytest}" --junitxml "$results/check.xml" \
    tests/gpu/test_cuda_scatter_moe.py::test_the_layer_of_qwen3_30b \
    tests/gpu/test_cuda_scatter_moe.py::test_two_runs_are_bit_equal \
    tests/gpu/test_cuda.py::test_varlen_attention tests/gpu/test_cuda.py::test_linear_cross_entropy \
    "tests/gpu/test_cuda_router.py::test_agrees_with_the_definition[32768-1-128-8-dtype0-True]" \
    "${check_more[@]}"
  if [ "$phase" = run ] && [ "${ending[check]}" != ok ]; then
    export BENCH_MARK="${BENCH_MARK:+$BENCH_MARK; }the kernels' check did not pass before this"
  fi
}

full_depth() { # NAME SECONDS OPTION...: all 48 layers, 8-bit states, updated in the backward pass
  local name="$1" limit="$2"
  shift 2
  if [ "$phase" = run ] && [ -z "$fake" ] && ((gib < 130)); then
    ending[$name]="not run: the 30B model at full depth needs 130 GiB, this GPU has $gib"
    return
  fi
  step "$name" "$limit" "$name.json" "$python" bench/step.py --model 30b --dtype bfloat16 \
    --optim adamw_torch_8bit --optimizer_in_backward --clip per_tensor \
    --out "$results/$name.json" "$@" "${tiny[@]}"
}

compile_race() { # Takes processors and little of the GPU: beside the check, not beside a figure.
  for name in "${racers[@]}"; do
    BENCH_STEP="$scratch/compiling" "$python" bench/ops.py --compile --only "$name" --seconds 55 \
      --case_seconds 55 >>"$scratch/compiling.log" 2>&1 </dev/null &
    disown "$!"
  done
}

hour() { # the default part
  if [ "$phase" = run ]; then compile_race; fi
  kernels_check
  if [ "$phase" = run ]; then
    end_processes compiling
    cat "$scratch/compiling.log" >>"$log"
  fi
  full_depth headline_4096 125 --max_length 4096 --batch 4 --lengths fixed \
    --activation_checkpointing "$cut"
  step ops 185 "ops.json ops.md" "$python" bench/ops.py --seconds 180 --out "$results/ops.json" \
    --table "$results/ops.md" "${race_more[@]}"
  step tests 160 tests.xml "$python" -m pytest -m gpu -v -p no:cacheprovider \
    -o junit_suite_name="${BENCH_MARK:-pytest}" --junitxml "$results/tests.xml" \
    tests/gpu tests/monkey_patch/kernels/test_aot.py tests/test_hardware.py
  step demo_run 40 demo_run.json "$python" bench/demo_run.py --out "$results/demo_run.json" \
    "${run_more[@]}"
}

steps() { # 4 layers are 3.2 billion parameters: 48 GiB with float32 AdamW
  local four=(--model 30b --layers 4 --max_length 4096 --batch 4 --dtype autocast)
  kernels_check
  full_depth headline_packed 85 --max_length 4096 --batch 4 --lengths packed \
    --document_tokens 577 --activation_checkpointing "$cut"
  full_depth headline_32k 65 --max_length 32768 --lengths fixed --warm_up 2 --steps 4 \
    --activation_checkpointing full --activation_offload
  full_depth headline_128k 75 --max_length 131072 --lengths fixed --warm_up 1 --steps 1 \
    --activation_checkpointing full --activation_offload
  step ladder 174 "$(printf 'ladder/%s.json ' "${rungs[@]}")" "$python" bench/ladder.py --run \
    --seconds 160 --folder "$results/ladder" --rows "${rungs[@]}" "${four[@]}" "${tiny[@]}"
  # The table of the tree, and this GPU's row; as old as it is until that is written.
  if [ -z "$fake" ]; then cp -p qwen3_sft/model/fp8_measured.json "$results"; fi
  step fp8 70 "$fp8_files" "$python" bench/fp8.py --model 30b --layers 6 --max_length 4096 --batch 4 \
    --dtype bfloat16 --out "$results/fp8.json" "${fp8_more[@]}" "${tiny[@]}"
  step step_breakdown 40 step_breakdown.json "$python" bench/step.py "${four[@]}" \
    --rows ours transformers --breakdown --out "$results/step_breakdown.json" "${tiny[@]}"
}

tune() { # a run of its own, which ends with a new table of tiles
  kernels_check
  step tune 500 "tune_scatter_moe.json tiles.json" "${interpreted[@]}" "$python" \
    bench/tune_scatter_moe.py --seconds 480 --out "$results/tune_scatter_moe.json" \
    --write "$results/tiles.json" "${tune_more[@]}"
}

plan() {
  if [ -n "${TUNE:-}" ]; then tune; elif [ -n "${STEPS:-}" ]; then steps; else hour; fi
}
plan # lists the steps, so that a summary names all of them from the start
summarize

if [ -z "$fake" ] && [ -f .carry/packages.tar.xz ]; then
  carried="$scratch/carried"
  if timeout -k 5 90 "$python" -c \
    'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
    .carry/packages.tar.xz "$carried"; then
    export PYTHONPATH="$PYTHONPATH:$carried/site" BENCH_PEERS="$carried/peers"
  else
    echo "=== .carry/packages.tar.xz cannot be unpacked"
  fi
fi
# A step that needs what is missing fails by itself; the others need not wait for it.
packages="$(timeout -k 5 60 "$python" - <<'PYTHON'
import importlib.util
names = "transformers accelerate datasets trl tokenizers tiktoken safetensors xxhash psutil pyarrow filelock yaml pytest liger_kernel torchao"
print(*(name for name in names.split() if importlib.util.find_spec(name) is None))
PYTHON
)"
if [ -n "$packages" ]; then
  echo "=== not installed: $packages (pip install -c constraints.txt -e '.[dev]')"
fi

phase=run
plan
summarize
for file in "$results"/*.md "$results"/headline_*.json; do
  if [ "$file" -nt "$stamp" ]; then cat "$file"; fi
done
cat "$summary"
exit "$failed"
