"""How byte-level vocabularies cut a text into words before merging: by the names of GGUF's `tokenizer.ggml.pre`.

Which name means which pattern is llama.cpp's table (llama-vocab.cpp); the patterns are those of the models'
tokenizer.json. Patterns are applied one after the other, each to the pieces that the one before left. A name that is
not here is refused: a wrong guess changes the ids of numbers, of line ends or of code, and nothing tells.
"""

from __future__ import annotations

from typing import NamedTuple

from lamina.text.document import Document

DIGIT, THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{LINES}"
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
QWEN35 = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{LINES}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LINES}"
TEKKEN = rf"{CASED % ('', '')}|\p{{N}}|{SIGNS}"
GPT4O = rf"{CASED % (ENGLISH + '?', ENGLISH + '?')}|\p{{N}}{{1,3}}|{SIGNS}"
PUNCTUATED = r" ?[^(\s|.,!?…。，、।۔،)]+"
FALCON = r"[\p{P}\$\+<=>\^~\|`]+"
CJK = r"[一-龥\x{3040}-ゟ゠-ヿ]+"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES}"
)
HANGUL_AND_HAN = r"[一-龥ࠀ-一가-\x{D7FF}]+"
# Letters that have an upper and a lower case, as far as DeepSeek's list of ranges names them.
DEEPSEEK_LETTERS = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
DEEPSEEK_SIGNS = r"\s?[!-/:-~！-／：-～‘-‟\x{3000}-。]+"
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
SEED = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{LINES}"


class Pre(NamedTuple):
    """One row of the table."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False  # where the file does not say


TABLE: dict[str, Pre] = {}
for names, row in {
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert exaone4 mpt olmo jais"
    " trillion granite-docling jina-v1-en jina-v2-code roberta-bpe": Pre((GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Pre((DIGIT, GPT2)),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Pre((LLAMA3,), True, True),
    "dbrx smaug-bpe glm4 chatglm-bpe": Pre((LLAMA3,)),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2": Pre((QWEN2,)),
    "qwen35": Pre((QWEN35,)),
    "tekken": Pre((TEKKEN,), True, True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Pre((GPT4O,)),
    "deepseek-llm": Pre((r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_SIGNS, r"\s+$", HANGUL_AND_HAN, r"\p{N}+")),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HANGUL_AND_HAN, DIGIT)),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Pre((THREE_DIGITS, CJK, DEEPSEEK3)),
    "falcon": Pre((FALCON, GPT2, r"[0-9][0-9][0-9]")),
    "bloom poro-chat gpt3-finnish": Pre((PUNCTUATED,)),
    "viking": Pre((PUNCTUATED, DIGIT)),
    "bailingmoe bailingmoe2 llada-moe": Pre((BAILING,)),
    "seed-coder": Pre((SEED,)),
}.items():
    TABLE |= dict.fromkeys(names.split(), row)


def split(pattern: str) -> Document:
    """Matches and what lies between them, each a piece of its own."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
