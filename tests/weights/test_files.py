"""Safetensors files and checkpoint directories: what is read, what is refused and with which words, what is written."""

import errno
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lamina import durable
from lamina.errors import CheckpointError
from lamina.weights.files import Checkpoint, Entry, SafetensorsFile, read_json, save_checkpoint, write_safetensors
from lamina.weights.headers import DTYPES, LIMIT


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def field(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def plan_of(tensors: dict[str, torch.Tensor]) -> dict[str, Entry]:
    return {name: Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """One of each dtype and of some odd shapes, from random bytes; names in no order."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (), (0,), (2, 0, 3), (5,), (1, 2, 2)]
    tensors = {}
    for place, (code, dtype) in enumerate(DTYPES.items()):
        shape = shapes[place % len(shapes)] if code != "F4" else (3, 2)
        entry = Entry("", dtype, shape)
        high = 2 if dtype == torch.bool else 256
        data = torch.randint(high, (entry.nbytes,), generator=generator).to(torch.uint8)
        name = f'{(place * 7) % 20}.é"\\\n{code}'
        tensors[name] = data.view(dtype).reshape(shape) if entry.nbytes else torch.empty(shape, dtype=dtype)
    return tensors


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.numel() == 0 or torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


GOOD = raw({"a": field()}, bytes(8))
HOSTILE = {
    "empty": (b"", "is empty"),
    "five bytes": (b"\1\0\0\0\0", "has 5 bytes, and its header's length alone takes 8"),
    "truncated data": (
        GOOD[:-3],
        f"is truncated: its header promises {len(GOOD)} bytes, and the file has {len(GOOD) - 3}",
    ),
    "appended": (
        GOOD + b"xyz",
        f"is too long: its header promises {len(GOOD)} bytes, and the file has {len(GOOD) + 3}",
    ),
    "truncated header": (GOOD[:20], f"is truncated: its header ends at byte {len(GOOD) - 8}, and the file has 20"),
    "length 2^63": (raw(b"{}", length=2**63), "its header would take 9,223,372,036,854,775,808 bytes"),
    "length beyond the limit": (
        raw(b"{}", length=LIMIT + 1),
        "would take 100,000,001 bytes, and the format allows 100,000,000",
    ),
    "length 0": (raw(b""), "its header does not begin with '{'"),
    "not UTF-8": (raw(b'{"\xff":1}'), "its header is not UTF-8 text: byte 2 is 0xff"),
    "not JSON": (raw(b'{"a":'), "its header is not JSON: Expecting value at line 1, column 6"),
    "not an object": (raw(b"[1]"), "its header does not begin with '{'"),
    "NaN": (raw(b'{"a":NaN}'), "its header holds NaN"),
    "nests": (raw(b'{"a":' + b"[" * 200_000), "its header is not JSON that anyone writes: it nests too deeply"),
    "endless integer": (raw(b'{"a":' + b"9" * 5000 + b"}"), "its header holds an integer of thousands of digits"),
    "duplicate key": (raw(b'{"a":1,"b":2,"a":3}'), "its header has the key 'a' twice"),
    "duplicate field": (raw(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "its header has the key 'dtype' twice"),
    "metadata not strings": (raw({"__metadata__": {"a": 1}}), "`__metadata__` in its header must hold strings only"),
    "field missing": (
        raw({"a": {"dtype": "F32", "shape": [2]}}),
        "tensor 'a' in its header must have dtype, shape and",
    ),
    "field too many": (
        raw({"a": field() | {"x": 1}}, bytes(8)),
        "must have dtype, shape and data_offsets, and nothing",
    ),
    "dtype unknown": (
        raw({"a": field("F33")}, bytes(8)),
        "tensor 'a' in its header has dtype 'F33'; known are U64, I64",
    ),
    "dtype no string": (raw({"a": field(["F32"])}, bytes(8)), "has dtype \"['F32']\"; known are"),
    "negative shape": (raw({"a": field(shape=[-2])}, bytes(8)), "shape must be a list of at most 64 whole numbers"),
    "two negatives": (raw({"a": field(shape=[-1, -2])}, bytes(8)), "shape must be a list of at most 64 whole numbers"),
    "shape with a float": (
        raw({"a": field(shape=[2.0])}, bytes(8)),
        "shape must be a list of at most 64 whole numbers",
    ),
    "shape with true": (
        raw({"a": field(shape=[2, True])}, bytes(8)),
        "shape must be a list of at most 64 whole numbers",
    ),
    "65 dims": (raw({"a": field(shape=[1] * 65)}, bytes(8)), "shape must be a list of at most 64 whole numbers"),
    "overflowing shape": (
        raw({"a": field(shape=[2**62, 8])}, bytes(8)),
        "a shape of [4611686018427387904, 8] overflows",
    ),
    "overflow beside 0": (raw({"a": field(shape=[2**62, 2**62, 0], offsets=(0, 0))}), "overflows"),
    "huge dimension": (raw({"a": field(shape=[2**64])}, bytes(8)), "shape must be a list of at most 64 whole numbers"),
    "negative offset": (raw({"a": field(offsets=[-8, 0])}, bytes(8)), "data_offsets must be two whole numbers"),
    "offsets reversed": (raw({"a": field(offsets=[8, 0])}, bytes(8)), "data_offsets must be two whole numbers"),
    "three offsets": (raw({"a": field(offsets=[0, 4, 8])}, bytes(8)), "data_offsets must be two whole numbers"),
    "offset beyond": (
        raw({"a": field(offsets=[2**62, 2**62 + 8])}, bytes(8)),
        "is truncated: its header promises 4,611",
    ),
    "wrong span": (raw({"a": field(shape=[3])}, bytes(8)), "F32 [3] takes 12 bytes, and its data_offsets span 8"),
    "odd F4": (raw({"a": field("F4", [3], [0, 1])}, bytes(1)), "a shape [3] of dtype F4 does not fill whole bytes"),
    "hole": (raw({"a": field(), "b": field(offsets=[12, 20])}, bytes(20)), "a hole of 4 bytes before tensor 'b'"),
    "hole at first": (raw({"a": field(offsets=[4, 12])}, bytes(12)), "a hole of 4 bytes before tensor 'a'"),
    "overlap": (raw({"a": field(), "b": field(offsets=[4, 12])}, bytes(12)), "tensors that overlap: 'a' and 'b'"),
    "same place": (raw({"a": field(), "b": field()}, bytes(8)), "tensors that overlap: 'a' and 'b'"),
    "lone surrogate": (raw(b'{"\\ud800":' + json.dumps(field()).encode() + b"}", bytes(8)), "is not valid Unicode"),
    "control characters": (raw({"a\n\x1b[31m": field(shape=[3])}, bytes(8)), r"tensor 'a\n\x1b[31m' in its header"),
    "long name": (raw({"a" * 1_000_000: field(shape=[3])}, bytes(8)), f"tensor '{'a' * 97}...' in its header"),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(99), "is not a safetensors file but a pickle"),
    "zip": (b"PK\x03\x04" + bytes(range(100)), "is not a safetensors file but a zip archive, perhaps with a pickle"),
    "page": (b"\n<!DOCTYPE html><html>" + bytes(99), "is not a safetensors file but a web page, not the file"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a git-lfs pointer, not the file",
    ),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(99), "is not a safetensors file but a GGUF file"),
    "short GGUF": (b"GGUF", "is not a safetensors file but a GGUF file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "is not a safetensors file but a gzip archive"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is not a safetensors file but an HDF5 file"),
    "JSON": (b'{"error": "not found"}', "is not a safetensors file but JSON text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_in_plain_words(tmp_path: Path, name: str):
    content, message = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        SafetensorsFile(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < len(str(path)) + 300


def test_no_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(tmp_path / "absent.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors"):
        with pytest.raises(CheckpointError, match="is not a file"):
            SafetensorsFile(path)


def test_a_valid_length_that_looks_like_a_magic_number_is_no_ground_to_refuse(tmp_path: Path):
    for length in (0x0280, int.from_bytes(b"<", "little"), int.from_bytes(b"{", "little")):
        header = json.dumps({"a": field()}).encode()
        path = tmp_path / "a.safetensors"
        path.write_bytes(raw(header.ljust(max(length, len(header))), bytes(8)))
        if length >= len(header):
            assert SafetensorsFile(path).read("a").tolist() == [0, 0]


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"an é \x01\x7f\u2028": 'quote " and \\'}])
def test_every_dtype_reads_back_and_is_written_as_the_reference_writes_it(tmp_path: Path, metadata: dict | None):
    tensors = random_tensors()
    save_file(tensors, tmp_path / "reference.safetensors", metadata)
    write_safetensors(tmp_path / "ours.safetensors", plan_of(tensors), tensors.__getitem__, metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "reference.safetensors").read_bytes()
    file = SafetensorsFile(tmp_path / "ours.safetensors")
    assert file.metadata == (metadata or {})
    assert file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.entries[name] == Entry(name, tensor.dtype, tuple(tensor.shape))
        assert same_bytes(file.read(name), tensor), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.safetensors", "reference.safetensors"]


def test_no_tensors_at_all(tmp_path: Path):
    save_file({}, tmp_path / "reference.safetensors")
    write_safetensors(tmp_path / "ours.safetensors", {}, {}.__getitem__, None)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "reference.safetensors").read_bytes()
    assert SafetensorsFile(tmp_path / "ours.safetensors").entries == {}


def test_tensors_that_are_not_plain_memory_are_written_by_value(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    odd = {
        "turned": base.t(),
        "shared": base,
        "strided": base[:, ::2],
        "spread": torch.ones(1).expand(5),
        "grad": base.clone().requires_grad_(),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
    }
    write_safetensors(tmp_path / "odd.safetensors", plan_of(odd), odd.__getitem__)
    for name, tensor in load_file(tmp_path / "odd.safetensors").items():
        assert torch.equal(tensor, odd[name].detach()), name


def test_reading_is_a_view_and_writing_to_it_leaves_the_file_alone(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.arange(3)}, path)
    content = path.read_bytes()
    path.chmod(0o444)
    file = SafetensorsFile(path)
    first, second = file.read("a"), file.read("a")
    assert first.data_ptr() == second.data_ptr()
    first[0] = 7.0
    assert second[0] == 7.0 and path.read_bytes() == content
    path.unlink()
    del file
    assert first.tolist() == [7, 1, 2, 3]


def test_misaligned_tensors_read_right(tmp_path: Path):
    tensors = {"a": torch.tensor([1, 2, 3], dtype=torch.uint8), "b": torch.randn(3), "c": torch.randn(2).bfloat16()}
    fields = {"a": field("U8", [3], [0, 3]), "b": field("F32", [3], [3, 15]), "c": field("BF16", [2], [15, 19])}
    data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    path = tmp_path / "a.safetensors"
    for pad in range(8):
        path.write_bytes(raw(json.dumps(fields).encode() + b" " * pad, data))
        file = SafetensorsFile(path)
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor)
            assert file.read(name).data_ptr() % tensor.itemsize == 0


def test_bool_bytes_must_be_0_or_1(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw({"a": field("BOOL", [2], [0, 2])}, b"\1\2"))
    with pytest.raises(CheckpointError, match="'a' is BOOL and holds bytes other than 0 and 1"):
        SafetensorsFile(path).read("a")


def test_an_unknown_name_brings_the_nearest(tmp_path: Path):
    save_file({"norm.weight": torch.ones(1), "embed.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    for source in (SafetensorsFile(tmp_path / "model.safetensors"), Checkpoint(tmp_path)):
        with pytest.raises(CheckpointError, match=r"holds no tensor 'norm.weigth'; the nearest are .*'norm.weight'"):
            source.read("norm.weigth")


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
entries = st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 4), max_size=3))
described = st.dictionaries(names, entries, max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(described)
def test_any_tensors_survive_the_round_trip(tmp_path_factory: pytest.TempPathFactory, description: dict):
    path = tmp_path_factory.mktemp("property") / "a.safetensors"
    tensors = {}
    for name, (dtype, shape) in description.items():
        if dtype == torch.float4_e2m1fn_x2 and not shape:
            shape = [1]  # half a byte does not exist
        entry = Entry(name, dtype, tuple(shape))
        data = (torch.arange(entry.nbytes) % (2 if dtype == torch.bool else 256)).to(torch.uint8)
        tensors[name] = data.view(dtype).reshape(shape) if entry.nbytes else torch.empty(shape, dtype=dtype)
    write_safetensors(path, plan_of(tensors), tensors.__getitem__)
    ours = path.read_bytes()
    file = SafetensorsFile(path)
    assert {name: file.entries[name] for name in tensors} == plan_of(tensors)
    assert all(same_bytes(file.read(name), tensor) for name, tensor in tensors.items())
    save_file(tensors, path, {"format": "pt"})
    assert path.read_bytes() == ours


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(list(DTYPES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.fixed_dictionaries({"dtype": junk, "shape": junk, "data_offsets": junk})
lists = st.lists(st.integers(-3, 20) | st.sampled_from([2**31, 2**62, 2**63, 2**64]), max_size=4)
almost = st.builds(field, st.sampled_from(["F32", "U8", "BOOL", "F4", "F6_E2M3"]), lists, lists)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), junk | fields | almost, max_size=4),
    st.binary(max_size=40),
)
def test_any_header_is_read_or_refused_and_read_only_if_the_reference_reads_it(
    tmp_path_factory: pytest.TempPathFactory, header: dict, data: bytes
):
    path = tmp_path_factory.mktemp("property") / "a.safetensors"
    path.write_bytes(raw(header, data))
    try:
        file = SafetensorsFile(path)
        ours = {name: file.read(name) for name in file.entries}
    except CheckpointError:
        return
    reference = load_file(path)
    assert ours.keys() == reference.keys()
    assert all(same_bytes(ours[name], reference[name]) for name in ours)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=0, max_size=3), st.integers(0, 3))
def test_any_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, insert: bytes, cut: int
):
    path = tmp_path_factory.mktemp("property") / "a.safetensors"
    path.write_bytes(GOOD[:place] + insert + GOOD[place + cut :])
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name in file.entries:
        file.read(name)


def test_read_json(tmp_path: Path):
    path = tmp_path / "config.json"
    cases = {
        b'{"a": 1, "a": 2}': "has the key 'a' twice",
        b'{"a": {"b": 1, "b": 2}}': "has the key 'b' twice",
        b'{"a": NaN}': "holds NaN, which JSON does not have",
        b'{"a": -Infinity}': "holds -Infinity, which JSON does not have",
        b'{"a": 1e999}': "holds the number 1e999, which is beyond a float",
        b"[]": "must hold a JSON object at the top, and holds a list",
        b"null": "must hold a JSON object at the top, and holds null",
        b"": "is not JSON: Expecting value at line 1, column 1",
        b'{"a": \xe9}': "is not UTF-8 text: byte 6 is 0xe9",
        b'{"a": 1,\n}': "is not JSON: ",
        b'{"a": "' + b"x" * 200 + b'"}': "has 209 bytes, and 200 are allowed",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: {message}")):
            read_json(path, limit=200)
    path.write_bytes(b'{"a": [1, 2.5, "\\u00e9"]}')
    assert read_json(path) == {"a": [1, 2.5, "é"]}
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'absent'}: No such file")):
        read_json(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a file"):
        read_json(tmp_path)


# Directories


def sharded(directory: Path, **homes: str) -> Path:
    """A directory with two shards, a and b in one, c in two; `homes` changes the index."""
    directory.mkdir(exist_ok=True)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, directory / one)
    save_file({"c": torch.full((2,), 3.0)}, directory / two)
    weight_map = {"a": one, "b": one, "c": two} | homes
    index = {"metadata": {"total_size": 24}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_the_three_layouts_read_alike(tmp_path: Path):
    tensors = {"a": torch.ones(2), "b": torch.zeros(2), "c": torch.full((2,), 3.0)}
    (tmp_path / "single").mkdir()
    save_file(tensors, tmp_path / "single/model.safetensors", {"format": "pt"})
    for path in (tmp_path / "single", tmp_path / "single/model.safetensors", sharded(tmp_path / "sharded")):
        checkpoint = Checkpoint(path)
        assert checkpoint.entries == plan_of(tensors)
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
        assert all(file.is_file() for file in checkpoint.files)
    assert Checkpoint(tmp_path / "single").metadata == {"format": "pt"}
    assert len(Checkpoint(tmp_path / "sharded").files) == 2


def test_a_single_file_wins_over_an_index_and_what_is_left_is_named(tmp_path: Path):
    sharded(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "training_args.bin").write_bytes(b"")
    checkpoint = Checkpoint(tmp_path)
    assert list(checkpoint.entries) == ["x"]
    assert len(checkpoint.ignored) == 3 and "training_args.bin" in checkpoint.ignored


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors"),
        *("..", "", "a\0.safetensors", "a\n.safetensors", ".hidden.safetensors", "pytorch_model.bin", "config.json"),
    ],
)
def test_an_index_names_only_plain_files_beside_itself(tmp_path: Path, name: str):
    save_file({"c": torch.ones(2)}, tmp_path / "x.safetensors")
    sharded(tmp_path / "m", c=name)
    with pytest.raises(CheckpointError, match=r"and may only name \.safetensors files beside itself") as caught:
        Checkpoint(tmp_path / "m")
    assert str(caught.value).isprintable()


def test_an_index_follows_no_link_out_of_the_directory_but_the_hub_cache_s_own(tmp_path: Path):
    directory = sharded(tmp_path / "plain")
    outside = tmp_path / "outside.safetensors"
    shard = directory / "model-00002-of-00002.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"which is a link out of the directory, to .*outside.safetensors"):
        Checkpoint(directory)
    shard.unlink()
    outside.rename(directory / "inside.safetensors")
    shard.symlink_to("inside.safetensors")
    assert Checkpoint(directory).read("c").tolist() == [3, 3]
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/abc"
    for path in (blobs, snapshot):
        path.mkdir(parents=True)
    for file in directory.iterdir():
        file.resolve().rename(blobs / file.name) if not file.is_symlink() else None
        (snapshot / file.name).symlink_to(blobs / ("inside.safetensors" if file == shard else file.name))
    assert Checkpoint(snapshot).read("c").tolist() == [3, 3]


def test_index_and_shards_must_tell_the_same_story(tmp_path: Path):
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    cases = {
        "missing": ({"d": "model-00003-of-00003.safetensors"}, "names shards that are missing: 'model-00003-of-00003"),
        "wrong": ({"b": two}, f"says that {two} holds 'b'; 'b' is not there: it is in '{one}'"),
        "nowhere": ({"d": two}, f"says that {two} holds 'd'; 'd' is not there: it is in none"),
        "stray": ({"c": one}, f"does not name shards that are in the directory: '{two}'"),
        "number": ({"c": 1}, "`weight_map` must map names of tensors to names of files"),
    }
    for name, (homes, message) in cases.items():
        with pytest.raises(CheckpointError, match=re.escape(message)):
            Checkpoint(sharded(tmp_path / name, **homes))
    index = sharded(tmp_path / "extra") / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": one, "c": two}}))
    with pytest.raises(CheckpointError, match=f"does not place in {one} what that file holds: 'b'"):
        Checkpoint(index.parent)
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="`weight_map` must map"):
            Checkpoint(index.parent)
    index.unlink()
    with pytest.raises(CheckpointError, match="holds shards .* but not their index"):
        Checkpoint(index.parent)


def test_directories_without_safetensors_are_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no weights: neither model\.safetensors nor"):
        Checkpoint(tmp_path)
    for name in ("pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl"):
        (tmp_path / name).write_bytes(b"\x80\x02")
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(
                CheckpointError, match=r"pickle.*only safetensors are read.*convert it with transformers"
            ):
                Checkpoint(path)
        (tmp_path / name).unlink()
    for name in ("other.safetensors", "model.gguf"):
        (tmp_path / name).write_bytes(GOOD)
        with pytest.raises(CheckpointError, match=f"name the file itself: .*{name}"):
            Checkpoint(tmp_path)
        (tmp_path / name).unlink()


# Saving


@pytest.mark.parametrize("shard_size", ["5GB", "20KB", "7KB", "1KB"])
def test_directories_equal_those_of_save_pretrained(tmp_path: Path, shard_size: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                         num_attention_heads=2, tie_word_embeddings=shard_size == "7KB")  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "reference", max_shard_size=shard_size)
    reference = {path.name: path.read_bytes() for path in (tmp_path / "reference").iterdir()}
    checkpoint = Checkpoint(tmp_path / "reference")
    size = int(float(shard_size[:-2]) * {"K": 1e3, "G": 1e9}[shard_size[-2]])
    plan = {name: checkpoint.entries[name] for name in model.state_dict() if name in checkpoint.entries}
    extra = {name: content for name, content in reference.items() if "model" not in name}
    save_checkpoint(tmp_path / "ours", plan, checkpoint.read, shard_size=size, extra_files=extra)
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == reference
    assert (len(reference) > 4) == (shard_size != "5GB")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_shards_can_be_told_and_what_does_not_fit_is_split_anew(tmp_path: Path):
    plan, tensors = one_plan()
    told = {"second.safetensors": ["a"], "first.safetensors": ["b"]}
    cases = {
        "told": (told, 1, ["first.safetensors", "model.safetensors.index.json", "second.safetensors"]),
        "one": ({"model.safetensors": ["b", "a"]}, 99, ["model.safetensors"]),
        "other name": ({"other.safetensors": ["b", "a"]}, 99, ["model.safetensors"]),
        "other tensors": (told | {"first.safetensors": ["b", "c"]}, 99, ["model.safetensors"]),
        "empty shard": (told | {"third.safetensors": []}, 99, ["model.safetensors"]),
        "twice": (told | {"third.safetensors": ["a"]}, 99, ["model.safetensors"]),
    }
    for name, (shards, size, files) in cases.items():
        save_checkpoint(tmp_path / name, plan, tensors.__getitem__, shard_size=size, shards=shards)
        assert sorted(contents(tmp_path / name)) == files, name
        assert Checkpoint(tmp_path / name).entries == plan
    too_large = {"model.safetensors": ["b", "a"]}
    save_checkpoint(tmp_path / "split", plan, tensors.__getitem__, shard_size=16, shards=too_large)
    assert len(Checkpoint(tmp_path / "split").files) == 2


def test_extra_files_may_lie_in_a_folder(tmp_path: Path):
    plan, tensors = one_plan()
    save_checkpoint(tmp_path, plan, tensors.__getitem__, extra_files={"1_Pooling/config.json": b"{}", "a.json": b"[]"})
    assert sorted(contents(tmp_path)) == ["1_Pooling/config.json", "a.json", "model.safetensors"]


def one_plan(value: float = 1.0) -> tuple[dict[str, Entry], dict[str, torch.Tensor]]:
    tensors = {"a": torch.full((4,), value), "b": torch.full((3,), value)}
    return plan_of(tensors), tensors


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Stop:
    """A reader that fails at its second tensor."""

    def __init__(self, tensors: dict[str, torch.Tensor], error: BaseException):
        self.tensors, self.error = tensors, error

    def __call__(self, name: str) -> torch.Tensor:
        if name == "b":
            raise self.error
        return self.tensors[name]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), KeyError("b")]
)
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: BaseException):
    plan, tensors = one_plan()
    save_checkpoint(tmp_path / "m", plan, tensors.__getitem__, extra_files={"config.json": b"{}"})
    before = contents(tmp_path)
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        save_checkpoint(tmp_path / "m", plan, Stop(tensors, error), force=True, shard_size=16)
    if isinstance(error, OSError):
        numbers = r"No space left on device: [\d,]+ bytes are needed, and [\d,]+ are free; nothing was changed"
        assert re.search(numbers, str(caught.value))
    with pytest.raises(expected):
        write_safetensors(tmp_path / "m/model.safetensors", plan, Stop(tensors, error))
    with pytest.raises(expected):
        save_checkpoint(tmp_path / "new", plan, Stop(tensors, error))
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "m", "model.safetensors"]


def test_room_is_checked_before_anything_is_written(tmp_path: Path):
    plan = {"a": Entry("a", torch.float32, (2**58,))}
    for save in (write_safetensors, save_checkpoint):
        with pytest.raises(CheckpointError, match=r"1,152,921,504,606,84\d,\d+ bytes are needed, and [\d,]+ are free"):
            save(tmp_path / "x", plan, one_plan()[1].__getitem__)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_middle_of_writing(tmp_path: Path):
    """The system stops the write itself: files may not grow beyond 4 KB in this process."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    script = """
        import resource, sys, torch
        from lamina.weights.files import Entry, write_safetensors
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        plan = {str(i): Entry(str(i), torch.float32, (300,)) for i in range(8)}
        try:
            write_safetensors(sys.argv[1], plan, lambda name: torch.zeros(300))
        except ValueError as error:
            print(error)
    """
    output = run(script, path)
    assert re.search(
        r"cannot be written: File too large: [\d,]+ bytes are needed, and [\d,]+ are free; nothing was", output
    )
    assert contents(tmp_path) == {"x.safetensors": GOOD}


def run(script: str, *arguments: object) -> str:
    """Runs a program of its own. Its large blocks of memory go back to the system at once, so they can be counted."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_the_system_refuses_is_named(tmp_path: Path):
    plan, tensors = one_plan()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be written: .*; nothing was changed"):
        write_safetensors(tmp_path / "file/x", plan, tensors.__getitem__)
    with pytest.raises(CheckpointError, match="cannot be written: Is a directory"):
        write_safetensors(tmp_path, plan, tensors.__getitem__)
    with pytest.raises(CheckpointError, match="is a file, and a directory is to be written"):
        save_checkpoint(tmp_path / "file", plan, tensors.__getitem__, force=True)


def test_a_reader_that_brings_something_else_is_refused(tmp_path: Path):
    plan, tensors = one_plan()
    for wrong in (torch.zeros(5), torch.zeros(4).half()):
        with pytest.raises(CheckpointError, match="'a' was to be written as torch.float32 .4., and is "):
            write_safetensors(tmp_path / "x", plan, (tensors | {"a": wrong}).__getitem__)
    bad = {"__metadata__": Entry("__metadata__", torch.float32, (1,))}
    with pytest.raises(CheckpointError, match="no tensor may bear the name '__metadata__'"):
        write_safetensors(tmp_path / "x", bad, lambda name: torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination(tmp_path: Path):
    plan, tensors = one_plan()
    (tmp_path / "m").mkdir()
    save_checkpoint(tmp_path / "m", plan, tensors.__getitem__, extra_files={"old.txt": b"old"})  # empty: welcome
    before = contents(tmp_path)
    with pytest.raises(
        CheckpointError, match="exists and is not empty; name another directory, or replace it with --force"
    ):
        save_checkpoint(tmp_path / "m", plan, tensors.__getitem__)
    assert contents(tmp_path) == before
    source = Checkpoint(tmp_path / "m")  # in place: what is replaced is still being read
    save_checkpoint(tmp_path / "m", plan, source.read, force=True)
    assert list(contents(tmp_path)) == ["m/model.safetensors"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a checkpoint, so it is not replaced"):
        save_checkpoint(tmp_path / "home", plan, tensors.__getitem__, force=True)
    (tmp_path / "link").symlink_to(tmp_path / "m")
    save_checkpoint(tmp_path / "link", plan, tensors.__getitem__, force=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "m/model.safetensors").is_file()


def test_replacing_without_the_swap_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    plan, tensors = one_plan()
    save_checkpoint(tmp_path / "m", plan, tensors.__getitem__, extra_files={"old.txt": b"old"})
    save_checkpoint(tmp_path / "m", plan, tensors.__getitem__, extra_files={"new.txt": b"new"}, force=True)
    assert sorted(contents(tmp_path)) == ["m/model.safetensors", "m/new.txt"]


def test_a_new_directory_that_cannot_take_the_place_of_the_old_one_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan, tensors = one_plan()
    save_checkpoint(tmp_path / "m", plan, tensors.__getitem__, extra_files={"old.txt": b"old"})
    before, rename = contents(tmp_path), os.rename

    def refuse(one: Path, other: Path) -> None:
        if (other.name, ".old." in one.name) == ("m", False):
            raise OSError(errno.EIO, "Input/output error")
        rename(one, other)

    monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match="cannot be written: Input/output error; nothing was changed"):
        save_checkpoint(tmp_path / "m", plan, tensors.__getitem__, force=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("swap", [True, False])
def test_of_two_writers_at_once_one_wins_and_nothing_is_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
):
    if not swap:
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    for force in (False, True):
        barrier, errors = threading.Barrier(2), []

        def save(value: float, force: bool = force, barrier: threading.Barrier = barrier, errors: list = errors):
            plan, tensors = one_plan(value)

            def read(name: str) -> torch.Tensor:
                if name == "b":
                    barrier.wait(10)  # both have begun before either ends
                return tensors[name]

            try:
                save_checkpoint(tmp_path / "m", plan, read, shard_size=16, force=force)
            except CheckpointError as refusal:
                errors.append(str(refusal))

        writers = [threading.Thread(target=save, args=(value,)) for value in (1.0, 2.0)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert len(errors) <= 1 and all("another process has written it" in error for error in errors)
        assert len(errors) == 1 or force
        checkpoint = Checkpoint(tmp_path / "m")
        assert checkpoint.read("a")[0] == checkpoint.read("b")[0]
        assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_a_killed_writer_left_is_removed_by_the_next_one_and_a_living_one_is_left_alone(tmp_path: Path):
    plan, tensors = one_plan()
    dead, fresh, alien = tmp_path / ".m.0.partial", tmp_path / ".m.1.partial", tmp_path / ".other.0.partial"
    for path in (dead, fresh, alien):
        path.mkdir()
        (path / "x").write_bytes(b"")
        os.utime(path, (0, 0)) if path != fresh else None

    def read(name: str) -> torch.Tensor:
        partial = [path for path in tmp_path.iterdir() if path.name.startswith(".m.") and path != fresh]
        assert len(partial) == 1  # our own, and however old it looks nobody takes it away
        os.utime(partial[0], (0, 0))
        durable.sweep(tmp_path / "m")
        assert partial[0].is_dir()
        return tensors[name]

    save_checkpoint(tmp_path / "m", plan, read)
    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, alien.name, "m"]


def test_names_of_extra_files(tmp_path: Path):
    plan, tensors = one_plan()
    for name in (
        "",
        "..",
        "../x",
        "a/../x",
        "/a",
        "a/",
        "a//b",
        "a/b/c",
        "a\0",
        "model.safetensors",
        "model.safetensors.index.json",
    ):
        with pytest.raises(CheckpointError, match="extra file"):
            save_checkpoint(tmp_path / "m", plan, tensors.__getitem__, extra_files={name: b""})
    with pytest.raises(CheckpointError, match="no tensors to save"):
        save_checkpoint(tmp_path / "m", {}, tensors.__getitem__)
    with pytest.raises(CheckpointError, match="shard_size is 0"):
        save_checkpoint(tmp_path / "m", plan, tensors.__getitem__, shard_size=0)
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_at_one_tensor(tmp_path: Path):
    """Writes and reads back 96 MB in 8 MB tensors. Only memory of the process's own counts, not the file's pages."""
    script = """
        import sys, torch
        from lamina.weights.files import Checkpoint, Entry, save_checkpoint

        def own():
            status = open("/proc/self/smaps_rollup").read()
            return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("Anonymous")) / 1024

        plan = {f"{i:02d}": Entry(f"{i:02d}", torch.float32, (2 * 2**20,)) for i in range(12)}
        torch.zeros(10).sum()
        before = own()
        peaks = []
        def fresh(name):
            peaks.append(own())
            return torch.full((2 * 2**20,), float(name))
        save_checkpoint(sys.argv[1] + "/a", plan, fresh, shard_size=64 * 2**20)
        source = Checkpoint(sys.argv[1] + "/a")
        peaks.append(own())
        assert all(source.read(name).sum() == 2 * 2**20 * int(name) for name in plan)
        kept = [source.read(name) for name in plan]
        peaks.append(own())
        def copied(name):
            peaks.append(own())
            return source.read(name)
        save_checkpoint(sys.argv[1] + "/b", plan, copied)
        print(max(peaks) - before)
    """
    if not os.path.exists("/proc/self/smaps_rollup"):
        pytest.skip("needs Linux to tell its own memory from the file's")
    assert float(run(script, tmp_path)) < 24
