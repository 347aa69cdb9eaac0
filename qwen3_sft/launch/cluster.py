"""Which node of which cluster this is, read from plain variables or from SLURM's.

A variable that is set but empty is always an error: it is a script's unset variable, and taking a
default for it would start the wrong cluster.
"""

from __future__ import annotations

import ipaddress
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwen3_sft.errors import UsageError

RdzvBackend = Literal["static", "c10d"]

# A plain variable and what SLURM calls it; the plain one wins.
_NAMES = {
    "NNODES": "SLURM_NNODES",
    "NODE_RANK": "SLURM_NODEID",
    "NPROC_PER_NODE": "SLURM_GPUS_ON_NODE",
    "RDZV_ID": "SLURM_JOB_ID",
}
# Every variable that `read_cluster` looks at.
VARIABLES = (
    "NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_ADDR",
    "RDZV_BACKEND", "RDZV_ID", "RDZV_TIMEOUT", "MAX_RESTARTS", "SLURM_NNODES", "SLURM_NODEID",
    "SLURM_GPUS_ON_NODE", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_LOCALID",
)  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """One node's view of the nodes of a run.

    Attributes:
        nodes: how many there are.
        node_rank: this one, from 0.
        processes_per_node: on each.
        master_addr: name or address of node 0.
        master_port: where it listens.
        local_addr: the address under which the other nodes reach this one.
        rdzv_backend: `static`, which starts once, or `c10d`, which can start again.
        rdzv_id: the same on all nodes and no other run's.
        rdzv_timeout_s: how long nodes wait for one another.
        max_restarts: failures after which all nodes start again.
    """

    nodes: int
    node_rank: int
    processes_per_node: int
    master_addr: str
    master_port: int
    local_addr: str
    rdzv_backend: RdzvBackend
    rdzv_id: str
    rdzv_timeout_s: int
    max_restarts: int

    @property
    def processes(self) -> int:
        """Processes on all nodes together."""
        return self.nodes * self.processes_per_node

    @property
    def endpoint(self) -> str:
        """`address:port` of node 0."""
        host = f"[{self.master_addr}]" if ":" in self.master_addr else self.master_addr
        return f"{host}:{self.master_port}"


def read_cluster(env: Mapping[str, str], gpus: int) -> Cluster:
    """Read the cluster from environment variables; sends no packet but name look-ups.

    Args:
        env: the environment.
        gpus: of this node, for a NPROC_PER_NODE that nothing sets.

    Raises:
        UsageError: a variable is missing, empty, malformed or contradicts another; the message
            names it and what to set.
    """
    _refuse_several_launchers(env)
    nodes = _number(env, "NNODES", at_least=1)
    if nodes is None:
        raise UsageError(
            "NNODES is not set: set NNODES, NODE_RANK and MASTER_ADDR on every node, or start "
            "under SLURM with srun (examples/slurm.sbatch); for one machine use qwen3_sft.sh"
        )
    node_rank = _number(env, "NODE_RANK", at_least=0, default=0 if nodes == 1 else None)
    if node_rank is None:
        raise UsageError(f"NODE_RANK is not set: set it to 0..{nodes - 1}, another on each node")
    if node_rank >= nodes:
        raise UsageError(
            f"NODE_RANK={node_rank}: with NNODES={nodes} it must be one of 0..{nodes - 1}"
        )
    master_addr = _master_addr(env, nodes)
    master_port = _number(env, "MASTER_PORT", at_least=1, at_most=65535, default=29500) or 29500
    backend, max_restarts = _restarts(env)
    return Cluster(
        nodes=nodes,
        node_rank=node_rank,
        processes_per_node=_processes_per_node(env, gpus),
        master_addr=master_addr,
        master_port=master_port,
        local_addr=_local_addr(env, master_addr, master_port),
        rdzv_backend=backend,
        rdzv_id=_text(env, "RDZV_ID") or "qwen3-sft",
        rdzv_timeout_s=_number(env, "RDZV_TIMEOUT", at_least=1, default=600) or 600,
        max_restarts=max_restarts,
    )


