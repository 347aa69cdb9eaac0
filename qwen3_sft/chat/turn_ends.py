"""Which tokens end what a model is trained to say, read off the labels themselves.

Generation must stop where the labels did: the export writes these tokens as its end tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np

from qwen3_sft.chat.templates import IM_END


class TurnEnds:
    """Finds the end tokens in samples; pickles, so that worker processes get a copy."""

    def __init__(
        self, added: Mapping[str, int], special: Collection[str], eos_token: str, newline: list[int]
    ) -> None:
        """Take over what there is to look for.

        Args:
            added: the tokenizer's added tokens and their ids.
            special: those of them that stand for nothing in a text.
            eos_token: the tokenizer's end token, which ends text outside any chat.
            newline: what the tokenizer makes of a newline.
        """
        self._names = {added[token]: token for token in {IM_END, eos_token, *special}}
        self._known = [added[IM_END], added[eos_token]]
        self._newline = newline[-1]

    def count(
        self, ids: np.ndarray, trained: np.ndarray, limit: int, *, is_given: bool
    ) -> dict[str, int]:
        """Return how many labelled turns of a sample each end token ends.

        Args:
            ids: (T,) int32.
            trained: (T,) bool.
            limit: tokens of the sample that are used; turns cut off before their end do not count.
            is_given: the row came tokenised, so that its turns may end in any special token; a
                newline after it may carry a label too, as `--train_on all` labels it.
        """
        if not is_given:
            labelled = ids[:limit][trained[:limit]]
            counted = {i: int(np.count_nonzero(labelled == i)) for i in self._known}
            return {self._names[i]: count for i, count in counted.items() if count}
        is_end = trained & np.isin(ids, self._known)
        last = np.flatnonzero(trained & ~np.append(trained[1:], False))
        after = (ids[last] == self._newline) & (last > 0)
        is_end[np.where(after & trained[last - 1], last - 1, last)] = True
        found = ids[:limit][is_end[:limit]].tolist()
        return Counter(self._names[token] for token in found if token in self._names)


def in_order(turn_ends: Mapping[str, int]) -> dict[str, int]:
    """Return the end tokens, the most important first: the chat's, then the most frequent."""
    return dict(sorted(turn_ends.items(), key=lambda item: (item[0] != IM_END, -item[1])))
