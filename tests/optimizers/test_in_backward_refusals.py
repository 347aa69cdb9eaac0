import pytest
import torch
from torchao.optim import AdamW8bit, AdamWFp8

from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import UsageError
from qwen3_sft.optimizers.in_backward import BackwardOptimizer
from qwen3_sft.optimizers.low_bit_step import LowBitStep
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.training.arguments import completed, final_arguments
from tests.support.training import make_trainer


def test_unknown_optimizers_are_refused():
    model = torch.nn.Linear(4, 3)
    with pytest.raises(ValueError, match="SGD cannot step one parameter"):
        BackwardOptimizer(model, torch.optim.SGD(model.parameters()), clip="delayed",
                          max_grad_norm=1.0)  # fmt: skip
    with pytest.raises(ValueError, match="amsgrad"):
        LowBitStep(AdamW8bit(model.parameters(), amsgrad=True))
    with pytest.raises(ValueError, match=r"does not know \['weight'\]"):
        BackwardOptimizer(model, torch.optim.AdamW([model.bias]), clip="delayed",
                          max_grad_norm=1.0)  # fmt: skip
    with pytest.raises(ValueError, match="only after the backward"):
        BackwardOptimizer(model, torch.optim.AdamW(model.parameters()), clip="global",
                          max_grad_norm=1.0)  # fmt: skip


def arguments(tmp_path, *words, engine="single"):
    least = ["--model_name_or_path", "m", "--dataset", "d", "--output_dir", str(tmp_path)]
    options = parse_options([*least, "--use_cpu", "true", *words])
    options = completed(options, Engine(engine), 1, has_bf16=False)
    return final_arguments(options, Engine(engine))


def test_the_warning_about_rounding_is_for_those_who_lose_updates(tmp_path, caplog):
    def warned(*words):
        caplog.clear()
        arguments(tmp_path, *CLIPPED, "--dtype", "bfloat16", *words)
        return "small updates are rounded away" in caplog.text

    assert warned("--optim", "adamw_torch")
    assert not warned("--optim", "adafactor")
    assert not warned("--optim", "adamw_torch_4bit")


IN = ("--optimizer_in_backward", "true")
CLIPPED = (*IN, "--clip", "per_tensor")


@pytest.mark.parametrize(
    ("words", "engine", "message"),
    [
        (IN, "single", "--clip global, --max_grad_norm 1.0.*--clip per_tensor.*--optim adafactor"),
        (("--clip", "delayed"), "single", "--clip delayed is for --optimizer_in_backward true"),
        ((*CLIPPED, "--gradient_accumulation_steps", "2"), "single", "accumulation_steps 2 cannot"),
        ((*CLIPPED, "--global_batch_size", "4"), "single", "gradient_accumulation_steps 4 cannot"),
        (CLIPPED, "ddp", "is for one process and this is ddp"),
        (CLIPPED, "native", "config/single.json"),
        ((*CLIPPED, "--fp16", "true"), "single", "--bf16 true instead of --fp16"),
        ((*CLIPPED, "--optim", "sgd"), "single", "does not know --optim sgd"),
    ],
)
def test_refused(tmp_path, words, engine, message):
    with pytest.raises(UsageError, match=message):
        arguments(tmp_path, *words, engine=engine)


def test_accepted_and_rounded_stochastically(tmp_path):
    words = (*CLIPPED, "--optim", "adamw_torch_8bit", "--dtype", "bfloat16")
    assert arguments(tmp_path, *words).optim_args == "bf16_stochastic_round=True"
    more = arguments(tmp_path, *words, "--optim_args", "states=fp8")
    assert more.optim_args == "states=fp8,bf16_stochastic_round=True"
    off = arguments(tmp_path, *words, "--optim_args", "bf16_stochastic_round=False")
    assert off.optim_args == "bf16_stochastic_round=False"
    under_ddp = arguments(tmp_path, *words[len(CLIPPED) :], engine="ddp")
    assert under_ddp.optim_args == "bf16_stochastic_round=True"


def test_states_go_with_one_optimizer(tiny_moe, tokenizer, tmp_path):
    trainer = make_trainer(tiny_moe, tokenizer, tmp_path, optim="sgd", optim_args="states=fp8")
    with pytest.raises(UsageError, match="states=fp8 with --optim sgd"):
        trainer.create_optimizer()
    trainer = make_trainer(
        tiny_moe, tokenizer, tmp_path, optim="adamw_torch_8bit", optim_args="states=fp8"
    )
    assert isinstance(trainer.create_optimizer(), AdamWFp8)
