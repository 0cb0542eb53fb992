"""New tokenizers: BPE, Unigram and WordPiece trained with the tokenizers package, characters, and bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from lamina.errors import LaminaError
from lamina.specs import unknown
from lamina.text.document import added, bpe, byte_level, document, rust, template
from lamina.text.tokenizer import Tokenizer, byte_letters

SPECIAL: dict[str, dict[str, str]] = {
    "none": {},
    "gpt": {"bos": "<|endoftext|>", "eos": "<|endoftext|>"},
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "t5": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    "bart": {
        "bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>", "cls": "<s>", "sep": "</s>",
    },
}  # fmt: skip
"""The special tokens of each objective: role -> token, in the order of their ids."""

AROUND = {"bert": ("[CLS]", "[SEP]"), "t5": (None, "</s>"), "bart": ("<s>", "</s>")}  # what stands around a text
SENTINELS = [f"<extra_id_{i}>" for i in reversed(range(100))]  # T5's: the first is the last id
# Where nothing is merged, words change no id, and short ones are encoded several times as fast as one long text.
WORDS = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
KINDS = ("bpe", "unigram", "wordpiece", "characters", "bytes")


def train(kind: str, texts: Iterable[str], *, size: int | None = None, special: str = "none") -> Tokenizer:
    """A tokenizer of `size` tokens, special ones included, for texts like these, which are read once.

    bpe: byte-level, as GPT-2's. unigram: as SentencePiece's, T5's. wordpiece: as BERT's uncased. characters: those of
    the texts, sorted. bytes: the 256. The last two have no size. special: none, gpt, bert, t5 or bart. Equal texts give
    equal tokenizers, but for unigram and wordpiece: the package's trainers break ties in another way each time.
    Raises LaminaError for unknown names, sizes that do not hold the special tokens, and no text.
    """
    if kind not in KINDS:
        raise LaminaError(unknown("kind of tokenizer", kind, KINDS))
    if special not in SPECIAL:
        raise LaminaError(unknown("set of special tokens", special, SPECIAL))
    roles = dict(SPECIAL[special])
    tokens = list(dict.fromkeys(roles.values()))
    after = SENTINELS if special == "t5" else []
    if kind in ("characters", "bytes"):
        if size is not None:
            raise LaminaError(f"tokenizer {kind}: a size of {size}; it has as many tokens as there are {kind}")
        whole = _characters(texts) if kind == "characters" else _bytes()
        vocabulary = whole["model"]["vocab"]
        whole["added_tokens"] = [added(token, len(vocabulary) + i) for i, token in enumerate(tokens + after)]
        if "unk" in roles and kind == "characters":  # else characters that are new would vanish
            vocabulary |= {token["content"]: token["id"] for token in whole["added_tokens"]}
            whole["model"] |= {"unk_token": roles["unk"], "vocab": vocabulary}
    else:
        least = {"bpe": 256, "unigram": 16, "wordpiece": 16}[kind] + len(tokens) + len(after)
        if size is None or size < least:
            raise LaminaError(f"tokenizer {kind}: a size of {size}; with these special tokens {least} is the least")
        if kind == "wordpiece" and "unk" not in roles:
            roles["unk"] = "[UNK]"
        if kind == "unigram" and "unk" not in roles:
            roles["unk"] = "<unk>"
        tokens = list(dict.fromkeys(roles.values()))
        whole = _trained(kind, texts, size - len(after), tokens, roles)
        first = len(whole["model"]["vocab"])
        whole["added_tokens"] += [added(token, first + i) for i, token in enumerate(after)]
    before, behind = AROUND.get(special, (None, None))
    if before or behind:
        ids = {token["content"]: token["id"] for token in whole["added_tokens"]}
        ends = [[(token, ids[token])] if token else [] for token in (before, behind)]
        whole["post_processor"] = template(*ends)
    return Tokenizer(whole, special=roles, name=f"trained {kind}")


def _trained(kind: str, texts: Iterable[str], size: int, tokens: list[str], roles: dict[str, str]) -> dict:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    shared = {"vocab_size": size, "special_tokens": tokens, "show_progress": False}
    with rust(f"training {kind}"):
        if kind == "bpe":
            backend = Backend(models.BPE())
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), **shared)
        elif kind == "unigram":
            backend = Backend(models.Unigram())
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
            backend.decoder = decoders.Metaspace(prepend_scheme="always")
            trainer = trainers.UnigramTrainer(unk_token=roles["unk"], **shared)
        else:
            backend = Backend(models.WordPiece(unk_token=roles["unk"]))
            backend.normalizer = normalizers.BertNormalizer(lowercase=True)
            backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            backend.decoder = decoders.WordPiece()
            trainer = trainers.WordPieceTrainer(**shared)
        backend.train_from_iterator(_some(texts, f"tokenizer {kind}"), trainer)
        whole = json.loads(backend.to_str())
    return whole


def _some(texts: Iterable[str], name: str) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        raise LaminaError(f"{name}: no text to learn from")


def _characters(texts: Iterable[str]) -> dict:
    found: set[str] = set()
    for text in _some(texts, "tokenizer characters"):
        found.update(text)
    model = bpe({letter: i for i, letter in enumerate(sorted(found))}, [])
    return document(model, pre_tokenizer=WORDS, decoder={"type": "Fuse"})


def _bytes() -> dict:
    model = bpe({letter: byte for byte, letter in byte_letters().items()}, [])
    return document(model, pre_tokenizer=byte_level(), decoder=byte_level())
