"""Distillation against its formula, with gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import LanguageHead, LanguageHeadSpec
from lamina.objectives import CausalLM, Distillation, MaskedLM, Taught, loss
from lamina.objectives.distillation import divergence
from lamina.train.loader import Loader
from lamina.train.loop import Trainer
from lamina.train.optimiser import AdamW
from lamina.train.schedule import Constant
from lamina.train.specs import LoopSpec
from tests.tiny import BERT, GPT2, spec
from tests.train.small import Rows, decoder


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_divergence_is_the_formula(monkeypatch: pytest.MonkeyPatch, temperature: float, softcap: float | None):
    monkeypatch.setattr(loss, "SCORES", 1)  # 64 rows at a time
    random = torch.Generator().manual_seed(0)
    student = LanguageHead(LanguageHeadSpec(softcap=softcap, bias=True), 7, 11).double()
    teacher = LanguageHead(LanguageHeadSpec(tied=False, scale=0.7, softcap=softcap, bias=True), 9, 11).double()
    for one in [*student.parameters(), *teacher.parameters()]:
        torch.nn.init.normal_(one, generator=random)
    table = torch.randn(11, 7, generator=random, dtype=torch.float64).requires_grad_()
    hidden = torch.randn(150, 7, generator=random, dtype=torch.float64).requires_grad_()
    theirs = torch.randn(150, 9, generator=random, dtype=torch.float64)
    found = divergence((hidden, student, table), (theirs, teacher, table), temperature)
    expected = torch.zeros((), dtype=torch.float64)
    target = (teacher(theirs, table) / temperature).softmax(-1).detach()
    own = (student(hidden, table) / temperature).softmax(-1)
    for p, q in zip(target, own, strict=True):
        expected = expected + temperature**2 * (p * (p / q).log()).sum()
    torch.testing.assert_close(found, expected)
    of = [hidden, table, *student.parameters()]
    for one, other in zip(torch.autograd.grad(found, of), torch.autograd.grad(expected, of), strict=True):
        torch.testing.assert_close(one, other)
    alike = divergence((theirs, teacher, table), (theirs, teacher, table), temperature)
    assert float(alike.detach()) == pytest.approx(0, abs=1e-9)


def taught(mix: float, temperature: float = 2.0, **more: Any) -> tuple[Taught, lamina.Model, list[str]]:
    teacher, asked = decoder(dropout=0.5).build(seed=5), []

    def load(source: str) -> lamina.Model:
        asked.append(source)
        return teacher

    opening: Any = SimpleNamespace(model=load)
    return Distillation(teacher="a", mix=mix, temperature=temperature, **more).ready(opening), teacher, asked


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_a_step_is_the_mean_of_both(mix: float):
    task, teacher, asked = taught(mix)
    assert asked == ["a"] and not teacher.training
    model = decoder().build(seed=0)
    loader = Loader(task, Rows(), range(40), batch=4, micro=2, seed=0, workers=0)
    batch = task.collate([Rows().example(i, np.random.default_rng(i)) for i in range(4)])
    with torch.no_grad():
        own = model(**batch.inputs).logits
    theirs = teacher(**batch.inputs).logits
    assert own is not None and theirs is not None
    chosen = batch.labels["next_token"] != -100
    assert batch.asked["teacher"] == batch.asked["next_token"] == int(chosen.sum())
    p, q = (theirs / 2).log_softmax(-1)[chosen], (own / 2).log_softmax(-1)[chosen]
    divergence_ = 4 * (p.exp() * (p - q)).sum(-1).mean()
    plain = torch.nn.functional.cross_entropy(own[chosen], batch.labels["next_token"][chosen])
    trainer = Trainer(model, task, loader, AdamW(), Constant(), LoopSpec(steps=9, batch=4))
    step = trainer.step()
    assert step.loss == pytest.approx(float(mix * divergence_ + (1 - mix) * plain), rel=1e-5)
    assert step.parts["teacher"] == pytest.approx(float(divergence_), rel=1e-5)
    assert step.parts["next_token"] == pytest.approx(float(plain), rel=1e-5)
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_student_that_is_the_teacher_learns_nothing():
    task, _, _ = taught(1.0)
    model = decoder().build(seed=5)
    loader = Loader(task, Rows(), range(40), batch=4, micro=4, seed=0, workers=0)
    step = Trainer(model, task, loader, AdamW(), Constant(), LoopSpec(steps=9, batch=4)).step()
    assert step.loss == pytest.approx(0, abs=1e-6) and step.gradient_norm < 1e-5


def test_what_is_refused():
    task, _, _ = taught(0.5)
    task.fits(decoder())
    other = decoder()
    other = other.replace(embedding=other.embedding.replace(vocabulary=32))
    with pytest.raises(UnsupportedError, match="the teacher has a vocabulary of 31 and the student of 32"):
        task.fits(other)
    with pytest.raises(UnsupportedError, match="a causal objective needs a decoder"):
        Taught(Distillation(teacher="a"), spec(BERT).build())
    with pytest.raises(UnsupportedError, match="a masked objective needs an encoder"):
        Distillation(teacher="a", objective=MaskedLM()).fits(spec(GPT2))
    with pytest.raises(LaminaError, match="temperature=0.0 must be above 0"):
        Distillation(teacher="a", temperature=0.0)
    batch = CausalLM().collate([Rows().example(0, np.random.default_rng())])
    with pytest.raises(UnsupportedError, match=r"distillation needs its teacher: objective\.ready, or Taught"):
        Distillation(teacher="a").total(decoder().build(), batch)
