"""Tasks of the harness put to a SOURCE, without its command: what `lamina evaluate --tasks` does."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lamina.errors import LaminaError
from lamina.harness import missing, register


@dataclass(frozen=True)
class Figure:
    """One metric of one task."""

    task: str
    metric: str
    filter: str  # what was done to the answers before; "none" where nothing was
    value: float | None  # None where it is no number: infinite, or of a group that has none
    error: float | None  # standard error; None where the harness estimates none
    samples: int
    shots: int | None  # examples before each question; None for a group of tasks


def run(
    source: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    include: str | os.PathLike[str] | None = None,
    **model_args: Any,
) -> list[Figure]:
    """The figures of `tasks`, names or patterns of the harness, for `source`; `model_args` are HarnessModel's.

    limit: questions of each task. shots: examples before each; None: as the task says. chat: by the chat template.
    include: a directory with tasks of one's own. Raises UnsupportedError where the harness is not installed, and
    LaminaError for tasks that it does not know or whose data are not here.
    """
    register()
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        from lamina.harness.model import HarnessModel
    except ModuleNotFoundError as error:
        raise missing(error) from None
    manager = TaskManager(include_path=None if include is None else str(include))
    names = [name for task in tasks for name in _matching(manager, task)]
    model = HarnessModel(source, **model_args)
    try:
        found = simple_evaluate(
            model,
            tasks=list(dict.fromkeys(names)),
            task_manager=manager,
            limit=limit,
            num_fewshot=shots,
            apply_chat_template=chat,
            log_samples=False,
        )
    except (ConnectionError, FileNotFoundError) as error:  # the data sets of tasks are read here
        raise LaminaError(f"{', '.join(tasks)}: {' '.join(str(error).split())[:300]}") from None
    return figures(found)


def _matching(manager: Any, task: str) -> list[str]:
    names = manager.match_tasks([task])
    if not names:
        raise LaminaError(f"the harness has no task {task!r}; python -m lamina.harness ls tasks lists them")
    return names


def figures(found: dict[str, Any]) -> list[Figure]:
    """The rows of what `simple_evaluate` returns, whose keys are `metric,filter` and `metric_stderr,filter`."""
    rows = []
    for task, values in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {}).get("effective", values.get("sample_len", 0))
        for key, value in values.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = _number(values.get(f"{metric}_stderr,{filter}"))
            shots = found.get("n-shot", {}).get(task)
            rows.append(Figure(task, metric, filter, _number(value), error, samples, shots))
    return rows


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
