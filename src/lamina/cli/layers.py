"""`lamina layers`: the catalogue of the sixteen kinds of layer, and a page on each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lamina.cli.errors import Failed
from lamina.cli.output import Output, bullets, columns, heading, share, wrapped
from lamina.cli.program import command
from lamina.figures import short, size

if TYPE_CHECKING:
    from lamina.catalogue import Kind

EXAMPLES = """
lamina layers
lamina layers rotary
lamina layers rotary --run
lamina layers experts --json
"""
INDENT = 17  # columns for the names of the kinds


@command(EXAMPLES)
@click.argument("name", required=False)
@click.option("--run", is_flag=True, help="Run the example of the page now.")
def layers(out: Output, name: str | None, run: bool) -> None:
    """The kinds of layer: all sixteen, or a page on one.

    A page says what the layer is for, its equation, its variants and who uses them, what it costs, its pitfalls, what
    is often said of it and is not so, and has an example that can be checked by hand. Families are those whose
    published specs have the layer, and costs are counted; nothing of that is typed in. What this version does not have
    yet says so.
    """
    from lamina.catalogue import CATALOGUE, families, kind
    from lamina.catalogue.page import page

    if name is None and run:
        raise click.UsageError("--run needs the NAME of a kind of layer")
    if name is not None and run:
        _run(out, kind(name))
        return
    if name is not None:
        found = page(kind(name))
        out.result(found, _page(found))
        return
    found = {"layers": [page(one, costs=out.as_json) for one in CATALOGUE], "families": families()}
    out.result(found, _list(found))


def _list(found: dict[str, Any]) -> list[str]:
    """Three lines a kind: what it does, its equation, and who has it."""
    lines = []
    for one in found["layers"]:
        lines += wrapped(one["what"], INDENT, first=heading(one["name"].ljust(INDENT)), widest=columns())
        lines += wrapped(one["equation"].partition("\n")[0], INDENT, widest=columns())
        lines += wrapped(_facts(one, found["families"]), INDENT, widest=columns())
    return [*lines, "", "lamina layers NAME has the page of one. Files are below lamina/."]


def _facts(one: dict[str, Any], families: list[str]) -> str:
    """How many variants are built, where, and as many of the families that have it as the line holds."""
    file = one["files"][0].removeprefix("lamina/") + (f" +{len(one['files']) - 1}" if len(one["files"]) > 1 else "")
    if not one["built"]:
        return f"not built yet; {file}"
    built, total = sum(variant["built"] for variant in one["variants"]), len(one["variants"])
    said = f"{built if built == total else f'{built} of {total}'} variants; {file}; "
    users = one["families"]
    if users == families:
        return f"{said}all {len(families)} families"
    for count in range(len(users), 0, -1):
        more = "" if count == len(users) else f" +{len(users) - count}"
        if len(said) + len(names := f"{', '.join(users[:count])}{more}") <= columns() - INDENT:
            return said + names
    return said + (f"{len(users)} families" if users else "no family here")


def _page(one: dict[str, Any]) -> list[str]:
    lines = [heading(one["title"]), *wrapped(one["what"]), "", *wrapped(one["why"])]
    lines += [*_title("Equation"), *(f"    {line}" for line in one["equation"].splitlines()), ""]
    wide = max(len(row["symbol"]) for row in one["symbols"])
    for row in one["symbols"]:
        lines += wrapped(row["means"], 4 + wide, first=f"  {row['symbol'].ljust(wide)}  ")
    lines += _title("Built" if one["built"] else "Not built yet")
    if one["built"]:
        lines += wrapped(f"{', '.join(one['files'])}", 2)
        lines += wrapped(f"used by {', '.join(one['families']) or 'no published size here'}", 2)
    else:
        lines += wrapped(f"This version does not have it. It will be {', '.join(one['files'])}.", 2)
    lines += _title("Variants")
    wide = max(len(variant["name"]) for variant in one["variants"])
    for variant in one["variants"]:
        used = f" [{used_by(variant)}]" if one["built"] else ""
        lines += wrapped(f"{variant['rule']}{used}", 4 + wide, first=f"  {heading(variant['name'].ljust(wide))}  ")
    lines += [*_title("Parameters and cost"), *wrapped(one["cost"]["rule"], 2)]
    for counted in one["cost"]["counted"]:
        lines += wrapped(f"{counted['model']}, {in_words(counted)}", 4, first="  - ")
    lines += [*_title("Pitfalls"), *bullets(one["pitfalls"])]
    if one["corrections"]:
        lines += _title("Often said, and not so")
        for each in one["corrections"]:
            lines += wrapped(f"Often said: {each['said']}", 4, first="  - ")
            lines += wrapped(f"In fact: {each['fact']} [{each['source']}]", 4)
    lines += [*_title("Example"), *wrapped(one["example"]["about"], 2), ""]
    lines += [f"    {line}".rstrip() for line in one["example"]["code"].splitlines()]
    lines += ["", "  prints", *(f"    {line}" for line in one["example"]["prints"].splitlines())]
    return [*lines, *_title("Papers"), *bullets(cited(each) for each in one["sources"])]


def used_by(variant: dict[str, Any]) -> str:
    """Who has a variant: families, nobody, or that there is nothing to have yet."""
    if not variant["built"]:
        return "not built yet"
    if not variant["told_by_specs"]:
        return "any model"
    return ", ".join(variant["families"]) or "no published size here"


def cited(source: dict[str, Any]) -> str:
    """A paper in one line: title, where, section."""
    return ", ".join(part for part in (source["title"], source["where"], source["section"]) if part)


def in_words(counted: dict[str, Any]) -> str:
    """What was counted of a model, as a sentence."""
    parts, shows, said = counted["parts"], counted["shows"], []
    if "parameters" in shows:
        each = f", {counted['parameters'] // parts:,} in each of {parts}" if parts > 1 else ""
        of = _share(counted["parameters"], counted["parameters_of_model"])
        said.append(f"{counted['parameters']:,} parameters ({of} of the model){each}")
    if "flops" in shows and counted["flops_per_token"]:
        of = _share(counted["flops_per_token"], counted["flops_per_token_of_model"])
        said.append(
            f"{short(counted['flops_per_token'], 'FLOP')} ({of}) for a token at the end of {counted['context']:,}"
        )
    if "cache" in shows and counted["cache_bytes"]:
        said.append(f"{size(counted['cache_bytes'])} of cache for {counted['context']:,} tokens in {counted['dtype']}")
    return f"{counted['what']}: {'; '.join(said)}."


def _share(part: int, whole: int) -> str:
    """In per cent, with the digits that a small one needs."""
    return f"{100 * part / whole:.1g} %" if part < whole / 1000 else share(part, whole)


def _run(out: Output, one: Kind) -> None:
    example = one.example
    printed = example.run()
    document = {"name": one.name, "about": example.about, "code": example.code, "prints": printed}
    out.result(document, [*(heading(line) for line in example.code.splitlines()), "", *printed.splitlines()])
    if printed != example.prints:
        raise Failed(f"the example of {one.name!r} prints something else than its page says")


def _title(text: str) -> list[str]:
    return ["", heading(text)]


command = layers
