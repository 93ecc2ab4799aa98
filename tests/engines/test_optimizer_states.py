from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from lightning_fl.engines import OptimizerStates, Schedule, ScheduleEnd
from lightning_fl.engines.optimizer_states import AsMade


class Growing(SGD):
    """Steps farther each time, as its options tell: what Prodigy and schedule-free optimizers keep there."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.update(num_steps=0, scale=1.0, total=torch.zeros(()))

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["num_steps"] += 1
            group["scale"] *= 1.5
            group["total"].add_(1)
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.mul_(group["scale"] + group["num_steps"] + float(group["total"]))
        return super().step()


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(SGD, lr=0.1),
    "SGD momentum": partial(SGD, lr=0.1, momentum=0.9),
    "Adam": partial(Adam, lr=0.1),
    "AdamW amsgrad": partial(AdamW, lr=0.1, amsgrad=True),
    "Adagrad": partial(Adagrad, lr=0.5, initial_accumulator_value=0.3),
    "RMSprop": partial(RMSprop, lr=0.05, momentum=0.5),
    "options": partial(Growing, lr=0.01),
    "LBFGS": partial(LBFGS, lr=0.5, max_iter=2),
}
STATEFUL = [name for name in OPTIMIZERS if name != "SGD"]
KEEPABLE = [name for name in OPTIMIZERS if name != "LBFGS"]
START = torch.tensor([3.0, -2.0], dtype=torch.float64)


def schedule_of(scheduler: Any) -> Schedule:
    return Schedule(scheduler, scheduler.step)


class Rank:
    """A parameter with its optimizer, which trains clients that each have a loss of their own."""

    def __init__(self, make_optimizer: Callable[..., Optimizer]) -> None:
        self.param = nn.Parameter(START.clone())
        self.optimizer = make_optimizer([self.param])
        self.states = OptimizerStates([self.optimizer])
        self.states.begin_round()

    def train(self, client: int, num_steps: int = 3) -> Tensor:
        """Trains from wherever the parameter is, and returns where it ends."""
        for _ in range(num_steps):
            if isinstance(self.optimizer, Growing):
                self._closure(client)
            self.optimizer.step(partial(self._closure, client))
        return self.param.detach().clone()

    def _closure(self, client: int) -> Tensor:
        self.optimizer.zero_grad()
        loss = ((client + 1) * self.param**2 + self.param**4 / 10).sum()
        loss.backward()
        return loss

    def turn(self, client: int, kept: Any, start: Tensor = START) -> Tensor:
        """One client's local training in a round."""
        self.param.data.copy_(start)
        self.states.restart(kept)
        return self.train(client)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_reset_every_client_trains_as_with_a_new_optimizer(name: str) -> None:
    federation = Rank(OPTIMIZERS[name])
    for client in (0, 1, 0, 2):
        assert torch.equal(federation.turn(client, None), Rank(OPTIMIZERS[name]).train(client))


def test_without_reset_the_last_clients_state_would_show() -> None:
    for name in STATEFUL:
        leaky = Rank(OPTIMIZERS[name])
        leaky.train(0)
        leaky.param.data.copy_(START)
        assert not torch.equal(leaky.train(1), Rank(OPTIMIZERS[name]).train(1)), name


