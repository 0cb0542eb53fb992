"""Beam search: against all sequences there are, against transformers, and each text as alone."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import lamina
from lamina.cache import KINDS
from lamina.errors import LaminaError
from lamina.generation import Beaming, Beams, Limits, limits_of
from lamina.generation.beam import CHUNK, _Ended, _top, search
from lamina.model import Model
from lamina.patterns import Causal
from tests import families, small, test_encoder_decoder, tiny
from tests.families import Case

PROMPT = torch.tensor([[256, 72, 101, 108]])


@cache
def toy(vocabulary: int = 5) -> Model:
    """Few tokens, so that every sequence can be looked at."""
    return small.build(small.decoder([Causal()], vocabulary=vocabulary))


@cache
def pair() -> Model:
    return small.build(test_encoder_decoder.spec())


def limits(most: int, **fields: Any) -> Limits:
    return Limits(**({"most": most, "ends": (1,)} | fields))


def every_sequence(model: Model, prompt: torch.Tensor, limit: Limits, penalty: float) -> list[tuple[float, list[int]]]:
    """Scores and new tokens of all sequences that end, or are as long as they may be; the best first."""
    found = []
    whole = list(itertools.product(range(model.spec.embedding.vocabulary), repeat=limit.most))
    with torch.no_grad():
        ids = torch.cat([prompt.expand(len(whole), -1), torch.tensor(whole)], dim=1)
        every = model(ids).logits.log_softmax(dim=-1)[:, prompt.shape[1] - 1 : -1]
    for new, likely in zip(whole, every.tolist(), strict=True):
        end = next((i for i, token in enumerate(new) if token in limit.ends and i >= limit.least), limit.most - 1)
        if any(token in limit.ends for token in new[: limit.least]) or any(new[end + 1 :]):
            continue  # held back; or the same sequence as the one that is filled with zeros
        total = sum(likely[i][token] for i, token in enumerate(new[: end + 1]))
        found.append((total / (end + 1) ** penalty, list(new[: end + 1])))
    return sorted(found, reverse=True)


def unpadded(beams: Beams, start: int, ends: tuple[int, ...]) -> list[list[int]]:
    rows = [row[start:] for row in beams.ids.tolist()]
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("least", [0, 2])
def test_with_beams_for_all_beginnings_the_best_of_all_sequences_are_found(penalty: float, least: int):
    model, prompt, limit = toy(), torch.tensor([[3, 0, 2]]), limits(4, least=least, ends=(2,))
    expected = every_sequence(model, prompt, limit, penalty)[:100]
    beaming = Beaming(beams=5**3, length_penalty=penalty, early_stopping="never", best=100)
    found = search(model, prompt, beaming=beaming, limits=limit)
    torch.testing.assert_close(found.scores, torch.tensor([score for score, _ in expected]).double())
    assert unpadded(found, 3, (2,)) == [new for _, new in expected]
    assert len({len(new) for _, new in expected}) > 1  # ends come early


def test_where_fewer_sequences_exist_than_are_asked_for_the_rest_say_so():
    found = search(toy(), torch.tensor([[3]]), beaming=Beaming(beams=8, best=8), limits=limits(1))
    assert torch.isinf(found.scores).tolist() == [False] * 5 + [True] * 3
    assert sorted(found.ids[:5, 1].tolist()) == [0, 1, 2, 3, 4]
    found = search(toy(), torch.tensor([[3]]), beaming=Beaming(beams=2, best=2), limits=limits(0))
    assert found.ids.tolist() == [[3], [3]] and found.scores.tolist() == [0.0, -torch.inf]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    folder = tmp_path_factory.mktemp("beams")
    return cache(lambda name: Case(families.row(name), folder))


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


ROWS = [[11, 72, 41, 8], [50, 9], [16, 20, 31, 5, 77, 12]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart-biased", "led", "m2m100", "nllb-moe"])
@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
def test_equals_transformers(name: str, early: Any, penalty: float, cases: Callable[[str], Case]):
    """Padded batches, several ends that come early, ends held back, the best of each, and the order of them."""
    case = cases(name)
    ids, mask = padded(ROWS)
    if case.two_stacks:
        ids, mask = ids.flip(1), mask.flip(1)  # their BART counts padding on the left as positions
    shared = {"max_new_tokens": 12, "length_penalty": penalty, "early_stopping": early, "pad_token_id": 2}
    start = 1 if case.two_stacks else ids.shape[1]

    def ask(**more: Any) -> Any:
        return case.theirs.generate(ids, attention_mask=mask, do_sample=False, **shared, **more)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common = ask(num_beams=4)[:, start:].tolist()  # what sequences hold, so that they end early, not all at once
        for ends, beams, best, least in (((96, common[0][4], common[2][2]), 4, 4, 0), ((common[1][3],), 3, 1, 5)):
            expected = ask(
                num_beams=beams,
                num_return_sequences=best,
                min_new_tokens=least,
                eos_token_id=list(ends),
                return_dict_in_generate=True,
                output_scores=True,
            )
            beaming = Beaming(beams=beams, length_penalty=penalty, early_stopping=early, best=best)
            limit = replace(limits_of(case.ours, 12, least), ends=ends, pad=2)
            found = search(case.ours, ids, mask, beaming=beaming, limits=limit)
            assert torch.equal(found.ids, expected.sequences)
            # A negative penalty makes scores of hundreds, of which float32 keeps seven digits.
            torch.testing.assert_close(found.scores, expected.sequences_scores, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_padding_batches_and_caches_change_nothing(kind: str | None):
    """Each text is as alone, padded on either side, with every cache and with none."""
    model = small.build(small.decoder(small.WINDOWED if kind == "ring" else small.MIXED))
    rows = [[3, 9, 20, 7, 7, 30], [5, 2], [11, 4, 8]]
    beaming, limit = Beaming(beams=3, best=2), limits(9, ends=(4, 17))
    alone = [search(model, torch.tensor([row]), beaming=beaming, limits=limit) for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows)
        if side == "right":
            ids, mask = torch.tensor([row + [0] * (6 - len(row)) for row in rows]), mask.flip(1)
        found = search(model, ids, mask, beaming=beaming, limits=limit, cache="none" if kind is None else kind)
        expected = [new for each, row in zip(alone, rows, strict=True) for new in unpadded(each, len(row), (4, 17))]
        assert unpadded(found, 6, (4, 17)) == expected
        torch.testing.assert_close(found.scores, torch.cat([each.scores for each in alone]), rtol=0, atol=1e-10)
        assert torch.equal(found.ids[:, :6], ids.repeat_interleave(2, dim=0))


def test_a_source_is_read_once_and_shared_by_its_beams():
    model, source = pair(), small.ids(3, 6, seed=4)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [1] * 3 + [0] * 3])
    beaming, limit = Beaming(beams=4, best=2, length_penalty=2.0), limits(8, ends=(1, 12))
    seen: list[tuple[int, ...]] = []
    key = model.decoder.layers[0].cross.op.k  # pyright: ignore
    hook = key.register_forward_hook(lambda module, given, out: seen.append(tuple(given[0].shape)))
    found = search(model, source, mask, beaming=beaming, limits=limit)
    hook.remove()
    assert seen == [(3, 6, 16)] and found.ids[:, 0].tolist() == [0] * 6
    for i in range(3):
        alone = search(model, source[i][mask[i].bool()][None], beaming=beaming, limits=limit)
        assert unpadded(alone, 1, (1, 12)) == unpadded(found, 1, (1, 12))[2 * i : 2 * i + 2]
        torch.testing.assert_close(alone.scores, found.scores[2 * i : 2 * i + 2], rtol=0, atol=1e-10)
    begun = torch.tensor([[0, 7, 3]] * 3)
    more = [
        lamina.generate(model, source, mask, max_new_tokens=5, beams=3, decoder_input_ids=begun, cache=cache)
        for cache in ("auto", "fixed", None)
    ]
    assert torch.equal(more[0][:, :3], begun) and torch.equal(more[0], more[1]) and torch.equal(more[0], more[2])


def test_many_beams_are_no_worse_than_greedy_and_one_beam_is_greedy():
    model, limit = tiny.model(), Limits(most=10, ends=(257,), pad=257)
    greedy = lamina.generate(model, PROMPT, max_new_tokens=10)
    scores = [search(model, PROMPT, beaming=Beaming(beams=n, length_penalty=0.0), limits=limit) for n in (1, 2, 64)]
    assert torch.equal(scores[0].ids, greedy)
    with torch.inference_mode():
        likely = model(greedy).logits.log_softmax(dim=-1)[0, 3:-1].gather(1, greedy[0, 4:, None]).sum()
    torch.testing.assert_close(scores[0].scores[0], likely)
    assert scores[2].scores[0] > scores[0].scores[0]


def test_stop_sequences_end_a_row_and_are_looked_for_in_what_is_new():
    model, prompt = small.build(small.decoder([Causal()])), torch.tensor([[3, 9, 20], [11, 4, 8]])
    free = search(model, prompt, beaming=Beaming(beams=3, best=3), limits=Limits(most=8))
    pairs = [tuple(row[5:7]) for row in free.ids.tolist()]
    stops = (pairs[0], (int(free.ids[4, 6]),), (*prompt[0].tolist(), 5))
    limit = Limits(most=8, stops=stops, pad=39)
    found = search(model, prompt, beaming=Beaming(beams=3, best=3, early_stopping="never"), limits=limit)
    rows = [row[3:] for row in found.ids.tolist()]
    ended = 0
    for row, score, source in zip(rows, found.scores, prompt.repeat_interleave(3, dim=0), strict=True):
        at = next((i for i in range(8) if any(tuple(row[: i + 1][-len(s) :]) == s for s in stops)), 7)
        assert all(token == 39 for token in row[at + 1 :])
        ids = torch.cat([source, torch.tensor(row[: at + 1])])[None]
        likely = model(ids).logits.log_softmax(dim=-1)[0, 2:-1].gather(1, ids[0, 3:, None]).sum() / (at + 1)
        torch.testing.assert_close(likely, score)
        ended += at < 7
    assert ended > 0


def test_forced_tokens_cost_nothing_and_only_where_the_start_id_is_alone():
    model, source = pair(), small.ids(1, 5)
    limit = limits(4, first=7, last=1, pad=0)
    found = search(model, source, beaming=Beaming(beams=3, best=3, length_penalty=0.0), limits=limit)
    assert bool((found.ids[:, 1] == 7).all())
    for row, score in zip(found.ids.tolist(), found.scores, strict=True):
        new = row[1 : row.index(1) + 1]
        likely = model(source, decoder_input_ids=torch.tensor([[0, *new]])).logits.log_softmax(dim=-1)[0]
        total = sum(likely[i, token] for i, token in enumerate(new) if i and (i < 3 or token != 1))
        torch.testing.assert_close(score, total)
    assert any(row[4] == 1 for row in found.ids.tolist())
    begun = torch.tensor([[0, 5]])
    greedy = lamina.generation.Sampling()
    for beaming in (Beaming(beams=1), Beaming(beams=3)):
        more = search(model, source, beaming=beaming, limits=limit, decoder_input_ids=begun)
        free = search(model, source, beaming=beaming, limits=limits(4, last=1, pad=0), decoder_input_ids=begun)
        assert torch.equal(more.ids, free.ids)
    steps = lamina.generation.stream(model, source, sampling=greedy, limits=limit, decoder_input_ids=begun)
    assert [int(step.ids) for step in steps] == more_greedy(model, source, begun)


def more_greedy(model: Model, source: torch.Tensor, begun: torch.Tensor) -> list[int]:
    """Four tokens, the last of which is the forced end."""
    for _ in range(3):
        with torch.no_grad():
            following = model(source, decoder_input_ids=begun).logits[:, -1].argmax(dim=-1)
        begun = torch.cat([begun, following[:, None]], dim=1)
    return [*begun[0, 2:].tolist(), 1]


def test_the_context_and_the_weights_are_looked_at_as_without_beams():
    model = tiny.model()
    full = torch.arange(64)[None]
    with pytest.raises(LaminaError, match="the prompt has 64 tokens; this model reads 64"):
        lamina.generate(model, full, max_new_tokens=1, beams=2)
    with pytest.warns(UserWarning, match="stopped after 4 new tokens"):
        out = lamina.generate(model, full[:, :60], max_new_tokens=10, min_new_tokens=10, beams=2, best=2)
    assert out.shape == (2, 64)
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    with pytest.raises(LaminaError, match="logits of new token 0 are not finite"):
        lamina.generate(model, PROMPT, max_new_tokens=3, beams=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"beams": 2.0}, "beams is 2.0"),
        ({"beams": 2, "best": 3}, "best is 3; it must be a whole number from 1 to beams=2"),
        ({"beams": 2, "best": 0}, "best is 0"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty is nan"),
        ({"beams": 2, "length_penalty": "1"}, "length_penalty is '1'"),
        ({"beams": 2, "early_stopping": "always"}, "early_stopping is 'always'; it must be True, False or 'never'"),
        ({"beams": 2, "temperature": 0.7}, "temperature=0.7 needs beams=1"),
        ({"beams": 2, "top_k": 4}, "top_k=4 needs beams=1"),
        ({"beams": 2, "seed": 0}, "seed=0 needs beams=1"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 needs beams above 1"),
        ({"early_stopping": "never"}, "early_stopping='never' needs beams above 1"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_named(options: dict[str, Any], said: str):
    with pytest.raises(LaminaError, match=said):
        lamina.generate(tiny.model(), PROMPT, max_new_tokens=3, **options)


@pytest.mark.parametrize("size", [3, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 7])
@pytest.mark.parametrize("most", [1, 6, 300])
def test_the_largest_of_all_are_found_by_chunks(size: int, most: int):
    logits = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(size))
    before = torch.tensor([[0.0, -1.0, -torch.inf], [-3.0, 1.0, 0.5]])
    values, row, token = _top(logits, before, most)
    expected = (before[:, :, None] + logits).flatten(1).topk(min(most, 3 * size)).values
    assert torch.equal(values, expected)
    found = before.gather(1, row) + logits[torch.arange(2)[:, None], row, token]
    assert torch.equal(found[values > -torch.inf], values[values > -torch.inf])


def test_the_limits_of_the_checkpoint_hold():
    model = tiny.model()
    limit = limits_of(model, 6)
    found = search(model, PROMPT, beaming=Beaming(beams=2), limits=limit)
    assert torch.equal(found.ids, lamina.generate(model, PROMPT, max_new_tokens=6, beams=2))
    assert limit.ends == (257,)


def test_never_judges_by_the_length_that_suits_a_sequence_best():
    """With penalty -1 a score is log-probability times length, so the shortest is best: -2 at length 2 against -5."""
    written, scores = torch.zeros(1, 1, 6, dtype=torch.int64), torch.zeros(1, 1)
    for early, penalty, worst, expected in (
        ("never", -1.0, -5.0, True),
        ("never", 1.0, -0.5, True),  # -2 / 6
        (False, 1.0, -0.5, False),  # -2 / 2
        (False, -1.0, -5.0, True),
        (True, 1.0, -5.0, False),
        (True, 1.0, -torch.inf, True),
    ):
        ended = _Ended.none(written, scores, Beaming(beams=1, length_penalty=penalty, early_stopping=early))
        ended.scores[:] = worst
        assert ended.may_improve(torch.tensor([-2.0]), 2, 6).tolist() == [expected]


def test_beams_leave_the_compiled_step_alone(monkeypatch: pytest.MonkeyPatch):
    model = tiny.model()
    expected = lamina.generate(model, PROMPT, max_new_tokens=4, beams=2)

    class Engine:
        def fits(self, total: int) -> bool:
            return True

        def start(self, total: int) -> None:
            raise AssertionError("a compiled step keeps one row")

    monkeypatch.setattr(model, "engine", Engine())
    assert torch.equal(lamina.generate(model, PROMPT, max_new_tokens=4, beams=2), expected)
    with pytest.raises(AssertionError):
        lamina.generate(model, PROMPT, max_new_tokens=4)
