"""A model that CTranslate2 has converted (its converters/transformers.py, undone): Whisper.

The converter keeps what a tensor holds and changes where it lies: q, k and v become one matrix, the keys of a
cross-attention and its values another, and the biases likewise, with zeros for the keys, which have none. The
configuration is dropped; it is found again in the shapes, in the single numbers of the file, and in the vocabulary
beside it. A number or a tensor that is not in the tables below is refused: it would change what the model computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lamina.errors import CheckpointError
from lamina.weights.ctranslate2 import CTranslate2File, Variable
from lamina.weights.files import read_json
from lamina.weights.mapped import show
from lamina.weights.rules import Fused, FusedBias, Rule

REVISIONS = {"WhisperSpec": 3}
SETTINGS = {
    "decoder/activation": 3,  # GELU by the error function, in the order of CTranslate2's ActivationType
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
    "decoder/alibi": 0,
    "decoder/scale_alibi": 0,
    "decoder/alibi_use_positive_positions": 0,
}
"""The only values with which a decoder is Whisper's. Where a file leaves one out it is 0, but for pre_norm."""
HEADS = ("encoder/num_heads", "decoder/num_heads")
UNUSED = ("decoder/alignment_heads", "decoder/alignment_layer")  # for the times of words
TABLE, HEAD = "decoder/embeddings/weight", "decoder/projection/weight"
ENGLISH = 51864  # tokens of the models that read English alone; others have more (openai/whisper, model.py)
LONGEST = 1 << 24  # bytes of a vocabulary


