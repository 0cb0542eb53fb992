"""Norms that are folded: the same function, and what is written to the residual stream has no mean any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import LayerNormSpec, RMSNormSpec
from lamina.model import Model
from lamina.patterns import Causal
from lamina.surgery import apply, read_plan
from tests import small, tiny
from tests.families import FALCON_40B, FALCON_RW, GPTJ, MPT, NEOX, OPT
from tests.surgery.test_operations import ids_of, operated, run, works

PRE = {
    "gpt2": tiny.GPT2,
    "gpt2-untied": tiny.GPT2 | {"tie_word_embeddings": False},
    "opt": OPT | {"model_type": "opt"},  # rows before position 0
    "opt-plain": OPT | {"model_type": "opt", "enable_bias": False, "layer_norm_elementwise_affine": False},
    "gptj": GPTJ | {"model_type": "gptj"},  # one norm for both branches, attention without biases, a head with one
    "gpt_neox": NEOX | {"model_type": "gpt_neox"},  # a norm for each branch
    "falcon-rw": FALCON_RW | {"model_type": "falcon"},
    "falcon-40b": FALCON_40B | {"model_type": "falcon"},  # no biases but those of norms, fewer key heads
    "mpt": MPT | {"model_type": "mpt"},  # norms without biases
}
RMS = {"llama": tiny.LLAMA, "t5": tiny.T5, "gemma": tiny.LLAMA | {"model_type": "gemma", "head_dim": 8}}


def shaken(config: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Model:
    model = tiny.spec(config).build(dtype=dtype).eval()
    small.shake(model, seed)
    return model


@pytest.mark.parametrize("shape", PRE)
@pytest.mark.parametrize("op", ["rms_norm", "fold_norms"])
def test_it_is_the_same_function(shape: str, op: str):
    if (shape, op) == ("opt-plain", "fold_norms"):
        with pytest.raises(LaminaError, match="no norms with a weight before its layers"):
            operated(shaken(PRE[shape]), {"op": op})
        return
    for seed in (0, 1):
        base = shaken(PRE[shape], seed=seed)
        ids = ids_of(base)
        mask = torch.ones_like(ids)
        mask[0, :3], mask[1, -2:] = 0, 0
        model, new = operated(base, {"op": op})
        assert not new
        for given in (None, mask):
            rows = torch.ones_like(ids, dtype=torch.bool) if given is None else mask.bool()
            expected, got = run(base, ids, given)[rows], run(model, ids, given)[rows]
            assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()
    norms = [type(part) for _, part in model.spec.walk() if isinstance(part, LayerNormSpec | RMSNormSpec)]
    assert set(norms) == ({RMSNormSpec} if op == "rms_norm" else {LayerNormSpec})
    norm_weights = [one for name, one in model.named_parameters() if name.endswith(".pre.weight")]
    if op == "fold_norms":
        assert norm_weights and all(bool((one == 1).all()) for one in norm_weights)
        assert not any(bool(one.any()) for name, one in model.named_parameters() if name.endswith(".pre.bias"))


@pytest.mark.parametrize("shape", ["gpt2", "gpt_neox"])
def test_the_stream_has_no_mean(shape: str):
    base = shaken(PRE[shape])
    model, _ = operated(base, {"op": "rms_norm"})
    for one, centred in ((base, False), (model, True)):
        record = lamina.Record("*.output")
        with torch.no_grad():
            one(ids_of(base), record=record)
        means = torch.stack([value.mean(-1).abs().max() for value in record.values.values()])
        assert bool((means < 1e-12).all()) == centred


@pytest.mark.parametrize("op", ["rms_norm", "fold_norms"])
def test_in_float32_and_all_that_is_done_with_a_model(op: str, tmp_path: Path):
    base = tiny.model(tiny.GPT2, scale=2.0)
    ids = ids_of(base)
    done = apply(read_plan([{"op": op}]), base.spec, dict(base.named_parameters()))
    assert done.kept == "exact" and done.undo is None and not done.new
    model, _ = operated(base, {"op": op})
    assert (run(model, ids) - run(base, ids)).abs().max() <= 1e-6 * run(base, ids).abs().max()
    works(model, ids, tmp_path)


@pytest.mark.parametrize("shape", RMS)
def test_the_weight_of_rms_norms(shape: str, tmp_path: Path):
    """The spec stays, and so does the layout."""
    base = shaken(RMS[shape])
    ids = ids_of(base)
    model, _ = operated(base, {"op": "fold_norms"})
    expected = run(base, ids)
    assert (run(model, ids) - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert model.spec == base.spec
    one = shape != "gemma"  # whose factor is 1 + weight
    assert all(bool((w == one).all()) for name, w in model.named_parameters() if name.endswith(".pre.weight"))
    lamina.save(model, tmp_path / "saved")


def test_what_else_reads_the_last_norm_keeps_its_bias():
    """A model without a head gives what the last norm made, and it stays what it was."""
    base = shaken(tiny.GPT2 | {"architectures": ["GPT2Model"]})
    model, _ = operated(base, {"op": "rms_norm"})
    torch.testing.assert_close(run(model, ids_of(base)), run(base, ids_of(base)), rtol=0, atol=1e-10)
    assert isinstance(model.spec.decoder.norm, LayerNormSpec)
    assert isinstance(model.spec.decoder.layers[0].steps[0].pre, RMSNormSpec)


@pytest.mark.parametrize(
    ("config", "plan", "said"),
    [
        (tiny.BERT, {"op": "rms_norm"}, "encoder.input_norm writes to the residual stream"),
        (tiny.LLAMA, {"op": "rms_norm"}, "decoder.norm is RMSNormSpec; a LayerNormSpec was expected"),
        (tiny.T5, {"op": "rms_norm"}, "encoder.norm is RMSNormSpec"),
        (tiny.BERT, {"op": "fold_norms"}, "no norms with a weight before its layers"),
        (
            OPT | {"model_type": "opt", "_remove_final_layer_norm": True},
            {"op": "rms_norm"},
            "decoder.norm is None; a LayerNormSpec was expected",
        ),
        (
            tiny.LLAMA | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
            {"op": "fold_norms"},
            "feedforward.pre cannot be folded into ExpertsSpec at decoder.layers.0.feedforward.op",
        ),
    ],
)
def test_what_cannot_be_done(config: dict[str, Any], plan: dict[str, Any], said: str):
    with pytest.raises((LaminaError, UnsupportedError), match=said):
        operated(tiny.model(config), plan)


def test_a_post_norm_is_refused():
    spec = tiny.spec(tiny.GPT2)
    layers = tuple(
        layer.replace(steps=tuple(step.replace(after=LayerNormSpec()) for step in layer.steps))
        for layer in spec.decoder.layers
    )
    model = small.build(spec.replace(decoder=spec.decoder.replace(layers=layers)))
    with pytest.raises(UnsupportedError, match=r"decoder.layers.0.attention.after .* this is for pre-norm models"):
        operated(model, {"op": "rms_norm"})


def test_what_has_no_weights_to_centre_is_refused():
    with pytest.raises(UnsupportedError, match="decoder.position is SinusoidalPositionSpec"):
        operated(small.build(small.decoder([Causal()], "sinusoidal")), {"op": "rms_norm"})


@pytest.mark.parametrize("op", ["rms_norm", "fold_norms"])
def test_a_norm_of_a_norm_is_refused(op: str):
    spec = tiny.spec(GPTJ | {"model_type": "gptj"})
    layers = []
    for layer in spec.decoder.layers:
        step = layer.steps[0]
        branches = tuple(one.replace(pre=LayerNormSpec()) for one in step.op.branches)
        layers.append(layer.replace(steps=(step.replace(op=step.op.replace(branches=branches)),)))
    model = small.build(spec.replace(decoder=spec.decoder.replace(layers=tuple(layers))))
    with pytest.raises(UnsupportedError, match="the norm of its branch 'attention' reads another norm"):
        operated(model, {"op": op})
