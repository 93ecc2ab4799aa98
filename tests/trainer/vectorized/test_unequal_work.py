"""Clients of unequal work that train side by side give what each gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_fl as fl
from lightning_fl.engines.optimizer_states import OptimizerStates
from lightning_fl.engines.vectorized import step_schedule as step_schedule_of
from lightning_fl.engines.vectorized.row_subset import RowSubset
from tests.helpers.engines import both, fit
from tests.helpers.training import Plain, image_clients, images, trainer, weights

SIZES = (5, 10, 15, 20, 25, 30, 35, 40, 45) * 2


def clients() -> Any:
    return image_clients(SIZES, batch_size=10)


def make(kind: Any = torch.optim.SGD, **options: Any) -> Any:
    return lambda: Plain(make_optimizer=lambda params: kind(params, **{"lr": 0.05, **options}))


@pytest.mark.parametrize(
    "make_module",
    [
        make(),
        make(momentum=0.9, dampening=0.3),
        make(momentum=0.9, nesterov=True, weight_decay=0.1),
        make(torch.optim.Adam),
        make(torch.optim.Adam, amsgrad=True, weight_decay=0.1),
        make(torch.optim.AdamW),
        make(torch.optim.Adagrad),
        make(torch.optim.Adagrad, lr_decay=0.1),
        make(torch.optim.Adadelta),
        make(torch.optim.Rprop),
        make(torch.optim.NAdam),
        make(torch.optim.RMSprop, momentum=0.9),
    ],
)
@pytest.mark.spread(2)
def test_optimizers(make_module: Any) -> None:
    is_sgd = isinstance(make_module().configure_optimizers(), torch.optim.SGD)
    alone, together = both(make_module, clients(), algorithm="fednova" if is_sgd else "fedavg")
    assert [len(unit) for unit in together.strategy.active_driver.trained_groups] == [len(SIZES)]
    assert together.strategy.active_driver.num_batches_trained <= alone.strategy.active_driver.num_batches_trained / 2


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.spread(1)
def test_adam_at_different_steps(kind: Any) -> None:
    def in_float32() -> Plain:
        # Its first steps are where the number of steps matters most, and digits of float32 are lost.
        return Plain(torch.float32, make_optimizer=lambda params: kind(params, lr=0.05))

    _, together = both(in_float32, clients(), rtol=1e-5)
    # Five with full batches, and one for the last batches of five, which come in each of the five.
    assert together.strategy.active_driver.num_batches_trained == 6
    assert not together.optimizers[0].param_groups[0]["differentiable"]


@pytest.mark.parametrize(
    ("kind", "owner", "attribute", "value"),
    [
        (torch.optim.NAdam, OptimizerStates, "num_steps_apart", property(lambda self: 0)),
        (torch.optim.SGD, OptimizerStates, "recount", lambda self, num_steps: None),
        (torch.optim.Adam, RowSubset, "_count", lambda self, name, param: self._counts[name][0].clone()),
    ],
)
def test_these_tests_would_show(
    kind: Any, owner: Any, attribute: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, attribute, value)
    with pytest.raises((AssertionError, KeyError)):
        both(make(kind), clients(), algorithm="fednova" if kind is torch.optim.SGD else "fedavg")


def test_a_client_that_trained_on_with_the_others_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    write_back = RowSubset._write_back

    def keeping_all(self: Any, params: Any, buffers: Any) -> None:
        write_back(self, params, buffers)
        if self.rows is not None and 0 not in self.rows:
            next(iter(self._params.values())).data[0] += 0.01

    monkeypatch.setattr(RowSubset, "_write_back", keeping_all)
    with pytest.raises(AssertionError):
        both(make(), clients())


@pytest.mark.parametrize(
    "options",
    [
        {"local_epochs": 2},
        {"local_steps": 5},
        {"gradient_clip_val": 0.05},
        {"clients_per_round": 12, "rounds": 4},
        {"algorithm": "scaffold", "clients_per_round": 12, "rounds": 4},
        {"algorithm": "feddyn", "rounds": 3},
        {"algorithm": fl.algorithms.FedProx(1.0), "gradient_clip_val": 0.05},
        {"weighting": "uniform"},
        {"personal": ["net.3.*"], "rounds": 3},
        {"stragglers": fl.clients.Stragglers(0.5), "rounds": 3},
    ],
    ids=str,
)
@pytest.mark.spread(3)
def test_settings(options: dict[str, Any]) -> None:
    both(make(), clients(), **options)


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {}], ids=["accumulation", "schedule by step"])
def test_what_all_steps_share_lets_only_equal_ones_train_together(settings: dict[str, Any]) -> None:
    class Decaying(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            if settings:
                return optimizer
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    _, together = both(Decaying, image_clients((23, 40, 23, 7, 40), batch_size=10), **settings)
    assert sorted(together.strategy.active_driver.trained_groups) == [(0, 2), (1, 4), (3,)]


class Norm(Plain):
    """Has buffers, and logs a loss and a torchmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16).double()
        self.accuracy = MulticlassAccuracy(4, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(self.norm(x.double().flatten(1)))
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return loss


def test_buffers_and_logged_values() -> None:
    both(Norm, clients(), rounds=3)


@pytest.mark.filterwarnings("ignore:Round .* hold NaN or Inf")
def test_a_client_that_diverges_is_left_out_with_all_it_has_logged() -> None:
    class Poisoned(Norm):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return super().training_step((x * torch.where(x.amax() > 500, float("nan"), 1.0), y), batch_idx)

    sets = [images(size, seed) for seed, size in enumerate(SIZES)]
    sets[3].tensors[0][-1] = 1000.0
    _, together = both(Poisoned, fl.datamodules.ClientDatasets(sets, batch_size=10))
    assert together.strategy.history[-1]["refused"] == [3]


class ByIndex(Plain):
    """Its loss depends on how many steps the client has taken."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1.0 + batch_idx)


class ByStep(Plain):
    """The same, by the Trainer's count."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) / (1.0 + self.global_step)


@pytest.mark.parametrize("kind", [ByIndex, ByStep])
@pytest.mark.spread(1)
def test_a_step_that_looks_at_its_number_sees_that_of_its_clients(kind: type[Plain]) -> None:
    both(kind, clients(), rounds=3)


class LooksWhenShort(Plain):
    """Looks at its number in a client's last batch only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if len(batch[0]) == 10 else loss * (1.0 + batch_idx)


class HeadOfShort(Plain):
    """Has a parameter that gets a gradient in a client's last batch only."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__(make_optimizer=make_optimizer)
        self.shift = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x.double())
        return nn.functional.cross_entropy(logits if len(x) == 10 else logits + self.shift, y)


