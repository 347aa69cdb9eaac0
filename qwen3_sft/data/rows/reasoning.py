"""An assistant's reasoning: under whichever key, in parts, or written into the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen3_sft.chat.templates import END_THINK, THINK
from qwen3_sft.data.rows.source import Source
from qwen3_sft.data.rows.values import check_text, describe

REASONING_KEYS = (
    "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_text", "think",
    "thinking_content",
)  # fmt: skip
_DETAILS = "reasoning_details"  # of OpenRouter: a list of texts
REASONING_FIELDS = frozenset({*REASONING_KEYS, _DETAILS, "thinking_blocks"})


def given_reasoning(
    fields: Mapping[str, Any], in_parts: str | None, where: str, source: Source
) -> str | None:
    """Return the reasoning that a message has apart from its text; None where it has no key for it.

    Args:
        fields: of the message.
        in_parts: what its parts hold.
        where: the place in the row.
        source: for errors.

    Raises:
        DataError: it is no string, or two places differ.
    """
    found = {name: fields[name] for name in REASONING_KEYS if name in fields}
    for name in (_DETAILS, "thinking_blocks"):
        if fields.get(name):
            found[name] = _joined(fields[name], f"{where} {name}", source)
    if in_parts is not None:
        found["its parts"] = in_parts
    for name, value in found.items():
        if not isinstance(value, str):
            source.fail(f"{where} {name} must be a string, found {describe(value)}")
        check_text(value, f"{where} {name}", source)
        found[name] = _without_tags(value)
        if END_THINK in found[name]:
            source.fail(
                f"{where} {name} has {END_THINK} in it, where its block would end; remove the tag"
            )
    texts = {value.strip() for value in found.values() if value.strip()}
    if len(texts) > 1:
        source.fail(f"{where} has reasoning in {' and '.join(found)}, which differ; keep one")
    return next((value for value in found.values() if value.strip()), "" if found else None)


def _without_tags(reasoning: str) -> str:
    """Return reasoning without the block's own tags, which the template writes."""
    text = reasoning.strip()
    if not text.startswith(THINK) or not text.endswith(END_THINK):
        return reasoning
    return text.removeprefix(THINK).removesuffix(END_THINK).strip("\n")


def _joined(details: Any, where: str, source: Source) -> str:
    texts = []
    for detail in details if isinstance(details, list | tuple) else [details]:
        keys = [key for key in ("text", "thinking") if isinstance(detail, dict) and key in detail]
        if not keys or not isinstance(detail[keys[0]], str):
            source.fail(f"{where} must be a list of texts, found {describe(detail)}")
        texts.append(detail[keys[0]])
    return "".join(texts)


def split_think(text: str, where: str, source: Source) -> tuple[str | None, str]:
    """Split a think block off the start of an answer: (reasoning or None, answer).

    A text that closes the block without opening it is what a model writes whose prompt opens it;
    the released templates read it so too.

    Raises:
        DataError: for a block that is not closed, one that text stands before, and a second one.
    """
    if END_THINK not in text:
        if text.lstrip().startswith(THINK):
            source.fail(f"{where} opens {THINK} without closing it; add {END_THINK} after it")
        return None, text
    if text.count(THINK) > 1 and text.count(END_THINK) > 1:
        source.fail(f"{where} has two {THINK} blocks; an answer has at most one, at its start")
    before, _, answer = text.partition(END_THINK)
    opened = before.lstrip().removeprefix(THINK)
    is_opened = before.lstrip().startswith(THINK)
    if THINK in opened:
        problem = f"opens {THINK} without closing it" if is_opened else f"has text before {THINK}"
        source.fail(f"{where} {problem}; an answer has one block, at its start")
    if END_THINK in answer:
        source.fail(
            f"{where} has {END_THINK} twice, and templates show only what follows the last; keep "
            "the one that ends the reasoning, or give the reasoning as reasoning_content"
        )
    return (opened if is_opened else before).strip("\n"), answer.lstrip("\n")
