"""What models begin from: the deviation of every weight is measured against what is published, and against what
transformers gives its own new models, where it follows the publications."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import lamina
from lamina.errors import LaminaError
from lamina.families import Fields, family, sizes
from lamina.layers import Draw, FanInInitialSpec, NormalInitialSpec
from lamina.model import Model, ModelSpec
from tests import families, small
from tests.train.small import experts

CUT = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
"""0.88: the deviation of what N(0, 1) has within -2 and 2."""

NORM = re.compile(r"(^|[._])(norm|pre|post|after|input_norm)\.weight$|_norm\.weight$")
RESIDUAL = re.compile(r"\.(o|down)\.weight$")
ZERO = re.compile(r"(\.bias|\.sink|\.correction|\.noise|\.gate)$")


def spread(weight: Tensor) -> float:
    """The root of the mean square, of what is not a row of padding."""
    weight = weight.detach().double().flatten(1) if weight.dim() > 1 else weight.detach().double()[None]
    rows = weight[weight.any(dim=1)]
    return float(rows.square().mean().sqrt())


def error(weight: Tensor) -> float:
    """Five standard errors of a measured deviation, as a share of it."""
    return 5 / math.sqrt(2 * weight.numel())


def small_size(name: str, **fields: Any) -> ModelSpec:
    """A published size with other fields."""
    of = family(sizes()[name])
    return of.spec(Fields({"model_type": of.model_type, **of.sizes[name], **fields}))


def check(model: Model, promised: dict[str, float], bound: float | None = None) -> None:
    """Every weight has the deviation of the first pattern that its name has in it."""
    norm = 0.0 if any(getattr(part, "plus_one", False) for _, part in model.spec.walk()) else 1.0
    for name, weight in model.named_parameters():
        if ZERO.search(name):
            assert not weight.any(), name
        elif NORM.search(name):
            assert (weight == norm).all(), name
        else:
            std = next(std for pattern, std in promised.items() if re.search(pattern, name))
            assert spread(weight) == pytest.approx(std, rel=error(weight)), (name, std)
            assert abs(float(weight.detach().mean())) < 5 * std / math.sqrt(weight.numel()), name
            if bound is not None:
                assert float(weight.detach().abs().max()) <= bound, name


GPT2 = {"n_layer": 3, "vocab_size": 701}
T5 = {"num_layers": 2, "num_decoder_layers": 2, "vocab_size": 701}
LLAMA = {"num_hidden_layers": 2, "hidden_size": 192, "intermediate_size": 320, "vocab_size": 701}
LLAMA |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 40}
ENCODER = {"num_hidden_layers": 2, "vocab_size": 701}
BART = {"vocab_size": 701, **{f"{side}_layers": 2 for side in ("encoder", "decoder")}}
EVERY = {"": 0.02}


def t5(width: int, inner: int, size: int, hidden: int, factor: float = 1.0, rest: float = 1.0) -> dict[str, float]:
    """T5's deviations; `factor` of matrices, `rest` of what is looked up."""
    return {
        "embedding": rest,
        "score_bias": rest * width**-0.5,
        r"\.q\.": factor * (width * size) ** -0.5,
        r"\.o\.": factor * inner**-0.5,
        r"\.down\.": factor * hidden**-0.5,
        "": factor * width**-0.5,
    }


def scaled(factor: float, promised: dict[str, float], *names: str) -> dict[str, float]:
    return {name: std if name in names else factor * std for name, std in promised.items()}


