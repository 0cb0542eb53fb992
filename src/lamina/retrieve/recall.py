"""How many of the nearest rows an index finds: recall, measured on the database's own vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lamina.retrieve.store import BLOCK, Found, Store, checked, joined, nearest

NEAREST = 10
SAMPLE = 512  # rows that are looked for
GOAL = 0.95


def recall(found: Found, exact: Found) -> float:
    """The part of the nearest that was found; 1 where there is nothing to find.

    What lies as near as the last of the nearest is right too, whichever of several equal texts it is, so distances are
    compared (to 1 part in 10,000, as engines round in their own ways).
    """
    wanted = (exact.rows >= 0).sum(1)  # (n,)
    last = exact.distances.masked_fill(exact.rows < 0, -1).amax(1, keepdim=True)
    hits = ((found.rows >= 0) & (found.distances <= last * 1.0001 + 1e-6)).sum(1).minimum(wanted)
    return float(hits.sum() / wanted.sum()) if bool(wanted.any()) else 1.0


def exactly(store: Store, queries: Tensor, count: int, exclude: Tensor | None = None) -> Found:
    """Every row compared, whatever the engine: what the others are measured by. A block is read at a time."""
    parts: list[Found] = []
    for some, spans in checked(queries, store.width, count, exclude):
        blocks = ((at, rows, rows.square().sum(1)) for at, rows in _blocks(store))
        parts.append(nearest(blocks, some, count, spans))
    return joined(parts, count)


def _blocks(store: Store):
    for start in range(0, store.rows, BLOCK):
        yield start, store.vectors(torch.arange(start, min(start + BLOCK, store.rows)))


def sampled(store: Store, count: int = SAMPLE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors (n, width) of some rows, and the spans (n, 1, 2) that keep each from finding itself."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(store.rows, generator=generator)[:count].sort().values
    return store.vectors(rows), torch.stack([rows, rows + 1], dim=1)[:, None]


def fewest(try_with: Callable[[int], Found], exact: Found, most: int, goal: float = GOAL) -> tuple[int, float]:
    """Probes whose recall reaches `goal`, about an eighth more than the fewest, and that recall; else `most`."""
    probes = 1
    while (reached := recall(try_with(probes), exact)) < goal and probes < most:
        probes = min(2 * probes, most)
    fewer = probes // 2
    while reached >= goal and probes - fewer > max(1, probes // 8):
        middle = (fewer + probes) // 2
        found = recall(try_with(middle), exact)
        if found >= goal:
            probes, reached = middle, found
        else:
            fewer = middle
    return probes, reached
