"""LLaMA and its relatives: pre-RMSNorm decoders with rotary positions and SwiGLU.

LLaMA 1 to 3 (arXiv:2302.13971, 2307.09288, 2407.21783), Mistral (a window; arXiv:2310.06825), Qwen 2 (biases on
q, k, v; arXiv:2407.10671), Qwen 3 (norms on q and k; arXiv:2505.09388), SmolLM 3 (every fourth layer without positions;
huggingface.co/blog/smollm3).
"""

from __future__ import annotations

from collections.abc import Callable
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
    parts,
    special_config,
    the,
)
from lamina.families.rope import rotary, rotary_config
from lamina.layers import (
    AttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerSpec,
    RMSNormSpec,
    RotarySpec,
    StackSpec,
)
from lamina.model import ModelSpec
from lamina.patterns import Both, Causal, Pattern, Window
from lamina.specs import Spec
from lamina.weights.rules import Rule, pairs

Windows = Callable[[Fields, int], list[int | None]]


def spec(
    fields: Fields,
    *,
    windows: Windows = lambda fields, layers: [None] * layers,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    key_heads: int | None = None,
    head_dim: int | None = None,
    context: int = 2048,
    special: tuple[int | None, int | None, int | None] = (1, 2, None),
) -> ModelSpec:
    """config.json -> spec. The keywords are what the relatives change."""
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if "head_dim" in fields or head_dim is not None:
        size = fields.count("head_dim", head_dim)
    else:
        size = fields.head_dim("hidden_size", "num_attention_heads")
    layers = fields.layers()
    norm = RMSNormSpec(eps=fields.number("rms_norm_eps", 1e-6))
    all_bias = fields.flag("attention_bias", False) and not qkv_bias
    attention = AttentionSpec(
        heads=heads,
        key_heads=fields.count("num_key_value_heads", key_heads or heads),
        head_dim=size,
        rotary=rotary(fields, size),
        qk_norm=norm if qk_norm else None,
        bias="qkv" if qkv_bias else "all" if all_bias else "none",
        dropout=fields.number("attention_dropout", 0.0),
    )
    feedforward = FeedForwardSpec(
        hidden=fields.count("intermediate_size"),
        act=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        bias=fields.flag("mlp_bias", False),
    )

    def layer(window: int | None) -> LayerSpec:
        pattern: Pattern = Causal() if window is None else Causal() & Window(back=window)
        return in_turn(attention.replace(pattern=pattern), feedforward, pre=norm)

    return ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=fields.count("vocab_size")),
        decoder=StackSpec(layers=tuple(layer(window) for window in windows(fields, layers)), norm=norm),
        head=None if fields.headless() else LanguageHeadSpec(tied=fields.flag("tie_word_embeddings", False)),
        context=fields.count("max_position_embeddings", context),
        special=fields.special(*special),
        initial=fields.initial(),
    )


