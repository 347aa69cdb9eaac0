"""What we rely on below the public surface of torch, transformers, accelerate and DeepSpeed.

Each failure names the file of ours that has to be looked at after an update.
"""

import ast
import inspect
import math
import resource
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import launch as accelerate_helpers
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.core_model_loading import revert_weight_conversion
from transformers.distributed import checkpoint as hf_checkpoint
from transformers.distributed import expert_parallel
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation import GenerationMixin
from transformers.initialization import no_init_weights

from monkey_patch.core import class_name
from qwen3_sft.checkpoints.write import _cause
from qwen3_sft.training.trainer import SftTrainer
from tests.support.source_tree import ROOT, place, project_files, tree_of

SIGNATURES = {
    hf_checkpoint._redistribute_state_dict: ("state_dict", "reference_state_dict"),
    hf_checkpoint._load_model_checkpoint_distributed: ("model", "checkpoint_dir", "strict"),
    hf_checkpoint.load_optimizer_distributed: ("model", "optimizer", "checkpoint_dir"),
    accelerate_launch._validate_launch_command: ("args",),
    accelerate_launch.launch_command_parser: ("subparsers",),
    accelerate_helpers.prepare_deepspeed_cmd_env: ("args",),
    accelerate_helpers.prepare_multi_gpu_env: ("args",),
    revert_weight_conversion: ("model", "state_dict"),
}
USED_BY = {
    hf_checkpoint.__name__: "qwen3_sft/checkpoints/sharded.py",
    accelerate_launch.__name__: "qwen3_sft/launch/accelerate_environment.py",
    accelerate_helpers.__name__: "qwen3_sft/launch/accelerate_environment.py",
    revert_weight_conversion.__module__: "qwen3_sft/checkpoints/hub_writer.py",
}
# What of the Trainer is overridden or private and called, and its parameters.
TRAINER = {
    "_save_checkpoint": ("model", "trial"),
    "_get_output_dir": ("trial",),
    "save_model": ("output_dir", "_internal_call"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_save_rng_state": ("output_dir",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_best_model": (),
    "_run_epoch": (
        "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch",
        "trial", "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "get_optimizer_cls_and_kwargs": ("args", "model"),
    "create_optimizer": ("model",),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "floating_point_ops": ("inputs",),
    "_get_grad_norm": ("model", "grad_norm"),
    "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
    "log": ("logs", "start_time"),
    "_inner_training_loop": (
        "batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval",
    ),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "_get_dataloader": (
        "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key",
    ),
    "_determine_best_metric": ("metrics", "trial"),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
    "_prepare_inputs": ("inputs",),
    "_defer_fsdp_gradient_reduction": (),
}  # fmt: skip
TRAINER_FILE = ROOT / "qwen3_sft" / "training" / "trainer.py"


def overridden() -> dict[str, str]:
    """What SftTrainer puts in the place of a Trainer's own, and where."""
    names = {n for n in vars(SftTrainer) if hasattr(Trainer, n) and not n.startswith("__")}
    return dict.fromkeys(names, place(TRAINER_FILE))


def called() -> dict[str, str]:
    """The Trainer's private methods that our code uses, and where."""
    found = {}
    for path in project_files(".py"):
        if path.relative_to(ROOT).parts[0] not in ("qwen3_sft", "bench"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and is_trainer(node.value, path):
                is_private = node.attr.startswith("_") and not node.attr.startswith("__")
                if is_private and callable(getattr(Trainer, node.attr, None)):
                    found[node.attr] = place(path, node)
    return found


def is_trainer(value: ast.expr, path: Path) -> bool:
    """Tell an expression for a trainer: `trainer`, `self.trainer`, in its own file `self`."""
    own = ("self", "super()", "Trainer") if path == TRAINER_FILE else ()
    return ast.unparse(value) in ("trainer", "self.trainer", "self._trainer", *own)


def parameters(function) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


@pytest.fixture
def one_process():
    """A process group of one, so that FSDP2 runs for real in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_private_functions_take_what_we_pass(function):
    assert parameters(function) == SIGNATURES[function], USED_BY[function.__module__]


@pytest.mark.parametrize("name", TRAINER)
def test_trainer_methods_are_called_as_they_were(name):
    where = (called() | overridden())[name]
    assert parameters(getattr(Trainer, name)) == TRAINER[name], f"{where}: {name}"


def test_every_override_and_every_private_method_is_listed_here():
    assert set(overridden() | called()) == set(TRAINER)
    # One that upstream takes away would be neither.
    ours = {name for name in vars(SftTrainer) if name.startswith("_") and name[1] != "_"}
    assert ours - set(overridden()) == set()


def test_trainer_still_refuses_to_resume_a_natively_sharded_model():
    source = inspect.getsource(Trainer.__init__)
    guard, refusal, _ = source.partition("Resuming is not supported for models sharded at load")
    file = "qwen3_sft/checkpoints/save.py: let_sharded_models_save is not needed any more"
    assert refusal, file
    assert "not args.save_only_model" in guard[-300:], file


def test_trainer_still_keeps_a_nan_in_its_running_loss():
    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert "tr_loss -= tr_loss" in source, (
        "qwen3_sft/training/trainer.py: log() need not reset _tr_loss"
    )
    nan = torch.tensor(math.nan)
    assert (nan - nan).isnan()


def test_deepspeeds_norm_is_read_where_a_skipped_step_is_found():
    source = inspect.getsource(Trainer._run_epoch)
    clip, norm, step = (
        source.index(text) for text in ("_clip_grad_norm(", "_get_grad_norm(", "optimizer.step()")
    )
    assert clip < norm < step, (
        "qwen3_sft/training/trainer.py: _get_grad_norm is not the last stop any more"
    )


def test_expert_parallelism_marks_what_it_hooks():
    source = inspect.getsource(expert_parallel)
    assert "module._is_hooked = True" in source, "monkey_patch/scatter_moe.py: _unsupported"


def test_fsdp2_subclasses_the_module_and_marks_it(one_process):
    class Router(nn.Linear):
        pass

    module = Router(4, 4)
    fully_shard(module)
    assert isinstance(module, FSDPModule)
    assert type(module).__name__ == "FSDPRouter", "qwen3_sft/export/export.py: _write_config"
    assert type(module).__mro__[2] is Router, "monkey_patch/core.py: class_name"
    assert class_name(module) == "Router"
    assert type(module).forward is nn.Linear.forward, "monkey_patch/linear_cross_entropy.py"
    assert isinstance(module.weight, DTensor), "qwen3_sft/checkpoints/state_tensors.py: local_part"
    assert is_fsdp_managed_module(module), (
        "qwen3_sft/training/completions.py: ranks may stop generating at different tokens"
    )


def test_generate_keeps_sharded_ranks_in_step():
    source = inspect.getsource(GenerationMixin._extract_generation_mode_kwargs)
    assert "is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self)" in source, (
        "qwen3_sft/training/completions.py: complete() has to pass synced_gpus itself"
    )


def test_groups_created_without_a_timeout_get_torchs_default(monkeypatch):
    timeout = timedelta(seconds=123)
    monkeypatch.setattr(distributed_c10d, "default_pg_timeout", timeout)
    found = distributed_c10d._get_default_timeout(dist.Backend("gloo"))
    assert found == timeout, "qwen3_sft/distributed/process_group.py: join_process_group"
    monkeypatch.setattr(distributed_c10d, "default_pg_nccl_timeout", timeout)
    found = distributed_c10d._get_default_timeout(dist.Backend("nccl"))
    assert found == timeout, "qwen3_sft/distributed/process_group.py: join_process_group"


def test_one_tensor_is_converted_without_the_others(tiny_moe):
    whole = revert_weight_conversion(tiny_moe, dict(tiny_moe.state_dict()))
    parts = {}
    for name, tensor in tiny_moe.state_dict().items():
        parts |= revert_weight_conversion(tiny_moe, {name: tensor})
    assert parts.keys() == whole.keys(), "qwen3_sft/checkpoints/hub_writer.py: HubWriter.add"
    assert all(parts[name].equal(whole[name]) for name in whole)


def test_no_init_weights_leaves_the_generator_alone(tiny_moe):
    before = torch.get_rng_state()
    with no_init_weights():
        type(tiny_moe)(tiny_moe.config)
    changed = not torch.get_rng_state().equal(before)
    assert not changed, "qwen3_sft/checkpoints/whole.py: weights are drawn to be overwritten"


def test_safetensors_of_shards_are_written_and_read_as_we_ask():
    writer = parameters(HuggingFaceStorageWriter.__init__)
    assert {"path", "save_distributed", "enable_consolidation"} <= {*writer}, (
        "qwen3_sft/checkpoints/sharded.py: save_weights"
    )
    default = inspect.signature(HuggingFaceStorageWriter.__init__).parameters
    assert default["enable_consolidation"].default is False
    assert "read_metadata" in dir(HuggingFaceStorageReader), "checkpoints/sharded.py: saved_names"


def test_torchs_distributed_checkpoint_tells_what_failed():
    error = OSError(28, "No space left on device")
    failed = CheckpointException("", {1: (error, None)})
    assert _cause(failed) is error, "qwen3_sft/checkpoints/write.py: _cause"


def test_a_full_disk_is_told_by_the_name_of_torchs_writer(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="inline_container"):
            torch.save({"a": torch.zeros(10_000)}, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_deepspeeds_units_are_computed_by_functions_that_are_still_there():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    file = "qwen3_sft/plan/zero3_units.py"
    preorder = DeepSpeedZeRoOffload._set_leaf_by_threshold_preorder
    assert len(parameters(preorder)) == 2, file
    assert len(parameters(DeepSpeedZeRoOffload._get_granularity_recursively)) == 1, file
    assert parameters(apply_zero_leaf_module_config)[:2] == ("model", "leaf_cfg"), file
    config = DeepSpeedZeroConfig(stage=3, leaf_module={"classes": ["A"]})
    assert config.leaf_module.classes == ["A"], file
    assert config.module_granularity_threshold == 0, file
    first = parameters(get_fp32_state_dict_from_zero_checkpoint)[0]
    assert first == "checkpoint_dir", "qwen3_sft/checkpoints/whole.py"


def test_deepspeed_tells_a_skipped_step_by_an_infinite_norm():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for kind in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        source = inspect.getsource(kind)
        assert '_global_grad_norm = float("inf")' in source, (
            "qwen3_sft/training/trainer.py: _get_grad_norm"
        )
