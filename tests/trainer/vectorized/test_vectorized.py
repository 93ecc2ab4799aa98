"""Clients that train in one step do what they would do one after the other."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import lightning_fl as fl
from lightning_fl.aggregation import Transform
from tests.helpers.engines import TWINS, both, fit
from tests.helpers.training import Ordinary, Plain, image_clients, images, minimise, quadratic_clients, trainer, weights


def test_a_module_as_users_write_it() -> None:
    both(lambda: Ordinary(torch.float64), image_clients(TWINS, validate=True))


def test_the_same_in_float32() -> None:
    both(Ordinary, image_clients(TWINS, validate=True), rtol=1e-5, rounds=1)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"local_epochs": 2},
        {"local_steps": 5},
        {"clients_per_round": 5},
        {"weighting": "uniform"},
        {"algorithm": "scaffold", "clients_per_round": 5},
        {"algorithm": fl.algorithms.FedProx(1.0), "gradient_clip_val": 0.05},
        {"personal": ["net.3.*"]},
        {"stragglers": fl.clients.Stragglers(0.5)},
    ],
    ids=str,
)
@pytest.mark.spread(4)
def test_settings(options: dict[str, Any]) -> None:
    both(Plain, rounds=3, **options)


def test_clipping_by_the_norm_of_all_clients_would_show() -> None:
    module = Plain()
    fit(fl.engines.Vectorized(clients_per_step=1), module, gradient_clip_val=0.05)
    unclipped = Plain()
    fit("vectorized", unclipped)
    assert not torch.allclose(weights(module), weights(unclipped), rtol=1e-4)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop"])
@pytest.mark.spread(3)
def test_optimizers(name: str) -> None:
    kind = getattr(torch.optim, name)
    both(lambda: Plain(make_optimizer=lambda params: kind(params, lr=0.05)), rtol=1e-8)


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fednova", "feddyn"])
def test_closed_forms(algorithm: str) -> None:
    clients = quadratic_clients((0.0, 1.0, 4.0), (1.0, 2.0, 0.5), (2, 2, 2))
    strategies = [fl.FederatedStrategy(algorithm, local_steps=5, engine=e) for e in ("sequential", "vectorized")]
    alone, together = (minimise(strategy, 10, clients) for strategy in strategies)
    assert together == pytest.approx(alone, rel=1e-12)


class Logging(Plain):
    """Logs in every way that a step may."""

    def __init__(self, metric: Any = None) -> None:
        super().__init__()
        self.metric = metric

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x.double())
        loss = nn.functional.cross_entropy(logits, y)
        self.log("step", loss)
        self.log("epoch", loss, on_step=False, on_epoch=True)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log_dict({"sum": loss, "constant": 3.0}, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("min", loss, on_step=False, on_epoch=True, reduce_fx="min")
        self.log("max", loss, on_step=False, on_epoch=True, reduce_fx=torch.max)
        self.log("sized", loss, on_step=False, on_epoch=True, batch_size=7)
        if self.metric is not None:
            self.score(logits, y)
        return {"loss": loss, "logits": logits}

    def score(self, logits: Tensor, y: Tensor) -> None:
        self.metric(logits, y)
        self.log("metric", self.metric, on_step=False, on_epoch=True)


class LoggingResult(Logging):
    def score(self, logits: Tensor, y: Tensor) -> None:
        self.log("metric", self.metric(logits, y), on_step=False, on_epoch=True)


class LoggingMean(Logging):
    def score(self, logits: Tensor, y: Tensor) -> None:
        self.metric.update(logits.max(), weight=len(y))
        self.log("metric", self.metric, on_step=False, on_epoch=True)


class LoggingCorrelation(Logging):
    def score(self, logits: Tensor, y: Tensor) -> None:
        self.metric.update(logits[:, 0].float(), y.float())
        self.log("metric", self.metric, on_step=False, on_epoch=True)


class LoggingCollection(Logging):
    def score(self, logits: Tensor, y: Tensor) -> None:
        self.metric.update(logits, y)
        self.log_dict(self.metric, on_step=False, on_epoch=True)


@pytest.mark.parametrize(
    "make_module",
    [
        Logging,
        lambda: Logging(MulticlassAccuracy(4, average="micro")),
        lambda: Logging(MulticlassF1Score(4, average="macro")),
        lambda: LoggingResult(MulticlassAccuracy(4)),
        lambda: LoggingMean(MeanMetric()),
        lambda: LoggingCorrelation(PearsonCorrCoef()),
        lambda: LoggingCollection(MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)])),
    ],
    ids=["log", "metric", "f1", "result", "mean", "correlation", "collection"],
)
@pytest.mark.spread(3)
def test_logged_values_and_metrics(make_module: Any) -> None:
    _, together = both(make_module)
    assert {"epoch", "both_epoch", "sum", "min", "max", "sized"} <= together.callback_metrics.keys()


class PoisonedClient(Logging):
    """Gives NaN where an image is full of 1000."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        poison = torch.where(x.amax() > 500, float("nan"), 1.0)
        return super().training_step((x.clamp(max=5) * poison, y), batch_idx)


