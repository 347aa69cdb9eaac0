import json

import pytest

from qwen3_sft.distributed.engine import Engine, check_experts, detect
from qwen3_sft.errors import UsageError
from qwen3_sft.options.data_args import DataArguments
from qwen3_sft.options.model_args import ModelArguments

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}


def engine_of(environment, **sizes):
    return detect(
        ModelArguments(**sizes), DataArguments(), {k: str(v) for k, v in environment.items()}
    )


@pytest.fixture
def zero(tmp_path):
    def write(stage):
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        return {
            "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
            "WORLD_SIZE": "2",
        }  # fmt: skip

    return write


@pytest.mark.parametrize(
    ("environment", "sizes", "expected"),
    [
        ({}, {}, Engine("single")),
        ({"WORLD_SIZE": 2}, {}, Engine("ddp")),
        ({"WORLD_SIZE": 8}, {"fsdp_size": 8}, Engine("native", 8)),
        ({"WORLD_SIZE": 8}, {"fsdp_size": -1, "ep_size": 4}, Engine("native", 8, 4)),
        ({"WORLD_SIZE": 16}, {"fsdp_size": -1, "dp_replicate_size": 2}, Engine("native", 8, 1, 2)),
        ({}, {"fsdp_size": -1}, Engine("single")),
        ({"WORLD_SIZE": 4}, {"dp_replicate_size": 4}, Engine("ddp")),
        (FSDP, {}, Engine("fsdp")),
    ],
)
def test_detect(environment, sizes, expected):
    assert engine_of(environment, **sizes) == expected


def test_detect_zero_by_the_stage_of_its_file(zero):
    assert engine_of(zero(2)) == Engine("zero2")
    assert engine_of(zero(3)) == Engine("zero3")
    with pytest.raises(UsageError, match="ZeRO stage 1 is not supported"):
        engine_of(zero(1))


def test_layouts():
    layouts = {
        kind: Engine(kind).layout for kind in ("single", "ddp", "native", "fsdp", "zero2", "zero3")
    }
    assert layouts == {
        "single": "whole", "ddp": "whole", "native": "dtensor", "fsdp": "dtensor", "zero2": "zero",
        "zero3": "zero",
    }  # fmt: skip
    assert not Engine("zero2").shards_weights
    assert Engine("zero3").shards_weights


@pytest.mark.parametrize(
    ("environment", "sizes", "message"),
    [
        (FSDP, {"fsdp_size": 2}, r"--fsdp_size/--ep_size .* FSDP on as well.*config/ddp\.json"),
        (FSDP | {"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "both switched on"),
        (FSDP | {"FSDP_VERSION": "1"}, {}, "fsdp_version 1 is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": 2}, {}, "fsdp_version 1 is not supported"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "--activation_checkpointing full"),
        (FSDP | {"WORLD_SIZE": "1"}, {}, "shards nothing"),
        ({"WORLD_SIZE": 4}, {"fsdp_size": 3}, "needs 3 processes, there are 4"),
        ({"WORLD_SIZE": 4}, {"fsdp_size": 8}, "needs 8 processes, there are 4"),
        ({"WORLD_SIZE": 4}, {"fsdp_size": 4, "ep_size": 3}, "3 does not divide --fsdp_size 4"),
        ({"WORLD_SIZE": 4}, {"ep_size": 4}, "needs 1 processes"),
        ({"WORLD_SIZE": 1}, {"ep_size": 2}, "--ep_size 2 needs --fsdp_size"),
        ({"WORLD_SIZE": 4}, {"ep_size": 0, "fsdp_size": 4}, "--ep_size 0: must be at least 1"),
        ({"WORLD_SIZE": 4}, {"fsdp_size": -1, "dp_replicate_size": 3}, "--fsdp_size -1 takes all"),
        (
            {
                "WORLD_SIZE": 4, "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                "PARALLELISM_CONFIG_CP_SIZE": 2,
            },
            {},
            "packing and parallelism_config_cp_size 2 do not go together",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "without a deepspeed_config_file"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no.json"},
            {},
            "no.json: .*No such file",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_name(environment, sizes, message):
    with pytest.raises(UsageError, match=message):
        engine_of(environment, **sizes)


@pytest.mark.parametrize("axis", ["CP", "SP", "TP"])
def test_no_axis_of_accelerate_splits_sequences_or_matrices(axis):
    environment = FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    with pytest.raises(UsageError, match=f"parallelism_config_{axis.lower()}_size 2 do not go"):
        engine_of(environment | {f"PARALLELISM_CONFIG_{axis}_SIZE": 2})


def test_replicas_and_shards_of_accelerate_are_no_contradiction():
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": 2, "PARALLELISM_CONFIG_DP_SHARD_SIZE": 8}
    ones = {f"PARALLELISM_CONFIG_{axis}_SIZE": 1 for axis in ("TP", "CP", "SP")}
    environment = FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "WORLD_SIZE": 16}
    assert engine_of(environment | sizes | ones) == Engine("fsdp")


def test_expert_parallel_size_must_divide_the_experts():
    check_experts(Engine("native", 8, 8), 128)
    with pytest.raises(UsageError, match=r"--ep_size 6 .* 128 experts; .* 1, 2, 4, 8, 16"):
        check_experts(Engine("native", 6, 6), 128)
