"""New tokenizers: lamina and transformers read the files, and the numbers of tokens are those asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import lamina
from lamina.data.training import SPECIAL, train
from lamina.errors import LaminaError

TEXTS = ["The cat sat on the mat, and the other cats sang: über alle Maßen! 1,234 times.\n"] * 3 + [
    f"Sentence {i} has words such as w{i * 7919} and others; they differ.\n" for i in range(200)
]


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(
    "kind, size", [("bpe", 420), ("unigram", 200), ("wordpiece", 300), ("bytes", None), ("characters", None)]
)
def test_files_are_read_by_lamina_and_transformers(tmp_path: Path, kind: str, size: int | None, special: str):
    made = train(kind, TEXTS, size=size, special=special)
    made.save(tmp_path)
    ours = lamina.tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocabulary <= (size or 256 + 106)
    if kind == "bpe":
        assert ours.vocabulary == size
    for text in (TEXTS[0], TEXTS[-1], "", "cat<unk>"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    for role, token in SPECIAL[special].items():
        assert getattr(ours, role) == getattr(theirs, f"{role}_token_id") == ours.tokens[token]
    if kind in ("bpe", "bytes"):
        assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0] and ours.lost("日本\0") == []
    assert ours.hash == made.hash


def test_what_stands_around_a_text_and_sentinels():
    bert = train("wordpiece", TEXTS, size=300, special="bert")
    assert [bert.pad, bert.unk, bert.cls, bert.sep, bert.mask] == [0, 1, 2, 3, 4]
    assert bert.encode("cat")[0] == bert.cls and bert.encode("cat")[-1] == bert.sep
    t5 = train("unigram", TEXTS, size=250, special="t5")
    assert (t5.pad, t5.eos, t5.unk) == (0, 1, 2) and t5.encode("cat")[-1] == t5.eos
    # T5's sentinels are the last ids, and the first of them is the very last (arXiv:1910.10683, and its tokenizer).
    assert [t5.tokens[f"<extra_id_{i}>"] for i in (0, 1, 99)] == [
        t5.vocabulary - 1,
        t5.vocabulary - 2,
        t5.vocabulary - 100,
    ]
    bart = train("bpe", TEXTS, size=420, special="bart")
    assert [bart.bos, bart.pad, bart.eos, bart.unk, bart.mask] == [0, 1, 2, 3, 4]


def test_the_same_texts_give_the_same_tokenizer():
    assert len({train("bpe", TEXTS, size=420).hash for _ in range(4)}) == 1


def test_characters_are_sorted_and_bytes_are_themselves():
    text = "zebra, Ärger!\n"
    made = train("characters", [text[:5], text[5:]])
    assert made.decode(range(made.vocabulary)) == "".join(sorted(set(text)))
    assert made.encode(text) == [sorted(set(text)).index(letter) for letter in text]
    assert made.decode(made.encode(text)) == text
    bytewise = train("bytes", [], special="gpt")
    assert bytewise.encode("é\0 a\n") == [*"é\0 a\n".encode()] and bytewise.eos == 256


@pytest.mark.parametrize(
    "kind, more, words",
    [
        ("bp", {}, "unknown kind of tokenizer 'bp'; did you mean 'bpe'"),
        ("bpe", {"size": 300, "special": "gtp"}, "unknown set of special tokens 'gtp'; did you mean 'gpt'"),
        ("bpe", {}, "tokenizer bpe: a size of None; with these special tokens 256 is the least"),
        ("bpe", {"size": 300, "special": "t5"}, "a size of 300; with these special tokens 359 is the least"),
        ("bytes", {"size": 256}, "a size of 256; it has as many tokens as there are bytes"),
    ],
)
def test_mistakes(kind: str, more: dict, words: str):
    with pytest.raises(LaminaError, match=words):
        train(kind, TEXTS, **more)
    for each in ("characters", "bpe"):
        with pytest.raises(LaminaError, match="no text to learn from"):
            train(each, ["", " "], size=300 if each == "bpe" else None)


def test_characters_that_a_vocabulary_lacks_are_said():
    """They vanish without a token, since there is no unknown one: nothing else would tell."""
    words = train("characters", ["abc def\n"])
    assert words.decode(words.encode("aé b\tdß?a")) == "a bda"
    assert words.lost("aé b\tdß?a") == ["é", "\t", "ß", "?"] and words.lost("fed cab\n") == []


@pytest.mark.parametrize("special", ["bert", "t5", "bart"])
def test_characters_that_a_vocabulary_lacks_are_the_unknown_token(special: str):
    words = train("characters", ["abc def\n"], special=special)
    ids = words.encode("aé bß", special=False)
    assert ids == [words.tokens["a"], words.unk, words.tokens[" "], words.tokens["b"], words.unk]
    assert words.lost("aé bß") == ["é", "ß"]
