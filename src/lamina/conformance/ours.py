"""A model of lamina as a subject."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.attend import BACKENDS
from lamina.cache import KINDS
from lamina.conformance.report import Row, judged, left_out, same_bits
from lamina.conformance.subject import Facts, Source
from lamina.conformance.trial import SelfAttentionSpec, random_sources, read, text_length
from lamina.generation import generate
from lamina.layers import (
    AlibiSpec,
    BucketBiasSpec,
    CrossAttention,
    ExpertsSpec,
    LearnedPositionSpec,
    Record,
    RotarySpec,
    RouterLossSpec,
    ShawSpec,
    SinusoidalPositionSpec,
    TransformerXLSpec,
)
from lamina.model import Model, ModelSpec, of_text
from lamina.patterns import allowed
from lamina.source import load, save
from lamina.tokens import plain
from lamina.weights.files import Checkpoint

PLACING = (
    AlibiSpec,
    BucketBiasSpec,
    LearnedPositionSpec,
    RotarySpec,
    ShawSpec,
    SinusoidalPositionSpec,
    TransformerXLSpec,
)
"""Parts that know positions."""


@dataclass
class Ours:
    """`Subject` says what each is."""

    model: Model

    @property
    def facts(self) -> Facts:
        return self._facts

    @cached_property
    def _facts(self) -> Facts:
        model, spec = self.model, self.model.spec
        experts = spec.decoder is not None and any(isinstance(part, ExpertsSpec) for _, part in spec.decoder.walk())
        writes = model.decoder is not None and model.head is not None
        return Facts(
            choices=torch.arange(spec.embedding.vocabulary, device=model.embedding.weight.device),
            length=text_length(model),
            context=spec.context,
            two_stacks=spec.two_stacks,
            hears=not spec.reads_ids,
            placed=any(isinstance(part, PLACING) for _, part in spec.walk()),
            caches=() if model.decoder is None else KINDS,
            backends=("dense", None, *(name for name in BACKENDS if name != "dense")),
            causal=_looks_ahead(spec, text_length(model)),
            exact="an expert's product has other rows beside it" if experts else "",
            generates="" if writes else "the model does not generate",
            trains="" if model.head is not None and model.engine is None else "there is no head that could learn",
        )

    def read(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        source: Source | None = None,
        cache: Any = None,
        backend: str | None = None,
    ) -> list[Tensor]:
        told = None
        if source is not None:
            told = {self.model.reads: source.content, "attention_mask": source.mask, "position_ids": source.positions}
        side = "decoder_" if self.model.spec.two_stacks else ""
        more = {f"{side}position_ids": positions, "cache": cache, "backend": backend}
        return read(self.model, ids, mask, source=told, **more)

    def new_cache(self, kind: str, batch: int, capacity: int) -> Any:
        return self.model.new_cache(kind, batch, capacity)

    def sources(self, lengths: list[int]) -> Tensor:
        return random_sources(self.model, lengths)

    def attention(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor | None], int]:
        record, ran = Record("*"), set()
        handles = [
            part.register_forward_hook(lambda module, given, out: ran.add(module))
            for part in self.model.modules()
            if isinstance(part, CrossAttention) or isinstance(getattr(part, "spec", None), SelfAttentionSpec)
        ]
        try:
            out = read(self.model, ids, record=record)
        finally:
            for handle in handles:
                handle.remove()
        return out, [value for name, value in record.values.items() if name.endswith(".weights")], len(ran)

    def generate(
        self, ids: Tensor, new: int, *, beams: int = 1, seed: int | None = None, cached: bool = True
    ) -> Tensor:
        model = self.model
        own = model.spec.reads_ids and model.spec.source_vocabulary == model.spec.embedding.vocabulary
        reads = ids if own else random_sources(model, [ids.shape[1]] * ids.shape[0])
        told: dict[str, Any] = {model.reads: reads, "max_new_tokens": new, "min_new_tokens": new, "beams": beams}
        if seed is not None:
            told |= {"temperature": 1.0, "seed": seed}
        return generate(model, cache="auto" if cached else None, **told)

    def embedding(self) -> nn.Module:
        return self.model.embedding

    def over(self, model: Any) -> Ours:
        return Ours(model)

    def save(self, folder: Path) -> str:
        origin = self.model.origin
        exact = origin is not None and origin.family is not None and origin.config_text is not None
        save(self.model, folder, format="hf" if exact else "native")
        return "Hugging Face layout" if exact else "native layout"

    def load(self, folder: Path) -> Ours:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are not finite: a row of their own
            return Ours(load(folder))

    def trained(self, texts: list[Tensor], pause: int, folder: Path) -> tuple[nn.Module, nn.Module]:
        one, other = (copy.deepcopy(self.model).train() for _ in range(2))
        steps = list(enumerate(texts))
        self._learn(one, _adam(one), steps)
        optimizer = _adam(other)
        self._learn(other, optimizer, steps[:pause])
        save(other, folder / "model", format="native")
        torch.save(optimizer.state_dict(), folder / "optimizer")
        again = copy.deepcopy(self.model).train()  # weights are copied into it, as a run does when it goes on
        again.load_state_dict(self.load(folder / "model").model.state_dict())
        optimizer = _adam(again)
        optimizer.load_state_dict(torch.load(folder / "optimizer", weights_only=True))
        self._learn(again, optimizer, steps[pause:])
        return one, again

    def _learn(self, model: Model, optimizer: torch.optim.Optimizer, steps: list[tuple[int, Tensor]]) -> None:
        for at, ids in steps:
            torch.manual_seed(at)
            out = self._forward(model, ids)
            targets = ids if model.decoder is None else ids[:, 1:]
            loss = F.cross_entropy(out.logits[:, : targets.shape[1]].flatten(0, 1).float(), targets.flatten())
            optimizer.zero_grad()
            (loss + sum(out.losses.values())).backward()
            optimizer.step()

    def _forward(self, model: Model, ids: Tensor, mask: Tensor | None = None) -> Any:
        """A forward of training; the encoder of an encoder-decoder reads a text as long as `ids`."""
        if not model.spec.two_stacks:
            return model(ids, mask)
        content = random_sources(model, [64] * len(ids))[..., : ids.shape[1]]
        seen = None if self.facts.hears else mask
        return model(**{model.reads: content}, attention_mask=seen, decoder_input_ids=ids, decoder_attention_mask=mask)

    def router_loss(self, ids: Tensor, mask: Tensor | None = None, *, asked: bool = False) -> Tensor | str | None:
        weighed = [part for _, part in self.model.spec.walk() if isinstance(part, RouterLossSpec)]
        if not any(part.balance or part.z or part.importance for part in weighed):
            return "no router has a loss"
        losses = self._forward(self.model, ids, mask).losses
        return torch.stack(list(losses.values())).sum() if losses else None

    def wrong(self, name: str) -> dict[str, Callable[[], Any]]:
        ids, spec = self.facts.choices[None, :2], json.loads(self.model.spec.to_json())
        return {
            "backend": lambda: self.read(ids, backend=name),
            "argument": lambda: read(self.model, ids, **{name: None}),
            "field of the configuration": lambda: ModelSpec.from_json(json.dumps(spec | {name: 1})),
        }

    def asks(self) -> dict[str, Callable[[], Any]]:
        return {"ids of one dimension": lambda: self.model(**{self.model.reads: self.facts.choices[:2]})}

    def of_files(self, folder: Path, again: Any) -> Iterator[Row]:
        yield judged("the spec is read again", "what was saved, and this", float(again.spec != self.model.spec))
        if (folder / "config.json").is_file():
            yield _given_back(self.model.origin.located.path, folder)

    def strangers(self) -> list[str]:
        return []  # there is no spec with one


def _given_back(source: Path, folder: Path) -> Row:
    name = "loading and saving gives back the file"
    before, after = Checkpoint(source), Checkpoint(folder)
    if set(before.entries) == set(after.entries) and any(
        before.entries[n].dtype != after.entries[n].dtype for n in before.entries
    ):
        return left_out(name, "it was loaded with another dtype than the file has")
    different = len(set(before.entries) ^ set(after.entries))
    different += sum(not same_bits(before.read(n), after.read(n)) for n in set(before.entries) & set(after.entries))
    parent = source if source.is_dir() else source.parent
    config = (parent / "config.json").read_bytes() != (folder / "config.json").read_bytes()
    said = f"names, dtypes, shapes and bytes of {len(before.entries)} tensors, and config.json"
    return judged(name, said, float(different + config))


def _looks_ahead(spec: ModelSpec, length: int) -> str:
    if spec.decoder is None:
        return "there is no decoder"
    tokens = plain(1, length)
    for part in of_text(spec.decoder):
        if isinstance(part, SelfAttentionSpec):
            mask = allowed(part.pattern, tokens.query(), tokens.key()).expand(1, length, length)
            if bool(mask.triu(1).any()):
                return f"{type(part.pattern).__name__} looks ahead"
    return ""


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)
