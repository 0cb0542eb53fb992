"""Real weights: what the packaged models must say. Skipped, with the reason, where they have not been fetched."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.families.gguf import GGUFCheckpoint
from lamina.generation import Writing
from lamina.packaged import packaged_path

SENTENCES = [
    "A man is playing a guitar on stage.",
    "Someone performs music with a guitar.",
    "The stock market fell sharply today.",
]


def fetched(name: str) -> Path:
    path = packaged_path(name)
    if path is None:
        pytest.skip(f"{name} is not here: lamina fetch {name}")
    return path


@pytest.fixture(scope="module")
def smollm2() -> tuple[lamina.Model, Any]:
    fetched("smollm2-135m")
    return lamina.load("smollm2-135m"), lamina.tokenizer("smollm2-135m")


def test_smollm2_knows_paris(smollm2):
    model, tokenizer = smollm2
    prompt = tokenizer.encode("The capital of France is")
    ids = lamina.generate(model, torch.tensor([prompt]), max_new_tokens=20)[0, len(prompt) :].tolist()
    assert tokenizer.decode(ids).startswith(" Paris.")
    # Greedy, in float32, by transformers from the same file.
    assert ids == [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216]


def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.chat_ids([{"role": "user", "content": "What is the capital of France?"}])
    writing = Writing(model, tokenizer, ids, max_new_tokens=20)
    assert "".join(writing) == "The capital of France is Paris." and writing.finish_reason == "stop"


@pytest.mark.slow
def test_smollm2_is_read_as_transformers_reads_it(smollm2):
    """Logits, and what both make of the file: every tensor to the bit, and the configuration."""
    transformers = pytest.importorskip("transformers")
    for needed in ("accelerate", "gguf"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"transformers reads GGUF files with {needed}, which is not installed")
    path = fetched("smollm2-135m")
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris. The quick brown fox jumps over 13 dogs.")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
    with torch.no_grad():
        assert (model(ids).logits - theirs(ids).logits).abs().max() <= 1e-4  # of logits up to 32
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(torch.Size(s).numel() for s in ours.values()) == sum(p.numel() for p in theirs.parameters())
    expected = {name: weight for name, weight in theirs.state_dict().items() if name != "lm_head.weight"}
    with GGUFCheckpoint(path) as checkpoint:
        assert checkpoint.entries.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(checkpoint.read(name), weight), name
        assert checkpoint.config["rms_norm_eps"] == 1e-5
        assert checkpoint.config["tie_word_embeddings"] is True
        again = transformers.LlamaConfig(**checkpoint.config)
        assert again.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}


@pytest.mark.slow
def test_smollm2_passes_verify(smollm2):
    report = lamina.verify(smollm2[0])
    assert report.passed, str(report)


def test_minilm_ranks_as_published():
    fetched("minilm-l6")
    vectors = lamina.embed(lamina.load("minilm-l6"), SENTENCES, lamina.tokenizer("minilm-l6"))
    alike = vectors @ vectors.T
    expected = (0.6861, -0.0830, -0.0524)
    assert (alike[0, 1].item(), alike[0, 2].item(), alike[1, 2].item()) == pytest.approx(expected, abs=6e-5)


def test_minilm_equals_transformers():
    transformers = pytest.importorskip("transformers")
    directory = fetched("minilm-l6")
    ours = lamina.embed(lamina.load("minilm-l6"), SENTENCES, lamina.tokenizer("minilm-l6"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"][:, :, None].float()
    theirs = torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
    assert torch.allclose(ours, theirs, atol=1e-5)


REACTION = (  # of the README of the package: a thiol takes the place of a fluorine
    "C C ( C ) S . C N ( C ) C = O . F c 1 c c c n c 1 F . O = C ( [O-] ) [O-] . [K+] . [K+] >>"
    " C C ( C ) S c 1 n c c c c 1 F"
).split()


def test_rxnmapper_fills_a_reaction():
    """53 of 54 tokens, each masked in turn: a chlorine would do in place of one of the two fluorines."""
    transformers = pytest.importorskip("transformers")
    directory = fetched("rxnmapper-albert")
    model, tokenizer = lamina.load("rxnmapper-albert"), lamina.tokenizer("rxnmapper-albert")
    ids = torch.tensor([tokenizer.encode("".join(REACTION))])
    assert tokenizer.decode(ids[0].tolist()) == "".join(REACTION) and ids.shape == (1, 56)
    assert ids[0, 1:-1].tolist() == [tokenizer.tokens[token] for token in REACTION]
    places = torch.arange(54)
    masked = ids.repeat(54, 1)
    masked[places, places + 1] = tokenizer.mask
    theirs = transformers.AlbertForMaskedLM.from_pretrained(directory).eval()
    with torch.no_grad():
        logits, expected = model(masked).logits, theirs(masked).logits
    assert torch.allclose(logits, expected, atol=1e-5 * float(expected.abs().max()))
    filled, real = logits[places, places + 1].argmax(dim=1), ids[0, 1:-1]
    assert torch.equal(filled, expected[places, places + 1].argmax(dim=1))
    assert (filled != real).nonzero().flatten().tolist() == [25]  # of 54
    assert (REACTION[25], int(filled[25])) == ("F", tokenizer.tokens["Cl"])


def test_the_demo(tmp_path, capsys, monkeypatch):
    for name in ("smollm2-135m", "minilm-l6"):
        fetched(name)
    path = Path(__file__).parent.parent / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    demo = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["demo.py", str(tmp_path / "report.html")])
    spec.loader.exec_module(demo)
    demo.main()
    out = capsys.readouterr().out
    for said in ("134,515,008", "The capital of France is Paris.", "0.6861", "tokens/s"):
        assert said in out
    page = (tmp_path / "report.html").read_text()
    assert "134,515,008" in page and 'id="map"' in page and "0.6861" in page
