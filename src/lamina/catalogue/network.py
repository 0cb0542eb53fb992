"""Feed-forward network, gated linear units, mixture of experts: what is done to each token by itself."""

from __future__ import annotations

from collections.abc import Callable

from lamina.catalogue.kind import Correction, Counted, Example, Kind, Question, Source, Variant, has
from lamina.layers import ExpertChoiceSpec, ExpertsSpec, FeedForwardSpec, TopKSpec


def _gated(*acts: str) -> Question:
    return has(FeedForwardSpec, lambda part: part.gated and part.act in acts)


def _plain(*acts: str) -> Question:
    return has(FeedForwardSpec, lambda part: not part.gated and part.act in acts)


def _tokens_choose(test: Callable[[TopKSpec], bool]) -> Question:
    return has(TopKSpec, test)


def _feedforward() -> None:
    import torch

    from lamina.layers import Call, FeedForwardSpec
    from lamina.tokens import plain

    spec = FeedForwardSpec(hidden=2, act="relu", gated=False)
    layer = spec.build(width=1)
    layer.up.weight.data = torch.tensor([[1.0], [-1.0]])
    layer.down.weight.data = torch.tensor([[1.0, 1.0]])
    x = torch.tensor([[[-3.0], [2.0]]])  # two tokens
    print(layer(x, Call(tokens=plain(1, 2))).flatten().tolist())


FEED_FORWARD = Kind(
    name="feed-forward",
    title="Feed-forward network",
    what="Two matrices with a non-linearity between, on each token.",
    why="Attention mixes tokens, and its output is linear in the values. What is to be computed from a mix takes"
    " a non-linear function, here of each token by itself and with a wide middle.",
    equation="y = W_2 f(W_1 x + b_1) + b_2",
    symbols=(
        ("x, y", "(B, T, d)"),
        ("W_1, W_2", "(f, d) and (d, f); f is often 4 d"),
        ("f()", "on each number: ReLU, GELU, ..."),
    ),
    files=("layers/feedforward.py",),
    used=has(FeedForwardSpec, lambda part: not part.gated),
    variants=(
        Variant("ReLU", "f = max(x, 0)", _plain("relu")),
        Variant("GELU", "f = x Phi(x), exact", _plain("gelu")),
        Variant("GELU (tanh)", "f = its tanh approximation", _plain("gelu_tanh")),
        Variant("QuickGELU", "f = x sigmoid(1.702 x)", _plain("quick_gelu")),
        Variant("squared ReLU", "f = max(x, 0)^2", _plain("relu_squared")),
    ),
    cost="2 d f parameters, f + d more with biases; 4 d f FLOP a token. Two thirds of a layer where f = 4 d.",
    counted=(Counted("gpt2/small", ("decoder.layers.*.feedforward.op",), "the networks of all layers"),),
    pitfalls=(
        (
            "Exact and tanh GELU differ by up to 0.0005 a unit: GPT-2 and Google's BERT code have tanh, Hugging Face's"
            " BERT exact."
        ),
        "GPT-2's files hold the matrices transposed.",
        "Dropout inside, after f, is T5's; BERT and GPT-2 drop the output.",
    ),
    corrections=(
        Correction(
            "The typical network has a ReLU, as in GPT-3.",
            "ReLU is the Transformer's of 2017, and T5 v1.0's. GPT, BERT, RoBERTa and BART have GELU; most newer"
            " models have gates (SwiGLU, GEGLU).",
            "openai/gpt-2, src/model.py; arXiv:1606.08415",
        ),
    ),
    sources=(
        Source("Attention Is All You Need", "arXiv:1706.03762", "section 3.3"),
        Source("Gaussian Error Linear Units", "arXiv:1606.08415"),
        Source("Primer (squared ReLU)", "arXiv:2109.08668"),
    ),
    example=Example(
        "Weights 1 and -1, then 1 and 1: max(x, 0) + max(-x, 0) is the absolute value, which no linear map gives.",
        _feedforward,
        "[3.0, 2.0]\n",
    ),
)


