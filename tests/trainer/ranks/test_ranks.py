"""However many ranks share the work, the federation trains the same model and logs the same metrics."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from torchmetrics.classification import MulticlassAccuracy

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.models import TabularMLP
from tests.helpers.training import Ordinary, Plain, image_clients, images, loader, measured, trainer, weights

Outcome = tuple[Tensor, dict[str, float], int]


def outcome(module: Any, fit: Any) -> Outcome:
    metrics = measured(fit)
    return weights(module), metrics, fit.global_step


def train_ordinary(algorithm: str, dtype: torch.dtype, options: dict[str, Any]) -> Outcome:
    module = Ordinary(dtype)
    limit = 0 if "personal" in options else 1.0
    fit = trainer(FederatedStrategy(algorithm, **options), max_epochs=3, limit_val_batches=limit)
    fit.fit(module, image_clients((1, 7, 23, 11, 2), validate=True))
    return outcome(module, fit)


OPTIONS: dict[str, dict[str, Any]] = {
    "all clients": {},
    "two of five": {"clients_per_round": 2},
    "two passes, kept optimizers": {"local_epochs": 2, "client_optimizer": "keep"},
    "local steps": {"local_steps": 3, "clients_per_round": 0.6},
    "personal head": {"personal": ["net.4.*"]},
}


def assert_same(outcomes: list[Outcome], expected: Outcome, rtol: float) -> None:
    for found in outcomes:
        torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=rtol * 0.1)
        assert found[1] == pytest.approx(expected[1], rel=1e-5)
        assert found[2] == expected[2]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.spread(1)
def test_any_number_of_ranks_gives_the_same(run_ranks: Any, options: str) -> None:
    alone = train_ordinary("fedavg", torch.float64, OPTIONS[options])
    for world_size in (2, 4):
        outcomes = run_ranks(world_size, train_ordinary, "fedavg", torch.float64, OPTIONS[options])
        assert_same(outcomes, alone, rtol=1e-9)
        assert all(torch.equal(weights, outcomes[0][0]) for weights, *_ in outcomes)


def train_plain(
    algorithm: str, num_clients: int, options: dict[str, Any], dtype: torch.dtype = torch.float64
) -> Outcome:
    module = Plain(dtype)
    fit = trainer(FederatedStrategy(algorithm, num_clients=num_clients, **options), max_epochs=10)
    fit.fit(module, loader(24, shuffle=True))
    return outcome(module, fit)


@pytest.mark.parametrize("options", [{}, {"clients_per_round": 3}], ids=str)
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
@pytest.mark.spread(1)
def test_ten_rounds_of_seven_clients_over_uneven_ranks(run_ranks: Any, algorithm: str, options: dict[str, Any]) -> None:
    alone = train_plain(algorithm, 7, options)
    alone32 = train_plain(algorithm, 7, options, torch.float32)
    for world_size in (2, 4):
        assert_same(run_ranks(world_size, train_plain, algorithm, 7, options), alone, rtol=1e-9)
        assert_same(run_ranks(world_size, train_plain, algorithm, 7, options, torch.float32), alone32, rtol=1e-5)


def test_the_same_ranks_give_the_same_bits(run_ranks: Any) -> None:
    first, again = (run_ranks(4, train_plain, "scaffold", 7, {}) for _ in range(2))
    assert torch.equal(first[0][0], again[0][0])
    assert not torch.equal(first[0][0], run_ranks(4, train_plain, "scaffold", 7, {"seed": 1})[0][0])


def test_ranks_without_clients_take_part(run_ranks: Any) -> None:
    alone = train_plain("fedavg", 2, {"clients_per_round": 1})
    assert_same(run_ranks(4, train_plain, "fedavg", 2, {"clients_per_round": 1}), alone, rtol=1e-9)


SILO_SIZES = (3, 17, 9, 1)


class Silo(Ordinary):
    """Gathers a metric that is not logged itself, and sums."""

    def __init__(self) -> None:
        super().__init__(torch.float64)
        self.by_hand = MulticlassAccuracy(4, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("examples", float(len(batch[1])), reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("largest", batch[0].max(), reduce_fx="max", on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.by_hand(self.net(batch[0].double()), batch[1])
        self.log("val_examples", float(len(batch[1])), reduce_fx="sum")
        self.log("val_synced", float(len(batch[1])), sync_dist=True, on_step=True, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val_by_hand", self.by_hand.compute())
        self.by_hand.reset()


def silo_data(rank: int) -> tuple[DataLoader, DataLoader]:
    return loader(SILO_SIZES[rank], seed=rank), loader(5 + 4 * rank, seed=10 + rank)


def train_silo() -> Outcome:
    module = Silo()
    fit = trainer("fedavg", max_epochs=2)
    fit.fit(module, *silo_data(fit.global_rank))
    return outcome(module, fit)


def simulate_silos(num_silos: int) -> Outcome:
    module = Silo()
    fit = trainer("fedavg", max_epochs=2)
    silos = [silo_data(rank) for rank in range(num_silos)]
    validation = DataLoader(ConcatDataset([val.dataset for _, val in silos]), batch_size=4)
    fit.fit(module, fl.datamodules.ClientLoaders([train for train, _ in silos]), validation)
    return outcome(module, fit)


@pytest.mark.parametrize("num_silos", [2, 4])
@pytest.mark.spread(1)
def test_silos_are_their_simulation_and_validate_on_their_union(run_ranks: Any, num_silos: int) -> None:
    simulated = simulate_silos(num_silos)
    outcomes = run_ranks(num_silos, train_silo)
    for _, metrics, _ in [simulated, *outcomes]:
        assert metrics["examples"] == sum(SILO_SIZES[:num_silos])
        assert metrics["val_examples"] == sum(5 + 4 * rank for rank in range(num_silos))
        assert 1 <= metrics.pop("val_synced") <= 4
        metrics.pop("val_synced_epoch")
    assert_same(outcomes, simulated, rtol=1e-9)


def ddp_step(data: list[Any]) -> Tensor:
    module = Plain()
    losses = [module.training_step(next(iter(DataLoader(shard, batch_size=len(shard)))), 0) for shard in data]
    torch.stack(losses).mean().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    return weights(module)


def test_equal_shards_and_one_step_are_ddp() -> None:
    shards = [images(6, seed) for seed in range(4)]
    module = Plain()
    trainer("fedavg").fit(module, fl.datamodules.ClientDatasets(shards, batch_size=None))
    torch.testing.assert_close(weights(module), ddp_step(shards), rtol=1e-10, atol=1e-12)


def one_rank_differs(what: str) -> str:

    rank = int(os.environ["RANK"])
    module = Plain()
    if rank == 1 and what == "tensor":
        module.net[3] = nn.Linear(8, 5)
    others: dict[str, Any] = {"setting": {"algorithm": "scaffold"}, "clients": {"num_clients": 7}}
    options = {"algorithm": "fedavg", **({"num_clients": 4} if what == "clients" else {})}
    strategy = FederatedStrategy(**{**options, **(others.get(what, {}) if rank == 1 else {})})
    with pytest.raises(ValueError, match="do not train the same thing") as error:
        trainer(strategy).fit(module, loader(8, seed=rank))
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "named"), [("tensor", "'net.3.weight'"), ("setting", "'algorithm'"), ("clients", "'num_clients'")]
)
@pytest.mark.spread(1)
def test_ranks_that_differ_are_told_on_every_rank(run_ranks: Any, what: str, named: str) -> None:
    messages = run_ranks(2, one_rank_differs, what)
    assert messages[0] == messages[1]
    assert named in messages[0]
    assert "Rank 1" in messages[0]


class Tuned(Plain):
    def __init__(self, lr: float = 0.1, momentum: float = 0.0, folder: str = "") -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=self.hparams["momentum"])


class Hidden(Plain):
    """Its learning rate is in no hyper-parameter."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def train_differently(what: str) -> str:
    rank = int(os.environ["RANK"])
    modules: dict[str, Any] = {
        "lr": lambda: Tuned(lr=[0.05, 0.5][rank]),
        "optimizer": lambda: Hidden([0.05, 0.5][rank]),
        "folder": lambda: Tuned(folder=f"silo{rank}"),
    }
    try:
        trainer("fedavg").fit(modules[what](), loader(8, seed=rank))
    except ValueError as error:
        return str(error)
    return "trained"


