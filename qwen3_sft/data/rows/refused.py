"""Data sets that are not supervised answers, told by their columns."""

from __future__ import annotations

from collections.abc import Collection

from qwen3_sft.data.rows.fields import meaning

_PREFERENCE = "preference data (DPO, ORPO), and this trains on answers alone: write the better one "
_TURN = "as an assistant's turn"
_KINDS = (
    ({"chosen", "rejected"},
     f"chosen and rejected answers are {_PREFERENCE}{_TURN}, or map the columns, such as --columns "
     "completion=chosen (texts) or messages=chosen (conversations) --ignore_columns rejected"),
    ({"preferred_output", "non_preferred_output"},
     f"preferred_output and non_preferred_output are {_PREFERENCE}{_TURN}"),
    ({"prompt", "completions", "labels"},
     "labels of single steps are data for a process reward model, and this trains on answers"),
    ({"prompt", "reward_model"},
     "a prompt with a reward_model is for reinforcement learning (RL): it has no answer to learn"),
    ({"prompt", "ground_truth"},
     "a prompt with a ground_truth is for reinforcement learning (RL): it has no answer to learn"),
    ({"prompt", "label"},
     "a prompt with a label is for classification or KTO: it has no answer to learn"),
    ({"prompt", "answer"},
     "a prompt with an answer may be an RL prompt with what its reward is computed from; if the "
     "answer is what to learn, set --columns question=prompt (a chat) or completion=answer (text)"),
    ({"prompt", "solution"},
     "a prompt with a solution may be an RL prompt with what its reward is computed from; if the "
     "solution is what to learn, set --columns question=prompt answer=solution (a chat) or "
     "completion=solution (text)"),
)  # fmt: skip
_NO_ANSWER = (
    "a prompt without an answer (RL prompts are such), and answers are what is learned: name the "
    "column of the answer with --columns completion=NAME"
)


_REFERENCES = ("answer", "solution", "ground_truth", "reward_model", "reference",
               "reference_answer", "expected_answer", "gold", "target", "label")  # fmt: skip


def prompt_alone(columns: Collection[str]) -> str | None:
    """Return what messages without an answer are, if a column beside them tells."""
    found = [name for name in _REFERENCES if name in columns]
    if not found:
        return None
    return (
        f"no assistant turn, but {' and '.join(found)}: this is an RL prompt with what its reward "
        "is computed from, and answers are what is learned here; write them as assistant's turns"
    )


def not_supervised(columns: Collection[str]) -> str | None:
    """Return what a row without a known format is, and what to do; None if nothing tells."""
    names = set(columns)
    for kind, what in _KINDS:
        if kind <= names:
            return f"columns {sorted(names)}: {what}"
    for name in sorted(names):
        if what := meaning(name, ""):
            return f"columns {sorted(names)} are no known format: {name!r} is {what}"
    if "prompt" in names:
        return (
            f"columns {sorted(names)} are no known format: {_NO_ANSWER}; accepted are "
            "also messages | conversations | text | input_ids"
        )
    return None
