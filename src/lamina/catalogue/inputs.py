"""Embedding, positional encoding, rotary positional embedding: how tokens and their order come in."""

from __future__ import annotations

from lamina.catalogue.kind import ATTENTIONS, Correction, Counted, Example, Kind, Source, Variant, by_class, has
from lamina.layers import (
    AlibiSpec,
    BucketBiasSpec,
    LearnedPositionSpec,
    RotarySpec,
    SegmentSpec,
    ShawSpec,
    SinusoidalPositionSpec,
    StackSpec,
    TransformerXLSpec,
)
from lamina.model import ModelSpec


def _embedding() -> None:
    import torch

    from lamina.layers import EmbeddingSpec, LanguageHeadSpec

    table = EmbeddingSpec(vocabulary=3).build(width=2)
    table.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    x = table(torch.tensor([2, 0]))
    print(x.tolist())  # rows 2 and 0
    head = LanguageHeadSpec(tied=True).build(2, 3)
    print(head(x, table.weight).tolist())  # each of them times every row


EMBEDDING = Kind(
    name="embedding",
    title="Embedding",
    what="A row of a table for each token; a head scores the next one.",
    why="A network computes with vectors, and a token is only a number: each gets a trained vector, so that tokens"
    " used alike can lie near each other. At the other end a hidden state is compared with a vector of every token,"
    " often from the same table, which saves it a second time and trains it from both ends.",
    equation="X = E[ids];  logits = H E^T (tied) or H U^T (untied)",
    symbols=(
        ("ids", "(B, T), whole numbers below V"),
        ("E, U", "(V, d), one row a token"),
        ("X, H", "(B, T, d), what goes into the first layer, what comes out of the last"),
        ("logits", "(B, T, V)"),
    ),
    files=("layers/embedding.py", "layers/head.py", "layers/convolution.py"),
    used=lambda spec: True,
    variants=(
        Variant("tied", "one table for input and output", lambda spec: spec.head is not None and spec.head.tied),
        Variant("untied", "two tables", lambda spec: spec.head is not None and not spec.head.tied),
        Variant("scaled", "times sqrt(d) at the input", lambda spec: spec.embedding.scale != "none"),
        Variant("scaled logits", "times a constant at the output", lambda s: s.head is not None and s.head.scale != 1),
        Variant("segments", "plus a vector for the segment", has(SegmentSpec)),
        Variant("convolution stem", "frames of a spectrogram in place of ids", lambda spec: not spec.reads_ids),
        Variant(
            "factorised",
            "a narrow table, and a matrix that takes its rows to d",
            lambda spec: (
                spec.embedding.inner is not None
                or any(s is not None and s.input_width is not None for s in (spec.encoder, spec.decoder))
            ),
        ),
    ),
    cost="V d parameters, twice that where untied. Reading rows is free of products; the logits take 2 V d FLOP a"
    " token.",
    counted=(
        Counted("gpt2/small", ("embedding",), "the table, tied"),
        Counted("llama3.1/8b", ("embedding", "head"), "both tables, untied"),
        Counted("whisper/tiny.en", ("stem",), "two convolutions of 3 frames, 80 bins"),
    ),
    pitfalls=(
        "A tied table gets the sum of two gradients; a copy of it in the head trains to something else.",
        "Gemma rounds sqrt(d) to the dtype of the activations before it multiplies: 55.5 and not 55.43 at d = 3072.",
        "PaLM and T5 v1.0 scale the logits by d^-0.5, not the input.",
        (
            "Tables are often padded to a round number of rows (32,100 tokens, 32,128 rows in T5): the tokenizer's size"
            " is not V."
        ),
    ),
    corrections=(
        Correction(
            "BERT turns each token into a vector of size 768.",
            "That is BERT-base; BERT-large has 1024. And what goes in is the sum of a token, a segment and a"
            " position vector, followed by a LayerNorm.",
            "arXiv:1810.04805, section 3; Google's BERT code",
        ),
    ),
    sources=(
        Source("Attention Is All You Need", "arXiv:1706.03762", "section 3.4"),
        Source("Using the Output Embedding to Improve Language Models", "arXiv:1608.05859"),
        Source("ALBERT (factorised)", "arXiv:1909.11942", "section 3.1"),
        Source("Whisper (a stem of convolutions)", "arXiv:2212.04356", "section 2.2"),
    ),
    example=Example(
        "Two tokens become rows of the table; the tied head multiplies each with every row: 3 x 0 + 3 x 2 = 6.",
        _embedding,
        "[[3.0, 3.0], [1.0, 0.0]]\n[[3.0, 6.0, 18.0], [1.0, 0.0, 3.0]]\n",
    ),
)


