"""Models of two stacks: what the decoder writes depends on the source alone as padded, packed, cached or beamed."""

from __future__ import annotations

import json

import pytest
import torch

import lamina
from lamina.cache import KINDS
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation import Limits, Sampling, stream
from lamina.generation.beam import Beaming, search
from lamina.layers import (
    BucketBiasSpec,
    CrossAttentionSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerSpec,
    LearnedPositionSpec,
    RMSNormSpec,
    StackSpec,
    StepSpec,
)
from lamina.model import Model, ModelSpec, SpecialTokens
from lamina.patterns import Causal, Everything, Window
from lamina.report import report
from tests import small, tiny

CLOSE = {"rtol": 0, "atol": 1e-12}


def stack(decoder: bool, window: int | None = None) -> StackSpec:
    norm = RMSNormSpec()
    pattern = Everything() if not decoder else Causal() if window is None else Causal() & Window(back=window)
    steps = [StepSpec(name="attention", op=small.attention(pattern=pattern), pre=norm)]
    if decoder:
        steps.append(StepSpec(name="cross", op=CrossAttentionSpec(heads=4, key_heads=2, head_dim=5), pre=norm))
    steps.append(StepSpec(name="feedforward", op=FeedForwardSpec(hidden=24), pre=norm))
    bias = BucketBiasSpec(heads=4, buckets=8, distance=12, bidirectional=not decoder)
    return StackSpec(layers=(LayerSpec(steps=tuple(steps)),) * 2, norm=norm, score_bias=bias)


def spec(window: int | None = None, **fields: object) -> ModelSpec:
    return ModelSpec(
        width=16,
        embedding=EmbeddingSpec(vocabulary=small.VOCABULARY),
        encoder=stack(False),
        decoder=stack(True, window),
        head=LanguageHeadSpec(),
        special=SpecialTokens(decoder_start=0, end=(1,), pad=0),
        **fields,  # pyright: ignore[reportArgumentType]
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return small.build(spec())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [[9], [1] * 9, [4, 1, 3, 1]], ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["source once", "source each time"])
def test_decoding_in_pieces_is_the_whole_text(kind: str, split: list[int], again: bool):
    model = small.build(spec(window=3 if kind == "ring" else None))
    source, text = small.ids(2, 7), small.ids(2, 9, seed=1)
    mask = torch.ones_like(source)
    mask[0, :3] = 0
    whole = model(source, mask, decoder_input_ids=text)
    cache, parts = model.new_cache(kind, 2, 20), []
    for piece in text.split(split, dim=1):
        given = (source, mask) if again or not parts else ()
        parts.append(model(*given, decoder_input_ids=piece, cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, **CLOSE)
    assert cache.memory is not None and torch.equal(cache.memory, whole.encoder_output)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_both_sides_padded_are_as_alone(model: Model, side: str):
    sources, texts = [small.ids(n, seed=n) for n in (6, 2, 4)], [small.ids(n, seed=9 + n) for n in (3, 5, 1)]

    def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, rows))
        pads = [(longest - len(r), 0) if side == "left" else (0, longest - len(r)) for r in rows]
        ids = torch.stack([torch.nn.functional.pad(r, p, value=3) for r, p in zip(rows, pads)])
        return ids, torch.stack([torch.nn.functional.pad(torch.ones_like(r), p) for r, p in zip(rows, pads)])

    (source, seen), (text, read) = padded(sources), padded(texts)
    out = model(source, seen, decoder_input_ids=text, decoder_attention_mask=read)
    given = model(None, seen, encoder_output=out.encoder_output, decoder_input_ids=text, decoder_attention_mask=read)
    assert torch.equal(given.hidden, out.hidden)
    for i, (one, other) in enumerate(zip(sources, texts)):
        alone = model(one[None], decoder_input_ids=other[None])
        torch.testing.assert_close(out.hidden[i][read[i].bool()], alone.hidden[0], **CLOSE)
        torch.testing.assert_close(out.encoder_output[i][seen[i].bool()], alone.encoder_output[0], **CLOSE)


