"""Curves as SVG that needs nothing else: lines over steps, on a linear and on a logarithmic axis, in words too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 28, 14, 40
LETTER = 7  # the widest digit of a label, in any common font
MOST = 800  # points of a line; beyond, each piece of it keeps its lowest and highest
HOVER = 120  # points of a line that show their values

LINES = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#1b7c83", "#6e7781")
"""Seen on light and on dark paper."""

STYLE = """
.chart{max-width:100%;height:auto;display:block;background:var(--panel);border:1px solid var(--line);border-radius:8px}
.chart text{font:12px system-ui,sans-serif;fill:var(--soft)}.chart .grid{stroke:var(--line);stroke-width:1}
.chart .line{fill:none;stroke-width:2;stroke-linejoin:round}.chart .faint{fill:none;stroke-width:1;opacity:.35}
.chart .dashed{fill:none;stroke-width:2;stroke-dasharray:6 4}.chart .hit{stroke:none;fill-opacity:0}
.chart .hit:hover{fill-opacity:1}.chart .dot{stroke:none}.chart .lost{stroke:#cf222e;stroke-width:2}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:.4rem 0 0;padding:0;list-style:none;font-size:.9rem}
.legend svg.chart{display:inline;border:0;background:none;vertical-align:middle;margin-right:.4rem}
.axes>input{position:absolute;opacity:0}
.axes>label{display:inline-block;border:1px solid var(--line);border-radius:6px;padding:.15rem .7rem;font-size:.85rem;
  cursor:pointer;margin:0 .3rem .5rem 0}
.axes>input:checked+label{border-color:var(--accent);color:var(--accent)}
.axes>input:focus-visible+label{outline:2px solid var(--accent)}
.axes>figure{overflow-x:auto}.axes>figure>.chart{min-width:34rem}
.axes>figure.log{display:none}.axes>input.log:checked~figure.log{display:block}
.axes>input.log:checked~figure.linear{display:none}
""" + "".join(f".c{place}{{stroke:{colour};fill:{colour}}}" for place, colour in enumerate(LINES))


@dataclass(frozen=True)
class Line:
    """One line: its name, its (step, value) points, and how it is drawn: "line", "dashed" or "faint"."""

    name: str
    points: Sequence[tuple[int, float]]
    colour: int = 0
    kind: str = "line"


def charts(name: str, what: str, lines: Sequence[Line], number: Callable[[float], str] = "{:.4g}".format) -> str:
    """A chart with a linear and one with a logarithmic axis of steps, of which the reader sees one; and its legend.

    `name` tells it from the other charts of the page. Needs STYLE. Nothing where no line has a finite point.
    """
    lines = [line for line in lines if any(math.isfinite(value) for _, value in line.points)]
    if not lines:
        return ""
    buttons = []
    for axis, words in (("linear", "steps"), ("log", "steps, logarithmic")):
        chosen = " checked" if axis == "linear" else ""
        buttons.append(
            f'<input type="radio" class="{axis}" name="{name}" id="{name}-{axis}"{chosen}>'
            f'<label for="{name}-{axis}">{words}</label>'
        )
    figures = [
        f'<figure class="{axis}">{chart(what, lines, logarithmic=axis == "log", number=number)}</figure>'
        for axis in ("linear", "log")
    ]
    return f'<div class="axes">{"".join(buttons)}{"".join(figures)}</div>{_legend(lines)}'


def chart(
    what: str, lines: Sequence[Line], *, logarithmic: bool = False, number: Callable[[float], str] = "{:.4g}".format
) -> str:
    """One SVG. What is not finite is a red mark at the top, at its step."""
    finite = [(step, value) for line in lines for step, value in line.points if math.isfinite(value)]
    first, last = min(step for step, _ in finite), max(step for step, _ in finite)
    low, high = min(value for _, value in finite), max(value for _, value in finite)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - pad, high + pad
    labels = {value: number(value) for value in ticks(low, high)}
    left = max(LEFT, 16 + LETTER * max(map(len, labels.values())))

    def across(step: float) -> float:
        begin, end, here = (math.log(max(each, 1)) if logarithmic else each for each in (first, last, step))
        return left + (WIDTH - left - RIGHT) * (0.5 if end == begin else (here - begin) / (end - begin))

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    shapes = []
    for value, label in labels.items():
        y = f"{up(value):.1f}"
        shapes.append(f'<path class="grid" d="M{left} {y}H{WIDTH - RIGHT}"/>')
        shapes.append(f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for step in powers(first, last) if logarithmic else ticks(first, last):
        shapes.append(f'<text x="{across(step):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{step:,.0f}</text>')
    shapes.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    for line in sorted(lines, key=lambda line: line.kind != "faint"):  # faint ones lie below
        shapes += _drawn(line, across, up, number)
    about = "; ".join(_words(line, number) for line in lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"<title>{escape(what)}</title><desc>{escape(about)}</desc>{''.join(shapes)}</svg>"
    )


def _drawn(
    line: Line, across: Callable[[float], float], up: Callable[[float], float], number: Callable[[float], str]
) -> list[str]:
    colour = f"c{line.colour % len(LINES)}"
    points = [(step, value) for step, value in line.points if math.isfinite(value)]
    lost = [step for step, value in line.points if not math.isfinite(value)]
    path = "L".join(f"{across(step):.1f} {up(value):.1f}" for step, value in thinned(points, MOST))
    shapes = [f'<path class="{line.kind} {colour}" style="fill:none" d="M{path}"/>'] if points else []
    if line.kind != "faint":
        # A few points, as of evaluations, are each worth seeing; those of a dense line show when they are pointed at.
        mark, radius = ("dot", 3) if line.kind == "dashed" or len(points) == 1 else ("hit", 5)
        for step, value in thinned(points, HOVER):
            title = f"<title>{escape(line.name)}, step {step:,}: {escape(number(value))}</title>"
            place = f'cx="{across(step):.1f}" cy="{up(value):.1f}"'
            shapes.append(f'<circle class="{mark} {colour}" {place} r="{radius}">{title}</circle>')
    shapes += [
        f'<path class="lost" d="M{across(step):.1f} {TOP}v8"><title>{escape(line.name)}, step {step:,}: not finite'
        "</title></path>"
        for step in lost[:HOVER]
    ]
    return shapes


def _legend(lines: Sequence[Line]) -> str:
    rows = "".join(
        f'<li><svg class="chart" width="26" height="10" aria-hidden="true">'
        f'<path class="{line.kind} c{line.colour % len(LINES)}" d="M1 5H25"/></svg>{escape(line.name)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{rows}</ul>'


def _words(line: Line, number: Callable[[float], str]) -> str:
    points = [(step, value) for step, value in line.points if math.isfinite(value)]
    if not points:
        return f"{line.name}: nothing finite"
    (first, begin), (last, end) = points[0], points[-1]
    lowest = min(points, key=lambda point: point[1])
    return (
        f"{line.name}: {number(begin)} at step {first:,}, {number(end)} at step {last:,}, "
        f"lowest {number(lowest[1])} at step {lowest[0]:,}"
    )


def thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most `most` points: of each piece of the line its lowest and its highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    kept: list[tuple[int, float]] = []
    pieces = most // 2
    for piece in range(pieces):
        part = points[piece * len(points) // pieces : (piece + 1) * len(points) // pieces]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or the powers alone where those are many."""
    low = max(low, 1)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(max(high, low))) + 1)
    factors = (1,) if len(decades) > 4 else (1, 2, 5)
    return [factor * 10.0**decade for decade in decades for factor in factors if low <= factor * 10.0**decade <= high]
