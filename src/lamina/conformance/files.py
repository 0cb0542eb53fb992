"""Checks of files: what is saved is read again bit for bit, and a checkpoint is given back as it was."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lamina.conformance.report import Row, judged, left_out
from lamina.errors import UnsupportedError
from lamina.model import Model
from lamina.source import load, save
from lamina.weights.files import Checkpoint

LARGEST = 2**30  # bytes of weights beyond which nothing is written


def saving(model: Model) -> Iterator[Row]:
    name = "what is saved is read again, bit for bit"
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > LARGEST:
        yield left_out(name, f"{size / 2**30:.1f} GiB of weights; up to {LARGEST / 2**30:.0f} GiB are written for this")
        return
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "saved"
        origin = model.origin
        exact = origin is not None and origin.family is not None and origin.config_text is not None
        try:
            save(model, folder, format="hf" if exact else "native")
        except UnsupportedError as error:
            yield left_out(name, f"refused: {error}")
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are not finite: a row of their own
            again = load(folder)
        ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
        different = sum(n not in theirs or not same_bits(p, theirs[n]) for n, p in ours.items()) + (
            again.spec != model.spec
        )
        layout = "Hugging Face layout" if exact else "native layout"
        yield judged(name, f"spec and {len(ours)} parameters, {layout}", float(different))
        if origin is not None and exact:
            yield _given_back(origin.located.path, folder)


def _given_back(source: Path, folder: Path) -> Row:
    name = "loading and saving gives back the file"
    before, after = Checkpoint(source), Checkpoint(folder)
    if set(before.entries) == set(after.entries) and any(
        before.entries[n].dtype != after.entries[n].dtype for n in before.entries
    ):
        return left_out(name, "it was loaded with another dtype than the file has")
    different = len(set(before.entries) ^ set(after.entries))
    different += sum(not same_bits(before.read(n), after.read(n)) for n in set(before.entries) & set(after.entries))
    parent = source if source.is_dir() else source.parent
    config = (parent / "config.json").read_bytes() != (folder / "config.json").read_bytes()
    said = f"names, dtypes, shapes and bytes of {len(before.entries)} tensors, and config.json"
    return judged(name, said, float(different + config))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
