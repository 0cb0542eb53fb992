"""A built model, laid out over the ranks of a mesh: experts, then heads and features, then texts, then layers (FSDP2).

The model stays a `lamina.Model` with the same parameter names and the same results. What a caller has to know:

- Every rank runs its part of the batch (`Mesh.reader` of `Mesh.readers`), and its loss is the *sum* over the labels
  whose logits it gets (`Mesh.labels`) divided by the count of the *global* batch (`Mesh.total`). Gradients of ranks are
  added up and never averaged, so their sum is the gradient of the global mean whatever the mesh is.
- Losses of routers (`Output.losses`) are those of each rank's own tokens; weigh them by its share of the tokens.
- `Output.logits` are whole on every rank of tensor: the head's parts of the vocabulary are gathered. Without tensor a
  loss may as well begin from `Output.hidden` and multiply with the table itself, right after the forward.
- Random numbers are drawn alike on the ranks of tensor, and by no other two: seed by `Mesh.stream`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import Experts, Layer
from lamina.layers.router import TopK
from lamina.model import Model
from lamina.parallel import experts
from lamina.parallel.axes import plan
from lamina.parallel.context import cut_texts
from lamina.parallel.mesh import Mesh
from lamina.parallel.pipeline import absent, cut_layers
from lamina.parallel.tensor import share

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def distribute(model: Model, mesh: Mesh, *, precision: str | None = None, reshard: bool = True) -> Model:
    """Leave this rank its part of the model, in place.

    Every rank gives the same model: built from one seed, loaded from one file (mapped weights that belong to others
    are never read), or built on "meta", to be filled by `materialise`. precision: of the products, "bfloat16" or
    "float16", while parameters stay as they are and gradients are added up in float32. reshard=False keeps layers
    gathered between forward and backward: more memory, fewer messages.

    Raises LaminaError where the model does not fit the mesh, and UnsupportedError for int8 models.
    """
    if model.mesh is not None:
        raise LaminaError("this model lies on a mesh already")
    if precision is not None and precision not in PRECISIONS:
        raise LaminaError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if any(not weight.dtype.is_floating_point for weight in model.buffers()):
        raise UnsupportedError("an int8 model is for decoding on one device only")
    plan(mesh.spec, mesh.spec.ranks, model.spec)
    if not model.embedding.weight.is_meta:
        model.to(mesh.device)
    elif mesh.spec.pipeline > 1:
        raise UnsupportedError("pipeline takes a model with its values; build it, or load it, on every rank")
    spec = mesh.spec
    if spec.pipeline > 1:
        dtype = model.embedding.weight.dtype if precision is None else PRECISIONS[precision]
        groups = mesh.places["pipeline"].get_group(), mesh.ends
        cut_layers(model, (mesh.stage, spec.pipeline), groups, mesh.device, dtype or model.embedding.weight.dtype)
    if spec.expert > 1:
        axes = ("expert", "tensor") if spec.tensor > 1 else ("expert",)
        experts.spread(model, mesh.experts[axes], mesh.places["expert"].get_group())
    if spec.tensor > 1:
        share(model, mesh.tensor, model.spec.embedding.vocabulary)
    if spec.context > 1:
        cut_texts(model, mesh.cut, mesh.places["context"].get_group())
    _layers(model, mesh, precision, reshard)
    model.mesh = mesh
    return model


def _layers(model: Model, mesh: Mesh, precision: str | None, reshard: bool) -> None:
    """FSDP2: each layer by itself, the rest together; experts over the ranks that have the same ones."""
    dtype = None if precision is None else PRECISIONS[precision]
    absent_here = absent(model)
    given: dict[str, Any] = {
        # What a layer is given has the dtype already; casting would take its `Call` to pieces.
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False),
        "reshard_after_forward": reshard,
        # A router's correction is moved by hand after a step (`rebalance`), alike on all ranks.
        "ignored_params": absent_here
        | {one.correction for one in model.modules() if isinstance(one, TopK) and one.correction is not None},
    }
    copies = ("replicate",) if mesh.spec.replicate > 1 else ()
    over = {name: getattr(mesh, name)[(*copies, name)] for name in ("layers", "experts")}
    if mesh.spec.expert > 1:
        for module in list(model.modules()):
            if isinstance(module, Experts):
                fully_shard(module.experts, mesh=over["experts"], **given)
    for module in reversed(list(model.modules())):  # inner ones first: RETRO's encoder lies in a layer
        if isinstance(module, Layer) and not absent_here >= set(module.parameters()):
            fully_shard(module, mesh=over["layers"], **given)
    policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None)
    fully_shard(model, mesh=over["layers"], **{**given, "mp_policy": policy, "reshard_after_forward": False})
    register_fsdp_forward_method(model, "encode")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum, not a mean
            module.set_force_sum_reduction_for_comms(True)  # which every backend has


def synchronise(model: nn.Module, on: bool) -> None:
    """Whether the next backward adds gradients up over the ranks: off for all micro-batches of a step but the last."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(on, recurse=False)
