"""Latent and differential attention in files: published shapes, refusals by name; and layers without positions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.errors import CheckpointError, UnsupportedError
from lamina.families import Fields, family
from lamina.layers import AttentionSpec, DifferentialSpec, LatentAttentionSpec, RotarySpec, YarnScaling
from lamina.layers.latent import scale_of
from lamina.specs import edit
from lamina.words import say

# deepseek-ai/DeepSeek-V3, config.json
DEEPSEEK3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "n_routed_experts": 256,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DENSE = {"first_k_dense_replace": 61}


def read(said: dict[str, Any]) -> lamina.ModelSpec:
    return family(said["model_type"]).spec(Fields(said))


def test_the_published_attention_of_deepseek_v3():
    spec = read(DEEPSEEK3 | DENSE)
    assert spec.decoder is not None
    attention = spec.decoder.layers[60].steps[0].op
    assert attention == LatentAttentionSpec(
        heads=128,
        query_rank=1536,
        key_rank=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        rotary=RotarySpec(interleaved=True, scaling=YarnScaling(factor=40.0, original=4096, scale=1.0, scale_all=1.0)),
    )
    assert scale_of(attention) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert lamina.account(spec, context=1).cache_bytes == 70_272  # 61 layers of 576 numbers of two bytes
    # Per layer (the published total of 671 billion has these): 7168 * 1536 + 1536 + 1536 * 24576 + 7168 * 576 + 512
    # + 512 * 32768 + 16384 * 7168 = 187,107,328, then 3 * 7168 * 18432 dense and two norms; two tables, one norm
    dense = 187_107_328 + 3 * 7168 * 18432 + 2 * 7168
    assert lamina.account(spec, context=1).parameters == 61 * dense + 2 * 129280 * 7168 + 7168
    assert say(attention) == (
        "MLA 128 heads of 128 + 64, values of 128, keys and values from 512, queries from 1536, causal,"
        " RoPE base 10000 interleaved Yarn scaling x 40"
    )


@pytest.mark.parametrize(
    "said, message",
    [
        ({"topk_method": "greedy"}, "topk_method is 'greedy'; only 'noaux_tc'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; only 'sigmoid'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2; only 1"),
        ({"n_group": 3, "topk_group": 2}, "experts=256 must be a multiple of groups=3"),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "norm_topk_prob": True}, "norm_topk_prob is True"),
        (
            {"model_type": "deepseek_v2", "num_experts_per_tok": 2, "topk_method": "noaux_tc"},
            "topk_method is 'noaux_tc'",
        ),
        (DENSE | {"num_key_value_heads": 8}, "num_key_value_heads is 8; only 128"),
        (DENSE | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        (DENSE | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
        (DENSE | {"mlp_bias": True}, "mlp_bias is True"),
        (
            DENSE | {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}},
            "mscale_all_dim stands beside rope_type 'linear'",
        ),
        (DENSE | {"qk_rope_head_dim": 63}, "rotary.width=63 must be even"),
        ({"model_type": "deepseek_v2"}, "num_experts_per_tok is missing"),
    ],
)
def test_a_deepseek_that_is_not_built_is_refused_by_name(said: dict[str, Any], message: str):
    with pytest.raises(lamina.LaminaError, match=message):
        read(DEEPSEEK3 | said)


def test_a_model_without_experts_needs_no_such_layers():
    spec = read(DEEPSEEK3 | {"n_routed_experts": None})
    assert spec == read(DEEPSEEK3 | DENSE)
    assert spec.special == lamina.ModelSpec.from_json(spec.to_json()).special


DIFFERENTIAL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
DIFFERENTIAL |= {"num_attention_heads": 4, "model_type": "diffllama"}


@pytest.mark.parametrize(
    "said, message",
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1; it must be even"),
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, "num_key_value_heads is 1; it must be even"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0"),
        ({"mlp_bias": True}, "mlp_bias is True"),
    ],
)
def test_a_diffllama_that_cannot_be_is_refused(said: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        read(DIFFERENTIAL | said)


def test_differential_attention_in_words():
    spec = read(DIFFERENTIAL | {"num_key_value_heads": 2, "attention_bias": True})
    assert spec.decoder is not None
    assert say(spec.decoder.layers[1].steps[0].op) == (
        "differential, 2/1 heads of 2 x 8, lambda from 0.36, causal, RoPE base 10000, biases"
    )
    assert say(spec.decoder.layers[1].steps[0].op.norm) == "RMSNorm without weight eps 1e-05"


@pytest.mark.parametrize("said", [[1], [1, 2], "1 0", [1, None]])
def test_a_list_of_turning_layers_that_does_not_fit_is_refused(said: Any):
    with pytest.raises(CheckpointError, match="no_rope_layers must list 0 or 1 for each of 2 layers"):
        read(DIFFERENTIAL | {"model_type": "smollm3", "no_rope_layers": said})


def test_a_longer_list_of_turning_layers_is_read_as_far_as_there_are_layers():
    spec = read(DIFFERENTIAL | {"model_type": "smollm3", "num_key_value_heads": 4, "no_rope_layers": [0, 1, 1]})
    assert spec.decoder is not None
    ops = [layer.steps[0].op for layer in spec.decoder.layers]
    assert [isinstance(op, AttentionSpec) and op.rotary is not None for op in ops] == [False, True]


def test_what_a_layout_cannot_say_is_named(tmp_path: Path):
    """The number that lambda starts with is not in DiffLlama's files: it follows from the depth."""
    spec = read(DIFFERENTIAL)
    changed = edit(spec, DifferentialSpec, lambda path, one: one.replace(start=0.5) if ".1." in path else one)
    with pytest.raises(UnsupportedError, match="start is 0.5"):
        lamina.save(changed.build(), tmp_path / "out")
    lamina.save(changed.build(), tmp_path / "native", format="native")
    assert lamina.load(tmp_path / "native").spec == changed


@torch.no_grad()
def test_layers_without_positions_see_order_by_the_mask_alone(tmp_path: Path):
    """In a model none of whose layers turns, shifting all positions moves no bit; with one that does, rounding only."""
    said = DIFFERENTIAL | {"model_type": "smollm3", "num_key_value_heads": 4, "no_rope_layers": [0, 0]}
    model = read(said).build(dtype=torch.float64).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    shifted = torch.arange(5)[None] * 3 + 7
    assert torch.equal(model(ids, position_ids=shifted).hidden, model(ids).hidden)
    swapped = model(ids[:, [1, 0, 2, 3, 4]]).hidden
    assert not torch.allclose(swapped[:, 2], model(ids).hidden[:, 2])  # in two layers the mask tells the order
