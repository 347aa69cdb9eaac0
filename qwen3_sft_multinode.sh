#!/usr/bin/env bash
# Supervised fine-tuning of Qwen3-MoE on several nodes: the same command on every node.
#
#   plain variables, here for two nodes (NODE_RANK=1 on the second):
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash qwen3_sft_multinode.sh \
#         --config config/recipe/qwen3_30b_a3b.yaml --global_batch_size 64 [--any_flag value]
#   SLURM: srun --ntasks-per-node=1 bash qwen3_sft_multinode.sh ...   (examples/slurm.sbatch)
#
# Variables; one that is set but empty is an error, never a default:
#   NNODES            number of nodes                                (SLURM_NNODES)
#   NODE_RANK         this node, 0 to NNODES-1                       (SLURM_NODEID)
#   MASTER_ADDR       node 0's address, the same on all nodes        (first of SLURM_JOB_NODELIST)
#   MASTER_PORT       a free port there; 29500
#   NPROC_PER_NODE    processes on each node; its GPUs               (SLURM_GPUS_ON_NODE)
#   LOCAL_ADDR        this node's address; the one it uses towards MASTER_ADDR
#   MAX_RESTARTS      failures after which all nodes start again from the newest checkpoint; 0, or 3
#                     with RDZV_BACKEND=c10d. Needs an --output_dir that all nodes see
#   RDZV_BACKEND      static or c10d; static, but c10d where MAX_RESTARTS asks for restarts
#   RDZV_ID           a name that no other run uses at this address  (SLURM_JOB_ID)
#   RDZV_TIMEOUT      seconds that nodes wait for one another; 600
#   ACCELERATE_CONFIG the launch file; by default chosen by GPUs, nodes and memory
#   DRY_RUN=1         prints plan, command and variables, and stops
#
# --global_batch_size ROWS keeps a step the same whatever the number of nodes.
# --dist_timeout_s SECONDS is how long a node waits for one that was lost; 1800.
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment

exec "$QWEN3_SFT_PYTHON" -m qwen3_sft.launch.multinode "$@"
