"""`lamina train` on several processes is `lamina train` on one."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lamina.errors import LaminaError
from lamina.train import checkpoint
from lamina.train.loader import rows_at_once
from lamina.train.training import train
from tests import tiny
from tests.forked import lamina
from tests.parallel import ranks
from tests.train.test_training import config, data, losses, records, spec_of  # noqa: F401  (data is a fixture)


def on_two(text: str, run: Path, resume: str = "none") -> None:
    """Train as two ranks."""
    with ranks.folder() as folder:
        found = ranks.run(2, {"train": functools.partial(_train, text, run, resume)}, Path(folder))
    assert found == {"train": ["", ""]}, ranks.first(found)


def _train(text: str, run: Path, resume: str, rank: int, folder: Path) -> None:
    train(spec_of(text), run, resume=resume)


def close(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> bool:
    return [step for step, _ in one] == [step for step, _ in other] and all(
        abs(a - b) < 2e-4 * abs(a) for (_, a), (_, b) in zip(one, other, strict=True)
    )


MIXTRAL = {"num_local_experts": 4, "router_aux_loss_coef": 0.1, "output_router_logits": True}


@pytest.mark.parametrize("axis", ["shard", "pipeline"])
def test_two_processes_are_one_and_either_goes_on_from_the_other(tmp_path: Path, data: Path, axis: str):  # noqa: F811
    """Sharded by layer, or with half of the layers each; then one goes on from what two have saved, and back."""
    more: dict[str, Any] = {"loop": {"steps": 6, "batch": 4, "micro": 1, "average": 0.9}, "checkpoints": {"every": 3}}
    if axis == "pipeline":
        base = json.loads(config(data))["model"]["config"]
        more["model"] = {"family": "mixtral", "config": {**base, **MIXTRAL}}
    text, shared = config(data, **more), config(data, **more, mesh={axis: 2})
    train(spec_of(text), tmp_path / "alone")
    if axis == "shard":  # started as a user does
        file = tmp_path / "config.yaml"
        file.write_text(text)
        command = ["train", str(file), "mesh.shard=2", "-o", str(tmp_path / "both"), "--nproc", "2", "--json"]
        both = subprocess.run([sys.executable, "-m", "lamina", *command], capture_output=True, text=True, timeout=110)
        assert both.returncode == 0, both.stderr
        found = json.loads(both.stdout)  # one document, though two processes ran
        assert found["step"] == 6 and Path(found["model"]).is_dir()
    else:
        on_two(shared, tmp_path / "both")
    assert close(losses(tmp_path / "alone"), losses(tmp_path / "both"))
    parts = [[r["parts"] for r in records(tmp_path / run) if "parts" in r] for run in ("alone", "both")]
    assert parts[0][-1] == pytest.approx(parts[1][-1], rel=2e-4) and ("auxiliary" in parts[0][-1]) == (axis != "shard")
    held = [
        [r["validation"]["loss"] for r in records(tmp_path / run) if "validation" in r] for run in ("alone", "both")
    ]
    assert held[0] == pytest.approx(held[1], rel=2e-4)
    files = [f"checkpoints/step-6/{name}" for name in ("model", "optimiser", "average")] + ["model/model"]
    for part in files:
        one, other = (load_file(tmp_path / run / f"{part}.safetensors") for run in ("alone", "both"))
        assert {name: tensor.shape for name, tensor in one.items()} == {n: t.shape for n, t in other.items()}
    manifest = json.loads((tmp_path / "both/checkpoints/step-6/manifest.json").read_text())
    assert manifest["world"] == 2 and manifest["mesh"][axis] == 2

    for run in ("alone", "both"):  # as if it had been killed after step 3
        (tmp_path / run / "checkpoints/step-6/model.safetensors").unlink()
    train(spec_of(text), tmp_path / "both", resume="auto")
    assert close(losses(tmp_path / "alone"), losses(tmp_path / "both"))
    on_two(shared, tmp_path / "alone", resume="auto")
    assert close(losses(tmp_path / "alone"), losses(tmp_path / "both"))


@pytest.mark.parametrize("batch, micro", [(4, 2), (3, 3)])
def test_a_pipeline_divides_a_batch_by_itself(tmp_path: Path, data: Path, batch: int, micro: int):  # noqa: F811
    """To the bit what it does when told so; and the loss of one process, which reads all rows at once."""
    loop: dict[str, Any] = {"steps": 3, "batch": batch}
    for run, more in (("told", {"micro": micro}), ("free", {"micro": None})):
        on_two(config(data, loop={**loop, **more}, mesh={"pipeline": 2}), tmp_path / run)
    assert losses(tmp_path / "free") == losses(tmp_path / "told")
    train(spec_of(config(data, loop={**loop, "micro": None})), tmp_path / "alone")
    assert close(losses(tmp_path / "alone"), losses(tmp_path / "free"))


def test_rows_of_a_forward_that_nobody_has_said(data: Path):  # noqa: F811
    def rows(share: int, stages: int, **more: Any) -> int:
        spec = spec_of(config(data, **more, loop={"micro": None}, mesh={"pipeline": stages}))
        return rows_at_once(spec, architecture, share)

    architecture = tiny.spec(tiny.LLAMA)
    found = [(rows(share, stages), share, stages) for share in range(1, 13) for stages in range(1, 7)]
    for one, share, stages in found:  # the most micro-batches that are no more than stages, and of equal size
        assert one == min(size for size in range(1, share + 1) if share % size == 0 and share // size <= stages)
    assert rows(8, 4, objective={"kind": "contrastive"}) == 8
    assert rows(8, 4, objective={"kind": "causal"}) == 2
    architecture = tiny.spec({**tiny.LLAMA, **MIXTRAL, "model_type": "mixtral"})
    assert rows(8, 4) == 8


def test_an_adapter_and_samples_are_those_of_one_process(tmp_path: Path, data: Path):  # noqa: F811
    """Its files too, its model, and what either goes on from."""
    train(spec_of(config(data, loop={"steps": 4})), tmp_path / "base")
    fields = json.loads(
        config(
            data,
            adapter={"rank": 3, "targets": ["q_proj", "v_proj", "down_proj"], "merge": True},
            evaluation={"every": 2, "prompts": ["The house", "a"], "tokens": 6},
            loop={"steps": 4, "batch": 4, "micro": 1, "average": 0.9},
            checkpoints={"every": 2},
        )
    )
    fields["model"] = {"source": str(tmp_path / "base/model")}
    train(spec_of(json.dumps(fields)), tmp_path / "alone")
    for run in ("tensor", "pipeline"):
        on_two(json.dumps(fields | {"mesh": {run: 2}}), tmp_path / run)
        assert close(losses(tmp_path / "alone"), losses(tmp_path / run)), run
        texts = [[r["sample"] for r in records(tmp_path / one) if "sample" in r] for one in ("alone", run)]
        assert texts[0] == texts[1] and len(texts[0]) == 4, run
        both = [tmp_path / one / "adapter" for one in ("alone", run)]
        assert (
            both[0].joinpath("adapter_config.json").read_bytes() == both[1].joinpath("adapter_config.json").read_bytes()
        )
        for part in (
            "adapter/adapter_model",
            "model/model",
            "checkpoints/step-4/adapter",
            "checkpoints/step-4/optimiser",
        ):
            one, other = (load_file(tmp_path / name / f"{part}.safetensors") for name in ("alone", run))
            assert one.keys() == other.keys(), (run, part)
            for name, tensor in one.items():
                assert abs(tensor - other[name]).max() < 2e-3, (run, part, name)
    (tmp_path / "tensor/checkpoints/step-4/adapter.safetensors").unlink()
    train(spec_of(json.dumps(fields)), tmp_path / "tensor", resume="auto")
    assert close(losses(tmp_path / "alone"), losses(tmp_path / "tensor"))


def test_parts_are_written_by_each_rank_and_read_by_any_number(tmp_path: Path, data: Path):  # noqa: F811
    """A part that is damaged is found, and the checkpoint before is taken; whole and in parts, runs are the same."""
    more: dict[str, Any] = {"loop": {"steps": 6, "batch": 4, "micro": 1, "average": 0.9}}
    train(spec_of(config(data, **more)), tmp_path / "alone")
    more["checkpoints"] = {"every": 3, "layout": "parts"}
    text, run = config(data, **more), tmp_path / "run"
    last = run / "checkpoints/step-6"

    def check(process: int) -> None:
        assert close(losses(tmp_path / "alone"), losses(run))
        one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("alone", "run"))
        assert all(abs(tensor - other[name]).max() < 2e-3 for name, tensor in one.items())
        assert {path.name for path in last.iterdir()} == {"config.yaml", "manifest.json", "parts", "state.json"}
        parts = [path for path in (last / "parts").iterdir() if path.name != ".metadata"]
        assert {path.name.split("_")[2] for path in parts} == {str(rank) for rank in range(process)}
        for path in parts[-1:]:  # as if the disk had lost a byte
            path.write_bytes(path.read_bytes()[:-1])

    on_two(config(data, **more, mesh={"shard": 2}), run)
    check(2)
    said: list[Any] = []
    train(spec_of(text), run, resume="auto", show=said.append)
    assert any("step-6 is skipped" in str(one) and "manifest.json says" in str(one) for one in said)
    check(1)
    on_two(config(data, **more, mesh={"pipeline": 2}), run, resume="auto")
    check(2)
    shutil.rmtree(run / "checkpoints/step-3")
    with pytest.raises(LaminaError, match="step-6"):
        checkpoint.read(last)


def test_a_mesh_that_does_not_fit_is_refused_by_all_in_one_line(tmp_path: Path, data: Path):  # noqa: F811
    file = tmp_path / "config.yaml"
    file.write_text(config(data))
    done = lamina("train", str(file), "mesh.shard=3", "-o", str(tmp_path / "run"))
    assert done.returncode == 2 and done.stderr == "lamina: error: shard 3 = 3 ranks; this run has 1\n"
    done = lamina("train", str(file), "mesh.tensor=8", "--print", "slurm", "--nodes", "2")
    assert done.returncode == 0 and "sbatch" in done.stdout.lower() and str(file) in done.stdout