def test_what_steps_change_in_the_options_does_not_reach_the_next_round() -> None:
    first, second = Rank(OPTIMIZERS["options"]), Rank(OPTIMIZERS["options"])
    expected = Rank(OPTIMIZERS["options"]).train(0)
    for client in (1, 0):
        first.turn(client, None)
    end = first.states.schedule_end()
    assert end.num_optimizer_steps == 3  # and not one for the base class's step as well
    assert first.states.lr_sum({"x": first.param}) == pytest.approx({"x": 0.03})
    for rank in (first, second):  # the second has not trained in the round
        rank.states.end_round(end)
        rank.states.begin_round()
        assert torch.equal(rank.turn(0, None), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_put_back_to_when_it_was_made(name: str) -> None:
    trained = Rank(OPTIMIZERS[name])
    made = AsMade(trained.optimizer)
    trained.train(1)
    trained.optimizer.param_groups[0]["lr"] = 0.003  # of a schedule
    made.put_back()
    expected = Rank(OPTIMIZERS[name])
    expected.optimizer.param_groups[0]["lr"] = 0.003
    trained.param.data.copy_(START)
    assert torch.equal(trained.train(0), expected.train(0))


@pytest.mark.parametrize("name", KEEPABLE)
def test_with_keep_a_client_goes_on_as_if_nobody_else_had_trained(name: str) -> None:
    federation, alone = Rank(OPTIMIZERS[name]), {client: Rank(OPTIMIZERS[name]) for client in range(3)}
    kept: dict[int, Any] = dict.fromkeys(alone)
    params = dict.fromkeys(alone, START)
    for _ in range(3):
        federation.states.begin_round()
        for client in alone:
            params[client] = federation.turn(client, kept[client], params[client])
            kept[client] = federation.states.keep()
            assert torch.equal(params[client], alone[client].train(client))
        federation.states.end_round(None)


@pytest.mark.parametrize("name", KEEPABLE)
def test_what_is_kept_is_a_tree_that_checkpoints(name: str) -> None:
    federation = Rank(OPTIMIZERS[name])
    federation.turn(0, None)
    kept, file = federation.states.keep(), io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(federation.turn(0, kept), federation.turn(0, loaded))
    assert bool(kept) == (name != "SGD")


@pytest.mark.parametrize("name", KEEPABLE)
def test_what_is_kept_does_not_change_when_others_train(name: str) -> None:
    federation = Rank(OPTIMIZERS[name])
    federation.turn(0, None)
    kept = federation.states.keep()
    copies = {key: value.clone() for key, value in kept.items()}
    federation.train(1)
    for client in (0, 1):
        federation.turn(client, kept)
    torch.testing.assert_close(kept, copies, rtol=0, atol=0)


@pytest.mark.parametrize("ends", ["restart", "end_round"])
def test_a_state_that_exists_from_the_start_is_there_again(ends: str) -> None:
    federation = Rank(OPTIMIZERS["Adagrad"])
    for client in (0, 1):
        federation.turn(client, None)
        assert federation.optimizer.state[federation.param]["sum"].min() > 0.3
        getattr(federation.states, ends)(None)
        assert federation.optimizer.state[federation.param]["sum"].tolist() == [0.3, 0.3]
        federation.states.begin_round()


def test_numbers_are_kept_as_numbers() -> None:
    class Counting(SGD):
        def step(self, closure: Any = None) -> Any:
            state = self.state[self.param_groups[0]["params"][0]]
            state["count"], state["half"], state["odd"] = state.get("count", 0) + 1, 0.5, True
            state["nothing"] = None
            return super().step(closure)

    federation = Rank(partial(Counting, lr=0.1))
    federation.turn(0, None)
    federation.turn(0, federation.states.keep())
    state = federation.optimizer.state[federation.param]
    assert (state["count"], state["half"], state["odd"]) == (6, 0.5, True)
    assert type(state["count"]) is int


def test_keep_refuses_a_state_of_lists() -> None:
    federation = Rank(OPTIMIZERS["LBFGS"])
    federation.turn(0, None)
    with pytest.raises(ValueError, match=r"LBFGS holds a list as .* Use client_optimizer='reset'"):
        federation.states.keep()


@pytest.mark.parametrize("name", STATEFUL)
def test_a_round_ends_with_a_fresh_optimizer_without_gradients(name: str) -> None:
    federation, fresh = Rank(OPTIMIZERS[name]), Rank(OPTIMIZERS[name])
    federation.turn(0, None)
    federation.states.end_round(None)
    assert federation.param.grad is None
    assert federation.optimizer.state_dict()["state"].keys() == fresh.optimizer.state_dict()["state"].keys()
    federation.param.data.copy_(START)
    assert torch.equal(federation.train(1), fresh.train(1))


def test_a_client_starts_without_gradients() -> None:
    federation = Rank(OPTIMIZERS["SGD"])
    federation.param.grad = torch.ones(2, dtype=torch.float64)
    federation.states.restart(None)
    assert federation.param.grad is None


class Two:
    """Two optimizers, the first with two groups of different learning rates, and a parameter without any."""

    def __init__(self) -> None:
        self.params = {name: nn.Parameter(torch.ones(1)) for name in "abcd"}
        a, b, c, _ = self.params.values()
        self.first = SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.01}])
        self.second = Adam([c], lr=0.5)
        self.schedule = schedule_of(StepLR(self.first, 1, gamma=0.5))
        self.states = OptimizerStates([self.first, self.second])
        self.states.begin_round([self.schedule])

    def train(self, num_steps: int) -> None:
        self.states.restart(None)
        for step in range(num_steps):
            for param in self.params.values():
                param.grad = torch.ones(1)
            self.first.step()
            if step % 2 == 0:
                self.second.step()
            self.schedule.take_step()


