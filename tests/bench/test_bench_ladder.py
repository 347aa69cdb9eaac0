"""The ladder: one change per row, files that survive, and README's tables made of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib import import_module
from itertools import pairwise

import pytest

from tests.support.readme import links, unproven
from tests.support.source_tree import ROOT

README = ROOT / "README.md"


@pytest.fixture
def bench(monkeypatch):
    """Import a module of bench/ as its scripts do."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module


@pytest.fixture
def options(bench):
    return bench("parts.step.options").StepOptions(
        layers=1, max_length=64, batch=2, document_tokens=30, warm_up=1, steps=1
    )


@pytest.fixture
def rows(bench, options):
    return list(bench("ladder").ladder(options))


@pytest.fixture
def text(bench):
    """README's tables as the files of a folder make them."""
    table, rungs = bench("parts.ladder_table"), bench("ladder").LADDER
    empty = "<!-- headline -->\n<!-- /headline -->\n\n<!-- ladder -->\n<!-- /ladder -->\n"
    return lambda folder: table.readme(empty, rungs, folder / "ladder", folder)


def save(folder, rung, options, **result):
    report = {"device": "a GPU", "commit": "abc", "options": asdict(options), **result}
    if "error" not in result:
        rate = {"tokens_per_second": 1000.0, "mfu_of_device": None, "peak_allocated_gib": 1.0}
        report = {**rate, **report}
    folder.mkdir(exist_ok=True)
    (folder / f"{rung.name}.json").write_text(json.dumps(report))


class TestRows:
    def test_each_differs_from_the_one_before_in_one_thing(self, bench, rows):
        differences = bench("parts.step.options").differences
        for (_, before), (rung, after) in pairwise(rows):
            assert differences(before, after) == rung.change
            assert len(rung.change) == 1, rung.name

    def test_the_first_is_plain_transformers(self, bench, rows):
        _, first = rows[0]
        wanted = bench("parts.step.options").TRANSFORMERS
        apart = {n for n, value in wanted.items() if getattr(first, n) != value}
        assert apart == set()
        assert not first.packing

    def test_the_last_is_what_a_run_does(self, bench, rows, options):
        _, last = rows[-1]
        changed = bench("parts.step.options").differences(options, last)
        assert changed == {
            "activation_checkpointing": "selective", "torch_compile": True, "fp8": "all"
        }  # fmt: skip

    def test_names_are_files(self, rows):
        names = [rung.name for rung, _ in rows]
        assert len(set(names)) == len(names)

    def test_a_run_takes_every_row(self, bench, rows, tmp_path):
        for _, options in rows:
            bench("parts.step.measure").resolve(options, tmp_path)


