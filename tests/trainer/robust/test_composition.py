"""Robust rules beside the rest of the framework: each cell of the table in docs/robust.md."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lightning_fl as fl
from lightning_fl.aggregation import (
    FLAME,
    Aggregator,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CoordinateRule,
    DnC,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    MeanAroundMedian,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    NormBound,
    NormCheck,
    Screened,
    TrimmedMean,
)
from lightning_fl.cli import FederatedCLI
from lightning_fl.privacy import ClientLevelDP, SecureAggregation
from lightning_fl.tracking import Run
from lightning_fl.tracking.report import render
from tests.helpers.training import Ordinary, image_clients, minimise, quadratic_clients, trainer, weights

RULES: dict[str, Aggregator] = {
    "median": Median(1),
    "trimmed mean": TrimmedMean(1),
    "mean around median": MeanAroundMedian(1),
    "bulyan": Bulyan(1),
    "krum": Krum(1),
    "multi-krum": MultiKrum(1),
    "geometric median": GeometricMedian(1),
    "clipping": CenteredClipping(1.0, 3, 1),
    "norm bound": NormBound(None, 1),
    "fltrust": FLTrust(0, 1),
    "dnc": DnC(1),
    "flame": FLAME(1),
    "screened": Screened(None, num_attackers=1),
    "foolsgold": FoolsGold(1),
    "mixing": TrimmedMean(1, [NearestNeighborMixing()]),
}
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


@every_rule
@pytest.mark.spread(4)
def test_both_engines_give_the_same_model(rule: Aggregator) -> None:
    """With BatchNorm, whose buffers take the same coefficients as the parameters."""
    alone, strategy = fit(rule, engine="sequential")
    together, _ = fit(rule, engine="vectorized")
    torch.testing.assert_close(weights(together), weights(alone), rtol=1e-4, atol=1e-4)
    assert strategy.weighting == "uniform"
    assert alone.net[1].num_batches_tracked.dtype == torch.int64
    assert (alone.net[1].running_var > 0).all()


def fit_on_ranks(name: str, algorithm: str) -> list[float]:
    return weights(fit(RULES[name], algorithm, engine="sequential")[0]).tolist()


@pytest.mark.parametrize(("name", "algorithm"), [("krum", "fedexp"), ("mixing", "fedavg"), ("bulyan", "fedavg")])
@pytest.mark.spread(1)
def test_ranks_give_the_same_model(run_ranks: Any, name: str, algorithm: str) -> None:
    alone = fit_on_ranks(name, algorithm)
    ranks = run_ranks(2, fit_on_ranks, name, algorithm)
    assert ranks[0] == ranks[1]
    torch.testing.assert_close(torch.tensor(ranks[0]), torch.tensor(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["scaffold", "fednova", "fedexp"])
@every_rule
def test_side_channels_follow_the_coefficients_or_are_refused(rule: Aggregator, algorithm: str) -> None:
    if isinstance(rule, CoordinateRule):
        with pytest.raises(ValueError, match=r"picks each coordinate from other clients.* such as fl"):
            fl.FederatedStrategy(algorithm, aggregator=rule)
        return
    strategy = fl.FederatedStrategy(algorithm, aggregator=rule)
    assert abs(minimise(strategy, 3, quadratic_clients((0.0,) * 7, (1.0,) * 7, (1,) * 7))) < 10


@pytest.mark.filterwarnings("ignore:SCAFFOLD's control is derived")
def test_scaffold_with_multi_krum_of_all_is_scaffold() -> None:
    models = [
        minimise(fl.FederatedStrategy("scaffold", aggregator=rule, local_steps=5), 5, quadratic_clients())
        for rule in (None, MultiKrum(0))
    ]
    assert models[1] == pytest.approx(models[0], rel=1e-12)


@every_rule
def test_client_level_privacy_is_refused(rule: Aggregator) -> None:
    with pytest.raises(ValueError, match="is no sum"):
        fl.FederatedStrategy("fedavg", aggregator=rule, transforms=[ClientLevelDP(clip=1.0, noise_multiplier=1.0)])


@every_rule
def test_a_secure_sum_is_refused(rule: Aggregator) -> None:
    with pytest.raises(ValueError, match="has to see each client's update"):
        SecureAggregation(aggregator=rule)


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


def test_other_settings_on_another_rank_are_found(run_ranks: Any) -> None:
    with pytest.raises(Exception, match="aggregator"):
        run_ranks(2, with_own_setting)


def with_own_setting() -> None:
    import os

    fit(Krum(int(os.environ["RANK"])))


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
