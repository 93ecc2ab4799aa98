"""Robust rules beside the rest of the framework: each cell of the table in docs/robust.md is a test."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_fl as fl
from lightning_fl.aggregation import (
    FLAME,
    Bucketing,
    Bulyan,
    CenteredClipping,
    DnC,
    FedMGDA,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    MeanAroundMedian,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    NormBound,
    RowAggregator,
    Screened,
    TrimmedMean,
)
from lightning_fl.compression import Compress, TopK
from lightning_fl.privacy import ClientLevelDP, SecureAggregation
from lightning_fl.seeding import client_generator
from tests.contract.helpers import shipped
from tests.helpers.distributed import REPOSITORY
from tests.helpers.training import Ordinary, image_clients, minimise, quadratic_clients, trainer, weights
from tests.trainer.robust.test_known_answers import A11, Rows, Sends, Table, aggregate, loaders

RULES: dict[str, RowAggregator] = {
    "`Median`": Median(1),
    "`TrimmedMean`": TrimmedMean(1),
    "`MeanAroundMedian`": MeanAroundMedian(1),
    "`Bulyan`": Bulyan(1),
    "`Krum`": Krum(1),
    "`MultiKrum`": MultiKrum(1),
    "`GeometricMedian`": GeometricMedian(1),
    "`CenteredClipping`": CenteredClipping(1.0, 3, 1),
    "`NormBound`": NormBound(None, 1),
    "`FLTrust` with a root client": FLTrust(0, 1),
    "`DnC`": DnC(1),
    "`FLAME`": FLAME(1),
    "`Screened`": Screened(None, num_attackers=1),
    "`FoolsGold`": FoolsGold(1),
    "`FedMGDA`": FedMGDA(0.5),
    "`TrimmedMean` before `NearestNeighborMixing`": TrimmedMean(1, [NearestNeighborMixing()]),
    "`Median` before `Bucketing`": Median(1, [Bucketing(2)]),
}


def cells() -> list[Any]:
    """The table, cell by cell: the rule, the column and what it says."""
    text = (REPOSITORY / "docs" / "robust.md").read_text(encoding="utf-8")
    lines = text.split("## What goes with what\n")[1].split("\n\n")[1].splitlines()
    (_, *columns), _, *rows = ([word.strip() for word in line.strip("|").split("|")] for line in lines)
    return [
        pytest.param(rule, column, cell, id=f"{rule} x {column}", marks=[pytest.mark.slow] * (column == "silos"))
        for rule, *row in rows
        for column, cell in zip(columns, row, strict=True)
    ]


TABLE = cells()


def without_privacy(name: str, rule: RowAggregator) -> None:
    fl.FederatedStrategy("fedavg", aggregator=rule, transforms=[ClientLevelDP(clip=1.0, noise_multiplier=1.0)])


def without_masks(name: str, rule: RowAggregator) -> None:
    SecureAggregation(aggregator=rule)


def side_channels(name: str, rule: RowAggregator) -> None:
    compare_with_the_mean(rule, "scaffold")


def factors(name: str, rule: RowAggregator) -> None:
    compare_with_the_mean(rule, "fednova")


def ratios(name: str, rule: RowAggregator) -> None:
    for algorithm in ("fedexp", "qfedavg", "term", "afl", "ifca", "feddyn"):
        with pytest.raises(ValueError, match=r"picks each coordinate|ratio of two sums|counts every change"):
            fl.FederatedStrategy(algorithm, aggregator=rule)
    fl.FederatedStrategy("fedexp", aggregator=rule)


def compare_with_the_mean(rule: RowAggregator, algorithm: str) -> None:
    """Clients that are all alike: whatever its coefficients, a rule gives what the mean gives."""
    clients = quadratic_clients((5.0,) * 7, (1.0,) * 7, (1,) * 7)
    mean, found = (
        minimise(fl.FederatedStrategy(algorithm, aggregator=own, weighting="uniform"), 3, clients)
        for own in (None, rule)
    )
    assert found == pytest.approx(mean, rel=1e-9)


class SendsStatistics(Sends):
    """A layer of BatchNorm has the client's row as its running mean."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__(size, dtype)
        self.norm = nn.BatchNorm1d(size, momentum=1.0, affine=False, dtype=dtype)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.norm(batch[:1] + torch.tensor([[-1.0], [1.0]], dtype=batch.dtype))
        return super().training_step(batch, batch_idx)


