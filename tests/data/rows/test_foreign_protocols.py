"""What other models end, call and think with is not learned as text in silence."""

from __future__ import annotations

import time

import pytest

from qwen3_sft.data.rows.values import split_end
from qwen3_sft.errors import DataError
from tests.support.data_rows import USER, answer, chat, parse

ENDS = ["</s>", "<|eot_id|>", "<|end_of_text|>", "<eos>", "<end_of_turn>", "<|end|>\n"]


@pytest.mark.parametrize("end", ENDS)
def test_the_end_token_of_another_model_is_refused(end):
    for row in (
        answer(content=f"A pear.{end}"),
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": f"a{end}"}]},
        {"question": "q", "answer": f"a{end}"},
        {"prompt": "q", "completion": f"a{end}"},
        {"text": f"a{end}"},
    ):
        with pytest.raises(DataError, match=r"^f:1: .* ends with <.*the end token of another mod"):
            parse(row)


@pytest.mark.parametrize("text", ["Write <s>old</s>", "a</s>.", "x <eos> y", "a -> b>", "1 |>"])
def test_what_only_looks_like_an_end_is_text(text):
    assert parse(answer(content=text))[0].messages[1].content == text


@pytest.mark.parametrize(
    "begin",
    ["<functioncall>", "<tool_calls>", "<function_call>", "<function=f>", "[TOOL_CALLS]",
     "<|python_tag|>"],
)  # fmt: skip
def test_a_call_of_another_model_is_refused(begin):
    for said in (begin, f"I look.\n{begin}"):
        with pytest.raises(DataError, match=r"^f:1: messages\[1\] has .*as another model writes"):
            parse(answer(content=said + ' {"name": "f", "arguments": {}}'))
    assert parse(answer(content=f"Write `{begin}` there."))[0].messages[1].content


@pytest.mark.parametrize("token", ["<|fim_prefix|>", "<|repo_name|>", "<|file_sep|>"])
def test_plain_text_cannot_hold_tokens_of_code(token):
    with pytest.raises(DataError, match=r"^f:1: column 'text' contains <.* give the row as input"):
        parse({"text": f"{token}a"})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_its_own_tags_is_read_once(key):
    plain, _ = parse(answer(content="a", **{key: "hm"}))
    for written in ("<think>hm</think>", "<think>\nhm\n</think>\n"):
        assert parse(answer(content="a", **{key: written}))[0] == plain
    with pytest.raises(DataError, match=rf"^f:1: messages\[1\] {key} has </think> in it"):
        parse(answer(content="a", **{key: "hm </think> so"}))


def test_a_result_may_have_a_type_of_its_own():
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}

    def result(content):
        return parse(chat(USER, call, {"role": "tool", "content": content}, call))[0].messages[2]

    assert result([{"type": "inn", "name": "x"}]).content == '[{"type": "inn", "name": "x"}]'
    assert result([{"type": "text", "text": "5"}]).content == "5"
    with pytest.raises(DataError, match="'image_url', which a text model"):
        result([{"type": "image_url", "image_url": "u"}])


def test_ends_are_split_off_in_linear_time():
    assert split_end("a<|im_end|> <|endoftext|>\n") == ("a", "<|im_end|>")
    began = time.perf_counter()
    assert split_end("a" + "<|endoftext|> " * 50_000) == ("a", "<|endoftext|>")
    assert split_end("<|endoftext|> " * 50_000 + "<|x|>")[1] is None
    body = "<tool_call>\n<function=f>\n" + "<parameter=a>\n" * 20_000 + "</function>\n</tool_call>"
    with pytest.raises(DataError, match="outside of its parameters"):
        parse(answer(content=body))
    assert time.perf_counter() - began < 5  # minutes, when each place was tried to the end
