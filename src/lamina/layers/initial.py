"""What new weights are drawn from: one deviation for all (GPT-2, BERT), or by what a matrix reads (T5, PaLM).

A layer says what each of its weights is, and no layer knows a family. What ends in the residual stream is said already,
by the role "in" in `SHARD`. Biases begin at 0 and norms at 1; gates, sinks and lambdas have their layer's own values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class NormalInitialSpec(Spec):
    """N(0, std^2), whatever the shape (Radford et al. 2018, section 4.1; arXiv:1810.04805, its code)."""

    std: float = 0.02  # `initializer_range` or `init_std` in config.json; 0.006 in OPT and DeepSeek-V3
    residual: float | None = None  # of what a step adds: std / sqrt(2 L) in GPT-2 and OPT, 2 / (L sqrt(d)) in GPT-NeoX
    position: float | None = None  # of learned positions: 0.01 in GPT-2's code
    truncated: bool = False  # what is beyond 2 std is drawn again, so that 0.88 std is left: BERT, ALBERT, BigBird

    def check(self) -> None:
        _positive(self, "std", "residual", "position")

    def matrix(self, fan_in: int, *, residual: bool = False, gain: float = 1.0) -> tuple[float, bool]:
        """The deviation of a matrix, and whether it is truncated; neither `fan_in` nor `gain` counts."""
        return (self.residual if residual and self.residual is not None else self.std), self.truncated

    def table(self, kind: str) -> tuple[float, bool]:
        """Those of a table: "embedding", "position" or "relative"."""
        return (self.position if kind == "position" and self.position is not None else self.std), self.truncated


@dataclass(frozen=True, kw_only=True)
class FanInInitialSpec(Spec):
    """N(0, factor^2 / fan_in) for matrices. Queries whose scores are not divided by sqrt(head_dim) have that in their
    deviation: (d head_dim)^-0.5 in T5 (arXiv:1910.10683, its code)."""

    factor: float = 1.0  # `initializer_factor` in config.json; sqrt(0.1) in Switch (arXiv:2101.03961, section 2.4)
    embedding: float = 1.0  # T5, PaLM (arXiv:2204.02311, section 5)
    relative: float = 0.02  # of a bias for each distance: width^-0.5 in T5
    truncated: bool = False  # a matrix has nothing beyond twice its deviation: Switch

    def check(self) -> None:
        _positive(self, "factor", "embedding", "relative")

    def matrix(self, fan_in: int, *, residual: bool = False, gain: float = 1.0) -> tuple[float, bool]:
        """The deviation of a matrix of `fan_in` inputs, times `gain`, and whether it is truncated."""
        return self.factor * fan_in**-0.5 * gain, self.truncated

    def table(self, kind: str) -> tuple[float, bool]:
        """Those of a table: "embedding", "position" or "relative"; tables are never truncated."""
        return (self.relative if kind == "relative" else self.embedding), False


InitialSpec = NormalInitialSpec | FanInInitialSpec


def _positive(spec: Spec, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value is not None and value < 0:
            raise LaminaError(f"{type(spec).__name__}.{name} is {value}; a deviation is at least 0")


class Draw:
    """What `initialise(draw)` of a layer fills its weights with. `model` says which weights end in the residual stream
    (`SHARD`), and which queries make up for scores that are not scaled (`gains`)."""

    def __init__(
        self, generator: torch.Generator, spec: InitialSpec | None = None, model: nn.Module | None = None
    ) -> None:
        self.generator = generator
        self.spec = NormalInitialSpec() if spec is None else spec
        self._residual: set[int] = set()
        self._gains: dict[int, float] = {}
        for module in () if model is None else model.modules():
            for name, role in getattr(module, "SHARD", {}).items():
                part = getattr(module, name)
                if role in ("in", "experts.in") and isinstance(part, nn.Module):
                    self._residual.add(id(part.weight))
            gains = getattr(module, "gains", None)
            if gains is not None:
                self._gains |= {id(getattr(module, name).weight): gain for name, gain in gains().items()}

    def matrix(self, weight: Tensor, fan_in: int | None = None) -> None:
        """(..., out, in): what multiplies hidden states, heads and routers too. `fan_in`: other than the last size."""
        fan_in = weight.shape[-1] if fan_in is None else fan_in
        chosen = self.spec.matrix(fan_in, residual=id(weight) in self._residual, gain=self._gains.get(id(weight), 1.0))
        self.normal(weight, *chosen)

    def table(self, weight: Tensor, kind: str = "embedding") -> None:
        """Rows that are looked up: of tokens or segments; "position": of places; "relative": of distances."""
        self.normal(weight, *self.spec.table(kind))

    @torch.no_grad()
    def normal(self, weight: Tensor, std: float, truncated: bool = False) -> None:
        """N(0, std^2), whatever the spec says: for what has a published value of its own."""
        if not truncated or not std:
            nn.init.normal_(weight, std=std, generator=self.generator)
            return
        wide = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        weight.copy_(nn.init.trunc_normal_(wide, std=std, a=-2 * std, b=2 * std, generator=self.generator))
