"""examples/whisper.py and the real Whisper tiny.en: what it hears, and that cross-attention and its cache are right."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lamina
from tests.recordings import recording
from tests.test_acceptance import fetched

EXAMPLE = Path(__file__).parent.parent / "examples" / "whisper.py"
CITIES = (
    "It was the best of times, it was the worst of times. It was the age of wisdom, it was the age of foolishness. "
    "It was the epoch of belief, it was the epoch of incredulity. It was the season of light, it was the season of "
    "darkness. It was the spring of hope, it was the winter of despair. We had everything before us, we had nothing "
    "before us. We were all going direct to heaven, we were all going direct the other way."
)
TEXTS = {
    "beckett": (
        "Ever tried, ever failed. No matter, try again. Fail again. Fail better.",
        "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better.",
    ),
    "two_cities": (CITIES, CITIES.replace(", it", ". It").replace(", we", ". We")),  # five beams prefer full stops
}
"""Of the first 30 seconds, greedy and with 5 beams. CTranslate2 4.8.5 writes the same from the same file."""


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    pytest.importorskip("librosa", reason="librosa is not installed: pip install 'lamina[audio]'")
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def whisper() -> tuple[lamina.Model, Any]:
    fetched("whisper-tiny.en")
    return lamina.load("whisper-tiny.en", dtype="float32"), lamina.tokenizer("whisper-tiny.en")


@pytest.fixture(scope="module")
def theirs(whisper: tuple[lamina.Model, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers with the same weights, through a directory that lamina writes."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("whisper") / "tiny.en"
    lamina.save(whisper[0], directory)
    return transformers.WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def heard(example: dict[str, Any], name: str) -> np.ndarray:
    path = recording(name)
    if path is None:
        pytest.skip(f"the recording {name} is not here: python tests/recordings.py")
    return sys.modules["librosa"].load(path, sr=example["RATE"])[0]


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("seconds", [0.5, 30.0, 31.0])
def test_the_spectrogram_is_that_of_transformers(example: dict[str, Any], bins: int, seconds: float):
    """A tone that rises through all of the bands, in noise."""
    transformers = pytest.importorskip("transformers")
    time = np.arange(int(seconds * 16_000)) / 16_000
    noise = np.random.default_rng(0).normal(size=len(time))
    sound = (0.5 * np.sin(2 * np.pi * 4000 / seconds * time**2) + 0.01 * noise).astype(np.float32)
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
    expected = extractor(sound, sampling_rate=16_000, return_tensors="pt").input_features
    got = example["log_mel"](sound, bins)
    assert got.shape == expected.shape == (1, bins, 3000) and got.dtype == torch.float32
    assert float(got.max() - got.min()) > 1.5  # there is something to hear
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_silence_has_a_spectrogram(example: dict[str, Any]):
    got = example["log_mel"](np.zeros(0, np.float32), 80)
    torch.testing.assert_close(got, torch.full((1, 80, 3000), -1.5))  # 10^-10, so (-10 + 4) / 4


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("beams", [1, 5])
def test_it_writes_down_what_is_said(example: dict[str, Any], whisper: tuple[lamina.Model, Any], name: str, beams: int):
    sound = heard(example, name)[: 30 * example["RATE"]]
    pieces = list(example["transcribe"](*whisper, sound, beams))
    assert "".join(pieces).strip() == TEXTS[name][beams > 1]
    assert len(pieces) > 10 or beams > 1  # as it is written


def test_the_program(example: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The whole of a recording of 44 seconds, in two parts; the cut falls into a word."""
    fetched("whisper-tiny.en")
    heard(example, "two_cities")
    monkeypatch.setattr(sys, "argv", ["whisper.py", str(recording("two_cities"))])
    example["main"]()
    out = capsys.readouterr().out
    assert out.startswith(f"{TEXTS['two_cities'][0]} ")
    assert out.endswith("received for good or for evil in the superlative degree of comparison only.\n")
    monkeypatch.setattr(sys, "argv", ["whisper.py", "nowhere.wav"])
    with pytest.raises(SystemExit):
        example["main"]()
    assert "no file 'nowhere.wav'" in capsys.readouterr().err


@torch.no_grad()
def test_logits_equal_transformers(example: dict[str, Any], whisper: tuple[lamina.Model, Any], theirs: Any):
    """All at once, with the cache one by one, and by what the encoder gave."""
    model, tokenizer = whisper
    features = example["log_mel"](heard(example, "beckett"), 80)
    begin = example["beginning"](model, tokenizer, "en")
    ids = torch.cat([begin, torch.tensor([tokenizer.encode(f" {TEXTS['beckett'][0]}", special=False)])], dim=1)
    expected = theirs(input_features=features, decoder_input_ids=ids).logits
    assert float(expected.abs().max()) > 20
    whole = model(input_features=features, decoder_input_ids=ids)
    torch.testing.assert_close(whole.logits, expected, rtol=0, atol=1e-4)
    assert whole.logits[0, 1:-1].argmax(dim=1).tolist() == ids[0, 2:].tolist()  # it is what it would have written
    cache = model.new_cache(batch=1)
    memory = model.encode(input_features=features)
    assert torch.equal(memory, whole.encoder_output)
    steps = [model(encoder_output=memory, decoder_input_ids=one, cache=cache).logits for one in ids.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 5])
def test_ids_equal_transformers(example: dict[str, Any], whisper: tuple[lamina.Model, Any], theirs: Any, beams: int):
    """Two recordings in one batch, by transformers' plain loop."""
    transformers = pytest.importorskip("transformers")
    model, tokenizer = whisper
    features = torch.cat([example["log_mel"](heard(example, name), 80) for name in TEXTS])
    begin = example["beginning"](model, tokenizer, "en").expand(2, -1)
    held = {name: model.origin.generation[name] for name in ("suppress_tokens", "begin_suppress_tokens")}
    expected = transformers.GenerationMixin.generate(
        theirs, input_features=features, decoder_input_ids=begin, max_new_tokens=120, num_beams=beams, do_sample=False,
        length_penalty=1.0, early_stopping=False, **held,
    )  # fmt: skip
    got = lamina.generate(model, input_features=features, decoder_input_ids=begin, max_new_tokens=120, beams=beams)
    assert torch.equal(got, expected)
    assert [tokenizer.decode(row[2:].tolist()).strip() for row in got] == [text[beams > 1] for text in TEXTS.values()]


def test_the_stored_half_precision_writes_the_same(example: dict[str, Any], whisper: tuple[lamina.Model, Any]):
    model = lamina.load("whisper-tiny.en")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    pieces = example["transcribe"](model, whisper[1], heard(example, "beckett"))
    assert "".join(pieces).strip() == TEXTS["beckett"][0]


def test_text_is_refused_by_name(whisper: tuple[lamina.Model, Any]):
    with pytest.raises(lamina.LaminaError, match="input_ids is for models without a stem; this one reads input_feat"):
        lamina.generate(whisper[0], torch.tensor([[1, 2]]), max_new_tokens=2)


@pytest.mark.slow
def test_it_passes_verify():
    fetched("whisper-tiny.en")
    report = lamina.verify(lamina.load("whisper-tiny.en"))
    assert report.passed, str(report)
