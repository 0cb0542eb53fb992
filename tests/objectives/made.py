"""Prepared data of made-up texts, and tokenizers like BERT's, T5's and BART's, for tests of objectives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamina.data import Prepared, Writer, open_prepared
from lamina.text import Tokenizer, document
from lamina.text.document import added

SIZES = (5, 17, 2, 40, 23, 9, 61, 3)


def wordpiece(
    words: Iterable[str], special: dict[str, str], last: Iterable[str] = (), around: tuple[str, ...] = ()
) -> Tokenizer:
    """Special tokens first, words, and then tokens that are special too."""
    names = [*dict.fromkeys(special.values()), *words, *last]
    vocabulary = {name: number for number, name in enumerate(names)}
    control = [*special.values(), *last]
    before, after = around or ((), ())
    whole = document.document(
        {"type": "WordPiece", "unk_token": names[0], "continuing_subword_prefix": "##", "vocab": vocabulary}
        | {"max_input_chars_per_word": 100},
        added_tokens=[added(name, vocabulary[name]) for name in dict.fromkeys(control)],
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=document.template([(n, vocabulary[n]) for n in before], [(n, vocabulary[n]) for n in after]),
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )
    return Tokenizer(whole, special=special, name="made")


WORDS = [*(f"w{i}" for i in range(30)), *(f"##p{i}" for i in range(30)), ".", "!", "a"]


def bert() -> Tokenizer:
    """[PAD] [UNK] [CLS] [SEP] [MASK], 30 words, 30 later pieces, full stops: 68 tokens."""
    names = ("pad", "unk", "cls", "sep", "mask")
    return wordpiece(WORDS, {name: f"[{name.upper()}]" for name in names}, around=(("[CLS]",), ("[SEP]",)))  # pyright: ignore


def t5(sentinels: int = 100) -> Tokenizer:
    """<pad> </s> <unk>, words, and sentinels whose ids descend from the last."""
    special = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    last = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    return wordpiece(WORDS, special, last, around=((), ("</s>",)))  # pyright: ignore


def bart() -> Tokenizer:
    """<s> <pad> </s> <unk> <mask> and words."""
    special = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    return wordpiece(WORDS, special, around=(("<s>",), ("</s>",)))  # pyright: ignore


def prepared(
    directory: Path,
    words: Tokenizer,
    documents: list[dict[str, Any]],
    values: Sequence[float] | None = None,
    *,
    kind: str = "text",
    labels: tuple[str, ...] = (),
    ended: bool = True,
) -> Prepared:
    """A prepared directory of these documents, its tokenizer beside, in several shards."""
    what = None if values is None else "scores" if kind == "contrastive" else "labels"
    end = words.eos if ended else None
    with Writer(
        directory,
        kind=kind,
        vocabulary=words.vocabulary,
        tokenizer=words.hash,
        end=end,
        values=what,
        shard_tokens=50,
    ) as writer:
        for number, one in enumerate(documents):
            writer.add(one, None if values is None else values[number])
        writer.close(labels=labels)
    words.save(directory)
    return open_prepared(directory)


def texts(words: Tokenizer, sizes: Iterable[int] = SIZES, seed: int = 0) -> list[np.ndarray]:
    """Words, pieces and full stops, some of them one after the other."""
    random = np.random.default_rng(seed)
    plain = np.array([words.tokens[name] for name in WORDS])
    stop = words.tokens["."]
    return [np.where(random.random(n) < 0.2, stop, random.choice(plain, n)) for n in sizes]


def random_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
