"""Models on several ranks: one function decides the mesh, one lays a model out over it. Nothing else knows of ranks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Mesh": "mesh",
    "MeshSpec": "axes",
    "RankError": "mesh",
    "arguments": "launch",
    "clip_gradients": "state",
    "close_mesh": "mesh",
    "distribute": "layout",
    "full_state": "state",
    "gradient_norm": "state",
    "load_full_state": "state",
    "load_parts": "checkpoint",
    "materialise": "state",
    "open_mesh": "mesh",
    "plan": "axes",
    "save_parts": "checkpoint",
    "synchronise": "layout",
    "template": "launch",
    "through": "pipeline",
}
"""Name -> its file. One process that only reads a `MeshSpec`, or starts others, does not import torch.distributed."""

__all__ = [
    "Mesh",
    "MeshSpec",
    "RankError",
    "arguments",
    "clip_gradients",
    "close_mesh",
    "distribute",
    "full_state",
    "gradient_norm",
    "load_full_state",
    "load_parts",
    "materialise",
    "open_mesh",
    "plan",
    "save_parts",
    "synchronise",
    "template",
    "through",
]

if TYPE_CHECKING:
    from lamina.parallel.axes import MeshSpec, plan
    from lamina.parallel.checkpoint import load_parts, save_parts
    from lamina.parallel.launch import arguments, template
    from lamina.parallel.layout import distribute, synchronise
    from lamina.parallel.mesh import Mesh, RankError, close_mesh, open_mesh
    from lamina.parallel.pipeline import through
    from lamina.parallel.state import clip_gradients, full_state, gradient_norm, load_full_state, materialise


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"lamina.parallel has no name {name!r}")
    value = getattr(import_module(f"lamina.parallel.{_HOME[name]}"), name)
    globals()[name] = value
    return value