def test_silos_that_train_differently_are_told(run_ranks: Any) -> None:
    for what, named in {
        "lr": "'model.lr' is 0.5 on",
        "optimizer": "'SGD, lr' is 0.5 on rank 1 and 0.05 on rank 0",
    }.items():
        for message in run_ranks(2, train_differently, what):
            assert named in message
    assert run_ranks(2, train_differently, "folder") == ["trained", "trained"]


def silo_table(what: str, rank: int) -> str:
    columns = ["bmi", "age", "sex", "ill"] if what == "order" and rank == 1 else ["age", "bmi", "sex", "ill"]
    sexes, ills = ["f", "m"], ["no", "yes"]
    if rank == 1:
        sexes = {"sex": ["0", "1"], "category": ["f", "f"]}.get(what, sexes)
        ills = ["healthy", "ill"] if what == "classes" else ills
    rows = [
        {"age": str(30 + i), "bmi": str(20 + i % 7), "sex": f"s{sexes[i % 2]}", "ill": ills[i // 2 % 2]}
        for i in range(40)
    ]
    return "\n".join([",".join(columns), *(",".join(row[column] for column in columns) for row in rows)]) + "\n"


def train_on_table(what: str) -> str:
    rank = int(os.environ["RANK"])
    path = Path(f"silo{rank}.csv")
    path.write_text(silo_table(what, rank))
    data = fl.datamodules.TabularDataModule(path, "ill", features=None)
    data.setup()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            trainer("fedavg").fit(TabularMLP(data.num_features, (4,), data.num_classes), datamodule=data)
        except ValueError as error:
            return str(error)
    is_told = any("scales its columns by its own rows" in str(warning.message) for warning in told)
    return "told of scaling" if is_told else "trained"


@pytest.mark.parametrize(
    ("what", "named"),
    [("order", "data 'features'"), ("classes", "data 'classes'"), ("sex", "sex=s0"), ("category", "data 'features'")],
)
@pytest.mark.spread(1)
def test_tables_of_silos_that_differ_are_told_before_training(run_ranks: Any, what: str, named: str) -> None:
    messages = run_ranks(2, train_on_table, what)
    assert messages[0] == messages[1]
    assert named in messages[0]


def test_tables_of_silos_that_agree_are_trained(run_ranks: Any) -> None:
    assert run_ranks(2, train_on_table, "same") == ["told of scaling", "trained"]
