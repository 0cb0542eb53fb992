"""BERT, RoBERTa and ALBERT: what real files hold besides what they should, and what decides the head."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lamina
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.families import Fields, family
from lamina.layers import LabelHeadSpec, PoolerSpec
from tests.families import Case, close, rewrite, row, same_files, tokens

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    folder, cases = tmp_path_factory.mktemp("bert"), {}
    return lambda name: cases.setdefault(name, Case(row(name), folder))


def altered(case: Case, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of the directory with other tensors."""
    shutil.copytree(case.source, folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def comes_back(model: lamina.Model, folder: Path) -> bool:
    """Whether saving gives the directory that was loaded, byte for byte."""
    lamina.save(model, folder.parent / "out")
    return same_files(folder, folder.parent / "out") == []


def same_numbers(model: lamina.Model, case: Case) -> bool:
    more = case.segments(case.ids)
    with torch.no_grad():
        one, other = model(case.ids, **more), case.ours(case.ids, **more)
    return torch.equal(one.hidden, other.hidden) and (
        one.logits is other.logits is None or torch.equal(one.logits, other.logits)  # pyright: ignore
    )


def test_old_names_are_read_and_written_back(made: Callable[[str], Case], tmp_path: Path):
    """bert-base-uncased of 2018 and since: LayerNorm.gamma and LayerNorm.beta."""
    case = made("bert-pretraining")

    def old(tensors: Tensors) -> Tensors:
        names = {n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for n in tensors}
        return {names[name]: tensor for name, tensor in tensors.items()}

    folder = altered(case, tmp_path / "in", old)
    assert sum(name.endswith("gamma") for name in load_file(folder / "model.safetensors")) == 8
    model = lamina.load(folder)
    assert same_numbers(model, case) and comes_back(model, folder)


def test_two_names_for_one_tensor_are_refused(made: Callable[[str], Case], tmp_path: Path):
    name = "embeddings.LayerNorm.gamma"
    folder = altered(made("bert"), tmp_path / "in", lambda tensors: tensors | {name: torch.zeros(36)})
    with pytest.raises(CheckpointError, match="are the same tensor, embeddings.LayerNorm.weight"):
        lamina.load(folder)


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "roberta", "roberta-sequence"])
def test_the_buffer_of_position_ids_is_kept(made: Callable[[str], Case], name: str, tmp_path: Path):
    case = made(name)
    prefix = "" if name in ("bert", "roberta") else name.split("-")[0] + "."
    buffer = {f"{prefix}embeddings.position_ids": torch.arange(40)[None]}
    folder = altered(case, tmp_path / "in", lambda tensors: tensors | buffer)
    model = lamina.load(folder)
    assert same_numbers(model, case) and comes_back(model, folder)


