"""What a tokenizer must have: Qwen3's control tokens, and no id without a row of the embedding."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qwen3_sft.chat.control_tokens import QWEN3_CONTROL_TOKENS
from qwen3_sft.chat.templates import CONTROL_TOKENS
from qwen3_sft.errors import ModelError

_SHOWN = 5
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_control_tokens(tokenizer: PreTrainedTokenizerBase, where: Path) -> None:
    """Refuse a tokenizer that would take a conversation apart in another way than Qwen3's.

    Raises:
        ModelError: naming the tokens.
    """
    added = tokenizer.get_added_vocab()
    missing = [token for token in CONTROL_TOKENS if token not in added]
    if not tokenizer.is_fast or missing:
        lacks = f", it lacks {', '.join(missing)}" if missing else ""
        raise ModelError(
            f"{where}: not a Qwen3 fast tokenizer{lacks}; take the tokenizer files of a Qwen3 model"
        )
    if str(tokenizer.eos_token) not in added:
        raise ModelError(
            f"{where}: the tokenizer's eos_token is {tokenizer.eos_token!r}, which is none of its "
            'added tokens: set "eos_token": "<|im_end|>" in tokenizer_config.json'
        )
    for token in added:
        within = [own for own in QWEN3_CONTROL_TOKENS if own in token and own != token]
        if within:
            raise ModelError(
                f"{where}: the added token {token!r} contains {within[0]}, which would be cut in "
                "another way wherever it stands: take it out of the tokenizer"
            )


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, where: Path
) -> None:
    """Refuse a tokenizer with ids beyond the embedding, which has more rows than tokens or as many.

    Args:
        tokenizer: of the model.
        config: of the model; its `vocab_size` is the number of rows, held against the weights.
        where: the model's folder.

    Raises:
        ModelError: naming the tokens, and what to do.
    """
    rows = config.get_text_config().vocab_size
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if not beyond:
        return
    shown = ", ".join(f"{token!r} {i}" for i, token in beyond[:_SHOWN])
    raise ModelError(
        f"{where}: the embedding has {rows} rows (vocab_size), and {len(beyond)} tokens have ids "
        f"beyond: {shown}. Give them rows and save the result with the tokenizer, in Python: "
        f"model.resize_token_embeddings({beyond[-1][0] + 1}); or take the tokenizer of the "
        "released model"
    )


def check_special_ids(config: PretrainedConfig, where: Path) -> None:
    """Refuse ids in config.json of tokens that the model cannot have.

    Raises:
        ModelError: naming the entry.
    """
    text = config.get_text_config()
    for name in _SPECIAL:
        given = getattr(text, name)
        ids = given if isinstance(given, list) else [given]
        if wrong := [i for i in ids if i is not None and not 0 <= i < text.vocab_size]:
            raise ModelError(
                f"{where / 'config.json'}: {name} {wrong[0]} is beyond vocab_size "
                f"{text.vocab_size}: set it to the id of a token of the tokenizer, or to null"
            )
