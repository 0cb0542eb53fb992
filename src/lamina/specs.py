"""Spec: a frozen piece of architecture, as data. It nests, compares, hashes, and reads and writes strict JSON.

A spec says what a layer *is*; `build` makes the module. Nothing else about a run (dtype, device, backend) enters it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar, Literal, Self, TypeVar

from lamina.errors import LaminaError

FORMAT = 1
"""Number of the JSON form. A file with a larger number was written by a newer lamina and is refused."""

_LARGEST = sys.float_info.max
_CLASSES: dict[str, type[Spec]] = {}
S = TypeVar("S", bound="Spec")


class _SpecType(type):
    """Names the nearest field when a spec is made with a keyword it does not have."""

    if not typing.TYPE_CHECKING:

        def __call__(cls, **fields: Any) -> Any:
            for name in fields:
                if name not in cls.__dataclass_fields__:
                    raise LaminaError(unknown(f"field of {cls.__name__}", name, cls.__dataclass_fields__))
            for name, field in cls.__dataclass_fields__.items():
                required = field.default is field.default_factory is dataclasses.MISSING
                if required and name not in fields:
                    raise LaminaError(f"{cls.__name__} needs {name}=")
            return super().__call__(**fields)


class Spec(metaclass=_SpecType):
    """Base of every specification. Subclasses are frozen, keyword-only dataclasses and register by class name."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = _CLASSES.get(cls.__name__)
        if known is not None and known.__module__ != cls.__module__:
            raise TypeError(f"two specs are called {cls.__name__}: in {known.__module__} and in {cls.__module__}")
        _CLASSES[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                raise LaminaError(f"{type(self).__name__}.{name} is {_short(value)}; it must be {_say(hint)}")
            if (settled := _settle(value, hint)) is not value:
                object.__setattr__(self, name, settled)
        self.check()

    def check(self) -> None:
        """Raise LaminaError when fields contradict each other. Subclasses override it."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed. Unknown fields raise LaminaError naming the nearest one."""
        for name in changes:
            if name not in self.__dataclass_fields__:
                raise LaminaError(unknown(f"field of {type(self).__name__}", name, self.__dataclass_fields__))
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def walk(self, path: str = "") -> Iterator[tuple[str, Spec]]:
        """Yield (path, spec) of this spec and of every spec below it, outermost first."""
        todo: list[tuple[str, Spec]] = [(path, self)]
        while todo:
            path, spec = todo.pop()
            yield path, spec
            below: list[tuple[str, Spec]] = []
            for name in spec.__dataclass_fields__:
                value = getattr(spec, name)
                step = f"{path}.{name}" if path else name
                if isinstance(value, Spec):
                    below.append((step, value))
                elif isinstance(value, tuple):
                    below += [(f"{step}.{i}", item) for i, item in enumerate(value) if isinstance(item, Spec)]
            todo += reversed(below)

    def to_dict(self) -> dict[str, Any]:
        """Every field, nested, with the class name under "type"; runs of equal specs in a tuple are written once."""
        return {"type": type(self).__name__} | {n: _encode(getattr(self, n)) for n in self.__dataclass_fields__}

    def to_json(self) -> str:
        """The spec as JSON text: every field, and the number of the format."""
        return json.dumps({"format": FORMAT, **self.to_dict()}, indent=1)

    @classmethod
    def from_dict(cls, data: Any, where: str = "spec") -> Self:
        """The inverse of `to_dict`. Raises LaminaError for unknown, missing or ill-typed fields."""
        spec = _decode_spec(data, where)
        if not isinstance(spec, cls):
            raise LaminaError(f"{where} is a {type(spec).__name__}; a {cls.__name__} was expected")
        return spec

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises LaminaError naming the field that is wrong, or a newer format."""
        try:
            data = json.loads(text, object_pairs_hook=_once)
        except LaminaError:
            raise
        except (ValueError, RecursionError) as error:
            raise LaminaError(f"spec is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise LaminaError(f"spec is a JSON {type(data).__name__}; an object was expected")
        number = data.pop("format", None)
        if type(number) is not int or not 1 <= number <= FORMAT:
            raise LaminaError(f"spec has format {number!r}; this lamina reads formats 1 to {FORMAT}")
        try:
            return cls.from_dict(data)
        except RecursionError:
            raise LaminaError("spec nests too deeply to be one") from None


def edit(spec: Spec, kind: type[S], change: Callable[[str, S], Spec], path: str = "") -> Any:
    """A copy of `spec` in which every spec of class `kind` is replaced by `change(path, spec)`; inner ones first."""
    changes: dict[str, Any] = {}
    for name in spec.__dataclass_fields__:
        value = getattr(spec, name)
        below = f"{path}.{name}" if path else name
        if isinstance(value, Spec):
            new: Any = edit(value, kind, change, below)
        elif isinstance(value, tuple):
            new = tuple(
                edit(v, kind, change, f"{below}.{i}") if isinstance(v, Spec) else v for i, v in enumerate(value)
            )
        else:
            continue
        if new != value:
            changes[name] = new
    spec = spec.replace(**changes) if changes else spec
    return change(path, spec) if isinstance(spec, kind) else spec


def diff(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """The (path, value in a, value in b) of every field in which two specs differ, in order."""
    if isinstance(a, Spec) and type(a) is type(b):
        rows = []
        for name in a.__dataclass_fields__:
            rows += diff(getattr(a, name), getattr(b, name), f"{path}.{name}" if path else name)
        return rows
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return [row for i, (x, y) in enumerate(zip(a, b, strict=True)) for row in diff(x, y, f"{path}.{i}")]
    return [] if a == b and type(a) is type(b) else [(path, a, b)]


def nearest(name: str, known: typing.Iterable[str]) -> str | None:
    """The known name most like `name`, or None."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def unknown(what: str, name: str, known: typing.Iterable[str]) -> str:
    """The message for an unknown name: the nearest valid one, or the first few."""
    known = list(known)
    near = nearest(name, known)
    hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    return f"unknown {what} {name!r}; {hint}"


def _encode(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if not isinstance(value, tuple):
        return value
    items: list[Any] = []
    for item in value:
        code = _encode(item)
        if isinstance(item, Spec) and items and isinstance(items[-1], dict) and items[-1].get("item") == code:
            items[-1]["repeat"] += 1
        elif isinstance(item, Spec) and len(value) > 1:
            items.append({"repeat": 1, "item": code})
        else:
            items.append(code)
    return items


def _decode(data: Any, where: str) -> Any:
    if isinstance(data, dict):
        return _decode_spec(data, where)
    if isinstance(data, list):
        items: list[Any] = []
        for i, item in enumerate(data):
            if isinstance(item, dict) and set(item) == {"repeat", "item"}:
                count = item["repeat"]
                if type(count) is not int or not 1 <= count <= 10_000:
                    raise LaminaError(f"{where}.{i}.repeat is {count!r}; it must be a number from 1 to 10000")
                items += [_decode_spec(item["item"], f"{where}.{i}")] * count
            else:
                items.append(_decode(item, f"{where}.{i}"))
        return tuple(items)
    return data


def _decode_spec(data: Any, where: str) -> Spec:
    if not isinstance(data, dict):
        raise LaminaError(f"{where} is {_short(data)}; a spec (an object with a type) was expected")
    data = dict(data)
    name = data.pop("type", None)
    if not isinstance(name, str) or not hasattr(_CLASSES.get(name), "__dataclass_fields__"):
        raise LaminaError(f"{where}: {unknown('type of spec', str(name), _CLASSES)}")
    kind = _CLASSES[name]
    hints = _hints(kind)
    for key in data:
        if key not in hints:
            raise LaminaError(f"{where}: {unknown(f'field of {name}', key, hints)}")
    if missing := [key for key in hints if key not in data]:
        raise LaminaError(f"{where}: {name} lacks the field {missing[0]!r}; every field is written in this format")
    fields = {key: _decode(value, f"{where}.{key}") for key, value in data.items()}
    try:
        return kind(**fields)
    except LaminaError as error:
        raise LaminaError(f"{where}: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise LaminaError(f"spec says {next(n for n in names if names.count(n) > 1)!r} twice in one object")
    return data


@cache
def _hints(kind: type[Spec]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {name: hints[name] for name in kind.__dataclass_fields__}


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST
    if hint in (int, bool, str):
        return type(value) is hint
    return hint is Any or isinstance(value, hint)


def _settle(value: Any, hint: Any) -> Any:
    """Whole numbers in fields that hold finite numbers become floats, so that equal specs have one JSON form."""
    if type(value) is int:
        options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        return float(value) if float in options and int not in options else value
    if isinstance(value, tuple) and any(type(item) is int for item in value):
        return tuple(_settle(item, typing.get_args(hint)[0]) for item in value)
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _say(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_say(option) for option in typing.get_args(hint))
    if origin is Literal:
        return " or ".join(repr(option) for option in typing.get_args(hint))
    if origin is tuple:
        return f"a tuple of {_say(typing.get_args(hint)[0])}"
    plain = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text", type(None): "None"}
    return plain.get(hint) or f"a {getattr(hint, '__name__', hint)}"
