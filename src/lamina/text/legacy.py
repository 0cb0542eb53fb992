"""Tokenizers from before tokenizer.json: vocab.json with merges.txt (GPT-2, RoBERTa, Qwen 2) and vocab.txt (BERT,
and SMILES, the notation of molecules)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamina.errors import CheckpointError
from lamina.text.document import (
    Document,
    added,
    bpe,
    byte_level,
    check_ids,
    document,
    read_json,
    read_text,
    sequence,
    template,
)
from lamina.text.pretokenizers import QWEN2, split


def gpt2(path: Path, config: dict[str, Any], special: dict[str, str]) -> Document:
    vocabulary, merges = vocabulary_and_merges(path)
    before = byte_level(add_prefix_space=bool(config.get("add_prefix_space")))
    return document(bpe(vocabulary, merges), pre_tokenizer=before, decoder=byte_level())


def qwen2(path: Path, config: dict[str, Any], special: dict[str, str]) -> Document:
    vocabulary, merges = vocabulary_and_merges(path)
    before = sequence("pretokenizers", [split(QWEN2), byte_level(use_regex=False)])
    return document(bpe(vocabulary, merges), normalizer={"type": "NFC"}, pre_tokenizer=before, decoder=byte_level())


def roberta(path: Path, config: dict[str, Any], special: dict[str, str]) -> Document:
    """<s> text </s>. `<mask>` takes the space before it along, as in fairseq."""
    whole = gpt2(path, config, special)
    vocabulary = whole["model"]["vocab"]
    ends = {role: (special[role], number(vocabulary, special[role], path)) for role in ("sep", "cls")}
    flags = {"trim_offsets": True, "add_prefix_space": bool(config.get("add_prefix_space"))}
    whole["post_processor"] = {"type": "RobertaProcessing"} | ends | flags
    if special.get("mask") in vocabulary and not isinstance(config.get("mask_token"), dict):
        whole["added_tokens"] = [added(special["mask"], vocabulary[special["mask"]], lstrip=True)]
    return whole


def bert(path: Path, config: dict[str, Any], special: dict[str, str]) -> Document:
    """[CLS] text [SEP], words cut into pieces from the left, longest first."""
    lines = read_text(path).splitlines()
    vocabulary = {line.rstrip("\n"): i for i, line in enumerate(lines)}
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
        "strip_accents": config.get("strip_accents"),
        "lowercase": config.get("do_lower_case", True),
    }
    model = {"type": "WordPiece", "unk_token": special["unk"], "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100, "vocab": vocabulary}
    cls, sep = ((special[role], number(vocabulary, special[role], path)) for role in ("cls", "sep"))
    return document(
        model,
        normalizer=normalizer,
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=template([cls], [sep]),
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


SMILES = r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9]"
"""Atoms, bonds, rings and arrows of a reaction (Schwaller et al., arXiv:1811.02633)."""


def smiles(path: Path, config: dict[str, Any], special: dict[str, str]) -> Document:
    """[CLS] text [SEP]; each match of SMILES is a token by itself, and what lies between them is unknown."""
    vocabulary = {line: i for i, line in enumerate(read_text(path).splitlines())}
    cls, sep = ((special[role], number(vocabulary, special[role], path)) for role in ("cls", "sep"))
    return document(
        {"type": "WordLevel", "vocab": vocabulary, "unk_token": special["unk"]},
        pre_tokenizer=split(SMILES),
        post_processor=template([cls], [sep]),
        decoder={"type": "Fuse"},
    )


def vocabulary_and_merges(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocabulary = read_json(path)
    check_ids(vocabulary.items(), 2 * len(vocabulary) + 4096, str(path))
    file = path.with_name("merges.txt")
    merges = []
    for i, line in enumerate(read_text(file).split("\n")):
        if not line.strip() or (i == 0 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise CheckpointError(
                f"{file}: line {i + 1} is {ascii(line)[:60]}; a merge is two tokens with a space between"
            )
        merges.append((pair[0], pair[1]))
    return vocabulary, merges


def number(vocabulary: dict[str, int], token: str, path: Path) -> int:
    if token not in vocabulary:
        raise CheckpointError(f"{path}: no {token!a}; the texts it encodes begin or end with it")
    return vocabulary[token]
