"""Families with experts: published counts, active parameters, losses beside transformers', and what files may say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.errors import CheckpointError, UnsupportedError
from lamina.families import Fields, family
from lamina.layers import BucketBiasSpec, CapacitySpec, ExpertsSpec, RouterLossSpec, TopKSpec
from lamina.specs import edit
from lamina.words import say
from tests.families import Case, close, row

# Parameters and those that a token uses: from the shapes of the official checkpoints and the papers. DeepSeek-V3's
# owner counts 671,026,404,352 and leaves out the 58 x 256 numbers that correct the choice.
COUNTS = {
    "mixtral/8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral/8x22b": (140_620_634_112, 39_152_031_744),
    "mixtral/8x22b-v0.3": (140_630_071_296, 39_161_468_928),
    "qwen1.5-moe/a2.7b": (14_315_784_192, 2_689_173_504),
    "qwen2-moe/57b-a14b": (57_408_658_944, 14_249_270_784),
    "qwen3-moe/30b-a3b": (30_532_122_624, 3_353_032_704),
    "qwen3-moe/235b-a22b": (235_093_634_560, 22_190_763_520),
    "deepseek-v2/lite": (15_706_484_224, 2_661_150_208),
    "deepseek-v2/236b": (235_741_434_880, 21_375_800_320),
    "deepseek-v3/671b": (671_026_404_352 + 58 * 256, 37_552_282_624 + 58 * 256),
    "nllb-moe/54b": (54_500_569_088, 3_750_785_024),
    "switch/base-8": (619_339_008, 222_977_280),
    "switch/base-16": (1_072_397_568, 223_051_008),
    "switch/base-32": (1_978_514_688, 223_198_464),
    "switch/base-64": (3_790_748_928, 223_493_376),
    "switch/base-128": (7_415_217_408, 224_083_200),
    "switch/base-256": (14_664_154_368, 225_262_848),
    "switch/large-128": (26_309_291_008, 740_813_824),
    "switch/xxl-128": (394_675_073_024, 11_147_915_264),
    "switch/c-2048": (1_571_327_875_360, 1_747_228_960),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes_have_their_published_parameters_and_active_ones(name: str):
    found = lamina.account(name, context=8)
    assert (found.parameters, found.active_parameters) == COUNTS[name]


# Parameters and active ones in billions, as table 4 of the paper rounds them, where they fit a vocabulary.
GLAM = {
    "glam/1.7b-64e": (27, 1.879), "glam/1.7b-128e": (53, 1.881), "glam/8b": (8.7, 8.7), "glam/8b-64e": (143, 9.8),
    "glam/137b": (137, 137), "glam/64b-64e": (1162, 96.6),
}  # fmt: skip


@pytest.mark.parametrize("name", GLAM)
def test_glam_is_within_a_hundredth_of_its_paper(name: str):
    found = lamina.account(name, context=8)
    total, active = GLAM[name]
    assert found.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert found.active_parameters / 1e9 == pytest.approx(active, rel=0.01)
    spec = lamina.spec(name)
    assert spec.decoder is not None
    size, depth, width = family("glam").sizes[name], len(spec.decoder.layers), spec.width
    sparse = depth // 2 if "experts" in size else 0
    count, hidden = size.get("experts", 0), size["hidden"]
    closed = spec.embedding.vocabulary * width + depth * 4 * width * size["heads"] * 128
    closed += (depth - sparse) * 3 * width * hidden + sparse * (2 * count * width * hidden + width * count)
    assert found.parameters == closed + (2 * depth + 1) * width + 32 * size["heads"]  # norms and position biases


def test_glam_in_words():
    spec = lamina.spec("glam/64b-64e")
    assert spec.decoder is not None
    there = [isinstance(layer.steps[1].op, ExpertsSpec) for layer in spec.decoder.layers]
    assert there == [False, True] * 32
    assert say(spec.decoder.layers[0].steps[1].op) == "GEGLU 32768"
    assert say(spec.decoder.layers[1].steps[1].op) == (
        "2 of 64 experts, softmax normalised, each GELU 32768, capacity 2 in training, dropless in evaluation,"
        " balance loss 0.01"
    )
    assert experts(spec).losses == RouterLossSpec(balance=0.01, choices="first")
    bias = spec.decoder.score_bias
    assert isinstance(bias, BucketBiasSpec) and not bias.bidirectional  # all buckets are for what came before
    tiny = {"layers": 3, "width": 20, "hidden": 28, "heads": 2, "head_dim": 8, "experts": 4, "vocabulary": 40}
    assert lamina.verify(family("glam").spec(Fields(tiny)).build()).passed


@pytest.mark.parametrize("name", ["switch/base-8", "switch/large-128", "switch/c-2048"])
def test_where_the_experts_of_switch_are(name: str):
    spec = lamina.spec(name)
    for stack in (spec.encoder, spec.decoder):
        assert stack is not None
        there = [isinstance(layer.steps[-1].op, ExpertsSpec) for layer in stack.layers]
        assert there == [name.endswith("2048") or depth % 2 == 1 for depth in range(len(there))]


def test_what_the_published_routers_are_in_words():
    said = {name: next(say(part) for _, part in lamina.spec(name).walk() if isinstance(part, ExpertsSpec)) for name in (
        "switch/base-8", "mixtral/8x7b", "qwen1.5-moe/a2.7b", "deepseek-v3/671b")}  # fmt: skip
    assert said == {
        "switch/base-8": "1 of 8 experts, softmax, jitter 0.01, each ReLU 3072, dropout 0.1, capacity 64 places in"
        " training, dropless in evaluation, balance loss 0.001 and z loss 0.001",
        "mixtral/8x7b": "2 of 8 experts, softmax normalised, each SwiGLU 14336, balance loss 0.02",
        "qwen1.5-moe/a2.7b": "4 of 60 experts, softmax, each SwiGLU 1408, gated shared SwiGLU 5632, balance loss 0.001",
        "deepseek-v3/671b": "8 of 256 experts, sigmoid normalised, times 2.5, in 4 of 8 groups, corrected choice, each"
        " SwiGLU 2048, shared SwiGLU 2048, balance loss 0.001",
    }


# Losses


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe-dense", "qwen3-moe"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_loss_and_its_gradient_are_those_of_transformers(name: str, padded: bool, tmp_path: Path):
    case = Case(row(name), tmp_path)
    theirs, ours = copy.deepcopy(case.theirs), copy.deepcopy(case.ours)
    mask = torch.ones_like(case.ids)
    if padded:
        mask[1, 8:] = 0
    out = theirs(case.ids, attention_mask=mask, output_router_logits=True)
    mine = ours(case.ids, mask)
    assert set(mine.losses) == {"decoder.balance"}
    coefficient = theirs.config.router_aux_loss_coef
    torch.testing.assert_close(mine.losses["decoder.balance"], coefficient * out.aux_loss)
    (coefficient * out.aux_loss).backward()
    mine.losses["decoder.balance"].backward()
    depth = len(theirs.model.layers) - 1
    gradient = ours.get_parameter(f"decoder.layers.{depth}.feedforward.op.router.weight").grad
    assert gradient is not None and close(1000 * gradient, 1000 * theirs.model.layers[depth].mlp.gate.weight.grad, 1e-5)


@pytest.mark.parametrize("each_row", [True, False])
def test_the_balance_loss_of_deepseek_is_the_paper_s(each_row: bool, tmp_path: Path):
    """arXiv:2405.04434, equations 23 to 25, from what transformers' routers choose: of each text, or of the batch."""
    case = Case(row("deepseek2-experts"), tmp_path)
    path = case.source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"aux_loss_alpha": 0.3, "seq_aux": each_row}))
    theirs, gates = copy.deepcopy(case.theirs), []
    router = theirs.model.layers[-1].mlp.gate
    router.register_forward_hook(lambda module, given, out: gates.append((out[0].detach().softmax(-1), out[2])))
    theirs(case.ids)
    batch, length = case.ids.shape
    ((scores, chosen),) = gates
    texts = [range(b * length, (b + 1) * length) for b in range(batch)] if each_row else [range(batch * length)]
    experts, k = scores.shape[-1], chosen.shape[-1]
    expected = 0.0
    for places in texts:
        for e in range(experts):
            f = experts / (k * len(places)) * sum(int((chosen[t] == e).sum()) for t in places)
            expected += f * float(scores[list(places), e].mean()) / len(texts)
    found = lamina.load(case.source)(case.ids).losses
    depth = len(theirs.model.layers) - 1
    assert k > 1 and found[f"decoder.layers.{depth}.feedforward.op.balance"].item() == pytest.approx(0.3 * expected)