@torch.no_grad()
def test_packed_pairs_are_as_alone(model: Model):
    """Document 1 of the decoder reads document 1 of the source, told by numbers or by positions that restart."""
    sources, texts = [small.ids(n, seed=n) for n in (4, 3)], [small.ids(n, seed=9 + n) for n in (2, 5)]
    alone = torch.cat([model(s[None], decoder_input_ids=t[None]).logits[0] for s, t in zip(sources, texts)])
    source, text = torch.cat(sources)[None], torch.cat(texts)[None]

    def numbers(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([torch.full_like(r, i) for i, r in enumerate(rows)])[None]

    def restarting(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([torch.arange(len(r)) for r in rows])[None]

    told = [
        {"document_ids": numbers(sources), "decoder_document_ids": numbers(texts)},
        {"position_ids": restarting(sources), "decoder_position_ids": restarting(texts)},
    ]
    for given in told:
        torch.testing.assert_close(model(source, decoder_input_ids=text, **given).logits[0], alone, **CLOSE)
        if "document_ids" in given:
            cache, parts = model.new_cache(batch=1), []
            for at in (slice(0, 1), slice(1, 4), slice(4, 7)):
                piece = given["decoder_document_ids"][:, at]
                more = {"document_ids": given["document_ids"]} if not parts else {}
                out = model(source, decoder_input_ids=text[:, at], cache=cache, decoder_document_ids=piece, **more)
                parts.append(out.logits[0])
            torch.testing.assert_close(torch.cat(parts), alone, **CLOSE)


@torch.no_grad()
def test_the_source_matters_and_later_tokens_change_no_earlier_bit(model: Model):
    source, text = small.ids(1, 6), small.ids(1, 8, seed=1)
    before = model(source, decoder_input_ids=text).logits
    other = source.clone()
    other[0, 2] += 1
    moved = (model(other, decoder_input_ids=text).logits != before).any(-1)
    assert bool(moved.all())
    later = text.clone()
    later[0, 5] += 1
    moved = (model(source, decoder_input_ids=later).logits != before).any(-1)[0]
    assert moved.tolist() == [False] * 5 + [True] * 3


@torch.no_grad()
@pytest.mark.parametrize("cache", ["auto", "fixed", None])
def test_generation_is_each_row_alone_and_starts_from_the_start_id(model: Model, cache: str | None):
    source = small.ids(3, 6, seed=4)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [1] * 3 + [0] * 3])
    written = lamina.generate(model, source, mask, max_new_tokens=8, cache=cache)
    assert written.shape[1] <= 9 and written[:, 0].tolist() == [0] * 3
    for i in range(3):
        alone = lamina.generate(model, source[i][mask[i].bool()][None], max_new_tokens=8)
        row = written[i : i + 1, : alone.shape[1]]
        assert torch.equal(row, alone)
    begun = torch.tensor([[0, 7]] * 3)
    more = lamina.generate(model, source, mask, max_new_tokens=3, decoder_input_ids=begun, cache=cache)
    assert torch.equal(more[:, :2], begun)
    assert torch.equal(model(source, mask, decoder_input_ids=begun).logits[:, -1].argmax(-1), more[:, 2])


def test_what_is_missing_or_does_not_fit_is_said(model: Model):
    source, text = small.ids(2, 6), small.ids(2, 3)
    with pytest.raises(LaminaError, match="needs decoder_input_ids"):
        model(source)
    with pytest.raises(LaminaError, match="needs input_ids or encoder_output"):
        model(decoder_input_ids=text)
    with pytest.raises(LaminaError, match="3 rows and the source 2"):
        model(source, decoder_input_ids=small.ids(3, 3))
    for name in ("attention_mask", "position_ids", "document_ids"):
        with pytest.raises(LaminaError, match=f"decoder_{name} has shape"):
            model(source, decoder_input_ids=text, **{f"decoder_{name}": torch.ones(2, 9, dtype=torch.int64)})
        with pytest.raises(LaminaError, match=f"(?<!_){name} has shape"):
            model(source, decoder_input_ids=text, **{name: torch.ones(2, 9, dtype=torch.int64)})
    with pytest.raises(LaminaError, match="decoder_input_ids has shape"):
        model(source, decoder_input_ids=text[0])
    with pytest.raises(LaminaError, match="input_ids of"):
        model(source[:, :4], encoder_output=model.encode(source), decoder_input_ids=text)
    cache = model.new_cache(batch=2)
    model(source, decoder_input_ids=text, cache=cache)
    with pytest.raises(LaminaError, match="input_ids is not the source that this cache holds"):
        model(source[:, :4], decoder_input_ids=text, cache=cache)
    with pytest.raises(UnsupportedError, match="encode is for encoder-decoders"):
        small.build(small.decoder([Causal()])).encode(source)
    with pytest.raises(LaminaError, match="no CrossAttentionSpec"):
        spec().replace(decoder=small.decoder([Causal()]).decoder)
    with pytest.raises(UnsupportedError, match="decoder_input_ids"):
        lamina.generate(small.build(small.decoder([Causal()])), source, max_new_tokens=1, decoder_input_ids=text)


