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
        self, query: Tensor, queries: Tokens, keys: Tokens, scale: float, apart: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """The query for the content term, the bias (B, H, T, S), and None: values have no term.

        apart: between which distances i - j those lie that count, where it is known; other pairs must be masked.
        """
        behind = -distance(queries, keys).expand(query.shape[0], -1, -1)  # i - j
        if apart is None:
            apart = self.apart(queries, keys)
        else:
            behind = behind.clamp(*apart)
        index = torch.arange(apart[0], apart[1] + 1, device=query.device)
        by_distance = self._terms(query + self.position[:, None], self._waves(index).to(query.dtype)) * scale
        bias = by_distance.gather(3, (behind - apart[0])[:, None].expand(-1, query.shape[1], -1, -1))
        return query + self.content[:, None], bias, None

    def apart(self, queries: Tokens, keys: Tokens) -> tuple[int, int]:
        """The smallest and the largest i - j of queries (B n, T) and keys (B, S): of spans without looking at a tensor,
        else one look at the data, since positions may have gaps. On the meta device, of tokens that count from 0."""
        if queries.span is not None and keys.span is not None:
            return queries.span[0] - keys.span[1] + 1, queries.span[1] - 1 - keys.span[0]
        query, key = queries.position, keys.position
        if query.is_meta:
            return 1 - key.shape[1], query.shape[1] - 1
        behind = query.unflatten(0, (key.shape[0], -1))[..., None] - key[:, None, None]
        return int(behind.min()), int(behind.max())

    def _terms(self, query: Tensor, waves: Tensor) -> Tensor:
        """(q_i + v) . W r for all distances: (B, H, T, D) and (distances, width) -> (B, H, T, distances).

        In whichever order takes fewer products: W r once for all queries, or, for few of them, (q_i + v) W first.
        """
        rows, size, (count, width) = query.shape[0] * query.shape[2], query.shape[3], waves.shape
        few = rows * width * (size + count) < count * size * (width + rows)
        if few and type(self.project) is nn.Linear:  # what takes its place (an adapter) has more than a weight
            return query @ self.project.weight.unflatten(0, self.content.shape) @ waves.transpose(0, 1)
        term = self.project(waves).unflatten(-1, self.content.shape)  # (distances, H, D)
        return query @ term.permute(1, 2, 0)

    def _waves(self, index: Tensor) -> Tensor:
        """[sin | cos] of signed distances (distances, width), as in the paper's code: halves, exponent 2i / width."""
        wave = self.wave(Tokens(index.abs()[None], index[None]))[0]  # interleaved sin, cos
        sin, cos = wave[:, 0::2], wave[:, 1::2]
        return torch.cat([sin * index.sign()[:, None], cos], dim=-1)

    def initialise(self, draw: Draw) -> None:
        for table in (self.content, self.position):
            draw.table(table, "relative")
        draw.matrix(self.project.weight)
