import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin

from qwen3_sft.build import set_fsdp_precision
from qwen3_sft.training.callbacks import check_optimizer


def test_fsdp_of_accelerate_sums_gradients_in_float32_and_returns_the_loss_uncast():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.reduce_dtype == torch.bfloat16, "no longer needed"
    set_fsdp_precision(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert policy.output_dtype is None


def test_an_optimizer_of_other_parameters_is_refused():
    model = torch.nn.Linear(2, 2)
    check_optimizer(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(RuntimeError, match=r"holds 1 parameters, the model trains 2; .*: bias"):
        check_optimizer(model, torch.optim.SGD([model.weight]))
    with pytest.raises(RuntimeError, match="not among them: weight, bias"):
        check_optimizer(model, torch.optim.SGD(torch.nn.Linear(2, 2).parameters()))
    model.bias.requires_grad_(False)
    check_optimizer(model, torch.optim.SGD([model.weight]))
