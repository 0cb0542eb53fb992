"""Normalisation, residual connection, dropout: what holds the other layers together."""

from __future__ import annotations

from collections.abc import Callable

from lamina.catalogue.kind import Correction, Counted, Example, Kind, Question, Source, Variant, has
from lamina.layers import AttentionSpec, LayerNormSpec, RMSNormSpec, StackSpec, StepSpec, SumSpec
from lamina.model import ModelSpec


def _step(test: Callable[[StepSpec], bool]) -> Question:
    return has(StepSpec, test)


def _dropout(spec: ModelSpec) -> bool:
    return any(getattr(part, "dropout", 0) for _, part in spec.walk())


def _norm() -> None:
    import torch

    from lamina.layers import LayerNormSpec, RMSNormSpec

    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for spec in (RMSNormSpec(eps=1e-6), LayerNormSpec(eps=1e-5)):
        y = spec.build(width=4)(x)
        print([round(value, 4) for value in y.tolist()])


NORMALISATION = Kind(
    name="normalisation",
    title="Normalisation",
    what="Brings the features of a token to one scale.",
    why="What dozens of layers add up would grow, and the layers after it would see other scales at every step of"
    " training. A norm fixes the scale of each token by itself, so it does not depend on the batch or the length."
    " Where norms stand decides how gradients flow: see `lamina layers residual`.",
    equation="LayerNorm: w (x - m) / sqrt(v + eps) + b\nRMSNorm: w x / sqrt(mean(x^2) + eps)",
    symbols=(
        ("x", "(..., d); m and v, its mean and its biased variance over d"),
        ("w, b", "(d,), trained: the scale and the shift of each feature"),
        ("eps", "1e-12 to 1e-5, by model"),
    ),
    files=("layers/norm.py",),
    used=has((LayerNormSpec, RMSNormSpec)),
    variants=(
        Variant("LayerNorm", "with mean and bias", has(LayerNormSpec, lambda part: part.bias)),
        Variant("LayerNorm without bias", "b = 0", has(LayerNormSpec, lambda part: not part.bias)),
        Variant("RMSNorm", "without mean and bias", has(RMSNormSpec, lambda part: not part.plus_one)),
        Variant("RMSNorm, 1 + w", "the weight starts at zero", has(RMSNormSpec, lambda part: part.plus_one)),
    ),
    cost="d parameters a norm, 2 d with a bias. No products: its cost is reading x once.",
    counted=(Counted("llama3.1/8b", ("*.pre", "*.post", "*.after", "*.norm"), "all norms"),),
    pitfalls=(
        "The variance is the biased one: divided by d.",
        "LLaMA casts to the model's dtype and then multiplies with w; Gemma multiplies in float32 and then casts.",
        "T5 calls its RMSNorm LayerNorm.",
        "eps differs between models that are alike otherwise: 1e-6 in LLaMA 1, 1e-5 in Llama 2 and 3.",
    ),
    corrections=(
        Correction(
            "LayerNorm(x) = x mu sigma + eps.",
            "y = w (x - mean) / sqrt(variance + eps) + b: the mean is taken away, the deviation divides, and eps"
            " stands in the root.",
            "arXiv:1607.06450, section 3",
        ),
        Correction(
            "GPT-4 is built of LayerNorm, positional encodings, dropout and so on.",
            "Of its architecture only this is public: a Transformer-style model, trained to predict the next token,"
            " which takes text and images. See `lamina show gpt4`.",
            "arXiv:2303.08774, section 2",
        ),
    ),
    sources=(
        Source("Layer Normalization", "arXiv:1607.06450", "section 3"),
        Source("Root Mean Square Layer Normalization", "arXiv:1910.07467", "section 4"),
    ),
    example=Example(
        "RMSNorm of 1, 2, 3, 4: the mean of the squares is 7.5, and 1 / sqrt(7.5) = 0.3651. LayerNorm: the mean is"
        " 2.5, the variance 1.25, and -1.5 / sqrt(1.25) = -1.3416.",
        _norm,
        "[0.3651, 0.7303, 1.0954, 1.4606]\n[-1.3416, -0.4472, 0.4472, 1.3416]\n",
    ),
)


def _residual() -> None:
    import torch

    from lamina.layers import Call, FeedForwardSpec, RMSNormSpec, StepSpec
    from lamina.tokens import plain

    x, norm = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), RMSNormSpec()
    before = StepSpec(name="f", op=FeedForwardSpec(hidden=8), pre=norm)
    after = before.replace(pre=None, after=norm)
    for spec in (before, after):
        layer = spec.build(width=4)
        layer.op.down.weight.data.zero_()  # so that f(x) = 0
        y = layer(x, Call(tokens=plain(1, 1)))
        print([round(value, 4) for value in y.flatten().tolist()])


