"""The mesh: products with their arithmetic, and what a model cannot be shared out by."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import AttentionSpec, CapacitySpec, CompressiveSpec, MemoryAttentionSpec, RouterLossSpec
from lamina.parallel import MeshSpec, arguments, plan, template
from lamina.parallel.context import Cut
from lamina.parallel.pipeline import owners
from lamina.specs import edit
from lamina.tokens import Tokens
from tests import tiny
from tests.parallel import same

GPT2 = tiny.spec(tiny.GPT2)
MIXTRAL = same.MODELS["mixtral"]()


@pytest.mark.parametrize(
    ("fields", "world", "says"),
    [
        ({"replicate": 2, "shard": 2, "tensor": 2}, 4, "replicate 2 x shard 2 x tensor 2 = 8 ranks; this run has 4"),
        ({}, 2, "shard 1 = 1 rank; this run has 2"),
        (
            {"shard": -1, "tensor": 3},
            4,
            "shard is what is left, but tensor 3 = 3 ranks do not divide the 4 of this run",
        ),
        ({"tensor": 3}, 3, "decoder.layers.0.steps.0.op: 4 heads cannot be shared by tensor = 3"),
        ({"expert": 2}, 2, "expert is 2, and this model has no experts; use shard in its stead"),
        ({"pipeline": 3}, 3, "2 layers cannot be shared by pipeline = 3"),
        (
            {"pipeline": 2, "tensor": 2},
            4,
            "tensor 2 x pipeline 2 = 4 ranks: beside pipeline, tensor is not built; use replicate or shard",
        ),
    ],
)
def test_impossible_meshes(fields: dict[str, int], world: int, says: str):
    with pytest.raises(LaminaError) as caught:
        plan(MeshSpec(**fields), world, GPT2)
    assert str(caught.value).startswith(says)


def test_what_is_left_is_shard():
    assert plan(MeshSpec(shard=-1, tensor=2), 8, GPT2) == MeshSpec(shard=4, tensor=2)
    assert plan(MeshSpec(), 1, GPT2).ranks == 1
    for wrong in ({"shard": 0}, {"shard": -2}, {"tensor": -1}, {"replicate": 0}):
        with pytest.raises(LaminaError, match="must be at least 1"):
            MeshSpec(**wrong)


def test_what_a_model_cannot_be_shared_by():
    for fields, says in (
        ({"expert": 3}, "4 experts cannot be shared by expert = 3"),
        ({"tensor": 16}, "4 heads cannot be shared by tensor = 16"),
    ):
        with pytest.raises(LaminaError, match=says):
            plan(MeshSpec(**fields), *fields.values(), MIXTRAL)
    kept = CompressiveSpec(length=4, size=4, count=2, rate=2, by="most-used")
    used = edit(GPT2, AttentionSpec, lambda path, part: MemoryAttentionSpec(attention=part, memory=kept))
    with pytest.raises(UnsupportedError, match="what was used most is counted over all heads, and tensor = 2 shares"):
        plan(MeshSpec(tensor=2), 2, used)
    with pytest.raises(LaminaError, match="49 hidden features cannot be shared by tensor = 2"):
        plan(MeshSpec(tensor=2), 2, tiny.spec(tiny.LLAMA | {"intermediate_size": 49}))
    with pytest.raises(LaminaError, match="3 key heads cannot be shared, nor copied, by tensor = 2"):
        plan(
            MeshSpec(tensor=2),
            2,
            tiny.spec(tiny.LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}),
        )
    plan(MeshSpec(tensor=4), 4, tiny.spec(tiny.LLAMA))  # two ranks have each key head


def test_only_one_row_of_layers_is_cut_into_runs():
    with pytest.raises(UnsupportedError, match="pipeline is 2, and this model has an encoder and a decoder"):
        plan(MeshSpec(pipeline=2), 2, same.MODELS["t5"]())
    differ = same.deep()
    assert differ.decoder is not None
    first, *rest = differ.decoder.layers
    first = edit(first, RouterLossSpec, lambda _, one: one.replace(balance=0.5))
    with pytest.raises(UnsupportedError, match="one kind of pooled router losses, and layers of this model differ"):
        plan(MeshSpec(pipeline=2), 2, differ.replace(decoder=differ.decoder.replace(layers=(first, *rest))))
    plan(MeshSpec(pipeline=2, shard=-1, replicate=2), 8, same.deep())


@pytest.mark.parametrize(("layers", "stages"), [(5, 2), (5, 3), (4, 4), (7, 1)])
def test_layers_are_cut_into_runs(layers: int, stages: int):
    """In order, as evenly as it goes, the longer ones first, where there is no head; a tied table lies on both ends."""
    model = tiny.spec(tiny.GPT2 | {"n_layer": layers}).build(device="meta")
    found = owners(model, stages)
    assert list(found) == [name for name, _ in model.named_parameters()]
    runs = [found[f"decoder.layers.{i}.attention.op.q.weight"] for i in range(layers)]
    sizes = [runs.count((stage,)) for stage in range(stages)]
    assert runs == sorted(runs) and sum(sizes) == layers and max(sizes) - min(sizes) <= 1 and sizes[-1] == min(sizes)
    assert found["embedding.weight"] == ((0, stages - 1) if stages > 1 else (0, 0))
    assert found["decoder.position.weight"] == (0,) and found["decoder.norm.bias"] == (stages - 1,)
    untied = owners(tiny.spec(tiny.LLAMA).build(device="meta"), 2)
    assert untied["embedding.weight"] == (0,) and untied["head.weight"] == (1,)


def test_what_looks_at_a_whole_text_is_not_cut():
    from lamina.layers import ExpertsSpec

    bert = tiny.spec(tiny.BERT | {"architectures": ["BertForSequenceClassification"]})
    for spec, says in (
        (bert, "a pooled head reads one token of the whole"),
        (same.longformer(), "Longformer counts or reads the tokens of a whole text"),
        (same.MODELS["retro"](), "ChunkedCrossAttention counts or reads the tokens of a whole text"),
        (edit(MIXTRAL, ExpertsSpec, lambda _, one: one.replace(capacity=CapacitySpec())), "Capacity counts"),
        (
            tiny.spec(tiny.LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
            "phases depend on the length",
        ),
    ):
        with pytest.raises(UnsupportedError, match=says):
            plan(MeshSpec(context=2), 2, spec)


@pytest.mark.parametrize(("size", "length"), [*itertools.product((1, 2, 3), (1, 5, 8, 13))])
def test_texts_are_cut_in_zigzag(size: int, length: int):
    """Each token lies on one rank, and each rank has a chunk from the front and its like from the back."""
    position = torch.arange(length).expand(2, -1)
    tokens = Tokens(position, torch.zeros_like(position), span=(0, length))
    parts = [Cut(rank, size).tokens(tokens)[0].position for rank in range(size)]
    assert len({part.shape for part in parts}) == 1
    everything = torch.cat(parts, dim=1)[0]
    assert sorted(everything[everything >= 0].tolist()) == list(range(length))
    chunk = parts[0].shape[1] // 2
    whole = torch.nn.functional.pad(torch.arange(length), (0, 2 * size * chunk - length), value=-1)
    for rank, part in enumerate(parts):
        front, back = whole[rank * chunk : (rank + 1) * chunk], whole[(2 * size - 1 - rank) * chunk :][:chunk]
        assert part[0].tolist() == [*front.tolist(), *back.tolist()]
        assert Cut(rank, size).mine(position, -1).tolist() == part.tolist()


def test_templates():
    for kind, signs in (("slurm", ["#SBATCH --nodes=3", "srun"]), ("sky", ["num_nodes: 3", "SKYPILOT_NODE_RANK"])):
        text = template(kind, "my run.yaml", 3, 8)
        for sign in (*signs, "-m lamina train 'my run.yaml'", "--nproc-per-node=8"):
            assert sign in text, (kind, sign)
        assert "0.0.0.0" not in text
    with pytest.raises(LaminaError, match="unknown kind of launcher 'slrum'; did you mean 'slurm'?"):
        template("slrum", "x", 1, 1)
    with pytest.raises(LaminaError, match="nodes is 0, gpus 1; both must be at least 1"):
        template("sky", "x", 0, 1)


@pytest.mark.timeout(300)
def test_torchrun_starts_us():
    """As many processes as were asked for, on the loopback address."""
    argv = arguments(2, ["--version"])
    assert "--rdzv-endpoint=127.0.0.1:0" in argv
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lamina") == 2
    with pytest.raises(LaminaError, match="nproc is 0"):
        arguments(0, [])


def test_a_mesh_is_read_without_torch_distributed():
    code = (
        "import sys; from lamina.parallel import MeshSpec, arguments; print('torch.distributed.tensor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"]
