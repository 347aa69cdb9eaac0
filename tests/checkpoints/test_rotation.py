"""What is removed, and that nobody who is killed on the way loses the only whole checkpoint."""

import itertools
import os

import pytest

from qwen3_sft.checkpoints.folders import (
    clear_leftovers,
    newest_verified,
    publish,
    put_back,
    remove,
)
from qwen3_sft.checkpoints.manifest import MANIFEST, seal
from qwen3_sft.checkpoints.rotation import rotate
from qwen3_sft.errors import CheckpointError

CALLS = ("rename", "unlink", "rmdir", "fsync")


class Killed(BaseException):
    """Instead of the file system call that would have come next."""


def make(folder, text="old"):
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_text(text)
    (folder / "sub" / "state").write_text(text)
    seal(folder, {}, step=1)
    return folder


def break_(folder):
    (folder / "weights").write_text("1")
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def is_killed(monkeypatch, last, work, *arguments):
    """Call `work`, ended instead of its file system call number `last`; return whether it was."""
    calls = itertools.count()

    def counted(original):
        def call(*args, **kwargs):
            if next(calls) == last:
                raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in CALLS:
            patched.setattr(os, name, counted(getattr(os, name)))
        try:
            work(*arguments)
        except Killed:
            return True
    return False


@pytest.mark.parametrize(
    ("namesake", "next_step"),
    [
        ("whole", put_back), ("whole", clear_leftovers), ("damaged", put_back),
        ("none", clear_leftovers),
    ],
)  # fmt: skip
def test_a_publish_that_is_killed_leaves_the_old_or_the_new_one(
    tmp_path, monkeypatch, namesake, next_step
):
    expected = {"whole": ["old", "new"]}.get(namesake, ["older", "new"])
    seen = []
    for last in itertools.count():
        root = tmp_path / str(last)
        make(root / "checkpoint-3", "older")
        staged = make(root / ".saving" / "checkpoint-6", "new")
        if namesake != "none":
            make(root / "checkpoint-6", "old")
        if namesake == "damaged":
            break_(root / "checkpoint-6")
        was_killed = is_killed(monkeypatch, last, publish, staged, root / "checkpoint-6")
        next_step(root)  # a resumed run looks first, another one saves first
        found, _ = newest_verified(root)
        text = (found / "weights").read_text()
        assert (found / "sub" / "state").read_text() == text
        clear_leftovers(root)
        assert {*names(root)} <= {"checkpoint-3", "checkpoint-6"}
        assert newest_verified(root)[0] == found
        assert (found / "weights").read_text() == text
        seen.append(text)
        if not was_killed:
            break
    assert len(seen) > 5
    assert seen == sorted(seen, key=expected.index)  # the old one, and from one call on the new one
    assert {*seen} == {*expected}


def test_a_removal_that_is_killed_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path, monkeypatch
):
    for last in itertools.count():
        root = tmp_path / str(last)
        folder = make(root / "checkpoint-3")
        was_killed = is_killed(monkeypatch, last, remove, folder)
        assert newest_verified(root) == (None if last else folder, [])
        clear_leftovers(root)
        assert names(root) == ([] if last else ["checkpoint-3"])
        if not was_killed:
            break
    assert last > 4


