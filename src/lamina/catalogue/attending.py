"""Self-attention, multi-head attention, cross-attention, sparse attention: how tokens read other tokens."""

from __future__ import annotations

from collections.abc import Callable

from lamina.catalogue.kind import (
    ATTENTIONS,
    Correction,
    Counted,
    Example,
    Kind,
    Question,
    Source,
    Variant,
    by_class,
    has,
    named,
)
from lamina.layers import AttentionSpec, CrossAttentionSpec, StepSpec
from lamina.patterns import Causal, Everything, Prefix, Sinks, Window


def _heads(test: Callable[[AttentionSpec], bool]) -> Question:
    return has(AttentionSpec, test)


def _attention() -> None:
    import math

    import torch

    from lamina.layers import AttentionSpec, Call
    from lamina.tokens import plain

    spec = AttentionSpec(heads=1, key_heads=1, head_dim=2, scale=math.log(3))
    layer = spec.build(width=2)
    for matrix in (layer.q, layer.k, layer.v, layer.o):
        matrix.weight.data = torch.eye(2)
    y = layer(torch.eye(2)[None], Call(tokens=plain(1, 2)))[0]
    print([[round(value, 4) for value in row] for row in y.tolist()])


SELF_ATTENTION = Kind(
    name="self-attention",
    title="Self-attention",
    what="Each token takes a weighted mean of the values it may see.",
    why="What a word means depends on others, near or far. Attention lets each token look at all that it may see at"
    " once: it asks with a query, the others answer with keys, and where they fit, their values are taken over."
    " Distance costs nothing, and all tokens are computed together.",
    equation="softmax(s Q K^T + bias + M) V W_O\nQ = X W_Q, K = X W_K, V = X W_V, s = D^-0.5",
    symbols=(
        ("X", "(B, T, d)"),
        ("Q, K, V", "(B, H, T, D): H heads of D features"),
        ("M", "(T, T): 0 where the pattern allows, minus infinity where not"),
        ("softmax", "over the keys: the weights of each query sum to 1"),
    ),
    files=("layers/attention.py", "attend/dense.py", "patterns/pattern.py"),
    used=named(*ATTENTIONS),
    variants=(
        Variant("causal", "key <= query", has(Causal)),
        Variant("bidirectional", "every token of the document", has(Everything)),
        Variant("prefix", "a prefix is seen by all", has(Prefix)),
        Variant("unscaled", "s = 1", _heads(lambda part: part.scale == 1.0)),
        Variant("soft-cap", "z <- c tanh(z / c) before the mask", _heads(lambda part: part.softcap is not None)),
        Variant("QK-norm", "norms on the heads of q and k", _heads(lambda part: part.qk_norm is not None)),
        Variant("sink", "a learned logit that takes probability", _heads(lambda part: part.sink)),
        by_class("differential", "softmax(q1 k1) - lambda softmax(q2 k2), then a norm", "DifferentialSpec"),
    ),
    cost="4 d H D parameters where keys have as many heads (biases apart). Scores and means take 4 T H D FLOP a"
    " token at length T, which grows with the length; the four matrices take 8 d H D, which does not.",
    counted=(Counted("gpt2/small", ("decoder.layers.*.attention.op",), "attention in all layers"),),
    pitfalls=(
        "With a cache the mask must be aligned to the end: query r of T new ones stands at S - T + r of S keys.",
        "A row that may see nothing (padding) is 0 / 0 in a softmax; here it gives zeros.",
        "Padding must be hidden as keys; that its own outputs are meaningless does no harm.",
        "A soft-cap comes after the scale and before the mask; after the mask it would let hidden keys in.",
    ),
    corrections=(
        Correction(
            "Causal attention looks at the previous tokens only.",
            "It looks at those and at the token itself: key <= query. Otherwise the first token would see nothing.",
            "arXiv:1706.03762, section 3.2.3",
        ),
        Correction(
            "BERT's attention mechanism is masked language modelling.",
            "That is its training objective. The mechanism is bidirectional attention, in which only padding is"
            " hidden.",
            "arXiv:1810.04805, section 3",
        ),
    ),
    sources=(
        Source("Attention Is All You Need", "arXiv:1706.03762", "section 3.2.1"),
        Source("Gemma 2 (soft-cap)", "arXiv:2408.00118", "section 2"),
        Source("Query-Key Normalization for Transformers", "arXiv:2010.04245"),
    ),
    example=Example(
        "Two tokens, every matrix the identity, scores times ln 3. The first sees itself alone. The second has"
        " scores 0 and ln 3, so weights 1/4 and 3/4.",
        _attention,
        "[[1.0, 0.0], [0.25, 0.75]]\n",
    ),
)


