"""Tokenizer against embedding, and what a tokenizer lacks to be Qwen3's."""

import pytest
from transformers import AutoTokenizer

from qwen3_sft.errors import ModelError
from qwen3_sft.model.base import checked_base
from qwen3_sft.model.loading import load_tokenizer


def extend(folder, *tokens, special=False):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("special", [False, True])
def test_ids_beyond_the_embedding_are_named(base, special):
    extend(base, "<|persona|>", "<|note|>", special=special)
    words = (
        r"has 1024 rows .* 2 tokens .*'<\|persona\|>' 1024, '<\|note\|>' 1025\. "
        r".*resize_token_embeddings\(1026\)"
    )
    with pytest.raises(ModelError, match=words):
        checked_base(base)


def test_rows_without_a_token_are_fine(whole_base, base):
    assert len(checked_base(whole_base).tokenizer) == 1024


@pytest.mark.parametrize(
    ("token", "words"),
    [("<|im_start|>bot", r"contains <\|im_start\|>"), ("x</think>", "contains </think>")],
)
def test_tokens_around_a_control_token_are_refused(base, token, words):
    extend(base, token)
    with pytest.raises(ModelError, match=words):
        load_tokenizer(base)


def test_a_tokenizer_without_pad_or_end_token(base, change):
    change(base, "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(base)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    change(base, "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match=r"eos_token is None.*tokenizer_config\.json"):
        load_tokenizer(base)
