"""`lamina generate`: continue a prompt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.output import Output
from lamina.cli.program import command
from lamina.cli.prompts import (
    choosing,
    figures,
    fits,
    load,
    loading,
    sampling_of,
    shown,
    speak,
    standard_input,
    warn_of_lost,
)
from lamina.errors import LaminaError, UnsupportedError

if TYPE_CHECKING:
    from lamina.generation import Beaming, Retrieval, Writing
    from lamina.model import Model
    from lamina.text import Tokenizer

EXAMPLES = """
lamina generate smollm2-135m "The capital of France is" --max-new-tokens 8
lamina generate smollm2-135m --chat "What is the capital of France?"
lamina generate ./my-model --temperature 0.8 --top-p 0.95 --seed 1 < prompt.txt > text.txt
lamina generate smollm2-135m "The capital of France is Paris." --max-new-tokens 0
lamina generate ./my-t5 "translate English to German: The house is wonderful." --beams 4 --length-penalty 0.6
lamina generate runs/retro/model "The sensor" --index docs-index --count 2
"""

EARLY = {"no": False, "yes": True, "never": "never"}
"""Words of --early-stopping, and what `lamina.generation.Beaming` calls them."""


@command(EXAMPLES)
@click.argument("source")
@click.argument("prompt", required=False)
@click.option("--max-new-tokens", type=int, default=128, show_default=True, help="0: how likely the prompt itself is.")
@click.option("--min-new-tokens", type=int, default=0, show_default=True, help="Hold end tokens back until then.")
@click.option("--chat", is_flag=True, help="The prompt is a message: apply the chat template.")
@click.option("--raw", is_flag=True, help="Names of control tokens mean the tokens, in the prompt and in the text.")
@click.option("--truncate", type=click.Choice(["left"]), help="Cut the beginning of a prompt that is too long.")
@click.option("--beams", type=int, default=1, show_default=True, help="Above 1: search for the likeliest text.")
@click.option("--length-penalty", type=float, help="Scores are log-probability / length ** this. [default: 1]")
@click.option(
    "--early-stopping", type=click.Choice(tuple(EARLY)), help="End with as many texts as beams. [default: no]"
)
@click.option("--best", type=int, help="How many of the beams to print. [default: 1]")
@click.option(
    "--index", type=click.Path(path_type=Path), help="A database that a model that retrieves asks while it writes."
)
@click.option("--count", type=click.IntRange(1), help="With --index: neighbours of each chunk. [default: 2]")
@click.option("--no-stream", is_flag=True, help="Print the text when it is complete.")
@choosing
@loading
def generate(out: Output, source: str, prompt: str | None, **given: Any) -> None:
    """Continue PROMPT, or what standard input holds.

    The text goes to standard output as it is written, figures to standard error. Ctrl-C keeps what was written.
    """
    import lamina
    from lamina.generation import Writing, limits_of
    from lamina.generation.beam import check_alone
    from lamina.generation.text import stop_texts

    sampling, stop, beaming = sampling_of(given), stop_texts(given["stop"]), _beaming_of(given)
    check_alone(beaming, sampling)
    if beaming.beams > 1 and stop:
        raise LaminaError("--stop ends a text as it is written; beam search writes many at once: drop one of the two")
    chat, raw, most = given["chat"], given["raw"], given["max_new_tokens"]
    if given["index"] is None and given["count"] is not None:
        raise LaminaError("--count is for --index")
    if given["index"] is not None and most == 0:
        raise LaminaError("--index is for writing; what a text costs with its neighbours: lamina evaluate --index")
    if chat and raw:
        raise LaminaError("--chat and --raw exclude each other: a template writes the control tokens itself")
    if prompt is None or prompt == "-":
        prompt = standard_input()
    tokenizer = lamina.tokenizer(source)
    lost = warn_of_lost(out, tokenizer, prompt)
    if chat:
        ids = tokenizer.chat_ids([{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt, special=not raw, control=raw)
    model = load(source, given)
    fits(model, sampling)
    retrieval = _retrieval(model, tokenizer, given)
    limits_of(model, most, given["min_new_tokens"])
    ids = _opened(out, model, tokenizer, ids)
    ids, cut = _cut(out, model, ids, most, given)
    if most == 0:
        _prompt_itself(out, model, tokenizer, source, ids)
        return
    if beaming.beams > 1:
        document = {"prompt_tokens": len(ids), "truncated": cut, "lost": lost}
        _search(out, model, tokenizer, ids, beaming, given, retrieval, {"source": source} | document)
        return
    writing = Writing(
        model,
        tokenizer,
        ids,
        max_new_tokens=most,
        min_new_tokens=given["min_new_tokens"],
        sampling=sampling,
        stop=stop,
        cache=given["cache"],
        skip_special=not raw,
        retrieval=retrieval,
    )
    try:
        speak(out, writing, not given["no_stream"])
    except KeyboardInterrupt:
        if out.as_json:
            out.result(_document(source, writing, ids, cut, lost) | {"finish_reason": "interrupted"}, [])
        raise
    if out.as_json:
        out.result(_document(source, writing, ids, cut, lost), [])
    out.note(figures(writing, len(ids)))


def _document(source: str, writing: Writing, ids: list[int], cut: int, lost: list[str]) -> dict[str, Any]:
    return {
        "source": source,
        "text": writing.text,
        "ids": writing.ids,
        "finish_reason": writing.finish_reason,
        "stopped_by": writing.stopped_by,
        "prompt_tokens": len(ids),
        "new_tokens": len(writing.ids),
        "tokens_per_second": round(writing.tokens_per_second, 2),
        "prefill_tokens_per_second": round(writing.prefill_tokens_per_second, 2),
        "seconds": round(writing.prefill_seconds + writing.decode_seconds, 4),
        "truncated": cut,
        "lost": lost,
    }


def _beaming_of(given: dict[str, Any]) -> Beaming:
    """The options of beam search, checked before anything is loaded."""
    from lamina.generation import Beaming

    said = {name: given[name] for name in ("length_penalty", "best") if given[name] is not None}
    if given["early_stopping"] is not None:
        said["early_stopping"] = EARLY[given["early_stopping"]]
    return Beaming(beams=given["beams"], **said)


def _retrieval(model: Model, tokenizer: Tokenizer, given: dict[str, Any]) -> Retrieval | None:
    """Who is asked for neighbours: the database of --index, if it is one for this model."""
    if given["index"] is None:
        return None
    from lamina.generation import Retrieval
    from lamina.retrieve import open_database

    database = open_database(given["index"], device=given["device"])
    database.check_reader(model.spec, tokenizer)
    return Retrieval(database, given["count"] or 2)


def _search(
    out: Output,
    model: Model,
    tokenizer: Tokenizer,
    ids: list[int],
    beaming: Beaming,
    given: dict[str, Any],
    retrieval: Retrieval | None,
    document: dict[str, Any],
) -> None:
    """Print the likeliest texts, the best first; with several of them, each after its score."""
    from lamina.generation import find_texts

    clock = time.perf_counter()
    found = find_texts(
        model,
        tokenizer,
        ids,
        beaming=beaming,
        max_new_tokens=given["max_new_tokens"],
        min_new_tokens=given["min_new_tokens"],
        cache=given["cache"],
        skip_special=not given["raw"],
        retrieval=retrieval,
    )
    seconds = time.perf_counter() - clock
    texts = [{"text": one.text, "ids": list(one.ids), "score": one.score} for one in found]
    if beaming.best == 1:
        lines = [shown(one.text) for one in found]
    else:
        lines = [f"{one.score:9.4f}  {shown(one.text)}" for one in found]
    best = texts[0] if texts else {"text": "", "ids": []}
    document |= {"text": best["text"], "ids": best["ids"], "texts": texts, "seconds": round(seconds, 4)}
    out.result(document, lines)
    longest = max((len(one.ids) for one in found), default=0)
    out.note(f"{len(ids)} tokens read, {longest} written with {beaming.beams} beams in {seconds:.2f} s")


def _opened(out: Output, model: Model, tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """A prompt without tokens begins with the token that begins every text."""
    if ids:
        return ids
    begin = tokenizer.bos if tokenizer.bos is not None else model.spec.special.start
    if begin is None:
        raise LaminaError("the prompt is empty, and this model has no token that begins a text; give a prompt")
    out.note(f"the prompt is empty: beginning with {tokenizer.decode([begin], skip_special=False)}")
    return [begin]


def _cut(out: Output, model: Model, ids: list[int], most: int, given: dict[str, Any]) -> tuple[list[int], int]:
    """The prompt as it fits, and how many tokens were cut. Nothing is cut unless asked for."""
    context = model.spec.source_context
    if context is None or given["truncate"] is None:
        return ids, 0
    keep = context if model.spec.two_stacks else max(context - most, 1)  # a source is all that an encoder reads
    if len(ids) <= keep:
        return ids, 0
    if keep == 1 and most >= context:
        raise LaminaError(f"max_new_tokens={most} leaves no room for a prompt: this model reads {context} tokens")
    cut = len(ids) - keep
    out.note(f"lamina: warning: the first {cut} of the {len(ids)} tokens of the prompt were cut (--truncate left)")
    return ids[cut:], cut


def _prompt_itself(out: Output, model: Model, tokenizer: Tokenizer, source: str, ids: list[int]) -> None:
    from lamina.generation import log_probabilities

    if model.spec.two_stacks:
        raise UnsupportedError(
            "an encoder-decoder reads its prompt and does not predict it, so the prompt has no likelihood:"
            " --max-new-tokens must be at least 1"
        )
    context = model.spec.context
    if context is not None and len(ids) > context:
        raise LaminaError(f"the prompt has {len(ids)} tokens; this model reads {context}: shorten it")
    found = [None, *log_probabilities(model, ids)]
    tokens = [tokenizer.decode([token], skip_special=False) for token in ids]
    document = {
        "source": source,
        "text": "",
        "ids": [],
        "finish_reason": "length",
        "prompt_tokens": len(ids),
        "tokens_per_second": 0.0,
        "prompt": [
            {"id": token, "token": text, "log_probability": value}
            for token, text, value in zip(ids, tokens, found, strict=True)
        ],
    }
    lines = [
        f"{'' if value is None else f'{value:.4f}':>9}  {token:>6}  {shown(text)!r}"
        for token, text, value in zip(ids, tokens, found, strict=True)
    ]
    out.result(document, lines)


command = generate