def _multi_head() -> None:
    import torch

    from lamina.layers import AttentionSpec, Call
    from lamina.tokens import plain

    call, layers = Call(tokens=plain(1, 5)), {}
    for key_heads in (4, 2, 1):
        spec = AttentionSpec(heads=4, key_heads=key_heads, head_dim=2)
        layers[key_heads] = spec.build(width=8)
    print([sum(p.numel() for p in x.parameters()) for x in layers.values()])
    weights = layers[2].state_dict()
    for name in ("k.weight", "v.weight"):  # each key head, for two heads
        two = weights[name].reshape(2, 2, 8)
        weights[name] = two.repeat_interleave(2, dim=0).reshape(8, 8)
    layers[4].load_state_dict(weights)
    x = torch.randn(1, 5, 8)
    print(torch.allclose(layers[4](x, call), layers[2](x, call), atol=1e-6))


MULTI_HEAD = Kind(
    name="multi-head",
    title="Multi-head attention",
    what="Attention in several heads of fewer features each.",
    why="One softmax gives one mean. Heads let a token read several things at once, each with queries and keys of"
    " its own. Decoding has to read the keys and values of all tokens again for each new one, so later models let"
    " several heads of queries share a head of keys and values.",
    equation="head_i = softmax(s q_i k_g^T + M) v_g, g = floor(i / (H / G))\nO = [head_1 .. head_H] W_O",
    symbols=(
        ("H, G", "heads of queries, and of keys and values; H is a multiple of G"),
        ("q_i", "(B, T, D), of X W_Q with W_Q (d, H D)"),
        ("k_g, v_g", "(B, T, D), of X W_K, X W_V with matrices (d, G D)"),
        ("W_O", "(H D, d); H D need not be d"),
    ),
    files=("layers/attention.py",),
    used=_heads(lambda part: part.heads > 1),
    variants=(
        Variant("MHA", "key_heads = heads", _heads(lambda part: part.key_heads == part.heads)),
        Variant("GQA", "1 < key_heads < heads", _heads(lambda part: 1 < part.key_heads < part.heads)),
        Variant("MQA", "key_heads = 1", _heads(lambda part: part.key_heads == 1 < part.heads)),
        by_class("latent (MLA)", "keys and values of all heads from one cached vector", "LatentAttentionSpec"),
    ),
    cost="2 d H D + 2 d G D parameters. The cache has 2 G D numbers a token and layer: G = 1 makes it H times smaller.",
    counted=(
        Counted("llama2/7b", ("decoder.layers.*.attention.op",), "MHA, 32 heads"),
        Counted("mistral/7b", ("decoder.layers.*.attention.op",), "GQA, 32 heads on 8"),
    ),
    pitfalls=(
        (
            "Query head i reads key head floor(i / (H / G)): heads are repeated one by one (0, 0, 1, 1), not as a"
            " block (0, 1, 0, 1)."
        ),
        "Heads split the features that the projections give, not the tokens.",
        "D is not always d / H: T5-11B has 128 heads of 128 on a width of 1024, Gemma-7B 16 of 256 on 3072.",
    ),
    corrections=(
        Correction(
            "GPT-4 uses 96 attention heads.",
            "GPT-4's report discloses no architecture. It is GPT-3 175B that has 96 heads, and 96 layers.",
            "arXiv:2303.08774, section 2; arXiv:2005.14165, table 2.1",
        ),
    ),
    sources=(
        Source("Attention Is All You Need", "arXiv:1706.03762", "section 3.2.2"),
        Source("Fast Transformer Decoding: One Write-Head is All You Need (MQA)", "arXiv:1911.02150", "section 3"),
        Source("GQA", "arXiv:2305.13245", "section 2.2"),
    ),
    example=Example(
        "Width 8, 4 heads of 2: 4 x 64 numbers with 4 key heads, 2 x 64 + 2 x 32 with 2, 2 x 64 + 2 x 16 with 1."
        " And grouped heads equal full ones whose keys and values are copies.",
        _multi_head,
        "[256, 192, 160]\nTrue\n",
    ),
)


