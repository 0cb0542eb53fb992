"""Training with neighbours: the neighbours of which chunk of which document a row reads, what is asked, and whether
what is found is used from the first token on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.data import Prepared
from lamina.errors import LaminaError, UnsupportedError
from lamina.families import Fields, family
from lamina.model import Model
from lamina.objectives import Batch, CausalLM, RetrievalLM, Retrieving
from lamina.objectives.retrieval import _chunks
from tests import small
from tests.layers.test_retrieval import TINY
from tests.objectives import made

CHUNK, LENGTH = 4, 16
PACKED = CausalLM(packed=True)
SIZES = (5, 17, 2, 40, 23, 9, 61, 3, 4, 8)


class Numbered:
    """Neighbours that say which chunk they are of: one of two tokens, its number in two digits of base 50."""

    def __init__(self, prepared: Prepared, chunk: int = CHUNK) -> None:
        lengths = prepared.column("text").lengths()
        # One that the document ends in is not looked for.
        self.starts = torch.from_numpy(np.concatenate([[0], np.cumsum(np.maximum(lengths - 1, 0) // chunk)]))

    def values(self, chunks: Tensor) -> Tensor:
        found = torch.stack([chunks // 50, chunks % 50], dim=-1)[..., None, :]
        return found.masked_fill((chunks < 0)[..., None, None], -1)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    words = made.bert()
    documents = [{"text": text} for text in made.texts(words, SIZES)]
    return made.prepared(tmp_path, words, documents, ended=False)


def model(vocabulary: int, **fields: int) -> Model:
    return small.build(family("retro").spec(Fields(TINY | {"vocabulary": vocabulary, "chunk": CHUNK} | fields)))


def test_every_chunk_is_read_where_it_ends_and_every_token_is_asked_for(prepared: Prepared):
    task = Retrieving(PACKED, Numbered, CHUNK)
    examples = task.examples(prepared, LENGTH)
    column = prepared.column("text")
    starts = Numbered(prepared).starts.tolist()
    asked, read = [], []
    texts = [column[i].tolist() for i in range(len(SIZES))]
    for index in range(len(examples)):
        batch = task.collate([examples.example(index, made.random_of(index))])
        labels = batch.labels["next_token"][0].tolist()
        ids = batch.inputs["input_ids"][0].tolist()
        documents = batch.inputs.get("document_ids", torch.zeros(1, LENGTH, dtype=torch.int64))[0]
        found, ends = batch.inputs["neighbours"][0], 0
        assert found.shape == (LENGTH // CHUNK, 1, 2)
        for number in documents.unique().tolist():
            if number < 0:
                continue
            columns = (documents == number).nonzero()[:, 0].tolist()
            piece = [ids[t] for t in columns]
            labelled = [labels[t] for t in columns if labels[t] != -100]
            asked.append([piece[0], *labelled])
            # Where in which document it is: by looking for it.
            (where,) = {
                (i, at)
                for i, text in enumerate(texts)
                for at in range(0, len(text), LENGTH)
                if text[at : at + len(piece)] == piece and text[at + 1 :][: len(labelled)] == labelled
                and len(labelled) == min(LENGTH, len(text) - at - 1)
            }  # fmt: skip
            for chunk in range(len(piece) // CHUNK):
                own = where[1] // CHUNK + chunk
                there = starts[where[0]] + own < starts[where[0] + 1]
                expected = starts[where[0]] + own if there else -1
                pair = found[ends, 0].tolist()
                assert (pair[0] * 50 + pair[1] if pair[0] >= 0 else -1) == expected
                assert not there or texts[where[0]][own * CHUNK : (own + 1) * CHUNK] == piece[
                    chunk * CHUNK : (chunk + 1) * CHUNK
                ]  # fmt: skip
                read.append(expected)
                ends += 1
        assert bool((found[ends:] == -1).all())
    assert sum(len(each) - 1 for each in asked) == sum(size - 1 for size in SIZES)
    assert sorted(number for number in read if number >= 0) == list(range(starts[-1]))


def test_a_chunk_that_ends_in_what_is_a_label_alone_has_none():
    begins, starts = np.array([0, 9, 13]), np.array([0, 2, 3])
    assert _chunks(np.array([0, 9]), np.array([9, 4]), begins, starts, 12, 4).tolist() == [0, 1]
    assert _chunks(np.array([0, 9]), np.array([9, 4]), begins, starts, 13, 4).tolist() == [0, 1, 2]


@torch.no_grad()
def test_the_loss_is_that_of_each_piece_alone(prepared: Prepared):
    task = Retrieving(PACKED, Numbered, CHUNK)
    examples, module = task.examples(prepared, LENGTH), model(prepared.vocabulary)
    task.fits(module.spec)
    rows = [examples.example(i, made.random_of(i)) for i in range(len(examples))]
    batch = task.collate(rows)
    assert batch.tokens == sum(int((row["documents"][:-1] >= 0).sum()) for row in rows) < len(rows) * LENGTH
    total = task.total(module, batch).kinds["next_token"]
    neighbours = Numbered(prepared)
    starts, by_hand, count = neighbours.starts, 0.0, 0
    for i in range(len(SIZES)):
        text = torch.from_numpy(prepared.column("text")[i])
        for at in range(0, max(len(text) - 1, 1), LENGTH):
            piece = text[at : at + LENGTH + 1]
            ids, labels = piece[:-1][None], piece[1:]
            numbers = [int(starts[i]) + at // CHUNK + u for u in range(ids.shape[1] // CHUNK)]
            found = neighbours.values(torch.tensor([[n if n < starts[i + 1] else -1 for n in numbers]]))
            logits = module(ids, neighbours=found if numbers else None).logits[0]
            by_hand += float(-logits.log_softmax(-1).gather(1, labels[:, None]).sum())
            count += len(labels)
    assert total.asked == count
    assert float(total.total) == pytest.approx(by_hand, rel=1e-9)


def test_what_does_not_fit_is_refused(prepared: Prepared):
    for wrong in ({"documents": False}, {"aligned": False}):
        with pytest.raises(LaminaError, match="documents and aligned must be true with packed"):
            CausalLM(packed=True, **wrong)
    with pytest.raises(LaminaError, match="the causal objective must be packed"):
        Retrieving(CausalLM(), Numbered, CHUNK)
    with pytest.raises(LaminaError, match="objective.packed must be true"):
        RetrievalLM(index="i", neighbours=("n",), objective=CausalLM())
    with pytest.raises(LaminaError, match="neighbours is empty"):
        RetrievalLM(index="i", neighbours=())
    with pytest.raises(UnsupportedError, match="objective.ready"):
        RetrievalLM(index="i", neighbours=("n",)).total(model(prepared.vocabulary), Batch({}, {}))
    found = Numbered(prepared)
    task = Retrieving(PACKED, lambda prepared: found, CHUNK)
    with pytest.raises(LaminaError, match="length=18 must be a multiple of the chunk of 4"):
        task.examples(prepared, 18)
    with pytest.raises(UnsupportedError, match="reads chunks of 5 tokens; these neighbours are of chunks of 4"):
        task.fits(model(prepared.vocabulary, chunk=5).spec)
    with pytest.raises(UnsupportedError, match="for models that retrieve"):
        task.fits(small.decoder(small.MIXED))
    found.starts = found.starts[:-1]
    with pytest.raises(LaminaError, match="10 documents; the neighbours are of 9"):
        task.examples(prepared, LENGTH)


class Continued:
    """Neighbours as section 2.1 has them, and as they must never be in training: the chunk and what follows it."""

    def __init__(self, texts: Tensor) -> None:
        self.texts, self.per = texts.unflatten(1, (-1, CHUNK)), texts.shape[1] // CHUNK - 1  # (documents, chunks, m)
        self.starts = torch.arange(len(texts) + 1) * self.per

    def values(self, chunks: Tensor) -> Tensor:
        document, chunk = chunks.clamp(min=0) // self.per, chunks.clamp(min=0) % self.per
        found = torch.cat([self.texts[document, chunk], self.texts[document, chunk + 1]], dim=-1)
        return found.masked_fill((chunks < 0)[..., None], -1)[..., None, :]


@pytest.mark.slow
def test_what_follows_is_copied_from_the_first_token_on(tmp_path: Path):
    """Random tokens, of which nothing can be foretold but by reading the neighbours: the first token of a chunk too,
    for the last token of the chunk before already reads them. The first chunk has none and stays at chance."""
    words, count = made.bert(), 8
    texts = torch.randint(count, (600, 3 * CHUNK), generator=torch.Generator().manual_seed(0))
    prepared = made.prepared(tmp_path, words, [{"text": row.numpy()} for row in texts], ended=False)
    task = Retrieving(PACKED, lambda prepared: Continued(texts), CHUNK)
    examples = task.examples(prepared, 3 * CHUNK)
    assert len(examples) == 600
    fields = {"layers": 2, "first": 1, "every": 9, "width": 32, "hidden": 64, "heads": 4, "encoder_width": 32}
    fields |= {"encoder_heads": 4, "encoder_head_dim": 8, "encoder_hidden": 64, "encoder_layers": 1}
    spec = family("retro").spec(Fields(TINY | fields | {"vocabulary": prepared.vocabulary}))
    module = spec.build(seed=1).train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=4e-3)
    order = torch.Generator().manual_seed(3)
    for _ in range(150):
        rows = torch.randint(500, (64,), generator=order).tolist()
        batch = task.collate([examples.example(i, made.random_of(i)) for i in rows])
        loss = task.total(module, batch).kinds["next_token"]
        optimiser.zero_grad()
        (loss.total / loss.asked).backward()
        optimiser.step()
    batch = task.collate([examples.example(i, made.random_of(i)) for i in range(500, 600)])
    with torch.no_grad():
        out = module.eval()(**batch.inputs).logits.log_softmax(-1)
    labels = batch.labels["next_token"]
    lost = -out.gather(2, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels < 0, 0.0)
    places = lost.sum(0) / (labels >= 0).sum(0).clamp(min=1)  # by the position of what predicts
    assert float(places[: CHUNK - 1].mean()) > 0.9 * np.log(count)
    assert float(places[CHUNK - 1 : 3 * CHUNK - 1].max()) < 0.1, places
