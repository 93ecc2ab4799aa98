"""From the training loader to the clients: the table of the documentation."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.distributed import run_script
from tests.helpers.training import Plain, image_clients, images, loader, trainer, weights


class Cohorts(fl.callbacks.FederatedCallback):
    """Notes the cohort of each round, and each client's examples and steps on this rank."""

    def __init__(self) -> None:
        self.cohorts: list[list[Any]] = []
        self.trained: dict[Any, tuple[int, int]] = {}

    def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:
        assert round == len(self.cohorts)
        self.cohorts.append(list(cohort))

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        self.trained[client] = (run.num_examples, run.num_steps)


def train(strategy: Any, data: Any, max_epochs: int = 1, **options: Any) -> Cohorts:
    cohorts = Cohorts()
    trainer(strategy, max_epochs, callbacks=[cohorts], **options).fit(Plain(), data)
    return cohorts


def test_a_plain_loader_in_one_process_is_ten_iid_clients(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = train("fedavg", loader(25, shuffle=True))
    assert found.cohorts == [list(range(10))]
    assert sorted(examples for examples, _ in found.trained.values()) == [2] * 5 + [3] * 5
    assert "Simulating 10 clients" in caplog.text
    assert "FederatedStrategy(num_clients=..." in caplog.text


def test_a_plain_loader_is_split_by_the_given_partition() -> None:
    found = train(FederatedStrategy(num_clients=3, partition=fl.datamodules.Dirichlet(0.5)), loader(48))
    sizes = [examples for examples, _ in found.trained.values()]
    assert len(sizes) == 3
    assert sum(sizes) == 48
    assert max(sizes) - min(sizes) > 1


def test_client_loaders_are_lazy_and_keep_their_ids() -> None:
    made: list[str] = []

    def make(client: str) -> DataLoader:
        made.append(client)
        return loader(8)

    clients = fl.datamodules.ClientLoaders([f"clinic-{i}" for i in range(50)], make)
    found = train(FederatedStrategy(clients_per_round=2), clients, max_epochs=2)
    assert set(made) == {client for cohort in found.cohorts for client in cohort}
    assert all(len(set(cohort)) == 2 for cohort in found.cohorts)


def test_cohorts_depend_on_seed_and_round_only() -> None:
    def cohorts(seed: int) -> list[list[Any]]:
        strategy = FederatedStrategy(clients_per_round=3, seed=seed)
        return train(strategy, image_clients([4] * 12), max_epochs=4).cohorts

    assert cohorts(0) == cohorts(0)
    assert cohorts(0) != cohorts(1)
    assert len({tuple(cohort) for cohort in cohorts(0)}) > 1


@pytest.mark.parametrize(("share", "size"), [(0.25, 3), (1.0, 12), (1, 1), (0.01, 1), (None, 12)])
def test_clients_per_round_is_a_count_or_a_share(share: Any, size: int) -> None:
    found = train(FederatedStrategy(clients_per_round=share), image_clients([4] * 12))
    assert len(found.cohorts[0]) == size


@pytest.mark.parametrize(
    ("work", "steps"),
    [
        ({}, [1, 2, 6]),
        ({"local_epochs": 3}, [3, 6, 18]),
        ({"local_steps": 5}, [5, 5, 5]),
        ({"local_steps": 1}, [1] * 3),
    ],
    ids=str,
)
def test_work_is_passes_or_steps_and_never_changes_a_weight(work: dict[str, int], steps: list[int]) -> None:
    found = train(FederatedStrategy(**work), image_clients((1, 7, 23)))
    assert [found.trained[client] for client in range(3)] == list(zip((1, 7, 23), steps, strict=True))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"limit_train_batches": 2}, [1, 2, 2]),
        ({"fast_dev_run": 1}, [1, 1, 1]),
        ({"accumulate_grad_batches": 4}, [1, 1, 2]),
    ],
    ids=str,
)
def test_limits_and_accumulation_count_within_a_client(options: dict[str, Any], steps: list[int]) -> None:
    found = train("fedavg", image_clients((1, 7, 23)), **options)
    assert [found.trained[client] for client in range(3)] == list(zip((1, 7, 23), steps, strict=True))


def test_drop_last_weighs_what_is_yielded() -> None:
    clients = fl.datamodules.ClientDatasets([images(7), images(8)], batch_size=4, drop_last=True)
    assert train("fedavg", clients).trained == {0: (4, 1), 1: (8, 2)}