def batch_norm(name: str, rule: RowAggregator) -> None:
    """Buffers become medians over the updates that count, or what a rule of coordinates makes of them."""
    module, rows = SendsStatistics(3, torch.float64), np.array(A11) + 2
    fit = trainer(fl.FederatedStrategy("fedavg", aggregator=rule, engine="sequential", seed=0))
    fit.fit(module, loaders(rows.tolist(), torch.float64))
    counted = np.delete(rows, list(fit.strategy.history[-1]["left_out"]), axis=0)
    attackers = {0: 0, 1: 1}.get(rule.num_attackers, 2)
    of_those = counted if len(counted) > 2 * attackers else rows
    expected = np.median(of_those, axis=0) if rule.needs_gram else module.w.detach().numpy()
    np.testing.assert_allclose(module.norm.running_mean.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert (module.norm.running_var > 0).all()
    assert module.norm.num_batches_tracked.dtype == torch.int64


def compressed(name: str, rule: RowAggregator) -> None:
    """The rule sees what the bytes of each client decode to."""
    compressor, decoded = TopK(0.4), []
    for client, row in enumerate(A11):
        payload = compressor.encode(torch.tensor(row), client_generator(0, 0, client, "compression"))
        decoded.append(compressor.decode(payload, 3).tolist())
    found, history = aggregate(rule, A11, transforms=[Compress(compressor, error_feedback=False)])
    np.testing.assert_allclose(found, aggregate(rule, decoded)[0], rtol=1e-6, atol=1e-9)
    assert history["bytes_per_client"] == compressor.num_bytes(3)


def both_engines(name: str, rule: RowAggregator) -> None:
    """With BatchNorm, Adam and a schedule."""
    models = []
    for engine in ("sequential", "vectorized"):
        module = Ordinary()
        fit = trainer(fl.FederatedStrategy("fedavg", aggregator=rule, seed=0, engine=engine), 2)
        fit.fit(module, image_clients((4, 7, 23, 8, 5, 6, 9), validate=True))
        models.append(weights(module))
    torch.testing.assert_close(models[1], models[0], rtol=1e-4, atol=1e-4)
    assert fit.strategy.weighting == "uniform"


NUM_SILOS = 4
SILOS: Table = A11[:NUM_SILOS]


def as_silo() -> dict[str, tuple[list[float], dict[str, Any]]]:
    found = {}
    for name, rule in RULES.items():
        own = torch.tensor(SILOS[int(os.environ["RANK"])], dtype=torch.float64)
        module = Sends(3, torch.float64)
        fit = trainer(fl.FederatedStrategy("fedavg", aggregator=replace(rule, num_attackers=0), seed=0))
        fit.fit(module, DataLoader(Rows(own)))
        found[name] = module.w.tolist(), fit.strategy.history[-1]
    return found


@pytest.fixture(scope="module")
def among_silos(worker_pool: Any) -> list[dict[str, tuple[list[float], dict[str, Any]]]]:
    return worker_pool.run(as_silo, world_size=NUM_SILOS)


def silos(name: str, rule: RowAggregator, among_silos: Any) -> None:
    """All silos have the same model, which is that of a simulation."""
    models = [found[name][0] for found in among_silos]
    assert all(model == models[0] for model in models)
    simulated, history = aggregate(replace(rule, num_attackers=0), SILOS)
    np.testing.assert_allclose(models[0], simulated, rtol=1e-9, atol=1e-12)
    assert list(among_silos[0][name][1]["left_out"].values()) == list(history["left_out"].values())


CHECKS: dict[str, Callable[..., None]] = {
    "client-level DP": without_privacy,
    "SecAgg": without_masks,
    "SCAFFOLD": side_channels,
    "FedNova": factors,
    "ratios": ratios,
    "BatchNorm": batch_norm,
    "compression": compressed,
    "both engines": both_engines,
    "silos": silos,
}
REASONS = {
    "no sum": "is not a sum",
    "hides updates": "has to see each client's update",
    "side channels": "picks each coordinate from different clients",
    "twice": "would be shortened twice",
    "ratio": r"ratio of two sums|picks each coordinate",
}


def test_every_rule_stands_in_the_table() -> None:
    named = [param.values[0] for param in TABLE]
    assert list(dict.fromkeys(named)) == list(RULES)
    assert len(TABLE) == len(RULES) * len(CHECKS)
    assert {type(rule) for rule in RULES.values()} == shipped(RowAggregator, "lightning_fl.aggregation")


@pytest.mark.parametrize(("rule", "column", "cell"), TABLE)
@pytest.mark.spread(12)
def test_a_cell_is_true(rule: str, column: str, cell: str, request: pytest.FixtureRequest) -> None:
    check, arguments = CHECKS[column], [rule, RULES[rule]]
    if check is silos:
        arguments.append(request.getfixturevalue("among_silos"))
    if cell == "yes":
        check(*arguments)
        return
    assert cell.startswith("no: ")
    with pytest.raises(ValueError, match=REASONS[cell.removeprefix("no: ")]):
        check(*arguments)
