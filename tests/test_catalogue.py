"""The catalogue: every page is whole, its examples print what it says, and who uses what is what the specs say."""

from __future__ import annotations

import ast
import builtins
import json
import re
from pathlib import Path

import pytest

import lamina
from lamina.catalogue import CATALOGUE, Kind, families, kind, published, users
from lamina.catalogue.kind import Example, Variant, by_class, planned
from lamina.catalogue.page import page
from lamina.layers import AttentionSpec, ExpertsSpec, FeedForwardSpec, RMSNormSpec

KINDS = [pytest.param(one, id=one.name) for one in CATALOGUE]

# A word of each correction, and the page on which it stands.
CORRECTED = {
    "sinusoidal positional encodings": "position",
    "models like GPT-3": "gated",
    "mu sigma": "normalisation",
    "96 attention heads": "multi-head",
    "some of the weights": "dropout",
    "typical network": "feed-forward",
    "longer contexts": "rotary",
    "PaLM": "residual",
    "memory banks": "memory",
    "GPT-4 is built of": "normalisation",
    "masked language modelling": "self-attention",
    "T5": "cross-attention",
    "previous tokens only": "self-attention",
    "BERT has dropout": "dropout",
    "key-value cache is a layer": "cache",
    "size 768": "embedding",
    "reduce computation": "experts",
    "no word of where": "residual",
    "retrieved documents": "retrieval",
}


def test_there_are_sixteen_kinds_and_names_are_theirs_alone():
    assert len({one.name for one in CATALOGUE}) == len({one.title for one in CATALOGUE}) == 16
    with pytest.raises(lamina.LaminaError, match="did you mean 'rotary'"):
        kind("rotery")


@pytest.mark.parametrize("one", KINDS)
def test_a_page_has_everything(one: Kind):
    assert len(one.what) <= 63 and one.what.endswith(".")  # one line of `lamina layers`
    assert len(one.why) > 80
    assert one.symbols and one.variants and one.cost and len(one.pitfalls) >= 3
    assert one.sources and all(re.fullmatch(r"arXiv:\d{4}\.\d{4,5}", source.where) for source in one.sources)
    assert any(source.section for source in one.sources)
    assert all(len(line) <= 76 for line in one.equation.splitlines())
    assert json.dumps(page(one)).isascii()
    assert one.built == all((Path(lamina.__file__).parent / file).is_file() for file in one.files)
    assert one.built or not any(page(one)["families"] or v["built"] for v in page(one)["variants"])


@pytest.mark.parametrize("one", KINDS)
def test_an_example_is_short_and_prints_what_the_page_says(one: Kind):
    code = one.example.code
    lines = [line for line in code.splitlines() if line and not re.match(r"(import|from) ", line)]
    assert 3 <= len(lines) <= 12
    assert all(len(line) <= 76 for line in code.splitlines())
    # It stands alone: every name in it is a builtin, or imported or bound in it.
    tree = ast.parse(code)
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert used - bound <= set(dir(builtins))
    assert one.example.run() == one.example.prints
    assert one.built or "lamina" not in code  # what is not built is shown in plain PyTorch


def test_what_is_shown_is_what_is_run():
    # The body of the function that `run` calls, given to Python by itself, as a reader would.
    printed: list[str] = []
    for one in CATALOGUE:
        exec(one.example.code, {"print": lambda *words: printed.append(" ".join(map(str, words)))})
    assert printed == "".join(one.example.prints for one in CATALOGUE).splitlines()


def test_an_example_is_run_and_not_recited():
    assert Example("says another thing than it does", lambda: print(1 + 1), "3\n").run() == "2\n"


def test_variants_say_whether_they_are_built():
    assert Variant("causal", "").built and by_class("window", "", "Window").built
    assert not planned("product keys", "").built and not by_class("dream", "", "DreamSpec").built


def test_every_correction_is_placed_once():
    placed = [(each.said, one.name) for one in CATALOGUE for each in one.corrections]
    assert len(placed) == len(CORRECTED) == 19
    for words, name in CORRECTED.items():
        assert [where for said, where in placed if words in said] == [name], words
    assert all(each.fact and each.source for one in CATALOGUE for each in one.corrections)


def asked(name: str, variant: str) -> set[str]:
    found = [one for one in page(kind(name))["variants"] if one["name"] == variant]
    assert len(found) == 1, (name, variant)
    return set(found[0]["families"])


def by_hand(test) -> set[str]:
    """The families of which some published size has an attention or network for which the test holds."""
    found = set()
    for name in lamina.sizes():
        spec = lamina.spec(name)
        for stack in (spec.encoder, spec.decoder):
            for layer in () if stack is None else stack.layers:
                ops = [step.op for step in layer.steps]
                ops += [branch.op for op in ops for branch in getattr(op, "branches", ())]
                ops += [network for op in ops if isinstance(op, ExpertsSpec) for network in (op.expert, op.shared)]
                if any(test(op) for op in ops):
                    found.add(name.split("/")[0])
    return found


