"""Block-quantised tensors of GGUF files, unpacked to float32 (ggml-quants.c, the `dequantize_row_*` functions).

A row is cut into blocks of 32 or 256 weights; each block keeps one or two float16 scales and small integers. The
order of every product and sum below is that of ggml, each rounded on its own, so results are the same to the last
bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 15  # weights unpacked at a time: they stay in a core's cache, and torch starts no threads for so few


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of every block, as a float32 column."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()  # (N, 1)


def bits(blocks: Tensor, start: int) -> Tensor:
    """The 32 bits at byte `start` of every block, lowest first."""
    word = blocks[:, start : start + 4, None] >> torch.arange(8, dtype=torch.uint8)  # (N, 4, 8)
    return (word & 1).flatten(1)  # (N, 32)


def nibbles(packed: Tensor) -> Tensor:
    """Low halves of all bytes of the last dimension, then their high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def q4_0(blocks: Tensor) -> Tensor:
    return (nibbles(blocks[:, 2:]).float() - 8).mul_(half(blocks, 0))


def q4_1(blocks: Tensor) -> Tensor:
    return nibbles(blocks[:, 4:]).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def q5_0(blocks: Tensor) -> Tensor:
    return ((nibbles(blocks[:, 6:]) | bits(blocks, 2) << 4).float() - 16).mul_(half(blocks, 0))


def q5_1(blocks: Tensor) -> Tensor:
    return (nibbles(blocks[:, 8:]) | bits(blocks, 4) << 4).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(half(blocks, 0))


def scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of a K block: 6 bits each, packed in bytes 4 to 15 behind two float16 factors.

    Bytes 4-7 hold the first four scales and bytes 8-11 the first four minima in their low 6 bits; the other four of
    each have their low 4 bits in bytes 12-15 and their high 2 bits on top of bytes 4-11.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), dim=1)
    scale, minimum = scales.float() * half(blocks, 0), minima.float() * half(blocks, 2)
    return scale[:, :, None], minimum[:, :, None]  # (N, 8, 1)


def q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = scales_and_minima(blocks)
    quants = nibbles(blocks[:, 16:].unflatten(1, (4, 32))).unflatten(2, (2, 32)).flatten(1, 2)  # (N, 8, 32)
    return quants.float().mul_(scale).sub_(minimum)


def q5_k(blocks: Tensor) -> Tensor:
    scale, minimum = scales_and_minima(blocks)
    high = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1  # (N, 8, 32)
    low = nibbles(blocks[:, 48:].unflatten(1, (4, 32))).unflatten(2, (2, 32)).flatten(1, 2)
    return (low | high << 4).float().mul_(scale).sub_(minimum)


def q6_k(blocks: Tensor) -> Tensor:
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * half(blocks, 208)  # (N, 16)
    low = nibbles(blocks[:, :128].unflatten(1, (2, 64)))  # (N, 2, 128)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts & 3).flatten(2)  # (N, 2, 128)
    quants = (low | high << 4).unflatten(2, (8, 16)).flatten(1, 2)  # (N, 16, 16)
    return (quants.float() - 32).mul_(scale[:, :, None])


class Layout(NamedTuple):
    """How one block of a stored type lies in the file."""

    name: str
    weights: int  # in a block
    size: int  # bytes of a block
    dtype: torch.dtype  # what reading gives
    unpack: Callable[[Tensor], Tensor] | None = None  # (N, size) bytes -> N * weights floats; None: as it lies


LAYOUTS = {
    0: Layout("F32", 1, 4, torch.float32),
    1: Layout("F16", 1, 2, torch.float16),
    2: Layout("Q4_0", 32, 18, torch.float32, q4_0),
    3: Layout("Q4_1", 32, 20, torch.float32, q4_1),
    6: Layout("Q5_0", 32, 22, torch.float32, q5_0),
    7: Layout("Q5_1", 32, 24, torch.float32, q5_1),
    8: Layout("Q8_0", 32, 34, torch.float32, q8_0),
    12: Layout("Q4_K", 256, 144, torch.float32, q4_k),
    13: Layout("Q5_K", 256, 176, torch.float32, q5_k),
    14: Layout("Q6_K", 256, 210, torch.float32, q6_k),
    24: Layout("I8", 1, 1, torch.int8),
    25: Layout("I16", 1, 2, torch.int16),
    26: Layout("I32", 1, 4, torch.int32),
    27: Layout("I64", 1, 8, torch.int64),
    28: Layout("F64", 1, 8, torch.float64),
    30: Layout("BF16", 1, 2, torch.bfloat16),
}  # fmt: skip

# Types that ggml has and lamina does not read: they are refused by name.
UNREAD = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8",
    33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def dequantize(data: Tensor, layout: Layout) -> Tensor:
    """A flat tensor of bytes as a flat tensor of float32 weights."""
    assert layout.unpack is not None
    blocks = data.view(-1, layout.size)
    weights = torch.empty(len(blocks), layout.weights, dtype=torch.float32)
    step = CHUNK // layout.weights
    for start in range(0, len(blocks), step):
        weights[start : start + step] = layout.unpack(blocks[start : start + step]).view(-1, layout.weights)
    return weights.flatten()


PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pack(weights: Tensor, kind: str) -> Tensor | None:
    """The bytes of a tensor as F32, F16, BF16 or Q8_0; None where the type cannot hold a value.

    Q8_0 rounds as ggml's quantize_row_q8_0_ref does: the scale in float32, halves away from zero, and then the scale
    is kept as float16.
    """
    if kind in PLAIN:
        packed = weights.to(PLAIN[kind]).contiguous()
        return packed.flatten().view(torch.uint8) if bool(packed.isfinite().all() | ~weights.isfinite().all()) else None
    assert kind == "Q8_0", kind
    blocks = weights.float().reshape(-1, 32)
    packed = torch.empty(len(blocks), 34, dtype=torch.uint8)
    for start in range(0, len(blocks), CHUNK):
        part = blocks[start : start + CHUNK]
        scale = part.abs().amax(dim=1, keepdim=True) / 127
        quotient = part * torch.where(scale > 0, 1 / scale, 0)
        whole = torch.trunc(quotient + torch.copysign(torch.tensor(0.5), quotient))
        half_scale = scale.half()
        if not bool(half_scale.isfinite().all()):
            return None
        packed[start : start + CHUNK, :2] = half_scale.view(torch.uint8)
        packed[start : start + CHUNK, 2:] = whole.to(torch.int8).view(torch.uint8)
    return packed.flatten()
