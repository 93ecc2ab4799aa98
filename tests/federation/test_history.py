"""Looking inside: the figures of each round, in ``strategy.history`` and under ``fl/`` in the loggers."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import Plain, Quadratic, image_clients, images, quadratic_clients, trainer


def test_history_tells_what_each_round_was() -> None:
    strategy = FederatedStrategy("fedavg", clients_per_round=2)
    trainer(strategy, 3).fit(Plain(), image_clients((4, 8, 12)))
    assert [entry["round"] for entry in strategy.history] == [0, 1, 2]
    for entry in strategy.history:
        assert entry["num_clients"] == 2
        assert entry["num_examples"] in (12, 16, 20)
        assert entry["num_steps"] == entry["num_examples"] / 4
        assert (entry["refused"], entry["empty"], entry["failed"]) == ([], [], [])
        assert set(entry["seconds"]) == {"read", "train", "wait", "communicate", "server", "transform"}


def test_norm_and_spread_of_the_updates_have_their_closed_form() -> None:
    strategy = FederatedStrategy("fedavg", local_steps=1)
    trainer(strategy).fit(Quadratic(start=10.0), quadratic_clients())
    deltas = torch.tensor([-0.1 * 1.0 * 10.0, -0.1 * 2.0 * 9.0, -0.1 * 0.5 * 6.0])
    weights = torch.tensor([0.25, 0.5, 0.25])
    mean = float((weights * deltas).sum())
    assert strategy.history[0]["update_norm"] == pytest.approx(abs(mean), rel=1e-6)
    expected = 1 - mean**2 / float((weights * deltas**2).sum())
    assert strategy.history[0]["update_spread"] == pytest.approx(expected, rel=1e-5)


def test_identical_clients_have_no_spread() -> None:
    strategy = FederatedStrategy("fedavg")
    trainer(strategy).fit(Plain(), fl.datamodules.ClientDatasets([images(8)] * 3, shuffle=False))
    assert strategy.history[0]["update_spread"] == pytest.approx(0.0, abs=1e-6)


def test_the_loggers_get_the_figures_of_each_round() -> None:
    logger = CSVLogger(".", name="", version="")
    trainer("fedavg", 2, logger=logger, log_every_n_steps=1).fit(Plain(), image_clients((4, 8)))
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("fl/round")]
    assert [float(row["fl/round"]) for row in rows] == [0.0, 1.0]
    assert {float(row["fl/num_clients"]) for row in rows} == {2.0}
    assert all(float(row["fl/seconds_train"]) > 0 for row in rows)


def bytes_by_rank() -> list[int]:
    strategy = FederatedStrategy("fedavg", num_clients=4)
    from tests.helpers.training import loader

    trainer(strategy, 2).fit(Plain(), loader(16))
    return [entry["num_bytes"] for entry in strategy.history]


def test_a_round_sends_the_model_once_and_a_few_kilobytes(run_ranks: Any) -> None:
    model = 8 * sum(param.numel() for param in Plain().parameters())
    assert bytes_by_rank() == [0, 0]
    for sent in run_ranks(2, bytes_by_rank):
        assert all(model < num_bytes < model + 4096 for num_bytes in sent)
