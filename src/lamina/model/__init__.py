"""The waist of the house: everything above sees the layers only through a model and its spec."""

from lamina.model.model import Model, Output, initialise
from lamina.model.spec import ModelSpec, SpecialTokens, of_text, reads_memory

__all__ = ["Model", "ModelSpec", "Output", "SpecialTokens", "initialise", "of_text", "reads_memory"]
