"""Family: how a model type of the Hugging Face layout is read into a spec and written back. A function and a table."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from lamina.errors import CheckpointError
from lamina.layers import (
    AttentionSpec,
    BranchSpec,
    CrossAttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerNormSpec,
    LayerSpec,
    NormalInitialSpec,
    RMSNormSpec,
    StackSpec,
    StepSpec,
    SumSpec,
)
from lamina.model import ModelSpec, SpecialTokens
from lamina.weights.rules import Rule, Shape, Stacked

T = TypeVar("T")
Norm = LayerNormSpec | RMSNormSpec

LARGEST = 2**24
"""No dimension or count of a published model comes near this; a file that says more is damaged or hostile."""


@dataclass(frozen=True)
class Family:
    """One `model_type`. `spec` and `config` are inverse to each other wherever the layout can say the spec.

    An architecture without files (PaLM) has sizes alone: no `config` and no `weights`, and a name instead of a type.
    """

    model_type: str
    spec: Callable[[Fields], ModelSpec]
    config: Callable[[ModelSpec], dict[str, Any]] | None = None
    weights: tuple[Rule, ...] = ()
    heads: Callable[[ModelSpec], tuple[Rule, ...]] = lambda spec: ()  # rules that depend on the spec: BERT's heads
    base: str = ""  # the prefix that checkpoints with a head have and bare ones lack: "model.", "bert."
    aliases: Mapping[str, str] = field(default_factory=dict)  # a tied head, if stored too: theirs -> theirs
    copies: Mapping[str, str] = field(default_factory=dict)  # the embedding under the names of stacks: T5, BART
    ignored: tuple[str, ...] = ()  # name patterns of what is kept but not used: buffers, Gemma 3's vision tower
    zeros: Callable[[ModelSpec], Mapping[str, Shape]] = lambda spec: {}  # what a new file holds unused: BART's buffer
    renamed: tuple[tuple[str, str], ...] = ()  # names of old files: (regular expression, what stands there now)
    sizes: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # published sizes, as configurations
    code: Callable[[ModelSpec], Mapping[str, bytes]] | None = None  # files that run it: transformers has no such class
    notes: Mapping[str, str] = field(default_factory=dict)  # by the name before "/": what a publication leaves open

    def rules(self, spec: ModelSpec) -> tuple[Rule, ...]:
        """The whole weight table of one of its models."""
        return self.weights + self.heads(spec)

    def unread(self, name: str) -> bool:
        """Whether a tensor of theirs is kept but not used."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored)


