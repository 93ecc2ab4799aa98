"""The index of runs, what a page's script draws, and what notebooks show."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_fl as fl
from lightning_fl.cli import main
from lightning_fl.federation.history import History
from lightning_fl.tracking import Run, show_report
from lightning_fl.tracking.report import render
from lightning_fl.tracking.run import to_json, write_file
from tests.helpers.distributed import PATIENCE
from tests.helpers.training import Plain, loader, trainer
from tests.tracking.test_run import write_run


def test_a_folder_of_runs_gets_an_index(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("logs/a/version_0"), [0.5, 0.75, 0.625], num_clients="10", algorithm="FedAvg()")
    last = write_run(Path("logs/<b>/version_0"), [0.25], name="val_loss", algorithm="<script>")
    os.utime(last / "run.json", (2e9, 2e9))
    main(["report", "logs"])
    assert capsys.readouterr().out.splitlines() == [
        "report: logs/<b>/version_0/report.html",
        "all 2 runs: logs/index.html",
    ]
    page = Path("logs/index.html").read_text(encoding="utf-8")
    assert "<td>FedAvg()</td><td>10</td><td>3</td><td>val_acc</td><td>0.625</td><td>0.75</td>" in page
    assert '<a href="./%3Cb%3E/version_0/report.html">' in page  # the other has no page yet
    assert page.count("<a ") == 1
    assert len(re.findall("<script", page)) == 1  # the page's own
    assert "<b>" not in page
    (runs,) = contents(page, "runs")
    assert [run["name"] for run in runs] == ["a/version_0", "<b>/version_0"]
    assert runs[0]["metrics"] == {"val_acc": {"at": [0, 1, 2], "y": [0.5, 0.75, 0.625]}}
    assert "index.html" not in os.listdir("logs/a")
    main(["report", "logs/a"])
    assert "all" not in capsys.readouterr().out


def contents(page: str, kind: str) -> list[Any]:
    """What the page's script draws."""
    return [
        json.loads(unescape(found)) for found in re.findall(rf'data-part="{kind}"[^>]*data-content="([^"]*)"', page)
    ]


