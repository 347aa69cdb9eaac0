"""Which launch file and which sharding a run gets if its user does not say.

One GPU needs no engine. On several, copies of the whole model (DDP) are the fastest as long as
weights, gradients and optimizer leave room for activations. Beyond that the model is sharded
natively over one node's GPUs; several nodes hold a copy each if it fits (HSDP: gradients alone
cross the network), else one over all. Experts are not spread (`ep_size` stays 1): README says why.

The launcher of a single process decides without torch or transformers, hence the late imports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import qwen3_sft
from qwen3_sft.errors import UsageError
from qwen3_sft.options.paths import expanded
from qwen3_sft.options.recipe_file import read_recipe
from qwen3_sft.options.variables import named_launch_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from qwen3_sft.options.recipe import Options

CONFIG = Path(qwen3_sft.__file__).parent.parent / "config"
SINGLE = CONFIG / "single.json"

# Share of a GPU that weights, gradients and optimizer may take, so that activations fit.
MARGIN = 0.6
_SIZES = ("fsdp_size", "ep_size", "dp_replicate_size")
_ASSUMED = "Qwen/Qwen3-30B-A3B"


@dataclass(frozen=True)
class Choice:
    """How to start a run.

    Attributes:
        config: the launch file for accelerate.
        accelerate_flags: options of `accelerate launch` beside it.
        run_flags: options of the run itself, to append to the user's.
        reason: in words, for the log.
    """

    config: Path
    accelerate_flags: list[str]
    run_flags: list[str]
    reason: str


def choose(
    options_argv: list[str],
    *,
    gpus_per_node: int,
    nodes: int = 1,
    gpu_memory_gib: float | None,
    environment: Mapping[str, str],
    needs_data: bool = True,
) -> Choice:
    """Choose the launch file and the sharding sizes.

    Args:
        options_argv: the options of the run.
        gpus_per_node: GPUs to use on each node; 0 without CUDA.
        nodes: machines.
        gpu_memory_gib: of one GPU; None if unknown, which shards.
        environment: ACCELERATE_CONFIG in it wins over everything.
        needs_data: whether a missing dataset is an error.

    Raises:
        UsageError: the options are wrong, or a file that is named does not exist.
    """
    if named := named_launch_file(environment):
        named = expanded(named, "ACCELERATE_CONFIG")
        deepspeed = deepspeed_file(named)
        flags = ["--deepspeed_config_file", str(deepspeed)] if deepspeed else []
        if gpus_per_node and _is_shipped_for_several(Path(named)):
            flags += ["--num_processes", str(gpus_per_node * nodes)]
        return Choice(Path(named), flags, [], "as ACCELERATE_CONFIG says")
    world_size = gpus_per_node * nodes
    if world_size <= 1:
        return Choice(SINGLE, [], [], "one GPU" if world_size else "no GPU")
    from qwen3_sft.options.recipe import parse_options

    options = parse_options(options_argv, needs_data=needs_data)
    if own := _own_sizes(options_argv, options):
        run_flags, reason = [], f"{world_size} GPUs, {' and '.join(own)} as the options say"
    else:
        run_flags, reason = _sharding(options, gpus_per_node, nodes, gpu_memory_gib)
    return Choice(CONFIG / "ddp.json", ["--num_processes", str(world_size)], run_flags, reason)


def _is_shipped_for_several(launch_file: Path) -> bool:
    """Whether the number of processes in a file is our guess of eight, not its owner's choice."""
    is_ours = launch_file.resolve().parent == CONFIG.resolve()
    config = read_launch_file(launch_file)
    return is_ours and config["distributed_type"] != "NO" and config["num_machines"] == 1


def deepspeed_file(launch_file: str | Path) -> Path | None:
    """Return the DeepSpeed file that a launch file names, from any working directory.

    Raises:
        UsageError: one of the two does not exist.
    """
    launch_file = Path(launch_file)
    if not launch_file.is_file():
        raise UsageError(f"launch file {launch_file}: no such file")
    named = (read_launch_file(launch_file).get("deepspeed_config") or {}).get(
        "deepspeed_config_file"
    )
    if not named:
        return None
    folders = (Path.cwd(), launch_file.resolve().parent, launch_file.resolve().parent.parent)
    for folder in folders:
        if (folder / named).is_file():
            return (folder / named).resolve()
    raise UsageError(
        f"{launch_file}: deepspeed_config_file {named} is in none of {', '.join(map(str, folders))}"
    )


