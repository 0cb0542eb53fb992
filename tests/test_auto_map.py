"""Folders that bring their own code: transformers says with it what our model says, and engines find what they ask."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import CheckpointError, UnsupportedError
from lamina.families import family
from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    BranchSpec,
    DynamicNTKScaling,
    EmbeddingSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LayerSpec,
    LearnedPositionSpec,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RMSNormSpec,
    RotarySpec,
    StackSpec,
    StepSpec,
    SumSpec,
    TopKSpec,
    YarnScaling,
)
from lamina.model import Model, SpecialTokens
from lamina.patterns import Causal, Everything, Sinks, Window
from tests import small, tiny

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH, CONTEXT = 53, 24, 64


def attention(heads: int = 4, key_heads: int = 2, **more: Any) -> AttentionSpec:
    return AttentionSpec(**({"heads": heads, "key_heads": key_heads, "head_dim": 6, "rotary": RotarySpec()} | more))


def layer(op: Any, network: Any = None, norm: Any = None, **more: Any) -> LayerSpec:
    network, norm = network or FeedForwardSpec(hidden=20), norm or RMSNormSpec(eps=1e-5)
    steps = {"attention": op, "feedforward": network}
    return LayerSpec(steps=tuple(StepSpec(name=name, op=one, pre=norm, **more) for name, one in steps.items()))


def decoder(*layers: LayerSpec, head: Any = None, embedding: Any = None, **more: Any) -> lamina.ModelSpec:
    return lamina.ModelSpec(
        width=WIDTH,
        embedding=embedding or EmbeddingSpec(vocabulary=VOCABULARY),
        decoder=StackSpec(**{"layers": layers, "norm": RMSNormSpec(eps=1e-5)} | more),
        head=head or LanguageHeadSpec(tied=False),
        context=CONTEXT,
        special=SpecialTokens(start=1, end=(2,), pad=0),
    )


def near(back: int, sinks: int = 0) -> Any:
    local = Window(back=back)
    return Causal() & (local | Sinks(count=sinks) if sinks else local)


def mixture(experts: int = 3, chosen: int = 2, **more: Any) -> ExpertsSpec:
    router = {name: more.pop(name) for name in ("score", "normalise", "scale", "correction", "bias") if name in more}
    return ExpertsSpec(
        router=TopKSpec(experts=experts, chosen=chosen, **router), expert=FeedForwardSpec(hidden=10), **more
    )


GEMMA = RMSNormSpec(plus_one=True, wide_product=True)
LAYER_NORM, BARE = LayerNormSpec(), LayerNormSpec(bias=False)
SERVED = {  # what engines with one cache for all layers can run too
    "mixed": decoder(
        layer(attention(key_heads=4)),
        layer(attention(key_heads=2, pattern=near(5)), mixture()),
        layer(
            attention(key_heads=1, pattern=near(5), qk_norm=RMSNormSpec()), mixture(5, 1, score="sigmoid", scale=2.5)
        ),
        layer(
            attention(bias="all", rotary=RotarySpec(base=500.0, width=4, interleaved=True)),
            FeedForwardSpec(hidden=28, act="gelu_tanh", gated=False, bias=True),
            LAYER_NORM,
        ),
        layer(attention(rotary=None, scale=0.3, bias="qkv"), FeedForwardSpec(hidden=8, act="relu_squared")),
    ),
    "scaled phases": decoder(
        layer(attention(rotary=RotarySpec(scaling=LinearScaling(factor=2.5)))),
        layer(attention(rotary=RotarySpec(scaling=NTKScaling(factor=3.0)))),
        layer(attention(rotary=RotarySpec(scaling=YarnScaling(factor=4.0, original=16)))),
        layer(attention(rotary=RotarySpec(base=300.0, scaling=Llama3Scaling(factor=8.0, original=32)))),
    ),
    "parallel": decoder(
        *(
            LayerSpec(
                steps=(
                    StepSpec(
                        name="parallel",
                        pre=LAYER_NORM if shared else None,
                        op=SumSpec(
                            branches=(
                                BranchSpec(name="attention", op=attention(bias="qvo"), pre=None if shared else BARE),
                                BranchSpec(name="feedforward", op=network, pre=None if shared else RMSNormSpec()),
                            )
                        ),
                    ),
                )
            )
            for shared, network in (
                (True, FeedForwardSpec(hidden=20, act="quick_gelu", gated=False)),
                (False, mixture(3, 2, bias=True, normalise=False, shared=FeedForwardSpec(hidden=12), shared_gate=True)),
            )
        ),
        position=LearnedPositionSpec(size=CONTEXT, offset=2),
        input_norm=LAYER_NORM,
        norm=LAYER_NORM,
        head=LanguageHeadSpec(tied=True, bias=True, scale=0.4),
    ),
}
OTHERS = {  # what they cannot: every layer's mask is made for it
    "windows of all kinds": decoder(
        layer(attention(pattern=near(3, 2))),
        layer(attention(key_heads=4, pattern=near(6))),
        layer(attention(heads=3, key_heads=3, head_dim=10, pattern=near(2))),
        layer(attention(pattern=near(6))),
        layer(attention(key_heads=1)),
    ),
    "capped": decoder(
        layer(attention(softcap=4.0), norm=GEMMA, post=GEMMA),
        layer(attention(softcap=2.0, pattern=near(4)), FeedForwardSpec(hidden=20, act="gelu"), GEMMA, post=GEMMA),
        embedding=EmbeddingSpec(vocabulary=VOCABULARY, scale="rounded_root", padding=0),
        head=LanguageHeadSpec(tied=True, softcap=3.0),
        norm=GEMMA,
    ),
    "learned sinks": decoder(
        layer(attention(sink=True, bias="all", pattern=near(4))),
        layer(attention(sink=True), mixture(4, 2, score="sigmoid", correction=True, shared=FeedForwardSpec(hidden=6))),
    ),
    "other wiring": decoder(
        LayerSpec(
            steps=(
                StepSpec(name="first", op=mixture(), after=LAYER_NORM, residual=1.3),
                StepSpec(name="attention", op=attention(heads=6, key_heads=3), pre=LAYER_NORM, gate=True),
                StepSpec(name="second", op=FeedForwardSpec(hidden=9, act="tanh", gated=False), post=LAYER_NORM),
            )
        ),
        layer(attention()),
        norm=None,
    ),
}
ALL = SERVED | OTHERS
EAGER = ("capped", "learned sinks")


def random_model(spec: lamina.ModelSpec, seed: int = 0) -> Model:
    """Every weight random, those that begin at 0 or 1 too, and large enough for the answers to differ."""
    model = spec.build(seed=seed).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=random)
            parameter.copy_(drawn * (0.3 if parameter.dim() > 1 else 0.2) + (0.7 if parameter.dim() == 1 else 0))
    return model


def opened(folder: Path, **more: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **more).eval()


def written(name: str, folder: Path) -> Model:
    model = random_model(ALL[name])
    lamina.save(model, folder, "auto_map")
    return model


def padded(left: bool, rows: int = 3, length: int = 13) -> tuple[Tensor, Tensor]:
    ids = small.ids(rows, length, vocabulary=VOCABULARY).clamp(min=3)
    mask = torch.ones_like(ids)
    for row, holes in enumerate((0, 3, 7)):
        mask[row, :holes] = 0
    return ids, mask if left else mask.flip(1)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_transformers_says_the_same(name: str, tmp_path: Path):
    model = written(name, tmp_path / "out")
    theirs = opened(tmp_path / "out")
    assert theirs.config._attn_implementation == ("eager" if name in EAGER else "sdpa")
    ids, _ = padded(True)
    expected = model(ids).logits
    scale = float(expected.abs().max())
    assert (theirs(ids).logits - expected).abs().max() <= 1e-5 * scale
    for left in (True, False):
        ids, mask = padded(left)
        expected, got = model(ids, mask).logits, theirs(ids, attention_mask=mask).logits
        assert (got - expected)[mask.bool()].abs().max() <= 1e-5 * scale


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_the_same_tokens_with_and_without_a_cache(name: str, tmp_path: Path):
    model = written(name, tmp_path / "out")
    theirs = opened(tmp_path / "out")
    ids, mask = padded(True)
    more: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9}
    expected = lamina.generate(model, ids, mask, **more)
    for use_cache in (True, False):
        got = theirs.generate(ids, attention_mask=mask, do_sample=False, use_cache=use_cache, **more)
        assert torch.equal(got[:, ids.shape[1] :], expected[:, -9:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_backends_agree(name: str, tmp_path: Path):
    written(name, tmp_path / "out")
    ids, mask = padded(True)
    eager = opened(tmp_path / "out", attn_implementation="eager")(ids, attention_mask=mask).logits
    for backend in ("sdpa", "flex_attention"):
        if name == "learned sinks" and backend == "flex_attention":
            continue  # transformers has them on CUDA alone there
        if name in EAGER and backend == "sdpa":
            with pytest.raises(ValueError, match="does not support an attention implementation through torch"):
                opened(tmp_path / "out", attn_implementation=backend)
            continue
        with torch.compiler.set_stance("force_eager"):  # what is asked is the mask, not the kernel
            got = opened(tmp_path / "out", attn_implementation=backend)(ids, attention_mask=mask).logits
        assert (got - eager)[mask.bool()].abs().max() <= 1e-5 * eager.abs().max(), backend


@torch.no_grad()
def written_on(model: Model, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt, one by one and without a cache, whichever they are."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", SERVED)
def test_continuous_batching_says_the_same(name: str, tmp_path: Path):
    """Paged, on the CPU: prompts of several lengths flattened into one row, key heads of all layers in one cache."""
    model = written(name, tmp_path / "out")
    theirs = opened(tmp_path / "out")
    prompts = [[5, 9, 30, 22, 7, 11, 40, 8, 9, 3], [7, 8, 9], [3, 4, 10, 11, 12, 13]]
    told = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    paged = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    found = theirs.generate_batch(prompts, told, paged, warmup=False).values()
    assert [one.error for one in found] == [None] * 3
    assert [one.generated_tokens for one in found] == [written_on(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("name", OTHERS)
def test_what_an_engine_cannot_do_is_refused_when_it_asks(name: str, tmp_path: Path):
    """A cache of pages knows no cap and no first tokens; a mask that is ready says nothing of windows."""
    written(name, tmp_path / "out")
    theirs = opened(tmp_path / "out")
    layers = [module for module in theirs.modules() if hasattr(module, "num_key_value_groups")]
    if name in ("windows of all kinds", "capped"):
        with pytest.raises(ValueError, match="layer 0 has .* cannot do here"):
            layers[0].check(cache=object())
    if name == "windows of all kinds":
        assert [layer.beyond is None for layer in layers] == [False, False, False, True, True]
        mask = torch.zeros(1, 1, 4, 4)
        for given in (mask, {"full_attention": mask, "sliding_attention": mask}):
            with pytest.raises(ValueError, match="layer 0 has a mask of its own"):
                theirs(torch.arange(4)[None], attention_mask=given)
    theirs.config._attn_implementation_internal = "vllm"  # what vLLM sets
    refused = []
    for layer in layers:
        try:
            layer.check(None)
        except ValueError as error:
            refused.append(str(error).split(",")[0])
    assert (
        refused
        == {
            "windows of all kinds": [
                "layer 0 has a window of its own width",
                "layer 1 has heads of other numbers or sizes than other layers",
                "layer 2 has a window of its own width",
            ],
            "capped": [f"layer {i} has a cap on its scores that other layers do not have" for i in (0, 1)],
            "learned sinks": [],
            "other wiring": ["layer 1 has heads of other numbers or sizes than other layers"],
        }[name]
    )


SOURCE = Path(lamina.__file__).parent / "families/remote"


def test_the_code_keeps_to_what_engines_ask_of_it(tmp_path: Path):
    """What vLLM's transformers backend looks for in the source and in the configuration; vLLM itself is not run."""
    tree = ast.parse((SOURCE / "modeling_lamina.txt").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    forwards = {
        name: [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "forward"]
        for name, node in classes.items()
    }
    for name in ("LaminaAttention", "LaminaSinkAttention"):
        (forward,) = forwards[name]
        names = {
            target.id
            for node in ast.walk(forward)
            if isinstance(node, ast.Assign) and "ALL_ATTENTION_FUNCTIONS.get_interface(" in ast.unparse(node.value)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        calls = [
            node
            for node in ast.walk(forward)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
        ]
        assert len(names) == 1 and len(calls) == 1
        keywords = {one.arg: ast.unparse(one.value) for one in calls[0].keywords}
        assert keywords["scaling"] == "self.scaling" and None in keywords  # and **kwargs go through
        assert keywords.get("s_aux") == ("self.sinks" if name == "LaminaSinkAttention" else None)
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name)
        for file in ("modeling_lamina.txt", "configuration_lamina.txt")
        for node in ast.walk(ast.parse((SOURCE / file).read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    allowed = {"torch", "torch.nn.functional", "transformers", "transformers.masking_utils"}
    allowed |= {"transformers.modeling_outputs", "transformers.modeling_utils", "configuration_lamina"}
    assert imported == allowed
    version = ".".join(transformers.__version__.split(".")[:2])
    assert all(f"Tested with transformers {version}." in path.read_text() for path in SOURCE.glob("*.txt"))
    written("mixed", tmp_path / "out")
    theirs = opened(tmp_path / "out")
    base, config = theirs.model, theirs.config
    assert type(theirs).is_backend_compatible() and list(config.auto_map)[:2] == ["AutoConfig", "AutoModel"]
    assert len(base.layers) == config.num_hidden_layers == 5
    attentions = [module for module in base.modules() if type(module).__name__ == "LaminaAttention"]
    assert [one.layer_idx for one in attentions] == [0, 1, 2, 3, 4]
    assert all(type(one.scaling) is float and one.config is config for one in attentions)
    assert config.layer_types == ["full_attention", *["sliding_attention"] * 2, *["full_attention"] * 2]
    assert (config.sliding_window, config.num_key_value_heads, config.head_dim) == (5, 4, 6)
    for pattern, style in config.base_model_tp_plan.items():
        assert style in ("colwise", "rowwise") and re.fullmatch(r"layers\.\*\.[\w.]+", pattern)
    linear = {
        re.sub(r"\.\d+\.", ".*.", name, count=1) for name, one in base.named_modules() if type(one) is torch.nn.Linear
    }
    planned = {name for name in linear if ".experts." not in name}
    assert planned <= set(config.base_model_tp_plan)
    experts = [module for name, module in base.named_modules() if name.endswith(".experts")]
    assert len(experts) == 2 and all(isinstance(one, torch.nn.ModuleList) for one in experts)
    x = torch.randn(3, WIDTH)
    index, weights = torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.rand(3, 2)
    expected = [sum(weights[t, j] * experts[0][index[t, j]](x[t]) for j in range(2)) for t in range(3)]
    torch.testing.assert_close(experts[0](x, index, weights), torch.stack(expected))
    flat = base(torch.tensor([[5, 6, 7, 8]]), position_ids=torch.arange(4)[None], use_cache=False, return_dict=False)
    assert isinstance(flat, tuple) and flat[0].shape == (1, 4, WIDTH)


@pytest.mark.parametrize("name", ALL)
def test_it_comes_back(name: str, tmp_path: Path):
    model = written(name, tmp_path / "out")
    again = lamina.load(tmp_path / "out")
    assert again.spec == model.spec
    assert all(torch.equal(one, again.get_parameter(path)) for path, one in model.named_parameters())
    lamina.save(again, tmp_path / "twice")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["config.json", "configuration_lamina.py", "model.safetensors", "modeling_lamina.py"]
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_what_transformers_trained_and_saved_comes_back(tmp_path: Path):
    """With more tokens, and other weights."""
    model = written("mixed", tmp_path / "out")
    theirs = opened(tmp_path / "out").train()
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.1)
    ids = small.ids(2, 9, vocabulary=VOCABULARY)
    theirs(ids, labels=ids).loss.backward()
    assert all(one.grad is not None for one in theirs.parameters())
    optimiser.step()
    theirs.resize_token_embeddings(VOCABULARY + 3)
    theirs.eval().save_pretrained(tmp_path / "trained")
    again = lamina.load(tmp_path / "trained")
    assert again.spec == model.spec.replace(embedding=EmbeddingSpec(vocabulary=VOCABULARY + 3))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(again(ids).logits[..., :VOCABULARY], model(ids).logits)


@torch.no_grad()
def test_phases_stay_in_float32_in_a_model_of_bfloat16(tmp_path: Path):
    model = written("scaled phases", tmp_path / "out")
    exact = [one["frequencies"] for one in family("lamina").config(model.spec)["rotary_tables"]]  # pyright: ignore
    for theirs in (opened(tmp_path / "out", dtype=torch.bfloat16), opened(tmp_path / "out").to(torch.bfloat16)):
        assert next(theirs.parameters()).dtype == torch.bfloat16
        assert [one.inv_freq.tolist() for one in theirs.model.rotary.values()] == exact
    ids = small.ids(1, 60, vocabulary=VOCABULARY)
    ours = model.to(torch.bfloat16)(ids).logits
    assert (theirs(ids).logits - ours).float().abs().max() < 0.05 * ours.float().abs().max()


def test_what_the_code_has_no_word_for_is_named(tmp_path: Path):
    plain = layer(attention())
    cases = {
        "decoder.score_bias is a AlibiSpec": decoder(plain, score_bias=AlibiSpec(heads=4)),
        "decoder.layers.1.steps.0.op.rotary.scaling is a DynamicNTKScaling": decoder(
            plain, layer(attention(rotary=RotarySpec(scaling=DynamicNTKScaling(factor=2.0, original=8))))
        ),
        "decoder.repeat is 2, not 1": decoder(plain, repeat=2),
        "decoder.layers.0: the pattern is neither causal nor": decoder(layer(attention(pattern=Everything()))),
        "decoder.layers.1 has 0 attentions": decoder(plain, LayerSpec(steps=plain.steps[1:])),
    }
    for what, spec in cases.items():
        with pytest.raises(UnsupportedError, match=what):
            lamina.save(spec.build(), tmp_path / "out", "auto_map")
    with pytest.raises(UnsupportedError, match="decoder is None"):
        lamina.save(tiny.model(tiny.BERT), tmp_path / "out", "auto_map")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedError, match="not exportable to the Hugging Face layout"):  # nobody asked for code
        lamina.save(random_model(ALL["mixed"]), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_hidden_layers", 4, "num_hidden_layers is 4; by the spec beside it, it is 5"),
        ("sliding_window", 6, "sliding_window is 6; by the spec beside it, it is 5"),
        ("spec", {"type": "ModelSpec"}, "ModelSpec lacks the field"),
        ("spec", None, "spec is None"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(name: str, value: Any, said: str, tmp_path: Path):
    written("mixed", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(CheckpointError, match=f"config.json: .*{said}"):
        lamina.spec(tmp_path / "out")


def test_its_code_is_not_run_here(tmp_path: Path):
    model = written("mixed", tmp_path / "out")
    for file in ("modeling_lamina.py", "configuration_lamina.py"):
        (tmp_path / "out" / file).write_text("raise SystemExit('run')\n")
    assert lamina.load(tmp_path / "out").spec == model.spec
