"""Conformance: which of the properties that always hold (docs/design.md) hold for a given model.

Every property is tried on the model itself, on few random tokens. Where two ways of computing one number are compared,
they may differ by `FACTOR` units of the dtype's precision, relative to the largest number; elsewhere by nothing at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from lamina.conformance import attention, files, tokens, whole
from lamina.conformance.report import FACTOR, Report, Row
from lamina.conformance.retrieval import retrieval
from lamina.model import Model

CHECKS: tuple[Callable[[Model], Iterator[Row]], ...] = (
    whole.finite_weights,
    whole.spec_as_json,
    whole.repeated_forward,
    tokens.cached_decoding,
    tokens.padding,
    tokens.packing,
    tokens.empty_rows,
    tokens.causality,
    retrieval,
    attention.reach,
    attention.blindness,
    whole.backends,
    whole.compiled_step,
    whole.refusals,
    whole.repeated_generation,
    files.saving,
)


@torch.inference_mode()
def verify(model: Model, *, progress: Callable[[Row], None] | None = None) -> Report:
    """Try every property on `model`, in evaluation mode. `progress` is called with each row as it comes.

    A property that fails is a row of the report, and nothing is raised. The model is not changed.
    """
    clock, rows, training = time.perf_counter(), [], model.training
    model.eval()
    try:
        for check in CHECKS:
            for row in _tried(check, model):
                rows.append(row)
                if progress is not None:
                    progress(row)
    finally:
        model.train(training)
    return Report(tuple(rows), time.perf_counter() - clock)


def _tried(check: Callable[[Model], Iterator[Row]], model: Model) -> Iterator[Row]:
    """The rows of a check. What a model raises on sound input is a property that fails."""
    rows = check(model)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield Row(check.__name__.replace("_", " "), "", None, None, "fails", said)
            return
        yield row


__all__ = ["CHECKS", "FACTOR", "Report", "Row", "verify"]