def test_the_losses_of_switch_are_the_paper_s_and_those_of_transformers_where_asked_for(tmp_path: Path):
    """Transformers takes all layers of a stack and each row by itself; the paper each layer, and the whole batch."""
    case = Case(row("switch"), tmp_path)
    out = case.theirs_on(case.ids, output_router_logits=True)
    mine = case.run(case.ids)
    names = {f"{side}.layers.1.feedforward.op.{kind}" for side in ("encoder", "decoder") for kind in ("balance", "z")}
    assert set(mine.losses) == names
    for side, z in (("encoder", out.encoder_z_loss), ("decoder", out.decoder_z_loss)):
        torch.testing.assert_close(mine.losses[f"{side}.layers.1.feedforward.op.z"], 0.001 * z)  # there is one layer
    case = Case(row("switch-untied"), tmp_path)
    out = case.theirs_on(case.ids[:, :12])
    losses = RouterLossSpec(balance=0.01, z=0.002, pooled=True, each_row=True)
    spec = edit(case.ours.spec, ExpertsSpec, lambda path, part: part.replace(losses=losses))
    model = spec.build()
    model.load_state_dict(case.ours.state_dict())
    model.eval()
    mine = case.run(case.ids, model=model).losses
    theirs = copy.deepcopy(case.theirs)
    theirs.encoder.config.encoder_sparse_step = theirs.decoder.config.decoder_sparse_step = 2  # 1 is taken for none
    out = case.theirs_on(case.ids, theirs, output_router_logits=True)
    torch.testing.assert_close(mine["encoder.balance"], 0.01 * out.encoder_aux_loss)
    torch.testing.assert_close(mine["decoder.balance"], 0.01 * out.decoder_aux_loss)
    torch.testing.assert_close(mine["encoder.z"], 0.002 * out.encoder_z_loss)
    torch.testing.assert_close(mine["decoder.z"], 0.002 * out.decoder_z_loss)


