import json

import numpy as np
import pytest

from qwen3_sft.training.completions import before_and_after, complete, pick_prompts
from tests.support.training import PATCHES


class Samples(list):
    """(ids, trained) pairs made from a chat, the answer trained."""

    def __init__(self, tokenizer, pairs):
        for question, answer in pairs:
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            start = tokenizer(prompt)["input_ids"]
            end = tokenizer(f"{answer}<|im_end|>")["input_ids"]
            ids = np.array(start + end, np.int32)
            self.append((ids, np.arange(len(ids)) >= len(start)))


def test_prompts_are_cut_where_the_answer_begins(tokenizer):
    samples = Samples(tokenizer, [(f"question {i}", f"answer {i}") for i in range(9)])
    prompts = pick_prompts(samples, tokenizer, 3, max_length=99)
    assert [p.text for p in prompts] == ["question 0", "question 4", "question 8"]
    assert [p.reference for p in prompts] == ["answer 0", "answer 4", "answer 8"]
    assert tokenizer.decode(prompts[0].ids).endswith("<|im_start|>assistant\n")


def test_text_without_a_prompt_gives_none(tokenizer):
    ids = np.arange(5, dtype=np.int32)
    assert pick_prompts([(ids, np.ones(5, bool))], tokenizer, 3, max_length=9) == []
    assert pick_prompts([(ids, ids > 3)], tokenizer, 3, max_length=4) == []


@pytest.mark.parametrize("patched", [False, True])
def test_completion_is_greedy_generation(tiny_moe, tokenizer, patched):
    import monkey_patch

    prompt = pick_prompts(Samples(tokenizer, [("hello", "x")]), tokenizer, 1, 99)[0]
    ids = list(prompt.ids)
    import torch

    tiny_moe.eval()
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(tiny_moe(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    if patched:
        monkey_patch.apply_patches(tiny_moe, PATCHES)
    tiny_moe.train()
    (text,) = complete(tiny_moe, tokenizer, [prompt], max_new_tokens=6)
    expected = tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True).strip()
    assert text == expected
    assert tiny_moe.training


def test_before_and_after_shows_the_first_prompt(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert before_and_after(path) == ""
    rows = [
        {"step": step, "prompt": p, "completion": f"{p}{step}", "reference": "r"}
        for step in (0, 5, 9)
        for p in "ab"
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = before_and_after(path)
    assert "'a0' (step 0)" in text
    assert "'a9' (step 9)" in text
    path.write_text("")
    assert before_and_after(path) == ""