def _nope(spec: ModelSpec) -> bool:
    """Whether some layer of a stack gets no position at all: neither at the input nor in its scores."""
    stacks = [part for _, part in spec.walk() if isinstance(part, StackSpec)]
    return any(
        type(part).__name__ in ATTENTIONS and not getattr(part, "rotary", None) and not getattr(part, "relative", None)
        for stack in stacks
        if stack.position is None and stack.score_bias is None
        for _, part in stack.walk()
    )


def _position() -> None:
    import torch

    from lamina.layers.bias import bucket, slopes

    print(slopes(8)[:4])  # ALiBi with 8 heads
    behind = torch.tensor([0, 1, 15, 16, 32, 64, 127, 500])  # tokens
    print(bucket(-behind, 32, 128, bidirectional=False).tolist())  # T5


POSITION = Kind(
    name="position",
    title="Positional encoding",
    what="What tells the order: added to the input, or to the scores.",
    why="Attention without a mask gives the same outputs, in another order, when its tokens are put in another"
    " order; so something must say where a token stands. A vector for each place is the simplest; a bias by"
    " distance lets what was learned at one place hold at every other.",
    equation="X + P[position], or z_ij + b(j - i)\n"
    "sinusoidal: P[p, 2i] = sin(p w_i), P[p, 2i + 1] = cos(p w_i)\n"
    "T5: b = a trained scalar for the head and the bucket of j - i\n"
    "ALiBi: b = -m_h (i - j), m_h = 2^(-8h / n), h = 1 .. n",
    symbols=(
        ("P", "(positions, d), trained or computed"),
        ("z_ij", "the score of query i and key j, before the softmax"),
        ("b", "(H, T, S), shared by the layers of a stack"),
        ("w_i", "10000^(-2i / d)"),
        ("n", "the heads, where they are a power of two; else slopes of the powers below and above"),
    ),
    files=("layers/positions.py", "layers/bias.py", "layers/relative.py"),
    used=has((LearnedPositionSpec, SinusoidalPositionSpec, BucketBiasSpec, AlibiSpec, ShawSpec, TransformerXLSpec)),
    variants=(
        Variant("learned", "a trained vector a position", has(LearnedPositionSpec)),
        Variant("sinusoidal", "sines and cosines of the position", has(SinusoidalPositionSpec)),
        Variant("T5 bias", "a scalar a head and bucket of distances", has(BucketBiasSpec)),
        Variant("ALiBi", "minus a slope times the distance", has(AlibiSpec)),
        Variant("Shaw", "vectors for clipped distances", has(ShawSpec)),
        Variant("Transformer-XL", "a term of its own for distances", has(TransformerXLSpec)),
        Variant("none (NoPE)", "in some or all layers nothing: a causal mask alone tells order", _nope),
    ),
    cost="learned: positions x d parameters. T5: buckets x heads, once a stack. Sinusoidal, ALiBi: none.",
    counted=(Counted("gpt2/small", ("decoder.position",), "the learned positions"),),
    pitfalls=(
        (
            "There are two sinusoidal orders: sin and cos in turn with exponent 2i / d (the paper), and all sines, then"
            " all cosines with exponent i / (d/2 - 1) (tensor2tensor, fairseq). Weights of one do not fit the other."
        ),
        "RoBERTa and BART keep rows before position 0: their first token reads row 2.",
        "Learned positions end: token 1025 of GPT-2 has no vector. lamina says so and does not wrap around.",
        "With padding on the left, positions must be counted from the first real token.",
    ),
    corrections=(
        Correction(
            "GPT models use sinusoidal positional encodings.",
            "GPT-1, 2 and 3 learn a vector for each position: OpenAI's GPT-2 code has a trainable table wpe. The"
            " sinusoidal ones are those of the Transformer of 2017. What GPT-4 uses is not public.",
            "openai/gpt-2, src/model.py; arXiv:1706.03762, section 3.5",
        ),
    ),
    sources=(
        Source("Attention Is All You Need", "arXiv:1706.03762", "section 3.5"),
        Source("T5", "arXiv:1910.10683", "section 2.1"),
        Source("ALiBi: Train Short, Test Long", "arXiv:2108.12409", "section 3"),
        Source("Self-Attention with Relative Position Representations", "arXiv:1803.02155", "section 3.2"),
        Source("Transformer-XL", "arXiv:1901.02860", "section 3.3"),
        Source("NoPE: The Impact of Positional Encoding on Length Generalization", "arXiv:2305.19466"),
    ),
    example=Example(
        "ALiBi's slopes halve from head to head. T5 has a bucket for each of 16 distances, then 16 that widen to"
        " 128: 32 lies a third of the way from 16 to 128 in logarithms, so bucket 16 + 16/3, rounded down.",
        _position,
        "[0.5, 0.25, 0.125, 0.0625]\n[0, 1, 15, 16, 21, 26, 31, 31]\n",
    ),
)


