"""Retrieving while writing, against a loop that reads one row at a time anew for each token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lamina.cache import Cache
from lamina.errors import LaminaError, UnsupportedError
from lamina.families import Fields, family
from lamina.generation import generate
from lamina.generation.limits import limits_of
from lamina.generation.loop import stream
from lamina.generation.retrieval import Retrieval
from lamina.generation.sample import Sampling
from lamina.model import Model
from tests import small
from tests.layers.test_retrieval import TINY

M, NEW = TINY["chunk"], 11


class Asked:
    """Finds what follows from the chunk alone, and remembers what it was asked."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda ids: ids) -> None:
        self.calls: list[list[list[int]]] = []
        self.change = change

    def neighbours(self, chunks: Tensor, *, count: int) -> Tensor:
        self.calls.append(chunks.tolist())
        offsets = torch.arange(1, count + 1)[None, :, None]
        found = (torch.cat([chunks, 3 * chunks.flip(1)], dim=1)[:, None] * 7 + 5 * offsets) % small.VOCABULARY
        found = found.where(chunks.sum(dim=1)[:, None, None] % 3 > 0, -1)  # of some there are none
        return self.change(found)


@pytest.fixture(scope="module")
def model() -> Model:
    return small.build(family("retro").spec(Fields(TINY)))


def by_hand(model: Model, row: list[int], count: int) -> list[int]:
    """Greedy, without a cache and without padding: all whole chunks are looked up anew for each token."""
    row = list(row)
    for _ in range(NEW):
        ids = torch.tensor([row])
        whole = ids[0, : len(row) // M * M].view(-1, M)
        found = Asked().neighbours(whole, count=count)[None] if len(whole) else None
        row.append(int(model(ids, neighbours=found).logits[0, -1].argmax()))
    return row


PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8], [9, 7, 9, 3]]


def batch() -> tuple[Tensor, Tensor]:
    most = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (most - len(row)) + row for row in PROMPTS])
    return ids, torch.tensor([[0] * (most - len(row)) + [1] * len(row) for row in PROMPTS])


@pytest.mark.parametrize("cache", ["auto", "growing", "fixed", None])
@torch.no_grad()
def test_rows_that_are_out_of_step_write_what_each_writes_alone(model: Model, cache: str | None):
    ids, mask = batch()
    asked = Asked()
    out = generate(model, ids, mask, max_new_tokens=NEW, retriever=asked, neighbours=3, cache=cache)
    expected = [by_hand(model, row, 3) for row in PROMPTS]
    assert [row[-len(one) :] for row, one in zip(out.tolist(), expected, strict=True)] == expected
    without = generate(model, ids, mask, max_new_tokens=NEW, cache=cache)
    assert not torch.equal(out, without)
    # Once for all rows that end a chunk at the same token, and of the last token nothing is asked: nobody reads it.
    ends = [len(row) + step for step in range(NEW) for row in PROMPTS]
    expected_calls = [
        [one[(n := (len(row) + step) // M * M) - M : n] for row, one in zip(PROMPTS, expected, strict=True)
         if (len(row) + step) % M == 0]
        for step in range(1, NEW)
    ]  # fmt: skip
    first = [one[:M] for one in PROMPTS if len(one) >= M]
    assert max(ends) > 4 * M
    assert asked.calls == [first, *(call for call in expected_calls if call)]


@pytest.mark.parametrize("count", [1, 2])
def test_beams_look_up_what_they_have_written_themselves(model: Model, count: int):
    ids, mask = batch()
    options = {"max_new_tokens": NEW, "beams": 3, "best": 2, "neighbours": count}
    found = generate(model, ids, mask, retriever=Asked(), **options)
    assert torch.equal(found, generate(model, ids, mask, retriever=Asked(), cache=None, **options))
    alone = [generate(model, torch.tensor([row]), retriever=Asked(), **options)[:, len(row) :] for row in PROMPTS]
    assert torch.equal(found[:, ids.shape[1] :], torch.cat(alone))


def test_a_prompt_that_ends_a_chunk_and_sampling(model: Model):
    ids = torch.tensor([[3, 1, 4, 1]])
    options = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 5}
    found = generate(model, ids, retriever=Asked(), **options)
    assert torch.equal(found, generate(model, ids, retriever=Asked(), cache=None, **options))


def test_what_is_refused(model: Model):
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(UnsupportedError, match="retriever is for models that retrieve"):
        generate(small.build(small.decoder(small.MIXED)), ids, max_new_tokens=2, retriever=Asked())
    for wrong, why in (
        (lambda found: found.float(), r"the retriever gave torch.float32 \(1, 2, 8\); expected ids \(chunks=1"),
        (lambda found: found[:, :1], r"\(1, 1, 8\); expected ids \(chunks=1, neighbours=2, tokens\)"),
        (lambda found: found[0], r"\(2, 8\)"),
        (lambda found: found + small.VOCABULARY, "ids beyond 0 to 39"),
    ):
        with pytest.raises(LaminaError, match=why):
            generate(model, ids, max_new_tokens=2, retriever=Asked(wrong))
    sizes = iter([8, 6])
    with pytest.raises(LaminaError, match="neighbours of 6 tokens, and of 8 before"):
        generate(model, ids, max_new_tokens=6, retriever=Asked(lambda found: found[:, :, : next(sizes)]))
    with pytest.raises(LaminaError, match="neighbours is 0; it must be"):
        generate(model, ids, max_new_tokens=2, retriever=Asked(), neighbours=0)
    cache: Cache = model.new_cache()
    with torch.inference_mode():
        model(ids, cache=cache)
    steps = stream(
        model, ids, sampling=Sampling(), limits=limits_of(model, 2), cache=cache, retrieval=Retrieval(Asked())
    )
    with pytest.raises(UnsupportedError, match="holds the beginning of one already"):
        next(steps)