def _cross() -> None:
    import math

    import torch

    from lamina.layers import Call, CrossAttentionSpec
    from lamina.tokens import plain

    layer = CrossAttentionSpec(heads=1, key_heads=1, head_dim=1).build(1)
    for matrix in (layer.q, layer.k, layer.v, layer.o):
        matrix.weight.data.fill_(1.0)
    x = torch.full((1, 1, 1), math.log(2))  # one query
    for source in ([0.0, 1.0, 1.0], [1.0, 0.0, 1.0]):
        memory = torch.tensor(source).reshape(1, 3, 1)
        call = Call(tokens=plain(1, 1))
        call.memory, call.memory_tokens = memory, plain(1, 3)
        print(round(layer(x, call).item(), 4))


CROSS_ATTENTION = Kind(
    name="cross-attention",
    title="Cross-attention",
    what="The queries of a decoder read what an encoder made of a source.",
    why="To translate, summarise or transcribe, each word that is written depends on all of the source. The decoder"
    " asks and the encoder's output answers; the source is read once, and its keys and values stay the same for"
    " every word.",
    equation="softmax(s Q K^T + M) V W_O\nQ = X W_Q,  K = Y W_K,  V = Y W_V",
    symbols=(
        ("X", "(B, T, d), the decoder's states"),
        ("Y", "(B, S, d_y), the encoder's output"),
        ("M", "hides the padding of the source; nothing is causal"),
    ),
    files=("layers/cross.py",),
    used=has(CrossAttentionSpec),
    variants=(
        Variant("plain", "x + CA(N(x), y), or N(x + CA(x, y))", has(StepSpec, lambda s: _crosses(s) and not s.gate)),
        Variant("gated", "x + tanh(a) CA(N(x), y), a = 0 at first", has(StepSpec, lambda s: _crosses(s) and s.gate)),
    ),
    cost="As self-attention's: 2 d H D + 2 d_y G D parameters. Keys and values of the source are computed once and"
    " kept: 2 G D S numbers a layer, however long the text becomes.",
    counted=(Counted("t5/base", ("decoder.layers.*.cross.op",), "the decoder's cross-attention", context=512),),
    pitfalls=(
        (
            "What is read is the encoder's output after its last norm where the encoder is pre-norm (T5), and as it"
            " is where it is post-norm (BART)."
        ),
        "T5 has a position bias in self-attention and none here.",
        "With a cache the source's keys are filled at the first step; a new source needs a new cache.",
        "Beams share a source: its keys need not be repeated for each.",
    ),
    corrections=(
        Correction(
            "T5 uses bidirectional attention and cross-attention.",
            "Bidirectional is its encoder alone; the self-attention of its decoder is causal. T5 also has position"
            " biases by distance, RMSNorm, scores without a scale, and no biases in its matrices.",
            "arXiv:1910.10683, section 2.1",
        ),
    ),
    sources=(
        Source("Attention Is All You Need", "arXiv:1706.03762", "section 3.2.3"),
        Source("Flamingo (gated)", "arXiv:2204.14198", "section 2.2"),
    ),
    example=Example(
        "One query of ln 2 reads keys 0, 1, 1: e^0, e^ln 2, e^ln 2 = 1, 2, 2, so the mean of the values 0, 1, 1 is"
        " 4/5. In another order the source gives the same: there are no positions here.",
        _cross,
        "0.8\n0.8\n",
    ),
)


