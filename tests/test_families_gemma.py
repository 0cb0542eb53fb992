"""Gemma: half precision to the bit, configurations of every age, and the file with a vision tower."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lamina
from lamina.errors import LaminaError
from lamina.families import Fields, family
from lamina.layers import AttentionSpec, FeedForwardSpec, LinearScaling
from tests.families import Case, close, row, same_files, tokens

VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "vision_use_head": False,
}


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "llama", "qwen3"])
@torch.no_grad()
def test_scale_and_norms_are_exact_in_bfloat16(name: str, tmp_path: Path):
    """Gemma rounds sqrt(width) to the dtype and multiplies its norms in float32; LLaMA casts before it multiplies."""
    case = Case(row(name), tmp_path)
    theirs, ours = copy.deepcopy(case.theirs).bfloat16(), lamina.load(case.source, dtype=torch.bfloat16)
    record = lamina.Record("decoder.input")
    ours(case.ids, record=record)
    embedded = theirs(case.ids, output_hidden_states=True).hidden_states[0]
    assert torch.equal(record.values["decoder.input"], embedded)
    step = ours.get_submodule("decoder.layers.0.attention")
    assert torch.equal(step.pre(embedded), theirs.model.layers[0].input_layernorm(embedded))
    if name == "gemma":
        plain = torch.nn.functional.embedding(case.ids, ours.embedding.weight)
        assert not torch.equal(record.values["decoder.input"], plain)


def attentions(spec: lamina.ModelSpec) -> list[AttentionSpec]:
    return [part for _, part in spec.walk() if isinstance(part, AttentionSpec)]


def read(model_type: str, **said: Any) -> lamina.ModelSpec:
    return family(model_type).spec(Fields({"model_type": model_type, **said}))


def test_gelu_of_the_first_files_is_its_tanh_form():
    said = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    acts = {
        part.act
        for act in ("gelu", "gelu_pytorch_tanh")
        for _, part in read("gemma", hidden_act=act, **said).walk()
        if isinstance(part, FeedForwardSpec)
    }
    assert acts == {"gelu_tanh"}


def test_gemma_3_says_the_same_in_old_words_and_new():
    """The text_config of the published 4b leaves out most fields, and names the rotary bases in the old way."""
    old = read(
        "gemma3_text",
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        sliding_window=1024,
    )
    types = [*["sliding_attention"] * 5, "full_attention"] * 6
    new = read(
        "gemma3_text",
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        sliding_window=1024,
        layer_types=types[:34],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert old == new == lamina.spec("gemma3/4b")
    local, everywhere = attentions(old)[0], attentions(old)[5]
    assert local.rotary is not None and local.rotary.base == 1e4 and local.rotary.scaling is None
    assert everywhere.rotary is not None and everywhere.rotary.base == 1e6
    assert everywhere.rotary.scaling == LinearScaling(factor=8.0)


@pytest.mark.parametrize(
    "name, scalar, layers, windows",
    [
        ("gemma2/2b", None, 26, [4096, None]),
        ("gemma2/27b", 144, 46, [4096, None]),
        ("gemma3/1b", None, 26, [512] * 5 + [None]),
        ("gemma3/27b", 168, 62, [1024] * 5 + [None]),
    ],
)
def test_published_sizes_alternate_and_scale_as_published(name: str, scalar: int | None, layers: int, windows: list):
    found = attentions(lamina.spec(name))
    assert len(found) == layers
    assert {part.scale for part in found} == {None if scalar is None else scalar**-0.5}
    seen = [getattr(getattr(part.pattern, "second", None), "back", None) for part in found]
    assert seen == (windows * layers)[:layers]
    assert {part.softcap for part in found} == {50.0 if "gemma2" in name else None}


@pytest.mark.parametrize(
    "model_type, said, message",
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; only None is supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True; only False"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0.0; it must be more than 0"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must list 26 times"),
        ("gemma2", {"num_key_value_heads": 3}, "heads=8 must be a multiple of key_heads=3"),
        ("gemma3", {}, "text_config is missing"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(model_type: str, said: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read(model_type, **said)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A Gemma 3 with a vision tower, and its directory."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.Gemma3Config(
        text_config=dict(row("gemma3").fields), vision_config=VISION, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("gemma3") / "in"
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_of_a_model_with_a_vision_tower_the_text_part_is_read(pictures: tuple[Any, Path], tmp_path: Path):
    model, folder = pictures
    ids = tokens(2, 13, seed=1)
    with pytest.warns(UserWarning, match="only the text part of Gemma 3 is read; its vision tower is kept for saving"):
        ours = lamina.load(folder)
    assert close(ours(ids).logits, model(ids).logits)
    lamina.save(ours, tmp_path / "same")
    assert same_files(folder, tmp_path / "same") == []  # with the vision tower
    ours.origin = None
    lamina.save(ours, tmp_path / "text")  # the text part alone is a Gemma 3 of its own
    assert json.loads((tmp_path / "text/config.json").read_text())["model_type"] == "gemma3_text"
    alone, info = transformers.Gemma3ForCausalLM.from_pretrained(
        tmp_path / "text", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()) and close(alone(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_changed_text_part_goes_back_beside_its_vision_tower(pictures: tuple[Any, Path], tmp_path: Path):
    model, folder = pictures
    with pytest.warns(UserWarning, match="only the text part"):
        ours = lamina.load(folder)
    ours.embedding.weight[5] += 1.0
    lamina.save(ours, tmp_path / "out")
    again, info = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    ids = tokens(2, 13, seed=1)
    assert close(again(ids).logits, ours(ids).logits) and not close(again(ids).logits, model(ids).logits, 1e-3)
    tower = dict(again.named_parameters())
    assert all(torch.equal(p, tower[name]) for name, p in model.named_parameters() if "vision_tower" in name)


def test_a_size_without_weights_says_so():
    with pytest.raises(LaminaError, match="'gemma3/4b' is a published architecture and has no weights here"):
        lamina.load("gemma3/4b")