# What files may say


def read(model_type: str, **said: Any) -> lamina.ModelSpec:
    tiny = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny |= {"intermediate_size": 40, "vocab_size": 50, "num_layers": 4, "num_decoder_layers": 3, "d_ff": 40}
    tiny |= {"num_experts_per_tok": 2}
    return family(model_type).spec(Fields(tiny | said))


def experts(spec: lamina.ModelSpec) -> ExpertsSpec:
    return next(part for _, part in spec.walk() if isinstance(part, ExpertsSpec))


@pytest.mark.parametrize("said", [{"num_experts": 6}, {"num_local_experts": 6}])
def test_either_name_of_the_number_of_experts_is_read(said: dict[str, int]):
    assert experts(read("qwen3_moe", **said)).router.experts == 6


def test_which_layers_of_qwen_have_experts():
    def there(**said: Any) -> list[int]:
        stack = read("qwen2_moe", num_experts=6, **said).decoder
        assert stack is not None
        return [i for i, layer in enumerate(stack.layers) if isinstance(layer.steps[1].op, ExpertsSpec)]

    assert there() == [0, 1, 2, 3]
    assert there(decoder_sparse_step=2) == [1, 3]
    assert there(decoder_sparse_step=2, mlp_only_layers=[3]) == [1]


def test_windows_of_qwen2_without_layer_types():
    def windows(**said: Any) -> list[Any]:
        from lamina.families.llama import windows_of

        return windows_of(read("qwen2_moe", num_experts=6, **said))

    used = {"use_sliding_window": True, "sliding_window": 7}
    assert windows() == [None] * 4
    assert windows(**used) == [7, None, 7, None]
    assert windows(**used, max_window_layers=2) == [7, None, None, None]


