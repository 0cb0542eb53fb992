"""What the parts of a model read, from a text: sums over its tokens, for operations that fit weights to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import Call, Stack
from lamina.model import Model, ModelSpec
from lamina.reading import read
from lamina.text import Tokenizer

Texts = Callable[[str | None], Sequence[Sequence[int]]]
"""From the path of a text, None for the packaged sample, to ids that a model reads at one time."""
LONGEST = 512
"""Tokens that are read at one time, where the model reads more."""
TOKENS = 2048
"""Tokens that are read where no text is given."""
SAMPLE = Path(__file__).parent / "sample.txt"
"""What is read where no text is given: prose, verse and code in the public domain."""
MOST = 4096
"""Tokens that a fit reads of a text."""


def moment(rows: Tensor) -> Tensor:
    """(n, d) -> (d + 1, d + 1): the sum of x x^T, with a 1 after each x, so that biases are weights of it."""
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return rows.T @ rows


def energy(rows: Tensor) -> Tensor:
    """(n, d) -> (d,): the sum of the squares."""
    return rows.square().sum(dim=0)


def pieces(ids: Sequence[int], length: int) -> Iterator[list[int]]:
    """A long text as texts of at most `length` tokens."""
    for start in range(0, len(ids), length):
        yield list(ids[start : start + length])


def random_texts(spec: ModelSpec) -> Texts:
    """What a model without a tokenizer reads in place of a text: random ids."""
    length = min(spec.context or LONGEST, spec.source_context or LONGEST, LONGEST)

    def texts(path: str | None) -> list[list[int]]:
        if path is not None:
            raise LaminaError("a model without a tokenizer reads ids, not a text")
        drawn = torch.randint(spec.embedding.vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0))
        return list(pieces(drawn.tolist(), length))

    return texts


def text_in(path: str | Path | None) -> str:
    """What a file of text says, or the packaged sample."""
    place = SAMPLE if path is None else Path(path)
    try:
        return place.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise LaminaError(f"{place} is no text in UTF-8") from None


def texts_by(words: Tokenizer, spec: ModelSpec, longest: int = LONGEST) -> Texts:
    """What a model reads by a tokenizer: of a file, or of the packaged sample, no more than `longest` at one time."""
    limit = min(spec.context or longest, spec.source_context or longest, longest)

    def texts(path: str | None) -> list[list[int]]:
        ids = words.encode(text_in(path))
        return list(pieces(ids if path is not None else ids[:TOKENS], limit))

    return texts


class Calibration:
    """`calibration(path)`: `measure` of what the module at a path reads, in float64, over the tokens of a text.

    The model runs when it is first asked, a layer at a time: in memory are the states of all tokens in float32, tokens
    x width, twice for an encoder-decoder; the weights of one layer; and what was measured in it. To be asked for a
    layer before the last one makes the model begin anew. An encoder-decoder reads the first half of each text and
    writes the second; `path` + ".memory" is what a cross-attention reads of the encoder.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        texts: Callable[[], Sequence[Sequence[int]]],
        paths: Sequence[str],
        measure: Callable[[Tensor], Tensor] = moment,
    ) -> None:
        self.spec, self.weights, self.texts, self.measure = spec, weights, texts, measure
        self.paths = frozenset(paths)
        self.found: dict[str, Tensor] = {}
        self.done: list[str] = []
        self.run: Iterator[str] = iter(())

    def __call__(self, path: str) -> Tensor:
        layer = ".".join(path.split(".")[:3])
        if layer in self.done and self.done[-1] != layer:
            self.done = []
        if not self.done:
            self.run = self._layers()
        while not self.done or self.done[-1] != layer:
            self.found = {}
            self.done.append(next(self.run))
        if path not in self.found:
            raise LaminaError(f"{path} reads nothing in this text")
        return self.found[path]

    def _layers(self) -> Iterator[str]:
        """Run the model, and say which layer has just run."""
        spec = self.spec.replace(head=None, pooler=None, labels=None)
        model, texts = spec.build(device="meta").eval(), self._read()
        sides = [name for name in ("encoder", "decoder") if getattr(spec, name) is not None]
        halves = _halves(texts, spec.special.decoder_start or 0) if spec.two_stacks else [texts]
        memory: list[tuple[Tensor, Call]] = []
        for side, read_here in zip(sides, halves, strict=True):
            stack = getattr(model, side)
            with torch.no_grad():
                self._load(model, "embedding.")
                states = [self._begun(model, ids) for ids in read_here]
                model.embedding.to("meta")
                if memory:
                    for (_, call), (encoded, source) in zip(states, memory, strict=True):
                        call.memory, call.memory_tokens = encoded, source.tokens
                self._load(model, f"{side}.", but=f"{side}.layers.")
                for _, call in states:
                    call.bias = stack.score_bias
                states = [(stack.begin(x, call, None), call) for x, call in states]
            for number, layer in enumerate(stack.layers):
                with torch.no_grad():
                    states = self._through(model, stack, f"{side}.layers.{number}", layer, states)
                yield f"{side}.layers.{number}"
            with torch.no_grad():
                memory = [(stack.end(x, call), call) for x, call in states]

    def _begun(self, model: Model, ids: Sequence[int]) -> tuple[Tensor, Call]:
        row = torch.tensor([list(ids)])
        tokens = read(row, None)
        if model.spec.marks is not None:
            tokens = model.spec.marks.put(row, tokens)
        return model.embedding(row), Call(tokens=tokens)

    def _through(
        self, model: Model, stack: Stack, path: str, layer: nn.Module, states: list[tuple[Tensor, Call]]
    ) -> list[tuple[Tensor, Call]]:
        self._load(model, f"{path}.")
        hooks = [
            module.register_forward_pre_hook(lambda _, given, name=name: self._see(name, given), with_kwargs=False)
            for name, module in model.named_modules()
            if name in self.paths and name.startswith(f"{path}.")
        ]
        new = []
        for x, call in states:
            for _ in range(stack.spec.repeat):
                x = layer(x, call)
            new.append((x, call))
        for hook in hooks:
            hook.remove()
        layer.to("meta")
        return new

    def _see(self, path: str, given: tuple[object, ...]) -> None:
        x, call = given[0], given[1] if len(given) > 1 else None
        seen = {path: x}
        if isinstance(call, Call) and isinstance(call.memory, Tensor):
            seen[f"{path}.memory"] = call.memory
        for name, rows in seen.items():
            assert isinstance(rows, Tensor)
            found = self.measure(rows.flatten(0, -2).double())
            self.found[name] = self.found[name] + found if name in self.found else found

    def _load(self, model: Model, begin: str, but: str = "\0") -> None:
        names = [n for n, _ in model.named_parameters() if n.startswith(begin) and not n.startswith(but)]
        for name in names:
            if name not in self.weights:
                raise LaminaError(
                    f"{name} is new and has no values yet: fit to a text before the operation that adds it"
                )
        state = {name: self.weights[name] for name in names}
        wide = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in state.items()}
        model.load_state_dict(wide, assign=True, strict=False)

    def _read(self) -> list[list[int]]:
        chosen: list[list[int]] = []
        for text in self.texts():
            chosen.append(list(text)[: max(MOST - sum(map(len, chosen)), 0)])
        chosen = [text for text in chosen if len(text) > 1]
        if not chosen:
            raise LaminaError("a fit needs a text of at least two tokens")
        most, rows = max(map(max, chosen)), self.spec.source_vocabulary
        if most >= rows:
            raise LaminaError(f"the text has the token {most}, and the model {rows} tokens by now: fit to it before")
        return chosen


def check_text(spec: ModelSpec, text: str | None) -> None:
    """Raise LaminaError for a text that is not there, UnsupportedError for a model that cannot be run on one here."""
    stacks = [stack for stack in (spec.encoder, spec.decoder) if stack is not None]
    if spec.stem is not None or any(stack.recurrence is not None for stack in stacks):
        raise UnsupportedError("a text is for models of plain stacks that read ids, without a stem or a recurrence")
    if text is not None and not Path(text).is_file():
        raise LaminaError(f"text={text!r}: no such file")


def _halves(texts: list[list[int]], start: int) -> list[list[list[int]]]:
    middle = [max(len(text) // 2, 1) for text in texts]
    return [
        [text[:half] for text, half in zip(texts, middle, strict=True)],
        [[start, *text[half:-1]] for text, half in zip(texts, middle, strict=True)],
    ]
