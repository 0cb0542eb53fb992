"""Do lamina's token ids equal llama.cpp's? Counts documents on which they do, for the tokenizer inside a GGUF file.

    python benchmarks/tokenizer_parity.py [FOLDER ...] [--model FILE.gguf] [--python PYTHON] [--json]

llama.cpp comes from the package xllamacpp, in an environment of its own: `--python` names its interpreter; without it
one is made with venv and pip in ~/.cache/lamina/xllamacpp. The server it starts listens on the loopback address only.
Documents are the text files of the folders (default: the standard library of this Python), and chat markup.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from lamina.text import Tokenizer, from_gguf
from lamina.weights.gguf import GGUFFile

PACKAGE = "xllamacpp==2026.10.11549"
SUFFIXES = (".txt", ".rst", ".md", ".py", ".c", ".h", ".html", ".json", ".toml", ".gz")
# Runs in the environment of llama.cpp: starts its server on loopback, asks it for the ids of each line's document.
ORACLE = r"""
import json, sys, urllib.request, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.warmup, parameters.n_ctx, parameters.n_parallel, parameters.verbosity = False, 256, 1, -1
parameters.port = 0
server = xllamacpp.Server(parameters)
address = server.listening_address
for line in sys.stdin:
    document = json.loads(line)
    data = {"content": document, "add_special": True, "parse_special": True}
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(address + "/tokenize", json.dumps(data).encode(), kind)
    print(json.dumps(json.load(urllib.request.urlopen(request))["tokens"]), flush=True)
"""


def main() -> int:
    options = parse()
    with GGUFFile(options.model) as file:
        tokenizer = from_gguf(file.metadata, options.model.name)
        pre = file.metadata.get("tokenizer.ggml.pre")
    documents = gather(options.folders, options.most) + chats(tokenizer)
    begun = time.perf_counter()
    ours = [tokenizer.encode(text) for _, text in documents]
    seconds = time.perf_counter() - begun
    theirs = oracle(options.python or environment(), options.model, [text for _, text in documents])
    rows: dict[str, list[int]] = {}
    differing = []
    for (group, text), one, other in zip(documents, ours, theirs, strict=True):
        row = rows.setdefault(group, [0, 0, 0])
        row[0] += 1
        row[1] += one == other
        row[2] += len(other)
        if one != other:
            at = next(
                (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
            )
            differing.append(
                {
                    "group": group,
                    "start": text[:60],
                    "token": at,
                    "ours": one[at : at + 8],
                    "theirs": other[at : at + 8],
                }
            )
    size = sum(len(text.encode()) for _, text in documents)
    result = {
        "model": options.model.name,
        "pre": pre,
        "documents": len(documents),
        "equal": sum(row[1] for row in rows.values()),
        "tokens": sum(row[2] for row in rows.values()),
        "bytes": size,
        "megabytes_per_second": round(size / seconds / 1e6, 2),
        "groups": {group: dict(zip(("documents", "equal", "tokens"), row, strict=True)) for group, row in rows.items()},
        "differing": differing[:20],
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return 0 if result["equal"] == result["documents"] else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path(sysconfig.get_paths()["stdlib"])])
    parser.add_argument("--model", type=Path, help="a GGUF file; default: SmolLM2 in lamina's data directory")
    parser.add_argument("--python", type=Path, help="an interpreter that has xllamacpp")
    parser.add_argument("--most", type=int, default=500, help="documents of each folder (default 500)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.model is None:
        data = Path(os.environ.get("LAMINA_DATA") or Path.home() / ".local/share/lamina") / "smollm2-135m"
        options.model = next(iter(sorted(data.glob("*.gguf"))), None) or parser.error(f"no {data}/*.gguf: give --model")
    return options


def gather(folders: list[Path], most: int) -> list[tuple[str, str]]:
    """(folder, text), the same choice every time; bytes that are no UTF-8 and files above 400 kB are left out."""
    documents = []
    for folder in folders:
        paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        random.Random(0).shuffle(paths)
        texts: list[tuple[str, str]] = []
        for path in paths:
            if len(texts) == most:
                break
            try:
                data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                text = data.decode()
            except (UnicodeDecodeError, gzip.BadGzipFile, EOFError):
                continue
            if 0 < len(text) < 400_000:
                texts.append((str(folder), text))
        documents += texts
    return documents


def chats(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Conversations, and edge cases: runs of spaces before digits, line ends, every script, markup in odd places."""
    texts = [
        *("a\n\n1. b\n\n\n2. c", "x  7   8\t9", "1234567890 12 345", "  \n  \n\n  x", "don't I'LL we've"),
        *("naïve café ñandú", "日本語のテキスト 中文 한국어", "🙂🙃 👩‍👩‍👧 🇩🇪", "½ ² ³ Ⅷ ٣ ४", "\r\n\r\nx\r"),
        *("Ελληνικά русский עברית العربية हिन्दी ไทย", "\u00a0\u2003x\u3000y", "", "CamelCase HTTPServer x_y"),
        *("<|im_start|>user\nHi<|im_end|>\n", "<|im_end|><|im_end|> <|endoftext|>x", "<|im_end"),
    ]
    texts = [("markup and edges", text) for text in texts]
    if tokenizer.templates:
        for turns in range(1, 9):
            contents = [f"{i}. What about\n\n  {10**i} things?" for i in range(turns)]
            roles = ("user", "assistant") * turns
            messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
            texts.append(("markup and edges", tokenizer.chat(messages)))
    return texts


def environment() -> Path:
    folder = Path.home() / ".cache/lamina/xllamacpp"
    python = folder / "bin/python"
    if not python.exists():
        print(f"making {folder} with {PACKAGE}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", PACKAGE], check=True)
    return python


def oracle(python: Path, model: Path, texts: list[str]) -> list[list[int]]:
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    command = [str(python), "-c", ORACLE, str(model.resolve())]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama.cpp failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def show(result: dict) -> None:
    print(f"{result['model']} (pre-tokenizer {result['pre']}), lamina against llama.cpp")
    print(f"{'documents':>10} {'equal':>7} {'tokens':>10}  from")
    for group, row in result["groups"].items():
        print(f"{row['documents']:>10} {row['equal']:>7} {row['tokens']:>10,}  {group}")
    total = f"{result['documents']:>10} {result['equal']:>7} {result['tokens']:>10,}"
    print(f"{total}  all, {result['megabytes_per_second']} MB/s")
    for case in result["differing"]:
        print(f"differs at token {case['token']}: ours {case['ours']}, theirs {case['theirs']}, in {case['start']!r}")


if __name__ == "__main__":
    sys.exit(main())
