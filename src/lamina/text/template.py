"""Chat templates: a conversation as one text, by the jinja2 template that a checkpoint brings.

What templates may use is what transformers gives them (`apply_chat_template`): `messages`, `tools`,
`add_generation_prompt`, the special tokens by name, `raise_exception`, `strftime_now`, `tojson`, `namespace`, loop
controls.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lamina.errors import CheckpointError, LaminaError

if TYPE_CHECKING:
    import jinja2

SOURCE = 64 * 1024  # characters
DATE = re.compile(r"([^%]|%-?[a-zA-Z%])*")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which a message's reasoning is passed
PARSING = (SyntaxError, RecursionError, MemoryError, ValueError)
RENDERING = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, MemoryError)


class ChatTemplate:
    """A template, compiled when it is first rendered."""

    def __init__(self, source: str, name: str = "chat template"):
        if len(source) > SOURCE:
            raise CheckpointError(f"{name}: {len(source):,} characters; {SOURCE:,} is the most")
        self.source, self.name = source, name
        self.compiled: jinja2.Template | None = None

    def compile(self) -> jinja2.Template:
        """The template as code, or an error that names the line."""
        import jinja2

        from lamina.text.sandbox import Sandbox

        if self.compiled is None:
            sandbox = Sandbox()
            sandbox.filters["tojson"] = sandbox.wrapped(tojson)
            sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
            try:
                self.compiled = sandbox.from_string(self.source)
            except jinja2.TemplateSyntaxError as error:
                raise CheckpointError(
                    f"{self.name}: line {error.lineno}: {error.message}; it is no jinja template"
                ) from error
            except PARSING as error:
                raise CheckpointError(f"{self.name}: too deeply nested to compile ({type(error).__name__})") from error
        return self.compiled

    def render(self, messages: list, **variables: Any) -> str:
        """The text of a conversation. What the template refuses, and what it may not do, is a LaminaError."""
        import jinja2

        template = self.compile()
        given = {name: plain(value, name) for name, value in variables.items()}
        given["messages"] = [reasoned(plain(message, "messages")) for message in messages]
        try:
            size = len(json.dumps(given, ensure_ascii=False))
            template.environment.begin(size)  # type: ignore[attr-defined]
            return template.render(given)
        except jinja2.exceptions.SecurityError as error:
            raise CheckpointError(f"{self.name}: {error}; templates that could run away are not run") from error
        except jinja2.TemplateError as error:
            raise LaminaError(f"{self.name}: {error}") from error
        except RENDERING as error:
            raise LaminaError(f"{self.name}: fails on these messages: {type(error).__name__}: {error}") from error


def raise_exception(message: object) -> None:
    import jinja2

    raise jinja2.TemplateError(str(message)[:1000])


def strftime_now(format: str) -> str:
    if len(format) > 100 or not DATE.fullmatch(format):
        raise ValueError(f"strftime_now({format[:100]!r}): only letters with a percent sign before them")
    return datetime.datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: nothing escaped for HTML."""
    if (indent or 0) > 16 or any(len(each) > 16 for each in separators or ()):
        raise ValueError("tojson with an indent above 16 or a separator above 16 characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def plain(value: Any, where: str, change: Callable[[str], str] = str, depth: int = 0) -> Any:
    """A copy made of JSON's types alone: a template never meets an object with methods of its own.

    `change` is applied to every text in it, names of fields apart.
    """
    if depth > 32:
        raise LaminaError(f"{where}: more than 32 levels deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return change(str.__str__(value))
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each, f"{where}.{key}", change, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, f"{where}[{i}]", change, depth + 1) for i, each in enumerate(value)]
    raise LaminaError(f"{where}: a {type(value).__name__}; texts, numbers, lists and dicts are right")


def reasoned(message: Any) -> dict:
    if not isinstance(message, dict):
        raise LaminaError(f"messages: a {type(message).__name__}; each message is a dict with role and content")
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
