"""Short conversations, and what is rendered and trained of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from qwen3_sft.chat.render import render
from qwen3_sft.data.formats import parse_row
from tests.support.data_rows import trained_texts

CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"b": 1}}]}
CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"b": 1}}\n</tool_call><|im_end|>'


def q(text="q"):
    return {"role": "user", "content": text}


def a(text, reasoning=None):
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


def result(text):
    return {"role": "tool", "content": text}


def conversation(*messages, **columns):
    row = {"messages": list(messages), **columns}
    return parse_row(row, "messages", "f:1", Counter())


def rendered(
    messages,
    chat_format="qwen3",
    *,
    train_on: Any = "assistant",
    thinking: Any = "split_turns",
    train_empty_think=False,
    warnings=None,
):
    return render(
        conversation(*messages) if isinstance(messages, list) else messages,
        chat_format,
        train_on=train_on,
        thinking=thinking,
        train_empty_think=train_empty_think,
        location="f:1",
        warnings=Counter() if warnings is None else warnings,
    )


def trained(messages, chat_format="qwen3", **options):
    return [trained_texts(sample) for sample in rendered(messages, chat_format, **options)]
