"""Tiny models and a byte-level tokenizer, made on the spot, for tests of what is done with models."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

import lamina
from lamina.families import Fields, family
from lamina.text import Tokenizer, document
from lamina.text.document import added, bpe, byte_level
from lamina.text.tokenizer import byte_letters

LLAMA = {
    "model_type": "llama",
    "vocab_size": 263,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 5}
T5 = {
    "model_type": "t5",
    "vocab_size": 263,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "eos_token_id": 257,
    "pad_token_id": 256,
    "decoder_start_token_id": 256,
}
BART = {
    "model_type": "bart",
    "vocab_size": 263,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "decoder_start_token_id": 257,
}
LED = {name: value for name, value in BART.items() if name != "max_position_embeddings"} | {
    "model_type": "led",
    "attention_window": 6,
    "max_encoder_position_embeddings": 90,
    "max_decoder_position_embeddings": 12,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 263,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 24,  # more rows than tokens, as many checkpoints have
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a cat dog sat ran on over mat hill ##s ##ing . , ! red".split()
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def spec(config: dict[str, Any]) -> lamina.ModelSpec:
    return family(config["model_type"]).spec(Fields(config))


def model(config: dict[str, Any] = LLAMA, seed: int = 0, scale: float = 6.0) -> lamina.Model:
    """A random model whose weights are large enough for its answers to depend on every token."""
    made = spec(config).build(seed=seed).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return made


@cache
def tokenizer() -> Tokenizer:
    """256 bytes, then <s>, </s>, <|start|>, <|end|> (256 to 259) and the merges " t", "he", " the" (260 to 262)."""
    letters = byte_letters()
    vocabulary = {letters[byte]: byte for byte in range(256)}
    special = ("<s>", "</s>", "<|start|>", "<|end|>")
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    vocabulary |= {a + b: 260 + i for i, (a, b) in enumerate(merges)}
    tokens = [added(content, 256 + i) for i, content in enumerate(special)]
    whole = document.document(
        bpe(vocabulary | {content: 256 + i for i, content in enumerate(special)}, merges),
        added_tokens=tokens,
        pre_tokenizer=byte_level(),
        decoder=byte_level(),
    )
    roles = {"bos": "<s>", "eos": "</s>"}
    return Tokenizer(whole, special=roles, templates={"default": CHATML}, name="tiny")


@cache
def words() -> Tokenizer:
    """WordPiece over a few words, as BERT has it."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocabulary}
    whole = document.document(
        model | {"max_input_chars_per_word": 100},
        added_tokens=[added(content, i) for i, content in enumerate(WORDS[:5])],
        normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
        | {"strip_accents": None},
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=document.template([("[CLS]", 2)], [("[SEP]", 3)]),
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )
    roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return Tokenizer(whole, special=roles, name="words")


def checkpoint(directory: Path, config: dict[str, Any] = LLAMA, seed: int = 0) -> Path:
    """The tiny model and its tokenizer as a directory in the Hugging Face layout."""
    lamina.save(model(config, seed), directory)
    (words() if config["model_type"] == "bert" else tokenizer()).save(directory)
    return directory
