#!/usr/bin/env bash
# Supervised fine-tuning of Qwen3-MoE.
#
#   bash qwen3_sft.sh                                   trains the embedded demo into runs/demo
#   bash qwen3_sft.sh --config config/recipe/qwen3_30b_a3b.yaml \
#       --model_name_or_path PATH_OR_ID --dataset PATH_OR_ID [--any_flag value]
#   ACCELERATE_CONFIG=config/zero3.json bash qwen3_sft.sh ...   names the launch file
#   DRY_RUN=1 bash qwen3_sft.sh ...                             prints what would run, and stops
#
# Without ACCELERATE_CONFIG the number of GPUs and the memory plan choose, and the reason is printed:
# one GPU: config/single.json; several: copies of the model if weights, gradients and optimizer take
# at most 60% of a GPU (config/ddp.json), else shards over all GPUs (the same, with --fsdp_size -1).
# --fsdp_size, --ep_size and --dp_replicate_size, given or in the recipe, win. Several nodes:
# qwen3_sft_multinode.sh.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment

exec "$QWEN3_SFT_PYTHON" -m qwen3_sft.cli train "$@"