class CTranslate2Checkpoint:
    """`config`, `generation`, `entries` and `read(name)` of a model.bin; `RULES` has its names."""

    def __init__(self, path: str | Path) -> None:
        self.file = CTranslate2File(path)
        self.where = str(self.file.path)
        if self.file.spec not in REVISIONS:
            raise self.refuse(f"holds a {show(self.file.spec)}", f"lamina reads {', '.join(REVISIONS)}")
        if self.file.revision != REVISIONS[self.file.spec]:
            right = f"revision {REVISIONS[self.file.spec]} is read: convert the model again"
            raise self.refuse(f"holds a {self.file.spec} of revision {self.file.revision}", right)
        self._refuse_quantised()
        self._refuse_settings()
        called = {name: self.file.aliases.get(name, name) for name in (TABLE, HEAD)}
        tied = called[TABLE] == called[HEAD]
        unread = {*SETTINGS, *HEADS, *UNUSED, *([HEAD] if tied else [])}
        self.entries: dict[str, Variable] = {n: one for n, one in self.file.entries.items() if n not in unread}
        tokens = self._tokens()
        end, start = (self._id(tokens, name) for name in ("<|endoftext|>", "<|startoftranscript|>"))
        special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
        self.config: dict[str, Any] = {
            "model_type": "whisper",
            **self._shapes(),
            "tie_word_embeddings": tied,
            **special,
        }
        self.generation: dict[str, Any] = {**special, **self._generation(tokens)}

    def refuse(self, found: str, right: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {found}; {right}")

    def read(self, name: str) -> Tensor:
        """A tensor, of the dtype that is stored."""
        return self.file.read(name)

    def _refuse_quantised(self) -> None:
        for name, entry in self.file.entries.items():
            if entry.shape and not entry.dtype.is_floating_point:
                stored = str(entry.dtype).removeprefix("torch.")
                right = "only unquantised models are read: convert it again with --quantization float16"
                raise self.refuse(f"{show(name)} is stored as {stored}", right)

    def _refuse_settings(self) -> None:
        numbers = {name: self._number(name) for name, entry in self.file.entries.items() if not entry.shape}
        if unknown := [name for name in numbers if name not in (*SETTINGS, *HEADS, *UNUSED)]:
            raise self.refuse(f"{show(unknown[0])} is {numbers[unknown[0]]}", "lamina does not know what that changes")
        for name, right in SETTINGS.items():
            found = numbers.get(name, int(name == "decoder/pre_norm"))
            if found != right:
                raise self.refuse(f"{name} is {found}", f"it is {right} in Whisper")

    def _number(self, name: str) -> int | float:
        return self.file.read(name).item()

    def _shape(self, name: str, rank: int) -> tuple[int, ...]:
        entry = self.file.entries.get(name)
        if entry is None or len(entry.shape) != rank:
            found = "is missing" if entry is None else f"has shape {entry.shape}"
            raise self.refuse(f"{name} {found}", f"a Whisper has it, with {rank} dimensions")
        return entry.shape

    def _shapes(self) -> dict[str, Any]:
        """What config.json says of sizes."""
        vocabulary, width = self._shape(TABLE, 2)
        said: dict[str, Any] = {"vocab_size": vocabulary, "d_model": width}
        said["num_mel_bins"] = self._shape("encoder/conv1/weight", 3)[1]
        for side, rows in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
            layers = [name.split("/")[1] for name in self.entries if name.startswith(f"{side}/layer_")]
            said[f"{side}_layers"] = len({one for one in layers if one != "layer_norm"})
            said[f"{side}_ffn_dim"] = self._shape(f"{side}/layer_0/ffn/linear_0/weight", 2)[0]
            self._shape(f"{side}/num_heads", 0)
            said[f"{side}_attention_heads"] = self._number(f"{side}/num_heads")
            said[rows] = self._shape(f"{side}/position_encodings/encodings", 2)[0]
        return said

    def _tokens(self) -> list[str]:
        """The vocabulary beside the file, as the converter writes it: a list in JSON, or one token a line."""
        folder, rows = self.file.path.parent, self._shape(TABLE, 2)[0]
        path = folder / "vocabulary.json"
        try:
            if path.is_file():
                tokens = read_json(path, LONGEST, kind=list)
            else:
                path = folder / "vocabulary.txt"
                with path.open("rb") as file:
                    tokens = file.read(LONGEST).decode("utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError):
            raise CheckpointError(
                f"{path}: cannot be read; the vocabulary of {self.file.path.name} is needed"
            ) from None
        if not all(isinstance(token, str) for token in tokens):
            raise CheckpointError(f"{path}: holds a token that is no text; it is a list of texts")
        if len(tokens) != rows:
            raise CheckpointError(
                f"{path}: holds {len(tokens):,} tokens; {self.file.path.name} has {rows:,} embeddings"
            )
        return tokens

    def _id(self, tokens: list[str], token: str) -> int:
        if token not in tokens:
            raise self.refuse(f"{token} is not in the vocabulary beside it", "a Whisper begins and ends texts with it")
        return tokens.index(token)

    def _generation(self, tokens: list[str]) -> dict[str, Any]:
        """generation_config.json, of what CTranslate2's config.json says."""
        path = self.file.path.parent / "config.json"
        said = read_json(path) if path.is_file() else {}
        found: dict[str, Any] = {"is_multilingual": len(tokens) > ENGLISH}
        for name, field in (("suppress_tokens", "suppress_ids"), ("begin_suppress_tokens", "suppress_ids_begin")):
            if said.get(field):
                found[name] = said[field]
        if "<|notimestamps|>" in tokens:
            found["no_timestamps_token_id"] = tokens.index("<|notimestamps|>")
        return found


def _side(side: str) -> tuple[Rule, ...]:
    ours, theirs = f"{side}.layers.{{i}}.", f"{side}/layer_{{i}}/"
    steps = {"attention": "self_attention", "cross": "attention", "feedforward": "ffn"}
    norms = {f"{ours}{step}.pre": f"{theirs}{called}/layer_norm" for step, called in steps.items()}
    norms[f"{side}.norm"] = f"{side}/layer_norm"
    linear = {
        f"{ours}attention.op.o": f"{theirs}self_attention/linear_1",
        f"{ours}cross.op.q": f"{theirs}attention/linear_0",
        f"{ours}cross.op.o": f"{theirs}attention/linear_2",
        f"{ours}feedforward.op.up": f"{theirs}ffn/linear_0",
        f"{ours}feedforward.op.down": f"{theirs}ffn/linear_1",
    }
    own, other = f"{ours}attention.op.", f"{ours}cross.op."
    packed, both = f"{theirs}self_attention/linear_0/", f"{theirs}attention/linear_1/"
    return (
        Rule(f"{side}.position.weight", f"{side}/position_encodings/encodings"),
        *(Rule(f"{one}.{p}", f"{norm}/{q}") for one, norm in norms.items() for p, q in GAINS.items()),
        *(Rule(f"{one}.{p}", f"{called}/{p}") for one, called in linear.items() for p in ("weight", "bias")),
        Rule((f"{own}q.weight", f"{own}k.weight", f"{own}v.weight"), f"{packed}weight", Fused()),
        Rule((f"{own}q.bias", f"{own}v.bias"), f"{packed}bias", FusedBias(held=(True, False, True))),
        Rule((f"{other}k.weight", f"{other}v.weight"), f"{both}weight", Fused()),
        Rule(f"{other}v.bias", f"{both}bias", FusedBias(held=(False, True))),
    )


GAINS = {"weight": "gamma", "bias": "beta"}
RULES = (
    Rule("embedding.weight", TABLE),
    Rule("head.weight", HEAD),
    *(Rule(f"stem.convolutions.{i}.{p}", f"encoder/conv{i + 1}/{p}") for i in range(2) for p in ("weight", "bias")),
    *_side("encoder"),
    *_side("decoder"),
)
"""Our names and CTranslate2's."""
