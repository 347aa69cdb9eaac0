#!/usr/bin/env bash
# Everything that needs one CUDA GPU, in parts of under 10 minutes each:
#   bash bench/gpu.sh         the GPU tests, the race of the experts against their peers, and the 30B
#                             model at full depth on one GPU (where 130 GiB are there)
#   STEPS=1 bash bench/gpu.sh the ladder, the breakdown and FP8 at a depth that fits anywhere, packed
#                             and long documents at full depth
#   TUNE=1 bash bench/gpu.sh  a new table of tiles (tiles.json, to replace
#                             monkey_patch/kernels/scatter_moe/triton/tiles.json)
# Results go to $OUT (default bench/results/gpu): one JSON per benchmark, the race's table ops.md, and
# gpu.log with all that was printed; `python bench/ladder.py --table` writes them into README.md. It
# uses the Python that is active; see environment.sh for making one. On a machine without a network,
# bench/carry.sh packs beforehand what is missing there.
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
names = "transformers accelerate datasets trl tokenizers tiktoken safetensors xxhash psutil pyarrow filelock yaml pytest liger_kernel torchao"
print(*(name for name in names.split() if importlib.util.find_spec(name) is None))
PYTHON
)"
if [ -n "$missing" ]; then
  echo "bench/gpu.sh: not installed: $missing (pip install -c constraints.txt -e '.[dev]')" >&2
  exit 3
fi
out="${OUT:-bench/results/gpu}"
mkdir -p "$out"
log_name="gpu${STEPS:+_steps}${TUNE:+_tune}.log"
: >"$out/$log_name"
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
    echo "    failed, see $out/$log_name:"
    tail -n 15 "$log"
    failed=1
  fi
  { echo "=== $name"; cat "$log"; } >>"$out/$log_name"
  rm "$log"
}

if [ -n "${TUNE:-}" ]; then # a run of its own, which ends with a new table of tiles
  step tests 150 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/gpu/test_cuda_scatter_moe.py
  step tune 420 "$python" bench/tune_scatter_moe.py --seconds 405 \
    --out "$out/tune_scatter_moe.json" --write "$out/tiles.json"
  tail -n 80 "$out/$log_name"
  exit "$failed"
fi

gib="$("$python" -c 'import torch; print(torch.cuda.mem_get_info()[1] >> 30)')"
full_depth() { # NAME SECONDS OPTION...: all 48 layers, 8-bit states, updated in the backward pass
  local name="$1" limit="$2"
  shift 2
  if ((gib < 130)); then
    echo "=== $name: not run, the 30B model at full depth needs 130 GiB and this GPU has $gib"
    return
  fi
  step "$name" "$limit" "$python" bench/step.py --model 30b --dtype bfloat16 \
    --optim adamw_torch_8bit --optimizer_in_backward --clip per_tensor \
    --out "$out/$name.json" "$@"
}

if [ -n "${STEPS:-}" ]; then
  # 4 layers are 3.2 billion parameters: 48 GiB with float32 AdamW.
  step ladder 230 "$python" bench/ladder.py --run --model 30b --layers 4 --max_length 4096 --batch 4 \
    --dtype autocast --seconds 215 --folder "$out/ladder"
  step step_breakdown 50 "$python" bench/step.py --model 30b --layers 4 --max_length 4096 --batch 4 \
    --dtype autocast --rows ours transformers --breakdown --out "$out/step_breakdown.json"
  step fp8 90 "$python" bench/fp8.py --model 30b --layers 6 --max_length 4096 --batch 4 \
    --dtype bfloat16 --out "$out/fp8.json" --write qwen3_sft/model/fp8_measured.json
  full_depth headline_packed 80 --max_length 4096 --batch 4 --lengths packed \
    --document_tokens 577 --activation_checkpointing selective
  full_depth headline_32k 60 --max_length 32768 --lengths fixed --warm_up 2 --steps 4 \
    --activation_checkpointing full --activation_offload
  full_depth headline_128k 70 --max_length 131072 --lengths fixed --warm_up 1 --steps 1 \
    --activation_checkpointing full --activation_offload
  cat "$out"/step_*.json "$out"/headline_*.json
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
  tests/monkey_patch/kernels/test_aot.py tests/test_hardware.py
wait "${compiling[@]}"
for log in "$out"/compile_*.tmp; do
  { echo "=== $log"; cat "$log"; } >>"$out/$log_name"
  rm "$log"
done
step ops 195 "$python" bench/ops.py --seconds 180 --out "$out/ops.json" --table "$out/ops.md"
full_depth headline_4096 120 --max_length 4096 --batch 4 --lengths fixed \
  --activation_checkpointing selective
step demo_run 40 "$python" -m qwen3_sft.cli train --config config/recipe/demo.yaml \
  --output_dir "$(mktemp -d)/demo"
cat "$out"/headline_*.json "$out/ops.md"
exit "$failed"
