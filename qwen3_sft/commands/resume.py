"""`qwen3-sft resume RUN`: go on with a run from its own config.yaml, or prove that one could.

The proof trains, in a folder of its own, from the newest checkpoint to the next step that the run
has recorded, through the same launcher, engine and data, and compares the two records. It changes
nothing in the run.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from qwen3_sft.checkpoints.folders import checkpoints, newest_verified, step_of
from qwen3_sft.checkpoints.manifest import read_manifest, verify
from qwen3_sft.errors import DONE, FAILED, CheckpointError, UsageError
from qwen3_sft.launch.launch import launch
from qwen3_sft.logs import set_up_logging
from qwen3_sft.options.command_line import read_options
from qwen3_sft.options.paths import expanded

logger = logging.getLogger(__name__)

# Of a recorded step; speed and memory may differ.
COMPARED = ("loss", "grad_norm", "learning_rate", "tokens", "tokens_seen", "epoch")
# CUDA's atomics add in any order. A resume that lost something is off by more.
CUDA_TOLERANCE = 1e-3
# What would write, evaluate or report.
_LEFT_OUT = (
    "load_best_model_at_end", "early_stopping_patience", "eval_strategy", "eval_steps", "report_to",
    "resume", "save_strategy", "save_steps",
)  # fmt: skip


def resume_command(argv: list[str]) -> int:
    """Run `RUN [--verify] [--option value ...]`; return the exit code.

    Raises:
        UsageError: RUN is no run folder, its config.yaml is damaged, or an option is wrong.
        CheckpointError: with --verify, there is no whole checkpoint.
    """
    set_up_logging()
    parser = argparse.ArgumentParser(prog="qwen3-sft resume")
    parser.add_argument("run")
    parser.add_argument("--verify", action="store_true")
    own, options = parser.parse_known_args(argv)
    own.run = Path(expanded(own.run, "RUN"))
    config = own.run / "config.yaml"
    if not config.is_file():
        raise UsageError(_no_run(own.run))
    read_options(["--config", str(config), *options])
    if own.verify:
        return verify_resume(own.run, config, options)
    return launch(["--config", str(config), "--output_dir", str(own.run), *options])


def _no_run(folder: Path) -> str:
    text = f"{folder} is no run folder: it has no config.yaml"
    of_it = Path(os.path.abspath(folder)).parent
    return f"{text}; did you mean {of_it}?" if (of_it / "config.yaml").is_file() else text


def verify_resume(run: Path, config: Path, options: list[str]) -> int:
    """Resume a copy of the run for some steps; return 0 if it repeats what the run recorded.

    Raises:
        CheckpointError: there is no whole checkpoint.
    """
    checkpoint = _checkpoint_to_repeat(run)
    files = read_manifest(checkpoint)["files"]
    size = sum(entry["bytes"] for entry in files.values()) / 1e9
    logger.info("%s: %d files, %.3f GB, as its manifest says", checkpoint, len(files), size)
    expected = next_record(run / "metrics.jsonl", step_of(checkpoint))
    steps = 1 if expected is None else expected["step"] - step_of(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        recipe = {k: v for k, v in yaml.safe_load(config.read_text()).items() if k not in _LEFT_OUT}
        (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        words = ["--config", str(scratch / "recipe.yaml"), *options]
        words += ["--output_dir", str(scratch / "run"), "--resume", str(checkpoint.absolute())]
        words += ["--save_strategy", "no", "--eval_strategy", "no", "--num_samples", "0"]
        code = launch([*words, "--stop_after_steps", str(steps)])
        if code:
            logger.error("%s cannot be resumed: exit code %d, see above", checkpoint, code)
            return code
        found = next_record(scratch / "run" / "metrics.jsonl", step_of(checkpoint))
    if found is None:
        logger.info(
            "%s loads, with its optimizer. It is the end of the run: there is no step left to "
            "repeat, and no earlier checkpoint to repeat the last one from", checkpoint,
        )  # fmt: skip
        return DONE
    return _judge(checkpoint, expected, found)


def _checkpoint_to_repeat(run: Path) -> Path:
    """Return the newest whole checkpoint after which a step is recorded, else the newest whole one.

    Raises:
        CheckpointError: there is no whole checkpoint.
    """
    newest, passed_over = newest_verified(run)
    for reason in passed_over:
        logger.warning("passed over a checkpoint: %s", reason)
    if newest is None:
        raise CheckpointError(f"{run} has no whole checkpoint")
    older = [folder for folder in checkpoints(run) if step_of(folder) < step_of(newest)]
    for folder in [newest, *reversed(older)]:
        if next_record(run / "metrics.jsonl", step_of(folder)) is not None and _is_whole(folder):
            return folder
    return newest


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError as error:
        logger.warning("passed over a checkpoint: %s", error)
        return False
    return True


def next_record(file: Path, step: int) -> dict[str, Any] | None:
    """Return the first record after a step, None if there is none."""
    if not file.is_file():
        return None
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed run may be cut
            continue
        if record["step"] > step:
            return record
    return None


def differences(expected: dict[str, Any], found: dict[str, Any], tolerance: float) -> list[str]:
    """Return the entries of two records that differ by more than a relative tolerance, in words."""
    words = []
    for key in COMPARED:
        before, after = expected.get(key), found.get(key)
        is_number = isinstance(before, int | float) and isinstance(after, int | float)
        if before == after or (is_number and math.isclose(before, after, rel_tol=tolerance)):
            continue
        words.append(f"{key} {before} -> {after}")
    return words


def _judge(checkpoint: Path, expected: dict[str, Any] | None, found: dict[str, Any]) -> int:
    if expected is None:
        logger.info(
            "%s resumes: step %d ran with loss %.4f. The run recorded no step after this "
            "checkpoint, so there is nothing to compare it with", checkpoint, found["step"],
            found["loss"],
        )  # fmt: skip
        return DONE
    if not differences(expected, found, 0.0):
        logger.info(
            "%s resumes exactly: up to step %d %s are those that the run recorded", checkpoint,
            found["step"], ", ".join(COMPARED),
        )  # fmt: skip
        return DONE
    import torch

    tolerance = CUDA_TOLERANCE if torch.cuda.is_available() else 0.0
    lasting = differences(expected, found, tolerance)
    words = "; ".join(lasting or differences(expected, found, 0.0))
    if lasting:
        logger.error("%s does not repeat the run: at step %d %s", checkpoint, found["step"], words)
        return FAILED
    logger.info(
        "%s resumes, within the order of the GPU's sums (%g): at step %d %s", checkpoint, tolerance,
        found["step"], words,
    )  # fmt: skip
    return DONE
