"""benchmarks/qualitative.py: its models are those that are meant, and its verdicts are those of the figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import qualitative
from benchmarks.qualitative import CLAIMS, DECODERS, Claim, Repeated, judged, language, markdown, prepared

ROOT = Path(__file__).parent.parent.parent
WIDTH, LAYERS, VOCABULARY, LENGTH = 128, 4, 65, 64
ATTENTION, TABLES, NORMS = 4 * WIDTH * WIDTH, (VOCABULARY + LENGTH) * WIDTH, (2 * LAYERS + 1) * WIDTH


def parameters(name: str) -> int:
    model = DECODERS[name].spec(VOCABULARY).build(device="meta")
    return sum(weight.numel() for weight in model.parameters())


def test_the_models_are_of_one_size():
    plain = LAYERS * (ATTENTION + 2 * WIDTH * 4 * WIDTH)
    gpt = plain + TABLES + 2 * NORMS  # a norm has a weight and a bias
    assert parameters("learned") == parameters("relu") == gpt == 805_248
    assert parameters("rotary") == parameters("alibi") == parameters("no positions") == gpt - LENGTH * WIDTH
    assert parameters("rms") == gpt - NORMS
    assert parameters("post-norm") == gpt - 2 * WIDTH  # no norm at the end
    assert parameters("parallel") == gpt - LAYERS * 2 * WIDTH  # one norm for both branches
    gated = LAYERS * (ATTENTION + 3 * WIDTH * 341)
    assert parameters("swiglu") == parameters("geglu") == gated + TABLES + 2 * NORMS
    assert parameters("llama") == LAYERS * (ATTENTION + 3 * WIDTH * 340) + VOCABULARY * WIDTH + NORMS == 793_856
    for name, hidden in (("top-1", 512), ("top-2", 256)):
        experts = LAYERS * (ATTENTION + 4 * (2 * WIDTH * hidden) + 4 * WIDTH)
        assert parameters(name) == experts + TABLES + 2 * NORMS


@pytest.mark.parametrize("name", ["alibi", "llama", "top-2"])
def test_a_language_model_is_trained_and_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(qualitative, "HELD", 64)
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "CHANGELOG.md").read_text(), encoding="utf-8")
    figures = language(DECODERS[name], 0, prepared(text, tmp_path / "data"), steps=2)
    assert 1 < figures["loss"] < 6 and 1 < figures["training loss"] < 6
    assert ("loss at 4 x length" in figures) == (name != "top-2")
    if name == "top-2":
        assert 0 <= figures["lowest load"] <= 0.25 <= figures["highest load"] <= 1


def test_sequences_repeat_after_their_period():
    for index in range(20):
        one = Repeated().example(index, np.random.default_rng(index))
        tokens, period = one["tokens"], int(one["period"])
        assert len(tokens) == 65 and 8 <= period <= 32 and len(set(tokens[:period].tolist())) == period
        assert (tokens[period:] == tokens[:-period]).all()
    assert int(Repeated(fixed=True).example(0, np.random.default_rng(0))["period"]) == 32


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        ([1.0, 1.1], [2.0, 2.2], 0.85, "holds"),
        ([1.0, 1.1], [2.0, 2.2], 0.95, "smaller than claimed"),  # the worst pair is 0.9 apart
        ([1.0, 1.3], [1.2, 1.5], 0.0, "inside the noise"),
        ([2.0, 2.1], [1.0, 1.1], 0.0, "does not hold"),
        ([1.0], [2.0], 0.5, "one seed only"),
    ],
)
def test_verdicts(low: list[float], high: list[float], margin: float, verdict: str):
    runs = {
        name: {str(seed): {"loss": value} for seed, value in enumerate(values)}
        for name, values in (("a", low), ("b", high))
    }
    found = judged(Claim("a below b", ("a", "loss"), ("b", "loss"), margin), runs)
    assert found is not None and found["verdict"] == verdict
    assert judged(Claim("a below c", ("a", "loss"), ("c", "loss")), runs) is None


def test_a_claim_may_be_about_a_number():
    runs = {"a": {"0": {"accuracy": 0.97}, "1": {"accuracy": 0.99}}}
    found = judged(Claim("a above 0.95", 0.95, ("a", "accuracy")), runs)
    assert found is not None and found["verdict"] == "holds" and found["worst"] == pytest.approx(0.02)


def test_the_page_says_what_was_measured():
    document = json.loads((ROOT / "benchmarks/results/qualitative.json").read_text())
    again = [one for claim in CLAIMS if (one := judged(claim, document["runs"])) is not None]
    assert document["claims"] == again
    page = (ROOT / "docs/qualitative.md").read_text(encoding="utf-8")
    for line in markdown(document):
        assert line in page, f"docs/qualitative.md lacks: {line}"


def test_claims_are_of_the_runs_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where a file has all the runs and its claims are of fewer."""

    def two(loss: float) -> dict[str, dict[str, float]]:
        return {str(seed): {"loss": loss + seed / 10, "loss at 4 x length": 3.0} for seed in range(2)}

    runs = {"learned": two(2.5), "rotary": two(2.0)}
    stale = {"text": "a.txt", "runs": runs, "claims": [{"claim": "an old one", "verdict": "one seed only"}]}
    text, kept = tmp_path / "a.txt", tmp_path / "a.json"
    text.write_text("what is said of transformers. " * 400)
    kept.write_text(json.dumps(stale))
    command = ["qualitative.py", "--text", str(text), "--only", "learned", "rotary", "--json", str(kept)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(qualitative, "markdown", lambda document: [])
    threads = torch.get_num_threads()
    try:
        qualitative.main()
    finally:
        torch.set_num_threads(threads)
    claims = {one["claim"]: one for one in json.loads(kept.read_text())["claims"]}
    assert claims["rotary positions below learned ones"]["seeds"] == 2 and "an old one" not in claims
    assert claims["rotary positions below learned ones"]["gap"] == pytest.approx(0.5)
