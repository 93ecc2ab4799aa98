"""The view of a round that callbacks get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_fl.clients import ClientStore, LocalWork, Participation, Population
from lightning_fl.communication import Group
from lightning_fl.engines import LocalTrainer
from lightning_fl.federation import FederationSettings, FederationState, Planner, RankPlan
from lightning_fl.tree import move
from lightning_fl.types import ClientId, State, Tree


class _Driver(Protocol):
    """The parts of the round driver that a view shows."""

    population: Population
    group: Group
    settings: FederationSettings
    participation: Participation
    planner: Planner
    sticky: bool
    store: ClientStore
    state: FederationState
    history: list[dict[str, Any]]
    local_trainer: LocalTrainer | None
    vectorized: Any

    @property
    def cohort(self) -> Sequence[ClientId]:
        """The clients of the round, wherever they train."""

    @property
    def plan(self) -> RankPlan:
        """This rank's plan of the round."""

    @property
    def max_work(self) -> LocalWork:
        """The largest local work of any client."""


class RoundView:
    """The current round, or between rounds the next one, for callbacks.

    The hooks of ``FederatedCallback`` get it as ``view`` if they have a parameter of that name; other hooks find it as
    ``trainer.strategy.view``. Do not modify the objects it returns, unless a method says otherwise.
    """

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver

    # ---- the federation

    @property
    def settings(self) -> FederationSettings:
        """Algorithm, aggregator, transforms, weighting, seed: settings that don't change from round to round."""
        return self._driver.settings

    @property
    def population(self) -> Population:
        """All clients and, where this rank has them, their loaders."""
        return self._driver.population

    @property
    def participation(self) -> Participation:
        """Which clients take part in a round, and the local work of each."""
        return self._driver.participation

    @property
    def group(self) -> Group:
        """The ranks of the federation."""
        return self._driver.group

    @property
    def expected_cohort_size(self) -> float:
        """Number of clients in a round, on average if it is random."""
        return self._driver.planner.sampler.sampling.size

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """One entry for each finished round."""
        return self._driver.history

    @property
    def server_state(self) -> State:
        """The algorithm's server state; empty before the first round."""
        return self._driver.state.server

    # ---- the round

    @property
    def round(self) -> int:
        """Number of the round, from 0."""
        return self._driver.plan.round

    @property
    def cohort(self) -> Sequence[ClientId]:
        """The clients of the round, on all ranks."""
        return self._driver.cohort

    @property
    def clients(self) -> Sequence[ClientId]:
        """The clients of the round that this rank trains."""
        return self._driver.plan.clients

    @property
    def groups(self) -> Sequence[tuple[ClientId, ...]]:
        """The same clients, in the groups that are planned to train together."""
        return self._driver.plan.groups

    @property
    def max_work(self) -> LocalWork:
        """The largest local work of any client in a round."""
        return self._driver.max_work

    def work_of(self, client: ClientId) -> list[LocalWork]:
        """The local work of a client of the cohort, phase by phase; for other clients, the largest of any client."""
        work = self._driver.plan.works.get(client, self._driver.max_work)
        return self._driver.planner.phases(work)

    def phases_of(self, work: LocalWork) -> list[LocalWork]:
        """An amount of local work, phase by phase."""
        return self._driver.planner.phases(work)

    def place(self, clients: Sequence[ClientId], *, sticky: bool | None = None) -> list[list[ClientId]]:
        """Places clients on the ranks; returns the clients of each rank.

        Args:
            clients: The clients.
            sticky: Whether each client is placed on its home rank. None: as in training.
        """
        driver = self._driver
        works = driver.plan.works if sticky is None else None
        return driver.population.place(clients, driver.group.size, driver.sticky if sticky is None else sticky, works)

    @property
    def trains_groups(self) -> bool:
        """Whether clients may train together, so that hooks don't see each of them separately."""
        return self._driver.vectorized is not None

    # ---- the model

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The module's current shared parameters, under their ``state_dict`` names."""
        return self.trainer.tensors.params

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All current parameters and persistent buffers of the module."""
        return self.trainer.tensors.all

    @property
    def trainer(self) -> LocalTrainer:
        """Trains this rank's client groups; its optimizers may be borrowed between rounds."""
        trainer = self._driver.local_trainer
        assert trainer is not None, "the model can be viewed only between the start and the end of training"
        return trainer

    # ---- the clients' states

    def clients_with_state(self) -> list[ClientId]:
        """The clients of this rank that have a state."""
        return self._driver.store.clients()

    def client_state(self, client: ClientId, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The state that a client of this rank keeps between its rounds: ``personal`` tensors, ``algorithm``, ..."""
        return move(self._driver.store.get(client) or {}, device)

    def record_ledger(self, client: ClientId, ledger: Tensor) -> None:
        """Stores a client's privacy ledger immediately, so that it is kept even if the round fails."""
        self._driver.store.record(client, ledger)

    # ---- the history

    def add_facts(self, facts: Mapping[str, float | str]) -> None:
        """Adds facts to the last finished round's entry in ``strategy.history``."""
        self._driver.history[-1].update(facts)


def personal_tensors(view: RoundView, client: ClientId, device: torch.device | str) -> Tree:
    """A client's personal tensors, or its own model; empty if it has none."""
    personal: Tree = view.client_state(client, device).get("personal", {})
    return personal
