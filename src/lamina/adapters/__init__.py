"""Adapters: small trained changes of a model whose own weights stay as they are. LoRA, and peft's files of it."""

from __future__ import annotations

from lamina.adapters.attach import Attached, adapted, attach, detach, merge, merged_tensors
from lamina.adapters.places import FACTORS, Place, places
from lamina.adapters.spec import LoRASpec

__all__ = [
    "FACTORS",
    "Attached",
    "LoRASpec",
    "Place",
    "adapted",
    "attach",
    "detach",
    "merge",
    "merged_tensors",
    "places",
]
