"""The embedded demo: its data, its tiny model and how both are built."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen3_sft.chat.control_tokens import QWEN3_CONTROL_TOKENS
from qwen3_sft.demo.build import VOCAB_SIZE, build_demo, resolve_demo
from qwen3_sft.demo.conversations import conversations, write_conversations
from qwen3_sft.demo.model import tiny_config, tiny_model, write_checkpoint
from qwen3_sft.errors import UsageError
from qwen3_sft.model.loading import load_tokenizer
from qwen3_sft.options.data_args import DataArguments
from tests.support.oracle import assert_close
from tests.support.source_tree import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:typing:DeprecationWarning")


@pytest.fixture(scope="module")
def rows():
    return list(conversations())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo as two processes build it that start at the same time; what each one returned."""
    folder = tmp_path_factory.mktemp("demo")
    program = (
        "import sys; from pathlib import Path; from qwen3_sft.demo.build import build_demo;"
        "print(*build_demo(Path(sys.argv[1])), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program, str(folder)]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0].splitlines()[-2:] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    return folder, outputs


class TestData:
    def test_is_of_the_size_that_the_demo_needs(self, rows):
        assert 2000 < len(rows) < 20_000

    def test_rows_are_messages(self, rows):
        for row in rows:
            assert set(row) == {"messages"}
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert roles
            for message in row["messages"]:
                assert set(message) <= {"role", "content", "reasoning_content"}
                texts = [v for k, v in message.items() if k != "role"]
                assert all(isinstance(text, str) and text.strip() for text in texts)

    def test_has_several_turns_and_reasoning(self, rows):
        several = sum(len(row["messages"]) > 2 for row in rows)
        reasoned = sum("reasoning_content" in m for row in rows for m in row["messages"])
        assert several > 300
        assert reasoned > 300

    def test_no_conversation_twice(self, rows):
        texts = [json.dumps(row, sort_keys=True) for row in rows]
        assert len(texts) == len(set(texts))

    def test_names_no_memory_address(self, rows):
        """An address differs from process to process, and with it the data and the cache."""
        text = json.dumps(rows)
        assert not re.search(r"0x[0-9a-f]{8,}", text)

    def test_is_the_same_in_every_process(self, tmp_path):
        program = (
            "import sys; from pathlib import Path; from qwen3_sft.demo.conversations import "
            "write_conversations; print(write_conversations(Path(sys.argv[1])))"
        )
        digests = set()
        for seed in ("1", "2"):
            path = tmp_path / seed
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
            command = [sys.executable, "-W", "ignore", "-c", program, str(path)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert int(done.stdout) > 2000, done.stderr
            digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
        assert len(digests) == 1

    def test_file_holds_the_rows(self, rows, tmp_path):
        assert write_conversations(tmp_path / "rows.jsonl") == len(rows)
        lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows


class TestTokenizer:
    def test_control_tokens_come_last_in_the_order_of_qwen3(self, tokenizer):
        ids = tokenizer.convert_tokens_to_ids(list(QWEN3_CONTROL_TOKENS))
        assert ids == list(range(len(tokenizer) - 26, len(tokenizer)))
        # ids 151643 to 151668 of Qwen/Qwen3-30B-A3B: tokenizer_config.json
        published = {
            "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
            "<|vision_start|>": 151652, "<|image_pad|>": 151655, "<tool_call>": 151657,
            "</tool_call>": 151658, "<|file_sep|>": 151664, "<tool_response>": 151665,
            "<think>": 151667, "</think>": 151668,
        }  # fmt: skip
        first = ids[0] - 151643
        assert {t: tokenizer.convert_tokens_to_ids(t) - first for t in published} == published

    def test_only_tokens_with_bars_are_special(self, tokenizer):
        text = "<|im_start|>a<think>b</think><tool_call>c</tool_call><|im_end|>"
        ids = tokenizer(text)["input_ids"]
        kept = tokenizer.decode(ids, skip_special_tokens=True)
        assert kept == "a<think>b</think><tool_call>c</tool_call>"

    def test_end_and_padding(self, tokenizer):
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")

    @pytest.mark.parametrize(
        "text",
        ["plain words", "Ümläut, 東京 🙂", "  spaces\n\n\ttabs ", "12345", "def f(x):\n  0\n"],
    )
    def test_text_survives(self, tokenizer, text):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_one_token_per_digit(self, tokenizer):
        """Numbers in the training text must not merge, as they do not in Qwen's vocabulary."""
        assert len(tokenizer("2026")["input_ids"]) == 4

    def test_template_writes_what_qwen3_writes(self, tokenizer):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == (
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nHo<|im_end|>\n"
        )


class TestModel:
    def test_no_two_sizes_agree_that_a_transposed_weight_could_hide_behind(self):
        config = tiny_config()
        assert config.hidden_size != 2 * config.moe_intermediate_size
        assert config.hidden_size != config.moe_intermediate_size
        assert 1 < config.num_experts_per_tok < config.num_experts

    def test_sizes_can_be_overridden(self):
        assert tiny_config(512, num_hidden_layers=1).num_hidden_layers == 1
        assert tiny_config(512).vocab_size == 512

    def test_same_seed_same_weights_and_the_caller_s_random_state_is_kept(self):
        config = tiny_config(300, num_hidden_layers=1)
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        first, again, other = (tiny_model(config, seed) for seed in (1, 1, 2))
        assert torch.equal(torch.random.get_rng_state(), before)
        weights = [dict(m.named_parameters()) for m in (first, again, other)]
        assert all(p.dtype == torch.float32 for p in first.parameters())
        assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
        assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])

    def test_checkpoint_loads_as_any_other(self, tokenizer, tmp_path):
        write_checkpoint(tmp_path, tokenizer, seed=3)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded is not None
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.chat_template == tokenizer.chat_template
        assert model.config.eos_token_id == tokenizer.eos_token_id
        expected = tiny_model(model.config, seed=3)
        ids = torch.tensor([tokenizer("def f(x):")["input_ids"]])
        with torch.no_grad():
            assert_close(model(ids).logits, expected(ids).logits, name="logits")