@pytest.mark.parametrize(
    ("model_type", "said", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; only 0"),
        ("mixtral", {"num_experts_per_tok": 9}, "chosen=9 must be 1 to experts=8"),
        ("qwen2_moe", {"mlp_only_layers": "all"}, "mlp_only_layers is 'all'"),
        ("switch_transformers", {"router_dtype": "bfloat16"}, "router_dtype is 'bfloat16'"),
        ("switch_transformers", {"num_sparse_encoder_layers": 5}, "num_sparse_encoder_layers is 5; the encoder has 4"),
        ("switch_transformers", {"dense_act_fn": "gelo"}, "feed_forward_proj is 'gelo'"),
    ],
)
def test_what_is_not_built_is_refused_by_name(model_type: str, said: dict[str, Any], message: str):
    with pytest.raises(lamina.LaminaError, match=message):
        read(model_type, **said)


@pytest.mark.parametrize("layers", [1, 2, 5, 7, 12])
def test_where_switch_has_experts_can_be_written_wherever_it_can_be_read(layers: int):
    for count in range(layers + 1):
        spec = read("switch_transformers", num_layers=layers, num_decoder_layers=layers, **{
            f"num_sparse_{side}_layers": count for side in ("encoder", "decoder")})  # fmt: skip
        said = family("switch_transformers").config
        assert said is not None
        assert family("switch_transformers").spec(Fields(said(spec))) == spec


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral", lambda op: op.replace(capacity=CapacitySpec()), "capacity is CapacitySpec"),
        ("mixtral", lambda op: op.replace(router=op.router.replace(noise=True)), "router.noise is True"),
        ("switch", lambda op: op.replace(capacity=op.capacity.replace(evaluation=64.0)), "capacity.evaluation is 64.0"),
        (
            "deepseek3-experts",
            lambda op: op.replace(shared=op.shared.replace(hidden=23)),
            "shared.hidden is 23, .* can only say 22",
        ),
    ],
)
def test_a_router_that_the_layout_cannot_say_is_named_and_the_native_one_keeps_it(
    name: str, change: Any, message: str, tmp_path: Path
):
    spec = edit(Case(row(name), tmp_path).ours.spec, ExpertsSpec, lambda path, part: change(part))
    model = spec.build()
    with pytest.raises(UnsupportedError, match=message):
        lamina.save(model, tmp_path / "out")
    lamina.save(model, tmp_path / "out", format="native")
    assert lamina.load(tmp_path / "out").spec == spec


def test_a_file_that_lacks_an_expert_says_which(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    case = Case(row("mixtral"), tmp_path)
    path = case.source / "model.safetensors"
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    save_file({n: tensor for n, tensor in load_file(path).items() if n != name}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 missing tensor: {name}"):
        lamina.load(case.source)


def test_a_layer_that_predicts_a_second_token_is_kept_and_written_back(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    case = Case(row("deepseek3-experts"), tmp_path)
    path = case.source / "model.safetensors"
    extra = {"model.layers.61.eh_proj.weight": torch.arange(6.0).view(2, 3)}
    save_file(load_file(path) | extra, path, {"format": "pt"})
    lamina.save(lamina.load(case.source), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == path.read_bytes()


def test_the_correction_of_a_file_learns_by_no_gradient(tmp_path: Path):
    case = Case(row("deepseek3-experts"), tmp_path)
    corrections = [p for name, p in case.ours.named_parameters() if name.endswith("correction")]
    assert len(corrections) == 2 and not any(p.requires_grad for p in corrections)
    assert float(corrections[0].abs().max()) > 0
    assert isinstance(experts(case.ours.spec).router, TopKSpec)
