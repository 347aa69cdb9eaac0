"""Compiled layers: one graph per kind whatever the packing, the same gradients, routing replayed.

Compiled down to graphs of operators, where breaks, recompilations and recomputation are decided;
one test has inductor make code of them.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import monkey_patch
from qwen3_sft.demo.model import tiny_config, tiny_model
from qwen3_sft.distributed.engine import Engine
from qwen3_sft.errors import UsageError
from qwen3_sft.model.activation_checkpointing import enable_checkpointing
from qwen3_sft.model.layer_compile import check_compile, compile_layers
from qwen3_sft.options.recipe import parse_options
from qwen3_sft.packing.collator import PackedCollator
from qwen3_sft.training.arguments import completed
from tests.support.oracle import assert_close
from tests.support.training import make_trainer, weights

LENGTH, VOCAB, HIDDEN, LAYERS = 96, 320, 64, 4
PATCHES = ("scatter_moe_recompute", "varlen_attention", "router_aux_loss", "linear_cross_entropy")
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"
EXPERTS, ROUTING = "monkey_patch.scatter_moe.default", "aten.topk.default"
# Documents in a row, among them a row of one document.
ROWS = [
    (30, 20, 40),
    (96,),
    (15, 16, 17, 18, 19),
    (50, 46),
    (90,),
    (8,) * 12,
    (1, 60, 1, 30),
    (70, 26),
]


class Graphs:
    """A backend that runs the operators of a graph one by one, and keeps the graphs."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []
        self.compile = aot_autograd(
            fw_compiler=self._keep(self.forward),
            bw_compiler=self._keep(self.backward),
            partition_fn=min_cut_rematerialization_partition,  # as inductor
        )

    @staticmethod
    def _keep(kept: list) -> Any:
        def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
            kept.append(graph)
            return make_boxed_func(graph.forward)

        return keep


def operators(graph: torch.fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in graph.graph.nodes)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    counters.clear()


def make_model(**overrides: Any):
    sizes = {
        "hidden_size": HIDDEN, "moe_intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 32, "num_attention_heads": 4,
        "num_key_value_heads": 1,
    } | overrides  # fmt: skip
    model = tiny_model(tiny_config(VOCAB, **sizes)).train()
    model.config.use_cache = False
    monkey_patch.apply_patches(model, PATCHES)
    monkey_patch.router_statistics(model).coefficient = 0.01
    return model


def step(model: Any, lengths: tuple[int, ...]) -> tuple[torch.Tensor, dict, dict]:
    """Return loss, gradients and router metrics of one batch."""
    rng = np.random.default_rng(sum(lengths))
    documents = [
        (rng.integers(0, VOCAB, n).astype(np.int32), np.arange(n) > n // 3) for n in lengths
    ]
    batch = PackedCollator(LENGTH, 0)([documents])
    del batch["stats"]
    core = getattr(model, "module", model)
    device = core.device
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    statistics = monkey_patch.router_statistics(core)
    weight = torch.tensor(1 / LENGTH, device=device)
    statistics.begin(batch.pop("token_mask"), num_rows=1, weight=weight)
    core.zero_grad()
    loss = model(**batch, num_items_in_batch=50).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in core.named_parameters()}, statistics.drain()


def assert_same_step(model: Any, plain: Any, lengths: tuple[int, ...]) -> None:
    loss, gradients, metrics = step(model, lengths)
    expected, reference, wanted = step(plain, lengths)
    assert_close(loss, expected, name="loss")
    assert metrics == pytest.approx(wanted, rel=1e-5)
    for name, gradient in gradients.items():
        assert_close(gradient, reference[name], name=name)


def graphs_made() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


PLANS = [({"none": 4}, 1), ({"full": 1, "selective": 1, "none": 2}, 2)]


@pytest.mark.parametrize(("plan", "kinds"), PLANS)
def test_one_graph_for_each_kind_of_layer(plan, kinds):
    model = make_model()
    enable_checkpointing(model, plan)
    plain = copy.deepcopy(model)
    names, graphs = list(model.state_dict()), Graphs()
    assert compile_layers(model, backend=graphs.compile) == kinds
    assert list(model.state_dict()) == names
    for lengths in ROWS:
        assert_same_step(model, plain, lengths)
    assert graphs_made() == kinds
    assert (len(graphs.forward), len(graphs.backward)) == (kinds, kinds)
    for graph in graphs.forward:
        assert all(operators(graph)[name] == 1 for name in (ATTENTION, EXPERTS, ROUTING))
    for graph in graphs.backward:
        seen = operators(graph)
        assert not any(seen[name] for name in (ATTENTION, EXPERTS, ROUTING)), "computed again"
    selective = [g for g in graphs.backward if operators(g)["aten.mm.default"] == 10 + 4]
    # Five products have two gradients each; q, k, v and the router's logits run again.
    assert len(selective) == ("selective" in plan)


