"""The contents of tokenizer.json (the format of Hugging Face's tokenizers): checked, built, made from parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

Document = dict[str, Any]
LARGEST = 1 << 27  # bytes of a tokenizer file; the largest published ones have 34 million
SPACE = "▁"  # SentencePiece writes a space like this


@contextmanager
def rust(what: str) -> Iterator[None]:
    """Errors of the tokenizers package, which raises bare Exception, and panics that are not even that, as ours."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            line = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{what}: the tokenizers package cannot work with it: {line}") from error
        raise


def read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise CheckpointError(f"{path}: {size:,} bytes; {LARGEST:,} is the most")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start:,}; tokenizer files are UTF-8") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Anything else is refused with its place."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; not JSON") from None
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON {type(value).__name__}; an object is needed")
    return value


def added(content: str, token: int, special: bool = True, **flags: bool) -> Document:
    """A token that is looked for in the text before anything else."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": token, "content": content, "special": special} | plain | flags


def template(before: Iterable[tuple[str, int]], after: Iterable[tuple[str, int]]) -> Document:
    """A post-processor that puts special tokens before and after a text."""
    before, after = list(before), list(after)

    def special(content: str, segment: int) -> Document:
        return {"SpecialToken": {"id": content, "type_id": segment}}

    def sequence(name: str, segment: int) -> list[Document]:
        first = [special(content, segment) for content, _ in before] if name == "A" or not after else []
        return [*first, {"Sequence": {"id": name, "type_id": segment}}, *(special(c, segment) for c, _ in after)]

    tokens = {content: {"id": content, "ids": [token], "tokens": [content]} for content, token in [*before, *after]}
    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": tokens,
    }


def byte_level(add_prefix_space: bool = False, use_regex: bool = True) -> Document:
    flags = {"add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel"} | flags


def sequence(kind: str, parts: list[Document]) -> Document | None:
    """`kind`: normalizers, pretokenizers or decoders."""
    return None if not parts else parts[0] if len(parts) == 1 else {"type": "Sequence", kind: parts}


def bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **more: Any) -> Document:
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return model | more | {"vocab": vocabulary, "merges": merges}


def document(model: Document, **parts: Any) -> Document:
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    return whole | {"pre_tokenizer": None, "post_processor": None, "decoder": None} | parts | {"model": model}


def vocabulary_of(model: Document, name: str) -> dict[str, int]:
    """Token -> id of a model, each id a number that an embedding could have a row for."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram: pairs of piece and score, in order
        if not all(
            isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in vocabulary
        ):
            raise CheckpointError(f"{name}: model.vocab is no list of pieces and scores")
        vocabulary = {pair[0]: i for i, pair in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise CheckpointError(f"{name}: no model.vocab; a tokenizer has tokens")
    check_ids(vocabulary.items(), 2 * len(vocabulary) + 4096, name)
    return vocabulary


def check_ids(pairs: Iterable[tuple[object, object]], limit: int, name: str) -> None:
    for token, number in pairs:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < limit:
            raise CheckpointError(
                f"{name}: token {ascii(token)[:60]} has id {number!r}; ids are 0 to {limit - 1:,} here"
            )


def build(whole: Document, name: str) -> tokenizers.Tokenizer:
    """A working tokenizer, tried on text that makes a runaway pattern show itself."""
    import tokenizers

    if not isinstance(whole.get("model"), dict):
        raise CheckpointError(f"{name}: no model; this is no tokenizer.json")
    vocabulary = vocabulary_of(whole["model"], name)
    more = whole.get("added_tokens") or []
    if not isinstance(more, list) or not all(isinstance(each, dict) for each in more):
        raise CheckpointError(f"{name}: added_tokens is no list of tokens")
    top = max(max(vocabulary.values()), len(vocabulary)) + len(more) + 4096
    check_ids(((each.get("content"), each.get("id")) for each in more), top, name)
    # Cutting short and filling up are a caller's wish for one call, and never happen in silence.
    with rust(name):
        backend = tokenizers.Tokenizer.from_str(json.dumps(whole | {"truncation": None, "padding": None}))
        for letter in ("a", "A", " ", "0", "\n", "-", "é"):
            backend.encode(letter * 48 + "!\x00")
    for each in more:  # tokenizers gives ids of its own to tokens that do not follow on
        if backend.token_to_id(each["content"]) != each["id"]:
            raise CheckpointError(
                f"{name}: added token {ascii(each['content'])[:60]} claims id {each['id']}, but its place is"
                f" {backend.token_to_id(each['content'])}; ids of added tokens follow those of the vocabulary"
            )
    return backend
