"""Secure aggregation between silos: three or four ranks, each with data and an identity of its own."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

import lightning_fl as fl
from lightning_fl.communication import Message
from lightning_fl.communication.group import TorchGroup
from lightning_fl.privacy.secagg import SecureAggregation, SecureAggregationError
from lightning_fl.privacy.secagg.keys import KeyFolder
from tests.helpers.training import Plain, loader, trainer, weights
from tests.trainer.ranks.test_hooks_and_callbacks import rank

RunRanks = Callable[..., list[Any]]
SIZES = (5, 23, 11, 8)


class Net(L.LightningModule):
    """BatchNorm, and logged means, sums and a torchmetric whose states are sums."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))
        self.val_acc = MulticlassAccuracy(4, average="micro")
        self.train_acc = MulticlassAccuracy(4, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        scores = self.net(x)
        loss = nn.functional.cross_entropy(scores, y)
        self.train_acc(scores, y)
        self.log("loss", loss, on_epoch=True, on_step=False)
        self.log("examples", float(len(y)), reduce_fx="sum", on_epoch=True, on_step=False)
        self.log("train_acc", self.train_acc, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self.net(x)
        self.val_acc(scores, y)
        self.log("val_loss", nn.functional.cross_entropy(scores, y))
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def keys(tmp_path: Path) -> str:
    """Folders of four silos that trust each other, with their ranks in the place of ``{rank}``."""
    folders = [KeyFolder(tmp_path / f"silo{number}") for number in range(4)]
    public = [folder.create() for folder in folders]
    for folder in folders:
        folder.trust(public)
    return str(tmp_path / "silo{rank}")


def fit(algorithm: str, aggregator: Any, rounds: int = 1, **options: Any) -> tuple[Tensor, dict[str, float], list[Any]]:
    module = Net()
    if "silo_name" in options:
        options["silo_name"] = f"silo-{9 - rank()}"
    strategy = fl.FederatedStrategy(algorithm, aggregator=aggregator, **options)
    run = trainer(strategy, rounds)
    own = loader(SIZES[rank()], batch_size=6, seed=rank(), drop_last=False)
    run.fit(module, own, loader(4 + 5 * rank(), seed=20 + rank()))
    return weights(module), {name: value.item() for name, value in run.callback_metrics.items()}, strategy.history


def both(algorithm: str, keys: str, rounds: int, options: dict[str, Any]) -> Any:
    """The plain run and the secure one, and all that this rank has told the others in the second."""
    plain = fit(algorithm, None, rounds, **options)
    told: list[dict[str, Any]] = []
    gather = TorchGroup.all_gather

    def listen(group: TorchGroup, message: Message, topic: str = "") -> list[Message]:
        told.append({"topic": topic, "fields": message.fields, "tensors": list(message.tensors)})
        return gather(group, message, topic)

    TorchGroup.all_gather = listen  # type: ignore[method-assign]
    try:
        secure = fit(algorithm, SecureAggregation(keys=keys, clip=4.0, aux_clip=64.0), rounds, **options)
    finally:
        TorchGroup.all_gather = gather  # type: ignore[method-assign]
    return plain, secure, told


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
@pytest.mark.spread(1)
def test_three_silos_train_the_model_of_the_plain_run(run_ranks: RunRanks, keys: str, algorithm: str) -> None:
    # With and without names in place of the ranks.
    options = {"weighting": "uniform"} if algorithm == "fedavg" else {"silo_name": "{rank}"}
    results = run_ranks(3, both, algorithm, keys, 1, options)
    bound = 4.0 / (2**29 - 1)  # of the mean of 3 clients of weight 1; float32 rounds at 6e-8
    for plain, secure, _ in results:
        assert torch.equal(secure[0], results[0][1][0])
        assert (secure[0] - plain[0]).abs().max() <= bound + 1.2e-7
        assert secure[1] == pytest.approx(plain[1], rel=1e-6)
        for name in ("num_clients", "num_examples", "num_steps", "refused"):
            assert secure[2][0][name] == plain[2][0][name]
        assert secure[2][0]["update_spread"] == pytest.approx(plain[2][0]["update_spread"], rel=1e-4)
        assert secure[2][0]["num_bytes"] < plain[2][0]["num_bytes"] + 8000, "the vector has the size of float32"


def numbers(value: Any) -> list[float]:
    """All numbers in a message that are not 0 or 1."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [value] if is_number and value not in (0, 1) else []


def test_nothing_of_one_silo_is_told(run_ranks: RunRanks, keys: str) -> None:
    """Neither examples, steps, losses, digests of data nor states of metrics, also with SCAFFOLD and BatchNorm."""
    results = run_ranks(3, both, "scaffold", keys, 2, {"local_epochs": 2})
    for own, (plain, secure, told) in enumerate(results):
        assert (secure[0] - plain[0]).abs().max() < 1e-5
        of_round = [message for message in told if "round" in message["topic"]]
        assert [message["topic"] for message in of_round] == ["end of round 0", "end of round 1"]
        evaluations = [message for message in told if message["topic"] == "evaluation"]
        assert len(evaluations) >= 4
        for message in [*of_round, *evaluations]:
            assert message["tensors"] == []
            fields = {name: value for name, value in message["fields"].items() if name != "schedule_end"}
            states = fields.pop("metric_states")
            assert set(numbers(fields)) <= {float(own)}, message["topic"]
            assert all(set(state) == {"shapes"} for state in states.values())
            assert "sums" not in fields
        for message in of_round:
            end = json.dumps(message["fields"]["schedule_end"])
            assert '["num_optimizer_steps", 0]' in end


def silo_with_nan(aggregator: Any) -> tuple[Tensor, list[Any]]:
    class Broken(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if rank() == 1 else loss

    module, strategy = Broken(), fl.FederatedStrategy(aggregator=aggregator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Round 0: the updates of 1 hold NaN")
        trainer(strategy).fit(module, loader(SIZES[rank()], seed=rank()))
    return weights(module), strategy.history


def test_a_silo_with_nan_refuses_itself(run_ranks: RunRanks, keys: str) -> None:
    plain = run_ranks(4, silo_with_nan, None)
    for (model, history), (expected, _) in zip(
        run_ranks(4, silo_with_nan, SecureAggregation(keys=keys, max_weight=32)), plain, strict=True
    ):
        assert (model - expected).abs().max() < 1e-5
        assert (history[0]["refused"], history[0]["num_clients"]) == ([1], 3)
        assert history[0]["num_examples"] == SIZES[0] + SIZES[2] + SIZES[3]


def expect_error(kind: type[Exception], arrange: str, keys: str) -> str:
    with pytest.raises(kind) as error:
        globals()[arrange](keys)
    return str(error.value)


def without_keys(keys: str) -> None:
    trainer("secagg").fit(Plain(), loader(8, seed=rank()))


@pytest.mark.slow
def test_without_keys_it_stops_and_says_how_to_make_them(run_ranks: RunRanks) -> None:
    for message in run_ranks(3, expect_error, ValueError, "without_keys", ""):
        for number in range(3):
            assert f"lightning-fl keys create keys/silo{number}\n" in message
        assert "lightning-fl keys trust keys/silo1 keys/silo0/identity.pub keys/silo2/identity.pub" in message


def with_keys(keys: str) -> None:
    strategy = fl.FederatedStrategy(aggregator=SecureAggregation(keys=keys))
    trainer(strategy).fit(Plain(), loader(8, seed=rank()))


def test_a_silo_that_one_does_not_trust(run_ranks: RunRanks, keys: str) -> None:
    Path(keys.replace("{rank}", "2"), "trusted").unlink()
    for told in run_ranks(3, expect_error, ValueError, "with_keys", keys):
        assert re.search(r"Rank 2 does not trust rank 0 \([0-9a-f]{32}\), rank 1.*lightning-fl keys trust", told)


@pytest.mark.slow
def test_one_identity_for_two_silos(run_ranks: RunRanks, keys: str) -> None:
    one = keys.replace("{rank}", "1")
    for told in run_ranks(3, expect_error, ValueError, "with_keys", one):
        assert "two ranks with the same identity" in told


@pytest.mark.slow
def test_two_silos_are_refused(run_ranks: RunRanks, keys: str) -> None:
    for message in run_ranks(2, expect_error, ValueError, "with_keys", keys):
        assert "needs at least 3" in message


def with_largest(keys: str) -> None:
    class Largest(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("worst", loss, reduce_fx="max", on_epoch=True, on_step=False)
            return loss

    trainer(fl.FederatedStrategy(aggregator=SecureAggregation(keys=keys))).fit(Largest(), loader(8, seed=rank()))


def with_predictions(keys: str) -> None:
    class Curve(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.auroc = MulticlassAUROC(4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.auroc.update(self.net(batch[0].double()).detach(), batch[1])
            return super().training_step(batch, batch_idx)

    trainer(fl.FederatedStrategy(aggregator=SecureAggregation(keys=keys))).fit(Curve(), loader(8, seed=rank()))


def with_step_schedule(keys: str) -> None:
    class Scheduled(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trainer(fl.FederatedStrategy(aggregator=SecureAggregation(keys=keys))).fit(Scheduled(), loader(8, seed=rank()))


def with_client_metrics(keys: str) -> None:
    strategy = fl.FederatedStrategy(aggregator=SecureAggregation(keys=keys))
    callbacks = [fl.callbacks.ClientMetrics()]
    trainer(strategy, callbacks=callbacks).fit(Plain(), loader(8, seed=rank()))


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        ("with_client_metrics", "ClientMetrics shows every silo's own figures"),
        ("with_largest", "'worst' is logged with reduce_fx='max'"),
        ("with_predictions", "'auroc' keeps more than sums"),
        ("with_step_schedule", "steps of the largest silo"),
    ],
)
@pytest.mark.spread(1)
def test_what_a_sum_can_not_give_is_refused(run_ranks: RunRanks, keys: str, arrange: str, message: str) -> None:
    for told in run_ranks(3, expect_error, MisconfigurationException, arrange, keys):
        assert message in told


def restart(keys: str) -> str:
    """Trains one round, from the same model each time."""
    try:
        with_keys(keys)
    except SecureAggregationError as error:
        return str(error)
    return "trained"


@pytest.mark.slow
def test_a_restart_with_fewer_silos_is_refused(run_ranks: RunRanks, keys: str, tmp_path: Path) -> None:
    assert run_ranks(4, restart, keys) == ["trained"] * 4
    assert run_ranks(4, restart, keys) == ["trained"] * 4
    assert (tmp_path / "silo0" / "sent").stat().st_mode & 0o077 == 0
    for told in run_ranks(3, restart, keys):
        assert "the difference of the two sums could reveal single updates" in told
