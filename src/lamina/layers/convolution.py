"""The stem of a speech encoder: convolutions over the frames of a spectrogram, in place of an embedding of ids
(Whisper, arXiv:2212.04356, section 2.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.feedforward import ACTIVATIONS, Activation
from lamina.layers.initial import Draw
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class ConvolutionStemSpec(Spec):
    """act(convolution(x)) once a stride; each takes so many frames to one, and looks at `kernel` of them."""

    bins: int  # of the spectrogram: 80 in Whisper, 128 in its third large version
    strides: tuple[int, ...] = (1, 2)  # Whisper
    kernel: int = 3  # Whisper; odd, so that frame t stands in the middle of what is looked at
    act: Activation = "gelu"  # Whisper

    def check(self) -> None:
        if self.bins < 1 or not self.strides or min(self.strides) < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise LaminaError(
                f"bins={self.bins}, strides={self.strides} and kernel={self.kernel}: all at least 1, the kernel odd"
            )

    def build(self, width: int) -> ConvolutionStem:
        return ConvolutionStem(self, width)


class ConvolutionStem(nn.Module):
    """(B, bins, frames) -> (B, T, width); with strides 1 and 2, T is half of the frames, rounded up."""

    def __init__(self, spec: ConvolutionStemSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.act = ACTIVATIONS[spec.act]
        sizes = (spec.bins, *(width for _ in spec.strides))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(size, width, spec.kernel, stride, padding=spec.kernel // 2)
            for size, stride in zip(sizes, spec.strides)
        )

    def forward(self, features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """`mask`: (B, frames), 1 for frames and 0 for padding, which is on the right; what comes back is of the T."""
        if features.dim() != 3 or features.shape[1] != self.spec.bins or not features.shape[2]:
            raise LaminaError(
                f"input_features has shape {tuple(features.shape)}; expected (batch, bins, frames) with"
                f" {self.spec.bins} bins and at least one frame"
            )
        x = features.to(next(self.parameters()).dtype)  # spectra are computed in float32
        mask = self._right(mask, features)
        for convolution, stride in zip(self.convolutions, self.spec.strides):
            if mask is not None:  # beyond the last frame a text by itself has zeros, before each convolution
                x = x.masked_fill(~mask[:, None], 0.0)
            x = self.act(convolution(x))  # (B, width, T)
            mask = None if mask is None else mask[:, ::stride]
        return x.transpose(1, 2), mask

    def length(self, frames: int) -> int:
        """T, for so many frames."""
        return -(-frames // math.prod(self.spec.strides))

    def seen(self, mask: Tensor) -> Tensor:
        """(B, frames) -> (B, T): the mask of what comes out."""
        return mask[:, :: math.prod(self.spec.strides)]

    def _right(self, mask: Tensor | None, features: Tensor) -> Tensor | None:
        if mask is None:
            return None
        batch, _, frames = features.shape
        if mask.shape != (batch, frames):
            raise LaminaError(f"attention_mask has shape {tuple(mask.shape)}; input_features has {(batch, frames)}")
        mask = mask.bool()
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise LaminaError("attention_mask has padding before frames; input_features are padded on the right only")
        return None if bool(mask.all()) else mask

    def initialise(self, draw: Draw) -> None:
        for convolution in self.convolutions:
            weight: Tensor = convolution.weight  # pyright: ignore[reportAssignmentType]
            draw.matrix(weight, weight[0].numel())
            nn.init.zeros_(convolution.bias)  # pyright: ignore[reportArgumentType]
