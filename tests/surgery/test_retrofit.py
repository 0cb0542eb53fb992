"""RETRO-fitting: the base stays what it was, bit for bit, and the new layers learn to read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import neighbour_encoder
from lamina.model import Model, ModelSpec
from lamina.surgery import SURGERIES, build, retrofit
from lamina.surgery.retrofit import NEW
from lamina.train.roles import freeze
from tests import small, tiny

CONFIGS = {"gpt2": tiny.GPT2, "llama": tiny.LLAMA, "mistral": tiny.MISTRAL}
CHUNK = 4


def fitted(base: Model, **more: object) -> tuple[Model, list[str]]:
    spec = base.spec
    encoder = neighbour_encoder(
        spec.width, spec.embedding.vocabulary, width=16, heads=2, head_dim=8, hidden=24, layers=2
    )
    options = {"layers": (0, 1), "chunk": CHUNK, "encoder": encoder} | more
    return build(*retrofit(spec, dict(base.named_parameters()), **options), seed=1)  # pyright: ignore


def found(rows: int, chunks: int, vocabulary: int, seed: int = 3) -> Tensor:
    return torch.randint(vocabulary, (rows, chunks, 2, 2 * CHUNK), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_base_bit_for_bit_and_stays_so_without_neighbours(name: str):
    base = tiny.model(CONFIGS[name]).eval()
    kept = {key: tensor.detach().clone() for key, tensor in base.state_dict().items()}
    vocabulary = base.spec.embedding.vocabulary
    ids, neighbours = small.ids(3, 18, vocabulary=vocabulary), found(3, 4, vocabulary)
    expected = base(ids).logits.detach()
    model, new = fitted(base)
    assert new and all(".retrieval." in key for key in new)
    assert {key for key, _ in model.named_parameters()} == set(new) | set(kept)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids, neighbours=neighbours).logits, expected)  # the gates are zero
    trained = freeze(model.train(), (), (NEW,))
    assert [key for key, _ in trained] == new
    optimiser = torch.optim.AdamW([parameter for _, parameter in trained], lr=0.02)
    losses = []
    for _ in range(12):
        out = model(ids, neighbours=neighbours).logits
        loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    model.eval()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in kept.items())
    assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(model(ids, neighbours=neighbours).logits, expected)


def test_an_encoder_of_the_decoders_width_begins_with_its_table():
    base = tiny.model(tiny.LLAMA).eval()
    spec, state = base.spec, dict(base.named_parameters())
    encoder = neighbour_encoder(spec.width, spec.embedding.vocabulary, width=spec.width, heads=2, head_dim=8, hidden=24)
    model, new = build(*retrofit(spec, state, layers=(0, 1), chunk=CHUNK, encoder=encoder))
    name = "decoder.layers.0.retrieval.op.encoder.embedding.weight"
    table = dict(model.named_parameters())[name]
    assert torch.equal(table, base.embedding.weight) and name not in new
    with torch.no_grad():
        table.add_(1.0)  # a copy: the base's own stays
    assert not torch.equal(table, base.embedding.weight)
    _, narrow = fitted(base)
    assert any(name.endswith("encoder.embedding.weight") for name in narrow)


def test_by_default_it_is_every_third_layer_from_the_sixth_and_the_papers_encoder():
    spec = lamina.spec("gpt2/small")
    new, state = SURGERIES["retrofit"](spec, {})
    assert state == {} and isinstance(new, ModelSpec) and new.decoder is not None and new.retrieval is not None
    places = [i for i, layer in enumerate(new.decoder.layers) if len(layer.steps) == 3]
    assert places == [5, 8, 11] and all(new.decoder.layers[i].steps[1].gate for i in places)
    assert [step.name for step in new.decoder.layers[5].steps] == ["attention", "retrieval", "feedforward"]
    assert new.retrieval.encoder == neighbour_encoder(768, 50257) and new.retrieval.chunk == 64
    names = {name for name, _ in spec.build(device="meta").named_parameters()}
    assert names < {name for name, _ in new.build(device="meta").named_parameters()}
    grouped = retrofit(lamina.spec("llama3.1/8b"), {})[0].retrieval
    assert grouped is not None and (grouped.attention.heads, grouped.attention.key_heads) == (32, 8)


def test_it_is_saved_and_loaded(tmp_path):
    model, _ = fitted(tiny.model(tiny.LLAMA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("retrieval.gate"):
                parameter.fill_(0.5)
    lamina.save(model, tmp_path / "fitted", format="native")
    again = lamina.load(tmp_path / "fitted")
    assert again.spec == model.spec
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_what_it_is_not_for():
    for spec, why in (
        (tiny.model(tiny.BERT).spec, "a decoder by itself"),
        (lamina.spec("t5/small"), "a decoder by itself"),
        (lamina.spec("retro/172m"), "does not retrieve yet"),
        (lamina.spec("palm/8b"), "AttentionSpec"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            retrofit(spec, {})
    with pytest.raises(LaminaError, match="they must grow, from 0 to 11"):
        retrofit(lamina.spec("gpt2/small"), {}, layers=(3, 12))
    with pytest.raises(LaminaError, match="they must grow"):
        retrofit(lamina.spec("gpt2/small"), {}, layers=())
    base = tiny.model(tiny.LLAMA)
    state = dict(base.named_parameters())
    with pytest.raises(LaminaError, match="the state has 'other', and the spec no such parameter"):
        build(base.spec, {**state, "other": torch.zeros(1)})
    with pytest.raises(LaminaError, match=r"decoder.norm.weight is \(3,\); the spec asks for \(32,\)"):
        build(base.spec, {**state, "decoder.norm.weight": torch.zeros(3)})
