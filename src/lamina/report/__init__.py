"""The report: one HTML file about a model and what it wrote, that needs no other file and asks for none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import lamina.pictures as pictures
from lamina.accounting import Account, account
from lamina.figures import short, size
from lamina.generation import Writing
from lamina.generation.limits import start_ids
from lamina.model import Model, ModelSpec
from lamina.report.attention import Attention, attention_of
from lamina.report.frame import asset, facts, page
from lamina.words import shape_of

STEPS = (0.05, 0.15, 0.35, 0.6, 0.85)  # probabilities that separate the six tints


@dataclass(frozen=True)
class Ranking:
    """Texts and how like the first of them the others are (cosines of their vectors)."""

    source: str
    texts: Sequence[str]
    similarity: Sequence[float]


def report(
    title: str,
    model: Model,
    *,
    writing: Writing | None = None,
    prompt: str | None = None,
    ranking: Ranking | None = None,
    context: int | None = None,
) -> str:
    """The page. `writing`: a text that `model` wrote, complete; its prompt is shown as `prompt`, else decoded.

    Everything that a model or a user wrote is escaped, and the page's own policy forbids every request and every script
    but the one it holds.
    """
    spec = model.spec
    cost = account(model, context=context or spec.context or 512)
    parts = [_facts(cost), architecture(title, spec, cost), _layers(cost)]
    if writing is not None:
        parts += [_text(writing, prompt), _map(model, writing)]
    if ranking is not None:
        parts.append(_ranking(ranking))
    return page(title, shape_of(spec), "".join(parts), asset("page.js"))


def overview(title: str, spec: ModelSpec, cost: Account) -> str:
    """The page of a model that has written nothing: what it costs, its picture, its layers."""
    return page(title, shape_of(spec), "".join([_facts(cost), architecture(title, spec, cost), _layers(cost)]))


def _facts(cost: Account) -> str:
    return facts(
        {
            "parameters": f"{cost.parameters:,}",
            "weights": f"{size(cost.weight_bytes)} in {cost.dtype}",
            "one more token": short(cost.flops_per_token, "FLOP"),
            f"cache of {cost.context:,} tokens": size(cost.cache_bytes),
        }
    )


def architecture(title: str, spec: ModelSpec, cost: Account) -> str:
    """The section with the picture of a model, and the same in words."""
    picture = pictures.architecture(spec, cost, title)
    twin = "".join(f"<li>{escape(line)}</li>" for line in pictures.text_twin(spec))
    return (
        f'<h2 id="architecture">Architecture</h2><figure>{picture}</figure>'
        f"<details><summary>The picture in words</summary><ul>{twin}</ul></details>"
    )


def _layers(cost: Account) -> str:
    def rows(row: Any, depth: int) -> list[str]:
        times = f" × {row.repeat}" if row.repeat > 1 and depth == 0 else ""
        share = f"{100 * row.parameters / cost.parameters:.1f} %" if cost.parameters else ""
        cells = (
            f"{row.parameters:,}",
            share,
            short(row.flops_per_token),
            size(row.cache_bytes) if row.cache_bytes else "",
        )
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        kind = ' class="top"' if depth == 0 else ""
        name = f'<th scope="row" class="d{min(depth, 3)}">{escape(row.name)}{times}</th>'
        line = f'<tr{kind}>{name}<td class="what">{escape(row.what)}</td>{numbers}</tr>'
        return [line, *(inner for part in row.parts for inner in rows(part, depth + 1))]

    body = "".join(line for row in cost.rows for line in rows(row, 0))
    names = ("parameters", "share", "FLOPs a token", "cache")
    header = "".join(f'<th scope="col">{name}</th>' for name in names)
    header = f'<th scope="col" class="what">part</th><th scope="col" class="what">what it is</th>{header}'
    return (
        f'<h2 id="layers">Layers</h2><div class="wide"><table id="layer-table"><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f'<p class="soft">Compute of one more token at the end of {cost.context:,}, cache of all of them.</p>'
    )


def _text(writing: Writing, prompt: str | None) -> str:
    tokenizer = writing.tokenizer
    prompt = tokenizer.decode(writing.prompt_ids, skip_special=False) if prompt is None else prompt
    shares = writing.probabilities or [1.0] * len(writing.ids)
    spans = []
    for text, share in zip(_pieces(writing), shares, strict=True):
        tint = sum(share > step for step in STEPS)
        label = f' title="{share:.3f}"' if writing.probabilities else ""
        spans.append(f'<span class="t p{tint}"{label}>{escape(text)}</span>')
    legend = "".join(f'<span class="t p{i}">{name}</span>' for i, name in enumerate(_legend()))
    speed = (
        f"{len(writing.prompt_ids)} tokens read in {writing.prefill_seconds:.2f} s,"
        f" {len(writing.ids)} written at {writing.tokens_per_second:.1f} tokens/s; ended by {writing.finish_reason}"
    )
    scale = (
        f'<p class="soft scale">How likely the model found each token: {legend}</p>' if writing.probabilities else ""
    )
    return (
        f'<h2 id="text">What it wrote</h2><div class="text"><span class="prompt">{escape(prompt)}</span>'
        f'{"".join(spans)}</div>{scale}<p class="soft">{escape(speed)}</p>'
    )


def _legend() -> list[str]:
    edges = [f"{100 * step:.0f}" for step in STEPS]
    return [f"≤ {edges[0]} %", *(f"{low}–{high} %" for low, high in pairwise(edges)), f"> {edges[-1]} %"]


def _pieces(writing: Writing) -> list[str]:
    """What each token adds to the text; a token inside a character adds nothing, the one that ends it all of it."""
    decoder = writing.tokenizer.stream(skip_special=False)
    pieces = [decoder.push(token) for token in writing.ids]
    if pieces:
        pieces[-1] += decoder.flush()
    return pieces


def _map(model: Model, writing: Writing) -> str:
    pairs = model.spec.two_stacks
    ids = [*(start_ids(model, 1)[0].tolist() if pairs else writing.prompt_ids), *writing.ids]
    if model.spec.context is not None:
        ids = ids[: model.spec.context]
    tokens = [writing.tokenizer.decode([token], skip_special=False) for token in ids]
    found = attention_of(model, ids, tokens, source=writing.prompt_ids if pairs else None)
    if found is None:
        return ""
    data = found.to_dict()
    layers = "".join(f"<option>{escape(each['path'])}</option>" for each in data["layers"])
    heads = "".join(f'<option value="{i}">{i}</option>' for i in range(data["heads"]))
    cut = f" The first {found.left_out} tokens are left out." if found.left_out else ""
    # In a script element only "<" could end the data.
    held = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    return f"""<h2 id="attention-map">What it looked at</h2>
