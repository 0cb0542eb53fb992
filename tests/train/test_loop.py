"""The loop: what a step is, and what changes nothing about it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lamina.adapters import LoRASpec, attach
from lamina.errors import LaminaError
from lamina.layers import BatchNormSpec, FeedForwardSpec, ProductKeySpec, Record
from lamina.layers.product_keys import Values
from lamina.objectives import IGNORE, Batch, CausalLM, Example, MaskedLM
from lamina.specs import edit
from lamina.train.loader import Loader
from lamina.train.loop import Trainer
from lamina.train.optimiser import Adafactor, AdamW, Group, Muon
from lamina.train.roles import freeze
from lamina.train.schedule import Constant
from lamina.train.specs import LoopSpec
from tests.tiny import BERT, spec
from tests.train.small import Rows, decoder, experts, trainer

SPECS = {"llama": decoder(), "gpt": decoder(dropout=0.3), "experts": experts(), "balanced": experts(correction=True)}


def weights(one: Trainer) -> dict[str, torch.Tensor]:
    return {f"{file}/{name}": value.clone() for file, part in one.tensors().items() for name, value in part.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_is_adamw_on_the_mean_over_tokens():
    """Against torch, written out: rows with documents, whose first tokens are asked of nobody."""
    one = trainer(decoder(), batch=6, micro=2, rate=1e-2, clip=None)
    twin = copy.deepcopy(one.model)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in twin.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in twin.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    rows = [one.loader.example(i) for i in range(6)]
    losses, count = torch.zeros(()), 0
    for row in rows:
        tokens = torch.from_numpy(row["tokens"])[None]
        for document in range(int(row["documents"].max()) + 1):
            part = tokens[:, torch.from_numpy(row["documents"]) == document]
            if part.shape[1] > 1:
                logits = twin(part[:, :-1]).logits
                losses = losses + F.cross_entropy(logits[0], part[0, 1:], reduction="sum")
                count += part.shape[1] - 1
    (losses / count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
    optimiser.step()
    step = one.step()
    assert step.loss == pytest.approx(float(losses.detach()) / count, rel=1e-6)
    assert step.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    for (name, weight), other in zip(one.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_changes_nothing(micro: int):
    """Also where the pieces ask for different numbers of tokens."""
    whole, parts = trainer(decoder(), batch=6, micro=6), trainer(decoder(), batch=6, micro=micro)
    for _ in range(3):
        one, other = whole.step(), parts.step()
        assert other.loss == pytest.approx(one.loss, rel=1e-6) and other.tokens == one.tokens
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Pairs:
    """Rows for BERT's pre-training, in which nothing to fifteen tokens are asked for, and one label each."""

    def __len__(self) -> int:
        return 40

    def example(self, index: int, random: np.random.Generator) -> Example:
        tokens, size = random.integers(5, 68, size=20 - index % 7), index * 5 % 16
        labels = np.full(len(tokens), IGNORE)
        labels[:size] = tokens[:size]
        return {"input_ids": tokens, "labels": labels, "segments": tokens % 2, "other": np.array(index % 3 == 0)}


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_each_kind_of_label_has_its_own_count(micro: int):
    """BERT's loss: the mean over masked tokens and the mean over pairs, whatever the pieces; two ranks have one
    count."""
    task = MaskedLM(next_sentence=True)

    fields = {"architectures": ["BertForPreTraining"], "vocab_size": 68}
    fields |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # which would draw once a forward

    def made(micro: int) -> Trainer:
        loader = Loader(task, Pairs(), range(1000), batch=6, micro=micro, seed=0, workers=0)
        model = spec(BERT | fields).build(seed=0)
        return Trainer(model, task, loader, AdamW(rate=1e-3), Constant(), LoopSpec(steps=100, batch=6))

    whole, parts = made(6), made(micro)
    batch = whole.loader.step(0)[0]
    twin = copy.deepcopy(whole.model).eval()
    out = twin(**batch.inputs)
    assert out.logits is not None and out.label_logits is not None
    masked = F.cross_entropy(out.logits.flatten(0, 1), batch.labels["masked"].flatten())
    follows = F.cross_entropy(out.label_logits, batch.labels["next_sentence"])
    one, other = whole.step(), parts.step()
    assert one.loss == pytest.approx(float(masked.detach() + follows.detach()), rel=1e-5)
    expected = {"masked": float(masked.detach()), "next_sentence": float(follows.detach())}
    assert one.parts == pytest.approx(expected, rel=1e-5)
    assert other.loss == pytest.approx(one.loss, rel=1e-6) and other.parts == pytest.approx(one.parts, rel=1e-6)
    assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
    halves = [
        Loader(task, Pairs(), range(1000), batch=6, micro=3, seed=0, rank=rank, ranks=2, workers=0) for rank in range(2)
    ]
    asked = [half.step(0)[0].asked for half in halves]
    assert batch.asked == {kind: asked[0][kind] + asked[1][kind] for kind in ("masked", "next_sentence")}


