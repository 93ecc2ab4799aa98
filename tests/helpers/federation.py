"""Federations for tests of the pure rooms: over the ranks of ``run_ranks``, and in a few lines of one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fl.aggregation import RoundContext, WeightedMean
from lightning_fl.algorithms import Algorithm
from lightning_fl.clients import ClientStore, LocalWork
from lightning_fl.communication import Group, LocalGroup, Message, connect
from lightning_fl.engines import OptimizerStates, SequentialEngine, StepFunctions
from lightning_fl.federation import (
    ClientBatches,
    ClientData,
    FederationSettings,
    FederationState,
    GroupFederation,
    GroupOutcome,
    RankReport,
    Round,
    RoundResult,
)
from lightning_fl.types import Aggregate, State, Tree, Update
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


def random_updates(num_clients: int, dtype: torch.dtype = torch.float64) -> list[Update]:
    """Updates with two dtypes, float and integer buffers and a side channel; client ``i`` weighs ``i + 1``."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        Update(
            delta={"a": draw(3, 2), "b": draw(4, dtype=torch.float32), "scalar": draw()},
            buffers={"mean": draw(3), "count": draw(1).mul(10).round().long()},
            weight=float(client + 1),
            aux={"control": {"a": draw(3, 2), "b": draw(4, dtype=torch.float32)}},
        )
        for client in range(num_clients)
    ]


def aggregate(updates: Sequence[Update], group: Group | None = None, population: int = 0) -> Aggregate:
    """The weighted sum of this rank's updates, and of those of the other ranks; each rank needs at least one."""
    aggregator, ctx = WeightedMean(), RoundContext(round=0, cohort=[], population=population)
    acc = aggregator.init(updates[0], torch.device("cpu"))
    for update in updates:
        acc = aggregator.add(acc, update, ctx)
    acc, _ = aggregator.merge(acc, group or LocalGroup(), Message(), ctx)
    return aggregator.result(acc, ctx)


class Gradients(nn.Module):
    """A module whose loss has, for each client, the given gradient; the batch is the client.

    Args:
        gradients: For each client its gradient as a function of the parameters.
        params: The parameters to begin with.
        lr: Each client's learning rate.
    """

    def __init__(self, gradients: Sequence[Callable[[Tree], Tree]], params: Tree, lr: Sequence[float]) -> None:
        super().__init__()
        self.gradients, self.lr = gradients, lr
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        self.optimizer = torch.optim.SGD(self.parameters(), lr=lr[0])

    def gradient(self, client: int) -> Tree:
        return self.gradients[client]({name: param.detach() for name, param in self.named_parameters()})

    def training_step(self, batch: Tensor, offset: int) -> Tensor:
        client = int(batch)
        self.optimizer.param_groups[0]["lr"] = self.lr[client]
        gradient = self.gradient(client)
        return sum(((gradient[name] * param).sum() for name, param in self.named_parameters()), torch.zeros(()))


class Simulation:
    """A federation without Lightning, of clients that each know their gradient; runs the package's own rounds.

    Args:
        algorithm: The mathematics.
        gradients: For each client its gradient as a function of the parameters.
        params: The parameters before the first round.
        num_steps: Local steps, one number for all clients or one each.
        lr: Learning rate of the local steps, one for all clients or one each.
        weights: Each client's weight under "examples"; under "uniform" all weigh alike.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        gradients: Sequence[Callable[[Tree], Tree]],
        params: Tree,
        num_steps: int | Sequence[int] = 1,
        lr: float | Sequence[float] = 0.1,
        weights: Sequence[float] = (),
    ) -> None:
        size = len(gradients)
        self.algorithm = algorithm
        self.gradients = gradients
        self.num_steps = [num_steps] * size if isinstance(num_steps, int) else list(num_steps)
        self.weights = weights or [1.0] * size
        self.module = Gradients(gradients, params, [lr] * size if isinstance(lr, float) else lr)
        functions = StepFunctions(self.module.training_step)
        self.trainer = SequentialEngine(self.module, OptimizerStates([self.module.optimizer]), functions=functions)
        self.settings = FederationSettings(algorithm, WeightedMean(), (), algorithm.weighting, 0, size)
        self.state = FederationState(algorithm.server_init(params, size))
        self.store = ClientStore()
        self.num_rounds = 0

    @property
    def server(self) -> State:
        """The server's state."""
        return self.state.server

    @property
    def clients(self) -> dict[int, State]:
        """What the algorithm keeps of each client."""
        states = {client: self.store.get(client) or {} for client in self.store.clients()}
        return {client: state["algorithm"] for client, state in states.items()}

    @property
    def x(self) -> float:
        """The global model of a federation whose only parameter is one number ``x``."""
        return float(self.server["params"]["x"])

    def rounds(self, num_rounds: int) -> float:
        """Runs rounds with all clients, and tells where they have taken the only parameter."""
        for _ in range(num_rounds):
            self.round()
        return self.x

    def round(self, cohort: Sequence[int] | None = None, group: Group | None = None) -> RoundResult:
        """Runs one round with the clients of ``cohort``, or all, of whom this rank trains its share."""
        cohort, group = range(len(self.weights)) if cohort is None else cohort, group or LocalGroup()
        opened = self.open(cohort, group)
        for client in cohort[group.rank :: group.size]:
            self.train(opened, client)
        result = opened.close(opened.merge(RankReport()))
        self.state = result.state
        self.num_rounds += 1
        return result

    def open(self, cohort: Sequence[int], group: Group | None = None) -> Round:
        """Opens a round, to be trained and closed by the caller."""
        parts = self.settings, self.state, self.trainer, self.store, GroupFederation(group or LocalGroup())
        return Round.open(*parts, self.num_rounds, list(cohort))

    def train(self, opened: Round, client: int) -> GroupOutcome:
        """Trains a client in a round."""
        task = opened.start(self._data(client), probe=lambda kind, batches, params: self._probe(kind, batches))
        for batch, position in task.batches:
            opened.step(task, batch, position)
        return opened.finish(task)

    def _data(self, client: int) -> ClientData:
        work = LocalWork(steps=self.num_steps[client])
        batches = ClientBatches(client, [torch.tensor(client)], [work], self.num_rounds, work)
        return ClientData(batches, self.weights[client])

    def _probe(self, kind: str, batches: Iterator[Any]) -> Any:
        (client,) = batches
        return self.module.gradient(int(client)) if kind == "grad" else None


def quadratics(centers: Sequence[float], steepness: Sequence[float]) -> list[Callable[[Tree], Tree]]:
    """The gradients of ``h / 2 (x - e)^2`` for each center e and steepness h."""
    return [lambda params, e=e, h=h: {"x": h * (params["x"] - e)} for e, h in zip(centers, steepness, strict=True)]
