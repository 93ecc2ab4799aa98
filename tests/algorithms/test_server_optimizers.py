"""FedAvgM, DiLoCo, FedAdagrad, FedAdam, FedYogi and FedOpt."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import LBFGS, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from lightning_fl.algorithms import Algorithm, DiLoCo, FedAdagrad, FedAdam, FedAvg, FedAvgM, FedOpt, FedYogi
from lightning_fl.types import Aggregate, State, Tree

CHANGES = (1.0, -0.5, 0.25)


def tree(value: float) -> Tree:
    return {"x": torch.tensor([value], dtype=torch.float64), "more.y": torch.tensor([[value]], dtype=torch.float64)}


def mean_of(change: float) -> Aggregate:
    """An aggregate of two clients whose mean change is ``change``."""
    return Aggregate(tree(3 * change), {}, 3.0, {}, num_clients=2, population=2)


def positions(algorithm: Algorithm, changes: tuple[float, ...] = CHANGES) -> list[float]:
    """Where the server goes from 0 when the mean changes are ``changes``."""
    server, seen = algorithm.server_init(tree(0.0), 2), []
    for change in changes:
        server = algorithm.server_update(server, mean_of(change))
        assert server["params"]["x"].item() == server["params"]["more.y"].item()
        seen.append(server["params"]["x"].item())
    return seen


KNOWN: list[tuple[Algorithm, list[float]]] = [
    (FedAdagrad(), [0.009990005, 0.0135645152, 0.0188843861]),
    (FedYogi(), [0.0990049999, 0.1344635186, 0.1872459502]),
    (FedAdam(), [0.0990050489, 0.1346050054, 0.1878397397]),
    (FedAdam(beta1=0.0), [0.9900504888, 0.5450510329, 0.7632261735]),
    (FedAvgM(), [1.0, 1.4, 2.01]),
    (FedAvgM(nesterov=True), [1.9, 1.76, 2.559]),
    (FedAvgM(server_lr=0.5), [0.5, 0.7, 1.005]),
    (DiLoCo(), [1.33, 1.232, 1.7913]),
]


@pytest.mark.parametrize(("algorithm", "expected"), KNOWN, ids=lambda value: str(value)[:60])
def test_the_server_goes_where_the_closed_form_says(algorithm: Algorithm, expected: list[float]) -> None:
    assert positions(algorithm) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "algorithm",
    [FedOpt(), FedOpt(partial(SGD, lr=1.0)), FedAvgM(momentum=0.0), DiLoCo(server_lr=1.0, momentum=0.0)],
    ids=str,
)
def test_the_neutral_setting_is_federated_averaging(algorithm: Algorithm) -> None:
    assert positions(algorithm) == positions(FedAvg())


@pytest.mark.parametrize("nesterov", [False, True])
def test_server_momentum_is_that_of_torch(nesterov: bool) -> None:
    optimizer = partial(SGD, lr=0.3, momentum=0.8, nesterov=nesterov)
    assert positions(FedOpt(optimizer)) == pytest.approx(positions(FedAvgM(0.3, 0.8, nesterov)), rel=1e-12)


OPTIMIZERS: list[Callable[..., Optimizer]] = [
    partial(SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    partial(Adam, lr=0.1, amsgrad=True),
    partial(AdamW, lr=0.1),
    partial(Adagrad, lr=0.1, initial_accumulator_value=0.5),
    partial(Adadelta, lr=1.0),
    partial(Adamax, lr=0.1),
    partial(NAdam, lr=0.1),
    partial(RAdam, lr=0.1),
    partial(RMSprop, lr=0.1, momentum=0.5, centered=True),
    partial(Rprop, lr=0.1),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.func.__name__)
def test_any_optimizer_steps_as_if_it_had_been_kept(optimizer: Callable[..., Optimizer]) -> None:
    changes = (*CHANGES, 0.7, -0.1, 0.3)
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    kept, expected = optimizer([param]), []
    for change in changes:
        param.grad = torch.tensor([-change], dtype=torch.float64)
        kept.step()
        expected.append(param.item())
    assert positions(FedOpt(optimizer), changes) == pytest.approx(expected, rel=1e-12)


class Counting(SGD):
    """Counts its steps in a number, as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            state["count"], state["half"], state["nothing"] = state.get("count", 0) + 1, 0.5, None
        return super().step(closure)


