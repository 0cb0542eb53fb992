"""What a model costs: parameters, arithmetic, cache. Counted by building it on the meta device and running it there.

There is no formula beside the model: parameters are those of the built module, a FLOP is one that a matrix product of
the real forward or backward asks for (2 m n k each), a cache byte one that the model's own cache holds. Tensors on the
meta device have shapes and no storage, so 405 billion parameters and 131,072 tokens cost nothing to count.
"""

from __future__ import annotations

import bisect
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lamina.cache import Cache, ExpiringLedger, GrowingLedger, RingLedger, Slot
from lamina.errors import LaminaError
from lamina.layers import (
    BranchSpec,
    ChunkedCrossAttentionSpec,
    ConvolutionStem,
    ExpertsSpec,
    LayerSpec,
    NeighbourEncoderSpec,
    StackSpec,
    StepSpec,
    SumSpec,
)
from lamina.model import Model, ModelSpec, Output
from lamina.source import spec as spec_of
from lamina.specs import Spec, unknown
from lamina.words import say, span

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}

NEIGHBOURS = 2
"""Of each chunk, where a model retrieves, and each two chunks long: as in training (arXiv:2112.04426, section 2.2)."""


def _same(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.empty(shape, dtype=tensors[0].dtype, device="meta")


def _addmm(bias: Tensor, left: Tensor, right: Tensor, **scales: Any) -> Tensor:
    return torch.empty((left.shape[0], right.shape[1]), dtype=left.dtype, device="meta")


def _any(tensor: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    shape = list(tensor.shape)
    shape[dim : dim + 1 or None] = [1] if keepdim else []
    return torch.empty(shape, dtype=torch.bool, device="meta")


def _layer_norm(tensor: Tensor, normal: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    each = (*tensor.shape[: tensor.dim() - len(normal)], *(1 for _ in normal))
    mean, deviation = (torch.empty(each, dtype=tensor.dtype, device="meta") for _ in range(2))
    return _same(tensor), mean, deviation


def _layer_norm_backward(
    slope: Tensor, tensor: Tensor, normal: Sequence[int], mean: Tensor, deviation: Tensor, *weights: Any
) -> tuple[Tensor | None, ...]:
    *parameters, wanted = weights
    return tuple(_same(one) if want else None for one, want in zip((tensor, *parameters), wanted, strict=True))


aten = torch.ops.aten
ALIKE = {
    aten.addmm.default: _addmm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten._safe_softmax.default: _same,
    aten._softmax_backward_data.default: _same,
    aten.any.dim: _any,
    aten.cat.default: _cat,
    aten.mean.dim: aten.sum.dim_IntList,
    aten.roll.default: _same,
    aten.tril.default: _same,
}
"""Stand-ins with the same shapes for operations whose meta kernels are slow: some import torch's compiler, which takes
a second, and others are written in Python."""


@dataclass(frozen=True)
class Row:
    """One part of a model. The numbers are those of all its `repeat` copies together; a row holds its `parts`' sums."""

    name: str  # "embedding", "decoder.layers.0-29"; within `parts` from there on: "attention", "op"
    what: str  # the spec in words
    repeat: int
    parameters: int
    active_parameters: int
    flops: int  # of the prefill
    flops_per_token: int
    flops_train_per_token: int
    cache_bytes: int
    shapes: dict[str, tuple[int, ...]]  # of the parameters of one copy, where it has no parts
    parts: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Account:
    """What a model costs at a batch, a context and a dtype."""

    parameters: int  # tied ones once
    active_parameters: int  # those that a token uses: all, but for experts that were not chosen
    flops_prefill: int  # reading batch x context tokens, with the logits of all of them
    flops_per_token: int  # one more token at the end of a full context, from the cache; an encoder: prefill by tokens.
    # Where a model retrieves: one that ends no chunk, so that it encodes nothing
    flops_train_per_token: int  # forward and backward, by tokens; of frozen weights only what gradients pass through
    cache_bytes: int  # keys and values of batch x context tokens; windows keep min(context, window)
    weight_bytes: int
    batch: int
    context: int
    dtype: str
    rows: tuple[Row, ...]


def account(
    model: ModelSpec | Model | str | os.PathLike[str],
    batch: int = 1,
    context: int | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    trained: Collection[str] | None = None,
) -> Account:
    """Count a spec, a model, or any SOURCE.

    context: None takes the spec's own. dtype, of weights and cache: None takes that of a model, and bfloat16 for specs.
    trained: names of the parameters that training changes; None: all of them.
    Raises LaminaError where the context is unknown, or longer than the model can read.
    """
    if isinstance(model, Model):
        spec, dtype = model.spec, next(model.parameters()).dtype if dtype is None else dtype
    else:
        spec = model if isinstance(model, ModelSpec) else spec_of(model)
    chosen = _dtype(dtype)
    context = _context(spec, batch, context)
    small, repeats = _reduced(spec, trained)
    built = small.build(device="meta", dtype=chosen).eval()
    if trained is not None:
        for name, parameter in built.named_parameters():
            parameter.requires_grad_(_first(name, repeats) in trained)
    tally = _Tally(built, repeats, batch, batch * context)
    with torch.inference_mode(False), torch.enable_grad():  # wherever it is called: the backward is counted too
        _measure(tally, built, batch, context)
    rows = tuple(_rows(built, spec, tally))
    return Account(
        parameters=tally.parameters["total"],
        active_parameters=tally.parameters["total"] - tally.idle["total"],
        flops_prefill=tally.forward["total"],
        flops_per_token=tally.per_token("total"),
        flops_train_per_token=round(tally.train["total"] / (batch * context)),
        cache_bytes=tally.cache["total"],
        weight_bytes=tally.parameters["total"] * chosen.itemsize,
        batch=batch,
        context=context,
        dtype=str(chosen).removeprefix("torch."),
        rows=rows,
    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = "bfloat16" if dtype is None else dtype
    if name not in DTYPES:
        raise LaminaError(unknown("dtype", name, DTYPES))
    return DTYPES[name]


def _context(spec: ModelSpec, batch: int, context: int | None) -> int:
    context = spec.context if context is None else context
    if context is None:
        raise LaminaError("this model does not say how long its context is: give context=")
    for name, value in (("batch", batch), ("context", context)):
        if type(value) is not int or value < 1:
            raise LaminaError(f"{name} is {value!r}; it must be a whole number of 1 or more")
    widest = max([spec.width, spec.embedding.vocabulary])
    if batch * context * max(context, 8) * widest >= 2**62:
        raise LaminaError(f"batch={batch} times context={context} is beyond what tensors can count")
    return context


def _reduced(spec: ModelSpec, trained: Collection[str] | None) -> tuple[ModelSpec, dict[str, list[list[int]]]]:
    """The spec with each distinct layer once, and, by stack, the numbers of the layers that each of them stands for.

    Equal specs build equal layers, and a layer's forward depends on its spec alone; its backward on which of its
    weights are trained, and on whether any before it are: multiplying is exact.
    """
    repeats: dict[str, list[list[int]]] = {}
    passed = False  # gradients come by
    for name in ("encoder", "decoder"):
        stack: StackSpec | None = getattr(spec, name)
        if stack is not None:
            inner = _by_layer(name, trained or ())
            places: dict[tuple[LayerSpec, frozenset[str], bool], list[int]] = {}
            for i, layer in enumerate(stack.layers):
                own = inner.get(i, frozenset())
                places.setdefault((layer, own, passed and i > 0), []).append(i)
                passed |= bool(own)
            repeats[name] = list(places.values())
            spec = spec.replace(**{name: stack.replace(layers=tuple(layer for layer, *_ in places))})
    return spec, repeats


def _by_layer(stack: str, names: Collection[str]) -> dict[int, frozenset[str]]:
    """The parameters among these of each layer of a stack, by their names in it."""
    found: dict[int, set[str]] = {}
    for name in names:
        if name.startswith(f"{stack}.layers."):
            number, _, rest = name.removeprefix(f"{stack}.layers.").partition(".")
            found.setdefault(int(number), set()).add(rest)
    return {number: frozenset(inner) for number, inner in found.items()}


def _first(name: str, repeats: dict[str, list[list[int]]]) -> str:
    """What a parameter of the reduced model is called in the whole one, in the first of the layers it stands for."""
    stack, _, rest = name.partition(".layers.")
    if stack not in repeats:
        return name
    number, _, inner = rest.partition(".")
    return f"{stack}.layers.{repeats[stack][int(number)][0]}.{inner}"


class _Tally:
    """Counts by the path of the part, for one copy of it; under "total" for the whole model, copies multiplied."""

    def __init__(self, model: Model, repeats: dict[str, list[list[int]]], batch: int, tokens: int) -> None:
        self.repeats, self.batch, self.tokens = repeats, batch, tokens
        self.parameters: Counter[str] = Counter()
        self.idle: Counter[str] = Counter()  # parameters that a token does not use
        self.forward: Counter[str] = Counter()
        self.train: Counter[str] = Counter()
        self.step: Counter[str] = Counter()
        self.cache: Counter[str] = Counter()
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, shape in self.shapes.items():
            self.add(self.parameters, name, math.prod(shape))
        for name, module in model.named_modules():
            idle: Callable[[], int] | None = getattr(module, "idle", None)  # as a layer of experts declares it
            if idle is not None:
                self.add(self.idle, name, idle())

    def add(self, counter: Counter[str], path: str, count: int) -> None:
        """Count for the part at `path`, for everything that it is a part of, and for the model."""
        names = path.split(".")
        for end in range(1, len(names) + 1):
            counter[".".join(names[:end])] += count
        counter["total"] += count * self.copies(path)

    def below(self, path: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters of a part, by their names in it; "q" for "q.weight"."""
        inside = {name[len(path) + 1 :]: shape for name, shape in self.shapes.items() if name.startswith(f"{path}.")}
        return {name.removesuffix(".weight"): shape for name, shape in inside.items()}

    def per_token(self, path: str) -> int:
        """FLOPs for a token of one copy of a part: of the step, or of the prefill where there is no cache."""
        stepped = self.step["total"] > 0
        return round(self.step[path] / self.batch if stepped else self.forward[path] / self.tokens)

    def copies(self, path: str) -> int:
        """How often the part at `path` is in the model."""
        stack, _, rest = path.partition(".")
        layers, _, rest = rest.partition(".")
        return len(self.repeats[stack][int(rest.split(".")[0])]) if layers == "layers" and rest else 1


class _Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products by the part that is running; in the backward, by the part that made the node.

    As torch.utils.flop_counter.FlopCounterMode, whose formulas it uses, but without the compiler, whose import would
    take longer than everything else here, and with the backward told apart by layers.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, tally: _Tally, counter: Counter[str]) -> None:
        super().__init__()
        self.tally, self.counter = tally, counter
        self.running: list[str] = [""]
        self.marks: list[tuple[int, str]] = [(0, "")]  # from this autograd node on, it is this part

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = _elementwise(func, args, kwargs)
        if result is None:
            result = ALIKE.get(func, func)(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            node = torch._C._current_autograd_node()  # pyright: ignore[reportAttributeAccessIssue]
            path = self.running[-1] if node is None else self._part_of(node._sequence_nr())
            self.tally.add(self.counter, path, formula(*args, **kwargs, out_val=result))
        return result

    def enter(self, path: str) -> None:
        self._now(path)
        self.running.append(path)

    def leave(self) -> None:
        self.running.pop()
        self._now(self.running[-1])

    def _now(self, path: str) -> None:
        self.marks.append((torch.autograd._get_sequence_nr(), path))  # pyright: ignore[reportPrivateImportUsage]

    def _part_of(self, number: int) -> str:
        return self.marks[bisect.bisect_right(self.marks, number, key=lambda mark: mark[0]) - 1][1]


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What an elementwise operation gives on the meta device, found by doing it to one element; None for others.

    Exact, and cheaper than torch's own meta kernels for these, which import its compiler.
    """
    tensors = [value for value in args if isinstance(value, Tensor)]
    if torch.Tag.pointwise not in func.tags or func._schema.is_mutable:
        return None
    if not all(tensor.is_meta or tensor.dim() == 0 for tensor in tensors) or not any(t.is_meta for t in tensors):
        return None
    ones = [torch.ones((1,) * a.dim(), dtype=a.dtype) if isinstance(a, Tensor) else a for a in args]
    one = func(*ones, **kwargs)
    if not isinstance(one, Tensor) or any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    return torch.empty(shape, dtype=one.dtype, device="meta")


@contextmanager
def _counting(model: Model, tally: _Tally, counter: Counter[str]) -> Iterator[_Products]:
    """Count the products of what runs inside."""
    mode = _Products(tally, counter)
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda module, args, name=name: mode.enter(name)))
            handles.append(module.register_forward_hook(lambda module, args, result: mode.leave()))
    try:
        with mode:
            yield mode
    finally:
        for handle in handles:
            handle.remove()


def _measure(tally: _Tally, model: Model, batch: int, context: int) -> None:
    """Run the model on the meta device: forward and backward over the whole context, then one step from the cache."""
    ids = torch.empty((batch, context), dtype=torch.int64, device="meta")
    with _counting(model, tally, tally.forward) as mode:
        out = _scalar(_run(model, ids))
        mode.counter = tally.train
        if out.requires_grad:  # all may be frozen
            out.backward()
    tally.train.update(tally.forward)
    if model.decoder is None:
        return
    model.cache_limit = None  # of values, not of shapes: counting goes beyond it
    cache = model.new_cache("auto", batch)
    memory = None
    if context > 1:
        with _counting(model, tally, Counter()), torch.no_grad():
            memory = _run(model, ids[:, :-1], cache, source=ids).encoder_output
    with _counting(model, tally, tally.step), torch.no_grad():
        _run(model, ids[:, :1], cache, source=ids, memory=memory)
    for path, slot in cache.slots.items():
        tally.add(tally.cache, path, _held(slot, cache.length))


def _run(
    model: Model, ids: Tensor, cache: Cache | None = None, source: Tensor | None = None, memory: Tensor | None = None
) -> Output:
    if memory is not None:
        return model(decoder_input_ids=ids, encoder_output=memory, cache=cache)
    two, reads = model.spec.two_stacks, ids if source is None else source
    told = {model.reads: _features(model, ids)} if not model.spec.reads_ids else {"input_ids": reads if two else ids}
    if model.spec.retrieval is not None:
        told["neighbours"] = _neighbours(ids, model.spec.retrieval.chunk)
    return model(**told, **({"decoder_input_ids": ids} if two else {}), cache=cache)


def _features(model: Model, ids: Tensor) -> Tensor:
    """(B, bins, frames): as many as the encoder has positions for, whatever the decoder writes: 30 seconds in Whisper.
    Without learned positions as many as make the tokens of `ids`."""
    assert isinstance(model.stem, ConvolutionStem) and model.encoder is not None
    size = getattr(model.encoder.spec.position, "size", ids.shape[1])
    shape = (ids.shape[0], model.stem.spec.bins, size * math.prod(model.stem.spec.strides))
    return torch.empty(shape, device="meta", dtype=model.embedding.weight.dtype)


def _neighbours(ids: Tensor, chunk: int) -> Tensor:
    """Those of the chunks that end in so many tokens. A single one ends none, as most do in decoding."""
    return ids.new_empty(ids.shape[0], ids.shape[1] // chunk, NEIGHBOURS, 2 * chunk)


def _scalar(out: Output) -> Tensor:
    results = [out.logits, out.label_logits, out.pooled]
    wanted = [result for result in results if result is not None] or [out.hidden]
    total = wanted[0].sum()
    for result in wanted[1:]:
        total = total + result.sum()
    return total


def _held(slot: Slot, length: int) -> int:
    """Bytes that a slot holds after `length` tokens, without the room to grow into."""
    if slot.key is None:
        return slot.bytes()
    places = slot.key.shape[2]
    if isinstance(slot.ledger, GrowingLedger):
        return slot.bytes() // places * length
    if isinstance(slot.ledger, RingLedger):
        length //= slot.ledger.every
    if isinstance(slot.ledger, RingLedger | ExpiringLedger):
        return slot.bytes() // places * min(places - 1, length)  # one place is spare, for padding
    return slot.bytes()


def _rows(model: Model, spec: ModelSpec, tally: _Tally) -> Iterator[Row]:
    """The parts of a model, in the order in which a token meets them."""
    for name, module in model.named_children():
        if name in ("encoder", "decoder"):
            for part, inner in module.named_children():
                if part != "layers":
                    yield _row(tally, f"{name}.{part}", f"{name}.{part}", getattr(module.spec, part, inner))
                    continue
                for i, layer in enumerate(module.spec.layers):  # pyright: ignore
                    title = f"{name}.layers.{span(tally.repeats[name][i])}"
                    yield _row(tally, f"{name}.layers.{i}", title, layer)
        else:
            yield _row(tally, name, name, getattr(spec, name, module))


def _row(tally: _Tally, path: str, name: str, spec: Any) -> Row:
    copies = tally.copies(path)
    parts = tuple(_row(tally, f"{path}.{below}", title, inner) for below, title, inner in _parts(spec))
    parameters = tally.parameters[path] * copies
    return Row(
        name=name,
        what=say(spec) if isinstance(spec, Spec) else type(spec).__name__,
        repeat=copies,
        parameters=parameters,
        active_parameters=parameters - tally.idle[path] * copies,
        flops=tally.forward[path] * copies,
        flops_per_token=tally.per_token(path) * copies,
        flops_train_per_token=round(tally.train[path] / tally.tokens) * copies,
        cache_bytes=tally.cache[path] * copies,
        shapes={} if parts else tally.below(path),
        parts=parts,
    )


def _parts(spec: Any) -> Sequence[tuple[str, str, Any]]:
    """The parts of a layer as (path below it, name, spec)."""
    if isinstance(spec, LayerSpec):
        return [(step.name, step.name, step) for step in spec.steps]
    if isinstance(spec, StepSpec | BranchSpec):
        sides = [(name, getattr(spec, name, None)) for name in ("pre", "op", "post", "after")]
        return [(name, name, part) for name, part in sides if part is not None]
    if isinstance(spec, SumSpec):
        return [(f"branches.{branch.name}", branch.name, branch) for branch in spec.branches]
    if isinstance(spec, ChunkedCrossAttentionSpec):
        sides = [(name, getattr(spec, name)) for name in ("encoder", "attention")]
        return [(name, name, part) for name, part in sides if part is not None]
    if isinstance(spec, NeighbourEncoderSpec):
        sides = [("embedding", "embedding", spec.embedding)]
        sides += [(f"stack.{name}", name, getattr(spec.stack, name)) for name in ("position", "input_norm")]
        sides += [(f"stack.layers.{i}", f"layers.{i}", layer) for i, layer in enumerate(spec.stack.layers)]
        sides += [(f"norms.{i}", f"norms.{i}", spec.stack.norm) for i in range(len(spec.depths))]
        return [(path, name, part) for path, name, part in (*sides, ("stack.norm", "norm", spec.stack.norm)) if part]
    if isinstance(spec, ExpertsSpec):
        sides = [("router", spec.router), ("experts", spec.expert), ("shared", spec.shared)]
        return [(name, name, part) for name, part in sides if part is not None]
    return []
