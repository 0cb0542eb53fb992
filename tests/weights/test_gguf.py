"""lamina.weights.gguf against the gguf package, and against files that lie."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina.errors import CheckpointError
from lamina.weights.gguf import GGUFFile

QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def record(
    name: str = "w", dims: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0, count: int | None = None
) -> bytes:
    count = len(dims) if count is None else count
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def whole(
    records: list[bytes] | None = None,
    pairs: list[bytes] | None = None,
    *,
    data: int = 256,
    version: int = 3,
    tensors: int | None = None,
    metadata: int | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    records, pairs = [record()] if records is None else records, pairs or []
    head = magic + struct.pack(
        "<IQQ", version, len(records) if tensors is None else tensors, len(pairs) if metadata is None else metadata
    )
    head += b"".join(pairs) + b"".join(records)
    return head + bytes(-len(head) % 32) + bytes(data)


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_is_there(tmp_path: Path, version: int):
    numbers = pair("n", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3))
    pairs = [pair("a", 8, text("é")), pair("b", 7, b"\1"), numbers, pair("f", 12, struct.pack("<d", 0.5))]
    pairs.append(pair("s", 9, struct.pack("<IQ", 8, 2) + text("x") + text("")))
    path = tmp_path / "m.gguf"
    path.write_bytes(whole(pairs=pairs, version=version))
    with GGUFFile(path) as file:
        assert file.metadata == {"a": "é", "b": True, "n": [1, -2, 3], "f": 0.5, "s": ["x", ""]}
        entry = file.entries["w"]
        assert (entry.dtype, entry.shape, entry.stored) == (torch.float32, (2, 32), "F32")


@pytest.mark.parametrize("kind", [*QUANTISED, "F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"])
def test_equals_the_gguf_package(tmp_path: Path, kind: str):
    """Bytes at random, so every bit of every scale counts; the scales alone are kept finite."""
    random = np.random.default_rng(5)
    stored = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[stored]
    blocks = random.integers(0, 256, (3000, size), dtype=np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for start in halves if kind in QUANTISED else ():
        blocks[:, start : start + 2] = random.normal(size=(3000, 1)).astype(np.float16).view(np.uint8)
    if kind not in QUANTISED and not kind.startswith("I"):
        numbers = torch.from_numpy(random.normal(size=(3000, 1))).to(
            {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float64)
        )
        blocks = numbers.view(torch.uint8).numpy()
    data = whole([record(dims=(weights * 10, 300), kind=int(stored))], data=0) + blocks.tobytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    got = GGUFFile(path).read("w")
    assert got.shape == (300, weights * 10)
    if kind in QUANTISED or kind == "F32":
        expected = gguf.quants.dequantize(blocks, stored).reshape(got.shape)
        assert got.dtype == torch.float32
        assert np.array_equal(got.numpy(), expected)
    else:
        assert bytes(got.contiguous().view(torch.uint8).numpy()) == blocks.tobytes()


def test_plain_numbers_are_views_that_outlive_the_file(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(whole(data=0) + np.arange(64, dtype=np.float32).tobytes())
    file = GGUFFile(path)
    first, second = file.read("w"), file.read("w")
    assert first.data_ptr() == second.data_ptr()
    file.close()
    with pytest.raises(CheckpointError, match=r"m\.gguf: closed"):
        file.read("w")
    del file
    first.add_(1)  # in memory only
    assert torch.equal(second, torch.arange(1.0, 65.0).view(2, 32))
    assert GGUFFile(path).read("w")[0, 0] == 0


def test_a_file_written_by_the_gguf_package(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("y", np.ones((4, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "m.gguf") as file:
        assert file.metadata["llama.block_count"] == 2
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
        assert torch.equal(file.read("x"), torch.arange(6.0).view(2, 3))
        assert file.entries["y"].shape == (4, 64)


HUGE = 1 << 40
STRINGS = struct.pack("<IQ", 8, HUGE)
LIES = {
    "empty": (b"", "an empty file"),
    "three bytes": (b"GGU", "starts with 'GGU'"),
    "magic": (whole(magic=b"GGML"), "starts with 'GGML'"),
    "a page": (b"<!DOCTYPE html><html></html>", "starts with '<!DO'"),
    "version 1": (whole(version=1), "GGUF version 1; versions 2 and 3"),
    "version 4": (whole(version=4), "GGUF version 4"),
    "big-endian": (whole(version=3 << 24), "big-endian"),
    "header only": (b"GGUF" + struct.pack("<I", 3), "the number of tensors needs 8 bytes"),
    "tensors": (whole(tensors=HUGE), r"claims 1,099,511,627,776 tensors in"),
    "pairs": (whole(metadata=HUGE), r"claims 1,099,511,627,776 metadata pairs in"),
    "one pair too many": (whole([], metadata=1, data=64), "metadata pair 0 has no name"),
    "string": (whole(pairs=[pair("a", 8, struct.pack("<Q", HUGE))]), "'a' claims 1,099,511,627,776 bytes"),
    "string past the end": (whole(pairs=[pair("a", 8, struct.pack("<Q", 5000))]), "'a' needs 5,000 bytes"),
    "key": (whole(pairs=[struct.pack("<Q", 1 << 20)]), "metadata pair 0 claims 1,048,576 bytes"),
    "strings": (whole(pairs=[pair("a", 9, STRINGS)]), "'a' claims 1,099,511,627,776 elements"),
    "numbers": (whole(pairs=[pair("a", 9, struct.pack("<IQ", 4, HUGE))]), "'a' claims 1,099,511,627,776 elements"),
    "elements": (whole(pairs=[pair("a", 9, struct.pack("<IQ", 0, 1 << 23))], data=1 << 23), "hold 8,388,608 elements"),
    "nested": (whole(pairs=[pair("a", 9, struct.pack("<IQ", 9, 1) * 500)]), "'a' is an array of arrays"),
    "element type": (whole(pairs=[pair("a", 9, struct.pack("<IQ", 77, 1))]), "'a' is an array of type 77"),
    "value type": (whole(pairs=[pair("a", 13, bytes(8))]), "'a' is of type 13"),
    "bool": (whole(pairs=[pair("a", 7, b"\2")]), "'a' is the byte 2"),
    "bools": (whole(pairs=[pair("a", 9, struct.pack("<IQ", 7, 2) + b"\1\2")]), "'a' holds a bool"),
    "UTF-8": (whole(pairs=[pair("a", 8, text(b"\xff\xfe"))]), "'a' is not UTF-8"),
    "same key": (whole(pairs=[pair("a", 7, b"\0")] * 2), "metadata 'a' is there twice"),
    "same tensor": (whole([record(), record(offset=256)], data=512), "tensor 'w' is there twice"),
    "no dimensions": (whole([record(dims=(), count=0)]), "'w' has 0 dimensions"),
    "dimensions": (whole([record(count=1 << 30)]), r"'w' has 1,073,741,824 dimensions"),
    "size 0": (whole([record(dims=(0, 4))]), r"'w' has shape \(4, 0\)"),
    "overflow": (whole([record(dims=(1 << 32, 1 << 32))]), "'w' has shape .*; sizes are positive"),
    "past the end": (whole([record(dims=(32, 1 << 40))]), "'w' ends at byte .*, but the file has"),
    "offset": (whole([record(offset=1 << 62)]), "'w' ends at byte"),
    "unaligned": (whole([record(offset=4)]), "'w' begins at 4; offsets are multiples of 32"),
    "overlap": (whole([record(), record("v", offset=128)], data=512), "tensors 'w' and 'v' overlap"),
    "type": (whole([record(kind=999)]), "'w' is stored as type 999; lamina reads F32, "),
    "unread type": (whole([record(dims=(256, 1), kind=10)]), "'w' is stored as Q2_K; lamina reads F32, "),
    "negative type": (whole([record(kind=0xFFFFFFFF)]), "'w' is stored as type 4294967295"),
    "row": (whole([record(dims=(33, 2), kind=2)]), "'w' has rows of 33; Q4_0 needs a multiple of 32"),
    "alignment 0": (whole(pairs=[pair("general.alignment", 4, bytes(4))]), "general.alignment is 0"),
    "alignment 24": (whole(pairs=[pair("general.alignment", 4, b"\x18\0\0\0")]), "general.alignment is 24"),
    "alignment text": (whole(pairs=[pair("general.alignment", 8, text("32"))]), "general.alignment is '32'"),
    "alignment huge": (whole(pairs=[pair("general.alignment", 10, struct.pack("<Q", 1 << 50))]), "'w' ends at byte"),
    "control characters": (whole([record("w\x1b[31m\n", kind=999)]), r"tensor 'w\\x1b\[31m\\n' is stored"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_at_once(tmp_path: Path, lie: str):
    data, message = LIES[lie]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    del data
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(CheckpointError, match=r"^bad\.gguf: .*" + f"(?:{message})") as caught:
        GGUFFile(path)
    assert time.process_time() - begun < 1
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_no_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No such file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="not a file"):
        GGUFFile(tmp_path)


def test_cut_anywhere(tmp_path: Path):
    """Any prefix of a good file is refused, and by us."""
    pairs = [pair("a", 8, text("word")), pair("b", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yy"))]
    good = whole(pairs=pairs)
    path = tmp_path / "cut.gguf"
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            GGUFFile(path)
    path.write_bytes(good)
    assert GGUFFile(path).entries


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6))
def test_any_bytes(tmp_path: Path, changes: list[tuple[int, int]]):
    """Whatever the bytes, either a file whose tensors can be read or one clear refusal."""
    pairs = [pair("a", 8, text("word")), pair("b", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yy"))]
    data = bytearray(whole(pairs=pairs))
    for at, value in changes:
        data[at % len(data)] = value
    path = tmp_path / "any.gguf"
    path.write_bytes(bytes(data))
    try:
        file = GGUFFile(path)
    except CheckpointError:
        return
    for name in file.entries:
        file.read(name)
