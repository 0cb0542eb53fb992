"""Memory layers, attention over retrieved text, key-value cache: what is kept beside the text."""

from __future__ import annotations

from lamina.catalogue.kind import Correction, Counted, Example, Kind, Source, Variant, by_class, has, named, planned
from lamina.layers import ChunkedCrossAttentionSpec, ProductKeySpec, StackSpec, StepSpec
from lamina.model import ModelSpec
from lamina.patterns import Window


def _memory() -> None:
    import torch

    from lamina.layers.product_keys import best_sums

    torch.manual_seed(0)
    n, k = 100, 4  # two lists of n half keys stand for n x n keys
    first, second = torch.randn(n), torch.randn(n)  # q_1 . c_i, q_2 . d_j
    _, found = best_sums(first, second, k)
    every = (first[:, None] + second).flatten().topk(k).indices  # of n x n
    print(torch.equal(found, every), n * n)


MEMORY = Kind(
    name="memory",
    title="Memory layers",
    what="A large table of trained keys and values, read sparsely.",
    why="A table of which each token reads a few rows holds facts at almost no arithmetic. Others carry states from"
    " one segment of a text to the next, so that a fixed window sees further back.",
    equation="y = sum_k w_k V[i_k], w = softmax of the k best scores\n"
    "score(i, j) = q_1 . c_i + q_2 . d_j: n + n sub-keys stand for n^2 keys",
    symbols=(
        ("q = [q_1, q_2]", "(B, T, heads, 2, D/2), the query in two halves"),
        ("c, d", "(n, D/2) each, the half keys of a head"),
        ("k", "rows that a head reads: 32 in the paper"),
        ("V", "(n^2, d), the values"),
    ),
    files=(
        "layers/memory_attention.py",
        "layers/recurrence.py",
        "layers/compressive.py",
        "layers/most_used.py",
        "layers/memorizing.py",
        "layers/infini.py",
        "layers/product_keys.py",
        "layers/batch_norm.py",
        "layers/recurrent.py",
    ),
    used=named("MemoryAttentionSpec", "ProductKeySpec", "RecurrentMemorySpec"),
    variants=(
        by_class("Transformer-XL", "what came before the segment, of which W_k and W_v alone learn", "RecurrenceSpec"),
        by_class("compressive", "what leaves those, c positions as one key, or the most used", "CompressiveSpec"),
        by_class("memorizing", "the k nearest of stored keys, mixed in by a gate a head", "MemorizingSpec"),
        by_class("Infini-attention", "a matrix for all that left the segment", "InfiniSpec"),
        Variant(
            "product keys",
            "the k best of n^2 keys, values trained",
            has(ProductKeySpec, lambda part: not part.gated and part.act is None),
        ),
        Variant(
            "Memory+",
            "the same, one table for several layers, times SiLU(W x)",
            has(ProductKeySpec, lambda part: part.gated),
        ),
        Variant(
            "PEER",
            "a value is a network with one hidden feature",
            has(ProductKeySpec, lambda part: part.act is not None),
        ),
        Variant(
            "recurrent (RMT)",
            "vectors carried from segment to segment",
            has(StackSpec, lambda part: part.recurrence is not None),
        ),
    ),
    cost="n^2 d parameters in the values: 1.07 billion for n = d = 1024. Arithmetic for 2 n scores and k rows a head;"
    " gradients of the rows that were read.",
    pitfalls=(
        "The k best of each half hold the k best of all n^2 sums: the search is exact, not an approximation.",
        "Values are touched rarely; they want a larger learning rate of their own.",
        "Batch normalisation of the queries must not count padding, and in training lets a token see later ones.",
        (
            "In the Memorizing Transformer local and memory attention are two softmaxes mixed by a gate, not one"
            " joint one."
        ),
    ),
    corrections=(
        Correction(
            "GPT models with memory components use external memory banks.",
            "No published GPT has a memory layer. Models that have: Transformer-XL, Compressive and Memorizing"
            " Transformers, RMT, Infini-attention, product-key memories.",
            "arXiv:1901.02860, section 3; arXiv:2203.08913, section 3; arXiv:1907.05242, section 3",
        ),
    ),
    sources=(
        Source("Large Memory Layers with Product Keys", "arXiv:1907.05242", "section 3"),
        Source("Memory Layers at Scale", "arXiv:2412.09764", "section 3"),
        Source("Mixture of A Million Experts (PEER)", "arXiv:2407.04153", "section 2"),
        Source("Transformer-XL", "arXiv:1901.02860", "section 3"),
        Source("Compressive Transformers", "arXiv:1911.05507", "section 3"),
        Source("Memorizing Transformers", "arXiv:2203.08913", "section 3"),
        Source("Infini-attention", "arXiv:2404.07143", "section 2.1"),
        Source("Recurrent Memory Transformer", "arXiv:2207.06881", "section 3.2"),
    ),
    example=Example(
        "The 4 best of 100 x 100 sums, found among 4 x 4: a pair among the best of all has both halves among the best.",
        _memory,
        "True 10000\n",
    ),
)


