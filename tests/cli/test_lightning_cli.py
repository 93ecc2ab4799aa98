from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import FedAvg, Scaffold
from lightning_fl.cli import FederatedCLI, check_strategy_name, federated_strategy_names, main, recipes_directory
from lightning_fl.cli.main import RUNS
from lightning_fl.cli.run_help import HELP_ALL
from lightning_fl.models import MLPClassifier
from tests.helpers.distributed import run_script

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}


@pytest.fixture(autouse=True)
def no_words_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fl"])


def write_config(**trainer: Any) -> str:
    config = {
        "trainer": {**QUIET, **trainer},
        "model": {"class_path": "MLPClassifier", "init_args": {"hidden": [8]}},
        "data": {
            "class_path": "PartitionedDataModule",
            "init_args": {
                "data": {"class_path": "DigitsDataModule"},
                "partitioner": {"class_path": "Dirichlet", "init_args": {"alpha": 1.0}},
                "num_clients": 2,
            },
        },
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    return "run.yaml"


def test_a_registered_name_is_a_strategy() -> None:
    cli = FederatedCLI(["fit", "--config", write_config(), "--trainer.strategy", "scaffold"])
    assert isinstance(cli.trainer.strategy, FederatedStrategy)
    assert cli.trainer.strategy.algorithm == Scaffold()
    assert cli.trainer.current_epoch == 1


def test_yaml_gives_the_strategy_its_arguments_by_short_class_names() -> None:
    algorithm = {"class_path": "FedAvg", "init_args": {"server_lr": 0.5}}
    strategy = {
        "class_path": "lightning_fl.FederatedStrategy",
        "init_args": {"algorithm": algorithm, "local_epochs": 2},
    }
    config = write_config(strategy=strategy)
    trainer = FederatedCLI(["fit", "--config", config]).trainer
    assert isinstance(trainer.strategy, FederatedStrategy)
    assert trainer.strategy.algorithm == FedAvg(server_lr=0.5)
    num_steps = trainer.global_step
    words = ["--trainer.strategy.local_epochs", "1", "--trainer.strategy.algorithm.server_lr", "0.25"]
    trainer = FederatedCLI(["fit", "--config", config, *words]).trainer
    assert trainer.strategy.algorithm == FedAvg(server_lr=0.25)
    assert num_steps == 2 * trainer.global_step


def test_the_same_yaml_without_a_federation_is_the_centralised_baseline() -> None:
    trainer = FederatedCLI(["fit", "--config", write_config(strategy="fedavg"), "--trainer.strategy", "auto"]).trainer
    assert not isinstance(trainer.strategy, FederatedStrategy)
    assert trainer.global_step == trainer.num_training_batches == 45  # 1437 digits in batches of 32


def test_a_saved_configuration_runs_again_to_the_same_weights() -> None:
    first = FederatedCLI(["fit", "--config", write_config(strategy="fedavg")])
    again = FederatedCLI(["fit", "--config", f"{first.trainer.log_dir}/config.yaml"])
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_callbacks_may_be_one_callback() -> None:
    config = write_config(strategy="fedavg", callbacks={"class_path": "lightning.pytorch.callbacks.ModelSummary"})
    assert FederatedCLI(["fit", "--config", config]).trainer.current_epoch == 1


class Ragged(MLPClassifier):
    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.zeros(2, 3 + batch_idx % 2)


def test_predictions_of_different_shapes_are_saved_as_a_list() -> None:
    write_config(logger=False)
    main(["predict", "--config", "run.yaml", "--model", f"{__name__}.Ragged"])
    assert {tuple(batch.shape) for batch in torch.load("predictions.pt")} == {(2, 3), (2, 4)}


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.spread(1)
def test_a_checkpoint_is_evaluated(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(strategy="fedavg", logger=False)
    trainer = FederatedCLI(["fit", "--config", config]).trainer
    checkpoint = trainer.checkpoint_callback
    assert checkpoint is not None
    main([command, "--config", config, "--ckpt_path", checkpoint.best_model_path])
    if command != "predict":
        assert f"{'val' if command == 'validate' else command}_acc" in capsys.readouterr().out


def test_an_unknown_strategy_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", write_config(), "--trainer.strategy", "fedvag"])
    assert error.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("lightning-fl: error: Unknown strategy 'fedvag'; expected one of ")
    assert "fedavg, " in line
    assert line.endswith("Did you mean 'fedavg'?")


def test_only_the_first_process_of_a_machine_tells_of_an_unknown_strategy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        main(["fit", "--config", write_config(), "--trainer.strategy", "fedvag"])
    assert "Unknown strategy" not in capsys.readouterr().err


def test_registered_names_are_known() -> None:
    assert {"fedavg", "scaffold"} <= set(federated_strategy_names())
    assert "ddp" not in federated_strategy_names()
    for strategy in ("auto", "ddp", "FedAvg", FederatedStrategy()):
        check_strategy_name(strategy)


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    assert str(recipes_directory() / "digits_fedavg.yaml") in capsys.readouterr().out


def test_the_package_runs_as_a_module() -> None:
    assert "\n  validate " in run_script(["python", "-m", "lightning_fl", "--help"]).stdout


def test_the_short_help_names_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for name in RUNS:
        main([name, "--config", "run.yaml", "--help"])
        short = capsys.readouterr().out
        with pytest.raises(SystemExit):
            main([name, HELP_ALL])
        whole = capsys.readouterr().out
        assert len(whole) > 3 * len(short)
        named = set(re.findall(r"--[a-z][\w.-]*\w", short)) - {HELP_ALL, "--standalone", "--nproc_per_node"}
        assert {"--config", "--ckpt_path", "--trainer.accelerator"} <= named
        for option in named:
            start = "--trainer.strategy."
            if option.startswith(start) and not option.endswith(".help"):
                setting = option.removeprefix(start).partition(".")[0]
                assert setting in inspect.signature(FederatedStrategy).parameters
            elif option not in ("--model.lr", "--model.NAME", "--data.NAME"):
                assert option in whole, option


def test_a_dry_run_shows_clients_and_cost_and_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = FederatedCLI(["fit", "--config", write_config(), "--trainer.strategy", "scaffold", "--dry-run"]).trainer
    printed = " ".join(capsys.readouterr().out.split())
    assert trainer.global_step == 0
    assert "2 simulated clients, 2 in a round" in printed
    assert "Scaffold(server_lr=1.0, option=2)" in printed
    assert "4 with 0.00 MB" in printed
    assert trainer.strategy.history == []


def test_a_dry_run_of_a_plain_strategy_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="DryRun needs a federated strategy, found SingleDevice"):
        FederatedCLI(["fit", "--config", write_config(), "--trainer.strategy", "auto", "--dry-run"])
