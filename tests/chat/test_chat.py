from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest

from qwen3_sft.chat.render import CHAT_FORMATS, detect_chat_format, render, render_plain
from qwen3_sft.chat.samples import PlainText
from qwen3_sft.chat.self_check import comparisons, self_check
from qwen3_sft.data.formats import parse_row
from qwen3_sft.demo.model import trl_chat_template
from qwen3_sft.errors import DataError
from tests.support.data_rows import trained_texts

THINKING = ("qwen3", "qwen3_thinking_2507")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"b": 1}}]}
CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"b": 1}}\n</tool_call><|im_end|>'


def q(text="q"):
    return {"role": "user", "content": text}


def a(text, reasoning=None):
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


def result(text):
    return {"role": "tool", "content": text}


def conversation(*messages, **columns):
    row = {"messages": list(messages), **columns}
    return parse_row(row, "messages", "f:1", Counter())


def rendered(
    messages,
    chat_format="qwen3",
    *,
    train_on: Any = "assistant",
    thinking: Any = "split_turns",
    train_empty_think=False,
    warnings=None,
):
    return render(
        conversation(*messages) if isinstance(messages, list) else messages,
        chat_format,
        train_on=train_on,
        thinking=thinking,
        train_empty_think=train_empty_think,
        location="f:1",
        warnings=Counter() if warnings is None else warnings,
    )


def trained(messages, chat_format="qwen3", **options):
    return [trained_texts(sample) for sample in rendered(messages, chat_format, **options)]


def template(name):
    """Return a released template; 2507's thinking one differs from qwen3's in the prompt only."""
    if name != "qwen3_thinking_2507":
        return trl_chat_template(name)
    turns, _, _ = trl_chat_template("qwen3").rpartition("{%- if add_generation_prompt %}")
    prompt = r"{{- '<|im_start|>assistant\n<think>\n' }}"
    return turns + "{%- if add_generation_prompt %}" + prompt + "{%- endif %}"


def check(conversations, tokenizer, name):
    compared = [
        ask
        for i, sample in enumerate(conversations, 1)
        for ask in comparisons(sample, name, f"f:{i}")
    ]
    assert len(compared) >= len(conversations)
    self_check(compared, tokenizer, name)


# The oracle table of docs: messages, then the labelled text per sample.
ORACLE = {
    "single": ([q(), a("x")], [["x<|im_end|>"]]),
    "multi-turn": ([q(), a("x"), q(), a("y")], [["x<|im_end|>"], ["y<|im_end|>"]]),
    "reasoning": ([q(), a("x", "why")], [["<think>\nwhy\n</think>\n\nx<|im_end|>"]]),
    "reasoning in two turns": (
        [q(), a("x", "r1"), q(), a("y", "r2")],
        [["<think>\nr1\n</think>\n\nx<|im_end|>"], ["<think>\nr2\n</think>\n\ny<|im_end|>"]],
    ),
    "reasoning in the first turn": (
        [q(), a("x", "r1"), q(), a("y")],
        [["<think>\nr1\n</think>\n\nx<|im_end|>"], ["y<|im_end|>"]],
    ),
    "reasoning in the last turn": (
        [q(), a("x"), q(), a("y", "r2")],
        [["x<|im_end|>"], ["<think>\nr2\n</think>\n\ny<|im_end|>"]],
    ),
    "tool call": ([q(), CALL, result("9"), a("x")], [[CALL_TEXT], ["x<|im_end|>"]]),
    "text and two calls": (
        [
            q(),
            {**CALL, "content": "hm", "tool_calls": CALL["tool_calls"] * 2},
            result("1"),
            result("2"),
            a("x"),
        ],
        [["hm\n" + CALL_TEXT[:-10] + "\n" + CALL_TEXT], ["x<|im_end|>"]],
    ),
    "tool call after reasoning": (
        [q(), {**CALL, "reasoning_content": "r"}, result("9"), a("x")],
        [["<think>\nr\n</think>\n\n" + CALL_TEXT, "x<|im_end|>"]],
    ),
    "ends with user": ([q(), a("x"), q()], [["x<|im_end|>"]]),
    "reasoning with newlines": (
        [q(), a("\nx", "\n\nwhy\n")],
        [["<think>\nwhy\n</think>\n\nx<|im_end|>"]],
    ),
    "tool calls without reasoning after some": (
        [q(), {**CALL, "reasoning_content": "r"}, result("1"), CALL, result("2"), a("x", "s")],
        [
            ["<think>\nr\n</think>\n\n" + CALL_TEXT, CALL_TEXT],
            ["<think>\ns\n</think>\n\nx<|im_end|>"],
        ],
    ),
    "two answers in a row before reasoning": (
        [q(), a("x"), a("y"), a("z", "r")],
        [["x<|im_end|>", "y<|im_end|>"], ["<think>\nr\n</think>\n\nz<|im_end|>"]],
    ),
    "leading newline": ([q(), a("\nx")], [["x<|im_end|>"]]),
    "emoji": ([q("😀"), a("👩‍👩‍👧 é")], [["👩‍👩‍👧 é<|im_end|>"]]),
    "control text in user": ([q("a<|im_end|>\n"), a("x")], [["x<|im_end|>"]]),
}


@pytest.mark.parametrize("case", ORACLE)
def test_labels_of_the_hybrid_thinking_model(case):
    messages, expected = ORACLE[case]
    assert trained(messages) == expected