@pytest.mark.parametrize(("num_steps", "taken", "a", "c"), [(1, 2, 0.1, 0.5), (3, 5, 0.175, 1.0), (0, 0, 0.0, 0.0)])
def test_steps_and_learning_rates_are_counted_for_each_client(num_steps: int, taken: int, a: float, c: float) -> None:
    two = Two()
    two.train(2)
    two.train(num_steps)
    assert two.states.num_steps == two.states.schedule_end().num_optimizer_steps == taken
    assert two.states.schedule_end().num_steps == [num_steps]
    assert two.states.lr_sum(two.params) == pytest.approx({"a": a, "b": a / 10, "c": c, "d": 0.0})


def test_every_group_of_every_optimizer_goes_where_the_largest_client_took_it() -> None:
    two = Two()
    two.train(3)
    end = two.states.schedule_end()
    two.train(1)
    two.states.end_round(end)
    rates = [group["lr"] for optimizer in (two.first, two.second) for group in optimizer.param_groups]
    assert rates == pytest.approx([0.0125, 0.00125, 0.5])


def test_after_close_nothing_is_counted() -> None:
    two = Two()
    two.train(1)
    two.states.close()
    two.first.step()
    assert two.states.num_steps == 2


class Remembering(LRScheduler):
    """Changes its own state in place."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.seen: list[float] = []
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        self.seen.append(0.1 / (1 + len(self.seen)))
        return [self.seen[-1] for _ in self.optimizer.param_groups]


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": partial(StepLR, step_size=2, gamma=0.5),
    "CosineAnnealingLR": partial(CosineAnnealingLR, T_max=20),
    "OneCycleLR": partial(OneCycleLR, max_lr=0.1, total_steps=20),
    "SequentialLR": lambda opt: SequentialLR(opt, [LinearLR(opt, 0.1, total_iters=4), ExponentialLR(opt, 0.9)], [4]),
    "LambdaLR": partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "MultiplicativeLR": partial(MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "Remembering": Remembering,
    "ChainedScheduler": lambda opt: ChainedScheduler([ConstantLR(opt, 0.5, 3), ExponentialLR(opt, 0.9)]),
}
FIXED: dict[str, Callable[..., Optimizer]] = {
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "betas": partial(Adam, lr=0.1, betas=(0.8, 0.99)),
    "tensor": lambda params: Adam(params, lr=torch.tensor(0.1, dtype=torch.float64), foreach=False),
}

Options = tuple[float, Any]


class Scheduled:
    """One rank's optimizer with a schedule that steps after each step of the optimizer."""

    def __init__(self, schedule: str, optimizer: str = "momentum") -> None:
        self.param = nn.Parameter(torch.ones(1))
        self.optimizer = FIXED[optimizer]([self.param])
        self.schedule = schedule_of(SCHEDULES[schedule](self.optimizer))
        self.states = OptimizerStates([self.optimizer])

    def options(self) -> Options:
        group = self.optimizer.param_groups[0]
        return float(group["lr"]), group.get("momentum", group.get("betas"))

    def trace(self, num_steps: int) -> list[Options]:
        """The options at each of so many steps."""
        seen = []
        for _ in range(num_steps):
            self.param.grad = torch.ones(1)
            seen.append(self.options())
            self.optimizer.step()
            self.schedule.take_step()
        return seen

    def round(self, clients: Sequence[int]) -> tuple[list[list[Options]], list[ScheduleEnd]]:
        """The options of clients that take so many steps each, and where they take the schedule."""
        traces, ends = [], []
        self.states.begin_round([self.schedule])
        for num_steps in clients:
            self.states.restart(None)
            traces.append(self.trace(num_steps))
            ends.append(self.states.schedule_end())
        return traces, ends


