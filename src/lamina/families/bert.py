"""BERT (arXiv:1810.04805) and RoBERTa (arXiv:1907.11692): post-norm encoders with learned positions, and their heads.
ALBERT (albert.py) is made of the same.

The head is what the file holds: an encoder with or without pooler, masked LM, pre-training (masked LM and next
sentence), next sentence alone, sequence or token classification, question answering, or multiple choice; in BigBird the
same layers may be a decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lamina.errors import CheckpointError
from lamina.families.family import (
    ACTIVATIONS,
    Family,
    Fields,
    activation_name,
    in_turn,
    initial_config,
    need,
    parts,
    special_config,
    the,
)
from lamina.layers import (
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LabelHeadSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LearnedPositionSpec,
    PoolerSpec,
    SegmentSpec,
    StackSpec,
    TransformSpec,
)
from lamina.layers.head import Task
from lamina.model import ModelSpec
from lamina.patterns import Causal, Everything
from lamina.weights.rules import Rule, Shape, pairs

TASKS: dict[str, Task] = {
    "ForNextSentencePrediction": "next_sentence",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "span",
    "ForMultipleChoice": "choice",
}
CAUSAL = "ForCausalLM"


@dataclass(frozen=True)
class Flavour:
    """Where RoBERTa, ALBERT and BigBird differ from BERT."""

    model_type: str
    name: str  # of the classes
    special: tuple[int | None, int | None, int | None]
    positions: int  # default of max_position_embeddings
    language: str  # prefix of the masked-LM head
    transform: tuple[str, str]  # its dense layer and its norm
    pooler: str = "pooler.dense"
    pair: str = "cls.seq_relationship"  # which sentence comes next
    prefix: str = ""  # of what is not a head, where it is not the model type
    answers: str = "qa_outputs"
    truncated: bool = True  # nothing of an initial weight is beyond twice its deviation
    decodes: bool = False  # whether there is a decoder of the same layers (CAUSAL) too

    @property
    def base(self) -> str:
        return self.prefix or f"{self.model_type}."

    @property
    def roberta(self) -> bool:
        """Whether positions count from the id of padding."""
        return self.model_type in ("roberta", "longformer")

    @property
    def summarises(self) -> bool:
        """Whether the classifier of sequences has its own dense layer, and does not read the pooler."""
        return self.roberta or self.model_type == "big_bird"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The ends of the names of classes."""
        return ("Model", "ForMaskedLM", "ForPreTraining", *TASKS, *([CAUSAL] if self.decodes else []))


BERT_FLAVOUR = Flavour(
    "bert", "Bert", (None, None, 0), 512, "cls.predictions.", ("transform.dense", "transform.LayerNorm")
)
ROBERTA_FLAVOUR = Flavour("roberta", "Roberta", (0, 2, 1), 512, "lm_head.", ("dense", "layer_norm"), truncated=False)


def spec(fields: Fields, flavour: Flavour) -> ModelSpec:
    """config.json, and the names of the tensors where there are any -> spec."""
    fields.must("position_embedding_type", "absolute")
    causal = flavour.decodes and _kind_of(fields, flavour) == CAUSAL
    fields.must("is_decoder", causal)
    if causal and not fields.flag("is_decoder", False):
        raise CheckpointError(
            f"{fields.where}: is_decoder is not true, so tokens of this {flavour.name}{CAUSAL} would see later ones;"
            f" set it, or say {flavour.name}ForMaskedLM in architectures"
        )
    fields.must("add_cross_attention", False)
    fields = fields.over({"hidden_size": 768, "num_attention_heads": 12})
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    roberta = flavour.roberta
    special = fields.special(*flavour.special)
    if roberta and special.pad is None:
        raise ValueError(f"{fields.where}: pad_token_id is null; RoBERTa counts positions from it")
    offset = special.pad + 1 if roberta and special.pad is not None else 0
    rows = fields.count("max_position_embeddings", flavour.positions)
    if rows <= offset:
        raise ValueError(f"{fields.where}: max_position_embeddings={rows}; the first {offset} rows are not positions")
    norm = LayerNormSpec(eps=fields.number("layer_norm_eps", 1e-12))
    rate = fields.number("hidden_dropout_prob", 0.1)
    attention = AttentionSpec(
        heads=heads,
        key_heads=heads,
        head_dim=fields.head_dim("hidden_size", "num_attention_heads"),
        pattern=Causal() if causal else Everything(),
        bias="all",
        dropout=fields.number("attention_probs_dropout_prob", 0.1),
    )
    act = fields.choice("hidden_act", ACTIVATIONS, "gelu")
    feedforward = FeedForwardSpec(hidden=fields.count("intermediate_size", 3072), act=act, gated=False, bias=True)
    layer = in_turn(attention, feedforward, after=norm, dropout=rate)
    language, pooled, task = _parts(fields, flavour)
    labels_rate = fields.number("classifier_dropout", rate)
    if task == "choice" and flavour.summarises:  # that rate is then of the classifier of sequences alone
        labels_rate = rate
    transform = TransformSpec(act="gelu" if roberta else act, norm=norm)
    head = LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", True), bias=True, transform=transform)
    stack = StackSpec(
        layers=(layer,) * fields.layers(),
        position=LearnedPositionSpec(size=rows - offset, offset=offset),
        segment=SegmentSpec(count=fields.count("type_vocab_size", 2)),
        input_norm=norm,
        dropout=rate,
    )
    pooler = PoolerSpec(dropout=labels_rate if flavour.summarises and task == "sequence" else 0.0)
    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size", 30522), padding=special.pad),
        encoder=None if causal else stack,
        decoder=stack if causal else None,
        head=head if language else None,
        pooler=pooler if pooled else None,
        labels=None if task is None else labels(fields, task, labels_rate),
        context=rows - offset,
        special=special,
        initial=fields.initial(truncated=flavour.truncated),
    )


