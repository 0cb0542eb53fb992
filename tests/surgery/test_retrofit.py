"""RETRO-fitting: the base stays what it was, bit for bit, and the new layers learn to read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    Call,
    Record,
    RMSNormSpec,
    ShawSpec,
    StackSpec,
    StepSpec,
    neighbour_encoder,
)
from lamina.model import Model, ModelSpec
from lamina.specs import edit
from lamina.surgery import SURGERIES, build, retrofit
from lamina.surgery.retrofit import NEW
from lamina.tokens import plain
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


COPIED = {
    "gpt2": tiny.GPT2 | {"n_layer": 4},
    "llama": tiny.LLAMA | {"num_hidden_layers": 4},  # 4 heads, 2 of keys
    "mistral": tiny.MISTRAL | {"num_hidden_layers": 4},  # a neighbour is longer than its window
}
PLACES = (1, 3)


def copied(base: Model, **more: object) -> tuple[Model, list[str]]:
    options = {"layers": PLACES, "chunk": CHUNK, "begin": "copied"} | more
    return build(*retrofit(base.spec, dict(base.named_parameters()), **options))  # pyright: ignore


def opened(model: Model, gate: float = 0.7) -> Model:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("retrieval.gate"):
                parameter.fill_(gate)
    return model


def heads_of(x: Tensor, size: int) -> Tensor:
    """(S, heads * size) -> (heads, S, size)."""
    return x.unflatten(-1, (-1, size)).transpose(0, 1)


def turned(x: Tensor, places: Tensor, base: float | None) -> Tensor:
    """Rotary phases by complex numbers: features i and i + half are a pair."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    angles = places[:, None].double() * base ** (-torch.arange(half).double() / half)
    pairs = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)


def by_hand(base: Model, ids: Tensor, neighbours: Tensor, gate: float) -> Tensor:
    """What the base would say of one text (T,) if its own heads at PLACES read (N, k, r) neighbours too: states of a
    neighbour are those that the base has when it reads it as a text, r places before the end of the chunk."""
    names = [f"decoder.layers.{place - 1}.output" for place in PLACES]
    record = Record(*names)
    base(neighbours.flatten(0, 1), record=record)
    states = {place: record.values[name] for place, name in zip(PLACES, names, strict=True)}  # (N k, r, width)
    count, length = neighbours.shape[1:]
    call = Call(tokens=plain(1, len(ids)))
    stack = base.decoder
    x = stack.begin(base.embedding(ids[None]), call, None)
    for i, layer in enumerate(stack.layers):
        x = layer["attention"](x, call)
        if i in PLACES:
            step = layer["attention"]
            rotary, size = step.op.spec.rotary, step.op.spec.head_dim
            shared = step.op.spec.heads // step.op.spec.key_heads
            out, turn = x.clone(), None if rotary is None else rotary.base
            for t in range(CHUNK - 1, len(ids)):
                chunk = (t + 1) // CHUNK - 1
                memory = step.pre(states[i][count * chunk : count * (chunk + 1)].flatten(0, 1))
                place = chunk * CHUNK + CHUNK - length + torch.arange(length).repeat(count)
                query = turned(heads_of(step.op.q(step.pre(x[0, t : t + 1])), size), torch.tensor([t]), turn)
                key = turned(heads_of(step.op.k(memory), size), place, turn).repeat_interleave(shared, 0)
                value = heads_of(step.op.v(memory), size).repeat_interleave(shared, 0)
                shares = (query @ key.transpose(1, 2) / size**0.5).softmax(-1)
                out[0, t] += torch.tanh(torch.tensor(gate)) * step.op.o((shares @ value).transpose(0, 1).flatten(1))[0]
            x = out
        x = layer["feedforward"](x, call)
    return base.heads(stack.end(x, call), call, None, None).logits[0]


