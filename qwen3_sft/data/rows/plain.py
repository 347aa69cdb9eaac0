"""Text outside any chat: whole texts, and a prompt with its completion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwen3_sft.chat.samples import Conversation, Dropped, PlainText
from qwen3_sft.data.rows.calls import Tools
from qwen3_sft.data.rows.conversations import make_conversation, parse_tool_columns
from qwen3_sft.data.rows.defects import BLANK_ANSWER, BLANK_TEXT
from qwen3_sft.data.rows.fields import account, is_blank, refuse_boundaries
from qwen3_sft.data.rows.loss_flags import BY_FLAG, row_flag
from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.turn_lists import decoded_turns
from qwen3_sft.data.rows.values import (
    check_text,
    describe,
    refuse_foreign_end,
    split_end,
    warn_control_text,
)
from qwen3_sft.data.turns import Turns, parse_turns

# Rendered chats: tokenising them as plain text would hide the turns from the masks.
_RENDERED = re.compile(r"<\|im_(?:start|end)\|>")
_OF_CODE = re.compile(r"<\|(?:fim_(?:prefix|middle|suffix|pad)|repo_name|file_sep)\|>")
_END_TEXT = "<|endoftext|>"
_FLAGS = ("weight", "sample_weight", "loss_weight", "train")
_NEED_CHAT = ("system", "system_prompt", "system_message", "tools", "functions", "history",
              "enable_thinking", "chat_template_kwargs")  # fmt: skip


def parse_text(
    given: Mapping[str, Any], row: dict[str, Any], source: Source
) -> PlainText | Dropped:
    """Parse a row that is one text.

    Raises:
        DataError: it is a rendered chat, or has columns that belong to chats.
    """
    refuse_boundaries(row, source)
    _account(row, ("text",), source)
    text, end = _text_and_end(given["text"], "text", source)
    if not row_flag({name: row[name] for name in _FLAGS if name in row}, source):
        return BY_FLAG
    return PlainText("", text, end) if text.strip() else BLANK_TEXT


def parse_prompt_completion(
    given: Mapping[str, Any], row: dict[str, Any], source: Source
) -> Conversation | PlainText | Dropped:
    """Parse a prompt and its completion: two texts, or two lists of messages.

    Raises:
        DataError: for a row that cannot be trained on.
    """
    prompt, completion = (
        decoded_turns(given[name], f"column {name!r}", source) for name in ("prompt", "completion")
    )
    if isinstance(prompt, list) and isinstance(completion, list):
        described = parse_tool_columns(row, source)
        return _parse_lists(prompt, completion, row, described[0][1] if described else (), source)
    if isinstance(prompt, list) or isinstance(completion, list):
        source.fail("prompt and completion must be both strings or both lists of messages")
    _account(row, ("prompt", "completion"), source)
    prompt = _plain_text(prompt, "prompt", source)
    completion, end = _text_and_end(completion, "completion", source)
    if completion.lstrip().startswith("<think>"):
        source.fail("completion begins with <think>, a control token of chats; use `messages`")
    if not row_flag({name: row[name] for name in _FLAGS if name in row}, source):
        return BY_FLAG
    return PlainText(prompt, completion, end) if completion.strip() else BLANK_ANSWER


def _parse_lists(
    prompt: list[Any], completion: list[Any], row: dict[str, Any], tools: Tools, source: Source
) -> Conversation | Dropped:
    turns: Turns = parse_turns(prompt, "prompt", source, tools)
    first_trained = len(turns.messages)
    answers = parse_turns(completion, "completion", source, tools)
    if answers.messages and all(message.role != "assistant" for message in answers.messages):
        source.fail("completion has no assistant turn, so there is nothing to learn")
    turns.extend(answers)
    columns = ("prompt", "completion")
    return make_conversation(row, turns, columns, source, first_trained=first_trained)


def _account(row: dict[str, Any], data: tuple[str, ...], source: Source) -> None:
    for name in _NEED_CHAT:
        if not is_blank(row.get(name)):
            source.fail(
                f"column {name!r} has no place beside plain text ({', '.join(data)}); write the "
                "row as `messages`, for instance with --columns question=prompt answer=completion"
            )
    account(row, {*data, *_FLAGS, *_NEED_CHAT}, "", "", source)


def _text_and_end(value: Any, column: str, source: Source) -> tuple[str, str | None]:
    """Return a text without the end token that it is written with, and that token."""
    end = None
    if isinstance(value, str):
        value, end = split_end(value)
        refuse_foreign_end(value, f"column {column!r}", source)
    return _plain_text(value, column, source), end


def _plain_text(value: Any, column: str, source: Source) -> str:
    if not isinstance(value, str):
        source.fail(f"column {column!r} must be a string, found {describe(value)}")
    if rendered := _RENDERED.search(value):
        source.fail(
            f"column {column!r} contains {rendered[0]}: it is already rendered as a chat; "
            "use `messages`, so that turns and masks are known"
        )
    if of_code := _OF_CODE.search(value):
        source.fail(
            f"column {column!r} contains {of_code[0]}, which is a control token to a tokenizer "
            "alone and text here; give the row as input_ids"
        )
    if _END_TEXT in value:
        source.fail(
            f"column {column!r} contains {_END_TEXT} before its end (character "
            f"{value.index(_END_TEXT)}): these are several texts; give each a row of its own"
        )
    warn_control_text(value, source)
    return check_text(value, f"column {column!r}", source)
