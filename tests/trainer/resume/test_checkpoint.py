"""Stopping after any round and going on is the same as not stopping."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import Ordinary, Plain, image_clients, loader, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]
ROUNDS = 5
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {"algorithm": "fedavg", "clients_per_round": 2},
    "scaffold": {"algorithm": "scaffold", "clients_per_round": 2},
    "kept optimizers": {"client_optimizer": "keep", "clients_per_round": 2},
    "personal": {"personal": ["net.3.*"], "clients_per_round": 2},
}


def by_step(params: Any, momentum: float = 0.9) -> Any:
    optimizer = SGD(params, lr=0.1, momentum=momentum)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, 30), "interval": "step"}}


def by_epoch(params: Any, momentum: float = 0.9) -> Any:
    optimizer = Adam(params, lr=0.01) if momentum else SGD(params, lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": ExponentialLR(optimizer, 0.5)}


def fit(
    strategy: str, max_epochs: int, ckpt_path: Any = None, make_optimizer: Any = by_step, **options: Any
) -> tuple[L.Trainer, Tensor]:
    if strategy == "scaffold" and make_optimizer in (by_step, by_epoch):
        make_optimizer = partial(make_optimizer, momentum=0.0)
    module = Plain(make_optimizer=make_optimizer)
    run = trainer(FederatedStrategy(**STRATEGIES[strategy]), max_epochs, **options)
    run.fit(module, image_clients((5, 7, 11)), ckpt_path=ckpt_path, weights_only=True)
    return run, weights(module)


class WorseAndWorse(Ordinary):
    """Its validation metric never improves after the first round."""

    def on_validation_epoch_end(self) -> None:
        self.log("val_badness", float(self.current_epoch))


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.spread(1)
def test_the_last_checkpoint_is_the_last_round_and_not_the_last_improvement(
    save_last: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(L.Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    def fit_rounds(path: str | None = None, more: Any = ()) -> Tensor:
        checkpoint = ModelCheckpoint("kept", monitor="val_badness", save_last=save_last)
        module = WorseAndWorse()
        run = trainer(FederatedStrategy(seed=0), 5, callbacks=[checkpoint, *more], enable_checkpointing=True)
        run.fit(module, image_clients((5, 7), validate=True), ckpt_path=path)
        return weights(module)

    expected = fit_rounds()
    for path in Path("kept").iterdir():
        path.unlink()
    fit_rounds(more=[Stop()])
    best, last = sorted(Path("kept").glob("*.ckpt"), key=lambda path: path.name.startswith("last"))
    assert torch.load(best, weights_only=True)["epoch"] == 0
    assert torch.load(last, weights_only=True)["epoch"] == 2
    with caplog.at_level("INFO"):
        assert torch.equal(fit_rounds(str(last)), expected)
    assert "Resuming with round 4 after kept/last.ckpt." in caplog.text


def every_round(**options: Any) -> dict[str, Any]:
    callback = ModelCheckpoint("ckpt", filename="{epoch}", save_top_k=-1, **options)
    return {"enable_checkpointing": True, "callbacks": [callback]}


@pytest.mark.parametrize("make_optimizer", [by_step, by_epoch])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.spread(2)
def test_resuming_after_any_round_is_exact(strategy: str, make_optimizer: Any) -> None:
    run, whole = fit(strategy, ROUNDS, make_optimizer=make_optimizer, **every_round())
    for last in range(ROUNDS - 1):
        resumed, found = fit(strategy, ROUNDS, f"ckpt/epoch={last}.ckpt", make_optimizer)
        assert torch.equal(found, whole), last
        assert resumed.global_step == run.global_step
        rounds = resumed.strategy.active_driver
        assert equal(rounds.state.server, run.strategy.active_driver.state.server)
        assert [entry["round"] for entry in resumed.strategy.history] == list(range(ROUNDS))


@pytest.mark.parametrize("strategy", ["scaffold", "fedavg"])
def test_resuming_with_the_objects_of_the_last_fit_is_exact(strategy: str) -> None:
    run, whole = fit(strategy, ROUNDS, **every_round())
    module = run.lightning_module
    run.fit(module, image_clients((5, 7, 11)), ckpt_path="ckpt/epoch=1.ckpt", weights_only=True)
    assert torch.equal(weights(module), whole)
    assert [entry["round"] for entry in run.strategy.history] == list(range(ROUNDS))


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)


def test_without_the_server_state_the_continuation_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = fit("scaffold", ROUNDS, **every_round())
    monkeypatch.setattr("lightning_fl.strategies.driver.RoundDriver.resume", lambda *_: None)
    assert not torch.equal(fit("scaffold", ROUNDS, "ckpt/epoch=2.ckpt")[1], whole)


@pytest.mark.parametrize(
    "options",
    [
        {"save_on_train_epoch_end": True},
        {"save_on_train_epoch_end": False},
        {"save_on_train_epoch_end": False, "monitor": "val_loss"},
        {"monitor": "val_loss"},
        {"monitor": "loss_epoch"},
        {"every_n_epochs": 2},
        {"every_n_train_steps": 10},
        {"every_n_train_steps": 10, "monitor": "val_loss"},
    ],
    ids=str,
)
@pytest.mark.spread(2)
def test_every_form_of_model_checkpoint_resumes(options: dict[str, Any]) -> None:
    def run(ckpt_path: Any = None, **more: Any) -> Tensor:
        module = Ordinary(torch.float64)
        clients = image_clients((1, 7, 23), validate=True)
        trainer(FederatedStrategy(client_optimizer="keep"), 4, **more).fit(
            module, clients, ckpt_path=ckpt_path, weights_only=True
        )
        return weights(module)

    callback = ModelCheckpoint("ckpt", save_top_k=-1, **options)
    whole = run(enable_checkpointing=True, callbacks=[callback])
    saved = sorted(Path("ckpt").glob("*.ckpt"))
    assert len(saved) == 2 if "every_n_epochs" in options else 4
    for path in saved:
        again = ModelCheckpoint("again", save_top_k=-1, **options)
        assert torch.equal(run(path, enable_checkpointing=True, callbacks=[again]), whole), path


def test_a_plain_trainer_goes_on_from_a_federated_checkpoint() -> None:
    fit("fedavg", 2, **every_round())
    module = Plain(make_optimizer=by_step)
    plain = trainer("auto", 3)
    plain.fit(module, image_clients((5, 7, 11)), ckpt_path="ckpt/epoch=1.ckpt", weights_only=True)
    assert plain.current_epoch == 3
    loaded = torch.load("ckpt/epoch=1.ckpt", weights_only=True)
    Plain().load_state_dict(loaded["state_dict"])


def test_a_federation_goes_on_from_a_plain_checkpoint() -> None:
    module = Plain()
    plain = trainer("auto", 1, **every_round())
    plain.fit(module, image_clients((5, 7, 11)))
    with pytest.warns(UserWarning, match="was not written by a federation"):
        run, _ = fit("fedavg", 2, "ckpt/epoch=0.ckpt", make_optimizer=lambda params: SGD(params, lr=0.1))
    assert len(run.strategy.history) == 1


class StateAtStart(fl.callbacks.FederatedCallback):
    """How many steps the optimizer has behind it when each client starts."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_client_start(self, trainer: L.Trainer, module: L.LightningModule, client: int | str) -> None:
        states = list(trainer.optimizers[0].state.values())
        self.seen.append(float(states[0]["step"]) if states else 0.0)


