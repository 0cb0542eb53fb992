"""The report of a run, or of several beside each other: one HTML file that needs no other and asks for none."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lamina.accounting import Account, account
from lamina.durable import write_file
from lamina.errors import LaminaError
from lamina.figures import short, size
from lamina.model import ModelSpec
from lamina.report import architecture, facts, page
from lamina.train.curves import STYLE, Line, charts
from lamina.train.directory import MODEL, REPORT
from lamina.train.past import Past, differing, duration, read_run
from lamina.train.records import smooth
from lamina.words import shape_of

EVENTS = 200  # the last lines of the events that are shown
WINDOW = 20  # steps that the smooth line of the loss is a mean of, at most a tenth of the run

Number = Callable[[float], str]
CURVES: tuple[tuple[str, str, tuple[str, ...], float, Number], ...] = (
    ("speed", "Tokens per second", ("tokens_per_second",), 1, "{:,.0f}".format),
    ("utilisation", "Utilisation of the machine's peak, in %", ("utilisation",), 100, "{:.3g}".format),
    ("memory", "Memory, in MiB", ("memory_bytes",), 2**-20, lambda x: f"{x:,.1f}".removesuffix(".0")),
    ("rate", "Learning rate", ("rate",), 1, "{:.3g}".format),
    ("norm", "Gradient norm before clipping", ("gradient_norm",), 1, "{:.3g}".format),
)
"""Of each curve its name, its title, where it stands in a record, and what it is shown in: round numbers of that."""

PAIRS = ".pairs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));column-gap:1.5rem}"


def report(run: Past, evaluation: Mapping[str, Any] | None = None) -> str:
    """The page of one run. `evaluation`: figures measured at its end, by name, shown above those on the way.

    Everything that a user or a model wrote is escaped; the page holds no script, and its policy forbids any.
    """
    spec = _spec(run)
    cost = None if spec is None else account(spec, context=spec.context or 512)
    parts = [_figures(run, cost), _losses([run]), _more([run]), _evaluation(run, evaluation), _samples(run)]
    if spec is not None and cost is not None:
        parts.append(architecture(run.name, spec, cost))
    parts += [_going_on(run, spec), _warnings(run), _origin(run)]
    about = "a run of training" if spec is None else shape_of(spec)
    return page(run.name, about, "".join(parts), style=STYLE + PAIRS)


def compared(runs: Sequence[Past]) -> str:
    """The page of several runs: their curves over each other, their figures, and where their configurations differ."""
    names = ", ".join(run.name for run in runs)
    body = "".join([_losses(runs), _figures_of(runs), _differences(runs), _more(runs)])
    return page(f"{len(runs)} runs compared", names, body, style=STYLE + PAIRS)


def write_report(directory: Path, evaluation: Mapping[str, Any] | None = None) -> Path:
    """Writes report.html into a run directory and returns its path."""
    path = Path(directory) / REPORT
    write_file(path, report(read_run(directory), evaluation).encode("utf-8", "backslashreplace"))
    return path


def _spec(run: Past) -> ModelSpec | None:
    if run.spec is None:
        return None
    try:
        return ModelSpec.from_json(run.spec)
    except LaminaError as error:
        raise LaminaError(f"{run.directory / 'spec.json'}: {error}") from None


def _known(summary: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a run that are there, in words."""
    shown: tuple[tuple[str, str, Number], ...] = (
        ("steps", "steps", lambda x: f"{x:,}"),
        ("tokens", "tokens", short),
        ("loss", "training loss", "{:.4f}".format),
        ("validation_loss", "validation loss", "{:.4f}".format),
        ("best_validation_loss", "best validation loss", "{:.4f}".format),
        ("tokens_per_second", "tokens a second", lambda x: f"{x:,.0f}"),
        ("utilisation", "utilisation", lambda x: f"{100 * x:.1f} %"),
        ("memory_bytes", "memory at most", size),
        ("seconds", "time", duration),
    )
    return {words: number(summary[name]) for name, words, number in shown if summary[name] is not None}


def _figures(run: Past, cost: Account | None) -> str:
    summary = run.summary()
    named = _known(summary)
    if cost is not None:
        named["parameters"] = f"{cost.parameters:,}"
        if summary["tokens"] is not None:
            named["compute"] = short(cost.flops_train_per_token * summary["tokens"], "FLOP")
    note = "" if cost is None else (
        f'<p class="soft">Compute is counted: {short(cost.flops_train_per_token, "FLOP")} a token, forward and '
        f"backward through every weight, at {cost.context:,} tokens.</p>"
    )  # fmt: skip
    return facts(named) + note