def _kind_of(fields: Fields, flavour: Flavour) -> str:
    """The end of the name of the class that the file names."""
    said = fields.config.get("architectures") or [f"{flavour.name}Model"]
    return str(said[0]).removeprefix(flavour.name)


def _parts(fields: Fields, flavour: Flavour) -> tuple[bool, bool, Task | None]:
    """Whether there is a language head and a pooler, and which labels: as the tensors say, else the architecture."""
    kind = _kind_of(fields, flavour)
    if fields.names is None:
        if kind not in flavour.kinds:
            said, known = fields.config["architectures"], ", ".join(flavour.kinds)
            raise ValueError(f"{fields.where}: architectures is {said}; known here: {flavour.name} with {known}")
        task = "next_sentence" if kind == "ForPreTraining" else TASKS.get(kind)
        language = kind in ("ForMaskedLM", "ForPreTraining", CAUSAL)
        return language, kind == "Model" or task in ("sequence", "next_sentence", "choice"), task
    language = any(name.startswith(flavour.language) for name in fields.names)
    if any(name.startswith(f"{flavour.pair}.") for name in fields.names):
        return language, True, "next_sentence"
    if language:
        return True, False, None
    if f"{flavour.answers}.weight" in fields.names:
        return False, False, "span"
    if "classifier.out_proj.weight" in fields.names:
        return False, True, "sequence"
    if "classifier.weight" in fields.names:
        if TASKS.get(kind) == "choice":
            return False, True, "choice"
        by_token = kind == "ForTokenClassification" or flavour.summarises
        return (False, False, "token") if by_token else (False, True, "sequence")
    return False, f"{flavour.base}{flavour.pooler}.weight" in fields.names, None


def labels(fields: Fields, task: Task, rate: float) -> LabelHeadSpec:
    """As many labels as the configuration names; of the score of a choice one."""
    if task in ("next_sentence", "span"):
        return LabelHeadSpec(labels=2, task=task)
    if task == "choice":
        return LabelHeadSpec(labels=1, task=task, dropout=rate)
    named = fields.config.get("id2label")
    count = fields.count("num_labels", len(named) if isinstance(named, dict) and named else 2)
    return LabelHeadSpec(labels=count, task=task, dropout=rate)


def config(spec: ModelSpec, flavour: Flavour) -> dict[str, Any]:
    """spec -> config.json."""
    causal = flavour.decodes and spec.decoder is not None and spec.decoder.segment is not None
    side = "decoder" if causal else "encoder"
    stack, attention, feedforward = parts(spec, side)
    position = the(LearnedPositionSpec, stack.position, f"{side}.position")
    said = {
        "model_type": flavour.model_type,
        "architectures": [flavour.name + (CAUSAL if causal else _kind(spec))],
        "vocab_size": spec.embedding.vocabulary,
        "hidden_size": spec.width,
        "num_hidden_layers": len(stack.layers),
        "num_attention_heads": attention.heads,
        "intermediate_size": feedforward.hidden,
        "hidden_act": activation_name(feedforward.act),
        "hidden_dropout_prob": stack.dropout,
        "attention_probs_dropout_prob": attention.dropout,
        "max_position_embeddings": position.size + position.offset,
        "type_vocab_size": the(SegmentSpec, stack.segment, f"{side}.segment").count,
        "layer_norm_eps": the(LayerNormSpec, stack.input_norm, f"{side}.input_norm").eps,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **initial_config(spec),
        **special_config(spec.special),
    }
    if causal:
        said["is_decoder"] = True
    if spec.labels is not None and spec.labels.task in ("sequence", "token", "choice"):
        said |= {"num_labels": spec.labels.labels, "classifier_dropout": spec.labels.dropout}
    return said


