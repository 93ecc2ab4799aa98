"""What users' hooks, metrics and callbacks do on several ranks: the same as on one, or a plain refusal on all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import Ordinary, Plain, image_clients, images, loader, trainer, weights

SIZES = (1, 7, 23, 12, 5)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def metrics_of(run: L.Trainer) -> dict[str, float]:
    return {name: value.item() for name, value in run.callback_metrics.items()}


def raised(error: type[Exception], fit: Callable[[], Any]) -> str:
    try:
        fit()
    except error as found:
        return str(found)
    return "nothing was raised"


def clients() -> fl.datamodules.ClientLoaders:
    return fl.datamodules.ClientLoaders([loader(size, seed=seed) for seed, size in enumerate(SIZES)])


class Hooks(Plain):
    """Uses what Lightning hands to the hooks of a batch, and what tells a batch from another."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return x * 2, y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (1.0 if batch_idx % 2 else 0.5) * min(1.0, (1 + self.global_step) / 20)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert len(batch) == 2

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("end_loss", outputs["loss"], on_step=False, on_epoch=True)
        with torch.no_grad():
            self.net[1].weight.clamp_(-0.2, 0.2)


class LogsAtEnd(L.Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        module.log("callback_loss", outputs["loss"].detach() * len(batch[1]), on_step=False, on_epoch=True)


def train_with_hooks(clients_per_round: int | None) -> tuple[Tensor, dict[str, float], int]:
    module = Hooks()
    run = trainer(FederatedStrategy(clients_per_round=clients_per_round), 3, callbacks=[LogsAtEnd()])
    run.fit(module, clients())
    return weights(module), metrics_of(run), run.global_step


@pytest.mark.parametrize("clients_per_round", [None, 1], ids=["all", "an idle rank"])
def test_batch_hooks_do_the_same_on_any_number_of_ranks(run_ranks: Any, clients_per_round: int | None) -> None:
    expected = train_with_hooks(clients_per_round)
    for found in run_ranks(2, train_with_hooks, clients_per_round):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-11)
        assert found[1] == pytest.approx(expected[1], rel=1e-5)
        assert found[2] == expected[2]


CALLBACKS: dict[str, Callable[[], L.Callback]] = {
    "early stopping": lambda: EarlyStopping("val_loss", patience=1, min_delta=1.0),
    "average by step": lambda: EMAWeightAveraging(decay=0.5),
    "average by epoch": lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=0, update_starting_at_epoch=0),
    "stochastic weight averaging": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
}


class WithoutSchedule(Ordinary):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train_with_callback(name: str) -> tuple[Tensor, int, float]:
    module = WithoutSchedule(torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        run = trainer(FederatedStrategy(clients_per_round=3), 4, callbacks=[CALLBACKS[name]()])
        run.fit(module, image_clients(SIZES, validate=True))
    return weights(module), run.current_epoch, run.callback_metrics["val_loss"].item()


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.spread(1)
def test_callbacks_do_the_same_on_any_number_of_ranks(run_ranks: Any, name: str) -> None:
    expected = train_with_callback(name)
    for found in run_ranks(2, train_with_callback, name):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-11)
        assert found[1] == expected[1]
        assert found[2] == pytest.approx(expected[2], rel=1e-6)


class TwoLoaders(Ordinary):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def different_loaders(sanity: int) -> str:
    loaders = [loader(8, seed=8), loader(4, seed=9)]
    run = trainer("fedavg", num_sanity_val_steps=sanity)
    module = TwoLoaders()
    return raised(MisconfigurationException, lambda: run.fit(module, loader(8, seed=rank()), loaders[: 2 - rank()]))


def different_settings(name: str) -> str:
    run = trainer("fedavg", **{name: 2 + rank()})
    return raised(ValueError, lambda: run.fit(Ordinary(), loader(8, seed=rank()), loader(4, seed=9)))


