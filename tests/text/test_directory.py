"""lamina.text.from_directory gives the ids and texts of transformers' AutoTokenizer, for every format of files."""

# ruff: noqa: E501 - rows of tables are long lines

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import sentencepiece
import tokenizers
import transformers

from lamina.errors import CheckpointError, LaminaError
from lamina.text import Tokenizer, from_directory

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
MESSAGES = [{"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": "ok"}]


def equal(directory: Path, texts: tuple[str, ...], roles: str = "") -> Tokenizer:
    """Compares with AutoTokenizer, and once more after AutoTokenizer wrote tokenizer.json."""
    ours, theirs = from_directory(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False), text
        for skip in (True, False):
            ids = ours.encode(text)
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]
    assert ours.vocabulary == len(theirs)
    for role in roles.split():
        assert getattr(ours, role) == getattr(theirs, f"{role}_token_id"), role
        assert getattr(ours, role) is not None, role
    return ours


def rewritten(directory: Path, to: Path) -> Path:
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(to)
    assert (to / "tokenizer.json").exists()
    return to


def test_gpt2(gpt2_directory: Path, texts: tuple[str, ...], tmp_path: Path):
    ours = equal(gpt2_directory, (*texts, "a<|endoftext|>b"), "bos eos unk")
    assert (ours.cls, ours.mask, ours.pad) == (None, None, None)
    assert [ours.decode(ours.encode(text)) for text in texts] == list(texts)
    equal(rewritten(gpt2_directory, tmp_path), (*texts, "a<|endoftext|>b"), "bos eos unk")


def test_roberta(corpus: list[str], texts: tuple[str, ...], tmp_path: Path):
    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(corpus, vocab_size=500, special_tokens=special, show_progress=False)
    trained.save_model(str(tmp_path))
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    config = {"tokenizer_class": "RobertaTokenizer", "mask_token": {"__type": "AddedToken"} | mask}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    more = (*texts, "a <mask> b", "x</s>y")
    ours = equal(tmp_path, more, "bos eos unk pad mask cls sep")
    assert ours.encode("a <mask>") == [ours.cls, *ours.encode("a", special=False), ours.mask, ours.sep]
    equal(rewritten(tmp_path, tmp_path / "new"), more, "bos eos unk pad mask cls sep")
    del config["mask_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert from_directory(tmp_path).encode("a <mask>") == ours.encode("a <mask>")


@pytest.mark.parametrize("lower", [True, False])
def test_bert(corpus: list[str], texts: tuple[str, ...], tmp_path: Path, lower: bool):
    trained = tokenizers.BertWordPieceTokenizer(lowercase=lower)
    trained.train_from_iterator(corpus, vocab_size=400, show_progress=False)
    trained.save_model(str(tmp_path))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = equal(tmp_path, (*texts, "a [MASK] b [SEP]"), "unk sep pad cls mask")
    assert ours.lost("fox 🙂 ẞ") == (["🙂", "ẞ"] if not lower else ["🙂"])
    equal(rewritten(tmp_path, tmp_path / "new"), (*texts, "a [MASK] b [SEP]"), "unk sep pad cls mask")


def test_sentencepiece(sentencepiece_directory: Path, texts: tuple[str, ...], tmp_path: Path):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    ours = from_directory(sentencepiece_directory)
    assert (ours.bos, ours.eos, ours.unk, ours.vocabulary) == (1, 2, 0, 460)
    random = Random(0)
    mixed = ["".join(random.choice("".join(texts)) for _ in range(80)) for _ in range(100)]
    for text in (*texts, *mixed):
        assert ours.encode(text) == [1, *oracle.encode(text)], text
        assert ours.decode(ours.encode(text)) == text
    assert ours.lost("🙂") == []
    no_bos = json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True})
    shutil.copy(sentencepiece_directory / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(no_bos)
    assert from_directory(tmp_path).encode("fox") == [*oracle.encode("fox"), 2]


def test_sentencepiece_as_transformers_writes_it(sentencepiece_directory: Path, texts: tuple[str, ...], tmp_path: Path):
    equal(rewritten(sentencepiece_directory, tmp_path), (*texts, "a</s>b", "<s> x"), "bos eos unk")


def test_t5(corpus: list[str], texts: tuple[str, ...], tmp_path: Path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "spiece"), vocab_size=140, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}')
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ours = from_directory(tmp_path)
    for text in texts:
        assert ours.encode(text) == [*oracle.encode(text), 1], text
    assert ours.encode("<extra_id_0>", special=False)[-1] == 239
    equal(rewritten(tmp_path, tmp_path / "new"), (*texts, "a <extra_id_0> b <extra_id_99>"), "eos unk pad")


