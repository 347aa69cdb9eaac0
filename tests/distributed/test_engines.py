"""Every engine trains what one process trains: losses, norms, router metrics, exported weights.

One tree of processes per number of processes runs all its cases (tests/distributed/worker.py).
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qwen3_sft.demo.model import tiny_config, tiny_model
from tests.distributed import worker
from tests.support.commands import ROOT, free_port, metrics
from tests.support.data_rows import sums
from tests.support.forked import run_ranks
from tests.support.oracle import assert_close

pytestmark = pytest.mark.distributed

TRAIN = (
    "--max_length", 160, "--max_steps", 4, "--learning_rate", "1e-3", "--warmup_steps", 2,
    "--router_aux_loss_coef", 0.01, "--save_steps", 2, "--eval_fraction", 0.1, "--eval_steps", 2,
    "--eval_strategy", "steps", "--num_samples", 0, "--global_batch_size", 4,
)  # fmt: skip
CONFIG = ROOT / "config"
# Relative, per step. DeepSpeed sums its norms in float32 (tests/distributed/exact_norm.py).
CLOSE = 1e-6
CLOSE_NORM_OF_ZERO = 1e-5

NATIVE = ("--fsdp_size", -1)
EP2 = (*NATIVE, "--ep_size", 2)
FULL = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


# The first update makes every later loss NaN.
TOO_FAST = (
    "--learning_rate", "1e30", "--warmup_steps", 0, "--max_bad_steps", 2, "--eval_fraction", 0,
    "--eval_strategy", "no", "--save_strategy", "no",
)  # fmt: skip


class Cases:
    """Runs to do in one tree of processes, each into a folder of its own."""

    def __init__(self, root: Path, inputs: tuple) -> None:
        self.root, self.inputs, self.cases = root, inputs, []

    def add(self, name, launch=None, *argv, environment=None, after=None):
        """Add a run; `after` names the one whose checkpoint it resumes from."""
        if after is not None:
            argv = (*argv, "--resume", self.root / after / "checkpoint-2")
        words = (*self.inputs, *TRAIN, "--output_dir", self.root / name, *argv)
        self.cases.append(
            {
                "name": name, "port": free_port(), "launch": launch,
                "environment": environment or {}, "notes": str(self.root / f"{name}.notes"),
                "argv": [str(word) for word in words],
            }
        )  # fmt: skip

    def run(self, num_processes: int) -> tuple[dict[str, int], str]:
        """Return the exit codes by name and everything that was printed."""
        folder = self.root / f"on_{num_processes}"
        cases, self.cases = self.cases, []
        done = run_ranks(num_processes, worker.main, cases, folder, folder=folder)
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed[-8000:]
        return json.loads((folder / "codes.json").read_text()), printed


@pytest.fixture
def cases(tokenizer, tmp_path):
    config = tiny_config(
        len(tokenizer), hidden_size=64, moe_intermediate_size=48, num_hidden_layers=3,
        num_experts=8, head_dim=16,
    )  # fmt: skip
    tiny_model(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    # Two to four documents in a row, another number on each rank.
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, sums(40))))
    return Cases(
        tmp_path,
        (
            "--model_name_or_path", tmp_path / "base", "--dataset", tmp_path / "rows.jsonl",
            "--data_cache_dir", tmp_path / "cache",
        ),
    )  # fmt: skip


# What a resume may change, each so much that the weights show it.
CHANGED = (
    "--max_steps", 5, "--learning_rate", "3e-3", "--adam_beta2", 0.9, "--adam_epsilon", "1e-4",
    "--weight_decay", 0.5, "--allow_change", "learning_rate", "adam_beta2", "adam_epsilon",
    "weight_decay",
)  # fmt: skip
# The layer between the first and the last.
FP8 = ("--fp8", "all", "--save_strategy", "no")
# The same by the shipped recipe. What it sets beyond that is set back to what the other cases have.
RECIPE = (
    "--config", CONFIG / "recipe" / "qwen3_30b_a3b_fp8.yaml", "--save_strategy", "no",
    "--per_device_train_batch_size", 1, "--weight_decay", 0, "--bf16", "false",
    "--activation_checkpointing", "none", "--logging_steps", 1, "--dataloader_num_workers", 0,
)  # fmt: skip


def test_every_engine_equals_one_process(cases):
    cases.add("one")
    cases.add("one_after", after="one")
    cases.add("fp8", None, *RECIPE)
    cases.add("one_changed", None, *CHANGED, after="one")
    cases.add("fresh", None, *CHANGED)
    codes, printed = cases.run(1)
    assert set(codes.values()) == {0}, printed

    zero3 = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(nothing_persists(cases.root))}
    add_runs_on_two(cases, zero3)
    on_two = [case["name"] for case in cases.cases]
    changed = {"ddp_changed": None, "fsdp_changed": "fsdp", "zero2_changed": "zero2"}
    for name, launch in changed.items():
        cases.add(name, launch, *CHANGED, after=name.removesuffix("_changed"))
    cases.add("fp8_native", None, *NATIVE, *FP8)
    cases.add("fp8_ep2", None, *EP2, *FP8)
    cases.add("fp8_fsdp", "fsdp", *RECIPE)
    cases.add("fp8_zero3", "zero3", *RECIPE, environment=zero3 | worker.CHECKED_HERE)
    in_fp8 = [case["name"] for case in cases.cases[len(on_two) + len(changed) :]]
    failing = ("refused", "bad_ep2", "bad_zero2", "bad_zero3")
    cases.add("refused", None, *NATIVE, after="zero3")
    cases.add("bad_ep2", None, *EP2, *TOO_FAST)
    cases.add("bad_zero2", "zero2", *TOO_FAST)
    cases.add("bad_zero3", "zero3", *TOO_FAST, environment=zero3)
    codes, printed = cases.run(2)
    fine = dict.fromkeys((*on_two, *changed, *in_fp8), 0)
    assert codes == fine | dict.fromkeys(failing, 1), printed
    assert printed.count("NonFiniteError: steps 2 to 3 all had") >= 3, printed
    assert "was saved under DeepSpeed ZeRO, this run uses FSDP2" in printed

    cases.add("ep4", None, "--fsdp_size", 4, "--ep_size", 4)
    cases.add("hsdp", None, "--fsdp_size", 2, "--ep_size", 2, "--dp_replicate_size", 2)
    replicas = {
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    }
    cases.add("hsdp_of_accelerate", "hsdp", environment=replicas)
    cases.add("ep2_of_4_after_2", None, "--fsdp_size", 4, "--ep_size", 2, after="ep2")
    on_four = [case["name"] for case in cases.cases]
    cases.add("refused_size", "zero3", after="zero3")
    codes, printed = cases.run(4)
    assert codes == dict.fromkeys(on_four, 0) | {"refused_size": 1}, printed
    assert "was saved by 2 processes, there are 4" in printed

    problems = [p for name in (*on_two, *on_four) for p in differences(cases.root, name)]
    assert not problems, "\n".join(problems)
    check_experts(cases.root, {"ddp": (2, 8), "native": (2, 8), "fsdp": (2, 8), "zero3": (2, 8)})
    check_experts(cases.root, {"ep2": (2, 4), "ep4": (4, 2), "hsdp": (4, 4)})
    check_bitwise_resume(cases.root)
    check_changed(cases.root, changed)
    check_fp8(cases.root, in_fp8)
    for name in ("ep2", "fsdp", "zero3"):
        assert len((cases.root / name / "samples.jsonl").read_text().splitlines()) == 3, name


def add_runs_on_two(cases: Cases, zero3: dict[str, str]) -> None:
    """Add every engine for two processes, and resumes within an engine and from one to another."""
    best = ("--load_best_model_at_end", "true")
    samples = ("--num_samples", 1, "--sample_max_new_tokens", 2)
    selective = ("--activation_checkpointing", "selective")
    warm = ("--memory_warm_up", "true")  # leaves no trace
    cases.add("ddp", None, *warm)
    cases.add("ddp_after", after="ddp")
    cases.add("native", None, *NATIVE, *warm)
    cases.add("ep2", None, *EP2, *samples)
    cases.add("ep2_after", None, *EP2, *selective, *warm, after="ep2")
    cases.add("ep2_after_ep1", None, *EP2, after="native")
    cases.add("fsdp", "fsdp", *samples)
    cases.add("fsdp_after", "fsdp", *selective, *warm, after="fsdp")
    cases.add("fsdp_after_native", "fsdp", after="native")
    cases.add("full", "fsdp", *best, environment=FULL)
    cases.add("full_after", "fsdp", after="full", environment=FULL)
    cases.add("zero2", "zero2")
    cases.add("zero2_after", "zero2", after="zero2")
    cases.add("zero3", "zero3", *samples, *best, environment=zero3)
    recompute = ("--activation_checkpointing", "full")
    here = zero3 | worker.CHECKED_HERE
    cases.add("zero3_after", "zero3", *recompute, after="zero3", environment=here)


def nothing_persists(root: Path) -> Path:
    """The shipped ZeRO-3 configuration, but with no weight too small to be sharded."""
    config = json.loads((CONFIG / "deepspeed" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = root / "zero3.json"
    path.write_text(json.dumps(config))
    return path


def differences(root: Path, name: str) -> list[str]:
    """Compare a run's records and exported weights with those of the one-process run."""
    reference = {record["step"]: record for record in metrics(root / "one")}
    found, records = [], metrics(root / name)
    assert [r["step"] for r in records] == ([3, 4] if "after" in name else [1, 2, 3, 4]), name
    for record in records:
        expected = reference[record["step"]]
        for key in ("loss", "grad_norm", "aux_loss", "router_entropy", "expert_load_max_over_mean"):
            is_zero_norm = key == "grad_norm" and name.startswith("zero")
            error = abs(record[key] - expected[key]) / abs(expected[key])
            if not error <= (CLOSE_NORM_OF_ZERO if is_zero_norm else CLOSE):
                found.append(f"{name} step {record['step']}: {key} is off by {error:.1e}")
        for key in ("tokens", "label_tokens", "padding_fraction", "learning_rate"):
            assert record[key] == expected[key], (name, record["step"], key)
    weights, expected = exported(root / name), exported(root / "one")
    assert weights.keys() == expected.keys(), name
    for key, tensor in expected.items():
        assert_close(weights[key], tensor, name=f"{name} {key}", rms=1e-5)
    return found


