"""Few features in place of many, so that what reads them notices least: the closed form that fitted operations share.

Features f (S,) are read by vectors r, of which R = sum r r^T is all that counts: what is lost by f ~ U D f, with k
features D f, is C = E (f - U D f)^T R (f - U D f). With W W^T = R, g = W^T f has the moments A = W^T G W, G = E f f^T,
and C is least where g is projected on the first k eigenvectors V of A (Eckart and Young):
D = (W V)^T, U = G W V / eigenvalues.

Keys that turn (arXiv:2104.09864) are complex numbers, one a pair, and only products with complex numbers turn along:
the same form for each pair by itself, over the heads. Assumed is that queries, keys and their distances are
independent, and of values that heads read what the layer reads, and not means of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamina.layers import RotarySpec


def principal(gram: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """gram (..., S, S), root W (..., S, N), real or complex -> down (..., k, S), up (..., S, k)."""
    values, vectors = torch.linalg.eigh(root.mH @ gram @ root)
    values, vectors = values[..., -rank:].clamp(min=0), vectors[..., -rank:]
    real = values > 1e-12 * values[..., -1:]
    inverse = torch.where(real, values, 1.0).reciprocal() * real
    down, up = (root @ vectors).mH, gram @ root @ vectors * inverse[..., None, :]
    # The new features become as large as the old ones, which leaves the product as it is.
    old, new = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1), values.mean(-1)
    scale = torch.where((old > 0) & (new > 0), old / new.clamp(min=1e-300), 1.0).sqrt()[..., None, None]
    return down * scale, up / scale


def lost(gram: Tensor, root: Tensor, down: Tensor, up: Tensor) -> tuple[float, float]:
    """(C, what it would be without any features): gram (S, S), root (S, N), down (k, S), up (S, k)."""
    rest = torch.eye(len(gram), dtype=gram.dtype) - up @ down
    missed = root.T @ rest
    return float((missed @ gram * missed).sum()), float((root.T @ gram * root.T).sum())


def root_of(matrix: Tensor) -> Tensor:
    """(..., D, D) positive -> W with W W^T = R."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]


def pairs(rotary: RotarySpec | None, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The features of a head that turn, as real and imaginary parts (P,), and those that do not."""
    width = 0 if rotary is None else rotary.width or head_dim
    rest = torch.arange(width, head_dim)
    if rotary is not None and rotary.interleaved:
        return torch.arange(0, width, 2), torch.arange(1, width, 2), rest
    return torch.arange(width // 2), torch.arange(width // 2, width), rest


def one_key(gram: Tensor, read: Tensor, rotary: RotarySpec | None) -> tuple[Tensor, Tensor]:
    """One key in place of those of s heads: gram (s, D, s, D) of the keys, read (s, D, D) the queries' of each.

    -> down (D, s, D) to the new key, up (s, D, D) from it. What turns goes pair by pair, the rest together, as do
    values, of which nothing turns.
    """
    heads, size = gram.shape[:2]
    down, up = gram.new_zeros(size, heads, size), gram.new_zeros(heads, size, size)
    a, b, rest = pairs(rotary, size)
    if len(a):
        thin, wide = principal(*_complex(gram, read, a, b), rank=1)  # (P, 1, s), (P, s, 1)
        for new, old, down_part, up_part in (
            (a, a, thin.real, wide.real),
            (a, b, -thin.imag, -wide.imag),
            (b, a, thin.imag, wide.imag),
            (b, b, thin.real, wide.real),
        ):
            down[new, :, old], up[:, new, old] = down_part[:, 0], up_part[..., 0].T
    if len(rest):
        inner = gram[:, rest][..., rest].flatten(0, 1).flatten(1)
        root = torch.block_diag(*root_of(read[:, rest][..., rest]))
        thin, wide = principal(inner, root, rank=len(rest))
        down[rest[:, None], :, rest] = thin.unflatten(1, (heads, -1)).transpose(1, 2)
        up[:, rest[:, None], rest] = wide.unflatten(0, (heads, -1))
    return down, up


def one_normed_key(gram: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """As `one_key` for keys that a norm makes equally long, as it does the queries: gram (s, D, s, D).

    A norm leaves the direction of a key, k / |k|, of which |k| is taken as its root mean square on the text, without
    the mean over the features where `centred`. Queries are normed too, so that no map back can be put into them: what
    errs least with equal ones is the mean of the directions. Any length of it is as good.
    """
    heads, size = gram.shape[:2]
    own = torch.stack([gram[head, :, head] for head in range(heads)])  # (s, D, D)
    square = own.diagonal(dim1=1, dim2=2).sum(dim=1) - (own.sum(dim=(1, 2)) / size if centred else 0.0)
    length = square.clamp(min=1e-300).sqrt()
    length, same = length / length.mean(), torch.eye(size, dtype=gram.dtype)
    down = (same[:, None] / length[:, None] / heads).contiguous()  # (D, s, D)
    return down, same * length[:, None, None]


def _complex(gram: Tensor, read: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The moments of keys as complex numbers (P, s, s), and the roots of the energy of what reads them."""
    part = {
        (one, other): gram[:, left][:, :, :, right].diagonal(dim1=1, dim2=3).permute(2, 0, 1)
        for one, left in (("a", a), ("b", b))
        for other, right in (("a", a), ("b", b))
    }
    moments = torch.complex(part["a", "a"] + part["b", "b"], part["b", "a"] - part["a", "b"])
    own = read.diagonal(dim1=1, dim2=2)  # (s, D)
    root = torch.diag_embed((own[:, a] + own[:, b]).clamp(min=0).sqrt().T)
    return moments, root.to(moments.dtype)
