"""Writes the parts of the documentation that come from the code and from measurements: docs/command-line.md,
docs/layers.md, the lines of docs/adding-a-family.md, the figures of docs/memory.md, the grid of docs/conformance.md,
tables and figures of README.md.

    python docs/build.py            write them
    python docs/build.py --check    say which are not as the code is, and write nothing

They are generated so that they cannot say what the program does not do; tests/test_docs.py runs the check.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 80  # columns of the help texts, whatever terminal this runs in
ABOUT = """# Command line

This page is generated from the program by `make docs`: it is what `lamina --help` and `lamina COMMAND --help` print.

Results go to standard output, messages and progress to standard error. `--json` prints one document, whose fields bear
the names of the Python interface. Exit status: 0 done, 1 it failed, 2 the input was wrong, 130 interrupted. A mistake
is one line, `lamina: error: ...`, which names the file, field or option, what was found and what would be right.
"""


def command_line() -> str:
    """docs/command-line.md: the help of the group, of each of its commands, and of theirs."""
    from lamina.cli.program import program

    return "\n".join([ABOUT, *_helps(program, "lamina", None)])


def _helps(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    settings = {"terminal_width": WIDTH, "max_content_width": WIDTH, **command.context_settings}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    title = "" if parent is None else f"## {context.command_path.partition(' ')[2]}\n\n"
    yield f"{title}```text\n{command.get_help(context).strip()}\n```\n"
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from _helps(found, inner, context)


def layers_table() -> str:
    """The kinds of layer: what each is, where it is built, how one gets it."""
    from lamina.catalogue import CATALOGUE

    rows = ["| layer | what it is | file |", "|---|---|---|"]
    for kind in CATALOGUE:
        files = ", ".join(f"[{file}](src/lamina/{file})" for file in kind.files) if kind.built else "not built yet"
        title = f"[{kind.title}](docs/layers.md#{kind.title.lower().replace(' ', '-')})"
        rows.append(f"| {title} | {kind.what} | {files} |")
    return "\n".join(rows) + "\n"


LAYERS = """# The sixteen kinds of layer

