"""`lamina convert`: read a model and write it in another layout, dtype or sharding."""

from __future__ import annotations

import re
from pathlib import Path

import click

from lamina.cli.output import Output
from lamina.cli.program import command
from lamina.figures import size

EXAMPLES = """
lamina convert smollm2-135m ./smollm2
lamina convert ./model ./model-bf16 --dtype bfloat16 --shard-size 2GB
lamina convert ./model ./model-native --format native
lamina convert ./model ./model.gguf --dtype q8_0
lamina convert ./model ./model-tuned --adapter ./adapter
"""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


LAYOUTS = ("hf", "auto_map", "native")
STORED = ("q8_0",)
"""Types of a GGUF file beside those of weights."""


class Size(click.ParamType[int]):
    """A number of bytes: 5GB, 500 MiB, 1000000."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(value).upper())
        found = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
        if found < 1:
            self.fail(f"{value!r} is no size; write 5GB, 500MiB or a number of bytes", param, ctx)
        return found


@command(EXAMPLES)
@click.argument("source")
@click.argument("directory", type=click.Path())
@click.option(
    "--format", "layout", type=click.Choice((*LAYOUTS, "gguf")), help="Layout. [default: the first that can say it]"
)
@click.option("--dtype", help="Of the weights; q8_0 in GGUF too. [default: as stored]")
@click.option("--shard-size", type=Size(), default="5GB", show_default=True, help="Largest file of weights.")
@click.option("--adapter", metavar="PATH", help="A LoRA that peft wrote, merged into the weights.")
@click.option("--force", is_flag=True, help="Replace DIRECTORY; the old one stays whole until the new one is.")
@click.option("--allow-missing", is_flag=True, help="Initialise parameters that the source lacks, and list them.")
@click.option("--allow-unexpected", is_flag=True, help="Leave out tensors that the model has no place for.")
def convert(
    out: Output,
    source: str,
    directory: str,
    layout: str | None,
    dtype: str | None,
    shard_size: int,
    adapter: str | None,
    force: bool,
    allow_missing: bool,
    allow_unexpected: bool,
) -> None:
    """Read SOURCE and write it into DIRECTORY.

    hf: transformers' from_pretrained opens it as it is. auto_map: with trust_remote_code=True, for models that no
    architecture of transformers says. native: spec.json and our own names, which can say every model. gguf: one file,
    of the LLaMAs, and what a DIRECTORY is taken for that ends in .gguf.
    """
    import torch

    from lamina import exporting
    from lamina.errors import LaminaError
    from lamina.source import load, save

    target = Path(directory)
    layout = "gguf" if layout is None and target.suffix == ".gguf" else layout
    quantised = layout == "gguf" and dtype in STORED
    if target.is_file() and layout != "gguf":
        raise LaminaError(f"{directory} is a file, and a directory is to be written")
    if target.exists() and not force:
        raise LaminaError(f"{directory} is there already; choose another directory, or replace it with --force")
    out.note(f"reading {source}")
    with torch.no_grad():
        model = load(
            source,
            dtype="float32" if quantised else dtype,
            adapter=adapter,
            allow_missing=allow_missing,
            allow_unexpected=allow_unexpected,
        )
    initialised = list(model.origin.initialised)
    layout = layout or exporting.layout(model.spec, model.origin.family)
    out.note(f"writing {directory}")
    if quantised:
        exporting.write_gguf(model, target, "Q8_0", force=force)
    else:
        save(model, target, layout, force=force, shard_size=shard_size)
    paths = [target] if target.is_file() else [path for path in sorted(target.rglob("*")) if path.is_file()]
    files = {
        str(path.relative_to(target.parent if target.is_file() else target)): path.stat().st_size for path in paths
    }
    dtypes = (
        ["q8_0"]
        if quantised
        else sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    )
    document = {
        "source": source,
        "directory": directory,
        "format": layout,
        "dtypes": dtypes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(files.values()),
        "files": [{"name": name, "bytes": count} for name, count in files.items()],
        "initialised": initialised,
    }
    shown = [str(path) for path in paths]
    wide = max(map(len, shown))
    lines = [f"{path.ljust(wide)}  {size(count)}" for path, count in zip(shown, files.values(), strict=True)]
    lines += [f"initialised, because {source} lacks it: {name}" for name in initialised]
    out.result(document, lines)


command = convert
