"""Configurations: every complaint names the file and the line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lamina.document import assign, decode, encode, parse, read, write
from lamina.errors import LaminaError
from lamina.specs import Spec
from lamina.train.specs import TrainSpec


@dataclass(frozen=True, kw_only=True)
class DocumentLeft(Spec):
    NAME = "left"

    size: int = 1


@dataclass(frozen=True, kw_only=True)
class DocumentRight(Spec):
    NAME = "right"

    rate: float
    words: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DocumentPlain(Spec):
    """Without a NAME: a plan calls it by its class, where there is another to choose."""

    side: DocumentLeft | DocumentRight
    alone: DocumentLeft = field(default_factory=DocumentLeft)


@dataclass(frozen=True, kw_only=True)
class DocumentOther(Spec):
    size: int


@dataclass(frozen=True, kw_only=True)
class DocumentChoice(Spec):
    part: DocumentPlain | DocumentOther | None = None
    other: DocumentOther | None = None


@dataclass(frozen=True, kw_only=True)
class DocumentWhole(Spec):
    name: str
    side: DocumentLeft | DocumentRight = field(default_factory=DocumentLeft)
    inner: DocumentLeft = field(default_factory=DocumentLeft)
    count: int | None = None
    mode: Literal["fast", "slow"] = "fast"
    more: dict = field(default_factory=dict)
    on: bool = False


def made(text: str) -> DocumentWhole:
    return decode(DocumentWhole, parse(text, "c.yaml"))


def test_values_as_their_fields_want_them():
    one = made(
        "name: 'no'\nside: {kind: right, rate: 3e-4, words: [a, b]}\ncount: 1e3\nmode: slow\nmore: {a: {b: 1}}\n"
    )
    assert one.name == "no" and one.count == 1000 and one.more == {"a": {"b": 1}} and one.mode == "slow"
    assert one.side == DocumentRight(rate=3e-4, words=("a", "b"))
    assert made("name: x\ncount: null\ninner: {size: 1_000}").inner.size == 1000
    assert decode(DocumentWhole, parse(write(one), "again")) == one


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: x\nsiez: 1\n", r"c.yaml:2: unknown field 'siez'; did you mean 'side'"),
        ("name: x\ninner:\n  size: 2\n  sise: 3\n", r"c.yaml:4: unknown field of inner 'sise'; did you mean 'size'"),
        ("name: no\n", r"c.yaml:1: name is false; text was expected; YAML reads a bare yes, no, on or off so"),
        ("name: 1.10\n", r"c.yaml:1: name is 1.1; text was expected"),
        ("name: x\ncount: 12:30:45\n", 'c.yaml:2: count is "12:30:45"; a whole number or nothing was expected'),
        ("name: x\ncount: 1.5\n", "c.yaml:2: count is 1.5; a whole number or nothing was expected"),
        ("name: x\nside: {kind: middle}\n", r"c.yaml:2: unknown kind of side 'middle'; known: left, right"),
        ("name: x\nside: {size: 2}\n", r"c.yaml:2: side needs a kind: left, right"),
        ("name: x\nside: {kind: right}\n", "c.yaml:2: side needs rate"),
        ("name: x\nside: {kind: right, rate: .nan}\n", r"c.yaml:2: side: DocumentRight.rate is nan"),
        ("name: x\nmode: quick\n", "c.yaml:2: mode is \"quick\"; 'fast' or 'slow' was expected"),
        ("name: x\nname: y\n", "c.yaml:2: name is said twice"),
        ("name: x\non: 1\n", "c.yaml:2: on is 1; true or false was expected"),
        ("name:\n", "c.yaml:1: name is empty; text was expected"),
        ("- 1\n- 2\n", "c.yaml:1: the file is .*; a mapping of fields was expected"),
        ("side: {kind: left}\n", "c.yaml:1: needs name"),
        ("name: [\n", "c.yaml:2: "),
        ("name: !!python/object:os.system x\n", "c.yaml:1: the tag '!!python/object:os.system' is not accepted"),
        ("name: x\nmore: &a {b: *a}\n", "c.yaml:2: "),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, message: str):
    with pytest.raises(LaminaError, match=message):
        made(text)


def test_a_bomb_of_anchors_is_refused_at_once():
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 12)]
    with pytest.raises(LaminaError, match=r"more than 10,000 values, anchors counted each time"):
        parse("\n".join(lines), "bomb.yaml")
    with pytest.raises(LaminaError, match="nests too deeply"):
        parse("[" * 100_000, "deep.yaml")


def test_files(tmp_path: Path):
    def file(name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    base = file("base.yaml", "name: base\ninner: {size: 5}\nside: {kind: left, size: 2}\n")
    top = file("top.yaml", "extends: base.yaml\nname: top\nside: {kind: right, rate: 1}\n")
    found = decode(DocumentWhole, read(top))
    assert found.name == "top" and found.inner.size == 5 and found.side == DocumentRight(rate=1.0)
    assert decode(DocumentWhole, read(base)).name == "base"
    for path, message in {
        file("empty.yaml", ""): "empty.yaml:1: is empty; a mapping of fields was expected",
        file("list.yaml", "- 1"): "list.yaml:1: holds a list; a mapping of fields was expected",
        file("large.yaml", b"a" * 2_000_000): "large.yaml: has 2,000,000 bytes",
        file("binary.yaml", b"name: \xff"): "binary.yaml: is not UTF-8 at byte 6",
        file("self.yaml", "extends: self.yaml"): "self.yaml: extends itself",
        file("one.yaml", "extends: two.yaml"): "extends itself",
        file("two.yaml", "extends: one.yaml"): "extends itself",
        file("lost.yaml", "extends: nowhere.yaml"): "nowhere.yaml: no such file",
        tmp_path / "nothing.yaml": "nothing.yaml: no such file",
        tmp_path: "is no file; a YAML file was expected",
    }.items():
        with pytest.raises(LaminaError, match=message):
            read(path)


@pytest.mark.parametrize(
    "assignment, field, value",
    [
        ("name=y", "name", "y"),
        ("inner.size=7", "inner", DocumentLeft(size=7)),
        ("side={kind: right, rate: 2}", "side", DocumentRight(rate=2.0)),
        ("count=1e2", "count", 100),
        ("name='no'", "name", "no"),
    ],
)
def test_assignments_on_the_command_line(assignment: str, field: str, value: Any):
    document = parse("name: x\ninner: {size: 2}\n", "c.yaml")
    assign(document, assignment)
    assert getattr(decode(DocumentWhole, document), field) == value


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("inner.sise=7", "'inner.sise=7': unknown field of inner 'sise'; did you mean 'size'"),
        ("naem=7", "'naem=7': unknown field 'naem'; did you mean 'name'"),
        ("name", "path=value was expected, as in loop.steps=100"),
        ("name.x=1", "'name.x=1': name is 'x', which has no fields"),
        ("count=two", 'count is "two"; a whole number or nothing was expected'),
    ],
)
def test_assignments_that_fit_nothing(assignment: str, message: str):
    document = parse("name: x\ninner: {size: 2}\n", "c.yaml")

    def changed() -> None:
        assign(document, assignment)
        decode(DocumentWhole, document)

    with pytest.raises(LaminaError, match=message):
        changed()


WHOLE = "model: {size: gpt2/small}\ndata: {train: d, length: 8}\nloop: {steps: 10, batch: 2}\n"


@pytest.mark.parametrize(
    "more, message",
    [
        (
            "model: {size: gpt2/small, source: x}",
            "one of source, size, spec, family says which model it is; here it is source and size",
        ),
        ("model: {source: x, config: {n_layer: 1}}", "config is for size and family; source has its own"),
        ("schedule: {kind: cosine, warmup: -1}", "warmup is -1; a number of steps is 0 or more"),
        ("schedule: {kind: cosine, final: 2}", "final is 2.0; it is a share of the rate, within 0 and 1"),
        ("optimiser: {kind: adamw, rate: 0}", "rate is 0.0; it must be above 0"),
        ("optimiser: {kind: adamw, betas: [0.9]}", r"betas is \[0.9\]; two numbers from 0 to below 1 were expected"),
        (
            "optimiser: {kind: adamw, groups: [{roles: [matrx]}]}",
            "unknown role of a weight 'matrx'; did you mean 'matrix'",
        ),
        ("optimiser: {kind: adam}", "unknown kind of optimiser 'adam'; did you mean 'adamw'"),
        ("loop: {steps: 0, batch: 2}", "steps=0, batch=2 and micro=None must be at least 1"),
        ("loop: {steps: 1, batch: 2, clip: -1}", "clip is -1.0; it must be above 0, or null"),
        ("loop: {steps: 1, batch: 2, average: 1}", "average is 1.0; it must lie between 0 and 1"),
        (
            "loop: {steps: 1, batch: 2, precision: float8}",
            "precision is \"float8\"; 'float32' or 'bfloat16' or 'float16'",
        ),
        ("checkpoints: {keep: 1}", "keep is 1; at least 2 checkpoints are kept"),
        ("data: {train: d, length: 0}", "length=0 must be at least 1"),
        ("data: {train: d, length: 8, packing: yes}", "unknown field of data 'packing'"),
    ],
)
def test_training_configurations(more: str, message: str):
    decode(TrainSpec, parse(WHOLE, "t.yaml"))
    name = more.partition(":")[0]
    kept = "\n".join(line for line in WHOLE.splitlines() if not line.startswith(f"{name}:"))
    with pytest.raises(LaminaError, match=message) as raised:
        decode(TrainSpec, parse(f"{more}\n{kept}\n", "t.yaml"))
    assert str(raised.value).startswith("t.yaml:1: ")


def test_every_configuration_comes_back():
    spec = decode(TrainSpec, parse(WHOLE + "optimiser: {kind: muon, groups: [{roles: [norm], rate: 2}]}\n", "t.yaml"))
    assert decode(TrainSpec, parse(write(spec), "again")) == spec


def test_a_spec_without_a_name_is_called_by_its_class():
    text = "part: {kind: DocumentPlain, side: {kind: left, size: 3}}\nother: {size: 4}\n"
    found = decode(DocumentChoice, parse(text, "c.yaml"))
    expected = DocumentPlain(side=DocumentLeft(size=3))
    assert found == DocumentChoice(part=expected, other=DocumentOther(size=4))
    assert encode(found)["part"]["kind"] == "DocumentPlain" and "kind" not in encode(found)["other"]
    assert decode(DocumentChoice, parse(write(found), "c.yaml")) == found
    for text, said in (
        ("part: {size: 4}", "part needs a kind: DocumentPlain, DocumentOther"),
        ("part: {kind: Other, size: 4}", "unknown kind of part 'Other'; did you mean 'DocumentOther'"),
        ("other: {kind: DocumentOther, size: 4}", "unknown field of other 'kind'"),
    ):
        with pytest.raises(LaminaError, match=said):
            decode(DocumentChoice, parse(text, "c.yaml"))
