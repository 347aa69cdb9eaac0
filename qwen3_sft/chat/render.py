"""Conversations become text with labels on exactly what the model has to say.

Neither the released templates nor TRL's training variants of them give the right labels: the first
have none, the second change the text. So the text is written here in pieces, equal to the released
template's, and every piece knows whether it carries labels and whether it is a control token.
Content is never a control token, whatever it spells; `encoding.py` keeps it so.

An assistant's labels run from after ``<|im_start|>assistant`` and its newline up to and including
``<|im_end|>``: what the model generates, and nothing that a prompt gives it.

The trap: thinking models see earlier turns without their reasoning. A conversation trained as one
text either loses that reasoning or shows a context that never occurs at inference. `split_turns`
makes one sample per user query instead, each with its true context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby, islice, pairwise
from typing import TYPE_CHECKING, Any, Literal

from qwen3_sft.chat.pieces import Piece, PieceWriter, Rendered
from qwen3_sft.chat.row_options import check_row_options
from qwen3_sft.chat.samples import Conversation, Message, PlainText
from qwen3_sft.chat.template_process import render_apart
from qwen3_sft.chat.templates import CHAT_FORMATS, detect_chat_format
from qwen3_sft.chat.text import is_query, last_query_index, write_conversation
from qwen3_sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CHAT_FORMATS",
    "Piece",
    "Rendered",
    "detect_chat_format",
    "render",
    "render_plain",
    "self_check",
]

TrainOn = Literal["assistant", "last_assistant", "all"]
Thinking = Literal["split_turns", "drop_history", "keep"]


def render(
    conversation: Conversation,
    chat_format: str,
    *,
    train_on: TrainOn,
    thinking: Thinking,
    train_empty_think: bool,
    location: str,
    warnings: Counter[str],
) -> list[Rendered]:
    """Render a conversation as the samples it is trained as.

    Args:
        conversation: from `formats.parse_row`.
        chat_format: a key of `CHAT_FORMATS`.
        train_on: `assistant` labels every answer, `last_assistant` the last one, `all` every token
            of the one text that the template renders.
        thinking: earlier turns whose reasoning the template strips: `split_turns` makes one sample
            per user query, `drop_history` leaves those turns without labels, `keep` writes and
            labels their reasoning.
        train_empty_think: label an empty think block too.
        location: of the row, for errors.
        warnings: receives counts by kind.

    Returns:
        One sample, or several with `split_turns`; each has at least one label.

    Raises:
        DataError: for reasoning in a family that has no thinking, and when nothing is left to
            train.
    """
    fmt = CHAT_FORMATS[chat_format]
    messages = _without_trailing(conversation.messages, warnings)
    if not fmt.thinks and any(message.reasoning for message in messages):
        raise DataError(
            f"{location}: this row has reasoning but {chat_format} has no thinking; use a "
            "thinking model or remove reasoning_content and <think> blocks"
        )
    check_row_options(conversation, fmt, train_on, location)
    answers = _answers(messages, conversation.first_trained, train_on) - conversation.masked
    samples = [(messages, answers)]
    if train_on != "all":
        samples = list(_samples(messages, answers, thinking, warnings))
    if not samples:
        raise DataError(f"{location}: no answer is left to train with thinking={thinking}")
    rendered = [
        write_conversation(
            part,
            conversation.tools,
            fmt,
            labelled=labelled,
            keep_reasoning=thinking == "keep",
            train_empty_think=train_empty_think or conversation.enable_thinking is True,
        )
        for part, labelled in samples
    ]
    return [sample.fully_trained() for sample in rendered] if train_on == "all" else rendered


def render_plain(sample: PlainText, eos_token: str, *, train_on: TrainOn) -> Rendered:
    """Render text outside any chat: labels on the completion and the end token.

    Args:
        sample: prompt, which may be empty, and completion.
        eos_token: the tokenizer's end token.
        train_on: `all` labels the prompt too.
    """
    writer = PieceWriter()
    writer.plain(sample.prompt)
    writer.plain(sample.completion, trained=True)
    writer.control(sample.end or eos_token, trained=True)
    rendered = writer.finish()
    return rendered.fully_trained() if train_on == "all" else rendered


def self_check(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    chat_format: str,
    limit: int = 100,
    *,
    is_apart: bool = False,
) -> int:
    """Compare our text of up to `limit` conversations with the tokenizer's own chat template.

    Args:
        conversations: what to render.
        tokenizer: with its chat template.
        chat_format: how we render.
        limit: conversations to compare.
        is_apart: render the template in a process of its own with little time and memory, which
            takes seconds to start.

    Returns:
        How many were compared.

    Raises:
        ValueError: shows the first difference; the tokenizer then has a customised template, or
            `chat_format` is not its family. Or the template fails.
    """
    chosen = [
        (_without_trailing(conversation.messages, Counter()), conversation.tools)
        for conversation in islice(conversations, limit)
    ]
    render_theirs = _rendered_apart if is_apart else _rendered_here
    texts = render_theirs(tokenizer, chosen)
    for (messages, tools), theirs in zip(chosen, texts, strict=True):
        ours = write_conversation(messages, tools, CHAT_FORMATS[chat_format], labelled=()).text
        if ours != theirs:
            raise ValueError(_difference(ours, theirs, chat_format))
    return len(chosen)


_Turns = tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]  # messages and tools


def _rendered_here(tokenizer: PreTrainedTokenizerBase, chosen: list[_Turns]) -> Iterator[str]:
    for messages, tools in chosen:
        yield str(
            tokenizer.apply_chat_template(
                [_as_template_dict(message) for message in messages],
                tools=list(tools) or None,
                tokenize=False,
            )
        )


def _rendered_apart(tokenizer: PreTrainedTokenizerBase, chosen: list[_Turns]) -> Iterator[str]:
    """As `apply_chat_template` does; a tokenizer may have another template for tools."""
    for has_tools, group in groupby(chosen, key=lambda turns: bool(turns[1])):
        conversations = [
            {"messages": [_as_template_dict(m) for m in messages], "tools": list(tools) or None}
            for messages, tools in group
        ]
        template = tokenizer.get_chat_template(None, [{}] if has_tools else None)
        yield from render_apart(template, conversations, dict(tokenizer.special_tokens_map))


def _without_trailing(messages: tuple[Message, ...], warnings: Counter[str]) -> tuple[Message, ...]:
    """Cut what follows the last answer: nothing learns from it."""
    end = len(messages)
    while messages[end - 1].role != "assistant":
        end -= 1
    if end < len(messages):
        warnings["trailing turn without an answer cut"] += 1
    return messages[:end]


def _answers(
    messages: tuple[Message, ...], first_trained: int, train_on: TrainOn
) -> frozenset[int]:
    answers = [
        index
        for index, message in enumerate(messages)
        if message.role == "assistant" and index >= first_trained
    ]
    return frozenset(answers[-1:] if train_on == "last_assistant" else answers)


def _stripped(messages: tuple[Message, ...]) -> frozenset[int]:
    """Return the turns whose reasoning the thinking templates leave out."""
    last_query = last_query_index(messages)
    return frozenset(
        index for index, message in enumerate(messages[: last_query + 1]) if message.reasoning
    )


def _samples(
    messages: tuple[Message, ...],
    answers: frozenset[int],
    thinking: Thinking,
    warnings: Counter[str],
) -> Iterator[tuple[tuple[Message, ...], frozenset[int]]]:
    """Yield (messages, labelled turns) of each sample; none where no turn is left to label."""
    stripped = frozenset() if thinking == "keep" else _stripped(messages)
    if stripped and thinking == "split_turns":
        yield from _split_at_queries(messages, answers, warnings)
        return
    if unlearned := len(stripped & answers):
        warnings["earlier turn loses its reasoning and carries no label"] += unlearned
    if answers - stripped:
        yield messages, answers - stripped


def _split_at_queries(
    messages: tuple[Message, ...], answers: frozenset[int], warnings: Counter[str]
) -> Iterator[tuple[tuple[Message, ...], frozenset[int]]]:
    """Yield, per user query, the conversation up to its last answer and the answers after it."""
    queries = [index for index, message in enumerate(messages) if is_query(message)]
    for query, end in pairwise([*queries, len(messages)]):
        labelled = frozenset(index for index in answers if query < index < end)
        if labelled:
            yield messages[: max(labelled) + 1], labelled
    if lost := sum(index < min(queries, default=len(messages)) for index in answers):
        warnings["answer before the first user turn carries no label"] += lost


def _as_template_dict(message: Message) -> dict[str, Any]:
    """Write a message as chat templates want it.

    An empty reasoning_content tells the thinking templates not to look for one in the content.
    """
    if message.written is not None:  # the template itself has to find the reasoning in it
        turn: dict[str, Any] = {"role": message.role, "content": message.written}
    else:
        turn = {"role": message.role, "content": message.content}
    if message.role == "assistant" and message.written is None:
        turn["reasoning_content"] = message.reasoning or ""
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return turn


def _difference(ours: str, theirs: str, chat_format: str) -> str:
    pairs = zip(ours, theirs, strict=False)
    at = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    around = slice(max(0, at - 40), at + 40)
    return (
        f"the tokenizer's chat template differs from {chat_format} at character {at}:\n"
        f"  {chat_format}: {ours[around]!r}\n  tokenizer: {theirs[around]!r}\n"
        "set --chat_format to the family the model was trained with, or restore the released "
        "model's chat template"
    )