def test_minilm(minilm: Path, texts: tuple[str, ...]):
    ours = equal(minilm, (*texts, "word " * 600), "unk sep pad cls mask")
    assert len(ours.encode("word " * 600)) == 602  # its file asks for 128, which is for a caller to ask


@pytest.mark.parametrize("form", ["text", "list", "jinja", "json"])
def test_chat_template(gpt2_directory: Path, tmp_path: Path, form: str):
    shutil.copytree(gpt2_directory, tmp_path, dirs_exist_ok=True)
    config = {"tokenizer_class": "GPT2Tokenizer"}
    if form == "text":
        config["chat_template"] = TEMPLATE
    elif form == "list":
        config["chat_template"] = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]
    elif form == "jinja":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = from_directory(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    if form == "json":  # transformers reads it for processors only
        theirs.chat_template = TEMPLATE
    for prompt in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert ours.chat(MESSAGES, generation_prompt=prompt) == expected
        expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, return_dict=False)
        assert ours.chat_ids(MESSAGES, generation_prompt=prompt) == expected
    if form == "list":
        assert ours.chat(MESSAGES, tools=[{}]) == "tools"


def test_added_tokens(gpt2_directory: Path, tmp_path: Path):
    shutil.copytree(gpt2_directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "added_tokens.json").write_text('{"<extra>": 500}')
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False, "special": True}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "added_tokens_decoder": {"501": {"content": "<end>"} | flags},
        "pad_token": {"content": "<pad>", "__type": "AddedToken"},
        "bos_token": None,
        "additional_special_tokens": ["<one>", "<end>"],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = from_directory(tmp_path)
    assert ours.encode("<extra><end>  <pad><one>") == [500, 501, 502, 503]
    assert (ours.bos, ours.pad, ours.eos, ours.vocabulary) == (None, 502, 0, 504)
    assert ours.decode([500, 501, 502]) == "<extra>"
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(
        '{"eos_token": "<end>", "unk_token": {"content": "<|endoftext|>"}}'
    )
    ours = from_directory(tmp_path)
    assert (ours.eos, ours.unk) == (501, 0)


