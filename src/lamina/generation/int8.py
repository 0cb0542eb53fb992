"""8-bit weights for decoding: each row of a matrix is kept as whole numbers from -127 to 127 and one scale.

Weights only: activations keep their dtype, so the error is that of rounding the weights (at most scale / 2 each).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import UnsupportedError
from lamina.generation.package import dots
from lamina.layers import Embedding, Experts, LanguageHead
from lamina.layers.linear import linear
from lamina.model import Model


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> int8 values and the (out,) float32 scales: weight is about values * scale."""
    wide = weight.detach().float()
    scale = wide.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (wide / scale[:, None]).round().to(torch.int8), scale


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times the rounded matrix."""
    if torch.compiler.is_exporting():
        return dots(x, weight, scale, bias)
    return linear(x, weight, bias, scale)


class Int8Linear(nn.Module):
    """A linear layer with a rounded weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values, scale = rounded(linear.weight)
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.scale, self.bias)  # pyright: ignore[reportArgumentType]


class Int8Embedding(nn.Module):
    """A token table with rounded rows."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        values, scale = rounded(embedding.weight)
        self.inner = [embedding]  # for its scaling; in a list, so that its table is no part of this module
        self.dtype = embedding.weight.dtype
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        embedding._parameters.pop("weight")

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight).to(torch.float32)  # pyright: ignore[reportArgumentType]
        rows = rows * F.embedding(ids, self.scale[:, None])  # pyright: ignore[reportIndexIssue]
        return self.inner[0].scaled(rows.to(self.dtype))


class Int8Head(nn.Module):
    """A language head whose matrix, its own or the token table, is rounded."""

    def __init__(self, head: LanguageHead, embedding: Int8Embedding) -> None:
        super().__init__()
        self.spec, self.transform, self.bias = head.spec, head.transform, head.bias
        self.embedding = [embedding]
        if head.weight is not None:
            values, scale = rounded(head.weight)
            self.register_buffer("weight", values)
            self.register_buffer("scale", scale)
        self.inner = [head]

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        own = self if self.spec.tied is False else self.embedding[0]
        weight, scale = own.weight, own.scale
        return self.inner[0].finish(product(self.inner[0].begin(x), weight, scale, self.bias))  # pyright: ignore


def quantize_int8(model: Model) -> None:
    """Round every matrix of `model` in place; norms, biases and position tables stay as they are, and so do matrices
    that a layer says it also reads whole (`READ_WHOLE`: the up-projections of latent attention).

    Raises UnsupportedError for models without a decoder with a language head, and for mixtures of experts.
    """
    if model.decoder is None or not isinstance(model.head, LanguageHead):
        raise UnsupportedError("quantize='int8' is for models that generate: a decoder with a language head")
    if any(isinstance(module, Experts) for module in model.modules()):
        raise UnsupportedError(
            "quantize='int8' is not built for mixtures of experts, whose matrices would stay as they are"
        )
    for module in list(model.decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name not in getattr(module, "READ_WHOLE", ()):
                setattr(module, name, Int8Linear(child))
    embedding = Int8Embedding(model.embedding)
    model.head = Int8Head(model.head, embedding)  # pyright: ignore[reportAttributeAccessIssue]
    model.embedding = embedding  # pyright: ignore[reportAttributeAccessIssue]
    model.requires_grad_(False)
