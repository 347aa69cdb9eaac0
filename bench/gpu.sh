#!/usr/bin/env bash
# Everything that needs one CUDA GPU, in under 10 minutes: the GPU tests, the race of the experts
# against their peers, then whole steps. Results go to $OUT (default bench/results/gpu): one JSON per
# benchmark, the race's table ops.md, and gpu.log with all that was printed. It uses the Python that
# is active; see environment.sh for making one. With TUNE=1 it writes a new table of tiles instead
# (tiles.json, to replace monkey_patch/kernels/scatter_moe/triton/tiles.json). On a machine without
# a network, bench/carry.sh packs beforehand what is missing there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
TOTAL=585 # seconds for all steps together

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "bench/gpu.sh: no CUDA GPU (or no torch that sees one) on this machine; nothing was run" >&2
  exit 3
fi
if [ -f .carry/packages.tar.xz ]; then
  unpacked="$(mktemp -d)"
  "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
    .carry/packages.tar.xz "$unpacked" || exit 3
  export PYTHONPATH="$PYTHONPATH:$unpacked/site" BENCH_PEERS="$unpacked/peers"
fi
missing="$("$python" - <<'PYTHON'
import importlib.util
names = "transformers accelerate datasets trl tokenizers safetensors xxhash pyarrow filelock yaml pytest liger_kernel"
print(*(name for name in names.split() if importlib.util.find_spec(name) is None))
PYTHON
)"
if [ -n "$missing" ]; then
  echo "bench/gpu.sh: not installed: $missing (pip install -c constraints.txt -e '.[dev]')" >&2
  exit 3
fi
out="${OUT:-bench/results/gpu}"
mkdir -p "$out"
: >"$out/gpu.log"
failed=0

step() { # NAME SECONDS COMMAND...
  local name="$1" limit="$2" left=$((TOTAL - SECONDS)) log
  shift 2
  if ((limit > left)); then limit="$left"; fi
  if ((limit < 5)); then
    echo "=== $name: not run, out of time"
    failed=1
    return
  fi
  echo "=== $name (at most ${limit}s, $left left)"
  log="$(mktemp)"
  if ! timeout -k 5 "$limit" "$@" >"$log" 2>&1; then
    echo "    failed, see $out/gpu.log:"
    tail -n 15 "$log"
    failed=1
  fi
  { echo "=== $name"; cat "$log"; } >>"$out/gpu.log"
  rm "$log"
}

if [ -n "${TUNE:-}" ]; then # a run of its own, which ends with a new table of tiles
  step tests 150 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/gpu/test_cuda_scatter_moe.py
  step tune 420 "$python" bench/tune_scatter_moe.py --seconds 405 \
    --out "$out/tune_scatter_moe.json" --write "$out/tiles.json"
  tail -n 80 "$out/gpu.log"
  exit "$failed"
fi

# Compiling the race's kernels takes processors, not the GPU: it happens beside the tests.
compiling=()
for name in ours sonicmoe liger scattermoe; do
  timeout -k 5 140 "$python" bench/ops.py --compile --only "$name" --seconds 140 --case_seconds 140 \
    >"$out/compile_$name.tmp" 2>&1 &
  compiling+=("$!")
done
step tests 180 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/gpu \
  tests/monkey_patch/test_aot.py tests/test_hardware.py
wait "${compiling[@]}"
for log in "$out"/compile_*.tmp; do
  { echo "=== $log"; cat "$log"; } >>"$out/gpu.log"
  rm "$log"
done
step ops 205 "$python" bench/ops.py --seconds 190 --out "$out/ops.json" --table "$out/ops.md"
# Depths that fit one 141 GB GPU beside fp32 AdamW: 4 layers are 3.2 billion parameters, 48 GiB.
step step_30b_4l_4k 75 "$python" bench/step.py --model 30b --layers 4 --max_length 4096 --batch 4 \
  --dtype autocast --compare --out "$out/step_30b_4l_4k.json"
step step_30b_8l_bf16 80 "$python" bench/step.py --model 30b --layers 8 --max_length 4096 --batch 4 \
  --dtype bfloat16 --compare --out "$out/step_30b_8l_bf16.json"
step step_demo 30 "$python" bench/step.py --model demo --dtype autocast --out "$out/step_demo.json"
step demo_run 40 "$python" -m qwen3_sft.cli train --config config/recipe/demo.yaml \
  --output_dir "$(mktemp -d)/demo"
cat "$out"/step_*.json "$out/ops.md"
exit "$failed"
