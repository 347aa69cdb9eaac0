"""Our text of a conversation against what a tokenizer's own chat template makes of it.

Compared are the text of the whole conversation and the prompts of its first and last answers, with
reasoning where the user wrote it: how it is found in an answer is the template's to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen3_sft.chat.render import without_trailing
from qwen3_sft.chat.samples import Conversation, Message
from qwen3_sft.chat.template_process import render_apart
from qwen3_sft.chat.templates import CHAT_FORMATS, ChatFormat
from qwen3_sft.chat.text import write_conversation, write_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Comparison(NamedTuple):
    """A text of ours, and what a template is given to write the same.

    Attributes:
        location: of the row.
        ours: the text.
        messages: the turns as a template reads them.
        tools: function descriptions.
        options: what else `apply_chat_template` gets.
    """

    location: str
    ours: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    options: dict[str, Any]


def comparisons(
    conversation: Conversation, chat_format: str, location: str
) -> Iterator[Comparison]:
    """Yield what to compare of a conversation.

    Args:
        conversation: as it was parsed.
        chat_format: how we render.
        location: of the row, for errors.
    """
    fmt = CHAT_FORMATS[chat_format]
    messages = without_trailing(conversation.messages, Counter())
    turns = [_as_template_reads(message) for message in messages]
    tools = list(conversation.tools)
    ours = write_conversation(messages, conversation.tools, fmt).text
    yield Comparison(location, ours, turns, tools, {})
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    for answer in sorted({answers[0], answers[-1]} - {0}):  # no template has a prompt of no turns
        mode = _mode(conversation, messages[answer], fmt)
        prompt = write_prompt(messages[:answer], tools, fmt, enable_thinking=mode)
        options: dict[str, Any] = {} if mode is None else {"enable_thinking": mode}
        options["add_generation_prompt"] = True
        yield Comparison(location, prompt, turns[:answer], tools, options)


def _mode(conversation: Conversation, answer: Message, fmt: ChatFormat) -> bool | None:
    if conversation.enable_thinking is None and fmt.thinks:
        return answer.reasoning is not None
    return conversation.enable_thinking


def _as_template_reads(message: Message) -> dict[str, Any]:
    """Write a message as chat templates want it, reasoning where the user wrote it.

    Where it is not in the content, `reasoning_content` tells them not to look for it there.
    """
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.written is not None:
        turn["content"] = message.written
    elif message.role == "assistant":
        turn["reasoning_content"] = message.reasoning or ""
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return turn


def self_check(
    compared: Sequence[Comparison],
    tokenizer: PreTrainedTokenizerBase,
    chat_format: str,
    *,
    is_apart: bool = False,
) -> None:
    """Compare our texts with those of the tokenizer's own chat template.

    Args:
        compared: from `comparisons`.
        tokenizer: with its chat template.
        chat_format: how we render.
        is_apart: render the template in a process of its own with little time and memory, which
            takes seconds to start.

    Raises:
        ValueError: shows the first difference and its row; the tokenizer then has a customised
            template, or `chat_format` is not its family. Or the template fails.
    """
    texts = _rendered_apart if is_apart else _rendered_here
    for ask, theirs in zip(compared, texts(tokenizer, compared), strict=True):
        if ask.ours != theirs:
            raise ValueError(_difference(ask, theirs, chat_format))


def _rendered_here(
    tokenizer: PreTrainedTokenizerBase, compared: Sequence[Comparison]
) -> Iterator[str]:
    for ask in compared:
        tools: Any = ask.tools or None
        yield str(
            tokenizer.apply_chat_template(ask.messages, tools=tools, tokenize=False, **ask.options)
        )


def _rendered_apart(
    tokenizer: PreTrainedTokenizerBase, compared: Sequence[Comparison]
) -> Iterator[str]:
    """As `apply_chat_template` does; a tokenizer may have another template for tools."""
    for has_tools, group in groupby(compared, key=lambda ask: bool(ask.tools)):
        conversations = [{**ask._asdict(), "tools": ask.tools or None} for ask in group]
        template = tokenizer.get_chat_template(None, [{}] if has_tools else None)
        yield from render_apart(template, conversations, dict(tokenizer.special_tokens_map))


def _difference(ask: Comparison, theirs: str, chat_format: str) -> str:
    ours = ask.ours
    pairs = zip(ours, theirs, strict=False)
    at = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    around = slice(max(0, at - 40), at + 40)
    what = "prompt" if ask.options else "text"
    return (
        f"{ask.location}: the tokenizer's chat template differs from {chat_format} at character "
        f"{at} of the {what}:\n"
        f"  {chat_format}: {ours[around]!r}\n  tokenizer: {theirs[around]!r}\n"
        "set --chat_format to the family the model was trained with, or restore the released "
        "model's chat template"
    )