def test_a_page_holds_what_its_script_draws_and_may_ask_nobody() -> None:
    page = render(Run.read(write_run(Path("a"), [0.5, math.nan, 0.625])))
    assert contents(page, "curves") == [[{"name": "val_acc", "x": [1, 2, 3], "y": [0.5, None, 0.625]}]]
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=.(?!data:)|@import|url\((?!#)|https?://(?!www.w3.org/2000/svg)", page)
    (many,) = contents(render(Run.read(write_run(Path("many"), [0.5] * 4500))), "curves")
    assert 1000 < len(many[0]["x"]) == len(many[0]["y"]) <= 2001


def browser(page: str, script: str) -> list[str]:
    """What a script that runs in the page, in a browser without a network, writes to ``out``."""
    file = Path("in_browser.html")
    file.write_text(
        page.replace("</body>", f"<script>const out = [];{script};document.title = JSON.stringify(out)</script></body>")
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir=profile", "--dump-dom"]
    found = subprocess.run(
        ["chromium", *flags, file.absolute().as_uri()], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    title = re.search("<title>(.*?)</title>", found.stdout, re.DOTALL)
    assert title
    return json.loads(unescape(title[1]))


MOUSE = """
const svg = document.querySelector(".chart svg"), box = svg.getBoundingClientRect();
svg.setPointerCapture = () => {};
const at = (x, y) => ({clientX: box.left + x * box.width, clientY: box.top + y * box.height});
const mouse = (kind, x, y) => svg.dispatchEvent(new PointerEvent(kind, at(x, y)));
const labels = () => [...svg.querySelectorAll("text[text-anchor=middle]")].map((one) => one.textContent).join(" ");
"""


@pytest.mark.slow
def test_in_a_browser_curves_zoom_clients_are_filtered_and_runs_chosen() -> None:
    run = write_run(Path("logs/a/version_0"), [n / 100 for n in range(100)], algorithm="FedAvg()", num_clients="12")
    rows = [
        {"round": round, "client": f"<b>{client}", "num_examples": 5, "loss": float(client)}
        for round in (0, 1)
        for client in range(12)
    ]
    write_file(run / "clients.jsonl", "".join(to_json(row) + "\n" for row in rows))
    zoom = "out.push(labels()); mouse('pointerdown', .5, .5); mouse('pointermove', .6, .5); mouse('pointerup', .6, .5);"
    back = "out.push(labels()); svg.dispatchEvent(new MouseEvent('dblclick')); out.push(labels());"
    told = "mouse('pointermove', .5, .5); out.push(document.querySelector('.told').textContent);"
    filtered = """
        const part = document.querySelector("[data-part=clients]"), field = part.querySelector("input");
        const names = () => [...part.querySelectorAll("td:nth-child(2)")].map((one) => one.textContent).join();
        out.push(names()); field.value = "b>1, B>7"; field.dispatchEvent(new Event("input")); out.push(names());
        out.push(part.querySelector("p").textContent, String(document.querySelectorAll("main b").length));
    """
    whole, zoomed, again, value, all_names, some_names, note, bold = browser(
        render(Run.read(run)), f"{MOUSE}{zoom}{back}{told}{filtered}"
    )
    assert whole == again == "20 40 60 80 100"
    numbers = [float(number) for number in zoomed.split()]
    assert 40 < numbers[0] < numbers[-1] < 70
    assert re.fullmatch(r"round \d+: val_acc 0\.\d+", value)
    assert all_names.split(",") == [f"<b>{client}" for client in range(11, -1, -1)]
    assert some_names.split(",") == ["<b>11", "<b>10", "<b>7", "<b>1"]
    assert note == "4 of 12 clients."
    assert bold == str(render(Run.read(run)).count("<b>"))  # the cards'; names are text

    write_run(Path("logs/b/version_0"), [0.5] * 100, algorithm="FedProx()", num_clients="12")
    main(["report", "logs"])
    script = """
        const part = document.querySelector("[data-part=runs]"), box = document.querySelector("input[data-run]");
        const shown = () => [part.querySelectorAll(".line").length, part.querySelectorAll("tr").length].join();
        out.push(shown(), part.querySelector("tr:nth-child(2)").textContent); box.click(); out.push(shown());
    """
    both, setting, one = browser(Path("logs/index.html").read_text(), script)
    assert both == "2,2"  # two curves, one setting in which they differ
    assert sorted(re.findall(r"Fed\w+", setting)) == ["FedAvg", "FedProx"]
    assert one == "1,0"  # one run alone differs in nothing


def test_a_notebook_shows_strategy_history_and_report() -> None:
    strategy = fl.FederatedStrategy("fedprox", num_clients=2, local_epochs=3)
    assert "No round has been finished." in strategy._repr_html_()
    record = fl.callbacks.RunRecord("run")
    fit = trainer(strategy, 2, callbacks=[record])
    fit.fit(Plain(), loader(8))
    shown = strategy._repr_html_()
    assert "FedProx(mu=0.01, server_lr=1.0)" in shown
    assert "<tr><td>local_epochs</td><td>3</td></tr>" in shown
    assert "timeout" not in shown  # it has its default
    assert strategy.history._repr_html_() in shown
    assert strategy.history._repr_html_().count("<tr>") == 3
    assert show_report(fit).page[:3000] == show_report("run").page[:3000]  # before the pictures, whose ids differ
    assert show_report("run")._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    with pytest.raises(ValueError, match=r"Give it callbacks=.fl.callbacks.RunRecord\(\)."):
        show_report(L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False))


def test_a_long_history_shows_its_last_rounds_and_escapes_names() -> None:
    history = History({"round": number, "refused": ["<b>"], "seconds": {}} for number in range(30))
    shown = history._repr_html_()
    assert "The last 20 of 30 rounds." in shown
    assert "<td>29</td><td>&lt;b&gt;</td>" in shown
    assert "<b>" not in shown
    assert "seconds" not in shown


def test_several_processes_in_a_notebook_are_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    with pytest.raises(MisconfigurationException, match=r"a notebook is not a script\. Use devices=1"):
        L.Trainer(strategy="fedavg", devices=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    L.Trainer(strategy="fedavg", devices=1, accelerator="cpu", logger=False, enable_checkpointing=False)


def test_compare_writes_the_page_of_the_runs_that_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        write_run(Path(name), [0.5], algorithm=name)
    main(["compare", "a", "b", "--out", "compare.html"])
    assert "page: compare.html" in capsys.readouterr().out
    (runs,) = contents(Path("compare.html").read_text(), "runs")
    assert sorted(run["name"] for run in runs) == ["a", "b"]
