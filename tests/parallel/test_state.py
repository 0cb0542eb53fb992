"""What several processes write and read: the whole state, the Hugging Face folder, checkpoints in parts; and what they
say when one of them dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lamina
from lamina.errors import CheckpointError, LaminaError
from tests import small
from tests.families import same_files
from tests.parallel import ranks, same

STEPS = 3


def model(name: str, fields: dict[str, int], seed: int = 0) -> lamina.Model:
    from lamina.parallel import distribute

    spec = same.MODELS[name]()
    mesh = same.mesh_of(spec, fields)
    made = spec.build(dtype=torch.float64)
    small.shake(made, seed)
    return distribute(made, mesh)


def step(model: lamina.Model, optimizer: torch.optim.Optimizer, mesh=None) -> None:
    """One step of training on the batch of every test; without a mesh by this process alone."""
    whole = same.batch(model.spec)
    asked = int((whole.labels >= 0).sum())
    mine = whole if mesh is None else whole.rows(mesh.reader, mesh.readers)
    labels = mine.labels if mesh is None else mesh.labels(mine.labels)
    optimizer.zero_grad()
    same.loss(model.eval(), mine, asked, labels, None).backward()
    optimizer.step()


def adam(model: lamina.Model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)


def alone(name: str, steps: int) -> dict[str, Tensor]:
    """The parameters after `steps` steps of one process."""
    made = same.MODELS[name]().build(dtype=torch.float64)
    small.shake(made)
    optimizer = adam(made)
    for _ in range(steps):
        step(made, optimizer)
    return {path: parameter.detach() for path, parameter in made.named_parameters()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for path, tensor in expected.items():
        torch.testing.assert_close(
            found[path], tensor, rtol=1e-7, atol=1e-9, msg=lambda text, path=path: f"{path}: {text}"
        )


def state(rank: int, folder: Path) -> None:
    """Whole states come back as they were, and a wrong one is refused before anything changes."""
    from lamina.parallel import RankError, full_state, load_full_state

    cases = (("mixtral", {"expert": 2}), ("gpt2", {"tensor": 2}), ("bert", {"shard": 2}), ("gpt2", {"pipeline": 2}))
    for name, fields in cases:
        made = model(name, fields)
        plain = same.MODELS[name]().build(dtype=torch.float64)
        small.shake(plain)
        first = full_state(made)
        if rank == 0:
            close(first, dict(plain.state_dict()))
        else:
            assert first == {}
        small.shake(plain, seed=5)
        load_full_state(made, dict(plain.state_dict()) if rank == 0 else None)
        second = full_state(made)
        if rank == 0:
            close(second, dict(plain.state_dict()))
        wrong = dict(plain.state_dict())
        path = next(iter(wrong))
        for change, says in (
            ({"more": wrong[path]}, "the state has more"),
            ({path: wrong[path][1:]}, " is torch.float64 "),
        ):
            error, says = (LaminaError, says) if rank == 0 else (RankError, "rank 0 refuses")
            with pytest.raises(error, match=says):
                load_full_state(made, wrong | change if rank == 0 else None)
        with pytest.raises(LaminaError if rank == 0 else RankError, match="lacks" if rank == 0 else "rank 0 refuses"):
            load_full_state(made, {} if rank == 0 else None)


def meta(rank: int, folder: Path) -> None:
    """A model that was never whole on the other ranks is the one that `build` makes."""
    from lamina.parallel import distribute, full_state, materialise

    for name, fields in (("mixtral", {"expert": 2}), ("t5", {"tensor": 2}), ("bert", {"shard": 2})):
        spec = same.MODELS[name]()
        made = distribute(spec.build(device="meta"), same.mesh_of(spec, fields))
        materialise(made, seed=4)
        found = full_state(made)
        if rank == 0:
            close(found, dict(spec.build(seed=4).state_dict()))
        made(**same.batch(spec).given)


def folders(rank: int, folder: Path) -> None:
    """The Hugging Face folder is the same, byte for byte; and where it cannot be written, all ranks know."""
    from lamina.parallel import RankError

    for name, fields in (
        ("mixtral", {"expert": 2}),
        ("mixtral", {"tensor": 2}),
        ("gpt2", {"shard": 2}),
        ("t5", {"tensor": 2}),
        ("gpt2", {"pipeline": 2}),
        ("albert", {"context": 2}),
    ):
        made = model(name, fields)
        label = f"{name}-{next(iter(fields))}"
        if rank == 0:
            one = same.MODELS[name]().build(dtype=torch.float64)
            small.shake(one)
            lamina.save(one, folder / f"{label}-one")
        lamina.save(made, folder / f"{label}-two")
        if rank == 0:
            assert same_files(folder / f"{label}-one", folder / f"{label}-two") == [], label
            assert {path.name for path in (folder / f"{label}-two").iterdir()} >= {"config.json", "model.safetensors"}
        error, says = (CheckpointError, "exists and is not empty") if rank == 0 else (RankError, "rank 0 could not")
        with pytest.raises(error, match=says):
            lamina.save(made, folder / f"{label}-two")
    lamina.save(made, folder / "native", format="native")


def clipped(rank: int, folder: Path) -> None:
    """The norm that gradients are clipped to is that of all of them, wherever they lie."""
    from lamina.parallel import clip_gradients, gradient_norm

    for fields in ({"expert": 2}, {"tensor": 2}, {"shard": 2}):
        made = model("mixtral", fields)
        step(made, torch.optim.SGD(made.parameters(), lr=0.0), made.mesh)
        before = gradient_norm(made)
        torch.testing.assert_close(clip_gradients(made, 0.1), before)
        assert before > 0.2
        torch.testing.assert_close(gradient_norm(made), torch.tensor(0.1, dtype=torch.float64), rtol=1e-4, atol=0)
        clip_gradients(made, 5.0)
        torch.testing.assert_close(gradient_norm(made), torch.tensor(0.1, dtype=torch.float64), rtol=1e-4, atol=0)


def micro(rank: int, folder: Path) -> None:
    """Two micro-batches whose gradients are sent once give what one batch gives."""
    from lamina.parallel import synchronise

    spec = same.MODELS["gpt2"]()
    _, one = same.alone(spec, same.batch(spec), 1, False)
    made = model("gpt2", {"shard": 2})
    mesh = made.mesh
    made.eval()
    mine = same.batch(spec).rows(rank, 2)
    asked = int((same.batch(spec).labels >= 0).sum())
    for i in range(2):
        synchronise(made, i == 1)
        part = same.Batch({name: x[i : i + 1] for name, x in mine.given.items()}, mine.labels[i : i + 1])
        same.loss(made, part, asked, part.labels, None).backward()
    for (path, parameter), other in zip(one.named_parameters(), made.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None
        torch.testing.assert_close(mesh.whole(other.grad), parameter.grad, rtol=1e-8, atol=1e-10, msg=path)


def halved(rank: int, folder: Path) -> None:
    """In bfloat16, ranks are as far from float64 as one process is, in the loss and in all gradients."""
    from lamina.parallel import distribute, full_state

    def off(model: lamina.Model, exact: lamina.Model) -> float:
        """How far all gradients together are from the exact ones, by their length."""
        mesh, far, near = model.mesh, 0.0, 0.0
        for parameter, other in zip(exact.parameters(), model.parameters(), strict=True):
            assert parameter.grad is not None and other.grad is not None
            found = other.grad if mesh is None else mesh.whole(other.grad)
            far += float((found.double() - parameter.grad).square().sum())
            near += float(parameter.grad.square().sum())
        return (far / near) ** 0.5

    cases = ("gpt2", "tensor"), ("bert", "shard"), ("gpt2", "context"), ("t5", "context"), ("qk-norm", "context")
    for name, axis in cases:
        spec = same.MODELS[name]()
        whole = same.batch(spec)
        asked = int((whole.labels >= 0).sum())
        expected, exact = same.alone(spec, whole, 1, False)
        rough, made = spec.build(dtype=torch.bfloat16).eval(), spec.build().eval()
        for one in (rough, made):
            one.load_state_dict(exact.state_dict())
        alone = same.loss(rough, whole, asked, whole.labels, None)
        alone.backward()
        mesh = same.mesh_of(spec, {axis: 2})
        distribute(made, mesh, precision="bfloat16")
        mine = whole.rows(mesh.reader, mesh.readers)
        loss = same.loss(made, mine, asked, mesh.labels(mine.labels), None)
        loss.backward()
        assert {one.grad.dtype for one in made.parameters() if one.grad is not None} == {torch.float32}
        assert abs(float(mesh.total(loss)) - float(expected)) < 0.02 * float(expected), (name, axis)
        assert 1e-4 < off(made, exact) < 1.3 * off(rough, exact) + 1e-3, (name, axis)
        assert made(**mine.given).logits.dtype == torch.bfloat16  # last: what FSDP has gathered for it has no gradients
        full_state(made)


def outside(rank: int, folder: Path) -> None:
    """A loss that takes the hidden states and multiplies with the table itself has the same gradients."""
    for name, fields in (("gpt2", {"shard": 2}), ("mixtral", {"expert": 2}), ("llama", {"context": 2})):
        made = model(name, fields).eval()
        spec, mesh = made.spec, made.mesh
        expected, one = same.alone(spec, same.batch(spec), 1, False)
        mine = same.batch(spec).rows(mesh.reader, mesh.readers)
        labels, asked = mesh.labels(mine.labels), int((same.batch(spec).labels >= 0).sum())
        hidden = made(**mine.given, keep_logits=0).hidden
        table = made.embedding.weight if made.head.weight is None else made.head.weight
        logits = torch.nn.functional.linear(hidden, table)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / asked
        loss.backward()
        torch.testing.assert_close(mesh.total(loss), expected, rtol=1e-10, atol=1e-10)
        for (path, parameter), other in zip(one.named_parameters(), made.parameters(), strict=True):
            assert parameter.grad is not None and other.grad is not None
            torch.testing.assert_close(mesh.whole(other.grad), parameter.grad, rtol=1e-8, atol=1e-10, msg=path)


def distilled(rank: int, folder: Path) -> None:
    """A student on several ranks learns from a whole teacher what it learns on one process."""
    from lamina.objectives import Batch, CausalLM, Distillation, Taught
    from lamina.parallel import distribute
    from lamina.train.sums import loss_of

    teacher = same.build(same.MODELS["llama"]())
    task = Taught(Distillation(teacher="", temperature=2.0, mix=0.7, objective=CausalLM(smoothing=0.1)), teacher)
    for name in ("gpt2", "experts"):
        spec = same.MODELS[name]().replace(embedding=same.MODELS["gpt2"]().embedding)
        whole = same.batch(spec)
        asked = dict.fromkeys(("next_token", "teacher"), float((whole.labels >= 0).sum()))

        def total(model: lamina.Model, part: same.Batch, asked=asked) -> Tensor:
            labels = dict.fromkeys(asked, part.labels)
            return loss_of(task.total(model, Batch(part.given, labels)), asked)

        one = same.build(spec)
        expected = total(one, whole)
        expected.backward()
        for axis in ("tensor", "shard"):
            mesh = same.mesh_of(spec, {axis: 2})
            made = distribute(same.build(spec), mesh)
            found = total(made, whole.rows(mesh.reader, mesh.readers))
            found.backward()
            torch.testing.assert_close(mesh.total(found), expected.detach(), rtol=1e-10, atol=1e-10)
            for (path, parameter), other in zip(one.named_parameters(), made.parameters(), strict=True):
                assert parameter.grad is not None and other.grad is not None
                torch.testing.assert_close(mesh.whole(other.grad), parameter.grad, rtol=1e-8, atol=1e-10, msg=path)


def refused(rank: int, folder: Path) -> None:
    """What cannot be is said in one line."""
    from lamina.parallel import distribute

    made = model("gpt2", {"context": 2})
    with pytest.raises(LaminaError, match="lies on a mesh already"):
        distribute(made, made.mesh)
    with pytest.raises(LaminaError, match="precision is 'int4'; it must be one of float32, bfloat16, float16"):
        distribute(same.MODELS["gpt2"]().build(), made.mesh, precision="int4")
    with pytest.raises(lamina.LaminaError, match="cache is for whole texts"):
        made(**same.batch(made.spec).given, cache=made.new_cache(batch=4))
    assert made.mesh.stream == rank  # tokens of its own, and so random numbers of its own
    spec = same.MODELS["gpt2"]()
    table = distribute(spec.build(), same.mesh_of(spec, {"tensor": 2}))
    assert table.mesh.stream == 0
    adapted = spec.build()
    adapted.get_submodule("decoder.layers.0.attention.op.q").register_parameter(
        "low", torch.nn.Parameter(torch.ones(2))
    )
    with pytest.raises(lamina.LaminaError, match="attention.op.q holds more than a weight and a bias"):
        distribute(adapted, table.mesh)
    piped = distribute(spec.build(), same.mesh_of(spec, {"pipeline": 2}))
    assert piped.mesh.stream == rank  # layers of its own
    with pytest.raises(LaminaError, match="lies on several ranks by pipeline: run it by lamina.parallel.through"):
        piped(**same.batch(spec).given)
    with pytest.raises(LaminaError, match="pipeline takes a model with its values"):
        distribute(spec.build(device="meta"), piped.mesh)
    with pytest.raises(RuntimeError):  # an id beyond the vocabulary is nobody's, and is not taken for zeros
        table(torch.full((1, 3), 264))


def begin(rank: int, folder: Path) -> None:
    """Two ranks train and write their parts."""
    from lamina.parallel import full_state, save_parts

    for name, fields in (("mixtral", {"expert": 2}), ("t5", {"tensor": 2}), ("gpt2", {"shard": 2})):
        made = model(name, fields)
        optimizer = adam(made)
        for _ in range(STEPS):
            step(made, optimizer, made.mesh)
        found = full_state(made)
        if rank == 0:
            close(found, alone(name, STEPS))
        save_parts(folder / f"{name}-2", made, optimizer, {"step": torch.tensor(STEPS)})


def go_on(rank: int, folder: Path, world: int, before: int) -> None:
    """Another number of ranks reads them, trains a step more, and writes its own."""
    from lamina.parallel import full_state, load_parts, save_parts

    steps = STEPS + 1 + (world == 3)
    for name, axis in (("mixtral", "shard"), ("t5", "shard"), ("gpt2", "context")):
        made = model(name, {axis: world}, seed=9)
        optimizer = adam(made)
        more = load_parts(folder / f"{name}-{before}", made, optimizer)
        assert int(more["step"]) == steps - 1
        if name == "gpt2" or world == 1:  # three ranks cannot read four rows
            step(made, optimizer, made.mesh)
            found = full_state(made)
            if rank == 0:
                close(found, alone(name, steps))
        else:
            found = full_state(made)
            if rank == 0:
                close(found, alone(name, steps - 1))
        save_parts(folder / f"{name}-{world}", made, optimizer, {"step": torch.tensor(steps)})
        error = CheckpointError if rank == 0 else RuntimeError
        with pytest.raises(error, match="exists and is not empty" if rank == 0 else "rank 0 refuses"):
            save_parts(folder / f"{name}-{world}", made)


def one(rank: int, folder: Path) -> None:
    go_on(rank, folder, 1, 2)
    other = model("llama", {})
    from lamina.parallel import load_parts

    with pytest.raises(CheckpointError, match=r"op\.k\.weight is torch.float64 \[32, 32\]; .*\[16, 32\] is needed"):
        load_parts(folder / "gpt2-2", other)
    lacks = model("gpt2", {})
    assert lacks.decoder is not None
    lacks.decoder.norm = None
    with pytest.raises(CheckpointError, match=r"holds model\.decoder\.norm\.\w+, and the model has none of that name"):
        load_parts(folder / "gpt2-2", lacks)


def three(rank: int, folder: Path) -> None:
    go_on(rank, folder, 3, 1)


def hang(rank: int, folder: Path) -> None:
    """A rank that does not come is named within its time."""
    from lamina.parallel import MeshSpec, RankError, open_mesh

    mesh = open_mesh(MeshSpec(shard=-1), same.MODELS["gpt2"]())
    mesh.barrier("start", 20.0)
    if rank == 2:
        while not all((folder / f"{one} named it").exists() for one in (0, 1)):
            time.sleep(0.05)
        return
    start = time.monotonic()
    with pytest.raises(RankError, match="step 7: rank 2 did not come within 1.5 seconds"):
        mesh.barrier("step 7", 1.5)
    (folder / f"{rank} named it").touch()
    assert time.monotonic() - start < 20


def die(rank: int, folder: Path) -> None:
    """A rank that is killed stops the others, with its name. They exchange tensors meanwhile."""
    import torch.distributed as dist

    from lamina.parallel import MeshSpec, RankError, open_mesh

    mesh = open_mesh(MeshSpec(shard=-1), same.MODELS["gpt2"](), timeout=20.0)
    mesh.total(torch.ones(3))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()

    def forward() -> None:
        with mesh.watched("the forward", 4.0):
            for _ in range(1000):
                dist.all_reduce(torch.ones(1000))

    with pytest.raises(RankError, match="the forward: rank 1 did not come"):
        forward()
    assert time.monotonic() - start < 30


@pytest.mark.timeout(400)
def test_states_and_folders():
    checks = {
        one.__name__: one for one in (begin, state, meta, folders, clipped, micro, halved, outside, distilled, refused)
    }
    with ranks.folder() as name:
        folder = Path(name)
        found = ranks.run(2, checks, folder)
        assert found == {label: ["", ""] for label in checks}, ranks.first(found)
        (folder / "meeting").unlink(missing_ok=True)
        found = ranks.run(1, {"one": one}, folder)
        assert found == {"one": [""]}, ranks.first(found)
        (folder / "meeting").unlink(missing_ok=True)
        found = ranks.run(3, {"three": three, "hang": hang, "die": die}, folder)
        killed = found.pop("die")
        assert found == {"three": [""] * 3, "hang": [""] * 3}, ranks.first(found)
        assert killed == ["", "missing", ""], ranks.first({"die": killed})
