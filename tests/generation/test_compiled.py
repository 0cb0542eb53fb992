"""The compiled step writes what the model writes, across sizes of cache, with the weights of the live model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation import Chat, compiled
from lamina.generation.compiled import prepare
from lamina.generation.int8 import Int8Linear, rounded
from lamina.generation.package import _attention
from lamina.layers import (
    AttentionSpec,
    DifferentialSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LatentAttentionSpec,
    LayerNormSpec,
    LayerSpec,
    LearnedPositionSpec,
    RMSNormSpec,
    RotarySpec,
    StackSpec,
    StepSpec,
)
from lamina.model import Model, ModelSpec
from lamina.patterns import Causal, Window
from tests import tiny


def model_of(*, softcap: float | None = None, learned: bool = False, tied: bool = True) -> Model:
    """One layer in which window, rotary phases, grouped heads, biases and the order of positions matter."""
    norm = LayerNormSpec() if learned else RMSNormSpec()
    attention = AttentionSpec(
        heads=4,
        key_heads=2,
        head_dim=6,
        pattern=Causal() & Window(back=7),
        rotary=None if learned else RotarySpec(base=50.0),
        qk_norm=RMSNormSpec(),
        bias="qkv",
        softcap=softcap,
    )
    steps = (
        StepSpec(name="attention", op=attention, pre=norm),
        StepSpec(name="feedforward", op=FeedForwardSpec(hidden=30, gated=not learned, bias=learned), pre=norm),
    )
    spec = ModelSpec(
        width=20,
        embedding=EmbeddingSpec(vocabulary=61, scale="root"),
        decoder=StackSpec(
            layers=(LayerSpec(steps=steps),), norm=norm, position=LearnedPositionSpec(size=90) if learned else None
        ),
        head=LanguageHeadSpec(tied=tied, softcap=4.0),
        context=90,
    )
    model = spec.build(seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1).add_(0.1 if parameter.dim() == 1 else 0)
    return model


@pytest.fixture(autouse=True)
def cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "SMALLEST", 16)
    monkeypatch.setattr(compiled, "AHEAD", 4)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["rotary", "learned"])
def test_step_writes_what_the_model_writes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = kind == "learned"
    sizes = {32} if learned else {16, 32}  # a step takes ten seconds to compile
    monkeypatch.setattr(compiled, "SMALLEST", min(sizes))
    model = model_of(softcap=3.0 if learned else None, learned=learned, tied=not learned)
    torch.manual_seed(0)
    for length in (1, 9):
        ids = torch.randint(0, 61, (1, length))
        expected = lamina.generate(model, ids, max_new_tokens=20)
        prepare(model, compile=True)
        assert torch.equal(lamina.generate(model, ids, max_new_tokens=20), expected)
        assert set(model.engine.steps) <= sizes
        model.engine = None
    said = capsys.readouterr().err
    assert said.count("compiling the decoding step") == len(sizes)  # and none a second time
    steps = list((tmp_path / "steps").glob("*.pt2"))
    assert len(steps) == len(sizes) and all(step.stat().st_size for step in steps)
    if not learned:
        reads_on_and_takes_back(model)
        is_verified(model, monkeypatch)
    prepare(model, compile=True)
    with torch.no_grad():
        model.embedding.weight.mul_(-1.0)  # the step reads the weights of the live model
    ids = torch.tensor([[5, 17, 2]])
    written = lamina.generate(model, ids, max_new_tokens=12)
    model.engine = None
    assert torch.equal(written, lamina.generate(model, ids, max_new_tokens=12))
    assert "compiling" not in capsys.readouterr().err


def reads_on_and_takes_back(model: Model) -> None:
    """A prompt in pieces, steps between them, a move to a larger cache, and another ending: as read at once."""
    prepare(model, compile=True)
    ids = torch.randint(0, 61, (1, 30), generator=torch.Generator().manual_seed(1))
    reader, other = model.engine.start(30), ids.clone()
    other[0, 12:] = (other[0, 12:] + 5) % 61
    with torch.no_grad():
        for text, parts in ((ids, [5, 1, 1, 6, 1, 4, 1]), (other, [1, 3, 1, 9])):  # the second from token 12 on
            whole, at = model(text).logits, reader.length
            for part in text[:, at:].split([*parts, 30 - at - sum(parts)], dim=1):
                found = reader.read(part)
                at += part.shape[1]
                assert reader.length == at
                assert torch.allclose(found, whole[:, at - 1], atol=1e-4 * float(whole.abs().max()))
            assert at == 30 and reader.places == 32
            reader.trim(12)
    with pytest.raises(LaminaError, match="12 tokens were read and cannot be trimmed to 13"):
        reader.trim(13)


def is_verified(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a step that scores wrongly is found."""
    rows = [row for row in lamina.verify(model).rows if row.property == "the compiled step = the model"]
    assert [row.verdict for row in rows] == ["holds"] and rows[0].worst is not None
    with monkeypatch.context() as patched:
        patched.setattr(compiled.Reader, "read", lambda self, part: torch.zeros(1, 61))
        rows = [row for row in lamina.verify(model).rows if row.property == "the compiled step = the model"]
    assert [row.verdict for row in rows] == ["fails"]