def _retrieval() -> None:
    m = 4  # tokens of a chunk
    for token in range(2, 9):
        chunk = (token + 1) // m - 1  # whose neighbours this token reads
        first = chunk * m
        print(token, f"{first}-{first + m - 1}" if chunk >= 0 else "nothing")


def _retrofitted(spec: ModelSpec) -> bool:
    steps = [part for _, part in spec.walk() if isinstance(part, StepSpec)]
    return any(step.gate and isinstance(step.op, ChunkedCrossAttentionSpec) for step in steps)


RETRIEVAL = Kind(
    name="retrieval",
    title="Attention over retrieved text",
    what="Tokens read texts that a database found for what came before.",
    why="What stands in a database need not be learned by heart, and can be changed without training. RETRO splits"
    " the text into chunks, finds neighbours of each, encodes them, and lets the tokens that follow read them by"
    " cross-attention.",
    equation="token t reads E_c, c = floor((t + 1) / m) - 1\nnothing where c < 0; E_c = Encoder(neighbours of chunk c)",
    symbols=(
        ("m", "tokens of a chunk: 64 in RETRO"),
        ("t, c", "token and chunk, counted from 0"),
        ("E_c", "(k r, d'), k neighbours of r tokens: the chunk found and its continuation"),
    ),
    files=("layers/retrieval.py",),
    used=has(ChunkedCrossAttentionSpec),
    variants=(
        Variant("chunked cross-attention", "neighbours of the chunk before (RETRO)", has(ChunkedCrossAttentionSpec)),
        Variant("gated from zero", "new steps beside a pretrained model: nothing changes at first", _retrofitted),
        Variant("kNN-LM", "p = l p_kNN + (1 - l) p_LM, at the output alone: of any causal model"),
        planned("in context", "the best neighbour in front of the text (RETRO++, RAG)"),
    ),
    cost="Cross-attention in some layers (every third from the sixth in RETRO) and a small encoder; the database is"
    " no part of the model.",
    counted=(
        Counted(
            "retro/7.5b",
            ("decoder.layers.*.retrieval.op.attention",),
            "chunked cross-attention, all layers",
            ("parameters", "cache"),
        ),
        Counted("retro/7.5b", ("decoder.layers.*.retrieval.op.encoder",), "the encoder, its table of tokens included"),
    ),
    pitfalls=(
        (
            "Neighbours of a chunk may be read from its last token on and not before: they were found with all of"
            " it, so earlier tokens would see what comes after them."
        ),
        "Chunks of the document itself must not be found in training, or the answer is copied.",
        "Without neighbours the model must equal the one without retrieval.",
    ),
    corrections=(
        Correction(
            "RETRO attends to retrieved documents.",
            "It attends to chunks: the neighbours that were found for the chunk before and their continuations,"
            " encoded, by chunked cross-attention that is shifted by one token so that it stays causal.",
            "arXiv:2112.04426, section 2",
        ),
    ),
    sources=(
        Source("RETRO: Improving language models by retrieving", "arXiv:2112.04426", "section 2"),
        Source("Generalization through Memorization (kNN-LM)", "arXiv:1911.00172", "section 2"),
    ),
    example=Example(
        "Chunks of four tokens, and whose neighbours a token reads: token 3 ends the first chunk, and is the first"
        " to read what was found for it.",
        _retrieval,
        "2 nothing\n3 0-3\n4 0-3\n5 0-3\n6 0-3\n7 4-7\n8 4-7\n",
    ),
)


