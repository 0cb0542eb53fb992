"""lamina.weights.ctranslate2: files written out byte by byte, and files that lie."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina.errors import CheckpointError
from lamina.weights.ctranslate2 import CTranslate2File, is_ctranslate2


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = (value.encode() if isinstance(value, str) else value) + b"\0"
    return struct.pack("<H", len(data) if length is None else length) + data


def variable(
    name: str | bytes = "w",
    shape: tuple[int, ...] = (2, 3),
    kind: int = 0,
    data: bytes | None = None,
    *,
    rank: int | None = None,
    size: int | None = None,
) -> bytes:
    data = bytes(24) if data is None else data
    head = struct.pack(f"<B{len(shape)}I", len(shape) if rank is None else rank, *shape)
    return text(name) + head + struct.pack("<BI", kind, len(data) if size is None else size) + data


def whole(
    variables: list[bytes] | None = None,
    aliases: list[tuple[str, str]] | None = None,
    *,
    version: int = 6,
    spec: bytes | None = None,
    count: int | None = None,
    also: int | None = None,
    end: bytes = b"",
) -> bytes:
    variables, aliases = [variable()] if variables is None else variables, aliases or []
    head = struct.pack("<I", version) + (text("WhisperSpec") if spec is None else spec) + struct.pack("<I", 3)
    head += struct.pack("<I", len(variables) if count is None else count) + b"".join(variables)
    head += struct.pack("<I", len(aliases) if also is None else also)
    return head + b"".join(text(one) + text(other) for one, other in aliases) + end


@pytest.mark.parametrize("version", [4, 5, 6])
def test_reads_what_is_there(tmp_path: Path, version: int):
    numbers = {
        torch.float32: (0, [0.5, -2.0]),
        torch.int8: (1, [-3, 7]),
        torch.int16: (2, [-300, 7]),
        torch.int32: (3, [-70000, 7]),
        torch.float16: (4, [0.5, -2.0]),
        torch.bfloat16: (5, [0.5, -2.0]),
    }
    variables = [
        variable(
            str(dtype), (1, 2), kind, bytes(torch.tensor([values], dtype=dtype).view(torch.uint8).flatten().tolist())
        )
        for dtype, (kind, values) in numbers.items()
    ]
    path = tmp_path / "model.bin"
    path.write_bytes(whole([*variables, variable("é", (), 2, b"\6\0")], version=version))
    with CTranslate2File(path) as file:
        assert (file.version, file.spec, file.revision, file.aliases) == (version, "WhisperSpec", 3, {})
        for dtype, (_, values) in numbers.items():
            entry = file.entries[str(dtype)]
            assert (entry.dtype, entry.shape) == (dtype, (1, 2))
            assert file.read(str(dtype)).tolist() == [values] and file.read(str(dtype)).dtype == dtype
        assert file.read("é").item() == 6
        with pytest.raises(CheckpointError, match=r"model\.bin: no variable 'v'; it has 7"):
            file.read("v")
    with pytest.raises(CheckpointError, match=r"model\.bin: closed"):
        file.read("é")


def test_numbers_are_views_where_they_can_be_and_outlive_the_file(tmp_path: Path):
    """The data of the first are at byte 44, those of the second, whose name is a letter longer, at an odd one."""
    values = torch.arange(6.0)
    data = bytes(values.view(torch.uint8).tolist())
    path = tmp_path / "model.bin"
    path.write_bytes(
        whole([variable("abcde", (6,), data=data), variable("abcdef", (6,), data=data)], [("x", "abcde"), ("y", "x")])
    )
    file = CTranslate2File(path)
    assert [file.entries[name].offset % 4 for name in ("abcde", "abcdef")] == [0, 3]
    first, second = file.read("abcde"), file.read("abcde")
    assert first.data_ptr() == second.data_ptr() and file.read("abcdef").data_ptr() != file.read("abcdef").data_ptr()
    assert file.aliases == {"x": "abcde", "y": "abcde"} and file.entries["y"].offset == file.entries["abcde"].offset
    one, other = file.read("x"), file.read("y")  # two parameters are never one piece of memory
    assert len({first.data_ptr(), one.data_ptr(), other.data_ptr()}) == 3
    file.close()
    first.add_(1)
    assert torch.equal(second, values + 1) and torch.equal(one, values) and torch.equal(other, values)
    assert torch.equal(CTranslate2File(path).read("abcde"), values)  # the file is as it was


LIES = {
    "empty": (b"", "an empty file"),
    "short": (b"\6\0", r"starts with '\\x06\\x00'; a CTranslate2 file starts with a version"),
    "a pickle": (b"\x80\2}q\0.", r"starts with '\\x80\\x02}q'"),
    "a zip archive": (b"PK\3\4" + bytes(90), "starts with 'PK"),
    "version 3": (whole(version=3), "binary version 3; its variables do not say their types: convert the model again"),
    "version 7": (whole(version=7), "binary version 7; 4 to 6 are read"),
    "nothing after the version": (struct.pack("<I", 6), "the length of the name of the specification needs 2 bytes"),
    "no zero": (whole(spec=struct.pack("<H", 3) + b"abc"), "specification has 3 bytes and no zero"),
    "a zero inside": (whole(spec=text(b"a\0b")), "specification has 4 bytes and no zero at the end alone"),
    "no name": (whole(spec=text("")), "specification has 1 bytes and no zero"),
    "no length": (whole(spec=struct.pack("<H", 0)), "specification has 0 bytes"),
    "a long name": (whole([text("w" * 20, 65535)]), "the name of variable 0 needs 65,535 bytes"),
    "UTF-8": (whole([variable(b"\xff\xfe")]), "the name of variable 0 is not UTF-8"),
    "variables": (whole(count=1 << 31), "claims 2,147,483,648 variables in"),
    "many variables": (whole([bytes(11 * (1 << 18))], count=1 << 18), "claims 262,144 variables; the most is 131,072"),
    "one too many": (whole(count=2), "the length of the name of variable 1|the name of variable 1"),
    "one too few": (whole([variable(), variable("v")], count=1), "claims .* aliases|bytes follow|alias 0"),
    "rank": (whole([variable(rank=255)]), "'w' has 255 dimensions; it has 0 to 4"),
    "size 0": (whole([variable(shape=(0, 4), data=b"")]), r"'w' has shape \(0, 4\) in 0 bytes; sizes are positive"),
    "type": (whole([variable(kind=6)]), "'w' is of type 6; types are 0 to 5: float32, int8, "),
    "bytes": (whole([variable(size=20)]), r"'w' has shape \(2, 3\) in 20 bytes; .* float32 takes 4 bytes"),
    "a large shape": (whole([variable(shape=(1 << 31, 1 << 31), size=(1 << 32) - 1)]), r"'w' has shape \(2147483648, "),
    "past the end": (whole([variable(shape=(1 << 29,), size=1 << 31)]), "variable 'w' needs 2,147,483,648 bytes"),
    "same variable": (whole([variable(), variable()]), "variable 'w' is there twice"),
    "aliases": (whole(also=1 << 31), "claims 2,147,483,648 aliases in"),
    "many aliases": (whole(also=1 << 18, end=bytes(8 << 18)), "claims 262,144 aliases; the most is 131,072"),
    "alias of itself": (whole(aliases=[("a", "a")]), "alias 'a' stands for 'a'; no variable or alias before it"),
    "a loop of aliases": (whole(aliases=[("a", "b"), ("b", "a")]), "alias 'a' stands for 'b'; no variable or alias"),
    "alias of nothing": (whole(aliases=[("a", "v")]), "alias 'a' stands for 'v'"),
    "alias twice": (whole(aliases=[("a", "w"), ("a", "w")]), "alias 'a' has the name of another variable"),
    "alias of a variable's name": (whole(aliases=[("w", "w")]), "alias 'w' has the name of another variable"),
    "more": (whole(end=b"\0"), "1 bytes follow the last alias"),
    "control characters": (whole([variable("w\x1b[31m\n", kind=99)]), r"variable 'w\\x1b\[31m\\n' is of type 99"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_at_once(tmp_path: Path, lie: str):
    data, message = LIES[lie]
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    del data
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(CheckpointError, match=r"^model\.bin: .*" + f"(?:{message})") as caught:
        CTranslate2File(path)
    assert time.process_time() - begun < 1
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_no_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No such file"):
        CTranslate2File(tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="not a file"):
        CTranslate2File(tmp_path)
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(CheckpointError, match="not a file"):
        CTranslate2File(tmp_path / "pipe.bin")


def test_what_begins_like_one(tmp_path: Path):
    def begins(data: bytes, name: str = "model.bin") -> bool:
        (tmp_path / name).write_bytes(data)
        return is_ctranslate2(tmp_path / name)

    assert begins(whole()) and begins(whole(version=1)) and begins(whole(version=9))  # and then refused with a reason
    assert not begins(whole(), "model.safetensors")
    for other in (b"", b"\6\0\0\0", b"\x80\2}q\0.", b"PK\3\4\0\0\0\0", struct.pack("<Q", 64) + b"{}", bytes(64)):
        assert not begins(other)
    assert not is_ctranslate2(tmp_path) and not is_ctranslate2(tmp_path / "none.bin")


GOOD = whole([variable(), variable("v", (), 2, b"\6\0")], [("a", "w"), ("b", "a")])


def test_cut_anywhere(tmp_path: Path):
    """Any prefix of a good file is refused, and by us."""
    path = tmp_path / "model.bin"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(CheckpointError):
            CTranslate2File(path)
    path.write_bytes(GOOD)
    assert list(CTranslate2File(path).entries) == ["w", "v", "a", "b"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6))
def test_any_bytes(tmp_path: Path, changes: list[tuple[int, int]]):
    """Whatever the bytes, either a file whose tensors can be read or one clear refusal."""
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    path = tmp_path / "any.bin"
    path.write_bytes(bytes(data))
    try:
        file = CTranslate2File(path)
    except CheckpointError:
        return
    for name in file.entries:
        file.read(name)
