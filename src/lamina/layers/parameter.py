"""New parameters: N(0, 0.02) as in GPT-2 and BERT, so that a layer built alone is ready for use."""

from __future__ import annotations

import torch
from torch import nn


def parameter(*shape: int) -> nn.Parameter:
    """A parameter of this shape; without values on the meta device, where a model is first built."""
    tensor = torch.empty(*shape)
    return nn.Parameter(tensor if tensor.is_meta else tensor.normal_(std=0.02))
