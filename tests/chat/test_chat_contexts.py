from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from qwen3_sft.data.formats import parse_row
from tests.support.data_rows import trained_texts
from tests.support.turns import CALL, CALL_TEXT, a, conversation, q, rendered, result, trained

THINKING = ("qwen3", "qwen3_thinking_2507")


def test_the_2507_thinking_model_learns_to_close_its_thinking():
    warnings = Counter()
    messages = [q(), a("x"), q(), a("y", "why"), q(), a("z")]
    texts = trained(messages, "qwen3_thinking_2507", warnings=warnings)
    closing = "\n</think>\n\n"
    assert texts == [
        [f"{closing}x<|im_end|>"],
        [f"why{closing}y<|im_end|>"],
        [f"{closing}z<|im_end|>"],
    ]
    assert warnings == {
        "answer without reasoning: </think> is learned as the first thing to say": 2
    }


def test_an_empty_think_block_is_trained_only_on_request():
    assert rendered([q(), a("x")])[0].text.endswith("\n<think>\n\n</think>\n\nx<|im_end|>\n")
    assert trained([q(), a("x")]) == [["x<|im_end|>"]]
    texts = trained([q(), a("x")], train_empty_think=True)
    assert texts == [["<think>\n\n</think>\n\nx<|im_end|>"]]
    texts = trained([q(), a("x")], "qwen3_thinking_2507", train_empty_think=True)
    assert texts == [["\n</think>\n\nx<|im_end|>"]]


def test_a_row_may_say_whether_it_thinks():
    """Then the prompt has no empty block, and the model has to write it."""
    for enable_thinking, label in ((True, "<think>\n\n</think>\n\nx"), (False, "x"), (None, "x")):
        sample = replace(conversation(q(), a("x")), enable_thinking=enable_thinking)
        assert trained(sample) == [[f"{label}<|im_end|>"]]
        assert trained(sample, "qwen3_instruct_2507") == [["x<|im_end|>"]]


def test_split_turns_shows_each_query_its_own_history():
    call = {**CALL, "reasoning_content": "rc"}
    samples = rendered([q("q1"), a("x", "r1"), q("q2"), call, result("9"), a("y", "r2")])
    assert [sample.text for sample in samples] == [
        "<|im_start|>user\nq1<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nr1\n</think>\n\nx<|im_end|>\n",
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nrc\n</think>\n\n{CALL_TEXT}\n"
        "<|im_start|>user\n<tool_response>\n9\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nr2\n</think>\n\ny<|im_end|>\n",
    ]
    assert trained_texts(samples[1]) == [
        f"<think>\nrc\n</think>\n\n{CALL_TEXT}",
        "<think>\nr2\n</think>\n\ny<|im_end|>",
    ]


def test_a_step_without_reasoning_stands_bare_in_later_prompts():
    samples = rendered([q(), CALL, result("9"), a("y")])
    start, block = (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\n",
    )
    assert [sample.text for sample in samples] == [
        f"{start}{block}{CALL_TEXT}\n",
        f"{start}{CALL_TEXT}\n<|im_start|>user\n<tool_response>\n9\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n{block}y<|im_end|>\n",
    ]


def test_two_queries_in_a_row_make_one_sample():
    texts = trained([q("1"), q("2"), a("x", "r1"), q("3"), a("y", "r2")])
    assert [len(sample) for sample in texts] == [1, 1]


def test_drop_history_labels_what_inference_would_show():
    warnings = Counter()
    call = {**CALL, "reasoning_content": "rc"}
    messages = [q(), a("x", "r1"), q(), a("y"), q(), call, result("1"), a("z", "r3")]
    texts = trained(messages, thinking="drop_history", warnings=warnings)
    assert texts == [
        [f"<think>\nrc\n</think>\n\n{CALL_TEXT}", "<think>\nr3\n</think>\n\nz<|im_end|>"]
    ]
    assert warnings == {"earlier answer is not seen like this at inference and carries no label": 2}


def test_keep_writes_every_answer_as_it_was_generated():
    (sample,) = rendered([q(), a("x", "r1"), q(), a("y"), q(), a("z", "r2")], thinking="keep")
    assert trained_texts(sample) == [
        "<think>\nr1\n</think>\n\nx<|im_end|>", "y<|im_end|>",
        "<think>\nr2\n</think>\n\nz<|im_end|>",
    ]  # fmt: skip
    assert "<think>\n\n</think>\n\ny<|im_end|>" in sample.text


@pytest.mark.parametrize("thinking", ["split_turns", "drop_history", "keep"])
def test_last_assistant_labels_one_turn(thinking):
    messages = [q(), a("x", "r1"), q(), a("y"), a("z")]
    assert trained(messages, train_on="last_assistant", thinking=thinking) == [["z<|im_end|>"]]


def test_all_labels_every_token_of_one_text():
    messages = [q(), a("x", "r1"), q(), a("y", "r2")]
    for chat_format in THINKING:
        (sample,) = rendered(messages, chat_format, train_on="all")
        assert trained_texts(sample) == [sample.text]
        (unsplit,) = rendered(messages, chat_format, thinking="drop_history")
        assert sample.text == unsplit.text
        (sample,) = rendered([q(), a("x"), q(), a("y")], chat_format, train_on="all")
        assert "assistant\nx" in sample.text


def test_prompt_messages_carry_no_labels():
    row = {"prompt": [q(), a("x"), q()], "completion": [a("y")]}
    sample = parse_row(row, "prompt_completion", "f:1", Counter())
    assert trained(sample) == [["y<|im_end|>"]]
    row["prompt"][1]["reasoning_content"] = "r1"
    assert trained(parse_row(row, "prompt_completion", "f:1", Counter())) == [["y<|im_end|>"]]


def test_an_answer_before_the_first_query_has_a_prompt_too():
    system = {"role": "system", "content": "s"}
    samples = rendered([system, a("hi", "r0"), q(), a("x", "r1")])
    start = "<|im_start|>system\ns<|im_end|>\n<|im_start|>assistant\n"
    assert samples[0].text == f"{start}<think>\nr0\n</think>\n\nhi<|im_end|>\n"
    assert samples[1].text.startswith(f"{start}hi<|im_end|>\n<|im_start|>user")
