"""A LoRA becomes part of the weights that it was trained beside (arXiv:2106.09685, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers.lowrank import merged
from lamina.model import ModelSpec
from lamina.surgery.operation import Changed, Joining, Others, Promise
from lamina.surgery.weights import Beside, Made, Weights


@dataclass(frozen=True, kw_only=True)
class MergeAdapter(Joining):
    """W + s B A in place of W, wherever the adapter has a change: in float32, and rounded once."""

    NAME = "adapter"

    source: str  # a directory that peft wrote

    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def join(self, spec: ModelSpec, weights: Mapping[str, Tensor], others: Others) -> Changed:
        factors = others(self.source).weights
        layers = [name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")]
        if not layers:
            raise LaminaError(f"{self.source} is a whole model, and no adapter; the operation merge merges those")
        shapes = {name: tuple(one.shape) for name, one in spec.build(device="meta").named_parameters()}
        made: dict[str, Made] = {}
        for layer in layers:
            name, change = f"{layer}.weight", (len(factors[f"{layer}.lora_b"]), factors[f"{layer}.lora_a"].shape[1])
            if shapes.get(name) != change:
                found = f"it has shape {list(shapes[name])}" if name in shapes else "the model has none such"
                raise LaminaError(f"{self.source} changes {name} of shape {list(change)}, and here {found}")
            each = (name, *(f"{self.source}:{layer}.{part}" for part in ("lora_a", "lora_b", "scale")))
            made[name] = Made(each, "with what an adapter adds", _merged)
        beside = Beside(weights, {self.source: factors})
        gone = [f"{self.source}:{name}" for name in factors]
        promise = Promise("lossy", f"the model with its adapter, which changes {len(layers)} weights")
        return Changed(spec, Weights(beside, made, gone), promise)


def _merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    return merged(weight, lora_a, lora_b, float(scale))
