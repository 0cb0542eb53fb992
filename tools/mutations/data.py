"""Features of `data/`, and how to delete or bend each: file -> (feature, snippet, replacement)."""

from __future__ import annotations

ALSO: dict[str, tuple[str, ...]] = {
    "data/writer.py": ("tests/data/test_prepare.py",),
}
"""Tests of a file beside those that its name tells."""

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "data/column.py": [
        ("column: ids beyond the vocabulary", "int(found.max()) >= self.vocabulary", "False"),
        ("column: documents begin where others end", "max(start - base, 1)", "max(start - base, 0) + 1"),
        ("column: a shard begins a document", "if start <= base < stop:", "if start < base < stop:"),
        ("column: copies without maps", 'self.__dict__ | {"_maps": {}}', "self.__dict__"),
    ],
    "data/division.py": [
        ("prepare: drawn from each group", 'int.from_bytes(digest, "little") % (after - first)', "0"),
    ],
    "data/lost.py": [
        ("prepare: characters that vanish", "tally.lose(text.count(letter), letter)", "tally.lose(1, letter)"),
        ("prepare: unknown tokens", "tally.lose(ids.count(self.unknown))", "pass"),
    ],
    "data/order.py": [
        ("order: another each epoch", "{self.seed} {epoch}", "{self.seed}"),
        ("order: cycle walking", "while beyond.size:", "while False:"),
        ("order: keys", "_mixed(right + keys[i])", "_mixed(right)"),
        ("order: rounds", "ROUNDS = 8", "ROUNDS = 2"),
    ],
    "data/prepare.py": [
        (
            "prepare: where long texts are cut",
            "at = cut_place(rest[: PIECE + 1024], PIECE, self.tokenizer)",
            "at = PIECE",
        ),
        ("prepare: labels of words", "labels[firsts[firsts >= 0]] = numbers[firsts >= 0]", "labels[:] = 0"),
    ],
    "data/prepared.py": [
        ("prepared: sizes", "if size != expected:", "if False:"),
        ("prepared: hashes", "if found != expected:", "if False:"),
        ("prepared: another tokenizer", "if tokenizer.hash != self.tokenizer_hash:", "if False:"),
        ("prepared: changed sources", "sha256(path) != source.sha256", "False"),
        ("prepared: ends grow", "(ends[1:] <= ends[:-1]).any()", "False"),
    ],
    "data/sources.py": [
        ("sources: damaged rows stop", "if self.damaged > self.allowed * self.rows:", "if False:"),
        ("sources: lost characters stop", "if self.lost > self.allowed * self.characters:", "if False:"),
        ("sources: lost characters stop at once", "if self.characters >= ENOUGH:", "if False:"),
        ("sources: characters lost oftenest", "key=lambda letter: -self.letters[letter]", "key=lambda letter: letter"),
        (
            "sources: a byte order mark",
            "text = text[1:]\n                tally.mended += 1\n        yield",
            "pass\n        yield",
        ),
        ("sources: skipping", 'bad = bad or characters == "skip"', "pass"),
        ("sources: a separator across pieces", "keep = len(separator) - 1", "keep = 0"),
        ("sources: rows too long", 'if len(line) == LONGEST and not line.endswith(b"\\n"):', "if False:"),
    ],
    "data/training.py": [
        ("training: sentinels", "reversed(range(100))", "range(100)"),
        ("training: an unknown character", 'if "unk" in roles and kind == "characters":', "if False:"),
        ("training: characters are sorted", "enumerate(sorted(found))", "enumerate(reversed(sorted(found)))"),
        ("training: what stands around", "if before or behind:", "if False:"),
    ],
    "data/windows.py": [
        ("windows: positions restart", "places - np.maximum.accumulate(places * begins)", "places"),
        ("windows: documents", "np.cumsum(begins)", "0 * begins"),
        ("windows: aligned", "row * self.length if self.aligned else row", "row"),
        ("packed: lookahead", "if len(left) == lookahead:", "if False:"),
        ("packed: too long", 'self.long and longer == "refuse"', "False"),
        ("packed: pieces that share a token", 'length if longer == "overlap" else room', "room"),
    ],
    "data/workplace.py": [
        ("prepare: the journal's key", 'if found.get("key") == key:', 'if found.get("key"):'),
        ("prepare: what a killed writer left", "remove(partial)", "pass"),
        ("prepare: one process", "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    ],
    "data/writer.py": [
        ("writer: the end token", "column.finish(self.end)", "column.finish(None)"),
        ("writer: ids", "not 0 <= ids.min() <= ids.max() < self.vocabulary", "False"),
        ("writer: cancel", "self.files[0].truncate(self.tokens * self.dtype.itemsize)", "pass"),
        ("writer: back to the state", "file.truncate(size)", "pass"),
        ("writer: shards after the state", "if path.name not in known:", "if False:"),
    ],
}
