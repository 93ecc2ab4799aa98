"""Gradients on the current step's batch at parameters other than the module's, for algorithms such as FedSAM."""

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
    """The part of :class:`~lightning_fl.engines.LocalTrainer` that is used here."""

    @property
    def tensors(self) -> FederatedTensors: ...

    @property
    def shared_params(self) -> Mapping[str, Tensor]: ...

    @property
    def num_clients(self) -> int: ...

    def loss_without_trace(self) -> AbstractContextManager[Tensor | None]: ...


class BatchGradient:
    """The gradient on the current training batch at any parameters; a :class:`~lightning_fl.types.GradientAt`.

    Under ``torch.func.vmap`` it is each client's gradient on its own batch, for the whole group in one step.

    Args:
        trainer: Trains the clients, and holds the current batch.
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
        """The gradient at the first ``len(names)`` tensors; given as many more, the Hessian times those."""
        trainer, point, vector = self._trainer, tensors[: len(names)], tensors[len(names) :]
        held = {name: trainer.shared_params[name] for name in names}
        # Frozen parameters that a step writes to, such as a teacher's, must not be updated a second time.
        before = clones({**trainer.tensors.moving, **held})
        load(held, dict(zip(names, point, strict=True)))
        try:
            # Differentiated inside the block: the gradients need values that are restored at its end, such as
            # BatchNorm's statistics.
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
                    if along.requires_grad:  # not where the loss is linear
                        grads = torch.autograd.grad(along, inputs, allow_unused=True, materialize_grads=True)
            return [grad.detach() for grad in grads]
        finally:
            load({**trainer.tensors.moving, **held}, before)
