"""Each row of `verify` fails where what it says does not hold, and says so in figures; on the sound model it holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lamina
from lamina.conformance import Ours, Row, decoding, files, learning, refusals, state, tokens
from lamina.conformance.subject import Subject
from lamina.layers import AttentionSpec, ExpertsSpec, FeedForwardSpec, RouterLossSpec, TopKSpec
from lamina.specs import edit
from tests import grid, small, tiny

Check = Callable[[Subject], Iterator[Row]]


@torch.no_grad()
def rows(check: Check, subject: Subject) -> dict[str, Row]:
    return {row.property: row for row in check(subject)}


def failing(check: Check, subject: Subject) -> set[str]:
    return {name for name, row in rows(check, subject).items() if row.verdict == "fails"}


def experts(**losses: Any) -> lamina.Model:
    """A Llama whose feed-forward networks are three experts each, two of them for a token."""
    network = FeedForwardSpec(hidden=24)
    mixture = ExpertsSpec(router=TopKSpec(experts=3, chosen=2), expert=network, losses=RouterLossSpec(**losses))
    spec = edit(tiny.spec(tiny.LLAMA), FeedForwardSpec, lambda path, part: mixture)
    return spec.build(seed=1).eval()


class Bent(Ours):
    """Ours, read otherwise: `bend(subject, ids, out, told)` changes what comes out."""

    def __init__(self, model: lamina.Model, bend: Callable[..., list[Tensor]]) -> None:
        super().__init__(model)
        self.bend = bend

    def read(self, ids: Tensor, mask: Tensor | None = None, **told: Any) -> list[Tensor]:
        return self.bend(self, ids, super().read(ids, mask, **told), {"mask": mask, **told})

    def over(self, model: Any) -> Bent:
        return Bent(model, self.bend)


def scaled(out: list[Tensor], by: float) -> list[Tensor]:
    return [each * by for each in out]


def test_a_state_that_sticks():
    """As BigBird's in transformers: after a short text long ones are read in another way."""

    def bend(self: Any, ids: Tensor, out: list[Tensor], told: Any) -> list[Tensor]:
        self.stuck = getattr(self, "stuck", False) or ids.shape[1] < 8
        return scaled(out, 1.001 if self.stuck else 1.0)

    subject = Bent(tiny.model(), bend)
    name = "a text read before changes nothing"
    assert failing(state.memoryless, subject) == {name}
    assert rows(state.memoryless, Ours(tiny.model()))[name].compared == "64 tokens again, after 3 and 72 others"


def test_a_subject_of_any_library_can_be_handed_over():
    """What answers for a model is asked in its place, and only what any model is asked."""
    model = tiny.model(tiny.BERT).train()
    subject = Bent(model, lambda self, ids, out, told: [each + 1e-3 * torch.rand(()) for each in out])
    report = lamina.verify(subject)
    wrong = {row.property for row in report.rows if row.verdict == "fails"}
    assert "the same input gives the same bits" in wrong and model.training


def test_one_that_sticks_beyond_the_trained_length_only():
    """As the phases of dynamic NTK in transformers."""

    def bend(self: Any, ids: Tensor, out: list[Tensor], told: Any) -> list[Tensor]:
        self.most = max(getattr(self, "most", 0), ids.shape[1])
        return scaled(out, 1.001 if self.most > 64 else 1.0)

    assert failing(state.memoryless, Bent(tiny.model(), bend)) == {"a text read before changes nothing"}


def test_attention_that_is_not_given():
    class Shy(Ours):
        def attention(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor | None], int]:
            out, shown, layers = super().attention(ids)
            return out, [None, *shown[1:]], layers

    name = "attention that is asked for is given"
    assert failing(state.repeated_forward, Shy(tiny.model())) == {name}
    assert rows(state.repeated_forward, Ours(tiny.model(tiny.T5)))[name].compared.startswith("6 of 6 layers")


def test_rows_that_depend_on_their_place():
    subject = Bent(tiny.model(), lambda self, ids, out, told: [e * (1 + 1e-3 * (ids.shape[0] > 1) * i) for e in out
                   for i in [torch.arange(ids.shape[0])[:, None, None]]])  # fmt: skip
    assert failing(tokens.order, subject) == {"the order of rows changes nothing"}


@pytest.mark.parametrize(
    "what, rows_",
    [
        ("mask", {"packed = alone, told by positions and a mask of ones"}),
        ("cache", {"packed = alone, told by positions with a cache"}),
        (
            "positions",
            {f"packed = alone, told by positions{way}" for way in ("", " and a mask of ones", " with a cache")},
        ),
    ],
)
def test_packed_documents_that_see_each_other(what: str, rows_: set[str]):
    """As in transformers, where a mask of ones or a cache turns off what finds documents by their positions."""

    class Leaking(Ours):
        def read(self, ids: Tensor, mask: Tensor | None = None, **told: Any) -> list[Tensor]:
            given = {"mask": mask, **told}
            packed = told.get("positions") is not None and ids.shape[0] == 1
            if packed and given.get(what) is not None:
                told["positions"] = torch.arange(ids.shape[1])[None]
            return super().read(ids, mask, **told)

    assert failing(tokens.packing, Leaking(tiny.model())) == rows_
    assert failing(tokens.packing, Ours(tiny.model(tiny.T5))) == set()