@pytest.mark.parametrize("name", COPIED)
@torch.no_grad()
def test_copied_heads_read_a_neighbour_as_they_read_their_own_text(name: str):
    base = small.build(tiny.model(COPIED[name]).spec)
    vocabulary = base.spec.embedding.vocabulary
    ids, neighbours = small.ids(3, 18, vocabulary=vocabulary), found(3, 4, vocabulary)
    kept = {key: tensor.clone() for key, tensor in base.named_parameters()}
    model, new = copied(base)
    assert new == [f"decoder.layers.{place}.retrieval.gate" for place in PLACES]
    plain = base(ids).logits
    assert torch.equal(model(ids, neighbours=neighbours).logits, plain)  # the gates are zero
    read = opened(model)(ids, neighbours=neighbours).logits
    assert torch.equal(model(ids).logits, plain)
    for row in range(3):
        expected = by_hand(base, ids[row], neighbours[row], 0.7)
        torch.testing.assert_close(read[row], expected, rtol=0, atol=2e-5)  # phases are in float32
    assert float((read - plain)[:, CHUNK - 1 :].abs().amin(dim=1).max()) > 1e-3
    for parameter in (p for key, p in model.named_parameters() if ".retrieval." in key):
        parameter.add_(1.0)  # copies: the base's own stay
    assert all(torch.equal(tensor, kept[key]) for key, tensor in base.named_parameters())


@pytest.mark.parametrize("name", COPIED)
@torch.no_grad()
def test_copied_heads_read_in_pieces_with_a_cache_and_after_a_reload(name: str, tmp_path):
    model = opened(copied(tiny.model(COPIED[name]).eval())[0])
    vocabulary = model.spec.embedding.vocabulary
    ids, neighbours = small.ids(2, 15, vocabulary=vocabulary), found(2, 3, vocabulary)
    expected = model(ids, neighbours=neighbours).logits
    cache, parts, read = model.new_cache(batch=2), [], 0
    for size in (2, 4, 1, 1, 5, 2):
        ends = (read + size) // CHUNK - read // CHUNK
        given = {"neighbours": neighbours[:, read // CHUNK :][:, :ends]} if ends else {}
        parts.append(model(ids[:, read : read + size], cache=cache, **given).logits)
        read += size
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=2e-5)
    lamina.save(model, tmp_path / "copied", format="native")
    assert torch.equal(lamina.load(tmp_path / "copied")(ids, neighbours=neighbours).logits, expected)


def test_what_can_be_copied_and_what_cannot():
    base = tiny.model(COPIED["llama"])
    spec, state = base.spec, dict(base.named_parameters())
    alone, _ = copied(base, layers=(2,))
    assert alone.spec.retrieval is not None and alone.spec.retrieval.encoder is not None
    assert alone.spec.retrieval.encoder.depths == () and len(alone.spec.retrieval.encoder.stack.layers) == 2
    gates = opened(copied(base, layers=(0, 1))[0]).train()
    freeze(gates, (), (NEW,))
    vocabulary = spec.embedding.vocabulary
    gates(small.ids(2, 9, vocabulary=vocabulary), neighbours=found(2, 2, vocabulary)).logits.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in gates.parameters() if p.grad is not None)
    encoder = neighbour_encoder(spec.width, vocabulary, width=spec.width, heads=2, head_dim=8, hidden=24)
    with pytest.raises(UnsupportedError, match="leave encoder out"):
        copied(base, encoder=encoder)
    for kind, fields in (
        (AttentionSpec, {"softcap": 5.0}),
        (AttentionSpec, {"sink": True}),
        (AttentionSpec, {"relative": ShawSpec(clip=3)}),
        (StepSpec, {"post": RMSNormSpec()}),
        (StackSpec, {"score_bias": AlibiSpec(heads=4)}),
        (StepSpec, {"residual": 2.0}),
    ):
        other = edit(spec, kind, lambda _, own, fields=fields: own.replace(**fields))
        with pytest.raises(UnsupportedError, match=f"a step that reads neighbours .*{next(iter(fields))}"):
            retrofit(other, state, layers=PLACES, chunk=CHUNK, begin="copied")
    odd = edit(spec, AttentionSpec, lambda path, own: own.replace(scale=0.5) if "layers.3" in path else own)
    with pytest.raises(UnsupportedError, match="attention of layer 3 is not that of layer 1"):
        retrofit(odd, state, layers=PLACES, chunk=CHUNK, begin="copied")
    for places in ((), (1, 4), (3, 1)):
        with pytest.raises(LaminaError, match="they must grow, from 0 to 3"):
            copied(base, layers=places)