This page is generated from the catalogue by `make docs`; `lamina layers` prints it on a terminal, `lamina layers NAME
--run` runs an example. Families are those whose published specs have the layer, and costs are counted from such specs;
neither is typed in. The examples are run by the tests. In the equations `d` is the width of the model, `B` a batch, `T`
and `S` numbers of tokens, `D` the features of a head.
"""


def layers_page() -> str:
    """docs/layers.md: the page of every kind of layer."""
    from lamina.catalogue import CATALOGUE
    from lamina.catalogue.page import page

    contents = "\n".join(
        f"- [{kind.title}](#{kind.title.lower().replace(' ', '-')}): {kind.what}" for kind in CATALOGUE
    )
    return "\n".join([LAYERS, contents, "", *(_layer(page(kind)) for kind in CATALOGUE)])


def _layer(one: dict[str, Any]) -> str:
    from lamina.cli.layers import cited, in_words, used_by

    files = ", ".join(f"[{file}](../src/{file})" for file in one["files"])
    users = ", ".join(one["families"]) or "no published size here"
    cost = [f"- {counted['model']}, {in_words(counted)}" for counted in one["cost"]["counted"]]
    said = [
        f"- Often said: {each['said']}\n  In fact: {each['fact']} ({each['source']})" for each in one["corrections"]
    ]
    parts = [
        f"## {one['title']}\n\n{one['what']} {one['why']}",
        f"```\n{one['equation']}\n```",
        _table(("", ""), ((f"`{row['symbol']}`", row["means"]) for row in one["symbols"])),
        f"Built in {files}. Used by: {users}." if one["built"] else "**Not built yet.**",
        _table(
            ("variant", "rule", "who has it"),
            ((each["name"], each["rule"], used_by(each)) for each in one["variants"]),
        ),
        f"Cost: {one['cost']['rule']}",
        *(["\n".join(cost)] if cost else []),
        "\n".join(["Pitfalls:", "", *(f"- {each}" for each in one["pitfalls"])]),
        *(["\n".join(["Often said, and not so:", "", *said])] if said else []),
        f"Example. {one['example']['about']}",
        f"```python\n{one['example']['code']}```",
        f"```text\n{one['example']['prints']}```",
        "Papers: " + "; ".join(map(cited, one["sources"])) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)


def families_table() -> str:
    """The model types that are read and written, and the published sizes whose specs are known."""
    from lamina.families import FAMILIES, family

    rows = ["| `model_type` | published sizes known as data |", "|---|---|"]
    for model_type in FAMILIES:
        groups: dict[str, list[str]] = {}
        for size in family(model_type).sizes:
            name, _, number = size.partition("/")
            groups.setdefault(name, []).append(number)
        said = "; ".join(f"{name}: {', '.join(numbers)}" for name, numbers in groups.items())
        name = f"`{model_type}`" if family(model_type).config is not None else f"no files: {model_type}"
        rows.append(f"| {name} | {said or '-'} |")
    return "\n".join(rows) + "\n"


SHARED = ("family", "gguf", "gguf_config", "gguf_writing", "ctranslate2", "rope", "undisclosed")
"""Files of families/ that are no family."""


def family_lines() -> str:
    """What each file of a family is made of, in lines of code."""
    rows = [("file", "lines", "read a configuration", "write one", "names of weights, sizes, variants")]
    for path in sorted((ROOT / "src/lamina/families").glob("[!_]*.py")):
        if path.stem in SHARED:
            continue
        tree = ast.parse(text := path.read_text(encoding="utf-8"))
        said = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        left_out = _lines_of(said) | _lines_of(imports)
        lines = (line.strip() for line in text.splitlines())
        code = {at for at, line in enumerate(lines, 1) if line and not line.startswith("#")} - left_out
        parts = [
            len(code & _lines_of(node for node in tree.body if getattr(node, "name", "") == name))
            for name in ("spec", "config")
        ]
        counts = (len(code), *parts, len(code) - sum(parts))
        rows.append((f"[{path.name}](../src/lamina/families/{path.name})", *map(str, counts)))
    return _table(rows[0], rows[1:]) + "\n"


def _lines_of(nodes: Iterable[ast.stmt]) -> set[int]:
    return {at for node in nodes for at in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def results(name: str) -> dict[str, Any]:
    """What a benchmark measured last."""
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


def decoding_figures() -> str:
    """Tokens per second of benchmarks/decode.py, medians."""
    found = results("decode")

    def row(title: str, what: str, dtype: str) -> str:
        names = ("transformers", "llama.cpp", "eager", "compiled")
        cells = [found[what].get(f"{name} {dtype}") for name in names]
        return f"| {title} | " + " | ".join("" if cell is None else f"{cell['median']:.1f}" for cell in cells) + " |"

    rows = [
        row("decoding, float32", "decode", "float32"),
        row("decoding, bfloat16", "decode", "bfloat16"),
        row("decoding, 8-bit weights (Q8_0)", "decode", "int8"),
        row("reading 1,024 tokens, float32", "prefill", "float32"),
        row("reading 1,024 tokens, bfloat16", "prefill", "bfloat16"),
    ]
    perplexity = found["perplexity"]
    table = "\n".join(
        ["| | transformers | llama.cpp | lamina | lamina, compiled step |", "|---|---|---|---|---|", *rows]
    )
    before = f"""SmolLM2-135M, one text, {found["threads"]} threads of a two-core AVX-512 machine, every variant in the
    same run ([benchmarks/decode.py](benchmarks/decode.py), [results](benchmarks/results/decode.json)); tokens per
    second, medians of {found["rounds"]} rounds:"""
    ratios = found["ratios"]

    def of(pair: str, *dtypes: str) -> str:
        return " and ".join(f"{ratios[f'{dtype}: {pair}']:.2f}" for dtype in dtypes)

    decode, prefill = ("decode float32", "decode bfloat16"), ("prefill float32", "prefill bfloat16")
    after = f"""Medians of the rounds' own ratios, float32 and bfloat16: the compiled step decodes at
    {of("compiled / llama.cpp", *decode)} times the speed of llama.cpp ({of("compiled / llama.cpp Q8_0", "decode int8")}
    with 8-bit weights) and {of("compiled / transformers", *decode)} times that of transformers; without compiling it is
    {of("eager / transformers", *decode)} times; reading is {of("lamina / transformers", *prefill)} times. 8-bit weights
    take the perplexity of 20 kB of documentation from {perplexity["float32"]:.2f} to {perplexity["int8"]:.2f}."""
    return f"{filled(before)}\n\n{table}\n\n{filled(after)}\n"


def pair_figures() -> str:
    """Tokens per second of benchmarks/encoder_decoder.py, medians."""
    found = results("encoder_decoder")
    rows = [("texts, beams", "T5-small: transformers", "lamina", "ratio", "BART-base: transformers", "lamina", "ratio")]
    for shape in found["t5/small"]:
        cells = [found[model][shape]["decoding"][name] for model in ("t5/small", "bart/base") for name in COLUMNS]
        rows.append((shape, *(f"{cell:.2f}" if at % 3 == 2 else f"{cell:.0f}" for at, cell in enumerate(cells))))
    before = f"""What encoder-decoders write, tokens per second in {found["dtype"]}, {found["rounds"]} rounds, the same
    ids from both ([benchmarks/encoder_decoder.py](benchmarks/encoder_decoder.py),
    [results](benchmarks/results/encoder_decoder.json)):"""
    return f"{filled(before)}\n\n{_table(rows[0], rows[1:])}\n"


COLUMNS = ("transformers", "lamina", "ratio")


def filled(text: str) -> str:
    """A paragraph in lines of the width that the rest of the page has; a name or a link is never broken."""
    return textwrap.fill(" ".join(text.split()), 119, break_long_words=False, break_on_hyphens=False)


def experts_figures() -> str:
    """Seconds of benchmarks/experts.py, medians, and ratios within a round; nothing before it has been run."""
    if not (ROOT / "benchmarks/results/experts.json").is_file():
        return ""
    found = results("experts")

    def row(title: str, name: str, what: str) -> str:
        libraries = found["models"][name][what]
        cells = [f"{libraries[library]['median']:.2f}" for library in ("transformers", "lamina")]
        ratio = found["ratios"][f"{name}, {what}: transformers / lamina"]
        return f"| {title}, {what} | {' | '.join(cells)} | {ratio:.2f} |"

    titles = {"switch": "Switch (base-8's layers)", "mixtral": "Mixtral-like"}
    rows = [row(title, name, what) for name, title in titles.items() for what in ("forward", "forward and backward")]
    table = "\n".join(["| | transformers | lamina | ratio |", "|---|---|---|---|", *rows])
    more = found["ratios"]["one layer, 64 / 8 experts"]
    return f"""Mixtures of experts, width 512, 8 experts, float32, {found["threads"]} threads of the same machine
