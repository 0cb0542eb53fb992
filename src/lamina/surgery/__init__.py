"""Surgery: functions (spec, state) -> (spec, state) that change a model and never invent a tensor."""

from __future__ import annotations

from lamina.surgery.build import build
from lamina.surgery.retrofit import retrofit

SURGERIES = {"retrofit": retrofit}
"""By name. The first two arguments are a spec and what maps the names of its parameters to tensors."""

__all__ = ["SURGERIES", "build", "retrofit"]
