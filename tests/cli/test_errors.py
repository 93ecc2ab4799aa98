"""A wrong configuration ends in one line that names the setting, what was found, and what was meant."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightning_fl as fl
from lightning_fl.cli import main
from lightning_fl.cli.command import is_told_in_one_line
from lightning_fl.cli.errors import ConfigurationError, in_one_line
from lightning_fl.cli.words import spell_out_names

STRATEGY = {"class_path": "lightning_fl.FederatedStrategy", "init_args": {"algorithm": "fedavg"}}


@pytest.fixture(autouse=True)
def no_words_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fl"])


def write_config(**trainer: Any) -> str:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
    split = {"data": {"class_path": "DigitsDataModule"}, "partitioner": {"class_path": "IID"}, "num_clients": 2}
    data = {"class_path": "PartitionedDataModule", "init_args": split}
    config = {"trainer": {**quiet, **trainer}, "model": {"class_path": "MLPClassifier"}, "data": data}
    Path("config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return "config.yaml"


CASES = {
    "a value out of range": (
        ["--trainer.strategy.init_args.local_epochs", "-1"],
        "local_epochs=-1 must be a whole number, at least 1.",
    ),
    "an unknown algorithm": (["--trainer.strategy.algorithm", "fedproxx"], "Did you mean 'fedprox'?"),
    "an unknown engine": (
        ["--trainer.strategy.engine", "turbo"],
        "engine='turbo' is not known; expected one of 'auto', 'sequential', 'vectorized'.",
    ),
    "a share above one": (["--trainer.strategy.clients_per_round", "1.5"], "write an int for a count."),
    "a wrong value of an algorithm": (
        ["--trainer.strategy", "fedprox", "--trainer.strategy.algorithm.mu", "-1"],
        "FedProx got mu=-1.0; expected a number that is not negative.",
    ),
    "a setting of another algorithm": (
        ["--trainer.strategy.algorithm.mu", "0.1"],
        "trainer.strategy.algorithm: FedAvg has no setting 'mu'. Its settings: server_lr.",
    ),
    "a type": (["--trainer.max_epochs", "many"], "trainer.max_epochs: expected int or null, found 'many'"),
    "a type inside": (
        ["--trainer.strategy", "fedprox", "--trainer.strategy.algorithm.mu", "x"],
        "trainer.strategy.algorithm.mu: expected float, found 'x'",
    ),
    "a misspelt setting of a class": (
        ["--trainer.strategy.localepochs", "3"],
        "trainer.strategy: FederatedStrategy has no setting 'localepochs'. Did you mean 'local_epochs'?",
    ),
    "a misspelt setting of the Trainer": (
        ["--trainer.max_epoch_s", "3"],
        "There is no setting 'trainer.max_epoch_s'. Did you mean 'trainer.max_epochs'?",
    ),
    "a misspelt part": (["--modle.lr", "3"], "There is no setting 'modle'. Did you mean 'model'?"),
    "a misspelt class": (
        ["--trainer.callbacks+=ClientMetric"],
        "no class is known as 'ClientMetric'; write package.Class. Did you mean 'ClientMetrics'?",
    ),
    "a word for a number": (
        ["--trainer.strategy.local_epochs", "one"],
        "trainer.strategy.local_epochs: expected int or null, found 'one'",
    ),
    "half a pass": (
        ["--trainer.strategy.local_epochs", "1.5"],
        "trainer.strategy.local_epochs: expected int or null, found '1.5'",
    ),
    "one of few words": (
        ["--trainer.strategy.client_optimizer", "resett"],
        "trainer.strategy.client_optimizer: expected one of 'reset', 'keep', found 'resett'",
    ),
    "settings beside their class": (
        ["--trainer.strategy.algorithm", '{"class_path": "FedProx", "mu": 1}'],
        "found {'class_path': 'FedProx', 'mu': 1}; expected {class_path: package.Class, init_args: {NAME: VALUE}}.",
    ),
    "settings below a name": (
        ["--trainer.strategy.algorithm", '{"fedprox": {"mu": 1}}'],
        "found {'fedprox': {'mu': 1}}; expected {class_path: FedProx, init_args: {NAME: VALUE}}.",
    ),
    "a misspelt class in its package": (
        ["--trainer.callbacks+=lightning_fl.callbacks.ClientMetric"],
        "module 'lightning_fl.callbacks' has no class 'ClientMetric'. Did you mean 'ClientMetrics'?",
    ),
    "an abstract class": (
        ["--trainer.strategy.partition", "lightning_fl.datamodules.Partitioner"],
        "trainer.strategy.partition: lightning_fl.datamodules.Partitioner is abstract: it lacks the methods split.",
    ),
    "a class of an unknown name": (
        ["--trainer.strategy.aggregator", "median"],
        "trainer.strategy.aggregator: no class is known as 'median'; write package.Class. Did you mean 'Median'?",
    ),
    "one dash": (
        ["-trainer.max_epochs", "3"],
        "unrecognized arguments: -trainer.max_epochs 3. An option begins with two dashes: --trainer.max_epochs VALUE.",
    ),
    "a file that is not there": (["--config", "nofile.yaml"], "nofile.yaml'"),
    "a checkpoint that is not there": (
        ["--ckpt_path", "best.ckpt"],
        "--ckpt_path best.ckpt does not exist. --ckpt_path last finds the last one below the logger's folder.",
    ),
    "a misspelt strategy": (["--trainer.strategy", "fedproxx"], "Did you mean 'fedprox'?"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.spread(6)
def test_a_mistake_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = CASES[name]
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", write_config(strategy=STRATEGY), *words])
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert len(lines) == 1
    assert lines[0].startswith("lightning-fl: error: ")
    assert lines[0].endswith(expected)


@pytest.mark.parametrize("command", ["fit", "partition"])
def test_a_command_without_a_configuration_says_how_to_get_one(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main([command])
    assert error.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("lightning-fl: error: There is no model. Name a file that has it, --config config.yaml")


def test_traceback_shows_where_it_comes_from() -> None:
    with pytest.raises(ConfigurationError, match="found 'many'"):
        main(["fit", "--config", write_config(strategy=STRATEGY), "--trainer.max_epochs", "many", "--traceback"])


def test_a_misspelt_key_in_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", write_config(strategy="fedavg", max_epoch=3)])
    assert capsys.readouterr().err.endswith(
        "There is no setting 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'?\n"
    )


@pytest.mark.parametrize("text", ["trainer:\n  max_epochs: 3\n\tlogger: false\n", "trainer:\n  max_epochs 3\n  x: 1\n"])
def test_a_file_that_is_not_yaml(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "config.yaml"])
    assert re.fullmatch(r"lightning-fl: error: config.yaml is not YAML: line 3.*\n", capsys.readouterr().err)


def test_only_what_this_package_refuses_needs_no_traceback() -> None:
    with pytest.raises(ValueError, match="at least 1") as own:
        fl.FederatedStrategy("fedavg", clients_per_round=0)
    with pytest.raises(ValueError, match="learning rate") as other:
        torch.optim.SGD([torch.zeros(1)], lr=-1.0)
    assert is_told_in_one_line(own.value)
    assert not is_told_in_one_line(other.value)


def test_a_message_without_a_tree_is_left_as_it_is() -> None:
    assert in_one_line("No such file: config.yaml") == "No such file: config.yaml"


FEDPROX = "lightning_fl.algorithms.fedprox.FedProx"


@pytest.mark.parametrize(
    ("in_file", "words", "expected"),
    [
        (
            "fedavg",
            ["--trainer.strategy=fedprox", "--trainer.strategy.algorithm.mu=0.1"],
            [
                "--trainer.strategy",
                "lightning_fl.FederatedStrategy",
                "--trainer.strategy.algorithm",
                FEDPROX,
                "--trainer.strategy.algorithm.mu",
                "0.1",
            ],
        ),
        (
            "fedprox",
            ["--trainer.strategy.local_epochs", "2"],
            [
                "--trainer.strategy",
                "lightning_fl.FederatedStrategy",
                "--trainer.strategy.algorithm",
                "fedprox",
                "--trainer.strategy.local_epochs",
                "2",
            ],
        ),
        (
            {"class_path": "lightning_fl.FederatedStrategy", "init_args": {"algorithm": "fedprox"}},
            ["--trainer.strategy.algorithm.mu", "0.1"],
            ["--trainer.strategy.algorithm", FEDPROX, "--trainer.strategy.algorithm.mu", "0.1"],
        ),
        ("fedprox", ["--trainer.max_epochs=2"], ["--trainer.max_epochs=2"]),
        ("ddp", ["--trainer.strategy.find_unused", "true"], ["--trainer.strategy.find_unused", "true"]),
        (
            {"class_path": "lightning_fl.FederatedStrategy", "init_args": {"algorithm": {"class_path": "FedProx"}}},
            ["--trainer.strategy.algorithm.mu", "0.1"],
            ["--trainer.strategy.algorithm.mu", "0.1"],
        ),
    ],
)
def test_settings_may_follow_a_name(in_file: Any, words: list[str], expected: list[str]) -> None:
    config = ["fit", "--config", write_config(strategy=in_file)]
    assert spell_out_names([*config, *words]) == [*config, *expected]


CONFIG = "# a comment of the user's\n"


def test_the_users_configuration_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write_config(strategy="fedavg", logger=False))
    path.write_text(CONFIG + path.read_text(encoding="utf-8"), encoding="utf-8")
    before = path.read_text(encoding="utf-8")
    main(["fit", "--config", str(path), "--trainer.fast_dev_run", "true"])
    main(["fit", "--config", str(path)])
    assert path.read_text(encoding="utf-8") == before


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_the_configuration_is_saved_in_the_runs_folder_and_not_over_the_one_that_was_read() -> None:
    settings = {"save_dir": ".", "name": "", "version": ""}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": settings}
    path = Path(write_config(strategy="fedavg", logger=logger))
    before = path.read_text(encoding="utf-8")
    main(["fit", "--config", str(path)])
    assert path.read_text(encoding="utf-8") == before
    main(["fit", "--config", str(path), "--trainer.logger.init_args.name", "run"])
    saved = yaml.safe_load(Path("run/config.yaml").read_text(encoding="utf-8"))
    assert saved["trainer"]["strategy"] == "fedavg"