def _text(env: Mapping[str, str], name: str) -> str | None:
    """The value of a variable or of SLURM's counterpart, None where neither is set."""
    for known in (name, _NAMES.get(name)):
        if known is not None and known in env:
            if not env[known].strip():
                raise UsageError(f"{known} is set but empty: give it a value or unset it")
            return env[known].strip()
    return None


def _number(
    env: Mapping[str, str],
    name: str,
    *,
    at_least: int,
    at_most: int | None = None,
    default: int | None = None,
) -> int | None:
    text = _text(env, name)
    if text is None:
        return default
    shown = name if name in env else _NAMES[name]
    bounds = f"at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{shown}={text}: must be a whole number {bounds}")
    number = int(text)
    if number < at_least or (at_most is not None and number > at_most):
        raise UsageError(f"{shown}={text}: must be {bounds}")
    return number


def _refuse_several_launchers(env: Mapping[str, str]) -> None:
    if "NODE_RANK" not in env and env.get("SLURM_LOCALID", "0") != "0":
        raise UsageError(
            f"SLURM_LOCALID={env['SLURM_LOCALID']}: SLURM started several tasks on this node, and "
            "each would start all of its processes; use --ntasks-per-node=1"
        )


def _processes_per_node(env: Mapping[str, str], gpus: int) -> int:
    processes = _number(env, "NPROC_PER_NODE", at_least=1, default=gpus)
    if not processes:
        raise UsageError("this node has no GPU: set NPROC_PER_NODE to the processes to start on it")
    return processes


def _restarts(env: Mapping[str, str]) -> tuple[RdzvBackend, int]:
    restarts = _number(env, "MAX_RESTARTS", at_least=0)
    backend = _text(env, "RDZV_BACKEND")
    if backend not in (None, "static", "c10d"):
        raise UsageError(f"RDZV_BACKEND={backend}: must be static or c10d")
    if backend == "static" and restarts:
        raise UsageError(
            f"RDZV_BACKEND=static with MAX_RESTARTS={restarts}: nodes that met statically cannot "
            "meet again; set RDZV_BACKEND=c10d, or MAX_RESTARTS=0"
        )
    if backend == "c10d" or restarts:
        return "c10d", 3 if restarts is None else restarts
    return "static", 0


def _master_addr(env: Mapping[str, str], nodes: int) -> str:
    address = _text(env, "MASTER_ADDR")
    source = f"MASTER_ADDR={address}"
    if address is None and "SLURM_JOB_NODELIST" in env:
        address = _first_slurm_node(env["SLURM_JOB_NODELIST"])
        source = f"{address}, the first of SLURM_JOB_NODELIST={env['SLURM_JOB_NODELIST']}"
    if address is None and nodes == 1:
        return "127.0.0.1"
    if address is None:
        raise UsageError("MASTER_ADDR is not set: set it to node 0's address, the same everywhere")
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(address, None)}
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"{source} is not known here ({error}): set MASTER_ADDR to node 0's IP address"
        ) from error
    if nodes > 1 and all(ipaddress.ip_address(a.split("%")[0]).is_loopback for a in found):
        raise UsageError(
            f"{source} is this machine itself ({', '.join(sorted(found))}), which other nodes "
            "cannot reach: set MASTER_ADDR to an address of node 0 that they can (`ip -4 addr`)"
        )
    return address


def _first_slurm_node(nodelist: str) -> str:
    if not nodelist.strip():
        raise UsageError("SLURM_JOB_NODELIST is set but empty: set MASTER_ADDR to node 0's address")
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UsageError(
            f"`{' '.join(command)}` names no node ({error}): set MASTER_ADDR to node 0's address"
        ) from error


def _local_addr(env: Mapping[str, str], master_addr: str, port: int) -> str:
    given = _text(env, "LOCAL_ADDR")
    if given is not None:
        return given
    error: OSError | None = None
    for family, _, _, _, target in socket.getaddrinfo(master_addr, port, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # asks the routing table; UDP sends nothing yet
                return probe.getsockname()[0]
        except OSError as failure:
            error = failure
    raise UsageError(
        f"no route from this node to MASTER_ADDR={master_addr} ({error}): correct it, or set "
        "LOCAL_ADDR to this node's address if the route appears later"
    )
