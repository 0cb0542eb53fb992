"""GGUF files that are written: gguf's own reader, transformers' and ours find in them what went in."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import lamina
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.exporting import write_gguf
from lamina.text import Tokenizer, document, from_gguf
from lamina.text.document import added, bpe, byte_level
from lamina.text.gguf_writing import PROBE, to_gguf
from lamina.text.pretokenizers import QWEN2, split
from lamina.weights.gguf_blocks import pack
from lamina.weights.gguf_writing import Stored, header_bytes
from lamina.weights.gguf_writing import write_gguf as write
from tests import tiny

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6},
    "llama with biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama 3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}, "head_dim": 12},
    "mistral": {"model_type": "mistral", "sliding_window": 5, "rope_theta": 5000.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "qwen2": {
        "model_type": "qwen2",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 128},  # transformers' loader leaves out any other size
}


def made(case: str, dtype: torch.dtype = torch.float32) -> lamina.Model:
    model = tiny.model(tiny.LLAMA | CASES[case], scale=4.0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.2)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_comes_back_to_the_bit(case: str, dtype: torch.dtype, tmp_path: Path):
    model = made(case, dtype)
    lamina.save(model, tmp_path / "m.gguf", "gguf")
    again = lamina.load(tmp_path / "m.gguf", dtype=dtype)
    assert again.spec.replace(initial=model.spec.initial) == model.spec
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_same_model(case: str, tmp_path: Path):
    """Whose loader is its own, and knows nothing of biases in a LLaMA, of windows, and of scaled phases."""
    model = made(case)
    write_gguf(model, tmp_path / "m.gguf")
    state = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {tensor.name: tensor.tensor_type.name for tensor in state.tensors}["blk.0.attn_q.weight"] == "F32"
    if case not in ("llama", "qwen3"):
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    ids = torch.arange(20)[None]
    expected = model(ids).logits
    assert (theirs(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rows_lie_pair_by_pair(tmp_path: Path):
    """By hand: 6 rows a head are 0 3 1 4 2 5 in the file."""
    model = made("llama")
    write_gguf(model, tmp_path / "m.gguf")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    ours = model.decoder.layers[1].attention.op  # pyright: ignore
    for name, weight, heads in (("attn_q", ours.q.weight, 8), ("attn_k", ours.k.weight, 2)):
        rows = [head * 6 + row for head in range(heads) for row in (0, 3, 1, 4, 2, 5)]
        assert np.array_equal(stored[f"blk.1.{name}.weight"], weight.detach().numpy()[rows])
    assert np.array_equal(stored["blk.1.attn_v.weight"], ours.v.weight.detach().numpy())


def test_the_header_byte_by_byte():
    metadata = {"a": 7, "b": 0.5, "c": True, "d": "é", "e": ["x", "yz"], "f": [1, -2], "g": [0.25]}
    data = header_bytes(metadata, {"t": Stored((3, 5), "F16"), "u": Stored((32,), "Q8_0")})
    at = 0

    def take(pattern: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + pattern, data, at)
        at += struct.calcsize("<" + pattern)
        return values[0] if len(values) == 1 else values

    def text() -> str:
        return take(f"{take('Q')}s").decode()

    assert (take("4s"), take("I"), take("Q"), take("Q")) == (b"GGUF", 3, 2, 7)
    assert (text(), take("I"), take("I")) == ("a", 4, 7) and (text(), take("I"), take("f")) == ("b", 6, 0.5)
    assert (text(), take("I"), take("B")) == ("c", 7, 1) and (text(), take("I"), text()) == ("d", 8, "é")
    assert (text(), take("I"), take("I"), take("Q"), text(), text()) == ("e", 9, 8, 2, "x", "yz")
    assert (text(), take("I"), take("I"), take("Q"), take("2i")) == ("f", 9, 5, 2, (1, -2))
    assert (text(), take("I"), take("I"), take("Q"), take("f")) == ("g", 9, 6, 1, 0.25)
    assert (text(), take("I"), take("2Q"), take("I"), take("Q")) == ("t", 2, (5, 3), 1, 0)
    assert (text(), take("I"), take("Q"), take("I"), take("Q")) == ("u", 1, 32, 8, 32)
    assert len(data) % 32 == 0 and set(data[at:]) <= {0} and len(data) - at < 32


@pytest.mark.parametrize("seed", range(3))
def test_q8_0_is_that_of_gguf(seed: int):
    weights = torch.randn(7, 96, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 1)
    weights[0], weights[1, :32], weights[2, 0] = 0, 127.0, 1e-6
    weights[3, :32] = torch.arange(32) * 0.5  # halves: away from zero
    weights[3, 31] = 127.0
    expected = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType.Q8_0)
    packed = pack(weights, "Q8_0")
    assert packed is not None and np.array_equal(packed.numpy().reshape(7, -1), expected)


def test_a_model_of_q8_0(tmp_path: Path):
    model = made("llama")
    write_gguf(model, tmp_path / "m.gguf", "Q8_0")
    again = lamina.load(tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 48, which are not whole blocks
    for name, parameter in model.named_parameters():
        far = (again.get_parameter(name) - parameter).abs().max()
        assert far <= parameter.abs().max() / 250, name


def test_tokenizers_give_the_same_ids():
    letters = tiny.tokenizer()
    pieces = document.document(
        bpe(
            {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
            | {token: 259 + i for i, token in enumerate("▁ t h e a th the ▁the ha".split())},
            [("t", "h"), ("th", "e"), ("▁", "the"), ("h", "a")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        ),
        added_tokens=[added(one, i) for i, one in enumerate(("<unk>", "<s>", "</s>"))],
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        post_processor=document.template([("<s>", 1)], []),
        decoder={"type": "ByteFallback"},
    )
    roles = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    for words, kind in ((letters, "gpt2"), (Tokenizer(pieces, special=roles), "llama")):
        said = to_gguf(words, words.vocabulary + 3)
        assert said["tokenizer.ggml.model"] == kind and len(said["tokenizer.ggml.tokens"]) == words.vocabulary + 3  # pyright: ignore
        again = from_gguf(said)  # pyright: ignore
        for text in (PROBE, "the hat", " the  the\n", "<s>the</s>"):
            for how in ({}, {"special": False}, {"control": False}):
                assert again.encode(text, **how) == words.encode(text, **how)
        assert (again.bos, again.eos) == (words.bos, words.eos)
        assert {key: one.source for key, one in again.templates.items()} == {
            key: one.source for key, one in words.templates.items()
        }


def test_how_words_are_cut_is_found_by_what_it_does():
    """Merges of two digits and of a sign with a line end: Qwen's pattern keeps the first apart, and not the second."""
    vocabulary = json.loads(tiny.tokenizer().backend.to_str())["model"]["vocab"]
    cut = document.document(
        bpe(vocabulary | {"12": 263, "{č": 264}, [("1", "2"), ("{", "č")]),
        pre_tokenizer=document.sequence("pretokenizers", [split(QWEN2), byte_level(use_regex=False)]),
        decoder=byte_level(),
    )
    words = Tokenizer(cut, special={})
    assert to_gguf(words, 300)["tokenizer.ggml.pre"] == "qwen2"
    odd = document.document(
        bpe(vocabulary | {"ox": 263}, [("o", "x")]),
        pre_tokenizer=document.sequence("pretokenizers", [split("o"), byte_level(use_regex=False)]),
        decoder=byte_level(),
    )
    with pytest.raises(UnsupportedError, match="cuts texts in a way that llama.cpp has no name for"):
        to_gguf(Tokenizer(odd, special={}), 300)