def test_users_are_those_whose_specs_have_it():
    attention = AttentionSpec
    assert asked("multi-head", "GQA") == by_hand(lambda op: isinstance(op, attention) and 1 < op.key_heads < op.heads)
    assert asked("multi-head", "MQA") == by_hand(lambda op: isinstance(op, attention) and op.key_heads == 1 < op.heads)
    assert asked("self-attention", "soft-cap") == by_hand(lambda op: isinstance(op, attention) and bool(op.softcap))
    assert set(page(kind("rotary"))["families"]) == by_hand(lambda op: bool(getattr(op, "rotary", None)))
    assert asked("experts", "Switch") == {"switch"}
    assert asked("experts", "shared experts") == {"deepseek-v2", "deepseek-v3", "qwen1.5-moe", "qwen2-moe"}
    assert asked("experts", "sigmoid router") == {"deepseek-v3"}
    assert asked("experts", "output masking") == {"nllb-moe"}
    assert asked("dropout", "LayerDrop") == {"m2m100"}
    assert asked("experts", "group limits") == {"deepseek-v2", "deepseek-v3"}
    swiglu = by_hand(lambda op: isinstance(op, FeedForwardSpec) and op.gated and op.act == "silu")
    assert asked("gated", "SwiGLU") == swiglu
    tied = {
        name.split("/")[0]
        for name in lamina.sizes()
        if (head := lamina.spec(name).head) is not None and head.tied
    }  # fmt: skip
    assert asked("embedding", "tied") == tied
    assert asked("embedding", "convolution stem") == {"whisper"}


def test_users_that_are_known_from_the_papers():
    assert {"gpt2", "bert", "roberta"} <= asked("position", "learned") and "llama" not in asked("position", "learned")
    assert "llama2" in asked("multi-head", "MHA") and "llama2" in asked("multi-head", "GQA")  # 7B, and 70B
    assert asked("normalisation", "RMSNorm, 1 + w") >= {"gemma", "gemma2", "gemma3"}
    assert "gpt2" in asked("residual", "pre-norm") and "bert" in asked("residual", "post-norm")
    assert "gemma2" in asked("residual", "sandwich") and "mistral" in asked("sparse", "window")
    assert {"llama3.1", "llama3.2"} <= asked("rotary", "Llama 3") and "llama3" not in asked("rotary", "Llama 3")
    assert "gpt2" not in asked("position", "none (NoPE)") and "bert" not in asked("position", "none (NoPE)")
    assert users(None) == [] and {"gpt2", "llama"} <= set(families())


def test_new_rows_ask_for_fields_that_a_spec_can_have():
    """Variants that no size needs to have: a spec that has them is told, and one that has not is not."""
    gpt = published()["gpt2/small"]
    decoder = gpt.decoder
    assert decoder is not None
    questions = {
        (one.name, variant.name): variant.used for one in CATALOGUE for variant in one.variants if variant.used
    }
    step = decoder.layers[0].steps[0]
    gated = decoder.layers[0].replace(steps=(step.replace(gate=True), *decoder.layers[0].steps[1:]))
    cases = {
        ("embedding", "factorised"): gpt.replace(embedding=gpt.embedding.replace(inner=8)),
        ("residual", "shared layers"): gpt.replace(decoder=decoder.replace(repeat=2)),
        ("residual", "gated"): gpt.replace(decoder=decoder.replace(layers=(gated,))),
        ("position", "none (NoPE)"): gpt.replace(decoder=decoder.replace(position=None)),
        ("normalisation", "RMSNorm"): gpt.replace(decoder=decoder.replace(norm=RMSNormSpec())),
    }
    for name, spec in cases.items():
        question = questions[name]
        assert question(spec) and not question(gpt), name
    narrow = gpt.replace(decoder=decoder.replace(input_width=8))
    assert questions["embedding", "factorised"](narrow)


def test_costs_are_those_of_the_model():
    found = {one.name: page(one)["cost"]["counted"] for one in CATALOGUE}
    gpt = lamina.account("gpt2/small")
    (attention,) = found["self-attention"]
    assert attention["parameters"] == 12 * 4 * (768 * 768 + 768) and attention["parts"] == 12
    assert attention["flops_per_token"] == 12 * (8 * 768 * 768 + 4 * 1024 * 768)
    assert attention["parameters_of_model"] == gpt.parameters
    assert attention["cache_bytes"] == gpt.cache_bytes == 2 * 12 * 768 * 1024 * 2
    tied, untied, stem = found["embedding"]
    assert stem["parameters"] == 384 * (3 * 80 + 1) + 384 * (3 * 384 + 1)
    assert tied["parameters"] == 50257 * 768 and untied["parameters"] == 2 * 128256 * 4096
    assert found["feed-forward"][0]["parameters"] == 12 * (2 * 768 * 3072 + 3072 + 768)
    assert found["gated"][0]["parameters"] == 32 * 3 * 4096 * 11008
    assert found["normalisation"][0]["parameters"] == (2 * 32 + 1) * 4096
    assert found["position"][0]["parameters"] == 1024 * 768
    many, few = found["multi-head"]
    assert many["parameters"] == 32 * 4 * 4096**2 and few["parameters"] == 32 * (2 * 4096**2 + 2 * 4096 * 1024)
    (cross,) = found["cross-attention"]
    assert cross["parameters"] == 12 * 4 * 768 * 768 and cross["cache_bytes"] == 12 * 2 * 768 * 512 * 2
    narrow, wide = found["sparse"]
    assert wide["cache_bytes"] == 8 * narrow["cache_bytes"]  # 32768 tokens, windows of 4096


def test_sentences_have_no_number_that_is_not_counted():
    from lamina.cli.layers import in_words

    (one,) = page(kind("self-attention"))["cost"]["counted"]
    assert in_words(one) == (
        "attention in all layers: 28,348,416 parameters (22.8 % of the model), 2,362,368 in each of 12; 94.4 MFLOP"
        " (33.1 %) for a token at the end of 1,024; 36.0 MiB of cache for 1,024 tokens in bfloat16."
    )
