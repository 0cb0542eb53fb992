"""Residual wiring as data: pre, post, sandwich, output-only, parallel, DeepNorm are settings of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.call import Call
from lamina.layers.dropout import drop_branch, dropout
from lamina.layers.initial import Draw
from lamina.layers.norm import LayerNormSpec, RMSNormSpec
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class StepSpec(Spec):
    """x -> after(residual * x + dropout(tanh(gate) * post(op(pre(x))))).

    pre-norm: pre. post-norm: after. Sandwich: pre and post. Output-only: post. DeepNorm: after, and residual > 1.
    """

    name: str  # "attention", "feedforward", "cross": part of every parameter's name
    op: Spec  # AttentionSpec, FeedForwardSpec, SumSpec, ...
    pre: LayerNormSpec | RMSNormSpec | None = None  # GPT-2, LLaMA, T5 (arXiv:2002.04745)
    post: LayerNormSpec | RMSNormSpec | None = None  # Gemma 2 (with pre), OLMo 2 (alone)
    after: LayerNormSpec | RMSNormSpec | None = None  # BERT, BART
    residual: float = 1.0  # DeepNorm's alpha (arXiv:2203.00555)
    dropout: float = 0.0  # on the output of op: 0.1 in GPT-2 and BERT
    drop_branch: float = 0.0  # stochastic depth
    gate: bool = False  # a learned scalar, 0 at the start, so that a new step changes nothing: Flamingo (2204.14198)

    def check(self) -> None:
        if not self.name.isidentifier():
            raise LaminaError(f"a step is called {self.name!r}; its name becomes part of parameter names: use letters")
        if hasattr(nn.ModuleDict, self.name):
            raise LaminaError(
                f"a step is called {self.name!r}, which torch's modules have already; choose another name"
            )
        if not (0 <= self.dropout <= 1 and 0 <= self.drop_branch <= 1):
            raise LaminaError(f"dropout={self.dropout} and drop_branch={self.drop_branch} must lie within 0 and 1")

    def build(self, width: int) -> Step:
        return Step(self, width)


@dataclass(frozen=True, kw_only=True)
class BranchSpec(Spec):
    """One term of a sum, with its own norm where it has one (GPT-NeoX)."""

    name: str
    op: Spec
    pre: LayerNormSpec | RMSNormSpec | None = None
    dropout: float = 0.0  # on each branch by itself, not on the sum: GPT-J, GPT-NeoX

    def check(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise LaminaError(f"dropout={self.dropout} of the branch {self.name!r} must lie within 0 and 1")


@dataclass(frozen=True, kw_only=True)
class SumSpec(Spec):
    """Parallel branches: attention(x) + feedforward(x) (GPT-J; PaLM, arXiv:2204.02311, section 2)."""

    branches: tuple[BranchSpec, ...]

    def check(self) -> None:
        names = [branch.name for branch in self.branches]
        if not names:
            raise LaminaError("a sum needs at least one branch")
        if len(set(names)) < len(names):
            raise LaminaError(f"two branches of a sum have one name: {names}")

    def build(self, width: int) -> Sum:
        return Sum(self, width)


@dataclass(frozen=True, kw_only=True)
class LayerSpec(Spec):
    """Steps, one after the other."""

    steps: tuple[StepSpec, ...]

    def check(self) -> None:
        names = [step.name for step in self.steps]
        if len(set(names)) < len(names):
            raise LaminaError(f"two steps of a layer have one name: {names}")

    def build(self, width: int) -> Layer:
        return Layer(self, width)


class Step(nn.Module):
    """One residual step. (B, T, width) -> (B, T, width)."""

    def __init__(self, spec: StepSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.pre = None if spec.pre is None else spec.pre.build(width)
        self.op = spec.op.build(width)  # pyright: ignore[reportAttributeAccessIssue]
        self.post = None if spec.post is None else spec.post.build(width)
        self.after = None if spec.after is None else spec.after.build(width)
        self.gate = nn.Parameter(torch.zeros(1)) if spec.gate else None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        spec = self.spec
        reads = getattr(self.op, "reads", None)
        if reads is not None and not reads(call):
            return x  # a decoder without an encoder, given nothing to read: as if the step were not there
        h = self.op(x if self.pre is None else self.pre(x), call)
        h = h if self.post is None else self.post(h)
        h = h if self.gate is None else h * self.gate.tanh()
        h = drop_branch(dropout(h, spec.dropout, self.training), spec.drop_branch, self.training)
        x = (x if spec.residual == 1.0 else x * spec.residual) + h
        return x if self.after is None else self.after(x)

    def initialise(self, draw: Draw) -> None:
        if self.gate is not None:
            nn.init.zeros_(self.gate)


class Branch(nn.Module):
    """dropout(op(pre(x)))."""

    def __init__(self, spec: BranchSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.pre = None if spec.pre is None else spec.pre.build(width)
        self.op = spec.op.build(width)  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return dropout(self.op(x if self.pre is None else self.pre(x), call), self.spec.dropout, self.training)


class Sum(nn.Module):
    """The sum of the branches."""

    def __init__(self, spec: SumSpec, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({branch.name: Branch(branch, width) for branch in spec.branches})

    def forward(self, x: Tensor, call: Call) -> Tensor:
        first, *others = (branch(x, call) for branch in self.branches.values())
        for other in others:
            first = first + other
        return first


class Layer(nn.ModuleDict):
    """The steps of a layer by their name, in order."""

    def __init__(self, spec: LayerSpec, width: int) -> None:
        super().__init__({step.name: step.build(width) for step in spec.steps})

    def forward(self, x: Tensor, call: Call) -> Tensor:
        for step in self.values():
            x = step(x, call)
        return x
