"""What goes wrong on one rank ends all of them with one sentence, and what looks odd still trains.

One tree of two processes runs all cases (tests/distributed/edges_worker.py).
"""

import json

import pytest
from safetensors.torch import load_file, save_file

from tests.distributed import edges_worker
from tests.distributed.test_engines import EP2, FULL, NATIVE, Cases, cases, exported  # noqa: F401
from tests.distributed.worker import CHECKED_HERE
from tests.support.commands import metrics
from tests.support.forked import run_ranks
from tests.support.oracle import assert_close

pytestmark = pytest.mark.distributed

FEW_ROWS = ("--global_batch_size", 2)  # a step of half the rows
ONLY_MODEL = ("--save_only_model", "true")
# Ranks that want another number of tokens.
UNEVEN = ("--num_samples", 1, "--sample_max_new_tokens", "1{RANK}")
BEST = ("--load_best_model_at_end", "true", "--save_total_limit", 1)
# Of a checkpoint: what transformers and DeepSpeed write by themselves.
SMALL_FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "latest", "rng_state_0.pth",
    "scheduler.pt", "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
    "zero_to_fp32.py", "zero_to_torch.py",
}  # fmt: skip


@pytest.fixture
def edges(cases):  # noqa: F811
    tied = cases.root / "tied_base"
    tied.mkdir()
    for file in (cases.root / "base").iterdir():
        (tied / file.name).write_bytes(file.read_bytes())
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(tied / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    return cases


def run_edges(cases: Cases) -> tuple[dict[str, int], dict[str, str]]:  # noqa: F811
    """Run on two processes; return exit codes and what each case printed."""
    for case in cases.cases:
        case["argv"] += ["--dist_timeout_s", "60"]  # a rank that is left alone ends the test soon
    folder = cases.root / "on_2"
    done = run_ranks(2, edges_worker.main, cases.cases, folder, folder=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    _, *parts = done.stdout.split("=== ")
    printed = {part.partition("\n")[0]: part for part in parts}
    return json.loads((folder / "codes.json").read_text()), printed


def test_edges(edges):
    tied = ("--model_name_or_path", edges.root / "tied_base")
    expected = {}

    def add(name, code, *args, **kwargs):
        edges.add(name, *args, **kwargs)
        expected[name] = code

    worse = {"EDGE_WORSE_FROM": "3"}
    add("ddp", 0, None, *BEST, "--max_steps", 6, environment=worse)
    add("ep2", 0, None, *EP2, *BEST, "--max_steps", 6, environment=worse)
    add("zero3", 0, "zero3", *BEST, "--max_steps", 6, environment=worse | CHECKED_HERE)
    add("tied", 0, "fsdp", *tied)
    add("tied_after", 0, "fsdp", *tied, after="tied")
    add("zero2", 0, "zero2")
    for name, launch, *options in (("tied", "fsdp", *tied), ("zero2", "zero2")):
        options += ["--output_dir", edges.root / f"signal_{name}"]
        add(f"signal_{name}", 75, launch, *options, environment={"EDGE_SIGNAL_AT": "3"})
        add(f"signal_{name}_again", 0, launch, *options)
    for name, launch, *options in (("ddp", None), ("ep2", None, *EP2), ("zero2", "zero2")):
        bad = {"EDGE_NAN_GRADIENT_AT": "2"}
        add(f"skips_{name}", 0, launch, *options, environment=bad)
    add("nan_loss", 0, None, *NATIVE, environment={"EDGE_NAN_LOSS_AT": "2"})
    add("only_model", 0, "fsdp", *ONLY_MODEL, *UNEVEN, environment=FULL)
    add("only_model_after", 1, "fsdp", after="only_model")
    add("only_model_zero", 2, "zero2", *ONLY_MODEL)
    add("other_rows", 1, None, *EP2, *FEW_ROWS, after="ep2")
    add("full_disk", 1, None, *NATIVE, environment={"EDGE_FULL_DISK_AT": "4"})
    for name, launch, *options in (("ddp", None), ("native", None, *NATIVE), ("zero3", "zero3")):
        small = {"EDGE_SMALL_FILES_AT": "4"}
        add(f"small_{name}", 1, launch, *options, environment=small)
        bad = {"EDGE_NAN_WEIGHT_AT": "4"}
        add(f"nan_{name}", 1, launch, *options, environment=bad)
    private = edges.root / "private_{RANK}"
    add("private", 1, None, *NATIVE, "--output_dir", private)

    codes, printed = run_edges(edges)
    assert codes == expected, "\n".join(printed.values())
    check_messages(edges.root, printed)
    check_read_again(printed)
    check_best(edges.root)
    check_skipped(edges.root)
    check_tied(edges.root)
    for name in ("tied", "zero2"):
        check_interrupted(edges.root, name, printed[f"signal_{name}"])
    # A full state dict is a hub model: whole, in its place, and with the export's names.
    full = load_file(edges.root / "only_model" / "checkpoint-4" / "model.safetensors")
    last = exported(edges.root / "only_model")
    assert full.keys() == last.keys()
    assert all(full[key].equal(last[key]) for key in last)


def check_messages(root, printed):
    """Each rank of a case that fails says why; the last words of one may come late."""
    lines = "".join(printed.values()).splitlines()
    words = "\n".join(line for line in lines if " ended after step " not in line)  # peers' words
    sentences = {
        "was saved with --save_only_model true and holds no optimizer": 1,
        "--save_only_model true: DeepSpeed's checkpoints hold the weights": 1,
        "saved by a run that differs: global_batch_size 4 -> 2": 1,
        "step 4: no checkpoint was written, earlier ones are whole: OSError": 1,
        "holds NaN or Inf; no checkpoint was written": 3,
        "ranks 1 do not see": 1,
        "earlier ones are whole: it takes about ": 3,
        " rank 1: OSError: [Errno 27] File too large": 2,
    }
    for sentence, num_cases in sentences.items():
        assert words.count(sentence) == 2 * num_cases, f"{sentence}\n{words}"
    engines = ("ddp", "native", "zero3")
    failed = ("full_disk", *(f"{fault}_{name}" for fault in ("nan", "small") for name in engines))
    for name in failed:
        found = [path.name for path in (root / name).iterdir() if path.is_dir()]
        assert found == ["checkpoint-2"], name


def check_read_again(printed):
    """Weights and optimizer states of all engines are hashed while they are written."""
    for name, words in printed.items():
        paths = [line.partition(": ")[2] for line in words.splitlines() if "read again: " in line]
        files = {path.rpartition("/")[2].replace("_1.", "_0.") for path in paths}
        assert files <= SMALL_FILES, (name, files - SMALL_FILES)
    assert "read again: rng_state_1.pth" in printed["zero3"]


def check_best(root):
    """The model of step 2 is exported, whoever holds it, and its checkpoint is kept."""
    best = load_file(root / "ddp" / "checkpoint-2" / "model.safetensors")
    for name in ("ddp", "ep2", "zero3"):
        for key, tensor in exported(root / name).items():
            assert_close(tensor, best[key], name=f"{name} {key}", rms=1e-5)


def check_skipped(root):
    """A step whose gradient is NaN on one rank changes no weight on any, and is counted."""
    for name in ("skips_ddp", "skips_ep2", "skips_zero2", "nan_loss"):
        records = metrics(root / name)
        assert [record["skipped_steps"] for record in records] == [0, 1, 1, 1], name
        assert records[1]["grad_norm"] in ("nan", "inf"), name
        # All of them stand where they stood before step 2, and nowhere else.
        assert records[2]["loss"] == pytest.approx(metrics(root / "skips_ddp")[2]["loss"], rel=1e-6)
        assert records[2]["loss"] != pytest.approx(metrics(root / "ddp")[2]["loss"], rel=1e-3)


def check_tied(root):
    files = {p.name for p in (root / "tied" / "checkpoint-2" / "weights").iterdir()}
    assert len(files) == 2
    whole, rest = exported(root / "tied"), exported(root / "tied_after")
    assert "lm_head.weight" not in whole
    assert all(whole[key].equal(rest[key]) for key in whole)


def check_interrupted(root, name, words):
    """One rank's signal has all save after that step; the same command then goes on, exactly."""
    folder = root / f"signal_{name}"
    assert f"interrupted by SIGUSR1 at step 3: saved {folder / 'checkpoint-3'}" in words
    facts = ("loss", "grad_norm", "tokens_seen", "learning_rate")
    found, expected = metrics(folder), metrics(root / name)
    assert [[r[key] for key in facts] for r in found] == [[r[k] for k in facts] for r in expected]
    whole, rest = exported(root / name), exported(folder)
    assert all(whole[key].equal(rest[key]) for key in whole), name
