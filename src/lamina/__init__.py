"""lamina: every layer of every transformer language model, one part each, to read, load, swap, train and serve."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Account": "lamina.accounting",
    "LaminaError": "lamina.errors",
    "Model": "lamina.model",
    "ModelSpec": "lamina.model",
    "Output": "lamina.model",
    "Record": "lamina.layers",
    "account": "lamina.accounting",
    "diff": "lamina.specs",
    "edit": "lamina.editing",
    "embed": "lamina.generation",
    "generate": "lamina.generation",
    "load": "lamina.source",
    "save": "lamina.source",
    "sizes": "lamina.families",
    "spec": "lamina.source",
    "tokenizer": "lamina.source",
    "verify": "lamina.conformance",
}
"""Public name -> the module it lives in. A module, and torch with it, is imported when one of its names is used."""

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from lamina.accounting import Account, account
    from lamina.conformance import verify
    from lamina.editing import edit
    from lamina.errors import LaminaError
    from lamina.families import sizes
    from lamina.generation import embed, generate
    from lamina.layers import Record
    from lamina.model import Model, ModelSpec, Output
    from lamina.source import load, save, spec, tokenizer
    from lamina.specs import diff


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        import difflib

        near = difflib.get_close_matches(name, __all__, n=1)
        raise AttributeError(f"lamina has no name {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
