"""layers, show, account, diff, doctor: the commands that look at models."""

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import lamina
from lamina.catalogue import CATALOGUE
from lamina.cli.diff import differences
from lamina.families import sizes
from lamina.layers import AlibiSpec
from lamina.packaged import PACKAGED
from lamina.pictures import architecture, text_twin
from lamina.words import say, span
from tests.pages import assert_complete


def test_account_gives_the_fields_of_the_python_function(lam):
    done = lam("account", "llama2/7b", "--batch", 2, "--context", 100, "--json")
    expected = dataclasses.asdict(lamina.account("llama2/7b", batch=2, context=100))
    assert done.status == 0 and done.err == ""
    assert done.document == json.loads(json.dumps({"schema": "lamina/RESULT/1", "source": "llama2/7b", **expected}))


def test_account_in_words(lam, mistral):
    done = lam("account", "llama3.1/405b")
    assert done.status == 0
    for words in ("405,853,388,800", "63.0 GiB", "756.0 GiB in bfloat16", "decoder.layers.0-125 (x 126)"):
        assert words in done.out
    assert lam("account", mistral, "--dtype", "float32", "--json").document["dtype"] == "float32"


def test_show_opens_a_model_up(lam):
    done = lam("show", "smollm2/135m")
    assert done.status == 0 and done.err == ""
    text = " ".join(done.out.split())
    for words in (
        "layers.0-29 (x 30)",
        "9/3 heads of 64",
        "RoPE base 100000",
        "SwiGLU 1536",
        "134,515,008",
        "22.5 KiB",
    ):
        assert words in text
    assert max(len(line) for line in done.out.splitlines()) <= 80


@pytest.mark.parametrize("name", sizes())
def test_show_fits_in_80_columns_for_every_size(lam, name: str):
    done = lam("show", name)
    assert done.status == 0 and done.out.isascii()
    assert max(len(line) for line in done.out.splitlines()) <= 80, done.out


