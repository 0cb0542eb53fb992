"""lm-evaluation-harness over lamina: the harness' own `hf` model says the same of the same folder."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.cli import main
from lamina.errors import LaminaError, UnsupportedError
from tests import tiny

WITHOUT_TRANSFORMERS = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.split(".")[0] == "transformers" else super().find_spec(name, *rest)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
CONFIGS = {"llama": tiny.LLAMA, "gpt2": tiny.GPT2}

try:
    import datasets
    import lm_eval
    import lm_eval.tasks
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from lamina.harness import register
except ModuleNotFoundError:
    lm_eval = None

needed = pytest.mark.skipif(lm_eval is None, reason="lm_eval is not installed: it is in the extra lamina[eval]")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("harness") / request.param, CONFIGS[request.param])


@pytest.fixture(scope="module")
def both(directory: Path) -> tuple[Any, Any]:
    """Our model and that of the harness, over the same files; batches of three, so that rows are padded."""
    register()
    ours = get_model("lamina")(source=str(directory), batch_size=3)
    return ours, get_model("hf")(pretrained=str(directory), batch_size=3, device="cpu")


def asked(kind: str, arguments: list[tuple]) -> list[Any]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


# What the two models answer.


@needed
def test_loglikelihoods_are_those_of_transformers(both, caplog):
    """An empty context, spaces at its end, answers that share a row, a begun <s>, and more than the model reads."""
    ours, theirs = both
    arguments = [
        ("the cat", " sat on"),
        ("", "hello"),
        ("", "<s>x"),
        ("a b c ", "d e"),
        ("the cat", " b"),
        ("the cat", " t"),
    ]
    arguments += [
        ("<s>the hill", " ran"),
        ("x" * 90, "yz"),
        ("y" * 61, "abc"),
        ("y" * 62, "abc"),
        ("é", "ü!"),
        ("the", "re"),
    ]
    found = ours.loglikelihood(asked("loglikelihood", arguments))
    expected = theirs.loglikelihood(asked("loglikelihood", arguments))
    assert torch.allclose(torch.tensor([a for a, _ in found]), torch.tensor([a for a, _ in expected]), atol=1e-4)
    assert [best for _, best in found] == [best for _, best in expected]


@needed
def test_cut_contexts_are_told(both, caplog):
    ours, _ = both
    ours.loglikelihood(asked("loglikelihood", [("x" * 90, "yz")]))
    assert "a context of 90 tokens keeps its last 63: 64 are read" in caplog.text
    ours.generate_until(asked("generate_until", [("x" * 90, {"until": [], "max_gen_toks": 4})]))
    assert "a prompt of 90 tokens keeps its last 60, so that 4 new ones fit" in caplog.text


@needed
def test_what_greedy_decoding_writes_is_greedy(both):
    context = both[0].tok_encode("the cat")
    ids = lamina.generate(both[0].model, torch.tensor([context]), max_new_tokens=3)[0, len(context) :].tolist()
    for model in both:
        asks = [(("", ""), context, ids), (("", ""), context, [*ids[:2], ids[2] - 1])]
        assert [best for _, best in model._loglikelihood_tokens(asks)] == [True, False]


@needed
def test_rolling_loglikelihoods_are_those_of_transformers(both):
    """Shorter and longer than the context of 64, to the token."""
    ours, theirs = both
    texts = [("the cat sat on the mat " * 20,), ("hi",), ("z" * 63,), ("z" * 64,), ("z" * 65,), ("é ü" * 40,)]
    found = ours.loglikelihood_rolling(asked("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", texts))
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)


@needed
def test_generated_texts_are_those_of_transformers(both):
    ours, theirs = both
    free = {"until": [], "max_gen_toks": 12}
    whole = ours.generate_until(asked("generate_until", [(text, free) for text in ("the cat", "a", "hill and")]))
    stops = {"until": [text[4:6] for text in whole] + list("QXZ"), "max_gen_toks": 12}
    arguments = [("the cat", free), ("a", stops), ("hill and", stops), ("the " * 40, free), ("the cat", stops)]
    arguments += [("o", {"until": "e", "max_new_tokens": 7, "do_sample": False, "temperature": 0.0}), ("<s>o", free)]
    found = ours.generate_until(asked("generate_until", arguments))
    assert found == theirs.generate_until(asked("generate_until", arguments))
    assert found[1] != whole[1] and found[0] == whole[0]


@needed
@pytest.mark.parametrize("trims", [False, True])
def test_chats_are_those_of_transformers(both, trims):
    """Also with the last message left open, and with templates that trim what is said or know of no system message."""
    ours, theirs = both
    source = theirs.tokenizer.chat_template
    if trims:
        source = source.replace("{{ m.content }}", "{{ m.content | trim }}").replace(
            "{% for m in messages %}",
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        )
    from lamina.text.template import ChatTemplate

    kept = ours.tokenizer.templates
    ours.tokenizer.templates, theirs.tokenizer.chat_template = {"default": ChatTemplate(source)}, source
    said = [{"role": "user", "content": " Is 2 = 2? "}, {"role": "assistant", "content": "The answer is  "}]
    try:
        for messages in (said, [{"role": "system", "content": "be short"}, *said], said[:1]):
            for prompt in (True, False):
                copies = [[dict(each) for each in messages] for _ in both]
                found = ours.apply_chat_template(copies[0], prompt)
                assert found == theirs.apply_chat_template(copies[1], prompt), (messages, prompt)
                assert copies[0] == messages
        assert ours.chat_template(True) == theirs.chat_template(True) == source
        assert ours.chat_template(False) is None
    finally:
        ours.tokenizer.templates, theirs.tokenizer.chat_template = kept, tiny.CHATML


# Whole tasks.


TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} ",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": each, "aggregation": "mean", "higher_is_better": True} for each in ("acc", "acc_norm")
        ],
    },
    "tiny_write": {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "said",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "passage",
        "metric_list": [{"metric": each} for each in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
}


@pytest.fixture(scope="module")
def tasks(both, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks over one JSONL file; some questions are answered as the model would."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["cat", "dog", "hill", "mat", "red", "ran", "over"]
    questions = [f"the {a} sat on {b}" for a in words for b in words[:3]]
    asks = asked("generate_until", [(each, {"until": ["\n"], "max_gen_toks": 5}) for each in questions])
    written = both[1].generate_until(asks)
    rows = [
        {
            "question": question,
            "choices": [words[number % 7], f"{words[number % 5]} and", "no", "the"],
            "answer": number % 4,
            "said": text if number % 3 else "something else",
            "passage": f"{question}. {question}, then! " * (1 + number % 4),
        }
        for number, (question, text) in enumerate(zip(questions, written, strict=True))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    return folder


@pytest.fixture(autouse=True)
def without_network() -> Iterator[None]:
    if lm_eval is None:
        yield
        return
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    yield
    datasets.config.HF_HUB_OFFLINE = before


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness without its own 14,000 files of tasks, which take it half a minute to look through."""
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(manager, include_defaults=False))


