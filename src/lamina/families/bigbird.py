"""BigBird (arXiv:2007.14062): BERT with windows of blocks, global end blocks, and dense attention in short texts.

Which form a text gets is decided anew for each document: dense for one of at most (5 + 2 r) blocks. In transformers a
short batch turns the model dense for good.
"""

from __future__ import annotations

from typing import Any

from lamina.families import bert
from lamina.families.family import Fields, need, the
from lamina.layers import AttentionSpec, BigBirdSpec, StackSpec
from lamina.marks import EndBlocks
from lamina.model import ModelSpec
from lamina.specs import edit
from lamina.weights.rules import Shape

FLAVOUR = bert.Flavour(
    "big_bird",
    "BigBird",
    (1, 2, 0),
    4096,
    "cls.predictions.",
    ("transform.dense", "transform.LayerNorm"),
    pooler="pooler",
    prefix="bert.",
)
DEFAULTS = {"vocab_size": 50358, "hidden_act": "gelu_new", "num_hidden_layers": 12}
REFUSED = {
    "classifier.dense.weight": "BigBirdForSequenceClassification",  # its own activation in place of tanh
    "qa_classifier.qa_outputs.weight": "BigBirdForQuestionAnswering",  # a whole feed-forward step before the labels
}


def spec(fields: Fields) -> ModelSpec:
    """config.json, and the names of the tensors where there are any -> spec."""
    fields.must("use_bias", True)
    said = (fields.config.get("architectures") or [""])[0]
    for name, kind in REFUSED.items():
        if said == kind or name in (fields.names or ()):
            raise ValueError(f"{fields.where}: the head of {kind} is not built")
    fields = fields.over(DEFAULTS)
    made = bert.spec(fields, FLAVOUR)
    scale = "root" if fields.flag("rescale_embeddings", False) else "none"
    made = made.replace(embedding=made.embedding.replace(scale=scale))
    if fields.choice("attention_type", {"block_sparse": False, "original_full": True}, "block_sparse"):
        return made
    size, repeats = fields.count("block_size", 64), fields.count("num_random_blocks", 3, least=0)

    def sparse(path: str, part: AttentionSpec) -> BigBirdSpec:
        shape = {"heads": part.heads, "head_dim": part.head_dim, "dropout": part.dropout}
        return BigBirdSpec(**shape, size=size, repeats=repeats)

    stack = edit(the(StackSpec, made.encoder, "encoder"), AttentionSpec, sparse)
    return made.replace(encoder=stack, marks=EndBlocks(size=size, short=(5 + 2 * repeats) * size))


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    found = [part for _, part in spec.walk() if isinstance(part, BigBirdSpec)]
    dense = edit(spec, BigBirdSpec, lambda path, part: part.dense.replace(pattern=bert.Everything()))
    said = bert.config(dense, FLAVOUR)
    said["rescale_embeddings"] = spec.embedding.scale == "root"
    said["attention_type"] = "block_sparse" if found else "original_full"
    if found:
        need(len(set(found)) == 1, "encoder.layers", "differ in their blocks")
        said |= {"block_size": found[0].size, "num_random_blocks": found[0].repeats}
    return said


WEIGHTS = bert.weights(FLAVOUR.base)
SIZES = {
    "bigbird/base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "bigbird/large": {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}


def unused(spec: ModelSpec) -> dict[str, Shape]:
    """The pooler, which transformers' heads of this family hold even where they do not read it."""
    headed = spec.pooler is None and (spec.head is not None or spec.labels is not None)
    return {"bert.pooler.weight": (spec.width, spec.width), "bert.pooler.bias": (spec.width,)} if headed else {}


BIGBIRD = bert.family_of(FLAVOUR, WEIGHTS, SIZES, spec=spec, config=config, zeros=unused)
