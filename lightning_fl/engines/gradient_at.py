"""Gradients of the current step's batch at other parameters than the module's, for algorithms that look around."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from lightning_fl.engines.tensors import FederatedTensors, clones, load
from lightning_fl.torch_internals import outside_vmap, unwrap_or_spread, wrap
from lightning_fl.types import Tree


class _Trainer(Protocol):
    """What is needed of a :class:`~lightning_fl.engines.LocalTrainer`."""

    @property
    def tensors(self) -> FederatedTensors: ...

    @property
    def shared_params(self) -> Mapping[str, Tensor]: ...

    @property
    def num_clients(self) -> int: ...

    def loss_without_trace(self) -> AbstractContextManager[Tensor | None]: ...


class BatchGradient:
    """The gradient of the batch that is being trained on, at any point; a :class:`~lightning_fl.types.GradientAt`.

    Under ``torch.func.vmap`` it is that of each client of a group on its own batch, all of them in one step.

    Args:
        trainer: Trains the clients, and knows the batch.
    """

    def __init__(self, trainer: _Trainer) -> None:
        self._trainer = trainer

    def __call__(self, params: Tree) -> Tree:
        return self._run([params])

    def hessian_product(self, params: Tree, vector: Tree) -> Tree:
        return self._run([params, {name: vector[name] for name in params}])

    def _run(self, trees: list[Tree]) -> Tree:
        names = list(trees[0])
        if not names:  # the step had no loss, and so no gradients
            return {}
        tensors = [tensor for tree in trees for tensor in tree.values()]
        stacked = unwrap_or_spread(tensors, self._trainer.num_clients)
        if stacked is None:
            return dict(zip(names, self._differentiate(names, tensors), strict=True))
        with outside_vmap():
            found = self._differentiate(names, stacked)
        return {name: wrap(grad) for name, grad in zip(names, found, strict=True)}

    def _differentiate(self, names: list[str], tensors: list[Tensor]) -> list[Tensor]:
        """The gradient at the first ``len(names)`` tensors; with as many more, the Hessian there times these."""
        trainer, point, vector = self._trainer, tensors[: len(names)], tensors[len(names) :]
        held = {name: trainer.shared_params[name] for name in names}
        # Frozen parameters that a step writes to, such as a teacher's, must not move once more.
        before = clones({**trainer.tensors.moving, **held})
        load(held, dict(zip(names, point, strict=True)))
        try:
            # Differentiated inside: what is put back afterwards, such as BatchNorm's statistics, the gradients need.
            with torch.enable_grad(), trainer.loss_without_trace() as loss:
                inputs = list(held.values())
                if loss is None:
                    return [torch.zeros_like(own) for own in inputs]
                grads = torch.autograd.grad(
                    loss, inputs, create_graph=bool(vector), allow_unused=True, materialize_grads=True
                )
                if vector:
                    along = sum((grad * own.detach()).sum() for grad, own in zip(grads, vector, strict=True))
                    assert isinstance(along, Tensor)
                    grads = tuple(torch.zeros_like(own) for own in inputs)
                    if along.requires_grad:  # it does not where the loss is linear
                        grads = torch.autograd.grad(along, inputs, allow_unused=True, materialize_grads=True)
            return [grad.detach() for grad in grads]
        finally:
            load({**trainer.tensors.moving, **held}, before)