def test_positions_that_are_ignored():
    class Deaf(Ours):
        def read(self, ids: Tensor, mask: Tensor | None = None, **told: Any) -> list[Tensor]:
            return super().read(ids, mask, **{name: value for name, value in told.items() if name != "positions"})

    class Refusing(Ours):
        def read(self, ids: Tensor, mask: Tensor | None = None, **told: Any) -> list[Tensor]:
            if "positions" in told:
                raise TypeError("unexpected argument 'position_ids'")
            return super().read(ids, mask, **told)

    name = "positions are heeded or refused"
    assert rows(tokens.placing, Deaf(tiny.model()))[name].note == "neither changes a bit"
    assert rows(tokens.placing, Refusing(tiny.model()))[name].compared == "refused"
    assert failing(tokens.placing, Deaf(tiny.model())) == {name}
    assert failing(tokens.placing, Ours(tiny.model(tiny.T5))) == set()
    without = edit(tiny.spec(tiny.LLAMA), AttentionSpec, lambda path, part: part.replace(rotary=None))
    assert failing(tokens.placing, Ours(without.build(seed=1).eval())) == set()


def test_nan_in_padding_that_is_multiplied_by_zero():
    model = tiny.model()
    attention = model.decoder.layers[0].attention
    forward = attention.forward
    attention.forward = lambda x, call: forward(x, call) + 0.0 * x.sum(dim=1, keepdim=True)
    assert failing(tokens.hidden_nan, Ours(model)) == {"NaN in padding reaches no token"}
    for config in (tiny.LLAMA, tiny.T5, tiny.BERT, tiny.BART, tiny.LED, tiny.MISTRAL):
        (row,) = rows(tokens.hidden_nan, Ours(tiny.model(config))).values()
        assert row.verdict == "holds" and math.isfinite(row.worst or 0), config["model_type"]


def test_a_cache_that_is_wrong_at_one_cut_only():
    """Every way to cut a small text in two is tried."""
    whole = 16

    def bend(self: Any, ids: Tensor, out: list[Tensor], told: Any) -> list[Tensor]:
        return scaled(out, 1.01 if told.get("cache") is not None and ids.shape[1] == whole - 7 else 1.0)

    found = failing(decoding.cached_decoding, Bent(tiny.model(), bend))
    assert found >= {f"cached decoding = the whole text, cache {kind!r}" for kind in ("auto", "growing", "fixed")}


def test_a_cache_that_is_wrong_beyond_the_trained_length():
    def bend(self: Any, ids: Tensor, out: list[Tensor], told: Any) -> list[Tensor]:
        cache = told.get("cache")
        return scaled(out, 1.01 if cache is not None and cache.length > 64 else 1.0)

    beyond = "cached decoding = the whole text, beyond the trained length"
    assert failing(decoding.cached_decoding, Bent(tiny.model(), bend)) == {beyond}
    learned = rows(decoding.cached_decoding, Ours(tiny.model(tiny.GPT2)))[beyond]
    assert not list(Ours(tiny.model()).embedding()._forward_hooks)
    assert learned.verdict == "not tried" and "nothing is read beyond it" in learned.note


@pytest.mark.parametrize("dtype, verdict", [(torch.float64, "holds"), (torch.float32, "not tried")])
def test_rounding_that_grows_through_a_text_is_no_fault(dtype: torch.dtype, verdict: str):
    """Memory tokens with large random weights: one rounding at the start is 1e5 of them after thirteen segments."""
    model = small.build(grid.recurrent(), dtype)
    row = rows(decoding.cached_decoding, Ours(model))["cached decoding = the whole text, beyond the trained length"]
    assert row.verdict == verdict and ("one rounding at the start" in row.note) == (verdict == "not tried"), row


def test_beams_whose_states_stay_behind(monkeypatch: pytest.MonkeyPatch):
    from lamina.cache import Cache

    model = tiny.model()
    assert failing(decoding.repeated_generation, Ours(model)) == set()
    honest = Cache.reorder

    def stay(self: Cache, index: Tensor, alike: int = 0) -> None:
        if index.shape[0] != self.batch:  # the first step makes beams of texts
            honest(self, index, alike)

    monkeypatch.setattr(Cache, "reorder", stay)
    assert failing(decoding.repeated_generation, Ours(model)) == {"beams with a cache = without"}


