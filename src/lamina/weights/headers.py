"""The header of a safetensors file: read with suspicion, written as the reference implementation (0.8) writes it."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from lamina.errors import CheckpointError

LIMIT = 100_000_000  # bytes: the format's own bound on a header
ALIGNMENT = 8  # bytes: a header is padded with spaces to a multiple of this

# In the order in which the reference implementation lays dtypes out in a file: widest first.
DTYPES: Mapping[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F4": torch.float4_e2m1fn_x2,  # two values to a byte: torch counts bytes in the last dim, the file counts values
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}

# What a file that is no safetensors file begins with, and what to do about it.
PICKLE = "a pickle (torch.save writes these), which can run code when it is read: convert it where it is trusted"
KINDS = (
    (b"GGUF", "a GGUF file: give it a name that ends in .gguf"),
    (b"PK\x03\x04", f"a zip archive, perhaps with {PICKLE}"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (b"<", "a web page, not the file: the download needs a login or has a wrong address; download it again"),
    (b"\x89HDF", "an HDF5 file (Keras or TensorFlow): convert it to safetensors"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"{", "JSON text, not weights: is it the index of a sharded checkpoint, or an answer to a failed download?"),
)


@dataclass(frozen=True)
class Entry:
    """What a file says about one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    entries: dict[str, Entry]  # in the order in which their bytes lie in the file
    offsets: dict[str, int]  # where each tensor begins, counted from the beginning of the file
    metadata: dict[str, str]


def shown(name: str) -> str:
    """A tensor's name, fit for a message: in quotes, control characters escaped, cut when long."""
    return repr(name if len(name) <= 100 else f"{name[:97]}...")


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are: 'a', 'b', 'c' and 2 more."""
    names = sorted(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more


def strict_json(raw: bytes, kind: type = dict) -> Any:
    """An object in JSON, or another `kind` of value, without what JSON forbids or leaves open: duplicate keys, NaN,
    numbers beyond a float."""
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"is not UTF-8 text: byte {error.start:,} is 0x{raw[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise CheckpointError("is not JSON that anyone writes: it nests too deeply") from None
    except CheckpointError:
        raise
    except ValueError:  # Python's own bound: an integer of more than 4,300 digits
        raise CheckpointError("holds an integer of thousands of digits") from None
    if not isinstance(value, kind):
        wanted = _kind(kind()).removeprefix("an ").removeprefix("a ")
        raise CheckpointError(f"must hold a JSON {wanted} at the top, and holds {_kind(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise CheckpointError(f"has the key {shown(twice)} twice")
    return found


def _no_constant(text: str) -> None:
    raise CheckpointError(f"holds {text}, which JSON does not have")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise CheckpointError(f"holds the number {text}, which is beyond a float")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def read_header(file: BinaryIO, size: int) -> Header:
    """Reads and checks the header of a file of `size` bytes; nothing is allocated for what the file cannot hold."""
    head = file.read(64)
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > min(LIMIT, size - 8) or head[8:9] != b"{":
        raise CheckpointError(_no_header(head, length, size))
    file.seek(8)
    try:
        fields = strict_json(file.read(length))
    except CheckpointError as error:
        raise CheckpointError(f"is not a safetensors file: its header {error}") from None
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("`__metadata__` in its header must hold strings only")
    spans = [_span(name, field) for name, field in fields.items()]
    return _check(spans, 8 + length, size, metadata)


def _no_header(head: bytes, length: int, size: int) -> str:
    if size == 0:
        return "is empty"
    for magic, kind in KINDS:
        if head.lstrip().startswith(magic):
            return f"is not a safetensors file but {kind}"
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return f"is not a safetensors file but {PICKLE}"
    if size < 8:
        return f"is not a safetensors file: it has {size} bytes, and its header's length alone takes 8"
    if length > LIMIT:
        return f"is not a safetensors file: its header would take {length:,} bytes, and the format allows {LIMIT:,}"
    if length > size - 8:
        return f"is truncated: its header ends at byte {8 + length:,}, and the file has {size:,}"
    return "is not a safetensors file: its header does not begin with '{'"


def _span(name: str, field: Any) -> tuple[int, int, Entry]:
    """(first byte, byte after the last, entry) of one field of the header, each value checked on its own."""
    where = f"tensor {shown(name)} in its header"
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets, and nothing else")
    code, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{where} has dtype {shown(str(code))}; known are {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > 64:
        raise CheckpointError(f"{where}: shape must be a list of at most 64 whole numbers from 0 to 2^63 - 1")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets must be two whole numbers, from 0 to 2^63 - 1, in order")
    if not _encodable(name):
        raise CheckpointError(f"{where}: its name is not valid Unicode")
    dtype = DTYPES[code]
    if code == "F4":  # the file counts values, torch counts bytes
        if not shape or shape[-1] % 2:
            raise CheckpointError(f"{where}: a shape {shape} of dtype F4 does not fill whole bytes")
        shape = [*shape[:-1], shape[-1] // 2]
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise CheckpointError(f"{where}: a shape of {shape} overflows")
    entry = Entry(name, dtype, tuple(shape))
    if entry.nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {code} {list(shape)} takes {entry.nbytes:,} bytes, and its data_offsets span "
            f"{offsets[1] - offsets[0]:,}"
        )
    return offsets[0], offsets[1], entry


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _encodable(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _check(spans: list[tuple[int, int, Entry]], start: int, size: int, metadata: dict[str, str]) -> Header:
    """The tensors must cover the rest of the file exactly: no holes, no overlaps, nothing after the last."""
    spans = sorted(spans, key=lambda span: span[:2])
    end = start + max((span[1] for span in spans), default=0)
    if end > size:
        raise CheckpointError(f"is truncated: its header promises {end:,} bytes, and the file has {size:,}")
    if end < size:
        raise CheckpointError(f"is too long: its header promises {end:,} bytes, and the file has {size:,}")
    position, before = 0, ""
    for first, last, entry in spans:
        if first > position:
            raise CheckpointError(f"has a hole of {first - position:,} bytes before tensor {shown(entry.name)}")
        if first < position:
            raise CheckpointError(f"has tensors that overlap: {shown(before)} and {shown(entry.name)}")
        position, before = last, entry.name
    return Header(
        entries={entry.name: entry for _, _, entry in spans},
        offsets={entry.name: start + first for first, _, entry in spans},
        metadata=metadata,
    )


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """As the reference implementation orders them: widest dtype first, then by name."""
    return sorted(entries, key=lambda entry: (ORDER[entry.dtype], entry.name))


def header_bytes(entries: Iterable[Entry], metadata: Mapping[str, str] | None) -> bytes:
    """The first bytes of a file that holds these tensors in this order, its header's length included."""
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for entry in entries:
        if entry.name == "__metadata__":
            raise CheckpointError("no tensor may bear the name '__metadata__': the format keeps it for itself")
        packed = 2 if CODES[entry.dtype] == "F4" else 1
        shape = [*entry.shape[:-1], entry.shape[-1] * packed] if entry.shape else []
        fields[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": shape,
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > LIMIT:
        raise CheckpointError(f"the header would take {len(text):,} bytes, and the format allows {LIMIT:,}: use shards")
    return len(text).to_bytes(8, "little") + text
