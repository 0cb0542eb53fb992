"""kNN-LM beside a few naive lines."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation import measure, score
from lamina.generation.perplexity import log_probabilities
from lamina.retrieve import KnnLM, build_states, open_database
from lamina.retrieve.states import StateContent, keyed, watched
from tests import tiny
from tests.retrieve import made

DOCUMENTS = ["the cat sat on the hill", "über the dog", "a red mat, the cat ran over it", "the cat sat on the hill"]
CONFIGS = {
    "llama": tiny.LLAMA,
    "gpt2": tiny.GPT2,
    "mixtral": tiny.LLAMA
    | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None},
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp(request.param)
    source = tiny.checkpoint(root / "model", CONFIGS[request.param])
    text = made.prepared(root / "text", made.rows(root / "t.jsonl", DOCUMENTS))
    model = lamina.load(source)
    build_states(text, root / "states", model, source=str(source), batch=11, window=64)
    return root, model, open_database(root / "states"), text


def theirs(root: Path, ids: list[int]) -> torch.Tensor:
    """What the last feed-forward of transformers' model reads, (T, width)."""
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    layers = model.transformer.h if root.name.startswith("gpt2") else model.model.layers
    seen: list[torch.Tensor] = []
    layers[-1].mlp.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    return seen[0].reshape(len(ids), -1)


def test_keys_and_values_are_those_of_transformers(room):
    root, model, database, _ = room
    keys, tokens = [], []
    for document in DOCUMENTS[:3]:  # the last is the first again
        ids = [*tiny.tokenizer().encode(document, special=False, control=False), 257]
        keys.append(theirs(root, ids[:-1]))
        tokens += ids[1:]
    assert len(database) == len(tokens) == int(database.starts[-1])
    torch.testing.assert_close(database.store.vectors(torch.arange(len(tokens))), torch.cat(keys), rtol=1e-4, atol=1e-4)
    assert database.store.tokens(torch.arange(len(tokens)))[:, 0].tolist() == tokens
    assert keyed(model) is model.decoder.layers[-1]["feedforward"].op


@pytest.mark.parametrize(
    "weight, temperature, count", [(0.25, 1.0, 4), (0.7, 3.0, 9), (1.0, 10.0, 1000), (0.0, 1.0, 2)]
)
def test_probabilities_are_those_of_a_naive_loop(room, weight: float, temperature: float, count: int):
    _, model, database, _ = room
    mixed = KnnLM(model, database, count=count, weight=weight, temperature=temperature)
    ids = tiny.tokenizer().encode("the dog sat on a red hill", special=False)
    with watched(model) as seen, torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double()
    keys = database.store.vectors(torch.arange(len(database))).double()
    values = database.store.tokens(torch.arange(len(database)))[:, 0].tolist()
    expected, whole = [], []
    for at in range(len(ids) - 1):
        distance = (keys - seen[0][0, at].double()).square().sum(1)
        nearest = distance.argsort()[:count].tolist()
        least = float(distance.min())  # the same factor in every term
        terms = [(values[j], math.exp(-(float(distance[j]) - least) / temperature)) for j in nearest]
        total = sum(term for _, term in terms)
        of = [sum(term for value, term in terms if value == token) / total for token in range(263)]
        whole.append(of)
        plain = float(logits[at].softmax(0)[ids[at + 1]])
        p = weight * of[ids[at + 1]] + (1 - weight) * plain
        expected.append(math.log(p) if p > 0 else -math.inf)
    found = torch.cat(list(score(model, ids, block=mixed.block())))
    finite = torch.tensor(expected).isfinite()
    torch.testing.assert_close(found[finite], torch.tensor(expected)[finite], rtol=1e-3, atol=2e-3)
    probabilities = mixed.probabilities(seen[0][0, :-1])
    torch.testing.assert_close(probabilities, torch.tensor(whole), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(ids) - 1))
    if weight == 0:
        torch.testing.assert_close(found, torch.tensor(log_probabilities(model, ids)))


def test_a_text_that_is_known_is_predicted_unless_it_is_left_out(room):
    _, model, database, _ = room
    mixed = KnnLM(model, database, count=8, weight=0.5, temperature=0.1)
    ids = tiny.tokenizer().encode(DOCUMENTS[0], special=False)
    plain, known, out = (
        list(measure(model, ids, block=block))[-1].nats
        for block in (None, mixed.block(), mixed.block(torch.tensor([[0, 1], [0, 0]])))
    )
    assert known < 0.75 * len(ids) < plain and out > known + 5
    everything = mixed.block(torch.tensor([[0, 3]]))
    assert list(measure(model, ids, block=everything))[-1].nats == pytest.approx(plain + (len(ids) - 1) * math.log(2))


