"""What is logged and counted in the evaluation of several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.aggregation import SumMetric

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import Ordinary, images, loader, trainer
from tests.trainer.ranks.test_hooks_and_callbacks import SIZES, clients, metrics_of, rank


class ByHand(Ordinary):
    """Counts examples with metrics of its own: over all loaders, and one that is never reset."""

    def __init__(self) -> None:
        super().__init__(torch.float64)
        self.seen, self.ever, self.trained = SumMetric(), SumMetric(), SumMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained.update(len(batch[1]))
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("trained", self.trained.compute())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        for metric in (self.seen, self.ever):
            metric.update(len(batch[1]))
        self.log("examples", float(len(batch[1])), reduce_fx="sum")
        if rank() == 1 and batch_idx >= 2:
            self.log("rare", 3.0)

    def on_validation_epoch_end(self) -> None:
        self.log("seen", self.seen.compute())
        self.log("ever", self.ever.compute())
        self.seen.reset()


def validate_silos() -> dict[str, float]:
    run = trainer("fedavg", 3, num_sanity_val_steps=0)
    own = [loader(8 + 4 * rank(), seed=5 + rank()), loader(4 + 8 * rank(), seed=9 + rank())]
    run.fit(ByHand(), loader(8 + 4 * rank(), seed=rank()), own)
    return metrics_of(run)


def test_metrics_by_hand_over_the_loaders_of_silos_count_each_example_once(run_ranks: Any) -> None:
    union = (8 + 12) + (4 + 12)
    for metrics in run_ranks(2, validate_silos):
        assert metrics["seen"] == union
        assert metrics["ever"] == 3 * union
        assert metrics["trained"] == 3 * (8 + 12)
        assert {metrics[name] for name in metrics if name.startswith("rare")} == {3.0}


def simulate() -> dict[str, float]:
    run, module = trainer("fedavg", 2, num_sanity_val_steps=0), ByHand()
    run.fit(module, clients(), loader(20, seed=9))
    fitted = metrics_of(run)
    after = run.validate(module, loader(20, seed=9), verbose=False)[0]
    return {**fitted, **{f"after/{name}": value for name, value in after.items()}}


def test_validation_of_a_simulation_is_not_summed_over_ranks(run_ranks: Any) -> None:
    for metrics in [simulate(), *run_ranks(2, simulate)]:
        assert metrics["examples"] == metrics["seen"] == metrics["after/examples"] == metrics["after/seen"] == 20
        assert metrics["ever"] == 40
        assert metrics["after/ever"] == 60
        assert metrics["trained"] == 2 * sum(SIZES)


def validate_in_parts(split: bool) -> tuple[dict[str, float], int]:
    class Counted(Ordinary):
        num_validated = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.num_validated += len(batch[1])
            super().validation_step(batch, batch_idx)

    module = Counted(torch.float64)
    strategy = FederatedStrategy("fedavg", num_clients=4, split_validation=split)
    run = trainer(strategy, 2, num_sanity_val_steps=0)
    run.fit(module, loader(16), loader(11, seed=9))
    return {name: value.item() for name, value in run.callback_metrics.items()}, module.num_validated


def test_ranks_share_the_validation_data_and_agree_with_one_rank(run_ranks: Any) -> None:
    alone, num_validated = validate_in_parts(split=False)
    shared = run_ranks(2, validate_in_parts, True)
    for metrics, _ in shared:
        assert metrics == pytest.approx(alone, rel=1e-6)
    assert [count for _, count in shared] == [12, 10]
    assert num_validated == sum(count for _, count in shared)
    assert [count for _, count in run_ranks(2, validate_in_parts, False)] == [num_validated] * 2


def validate_without_a_fit() -> tuple[dict[str, float], int]:
    class Counted(Ordinary):
        num_validated = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.num_validated += len(batch[1])
            super().validation_step(batch, batch_idx)

    module, data = Counted(torch.float64), fl.datamodules.ClientDatasets([images(4)], val=images(11, 9), batch_size=4)
    run = trainer(FederatedStrategy("fedavg", split_validation=True))
    run.validate(module, datamodule=data, verbose=False)
    return {name: value.item() for name, value in run.callback_metrics.items()}, module.num_validated


def test_ranks_share_the_validation_data_of_a_simulation_without_a_fit(run_ranks: Any) -> None:
    alone, num_validated = validate_without_a_fit()
    shared = run_ranks(2, validate_without_a_fit)
    for metrics, _ in shared:
        assert metrics == pytest.approx(alone, rel=1e-6)
    assert sum(count for _, count in shared) == num_validated == 11
