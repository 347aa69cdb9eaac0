"""Adapters: every implementation in the race takes and returns what our op does.

    run(x_TD, gate_up_proj_E2FD, down_proj_EDF, top_k_index_TK, top_k_weights_TK) -> out_TD

A loader imports its package and returns `run`; what it raises is the reason why the table lacks a
time. Packages that are not installed are looked for in the folder that BENCH_PEERS names
(`bench/carry.sh` fills one); none of their code is kept here. `module:function` names any other
function of this signature, for variants under development.
"""

from __future__ import annotations

import importlib
import os
import site
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

FOLDER = "BENCH_PEERS"
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        load: imports what is needed and returns `run`.
        packages: distributions whose versions the result file records.
    """

    load: Callable[[], Run]
    packages: tuple[str, ...] = ()

    def versions(self) -> dict[str, str | None]:
        """Return the versions of `packages`, None where there is no record of one."""
        return {package: _version(package) for package in self.packages}


def find(name: str) -> Peer:
    """Return the peer of this name, or the one that `module:function` describes.

    Raises:
        ValueError: there is no such peer.
    """
    if folder := os.environ.get(FOLDER):
        _add_site(folder)
    module, _, function = name.partition(":")
    if function:
        return Peer(lambda: getattr(importlib.import_module(module), function))
    if name not in PEERS:
        raise ValueError(f"no peer {name!r}: choose from {', '.join(PEERS)} or module:function")
    return PEERS[name]


def _add_site(folder: str) -> None:
    before = set(sys.path)
    # Unlike a folder on PYTHONPATH, this one's .pth files count (nvidia-cutlass-dsl has one).
    site.addsitedir(folder)
    added = [path for path in sys.path if path not in before]
    # For quack, which compiles its candidates in processes that it starts.
    paths = (os.environ.get("PYTHONPATH", ""), *added)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _ours() -> Run:
    from monkey_patch.kernels.scatter_moe import scatter_moe

    return scatter_moe


def _ours_recompute() -> Run:
    from monkey_patch.kernels.scatter_moe import scatter_moe

    return lambda *tensors: scatter_moe(*tensors, recompute_hidden=True)


def _grouped_mm() -> Run:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return _on_module(grouped_mm_experts_forward)


def _grouped_mm_compiled() -> Run:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return _on_module(torch.compile(grouped_mm_experts_forward))


def _on_module(forward: Callable[..., torch.Tensor]) -> Run:
    """Make a `run` of one of transformers' experts functions, which take a module."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    with torch.device("meta"):
        experts = Qwen3MoeExperts(Qwen3MoeConfig(num_experts=1))

    def run(x_TD: Any, gate_up_proj_E2FD: Any, down_proj_EDF: Any, index: Any, weights: Any) -> Any:
        experts.num_experts = len(down_proj_EDF)
        experts.gate_up_proj, experts.down_proj = gate_up_proj_E2FD, down_proj_EDF
        return forward(experts, x_TD, index, weights)

    return run


def _liger() -> Run:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def run(x_TD: Any, gate_up_proj_E2FD: Any, down_proj_EDF: Any, index: Any, weights: Any) -> Any:
        index = index.to(torch.int32)
        return LigerFusedMoEFunction.apply(x_TD, gate_up_proj_E2FD, down_proj_EDF, index, weights)

    return run


def _scattermoe() -> Run:
    """Upstream's GLUMLP on our layout: gate before up, parameters given instead of owned."""
    scattermoe: Any = importlib.import_module("scattermoe")

    def run(x_TD: Any, gate_up_proj_E2FD: Any, down_proj_EDF: Any, index: Any, weights: Any) -> Any:
        rows = scattermoe.flatten_sort_count(index, num_experts=len(down_proj_EDF))
        first, second = (w.permute(0, 2, 1) for w in (gate_up_proj_E2FD, down_proj_EDF))
        hidden_N2F = scattermoe.parallel_linear(
            x_TD, first, index.shape[1], *rows, grouped_out=True
        )
        gate_NF, up_NF = hidden_N2F.chunk(2, dim=-1)
        act_NF = torch.nn.functional.silu(gate_NF) * up_NF
        return scattermoe.parallel_linear(act_NF, second, 1, *rows, grouped_in=True, gates=weights)

    return run


def _sonicmoe() -> Run:
    """SonicMoE's layer after its router, with a fixed K, its fastest path.

    transformers calls `moe_general_routing_inputs` instead, which allows a K per token.
    """
    layer: Any = importlib.import_module("sonicmoe.functional")
    swiglu = layer.ActivationType.SWIGLU

    def run(x_TD: Any, gate_up_proj_E2FD: Any, down_proj_EDF: Any, index: Any, weights: Any) -> Any:
        (tokens, top_k), experts = index.shape, len(down_proj_EDF)
        rows = tokens * top_k
        sizes = (experts, experts + 1, rows, rows, rows)
        count_E, offsets, gather_N, scatter_N, reverse_N = (
            torch.empty(size, dtype=torch.int32, device=x_TD.device) for size in sizes
        )
        layer.TC_topk_router_metadata_triton(
            index.to(torch.int32), experts, count_E, offsets, gather_N, scatter_N, reverse_N
        )
        act_NF, hidden_N2F = layer._UpProjection.apply(
            x_TD, gate_up_proj_E2FD.permute(1, 2, 0), None, offsets, rows, top_k, gather_N,
            scatter_N, reverse_N, None, False, swiglu, False, True,
        )  # fmt: skip
        return layer._DownProjection.apply(
            act_NF, hidden_N2F, down_proj_EDF.permute(1, 2, 0), None, weights.float(), offsets,
            tokens, top_k, gather_N, scatter_N, reverse_N, None, False, swiglu,
        )  # fmt: skip

    return run


PEERS = {
    "ours": Peer(_ours),
    "ours_recompute": Peer(_ours_recompute),
    "grouped_mm": Peer(_grouped_mm, ("transformers",)),
    "sonicmoe": Peer(_sonicmoe, ("sonic-moe", "quack-kernels", "nvidia-cutlass-dsl")),
    "liger": Peer(_liger, ("liger-kernel",)),
    "scattermoe": Peer(_scattermoe, ("scattermoe",)),
    "grouped_mm_compiled": Peer(_grouped_mm_compiled, ("transformers",)),
}
