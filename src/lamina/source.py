"""Sources: one grammar for everything that can be loaded, and the loading, saving and reading of specs behind it.

SOURCE is a local directory (Hugging Face or native layout), a `.gguf` or `.safetensors` file, a Whisper that
CTranslate2 converted (`model.bin`, or its directory), `hf:owner/name[@revision]` (an unprefixed owner/name that is no
local path means that), a packaged model, or, for specs only, `family/size`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lamina.errors import LaminaError
from lamina.exporting import save
from lamina.families import Fields, family, sizes
from lamina.filling import fill
from lamina.locate import locate
from lamina.model import Model, ModelSpec
from lamina.opening import gguf_tokenizer, open_source
from lamina.specs import unknown

if TYPE_CHECKING:
    from lamina.text import Tokenizer

__all__ = ["load", "save", "spec", "tokenizer"]


def spec(source: str | os.PathLike[str]) -> ModelSpec:
    """The architecture of a published `family/size` or of any SOURCE, without reading weights."""
    located = locate(source)
    if located.kind == "published":
        model_type = sizes()[located.name]
        said = {"model_type": model_type, **family(model_type).sizes[located.name]}
        return family(model_type).spec(Fields(said, where=located.name))
    return open_source(located).spec


def load(
    source: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    compile: bool = False,
    *,
    quantize: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    allow_missing: bool = False,
    allow_unexpected: bool = False,
    strict: bool = False,
    **wrong: Any,
) -> Model:
    """A model in evaluation mode, its weights mapped from the file where nothing has to be converted.

    dtype: None keeps what is stored. Tensors that are missing or unexpected are refused unless allowed, and then listed
    in `model.origin.initialised` or warned of. strict: non-finite weights are refused, not only warned of.
    compile: decoding uses a step compiled once per machine. quantize="int8": 8-bit weights for decoding.
    adapter: a LoRA that peft wrote (a directory, or hf:owner/name), merged into the weights.
    Raises CheckpointError for damaged files, LaminaError for a SOURCE that does not exist or has no weights.
    """
    if wrong:
        known = ["dtype", "device", "compile", "quantize", "adapter", "allow_missing", "allow_unexpected", "strict"]
        raise LaminaError(unknown("argument of load", next(iter(wrong)), known))
    located = locate(source)
    if located.kind == "published":
        raise LaminaError(
            f"{located.name!r} is a published architecture and has no weights here;"
            f" load hf:owner/name or a directory, or build random weights with lamina.spec({located.name!r}).build()"
        )
    with _no_collection():
        opened = open_source(located)
        model = opened.spec.build(device="meta").eval()
        fill(model, opened, _dtype(dtype), allow_missing, allow_unexpected, strict)
    model.origin = opened.origin
    if adapter is not None:
        from lamina.adapters import merge
        from lamina.adapting import read_adapter

        read_adapter(model, adapter)
        merge(model)
    if torch.device(device).type != "cpu":
        model = model.to(device)
    if compile or quantize is not None:
        from lamina.generation.compiled import prepare

        prepare(model, compile=compile, quantize=quantize)
    return model


@contextmanager
def _no_collection() -> Iterator[None]:
    """Put garbage collection off: a model is thousands of objects that all stay, and to go through all that torch has,
    again and again while they are made, takes longer than to make them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a SOURCE. Raises CheckpointError where it has none, LaminaError for published sizes."""
    located = locate(source)
    if located.kind == "published":
        raise LaminaError(f"{located.name!r} is a published architecture and has no tokenizer here; name a checkpoint")
    from lamina.text import from_directory

    if located.kind == "gguf":
        return gguf_tokenizer(located.path)
    return from_directory(located.path if located.path.is_dir() else located.path.parent)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype not in named:
        raise LaminaError(unknown("dtype", dtype, named))
    return named[dtype]