def config(spec: ModelSpec, *, model_type: str, name: str) -> dict[str, Any]:
    """spec -> config.json, in the words that all relatives share."""
    stack, attention, feedforward = parts(spec)
    return {
        "model_type": model_type,
        "architectures": [f"{name}Model" if spec.head is None else f"{name}ForCausalLM"],
        "vocab_size": spec.embedding.vocabulary,
        "hidden_size": spec.width,
        "intermediate_size": feedforward.hidden,
        "num_hidden_layers": len(stack.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.key_heads,
        "head_dim": attention.head_dim,
        "hidden_act": activation_name(feedforward.act),
        "max_position_embeddings": spec.context or 2048,
        "rms_norm_eps": the(RMSNormSpec, stack.norm, "decoder.norm").eps,
        "rope_parameters": rotary_config(attention.rotary, attention.head_dim),
        "attention_dropout": attention.dropout,
        "tie_word_embeddings": spec.head is not None and spec.head.tied,
        **initial_config(spec),
        **special_config(spec.special),
    }


def with_attentions(spec: ModelSpec, change: Callable[[Any, int], Spec]) -> ModelSpec:
    """The same decoder with the attention of each layer replaced by `change(attention, depth)`, depth from 0."""
    return _with_ops(spec, 0, change)


def with_feedforwards(spec: ModelSpec, change: Callable[[Any, int], Spec]) -> ModelSpec:
    """The same with what comes after the attention."""
    return _with_ops(spec, -1, change)


def _with_ops(spec: ModelSpec, place: int, change: Callable[[Any, int], Spec]) -> ModelSpec:
    stack, layers = the(StackSpec, spec.decoder, "decoder"), []
    for depth, layer in enumerate(stack.layers):
        steps = list(layer.steps)
        steps[place] = steps[place].replace(op=change(steps[place].op, depth))
        layers.append(layer.replace(steps=tuple(steps)))
    return spec.replace(decoder=stack.replace(layers=tuple(layers)))


def windows_of(spec: ModelSpec) -> list[int | None]:
    """The window of each layer; None where it sees everything before it."""
    assert spec.decoder is not None
    found: list[int | None] = []
    for layer in spec.decoder.layers:
        op = layer.steps[0].op
        pattern = op.pattern if isinstance(op, AttentionSpec) else None
        windowed = isinstance(pattern, Both) and pattern.first == Causal() and isinstance(pattern.second, Window)
        found.append(pattern.second.back if windowed else None)  # pyright: ignore
    return found


def every_layer(fields: Fields, layers: int) -> list[int | None]:
    """Mistral: one window for all layers, or none."""
    return [fields.count("sliding_window") if "sliding_window" in fields else None] * layers


def by_layer_type(fields: Fields, layers: int) -> list[int | None]:
    """Qwen 2 and 3: `layer_types` where present; else `use_sliding_window` from layer `max_window_layers` on."""
    used = fields.flag("use_sliding_window", False)
    window = (
        fields.count("sliding_window", 4096) if used and fields.config.get("sliding_window", 4096) is not None else None
    )
    types = fields.config.get("layer_types")
    if types is None:
        first = fields.count("max_window_layers", 28, least=0)
        return [window if window and i >= first else None for i in range(layers)]
    return layer_windows(fields, types, layers, window)


def layer_windows(fields: Fields, types: Any, layers: int, window: int | None) -> list[int | None]:
    """`layer_types` as windows. Raises ValueError for a wrong count or an unknown type."""
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layers or any(one not in known for one in types):
        raise ValueError(f"{fields.where}: layer_types must list {layers} times {' or '.join(known)}")
    return [window if one == "sliding_attention" else None for one in types]


def type_config(spec: ModelSpec) -> dict[str, Any]:
    """`layer_types` and the window, as Qwen and Gemma write them."""
    windows = windows_of(spec)
    window = next((w for w in windows if w is not None), None)
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    return {"layer_types": types, "sliding_window": window, "use_sliding_window": window is not None}


L, H = "decoder.layers.{i}.", "model.layers.{i}."
WEIGHTS = (
    Rule("embedding.weight", "model.embed_tokens.weight"),
    *pairs(L, H, {f"attention.op.{part}": f"self_attn.{part}_proj" for part in "qkvo"}),
    *pairs(L, H, {f"feedforward.op.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}),
    *pairs(L, H, {"attention.pre": "input_layernorm", "feedforward.pre": "post_attention_layernorm"}),
    Rule("decoder.norm.weight", "model.norm.weight"),
    Rule("head.weight", "lm_head.weight"),
)
QK_NORM = tuple(Rule(f"{L}attention.op.{p}_norm.weight", f"{H}self_attn.{p}_norm.weight") for p in "qk")


def _llama_config(spec: ModelSpec) -> dict[str, Any]:
    return config(spec, model_type="llama", name="Llama") | _biases(spec)


def _biases(spec: ModelSpec) -> dict[str, Any]:
    attention, feedforward = (step.op for step in spec.decoder.layers[0].steps)  # pyright: ignore
    return {"attention_bias": attention.bias == "all", "mlp_bias": feedforward.bias}  # pyright: ignore


def _mistral_config(spec: ModelSpec) -> dict[str, Any]:
    return config(spec, model_type="mistral", name="Mistral") | {"sliding_window": windows_of(spec)[0]}


def _qwen2_config(spec: ModelSpec) -> dict[str, Any]:
    said = config(spec, model_type="qwen2", name="Qwen2") | type_config(spec)
    said.pop("head_dim")  # Qwen 2 has no such field: heads share the width evenly
    return said


def _qwen3_config(spec: ModelSpec) -> dict[str, Any]:
    attention = spec.decoder.layers[0].steps[0].op  # pyright: ignore
    flags = {"attention_bias": attention.bias == "all"}  # pyright: ignore
    return config(spec, model_type="qwen3", name="Qwen3") | type_config(spec) | flags


def _turning(fields: Fields, layers: int) -> list[bool]:
    """SmolLM 3: which layers have rotary positions, listed as 1 and 0; unlisted, every fourth has none."""
    said = fields.config.get("no_rope_layers")
    if said is None:
        interval = fields.count("no_rope_layer_interval", 4)
        return [(depth + 1) % interval != 0 for depth in range(layers)]
    if not isinstance(said, list) or len(said) < layers or any(one not in (0, 1) for one in said):
        raise CheckpointError(f"{fields.where}: no_rope_layers must list 0 or 1 for each of {layers} layers")
    return [bool(one) for one in said[:layers]]


def _without_positions(fields: Fields, layers: int) -> list[int | None]:
    """SmolLM 3: `layer_types` where present; else, if windows are used at all, on the layers without positions."""
    window = fields.count("sliding_window") if "sliding_window" in fields else None
    types = fields.config.get("layer_types")
    if types is not None:
        return layer_windows(fields, types, layers, window)
    window = window if fields.flag("use_sliding_window", False) else None
    return [None if turns else window for turns in _turning(fields, layers)]


def _smollm3(fields: Fields) -> ModelSpec:
    fields = fields.over({"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": 2e6})
    turning = _turning(fields, fields.layers())
    special = (128000, 128001, 128004)
    found = spec(fields, windows=_without_positions, context=32768, special=special)
    return with_attentions(found, lambda one, depth: one if turning[depth] else one.replace(rotary=None))


def _smollm3_config(spec: ModelSpec) -> dict[str, Any]:
    rotaries: list[RotarySpec | None] = []

    def remember(attention: AttentionSpec, depth: int) -> AttentionSpec:
        rotaries.append(attention.rotary)
        return attention

    with_attentions(spec, remember)
    one = next((rotary for rotary in rotaries if rotary is not None), RotarySpec(base=2e6))
    turned = with_attentions(spec, lambda attention, depth: attention.replace(rotary=one))
    said = config(turned, model_type="smollm3", name="SmolLM3") | type_config(spec) | _biases(spec)
    if said["head_dim"] * said["num_attention_heads"] == spec.width:
        said.pop("head_dim")  # as the published files, which have no such field
    return said | {"no_rope_layers": [int(rotary is not None) for rotary in rotaries]}


def size(layers: int, width: int, heads: int, key_heads: int, hidden: int, vocabulary: int, context: int, **more: Any):
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": hidden,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        **more,
    }


LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31["original_max_position_embeddings"] = 8192
V1 = {"rms_norm_eps": 1e-6}
V2 = {"rms_norm_eps": 1e-5}
V3 = {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "bos_token_id": 128000, "eos_token_id": 128001}
V31 = V3 | {"rope_scaling": LLAMA31}
V32 = V3 | {"rope_scaling": LLAMA31 | {"factor": 32.0}, "tie_word_embeddings": True}
SMOL = {"rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}

LLAMA = Family(
    model_type="llama",
    spec=spec,
    config=_llama_config,
    weights=WEIGHTS,
    base="model.",
    aliases={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=("*.rotary_emb.inv_freq",),
    sizes={
        "llama/7b": size(32, 4096, 32, 32, 11008, 32000, 2048, **V1),
        "llama/13b": size(40, 5120, 40, 40, 13824, 32000, 2048, **V1),
        "llama/33b": size(60, 6656, 52, 52, 17920, 32000, 2048, **V1),
        "llama/65b": size(80, 8192, 64, 64, 22016, 32000, 2048, **V1),
        "llama2/7b": size(32, 4096, 32, 32, 11008, 32000, 4096, **V2),
        "llama2/13b": size(40, 5120, 40, 40, 13824, 32000, 4096, **V2),
        "llama2/70b": size(80, 8192, 64, 8, 28672, 32000, 4096, **V2),
        "llama3/8b": size(32, 4096, 32, 8, 14336, 128256, 8192, **V3),
        "llama3/70b": size(80, 8192, 64, 8, 28672, 128256, 8192, **V3),
        "llama3.1/8b": size(32, 4096, 32, 8, 14336, 128256, 131072, **V31),
        "llama3.1/70b": size(80, 8192, 64, 8, 28672, 128256, 131072, **V31),
        "llama3.1/405b": size(126, 16384, 128, 8, 53248, 128256, 131072, **V31),
        "llama3.2/1b": size(16, 2048, 32, 8, 8192, 128256, 131072, head_dim=64, **V32),
        "llama3.2/3b": size(28, 3072, 24, 8, 8192, 128256, 131072, head_dim=128, **V32),
        "smollm2/135m": size(30, 576, 9, 3, 1536, 49152, 8192, **SMOL),
    },
)

MISTRAL = Family(
    model_type="mistral",
    spec=partial(spec, windows=every_layer, key_heads=8, context=131072),
    config=_mistral_config,
    weights=WEIGHTS,
    base="model.",
    aliases=LLAMA.aliases,
    ignored=LLAMA.ignored,
    sizes={
        "mistral/7b": size(32, 4096, 32, 8, 14336, 32000, 32768, sliding_window=4096, rms_norm_eps=1e-5),
        "mistral/7b-v0.3": size(32, 4096, 32, 8, 14336, 32768, 32768, rms_norm_eps=1e-5, rope_theta=1e6),
    },
)

Q25 = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "bos_token_id": 151643, "eos_token_id": 151643}
TIED = Q25 | {"tie_word_embeddings": True}

QWEN2 = Family(
    model_type="qwen2",
    spec=partial(spec, windows=by_layer_type, qkv_bias=True, context=32768, special=(None, None, None)),
    config=_qwen2_config,
    weights=WEIGHTS,
    base="model.",
    aliases=LLAMA.aliases,
    ignored=LLAMA.ignored,
    sizes={
        "qwen2.5/0.5b": size(24, 896, 14, 2, 4864, 151936, 32768, **TIED),
        "qwen2.5/1.5b": size(28, 1536, 12, 2, 8960, 151936, 131072, **TIED),
        "qwen2.5/3b": size(36, 2048, 16, 2, 11008, 151936, 32768, **TIED),
        "qwen2.5/7b": size(28, 3584, 28, 4, 18944, 152064, 131072, **Q25),
        "qwen2.5/14b": size(48, 5120, 40, 8, 13824, 152064, 131072, **Q25),
        "qwen2.5/32b": size(64, 5120, 40, 8, 27648, 152064, 131072, **Q25),
        "qwen2.5/72b": size(80, 8192, 64, 8, 29568, 152064, 131072, **Q25),
    },
)

QWEN3 = Family(
    model_type="qwen3",
    spec=partial(spec, windows=by_layer_type, qk_norm=True, head_dim=128, context=32768, special=(None, None, None)),
    config=_qwen3_config,
    weights=WEIGHTS + QK_NORM,
    base="model.",
    aliases=LLAMA.aliases,
    ignored=LLAMA.ignored,
    sizes={
        "qwen3/0.6b": size(28, 1024, 16, 8, 3072, 151936, 40960, **TIED),
        "qwen3/1.7b": size(28, 2048, 16, 8, 6144, 151936, 40960, **TIED),
        "qwen3/4b": size(36, 2560, 32, 8, 9728, 151936, 40960, **TIED),
        "qwen3/8b": size(36, 4096, 32, 8, 12288, 151936, 40960, **Q25),
        "qwen3/14b": size(40, 5120, 40, 8, 17408, 151936, 40960, **Q25),
        "qwen3/32b": size(64, 5120, 64, 8, 25600, 151936, 40960, **Q25),
    },
)

SMOL3 = {"rms_norm_eps": 1e-6, "rope_theta": 5e6, "tie_word_embeddings": True, "bos_token_id": 128000}

SMOLLM3 = Family(
    model_type="smollm3",
    spec=_smollm3,
    config=_smollm3_config,
    weights=WEIGHTS,
    base="model.",
    aliases=LLAMA.aliases,
    ignored=LLAMA.ignored,
    sizes={"smollm3/3b": size(36, 2048, 16, 4, 11008, 128256, 65536, eos_token_id=128012, **SMOL3)},
)