([benchmarks/experts.py](benchmarks/experts.py), [results](benchmarks/results/experts.json)); seconds for 4 x 256
tokens, medians of {found["rounds"]} rounds, and the median of the rounds' own ratios:

{table}

A layer of 64 experts, two of them for each of 4,096 tokens, takes {more:.2f} times as long as one of 8.
"""


def startup_figures() -> str:
    """Seconds of benchmarks/startup.py, medians."""
    found = results("startup")
    seconds = {name: f"{value:.2f} s" for name, value in found.items() if name.endswith("_s")}
    said = f"""`lamina --help` takes {seconds["help_s"]} and `import lamina` {seconds["import_lamina_s"]};
    `lamina account llama3.1/405b` takes {seconds["account_405b_beyond_torch_s"]} beyond `import torch`.
    Loading 540 MB of float32 takes {seconds["lamina_load_s"]} (transformers {seconds["transformers_load_s"]}), and
    every weight has then been read once, to warn of values that are not finite; until the first token it is
    {seconds["lamina_load_and_first_token_s"]} (transformers {seconds["transformers_load_and_first_token_s"]}).
    The peak is {found["peak_over_weights"]:.2f} times the size of the weights
    ([benchmarks/startup.py](benchmarks/startup.py), [results](benchmarks/results/startup.json))."""
    return filled(said) + "\n"


def sparse_figures() -> str:
    """What benchmarks/sparse.py measured."""
    found = results("sparse")
    rows = []
    for length, one in found["longformer"].items():
        seconds = {name: statistics.median(taken) for name, taken in one["seconds"].items()}
        peaks = {name: peak / 2**20 for name, peak in one["peak_bytes"].items()}
        rows.append(
            f"| Longformer, base shape, two layers, {int(length):,} tokens | {seconds['transformers']:.2f} s,"
            f" {peaks['transformers']:,.0f} MiB | {seconds['lamina']:.2f} s, {peaks['lamina']:,.0f} MiB |"
        )
    for what in ("forward", "forward and backward"):
        dense, window = (statistics.median(found["kernels"][what][name]) for name in ("dense", "window"))
        rows.append(
            f"| causal window of 512 in 16,384 tokens, 12 heads of 64, {what} | {dense:.2f} s (dense, fused) |"
            f" {window:.2f} s |"
        )
    table = "\n".join(["| | transformers or torch | lamina |", "|---|---|---|", *rows])
    most = max(found["kernels"]["times_linear"].values())
    return f"""{found["threads"]} threads, float32, medians of {found["rounds"]} rounds in turns, peaks beyond the
