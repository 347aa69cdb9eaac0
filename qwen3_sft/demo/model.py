"""A tiny but real Qwen3-MoE with its own tokenizer, built from nothing in seconds.

The demo recipe and the tests train it. It has the architecture, the control tokens and the chat
template of the released models; only the sizes differ. The hidden size is not twice the expert
intermediate size, so that a transposed expert weight cannot pass unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import trainers as bpe_trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from qwen3_sft.chat.control_tokens import QWEN3_CONTROL_TOKENS
from qwen3_sft.logs import progress_bars

# Qwen's pre-tokenizer: one digit per token, words with one leading space or sign, runs of newlines.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Qwen3's control tokens and chat template.

    Args:
        texts: the training text; a few hundred kilobytes are enough.
        vocab_size: all tokens, the 256 bytes and the 26 control tokens included.
        chat_template: Jinja source; by default Qwen3's own as shipped with TRL.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = bpe_trainers.BpeTrainer(
        vocab_size=vocab_size - len(QWEN3_CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=token.startswith("<|"), normalized=False)
            for token in QWEN3_CONTROL_TOKENS
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = trl_chat_template("qwen3") if chat_template is None else chat_template
    return fast


def trl_chat_template(name: str) -> str:
    """Return the Jinja source of a released model's chat template as the installed TRL ships it."""
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


def tiny_config(vocab_size: int = 4096, **overrides: Any) -> Qwen3MoeConfig:
    """Return the configuration of the demo model: 4 layers, 16 experts of which 2 are active."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return Qwen3MoeConfig(**{**sizes, **overrides})


def tiny_model(config: Qwen3MoeConfig, seed: int = 0) -> Qwen3MoeForCausalLM:
    """Return a randomly initialised model in float32; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3MoeForCausalLM(config)


def write_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
    """Write a tiny model with its tokenizer to `folder`, as a hub checkpoint would look."""
    config = tiny_config(
        len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model = tiny_model(config, seed)
    with progress_bars(0):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