def _glu() -> None:
    import torch

    from lamina.layers import Call, FeedForwardSpec
    from lamina.tokens import plain

    x = torch.tensor([[[-3.0], [3.0]]])  # two tokens
    for act in ("identity", "relu", "silu"):  # bilinear, ReGLU, SwiGLU
        layer = FeedForwardSpec(hidden=1, act=act, gated=True).build(width=1)
        for matrix in layer.parameters():
            matrix.data.fill_(1.0)
        y = layer(x, Call(tokens=plain(1, 2)))
        print(act, [round(value, 4) for value in y.flatten().tolist()])


GATED = Kind(
    name="gated",
    title="Gated linear units",
    what="A feed-forward network in which one branch gates the other.",
    why="A product of two branches lets one decide how much of the other passes, feature by feature. With as many"
    " parameters such networks reach a lower loss; why, their paper does not claim to know.",
    equation="y = W_2 (f(W x) * V x)",
    symbols=(
        ("x, y", "(B, T, d)"),
        ("W, V, W_2", "(f, d), (f, d) and (d, f); here gate, up and down"),
        ("*", "number by number"),
    ),
    files=("layers/feedforward.py",),
    used=has(FeedForwardSpec, lambda part: part.gated),
    variants=(
        Variant("GLU", "f = sigmoid", _gated("sigmoid")),
        Variant("bilinear", "f = x", _gated("identity")),
        Variant("ReGLU", "f = ReLU", _gated("relu")),
        Variant("GEGLU", "f = GELU", _gated("gelu", "gelu_tanh")),
        Variant("SwiGLU", "f = SiLU, x sigmoid(x)", _gated("silu")),
    ),
    cost="3 d f parameters and 6 d f FLOP a token; f = 8 d / 3 makes it as large as a plain network with f = 4 d.",
    counted=(Counted("llama/7b", ("decoder.layers.*.feedforward.op",), "the networks of all layers"),),
    pitfalls=(
        "Which branch the function stands on matters for reading files: here it is gate, Llama's gate_proj.",
        "f = 2/3 of 4 d is a custom, not a rule: PaLM keeps 4 d, Gemma-2B has 8 d.",
        "Gemma's GEGLU has the tanh GELU; the exact one gives other numbers.",
        "LLaMA rounds f up to a multiple of 256: 11008 at d = 4096.",
    ),
    corrections=(
        Correction(
            "GLU is utilised in models like GPT-3.",
            "GPT-2 and 3 have a plain network with GELU. Gates are in T5 v1.1 (GEGLU), PaLM and LLaMA (SwiGLU), the"
            " dense layers of GLaM and in Gemma (GEGLU).",
            "openai/gpt-2, src/model.py; arXiv:2002.05202",
        ),
    ),
    sources=(
        Source("GLU Variants Improve Transformer", "arXiv:2002.05202", "section 2"),
        Source("Language Modeling with Gated Convolutional Networks", "arXiv:1612.08083"),
    ),
    example=Example(
        "All weights 1, so y = f(x) x: x^2 = 9 for -3 and 3; ReLU shuts the gate for -3; SiLU leaves it ajar.",
        _glu,
        "identity [9.0, 9.0]\nrelu [0.0, 9.0]\nsilu [0.4268, 8.5732]\n",
    ),
)


def _experts() -> None:
    import torch

    from lamina.layers import Call, ExpertsSpec, FeedForwardSpec, TopKSpec
    from lamina.tokens import plain

    expert = FeedForwardSpec(hidden=1, act="identity", gated=False)
    for k in (2, 1):  # GShard, Switch
        router = TopKSpec(experts=4, chosen=k, normalise=k > 1)
        layer = ExpertsSpec(router=router, expert=expert).build(width=1)
        p = torch.tensor([[0.1], [0.3], [0.5], [0.1]])  # of a token of 1
        layer.router.weight.data = p.log()
        layer.experts.up.weight.data.fill_(1.0)
        outputs = torch.tensor([10.0, 20.0, 30.0, 40.0])
        layer.experts.down.weight.data = outputs.view(4, 1, 1)
        y = layer(torch.ones(1, 1, 1), Call(tokens=plain(1, 1)))
        print(round(y.item(), 4))


