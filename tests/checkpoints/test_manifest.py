import os

import pytest

from qwen3_sft.checkpoints.ledger import Ledger
from qwen3_sft.checkpoints.manifest import MANIFEST, check_sizes, read_manifest, seal, verify
from qwen3_sft.errors import CheckpointError


@pytest.fixture
def sealed(tmp_path):
    """Three files: one hashed while it was written, two that nobody has entered."""
    (tmp_path / "sub").mkdir()
    ledger = Ledger(tmp_path)
    with ledger.open(tmp_path / "sub" / "weights") as file:
        file.write(b"0" * 5000)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub" / ".metadata").write_text("m")
    seal(tmp_path, ledger.entries, step=3)
    return tmp_path


def test_a_manifest_lists_every_file_and_the_facts(sealed):
    manifest = verify(sealed)
    assert manifest["step"] == 3
    assert [*manifest["files"]] == ["config.json", "sub/.metadata", "sub/weights"]
    assert check_sizes(sealed) == read_manifest(sealed) == manifest


def test_entered_files_are_not_read_again(tmp_path):
    (tmp_path / "large").write_bytes(b"123")
    seal(tmp_path, {"large": {"bytes": 3, "xxh3": "as entered"}})
    assert read_manifest(tmp_path)["files"]["large"]["xxh3"] == "as entered"


def test_an_entered_file_that_this_rank_does_not_see_is_refused(tmp_path):
    entry = {"bytes": 3, "xxh3": ""}
    with pytest.raises(CheckpointError, match="rank1: missing"):
        seal(tmp_path, {"rank1": entry})
    (tmp_path / "rank1").write_bytes(b"12")
    with pytest.raises(CheckpointError, match="rank1: 2 bytes, the manifest says 3"):
        seal(tmp_path, {"rank1": entry})
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("name", ["config.json", "sub/.metadata", "sub/weights"])
@pytest.mark.parametrize(
    ("hurt", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "content differs"),
    ],
)
def test_every_damage_to_every_file_is_found(sealed, name, hurt, message):
    hurt(sealed / name)
    with pytest.raises(CheckpointError, match=f"{name}: .*{message}"):
        verify(sealed)


def test_sizes_alone_do_not_tell_a_changed_content(sealed):
    (sealed / "config.json").write_text("[]")
    check_sizes(sealed)
    (sealed / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json: 3 bytes"):
        check_sizes(sealed)


def test_a_file_that_cannot_be_read_is_damage(sealed):
    for name in ("config.json", "sub/weights"):
        path = sealed / name
        content = path.read_bytes()
        path.unlink()
        os.symlink(path.name, path)  # to itself
        with pytest.raises(CheckpointError, match="missing"):
            verify(sealed)
        path.unlink()
        path.write_bytes(content)
    verify(sealed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"files": {', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[]", "no list of files"),
        ('{"step": 3}', "no list of files"),
        ('{"files": []}', "no list of files"),
        ('{"files": {"config.json": {"bytes": 2}}}', "config.json is not a file"),
        ('{"files": {"config.json": "x"}}', "config.json is not a file"),
        ('{"files": {"../out": {"bytes": 2, "xxh3": ""}}}', "../out is not a file of this folder"),
        ('{"files": {"/etc/passwd": {"bytes": 2, "xxh3": ""}}}', "/etc/passwd is not a file"),
    ],
)
def test_what_is_not_a_manifest_is_damage(sealed, text, message):
    (sealed / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message):
        read_manifest(sealed)
    (sealed / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="did not finish"):
        verify(sealed)
