"""Conversations become text with labels on exactly what the model has to say.

Neither the released templates nor TRL's training variants of them give the right labels: the first
have none, the second change the text. So the text is written here in pieces, equal to the released
template's, and every piece knows whether it carries labels and whether it is a control token.
Content is never a control token, whatever it spells; `encoding.py` keeps it so.

An assistant's labels run from after ``<|im_start|>assistant`` and its newline up to and including
``<|im_end|>``: what the model generates, and nothing that a prompt gives it.

The trap: thinking templates show earlier turns without their think blocks, of which the one before
an answer without reasoning is empty. A conversation trained as one text loses reasoning, or shows
its answers after something that no prompt of inference ends with. So the invariant: the prompt of
inference at that point and the answer are how the sample begins. `split_turns` makes as many
samples as that takes, and no more: `contexts.py` knows how many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Literal

from qwen3_sft.chat.contexts import shared_contexts
from qwen3_sft.chat.pieces import Piece, PieceWriter, Rendered, Segment
from qwen3_sft.chat.samples import Conversation, Message, PlainText
from qwen3_sft.chat.templates import CHAT_FORMATS, ChatFormat, detect_chat_format
from qwen3_sft.chat.text import write_conversation
from qwen3_sft.chat.written import as_family_reads
from qwen3_sft.errors import DataError

__all__ = ["CHAT_FORMATS", "Piece", "Rendered", "detect_chat_format", "render", "render_plain"]

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
        thinking: earlier answers that no text shows in the context of inference together with the
            later ones: `split_turns` gives them samples of their own, `drop_history` leaves them
            without labels, `keep` writes every answer as it was generated into one text.
        train_empty_think: label an empty think block too, as a row whose `enable_thinking` is true
            does. A prompt of the Thinking-2507 models only opens the block, so there it always is.
        location: of the row, for errors.
        warnings: receives counts by kind.

    Returns:
        One sample, or several with `split_turns`; each has at least one label.

    Raises:
        DataError: for reasoning in a family that has no thinking, and when nothing is left to
            train.
    """
    fmt = CHAT_FORMATS[chat_format]
    messages = as_family_reads(without_trailing(conversation.messages, warnings), fmt)
    if not fmt.thinks and any(message.reasoning for message in messages):
        raise DataError(
            f"{location}: this row has reasoning but {chat_format} has no thinking; use a "
            "thinking model or remove reasoning_content and <think> blocks"
        )
    if conversation.masked and train_on == "all":
        raise DataError(
            f"{location}: the row's loss flags mask answers, but --train_on all labels every "
            "token; set --train_on assistant, or name the flags in --ignore_columns"
        )
    keep = thinking == "keep"
    if train_on == "all":
        text = write_conversation(messages, conversation.tools, fmt, keep_reasoning=keep)
        return [text.fully_trained()]
    answers = _answers(conversation, messages, train_on)
    groups = _groups(messages, answers, fmt, thinking, warnings)
    if not groups:
        raise DataError(f"{location}: no answer is left to train with thinking={thinking}")
    if fmt.prompt_opens_think:
        _count_closed_at_once(messages, groups, warnings)
    written: dict[Hashable, Segment] = {}
    return [
        write_conversation(
            messages[: max(labelled) + 1],
            conversation.tools,
            fmt,
            labelled=labelled,
            keep_reasoning=keep,
            label_empty_think=train_empty_think or conversation.enable_thinking is True,
            written=written,
        )
        for labelled in groups
    ]


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
    rendered = Rendered((writer.finish(),))
    return rendered.fully_trained() if train_on == "all" else rendered


def without_trailing(messages: tuple[Message, ...], warnings: Counter[str]) -> tuple[Message, ...]:
    """Cut what follows the last answer: nothing learns from it."""
    end = len(messages)
    while messages[end - 1].role != "assistant":
        end -= 1
    if end < len(messages):
        warnings["trailing turn without an answer cut"] += 1
    return messages[:end]


def _answers(
    conversation: Conversation, messages: tuple[Message, ...], train_on: TrainOn
) -> frozenset[int]:
    answers = [
        index
        for index, message in enumerate(messages)
        if message.role == "assistant"
        and index >= conversation.first_trained
        and index not in conversation.masked
    ]
    return frozenset(answers[-1:] if train_on == "last_assistant" else answers)


def _groups(
    messages: tuple[Message, ...],
    answers: frozenset[int],
    fmt: ChatFormat,
    thinking: Thinking,
    warnings: Counter[str],
) -> list[frozenset[int]]:
    """Return the answers of each sample."""
    if thinking == "keep":
        return [answers] if answers else []
    groups = shared_contexts(messages, answers, fmt)
    if thinking == "drop_history" and len(groups) > 1:
        warnings["earlier answer is not seen like this at inference and carries no label"] += sum(
            map(len, groups[:-1])
        )
        return groups[-1:]
    return groups


def _count_closed_at_once(
    messages: tuple[Message, ...], groups: list[frozenset[int]], warnings: Counter[str]
) -> None:
    """Count answers that teach a model, whose prompt opens its thinking, to close it at once."""
    if bare := sum(messages[i].reasoning is None for group in groups for i in group):
        warnings["answer without reasoning: </think> is learned as the first thing to say"] += bare
