"""Pickles that run a command when they are loaded, and checkpoints they are planted in."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections import OrderedDict

import torch

from qwen3_sft.checkpoints.ledger import hash_file
from qwen3_sft.checkpoints.manifest import MANIFEST, read_manifest, seal


class Attack:
    """Bytes that run `touch` when they are unpickled."""

    def __init__(self, sentinel):
        self.sentinel, self.command = sentinel, f"touch {sentinel}"

    def __reduce__(self):
        return os.system, (self.command,)

    def ran(self):
        there = self.sentinel.exists()
        self.sentinel.unlink(missing_ok=True)
        return there

    def payloads(self):
        """Return name -> bytes of a file; each runs under `pickle.load` or `torch.load`."""
        command = self.command.encode()
        word = lambda text: b"\x8c" + bytes([len(text)]) + text  # noqa: E731  SHORT_BINUNICODE
        found = {f"protocol {n}": pickle.dumps(self, n) for n in (0, 2, 4)}
        found |= {
            # Names fetched from the memo, in the other order than they are used.
            "memo": b"\x80\x04" + word(b"system") + b"\x940" + word(b"posix") + b"\x940"
            + b"h\x01h\x00\x93" + word(command) + b"\x85R.",
            "inst": b"(S'" + command + b"'\niposix\nsystem\n.",
            "obj": b"(cposix\nsystem\nS'" + command + b"'\no.",
            "getattr": b"cbuiltins\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'system'\ntR(S'"
            + command + b"'\ntR.",
            "after": pickle.dumps(OrderedDict(a=1))[:-1] + b"0" + pickle.dumps(self, 2),
        }  # fmt: skip
        nested = torch.storage._load_from_bytes, (self.saved(self),)
        return found | {
            "torch.save": self.saved(self),
            "torch.save in torch.save": self.saved(Reduced(*nested)),
            "old torch.save": self.saved(self, _use_new_zipfile_serialization=False),
            "tar": self.tar(),
        }

    @staticmethod
    def saved(value, **options):
        file = io.BytesIO()
        torch.save(value, file, **options)
        return file.getvalue()

    def tar(self):
        """Torch's oldest format, whose loader unpickles what it finds in it."""
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name in ("storages", "tensors", "pickle"):
                info = tarfile.TarInfo(name)
                data = pickle.dumps(self, 2)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return file.getvalue()


class Reduced:
    def __init__(self, *made):
        self.made = made

    def __reduce__(self):
        return self.made


def reseal(folder, **facts):
    """Write the manifest again, as whoever planted something would."""
    facts = {k: v for k, v in read_manifest(folder).items() if k != "files"} | facts
    seal(folder, {}, **facts)


def plant(folder, file, content):
    """As `reseal` after `content` was written to one file, without reading all others."""
    file.write_bytes(content)
    manifest = read_manifest(folder)
    entry = {"bytes": len(content), "xxh3": hash_file(file)}
    manifest["files"][file.relative_to(folder).as_posix()] = entry
    (folder / MANIFEST).write_text(json.dumps(manifest))
