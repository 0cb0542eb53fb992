"""Rotary position embedding (RoFormer, arXiv:2104.09864) and its published extensions to longer contexts.

Each pair (a, b) of a query or key at position p turns by p * f: (a cos - b sin, a sin + b cos), f_i = base^(-2i / r).
Phases are computed in float32 from positions, whatever the dtype of the model, and cast last: 257 has no bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.specs import Spec
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class LinearScaling(Spec):
    """Position interpolation: every frequency divided by `factor` (arXiv:2306.15595, equation 4)."""

    NAME = "linear"

    factor: float


@dataclass(frozen=True, kw_only=True)
class NTKScaling(Spec):
    """NTK-aware: the base becomes base * factor^(r / (r - 2)) (arXiv:2309.00071, section 3.1)."""

    NAME = "ntk"

    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicNTKScaling(Spec):
    """The base grows with the length n once it passes `original`:
    base * (factor n / original - factor + 1)^(r / (r - 2)) (arXiv:2309.00071, appendix B.2). Beyond `original` a
    cached key would have turned by another base, so there the model refuses a cache."""

    NAME = "dynamic"

    factor: float
    original: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling(Spec):
    """YaRN: fast pairs keep their frequency, slow ones are interpolated, a ramp lies between; phases are scaled by
    `attention` (arXiv:2309.00071, sections 3.2 to 3.4)."""

    NAME = "yarn"

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float | None = None  # None: from the factor and the two scales below, 0.1 ln(factor) + 1 without them
    scale: float | None = None  # DeepSeek's mscale
    scale_all: float | None = None  # DeepSeek's mscale_all_dim
    whole: bool = True  # the ends of the ramp are rounded to whole pairs; False in GPT-OSS

    def temperature(self, weight: float = 1.0) -> float:
        """0.1 weight ln(factor) + 1: what a longer context asks the scores to be sharpened by."""
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling(Spec):
    """LongRoPE: a searched divisor for each pair, one list up to `original` tokens and one beyond (arXiv:2402.13753).
    The lists switch with the length, so beyond `original` the model refuses a cache."""

    NAME = "longrope"

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    factor: float
    attention: float | None = None  # None: sqrt(1 + ln(factor) / ln(original))


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(Spec):
    """Llama 3.1: wavelengths above original / low are divided by `factor`, those below original / high are kept, and
    those between are blended (arXiv:2407.21783, section 3.4; Meta's reference code)."""

    NAME = "llama3"

    factor: float  # 8 in Llama 3.1, 32 in 3.2
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


Scaling = LinearScaling | NTKScaling | DynamicNTKScaling | YarnScaling | LongRopeScaling | Llama3Scaling


@dataclass(frozen=True, kw_only=True)
class RotarySpec(Spec):
    """Rotary positions inside attention. Hugging Face's half-split pairing (i, i + r/2) unless `interleaved`."""

    base: float = 10_000.0  # 500,000 in Llama 3; 1,000,000 in Mixtral, Qwen 2 and 3, Gemma 3's global layers
    width: int | None = None  # of the head, the first `width` features turn; None: all (25 % in Pythia)
    interleaved: bool = False  # pairs (2i, 2i + 1): GPT-J, Meta's LLaMA files, DeepSeek
    scaling: Scaling | None = None

    def check(self) -> None:
        if self.base <= 1 or (self.width is not None and (self.width < 2 or self.width % 2)):
            raise LaminaError(
                f"RotarySpec(base={self.base}, width={self.width}): base > 1 and an even width are needed"
            )

    @property
    def limit(self) -> int | None:
        """The length beyond which phases depend on the length itself, so that cached keys would not fit; or None."""
        changes = isinstance(self.scaling, DynamicNTKScaling | LongRopeScaling)
        return self.scaling.original if changes else None  # pyright: ignore


def check_width(spec: RotarySpec | None, size: int) -> None:
    """Raise LaminaError where heads of `size` features cannot turn as `spec` says."""
    turned = 0 if spec is None else spec.width or size
    if turned > size or turned % 2:
        raise LaminaError(f"rotary.width={turned} must be even and at most head_dim={size}")


def phases(
    spec: RotarySpec, size: int, tokens: Tokens, dtype: torch.dtype, memo: MutableMapping[Any, Any]
) -> tuple[Tensor, Tensor]:
    """cos and signed sin, each (B, 1, T, r), for heads of `size` features; once a forward for each spec."""
    name = ("phases", spec, size, id(tokens), dtype)
    if name not in memo:
        width = spec.width or size
        frequency, scale = _frequency(spec, width, tokens)
        angle = tokens.position.to(torch.float32)[:, :, None] * frequency  # (B, T, r / 2)
        cos, sin = (angle.cos() * scale)[:, None], (angle.sin() * scale)[:, None]
        if spec.interleaved:
            cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)
        else:
            cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        memo[name] = (cos.to(dtype), sin.to(dtype), tokens)
    return memo[name][:2]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first r features of each head of x (B, H, T, D); the rest pass."""
    width = cos.shape[-1]
    turned, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    if interleaved:
        partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = turned.roll(width // 2, dims=-1)
    turned = turned * cos + partner * sin  # sin carries the sign of each side of the pair
    return turned if rest is None else torch.cat([turned, rest], dim=-1)


def prepare(spec: RotarySpec, size: int) -> None:
    """Compute the tables of heads of `size` features now: while a forward is traced, tensors have no values to tell."""
    beyond = (False, True) if isinstance(spec.scaling, LongRopeScaling) else (False,)
    if not isinstance(spec.scaling, DynamicNTKScaling):
        for one in beyond:
            table(spec, spec.width or size, one)


def _frequency(spec: RotarySpec, width: int, tokens: Tokens) -> tuple[Tensor, float]:
    """Frequencies (r / 2,), or (B, 1, r / 2) where they depend on the length of the row; the scale of the phases."""
    device, scaling = tokens.position.device, spec.scaling
    if isinstance(scaling, DynamicNTKScaling):
        length = _length(tokens).clamp(min=scaling.original).to(torch.float32)
        growth = scaling.factor * length / scaling.original - (scaling.factor - 1)
        base = spec.base * growth ** (width / (width - 2))  # (B, 1, 1)
        exponent = torch.arange(0, width, 2, device=device).to(torch.float32) / width
        return 1.0 / base**exponent, 1.0
    if isinstance(scaling, LongRopeScaling):
        short, scale = table(spec, width, False)
        long, _ = table(spec, width, True)
        both = [torch.tensor(values, dtype=torch.float32, device=device) for values in (short, long)]
        return torch.where(_length(tokens) > scaling.original, both[1], both[0]), scale
    values, scale = table(spec, width, False)
    if torch.compiler.is_exporting():  # a table of constants would have to travel beside the exported code
        return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values]), scale
    return torch.tensor(values, dtype=torch.float32, device=device), scale


def _length(tokens: Tokens) -> Tensor:
    return tokens.position.amax(dim=1)[:, None, None] + 1


@cache
def table(spec: RotarySpec, width: int, beyond: bool = False) -> tuple[tuple[float, ...], float]:
    """The r / 2 frequencies (radians a token) and the factor on cos and sin. `beyond`: LongRoPE's second list."""
    scaling, base = spec.scaling, spec.base
    if isinstance(scaling, NTKScaling):
        base = base * scaling.factor ** (width / (width - 2))
    # float32 on the CPU like the published implementations, so that phases agree far from the origin too.
    wavelength = base ** (torch.arange(0, width, 2, device="cpu").to(torch.float32) / width)
    frequency, scale = 1.0 / wavelength, 1.0
    if isinstance(scaling, LinearScaling):
        frequency = frequency / scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        frequency = _llama3(frequency, scaling)
    elif isinstance(scaling, YarnScaling):
        frequency, scale = _yarn(wavelength, scaling, base, width)
    elif isinstance(scaling, LongRopeScaling):
        divisors = scaling.long if beyond else scaling.short
        if len(divisors) != width // 2:
            raise LaminaError(
                f"LongRopeScaling has {len(divisors)} divisors; heads that turn {width} need {width // 2}"
            )
        frequency = 1.0 / (torch.tensor(divisors, dtype=torch.float32, device="cpu") * wavelength)
        scale = scaling.attention
        if scale is None:
            grown = scaling.factor > 1
            scale = math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original)) if grown else 1.0
    return tuple(frequency.tolist()), scale


def _llama3(frequency: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelength = 2 * math.pi / frequency
    blend = (scaling.original / wavelength - scaling.low) / (scaling.high - scaling.low)
    mixed = (1 - blend) * frequency / scaling.factor + blend * frequency
    slow = wavelength > scaling.original / scaling.low
    fast = wavelength < scaling.original / scaling.high
    return torch.where(slow, frequency / scaling.factor, torch.where(fast, frequency, mixed))


def _yarn(wavelength: Tensor, scaling: YarnScaling, base: float, width: int) -> tuple[Tensor, float]:
    def pair(turns: float) -> float:
        """The (fractional) pair that makes `turns` full turns within the original context."""
        return width * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if high == low else high
    ramp = ((torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp  # the published code's order of operations, to the last bit
    frequency = 1.0 / (scaling.factor * wavelength) * (1 - keep) + 1.0 / wavelength * keep
    if scaling.attention is not None:
        return frequency, scaling.attention
    if scaling.scale and scaling.scale_all:
        return frequency, scaling.temperature(scaling.scale) / scaling.temperature(scaling.scale_all)
    return frequency, scaling.temperature()