def test_what_a_file_cannot_say_is_refused_and_leaves_nothing(tmp_path: Path):
    out = tmp_path / "m.gguf"
    with pytest.raises(UnsupportedError, match="a GGUF file here says llama, qwen2, qwen3, mistral, and"):
        write_gguf(tiny.model(tiny.GPT2), out)
    mixed = made("llama").spec
    first, second = mixed.decoder.layers  # pyright: ignore
    narrow = second.replace(steps=(second.steps[0], second.steps[1].replace(op=second.steps[1].op.replace(hidden=20))))
    spec = mixed.replace(decoder=mixed.decoder.replace(layers=(first, narrow)))  # pyright: ignore
    with pytest.raises(UnsupportedError, match=r"decoder\.layers\.1\.steps\.1\.op\.hidden is 20"):
        write_gguf(spec.build(), out)
    scaled = tiny.LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0, "original_max_position_embeddings": 32}}
    with pytest.raises(UnsupportedError, match="a GGUF file cannot say this model: rope_freqs.weight holds"):
        write_gguf(tiny.model(scaled | {"head_dim": 12}), out)
    with pytest.raises(UnsupportedError, match="longrope|rope_type is dynamic"):
        write_gguf(tiny.model(tiny.LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}), out)
    with pytest.raises(UnsupportedError, match="op.dropout is 0.1, and a GGUF file of this model would say 0.0"):
        write_gguf(tiny.model(tiny.LLAMA | {"attention_dropout": 0.1}), out)
    with pytest.raises(LaminaError, match="unknown type of GGUF 'Q9'"):
        write_gguf(made("llama"), out, "Q9")
    large = made("llama")
    with torch.no_grad():
        large.embedding.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="token_embd.weight.*F16 cannot hold"):
        write_gguf(large, out, "F16")
    with pytest.raises(UnsupportedError, match="type WordPiece"):
        to_gguf(tiny.words(), 100)
    with pytest.raises(CheckpointError, match="263 tokens for a model of 200"):
        to_gguf(tiny.tokenizer(), 200)
    with pytest.raises(CheckpointError, match=r"was to be written as \[2\], and is \[3\]"):
        write(out, {}, {"t": Stored((2,), "F32")}, lambda name: torch.zeros(3))
    assert list(tmp_path.iterdir()) == []
    out.write_bytes(b"old")
    with pytest.raises(LaminaError, match="is there already"):
        write_gguf(made("llama"), out)
    assert out.read_bytes() == b"old"
