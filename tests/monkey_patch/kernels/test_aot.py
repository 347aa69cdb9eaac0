"""Ahead-of-time compilation, in processes of their own: the suite's process interprets kernels.

`python -m tests.monkey_patch.kernels.test_aot SCENARIO ...` prints the JSON that the tests judge.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import _async_compile, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from monkey_patch.kernels import aot
from monkey_patch.kernels.launch import Launch
from tests.support.compiler import run_compiling

pytestmark = pytest.mark.kernel

ROWS, DEPTH, COLUMNS = 1024, 512, 128
BF16 = torch.bfloat16


@triton.jit(do_not_specialize=["rows"])
def _matmul_kernel(
    x,
    weight,
    out_ptr,
    factor_ptr,
    rows,
    stride_x,
    scale,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M
    offs_m, offs_n = first_row + tl.arange(0, BLOCK_M), tl.arange(0, COLUMNS)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m[:, None] < rows
    acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        if TMA:
            acc = tl.dot(x.load([first_row, k]), weight.load([k, 0]), acc)
        else:
            x_ptrs = x + offs_m[:, None] * stride_x + offs_k[None, :] + k
            w_ptrs = weight + (offs_k[:, None] + k) * COLUMNS + offs_n[None, :]
            acc = tl.dot(tl.load(x_ptrs, mask=mask_m, other=0.0), tl.load(w_ptrs), acc)
    if factor_ptr is not None:
        acc *= tl.load(factor_ptr)
    out = (acc * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * COLUMNS + offs_n[None, :], out, mask=mask_m)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < size), mask=offs < size)


def matmul_launch(*, tma: bool = False, device: str = "meta", **changes: Any) -> Launch:
    x: Any = torch.empty(ROWS, DEPTH, dtype=BF16, device=device)
    weight: Any = torch.empty(DEPTH, COLUMNS, dtype=BF16, device=device)
    arguments = {
        "x": TensorDescriptor.from_tensor(x, [128, 64]) if tma else x,
        "weight": TensorDescriptor.from_tensor(weight, [64, COLUMNS]) if tma else weight,
        "out_ptr": torch.empty(ROWS, COLUMNS, dtype=BF16, device=device),
        "factor_ptr": None,
        "rows": ROWS,
        "stride_x": DEPTH,
        "scale": 0.5,
        "DEPTH": DEPTH,
        "COLUMNS": COLUMNS,
        "TMA": tma,
        "BLOCK_M": 128,
        "BLOCK_K": 64,
    }
    return Launch(_matmul_kernel, ROWS // 128, arguments | changes, num_warps=8, num_stages=3)


def copy_launch(device: str = "meta", *, size: int = 1 << 20, offset: int = 0) -> Launch:
    x = torch.empty(size + 16, dtype=BF16, device=device)
    arguments = {"x_ptr": x[offset:], "out_ptr": torch.empty_like(x), "size": size, "BLOCK": 1024}
    return Launch(_copy_kernel, triton.cdiv(size, 1024), arguments)


def run(*scenarios: str, folder: Any, **environment: str) -> dict[str, Any]:
    words = ("-m", "tests.monkey_patch.kernels.test_aot", *scenarios)
    return json.loads(run_compiling(*words, cache=folder, **environment))


def signatures() -> Any:
    def seen(launch: Launch) -> Any:
        compiled = aot.compile_for(launch, "sm_90")
        names = launch.kernel.arg_names
        types = {k: v for k, v in compiled.src.signature.items() if not k.isupper()}
        aligned = [names[i] for (i,), attr in compiled.src.attrs.items() if attr]
        constants = {names[i]: v for (i,), v in compiled.src.constants.items()}
        constants = {k: v for k, v in constants.items() if not k.isupper()}
        return {"types": types, "aligned": aligned, "constants": constants, "hash": compiled.hash}

    return {
        "meta": seen(matmul_launch()),
        "real": seen(matmul_launch(device="cpu")),
        "meta descriptors": seen(matmul_launch(tma=True)),
        "real descriptors": seen(matmul_launch(tma=True, device="cpu")),
        "factor": seen(matmul_launch(factor_ptr=torch.empty(1, device="meta"))),
        "odd stride": seen(matmul_launch(stride_x=DEPTH - 1)),
        "unit stride": seen(matmul_launch(stride_x=1)),
        "one row": seen(matmul_launch(rows=1)),
        "large": seen(copy_launch(size=(1 << 31) + 1)),
        "unaligned": seen(copy_launch("cpu", offset=1)),
    }


def resources() -> Any:
    launches = {
        "pointers": matmul_launch(),
        "descriptors": matmul_launch(tma=True),
        "copy": copy_launch(),
    }
    only_hopper = {
        "two warps": replace(matmul_launch(), num_warps=2),
        "eight stages": replace(matmul_launch(), num_stages=8),
        "odd stride": matmul_launch(stride_x=DEPTH - 1),
    }
    found = {}
    for target in aot.TARGETS:
        here = launches | (only_hopper if target == "sm_90" else {})
        aot.compile_all(list(here.values()), target)
        found[target] = {k: asdict(aot.compile_ahead(v, target)) for k, v in here.items()}
    return found


def parallel() -> Any:
    compiled: list[bool] = []
    knobs.compilation.listener = lambda **event: compiled.append(event["cache_hit"])
    broken, good = matmul_launch(BLOCK_K=48), [copy_launch(), matmul_launch(), copy_launch()]
    message, notes = "", []
    try:
        aot.compile_all([broken, *good], "sm_90")
    except triton.CompilationError as error:
        message, notes = str(error), error.__notes__
    first, compiled[:] = list(compiled), []
    for launch in good:
        aot.compile_for(launch, "sm_90")
    again, compiled[:] = list(compiled), []
    _copy_kernel.device_caches.clear()
    hashes = [aot.compile_for(launch, "sm_90").hash for launch in good]
    return {
        "message": message,
        "notes": notes,
        "compiled": first,
        "compiled again": again,
        "found on disk": list(compiled),
        "hashes": hashes,
        "seconds": aot.compile_all(good, "sm_90"),
        "mode": repr(_async_compile.active_mode.get()),
        "driver": repr(vars(driver)["_active"]),
    }


def errors() -> Any:
    def message(launch: Launch, target: str = "sm_90") -> str:
        try:
            aot.compile_ahead(launch, target)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    tuned = triton.autotune([triton.Config({})], key=[])(_copy_kernel)
    found = {
        "target": message(copy_launch(), "sm_75"),
        "kind": message(replace(copy_launch(), kernel=tuned)),
    }
    for name in ("nvdisasm", "cuobjdump", "ptxas"):
        vars(type(knobs.nvidia))[name].default_path = "/nowhere"
        found[name] = message(copy_launch())
    return found


def on_the_device() -> Any:
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    found: list[bool] = []
    knobs.compilation.listener = lambda **event: found.append(event["cache_hit"])
    aot.compile_all([matmul_launch(), copy_launch()], target)
    launches = [matmul_launch(device="cuda"), copy_launch("cuda")]
    aot.compile_all(launches)
    for launch in launches:
        launch.run()
    torch.cuda.synchronize()
    return found


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """Answers by scenario: the first wants an empty cache, the last one breaks the tools."""
    names = ("parallel", "signatures", "resources", "errors")
    return run(*names, folder=tmp_path_factory.mktemp("cache"))


def test_the_signature_is_the_one_of_a_launch(scenarios):
    plain = (found := scenarios["signatures"])["meta"]
    pointer, whole, fraction = "*bf16", "i32", "fp32"
    assert plain["types"] == {
        "x": pointer, "weight": pointer, "out_ptr": pointer, "factor_ptr": "constexpr",
        "rows": whole, "stride_x": whole, "scale": fraction,
    }  # fmt: skip
    assert plain["aligned"] == ["x", "weight", "out_ptr", "stride_x"]
    assert plain["constants"] == {"factor_ptr": None}
    described = found["meta descriptors"]
    assert described["types"]["x"].replace(" ", "") == "tensordesc<bf16[128,64]>"
    assert described["aligned"] == ["out_ptr", "stride_x"]
    assert found["factor"]["types"]["factor_ptr"] == "*fp32"
    assert found["odd stride"]["aligned"] == ["x", "weight", "out_ptr"]
    assert found["unit stride"]["constants"] == {"factor_ptr": None, "stride_x": 1}
    assert found["one row"]["hash"] == plain["hash"], "rows is not to be specialised"
    assert found["large"]["types"]["size"] == "i64"
    assert found["unaligned"]["aligned"] == ["out_ptr", "size"]
    assert found["real"] == plain, "meta tensors stand for real ones"
    assert found["real descriptors"] == described


def test_resources_tell_what_the_machine_code_does(scenarios):
    compiled = scenarios["resources"]
    tensor_cores = {"sm_90": "wgmma", "sm_100": "tcgen05"}
    for target, kernels in compiled.items():
        used = {k for k in ("wgmma", "tcgen05", "mma_sync") if kernels["pointers"][k]}
        assert used == {tensor_cores.get(target, "mma_sync")}, target
        assert kernels["pointers"]["cp_async"] > 0 == kernels["pointers"]["tma_loads"], target
        has_tma = int(target.removeprefix("sm_")) >= 90
        assert (kernels["descriptors"]["tma_loads"] > 0) == has_tma, target
        assert kernels["copy"]["spill_bytes"] == 0, target
        assert not any(kernels["copy"][k] for k in ("wgmma", "tcgen05", "mma_sync")), target
    hopper = compiled["sm_90"]
    assert hopper["pointers"]["spill_bytes"] == 0
    # 128 x 128 accumulators over 64 threads are 256 registers each; a thread has at most 255.
    assert min(hopper["two warps"][k] for k in ("spill_bytes", "spill_stores", "spill_loads")) > 0
    assert hopper["odd stride"]["cp_async"] < hopper["pointers"]["cp_async"]


def test_programs_per_multiprocessor(scenarios):
    compiled = scenarios["resources"]
    # Four warps with few registers: 2048 (1536) threads are 16 (12) times as many.
    copies = {target: kernels["copy"]["programs_per_sm"] for target, kernels in compiled.items()}
    assert copies == {"sm_80": 16, "sm_89": 12, "sm_90": 16, "sm_100": 16, "sm_120": 12}
    hopper = compiled["sm_90"]
    # Three stages of (128 x 64 + 64 x 128) bfloat16 are 96 KiB of 228, eight are 256.
    assert hopper["pointers"]["shared_bytes"] == 3 * 2 * 128 * 64 * 2
    assert hopper["pointers"]["programs_per_sm"] == 2
    assert hopper["eight stages"]["programs_per_sm"] == 0
    # Shared memory would do for three; 65,536 registers do not for two.
    assert (odd := hopper["odd stride"])["shared_bytes"] < 228 * 1024 // 3
    assert 2 * odd["registers"] * 256 > 65536
    assert odd["programs_per_sm"] == 1


def test_many_at_once(scenarios):
    found = scenarios["parallel"]
    assert "BLOCK_K" in found["notes"][0], "the note names kernel and shape"
    assert "matmul_kernel for sm_90" in found["notes"][0]
    assert found["compiled"] == [False, False], "each signature once, in spite of the broken kernel"
    assert found["compiled again"] == []
    assert found["found on disk"] == [True]
    assert found["hashes"][0] == found["hashes"][2] != found["hashes"][1]
    assert found["seconds"] < 1
    assert (found["mode"], found["driver"]) == ("None", "None"), "nothing stays switched on"


def test_errors_say_what_is_missing(scenarios):
    found = scenarios["errors"]
    assert found["target"].startswith("ValueError: unknown target 'sm_75': choose from sm_80,")
    assert found["kind"].startswith("TypeError: copy_kernel: a triton.jit function is needed")
    for tool in ("ptxas", "cuobjdump", "nvdisasm"):
        assert f"lacks {tool}" in found[tool]
        assert f"TRITON_{tool.upper()}_PATH" in found[tool]


def test_an_interpreting_process_is_told(tmp_path):
    told = run("errors", folder=tmp_path, TRITON_INTERPRET="1")["errors"]["target"]
    assert told.startswith("RuntimeError: copy_kernel cannot be compiled: Triton was")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_launch_finds_what_was_compiled_ahead(tmp_path):
    assert run("on_the_device", folder=tmp_path) == {"on_the_device": [False, False, True, True]}


if __name__ == "__main__":
    json.dump({name: globals()[name]() for name in sys.argv[1:]}, sys.stdout)
