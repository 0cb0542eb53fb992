"""Longformer's recipe against transformers: its Longformer, with the weights of its RoBERTa copied by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.surgery import apply, build, read_plan, said
from tests import small, tiny
from tests.surgery.test_operations import ids_of, operated, run, works

ROBERTA = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 14,  # two of them before position 0
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
PLAN = {"op": "longformer", "window": 5, "context": 31}


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, lamina.Model]:
    """transformers' tiny RoBERTa with weights that matter, and ours of its files."""
    from transformers import RobertaConfig, RobertaModel

    theirs = RobertaModel(RobertaConfig(**ROBERTA), add_pooling_layer=False).eval()
    small.shake(theirs, 5)
    folder = tmp_path_factory.mktemp("roberta")
    theirs.save_pretrained(folder)
    return theirs, lamina.load(folder).eval()


@pytest.mark.parametrize("length", [6, 29])
@pytest.mark.parametrize("mask", ["none", "left", "right"])
def test_it_is_transformers_longformer_with_copied_weights(roberta: tuple[Any, lamina.Model], length: int, mask: str):
    from transformers import LongformerConfig, LongformerModel

    theirs, ours = roberta
    config = LongformerConfig(**(ROBERTA | {"max_position_embeddings": 33, "attention_window": 10}))
    longformer = LongformerModel(config, add_pooling_layer=False).eval()
    state = {}
    for name, tensor in theirs.state_dict().items():
        state[name] = tensor
        for part in ("query", "key", "value"):
            if f".self.{part}." in name:
                state[name.replace(part, f"{part}_global")] = tensor
    table = theirs.state_dict()["embeddings.position_embeddings.weight"]
    state["embeddings.position_embeddings.weight"] = torch.cat([table[:2], *[table[2:]] * 3])[:33]
    longformer.load_state_dict({**longformer.state_dict(), **state})
    ids = small.ids(2, length, vocabulary=48) + 2
    given = torch.ones_like(ids)
    if mask == "left":
        given[1, :3] = 0
    if mask == "right":
        given[1, -2:] = 0
    ids = torch.where(given.bool(), ids, 1)
    marked = torch.zeros_like(ids).bool()
    marked[:, 4] = marked[0, 0] = True
    model, new = operated(ours, PLAN)
    with torch.no_grad():
        expected = longformer(ids, attention_mask=given, global_attention_mask=marked.long()).last_hidden_state
        got = model(ids, None if mask == "none" else given, marked=marked).hidden
        plain = theirs(ids, attention_mask=given).last_hidden_state if length == 6 else expected
    real = given.bool()
    assert not new
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=2e-5)
    torch.testing.assert_close(got[real], plain[real], rtol=0, atol=2e-5)


def test_it_opens_in_transformers(roberta: tuple[Any, lamina.Model], tmp_path: Path):
    from transformers import LongformerModel

    model, _ = operated(roberta[1], PLAN)
    lamina.save(model, tmp_path / "longformer")
    theirs = LongformerModel.from_pretrained(tmp_path / "longformer", add_pooling_layer=False).eval()
    assert theirs.config.attention_window == [10, 10]
    ids = small.ids(1, 23, vocabulary=48) + 2
    mask = torch.zeros_like(ids)
    with torch.no_grad():
        expected = theirs(ids, global_attention_mask=mask).last_hidden_state
        torch.testing.assert_close(model(ids).hidden, expected, rtol=0, atol=2e-5)


def test_the_promise_and_the_way_back(tmp_path: Path):
    """BERT too; texts within the window are the same, longer ones are not; what grew and what was added goes again."""
    base = tiny.model(tiny.BERT, scale=1.0)
    state = {key: p.detach() for key, p in base.named_parameters()}
    plan = PLAN | {"window": 16, "context": 70}
    done = apply(read_plan([plan]), base.spec, state)
    assert done.promises[0].kept == "bounded" and "up to 17 tokens" in done.promises[0].why
    model, _ = build(done.spec, done.weights)
    assert model.spec.context == 70
    ids = ids_of(base)
    torch.testing.assert_close(run(model, ids), run(base, ids), rtol=0, atol=1e-5)
    long = ids_of(base, length=24)
    assert (run(model, long) - run(base, long)).abs().max() > 1e-4
    assert run(model, ids_of(base, length=69)).shape[1] == 69
    assert done.undo is not None
    back = apply(read_plan([said(one) for one in done.undo]), model.spec, dict(model.named_parameters()))
    assert back.spec == base.spec and set(back.weights) == set(state)
    assert all(torch.equal(back.weights[key], tensor) for key, tensor in state.items())
    works(model, ids, tmp_path)


def test_one_encoder_of_two_stacks():
    base = tiny.model(tiny.BART, scale=1.0)
    model, _ = operated(base, PLAN | {"window": 16, "context": 99, "at": ["encoder"]})
    ids = ids_of(base)
    torch.testing.assert_close(run(model, ids), run(base, ids), rtol=0, atol=1e-5)
    assert model.spec.source_context == 99 and model.spec.context == base.spec.context


@pytest.mark.parametrize("task", ["sequence", "span", "choice", "token"])
def test_what_is_global_is_as_published(task: str):
    """The spec is that of the family, whose heads mark tokens for themselves."""
    name = {"sequence": "Sequence", "span": "Question", "choice": "Multiple", "token": "Token"}[task]
    end = {"span": "Answering", "choice": "Choice"}.get(task, "Classification")
    config = ROBERTA | {"bos_token_id": 0, "eos_token_id": 2, "classifier_dropout": 0.1}
    base = tiny.spec(config | {"model_type": "roberta", "architectures": [f"RobertaFor{name}{end}"]})
    done = apply(read_plan([PLAN]), base, dict(base.build(device="meta").named_parameters()))
    expected = tiny.spec(
        config
        | {"model_type": "longformer", "architectures": [f"LongformerFor{name}{end}"]}
        | {"max_position_embeddings": 33, "attention_window": 10, "sep_token_id": 2}
    )
    assert done.spec == expected


def test_some_layers_only():
    model, _ = operated(tiny.model(tiny.BERT), {"op": "longformer", "window": 3, "at": ["encoder.layers.1"]})
    assert [type(layer.steps[0].op).__name__ for layer in model.spec.encoder.layers] == [
        "AttentionSpec",
        "LongformerSpec",
    ]


@pytest.mark.parametrize(
    ("config", "plan", "error", "said"),
    [
        (tiny.LLAMA, {}, LaminaError, "has the pattern Causal; Longformer takes the place of Everything"),
        (tiny.T5, {"at": ["encoder"]}, UnsupportedError, "Longformer's attention has no scale"),
        (tiny.BERT, {"context": 20}, LaminaError, "it can only get more of them"),
        (tiny.BERT, {"window": 0}, LaminaError, "window=0 and context=31 must be at least 1"),
    ],
)
def test_what_it_is_not_for(config: dict[str, Any], plan: dict[str, Any], error: type[LaminaError], said: str):
    with pytest.raises(error, match=said):
        operated(tiny.model(config), PLAN | plan)
