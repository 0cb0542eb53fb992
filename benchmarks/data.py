"""How fast `lamina data prepare` is, and what it holds: plain, JSONL and gzipped, a given tokenizer and one to train,
and a single line without an end.

    python benchmarks/data.py --text FILE [--megabytes 30] [--large 300] [--line 1000] [--only NAME ...] [--json FILE]

FILE is repeated until it has the size. Each command is a process of its own; its time is also that of the processor, of
all its threads, which others on the machine change least, and its memory the most that the system saw it hold
(ru_maxrss). Rows that the JSON already has are not measured again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 8192


@dataclass(frozen=True, kw_only=True)
class Case:
    """A source, and how it is prepared. `size`: which of the sizes it has."""

    kind: str = "text"  # text, jsonl, gz, line: a text without a line end; row: a row of JSONL of that size
    tokenizer: str = "given"  # given: a BPE that was trained on the text before
    size: str = "megabytes"
    more: tuple[str, ...] = ()


CASES = {
    "text, lines, given BPE": Case(more=("--lines",)),
    "text as one document, given BPE": Case(),
    "JSONL, given BPE": Case(kind="jsonl"),
    "gzipped text, lines, given BPE": Case(kind="gz", more=("--lines",)),
    "text, lines, new BPE": Case(tokenizer=f"train:bpe:{VOCABULARY}", more=("--lines",)),
    "text as one document, new characters": Case(tokenizer="characters"),
    "large text, lines, given BPE": Case(size="large", more=("--lines",)),
    "one line, bytes": Case(kind="line", tokenizer="bytes", size="line", more=("--lines",)),
    "one row of JSONL, bytes": Case(kind="row", tokenizer="bytes", size="line", more=("--damaged", "1")),
}


def blocks(text: str, size: int) -> Iterator[str]:
    """The text, over and over, until it has `size` characters."""
    while size > 0:
        yield text[:size]
        size -= len(text)


def written(case: Case, text: str, size: int, folder: Path) -> Path:
    """The source of a case."""
    if case.kind == "gz":
        path = folder / "text.txt.gz"
        with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as file:
            file.writelines(blocks(text, size))
        return path
    path = folder / ("rows.jsonl" if case.kind in ("jsonl", "row") else "text.txt")
    with open(path, "w", encoding="utf-8") as file:
        if case.kind == "jsonl":
            for block in blocks(text, size):
                file.writelines(json.dumps({"text": line}) + "\n" for line in block.splitlines() if line)
        elif case.kind == "row":
            file.write('{"text": "')
            file.writelines("x" * min(1 << 20, size - at) for at in range(0, size, 1 << 20))
            file.write('"}\n{"text": "the end"}\n')
        elif case.kind == "line":
            file.writelines(block.replace("\n", " ") for block in blocks(text, size))
        else:
            file.writelines(blocks(text, size))
    return path


def measured(source: Path, output: Path, tokenizer: str, more: tuple[str, ...]) -> dict[str, Any]:
    """What the command took: seconds by the clock and of the processor, and bytes at the peak."""
    command = [sys.executable, "-m", "lamina", "data", "prepare", str(source), "-o", str(output)]
    command += ["--tokenizer", tokenizer, "--json", *more]
    begin = time.perf_counter()
    log = output.with_suffix(".out")
    with open(log, "wb") as said:
        process = os.posix_spawn(
            command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, said.fileno(), 1)]
        )
        _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: status {os.waitstatus_to_exitcode(status)}")
    part = json.loads(log.read_text())["parts"]["."]
    return {
        "bytes": source.stat().st_size,
        "tokens": sum(part["columns"].values()),
        "documents": part["documents"],
        "damaged": part["damaged"],
        "seconds": time.perf_counter() - begin,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a text of some megabytes")
    parser.add_argument("--megabytes", type=int, default=30)
    parser.add_argument("--large", type=int, default=300)
    parser.add_argument("--line", type=int, default=1000)
    parser.add_argument("--only", nargs="*", choices=CASES, metavar="NAME", help=f"some of: {'; '.join(CASES)}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"text": options.text.name, "cores": os.cpu_count(), "machine": platform.machine()}
    found |= {"rows": {}}
    if options.json and options.json.is_file():
        found = json.loads(options.json.read_text())
    text = options.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "given"
        for name in options.only or CASES:
            if name in found["rows"]:
                continue
            case = CASES[name]
            if case.tokenizer == "given" and not given.is_dir():
                measured(options.text, given, f"train:bpe:{VOCABULARY}", ("--special", "gpt"))
            source = written(case, text, getattr(options, case.size) * 1_000_000, Path(folder))
            tokenizer = str(given) if case.tokenizer == "given" else case.tokenizer
            row = measured(source, Path(folder) / "out", tokenizer, ("--force", *case.more))
            source.unlink()
            row["text_bytes"] = getattr(options, case.size) * 1_000_000  # as it is unpacked
            found["rows"][name] = row
            speed = row["text_bytes"] / row["processor_seconds"] / 1e6
            print(f"{name:38} {speed:7.2f} MB/s of a core, {row['peak_bytes'] / 2**20:7.0f} MiB", flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
