"""Filling masks: against the logits themselves and against transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation.blanks import fill
from tests import tiny

TEXT = "the [MASK] sat on the [MASK]."


@pytest.fixture(scope="module")
def bert() -> lamina.Model:
    return tiny.model(tiny.BERT)


def test_candidates_are_the_likeliest_tokens(bert):
    tokenizer = tiny.words()
    filled = fill(bert, TEXT, tokenizer, top=21)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    shares = bert(ids).logits[0].softmax(-1)
    assert [blank.position for blank in filled.blanks] == [2, 6] == (ids[0] == 4).nonzero()[:, 0].tolist()
    for blank in filled.blanks:
        found = {candidate.id: candidate.probability for candidate in blank.candidates}
        ranked = shares[blank.position].argsort(descending=True).tolist()
        assert list(found) == [token for token in ranked if token < 21]
        assert found == pytest.approx(dict(enumerate(shares[blank.position][:21].tolist())), abs=1e-6)
    best = [blank.candidates[0] for blank in filled.blanks]
    assert all(candidate.token in [*tiny.WORDS, ""] for candidate in best)


def test_the_text_is_the_filled_one(bert):
    filled = fill(bert, TEXT, tiny.words(), top=1)
    ids = list(filled.ids)
    for blank in filled.blanks:
        ids[blank.position] = blank.candidates[0].id
    assert filled.text == tiny.words().decode(ids).strip() and "[MASK]" not in filled.text


def test_equals_transformers(tmp_path):
    directory = tiny.checkpoint(tmp_path / "bert", tiny.BERT)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    shares = theirs(**tokenizer(TEXT, return_tensors="pt")).logits[0].softmax(-1)
    filled = fill(lamina.load(directory), TEXT, lamina.tokenizer(directory), top=3)
    for blank in filled.blanks:
        best = shares[blank.position][:21].topk(3)
        assert [candidate.id for candidate in blank.candidates] == best.indices.tolist()
        assert [candidate.probability for candidate in blank.candidates] == pytest.approx(
            best.values.tolist(), abs=1e-6
        )


def test_what_cannot_be_filled_says_why(bert):
    for model, text, tokenizer, top, kind, said in (
        (bert, "the cat", tiny.words(), 5, LaminaError, r"no \[MASK\]; write \[MASK\] where"),
        (bert, TEXT, tiny.words(), 0, LaminaError, "top is 0"),
        (bert, TEXT, tiny.words(), 22, LaminaError, "top is 22; it must be a whole number from 1 to 21"),
        (bert, "cat " * 40 + "[MASK]", tiny.words(), 1, LaminaError, "43 tokens; this model reads 32"),
        (bert, TEXT, tiny.tokenizer(), 5, UnsupportedError, "no mask token"),
        (tiny.model(), TEXT, tiny.words(), 5, UnsupportedError, "no encoder with a language head"),
    ):
        with pytest.raises(kind, match=said):
            fill(model, text, tokenizer, top=top)
