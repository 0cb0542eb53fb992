"""The front door: help and version at once, mistakes in one line, pipes that close, interrupts, foreign locales."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings

import click
import pytest

import lamina
from lamina.cli import main, program
from lamina.cli.errors import Failed
from lamina.cli.output import Output, share, table
from lamina.cli.program import COMMANDS, HERE
from lamina.figures import short, size

BUILT = [name for name in COMMANDS if (HERE / f"{name}.py").is_file()]
LAMINA = [sys.executable, "-m", "lamina"]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def shell(script: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `script` with bash, where `lamina` is the command."""
    lamina_is = f'lamina() {{ "{sys.executable}" -m lamina "$@"; }}\n'
    return subprocess.run(
        ["bash", "-c", lamina_is + script],
        capture_output=True,
        text=True,
        env=environment(**more),
        timeout=100,
        check=False,
    )


@pytest.fixture
def raising(monkeypatch):
    """Make `lamina doctor` raise."""

    def put(error: BaseException | type[BaseException]) -> None:
        @click.command()
        @click.option("--debug", is_flag=True)
        def command(debug: bool) -> None:
            raise error

        monkeypatch.setattr(program.Program, "get_command", lambda self, ctx, name: command)

    return put


@pytest.mark.parametrize("option", ["--help", "--version", "-h"])
def test_the_first_answer_imports_nothing_slow(option):
    code = (
        "import sys; from lamina.cli import main; status = main(sys.argv[1:])\n"
        "slow = {'torch', 'numpy', 'rich', 'pydantic', 'yaml', 'jinja2', 'tokenizers', 'huggingface_hub', 'asyncio'}\n"
        "print(status, sorted(slow & set(sys.modules)), [m for m in sys.modules if m.startswith('lamina.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, option], capture_output=True, text=True, env=environment(), check=True
    )
    last = done.stdout.splitlines()[-1]
    assert last.startswith("0 [] ")
    assert "lamina.layers" not in last and "lamina.cli.show" not in last


def test_version(lam):
    assert lam("--version").out == f"lamina {lamina.__version__}\n"


def test_no_command_is_help(lam):
    done = lam()
    assert done.status == 0 and done.out == lam("--help").out and done.err == ""


def test_help_lists_the_commands_that_are_there(lam):
    text = lam("--help").out
    listed = [line.split()[0] for line in text.split("Commands:\n")[1].split("\n\n")[0].splitlines() if line[2] != " "]
    assert listed == BUILT
    absent = [name for name in COMMANDS if name not in BUILT]
    for name in absent:
        lam(name).refused(f"unknown command {name!r}")


def words_of(name: str) -> list[list[str]]:
    """How the command is called, or each of those that it holds."""
    command = program.program.get_command(click.Context(program.program), name)
    return [[name, one] for one in command.commands] if isinstance(command, click.Group) else [[name]]


@pytest.mark.parametrize("words", [words for name in BUILT for words in words_of(name)], ids=" ".join)
def test_every_command_has_help_with_examples_and_the_shared_options(lam, words):
    name = " ".join(words)
    done = lam(*words, "--help")
    assert done.status == 0 and done.err == ""
    for said in ("Examples:", f"lamina {name}", "--json", "--quiet", "--no-color", "--debug", "-h, --help"):
        assert said in done.out
    assert max(len(line) for line in done.out.split("Examples:")[0].splitlines()) <= 80
    assert lam(*words, "-h").out == done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["shwo"], "did you mean 'show'?"),
        (["acount", "llama/7b"], "did you mean 'account'?"),
        (["qqqqqq"], "unknown command 'qqqqqq'"),
        (["--jsn"], "No such option"),
        (["account", "llama/7b", "--contxt", "5"], "Did you mean '--context'?"),
        (["account", "llama/7b", "--context", "many"], "--context"),
        (["account", "llama/7b", "--context", "0"], "--context"),
        (["account", "llama/7b", "--batch", "99999999999999999"], "beyond what tensors can count"),
        (["account", "llama/7b", "--dtype", "bf16"], "unknown dtype 'bf16'"),
        (["account"], "Missing argument 'SOURCE'"),
        (["account", "llama/7b", "more"], "unexpected extra argument"),
        (["show", "lama/7b"], "no source"),
        (["show", "llama/7"], "did you mean 'llama/7b'?"),
        (["show", "smollm2-135"], "did you mean 'smollm2-135m'?"),
        (["show", ""], "''"),
        (["show", "./no/such/place"], "no source './no/such/place'"),
        (["show", "/dev/null"], "/dev/null"),
        (["show", "llama/7b", "--names", "tf"], "--names"),
        (["diff", "llama/7b"], "Missing argument"),
        (["diff", "llama/7b", "llama/8b"], "llama/8b"),
        (["show", "a\x00b"], "no source"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(lam, monkeypatch, words, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if words == ["show", "lama/7b"]:  # could be a repository: asked for there, but not without a network
        said = "lama/7b"
    lam(*words).refused(said)


def test_debug_adds_the_traceback(lam):
    done = lam("show", "llama/7", "--debug")
    assert done.status == 2 and "Traceback" in done.err and done.err.splitlines()[-1].startswith("lamina: error: ")
    assert "Traceback" not in lam("show", "llama/7").err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (lamina.LaminaError("bad\nthing"), 2, "lamina: error: bad thing"),
        (Failed("no network"), 1, "lamina: error: no network"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "lamina: error: /x/y: Permission denied"),
        (OSError(28, "No space left on device"), 1, "lamina: error: No space left on device; free some space"),
        (MemoryError(), 1, "lamina: error: there is not enough memory"),
        (KeyboardInterrupt(), 130, "lamina: interrupted"),
        (click.Abort(), 130, "lamina: interrupted"),
        (RuntimeError("boom"), 1, "lamina: error: lamina itself failed: RuntimeError: boom"),
        (lamina.LaminaError("\x1b[31mred\u202e\x07"), 2, "lamina: error: \\x1b[31mred\\u202e\\x07"),
    ],
)
def test_what_ends_a_command_is_one_line_and_a_status(lam, raising, error, status, line):
    raising(error)
    done = lam("doctor")
    assert done.status == status and done.out == "" and done.err.count("\n") == 1
    assert done.err.startswith(line)
    assert "Traceback" in lam("doctor", "--debug").err


