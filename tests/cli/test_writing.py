"""generate, chat, embed, fill, evaluate, verify: what they print, what --json holds, and how they refuse."""

from __future__ import annotations

import io
import json
import math
import signal
import sys
import time

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

import lamina
from lamina.cli import main
from lamina.generation import log_probabilities
from tests import tiny
from tests.forked import Program


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return str(
        tiny.checkpoint(tmp_path_factory.mktemp("models") / "llama", tiny.LLAMA | {"max_position_embeddings": 256})
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return str(tiny.checkpoint(tmp_path_factory.mktemp("models") / "bert", tiny.BERT))


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> str:
    return str(
        tiny.checkpoint(tmp_path_factory.mktemp("models") / "t5", tiny.T5 | {"n_positions": 8, "eos_token_id": 39})
    )


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command; gives (status, standard output, standard error)."""

    def call(*words: object, stdin: bytes | str = b"") -> tuple[int, str, str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        status = main([str(word) for word in words])
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


def wrong(result: tuple[int, str, str], said: str) -> None:
    """A mistake of the user: status 2, nothing on standard output, one line that says `said`."""
    status, out, err = result
    line = err.strip().splitlines()[-1]
    assert status == 2 and out == "" and line.startswith("lamina: error: ") and said in line, result


# generate


def test_generate_prints_the_text_and_nothing_else(run, llama):
    status, out, err = run("generate", llama, "one two", "--max-new-tokens", 9)
    tokenizer = lamina.tokenizer(llama)
    prompt = tokenizer.encode("one two")
    ids = lamina.generate(lamina.load(llama), torch.tensor([prompt]), max_new_tokens=9)[0, len(prompt) :].tolist()
    text = tokenizer.decode(ids)
    assert status == 0 and out.removesuffix("\n") == text.removesuffix("\n")
    assert "tokens/s" in err and len(err.splitlines()) == 1
    assert run("generate", llama, "one two", "--max-new-tokens", 9, "--no-stream", "-q") == (0, out, "")
    assert run("generate", llama, "--max-new-tokens", 9, stdin="one two\n")[1] == out
    assert run("generate", llama, "-", "--max-new-tokens", 9, stdin="one two")[1] == out
    document = json.loads(run("generate", llama, "one two", "--max-new-tokens", 9, "--json")[1])
    assert document["text"] == text and document["ids"] == ids and document["finish_reason"] in ("length", "stop")
    assert document["prompt_tokens"] == len(prompt) and document["tokens_per_second"] > 0


def test_seeds(run, llama):
    def draw(seed: int) -> str:
        return run("generate", llama, "one", "--temperature", 2, "--seed", seed, "--max-new-tokens", 12, "--json")[1]

    one, same, other = (json.loads(draw(seed))["ids"] for seed in (1, 1, 2))
    assert one == same != other


def test_an_empty_prompt_begins_with_the_first_token(run, llama, tmp_path):
    status, _, err = run("generate", llama, "", "--max-new-tokens", 2)
    assert status == 0 and "beginning with <s>" in err
    bare = tiny.checkpoint(tmp_path / "bare")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((bare / name).read_text())
        (bare / name).write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("bos_")}))
    if lamina.load(bare).spec.special.start is None:
        wrong(run("generate", bare, ""), "the prompt is empty")


def test_a_prompt_that_is_too_long(run, llama):
    prompt = "x" * 300
    wrong(run("generate", llama, prompt), "the prompt has 300 tokens; this model reads 256")
    arguments = ("generate", llama, prompt, "--truncate", "left", "--max-new-tokens", 6, "--min-new-tokens", 6)
    status, out, err = run(*arguments, "--json")
    document = json.loads(out)
    assert status == 0 and document["truncated"] == 50 and document["prompt_tokens"] == 250
    assert "the first 50 of the 300 tokens of the prompt were cut" in err and document["new_tokens"] == 6
    wrong(run(*arguments[:5], "--max-new-tokens", 256), "leaves no room")


def test_a_source_is_cut_to_what_the_encoder_reads(run, tmp_path):
    """An LED reads more than it can write: 90 tokens here, and 12."""
    led = tiny.checkpoint(tmp_path / "led", tiny.LED)
    arguments = ("generate", led, "x" * 100, "--max-new-tokens", 6)
    wrong(run(*arguments), "it has learned 90 positions")
    status, out, _ = run(*arguments, "--truncate", "left", "--json")
    assert status == 0 and json.loads(out)["truncated"] == 10 and json.loads(out)["prompt_tokens"] == 90


def test_a_full_context_says_so(run, llama):
    status, out, err = run("generate", llama, "x" * 250, "--max-new-tokens", 20, "--min-new-tokens", 20, "--json")
    assert status == 0 and json.loads(out)["finish_reason"] == "length" and json.loads(out)["new_tokens"] == 6
    assert "lamina: warning: stopped after 6 new tokens: the context of 256 is full" in err


def test_an_end_at_once(run, llama, tmp_path):
    directory = tiny.checkpoint(tmp_path / "ends")
    tokenizer = lamina.tokenizer(directory)
    prompt = torch.tensor([tokenizer.encode("one two")])
    end = int(lamina.generate(lamina.load(directory), prompt, max_new_tokens=1)[0, -1])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    status, out, _ = run("generate", directory, "one two", "--json", "--raw")
    assert status == 0 and json.loads(out)["ids"] == [end] and json.loads(out)["finish_reason"] == "stop"
    special = tiny.checkpoint(tmp_path / "special", seed=1)
    model = lamina.load(special)
    with torch.no_grad():
        weight = model.head.weight.clone().zero_()
        weight[257] = 0.0
    model.head.weight = torch.nn.Parameter(weight)  # all logits equal: the first id, a control byte, comes
    with torch.no_grad():
        model.head.weight[257] = torch.sign(model(prompt).hidden[0, -1])
    lamina.save(model, tmp_path / "at-once")
    tokenizer.save(tmp_path / "at-once")
    status, out, _ = run("generate", tmp_path / "at-once", "one two", "--json")
    document = json.loads(out)
    assert status == 0 and document["text"] == "" and document["finish_reason"] == "stop" and document["ids"] == [257]


def test_nothing_new_gives_the_prompts_log_probabilities(run, llama):
    status, out, _ = run("generate", llama, "one two", "--max-new-tokens", 0, "--json")
    document, ids = json.loads(out), lamina.tokenizer(llama).encode("one two")
    assert status == 0 and document["text"] == "" and [each["id"] for each in document["prompt"]] == ids
    values = [each["log_probability"] for each in document["prompt"]]
    assert values[0] is None and values[1:] == pytest.approx(log_probabilities(lamina.load(llama), ids))
    lines = run("generate", llama, "one two", "--max-new-tokens", 0)[1].splitlines()
    assert len(lines) == len(ids) and lines[0].split() == ["111", "'o'"]
    wrong(run("generate", llama, "x" * 300, "--max-new-tokens", 0), "300 tokens; this model reads 256")


@pytest.mark.parametrize(
    "options, said",
    [
        *((("--temperature", value), "temperature is") for value in ("nan", "inf", "-1", "1e9")),
        *((("--top-p", value), "top_p is") for value in ("0", "1.1")),
        *((("--top-k", value), "top_k is") for value in ("-1", "0", "264")),
        *((("--min-p", value), "min_p is") for value in ("-0.1", "1.5")),
        *((("--seed", value), "seed is") for value in (str(2**70), "-1")),
        (("--max-new-tokens", "-1"), "max_new_tokens is -1"),
        (("--min-new-tokens", "200"), "min_new_tokens is 200"),
        (("--stop", ""), "at least one character"),
        (tuple("--stop a --stop b --stop c --stop d --stop e".split()), "stop has 5 texts; at most 4"),
        (("--cache", "rng"), "'rng' is not one of"),
        (("--cache", "ring"), "looks back without limit"),
        (("--chat", "--raw"), "exclude each other"),
        (("--temprature", "1"), "Did you mean one of: '--temperature'"),
        (("--dtype", "float12"), "float12"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_values_out_of_range_name_the_field(run, llama, options, said):
    wrong(run("generate", llama, "one two", *options), said)


def test_stop_texts_end_before_them(run, llama):
    text = json.loads(run("generate", llama, "one two", "--max-new-tokens", 20, "--json")[1])["text"]
    stop = text[5:8]
    document = json.loads(run("generate", llama, "one two", "--max-new-tokens", 20, "--stop", stop, "--json")[1])
    assert document["text"] == text[: text.index(stop)] and document["stopped_by"] == stop
    assert document["finish_reason"] == "stop"


def test_control_tokens_in_a_prompt_are_text_unless_raw(run, llama):
    def prompt(*more: str) -> int:
        return json.loads(run("generate", llama, "a<|end|>", "--max-new-tokens", 1, "--json", *more)[1])[
            "prompt_tokens"
        ]

    assert prompt() == 8 and prompt("--raw") == 2
    chat = json.loads(run("generate", llama, "hi", "--chat", "--max-new-tokens", 1, "--json")[1])
    expected = lamina.tokenizer(llama).chat_ids([{"role": "user", "content": "hi"}])
    assert chat["prompt_tokens"] == len(expected)


def test_an_encoder_decoder_writes_from_its_start_id(run, t5):
    """Longer than the length that it was trained at, which T5's relative positions allow."""
    status, out, err = run("generate", t5, "one two", "--max-new-tokens", 12, "--json")
    document, source = json.loads(out), lamina.tokenizer(t5).encode("one two")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    expected = theirs.generate(torch.tensor([source]), max_new_tokens=12, do_sample=False)[0, 1:].tolist()
    assert status == 0 and document["ids"] == expected and len(expected) == 12, err
    assert document["text"] == lamina.tokenizer(t5).decode(expected)
    wrong(run("generate", t5, "one two", "--max-new-tokens", 0), "an encoder-decoder reads its prompt")


@pytest.mark.parametrize("penalty, early, theirs_early", [(0, "no", False), (0.4, "yes", True), (2, "never", "never")])
def test_beams_give_the_likeliest_texts_and_their_scores(run, t5, penalty, early, theirs_early):
    options = ("--beams", 4, "--best", 3, "--length-penalty", penalty, "--early-stopping", early)
    status, out, err = run("generate", t5, "one two", "--max-new-tokens", 7, *options, "--json")
    document, tokenizer = json.loads(out), lamina.tokenizer(t5)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(t5).eval().generate(
        torch.tensor([tokenizer.encode("one two")]), max_new_tokens=7, num_beams=4, num_return_sequences=3,
        length_penalty=float(penalty), early_stopping=theirs_early, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert status == 0, err
    close = 7 * 1e-5 / 7**penalty  # 1e-5 for each of up to seven log-probabilities, which are summed and divided
    assert [each["score"] for each in document["texts"]] == pytest.approx(theirs.sequences_scores.tolist(), abs=close)
    for each, ids in zip(document["texts"], theirs.sequences[:, 1:].tolist(), strict=True):
        assert each["ids"] == ids[: len(each["ids"])] and set(ids[len(each["ids"]) :]) <= {256}
        assert each["text"] == tokenizer.decode(each["ids"])
    assert (len({len(each["ids"]) for each in document["texts"]}) > 1) == (penalty < 1)  # some end sooner
    assert document["ids"] == document["texts"][0]["ids"] and document["text"] == document["texts"][0]["text"]
    lines = run("generate", t5, "one two", "--max-new-tokens", 7, *options)[1]
    assert all(f"{each['score']:9.4f}  {each['text']}" in lines for each in document["texts"])
    best = run("generate", t5, "one two", "--max-new-tokens", 7, *options[:2], *options[4:])[1]
    assert best == document["text"] + "\n"


@pytest.mark.parametrize(
    "options, said",
    [
        (("--beams", "0"), "beams is 0"),
        (("--beams", "2", "--best", "3"), "best is 3; it must be a whole number from 1 to beams=2"),
        (("--best", "1", "--length-penalty", "2"), "length_penalty=2.0 needs beams above 1"),
        (("--beams", "2", "--temperature", "1"), "temperature=1.0 needs beams=1"),
        (("--beams", "2", "--stop", "a"), "drop one of the two"),
        (("--beams", "2", "--early-stopping", "maybe"), "'maybe' is not one of 'no', 'yes', 'never'"),
    ],
    ids=str,
)
def test_beams_refuse_what_does_not_go_with_them(run, t5, options, said):
    wrong(run("generate", t5, "one two", *options), said)


def test_models_that_do_not_write_say_so(run, bert):
    wrong(run("generate", bert, "the cat"), "cannot generate; try lamina fill or embed")
    wrong(run("generate", "llama/7b", "x"), "published architecture")
    wrong(run("chat", bert), "no chat template")


def test_logits_that_are_not_finite(run, llama, tmp_path):
    model = lamina.load(llama)
    model.head.weight = torch.nn.Parameter(torch.full_like(model.head.weight, torch.nan))
    lamina.save(model, tmp_path / "nan")
    lamina.tokenizer(llama).save(tmp_path / "nan")
    wrong(run("generate", tmp_path / "nan", "one"), "logits of new token 0 are not finite")


def test_a_prompt_that_is_not_text(run, llama):
    wrong(run("generate", llama, stdin=b"abc\xff"), "standard input is not UTF-8 at byte 3")
    wrong(run("generate", llama, "a\udc80"), "half a character")


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_the_text(llama, as_json, tmp_path):
    """A real process and a real signal: what was written so far is printed, and the status is 130."""
    big = tiny.LLAMA | {"max_position_embeddings": 100_000}
    directory = tiny.checkpoint(tmp_path / "long", big)
    words = ["generate", str(directory), "one two", "--max-new-tokens", "90000", "--min-new-tokens", "90000"]
    program = Program(main, [*words, *(["--json"] if as_json else [])])
    end = time.monotonic() + (3 if as_json else 60)  # what it prints in the end only cannot be waited for
    while time.monotonic() < end and len(program.files[0].read_bytes()) < 20:
        time.sleep(0.05)
    program.signal(signal.SIGINT)
    done = program.end()
    assert done.returncode == 130 and done.stderr.strip().splitlines()[-1] == "lamina: interrupted"
    assert as_json or len(done.stdout.encode()) >= 20
    if as_json and done.stdout:
        document = json.loads(done.stdout)
        assert document["finish_reason"] == "interrupted" and document["text"] and len(document["ids"]) > 1


# chat


def test_chat_reads_lines(run, llama):
    lines = "hello\n/help\nand you?\n"
    status, out, err = run("chat", llama, "--max-new-tokens", 5, "--json", stdin=lines)
    document = json.loads(out)
    assert status == 0 and "/reset" in err
    assert [m["role"] for m in document["messages"]] == ["user", "assistant"] * 2
    first, second = document["turns"]
    assert first["cached_tokens"] == 0 and second["cached_tokens"] > 20
    tokenizer = lamina.tokenizer(llama)
    prompt = tokenizer.chat_ids(document["messages"][:3])
    assert second["prompt_tokens"] == len(prompt)
    model = lamina.load(llama)
    assert second["ids"] == lamina.generate(model, torch.tensor([prompt]), max_new_tokens=5)[0, len(prompt) :].tolist()
    plain = run("chat", llama, "--max-new-tokens", 5, stdin="hello\n/quit\nnever\n")
    assert plain[0] == 0 and plain[1].removesuffix("\n") == first["text"].removesuffix("\n")


def test_chat_forgets(run, llama):
    out = run("chat", llama, "--max-new-tokens", 5, "--json", "--system", "be", stdin="hello\n/reset\nhello\n")[1]
    document = json.loads(out)
    assert [m["role"] for m in document["messages"]] == ["system", "user", "assistant"] and len(document["turns"]) == 1


def test_chat_refuses(run, llama):
    assert run("chat", llama, stdin="/exit\n")[0] == 2
    status, _, err = run("chat", llama, stdin="x" * 300 + "\n")
    assert status == 2 and "this model reads 256" in err and "/reset" in err


# embed, fill


def test_embed_ranks(run, bert):
    texts = ["the cat sat", "the dog ran", "red hill"]
    status, out, _ = run("embed", bert, *texts, "--json")
    document = json.loads(out)
    vectors = torch.tensor(document["vectors"])
    expected = lamina.embed(lamina.load(bert), texts, lamina.tokenizer(bert))
    assert status == 0 and torch.allclose(vectors, expected, atol=1e-6)
    assert document["similarity"] == pytest.approx((vectors @ vectors[0]).tolist(), abs=1e-5)
    lines = run("embed", bert, *texts)[1].splitlines()
    assert "the cat sat" in lines[0] and len(lines) == 4
    assert float(lines[2].split()[-1]) >= float(lines[3].split()[-1])


def test_embed_reads_files(run, bert, tmp_path):
    (tmp_path / "texts.txt").write_text("the cat sat\n\nthe dog ran\n")
    ours = json.loads(run("embed", bert, "--file", tmp_path / "texts.txt", "--json")[1])
    assert ours["texts"] == ["the cat sat", "the dog ran"]
    assert json.loads(run("embed", bert, "--file", "-", "--json", stdin="the cat sat\n")[1])["texts"] == ["the cat sat"]
    wrong(run("embed", bert), "no text is given")
    wrong(run("embed", bert, "--file", tmp_path / "none"), "No such file")
    wrong(run("embed", bert, "cat " * 40), "this model reads 32")
    (tmp_path / "bad").write_bytes(b"\xff")
    wrong(run("embed", bert, "--file", tmp_path / "bad"), "not UTF-8 at byte 0")


def test_fill(run, bert):
    status, out, _ = run("fill", bert, "the [MASK] sat on the [MASK] .", "--json", "--top", 3)
    document = json.loads(out)
    assert status == 0 and [blank["position"] for blank in document["blanks"]] == [2, 6]
    assert all(len(blank["candidates"]) == 3 for blank in document["blanks"])
    lines = run("fill", bert, "the [MASK] sat", "--top", 2)[1].splitlines()
    assert len(lines) == 4 and "%" in lines[2]
    wrong(run("fill", bert, "the cat"), "no [MASK]")


# evaluate, verify


def test_evaluate(run, llama, tmp_path):
    texts = {"a.txt": "the cat ran over the hills " * 40, "b.txt": "é and ü, then there " * 20}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    paths = [tmp_path / name for name in texts]
    status, out, _ = run("evaluate", llama, *paths, "--window", 32, "--json")
    document = json.loads(out)
    assert status == 0 and (document["window"], document["stride"]) == (32, 16)
    assert [each["file"] for each in document["files"]] == list(map(str, paths))
    first, second = document["files"]
    assert first["tokens"] == len(lamina.tokenizer(llama).encode(texts["a.txt"])) - 1
    assert first["bytes"] == len(texts["a.txt"]) - 1  # the first token, one byte, has nothing before it
    nats = [each["tokens"] * math.log(each["perplexity"]) for each in document["files"]]
    assert document["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / (first["bytes"] + second["bytes"]))
    lines = run("evaluate", llama, *paths)[1].splitlines()
    assert lines[-2].startswith("together ") and "windows of 256 tokens, 128 new" in lines[-1]


def test_evaluate_refuses(run, llama, bert, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "bad").write_bytes(b"abc\xff")
    wrong(run("evaluate", llama, tmp_path / "none"), "no such file")
    wrong(run("evaluate", llama, tmp_path / "empty"), "no token to predict")
    wrong(run("evaluate", llama, tmp_path / "bad"), "not UTF-8 at byte 3")
    wrong(run("evaluate", bert, tmp_path / "bad"), "does not predict the next token")
    wrong(run("evaluate", llama, tmp_path / "bad", "--window", 1), "window is 1")
    wrong(run("evaluate", llama), "no FILES and no --tasks")


def test_verify(run, llama, tmp_path):
    status, out, _ = run("verify", llama)
    assert status == 0 and "0 fails" in out and "later tokens change no earlier bit" in out
    model = lamina.load(llama)
    weight = model.head.weight.detach().clone()
    weight[3, 3] = torch.nan
    model.head.weight = torch.nn.Parameter(weight)
    lamina.save(model, tmp_path / "nan")
    status, out, _ = run("verify", tmp_path / "nan", "--json")
    document = json.loads(out)
    assert status == 1 and document["passed"] is False
    assert document["rows"][0]["verdict"] == "fails" and "head.weight has 1" in document["rows"][0]["note"]


def test_verify_with_transformers(run, llama, tmp_path):
    status, out, _ = run("verify", llama, "--with", "transformers", "--json")
    document = json.loads(out)
    verdicts = {row["property"]: row["verdict"] for row in document["rows"]}
    assert status == 1 and document["with"] == "transformers"
    assert verdicts["packed = alone, told by positions and a mask of ones"] == "fails"
    assert verdicts["cached decoding = the whole text, cache 'as returned'"] == "holds"
    wrong(run("verify", llama, "--with", "transformers", "--compile"), "has no compiled step")
    wrong(run("verify", "llama2/7b", "--with", "transformers"), "opens directories with a config.json")
    wrong(run("verify", llama, "--with", "jax"), "'jax' is not one of")