@pytest.mark.parametrize("optimizer", FIXED)
@pytest.mark.parametrize("schedule", SCHEDULES)
class TestEverySchedule:
    def test_clients_start_at_the_rounds_start_and_rounds_after_the_largest_client(
        self, schedule: str, optimizer: str
    ) -> None:
        plain, rank = Scheduled(schedule, optimizer).trace(15), Scheduled(schedule, optimizer)
        assert plain[:3] != plain[3:6]  # a client that goes on where the last one has ended would show
        for start in (0, 5, 10):
            traces, ends = rank.round([3, 5, 1])
            assert traces == [plain[start : start + num_steps] for num_steps in (3, 5, 1)]
            assert [end.num_steps for end in ends] == [[3], [5], [1]]
            rank.states.end_round(ends[1])

    def test_a_rank_without_clients_keeps_up(self, schedule: str, optimizer: str) -> None:
        busy, idle = Scheduled(schedule, optimizer), Scheduled(schedule, optimizer)
        for _ in range(3):
            _, (end,) = busy.round([5])
            idle.round([])
            for rank in (busy, idle):
                rank.states.end_round(end)
            assert idle.options() == busy.options()
        assert idle.round([2])[0] == busy.round([2])[0]

    def test_a_round_that_is_given_up_is_as_if_it_had_not_been(self, schedule: str, optimizer: str) -> None:
        rank = Scheduled(schedule, optimizer)
        first, _ = rank.round([3])
        rank.states.end_round(None)
        assert rank.round([3])[0] == first


def test_onecycle_cycles_the_momentum_too() -> None:
    momenta = {momentum for _, momentum in Scheduled("OneCycleLR").trace(15)}
    assert len(momenta) > 5


def test_a_schedule_that_steps_between_rounds_moves_the_next_rounds_start() -> None:
    rank = Scheduled("StepLR")
    for round in range(6):
        rank.states.begin_round()
        for _ in range(3):
            rank.states.restart(None)
            assert rank.options()[0] == pytest.approx(0.1 * 0.5 ** (round // 2))
            rank.optimizer.step()
        rank.states.end_round(rank.states.schedule_end())
        rank.schedule.take_step()


def test_options_that_a_user_changes_between_rounds_stay() -> None:
    rank = Scheduled("StepLR")
    for value in (0.5, 0.25):
        rank.optimizer.param_groups[0]["weight_decay"] = value
        _, (end,) = rank.round([2])
        rank.states.end_round(end)
        assert rank.optimizer.param_groups[0]["weight_decay"] == value


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
def test_a_learning_rate_that_is_a_tensor_stays_one(lr: Any) -> None:
    optimizer = Adam([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.1), capturable=False, foreach=False)
    states = OptimizerStates([optimizer])
    states.begin_round()
    states.restart(None)
    end = states.schedule_end()
    end.options[0][0]["lr"] = lr
    states.end_round(end)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05)
