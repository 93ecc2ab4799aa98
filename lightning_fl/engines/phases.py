"""The phases of a client's local training: what each of them trains, and what they add up to."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_fl.engines.optimizer_states import OptimizerStates, ScheduleEnd
from lightning_fl.engines.tensors import FederatedTensors, clones, load
from lightning_fl.types import Phase, Tree


class LocalPhases:
    """One client's phases in a round, and the facts of its training.

    Args:
        tensors: The module's tensors; they hold the model that came from the server.
        own: The client's own model, for phases that train it.
    """

    def __init__(self, tensors: FederatedTensors, own: Tree) -> None:
        self.tensors = tensors
        self.num_steps = 0
        self.num_steps_of_all = 0
        self.lr_sum = dict.fromkeys(tensors.params, 0.0)
        self.normalizer: float | None = None
        self.kept: dict[str, Tree] = {}
        self._own = own
        self._global: Tree = {}
        self._index = -1
        self._num_sent = 0
        self._model = "global"

    def start(self, phase: Phase) -> None:
        """Begins a phase: puts the model that it trains into the module."""
        self._index += 1
        self._phase = phase
        self._moving = self.tensors.select(phase.trains)
        self._still = {id(param) for name, param in self.tensors.trainable.items() if name not in self._moving}
        if phase.model == "own" and self._model == "global":
            self._global = clones(self._all)
            load(self._all, self._own)
        elif phase.model == "global":
            self._leave_own()
        self._model = phase.model

    def mask_frozen_grads(self, optimizer: Optimizer) -> None:
        """Takes away the gradients of what the phase does not train, so that the optimizer leaves it as it is."""
        if self._still:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if id(param) in self._still:
                        param.grad = None

    def end(self, optimizers: OptimizerStates, keep: bool) -> None:
        """Takes in the phase's facts.

        Args:
            optimizers: The optimizers, after the phase.
            keep: Whether the client keeps their states.
        """
        if keep:
            self.kept[self.optimizer_entry] = optimizers.keep()
        self.num_steps_of_all += optimizers.num_steps
        end = optimizers.schedule_end()
        if self._index == 0 or self.schedule_end.num_optimizer_steps < end.num_optimizer_steps:
            self.schedule_end: ScheduleEnd = end
        sent = {name: param for name, param in self.tensors.params.items() if name in self._moving}
        if self._phase.model == "own" or not sent:
            return
        self._num_sent += 1
        self.num_steps += optimizers.num_steps
        self.normalizer = optimizers.normalizer(sent) if self._num_sent == 1 else None
        for name, total in optimizers.lr_sum(sent).items():
            self.lr_sum[name] += total

    def leave_own(self) -> Tree:
        """Puts the model that is sent back into the module; gives the client's own, empty if none was trained."""
        self._leave_own()
        return self._own if self._global else {}

    @property
    def optimizer_entry(self) -> str:
        """Under which name a client keeps the optimizers' states of the phase at hand."""
        return optimizer_entry(self._index)

    @property
    def _all(self) -> Tree:
        return {**self.tensors.trainable, **self.tensors.buffers, **self.tensors.personal}

    def _leave_own(self) -> None:
        if self._model == "own":
            self._own = clones(self._all)
            load(self._all, self._global)
            self._model = "global"


def optimizer_entry(index: int) -> str:
    """Under which name a client keeps the optimizers' states of a phase."""
    return f"optimizer {index}" if index else "optimizer"