def test_a_killed_publish_that_is_repeated_goes_through(tmp_path):
    """The folder that was put aside stays until the new one has its name."""
    make(tmp_path / ".replaced-model", "old")
    publish(make(tmp_path / ".model.partial", "new"), tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "new"


# Steps that are whole, damaged, the limit, the best, the one just written; what stays.
ROTATIONS = [
    ([3, 6, 9], [], None, None, 9, [3, 6, 9]),
    ([3, 6, 9], [], 0, None, 9, [3, 6, 9]),
    ([3, 6, 9], [], 1, None, 9, [9]),
    ([3, 6, 9, 12], [], 2, None, 12, [9, 12]),
    ([3, 6, 9], [], 3, None, 9, [3, 6, 9]),
    ([3, 6, 9], [], 1, 3, 9, [3, 9]),  # best and newest, though that is two
    ([3, 6, 9], [], 2, 3, 9, [3, 9]),
    ([3, 6, 9, 12], [], 3, 3, 12, [3, 9, 12]),
    ([3, 6, 9], [], 1, 9, 9, [9]),
    ([100, 20, 3], [], 1, None, 100, [100]),  # by number, not by name or time
    ([3, 6, 9], [], 1, None, 6, [6, 9]),  # resumed from 3 once more: 9 is of another day
    ([3], [6], 1, None, 3, [3, 6]),  # nothing whole is as new as the damaged one
    ([3, 9], [6], 1, None, 9, [9]),
    ([3, 9], [6], 2, None, 9, [3, 9]),  # a damaged one takes no whole one's place
    ([3, 6], [9], 1, None, 9, [6, 9]),  # what was just written came out damaged
    ([], [3, 6], 1, None, 6, [3, 6]),
    ([6, 9], [3], 1, 3, 9, [3, 9]),  # the best is never removed
]


@pytest.mark.parametrize(("whole", "damaged", "limit", "best", "written", "stays"), ROTATIONS)
def test_rotation(tmp_path, caplog, whole, damaged, limit, best, written, stays):
    for step in sorted([*whole, *damaged], reverse=True):  # the oldest has the newest time
        make(tmp_path / f"checkpoint-{step}")
    for number, step in enumerate(damaged):
        if number:
            (tmp_path / f"checkpoint-{step}" / MANIFEST).unlink()
        else:
            break_(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    caplog.set_level("INFO", "qwen3_sft.checkpoints.rotation")
    best = best and f"elsewhere/checkpoint-{best}"
    rotate(tmp_path, limit, tmp_path / f"checkpoint-{written}", best)
    there = sorted(int(name.rpartition("-")[2]) for name in names(tmp_path) if "best" not in name)
    assert there == sorted(stays)
    for step in {*whole, *damaged} - {*stays}:
        assert f"removed {tmp_path}/checkpoint-{step}: " in caplog.text


@pytest.mark.parametrize("limit", [1, 2])
def test_what_we_have_not_sealed_stays(tmp_path, limit):
    """A user's own folders, also such as other trainers write: neither removed nor counted."""
    for step, text in ((1, "{}"), (2, '{"files": []}'), (4, "no json"), (8, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_text("mine")
        if text is not None:
            (folder / MANIFEST).write_text(text)
    for step in (3, 6, 9):
        make(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, limit, tmp_path / "checkpoint-9")
    foreign = {f"checkpoint-{step}" for step in (1, 2, 4, 8)}
    assert {*names(tmp_path)} == foreign | {f"checkpoint-{step}" for step in (6, 9)[-limit:]}


def test_a_namesake_that_is_not_ours_is_not_replaced(tmp_path):
    staged = make(tmp_path / ".saving" / "checkpoint-6", "new")
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "weights").write_text("mine")
    with pytest.raises(CheckpointError, match="checkpoint-6 was not written by us"):
        publish(staged, tmp_path / "checkpoint-6")
    assert (tmp_path / "checkpoint-6" / "weights").read_text() == "mine"
    assert staged.is_dir()


def test_names_like_those_of_leftovers_are_not_enough(tmp_path):
    """In the folder of a run there are some by us alone; these have another meaning."""
    kept = (".replaced-thesis", ".removed-old", ".replaced-model", ".savings")
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("mine")
    make(tmp_path / ".replaced-checkpoint-3")
    make(tmp_path / "checkpoint-3")
    clear_leftovers(tmp_path)
    assert {*names(tmp_path)} == {*kept, "checkpoint-3"}
    model, staged = make(tmp_path / "model"), make(tmp_path / "staged")
    with pytest.raises(CheckpointError, match="replaced-model was not written by us"):
        publish(staged, model)


def with_a_file(folder):
    (folder / "sub" / "notes.txt").write_text("mine")


def with_a_link(folder):
    (folder / "model.gguf").symlink_to("/nowhere")


def moved_to_another_disk(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


@pytest.mark.parametrize("change", [with_a_file, with_a_link, moved_to_another_disk])
def test_what_a_user_put_into_a_checkpoint_stays(tmp_path, caplog, change):
    for step in (3, 6, 9):
        make(tmp_path / f"checkpoint-{step}")
    change(tmp_path / "checkpoint-3")
    before = {*(tmp_path / "checkpoint-3").resolve().rglob("*")}
    rotate(tmp_path, 1, tmp_path / "checkpoint-9")
    clear_leftovers(tmp_path)
    assert {*names(tmp_path)} - {"elsewhere"} == {"checkpoint-3", "checkpoint-9"}
    assert {*(tmp_path / "checkpoint-3").resolve().rglob("*")} == before
    assert "checkpoint-3 stays: " in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-3 was not written by us"):
        publish(make(tmp_path / ".saving" / "checkpoint-3"), tmp_path / "checkpoint-3")
