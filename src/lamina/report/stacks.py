"""Two models side by side: what an operation did, or how two sources differ, layer by layer, as one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from typing import Any

import lamina.pictures as pictures
from lamina.accounting import Account, account
from lamina.figures import short, size
from lamina.layers import LayerSpec, StackSpec
from lamina.model import ModelSpec
from lamina.report.frame import asset, facts, page
from lamina.surgery import Verdict
from lamina.words import shape_of, span

CONTEXT = 512
"""Tokens that costs are of, where neither model says how long it reads."""


@dataclass(frozen=True)
class Named:
    """One of the two models."""

    name: str
    spec: ModelSpec


@dataclass(frozen=True)
class Costs:
    """What one copy of a layer costs."""

    parameters: int
    cache_bytes: int


def stacks(
    before: Named,
    after: Named,
    *,
    operations: Sequence[Mapping[str, Any]] = (),
    verdict: Verdict | None = None,
    differences: Sequence[tuple[str, str, str]] = (),
) -> str:
    """The page. operations: what was done, each with `op`, its fields, `kept` and `why`. differences: fields of the
    specs, with both values in words.

    Everything that others wrote is escaped, and the page's own policy forbids every request and every script.
    """
    contexts = [spec.context for spec in (before.spec, after.spec) if spec.context is not None]
    context = min(contexts, default=CONTEXT)
    costs = account(before.spec, context=context), account(after.spec, context=context)
    parts = [_facts(*costs)]
    parts += [_plan(operations)] if operations else []
    parts += [_verdict(verdict)] if verdict is not None else []
    drift = {} if verdict is None else {one.layer: one.drift for one in verdict.drift}
    for side in ("encoder", "decoder"):
        pair = getattr(before.spec, side), getattr(after.spec, side)
        if any(stack is not None for stack in pair):
            parts.append(_side(side, (before, after), pair, costs, drift))
    parts += [_differences(before.name, after.name, differences)] if differences else []
    figures = "".join(
        f"<figure>{pictures.architecture(one.spec, cost, one.name)}</figure>"
        for one, cost in zip((before, after), costs, strict=True)
    )
    parts.append(f'<h2 id="pictures">Both architectures</h2><div class="pair">{figures}</div>')
    title = f"{before.name} and {after.name}"
    return page(title, f"{shape_of(before.spec)} | {shape_of(after.spec)}", "".join(parts), style=asset("stacks.css"))


def _facts(before: Account, after: Account) -> str:
    pairs = {
        "parameters": (f"{before.parameters:,}", f"{after.parameters:,}"),
        "active parameters": (f"{before.active_parameters:,}", f"{after.active_parameters:,}"),
        "one more token": (short(before.flops_per_token, "FLOP"), short(after.flops_per_token, "FLOP")),
        f"cache of {before.context:,} tokens": (size(before.cache_bytes), size(after.cache_bytes)),
    }
    return facts({name: one if one == other else f"{one} → {other}" for name, (one, other) in pairs.items()})


def _plan(operations: Sequence[Mapping[str, Any]]) -> str:
    rows = ""
    for number, operation in enumerate(operations, 1):
        fields = {name: value for name, value in operation.items() if name not in ("op", "kept", "why") and value != []}
        said = ", ".join(f"{name} {_brief(value)}" for name, value in fields.items())
        cells = (f"{operation['op']}: {said}" if said else str(operation["op"]), operation["kept"], operation["why"])
        rows += f'<tr><th scope="row">{number}</th>'
        rows += "".join(f'<td class="what">{escape(str(cell))}</td>' for cell in cells) + "</tr>"
    header = "".join(f'<th scope="col" class="what">{name}</th>' for name in ("", "operation", "promise", "why"))
    return (
        f'<h2 id="plan">What was done</h2><div class="wide"><table id="plan-table"><thead><tr>{header}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _brief(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _verdict(verdict: Verdict) -> str:
    sides = verdict.before, verdict.after
    rows = {
        "perplexity": [_figure(side.perplexity) for side in sides],
        "cache": ["-" if side.cache_bytes is None else size(side.cache_bytes) for side in sides],
        "tokens/s, reading": [_figure(side.tokens_per_second, 0) for side in sides],
        "tokens/s, writing": [_figure(side.decoded_per_second, 1) for side in sides],
    }
    if verdict.before.bits_per_byte is not None:
        rows = {"bits per byte": [_figure(side.bits_per_byte, 4) for side in sides]} | rows
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
    )
    said = f"{verdict.found}, on {verdict.tokens:,} tokens; "
    said += (
        "each reads by its own tokenizer"
        if verdict.worst is None
        else f"largest difference of an output {verdict.worst:.2g}"
    )
    if verdict.divergence is not None and verdict.agreement is not None:
        said += (
            f"; KL divergence {verdict.divergence:.3g} nats a token; the likeliest next token is the same after"
            f" {verdict.agreement:.1%}"
        )
    return (
        f'<h2 id="verdict">Verdict</h2><p>{escape(said)}.</p><div class="wide"><table id="verdict-table"><thead><tr>'
        '<th scope="col" class="what">measured</th><th scope="col">before</th><th scope="col">after</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


Pair = tuple[int | None, int | None]


def aligned(before: Sequence[LayerSpec], after: Sequence[LayerSpec]) -> Iterator[Pair]:
    """Numbers of the layers that stand beside each other: by depth, or, where one stack is deeper, by what is equal."""
    if len(before) == len(after):
        yield from ((i, i) for i in range(len(before)))
        return
    for _, a, b, c, d in SequenceMatcher(None, list(before), list(after), autojunk=False).get_opcodes():
        common = min(b - a, d - c)
        yield from ((a + i, c + i) for i in range(common))
        yield from ((i, None) for i in range(a + common, b))
        yield from ((None, i) for i in range(c + common, d))


def _side(
    side: str,
    models: tuple[Named, Named],
    pair: tuple[StackSpec | None, StackSpec | None],
    costs: tuple[Account, Account],
    drift: Mapping[str, float],
) -> str:
    layers = [() if stack is None else stack.layers for stack in pair]
    each = [_each(side, stack, cost) for stack, cost in zip(pair, costs, strict=True)]
    scale = {
        name: max((getattr(one, name) for costs in each for one in costs), default=0)
        for name in ("parameters", "cache_bytes")
    }
    worst = max(drift.values(), default=0.0)
    rows, changes = [], 0
    for numbers in aligned(*layers):
        both = [None if i is None else layers[k][i] for k, i in enumerate(numbers)]
        state = "same" if both[0] == both[1] else "changed" if None not in both else "only here"
        changes += state != "same"
        cells = []
        for k, i in enumerate(numbers):
            if i is None:
                cells.append('<td class="what gone" colspan="4">no such layer</td>')
                continue
            cost = each[k][i]
            cells += [
                f'<th scope="row">{i}</th>',
                f'<td class="what">{_steps(layers[k][i], both[1 - k])}</td>',
                f"<td>{short(cost.parameters)}{_bar(cost.parameters, scale['parameters'])}</td>",
                f"<td>{size(cost.cache_bytes)}{_bar(cost.cache_bytes, scale['cache_bytes'])}</td>",
            ]
        far = drift.get(f"{side}.layers.{numbers[1]}")
        moved = "" if far is None else f"{far:.2g}{_bar(far, worst)}"
        rows.append(
            f'<tr class="{state.split()[0]}"><td class="what">{state}</td>{"".join(cells)}<td>{moved}</td></tr>'
        )
    names = ("", *(("", "layer", "parameters", "cache") * 2), "drift")
    header = "".join(
        f'<th scope="col"{"" if i in (3, 4, 7, 8) else " class=what"}>{n}</th>' for i, n in enumerate(names)
    )
    above = f'<th></th><th colspan="4" class="what">{escape(models[0].name)}</th>'
    above += f'<th colspan="4" class="what">{escape(models[1].name)}</th><th></th>'
    told = f"{changes} of {len(rows)} layers differ." if changes else "All layers are the same."
    told += f" Cache of {costs[0].context:,} tokens."
    told += " Drift: the norm of what a state has moved by, as a part of its own." if drift else ""
    return (
        f'<h2 id="{side}">Layers of the {side}</h2><p class="soft">{told}</p>'
        f'<div class="wide"><table class="stacks" id="{side}-stacks"><thead><tr>{above}</tr><tr>{header}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _each(side: str, stack: StackSpec | None, cost: Account) -> list[Costs]:
    """The costs of each layer. Rows of the account hold those of all equal layers together."""
    rows = {row.name: row for row in cost.rows}
    found: dict[int, Costs] = {}
    for _, places in [] if stack is None else pictures.distinct(stack):
        row = rows[f"{side}.layers.{span(places)}"]
        one = Costs(row.parameters // len(places), row.cache_bytes // len(places))
        found |= dict.fromkeys(places, one)
    return [found[i] for i in sorted(found)]


def _steps(layer: LayerSpec, other: LayerSpec | None) -> str:
    """The steps in words, those marked that the other layer has not."""
    beside = () if other is None else other.steps
    lines = []
    for step, text in zip(layer.steps, pictures.steps_in_words(layer), strict=True):
        said = escape(f"{step.name}: {text}")
        lines.append(f"<div>{said}</div>" if step in beside else f"<div><mark>{said}</mark></div>")
    return "".join(lines)


def _bar(value: float, most: float) -> str:
    width = 0.0 if most <= 0 else 4.5 * value / most
    return f'<br><span class="bar" style="width:{width:.2f}rem"></span>'


def _differences(before: str, after: str, differences: Sequence[tuple[str, str, str]]) -> str:
    rows = ""
    for path, *values in differences:
        cells = "".join(f'<td class="what">{escape(value)}</td>' for value in values)
        rows += f'<tr><th scope="row">{escape(path)}</th>{cells}</tr>'
    names = "".join(f'<th scope="col" class="what">{escape(name)}</th>' for name in ("field", before, after))
    return (
        '<h2 id="fields">Fields that differ</h2><div class="wide"><table id="field-table">'
        f"<thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


__all__ = ["Named", "aligned", "stacks"]
