"""Specs as data: strict JSON both ways, names of what is wrong, edit, diff and walk."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lamina.errors import LaminaError
from lamina.layers import (
    AttentionSpec,
    BranchSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LayerSpec,
    LearnedPositionSpec,
    LongRopeScaling,
    RMSNormSpec,
    RotarySpec,
    StackSpec,
    StepSpec,
    SumSpec,
    YarnScaling,
)
from lamina.model import ModelSpec, SpecialTokens
from lamina.patterns import Causal, Window
from lamina.specs import FORMAT, Spec, diff, edit, nearest, unknown


def layer(window: int | None = None) -> LayerSpec:
    pattern = Causal() if window is None else Causal() & Window(back=window)
    attention = AttentionSpec(heads=4, key_heads=2, head_dim=8, pattern=pattern, rotary=RotarySpec(width=4))
    steps = (
        StepSpec(name="attention", op=attention, pre=RMSNormSpec()),
        StepSpec(name="feedforward", op=FeedForwardSpec(hidden=32), pre=RMSNormSpec()),
    )
    return LayerSpec(steps=steps)


@pytest.fixture
def model() -> ModelSpec:
    return ModelSpec(
        width=32,
        embedding=EmbeddingSpec(vocabulary=100, padding=3),
        decoder=StackSpec(layers=(layer(), layer(), layer(5), layer()), norm=RMSNormSpec(eps=1e-5)),
        head=LanguageHeadSpec(softcap=30.0),
        special=SpecialTokens(start=1, end=(2, 7)),
    )


def test_json_and_back(model: ModelSpec):
    text = model.to_json()
    data = json.loads(text)
    assert ModelSpec.from_json(text) == model and hash(ModelSpec.from_json(text)) == hash(model)
    assert ModelSpec.from_json(text).to_json() == text
    assert data["format"] == FORMAT and data["type"] == "ModelSpec"
    assert Spec.from_json(text) == model


def test_json_writes_every_field(model: ModelSpec):
    def check(data: object) -> None:
        if isinstance(data, dict) and "type" in data:
            (kind,) = [c for c in classes(Spec) if c.__name__ == data["type"]]
            assert set(data) - {"type", "format"} == {field.name for field in dataclasses.fields(kind)}
        for below in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
            check(below)

    check(json.loads(model.to_json()))


def classes(kind: type) -> list[type]:
    return [kind, *(below for child in kind.__subclasses__() for below in classes(child))]


def test_runs_of_equal_layers_are_written_once(model: ModelSpec):
    layers = json.loads(model.to_json())["decoder"]["layers"]
    assert [run["repeat"] for run in layers] == [2, 1, 1]
    many = model.replace(decoder=model.decoder.replace(layers=(layer(),) * 1000))
    assert len(many.to_json()) < 1.5 * len(model.to_json())
    assert ModelSpec.from_json(many.to_json()) == many


def changed(model: ModelSpec, path: str, value: object = ..., name: str | None = None) -> str:
    """The JSON of `model` with the value at `path` replaced, removed (...) or renamed."""
    data = json.loads(model.to_json())
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place = data
    for step in way:
        place = place[step]
    if name is not None:
        place[name] = place.pop(last)
    elif value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("width", ..., "spec: ModelSpec lacks the field 'width'"),
        ("width", "32", "spec: ModelSpec.width is '32'; it must be a whole number"),
        ("width", 32.0, "ModelSpec.width is 32.0; it must be a whole number"),
        ("width", True, "ModelSpec.width is True; it must be a whole number"),
        ("width", None, "ModelSpec.width is None; it must be a whole number"),
        ("width", 0, "width >= 1"),
        ("context", "long", "ModelSpec.context is 'long'; it must be a whole number or None"),
        ("head.tied", 1, "spec.head: LanguageHeadSpec.tied is 1; it must be True or False"),
        ("head.scale", "1", "LanguageHeadSpec.scale is '1'; it must be a finite number"),
        ("head.scale", float("nan"), "LanguageHeadSpec.scale is nan; it must be a finite number"),
        ("head.softcap", float("inf"), "it must be a finite number or None"),
        ("head.scale", 10**400, "it must be a finite number"),
        ("head.scale", [1.0], "it must be a finite number"),
        ("head", {"type": "Sinks", "count": 1}, "it must be a LanguageHeadSpec or None"),
        ("head", {}, "spec.head: unknown type of spec 'None'"),
        ("head", 3, "ModelSpec.head is 3; it must be a LanguageHeadSpec or None"),
        ("head.type", "LanguageHeadSpek", "did you mean 'LanguageHeadSpec'"),
        ("head.type", "Pattern", "unknown type of spec 'Pattern'"),
        ("head.type", "Spec", "unknown type of spec 'Spec'"),
        ("head.type", [], "unknown type of spec"),
        ("special.end", 2, "SpecialTokens.end is 2; it must be a tuple of a whole number"),
        ("special.end", [2, "x"], r"it must be a tuple of a whole number"),
        ("special.end", "ab", "it must be a tuple of a whole number"),
        ("decoder.layers.0.repeat", 0, "spec.decoder.layers.0.repeat is 0; it must be a number from 1 to 10000"),
        ("decoder.layers.0.repeat", 10**9, "must be a number from 1 to 10000"),
        ("decoder.layers.0.repeat", True, "must be a number from 1 to 10000"),
        ("decoder.layers.0.item", 3, "spec.decoder.layers.0 is 3; a spec"),
        ("decoder.layers.0", 3, "StackSpec.layers"),
        ("decoder.layers.0.item.steps.0.item.op.bias", "q", "bias is 'q'; it must be 'none' or 'qkv' or 'all'"),
        ("decoder.layers.0.item.steps.0.item.op.heads", 3, "steps.0.op: heads=3 must be a multiple of key_heads=2"),
        ("decoder.layers.0.item.steps.0.item.op.pattern", "Causal", "it must be a Pattern"),
        ("format", ..., "spec has format None"),
        ("format", FORMAT + 1, f"this lamina reads formats 1 to {FORMAT}"),
        ("format", "1", "spec has format '1'"),
        ("format", True, "spec has format True"),
        ("format", 0, "spec has format 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(model: ModelSpec, path: str, value: object, said: str):
    with pytest.raises(LaminaError, match=said) as caught:
        ModelSpec.from_json(changed(model, path, value))
    assert len(str(caught.value)) < 400


def test_an_unknown_field_names_the_nearest(model: ModelSpec):
    with pytest.raises(LaminaError, match="spec: unknown field of ModelSpec 'widht'; did you mean 'width'"):
        ModelSpec.from_json(changed(model, "width", name="widht"))
    with pytest.raises(
        LaminaError, match=r"spec\.head: unknown field of LanguageHeadSpec 'soft_cap'; did you mean 'softcap'"
    ):
        ModelSpec.from_json(changed(model, "head.softcap", name="soft_cap"))
    with pytest.raises(LaminaError, match="'hiden'; did you mean 'hidden'"):
        FeedForwardSpec(hiden=3)
    with pytest.raises(LaminaError, match="FeedForwardSpec needs hidden="):
        FeedForwardSpec()
    with pytest.raises(LaminaError, match="'epsilon'"):
        RMSNormSpec().replace(epsilon=1e-5)
    with pytest.raises(LaminaError, match=r"known: eps, plus_one, wide_product"):
        RMSNormSpec(zzz=1)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", '"x"', "[" * 5000, '{"format": 1, "format": 1}'])
def test_what_is_no_spec_at_all(text: str):
    with pytest.raises(LaminaError, match="spec"):
        ModelSpec.from_json(text)


def test_no_depth_of_nesting_escapes():
    deep: object = []
    for _ in range(400):
        deep = [deep]
    with pytest.raises(LaminaError):
        ModelSpec.from_json(json.dumps({"format": 1, "type": "SpecialTokens", "start": None, "end": deep, "pad": None}))


def test_a_field_said_twice_is_refused(model: ModelSpec):
    text = model.to_json().replace('"width": 32', '"width": 32, "width": 64')
    with pytest.raises(LaminaError, match="says 'width' twice"):
        ModelSpec.from_json(text)


def test_the_wrong_kind_of_spec(model: ModelSpec):
    with pytest.raises(LaminaError, match="spec is a ModelSpec; a LanguageHeadSpec was expected"):
        LanguageHeadSpec.from_json(model.to_json())


def test_whole_numbers_in_fields_of_finite_numbers_are_one_thing():
    one, other = LanguageHeadSpec(scale=2, softcap=30), LanguageHeadSpec(scale=2.0, softcap=30.0)
    assert one == other and one.to_json() == other.to_json() and diff(one, other) == []
    assert diff(one, LanguageHeadSpec.from_json(one.to_json())) == []
    lists = LongRopeScaling(short=(1, 2.5), long=(4, 5), original=8, factor=4)
    assert all(type(value) is float for value in (*lists.short, *lists.long, lists.factor))
    assert type(lists.original) is int
    assert YarnScaling(factor=2, original=8, attention=1).attention.is_integer()


def test_specs_are_frozen_compare_and_hash():
    one, other = layer(5), layer(5)
    assert one == other and hash(one) == hash(other) and len({one, other, layer()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.steps = ()
    assert Causal() != Window(back=1)
    assert one.replace(steps=one.steps[:1]).steps == one.steps[:1] and len(one.steps) == 2


def test_walk_names_every_spec(model: ModelSpec):
    paths = dict(model.walk())
    assert paths[""] is model and paths["head"] is model.head and paths["decoder.norm"] == RMSNormSpec(eps=1e-5)
    assert paths["decoder.layers.2.steps.0.op.pattern"] == Causal() & Window(back=5)
    assert paths["decoder.layers.2.steps.0.op.pattern.second"] == Window(back=5)
    assert next(iter(model.walk()))[0] == ""
    outer, inner = (list(paths).index(f"decoder.layers.1{more}") for more in ("", ".steps.0.op"))
    assert outer < inner
    assert sum(isinstance(spec, LayerSpec) for spec in paths.values()) == 4


def test_edit_changes_what_it_should(model: ModelSpec):
    seen = []

    def change(path: str, spec: RMSNormSpec) -> RMSNormSpec:
        seen.append(path)
        return spec.replace(eps=1e-3) if path.startswith("decoder.layers.1.") else spec

    new = edit(model, RMSNormSpec, change)
    assert seen == [path for path, spec in model.walk() if isinstance(spec, RMSNormSpec)]
    assert [path for path, *_ in diff(model, new)] == [f"decoder.layers.1.steps.{i}.pre.eps" for i in (0, 1)]
    assert edit(model, RMSNormSpec, lambda path, spec: spec) == model
    normed = edit(model, RMSNormSpec, lambda path, spec: LayerNormSpec(eps=spec.eps))  # another class
    assert normed.decoder.norm == LayerNormSpec(eps=1e-5)
    halved = edit(model, StackSpec, lambda path, spec: spec.replace(layers=spec.layers[:2]))
    assert len(halved.decoder.layers) == 2
    both = edit(model, Window, lambda path, spec: Causal() & spec)  # inner ones first: no loop
    assert both.decoder.layers[2].steps[0].op.pattern.second == Causal() & Window(back=5)


def test_diff_is_what_differs(model: ModelSpec):
    assert diff(model, model) == []
    other = model.replace(width=64, head=None)
    assert diff(model, other) == [("width", 32, 64), ("head", model.head, None)]
    shorter = model.replace(decoder=model.decoder.replace(layers=model.decoder.layers[:3]))
    assert [path for path, *_ in diff(model, shorter)] == ["decoder.layers"]
    windowed = model.replace(decoder=model.decoder.replace(layers=(layer(), layer(), layer(6), layer())))
    assert diff(model, windowed) == [("decoder.layers.2.steps.0.op.pattern.second.back", 5, 6)]
    assert diff(layer(), layer(4))[0][0] == "steps.0.op.pattern"  # another class: the whole of it
    assert diff(1, True) == [("", 1, True)]


def test_names_of_steps_and_branches():
    with pytest.raises(LaminaError, match="two steps of a layer have one name"):
        LayerSpec(steps=(StepSpec(name="a", op=Causal()), StepSpec(name="a", op=Causal())))
    with pytest.raises(LaminaError, match="part of parameter names"):
        StepSpec(name="a.b", op=Causal())
    with pytest.raises(LaminaError, match="two branches of a sum have one name"):
        SumSpec(branches=(BranchSpec(name="a", op=Causal()), BranchSpec(name="a", op=Causal())))
    with pytest.raises(LaminaError, match="at least one"):
        SumSpec(branches=())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: AttentionSpec(heads=3, key_heads=2, head_dim=4),
        lambda: AttentionSpec(heads=2, key_heads=0, head_dim=4),
        lambda: AttentionSpec(heads=2, key_heads=2, head_dim=0),
        lambda: AttentionSpec(heads=2, key_heads=2, head_dim=4, dropout=1.5),
        lambda: AttentionSpec(heads=2, key_heads=2, head_dim=4, rotary=RotarySpec(width=6)),
        lambda: AttentionSpec(heads=2, key_heads=2, head_dim=5, rotary=RotarySpec()),
        lambda: AttentionSpec(heads=2, key_heads=2, head_dim=4, softcap=0.0),
        lambda: FeedForwardSpec(hidden=0),
        lambda: FeedForwardSpec(hidden=1, dropout=-0.1),
        lambda: EmbeddingSpec(vocabulary=0),
        lambda: EmbeddingSpec(vocabulary=4, padding=4),
        lambda: RotarySpec(width=3),
        lambda: RotarySpec(base=1.0),
        lambda: StepSpec(name="a", op=Causal(), dropout=2.0),
        lambda: StepSpec(name="a", op=Causal(), drop_branch=-1.0),
        lambda: LanguageHeadSpec(softcap=-1.0),
        lambda: LearnedPositionSpec(size=0),
        lambda: LearnedPositionSpec(size=4, offset=-1),
    ],
)
def test_fields_that_contradict_each_other_are_refused(wrong):
    with pytest.raises(LaminaError, match="must|needed|>="):
        wrong()


def test_nearest_names():
    assert nearest("causl", ["window", "causal"]) == "causal"
    assert nearest("zzz", ["window"]) is None
    assert unknown("thing", "windo", ["window"]) == "unknown thing 'windo'; did you mean 'window'?"
    assert unknown("thing", "q", [f"name{i}" for i in range(20)]).endswith("name11, ...")
