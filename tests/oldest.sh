#!/usr/bin/env bash
# The fast part of the suite on the oldest versions that setup.py promises: Python 3.12, torch 2.11,
# Triton 3.6. Makes its own environment (ENVIRONMENT, by default .venv-oldest), some 8 GB with CUDA's
# libraries, and writes tests/house/signatures/torch-2.11.0.json, which the other tests compare our
# calls with. Arguments go to pytest.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment="${ENVIRONMENT:-.venv-oldest}"
python="$environment/bin/python"
if [ ! -x "$python" ]; then
  "${PYTHON:-python3.12}" -m venv "$environment"
fi
oldest="$environment/constraints.txt"
grep -vE '^(torch|triton|numpy)==|^#' constraints.txt > "$oldest"
printf '%s\n' torch==2.11.0 triton==3.6.0 numpy==2.5.0 >> "$oldest"
"$python" -m pip install --quiet torch==2.11.0
"$python" -m pip install --quiet -c "$oldest" -e '.[dev]'
"$python" -m tests.house.called_signatures

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m pytest -n "${PYTEST_WORKERS:-auto}" --dist worksteal \
  -m "not gpu and not multi_gpu and not network and not learning and not long and not faults and not e2e and not distributed" \
  tests/chat tests/checkpoints tests/data tests/families tests/house tests/invariant tests/model tests/monkey_patch \
  tests/optimizers tests/packing tests/plan tests/training \
  --deselect "tests/monkey_patch/test_linear_fp8.py::test_scaled_mm_takes_these_operands" "$@"