loaded model ([benchmarks/sparse.py](benchmarks/sparse.py), [results](benchmarks/results/sparse.json)):

{table}

From 4,096 to 65,536 tokens the time of that window grows as the text does, within {100 * (most - 1):.0f} %; its cache
holds {found["cache_bytes"]["window of 512"]["8512"] / 2**20:.1f} MiB after 1,000 tokens and after 8,500.
"""


def memory_figures() -> str:
    """What benchmarks/memory.py measured: each memory's seeds, one after the other."""
    found = results("memory")
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in found["runs"]:
        cells.setdefault(run["model"], {"pass-key": [], "recall": []})[run["task"]].append(run)
    rows = [
        (
            name,
            *(", ".join(f"{run['right']:.3f} ({run['steps']})" for run in runs) or "not run" for runs in row.values()),
        )
        for name, row in cells.items()
    ]
    seconds = [run["seconds"] for run in found["runs"]]
    before = f"""Right answers at the end of 512 held-out texts, a number for each seed, after so many steps; chance is
    {found["chance"]:.4f}. A run took {min(seconds):.0f} to {max(seconds):.0f} seconds of one core
    ([benchmarks/memory.py](../benchmarks/memory.py), [results](../benchmarks/results/memory.json)):"""
    return f"{filled(before)}\n\n{_table(('memory', 'pass-key', 'recall'), rows)}\n"


def retrieval_figures() -> str:
    """What benchmarks/retrieval.py measured: the probes around 95 % of the 10 nearest, and a build."""
    found = results("retrieval")
    searching, building = found["searching"], found["building"]
    rows = []
    for engine in ("lance", "faiss"):
        one = searching[engine]
        seconds = one.get("copied_and_indexed_seconds", one.get("indexed_and_measured_seconds"))
        first = next(i for i, row in enumerate(one["probes"]) if row["recall"] >= 0.9)
        for number, row in enumerate(one["probes"][first : first + 3]):
            name, made = ("", "") if number else (f"{engine}, {one['lists']:,} lists", f"{seconds:.0f} s")
            rows.append((name, str(row["probes"]), f"{row['recall']:.3f}", f"{row['times_exact']:.1f}", made))
    held = building["own_memory_mib"].values()
    before = f"""What they find and how fast, among {found["rows"]:,} chunks of real documentation and code (MiniLM,
    {searching["queries"]:,} queries in batches, {found["threads"]} threads; exact search answers
    {searching["exact_queries_per_second"]:.0f} a second; [benchmarks/retrieval.py](../benchmarks/retrieval.py),
    [results](../benchmarks/results/retrieval.json)):"""
    chosen = searching["faiss"]
    after = f"""Asked for 95 % of them, faiss looks into {chosen["chosen_probes"]} lists by itself and finds
    {chosen["chosen_recall"]:.3f} at {chosen["chosen_times_exact"]:.1f} times the rate of exact search. A build of
    {building["text_bytes"] / 1e6:.1f} MB of text, {building["chunks"]:,} chunks, took {building["seconds"] / 60:.0f}
    minutes of {building["threads"]} cores ({building["chunks_per_second"]:.0f} chunks a second, `--dtype bfloat16`),
    and held {max(held):,} MiB of its own at most in its second fifth and its last."""
    heads = ("index", "lists looked into", "of the 10 nearest", "times exact search", "made in")
    return f"{filled(before)}\n\n{_table(heads, rows)}\n\n{filled(after)}\n"


