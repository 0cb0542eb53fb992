"""What a run keeps of itself, its checkpoints and its model, and how it goes on from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lamina.adapters import merged_tensors
from lamina.adapting import write_adapter
from lamina.data import Prepared
from lamina.document import decode, parse
from lamina.document import write as text_of
from lamina.errors import CheckpointError, LaminaError
from lamina.model import Model
from lamina.specs import Spec
from lamina.train import checkpoint
from lamina.train.building import unlike, write
from lamina.train.directory import ADAPTER, CHECKPOINTS, CONFIG, MODEL, PARTS
from lamina.train.generators import generators
from lamina.train.loop import Trainer
from lamina.train.run import Run
from lamina.train.specs import TrainSpec


class Saver:
    """Writes checkpoints, and at the end the model, where this rank is the first; the others help it."""

    def __init__(self, spec: TrainSpec, trainer: Trainer, run: Run | None, data: Prepared, base: str | None) -> None:
        self.spec, self.trainer, self.run, self.ranks = spec, trainer, run, trainer.ranks
        self.data = data
        self.base = base
        """What tells the weights from others that an adapter is trained on; None: without an adapter."""

    def save(self) -> None:
        """A checkpoint of where the run is."""
        step, parts = self.trainer.progress.step, self.trainer.tensors()
        flat = {f"{file}/{name}": tensor for file, part in parts.items() for name, tensor in part.items()}
        if self.spec.checkpoints.layout == "whole":
            self.ranks.write(
                flat, lambda whole: self._keep(step, self._content({file: _Part(file, whole) for file in parts}))
            )
            return
        content, size = self._content({}), sum(tensor.numel() * tensor.itemsize for tensor in flat.values())

        def save(write: Callable[[Path], None]) -> None:
            def fill(folder: Path) -> None:
                write(folder / PARTS)
                content.write(folder)

            self._keep(step, fill, size)

        self.ranks.parts(flat, save)

    def finish(self, directory: Path) -> Path:
        """Write what has been trained, an adapter or a model or both, and return where the last of them lies."""
        model, weights = self.trainer.model, self.trainer.tensors()
        chosen: Mapping[str, Any] = weights[self.trainer.kept] | weights.get("average", {})
        kept = directory / ADAPTER
        if self.spec.adapter is not None:
            folder = kept
            self.ranks.write(chosen, lambda whole: write_adapter(model, folder, values=_read(whole), force=True))
            self._say(f"the adapter is in {kept}")
        if self.spec.adapter is None or self.spec.adapter.merge:
            kept = place = directory / MODEL
            self.ranks.write(
                {**model.state_dict(), **chosen},
                lambda whole: self._say(
                    f"the model is in {place} ({write(model, plain(model, whole), place, self.data)})"
                ),
            )
        return kept

    def _say(self, text: str) -> None:
        if self.run is not None:
            self.run.event(text)

    def _content(self, parts: Mapping[str, Mapping[str, Any]]) -> checkpoint.Content:
        files = {"config.yaml": text_of(self.spec).encode()}
        if parts and self.base is None:  # else the folder holds no model
            files["spec.json"] = self.trainer.model.spec.to_json().encode()
        return checkpoint.Content(
            tensors=parts,
            state={"progress": self.trainer.progress.to_dict(), "generators": generators(), "base": self.base},
            files=files,
        )

    def _keep(self, step: int, content: checkpoint.Content | checkpoint.Write, estimate: int | None = None) -> None:
        """Where this rank is the first: write it down."""
        assert self.run is not None
        mesh = {name: getattr(self.spec.mesh, name) for name in self.spec.mesh.__dataclass_fields__}
        about = {
            "spec": _hash(self.trainer.model.spec),
            "data": self.data.hash,
            "world": self.ranks.world,
            "mesh": mesh,
        }
        keep = self.spec.checkpoints.keep
        path = checkpoint.save(self.run.checkpoints, step, content, about=about, estimate=estimate, keep=keep)
        self.run.event(f"checkpoint {path.name}")


class _Part(dict[str, Any]):
    """One file of a checkpoint, of tensors that are put together when they are asked for."""

    def __init__(self, file: str, whole: Mapping[str, Any]) -> None:
        self.file, self.whole = file, whole
        names = [name for name in whole if name.startswith(f"{file}/")]
        super().__init__({name.partition("/")[2]: dict.get(whole, name) for name in names})  # pyright: ignore

    def __getitem__(self, name: str) -> Any:
        return self.whole[f"{self.file}/{name}"]


def plain(model: Model, whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors of the model without its adapter, which is folded into them."""
    return whole if model.adapter is None else merged_tensors(model, _read(whole))


