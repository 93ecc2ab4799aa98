"""A new user's first minutes: init, partition, fit, report, compare, silos."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lightning_fl.cli import main
from lightning_fl.tracking import Run
from tests.helpers.distributed import run_script


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lightning-fl"])
    main(["init", "first"])
    monkeypatch.chdir("first")
    yield Path(".")
    for name in ("model", "data"):
        sys.modules.pop(name, None)


class Page(HTMLParser):
    """Everything that a page would load from elsewhere, and its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.headings: list[str] = []
        self.in_heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe", "object")
        assert tag != "script" or not attrs  # its own, and nothing that is loaded
        self.in_heading = tag == "h2"
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        if self.in_heading:
            self.headings.append(data)
            self.in_heading = False


def test_from_an_empty_folder_to_a_report(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["partition", "--config", "config.yaml"])
    printed = capsys.readouterr().out
    assert re.search(r"north +│ +144 │ 116 │ 28", printed)
    assert "label skew: 0.22 (" in printed
    assert Path("partition.png").read_bytes().startswith(b"\x89PNG")
    assert not Path("logs").exists()

    main(["fit", "--config", "config.yaml", "--trainer.max_epochs", "3"])
    assert "A page about this run: lightning-fl report logs/sites/version_0" in capsys.readouterr().out
    central = ["--trainer.strategy", "auto", "--trainer.logger.name", "central"]
    main(["fit", "--config", "config.yaml", "--trainer.max_epochs", "3", *central])
    federated, baseline = Run.read("logs/sites"), Run.read("logs/central")
    assert federated.facts["command"] == "lightning-fl fit --config config.yaml --trainer.max_epochs 3"
    # The last batch of each of four sites is not full.
    assert (federated.total("num_steps"), baseline.total("num_steps")) == (3 * 21, 3 * 20)
    assert {row["client"] for row in federated.clients} == {"north", "east", "south", "west"}
    assert all(0 <= row["train_acc"] <= 1 for row in federated.clients)

    capsys.readouterr()
    main(["compare", "logs/sites", "logs/central", "--target", "0.1"])
    printed = capsys.readouterr().out
    assert re.search(r"central +centralised +3 ", printed)
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")

    main(["report", "logs/sites", "--out", "page.html"])
    text = Path("page.html").read_text()
    page = Page()
    page.feed(text)
    assert all(place.startswith("data:image/svg+xml;base64,") for place in page.loaded)
    assert len(page.loaded) == 10  # loss and accuracy, twice; two heat maps, partition, norm, spread, phases
    assert page.headings == [
        "Metrics of the global model",
        "Local training",
        "Clients, round by round",
        "Who has what",
        "Updates, time and traffic",
        "Settings",
        "Do it again",
    ]
    assert "lightning-fl fit --config config.yaml --trainer.max_epochs 3" in text
    capsys.readouterr()
    for command in ("test", "predict"):
        main([command, "--config", "config.yaml", "--ckpt_path", "last", "--trainer.logger.name", "sites"])
    printed = capsys.readouterr().out
    assert printed.count("checkpoint: logs/sites/version_0/checkpoints/last.ckpt") == 2
    predictions = torch.load("logs/sites/version_2/predictions.pt", weights_only=True)
    assert predictions.shape == (102,)
    assert predictions.min() >= 0
    (row,) = Run.read("logs/sites/version_0").evaluations
    assert row["what"] == "test"
    assert 0.5 < row["metrics"]["test_acc"] <= 1
    main(["report", "logs/sites/version_0"])
    assert "test_acc" in Path("logs/sites/version_0/report.html").read_text()

    main(["report", "logs/central", "--out", "central.html"])
    assert "no clients: a centralised run" in Path("central.html").read_text()


def test_without_a_last_checkpoint_nothing_starts(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "config.yaml", "--ckpt_path", "last"])
    assert "error: --ckpt_path last found no checkpoint below logs/sites." in capsys.readouterr().err


def test_nothing_is_overwritten(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in list(project.iterdir()):
        if path.name != "model.py":
            path.unlink()
    Path("model.py").write_text("mine")
    with pytest.raises(SystemExit) as error:
        main(["init"])
    assert error.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lightning-fl: error: . already has model.py.")
    assert [path.name for path in project.iterdir()] == ["model.py"]
    assert Path("model.py").read_text() == "mine"


@pytest.mark.slow
def test_the_silo_script_trains(project: Path) -> None:
    environ = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = run_script(["sh", "silos.sh", "--trainer.max_epochs", "2"], env=environ, num_processes=5)
    assert "A page about this run: lightning-fl report logs/silos/version_0" in done.stdout
    run = Run.read("logs/silos")
    assert run.settings["clients"] == "silos"
    assert [row["num_clients"] for row in run.rounds] == [4, 4]
    assert run.facts["command"] == (
        "torchrun --standalone --nproc_per_node 4 -m lightning_fl fit --config silos.yaml --trainer.max_epochs 2"
    )
