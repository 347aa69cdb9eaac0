"""The port at which the processes of a run meet: chosen on one machine, named between several."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from qwen3_sft.errors import UsageError


def port_flags(launch_file: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Return the flags of `accelerate launch` that name the port on one machine.

    MASTER_PORT wins, then a port in the launch file; else accelerate takes a free one, so that
    two runs on one machine do not meet.

    Args:
        launch_file: its content.
        environment: of the launcher.

    Raises:
        UsageError: the port is in use.
    """
    if (launch_file.get("num_machines") or 1) > 1:
        return []
    if named := environment.get("MASTER_PORT"):
        require_free(int(named), "MASTER_PORT")
        return ["--main_process_port", named]
    if in_file := launch_file.get("main_process_port"):
        require_free(int(in_file), "main_process_port of the launch file")
        return []
    return ["--main_process_port", "0"]


def require_free(port: int, name: str) -> None:
    """Refuse a port of this machine that somebody listens at.

    Args:
        port: of all addresses of this machine.
        name: what sets it.

    Raises:
        UsageError: naming what to set.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UsageError(
                f"{name} {port} cannot be used on this machine ({error.strerror}): set another "
                f"{name}, or leave it out"
            ) from error