@pytest.mark.parametrize("case", ORACLE)
def test_labels_of_the_2507_thinking_model(case):
    messages, expected = ORACLE[case]
    # Its generation prompt ends with "<think>\n", so that is never the model's; the rest always is.
    expected = [
        text.removeprefix("<think>\n") if text.startswith("<think>") else "\n</think>\n\n" + text
        for texts in expected
        for text in texts
    ]
    samples = trained(messages, "qwen3_thinking_2507")
    assert [text for texts in samples for text in texts] == expected


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


@pytest.mark.parametrize("case", [name for name in ORACLE if "reasoning" not in name])
def test_labels_of_the_2507_instruct_model(case):
    messages, expected = ORACLE[case]
    if case == "leading newline":
        expected = [["\nx<|im_end|>"]]
    assert trained(messages, "qwen3_instruct_2507") == [list(chain(*expected))]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_thinking_2507", "qwen3_instruct_2507"])
@pytest.mark.parametrize("case", ORACLE)
def test_text_equals_the_released_template(name, case, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template(name))
    tools = [{"type": "function", "function": {"name": "f", "description": "é <b>"}}]
    assert detect_chat_format(template(name)) == name
    messages, _ = ORACLE[case]
    samples = [
        conversation(*messages),
        conversation({"role": "system", "content": "s"}, *messages),
        conversation(*messages, tools=tools),
        conversation({"role": "system", "content": ""}, *messages, tools=tools * 2),
        conversation(q("x"), {"role": "system", "content": "late"}, *messages),
        conversation(q("<tool_response>x</tool_response>"), *messages[1:]),
        conversation(q(), a("z"), *messages),
        conversation(q(), a("</think> is a tag"), *messages),
    ]
    check(samples, tokenizer, name)


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in THINKING for case in ORACLE]
    + [("qwen3_instruct_2507", case) for case in ORACLE if "reasoning" not in case],
)
def test_the_text_before_a_label_is_the_prompt_of_inference(name, case, tokenizer, monkeypatch):
    """The prompt that a server builds from the turns before an answer must be what was trained."""
    monkeypatch.setattr(tokenizer, "chat_template", template(name))
    messages = ORACLE[case][0][: -1 if case == "ends with user" else None]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    texts = [
        (sample.text, prompt_of_label)
        for sample in rendered(messages, name)
        for prompt_of_label in texts_before_labels(sample)
    ]
    for answer, (text, before) in zip(answers, texts, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:answer],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=bool(messages[answer].get("reasoning_content")),
        )
        assert before == prompt
        assert text.startswith(prompt)


def texts_before_labels(sample):
    """Return what stands before each labelled stretch."""
    text, before, was_trained = "", [], False
    for piece in sample.pieces:
        if piece.trained and not was_trained:
            before.append(text)
        text, was_trained = text + piece.text, piece.trained
    return before


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


def test_trailing_turns_are_cut_and_counted():
    warnings = Counter()
    (sample,) = rendered([q(), a("x"), q("again"), result("9")], warnings=warnings)
    assert sample.text.endswith("x<|im_end|>\n")
    assert warnings == {"trailing turn without an answer cut": 1}


def test_an_answer_before_the_first_query_has_a_prompt_too():
    system = {"role": "system", "content": "s"}
    samples = rendered([system, a("hi", "r0"), q(), a("x", "r1")])
    start = "<|im_start|>system\ns<|im_end|>\n<|im_start|>assistant\n"
    assert samples[0].text == f"{start}<think>\nr0\n</think>\n\nhi<|im_end|>\n"
    assert samples[1].text.startswith(f"{start}hi<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize("name", ["qwen3_instruct_2507", "qwen3_coder", "qwen3_coder_tools"])
def test_reasoning_needs_a_model_that_thinks(name):
    with pytest.raises(DataError, match=f"f:1: .*{name} has no thinking"):
        rendered([q(), a("x", "why")], name)


def test_plain_text_labels_the_completion_and_the_end():
    sample = render_plain(PlainText("p", "c"), "<|im_end|>", train_on="assistant")
    assert (sample.text, trained_texts(sample)) == ("pc<|im_end|>", ["c<|im_end|>"])
    sample = render_plain(PlainText("p", "c"), "<|im_end|>", train_on="all")
    assert trained_texts(sample) == ["pc<|im_end|>"]
    sample = render_plain(PlainText("", "t"), "<|im_end|>", train_on="assistant")
    assert trained_texts(sample) == ["t<|im_end|>"]


def test_self_check_shows_where_a_customised_template_differs(tokenizer, monkeypatch):
    changed = trl_chat_template("qwen3").replace("'<|im_end|>\\n'", "'<|im_end|>'", 1)
    monkeypatch.setattr(tokenizer, "chat_template", changed)
    fine = conversation(q(), a("x"))
    check([fine], tokenizer, "qwen3")
    system = conversation({"role": "system", "content": "s"}, q(), a("x"))
    differs = r"f:2: .*differs from qwen3 at character 30 of the text:(.|\n)*chat_format"
    with pytest.raises(ValueError, match=differs):
        check([fine, system], tokenizer, "qwen3")


def test_self_check_compares_the_prompts_too(tokenizer, monkeypatch):
    changed = trl_chat_template("qwen3").replace("enable_thinking is false", "false")
    monkeypatch.setattr(tokenizer, "chat_template", changed)
    check([conversation(q(), a("x", "why"))], tokenizer, "qwen3")
    with pytest.raises(ValueError, match="of the prompt"):
        check([conversation(q(), a("x"))], tokenizer, "qwen3")


def test_every_format_trains_the_same_answer():
    for name, fmt in CHAT_FORMATS.items():
        (texts,) = trained([q(), a("x")], name)
        assert texts == ["\n</think>\n\nx<|im_end|>" if fmt.prompt_opens_think else "x<|im_end|>"]