def test_save_gives_the_same_bytes(gpt2_directory: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(rewritten(gpt2_directory, tmp_path / "new"), first)
    (first / "chat_template.jinja").write_bytes(TEMPLATE.encode() + b"\r\n")
    (first / "model.safetensors").write_bytes(b"")
    from_directory(first).save(second)
    names = {path.name for path in first.iterdir()} - {"model.safetensors"}
    assert {path.name for path in second.iterdir()} == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    from_directory(first).save(first)  # onto itself
    assert (first / "chat_template.jinja").read_bytes() == TEMPLATE.encode() + b"\r\n"


def test_rows(gpt2_directory: Path):
    assert from_directory(gpt2_directory, rows=500).vocabulary == 500
    with pytest.raises(CheckpointError, match="500 tokens for 499 embeddings"):
        from_directory(gpt2_directory, rows=499)


def bad(change) -> bytes:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": None, "model": model}
    change(whole)
    return json.dumps(whole).encode()


def pattern(whole: dict, text: str) -> None:
    whole["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}


BAD = {
    "not JSON": (b"{\n 'a'", r"tokenizer.json: line 2, column 2: .*; not JSON"),
    "empty": (b"", "line 1, column 1"),
    "a list": (b"[]", "a JSON list; an object is needed"),
    "not UTF-8": (b"\xff\xfe", "not UTF-8 at byte 0"),
    "deep": (b"[" * 200_000, "nested too deeply"),
    "no model": (b"{}", "no model; this is no tokenizer.json"),
    "no vocabulary": (bad(lambda w: w["model"].pop("vocab")), "no model.vocab"),
    "empty vocabulary": (bad(lambda w: w["model"].update(vocab={})), "no model.vocab"),
    "id too large": (bad(lambda w: w["model"]["vocab"].update(c=4294967295)), "token 'c' has id 4294967295; ids are 0 to"),
    "id negative": (bad(lambda w: w["model"]["vocab"].update(c=-1)), "token 'c' has id -1"),
    "id a text": (bad(lambda w: w["model"]["vocab"].update(c="2")), "token 'c' has id '2'"),
    "id true": (bad(lambda w: w["model"]["vocab"].update(c=True)), "token 'c' has id True"),
    "added id": (bad(lambda w: w["added_tokens"].append({"id": 1 << 40, "content": "<x>"})), "'<x>' has id 1099511627776"),
    "added hole": (bad(lambda w: w["added_tokens"].append(
        {"id": 9, "content": "<x>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    )), "'<x>' claims id 9, but its place is 2"),
    "added junk": (bad(lambda w: w.update(added_tokens=[1])), "added_tokens is no list of tokens"),
    "model type": (bad(lambda w: w["model"].update(type="RNN")), "the tokenizers package cannot work with it"),
    "merge of nothing": (bad(lambda w: w["model"].update(merges=[["a", "z"]])), "cannot work with it: .*z"),
    "pattern": (bad(lambda w: pattern(w, "(")), "cannot work with it: Oniguruma error"),
    "runaway pattern": (bad(lambda w: pattern(w, "(a+)+$")), "cannot work with it: Onig: Regex search error: retry-limit"),
    "unigram": (bad(lambda w: w["model"].update(type="Unigram", vocab=[["a"]])), "no list of pieces and scores"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]):
    data, message = BAD[name]
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        from_directory(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_bad_neighbours(gpt2_directory: Path, tmp_path: Path):
    with pytest.raises(
        CheckpointError, match="no tokenizer.json, vocab.json with merges.txt, vocab.txt or tokenizer.model"
    ):
        from_directory(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tekken.json is Mistral's tekken"):
        from_directory(tmp_path)
    shutil.copytree(gpt2_directory, tmp_path, dirs_exist_ok=True)

    def refused(message: str, **config) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            from_directory(tmp_path)

    refused("how the class 'clip' reads it is not known, only gpt2", tokenizer_class="CLIPTokenizer")
    refused("eos_token is 7; it is a token", tokenizer_class="GPT2Tokenizer", eos_token=7)
    refused("chat_template is neither", tokenizer_class="GPT2Tokenizer", chat_template=7)
    refused(
        "added_tokens_decoder\\['x'\\] is no token", tokenizer_class="GPT2Tokenizer", added_tokens_decoder={"x": {}}
    )
    (tmp_path / "merges.txt").write_text("a b c\n")
    refused("line 1 is 'a b c'; a merge is two tokens", tokenizer_class="GPT2Tokenizer")
    (tmp_path / "merges.txt").unlink()
    refused("merges.txt: No such file", tokenizer_class="GPT2Tokenizer")


def test_molecules_are_cut_into_atoms_bonds_and_arrows(tmp_path: Path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"C ( ) Cl [O-] >> . = c 1 > %12 Br B".split()]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SmilesTokenizer"}')
    ours = from_directory(tmp_path)
    text = "CC(Cl)=[O-].c1>>BrB>C%12"
    pieces = "[CLS] C C ( Cl ) = [O-] . c 1 >> Br B > C %12 [SEP]".split()
    assert ours.encode(text) == [tokens.index(piece) for piece in pieces]
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode("C[MASK]N C", special=False) == [5, 4, 1, 1, 5]  # what has no token is unknown, and said
    assert ours.lost("CN C") == ["N", " "]


def test_bad_sentencepiece(sentencepiece_directory: Path, tmp_path: Path):
    good = (sentencepiece_directory / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    cases = [good[:length] for length in range(1, 300, 7)] + [
        b"",
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\xff" * 50,
        b"{}",
        b"\x0a\x02\x08\x01",
    ]
    for data in cases:
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            from_directory(tmp_path)


def test_texts_that_cannot_be(gpt2_directory: Path):
    ours = from_directory(gpt2_directory)
    with pytest.raises(LaminaError, match=r"half a character \(U\+D800\) at 1"):
        ours.encode("a\ud800")
    with pytest.raises(LaminaError, match="a bytes; a str is needed"):
        ours.encode(b"a")  # type: ignore[arg-type]
    for number in (500, -1, 1 << 40):
        with pytest.raises(LaminaError, match=f"no token has id {number}; ids are 0 to 499"):
            ours.decode([1, number])
