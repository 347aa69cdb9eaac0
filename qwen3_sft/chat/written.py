"""Think tags that the rows have in their text, for families of models that do not think."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qwen3_sft.chat.samples import Message
from qwen3_sft.chat.templates import THINK, ChatFormat


def as_family_reads(messages: Sequence[Message], fmt: ChatFormat) -> tuple[Message, ...]:
    """Return the messages as the family's template reads their text.

    A template without thinking leaves a closing tag in the text, where the others see the end of
    an empty block. An empty block that a thinking model wrote is no part of the answer to either.
    """
    if fmt.thinks:
        return tuple(messages)
    return tuple(
        message
        if message.written is None or message.reasoning is not None
        else replace(message, content=_without_block(message), written=None)
        for message in messages
    )


def _without_block(message: Message) -> str:
    written = message.written or ""
    return message.content if written.lstrip().startswith(THINK) else written