def facts_figures() -> str:
    """What benchmarks/memory_facts.py found; nothing before it has been run."""
    if not (ROOT / "benchmarks/results/memory_facts.json").is_file():
        return ""
    found = results("memory_facts")
    rows: dict[str, list[dict[str, Any]]] = {}
    for run in found["runs"]:
        rows.setdefault(run["model"], []).append(run)
    table = [
        (
            name,
            f"{runs[0]['flops']:,}",
            f"{runs[0]['parameters']:,}",
            " ".join(f"{run['known']:.3f}" for run in runs),
        )
        for name, runs in rows.items()
    ]
    before = f"""{found["facts"]:,} facts, {found["steps"]:,} steps; the share that is known, a number for each seed;
    chance is {found["chance"]:.4f} ([benchmarks/memory_facts.py](../benchmarks/memory_facts.py),
    [results](../benchmarks/results/memory_facts.json)):"""
    return f"{filled(before)}\n\n{_table(('second layer', 'FLOPs a token', 'parameters', 'known'), table)}\n"


def values_figures() -> str:
    """What benchmarks/memory_values.py measured; nothing before it has been run."""
    if not (ROOT / "benchmarks/results/memory_values.json").is_file():
        return ""
    found = results("memory_values")
    counts = list(next(iter(found["microseconds"].values())))
    rows = [
        (name, *(f"{times[count]['median']:.0f}" for count in counts), f"{found['ratios'][name]:.2f}")
        for name, times in found["microseconds"].items()
    ]
    before = f"""Microseconds a token, width 1,024, 4 heads of 32 values, keys of 256, threads: {found["threads"]},
    medians of {found["rounds"]} rounds, and the median of the rounds' own ratios
    ([benchmarks/memory_values.py](../benchmarks/memory_values.py),
    [results](../benchmarks/results/memory_values.json)):"""
    return f"{filled(before)}\n\n{_table(('', *(f'{count} values' for count in counts), 'ratio'), rows)}\n"


def tokens_figures() -> str:
    """What benchmarks/memory_tokens.py found; nothing before it has been run."""
    if not (ROOT / "benchmarks/results/memory_tokens.json").is_file():
        return ""
    found = results("memory_tokens")
    rows = [
        (name, *(" ".join(f"{run[what]:.3f}" for run in runs) for what in ("accuracy", "cached")))
        for name, runs in found["ways"].items()
    ]
    before = f"""48 tokens in segments of 16: in the first stands one of 16 values, and the last token asks for it.
    Shares of 1,000 texts that are answered rightly after {found["steps"]:,} steps, each with its seed; chance is
    {found["chance"]:.4f}; "cached" is read in other pieces than the segments
    ([benchmarks/memory_tokens.py](../benchmarks/memory_tokens.py),
    [results](../benchmarks/results/memory_tokens.json)):"""
    return f"{filled(before)}\n\n{_table(('', 'whole', 'cached'), rows)}\n"


def retro_figures() -> str:
    """What benchmarks/retro.py measured, as far as it has been run."""
    if not (ROOT / "benchmarks/results/retro.json").is_file():
        return ""
    found, parts = results("retro"), []
    if "small" in found:
        runs = found["small"]["runs"]
        names = ("plain", "retro_without_neighbours", "retro_other_neighbours", "retro")
        rows = [
            (_share(row["share"]), f"{row['chunks']:,}", *(_each(runs, i, name, "bits_per_byte") for name in names))
            for i, row in enumerate(runs[0]["overlap"])
        ]
        rows.append(("everything", "", *(_each(runs, None, name, "bits_per_byte") for name in names)))
        header = ("a neighbour holds", "chunks", "the twin", "RETRO without", "with those of other chunks", "RETRO")
        seeds = "in one run" if len(runs) == 1 else f"a number for each of {len(runs)} runs"
        parts += [f"The small model, bits a byte, {seeds}:", _table(header, rows)]
    for part, name, what in (
        ("fitted", "related", "SmolLM2 on the beginnings of held-out pages"),
        ("fitted_whole", "related", "SmolLM2 on whole held-out pages"),
        ("fitted", "unrelated", "SmolLM2 on Shakespeare, neighbours from the pages"),
    ):
        if name in found.get(part, {}):
            runs = found[part][name]["runs"]
            names = ("smollm2", "other_neighbours", "with_neighbours")
            rows = [
                (
                    "everything" if i is None else _share(runs[0]["overlap"][i]["share"]),
                    "" if i is None else f"{runs[0]['overlap'][i]['chunks']:,}",
                    *(_each(runs, i, name, "perplexity") if name in runs[0] else "" for name in names),
                    _changes(runs, i),
                )
                for i in ([*range(len(runs[0]["overlap"])), None] if name == "related" else [None])
            ]
            header = ("a neighbour holds", "chunks", "SmolLM2", "with those of other chunks", "with its own", "")
            parts += [f"{what}, perplexity:", _table(header, rows)]
    if "fitting" in found:
        rows = [
            (
                one["what"],
                f"{one['rate']:g}",
                str(one["gates"]),
                str(one["seed"]),
                f"{100 * one['related']:+.1f} %",
                f"{100 * one['unrelated']:+.1f} %",
            )
            for one in found["fitting"]
        ]
        parts += [
            "Ways to train it, 12 steps each, by what they change:",
            _table(("", "rate", "gates, times it", "seed", "held-out pages", "Shakespeare"), rows),
        ]
    return "\n\n".join(parts) + "\n"