def _crosses(step: StepSpec) -> bool:
    return isinstance(step.op, CrossAttentionSpec)


def _sparse() -> None:
    from lamina.patterns import Causal, Sinks, Window, allowed
    from lamina.tokens import plain

    tokens = plain(1, 5)
    local = Causal() & Window(back=2)
    for pattern in (local, local | (Causal() & Sinks(count=1))):
        mask = allowed(pattern, tokens.query(), tokens.key())[0].tolist()
        print(*("".join(".x"[seen] for seen in row) for row in mask))


SPARSE = Kind(
    name="sparse",
    title="Sparse attention",
    what="Attention under a pattern that leaves most pairs out.",
    why="The scores of a text grow with the square of its length. Most of what a token needs is near it, so each"
    " looks at a window, and some tokens or some layers keep the long view; stacked windows reach further with"
    " every layer.",
    equation="softmax(s Q K^T + M) V, M = 0 where allowed(i, j)\n"
    "window: i - W < j <= i;  local: |i - j| <= w;  sinks: j < n\n"
    "patterns compose: Causal() & (Window(back=W) | Sinks(count=n))",
    symbols=(
        ("i, j", "positions of the query and the key"),
        ("W", "keys that are seen, the token's own included"),
        ("w", "keys on each side: 2 w + 1 in all"),
    ),
    files=("patterns/near.py", "patterns/strided.py", "patterns/blocks.py", "attend/blocks.py", "attend/plan.py"),
    used=has((Window, Sinks)),
    variants=(
        Variant("window", "the last W keys", has(Window, lambda part: part.ahead is None)),
        Variant("local", "w keys on both sides", has(Window, lambda part: part.ahead is not None)),
        Variant("sinks", "the first keys are always seen", has(Sinks)),
        by_class("global", "marked tokens see and are seen by all", "Global", "LongformerSpec"),
        by_class("strided", "every l-th key, or the last c of every l", "Strided", "Summary"),
        by_class(
            "blocks",
            "windows, tables and random draws of blocks",
            "BlockWindow",
            "BlockTable",
            "RandomBlocks",
            "BigBirdSpec",
        ),
    ),
    cost="No parameters beyond attention's. What may be skipped: all but T W of T^2 scores. The cache of a window"
    " keeps W tokens and no more. On the CPU only the blocks that a pattern asks for are computed, forward and"
    " backward; what `account` counts is the whole matrix.",
    counted=(
        Counted("mistral/7b", ("decoder.layers.*.attention.op",), "windows of 4096", ("flops", "cache")),
        Counted("mistral/7b-v0.3", ("decoder.layers.*.attention.op",), "the same without", ("flops", "cache")),
    ),
    pitfalls=(
        "W counts the token itself in Mistral; Longformer's w does not, and Hugging Face's attention_window is 2 w.",
        "L layers of windows see L (W - 1) + 1 tokens, not W.",
        (
            "A window forgets the first tokens, on which models put probability they have no use for: without"
            " sinks, text of a model that was not trained so falls apart as soon as they leave."
        ),
        "GPT-3 alternates dense and banded layers; the width of its band was never published.",
    ),
    sources=(
        Source("Generating Long Sequences with Sparse Transformers", "arXiv:1904.10509", "section 4"),
        Source("Longformer", "arXiv:2004.05150", "section 3.1"),
        Source("Mistral 7B", "arXiv:2310.06825", "section 2"),
        Source("StreamingLLM (sinks)", "arXiv:2309.17453", "section 3.2"),
    ),
    example=Example(
        "Who sees whom among five tokens, a group of letters a query: a causal window of two, then with the first"
        " token always seen.",
        _sparse,
        "x.... xx... .xx.. ..xx. ...xx\nx.... xx... xxx.. x.xx. x..xx\n",
    ),
)
