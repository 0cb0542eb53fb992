"""lamina.families.gguf: tiny random models, converted the way llama.cpp converts, come back as they were."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from lamina.errors import CheckpointError
from lamina.families.gguf import GGUFCheckpoint
from lamina.families.gguf_config import llama3_divisors, shortest

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "pad_token_id": 5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
GEMMA = {"query_pre_attn_scalar": 12, "sliding_window": 8}
CASES = {
    "llama": ("llama", "llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3": ("llama", "llama", {"rope_scaling": {"rope_type": "llama3"} | LLAMA3, "max_position_embeddings": 2048}),
    "mistral": ("llama", "mistral", {"sliding_window": 16, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", "qwen2", {"head_dim": 8, "tie_word_embeddings": False}),
    "qwen2, yarn": (
        "qwen2",
        "qwen2",
        {"head_dim": 8, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "qwen3": ("qwen3", "qwen3", {"tie_word_embeddings": True}),
    "gemma": ("gemma", "gemma", {"num_key_value_heads": 1}),
    "gemma2": ("gemma2", "gemma2", GEMMA | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.25}),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        GEMMA
        | {
            "num_hidden_layers": 7,
            "rope_local_base_freq": 700.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def model_of(case: str) -> transformers.PreTrainedModel:
    _, kind, more = CASES[case]
    config = transformers.AutoConfig.for_model(kind, **(SIZES | more))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Sixteen-bit values, as published weights are: adding 1 and taking it away again is then exact.
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).bfloat16().float() / 4
    return model.eval()


def stored_name(name: str, architecture: str) -> str:
    table = NAMES | (SANDWICH if architecture in ("gemma2", "gemma3") else {})
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        layer, part = module.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{table[part]}.{kind}"
    return f"{table[module]}.{kind}"


def convert(
    model: transformers.PreTrainedModel, case: str, path: Path, skip: str = "", more: dict | None = None
) -> Path:
    """What llama.cpp's convert_hf_to_gguf.py writes for such a model."""
    architecture, _, given = CASES[case]
    config = SIZES | given
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    writer.add_pad_token_id(5)
    writer.add_file_type(0)
    if architecture == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config["head_dim"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    if "rope_local_base_freq" in config:
        writer.add_float32("gemma3.rope.freq_base_swa", config["rope_local_base_freq"])
    if "attn_logit_softcapping" in config:
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    scaling = config.get("rope_scaling", {"rope_type": None})
    if scaling["rope_type"] == "llama3":
        divisors = llama3_divisors(config["rope_theta"], config["head_dim"] // 2, **LLAMA3)
        assert len(set(divisors)) > 2  # one of them a blend
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    elif scaling["rope_type"]:
        writer.add_string(f"{architecture}.rope.scaling.type", scaling["rope_type"])
        writer.add_rope_scaling_factor(scaling["factor"])
        if scaling["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    for key, value in (more or {}).items():
        {int: writer.add_uint32, str: writer.add_string, float: writer.add_float32}[type(value)](key, value)
    for name, weight in model.state_dict().items():
        if (name == "lm_head.weight" and model.config.tie_word_embeddings) or (skip and skip in name):
            continue
        heads = config["num_attention_heads"] if ".q_proj." in name else config["num_key_value_heads"]
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        writer.add_tensor(stored_name(name, architecture), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("case", CASES)
def test_comes_back_exactly(tmp_path: Path, case: str):
    model = model_of(case)
    with GGUFCheckpoint(convert(model, case, tmp_path / "m.gguf")) as checkpoint:
        state = {name: checkpoint.read(name) for name in checkpoint.entries}
        expected = model.state_dict()
        if model.config.tie_word_embeddings:
            del expected["lm_head.weight"]
        assert state.keys() == expected.keys()
        for name, weight in expected.items():
            assert checkpoint.entries[name].shape == weight.shape
            assert checkpoint.entries[name].name == name
            assert torch.equal(state[name], weight), name
        config = dict(checkpoint.config)
    assert config["model_type"] == CASES[case][1]
    assert config["torch_dtype"] == "float32"
    again = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    for field in (
        *SIZES.keys() - {"rope_theta"},
        *("rope_parameters", "tie_word_embeddings", "hidden_act", "hidden_activation", "attention_bias", "mlp_bias"),
        *("sliding_window", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping"),
        *("final_logit_softcapping", "use_sliding_window"),
    ):
        if case.startswith("qwen") and field == "sliding_window":
            continue
        assert getattr(again, field, None) == getattr(model.config, field, None), field
    rebuilt = transformers.AutoModelForCausalLM.from_config(again).eval()
    rebuilt.load_state_dict(state, strict=False)
    rebuilt.tie_weights()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(rebuilt(ids).logits, model(ids).logits)


def test_order_of_rows_matters(tmp_path: Path):
    """The classic silent bug: without it a model still speaks, only worse."""
    model = model_of("llama")
    with GGUFCheckpoint(convert(model, "llama", tmp_path / "m.gguf")) as checkpoint:
        raw, name = checkpoint.file.read("blk.0.attn_q.weight"), "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(raw, checkpoint.read(name))
        assert torch.equal(raw[:4], model.state_dict()[name][[0, 6, 1, 7]])


def test_refusals(tmp_path: Path):
    model = model_of("llama")

    def refused(message: str, **changes) -> None:
        path = convert(model, "llama", tmp_path / "m.gguf", **changes)
        with pytest.raises(CheckpointError, match=r"^m\.gguf: " + message):
            GGUFCheckpoint(path)

    refused(
        r"1 tensors are missing: 'blk.1.ffn_up.weight'; llama with 2 layers has 21 tensors",
        skip="layers.1.mlp.up_proj",
    )
    refused(r"9 tensors are unknown: 'blk.1.*, \.\.\.; llama with 1 layers", more={"llama.block_count": 1})
    refused(r"llama.block_count is '1000000000'; a whole number from 1 to", more={"llama.block_count": 10**9})
    refused(r"'llama.expert_count' is '8'; lamina knows no such setting", more={"llama.expert_count": 8})
    refused(r"'llama.logit_scale' is '2.0'; lamina knows no such setting", more={"llama.logit_scale": 2.0})
    refused(r"rope scaling 'longrope'; lamina reads", more={"llama.rope.scaling.type": "longrope"})
    refused(r"llama.attention.head_count is 'four'", more={"llama.attention.head_count": "four"})
    refused(r"4 heads and 3 key heads", more={"llama.attention.head_count_kv": 3})
    refused(r"blk.0.attn_k.weight has shape \(24, 32\)", more={"llama.attention.head_count_kv": 4})
    refused(r"llama.rope.dimension_count is 6; with heads of 12", more={"llama.rope.dimension_count": 6})
    refused(r"96 embeddings for 95 tokens", more={"llama.vocab_size": 95})
    refused(r"tokenizer.ggml.bos_token_id is 96; it is below 96", more={"tokenizer.ggml.bos_token_id": 96})
    refused(r"one of 3 parts", more={"split.count": 3})
    refused(r"architecture 'mamba'; lamina reads llama, qwen2, qwen3, gemma", more={"general.architecture": "mamba"})


def test_unknown_divisors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LLAMA3, "low_freq_factor", 1.7)
    path = convert(model_of("llama 3"), "llama 3", tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="rope_freqs.weight holds divisors of another kind"):
        GGUFCheckpoint(path)


def test_divisors_are_those_of_transformers():
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, rope_theta=500000.0, rope_scaling={"rope_type": "llama3"} | LLAMA3
    )
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert torch.allclose(plain / scaled, torch.tensor(llama3_divisors(500000.0, 32, **LLAMA3)), rtol=1e-5)


def test_shortest():
    assert [shortest(float(np.float32(x))) for x in (1e-5, 0.1, 5e5, 1e-6, 3.0)] == [1e-5, 0.1, 5e5, 1e-6, 3.0]
