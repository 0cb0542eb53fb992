"""M2M-100 and NLLB: padding beside transformers', the language that is written first, layers left out in training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lamina
from lamina.errors import CheckpointError
from lamina.families import Fields, family
from lamina.layers import AttentionSpec, CrossAttentionSpec, FeedForwardSpec, SinusoidalPositionSpec
from tests.families import M2M100, Case, Row, close, row, tokens
from tests.test_families import pad
from tests.test_families_t5 import Change, Made, altered, comes_back, same_numbers

BOTH = ["m2m100", "nllb-moe"]
LANGUAGE = 7


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, cases = tmp_path_factory.mktemp("m2m100"), {}
    return lambda name: cases.setdefault(name, Case(row(name), folder))


def padded(lengths: tuple[int, ...], side: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts and their mask, with the id of padding where transformers looks for it: there positions do not count it."""
    ids, mask = pad([tokens(1, length, seed=seed + length)[0] for length in lengths], side)
    return ids.masked_fill(mask == 0, 1), mask


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("read", ["left", "right", "both"])
@torch.no_grad()
def test_padding_on_any_side_is_that_of_transformers(made: Made, name: str, side: str, read: str):
    case = made(name)
    (ids, mask), (source, seen) = padded((9, 4, 7), side, 1), padded((3, 11, 6), read, 40)
    theirs = case.theirs(source, seen, decoder_input_ids=ids, decoder_attention_mask=mask)
    ours = case.ours(source, seen, decoder_input_ids=ids, decoder_attention_mask=mask)
    assert ours.logits is not None and ours.encoder_output is not None
    real, read_ = mask.bool(), seen.bool()
    assert close(ours.logits[real], theirs.logits[real])
    assert close(ours.encoder_output[read_], theirs.encoder_last_hidden_state[read_])


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_language_comes_first_as_the_file_or_the_caller_says(
    made: Made, name: str, beams: int, side: str, tmp_path: Path
):
    """transformers is told the language at each call; here the decoder has begun with it."""
    case = made(name)
    source, seen = padded((8, 5), side, 3)
    more: dict[str, Any] = {"max_new_tokens": 7, "min_new_tokens": 7}
    model = copy.deepcopy(case.theirs)
    told = model.generate(
        source, attention_mask=seen, forced_bos_token_id=LANGUAGE, do_sample=False, num_beams=beams, **more
    )
    assert (told[:, :2] == torch.tensor([3, LANGUAGE])).all()
    more |= {"beams": beams} if beams > 1 else {}
    begun = torch.tensor([[3, LANGUAGE]] * 2)
    fewer = more | {"max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(lamina.generate(case.ours, source, seen, decoder_input_ids=begun, **fewer), told)
    folder = altered(case, tmp_path / "in", lambda tensors: tensors)
    said = json.loads((folder / "generation_config.json").read_text()) | {"forced_bos_token_id": LANGUAGE}
    (folder / "generation_config.json").write_text(json.dumps(said))
    assert torch.equal(lamina.generate(lamina.load(folder), source, seen, **more), told)


@torch.no_grad()
def test_positions_go_on_beyond_the_context(made: Made):
    """Sinusoids need no table: transformers makes its own longer where a text is."""
    case = made("m2m100")
    ids, source = tokens(1, 60, seed=1), tokens(1, 71, seed=2)
    assert case.ours.spec.context == 40
    ours, theirs = case.ours(source, decoder_input_ids=ids), case.theirs(source, decoder_input_ids=ids)
    assert ours.logits is not None and close(ours.logits, theirs.logits)


@pytest.mark.parametrize("seed", range(6))
def test_the_layers_that_training_leaves_out_are_those_of_transformers(seed: int, tmp_path: Path):
    still = M2M100 | {"dropout": 0.0, "attention_dropout": 0.0, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.4}
    case = Case(Row("dropped", "M2M100ForConditionalGeneration", "M2M100Config", still), tmp_path)
    ours, theirs = copy.deepcopy(case.ours).train(), copy.deepcopy(case.theirs).train()
    torch.manual_seed(seed)
    expected = case.theirs_on(case.ids, theirs).logits
    torch.manual_seed(seed)
    found = case.run(case.ids, model=ours).logits
    assert found is not None and close(found.detach(), expected.detach())
    ours.encoder.eval()  # pyright: ignore
    again = case.run(case.ids, model=ours, cache=ours.new_cache(batch=2)).logits  # a cache would miss their keys
    whole = case.run(case.ids, model=case.ours).logits
    assert again is not None and whole is not None and close(again.detach(), whole.detach())


def test_files_of_2021_hold_every_table_under_each_of_its_names_and_sinusoids(made: Made, tmp_path: Path):
    case = made("m2m100")

    def old(tensors: Change) -> Change:
        table = tensors["model.shared.weight"]
        names = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
        more = {f"model.{side}.embed_positions.weights": torch.ones(42, 36) for side in ("encoder", "decoder")}
        return tensors | {name: table.clone() for name in names} | more | {"model.encoder.version": torch.ones(1)}

    folder = altered(case, tmp_path / "in", old)
    model = lamina.load(folder)
    assert model.spec == case.ours.spec and same_numbers(model, case) and comes_back(model, folder)


@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_a_head_of_its_own_is_written_with_every_table(made: Made, name: str, tmp_path: Path):
    case = made(name)
    spec = case.ours.spec
    assert spec.head is not None
    model = spec.replace(head=spec.head.replace(tied=False)).build(seed=3).eval()
    lamina.save(model, tmp_path / "out")
    kind = getattr(transformers, case.row.model)
    theirs, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    source, text = tokens(2, 9, seed=1), tokens(2, 5, seed=2)
    assert close(model(source, decoder_input_ids=text).logits, theirs(source, decoder_input_ids=text).logits)  # pyright: ignore
    assert lamina.load(tmp_path / "out").spec == model.spec


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pad_token_id": None}, "pad_token_id is null; positions count from it"),
        ({"encoder_layerdrop": 1.0}, "layer_dropout=1.0 must be from 0 to below 1"),
        ({"d_model": 30, "decoder_attention_heads": 7}, "d_model=30 is not a multiple of .*_attention_heads=16"),
        ({"activation_function": "rely"}, "activation_function is 'rely'"),
        ({"architectures": ["M2M100ForCausalLM"]}, "known here: M2M100 with ForConditionalGeneration, Model"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        family("m2m_100").spec(Fields({"model_type": "m2m_100", **fields}))


def test_each_field_reaches_its_part():
    said = {"dropout": 0.2, "attention_dropout": 0.3, "activation_dropout": 0.4, "pad_token_id": 7, "encoder_layers": 1}
    said |= {"encoder_layerdrop": 0.1, "decoder_layerdrop": 0.15}
    spec = family("m2m_100").spec(Fields({"model_type": "m2m_100", **said, "decoder_layers": 1}))
    assert spec.embedding.padding == 7 and spec.embedding.scale == "root" and spec.special.decoder_start == 2
    for stack, steps, left_out in ((spec.encoder, 2, 0.1), (spec.decoder, 3, 0.15)):
        assert stack is not None and stack.dropout == 0.2 and stack.layer_dropout == left_out
        assert stack.position == SinusoidalPositionSpec(order="halves", offset=8)
        (layer,) = stack.layers
        assert [step.dropout for step in layer.steps] == [0.2] * steps
        inner = [part.dropout for _, part in layer.walk() if isinstance(part, AttentionSpec | CrossAttentionSpec)]
        assert inner == [0.3] * (steps - 1)
        assert [part.dropout for _, part in layer.walk() if isinstance(part, FeedForwardSpec)] == [0.4]


def test_positions_that_count_from_elsewhere_are_named(made: Made, tmp_path: Path):
    spec = made("m2m100").ours.spec
    assert spec.decoder is not None
    moved = spec.decoder.replace(position=SinusoidalPositionSpec(order="halves", offset=3))
    with pytest.raises(lamina.LaminaError, match="position.offset is 3, and m2m_100's config.json can only say 2"):
        lamina.save(spec.replace(decoder=moved).build(), tmp_path / "out")


def test_tables_of_the_stacks_that_differ_are_refused(made: Made, tmp_path: Path):
    other = {"model.decoder.embed_tokens.weight": torch.ones(97, 36)}
    folder = altered(made("m2m100"), tmp_path / "in", lambda tensors: tensors | other)
    with pytest.raises(CheckpointError, match=r"model.decoder.embed_tokens.weight differs from model.shared.weight"):
        lamina.load(folder)