class TestBuild:
    def test_two_processes_at_once_both_get_a_whole_demo(self, demo):
        folder, outputs = demo
        built = [str(folder / "model"), str(folder / "conversations.jsonl")]
        assert outputs == [built, built]
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert len(load_tokenizer(folder / "model")) == VOCAB_SIZE
        assert model.config.vocab_size == VOCAB_SIZE
        lines = (folder / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
        assert all("messages" in json.loads(line) for line in lines)
        assert len(lines) > 2000
        assert not list(folder.rglob("*.partial"))

    def test_second_call_builds_nothing(self, demo):
        folder, _ = demo
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        before = {path: path.stat().st_mtime_ns for path in files}
        assert build_demo(folder) == (folder / "model", folder / "conversations.jsonl")
        assert {path: path.stat().st_mtime_ns for path in files} == before

    def test_an_interrupted_build_is_finished(self, demo, tmp_path):
        """Only the data, which is written last, says that the model is whole too."""
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{", encoding="utf-8")
        (tmp_path / ".lock").touch()
        model, data = build_demo(tmp_path)
        whole, _ = demo
        for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
            assert (model / name).read_bytes() == (whole / "model" / name).read_bytes(), name
        assert len(load_tokenizer(model)) == VOCAB_SIZE
        assert data.read_bytes() == (whole / "conversations.jsonl").read_bytes()

    def test_the_name_demo_is_replaced_wherever_it_stands(self, demo):
        folder, _ = demo
        built = str(folder / "model"), str(folder / "conversations.jsonl")
        data = DataArguments(dataset=["a.jsonl", "demo"], max_length=99)
        model, resolved = resolve_demo("demo", data, folder)
        assert (model, resolved.dataset) == (built[0], ["a.jsonl", built[1]])
        assert resolved.max_length == 99
        assert data.dataset == ["a.jsonl", "demo"], "the caller's options stay as they are"
        model, resolved = resolve_demo("/some/model", data, folder)
        assert (model, resolved.dataset) == ("/some/model", ["a.jsonl", built[1]])

    def test_without_the_name_nothing_is_built(self, tmp_path):
        data = DataArguments(dataset=["a.jsonl"])
        assert resolve_demo("/some/model", data, tmp_path / "unused") == ("/some/model", data)
        assert not (tmp_path / "unused").exists()


def test_a_demo_is_not_built_among_other_files(tmp_path):
    (tmp_path / "conversations.jsonl").write_text("mine")
    with pytest.raises(UsageError, match="holds something else than a demo"):
        build_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["conversations.jsonl"]
