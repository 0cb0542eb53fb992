"""Filling a model with the tensors of a checkpoint, after all names and shapes have been checked."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import CheckpointError
from lamina.model import Model
from lamina.opening import Opened
from lamina.weights import rules
from lamina.weights.headers import Entry
from lamina.weights.rules import Move, Shape


def fill(
    model: Model, opened: Opened, dtype: torch.dtype | None, allow_missing: bool, allow_unexpected: bool, strict: bool
) -> None:
    """Give every parameter its tensor, one rule at a time, after the names and shapes have been checked as a whole."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    present, missing = checked(opened, shapes, allow_missing, allow_unexpected)
    where = opened.origin.located.path
    bad: list[str] = []
    homes = dict(model.named_modules())

    def put(name: str, tensor: Tensor) -> None:
        tensor = tensor if dtype is None else tensor.to(dtype)
        if not math.isfinite(tensor.sum(dtype=torch.float32).item()):
            count = int((~torch.isfinite(tensor)).sum())
            bad.extend([f"{name} ({count} of {tensor.numel()})"] if count else [])
        path, _, leaf = name.rpartition(".")
        old = homes[path]._parameters[leaf]
        homes[path]._parameters[leaf] = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad)

    try:
        rules.load(present, shapes, opened.checkpoint.read, put)
    except CheckpointError as error:
        raise CheckpointError(str(error) if where.name in str(error) else f"{where}: {error}") from None
    if bad:
        message = f"{where}: weights that are not finite: {_some(bad)}"
        if strict:
            raise CheckpointError(message)
        warnings.warn(message, stacklevel=3)
    if missing:
        opened.origin.initialised = _initialise_missing(model, dtype)


def checked(
    opened: Opened, shapes: Mapping[str, Shape], allow_missing: bool = False, allow_unexpected: bool = False
) -> tuple[list[Move], list[str]]:
    """The rules by which the weights of these shapes are read, and the tensors that are missing.

    Raises CheckpointError for tensors of other names, unless they are allowed, and of other shapes.
    """
    moves = rules.bind(opened.rules, shapes)
    wanted = rules.their_shapes(moves, shapes)
    entries = opened.checkpoint.entries
    where = opened.origin.located.path
    missing = [name for name in wanted if name not in entries]
    opened.origin.extras = {n: tensor for n, tensor in opened.origin.extras.items() if n not in wanted}
    known = {*wanted, *opened.origin.extras, *opened.origin.twins}
    unexpected = [name for name in entries if name not in known]
    if missing and not allow_missing:
        raise CheckpointError(f"{where}: {_listed('missing', missing, entries)}")
    if unexpected and not allow_unexpected:
        raise CheckpointError(f"{where}: {_listed('unexpected', unexpected, wanted)}")
    if unexpected:
        warnings.warn(f"{where}: left out {len(unexpected)} unexpected tensors: {_some(unexpected)}", stacklevel=4)
    for move in moves:
        for name in move.theirs:
            if name in entries and tuple(entries[name].shape) != wanted[name]:
                raise CheckpointError(
                    f"{where}: {name} has shape {list(entries[name].shape)}; {move.ours[0]} needs {list(wanted[name])}"
                    f"{_cause(name, entries[name].shape, wanted[name])}"
                )
    _refuse_integers(entries, wanted, where)
    return [move for move in moves if not any(name in missing for name in move.theirs)], missing


class Stored(Mapping[str, Tensor]):
    """The weights of a checkpoint under our names, each read when it is looked up, and not kept.

    Raises CheckpointError as `lamina.load` does for a file that is not what its configuration says.
    """

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.shapes = {name: tuple(p.shape) for name, p in opened.spec.build(device="meta").named_parameters()}
        moves, _ = checked(opened, self.shapes)
        self.moves = {name: move for move in moves for name in move.ours}
        self.last: tuple[Move, dict[str, Tensor]] | None = None  # q, k and v of one matrix are asked for in turn

    def __getitem__(self, name: str) -> Tensor:
        move = self.moves[name]
        if self.last is None or self.last[0] is not move:
            self.last, found = None, {}
            rules.load([move], self.shapes, self.opened.checkpoint.read, found.__setitem__)
            self.last = move, found
        return self.last[1][name]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def dtype(self, name: str) -> torch.dtype:
        """That of a weight, without reading it."""
        return self.opened.checkpoint.entries[self.moves[name].theirs[0]].dtype


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter called `name`."""
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor)


def _initialise_missing(model: Model, dtype: torch.dtype | None) -> list[str]:
    fresh = model.spec.build(device="cpu", dtype=dtype)
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    for name in absent:
        place(model, name, fresh.get_parameter(name).detach())
    return absent


def _refuse_integers(entries: Mapping[str, Entry], wanted: Mapping[str, Any], where: Path) -> None:
    for name in wanted:
        if name in entries and not entries[name].dtype.is_floating_point:
            raise CheckpointError(f"{where}: {name} is {entries[name].dtype}; weights must be of a float type")


def _listed(what: str, names: list[str], others: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(names[0], list(others), n=3, cutoff=0.6)
    hint = f"; nearest there: {', '.join(near)}" if near else ""
    return f"{len(names)} {what} tensor{'s' if len(names) > 1 else ''}: {_some(names)}{hint}"


def _some(names: list[str]) -> str:
    shown = [name if len(name) <= 120 else name[:117] + "..." for name in names[:6]]
    return ", ".join(repr(n)[1:-1] for n in shown) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _cause(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if len(found) == len(wanted) and found[1:] == wanted[1:]:
        if "embed" in name or "lm_head" in name or "wte" in name:
            return " (was the vocabulary resized without changing vocab_size?)"
        if ".k_proj" in name or ".v_proj" in name:
            return " (does num_key_value_heads or head_dim in config.json fit this file?)"
    return " (config.json does not describe this file)"
