"""Real artefacts for the tests that want them; without them those tests are skipped, with the reason."""

import os
from pathlib import Path

import pytest


def data() -> Path:
    return Path(os.environ.get("LAMINA_DATA") or Path.home() / ".local/share/lamina")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    found = sorted((data() / "smollm2-135m").glob("*.gguf"))
    if not found:
        pytest.skip(f"no {data() / 'smollm2-135m'}/*.gguf: lamina fetch smollm2-135m")
    return found[0]


@pytest.fixture(scope="session")
def minilm() -> Path:
    directory = data() / "minilm-l6"
    if not (directory / "tokenizer.json").is_file():
        pytest.skip(f"no {directory}/tokenizer.json: lamina fetch minilm-l6")
    return directory


WORDS = """The quick brown fox jumps over the lazy dog; it wasn't (isn't?) 1234 times, but 5,678.90 times.
def function(argument: int) -> str:
    return f"{argument:>10}"   # a comment
Straße, naïve café, ñandú, Ελληνικά, русский язык, 日本語のテキスト, עברית, हिन्दी, 한국어.
<b>bold</b> & "quoted" 'single' don't I'll we've you're he'd THEY'RE    spaces	tabs
"""
TEXTS = (
    *WORDS.splitlines(),
    *(
        "",
        " ",
        "  leading",
        "trailing  ",
        "a\n\nb\r\n\tc",
        "x  7   8",
        "🙂🙃 👩‍👩‍👧 🇩🇪",
        "ẞ ﬁ ① ½",
        "\u200b\u00a0\u3000y",
        "a b . c ?",
    ),
    *("Hello world", " Hello", "hello, hello; hello.", "Paris is the capital of France.", "0123456789" * 3),
)


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    return TEXTS


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Enough to train a small tokenizer on."""
    return [line for line in WORDS.splitlines() for _ in range(20)] + [word for word in WORDS.split() for _ in range(5)]


@pytest.fixture(scope="session")
def gpt2_directory(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tokenizers

    directory = tmp_path_factory.mktemp("gpt2")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(corpus, vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(directory))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return directory


@pytest.fixture(scope="session")
def sentencepiece_directory(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA's kind: BPE with byte fallback, every space kept."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=460,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    return directory
