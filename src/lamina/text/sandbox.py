"""A jinja2 environment that a template can neither escape nor overrun: steps are timed, values are measured.

jinja2's own sandbox keeps a template from reaching Python. It does not keep one from `'a' * 3000000000`, from a
string that doubles forty times or from loops in loops. Here each block ticks a clock, each value that can be larger
than what it was made of is measured, before it is made where one operation suffices to make it huge, and what chat
templates have no use for (fillers, `lipsum`, `cycler`, includes) does not exist. It needs no process of its own, so
an ordinary chat is quick.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import GeneratorType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS as JINJA
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

SECONDS = 1.0  # a render takes a few milliseconds
SPARE = 1 << 20  # characters that a value may have beyond four times what the messages have
TRAIL = 1 << 27  # characters made in one render, all values together
DEPTH = 64  # of lists in lists

FILTERS = (
    "abs capitalize count d default dictsort first float groupby int items last length list lower map max min reject"
    " rejectattr reverse select selectattr sort string title trim unique upper"
).split()
METHODS = {
    str: (
        "capitalize casefold count endswith find format index isalnum isalpha isdecimal isdigit islower isnumeric"
        " isspace isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit"
        " rstrip split splitlines startswith strip swapcase title upper"
    ).split(),
    dict: "get items keys values copy".split(),
    list: "count index copy".split(),
    tuple: "count index".split(),
}
BACKWARDS = ("rfind", "rindex", "rpartition", "rsplit")  # quadratic where the separator is long
WIDE = re.compile(r"\d{3}|\*|\{[^}]*\{")  # a width in a format string that is large, or is itself an argument


class Meter:
    """What one render has used."""

    def __init__(self, given: int):
        self.most = SPARE + 4 * given  # characters in a value, and in the output
        self.trail = TRAIL + 64 * given
        self.until = time.perf_counter() + SECONDS

    def tick(self) -> None:
        if time.perf_counter() > self.until:
            raise SecurityError(f"it runs for longer than {SECONDS:g} s")

    def room(self, size: int) -> None:
        """Refuse a value of `size` characters that is about to be made."""
        if size > self.most:
            raise SecurityError(f"it makes a value of {size:,} characters; {self.most:,} is the most")

    def checked(self, value: Any) -> Any:
        """`value`, measured; what is only made when it is looked at is measured then."""
        self.tick()
        if isinstance(value, GeneratorType | Iterator):
            return self.flow(value)
        if isinstance(value, int) and not -(1 << 256) < value < 1 << 256:
            raise SecurityError("it makes a number beyond 256 bits")
        self.room(measure(value, self.most))
        if isinstance(value, Sized):
            self.trail -= len(value) * (1 if isinstance(value, str) else 8)
        if self.trail < 0:
            raise SecurityError("it makes too many large values")
        return value

    def flow(self, values: Iterable) -> Iterator:
        total = 0
        for value in values:
            total += measure(self.checked(value), self.most)
            self.room(total)
            yield value


def measure(value: Any, most: int) -> int:
    """About how long `str(value)` would be. Stops counting beyond `most`."""
    if isinstance(value, str):
        return len(value)
    total, level = 0, [value]
    for _ in range(DEPTH):
        below: list = []
        for each in level:
            if isinstance(each, str):
                total += len(each) + 4
            elif isinstance(each, dict):
                total += 2
                below += each.keys()
                below += each.values()
            elif isinstance(each, list | tuple | set | type({}.keys()) | type({}.values()) | type({}.items())):
                total += 2
                below += each
            else:
                total += 8
            if total + len(below) > most:
                return most + 1
        if not below:
            return total
        level = below
    raise SecurityError(f"it makes values more than {DEPTH} deep")


class Counting(CodeGenerator):
    """Python code of a template, with the clock in every block and the measure around what can grow."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.meter.tick()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def measured(self, visit: Callable, node: nodes.Node, frame: Frame, where: bool = True) -> None:
        self.write("environment.meter.checked(" if where else "")
        visit(node, frame)
        self.write(")" if where else "")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.measured(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.measured(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self.measured(super().visit_Tuple, node, frame, node.ctx == "load")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        self.measured(super().visit_Getitem, node, frame, isinstance(node.arg, nodes.Slice))


class Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for masks in training; here it only groups."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class PlainNamespace(Namespace):
    """`namespace(...)`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        refuse_private(kwargs)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        refuse_private((name,))
        super().__setitem__(name, value)


def refuse_private(names: Iterable[str]) -> None:
    if any(not isinstance(name, str) or name.startswith("_") for name in names):
        raise SecurityError("names in a namespace do not begin with an underscore")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment. `begin(size)` starts the meter of this thread's next render."""

    code_generator_class = Counting
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        # Nothing is computed while compiling (optimized=False): it would be before the meter starts.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, loopcontrols])
        self.local = threading.local()
        self.concat = self.joined  # type: ignore[assignment]
        own = {"join": self.join, "replace": self.replace, "indent": self.indent, "round": self.rounded, "safe": str}
        chosen = {name: JINJA[name] for name in FILTERS} | own
        self.filters = {name: self.wrapped(function) for name, function in chosen.items()}
        self.globals = {"range": safe_range, "namespace": PlainNamespace, "dict": lambda *a, **k: dict(*a, **k)}

    def begin(self, given: int) -> None:
        self.local.meter = Meter(given)

    @property
    def meter(self) -> Meter:
        return self.local.meter

    def wrapped(self, function: Callable) -> Callable:
        def filtered(*args: Any, **kwargs: Any) -> Any:
            return self.meter.checked(function(*args, **kwargs))

        if hasattr(function, "jinja_pass_arg"):  # wants the environment or the context first
            filtered.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return filtered

    def joined(self, parts: Iterable[Any]) -> str:
        """`a ~ b`, the output of a block, and the whole output."""
        texts, total = [], 0
        for part in parts:
            total += measure(part, self.meter.most)
            self.meter.room(total)
            texts.append(str(part))
        return self.meter.checked("".join(texts))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        if isinstance(obj, LoopContext | Macro | Undefined | PlainNamespace):
            return super().is_safe_attribute(obj, attr, value)
        return False

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            __self.foresee(owner, name, args, kwargs)
        return __self.meter.checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`text.format`, which jinja2 replaces by a function of its own."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            self.foresee(value.__self__, "format", args, kwargs)
            return wrapped(*args, **kwargs)

        return formatted

    def foresee(self, text: str, method: str, args: tuple, kwargs: dict) -> None:
        """Refuse a method call of a string whose result would be too large, or too long in coming."""
        if method == "join" and args:
            parts = list(args[0]) if isinstance(args[0], Iterable) else []
            self.meter.room(measure(parts, self.meter.most) + len(text) * len(parts))
        elif method == "replace" and len(args) > 1:
            old, new = str(args[0]), str(args[1])
            self.meter.room(len(text) + len(new) * (text.count(old) if old else len(text) + 1))
        elif method == "format":
            self.refuse_wide(text)
            self.meter.room(len(text) + text.count("{") * (8 + measure([*args, kwargs], self.meter.most)))
        elif method in BACKWARDS and any(
            isinstance(each, str) and len(each) > 64 for each in (*args, *kwargs.values())
        ):
            raise SecurityError(f"it searches backwards for more than 64 characters ({method})")

    def refuse_wide(self, text: str) -> None:
        if WIDE.search(text):
            raise SecurityError("it formats with a width of three digits or a computed one")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and hasattr(other, "__len__"):
                    meter.room(max(one, 0) * measure(other, meter.most))
        elif operator == "**":
            if any(isinstance(each, int | float) and abs(each) > 1 << 32 for each in (left, right)) or right > 64:
                raise SecurityError("it raises to a power above 64, or a number above 2^32")
        elif operator == "%" and isinstance(left, str):
            self.refuse_wide(left)
            meter.room(len(left) + left.count("%") * (8 + measure(right, meter.most)))
        elif operator == "+":
            meter.room(measure(left, meter.most) + measure(right, meter.most))
        return meter.checked(super().call_binop(context, operator, left, right))

    # Filters that could make much of little, in a form that looks first.

    def join(self, value: Iterable, d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = (self.getitem(each, attribute) for each in value)
        parts = list(self.meter.flow(value))
        self.meter.room(measure(parts, self.meter.most) + len(d) * len(parts))
        return str(d).join(str(part) for part in parts)

    def replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        text, old, new = str(value), str(old), str(new)
        self.foresee(text, "replace", (old, new), {})
        return text.replace(old, new, -1 if count is None else count)

    def indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = str(value)
        if (isinstance(width, int) and width > 100) or (isinstance(width, str) and len(width) > 100):
            raise SecurityError("it indents by more than 100 characters")
        self.meter.room(len(text) + 100 * (len(text.splitlines()) + 1))
        return JINJA["indent"](text, width, first, blank)

    def rounded(self, value: float, precision: int = 0, method: str = "common") -> float:
        if not -20 <= precision <= 20:
            raise SecurityError("it rounds to more than 20 digits")
        return JINJA["round"](value, precision, method)
