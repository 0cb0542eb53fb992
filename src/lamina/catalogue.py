"""The sixteen kinds of layer: what each is, its equation, its variants, where it is built, and which families use it.

Who uses a variant is not written here but found in the specs of the published sizes: a variant is a question to a spec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lamina.layers as layers
import lamina.patterns as patterns
from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    BucketBiasSpec,
    FeedForwardSpec,
    LayerNormSpec,
    LearnedPositionSpec,
    RMSNormSpec,
    RotarySpec,
    SegmentSpec,
    ShawSpec,
    SinusoidalPositionSpec,
    StepSpec,
    SumSpec,
    TransformerXLSpec,
)
from lamina.model import ModelSpec
from lamina.patterns import Causal, Everything, Prefix, Sinks, Window
from lamina.source import spec as spec_of
from lamina.specs import unknown

Question = Callable[[ModelSpec], bool]


def has(kind: type | tuple[type, ...], test: Callable[[Any], bool] = lambda part: True) -> Question:
    """Whether a spec has, anywhere, a part of this kind for which the test holds."""
    return lambda spec: any(isinstance(part, kind) and test(part) for _, part in spec.walk())


def named(*names: str) -> Question:
    """Whether a spec has a part of a class with one of these names: for layers that may not be built yet."""
    return lambda spec: any(type(part).__name__ in names for _, part in spec.walk())


@dataclass(frozen=True)
class Variant:
    """One form of a layer, and the question whether a spec has it; None where specs cannot tell."""

    name: str
    rule: str
    used: Question | None = None
    classes: tuple[str, ...] = ()  # of specs, one of which says it, where those may not be built yet

    @property
    def built(self) -> bool:
        """Whether lamina has it."""
        return not self.classes or any(hasattr(layers, name) or hasattr(patterns, name) for name in self.classes)


@dataclass(frozen=True)
class Kind:
    """One kind of layer."""

    name: str  # as `lamina layers NAME` takes it
    title: str
    what: str
    equation: str
    files: tuple[str, ...]  # below lamina/
    used: Question
    variants: tuple[Variant, ...] = ()

    @property
    def built(self) -> bool:
        """Whether lamina has it: whether its files exist."""
        return all((Path(__file__).parent / file).exists() for file in self.files)


def _by_class(name: str, rule: str, *classes: str) -> Variant:
    return Variant(name, rule, named(*classes), classes)


def _heads(test: Callable[[AttentionSpec], bool]) -> Question:
    return has(AttentionSpec, test)


def _step(test: Callable[[StepSpec], bool]) -> Question:
    return has(StepSpec, test)


def _gated(*acts: str) -> Question:
    return has(FeedForwardSpec, lambda part: part.gated and part.act in acts)


def _plain(*acts: str) -> Question:
    return has(FeedForwardSpec, lambda part: not part.gated and part.act in acts)


def _dropout(spec: ModelSpec) -> bool:
    return any(getattr(part, "dropout", 0) for _, part in spec.walk())


def _cross(spec: ModelSpec) -> bool:
    return spec.encoder is not None and spec.decoder is not None


CATALOGUE = (
    Kind(
        "embedding",
        "Embedding",
        "A row of a table for each token; the head that scores the next token often shares the table.",
        "X = E[ids];  logits = H E^T where tied, H U^T where not",
        ("layers/embedding.py", "layers/head.py"),
        lambda spec: True,
        (
            Variant("tied", "one table for input and output", lambda spec: spec.head is not None and spec.head.tied),
            Variant("untied", "two tables", lambda spec: spec.head is not None and not spec.head.tied),
            Variant("scaled", "times sqrt(width) at the input", lambda spec: spec.embedding.scale != "none"),
            Variant("segments", "plus a vector for the segment", has(SegmentSpec)),
        ),
    ),
    Kind(
        "self-attention",
        "Self-attention",
        "Each token takes a weighted mean of the values of the tokens that it may see.",
        "A = softmax(s Q K^T + bias, where the pattern allows);  O = A V W_O",
        ("layers/attention.py", "attend/dense.py", "patterns.py"),
        has(AttentionSpec),
        (
            Variant("causal", "key <= query", has(Causal)),
            Variant("bidirectional", "every token of the document", has(Everything)),
            Variant("prefix", "a prefix is seen by all", has(Prefix)),
            Variant("unscaled", "s = 1", _heads(lambda part: part.scale == 1.0)),
            Variant("soft-cap", "z <- c tanh(z / c) before the mask", _heads(lambda part: part.softcap is not None)),
            Variant("QK-norm", "norms on the heads of q and k", _heads(lambda part: part.qk_norm is not None)),
            Variant("sink", "a learned logit that takes probability", _heads(lambda part: part.sink)),
        ),
    ),
    Kind(
        "multi-head",
        "Multi-head attention",
        "Attention in several heads of fewer features; heads of keys and values may be shared by heads of queries.",
        "head i: softmax(s q_i k_g^T) v_g, g = floor(i / (heads / key_heads))",
        ("layers/attention.py",),
        _heads(lambda part: part.heads > 1),
        (
            Variant("MHA", "key_heads = heads", _heads(lambda part: part.key_heads == part.heads)),
            Variant("GQA", "1 < key_heads < heads", _heads(lambda part: 1 < part.key_heads < part.heads)),
            Variant("MQA", "key_heads = 1", _heads(lambda part: part.key_heads == 1 < part.heads)),
            _by_class("MLA", "keys and values from one latent vector", "LatentAttentionSpec", "LatentSpec"),
        ),
    ),
    Kind(
        "feed-forward",
        "Feed-forward network",
        "Two matrices with a non-linearity between, on each token by itself.",
        "y = W_2 f(W_1 x + b_1) + b_2",
        ("layers/feedforward.py",),
        has(FeedForwardSpec, lambda part: not part.gated),
        (
            Variant("ReLU", "f = max(x, 0)", _plain("relu")),
            Variant("GELU", "f = x Phi(x), exact", _plain("gelu")),
            Variant("GELU (tanh)", "f = its tanh approximation", _plain("gelu_tanh")),
            Variant("squared ReLU", "f = max(x, 0)^2", _plain("relu_squared")),
        ),
    ),
    Kind(
        "normalisation",
        "Normalisation",
        "Brings the features of a token to one scale; where it stands decides how gradients flow.",
        "LayerNorm: w (x - mean) / sqrt(var + eps) + b;  RMSNorm: w x / sqrt(mean(x^2) + eps)",
        ("layers/norm.py",),
        has((LayerNormSpec, RMSNormSpec)),
        (
            Variant("LayerNorm", "with mean and bias", has(LayerNormSpec)),
            Variant("RMSNorm", "without", has(RMSNormSpec)),
            Variant("RMSNorm, 1 + w", "the weight starts at zero", has(RMSNormSpec, lambda part: part.plus_one)),
        ),
    ),
    Kind(
        "residual",
        "Residual connection",
        "What a step finds is added to what came in; norms stand before, after, or around.",
        "x <- after(r x + post(f(pre(x))))",
        ("layers/block.py",),
        has(StepSpec),
        (
            Variant("pre-norm", "x + f(N(x))", _step(lambda s: s.pre is not None and s.post is None)),
            Variant("post-norm", "N(x + f(x))", _step(lambda s: s.after is not None)),
            Variant("sandwich", "x + N(f(N(x)))", _step(lambda s: s.pre is not None and s.post is not None)),
            Variant("output-norm", "x + N(f(x))", _step(lambda s: s.pre is None and s.post is not None)),
            Variant("DeepNorm", "N(r x + f(x))", _step(lambda s: s.residual != 1.0)),
            Variant("parallel", "x + f(x) + g(x)", has(SumSpec)),
        ),
    ),
    Kind(
        "position",
        "Positional encoding",
        "What tells the order of the tokens: added to the input, or to the scores.",
        "X + P[position], or z_ij + b(j - i)",
        ("layers/positions.py", "layers/bias.py", "layers/relative.py"),
        has((LearnedPositionSpec, SinusoidalPositionSpec, BucketBiasSpec, AlibiSpec, ShawSpec, TransformerXLSpec)),
        (
            Variant("learned", "a trained vector a position", has(LearnedPositionSpec)),
            Variant("sinusoidal", "sines and cosines of the position", has(SinusoidalPositionSpec)),
            Variant("T5 bias", "a scalar a head and bucket of distances", has(BucketBiasSpec)),
            Variant("ALiBi", "minus a slope times the distance", has(AlibiSpec)),
            Variant("Shaw", "vectors for clipped distances", has(ShawSpec)),
            Variant("Transformer-XL", "a term of its own for distances", has(TransformerXLSpec)),
        ),
    ),
    Kind(
        "dropout",
        "Dropout",
        "In training, activations are zeroed at random and the others scaled up; nothing happens afterwards.",
        "y = x b / (1 - p), b ~ Bernoulli(1 - p)",
        ("layers/dropout.py",),
        _dropout,
        (
            Variant("on probabilities", "of attention", _heads(lambda part: part.dropout > 0)),
            Variant("on steps", "before the sum", _step(lambda part: part.dropout > 0)),
            Variant("stochastic depth", "whole branches", _step(lambda part: part.drop_branch > 0)),
        ),
    ),
    Kind(
        "cross-attention",
        "Cross-attention",
        "The queries of a decoder read the output of an encoder.",
        "Q from the decoder, K and V from the encoder; only padding is hidden",
        ("layers/cross.py",),
        _cross,
    ),
    Kind(
        "sparse",
        "Sparse attention",
        "Attention under a pattern that leaves most pairs out, so that cost grows with the length and not its square.",
        "allowed(i, j): |i - j| <= w, i - W < j <= i, j in G, ... composed with & and |",
        ("patterns.py",),
        has((Window, Sinks)),
        (
            Variant("window", "the last W keys", has(Window, lambda part: part.ahead is None)),
            Variant("local", "w keys on both sides", has(Window, lambda part: part.ahead is not None)),
            Variant("sinks", "the first keys are always seen", has(Sinks)),
            _by_class("global", "marked tokens see and are seen by all", "Marked", "LongformerSpec"),
            _by_class("strided", "every l-th key", "Strided"),
            _by_class("blocks", "whole blocks", "Blocks"),
        ),
    ),
    Kind(
        "memory",
        "Memory layers",
        "A large table of trained keys and values, of which a token reads a few; or states carried between segments.",
        "y = sum_k w_k V[i_k], the k best of n^2 product keys",
        ("layers/memory.py",),
        named("MemorySpec", "ProductKeySpec", "ProductKeysSpec"),
    ),
    Kind(
        "experts",
        "Mixture of experts",
        "A router sends each token to a few of many feed-forward networks.",
        "y = sum_{e in top-k} g_e(x) F_e(x), g = softmax(W_r x)",
        ("layers/experts.py",),
        named("ExpertsSpec"),
    ),
    Kind(
        "gated",
        "Gated linear units",
        "A feed-forward network in which one branch opens and closes the other.",
        "y = W_2 (f(W x) * V x)",
        ("layers/feedforward.py",),
        has(FeedForwardSpec, lambda part: part.gated),
        (
            Variant("GLU", "f = sigmoid", _gated("sigmoid")),
            Variant("bilinear", "f = x", _gated("identity")),
            Variant("ReGLU", "f = ReLU", _gated("relu")),
            Variant("GEGLU", "f = GELU", _gated("gelu", "gelu_tanh")),
            Variant("SwiGLU", "f = SiLU", _gated("silu")),
        ),
    ),
    Kind(
        "rotary",
        "Rotary positional embedding",
        "Pairs of features of q and k are turned by an angle in proportion to the position, so scores see distances.",
        "(a, b) -> (a cos pt - b sin pt, a sin pt + b cos pt), t_i = base^(-2i / r)",
        ("layers/rotary.py",),
        _heads(lambda part: part.rotary is not None),
        (
            Variant("partial", "only the first features turn", has(RotarySpec, lambda part: part.width is not None)),
            Variant("interleaved", "pairs (2i, 2i + 1)", has(RotarySpec, lambda part: part.interleaved)),
            *(
                _by_class(title, rule, name)
                for title, rule, name in (
                    ("linear", "t / s", "LinearScaling"),
                    ("NTK", "a larger base", "NTKScaling"),
                    ("dynamic NTK", "a base that grows with the length", "DynamicNTKScaling"),
                    ("YaRN", "slow pairs interpolated, fast ones kept", "YarnScaling"),
                    ("LongRoPE", "a searched divisor for each pair", "LongRopeScaling"),
                    ("Llama 3", "long wavelengths divided, short ones kept", "Llama3Scaling"),
                )
            ),
        ),
    ),
    Kind(
        "retrieval",
        "Attention over retrieved text",
        "Chunks of the text attend to the neighbours that a database found for the chunk before.",
        "CCA: token t reads the neighbours of chunk floor((t + 1) / m) - 1",
        ("layers/retrieval.py",),
        named("RetrievalSpec", "ChunkedAttentionSpec", "NeighbourSpec"),
    ),
    Kind(
        "cache",
        "Key-value cache",
        "Decoding keeps the keys and values of the tokens before, so that a step reads one token.",
        "bytes = 2 layers key_heads head_dim min(length, window) batch bytes_of_dtype",
        ("cache/cache.py",),
        lambda spec: spec.decoder is not None,
        (
            Variant("growing", "every key"),
            Variant("ring", "as many as the window", has(Window)),
            Variant("fixed", "preallocated, for compiled steps"),
            Variant("sinks", "the first and the last keys, renumbered"),
        ),
    ),
)
"""In the order of the usual article on the layers of language models."""


def kind(name: str) -> Kind:
    """The kind of layer called `name`. Raises LaminaError naming the nearest."""
    from lamina.errors import LaminaError

    found = {one.name: one for one in CATALOGUE}
    if name not in found:
        raise LaminaError(unknown("kind of layer", name, found))
    return found[name]


@cache
def published() -> dict[str, ModelSpec]:
    """The spec of every published size."""
    from lamina.families import sizes

    return {name: spec_of(name) for name in sizes()}


def users(used: Question | None) -> list[str]:
    """The published families in whose specs the question is answered with yes: ["gpt2", "llama", ...]."""
    if used is None:
        return []
    return list(dict.fromkeys(name.partition("/")[0] for name, spec in published().items() if used(spec)))
