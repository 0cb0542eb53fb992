"""What models begin from: the deviation of every weight is measured against what is published, and against what
transformers gives to its own new models, where it follows the publications."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import transformers
from torch import Tensor

import lamina
from lamina.layers import Draw, FanInInitialSpec, NormalInitialSpec
from lamina.model import Model, ModelSpec
from lamina.weights import rules
from tests import families, small

CUT = 0.8796
"""The deviation of N(0, 1) without what is beyond 2: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1))."""

WIDTH, LAYERS, HIDDEN = 96, 3, 160
TINY_T5 = {"d_model": WIDTH, "d_kv": 20, "num_heads": 5, "d_ff": HIDDEN, "num_layers": LAYERS, "vocab_size": 701}


def made(name: str, seed: int = 3, **fields: int) -> Model:
    """A published size with its own initial values, of fewer and smaller layers."""
    family, config = next((f, f.sizes[name]) for f in _families() if name in f.sizes)
    return family.spec(lamina.families.Fields({**config, **fields})).build(seed=seed)


def _families():
    return [*map(lamina.families.family, lamina.families.FAMILIES), *lamina.families.UNPUBLISHED]
