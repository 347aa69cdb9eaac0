import json

import pytest

from qwen3_sft.checkpoints.manifest import MANIFEST, seal
from qwen3_sft.checkpoints.resume import check_resume, choose_checkpoint
from qwen3_sft.errors import CheckpointError, UsageError
from qwen3_sft.records.run_folder import RunFolder, versions


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def checkpoint(folder, step, *, is_sealed=True):
    path = folder.path / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    if is_sealed:
        seal(path, {}, step=step)
    return path


def test_the_newest_whole_checkpoint_is_chosen(folder, caplog):
    assert choose_checkpoint(folder, "auto") is None
    good = checkpoint(folder, 9)
    checkpoint(folder, 10, is_sealed=False)
    checkpoint(folder, 8)
    (folder.path / "checkpoint-best").mkdir()
    assert choose_checkpoint(folder, "auto") == good


def test_a_named_checkpoint_is_verified(folder):
    path = checkpoint(folder, 3)
    assert choose_checkpoint(folder, str(path)) == path
    (path / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
        choose_checkpoint(folder, str(path))
    with pytest.raises(UsageError, match="no such folder"):
        check_resume(folder, str(path) + "x")
    check_resume(folder, str(path))
    with pytest.raises(UsageError, match=f"no checkpoint .*; its newest is {path}"):
        check_resume(folder, str(folder.path))
    (path / MANIFEST).unlink()
    with pytest.raises(UsageError, match="no checkpoint"):
        check_resume(folder, str(path))


def test_never_refuses_a_used_folder_on_the_first_rank(folder, monkeypatch):
    check_resume(folder, "never")
    (folder.path / "notes.txt").touch()
    check_resume(folder, "auto")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        check_resume(folder, "never")
    monkeypatch.setenv("RANK", "1")
    check_resume(folder, "never")
    assert choose_checkpoint(folder, "never") is None


def test_summary_marks_a_finished_run(folder):
    assert folder.summary() is None
    folder.write_json("summary.json", {"steps": 3, "word": "schön"})
    assert folder.summary() == {"steps": 3, "word": "schön"}
    assert [p.name for p in folder.path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("text", [b"", b'{"asked": ', b"[]", b"\xff\xfe"])
def test_a_damaged_record_is_named(folder, text):
    folder.summary_file.write_bytes(text)
    with pytest.raises(UsageError, match=r"summary\.json: damaged .*; remove it"):
        folder.summary()


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--output_dir"):
        RunFolder(tmp_path / "file" / "run").create()


def test_versions_are_plain_strings():
    found = versions()
    assert {"python", "torch", "transformers"} <= found.keys()
    assert json.loads(json.dumps(found)) == found
