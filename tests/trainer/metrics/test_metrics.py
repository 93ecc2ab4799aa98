"""What training logs becomes the cohort's mean by example, or is joined by state."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.aggregation import CatMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import Ordinary, Plain, image_clients, images, measured, trainer

SIZES = (1, 7, 23)


class Logs(Plain):
    """Logs a value that tells which client an example came from, in all the ways there are."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.several = MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)])
        self.seen = CatMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        value = x[:, 0, 0, 0].double().mean()
        self.log("by_default", value)
        self.log("epoch_only", value, on_step=False, on_epoch=True)
        self.log("forked", value, on_step=True, on_epoch=True)
        self.log("total", float(len(y)), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("total_by_step", float(len(y)), reduce_fx="sum")
        self.log("smallest", x.min(), on_step=False, on_epoch=True, reduce_fx="min")
        if len(y) == 1:
            self.log("only_small", value, on_step=False, on_epoch=True)
        self.several(self.net(x.double()), y)
        self.log_dict(self.several, on_step=False, on_epoch=True)
        self.seen.update(x[:, 0, 0, 0])
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("late", float(len(batch[1]) if batch else 0), on_step=False, on_epoch=True, reduce_fx="sum")

    def on_train_epoch_end(self) -> None:
        self.log("by_hand", self.seen.compute().double().mean())
        self.seen.reset()


def logged(**options: Any) -> dict[str, float]:
    fit = trainer(FederatedStrategy("fedavg", **options), 2)
    fit.fit(Logs(), image_clients(SIZES))
    return measured(fit)


def test_logged_values_are_means_by_example_over_the_cohort() -> None:
    metrics = logged()
    values = torch.cat([x[:, 0, 0, 0] for x in (data.tensors[0] for data in datasets())]).double()
    for name in ("by_default", "epoch_only", "forked", "forked_epoch", "by_hand"):
        assert metrics[name] == pytest.approx(values.mean().item(), rel=1e-5), name
    for name in ("total", "total_by_step", "late"):
        assert metrics[name] == sum(SIZES)
    assert metrics["smallest"] == min(data.tensors[0].min().item() for data in datasets())
    assert metrics["only_small"] == pytest.approx(datasets()[0].tensors[0][0, 0, 0, 0].item(), rel=1e-5)


def datasets() -> list[Any]:
    clients = image_clients(SIZES)
    return [clients.train_dataloader()[client].dataset for client in range(len(SIZES))]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.spread(1)
def test_all_ranks_log_the_same(run_ranks: Any, world_size: int) -> None:
    alone = logged()
    for metrics in run_ranks(world_size, logged):
        assert metrics == pytest.approx(alone, rel=1e-5)


class Diverging(Logs):
    """The client whose batches have one example gives NaN."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if len(batch[1]) == 1 else loss


def diverge() -> tuple[bool, dict[str, float], list[Any]]:
    module = Diverging()
    fit = trainer("fedavg")
    with (
        pytest.warns(UserWarning, match="Round 0: the updates of 0 hold NaN or Inf")
        if fit.global_rank == 0
        else nullcontext()
    ):
        fit.fit(module, image_clients(SIZES))
    finite = all(bool(torch.isfinite(param).all()) for param in module.parameters())
    return finite, measured(fit), fit.strategy.history[0]["refused"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_client_that_diverges_is_left_out_with_its_metrics(run_ranks: Any, world_size: int) -> None:
    for finite, metrics, refused in run_ranks(world_size, diverge):
        assert finite
        assert refused == [0]
        assert metrics["total"] == 30
        assert "only_small" not in metrics


def test_a_round_without_a_usable_update_fails_and_keeps_the_model() -> None:
    module = Diverging()
    before = module.net[1].weight.clone()
    with pytest.raises(ValueError, match="Round 0 has no update left: those of all its clients"):
        trainer("fedavg").fit(module, image_clients((1, 1)))
    assert torch.equal(module.net[1].weight, before)


def test_an_ordinary_module_logs_as_it_would_in_a_plain_trainer() -> None:
    """One client of 23 examples: the logged names and the epoch's values are those of plain Lightning."""
    federated, plain = Ordinary(torch.float64), Ordinary(torch.float64)
    clients = fl.datamodules.ClientDatasets([images(23)], val=images(4), batch_size=4, shuffle=False)
    outcomes = []
    for module, strategy in ((federated, FederatedStrategy(client_optimizer="keep")), (plain, "auto")):
        fit = trainer(strategy, 2, limit_val_batches=0)
        fit.fit(module, clients)
        outcomes.append(measured(fit))
    assert outcomes[0].keys() == outcomes[1].keys()
    for name in ("loss_epoch", "loss", "train_acc"):
        assert outcomes[0][name] == pytest.approx(outcomes[1][name], rel=1e-6)


def test_callbacks_can_monitor_training_metrics(tmp_path: Any) -> None:
    stop = L.pytorch.callbacks.EarlyStopping("by_default", patience=1, min_delta=1.0, check_on_train_epoch_end=True)
    fit = trainer("fedavg", 10, callbacks=[stop])
    fit.fit(Logs(), image_clients(SIZES))
    assert fit.current_epoch == 2


def figures_on_rank(strategy: str, ckpt_path: Any = None) -> tuple[dict[str, float], list[Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"clients_per_round": 2}
        if strategy == "private":
            mechanism = fl.privacy.ClientLevelDP(1.0, 1.0, delta=1e-5, insecure_test_seed=1)
            options = {"transforms": [mechanism]}
        saver = L.pytorch.callbacks.ModelCheckpoint("figures", filename="{epoch}", save_top_k=-1)
        fit = trainer(FederatedStrategy(**options), 3, callbacks=[saver], enable_checkpointing=True)
        fit.fit(Plain(), image_clients((4, 4, 4, 4)), ckpt_path=ckpt_path)
    return {name: value.item() for name, value in fit.callback_metrics.items()}, fit.strategy.history


@pytest.mark.parametrize("strategy", ["plain", "private"])
@pytest.mark.spread(1)
def test_the_federations_figures_are_metrics_that_callbacks_find(run_ranks: Any, strategy: str) -> None:
    found, history = figures_on_rank(strategy)
    for name, value in found.items():
        assert value == history[-1][name.removeprefix("fl/")], name
    expected = {"fl/round", "fl/update_norm"}
    expected |= {"fl/dp_epsilon"} if strategy == "private" else {"fl/num_clients", "fl/num_examples", "fl/num_steps"}
    assert expected <= found.keys()
    assert "fl/num_clients" not in found or strategy == "plain"
    resumed, _ = figures_on_rank(strategy, "figures/epoch=0.ckpt")
    assert resumed.keys() == found.keys()
    first, second = (figures for figures, _ in run_ranks(2, figures_on_rank, strategy))
    assert first == second
    assert first.keys() == found.keys()


def test_training_can_stop_by_a_figure_of_the_federation() -> None:
    stop = L.pytorch.callbacks.EarlyStopping("fl/num_steps", mode="max", stopping_threshold=3.5, patience=9)
    saver = L.pytorch.callbacks.ModelCheckpoint("best", monitor="fl/update_norm", filename="{fl/num_steps:.0f}")
    fit = trainer(FederatedStrategy(), 5, callbacks=[stop, saver], enable_checkpointing=True)
    fit.fit(Plain(), image_clients((8, 4, 4), batch_size=4))
    assert fit.current_epoch == 1
    assert saver.best_model_score == fit.strategy.history[0]["update_norm"]