@pytest.mark.filterwarnings("ignore:Round .* hold NaN or Inf")
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_a_client_that_diverges_is_left_out_with_all_it_has_logged(algorithm: str) -> None:
    def data() -> Any:
        sets = [images(7, seed) for seed in range(4)]
        sets[2].tensors[0][-1] = 1000.0
        return fl.datamodules.ClientDatasets(sets, batch_size=4)

    metrics = lambda: PoisonedClient(MulticlassAccuracy(4, average="micro"))  # noqa: E731
    _, together = both(metrics, data(), algorithm=algorithm)
    assert together.strategy.history[-1]["refused"] == [2]


class Scale(Transform):
    """Halves updates, and counts how often in the client's state."""

    keeps_client_state = True

    def client(self, update: Any, state: Any, ctx: Any) -> Any:
        halved = {name: delta / 2 for name, delta in update.delta.items()}
        return fl.types.Update(halved, update.buffers, update.weight, update.aux), {
            "count": state.get("count", torch.zeros(())) + 1
        }


def test_transforms_see_one_client_at_a_time() -> None:
    _, together = both(Plain, transforms=[Scale()], rounds=3)
    store = together.strategy.active_driver.store
    assert [float(store.get(client)["transform 0"]["count"]) for client in range(len(TWINS))] == [3.0] * len(TWINS)


