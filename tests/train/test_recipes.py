"""examples/train: every recipe runs by the commands at its head, some steps of it, on text that is on this machine."""

from __future__ import annotations

import ast
import email.message
import gzip
import io
import json
import math
import runpy
import shlex
import sys
import sysconfig
import tarfile
import types
from pathlib import Path

import pytest
import torch

import lamina
from lamina.cli import main
from lamina.train.past import read_run
from tests import tiny
from tests.retrieve.made import embedder_at

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples/train"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PACKAGED = ("minilm-l6", "smollm2-135m")
ALONE = ("spam", "retro", "retro-plain", "retrofit", "heal")
"""Recipes that need another one's model, or one that is packaged."""
SHORT = [
    "loop.steps=2",
    "loop.batch=4",
    "loop.micro=2",
    "evaluation.every=0",
    "evaluation.rows=4",
    "evaluation.tokens=3",
]


def commands(path: Path) -> list[list[str]]:
    """What the head of a recipe says is to be done: its lines `# $ ...`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [shlex.split(line.removeprefix("# $ ")) for line in lines if line.startswith("# $ ")]


def book() -> str:
    """The pages of the documentation, an empty line between their paragraphs."""
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))[:4])


def functions(count: int) -> list[tuple[str, str]]:
    """(first line of what a function of the standard library says of itself, its arguments)."""
    found: list[tuple[str, str]] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            said = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if said and isinstance(node, ast.FunctionDef):
                found.append((said.splitlines()[0][:80] or node.name, f"{node.name}({ast.unparse(node.args)[:60]})"))
        if len(found) >= count:
            break
    return found[:count]


def texts(name: str, file: Path) -> None:
    """What stands in for examples/train/texts.py, which asks the network."""
    if name == "kjv":
        file.write_text(book(), encoding="utf-8")
    elif name == "help-en-fr":
        rows = [{"en": said, "fr": called} for said, called in functions(200)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif name in ("kernel", "llvm-13", "llvm-16"):
        pages = [page for path in sorted((ROOT / "docs").glob("*.md"))[:6] for page in path.read_text().split("\n## ")]
        later = [page if name != "llvm-16" else f"{page}\nA later line." for page in pages]
        file.write_text("".join(json.dumps({"text": page}) + "\n" for page in later), encoding="utf-8")
    else:
        assert name == "spam"
        rows = [{"text": text, "label": label} for pair in functions(60) for text, label in zip(pair, ("ham", "spam"))]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def follow(recipe: str, monkeypatch: pytest.MonkeyPatch, *more: str, **sources: str) -> None:
    """Run the commands of a recipe here; `minilm` and `smollm2` stand in for packaged models. more: for training."""
    for program, *arguments in commands(FOLDER / f"{recipe}.yaml"):
        given = [sources.get(one.partition("-")[0], one) if one in PACKAGED else one for one in arguments]
        if program == "pip":
            continue
        if program == "python":
            script = ROOT / given.pop(0)
            if script.name == "texts.py":
                texts(given[0], Path(given[1]))
                continue
            monkeypatch.setattr(sys, "argv", [str(script), *given])
            runpy.run_path(str(script), run_name="__main__")
        elif given[0] != "fetch":
            assert program == "lamina"
            if given[0] == "train":
                assert not Path(given[1]).is_absolute()
                given[1] = str(ROOT / given[1])
                given += [*SHORT, *more]
            if given[0] == "edit":
                given[2] = str(ROOT / given[2])
            assert main(given) == 0, given


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ALONE])
def test_a_recipe_runs(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if recipe == "shakespeare":  # the file is the user's
        (tmp_path / "shakespeare.txt").write_text(book(), encoding="utf-8")
    follow(recipe, monkeypatch)
    trained(tmp_path / "runs" / recipe)


def test_the_classifier_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a BERT in place of MiniLM, trained for two steps."""
    monkeypatch.chdir(tmp_path)
    follow("bert", monkeypatch)
    follow("spam", monkeypatch, minilm="runs/bert/model")
    model = trained(tmp_path / "runs/spam")
    assert model.spec.labels is not None and model.spec.labels.labels == 2 and model.spec.head is None
    before = lamina.load("runs/bert/model")
    assert model.embedding.weight.equal(before.embedding.weight)  # frozen
    assert not model.encoder.layers[0].feedforward.op.up.weight.equal(before.encoder.layers[0].feedforward.op.up.weight)


