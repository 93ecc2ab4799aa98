"""The answers of federated analytics as tables and plots: a separate page, and a section of a run's report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from lightning_fl.tracking import answer_plots, markup, plots
from lightning_fl.tracking.answer_plots import is_number
from lightning_fl.tracking.run import write_file

ANSWERS_FILE = "answers.json"
"""The file in a run's folder that ``lightning-fl analyze --json`` writes."""
MAX_NUMBERS = 8

Answers = Mapping[str, Any]
"""The result of ``Analysis.to_dict()``."""


def read_answers(path: Path) -> Answers:
    """Reads answers from a file.

    Raises:
        ValueError: If the file has another format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(answer, dict) and "question" in answer for answer in found["answers"]):
            raise ValueError("an answer lacks its question")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no answers of lightning-fl analyze: {error}.") from error
    return dict(found)


def write_page(answers: Answers, path: Path) -> None:
    """Writes a page with the answers only."""
    title = "Questions about the data"
    content = markup.section(f"{answers['clients']} clients", content_of(answers))
    write_file(path, markup.page(title, f"<h1>{title}</h1>\n{content}"))


def content_of(answers: Answers) -> str:
    """The answers as a table, and as plots where possible."""
    rows = []
    images = []
    for answer in answers["answers"]:
        title = str(answer["question"])
        for cells in _rows(answer):
            rows.append([title, *cells])
            title = ""
        if plots.is_available():
            images += list(_images(answer))
    clients, sums = answers.get("clients", "?"), answers.get("sums", "?")
    words = f"{clients} clients answered with {sums} sums; no row left its client."
    if answers.get("epsilon") is not None:
        words += f" Epsilon at most {markup.number(answers['epsilon'])} at delta {answers['delta']:.3g}, for one row."
    table = markup.table(["question", "of", "rows", "figure", "answer"], rows)
    return f"<p>{escape(words)}</p>{markup.figures(images)}{table}"


def _rows(answer: Mapping[str, Any], of: str = "all") -> Iterator[list[str]]:
    if "withheld" in answer:
        yield [of, "", "withheld", str(answer["withheld"])]
        return
    rows = _text(answer.get("n"))
    for name, value in answer.items():
        if name not in ("question", "n", "parts"):
            yield [of, rows, name, _text(value)]
            of = rows = ""
    for name, part in answer.get("parts", {}).items():
        if isinstance(part, dict) and ("n" in part or "withheld" in part):
            yield from _rows(part, name)
        elif name != "curve":
            yield [of, rows, name, _text(part)]
            of = rows = ""


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        more = f", ... ({len(value)})" if len(value) > MAX_NUMBERS else ""
        return ", ".join(map(_text, value[:MAX_NUMBERS])) + more
    return f"{value:.6g}" if is_number(value) else "-" if value is None else str(value)


def _images(answer: Mapping[str, Any]) -> Iterator[str]:
    question, parts = str(answer["question"]), dict(answer.get("parts", {}))
    groups = {name: part for name, part in parts.items() if isinstance(part, dict) and "withheld" not in part}
    inner = {name: part.get("parts", {}) for name, part in groups.items()}
    curves = {
        name: found["curve"] for name, found in {"all": parts, **inner}.items() if "time" in found.get("curve", ())
    }
    if curves:
        time = question.partition("(")[2].partition(",")[0]
        caption = f"{question}: share without an event, and its 95% interval"
        yield markup.image(answer_plots.survival_figure(curves, time), caption)
    elif any(map(is_number, parts.values())) and parts.keys() != {"events"}:
        counts = {name: part if is_number(part) else None for name, part in parts.items()}
        yield markup.image(answer_plots.bars_figure(counts, "rows"), question)
    means = {
        name: (part["mean"], (part.get("std") or 0.0) / math.sqrt(max(part["n"], 1)))
        for name, part in groups.items()
        if is_number(part.get("mean"))
    }
    if means:
        yield markup.image(answer_plots.intervals_figure(means, "mean"), question)
    if isinstance(answer.get("explained"), list):
        shares = {f"component {place}": share for place, share in enumerate(answer["explained"], start=1)}
        yield markup.image(answer_plots.bars_figure(shares, "share of the variance"), question)
    ratios = {
        name: (value["coef"], value["se"])
        for name, value in answer.items()
        if isinstance(value, dict) and "hazard ratio" in value
    }
    if ratios:
        caption = f"{question}: hazard ratios with 95% intervals"
        yield markup.image(answer_plots.intervals_figure(ratios, "hazard ratio", reference=1.0, log=True), caption)
