"""More learned positions, or fewer: copies of the table (arXiv:2004.05150, section 5), or rows between its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import LearnedPositionSpec
from lamina.model import ModelSpec
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.places import StackName, stack_of
from lamina.surgery.weights import Made, Weights, in_float32


@dataclass(frozen=True, kw_only=True)
class PositionsOperation(Operation):
    """A table of `size` learned positions, and a model that reads as many tokens.

    "tile": the table again and again; fewer: its beginning. "interpolate": position j of `size` lies at
    j (old - 1) / (size - 1) of the old table, on the line between the two rows beside it. Rows before position 0, which
    RoBERTa and BART have, stay as they are.
    """

    NAME = "positions"

    size: int
    by: Literal["tile", "interpolate"] = "tile"
    stack: StackName | None = None  # None: each that has learned positions

    def check(self) -> None:
        if self.size < 1:
            raise LaminaError(f"size is {self.size}; it must be at least 1")

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = self._tables(spec)
        made: dict[str, Made] = {}
        new = spec
        for path, position in found.items():
            stack = stack_of(new, path)[1]
            new = new.replace(**{path: stack.replace(position=position.replace(size=self.size))})
            name, old, offset = f"{path}.position.weight", position.size, position.offset
            if old == self.size:
                continue
            if self.by == "interpolate":
                how = f"{self.size} positions between {old}"
                function = in_float32(partial(_between, offset=offset, size=self.size))
            else:
                how = f"{old} positions again and again" if self.size > old else f"the first {self.size} positions"
                function = partial(_tiled, offset=offset, size=self.size)
            made[name] = Made((name,), how, function)
        sizes = {position.size for position in found.values()}
        if spec.context is not None and ("decoder" in found or not spec.two_stacks):
            new = new.replace(context=self.size)
        whole = len(sizes) == 1 and ((self.by == "tile" and min(sizes) <= self.size) or sizes == {self.size})
        fits = new.context in (None, spec.context) or sizes == {spec.context}  # the way back gives the context too
        undo = (PositionsOperation(size=min(sizes), stack=self.stack),) if whole and fits else None
        return Changed(new, Weights(weights, made), self._promise(sizes), undo)

    def _tables(self, spec: ModelSpec) -> dict[StackName, LearnedPositionSpec]:
        sides: list[StackName] = ["encoder", "decoder"] if self.stack is None else [stack_of(spec, self.stack)[0]]
        found: dict[StackName, LearnedPositionSpec] = {}
        for side in sides:
            stack = spec.encoder if side == "encoder" else spec.decoder
            if stack is not None and isinstance(stack.position, LearnedPositionSpec):
                found[side] = stack.position
        if not found:
            raise LaminaError(f"no learned positions (LearnedPositionSpec) in {' or '.join(sides)}")
        return found

    def _promise(self, sizes: set[int]) -> Promise:
        if sizes == {self.size}:
            return Promise("exact", "there are as many positions already", bits=True)
        if self.by == "interpolate":
            return Promise("lossy", "all positions but the first and the last are others")
        return Promise("bounded", f"the same for texts of up to {min(*sizes, self.size)} tokens")


def _tiled(table: Tensor, offset: int, size: int) -> Tensor:
    rows = torch.arange(size, device=table.device) % (len(table) - offset)
    return torch.cat([table[:offset], table[offset:][rows]])


def _between(table: Tensor, offset: int, size: int) -> Tensor:
    rows = table[offset:]
    at = torch.arange(size, dtype=torch.float64, device=table.device) * (len(rows) - 1) / max(size - 1, 1)
    below = at.long()
    above = (below + 1).clamp(max=len(rows) - 1)
    part = (at - below)[:, None].to(table.dtype)
    return torch.cat([table[:offset], rows[below] * (1 - part) + rows[above] * part])
