"""The user's optimizers and learning-rate schedules, restarted for each client."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop, Rprop

from lightning_fl.engines.kept_optimizers import keep, load_kept
from lightning_fl.torch_internals import version_counter
from lightning_fl.types import Tree


@dataclass
class Schedule:
    """A learning-rate schedule that steps inside a client's local training.

    Args:
        scheduler: Any scheduler that steps without a metric.
        step: Steps it once.
        by_user: Whether the user's own code steps it, so that its steps must be read from ``last_epoch``.
        by_state: Whether its state is transferred instead of a number of steps to repeat, because the user's code steps
            it with a metric or it does not count its steps.
        num_steps: Steps taken in the local training of the current client.
    """

    scheduler: Any
    step: Callable[[], Any]
    by_user: bool = False
    by_state: bool = False
    num_steps: int = 0

    def take_step(self) -> None:
        """Steps once and counts it."""
        self.step()
        self.num_steps += 1


@dataclass(frozen=True)
class ScheduleEnd:
    """The progress of the schedules at the end of a client's local training.

    Args:
        num_steps: Steps of each schedule.
        options: Each optimizer's options (learning rate, momentum, ...), one mapping per parameter group.
        num_optimizer_steps: Steps of the optimizers; the next round continues from the client with the most.
        scaler: The state of the gradient scaler; empty if there is none or if it was not sent.
        states: The state of each schedule that is ``by_state``, by its index.
    """

    num_steps: list[int]
    options: list[list[dict[str, Any]]]
    num_optimizer_steps: int
    scaler: dict[str, Any] = field(default_factory=dict)
    states: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class StartingPoint:
    """The state from which every client of a round starts, besides the states of the optimizers.

    Args:
        options: Each optimizer's options (learning rate, momentum, ...), one mapping per parameter group.
        schedules: The states of the schedules.
        scaler: The state of the gradient scaler; empty if there is none.
    """

    options: Sequence[list[dict[str, Any]]] = ()
    schedules: Sequence[dict[str, Any]] = ()
    scaler: Mapping[str, Any] = field(default_factory=dict)


class FedNovaNormalizer:
    """FedNova's normalizer: the distance SGD moves under a constant gradient of 1, in units of its first learning rate.

    Takes momentum, dampening and schedules into account; weight decay counts as part of the loss.
    """

    def __init__(self) -> None:
        self.length = 0.0
        self._unit = 0.0
        self._buffer: float | None = None

    def step(self, group: Mapping[str, Any]) -> float:
        """Takes a step with the options of a parameter group; returns its length."""
        momentum, lr, move = group["momentum"], float(group["lr"]), 1.0
        # As in torch's SGD, dampening does not apply to the first step.
        if momentum:
            self._buffer = 1.0 if self._buffer is None else momentum * self._buffer + 1 - group["dampening"]
            move = 1 + momentum * self._buffer if group["nesterov"] else self._buffer
        # A warm-up may begin at a learning rate of 0, which can't be a unit.
        self._unit = self._unit or lr
        if lr:
            self.length += lr / self._unit * move
        return lr * move


class OptimizerStates:
    """Restarts optimizers and schedules for each client, and counts the steps they take.

    A round begins with the options (learning rate, momentum, ...) that the schedules have reached. Each client starts
    from these; the next round continues from the client that took the most steps.

    Options that an optimizer's own step changes, such as Prodigy's estimate of the step size, are part of its state:
    they are passed on neither from client to client nor to the next round.

    Args:
        optimizers: The user's optimizers. Clients start with the optimizers' current states.
        scaler: The gradient scaler, such as a ``torch.amp.GradScaler``; it is restarted like the schedules.
    """

    def __init__(self, optimizers: Sequence[Optimizer], scaler: Any = None) -> None:
        self._scaler = scaler
        self.start = StartingPoint()
        self.schedules: list[Schedule] = []
        self.num_steps = 0
        self.lr_sums: list[list[float]] = []
        self._is_measured = False
        self._normalizers: list[list[FedNovaNormalizer]] = []
        self._is_counting = True
        self._own_params: list[list[list[nn.Parameter]]] = []
        self._first_epochs: list[int] = []
        self._hooks: list[Any] = []
        self.take(optimizers)

    def take(self, optimizers: Sequence[Optimizer]) -> None:
        """Uses other optimizers from the next round on."""
        self.close()
        self.optimizers = list(optimizers)
        # Not always empty: Adagrad, for one, creates its accumulators when it is constructed.
        self._fresh = [_copy_state(optimizer.state) for optimizer in self.optimizers]
        self._own_options: list[set[str]] = [set() for _ in self.optimizers]
        self._depth = 0
        self._hooks = []
        # Counted by hooks, so that steps of manual optimization count and those that a gradient scaler skips do not.
        for index, optimizer in enumerate(self.optimizers):
            is_watched = not _is_of_torch(optimizer)
            count = self._count_watched if is_watched else self.count
            self._hooks.append(
                optimizer.register_step_post_hook(lambda optimizer, *_, n=index, count=count: count(n, optimizer))
            )
            if is_watched:
                self._hooks.append(optimizer.register_step_pre_hook(self._begin_watched))

    def _begin_watched(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self._before = [_marks(group) for group in optimizer.param_groups]

    def _count_watched(self, index: int, optimizer: Optimizer) -> None:
        """Counts a step of an optimizer that is not torch's, and notes which options it has changed."""
        self._depth -= 1
        if self._depth > 0:  # a subclass whose step calls that of its base, for which torch calls the hooks too
            return
        for group, before in zip(optimizer.param_groups, self._before, strict=False):
            self._own_options[index].update(name for name, mark in _marks(group).items() if before.get(name) != mark)
        self.count(index, optimizer)

    def close(self) -> None:
        """Removes the hooks from the optimizers."""
        for hook in self._hooks:
            hook.remove()

    def begin_round(self, schedules: Sequence[Schedule] = ()) -> None:
        """Saves the options and schedules with which every client of the round starts."""
        self.schedules = list(schedules)
        self.start = self._present()
        self._first_epochs = [getattr(schedule.scheduler, "last_epoch", 0) for schedule in self.schedules]

    def _present(self) -> StartingPoint:
        # `state_dict` holds the scheduler's own containers, which its steps may change.
        schedules = [copy.deepcopy(schedule.scheduler.state_dict()) for schedule in self.schedules]
        return StartingPoint([options_of(optimizer) for optimizer in self.optimizers], schedules, self._scaler_state())

    def restart(self, kept: Tree | None) -> None:
        """Restores the round's options and schedules, with a fresh optimizer state or the client's last one."""
        self._go_to(self.start)
        if kept is not None:
            load_kept(kept, self.optimizers)
        # An empty `kept` is that of SGD without momentum, which starts as if it were fresh. Momentum of an earlier
        # round would move the parameters in a way that the normalizer does not include.
        self._start_counting(not kept and all(type(optimizer) is SGD for optimizer in self.optimizers))

    def restart_stacked(self, stacked: Mapping[int, Tensor]) -> None:
        """Restarts with several clients' parameters instead of the module's, until :meth:`unstack`.

        Args:
            stacked: By ``id`` of a parameter, the clients' stacked parameters that replace it.
        """
        self.restart(None)
        self._own_params = [[group["params"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        for optimizer in self.optimizers:
            fresh = dict(optimizer.state)
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["params"] = [stacked.get(id(param), param) for param in group["params"]]
            for param, values in fresh.items():
                if id(param) in stacked:
                    optimizer.state[stacked[id(param)]] = _stack_state(values, param, stacked[id(param)])

    def unstack(self) -> None:
        """Puts the module's own parameters back into the optimizers, if they had stacked ones."""
        # Not strict: without stacked parameters there is nothing to put back.
        for optimizer, groups in zip(self.optimizers, self._own_params, strict=False):
            optimizer.state.clear()
            for group, params in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = params
        self._own_params = []

    def replace_params(self, replaced: Mapping[int, Tensor]) -> None:
        """Makes the optimizers step other tensors, with empty states.

        Args:
            replaced: By ``id`` of a tensor, the one that replaces it.
        """
        for optimizer in self.optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["params"] = [replaced.get(id(param), param) for param in group["params"]]

    @property
    def num_steps_apart(self) -> float:
        """Number of a client's first steps that it can take only together with clients that are at the same step.

        Plain SGD has no state; momentum and other averages begin with the first step. If the formula contains the
        number of steps, all clients must be at the same one, except for Adam, which accepts a number for each client.
        """
        return max(map(_num_steps_apart, self.optimizers), default=0)

    def recount(self, num_steps: int) -> None:
        """Restarts counting with ``num_steps`` steps at the current options."""
        self._start_counting(self._is_measured)
        # Every step is counted with the current options: under a schedule clients train together only with equal work,
        # whose steps need no recount.
        for _ in range(num_steps):
            for index, optimizer in enumerate(self.optimizers):
                self.count(index, optimizer)

    def keep(self) -> Tree:
        """The optimizers' states as a tree, to be passed to :meth:`restart` in the client's next round."""
        return keep(self.optimizers, self._own_options)

    def schedule_end(self) -> ScheduleEnd:
        """The progress of the schedules in the current client's local training."""
        steps = [
            schedule.scheduler.last_epoch - first if schedule.by_user and not schedule.by_state else schedule.num_steps
            for schedule, first in zip(self.schedules, self._first_epochs, strict=True)
        ]
        # Options that steps change are left out: the rank that continues from here may not have taken a step.
        options = [
            [{name: value for name, value in group.items() if name not in own} for group in options_of(optimizer)]
            for optimizer, own in zip(self.optimizers, self._own_options, strict=True)
        ]
        states = {
            number: copy.deepcopy(schedule.scheduler.state_dict())
            for number, schedule in enumerate(self.schedules)
            if schedule.by_state
        }
        return ScheduleEnd(steps, options, self.num_steps, self._scaler_state(), states)

    def _scaler_state(self) -> dict[str, Any]:
        return {} if self._scaler is None else self._scaler.state_dict()

    def _set_scaler(self, state: Mapping[str, Any]) -> None:
        # A client of another rank may have had no scaler, and one that is not enabled has no state.
        if self._scaler is not None and state:
            self._scaler.load_state_dict(dict(state))

    def end_round(self, end: ScheduleEnd | None) -> None:
        """Sets schedules and options for the next round.

        Args:
            end: Their progress on the client with the most steps. None: back to the round's start.
        """
        # A checkpoint at the round's end must not hold the states of the client that this rank trained last.
        self._go_to(self.start)
        if end is not None:
            with schedules_ahead_of_optimizers():
                # From the round's start and not from where the last client of this rank has left them: the client with
                # the most steps may be on another rank.
                for schedule, num_steps in zip(self.schedules, end.num_steps, strict=True):
                    for _ in range(num_steps):
                        schedule.step()
            for number, state in end.states.items():
                self.schedules[number].scheduler.load_state_dict(copy.deepcopy(state))
            for optimizer, options in zip(self.optimizers, end.options, strict=True):
                for group, reached in zip(optimizer.param_groups, options, strict=True):
                    # The options as they were reached, because not only schedules change them: callbacks and the module
                    # may, too.
                    group.update({name: _like(value, group.get(name)) for name, value in reached.items()})
            self._set_scaler(end.scaler)

    def state_dicts_of_start(self) -> list[dict[str, Any]]:
        """The optimizers' ``state_dict``s as they were at the round's start, also while clients train."""
        found = []
        for index, (options, fresh) in enumerate(zip(self.start.options, self.fresh_states(), strict=True)):
            places = iter(range(sum(map(len, self._params_of(index)))))
            groups = [[next(places) for _ in params] for params in self._params_of(index)]
            own = [{**group, "params": params} for group, params in zip(options, groups, strict=True)]
            found.append({"state": fresh, "param_groups": own})
        return found

    def fresh_states(self) -> list[dict[int, Any]]:
        """The fresh state of each optimizer by the number of the parameter, as in its ``state_dict``."""
        found = []
        for index, fresh in enumerate(self._fresh):
            number = {id(param): place for place, param in enumerate(chain.from_iterable(self._params_of(index)))}
            found.append({number[id(param)]: dict(state) for param, state in _copy_state(fresh).items()})
        return found

    def _params_of(self, index: int) -> list[list[nn.Parameter]]:
        """The module's own parameters in the groups of an optimizer, also while clients train side by side."""
        return (
            self._own_params[index] if self._own_params else [g["params"] for g in self.optimizers[index].param_groups]
        )

    @property
    def are_fresh(self) -> bool:
        """Whether the optimizers have the states with which clients start that keep none."""
        return all(_same(own.state, fresh) for own, fresh in zip(self.optimizers, self._fresh, strict=True))

    def make_fresh(self) -> None:
        """Gives the optimizers the states with which clients start that keep none."""
        for optimizer, fresh in zip(self.optimizers, self._fresh, strict=True):
            optimizer.state.clear()
            optimizer.state.update(_copy_state(fresh))

    @contextmanager
    def borrowed_optimizer(self) -> Iterator[Optimizer]:
        """Lends the only optimizer for training outside rounds, with a fresh state and the last round's start options.

        Yields:
            The optimizer. Afterwards its state, its options and the schedules are restored.
        """
        (optimizer,) = self.optimizers
        before, state = self._present(), _copy_state(optimizer.state)
        try:
            self.restart(None)
            yield optimizer
        finally:
            self._go_to(before)
            optimizer.state.clear()
            optimizer.state.update(state)

    def lr_sum(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """For each parameter, the sum of the learning rates of the client's steps, with SGD's momentum.

        With momentum a gradient also moves the parameter in later steps, so that SGD's sum is the distance that it
        moves under a constant gradient of 1.
        """
        of_param = {
            id(param): total
            for optimizer, totals in zip(self.optimizers, self.lr_sums, strict=True)
            for group, total in zip(optimizer.param_groups, totals, strict=True)
            for param in group["params"]
        }
        return {name: of_param.get(id(param), 0.0) for name, param in params.items()}

    def normalizer(self, params: Mapping[str, Tensor]) -> float | None:
        """FedNova's normalizer of the client's local training.

        Returns:
            None if it is unknown: for optimizers other than ``torch.optim.SGD``, with momentum of an earlier round, and
            if it differs between parameter groups.
        """
        if not self._is_measured:
            return None
        shared = {id(param) for param in params.values()}
        lengths = [
            run.length
            for optimizer, runs in zip(self.optimizers, self._normalizers, strict=True)
            for group, run in zip(optimizer.param_groups, runs, strict=True)
            if run.length and any(id(param) in shared for param in group["params"])
        ]
        longest = max(lengths, default=0.0)
        return longest if all(math.isclose(length, longest, rel_tol=1e-9) for length in lengths) else None

    def _start_counting(self, is_measured: bool) -> None:
        self.num_steps = self._depth = 0  # a step that has raised has not been counted
        groups = [optimizer.param_groups for optimizer in self.optimizers]
        self.lr_sums = [[0.0] * len(group) for group in groups]
        self._is_measured = is_measured
        self._normalizers = [
            [FedNovaNormalizer() for _ in group] if type(optimizer) is SGD else []
            for optimizer, group in zip(self.optimizers, groups, strict=True)
        ]

    def count(self, index: int, optimizer: Optimizer) -> None:
        """Counts a step of the optimizer at ``index`` with its current options."""
        if not self._is_counting:
            return
        self.num_steps += 1
        # A parameter group that was added during the round, as a finetuning callback does, has no entry yet.
        sums = self.lr_sums[index] if self.lr_sums else []
        for position, group in enumerate(optimizer.param_groups[: len(sums)]):
            runs = self._normalizers[index]
            sums[position] += runs[position].step(group) if runs else float(group["lr"])

    @contextmanager
    def not_counting(self) -> Iterator[None]:
        """A block whose steps are only trials and are not counted."""
        self._is_counting = False
        try:
            yield
        finally:
            self._is_counting = True

    def _go_to(self, start: StartingPoint) -> None:
        """Restores these options, schedules and scaler, with fresh states of the optimizers."""
        self._set_scaler(start.scaler)
        # The optimizers are restarted, not recreated: Lightning's wrappers and the schedulers refer to them.
        for optimizer, options in zip(self.optimizers, start.options, strict=True):
            for group, saved in zip(optimizer.param_groups, options, strict=True):
                group.update({name: _copied(value) for name, value in saved.items()})
                # Also under manual optimization, where the module may add to existing gradients.
                for param in group["params"]:
                    param.grad = None
        self.make_fresh()
        for schedule, state in zip(self.schedules, start.schedules, strict=True):
            # `load_state_dict` keeps the objects that it is given, and the next client needs them unchanged.
            schedule.scheduler.load_state_dict(copy.deepcopy(state))
            schedule.num_steps = 0


def takes_counts(optimizer: Optimizer) -> bool:
    """Whether it is an Adam that accepts a number of steps for each client, as a tensor in its state."""
    # In its other forms, torch needs one number for each parameter.
    return type(optimizer) in (Adam, AdamW) and not any(
        optimizer.defaults["differentiable"] or group["foreach"] or group["capturable"] or group["fused"]
        for group in optimizer.param_groups
    )


def _num_steps_apart(optimizer: Optimizer) -> float:
    kind, groups = type(optimizer), optimizer.param_groups
    if kind is SGD:
        return int(any(group["momentum"] for group in groups))
    is_counted = kind not in (RMSprop, Adadelta, Rprop) and not takes_counts(optimizer)
    if kind is Adagrad:
        is_counted = any(group["lr_decay"] for group in groups)
    return math.inf if is_counted else 1


@contextmanager
def schedules_ahead_of_optimizers() -> Iterator[None]:
    """A block in which PyTorch does not warn about schedules that step before their optimizers.

    A rank without clients steps its schedules although its optimizers have not stepped.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield


_OF_SCHEDULES = ("params", "lr", "initial_lr", "momentum", "betas", "weight_decay")
"""Options that schedules, callbacks and modules change in a group, perhaps in the closure passed to ``step``."""


def _marks(group: Mapping[str, Any]) -> dict[str, Any]:
    """Marks that show whether an option has changed: its value for numbers, the version counter for tensors."""
    return {
        name: (id(value), version_counter(value)) if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name not in _OF_SCHEDULES and isinstance(value, int | float | Tensor)
    }


def _is_of_torch(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")  # whose steps change no options


class AsMade:
    """The state of an optimizer at its creation.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._state, self._options = _copy_state(optimizer.state), options_of(optimizer)

    def put_back(self) -> None:
        """Undoes all steps; options that schedules change, such as the learning rate, stay."""
        self.optimizer.state.clear()
        self.optimizer.state.update(_copy_state(self._state))
        if _is_of_torch(self.optimizer):
            return
        for group, made in zip(self.optimizer.param_groups, self._options, strict=True):
            group.update({name: _copied(made[name]) for name in _marks(group).keys() & made.keys()})


_IMMUTABLE = (int, float, bool, str, type(None))


def _copied(value: Any) -> Any:
    # deepcopy takes as long as a small client's whole step, and this runs for each option of each client.
    return value if type(value) in _IMMUTABLE else copy.deepcopy(value)


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """A copy of the optimizer's options (learning rate, momentum, ...), one mapping per parameter group."""
    return [
        {key: _copied(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def _like(value: Any, own: Any) -> Any:
    # A learning rate that is a tensor stays one, on its device; the report of another rank holds a number.
    return torch.full_like(own, value) if isinstance(own, Tensor) else copy.deepcopy(value)


def _same(one: Any, two: Any) -> bool:
    """Whether two states, or parts of them, hold the same values."""
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(_same(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):  # as in LBFGS
        return len(one) == len(two) and all(map(_same, one, two))
    return torch.equal(one, two) if isinstance(one, Tensor) else bool(one == two)


def _copy_state(state: Mapping[Any, Any]) -> dict[Any, Any]:
    return {param: copy.deepcopy(values) for param, values in state.items()} if state else {}


def _stack_state(values: Mapping[str, Any], param: Tensor, stacked: Tensor) -> dict[str, Any]:
    def repeat(key: str, value: Any) -> Any:
        # A step counter has the shape of a parameter without dimensions, but is one number for all clients.
        is_elementwise = isinstance(value, Tensor) and value.shape == param.shape and key != "step"
        return value.expand(stacked.shape).clone() if is_elementwise else copy.deepcopy(value)

    return {key: repeat(key, value) for key, value in values.items()}
