"""Shapes of data files on the hub, with invented words; the oracle is the released template.

Each entry says what a reader of the data set's card would hand to `apply_chat_template`, and which
answers are to be learned; the last sample's text must be the template's.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qwen3_sft.chat.render import render
from qwen3_sft.data.formats import detect_format, parse_row
from qwen3_sft.data.rows.columns import named_columns
from qwen3_sft.data.rows.source import Reading
from qwen3_sft.demo.model import trl_chat_template
from qwen3_sft.errors import DataError
from tests.support.data_rows import trained_texts


def user(text):
    return {"role": "user", "content": text}


def gpt(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def sharegpt(*pairs, **keys):
    return [{"from": name, "value": value, **keys} for name, value in pairs]


SYSTEM = {"role": "system", "content": "Be brief."}
TIDE = {"name": "tide", "arguments": {"port": "Rye"}}
TOOL = {"type": "function", "function": {"name": "tide", "description": "Height of the tide",
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}}}}}  # fmt: skip
FLAT = TOOL["function"]
CALLS = [
    user("Tide at Rye?"), gpt("", tool_calls=[{"type": "function", "function": TIDE}]),
    {"role": "tool", "content": '{"height": 4}'}, gpt("It is 4 m."),
]  # fmt: skip
CALL_TEXT = json.dumps(TIDE)
TAGGED = f"<tool_call>\n{CALL_TEXT}\n</tool_call>"
ROUNDS = [user("Name a port."), gpt("Hull."), user("Another?"), gpt("Deal.")]
ONE = [user("Name a port."), gpt("Hull.")]
THOUGHT = [user("2 + 2?"), gpt("4", reasoning_content="Two and two.")]
ANSWER = gpt("Hull.")

# name: (row, options, messages for the template, its tools, learned answers in the order of turns)
SHAPES: dict[str, tuple[dict, dict, list, list | None]] = {
    "tatsu-lab/alpaca": (
        {"instruction": "Name a port.", "input": "", "output": "Hull.",
         "text": "### Instruction: .."},
        {"dataset_format": "alpaca"}, ONE, None),
    "databricks/databricks-dolly-15k": (
        {"instruction": "Where?", "context": "Hull has a port.", "response": "Hull.",
         "category": "qa"},
        {}, [user("Where?\nHull has a port."), ANSWER], None),
    "Open-Orca/OpenOrca": (
        {"id": "flan.1", "system_prompt": "Be brief.", "question": "Name a port.",
         "response": "Hull."},
        {}, [SYSTEM, *ONE], None),
    "Open-Orca/SlimOrca": (
        {"conversations": [
            {"from": "system", "value": "Be brief.", "weight": None},
            {"from": "human", "value": "Name a port.", "weight": 0.0},
            {"from": "gpt", "value": "Hull.", "weight": 1.0}]},
        {}, [SYSTEM, *ONE], None),
    "HuggingFaceH4/ultrachat_200k": (
        {"prompt": "Name a port.", "prompt_id": "3f", "messages": ROUNDS}, {}, ROUNDS, None),
    "NousResearch/hermes-function-calling-v1": (
        {"id": "1", "conversations": sharegpt(
            ("system", "You call functions. <tools> [...] </tools>"), ("human", "Tide at Rye?"),
            ("gpt", TAGGED), ("tool", '<tool_response>\n{"height": 4}\n</tool_response>\n'),
            ("gpt", "It is 4 m.")),
         "category": "Sea", "subcategory": "Tides", "task": "Tides", "tools": json.dumps([TOOL])},
        {}, [{"role": "system", "content": "You call functions. <tools> [...] </tools>"}, *CALLS],
        [TOOL]),
    "teknium/OpenHermes-2.5": (
        {"custom_instruction": False, "topic": None, "model_name": None, "model": "m", "hash": "1",
         "skip_prompt_formatting": False, "category": "c", "views": None, "language": None,
         "id": None, "title": None, "idx": None, "avatarUrl": None, "source": "s",
         "system_prompt": None,
         "conversations": sharegpt(("human", "Name a port."), ("gpt", "Hull."))},
        {"ignore_columns": ["custom_instruction", "skip_prompt_formatting"]}, ONE, None),
    "HuggingFaceTB/smoltalk2": (
        {"messages": [THOUGHT[0], gpt("<think>\nTwo and two.\n</think>\n4")], "source": "s",
         "chat_template_kwargs": {"custom_instructions": "", "enable_thinking": True,
                                  "python_tools": None, "xml_tools": []}},
        {}, THOUGHT, None),
    "AI-MO/NuminaMath-CoT": (
        {"source": "s", "problem": "Name a port.", "solution": "Hull.", "messages": ONE},
        {}, ONE, None),
    "open-r1/OpenR1-Math-220k": (
        {"problem": "2 + 2?", "solution": "See: 4.", "answer": "4", "problem_type": "Algebra",
         "question_type": "math-word-problem", "source": "s", "uuid": "u",
         "generations": ["a", "b"],
         "messages": [THOUGHT[0], gpt("<think>\nTwo and two.\n</think>\n\n4")]},
        {"ignore_columns": ["solution", "generations"]}, THOUGHT, None),
    "LLaMA-Factory glaive_toolcall": (
        {"conversations": sharegpt(("human", "Tide at Rye?"), ("function_call", CALL_TEXT),
                                   ("observation", '{"height": 4}'), ("gpt", "It is 4 m.")),
         "tools": json.dumps([FLAT])}, {}, CALLS, [FLAT]),
    "Salesforce/APIGen-MT-5k": (
        {"conversations": sharegpt(("human", "Tide at Rye?"), ("function_call", CALL_TEXT),
                                   ("observation", '{"height": 4}'), ("gpt", "It is 4 m.")),
         "tools": json.dumps([FLAT]), "system": "Be brief."}, {}, [SYSTEM, *CALLS], [FLAT]),
    "anon8231489123/ShareGPT_Vicuna_unfiltered": (
        {"id": "x_0", "conversations": sharegpt(
            ("human", "Name a port."), ("chatgpt", "Hull."), ("human", "Another?"),
            ("bing", "Deal."))},
        {}, ROUNDS, None),
    "allenai/WildChat-1M": (
        {"conversation_hash": "h", "model": "m", "timestamp": 1, "turn": 1, "language": "English",
         "openai_moderation": [{"flagged": False}], "detoxify_moderation": [], "toxic": False,
         "redacted": False, "state": None, "country": "x", "hashed_ip": "h", "header": {"a": "b"},
         "conversation": [
             {"content": "Name a port.", "country": "x", "hashed_ip": "h", "header": {"a": None},
              "language": "English", "redacted": False, "role": "user", "state": None,
              "timestamp": None, "toxic": False, "turn_identifier": 3},
             {"content": "Hull.", "country": None, "language": "English", "redacted": False,
              "role": "assistant", "timestamp": 1, "toxic": False, "turn_identifier": 3}]},
        {}, ONE, None),
    "modelscope/swift agent": (
        {"messages": [user("Tide at Rye?"), {"role": "tool_call", "content": CALL_TEXT},
                      {"role": "tool_response", "content": '{"height": 4}'}, gpt("It is 4 m.")],
         "tools": json.dumps([TOOL])}, {}, CALLS, [TOOL]),
    "OpenAI fine-tuning with functions": (
        {"messages": [user("Tide at Rye?"),
                      gpt(None, function_call={"name": "tide", "arguments": '{"port": "Rye"}'}),
                      {"role": "function", "name": "tide", "content": '{"height": 4}'},
                      gpt("It is 4 m.")],
         "functions": [FLAT], "parallel_tool_calls": False}, {}, CALLS, [TOOL]),
    "FreedomIntelligence/medical-o1-reasoning-SFT": (
        {"Question": "2 + 2?", "Complex_CoT": "Two and two.", "Response": "4"},
        {"columns": ["reasoning=Complex_CoT"]}, THOUGHT, None),
    "nvidia/Llama-Nemotron-Post-Training-Dataset": (
        {"input": [user("2 + 2?")], "output": "<think>\nTwo and two.\n</think>\n\n4",
         "version": "v1",
         "category": "math", "license": "l", "reasoning": "on",
         "generator": "m",
         "used_in_training": "no", "system_prompt": "Be brief."},
        {"ignore_columns": ["used_in_training"]}, [SYSTEM, *THOUGHT], None),
    "Team-ACE/ToolACE, its calls renamed": (
        {"system": "Be brief.", "conversations": [
            {"from": "user", "value": "Name a port."}, {"from": "assistant", "value": "Hull."}]},
        {}, [SYSTEM, *ONE], None),
    "fine-tuning with messages and weights": (
        {"messages": [user("Name a port."), gpt("Hull.", weight=0), user("Another?"),
                      gpt("Deal.", weight=1)]},
        {}, ROUNDS, None),
}  # fmt: skip


def parsed(row: dict, columns=(), ignore_columns=(), dataset_format=None) -> Any:
    row = named_columns(list(columns))(row, "f:1")
    fmt = detect_format([k for k, v in row.items() if v is not None], "f:1", dataset_format)
    reading = Reading(frozenset(ignore_columns), dataset_format is not None)
    return parse_row(row, fmt, "f:1", Counter(), reading=reading)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_read_as_its_card_says(name):
    row, options, messages, tools = SHAPES[name]
    samples = render(
        parsed(row, **options), "qwen3", train_on="assistant", thinking="split_turns",
        train_empty_think=False, location="f:1", warnings=Counter(),
    )  # fmt: skip
    texts, _ = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=trl_chat_template("qwen3")
    )
    assert samples[-1].text == texts[0]
    learned = [text for sample in samples for text in trained_texts(sample)]
    answers = [m for m in messages if m["role"] == "assistant"]
    if "weights" in name:
        answers = answers[1:]
    assert len(learned) == len(answers)
    for text, message in zip(learned, answers, strict=True):
        assert text.endswith(f"{message['content']}<|im_end|>") or message.get("tool_calls")
        assert text.startswith("<think>") == bool(message.get("reasoning_content"))


REFUSED = {
    "Anthropic/hh-rlhf": ({"chosen": "Human: hi", "rejected": "Human: hi"}, "preference data"),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"prompt": "p", "prompt_id": "i", "chosen": ONE, "rejected": ONE, "messages": ONE,
         "score_chosen": 1.0, "score_rejected": 0.0}, "a preference between answers"),
    "trl-lib/kto-mix-14k": (
        {"prompt": [user("q")], "completion": [ANSWER], "label": True}, "a judgement"),
    "openai/gsm8k for verl": (
        {"data_source": "d", "prompt": [user("q")], "ability": "math",
         "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"index": 0}},
        "reinforcement learning"),
    "liuhaotian/LLaVA-Instruct-150K": (
        {"id": "1", "image": "a.jpg", "conversations": sharegpt(("human", "x"), ("gpt", "a"))},
        "media, and a text model sees none"),
    "OpenR1 without a word on its columns": (
        {"messages": ONE, "generations": ["a"], "solution": "s"}, "several answers"),
    "Salesforce/xlam-function-calling-60k without a call": (
        {"id": 0, "query": "q", "answers": "[]", "tools": "[]"}, "a call without a function"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_shape_that_is_no_supervised_data_is_refused_by_name(name):
    row, words = REFUSED[name]
    with pytest.raises(DataError, match=f"^f:1: .*{words}"):
        parsed(row)
