"""`lamina train`: a run from its configuration."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.output import Output, duration
from lamina.cli.program import command
from lamina.figures import size

if TYPE_CHECKING:
    from lamina.train.training import Result, Tick

EXAMPLES = """
lamina train shakespeare.yaml -o runs/first
lamina train shakespeare.yaml loop.steps=200 optimiser.rate=1e-3 --dry-run
lamina train shakespeare.yaml -o runs/first --resume auto
lamina train shakespeare.yaml -o runs/four --nproc 4 mesh.shard=4
"""


@command(EXAMPLES)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("assignments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Directory of the run.")
@click.option("--resume", default="none", show_default=True, metavar="auto|none|PATH", help="Go on from a checkpoint.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1.")
@click.option("--nproc", type=int, help="Processes on this machine; mesh says what each of them does.")
@click.option("--print", "template", metavar="slurm|sky", help="Print a job file for several machines, and do nothing.")
@click.option("--nodes", type=int, default=1, show_default=True, help="Machines, for --print.")
@click.option("--gpus", type=int, default=8, show_default=True, help="GPUs of each machine, for --print.")
@click.option("--dry-run", is_flag=True, help="Check everything, show what would be done, train nothing.")
def train(
    out: Output,
    config: Path,
    assignments: tuple[str, ...],
    output: Path | None,
    resume: str,
    device: str,
    nproc: int | None,
    template: str | None,
    nodes: int,
    gpus: int,
    dry_run: bool,
) -> None:
    """Train a model, from its initial values or from a checkpoint.

    CONFIG is a YAML file: model, data, loop, and what differs from the defaults of objective, optimiser, schedule,
    evaluation, checkpoints and log. KEY=VALUE changes a field of it. Everything of a run is kept in its directory:
    checkpoints, metrics, samples, a report to look at, and at the end the model.
    """
    from lamina.document import assign, decode, encode, read, write
    from lamina.train.specs import TrainSpec

    document = read(config)
    for assignment in assignments:
        assign(document, assignment)
    spec = decode(TrainSpec, document)
    if dry_run:
        from lamina.train.building import plan

        found = plan(spec)
        out.result({"config": encode(spec), **found}, [*write(spec).splitlines(), "", *_planned(found)])
        return
    if template is not None:
        from lamina.parallel import template as job

        text = job(template, str(config), nodes, gpus)
        out.result({"template": text}, text.splitlines())
        return
    if output is None:
        output = Path("runs") / config.stem
        out.note(f"the run is in {output}")
    if nproc is not None:
        from lamina.parallel import arguments as started

        given = ["train", str(config), *assignments, "-o", str(output), "--resume", resume, "--device", device]
        given += ["--json"] * out.as_json + ["--quiet"] * out.quiet
        argv = started(nproc, given)
        sys.stdout.flush()
        os.execv(argv[0], argv)
    if int(os.environ.get("RANK", "0")) > 0:
        out = Output(out.as_json, quiet=True, silent=True)  # the first rank speaks for all
    from lamina.train.training import train as run

    line = _Line(out)
    arguments = ["lamina", *sys.argv[1:]]
    result = run(spec, output, resume=resume, command=arguments, show=line.show, device=device)
    line.clear()
    out.result(_document(result), _said(result))
    if result.status:
        raise click.exceptions.Exit(result.status)


def _planned(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['parameters']:,} parameters, {found['trained']:,} of them trained"]
    lines.append(f"{found['examples']:,} examples; {found['steps']} steps read {found['tokens']:,} tokens at most")
    lines.append(f"{found['epochs']:.2f} times the data; {found['flops']:.3g} floating-point operations")
    return [*lines, f"about {size(found['bytes'])} for weights, gradients and the optimiser"]


def _document(result: Result) -> dict[str, Any]:
    return {
        "directory": str(result.directory),
        "step": result.step,
        "tokens": result.tokens,
        "loss": result.loss,
        "validation_loss": None if result.validation is None else result.validation.loss,
        "tokens_per_second": result.tokens_per_second,
        "seconds": result.seconds,
        "skipped": result.skipped,
        "model": None if result.model is None else str(result.model),
        "report": None if result.report is None else str(result.report),
    }


def _said(result: Result) -> list[str]:
    lines = [f"step {result.step}, {result.tokens:,} tokens in {duration(result.seconds)}"]
    if result.validation is not None:
        lines.append(f"validation loss {result.validation.loss:.4f} over {result.validation.asked:,} labels")
    if result.model is None:
        lines.append(f"stopped; go on with: lamina train ... -o {result.directory} --resume auto")
    else:
        lines.append(f"model: {result.model}")
    return [*lines, f"report: {result.report}"]


class _Line:
    """One line that is written over on a terminal; elsewhere one now and then."""

    def __init__(self, out: Output) -> None:
        self.out, self.said = out, 0.0

    def show(self, said: Tick | str) -> None:
        if isinstance(said, str):
            self.clear()
            self.out.note(said)
            return
        step = said.step
        parts = [f"step {step.step}/{said.steps}", f"loss {step.loss:.4f}", f"{said.tokens_per_second:,.0f} tokens/s"]
        if said.utilisation is not None:
            parts.append(f"{said.utilisation:.0%} of the machine")
        parts.append(f"{duration(said.left)} left")
        line = " · ".join(parts)
        if self.out.progress:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
        else:
            import time

            if time.monotonic() - self.said >= 10 or step.step in (1, said.steps):
                self.said = time.monotonic()
                self.out.note(line)

    def clear(self) -> None:
        if self.out.progress:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


command = train
