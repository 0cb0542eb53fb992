"""Adapters of checkpoints: peft's folders, in the names that the model's family has for its layers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from lamina.adapters import Place, peft, places
from lamina.errors import CheckpointError, LaminaError
from lamina.exporting import exportable
from lamina.families import Family
from lamina.locate import locate
from lamina.model import Model
from lamina.opening import Origin


def read_adapter(model: Model, source: str | os.PathLike[str]) -> list[tuple[str, nn.Parameter]]:
    """Attach the LoRA that peft wrote into a directory, or hf:owner/name, and return its parameters.

    `lamina.adapters.merge` then folds it into the weights, `detach` takes it off. Raises CheckpointError naming what in
    the files is not for this model.
    """
    located = locate(source)
    if located.kind != "directory":
        raise LaminaError(f"{located.name} is no adapter; a directory with {peft.CONFIG} is needed")
    if not (located.path / peft.CONFIG).is_file():
        raise CheckpointError(f"{located.path}: holds no {peft.CONFIG}, so it is no adapter of peft")
    family = _family(model)
    table = table_of(model)
    return peft.read(model, located.path, table, named=_named(family, table), source=_source(model))


def write_adapter(
    model: Model,
    directory: str | os.PathLike[str],
    *,
    values: Mapping[str, Tensor] | None = None,
    force: bool = False,
) -> None:
    """Write the adapter that is attached to `model` into a directory that peft opens over the same model.

    values: what stands for its parameters of these names. Raises LaminaError where there is no adapter,
    UnsupportedError where the Hugging Face layout has no name for the model, CheckpointError where the directory
    exists (unless `force`).
    """
    bare = model.spec.head is None and model.spec.labels is None
    base = _family(model).base if bare else ""
    peft.write(
        model,
        directory,
        table_of(model),
        called=lambda name: name.removeprefix(base),
        source=_source(model),
        task=_task(model),
        values=values,
        force=force,
    )


def table_of(model: Model) -> tuple[Place, ...]:
    """What the Hugging Face layout calls each linear layer. Raises UnsupportedError where it cannot say the model."""
    return places(model, _family(model).rules(model.spec))


def _family(model: Model) -> Family:
    origin: Origin | None = model.origin
    return exportable(model.spec)[0] if origin is None or origin.family is None else origin.family


def _named(family: Family, table: tuple[Place, ...]) -> Callable[[str], str]:
    """From the names of a file, old or without the prefix of the base, to those of the table."""
    known = {place.theirs for place in table}

    def named(name: str) -> str:
        for old, new in family.renamed:
            name = re.sub(old, new, name)
        return name if name.removesuffix(".weight") in known else f"{family.base}{name}"

    return named


def _source(model: Model) -> str | None:
    return None if model.origin is None else model.origin.located.name.removeprefix("hf:")


def _task(model: Model) -> str | None:
    """peft's name of what the model is for; None where peft would add layers of its own for it."""
    if model.head is None or model.decoder is None or model.labels is not None:
        return None
    return "SEQ_2_SEQ_LM" if model.spec.two_stacks else "CAUSAL_LM"
