"""Rendered text in pieces: each knows whether it is a control token and whether it is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import NamedTuple

from qwen3_sft.chat.templates import CONTROL_TOKENS

_CONTROL = re.compile("(" + "|".join(map(re.escape, CONTROL_TOKENS)) + ")")


class Piece(NamedTuple):
    """A stretch of text that is tokenised on its own; a control piece is exactly one token."""

    text: str
    trained: bool
    control: bool


Segment = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """One training sample as text.

    Attributes:
        segments: its turns, whose ends are never inside a piece. Samples of one conversation share
            those that are alike, so that each is tokenised once.
    """

    segments: tuple[Segment, ...]

    @property
    def pieces(self) -> Segment:
        """All pieces; adjacent plain ones differ in `trained`."""
        return tuple(chain.from_iterable(self.segments))

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.pieces)

    def fully_trained(self) -> Rendered:
        """Return the same text with a label on every token."""
        return Rendered(tuple(map(_fully_trained, self.segments)))


def _fully_trained(segment: Segment) -> Segment:
    writer = PieceWriter()
    for piece in segment:
        add = writer.control if piece.control else writer.plain
        add(piece.text, trained=True)
    return writer.finish()


class PieceWriter:
    """Collects pieces; joins plain ones as far as possible, so that they tokenise as one text."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._texts: list[str] = []  # of the plain piece that is being written
        self._trained = False

    def control(self, token: str, *, trained: bool = False) -> None:
        """Append a control token."""
        if self._texts:
            self._flush()
        self._pieces.append(_control(token, trained))

    def plain(self, text: str, *, trained: bool = False) -> None:
        """Append text that is never a control token, whatever it spells."""
        if not text:
            return
        if self._texts and trained != self._trained:
            self._flush()
        self._texts.append(text)
        self._trained = trained

    def template(self, text: str) -> None:
        """Append untrained text of ours, in which control tokens are meant as such."""
        for index, part in enumerate(_CONTROL.split(text)):
            if index % 2:
                self.control(part)
            else:
                self.plain(part)

    def finish(self) -> Segment:
        """Return what was written."""
        if self._texts:
            self._flush()
        return tuple(self._pieces)

    def _flush(self) -> None:
        self._pieces.append(Piece("".join(self._texts), self._trained, False))
        self._texts = []


@cache
def _control(token: str, trained: bool) -> Piece:
    return Piece(token, trained, True)