def test_show_names_both_layouts(lam, mistral, native):
    found = lam("show", mistral, "--names", "hf", "--json").document["tensors"]
    assert {
        "ours": ["decoder.layers.2.attention.op.k.weight"],
        "theirs": ["model.layers.2.self_attn.k_proj.weight"],
        "shape": [[20, 36]],
    } in found
    stored = json.loads((mistral / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert {name for tensor in found for name in tensor["theirs"]} == stored.keys() - {"__metadata__"}
    # A native checkpoint has no names of its own there; the family that can say its spec gives them.
    again = lam("show", native, "--names", "hf", "--json").document["tensors"]
    assert {name for tensor in again for name in tensor["theirs"]} == {n for tensor in found for n in tensor["theirs"]}
    text = lam("show", "gpt2/small", "--names", "hf").out
    assert "transformer.h.0.attn.c_attn.weight  768 x 2304" in text and "h.1." not in text
    assert "11 layers that are equal to one above are left out" in text


def test_show_draws(lam, tmp_path):
    svg, html = tmp_path / "a.svg", tmp_path / "a.html"
    done = lam("show", "gemma2/2b", "--svg", svg, "--html", html)
    assert done.out.splitlines() == [str(svg), str(html)]
    root = ET.fromstring(svg.read_text(encoding="utf-8"))
    texts = [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("× 13") == 2
    assert any("causal window of 4096" in text for text in texts)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.get("x", 0)) + float(box.attrib["width"]) <= width
        assert float(box.get("y", 0)) + float(box.attrib["height"]) <= height
    page = html.read_text(encoding="utf-8")
    assert_complete(page)
    assert "<script" not in page and "2,614,341,888" in page


def test_pictures_carry_their_text_and_escape_what_they_are_told():
    spec = lamina.spec("bert/base-uncased")
    svg = architecture(spec, title="<script>alert(1)</script>&")
    root = ET.fromstring(svg)
    assert "<script" not in svg
    twin = text_twin(spec)
    assert root.findtext("{http://www.w3.org/2000/svg}desc") == "; ".join(twin)
    assert any("x 12, attention" in line and "bidirectional" in line for line in twin)


@pytest.mark.parametrize("name", sizes())
def test_every_size_can_be_drawn_and_said(name: str):
    spec = lamina.spec(name)
    ET.fromstring(architecture(spec))
    for _, part in spec.walk():
        assert say(part)


def test_branches_and_position_biases_in_words():
    said = {name: [say(part) for _, part in lamina.spec(name).walk()] for name in ("falcon/7b", "falcon/40b")}
    assert "in parallel: attention + feedforward" in said["falcon/7b"] and "branch" in said["falcon/7b"]
    assert "in parallel: attention + feedforward, each with its own norm" in said["falcon/40b"]
    assert "branch, pre-norm" in said["falcon/40b"] and "branch" not in said["falcon/40b"]
    assert say(AlibiSpec(heads=2)) == "ALiBi position bias"
    falcon = AlibiSpec(heads=2, bias_max=16, scale=0.125, rounded=True)
    assert say(falcon) == "ALiBi position bias, to 2^-16, times 0.125, in bfloat16"


def test_numbers_of_layers_in_short():
    assert [span(x) for x in ([3], [0, 1, 2], [0, 2, 4, 6], [0, 1, 5], [1, 3], range(126))] == [
        "3", "0-2", "0, 2, ..., 6", "0-1, 5", "1, 3", "0-125",
    ]  # fmt: skip


def test_diff_prints_a_path_and_both_values(lam):
    lines = lam("diff", "llama/7b", "mistral/7b").out.splitlines()
    assert "decoder.layers.*.attention.op.key_heads: 32 -> 8" in lines
    assert "decoder.layers.*.attention.op.pattern: causal -> causal window of 4096" in lines
    assert len(lines) == 7


def test_diff_of_stacks_of_different_depth_compares_the_layers_that_both_have(lam):
    found = lam("diff", "llama3/8b", "llama3/70b", "--json").document
    by_path = {row["path"]: (row["a"], row["b"]) for row in found["differences"]}
    assert by_path["decoder.layers"] == ("32 layers", "80 layers")
    assert by_path["decoder.layers.*.attention.op.heads"] == (32, 64)
    assert len(by_path) < 8 and not found["same"]


def test_diff_names_the_layers_where_only_some_differ(lam):
    spec = lamina.spec("llama/7b")
    assert spec.decoder is not None
    layers = list(spec.decoder.layers)
    for i in (1, 2):
        step = layers[i].steps[1]
        layers[i] = layers[i].replace(steps=(layers[i].steps[0], step.replace(op=step.op.replace(hidden=7))))
    layers[5] = layers[5].replace(steps=layers[5].steps[:1])
    other = spec.replace(decoder=spec.decoder.replace(layers=tuple(layers)))
    rows = list(differences(spec, other))
    assert [path for path, _, _ in rows] == [
        "decoder.layers.1-2.feedforward.op.hidden",
        "decoder.layers.5.feedforward",
    ]
    assert rows[1][2] is None


def test_diff_of_a_model_with_itself_in_another_layout(lam, mistral, native):
    assert lam("diff", mistral, native, "--json").document["same"] is True
    assert "same spec" in lam("diff", mistral, mistral).out


def test_layers_lists_sixteen_kinds_and_computes_who_uses_them(lam):
    found = lam("layers", "--json").document["layers"]
    assert len(found) == len(CATALOGUE) == 16
    by_name = {one["name"]: one for one in found}
    variants = {v["name"]: v["families"] for v in by_name["multi-head"]["variants"]}
    assert "gpt2" in variants["MHA"] and "gpt2" not in variants["GQA"] and "smollm2" in variants["GQA"]
    assert "gpt2" in by_name["position"]["families"] and "llama" in by_name["rotary"]["families"]
    assert "gpt2" not in by_name["rotary"]["families"] and "gpt2" not in by_name["gated"]["families"]
    assert by_name["self-attention"]["built"]
    root = Path(lamina.__file__).parent.parent
    for one in found:
        assert one["built"] == all((root / file).exists() for file in one["files"])
        assert one["built"] or one["families"] == []


def test_layers_tells_of_one_kind(lam):
    done = lam("layers", "normalisation")
    assert "RMSNorm" in done.out and "lamina/layers/norm.py" in done.out
    lam("layers", "rotery").refused("did you mean 'rotary'")
    for one in CATALOGUE:
        text = lam("layers", one.name).out
        assert ("This version does not have it. It will be" in text) != one.built


@pytest.mark.parametrize("wide", [80, 120])
def test_layers_fits_the_terminal(lam, monkeypatch, wide):
    monkeypatch.setenv("COLUMNS", str(wide))
    for words in ([], *([one.name] for one in CATALOGUE)):
        done = lam("layers", *words)
        assert done.status == 0 and done.err == "" and done.out.isascii()
        assert max(len(line) for line in done.out.splitlines()) <= wide, done.out
    assert len(lam("layers").out.splitlines()) == 3 * 16 + 2  # three lines a kind


def test_layers_has_a_whole_page_of_each(lam):
    for one in CATALOGUE:
        text = " ".join(lam("layers", one.name).out.split())
        said = [one.title, one.what, one.why, one.cost, *one.pitfalls, one.example.about]
        said += [variant.rule for variant in one.variants] + [means for _, means in one.symbols]
        said += [part for each in one.corrections for part in (each.said, each.fact, each.source)]
        said += [source.title for source in one.sources]
        for words in [*said, one.equation, one.example.code, one.example.prints]:
            assert " ".join(words.split()) in text, (one.name, words)
        found = lam("layers", one.name, "--json").document
        assert [each["said"] for each in found["corrections"]] == [each.said for each in one.corrections]


def test_layers_runs_an_example_now(lam, monkeypatch):
    done = lam("layers", "normalisation", "--run")
    assert done.status == 0 and done.out.endswith("\n[-1.3416, -0.4472, 0.4472, 1.3416]\n")
    assert "spec.build(width=4)(x)" in done.out
    assert lam("layers", "cache", "--run", "--json").document["prints"] == "True\n80 bytes\n"
    lam("layers", "--run").refused("needs the NAME")
    monkeypatch.setattr("lamina.layers.norm.F.rms_norm", lambda x, *rest: x)
    done = lam("layers", "normalisation", "--run")
    assert done.status == 1 and "prints something else than its page says" in done.err


SPELLINGS = ["gpt4", "GPT-4", "gpt_4", "openai/gpt-4", "gpt4/175b", "gpt-4/large"]


@pytest.mark.parametrize("name", SPELLINGS)
def test_gpt4_is_said_to_be_not_public_and_given_no_number(lam, name):
    done = lam("show", name)
    assert done.status == 0 and done.err == ""
    assert "Public (arXiv:2303.08774" in done.out and "Not public, and not guessed here" in done.out
    found = lam("show", name, "--json").document
    assert found["template"] in sizes() and len(found["public"]) > 2 and len(found["not_public"]) > 2
    said = " ".join([*found["public"], *found["not_public"]])
    assert not any(letter.isdigit() for letter in said)
    for command in ("account", "verify", "convert", "generate", "diff"):
        more = {"convert": ["./out"], "generate": ["Hello"], "diff": ["gpt2/small"]}.get(command, [])
        lam(command, name, *more, "--quiet").refused(
            "architecture of GPT-4 is not public", "lamina show gpt4", found["template"]
        )
    lam("show", name, "--names", "hf").refused("not public")
    with pytest.raises(lamina.LaminaError, match="not public"):
        lamina.spec(name)


def test_the_spec_of_ones_own_that_is_shown_for_gpt4_can_be_built(lam, capsys):
    own = lam("show", "gpt4", "--json").document["own_spec"]
    capsys.readouterr()
    exec(own, {})
    assert capsys.readouterr().out.endswith(" parameters\n")


def test_other_models_that_are_not_public_are_unknown_names(lam, tmp_path, monkeypatch):
    for name in ("gpt-4o", "gpt4all", "claude", "gemini"):
        lam("show", name).refused(f"no source {name!r}")
        lam("account", name).refused(f"no source {name!r}")
    lam("show", "gpt-4o").refused("did you mean 'gpt4'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt4").mkdir()  # a directory of this name is what was meant
    lam("show", "gpt4").refused("gpt4")
    assert "not public" not in lam("show", "gpt4").err


def test_doctor_says_what_is_here(lam, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMINA_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = lam("doctor", "--json")
    found = done.document
    assert done.status == 0 and found["problems"] == []
    assert found["packages"]["torch"] and found["models"] == dict.fromkeys(PACKAGED)
    assert found["hub_offline"] is True and found["data_directory"] == str(tmp_path)
    assert "lamina fetch minilm-l6" in lam("doctor").out


def test_doctor_fails_where_something_is_broken(lam, monkeypatch):
    from lamina.cli import doctor

    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    done = lam("doctor")
    assert done.status == 1 and "no-such-package is not installed" in done.out


def test_a_page_of_a_difference(lam, mistral, tmp_path):
    path = tmp_path / "page.html"
    done = lam("diff", "llama2/7b", "llama3/8b", "--html", path, "--json")
    assert done.document["written"] == [str(path)]
    text = path.read_text(encoding="utf-8")
    assert all(f">{one['path']}<" in text for one in done.document["differences"])
    assert text.count("<tr class=") == 32 and lam("diff", mistral, mistral, "--html", path).out.strip() == str(path)
    assert "All layers are the same." in path.read_text(encoding="utf-8")
