"""Longformer (arXiv:2004.05150): RoBERTa with windows, global tokens and three more projections a layer.

Hugging Face's attention_window counts both sides: 512 there are 256 keys on each side here, and the token itself.
Which tokens are global the caller says (`marked`); where nobody says it, it is the first one for the classifier of
sequences, the question for the answering of questions and the choice for multiple choice, as in transformers.
"""

from __future__ import annotations

from typing import Any

from lamina.families import bert
from lamina.families.family import Fields, need, the
from lamina.layers import AttentionSpec, LayerSpec, LongformerSpec, StackSpec, StepSpec
from lamina.marks import AfterToken, BeforeToken, FirstToken
from lamina.model import ModelSpec
from lamina.specs import edit
from lamina.weights.rules import pairs

FLAVOUR = bert.Flavour("longformer", "Longformer", (0, 2, 1), 512, "lm_head.", ("dense", "layer_norm"), truncated=False)
SEPARATOR = 2


def windows(fields: Fields, layers: int) -> list[int]:
    """The keys on each side, layer by layer, from what counts both."""
    said = fields.config.get("attention_window", 512)
    both = said if isinstance(said, list) else [said] * layers
    if len(both) != layers or any(type(one) is not int or one < 2 or one % 2 for one in both):
        raise ValueError(
            f"{fields.where}: attention_window is {said!r}; it must be an even number of 2 or more, or one for each of"
            f" {layers} layers"
        )
    return [one // 2 for one in both]


def sparse(fields: Fields, dense: ModelSpec) -> ModelSpec:
    """The model whose encoder attends in windows, from the one that sees everything and is else the same."""
    stack = the(StackSpec, dense.encoder, "encoder")
    layers = [
        edit(layer, AttentionSpec, lambda path, part, window=window: _sparse(window, part))
        for layer, window in zip(stack.layers, windows(fields, len(stack.layers)), strict=True)
    ]
    return dense.replace(encoder=stack.replace(layers=tuple(layers)))


def dense(spec: ModelSpec) -> tuple[ModelSpec, list[int]]:
    """The inverse of `sparse`: that model, and what attention_window says."""
    stack = the(StackSpec, spec.encoder, "encoder")
    found = [_attention(i, layer) for i, layer in enumerate(stack.layers)]
    for i, one in enumerate(found):
        need(one.bias and not one.causal, f"encoder.layers.{i}.steps.0.op", "lacks biases or is causal")
    return edit(spec, LongformerSpec, lambda path, part: _dense(part)), [2 * one.window for one in found]


def spec(fields: Fields) -> ModelSpec:
    """config.json, and the names of the tensors where there are any -> spec."""
    fields.must("onnx_export", False)
    model = sparse(fields, bert.spec(fields, FLAVOUR))
    task = None if model.labels is None else model.labels.task
    if task == "sequence":
        return model.replace(marks=FirstToken())
    separator = fields.token("sep_token_id", SEPARATOR)
    rule = {"span": BeforeToken, "choice": AfterToken}.get(task or "")
    return model if rule is None or separator is None else model.replace(marks=rule(id=separator))


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    like, both = dense(spec)
    said = bert.config(like, FLAVOUR) | {"attention_window": both}
    said["sep_token_id"] = spec.marks.id if isinstance(spec.marks, BeforeToken | AfterToken) else SEPARATOR
    return said


def _sparse(window: int, attention: AttentionSpec) -> LongformerSpec:
    return LongformerSpec(heads=attention.heads, head_dim=attention.head_dim, window=window, dropout=attention.dropout)


def _attention(number: int, layer: LayerSpec) -> LongformerSpec:
    step = the(StepSpec, layer.steps[0], f"encoder.layers.{number}.steps.0")
    return the(LongformerSpec, step.op, f"encoder.layers.{number}.steps.0.op")


def _dense(part: LongformerSpec) -> AttentionSpec:
    return AttentionSpec(
        heads=part.heads, key_heads=part.heads, head_dim=part.head_dim, bias="all", dropout=part.dropout
    )


GLOBAL = {
    "attention.op.global_q": "attention.self.query_global",
    "attention.op.global_k": "attention.self.key_global",
    "attention.op.global_v": "attention.self.value_global",
}
WEIGHTS = (
    *bert.weights(FLAVOUR.base),
    *pairs("encoder.layers.{i}.", FLAVOUR.base + "encoder.layer.{i}.", GLOBAL),
)


def _size(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": 50265,
        "max_position_embeddings": 4098,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "attention_window": [512] * layers,
    }


SIZES = {"longformer/base": _size(12, 768, 12), "longformer/large": _size(24, 1024, 16)}
LONGFORMER = bert.family_of(FLAVOUR, WEIGHTS, SIZES, spec=spec, config=config)
