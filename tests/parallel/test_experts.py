"""Two processes with half of the experts each give what one with all of them gives, gradients too."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import lamina
from lamina.errors import LaminaError
from lamina.families import Fields, family
from lamina.layers import (
    CapacitySpec,
    EmbeddingSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerSpec,
    StackSpec,
    StepSpec,
    TopKSpec,
)

RANKS = 2


def spec(experts: int = 4) -> lamina.ModelSpec:
    op = ExpertsSpec(
        router=TopKSpec(experts=experts),
        expert=FeedForwardSpec(hidden=10, bias=True),
        capacity=CapacitySpec(training=0.9, least=1),
    )
    layer = LayerSpec(steps=(StepSpec(name="feedforward", op=op),))
    return lamina.ModelSpec(
        width=6,
        embedding=EmbeddingSpec(vocabulary=30),
        decoder=StackSpec(layers=(layer,) * 2),
        head=LanguageHeadSpec(),
        context=16,
    )


def pairs() -> lamina.ModelSpec:
    """An encoder-decoder with biases, two experts a token and masked results: NLLB-MoE."""
    said: dict[str, Any] = {"vocab_size": 30, "d_model": 12, "num_experts": 4, "expert_capacity": 64}
    for side in ("encoder", "decoder"):
        said |= {f"{side}_layers": 2, f"{side}_attention_heads": 3, f"{side}_ffn_dim": 10, f"{side}_sparse_step": 2}
    return family("nllb-moe").spec(Fields(said))


SPECS = {"one stack": spec, "pairs": pairs}


def made(name: str) -> lamina.Model:
    """In training where a capacity binds; in evaluation where chance has a part in training."""
    return SPECS[name]().build(dtype=torch.float64, seed=3).train(name != "pairs")


def run(model: lamina.Model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    more = {"decoder_input_ids": ids.flip(1)} if model.spec.two_stacks else {}
    out = model(ids, mask, **more).logits
    assert out is not None
    (out * torch.linspace(-1, 1, 30)).sum().backward()
    return out.detach()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """A row for each rank; the second is padded, and shorter."""
    ids = torch.randint(30, (RANKS, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def work(rank: int, folder: str, name: str) -> None:
    from lamina.parallel import spread_experts

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    model = made(name)
    with pytest.raises(LaminaError, match="has 5 experts, which 2 ranks cannot share out evenly"):
        spread_experts(spec(5).build())
    spread_experts(model)
    ids, mask = inputs()
    out = run(model, ids[rank : rank + 1], mask[rank : rank + 1])
    torch.save({"out": out, **{name: p.grad for name, p in model.named_parameters()}}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SPECS)
def test_two_processes_are_one(name: str):
    one = made(name)
    ids, mask = inputs()
    expected = run(one, ids, mask)
    real = torch.ones_like(mask).bool() if name == "pairs" else mask.bool()  # the padded text is then the source
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, name), nprocs=RANKS)  # pyright: ignore
        found = [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]
    torch.testing.assert_close(torch.cat([part["out"] for part in found])[real], expected[real])
    for name, parameter in one.named_parameters():
        both = [part[name] for part in found]
        whole = torch.cat(both) if ".experts." in name else both[0] + both[1]
        torch.testing.assert_close(whole, parameter.grad, msg=name)