def _rotary() -> None:
    import torch

    from lamina.layers import RotarySpec
    from lamina.layers.rotary import phases, rotate
    from lamina.tokens import plain

    x = torch.tensor([1.0, 0.0]).expand(1, 1, 4, 2)  # one vector, 4 times
    for start in (0, 100):
        tokens = plain(1, 4, start=start)
        cos, sin = phases(RotarySpec(), 2, tokens, x.dtype, {})
        turned = rotate(x, cos, sin, interleaved=False)[0, 0]
        scores = turned @ turned[0]  # with the first of them
        print([round(score, 4) for score in scores.tolist()])


ROTARY = Kind(
    name="rotary",
    title="Rotary positional embedding",
    what="Pairs of features of q and k turn with the position.",
    why="Turn q by the angle of its position and k by that of its own, and their product depends on the difference"
    " of the angles alone: a relative position, at the price of an absolute one, with no parameters and no table of"
    " scores. Fast pairs tell near distances apart, slow ones far ones.",
    equation="(a, b) -> (a cos pt_i - b sin pt_i, a sin pt_i + b cos pt_i)\nt_i = base^(-2i / r), i = 0 .. r/2 - 1",
    symbols=(
        ("(a, b)", "pair i of the features of a head of q or k; v is never turned"),
        ("p", "the position of the token"),
        ("r", "how many features of a head turn: all, or the first ones"),
        ("base", "10,000 at first; larger for longer contexts"),
    ),
    files=("layers/rotary.py",),
    used=has(RotarySpec),
    variants=(
        Variant("whole heads", "all features turn", has(RotarySpec, lambda part: part.width is None)),
        Variant("partial", "only the first features turn", has(RotarySpec, lambda part: part.width is not None)),
        Variant("interleaved", "pairs (2i, 2i + 1)", has(RotarySpec, lambda part: part.interleaved)),
        Variant("halves", "pairs (i, i + r/2)", has(RotarySpec, lambda part: not part.interleaved)),
        *(
            by_class(title, rule, name)
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
    cost="No parameters. Cosines and sines once a forward for all layers, then three operations a feature of q and k.",
    pitfalls=(
        (
            "The two pairings give different models from the same weights: Meta's files are interleaved, Hugging Face's"
            " are in halves with the rows of W_q and W_k reordered."
        ),
        "With partial rotation the frequencies count from r, not from the head size.",
        "Phases must be computed in float32: 257 has no bfloat16, so positions beyond 256 would share angles.",
        (
            "Keys in a cache are already turned. A scaling that depends on the length (dynamic NTK, LongRoPE) changes"
            " the angle of all of them; lamina refuses the cache there."
        ),
    ),
    corrections=(
        Correction(
            "RoPE extends positional embeddings to handle longer contexts.",
            "RoPE makes scores depend on distances. By itself it does not work beyond the length of training;"
            " position interpolation, NTK, YaRN, LongRoPE and Llama 3's scaling were made for that.",
            "arXiv:2104.09864, section 3.2; arXiv:2306.15595, section 2",
        ),
    ),
    sources=(
        Source("RoFormer", "arXiv:2104.09864", "section 3.2"),
        Source("Position interpolation", "arXiv:2306.15595", "equation 4"),
        Source("YaRN (with NTK and dynamic NTK)", "arXiv:2309.00071", "section 3"),
        Source("LongRoPE", "arXiv:2402.13753"),
        Source("The Llama 3 Herd of Models", "arXiv:2407.21783", "section 3.4"),
    ),
    example=Example(
        "The scores of a vector with itself at distances 0 to 3 are cos 0, cos 1, cos 2, cos 3, and the same a"
        " hundred tokens later.",
        _rotary,
        "[1.0, 0.5403, -0.4161, -0.99]\n[1.0, 0.5403, -0.4161, -0.99]\n",
    ),
)
