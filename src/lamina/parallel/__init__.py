"""Models on several ranks: one function decides the mesh, one lays a model out over it. Nothing else knows of ranks."""

from __future__ import annotations

from lamina.parallel.checkpoint import load_parts, save_parts
from lamina.parallel.distribute import distribute, synchronise
from lamina.parallel.launch import arguments, template
from lamina.parallel.mesh import Mesh, RankError, close_mesh, open_mesh
from lamina.parallel.plan import MeshSpec, plan
from lamina.parallel.state import clip_gradients, full_state, gradient_norm, load_full_state, materialise

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
]
