"""YAML with lines: every value knows where it was written, so that every complaint can say it.

YAML 1.1 reads `no` as False, `3e-4` as text and `12:30:45` as 45045. Here 3e-4 is a number and 12:30:45 is text, and
where text is expected False is refused with what was probably meant.
"""

from __future__ import annotations

import json
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from lamina.errors import LaminaError
from lamina.specs import Spec, unknown

LARGEST = 1 << 20
"""Bytes of a configuration file; one is some kilobytes."""
FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+")
"""Numbers that YAML 1.1 takes for text: 3e-4."""
MOST = 10_000
"""Values in one, after anchors have been followed."""

S = TypeVar("S", bound=Spec)


@dataclass
class Node:
    """A value and the line that it stands on: a dictionary or list of nodes, or a plain value."""

    value: Any
    where: str
    keys: dict[str, str] = field(default_factory=dict)  # where each key of a dictionary stands

    def plain(self) -> Any:
        """The value without its lines."""
        if isinstance(self.value, dict):
            return {name: node.plain() for name, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


def read(path: str | os.PathLike[str]) -> Node:
    """The document of a YAML file, over those that its `extends` names. Raises LaminaError with file and line."""
    return _read(Path(path), ())


def _read(path: Path, below: tuple[Path, ...]) -> Node:
    path = path.resolve() if below else path
    if path.resolve() in below:
        raise LaminaError(f"{path}: extends itself, by way of {', '.join(str(one) for one in below)}")
    node = open_document(path)
    if not isinstance(node.value, dict):
        what = "is empty" if node.value is None else f"holds a {_kind(node.value)}"
        raise LaminaError(f"{node.where}: {what}; a mapping of fields was expected")
    parent = node.value.pop("extends", None)
    if parent is None:
        return node
    if not isinstance(parent.value, str):
        raise LaminaError(f"{parent.where}: extends is {parent.plain()!r}; the path of one file was expected")
    return _over(_read(path.parent / parent.value, (*below, path.resolve())), node)


def open_document(path: Path) -> Node:
    """What a YAML file holds, whatever that is. Raises LaminaError with the file, and the line where there is one."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise LaminaError(f"{path}: is no file; a YAML file was expected")
        if size > LARGEST:
            raise LaminaError(f"{path}: has {size:,} bytes; a configuration has at most {LARGEST:,}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LaminaError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise LaminaError(f"{path}: is not UTF-8 at byte {error.start:,}") from None
    except OSError as error:
        raise LaminaError(f"{path}: {error.strerror}") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Node:
    """The document of a YAML text; `name` begins every place."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise LaminaError(f"{name}: nests too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise LaminaError(f"{where}: {problem}") from None
    if root is None:
        return Node(None, f"{name}:1")
    try:
        return _Reader(name).node(root)
    except RecursionError:
        raise LaminaError(f"{name}: nests too deeply") from None


class _Reader:
    """From composed YAML to nodes. Only plain values, lists and mappings with text for keys; nothing is constructed."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.plain = yaml.SafeLoader("")

    def node(self, found: yaml.Node, above: tuple[int, ...] = ()) -> Node:
        where = f"{self.name}:{found.start_mark.line + 1}"
        self.count += 1
        if self.count > MOST:
            raise LaminaError(f"{where}: more than {MOST:,} values, anchors counted each time they are used")
        if id(found) in above:
            raise LaminaError(f"{where}: an anchor that holds itself")
        if isinstance(found, yaml.MappingNode):
            node = Node({}, where)
            for key, value in found.value:
                name = key.value
                if not isinstance(key, yaml.ScalarNode) or key.tag not in _TAGS:
                    raise LaminaError(f"{self.name}:{key.start_mark.line + 1}: a key must be plain text")
                if name in node.value:
                    raise LaminaError(f"{self.name}:{key.start_mark.line + 1}: {name} is said twice")
                node.value[name] = self.node(value, (*above, id(found)))
                node.keys[name] = f"{self.name}:{key.start_mark.line + 1}"
            return node
        if isinstance(found, yaml.SequenceNode):
            return Node([self.node(one, (*above, id(found))) for one in found.value], where)
        if found.tag not in _TAGS:
            raise LaminaError(
                f"{where}: the tag {found.tag.replace('tag:yaml.org,2002:', '!!')!r} is not accepted here"
            )
        assert isinstance(found, yaml.ScalarNode)
        if found.style is None and FLOAT.fullmatch(found.value):
            return Node(float(found.value), where)
        if found.tag.endswith("timestamp") or (":" in found.value and found.tag.endswith(("int", "float"))):
            return Node(found.value, where)  # 12:30:45 is 45045 in YAML 1.1
        try:
            return Node(self.plain.construct_object(found), where)
        except (ValueError, yaml.YAMLError):
            return Node(found.value, where)


_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp")}


def _over(base: Node, top: Node) -> Node:
    """`top` over `base`: mappings are joined, anything else is replaced; a mapping of another kind is replaced too."""
    if not isinstance(base.value, dict) or not isinstance(top.value, dict):
        return top
    kinds = [node.value["kind"].plain() for node in (base, top) if "kind" in node.value]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        return top
    joined = dict(base.value)
    for name, node in top.value.items():
        joined[name] = _over(joined[name], node) if name in joined else node
    return Node(joined, top.where, {**base.keys, **top.keys})


def assign(root: Node, assignment: str) -> None:
    """Put `path=value` into a document: `loop.steps=10`. The value is read as YAML."""
    path, sign, text = assignment.partition("=")
    where = f"{assignment!r}"
    if not sign or not path:
        raise LaminaError(f"{where}: path=value was expected, as in loop.steps=100")
    value = parse(text, where)
    value.where = where
    node, names = root, path.split(".")
    for name in names[:-1]:
        if not isinstance(node.value, dict):
            raise LaminaError(f"{where}: {name} is below something that is no mapping")
        node = node.value.setdefault(name, Node({}, where))
    if not isinstance(node.value, dict):
        raise LaminaError(f"{where}: {'.'.join(names[:-1])} is {node.plain()!r}, which has no fields")
    old = node.value.get(names[-1])
    node.value[names[-1]] = value if old is None else _over(old, value)
    node.keys[names[-1]] = where


def decode(kind: type[S], node: Node, path: str = "") -> S:
    """The spec that a document describes. Raises LaminaError naming file, line, field and what would be right."""
    made = _spec(kind, node, path)
    assert isinstance(made, kind)
    return made


def _spec(kind: type[Spec], node: Node, path: str) -> Spec:
    if not isinstance(node.value, dict):
        raise LaminaError(f"{node.where}: {path or 'the file'} is {_short(node)}; a mapping of fields was expected")
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {}
    for name, value in node.value.items():
        if name == "kind" and hasattr(kind, "NAME"):
            continue
        if name not in kind.__dataclass_fields__:
            what = f"field of {path}" if path else "field"
            raise LaminaError(f"{node.keys.get(name, value.where)}: {unknown(what, name, kind.__dataclass_fields__)}")
        fields[name] = _value(hints[name], value, f"{path}.{name}" if path else name)
    for name, known in kind.__dataclass_fields__.items():
        if name not in fields and known.default is known.default_factory is MISSING:
            raise LaminaError(f"{node.where}: {path + ' ' if path else ''}needs {name}")
    try:
        return kind(**fields)
    except LaminaError as error:
        raise LaminaError(f"{node.where}: {path + ': ' if path else ''}{error}") from None


def _value(hint: Any, node: Node, path: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if node.value is None:
        if type(None) in options:
            return None
        raise LaminaError(f"{node.where}: {path} is empty; {_expected(options)} was expected")
    specs = [option for option in options if isinstance(option, type) and issubclass(option, Spec)]
    if specs and isinstance(node.value, dict):
        fields = {name: value for name, value in node.value.items() if name != "kind" or len(specs) == 1}
        return _spec(_chosen(specs, node, path), Node(fields, node.where, node.keys), path)
    for option in options:
        found = _plain(option, node, path)
        if found is not MISSING:
            return found
    hint_text = ""
    if isinstance(node.value, bool) and str in options:
        hint_text = f"; YAML reads a bare yes, no, on or off so: write it in quotes, {path.split('.')[-1]}: 'no'"
    raise LaminaError(f"{node.where}: {path} is {_short(node)}; {_expected(options)} was expected{hint_text}")


def _chosen(specs: list[type[Spec]], node: Node, path: str) -> type[Spec]:
    """Of several specs, the one that `kind` names."""
    if len(specs) == 1 and "kind" not in node.value:
        return specs[0]
    named = {getattr(spec, "NAME", spec.__name__): spec for spec in specs}
    if "kind" not in node.value:
        raise LaminaError(f"{node.where}: {path} needs a kind: {', '.join(named)}")
    kind = node.value["kind"].plain()
    if kind not in named:
        raise LaminaError(f"{node.value['kind'].where}: {unknown(f'kind of {path}', str(kind), named)}")
    return named[kind]


def _plain(option: Any, node: Node, path: str) -> Any:
    """The value as this option wants it, or MISSING."""
    value = node.value
    if typing.get_origin(option) is tuple:
        inner = typing.get_args(option)[0]
        if isinstance(value, list):
            return tuple(_value(inner, one, f"{path}.{i}") for i, one in enumerate(value))
        return MISSING
    if typing.get_origin(option) is Literal:
        return value if not isinstance(value, list | dict) and value in typing.get_args(option) else MISSING
    if option is dict or typing.get_origin(option) is dict:
        return node.plain() if isinstance(value, dict) else MISSING
    if option is int and type(value) is float and value.is_integer():
        return int(value)
    if option is float and type(value) is int:
        return float(value)
    return value if option in (int, float, bool, str) and type(value) is option else MISSING


def _expected(options: tuple[Any, ...]) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    said = []
    for option in options:
        if typing.get_origin(option) is Literal:
            said += [repr(one) for one in typing.get_args(option)]
        elif typing.get_origin(option) is tuple:
            said.append("a list")
        elif option is dict or typing.get_origin(option) is dict:
            said.append("a mapping")
        else:
            said.append(names.get(option, f"a mapping ({getattr(option, 'NAME', option)})"))
    return " or ".join(said)


def _kind(value: Any) -> str:
    return {dict: "mapping", list: "list", str: "text"}.get(type(value), "single value")


def _short(node: Node) -> str:
    text = json.dumps(node.plain(), default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def encode(spec: Spec) -> dict[str, Any]:
    """The inverse of `decode`, as plain data: every field, and the kind where there is one to choose."""
    out: dict[str, Any] = {"kind": spec.NAME} if hasattr(spec, "NAME") else {}  # pyright: ignore
    for name, hint in typing.get_type_hints(type(spec)).items():
        if name in spec.__dataclass_fields__:
            out[name] = _encode(getattr(spec, name), _chosen_from(hint) > 1)
    return out


def _chosen_from(hint: Any) -> int:
    """How many kinds of specs a field may hold."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return sum(isinstance(option, type) and issubclass(option, Spec) for option in options)


def _encode(value: Any, several: bool = False) -> Any:
    if isinstance(value, Spec):
        return ({"kind": type(value).__name__} if several else {}) | encode(value)
    if isinstance(value, tuple):
        return [_encode(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value


def write(spec: Spec) -> str:
    """A spec as YAML text that `read` and `decode` give back."""
    return yaml.safe_dump(encode(spec), sort_keys=False, allow_unicode=True, width=100)