def test_evaluation_counts_each_kind():
    one = trainer(decoder())
    batches = one.loader.step(0)
    found = one.evaluate(batches)
    totals = [one.objective.total(one.model.eval(), batch).kinds["next_token"] for batch in batches]
    assert found.asked == sum(total.asked for total in totals)
    assert found.loss == pytest.approx(sum(float(total.nats) for total in totals) / found.asked)
    assert found.parts == {"next_token": found.loss}
    assert math.isnan(one.evaluate([]).loss)


def test_ranks_read_a_step_together():
    """The rows of two ranks are those of one, in order, none twice."""
    alone = trainer(decoder(), batch=6, micro=6).loader
    order = alone.order
    halves = [
        Loader(CausalLM(), Rows(), order, batch=6, micro=3, seed=0, rank=rank, ranks=2, workers=0) for rank in range(2)
    ]
    for step in (0, 1, 7):
        whole = alone.step(step)[0]
        parts = [half.step(step)[0] for half in halves]
        assert torch.equal(whole.labels["next_token"], torch.cat([part.labels["next_token"] for part in parts]))
        assert whole.asked["next_token"] == sum(part.asked["next_token"] for part in parts)


def test_rows_of_a_length_are_read_together():
    """A step of 24 rows of 14 to 20 tokens in fours: the same rows, no four longer than what is next in length."""
    task = MaskedLM(next_sentence=True)
    whole, fours = (
        Loader(task, Pairs(), range(1000), batch=24, micro=micro, seed=3, workers=0).step(1) for micro in (24, 4)
    )
    rows = [row[mask.bool()].tolist() for batch in fours for row, mask in _read(batch)]
    assert sorted(rows) == sorted(row[mask.bool()].tolist() for row, mask in _read(whole[0]))
    assert [len(row) for row in rows] == sorted(len(row) for row in rows)
    widths = [batch.inputs["input_ids"].shape[1] for batch in fours]
    assert widths == [max(map(len, rows[i : i + 4])) for i in range(0, 24, 4)]


def _read(batch: Batch) -> zip[tuple[torch.Tensor, torch.Tensor]]:
    ids = batch.inputs["input_ids"]
    return zip(ids, batch.inputs.get("attention_mask", torch.ones_like(ids)), strict=True)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(workers: int):
    one, other = trainer(decoder(), workers=0), trainer(decoder(), workers=workers)
    assert [one.step().loss for _ in range(4)] == [other.step().loss for _ in range(4)]
    other.loader.close()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_what_is_frozen_is_written_as_it_was(precision: str):
    """In 16 bits too, where the model computes with rounded weights; and all that is written has one dtype."""
    model = decoder().build(seed=0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    freeze(model, (), ("decoder.layers.1",))
    one = trainer(decoder(), model=model, precision=precision, rate=1e-2)
    for _ in range(2):
        one.step()
    kept = one.tensors()[one.kept]
    assert {weight.dtype for weight in kept.values()} == {torch.float32} and set(kept) == set(before)
    moved = {name for name, weight in kept.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.startswith("decoder.layers.1.")}


@pytest.mark.parametrize("average", [None, 0.9])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SPECS)
def test_resuming_is_exact_to_the_bit(name: str, precision: Any, average: float | None):
    """5 steps = 2, everything thrown away, 3 more: dropout, experts, packing, accumulation."""
    spec = SPECS[name]
    whole = trainer(spec, batch=4, micro=2, precision=precision, average=average)
    losses = [whole.step().loss for _ in range(5)]
    first = trainer(spec, batch=4, micro=2, precision=precision, average=average)
    found = [first.step().loss for _ in range(2)]
    kept = {file: {n: t.clone() for n, t in part.items()} for file, part in first.tensors().items()}
    torch.manual_seed(1234)  # whatever happens in between
    second = trainer(spec, batch=4, micro=2, precision=precision, average=average, model_seed=99)
    second.load(kept, first.progress.to_dict())
    found += [second.step().loss for _ in range(3)]
    assert found == losses
    assert same(weights(whole), weights(second))
    assert whole.progress == second.progress


