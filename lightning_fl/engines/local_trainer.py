"""Local training of client groups: the interface of engines, and the training step that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.engines.optimizer_states import OptimizerStates, Schedule, ScheduleEnd
from lightning_fl.engines.tensors import FederatedTensors, clones, load
from lightning_fl.tree import cast_like, sum_dtype, to_sum_dtype
from lightning_fl.types import Phase, Tree

ClientOptimizer = Literal["reset", "keep"]
GradTransform = Callable[[Tree, Tree], Tree]
"""Replaces the gradients of the shared parameters: ``(grads, params) -> grads``."""
ONE_PHASE = Phase()


@dataclass(frozen=True)
class StepFunctions:
    """The parts of a training step; a caller replaces those that it does differently.

    Args:
        training_step: Called with a batch and its index among the client's batches; returns the loss, a mapping with
            the entry ``"loss"``, or None to skip the batch.
        context: Returns the context in which ``training_step`` runs, such as autocast.
        backward: Computes the gradients of a loss.
        unscale: Unscales the gradients of an optimizer before they are read. None: there is nothing to unscale.
        clip: Clips the gradients that an optimizer is about to step; None: they are not clipped.
        optimizer_step: Takes the step.
        group_step: The step of several clients: called with their stacked batch, returns the sum of their losses, to be
            differentiated, and the loss of each. None: ``training_step`` of each, under ``torch.func.vmap``.
    """

    training_step: Callable[[Any, int], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    backward: Callable[[Tensor], Any] = Tensor.backward
    unscale: Callable[[Optimizer], Any] | None = None
    clip: Callable[[Optimizer], Any] | None = None
    optimizer_step: Callable[[Optimizer], Any] = lambda optimizer: optimizer.step()
    group_step: Callable[[Any, int], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class ClientFacts:
    """Facts of one client's local training.

    Args:
        num_steps: Optimizer steps actually taken, in the phases that train what is sent.
        lr_sum: For each shared parameter, the learning rates of its steps summed.
        normalizer: FedNova's ``|a_i|_1``, or None if it is unknown for the optimizer.
        schedule_end: The progress of the schedules at the end of the longest phase.
        num_steps_of_all: Optimizer steps of all phases.
    """

    num_steps: int
    lr_sum: Mapping[str, float]
    normalizer: float | None
    schedule_end: ScheduleEnd
    num_steps_of_all: int


@dataclass(frozen=True)
class LocalResult:
    """The result of a group's local training; each tensor is stacked over the clients, ``[num_clients, ...]``.

    Args:
        params: The trained shared parameters, in the dtype in which they are summed.
        buffers: The change of the shared buffers.
        client_state: The clients' state for their next round: personal tensors, optimizer state.
        facts: Facts of each client's training.
    """

    params: Tree
    buffers: Tree
    client_state: Mapping[str, Tree]
    facts: Sequence[ClientFacts]


@dataclass(frozen=True)
class RoundStart:
    """The module's tensors, and the values with which every client of a round starts."""

    tensors: FederatedTensors
    buffers: Tree = field(default_factory=dict)
    personal: Tree = field(default_factory=dict)


