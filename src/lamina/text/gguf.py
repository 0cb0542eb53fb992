"""The tokenizer inside a GGUF file: byte-level BPE ("gpt2"), or SentencePiece's BPE by score ("llama")."""

from __future__ import annotations

from typing import Any

from lamina.errors import CheckpointError
from lamina.text.document import Document, added, bpe, byte_level, document, sequence, template
from lamina.text.pretokenizers import TABLE, Pre, split
from lamina.text.sentencepiece import BYTE, BYTES, CONTROL, NORMAL, UNKNOWN, USER, Piece, scored
from lamina.text.tokenizer import Tokenizer

KEY = "tokenizer.ggml."
IDS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id",
    "sep": "seperator_token_id", "mask": "mask_token_id", "cls": "cls_token_id",
}  # fmt: skip
# Files that call these ordinary words are wrong, as llama.cpp says when it reads them.
ENDS = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
}


def from_gguf(metadata: dict[str, Any], name: str = "tokenizer") -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describe."""
    kind = metadata.get(f"{KEY}model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{name}: tokenizer.ggml.model is {kind!r}; gpt2 and llama are read")
    tokens = listed(metadata, "tokens", str, name)
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{name}: {len(tokens) - len(set(tokens))} tokens are there twice; each has one id")
    special = special_tokens(metadata, tokens, kind, name)
    kinds = listed(metadata, "token_type", int, name, [NORMAL] * len(tokens))
    kinds = [CONTROL if token in ENDS else each for token, each in zip(tokens, kinds, strict=True)]
    if kind == "gpt2":
        pre = pre_of(metadata, name)
        whole = byte_pairs(metadata, tokens, kinds, pre, name)
    else:
        pre = Pre((), add_bos=True)
        scores = listed(metadata, "scores", float, name)
        kinds = [BYTE if token in BYTES and each == NORMAL else each for token, each in zip(tokens, kinds, strict=True)]
        pieces = [Piece(*each) for each in zip(tokens, scores, kinds, strict=True)]
        whole = scored(pieces, name, special.get("unk"), flag(metadata, "add_space_prefix", True, name))
    ends = {"bos": pre.add_bos, "eos": False}
    number = {token: i for i, token in enumerate(tokens)}
    put = {
        role: [(special[role], number[special[role]])]
        if flag(metadata, f"add_{role}_token", default, name) and role in special
        else []
        for role, default in ends.items()
    }
    whole["post_processor"] = template(put["bos"], put["eos"])
    return Tokenizer(whole, special=special, templates=templates_of(metadata, name), name=name)


def listed(metadata: dict[str, Any], key: str, kind: type, name: str, default: list | None = None) -> list:
    values = metadata.get(KEY + key, default)
    kinds = (int, float) if kind is float else kind
    if not isinstance(values, list) or not values or not all(isinstance(value, kinds) for value in values):
        raise CheckpointError(f"{name}: {KEY}{key} is missing or not a list of {kind.__name__}")
    count = len(metadata.get(f"{KEY}tokens") or ())
    if key in ("token_type", "scores") and len(values) != count:
        raise CheckpointError(f"{name}: {KEY}{key} has {len(values):,} elements for {count:,} tokens; it has as many")
    return values


def flag(metadata: dict[str, Any], key: str, default: bool, name: str) -> bool:
    value = metadata.get(KEY + key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{name}: {KEY}{key} is {value!r}; it is true or false")
    return value


def special_tokens(metadata: dict[str, Any], tokens: list[str], kind: str, name: str) -> dict[str, str]:
    ids = {"bos": 1, "eos": 2, "unk": 0} if kind == "llama" else {}
    for role, key in IDS.items():
        value = metadata.get(KEY + key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(tokens):
            raise CheckpointError(f"{name}: {KEY}{key} is {value!r}; ids are 0 to {len(tokens) - 1:,}")
        ids[role] = value
    return {role: tokens[number] for role, number in ids.items() if number < len(tokens)}


def pre_of(metadata: dict[str, Any], name: str) -> Pre:
    pre = metadata.get(f"{KEY}pre")
    if pre not in TABLE:
        found = "missing" if pre is None else ascii(str(pre))[:60]
        raise CheckpointError(
            f"{name}: {KEY}pre is {found}; it says how to cut a text into words, known are {', '.join(TABLE)}"
        )
    return TABLE[pre]


def byte_pairs(metadata: dict[str, Any], tokens: list[str], kinds: list[int], pre: Pre, name: str) -> Document:
    merges = []
    for number, line in enumerate(listed(metadata, "merges", str, name)):
        cut = line.find(" ", 1)
        if cut < 0:
            raise CheckpointError(
                f"{name}: {KEY}merges[{number}] is {ascii(line)[:60]}; a merge is two tokens with a space"
            )
        merges.append((line[:cut], line[cut + 1 :]))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    cuts = [split(pattern) for pattern in pre.patterns]
    return document(
        bpe(vocabulary, merges, ignore_merges=pre.ignore_merges),
        added_tokens=[
            added(token, number, special=kind != USER, normalized=False)
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (CONTROL, USER, UNKNOWN)
        ],
        pre_tokenizer=sequence("pretokenizers", [*cuts, byte_level(use_regex=False)]),
        decoder=byte_level(),
    )


def templates_of(metadata: dict[str, Any], name: str) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    named = {key: value for key, value in metadata.items() if key == prefix or key.startswith(f"{prefix}.")}
    templates = {key[len(prefix) + 1 :] or "default": value for key, value in named.items()}
    if not all(isinstance(value, str) for value in templates.values()):
        raise CheckpointError(f"{name}: {prefix} is no text; a chat template is")
    return templates
