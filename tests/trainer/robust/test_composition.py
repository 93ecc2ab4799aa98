"""Robust rules beside the rest of the framework: what the table of test_table.py leaves out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

import lightning_fl as fl
from lightning_fl.aggregation import (
    Aggregator,
    Bucketing,
    Bulyan,
    CenteredClipping,
    FLTrust,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    NormBound,
    NormCheck,
    Screened,
    TrimmedMean,
)
from lightning_fl.cli import FederatedCLI
from lightning_fl.tracking import Run
from lightning_fl.tracking.report import render
from tests.helpers.training import Ordinary, image_clients, images, minimise, quadratic_clients, trainer, weights
from tests.trainer.robust.test_table import RULES

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
SIZES = (4, 7, 23, 8, 5, 6, 9)


def fit(
    rule: Aggregator,
    algorithm: str = "fedavg",
    rounds: int = 2,
    sizes: Sequence[int] = SIZES,
    kind: type[Ordinary] = Ordinary,
    **strategy: Any,
) -> tuple[Ordinary, Any]:
    module = kind()
    run = trainer(fl.FederatedStrategy(algorithm, aggregator=rule, seed=0, **strategy), rounds)
    run.fit(module, image_clients(sizes, validate=True))
    return module, run.strategy


def fit_on_ranks(name: str, algorithm: str) -> list[float]:
    return weights(fit(RULES[name], algorithm, engine="sequential")[0]).tolist()


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [("`Krum`", "fedavg"), ("`TrimmedMean` before `NearestNeighborMixing`", "fedavg"), ("`Bulyan`", "fedavg")],
)
@pytest.mark.spread(1)
def test_ranks_give_the_same_model(run_ranks: Any, name: str, algorithm: str) -> None:
    alone = fit_on_ranks(name, algorithm)
    ranks = run_ranks(2, fit_on_ranks, name, algorithm)
    assert ranks[0] == ranks[1]
    torch.testing.assert_close(torch.tensor(ranks[0]), torch.tensor(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["scaffold", "mimelite", "fednova"])
def test_a_rule_that_takes_all_changes_nothing(algorithm: str) -> None:
    models = [
        minimise(
            fl.FederatedStrategy(algorithm, aggregator=rule, local_steps=5, weighting="uniform"), 5, quadratic_clients()
        )
        for rule in (None, MultiKrum(0))
    ]
    assert models[1] == pytest.approx(models[0], rel=1e-12)


@every_rule
def test_a_weighting_that_would_be_ignored_is_refused(rule: Aggregator) -> None:
    with pytest.raises(ValueError, match=r"weighting='examples' would be ignored"):
        fl.FederatedStrategy("fedavg", aggregator=rule, weighting="examples")
    assert fl.FederatedStrategy("fedavg", aggregator=rule, weighting="uniform").weighting == "uniform"


@pytest.mark.parametrize(
    ("rule", "num_clients", "needed"),
    [(Krum(2), 6, 7), (Bulyan(1), 6, 7), (Median(3), 6, 7), (Median(1, [Bucketing(3)]), 6, 3), (MultiKrum(0, 9), 6, 9)],
)
def test_too_few_clients_are_refused(rule: Aggregator, num_clients: int, needed: int) -> None:
    message = rf"among {num_clients} clients.* needs at least {needed} rows.*Let more clients"
    with pytest.raises(ValueError, match=message):
        fl.FederatedStrategy("fedavg", aggregator=rule, num_clients=num_clients)
    with pytest.raises(ValueError, match=message):
        trainer(fl.FederatedStrategy("fedavg", aggregator=rule)).fit(
            Ordinary(), image_clients((4,) * num_clients, validate=True)
        )
    fl.FederatedStrategy("fedavg", aggregator=rule, num_clients=max(needed, 7))


@pytest.mark.parametrize("wrong", [-1, 0.5, True, float("nan")])
def test_a_number_of_attackers_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"must be a count .* or a share"):
        Krum(wrong)


def test_arguments_out_of_range_are_refused() -> None:
    for make, message in (
        (lambda: MultiKrum(num_selected=0), "num_selected=0"),
        (lambda: GeometricMedian(iterations=0), "iterations=0"),
        (lambda: GeometricMedian(smoothing=0.0), "smoothing=0"),
        (lambda: CenteredClipping(tau=0.0), "tau=0"),
        (lambda: NormBound(bound=-1.0), "bound=-1"),
        (lambda: Bucketing(0), "size=0"),
        (lambda: NormCheck(0.0), "z=0"),
        (lambda: Screened(checks=[]), "must be checks"),
        (lambda: Screened(Median(before=[Bucketing()])), "without pre-aggregators"),
        (lambda: Krum(before=["mixing"]), "NearestNeighborMixing"),  # type: ignore[list-item]
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_screened_rule_of_coordinates_refuses_side_channels_too() -> None:
    with pytest.raises(ValueError, match="Median picks each coordinate"):
        fl.FederatedStrategy("scaffold", aggregator=Screened(Median(1)))
    fl.FederatedStrategy("scaffold", aggregator=Screened(MultiKrum(1)))


def test_fltrust_without_its_root_client_is_an_error() -> None:
    with pytest.raises(ValueError, match="lacks the update of the root client 'hospital'"):
        fit(FLTrust("hospital"))


def test_history_loggers_and_the_report_tell_who_was_left_out(tmp_path: Path) -> None:
    run = trainer(
        fl.FederatedStrategy("fedavg", aggregator=MultiKrum(1, 5)),
        2,
        logger=CSVLogger(tmp_path),
        callbacks=[fl.callbacks.RunRecord()],
        log_every_n_steps=1,
    )
    run.fit(Ordinary(), image_clients(SIZES, validate=True))
    for entry in run.strategy.history:
        assert set(entry["left_out"].values()) == {"far from its nearest neighbours"}
    left_out = run.strategy.history[1]["left_out"]
    assert len(left_out) == 2
    folder = Path(run.logger.log_dir)
    with (folder / "metrics.csv").open() as file:
        logged = [row["fl/left_out"] for row in csv.DictReader(file) if row.get("fl/left_out")]
    assert [float(value) for value in logged] == [2.0, 2.0]
    assert f"<td>far from its nearest neighbours</td><td>{', '.join(map(str, left_out))}</td>" in render(
        Run.read(folder)
    )


def test_it_is_chosen_in_yaml_and_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-fl"])
    config = tmp_path / "run.yaml"
    config.write_text(
        """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  strategy:
    class_path: lightning_fl.FederatedStrategy
    init_args:
      algorithm: fedavg
      num_clients: 7
      aggregator:
        class_path: TrimmedMean
        init_args:
          num_attackers: 1
          before:
            - class_path: NearestNeighborMixing
