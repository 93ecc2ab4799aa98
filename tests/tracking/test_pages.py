"""The index of runs, values under the mouse, and what notebooks show."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_fl as fl
from lightning_fl.cli import main
from lightning_fl.federation.history import History
from lightning_fl.tracking import Run, show_report
from lightning_fl.tracking.report import render
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
    assert '<a href="&lt;b&gt;/version_0/report.html">' in page  # the other has no page yet
    assert page.count("<a ") == 1
    assert not re.search("<script|<b>", page)
    assert "index.html" not in os.listdir("logs/a")
    main(["report", "logs/a"])
    assert "all" not in capsys.readouterr().out


def test_curves_tell_their_values_under_the_mouse() -> None:
    run = Run.read(write_run(Path("a"), [0.5, 0.75, 0.625]))
    page = render(run)
    strips = re.findall(r'<i style="left: ([\d.]+)%; width: ([\d.]+)%" title="([^"]+)"', page)
    assert [title for *_, title in strips] == [
        f"round {number}\nval_acc {value}" for number, value in enumerate((0.5, 0.75, 0.625), start=1)
    ]
    ends = [float(left) + float(width) for left, width, _ in strips]
    assert [float(left) for left, *_ in strips][1:] == pytest.approx(ends[:-1], abs=0.02)
    assert ends[-1] <= 100
    many = render(Run.read(write_run(Path("many"), [0.5] * 3000)))
    assert 100 < many.count("<i style") <= 250


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
    with pytest.raises(MisconfigurationException, match=r"a notebook is no script\. Use devices=1"):
        L.Trainer(strategy="fedavg", devices=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    L.Trainer(strategy="fedavg", devices=1, accelerator="cpu", logger=False, enable_checkpointing=False)
