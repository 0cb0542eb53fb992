"""Relative positions inside the scores: Shaw's clipped vectors and Transformer-XL's four terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.bias import distance
from lamina.layers.initial import Draw
from lamina.layers.parameter import parameter
from lamina.layers.positions import SinusoidalPosition, SinusoidalPositionSpec
from lamina.specs import Spec
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class ShawSpec(Spec):
    """z_ij = q_i . (k_j + a_c) scale, o_i = sum A_ij (v_j + b_c), c = clip(j - i) (arXiv:1803.02155, section 3.2)."""

    clip: int  # distances beyond it share a vector
    values: bool = True  # whether values have their own vectors b

    def check(self) -> None:
        if self.clip < 0:
            raise LaminaError(f"ShawSpec.clip is {self.clip}; it must be at least 0")

    def build(self, width: int, heads: int, size: int) -> Shaw:
        return Shaw(self, size)


@dataclass(frozen=True, kw_only=True)
class TransformerXLSpec(Spec):
    """z_ij = ((q_i + u) . k_j + (q_i + v) . W r_(i - j)) scale, r sinusoidal (arXiv:1901.02860, section 3.3)."""

    base: float = 10_000.0

    def build(self, width: int, heads: int, size: int) -> TransformerXL:
        return TransformerXL(self, width, heads, size)


class Shaw(nn.Module):
    """Vectors for the distances -clip, ..., clip, shared by the heads of the layer."""

    def __init__(self, spec: ShawSpec, size: int) -> None:
        super().__init__()
        self.clip = spec.clip
        self.key = parameter(2 * spec.clip + 1, size)
        self.value = parameter(2 * spec.clip + 1, size) if spec.values else None

    def forward(
        self, query: Tensor, queries: Tokens, keys: Tokens, scale: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """The query for the content term, the bias (B, H, T, S), and the table and buckets of the value term."""
        index = distance(queries, keys).clamp(-self.clip, self.clip) + self.clip  # (B or 1, T, S)
        index = index.expand(query.shape[0], -1, -1)
        by_bucket = query @ self.key.transpose(0, 1) * scale  # (B, H, T, 2 clip + 1)
        bias = by_bucket.gather(3, index[:, None].expand(-1, query.shape[1], -1, -1))
        return query, bias, None if self.value is None else (self.value, index)

    def initialise(self, draw: Draw) -> None:
        for table in (self.key, self.value):
            if table is not None:
                draw.table(table, "relative")


class TransformerXL(nn.Module):
    """The position term of the scores, gathered by distance instead of by the paper's shift."""

    SHARD = {"project": "out", "content": "out", "position": "out"}

    def __init__(self, spec: TransformerXLSpec, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.wave = SinusoidalPosition(SinusoidalPositionSpec(order="interleaved", base=spec.base), width)
        self.project = nn.Linear(width, heads * size, bias=False)
        self.content = parameter(heads, size)  # u
        self.position = parameter(heads, size)  # v

    def forward(
        self, query: Tensor, queries: Tokens, keys: Tokens, scale: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """The query for the content term, the bias (B, H, T, S), and None: values have no term."""
        behind = -distance(queries, keys).expand(query.shape[0], -1, -1)  # i - j
        reach = int(behind.abs().max())  # one look at the data: positions may have gaps
        index = torch.arange(-reach, reach + 1, device=query.device)
        term = self.project(self._waves(index).to(query.dtype)).unflatten(-1, self.content.shape)  # (distances, H, D)
        by_distance = (query + self.position[:, None]) @ term.permute(1, 2, 0) * scale  # (B, H, T, distances)
        bias = by_distance.gather(3, (behind + reach)[:, None].expand(-1, query.shape[1], -1, -1))
        return query + self.content[:, None], bias, None

    def _waves(self, index: Tensor) -> Tensor:
        """[sin | cos] of signed distances (distances, width), as in the paper's code: halves, exponent 2i / width."""
        wave = self.wave(Tokens(index.abs()[None], index[None]))[0]  # interleaved sin, cos
        sin, cos = wave[:, 0::2], wave[:, 1::2]
        return torch.cat([sin * index.sign()[:, None], cos], dim=-1)

    def initialise(self, draw: Draw) -> None:
        for table in (self.content, self.position):
            draw.table(table, "relative")
        draw.matrix(self.project.weight)
