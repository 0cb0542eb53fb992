"""GPT-3 and PaLM, whose weights were never published: what is built from their sizes is what the papers say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.exporting import exportable
from lamina.families import Fields, family, note
from tests.small import build, ids

SMALL = {"layers": 3, "width": 20, "heads": 3, "head_dim": 8, "vocabulary": 40, "context": 64}


def palm() -> lamina.ModelSpec:
    return family("palm").spec(Fields(SMALL))


def naive_palm(weights: dict[str, Tensor], ids: list[int], heads: int, size: int) -> Tensor:
    """The equations of arXiv:2204.02311, section 2, token by token: x + MLP(LN(x)) + Attention(LN(x)), SwiGLU, one
    key and one value for all heads, RoFormer's rotation of neighbours, logits from the embedding over sqrt(width)."""
    table = weights["embedding.weight"]
    width = table.shape[1]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        mean = x.sum() / width
        return weight * (x - mean) / torch.sqrt(((x - mean) ** 2).sum() / width + 1e-5)

    def turn(x: Tensor, place: int) -> Tensor:
        out = x.clone()
        for i in range(size // 2):
            angle = place * 10_000 ** (-2 * i / size)
            a, b = x[2 * i], x[2 * i + 1]
            out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
            out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    stream = [table[i] for i in ids]
    for layer in range(SMALL["layers"]):
        path = f"decoder.layers.{layer}.parallel."
        normed = [norm(x, weights[f"{path}pre.weight"]) for x in stream]
        q, k, v, o = (weights[f"{path}op.branches.attention.op.{part}.weight"] for part in "qkvo")
        gate, up, down = (weights[f"{path}op.branches.feedforward.op.{part}.weight"] for part in ("gate", "up", "down"))
        keys, values = [turn(k @ y, place) for place, y in enumerate(normed)], [v @ y for y in normed]
        after = []
        for place, (x, y) in enumerate(zip(stream, normed, strict=True)):
            found = []
            for head in range(heads):
                query = turn(q[head * size : (head + 1) * size] @ y, place)
                scores = torch.stack([query @ key / math.sqrt(size) for key in keys[: place + 1]])
                chances = scores.exp() / scores.exp().sum()
                found.append(sum(chance * value for chance, value in zip(chances, values[: place + 1], strict=True)))
            swish = gate @ y
            swish = swish / (1 + torch.exp(-swish))
            after.append(x + o @ torch.cat(found) + down @ (swish * (up @ y)))
        stream = after
    return torch.stack([table @ norm(x, weights["decoder.norm.weight"]) / math.sqrt(width) for x in stream])


@torch.no_grad()
def test_palm_is_the_equations_of_its_paper():
    model, text = build(palm()), ids(2, 9, seed=1)
    out = model(text).logits
    for row, logits in zip(text, out, strict=True):
        expected = naive_palm(model.state_dict(), row.tolist(), SMALL["heads"], SMALL["head_dim"])
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)  # phases are in float32, whatever the dtype


@torch.no_grad()
def test_palm_is_the_published_model_of_its_shape():
    """Cohere's Command R is PaLM with several key heads and its own scale of the logits: so with one it is PaLM."""
    from transformers import CohereConfig, CohereForCausalLM

    spec = family("palm").spec(Fields(SMALL | {"head_dim": 10, "heads": 2}))
    assert spec.head is not None
    config = CohereConfig(
        vocab_size=40,
        hidden_size=20,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        logit_scale=spec.head.scale,
        layer_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=None,
    )
    theirs = CohereForCausalLM._from_config(config, attn_implementation="eager").eval()
    ours = build(spec, dtype=torch.float32)
    state = dict(ours.state_dict())
    renamed = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["decoder.norm.weight"],
    }
    for i in range(3):
        path, inner = f"decoder.layers.{i}.parallel.", f"model.layers.{i}."
        renamed[f"{inner}input_layernorm.weight"] = state[f"{path}pre.weight"]
        for part in "qkvo":
            renamed[f"{inner}self_attn.{part}_proj.weight"] = state[f"{path}op.branches.attention.op.{part}.weight"]
        for part in ("gate", "up", "down"):
            renamed[f"{inner}mlp.{part}_proj.weight"] = state[f"{path}op.branches.feedforward.op.{part}.weight"]
    renamed["lm_head.weight"] = state["embedding.weight"]
    theirs.load_state_dict(renamed, strict=True)
    text = ids(2, 11, seed=2)
    torch.testing.assert_close(ours(text).logits, theirs(text).logits, rtol=1e-5, atol=1e-5)


def test_what_holds_for_every_model_holds_for_palm():
    report = lamina.verify(build(palm(), dtype=torch.float32))
    assert report.passed, str(report)


def test_palm_has_no_files_of_hugging_face_and_keeps_everything_in_ours(tmp_path: Path):
    model = build(palm(), dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="not exportable to the Hugging Face layout: .*format='native'"):
        lamina.save(model, tmp_path / "out")
    with pytest.raises(UnsupportedError, match=r"config\.json can only say .*format='native'"):
        exportable(lamina.spec("palm/8b"))
    lamina.save(model, tmp_path / "out", format="native")
    again = lamina.load(tmp_path / "out")
    assert again.spec == model.spec
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text(json.dumps({"model_type": "palm"}))
    (tmp_path / "odd/model.safetensors").write_bytes((tmp_path / "out/model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="model_type is 'palm', whose weights were never published"):
        lamina.load(tmp_path / "odd")


def test_matrices_of_palm_are_the_published_counts():
    """8.63, 62.50 and 540.35 billion (section 2.1) leave the scales of the norms out: (L + 1) d of them."""
    for name, matrices, said in (
        ("palm/8b", 8_631_877_632, 8.63),
        ("palm/62b", 62_495_129_600, 62.50),
        ("palm/540b", 540_354_281_472, 540.35),
    ):
        spec = lamina.spec(name)
        assert spec.decoder is not None
        scales = (len(spec.decoder.layers) + 1) * spec.width
        assert lamina.account(name, context=8).parameters == matrices + scales
        assert round(matrices / 1e9, 2) == said


@torch.no_grad()
def test_gpt3_is_a_longer_gpt2(tmp_path: Path):
    """A model of its shape is one that transformers opens as GPT-2."""
    from transformers import GPT2LMHeadModel

    for size in family("gpt2").sizes:
        spec = lamina.spec(size)
        assert exportable(spec)[0].model_type == "gpt2"
    said = family("gpt2").sizes["gpt3/xl"] | {
        "n_layer": 3,
        "n_embd": 36,
        "n_head": 3,
        "vocab_size": 97,
        "n_positions": 32,
    }
    model = build(family("gpt2").spec(Fields(said)), dtype=torch.float32)
    lamina.save(model, tmp_path / "out")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    text = ids(2, 32, seed=3)
    torch.testing.assert_close(model(text).logits, theirs(text).logits, rtol=1e-5, atol=1e-4)


def test_what_is_not_published_is_said():
    assert "locally banded" in (note("gpt3/175b") or "") and "not published" in (note("palm/8b") or "")
    assert note("gpt2/small") is None and note("no/such") is None
    assert lamina.spec("gpt3/175b").context == 2048
    with pytest.raises(LaminaError, match="did you mean 'palm/540b'"):
        lamina.spec("palm/54b")