def exported(folder: Path) -> dict:
    """Return every tensor of a run's exported model."""
    files = sorted((folder / "model").glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def check_experts(root: Path, expected: dict[str, tuple[int, int]]) -> None:
    """Our function ran on every rank, in every layer, with that rank's experts alone."""
    for name, (num_ranks, num_local) in expected.items():
        for rank in range(num_ranks):
            seen = json.loads((root / f"{name}.{rank}.json").read_text())
            assert seen["local_experts"] == [num_local], (name, rank, seen)
            assert seen["calls"] >= 2 * 4 * (4 // num_ranks), (name, rank, seen)


def check_fp8(root: Path, names: list[str]) -> None:
    """The same modules in FP8 under every engine, and the curve of one process in FP8.

    A sum in another order may round a value to the next of e4m3's, a sixteenth of it away.
    """
    plain, one = metrics(root / "one"), metrics(root / "fp8")
    assert all(abs(a["loss"] / b["loss"] - 1) > 1e-5 for a, b in zip(one, plain, strict=True))
    converted = json.loads((root / "fp8" / "environment.json").read_text())["fp8"]["converted"]
    assert len(converted) == 5
    assert all(name.startswith("model.layers.1.") for name in converted)
    for name in names:
        record = json.loads((root / name / "environment.json").read_text())
        assert record["fp8"]["converted"] == converted, name
        found = metrics(root / name)
        assert found[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5), name
        for a, b in zip(found, one, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3), (name, a["step"])
        assert exported(root / name).keys() == exported(root / "fp8").keys()


def check_changed(root: Path, names: Iterable[str]) -> None:
    """Learning rates of a fresh run with the new options, and one process's steps with them."""
    rates = {record["step"]: record["learning_rate"] for record in metrics(root / "fresh")}
    one = metrics(root / "one_changed")
    assert [record["learning_rate"] for record in one] == [rates[step] for step in (3, 4, 5)]
    assert [record["learning_rate"] for record in metrics(root / "one")][2:] != [rates[3], rates[4]]
    for name in names:
        for record, expected in zip(metrics(root / name), one, strict=True):
            assert record["learning_rate"] == expected["learning_rate"], name
            assert record["loss"] == pytest.approx(expected["loss"], rel=CLOSE), name
        weights, expected = exported(root / name), exported(root / "one_changed")
        for key, tensor in expected.items():
            assert_close(weights[key], tensor, name=f"{name} {key}", rms=1e-5)


def check_bitwise_resume(root: Path) -> None:
    """With the same layout and processes the rest of a run repeats itself to the last bit."""
    for name in ("one", "ddp", "ep2", "fsdp", "zero2", "full"):
        whole, rest = exported(root / name), exported(root / f"{name}_after")
        differing = [key for key in whole if not whole[key].equal(rest[key])]
        assert not differing, f"{name}: {len(differing)} weights, {differing[:3]}"