def test_a_retro_and_its_twin_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    embedder_at(tmp_path / "bert")
    follow("retro", monkeypatch, minilm="bert")
    assert "a neighbour holds" in capsys.readouterr().out
    follow("retro-plain", monkeypatch)
    one, other = trained(tmp_path / "runs/retro"), trained(tmp_path / "runs/retro-plain")
    assert one.spec == other.spec
    runs = [read_run(tmp_path / "runs" / name) for name in ("retro", "retro-plain")]
    assert runs[0].summary()["tokens"] == runs[1].summary()["tokens"]  # the same rows


def test_a_pretrained_model_learns_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a deep tiny LLaMA in place of SmolLM2."""
    monkeypatch.chdir(tmp_path)
    embedder_at(tmp_path / "bert")
    deep = tiny.LLAMA | {"num_hidden_layers": 24, "max_position_embeddings": 256}
    tiny.checkpoint(tmp_path / "base", deep)
    follow("retrofit", monkeypatch, minilm="bert", smollm2="base")
    model, base = trained(tmp_path / "runs/retrofit"), lamina.load("base", "float32")
    changed = {name for name, weight in model.state_dict().items() if not name.startswith("head")
               and not (name in base.state_dict() and weight.equal(base.state_dict()[name]))}  # fmt: skip
    assert changed and all(".retrieval." in name for name in changed)
    table = model.state_dict()["decoder.layers.17.retrieval.op.encoder.embedding.weight"]
    assert table.equal(base.embedding.weight)  # frozen
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_a_deeper_model_heals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a tiny LLaMA as deep as SmolLM2: the layers that are new learn, and nothing else."""
    monkeypatch.chdir(tmp_path)
    base = tiny.LLAMA | {"num_hidden_layers": 30, "max_position_embeddings": 256}
    tiny.checkpoint(tmp_path / "base", base)
    follow("heal", monkeypatch, "objective.teacher=base", "optimiser.rate=1e-2", smollm2="base")
    model, before = trained(tmp_path / "runs/heal"), lamina.load("smollm2-deeper", "float32")
    changed = {name.split(".")[2] for name, weight in model.named_parameters()
               if not weight.equal(before.get_parameter(name))}  # fmt: skip
    assert changed == {str(number) for number in range(20, 30)}  # the second 10 to 19


def trained(directory: Path) -> lamina.Model:
    """What a run has to leave."""
    run = read_run(directory)
    found = run.summary()
    assert found["steps"] == 2 and math.isfinite(found["loss"]) and math.isfinite(found["validation_loss"])
    assert (directory / "report.html").is_file() and run.warnings == ()
    return lamina.load(str(directory / "model"))


