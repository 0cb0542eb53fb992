"""lamina.verify: sound models pass, and a model in which one thing is broken fails in that row and says so."""

from __future__ import annotations

import json

import pytest
import torch

import lamina
from lamina import conformance
from lamina.attend import Request, dense, sdpa
from tests import tiny

CONFIGS = {"llama": tiny.LLAMA, "mistral": tiny.MISTRAL, "gpt2": tiny.GPT2, "bert": tiny.BERT}
CONFIGS |= {"t5": tiny.T5, "bart": tiny.BART, "led": tiny.LED}


def failing(model: lamina.Model) -> set[str]:
    return {row.property for row in lamina.verify(model).rows if row.verdict == "fails"}


@pytest.mark.parametrize("name", CONFIGS)
def test_sound_models_pass(name):
    model = tiny.model(CONFIGS[name]).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = []
    report = lamina.verify(model, progress=seen.append)
    assert report.passed, str(report)
    assert tuple(seen) == report.rows and len(seen) > 20 and report.seconds < 20
    assert model.training and all(torch.equal(before[n], p) for n, p in model.named_parameters())
    json.dumps(report.to_dict())
    tried = {row.property for row in report.rows if row.verdict == "holds"}
    assert ("later tokens change no earlier bit" in tried) == (name != "bert")
    assert ("cached decoding = the whole text, cache 'ring'" in tried) == (name == "mistral")
    assert ("sources padded on the left = alone" in tried) == (name in ("t5", "bart", "led"))
    assert "packed = alone" in tried
    (empty,) = [row for row in report.rows if row.property == "a row of padding attends to nothing"]
    assert empty.compared == f"the weights of {1 if name in ('bart', 'led') else 2} layers"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype):
    report = lamina.verify(tiny.model(tiny.MISTRAL).to(dtype))
    assert report.passed, str(report)


def test_a_checkpoint_is_given_back(tmp_path):
    report = lamina.verify(lamina.load(tiny.checkpoint(tmp_path / "tiny")))
    assert report.passed, str(report)
    assert any(row.property == "loading and saving gives back the file" for row in report.rows)
    other = lamina.verify(lamina.load(tmp_path / "tiny", dtype="bfloat16"))
    assert other.passed, str(other)
    (row,) = [row for row in other.rows if row.property == "loading and saving gives back the file"]
    assert row.verdict == "not tried"


def test_weights_that_are_not_finite_are_named():
    model = tiny.model()
    with torch.no_grad():
        model.decoder.layers[1].attention.op.q.weight[3, :2] = torch.nan
    (row, *_) = lamina.verify(model).rows
    assert row.verdict == "fails" and row.worst == 2
    assert "decoder.layers.1.attention.op.q.weight has 2" in row.note
    overflowing = tiny.model()
    with torch.no_grad():
        overflowing.embedding.weight[0, :2] = 3e38
    (row, *_) = lamina.verify(overflowing).rows
    assert row.verdict == "holds"


def test_a_backend_that_forgets_the_window_fails(monkeypatch):
    honest = sdpa.attend

    def forgetful(request):
        from dataclasses import replace

        from lamina.patterns import Causal

        return honest(replace(request, pattern=Causal(), memo={}))

    monkeypatch.setattr(sdpa, "attend", forgetful)
    found = failing(tiny.model(tiny.MISTRAL))
    assert "attention reaches as far as Causal() & Window(back=5) says" in found and "backends agree" in found


def test_a_leak_from_the_future_fails():
    model = tiny.model()
    attention = model.decoder.layers[0].attention
    forward = attention.forward
    attention.forward = lambda x, call: forward(x, call) + x.mean(dim=1, keepdim=True)
    found = failing(model)
    assert "later tokens change no earlier bit" in found and "packed = alone" in found
    assert any(name.startswith("cached decoding") for name in found) and "padded on the left = alone" in found


def test_noise_and_records_that_meddle_fail():
    noisy = tiny.model()
    forward = noisy.decoder.norm.forward
    noisy.decoder.norm.forward = lambda x: forward(x) + 1e-3 * torch.rand(())
    assert {"the same input gives the same bits", "generating twice gives the same"} & failing(noisy)
    meddled = tiny.model()
    inner = meddled.decoder.forward
    meddled.decoder.forward = lambda x, call, segments=None: (
        inner(x, call, segments) * (1 + 1e-6 * len(call.record.names))
    )
    assert failing(meddled) == {"recording changes no bit"}


def test_blind_rows_and_hidden_nan_fail(monkeypatch):
    monkeypatch.setattr(dense, "attend", lambda request: dense.weights(request) @ request.value.repeat_interleave(
        request.query.shape[1] // request.value.shape[1], dim=1))  # fmt: skip
    found = failing(tiny.model())
    assert found == {"NaN in keys that nobody sees does not leak"}
    monkeypatch.setattr(dense, "weights", lambda request: torch.softmax(request.query @ request.key.repeat_interleave(
        request.query.shape[1] // request.key.shape[1], dim=1).mT * request.scale, dim=-1))  # fmt: skip
    assert "a query that sees no key gives zeros" in failing(tiny.model())


def test_cross_attention_that_sees_all_of_the_source_fails(monkeypatch):
    """Padding and the source of another pair: told to nobody, both are read."""
    from lamina.layers import cross
    from lamina.tokens import plain

    def blurred(**fields):
        return Request(**fields | {name: plain(*fields[name].position.shape) for name in ("queries", "keys")})

    monkeypatch.setattr(cross, "Request", blurred)
    model = tiny.model(tiny.T5)
    names = {"packed = alone", "sources padded on the left = alone", "sources padded on the right = alone"}
    assert names <= failing(model)


def test_a_model_that_raises_fails_and_the_rest_goes_on():
    model = tiny.model()
    model.new_cache = None
    report = lamina.verify(model)
    rows = {row.property: row for row in report.rows if row.verdict == "fails"}
    assert "cached decoding" in rows and "TypeError" in rows["cached decoding"].note
    assert report.rows[-1].property == "the compiled step = the model"


def test_a_spec_that_lies_fails():
    model = tiny.model()
    model.spec = model.spec.replace(width=64)
    assert "the spec says every shape" in failing(model)


def test_tolerances_are_those_that_are_stated():
    worst = conformance.report.Difference()
    worst.add(torch.tensor([1000.0, 1.0]), torch.tensor([1000.0, 1.01]))
    assert worst.allowed == pytest.approx(256 * torch.finfo(torch.float32).eps * 1000)
    assert worst.row("a", "b").verdict == "holds"
    worst.add(torch.tensor([torch.nan]), torch.tensor([1.0]))
    assert worst.row("a", "b").verdict == "fails"
