from __future__ import annotations

from importlib.resources import files

import pytest

from qwen3_sft.chat.render import detect_chat_format


def test_of_all_templates_in_trl_only_the_released_ones_are_recognised():
    known = {"qwen3", "qwen3_instruct_2507"}
    for path in files("trl").joinpath("chat_templates").iterdir():
        if not path.name.endswith(".jinja"):
            continue
        name = path.name.removesuffix(".jinja")
        source = path.read_text(encoding="utf-8")
        if name in known:
            assert detect_chat_format(source) == detect_chat_format(source + "\n") == name
        else:
            with pytest.raises(ValueError, match=r"none of the families .*--chat_format"):
                detect_chat_format(source)


@pytest.mark.parametrize("source", [None, ""])
def test_a_tokenizer_without_a_template_is_an_error(source):
    with pytest.raises(ValueError, match=r"has no chat template .*--chat_format"):
        detect_chat_format(source)


def test_coder_templates_are_told_apart_by_their_wording():
    source = "{%- macro render_extra_keys(a, b) %}{%- endmacro %}<|im_start|>following functions:"
    assert detect_chat_format(source) == "qwen3_coder"
    assert detect_chat_format(source.replace("functions:", "tools:")) == "qwen3_coder_tools"