def test_numbers_of_the_optimizer_are_kept_as_tensors() -> None:
    algorithm = FedOpt(partial(Counting, lr=1.0))
    server: State = algorithm.server_init(tree(0.0), 2)
    for _ in range(3):
        server = algorithm.server_update(server, mean_of(1.0))
    assert server["optimizer"]["count:number.more.y"].dtype == torch.int64
    assert {name: value.item() for name, value in server["optimizer"].items() if name.endswith(".x")} == {
        "count:number.x": 3,
        "half:number.x": 0.5,
    }


class Global(SGD):
    """Keeps something in its options."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        return super().step(closure)


class Listing(SGD):
    def step(self, closure: Any = None) -> Any:
        self.state[self.param_groups[0]["params"][0]]["history"] = [1]
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (Global, "Global keeps state between its steps that belongs to no single parameter"),
        (Listing, r"Listing holds a list as 'history'\. Use another optimizer"),
    ],
)
def test_a_state_that_would_be_lost_is_refused_before_the_first_round(optimizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedOpt(optimizer).server_init(tree(0.0), 2)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda params: 3, r"makes a int; expected .*functools\.partial"),
        (LBFGS, "got LBFGS, which evaluates the loss"),
    ],
)
def test_what_is_no_optimizer_of_gradients_is_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedOpt(optimizer)


def test_groups_of_parameters_keep_their_options() -> None:
    def groups(params: list[torch.nn.Parameter]) -> SGD:
        matrices = [param for param in params if param.ndim > 1]
        rest = [param for param in params if param.ndim < 2]
        return SGD([{"params": matrices, "lr": 0.0}, {"params": rest}], lr=1.0, momentum=0.5)

    algorithm = FedOpt(groups)
    server = algorithm.server_init(tree(0.0), 2)
    for change in CHANGES:
        server = algorithm.server_update(server, mean_of(change))
    assert server["params"]["more.y"].item() == 0.0
    assert server["params"]["x"].item() == pytest.approx(positions(FedAvgM(momentum=0.5))[-1])


def test_an_optimizer_is_told_by_its_options_and_pickles() -> None:
    algorithm = FedOpt(partial(SGD, lr=0.5, momentum=0.9))
    assert repr(algorithm).startswith("FedOpt(optimizer=SGD(lr=0.5, momentum=0.9, ")
    assert repr(FedOpt()).startswith("FedOpt(optimizer=SGD(lr=1.0, momentum=0, ")
    assert repr(pickle.loads(pickle.dumps(algorithm))) == repr(algorithm)


@pytest.mark.parametrize("algorithm", [FedAvgM(), FedAdam(), FedYogi(), FedOpt(partial(Adam, lr=0.1))], ids=str)
def test_the_state_that_was_given_stays_as_it_was(algorithm: Algorithm) -> None:
    first = algorithm.server_update(algorithm.server_init(tree(0.0), 2), mean_of(1.0))
    before = copy.deepcopy(first)
    algorithm.server_update(first, mean_of(-0.5))
    torch.testing.assert_close(first, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAvgM(momentum=1.0), r"FedAvgM got momentum=1\.0; expected a number in \[0, 1\)"),
        (lambda: FedAdam(beta1=-0.1), r"FedAdam got beta1=-0\.1"),
        (lambda: FedYogi(beta2=1.0), r"FedYogi got beta2=1\.0"),
        (lambda: FedAdagrad(tau=0.0), r"FedAdagrad got tau=0\.0; expected a positive number"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Algorithm], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