def results(model: Any, folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    manager = lm_eval.tasks.TaskManager(include_path=str(folder))
    found = lm_eval.simple_evaluate(model, tasks=sorted(TASKS), task_manager=manager, bootstrap_iters=10, **options)
    return found["results"]


@needed
@pytest.mark.parametrize("options", [{}, {"num_fewshot": 0, "apply_chat_template": True}], ids=["plain", "chat"])
def test_tasks_come_to_the_same(both, tasks, few_tasks, options):
    found, expected = (results(model, tasks, **options) for model in both)
    for task, values in expected.items():
        numbers = {key: value for key, value in values.items() if isinstance(value, float)}
        assert numbers and {key: found[task][key] for key in numbers} == pytest.approx(numbers, rel=1e-5), task
    if not options:
        assert 0 < expected["tiny_choice"]["acc,none"] < 1 and expected["tiny_write"]["exact_match,none"] == 2 / 3


@needed
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("directory", ["llama"], indirect=True)
def test_the_command_of_the_harness_without_transformers(directory, tasks, tmp_path):
    """python -m lamina.harness: the harness' own command, where transformers cannot be imported."""
    program = WITHOUT_TRANSFORMERS + "import runpy; runpy.run_module('lamina.harness', run_name='__main__')"
    words = f"--model lamina --model_args pretrained={directory},dtype=float32 --include_path {tasks} --batch_size 2"
    words += f" --tasks tiny_choice,tiny_write --limit 5 --output_path {tmp_path}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "|tiny_choice|" in done.stdout and "exact_match" in done.stdout
    (written,) = tmp_path.rglob("results_*.json")
    document = json.loads(written.read_text())
    assert document["config"]["model"] == "lamina" and document["n-samples"]["tiny_write"]["effective"] == 5
    assert document["config"]["model_num_parameters"] > 0 and str(directory.name) in written.parent.name


@needed
@pytest.mark.parametrize("directory", ["llama"], indirect=True)
def test_the_command_of_the_harness_says_in_a_line_what_is_refused(directory, tasks, few_tasks, monkeypatch, capsys):
    from lamina.harness.__main__ import main as harness

    words = f"lm_eval --model lamina --model_args source={directory},dtypes=float32 --tasks {tasks}/tiny_write.yaml"
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    assert harness() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lamina: error: unknown model_args 'dtypes'")


@needed
@pytest.mark.parametrize("directory", ["llama"], indirect=True)
def test_lamina_evaluate_tasks(both, directory, tasks, few_tasks, capsys):
    words = ["evaluate", str(directory), "--tasks", "tiny_choice,tiny_write", "--tasks", "tiny_rolling"]
    words += ["--include-path", str(tasks), "--batch-size", "4", "--limit", "8", "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    expected = results(both[1], tasks, limit=8)
    assert {each["task"] for each in document["tasks"]} == set(TASKS)
    for each in document["tasks"]:
        assert each["value"] == pytest.approx(expected[each["task"]][f"{each['metric']},{each['filter']}"], rel=1e-5)
        assert each["samples"] == 8 and each["shots"] == 0
    assert main([*words[:3], "nothing_of_this_name", *words[6:8]]) == 2
    assert "the harness has no task 'nothing_of_this_name'" in capsys.readouterr().err


# What is refused.


@needed
def test_models_that_do_not_continue_texts_are_refused(tmp_path):
    from lamina.harness.model import HarnessModel

    bert, t5 = tiny.checkpoint(tmp_path / "bert", tiny.BERT), tiny.checkpoint(tmp_path / "t5", tiny.T5)
    with pytest.raises(UnsupportedError, match="does not predict the next token, so the tasks of the harness"):
        HarnessModel(str(bert))
    with pytest.raises(UnsupportedError, match="an encoder-decoder predicts a text from its source, so the tasks"):
        HarnessModel(str(t5))


@needed
@pytest.mark.parametrize(
    "given, said",
    [
        ({"batch_size": "auto"}, "batch_size is 'auto'; it must be a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 65}, "max_length is 65; this model reads 64"),
        ({"trust_remote_code": True}, "'trust_remote_code'"),
        ({"dtypes": "float32"}, "did you mean 'dtype'"),
        ({"pretrained": "x"}, "one of source and pretrained"),
        ({"dtype": "auto"}, "dtype"),
    ],
)
def test_model_args_are_checked(directory, given, said):
    from lamina.harness.model import HarnessModel

    with pytest.raises(LaminaError, match=said):
        HarnessModel(str(directory), **given)


@needed
@pytest.mark.parametrize(
    "given, said",
    [
        ({"repetition_penalty": 1.1}, "'repetition_penalty'"),
        ({"num_beams": 3}, "num_beams is above 1"),
        ({"max_gen_toks": 64}, "max_gen_toks is 64; it must be less than the 64"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_generation_kwargs_are_checked(both, given, said):
    with pytest.raises(LaminaError, match=said):
        both[0].generate_until(asked("generate_until", [("the", {"until": ["a"], **given})]))


@needed
def test_a_continuation_longer_than_the_model_reads_is_refused(both):
    with pytest.raises(LaminaError, match="a continuation has 65 tokens; at most 64 are read"):
        both[0]._loglikelihood_tokens([(None, [1], [2] * 65)])


@needed
def test_sampling_is_asked_for_and_repeats(both):
    wanted = {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 1.5, "top_k": 50}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(both[0].generate_until(asked("generate_until", [("the", wanted), ("cat", wanted)])))
    assert texts[0] == texts[1] != texts[2]


@needed
def test_answers_are_kept_as_they_come(both):
    """`--use_cache`: the harness' hook hears of every answer under the request's own texts."""
    ours, heard = both[0], {}
    hook = type(
        "Hook", (), {"add_partial": lambda self, kind, texts, answer: heard.update({(kind, str(texts)): answer})}
    )
    before, ours.cache_hook = ours.cache_hook, hook()
    wanted = {"until": ["a"], "max_gen_toks": 3}
    try:
        (one,) = ours.loglikelihood(asked("loglikelihood", [("the", " cat")]))
        (two,) = ours.loglikelihood_rolling(asked("loglikelihood_rolling", [("the cat",)]))
        (three,) = ours.generate_until(asked("generate_until", [("the", wanted)]))
    finally:
        ours.cache_hook = before
    assert heard == {
        ("loglikelihood", "('the', ' cat')"): one,
        ("loglikelihood_rolling", "('the cat',)"): two,
        ("generate_until", str(("the", wanted))): three,
    }


@needed
def test_model_args_win_over_the_options_and_cuda_over_nothing(directory, caplog):
    """The harness asks for cuda:0 where nobody says a device; --batch_size yields to model_args."""
    model = get_model("lamina").create_from_arg_string(
        f"source={directory},batch_size=7,dtype=bfloat16", {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    )
    assert model.batch_size == 7 and model.model.embedding.weight.dtype == torch.bfloat16
    assert torch.cuda.is_available() or (model.device.type == "cpu" and "device cuda:0 is not here" in caplog.text)


@needed
def test_a_tokenizer_has_a_name_of_its_own(both):
    assert both[0].tokenizer_name.endswith(f"-{both[0].tokenizer.hash[:16]}") and "/" not in both[0].tokenizer_name


def test_a_missing_harness_is_named(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(tmp_path), "--tasks", "arc_easy"]) == 2
    assert "need the package lm-eval; it is in an extra: pip install 'lamina[eval]'" in capsys.readouterr().err
    program = (
        "import sys, runpy; sys.modules['lm_eval'] = None; runpy.run_module('lamina.harness', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("lamina: error: ") and "lm-eval" in done.stderr


def test_tasks_and_files_do_not_mix(tmp_path, capsys):
    for words, said in (
        (["text", "--tasks", "a"], "--tasks brings its own texts"),
        (["--tasks", "a", "--window", "8"], "--window"),
        (["text", "--limit", "3"], "--limit is for --tasks"),
        (["text", "--chat"], "--chat is for --tasks"),
        (["text", "--batch-size", "3"], "--batch-size is for --tasks"),
        ([], "no FILES and no --tasks"),
    ):
        assert main(["evaluate", str(tmp_path), *words]) == 2
        assert said in capsys.readouterr().err
