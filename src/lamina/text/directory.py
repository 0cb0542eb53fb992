"""The tokenizer of a checkpoint directory, in whichever files it has: tokenizer.json, or the older formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamina.errors import CheckpointError
from lamina.text import legacy, sentencepiece
from lamina.text.document import Document, added, check_ids, read_json, read_text, template, vocabulary_of
from lamina.text.tokenizer import ROLES, Tokenizer, with_special

FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", *sentencepiece.NAMES, "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
UNREAD = {"tekken.json": "Mistral's tekken", "tokenizer.tiktoken": "tiktoken", "tiktoken.model": "tiktoken"}

# The special tokens that a class has where the files name none, and how it reads the older files.
GPT2 = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
QWEN2 = {"eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": "<|endoftext|>"}
ROBERTA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"}
BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
LLAMA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
GEMMA = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}
T5 = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
CLASSES: dict[str, tuple[dict[str, str], Callable[[Path, dict[str, Any], dict[str, str]], Document] | None]] = {
    "gpt2": (GPT2, legacy.gpt2),
    "gptneox": (GPT2, None),
    "codegen": (GPT2, legacy.gpt2),
    "qwen2": (QWEN2, legacy.qwen2),
    "roberta": (ROBERTA, legacy.roberta),
    "bart": (ROBERTA, legacy.roberta),
    "longformer": (ROBERTA, legacy.roberta),
    "led": (ROBERTA, legacy.roberta),
    "bert": (BERT, legacy.bert),
    "distilbert": (BERT, legacy.bert),
    "electra": (BERT, legacy.bert),
    "smiles": (BERT, legacy.smiles),
    "mpnet": (ROBERTA | {"unk": "[UNK]"}, None),
    "llama": (LLAMA, sentencepiece.llama),
    "codellama": (LLAMA, None),
    "mistral": (LLAMA, sentencepiece.llama),
    "gemma": (GEMMA, sentencepiece.gemma),
    "t5": (T5, sentencepiece.t5),
}


def from_directory(path: str | Path, rows: int | None = None) -> Tokenizer:
    """The tokenizer in a directory. `rows`: how many embeddings the model has; a token beyond them is refused."""
    path = Path(path)
    config = optional(path / "tokenizer_config.json")
    kind = class_of(path, config)
    defaults, read_older = CLASSES.get(kind, ({}, None))
    special, extras, flags = special_tokens(path, config)
    assumed = {role: token for role, token in defaults.items() if config.get(f"{role}_token", 0) is not None} | special
    if (path / "tokenizer.json").is_file():
        whole, name = read_json(path / "tokenizer.json"), "tokenizer.json"
    else:
        whole, name = older(path, config, kind, assumed, read_older)
    where = str(path / name)
    whole = with_added(whole, path, config, where)
    tokens = known(whole, where)
    special = {role: token for role, token in assumed.items() if role in special or token in tokens}
    whole = with_special(whole, [*special.values(), *extras], where, flags)
    whole = with_ends(whole, config, kind, special, where)
    model = whole.get("model")
    cleanup = (
        bool(config.get("clean_up_tokenization_spaces")) and isinstance(model, dict) and model.get("type") != "BPE"
    )
    files = [path / each for each in FILES if (path / each).is_file()]
    templates = chat_templates(path, config)
    tokenizer = Tokenizer(whole, special=special, templates=templates, name=where, files=files, cleanup=cleanup)
    if rows is not None and tokenizer.vocabulary > rows:
        beyond = sorted(token for token, number in tokenizer.tokens.items() if number >= rows)
        raise CheckpointError(
            f"{where}: {tokenizer.vocabulary:,} tokens for {rows:,} embeddings ({ascii(beyond[0])[:60]} has none);"
            " another model's tokenizer, or embeddings that were not resized"
        )
    return tokenizer


def optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def class_of(path: Path, config: dict[str, Any]) -> str:
    """ "gpt2" for GPT2TokenizerFast, from tokenizer_config.json; else the model_type in config.json."""
    name = config.get("tokenizer_class")
    if isinstance(name, str) and name not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return name.removesuffix("Fast").removesuffix("Tokenizer").lower()
    return str(optional(path / "config.json").get("model_type", "")).lower()


def special_tokens(path: Path, config: dict[str, Any]) -> tuple[dict[str, str], list[str], dict[str, Document]]:
    """Role -> token as the files state it; further special tokens; flags of tokens that stand as a dict."""
    named = optional(path / "special_tokens_map.json") | {
        key: value for key, value in config.items() if value is not None
    }

    flags: dict[str, Document] = {}

    def content(value: object, field: str) -> str:
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            flags[value["content"]] = {flag: bool(value.get(flag, False)) for flag in FLAGS}
            value = value["content"]
        if not isinstance(value, str) or not value:
            raise CheckpointError(f"{path / 'tokenizer_config.json'}: {field} is {value!r}; it is a token")
        return value

    stated = [role for role in ROLES if f"{role}_token" in named]
    special = {role: content(named[f"{role}_token"], f"{role}_token") for role in stated}
    extras = named.get("additional_special_tokens") or named.get("extra_special_tokens") or []
    extras = list(extras.values()) if isinstance(extras, dict) else extras
    if not isinstance(extras, list):
        raise CheckpointError(f"{path / 'tokenizer_config.json'}: additional_special_tokens is no list")
    return special, [content(token, "additional_special_tokens") for token in extras], flags


def older(
    path: Path, config: dict[str, Any], kind: str, special: dict[str, str], read: Callable | None
) -> tuple[Document, str]:
    found = next((name for name in ("vocab.json", "vocab.txt", *sentencepiece.NAMES) if (path / name).is_file()), None)
    if found is None:
        unread = next((f"{name} is {what}" for name, what in UNREAD.items() if (path / name).is_file()), "nothing else")
        raise CheckpointError(
            f"{path}: no tokenizer.json, vocab.json with merges.txt, vocab.txt or tokenizer.model ({unread}); "
            "transformers can write tokenizer.json: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    if read is None and not kind:  # the file alone says enough
        read = {"vocab.json": legacy.gpt2, "vocab.txt": legacy.bert}.get(found, sentencepiece.llama)
        special |= {legacy.bert: BERT, legacy.gpt2: GPT2}.get(read, LLAMA) | special
    if read is None:
        known = ", ".join(name for name, (_, reader) in CLASSES.items() if reader)
        raise CheckpointError(
            f"{path / found}: how the class {kind!r} reads it is not known, only {known}; transformers can write"
            " tokenizer.json: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return read(path / found, config, special), found


def known(whole: Document, name: str) -> set[str]:
    model = whole.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{name}: no model; this is no tokenizer.json")
    more = whole.get("added_tokens") or []
    return set(vocabulary_of(model, name)) | {str(each.get("content")) for each in more if isinstance(each, dict)}


def with_added(whole: Document, path: Path, config: dict[str, Any], name: str) -> Document:
    """With the tokens of added_tokens_decoder and added_tokens.json that the document lacks."""
    tokens: dict[int, Document] = {}
    for content, number in optional(path / "added_tokens.json").items():
        check_ids([(content, number)], 1 << 31, str(path / "added_tokens.json"))
        tokens[number] = added(content, number, special=False)
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        if not number.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise CheckpointError(f"{path / 'tokenizer_config.json'}: added_tokens_decoder[{number!r}] is no token")
        flags = {flag: bool(token.get(flag, False)) for flag in FLAGS}
        tokens[int(number)] = added(token["content"], int(number), bool(token.get("special")), **flags)
    present = list(whole.get("added_tokens") or [])
    have = {token.get("content") for token in present if isinstance(token, dict)}
    new = [token for _, token in sorted(tokens.items()) if token["content"] not in have]
    return whole | {"added_tokens": present + new} if new else whole


def with_ends(whole: Document, config: dict[str, Any], kind: str, special: dict[str, str], name: str) -> Document:
    """With the ends that add_bos_token and add_eos_token ask for, where tokenizer_config.json has either of them."""
    stated = config.get("add_bos_token") is not None or config.get("add_eos_token") is not None
    wants = {"bos": bool(config.get("add_bos_token")), "eos": bool(config.get("add_eos_token"))}
    if kind in ("llama", "mistral", "gemma") and name.endswith(".model"):
        stated, wants["bos"] = True, config.get("add_bos_token") is not False
    if not stated:
        return whole
    ids = vocabulary_of(whole["model"], name) | {each["content"]: each["id"] for each in whole["added_tokens"]}
    ends = {role: [(special[role], ids[special[role]])] if wants[role] and role in special else [] for role in wants}
    return whole | {"post_processor": template(ends["bos"], ends["eos"])}


def chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> source. A file of its own goes before the field in tokenizer_config.json."""
    stated = config.get("chat_template")
    where = path / "tokenizer_config.json"
    if (path / "chat_template.json").is_file() and stated is None:
        where = path / "chat_template.json"
        stated = read_json(where).get("chat_template")
    if isinstance(stated, str):
        stated = {"default": stated}
    if isinstance(stated, list) and all(isinstance(each, dict) for each in stated):
        stated = {each.get("name"): each.get("template") for each in stated}
    templates = stated if isinstance(stated, dict) else {}
    if stated and not (templates and all(isinstance(each, str) for each in (*templates, *templates.values()))):
        raise CheckpointError(f"{where}: chat_template is neither a text nor a list of name and template")
    if (path / "chat_template.jinja").is_file():
        templates = templates | {"default": read_text(path / "chat_template.jinja")}
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates = templates | {file.stem: read_text(file)}
    return templates
