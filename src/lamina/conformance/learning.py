"""Checks of training: what balances experts is there and counts no padding, and going on from files is no break."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from lamina.conformance.report import Difference, Row, gap, judged, left_out
from lamina.conformance.subject import LARGE, Subject, parameters, random_ids

STEPS, PAUSE = 4, 2


def router_losses(subject: Subject) -> Iterator[Row]:
    name, padded = "the loss of a router is in the loss", "padding is not in the loss of a router"
    ids = random_ids(subject, 2, subject.facts.length)
    with torch.enable_grad():
        found = subject.router_loss(ids)
        if isinstance(found, str):
            yield left_out(name, found)
            return
        yield judged(name, "its coefficient is not 0", float(found is None))
        mask = torch.ones_like(ids)
        mask[:, -5:] = 0
        whole, alone = (
            subject.router_loss(ids, mask, asked=True),
            subject.router_loss(ids[:, :-5].contiguous(), asked=True),
        )
    if not isinstance(whole, torch.Tensor) or not isinstance(alone, torch.Tensor):
        yield left_out(padded, "the model does not give it by itself")
        return
    worst = Difference()
    worst.add(whole.detach(), alone.detach())
    yield worst.row(padded, "2 texts, with 5 of padding on their right and without")


def going_on(subject: Subject) -> Iterator[Row]:
    name = "training that goes on from files = without a break"
    large = f"{parameters(subject):,} parameters; up to {LARGE:,} are trained for this"
    why = subject.facts.trains or (large if parameters(subject) > LARGE else "")
    if next(subject.model.parameters()).dtype == torch.float16:
        why = "float16 has no room for what an optimizer keeps"
    if why:
        yield left_out(name, why)
        return
    texts = [random_ids(subject, 1, subject.facts.length, seed=at) for at in range(STEPS)]
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(), torch.enable_grad():
        whole, paused = subject.trained(texts, PAUSE, Path(folder))
    again = dict(paused.named_parameters())
    worst = max(gap(p.detach(), again[n].detach()) for n, p in whole.named_parameters())
    yield judged(name, f"{STEPS} steps, and {PAUSE} + {STEPS - PAUSE}: every weight", worst)