class TestTable:
    def test_readme_is_what_it_writes(self, bench):
        ladder, table = bench("ladder"), bench("parts.ladder_table")
        text = README.read_text(encoding="utf-8")
        folder = ladder.RESULTS
        assert table.readme(text, ladder.LADDER, folder / "ladder", folder) == text, (
            "run python bench/ladder.py --table"
        )

    def test_without_files(self, text, tmp_path):
        assert text(tmp_path).count("not measured yet") == 4

    def test_rows(self, rows, text, tmp_path):
        folder = tmp_path / "ladder"
        names = {rung.name: (rung, options) for rung, options in rows}
        save(folder, *names["baseline"], mfu_of_device=0.1234, peak_allocated_gib=61.26)
        save(folder, *names["liger"], tokens_per_second=1000.0, without_effect="no CUDA")
        save(folder, *names["packing"], tokens_per_second=8500.4)
        save(folder, *names["scatter_moe"], error="RuntimeError: out | of memory")
        save(folder, *names["router"], tokens_per_second=9000.0, commit="def")
        lines = {line.split("]")[0].strip("| ["): line for line in text(tmp_path).splitlines()}
        cells = {
            name: [cell.strip() for cell in lines[rung.label].split("|")[2:-1]]
            for name, (rung, _) in names.items()
            if rung.label in lines
        }
        assert cells == {
            "baseline": ["1,000", "", "12.3%", "61.3"],
            "liger": ["1,000", "no effect here", "-", "1.0"],
            "packing": ["8,500", "x 8.50", "-", "1.0"],
            "scatter_moe": ["failed: RuntimeError: out / of memory", "", "", ""],
            "router": ["9,000", "", "-", "1.0"],
        }
        assert "| + selective checkpointing | not run |" in text(tmp_path)
        assert "commit abc, def" in text(tmp_path)

    @pytest.mark.parametrize("change", [{"batch": 3}, {"torch_compile": True}])
    def test_rows_of_different_shapes_do_not_mix(self, rows, text, tmp_path, change):
        save(tmp_path / "ladder", *rows[0])
        save(tmp_path / "ladder", rows[3][0], replace(rows[3][1], **change))
        with pytest.raises(ValueError, match=f"scatter_moe.json: {next(iter(change))} differs"):
            text(tmp_path)

    def test_devices_do_not_mix(self, rows, text, tmp_path):
        save(tmp_path / "ladder", *rows[0])
        save(tmp_path / "ladder", *rows[1], device="another GPU")
        with pytest.raises(ValueError, match=r"liger\.json: the device"):
            text(tmp_path)

    def headline(self, folder, name, *, rate=14321.4, layers=None, device="NVIDIA H200"):
        row = {"name": "ours", "tokens_per_second": rate,
               "options": {"model": "30b", "layers": layers}}  # fmt: skip
        (folder / name).write_text(json.dumps({"device": device, "results": [row]}))

    def test_headline(self, text, tmp_path):
        self.headline(tmp_path, "headline_4096.json")
        self.headline(tmp_path, "headline_32k.json", rate=5000)
        found = text(tmp_path)
        assert f"| 13,011 | 15,500 | [14,321]({tmp_path}/headline_4096.json) |" in found
        assert f"| [5,000]({tmp_path}/headline_32k.json) / not measured yet |" in found

    @pytest.mark.parametrize(
        ("wrong", "match"), [({"layers": 4}, "4 layers"), ({"device": "H100"}, "not an H200")]
    )
    def test_a_headline_of_something_else(self, text, tmp_path, wrong, match):
        self.headline(tmp_path, "headline_4096.json", **wrong)
        with pytest.raises(ValueError, match=match):
            text(tmp_path)

    def test_a_headline_that_failed(self, text, tmp_path):
        row = {"name": "ours", "error": "RuntimeError: out of memory",
               "options": {"model": "30b", "layers": None}}  # fmt: skip
        file = tmp_path / "headline_4096.json"
        file.write_text(json.dumps({"device": "NVIDIA H200", "results": [row]}))
        assert f"[failed]({file})" in text(tmp_path)

    def test_what_carries_a_mark_is_no_measurement(self, bench, rows, text, tmp_path, monkeypatch):
        monkeypatch.setenv("BENCH_MARK", "fake")
        marked = bench("parts.result_file").provenance()
        save(tmp_path / "ladder", *rows[0], **marked)
        with pytest.raises(ValueError, match=r"baseline\.json: no measurement \(fake\)"):
            text(tmp_path)
        (tmp_path / "headline_4096.json").write_text(json.dumps({**marked, "results": []}))
        with pytest.raises(ValueError, match=r"headline_4096\.json: no measurement"):
            text(tmp_path)
        monkeypatch.delenv("BENCH_MARK")
        assert "mark" not in bench("parts.result_file").provenance()

    def test_a_readme_that_is_measured_stays_short_and_proven(
        self, bench, rows, tmp_path, monkeypatch
    ):
        """With every figure there: at most 200 lines, and each figure beside its file."""
        table = bench("parts.ladder_table")
        monkeypatch.setattr(table, "ROOT", tmp_path)
        folder = tmp_path / "bench" / "results" / "gpu"
        folder.mkdir(parents=True)
        for rung, options in rows:
            save(folder / "ladder", rung, options, mfu_of_device=0.4)
        for goal in table.GOALS:
            for name in goal.files:
                self.headline(folder, name)
        rungs = [rung for rung, _ in rows]
        full = table.readme(README.read_text(encoding="utf-8"), rungs, folder / "ladder", folder)
        assert len(full.splitlines()) <= 200
        assert not unproven(full)
        assert "bench/results/gpu/ladder/baseline.json" in links(full)
        assert "not measured yet" not in full

    def test_a_text_without_markers(self, bench, tmp_path):
        with pytest.raises(ValueError, match="<!-- headline -->"):
            bench("parts.ladder_table").readme("# Title\n", (), tmp_path, tmp_path)


class TestRun:
    def test_rows_become_files_and_a_table(self, bench, tmp_path, capsys):
        readme = tmp_path / "README.md"
        readme.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
        bench("ladder").main(
            ["--run", "--table", "--rows", "baseline", "liger", "selective", "--layers", "1",
             "--max_length", "64", "--batch", "2", "--document_tokens", "30", "--warm_up", "1",
             "--steps", "1", "--attn_implementation", "eager", "--torch_compile",
             "--folder", str(tmp_path / "ladder"), "--readme", str(readme)]
        )  # fmt: skip
        results = {
            path.stem: json.loads(path.read_text()) for path in (tmp_path / "ladder").iterdir()
        }
        assert set(results) == {"baseline", "liger", "selective"}
        assert results["baseline"]["resolved"]["attn_implementation"] == "sdpa"
        assert results["baseline"]["padding_fraction"]["mean"] > 0
        assert "without_effect" in results["liger"]
        assert results["selective"]["resolved"]["experts_implementation"] == "scatter_moe_recompute"
        assert results["selective"]["resolved"]["layout"] == "rows"
        assert results["selective"]["commit"]
        assert "| no effect here |" in readme.read_text(encoding="utf-8")
        assert "selective: " in capsys.readouterr().out

    def test_a_row_that_fails_is_a_result(self, bench, options):
        ladder = bench("ladder")
        result = ladder.row(ladder.LADDER[0], replace(options, use_liger=True))
        assert result["error"].startswith("ModelError: --use_liger true")
        assert result["options"]["use_liger"]

    def test_no_time_no_row(self, bench, options, tmp_path, capsys):
        bench("ladder").climb(options, ["baseline"], tmp_path, seconds=0)
        assert not list(tmp_path.iterdir())
        assert "baseline: not run" in capsys.readouterr().out

    def test_it_wants_a_verb(self, bench, capsys):
        with pytest.raises(SystemExit) as stopped:
            bench("ladder").main([])
        assert stopped.value.code == 2
        assert "--run" in capsys.readouterr().err
