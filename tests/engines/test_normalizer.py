"""FedNova's normalizer: how far SGD goes on a gradient of 1."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR

from lightning_fl.engines import OptimizerStates


def run(make: Callable[..., Optimizer], num_steps: int, make_schedule: Any = None, kept: Any = None) -> Any:
    """The normalizer, and how far the optimizer goes on gradients of 1."""
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([param])
    schedule = make_schedule(optimizer) if make_schedule else None
    states = OptimizerStates([optimizer])
    states.begin_round()
    states.restart(kept)
    for _ in range(num_steps):
        param.grad = torch.ones_like(param)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return states.normalizer({"x": param}), -param.item()


@pytest.mark.parametrize(("num_steps", "expected"), [(1, 1.0), (2, 2.9), (5, 13.1441)])
def test_momentum_has_the_known_normalizers(num_steps: int, expected: float) -> None:
    assert run(partial(SGD, lr=0.1, momentum=0.9), num_steps)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_plain_sgd_has_its_number_of_steps(num_steps: int) -> None:
    assert run(partial(SGD, lr=0.03), num_steps)[0] == num_steps
    assert run(partial(SGD, lr=0.03, weight_decay=0.1), num_steps)[0] == num_steps
    assert run(partial(SGD, lr=0.03), num_steps, kept={})[0] == num_steps


SGDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "maximize": {"momentum": 0.5, "maximize": True},
}
SCHEDULES: dict[str, Any] = {
    "constant": None,
    "falling": partial(ExponentialLR, gamma=0.7),
    "warm-up from 0": partial(LambdaLR, lr_lambda=lambda step: step / 10),
    "one cycle": lambda sgd: OneCycleLR(sgd, 0.3, total_steps=10, cycle_momentum=bool(sgd.defaults["momentum"])),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", SGDS)
def test_it_is_how_far_a_gradient_of_one_goes(options: str, schedule: str) -> None:
    normalizer, distance = run(partial(SGD, lr=0.1, **SGDS[options]), 6, SCHEDULES[schedule])
    shorter, shorter_distance = run(partial(SGD, lr=0.1, **SGDS[options]), 3, SCHEDULES[schedule])
    assert normalizer / shorter == pytest.approx(distance / shorter_distance, rel=1e-9)


def test_a_learning_rate_of_zero_is_no_work() -> None:
    assert run(partial(SGD, lr=0.0), 3)[0] == 0.0


def test_what_is_not_known_is_none() -> None:
    assert run(Adam, 3)[0] is None
    assert run(partial(SGD, lr=0.1, momentum=0.9), 1, kept={"0.0.momentum_buffer": torch.ones(1)})[0] is None
    assert OptimizerStates([SGD([nn.Parameter(torch.ones(1))])]).normalizer({}) is None


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"lr": 0.01}, 3.0),
        ({"lr": 0.0}, 3.0),
        ({"momentum": 0.5}, None),
        ({"lr": 0.1, "momentum": 0.5, "personal": True}, 3.0),
    ],
    ids=str,
)
def test_groups_must_go_equally_far(second: dict[str, Any], expected: float | None) -> None:
    params = {"x": nn.Parameter(torch.ones(1)), "y": nn.Parameter(torch.ones(1))}
    is_personal = second.pop("personal", False)
    optimizer = SGD([{"params": [params["x"]]}, {"params": [params["y"]], **second}], lr=0.1)
    states = OptimizerStates([optimizer])
    states.begin_round()
    states.restart(None)
    for _ in range(3):
        for param in params.values():
            param.grad = torch.ones(1)
        optimizer.step()
    if is_personal:
        params.pop("y")
    assert states.normalizer(params) == (expected if expected is None else pytest.approx(expected))
