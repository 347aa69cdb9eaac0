from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from qwen3_sft.chat.render import CHAT_FORMATS, detect_chat_format, render_plain
from qwen3_sft.chat.samples import PlainText
from qwen3_sft.chat.self_check import comparisons, self_check
from qwen3_sft.demo.model import trl_chat_template
from qwen3_sft.errors import DataError
from tests.support.data_rows import trained_texts
from tests.support.turns import CALL, CALL_TEXT, a, conversation, q, rendered, result, trained

THINKING = ("qwen3", "qwen3_thinking_2507")


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


def test_trailing_turns_are_cut_and_counted():
    warnings = Counter()
    (sample,) = rendered([q(), a("x"), q("again"), result("9")], warnings=warnings)
    assert sample.text.endswith("x<|im_end|>\n")
    assert warnings == {"trailing turn without an answer cut": 1}


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