EXPERTS = Kind(
    name="experts",
    title="Mixture of experts",
    what="A router sends each token to a few of many networks.",
    why="More parameters know more, and cost as much as they are used. A router picks, for each token, a few of"
    " many feed-forward networks: the model grows with the number of experts, its arithmetic with the few.",
    equation="y = sum_{e in top-k} g_e F_e(x)\np = softmax(W_r x); g = p of the k chosen, mostly made to sum to 1",
    symbols=(
        ("x, y", "(tokens, d)"),
        ("W_r", "(E, d), the router, in float32"),
        ("F_e", "a feed-forward network, plain or gated, one of E"),
        ("k", "experts a token: 1 in Switch, 2 in GShard, GLaM and Mixtral, 8 in DeepSeek-V3"),
    ),
    files=(
        "layers/experts.py",
        "layers/router.py",
        "layers/expert_choice.py",
        "layers/capacity.py",
        "layers/router_loss.py",
        "layers/dispatch.py",
    ),
    used=has(ExpertsSpec),
    variants=(
        Variant("Switch", "k = 1, the gate as it is", _tokens_choose(lambda r: r.chosen == 1 and not r.normalise)),
        Variant("top-k", "k = 2 or more, gates that sum to 1", _tokens_choose(lambda r: r.chosen > 1 and r.normalise)),
        Variant(
            "top-k, gates as they are", "k = 2 or more", _tokens_choose(lambda r: r.chosen > 1 and not r.normalise)
        ),
        Variant("noisy top-k", "noise on the logits in training", _tokens_choose(lambda r: r.noise)),
        Variant("shared experts", "some experts see every token", has(ExpertsSpec, lambda e: e.shared is not None)),
        Variant(
            "sigmoid router",
            "chosen with a bias, weighted without it (DeepSeek-V3)",
            _tokens_choose(lambda r: r.score == "sigmoid"),
        ),
        Variant(
            "group limits",
            "experts of the best few groups only (DeepSeek)",
            _tokens_choose(lambda r: r.limit is not None),
        ),
        Variant(
            "capacity", "what comes when an expert is full gets 0", has(ExpertsSpec, lambda e: e.capacity is not None)
        ),
        Variant(
            "output masking", "results lost in training, smaller after it", has(ExpertsSpec, lambda e: e.masked > 0)
        ),
        Variant("expert choice", "each expert takes its best tokens", has(ExpertChoiceSpec)),
    ),
    cost="E times the parameters of a network and E d for the router; the arithmetic of k networks.",
    pitfalls=(
        (
            "Routers collapse to a few experts unless something balances them: an auxiliary loss E sum f_e p_e, or a"
            " bias on the choice (DeepSeek-V3)."
        ),
        "Where experts have a capacity, tokens beyond it get 0 from the layer and only their residual goes on.",
        "Switch does not renormalise its gate: with one expert it is p, not 1.",
        "When experts choose tokens, a token's fate depends on later ones: not for decoders.",
        "With a capacity in evaluation a text depends on its batch and on how it is read in pieces; here it is off.",
    ),
    corrections=(
        Correction(
            "GLaM and Switch use mixtures of experts to reduce computation.",
            "At the same computation they add parameters. Switch sends a token to one expert, GLaM to two, in every"
            " other feed-forward layer (Switch-C in every one).",
            "arXiv:2101.03961, section 2; arXiv:2112.06905, section 4",
        ),
    ),
    sources=(
        Source("The Sparsely-Gated Mixture-of-Experts Layer", "arXiv:1701.06538", "section 2"),
        Source("GShard", "arXiv:2006.16668", "section 2"),
        Source("Switch Transformers", "arXiv:2101.03961", "section 2"),
        Source("GLaM", "arXiv:2112.06905", "section 4"),
        Source("No Language Left Behind", "arXiv:2207.04672"),
        Source("Mixtral of Experts", "arXiv:2401.04088", "section 2"),
        Source("DeepSeek-V3", "arXiv:2412.19437", "section 2.1.2"),
        Source("Mixture-of-Experts with Expert Choice Routing", "arXiv:2202.09368", "section 3"),
    ),
    example=Example(
        "Four experts that give 10, 20, 30, 40, with probabilities 0.1, 0.3, 0.5, 0.1. Top-2: (0.5 x 30 + 0.3 x 20)"
        " / 0.8. Switch: 0.5 x 30.",
        _experts,
        "26.25\n15.0\n",
    ),
)