class LocalTrainer(ABC):
    """Trains client groups on the user's module; a client alone is a group of one.

    A round is ``begin_round``, then ``start``, ``step`` for each batch and ``finish`` for each group, then
    ``end_round``.

    Args:
        module: The user's module.
        optimizers: The user's optimizers and schedules.
        personal: ``fnmatch`` globs of tensors that stay with their client.
        client_optimizer: ``"reset"``: each client starts with a fresh optimizer state; ``"keep"``: with that of its
            last round.
        functions: The parts of a step. None: :meth:`step` is not called, because another loop runs the steps and calls
            :meth:`prepare_gradients` in each.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: OptimizerStates,
        personal: Sequence[str] = (),
        client_optimizer: ClientOptimizer = "reset",
        functions: StepFunctions | None = None,
    ) -> None:
        self.module = module
        self.optimizers = optimizers
        self.personal = tuple(personal)
        self.client_optimizer = client_optimizer
        self.functions = functions
        self.grad_transform: GradTransform | None = None
        self._round_start: RoundStart | None = None

    # ---- a round

    def begin_round(self, server_params: Tree | None, schedules: Sequence[Schedule] = ()) -> Tree:
        """Takes the module's tensors as the round's start.

        Changes of the module between rounds take precedence: a value of ``server_params`` (in at least float32) is used
        only where the module still holds its cast.

        Returns:
            The global parameters, in the dtype in which they are summed.
        """
        # Sorted anew in each round, because callbacks freeze and unfreeze layers between rounds.
        tensors = FederatedTensors(self.module, self.personal)
        self._round_start = RoundStart(tensors, clones(tensors.buffers), clones(tensors.personal))
        self.optimizers.begin_round(schedules)
        params = to_sum_dtype(tensors.params)
        for name, param in tensors.params.items():
            if server_params is not None and name in server_params and params[name].dtype != param.dtype:
                master = server_params[name].to(param.device)
                params[name] = torch.where(cast_like(master, param) == param, master, params[name])
        return params

    @abstractmethod
    def start(
        self,
        starts: Sequence[Tree],
        client_states: Sequence[Mapping[str, Tree]],
        phase: Phase = ONE_PHASE,
        grad_transform: GradTransform | None = None,
    ) -> None:
        """Loads a group for its first phase.

        Args:
            starts: The parameters from which each client starts.
            client_states: Each client's state from its last round.
            phase: The first phase.
            grad_transform: The algorithm's transform of the gradients, which are stacked if there are several clients.
        """

    @abstractmethod
    def next_phase(self, phase: Phase, grad_transform: GradTransform | None = None) -> None:
        """Ends the current phase and begins another."""

    def step(self, batch: Any, position: BatchPosition) -> Tensor | None:
        """Trains on one batch, in the order of Lightning's automatic optimization.

        Args:
            batch: The batch, on the module's device.
            position: Its position in the client's local work.

        Returns:
            The detached loss: a scalar for a client alone, ``[num_clients]`` for several; None if the batch was
            skipped.
        """
        functions, (optimizer,) = self.functions, self.optimizers.optimizers
        assert functions is not None
        loss, losses = self._forward(batch, position)
        # After the forward pass, as in Lightning's closure: a training_step may still read the gradients of the last
        # step.
        if position.starts_window:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None
        if loss is not None:
            # A last window that is not full is divided by the full window too, as in Lightning.
            functions.backward(loss if position.window == 1 else loss / position.window)
        # Where gradients are scaled, a batch without loss at the end of a window drops the window, as in Lightning.
        if position.ends_window and (loss is not None or functions.unscale is None):
            if functions.unscale is not None:
                # An algorithm's correction has the scale of true gradients, and clipping bounds what is stepped:
                # unscale, correct, clip.
                functions.unscale(optimizer)
            self.prepare_gradients(optimizer)
            if functions.clip is not None:
                functions.clip(optimizer)
            functions.optimizer_step(optimizer)
        return None if losses is None else losses.detach()

    @abstractmethod
    def prepare_gradients(self, optimizer: Optimizer) -> None:
        """Lets phase and algorithm change the gradients before the step: unscaled and not yet clipped."""

    @abstractmethod
    def finish(self, num_steps: Sequence[int] | None = None) -> LocalResult:
        """Ends the group's local training and returns its result.

        Args:
            num_steps: How many steps each client of a group has taken. None: all have taken every step.

        Raises:
            ValueError: If training has changed a frozen parameter, which the next client would inherit.
        """

    @abstractmethod
    def leave(self) -> None:
        """Discards the group, which will not be finished."""

    def end_round(self, params: Tree, buffers: Tree, schedule_end: ScheduleEnd | None) -> None:
        """Loads the new global model.

        Args:
            params: The new global parameters.
            buffers: The new shared buffers.
            schedule_end: The progress of the schedules on the client with the most steps. None: back to the start.
        """
        # A group may still be in training where a round is abandoned, and its tensors may be in the optimizers.
        self.leave()
        start = self.round_start
        load(self.tensors.params, params)
        load(self.tensors.buffers, buffers)
        # Between rounds the module holds the common start values, not those of the client that was trained last.
        load(self.tensors.personal, start.personal)
        self.optimizers.end_round(schedule_end)

    # ---- parts

    @property
    def round_start(self) -> RoundStart:
        """The values with which the clients of the current round start."""
        assert self._round_start is not None, "begin_round has not been called"
        return self._round_start

    @property
    def tensors(self) -> FederatedTensors:
        """The module's tensors, by their role in the federation."""
        return self.round_start.tensors

    @property
    def device(self) -> torch.device:
        """The device of the module's shared parameters."""
        return next(iter(self.tensors.params.values())).device

    def _forward(self, batch: Any, position: BatchPosition) -> tuple[Tensor | None, Tensor | None]:
        """The loss to be differentiated, and that of each client; both are the same for a client alone."""
        assert self.functions is not None
        with self.functions.context():
            loss = loss_of(self.functions.training_step(batch, position.offset))
        return loss, loss


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a ``training_step`` has returned; None if the batch is to be skipped.

    Raises:
        ValueError: If it returned something else.
    """
    if isinstance(output, Tensor):
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor) or output is None:
        return loss
    found = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        found = f"a mapping whose 'loss' is {loss!r}" if "loss" in output else "a mapping without the entry 'loss'"
    raise ValueError(
        f"training_step returned {found}; expected a tensor, a mapping with a tensor as 'loss', or None to skip the "
        "batch."
    )


def transform_gradients(transform: GradTransform, params: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Replaces the gradients of those of ``params`` that ``optimizer`` steps by ``transform(grads, params)``."""
    # With several optimizers, gradients of the others must not be corrected once for each of them.
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    grads = {name: param.grad for name, param in params.items() if id(param) in stepped and param.grad is not None}
    for name, grad in transform(grads, {name: params[name].detach() for name in grads}).items():
        # A correction in float32 promotes gradients in half precision, and torch refuses a gradient of another dtype.
        params[name].grad = grad.to(params[name].dtype)


def buffer_delta(buffer: Tensor, start: Tensor) -> Tensor:
    """The change of a buffer by training; 0 where an infinity has not changed, as in an attention mask."""
    dtype = sum_dtype(buffer.dtype)
    return (buffer.detach().to(dtype) - start.to(dtype)).masked_fill(buffer == start, 0)


def trained_value(param: Tensor, start: Tensor) -> Tensor:
    """The trained parameter in the dtype of ``start``, of which only what training has changed counts."""
    if param.dtype == start.dtype:
        return param.clone()
    # The module started from `start` rounded to its own dtype. The difference to that rounded value leaves a client
    # that has not trained exactly at `start`.
    return start + (param.to(start.dtype) - start.to(param.dtype).to(start.dtype))