def test_a_switch_and_its_twin_do_the_same_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Nearly: a router is 4 rows of 128, in two layers."""
    monkeypatch.chdir(tmp_path)
    texts("kjv", tmp_path / "book.txt")
    _, prepare, *_ = commands(FOLDER / "t5.yaml")
    assert main(prepare[1:]) == 0
    flops, parameters = [], []
    for name in ("t5", "switch"):
        capsys.readouterr()
        assert main(["train", str(FOLDER / f"{name}.yaml"), "--dry-run", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        flops.append(plan["flops"])
        parameters.append(plan["parameters"])
    assert 1 <= flops[1] / flops[0] < 1.01
    assert parameters[1] - parameters[0] == 2 * (3 * 2 * 128 * 512 + 4 * 128)


def test_pages_of_two_versions(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long = "a" * 600
    pages = {
        "13": {"A": long + "3", "b/B": long + "3", "same": long, "gone": long, "short": "3", "long": long * 30},
        "16": {"A": long + "6", "b/B": long + "ü6", "same": long, "new": long, "short": "6", "long": long * 30 + "6"},
    }
    for version, named in pages.items():
        for name, text in named.items():
            path = tmp_path / f"llvm-{version}-doc/usr/share/doc/llvm/html/_sources/{name}.rst.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    monkeypatch.setitem(module.llvm.__globals__, "debian", lambda folder, package: folder / package)
    for version in pages:
        rows = [json.loads(line)["text"] for line in module.TEXTS[f"llvm-{version}"](tmp_path)]
        assert rows == [pages[version]["A"], pages[version]["b/B"]]


def test_pages_of_the_kernel(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "usr/share/doc/linux-doc-6.1/Documentation"
    for name, text in (("hwmon/b.rst.gz", "B"), ("hwmon/a.rst", "A"), ("userspace-api/x/c.rst.gz", "Ü"),
                       ("userspace-api/empty.rst", " "), ("userspace-api/c.rst.exceptions.gz", "no"),
                       ("hwmon/d.png", "no"), ("scsi/e.rst", "no")):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    names = "linux-doc-5.10\nlinux-doc-6.12\nlinux-doc-6.1\n"
    monkeypatch.setitem(module.newest.__globals__, "call", lambda command, folder: names)
    asked = []
    monkeypatch.setitem(module.kernel.__globals__, "debian", lambda _, package: asked.append(package) or tmp_path)
    assert [json.loads(line)["text"] for line in module.kernel(tmp_path)] == ["A", "B", "Ü"]
    assert asked == ["linux-doc-6.12"]
    monkeypatch.setitem(module.newest.__globals__, "call", lambda command, folder: "")
    with pytest.raises(SystemExit, match="apt-cache knows no package linux-doc-"):
        module.newest("linux-doc-")


@pytest.fixture
def module() -> types.SimpleNamespace:
    return types.SimpleNamespace(**runpy.run_path(str(FOLDER / "texts.py"), run_name="texts"))


def test_paragraphs_of_a_page(module):
    page = (
        '<h1 id="hd_id31" dir="auto">\n<a name="x">Fields &amp; <b>Tables</b></a></h1>'
        '<p id="par_id7" class="paragraph">Choose <span class="menuitem">File\n – Open</span></p>'
        '<p class="other">not this</p><p id="par_idN1A"> </p>'
    )
    found = module.paragraphs(page)
    assert found == {"hd_id31": "Fields & Tables", "par_id7": "Choose File – Open", "par_idN1A": ""}


def test_a_mail_is_its_subject_and_its_text(module):
    message = email.message.EmailMessage()
    message["Subject"], message["From"] = "Win  now", "nobody@example.org"
    message.set_content("<p>You &lt;have&gt; won\n</p><script>x = 1</script>!", subtype="html")
    message.add_attachment(b"\0\1", maintype="application", subtype="zip")
    assert module.mail(message.as_bytes()) == "Win now\nYou <have> won !"
    assert module.mail(b"Subject: a\nContent-Type: text/plain; charset=none\n\n\xffb\0") == "a\n\ufffdb"
    assert module.mail(b"Subject: only\nContent-Type: image/png\n\nAAAA") == "only"


def test_mails_have_the_label_of_their_folder(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    archive = tmp_path / "mails.tgz"
    with tarfile.open(archive, "w:gz") as file:
        for name in ("data/easy-ham-1/1.txt", "data/spam-2/2.txt", "data/spam-2/2.json", "README.md"):
            raw = f"Subject: {name}\n\ntext".encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(raw)
            file.addfile(info, io.BytesIO(raw))
    monkeypatch.setitem(module.spam.__globals__, "npm", lambda *given: archive)
    rows = [json.loads(line) for line in module.spam(tmp_path)]
    assert [(row["label"], row["text"].splitlines()[0]) for row in rows] == [
        ("ham", "data/easy-ham-1/1.txt"),
        ("spam", "data/spam-2/2.txt"),
    ]


def test_pairs_have_the_same_id_in_the_same_page(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pages = {
        "en-US/a.html": '<p id="par_id1">Open</p><p id="par_id2">Close</p><p id="par_id3">OK</p>',
        "fr/a.html": '<p id="par_id2">Fermer</p><p id="par_id1">Ouvrir</p><p id="par_id3">OK</p>',
        "en-US/b/c.html": '<p id="par_id1">Open</p><p id="par_id9">Alone</p>',
        "fr/b/c.html": '<p id="par_id1">Ouvrir</p>',
        "en-US/d.html": '<p id="par_id1">Nowhere</p>',
    }
    for name, page in pages.items():
        language, _, rest = name.partition("/")
        path = tmp_path / "usr/share/libreoffice/help" / language / "text" / rest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    monkeypatch.setitem(module.help_en_fr.__globals__, "debian", lambda folder, package: tmp_path)
    rows = [json.loads(line) for line in module.help_en_fr(tmp_path)]
    assert rows == [{"en": "Open", "fr": "Ouvrir"}, {"en": "Close", "fr": "Fermer"}]


def test_a_package_that_is_another_one_is_refused(module, tmp_path: Path):
    path = tmp_path / "package.whl"
    path.write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"package.whl has the SHA-256 f41f\w+; 00 was expected"):
        module.checked(path, "00")


def test_a_client_that_is_not_there_is_named(module, tmp_path: Path):
    with pytest.raises(SystemExit, match="no-such-client is not on this machine, and pack x needs it"):
        module.call(["no-such-client", "pack", "x"], tmp_path)


def test_a_client_that_fails_is_quoted(module, tmp_path: Path):
    with pytest.raises(SystemExit, match="no such package"):
        module.call([sys.executable, "-c", "raise SystemExit('no such package')"], tmp_path)
