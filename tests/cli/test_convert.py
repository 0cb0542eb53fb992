"""lamina convert: what is written, and that damaged sources are refused in one line."""

import filecmp
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import lamina
from lamina.cli import main
from lamina.errors import CheckpointError
from lamina.weights.gguf import GGUFFile
from tests import tiny


def test_there_and_back_gives_the_same_bytes(lam, mistral, tmp_path):
    there, back = tmp_path / "native", tmp_path / "hf"
    done = lam("convert", mistral, there, "--format", "native")
    assert done.status == 0
    for path in there.iterdir():
        assert str(path) in done.out
    assert (there / "spec.json").is_file()
    assert lam("convert", there, back, "-q").err == ""
    assert filecmp.cmp(mistral / "model.safetensors", back / "model.safetensors", shallow=False)
    assert lamina.spec(back) == lamina.spec(mistral)


def test_dtype_shards_and_what_json_says(lam, mistral, tmp_path):
    found = lam("convert", mistral, tmp_path / "out", "--dtype", "bfloat16", "--shard-size", "20KB", "--json").document
    assert found["dtypes"] == ["bfloat16"] and found["initialised"] == []
    assert found["parameters"] == lamina.account(mistral).parameters
    on_disk = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert {file["name"]: file["bytes"] for file in found["files"]} == on_disk
    assert found["bytes"] == sum(on_disk.values())
    assert sum(name.endswith(".safetensors") for name in on_disk) > 1
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = lamina.load(mistral, dtype="bfloat16")(ids).logits
        assert torch.equal(lamina.load(tmp_path / "out")(ids).logits, expected)


def test_what_is_there_is_replaced_only_by_force(lam, mistral, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    lam("convert", mistral, tmp_path / "out").refused(str(tmp_path / "out"), "--force")
    # Not even by force, where it is no checkpoint.
    lam("convert", mistral, tmp_path / "out", "--force", "-q").refused("not a checkpoint")
    assert (tmp_path / "out/precious").read_text() == "x"
    assert lam("convert", mistral, tmp_path / "new").status == 0
    assert lam("convert", mistral, tmp_path / "new", "--force", "--dtype", "float16").status == 0
    assert b"F16" in (tmp_path / "new/model.safetensors").read_bytes()


@pytest.mark.parametrize("size", ["5XB", "-1", "0", "GB", "1e9"])
def test_sizes_that_are_none(lam, mistral, tmp_path, size):
    lam("convert", mistral, tmp_path / "out", f"--shard-size={size}").refused("is no size", "5GB")


def test_missing_tensors_are_refused_or_listed(lam, mistral, tmp_path):
    config = json.loads((mistral / "config.json").read_text())
    config["num_hidden_layers"] = 4
    lamina.save(lamina.load(mistral), tmp_path / "cut")
    (tmp_path / "cut/config.json").write_text(json.dumps(config))
    lam("convert", tmp_path / "cut", tmp_path / "out", "-q").refused("missing tensor", "model.layers.3.")
    found = lam("convert", tmp_path / "cut", tmp_path / "out", "--allow-missing", "--json", "-q").document
    assert "decoder.layers.3.attention.op.q.weight" in found["initialised"]


def test_a_published_size_has_no_weights(lam, tmp_path):
    lam("convert", "llama/7b", tmp_path / "out", "-q").refused("published architecture", "no weights")


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "pickle": lambda data: b"\x80\x02}q\x00." + data[6:],
    "page": lambda data: b"<!DOCTYPE html><html>404</html>",
    "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "empty": lambda data: b"",
    "length": lambda data: (2**63).to_bytes(8, "little") + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["show", "account", "convert"])
def test_damaged_weights_are_named(lam, mistral, tmp_path, damage, command):
    source = tmp_path / "bad"
    source.mkdir()
    (source / "config.json").write_bytes((mistral / "config.json").read_bytes())
    (source / "model.safetensors").write_bytes(DAMAGES[damage]((mistral / "model.safetensors").read_bytes()))
    more = [tmp_path / "out", "-q"] if command == "convert" else []
    lam(command, source, *more).refused("model.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "lama"}', '{"model_type": "llama"}', "\xff"])
def test_damaged_configurations_are_named(lam, mistral, tmp_path, text):
    source = tmp_path / "bad"
    source.mkdir()
    (source / "config.json").write_bytes(text.encode("latin-1"))
    (source / "model.safetensors").write_bytes((mistral / "model.safetensors").read_bytes())
    lam("show", source).refused("config.json")


def test_a_hostile_tensor_name_stays_one_line(lam, mistral, tmp_path):
    source = tmp_path / "bad"
    source.mkdir()
    (source / "config.json").write_bytes((mistral / "config.json").read_bytes())
    header = json.dumps({"\x1b[31m\nred\u202e": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    done = lam("convert", source, tmp_path / "out", "-q")
    done.refused("missing")
    assert "\x1b" not in done.err and "\u202e" not in done.err


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_place_that_cannot_be_written(mistral, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert main(["convert", str(mistral), str(tmp_path / "closed/out"), "-q"]) == 1
    assert capsys.readouterr().err.startswith("lamina: error: ")


def test_a_full_disk_is_not_the_user_s_mistake(lam, mistral, tmp_path, monkeypatch):
    """Status 1, both numbers, and nothing is left behind or changed."""
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    done = lam("convert", mistral, tmp_path / "out", "-q")
    assert done.status == 1 and done.out == "" and done.err.count("\n") == 1
    assert "bytes are needed, and 10 are free; nothing was changed" in done.err
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob("*.partial"))


def test_weights_that_are_not_finite_are_warned_of_or_refused(lam, tmp_path):
    source = tiny.checkpoint(tmp_path / "bad")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (tmp_path / "text").write_text("the cat")
    for command, argument in (("generate", "the"), ("evaluate", tmp_path / "text")):
        lam(command, source, argument, "--strict").refused("not finite: decoder.norm.weight (1 of 32)")
    with pytest.warns(UserWarning, match="not finite: decoder.norm.weight .1 of 32"):
        lamina.load(source)
    with pytest.raises(CheckpointError, match="not finite: decoder.norm.weight .1 of 32"):
        lamina.load(source, strict=True)


def test_gguf(lam, tmp_path):
    tiny.checkpoint(tmp_path / "source")
    done = lam("convert", tmp_path / "source", tmp_path / "m.gguf", "--json").document
    assert done["format"] == "gguf" and [one["name"] for one in done["files"]] == ["m.gguf"]
    one, other = lamina.load(tmp_path / "source"), lamina.load(tmp_path / "m.gguf")
    assert one.spec.replace(initial=other.spec.initial) == other.spec
    text = "the cat <s> isn't here"
    assert lamina.tokenizer(tmp_path / "m.gguf").encode(text) == lamina.tokenizer(tmp_path / "source").encode(text)
    again = lam("convert", tmp_path / "m.gguf", tmp_path / "n.gguf", "--dtype", "q8_0", "--json").document
    assert again["dtypes"] == ["q8_0"]
    with GGUFFile(tmp_path / "m.gguf") as before, GGUFFile(tmp_path / "n.gguf") as after:
        kept = [key for key in before.metadata if key.startswith("tokenizer.")]
        assert len(kept) > 5 and all(after.metadata[key] == before.metadata[key] for key in kept)
    lam("convert", tmp_path / "source", tmp_path / "m.gguf").refused("is there already")
    lam("convert", tmp_path / "source", tmp_path / "m.gguf", "--format", "hf", "--force").refused("is a file")
