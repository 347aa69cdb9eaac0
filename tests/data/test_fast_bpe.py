"""tiktoken gives the ids of `tokenizers`, or leaves a text to it."""

from __future__ import annotations

import json
import logging
import pickle
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qwen3_sft.chat.control_tokens import QWEN3_CONTROL_TOKENS
from qwen3_sft.chat.encoding import Encoder
from qwen3_sft.chat.fast_bpe import FastBpe, fast_bpe
from qwen3_sft.data.prepare import prepare
from tests.support.prepared import arrays, write
from tests.support.real_tokenizer import real_tokenizer

# Where tokenizers differ: contractions, runs of blanks and signs, marks before NFC, look-alikes.
PIECES = [
    *QWEN3_CONTROL_TOKENS, "'s", "'LL", "\u2019re", "don't", "user\n", "assistant\n",
    "\n\n", "\r\n", "\t",
    " ", "   ", "\u00a0", "\u2028", "\u3000", "\x1c", "\x85", "123", "½", "٣", "e\u0301", "\u0301",
    "\u1100\u1161\u11a8", "\u0344", "\ufb01", "\u212b", "\u017f", "'\u017f", "\u212a",
    "日本", "한", "привет", "😀",
    "\U0001f469\u200d\U0001f469", "\U0001e900", "\U00016d67\U00016d67", "\ue000", "\uffff", "\0",
    "=" * 40, "_", "--", "{}", "\\n", "<|", "|>", "</", "the", "Hello", "a" * 70,
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join)


@pytest.fixture(scope="module")
def real():
    return Encoder(real_tokenizer())


@given(texts=st.lists(TEXTS, min_size=20, max_size=40))
@settings(max_examples=60, deadline=None)
def test_random_texts_with_the_real_vocabulary(real, texts):
    assert real.why_slow is None
    assert real.encode_texts(texts) == real.reference.encode_texts(texts)


def test_every_token_of_the_real_vocabulary(real):
    backend = real_tokenizer().backend_tokenizer
    tokens = [backend.decode([i]) for i in range(0, 151_643, 3)]
    assert real.encode_texts(tokens) == real.reference.encode_texts(tokens)


def test_letters_of_all_scripts(real):
    """Both libraries have tables of Unicode of their own."""
    texts = [
        f"a{chr(c)} {chr(c)}1{chr(c)}" for c in range(0, 0x32000, 7) if not 0xD800 <= c < 0xE000
    ]
    assert real.encode_texts(texts) == real.reference.encode_texts(texts)


@pytest.mark.parametrize("run", [" ", "\n", "\t ", " \r", "a", "=", "ab", "日", "1", "e\u0301"])
def test_very_long_runs(real, run):
    texts = [run * 20_000, run * 20_000 + "x", "x" + run * 20_000 + " "]
    assert real.encode_texts(texts) == real.reference.encode_texts(texts)


@pytest.mark.parametrize("text", [" " * 500_000, "x" + "\n \u3000" * 200_000 + "x"])
def test_a_run_of_blanks_that_tiktoken_cannot_take(real, text):
    assert real._fast.encode(text) is None
    assert sum(map(len, real.encode_texts([text]))) > 0


def test_what_this_python_does_not_know_is_left_to_tokenizers(real):
    unassigned = next(
        chr(c) for c in range(0x870, 0x110000) if unicodedata.category(chr(c)) == "Cn"
    )
    assert real._fast.encode(f"é{unassigned}") is None
    assert real._fast.encode("a\ud800") is None
    with pytest.raises((TypeError, UnicodeEncodeError)):
        real.encode_texts(["a\ud800"])


def test_ids_in_another_order_than_the_merges(tokenizer):
    """A retrained tokenizer numbers its bytes and merges as it likes."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    names = list(spec["model"]["vocab"])
    random.Random(1).shuffle(names)
    spec["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    spec["added_tokens"] = []
    bpe = fast_bpe(spec)
    assert isinstance(bpe, FastBpe)
    assert bpe.ids is not None
    text = "def f(x): return x  # Größe 日本\n\n    'tis 1234"
    found = pickle.loads(pickle.dumps(bpe)).encode(text)
    expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).tokens
    assert [names[i] for i in found] == expected


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("normalizer", None, "normalizer"),
        ("normalizer", {"type": "NFKC"}, "normalizer"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "pre-tokenizer"),
        ("model", {"dropout": 0.1}, "byte-level BPE"),
        ("model", {"unk_token": "<unk>"}, "byte-level BPE"),
        ("model", {"byte_fallback": True}, "byte-level BPE"),
        ("model", {"ignore_merges": True}, "byte-level BPE"),
        ("model", {"continuing_subword_prefix": "##"}, "byte-level BPE"),
        ("model", {"end_of_word_suffix": "</w>"}, "byte-level BPE"),
        ("model", {"type": "WordPiece"}, "byte-level BPE"),
        ("model", {"merges": [["a", "b"], ["a", "b"]]}, "two merges"),
    ],
)
def test_what_it_cannot_say_is_left_to_tokenizers(tokenizer, part, change, reason):
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec[part] = {**spec[part], **change} if part == "model" else change
    if "merges" in (change or {}):
        spec["model"]["vocab"]["ab"] = 0
    assert reason in fast_bpe(spec)


def test_another_pattern_is_left_to_tokenizers(tokenizer):
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    split = spec["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    assert "pre-tokenizer" in fast_bpe(spec)


def test_a_difference_on_the_runs_own_rows_is_found(args, rows, tokenizer, monkeypatch, caplog):
    """Then all of it is tokenised by `tokenizers`, whichever rows came before."""
    expected = arrays(prepare(args, tokenizer))
    encode = FastBpe.encode
    monkeypatch.setattr(
        FastBpe, "encode", lambda self, text: encode(self, text.replace("What", ""))
    )
    args.data_cache_dir = "other"
    with caplog.at_level(logging.WARNING):
        assert arrays(prepare(args, tokenizer)) == expected
    assert caplog.text.count("make different tokens of") == 1
    assert not list(Path("other").glob("*.partial-*"))


def test_a_difference_in_a_kind_of_rows_that_comes_late(args, rows, tokenizer, monkeypatch, caplog):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "  odd", "reasoning_content": "r"},
    ]
    write([*rows[:600], {"messages": turns}])
    expected = arrays(prepare(args, tokenizer))
    encode = FastBpe.encode
    monkeypatch.setattr(FastBpe, "encode", lambda self, text: encode(self, text.replace("odd", "")))
    args.data_cache_dir = "other"
    assert arrays(prepare(args, tokenizer)) == expected
    assert "make different tokens of" in caplog.text
    assert "odd" in caplog.text


def test_a_run_says_once_why_it_takes_longer(args, rows, tokenizer, caplog):
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    slow = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps({**spec, "normalizer": None})),
        eos_token=tokenizer.eos_token, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        prepare(args, slow)
    assert caplog.text.count("not the faster tiktoken: its normalizer is not NFC") == 1
