"""`verify` finds the faults that were reproduced in released transformers (5.23), live, and none of them in the same
models of ours.

The numbers are those of tests/test_peers.py. What is no property of a model that is handed over (a loader's refusal, a
price, a start) cannot be found from outside, and docs/conformance.md says so of each.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lamina
from lamina.conformance import Report, Row
from lamina.layers import FeedForwardSpec
from lamina.specs import edit
from tests.families import Case, reference, row
from tests.families import Row as Tiny

CACHED = "cached decoding = the whole text, cache {!r}"
BEYOND = "cached decoding = the whole text, beyond the trained length"


def tiny(name: str, kernel: str = "eager", **fields: Any) -> Tiny:
    one = row(name)
    return dataclasses.replace(one, fields=one.fields | fields, kernel=kernel)


MODELS = {
    "llama": tiny("llama", "sdpa"),
    "llama, with fields of others": tiny("llama", sliding_window=4, num_kv_heads=2),
    "bloom": tiny("bloom"),
    "switch": tiny("switch", expert_capacity=2),
    "bigbird": tiny("bigbird"),
    "qwen3-moe": tiny("qwen3-moe"),
    "mixtral": tiny("mixtral"),
    "llama-dynamic": tiny("llama-dynamic"),
    "gpt2": tiny("gpt2"),
}
FAULTS: list[tuple[str, str, str, str]] = [
    ("R1", "llama", "packed = alone, told by positions and a mask of ones", ""),
    ("R1", "llama", "packed = alone, told by positions with a cache", ""),
    ("R2", "bloom", "positions are heeded or refused", ""),
    ("R2", "llama", "an argument that does not exist is refused by name", ""),
    ("R3", "llama", "a cast to bfloat16 rounds weights only", ""),
    ("R4", "switch", CACHED.format("as returned"), CACHED.format("auto")),
    ("R4", "switch", "sources padded on the left = alone", ""),
    ("R4", "switch", "padded on the left = alone", ""),
    ("R5", "bigbird", "a text read before changes nothing", ""),
    ("R6", "qwen3-moe", "training that goes on from files = without a break", ""),
    ("R6", "mixtral", "training that goes on from files = without a break", ""),
    ("R8", "llama, one layer narrower", "what is saved is read again, bit for bit", ""),
    ("R10", "mixtral", "the loss of a router is in the loss", ""),
    ("R11", "llama, with fields of others", "a field of the configuration that does not exist is refused by name", ""),
    ("R12", "llama", "attention that is asked for is given", ""),
    ("R13", "llama-dynamic", BEYOND, ""),
    ("R14", "switch", "a refusal is at most 400 characters", ""),
    ("R15", "gpt2", "padded on the left = alone", ""),
]
"""What was found, in which tiny model, the row that must fail, and the row of ours where its name is another."""

Reports = Callable[[str], tuple[Report, Report]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("faults")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    @cache
    def both(name: str) -> tuple[Report, Report]:
        """What `verify` says of theirs, and of ours read from their files."""
        theirs, ours = narrowed(folder) if "narrower" in name else made(folder / name, MODELS[name])
        return lamina.verify(theirs), lamina.verify(ours)

    return both


def made(folder: Path, one: Tiny) -> tuple[Any, lamina.Model]:
    case = Case(one, folder)
    return case.theirs, case.ours


def narrowed(folder: Path) -> tuple[Any, lamina.Model]:
    """A Llama whose first feed-forward network has lost its last 10 features: by hand, and in our spec."""
    theirs, ours = made(folder / "whole", tiny("llama"))
    theirs = copy.deepcopy(theirs)
    network = theirs.model.layers[0].mlp
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            whole, out = getattr(network, name), name != "down_proj"
            part = torch.nn.Linear(whole.in_features - 10 * (not out), whole.out_features - 10 * out)
            part.weight.copy_(whole.weight[:40] if out else whole.weight[:, :40])
            part.bias.copy_(whole.bias[:40] if out else whole.bias)
            setattr(network, name, part)
    first = "decoder.layers.0.feedforward.op"
    spec = edit(ours.spec, FeedForwardSpec, lambda path, part: part.replace(hidden=40) if path == first else part)
    return theirs, spec.build()


def only(report: Report, name: str) -> Row:
    (found,) = [row for row in report.rows if row.property == name]
    return found


@pytest.mark.parametrize("number, model, theirs, ours", FAULTS, ids=lambda value: value[:40] or "same")
def test_it_is_found_there_and_not_here(number: str, model: str, theirs: str, ours: str, reports: Reports):
    there, here = reports(model)
    assert only(there, theirs).verdict == "fails", f"{number}: transformers has mended it? {there}"
    assert only(here, ours or theirs).verdict == "holds" and here.passed, f"{number}: {here}"


def test_what_is_found_is_said(reports: Reports):
    """The rows name what was there, in figures or words."""
    fields = only(reports("llama, with fields of others")[0], FAULTS[13][2])
    assert fields.note.endswith("so are those of this model: sliding_window, num_kv_heads")
    length = only(reports("switch")[0], "a refusal is at most 400 characters")
    assert length.compared == "the longest: use_cache=True" and (length.worst or 0) > 3000
    weights = only(reports("llama")[0], "attention that is asked for is given")
    assert weights.compared.startswith("0 of 3 layers")
    narrow = only(reports("llama, one layer narrower")[0], "what is saved is read again, bit for bit")
    assert "mismatch" in narrow.note
    refused = only(reports("llama-dynamic")[1], BEYOND)
    assert refused.compared == "refused" and "rotary phases depend on the length" in refused.note


SOUND = [
    "gpt2",
    "opt",
    "bloom",
    "mpt",
    "falcon-rw",
    "llama",
    "llama-yarn",
    "mistral",
    "gemma3",
    "mixtral",
    "t5",
    "bart",
]


@pytest.mark.parametrize("name", SOUND)
@torch.no_grad()
def test_what_is_sound_there_is_found_sound(name: str):
    """No false alarm: with a cache in any pieces as without, windows and all, and no NaN from rows of padding (R20)."""
    from lamina.conformance import decoding, subject_of, tokens

    transformers.logging.set_verbosity_error()
    subject = subject_of(reference(row(name)))
    rows = [*decoding.cached_decoding(subject), *tokens.empty_rows(subject), *tokens.order(subject)]
    cached, padded, *rest = rows
    assert cached.property == CACHED.format("as returned") and cached.verdict == "holds", cached
    assert (padded.verdict == "fails") == (name in ("gpt2", "bart")), padded  # their positions count padding: R15
    assert all(row.verdict != "fails" for row in rest), rest
