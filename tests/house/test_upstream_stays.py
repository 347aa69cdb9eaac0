from transformers.models.qwen3_moe import modeling_qwen3_moe as upstream

from tests.support.upstream import Upstream


def test_what_a_test_leaves_behind_is_seen_and_put_back():
    before = Upstream()
    norm, forward = upstream.Qwen3MoeRMSNorm, upstream.Qwen3MoeForCausalLM.forward
    upstream.Qwen3MoeRMSNorm = object
    upstream.Qwen3MoeForCausalLM.forward = lambda self: None
    try:
        changed = before.restore()
    finally:
        assert upstream.Qwen3MoeRMSNorm is norm
        assert upstream.Qwen3MoeForCausalLM.forward is forward
    name = upstream.__name__
    assert f"{name}.Qwen3MoeRMSNorm" in changed
    assert "Qwen3MoeForCausalLM.forward" in changed
    assert before.restore() == []
