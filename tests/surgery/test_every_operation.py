"""Every operation of a plan on a model of every shape: what comes out works, or the refusal says why."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import lamina
from lamina.adapters import LoRASpec, attach
from lamina.adapting import write_adapter
from lamina.editing import others
from lamina.errors import LaminaError
from lamina.surgery import OPERATIONS, Outside, apply, build, read_plan
from tests import tiny
from tests.surgery.test_operations import SHAPES, ids_of, works

HERE, SAME, LORA, ENCODER = "HERE", "SAME", "LORA", "ENCODER"
"""In plans: the model's own folder, another one of its spec, an adapter for it, and the folder of a BERT."""


class Row(NamedTuple):
    """How an operation is tried."""

    fields: dict[str, Any]
    per: dict[str, dict[str, Any]] = {}  # by shape, other fields
    refused: dict[str, str] = {}  # by shape, what the error says
    after: tuple[dict[str, Any], ...] = ()  # operations before it
    verified: tuple[str, ...] = ()  # shapes that are verified: where no other test does it with this operation


BEHIND = {"t5": {"stack": "decoder"}}
SPLIT = "belongs to its heads, which cannot change places"
CAUSAL = "has the pattern Causal; Longformer takes the place of Everything"
UNTURNED = "no attention here has rotary positions"
LOOKS_AHEAD = r"a memory holds what came before, and attention.pattern \(Everything\) looks ahead"
ALONE = "cross_attention is for a decoder by itself"
UNRETRIEVING = "retrofit is for a decoder by itself that does not retrieve yet"
NEIGHBOURS = {"width": 16, "heads": 2, "head_dim": 8, "hidden": 24, "layers": 1}
TABLE: dict[str, Row] = {
    "key_heads": Row({"heads": 1}),
    "heads": Row({"keep": [1, 0]}, {"llama": {"keep": [2, 3]}}, {"t5": SPLIT}, verified=("gpt2",)),
    "latent": Row({"rank": 8}),
    "multi_head": Row({}, after=({"op": "latent", "rank": 8},)),
    "longformer": Row({"window": 4}, refused={"gpt2": CAUSAL, "llama": CAUSAL, "t5": "attention has no scale"}),
    "window": Row({"back": 5, "sinks": 1}),
    "experts": Row({"experts": 3}),
    "dense": Row({}, after=({"op": "experts", "experts": 3},)),
    "widen": Row({"hidden": 200}),
    "prune": Row({"hidden": 40}),
    "gated": Row({}, refused={"llama": "decoder.layers.0.feedforward has a gate already"}),
    "plain": Row({}, refused=dict.fromkeys(("gpt2", "bert", "t5"), "layers.0.feedforward has no gate")),
    "layers": Row({"order": [1, 0, 1]}, BEHIND),
    "new_layers": Row({"after": [0]}, BEHIND),
    "rope": Row({"base": 500.0}, refused=dict.fromkeys(("gpt2", "bert", "t5"), UNTURNED)),
    "rotary": Row({}, BEHIND, dict.fromkeys(("llama", "t5"), "decoder adds no positions to its input")),
    "positions": Row({"size": 70}, refused=dict.fromkeys(("llama", "t5"), "no learned positions")),
    "vocabulary": Row({"multiple": 64}),
    "tokenizer": Row({"folder": HERE, "old": HERE}, verified=("llama",)),
    "head": Row({"tied": False}, refused={"llama": "tied is false, and so the head is already"}),
    "rms_norm": Row(
        {},
        refused={
            "llama": "decoder.norm is RMSNormSpec; a LayerNormSpec was expected",
            "t5": "encoder.norm is RMSNormSpec; a LayerNormSpec was expected",
            "bert": "encoder.input_norm writes to the residual stream",
        },
    ),
    "fold_norms": Row({}, refused={"bert": "no norms with a weight before its layers"}),
    "restore": Row({}, after=({"op": "window", "back": 5},), verified=("gpt2",)),
    "step": Row({"name": "adapter", "part": {"kind": "FeedForwardSpec", "hidden": 5, "gated": False}}),
    "memory": Row(
        {"memory": {"kind": "InfiniSpec", "length": 4, "gate": "zero"}},
        {"t5": {"at": ["decoder"]}},
        {"bert": LOOKS_AHEAD},
    ),
    "retrieval": Row(
        {"chunk": 4, "encoder": NEIGHBOURS, "at": ["decoder"]},
        {"bert": {"at": None}},
        {"bert": UNRETRIEVING, "t5": UNRETRIEVING},
    ),
    "cross_attention": Row({"encoder": ENCODER, "start": 0}, refused={"bert": ALONE, "t5": ALONE}),
    "reading": Row(
        {"to": "bidirectional"},
        {"bert": {"to": "causal"}},
        {"t5": "reading bidirectional is for decoders by themselves"},
    ),
    "merge": Row({"models": [{}, {"source": SAME}]}),
    "mixture": Row({"models": [SAME]}),
    "adapter": Row({"source": LORA}, verified=("gpt2",)),
}


@cache
def folders(shape: str) -> dict[str, str]:
    """What plans name, for a shape: written once."""
    root = Path(tempfile.mkdtemp(prefix=f"lamina-{shape}-"))
    atexit.register(shutil.rmtree, root)
    words = tiny.words() if shape == "bert" else tiny.tokenizer()
    for seed, name, config in ((0, HERE, SHAPES[shape]), (1, SAME, SHAPES[shape]), (0, ENCODER, tiny.BERT)):
        lamina.save(tiny.model(config, seed, scale=1.0), root / name)
    words.save(root / HERE)
    here, same, encoder = (root / name for name in (HERE, SAME, ENCODER))
    model = lamina.load(here)
    draw = torch.Generator().manual_seed(0)
    for _, factor in attach(model, LoRASpec(rank=3)):
        with torch.no_grad():
            factor.normal_(generator=draw)
    write_adapter(model, root / LORA)
    return {HERE: str(here), SAME: str(same), LORA: str(root / LORA), ENCODER: str(encoder)}


def said(field: Any, shape: str) -> Any:
    """A field of a plan, with the folders that it names."""
    if isinstance(field, dict):
        return {name: said(one, shape) for name, one in field.items()}
    if isinstance(field, list):
        return [said(one, shape) for one in field]
    return folders(shape)[field] if field in (HERE, SAME, LORA, ENCODER) else field


def test_no_operation_is_missing():
    assert set(TABLE) == set(OPERATIONS)
    assert {shape for row in TABLE.values() for shape in (*row.per, *row.refused, *row.verified)} <= set(SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TABLE)
def test_it_works_or_says_why_not(name: str, shape: str, tmp_path: Path):
    row, base = TABLE[name], lamina.load(folders(shape)[HERE])
    kept = base.spec.to_json() if name == "restore" else None
    fields = row.fields | row.per.get(shape, {}) | ({"spec": kept} if kept is not None else {})
    plan = read_plan([*row.after, {"op": name, **said(fields, shape)}])
    state = {key: one.detach() for key, one in base.named_parameters()}
    outside = Outside(others(base.origin.located))
    if shape in row.refused:
        with pytest.raises(LaminaError, match=row.refused[shape]):
            apply(plan, base.spec, state, outside)
        return
    done = apply(plan, base.spec, state, outside)
    model, new = build(done.spec, done.weights)
    assert set(new) == set(done.new)
    works(model, ids_of(model) % model.spec.source_vocabulary, tmp_path, verified=shape in row.verified)
    assert all(torch.equal(base.get_parameter(key), one) for key, one in state.items())