@pytest.mark.parametrize(
    "make_module",
    [
        LooksWhenShort,
        lambda: HeadOfShort(lambda params: torch.optim.Adam(params, lr=0.05)),
        lambda: HeadOfShort(lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)),
    ],
)
@pytest.mark.spread(1)
def test_a_step_that_depends_on_the_shape_of_its_batch(make_module: Any) -> None:
    both(make_module, clients(), local_epochs=2)


def padded(examples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    missing = 10 - len(examples)
    return [torch.stack([*own, *[own[0]] * missing]) for own in zip(*examples, strict=True)]


def test_batches_that_turn_out_to_be_alike() -> None:
    sets = [images(size, size) for size in range(22, 30)] * 2
    loaders = [torch.utils.data.DataLoader(own, batch_size=10, collate_fn=padded) for own in sets]
    data = fl.datamodules.ClientLoaders(range(len(sets)), loaders.__getitem__)
    _, together = both(make(), data)
    assert [len(unit) for unit in together.strategy.active_driver.trained_groups] == [len(sets)]


def test_equal_ones_come_together_first() -> None:
    run = fit(fl.engines.Vectorized(clients_per_step=2), Plain(), clients())
    assert sorted(run.strategy.active_driver.trained_groups) == [(client, client + 9) for client in range(9)]


class Failing(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        raise OSError("no such disk")


@pytest.mark.filterwarnings("ignore:Round .* so it was left out")
@pytest.mark.parametrize("failing", [(0,), (1,), (2, 3), (17,)])
@pytest.mark.spread(2)
def test_clients_whose_data_fails_are_left_out(failing: tuple[int, ...]) -> None:
    sets = [images(size, seed) for seed, size in enumerate(SIZES)]
    some = [Failing(*own.tensors) if index in failing else own for index, own in enumerate(sets)]
    _, together = both(make(), fl.datamodules.ClientDatasets(some, batch_size=10), on_client_error="skip")
    assert together.strategy.history[-1]["failed"] == list(failing)


@pytest.mark.filterwarnings("ignore:Round .* so it was left out")
def test_a_unit_of_which_all_fail_is_left_out() -> None:
    sets = [images(size, seed) for seed, size in enumerate(SIZES)]
    failing = [torch.utils.data.DataLoader(Failing(*own.tensors), batch_size=10) for own in sets]
    lists = [list(torch.utils.data.DataLoader(own, batch_size=10)) for own in sets]
    numbers = dict(enumerate(SIZES * 2))
    data = fl.datamodules.ClientLoaders(range(36), (failing + lists).__getitem__, num_examples=numbers.__getitem__)
    _, together = both(make(), data, on_client_error="skip")
    assert together.strategy.history[-1]["failed"] == list(range(18))
    every = fl.datamodules.ClientLoaders(range(18), failing.__getitem__)
    with pytest.raises(ValueError, match="0 updates"):
        fit("vectorized", Plain(), every, on_client_error="skip")


def test_a_fit_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    whole, first, second = make()(), make()(), make()()
    options = {"clients_per_round": 12, "seed": 5, "engine": "vectorized"}
    trainer(fl.FederatedStrategy("scaffold", **options), 4).fit(whole, clients())
    run = trainer(fl.FederatedStrategy("scaffold", **options), 2)
    run.fit(first, clients())
    run.save_checkpoint(tmp_path / "a.ckpt")
    run = trainer(fl.FederatedStrategy("scaffold", **options), 4)
    run.fit(second, clients(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(weights(second), weights(whole))


def test_an_interrupted_round_leaves_nothing_behind() -> None:
    class Ending(Plain):
        ends = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.ends and self.trainer.current_epoch == 1 and self.trainer.fit_loop.epoch_loop.batch_idx == 3:
                raise OSError("no more power")
            return super().training_step(batch, batch_idx)

    module, reference = Ending(), Ending()
    run = trainer(fl.FederatedStrategy(engine="vectorized", seed=5), 2)
    with pytest.raises(OSError, match="no more power"):
        run.fit(module, clients())
    fit("vectorized", reference, clients(), rounds=1)
    torch.testing.assert_close(weights(module), weights(reference))


def fit_here() -> Tensor:
    module = make()()
    fit("vectorized", module, image_clients(SIZES * 2, batch_size=10), algorithm="scaffold", clients_per_round=24)
    return weights(module)


def test_two_ranks_train_what_one_does(run_ranks: Any) -> None:
    alone = fit_here()
    for found in run_ranks(2, fit_here):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)


def test_the_rounding_of_bf16_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_schedule_of, "SUBSET_COST", 0)  # so few would train alone
    module, alone = Plain(torch.float32), Plain(torch.float32)
    run = fit("vectorized", module, precision="bf16-true")
    assert [len(unit) for unit in run.strategy.active_driver.trained_groups] == [7]
    fit("sequential", alone, precision="bf16-true")
    torch.testing.assert_close(weights(module), weights(alone), rtol=1e-2, atol=1e-3)


def test_a_unit_ends_where_memory_does() -> None:
    an_example = 16 * 4 + 8
    settings = fl.engines.Vectorized(batch_bytes=200 * an_example)
    module, whole = Plain(), Plain()
    run = fit(settings, module, clients())
    assert [len(unit) for unit in run.strategy.active_driver.trained_groups] != [len(SIZES)]
    fit("vectorized", whole, clients())
    torch.testing.assert_close(weights(module), weights(whole))
