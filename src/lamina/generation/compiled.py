"""The compiled decoding step: one row, a preallocated cache, no Python between the layers; paid once per machine.

A package is made for each size of cache (256 places, then twice that, ...) and kept in the user's cache directory under
a name that depends on everything it was made from: spec, dtype, threads, processor, torch and this library's own code.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lamina.cache import Cache, FixedLedger
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation.int8 import quantize_int8
from lamina.generation.package import Step, build
from lamina.generation.pages import settle_in_large_pages
from lamina.model import Model
from lamina.packaged import cache_directory, processor
from lamina.specs import unknown
from lamina.tokens import HOLE

SMALLEST = 256
"""Places of the smallest cache a step is made for."""

AHEAD = 64
"""Places beyond the prompt that the first cache has at least, so that a short answer moves no cache."""


def prepare(model: Model, *, compile: bool = False, quantize: str | None = None) -> None:
    """Make `model` decode with 8-bit weights (quantize="int8"), with a compiled step, or both.

    Raises UnsupportedError for models without a decoder or with an adapter attached, and on devices other than the CPU.
    """
    if model.adapter is not None:
        raise UnsupportedError("a model with an adapter is not compiled or rounded: merge it or detach it first")
    if quantize not in (None, "int8"):
        raise LaminaError(unknown("quantize", str(quantize), ("int8",)))
    if quantize == "int8":
        quantize_int8(model)
    if compile:
        if model.decoder is None or model.head is None:
            raise UnsupportedError("compile=True is for models that generate: a decoder with a language head")
        if model.encoder is not None:
            raise UnsupportedError("compile=True is for decoders in this version; an encoder-decoder has two stacks")
        if model.spec.retrieval is not None:
            raise UnsupportedError("compile=True is not for models that retrieve: a step may bring neighbours or none")
        if model.embedding.weight.device.type != "cpu":
            raise UnsupportedError("compile=True is for the CPU in this version")
        settle_in_large_pages(model)
        model.engine = Engine(model)


class Engine:
    """Compiled steps of one model, by the size of their cache."""

    def __init__(self, model: Model) -> None:
        # Not a field of a module: the model holds the engine, and must not be its own submodule.
        self.model = model
        self.steps: dict[int, Step] = {}

    def fits(self, total: int) -> bool:
        """Whether `total` tokens can be decoded: always, but where phases depend on the length."""
        limit = self.model.cache_limit
        return limit is None or total <= limit

    def start(self, total: int) -> Reader:
        """A reader of one text of at most `total` tokens."""
        return Reader(self, total)

    def step(self, places: int) -> Step:
        """The step for a cache of `places`, from memory, from disk, or compiled now."""
        step = self.steps.get(places)
        if step is None:
            module = Decode(self.model, places)
            path = cache_directory() / "steps" / f"step-{self._key(places)}.pt2"
            if not path.is_file():
                _say(f"compiling the decoding step for {places} tokens (once per machine) ...")
                begin = time.perf_counter()
                token = torch.zeros((1, 1), dtype=torch.int64)
                build(module, (token, *module.state()), path, torch.get_num_threads())
                _say(f"compiled in {time.perf_counter() - begin:.0f} s, kept in {path}")
            step = self.steps[places] = Step(path, module)
        step.bind()
        return step

    def _key(self, places: int) -> str:
        weights = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        dtypes = sorted((name, str(tensor.dtype)) for name, tensor in weights.items())
        made_from = [self.model.spec.to_json(), dtypes, places, torch.get_num_threads(), torch.__version__]
        made_from += [*processor(), _code()]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:24]


class Reader:
    """Reads one text: what comes in several tokens with the model as it is, single tokens with the compiled step.

    It is also the cache of that text: `length` tokens are in, and `trim` takes back the last ones.
    """

    def __init__(self, engine: Engine, total: int) -> None:
        self.engine, self.total = engine, total
        self.length = 0
        self.places = 0
        self.state: list[Tensor] = []
        self.step: Step | None = None

    def read(self, ids: Tensor) -> Tensor:
        """(1, T) new ids -> (1, vocabulary) logits after the last."""
        if self.length == 0:
            return self._prompt(ids)
        length = self.length + ids.shape[1]
        if length > self.places:
            self._move(_places(length))
        assert self.step is not None
        if ids.shape[1] == 1:
            logits = self.step(ids, *self.state)[0]
        else:
            logits = self.step.module(ids, *self.state)
        self.length = length
        return logits

    @torch.inference_mode()  # as the state was made
    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise LaminaError(f"{self.length} tokens were read and cannot be trimmed to {length}")
        if self.state:
            cursor, following, position, *_ = self.state
            position[:, length:] = HOLE
            cursor.fill_(length)
            following.fill_(length)
        self.length = length

    def _prompt(self, ids: Tensor) -> Tensor:
        model = self.engine.model
        cache = model.new_cache("growing", 1)
        out = model(ids, cache=cache, keep_logits=1)
        assert out.logits is not None
        self.length = ids.shape[1]
        self._move(_places(min(self.total, self.length + AHEAD)))
        for (key, value), slot in zip(_pairs(self.state), cache.slots.values(), strict=True):
            assert slot.key is not None and slot.value is not None
            key[:, :, : self.length] = slot.key[:, :, : self.length]
            value[:, :, : self.length] = slot.value[:, :, : self.length]
        cursor, following, position, *_ = self.state
        cursor.fill_(self.length)
        following.fill_(self.length)
        position[0, : self.length] = torch.arange(self.length)
        return out.logits[:, -1]

    def _move(self, places: int) -> None:
        """Go on with a cache of `places`, which begins with what the last one held."""
        step = self.engine.step(places)
        assert isinstance(step.module, Decode)
        state = step.module.state()
        for new, old in zip(state, self.state, strict=False):
            if new.dim() < 2 or new.shape == old.shape:
                new.copy_(old)
            elif new.dim() == 2:
                new[:, : self.places] = old
            else:
                new[:, :, : self.places] = old
        self.step, self.state, self.places = step, state, places


class Decode(nn.Module):
    """What is exported: one token in, logits out; the cache comes as tensors, which are changed in place. As it is, it
    takes several tokens too."""

    def __init__(self, model: Model, places: int) -> None:
        super().__init__()
        self.model, self.places = model, places
        # What each layer keeps is read off a forward of one token: no layer has to say it a second time.
        cache = model.new_cache("growing", 1)
        with torch.no_grad():
            model(torch.zeros((1, 1), dtype=torch.int64), cache=cache, keep_logits=0)
        self.kept = [kept[:, :, :1].detach() for slot in cache.slots.values() for kept in (slot.key, slot.value)]  # pyright: ignore

    def state(self) -> list[Tensor]:
        """An empty cache: cursor, next position, positions, documents, marks, then key and value of each layer."""
        kept: list[Tensor] = [
            torch.zeros((), dtype=torch.int64),
            torch.zeros((1, 1), dtype=torch.int64),
            torch.full((1, self.places), HOLE),
            torch.zeros((1, self.places), dtype=torch.int64),
            torch.zeros((1, self.places), dtype=torch.bool),
        ]
        return kept + [one.new_zeros(1, one.shape[1], self.places, one.shape[3]) for one in self.kept]

    def forward(self, ids: Tensor, *state: Tensor) -> Tensor:
        cursor, following, position, document, marked, *_ = state
        cache: Cache = self.model.new_cache("fixed", 1, self.places)
        ledger = cache.ledgers["fixed"]
        assert isinstance(ledger, FixedLedger)
        ledger.cursor, ledger.position, ledger.document, ledger.marked = cursor, position, document, marked
        ledger.length = None
        cache.plain, cache.next_position, cache.document = False, following, document[:, :1]
        for (key, value), slot in zip(_pairs(state), cache.slots.values(), strict=True):
            slot.key, slot.value = key, value
        out = self.model(ids, cache=cache, keep_logits=1)
        following.add_(ids.shape[1])
        return out.logits[:, -1]


def _pairs(state: list[Tensor] | tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(state[5::2], state[6::2], strict=True))


def _places(tokens: int) -> int:
    places = SMALLEST
    while places < tokens:
        places *= 2
    return places


@cache
def _code() -> str:
    """A hash of the source that the exported graph comes from."""
    root = Path(__file__).parent.parent
    found = [path for room in ("model", "layers", "attend", "cache", "patterns") for path in (root / room).glob("*.py")]
    found += [root / f"{name}.py" for name in ("reading", "tokens", "marks")]
    found += [root / "generation" / f"{name}.py" for name in ("package", "compiled", "int8")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(found))).hexdigest()


def _say(text: str) -> None:
    print(f"lamina: {text}", file=sys.stderr, flush=True)
