"""One node of a multi-node run, from its variables to its exit code.

Starts torchrun, which `accelerate launch` would start as well but without this node's address, and
watches it. The watching matters when a node is cut off: its processes give up at --dist_timeout_s,
but its torchrun may wait for the lost store without end, because no packet says that nobody
answers.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from qwen3_sft.errors import BY_SIGNAL, DONE, FAILED, INTERRUPTED, MISTAKE, UsageError, exit_code_of
from qwen3_sft.launch.accelerate_environment import accelerate_environment
from qwen3_sft.launch.agent import Agent, reported_code
from qwen3_sft.launch.choice import CONFIG, Choice, choose
from qwen3_sft.launch.cluster import Cluster, read_cluster
from qwen3_sft.launch.launch import DEMO, prepare_deepspeed, show_plan
from qwen3_sft.launch.port import require_free
from qwen3_sft.launch.quiet_agent import quiet
from qwen3_sft.options.command_line import read_options
from qwen3_sft.options.help_text import help_for
from qwen3_sft.options.variables import is_dry_run, named_launch_file
from qwen3_sft.records.secret_options import masked

logger = logging.getLogger(__name__)

# Without processes torchrun has this long to end; it needs under a second when it can end at all.
_LINGER_S = 20.0
# Nodes that succeeded wait for the others: torchrun's own limit is 300 s.
_FAREWELL_S = 400.0
_KILL_AFTER_S = 5.0
_POLL_S = 0.25


def run_node(argv: list[str]) -> int:
    """Run this node's part; return 0 done, 2 mistaken variables or options, 1 a failed run.

    75 says that a signal to any node has interrupted the run, which the same command goes on with.

    Args:
        argv: options of the run; without any it is the demo.
    """
    if text := help_for(argv):
        logger.info("%s", text)
        return DONE
    return exit_code_of(lambda: launch_node(argv or DEMO), logger.error)


def launch_node(argv: list[str]) -> int:
    """Start the processes of this node and wait for their end.

    Raises:
        UsageError: in variables or options; nothing was started.
    """
    is_dry = is_dry_run(os.environ)
    resume = read_options(argv).values["resume"]
    import torch

    gpus = torch.cuda.device_count()
    cluster = read_cluster(os.environ, gpus)
    _check_restarts(cluster, resume)
    choice = _choose(cluster, argv, gpus)
    changed = _launch_environment(cluster, choice)
    command = torchrun_command(cluster, [*argv, *choice.run_flags])
    for line in plan(cluster, choice):
        logger.info("%s", line)
    logger.info("command: %s", shlex.join(masked(command)))
    if is_dry:
        for name, value in sorted(changed.items()):
            logger.info("environment: %s=%s", name, value)
        sizes = {
            "WORLD_SIZE": str(cluster.processes),
            "LOCAL_WORLD_SIZE": str(cluster.processes_per_node),
        }
        return show_plan([*argv, *choice.run_flags], changed | sizes)
    if cluster.node_rank == 0:
        require_free(cluster.master_port, "MASTER_PORT")
    prepare_deepspeed(argv, choice)
    with tempfile.TemporaryDirectory() as folder:
        exit_file = Path(folder) / "exit_code"
        environment = {**os.environ, **changed, "QWEN3_SFT_EXIT_FILE": str(exit_file)}
        end = _watch(quiet(command), environment, cluster, exit_file)
    if end.code not in (DONE, MISTAKE, INTERRUPTED):
        logger.error("%s", _what_happened(cluster, end))
    return end.code


def torchrun_command(cluster: Cluster, argv: list[str]) -> list[str]:
    """Return torchrun's command line for this node."""
    if cluster.rdzv_backend == "static":
        flags = {"node-rank": cluster.node_rank}
        conf = {"timeout": cluster.rdzv_timeout_s}
    else:
        flags = {}  # it deals the ranks itself
        conf = {
            "is_host": int(cluster.node_rank == 0),  # by its name a node may not know that it is
            "join_timeout": cluster.rdzv_timeout_s,
            "read_timeout": cluster.rdzv_timeout_s,  # also how long node 0 is looked for
        }
    flags |= {
        "nnodes": cluster.nodes,
        "nproc-per-node": cluster.processes_per_node,
        "rdzv-backend": cluster.rdzv_backend,
        "rdzv-endpoint": cluster.endpoint,
        "rdzv-id": cluster.rdzv_id,
        "rdzv-conf": ",".join(f"{key}={value}" for key, value in conf.items()),
        "local-addr": cluster.local_addr,
        "max-restarts": cluster.max_restarts,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "torch.distributed.run", *words, "-m", "qwen3_sft.train", *argv]