@pytest.mark.filterwarnings("ignore:.*was not written by a federation")
def test_clients_do_not_start_with_the_moments_of_a_plain_checkpoint() -> None:
    fit_plain = trainer("auto", 2, **every_round())
    fit_plain.fit(Plain(make_optimizer=Adam), loader(12))
    for client_optimizer, expected in (("reset", [0.0] * 4), ("keep", [6.0, 6.0, 7.0, 8.0])):
        seen = StateAtStart()
        run = trainer(FederatedStrategy(client_optimizer=client_optimizer), 4, callbacks=[seen])
        run.fit(Plain(make_optimizer=Adam), image_clients((4, 8)), ckpt_path="ckpt/epoch=1.ckpt", weights_only=True)
        assert seen.seen == expected


def test_the_last_checkpoint_is_as_old_as_every_n_epochs_says() -> None:
    saved = ModelCheckpoint("ckpt", filename="{epoch}", save_top_k=-1, save_last=True, every_n_epochs=2)
    trainer("fedavg", 3, enable_checkpointing=True, callbacks=[saved]).fit(Plain(), image_clients((5, 7)))
    assert torch.load("ckpt/last.ckpt", weights_only=True)["epoch"] == 1


def test_a_last_checkpoint_whose_name_tells_the_round_holds_that_round() -> None:
    class Named(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "{epoch}-last"

    saved = Named("ckpt", monitor="val_badness", filename="best", save_last=True)
    run = trainer("fedavg", 3, enable_checkpointing=True, callbacks=[saved])
    run.fit(WorseAndWorse(), image_clients((5, 7), validate=True))
    assert [path.name for path in Path("ckpt").glob("*last*.ckpt")] == ["epoch=2-last.ckpt"]
    assert torch.load("ckpt/epoch=2-last.ckpt", weights_only=True)["epoch"] == 2
    assert torch.load("ckpt/best.ckpt", weights_only=True)["epoch"] == 0


def test_another_algorithm_does_not_go_on() -> None:
    fit("scaffold", 1, **every_round())
    with pytest.raises(MisconfigurationException, match="written by Scaffold, whose state FedAvg can't continue from"):
        fit("fedavg", 2, "ckpt/epoch=0.ckpt")


def test_weights_alone_cannot_be_resumed() -> None:
    fit("fedavg", 1, **every_round(save_weights_only=True))
    assert "lightning_fl" not in torch.load("ckpt/epoch=0.ckpt", weights_only=True)
    with pytest.raises(KeyError, match="contains only the model"):
        fit("fedavg", 2, "ckpt/epoch=0.ckpt")


def versions() -> set[Path]:
    return set(Path("ckpt/client_states").glob("versions/*/*.safetensors"))


def test_removed_checkpoints_take_their_client_states_along() -> None:
    callback = ModelCheckpoint("ckpt", save_top_k=1, save_last=True)
    fit("scaffold", ROUNDS, enable_checkpointing=True, callbacks=[callback])
    assert len(list(Path("ckpt").glob("*.ckpt"))) == 2
    assert len(versions()) == 3
    assert len(list(Path("ckpt/client_states/manifests").iterdir())) == 1


def test_states_that_a_checkpoint_names_stay() -> None:
    _, whole = fit("scaffold", ROUNDS, **every_round())
    kept = versions()
    assert len(kept) > 3
    Path("ckpt/epoch=0.ckpt").unlink()
    assert torch.equal(fit("scaffold", ROUNDS, "ckpt/epoch=1.ckpt")[1], whole)
    assert versions() == kept


def test_missing_client_states_are_named() -> None:
    fit("scaffold", 1, **every_round())
    Path("ckpt/client_states").rename("elsewhere")
    with pytest.raises(MisconfigurationException, match=r"Copy the folder `client_states`"):
        fit("scaffold", 2, "ckpt/epoch=0.ckpt")


class SaveInside(L.Callback):
    """Asks for a checkpoint in the middle of each round."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            trainer.save_checkpoint(f"inside-{trainer.current_epoch}.ckpt")


def test_a_checkpoint_asked_for_inside_a_round_waits_for_its_end() -> None:
    with pytest.warns(UserWarning, match="is written at its end"):
        run, whole = fit("scaffold", 3, callbacks=[SaveInside()])
    checkpoint = torch.load("inside-2.ckpt", weights_only=True)
    assert checkpoint["global_step"] == run.global_step
    final = torch.cat([tensor.double().reshape(-1) for tensor in checkpoint["state_dict"].values()])
    assert torch.equal(final, whole)
    assert torch.equal(fit("scaffold", 3, "inside-0.ckpt")[1], whole)


class SaveOfAggregate(fl.callbacks.FederatedCallback):
    """Asks for a checkpoint when the round has been aggregated."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any) -> None:
        trainer.save_checkpoint(self.path)


def save_of_aggregate(path: str) -> int:
    return fit("fedavg", 1, callbacks=[SaveOfAggregate(path)])[0].global_step


def test_a_checkpoint_asked_for_at_the_aggregate_is_written_at_the_end(run_ranks: Any, tmp_path: Path) -> None:
    steps = run_ranks(2, save_of_aggregate, str(tmp_path / "aggregated.ckpt"))[0]
    assert torch.load(tmp_path / "aggregated.ckpt", weights_only=True)["global_step"] == steps


class Fails(L.Callback):
    """Raises in the middle of the third round."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 2 and batch_idx == 1:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_an_exception_inside_a_round_drops_the_round_and_saves_the_one_before(strategy: str) -> None:
    _, whole = fit(strategy, ROUNDS)
    saver = OnExceptionCheckpoint(".", "cut")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(strategy, ROUNDS, callbacks=[Fails(), saver], enable_checkpointing=True)
    resumed, found = fit(strategy, ROUNDS, "cut.ckpt")
    assert torch.equal(found, whole)
    assert len(resumed.strategy.history) == ROUNDS


def test_early_stopping_and_best_model_survive_a_resume() -> None:
    def callbacks() -> list[Any]:
        return [ModelCheckpoint("ckpt", monitor="val_loss", save_last=True), EarlyStopping("val_loss", patience=2)]

    class Stop(L.Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    def run(ckpt_path: Any = None, more: Any = ()) -> L.Trainer:
        found = trainer("fedavg", 8, enable_checkpointing=True, callbacks=[*callbacks(), *more])
        found.fit(Ordinary(), image_clients(validate=True), ckpt_path=ckpt_path, weights_only=True)
        return found

    whole = run()
    score = whole.checkpoint_callback.best_model_score
    assert run(more=[Stop()]).current_epoch == 2
    resumed = run("ckpt/last-v1.ckpt")
    assert resumed.checkpoint_callback.best_model_score == score
    assert resumed.current_epoch == whole.current_epoch


def test_one_clients_model_is_the_global_one_with_its_personal_tensors() -> None:
    run, _ = fit("personal", 3, **every_round())
    checkpoint = torch.load("ckpt/epoch=2.ckpt", weights_only=True)["state_dict"]
    states = [fl.load_client("ckpt/epoch=2.ckpt", client) for client in range(3)]
    kept = run.strategy.active_driver.store
    for client, state in enumerate(states):
        Plain().load_state_dict(state)
        assert torch.equal(state["net.1.weight"], checkpoint["net.1.weight"])
        assert torch.equal(state["net.3.weight"], kept.get(client)["personal"]["net.3.weight"])
    assert not torch.equal(states[0]["net.3.weight"], states[1]["net.3.weight"])
    with pytest.raises(ValueError, match="holds no state of client 'x'; it holds those of 0, 1, 2"):
        fl.load_client("ckpt/epoch=2.ckpt", "x")


def fit_on_rank(strategy: str, max_epochs: int, directory: str, ckpt_path: Any = None) -> tuple[Tensor, int]:
    callback = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)
    module = Plain(make_optimizer=partial(by_step, momentum=0.0))
    options = {**STRATEGIES[strategy], "clients_per_round": 2, "num_clients": 6}
    run = trainer(FederatedStrategy(**options), max_epochs, enable_checkpointing=True, callbacks=[callback])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dirpath has changed")
        run.fit(module, loader(24, shuffle=True), ckpt_path=ckpt_path, weights_only=True)
    return weights(module), run.global_step


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "personal"])
@pytest.mark.slow
def test_resuming_on_the_same_ranks_is_exact_and_on_others_to_rounding(
    run_ranks: Any, tmp_path: Path, strategy: str
) -> None:
    first, steps = run_ranks(2, fit_on_rank, strategy, 4, str(tmp_path / "whole"))[0]
    checkpoint = str(tmp_path / "whole" / "epoch=1.ckpt")
    for found, found_steps in run_ranks(2, fit_on_rank, strategy, 4, str(tmp_path / "again"), checkpoint):
        assert torch.equal(found, first)
        assert found_steps == steps
    for world_size in (1, 4):
        directory = str(tmp_path / f"on {world_size}")
        for found, _ in run_ranks(world_size, fit_on_rank, strategy, 4, directory, checkpoint):
            torch.testing.assert_close(found, first, rtol=1e-9, atol=1e-11)
