"""Write down what is said in a recording, with Whisper (arXiv:2212.04356): its encoder hears, its decoder writes.

pip install 'lamina[audio]'
lamina fetch whisper-tiny.en
python examples/whisper.py RECORDING.wav [--beams 5] [--source whisper-tiny.en] [--language en]

Whisper hears 30 seconds at a time, so a longer recording is cut there, and a word on a cut may be lost.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import librosa
import numpy as np
import torch

import lamina
from lamina.generation import Sampling, limits_of, stream
from lamina.text import Tokenizer

RATE, WINDOW, HOP, SECONDS = 16_000, 400, 160, 30  # samples a second, in a window, between windows (section 2.2)


def log_mel(sound: np.ndarray, bins: int) -> torch.Tensor:
    """(samples,) at RATE -> (1, bins, 3000): 30 seconds, what is beyond the sound as silence.

    The powers of a short-time Fourier transform through mel filters (Slaney's), the logarithm of base 10; what is more
    than 80 dB below the loudest is raised to there, and the result brought to about -1 ... 1.
    """
    sound = np.pad(sound[: SECONDS * RATE], (0, max(0, SECONDS * RATE - len(sound))))
    power = librosa.feature.melspectrogram(
        y=sound, sr=RATE, n_fft=WINDOW, hop_length=HOP, n_mels=bins, pad_mode="reflect", htk=False, norm="slaney"
    )
    spectrum = np.log10(np.maximum(power[:, :-1], 1e-10))  # the last window stands after the end
    spectrum = np.maximum(spectrum, spectrum.max() - 8)
    return torch.from_numpy(((spectrum + 4) / 4).astype(np.float32))[None]


def beginning(model: lamina.Model, tokenizer: Tokenizer, language: str) -> torch.Tensor:
    """(1, T): the ids that ask for a transcript without times; a model of many languages is told which one it hears."""
    several = model.origin.generation.get("is_multilingual")
    task = (f"<|{language}|>", "<|transcribe|>") if several else ()
    return torch.tensor([[tokenizer.tokens[one] for one in ("<|startoftranscript|>", *task, "<|notimestamps|>")]])


def transcribe(
    model: lamina.Model, tokenizer: Tokenizer, sound: np.ndarray, beams: int = 1, language: str = "en"
) -> Iterator[str]:
    """The text of a sound at RATE, piece by piece: as it is written, or with beams by 30 seconds."""
    assert model.stem is not None
    begin, most = beginning(model, tokenizer, language), model.spec.context // 2
    for start in range(0, len(sound), SECONDS * RATE):
        features = log_mel(sound[start : start + SECONDS * RATE], model.stem.spec.bins)
        if beams > 1:
            ids = lamina.generate(
                model, input_features=features, decoder_input_ids=begin, max_new_tokens=most, beams=beams
            )
            yield tokenizer.decode(ids[0, begin.shape[1] :].tolist())
            continue
        pieces = tokenizer.stream(skip_special=True)
        limits = limits_of(model, most)
        for step in stream(model, features, sampling=Sampling(), limits=limits, decoder_input_ids=begin):
            yield pieces.push(int(step.ids[0]))
        yield pieces.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", help="a file that libsndfile reads: WAV, FLAC, OGG, MP3")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--source", default="whisper-tiny.en")
    parser.add_argument("--language", default="en", help="what is spoken, for models of many languages")
    options = parser.parse_args()
    if not Path(options.recording).is_file():
        parser.error(f"no file {options.recording!r}")
    model, tokenizer = lamina.load(options.source, dtype="float32"), lamina.tokenizer(options.source)
    sound, _ = librosa.load(options.recording, sr=RATE)
    begun = False
    for piece in transcribe(model, tokenizer, sound, options.beams, options.language):
        print(piece if begun else piece.lstrip(), end="", flush=True)
        begun = begun or bool(piece.strip())
    print()


if __name__ == "__main__":
    main()
