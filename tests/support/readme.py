"""README.md as data: its commands, links, paths and the paragraphs that hold a figure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
_PATH = re.compile(r"(?<![\w./-])((?:config|bench|docs|tests|qwen3_sft|monkey_patch)/[\w./*-]*\w)")
_FIGURE = re.compile(r"\d\s?(?:%|tok/s|tokens/s|TFLOP/s|TFLOPS|GiB|x faster)")
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")


@dataclass(frozen=True)
class Command:
    """One command of a bash block: `NAME=value ... word word ...`."""

    text: str
    environment: dict[str, str]
    words: tuple[str, ...]


def blocks(text: str, language: str) -> Iterator[str]:
    """Yield the contents of the fenced blocks of one language."""
    yield from (body for found, body in _FENCE.findall(text) if found == language)


def commands(text: str) -> Iterator[Command]:
    """Yield every command of every bash block; comments are dropped, `\\` continues a line."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            environment = {}
            while words and _ASSIGNMENT.match(words[0]):
                name, value = words.pop(0).split("=", 1)
                environment[name] = value
            if words:
                yield Command(" ".join(line.split()), environment, tuple(words))


def prose(text: str) -> str:
    """Return the text without its fenced blocks."""
    return _FENCE.sub("", text)


def links(text: str) -> set[str]:
    """Return the targets of relative links."""
    return {t for t in _LINK.findall(prose(text)) if "://" not in t and not t.startswith("mailto:")}


def paths(text: str) -> set[str]:
    """Return what is named under the project's folders, in prose or code, links included."""
    return set(_PATH.findall(re.sub(r"\w+://\S+", "", text)))


def paragraphs(text: str) -> Iterator[str]:
    """Yield paragraphs, whole tables, and list items one by one."""
    for block in re.split(r"\n\s*\n", prose(text).strip()):
        yield from re.split(r"\n(?=\s*(?:[-*]|\d+\.) )", block)


def unproven(text: str) -> list[str]:
    """Return the paragraphs with a measured figure and no link to where it comes from."""
    proof = re.compile(r"^(bench/results|docs)/")
    return [
        paragraph
        for paragraph in paragraphs(text)
        if _FIGURE.search(paragraph) and not any(map(proof.match, links(paragraph)))
    ]
