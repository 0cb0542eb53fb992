"""BART: a bias of the logits that is a buffer, tables under several names, ids that generation is forced to begin and
end with, and a decoder by itself that reads what it is given."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lamina
from lamina.errors import CheckpointError
from lamina.families import Fields, family
from lamina.layers import AttentionSpec, CrossAttentionSpec, FeedForwardSpec
from tests.families import BART, Case, Row, close, row, same_files, tokens
from tests.test_families_t5 import Change, Made, altered, comes_back, same_numbers

BIAS = "final_logits_bias"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, cases = tmp_path_factory.mktemp("bart"), {}
    return lambda name: cases.setdefault(name, Case(row(name), folder))


def test_a_bias_of_zeros_is_kept_and_one_that_is_not_is_the_heads(made: Made, tmp_path: Path):
    plain, biased = made("bart"), made("bart-biased")
    for case, bias in ((plain, False), (biased, True)):
        assert case.ours.spec.head is not None and case.ours.spec.head.bias is bias
        assert (BIAS in case.ours.origin.extras) is not bias
    assert biased.ours.head is not None and biased.ours.head.bias is not None
    assert torch.equal(biased.ours.head.bias, biased.theirs.final_logits_bias[0])
    lamina.save(plain.ours.spec.build(), tmp_path / "new")  # transformers asks for it in every file
    written = load_file(tmp_path / "new/model.safetensors")[BIAS]
    assert written.shape == (1, 97) and not written.any()
    lamina.save(made("bart-bare").ours.spec.build(), tmp_path / "bare")
    assert BIAS not in load_file(tmp_path / "bare/model.safetensors")


def test_files_of_2020_hold_every_table_under_each_of_its_names(made: Made, tmp_path: Path):
    case = made("bart")

    def old(tensors: Change) -> Change:
        table = tensors["model.shared.weight"]
        names = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
        return tensors | {name: table.clone() for name in names} | {"model.encoder.version": torch.ones(1)}

    said = {"normalize_before": False, "extra_pos_embeddings": 2, "add_final_layer_norm": False}
    folder = altered(case, tmp_path / "in", old, **said)
    model = lamina.load(folder)
    assert model.spec == case.ours.spec and same_numbers(model, case) and comes_back(model, folder)


@torch.no_grad()
def test_a_head_of_its_own_is_written_with_both_tables_so_that_transformers_does_not_make_them_up(
    made: Made, tmp_path: Path
):
    spec = made("bart").ours.spec
    assert spec.head is not None
    model = spec.replace(head=spec.head.replace(tied=False)).build(seed=3).eval()
    lamina.save(model, tmp_path / "out")
    kind = transformers.BartForConditionalGeneration
    theirs, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    source, text = tokens(2, 9, seed=1), tokens(2, 5, seed=2)
    assert close(model(source, decoder_input_ids=text).logits, theirs(source, decoder_input_ids=text).logits)  # pyright: ignore
    again = lamina.load(tmp_path / "out")
    assert again.spec == model.spec
    lamina.save(again, tmp_path / "again")
    assert same_files(tmp_path / "out", tmp_path / "again") == []


@torch.no_grad()
def test_a_decoder_by_itself_reads_what_it_is_given(made: Made):
    case = made("bart-decoder")
    memory = torch.randn(2, 6, 36, generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    theirs = case.theirs(case.ids, encoder_hidden_states=memory, encoder_attention_mask=mask).logits
    ours = case.ours(case.ids, encoder_output=memory).logits
    assert ours is not None and close(ours[:1], theirs[:1])
    alone = case.ours(case.ids[1:], encoder_output=memory[1:, :4]).logits
    assert alone is not None and close(alone, theirs[1:])
    without = case.ours(case.ids).logits
    assert without is not None and not close(ours, without, 1e-3)


@pytest.mark.parametrize("forced", [(None, 2), (7, None), (7, 9)], ids=str)
def test_the_first_and_the_last_id_are_those_that_the_checkpoint_forces(
    made: Made, forced: tuple[int | None, int | None], tmp_path: Path
):
    case, (first, last) = made("bart"), forced
    folder = altered(case, tmp_path / "in", lambda tensors: tensors)
    said = json.loads((folder / "generation_config.json").read_text())
    said |= {"forced_bos_token_id": first, "forced_eos_token_id": last}
    (folder / "generation_config.json").write_text(json.dumps(said))
    ours, theirs = lamina.load(folder), transformers.BartForConditionalGeneration.from_pretrained(folder).eval()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    # What the user has begun with is longer in the second run: then nothing is forced to come first.
    for begun in (None, torch.tensor([[3, 9], [3, 10]])):
        written = lamina.generate(ours, case.ids, decoder_input_ids=begun, **settings)
        assert torch.equal(written, theirs.generate(case.ids, decoder_input_ids=begun, do_sample=False, **settings))
        assert (written[:, 1] == 7).all() == (first == 7 and begun is None)
        assert last is None or (written[:, -1] == last).all()


def test_what_is_forced_is_read_from_the_configuration_where_there_is_nothing_else(made: Made, tmp_path: Path):
    """Files of before 2023 have no generation_config.json."""
    case = made("bart")
    folder = altered(case, tmp_path / "in", lambda tensors: tensors)
    (folder / "generation_config.json").unlink()
    model = lamina.load(folder)
    for settings in ({"max_new_tokens": 6}, {"max_new_tokens": 6, "min_new_tokens": 6}):
        assert torch.equal(
            lamina.generate(model, case.ids, **settings), lamina.generate(case.ours, case.ids, **settings)
        )


def test_what_an_index_says_beside_the_places_comes_back(made: Made, tmp_path: Path):
    """Before transformers 5 it did not count the parameters; and a buffer was never one."""
    case = made("bart")
    copy.deepcopy(case.theirs).save_pretrained(tmp_path / "in", max_shard_size="30KB")
    path = tmp_path / "in/model.safetensors.index.json"
    said = json.loads(path.read_text())
    del said["metadata"]["total_parameters"]
    path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
    model = lamina.load(tmp_path / "in")
    assert comes_back(model, tmp_path / "in")
    lamina.save(model.to(torch.bfloat16), tmp_path / "half", shard_size=30_000)  # other bytes: it is counted anew
    again = json.loads((tmp_path / "half/model.safetensors.index.json").read_text())["metadata"]
    assert again["total_size"] < said["metadata"]["total_size"] and "total_parameters" in again


CLASSIFIER = Row("bart-sequence", "BartForSequenceClassification", "BartConfig",
                 BART | {"num_labels": 3, "classifier_dropout": 0.25})  # fmt: skip
END = 96


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(CLASSIFIER, tmp_path_factory.mktemp("bart-sequence"))


def ended(length: int, seed: int) -> torch.Tensor:
    """(1, length) ids of two sentences, an end after each: labels are of the last one."""
    ids = tokens(1, length, seed=seed).clamp(4, END - 1)
    ids[0, [length // 2, length - 1]] = END
    return ids


def test_a_classifier_reads_its_source_again_one_place_on(classifier: Case):
    """Ids alone are enough, as in transformers; padding on either side and packing change nothing here."""
    texts = [ended(11, 1), ended(7, 2)]
    with torch.no_grad():
        alone = torch.cat([classifier.theirs(text).logits for text in texts])
        for text, expected in zip(texts, alone):
            assert close(classifier.ours(text).logits[0], expected)
        filled, packed = torch.full((1, 4), 1), torch.cat(texts, dim=1)
        for order in (1, -1):
            short = torch.cat([texts[1], filled][::order], dim=1)
            mask = torch.cat([torch.ones_like(texts[1]), 0 * filled][::order], dim=1)
            ids, mask = torch.cat([texts[0], short]), torch.cat([torch.ones_like(texts[0]), mask])
            assert close(classifier.ours(ids, mask).logits, alone)
            if order == 1:
                assert close(classifier.theirs(ids, mask).logits, alone)
        documents = torch.tensor([[0] * 11 + [1] * 7])
        hidden = classifier.ours(packed, document_ids=documents).hidden
        each = torch.cat([classifier.ours(text).hidden for text in texts], dim=1)
        assert close(hidden, each)
        assert not close(classifier.ours(packed).hidden, each)
        given = classifier.ours(texts[0], decoder_input_ids=texts[0]).logits
        assert not close(given, alone[:1])  # who gives the decoder ids of his own is taken at his word


def test_a_classifier_has_the_gradients_of_transformers(classifier: Case):
    ours, theirs, text = copy.deepcopy(classifier.ours), copy.deepcopy(classifier.theirs), ended(9, 3)
    for model in (ours, theirs):
        torch.nn.functional.cross_entropy(model(text).logits, torch.tensor([2])).backward()
    pairs = (
        (ours.pooler.dense.weight, theirs.classification_head.dense.weight),
        (ours.labels.dense.weight, theirs.classification_head.out_proj.weight),
        (ours.embedding.weight, theirs.model.shared.weight),
        (ours.encoder.layers[0].attention.op.q.weight, theirs.model.encoder.layers[0].self_attn.q_proj.weight),
        (ours.decoder.layers[1].cross.op.v.weight, theirs.model.decoder.layers[1].encoder_attn.v_proj.weight),
    )
    for mine, other in pairs:
        assert close(mine.grad, other.grad, 1e-4)


def test_a_classifier_comes_back_and_a_new_one_opens_in_transformers(classifier: Case, tmp_path: Path):
    assert comes_back(classifier.ours, classifier.folder)
    fresh = classifier.ours.spec.build(seed=3)
    lamina.save(fresh, tmp_path / "fresh")
    assert lamina.spec(tmp_path / "fresh") == classifier.ours.spec
    again, said = transformers.BartForSequenceClassification.from_pretrained(
        tmp_path / "fresh", output_loading_info=True
    )
    assert not said["missing_keys"] and not said["unexpected_keys"] and again.config.num_labels == 3
    with torch.no_grad():
        assert close(fresh.eval()(ended(8, 5)).logits, again.eval()(ended(8, 5)).logits)
    torch.manual_seed(0)
    fresh.train()
    assert not torch.equal(fresh(ended(8, 5)).logits, fresh(ended(8, 5)).logits)  # dropout before both matrices


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"normalize_before": True}, "normalize_before is True"),
        ({"static_position_embeddings": True}, "static_position_embeddings is True"),
        ({"extra_pos_embeddings": 1}, "extra_pos_embeddings is 1"),
        ({"d_model": 30, "decoder_attention_heads": 7}, "d_model=30 is not a multiple of .*_attention_heads=16"),
        ({"architectures": ["BartForTokenClassification"]}, "known here: Bart with ForConditionalGeneration"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        family("bart").spec(Fields({"model_type": "bart", **fields}))


def test_each_field_reaches_its_part():
    said = {"dropout": 0.2, "attention_dropout": 0.3, "activation_dropout": 0.4, "pad_token_id": 7, "encoder_layers": 1}
    spec = family("bart").spec(Fields({"model_type": "bart", **said, "decoder_layers": 1}))
    assert spec.embedding.padding == 7
    for stack, steps in ((spec.encoder, 2), (spec.decoder, 3)):
        assert stack is not None and stack.dropout == 0.2 and stack.output_dropout == 0.0
        (layer,) = stack.layers
        assert [step.dropout for step in layer.steps] == [0.2] * steps
        inner = [part.dropout for _, part in layer.walk() if isinstance(part, AttentionSpec | CrossAttentionSpec)]
        assert inner == [0.3] * (steps - 1)
        assert [part.dropout for _, part in layer.walk() if isinstance(part, FeedForwardSpec)] == [0.4]


def test_tables_of_the_stacks_that_differ_are_refused(made: Made, tmp_path: Path):
    other = {"model.decoder.embed_tokens.weight": torch.ones(97, 36)}
    folder = altered(made("bart"), tmp_path / "in", lambda tensors: tensors | other)
    with pytest.raises(CheckpointError, match=r"model.decoder.embed_tokens.weight differs from model.shared.weight"):
        lamina.load(folder)