def broadcasts_on_one_rank() -> str:
    class Alone(L.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if rank() == 1:
                trainer.strategy.broadcast("only I say this")

    run = trainer("fedavg", 3, callbacks=[Alone()])
    return raised(RuntimeError, lambda: run.fit(Plain(), loader(8, seed=rank())))


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.slow
def test_silos_with_different_numbers_of_validation_loaders_are_refused(run_ranks: Any, sanity: int) -> None:
    messages = run_ranks(2, different_loaders, sanity)
    assert messages[0] == messages[1]
    assert "Rank 1 has 1 loaders with batches to evaluate, rank 0 has 2" in messages[0]


@pytest.mark.parametrize("name", ["max_epochs", "check_val_every_n_epoch", "max_steps"])
@pytest.mark.spread(1)
def test_ranks_with_different_trainers_are_refused(run_ranks: Any, name: str) -> None:
    messages = run_ranks(2, different_settings, name)
    assert messages[0] == messages[1]
    assert f"setting '{name}' is 3 on rank 1 and 2 on rank 0" in messages[0]


def test_ranks_that_lose_step_are_told_where_they_are(run_ranks: Any) -> None:
    for message in run_ranks(2, broadcasts_on_one_rank):
        assert "The ranks are out of sync: rank 1 is at 'broadcast'" in message or "rank 0 is at" in message
        assert "All ranks need the same callbacks" in message


def train_with_an_empty_client() -> tuple[list[str], list[Any]]:
    sizes = (8, 8, 8, 0)
    loaders = [DataLoader(images(max(size, 3), seed), 4, drop_last=True) for seed, size in enumerate(sizes)]
    run = trainer(FederatedStrategy(client_optimizer="keep"), 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Plain(), fl.datamodules.ClientLoaders(loaders))
    told = [str(warning.message) for warning in caught if "has no data" in str(warning.message)]
    return told, [entry["empty"] for entry in run.strategy.history]


def test_a_client_without_data_is_named_by_rank_zero_whatever_rank_it_lives_on(run_ranks: Any) -> None:
    (told, empty), (told_by_other, empty_on_other) = run_ranks(2, train_with_an_empty_client)
    assert len(told) == 1
    assert told[0].startswith("Client 3 has no data")
    assert told_by_other == []
    assert empty == empty_on_other == [[3], [3]]


def use_collectives() -> tuple[Any, Tensor, Tensor, Tensor]:
    found: list[Any] = []

    class Collectives(L.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            strategy = trainer.strategy
            found.append(strategy.broadcast({"pair": (1, rank()), 3: [None, 4.5], "text": "x"}))
            found.append(strategy.broadcast(rank(), src=strategy.world_size - 1))
            found.append(module.all_gather(torch.tensor(float(rank()))).reshape(-1))
            found.append(strategy.reduce(torch.tensor(3 + rank()), reduce_op="sum"))

    trainer(FederatedStrategy(num_clients=2), callbacks=[Collectives()]).fit(Plain(), loader())
    return tuple(found)  # type: ignore[return-value]


def test_collectives_give_every_rank_the_same(run_ranks: Any) -> None:
    for said, last, gathered, total in run_ranks(2, use_collectives):
        assert said == {"pair": (1, 0), 3: [None, 4.5], "text": "x"}
        assert last == 1
        assert gathered.tolist() == [0.0, 1.0]
        assert total == 7


HOOKS = ("on_train_epoch_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end")


def stop_from_one_rank() -> list[tuple[int, Tensor]]:
    def stop(trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or rank() == 1

    found = []
    for hook in HOOKS:
        module, callback = WithoutSchedule(torch.float64), L.Callback()
        setattr(callback, hook, stop)
        run = trainer("fedavg", 3, callbacks=[callback], num_sanity_val_steps=0)
        run.fit(module, clients(), loader(8, seed=9))
        found.append((run.current_epoch, weights(module)))
    return found


def test_one_rank_that_wants_to_stop_stops_all_at_the_rounds_end(run_ranks: Any) -> None:
    first, second = run_ranks(2, stop_from_one_rank)
    for hook, (rounds, model), (other_rounds, other_model) in zip(HOOKS, first, second, strict=True):
        assert rounds == other_rounds == 1, hook
        assert torch.equal(model, other_model), hook


class Growing(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0

    def train_dataloader(self) -> fl.datamodules.ClientLoaders:
        self.num_asked += 1
        return fl.datamodules.ClientLoaders([loader(4 * (client + self.num_asked)) for client in range(3)])


def train_on_growing_data() -> tuple[Tensor, int]:
    module = Plain()
    run = trainer("fedavg", 3, reload_dataloaders_every_n_epochs=1)
    run.fit(module, datamodule=Growing())
    return weights(module), run.global_step


def test_loaders_made_anew_each_round_do_the_same_on_any_number_of_ranks(run_ranks: Any) -> None:
    expected, steps = train_on_growing_data()
    for found, found_steps in run_ranks(2, train_on_growing_data):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert found_steps == steps


def checkpoint_by_step(directory: str, every: int) -> list[Tensor]:
    seen: list[Tensor] = []

    class Globals(L.Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            seen.append(weights(module.net))

    callback = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    run = trainer("fedavg", 3, callbacks=[Globals(), callback], enable_checkpointing=True, num_sanity_val_steps=0)
    run.fit(WithoutSchedule(torch.float64), image_clients((8, 9, 5), validate=True))
    return seen


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("every", "steps"), [(1, [7, 14, 21]), (10, [14, 21])])
@pytest.mark.spread(1)
def test_checkpoints_by_step_hold_global_models_only(
    run_ranks: Any, tmp_path: Path, world_size: int, every: int, steps: list[int]
) -> None:
    models = run_ranks(world_size, checkpoint_by_step, str(tmp_path), every)[0]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == sorted(f"step={step}.ckpt" for step in steps)
    for step in steps:
        module = WithoutSchedule(torch.float64)
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        module.load_state_dict(state["state_dict"])
        assert state["global_step"] == step
        assert torch.equal(weights(module.net), models[step // 7 - 1])


def shuffled(workers: int) -> Tensor:
    module = Plain()
    data = DataLoader(images(24), 4, sampler=RandomSampler(range(24)), num_workers=workers)
    trainer(FederatedStrategy(num_clients=3), 2).fit(module, data)
    return weights(module)


def test_shuffled_loaders_with_workers_give_the_same_on_any_number_of_ranks(run_ranks: Any) -> None:
    alone = shuffled(0)
    for found in run_ranks(2, shuffled, 1):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)
