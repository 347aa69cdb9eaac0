"""One preparation in a process of its own: `python bench/parts/data/measure.py KIND FILE MODEL`.

Prints an object: wall and CPU seconds of this process and those it started, its memory, tokens.
Imports, and reading the tokenizer, are done before the clock starts.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("ours_1", "ours_2", "ours_unsplit_1", "bare_1_thread", "bare", "trl")


def measure(kind: str, file: Path, model: Path) -> dict[str, Any]:
    """Prepare a file once.

    Args:
        kind: `ours_N` with N processes, `ours_unsplit_N` with `--thinking drop_history`, whose
            texts are those of `bare`: nothing but the encoding of rendered texts by `tokenizers`,
            with all its threads or one; or `trl`.
        file: JSON lines.
        model: folder of the tokenizer.
    """
    if kind == "bare_1_thread":
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # is read once
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as folder:
        work = _WORK[kind.partition("_")[0]](kind, file, tokenizer, Path(folder))
        own_before, all_before, started = _memory_mib("VmRSS"), _cpu_s(), time.perf_counter()
        counts = work()
        measured = {
            "seconds": round(time.perf_counter() - started, 3),
            "cpu_seconds": round(_cpu_s() - all_before, 3),
            "peak_mib": round(_memory_mib("VmHWM")),
            "grown_mib": round(_memory_mib("VmHWM") - own_before),
        }
        if kind.startswith("ours"):
            counts |= _second_start(work)
        return measured | counts


def _second_start(work: Callable[[], dict[str, Any]]) -> dict[str, float]:
    """Return the seconds that an unchanged preparation takes, with warm hashes."""
    work()
    started = time.perf_counter()
    work()
    return {"again_seconds": round(time.perf_counter() - started, 4)}


def _ours(kind: str, file: Path, tokenizer: Any, folder: Path) -> Callable[[], dict[str, Any]]:
    import torch.distributed  # noqa: F401 - a run has imported it

    from qwen3_sft.data.prepare import prepare
    from qwen3_sft.options.data_args import DataArguments

    args = DataArguments(
        dataset=[str(file)], data_cache_dir=str(folder), num_proc=int(kind[-1]), max_length=32768,
        thinking="drop_history" if "unsplit" in kind else "split_turns",
    )  # fmt: skip

    def work() -> dict[str, Any]:
        report = prepare(args, tokenizer).report
        return {"tokens": report["tokens_in"], "samples": report["samples_in"]}

    return work


def _bare(kind: str, file: Path, tokenizer: Any, folder: Path) -> Callable[[], dict[str, Any]]:
    del kind, folder
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"] for line in lines]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    backend = tokenizer.backend_tokenizer

    def work() -> dict[str, Any]:
        tokens = 0
        for start in range(0, len(texts), 1000):  # as `datasets` does; all at once takes memory
            batch = texts[start : start + 1000]
            encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
            tokens += sum(len(encoding.ids) for encoding in encoded)
        return {"tokens": tokens, "samples": len(texts)}

    return work


def _trl(kind: str, file: Path, tokenizer: Any, folder: Path) -> Callable[[], dict[str, Any]]:
    del kind
    import datasets
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    args = SFTConfig(
        output_dir=str(folder / "run"), assistant_only_loss=True, max_length=32768, report_to=[],
        use_cpu=True, bf16=False,
    )  # fmt: skip

    def work() -> dict[str, Any]:
        data = datasets.load_dataset(
            "json", data_files=str(file), cache_dir=str(folder / "cache"), split="train"
        )
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
        prepared: Any = trainer.train_dataset
        return {"samples": len(prepared), "columns": prepared.column_names}

    return work


_WORK = {"ours": _ours, "bare": _bare, "trl": _trl}


def _cpu_s() -> float:
    """Return the CPU time of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _memory_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    # Others print to standard output too; the answer is the last line.
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
