"""The generation loop: against a loop that reads everything anew, over caches, batches, stops and contexts."""

from __future__ import annotations

import pytest
import torch

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation import limits_of
from tests import tiny

PROMPT = torch.tensor([[5, 17, 99, 3, 42, 8]])


def naive(model: lamina.Model, ids: torch.Tensor, most: int, ends: tuple[int, ...] = (), least: int = 0) -> list[int]:
    """Greedy, one row, no cache."""
    out = ids[0].tolist()
    for count in range(most):
        logits = model(torch.tensor([out])).logits[0, -1].detach().clone()
        if count < least:
            logits[list(ends)] = -torch.inf
        out.append(int(logits.argmax()))
        if out[-1] in ends:
            break
    return out


@pytest.fixture(scope="module")
def llama() -> lamina.Model:
    return tiny.model(tiny.LLAMA)


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.MISTRAL, tiny.GPT2], ids=["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("cache", ["auto", "growing", "fixed", "none", None])
def test_every_cache_gives_the_naive_answer(config, cache):
    model = tiny.model(config)
    ours = lamina.generate(model, PROMPT, max_new_tokens=12, cache=cache)
    assert ours[0].tolist() == naive(model, PROMPT, 12, (257,))


def test_ring_serves_windows_and_refuses_the_rest(llama):
    model = tiny.model(tiny.MISTRAL)
    assert lamina.generate(model, PROMPT, max_new_tokens=12, cache="ring")[0].tolist() == naive(model, PROMPT, 12)
    with pytest.raises(UnsupportedError, match="looks back without limit"):
        lamina.generate(llama, PROMPT, max_new_tokens=2, cache="ring")


def test_sinks_go_beyond_the_context(llama):
    """Within the context they equal everything else; beyond it positions stay within the context, and it goes on."""
    inside = lamina.generate(llama, PROMPT, max_new_tokens=20, cache="sinks")
    assert inside.tolist() == lamina.generate(llama, PROMPT, max_new_tokens=20).tolist()
    beyond = lamina.generate(llama, PROMPT, max_new_tokens=150, min_new_tokens=150, cache="sinks")
    assert beyond.shape == (1, 156)
    long = torch.arange(200)[None] % 250
    assert lamina.generate(llama, long, max_new_tokens=5, min_new_tokens=5, cache="sinks").shape == (1, 205)


@pytest.mark.parametrize("length", [6, 70])
def test_sinks_number_positions_within_the_context(llama, length, monkeypatch):
    from lamina.cache.sinks import SinksLedger

    seen, note = [], SinksLedger.note
    monkeypatch.setattr(SinksLedger, "note", lambda self, tokens: seen.append(note(self, tokens)) or seen[-1])
    ids = torch.arange(length)[None]
    lamina.generate(llama, ids, max_new_tokens=80, min_new_tokens=80, cache="sinks")
    assert max(int(tokens.position.max()) for tokens in seen) == 63  # the context is 64


def test_sinks_are_refused_where_positions_are_learned():
    model = tiny.model(tiny.GPT2)
    with pytest.warns(UserWarning, match="the context of 64 is full"):
        out = lamina.generate(model, PROMPT, max_new_tokens=80, min_new_tokens=80, cache="sinks")
    assert out.shape == (1, 64)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.MISTRAL, tiny.GPT2], ids=["llama", "mistral", "gpt2"])
