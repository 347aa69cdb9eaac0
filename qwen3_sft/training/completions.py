"""What the model says: held-out prompts completed before, during and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import TrainerCallback

from qwen3_sft.records.step_lines import StepLines
from qwen3_sft.training.metrics import Metrics


class TokenSamples(Protocol):
    """Tokenised samples: (ids, trained) by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Prompt:
    """A held-out sample cut where its first trained token begins.

    Attributes:
        ids: the prompt's tokens.
        text: the last user message, or the whole prompt if it is no conversation.
        reference: what the data says comes next.
    """

    ids: list[int]
    text: str
    reference: str


def pick_prompts(
    samples: TokenSamples, tokenizer: Any, number: int, max_length: int
) -> list[Prompt]:
    """Return up to `number` prompts, spread evenly over the samples."""
    prompts = []
    for index in np.linspace(0, len(samples) - 1, min(number, len(samples)), dtype=int).tolist():
        ids, trained = samples[index]
        labelled = np.flatnonzero(trained)
        if len(labelled) == 0 or not 0 < labelled[0] < max_length:
            continue  # nothing to ask (plain text), or the prompt alone fills the context
        start = int(labelled[0])
        stops = np.flatnonzero(~trained[start:])
        end = start + int(stops[0]) if len(stops) else len(ids)
        prompts.append(
            Prompt(
                ids=ids[:start].tolist(),
                text=_question(str(tokenizer.decode(ids[:start]))),
                reference=tokenizer.decode(ids[start:end], skip_special_tokens=True).strip(),
            )
        )
    return prompts


def _question(prompt: str) -> str:
    """Return what the user asked last."""
    _, found, rest = prompt.rpartition("<|im_start|>user\n")
    return rest.partition("<|im_end|>")[0].strip() if found else prompt.strip()


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    turn_ends: Sequence[str] = (),
) -> list[str]:
    """Return a greedy completion of each prompt; the model's mode is put back afterwards.

    It ends at the tokens that end a labelled turn, or where there are none at the tokenizer's own.
    """
    ends = [tokenizer.convert_tokens_to_ids(t) for t in turn_ends or [tokenizer.eos_token]]
    was_training = model.training
    model.eval()
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids], device=model.device)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
            max_new_tokens=max_new_tokens, eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    model.train(was_training)
    return texts


class CompletionCallback(TrainerCallback):
    """Write completions to samples.jsonl at the start, at each evaluation and at the end.

    On rank 0, and where weights are sharded on all ranks, which compute the same and write nothing.
    Without sharding the others wait at their next collective.
    """

    def __init__(
        self,
        lines: StepLines | None,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        max_new_tokens: int,
        resume_step: int | None,
        metrics: Metrics,
        turn_ends: Sequence[str] = (),
    ) -> None:
        """Remember what to ask, and whose step time it is not."""
        self.lines, self.prompts, self.tokenizer = lines, prompts, tokenizer
        self.turn_ends = turn_ends
        self.max_new_tokens = max_new_tokens
        self.metrics = metrics
        self._last_step = resume_step  # answered before the run was interrupted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask before the first step."""
        self._ask(state, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask at each evaluation."""
        self._ask(state, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the model that is going to be exported."""
        self._ask(state, **kwargs)

    def _ask(self, state: Any, *, model: Any, **kwargs: Any) -> None:
        if state.global_step == self._last_step:
            return
        self._last_step = state.global_step
        with self.metrics.window.pause():
            answers = complete(
                model, self.tokenizer, self.prompts, self.max_new_tokens, self.turn_ends
            )
        for prompt, answer in zip(self.prompts, answers, strict=True):
            if self.lines is None:
                continue
            self.lines.write(
                {
                    "step": state.global_step,
                    "prompt": prompt.text,
                    "completion": answer,
                    "reference": prompt.reference,
                }
            )


def before_and_after(path: Path) -> str:
    """Return the first prompt with its first and last completion, "" if there are none."""
    if not path.is_file():
        return ""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not records:
        return ""
    same = [r for r in records if r["prompt"] == records[0]["prompt"]]
    first, last = same[0], same[-1]
    return (
        f"prompt     {first['prompt']}\n"
        f"before     {first['completion'][:300]!r} (step {first['step']})\n"
        f"after      {last['completion'][:300]!r} (step {last['step']})\n"
        f"reference  {first['reference'][:300]!r}"
    )
