"""`lamina runs`: past training runs, from their directories: list, show, compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.output import Output, bullets, heading, table
from lamina.cli.program import command
from lamina.cli.prompts import shown as safe
from lamina.figures import short, size

if TYPE_CHECKING:
    from lamina.train.past import Past

EXAMPLES = """
lamina runs list runs
lamina runs show runs/first -o report.html
lamina runs compare runs/first runs/second -o compared.html --json
"""
COLUMNS = ("steps", "tokens", "loss", "validation_loss", "tokens_per_second")


@command(EXAMPLES)
@click.argument("what", type=click.Choice(["list", "show", "compare"]))
@click.argument("directories", nargs=-1, metavar="[DIRECTORY]...", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the report as HTML here.")
def runs(out: Output, what: str, directories: tuple[Path, ...], output: Path | None) -> None:
    """Past training runs, and those that go on now.

    DIRECTORY is a run, or holds runs; the working directory where none is named. `list` has a line a run; `show` all
    that one run tells; `compare` the figures of several, and where their configurations differ. Runs that were killed
    or whose files are damaged are read as far as they go.
    """
    from lamina.train.past import find_runs

    found = find_runs(directories or (Path(),))
    if what == "list":
        if output is not None:
            raise click.UsageError("list writes no report; -o belongs to show and compare")
        out.result({"runs": [document(run) for run in found]}, _list(found))
        return
    if not found:
        raise click.UsageError(f"no runs in {', '.join(map(str, directories)) or 'the working directory'}")
    if what == "show" and len(found) > 1:
        raise click.UsageError(f"show is for one run, and there are {len(found)}: {', '.join(r.name for r in found)}")
    if what == "compare" and len(found) < 2:
        raise click.UsageError(f"compare is for two runs or more, and there is one: {found[0].name}")
    shown = document(found[0], events=True) if what == "show" else _comparison(found)
    lines = _show(found[0]) if what == "show" else _compare(found)
    if output is not None:
        from lamina.durable import write_file
        from lamina.train.report import compared, report

        page = report(found[0]) if what == "show" else compared(found)
        write_file(output, page.encode("utf-8", "backslashreplace"))
        shown["report"] = str(output)
        lines.append(f"report: {output}")
    out.result(shown, lines)


def document(run: Past, events: bool = False) -> dict[str, Any]:
    """A run as JSON. What is not finite, which JSON cannot say, is text."""
    from lamina.train.records import without_infinities

    more = {"environment": run.environment, "events": list(run.events)} if events else {}
    return {
        "directory": str(run.directory),
        "name": run.name,
        "running": run.owner,
        "checkpoints": list(run.checkpoints),
        "warnings": list(run.warnings),
        **without_infinities(run.summary()),
        **without_infinities(more),
    }


def _figure(name: str, value: Any) -> str:
    from lamina.train.past import duration

    if value is None:
        return "-"
    if name == "memory_bytes":
        return size(value)
    if name == "seconds":
        return duration(value)
    if name in ("steps", "best_step", "damaged_lines"):
        return f"{value:,}"
    if name == "utilisation":
        return f"{100 * value:.1f} %"
    return f"{value:.4f}" if "loss" in name else short(value)


def _list(found: list[Past]) -> list[str]:
    if not found:
        return ["no runs here"]
    rows = []
    for run in found:
        summary = run.summary()
        state = "running" if run.owner else f"step-{run.checkpoints[-1]}" if run.checkpoints else "-"
        rows.append([os.fspath(run.directory), *(_figure(name, summary[name]) for name in COLUMNS), state])
    return table(("run", *(name.replace("_", " ") for name in COLUMNS), "state"), rows)


def _show(run: Past) -> list[str]:
    git = run.environment.get("git")
    commit = f"{git.get('commit')}{', with changes' if git.get('changed') else ''}" if isinstance(git, dict) else None
    facts: dict[str, Any] = {
        "run": run.directory,
        "running": run.owner,
        "command": " ".join(map(str, run.environment.get("command") or ())) or None,
        "started": run.environment.get("started"),
        "git": commit,
        "checkpoints": ", ".join(map(str, run.checkpoints)) or None,
    }
    lines = [f"{heading(name.ljust(22))} {safe(str(value))}" for name, value in facts.items() if value is not None]
    for name, value in run.summary().items():
        if value is not None and not (name == "damaged_lines" and value == 0):
            lines.append(f"{heading(name.replace('_', ' ').ljust(22))} {_figure(name, value)}")
    if run.warnings:
        lines += [heading("warnings"), *bullets(map(safe, run.warnings))]
    if run.samples:
        last = run.samples[-1]
        lines += [
            heading(f"sample of step {last['step']:,}"),
            *(f"  {line}" for line in safe(last["sample"]).splitlines()),
        ]
    return lines


def _comparison(found: list[Past]) -> dict[str, Any]:
    from lamina.train.past import differing
    from lamina.train.records import without_infinities

    return {"runs": [document(run) for run in found], "differences": without_infinities(differing(found))}


def _compare(found: list[Past]) -> list[str]:
    from lamina.train.past import differing

    summaries = [run.summary() for run in found]
    rows = [
        [name.replace("_", " "), *(_figure(name, each[name]) for each in summaries)]
        for name in summaries[0]
        if any(each[name] for each in summaries)
    ]
    names = [run.name for run in found]
    lines = table(("", *names), rows)
    if differences := differing(found):
        lines += ["", *table(("configuration", *names), [[k, *map(_plain, v)] for k, v in differences.items()])]
    return lines


def _plain(value: Any) -> str:
    return "-" if value is None else safe(str(value))


command = runs
