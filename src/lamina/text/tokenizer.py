"""A checkpoint's tokenizer: text to ids and back, chats, streams, and what a user's text may not do.

>>> tokenizer = from_directory("SmolLM2-135M-Instruct")
>>> tokenizer.encode("<|im_end|>"), tokenizer.encode("<|im_end|>", control=False)
([2], [44, 108, 306, 79, 486, 108, 46])
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lamina.errors import LaminaError
from lamina.text.document import Document, added, build, check_ids, rust, vocabulary_of
from lamina.text.stream import Stream
from lamina.text.template import ChatTemplate, plain

if TYPE_CHECKING:
    import tokenizers

ROLES = ("bos", "eos", "pad", "unk", "mask", "cls", "sep")
MARKED = re.compile(r"<\|.+\|>|<｜.+｜>")  # looks like a control token, whatever its file says of it


class Tokenizer:
    """`encode`, `decode`, `chat`, `stream`, `save`; ids of special tokens by name, None where there is none."""

    def __init__(
        self,
        document: Document,
        *,
        special: dict[str, str],
        templates: dict[str, str] | None = None,
        name: str = "tokenizer",
        files: Sequence[Path] = (),
        cleanup: bool = False,
    ):
        """`document`: what tokenizer.json holds. `special`: role -> token. `files`: what `save` copies."""
        self.name, self.files, self.cleanup = name, tuple(files), cleanup
        document = with_special(document, special.values(), name)
        self.backend = build(document, name)
        self.special = special
        ids = {role: self.backend.token_to_id(special[role]) for role in ROLES if role in special}
        self.bos: int | None = ids.get("bos")
        self.eos: int | None = ids.get("eos")
        self.pad: int | None = ids.get("pad")
        self.unk: int | None = ids.get("unk")
        self.mask: int | None = ids.get("mask")
        self.cls: int | None = ids.get("cls")
        self.sep: int | None = ids.get("sep")
        self.tokens: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        self.vocabulary = max(self.tokens.values()) + 1  # rows that an embedding needs
        more = document.get("added_tokens") or []
        self.control = frozenset(
            token["content"]
            for token in more
            if token.get("special") or token["content"] in special.values() or MARKED.fullmatch(token["content"])
        )
        self.byte_level = '"ByteLevel"' in json.dumps(document.get("decoder"))
        self.templates = {key: ChatTemplate(text, f"{name}: chat template") for key, text in (templates or {}).items()}
        self.guarded: Guarded | None = None

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocabulary={self.vocabulary})"

    def encode(self, text: str, special: bool = True, control: bool = True) -> list[int]:
        """Ids of a text.

        special: put what the checkpoint puts around a text ([CLS], <s>, ...). control: strings such as `<|im_end|>` in
        the text mean the token; with False they are text like any other, as a user's must be.
        """
        backend = self.backend if control else self.guard().backend
        with rust(self.name):
            return backend.encode(sound(text), add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], special: bool = True, control: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        backend = self.backend if control else self.guard().backend
        with rust(self.name):
            return [
                each.ids for each in backend.encode_batch([sound(text) for text in texts], add_special_tokens=special)
            ]

    def encode_spans(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of every text the ids (tokens,) and the characters that each stands for (tokens, 2), as start and end."""
        with rust(self.name):
            found = self.guard().backend.encode_batch([sound(text) for text in texts], add_special_tokens=False)
        for each in found:
            yield np.array(each.ids, np.int64), np.array(each.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; special tokens are left out unless asked for."""
        numbers = [int(number) for number in ids]
        for number in numbers:
            if not 0 <= number < self.vocabulary:
                raise LaminaError(f"{self.name}: no token has id {number}; ids are 0 to {self.vocabulary - 1:,}")
        with rust(self.name):
            text = self.backend.decode(numbers, skip_special_tokens=skip_special)
        return cleaned(text) if self.cleanup else text

    def stream(self, skip_special: bool = True) -> Stream:
        """A decoder that takes one id at a time."""
        return Stream(self, skip_special)

    def lost(self, text: str) -> list[str]:
        """The characters that encoding `text` loses: dropped, or turned into the unknown token. Each once, in order."""
        if self.byte_level and self.unk_of_model() is None:
            missing = self.missing_bytes
            return [c for c in dict.fromkeys(sound(text)) if missing.intersection(c.encode())] if missing else []
        unknown = self.backend.token_to_id(self.unk_of_model() or "")
        if unknown is None:  # characters without a token vanish; spaces between words may belong to none
            each = list(dict.fromkeys(sound(text)))
            found = zip(each, self.encode_batch(each, special=False), strict=True)
            known = "".join(self.tokens)
            return [c for c, ids in found if not ids and not (c.isspace() and c in known)]
        with rust(self.name):
            encoding = self.backend.encode(sound(text), add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return list(dict.fromkeys(text[start:end] for token, (start, end) in pairs if token == unknown))

    def unk_of_model(self) -> str | None:
        model = self.backend.model
        unknown = getattr(model, "unk_token", None)
        return unknown if isinstance(unknown, str) else self.special.get("unk") if not self.byte_level else None

    @property
    def missing_bytes(self) -> frozenset[int]:
        """Bytes that a byte-level vocabulary has no token for (SmolLM2's lacks 21): their characters vanish."""
        return frozenset(byte for byte, letter in byte_letters().items() if letter not in self.tokens)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the tokenizer.json that says it, keys in order, whatever files it was read from."""
        with rust(self.name):
            whole = json.loads(self.backend.to_str())
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    # Chats.

    def chat_template(self, tools: object = None) -> ChatTemplate:
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise LaminaError(f"{self.name}: no chat template; a chat model has one, a base model takes plain text")
        return self.templates[name]

    def chat(
        self, messages: list[dict], generation_prompt: bool = True, tools: list | None = None, **variables: Any
    ) -> str:
        """A conversation as the text that the model was trained on. Encode with special=False, or use `chat_ids`."""
        names = {f"{role}_token": token for role, token in self.special.items() if role in ROLES}
        given = names | variables | {"add_generation_prompt": generation_prompt, "tools": tools}
        return self.chat_template(tools).render(messages, **given)

    def chat_ids(
        self, messages: list[dict], generation_prompt: bool = True, tools: list | None = None, **variables: Any
    ) -> list[int]:
        """A conversation as ids. Control tokens come from the template alone: in messages their names are text."""
        guard = self.guard()
        messages = [
            {k: plain(v, f"messages.{k}", guard.within if k == "role" else guard.broken) for k, v in each.items()}
            if isinstance(each, dict)
            else each
            for each in messages
        ]
        tools = plain(tools, "tools", guard.broken)
        text = self.chat(messages, generation_prompt, tools, **variables)
        with rust(self.name):
            return guard.backend.encode(sound(guard.mended(text)), add_special_tokens=False).ids

    def guard(self) -> Guarded:
        if self.guarded is None:
            self.guarded = Guarded(self)
        return self.guarded

    # Files.

    def save(self, directory: str | Path) -> None:
        """The files it was read from, byte for byte; if it was read from none, files that transformers opens."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for path in self.files:
            if (directory / path.name).resolve() != path.resolve():
                shutil.copyfile(path, directory / path.name)
        if self.files:
            return
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {f"{role}_token": token for role, token in self.special.items()}
        if "default" in self.templates:
            config["chat_template"] = self.templates["default"].source
            (directory / "chat_template.jinja").write_text(config["chat_template"], encoding="utf-8", newline="")
        with rust(self.name):
            written = self.backend.to_str(pretty=True)
        (directory / "tokenizer.json").write_text(written, encoding="utf-8", newline="")
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="")


class Guarded:
    """The same tokenizer with its control tokens under names that nobody can guess.

    To it `<|im_end|>` is text: neither the list of added tokens nor the vocabulary has it. The template's own control
    tokens are translated to the secret names after rendering. Those in messages are told apart because each was broken
    before rendering, by a mark after its first character, and is mended afterwards: `<` mark `|im_end|>`.
    """

    def __init__(self, tokenizer: Tokenizer):
        secret = secrets.token_hex(8)
        self.mark = f"m{secret}m"
        document = json.loads(tokenizer.backend.to_str())
        control = tokenizer.control
        self.names = {content: f"c{secret}n{tokenizer.tokens[content]}c" for content in control}
        for token in document["added_tokens"]:
            token |= {"content": self.names.get(token["content"], token["content"])}
            token["single_word"] = token["single_word"] and token["content"] not in self.names.values()
        model = document["model"]
        if isinstance(model["vocab"], list):
            model["vocab"] = [[self.names.get(piece, piece), score] for piece, score in model["vocab"]]
        else:
            model["vocab"] = {self.names.get(token, token): number for token, number in model["vocab"].items()}
        if "unk_token" in model:
            model["unk_token"] = self.names.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if control.isdisjoint((*pair, "".join(pair)))]
        self.backend: tokenizers.Tokenizer = build(document, tokenizer.name)
        longest_first = sorted(control, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.beginnings = {content[:size] for content in control for size in range(1, len(content))}
        self.longest = max(map(len, control), default=0)

    def within(self, text: str) -> str:
        """`text` with every control token in it broken."""
        return self.pattern.sub(lambda found: found[0][0] + self.mark + found[0][1:], text)

    def broken(self, text: str) -> str:
        """Also at its end, where the template could complete one that the text begins."""
        text = self.within(text)
        tails = (text[-size:] for size in range(1, min(self.longest, len(text)) + 1))
        return text + self.mark if any(tail in self.beginnings for tail in tails) else text

    def mended(self, text: str) -> str:
        """The rendered text, the template's control tokens under their secret names and the others as they were."""
        return self.pattern.sub(lambda found: self.names[found[0]], text).replace(self.mark, "")


def with_special(
    document: Document, tokens: Iterable[str], name: str, flags: dict[str, Document] | None = None
) -> Document:
    """The document with every special token among its added tokens, as transformers makes sure of."""
    present = [dict(token) for token in document.get("added_tokens") or [] if isinstance(token, dict)]
    known = {token.get("content") for token in present}
    missing = [token for token in dict.fromkeys(tokens) if token not in known]
    if not missing or not isinstance(document.get("model"), dict):
        return document
    vocabulary = vocabulary_of(document["model"], name)
    check_ids(((token.get("content"), token.get("id")) for token in present), 1 << 31, name)
    top = max([*vocabulary.values(), *(token["id"] for token in present)])
    for token in missing:
        top += token not in vocabulary
        present.append(added(token, vocabulary.get(token, top), **(flags or {}).get(token, {})))
    return document | {"added_tokens": present}


def sound(text: str) -> str:
    """A text that can be written down: half of a surrogate pair cannot."""
    if not isinstance(text, str):
        raise LaminaError(f"text: a {type(text).__name__}; a str is needed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LaminaError(f"text: half a character (U+{ord(text[error.start]):04X}) at {error.start:,}") from None
    return text


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's encoder.py): itself if it prints."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printing}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}


def cleaned(text: str) -> str:
    """Without the spaces that splitting words leaves before punctuation: `clean_up_tokenization_spaces`."""
    for apart in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(apart, "'" if apart == " ' " else apart[1:])
    return text
