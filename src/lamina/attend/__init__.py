"""Attention: softmax(scale * q k^T + bias, where the pattern allows) v, by the first backend that can serve it.

One function does attention, and it alone knows backends. A backend that cannot honour something says so by name; it
never drops it (arXiv:1706.03762, equation 1; arXiv:1911.02150 and arXiv:2305.13245 for fewer key heads).
"""

from __future__ import annotations

from torch import Tensor

from lamina.attend import blocks, dense, flex, products, sdpa, varlen
from lamina.attend.request import Request
from lamina.errors import UnsupportedError
from lamina.specs import unknown

BACKENDS = {
    "blocks": blocks,
    "varlen": varlen,
    "flex": flex,
    "products": products,
    "sdpa": sdpa,
    "dense": dense,
}
"""In order of preference. Each module has `refuses(request) -> str | None`, `suits(request) -> bool` (whether it is
to be taken where nobody asks for another), and `attend(request) -> Tensor`."""


def attend(request: Request, backend: str | None = None) -> Tensor:
    """(B, H, T, value size). A row that may see nothing gives zeros.

    Raises UnsupportedError when the backend that was asked for by name cannot serve the request.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise UnsupportedError(unknown("attention backend", backend, BACKENDS))
        if reason := BACKENDS[backend].refuses(request):
            raise UnsupportedError(f"attention backend {backend!r} cannot do {reason}; backend 'dense' can")
        return BACKENDS[backend].attend(request)
    for module in BACKENDS.values():
        if module.refuses(request) is None and module.suits(request):
            return module.attend(request)
    raise AssertionError("the dense backend refuses nothing")


def weights(request: Request) -> Tensor:
    """(B, H, T, S): the probabilities themselves, whatever backend does the rest."""
    return dense.weights(request)


__all__ = ["BACKENDS", "Request", "attend", "weights"]
