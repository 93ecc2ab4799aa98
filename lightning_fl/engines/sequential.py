"""Trains clients one after the other on the user's own module: right for any module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fl.engines.optimizer_states import OptimizerStates, Schedule, ScheduleEnd
from lightning_fl.engines.phases import LocalPhases
from lightning_fl.engines.tensors import FederatedTensors, clones, load
from lightning_fl.tree import cast_like, sum_dtype, to_sum_dtype, tree_map
from lightning_fl.types import Phase, Tree

ClientOptimizer = Literal["reset", "keep"]
ONE_PHASE = Phase()


@dataclass(frozen=True)
class LocalResult:
    """What is left of a client's local training.

    Args:
        params: The trained shared parameters, in the dtype in which they are summed.
        buffers: The change of the shared buffers.
        kept: What the client keeps: personal tensors, optimizer state.
        num_steps: Optimizer steps really taken, in the phases that train what is sent.
        lr_sum: For each shared parameter, the learning rates of its steps summed.
        normalizer: FedNova's ``|a_i|_1``, or None if it is unknown for the optimizer.
        schedule_end: Where the longest phase has taken the schedules.
        num_steps_of_all: Optimizer steps of all phases.
    """

    params: Tree
    buffers: Tree
    kept: Mapping[str, Tree]
    num_steps: int
    lr_sum: Mapping[str, float]
    normalizer: float | None
    schedule_end: ScheduleEnd
    num_steps_of_all: int


class SequentialEngine:
    """Switches one module and its optimizers from client to client.

    Args:
        module: The user's module; whoever drives the engine runs its training steps.
        optimizers: The user's optimizers and schedules.
        personal: ``fnmatch`` globs of tensors that stay with their client.
        client_optimizer: ``"reset"``: each client starts with a fresh optimizer state; ``"keep"``: with its own.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: OptimizerStates,
        personal: Sequence[str] = (),
        client_optimizer: ClientOptimizer = "reset",
    ) -> None:
        self.module = module
        self.optimizers = optimizers
        self.personal = tuple(personal)
        self.client_optimizer = client_optimizer
        self._loaded: Tree = {}
        self._kept: Mapping[str, Tree] = {}
        self._phases: LocalPhases | None = None

    @property
    def device(self) -> torch.device:
        """Where the module's shared parameters are."""
        return next(iter(self.tensors.params.values())).device

    def begin_round(self, server_params: Tree | None, schedules: Sequence[Schedule] = ()) -> Tree:
        """Takes the module's tensors as the round's start.

        What was changed on the module between rounds counts: a value of ``server_params`` (kept in at least float32)
        is taken only where the module still holds its cast.

        Returns:
            The global parameters, in the dtype in which they are summed.
        """
        self.tensors = FederatedTensors(self.module, self.personal)
        self.optimizers.begin_round(schedules)
        params = to_sum_dtype(self.tensors.params)
        for name, param in self.tensors.params.items():
            if server_params is not None and name in server_params and params[name].dtype != param.dtype:
                master = server_params[name].to(param.device)
                params[name] = torch.where(cast_like(master, param) == param, master, params[name])
        self._start_buffers = clones(self.tensors.buffers)
        self._start_personal = clones(self.tensors.personal)
        return params

    def start_client(self, params: Tree, kept: Mapping[str, Tree], phase: Phase = ONE_PHASE) -> None:
        """Loads a client for its first phase.

        Args:
            params: The parameters it starts from.
            kept: What it has kept from its last round.
            phase: Its first phase.
        """
        self._loaded, self._kept = params, kept
        load(self.tensors.params, params)
        load(self.tensors.buffers, self._start_buffers)
        load(self.tensors.personal, kept.get("personal", self._start_personal))
        own = {**params, **self._start_buffers, **self._start_personal, **kept.get("personal", {})}
        self._phases = LocalPhases(self.tensors, own)
        self._start_phase(phase)

    def next_phase(self, phase: Phase) -> None:
        """Ends the phase at hand and begins another."""
        self._end_phase()
        self._start_phase(phase)

    def _start_phase(self, phase: Phase) -> None:
        assert self._phases is not None
        self._phases.start(phase)
        self.optimizers.start_client(self._kept.get(self._phases.optimizer_entry))

    def _end_phase(self) -> None:
        assert self._phases is not None
        self._phases.end(self.optimizers, keep=self.client_optimizer == "keep")

    def mask_frozen_grads(self, optimizer: Optimizer) -> None:
        """Takes away the gradients of what the phase at hand does not train."""
        if self._phases is not None:
            self._phases.mask_frozen_grads(optimizer)

    def transform_grads(self, transform: Callable[[Tree, Tree], Tree], optimizer: Optimizer) -> None:
        """Replaces the gradients of the shared parameters that ``optimizer`` steps by ``transform(grads, params)``."""
        stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        params = {name: param for name, param in self._shared_params.items() if id(param) in stepped}
        grads = {name: param.grad for name, param in params.items() if param.grad is not None}
        for name, grad in transform(grads, {name: params[name].detach() for name in grads}).items():
            params[name].grad = grad.to(params[name].dtype)

    @property
    def _shared_params(self) -> Mapping[str, Tensor]:
        """The shared parameters that are being trained."""
        return self.tensors.params

    def finish_client(self) -> LocalResult:
        """Reads what a client's local training has changed.

        Raises:
            ValueError: If it has changed a frozen parameter, which the next client would inherit.
        """
        assert self._phases is not None
        tensors, phases = self.tensors, self._phases
        tensors.check_frozen()
        self._end_phase()
        own = phases.leave_own()
        kept: dict[str, Tree] = dict(phases.kept)
        if self.personal or own:
            kept["personal"] = own or clones(tensors.personal)
        return LocalResult(
            params={name: trained(param.detach(), self._loaded[name]) for name, param in tensors.params.items()},
            buffers=tree_map(change, tensors.buffers, self._start_buffers),
            kept=kept,
            num_steps=phases.num_steps,
            lr_sum=phases.lr_sum,
            normalizer=phases.normalizer,
            schedule_end=phases.schedule_end,
            num_steps_of_all=phases.num_steps_of_all,
        )

    def end_round(self, params: Tree, buffers: Tree, schedule_end: ScheduleEnd | None) -> None:
        """Loads the new global model.

        Args:
            params: The new global parameters.
            buffers: The mean change of the shared buffers.
            schedule_end: Where the client with the most steps has taken the schedules; None: back to the start.
        """
        load(self.tensors.params, params)
        load(self.tensors.buffers, tree_map(_move, self._start_buffers, buffers))
        load(self.tensors.personal, self._start_personal)
        self.optimizers.end_round(schedule_end)


def change(buffer: Tensor, start: Tensor) -> Tensor:
    """What training has changed; 0 also where an infinity has stayed one, as in an attention mask."""
    dtype = sum_dtype(buffer.dtype)
    return (buffer.detach().to(dtype) - start.to(dtype)).masked_fill(buffer == start, 0)


def _move(start: Tensor, change: Tensor) -> Tensor:
    """``start + change``; bit for bit ``start`` where nothing changed, also integers that no float can hold."""
    return torch.where(change == 0, start, cast_like(start.to(change.dtype) + change, start))


def trained(param: Tensor, start: Tensor) -> Tensor:
    """The trained parameter in the dtype of ``start``, of which only what training has changed counts."""
    if param.dtype == start.dtype:
        return param.clone()
    return start + (param.to(start.dtype) - start.to(param.dtype).to(start.dtype))