def test_states_are_read_at_few_lengths(tmp_path: Path):
    """Each length that a model reads in 16 bits costs memory for good; what fills a row changes no state."""
    source = tiny.checkpoint(tmp_path / "model", tiny.LLAMA)
    documents = ["a" * size for size in range(2, 40)]
    text = made.prepared(tmp_path / "text", made.rows(tmp_path / "t.jsonl", documents))
    model, shapes = lamina.load(source), []
    with model.register_forward_pre_hook(lambda module, given: shapes.append(tuple(given[0].shape))):
        build_states(text, tmp_path / "index", model, source=str(source), window=38)
    assert set(shapes) == {(1, 16), (1, 32), (1, 38)} and len(shapes) >= len(documents)
    database = open_database(tmp_path / "index")
    for number in (0, 14, 29):
        ids = text.columns["text"][number].tolist()
        rows = torch.arange(int(database.starts[number]), int(database.starts[number + 1]))
        found = database.store.vectors(rows)
        torch.testing.assert_close(found, theirs(tmp_path, ids[:-1]), rtol=1e-4, atol=1e-4)


def test_windows_of_states(tmp_path: Path):
    """Documents longer than a window: every state is of a window, whatever the batches are."""
    source = tiny.checkpoint(tmp_path / "model", tiny.LLAMA)
    text = made.prepared(tmp_path / "text", made.rows(tmp_path / "t.jsonl", ["the cat sat on the hill. " * 4, "a cat"]))
    model = lamina.load(source)
    for batch in (7, 1000):
        build_states(text, tmp_path / f"{batch}", model, source=str(source), batch=batch, window=20, stride=6)
    one, other = (open_database(tmp_path / f"{batch}").store for batch in (7, 1000))
    every = torch.arange(one.rows)
    torch.testing.assert_close(one.vectors(every), other.vectors(every), rtol=0, atol=0)
    ids = text.columns["text"][0].tolist()
    for at in (0, 19, 20, 25, 26, len(ids) - 2):
        last = 20 if at < 20 else min(20 + ((at - 20) // 6 + 1) * 6, len(ids) - 1)
        begin = max(last - 20, 0)
        with watched(model) as seen:
            model(torch.tensor([ids[begin : at + 1]]))
        torch.testing.assert_close(one.vectors(torch.tensor([at]))[0], seen[0][0, -1], rtol=1e-4, atol=1e-4)


def test_a_batch_reads_only_its_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A document may be larger than memory, and its end is as quickly reached as its beginning."""
    source = tiny.checkpoint(tmp_path / "model", tiny.LLAMA)
    text = made.prepared(
        tmp_path / "text", made.rows(tmp_path / "t.jsonl", ["a cat", "the cat sat on the hill. " * 40])
    )
    content = StateContent(text, lamina.load(source), str(source), 20, 6)
    read, plain = [], content.column.slice
    monkeypatch.setattr(content.column, "slice", lambda start, stop: read.append(stop - start) or plain(start, stop))
    monkeypatch.setattr(type(content.column), "__getitem__", None)
    last, size = int(content.starts[-1]), int(content.starts[2] - content.starts[1])
    assert content.vectors(last - 3, last).shape == (3, content.embedder.width)
    assert max(read) <= 20 and len(read) <= 2 and size > 100
    read.clear()
    end = content.column.tokens
    assert content.tokens(last - 3, last)[:, 0].tolist() == plain(end - 3, end).tolist()
    assert read == [3]


def test_what_does_not_fit_is_refused(room, tmp_path: Path):
    root, model, database, text = room
    with pytest.raises(LaminaError, match=r"states of .*model in float32 .*this model is another one"):
        KnnLM(lamina.load(root / "model", "bfloat16"), database)
    for wrong in ({"weight": 1.5}, {"weight": -0.1}, {"temperature": 0.0}, {"temperature": math.inf}):
        with pytest.raises(LaminaError, match="weight is"):
            KnnLM(model, database, **wrong)
    with pytest.raises(LaminaError, match="holds states of .*, for kNN-LM, and no chunks"):
        database.neighbours(torch.zeros(1, 1, dtype=torch.int64), count=1)
    chunks, _ = made.database(tmp_path, made.texts(2))
    with pytest.raises(LaminaError, match="holds chunks, made by .*build it with --states"):
        KnnLM(model, chunks)
    with pytest.raises(UnsupportedError, match="does not predict the next token"):
        build_states(text, tmp_path / "x", lamina.load(tmp_path / "bert"), source="bert")
