"""Where in a model an operation is at work: parts of its spec, with the beginnings of the names of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Generic, Literal, TypeVar

from lamina.errors import LaminaError
from lamina.layers import BranchSpec, MemoryAttentionSpec, StackSpec, StepSpec
from lamina.model import ModelSpec
from lamina.specs import Spec, unknown

S = TypeVar("S", bound=Spec)

EVERYWHERE = ("*",)

StackName = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Place(Generic[S]):
    """A part of a model's spec."""

    path: str  # as weights are called: decoder.layers.3.attention.op
    part: S

    @property
    def shown(self) -> str:
        """As `lamina show` calls it."""
        return self.path.removesuffix(".op")

    def weight(self, name: str) -> str:
        """The name of one of its weights."""
        return f"{self.path}.{name}"


def places(spec: ModelSpec, kind: type[S] | tuple[type[S], ...], at: Sequence[str] = EVERYWHERE) -> list[Place[S]]:
    """The parts of a kind that one of `at` names: a path or the beginning of one, or a pattern with * and ?.

    Raises LaminaError for an entry of `at` that names none of them, and where the model has no such part.
    """
    found = [Place(path, part) for path, part in _walk(spec, "") if isinstance(part, kind)]
    if not found:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise LaminaError(f"this model has no {' or '.join(one.__name__ for one in kinds)}")
    for entry in at:
        if not any(_names(entry, place) for place in found):
            raise LaminaError(unknown("place", entry, [place.shown for place in found]))
    return [place for place in found if any(_names(entry, place) for entry in at)]


def parts(spec: ModelSpec) -> dict[str, Spec]:
    """Every part of a model's spec by its path, as weights are called."""
    return {path: part for path, part in _walk(spec, "") if path}


def stack_of(spec: ModelSpec, name: StackName | None) -> tuple[StackName, StackSpec]:
    """A stack by its name, or the only one. Raises LaminaError where there is none such, or no only one."""
    found: dict[StackName, StackSpec | None] = {"encoder": spec.encoder, "decoder": spec.decoder}
    there: dict[StackName, StackSpec] = {side: stack for side, stack in found.items() if stack is not None}
    if name is None and len(there) > 1:
        raise LaminaError("this model has an encoder and a decoder; say which: stack: encoder, or stack: decoder")
    chosen = next(iter(there)) if name is None else name
    if chosen not in there:
        raise LaminaError(f"stack is {chosen}, and this model has none; it has: {next(iter(there))}")
    return chosen, there[chosen]


def edited(spec: S, change: Callable[[str, Spec], Spec]) -> S:
    """A copy in which each part is what `change(path, part)` makes of it, the inner ones first."""
    return _edited(spec, "", change)


def _walk(part: Any, path: str) -> Iterator[tuple[str, Spec]]:
    if isinstance(part, Spec):
        yield path, part
        for name in part.__dataclass_fields__:
            yield from _walk(getattr(part, name), _joined(path, part, name))
    elif isinstance(part, tuple):
        for number, one in enumerate(part):
            yield from _walk(one, _item(path, number, one))


def _edited(part: Any, path: str, change: Callable[[str, Spec], Spec]) -> Any:
    if isinstance(part, tuple):
        return tuple(_edited(one, _item(path, number, one), change) for number, one in enumerate(part))
    if not isinstance(part, Spec):
        return part
    inner = {
        name: _edited(getattr(part, name), _joined(path, part, name), change) for name in part.__dataclass_fields__
    }
    changes = {
        name: new for name, new in inner.items() if new is not getattr(part, name) and new != getattr(part, name)
    }
    part = part.replace(**changes) if changes else part
    return part if isinstance(part, MemoryAttentionSpec) else change(path, part)  # its attention has been asked for


def _joined(path: str, part: Spec, name: str) -> str:
    """Steps of a layer are called by their own names alone, as their weights are; an attention with a memory around it
    has the names of its weights without one."""
    if name == "steps" or (isinstance(part, MemoryAttentionSpec) and name == "attention"):
        return path
    return f"{path}.{name}" if path else name


def _item(path: str, number: int, part: Any) -> str:
    return f"{path}.{part.name if isinstance(part, StepSpec | BranchSpec) else number}"


def _names(entry: str, place: Place[Any]) -> bool:
    parts = place.path.split(".")
    return any(fnmatchcase(".".join(parts[:count]), entry) for count in range(1, len(parts) + 1))
