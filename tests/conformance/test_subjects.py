"""Subjects: what a model of transformers is asked as a subject, and what is no subject."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers

import lamina
from lamina.conformance import open_with_transformers, subject_of
from lamina.conformance.subject import LARGE, long, positions, random_ids
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from tests import tiny
from tests.families import close, reference, row


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def test_what_is_no_model_is_refused():
    for wrong in (torch.nn.Linear(2, 2), "llama", None):
        with pytest.raises(LaminaError, match=f"verify takes a model .* this is a {type(wrong).__name__}"):
            lamina.verify(wrong)
    with pytest.raises(UnsupportedError, match="reads input_features"):
        lamina.verify(reference(row("whisper")))


@pytest.mark.parametrize(
    "name, first, caches",
    [("llama", 0, 1), ("roberta-mlm", 4, 0), ("bert-mlm", 0, 0), ("bloom", None, 1), ("t5", None, 1), ("opt", 0, 1)],
)
@torch.no_grad()
def test_what_is_found_out_of_theirs(name: str, first: int | None, caches: int):
    """Where positions begin, whether keys come back, and how many places there are."""
    model = reference(row(name))
    facts = subject_of(model).facts
    assert facts.first == first and len(facts.caches) == caches
    if name == "roberta-mlm":  # of 40 places the first four are padding's and those before it
        assert facts.context == 36
    special = {model.config.pad_token_id, model.config.eos_token_id}
    assert not special & set(facts.choices.tolist())


@torch.no_grad()
def test_theirs_is_asked_as_its_users_ask_it():
    """A cached read hands over keys, and a mask of all columns once there is one."""
    model = reference(row("llama"))
    subject = subject_of(model)
    ids = random_ids(subject, 2, 9)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    kept = subject.new_cache("as returned", 2, 9)
    (first,) = subject.read(ids[:, :6], mask[:, :6], cache=kept)
    (rest,) = subject.read(ids[:, 6:], cache=kept)  # ones
    assert kept.length == 9 and torch.equal(kept.mask, mask)
    keys = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    hand = model(ids[:, 6:], attention_mask=mask, past_key_values=keys).logits
    assert torch.equal(rest, hand) and close(first, model(ids[:, :6], attention_mask=mask[:, :6]).logits)
    backend = model.config._attn_implementation
    subject.read(ids, backend="sdpa")
    assert model.config._attn_implementation == backend


@torch.no_grad()
def test_several_ends_are_all_left_out():
    model = reference(row("llama"), eos_token_id=[96, 5])
    assert not {5, 96} & set(subject_of(model).facts.choices.tolist())


def test_positions_and_lengths():
    subject = subject_of(tiny.model())
    assert positions(subject, 3, 2).tolist() == [[0, 1, 2, 0, 1]]
    assert positions(subject, 2, 2, gap=5).tolist() == [[0, 1, 7, 8]]
    facts = subject.facts
    assert facts.length == 16 and facts.context == 64
    assert long(facts, 10) == 64 and long(facts, LARGE + 1) == 16


def test_a_folder_is_opened_by_transformers_as_the_class_that_it_names(tmp_path: Path, monkeypatch):
    tiny.checkpoint(tmp_path / "tiny")
    model = open_with_transformers(tmp_path / "tiny")
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert open_with_transformers(tmp_path / "tiny", "bfloat16").dtype == torch.bfloat16
    lamina.save(tiny.model(), tmp_path / "native", format="native")
    with pytest.raises(UnsupportedError, match="transformers opens directories with a config.json"):
        open_with_transformers(tmp_path / "native")
    (tmp_path / "tiny/config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(CheckpointError, match="transformers cannot open it: .*no such"):
        open_with_transformers(tmp_path / "tiny")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'lamina\[transformers\]'"):
        open_with_transformers(tmp_path / "tiny")


def test_neither_the_model_nor_random_numbers_are_changed():
    model = reference(row("gpt2")).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    report = lamina.verify(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not report.passed and len(report.rows) > 20
