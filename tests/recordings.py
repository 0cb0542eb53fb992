"""The recordings that tests/test_whisper.py listens to. To get them: python tests/recordings.py

They are data of the package moonshine-voice (MIT); nothing of it is installed or run. They lie beside the packaged
models, in the data directory, which LAMINA_DATA chooses.
"""

from pathlib import Path

from lamina.cli.fetch import get
from lamina.cli.output import Output
from lamina.packaged import Packaged, data_directory

NAME = "recordings"
RECORDINGS = Packaged(
    package="moonshine-voice",
    version="0.1.5",
    files={f"moonshine_voice/assets/{name}": name for name in ("beckett.wav", "two_cities.wav")},
    main="two_cities.wav",
    sha256="f3348494d77cb74a02862f5e685ed09faf3e75832c5cc5c80703282c2cd8b52e",
    licence="MIT",
)


def recording(name: str) -> Path | None:
    """Where a recording lies; None where it has not been fetched."""
    path = data_directory() / NAME / f"{name}.wav"
    return path if path.is_file() else None


if __name__ == "__main__":
    print(get(NAME, RECORDINGS, Output())["path"])