def test_warnings_are_lines(lam, monkeypatch):
    @click.command()
    def command() -> None:
        warnings.warn("3 weights are\nnot finite", stacklevel=2)
        warnings.warn("for programmers", DeprecationWarning, stacklevel=2)
        click.echo("done")

    monkeypatch.setattr(program.Program, "get_command", lambda self, ctx, name: command)
    done = lam("doctor")
    assert (done.status, done.out, done.err) == (0, "done\n", "lamina: warning: 3 weights are not finite\n")


def test_json_is_one_document_and_quiet_is_quiet(lam, mistral):
    for words in (["show", mistral], ["account", mistral], ["diff", mistral, mistral], ["layers"], ["doctor"]):
        done = lam(*words, "--json", "-q")
        assert done.status == 0 and done.err == ""
        assert json.loads(done.out)["schema"] == "lamina/RESULT/1"
        assert done.out.isascii()


def test_no_colour_where_nobody_looks(lam, monkeypatch, capsys):
    assert "\x1b" not in lam("layers").out
    Output(no_color=True).result({}, [click.style("x", bold=True)])
    monkeypatch.setenv("NO_COLOR", "1")
    Output().result({}, [click.style("x", bold=True)])
    assert capsys.readouterr().out == "x\nx\n"


def test_a_reader_that_has_seen_enough():
    done = shell("lamina layers --json | head -n 1; echo ${PIPESTATUS[0]}; lamina --help | true; echo done")
    assert done.stdout.splitlines() == ["{", "0", "done"] and done.stderr == ""


def test_streams_that_are_closed_or_full():
    done = shell("lamina doctor >&-; echo $?; lamina shwo 2>&-; echo $?; lamina --help >/dev/full; echo $?")
    assert done.stdout.split() == ["0", "2", "1"]
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_a_terminal_that_knows_only_ascii(locale):
    done = shell("lamina --help && lamina show mistral/7b", COLUMNS="80", **locale)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.isascii()


def test_an_interrupt_ends_with_130(tmp_path):
    code = (
        "import sys, time, click\nfrom lamina.cli import main, program\n"
        "@click.command()\ndef command():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "program.Program.get_command = lambda self, ctx, name: command\n"
        "sys.exit(main(['doctor']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as running:
        assert running.stdout is not None and running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=20)
    assert running.returncode == 130 and err == "lamina: interrupted\n"


def test_main_takes_its_words_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lamina", "--version"])
    assert main() == 0 and capsys.readouterr().out.startswith("lamina ")


def test_numbers():
    assert [short(n) for n in (0, 999, 1000, 1234567, 999_600, 4.2e14)] == [
        "0",
        "999",
        "1.00 k",
        "1.23 M",
        "1.00 M",
        "420 T",
    ]
    assert [short(n, "tokens") for n in (0, 999, 4_780_000)] == ["0 tokens", "999 tokens", "4.78 Mtokens"]
    assert [size(n) for n in (0, 1023, 1024, 63 * 2**30)] == ["0 B", "1023 B", "1.0 KiB", "63.0 GiB"]
    assert [share(1, 3), share(0, 0)] == ["33.3 %", "-"]


def test_tables_wrap_their_first_column():
    lines = table(("part", "n"), [("a", "1"), ("  " + "word " * 12, "22")], width=30)
    lines = [click.unstyle(line) for line in lines]
    assert lines[0].split() == ["part", "n"] and lines[2].endswith(" 22")
    assert all(len(line) <= 30 for line in lines) and lines[3].startswith("    word")