def test_generation_that_remembers():
    class Remembering(Ours):
        def generate(self, ids: Tensor, new: int, **told: Any) -> Tensor:
            self.before = max(getattr(self, "before", 0), ids.shape[0])
            return super().generate(ids, new, **told) + (self.before > 1)

    found = failing(decoding.repeated_generation, Remembering(tiny.model()))
    assert found == {"what was generated before changes nothing"}


def test_a_router_without_its_loss_and_one_that_counts_padding(monkeypatch: pytest.MonkeyPatch):
    there, padded = "the loss of a router is in the loss", "padding is not in the loss of a router"
    sound = rows(learning.router_losses, Ours(experts(balance=0.01, z=0.001)))
    assert sound[there].verdict == sound[padded].verdict == "holds"
    assert rows(learning.router_losses, Ours(experts()))[there].verdict == "not tried"
    assert rows(learning.router_losses, Ours(tiny.model()))[there].note == "no router has a loss"

    class Silent(Ours):
        def router_loss(self, ids: Tensor, mask: Tensor | None = None, *, asked: bool = False) -> Any:
            return super().router_loss(ids, mask) if asked else None

    assert failing(learning.router_losses, Silent(experts(balance=0.01))) == {there}

    class Counting(Ours):
        def router_loss(self, ids: Tensor, mask: Tensor | None = None, *, asked: bool = False) -> Any:
            return super().router_loss(ids)

    assert failing(learning.router_losses, Counting(experts(balance=0.01))) == {padded}


@pytest.mark.parametrize("lost", ["weights", "optimizer"])
def test_training_that_forgets_when_it_goes_on(lost: str, monkeypatch: pytest.MonkeyPatch):
    name = "training that goes on from files = without a break"
    dropping = edit(tiny.spec(tiny.GPT2), FeedForwardSpec, lambda path, part: part.replace(dropout=0.2))
    for sound in (tiny.model(), dropping.build(seed=2).eval(), tiny.model(tiny.T5), experts(balance=0.01)):
        (row,) = rows(learning.going_on, Ours(sound)).values()
        assert row.verdict == "holds" and row.compared == "4 steps, and 2 + 2: every weight", row
    if lost == "optimizer":
        monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    else:
        monkeypatch.setattr("lamina.conformance.ours.load", lambda folder: copy.deepcopy(tiny.model()))
    assert failing(learning.going_on, Ours(tiny.model())) == {name}


def test_a_buffer_that_a_cast_rounds():
    """As the frequencies of rotary positions in transformers."""
    model = tiny.model()
    model.register_buffer("frequency", torch.tensor(1.001))

    def bend(self: Any, ids: Tensor, out: list[Tensor], told: Any) -> list[Tensor]:
        return scaled(out, float(self.model.frequency))

    assert failing(files.casting, Bent(model, bend)) == {"a cast to bfloat16 rounds weights only"}
    (row,) = rows(files.casting, Ours(tiny.model())).values()
    assert row.verdict == "holds" and row.worst == 0 and "48 positions away" in row.compared
    (row,) = rows(files.casting, Ours(tiny.model().to(torch.bfloat16))).values()
    assert row.verdict == "not tried"


def test_files_that_are_not_what_was_saved():
    class Forgetful(Ours):
        def load(self, folder: Any) -> Ours:
            again = super().load(folder)
            with torch.no_grad():
                again.model.embedding.weight[0, 0] += 1e-6
            return again

    class Untying(Ours):
        def load(self, folder: Any) -> Ours:
            again = super().load(folder)
            again.model.decoder.layers[1].attention.op.q.weight = again.model.decoder.layers[1].attention.op.o.weight
            return again

    class Refusing(Ours):
        def load(self, folder: Any) -> Ours:
            raise RuntimeError("size mismatch")

    name = "what is saved is read again, bit for bit"
    assert rows(files.saving, Forgetful(tiny.model()))[name].worst == 1
    assert "what is tied stays tied" in failing(files.saving, Untying(tiny.model()))
    assert rows(files.saving, Refusing(tiny.model()))[name].note == "RuntimeError: size mismatch"


def test_what_is_accepted_or_refused_at_length():
    class Lax(Ours):
        def wrong(self, name: str) -> dict[str, Callable[[], Any]]:
            return super().wrong(name) | {"argument": lambda: None}

        def asks(self) -> dict[str, Callable[[], Any]]:
            def refuse() -> None:
                raise ValueError("x" * 401)

            return {"a loud call": refuse}

    sound = rows(refusals.refusals, Ours(tiny.model()))
    assert {row.verdict for row in sound.values()} == {"holds"} and len(sound) == 4
    found = rows(refusals.refusals, Lax(tiny.model()))
    loud = found["a refusal is at most 400 characters"]
    assert loud.verdict == "fails" and loud.compared == "the longest: a loud call" and loud.worst == 401
    accepted = found["an argument that does not exist is refused by name"]
    assert accepted.verdict == "fails" and accepted.note == "it was accepted"
