#!/usr/bin/env bash
# Supervised fine-tuning of Qwen3-MoE.
#
#   bash qwen3_sft.sh                                   trains the embedded demo into runs/demo
#   bash qwen3_sft.sh --config config/recipe/qwen3_30b_a3b.yaml \
#       --model_name_or_path PATH_OR_ID --dataset PATH_OR_ID [--any_flag value]
#   ACCELERATE_CONFIG=config/ddp.json bash qwen3_sft.sh ...   chooses the launch file
#   DRY_RUN=1 bash qwen3_sft.sh ...                           prints what would run, and stops
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment

exec "$QWEN3_SFT_PYTHON" -m qwen3_sft.cli train "$@"
