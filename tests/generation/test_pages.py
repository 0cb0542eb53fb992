"""Moving weights into large pages changes where they lie, and nothing else."""

from __future__ import annotations

import itertools

import torch

from lamina.generation import pages
from tests import tiny


def test_values_names_and_sharing_stay(monkeypatch):
    monkeypatch.setattr(pages, "LARGE", 4096)
    model = tiny.model().requires_grad_(True)
    twin = torch.nn.Linear(3, 2)
    model.twin = twin
    model.register_buffer("kept", torch.arange(5, dtype=torch.int8))
    model.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
    model.again = torch.nn.Linear(3, 2)
    model.again.weight = twin.weight
    before = {name: (one, one.detach().clone()) for name, one in model.state_dict(keep_vars=True).items()}
    where = {name: one.data_ptr() for name, (one, _) in before.items()}
    pages.settle_in_large_pages(model)
    for name, (one, value) in before.items():
        now = model.state_dict(keep_vars=True)[name]
        assert now is one and torch.equal(now, value), name
        assert (now.data_ptr() == where[name]) is (name == "turned"), name
        assert name == "turned" or now.data_ptr() % 64 == 0
    assert model.again.weight.data_ptr() == twin.weight.data_ptr()
    places = sorted((one.data_ptr(), one.numel() * one.element_size()) for one, _ in before.values())
    assert all(a + size <= b or (a, size) == (b, other) for (a, size), (b, other) in itertools.pairwise(places))


def test_a_small_model_and_a_system_without_large_pages_are_left_alone(monkeypatch):
    model = tiny.model()
    where = model.embedding.weight.data_ptr()
    pages.settle_in_large_pages(model)  # under 2 MB
    monkeypatch.setattr(pages, "LARGE", 4096)
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE", raising=False)
    pages.settle_in_large_pages(model)
    assert model.embedding.weight.data_ptr() == where
