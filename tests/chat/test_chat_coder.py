"""Qwen3-Coder's XML tools. The expected strings were written by hand and checked, with random
conversations besides, against the released chat template."""

from __future__ import annotations

from collections import Counter

from qwen3_sft.chat.render import render
from qwen3_sft.chat.samples import Conversation
from qwen3_sft.data.formats import parse_row
from tests.support.data_rows import trained_texts

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": " Look outside. \n",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Wo? Köln", "enum": ["a", "é"]},
                "day": {"type": ["string", "null"], "default": None},
            },
            "required": ["city"],
        },
    },
}
CALL = {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2], "exact": True, "at": None}}
CALL_TEXT = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n"
    "<parameter=days>\n[1, 2]\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
    "<parameter=at>\nNone\n</parameter>\n</function>\n</tool_call>"
)
TOOL_TEXT = (
    "<tools>\n<function>\n<name>weather</name>\n<description>Look outside.</description>\n"
    "<parameters>\n<parameter>\n<name>city</name>\n<type>string</type>\n"
    '<description>Wo? Köln</description>\n<enum>["a", "é"]</enum>\n</parameter>\n'
    "<parameter>\n<name>day</name>\n<type>['string', 'null']</type>\n<default>None</default>\n"
    '</parameter>\n<required>["city"]</required>\n</parameters>\n<strict>True</strict>\n'
    "</function>\n</tools>"
)


def rendered(messages, chat_format="qwen3_coder", **columns):
    sample = parse_row({"messages": messages, **columns}, "messages", "f:1", Counter())
    assert isinstance(sample, Conversation)
    (only,) = render(
        sample,
        chat_format,
        train_on="assistant",
        thinking="split_turns",
        train_empty_think=False,
        location="f:1",
        warnings=Counter(),
    )
    return only


def user(text="q"):
    return {"role": "user", "content": text}


def test_calls_and_results():
    sample = rendered(
        [
            user(),
            {"role": "assistant", "content": " hm \n", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "9"},
            {"role": "tool", "content": "8"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "7"},
            {"role": "assistant", "content": " x"},
        ]
    )
    assert sample.text == (
        "<|im_start|>user\nq<|im_end|>\n"
        f"<|im_start|>assistant\nhm\n\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n9\n</tool_response>\n"
        "<tool_response>\n8\n</tool_response>\n<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL_TEXT}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n7\n</tool_response>\n<|im_end|>\n"
        "<|im_start|>assistant\n x<|im_end|>\n"
    )
    assert trained_texts(sample) == [
        f"hm\n\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>",
        f"{CALL_TEXT}<|im_end|>",
        " x<|im_end|>",
    ]


def test_tools_in_the_system_turn():
    chat = [user(), {"role": "assistant", "content": "x"}]
    text = rendered(chat, tools=[TOOL]).text
    assert text.startswith(
        "<|im_start|>system\nYou are Qwen, a helpful AI assistant that can interact with a "
        "computer to solve tasks.\n\n# Tools\n\nYou have access to the following functions:\n\n"
        f"{TOOL_TEXT}\n\nIf you choose to call a function ONLY reply"
    )
    assert text.endswith(
        "</IMPORTANT><|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\nx<|im_end|>\n"
    )
    assert rendered(chat, tools=[TOOL["function"]]).text == text
    own = rendered([{"role": "system", "content": "s"}, *chat], tools=[TOOL]).text
    assert own.startswith("<|im_start|>system\ns\n\n# Tools\n\n")
    assert rendered([{"role": "system", "content": "s"}, *chat]).text.startswith(
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n"
    )


def test_the_two_wordings_differ_in_the_instructions_only():
    chat = [user(), {"role": "assistant", "content": "x"}]
    text = rendered(chat, "qwen3_coder_tools", tools=[TOOL]).text
    assert f"the following tools:\n\n{TOOL_TEXT}\n\nIf you choose to call a tool ONLY" in text
    assert "<parameter=example_parameter_2>\nvalue_2\n</parameter>" in text
    assert rendered(chat, "qwen3_coder_tools").text == rendered(chat).text


def test_control_tokens_of_the_instructions_are_control_pieces():
    sample = rendered([user(), {"role": "assistant", "content": "x"}], tools=[TOOL])
    calls = [piece.text for piece in sample.pieces if piece.control and "tool_call" in piece.text]
    assert calls == ["<tool_call>", "</tool_call>"] * 2


def test_tools_without_parameters():
    bare = {"name": "f", "parameters": {"type": "object", "properties": {"p": True}}}
    text = rendered(
        [user(), {"role": "assistant", "content": "x"}], tools=[{"name": "e"}, bare]
    ).text
    assert (
        "<tools>\n<function>\n<name>e</name>\n<parameters>\n</parameters>\n</function>\n"
        "<function>\n<name>f</name>\n<parameters>\n<parameter>\n<name>p</name>\n</parameter>\n"
        "</parameters>\n</function>\n</tools>"
    ) in text
