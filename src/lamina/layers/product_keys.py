"""Product-key memory: a table of n^2 values, of which each token reads the k whose keys fit it best (arXiv:1907.05242,
section 3), with Memory+ (arXiv:2412.09764, section 3) and PEER (arXiv:2407.04153, section 2) as settings.

A key is a pair of half keys, so that n + n scores stand for n^2:

    score(i, j) = q_1 c_i + q_2 d_j
    y = sum over heads and the k best (i, j) of w V[i n + j], w = softmax of the k scores

The layer stands wherever a feed-forward network stands, or as a step of its own. Each token reads for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.batch_norm import BatchNorm, BatchNormSpec
from lamina.layers.call import Call
from lamina.layers.feedforward import ACTIVATIONS, Activation
from lamina.layers.initial import Draw
from lamina.layers.linear import Linear
from lamina.layers.norm import LayerNormSpec, RMSNormSpec
from lamina.layers.parameter import parameter
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class ProductKeySpec(Spec):
    """`heads` queries of a token read `chosen` of keys^2 values each."""

    heads: int  # 4 in Lample et al. and Memory+, 8 in PEER
    keys: int  # n, of each half: 512 in Lample et al., 1024 in Memory+ and PEER
    key_dim: int  # of both halves together: 128 to 512
    chosen: int = 32  # k; 16 in PEER
    norm: BatchNormSpec | LayerNormSpec | RMSNormSpec | None = None  # of queries: BatchNormSpec in Lample et al. and
    # PEER; the others on each head; none in Memory+
    bias: bool = True  # of all matrices, as in the code of Lample et al. and Memory+
    gated: bool = False  # o (y * silu(gate x)) in place of y: Memory+
    act: Activation | None = None  # then a value is a network with one hidden feature, w act(u x) v: "gelu" in PEER
    table: str | None = None  # layers of a stack that say the same name have one table of values: Memory+

    def check(self) -> None:
        if self.heads < 1 or not 1 <= self.chosen <= self.keys:
            raise LaminaError(f"heads={self.heads} must be at least 1, chosen={self.chosen} 1 to keys={self.keys}")
        if self.key_dim < 2 or self.key_dim % 2:
            raise LaminaError(f"key_dim is {self.key_dim}; it must be even, since a key has two halves")
        if self.table is not None and not self.table.isidentifier():
            raise LaminaError(f"table is {self.table!r}; it becomes part of a parameter's name: use letters")

    def build(self, width: int) -> ProductKeys:
        return ProductKeys(self, width)


class Values(nn.Module):
    """The table: rows (n^2, width), with a second one where a row is a network. Read by index, never multiplied whole.

    A dense gradient of it has n^2 rows, whatever was read. With `sparse` it has the rows that were, and only some
    optimisers take it: `lamina.train` sets it where its own does.
    """

    def __init__(self, rows: int, width: int, act: Activation | None) -> None:
        super().__init__()
        self.act = None if act is None else ACTIVATIONS[act]
        self.up = None if act is None else parameter(rows, width)
        self.weight = parameter(rows, width)
        self.sparse = False

    def forward(self, index: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        """Rows by number (N, R), their weights (N, R), and what networks read (N, width) -> (N, width)."""
        if self.up is not None and self.act is not None:
            read = F.embedding(index, self.up, sparse=self.sparse)  # (N, R, width)
            weights = weights * self.act((read @ x[:, :, None])[..., 0])
        return F.embedding_bag(index, self.weight, per_sample_weights=weights, mode="sum", sparse=self.sparse)

    def idle(self) -> int:
        """Parameters that no token uses by itself: layers count those that they read."""
        return sum(part.numel() for part in self.parameters())

    def initialise(self, draw: Draw) -> None:
        for part in self.parameters():
            draw.normal(part, part.shape[1] ** -0.5)  # as published


class ProductKeys(nn.Module):
    """(B, T, width) -> (B, T, width)."""

    SHARD: dict[str, str] = {}  # every rank reads the whole table for the same tokens; FSDP divides it

    def __init__(self, spec: ProductKeySpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.path = ""
        self.query = Linear(width, spec.heads * spec.key_dim, bias=spec.bias)
        each = spec.heads * spec.key_dim if isinstance(spec.norm, BatchNormSpec) else spec.key_dim
        self.norm = None if spec.norm is None else spec.norm.build(each)
        self.keys = parameter(spec.heads, 2, spec.keys, spec.key_dim // 2)
        self.values: Values | None = Values(spec.keys**2, width, spec.act)
        self.elsewhere: list[Values] = []  # the table, where the stack has it: no part of this module
        self.gate = Linear(width, width, bias=spec.bias) if spec.gated else None
        self.output = Linear(width, width, bias=spec.bias) if spec.gated else None

    @property
    def table(self) -> Values:
        """The values, wherever they are."""
        return self.elsewhere[0] if self.values is None else self.values

    def read_from(self, table: Values) -> None:
        """Give the own table up for one that another module has."""
        self.values, self.elsewhere = None, [table]

    def forward(self, x: Tensor, call: Call) -> Tensor:
        spec = self.spec
        query = self._normed(self.query(x), call).unflatten(-1, (spec.heads, 2, -1))  # (B, T, H, 2, D / 2)
        scores = torch.einsum("bthcd,hcnd->cbthn", query, self.keys)
        best, index = best_sums(scores[0], scores[1], spec.chosen)  # (B, T, H, k)
        weights = best.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).to(x.dtype)
        call.record.keep(f"{self.path}.chosen", lambda: index)
        call.record.keep(f"{self.path}.shares", lambda: weights)
        rows = (each.flatten(0, 1).flatten(1) for each in (index, weights))  # (B T, H k)
        y = self.table(*rows, x.flatten(0, 1)).view_as(x)
        return y if self.gate is None or self.output is None else self.output(y * F.silu(self.gate(x)))

    def _normed(self, query: Tensor, call: Call) -> Tensor:
        """(B, T, H D)."""
        if self.norm is None:
            return query
        if isinstance(self.norm, BatchNorm):
            return self.norm(query, call)
        return self.norm(query.unflatten(-1, (-1, self.spec.key_dim))).flatten(-2)

    def idle(self) -> int:
        """Minus the parameters of the table that a token reads: the table counts all of them as idle."""
        table = self.table
        return -min(self.spec.heads * self.spec.chosen, len(table.weight)) * (table.idle() // len(table.weight))

    def initialise(self, draw: Draw) -> None:
        bound = (self.spec.key_dim // 2) ** -0.5  # as published
        nn.init.uniform_(self.keys, -bound, bound, generator=draw.generator)


class Tables(nn.ModuleDict):
    """The tables of values that layers of a stack share, by name."""


def share_tables(layers: nn.Module) -> Tables | None:
    """Take the tables that layers share out of them: the first layer that says a name gives its own."""
    tables: dict[str, nn.Module] = {}
    for module in list(layers.modules()):
        if isinstance(module, ProductKeys) and module.spec.table is not None:
            table = tables.setdefault(module.spec.table, module.table)
            assert isinstance(table, Values)
            module.read_from(table)
    return Tables(tables) if tables else None


def check_tables(stack: Spec) -> None:
    """Raise LaminaError where layers of a stack share a table and differ in what it is."""
    first: dict[str, ProductKeySpec] = {}
    for path, part in stack.walk():
        if isinstance(part, ProductKeySpec) and part.table is not None:
            other = first.setdefault(part.table, part)
            if (other.keys, other.act) != (part.keys, part.act):
                raise LaminaError(
                    f"{path}: the table {part.table!r} has keys={part.keys}, act={part.act} here and"
                    f" keys={other.keys}, act={other.act} in a layer before; layers that share one agree in both"
                )


def best_sums(first: Tensor, second: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """The k largest of all sums first_i + second_j, (..., n) each, and their numbers i n + j: (..., k), falling.

    Exact. Where i is not among the k best of `first`, k others are at least as good with any j; so both are among the
    k best. Of those, with ranks from 0, the pair (r, s) has (r + 1)(s + 1) - 1 pairs before it: one for which
    (r + 1)(s + 1) > k is not needed, which leaves 119 of 32 x 32. Among equal sums any may be taken.
    """
    (a, i), (b, j) = best(first, chosen), best(second, chosen)
    left, right = (torch.tensor(ranks, device=first.device) for ranks in _pairs(chosen))
    value, at = (a[..., left] + b[..., right]).topk(chosen, dim=-1)
    return value, i.gather(-1, left[at]) * second.shape[-1] + j.gather(-1, right[at])


@cache
def _pairs(chosen: int) -> tuple[list[int], list[int]]:
    pairs = [(r, s) for r in range(chosen) for s in range(chosen // (r + 1))]
    return [r for r, _ in pairs], [s for _, s in pairs]


def best(scores: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """The k largest of (..., n) and their places: (..., k), falling.

    Where n is large, first the k groups with the largest members are found, then the k largest of those groups: exact,
    since each of the k largest is in a group whose largest is at least that. With n = 1024 and k = 32 the groups are of
    8, and the search is in 128 numbers, then in 256 and so, with groups of 2, in 128 and 64: it takes 0.6 of the time.
    """
    size = 1
    while scores.shape[-1] % (2 * size) == 0 and scores.shape[-1] // (2 * size) >= 4 * chosen:
        size *= 2
    if size == 1:
        return scores.topk(chosen, dim=-1)
    groups = scores.unflatten(-1, (size, -1))  # (..., size, n / size): place p is in group p mod n / size
    group = groups.amax(-2).topk(chosen, dim=-1, sorted=False).indices  # (..., k)
    inside = groups.gather(-1, group[..., None, :].expand(*groups.shape[:-1], chosen)).flatten(-2)  # (..., size k)
    value, at = best(inside, chosen)
    return value, at // chosen * groups.shape[-1] + group.gather(-1, at % chosen)