def node_environment(cluster: Cluster) -> dict[str, str]:
    """Return the variables that this node's processes need besides accelerate's."""
    changed = {}
    if cluster.rdzv_backend == "c10d":
        # The shared store would still hold the addresses of processes that a restart has ended.
        changed["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # Gloo would take the interface of the host's name, which often resolves to loopback.
        for interface, addresses in psutil.net_if_addrs().items():
            if cluster.local_addr in (entry.address for entry in addresses):
                changed["GLOO_SOCKET_IFNAME"] = interface
    return changed


def plan(cluster: Cluster, choice: Choice) -> list[str]:
    """Return what is about to run, in words."""
    if cluster.max_restarts:
        failure = (
            f"up to {cluster.max_restarts} restarts of all nodes, each from the newest checkpoint "
            "of an --output_dir that all nodes see"
        )
    else:
        failure = "a failure ends the run on all nodes, and the same command resumes it"
    return [
        f"nodes {cluster.nodes} x processes per node {cluster.processes_per_node} = world size "
        f"{cluster.processes}; this is node {cluster.node_rank} at {cluster.local_addr}, node 0 is "
        f"at {cluster.endpoint}",
        f"rendezvous {cluster.rdzv_backend}, id {cluster.rdzv_id}, waits up to "
        f"{cluster.rdzv_timeout_s} s for all nodes; {failure}",
        f"launch file {choice.config} ({choice.reason})",
    ]


def _check_restarts(cluster: Cluster, resume: str) -> None:
    if cluster.max_restarts and resume != "auto":
        raise UsageError(
            f"--resume {resume} with MAX_RESTARTS={cluster.max_restarts}: a restarted run could "
            "not go on from its own checkpoint; leave --resume at auto, or set MAX_RESTARTS=0"
        )


def _choose(cluster: Cluster, argv: list[str], gpus: int) -> Choice:
    if named_launch_file(os.environ) is None and (not gpus or cluster.processes == 1):
        return Choice(CONFIG / "ddp.json", [], [], "one process" if gpus else "no GPU here")
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if gpus else None
    return choose(
        argv, gpus_per_node=cluster.processes_per_node, nodes=cluster.nodes, gpu_memory_gib=memory,
        environment=os.environ,
    )  # fmt: skip


def _launch_environment(cluster: Cluster, choice: Choice) -> dict[str, str]:
    """What accelerate's launcher would set for this choice, and what the node needs."""
    changed = accelerate_environment(str(choice.config), cluster.processes, cluster.nodes)
    flags = dict(zip(choice.accelerate_flags[::2], choice.accelerate_flags[1::2], strict=True))
    if deepspeed := flags.get("--deepspeed_config_file"):
        changed["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = deepspeed
    return changed | node_environment(cluster)


@dataclass(frozen=True)
class _End:
    """How a node's part ended: its exit code, the signal that asked for it, if we had to end it."""

    code: int
    signal: signal.Signals | None = None
    was_ended: bool = False


def _watch(
    command: list[str], environment: dict[str, str], cluster: Cluster, exit_file: Path
) -> _End:
    """Run torchrun to its end, or end it when it stays behind without processes."""
    # Before a restart the nodes may be waiting for one another.
    patience = _LINGER_S + (cluster.rdzv_timeout_s if cluster.max_restarts else 0)
    last_seen: float | None = None
    was_ended = False
    with Agent(command, environment) as agent:
        while agent.poll() is None:
            if agent.has_workers():
                last_seen = time.monotonic()
            alone = 0.0 if last_seen is None else time.monotonic() - last_seen
            is_well = reported_code(exit_file) in (DONE, INTERRUPTED)
            if alone > (_FAREWELL_S if is_well else patience):
                was_ended = True
                _stop(agent.process)
            else:
                agent.wait(_POLL_S)
    code = agent.exit_code(reported_code(exit_file))
    if was_ended and code == DONE:
        return _End(FAILED, was_ended=True)
    by = next((number for number in agent.signals if code == BY_SIGNAL + number), None)
    return _End(code, by, was_ended)


def _stop(agent: subprocess.Popen) -> None:
    agent.terminate()
    try:
        agent.wait(timeout=_KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.wait()


def _what_happened(cluster: Cluster, end: _End) -> str:
    first = cluster.node_rank * cluster.processes_per_node
    last = first + cluster.processes_per_node - 1
    ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
    if cluster.rdzv_backend == "c10d":  # ranks are dealt anew in each round
        ranks = f"its {cluster.processes_per_node} of {cluster.processes} ranks"
    who = f"node {cluster.node_rank} of {cluster.nodes} ({cluster.local_addr}, {ranks})"
    again = "start the same command on all nodes: it goes on from the newest checkpoint"
    if end.signal is not None:
        return f"{who} was stopped by {end.signal.name}; {again}"
    ended = " Its torchrun got no answer from the other nodes and was ended." * end.was_ended
    return (
        f"{who} failed with exit code {end.code}.{ended} The first error above says why. If it "
        "tells of a timeout or of a closed, reset or refused connection, another node was lost: "
        "read that node's log and check the network between the nodes (node 0 is at "
        f"{cluster.endpoint}). Then {again}."
    )
