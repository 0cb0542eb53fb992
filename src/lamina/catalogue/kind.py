"""What the catalogue says of a kind of layer, as data; and questions to specs, which tell who has a variant."""

from __future__ import annotations

import inspect
import io
import textwrap
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lamina.layers as layers
import lamina.patterns as patterns
from lamina.model import ModelSpec

Question = Callable[[ModelSpec], bool]


def has(kind: type | tuple[type, ...], test: Callable[[Any], bool] = lambda part: True) -> Question:
    """Whether a spec has, anywhere, a part of this kind for which the test holds."""
    return lambda spec: any(isinstance(part, kind) and test(part) for _, part in spec.walk())


ATTENTIONS = ("AttentionSpec", "DifferentialSpec", "LatentAttentionSpec", "LongformerSpec", "BigBirdSpec")
"""The classes of self-attention, by name: some may not be built yet."""


def named(*names: str) -> Question:
    """Whether a spec has a part of a class with one of these names: for layers that may not be built yet."""
    return lambda spec: any(type(part).__name__ in names for _, part in spec.walk())


@dataclass(frozen=True)
class Variant:
    """One form of a layer, and the question whether a spec has it; None where specs cannot tell."""

    name: str
    rule: str
    used: Question | None = None
    classes: tuple[str, ...] = ()  # of specs, one of which says it, where those may not be built yet
    planned: bool = False  # nothing of it is built yet

    @property
    def built(self) -> bool:
        """Whether lamina has it."""
        here = not self.classes or any(hasattr(layers, name) or hasattr(patterns, name) for name in self.classes)
        return here and not self.planned


def planned(name: str, rule: str) -> Variant:
    """A variant of which nothing is built yet."""
    return Variant(name, rule, planned=True)


def by_class(name: str, rule: str, *classes: str) -> Variant:
    """A variant that a class of spec says, which may not be built yet."""
    return Variant(name, rule, named(*classes), classes)


@dataclass(frozen=True)
class Correction:
    """What is often said of a layer, what is so, and where it can be read."""

    said: str
    fact: str
    source: str


@dataclass(frozen=True)
class Source:
    """A paper, where to find it, and the section that has the layer."""

    title: str
    where: str  # "arXiv:1706.03762"
    section: str = ""


@dataclass(frozen=True)
class Counted:
    """Parts of a published model to be counted: those whose path in the account fits one of the patterns."""

    model: str  # family/size
    parts: tuple[str, ...]  # "decoder.layers.*.attention.op"
    called: str  # these parts, in words
    shows: tuple[str, ...] = ("parameters", "flops", "cache")  # what of them is to the point
    context: int | None = None  # tokens, where the spec does not say


@dataclass(frozen=True)
class Example:
    """A function that needs nothing and prints something; its body is shown, and can be run anywhere."""

    about: str  # what it shows, and how to check it by hand
    function: Callable[[], None]
    prints: str

    @property
    def code(self) -> str:
        """The body of the function."""
        _, _, body = inspect.getsource(self.function).partition("\n")
        return textwrap.dedent(body).strip() + "\n"

    def run(self) -> str:
        """What it prints, by running it now."""
        with redirect_stdout(io.StringIO()) as printed:
            self.function()
        return printed.getvalue()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of layer."""

    name: str  # as `lamina layers NAME` takes it
    title: str
    what: str  # in one line
    why: str
    equation: str  # its first line is the layer in short
    symbols: tuple[tuple[str, str], ...]  # what stands in the equation, with shapes
    files: tuple[str, ...]  # below lamina/
    used: Question
    variants: tuple[Variant, ...]
    cost: str  # parameters and arithmetic, as a rule
    counted: tuple[Counted, ...] = ()
    pitfalls: tuple[str, ...]
    corrections: tuple[Correction, ...] = ()
    sources: tuple[Source, ...]
    example: Example

    @property
    def built(self) -> bool:
        """Whether lamina has it: whether its files exist."""
        return all((Path(__file__).parent.parent / file).exists() for file in self.files)