def _share(share: float) -> str:
    return f"at most {100 * share:g} %"


def _each(runs: list[dict], row: int | None, name: str, figure: str) -> str:
    """A number for each run, or one where all have the same."""
    places = 3 if figure == "bits_per_byte" else 2
    found = [f"{(run if row is None else run['overlap'][row])[name][figure]:.{places}f}" for run in runs]
    return ", ".join(found[:1] if len(set(found)) == 1 else found)


def _changes(runs: list[dict], row: int | None) -> str:
    """By how much neighbours change the perplexity, for each run."""
    parts = [run if row is None else run["overlap"][row] for run in runs]
    return ", ".join(
        f"{100 * (one['with_neighbours']['perplexity'] / one['smollm2']['perplexity'] - 1):+.1f} %" for one in parts
    )


def data_figures() -> str:
    """What benchmarks/data.py measured, as far as it has been run."""
    found = results("data")
    rows = [
        f"| {name} | {one['text_bytes'] / 1e6:,.0f} MB | {one['text_bytes'] / one['processor_seconds'] / 1e6:,.1f} |"
        f" {one['peak_bytes'] / 2**20:,.0f} MiB |"
        for name, one in found["rows"].items()
    ]
    said = """`lamina data prepare` on one core, in seconds of the processor, start and imports among them, and the most
    memory that the process held ([benchmarks/data.py](../benchmarks/data.py),
    [results](../benchmarks/results/data.json)):"""
    return (
        f"{filled(said)}\n\n" + "\n".join(["| source | size | MB a second | peak |", "|---|---|---|---|", *rows]) + "\n"
    )


def surgery_figures() -> str:
    """What benchmarks/surgery.py found, as far as it has been run."""
    if not (ROOT / "benchmarks/results/surgery.json").is_file():
        return ""
    found, parts = results("surgery"), []
    rows = [
        (
            name,
            one["promises"][0]["kept"],
            one["found"],
            f"{one['divergence']:.2g}",
            f"{100 * one['agreement']:.1f} %",
            *(_pair(one, figure, "{:.2f}", 1) for figure in ("perplexity",)),
            *(_pair(one, figure, "{:.1f}", 2**20) for figure in ("cache_bytes",)),
            *(_pair(one, figure, "{:.0f}", 1e6) for figure in ("parameters",)),
        )
        for name, one in found["plans"].items()
    ]
    header = ("plan", "promise", "verdict", "KL", "same next token", "perplexity", "cache, MiB", "million parameters")
    if rows:
        parts.append(_table(header, rows))
    if "large" in found:
        large = found["large"]["rows"]
        rows = [
            (
                f"`{name}`",
                f"{one['written_bytes'] / 1e9:.1f} GB",
                f"{one['own_bytes'] / 2**20:,.0f} MiB",
                f"{one['all_bytes'] / 2**20:,.0f} MiB",
                f"{one['seconds']:.0f} s",
            )
            for name, one in large.items()
        ]
        said = f"""Streaming: the 30 layers {found["large"]["times"]} times (`layers`), and operations on what that
        gave, each in a process of its own; memory is the most beyond that of a process that has imported the same, its
        own and with the pages of files that it has mapped:"""
        parts += [filled(said), _table(("operation", "written", "memory", "with mapped pages", "time"), rows)]
    return "\n\n".join(parts) + "\n"


