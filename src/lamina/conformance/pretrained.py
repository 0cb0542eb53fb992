"""A model of transformers as a subject. It is asked as its users ask it, and only through what all of them have.

Of transformers nothing is imported but its trainer, when that is tried: a model that is handed over has brought along
what it needs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from lamina.conformance.report import Row, alike
from lamina.conformance.subject import Facts, Source, long, parameters, random_ids
from lamina.conformance.trial import TOKENS
from lamina.errors import UnsupportedError

FEW = 8  # ids of padding below this may be what positions are counted from


@dataclass
class Kept:
    """What a cached forward left for the next: keys, and the mask of all columns so far where one was given."""

    past: Any = None
    mask: Tensor | None = None
    length: int = 0

    def seen(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of the columns so far and of `ids`; None where nobody has given one."""
        if mask is not None or self.mask is not None:
            before = ids.new_ones(ids.shape[0], self.length) if self.mask is None else self.mask
            self.mask = torch.cat([before, torch.ones_like(ids) if mask is None else mask], dim=1)
        return self.mask


@dataclass
class Pretrained:
    """`Subject` says what each is."""

    model: Any
    known: Facts | None = None  # else they are found out

    def __post_init__(self) -> None:
        if getattr(self.model, "main_input_name", "input_ids") != "input_ids":
            raise UnsupportedError(
                f"{type(self.model).__name__} reads {self.model.main_input_name}; of transformers' models those that"
                " read input_ids can be tried"
            )

    @property
    def facts(self) -> Facts:
        return self._facts

    @cached_property
    def _facts(self) -> Facts:
        if self.known is not None:
            return self.known
        config = self.model.config.get_text_config(decoder=True)
        context, window = getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None)
        special = [value for name, value in config.to_dict().items() if name.endswith("token_id")]
        apart = {i for value in special for i in (value if isinstance(value, list) else [value])}
        ids = [i for i in range(config.vocab_size) if i not in apart]
        length, writes = max(TOKENS, min((window or 0) + 8, 64)), bool(self.model.can_generate())
        two_stacks = bool(self.model.config.is_encoder_decoder)
        plain = Facts(
            choices=torch.tensor(ids, device=self.model.get_input_embeddings().weight.device),
            length=min(length, context or length),
            context=context,
            two_stacks=two_stacks,
            backends=("eager", "sdpa") if getattr(self.model, "_supports_sdpa", False) else (),
            causal="" if two_stacks or writes else "it is not known whether it may look ahead",
            exact="products of other shapes may be rounded differently",
            generates="" if writes else "the model does not generate",
            trains=_why_no_training() if writes else "the model does not generate",
        )
        return self._found_out(plain, getattr(config, "pad_token_id", None))

    def _found_out(self, plain: Facts, pad: int | None) -> Facts:
        """What only a forward tells: where positions begin (0, or RoBERTa's number after the id of padding), and
        whether keys come back. The text is long, so that a BigBird, which short ones change, is left as it was made."""
        offset = pad + 1 if pad is not None and pad < FEW else 0
        places = None if plain.context is None else plain.context - offset
        probe = Pretrained(self.model, replace(plain, context=places))
        ids, kept = random_ids(probe, 1, long(probe.facts, parameters(self))), Kept()
        out, first = probe.read(ids, cache=kept), None
        if not plain.two_stacks and "position_ids" in self._takes:
            for begin in dict.fromkeys((0, 2, offset)):
                counted = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
                with contextlib.suppress(IndexError):  # there are no places so far
                    if alike(probe.read(ids, positions=counted), out):
                        first = begin
                        break
        caches = () if kept.past is None else ("as returned",)
        return replace(plain, caches=caches, first=first, context=plain.context and plain.context - (first or 0))

    @cached_property
    def _takes(self) -> set[str]:
        return set(inspect.signature(self.model.forward).parameters)

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
        told = self._told(ids, mask, positions, source)
        side = "decoder_" if self.facts.two_stacks else ""
        told |= {"use_cache": cache is not None} if "use_cache" in self._takes else {}
        if cache is not None:
            if (seen := cache.seen(ids, mask)) is not None:
                told[f"{side}attention_mask"] = seen
            if cache.past is not None:
                told["past_key_values"] = cache.past
        out = self._answer(told, backend)
        if cache is not None:
            cache.past, cache.length = getattr(out, "past_key_values", None), cache.length + ids.shape[1]
        return _of_tokens(out, ids.shape[1])

    def _told(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, source: Source | None
    ) -> dict[str, Any]:
        side = "decoder_" if self.facts.two_stacks else ""
        told: dict[str, Any] = {f"{side}input_ids": ids, f"{side}attention_mask": mask}
        if positions is not None:
            told[f"{side}position_ids"] = positions
        if side:
            if source is None:
                source = Source(random_ids(self, 1, TOKENS, seed=99).expand(ids.shape[0], -1))
            told |= {"input_ids": source.content, "attention_mask": source.mask}
            told |= {} if source.positions is None else {"position_ids": source.positions}
        return {name: value for name, value in told.items() if value is not None}

    def _answer(self, told: dict[str, Any], backend: str | None = None) -> Any:
        before = self.model.config._attn_implementation
        if backend is not None and backend != before:
            self.model.set_attn_implementation(backend)
        try:
            return self.model(**told)
        finally:
            if backend is not None and backend != before:
                self.model.set_attn_implementation(before)

    def new_cache(self, kind: str, batch: int, capacity: int) -> Any:
        return Kept()

    def sources(self, lengths: list[int]) -> Tensor:
        return random_ids(self, len(lengths), max(lengths), seed=98)

    def attention(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor | None], int]:
        told = self._told(ids, None, None, None) | ({"use_cache": False} if "use_cache" in self._takes else {})
        out = self._answer(told | {"output_attentions": True, "output_hidden_states": True})
        names = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
        shown = [weights for name in names for weights in getattr(out, name, None) or ()]
        return _of_tokens(out, ids.shape[1]), shown, len(list(_innermost(self.model, "Attention")))

    def generate(
        self, ids: Tensor, new: int, *, beams: int = 1, seed: int | None = None, cached: bool = True
    ) -> Tensor:
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                num_beams=beams,
                do_sample=seed is not None,
                use_cache=cached,
                pad_token_id=int(self.facts.choices[0]),
            )

    def embedding(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def over(self, model: Any) -> Pretrained:
        return Pretrained(model)

    def save(self, folder: Path) -> str:
        self.model.save_pretrained(folder)
        return "Hugging Face layout"

    def load(self, folder: Path) -> Pretrained:
        chosen = {
            name: getattr(self.model.config, f"_{name}", None)
            for name in ("attn_implementation", "experts_implementation")
        }
        told = {name: value for name, value in chosen.items() if isinstance(value, str)}
        return Pretrained(type(self.model).from_pretrained(folder, dtype="auto", **told))

    def trained(self, texts: list[Tensor], pause: int, folder: Path) -> tuple[nn.Module, nn.Module]:
        from transformers import PrinterCallback, Trainer, TrainingArguments

        rows = [{"input_ids": ids[0], "labels": ids[0]} for ids in texts]
        made, drawn = [], (random.getstate(), numpy.random.get_state())  # which the trainer seeds
        for resumed in (None, str(folder / f"checkpoint-{pause}")):
            arguments = TrainingArguments(
                output_dir=str(folder),
                max_steps=len(texts),
                save_steps=pause if resumed is None else len(texts),
                per_device_train_batch_size=1,
                learning_rate=1e-3,
                report_to="none",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=self.facts.choices.device.type == "cpu",
            )
            trainer = Trainer(model=copy.deepcopy(self.model), args=arguments, train_dataset=rows)  # pyright: ignore
            trainer.remove_callback(PrinterCallback)  # or what it says goes to standard output
            trainer.train(resume_from_checkpoint=resumed)
            made.append(trainer.model)
        random.setstate(drawn[0])
        numpy.random.set_state(drawn[1])
        return made[0], made[1]

    def router_loss(self, ids: Tensor, mask: Tensor | None = None, *, asked: bool = False) -> Tensor | str | None:
        said = self.model.config.to_dict()
        if not any(value for name, value in said.items() if name.endswith(("aux_loss_coef", "z_loss_coef"))):
            return "no router has a loss"
        given = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        if mask is not None:
            given["labels"] = ids.masked_fill(mask == 0, -100)
            given |= {"decoder_attention_mask": mask} if self.facts.two_stacks else {}
        out = self.model(**given, **({"output_router_logits": True} if asked else {}))
        losses = [value for name, value in out.items() if name.endswith(("aux_loss", "z_loss")) and value is not None]
        return torch.stack([torch.as_tensor(value) for value in losses]).sum() if losses else None

    def wrong(self, name: str) -> dict[str, Callable[[], Any]]:
        ids = self.facts.choices[None, :2]
        return {
            "backend": lambda: self.read(ids, backend=name),
            "argument": lambda: self._answer(self._told(ids, None, None, None) | {name: None}),
            "field of the configuration": lambda: type(self.model.config)(**{name: 1}),
        }

    def asks(self) -> dict[str, Callable[[], Any]]:
        if not self.facts.caches:
            return {}
        told = self._told(self.facts.choices[None, :2], None, None, None)
        return {"use_cache=True": lambda: self._answer(told | {"use_cache": True})}

    def of_files(self, folder: Path, again: Any) -> Iterator[Row]:
        return iter(())

    def strangers(self) -> list[str]:
        known, code = type(self.model.config)().to_dict(), inspect.getsource(sys.modules[type(self.model).__module__])
        names = [name for name in self.model.config.to_dict() if name not in known and not name.endswith("_token_id")]
        return [name for name in names if name not in code]  # some read fields that their class leaves out


def _why_no_training() -> str:
    here = importlib.util.find_spec("accelerate") is not None
    return "" if here else "transformers trains with accelerate, which is not here"


def _of_tokens(out: Any, length: int) -> list[Tensor]:
    """Logits, and the last hidden states where they come along, if there is one of them for each token."""
    found = [getattr(out, name, None) for name in ("logits", "last_hidden_state")]
    each = [value for value in found if value is not None and value.dim() == 3 and value.shape[1] == length]
    if not each:
        raise UnsupportedError(f"{type(out).__name__} has nothing for each token: hand over the model below its head")
    return each


def _innermost(module: nn.Module, word: str) -> Iterator[nn.Module]:
    """The modules whose class has `word` in its name, and that have no such module inside."""
    for part in module.modules():
        inside = (each for each in part.modules() if each is not part)
        if word in type(part).__name__ and not any(word in type(each).__name__ for each in inside):
            yield part
