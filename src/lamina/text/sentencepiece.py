"""SentencePiece models (tokenizer.model, a protocol buffer; sentencepiece_model.proto), read without the package.

Also the rule by which a list of scored pieces becomes byte-pair merges, which GGUF files need as well.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lamina.errors import CheckpointError
from lamina.text.document import LARGEST, SPACE, Document, added, bpe, document, sequence, template

NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces
UNIGRAM, BPE = 1, 2
BYTES = dict.fromkeys(f"<0x{byte:02X}>" for byte in range(256))


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


class Model(NamedTuple):
    pieces: list[Piece]
    kind: int  # UNIGRAM or BPE
    byte_fallback: bool
    charsmap: bytes  # a normalisation, compiled
    space_before: bool
    single_spaces: bool  # runs of spaces count as one, those at the ends as none


def fields(data: bytes, where: str) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: an int, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(data) and shift < 70:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value
        raise CheckpointError(f"{where}: cut short or damaged at byte {at:,}; it is no SentencePiece model")

    while at < len(data):
        key = varint()
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = varint() if key & 7 == 2 else size
        if size is None or size > len(data) - at:
            raise CheckpointError(f"{where}: cut short or damaged at byte {at:,}; it is no SentencePiece model")
        yield key >> 3, data[at : at + size]
        at += size


def read_model(path: Path) -> Model:
    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes; {LARGEST:,} is the most")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    where, pieces, trainer, normalizer = str(path), [], {}, {}
    try:
        for field, value in fields(data, where):
            if field == 1:
                piece = dict(fields(value, where))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
            elif field == 2:
                trainer = dict(fields(value, where))
            elif field == 3:
                normalizer = dict(fields(value, where))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, struct.error):
        raise CheckpointError(f"{where}: its fields are not those of a SentencePiece model") from None
    kind = trainer.get(3, UNIGRAM)
    if kind not in (UNIGRAM, BPE) or not pieces:
        raise CheckpointError(f"{where}: {len(pieces)} pieces of model type {kind}; unigram (1) and BPE (2) are read")
    return Model(
        pieces,
        kind,
        bool(trainer.get(35, 0)),
        normalizer.get(2, b""),
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )


def merges_by_score(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Merges that do what SentencePiece does: of all neighbours, join those that make the piece with the best score.

    A piece may be made in several ways: `abc` of a and bc, or of ab and c. All of them get its rank.
    """
    joinable = {piece.text: number for number, piece in enumerate(pieces) if piece.kind in (NORMAL, USER, UNUSED)}
    made = []
    for text, number in joinable.items():
        for cut in range(1, len(text)):
            left, right = joinable.get(text[:cut]), joinable.get(text[cut:])
            if left is not None and right is not None:
                made.append((-pieces[number].score, number, left, right))
    return [(pieces[left].text, pieces[right].text) for _, _, left, right in sorted(made)]


def scored(pieces: list[Piece], name: str, unknown: str | None, space_before: bool, **parts: Any) -> Document:
    """A byte-pair tokenizer on text in which spaces are `▁`, without splitting into words first."""
    vocabulary = {piece.text: number for number, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        raise CheckpointError(f"{name}: {len(pieces) - len(vocabulary)} tokens are there twice; each has one id")
    fallback = all(each in vocabulary for each in BYTES)
    model = bpe(vocabulary, merges_by_score(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    before = [{"type": "Prepend", "prepend": SPACE}] if space_before else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer = sequence("normalizers", [*parts.pop("normalizers", []), *before, replace])
    return document(
        model, added_tokens=added_pieces(pieces), normalizer=normalizer, decoder=decoder(space_before), **parts
    )


def added_pieces(pieces: list[Piece]) -> list[Document]:
    return [
        added(piece.text, number, special=piece.kind != USER, normalized=False)
        for number, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER)
    ]


def decoder(space_before: bool) -> Document:
    parts: list[Document] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    parts += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    parts += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_before else []
    return {"type": "Sequence", "decoders": parts}


def precompiled(model: Model) -> list[Document]:
    charsmap = base64.b64encode(model.charsmap).decode()
    return [{"type": "Precompiled", "precompiled_charsmap": charsmap}] if model.charsmap else []


def llama(path: Path, config: dict[str, Any], special: dict[str, str]) -> Document:
    model = read_model(path)
    if model.kind != BPE or model.single_spaces:
        what = "unigram" if model.kind == UNIGRAM else "joins runs of spaces"
        raise CheckpointError(f"{path}: a model that {what}; LLaMA's is a BPE that keeps every space")
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    space = model.space_before and config.get("add_prefix_space") is not False
    return scored(model.pieces, str(path), unknown, space, normalizers=precompiled(model))


gemma = llama  # the same rules; its model says that no space goes before


def t5(path: Path, config: dict[str, Any], special: dict[str, str]) -> Document:
    """A unigram model, </s> at the end, and a hundred sentinels behind the vocabulary, the last one first."""
    model = read_model(path)
    if model.kind != UNIGRAM:
        raise CheckpointError(f"{path}: a BPE model; T5's is unigram")
    pieces = [[piece.text, piece.score] for piece in model.pieces]
    unknown = next((number for number, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), None)
    if unknown is None or special["eos"] not in (end := {piece.text: n for n, piece in enumerate(model.pieces)}):
        raise CheckpointError(f"{path}: no unknown piece or no {special['eos']}; T5's model has both")
    sentinels = int(config.get("extra_ids", 100))
    tokens = added_pieces(model.pieces)
    for number in range(sentinels):
        content = f"<extra_id_{sentinels - 1 - number}>"
        tokens.append(added(content, len(pieces)))
        pieces.append([content, 0.0])
    runs = [
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE},
    ]
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    return document(
        {"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": model.byte_fallback},
        added_tokens=tokens,
        normalizer=sequence("normalizers", precompiled(model) + (runs if model.single_spaces else [])),
        pre_tokenizer=metaspace,
        post_processor=template([], [(special["eos"], end[special["eos"]])]),
        decoder=metaspace,
    )
