"""A model as the harness sees it: texts in, log-likelihoods and texts out (`lm_eval.api.model.TemplateLM`)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
)
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from lamina.errors import LaminaError
from lamina.generation import Sampling, continuations, write
from lamina.generation.perplexity import LONGEST, check_predicts
from lamina.source import load, spec, tokenizer
from lamina.specs import unknown

log = logging.getLogger("lm_eval.lamina")  # the harness shows what is below its own name
GENERATED = 256  # new tokens where a task does not say
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
MARK = "<lamina:here the message goes on>"


class HarnessModel(TemplateLM):
    """Any SOURCE whose decoder continues texts. Raises UnsupportedError for encoders and encoder-decoders."""

    def __init__(
        self,
        source: str | None = None,
        *,
        pretrained: str | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        quantize: str | None = None,
        compile: bool = False,
        strict: bool = False,
        batch_size: int | str = 1,
        max_length: int | None = None,
        **wrong: Any,
    ) -> None:
        """`pretrained` is another name of `source`: the harness files its results under it. `batch_size`: rows read at
        once; with `compile`, texts are written one by one. `max_length`: tokens read; None: the model's context."""
        super().__init__()
        if wrong:
            known = [name for name in HarnessModel.__init__.__annotations__ if name not in ("wrong", "return")]
            raise LaminaError(unknown("model_args", next(iter(wrong)), known))
        if (source is None) == (pretrained is None):
            raise LaminaError("model_args: one of source and pretrained is needed: source=smollm2-135m")
        self.source = str(pretrained if source is None else source)
        self.batch_size = whole("batch_size", batch_size)
        described = spec(self.source)
        check_predicts(described, "the tasks of the harness cannot be put to it")
        context = described.context
        self.max_length = whole("max_length", max_length or context or LONGEST)
        if context is not None and self.max_length > context:
            raise LaminaError(f"max_length is {self.max_length}; this model reads {context} tokens")
        self.tokenizer: Any = tokenizer(self.source)
        self.model = load(self.source, dtype, device, compile, quantize=quantize, strict=strict)
        self._device = self.model.embedding.weight.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> HarnessModel:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """From model_args and the options --batch_size and --device, which yield to model_args of the same names."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if str(options.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
            log.warning("device %s is not here: the CPU is taken", options.pop("device"))  # the harness' own default
        return cls(**(options | arg_dict))

    # Text and ids.

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos is None:
            raise LaminaError(f"{self.tokenizer.name}: no end token, which the harness needs")
        return self.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.eot_token_id if self.tokenizer.bos is None else self.tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps encoded requests under: the same for the same tokenizer and templates alone."""
        return f"{re.sub(r'[^A-Za-z0-9.-]+', '__', self.source)}-{self.tokenizer.hash[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Ids; where nothing is said, with what the checkpoint puts around a text, unless its beginning is there."""
        if add_special_tokens is None:
            begin = self.tokenizer.decode([self.prefix_token_id], skip_special=False)
            add_special_tokens = not string.startswith(begin)
        return self.tokenizer.encode(string, special=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that will be used, which the harness writes into its results."""
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str) and chat_template != "default":
            raise LaminaError(f"apply_chat_template is {chat_template!r}; only the default template is used here")
        return self.tokenizer.chat_template().source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without the prompt for an answer its last message is left open, to be continued."""
        messages, system = list(chat_history), [each for each in chat_history if each["role"] == "system"]
        if not add_generation_prompt:
            messages[-1] = messages[-1] | {"content": f"{messages[-1]['content']}{MARK} "}
        try:
            text = self.tokenizer.chat(messages, add_generation_prompt)
        except LaminaError as error:
            if not system:
                raise
            log.warning("%s; the system message is left out", error)  # as the harness does for templates without one
            rest = [each for each in messages if each["role"] != "system"]
            text = self.tokenizer.chat(rest, add_generation_prompt)
        if add_generation_prompt:
            return text
        before, found, after = text.rpartition(MARK)
        if not found:
            raise LaminaError(f"{self.tokenizer.name}: the chat template leaves the last message out")
        return before if after.startswith(" ") else before.rstrip()  # templates that trim messages trim this one too

    # What tasks ask.

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is what greedy decoding writes) of each (texts, context, continuation)."""
        pairs = [self._fitting(context, after) for _, context, after in requests]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        found = continuations(self.model, pairs, batch=self.batch_size)
        for each in tqdm(found, total=len(pairs), disable=disable_tqdm, desc="lamina: log-likelihoods"):
            answers[each.index] = each.log_probability, each.greedy
            texts = requests[each.index][0]
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[each.index])
        return answers

    def _fitting(self, context: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        """The pair with as much of the end of its context as the model reads; the last token is predicted alone."""
        room = self.max_length + 1 - len(after)
        if room < 1:
            raise LaminaError(f"a continuation has {len(after)} tokens; at most {self.max_length} are read")
        if len(context) > room:
            log.warning("a context of %d tokens keeps its last %d: %d are read", len(context), room, self.max_length)
        return context[-room:], after

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, by the windows of the harness: each token once, one before a window."""
        texts = [text for (text,) in (request.args for request in requests)]
        windows = [(number, window) for number, text in enumerate(texts) for window in self._windows(text)]
        scored = self._loglikelihood_tokens([(None, *window) for _, window in windows], disable_tqdm)
        totals = [0.0] * len(texts)
        for (number, _), (likelihood, _) in zip(windows, scored, strict=True):
            totals[number] += likelihood
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _windows(self, text: str) -> Iterable[tuple[list[int], list[int]]]:
        ids = self.tok_encode(text)
        return map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context until one of its stop texts, at most `max_gen_toks` tokens."""
        asked = [request.args for request in requests]
        encoded = {context: self.tok_encode(context) for context, _ in asked}
        order = Collator(
            asked,
            sort_fn=lambda each: (-len(encoded[each[0]]), each[0]),
            group_fn=lambda each: each[1],
            group_by="gen_kwargs",  # alike in everything but the context
        )
        answers: list[str] = []
        rows = 1 if self.model.engine is not None else self.batch_size  # a compiled step is for one row
        with tqdm(total=len(asked), disable=disable_tqdm, desc="lamina: texts") as bar:
            for batch in order.get_batched(n=rows):
                wanted = batch[0][1]
                stop, most, sampling = self._generation(wanted)
                prompts = [self._prompt(encoded[context], most) for context, _ in batch]
                written = write(self.model, self.tokenizer, prompts, max_new_tokens=most, sampling=sampling, stop=stop)
                for (context, _), text in zip(batch, written, strict=True):
                    answers.append(text)
                    self.cache_hook.add_partial("generate_until", (context, wanted), text)
                bar.update(len(batch))
        return order.get_original(answers)

    def _generation(self, wanted: dict[str, Any]) -> tuple[list[str], int, Sampling]:
        """Stop texts, new tokens and sampling, as a task gives them. Raises LaminaError for what is not known here."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(wanted, GENERATED))
        end = self.tokenizer.decode([self.eot_token_id], skip_special=False)
        stop = [text for text in handle_stop_sequences(given.pop("until"), end) if text]
        most, samples = given.pop("max_gen_toks"), given.pop("do_sample")
        if given.pop("num_beams", 1) != 1:
            raise LaminaError("generation_kwargs: num_beams is above 1; beams are not searched for the harness")
        options = {name: given.pop(name) for name in SAMPLING if name in given}
        if given:
            raise LaminaError(
                unknown("generation_kwargs", next(iter(given)), ["until", "max_gen_toks", "do_sample", *SAMPLING])
            )
        return stop, most, Sampling(**options) if samples else Sampling()

    def _prompt(self, ids: list[int], most: int) -> list[int]:
        """The end of a prompt, as much as leaves room for `most` new tokens."""
        room = self.max_length - most
        if room < 1:
            raise LaminaError(
                f"max_gen_toks is {most}; it must be less than the {self.max_length} tokens that are read"
            )
        if len(ids) > room:
            log.warning("a prompt of %d tokens keeps its last %d, so that %d new ones fit", len(ids), room, most)
        return ids[-room:]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside model_args."""
        weight = self.model.embedding.weight
        parameters = sum(each.numel() for each in self.model.parameters())
        return {
            "model_num_parameters": parameters,
            "model_dtype": str(weight.dtype),
            "tokenizer_hash": self.tokenizer.hash,
        }


def whole(name: str, value: int | str) -> int:
    """A count of model_args. Raises LaminaError for anything else: the harness' "auto" too."""
    text = str(value)
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise LaminaError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return int(text)