def test_a_dense_layer_is_a_kind_of_its_own():
    model = make_model(mlp_only_layers=[0])
    assert compile_layers(model, backend="aot_eager") == 2
    for lengths in ROWS[:3]:
        step(model, lengths)
    assert graphs_made() == 2


def test_selective_keeps_what_it_says_but_the_experts_output():
    """No gradient needs that one: only code that runs the operators again would."""
    model, graphs = make_model(num_hidden_layers=1), Graphs()
    enable_checkpointing(model, {"selective": 1})
    compile_layers(model, backend=graphs.compile)
    step(model, ROWS[0])
    *_, output = graphs.forward[0].graph.nodes
    made = [n.meta["val"] for n in output.args[0] if isinstance(n, torch.fx.Node)
            and n.op != "placeholder" and isinstance(n.meta["val"], torch.Tensor)]  # fmt: skip
    result = LENGTH * HIDDEN * 4
    attention, projection = LENGTH * (4 * 32 * 4 + 4 * 4), LENGTH * HIDDEN * 4
    # Two permutations, weights, indices; offsets and the counts of eight experts.
    routing = LENGTH * (2 * (4 + 4) + 2 * (4 + 8)) + 9 * 4 + 2 * 8 * 8
    kept = sum(t.numel() * t.element_size() for t in made) - result
    assert kept == pytest.approx(attention + projection + routing, rel=0.02)


def test_evaluation_is_not_compiled():
    model = make_model()
    plain = copy.deepcopy(model)
    compile_layers(model, backend="aot_eager")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
    assert graphs_made() == 0


def test_inputs_kept_on_the_host():
    model = make_model()
    plain = copy.deepcopy(model)
    enable_checkpointing(model, {"full": LAYERS}, offload=True)
    compile_layers(model, backend="aot_eager")
    for lengths in ROWS[:2]:
        assert_same_step(model, plain, lengths)
    assert graphs_made() == 1


def test_gradients_are_averaged_by_ddp():
    model = make_model()
    plain = copy.deepcopy(model)
    compile_layers(model, backend="aot_eager")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        # Buckets far smaller than a layer, so that some end within one.
        wrapped = DistributedDataParallel(model, bucket_cap_mb=0.05)
        for lengths in ROWS[:3]:
            assert_same_step(wrapped, plain, lengths)
    finally:
        dist.destroy_process_group()
    assert graphs_made() == 1


def test_the_optimizer_steps_in_the_backward_pass(tiny_moe, tokenizer, tmp_path):
    trained = []
    for is_compiled in (False, True):
        trainer = make_trainer(
            tiny_moe, tokenizer, tmp_path, patches=PATCHES, aux=0.01, max_steps=3,
            optimizer_in_backward=True, clip="per_tensor", max_grad_norm=0.5, optim="adafactor",
            learning_rate=1e-3, activation_checkpointing="selective",
        )  # fmt: skip
        if is_compiled:
            compile_layers(trainer.model, backend="aot_eager")
        trainer.train()
        assert all(p.grad is None for p in trainer.model.parameters())
        trained.append(weights(trainer.model))
    assert graphs_made() == 1
    for name, expected in trained[0].items():
        assert_close(trained[1][name], expected, name=name)
        assert not torch.equal(expected, tiny_moe.state_dict()[name]), "nothing was trained"


@pytest.mark.long
def test_code_that_inductor_makes():
    model = make_model(num_hidden_layers=3)
    enable_checkpointing(model, {"full": 1, "selective": 1, "none": 1})
    plain = copy.deepcopy(model)
    compile_layers(model)
    for lengths in ROWS:
        assert_same_step(model, plain, lengths)
    assert graphs_made() == 2


# ---- what is refused ----


def options(model: dict[str, Any] | None = None, **values: Any) -> Any:
    least = parse_options(["--model_name_or_path", "m", "--dataset", "d", "--use_cpu", "true"])
    return least.replaced(torch_compile=True, **(model or {}), **values)


@pytest.mark.parametrize(
    ("given", "engine", "message"),
    [
        (options(), "fsdp", "this is fsdp"),
        (options(), "zero3", "this is zero3"),
        (options(), "native", "this is native"),
        (options({"use_liger": True}), "single", "--use_liger true"),
        (options({"experts_implementation": "eager"}), "single", "scatter_moe_recompute"),
        (options({"attn_implementation": "eager"}), "single", "use auto"),
        (options(activation_checkpointing="auto", activation_offload=True), "ddp", "auto keeps"),
    ],
)
def test_what_does_not_go_together_is_refused(given, engine, message):
    with pytest.raises(UsageError, match=message):
        check_compile(given, Engine(engine))
    check_compile(given.replaced(torch_compile=False), Engine(engine))


@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_the_compiler_takes_the_place_of_liger(engine):
    given = options(activation_checkpointing="full", activation_offload=True)
    assert completed(given, Engine(engine), 1, has_bf16=False).model.use_liger is False


def test_cuda_graphs_are_refused():
    with pytest.raises(ValueError, match="reduce-overhead"):
        compile_layers(make_model(num_hidden_layers=1), mode="reduce-overhead")
