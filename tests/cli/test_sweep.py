"""Which runs a sweep makes, what it leaves, and that it goes on; training itself is real in the slow tests."""

from __future__ import annotations

import csv
import json
import re
import statistics
from pathlib import Path

import pytest

from lightning_fl.cli import main, recipes_directory, sweep_runs
from lightning_fl.cli.sweep_runs import SweepRun, folder_name, grid, parse_choices
from lightning_fl.tracking import Run
from tests.tracking.test_run import write_run


class Trainings:
    """Stands in for the processes that train: a run's accuracy is a function of its settings and seed."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.breaks: set[str] = set()
        self.modes: dict[str, str] = {}

    def __call__(self, run: SweepRun, threads: int) -> None:
        self.trained.append(str(run))
        if str(run) in self.breaks:
            raise ValueError("the last line of its output")
        lr = float(run.point.get("model.lr", 0.5))
        write_run(run.folder, [0.1, 0.9 - (lr - 0.3) ** 2 + run.seed / 100], algorithm=run.point.get("a", "FedAvg()"))
        facts = json.loads((run.folder / "run.json").read_text())
        (run.folder / "run.json").write_text(json.dumps({**facts, "modes": self.modes}))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    found = Trainings()
    monkeypatch.setattr(sweep_runs, "train", found)
    Path("config.yaml").write_text("seed_everything: 0\n")
    return found


SWEEP = ["sweep", "--config", "config.yaml"]


def test_a_grid_is_trained_with_each_seed_and_compared(
    trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SWEEP, "--vary", "model.lr=0.1,0.3", "--vary", "a=x,y", "--seeds", "0,1,2", "--jobs", "2"]
    main([*words, "--format", "csv"])
    printed = capsys.readouterr().out
    assert sorted(trainings.trained) == sorted(
        f"lr={lr}, a={a}, seed {seed}" for lr in (0.1, 0.3) for a in "xy" for seed in range(3)
    )
    text = Path("sweep/table.csv").read_text()
    assert text in printed.replace("\r\n", "\n") or text.replace("\r\n", "\n") in printed.replace("\r\n", "\n")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["run"] for row in rows] == [f"lr={lr}, a={a}" for lr in (0.1, 0.3) for a in "xy"]
    values = [0.9 - 0.04 + seed / 100 for seed in range(3)]
    assert rows[0]["last val_acc"] == f"{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}"
    assert rows[0]["runs"] == "3"
    assert r"0.87 $\pm$ 0.01" in Path("sweep/table.tex").read_text()
    assert Path("sweep/table.md").read_text().startswith("| run | algorithm | runs |")
    assert Path("sweep/curves.png").read_bytes().startswith(b"\x89PNG")
    assert Path("sweep/index.html").read_text().count("data-run ") == 12


def test_a_sweep_goes_on_grows_and_survives_a_run_that_fails(
    trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings.breaks = {"0.3, seed 1"}
    words = [*SWEEP, "--vary", "model.lr=0.1,0.3", "--seeds", "0,1"]
    main(words)
    assert "4/4 0.3, seed 1: failed: the last line of its output" in capsys.readouterr().out
    assert "| 0.3 | FedAvg | 1 |" in Path("sweep/table.md").read_text()
    trainings.breaks = set()
    trainings.trained.clear()
    write_run(Path("sweep/0.1/seed_0"), [0.1])  # as a run that was killed, whose record does not say finished
    facts = Path("sweep/0.1/seed_0/run.json")
    facts.write_text(facts.read_text().replace("finished", "running"))
    main([*words[:-1], "0,1,2"])
    assert trainings.trained == ["0.1, seed 0", "0.3, seed 1", "0.1, seed 2", "0.3, seed 2"]
    assert "| 0.3 | FedAvg | 3 |" in Path("sweep/table.md").read_text()
    trainings.breaks = {"as configured, seed 0"}
    with pytest.raises(SystemExit):
        main([*SWEEP, "--out", "other"])
    assert "No run has finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seeds", "0,0"], "whole numbers, each once"),
        (["--jobs", "0"], "must be at least 1"),
        (["--vary", "model.lr"], "names no values to try"),
        (["--vary", "model.lr=1,1"], "without duplicates"),
        (["--seed_everything", "3"], "set by the sweep itself"),
        (["--trainer.logger=false"], "set by the sweep itself"),
        (["--trials", "3"], "give --tune"),
        (["--tune", "a=1:2", "--vary", "b=1,2"], "not both"),
        (["--tune", "a=1:2"], "give --metric"),
        (["--tune", "a=1:2", "--metric", "val_x"], "give --mode max or --mode min"),
        (["--tune", "a=2:1", "--metric", "val_acc"], "is not a range"),
        (["--tune", "a=0:1:log", "--metric", "val_acc"], "is not a range"),
        (["--config", "nowhere.yaml"], "There is no file nowhere.yaml"),
        (["--out", "full"], "is a folder with other files"),
    ],
)
def test_wrong_options_are_one_line(
    trainings: Trainings, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("full").mkdir()
    Path("full/thesis.tex").touch()
    with pytest.raises(SystemExit):
        main([*SWEEP, *words])
    assert sentence in capsys.readouterr().err
    assert not trainings.trained


def test_runs_of_another_sweep_are_never_taken_for_ones_own(
    trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    main(SWEEP)
    for change in ("option", "file"):
        if change == "file":
            Path("config.yaml").write_text("seed_everything: 0\ntrainer: {max_epochs: 3}\n")
        with pytest.raises(SystemExit):
            main([*SWEEP, *(["--trainer.max_epochs", "9"] if change == "option" else [])])
        assert "holds the runs of another sweep" in capsys.readouterr().err


def test_the_same_sweep_does_not_run_twice_at_once(trainings: Trainings, capsys: pytest.CaptureFixture[str]) -> None:
    with sweep_runs.claimed(Path("sweep"), SWEEP[1:]), pytest.raises(SystemExit):
        main(SWEEP)
    assert "Another process runs this sweep in sweep" in capsys.readouterr().err
    assert not trainings.trained
    main(SWEEP)
    assert trainings.trained


def test_values_may_hold_commas_and_every_point_has_its_folder() -> None:
    assert parse_choices("--model.hidden=[[16], [32, 8]]") == ("model.hidden", ["[16]", "[32, 8]"])
    assert parse_choices("trainer.limit=[null, 2, true]") == ("trainer.limit", ["null", "2", "true"])
    points = grid(
        dict([parse_choices("model.hidden=[[16], [32, 8], [328]]"), parse_choices("config=a/b.yaml,a_b.yaml")])
    )
    names = {folder_name(point) for point in points}
    assert len(names) == 6
    assert all(re.fullmatch(r"[\w.,=+-]+", name) for name in names)
    assert folder_name({"a": "x" * 300}) != folder_name({"a": "x" * 301})


def test_optuna_finds_the_best_and_goes_on_where_it_was_stopped(
    trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SWEEP, "--tune", "model.lr=0.01:10:log", "--metric", "val_acc", "--seeds", "0,1", "--trials"]
    main([*words, "3"])
    first = list(trainings.trained)
    assert len(first) == 6
    main([*words, "12"])
    assert trainings.trained[:6] == first
    assert len(set(trainings.trained)) == len(trainings.trained) == 24  # none twice, and no number drawn again
    best = re.findall(r"best: (\S+)", capsys.readouterr().out)[-1]
    tried = {float(name.split(",")[0]) for name in trainings.trained}
    assert float(best) == min(tried, key=lambda lr: (lr - 0.3) ** 2)
    assert abs(float(best) - 0.3) < 0.25
    assert next(csv.DictReader(Path("sweep/table.csv").read_text().splitlines()))["run"] == best
    main([*words, "12"])
    assert len(trainings.trained) == 24


def test_a_declared_mode_decides_what_is_the_best(trainings: Trainings, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SWEEP, "--tune", "model.lr=0.2,3.0", "--metric", "val_acc", "--trials", "4"]
    main([*words, "--mode", "min"])
    assert re.findall(r"best: (\S+)", capsys.readouterr().out) == ["3.0"]
    assert "lowest" in Path("sweep/table.csv").read_text()
    trainings.modes = {"val_acc": "min"}
    with pytest.raises(SystemExit):
        main([*words, "--seeds", "7"])
    assert "the runs' ModelCheckpoint has the other mode. Give --mode" in capsys.readouterr().err


@pytest.mark.slow
def test_real_runs_are_those_of_fit_and_one_that_fails_tells_why(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(recipes_directory() / "digits_fedavg.yaml")
    brief = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2"]
    words = ["sweep", "--config", recipe, *brief, "--vary", "trainer.strategy=fedavg,nonsense", "--seeds", "0,1"]
    main([*words, "--jobs", "2"])
    printed = capsys.readouterr().out
    assert re.search(r"nonsense, seed 0: failed: .*Unknown strategy 'nonsense'.*output.txt", printed)
    main(["fit", "--config", recipe, *brief, "--seed_everything", "1"])
    own, other = Run.read("sweep/fedavg/seed_1"), Run.read("logs")
    assert [row["metrics"] for row in own.rounds] == [row["metrics"] for row in other.rounds]
    assert own.rounds[0]["metrics"] != Run.read("sweep/fedavg/seed_0").rounds[0]["metrics"]