def adapted_model(spec: Any, seed: int = 0) -> Any:
    model = spec.build(seed=0)
    attach(model, LoRASpec(rank=3, dropout=0.3, targets=("q", "v", "o")), seed)
    return model


@pytest.mark.parametrize("name, precision", [("gpt", "float32"), ("gpt", "bfloat16"), ("balanced", "float32")])
def test_resuming_an_adapter_is_exact_to_the_bit(name: str, precision: Any):
    """The same for an adapter, whose checkpoint holds nothing of the model that it changes."""
    spec = SPECS[name]
    more: dict[str, Any] = {"batch": 4, "micro": 2, "precision": precision, "average": 0.9}
    whole, first = (trainer(spec, model=adapted_model(spec), **more) for _ in range(2))
    before = {key: weight.clone() for key, weight in whole.model.named_parameters() if "lora_" not in key}
    losses = [whole.step().loss for _ in range(5)]
    found = [first.step().loss for _ in range(2)]
    kept = {file: {n: t.clone() for n, t in part.items()} for file, part in first.tensors().items()}
    assert set(kept) == {"adapter", "optimiser", "average"} and all(
        "lora_" in n for part in kept.values() for n in part
    )
    second = trainer(spec, model=adapted_model(spec, seed=99), **more)
    second.load(kept, first.progress.to_dict())
    found += [second.step().loss for _ in range(3)]
    assert found == losses
    assert same(weights(whole), weights(second))
    after = dict(whole.model.named_parameters())
    assert all(torch.equal(after[key], weight) for key, weight in before.items())


def test_an_adapter_leaves_the_balance_of_experts_alone():
    """The bias of a router is part of the model, which stays as it is."""
    spec = experts(correction=True)
    one = trainer(spec, model=adapted_model(spec))
    before = {key: weight.clone() for key, weight in one.model.named_parameters() if "correction" in key}
    one.step()
    after = dict(one.model.named_parameters())
    assert before and all(torch.equal(after[key], weight) for key, weight in before.items())


def test_recomputing_changes_nothing():
    spec = decoder(dropout=0.3)
    one, other = trainer(spec), trainer(spec, recompute=True)
    assert [one.step().loss for _ in range(3)] == [other.step().loss for _ in range(3)]
    assert same(weights(one), weights(other))


def test_frozen_weights_stay_and_others_move():
    from lamina.train.roles import freeze

    model = decoder().build(seed=0)
    freeze(model, ("embedding",), ("decoder.layers.1", "embedding"))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    one = trainer(decoder(), model=model)
    one.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all(name.startswith("decoder.layers.1.") for name in moved)
    assert moved == {name for name in before if name.startswith("decoder.layers.1.")}
    assert all(name.startswith("decoder.layers.1.") for name in one.tensors()["optimiser"])


@pytest.mark.parametrize(
    "frozen, trained, message",
    [
        (("decoder.layers.7",), None, "unknown path to freeze 'decoder.layers.7'; did you mean 'decoder.layers.[01]'"),
        ((), ("embeding",), "unknown path to train 'embeding'; did you mean 'embedding'"),
        (("*",), None, "every weight is frozen"),
    ],
)
def test_paths_that_name_nothing_are_refused(frozen: Any, trained: Any, message: str):
    from lamina.train.roles import freeze

    with pytest.raises(LaminaError, match=message):
        freeze(decoder().build(), frozen, trained)


def test_roles_and_groups():
    from lamina.train.roles import role

    model = experts().build()
    roles = {name: role(model, name) for name, _ in model.named_parameters()}
    assert roles["embedding.weight"] == "embedding"
    assert roles["decoder.layers.0.attention.op.q.weight"] == "matrix"
    assert roles["decoder.layers.0.attention.pre.weight"] == "norm"
    assert roles["decoder.layers.0.feedforward.op.router.weight"] == "router"
    assert roles["decoder.layers.0.feedforward.op.experts.up.weight"] == "expert"
    assert roles["decoder.norm.weight"] == "norm"
    spec = AdamW(
        rate=1.0,
        groups=(Group(roles=("embedding",), rate=0.5, decay=0.0), Group(paths=("decoder.layers.1",), rate=2.0)),
    )
    one = trainer(experts(), optimiser=spec)
    share = {
        name: (group["share"], group["weight_decay"])
        for optimiser in one.optimiser.optimisers
        for group in optimiser.param_groups
        for name, weight in one.parameters.items()
        if any(weight is other for other in group["params"])
    }
    assert share["embedding.weight"] == (0.5, 0.0)
    assert share["decoder.layers.0.attention.op.q.weight"] == (1.0, 0.1)
    assert share["decoder.layers.1.attention.op.q.weight"] == (2.0, 0.1)
    assert share["decoder.layers.1.attention.pre.weight"] == (2.0, 0.0)
    with pytest.raises(LaminaError, match="fits no weight"):
        trainer(decoder(), optimiser=AdamW(groups=(Group(roles=("expert",)),)))


