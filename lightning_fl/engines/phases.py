"""The phases of a client's local training: the tensors that each phase trains, and the facts of all phases together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch.optim import Optimizer

from lightning_fl.engines.optimizer_states import OptimizerStates, ScheduleEnd
from lightning_fl.engines.tensors import FederatedTensors, clones, load
from lightning_fl.types import Context, Phase, Tree


class LocalPhases:
    """One client's phases in a round, and the facts of its training.

    Args:
        tensors: The module's tensors; they hold the model that came from the server.
        start_params: The shared parameters from which the client starts.
        client_state: The client's state from its last round.
        own_model: The client's own model, for phases that train it.
    """

    def __init__(
        self, tensors: FederatedTensors, start_params: Tree, client_state: Mapping[str, Tree], own_model: Tree
    ) -> None:
        self.tensors = tensors
        self.start_params = start_params
        self.client_state = client_state
        self.next_state: dict[str, Tree] = {}
        self.num_steps = 0
        self.num_steps_of_all = 0
        self.lr_sum = dict.fromkeys(tensors.params, 0.0)
        self.normalizer: float | None = None
        self._end: ScheduleEnd | None = None
        self._phase = Phase()
        self._trained: set[str] = set()
        self.frozen: set[int] = set()
        """``id`` of the parameters that the current phase does not train."""
        self._own_model = own_model
        self._global_model: Tree = {}
        self._index = -1
        self._num_sent = 0
        self._model: Literal["global", "own"] = "global"

    def start(self, phase: Phase) -> None:
        """Begins a phase: puts the model that it trains into the module."""
        self._index += 1
        self._phase = phase
        self._trained = self.tensors.select(phase.trains)
        trainable = self.tensors.trainable
        # An empty set spares `mask_frozen_grads`, which runs in every step, a loop over all parameters.
        if len(self._trained) == len(trainable):
            self.frozen = set()
        else:
            self.frozen = {id(param) for name, param in trainable.items() if name not in self._trained}
        if phase.model == "own" and self._model == "global":
            self._global_model = clones(self._all)
            load(self._all, self._own_model)
        elif phase.model == "global":
            self._restore_global_model()
        self._model = phase.model

    def start_at(self, start: Callable[[Tree, Tree, Context], Tree], ctx: Context) -> None:
        """Sets the client's own model, which has just been loaded, to the start of its phase; see ``Phase.start``."""
        shared = self.tensors.params
        load(shared, start(clones(shared), {name: self._global_model[name] for name in shared}, ctx))

    def mask_frozen_grads(self, optimizer: Optimizer) -> None:
        """Sets the gradients of parameters that the phase does not train to None, so that they are not stepped."""
        if self.frozen:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if id(param) in self.frozen:
                        # None and not zero: momentum and weight decay would move a parameter whose gradient is zero.
                        param.grad = None

    def end(self, optimizers: OptimizerStates, keep: bool) -> None:
        """Adds the phase's facts.

        Args:
            optimizers: The optimizers, after the phase.
            keep: Whether the client keeps their states for its next round.
        """
        if keep:
            self.next_state[self.optimizer_entry] = optimizers.keep()
        self.num_steps_of_all += optimizers.num_steps
        end = optimizers.schedule_end()
        if self._end is None or self._end.num_optimizer_steps < end.num_optimizer_steps:
            self._end = end
        # Training of the client's own model must not count as work on the model that it sends.
        sent = {name: param for name, param in self.tensors.params.items() if name in self._trained}
        if self._phase.model == "own" or not sent:
            return
        self._num_sent += 1
        self.num_steps += optimizers.num_steps
        # Several phases with fresh optimizers, and perhaps different parameters, have no normalizer in common.
        self.normalizer = optimizers.normalizer(sent) if self._num_sent == 1 else None
        for name, total in optimizers.lr_sum(sent).items():
            self.lr_sum[name] += total

    def restore_global_model(self) -> Tree:
        """Puts the model that is sent back into the module; returns the client's own model, empty if not trained."""
        self._restore_global_model()
        return self._own_model if self._global_model else {}

    @property
    def schedule_end(self) -> ScheduleEnd:
        """The progress of the schedules at the end of the phase with the most steps."""
        assert self._end is not None, "no phase has ended"
        return self._end

    @property
    def optimizer_entry(self) -> str:
        """The entry of the client's state for the optimizers' states of the current phase."""
        return optimizer_entry(self._index)

    @property
    def _all(self) -> Tree:
        tensors, own = self.tensors, self._own_model
        # Parameters trained in an earlier round and frozen in this one remain the client's own.
        frozen = {name: tensor for name, tensor in tensors.frozen.items() if name in own}
        return {**tensors.trainable, **tensors.buffers, **tensors.personal, **frozen}

    def _restore_global_model(self) -> None:
        if self._model == "own":
            self._own_model = clones(self._all)
            load(self._all, self._global_model)
            self._model = "global"


def optimizer_entry(index: int) -> str:
    """The entry of a client's state for the optimizers' states of the phase ``index``."""
    return f"optimizer {index}" if index else "optimizer"