def test_ragged_rows_equal_single_ones(config, side):
    model = tiny.model(config)
    rows = [[5, 17, 99, 3, 42, 8], [7], [200, 1, 2]]
    length = max(map(len, rows))
    pads = [[0] * (length - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for pad, row in zip(pads, rows)]
    ones = [[1] * len(row) for row in rows]
    mask = [pad + one if side == "left" else one + pad for pad, one in zip(pads, ones)]
    together = lamina.generate(model, torch.tensor(ids), torch.tensor(mask), max_new_tokens=10)
    for row, new in zip(rows, together[:, length:].tolist()):
        alone = lamina.generate(model, torch.tensor([row]), max_new_tokens=10)[0, len(row) :].tolist()
        assert new[: len(alone)] == alone
        assert set(new[len(alone) :]) <= {257}  # the pad id, here the end id


def end_of(model: lamina.Model, ids: torch.Tensor, after: int) -> lamina.Model:
    """The same model, for which the token that comes `after` steps is an end id."""
    end = naive(model, ids, after + 1)[-1]
    model.spec = model.spec.replace(special=model.spec.special.replace(end=(end,)))
    return model


def test_rows_end_at_an_end_id_and_are_padded():
    model = end_of(tiny.model(seed=3), PROMPT, 3)
    other = torch.tensor([[9, 9, 9, 9, 9, 9]])
    both = lamina.generate(model, torch.cat([PROMPT, other]), max_new_tokens=10)
    end = model.spec.special.end[0]
    first = both[0, 6:].tolist()
    assert first.index(end) == len(naive(model, PROMPT, 10, (end,))) - 7
    assert set(first[first.index(end) :]) == {end}


@pytest.mark.parametrize("least", [0, 4, 7])
def test_end_ids_are_held_back(least):
    model = end_of(tiny.model(seed=3), PROMPT, 2)
    ends = model.spec.special.end
    ours = lamina.generate(model, PROMPT, max_new_tokens=9, min_new_tokens=least)
    assert ours[0].tolist() == naive(model, PROMPT, 9, ends, least)
    assert ours.shape[1] - 6 > least or ours[0, -1] not in ends


def test_stop_sequences_end_a_row(llama):
    whole = naive(llama, PROMPT, 12)[6:]
    for stop in (whole[4], whole[3:5], whole[2:5]):
        ours = lamina.generate(llama, PROMPT, max_new_tokens=12, stop=[stop])[0, 6:].tolist()
        tail = (stop,) if isinstance(stop, int) else tuple(stop)
        first = next(i for i in range(12) if tuple(whole[max(i + 1 - len(tail), 0) : i + 1]) == tail)
        assert ours == whole[: first + 1]
    assert lamina.generate(llama, PROMPT, max_new_tokens=12, stop=[[whole[4], 262]])[0, 6:].tolist() == whole


def test_generation_config_names_the_end(tmp_path, llama):
    directory = tiny.checkpoint(tmp_path / "tiny")
    end = naive(llama, PROMPT, 3)[-1]
    (directory / "generation_config.json").write_text(f'{{"eos_token_id": [{end}, 262], "pad_token_id": 1}}')
    loaded = lamina.load(directory)
    assert limits_of(loaded, 5).ends == (end, 262)
    ids = lamina.generate(loaded, torch.cat([PROMPT, PROMPT + 1]), max_new_tokens=9)
    assert ids[0, 6:].tolist() == [*naive(llama, PROMPT, 3)[6:], *[1] * (ids.shape[1] - 9)]


def test_seeds_repeat_and_differ(llama):
    def draw(seed):
        return lamina.generate(llama, PROMPT, max_new_tokens=16, temperature=2.0, seed=seed).tolist()

    assert draw(3) == draw(3) != draw(4)


def test_nothing_new_is_the_prompt(llama):
    assert lamina.generate(llama, PROMPT, max_new_tokens=0).tolist() == PROMPT.tolist()


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.inf])
def test_logits_that_are_not_finite_are_an_error_that_names_the_token(bad):
    model = tiny.model()
    with torch.no_grad():
        model.head.weight.fill_(bad)
    with pytest.raises(LaminaError, match="logits of new token 0 are not finite"):
        lamina.generate(model, PROMPT, max_new_tokens=3)
    good = tiny.model()
    assert lamina.generate(good, PROMPT, max_new_tokens=3).shape == (1, 9)


def test_the_context_is_the_limit(llama):
    full = torch.arange(64)[None]
    with pytest.raises(LaminaError, match="the prompt has 64 tokens; this model reads 64"):
        lamina.generate(llama, full, max_new_tokens=1)
    with pytest.warns(UserWarning, match="stopped after 4 new tokens"):
        out = lamina.generate(llama, full[:, :60], max_new_tokens=10, min_new_tokens=10)
    assert out.shape == (1, 64)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens is 4"),
        ({"max_new_tokens": 3, "stop": [[]]}, "stop holds"),
        ({"max_new_tokens": 3, "temprature": 1.0}, "did you mean 'temperature'"),
        ({"max_new_tokens": 3, "beams": 0}, "beams"),
        ({"max_new_tokens": 3, "cache": "growin"}, "did you mean 'growing'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(llama, options, said):
    with pytest.raises(LaminaError, match=said):
        lamina.generate(llama, PROMPT, **options)


def test_wrong_prompts_are_refused(llama):
    for ids, said in (
        (torch.empty(1, 0, dtype=torch.int64), "at least one token"),
        (torch.tensor([[5, 263]]), "ids of this model are 0 to 262"),
        (torch.tensor([[-1]]), "ids of this model"),
    ):
        with pytest.raises(LaminaError, match=said):
            lamina.generate(llama, ids, max_new_tokens=1)
    with pytest.raises(LaminaError, match="all padding"):
        lamina.generate(llama, PROMPT, torch.zeros_like(PROMPT), max_new_tokens=1)
