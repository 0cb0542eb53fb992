"""GPT-J, GPT-NeoX and OPT: old files, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lamina
from lamina.errors import CheckpointError
from lamina.families import Fields, family
from tests.families import Case, reference, row, same_files


def stored(tmp_path: Path, name: str) -> Path:
    case = Case(row(name), tmp_path)
    reference(case.row).save_pretrained(case.folder)
    return case.folder


def test_old_files_of_gpt_neox_are_read_and_come_back(tmp_path: Path):
    """They hold the mask and the frequencies of every layer, and say rotary_pct. Both names of the head are known."""
    folder = stored(tmp_path, "gpt_neox")
    new = lamina.load(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    for i in range(3):
        inner = f"gpt_neox.layers.{i}.attention."
        tensors[f"{inner}bias"] = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
        tensors[f"{inner}masked_bias"] = torch.tensor(-1e9)
        tensors[f"{inner}rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    said.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(said | {"rotary_pct": 0.5, "rotary_emb_base": 300}))
    old = lamina.load(folder)
    assert old.spec == new.spec
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    lamina.save(old, tmp_path / "out")
    assert same_files(folder, tmp_path / "out") == []


@pytest.mark.parametrize(
    "model_type, said, message",
    [
        ("gptj", {"rotary_dim": None}, "rotary_dim is null; it must say how many features of a head turn"),
        ("gptj", {"n_embd": 50, "n_head": 16}, "n_embd=50 is not a multiple of n_head=16"),
        ("gptj", {"add_cross_attention": True}, "add_cross_attention is True"),
        (
            "opt",
            {"architectures": ["OPTModel"], "word_embed_proj_dim": 512},
            "a bare OPTModel with word_embed_proj_dim=512 below hidden_size=768: .* OPTForCausalLM",
        ),
        ("gpt_neox", {"hidden_size": 100}, "hidden_size=100 is not a multiple of num_attention_heads=64"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(model_type: str, said: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        family(model_type).spec(Fields(said))


def test_a_layout_names_what_it_cannot_say():
    parallel, sequential = lamina.spec("gpt-j/6b"), lamina.spec("opt/125m")
    with pytest.raises(CheckpointError, match=r"decoder.layers.0.steps.0.op is a AttentionSpec"):
        family("gptj").config(sequential)  # pyright: ignore[reportOptionalCall]
    with pytest.raises(CheckpointError, match="decoder.position is None"):
        family("opt").config(parallel.replace(decoder=sequential.decoder.replace(position=None)))  # pyright: ignore
    with pytest.raises(CheckpointError, match="encoder is None"):
        family("bert").config(parallel)  # pyright: ignore[reportOptionalCall]
    with pytest.raises(CheckpointError, match="decoder.layers is empty"):
        family("gpt2").config(sequential.replace(decoder=sequential.decoder.replace(layers=())))  # pyright: ignore
