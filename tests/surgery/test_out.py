"""Out again: what an operation made is opened by transformers as the nearest class, and writes the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina import editing, exporting
from lamina.packaged import packaged_path
from tests import tiny

transformers = pytest.importorskip("transformers")

PLANS: dict[str, tuple[str, list[dict[str, Any]]]] = {  # the class that opens it, and what was done
    "experts": ("MixtralForCausalLM", [{"op": "experts", "experts": 4, "chosen": 2}]),
    "a window": ("MistralForCausalLM", [{"op": "window", "back": 12}]),
    "another in each layer": (
        "LaminaForCausalLM",
        [
            {"op": "key_heads", "heads": 1, "by": "similar", "at": ("decoder.layers.0",)},
            {"op": "window", "back": 12, "at": ("decoder.layers.1",)},
            {"op": "experts", "experts": 3, "chosen": 1, "at": ("decoder.layers.1",)},
        ],
    ),
    "first tokens beside a window": ("LaminaForCausalLM", [{"op": "window", "back": 8, "sinks": 3}]),
}


def written(source: Path, plan: list[dict[str, Any]], folder: Path) -> Any:
    """What transformers makes of the source after the plan, in the layout that is chosen by itself."""
    opened, done = editing.planned(source, plan)
    editing.write(opened, done, folder, exporting.layout(done.spec, opened.origin.family))
    made = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, attn_implementation="eager", dtype=torch.float32
    )
    return made.eval()


@torch.no_grad()
def same(ours: lamina.Model, theirs: Any, ids: torch.Tensor, count: int) -> float:
    """The largest difference of the logits as a part of the largest one; the tokens are the same."""
    expected, got = ours(ids).logits, theirs(ids).logits
    more: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count}
    tokens = lamina.generate(ours, ids, **more)[:, -count:]
    told = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **more)
    assert torch.equal(told[:, ids.shape[1] :], tokens)
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", PLANS)
def test_a_tiny_model(name: str, tmp_path: Path):
    kind, plan = PLANS[name]
    lamina.save(tiny.model(), tmp_path / "source")
    tiny.tokenizer().save(tmp_path / "source")
    theirs = written(tmp_path / "source", plan, tmp_path / "out")
    assert type(theirs).__name__ == kind
    ids = torch.randint(250, (2, 21), generator=torch.Generator().manual_seed(0))
    assert same(lamina.load(tmp_path / "out"), theirs, ids, 9) <= 1e-5
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert words("the cat")["input_ids"] == lamina.tokenizer(tmp_path / "out").encode("the cat")


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_smollm2(name: str, tmp_path: Path):
    """A window of 12 and of 8, which the prompt is longer than; experts in one layer of many."""
    source = packaged_path("smollm2-135m")
    if source is None:
        pytest.skip("the packaged smollm2-135m is not on this machine: lamina fetch smollm2-135m")
    kind, plan = PLANS[name]
    theirs = written(source, plan, tmp_path / "out")
    assert type(theirs).__name__ == kind
    text = "The first book that was ever printed in this country was a translation, and its printer"
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = torch.tensor([words(text)["input_ids"]])
    assert ids.shape[1] > 12
    difference = same(lamina.load(tmp_path / "out", dtype="float32"), theirs, ids, 12)
    assert difference <= 1e-4
    print(f"{name}: {kind}, largest difference {difference:.1e} of the largest logit")
