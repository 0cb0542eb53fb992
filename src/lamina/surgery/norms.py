"""Norms that are folded into the matrices around them: LayerNorm becomes RMSNorm (SliceGPT, arXiv:2401.15024,
section 3), and a norm's weight and bias become part of what reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    AttentionSpec,
    CrossAttentionSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    RMSNormSpec,
    SinusoidalPositionSpec,
    StackSpec,
    SumSpec,
)
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.places import StackName, edited
from lamina.surgery.stream import writers
from lamina.surgery.weights import Made, Weights, in_float32

READERS: dict[type[Spec], tuple[str, ...]] = {
    AttentionSpec: ("q", "k", "v"),
    CrossAttentionSpec: ("q",),
    FeedForwardSpec: ("gate", "up"),
}
"""The matrices that read the input of a layer, and nothing else of it does."""


@dataclass(frozen=True)
class _Norm:
    """A norm before a layer, and the layer."""

    path: str
    norm: LayerNormSpec | RMSNormSpec
    inside: str  # path of the layer
    op: Spec


@dataclass(frozen=True, kw_only=True)
class CentreOperation(Operation):
    """RMSNorm in place of every LayerNorm of a pre-norm model, which in evaluation stays the same function.

    LayerNorm takes the mean from what it reads. Here all that is written to the residual stream has its mean over the
    width taken out beforehand: the table of tokens, positions, segments and output projections with their biases. What
    has no mean LayerNorm treats as RMSNorm does. The bias of a norm goes into those of the matrices that read it. That
    of the last one goes into the head's, and the states that leave the stack lack it; without a head, or with a pooler
    or labels beside it, the last one stays a LayerNorm. A tied head keeps the old table as its own matrix.
    """

    NAME = "rms_norm"

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        made: dict[str, Made] = {}
        norms: list[_Norm] = []
        for path, stack in _stacks(spec):
            _check_stream(path, stack, spec)
            norms += _norms(path, stack)
            made |= _centred(path, stack, spec, weights)
        biased = [one for one in norms if isinstance(one.norm, LayerNormSpec) and one.norm.bias]
        ops, folded, gone = _folded(biased, weights, scale=False)
        made |= folded
        new = spec
        if spec.head is not None and spec.head.tied and "embedding.weight" in made:
            new = spec.replace(head=spec.head.replace(tied=False))
            made["head.weight"] = Made(("embedding.weight",), "copy of the table of tokens", torch.clone)
        turned = {one.path for one in norms}
        for path, _ in _stacks(spec):
            bias, head = f"{path}.norm.bias", new.head
            if bias not in weights:
                turned.add(f"{path}.norm")
            elif head is not None and path == _stacks(spec)[-1][0] and spec.pooler is None and spec.labels is None:
                turned.add(f"{path}.norm")
                gone.append(bias)
                head, folded = _folded_into_head(head, bias, weights)
                new, made = new.replace(head=head), made | folded

        def change(path: str, part: Spec) -> Spec:
            if path in turned and isinstance(part, LayerNormSpec):
                return RMSNormSpec(eps=part.eps, weight=part.weight)
            return _with_bias(part) if path in ops else part

        why = "what is written to the residual stream has no mean"
        return Changed(edited(new, change), Weights(weights, made, gone), Promise("exact", why))


@dataclass(frozen=True, kw_only=True)
class FoldNorms(Operation):
    """The weight and bias of each norm before a layer become part of the matrices that read it: W (w n + b) is
    (W diag(w)) n + W b. The norms stay, with weight 1 and bias 0, so that a layout says the model as it did."""

    NAME = "fold_norms"

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        norms = [one for path, stack in _stacks(spec) for one in _norms(path, stack) if one.norm.weight]
        if not norms:
            raise LaminaError("this model has no norms with a weight before its layers")
        ops, made, biases = _folded(norms, weights, scale=True)
        for one in norms:
            plus_one = isinstance(one.norm, RMSNormSpec) and one.norm.plus_one
            name = f"{one.path}.weight"
            made[name] = Made((name,), "folded into what reads it", torch.zeros_like if plus_one else torch.ones_like)
        made |= {name: Made((name,), "folded into what reads it", torch.zeros_like) for name in biases}

        def change(path: str, part: Spec) -> Spec:
            return _with_bias(part) if path in ops else part

        why = "a matrix times the norm's weight does what both did"
        return Changed(edited(spec, change), Weights(weights, made), Promise("exact", why))


def _stacks(spec: ModelSpec) -> list[tuple[StackName, StackSpec]]:
    both: list[tuple[StackName, StackSpec | None]] = [("encoder", spec.encoder), ("decoder", spec.decoder)]
    return [(path, stack) for path, stack in both if stack is not None]


def _check_stream(path: str, stack: StackSpec, spec: ModelSpec) -> None:
    """Raise an error where something that is no matrix writes to the residual stream, or reads it without a norm."""
    if spec.stem is not None or stack.recurrence is not None:
        what = "stem" if spec.stem is not None else f"{path}.recurrence"
        raise UnsupportedError(f"{what} writes to the residual stream, and its mean cannot be taken out")
    if isinstance(stack.position, SinusoidalPositionSpec):
        raise UnsupportedError(f"{path}.position is SinusoidalPositionSpec, which has no weights to centre")
    if stack.input_norm is not None:
        raise UnsupportedError(
            f"{path}.input_norm writes to the residual stream, and to take its mean out its weight would have to be a"
            " matrix"
        )
    if not isinstance(stack.norm, LayerNormSpec):
        found = "None" if stack.norm is None else type(stack.norm).__name__
        raise UnsupportedError(f"{path}.norm is {found}; a LayerNormSpec was expected, after the last layer")
    for number, layer in enumerate(stack.layers):
        for step in layer.steps:
            where = f"{path}.layers.{number}.{step.name}"
            if step.after is not None or step.post is not None:
                field = "after" if step.after is not None else "post"
                raise UnsupportedError(
                    f"{where}.{field} writes to the residual stream, and to take its mean out its weight would have to"
                    " be a matrix: this is for pre-norm models"
                )
            if not writers(step.op, spec.width):
                raise UnsupportedError(f"{where} has no output projection whose mean could be taken out")
            branches = step.op.branches if isinstance(step.op, SumSpec) and step.pre is None else (step,)
            for one in branches:
                if not isinstance(one.pre, LayerNormSpec):
                    found = "None" if one.pre is None else type(one.pre).__name__
                    raise UnsupportedError(f"{where} has the norm {found} before it; a LayerNormSpec was expected")


def _norms(path: str, stack: StackSpec) -> Iterator[_Norm]:
    """The norms before layers; of a branch its own. Raises UnsupportedError where one norm reads another."""
    for number, layer in enumerate(stack.layers):
        for step in layer.steps:
            where = f"{path}.layers.{number}.{step.name}"
            if step.pre is not None:
                yield _Norm(f"{where}.pre", step.pre, f"{where}.op", step.op)
            for branch in step.op.branches if isinstance(step.op, SumSpec) else ():
                if branch.pre is not None and step.pre is not None:
                    raise UnsupportedError(f"{where}: the norm of its branch {branch.name!r} reads another norm")
                if branch.pre is not None:
                    inner = f"{where}.op.branches.{branch.name}"
                    yield _Norm(f"{inner}.pre", branch.pre, f"{inner}.op", branch.op)


def _centred(path: str, stack: StackSpec, spec: ModelSpec, weights: Mapping[str, Tensor]) -> dict[str, Made]:
    """All that writes to the residual stream of a stack, without its mean over the width."""
    if stack.input_width is not None:
        rows, matrices = [], [f"{path}.input"]
    else:
        rows = [f"{path}.position.weight", f"{path}.segment.weight"]
        matrices = [] if spec.embedding.inner is None else ["embedding.up"]
        rows += ["embedding.weight"] if spec.embedding.inner is None else []
    for number, layer in enumerate(stack.layers):
        for step in layer.steps:
            matrices += [f"{path}.layers.{number}.{step.name}.op.{name}" for name in writers(step.op, spec.width)]
    dims = dict.fromkeys(rows, -1) | {f"{name}.bias": -1 for name in matrices}
    dims |= {f"{name}.weight": -2 for name in matrices}
    return {
        name: Made((name,), "without its mean over the width", in_float32(partial(_without_mean, dim=dim)))
        for name, dim in dims.items()
        if name in weights
    }


def _folded(
    norms: list[_Norm], weights: Mapping[str, Tensor], scale: bool
) -> tuple[set[str], dict[str, Made], list[str]]:
    """(layers that get biases, their weights, the norms' biases). scale: the weight of the norm too."""
    ops: set[str] = set()
    made: dict[str, Made] = {}
    gone: list[str] = []
    for one in norms:
        bias, norm = f"{one.path}.bias", f"{one.path}.weight"
        shifts = isinstance(one.norm, LayerNormSpec) and one.norm.bias
        plus_one = isinstance(one.norm, RMSNormSpec) and one.norm.plus_one
        gone += [bias] if shifts else []
        for path, op in _inner(one.inside, one.op):
            if type(op) not in READERS:
                raise UnsupportedError(f"{one.path} cannot be folded into {type(op).__name__} at {path}")
            ops |= {path} if shifts else set()
            for name in READERS[type(op)]:
                matrix, own = f"{path}.{name}.weight", f"{path}.{name}.bias"
                if matrix not in weights:
                    continue
                if scale:
                    columns = in_float32(partial(_times, plus_one=plus_one))
                    made[matrix] = Made((matrix, norm), "times the norm's weight", columns)
                if shifts:
                    sources = (matrix, bias, own) if own in weights else (matrix, bias)
                    made[own] = Made(sources, "with the norm's bias", in_float32(_shifted))
            made |= _zeros(path, op, made, weights) if shifts else {}
    return ops, made, gone


def _zeros(path: str, op: Spec, made: Mapping[str, Made], weights: Mapping[str, Tensor]) -> dict[str, Made]:
    """The biases that a layer gets beside those of its readers."""
    with torch.device("meta"):
        new = _with_bias(op).build(1)  # pyright: ignore[reportAttributeAccessIssue]
    names = [f"{path}.{name}" for name, _ in new.named_parameters() if name.count(".") == 1 and name.endswith(".bias")]
    lacking = [name for name in names if name not in weights and name not in made]
    return {name: Made((f"{name.removesuffix('bias')}weight",), "zeros", _no_bias) for name in lacking}


def _inner(path: str, op: Spec) -> Iterator[tuple[str, Spec]]:
    """A layer, or the branches of a sum that read what comes into it."""
    if not isinstance(op, SumSpec):
        yield path, op
        return
    for branch in op.branches:
        if branch.pre is None:
            yield from _inner(f"{path}.branches.{branch.name}.op", branch.op)


def _with_bias(op: Spec) -> Spec:
    """The layer with biases wherever it reads."""
    if isinstance(op, FeedForwardSpec):
        return op.replace(bias=True)
    if isinstance(op, AttentionSpec):
        return op.replace(bias={"none": "qkv", "qvo": "all"}.get(op.bias, op.bias))
    if isinstance(op, CrossAttentionSpec) and op.bias == "none":
        return op.replace(bias="qkv")
    return op


def _folded_into_head(
    head: LanguageHeadSpec, bias: str, weights: Mapping[str, Tensor]
) -> tuple[LanguageHeadSpec, dict[str, Made]]:
    """The head with the bias of the last norm in its own."""
    if head.transform is not None:
        matrix, own, factor = "head.transform.dense.weight", "head.transform.dense.bias", 1.0
        new = head.replace(transform=head.transform.replace(bias=True))
    else:
        matrix, own, factor = "head.weight" if "head.weight" in weights else "embedding.weight", "head.bias", head.scale
        new = head.replace(bias=True)
    sources = (matrix, bias, own) if own in weights else (matrix, bias)
    return new, {own: Made(sources, "with the norm's bias", in_float32(partial(_shifted, factor=factor)))}


def _without_mean(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim=dim, keepdim=True)


def _times(matrix: Tensor, norm: Tensor, plus_one: bool) -> Tensor:
    return matrix * (1 + norm if plus_one else norm)


def _shifted(matrix: Tensor, bias: Tensor, own: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """own + factor * matrix @ bias, (out,)."""
    shift = factor * (matrix @ bias)
    return shift if own is None else own + shift


def _no_bias(matrix: Tensor) -> Tensor:
    return matrix.new_zeros(matrix.shape[0])