def _read(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors that are put together when they are asked for, all of them."""
    return {name: whole[name] for name in whole}


def _hash(spec: Spec) -> str:
    return hashlib.sha256(spec.to_json().encode()).hexdigest()


def found_checkpoint(directory: Path, resume: str, show: Callable[[str], None]) -> checkpoint.Saved | None:
    """The checkpoint to go on from, if any; what was skipped on the way to it is said."""
    if resume == "none":
        return None
    if resume != "auto":
        return checkpoint.read(resume)
    path, skipped = checkpoint.newest_valid(directory / CHECKPOINTS)
    for other, why in skipped:
        show(f"warning: {other.name} is skipped: {why}")
    return None if path is None else checkpoint.read(path)


def refuse_changes(directory: Path, spec: TrainSpec, found: checkpoint.Saved, data: Prepared) -> None:
    """A run goes on as what it was: another model, optimiser or text would be another run."""
    text = (found.path / CONFIG).read_text(encoding="utf-8")
    before = decode(TrainSpec, parse(text, str(found.path / CONFIG)))
    rows = unlike(before, spec)
    if rows:
        raise LaminaError(f"{directory} cannot go on with another configuration: {'; '.join(rows)}")
    if found.manifest.data != data.hash:
        raise LaminaError(
            f"{spec.data.train}: its content differs from what {found.path.name} of {directory} was trained on"
        )


def refuse_another(spec: TrainSpec, model: Model, found: checkpoint.Saved, base: str) -> None:
    """A checkpoint of an adapter is of use with the model that it was trained on, and with no other."""
    said = found.state.get("base")
    if found.manifest.spec != _hash(model.spec) or said != base:
        what = "spec" if found.manifest.spec != _hash(model.spec) else "weights"
        source = spec.model.source or "the model"
        raise LaminaError(f"{source}: its {what} differ from those that the adapter of {found.path} was trained on")


def go_on(trainer: Trainer, found: checkpoint.Saved) -> None:
    """From a checkpoint, whether it is whole or in parts."""
    if any(name.startswith(f"{PARTS}/") for name in found.manifest.files):
        _go_on_from_parts(trainer, found)
        return
    needed = {trainer.kept, "optimiser"} | ({"average"} if trainer.average is not None else set())
    if missing := needed - set(found.files):
        raise CheckpointError(f"{found.path}: holds no {sorted(missing)[0]}.safetensors")
    tensors: Mapping[str, Any] = {name: found.tensors(name) for name in needed}
    trainer.load(tensors, found.state["progress"])


def _go_on_from_parts(trainer: Trainer, found: checkpoint.Saved) -> None:
    """From a checkpoint of which each rank has written its part: each reads what it needs."""
    from lamina.parallel.checkpoint import METADATA_FILE, read_metadata

    folder = found.path / PARTS
    tensors: dict[str, dict[str, torch.Tensor]] = {trainer.kept: {}, "optimiser": {}, "average": {}}
    names: dict[int, str] = {}
    for key, entry in read_metadata(folder / METADATA_FILE).state_dict_metadata.items():
        file, _, name = key.partition("/")
        like = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # pyright: ignore
        tensors.setdefault(file, {})[name] = like
        names[id(like)] = key
    trainer.load(
        tensors,
        found.state["progress"],
        lambda pairs: trainer.ranks.read_parts(folder, {names[id(like)]: place for place, like in pairs}),
    )
