"""`lamina chat`: talk with a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.errors import complain
from lamina.cli.output import Output
from lamina.cli.program import command
from lamina.cli.prompts import choosing, figures, fits, load, loading, sampling_of, speak, standard_input, warn_of_lost
from lamina.errors import LaminaError

if TYPE_CHECKING:
    from lamina.generation import Chat

EXAMPLES = """
lamina chat smollm2-135m
lamina chat smollm2-135m --system "Answer in one word." --temperature 0.7
printf 'What is the capital of France?\\nAnd of Italy?\\n' | lamina chat smollm2-135m
"""

HELP = "/help: this. /reset: forget the conversation. /quit: leave, as does Ctrl-D. Ctrl-C stops an answer."


@command(EXAMPLES)
@click.argument("source")
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--max-new-tokens", type=int, default=512, show_default=True, help="Tokens of an answer at most.")
@choosing
@loading
def chat(out: Output, source: str, system: str | None, max_new_tokens: int, **given: Any) -> None:
    """Talk with a model: a line is a message. Reads standard input to its end where that is no terminal.

    The turns share one cache, so each reads only what is new.
    """
    import lamina
    from lamina.generation import Chat, limits_of
    from lamina.generation.text import stop_texts

    sampling, stop = sampling_of(given), stop_texts(given["stop"])
    tokenizer = lamina.tokenizer(source)
    tokenizer.chat_template()  # refuses a model without one before anything large is read
    model = load(source, given)
    fits(model, sampling)
    limits_of(model, max_new_tokens)
    talk = Chat(
        model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        system=system,
        cache=given["cache"],
    )
    live = sys.stdin is not None and sys.stdin.isatty()
    if live:
        out.note(f"{source}. {HELP}")
    turns = []
    for line in _lines(live):
        if line == "/quit":
            break
        if line == "/reset":
            talk.reset()
            turns = []
            out.note("forgotten")
        elif line == "/help":
            out.note(HELP)
        elif line.startswith("/"):
            _wrong(f"unknown command {line.split()[0]!r}; {HELP}", live)
        elif line.strip():
            warn_of_lost(out, tokenizer, line)
            turns.append(_turn(out, talk, line, live))
    if out.as_json:
        out.result({"source": source, "messages": talk.messages, "turns": [turn for turn in turns if turn]}, [])


def _turn(out: Output, talk: Chat, line: str, live: bool) -> dict[str, Any] | None:
    answer = talk.say(line)
    try:
        speak(out, answer, stream=True)
    except KeyboardInterrupt:
        if not live:
            raise
    except LaminaError as error:
        talk.take_back()
        _wrong(f"{error}; /reset forgets the conversation", live)
        return None
    read = len(answer.prompt_ids)
    out.note(f"{figures(answer, read)}; {talk.reused} were in the cache")
    return {
        "text": answer.text,
        "ids": answer.ids,
        "finish_reason": answer.finish_reason or "interrupted",
        "prompt_tokens": read + talk.reused,
        "cached_tokens": talk.reused,
        "tokens_per_second": round(answer.tokens_per_second, 2),
    }


def _lines(live: bool) -> Iterator[str]:
    if not live:
        yield from standard_input().splitlines()
        return
    import readline  # noqa: F401 - editing and history, by being imported

    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return


def _wrong(message: str, live: bool) -> None:
    """On a terminal the conversation goes on after a mistake; elsewhere it is the end."""
    if not live:
        raise LaminaError(message)
    complain(f"lamina: error: {message}")


command = chat
