"""Specs in words: what a layer is, in the vocabulary of the catalogue, short enough for a table or a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    BatchNormSpec,
    BigBirdSpec,
    BranchSpec,
    BucketBiasSpec,
    CapacitySpec,
    ChunkedCrossAttentionSpec,
    CompressiveSpec,
    ConvolutionStemSpec,
    CrossAttentionSpec,
    DifferentialSpec,
    EmbeddingSpec,
    ExpertChoiceSpec,
    ExpertsSpec,
    FeedForwardSpec,
    InfiniSpec,
    LabelHeadSpec,
    LanguageHeadSpec,
    LatentAttentionSpec,
    LayerNormSpec,
    LayerSpec,
    LearnedPositionSpec,
    LongformerSpec,
    MemorizingSpec,
    MemoryAttentionSpec,
    NeighbourEncoderSpec,
    PoolerSpec,
    ProductKeySpec,
    RecurrenceSpec,
    RecurrentMemorySpec,
    RMSNormSpec,
    RotarySpec,
    RouterLossSpec,
    SegmentSpec,
    ShawSpec,
    SinusoidalPositionSpec,
    StackSpec,
    StepSpec,
    SumSpec,
    TopKSpec,
    TransformerXLSpec,
    TransformSpec,
)
from lamina.model import ModelSpec
from lamina.patterns import (
    Both,
    Causal,
    Either,
    Everything,
    Global,
    Pattern,
    Prefix,
    SegmentWindow,
    Sinks,
    Window,
    Without,
)
from lamina.specs import Spec


def say(spec: Any) -> str:
    """A spec in words: "GQA 9/3 heads of 64, causal, RoPE base 100000". A spec without words is shown as its fields."""
    for kind, words in WORDS.items():
        if type(spec) is kind:
            return words(spec)
    if isinstance(spec, Spec):
        return fields(spec)
    return "none" if spec is None else str(spec)


def fields(spec: Spec) -> str:
    """The class of a spec and every field that is not as its default: "Strided(stride=8)"."""
    said = []
    for field in dataclasses.fields(spec):  # pyright: ignore[reportArgumentType]
        value = getattr(spec, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default  # pyright: ignore
        if value != default:
            said.append(f"{field.name}={say(value) if isinstance(value, Spec) else value}")
    name = type(spec).__name__.removesuffix("Spec")
    return f"{name}({', '.join(said)})" if said else name


def span(indices: Iterable[int]) -> str:
    """Numbers of layers in short: 0, 1, 2 -> "0-2"; 0, 2, 4, 6 -> "0, 2, ..., 6"; 0, 1, 5 -> "0-1, 5"."""
    numbers = list(indices)
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def shape_of(spec: ModelSpec) -> str:
    """The model in one line: "decoder of 30 layers, width 576, vocabulary 49152, context 8192"."""
    stacks = {"encoder": spec.encoder, "decoder": spec.decoder}
    depths = {name: _layers(stack) for name, stack in stacks.items() if stack is not None}
    if len(depths) == 2 and len(set(depths.values())) == 1:
        parts = [f"encoder and decoder of {depths['encoder']}"]
    else:
        parts = [" and ".join(f"{name} of {depth}" for name, depth in depths.items())]
    parts += [f"width {spec.width}", f"vocabulary {spec.embedding.vocabulary}"]
    return ", ".join(parts + ([] if spec.context is None else [f"context {spec.context}"]))


def _layers(stack: StackSpec) -> str:
    count = f"{len(stack.layers)} layer{'s' if len(stack.layers) > 1 or stack.repeat == 1 else ''}"
    return count if stack.repeat == 1 else f"{count} run {stack.repeat} times"


def residual(step: StepSpec) -> str:
    """Where the norms of a residual step stand: "pre-norm", "post-norm", "sandwich", "output-norm", "no norm"."""
    place = {
        (True, False, False): "pre-norm",
        (False, False, True): "post-norm",
        (True, True, False): "sandwich",
        (False, True, False): "output-norm",
        (False, False, False): "no norm",
    }.get((step.pre is not None, step.post is not None, step.after is not None), "norms on several sides")
    more = [f"times {step.residual:g}"] if step.residual != 1.0 else []
    more += [f"dropout {step.dropout:g}"] if step.dropout else []
    more += [f"drops branches {step.drop_branch:g}"] if step.drop_branch else []
    more += ["gated from zero"] if step.gate else []
    return ", ".join([f"residual, {place}", *more])


def _branch(spec: BranchSpec) -> str:
    parts = ["branch", *(["pre-norm"] if spec.pre is not None else [])]
    return ", ".join(parts + ([f"dropout {spec.dropout:g}"] if spec.dropout else []))


BIASES = {"none": [], "qkv": ["biases on q, k, v"], "all": ["biases"], "qvo": ["biases on q, v, o"]}


def _attention(spec: AttentionSpec) -> str:
    kind = "MHA" if spec.key_heads == spec.heads else "MQA" if spec.key_heads == 1 else "GQA"
    heads = f"{spec.heads}" if kind == "MHA" else f"{spec.heads}/{spec.key_heads}"
    parts = [f"{kind} {heads} heads of {spec.head_dim}", say(spec.pattern)]
    parts += [say(part) for part in (spec.rotary, spec.relative) if part is not None]
    parts += [f"QK-{say(spec.qk_norm)}"] if spec.qk_norm is not None else []
    parts += [f"scale {spec.scale:g}"] if spec.scale is not None else []
    parts += [f"soft-cap {spec.softcap:g}"] if spec.softcap is not None else []
    parts += ["learned sink"] if spec.sink else []
    parts += BIASES[spec.bias]
    parts += [f"dropout {spec.dropout:g}"] if spec.dropout else []
    return ", ".join(parts)


def _latent(spec: LatentAttentionSpec) -> str:
    parts = [f"MLA {spec.heads} heads of {spec.nope_dim} + {spec.rope_dim}, values of {spec.value_dim}"]
    parts += [f"keys and values from {spec.key_rank}"]
    parts += [f"queries from {spec.query_rank}"] if spec.query_rank is not None else []
    parts += [say(spec.pattern), "no positions" if spec.rotary is None else say(spec.rotary)]
    parts += [f"scale {spec.scale:g}"] if spec.scale is not None else []
    parts += ["no norms"] if spec.norm is None else []
    parts += ["biases"] if spec.bias else []
    return ", ".join(parts + ([f"dropout {spec.dropout:g}"] if spec.dropout else []))


def _longformer(spec: LongformerSpec) -> str:
    near = f"{spec.window} back" if spec.causal else f"{spec.window} on each side"
    parts = [f"Longformer, {spec.heads} heads of {spec.head_dim}, window of {near} and global tokens"]
    parts += ["biases"] if spec.bias else []
    return ", ".join(parts + ([f"dropout {spec.dropout:g}"] if spec.dropout else []))


def _bigbird(spec: BigBirdSpec) -> str:
    parts = [f"BigBird, {spec.heads} heads of {spec.head_dim}, blocks of {spec.size} and global ends"]
    parts += [f"the first counted {1 + spec.repeats} times"] if spec.repeats else []
    return ", ".join(parts + BIASES[spec.bias] + ([f"dropout {spec.dropout:g}"] if spec.dropout else []))


def _differential(spec: DifferentialSpec) -> str:
    heads = f"{spec.heads}" if spec.key_heads == spec.heads else f"{spec.heads}/{spec.key_heads}"
    parts = [f"differential, {heads} heads of 2 x {spec.head_dim}, lambda from {spec.start:.2f}", say(spec.pattern)]
    parts += [say(spec.rotary)] if spec.rotary is not None else []
    parts += [f"scale {spec.scale:g}"] if spec.scale is not None else []
    return ", ".join(parts + (["biases"] if spec.bias else []))


def _infini(spec: InfiniSpec) -> str:
    return f"Infini memory by segments of {spec.length}, {spec.update}, {_gate(spec.gate)}"


def _memorizing(spec: MemorizingSpec) -> str:
    search = "" if spec.clusters is None else f", searched in {spec.probes} of {spec.clusters} clusters"
    return (
        f"the nearest {spec.count} of {spec.size} stored keys by segments of {spec.length}{search}, {_gate(spec.gate)}"
    )


def _compressive(spec: CompressiveSpec) -> str:
    old = f"{spec.count} compressed {spec.rate} to 1 by {spec.by}"
    return f"segments of {spec.length}, the {spec.size} before them and {old}"


def _gate(kind: str) -> str:
    return "gated from zero" if kind == "zero" else "gated"


def _cross(spec: CrossAttentionSpec) -> str:
    heads = f"{spec.heads}" if spec.key_heads == spec.heads else f"{spec.heads}/{spec.key_heads}"
    parts = [f"cross-attention, {heads} heads of {spec.head_dim}"]
    parts += [f"memory of width {spec.memory_width}"] if spec.memory_width is not None else []
    parts += [say(spec.relative)] if spec.relative is not None else []
    parts += [f"QK-{say(spec.qk_norm)}"] if spec.qk_norm is not None else []
    parts += [f"scale {spec.scale:g}"] if spec.scale is not None else []
    return ", ".join(parts + BIASES[spec.bias] + ([f"dropout {spec.dropout:g}"] if spec.dropout else []))


def _chunked(spec: ChunkedCrossAttentionSpec) -> str:
    parts = [f"neighbours of the chunk of {spec.chunk} tokens before", say(spec.attention)]
    return ", ".join(parts + ([say(spec.encoder)] if spec.encoder is not None else []))


def _encoder(spec: NeighbourEncoderSpec) -> str:
    parts = [f"encoder of {_layers(spec.stack)}, width {spec.width}"]
    return ", ".join(parts + ([f"read at {len(spec.depths) + 1} depths"] if spec.depths else []))


def _pattern(spec: Pattern) -> str:
    if isinstance(spec, Both):
        causal = Causal() in (spec.first, spec.second)
        windows = [part for part in (spec.first, spec.second) if isinstance(part, Window) and part.ahead is None]
        if causal and windows and windows[0].dilation == 1:
            return f"causal window of {windows[0].back}"
        return f"{say(spec.first)} and {say(spec.second)}"
    if isinstance(spec, Either):
        return f"({say(spec.first)}) or ({say(spec.second)})"
    if isinstance(spec, SegmentWindow):
        near = f"{spec.back} positions before segments of {spec.length}"
        return near + (" and the segment" if spec.gap is None else f", but the last {spec.gap}" if spec.gap else "")
    if isinstance(spec, Without):
        return f"({say(spec.first)}) without ({say(spec.second)})"
    if isinstance(spec, Window):
        near = f"window {spec.back - 1} back" + ("" if spec.ahead is None else f", {spec.ahead} ahead")
        return near + (f", {spec.dilation} apart" if spec.dilation > 1 else "")
    if isinstance(spec, Prefix):
        return "marked prefix" if spec.length is None else f"prefix of {spec.length}"
    if isinstance(spec, Global):
        return f"global tokens at {', '.join(map(str, spec.positions))}" if spec.positions else "global tokens"
    return f"{spec.count} sinks" if isinstance(spec, Sinks) else fields(spec)


def _rotary(spec: RotarySpec) -> str:
    parts = [f"RoPE base {spec.base:g}" if spec.base < 1e5 else f"RoPE base {spec.base:.0f}"]
    parts += [f"on {spec.width} features"] if spec.width is not None else []
    parts += ["interleaved"] if spec.interleaved else []
    if spec.scaling is not None:
        name = type(spec.scaling).__name__.removesuffix("Scaling")
        parts.append(f"{name} scaling x {spec.scaling.factor:g}")
    return " ".join(parts)


GATED = {
    "silu": "SwiGLU",
    "gelu": "GEGLU",
    "gelu_tanh": "GEGLU (tanh)",
    "relu": "ReGLU",
    "sigmoid": "GLU",
    "identity": "bilinear GLU",
}
PLAIN = {
    "relu": "ReLU",
    "gelu": "GELU",
    "gelu_tanh": "GELU (tanh)",
    "quick_gelu": "QuickGELU",
    "silu": "SiLU",
    "relu_squared": "squared ReLU",
}


def _feedforward(spec: FeedForwardSpec) -> str:
    name = GATED.get(spec.act, f"gated {spec.act}") if spec.gated else PLAIN.get(spec.act, spec.act)
    parts = [f"{name} {spec.hidden}", *(["biases"] if spec.bias else [])]
    return ", ".join(parts + ([f"dropout {spec.dropout:g}"] if spec.dropout else []))


def _experts(spec: ExpertsSpec) -> str:
    parts = [say(spec.router), f"each {say(spec.expert)}"]
    parts += [f"{'gated ' if spec.shared_gate else ''}shared {say(spec.shared)}"] if spec.shared is not None else []
    parts += [say(part) for part in (spec.capacity, spec.losses) if part is not None]
    parts += [f"results masked {spec.masked:g}"] if spec.masked else []
    return ", ".join(parts)


def _top_k(spec: TopKSpec) -> str:
    parts = [f"{spec.chosen} of {spec.experts} experts", spec.score + (" normalised" if spec.normalise else "")]
    parts += [f"times {spec.scale:g}"] if spec.scale != 1.0 else []
    parts += [f"in {spec.limit.kept} of {spec.limit.groups} groups"] if spec.limit is not None else []
    said = {"corrected choice": spec.correction, "router bias": spec.bias, "noisy": spec.noise}
    said["later choices drawn"] = spec.drawn
    parts += [name for name, there in said.items() if there]
    return ", ".join(parts + ([f"jitter {spec.jitter:g}"] if spec.jitter else []))


def _capacity(spec: CapacitySpec) -> str:
    unit = " places" if spec.places else ""
    later = "dropless" if spec.evaluation is None else f"{spec.evaluation:g}{unit}"
    more = ", the most certain first" if spec.certain_first else ""
    more += ", gates normalised after it" if spec.normalise else ""
    return f"capacity {spec.training:g}{unit} in training, {later} in evaluation{more}"


def _router_losses(spec: RouterLossSpec) -> str:
    kinds = {name: getattr(spec, name) for name in ("balance", "z", "importance", "load")}
    return " and ".join(f"{name} loss {value:g}" for name, value in kinds.items() if value) or "no losses"


def _product_keys(spec: ProductKeySpec) -> str:
    parts = [f"product-key memory, {spec.heads} heads read {spec.chosen} of {spec.keys**2} values each"]
    parts += [f"keys of {spec.key_dim}"]
    parts += [f"query {say(spec.norm)}"] if spec.norm is not None else []
    parts += [f"values are {PLAIN.get(spec.act, spec.act)} networks of one feature"] if spec.act is not None else []
    parts += ["gated by SiLU"] if spec.gated else []
    return ", ".join(parts + ([f"table {spec.table!r}"] if spec.table is not None else []))


def _rms_norm(spec: RMSNormSpec) -> str:
    said = " (1 + weight)" if spec.plus_one else "" if spec.weight else " without weight"
    return f"RMSNorm{said} eps {spec.eps:g}"


def _layer_norm(spec: LayerNormSpec) -> str:
    lacks = "" if spec.bias else " without bias" if spec.weight else " without weight and bias"
    return f"LayerNorm{lacks} eps {spec.eps:g}"


def _embedding(spec: EmbeddingSpec) -> str:
    scale = {"none": "", "root": ", times sqrt(width)", "rounded_root": ", times sqrt(width) rounded"}[spec.scale]
    return f"{spec.vocabulary} tokens{scale}" + ("" if spec.inner is None else f", by {spec.inner} features")


def _stem(spec: ConvolutionStemSpec) -> str:
    strides = ", ".join(map(str, spec.strides))
    act = PLAIN.get(spec.act, spec.act)
    return f"convolutions of {spec.kernel} frames, strides {strides}, {act}: {spec.bins} bins a frame"


def _head(spec: LanguageHeadSpec) -> str:
    parts = ["scores over the vocabulary", "tied to the embedding" if spec.tied else "a table of its own"]
    parts += [_transform(spec.transform)] if spec.transform is not None else []
    parts += ["biases"] if spec.bias else []
    parts += [f"times {spec.scale:g}"] if spec.scale != 1.0 else []
    parts += [f"soft-cap {spec.softcap:g}"] if spec.softcap is not None else []
    return ", ".join(parts)


def _transform(spec: TransformSpec) -> str:
    parts = [say(spec.norm)] if spec.norm is not None else []
    parts += [spec.act] if spec.act != "identity" else []
    parts += [f"{spec.width} features"] if spec.width is not None else []
    return f"after {' and '.join(parts or ['a matrix'])}"


def _labels(spec: LabelHeadSpec) -> str:
    if spec.task == "choice":
        return "a score for each row, which is one of several choices"
    return f"{spec.labels} labels, one result a {'token' if spec.each_token else 'sequence'}"


def _bucket_bias(spec: BucketBiasSpec) -> str:
    return f"T5 position bias, {spec.buckets} buckets to {spec.distance}"


def _sum(spec: SumSpec) -> str:
    norms = ", each with its own norm" if all(branch.pre is not None for branch in spec.branches) else ""
    return "in parallel: " + " + ".join(branch.name for branch in spec.branches) + norms


def _alibi(spec: AlibiSpec) -> str:
    parts = ["ALiBi position bias", *([f"to 2^-{spec.bias_max:g}"] if spec.bias_max != 8 else [])]
    parts += [f"times {spec.scale:.4g}"] if spec.scale != 1.0 else []
    return ", ".join(parts + (["in bfloat16"] if spec.rounded else []))


WORDS: dict[type, Callable[[Any], str]] = {
    AlibiSpec: _alibi,
    AttentionSpec: _attention,
    BatchNormSpec: lambda spec: f"BatchNorm eps {spec.eps:g}",
    BigBirdSpec: _bigbird,
    BranchSpec: _branch,
    Both: _pattern,
    BucketBiasSpec: _bucket_bias,
    CapacitySpec: _capacity,
    ChunkedCrossAttentionSpec: _chunked,
    Causal: lambda spec: "causal",
    CompressiveSpec: _compressive,
    ConvolutionStemSpec: _stem,
    CrossAttentionSpec: _cross,
    DifferentialSpec: _differential,
    Either: _pattern,
    EmbeddingSpec: _embedding,
    Everything: lambda spec: "bidirectional",
    ExpertChoiceSpec: lambda spec: f"{spec.experts} experts that choose, {spec.capacity:g} a token",
    ExpertsSpec: _experts,
    FeedForwardSpec: _feedforward,
    Global: _pattern,
    InfiniSpec: _infini,
    LabelHeadSpec: _labels,
    LanguageHeadSpec: _head,
    LatentAttentionSpec: _latent,
    LayerNormSpec: _layer_norm,
    LayerSpec: lambda spec: " and ".join(step.name for step in spec.steps),
    LongformerSpec: _longformer,
    LearnedPositionSpec: lambda spec: f"learned positions, {spec.size}",
    MemorizingSpec: _memorizing,
    MemoryAttentionSpec: lambda spec: f"{say(spec.attention)}, {say(spec.memory)}",
    NeighbourEncoderSpec: _encoder,
    PoolerSpec: lambda spec: f"{spec.act} of the {spec.token} token",
    Prefix: _pattern,
    RecurrenceSpec: lambda spec: f"segments of {spec.length} and the {spec.size} before them",
    ProductKeySpec: _product_keys,
    RecurrentMemorySpec: lambda spec: f"{spec.tokens} memory vectors between segments of {spec.length}",
    RMSNormSpec: _rms_norm,
    RotarySpec: _rotary,
    RouterLossSpec: _router_losses,
    SegmentSpec: lambda spec: f"{spec.count} segments",
    ShawSpec: lambda spec: f"Shaw positions to {spec.clip}",
    SegmentWindow: _pattern,
    Sinks: _pattern,
    SinusoidalPositionSpec: lambda spec: f"sinusoidal positions ({spec.order})",
    StepSpec: residual,
    SumSpec: _sum,
    TopKSpec: _top_k,
    TransformerXLSpec: lambda spec: "Transformer-XL positions",
    Window: _pattern,
    Without: _pattern,
}
"""The words for each class of spec. A class without a row is shown by `fields`."""
