"""Call and Record: what a forward carries through the layers, and what it may write down on the way."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from lamina.cache import Cache
from lamina.errors import LaminaError
from lamina.specs import unknown
from lamina.tokens import Tokens


class Record:
    """What a forward is asked to keep, by name: `Record("decoder.layers.3.attention.op.weights", "*.output")`.

    Names are the path of a layer and what it shows: `.weights` of an attention (B, H, T, S), `.output` of a layer
    (B, T, width); of experts `.scores` (B, T, E), `.load` (E,), how many chose each, and `.used`, how many it served.
    Asking changes no output bit. `values` holds what matched; `losses` the auxiliary losses by layer.
    Where each layer of a stack runs several times (ALBERT), names count the runs: with 2 layers of 3 runs each,
    encoder.layers.4 is the second run of the second layer.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.offered: set[str] = set()  # every name that came up, kept or not
        self.values: dict[str, Tensor] = {}
        self.losses: dict[str, Tensor] = {}
        self.run: tuple[str, str] = ("", "")  # the path of the layer that runs, and what this run of it is called

    def called(self, path: str) -> str:
        """What a part of the model goes by in this run."""
        layer, run = self.run
        return run + path[len(layer) :] if layer and path.startswith(layer) else path

    def wants(self, name: str) -> bool:
        """Whether `name` was asked for."""
        return any(fnmatchcase(name, wanted) for wanted in self.names)

    def keep(self, name: str, value: Callable[[], Tensor]) -> None:
        """Keep `value()` under `name` if it was asked for; it is not computed otherwise."""
        if not self.names:
            return
        name = self.called(name)
        self.offered.add(name)
        if self.wants(name):
            self.values[name] = value()

    def check(self) -> None:
        """Raise LaminaError for a whole name that nothing in the model goes by, with the nearest one."""
        for wanted in self.names:
            if wanted not in self.offered and not any(sign in wanted for sign in "*?["):
                raise LaminaError(unknown("name in a record", wanted, sorted(self.offered)))


class Neighbours:
    """What was retrieved for a forward, and what the first layer that reads it leaves to the others.

    No dataclass: what FSDP copies of a call with its tensors must hold this one still.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids  # (B, N, k, r), -1 where there is no token
        self.encoded: Any = None  # what the encoder makes of them, as `lamina.layers.retrieval` has it


@dataclass
class Call:
    """One explicit object instead of a dozen parameters. At most 8 fields: a test counts them."""

    tokens: Tokens  # of x
    cache: Cache | None = None
    memory: Tensor | Neighbours | None = None  # (B, S, width): what cross-attention reads; or what was retrieved
    memory_tokens: Tokens | None = None
    bias: Callable[[Tokens, Tokens, MutableMapping[Any, Any]], Tensor] | None = (
        None  # added to the scores, shared by a stack
    )
    backend: str | None = None
    # Masks, rotary phases, biases: computed once a forward. No dict, which FSDP would copy for each layer.
    memo: MutableMapping[Any, Any] = field(default_factory=UserDict)
    record: Record = field(default_factory=Record)