def launch_environment(choice: Choice) -> dict[str, str]:
    """Return the variables that the processes would find, as far as they tell the engine.

    Raises:
        UsageError: accelerate cannot use the launch file.
    """
    from qwen3_sft.launch.accelerate_environment import accelerate_environment

    config, flags = read_launch_file(choice.config), choice.accelerate_flags
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    if config.get("distributed_type", "NO") == "NO":
        return {}
    processes = int(given.get("--num_processes") or config.get("num_processes") or 1)
    nodes = int(config.get("num_machines") or 1)
    env = accelerate_environment(str(choice.config), processes, nodes)
    if deepspeed := given.get("--deepspeed_config_file"):
        env["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = deepspeed
    return {**env, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes // nodes)}


def read_launch_file(path: Path) -> dict[str, Any]:
    """Return the content of a launch file, JSON or YAML.

    Raises:
        UsageError: it cannot be read, or is neither.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"launch file {path}: cannot be read: {error}") from error
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise UsageError(f"launch file {path}: not one of accelerate's, see config/*.json")
    return content


def _own_sizes(argv: list[str], options: Options) -> list[str]:
    """Return the sharding sizes that the command line or the recipe sets, to any value."""
    entries = read_recipe(Path(options.recipe), ()) if options.recipe else []
    keys = {entry.name for entry in entries}
    keys |= {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    return [f"--{name}" for name in _SIZES if name in keys]


def _sharding(
    options: Options, gpus: int, nodes: int, gpu_memory_gib: float | None
) -> tuple[list[str], str]:
    from qwen3_sft.decisions import Machine, decide
    from qwen3_sft.plan.plan import Gpu

    model, assumption = planned_model(options)
    limit = MARGIN * (gpu_memory_gib or 0)
    machine = Machine(Gpu("GPU", gpu_memory_gib) if gpu_memory_gib else None)
    processes = {"WORLD_SIZE": str(gpus * nodes), "LOCAL_WORLD_SIZE": str(gpus)}

    def gib(**sizes: int) -> float:
        """What weights, gradients and states take on each GPU with these sizes."""
        plan = decide(options.replaced(**sizes), model, machine, processes).plan
        return plan.memory.gpu_gib

    copies = gib()
    room = "memory of a GPU unknown"
    if gpu_memory_gib:
        room = f"{100 * MARGIN:.0f}% of a GPU with {gpu_memory_gib:.1f} GiB is {limit:.1f} GiB"
    need = f"{assumption}a whole copy takes {copies:.1f} GiB, {room}"
    if copies <= limit:
        return [], f"{need}: one copy on each of {gpus * nodes} GPUs (DDP)"
    if nodes > 1:
        hybrid = gib(dp_replicate_size=nodes, fsdp_size=gpus)
        if hybrid <= limit:
            sizes = ["--dp_replicate_size", str(nodes), "--fsdp_size", str(gpus)]
            return sizes, (
                f"{need}; shards of {hybrid:.1f} GiB over {gpus} GPUs and {nodes} copies, "
                "one on each node (HSDP)"
            )
    flat = gib(fsdp_size=-1)
    words = f"{need}; shards of {flat:.1f} GiB over {gpus * nodes} GPUs (native FSDP2)"
    if gpu_memory_gib and flat > gpu_memory_gib:
        words += "; they do not fit either: try ACCELERATE_CONFIG=config/zero3_offload.json"
    return ["--fsdp_size", "-1"], words


def planned_model(options: Options) -> tuple[PreTrainedModel, str]:
    """Return the model on the meta device without any download, and what had to be assumed.

    Raises:
        ModelError: the model is not one that is trained.
    """
    from qwen3_sft.families.family import require, require_by_name
    from qwen3_sft.model.meta_model import known_config, meta_model, model_on_meta

    name, revision = options.model.model_name_or_path, options.model.model_revision
    if Path(name).is_dir():
        return meta_model(name), ""
    if config := known_config(name) or _local_config(name, revision):
        require("train", config, name)
        return model_on_meta(config), ""
    require_by_name("train", name)
    assumed = known_config(_ASSUMED)
    assert assumed is not None, _ASSUMED
    return model_on_meta(assumed), f"{name} is not here yet, taken to be as large as {_ASSUMED}: "


def _local_config(name: str, revision: str | None) -> PretrainedConfig | None:
    from transformers import AutoConfig

    from qwen3_sft.model.trust import refuse_hub_code

    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, local_files_only=True, trust_remote_code=False
        )
        refuse_hub_code(config, name)
        return config
    except (OSError, ValueError):  # the run itself says what is wrong with the name
        return None