def _pair(one: dict[str, Any], figure: str, form: str, unit: float) -> str:
    before, after = (one[side][figure] for side in ("before", "after"))
    return "-" if before is None else f"{form.format(before / unit)} to {form.format(after / unit)}"


GRID = {
    "cached": ("cached decoding", "a padded row decodes", "decoding with neighbours", "the compiled step"),
    "written": ("generating twice", "what was generated", "beams with"),
    "padded": ("padded on", "sources padded", "the order of rows", "a row of padding"),
    "NaN": ("NaN in", "a query that sees"),
    "packed": ("packed",),
    "causal": ("later tokens", "attention reaches", "neighbours are", "without neighbours"),
    "backends": ("backends agree", "a backend that cannot"),
    "state": ("a text read before", "the same input", "recording", "attention that is asked for"),
    "router": ("the loss of a router", "padding is not in the loss"),
    "training": ("training that goes on",),
    "files": ("what is saved", "what is tied", "the spec", "a cast"),
}
"""Columns of the grid, and how the names of their rows begin. Refusals and finite weights are alike in all."""


def grid() -> str:
    """What benchmarks/conformance.py found of every kind of layer and every family; nothing before it has been run."""
    if not (ROOT / "benchmarks/results/conformance.json").is_file():
        return ""
    found, reasons, rows = results("conformance"), {}, []
    for name, said in found.items():
        cells = []
        for column, begins in GRID.items():
            these = [row for title, row in said.items() if title.startswith(begins)]
            cells.append(_worst(these))
            if cells[-1] == "-":
                why = "; ".join(dict.fromkeys(row["note"] for row in these))
                reasons.setdefault((column, why), []).append(name)
        rows.append((name, *cells))
    whys = [f"- {column}, {why}: {_some(names)}" for (column, why), names in reasons.items()]
    return f"{_table(('', *GRID), rows)}\n\nWhat was not tried, and why:\n\n" + "\n".join(whys) + "\n"


def _worst(rows: list[dict[str, Any]]) -> str:
    verdicts = {row["verdict"] for row in rows}
    if "fails" in verdicts:
        return "**fails**"
    worst = max((row.get("worst", 0.0) for row in rows), default=0.0)
    return "-" if verdicts <= {"not tried"} else f"{worst:.0e}" if worst else "0"


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:8])} and {len(names) - 8} others"


def placed(text: str, name: str, content: str) -> str:
    """`text` with what stands between the two marks of `name` replaced."""
    begin, end = f"<!-- generated: {name} -->\n", f"<!-- end: {name} -->\n"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"the page must have the lines {begin.strip()} and {end.strip()} once each")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{content}{end}{rest.partition(end)[2]}"


def pages() -> dict[Path, str]:
    """Every generated file, and what it must hold."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    parts = {
        "layers": layers_table,
        "families": families_table,
        "decoding": decoding_figures,
        "experts": experts_figures,
        "pairs": pair_figures,
        "startup": startup_figures,
        "sparse": sparse_figures,
    }
    for name, part in parts.items():
        text = placed(text, name, part())
    adding = ROOT / "docs/adding-a-family.md"
    measured = {
        "data": ("data", data_figures),
        "memory": ("memory", memory_figures),
        "product-keys": ("values", values_figures),
        "memory-tokens": ("tokens", tokens_figures),
        "retrieval": ("engines", retrieval_figures),
        "retro": ("retro", retro_figures),
        "conformance": ("grid", grid),
        "surgery": ("plans", surgery_figures),
    }
    memories = {
        path: placed(path.read_text(encoding="utf-8"), mark, figures())
        for path, (mark, figures) in ((ROOT / f"docs/{page}.md", each) for page, each in measured.items())
    }
    values = ROOT / "docs/product-keys.md"
    memories[values] = placed(memories[values], "facts", facts_figures())
    return memories | {
        ROOT / "docs/command-line.md": command_line(),
        ROOT / "docs/layers.md": layers_page(),
        adding: placed(adding.read_text(encoding="utf-8"), "lines", family_lines()),
        readme: text,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when one is stale")
    check = parser.parse_args().check
    stale = {path: text for path, text in pages().items() if not path.is_file() or path.read_text() != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'not as the code is: run make docs' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
