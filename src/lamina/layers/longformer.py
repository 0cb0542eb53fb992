"""Longformer's attention: a window and global tokens, which have projections of their own (arXiv:2004.05150, section
3.1): six matrices where other layers have three."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamina.attend import Request, attend, weights
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers.cached import retained, with_cache
from lamina.layers.call import Call
from lamina.layers.linear import Linear
from lamina.patterns import Causal, Everything, Pattern, Prefix, Retained, Window
from lamina.specs import Spec
from lamina.tokens import HOLE, Tokens


@dataclass(frozen=True, kw_only=True)
class LongformerSpec(Spec):
    """A token sees `window` keys on each side, itself and the marked (global) tokens, by q, k and v; a marked token
    sees everything, by global_q, global_k and global_v. Causal: only what came before, which no published model is."""

    heads: int
    head_dim: int
    window: int  # on each side, so 2 w + 1 keys: 256 in the published models, whose files say 512
    causal: bool = False
    bias: bool = True
    dropout: float = 0.0  # on the probabilities

    def check(self) -> None:
        if self.heads < 1 or self.head_dim < 1 or self.window < 1:
            raise LaminaError(
                f"heads={self.heads}, head_dim={self.head_dim} and window={self.window} must be 1 or more"
            )
        if not 0 <= self.dropout <= 1:
            raise LaminaError(f"dropout={self.dropout} must lie within 0 and 1")

    @property
    def pattern(self) -> Pattern:
        """What tokens see that are not marked."""
        if self.causal:
            return Causal() & (Window(back=self.window + 1) | Prefix())
        return Window(back=self.window + 1, ahead=self.window) | Prefix()

    @property
    def key_heads(self) -> int:
        """As many as there are heads."""
        return self.heads

    def build(self, width: int) -> Longformer:
        return Longformer(self, width)


class Longformer(nn.Module):
    """(B, T, width) -> (B, T, width)."""

    SHARD = {
        "q": "out",
        "k": "out",
        "v": "out",
        "global_q": "out",
        "global_k": "out",
        "global_v": "out",
        "o": "in",
    }

    def __init__(self, spec: LongformerSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.path = ""  # set by the model: the name of this layer's slot and records
        self.scale = spec.head_dim**-0.5
        inner = spec.heads * spec.head_dim
        self.q, self.k, self.v = (Linear(width, inner, bias=spec.bias) for _ in range(3))
        self.global_q, self.global_k, self.global_v = (Linear(width, inner, bias=spec.bias) for _ in range(3))
        self.o = Linear(inner, width, bias=spec.bias)

    def retained(self) -> Retained:
        """What a cache has to keep for this layer. Raises UnsupportedError where tokens see later ones."""
        return retained(self.path, self.spec.pattern)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        query, key, value = (self._split(project(x)) for project in (self.q, self.k, self.v))  # (B, H, T, D)
        query, key, value, queries, keys = with_cache(self.path, call, query, key, value, None, self.spec.head_dim)
        request = self._request(query, key, value, queries, keys, self.spec.pattern, call)
        out = attend(request, call.backend)  # (B, H, T, D)
        picked = self._global(call)
        if picked is not None:
            index, chosen = picked
            out = _replaced(out, index, chosen, self._widely(x, index, chosen, call))
        call.record.keep(f"{self.path}.weights", lambda: self._weights(x, request, picked, call))
        return self.o(out.transpose(1, 2).flatten(2))

    def absorbs(self, marked: int) -> bool:
        """Whether so few marked tokens in a row are better taken to the width of the model than all keys to heads."""
        return marked < self.spec.head_dim and not (self.training and self.spec.dropout)

    def _global(self, call: Call) -> tuple[Tensor, Tokens] | None:
        """(B, M) columns of the marked tokens and, as tokens, themselves; None where there are none. A row with fewer
        than M has others beside them, which count as holes."""
        tokens, name = call.tokens, ("global", id(call.tokens))
        if tokens.marked is None:
            return None
        if name in call.memo:  # an earlier layer of this forward has found them
            return call.memo[name]
        marked = tokens.marked & tokens.real
        most = 1 if marked.device.type == "meta" else int(marked.sum(dim=1).max())
        if most == 0:
            return call.memo.setdefault(name, None)
        if call.cache is not None and call.cache.length > 0:
            raise UnsupportedError(
                f"{self.path}: a marked token would see all that came before, which this cache has not kept; mark"
                " tokens of the first forward only"
            )
        index = marked.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        there = marked.gather(1, index)
        position = torch.where(there, tokens.position.gather(1, index), HOLE)
        return call.memo.setdefault(name, (index, Tokens(position, tokens.document.gather(1, index))))

    def _widely(self, x: Tensor, index: Tensor, chosen: Tokens, call: Call) -> Tensor:
        """(B, H, M, D): what the marked tokens make of all tokens."""
        some = x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
        query = self._split(self.global_q(some))
        if not self.absorbs(index.shape[1]):
            key, value = self._split(self.global_k(x)), self._split(self.global_v(x))
            return attend(self._request(query, key, value, chosen, call.tokens, self._whole, call), call.backend)
        # q . (W_k x) = (W_k^T q) . x, and sum p (W_v x) = W_v sum p x: keys and values are x itself, of all heads. The
        # bias of the keys adds the same to all scores of a query and falls out; that of the values is added once.
        heads, marked = query.shape[1:3]
        key_weight, value_weight = (self._by_head(part.weight) for part in (self.global_k, self.global_v))  # (H, D, d)
        turned = (query @ key_weight).flatten(1, 2)[:, None]  # (B, 1, H M, d)
        each = Tokens(chosen.position.repeat(1, heads), chosen.document.repeat(1, heads))
        request = self._request(turned, x[:, None], x[:, None], each, call.tokens, self._whole, call)
        mean = attend(request, call.backend)[:, 0].unflatten(1, (heads, marked))  # (B, H, M, d)
        out = mean @ value_weight.transpose(1, 2)
        bias = self.global_v.bias
        return out if bias is None else out + bias.view(heads, 1, -1)

    @property
    def _whole(self) -> Pattern:
        return Causal() if self.spec.causal else Everything()

    def _weights(self, x: Tensor, request: Request, picked: tuple[Tensor, Tokens] | None, call: Call) -> Tensor:
        """(B, H, T, S): the rows of marked tokens are those of their own projections."""
        found = weights(request)
        if picked is None:
            return found
        index, chosen = picked
        some = x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
        query, key = self._split(self.global_q(some)), self._split(self.global_k(x))
        wide = self._request(query, key, key, chosen, call.tokens, self._whole, call)
        return _replaced(found, index, chosen, weights(wide))

    def _request(
        self, query: Tensor, key: Tensor, value: Tensor, queries: Tokens, keys: Tokens, pattern: Pattern, call: Call
    ) -> Request:
        return Request(
            query=query,
            key=key,
            value=value,
            queries=queries,
            keys=keys,
            pattern=pattern,
            scale=self.scale,
            dropout=self.spec.dropout if self.training else 0.0,
            memo=call.memo,
        )

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, self.spec.head_dim))


def _replaced(out: Tensor, index: Tensor, chosen: Tokens, rows: Tensor) -> Tensor:
    """(B, H, T, D) with the rows (B, H, M, D) put in at the columns `index` (B, M), but for those of holes."""
    place = index[:, None, :, None].expand_as(rows)
    there = chosen.real[:, None, :, None]
    return out.scatter(2, place, torch.where(there, rows, out.gather(2, place)))