def _kind(spec: ModelSpec) -> str:
    task = None if spec.labels is None else spec.labels.task
    if spec.head is not None:
        need(task in (None, "next_sentence"), "labels", f"are of a {task} beside a language head")
        return "ForMaskedLM" if task is None else "ForPreTraining"
    return "Model" if task is None else next(name for name, one in TASKS.items() if one == task)


def weights(base: str, *sides: str) -> tuple[Rule, ...]:
    """The names of what is not a head, in the stacks that there may be: the encoder, where no others are named."""
    names = {
        "attention.op.q": "attention.self.query",
        "attention.op.k": "attention.self.key",
        "attention.op.v": "attention.self.value",
        "attention.op.o": "attention.output.dense",
        "attention.after": "attention.output.LayerNorm",
        "feedforward.op.up": "intermediate.dense",
        "feedforward.op.down": "output.dense",
        "feedforward.after": "output.LayerNorm",
    }

    def stack(side: str) -> tuple[Rule, ...]:
        return (
            Rule(f"{side}.position.weight", f"{base}embeddings.position_embeddings.weight"),
            Rule(f"{side}.segment.weight", f"{base}embeddings.token_type_embeddings.weight"),
            *pairs(f"{side}.", f"{base}embeddings.", {"input_norm": "LayerNorm"}),
            *pairs(side + ".layers.{i}.", base + "encoder.layer.{i}.", names),
        )

    table = Rule("embedding.weight", f"{base}embeddings.word_embeddings.weight")
    return (table, *(rule for side in sides or ("encoder",) for rule in stack(side)))


def heads(spec: ModelSpec, flavour: Flavour) -> tuple[Rule, ...]:
    """The names of a pooler, a language head and a label head, which depend on each other."""
    task = None if spec.labels is None else spec.labels.task
    inside = flavour.summarises and task == "sequence"
    labels = {"next_sentence": flavour.pair, "span": flavour.answers}.get(task or "", "classifier")
    dense, norm = flavour.transform
    names = {
        "pooler.dense": "classifier.dense" if inside else f"{flavour.base}{flavour.pooler}",
        "labels.dense": "classifier.out_proj" if inside else labels,
        "head.transform.dense": flavour.language + dense,
        "head.transform.norm": flavour.language + norm,
    }
    # A tied head keeps its bias beside the decoder; an untied one inside it, and the other is not used.
    untied = spec.head is not None and not spec.head.tied
    return (
        *pairs("", "", names),
        Rule("head.weight", f"{flavour.language}decoder.weight"),
        Rule("head.bias", f"{flavour.language}decoder.bias" if untied else f"{flavour.language}bias"),
    )


bert_spec, bert_config = spec, config


def family_of(
    flavour: Flavour,
    weights: tuple[Rule, ...],
    sizes: dict[str, dict[str, Any]],
    *,
    spec: Callable[[Fields], ModelSpec] | None = None,
    config: Callable[[ModelSpec], dict[str, Any]] | None = None,
    zeros: Callable[[ModelSpec], Mapping[str, Shape]] = lambda spec: {},
) -> Family:
    """The family of a flavour; `weights` are the names of what is not a head. `spec` and `config`: where the layers are
    not BERT's."""
    language, base = flavour.language, flavour.base
    return Family(
        model_type=flavour.model_type,
        spec=partial(bert_spec, flavour=flavour) if spec is None else spec,
        config=partial(bert_config, flavour=flavour) if config is None else config,
        weights=weights,
        heads=partial(heads, flavour=flavour),
        base=base,
        aliases={
            f"{language}decoder.weight": f"{base}embeddings.word_embeddings.weight",
            f"{language}decoder.bias": f"{language}bias",
        },
        ignored=(f"{base}embeddings.position_ids", f"{base}{flavour.pooler}.*", f"{language}bias"),
        renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
        sizes=sizes,
        zeros=zeros,
    )


def _size(layers: int, width: int, heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
        **more,
    }


R = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}

BERT = family_of(
    BERT_FLAVOUR,
    weights("bert."),
    {
        "bert/base-uncased": _size(12, 768, 12, 30522),
        "bert/base-cased": _size(12, 768, 12, 28996),
        "bert/large-uncased": _size(24, 1024, 16, 30522),
        "bert/large-cased": _size(24, 1024, 16, 28996),
    },
)
ROBERTA = family_of(
    ROBERTA_FLAVOUR,
    weights("roberta."),
    {
        "roberta/base": _size(12, 768, 12, 50265, **R),
        "roberta/large": _size(24, 1024, 16, 50265, **R),
    },
)
