"""Generation and embedding: what is done with a model once it is loaded."""

from __future__ import annotations

from lamina.generation.embed import embed
from lamina.generation.loop import Limits, Step, generate, limits_of, stream
from lamina.generation.sample import Sampling

__all__ = ["Limits", "Sampling", "Step", "embed", "generate", "limits_of", "stream"]
