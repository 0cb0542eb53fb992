"""What is said of transformers at any scale, tried at a small one: recipes as data, trained by `lamina.train`.

    OMP_NUM_THREADS=1 python benchmarks/qualitative.py --text FILE [--only NAME ...] [--seeds 0 1] [--json FILE]

Decoders of 4 layers and width 128 read 600 batches of 12 x 64 characters of FILE (nanoGPT's small setting, cut short),
one thing changed at a time: positions, feed-forward network, norm and wiring, LLaMA's parts together, experts. Beside
them two mechanisms on made-up tokens: induction heads (Olsson et al., 2022) and copying by a T5. Every claim is judged
from all seeds: it holds where the worst seed clears the margin, and lies inside the noise where the means differ by
less than the seeds do. Runs that the JSON already has are not made again, so that it can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lamina
from lamina.data import Order, Prepared, open_prepared
from lamina.layers import (
    AlibiSpec,
    AttentionSpec,
    BranchSpec,
    EmbeddingSpec,
    ExpertsSpec,
    FanInInitialSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerNormSpec,
    LayerSpec,
    LearnedPositionSpec,
    NormalInitialSpec,
    Record,
    RMSNormSpec,
    RotarySpec,
    RouterLossSpec,
    StackSpec,
    StepSpec,
    SumSpec,
    TopKSpec,
)
from lamina.model import Model, ModelSpec
from lamina.objectives import CausalLM
from lamina.train.loader import Loader, held_out
from lamina.train.loop import Trainer
from lamina.train.optimiser import AdamW
from lamina.train.schedule import Constant, Cosine
from lamina.train.specs import LoopSpec

Figures = dict[str, Any]
InitialSpec = NormalInitialSpec | FanInInitialSpec

# Language models: nanoGPT's small setting, 600 steps of it.

LAYERS, HEADS, WIDTH, LENGTH, BATCH, STEPS = 4, 4, 128, 64, 12, 600
HELD = 30 * 64  # sequences that the validation loss is the mean of
TEXTS = CausalLM(documents=False, aligned=False)

NORM = LayerNormSpec()
PLAIN = FeedForwardSpec(hidden=4 * WIDTH, act="gelu", gated=False)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A language model of the small setting. What is said here is all in which recipes differ."""

    position: LearnedPositionSpec | None = None
    rotary: RotarySpec | None = None
    alibi: AlibiSpec | None = None
    norm: LayerNormSpec | RMSNormSpec = NORM
    network: FeedForwardSpec | ExpertsSpec = PLAIN
    wiring: str = "pre"

    def spec(self, vocabulary: int) -> ModelSpec:
        attention = AttentionSpec(heads=HEADS, key_heads=HEADS, head_dim=WIDTH // HEADS, rotary=self.rotary)
        ops = {"attention": attention, "feedforward": self.network}
        if self.wiring == "parallel":
            branches = tuple(BranchSpec(name=name, op=op) for name, op in ops.items())
            steps = (StepSpec(name="parallel", op=SumSpec(branches=branches), pre=self.norm),)
        else:
            pre, after = (self.norm, None) if self.wiring == "pre" else (None, self.norm)
            steps = tuple(StepSpec(name=name, op=op, pre=pre, after=after) for name, op in ops.items())
        return ModelSpec(
            width=WIDTH,
            embedding=EmbeddingSpec(vocabulary=vocabulary),
            decoder=StackSpec(
                layers=(LayerSpec(steps=steps),) * LAYERS,
                position=self.position,
                score_bias=self.alibi,
                norm=self.norm if self.wiring != "post" else None,
            ),
            head=LanguageHeadSpec(tied=True),
            context=LENGTH if self.position is not None else None,
        )


GPT = Decoder(position=LearnedPositionSpec(size=LENGTH))
GATED = 8 * WIDTH // 3
"""Hidden width at which three matrices have the parameters of two of 4 widths."""


def network(act: Any, gated: bool) -> FeedForwardSpec:
    return FeedForwardSpec(hidden=GATED if gated else 4 * WIDTH, act=act, gated=gated)


def experts(chosen: int) -> ExpertsSpec:
    """Four, with the arithmetic of the dense network: top-1 of full width, top-2 of half."""
    return ExpertsSpec(
        router=TopKSpec(experts=4, chosen=chosen, normalise=chosen > 1),
        expert=FeedForwardSpec(hidden=4 * WIDTH // chosen, act="gelu", gated=False),
        losses=RouterLossSpec(balance=0.01),
    )


DECODERS = {
    "learned": GPT,
    "rotary": replace(GPT, position=None, rotary=RotarySpec()),
    "alibi": replace(GPT, position=None, alibi=AlibiSpec(heads=HEADS)),
    "llama": Decoder(
        rotary=RotarySpec(), norm=RMSNormSpec(), network=replace(network("silu", True), hidden=GATED // 4 * 4)
    ),
    "swiglu": replace(GPT, network=network("silu", True)),
    "geglu": replace(GPT, network=network("gelu", True)),
    "relu": replace(GPT, network=network("relu", False)),
    "top-1": replace(GPT, network=experts(1)),
    "top-2": replace(GPT, network=experts(2)),
    "no positions": replace(GPT, position=None),
    "rms": replace(GPT, norm=RMSNormSpec()),
    "parallel": replace(GPT, wiring="parallel"),
    "post-norm": replace(GPT, wiring="post"),
}


def language(decoder: Decoder, seed: int, data: tuple[Prepared, Prepared], steps: int = STEPS) -> Figures:
    """Train it, and its loss on held-out text: of the length it was trained at, and of four times that."""
    training, validation = data
    model = decoder.spec(training.vocabulary).build(seed=seed)
    trainer = trained(model, TEXTS, TEXTS.examples(training, LENGTH), seed, batch=BATCH, steps=steps)
    figures: Figures = {"parameters": sum(weight.numel() for weight in model.parameters())}
    for _ in range(steps):
        figures["training loss"] = trainer.step().loss
    for times in (1, 4) if decoder.position is None else (1,):
        examples = TEXTS.examples(validation, times * LENGTH)
        batches = held_out(TEXTS, examples, rows=HELD // times, micro=64 // times, seed=0)
        figures["loss" if times == 1 else "loss at 4 x length"] = trainer.evaluate(batches).loss
    if isinstance(decoder.network, ExpertsSpec):
        batch = next(held_out(TEXTS, TEXTS.examples(validation, LENGTH), rows=64, micro=64, seed=0))
        record = Record("*.load")
        with torch.no_grad():
            model.eval()(**batch.inputs, record=record)
        shares = [load / load.sum() for load in record.values.values()]
        figures["lowest load"] = min(float(share.min()) for share in shares)
        figures["highest load"] = max(float(share.max()) for share in shares)
    return figures


def trained(model: Model, objective: Any, examples: Any, seed: int, *, batch: int, steps: int, **more: Any) -> Trainer:
    """A trainer such as `lamina train` makes: nanoGPT's optimiser and schedule, where nothing else is said."""
    more.setdefault("optimiser", AdamW(rate=1e-3, betas=(0.9, 0.99), decay=0.1))
    more.setdefault("schedule", Cosine(warmup=100, final=0.1))
    loader = Loader(objective, examples, Order(len(examples), seed), batch=batch, micro=batch, seed=seed, workers=0)
    loop = LoopSpec(steps=steps, batch=batch, clip=1.0)
    return Trainer(model, objective, loader, more["optimiser"], more["schedule"], loop, seed=seed)


# Induction heads: attention alone, on sequences that repeat after a period.

SYMBOLS, SEQUENCE = 32, 64
DEVIATION = NormalInitialSpec()
UNIT = FanInInitialSpec()
"""Initial values: 0.02 for all; N(0, 1) for the table, and matrices by what they read."""


class Repeated:
    """A permutation of the first `period` of 32 symbols, over and over. period: drawn from 8 to 32, or always 32."""

    def __init__(self, fixed: bool = False) -> None:
        self.fixed = fixed

    def __len__(self) -> int:
        return 1 << 40

    def example(self, index: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        period = SYMBOLS if self.fixed else int(random.integers(8, SYMBOLS + 1))
        return {"tokens": np.resize(random.permutation(SYMBOLS)[:period], SEQUENCE + 1), "period": np.array(period)}


def induction(
    layers: int, seed: int, fixed: bool = False, steps: int = 500, initial: InitialSpec = DEVIATION
) -> Figures:
    """Share of tokens that are right, of those which a repetition tells."""
    attention = AttentionSpec(heads=4, key_heads=4, head_dim=16, rotary=RotarySpec())
    layer = LayerSpec(steps=(StepSpec(name="attention", op=attention, pre=LayerNormSpec()),))
    spec = ModelSpec(
        width=64,
        embedding=EmbeddingSpec(vocabulary=SYMBOLS),
        decoder=StackSpec(layers=(layer,) * layers, norm=LayerNormSpec()),
        head=LanguageHeadSpec(tied=False),
        initial=initial,
    )
    model, examples = spec.build(seed=seed), Repeated(fixed)
    optimiser = AdamW(rate=3e-3, betas=(0.9, 0.999), decay=0.01)
    trainer = trained(model, TEXTS, examples, seed, batch=32, steps=steps, optimiser=optimiser, schedule=Constant())
    figures: Figures = {"parameters": sum(weight.numel() for weight in model.parameters())}
    for step in range(1, steps + 1):
        trainer.step()
        if step in (steps // 2, steps):
            figures["accuracy" if step == steps else f"accuracy at step {step}"] = _told(model, examples)
    return figures


def _told(model: Model, examples: Repeated) -> float:
    drawn = [examples.example(i, np.random.default_rng([7, i])) for i in range(256)]
    tokens = torch.from_numpy(np.stack([one["tokens"] for one in drawn]))
    period = torch.tensor([int(one["period"]) for one in drawn])
    model.eval()
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    model.train()
    asked = torch.arange(SEQUENCE) >= period[:, None]  # what stands here stood here a period ago
    return float((logits.argmax(-1) == tokens[:, 1:])[asked].float().mean())


# A small T5 that copies twelve symbols.


class Copies:
    """Twelve of 32 symbols, and the end, on both sides. 0 is padding and the start, 1 the end, 2 is not used."""

    def __len__(self) -> int:
        return 1 << 40

    def example(self, index: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        tokens = np.append(random.integers(3, 35, size=12), 1)
        return {"source": tokens, "target": tokens}


def copying(seed: int, steps: int = 3000) -> Figures:
    """Share of sequences that greedy decoding copies without a fault."""
    from lamina.families import Fields, family
    from lamina.objectives import SequenceToSequence

    said = {
        "model_type": "t5", "vocab_size": 35, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
        "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0,
    }  # fmt: skip
    model = family("t5").spec(Fields(said)).build(seed=seed)
    as_published(model, seed)
    optimiser = AdamW(rate=2e-3, betas=(0.9, 0.999), decay=0.01)
    trainer = trained(
        model, SequenceToSequence(), Copies(), seed, batch=32, steps=steps, optimiser=optimiser, schedule=Constant()
    )
    figures: Figures = {"parameters": sum(weight.numel() for weight in model.parameters())}
    for step in range(1, steps + 1):
        trainer.step()
        if step % 500 == 0 or step == steps:
            figures["exact" if step == steps else f"exact at step {step}"] = _copied(model)
    return figures


@torch.no_grad()
def as_published(model: Model, seed: int) -> None:
    """T5's initial values, in which the scale of the scores is folded: N(0, 1) embeddings, queries of variance
    1 / (width * head size), every other matrix of 1 / its inputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        deviation = weight.shape[1] ** -0.5
        if name == "embedding.weight":
            deviation = 1.0
        elif name.endswith(".score_bias.weight"):
            deviation = model.spec.width**-0.5
        elif name.endswith(".q.weight"):
            deviation = (weight.shape[1] * 16) ** -0.5
        weight.normal_(0, deviation, generator=generator)


def _copied(model: Model) -> float:
    drawn = [Copies().example(i, np.random.default_rng([7, i]))["source"] for i in range(256)]
    source = torch.from_numpy(np.stack(drawn))
    model.eval()
    written = lamina.generate(model, source, max_new_tokens=13)[:, 1:]
    model.train()
    width = min(written.shape[1], source.shape[1])
    same = (written[:, :width] == source[:, :width]).all(1)
    return float(same.float().mean()) if width == source.shape[1] else 0.0


RECIPES: dict[str, Callable[..., Figures]] = {
    **{name: partial(language, decoder) for name, decoder in DECODERS.items()},
    "induction, 1 layer": partial(induction, 1),
    "induction, 2 layers": partial(induction, 2),
    "induction, 1 layer, one period": partial(induction, 1, fixed=True),
    "induction, 1 layer, unit table": partial(induction, 1, initial=UNIT),
    "induction, 2 layers, unit table": partial(induction, 2, initial=UNIT),
    "T5 copy": copying,
}


# What is claimed.


@dataclass(frozen=True)
class Claim:
    """`figure` of `low` lies below that of `high` by `margin`, in every pair of seeds. `high` may be a number."""

    about: str
    low: tuple[str, str] | float
    high: tuple[str, str] | float
    margin: float = 0.0


def _loss(name: str) -> tuple[str, str]:
    return name, "loss"


LONG = "loss at 4 x length"
CLAIMS = (
    Claim("rotary positions below learned ones", _loss("rotary"), _loss("learned"), 0.15),
    Claim("ALiBi below learned positions", _loss("alibi"), _loss("learned"), 0.10),
    Claim("learned positions below none", _loss("learned"), _loss("no positions")),
    Claim("ALiBi at 4 x the length no worse than at the length", ("alibi", LONG), _loss("alibi")),
    Claim("rotary at 4 x the length worse than at the length", _loss("rotary"), ("rotary", LONG), 0.03),
    Claim("SwiGLU below GELU, same parameters", _loss("swiglu"), _loss("learned"), 0.05),
    Claim("GEGLU below GELU, same parameters", _loss("geglu"), _loss("learned"), 0.05),
    Claim("SwiGLU below ReLU, same parameters", _loss("swiglu"), _loss("relu")),
    Claim("GEGLU below ReLU, same parameters", _loss("geglu"), _loss("relu")),
    Claim("RMS norm below layer norm", _loss("rms"), _loss("learned")),
    Claim("parallel below one after the other", _loss("parallel"), _loss("learned")),
    Claim("pre-norm below post-norm", _loss("learned"), _loss("post-norm")),
    Claim("LLaMA's parts below GPT's", _loss("llama"), _loss("learned"), 0.25),
    Claim("top-2 of 4 experts below dense, same arithmetic", _loss("top-2"), _loss("learned"), 0.01),
    Claim("top-1 of 4 experts below dense, same arithmetic", _loss("top-1"), _loss("learned")),
    Claim("top-2: the idlest expert has a tenth of the tokens", 0.1, ("top-2", "lowest load")),
    Claim("top-2: the busiest expert has half of the tokens at most", ("top-2", "highest load"), 0.5),
    Claim("top-1: the idlest expert has a tenth of the tokens", 0.1, ("top-1", "lowest load")),
    Claim("top-1: the busiest expert has half of the tokens at most", ("top-1", "highest load"), 0.5),
    Claim("induction in one layer: a fifth right at most", ("induction, 1 layer", "accuracy"), 0.2),
    Claim("induction in two layers: 95 % right", 0.95, ("induction, 2 layers", "accuracy")),
    Claim(
        "induction: two layers above one by half",
        ("induction, 1 layer", "accuracy"),
        ("induction, 2 layers", "accuracy"),
        0.5,
    ),
    Claim(
        "induction, unit table, one layer: a fifth right at most", ("induction, 1 layer, unit table", "accuracy"), 0.2
    ),
    Claim("induction, unit table, two layers: 95 % right", 0.95, ("induction, 2 layers, unit table", "accuracy")),
    Claim("one period for all: one layer is enough, 95 % right", 0.95, ("induction, 1 layer, one period", "accuracy")),
    Claim("a small T5 copies 12 symbols after 3,000 steps", 0.8, ("T5 copy", "exact")),
)

Runs = dict[str, dict[str, Figures]]


def judged(claim: Claim, runs: Runs) -> Figures | None:
    """What the runs say of a claim; None where a run is missing. `gap`: of the means."""
    low, high = _values(claim.low, runs), _values(claim.high, runs)
    if not low or not high:
        return None
    gap = statistics.mean(high) - statistics.mean(low)
    spread = max(low) - min(low) + max(high) - min(high)
    worst = min(high) - max(low)
    if min(len(_seeds(side, runs)) for side in (claim.low, claim.high)) < 2:
        verdict = "one seed only"
    elif abs(gap) <= spread:
        verdict = "inside the noise"
    elif worst > 0 and worst >= claim.margin:
        verdict = "holds"
    else:
        verdict = "smaller than claimed" if gap > 0 else "does not hold"
    figures = {"claim": claim.about, "margin": claim.margin, "gap": gap, "worst": worst, "spread": spread}
    return figures | {"seeds": min(len(_seeds(side, runs)) for side in (claim.low, claim.high)), "verdict": verdict}


def _seeds(side: tuple[str, str] | float, runs: Runs) -> list[Any]:
    return _values(side, runs) if isinstance(side, tuple) else [None] * 99


def _values(side: tuple[str, str] | float, runs: Runs) -> list[float]:
    if not isinstance(side, tuple):
        return [side]
    name, figure = side
    return [run[figure] for run in runs.get(name, {}).values()]


def prepared(text: Path, directory: Path) -> tuple[Prepared, Prepared]:
    """The characters of a text: nine tenths to learn from, the last to be measured on."""
    from lamina.data.prepare import prepare
    from lamina.data.sources import find
    from lamina.data.wishes import PrepareSpec

    prepare(find([str(text)]), directory, "characters", PrepareSpec(validation=0.1, split="end"))
    return open_prepared(directory / "train"), open_prepared(directory / "validation")


FIGURES = ("loss", LONG, "lowest load", "highest load", "accuracy", "exact")


def markdown(document: Figures) -> list[str]:
    """The two tables of docs/qualitative.md: figures by seed, and verdicts."""
    lines = ["| recipe | parameters | figure | by seed |", "|---|---|---|---|"]
    for name in RECIPES:
        seeds = document["runs"].get(name, {})
        for figure in FIGURES:
            values = [one[figure] for one in seeds.values() if figure in one]
            if values:
                size = next(iter(seeds.values()))["parameters"]
                said = " ".join(f"{value:.4f}" for value in values)
                lines.append(f"| {name} | {size:,} | {figure} | {said} |")
    lines += [
        "",
        "| claim | by at least | gap of the means | worst pair | spread | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for one in document["claims"]:
        margin = f"{one['margin']:g}" if one["margin"] else ""
        figures = " | ".join(f"{one[name]:+.4f}" for name in ("gap", "worst"))
        lines.append(f"| {one['claim']} | {margin} | {figures} | {one['spread']:.4f} | {one['verdict']} |")
    return lines


def written(document: Figures, path: Path | None) -> None:
    """Judge every claim from the runs that there are, and keep both."""
    document["claims"] = [one for claim in CLAIMS if (one := judged(claim, document["runs"])) is not None]
    if path:
        path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="Tiny Shakespeare, or any text of a million characters"
    )
    parser.add_argument("--only", nargs="*", choices=RECIPES, metavar="NAME", help=f"some of: {', '.join(RECIPES)}")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--steps", type=int, help="of each run, in place of its own: to try the script out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    document: Figures = {"text": options.text.name, "runs": {}}
    if options.json and options.json.is_file():
        document = json.loads(options.json.read_text())
    with tempfile.TemporaryDirectory() as directory:
        data = prepared(options.text, Path(directory) / "data")
        for seed in options.seeds:
            for name in options.only or RECIPES:
                if str(seed) in document["runs"].setdefault(name, {}):
                    continue
                more: Figures = {} if options.steps is None else {"steps": options.steps}
                begin = time.perf_counter()
                if name in DECODERS:
                    more["data"] = data
                figures = RECIPES[name](seed=seed, **more)
                document["runs"][name][str(seed)] = figures | {"seconds": time.perf_counter() - begin}
                print(f"{name}, seed {seed}: {json.dumps(figures)}", flush=True)
                written(document, options.json)
    written(document, options.json)  # where every run was there already, their claims may be of fewer
    print("\n".join(markdown(document)))


if __name__ == "__main__":
    sys.exit(main())
