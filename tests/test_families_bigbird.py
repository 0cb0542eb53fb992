"""BigBird and BigBird-Pegasus against transformers on texts of many blocks, that a short text leaves nothing behind
(R5), and the heads that no other family has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lamina
from lamina.errors import LaminaError
from lamina.families import family
from lamina.families.family import Fields
from lamina.layers import BigBirdSpec, EmbeddingSpec, FeedForwardSpec, LabelHeadSpec, LayerNormSpec, PoolerSpec
from lamina.marks import EndBlocks
from lamina.model import ModelSpec, SpecialTokens
from tests.families import BIGBIRD, PEGASUS, Case, Row, again, close, same_files, tokens
from tests.oracle import ON_THE_CPU
from tests.test_families import Cases, cases, quiet  # noqa: F401  (two are fixtures)

LONG = BIGBIRD | {"block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64}


@pytest.fixture
def case(cases: Cases) -> Case:  # noqa: F811
    return cases(Row("bigbird-long", "BigBirdForMaskedLM", "BigBirdConfig", LONG))


@pytest.mark.parametrize("length", [29, 40, 47])  # dense to 28 = (5 + 2) blocks of 4
@torch.no_grad()
def test_many_blocks_are_those_of_transformers(case: Case, length: int):
    ids = tokens(2, length, seed=1)
    theirs = case.theirs_on(ids, output_hidden_states=True)
    for backend in (None, *ON_THE_CPU, "flex"):
        ours = case.ours(ids, backend=backend)
        assert close(ours.hidden, theirs.hidden_states[-1])
        assert ours.logits is not None and close(ours.logits, theirs.logits)
    mask = torch.ones_like(ids)
    mask[1, -3:] = (
        0  # their pattern is that of the longest row; of a row padded within the last block both are the same
    )
    if (length - 4) // 4 == (length - 1) // 4:
        theirs, ours = case.theirs_on(ids, attention_mask=mask), case.ours(ids, mask)
        assert close(ours.logits[mask.bool()], theirs.logits[mask.bool()])


@torch.no_grad()
def test_r5_a_short_text_leaves_nothing_behind(case: Case):
    """In transformers a batch of at most 28 tokens turns the model dense for good: the same text then differs."""
    long, short = tokens(1, 40, seed=3), tokens(1, 12, seed=4)
    theirs = case.theirs_on(long).logits
    assert not close(theirs, [case.theirs(short), case.theirs(long).logits][1], 1e-3)
    before = case.ours(long).logits
    case.ours(short)
    assert torch.equal(before, case.ours(long).logits)
    ids = torch.cat([long, torch.full((1, 40), 5)])  # beside a longer text, and as one of two packed documents
    ids[1, :12], mask = short[0], torch.ones(2, 40, dtype=torch.int64)
    mask[1, 12:] = 0
    assert close(case.ours(ids, mask).logits[0], before[0])
    assert close(case.ours(ids, mask).logits[1, :12], case.ours(short).logits[0])
    packed = case.ours(torch.cat([long, short], dim=1), document_ids=torch.tensor([[0] * 40 + [1] * 12]))
    assert close(packed.logits[:, :40], before) and close(packed.logits[:, 40:], case.ours(short).logits)


# Heads


ANSWERS = Row("bigbird-answers", "BigBirdForQuestionAnswering", "BigBirdConfig", LONG | {"sep_token_id": 3})


def asked(length: int, *ends: int) -> torch.Tensor:
    """(1, length) ids with a separator in some columns."""
    ids = tokens(1, length, seed=length)
    ids[0, list(ends)] = 3
    return ids


def spans(out: Any) -> torch.Tensor:
    return torch.stack([out.start_logits, out.end_logits], dim=-1)


@pytest.mark.parametrize("ends", [(5, 11), (5,), (0,), ()], ids=str)
@pytest.mark.parametrize("length", [13, 41], ids=["dense", "sparse"])
@torch.no_grad()
def test_a_question_is_no_answer_and_a_segment_of_its_own(cases: Cases, length: int, ends: tuple[int, ...]):  # noqa: F811
    case, ids = cases(ANSWERS), asked(length, *ends)
    question = torch.arange(length) <= (ends[0] if ends else 0)
    allowed = ~question | (torch.arange(length) == 0)
    theirs = spans(case.theirs_on(ids))
    ours = case.ours(ids).logits
    assert ours is not None and close(ours[:, allowed], theirs[:, allowed])
    # One that is lowered by a million has lost all but a sixteenth: 2^-4 is the step of float32 there.
    lowered = torch.where(allowed[:, None], 0, ours), torch.where(allowed[:, None], 0, theirs)
    assert bool((ours[:, ~allowed] < -9e5).all()) and close(*lowered, 1.3e-7)
    told = {"token_type_ids": torch.ones_like(ids)}
    other = case.ours(ids, **told).logits
    assert other is not None and close(other[:, allowed], spans(case.theirs_on(ids, **told))[:, allowed])
    assert not close(other[:, allowed], ours[:, allowed], 1e-3)


@torch.no_grad()
def test_questions_of_packed_and_padded_texts_are_their_own(cases: Cases):  # noqa: F811
    case, texts = cases(ANSWERS), [asked(13, 5), asked(9, 2, 6), asked(7)]
    alone = [case.ours(text).logits for text in texts]
    documents = torch.tensor([[0] * 13 + [1] * 9 + [2] * 7])
    packed = case.ours(torch.cat(texts, dim=1), document_ids=documents).logits
    ids, mask = torch.full((3, 16), 3), torch.zeros(3, 16, dtype=torch.int64)  # separators where there is no token
    for i, text in enumerate(texts):
        ids[i, 2 : 2 + text.shape[1]], mask[i, 2 : 2 + text.shape[1]] = text[0], 1
    padded, start = case.ours(ids, mask).logits, 0
    for i, one in enumerate(alone):
        length = one.shape[1]
        for both in (packed[:, start : start + length], padded[i : i + 1, 2 : 2 + length]):
            open = one > -9e5
            assert close(torch.where(open, both, 0), torch.where(open, one, 0))
            assert torch.equal(both > -9e5, open)
        start += length


def test_answers_need_two_segments():
    said = {"model_type": "big_bird", **LONG, "architectures": ["BigBirdForQuestionAnswering"], "type_vocab_size": 1}
    with pytest.raises(ValueError, match="type_vocab_size is 1"):
        family("big_bird").spec(Fields(said))
    assert family("big_bird").spec(Fields(said | {"sep_token_id": -1})).labels.after is None  # pyright: ignore


@torch.no_grad()
def test_choices_are_rows(cases: Cases):  # noqa: F811
    """Transformers takes (questions, choices, length); here questions times choices are rows, with one score each."""
    case = cases(Row("bigbird-choices", "BigBirdForMultipleChoice", "BigBirdConfig", LONG))
    for length in (12, 40):
        ids = tokens(6, length, seed=length).view(2, 3, length)
        again(case.theirs)
        theirs = case.theirs(ids).logits
        ours = case.ours(ids.flatten(0, 1)).logits
        assert ours is not None and ours.shape == (6, 1) and close(ours.view(2, 3), theirs)


# A decoder


@torch.no_grad()
def test_a_decoder_is_causal_and_dense_whatever_its_file_says(cases: Cases):  # noqa: F811
    """With "block_sparse", transformers is causal up to 28 tokens; from there on its tokens see later ones, and ours do
    not."""
    case = cases(Row("causal-sparse", "BigBirdForCausalLM", "BigBirdConfig", LONG | {"is_decoder": True}))
    ids = tokens(2, 40, seed=5)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] - 3) % 90 + 4
    assert close(case.ours(ids[:, :28]).logits, case.theirs_on(ids[:, :28]).logits)
    assert not torch.equal(case.theirs_on(ids).logits[:, :20], case.theirs_on(changed).logits[:, :20])
    assert torch.equal(case.ours(ids).logits[:, :39], case.ours(changed).logits[:, :39])
    full = copy.deepcopy(case.theirs)
    full.bert.set_attention_type("original_full")
    assert close(case.ours(ids).logits, full(ids).logits)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"architectures": ["BigBirdForCausalLM"]}, "is_decoder is not true, so tokens of this BigBirdForCausalLM"),
        ({"is_decoder": True}, "is_decoder is True; only False"),
        ({"architectures": ["BigBirdForCausalLM"], "is_decoder": True, "add_cross_attention": True}, "add_cross_att"),
        ({"architectures": ["BigBirdForPairs"]}, "known here: BigBird with Model, .*ForMultipleChoice, ForCausalLM"),
        ({"use_bias": False}, "use_bias is False"),
        ({"attention_type": "sparse"}, "attention_type is 'sparse'"),
    ],
)
def test_what_is_not_built_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        family("big_bird").spec(Fields({"model_type": "big_bird", **LONG, **fields}))


def test_sizes_of_blocks_that_make_no_sense_are_refused():
    for wrong in ({"size": 0}, {"repeats": -1}):
        with pytest.raises(LaminaError, match="must be 1 or more, repeats=-?[0-9]+ 0 or more"):
            BigBirdSpec(heads=1, head_dim=2, **wrong)


@pytest.mark.parametrize("name, kind", [("bert", "BertForCausalLM"), ("roberta", "RobertaForCausalLM")])
def test_layouts_of_others_do_not_take_decoders(name: str, kind: str):
    with pytest.raises(ValueError, match="known here"):
        family(name).spec(Fields({"architectures": [kind]}))


@pytest.mark.parametrize("dropout", [0.1, 0.3])
def test_each_field_reaches_its_part(dropout: float):
    said = {"model_type": "big_bird", **LONG, "hidden_dropout_prob": dropout, "classifier_dropout": 0.7}

    def made(kind: str) -> ModelSpec:
        return family("big_bird").spec(Fields(said | {"architectures": [f"BigBird{kind}"]}))

    sequence, choice, span = (
        made(f"For{kind}") for kind in ("SequenceClassification", "MultipleChoice", "QuestionAnswering")
    )
    assert sequence.pooler == PoolerSpec(dropout=0.7, act="gelu_tanh")
    assert sequence.labels == LabelHeadSpec(labels=2, dropout=0.7)
    assert choice.pooler == PoolerSpec() and choice.labels == LabelHeadSpec(labels=1, task="choice", dropout=dropout)
    assert span.labels is not None and span.labels.step is not None and span.pooler is None
    assert span.labels.step.dropout == dropout and span.labels.after == 2
    assert span.labels.step.feedforward.hidden == 50 and span.labels.step.norm == LayerNormSpec(eps=1e-12)


# BigBird-Pegasus


PAIR = Row("pegasus-long", "BigBirdPegasusForConditionalGeneration", "BigBirdPegasusConfig",
           PEGASUS | {"block_size": 4, "max_position_embeddings": 64, "use_bias": True})  # fmt: skip


@pytest.mark.parametrize("length", [9, 29, 40, 47])
@torch.no_grad()
def test_long_sources_are_read_as_transformers_does(cases: Cases, length: int):  # noqa: F811
    case, text = cases(PAIR), tokens(2, 6, seed=2)
    source, mask = tokens(2, length, seed=1), torch.ones(2, length, dtype=torch.int64)
    for padding in (0, 3):
        mask[1, length - padding :] = 0
        if (length - 1 - padding) // 4 < (length - 1) // 4 and length > 28:
            continue  # their blocks are those of the longest row
        again(case.theirs)
        theirs = case.theirs(source, mask, decoder_input_ids=text)
        for backend in (None, *ON_THE_CPU):
            ours = case.ours(source, mask, decoder_input_ids=text, backend=backend)
            assert ours.logits is not None and ours.encoder_output is not None and close(ours.logits, theirs.logits)
            real = mask.bool()
            assert close(ours.encoder_output[real], theirs.encoder_last_hidden_state[real])
    mask[1, -3:] = 1
    again(case.theirs)
    written = case.theirs.generate(source, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert torch.equal(lamina.generate(case.ours, source, mask, max_new_tokens=9, min_new_tokens=9), written)


@torch.no_grad()
def test_each_source_of_a_pack_has_the_form_of_its_own_length(cases: Cases):  # noqa: F811
    case = cases(PAIR)
    sources, texts = [tokens(1, n, seed=n) for n in (41, 12)], [tokens(1, n, seed=n) for n in (5, 4)]
    alone = torch.cat([case.ours(s, decoder_input_ids=t).logits for s, t in zip(sources, texts, strict=True)], dim=1)
    packed = case.ours(
        torch.cat(sources, dim=1),
        document_ids=torch.tensor([[0] * 41 + [1] * 12]),
        decoder_input_ids=torch.cat(texts, dim=1),
        decoder_document_ids=torch.tensor([[0] * 5 + [1] * 4]),
    )
    assert close(packed.logits, alone)


@torch.no_grad()
def test_a_classifier_of_pairs_is_that_of_transformers(cases: Cases, tmp_path: Path):  # noqa: F811
    fields = PEGASUS | {"num_labels": 3, "classifier_dropout": 0.25}
    case = cases(Row("pegasus-sequence", "BigBirdPegasusForSequenceClassification", "BigBirdPegasusConfig", fields))
    ids = tokens(2, 12, seed=4).clamp(4, 95)
    ids[:, -1] = 96  # labels are of the last end
    again(case.theirs)
    assert close(case.ours(ids).logits, case.theirs(ids).logits)
    lamina.save(case.ours, tmp_path / "out")
    assert same_files(case.folder, tmp_path / "out") == []
    lamina.save(case.ours.spec.build(), tmp_path / "new")
    assert lamina.spec(tmp_path / "new") == case.ours.spec


@torch.no_grad()
def test_a_decoder_of_pairs_by_itself_reads_what_it_is_given(cases: Cases, tmp_path: Path):  # noqa: F811
    case = cases("pegasus-bigbird-decoder")
    memory = torch.randn(2, 6, 36, generator=torch.Generator().manual_seed(4))
    theirs = case.theirs(case.ids, encoder_hidden_states=memory).logits
    assert close(case.ours(case.ids, encoder_output=memory).logits, theirs)
    assert case.ours.spec.head is not None and not case.ours.spec.head.tied  # though its file says that it is
    lamina.save(case.ours.spec.build(), tmp_path / "new")
    assert load_file(tmp_path / "new/model.safetensors").keys() == load_file(case.folder / "model.safetensors").keys()


@pytest.mark.parametrize("name", ["bigbird-sequence", "bigbird-choice", "bigbird-span", "causal-bigbird",
                                  "pegasus-bigbird-biased", "pegasus-bigbird-bare"])  # fmt: skip
def test_new_files_hold_what_those_of_transformers_hold(cases: Cases, name: str, tmp_path: Path):  # noqa: F811
    case = cases(name)
    new = case.ours.spec.build()
    if new.head is not None and new.head.bias is not None:
        torch.nn.init.ones_(new.head.bias)  # of zeros, as it begins, a file cannot say that it is one
    lamina.save(new, tmp_path / "new")
    assert load_file(tmp_path / "new/model.safetensors").keys() == load_file(case.source / "model.safetensors").keys()
    assert lamina.spec(tmp_path / "new") == case.ours.spec


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention_type": "sparse"}, "attention_type is 'sparse'"),
        ({"architectures": ["BigBirdPegasusForTokenClassification"]}, "known here: BigBirdPegasus with ForCond"),
        ({"d_model": 30, "decoder_attention_heads": 7}, "d_model=30 is not a multiple"),
    ],
)
def test_what_bigbird_pegasus_does_not_have_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        family("bigbird_pegasus").spec(Fields({"model_type": "bigbird_pegasus", **fields}))


def test_each_field_of_bigbird_pegasus_reaches_its_part():
    said = {"dropout": 0.2, "attention_dropout": 0.3, "activation_dropout": 0.4, "encoder_layers": 1}
    spec = family("bigbird_pegasus").spec(Fields({"model_type": "bigbird_pegasus", **said, "decoder_layers": 1}))
    assert spec.embedding == EmbeddingSpec(vocabulary=96103, scale="root", padding=0)
    assert spec.special == SpecialTokens(start=2, end=(1,), pad=0, decoder_start=2)
    assert spec.marks == EndBlocks(size=64, short=704)
    assert spec.encoder is not None and spec.decoder is not None
    found = [part for _, part in spec.encoder.walk() if isinstance(part, BigBirdSpec)]
    assert found == [BigBirdSpec(heads=16, head_dim=64, size=64, repeats=3, bias="none", dropout=0.3)]
    for stack, inside in ((spec.encoder, 0.0), (spec.decoder, 0.4)):
        assert stack.dropout == 0.2 and {step.dropout for step in stack.layers[0].steps} == {0.2}
        (feedforward,) = (part for _, part in stack.walk() if isinstance(part, FeedForwardSpec))
        assert feedforward.dropout == inside and feedforward.act == "gelu_tanh"
    config = family("bigbird_pegasus").config
    assert config is not None and config(spec)["activation_dropout"] == 0.4


@torch.no_grad()
def test_the_encoder_of_transformers_passes_activation_dropout_by(cases: Cases):  # noqa: F811
    encoder, source = copy.deepcopy(cases(PAIR).theirs.model.encoder), tokens(1, 9, seed=1)
    for module in encoder.modules():
        if hasattr(module, "activation_dropout"):
            module.activation_dropout = 1.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    assert close(encoder.train()(source).last_hidden_state, encoder.eval()(source).last_hidden_state)


def test_published_sizes_are_those_of_transformers():
    for name in ("bigbird/base", "bigbird/large", "bigbird-pegasus/large"):
        pair = name.startswith("bigbird-pegasus")
        said = family("bigbird_pegasus" if pair else "big_bird").sizes[name]
        with torch.device("meta"):
            if pair:
                theirs = transformers.BigBirdPegasusForConditionalGeneration(transformers.BigBirdPegasusConfig(**said))
            else:
                theirs = transformers.BigBirdModel(transformers.BigBirdConfig(**said))
        ours = lamina.spec(name)
        count = sum(p.numel() for p in ours.build(device="meta").parameters())
        assert count == sum(p.numel() for p in theirs.parameters())
        assert ours.marks == EndBlocks(size=64, short=704)
