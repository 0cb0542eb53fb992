"""The fused cross-entropy against its formula, written out with all scores at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lamina.layers import LanguageHead, LanguageHeadSpec
from lamina.layers.head import TransformSpec
from lamina.objectives import IGNORE, cross_entropy, label_cross_entropy, loss


def naive(scores: torch.Tensor, labels: torch.Tensor, z_loss: float, smoothing: float) -> torch.Tensor:
    """Row by row, in plain words."""
    total = torch.zeros((), dtype=scores.dtype)
    for row, label in zip(scores.flatten(0, -2), labels.flatten().tolist(), strict=True):
        if label == IGNORE:
            continue
        log_z = row.exp().sum().log()
        wanted = torch.full_like(row, smoothing / len(row))
        wanted[label] += 1 - smoothing
        total = total - (wanted * (row - log_z)).sum() + z_loss * log_z**2
    return total


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize(
    "spec, z_loss, smoothing",
    [
        (LanguageHeadSpec(), 0.0, 0.0),
        (LanguageHeadSpec(tied=False, bias=True), 0.0, 0.1),
        (LanguageHeadSpec(scale=0.3), 1e-2, 0.0),
        (LanguageHeadSpec(softcap=1.5, bias=True), 1e-2, 0.2),
        (LanguageHeadSpec(transform=TransformSpec(act="gelu", width=5)), 0.0, 0.0),
    ],
)
def test_it_is_the_formula_with_gradients(
    monkeypatch: pytest.MonkeyPatch, spec: LanguageHeadSpec, z_loss: float, smoothing: float, rows: int
):
    monkeypatch.setattr(loss, "SCORES", rows * 11)
    random = torch.Generator().manual_seed(rows)
    head = LanguageHead(spec, 7, 11).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=random)
    table = torch.randn(11, head.transform.width if head.transform else 7, generator=random, dtype=torch.float64)
    hidden = torch.randn(3, 43, 7, generator=random, dtype=torch.float64)
    labels = torch.randint(11, (3, 43), generator=random).masked_fill(torch.rand(3, 43, generator=random) < 0.3, IGNORE)
    inputs = [hidden.requires_grad_(), table.requires_grad_(), *head.parameters()]
    found = cross_entropy(hidden, labels, head, table, z_loss=z_loss, smoothing=smoothing)
    expected = naive(head(hidden, table), labels, z_loss, smoothing)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.nats, naive(head(hidden, table), labels, 0, 0).detach())
    assert found.asked == int((labels != IGNORE).sum())
    kept = [one for one in inputs if one is not table or head.weight is None]
    of_found = torch.autograd.grad(found.total * 3, kept)
    for one, other in zip(of_found, torch.autograd.grad(expected * 3, kept), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_asked_is_zero_and_trains_nothing():
    head, table = LanguageHead(LanguageHeadSpec(), 4, 9), torch.randn(9, 4, requires_grad=True)
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    found = cross_entropy(hidden, torch.full((2, 3), IGNORE), head, table)
    assert found.asked == 0 and found.total.item() == 0
    found.total.backward()
    assert hidden.grad is not None and not hidden.grad.any() and not table.grad.any()  # pyright: ignore


def test_impossible_labels_cost_much_and_not_infinity():
    """A label whose probability is 0 in float32."""
    head, table = LanguageHead(LanguageHeadSpec(), 1, 2), torch.tensor([[200.0], [-200.0]])
    found = cross_entropy(torch.ones(1, 1), torch.tensor([1]), head, table)
    assert found.total.item() == 400


@pytest.mark.parametrize("dtype, close", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_sums_in_float32(dtype: torch.dtype, close: float):
    random = torch.Generator().manual_seed(0)
    head, table = LanguageHead(LanguageHeadSpec(), 16, 50), torch.randn(50, 16, generator=random).to(dtype)
    hidden = torch.randn(400, 16, generator=random).to(dtype).requires_grad_()
    labels = torch.randint(50, (400,), generator=random)
    table.requires_grad_()
    found = cross_entropy(hidden, labels, head, table)
    found.total.backward()
    assert found.total.dtype == torch.float32 and table.grad is not None and table.grad.dtype == dtype
    wide, matrix = hidden.detach().double().requires_grad_(), table.detach().double().requires_grad_()
    expected = F.cross_entropy(wide @ matrix.T, labels, reduction="sum")
    expected.backward()
    assert abs(found.total.item() / expected.item() - 1) < close / 10
    assert matrix.grad is not None and wide.grad is not None and hidden.grad is not None
    torch.testing.assert_close(
        table.grad.double(), matrix.grad, rtol=close, atol=close * float(matrix.grad.abs().max())
    )
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=close, atol=close * float(wide.grad.abs().max()))


def test_classes_are_the_same_sums():
    random = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(4, 6, 5, generator=random), torch.randint(5, (4, 6), generator=random)
    labels[1, 2:] = IGNORE
    found = label_cross_entropy(scores, labels, z_loss=0.01, smoothing=0.2)
    torch.testing.assert_close(found.total, naive(scores, labels, 0.01, 0.2))
    torch.testing.assert_close(found.nats, naive(scores, labels, 0, 0))
    assert found.asked == 20


def test_the_scores_of_all_tokens_are_never_held(monkeypatch: pytest.MonkeyPatch):
    """What is kept for the backward is as large as the gradients, whatever the vocabulary is."""
    kept: list[int] = []
    head, table = LanguageHead(LanguageHeadSpec(), 8, 5000), torch.randn(5000, 8, requires_grad=True)
    hidden = torch.randn(3000, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        cross_entropy(hidden, torch.zeros(3000, dtype=torch.int64), head, table)
    assert sum(kept) <= 3 * (hidden.numel() + table.numel())