SWITCH = {"d_model": 96, "d_kv": 20, "num_heads": 5, "d_ff": 160, "num_experts": 4, "vocab_size": 701}
SWITCH |= {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
LOW = math.sqrt(0.1)  # Switch: a tenth of the variance
NEOX = {"num_hidden_layers": 3, "hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6}
OPT = {"num_hidden_layers": 3, "hidden_size": 192, "ffn_dim": 320, "num_attention_heads": 6, "vocab_size": 701}
DEEPSEEK = LLAMA | {"num_key_value_heads": 6, "num_hidden_layers": 4, "n_routed_experts": 8, "n_group": 4}
DEEPSEEK |= {"moe_intermediate_size": 60, "q_lora_rank": 50, "kv_lora_rank": 30, "num_experts_per_tok": 3}
EXPERTS = {"num_local_experts": 4}
PALM = {"layers": 2, "width": 192, "heads": 3, "vocabulary": 701}
GLAM = {"layers": 2, "width": 96, "hidden": 160, "heads": 5, "head_dim": 20, "experts": 4, "vocabulary": 701}
FALCON = {"num_hidden_layers": 2, "hidden_size": 192, "num_attention_heads": 6, "num_kv_heads": 2, "vocab_size": 701}
MEDIUM = {"d_model": 120, "vocab_size": 701, "num_hidden_layers": 2}
MEDIUM |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
           {"layers": 2, "attention_heads": 6, "ffn_dim": 320}.items()}  # fmt: skip

PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, float], float | None]] = {
    "gpt2/small": (GPT2, {r"\.(o|down)\.": 0.02 / math.sqrt(6), "position": 0.01, "": 0.02}, None),
    "gpt3/small": (GPT2, {r"\.(o|down)\.": 0.02 / math.sqrt(6), "position": 0.01, "": 0.02}, None),
    "bert/base-uncased": (ENCODER, {"": 0.02 * CUT}, 0.04),
    "albert/base-v2": (ENCODER, {"": 0.02 * CUT}, 0.04),
    "bigbird/base": (ENCODER, {"": 0.02 * CUT}, 0.04),
    "roberta/base": (ENCODER, EVERY, None),
    "longformer/base": (ENCODER | {"attention_window": 8}, EVERY, None),
    "t5/small": (T5, t5(512, 512, 64, 2048), None),
    "t5-v1.1/small": (T5, t5(512, 384, 64, 1024), None),
    "mt5/small": (T5, t5(512, 384, 64, 1024), None),
    "switch/base-8": (
        SWITCH,
        scaled(CUT, t5(96, 100, 20, 160, LOW), "embedding", "score_bias"),
        None,
    ),
    "palm/8b": (PALM, {"embedding": 1.0, r"\.o\.": (3 * 256) ** -0.5, "down": 768**-0.5, "": 192**-0.5}, None),
    "glam/0.1b-64e": (GLAM, {r"\.o\.": 0.1, "down": 160**-0.5, "": 96**-0.5}, None),
    "llama/7b": (LLAMA, EVERY, None),
    "mistral/7b": (LLAMA, EVERY, None),
    "qwen2.5/0.5b": (LLAMA, EVERY, None),
    "qwen3/0.6b": (LLAMA, EVERY, None),
    "mixtral/8x7b": (LLAMA | EXPERTS, EVERY, None),
    "gemma/2b": (LLAMA, EVERY, None),
    "gemma2/2b": (LLAMA, EVERY, None),
    "deepseek-v3/671b": (DEEPSEEK, {"": 0.006}, None),
    "bart/base": (BART, EVERY, None),
    "opt/125m": (OPT, {r"\.(o|down)\.": 0.006 / math.sqrt(6), "": 0.006}, None),
    "gpt-neox/20b": (
        NEOX | {"vocab_size": 701, "initializer_range": math.sqrt(2 / (5 * 192))},
        {r"\.(o|down)\.": 2 / (3 * math.sqrt(192)), "": math.sqrt(0.4 / 192)},
        None,
    ),
    "bloom/560m": ({"hidden_size": 192, "n_layer": 2, "n_head": 6, "vocab_size": 701}, EVERY, None),
    "falcon/7b": (FALCON, EVERY, None),
    "mpt/7b": ({"d_model": 192, "n_layers": 2, "n_heads": 6, "vocab_size": 701}, EVERY, None),
    "whisper/tiny": ({**MEDIUM, "decoder_start_token_id": 3, "pad_token_id": 1}, EVERY, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("seed", [0, 5])
def test_every_weight_has_the_deviation_that_is_published(name: str, seed: int):
    fields, promised, bound = PUBLISHED[name]
    check(small_size(name, **fields).build(seed=seed), promised, bound)


def first_rows() -> list[families.Row]:
    """A row of each configuration of transformers."""
    return list({row.config: row for row in reversed(families.ROWS)}.values())


def differs(name: str, spec: ModelSpec) -> float | None:
    """What our deviation is to transformers', where that differs from what is published; None: not to be compared."""
    initial = spec.initial
    if isinstance(initial, FanInInitialSpec):
        if "router" in name:
            return None  # transformers: the factor itself
        if "experts.down" in name:
            return None  # transformers: d^-0.5, which is not what it reads
        if name == "head.weight":
            return spec.width**-0.5
        return CUT if initial.truncated and not re.search("embedding|score_bias", name) else 1.0
    if name == "decoder.position.weight" and initial.position is not None:
        return initial.position / initial.std
    ratio = CUT if initial.truncated else 1.0
    gpt2 = initial.position is not None  # which transformers gives the depth too
    return ratio * (initial.residual / initial.std if initial.residual and RESIDUAL.search(name) and not gpt2 else 1.0)


@pytest.mark.parametrize("row", first_rows(), ids=str)
def test_new_models_are_as_those_of_transformers_but_for_what_is_published(row: families.Row, tmp_path: Path):
    torch.manual_seed(0)
    config = getattr(transformers, row.config)(**row.fields)
    getattr(transformers, row.model)._from_config(config, **row.more).save_pretrained(tmp_path)
    theirs = lamina.load(tmp_path)
    ours, compared = theirs.spec.build(seed=1), 0
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if row.config == "WhisperConfig" and name == "encoder.position.weight":
            continue  # sines in transformers
        if ZERO.search(name) or NORM.search(name):
            assert torch.equal(one, other), name
        elif (ratio := differs(name, ours.spec)) is not None:
            tolerance = math.hypot(error(one), error(other))
            assert spread(one) / spread(other) == pytest.approx(ratio, rel=tolerance), name
            compared += 1
    assert compared > 5


LANGUAGE = [row for row in first_rows() if row.config not in ("T5Config", "MT5Config", "SwitchTransformersConfig")]


@pytest.mark.parametrize("row", LANGUAGE, ids=str)
def test_a_new_language_model_knows_nothing(row: families.Row):
    """E22: its loss is within 2 % of ln V, whatever the text."""
    config = getattr(transformers, row.config)(**row.fields).to_dict()
    config["architectures"] = [row.model]
    model_type = config["model_type"]
    model = family(model_type).spec(Fields(config)).build(seed=2).eval()
    if model.head is None:
        pytest.skip("no language head")
    ids = families.tokens(8, families.LENGTH, seed=4)
    more: dict[str, Any] = {"input_ids": ids}
    if model.spec.two_stacks:
        more = {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    if model.spec.stem is not None:
        more = {"input_features": torch.randn(8, model.spec.stem.bins, 22), "decoder_input_ids": ids}
    with torch.no_grad():
        logits = model(**more).logits
    assert logits is not None
    target = families.tokens(8, families.LENGTH, seed=5)
    loss = float(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
    assert loss == pytest.approx(math.log(logits.shape[-1]), rel=0.02)


def test_experts_add_to_the_residual_stream_what_the_network_in_their_place_would():
    """No published family has experts and a smaller deviation of what is added; their last matrices would have it."""
    model = experts().replace(initial=NormalInitialSpec(std=0.02, residual=0.002)).build(seed=3)
    found = {name: weight for name, weight in model.named_parameters() if ".experts." in name}
    assert len(found) == 6
    for name, weight in found.items():
        std = 0.002 if name.endswith("down.weight") else 0.02
        assert spread(weight) == pytest.approx(std, rel=error(weight)), name


@pytest.mark.parametrize(
    "name", ["gpt2/small", "t5/small", "switch/base-8", "opt/125m", "gpt-neox/20b", "bert/base-uncased"]
)
def test_the_deviation_is_read_from_a_configuration_and_written_back(name: str):
    of = family(sizes()[name])
    key = next(k for k in ("initializer_range", "initializer_factor", "init_std") if k in of.config(small_size(name)))
    spec = small_size(name, **{key: 0.123})
    said = of.config(spec)
    assert said[key] == 0.123 and of.spec(Fields(said)) == spec
    with pytest.raises(LaminaError, match=f"{key} is -0.5; a standard deviation is at least 0"):
        small_size(name, **{key: -0.5})


def test_a_spec_of_before_is_refused_by_the_name_of_what_it_lacks():
    data = json.loads(small.decoder(small.MIXED).to_json())
    del data["initial"]
    with pytest.raises(LaminaError, match="ModelSpec lacks the field 'initial'"):
        ModelSpec.from_json(json.dumps(data))


def test_initial_values_keep_no_model_from_being_written(tmp_path: Path):
    spec = families_llama().replace(initial=FanInInitialSpec(factor=0.5))
    lamina.save(spec.build(), tmp_path / "saved")
    assert lamina.spec(tmp_path / "saved").initial == NormalInitialSpec()
    with pytest.raises(LaminaError, match="NormalInitialSpec.std is -1.0; a deviation is at least 0"):
        NormalInitialSpec(std=-1)


def families_llama() -> ModelSpec:
    return small_size("llama/7b", **LLAMA)


def test_a_truncated_weight_in_bfloat16_is_cut_and_drawn_from_the_seed():
    weight = torch.empty(300, 200, dtype=torch.bfloat16)
    Draw(torch.Generator().manual_seed(0)).normal(weight, 0.5, truncated=True)
    assert spread(weight) == pytest.approx(0.5 * CUT, rel=error(weight)) and float(weight.abs().max()) <= 1.0
    again = torch.empty_like(weight)
    Draw(torch.Generator().manual_seed(0)).normal(again, 0.5, truncated=True)
    assert torch.equal(weight, again)
