import io
import resource

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save

from qwen3_sft.checkpoints.ledger import Ledger, hash_file
from qwen3_sft.checkpoints.safetensors_file import _NAMES, write_tensors


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path)


@pytest.fixture
def small_files():
    """No file of this process grows beyond 100,000 bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_is_written_is_what_is_hashed(ledger, tmp_path):
    parts = [b"a", b"", b"bc" * 700_000, b"d" * 3, b"e" * (1 << 20), b"f"]
    (tmp_path / "sub").mkdir()
    with ledger.open(tmp_path / "sub" / "file") as file:
        for part in parts:
            assert file.write(part) == len(part)
        assert file.tell() == sum(map(len, parts))
    whole = b"".join(parts)
    assert (tmp_path / "sub" / "file").read_bytes() == whole
    expected = {"bytes": len(whole), "xxh3": xxhash.xxh3_128(whole).hexdigest()}
    assert ledger.entries == {"sub/file": expected}
    assert hash_file(tmp_path / "sub" / "file") == expected["xxh3"]


@pytest.mark.parametrize("is_zip", [True, False])  # DeepSpeed's default is the older format
def test_torch_saves_into_it(ledger, tmp_path, is_zip):
    state = {
        "large": torch.randn(1000, 700), "small": torch.randn(5).bfloat16(), "step": torch.ones(()),
        "empty": torch.zeros(0, 3), "group": [{"lr": 0.1}],
    }  # fmt: skip
    with ledger.open(str(tmp_path / "state.pt")) as file:
        torch.save(state, file, _use_new_zipfile_serialization=is_zip)
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["group"] == state["group"]
    assert all(state[key].equal(loaded[key]) for key in ("large", "small", "step", "empty"))
    size = (tmp_path / "state.pt").stat().st_size
    assert ledger.entries["state.pt"] == {"bytes": size, "xxh3": hash_file(tmp_path / "state.pt")}


def test_a_buffer_may_change_after_it_is_written(ledger, tmp_path):
    buffer = bytearray(b"1" * 3_000_000)
    with ledger.open(tmp_path / "file") as file:
        for value in (b"2", b"3"):
            file.write(buffer)
            file.write(memoryview(buffer)[:10])
            buffer[:] = value * len(buffer)
    content = (tmp_path / "file").read_bytes()
    assert content == b"1" * 3_000_010 + b"2" * 3_000_010
    assert ledger.entries["file"]["xxh3"] == hash_file(tmp_path / "file")


def test_a_file_is_written_in_order_and_through_its_hash(ledger, tmp_path):
    with ledger.open(tmp_path / "file") as file:
        file.write(b"12345")
        assert file.seek(0, io.SEEK_CUR) == file.seek(5) == file.seek(0, io.SEEK_END) == 5
        for arguments in ((0,), (6,), (-1, io.SEEK_CUR)):
            with pytest.raises(io.UnsupportedOperation, match="written in order"):
                file.seek(*arguments)
        with pytest.raises(io.UnsupportedOperation, match="hash"):
            file.fileno()
    with pytest.raises(ValueError, match="closed"):
        file.write(b"6")


def test_a_full_disk_is_kept_for_the_end(ledger, tmp_path, small_files):
    with ledger.open(tmp_path / "whole") as file:
        file.write(b"1" * 1000)
    with ledger.open(tmp_path / "large") as file:
        torch.save({"a": torch.zeros(500_000)}, file)
        assert file.tell() > 2_000_000
    with ledger.open(tmp_path / "after") as file:
        file.write(b"1")
    assert ledger.error.errno == 27
    assert ledger.failure == f"OSError: [Errno 27] File too large: '{tmp_path}/large'"
    assert [*ledger.entries] == ["whole"]
    assert (tmp_path / "large").stat().st_size == 0  # the room is given back
    assert not (tmp_path / "after").exists()


def test_a_file_that_cannot_be_made_is_kept_for_the_end(ledger, tmp_path):
    with ledger.open(tmp_path / "missing" / "file") as file:
        file.write(b"1")
    assert isinstance(ledger.error, FileNotFoundError)
    assert ledger.entries == {}


def test_a_file_whose_writer_fails_is_not_entered(ledger, tmp_path):
    with pytest.raises(ZeroDivisionError), ledger.open(tmp_path / "file"):
        _ = 1 / 0
    assert ledger.entries == {}


def test_files_of_others_are_entered_and_entries_renamed(ledger, tmp_path):
    (tmp_path / "file").write_bytes(b"123")
    ledger.record(tmp_path / "file")
    ledger.rename(tmp_path / "file", tmp_path / "new")
    digest = xxhash.xxh3_128(b"123").hexdigest()
    assert ledger.entries == {"new": {"bytes": 3, "xxh3": digest}}
    assert (tmp_path / "new").read_bytes() == b"123"


def test_tensors_are_written_as_safetensors_writes_them(ledger, tmp_path):
    tensors = {
        f"{size}.{dtype}": (torch.randn(3, size) * 3).to(dtype)
        for dtype in _NAMES
        for size in (1, 2)
    }
    tensors |= {"none": torch.zeros(0, 3), "one": torch.tensor(2.0), "ö": torch.randn(4, 6)[:, ::2]}
    with ledger.open(tmp_path / "file") as file:
        write_tensors(tensors, file)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "file").read_bytes() == save(whole, metadata={"format": "pt"})
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].equal(tensors[name]) for name in tensors)
    with safe_open(tmp_path / "file", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match=r"a: no safetensors name for torch\.complex64"):
        write_tensors({"a": torch.zeros(1, dtype=torch.complex64)}, io.BytesIO())
