"""lamina.families.ctranslate2: a tiny random Whisper, converted the way CTranslate2 converts, comes back as it was."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lamina
from lamina.errors import CheckpointError, LaminaError
from lamina.families.ctranslate2 import RULES
from lamina.weights.rules import FusedBias, bind
from tests.weights.test_ctranslate2 import text, variable

ROWS = 60
TOKENS = [f"t{i}" for i in range(ROWS)]
TOKENS[50], TOKENS[51], TOKENS[55] = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
CONFIG = {
    "vocab_size": ROWS,
    "num_mel_bins": 7,
    "d_model": 36,
    "encoder_layers": 3,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 50,
    "decoder_layers": 2,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 30,
    "max_source_positions": 11,
    "max_target_positions": 40,
    "init_std": 0.3,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 50),
    "decoder_start_token_id": 51,
}
NUMBERS = {
    "decoder/activation": (1, 3),
    "decoder/alibi": (1, 0),
    "decoder/pre_norm": (1, 1),
    "decoder/scale_embeddings": (1, 0),
    "decoder/start_from_zero_embedding": (1, 0),
    "decoder/alignment_heads": (2, 1),
    "decoder/alignment_layer": (2, -1),
    "encoder/num_heads": (2, 3),
    "decoder/num_heads": (2, 6),
}
KINDS = {torch.float32: 0, torch.int8: 1, torch.float16: 4, torch.bfloat16: 5}


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(3)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


def converted(model: Any) -> dict[str, Tensor]:
    """What the converter makes of the tensors: python/ctranslate2/converters/transformers.py, `WhisperLoader`."""
    state, found = model.model.state_dict(), {}

    def linear(name: str, *sources: str) -> None:
        found[f"{name}/weight"] = torch.cat([state[f"{one}.weight"] for one in sources])
        biases = [state.get(f"{one}.bias", torch.zeros(len(state[f"{one}.weight"]))) for one in sources]
        found[f"{name}/bias"] = torch.cat(biases)

    def norm(name: str, source: str) -> None:
        found[f"{name}/gamma"], found[f"{name}/beta"] = state[f"{source}.weight"], state[f"{source}.bias"]

    for side, count in (("encoder", CONFIG["encoder_layers"]), ("decoder", CONFIG["decoder_layers"])):
        for i in range(count):
            here, there = f"{side}/layer_{i}", f"{side}.layers.{i}"
            linear(f"{here}/self_attention/linear_0", *(f"{there}.self_attn.{p}_proj" for p in "qkv"))
            linear(f"{here}/self_attention/linear_1", f"{there}.self_attn.out_proj")
            norm(f"{here}/self_attention/layer_norm", f"{there}.self_attn_layer_norm")
            if side == "decoder":
                linear(f"{here}/attention/linear_0", f"{there}.encoder_attn.q_proj")
                linear(f"{here}/attention/linear_1", *(f"{there}.encoder_attn.{p}_proj" for p in "kv"))
                linear(f"{here}/attention/linear_2", f"{there}.encoder_attn.out_proj")
                norm(f"{here}/attention/layer_norm", f"{there}.encoder_attn_layer_norm")
            linear(f"{here}/ffn/linear_0", f"{there}.fc1")
            linear(f"{here}/ffn/linear_1", f"{there}.fc2")
            norm(f"{here}/ffn/layer_norm", f"{there}.final_layer_norm")
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
    for one in ("conv1", "conv2"):
        linear(f"encoder/{one}", f"encoder.{one}")
    found["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    found["decoder/projection/weight"] = model.proj_out.weight.detach()
    return found


def write(
    folder: Path,
    tensors: dict[str, Tensor],
    numbers: dict[str, tuple[int, int]] | None = None,
    *,
    spec: str = "WhisperSpec",
    revision: int = 3,
    tokens: list[str] | None = None,
) -> Path:
    """A converted model; equal tensors are stored once, as the converter does."""
    variables, aliases, seen = [], [], dict[tuple, str]()
    for name, tensor in sorted(tensors.items()):
        data = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        key = (tuple(tensor.shape), data)
        if key in seen:
            aliases.append((name, seen[key]))
            continue
        seen[key] = name
        variables.append(variable(name, tuple(tensor.shape), KINDS[tensor.dtype], data))
    for name, (size, value) in (NUMBERS if numbers is None else numbers).items():
        variables.append(variable(name, (), size, value.to_bytes(size, "little", signed=True)))
    head = struct.pack("<I", 6) + text(spec) + struct.pack("<II", revision, len(variables)) + b"".join(variables)
    ends = struct.pack("<I", len(aliases)) + b"".join(text(one) + text(other) for one, other in aliases)
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(head + ends)
    (folder / "vocabulary.json").write_text(json.dumps(TOKENS if tokens is None else tokens))
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [3, 4], "suppress_ids_begin": [7], "lang_ids": []}))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_tensor_and_every_size_comes_back(theirs: Any, tmp_path: Path, dtype: torch.dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in converted(theirs).items()}
    directory = write(tmp_path / "model", tensors)
    model = lamina.load(directory)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    theirs.save_pretrained(tmp_path / "theirs")
    assert model.spec == lamina.spec(directory / "model.bin")
    whole = lamina.spec(tmp_path / "theirs")  # whose init_std the converter has no place for
    assert model.spec == whole.replace(initial=model.spec.initial)
    reference = lamina.load(tmp_path / "theirs").to(dtype)
    for (name, one), (other, parameter) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert name == other and torch.equal(one, parameter)
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == len(list(model.parameters()))
    if dtype == torch.float32:
        features, ids = torch.randn(2, 7, 22), torch.randint(ROWS, (2, 9))
        ours, expected = (one(input_features=features, decoder_input_ids=ids).logits for one in (model, theirs))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert lamina.load(directory, dtype="float64").head is not None


def test_what_the_converter_dropped_is_found_again(theirs: Any, tmp_path: Path):
    (tmp_path / "words").mkdir()
    directory = write(tmp_path / "words", converted(theirs))
    (directory / "vocabulary.json").unlink()
    (directory / "vocabulary.txt").write_text("\n".join(TOKENS) + "\n")  # as older converters write it
    model = lamina.load(directory / "model.bin")
    special = model.spec.special
    assert (special.start, special.end, special.pad, special.decoder_start) == (50, (50,), 50, 51)
    assert model.origin.generation == {
        **{f"{name}_token_id": 50 for name in ("bos", "eos", "pad")},
        "decoder_start_token_id": 51,
        "is_multilingual": False,
        "suppress_tokens": [3, 4],
        "begin_suppress_tokens": [7],
        "no_timestamps_token_id": 55,
    }
    (directory / "config.json").unlink()
    assert "suppress_tokens" not in lamina.load(directory).origin.generation


def test_it_is_saved_for_transformers(theirs: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    directory = write(tmp_path / "model", converted(theirs))
    (directory / "tokenizer.json").write_text("{}")
    lamina.save(lamina.load(directory), tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    again = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert not recwarn.list
    assert again.generation_config.suppress_tokens == [3, 4] and again.generation_config.no_timestamps_token_id == 55
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert lamina.spec(tmp_path / "saved") == lamina.spec(directory)


def test_a_repository_of_the_hub_that_holds_one(theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = write(tmp_path / "model", converted(theirs))
    asked: list[Any] = []

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, "model.bin" in allow_patterns))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for source in ("hf:owner/name@v1", "owner/name@v1"):
        assert lamina.spec(source) == lamina.spec(directory)
    assert asked == [("owner/name", "v1", True)] * 2


def test_other_layouts_go_before_it(theirs: Any, tmp_path: Path):
    directory = write(tmp_path / "model", converted(theirs))
    theirs.save_pretrained(directory)
    assert lamina.load(directory).origin.located.kind == "directory"
    assert lamina.load(directory / "model.bin").origin.located.kind == "ctranslate2"


def test_a_head_of_its_own(theirs: Any, tmp_path: Path):
    tensors = converted(theirs)
    tensors["decoder/projection/weight"] = tensors["decoder/projection/weight"] + 1
    model = lamina.load(write(tmp_path / "model", tensors))
    assert model.head is not None and not model.spec.head.tied
    assert torch.equal(model.head.weight, tensors["decoder/projection/weight"])


def test_the_rules_can_be_undone(theirs: Any, tmp_path: Path):
    """Loading, then saving by the same table, gives back the tensors of the file."""
    tensors = converted(theirs)
    model = lamina.load(write(tmp_path / "model", tensors))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    written = {}
    for move in bind(RULES, {name: tuple(tensor.shape) for name, tensor in parameters.items()}):
        written |= zip(move.theirs, move.op.save([parameters[name] for name in move.ours]), strict=True)
    assert written.keys() == tensors.keys() - {"decoder/projection/weight"}
    assert all(torch.equal(written[name], tensors[name]) for name in written)
    two = FusedBias(held=(True, False))
    assert two.save([torch.ones(2)])[0].tolist() == [1, 1, 0, 0]


def changed(**said: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    """A change of what is written: `NAME=None` takes a tensor or a number away, a value puts another there."""

    def change(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        told |= said

    return change


def key_bias(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    tensors["encoder/layer_1/self_attention/linear_0/bias"][36] = 1.0


def cross_key_bias(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    tensors["decoder/layer_1/attention/linear_1/bias"][35] = 1.0


def quantised(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    tensors["decoder/layer_0/ffn/linear_0/weight"] = torch.ones(30, 36, dtype=torch.int8)


def without(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, told: tensors.__delitem__(name)


def with_tensor(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, told: tensors.update({name: torch.full(shape, 2.0)})


def number(name: str, value: int, size: int = 1) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, told: told.update(numbers=NUMBERS | {name: (size, value)})


def no_number(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, told: told.update(numbers={n: v for n, v in NUMBERS.items() if n != name})


WRONG = {
    "another model": (changed(spec="TransformerSpec"), "holds a 'TransformerSpec'; lamina reads WhisperSpec"),
    "an older one": (changed(revision=2), "holds a WhisperSpec of revision 2; revision 3 is read"),
    "int8": (quantised, "'decoder/layer_0/ffn/linear_0/weight' is stored as int8; only unquantised"),
    "another activation": (number("decoder/activation", 1), "decoder/activation is 1; it is 3 in Whisper"),
    "no activation": (no_number("decoder/activation"), "decoder/activation is 0; it is 3 in Whisper"),
    "post-norm": (number("decoder/pre_norm", 0), "decoder/pre_norm is 0; it is 1"),
    "ALiBi": (number("decoder/alibi", 1), "decoder/alibi is 1; it is 0"),
    "scaled": (number("decoder/scale_embeddings", 1), "decoder/scale_embeddings is 1; it is 0"),
    "zeros first": (number("decoder/start_from_zero_embedding", 1), "start_from_zero_embedding is 1"),
    "unknown": (number("decoder/sliding_window", 64), "'decoder/sliding_window' is 64; lamina does not know"),
    "no heads": (no_number("encoder/num_heads"), "encoder/num_heads is missing"),
    "heads": (number("decoder/num_heads", -2, 2), "decoder_attention_heads is -2"),
    "uneven heads": (number("decoder/num_heads", 7, 2), "not a multiple of decoder_attention_heads=7"),
    "no table": (without("decoder/embeddings/weight"), "decoder/embeddings/weight is missing"),
    "flat stem": (with_tensor("encoder/conv1/weight", (36, 21)), r"conv1/weight has shape \(36, 21\); .* 3 dim"),
    "missing": (without("decoder/layer_1/ffn/linear_1/bias"), "1 missing tensor: decoder/layer_1/ffn/linear_1/bias"),
    "no first layer": (without("encoder/layer_0/ffn/linear_0/weight"), "layer_0/ffn/linear_0/weight is missing"),
    "unexpected": (with_tensor("decoder/layernorm_embedding/gamma", (36,)), "1 unexpected tensor: decoder/layernorm"),
    "shape": (with_tensor("encoder/layer_0/ffn/linear_1/bias", (35,)), r"linear_1/bias has shape \[35\]"),
    "key bias": (key_bias, "model.bin: encoder/layer_1/self_attention/linear_0/bias: part 2 of 3 is not zero"),
    "cross key bias": (cross_key_bias, "decoder/layer_1/attention/linear_1/bias: part 1 of 2 is not zero"),
    "vocabulary": (changed(tokens=TOKENS[:-1]), "vocabulary.json: holds 59 tokens; model.bin has 60 embeddings"),
    "not words": (changed(tokens=[*TOKENS[:-1], 3]), "vocabulary.json: holds a token that is no text"),
    "not a list": (changed(tokens={}), "vocabulary.json: must hold a JSON list"),
    "no end": (changed(tokens=["x"] * ROWS), r"<\|endoftext\|> is not in the vocabulary"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_would_change_the_numbers_is_refused(theirs: Any, tmp_path: Path, case: str):
    change, message = WRONG[case]
    tensors, told = converted(theirs), dict[str, Any]()
    change(tensors, told)
    with pytest.raises(CheckpointError, match=message) as caught:
        lamina.load(write(tmp_path / "model", tensors, **told))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_files_beside_it(theirs: Any, tmp_path: Path):
    directory = write(tmp_path / "model", converted(theirs))
    (directory / "vocabulary.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"vocabulary\.txt: cannot be read; the vocabulary of model\.bin is needed"
    ):
        lamina.load(directory)
    (directory / "vocabulary.txt").write_bytes(b"\xff\n")
    with pytest.raises(CheckpointError, match=r"vocabulary\.txt: cannot be read"):
        lamina.load(directory)
    (directory / "model.bin").write_bytes(b"\x80\2}q\0.")  # a pickle under that name is none of ours
    with pytest.raises(CheckpointError, match=r"holds its weights as pickles only \('model\.bin'\)"):
        lamina.load(directory)
    with pytest.raises(LaminaError, match="a file of another kind; .* a model.bin of CTranslate2"):
        lamina.load(directory / "model.bin")


@pytest.mark.skipif(
    importlib.util.find_spec("ctranslate2") is None, reason="pip install ctranslate2: the converter itself"
)
@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_files_of_the_converter_itself(theirs: Any, tmp_path: Path, dtype: str):
    from ctranslate2.converters import transformers as converters  # pyright: ignore[reportMissingImports]

    spec = converters._MODEL_LOADERS["WhisperConfig"].get_model_spec(theirs)
    spec.register_vocabulary(TOKENS)
    spec.validate()
    spec.optimize(quantization=None if dtype == "float32" else dtype)
    (tmp_path / "model").mkdir()
    spec.save(str(tmp_path / "model"))
    model = lamina.load(tmp_path / "model", dtype="float32")
    features, ids = torch.randn(2, 7, 22), torch.randint(ROWS, (2, 9))
    ours, expected = (one(input_features=features, decoder_input_ids=ids).logits for one in (model, theirs))
    error = 1e-5 if dtype == "float32" else 0.05
    torch.testing.assert_close(ours, expected, rtol=error, atol=error)