<p class="soft">Each row is a token, each column a token it may look at; {len(tokens) - found.left_out} tokens, \
{len(data["layers"])} of the layers, all heads.{cut}</p>
<div class="controls"><label>Layer <select id="layer">{layers}</select></label>
<label>Head <select id="head"><option value="mean">mean of all</option>{heads}</select></label></div>
<div class="map"><canvas id="map" tabindex="0" role="img" aria-label="Attention weights, token by token" \
aria-describedby="readout"></canvas>
<div><p id="readout" aria-live="polite">Point at a cell, or use the arrow keys.</p><p id="about-twin" class="soft"></p>
<table><thead><tr><th>place</th><th class="what">token</th><th>weight</th><th></th></tr></thead>
<tbody id="twin"></tbody></table>
</div></div>{_words(found)}<script type="application/json" id="attention">{held}</script>"""


def _words(found: Attention) -> str:
    """The map in words, for those who cannot see it: where the last token looks, layer by layer."""
    rows = []
    for path, weights in found.weights.items():
        best = weights[:, -1].mean(dim=0).topk(min(3, len(found.tokens)))
        seen = ", ".join(
            f"<code>{escape(found.tokens[k].strip() or '␣')}</code> {share:.2f}"
            for k, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(path)}</th><td class="what">{seen}</td></tr>')
    return (
        "<details><summary>The map in words: where the last token looks</summary>"
        f'<div class="wide"><table><tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def _ranking(ranking: Ranking) -> str:
    order = sorted(range(1, len(ranking.texts)), key=lambda i: -ranking.similarity[i])
    rows = "".join(
        f'<tr><td class="what">{escape(ranking.texts[i])}</td><td>{ranking.similarity[i]:.4f}</td>'
        f'<td><meter min="0" max="1" value="{max(ranking.similarity[i], 0):.4f}"></meter></td></tr>'
        for i in order
    )
    return (
        f'<h2 id="ranking">What is alike</h2><p>Compared with <q>{escape(ranking.texts[0])}</q>, by vectors of'
        f" {escape(ranking.source)}:</p>"
        f'<div class="wide"><table id="ranking-table"><thead><tr><th class="what">text</th><th>cosine</th><th></th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


__all__ = [
    "Attention",
    "Ranking",
    "architecture",
    "attention_of",
    "facts",
    "overview",
    "page",
    "report",
    "short",
    "size",
]
