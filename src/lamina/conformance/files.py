"""Checks of files: what is saved is read again bit for bit, and what was tied stays tied."""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lamina.conformance.report import RAISED, Row, compared, failed, judged, left_out, refused, same_bits
from lamina.conformance.subject import Subject, positions, random_ids, stored
from lamina.errors import UnsupportedError

LARGEST = 2**30  # bytes of weights beyond which nothing is written or copied


def saving(subject: Subject) -> Iterator[Row]:
    name, size = "what is saved is read again, bit for bit", stored(subject)
    if size > LARGEST:
        yield left_out(name, f"{size / 2**30:.1f} GiB of weights; up to {LARGEST / 2**30:.0f} GiB are written for this")
        return
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "saved"
        try:
            layout = subject.save(folder)
        except UnsupportedError as error:
            yield refused(name, error)
            return
        try:
            again = subject.load(folder).model
        except RAISED as error:
            yield failed(name, error)
            return
        ours, theirs = dict(subject.model.named_parameters()), dict(again.named_parameters())
        different = sum(n not in theirs or not same_bits(p, theirs[n]) for n, p in ours.items())
        yield judged(name, f"{len(ours)} parameters, {layout}", float(different + len(theirs.keys() - ours.keys())))
        different = len(_tied(subject.model) ^ _tied(again))
        yield judged("what is tied stays tied", f"{len(_tied(again))} parameters of several names", float(different))
        yield from subject.of_files(folder, again)


def _tied(model: nn.Module) -> set[frozenset[str]]:
    """Names that are one parameter."""
    names: defaultdict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def casting(subject: Subject) -> Iterator[Row]:
    """A cast to bfloat16 and back rounds weights. Whatever else it rounds (phases of RoPE) shows at far positions."""
    name, dtype = "a cast to bfloat16 rounds weights only", next(subject.model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64) or stored(subject) > LARGEST:
        large = stored(subject) > LARGEST
        yield left_out(name, f"the model is larger than {LARGEST / 2**30:.0f} GiB" if large else f"it is {dtype}")
        return
    facts = subject.facts
    ids, told, said = random_ids(subject, 1, facts.length), None, "from the first position on"
    room = min(facts.context or FAR, FAR) - facts.length
    if facts.first is not None and room > 0:
        half = facts.length // 2
        told, said = positions(subject, half, facts.length - half, gap=room), f"half of them {room} positions away"

    def read(model: nn.Module) -> list[Tensor]:
        return subject.over(model).read(ids, torch.ones_like(ids), positions=told)

    try:
        model = copy.deepcopy(subject.model)
    except (NotImplementedError, TypeError) as error:
        yield left_out(name, f"the model cannot be copied: {' '.join(str(error).split())[:100]}")
        return
    theirs = read(_rounded(model))
    del model  # one copy at a time
    ours = read(copy.deepcopy(subject.model).to(torch.bfloat16).to(dtype))
    yield compared(ours, theirs).row(name, f"{facts.length} tokens, {said}, against weights rounded by hand")


def _rounded(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
    return model


FAR = 8192  # positions