def _losses(runs: Sequence[Past]) -> str:
    lines = []
    for place, run in enumerate(runs):
        losses = run.metrics.curve("loss")
        validation = run.metrics.curve("validation", "loss")
        of = f"{run.name}, " if len(runs) > 1 else ""
        second = place if len(runs) > 1 else 1
        window = max(1, min(WINDOW, len(losses) // 10))
        if window > 1 and len(runs) == 1:
            lines.append(Line("training, each step", losses, place, "faint"))
        mean = f", mean of {window} steps" if window > 1 else ""
        lost = [point for point in losses if not math.isfinite(point[1])]
        lines.append(Line(f"{of}training{mean}", sorted([*smooth(losses, window), *lost]), place, "line"))
        lines.append(Line(f"{of}validation", validation, second, "dashed"))
    return f'<h2 id="loss">Loss</h2>{charts("loss", "Loss", lines) or "<p>No loss was recorded.</p>"}'


def _more(runs: Sequence[Past]) -> str:
    parts = []
    for name, what, path, unit, number in CURVES:
        found = [
            Line(run.name, [(step, unit * value) for step, value in run.metrics.curve(*path)], place)
            for place, run in enumerate(runs)
        ]
        if drawn := charts(name, what, found, number):
            parts.append(f'<section><h2 id="{name}">{escape(what)}</h2>{drawn}</section>')
    return f'<div class="pairs">{"".join(parts)}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _evaluation(run: Past, last: Mapping[str, Any] | None) -> str:
    found = [(record["step"], record["validation"]) for record in run.metrics.records if "validation" in record]
    found = [(step, figures) for step, figures in found if isinstance(figures, dict)]
    parts = []
    if last:
        parts.append(_table(("at the end", ""), [(name, _said(value)) for name, value in last.items()], "evaluation"))
    if found:
        names = list(dict.fromkeys(name for _, figures in found for name in figures))
        rows = [(f"{step:,}", *(_said(figures.get(name)) for name in names)) for step, figures in found]
        table = _table(("step", *names), rows, "validation")
        hidden = f"<details><summary>All {len(rows)} evaluations on the way</summary>{table}</details>"
        parts.append(table if len(rows) <= 12 else hidden)
    return f'<h2 id="evaluations">Evaluation</h2>{"".join(parts)}' if parts else ""


def _samples(run: Past) -> str:
    blocks = [
        f'<h3>Step {sample["step"]:,}</h3><div class="text">{escape(sample["sample"])}</div>' for sample in run.samples
    ]
    if not blocks:
        return ""
    earlier = f"<details><summary>Earlier ones</summary>{''.join(blocks[:-1])}</details>" if blocks[:-1] else ""
    return f'<h2 id="samples">What it wrote</h2>{blocks[-1]}{earlier}'


def _going_on(run: Past, spec: ModelSpec | None) -> str:
    if not run.checkpoints:
        return '<h2 id="going-on">Going on</h2><p>No checkpoint was saved.</p>'
    config, made = run.directory / "config.yaml", run.directory / MODEL
    steps = ", ".join(f"{step:,}" for step in run.checkpoints)
    writes = spec is None or (spec.decoder is not None and spec.head is not None)
    use = ("let it write", "generate", " 'Once upon a time'") if writes else ("look at it", "show", "")
    place = shlex.quote(str(run.directory))
    lines = [("go on with the run", f"lamina train {shlex.quote(str(config))} -o {place} --resume auto")]
    if made.is_dir():  # a checkpoint has no tokenizer
        lines.append((use[0], f"lamina {use[1]} {shlex.quote(str(made))}{use[2]}"))
    rows = "".join(
        f'<tr><td class="what">{words}</td><td class="what"><code>{escape(line)}</code></td></tr>'
        for words, line in lines
    )
    return (
        f'<h2 id="going-on">Going on</h2><p>Checkpoints of steps {steps}.</p>'
        f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'
    )


def _warnings(run: Past) -> str:
    lines = [*run.warnings]
    if run.metrics.damaged:
        lines.append(f"metrics.jsonl: {len(run.metrics.damaged)} damaged lines were passed over")
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    shown = f'<h2 id="warnings">Warnings</h2><ul>{items}</ul>' if lines else ""
    events = escape("\n".join(run.events[-EVENTS:]))
    log = f'<details><summary>Events</summary><div class="text">{events}</div></details>' if events else ""
    return shown + log


def _origin(run: Past) -> str:
    found = run.environment
    git = found.get("git")
    packages = found.get("packages")
    said = {
        "command": shlex.join(map(str, found.get("command") or ())),
        "started": found.get("started"),
        "directory": str(run.directory),
        "git": f"{git.get('commit')}{', with changes' if git.get('changed') else ''}"
        if isinstance(git, dict)
        else None,
        "host": found.get("host"),
        "platform": found.get("platform"),
        "cores": found.get("cores"),
        "memory": size(found["memory_bytes"]) if isinstance(found.get("memory_bytes"), int) else None,
        "devices": ", ".join(map(str, found.get("devices") or ())),
        "python": found.get("python"),
        "packages": ", ".join(f"{k} {v}" for k, v in packages.items()) if isinstance(packages, dict) else None,
    }
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td class="what">{escape(str(value))}</td></tr>'
        for name, value in said.items()
        if value
    )
    config = f'<details><summary>Configuration</summary><div class="text">{escape(run.config)}</div></details>'
    return (
        f'<h2 id="origin">Where it comes from</h2><div class="wide"><table id="environment"><tbody>{rows}</tbody>'
        f"</table></div>{config if run.config else ''}"
    )


def _figures_of(runs: Sequence[Past]) -> str:
    found = [_known(run.summary()) for run in runs]
    names = list(dict.fromkeys(name for each in found for name in each))
    rows = [(name, *(each.get(name, "–") for each in found)) for name in names]
    return f'<h2 id="figures">Figures</h2>{_table(("", *(run.name for run in runs)), rows, "figure-table")}'


def _differences(runs: Sequence[Past]) -> str:
    rows = [(path, *map(_said, values)) for path, values in differing(runs).items()]
    if not rows:
        return '<h2 id="differences">Configuration</h2><p>Their configurations are the same.</p>'
    table = _table(("", *(run.name for run in runs)), rows, "difference-table")
    return f'<h2 id="differences">Where their configurations differ</h2>{table}'


def _said(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
