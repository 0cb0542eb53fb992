"""The metadata of a checkpoint in parts is a pickle, and nothing in it is run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from lamina.errors import CheckpointError
from lamina.parallel.checkpoint import read_metadata


class Runs:
    """A pickle of it calls something when it is read."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.args


def metadata(path: str = "__0_0.distcp", **changes: Any) -> Metadata:
    size = torch.Size([2, 3])
    entry = TensorStorageMetadata(
        TensorProperties(torch.float32), size, [ChunkStorageMetadata(torch.Size([0, 0]), size)]
    )
    fields = {
        "state_dict_metadata": {"model.weight": entry},
        "storage_data": {MetadataIndex("model.weight", torch.Size([0, 0])): _StorageInfo(path, 0, 100)},
        "storage_meta": StorageMeta(),
    }
    return Metadata(**(fields | changes))


def written(folder: Path, value: Any) -> Path:
    path = folder / ".metadata"
    path.write_bytes(pickle.dumps(value))
    return path


def test_a_good_one_is_read(tmp_path: Path):
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        size = torch.Size([1])
        entry = TensorStorageMetadata(TensorProperties(dtype), size, [ChunkStorageMetadata(torch.Size([0]), size)])
        found = read_metadata(written(tmp_path, metadata(state_dict_metadata={"x": entry})))
        assert found.state_dict_metadata["x"].properties.dtype == dtype  # pyright: ignore


@pytest.mark.parametrize("place", ["alone", "data", "planner"])
def test_a_crafted_one_is_refused_and_does_nothing(tmp_path: Path, place: str):
    proof = tmp_path / "ran"
    for call, args in (
        (os.system, (f"touch {proof}",)),
        (open, (str(proof), "w")),
        (eval, (f"open({str(proof)!r}, 'w')",)),
        (getattr, ("x", "upper")),
        (torch.load, (str(proof),)),
        (torch.save, (1, str(proof))),
    ):
        evil = Runs(call, *args)
        value = {
            "alone": evil,
            "data": metadata(storage_data={"x": evil}),
            "planner": metadata(planner_data=evil),
        }[place]
        path = written(tmp_path, value)
        with pytest.raises(CheckpointError, match="which has no place in a checkpoint; nothing was run"):
            read_metadata(path)
        assert not proof.exists(), call


def test_bytes_and_files_elsewhere_are_refused(tmp_path: Path):
    """torch unpickles entries that are bytes without any restriction, and opens whatever file is named."""
    with pytest.raises(CheckpointError, match="asks for .*BytesStorageMetadata"):
        read_metadata(written(tmp_path, metadata(state_dict_metadata={"x": BytesStorageMetadata()})))
    for name in ("../../x", "/etc/passwd", "__0_0.distcp/../../x", "", "__0_0.distcp\n"):
        with pytest.raises(CheckpointError, match="names the file"):
            read_metadata(written(tmp_path, metadata(name)))


def test_what_is_no_metadata_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no .metadata, which is written last: it was never finished"):
        read_metadata(tmp_path / ".metadata")
    good = pickle.dumps(metadata())
    for data in (b"", b"<html>", good[:-1], good[: len(good) // 2], good[10:], pickle.dumps([1, 2]), b"\x80\x05\x95"):
        (tmp_path / ".metadata").write_bytes(data)
        with pytest.raises(CheckpointError, match="is not the metadata of a checkpoint"):
            read_metadata(tmp_path / ".metadata")
    with pytest.raises(CheckpointError, match="x is not a tensor"):
        read_metadata(written(tmp_path, metadata(state_dict_metadata={"x": torch.Size([1])})))