@pytest.mark.timeout(400)
def test_a_chat_keeps_what_the_step_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SMALLEST", 256)  # one step to compile
    model = tiny.model(tiny.LLAMA | {"max_position_embeddings": 256})

    def talk() -> tuple[list[str], list[int], list[int]]:
        chat = Chat(model, tiny.tokenizer(), max_new_tokens=6)
        texts, reused, prompts = [], [], []
        for message in ("the", "cat", "the hat"):
            answer = chat.say(message)
            texts.append("".join(answer))
            reused.append(chat.reused)
            prompts.append(len(answer.prompt_ids))
        return texts, reused, prompts

    expected = talk()
    prepare(model, compile=True)
    assert talk() == expected and expected[1][0] == 0 and expected[1][2] > expected[1][1] > 0


@pytest.mark.timeout(400)
def test_a_step_of_latent_and_differential_attention() -> None:
    """The first keeps one tensor a layer and an empty one; in 8 bits, what it absorbs stays as it is."""
    latent = LatentAttentionSpec(
        heads=3, key_rank=6, nope_dim=4, rope_dim=4, value_dim=5, rotary=RotarySpec(base=50.0, interleaved=True)
    )
    differential = DifferentialSpec(heads=4, key_heads=2, head_dim=4, start=0.3, rotary=RotarySpec(base=50.0))
    layers = tuple(
        LayerSpec(steps=(StepSpec(name="attention", op=op, pre=RMSNormSpec()),)) for op in (latent, differential)
    )
    stack = StackSpec(layers=layers, norm=RMSNormSpec())
    spec = ModelSpec(width=20, embedding=EmbeddingSpec(vocabulary=61), decoder=stack, head=LanguageHeadSpec())
    model = spec.build(seed=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if parameter.dim() > 1 and "embedding" not in name else 1)
    prepare(model, quantize="int8")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    expected = lamina.generate(model, ids, max_new_tokens=10)
    prepare(model, compile=True)
    assert torch.equal(lamina.generate(model, ids, max_new_tokens=10), expected)
    assert set(model.engine.steps) == {16}
    assert len(set(expected[0].tolist())) > 5


@pytest.mark.timeout(400)
def test_int8_step_equals_int8_model() -> None:
    model = model_of()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    full = model(ids).logits
    prepare(model, quantize="int8")
    assert isinstance(model.decoder.layers[0]["attention"].op.q, Int8Linear)  # pyright: ignore
    near = model(ids).logits
    assert 0 < (near - full).abs().max() < 0.1 * full.abs().max()
    expected = lamina.generate(model, ids, max_new_tokens=8)
    prepare(model, compile=True)
    assert torch.equal(lamina.generate(model, ids, max_new_tokens=8), expected)
    with pytest.raises(UnsupportedError, match="int8"):
        lamina.save(model, "nowhere")


def test_rounding_is_within_half_a_step() -> None:
    weight = torch.randn(7, 33)
    weight[2] = 0
    values, scale = rounded(weight)
    assert values.dtype == torch.int8 and values.abs().max() == 127
    assert bool(((values * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-7).all())


def test_what_cannot_be_compiled_is_refused() -> None:
    encoder = lamina.spec("bert/base-uncased").build(device="meta")
    with pytest.raises(UnsupportedError, match="decoder"):
        prepare(encoder, compile=True)
    with pytest.raises(UnsupportedError, match="decoder"):
        prepare(encoder, quantize="int8")
    with pytest.raises(LaminaError, match="did you mean 'int8'"):
        prepare(encoder, quantize="int4")


def test_attention_as_sums_is_attention() -> None:
    """Shared key heads, boolean and float masks, and rows that may see nothing."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 3, 5), torch.randn(2, 2, 7, 5), torch.randn(2, 2, 7, 4)
    spread = [part.repeat_interleave(3, dim=1) for part in (key, value)]
    allowed = torch.rand(2, 1, 3, 7) > 0.4
    allowed[1, 0, 2] = False
    added = torch.randn(1, 6, 3, 7).masked_fill(torch.rand(1, 6, 3, 7) > 0.7, -torch.inf)
    added[0, 4, 1] = -torch.inf
    for mask in (None, allowed, added):
        expected = F.scaled_dot_product_attention(query, *spread, attn_mask=mask, scale=0.3)
        found = _attention(query, key, value, mask, scale=0.3)
        assert torch.allclose(found, expected, atol=1e-6)
        assert mask is not allowed or bool((found[1, :, 2] == 0).all())
