"""Federations for tests of the pure rooms: over the ranks of ``run_ranks``, and in a few lines of one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch

from lightning_fl.aggregation import RoundContext, WeightedMean
from lightning_fl.algorithms import Algorithm
from lightning_fl.communication import Group, LocalGroup, Message, connect
from lightning_fl.tree import tree_map
from lightning_fl.types import Aggregate, LocalRun, State, Tree, Update
from tests.helpers.distributed import PATIENCE


def join_ranks(timeout: float = PATIENCE) -> Group:
    """The group of the ranks on which ``run_ranks`` runs a check."""
    environ = os.environ
    return connect(
        rank=int(environ.get("RANK", "0")),
        size=int(environ.get("WORLD_SIZE", "1")),
        address=environ.get("MASTER_ADDR", ""),
        port=int(environ.get("MASTER_PORT", "0")),
        device=torch.device("cpu"),
        timeout=timedelta(seconds=timeout),
    )


def aggregate(updates: Sequence[Update], group: Group | None = None, population: int = 0) -> Aggregate:
    """The weighted sum of this rank's updates, and of those of the other ranks; each rank needs at least one."""
    aggregator, ctx = WeightedMean(), RoundContext(round=0, cohort=[], population=population)
    acc = aggregator.init(updates[0], torch.device("cpu"))
    for update in updates:
        acc = aggregator.add(acc, update, ctx)
    acc, _ = aggregator.merge(acc, group or LocalGroup(), Message(), ctx)
    return aggregator.result(acc, ctx)


@dataclass
class Simulation:
    """A federation of clients that each know their gradient, without Lightning, modules or optimizers.

    Args:
        algorithm: The mathematics.
        gradients: For each client its gradient as a function of the parameters.
        params: The parameters before the first round.
        num_steps: Local steps, one number for all clients or one each.
        lr: Learning rate of the local steps, one for all clients or one each.
        weights: Each client's weight under "examples"; under "uniform" all weigh alike.
    """

    algorithm: Algorithm
    gradients: Sequence[Callable[[Tree], Tree]]
    params: Tree
    num_steps: int | Sequence[int] = 1
    lr: float | Sequence[float] = 0.1
    weights: Sequence[float] = ()
    clients: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server: Mapping = self.algorithm.server_init(self.params, len(self.gradients))

    @property
    def x(self) -> float:
        """The global model of a federation whose only parameter is one number ``x``."""
        return float(self.server["params"]["x"])

    def rounds(self, num_rounds: int) -> float:
        """Runs rounds with all clients, and tells where they have taken the only parameter."""
        for _ in range(num_rounds):
            self.round()
        return self.x

    def round(self, cohort: Sequence[int] | None = None) -> None:
        """Runs one round with the clients of ``cohort``, or all."""
        updates = [self._train(client) for client in (range(len(self.gradients)) if cohort is None else cohort)]
        self.server = self.algorithm.server_update(self.server, aggregate(updates, population=len(self.gradients)))

    def _train(self, client: int) -> Update:
        state = self.clients.get(client)
        probe = self.gradients[client](self.server["params"]) if self.algorithm.probe == "grad" else None
        ctx = self.algorithm.client_init(self.server, state, probe)
        params = ctx["params"]
        num_steps = self.num_steps if isinstance(self.num_steps, int) else self.num_steps[client]
        lr = self.lr if isinstance(self.lr, float) else self.lr[client]
        for _ in range(num_steps):
            grads = self.algorithm.grad_transform(self.gradients[client](params), params, ctx)
            params = tree_map(lambda param, grad: param - lr * grad, params, grads)
        weight = self.weights[client] if self.weights and self.algorithm.weighting == "examples" else 1.0
        lr_sum = dict.fromkeys(params, num_steps * lr)
        run = LocalRun(num_steps, 1, weight, 0.0, lr_sum, normalizer=float(num_steps))
        update, state = self.algorithm.client_finish(params, ctx, state, run)
        if state is not None:
            self.clients[client] = state
        return Update(update.delta, update.buffers, weight, update.aux)


def quadratics(centers: Sequence[float], steepness: Sequence[float]) -> list[Callable[[Tree], Tree]]:
    """The gradients of ``h / 2 (x - e)^2`` for each center e and steepness h."""
    return [lambda params, e=e, h=h: {"x": h * (params["x"] - e)} for e, h in zip(centers, steepness, strict=True)]
