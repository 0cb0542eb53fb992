"""Context parallelism: each rank has a part of every text, and attention gathers the keys and values of all
(Llama 3, arXiv:2407.21783, section 3.3.2).

Keys carry their tokens, so a rank that attends to gathered keys asks the same masks as ever. To a layer the gathering
is a cache: new keys go in, all keys come out. Texts are cut in zig-zag order, so that under a causal mask all ranks
have about as much to do: of 2 n chunks rank r has the chunks r and 2 n - 1 - r. With 2 ranks and 8 tokens rank 0 has
0 1 6 7, and rank 1 has 2 3 4 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import UnsupportedError
from lamina.layers import Call, Stack
from lamina.parallel.collectives import gather
from lamina.tokens import HOLE, Tokens


@dataclass(frozen=True)
class Cut:
    """Who has which tokens of a text."""

    rank: int
    size: int

    def order(self, length: int, device: torch.device) -> Tensor:
        """(size * L,) columns in the order of the ranks, L of each; columns from `length` on are filled in."""
        chunk = max(1, -(-length // (2 * self.size)))
        chunks = torch.arange(2 * self.size * chunk, device=device).view(2 * self.size, chunk)
        return torch.cat([chunks[[rank, -1 - rank]] for rank in range(self.size)]).flatten()

    def mine(self, x: Tensor, fill: float = 0) -> Tensor:
        """(B, T, ...) -> (B, L, ...): this rank's columns."""
        return self.ordered(x, fill).chunk(self.size, dim=1)[self.rank]

    def ordered(self, x: Tensor, fill: float = 0) -> Tensor:
        """(B, T, ...) -> (B, size * L, ...): the columns of all ranks, one rank after the other."""
        order = self.order(x.shape[1], x.device)
        padding = [0, 0] * (x.dim() - 2) + [0, len(order) - x.shape[1]]
        return F.pad(x, padding, value=fill).index_select(1, order)

    def tokens(self, tokens: Tokens) -> tuple[Tokens, Tokens]:
        """This rank's tokens, and those of all ranks in their order."""
        marked = None if tokens.marked is None else self.ordered(tokens.marked.to(torch.int8)).bool()
        full = Tokens(self.ordered(tokens.position, HOLE), self.ordered(tokens.document), marked)
        parts = [
            None if x is None else x.chunk(self.size, 1)[self.rank] for x in (full.position, full.document, marked)
        ]
        return Tokens(*parts), full  # pyright: ignore[reportArgumentType]


class Gathering:
    """What layers take for a cache during one forward of a stack: whatever goes in, all ranks' keys come out."""

    length = 0  # tokens that came before: none
    late = False  # keys are turned by their own positions

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.full: dict[int, tuple[Tokens, Tokens]] = {}  # by id of a rank's tokens, which lie beside it to stay alive

    def slot(self, path: str) -> Gathering:
        """Every layer's slot is this."""
        return self

    def find(self, path: str) -> Gathering | None:
        """Where something is kept for gradients alone there is nothing to gather without them."""
        return self if torch.is_grad_enabled() else None

    def extend(self, key: Tensor, value: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tokens]:
        """Keys (B, G, L, D) and values of this rank -> those of all ranks (B, G, size L, D), and whose they are."""
        if key.shape[:-1] == value.shape[:-1]:  # one gather in place of two
            both = gather(torch.cat([key, value], dim=-1), 2, self.group, summed=True)
            key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        else:  # differential attention has values of two heads in one
            key, value = (gather(x, 2, self.group, summed=True) for x in (key, value))
        return key, value, self.full[id(tokens)][1]


def cut_texts(model: nn.Module, cut: Cut, group: dist.ProcessGroup) -> None:
    """Have every stack of the model cut what comes in. The model reads whole texts, and gives what this rank has."""

    def begin(stack: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, call, *segments = args
        return (cut.mine(x), _cut(call, cut, group), *(None if one is None else cut.mine(one) for one in segments))

    def refuse(model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        for name in ("cache", "keep_logits", "encoder_output"):
            if given.get(name) is not None and not (name == "keep_logits" and given[name] == 0):
                raise UnsupportedError(f"{name} is for whole texts; this model lies on several ranks by context")

    for module in model.modules():
        if isinstance(module, Stack):
            module.register_forward_pre_hook(begin)
    model.register_forward_pre_hook(refuse, with_kwargs=True)


def _cut(call: Call, cut: Cut, group: dist.ProcessGroup) -> Call:
    gathering = Gathering(group)
    tokens, full = cut.tokens(call.tokens)
    gathering.full[id(tokens)] = (tokens, full)
    if call.memory_tokens is not None:  # of the whole source, of which this rank has a part
        gathering.full[id(call.memory_tokens)] = (call.memory_tokens, cut.tokens(call.memory_tokens)[1])
    return replace(call, tokens=tokens, cache=gathering)  # pyright: ignore[reportArgumentType]
