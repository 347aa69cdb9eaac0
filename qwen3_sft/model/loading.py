"""Find, check and load a checkpoint of a family; choose what computes its attention."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from transformers.distributed.fsdp import is_fsdp_enabled
from transformers.distributed.utils import is_local_dist_rank_0

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import ModelError, said
from qwen3_sft.families.family import family_of, require_by_name
from qwen3_sft.logs import progress_bars
from qwen3_sft.model.attention_trial import VARLEN
from qwen3_sft.model.base_files import INDEX, read_headers
from qwen3_sft.model.config_file import CONFIG, read_config
from qwen3_sft.model.host_memory import blocks_given_back, reserve_weights
from qwen3_sft.model.quantised import FILES as LEGACY_FILES
from qwen3_sft.model.quantised import refuse_quantised
from qwen3_sft.model.tokenizer_files import FILES as TOKENIZER_FILES
from qwen3_sft.model.tokenizer_files import read_tokenizer
from qwen3_sft.model.trust import load_config
from qwen3_sft.model.vocabulary import check_control_tokens
from qwen3_sft.options.model_args import EXPERT_PATCHES, ModelArguments

logger = logging.getLogger(__name__)

_ALONE = Engine("single")

# What says what a model is; without weights and vocabulary.
CONFIG_FILES = (CONFIG, INDEX, *LEGACY_FILES)
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")


def resolve_model(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint, downloading a hub id first.

    Of a hub id only what `check_config` reads comes first: what it refuses costs no download.

    Raises:
        ModelError: neither a folder with a config.json nor a hub id that can be fetched, or a
            model that this project does not train.
    """
    folder = resolve_config(name, revision)
    if not Path(name).is_dir():
        folder = _download(name, revision, CHECKPOINT_FILES)
    return folder


def resolve_config(name: str, revision: str | None = None) -> Path:
    """Return a local folder with a model's config.json, and without weights if it is a hub id.

    Raises:
        ModelError: as of `resolve_model`.
    """
    folder = Path(name)
    if not folder.is_dir():
        require_by_name("train", name)
        folder = _download(name, revision, CONFIG_FILES)
    refuse_quantised(folder, read_config(folder), name)
    return folder


def num_experts(folder: Path) -> int:
    """Return the experts of each layer of a checkpoint."""
    return load_config(folder).get_text_config().num_experts


def resolve_tokenizer(name: str, revision: str | None = None) -> Path:
    """Return a local folder with the tokenizer, downloading only that of a hub id.

    Raises:
        ModelError: neither a folder nor a hub id that can be fetched.
    """
    folder = Path(name)
    return folder if folder.is_dir() else _download(name, revision, TOKENIZER_FILES)


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    if Path(name).exists():
        raise ModelError(f"--model_name_or_path {name}: a file; name the folder that it lies in")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep + os.sep in name:
        raise ModelError(f"--model_name_or_path {name}: no such folder")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (OSError, HTTPError, HFValidationError) as error:  # OSError: offline, gated, disk full
        raise ModelError(
            f"--model_name_or_path {name}: neither a folder nor a hub model that can be fetched "
            f"({type(error).__name__}: {said(error)})"
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the checkpoint's fast tokenizer.

    Raises:
        ModelError: a file is damaged, it is no fast tokenizer, its control tokens are not those of
            Qwen3, or one that was added contains them.
    """
    tokenizer: Any = read_tokenizer(folder)
    check_control_tokens(tokenizer, folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # fills rows, where nothing looks at it
    return tokenizer


def weights_dtype(
    options: ModelArguments, engine: Engine = _ALONE, compute: torch.dtype = torch.float32
) -> torch.dtype:
    """Return the dtype the trained weights are kept in.

    Args:
        options: `dtype`.
        engine: DeepSpeed keeps float32 master weights itself, beside weights in the compute dtype.
        compute: of the products.
    """
    if options.dtype == "bfloat16":
        return torch.bfloat16
    return compute if engine.layout == "zero" else torch.float32


def load_model(
    folder: Path,
    options: ModelArguments,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    *,
    engine: Engine = _ALONE,
    compute: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load the weights, with Liger's RMSNorm and RoPE on CUDA.

    Natively sharded and ZeRO-3 models come back as this process's shards. Under accelerate's FSDP
    with cpu_ram_efficient_loading only the first process of a node reads weights, in the others
    they are unset and take no memory. Those and plain models are on the CPU.

    Liger's SwiGLU replacement stays off: it would bypass the experts registry silently. Its fused
    cross entropy stays off too: the `linear_cross_entropy` patch projects labelled positions only.

    Raises:
        ModelError: a weight is missing, unexpected or of another shape.
    """
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        # The patches switch to these two after loading; until then the stock twins stand in.
        "attn_implementation": "sdpa" if attention in VARLEN else attention,
        "trust_remote_code": False,
    }
    if engine.kind == "native":
        kwargs["distributed_config"] = DistributedConfig(
            fsdp_size=engine.fsdp_size,
            ep_size=engine.ep_size,
            dp_replicate_size=engine.dp_replicate_size,
            # Gathers in bfloat16, reduces in float32.
            fsdp_mixed_precision=compute == torch.bfloat16,
        )
    is_overwritten = engine.kind == "fsdp" and is_fsdp_enabled() and not is_local_dist_rank_0()
    if is_overwritten:
        # transformers 5.23 would read all weights here too, and accelerate throw them away.
        kwargs["device_map"] = {"": "meta"}
    if options.experts_implementation not in EXPERT_PATCHES:
        kwargs["experts_implementation"] = options.experts_implementation
    use_liger = device.type == "cuda" if options.use_liger is None else options.use_liger
    if use_liger and device.type != "cuda":
        raise ModelError("--use_liger true: Liger's kernels need a CUDA device; leave it out")
    loader = None
    if use_liger:
        from liger_kernel.transformers import AutoLigerKernelForCausalLM

        loader = AutoLigerKernelForCausalLM
        kwargs |= {"swiglu": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    model = load_strict(folder, loader, **kwargs)
    if is_overwritten:
        reserve_weights(model)
        model.tie_weights()
    model.config.use_cache = False
    return model


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that builds and loads a model of this config.

    Raises:
        ModelError: no family has its `model_type`.
    """
    return getattr(transformers, family_of(config).auto_class)


def load_strict(folder: Path, loader: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Run `from_pretrained` and refuse a checkpoint that does not fit the model exactly.

    Nothing in the folder can run code: the classes are transformers' own, and weights are read from
    safetensors files alone.

    Args:
        folder: of the checkpoint.
        loader: an auto class; that of the model's family by default.
        **kwargs: of `from_pretrained`.

    Raises:
        ModelError: naming up to five weights that are missing, unexpected or mismatched; or a
            safetensors file is missing or damaged, or an entry names code or files of elsewhere.
    """
    loader = loader or auto_class(load_config(folder))
    headers = read_headers(folder)
    kwargs |= {"use_safetensors": True, "trust_remote_code": False}
    size = sum((folder / name).stat().st_size for name in {h.file for h in headers.values()})
    with progress_bars(size), blocks_given_back():
        model, info = loader.from_pretrained(folder, output_loading_info=True, **kwargs)
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key) for key in info["mismatched_keys"]),
    }
    found = [
        f"{len(keys)} {what}: {', '.join(keys[:5])}" for what, keys in problems.items() if keys
    ]
    if found:
        raise ModelError(f"{folder}: weights do not fit the model ({'; '.join(found)})")
    return model
