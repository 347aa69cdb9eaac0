"""What is wrong in a config.json is named, whatever transformers would make of it."""

import pytest

from qwen3_sft.errors import ModelError
from qwen3_sft.model.base import checked_base
from qwen3_sft.model.loading import resolve_model


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            {"num_hidden_layers": None, "num_hiden_layers": 2},
            "has no num_hidden_layers but num_hiden",
        ),
        ({"num_local_experts": None, "n_routed_experts": 4}, "has no num_experts"),
        ({"num_experts": 3}, "num_experts 3 and num_local_experts 4, which mean the same"),
        ({"hidden_size": "128"}, "hidden_size is '128'"),
        ({"hidden_size": 128.0}, r"hidden_size is 128\.0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of"),
        ({"head_dim": None, "hidden_size": 126}, "has no head_dim, and hidden_size 126"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than there are"),
        ({"hidden_act": "foo"}, "no model can be built from it"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "no model can be built"),
        ({"rope_parameters": 5}, "rope_parameters"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"dtype": "float99"}, "float99"),
        ({"decoder_sparse_step": 0}, "no model can be built"),
        ({"eos_token_id": 5000}, "eos_token_id 5000 is beyond vocab_size 1024"),
        ({"eos_token_id": [1000, 1024]}, "eos_token_id 1024 is beyond"),
        ({"pad_token_id": -1}, "pad_token_id -1 is beyond"),
        ({"vocab_size": 1030}, r"embed_tokens\.weight \(1024, 128\), not \(1030, 128\)"),
        ({"num_hidden_layers": 3}, r"missing: model\.layers\.2\."),
        ({"moe_intermediate_size": 64}, "of another shape"),
        ({"model_type": "foo"}, "model_type is 'foo'"),
        ({"model_type": ["qwen3_moe"]}, "model_type is"),
    ],
    ids=str,
)
def test_wrong_configs_are_named(base, change, entries, words):
    change(base, **entries)
    with pytest.raises(ModelError, match=words):
        checked_base(resolve_model(str(base)))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null"])
def test_a_config_that_is_no_object(base, content):
    (base / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_model(str(base))


def test_a_misspelt_key_that_decides_no_shape_is_warned_about(base, change, caplog):
    change(base, norm_topk_prob=None, norm_topk_prb=True)
    checked_base(resolve_model(str(base)))
    assert "has no norm_topk_prob but norm_topk_prb, which nothing reads" in caplog.text
