"""ALBERT (arXiv:1909.11942): BERT with a narrow embedding table (section 3.1), layers that share their weights, and
the order of two sentences in place of the next one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lamina.errors import CheckpointError
from lamina.families import bert
from lamina.families.family import Fields, need
from lamina.model import ModelSpec
from lamina.weights.rules import Rule, pairs

FLAVOUR = bert.Flavour(
    "albert", "Albert", (2, 3, 0), 512, "predictions.", ("dense", "LayerNorm"), "pooler", "sop_classifier.classifier"
)
DEFAULTS = {
    "vocab_size": 30000,
    "embedding_size": 128,
    "hidden_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.1,
}


def spec(fields: Fields) -> ModelSpec:
    """config.json, and the names of the tensors where there are any -> spec: BERT's, narrowed and repeated."""
    fields.must("inner_group_num", 1)
    said = {**DEFAULTS, **fields.config}
    said["classifier_dropout"] = said["classifier_dropout_prob"]
    fields = Fields(said, fields.names, fields.where)
    made = bert.spec(fields, FLAVOUR)
    layers, groups = fields.layers(), fields.count("num_hidden_groups", 1)
    if layers % groups:
        raise CheckpointError(
            f"{fields.where}: num_hidden_layers={layers} is not a multiple of num_hidden_groups={groups}, so the groups"
            " would not run equally often"
        )
    stack, width = made.encoder, fields.count("embedding_size")
    assert stack is not None
    # Layer i of the paper is run i of the stack, in group i // (layers / groups).
    stack = stack.replace(layers=stack.layers[:groups], repeat=layers // groups, input_width=width)
    head, labels = made.head, made.labels
    if head is not None and head.transform is not None:
        head = head.replace(transform=head.transform.replace(width=width))
        if labels is not None:  # the order of two sentences, with labels and dropout as in a classifier
            rate = fields.number("classifier_dropout", stack.dropout)
            labels = bert.labels(fields, "sequence", rate).replace(task=labels.task)
    return made.replace(encoder=stack, head=head, labels=labels)


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    said = bert.config(spec, FLAVOUR)
    stack, labels = spec.encoder, spec.labels
    assert stack is not None
    need(stack.input_width is not None, "encoder.input_width", "is None")
    need(spec.head is not None or labels is None or labels.task != "next_sentence", "labels", "are of a pair by itself")
    said |= {
        "embedding_size": stack.input_width,
        "num_hidden_layers": len(stack.layers) * stack.repeat,
        "num_hidden_groups": len(stack.layers),
        "inner_group_num": 1,
    }
    if labels is not None and labels.task != "span":
        said |= {"num_labels": labels.labels, "classifier_dropout_prob": labels.dropout}
    return {name: value for name, value in said.items() if name != "classifier_dropout"}


E, H = "encoder.layers.{i}.", "albert.encoder.albert_layer_groups.{i}.albert_layers.0."
PARTS = {
    **{f"attention.op.{p}": f"attention.{n}" for p, n in zip("qkvo", ("query", "key", "value", "dense"), strict=True)},
    "attention.after": "attention.LayerNorm",
    "feedforward.op.up": "ffn",
    "feedforward.op.down": "ffn_output",
    "feedforward.after": "full_layer_layer_norm",
}
ENDS = {"input_norm": "embeddings.LayerNorm", "input": "encoder.embedding_hidden_mapping_in"}
WEIGHTS = (
    Rule("embedding.weight", "albert.embeddings.word_embeddings.weight"),
    Rule("encoder.position.weight", "albert.embeddings.position_embeddings.weight"),
    Rule("encoder.segment.weight", "albert.embeddings.token_type_embeddings.weight"),
    *pairs(E, H, PARTS),
    *pairs("encoder.", "albert.", ENDS),
)


def _size(layers: int, width: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        **more,
    }


ALBERT = replace(
    bert.family_of(
        FLAVOUR,
        WEIGHTS,
        {  # table 1 of the paper; the second version of the weights has no dropout but in the head
            "albert/base-v2": _size(12, 768, 12),
            "albert/large-v2": _size(24, 1024, 16),
            "albert/xlarge-v2": _size(24, 2048, 16),
            "albert/xxlarge-v2": _size(12, 4096, 64),
        },
    ),
    spec=spec,
    config=config,
)