model: {class_path: MLPClassifier}
data: {class_path: DigitsDataModule}
"""
    )
    strategy = FederatedCLI(["fit", "--config", str(config)]).trainer.strategy
    assert strategy.aggregator == TrimmedMean(1, (NearestNeighborMixing(),))
    name = "--trainer.strategy.init_args.aggregator"
    options = [f"{name}=Krum", f"{name}.num_attackers=2"]
    assert FederatedCLI(["fit", "--config", str(config), *options]).trainer.strategy.aggregator == Krum(
        2, (NearestNeighborMixing(),)
    )


@pytest.mark.slow
def test_other_settings_on_another_rank_are_found(run_ranks: Any) -> None:
    with pytest.raises(Exception, match="aggregator"):
        run_ranks(2, with_own_setting)


def with_own_setting() -> None:
    import os

    fit(Krum(int(os.environ["RANK"])))


class TwoFaced(fl.callbacks.FederatedCallback):
    """The first silo sends other rows to the others than it keeps."""

    def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any, view: Any) -> None:
        group, honest = view.group, view.group.all_to_all
        if group.rank == 0:
            group.all_to_all = lambda parts, sizes: honest([parts[0], *[part + 1 for part in parts[1:]]], sizes)


def among_silos_of_whom_one_cheats() -> None:
    strategy = fl.FederatedStrategy("fedavg", aggregator=Median(0))
    data = DataLoader(images(4), batch_size=4)
    trainer(strategy, callbacks=[TwoFaced()]).fit(Ordinary(), data, data)


def test_a_silo_that_sends_different_updates_is_found(run_ranks: Any) -> None:
    with pytest.raises(Exception, match=r"received other updates than rank . in round 0"):
        run_ranks(2, among_silos_of_whom_one_cheats)


def test_complex_and_frozen_parameters() -> None:
    class Complex(Ordinary):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            self.net[0].weight.requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + (self.phase - batch[0].mean()).abs().square().sum()

    for rule in (Median(1), Krum(1)):
        module = Complex()
        frozen = module.net[0].weight.clone()
        trainer(fl.FederatedStrategy("fedavg", aggregator=rule, engine="sequential")).fit(
            module, image_clients(SIZES, validate=True)
        )
        assert torch.equal(module.net[0].weight, frozen)
        assert module.phase.dtype == torch.complex64
        assert (module.phase != 1).all()
