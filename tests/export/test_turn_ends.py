"""Whoever loads an export stops where the labels did, whatever the base model stopped at."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qwen3_sft.chat.encoding import Encoder
from qwen3_sft.chat.turn_ends import in_order
from qwen3_sft.checkpoints.hub_metadata import complete_metadata, turn_ends_of
from qwen3_sft.commands.export import export_command
from qwen3_sft.errors import ExportError
from qwen3_sft.export.check import check_stops
from qwen3_sft.export.export import export_model
from qwen3_sft.records.ownership import EXPORT_MARK
from qwen3_sft.run import run_command
from tests.support.data_rows import sums

IM_END, TEXT_END = "<|im_end|>", "<|endoftext|>"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def content(path):
    return json.loads(path.read_text())


@pytest.fixture
def base(tiny_moe, tokenizer, tmp_path):
    """As a Base checkpoint of Qwen's: it ends at <|endoftext|>, in all three files."""
    folder = tmp_path / "base"
    tiny_moe.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(TEXT_END)
    edit(folder / "tokenizer_config.json", eos_token=TEXT_END)
    edit(folder / "config.json", eos_token_id=end, bos_token_id=end, pad_token_id=None)
    settings = {
        "bos_token_id": end,
        "eos_token_id": end,
        "do_sample": False,
        "max_new_tokens": 2048,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_a_base_model_trained_on_chats_ends_its_turns(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    export_model(model, base, tmp_path / "model", turn_ends=[IM_END])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    im_end, text_end = tokenizer.convert_tokens_to_ids([IM_END, TEXT_END])
    generation = content(tmp_path / "model" / "generation_config.json")
    assert content(tmp_path / "model" / "config.json")["eos_token_id"] == im_end
    assert generation["eos_token_id"] == [im_end, text_end]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (IM_END, TEXT_END)
    assert generation["pad_token_id"] == text_end
    assert generation["max_new_tokens"] == 2048  # the base's own settings stay


def test_it_stops_where_the_labels_did(base, tmp_path):
    """Overfitted on one answer; nothing of ours takes part in reading it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "I am here."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    start = tokenizer(prompt, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(base)
    labels = ids.clone()
    labels[:, : start.shape[1]] = -100
    labels[:, -1] = -100  # the newline after the turn
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(50):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    export_model(model, base, tmp_path / "model", turn_ends=[IM_END])

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    said = reloaded.generate(**again(prompt, return_tensors="pt"), max_new_tokens=40)
    answer = again.decode(said[0, start.shape[1] :])
    assert answer == f"<think>\n\n</think>\n\nI am here.{IM_END}"
    reloaded.generation_config = GenerationConfig.from_pretrained(base)
    went_on = reloaded.generate(**again(prompt, return_tensors="pt"), max_new_tokens=40)
    assert went_on.shape[1] > said.shape[1]  # with the base's settings


def test_a_run_tells_its_checkpoints_and_exports(base, tmp_path):
    """From the labels in the data to the files, also those of a checkpoint and of its export."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, sums(8))))
    words = [
        "--model_name_or_path", base, "--dataset", tmp_path / "rows.jsonl", "--data_cache_dir",
        tmp_path / "cache", "--max_length", 64, "--max_steps", 1, "--save_steps", 1, "--use_cpu",
        "true", "--output_dir", tmp_path / "run", "--export_layout", "fused",
    ]  # fmt: skip
    assert run_command(list(map(str, words))) == 0
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert content(tmp_path / "run" / "data_report.json")["turn_ends"] == {IM_END: 8}
    assert content(checkpoint / "manifest.json")["turn_ends"] == [IM_END]
    assert export_command([str(checkpoint), str(tmp_path / "again")]) == 0
    im_end, text_end = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids([IM_END, TEXT_END])
    for folder in (tmp_path / "run" / "model", checkpoint, tmp_path / "again"):
        generation, config = (
            content(folder / "generation_config.json"),
            content(folder / "config.json"),
        )
        assert generation["eos_token_id"] == [im_end, text_end]
        assert (config["eos_token_id"], config["use_cache"]) == (im_end, True)
        assert config["num_experts"] == config["num_local_experts"] == 8
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
        assert config["torch_dtype"] == config["dtype"]
        assert AutoTokenizer.from_pretrained(folder).eos_token == IM_END
    marks = [content(tmp_path / name / EXPORT_MARK)["layout"] for name in ("run/model", "again")]
    assert marks == ["fused", "hub"]


def test_a_repaired_tokenizer_is_not_overruled_by_stale_files(base, tmp_path):
    edit(base / "tokenizer_config.json", eos_token=IM_END)
    export_model(
        AutoModelForCausalLM.from_pretrained(base), base, tmp_path / "model", turn_ends=[IM_END]
    )
    ids = content(tmp_path / "model" / "generation_config.json")["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.convert_ids_to_tokens(ids) == [IM_END, TEXT_END]
    assert tokenizer.eos_token == IM_END


@pytest.mark.parametrize(
    ("ends", "eos", "pad"),
    [
        ([TEXT_END], TEXT_END, "<|fim_pad|>"),  # text: what ends it is no padding
        ([IM_END, TEXT_END], IM_END, "<|fim_pad|>"),
        (["<|object_ref_end|>"], "<|object_ref_end|>", TEXT_END),
    ],
)
def test_the_pad_token_ends_nothing_that_was_trained(base, tmp_path, ends, eos, pad):
    export_model(
        AutoModelForCausalLM.from_pretrained(base), base, tmp_path / "model", turn_ends=ends
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (tokenizer.eos_token, tokenizer.pad_token) == (eos, pad)
    generation = content(tmp_path / "model" / "generation_config.json")
    assert generation["pad_token_id"] == tokenizer.convert_tokens_to_ids(pad)
    trained = tokenizer.convert_tokens_to_ids(ends)
    assert generation["eos_token_id"][: len(ends)] == trained if len(ends) > 1 else trained[0]


def test_files_that_are_right_stay_as_they_are(base, tokenizer, tmp_path):
    """A released instruct model's: int in one, list in the other, objects in the tokenizer's."""
    im_end, text_end = tokenizer.convert_tokens_to_ids([IM_END, TEXT_END])
    end = {"content": IM_END, "lstrip": False, "special": True, "__type": "AddedToken"}
    edit(
        base / "tokenizer_config.json",
        eos_token=end, pad_token=TEXT_END, tokenizer_class="PreTrainedTokenizerFast",
    )  # fmt: skip
    (base / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": end, "pad_token": TEXT_END})
    )
    released = {"do_sample": True, "eos_token_id": [im_end, text_end], "pad_token_id": text_end}
    (base / "generation_config.json").write_text(json.dumps(released))
    export_model(
        AutoModelForCausalLM.from_pretrained(base), base, tmp_path / "model", turn_ends=[IM_END]
    )
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.6},  # as Qwen has released; `save_pretrained` refuses
        {"do_sample": True, "temperature": 0.6, "num_return_sequences": 2},
        {"num_beams": 4},
        {"stop_strings": ["###"]},
    ],
)
def test_settings_of_generation_stay(base, tmp_path, settings):
    edit(base / "generation_config.json", **settings)
    export_model(
        AutoModelForCausalLM.from_pretrained(base), base, tmp_path / "model", turn_ends=[IM_END]
    )
    written = content(tmp_path / "model" / "generation_config.json")
    assert {key: written[key] for key in settings} == settings


def test_an_end_that_is_no_special_token_is_not_kept(base, tmp_path):
    edit(base / "generation_config.json", eos_token_id=[17, 100_000])
    export_model(
        AutoModelForCausalLM.from_pretrained(base), base, tmp_path / "model", turn_ends=[IM_END]
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = content(tmp_path / "model" / "generation_config.json")["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ids) == [IM_END, TEXT_END]


def test_without_a_labelled_end_the_bases_stay(base, tmp_path, caplog):
    export_model(AutoModelForCausalLM.from_pretrained(base), base, tmp_path / "model")
    assert "generation stops where the base did" in caplog.text
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == TEXT_END


@pytest.mark.parametrize(
    "stale", ["config.json", "generation_config.json", "tokenizer_config.json"]
)
def test_the_check_finds_a_file_that_ends_elsewhere(base, tokenizer, stale):
    complete_metadata(base, tokenizer, [IM_END])
    model = AutoModelForCausalLM.from_pretrained(base)
    im_end, text_end = tokenizer.convert_tokens_to_ids([IM_END, TEXT_END])
    check_stops(model, base, (im_end,))
    model.generation_config.eos_token_id = text_end
    with pytest.raises(ExportError, match=f"goes on after {im_end}"):
        check_stops(model, base, (im_end,))
    name, value = ("eos_token", TEXT_END) if "tok" in stale else ("eos_token_id", text_end)
    edit(base / stale, **{name: value})
    with pytest.raises(ExportError, match=f"ends at .*{text_end}"):
        check_stops(model, base, (im_end,))


def test_old_checkpoints_take_the_templates_end_and_say_so(tokenizer, tmp_path, caplog):
    assert turn_ends_of({"turn_ends": ["<|a|>"]}, tokenizer, tmp_path) == ["<|a|>"]
    assert not caplog.text
    assert turn_ends_of({}, tokenizer, tmp_path) == [IM_END]
    assert "saved by an earlier version: <|im_end|> is taken" in caplog.text


def labelled(tokenizer, *pieces):
    """Ids and labels of (text, whether it is trained)."""
    ids, trained = [], []
    for text, is_trained in pieces:
        new = tokenizer(text, add_special_tokens=False).input_ids
        ids += new
        trained += [is_trained] * len(new)
    return np.array(ids, np.int32), np.array(trained)


@pytest.mark.parametrize(
    ("pieces", "limit", "expected"),
    [
        ([("a", False), (f"b{IM_END}", True), ("\n", False)], 99, {IM_END: 1}),
        ([(f"a{IM_END}\n", True)], 99, {IM_END: 1}),  # every token has a label
        ([("a", False), ("b<|box_end|>", True)], 99, {"<|box_end|>": 1}),
        ([("a", False), ("b<|box_end|>\n", True)], 99, {"<|box_end|>": 1}),
        ([("a", False), ("b", True)], 99, {}),
        ([("a", False), (f"b{IM_END}", True)], 2, {}),  # cut before its end
        ([("a", False), ("<think>b</think>", True)], 99, {}),  # stands for something
        ([("a", False), (f"b{IM_END}c<|box_end|>", True)], 99, {IM_END: 1, "<|box_end|>": 1}),
        ([(f"a{IM_END}", False), ("b", True)], 99, {}),
    ],
)
def test_ends_of_rows_that_came_tokenised(tokenizer, pieces, limit, expected):
    ids, trained = labelled(tokenizer, *pieces)
    found = Encoder(tokenizer).turn_ends.count(ids, trained, limit, is_given=True)
    assert found == Counter(expected)


def test_the_chats_end_comes_first():
    assert list(in_order({"<|b|>": 1, TEXT_END: 9, IM_END: 2})) == [IM_END, TEXT_END, "<|b|>"]
