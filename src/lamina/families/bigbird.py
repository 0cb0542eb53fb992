"""BigBird (arXiv:2007.14062): BERT with windows of blocks, global end blocks, and dense attention in short texts.

Which form a text gets is decided anew for each document: dense for one of at most (5 + 2 r) blocks. In transformers a
short batch turns the model dense for good.

A decoder (`BigBirdForCausalLM`) is causal and dense, whatever `attention_type` says: that is what transformers computes
in short texts, while its sparse form lets each token of a long one see later tokens.
"""

from __future__ import annotations

from typing import Any

from lamina.families import bert
from lamina.families.family import Fields, need, parts, the
from lamina.layers import AttentionSpec, BigBirdSpec, LabelStepSpec, LayerNormSpec, StackSpec
from lamina.marks import EndBlocks
from lamina.model import ModelSpec
from lamina.specs import edit
from lamina.weights.rules import Shape, pairs

FLAVOUR = bert.Flavour(
    "big_bird",
    "BigBird",
    (1, 2, 0),
    4096,
    "cls.predictions.",
    ("transform.dense", "transform.LayerNorm"),
    pooler="pooler",
    prefix="bert.",
    answers="qa_classifier.qa_outputs",
    decodes=True,
)
DEFAULTS = {"vocab_size": 50358, "hidden_act": "gelu_new", "num_hidden_layers": 12}
SEPARATOR = 66


def spec(fields: Fields) -> ModelSpec:
    """config.json, and the names of the tensors where there are any -> spec."""
    fields.must("use_bias", True)
    fields = fields.over(DEFAULTS)
    made = bert.spec(fields, FLAVOUR)
    scale = "root" if fields.flag("rescale_embeddings", False) else "none"
    made = _headed(fields, made.replace(embedding=made.embedding.replace(scale=scale)))
    full = fields.choice("attention_type", {"block_sparse": False, "original_full": True}, "block_sparse")
    return made if full or made.encoder is None else sparse(fields, made)


def sparse(fields: Fields, made: ModelSpec) -> ModelSpec:
    """A model whose encoder sees by blocks, from one that sees everything; BigBird-Pegasus too."""
    size, repeats = fields.count("block_size", 64), fields.count("num_random_blocks", 3, least=0)

    def one(path: str, part: AttentionSpec) -> BigBirdSpec:
        shape = {"heads": part.heads, "head_dim": part.head_dim, "bias": part.bias, "dropout": part.dropout}
        return BigBirdSpec(**shape, size=size, repeats=repeats)

    stack = edit(the(StackSpec, made.encoder, "encoder"), AttentionSpec, one)
    return made.replace(encoder=stack, marks=EndBlocks(size=size, short=(5 + 2 * repeats) * size))


def dense(spec: ModelSpec) -> tuple[ModelSpec, dict[str, Any]]:
    """The inverse of `sparse`, and what config.json says of the blocks."""
    found = {part for _, part in spec.walk() if isinstance(part, BigBirdSpec)}
    if not found:
        return spec, {"attention_type": "original_full"}
    need(len(found) == 1, "encoder.layers", "differ in their blocks")
    (block,) = found
    made = edit(spec, BigBirdSpec, lambda path, part: part.dense.replace(pattern=bert.Everything()))
    said = {"attention_type": "block_sparse", "block_size": block.size, "num_random_blocks": block.repeats}
    return made, said


def _headed(fields: Fields, made: ModelSpec) -> ModelSpec:
    """The heads, where they are not BERT's."""
    if made.encoder is None or made.labels is None:
        return made
    stack, _, feedforward = parts(made, "encoder")
    if made.pooler is not None and made.labels.task == "sequence":
        return made.replace(pooler=made.pooler.replace(act=feedforward.act))
    if made.labels.task == "span":
        norm = the(LayerNormSpec, stack.input_norm, "encoder.input_norm")
        after = fields.token("sep_token_id", SEPARATOR)
        if after is not None:
            fields.count("type_vocab_size", 2, least=2)  # the question is of segment 0, what follows it of segment 1
        step = LabelStepSpec(feedforward=feedforward, norm=norm, dropout=stack.dropout)
        return made.replace(labels=made.labels.replace(step=step, after=after))
    return made


def config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json."""
    made, blocks = dense(spec)
    said = bert.config(made, FLAVOUR) | blocks
    said["rescale_embeddings"] = spec.embedding.scale == "root"
    if spec.labels is not None and spec.labels.task == "span":
        said["sep_token_id"] = spec.labels.after
    return said


STEP = {
    "labels.step.feedforward.up": "qa_classifier.intermediate.dense",
    "labels.step.feedforward.down": "qa_classifier.output.dense",
    "labels.step.norm": "qa_classifier.output.LayerNorm",
}
WEIGHTS = (*bert.weights(FLAVOUR.base, "encoder", "decoder"), *pairs("", "", STEP))
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
    """The pooler, which transformers' heads of this family hold even where they do not read it; not that of answers."""
    task = None if spec.labels is None else spec.labels.task
    read = spec.pooler is not None and task != "sequence"
    held = not read and (spec.head is not None or task not in (None, "span"))
    return {"bert.pooler.weight": (spec.width, spec.width), "bert.pooler.bias": (spec.width,)} if held else {}


BIGBIRD = bert.family_of(FLAVOUR, WEIGHTS, SIZES, spec=spec, config=config, zeros=unused)