def _cache() -> None:
    import torch

    from lamina.cache import Cache
    from lamina.layers import AttentionSpec, Call
    from lamina.tokens import plain

    layer = AttentionSpec(heads=4, key_heads=1, head_dim=2).build(width=8)
    x, cache, parts = torch.randn(1, 5, 8), Cache("growing", batch=1), []
    cache.add("", layer.retained())
    for start, stop in ((0, 3), (3, 4), (4, 5)):  # three tokens, one, one
        tokens = plain(1, stop - start, start=start)
        parts.append(layer(x[:, start:stop], Call(tokens=tokens, cache=cache)))
        cache.advance(tokens)
    whole = layer(x, Call(tokens=plain(1, 5)))
    print(torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-6))
    print(cache.bytes(), "bytes")


CACHE = Kind(
    name="cache",
    title="Key-value cache",
    what="Decoding keeps the keys and values of the tokens before.",
    why="Earlier tokens never change in a causal model, so their keys and values need not be computed again for"
    " each new one: a step reads one token instead of all. It is a state of decoding with no parameters, and"
    " changes no number.",
    equation="bytes = 2 layers G D min(length, window) batch bytes_of_dtype\nslot.extend(k, v) -> all keys, all values",
    symbols=(
        ("G, D", "heads of keys, features of each"),
        ("length", "tokens so far; a window keeps no more than it sees"),
        ("k, v", "(B, G, T, D) of the new tokens"),
    ),
    files=(
        "cache/cache.py",
        "cache/growing.py",
        "cache/fixed.py",
        "cache/ring.py",
        "cache/sinks.py",
        "cache/memory.py",
    ),
    used=lambda spec: spec.decoder is not None,
    variants=(
        Variant("growing", "every key"),
        Variant("ring", "as many as the window", has(Window)),
        Variant("fixed", "preallocated, for compiled steps"),
        Variant("sinks", "the first and the last keys, renumbered"),
    ),
    cost="No parameters. A step reads all of it, which is what limits the speed of decoding long texts.",
    counted=(
        Counted("gpt2/small", ("decoder.layers.*.attention.op",), "12 heads, all layers", ("cache",)),
        Counted("llama3.1/8b", ("decoder.layers.*.attention.op",), "8 heads of keys, all layers", ("cache",)),
    ),
    pitfalls=(
        "Reading in pieces needs a mask that is aligned to the end of the keys, not to their beginning.",
        "A ring cannot be rolled back beyond what it has overwritten.",
        "A kept prefix serves another text only where tokens and positions are the same.",
        "Sinks renumber keys inside the cache, so keys must be kept before they are turned.",
    ),
    corrections=(
        Correction(
            "The key-value cache is a layer, of GPT-3 for example.",
            "It is a state of decoding and has no parameters. The GPT-3 paper does not describe one; OpenAI's GPT-2"
            " code has it, as past and present.",
            "openai/gpt-2, src/model.py",
        ),
    ),
    sources=(
        Source("Fast Transformer Decoding (decoding step by step)", "arXiv:1911.02150", "section 2"),
        Source("StreamingLLM (sinks)", "arXiv:2309.17453", "section 3.2"),
    ),
    example=Example(
        "Five tokens read at once, and in pieces of three, one and one, give the same. The cache: keys and values,"
        " 1 head of 2, 5 tokens, 4 bytes each: 2 x 1 x 2 x 5 x 4 = 80.",
        _cache,
        "True\n80 bytes\n",
    ),
)
