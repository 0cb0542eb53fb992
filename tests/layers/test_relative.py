"""Shaw's and Transformer-XL's relative terms, against loops over the papers' formulas and the paper's shift."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import Call, Draw, ShawSpec, SinusoidalPositionSpec, TransformerXLSpec
from lamina.patterns import Causal, Everything
from lamina.tokens import Tokens, plain
from tests import small


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def attend(module, scores: Tensor, values: Tensor, causal: bool) -> Tensor:
    """scores (B, H, T, S), values (B, H, T, S, D): the output of the attention module."""
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -1e9)
    out = (scores.softmax(-1)[..., None] * values).sum(3)
    return module.o(out.transpose(1, 2).flatten(2))


def heads(module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values (B, 4, T, 8), with the two key heads repeated for their queries."""
    split = lambda t, n: t.view(*t.shape[:2], n, 8).transpose(1, 2)  # noqa: E731
    q, k, v = split(module.q(x), 4), split(module.k(x), 2), split(module.v(x), 2)
    return q, torch.stack([k[:, h // 2] for h in range(4)], 1), torch.stack([v[:, h // 2] for h in range(4)], 1)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("clip", [0, 1, 3, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_shaw(values: bool, clip: int, causal: bool):
    spec = small.attention(relative=ShawSpec(clip=clip, values=values), pattern=Causal() if causal else Everything())
    module = spec.build(16).double()
    small.shake(module)
    assert (module.relative.value is None) != values
    assert all(table.shape == (2 * clip + 1, 8) for table in module.relative.parameters())
    x = random(2, 7, 16)
    q, k, v = heads(module, x)
    scores, carried = torch.zeros(2, 4, 7, 7, dtype=torch.float64), torch.zeros(2, 4, 7, 7, 8, dtype=torch.float64)
    for i in range(7):
        for j in range(7):
            c = max(-clip, min(clip, j - i)) + clip
            scores[:, :, i, j] = (q[:, :, i] * (k[:, :, j] + module.relative.key[c])).sum(-1) / 8**0.5
            carried[:, :, i, j] = v[:, :, j] + (module.relative.value[c] if values else 0)
    found = module(x, Call(tokens=plain(2, 7)))
    torch.testing.assert_close(found, attend(module, scores, carried, causal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_xl(causal: bool):
    spec = small.attention(relative=TransformerXLSpec(base=30.0), pattern=Causal() if causal else Everything())
    module = spec.build(16).double()
    small.shake(module)
    term, x = module.relative, random(2, 7, 16)
    q, k, v = heads(module, x)
    scores = torch.zeros(2, 4, 7, 7, dtype=torch.float64)
    for i in range(7):
        for j in range(7):
            angle = (i - j) * torch.tensor([30.0 ** (-2 * n / 16) for n in range(8)], dtype=torch.float64)
            far = term.project(torch.cat([angle.sin(), angle.cos()])).view(4, 8)
            content = ((q[:, :, i] + term.content) * k[:, :, j]).sum(-1)
            scores[:, :, i, j] = (content + ((q[:, :, i] + term.position) * far).sum(-1)) / 8**0.5
    values = v[:, :, None].expand(-1, -1, 7, -1, -1)
    found = module(x, Call(tokens=plain(2, 7)))
    torch.testing.assert_close(found, attend(module, scores, values, causal), rtol=0, atol=2e-6)  # float32 waves


def test_transformer_xl_equals_the_papers_shift():
    """Row i of (q + v) R^T, with R for distances S - 1, ..., 0, shifted left by T - 1 - i: valid where causal."""
    new, old = 5, 3
    module = TransformerXLSpec().build(16, 4, 8).double()
    small.shake(module)
    query = random(1, 4, new, 8)
    _, bias, _ = module(query, plain(1, new, start=old), plain(1, old + new), 1.0)
    length = old + new
    wave = SinusoidalPositionSpec().build(16)(plain(1, length))[0].double().flip(0)  # distances S - 1 ... 0
    wave = module.project(torch.cat([wave[:, 0::2], wave[:, 1::2]], dim=-1)).view(length, 4, 8)
    by_place = torch.einsum("bhtd,shd->bhts", query + module.position[:, None], wave)
    padded = torch.cat([by_place.new_zeros(1, 4, new, 1), by_place], dim=-1)
    shifted = padded.view(1, 4, length + 1, new)[:, :, 1:].reshape(1, 4, new, length)  # the paper's appendix B
    seen = torch.ones(new, length).tril(old).bool()
    torch.testing.assert_close(bias[..., seen], shifted[..., seen], rtol=0, atol=1e-12)


@pytest.mark.parametrize("relative", [ShawSpec(clip=2), TransformerXLSpec()])
def test_distances_come_from_positions(relative):
    """Keys in another order, with gaps between positions: the same pairs have the same bias."""
    module = relative.build(16, 4, 8).double()
    small.shake(module)
    query = random(1, 4, 2, 8)
    keys = torch.tensor([[3, 9, 0, 4, 1]])
    scattered = Tokens(keys, torch.zeros_like(keys))
    queries = Tokens(torch.tensor([[4, 9]]), torch.zeros(1, 2, dtype=torch.int64))
    _, found, _ = module(query, queries, scattered, 0.5)
    _, whole, _ = module(query, queries, plain(1, 10), 0.5)
    torch.testing.assert_close(found, whole[..., keys[0]], rtol=0, atol=1e-12)


def test_gradients_reach_every_table():
    for relative in (ShawSpec(clip=2), TransformerXLSpec()):
        module = small.attention(relative=relative).build(16).double()
        small.shake(module)
        module(random(1, 5, 16), Call(tokens=plain(1, 5))).square().sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_initial_values_and_checks():
    for relative in (ShawSpec(clip=40), TransformerXLSpec()):
        module = relative.build(64, 4, 32)
        module.initialise(Draw(torch.Generator().manual_seed(0)))
        for parameter in module.parameters():
            assert 0.015 < parameter.std() < 0.025
    with pytest.raises(LaminaError, match="clip"):
        ShawSpec(clip=-1)