class Fields:
    """A config.json, read field by field with bounds; `names` are the tensors of the checkpoint, where there is one,
    and `read` gives them."""

    def __init__(
        self,
        config: Mapping[str, Any],
        names: frozenset[str] | None = None,
        where: str = "config.json",
        read: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.config, self.names, self.where, self.read = config, names, where, read

    def over(self, defaults: Mapping[str, Any]) -> Fields:
        """The same, where the configuration leaves out what equals the family's defaults; null stays null."""
        return Fields({**defaults, **self.config}, self.names, self.where, self.read)

    def __contains__(self, name: str) -> bool:
        return self.config.get(name) is not None

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number from `least` to LARGEST."""
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= LARGEST:
            raise CheckpointError(f"{self.where}: {name} is {value!r}; it must be a number from {least} to {LARGEST}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(name, default)
        if type(value) not in (int, float) or value != value or abs(value) == float("inf"):
            raise CheckpointError(f"{self.where}: {name} is {value!r}; it must be a finite number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or False."""
        value = self._get(name, default)
        if type(value) is not bool:
            raise CheckpointError(f"{self.where}: {name} is {value!r}; it must be true or false")
        return value

    def choice(self, name: str, table: Mapping[str, Any], default: str | None = None) -> Any:
        """The entry of `table` that the field names."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in table:
            raise CheckpointError(f"{self.where}: {name} is {value!r}; known here: {', '.join(table)}")
        return table[value]

    def must(self, name: str, *values: Any) -> None:
        """Refuse a field that is set to something this library does not implement."""
        value = self.config.get(name)
        if value is not None and value not in values:
            allowed = " or ".join(repr(v) for v in values)
            raise CheckpointError(f"{self.where}: {name} is {value!r}; only {allowed} is supported for this family")

    def head_dim(self, width: str, heads: str) -> int:
        """Features of a head where the width is shared out evenly."""
        if self.count(width) % self.count(heads):
            raise CheckpointError(
                f"{self.where}: {width}={self.count(width)} is not a multiple of {heads}={self.count(heads)}"
            )
        return self.count(width) // self.count(heads)

    def layers(self, name: str = "num_hidden_layers", default: int | None = None) -> int:
        """The number of layers, bounded so that nothing is built from a lie."""
        layers = self.count(name, default)
        if layers > 2048:
            raise CheckpointError(
                f"{self.where}: {name} is {layers}; more than 2048 layers is taken for a damaged file"
            )
        return layers

    def special(self, start: int | None = None, end: int | None = None, pad: int | None = None) -> SpecialTokens:
        """bos, eos and pad ids; the arguments are the defaults of the family."""
        ends = self.config.get("eos_token_id", end)
        ends = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
        for one in ends:
            self._id("eos_token_id", one)
        return SpecialTokens(start=self.token("bos_token_id", start), end=ends, pad=self.token("pad_token_id", pad))

    def initial(self, name: str = "initializer_range", **more: Any) -> NormalInitialSpec:
        """What new weights are drawn from; `more` is what the family has beside the deviation that the field names."""
        return NormalInitialSpec(std=self.deviation(name, 0.02), **more)

    def deviation(self, name: str, default: float) -> float:
        """A number that is not negative."""
        value = self.number(name, default)
        if value < 0:
            raise CheckpointError(f"{self.where}: {name} is {value}; a standard deviation is at least 0")
        return value

    def token(self, name: str, default: int | None = None) -> int | None:
        """A token id; null and -1 mean that there is none."""
        value = self.config.get(name, default)
        return None if self._id(name, value) == -1 else value

    def _id(self, name: str, value: Any) -> Any:
        if value is not None and (type(value) is not int or not -1 <= value <= 2**31):
            raise CheckpointError(f"{self.where}: {name} is {value!r}; it must be a token id")
        return value

    def filled(self, name: str) -> bool:
        """Whether the checkpoint has this tensor and it is not zero; without a file to look at, whether it has it."""
        return name in (self.names or ()) and (self.read is None or bool(self.read(name).any()))

    def headless(self) -> bool:
        """Whether the checkpoint is a bare model: `LlamaModel`, `GPT2Model`, `BertModel`."""
        names = self.config.get("architectures") or []
        return bool(names) and isinstance(names[0], str) and names[0].endswith("Model") and "LMHead" not in names[0]

    def _get(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.where}: {name} is missing")
        return value


QKV = tuple(f"attention.op.{part}" for part in "qkv")
"""The projections that many layouts hold in one matrix, as `pairs` takes them."""

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu_squared",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
"""Hugging Face's names of activations."""

ACTIVATION_NAMES = {"gelu_tanh": "gelu_pytorch_tanh", "silu": "silu", "relu_squared": "relu2"}


def special_config(special: SpecialTokens) -> dict[str, Any]:
    """bos, eos and pad ids as config.json has them."""
    end: Any = list(special.end) if len(special.end) > 1 else special.end[0] if special.end else None
    return {"bos_token_id": special.start, "eos_token_id": end, "pad_token_id": special.pad}


def initial_config(spec: ModelSpec, name: str = "initializer_range") -> dict[str, Any]:
    """The deviation as config.json has it; nothing where it is not one for all weights. No weight of a file depends on
    it, so that it keeps no model from being written."""
    return {name: spec.initial.std} if isinstance(spec.initial, NormalInitialSpec) else {}


def activation_name(act: str) -> str:
    """Hugging Face's name of one of our activations."""
    return ACTIVATION_NAMES.get(act, act)


def need(condition: bool, field_name: str, why: str) -> None:
    """Say which field of a spec the layout has no word for."""
    if not condition:
        raise CheckpointError(
            f"{field_name} {why}; the Hugging Face layout of this family cannot say it: save format='native'"
        )


def the(kind: type[T], value: object, field_name: str) -> T:
    """`value`, which has to be a `kind`. Raises CheckpointError naming the field of the spec that is something else."""
    if not isinstance(value, kind):
        need(False, field_name, "is None" if value is None else f"is a {type(value).__name__}")
    return value  # pyright: ignore[reportReturnType]


def in_turn(
    attention: AttentionSpec,
    feedforward: FeedForwardSpec,
    *,
    pre: Norm | None = None,
    post: Norm | None = None,
    after: Norm | None = None,
    dropout: float = 0.0,
) -> LayerSpec:
    """Attention, then feed-forward, each with the same norms around it."""
    ops = {"attention": attention, "feedforward": feedforward}
    steps = (StepSpec(name=n, op=op, pre=pre, post=post, after=after, dropout=dropout) for n, op in ops.items())
    return LayerSpec(steps=tuple(steps))


def in_parallel(
    attention: AttentionSpec,
    feedforward: FeedForwardSpec,
    *,
    shared: Norm | None = None,
    own: Norm | None = None,
    dropout: float = 0.0,
    sum_dropout: float = 0.0,
) -> LayerSpec:
    """Attention beside feed-forward, under one norm (`shared`: GPT-J, PaLM) or each under its `own` (GPT-NeoX); with
    dropout on each of the two, or on their sum (Falcon)."""
    ops = {"attention": attention, "feedforward": feedforward}
    branches = tuple(BranchSpec(name=n, op=op, pre=own, dropout=dropout) for n, op in ops.items())
    step = StepSpec(name="parallel", op=SumSpec(branches=branches), pre=shared, dropout=sum_dropout)
    return LayerSpec(steps=(step,))


def experts_of(spec: ModelSpec) -> ExpertsSpec | None:
    """The first mixture of experts; all of a model have as many."""
    return next((part for _, part in spec.walk() if isinstance(part, ExpertsSpec)), None)


def with_experts(layer: LayerSpec, **more: Any) -> LayerSpec:
    """The layer with experts such as its last step's network in place of that; `more` are fields of ExpertsSpec."""
    *others, last = layer.steps
    return layer.replace(steps=(*others, last.replace(op=ExpertsSpec(expert=last.op, **more))))  # pyright: ignore


def stacked(spec: ModelSpec, ours: str, theirs: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules for the matrices of all experts, below `ours`, which a file holds as one of each expert; {e} in `theirs`
    or in their names is its number."""
    found = experts_of(spec)
    numbers = range(0 if found is None else found.router.experts)

    def rule(our: str, their: str, kind: str) -> Rule:
        return Rule(
            f"{ours}{our}.{kind}", tuple(f"{theirs}{their}.{kind}".replace("{e}", str(e)) for e in numbers), Stacked()
        )

    return tuple(rule(our, their, kind) for our, their in names.items() for kind in ("weight", "bias") if numbers)


def parts(spec: ModelSpec, side: str = "decoder") -> tuple[StackSpec, AttentionSpec, FeedForwardSpec]:
    """The stack, and the attention and feed-forward of its first layer, be they `in_turn` or `in_parallel`.

    Cross-attention may stand between them."""
    stack = the(StackSpec, getattr(spec, side), side)
    need(len(stack.layers) > 0, f"{side}.layers", "is empty")
    path, places = f"{side}.layers.0.steps", stack.layers[0].steps
    if len(places) == 1 and isinstance(places[0].op, SumSpec):
        path, places = f"{path}.0.op.branches", places[0].op.branches
    places = [place for place in places if not isinstance(place.op, CrossAttentionSpec)]
    need(len(places) == 2, path, "are not attention and feed-forward")
    attention, feedforward = (place.op for place in places)
    return stack, the(AttentionSpec, attention, f"{path}.0.op"), the(FeedForwardSpec, feedforward, f"{path}.1.op")