@torch.no_grad()
def test_a_cache_holds_one_source_which_may_be_given_again(model: Model):
    source, text = small.ids(2, 6), small.ids(2, 3)
    other = source.clone()
    other[1, 2] += 1
    memory, another = model.encode(source), model.encode(other)
    for first in ({"input_ids": source}, {"encoder_output": memory}):
        cache = model.new_cache(batch=2)
        model(**first, decoder_input_ids=text, cache=cache)
        for again in ({}, {"input_ids": source.clone()}, {"encoder_output": memory.clone()}):
            model(**again, decoder_input_ids=text, cache=cache)
        with pytest.raises(LaminaError, match="encoder_output is not the source that this cache holds"):
            model(encoder_output=another, decoder_input_ids=text, cache=cache)
        wrong = other if "input_ids" in first else other[:, 1:]  # of a memory alone the ids are not known
        with pytest.raises(LaminaError, match="input_ids is not the source that this cache holds"):
            model(wrong, decoder_input_ids=text, cache=cache)
    cache.reorder(torch.tensor([1, 0]))
    with pytest.raises(LaminaError, match="is not the source"):
        model(encoder_output=memory, decoder_input_ids=text, cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_steps_of_beams_do_not_read_what_padding_holds(model: Model, cached: bool):
    """What the encoder gives for padding may be NaN; steps of one token read the cached keys without a copy."""
    source, text = small.ids(2, 6), small.ids(4, 3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    memory = model.encode(source, mask)
    expected = model(None, mask, encoder_output=memory, decoder_input_ids=text).logits
    memory = memory.masked_fill(mask[:, :, None] == 0, torch.nan)
    given = {"attention_mask": mask, "encoder_output": memory}
    if not cached:
        found = model(**given, decoder_input_ids=text[:, :1]).logits
    else:
        cache = model.new_cache(batch=4)
        found = torch.cat(
            [model(**given, decoder_input_ids=one, cache=cache).logits for one in text.split(1, 1)], dim=1
        )
    torch.testing.assert_close(found, expected[:, : found.shape[1]], **CLOSE)


@torch.no_grad()
def test_a_forward_that_fails_leaves_no_source_behind(model: Model):
    source, other, text = small.ids(2, 6), small.ids(2, 6, seed=3), small.ids(2, 3)
    cache = model.new_cache(batch=2)
    for wrong in ({"decoder_attention_mask": text[:, :1]}, {"backend": "none"}, {"record": lamina.Record("nothing")}):
        with pytest.raises(LaminaError):
            model(source, decoder_input_ids=text, cache=cache, **wrong)
        assert cache.memory is None
        if "record" in wrong:  # whose names are only known at the end, when the keys are in the cache
            cache = model.new_cache(batch=2)
    whole = model(other, decoder_input_ids=text)
    assert torch.equal(model(other, decoder_input_ids=text, cache=cache).logits, whole.logits)


def test_a_model_of_one_stack_refuses_each_argument_of_two_by_name():
    model, ids = small.build(small.decoder([Causal()])), small.ids(1, 4)
    names = ("decoder_input_ids", "decoder_attention_mask", "decoder_position_ids", "decoder_document_ids")
    for name in (*names, "encoder_output"):
        with pytest.raises(UnsupportedError, match=f"^{name} is for encoder-decoders"):
            model(ids, **{name: ids})


def test_every_way_to_generate_refuses_the_decoder_ids_of_one_stack():
    model, ids = small.build(small.decoder([Causal()])), small.ids(1, 4)
    limits = Limits(most=2)
    ways = {
        "generate": lambda: lamina.generate(model, ids, max_new_tokens=2, decoder_input_ids=ids),
        "stream": lambda: list(stream(model, ids, sampling=Sampling(), limits=limits, decoder_input_ids=ids)),
        "search": lambda: search(model, ids, beaming=Beaming(beams=2), limits=limits, decoder_input_ids=ids),
    }
    for way in ways.values():
        with pytest.raises(UnsupportedError, match="decoder_input_ids is for encoder-decoders"):
            way()


@torch.no_grad()
def test_relative_positions_go_on_beyond_what_was_trained_and_learned_ones_end():
    source = small.ids(1, 6)
    relative = spec(context=5)
    assert relative.decoder is not None
    for kind in ("growing", "none"):
        assert lamina.generate(small.build(relative), source, max_new_tokens=9, cache=kind).shape == (1, 10)
    learned = relative.replace(
        decoder=relative.decoder.replace(score_bias=None, position=LearnedPositionSpec(size=5)),
    )
    with pytest.warns(UserWarning, match="the context of 5 is full"):
        assert lamina.generate(small.build(learned), source[:, :3], max_new_tokens=9).shape == (1, 5)


@torch.no_grad()
def test_a_decoder_alone_reads_a_memory_where_it_is_given_one(model: Model):
    alone = small.build(spec().replace(encoder=None))
    text, memory = small.ids(2, 4), torch.randn(2, 5, 16, dtype=torch.float64)
    without = alone(text).hidden
    reading = alone(text, encoder_output=memory).hidden
    assert not torch.equal(without, reading)
    cache = alone.new_cache(batch=2)
    parts = [alone(piece, encoder_output=memory, cache=cache).hidden for piece in text.split(2, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), reading, **CLOSE)


@torch.no_grad()
def test_layers_that_repeat_are_the_same_layer_several_times():
    """ALBERT's sharing: 2 layers of 3 runs each equal 6 layers with those weights, and count once."""
    encoder = stack(False).replace(score_bias=None)
    shared = ModelSpec(width=16, embedding=EmbeddingSpec(vocabulary=40), encoder=encoder.replace(repeat=3))
    apart = shared.replace(encoder=encoder.replace(layers=encoder.layers[:1] * 6))
    few, many = small.build(shared), small.build(apart)
    state = few.state_dict()
    many.load_state_dict({n: state[n.replace(f".{i}.", f".{i // 3}.")] for n in many.state_dict() for i in [layer(n)]})
    ids = small.ids(2, 7)
    records = [lamina.Record("*.output", "*.weights") for _ in range(2)]  # whose names count the runs
    torch.testing.assert_close(few(ids, record=records[0]).hidden, many(ids, record=records[1]).hidden, **CLOSE)
    assert len(records[0].values) == 12
    torch.testing.assert_close(records[0].values, records[1].values, **CLOSE)
    one, other = (lamina.account(each, context=7) for each in (shared, apart))
    assert one.flops_prefill == other.flops_prefill and one.parameters < other.parameters
    with pytest.raises(UnsupportedError, match="repeat has no cache"):
        small.build(small.decoder([Causal()]).replace(decoder=stack(True).replace(repeat=2))).new_cache()


def layer(name: str) -> int:
    return int(name.split(".")[2]) if ".layers." in name else -1


@torch.no_grad()
def test_a_narrow_table_and_a_narrow_stack_are_brought_to_the_width_of_the_model():
    from lamina.layers import LearnedPositionSpec, TransformSpec

    ids = small.ids(2, 5)
    table = EmbeddingSpec(vocabulary=40, inner=6)  # OPT-350m
    head = LanguageHeadSpec(transform=TransformSpec(width=6, bias=False))
    model = small.build(small.decoder([Causal()]).replace(embedding=table, head=head))
    assert model.embedding.weight.shape == (40, 6) and model.embedding.up is not None
    torch.testing.assert_close(model.embedding(ids), model.embedding.weight[ids] @ model.embedding.up.weight.T)
    out, dense = model(ids), model.head.transform.dense
    torch.testing.assert_close(out.logits, out.hidden @ dense.weight.T @ model.embedding.weight.T)

    narrow = stack(False).replace(input_width=6, position=LearnedPositionSpec(size=8), score_bias=None)  # ALBERT
    model = small.build(ModelSpec(width=16, embedding=EmbeddingSpec(vocabulary=40), encoder=narrow))
    record = lamina.Record("encoder.input")
    model(ids, record=record)
    summed = model.embedding.weight[ids] + model.encoder.position.weight[:5]
    projected = summed @ model.encoder.input.weight.T + model.encoder.input.bias
    torch.testing.assert_close(record.values["encoder.input"], projected)


# What is done with models, done with one of two stacks


@pytest.fixture(scope="module")
def t5() -> Model:
    return tiny.model(tiny.T5)


def test_a_chat_reads_the_conversation_anew_in_every_turn(t5: Model):
    from lamina.generation import Chat

    chat = Chat(t5, tiny.tokenizer(), max_new_tokens=5)
    for text in ("a dog", "and a cat that ran over the mat"):
        answer = "".join(chat.say(text))
        prompt = tiny.tokenizer().chat_ids(chat.messages[:-1])
        written = lamina.generate(t5, torch.tensor([prompt]), max_new_tokens=5)[0, 1:].tolist()
        assert chat.answer is not None and chat.answer.ids == written[: len(chat.answer.ids)] and chat.reused == 0
        assert answer == chat.messages[-1]["content"]


@torch.no_grad()
def test_a_text_is_embedded_by_the_encoder(t5: Model):
    texts = ["the dog", "a much longer text about a cat"]
    vectors = lamina.embed(t5, texts, tiny.tokenizer())
    for text, vector in zip(texts, vectors, strict=True):
        mean = t5.encode(torch.tensor([tiny.tokenizer().encode(text)])).mean(dim=1)
        torch.testing.assert_close(vector[None], torch.nn.functional.normalize(mean))


def test_what_has_no_meaning_for_two_stacks_is_refused_by_name(t5: Model):
    with pytest.raises(UnsupportedError, match="predicts a text from its source, so a text alone has no perplexity"):
        next(lamina.generation.score(t5, [4, 5, 6]))
    with pytest.raises(UnsupportedError, match="fills blanks by writing the text again"):
        lamina.generation.fill(t5, "a [MASK]", tiny.words())
    with pytest.raises(UnsupportedError, match="an encoder-decoder has two stacks"):
        lamina.generation.compiled.prepare(t5, compile=True, quantize=None)


def test_a_report_shows_what_the_decoder_looked_at(t5: Model):
    writing = lamina.generation.Writing(
        t5, tiny.tokenizer(), tiny.tokenizer().encode("a dog ran"), max_new_tokens=6, min_new_tokens=6
    )
    page = report("tiny T5", t5, writing="".join(writing) and writing)
    data = json.loads(page.split('id="attention">')[1].split("</script>")[0])
    assert len(data["tokens"]) == 7 and data["causal"]  # the start id, and what was written
    assert [each["path"] for each in data["layers"]] == [f"decoder.layers.{i}.attention.op" for i in range(2)]
    assert "cross-attention" in page


def test_what_it_costs_is_that_of_both_stacks(t5: Model):
    """One more token is the decoder's work; the cache holds its own keys and those of the source."""
    cost = lamina.account(t5, context=10, dtype="float32")
    rows = {row.name: row for row in cost.rows}
    assert rows["encoder.layers.0-1"].flops_per_token == rows["encoder.layers.0-1"].cache_bytes == 0
    assert cost.cache_bytes == 2 * 2 * (10 + 10) * 4 * 6 * 4  # layers, keys and values, tokens, heads, width, bytes
    cache = t5.new_cache(batch=1)
    t5(torch.full((1, 10), 4), decoder_input_ids=torch.full((1, 10), 5), cache=cache)
    assert cache.bytes() == cost.cache_bytes
