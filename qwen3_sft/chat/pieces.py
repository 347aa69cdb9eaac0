"""Rendered text in pieces: each knows whether it is a control token and whether it is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from qwen3_sft.chat.templates import CONTROL_TOKENS

_CONTROL = re.compile("(" + "|".join(map(re.escape, CONTROL_TOKENS)) + ")")


class Piece(NamedTuple):
    """A stretch of text that is tokenised on its own; a control piece is exactly one token."""

    text: str
    trained: bool
    control: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """One training sample as text. Adjacent plain pieces differ in `trained`."""

    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.pieces)

    def fully_trained(self) -> Rendered:
        """Return the same text with a label on every token."""
        writer = PieceWriter()
        for piece in self.pieces:
            add = writer.control if piece.control else writer.plain
            add(piece.text, trained=True)
        return writer.finish()


class PieceWriter:
    """Collects pieces; joins plain ones as far as possible, so that they tokenise as one text."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []

    def control(self, token: str, *, trained: bool = False) -> None:
        """Append a control token."""
        self._pieces.append(Piece(token, trained, True))

    def plain(self, text: str, *, trained: bool = False) -> None:
        """Append text that is never a control token, whatever it spells."""
        if not text:
            return
        if self._pieces:
            last = self._pieces[-1]
            if not last.control and last.trained == trained:
                self._pieces[-1] = Piece(last.text + text, trained, False)
                return
        self._pieces.append(Piece(text, trained, False))

    def template(self, text: str) -> None:
        """Append untrained text of ours, in which control tokens are meant as such."""
        for index, part in enumerate(_CONTROL.split(text)):
            if index % 2:
                self.control(part)
            else:
                self.plain(part)

    def finish(self) -> Rendered:
        """Return what was written."""
        return Rendered(tuple(self._pieces))
