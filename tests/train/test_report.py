"""The report of a run: complete in itself, its numbers those of the records, inert whatever a run holds."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import lamina
from lamina.errors import LaminaError
from lamina.families import Fields, family
from lamina.train.curves import LINES, Line, chart, charts, powers, thinned, ticks
from lamina.train.past import duration, find_runs, read_run
from lamina.train.report import compared, report, write_report
from lamina.train.run import Run
from tests import tiny
from tests.pages import HOSTILE, Elements, assert_complete

CONFIG = "seed: {seed}\nmodel:\n  width: 64\n  dropout: {dropout}\ndate: 2026-01-01\n"


def trained(
    directory: Path, steps: int = 100, seed: int = 0, text: str = "Once <b>upon", config: str = CONFIG, speed: int = 1
) -> Run:
    spec = lamina.ModelSpec.to_json(tiny.model(tiny.LLAMA).spec)
    config = config.replace("{seed}", str(seed)).replace("{dropout}", str(seed / 10))
    run = Run(directory, config, command=["lamina", "train", text], spec=spec)
    for step in range(1, steps + 1):
        loss = math.nan if step == 50 else 4.0 / step**0.3 + seed
        run.record(
            {"step": step, "samples": 8 * step, "tokens": 512 * step, "loss": loss, "parts": {}, "rate": 1e-3,
             "gradient_norm": 1.0, "tokens_per_second": 1e3 * speed + step, "utilisation": 0.25, "seconds": step / 2,
             "memory_bytes": 2**30 + step * speed}
        )  # fmt: skip
        if step % 25 == 0:
            run.record({"step": step, "validation": {"loss": 4.5 / step**0.3 + seed, "bits_per_byte": 2.25}})
            run.sample(step, f"{text} at {step}")
    run.warn(f"{text} is odd")
    (run.checkpoints / f"step-{steps}").mkdir(parents=True)
    (run.checkpoints / "step-odd").mkdir()
    run.close()
    return run


def test_it_asks_for_nothing_and_holds_no_script(tmp_path: Path):
    run = trained(tmp_path / "first")
    text = report(read_run(run.directory))
    assert_complete(text)
    elements = Elements(text)
    assert "script" not in {tag for tag, _ in elements.found}
    (policy,) = [a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'none'; base-uri 'none'"
    names = [a["id"] for _, a in elements.found if "id" in a]
    assert len(names) == len(set(names)) > 8


def test_its_numbers_are_those_of_the_records(tmp_path: Path):
    run = trained(tmp_path / "first")
    text = " ".join(Elements(report(read_run(run.directory), {"perplexity": 9.5, "bits_per_byte": 1.25})).text)
    cost = lamina.account(tiny.model(tiny.LLAMA))
    expected = (
        f"{4.0 / 100**0.3:.4f}", f"{4.5 / 100**0.3:.4f}", "51.2 k", "25.0 %", "1.0 GiB", "50.0 s", "1,052",
        f"{cost.parameters:,}", "9.5", "1.25", "2.25", "Once <b>upon at 100", "Once <b>upon is odd", "--resume auto",
        "Checkpoints of steps 100", "seed: 0", "lamina train 'Once <b>upon'", f"torch {torch.__version__}",
    )  # fmt: skip
    for words in expected:
        assert words in text, words
    flops = cost.flops_train_per_token * 51_200
    assert f"{flops / 1e9:#.3g} GFLOP" in text or f"{flops / 1e12:#.3g} TFLOP" in text


def test_what_it_shows_is_inert(tmp_path: Path):
    trained(tmp_path / "a", text=HOSTILE, config=f"a: '{HOSTILE!r}'\n")
    trained(tmp_path / "b", seed=1)
    directory = (tmp_path / "a").rename(tmp_path / "<i>a<")
    for text in (report(read_run(directory), {HOSTILE: HOSTILE}), compared(find_runs([tmp_path]))):
        found = Elements(text)
        assert not {"script", "img", "i"} & {tag for tag, _ in found.found}
        assert_complete(text)
    assert "".join(Elements(report(read_run(directory))).text).count("<script>alert(1)</script>") >= 6


def test_a_run_with_nothing_in_it_has_a_report(tmp_path: Path):
    Run(tmp_path / "empty", "").close()
    path = write_report(tmp_path / "empty")
    text = path.read_text()
    assert "No loss was recorded" in text and "No checkpoint was saved" in text
    (tmp_path / "empty" / "env.json").write_text("[1")
    (tmp_path / "empty" / "config.yaml").write_text("a: [b\n")
    write_report(tmp_path / "empty")
    (tmp_path / "empty" / "spec.json").write_text("{}")
    with pytest.raises(LaminaError, match=r"spec\.json: "):
        write_report(tmp_path / "empty")
    with pytest.raises(LaminaError, match=r"is no run: it has no metrics\.jsonl"):
        read_run(tmp_path)


def test_labels_of_the_axes_stand_on_the_paper(visit, tmp_path: Path):
    """Figures of any size: their labels begin inside of the chart, also where they are long."""
    trained(tmp_path / "a", speed=1_234_567)
    opened = visit(report(read_run(tmp_path / "a")), 1200)
    outside = """() => [...document.querySelectorAll("figure.linear svg.chart text")].filter(text => {
        const [inner, outer] = [text, text.closest("svg")].map(each => each.getBoundingClientRect());
        return inner.left < outer.left || inner.right > outer.right || inner.bottom > outer.bottom; })
        .map(text => text.textContent)"""
    assert opened.evaluate(outside) == []


def test_what_to_do_with_it_is_what_it_can_do(tmp_path: Path):
    """An encoder writes no text."""
    trained(tmp_path / "a")
    text = report(read_run(tmp_path / "a"))
    assert f"lamina train {tmp_path / 'a/config.yaml'} -o {tmp_path / 'a'} --resume auto" in text
    assert "lamina generate " not in text  # a checkpoint has no tokenizer
    (tmp_path / "a/model").mkdir()
    assert f"lamina generate {tmp_path / 'a/model'}" in report(read_run(tmp_path / "a"))
    said = {"model_type": "bert", "num_hidden_layers": 1, "architectures": ["BertForMaskedLM"]}
    (tmp_path / "a/spec.json").write_text(family("bert").spec(Fields(said)).to_json())
    text = report(read_run(tmp_path / "a"))
    assert "lamina generate " not in text and "lamina show " in text


def test_runs_beside_each_other(tmp_path: Path):
    for seed, name in enumerate(("a", "b", "c")):
        trained(tmp_path / name, seed=seed, steps=100 - 10 * seed)
    text = compared(find_runs([tmp_path]))
    assert_complete(text)
    words = " ".join(Elements(text).text)
    for each in ("3 runs compared", "a, training", "c, validation", "model.dropout", "seed", "0.2"):
        assert each in words, each
    assert "model.width" not in words  # it is the same in all
    assert text.count('id="difference-table"') == 1


def points_of(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    paths = [each for each in ET.fromstring(svg).iter() if kind in (each.get("class") or "").split()]
    return [[tuple(map(float, pair.split())) for pair in (each.get("d") or "")[1:].split("L")] for each in paths]


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_chart_draws_the_points(logarithmic: bool):
    points = [(1, 4.0), (10, 2.0), (20, math.nan), (100, 1.0)]
    svg = chart("Loss", [Line("a & b", points)], logarithmic=logarithmic)
    (drawn,) = points_of(svg, "line")
    (x1, y1), (x10, y10), (x100, y100) = drawn
    assert (x1, x100) == (64.0, 692.0) and y1 < y10 < y100  # down the page is lower
    assert (y10 - y1) / (y100 - y1) == pytest.approx(2 / 3, abs=0.01)
    assert (x10 - x1) / (x100 - x1) == pytest.approx(0.5 if logarithmic else 9 / 99, abs=0.001)
    titles = [each.text for each in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")]
    assert "a & b, step 10: 2" in titles and "a & b, step 20: not finite" in titles
    (about,) = [each.text for each in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}desc")]
    assert about == "a & b: 4 at step 1, 1 at step 100, lowest 1 at step 100"
    for _, x, y in re.findall(r'(cx|x)="([\d.]+)" c?y="([\d.]+)"', svg):
        assert 0 <= float(x) <= 720 and 0 <= float(y) <= 320


@pytest.mark.parametrize("points", [[(5, 2.0)], [(1, 3.0), (2, 3.0)], [(0, 0.0), (9, 0.0)], [(7, -1e-12), (8, 1e12)]])
def test_charts_of_odd_lines_are_drawn(points: list[tuple[int, float]]):
    text = charts("x", "what", [Line("a", points), Line("none", []), Line("nan", [(1, math.nan)])])
    assert "nan" not in re.sub(r"<title>.*?</title>", "", text) and text.count("<svg ") == 3
    assert charts("x", "what", [Line("none", []), Line("nan", [(1, math.inf)])]) == ""


def test_thinning_loses_no_spike():
    points = [(step, 100.0 if step == 777 else step % 7 / 10) for step in range(10_000)]
    kept = thinned(points, 200)
    assert len(kept) <= 200 and (777, 100.0) in kept and kept == sorted(kept) and set(kept) <= set(points)
    assert thinned(points[:200], 200) == points[:200]


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 7), (1.95, 2.05), (0, 12_345_678), (1e-9, 3e-9)])
def test_ticks_are_round_and_inside(low: float, high: float):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    assert all(low - 1e-9 * (high - low) <= each <= high + 1e-9 * (high - low) for each in found)
    step = found[1] - found[0]
    assert f"{step:.0e}"[0] in "125" and step == pytest.approx(float(f"{step:.0e}"))


def test_powers_are_inside():
    assert powers(0, 100) == [1, 2, 5, 10, 20, 50, 100]
    assert powers(1, 10**6) == [1, 10, 100, 1000, 10_000, 100_000, 1_000_000]
    assert powers(3, 4) == []


def test_lines_are_seen_on_light_and_dark_paper():
    """Contrast of 3 to 1, as WCAG 2.2 asks of graphics (1.4.11)."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in LINES:
        for paper in ("#f6f8fa", "#161b22"):
            high, low = sorted((light(colour), light(paper)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, paper)


def test_times():
    assert [duration(seconds) for seconds in (0.4, 59.94, 61, 3725)] == ["0.4 s", "59.9 s", "1 min 1 s", "1 h 2 min"]


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_every_screen(visit, tmp_path: Path, width: int, dark: bool):
    trained(tmp_path / "a")
    opened = visit(report(read_run(tmp_path / "a")), width, dark)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.locator("#loss ~ .axes figure.linear").first.is_visible()
    assert not opened.locator("#loss ~ .axes figure.log").first.is_visible()
    opened.locator("label[for=loss-log]").click()
    assert opened.locator("#loss ~ .axes figure.log").first.is_visible()
    assert not opened.locator("#loss ~ .axes figure.linear").first.is_visible()
