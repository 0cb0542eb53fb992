"""BLOOM, Falcon and MPT beyond the grid: where transformers ignores what decides the numbers, adds a bias twice, or
rounds it; the settings of MPT that it drops; old files; sizes against models built by transformers."""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.falcon import modeling_falcon
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

import lamina
from lamina.errors import CheckpointError
from lamina.families import Fields, family, sizes
from lamina.layers import AlibiSpec, LearnedPositionSpec
from lamina.layers.bias import slopes
from tests.families import Case, Row, close, reference, row, same_files, tokens

GAPS = torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9, 20, 21, 22, 23, 24]])


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def case(name: str, folder: Path, **changes: Any) -> Case:
    one = row(name)
    return Case(Row(name, one.model, one.config, one.fields | changes, one.more, one.kernel), folder)


# Positions


def bent(model: Any, position: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a model of transformers take its biases from `position` (1, S)."""
    heads = model.config.num_attention_heads
    slope = torch.tensor(slopes(heads))[:, None, None]

    def key_bias(mask: torch.Tensor, heads: int, dtype: torch.dtype, rounded: bool = False) -> torch.Tensor:
        bias = slope.bfloat16() * position.bfloat16() if rounded else slope * position
        return bias.repeat(mask.shape[0], 1, 1).to(dtype)

    inner = getattr(model, "transformer", model)
    if model.config.model_type == "falcon":
        monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", partial(key_bias, rounded=True))
    elif model.config.model_type == "bloom":
        monkeypatch.setattr(inner, "build_alibi_tensor", key_bias)
    else:
        monkeypatch.setattr(inner, "build_mpt_alibi_tensor", lambda heads, length, device=None: slope * position)


@pytest.mark.parametrize("name", ["bloom", "bloom-untied", "mpt", "falcon-rw", "falcon-40b-alibi"])
@torch.no_grad()
def test_r2_position_ids_are_heeded_where_transformers_ignores_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = case(name, tmp_path)
    mask = torch.ones_like(one.ids)
    theirs = one.theirs(one.ids, attention_mask=mask).logits
    assert torch.equal(
        one.theirs(one.ids, attention_mask=mask, position_ids=GAPS.expand(2, -1)).logits, theirs
    )  # without a word
    ours = one.ours(one.ids, position_ids=GAPS).logits
    assert ours is not None and not close(ours, theirs, 1e-2)
    bent(one.theirs, GAPS, monkeypatch)
    assert close(ours, one.theirs(one.ids, attention_mask=mask).logits)


@pytest.mark.parametrize("name", ["bloom", "falcon-rw", "mpt"])
@torch.no_grad()
def test_far_out_the_numbers_are_still_those_of_transformers(name: str, tmp_path: Path):
    """Beyond position 256 Falcon's bfloat16 bias is coarse, and its file was published to be read so."""
    length = {"mpt": "max_seq_len", "falcon-rw": "max_position_embeddings"}
    one = case(name, tmp_path, **({length[name]: 400} if name in length else {}))
    ids = tokens(1, 390, seed=9)
    ours, theirs = one.ours(ids).logits, one.theirs(ids).logits
    assert ours is not None and close(ours, theirs)
    if name == "falcon-rw":
        stack = one.ours.spec.decoder
        assert stack is not None and isinstance(stack.score_bias, AlibiSpec)
        finer = one.ours.spec.replace(decoder=stack.replace(score_bias=stack.score_bias.replace(rounded=False)))
        exact = finer.build().eval()
        exact.load_state_dict(one.ours.state_dict())
        other = exact(ids).logits
        assert other is not None and not close(other, theirs, 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["falcon-rw", "falcon-40b-alibi"])
def test_weights_of_falcon_are_those_of_its_eager_attention_with_half_a_bias(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """That attention adds the bias once with the mask and once by itself; half of a float32 is exact."""
    one = case(name, tmp_path)
    eager = reference(dataclasses.replace(one.row, kernel="eager"))
    assert not close(eager(one.ids).logits, one.theirs(one.ids).logits, 1e-2)
    whole = modeling_falcon.build_alibi_tensor
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", lambda *given, **more: whole(*given, **more) / 2)
    theirs = eager(one.ids, output_attentions=True)
    record = lamina.Record("*.weights")
    assert close(one.ours(one.ids, record=record).logits, theirs.logits)  # pyright: ignore
    for mine, other in zip(record.values.values(), theirs.attentions, strict=True):
        assert close(mine, other)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bloom", "falcon-rw", "falcon-40b", "mpt"])
def test_bfloat16_is_as_near_to_float32_as_in_transformers(name: str, tmp_path: Path):
    one = case(name, tmp_path)
    exact = one.theirs(one.ids).logits
    theirs = copy.deepcopy(one.theirs).bfloat16()(one.ids).logits.float()
    ours = copy.deepcopy(one.ours).bfloat16()(one.ids).logits
    assert ours is not None and ours.dtype == torch.bfloat16
    assert float((ours.float() - exact).abs().mean()) < 1.3 * float((theirs - exact).abs().mean())


# MPT


@torch.no_grad()
@pytest.mark.parametrize("heads", [5, 6, 8])
@pytest.mark.parametrize("most", [3, 16])
def test_the_steepness_of_mpt_is_heeded_where_transformers_ignores_it(heads: int, most: int, tmp_path: Path):
    width = 5 * heads
    one = case("mpt", tmp_path, n_heads=heads, d_model=width, attn_config={"alibi_bias_max": most})
    ours = one.ours(one.ids).logits
    assert ours is not None and not close(ours, one.theirs(one.ids).logits, 1e-2)
    one.theirs.transformer.build_mpt_alibi_tensor = partial(build_mpt_alibi_tensor, alibi_bias_max=most)
    assert close(ours, one.theirs(one.ids).logits)
    lamina.save(one.ours.spec.build(), tmp_path / "fresh")
    assert lamina.spec(tmp_path / "fresh") == one.ours.spec


@torch.no_grad()
@pytest.mark.parametrize("learned", [True, False])
def test_mpt_without_alibi_is_gpt2_without_biases(learned: bool, tmp_path: Path):
    """transformers adds ALiBi whatever the file says; llm-foundry learns positions, or has none."""
    fields = {"vocab_size": 97, "n_positions": 20, "n_embd": 30, "n_layer": 2, "n_head": 6}
    made = Row("gpt2", "GPT2LMHeadModel", "GPT2Config", fields | {"activation_function": "gelu"})
    one = Case(made, tmp_path)
    for name, parameter in one.theirs.named_parameters():
        if name.endswith(".bias") or (name.endswith("wpe.weight") and not learned):
            parameter.zero_()
    said = {"model_type": "mpt", "architectures": ["MptForCausalLM"], "vocab_size": 97, "d_model": 30, "n_layers": 2}
    said |= {"n_heads": 6, "max_seq_len": 20, "learned_pos_emb": learned, "attn_config": {"alibi": False}}
    spec = family("mpt").spec(Fields(said))
    assert spec.decoder is not None and spec.decoder.score_bias is None
    assert spec.decoder.position == (LearnedPositionSpec(size=20) if learned else None)
    again = family("mpt").config(spec)
    assert family("mpt").spec(Fields(again)) == spec
    ours = spec.build().eval()
    theirs = one.theirs.transformer
    pairs = {"embedding.weight": theirs.wte.weight, "decoder.norm.weight": theirs.ln_f.weight}
    pairs |= {"decoder.position.weight": theirs.wpe.weight} if learned else {}
    for i, block in enumerate(theirs.h):
        names = (("attention.pre", block.ln_1), ("feedforward.pre", block.ln_2))
        turned = (("attention.op.o", block.attn.c_proj), ("feedforward.op.up", block.mlp.c_fc))
        turned += (("feedforward.op.down", block.mlp.c_proj),)
        pairs |= {f"decoder.layers.{i}.{name}.weight": module.weight for name, module in names}
        pairs |= {f"decoder.layers.{i}.{name}.weight": module.weight.t() for name, module in turned}
        parts = zip("qkv", block.attn.c_attn.weight.t().chunk(3), strict=True)
        pairs |= {f"decoder.layers.{i}.attention.op.{part}.weight": tensor for part, tensor in parts}
    ours.load_state_dict(pairs)
    logits = ours(one.ids).logits
    assert logits is not None and close(logits, one.theirs(one.ids).logits)
    lamina.save(ours, tmp_path / "out")
    assert lamina.load(tmp_path / "out").spec == spec


# What is refused, and old files


@pytest.mark.parametrize(
    "kind, said, message",
    [
        (
            "bloom",
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm is True",
        ),
        ("bloom", {"hidden_size": 20}, "hidden_size=20 is not a multiple of n_head=8"),
        ("bloom", {"n_inner": 20}, "n_inner is 20"),
        ("falcon", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is"),
        ("falcon", {"hidden_size": 18}, "hidden_size=18 is not a multiple"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2"),
        ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn is False"),
        ("falcon", {"multi_query": False, "num_kv_heads": 1}, "num_kv_heads is 1"),
        ("falcon", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
        ("mpt", {"no_bias": False}, "no_bias is False"),
        ("mpt", {"expansion_ratio": 3}, "expansion_ratio is 3"),
        ("mpt", {"logit_scale": 0.5}, "logit_scale is 0.5"),
        ("mpt", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale is 'inv_sqrt_d_model'"),
        ("mpt", {"embedding_fraction": 0.1}, "embedding_fraction is 0.1"),
        ("mpt", {"norm_type": "rmsnorm"}, "norm_type is 'rmsnorm'"),
        ("mpt", {"emb_pdrop": 0.1}, "emb_pdrop is 0.1"),
        ("mpt", {"resid_pdrop": 0.1}, "resid_pdrop is 0.1"),
        ("mpt", {"d_model": 18}, "d_model=18 is not a multiple"),
        ("mpt", {"attn_config": 3}, "attn_config is 3"),
        ("mpt", {"attn_config": {"clip_qkv": 6}}, "attn_config: clip_qkv is 6"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config: qk_ln is True"),
        ("mpt", {"attn_config": {"prefix_lm": True}}, "attn_config: prefix_lm is True"),
        ("mpt", {"attn_config": {"attn_uses_sequence_id": True}}, "attn_config: attn_uses_sequence_id is True"),
        ("mpt", {"attn_config": {"rope": True}}, "attn_config: rope is True"),
        ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_type is 'multiquery_attention'"),
        ("mpt", {"attn_config": {"alibi_bias_max": 0}}, "bias_max=0.0"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(kind: str, said: dict[str, Any], message: str):
    small = {
        "bloom": {"hidden_size": 16, "n_layer": 1},
        "falcon": {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1},
        "mpt": {"n_heads": 4, "d_model": 16, "n_layers": 1},
    }
    family(kind).spec(Fields(small[kind]))
    with pytest.raises((CheckpointError, ValueError), match=message):
        family(kind).spec(Fields(small[kind] | said))


@torch.no_grad()
def test_files_of_bloom_as_they_were_published(tmp_path: Path):
    """bigscience's files have neither the prefix nor today's names of the sizes, and the head is not stored."""
    from safetensors.torch import load_file, save_file

    one = case("bloom", tmp_path)
    said = json.loads((one.source / "config.json").read_text())
    old = {"n_embed": said.pop("hidden_size"), "num_attention_heads": said.pop("n_head")}
    old |= {"num_hidden_layers": said.pop("n_layer"), "seq_length": 2048, "n_inner": None, "pretraining_tp": 2}
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text(json.dumps(said | old))
    tensors = load_file(one.source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "old/model.safetensors", {"format": "pt"})
    model = lamina.load(tmp_path / "old")
    assert model.spec == one.ours.spec.replace(context=2048)
    assert torch.equal(model(one.ids).logits, one.ours(one.ids).logits)  # pyright: ignore
    lamina.save(model, tmp_path / "out")
    assert same_files(tmp_path / "old", tmp_path / "out") == []


@torch.no_grad()
def test_grouping_of_the_fused_matrix(tmp_path: Path):
    """Two key heads, three query heads each: q0 q1 q2 k0 v0 q3 q4 q5 k1 v1, six rows a head."""
    one = case("falcon-40b", tmp_path)
    whole = one.theirs.transformer.h[1].self_attention.query_key_value.weight.unflatten(0, (-1, 6))
    attention = one.ours.decoder.layers[1]["parallel"].op.branches["attention"].op  # pyright: ignore
    q, k, v = (part.weight.unflatten(0, (-1, 6)) for part in (attention.q, attention.k, attention.v))
    assert torch.equal(q, whole[[0, 1, 2, 5, 6, 7]])
    assert torch.equal(k, whole[[3, 8]]) and torch.equal(v, whole[[4, 9]])


# Sizes


CLASSES = {
    "bloom": ("BloomConfig", "BloomForCausalLM"),
    "falcon": ("FalconConfig", "FalconForCausalLM"),
    "mpt": ("MptConfig", "MptForCausalLM"),
}


@pytest.mark.parametrize("name", [name for name, kind in sizes().items() if kind in CLASSES])
def test_published_sizes_have_the_parameters_of_transformers(name: str):
    config, model = (getattr(transformers, one) for one in CLASSES[sizes()[name]])
    with torch.device("meta"):
        theirs = model(config(**family(sizes()[name]).sizes[name]))
    ours = lamina.spec(name).build(device="meta")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