RESIDUAL = Kind(
    name="residual",
    title="Residual connection",
    what="What a step finds is added to what came in.",
    why="Each step then only has to say what changes, and gradients reach the first layer without passing through"
    " all others. Where the norm stands is part of it: before the step the sum stays untouched (and needs a last"
    " norm at the end), after the sum every layer rescales it.",
    equation="x <- after(r x + post(f(pre(x))))",
    symbols=(
        ("x", "(B, T, d)"),
        ("f", "attention, a feed-forward network, or the sum of several"),
        ("pre, post, after", "norms, or nothing"),
        ("r", "1; above 1 in DeepNorm"),
    ),
    files=("layers/block.py", "layers/stack.py"),
    used=has(StepSpec),
    variants=(
        Variant("pre-norm", "x + f(N(x))", _step(lambda s: s.pre is not None and s.post is None)),
        Variant("post-norm", "N(x + f(x))", _step(lambda s: s.after is not None)),
        Variant("sandwich", "x + N(f(N(x)))", _step(lambda s: s.pre is not None and s.post is not None)),
        Variant("output-norm", "x + N(f(x))", _step(lambda s: s.pre is None and s.post is not None)),
        Variant("DeepNorm", "N(r x + f(x))", _step(lambda s: s.residual != 1.0)),
        Variant("parallel", "x + f(x) + g(x)", has(SumSpec)),
        Variant("gated", "x + tanh(a) f(x), a = 0 at first", _step(lambda s: s.gate)),
        Variant("shared layers", "the same layer several times in a row", has(StackSpec, lambda s: s.repeat > 1)),
    ),
    cost="No parameters but those of its norms; one addition a feature. Memory for x of every step in training.",
    pitfalls=(
        "Pre-norm needs a norm after the last layer; without it logits have no scale.",
        (
            "In a post-norm model the output of a layer is normed, in a pre-norm model it is not: hidden states of the"
            " two cannot be compared as they are."
        ),
        (
            "GPT-2 initialises the last matrix of each step with 0.02 / sqrt(2 L), as its paper says; its released code"
            " does not show it."
        ),
    ),
    corrections=(
        Correction(
            "PaLM has RoPE and dropout, and a residual of Layer(x) + x.",
            "PaLM computes attention and network side by side, y = x + MLP(N(x)) + Attention(N(x)), with one key"
            " head, SwiGLU and no biases. It was pre-trained without dropout.",
            "arXiv:2204.02311, sections 2 and 5",
        ),
        Correction(
            "Each layer has a LayerNorm and a residual connection (and no word of where).",
            "The place is part of the architecture: pre, post, sandwich and parallel train differently, and weights"
            " of one give nonsense in another.",
            "arXiv:2002.04745, section 3",
        ),
    ),
    sources=(
        Source("Deep Residual Learning", "arXiv:1512.03385", "section 3"),
        Source("On Layer Normalization in the Transformer Architecture", "arXiv:2002.04745", "section 3"),
        Source("DeepNet (DeepNorm)", "arXiv:2203.00555"),
        Source("PaLM (parallel)", "arXiv:2204.02311", "section 2"),
        Source("ALBERT (shared layers)", "arXiv:1909.11942", "section 3.1"),
    ),
    example=Example(
        "A step that finds nothing, f(x) = 0: with the norm before it x comes out as it went in, with the norm"
        " after the sum it comes out normed.",
        _residual,
        "[1.0, 2.0, 3.0, 4.0]\n[0.3651, 0.7303, 1.0954, 1.4606]\n",
    ),
)


def _drop() -> None:
    import torch

    from lamina.layers.dropout import dropout

    torch.manual_seed(0)
    x = torch.ones(1_000_000)
    y = dropout(x, 0.25, training=True)
    print([round(value, 4) for value in y.unique().tolist()])
    print(round(y.mean().item(), 2))
    print(torch.equal(dropout(x, 0.25, training=False), x))


DROPOUT = Kind(
    name="dropout",
    title="Dropout",
    what="In training, some activations are zeroed at random.",
    why="A network that cannot count on any single feature does not learn to lean on one, and overfits less where"
    " data are few. Models that see each text once train without it. The others are scaled up, so that the mean"
    " stays and nothing has to change afterwards.",
    equation="y = x b / (1 - p), b ~ Bernoulli(1 - p); y = x in evaluation",
    symbols=(
        ("x, y", "any shape"),
        ("b", "0 or 1 for each number"),
        ("p", "the share that is dropped: 0.1 in BERT and GPT-2, 0 in LLaMA"),
    ),
    files=("layers/dropout.py",),
    used=_dropout,
    variants=(
        Variant("on probabilities", "of attention", has(AttentionSpec, lambda part: part.dropout > 0)),
        Variant("on steps", "before the sum", _step(lambda part: part.dropout > 0)),
        Variant("on the input", "after the embedding", has(StackSpec, lambda part: part.dropout > 0)),
        Variant("stochastic depth", "whole branches", _step(lambda part: part.drop_branch > 0)),
        Variant("LayerDrop", "whole layers", has(StackSpec, lambda part: part.layer_dropout > 0)),
    ),
    cost="No parameters, no products; a random number for each activation in training, nothing in evaluation.",
    pitfalls=(
        "A model must be in evaluation mode to be read from: lamina.load gives one that is.",
        "Probabilities of attention are not renormalised after dropout: rows then sum to 1 in the mean only.",
        "p = 1 gives zeros, not 0 / 0.",
    ),
    corrections=(
        Correction(
            "Dropout sets some of the weights to zero.",
            "It zeroes activations and scales those that stay by 1 / (1 - p). Zeroed weights are DropConnect.",
            "arXiv:1207.0580; JMLR 15 (2014), pages 1929-1958",
        ),
        Correction(
            "BERT has dropout on its attention and feed-forward layers.",
            "It has, with p = 0.1, after the LayerNorm of the embedding, on the probabilities of attention, and on the"
            " output of each step before the sum; not inside the feed-forward network.",
            "google-research/bert, modeling.py",
        ),
    ),
    sources=(
        Source("Improving neural networks by preventing co-adaptation", "arXiv:1207.0580"),
        Source("Attention Is All You Need", "arXiv:1706.03762", "section 5.4"),
        Source("Deep Networks with Stochastic Depth", "arXiv:1603.09382", "section 3"),
        Source("Reducing Transformer Depth on Demand with Structured Dropout", "arXiv:1909.11556", "section 3"),
    ),
    example=Example(
        "A million ones with p = 0.25: each becomes 0 or 1 / 0.75 = 1.3333, the mean stays 1, and evaluation"
        " changes nothing.",
        _drop,
        "[0.0, 1.3333]\n1.0\nTrue\n",
    ),
)
