"""The data of a run: what is trained, and what it is evaluated on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen3_sft.data.prepare import prepare
from qwen3_sft.data.token_store import TokenDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen3_sft.options.data_args import DataArguments


@dataclass(frozen=True)
class Tokens:
    """The data of a run.

    Attributes:
        tokenizer: of the base model.
        train: samples to train on.
        eval: held-out samples, None for no evaluation.
        has_own_eval: whether they come from files of their own, with a report of their own.
    """

    tokenizer: PreTrainedTokenizerBase
    train: TokenDataset
    eval: TokenDataset | None = None
    has_own_eval: bool = False

    @property
    def turn_ends(self) -> list[str]:
        """The tokens that end a labelled turn, the most important first."""
        return list(self.train.report["turn_ends"])

    def write_reports(self, write: Callable[[str, Any], None]) -> None:
        """Write what was read and what was dropped.

        Args:
            write: takes the name of a record and its content.
        """
        write("data_report.json", self.train.report)
        if self.has_own_eval and self.eval is not None:
            write("eval_data_report.json", self.eval.report)


def prepare_tokens(data: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> Tokens:
    """Tokenise all data of a run, or open what an earlier one, or `data prepare`, has made.

    Args:
        data: the sources and what to make of them.
        tokenizer: of the base model.
        seed: decides which rows `eval_fraction` holds out.

    Raises:
        DataError: as `prepare`, or too few rows to hold some out.
        UsageError: as `prepare`.
    """
    tokens = prepare(data, tokenizer)
    if data.eval_dataset:
        return Tokens(tokenizer, tokens, prepare(data, tokenizer, eval=True), has_own_eval=True)
    if data.eval_fraction:
        return Tokens(tokenizer, *tokens.split(data.eval_fraction, seed))
    return Tokens(tokenizer, tokens)