def test_muon_turns_matrices_and_leaves_the_rest_to_adamw():
    one = trainer(experts(), optimiser=Muon(rate=1e-2))
    one.step()
    state = {name.partition(":")[2] for name in one.tensors()["optimiser"]}
    assert state == {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}
    turned = {name.partition(":")[0] for name in one.tensors()["optimiser"] if name.endswith("momentum_buffer")}
    assert turned == {f"decoder.layers.{i}.attention.op.{part}.weight" for i in range(2) for part in "qkvo"}


def test_the_average_is_the_formula_and_is_what_is_evaluated():
    one = trainer(decoder(), average=0.75, rate=1e-2)
    kept = {name: weight.detach().clone() for name, weight in one.parameters.items()}
    for _ in range(3):
        one.step()
        for name, weight in one.parameters.items():
            kept[name] += 0.25 * (weight.detach() - kept[name])
    assert one.average is not None
    for name, value in one.average.values.items():
        torch.testing.assert_close(value, kept[name])
    batches = one.loader.step(50)
    found = one.evaluate(batches)
    twin = decoder().build(seed=0)
    twin.load_state_dict(kept)
    expected = trainer(decoder(), model=twin).evaluate(batches)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    before = {name: weight.clone() for name, weight in one.parameters.items()}
    assert all(torch.equal(before[name], weight) for name, weight in one.parameters.items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_gradient_that_is_not_finite_changes_nothing(precision: Any, monkeypatch: pytest.MonkeyPatch):
    one = trainer(decoder(), precision=precision, average=0.9)
    one.step()
    before = weights(one)
    with monkeypatch.context() as patch:
        total = type(one.objective).total

        def broken(*args: Any) -> Any:
            found = total(*args)
            kinds = {kind: replace(one, total=one.total * float("inf")) for kind, one in found.kinds.items()}
            return replace(found, kinds=kinds)

        patch.setattr(type(one.objective), "total", broken)
        step = one.step()
    assert step.skipped and one.progress.skipped == 1 and same(before, weights(one))
    assert not one.step().skipped and not same(before, weights(one))


def test_float16_keeps_small_gradients_with_a_scale():
    one = trainer(decoder(), precision="float16")
    wide = trainer(decoder())
    for _ in range(3):
        a, b = one.step(), wide.step()
    assert a.loss == pytest.approx(b.loss, rel=2e-3) and a.gradient_norm == pytest.approx(b.gradient_norm, rel=2e-2)
    assert next(one.model.parameters()).dtype == torch.float16
    assert all(value.dtype == torch.float32 for value in one.tensors()["model"].values())


def test_the_norm_is_clipped():
    """SGD would show it at once; AdamW's second moment is the square of what it was given."""
    free, held = trainer(decoder(), clip=None), trainer(decoder(), clip=0.01)
    norm = free.step().gradient_norm
    assert norm > 0.01 and held.step().gradient_norm == pytest.approx(norm)
    name = "decoder.layers.0.attention.op.q.weight:exp_avg"
    torch.testing.assert_close(
        held.tensors()["optimiser"][name] * norm / 0.01, free.tensors()["optimiser"][name], rtol=1e-3, atol=1e-7
    )


def test_batches_that_cannot_be_shared_out_are_refused():
    with pytest.raises(
        LaminaError, match=r"batch=6 examples cannot be shared out evenly: 2 ranks x micro-batches of 2"
    ):
        Loader(CausalLM(), Rows(), range(10), batch=6, micro=2, seed=0, ranks=2)


def test_an_example_has_its_own_random_numbers():
    from lamina.train.loader import randomness

    draws = {(seed, place): randomness(seed, place).integers(1 << 60) for seed in range(3) for place in range(50)}
    assert len(set(draws.values())) == len(draws)
    assert randomness(1, 7).integers(1 << 60) == draws[1, 7]


def test_an_adapter_learns_one_batch():
    spec = decoder()
    model = spec.build(seed=0)
    model.embedding.weight.data.mul_(20)  # the head is the table, which stays: at 0.02 no logit could become large
    attach(model, LoRASpec(rank=8, targets=("decoder",)))
    one = trainer(spec, model=model, rate=2e-2)
    one.loader.order = [0, 1, 2, 3] * 100  # pyright: ignore
    found = [one.step().loss for _ in range(100)]
    assert found[-1] < 0.2 * found[0]


def test_the_loss_falls_on_one_batch():
    """Any model learns a batch by heart."""

    class Same:
        def __getitem__(self, position: int) -> int:
            return position % 4

    model = decoder().build(seed=0)
    loader = Loader(CausalLM(), Rows(), Same(), batch=4, micro=4, seed=0)
    one = Trainer(model, CausalLM(), loader, AdamW(rate=1e-2), Constant(warmup=5), LoopSpec(steps=300, batch=4))
    first = one.step().loss
    for _ in range(299):
        last = one.step().loss
    assert abs(first - np.log(31)) < 0.1 and last < 0.05


MEMORY = decoder()
MEMORY = edit(MEMORY, FeedForwardSpec, lambda path, part: ProductKeySpec(heads=2, keys=12, key_dim=6, chosen=3))
VALUES = "decoder.layers.0.feedforward.op.values.weight"


def test_a_table_of_values_gets_only_the_rows_that_were_read():
    """Against Adam on those rows, written out; the norm and the clipping count a row that was read twice once."""
    one = trainer(MEMORY, batch=4, micro=2, rate=1e-2, clip=0.05)
    table = one.model.get_parameter(VALUES)
    means, squares, moved = torch.zeros_like(table), torch.zeros_like(table), set()
    for step in range(3):
        before, twin = table.detach().clone(), copy.deepcopy(one.model)
        for part in twin.modules():
            if isinstance(part, Values):
                part.sparse = False
        batches = one.loader.step(step)
        asked, rows = sum(batch.asked["next_token"] for batch in batches), torch.zeros(len(table), dtype=torch.bool)
        for batch in batches:
            record = Record("*layers.0.*.chosen")
            (one.objective.total(twin, batch, record).kinds["next_token"].total / asked).backward()
            rows[next(iter(record.values.values())).flatten()] = True
        grads = [p.grad for p in twin.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        gradient = twin.get_parameter(VALUES).grad
        assert gradient is not None and not gradient[~rows].any()
        taken = one.step()
        assert taken.gradient_norm == pytest.approx(float(norm), rel=1e-5) and float(norm) > 0.05
        gradient = gradient[rows] * 0.05 / norm
        means[rows] = 0.9 * means[rows] + 0.1 * gradient
        squares[rows] = 0.95 * squares[rows] + 0.05 * gradient.square()
        size = 1e-2 * (1 - 0.95 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
        expected = before.clone()
        expected[rows] -= size * means[rows] / (squares[rows].sqrt() + 1e-8)
        torch.testing.assert_close(table.detach(), expected, rtol=1e-4, atol=2e-6)
        assert torch.equal(table[~rows], before[~rows]) and bool((~rows).any())
        moved |= set(rows.nonzero().flatten().tolist())
    assert len(moved) < len(table)


def test_a_run_with_a_table_goes_on_bit_for_bit():
    one, other = trainer(MEMORY), trainer(MEMORY, model_seed=5)
    for _ in range(2):
        one.step()
    other.load(
        {file: {n: v.clone() for n, v in part.items()} for file, part in one.tensors().items()}, one.progress.to_dict()
    )
    assert [one.step().loss for _ in range(2)] == [other.step().loss for _ in range(2)]
    assert same(weights(one), weights(other))


@pytest.mark.parametrize(
    "more",
    [
        {"optimiser": AdamW(groups=(Group(roles=("value",), decay=0.1),))},
        {"optimiser": Adafactor()},
        {"precision": "bfloat16"},
    ],
    ids=["decay", "adafactor", "bfloat16"],
)
def test_where_a_table_cannot_be_read_by_rows_its_gradient_is_whole(more: dict[str, Any]):
    one = trainer(MEMORY, **more)
    assert not any(isinstance(each, torch.optim.SparseAdam) for each in one.optimiser.optimisers)
    assert one.step().loss > one.step().loss - 1 and not any(p.is_sparse for p in one.parameters.values())


def test_averages_over_batches_move_once_where_layers_are_recomputed():
    spec = edit(MEMORY, ProductKeySpec, lambda path, part: part.replace(norm=BatchNormSpec()))
    one, other = trainer(spec), trainer(spec, recompute=True)
    assert [one.step().loss for _ in range(3)] == [other.step().loss for _ in range(3)]
    assert same(weights(one), weights(other))
    assert bool(one.model.get_parameter("decoder.layers.0.feedforward.op.norm.mean").any())
