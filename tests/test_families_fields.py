"""Each field of a configuration reaches the part of the spec that it is about: what no comparison of logits at one
setting can show, and dropout, which evaluation hides."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from lamina.families import Fields, family
from lamina.layers import (
    AlibiSpec,
    LayerNormSpec,
    LearnedPositionSpec,
    LinearScaling,
    RMSNormSpec,
    RotarySpec,
    TransformSpec,
    YarnScaling,
)
from lamina.model import ModelSpec
from lamina.patterns import Causal, Everything, Window

DECODER = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), DECODER),
    "bloom": {"vocab_size": 50, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "falcon": DECODER,
    "mpt": {"vocab_size": 50, "d_model": 16, "n_layers": 2, "n_heads": 4},
    "bert": DECODER,
    "roberta": DECODER,
    "gptj": {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "rotary_dim": 4},
    "gpt_neox": DECODER,
    "opt": DECODER | {"ffn_dim": 24},
}
LATENT = DECODER | {"num_key_value_heads": 4, "first_k_dense_replace": 2}
del LATENT["head_dim"]
CONFIGS |= {"smollm3": DECODER, "diffllama": DECODER, "deepseek_v2": LATENT, "deepseek_v3": LATENT}
DEEPSEEKS = ("deepseek_v2", "deepseek_v3")
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
GEMMAS = ("gemma", "gemma2", "gemma3_text")
ATTENTION, FEED = "layers.0.steps.0.op", "layers.0.steps.1.op"
BRANCH = "layers.0.steps.0.op.branches.0.op"
PARALLEL, BESIDE = "layers.0.steps.0.op.branches.0", "layers.0.steps.0.op.branches.1"
WINDOW = Causal() & Window(back=7)
LINEAR = {"type": "linear", "factor": 4.0}  # as files before transformers 5 say it
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}

ROWS: list[tuple[str | tuple[str, ...], dict[str, Any], str, Any]] = [
    ("gpt2", {"layer_norm_epsilon": 1e-3}, "norm.eps", 1e-3),
    ("gpt2", {"layer_norm_epsilon": 1e-3}, "layers.1.steps.0.pre.eps", 1e-3),
    ("gpt2", {"attn_pdrop": 0.3}, f"{ATTENTION}.dropout", 0.3),
    ("gpt2", {"resid_pdrop": 0.3}, "layers.0.steps.0.dropout", 0.3),
    ("gpt2", {"resid_pdrop": 0.3}, "layers.0.steps.1.dropout", 0.3),
    ("gpt2", {"embd_pdrop": 0.3}, "dropout", 0.3),
    ("gpt2", {"tie_word_embeddings": False}, "head.tied", False),
    ("gpt2", {"scale_attn_weights": False}, f"{ATTENTION}.scale", 1.0),
    ("gpt2", {"n_inner": 20}, f"{FEED}.hidden", 20),
    ("gpt2", {}, f"{FEED}.hidden", 64),
    ("gpt2", {"activation_function": "relu"}, f"{FEED}.act", "relu"),
    ("gpt2", {}, f"{FEED}.act", "gelu_tanh"),
    (LLAMAS, {"rms_norm_eps": 1e-3}, "layers.1.steps.1.pre.eps", 1e-3),
    (LLAMAS, {"rms_norm_eps": 1e-3}, "norm.eps", 1e-3),
    (LLAMAS, {"hidden_act": "relu"}, f"{FEED}.act", "relu"),
    (LLAMAS, {}, f"{FEED}.act", "silu"),
    (LLAMAS, {"attention_dropout": 0.3}, f"{ATTENTION}.dropout", 0.3),
    (LLAMAS, {"tie_word_embeddings": True}, "head.tied", True),
    (LLAMAS, {"rope_theta": 77.0}, f"{ATTENTION}.rotary.base", 77.0),
    (LLAMAS, {"rope_parameters": {"rope_theta": 77.0}}, f"{ATTENTION}.rotary.base", 77.0),
    (LLAMAS, {"partial_rotary_factor": 0.5}, f"{ATTENTION}.rotary.width", 4),
    (LLAMAS, {}, f"{ATTENTION}.rotary.width", None),
    (LLAMAS, {"rope_scaling": LINEAR}, f"{ATTENTION}.rotary.scaling", LinearScaling(factor=4.0)),
    (LLAMAS, {"rope_scaling": YARN}, f"{ATTENTION}.rotary.scaling", YarnScaling(factor=2.0, original=32)),
    (LLAMAS, {"rope_scaling": YARN | {"attention_factor": 1.25}}, f"{ATTENTION}.rotary.scaling.attention", 1.25),
    (LLAMAS, {"rope_scaling": YARN | {"beta_fast": 20}}, f"{ATTENTION}.rotary.scaling.beta_fast", 20.0),
    (LLAMAS, {"rope_scaling": YARN | {"beta_slow": 2}}, f"{ATTENTION}.rotary.scaling.beta_slow", 2.0),
    (LLAMAS, {"rope_scaling": YARN | {"mscale": 0.5}}, f"{ATTENTION}.rotary.scaling.scale", 0.5),
    (LLAMAS, {"rope_scaling": YARN | {"mscale_all_dim": 0.5}}, f"{ATTENTION}.rotary.scaling.scale_all", 0.5),
    (LLAMAS, {"rope_scaling": YARN | {"truncate": False}}, f"{ATTENTION}.rotary.scaling.whole", False),
    ("llama", {"attention_bias": True}, f"{ATTENTION}.bias", "all"),
    ("llama", {"mlp_bias": True}, f"{FEED}.bias", True),
    ("qwen2", {}, f"{ATTENTION}.bias", "qkv"),
    ("qwen3", {"rms_norm_eps": 1e-3}, f"{ATTENTION}.qk_norm", RMSNormSpec(eps=1e-3)),
    ("mistral", {"sliding_window": 7}, f"{ATTENTION}.pattern", WINDOW),
    ("mistral", {"sliding_window": None}, f"{ATTENTION}.pattern", Causal()),
    *(
        (("qwen2", "qwen3"), {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": first}, *rest)
        for first, rest in (
            (0, (f"{ATTENTION}.pattern", WINDOW)),
            (1, (f"{ATTENTION}.pattern", Causal())),
            (1, ("layers.1.steps.0.op.pattern", WINDOW)),
            (2, ("layers.1.steps.0.op.pattern", Causal())),
        )
    ),
    (("qwen2", "qwen3"), {"use_sliding_window": False, "sliding_window": 7}, f"{ATTENTION}.pattern", Causal()),
    (GEMMAS, {}, "embedding.scale", "rounded_root"),
    (GEMMAS, {"rms_norm_eps": 1e-3}, "norm", RMSNormSpec(eps=1e-3, plus_one=True, wide_product=True)),
    (GEMMAS, {"attention_dropout": 0.3}, f"{ATTENTION}.dropout", 0.3),
    (GEMMAS, {"attention_bias": True}, f"{ATTENTION}.bias", "all"),
    (GEMMAS[1:], {"query_pre_attn_scalar": 4}, f"{ATTENTION}.scale", 0.5),
    (GEMMAS[1:], {}, "layers.0.steps.0.post", RMSNormSpec(plus_one=True, wide_product=True)),
    ("gemma", {}, "layers.0.steps.0.post", None),
    ("gemma", {"hidden_act": "gelu"}, f"{FEED}.act", "gelu_tanh"),
    ("gemma2", {"attn_logit_softcapping": 5.0}, f"{ATTENTION}.softcap", 5.0),
    ("gemma2", {"final_logit_softcapping": 5.0}, "head.softcap", 5.0),
    ("gemma2", {"sliding_window": 7}, f"{ATTENTION}.pattern", WINDOW),
    ("gemma2", {"sliding_window": 7}, "layers.1.steps.0.op.pattern", Causal()),
    ("gemma3_text", {}, f"{ATTENTION}.rotary.base", 1e4),
    ("gemma3_text", {"sliding_window_pattern": 2}, "layers.1.steps.0.op.rotary.base", 1e6),
    ("gemma3_text", {"rms_norm_eps": 1e-3}, f"{ATTENTION}.qk_norm.eps", 1e-3),
    ("bloom", {"layer_norm_epsilon": 1e-3}, "norm.eps", 1e-3),
    ("bloom", {"layer_norm_epsilon": 1e-3}, "input_norm.eps", 1e-3),
    ("bloom", {"attention_dropout": 0.3}, f"{ATTENTION}.dropout", 0.3),
    ("bloom", {"hidden_dropout": 0.3}, "layers.0.steps.0.dropout", 0.3),
    ("bloom", {"hidden_dropout": 0.3}, "layers.0.steps.1.dropout", 0.3),
    ("bloom", {"n_embed": 32}, f"{FEED}.hidden", 128),
    ("bloom", {}, "score_bias", AlibiSpec(heads=4)),
    ("falcon", {}, "layers.0.steps.0.op.branches.0.op.key_heads", 1),
    ("falcon", {"multi_query": False}, "layers.0.steps.0.op.branches.0.op.key_heads", 4),
    ("falcon", {"new_decoder_architecture": True}, "layers.0.steps.0.pre", None),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}, "layers.0.steps.0.pre", None),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": None}, BRANCH + ".key_heads", 4),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, BRANCH + ".key_heads", 2),
    ("falcon", {"layer_norm_epsilon": 1e-3}, "norm.eps", 1e-3),
    ("falcon", {"layer_norm_epsilon": 1e-3}, "layers.1.steps.0.pre.eps", 1e-3),
    ("falcon", {"hidden_dropout": 0.3}, "layers.0.steps.0.dropout", 0.3),
    ("falcon", {"hidden_dropout": 0.3, "parallel_attn": False}, "layers.0.steps.1.dropout", 0.3),
    ("falcon", {"hidden_dropout": 0.3, "parallel_attn": False}, "layers.0.steps.0.dropout", 0.0),
    ("falcon", {"attention_dropout": 0.3, "parallel_attn": False}, "layers.0.steps.0.dropout", 0.3),
    ("falcon", {"attention_dropout": 0.3}, BRANCH + ".dropout", 0.0),
    ("falcon", {"attention_dropout": 0.3, "alibi": True}, BRANCH + ".dropout", 0.3),
    ("falcon", {"ffn_hidden_size": 20}, "layers.0.steps.0.op.branches.1.op.hidden", 20),
    ("falcon", {"activation": "relu"}, "layers.0.steps.0.op.branches.1.op.act", "relu"),
    ("falcon", {"rope_theta": 77.0}, BRANCH + ".rotary.base", 77.0),
    ("falcon", {"alibi": True}, BRANCH + ".rotary", None),
    ("falcon", {"alibi": True}, "score_bias", AlibiSpec(heads=4, scale=8**-0.5, rounded=True)),
    ("mpt", {"layer_norm_epsilon": 1e-3}, "norm", LayerNormSpec(eps=1e-3, bias=False)),
    ("mpt", {"attn_config": {"attn_pdrop": 0.3}}, f"{ATTENTION}.dropout", 0.3),
    ("mpt", {"attn_config": {"attn_pdrop": 0.3}}, "layers.0.steps.0.dropout", 0.3),
    ("mpt", {"attn_config": {"attn_pdrop": 0.3}}, "layers.0.steps.1.dropout", 0.3),
    ("mpt", {"attn_config": {"softmax_scale": 0.3}}, f"{ATTENTION}.scale", 0.3),
    ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "score_bias", AlibiSpec(heads=4, bias_max=16.0)),
    ("mpt", {"attn_config": {"alibi": False}, "max_seq_len": 9}, "position", LearnedPositionSpec(size=9)),
    ("mpt", {"attn_config": {"alibi": False}, "learned_pos_emb": False}, "position", None),
    ("smollm3", {}, "layers.0.steps.0.op.rotary", RotarySpec(base=2e6)),
    ("smollm3", {"no_rope_layers": [1, 0]}, "layers.0.steps.0.op.rotary.base", 2e6),
    ("smollm3", {"no_rope_layers": [1, 0]}, "layers.1.steps.0.op.rotary", None),
    ("smollm3", {"no_rope_layers": [0, 1], "rope_theta": 77.0}, f"{ATTENTION}.rotary", None),
    ("smollm3", {"no_rope_layers": [0, 1], "rope_theta": 77.0}, "layers.1.steps.0.op.rotary.base", 77.0),
    ("smollm3", {"no_rope_layers": [0, 0]}, "layers.1.steps.0.op.rotary", None),
    ("smollm3", {"no_rope_layer_interval": 2}, f"{ATTENTION}.rotary.base", 2e6),
    ("smollm3", {"no_rope_layer_interval": 2}, "layers.1.steps.0.op.rotary", None),
    ("smollm3", {"num_hidden_layers": 4}, "layers.3.steps.0.op.rotary", None),
    *(
        ("smollm3", {"no_rope_layers": [1, 0], "sliding_window": 7, **more}, f"layers.{depth}.steps.0.op.pattern", seen)
        for more, depth, seen in (
            ({"use_sliding_window": True}, 0, Causal()),
            ({"use_sliding_window": True}, 1, WINDOW),
            ({}, 1, Causal()),
            ({"layer_types": ["sliding_attention", "full_attention"]}, 0, WINDOW),
            ({"layer_types": ["sliding_attention", "full_attention"]}, 1, Causal()),
        )
    ),
    ("smollm3", {}, "head.tied", True),
    ("smollm3", {"head_dim": None}, f"{ATTENTION}.head_dim", 8),
    ("smollm3", {"head_dim": 6}, f"{ATTENTION}.head_dim", 6),
    ("smollm3", {"attention_bias": True}, f"{ATTENTION}.bias", "all"),
    ("smollm3", {"mlp_bias": True}, f"{FEED}.bias", True),
    ("diffllama", {}, f"{ATTENTION}.heads", 2),
    ("diffllama", {}, f"{ATTENTION}.key_heads", 1),
    ("diffllama", {}, f"{ATTENTION}.head_dim", 8),
    ("diffllama", {}, f"{ATTENTION}.start", 0.8 - 0.6),
    ("diffllama", {}, "layers.1.steps.0.op.start", 0.8 - 0.6 * math.exp(-0.3)),
    ("diffllama", {}, f"{ATTENTION}.norm", RMSNormSpec(eps=1e-5, weight=False)),
    ("diffllama", {}, "norm.eps", 1e-5),
    ("diffllama", {"rms_norm_eps": 1e-3}, f"{ATTENTION}.norm.eps", 1e-3),
    ("diffllama", {"attention_bias": True}, f"{ATTENTION}.bias", True),
    ("diffllama", {"rope_theta": 77.0}, f"{ATTENTION}.rotary.base", 77.0),
    (DEEPSEEKS, {}, f"{ATTENTION}.query_rank", 1536),
    (DEEPSEEKS, {"q_lora_rank": None}, f"{ATTENTION}.query_rank", None),
    (DEEPSEEKS, {"q_lora_rank": 7}, f"{ATTENTION}.query_rank", 7),
    (DEEPSEEKS, {"kv_lora_rank": 7}, f"{ATTENTION}.key_rank", 7),
    (DEEPSEEKS, {}, f"{ATTENTION}.key_rank", 512),
    (DEEPSEEKS, {}, f"{ATTENTION}.nope_dim", 128),
    (DEEPSEEKS, {"qk_nope_head_dim": 7}, f"{ATTENTION}.nope_dim", 7),
    (DEEPSEEKS, {}, f"{ATTENTION}.rope_dim", 64),
    (DEEPSEEKS, {"qk_rope_head_dim": 8, "head_dim": 99}, f"{ATTENTION}.rope_dim", 8),
    (DEEPSEEKS, {"v_head_dim": 7}, f"{ATTENTION}.value_dim", 7),
    (DEEPSEEKS, {}, f"{ATTENTION}.value_dim", 128),
    (DEEPSEEKS, {"attention_bias": True}, f"{ATTENTION}.bias", True),
    (DEEPSEEKS, {"attention_dropout": 0.3}, f"{ATTENTION}.dropout", 0.3),
    (DEEPSEEKS, {"rms_norm_eps": 1e-3}, f"{ATTENTION}.norm.eps", 1e-6),  # transformers gives these none of it
    (DEEPSEEKS, {"rms_norm_eps": 1e-3}, "norm.eps", 1e-3),
    (DEEPSEEKS, {}, f"{ATTENTION}.rotary.interleaved", True),
    (DEEPSEEKS, {"rope_theta": 77.0}, f"{ATTENTION}.rotary.base", 77.0),
    ("deepseek_v3", {"rope_interleave": False}, f"{ATTENTION}.rotary.interleaved", False),
    ("deepseek_v2", {"mlp_bias": True}, f"{FEED}.bias", True),
    (("bert", "roberta"), {"hidden_dropout_prob": 0.3}, "layers.0.steps.0.dropout", 0.3),
    (("bert", "roberta"), {"hidden_dropout_prob": 0.3}, "layers.0.steps.1.dropout", 0.3),
    (("bert", "roberta"), {"hidden_dropout_prob": 0.3}, "dropout", 0.3),
    (("bert", "roberta"), {"attention_probs_dropout_prob": 0.3}, f"{ATTENTION}.dropout", 0.3),
    (("bert", "roberta"), {"layer_norm_eps": 1e-3}, "layers.0.steps.0.after.eps", 1e-3),
    (("bert", "roberta"), {"hidden_act": "relu"}, f"{FEED}.act", "relu"),
    (("bert", "roberta"), {}, f"{ATTENTION}.pattern", Everything()),
    (("bert", "roberta"), {}, f"{ATTENTION}.bias", "all"),
    ("roberta", {"pad_token_id": 3}, "position.offset", 4),
    ("roberta", {"pad_token_id": 3}, "position.size", 60),
    ("bert", {"pad_token_id": 3}, "embedding.padding", 3),
    ("bert", {"type_vocab_size": 5}, "segment.count", 5),
    ("gptj", {"layer_norm_epsilon": 1e-3}, "norm.eps", 1e-3),
    ("gptj", {"layer_norm_epsilon": 1e-3}, "layers.1.steps.0.pre.eps", 1e-3),
    ("gptj", {"attn_pdrop": 0.3}, f"{PARALLEL}.op.dropout", 0.3),
    ("gptj", {"resid_pdrop": 0.3}, f"{PARALLEL}.dropout", 0.3),
    ("gptj", {"resid_pdrop": 0.3}, f"{BESIDE}.dropout", 0.3),
    ("gptj", {"resid_pdrop": 0.3}, "layers.0.steps.0.dropout", 0.0),
    ("gptj", {"embd_pdrop": 0.3}, "dropout", 0.3),
    ("gptj", {"rotary_dim": 8}, f"{PARALLEL}.op.rotary.width", None),
    ("gptj", {}, f"{PARALLEL}.op.rotary.width", 4),
    ("gptj", {"n_inner": 20}, f"{BESIDE}.op.hidden", 20),
    ("gptj", {}, f"{BESIDE}.op.hidden", 64),
    ("gptj", {}, f"{BESIDE}.op.act", "gelu_tanh"),
    ("gptj", {}, "head.tied", False),
    ("gpt_neox", {"layer_norm_eps": 1e-3}, f"{BESIDE}.pre.eps", 1e-3),
    ("gpt_neox", {"layer_norm_eps": 1e-3}, "norm.eps", 1e-3),
    ("gpt_neox", {"attention_dropout": 0.3}, f"{PARALLEL}.op.dropout", 0.3),
    ("gpt_neox", {"hidden_dropout": 0.3}, f"{PARALLEL}.dropout", 0.3),
    ("gpt_neox", {"hidden_dropout": 0.3}, f"{BESIDE}.dropout", 0.3),
    ("gpt_neox", {"hidden_dropout": 0.3}, "dropout", 0.3),
    ("gpt_neox", {"hidden_dropout": 0.3, "use_parallel_residual": False}, "layers.0.steps.1.dropout", 0.3),
    ("gpt_neox", {"use_parallel_residual": False}, f"{ATTENTION}.bias", "all"),
    ("gpt_neox", {"attention_bias": False}, f"{PARALLEL}.op.bias", "none"),
    ("gpt_neox", {"rotary_pct": 0.5}, f"{PARALLEL}.op.rotary.width", 4),
    ("gpt_neox", {}, f"{PARALLEL}.op.rotary.width", 2),
    ("gpt_neox", {"rotary_pct": 1.0}, f"{PARALLEL}.op.rotary.width", None),
    ("gpt_neox", {"rotary_emb_base": 77}, f"{PARALLEL}.op.rotary.base", 77.0),
    ("gpt_neox", {"rotary_emb_base": 7, "rope_parameters": {"rope_theta": 77}}, f"{PARALLEL}.op.rotary.base", 77.0),
    ("gpt_neox", {"rope_scaling": LINEAR}, f"{PARALLEL}.op.rotary.scaling", LinearScaling(factor=4.0)),
    ("gpt_neox", {"tie_word_embeddings": True}, "head.tied", True),
    ("gpt_neox", {}, f"{BESIDE}.op.act", "gelu"),
    ("opt", {"dropout": 0.3}, "layers.0.steps.0.dropout", 0.3),
    ("opt", {"dropout": 0.3}, "layers.0.steps.1.dropout", 0.3),
    ("opt", {"dropout": 0.3}, "dropout", 0.0),  # of the embedding there is none
    ("opt", {"attention_dropout": 0.3}, f"{ATTENTION}.dropout", 0.3),
    ("opt", {"enable_bias": False}, f"{ATTENTION}.bias", "none"),
    ("opt", {"enable_bias": False}, f"{FEED}.bias", False),
    ("opt", {}, f"{FEED}.act", "relu"),
    ("opt", {"do_layer_norm_before": False}, "layers.0.steps.0.pre", None),
    ("opt", {"do_layer_norm_before": False}, "layers.0.steps.1.after", LayerNormSpec()),
    ("opt", {"do_layer_norm_before": False}, "norm", None),
    ("opt", {"_remove_final_layer_norm": True}, "norm", None),
    ("opt", {"layer_norm_elementwise_affine": False}, "norm", LayerNormSpec(bias=False, weight=False)),
    ("opt", {"word_embed_proj_dim": 20}, "embedding.inner", 20),
    ("opt", {"word_embed_proj_dim": 20}, "head.transform", TransformSpec(width=20, bias=False)),
    ("opt", {"word_embed_proj_dim": 32}, "embedding.inner", None),
    ("opt", {}, "embedding.padding", 1),
    ("opt", {}, "position.offset", 2),
    ("opt", {"tie_word_embeddings": False}, "head.tied", False),
]  # fmt: skip
CASES = [(one, *rest) for kinds, *rest in ROWS for one in ([kinds] if isinstance(kinds, str) else kinds)]


def at(spec: ModelSpec, path: str) -> Any:
    """The value at a path of the stack, or of the model where it starts there."""
    steps = path.split(".")
    place: Any = spec if steps[0] in ("embedding", "head") else spec.encoder or spec.decoder
    for step in steps:
        place = place[int(step)] if step.isdigit() else getattr(place, step)
    return place


@pytest.mark.parametrize("kind, said, path, value", CASES, ids=lambda v: None if isinstance(v, dict) else str(v)[:40])
def test_a_field_reaches_the_spec(kind: str, said: dict[str, Any], path: str, value: Any):
    one = family(kind)
    spec = one.spec(Fields(CONFIGS[kind] | said))
    assert at(spec, path) == value
    if kind != "gemma" or said != {"hidden_act": "gelu"}:  # which the family writes by its own name
        again = one.spec(Fields(one.config(spec)))
        assert at(again, path) == value  # and comes back


def test_paths_are_not_trivial():
    """A row that holds whatever the configuration says would test nothing: its path exists and is a field of a spec."""
    for kind, said, path, _ in CASES:
        spec = family(kind).spec(Fields(CONFIGS[kind] | said))
        parent = at(spec, path.rsplit(".", 1)[0]) if "." in path else spec.encoder or spec.decoder
        assert dataclasses.is_dataclass(parent) or isinstance(parent, tuple)
