"""Two nodes on one machine: two network namespaces joined by a virtual cable that can be pulled."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.commands import ROOT

# From a block that documentation reserves, so that it is nobody's network.
ADDRESSES = ("198.51.100.1", "198.51.100.2")


def reason_to_skip() -> str | None:
    """Why two nodes cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"qs{secrets.token_hex(3)}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    except FileNotFoundError:
        return "no `ip` here (iproute2)"
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"`ip netns add` is refused: {made.stderr.strip()}" if made.returncode else None


@dataclass
class Node:
    """One node's part of a run, under way or ended."""

    process: subprocess.Popen
    log: Path
    started: float = field(default_factory=time.monotonic)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class TwoNodes:
    """The namespaces, and a Python environment that qwen3_sft_multinode.sh accepts."""

    names: tuple[str, str]
    environment: Path

    def start(self, logs: Path, *options: object, **variables: object) -> list[Node]:
        """Start the same command on both nodes."""
        logs.mkdir(parents=True, exist_ok=True)
        path = f"{self.environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        shared = {
            "NNODES": 2, "MASTER_ADDR": ADDRESSES[0], "NPROC_PER_NODE": 1, "OMP_NUM_THREADS": 1,
            "VIRTUAL_ENV": self.environment, "PATH": path, **variables,
        }  # fmt: skip
        nodes = []
        for rank in (1, 0):  # the store's node last: the other has to look for it
            env = {**os.environ, **{k: str(v) for k, v in shared.items()}, "NODE_RANK": str(rank)}
            env.pop("PYTHONPATH", None)
            log = logs / f"node{rank}.log"
            command = ["ip", "netns", "exec", self.names[rank], "bash", "qwen3_sft_multinode.sh"]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [*command, *map(str, options)], cwd=ROOT, env=env, stdout=file,
                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                )  # fmt: skip
            nodes.insert(0, Node(process, log))
        return nodes

    def workers(self, rank: int) -> list[int]:
        """Process ids of the training processes on one node."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.names[rank]], capture_output=True, text=True, check=True
        )
        return [pid for pid in map(int, listed.stdout.split()) if _is_worker(pid)]

    def cut(self) -> None:
        """Pull the cable: packets vanish, and nobody is told."""
        self._link("down")

    def mend(self) -> None:
        self._link("up")

    def _link(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", "cable", state)


@contextmanager
def two_nodes(folder: Path) -> Iterator[TwoNodes]:
    """Make two nodes under names of their own; remove them and what still runs there at the end."""
    mark = secrets.token_hex(3)
    names = (f"qs{mark}a", f"qs{mark}b")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth",
           "peer", "name", "cable", "netns", names[1])  # fmt: skip
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield TwoNodes(names, _environment(folder / "env"))
    finally:
        for name in names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in map(int, listed.stdout.split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*words: str) -> None:
    """Run iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def wait_until(condition: Callable[[], bool], nodes: list[Node], timeout_s: float = 180) -> None:
    """Poll until it holds; fail with the logs when the nodes end or the time is over before."""
    end = time.monotonic() + timeout_s
    while not condition():
        ended = [node.process.returncode for node in nodes if node.process.poll() is not None]
        assert not ended, f"ended with {ended}\n" + "\n".join(node.text() for node in nodes)
        assert time.monotonic() < end, "\n".join(node.text() for node in nodes)
        time.sleep(0.02)


def exit_codes(nodes: list[Node], timeout_s: float = 240) -> list[int]:
    """Wait for both nodes; fail with the logs if one does not end."""
    end = time.monotonic() + timeout_s
    codes = []
    for node in nodes:
        try:
            codes.append(node.process.wait(timeout=max(end - time.monotonic(), 0.1)))
        except subprocess.TimeoutExpired as error:
            text = "\n".join(n.text() for n in nodes)
            raise AssertionError(f"still running after {timeout_s} s\n{text}") from error
    return codes


def _is_worker(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except FileNotFoundError:
        return False
    return "qwen3_sft.train" in words and "torch.distributed.run" not in words


def _environment(folder: Path) -> Path:
    """An environment with this clone and all packages, which the script takes as it is."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    theirs = sysconfig.get_path("purelib")
    (site / "ready.pth").write_text(f"{ROOT}\nimport site; site.addsitedir({theirs!r})\n")
    return folder
