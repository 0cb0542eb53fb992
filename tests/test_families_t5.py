"""T5: which tables its files of different years hold, and what is said of those that do not fit."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lamina
from lamina.errors import CheckpointError, UnsupportedError
from lamina.families import Fields, family
from lamina.layers import FeedForwardSpec, LanguageHeadSpec
from tests.families import Case, rewrite, row, same_files

Made = Callable[[str], Case]
Change = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, cases = tmp_path_factory.mktemp("t5"), {}
    return lambda name: cases.setdefault(name, Case(row(name), folder))


def altered(case: Case, folder: Path, tensors: Callable[[Change], Change], **fields: Any) -> Path:
    """A copy of the directory with other tensors and fields; None takes a field away."""
    shutil.copytree(case.source, folder)
    save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    def change(said: Change) -> None:
        said.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del said[name]

    rewrite(folder, change)
    return folder


def comes_back(model: lamina.Model, folder: Path) -> bool:
    lamina.save(model, folder.parent / "out")
    return same_files(folder, folder.parent / "out") == []


@torch.no_grad()
def same_numbers(model: lamina.Model, case: Case) -> bool:
    return torch.equal(case.run(case.ids, model=model).hidden, case.run(case.ids).hidden)


def with_copies(tensors: Change) -> Change:
    return tensors | {
        f"{stack}.embed_tokens.weight": tensors["shared.weight"].clone() for stack in ("encoder", "decoder")
    }


def test_files_of_flan_t5_hold_the_embedding_three_times_and_a_head(made: Made, tmp_path: Path):
    """google/flan-t5-*: tie_word_embeddings=false, and neither is_gated_act nor scale_decoder_outputs."""
    case = made("t5-v1.1")
    old = {"tie_word_embeddings": False, "scale_decoder_outputs": None, "is_gated_act": None, "dense_act_fn": None}
    folder = altered(case, tmp_path / "in", with_copies, **old)
    model = lamina.load(folder)
    assert model.spec == case.ours.spec and model.head is not None and model.head.weight is not None
    assert model.spec.head is not None and model.spec.head.scale == 1.0
    assert same_numbers(model, case) and comes_back(model, folder)


def test_a_head_beside_the_words_tied_and_unscaled_is_its_own_and_nothing_is_warned_of(made: Made, tmp_path: Path):
    """What transformers 5 makes of Flan-T5: it says tie_word_embeddings=true in every file."""
    case = made("t5-v1.1")
    folder = altered(case, tmp_path / "in", lambda t: t, tie_word_embeddings=True, scale_decoder_outputs=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lamina.load(folder)
    assert model.spec == case.ours.spec and same_numbers(model, case) and comes_back(model, folder)


def test_files_of_version_1_hold_the_embedding_twice_and_a_bias_that_nothing_reads(made: Made, tmp_path: Path):
    case = made("t5")
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    more = {unread: torch.randn(8, 3)}
    folder = altered(
        case, tmp_path / "in", lambda t: with_copies(t) | {"lm_head.weight": t["shared.weight"].clone()} | more
    )
    model = lamina.load(folder)
    assert model.spec == case.ours.spec and same_numbers(model, case) and comes_back(model, folder)
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    lamina.save(model, tmp_path / "changed")
    written = load_file(tmp_path / "changed/model.safetensors")
    for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(written[name], model.embedding.weight), name


@pytest.mark.parametrize("name", ["t5-encoder", "t5-bare"])
def test_the_embedding_is_read_under_the_name_of_a_stack(made: Made, name: str, tmp_path: Path):
    case = made(name)
    renamed = {"shared.weight": "encoder.embed_tokens.weight"}
    folder = altered(case, tmp_path / "in", lambda t: {renamed.get(n, n): one for n, one in t.items()})
    model = lamina.load(folder)
    assert model.spec == case.ours.spec and same_numbers(model, case) and comes_back(model, folder)


def test_stacks_with_different_embeddings_are_refused(made: Made, tmp_path: Path):
    folder = altered(
        made("t5"), tmp_path / "in", lambda t: with_copies(t) | {"encoder.embed_tokens.weight": torch.zeros(97, 36)}
    )
    with pytest.raises(CheckpointError, match=r"encoder.embed_tokens.weight differs from shared.weight; both stacks"):
        lamina.load(folder)


def test_scale_and_tie_are_read_from_both_fields():
    said = {"model_type": "t5", "num_layers": 1}
    width = 512
    for fields, tied, scale in (
        ({}, True, width**-0.5),
        ({"tie_word_embeddings": False}, False, 1.0),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, True, 1.0),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, False, width**-0.5),
    ):
        head = family("t5").spec(Fields(said | fields)).head
        assert head is not None and (head.tied, head.scale) == (tied, scale), fields
    head = family("mt5").spec(Fields(said | {"model_type": "mt5"})).head
    assert head is not None and (head.tied, head.scale) == (True, 1.0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"is_decoder": True}, "is_decoder is True"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"}, "dense_act_fn is 'relu'"),
        ({"feed_forward_proj": "gated-gelu", "is_gated_act": False}, "is_gated_act is False"),
        ({"feed_forward_proj": "maxout"}, "feed_forward_proj is 'maxout'; known here"),
        (
            {"architectures": ["T5ForTokenClassification"]},
            "known here: T5 with ForConditionalGeneration, Model, EncoderM",
        ),
        ({"decoder_start_token_id": "a"}, "decoder_start_token_id is 'a'; it must be a token id"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields: Change, message: str):
    with pytest.raises(ValueError, match=message):
        family("t5").spec(Fields({"model_type": "t5", "num_layers": 1, **fields}))


def test_an_exact_gelu_under_a_gate_has_no_name_in_this_layout(made: Made, tmp_path: Path):
    """What "gated-gelu" means is the tanh form, as the code that trained 1.1 has it."""
    spec = made("t5-v1.1").ours.spec
    text = spec.to_json().replace('"gelu_tanh"', '"gelu"')
    exact = lamina.ModelSpec.from_json(text)
    assert any(isinstance(part, FeedForwardSpec) and part.act == "gelu" for _, part in exact.walk())
    with pytest.raises(UnsupportedError, match=r"feedforward|act"):
        lamina.save(exact.build(), tmp_path / "out")


def test_published_sizes_say_the_length_they_were_trained_at_and_files_without_it_do_not():
    assert lamina.spec("t5/small").context == 512 and lamina.account("t5/small").context == 512
    chosen = family("t5")
    said = {"model_type": "t5", "d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 40}
    for more in ({}, {"n_positions": 77}):
        spec = chosen.spec(Fields(said | more))
        assert spec.context == more.get("n_positions")
        assert chosen.spec(Fields(chosen.config(spec))) == spec


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_dropout_stands_where_it_was_trained_with(rate: float):
    """On probabilities, inside the feed-forward, on each step, on the input and after the last norm, of both stacks."""
    said = {"model_type": "t5", "d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 40}
    spec = family("t5").spec(Fields(said | {"dropout_rate": rate}))
    rates = [
        value
        for _, part in spec.walk()
        for name, value in vars(part).items()
        if name in ("dropout", "output_dropout") and not isinstance(part, LanguageHeadSpec)
    ]
    # Two stacks of two, and 2 and 3 steps with as many operations.
    assert rates == [rate] * (2 * 2 + 2 * (2 + 3))
