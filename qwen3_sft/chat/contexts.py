"""Which answers may share one sample: those to which inference shows the same history.

A prompt of inference is the template's text of the turns before an answer, and the opening of the
answer itself. Thinking templates open an answer with a think block, or with what begins one, and
write the block of an earlier answer only as long as it has reasoning and no new question was asked.
So an answer stands in later prompts as it was generated, or it does not; where it does not, the
answers after it need a sample of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qwen3_sft.chat.samples import Message
from qwen3_sft.chat.templates import ChatFormat
from qwen3_sft.chat.text import is_query

# A newline before such a text may become one token with its first characters. In a prompt it ends
# the prompt and in later prompts it stands before the text, so that their tokens differ.
_MERGES = re.compile(r"[\r\n]|\s\s|\s$")


def shared_contexts(
    messages: Sequence[Message], answers: Iterable[int], fmt: ChatFormat
) -> list[frozenset[int]]:
    """Group answers, in order, so that one text is the true context of each of its group.

    Args:
        messages: of the whole conversation.
        answers: indices of the assistant turns to label.
        fmt: the family.
    """
    groups: list[list[int]] = []
    for answer in sorted(answers):
        if groups and _stays(messages, groups[-1][-1], answer, fmt):
            groups[-1].append(answer)
        else:
            groups.append([answer])
    return [frozenset(group) for group in groups]


def _stays(messages: Sequence[Message], answer: int, later: int, fmt: ChatFormat) -> bool:
    """Whether `answer`, and what its prompt showed, is in the prompt of `later` as it was."""
    if _MERGES.match(_first_text(messages[answer], fmt)):
        return False
    if not fmt.thinks:
        return True
    if any(is_query(message) for message in messages[answer + 1 : later]):
        return False
    if not any(is_query(message) for message in messages[:answer]):
        return False  # then no history has blocks
    if _keeps_last_block(messages, answer):
        return False
    # The template writes a block for the last turn of a history, whatever is in it.
    return messages[answer].reasoning is not None or answer + 1 == later


def _keeps_last_block(messages: Sequence[Message], answer: int) -> bool:
    """Whether the turn before has a block in this answer's prompt alone, being the last there."""
    before = messages[answer - 1]
    return before.role == "assistant" and before.reasoning is None


def _first_text(message: Message, fmt: ChatFormat) -> str:
    """Return what an answer begins with, right after the newline that ends its prompt."""
    if fmt.prompt_opens_think:
        return (message.reasoning or "").strip("\n") + "\n"
    if fmt.thinks:
        return ""  # a control token comes first
    return message.content.strip() if fmt.xml_tools and message.tool_calls else message.content