def test_client_states_go_on_when_the_engine_changes(tmp_path: Any) -> None:
    whole, parts = Plain(), Plain()
    fit("sequential", whole, algorithm="scaffold", rounds=4, clients_per_round=5)
    options = {"algorithm": "scaffold", "seed": 5, "clients_per_round": 5}
    first = trainer(fl.FederatedStrategy(**options, engine="vectorized"), 2)
    first.fit(parts, image_clients(TWINS))
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = Plain()
    run = trainer(fl.FederatedStrategy(**options, engine="sequential"), 4)
    run.fit(second, image_clients(TWINS), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    torch.testing.assert_close(weights(second), weights(whole), rtol=1e-9, atol=1e-11)


def test_the_number_of_clients_in_a_step_can_be_set() -> None:
    run = fit(fl.engines.Vectorized(clients_per_step=2), Plain(), image_clients((7,) * 5))
    assert [len(unit) for unit in run.strategy.active_driver.trained_groups] == [2, 2, 1]


def test_batches_in_memory_are_limited() -> None:
    settings = fl.engines.Vectorized(batch_bytes=3 * 7 * (16 * 4 + 8))
    run = fit(settings, Plain(), image_clients((7,) * 5))
    assert [len(unit) for unit in run.strategy.active_driver.trained_groups] == [3, 2]


class Item(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() > 0 else 2 * loss


class Appending(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss


class Growing:
    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, loss: Tensor) -> Tensor:
        self.factor += 0.001
        return loss * self.factor


class Remembering(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = Growing()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(super().training_step(batch, batch_idx))


class Dropping(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.Dropout(0.5))


class Hooked(Plain):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert batch[0].dim() == 4


class Momentum(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Decaying(Plain):
    """Holds its parameters where ``functional_call`` does not find them."""

    def __init__(self) -> None:
        super().__init__()
        self.decayed = list(self.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + sum(param.square().sum() for param in self.decayed)


class Mixing(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * np.random.rand()


def clip_gradient(param: Tensor) -> None:
    assert param.grad is not None
    param.grad.clamp_(-1e-3, 1e-3)


class Masking(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net[1].weight.register_post_accumulate_grad_hook(clip_gradient)


class Stepping(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(lambda *_: None)
        return optimizer


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Decaying, "self.decayed holds"),
        (Mixing, "random"),
        (Masking, "hooks on a parameter"),
        (Stepping, "hooks on SGD"),
        (Item, "reads a number out of a tensor"),
        (Appending, "changes self.losses"),
        (Remembering, "changes self.criterion"),
        (Dropping, "draws random numbers"),
        (Hooked, "on_train_batch_end"),
        (Momentum, "LBFGS"),
    ],
)
@pytest.mark.spread(4)
def test_what_cannot_train_together_trains_alone_and_says_why(
    kind: type[Plain], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    alone, automatic = kind(), kind()
    fit("sequential", alone, rounds=1)
    with caplog.at_level(logging.INFO):
        run = fit("auto", automatic, rounds=1)
    assert torch.equal(weights(alone), weights(automatic))
    assert "Clients train one after the other" in caplog.text
    assert reason in caplog.text
    assert max(map(len, run.strategy.active_driver.trained_groups)) == 1
    if isinstance(automatic, Appending):
        assert len(automatic.losses) == run.global_step


@pytest.mark.parametrize("kind", [Item, Appending, Hooked, Momentum])
def test_asked_for_it_is_an_error(kind: type[Plain]) -> None:
    module = kind()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match="engine='sequential'"):
        fit("vectorized", module)
    assert torch.equal(weights(module), before)


def test_asked_for_random_numbers_are_each_clients_own() -> None:
    module, again = Dropping(), Dropping()
    with pytest.warns(UserWarning, match="equal in distribution"):
        fit("vectorized", module)
    with pytest.warns(UserWarning, match="equal in distribution"):
        fit("vectorized", again)
    assert torch.equal(weights(module), weights(again))
    assert bool(torch.isfinite(weights(module)).all())


def test_clients_whose_batches_have_other_shapes_train_apart() -> None:
    class Lengths(torch.utils.data.Dataset):
        def __init__(self, length: int) -> None:
            self.length = length

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Tensor:
            return torch.full((self.length,), float(index), dtype=torch.float64)

    class Mean(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (batch.mean() - self.net[1].bias).square().sum()

    sets = fl.datamodules.ClientDatasets([Lengths(n) for n in (2, 3, 2, 3)], batch_size=2)
    _, together = both(Mean, sets)
    assert sorted(together.strategy.active_driver.trained_groups) == [(0, 2), (1, 3)]


@pytest.mark.filterwarnings("ignore:Round .* so it was left out")
def test_a_client_whose_data_fails_is_left_out_of_its_unit() -> None:
    class Failing(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            raise OSError("no such disk")

    sets = [images(7, seed) for seed in range(4)]
    data = fl.datamodules.ClientDatasets([*sets[:2], Failing(*sets[2].tensors), sets[3]], batch_size=4)
    _, together = both(Plain, data, on_client_error="skip")
    assert together.strategy.history[-1]["failed"] == [2]
    with pytest.raises(ValueError, match="client 2"):
        fit("vectorized", Plain(), data)


def test_a_tensor_that_all_clients_share_must_not_be_written_to() -> None:
    class Counting(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()), persistent=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.count += 1
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match="count"):
        fit("vectorized", Counting())


def test_random_augmentation_is_that_of_each_client() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            x, y = super().__getitem__(index)
            return x + torch.randn(x.shape), y

    both(Plain, fl.datamodules.ClientDatasets([Noisy(*images(7, seed).tensors) for seed in range(3)], batch_size=4))


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam"])
def test_parameters_without_dimensions(name: str) -> None:
    class Scaled(Plain):
        def __init__(self) -> None:
            super().__init__(make_optimizer=lambda params: getattr(torch.optim, name)(params, lr=0.05))
            self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.scale.square()

    both(Scaled, gradient_clip_val=0.1)


class Later(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch == 1:
            self.last = loss
        return loss


def test_asked_for_what_shows_only_later_ends_the_fit() -> None:
    with pytest.raises(MisconfigurationException, match=r"changes self.last.*engine='sequential'"):
        fit("vectorized", Later())


def test_an_aggregator_with_an_add_of_its_own_is_asked_for_each_client() -> None:
    class Halving(fl.aggregation.WeightedMean):
        def add(self, acc: Any, update: Any, ctx: Any) -> Any:
            halved = {name: delta / 2 for name, delta in update.delta.items()}
            return super().add(acc, fl.types.Update(halved, update.buffers, update.weight, update.aux), ctx)

    both(Plain, aggregator=Halving())


@pytest.mark.filterwarnings("ignore:You called .* needs to be floating")
def test_integers_are_logged_as_numbers() -> None:
    class Counting(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("hits", (batch[1] == 0).sum(), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    _, together = both(Counting)
    assert "hits" in together.callback_metrics


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.parametrize("leaf", [float("nan"), np.ones(2)], ids=["nan", "array"])
def test_batches_that_cannot_stand_side_by_side_are_trained_alone(leaf: Any) -> None:
    class Second(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[:2], batch_idx)

    batches = [next(iter(image_clients((7,)).train_dataloader()[0])) for _ in range(3)]
    data = fl.datamodules.ClientLoaders([[(*batch, leaf)] for batch in batches], num_examples=lambda client: 7)
    modules = Second(), Second()
    for engine, module in zip(("sequential", "vectorized"), modules, strict=True):
        fit(engine, module, data)
    torch.testing.assert_close(weights(modules[0]), weights(modules[1]))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_true_precision(precision: str) -> None:
    both(lambda: Plain(torch.float32), rtol=1e-2 if precision == "bf16-true" else 1e-9, precision=precision)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="engine='fast'"):
        fl.FederatedStrategy(engine="fast")
    with pytest.raises(ValueError, match="clients_per_step=0"):
        fl.engines.Vectorized(clients_per_step=0)
