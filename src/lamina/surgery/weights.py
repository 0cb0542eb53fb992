"""Weights by name, of which none is made before it is asked for: what operations hand on to each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.errors import LaminaError


@dataclass(frozen=True)
class Made:
    """A weight that is made of others."""

    sources: tuple[str, ...]  # names in the weights before; none: a constant
    how: str  # in words, for people: "mean of 3 heads"
    make: Callable[..., Tensor]  # of the sources
    dtype: torch.dtype | None = None  # None: that of the first source


def moved(name: str) -> Made:
    """The weight of this name, as it is, under another one."""
    return Made((name,), "", _as_it_is)


def _as_it_is(x: Tensor) -> Tensor:
    return x


class Weights(Mapping[str, Tensor]):
    """The weights of a model after an operation: `before`, with some made anew and some gone.

    Nothing is read or computed before a name is looked up, and nothing is kept afterwards: who writes the weights one
    by one needs memory for one of them, and for what that is made of.
    """

    def __init__(self, before: Mapping[str, Tensor], made: Mapping[str, Made], gone: Sequence[str] = ()) -> None:
        absent = [name for one in made.values() for name in one.sources if name not in before]
        if absent:
            raise LaminaError(f"the weights have no {absent[0]!r}, of which another is to be made")
        self.before, self.made = before, dict(made)
        without = {*gone, *made}
        self.names = dict.fromkeys([*(name for name in before if name not in without), *made])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        one = self.made.get(name)
        return self.before[name] if one is None else one.make(*(self.before[source] for source in one.sources))

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def dtype(self, name: str) -> torch.dtype:
        """What it will be, without making it."""
        one = self.made.get(name)
        if one is not None and one.dtype is not None:
            return one.dtype
        return dtype_of(self.before, name if one is None else one.sources[0])


class Beside(Mapping[str, Tensor]):
    """The weights of a model, and those of others: their names begin with their SOURCE and a colon."""

    def __init__(self, own: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.own = own
        self.homes = {f"{source}:{name}": (other, name) for source, other in others.items() for name in other}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.homes:
            return self.own[name]
        other, inner = self.homes[name]
        return other[inner]

    def __contains__(self, name: object) -> bool:
        return name in self.homes or name in self.own

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from self.homes

    def __len__(self) -> int:
        return len(self.own) + len(self.homes)

    def dtype(self, name: str) -> torch.dtype:
        """That of a weight, without making it."""
        return dtype_of(*self.homes.get(name, (self.own, name)))


def dtype_of(weights: Mapping[str, Tensor], name: str) -> torch.dtype:
    """The type of a weight, without making it where it is yet to be made."""
    known = getattr(weights, "dtype", None)  # of what reads from a file
    return weights[name].dtype if known is None else known(name)


def origin(weights: Mapping[str, Tensor], name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the names in the first weights that it comes from, how it was made, the first step first)."""
    if isinstance(weights, Beside) and name not in weights.homes:
        return origin(weights.own, name)
    if not isinstance(weights, Weights):
        return (name,), ()
    one = weights.made.get(name)
    if one is None:
        return origin(weights.before, name)
    found = [origin(weights.before, source) for source in one.sources]
    names = dict.fromkeys(first for firsts, _ in found for first in firsts)
    steps = dict.fromkeys(step for _, more in found for step in more)
    return tuple(names), (*steps, *([one.how] if one.how else []))


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of its tensors in float32 (or wider), its result in the type of the first."""

    def made(first: Tensor, *others: Tensor) -> Tensor:
        wide = torch.promote_types(first.dtype, torch.float32)
        return function(first.to(wide), *(other.to(wide) for other in others)).to(first.dtype)

    return made


def own_generator(name: str, seed: int) -> torch.Generator:
    """What a weight of this name is drawn with: each has its own, in whatever order they are made."""
    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    return torch.Generator().manual_seed(digest ^ seed)
