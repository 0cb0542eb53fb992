"""What a model looked at while it wrote: the weights of some layers, small enough to lie inside a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.layers import ChunkedCrossAttention, CrossAttention, Record
from lamina.model import Model

LAYERS = 4  # shown, evenly spaced
TOKENS = 96  # the last ones of a longer text
OTHERS = (CrossAttention, ChunkedCrossAttention)  # they look at another text


@dataclass(frozen=True)
class Attention:
    """Weights (H, T, T) by the path of their layer, of the last tokens of a text; `left_out` came before them."""

    weights: dict[str, Tensor]
    tokens: tuple[str, ...]
    left_out: int
    causal: bool

    def to_dict(self) -> dict[str, Any]:
        """For the page: the square roots of the weights in 255 steps, so that small ones stay apart."""
        layers = []
        for path, weights in self.weights.items():
            steps = (weights.float().clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
            layers.append({"path": path, "weights": base64.b64encode(steps.cpu().numpy().tobytes()).decode()})
        heads = next(iter(self.weights.values())).shape[0]
        return {"tokens": list(self.tokens), "heads": heads, "causal": self.causal, "layers": layers}


@torch.inference_mode()
def attention_of(
    model: Model,
    ids: Sequence[int],
    tokens: Sequence[str],
    *,
    layers: int = LAYERS,
    source: Sequence[int] | None = None,
) -> Attention | None:
    """The weights of up to `layers` layers over `ids`, from the model's own record; None where no layer has any.

    Of an encoder-decoder, which has read `source`: those of what it wrote over itself.
    """
    stack = model.decoder if model.decoder is not None else model.encoder
    assert stack is not None
    repeat = stack.spec.repeat
    names = []  # as a record calls them: by run, where layers run several times
    for i, layer in enumerate(stack.layers):
        found = [name for name, module in layer.named_modules() if hasattr(module, "retained")]
        inner = tuple(name for name in found if isinstance(layer.get_submodule(name), OTHERS))
        found = [name for name in found if not (inner and name.startswith(inner))]
        found = [name for name in found if not name.startswith(tuple(f"{other}." for other in found))]  # memories
        names += [f"layers.{i * repeat + turn}.{name}" for turn in range(repeat) for name in found]
    side = "decoder" if model.decoder is not None else "encoder"
    count = min(layers, len(names))
    chosen = [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]
    record = Record(*(f"{side}.{name}.weights" for name in chosen))
    read = {"decoder_input_ids": ids, "input_ids": source} if model.spec.two_stacks else {"input_ids": ids}
    device = model.embedding.weight.device
    model(
        **{n: torch.tensor([list(one or ())], device=device) for n, one in read.items()}, record=record, keep_logits=0
    )
    kept = {name.removesuffix(".weights"): value[0] for name, value in record.values.items()}
    kept = {name: value for name, value in kept.items() if value.shape[-1] == len(ids)}
    if not kept:
        return None
    left_out = max(len(ids) - TOKENS, 0)
    heads = min(value.shape[0] for value in kept.values())
    shown = {name: value[:heads, left_out:, left_out:].float().cpu() for name, value in kept.items()}
    causal = all(float(value.triu(1).abs().max()) == 0 for value in shown.values())
    return Attention(shown, tuple(tokens)[left_out:], left_out, causal)
