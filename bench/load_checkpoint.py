"""A random Qwen3-MoE checkpoint as the hub has them: one tensor per expert matrix, several files.

Qwen3-30B-A3B with everything that sets proportions kept (128 experts, 8 heads per key-value head,
two thirds of an expert for gate and up, 93% of the weights in experts) and made narrower, so that
six layers fit into a gigabyte. The vocabulary keeps its share of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig
from transformers.core_model_loading import revert_weight_conversion

from qwen3_sft.dry_run import model_on_meta
from qwen3_sft.known_models import KNOWN_CONFIGS

FILE_BYTES = 200 * 10**6
INDEX = "model.safetensors.index.json"
