"""Rewrite the snapshots of what others rely on: `python -m tests.update`, then read the diff."""

from __future__ import annotations

from pathlib import Path

import click

import lamina

SNAPSHOTS = Path(__file__).parent / "snapshots"
NAMES = ["-h", "--help"]


def help_text() -> str:
    """The help of every command, at 80 columns."""
    from lamina.cli.program import program

    root = click.Context(program, info_name="lamina", terminal_width=80, help_option_names=NAMES)
    texts = [program.get_help(root)]
    for name in program.list_commands(root):
        command = program.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root)
        texts.append(command.get_help(context))
        for inner, one in command.commands.items() if isinstance(command, click.Group) else ():
            texts.append(one.get_help(click.Context(one, info_name=inner, parent=context)))
    return "\n\n------\n\n".join(texts) + "\n"


def public_names() -> str:
    """The names that `import lamina` gives."""
    return "\n".join(lamina.__all__) + "\n"


TEXTS = {"help.txt": help_text, "public_names.txt": public_names}

if __name__ == "__main__":
    for name, text in TEXTS.items():
        (SNAPSHOTS / name).write_text(text(), encoding="utf-8")
        print(SNAPSHOTS / name)