HEADS = {
    "bert-mlm": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder", "cls.predictions.bias"),
    "bert-pretraining": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder", "cls.predictions.bias"),
    "roberta-mlm": ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder", "lm_head.bias"),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("stored", ["both", "second"])
def test_a_decoder_stored_twice_or_under_its_other_name(
    made: Callable[[str], Case], name: str, stored: str, tmp_path: Path
):
    case, (table, decoder, bias) = made(name), HEADS[name]

    def change(tensors: Tensors) -> Tensors:
        twins = {f"{decoder}.weight": tensors[table].clone(), f"{decoder}.bias": tensors[bias].clone()}
        kept = {n: t for n, t in tensors.items() if stored == "both" or n not in (table, bias)}
        return kept | twins

    folder = altered(case, tmp_path / "in", change)
    model = lamina.load(folder)
    assert model.spec == case.ours.spec
    assert same_numbers(model, case) and comes_back(model, folder)


def test_a_decoder_that_differs_from_the_embedding_is_kept_apart(made: Callable[[str], Case], tmp_path: Path):
    case = made("bert-mlm")
    table, decoder, bias = HEADS["bert-mlm"]

    def change(tensors: Tensors) -> Tensors:
        return tensors | {f"{decoder}.weight": tensors[table] * 2, f"{decoder}.bias": tensors[bias] * 3}

    with pytest.warns(UserWarning, match="the file holds different values; they are kept apart"):
        model = lamina.load(altered(case, tmp_path / "in", change))
    assert model.spec.head is not None and not model.spec.head.tied
    head = model.get_submodule("head")
    assert torch.equal(head.weight, 2 * model.embedding.weight)
    assert torch.equal(head.bias, 3 * case.ours.get_parameter("head.bias"))


def test_the_file_and_not_its_architectures_decides_the_head(made: Callable[[str], Case], tmp_path: Path):
    """bert-base-uncased says BertForMaskedLM and holds the pre-training heads."""
    case = made("bert-pretraining")
    folder = altered(case, tmp_path / "in", lambda tensors: tensors)
    rewrite(folder, lambda said: said.update(architectures=["BertForMaskedLM"]))
    model = lamina.load(folder)
    assert model.spec == case.ours.spec and comes_back(model, folder)


@pytest.mark.parametrize("name", ["bert-mlm", "roberta-mlm", "roberta-sequence"])
def test_a_pooler_that_the_head_does_not_use_is_kept(made: Callable[[str], Case], name: str, tmp_path: Path):
    """roberta-large-mnli has one beside its classifier."""
    case, prefix = made(name), name.split("-")[0]
    pooler = {f"{prefix}.pooler.dense.weight": torch.ones(36, 36), f"{prefix}.pooler.dense.bias": torch.ones(36)}
    folder = altered(case, tmp_path / "in", lambda tensors: tensors | pooler)
    model = lamina.load(folder)
    assert model.spec == case.ours.spec
    assert same_numbers(model, case) and comes_back(model, folder)


def test_an_encoder_may_bear_the_prefix_of_a_model_with_a_head(made: Callable[[str], Case], tmp_path: Path):
    case = made("bert")
    folder = altered(case, tmp_path / "in", lambda tensors: {f"bert.{name}": t for name, t in tensors.items()})
    model = lamina.load(folder)
    assert same_numbers(model, case) and comes_back(model, folder)


def test_label_names_survive_a_change_of_dtype(made: Callable[[str], Case], tmp_path: Path):
    case = made("bert-sequence")
    model = lamina.load(case.source, dtype=torch.bfloat16)
    lamina.save(model, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["dtype"] == "bfloat16"
    assert said["id2label"] == {"0": "north", "1": "east", "2": "south"} and len(said["label2id"]) == 3
    assert lamina.load(tmp_path / "out").spec == case.ours.spec


@pytest.mark.parametrize("name, labels", [("bert", 2), ("bert-sequence", 5)])
@torch.no_grad()
def test_a_head_that_was_gained_is_said(name: str, labels: int, made: Callable[[str], Case], tmp_path: Path):
    """The old text, of a bare encoder or of three named labels, would be true of these tensors to us, and to nobody
    else: transformers has to find every weight, and the scores have to be ours."""
    case = made(name)
    assert case.ours.spec.encoder is not None
    head = LabelHeadSpec(labels=labels, dropout=case.ours.spec.encoder.dropout)  # as the old text would have it
    model = case.ours.spec.replace(labels=head).build(seed=1).eval()
    kept = {one: tensor for one, tensor in case.ours.state_dict().items() if not one.startswith("labels.")}
    assert all(one.startswith("labels.") for one in model.load_state_dict(kept, strict=False).missing_keys)
    model.origin = case.ours.origin
    lamina.save(model, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["architectures"] == ["BertForSequenceClassification"] and "id2label" not in said
    read: Any = transformers.BertForSequenceClassification.from_pretrained
    theirs, found = read(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    ours = model(case.ids, **case.segments(case.ids)).label_logits
    assert ours is not None and ours.shape[-1] == labels
    assert close(ours, theirs.eval()(case.ids, **case.segments(case.ids)).logits)
    assert lamina.load(tmp_path / "out").spec == model.spec


def test_a_head_that_was_lost_is_not_said(made: Callable[[str], Case], tmp_path: Path):
    case = made("bert-sequence")
    model = case.ours.spec.replace(labels=None).build(device="meta")
    kept = {name: tensor for name, tensor in case.ours.state_dict().items() if not name.startswith("labels.")}
    model.load_state_dict(kept, assign=True)
    model.origin = case.ours.origin
    lamina.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["BertModel"]


@pytest.mark.parametrize("name, rate", [("bert", 0.25), ("albert", 0.25), ("roberta", 0.1)])
@torch.no_grad()
def test_choices_are_rows(name: str, rate: float, made: Callable[[str], Case]):
    """Three choices for each of two questions: six rows with a score each. RoBERTa knows no rate for it."""
    case = made(f"{name}-choice")
    assert case.ours.spec.labels == LabelHeadSpec(labels=1, task="choice", dropout=rate)
    ids, mask = tokens(6, 11, seed=3), torch.ones(6, 11, dtype=torch.int64)
    mask[[1, 4], 7:], mask[2, 9:] = 0, 0
    ids = torch.where(mask.bool(), ids, case.theirs.config.pad_token_id)
    segments = case.segments(ids)
    told = {key: one.view(2, 3, 11) for key, one in (segments | {"attention_mask": mask}).items()}
    theirs = case.theirs(ids.view(2, 3, 11), **told).logits
    ours = case.ours(ids, mask, **segments).logits
    assert ours is not None and ours.shape == (6, 1) and close(ours.view(2, 3), theirs)


def test_a_choice_has_one_score_of_what_is_pooled():
    for kind in ("Bert", "Roberta", "Longformer"):  # without a file the class decides
        said = {"num_hidden_layers": 2, "architectures": [f"{kind}ForMultipleChoice"], "id2label": {"0": "a", "1": "b"}}
        spec = family(kind.lower()).spec(Fields(said))
        assert spec.pooler == PoolerSpec() and spec.labels == LabelHeadSpec(labels=1, task="choice", dropout=0.1)
    with pytest.raises(LaminaError, match="labels=2 must be 1: each choice is a row"):
        LabelHeadSpec(labels=2, task="choice")


@pytest.mark.parametrize(
    "said, labels",
    [({}, 2), ({"num_labels": 7}, 7), ({"id2label": {"0": "a", "1": "b", "2": "c"}}, 3), ({"id2label": {}}, 2)],
)
def test_the_number_of_labels(said: dict[str, Any], labels: int):
    architectures = ["BertForSequenceClassification"]
    spec = family("bert").spec(Fields({"num_hidden_layers": 2, "architectures": architectures, **said}))
    assert spec.labels is not None and spec.labels.labels == labels


@pytest.mark.parametrize(
    "said, message",
    [
        ({"architectures": ["BertLMHeadModel"]}, "BertLMHeadModel.*known here: Bert with Model"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; only 'absolute'"),
        ({"is_decoder": True}, "is_decoder is True; only False"),
        ({"num_attention_heads": 7}, "hidden_size=768 is not a multiple of num_attention_heads=7"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; known here: relu, gelu"),
        ({"num_labels": 0, "architectures": ["BertForTokenClassification"]}, "num_labels is 0"),
        ({"pad_token_id": 30522}, "hold padding=30522"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(said: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        family("bert").spec(Fields({"num_hidden_layers": 2, **said}))


def test_roberta_counts_positions_from_its_padding(made: Callable[[str], Case]):
    spec = made("roberta-mlm").ours.spec
    assert spec.encoder is not None and spec.encoder.position is not None
    assert spec.special.pad == 3 and spec.encoder.position.offset == 4  # pyright: ignore
    assert spec.context == 36  # of 40 rows
    with pytest.raises(ValueError, match="pad_token_id is null"):
        family("roberta").spec(Fields({"num_hidden_layers": 2, "pad_token_id": None}))


@torch.no_grad()
def test_a_batch_padded_on_the_right_is_that_of_transformers(made: Callable[[str], Case]):
    """RoBERTa finds its positions in the ids, and BERT's pooler looks at the first column."""
    for name in ("bert", "roberta", "roberta-sequence"):
        case = made(name)
        ids, mask = case.ids.clone(), torch.ones_like(case.ids)
        mask[0, 6:] = 0
        ids[0, 6:] = case.ours.spec.special.pad or 0
        more = case.segments(ids)
        theirs, ours = case.theirs(ids, mask, **more), case.ours(ids, mask, **more)
        if name == "roberta-sequence":
            assert close(ours.logits, theirs.logits)
            continue
        seen = mask.bool()
        assert close(ours.hidden[seen], theirs.last_hidden_state[seen])
        assert close(ours.pooled, theirs.pooler_output)


@pytest.mark.parametrize("name", ["bert", "roberta-mlm"])
def test_the_padding_row_gets_no_gradient_from_the_input(made: Callable[[str], Case], name: str):
    model = copy.deepcopy(made(name).ours)
    pad = model.spec.special.pad
    ids = torch.tensor([[5, 6, 7, pad]])
    model(ids).hidden.square().sum().backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None and not gradient[pad].any() and gradient[5].any()


def test_dropout_works_in_training_only(made: Callable[[str], Case]):
    case = made("bert-sequence")
    model = copy.deepcopy(case.ours).train()
    torch.manual_seed(0)
    one, other = (model(case.ids).logits for _ in range(2))
    assert not torch.equal(one, other)
    model.eval()
    assert torch.equal(model(case.ids).logits, model(case.ids).logits)


def test_heads_that_the_layout_has_no_word_for_are_refused(made: Callable[[str], Case], tmp_path: Path):
    spec = made("bert-mlm").ours.spec.replace(pooler=PoolerSpec(), labels=LabelHeadSpec(labels=4))
    model = spec.build()
    with pytest.raises(UnsupportedError, match="not exportable .*labels are of a sequence beside a language head"):
        lamina.save(model, tmp_path / "out")
    lamina.save(model, tmp_path / "out", format="native")
    assert lamina.load(tmp_path / "out").spec == spec


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"inner_group_num": 2}, "inner_group_num is 2; only 1 is supported"),
        ({"num_hidden_layers": 12, "num_hidden_groups": 5}, "=12 is not a multiple of num_hidden_groups=5"),
        ({"embedding_size": 0}, "embedding_size is 0"),
        ({"architectures": ["AlbertForCausalLM"]}, "known here: Albert with Model"),
    ],
)
def test_an_albert_that_cannot_be_read_is_refused_by_name(said: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        family("albert").spec(Fields(said))


def test_an_albert_has_one_layer_a_group_and_its_own_defaults():
    spec = family("albert").spec(
        Fields({"architectures": ["AlbertForPreTraining"], "id2label": {0: "a", 1: "b", 2: "c"}})
    )
    stack, head, labels = spec.encoder, spec.head, spec.labels
    assert stack is not None and head is not None and head.transform is not None and labels is not None
    assert (len(stack.layers), stack.repeat, stack.input_width, head.transform.width) == (1, 12, 128, 128)
    assert (labels.labels, labels.dropout, stack.dropout) == (3, 0.1, 0.0)
    given = {"hidden_dropout_prob": 0.3, "classifier_dropout_prob": None, "num_hidden_groups": 4}
    spec = family("albert").spec(Fields(given | {"architectures": ["AlbertForTokenClassification"]}))
    assert spec.labels is not None and spec.labels.dropout == 0.3  # as the library that writes these files has it
    assert spec.encoder is not None and (len(spec.encoder.layers), spec.encoder.repeat) == (4, 3)


def test_what_albert_has_no_word_for_is_refused(made: Callable[[str], Case], tmp_path: Path):
    spec = made("albert-mlm").ours.spec
    assert spec.encoder is not None
    wide = spec.replace(head=None, encoder=spec.encoder.replace(input_width=None))
    with pytest.raises(UnsupportedError, match="not exportable"):
        lamina.save(wide.build(), tmp_path / "out")
    alone = spec.replace(head=None, pooler=PoolerSpec(), labels=LabelHeadSpec(labels=2, task="next_sentence"))
    with pytest.raises(UnsupportedError, match="not exportable"):
        lamina.save(alone.build(), tmp_path / "out")
