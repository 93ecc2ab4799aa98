from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.optim import SGD, Adam

from lightning_fl.algorithms import FedAvg, FedNova
from lightning_fl.types import LocalRun, Update
from tests.helpers.federation import Simulation, aggregate, quadratics

PARAMS = {"x": torch.tensor([10.0], dtype=torch.float64)}
CENTERS, WEIGHTS, NUM_STEPS = (0.0, 1.0, 4.0), (0.25, 0.5, 0.25), (1, 2, 5)
RUN = LocalRun(num_steps=5, num_examples=1, weight=1.0, loss=0.0, lr_sum={"x": 0.5}, normalizer=5.0)
EVEN, UNEVEN = (1.0, 1.0, 1.0), (1.0, 2.0, 0.5)


@pytest.mark.parametrize(
    ("algorithm", "steepness", "expected"),
    [
        (FedAvg(), EVEN, 2.2687097398),
        (FedNova(), EVEN, 1.3917860081),
        (FedAvg(), UNEVEN, 1.5530937145),
        (FedNova(), UNEVEN, 1.0707211776),
    ],
    ids=str,
)
@pytest.mark.spread(1)
def test_clients_with_more_steps_pull_no_harder(
    algorithm: FedAvg | FedNova, steepness: tuple[float, ...], expected: float
) -> None:
    gradients = quadratics(CENTERS, steepness)
    federation = Simulation(algorithm, gradients, PARAMS, NUM_STEPS, weights=WEIGHTS)
    assert federation.rounds(300) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_equal_numbers_of_steps_are_federated_averaging(num_steps: int) -> None:
    gradients = quadratics(CENTERS, UNEVEN)
    nova, fedavg = (Simulation(a, gradients, PARAMS, num_steps, weights=WEIGHTS) for a in (FedNova(), FedAvg()))
    assert nova.rounds(5) == pytest.approx(fedavg.rounds(5), rel=1e-12)


def moved(algorithm: FedNova, weights: tuple[float, ...]) -> float:
    """Where three clients that went -1, -2 and -5 in as much work take the server."""
    server = algorithm.server_init(PARAMS, 3)
    updates = []
    for weight, work in zip(weights, NUM_STEPS, strict=True):
        run = replace(RUN, num_steps=work, weight=weight, normalizer=float(work))
        ctx = algorithm.client_init(server, None)
        update, _ = algorithm.client_finish({"x": PARAMS["x"] - work}, ctx, None, run)
        updates.append(Update(update.delta, {}, weight, update.aux))
    return algorithm.server_update(server, aggregate(updates, population=3))["params"]["x"].item()


def test_the_server_goes_as_far_as_the_mean_work() -> None:
    for factor in (1.0, 8.0):
        weights = tuple(weight * factor for weight in WEIGHTS)
        assert moved(FedNova(), weights) == pytest.approx(10 - 2.5)
        assert moved(FedNova(server_lr=0.5), weights) == pytest.approx(10 - 1.25)
    assert moved(FedNova(), (1.0, 1.0, 1.0)) == pytest.approx(10 - 8 / 3)


@pytest.mark.parametrize("mu", [0.5, 2.0])
@pytest.mark.spread(1)
def test_the_proximal_term_is_part_of_the_work(mu: float) -> None:
    gradients = quadratics(CENTERS, UNEVEN)
    found = Simulation(FedNova(mu=mu), gradients, PARAMS, NUM_STEPS, weights=WEIGHTS).rounds(300)
    top = bottom = 0.0
    for e, h, p, num_steps in zip(CENTERS, UNEVEN, WEIGHTS, NUM_STEPS, strict=True):
        progress = (1 - (1 - 0.1 * (h + mu)) ** num_steps) * h / (h + mu)
        work = sum((1 - 0.1 * mu) ** step for step in range(num_steps))
        top, bottom = top + p * progress / work * e, bottom + p * progress / work
    assert found == pytest.approx(top / bottom, abs=1e-9)


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_a_client_that_took_no_step_counts_as_no_work(mu: float) -> None:
    algorithm = FedNova(mu=mu)
    idle = replace(RUN, num_steps=0, lr_sum={"x": 0.0}, normalizer=0.0)
    ctx = algorithm.client_init(algorithm.server_init(PARAMS, 1), None)
    update, _ = algorithm.client_finish(dict(PARAMS), ctx, None, idle)
    assert (update.delta["x"].item(), update.aux["work"]["sum"].item()) == (0.0, 0.0)


def test_optimizers_of_unknown_work_are_refused() -> None:
    param = torch.nn.Parameter(torch.ones(1))
    FedNova().check_optimizers([SGD([param]), SGD([param], momentum=0.9, weight_decay=0.1)])
    with pytest.raises(ValueError, match=r"unknown for Adam\. Use torch\.optim\.SGD"):
        FedNova().check_optimizers([SGD([param]), Adam([param])])


def test_a_run_of_unknown_work_is_refused() -> None:
    ctx = {"params": PARAMS}
    with pytest.raises(ValueError, match=r"use one group, and client_optimizer='reset' with momentum"):
        FedNova().client_finish(PARAMS, ctx, None, replace(RUN, normalizer=None))
    with pytest.raises(ValueError, match=r"FedNova\(mu=0\.1\) found work of 13\.1 in 5 steps"):
        FedNova(mu=0.1).client_finish(PARAMS, ctx, None, replace(RUN, normalizer=13.1))
    lrs = dict.fromkeys(RUN.lr_sum, 0.5)
    lrs["other"] = 0.05
    with pytest.raises(ValueError, match=r"learning rates from 0\.01 to 0\.1"):
        FedNova(mu=0.1).client_finish(PARAMS, ctx, None, replace(RUN, lr_sum=lrs, num_steps=5, normalizer=5.0))
    with pytest.raises(ValueError, match=r"FedNova got mu=-1\.0"):
        FedNova(mu=-1.0)
