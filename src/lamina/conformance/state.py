"""Checks of what a forward leaves behind, and of who is watching: nothing may change what the next one gives."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lamina.conformance.report import Row, compared, gap, judged, left_out
from lamina.conformance.subject import LONGEST, Subject, long, parameters, random_ids


def finite_weights(subject: Subject) -> Iterator[Row]:
    bad: dict[str, int] = {}
    for name, tensor in (*subject.model.named_parameters(), *subject.model.named_buffers()):
        # The sum is finite unless a number is not, or it overflows: only then is every number looked at.
        suspect = tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float64)))
        if suspect and (count := int((~torch.isfinite(tensor)).sum())):
            bad[name] = count
    said = f"every number of {sum(1 for _ in subject.model.parameters())} tensors"
    note = ", ".join(f"{name} has {count} that are NaN or infinite" for name, count in list(bad.items())[:3])
    yield judged("weights are finite", said, float(sum(bad.values())), note=note)


def memoryless(subject: Subject) -> Iterator[Row]:
    """The first check of all: what sticks is there from the first short text on."""
    facts = subject.facts
    ids = random_ids(subject, 1, long(facts, parameters(subject)))
    first, tried = subject.read(ids), ["3"]
    subject.read(random_ids(subject, 2, 3, seed=3))
    worst = max(gap(a, b) for a, b in zip(first, subject.read(ids), strict=True))
    if facts.context is not None and facts.context <= LONGEST:
        try:
            subject.read(random_ids(subject, 1, facts.context + 8))
        except (IndexError, RuntimeError, ValueError):
            pass  # there are no places for more
        else:
            tried.append(f"{facts.context + 8}")
            worst = max(worst, *(gap(a, b) for a, b in zip(first, subject.read(ids), strict=True)))
    said = f"{ids.shape[1]} tokens again, after {' and '.join(tried)} others"
    yield judged("a text read before changes nothing", said, worst)


def repeated_forward(subject: Subject) -> Iterator[Row]:
    ids = random_ids(subject, 2, subject.facts.length)
    first, second = subject.read(ids), subject.read(ids)
    worst = max(gap(a, b) for a, b in zip(first, second, strict=True))
    yield judged("the same input gives the same bits", "two forwards", worst)
    recorded, shown, layers = subject.attention(ids)
    worst = max(gap(a, b) for a, b in zip(first, recorded, strict=False))
    yield judged("recording changes no bit", "a forward that records everything, and one that records nothing", worst)
    name, given = "attention that is asked for is given", [weights for weights in shown if weights is not None]
    if not layers:
        yield left_out(name, "no layer has any")
    else:
        said = f"{len(given)} of {layers} layers, whatever computes it"
        yield judged(name, said, float(max(layers - len(given), 0)))


def backends(subject: Subject) -> Iterator[Row]:
    facts = subject.facts
    if not facts.backends:
        yield left_out("backends agree", "there is one")
        return
    ids = random_ids(subject, 2, facts.length)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    oracle = subject.read(ids, mask, backend=facts.backends[0])
    for backend in facts.backends[1:]:
        try:
            out = subject.read(ids, mask, backend=backend)
        except ValueError as error:
            verdict = "holds" if repr(backend) in str(error) else "fails"
            yield Row("a backend that cannot refuses by name", str(backend), None, None, verdict, str(error))
            continue
        real = mask.bool()
        worst = compared((each[real] for each in out), (each[real] for each in oracle))
        yield worst.row("backends agree", f"{backend or 'what is chosen by itself'} and {facts.backends[0]}")
