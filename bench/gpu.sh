#!/usr/bin/env bash
# Everything that needs one CUDA GPU, in under 10 minutes: the GPU tests, then the benchmarks of what
# exists. Results go to $OUT (default bench/results/gpu), one JSON per benchmark, plus the logs.
# It uses the Python that is active; see environment.sh for making one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "bench/gpu.sh: no CUDA GPU (or no torch that sees one) on this machine; nothing was run" >&2
  exit 3
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
failed=0

step() { # NAME SECONDS COMMAND...
  local name="$1" limit="$2"
  shift 2
  echo "=== $name (at most ${limit}s)"
  if ! timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "    failed, see $out/$name.log:"
    tail -n 15 "$out/$name.log"
    failed=1
  fi
}

step tests 150 "$python" -m pytest -m gpu -q -p no:cacheprovider tests
step step_demo 60 "$python" bench/step.py --model demo --dtype autocast --out "$out/step_demo.json"
# Depths that fit one 141 GB GPU beside fp32 AdamW: 4 layers are 3.2 billion parameters, 48 GiB.
step step_30b_4l_4k 100 "$python" bench/step.py --model 30b --layers 4 --max_length 4096 --batch 4 \
  --dtype autocast --compare --out "$out/step_30b_4l_4k.json"
step step_30b_8l_bf16 120 "$python" bench/step.py --model 30b --layers 8 --max_length 4096 --batch 4 \
  --dtype bfloat16 --compare --out "$out/step_30b_8l_bf16.json"
step demo_run 120 "$python" -m qwen3_sft.cli train --config config/recipe/demo.yaml \
  --output_dir "$(mktemp -d)/demo"
cat "$out"/*.json
exit "$failed"
