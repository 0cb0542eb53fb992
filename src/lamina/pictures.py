"""Pictures of models, drawn from the spec: SVG that needs nothing else, with its text twin inside (title, desc).

One box for each distinct layer, with the number of its copies; inside, its residual steps with their norms where they
stand. Data flows from the top down, an encoder stands left of its decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Any

from lamina.layers import LayerSpec, StackSpec, StepSpec, SumSpec
from lamina.model import ModelSpec
from lamina.words import say, shape_of, span

WIDTH, GAP, MARGIN = 380, 14, 20
LINE = 15
STYLE = """
.lamina text{font:12px system-ui,sans-serif;fill:#1b1f24}
.lamina .small{font-size:11px;fill:#57606a}
.lamina .name{font-weight:600}
.lamina rect{stroke:#8c959f;stroke-width:1;fill:#f6f8fa}
.lamina .table{fill:#ddf4ff}.lamina .attention{fill:#fff1e5}
.lamina .feedforward{fill:#e6f6e6}.lamina .norm{fill:#fff8c5}
.lamina .layer{fill:none;stroke:#57606a;stroke-dasharray:5 3}.lamina .paper{fill:#fff;stroke:none}
.lamina path{stroke:#57606a;fill:none}
"""


@dataclass
class _Canvas:
    """Shapes, and how far down the page they have come."""

    x: float
    y: float
    shapes: list[str] = field(default_factory=list)

    def box(self, kind: str, name: str, what: str, inset: int = 0) -> None:
        """A box with a name and its description in as many lines as it needs."""
        lines = _wrap(what, (WIDTH - 2 * inset - 16) // 6)
        height = 8 + LINE * (1 + len(lines))
        x, width = self.x + inset, WIDTH - 2 * inset
        self.shapes.append(f'<rect class="{kind}" x="{x}" y="{self.y}" width="{width}" height="{height}" rx="4"/>')
        self.text(x + 8, self.y + LINE, name, "name")
        for i, line in enumerate(lines):
            self.text(x + 8, self.y + LINE * (2 + i), line, "small")
        self.y += height

    def text(self, x: float, y: float, text: str, kind: str, anchor: str = "start") -> None:
        self.shapes.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self) -> None:
        """From what was drawn last to what comes next."""
        x = self.x + WIDTH / 2
        self.shapes.append(f'<path d="M{x} {self.y}v{GAP}m-3 -4l3 4l3 -4"/>')
        self.y += GAP


def architecture(spec: ModelSpec, account: Any = None, title: str = "") -> str:
    """The model as an SVG document. `account`, where given, adds the parameters of each part."""
    counts = {} if account is None else {row.name: f"{row.parameters:,} parameters" for row in account.rows}
    stacks = [(name, stack) for name, stack in (("encoder", spec.encoder), ("decoder", spec.decoder)) if stack]
    shapes: list[str] = []
    bottom = 0.0
    for number, (name, stack) in enumerate(stacks):
        canvas = _Canvas(MARGIN + number * (WIDTH + 3 * MARGIN), 64)
        _stack(canvas, spec, name, stack, counts)
        if number == len(stacks) - 1:
            _ends(canvas, spec, counts)
        if number:
            x, y = canvas.x - 3 * MARGIN, 64 + (bottom - 64) / 2
            canvas.shapes.append(f'<path d="M{x} {y}h{3 * MARGIN}m-4 -3l4 3l-4 3"/>')
        shapes += canvas.shapes
        bottom = max(bottom, canvas.y)
    width = 2 * MARGIN + len(stacks) * WIDTH + (len(stacks) - 1) * 3 * MARGIN
    height = bottom + MARGIN
    about = escape("; ".join(text_twin(spec)))
    heading = _Canvas(MARGIN, 0)
    heading.text(MARGIN, 26, title or "model", "name")
    heading.text(MARGIN, 44, shape_of(spec), "small")
    size = f'width="{width}" height="{height:g}" viewBox="0 0 {width} {height:g}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="lamina" role="img" {size}>',
            f"<title>{escape(title or 'model')}: {escape(shape_of(spec))}</title>",
            f"<desc>{about}</desc>",
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{width}" height="{height:g}"/>',
            *heading.shapes,
            *shapes,
            "</svg>",
            "",
        ]
    )


def text_twin(spec: ModelSpec) -> list[str]:
    """What the picture shows, one line a box."""
    lines = [] if spec.stem is None else [f"stem: {say(spec.stem)}"]
    lines.append(f"embedding: {say(spec.embedding)}")
    for name, stack in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        if stack is None:
            continue
        for part in ("position", "segment", "input_norm", "score_bias"):
            if getattr(stack, part) is not None:
                lines.append(f"{name}.{part}: {say(getattr(stack, part))}")
        if stack.input_width is not None:
            lines.append(f"{name}.input: {_widened(stack, spec)}")
        runs = f", each {stack.repeat} times" if stack.repeat > 1 else ""
        for layer, places in distinct(stack):
            for step in layer.steps:
                lines.append(f"{name}.layers.{span(places)} x {len(places)}{runs}, {step.name}: {_wiring(step)}")
        if stack.norm is not None:
            lines.append(f"{name}.norm: {say(stack.norm)}")
    ends = [("head", spec.head), ("pooler", spec.pooler), ("labels", spec.labels)]
    return lines + [f"{name}: {say(part)}" for name, part in ends if part is not None]


def distinct(stack: StackSpec) -> list[tuple[LayerSpec, list[int]]]:
    """The distinct layers of a stack, each with the numbers of its copies."""
    places: dict[LayerSpec, list[int]] = {}
    for i, layer in enumerate(stack.layers):
        places.setdefault(layer, []).append(i)
    return list(places.items())


def steps_in_words(layer: LayerSpec) -> list[str]:
    """What each step of a layer does, as the picture has it."""
    return [_wiring(step) for step in layer.steps]


def _stack(canvas: _Canvas, spec: ModelSpec, name: str, stack: StackSpec, counts: dict[str, str]) -> None:
    if name == "encoder" and spec.stem is not None:
        canvas.box("table", "stem", _both(say(spec.stem), counts.get("stem")))
    else:
        canvas.box("table", "embedding", _both(say(spec.embedding), counts.get("embedding")))
    if stack.input_width is not None:
        canvas.arrow()
        canvas.box("table", "input", _both(_widened(stack, spec), counts.get(f"{name}.input")))
    for part in ("position", "segment", "input_norm", "score_bias"):
        if getattr(stack, part) is not None:
            canvas.arrow()
            kind = "norm" if part == "input_norm" else "table"
            canvas.box(kind, part.replace("_", " "), _both(say(getattr(stack, part)), counts.get(f"{name}.{part}")))
    for layer, places in distinct(stack):
        canvas.arrow()
        top, mark = canvas.y, len(canvas.shapes)
        canvas.y += 24
        for i, step in enumerate(layer.steps):
            if i:
                canvas.arrow()
            _step(canvas, step)
        canvas.y += 10
        frame = f'<rect class="layer" x="{canvas.x}" y="{top}" width="{WIDTH}" height="{canvas.y - top}" rx="8"/>'
        canvas.shapes.insert(mark, frame)
        count = "1 layer" if len(places) == 1 else f"× {len(places)}"
        count += f", each {stack.repeat} times" if stack.repeat > 1 else ""
        canvas.text(canvas.x + 10, top + 16, f"{name} layers {span(places)}", "small")
        canvas.text(canvas.x + WIDTH - 10, top + 16, count, "name", "end")
    if stack.norm is not None:
        canvas.arrow()
        canvas.box("norm", "norm", say(stack.norm))


def _widened(stack: StackSpec, spec: ModelSpec) -> str:
    return f"a matrix from {stack.input_width} features to {spec.width}"


def _step(canvas: _Canvas, step: StepSpec) -> None:
    kind = step.name if step.name in ("attention", "feedforward") else "attention" if "att" in step.name else "table"
    canvas.box(kind, step.name, _wiring(step), inset=12)


def _wiring(step: StepSpec) -> str:
    """A step as its equation in words: "x + op(RMSNorm(x))" and what op is."""
    inner = "x" if step.pre is None else f"{_norm(step.pre)}(x)"
    inner = f"f({inner})" if step.post is None else f"{_norm(step.post)}(f({inner}))"
    carried = "x" if step.residual == 1.0 else f"{step.residual:g} x"
    whole = f"{carried} + {inner}" if step.after is None else f"{_norm(step.after)}({carried} + {inner})"
    if isinstance(step.op, SumSpec):
        return f"{whole}; f: {' + '.join(say(branch.op) for branch in step.op.branches)}"
    return f"{whole}; f: {say(step.op)}"


def _norm(spec: Any) -> str:
    return say(spec).split(" ")[0]


def _ends(canvas: _Canvas, spec: ModelSpec, counts: dict[str, str]) -> None:
    for name, part in (("head", spec.head), ("pooler", spec.pooler), ("labels", spec.labels)):
        if part is not None:
            canvas.arrow()
            canvas.box("table", name, _both(say(part), counts.get(name)))


def _both(what: str, count: str | None) -> str:
    return what if count is None or count.startswith("0 ") else f"{what}; {count}"


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, int(width)) or [""]
