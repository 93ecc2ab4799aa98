"""Answers about data as a page, and in the report of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lightning_fl.analytics import PCA, By, Cox, Frequency, Histogram, KaplanMeier, Mean, Variance, analyze
from lightning_fl.cli import main
from lightning_fl.tracking import Run
from lightning_fl.tracking.answer_plots import NORMAL_95, bars_figure, intervals_figure, survival_figure
from lightning_fl.tracking.answers import content_of
from lightning_fl.tracking.report import render
from tests.tracking.test_run import write_run

LUNG = Path(__file__).parents[2] / "examples" / "lung.csv"


def test_every_kind_of_answer_is_drawn_with_its_figures() -> None:
    lung, sexes = pd.read_csv(LUNG), ("1", "2")
    questions = [
        By(KaplanMeier("time", "status", grid=(150, 300, 450, 1200)), "sex", sexes),
        Frequency("sex", sexes),
        Histogram("age", (30, 50, 60, 70, 90)),
        By(Variance("age"), "sex", sexes),
        Cox("time", "status", ("age", "sex")),
        PCA(("age", "time"), 2),
    ]
    shown = content_of(analyze(questions, lung, client="inst").to_dict())
    captions = re.findall("<figcaption>([^<]+)", shown)
    assert [caption.partition("(")[0] for caption in captions] == [
        "KaplanMeier", "Frequency", "Histogram", "Variance", "Cox", "PCA"
    ]  # fmt: skip
    assert "<td>Frequency(sex)</td><td>all</td><td>228</td><td>1</td><td>138</td>" in shown
    assert "coef 0.0170453, se 0.0092" in shown
    assert "19 clients answered with" in shown


def test_what_is_withheld_is_named_and_not_drawn() -> None:
    few = pd.DataFrame({"x": ["a"] * 20 + ["b"] * 20 + ["c"] * 3, "y": range(43)})
    found = analyze([Frequency("x", ("a", "b", "c")), By(Mean("y"), "x", ("a", "b", "c"))], few).to_dict()
    shown = content_of(found)
    assert shown.count("<figure>") == 2
    assert "withheld" in shown
    assert ">3<" not in shown
    nothing = content_of({**found, "answers": [{"question": "Mean(y)", "withheld": "few rows"}]})
    assert "few rows" in nothing
    assert "<figure>" not in nothing


def test_the_figures_show_the_numbers() -> None:
    curve = {"time": [1.0, 2.0], "share": [0.75, 0.5], "se": [0.1, 0.2]}
    axes = survival_figure({"all": curve}, "days").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 1], [1, 0.75], [2, 0.5]]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.5 - NORMAL_95 * 0.2)
    bars = bars_figure({"a": 3.0, "b": None}, "rows").axes[0]
    assert [bar.get_width() for bar in bars.patches] == [3, 0]
    assert [text.get_text() for text in bars.get_yticklabels()] == ["a", "b (withheld)"]
    ratios = intervals_figure({"age": (0.0, 1.0)}, "ratio", 1.0, log=True).axes[0]
    ends = ratios.collections[0].get_segments()[0][:, 0]
    assert ends.tolist() == pytest.approx([1 / 7.0987, 7.0987], rel=1e-4)


def test_the_command_writes_a_page_and_a_run_shows_the_answers(capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(Path("logs/a/version_0"), [0.5])
    assert "Questions about the data" not in render(Run.read(run))
    words = ["--frequency", "sex", "--report", "answers.html", "--json", str(run / "answers.json")]
    main(["analyze", str(LUNG), "--client", "inst", *words])
    assert "report: answers.html" in capsys.readouterr().out
    page = Path("answers.html").read_text(encoding="utf-8")
    section = render(Run.read(run))
    for shown in (page, section):
        assert "<td>Frequency(sex)</td>" in shown
    assert page.startswith("<!doctype html>")


def test_names_in_answers_are_no_markup() -> None:
    evil = "<script>alert(1)</script>"
    answers: dict[str, Any] = {"clients": 1, "sums": 1, "answers": [{"question": evil, "n": 9, "parts": {evil: 9}}]}
    assert "<script" not in content_of(answers)


@pytest.mark.parametrize("content", ["no json", "[]", json.dumps({"answers": [1]}), json.dumps({"answers": [{}]})])
def test_another_file_is_no_answers(content: str) -> None:
    run = write_run(Path("run"), [0.5])
    (run / "answers.json").write_text(content)
    with pytest.raises(ValueError, match="holds no answers of lightning-fl analyze"):
        render(Run.read(run))
