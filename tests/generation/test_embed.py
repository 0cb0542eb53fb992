"""Vectors of texts: the lengths at which they are read, and their own."""

from __future__ import annotations

from pathlib import Path

import torch

from lamina.generation.embed import rounded
from lamina.retrieve import Embedder
from tests.retrieve import made


def test_texts_are_read_at_few_lengths(tmp_path: Path):
    """Each length that an embedder reads in 16 bits costs memory for good."""
    embed = Embedder(made.embedder_at(tmp_path / "bert"), batch=1)
    shapes: list[tuple[int, ...]] = []
    embed.model.register_forward_pre_hook(lambda module, given: shapes.append(tuple(given[0].shape)))
    vectors = embed([" ".join(["cat"] * size) for size in range(1, 40)])
    assert vectors.shape == (39, 32) and embed.cut > 0
    assert set(shapes) == {(1, 16), (1, 32)} and len(shapes) == 39


def test_a_length_that_is_padded_to_is_one_that_the_model_reads():
    assert [rounded(length, 40) for length in (1, 16, 17, 33, 40)] == [16, 16, 32, 40, 40]
    assert [rounded(length, None) for length in (1, 33, 512)] == [16, 48, 512]
    assert rounded(50, 40) == 50  # the model itself says that it is too long


def test_vectors_of_16_bits_have_length_1(tmp_path: Path):
    """In 16 bits a length is 1 to three digits, and distances would differ by as much."""
    vectors = Embedder(made.embedder_at(tmp_path / "bert"), "bfloat16")(made.texts(9))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(9), rtol=0, atol=1e-6)
