"""A folder in the Hugging Face layout, opened by transformers (extra lamina[transformers])."""

from __future__ import annotations

import os
from typing import Any

from lamina.errors import CheckpointError, UnsupportedError
from lamina.locate import locate


def open_with_transformers(source: str | os.PathLike[str], dtype: str | None = None, device: str = "cpu") -> Any:
    """The model of a directory in the Hugging Face layout, opened by transformers as the class that its files name.

    Raises UnsupportedError without transformers or for another kind of SOURCE, CheckpointError where it refuses.
    """
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError("transformers is not here: pip install 'lamina[transformers]'") from error
    located = locate(source)
    if not (located.path / "config.json").is_file():
        raise UnsupportedError(f"{source}: transformers opens directories with a config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(located.path)
        named = next(iter(config.architectures or ()), "")
        opener = getattr(transformers, named, transformers.AutoModel)
        model = opener.from_pretrained(located.path, dtype=dtype or "auto")
    except (OSError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source}: transformers cannot open it: {said}") from error
    return model.to(device).eval()
