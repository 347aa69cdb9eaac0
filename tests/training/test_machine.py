"""What this machine or its packages cannot do is said before anything is loaded."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers.training_args import OptimizerNames

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import UsageError
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.options.values import package_of_optimizer
from qwen3_sft.training.arguments import check_machine, check_packages

LEAST = ["--model_name_or_path", "some/model", "--dataset", "rows.jsonl"]


def train(*words):
    return parse_options([*LEAST, *words]).train


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32"])
def test_precisions_that_need_a_gpu(name):
    with pytest.raises(UsageError, match=f"--{name} true"):
        check_machine(train(f"--{name}", "true"))
    check_machine(train("--bf16", "true", "--use_cpu", "true"))


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_an_optimizer_whose_package_is_missing(optim):
    module = package_of_optimizer(optim)
    if module is None or importlib.util.find_spec(module):
        check_packages(train("--optim", optim), Engine("single"))
        return
    with pytest.raises(UsageError, match=f"--optim {optim}: {module} is not installed"):
        check_packages(train("--optim", optim), Engine("single"))
