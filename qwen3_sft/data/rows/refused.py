"""Data sets that are not supervised answers, told by their columns."""

from __future__ import annotations

from collections.abc import Collection

_KINDS = (
    ({"chosen", "rejected"},
     "chosen and rejected answers are preference data (DPO, ORPO), and this trains on answers alone: "
     "write the chosen one as an assistant's turn, or map the columns with --columns prompt=prompt "
     "completion=chosen --ignore_columns rejected"),
    ({"preferred_output", "non_preferred_output"},
     "preferred_output and non_preferred_output are preference data (DPO), and this trains on answers "
     "alone: write the preferred one as an assistant's turn"),
    ({"prompt", "completions", "labels"},
     "labels of single steps are data for a process reward model, and this trains on answers"),
    ({"prompt", "reward_model"},
     "a prompt with a reward_model is for reinforcement learning (RL): it has no answer to learn"),
    ({"prompt", "ground_truth"},
     "a prompt with a ground_truth is for reinforcement learning (RL): it has no answer to learn"),
    ({"prompt", "label"}, "a prompt with a label is for classification or KTO, with no answer to learn"),
    ({"prompt", "answer"},
     "a prompt with an answer is read as data for reinforcement learning (RL) by many: if the answer "
     "is what to learn, set --columns completion=answer (plain text) or question=prompt (a chat)"),
    ({"prompt", "solution"},
     "a prompt with a solution is read as data for reinforcement learning (RL) by many: if the "
     "solution is what to learn, set --columns completion=solution (plain text), or "
     "question=prompt answer=solution (a chat)"),
)  # fmt: skip
_NO_ANSWER = (
    "a prompt without an answer (RL prompts are such), and answers are what is learned: name the "
    "column of the answer with --columns completion=NAME"
)


def not_supervised(columns: Collection[str]) -> str | None:
    """Return what a row without a known format is, and what to do; None if nothing tells."""
    names = set(columns)
    for kind, what in _KINDS:
        if kind <= names:
            return f"columns {sorted(names)}: {what}"
    if "prompt" in names:
        return (
            f"columns {sorted(names)} are no known format: {_NO_ANSWER}; accepted are also messages "
            "| conversations | text | input_ids"
        )
    return None
