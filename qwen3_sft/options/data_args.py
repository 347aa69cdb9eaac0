"""Where the conversations come from and how they become token rows: the options of the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DataArguments:
    """Where the conversations come from and how they become token rows."""

    dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "files, folders or hub ids; `demo` is the built-in data; PATH@2 passes over it "
            "twice an epoch; in a recipe also mappings of path, name, split, format, columns, "
            "repeat, max_rows"
        },
    )
    dataset_format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "question_answer",
        "prompt_completion",
        "text",
        "tokens",
    ] = field(default="auto", metadata={"help": "auto reads it off the columns of each file"})
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "what the formats' columns are called here, as KNOWN=NAME: prompt=question "
            "completion=answer; for a key of messages message.content=NAME"
        },
    )
    ignore_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "fields of which nothing is learned: a column, message.NAME, part.NAME, "
            "call.NAME"
        },
    )
    on_bad_row: Literal["error", "drop"] = field(
        default="error",
        metadata={
            "help": "a row with a defect: stop, or leave it out, count it and list it in "
            "data_report.json, as far as max_drop_fraction allows"
        },
    )
    txt_rows: Literal["file", "paragraph", "line"] | None = field(
        default=None, metadata={"help": "what one text is in a .txt file, which does not say it"}
    )
    dataset_split: str = field(
        default="train", metadata={"help": "split of folders and hub ids; or FOLDER:SPLIT"}
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "configuration that a hub dataset, or a folder's README.md, has"},
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "commit, tag or branch of a hub dataset"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read hub data row by row, never stored as a whole"}
    )
    max_rows: int | None = field(default=None, metadata={"help": "read at most this many rows"})
    eval_dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "files, folders (validation, else test is read) or hub ids with their split "
            "(org/name:test) for evaluation"
        },
    )
    eval_fraction: float = field(
        default=0.0, metadata={"help": "share of the samples held out for evaluation, 0 to 0.5"}
    )
    max_length: int = field(default=4096, metadata={"help": "tokens in one packed row"})
    packing: bool = field(
        default=True, metadata={"help": "several documents in one row, isolated from each other"}
    )
    overlong: Literal["drop", "error", "truncate"] = field(
        default="drop", metadata={"help": "what to do with samples longer than max_length"}
    )
    train_on: Literal["assistant", "last_assistant", "all"] = field(
        default="assistant", metadata={"help": "which tokens carry a label"}
    )
    thinking: Literal["split_turns", "drop_history", "keep"] = field(
        default="split_turns",
        metadata={
            "help": "earlier answers, which thinking models show without their think blocks: "
            "split_turns makes as many samples as it takes to train each answer in the context of "
            "inference; drop_history trains the last answers only; keep writes every answer as it "
            "was generated into one text (differs from inference)"
        },
    )
    train_empty_think: bool = field(
        default=False, metadata={"help": "put labels on an empty <think></think> block too"}
    )
    chat_format: Literal[
        "auto",
        "qwen3",
        "qwen3_instruct_2507",
        "qwen3_thinking_2507",
        "qwen3_coder",
        "qwen3_coder_tools",
    ] = field(default="auto", metadata={"help": "auto reads it off the tokenizer's chat template"})
    max_drop_fraction: float = field(
        default=0.01, metadata={"help": "more dropped rows than this share is an error"}
    )
    num_proc: int | None = field(
        default=None, metadata={"help": "processes that tokenise; default: one per core if large"}
    )
    data_cache_dir: str | None = field(
        default=None,
        metadata={"help": "where token caches live; default ~/.cache/qwen3_sft/tokens"},
    )

    @property
    def has_evaluation(self) -> bool:
        """Whether there will be samples to evaluate on."""
        return bool(self.eval_dataset or self.eval_fraction)
