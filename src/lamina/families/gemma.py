"""Gemma 1 to 3: decoders with (1 + w) RMSNorms, a scaled embedding, tanh GEGLU, and a head tied to the embedding.

Gemma (arXiv:2403.08295); Gemma 2 (sandwich norms, soft-caps, local and global layers in turn; arXiv:2408.00118);
Gemma 3 (norms on q and k, five local layers to a global one, two rotary bases; arXiv:2503.19786).
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

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
from lamina.families.llama import QK_NORM, layer_windows, windows_of
from lamina.families.llama import WEIGHTS as LLAMA
from lamina.families.rope import rotary, rotary_config
from lamina.layers import (
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerSpec,
    RMSNormSpec,
    StackSpec,
)
from lamina.model import ModelSpec
from lamina.patterns import Causal, Pattern, Window
from lamina.weights.rules import Rule

GLOBAL, LOCAL = "full_attention", "sliding_attention"

COMMON = {
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
DEFAULTS1 = COMMON | {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
}
DEFAULTS2 = COMMON | {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
DEFAULTS3 = DEFAULTS2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
"""What the configurations of transformers take for granted; the files of Gemma 3 leave most of it out."""


def spec(fields: Fields, *, defaults: dict[str, Any], generation: int) -> ModelSpec:
    """config.json -> spec, for Gemma `generation` 1, 2 or 3."""
    fields = fields.over(defaults)
    fields.must("use_bidirectional_attention", False)
    if generation == 3:
        fields.must("attn_logit_softcapping", None)
    heads, size = fields.count("num_attention_heads"), fields.count("head_dim")
    norm = RMSNormSpec(eps=fields.number("rms_norm_eps"), plus_one=True, wide_product=True)
    scalar = size if generation == 1 else fields.number("query_pre_attn_scalar")
    if scalar <= 0:
        raise ValueError(f"{fields.where}: query_pre_attn_scalar is {scalar}; it must be more than 0")
    attention = AttentionSpec(
        heads=heads,
        key_heads=fields.count("num_key_value_heads"),
        head_dim=size,
        scale=None if scalar == size else scalar**-0.5,
        softcap=_softcap(fields, "attn_logit_softcapping"),
        qk_norm=norm if generation == 3 else None,
        bias="all" if fields.flag("attention_bias", False) else "none",
        dropout=fields.number("attention_dropout"),
    )
    feedforward = FeedForwardSpec(hidden=fields.count("intermediate_size"), act=_activation(fields, generation))
    post = norm if generation > 1 else None

    def layer(window: int | None) -> LayerSpec:
        pattern: Pattern = Causal() if window is None else Causal() & Window(back=window)
        if generation == 3:
            group, base = (GLOBAL, 1e6) if window is None else (LOCAL, 1e4)
            turned = rotary(fields, size, group=group, base=base)
        else:
            turned = rotary(fields, size)
        op = attention.replace(pattern=pattern, rotary=turned)
        return in_turn(op, feedforward, pre=norm, post=post)

    return ModelSpec(
        width=fields.count("hidden_size"),
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size"), scale="rounded_root"),
        decoder=StackSpec(layers=tuple(layer(window) for window in _windows(fields, generation)), norm=norm),
        head=None
        if fields.headless()
        else LanguageHeadSpec(
            tied=fields.flag("tie_word_embeddings", True), softcap=_softcap(fields, "final_logit_softcapping")
        ),
        context=fields.count("max_position_embeddings"),
        special=fields.special(),
        initial=fields.initial(),
    )


def _windows(fields: Fields, generation: int) -> list[int | None]:
    layers = fields.layers()
    if generation == 1:
        return [None] * layers
    types = fields.config.get("layer_types")
    if types is None:  # every n-th layer is global: 2 in Gemma 2, 6 in Gemma 3
        every = fields.count("sliding_window_pattern")
        types = [LOCAL if (i + 1) % every else GLOBAL for i in range(layers)]
    window = fields.count("sliding_window") if LOCAL in types else None
    return layer_windows(fields, types, layers, window)


def _activation(fields: Fields, generation: int) -> Any:
    if generation > 1:
        return fields.choice("hidden_activation", ACTIVATIONS)
    # The first files said "gelu" and meant its tanh form.
    return fields.choice("hidden_act", ACTIVATIONS | {"gelu": "gelu_tanh"})


def _softcap(fields: Fields, name: str) -> float | None:
    return fields.number(name) if name in fields else None


def config(spec: ModelSpec, *, generation: int) -> dict[str, Any]:
    """spec -> config.json."""
    stack, attention, feedforward = parts(spec)
    act, model_type, name = "hidden_activation", "gemma3_text", "Gemma3"
    if generation < 3:
        model_type, name = ("gemma2", "Gemma2") if generation == 2 else ("gemma", "Gemma")
    said = {
        "model_type": model_type,
        "architectures": [f"{name}ForCausalLM"],
        "vocab_size": spec.embedding.vocabulary,
        "hidden_size": spec.width,
        "intermediate_size": feedforward.hidden,
        "num_hidden_layers": len(stack.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.key_heads,
        "head_dim": attention.head_dim,
        "hidden_act" if generation == 1 else act: activation_name(feedforward.act),
        "max_position_embeddings": spec.context or 8192,
        "rms_norm_eps": the(RMSNormSpec, stack.norm, "decoder.norm").eps,
        "rope_parameters": rotary_config(attention.rotary, attention.head_dim),
        "attention_bias": attention.bias == "all",
        "attention_dropout": attention.dropout,
        "tie_word_embeddings": spec.head is None or spec.head.tied,
        **initial_config(spec),
        **special_config(spec.special),
    }
    if spec.head is None:
        said["architectures"] = ["Gemma3TextModel" if generation == 3 else f"{name}Model"]
    if generation == 1:
        return said
    windows = windows_of(spec)
    said |= {
        "query_pre_attn_scalar": attention.head_dim if attention.scale is None else round(attention.scale**-2),
        "layer_types": [GLOBAL if window is None else LOCAL for window in windows],
        "sliding_window": next((window for window in windows if window is not None), 4096),
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": None if spec.head is None else spec.head.softcap,
    }
    if generation == 3:
        said["rope_parameters"] = {}
        for layer, window in zip(stack.layers, windows, strict=True):
            turned = getattr(layer.steps[0].op, "rotary", None) or attention.rotary
            said["rope_parameters"][GLOBAL if window is None else LOCAL] = rotary_config(turned, attention.head_dim)
    return said


def multimodal_spec(fields: Fields) -> ModelSpec:
    """config.json of Gemma 3 with a vision tower -> the spec of its text part."""
    text = fields.config.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{fields.where}: text_config is missing; it describes the text part of Gemma 3")
    above = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    said = {**text, **{name: fields.config[name] for name in above if fields.config.get(name) is not None}}
    if fields.names is not None and any("vision_tower." in name for name in fields.names):
        warnings.warn(
            f"{fields.where}: only the text part of Gemma 3 is read; its vision tower is kept for saving, not used",
            stacklevel=2,
        )
    where = f"{fields.where}: text_config"
    return spec(Fields(said, fields.names, where), defaults=DEFAULTS3, generation=3)


def multimodal_config(spec: ModelSpec) -> dict[str, Any]:
    """spec -> config.json with the text part where Gemma 3 with a vision tower has it."""
    need(spec.head is not None, "head", "is None")
    text = config(spec, generation=3)
    above = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")}
    architectures = ["Gemma3ForConditionalGeneration"]
    return {"model_type": "gemma3", "architectures": architectures, "text_config": text, **above}


L, H = "decoder.layers.{i}.", "model.layers.{i}."
SANDWICH = tuple(
    Rule(f"{L}{place}.weight", f"{H}{name}.weight")
    for place, name in (
        ("attention.pre", "input_layernorm"),
        ("attention.post", "post_attention_layernorm"),
        ("feedforward.pre", "pre_feedforward_layernorm"),
        ("feedforward.post", "post_feedforward_layernorm"),
    )
)
WEIGHTS2 = SANDWICH + tuple(rule for rule in LLAMA if ".pre." not in str(rule.ours))
WEIGHTS3 = WEIGHTS2 + QK_NORM


def _inside(rule: Rule) -> Rule:
    """The rule of the text part as the multimodal files name it: model.layers -> model.language_model.layers."""
    assert isinstance(rule.theirs, str)
    return Rule(rule.ours, rule.theirs.replace("model.", "model.language_model.", 1), rule.op)


ALIASES = {"lm_head.weight": "model.embed_tokens.weight"}
BUFFERS = ("*.rotary_emb.inv_freq",)


def _size(layers: int, width: int, hidden: int, heads: int, key_heads: int, head_dim: int, **more: Any):
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        **more,
    }


GEMMA = Family(
    model_type="gemma",
    spec=partial(spec, defaults=DEFAULTS1, generation=1),
    config=partial(config, generation=1),
    weights=LLAMA,
    base="model.",
    aliases=ALIASES,
    ignored=BUFFERS,
    sizes={
        "gemma/2b": _size(18, 2048, 16384, 8, 1, 256),
        "gemma/7b": _size(28, 3072, 24576, 16, 16, 256),
    },
)

GEMMA2 = Family(
    model_type="gemma2",
    spec=partial(spec, defaults=DEFAULTS2, generation=2),
    config=partial(config, generation=2),
    weights=WEIGHTS2,
    base="model.",
    aliases=ALIASES,
    ignored=BUFFERS,
    sizes={
        "gemma2/2b": _size(26, 2304, 9216, 8, 4, 256),
        "gemma2/9b": _size(42, 3584, 14336, 16, 8, 256),
        "gemma2/27b": _size(46, 4608, 36864, 32, 16, 128, query_pre_attn_scalar=144),
    },
)

SMALL = {"vocab_size": 262144, "sliding_window": 512, "max_position_embeddings": 32768}
LARGE = {"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}

GEMMA3 = Family(
    model_type="gemma3_text",
    spec=partial(spec, defaults=DEFAULTS3, generation=3),
    config=partial(config, generation=3),
    weights=WEIGHTS3,
    base="model.",
    aliases=ALIASES,
    ignored=BUFFERS,
    sizes={
        "gemma3/270m": _size(18, 640, 2048, 4, 1, 256, **SMALL),
        "gemma3/1b": _size(26, 1152, 6912, 4, 1, 256, **SMALL),
        "gemma3/4b": _size(34, 2560, 10240, 8, 4, 256, **LARGE),
        "gemma3/12b": _size(48, 3840, 15360, 16, 8, 256, **LARGE),
        "gemma3/27b": _size(62, 5376, 21504, 32, 16, 128, query_pre_attn_scalar=168, **LARGE),
    },
)

GEMMA3_MULTIMODAL = Family(
    model_type="gemma3",
    spec=multimodal_spec,
    config=multimodal_config,
    weights=tuple(_inside(rule) for rule in WEIGHTS3),
    base="model.language_model.",
    aliases={"lm_head.weight": "model.language_model.embed_tokens.weight"},
    ignored=(*BUFFERS, "*vision_tower.*", "*multi_modal_projector.*"),
    renamed=((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head\.", "lm_head.")),
)
