"""What the commands that write text share: options, prompts, tokens that fit, and text that cannot harm a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.output import Output
from lamina.errors import LaminaError

if TYPE_CHECKING:
    from lamina.generation import Sampling, Writing
    from lamina.model import Model
    from lamina.text import Tokenizer

CACHES = ("auto", "growing", "fixed", "ring", "sinks", "none")


def loading(function: Callable[..., None]) -> Callable[..., None]:
    """The options of loading a model."""
    for option in (
        click.option("--device", default="cpu", show_default=True, help="Where the model lies: cpu, cuda, cuda:1."),
        click.option("--quantize", metavar="int8", help="Keep the weights in 8 bits: smaller, faster, less exact."),
        click.option("--adapter", metavar="PATH", help="A LoRA that peft wrote, merged into the weights."),
        click.option("--strict", is_flag=True, help="Refuse weights that are not finite, instead of a warning."),
        click.option("--compile", "compile", is_flag=True, help="Compile the decoding step, once per machine."),
        click.option("--dtype", help="float32, bfloat16, float16 or float64. [default: as stored]"),
    ):
        function = option(function)
    return function


def load(source: str, given: dict[str, Any]) -> Model:
    """The model that SOURCE and the options of `loading` ask for."""
    import lamina

    return lamina.load(
        source,
        given["dtype"],
        given["device"],
        given["compile"],
        quantize=given["quantize"],
        adapter=given["adapter"],
        strict=given["strict"],
    )


def choosing(function: Callable[..., None]) -> Callable[..., None]:
    """The options of choosing tokens."""
    for option in (
        click.option(
            "--cache", type=click.Choice(CACHES), default="auto", show_default=True, help="How keys are kept."
        ),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; up to four times."),
        click.option("--seed", type=int, help="The same seed gives the same text."),
        click.option("--min-p", type=float, help="Only tokens at least this likely, relative to the likeliest."),
        click.option("--top-p", type=float, help="Only the likeliest tokens that together reach this."),
        click.option("--top-k", type=int, help="Only this many of the likeliest tokens."),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."),
    ):
        function = option(function)
    return function


def sampling_of(given: dict[str, Any]) -> Sampling:
    """The options of `choosing`, taken out of `given` and checked before anything is loaded."""
    from lamina.generation import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    chosen: dict[str, Any] = {name: given.pop(name) for name in names}
    return Sampling(**chosen)


def fits(model: Model, sampling: Sampling) -> None:
    """Refuse more candidates than there are tokens."""
    vocabulary = model.spec.embedding.vocabulary
    if sampling.top_k is not None and sampling.top_k > vocabulary:
        raise LaminaError(f"top_k is {sampling.top_k}; this model has {vocabulary} tokens")


def standard_input() -> str:
    """All of standard input, without the line end that `echo` adds."""
    if sys.stdin is None:
        raise LaminaError("standard input is closed; give a prompt")
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise LaminaError(f"standard input is not UTF-8 at byte {error.start:,}") from None
    return text.removesuffix("\n").removesuffix("\r")


def warn_of_lost(out: Output, tokenizer: Tokenizer, text: str) -> list[str]:
    """Say which characters of `text` the tokenizer cannot express."""
    lost = tokenizer.lost(text)
    if lost:
        out.note(f"lamina: warning: this tokenizer has nothing for {named(lost)}: the model does not see them")
    return lost


def named(lost: Iterable[str], most: int = 8) -> str:
    """The first few of what a tokenizer has nothing for: characters by number, and words unknown as a whole."""
    each = [f"U+{ord(part):04X}" if len(part) == 1 else ascii(part) for part in lost]
    return ", ".join(each[:most]) + (", ..." if len(each) > most else "")


def shown(text: str) -> str:
    """Text for the screen: on a terminal, control characters are escaped, so that a model cannot send it commands."""
    if sys.stdout is None or not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" or ord(c) > 0x9F else repr(c)[1:-1] for c in text)


def speak(out: Output, writing: Writing, stream: bool) -> None:
    """Generate, and print the text as it comes. When interrupted, what was written is printed whole first."""
    live = stream and not out.as_json
    try:
        for piece in writing:
            if live:
                click.echo(shown(piece), nl=False)
                sys.stdout.flush()
    except KeyboardInterrupt:
        tail = writing.flush()
        if not out.as_json:
            click.echo(shown(tail if live else writing.text))
        raise
    if not out.as_json:
        if not live:
            click.echo(shown(writing.text), nl=False)
        if not writing.text.endswith("\n"):
            click.echo()


def figures(writing: Writing, prompt_tokens: int) -> str:
    """One line about the speed."""
    read = f"{prompt_tokens} tokens read in {writing.prefill_seconds:.2f} s"
    return f"{read}, {len(writing.ids)} written at {writing.tokens_per_second:.1f} tokens/s ({writing.finish_reason})"