class Stream(IterableDataset):
    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples

    def __iter__(self) -> Iterator[Any]:
        return iter(images(self.num_examples))


def test_a_loader_without_length_weighs_what_it_processed() -> None:
    streams = {name: DataLoader(Stream(size), batch_size=4) for name, size in (("a", 3), ("b", 10))}
    sized = {name: loader(size) for name, size in (("a", 3), ("b", 10))}
    found = train("fedavg", fl.datamodules.ClientLoaders(streams), max_epochs=2)
    assert found.trained == {"a": (3, 1), "b": (10, 3)}
    assert train("fedavg", fl.datamodules.ClientLoaders(sized), max_epochs=2).trained == found.trained


def test_each_pass_has_a_fresh_order_of_its_client_and_round() -> None:
    class Order(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[list[float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(batch[0][:, 0, 0, 0].tolist())
            return super().training_step(batch, batch_idx)

    def order(generator: torch.Generator | None = None) -> list[list[float]]:
        module = Order()
        clients = fl.datamodules.ClientLoaders([loader(8, batch_size=8, shuffle=True, generator=generator)])
        trainer(FederatedStrategy(local_epochs=2), 2).fit(module, clients)
        return module.seen

    passes = order()
    assert len({tuple(one) for one in passes}) == 4
    assert len({tuple(sorted(one)) for one in passes}) == 1
    assert passes == order()
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    assert order(generator) == order(generator)
    assert torch.equal(generator.get_state(), state)


def test_a_second_fit_goes_on_and_a_fresh_trainer_starts_anew() -> None:
    module, at_once = Plain(), Plain()
    clients = image_clients((8, 12))
    fit = trainer("scaffold", 2)
    fit.fit(module, clients)
    fit.fit_loop.max_epochs = 4
    fit.fit(module, clients)
    trainer("scaffold", 4).fit(at_once, clients)
    torch.testing.assert_close(weights(module), weights(at_once), rtol=1e-12, atol=0)


def same_first_batch(seed_by_rank: bool) -> list[str]:
    import os
    import warnings

    rank = int(os.environ["RANK"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer("fedavg").fit(Plain(), loader(8, seed=rank if seed_by_rank else 0))
    return [str(warning.message) for warning in caught if "same first batch" in str(warning.message)]


def test_silos_with_the_same_data_are_warned(run_ranks: Any) -> None:
    assert [len(found) for found in run_ranks(2, same_first_batch, False)] == [1, 0]
    assert run_ranks(2, same_first_batch, True) == [[], []]


def silo_clients() -> tuple[list[list[Any]], list[Any]]:
    import os

    found = train("fedavg", loader(8, seed=int(os.environ["RANK"])), max_epochs=2)
    return found.cohorts, list(found.trained)


def test_started_by_a_launcher_each_rank_is_a_silo(run_ranks: Any) -> None:
    assert run_ranks(2, silo_clients) == [([[0, 1], [0, 1]], [0]), ([[0, 1], [0, 1]], [1])]


def some_ranks_validate() -> str:
    import os

    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from tests.helpers.training import Ordinary

    rank = int(os.environ["RANK"])
    with pytest.raises(MisconfigurationException, match="has no validation data") as error:
        trainer("fedavg", limit_val_batches=0 if rank == 1 else 1.0, num_sanity_val_steps=0).fit(
            Ordinary(), loader(8, seed=rank), loader(4, seed=9)
        )
    return str(error.value)


@pytest.mark.slow
def test_silos_validate_all_or_none(run_ranks: Any) -> None:
    assert run_ranks(2, some_ranks_validate)[0].startswith("Rank 1 has no validation data")


SCRIPT = """
import lightning_fl
from tests.helpers.training import Plain, loader, trainer, weights

fit = trainer("fedavg", 2, devices=2)
module = Plain()
fit.fit(module, loader(24, shuffle=True))
with open(f"rank{fit.global_rank}", "w") as file:
    file.write(f"of {fit.world_size}: {fit.global_step} {weights(module).sum().item():.12f}")
"""


@pytest.mark.slow
def test_devices_n_simulates_with_processes_that_lightning_starts(tmp_path: Any) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    run_script([sys.executable, "train.py"], cwd=tmp_path, num_processes=2)
    module = Plain()
    fit = trainer("fedavg", 2)
    fit.fit(module, loader(24, shuffle=True))
    result = f"{fit.global_step} {weights(module).sum().item():.12f}"
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == [f"of 2: {result}"] * 2
