"""Weight maps: one table says how our parameters and a checkpoint's tensors correspond, and is read both ways.

Sizes come from our own shapes, so every operation can be undone by construction. Rules run one at a time: loading and
saving need the memory of the model and of one rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lamina.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Same:
    """One tensor, as it is."""

    def load(self, theirs: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        return list(theirs)

    def save(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return list(ours)


@dataclass(frozen=True)
class Turn:
    """A matrix stored [in, out] (GPT-2's Conv1D); ours are [out, in]. Vectors are as they are."""

    def load(self, theirs: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        return [tensor.t().contiguous() for tensor in theirs]

    def save(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.t().contiguous() for tensor in ours]


@dataclass(frozen=True)
class OneRow:
    """A vector stored as a matrix of one row (BART's bias of the logits)."""

    def load(self, theirs: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        return [tensor.flatten() for tensor in theirs]

    def save(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [tensor[None] for tensor in ours]


@dataclass(frozen=True)
class Fused:
    """Several of ours stored as one, one after the other along the output (GPT-2's q, k, v); `turned` as in Turn.

    `groups`: each of ours is cut into so many equal pieces, and the file has the first of each, the second of each, ...
    With 2 groups and 4 query heads: q0 q1 k0 v0 q2 q3 k1 v1 (Falcon; with as many groups as heads BLOOM, GPT-NeoX).
    """

    turned: bool = False
    groups: int = 1

    def load(self, theirs: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        whole = theirs[0].t() if self.turned and theirs[0].dim() == 2 else theirs[0]
        if self.groups == 1:
            return [part.contiguous() for part in whole.split([shape[0] for shape in shapes])]
        parts = whole.unflatten(0, (self.groups, -1)).split([shape[0] // self.groups for shape in shapes], dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]

    def save(self, ours: Sequence[Tensor]) -> list[Tensor]:
        if self.groups == 1:
            whole = torch.cat(list(ours))
        else:
            whole = torch.cat([part.unflatten(0, (self.groups, -1)) for part in ours], dim=1).flatten(0, 1)
        return [whole.t().contiguous() if self.turned and whole.dim() == 2 else whole]


@dataclass(frozen=True)
class Stacked:
    """One of ours, whose first axis counts experts, stored as a tensor for each of them."""

    def load(self, theirs: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        return [torch.stack(list(theirs))]

    def save(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return list(ours[0].unbind(0))


@dataclass(frozen=True)
class FusedBias:
    """Vectors of one length stored one after the other, of which `held` are ours and the others always zero.

    Whisper's keys have no bias: in CTranslate2's files its q, k and v are (True, False, True).
    """

    held: tuple[bool, ...]

    def load(self, theirs: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        parts = theirs[0].split(shapes[0][0])
        for number, (part, ours) in enumerate(zip(parts, self.held, strict=True), start=1):
            if not ours and bool(part.any()):
                raise CheckpointError(f"part {number} of {len(parts)} is not zero, and this model has no such bias")
        return [part.contiguous() for part, ours in zip(parts, self.held, strict=True) if ours]

    def save(self, ours: Sequence[Tensor]) -> list[Tensor]:
        parts = iter(ours)
        return [torch.cat([next(parts) if held else torch.zeros_like(ours[0]) for held in self.held])]


Op = Same | Turn | OneRow | Fused | FusedBias | Stacked


def outputs(op: Op) -> Same | Fused | None:
    """What an operation on matrices (out, in) does to their outputs alone: to (out, rank), one factor of a change of
    low rank. None where the file has no matrix of that kind."""
    if isinstance(op, Fused):
        return replace(op, turned=False)
    return Same() if isinstance(op, Same | Turn) else None


@dataclass(frozen=True)
class Rule:
    """Our names and theirs, with placeholders such as {i} for the number of a layer."""

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    op: Op = field(default_factory=Same)


def pairs(
    ours: str,
    theirs: str,
    names: Mapping[str, str] | Mapping[tuple[str, ...], str],
    op: Op | None = None,
) -> tuple[Rule, ...]:
    """Rules for the weight and the bias of each part: our names (of several that are one there) and theirs, below the
    two prefixes. A rule for what a model does not have is not used, so parts without a bias need no others."""

    def rule(our: str | tuple[str, ...], their: str, kind: str) -> Rule:
        mine = f"{ours}{our}.{kind}" if isinstance(our, str) else tuple(f"{ours}{one}.{kind}" for one in our)
        return Rule(mine, f"{theirs}{their}.{kind}", op or Same())

    return tuple(rule(our, their, kind) for our, their in names.items() for kind in ("weight", "bias"))


@dataclass(frozen=True)
class Move:
    """A rule for particular tensors: what `load` reads and `save` writes."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    op: Op


def bind(rules: Iterable[Rule], shapes: Mapping[str, Shape]) -> list[Move]:
    """The moves that fill every one of our names, each exactly once.

    Raises CheckpointError naming our parameters that no rule covers or that two rules claim.
    """
    moves: list[Move] = []
    taken: dict[str, Rule] = {}
    for rule in rules:
        ours = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        theirs = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
        pattern = _pattern(ours[0])
        for name in shapes:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            names = tuple(text.format(**match.groupdict()) for text in ours)
            for one in names:
                if one not in shapes:
                    raise CheckpointError(f"a weight rule pairs {names[0]} with {one}, which this model does not have")
                if one in taken:
                    raise CheckpointError(f"two weight rules claim {one}: {taken[one].theirs} and {rule.theirs}")
                taken[one] = rule
            moves.append(Move(names, tuple(text.format(**match.groupdict()) for text in theirs), rule.op))
    if missing := [name for name in shapes if name not in taken]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"no weight rule covers {missing[0]}{more}: this layout has no name for it")
    return moves


def their_shapes(moves: Iterable[Move], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The names and shapes in a checkpoint of this model, found by running the moves on tensors without storage."""
    result: dict[str, Shape] = {}
    for move in moves:
        tensors = move.op.save([torch.empty(shapes[name], device="meta") for name in move.ours])
        result |= {name: tuple(tensor.shape) for name, tensor in zip(move.theirs, tensors, strict=True)}
    return result


def load(
    moves: Iterable[Move],
    shapes: Mapping[str, Shape],
    read: Callable[[str], Tensor],
    put: Callable[[str, Tensor], None],
) -> None:
    """Read their tensors rule by rule and hand ours to `put`."""
    for move in moves:
        try:
            ours = move.op.load([read(name) for name in move.theirs], [shapes[name] for name in move.ours])
        except CheckpointError as error:
            where = "" if move.theirs[0] in str(error) else f"{move.theirs[0]}: "
            raise CheckpointError(f"{where}{error}") from None
        for name, tensor in zip(move.ours, ours, strict=True):
            assert tuple(tensor.shape) == tuple(shapes[name]), (name, tensor.shape, shapes[name])
            put(name, tensor)


def saver(moves: Iterable[Move], get: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """A function from their names to their tensors, which works one rule at a time from our tensors."""
    by_name = {name: move for move in moves for name in move.theirs}

    def read(name: str) -> Tensor:
        move = by_name[name]
        return move.op.save([get(one) for one in move.ours])[move.theirs.index(name)]

    return read


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(template)))
