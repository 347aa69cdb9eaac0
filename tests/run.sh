#!/usr/bin/env bash
# The CPU test suite with its set-up: linters, types, shell scripts, then pytest on all cores.
# Arguments go to pytest: `bash tests/run.sh tests/chat -k think`; `-m network` adds what stays out by
# default, two nodes in two network namespaces (root, a few minutes), and so do `-m learning`, `-m long`, `-m faults`
# and `-m readers`.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
use_environment dev
cd "$QWEN3_SFT_HOME"

python -m ruff check .
python -m ruff format --check .
pyrefly check --summarize-errors
shellcheck -x environment.sh qwen3_sft.sh qwen3_sft_multinode.sh examples/slurm.sbatch tests/run.sh tests/oldest.sh .ci/run bench/gpu.sh bench/carry.sh

# One thread per worker: the workers share the cores.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest -n "${PYTEST_WORKERS:-auto}" --dist worksteal -m "not gpu and not multi_gpu and not network and not learning and not long and not faults and not readers" "$@"
