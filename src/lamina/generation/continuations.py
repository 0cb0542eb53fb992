"""How likely continuations are: many pairs of a context and what follows it, read in batches of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lamina.errors import LaminaError
from lamina.generation.perplexity import check_ids, check_predicts, predicted
from lamina.model import Model

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Continuation:
    """What a model finds of one pair."""

    index: int  # of the pair
    log_probability: float  # of all its tokens, given the context: in nats
    greedy: bool  # whether greedy decoding writes it


def continuations(model: Model, pairs: Sequence[Pair], *, batch: int = 1) -> Iterator[Continuation]:
    """How likely each continuation is after its context: `pairs` of ids, neither of them empty. The longest come first.

    `batch` rows are read at once, padded on the right. Pairs that differ in their last token alone are one row: the
    answers A, B, C and D of a question cost as much as one. Example: ([1, 2], [3]) and ([1, 2], [4]) read 1 2 once.
    Raises LaminaError for empty parts, and for pairs longer than the model reads (the last token is not read).
    """
    check_predicts(model.spec, "continuations have no probability")
    if type(batch) is not int or batch < 1:
        raise LaminaError(f"batch is {batch!r}; it must be a whole number of at least 1")
    context = model.spec.context
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, (before, after) in enumerate(pairs):
        if not before or not after:
            raise LaminaError(
                f"pair {index} has a context of {len(before)} tokens and {len(after)} after it; both need one"
            )
        row = (*before, *after[:-1])
        if context is not None and len(row) > context:
            raise LaminaError(
                f"pair {index} has {len(row) + 1} tokens; this model reads {context}, and predicts one more"
            )
        check_ids(model, (*row, after[-1]))
        rows.setdefault(row, []).append(index)
    order = sorted(rows, key=len, reverse=True)
    for start in range(0, len(order), batch):
        read = order[start : start + batch]
        asked = [(row, index) for row, ids in enumerate(read) for index in rows[ids]]
        yield from _scored(model, read, [(row, index, pairs[index][1]) for row, index in asked])


@torch.inference_mode()
def _scored(
    model: Model, rows: list[tuple[int, ...]], asked: list[tuple[int, int, Sequence[int]]]
) -> list[Continuation]:
    """The continuations (row, index, ids) of rows that are read at once."""
    device = model.embedding.weight.device
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths], device=device)
    padded = min(lengths) < longest
    hidden = model(ids, mask if padded else None, keep_logits=0).hidden  # (B, T, width)
    sizes = [len(after) for _, _, after in asked]
    before = [hidden[row, lengths[row] - size : lengths[row]] for (row, _, _), size in zip(asked, sizes, strict=True)]
    target = torch.tensor([token for _, _, after in asked for token in after], device=device)
    likelihoods, greedy = predicted(model, torch.cat(before), target)
    parts = zip(asked, likelihoods.double().cpu().split(sizes), greedy.cpu().split(sizes), strict=True)
    return [Continuation(index, float(each.sum()), bool(best.all())) for (_, index, _), each, best in parts]
