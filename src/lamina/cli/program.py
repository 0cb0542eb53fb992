"""The group of commands, read from a table, so that `lamina --help` imports none of them; and how one is run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from lamina.cli.errors import hold_streams, status_of, warnings_as_lines
from lamina.cli.output import Output

COMMANDS = {
    "layers": "The kinds of layer: what they are, their equations, who uses them.",
    "show": "A model opened up: its layers, shapes and costs, as a table or a picture.",
    "account": "What a model costs: parameters, compute, cache.",
    "diff": "The differences between two models.",
    "verify": "Which properties hold for a model.",
    "generate": "Continue a prompt.",
    "chat": "Talk with a model.",
    "embed": "Vectors of texts.",
    "fill": "Fill the masked words of a text.",
    "evaluate": "How well a model predicts the texts in files.",
    "convert": "Write a model in another layout or dtype.",
    "fetch": "Get a packaged model: pinned, checked, outside your environment.",
    "edit": "Operate on a model: a plan of surgeries.",
    "data": "Prepare texts for training, and look at what was prepared.",
    "train": "Train a model as a configuration says.",
    "runs": "Past training runs: list, show, compare.",
    "index": "Databases of text: build, query, change.",
    "serve": "Serve a model over HTTP.",
    "page": "The local web page.",
    "doctor": "This machine and installation, to paste into a report.",
}
"""Every command and its line in the help. A command is there when its file is: cli/NAME.py, with a `command`."""

HERE = Path(__file__).parent
NAMES = {"help_option_names": ["-h", "--help"]}

SHARED = (
    ("json", click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document.")),
    ("quiet", click.Option(["-q", "--quiet", "quiet"], is_flag=True, help="No messages and no progress.")),
    ("color", click.Option(["--no-color", "no_color"], is_flag=True, help="No colour, as with NO_COLOR=1.")),
    ("debug", click.Option(["--debug", "debug"], is_flag=True, help="Show the traceback of an error.")),
)
"""The options that every command has."""


class Program(click.Group):
    """The commands whose files exist, imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if (HERE / f"{name}.py").is_file()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return import_module(f"lamina.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.list_commands(ctx) and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1, cutoff=0.5)
            ctx.fail(f"unknown command {args[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, COMMANDS[name]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def command(examples: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of `function(out, ...)`: with the shared options, and examples at the end of its help."""

    def make(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        def call(as_json: bool, quiet: bool, no_color: bool, debug: bool, **given: Any) -> None:
            function(Output(as_json, quiet, no_color), **given)

        lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
        made = click.command(context_settings=NAMES, epilog=f"\b\nExamples:\n{lines}")(call)
        made.params += [option for _, option in SHARED]
        return made

    return make


def _version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import lamina

        click.echo(f"lamina {lamina.__version__}")
        ctx.exit()


program = Program(
    name="lamina",
    help="Transformers in which every layer is one part, reading real checkpoints exactly.",
    epilog="SOURCE is a local directory, a .gguf or .safetensors file, hf:owner/name[@revision], a packaged model"
    " (lamina fetch), or, where no weights are needed, a published size such as llama/7b."
    " `lamina COMMAND --help` has examples.",
    context_settings=NAMES,
    no_args_is_help=False,
    invoke_without_command=True,
    callback=lambda: None,
    params=[
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
        )
    ],
)


def run(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn whatever happens into a line and an exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    hold_streams()
    with warnings_as_lines():
        try:
            with program.make_context("lamina", given or ["--help"]) as context:
                program.invoke(context)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
        except BaseException as error:  # the one place where everything is caught: nobody shall see a traceback
            return status_of(error, "--debug" in given)
    return 0
