"""Which clients take part in a round and how much each trains: the settings, and the random draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lightning_fl.clients.cohorts import ClientsPerRound, Cohort, Uniform, describe_sampling
from lightning_fl.clients.draw_test import check_draws
from lightning_fl.clients.local_work import LocalWork
from lightning_fl.clients.population import Population
from lightning_fl.clients.uneven_work import Amount, Stragglers
from lightning_fl.communication import Group, Message
from lightning_fl.seeding import SystemRandomness, derive_seed, round_rng
from lightning_fl.types import ClientId


@dataclass(frozen=True)
class Participation:
    """The settings that decide which clients take part in a round and how much each client trains.

    Args:
        cohort: Draws the clients of a round.
        clients_per_round: Number of clients: a count, a share, or None for the cohort's own default.
        local_epochs: Passes of each client over its data.
        local_steps: Optimizer steps of each client instead of passes.
        stragglers: Which clients do not finish their work.
        secure: Whether cohorts are drawn from the operating system's randomness, even if ``cohort.secure`` is not set.
    """

    cohort: Cohort = field(default_factory=Uniform)
    clients_per_round: ClientsPerRound = None
    local_epochs: int | Amount | None = None
    local_steps: int | Amount | None = None
    stragglers: Stragglers | None = None
    secure: bool = False

    def max_work(self, limit: int | float = 1.0) -> LocalWork:
        """The largest amount of work that a client can do in a round."""
        amounts = (self.local_epochs, self.local_steps)
        epochs, steps = (amount.max_work if isinstance(amount, Amount) else amount for amount in amounts)
        return LocalWork(epochs or 1, steps, limit=limit)

    @property
    def is_even(self) -> bool:
        """Whether all clients do the same amount of work."""
        amounts = (self.local_epochs, self.local_steps)
        return self.stragglers is None and not any(isinstance(amount, Amount) for amount in amounts)


class ParticipationSampler:
    """Draws each round's cohort and local work, identically on all ranks.

    The draws are a function of (seed, round). A secure cohort is not: rank 0 draws it from the operating system's
    randomness and broadcasts it. It is drawn once per round, and again when a run resumes from a checkpoint.

    Args:
        participation: The settings.
        population: All clients.
        seed: Seed of the federation.
        group: The ranks of the federation.

    Raises:
        ValueError: If the settings do not fit the clients.
    """

    def __init__(self, participation: Participation, population: Population, seed: int, group: Group) -> None:
        self.participation = participation
        self.population = population
        self.seed = seed
        self.group = group
        self.sampling = describe_sampling(participation.cohort, len(population), participation.clients_per_round)
        self._prepared: Any = participation.cohort.prepare(population, self.sampling)
        # Privacy accounting uses what the cohort declares, so the declaration of a user's own cohort is tested.
        if self.is_secure:
            check_draws(participation.cohort, self.sampling, self._prepared)
        self._secure_cohort: tuple[int, list[int]] | None = None
        for amount in (participation.local_epochs, participation.local_steps):
            if isinstance(amount, Amount):
                amount.check(population)

    @property
    def is_secure(self) -> bool:
        """Whether cohorts come from the operating system's randomness."""
        # If all clients take part nothing is drawn, and no collective is needed.
        is_random = self.sampling.kind != "full"
        return is_random and (self.participation.secure or self.participation.cohort.secure)

    def cohort(self, round: int) -> list[ClientId]:
        """The clients of a round, in the order of all clients; a collective call on all ranks if :attr:`is_secure`."""
        positions = self._secure_positions(round) if self.is_secure else self._positions(round)
        return [self.population.ids[position] for position in positions]

    def works(self, round: int, cohort: list[ClientId], max_work: LocalWork) -> Mapping[ClientId, LocalWork]:
        """How much each client of a cohort trains; dropped stragglers are missing from the result.

        Args:
            round: Number of the round.
            cohort: The clients of the round.
            max_work: The largest amount of work that a client can do.
        """
        settings, works = self.participation, dict.fromkeys(cohort, max_work)
        for name, amount in (("epochs", settings.local_epochs), ("steps", settings.local_steps)):
            if isinstance(amount, Amount):
                drawn = self._each(cohort, round, "local work", amount.draw)
                works = {client: replace(max_work, **{name: n}) for client, n in zip(cohort, drawn, strict=True)}
        if settings.stragglers is not None:
            stragglers = settings.stragglers
            # A random stream of its own: stragglers are the same whether or not the amounts of work are drawn.
            parts = self._each(
                cohort, round, "stragglers", lambda clients, rng: stragglers.draw(len(clients), rng).tolist()
            )
            works = {c: replace(works[c], part=part) for c, part in zip(cohort, parts, strict=True) if part}
        return works

    def _each(
        self,
        cohort: list[ClientId],
        round: int,
        purpose: str,
        draw: Callable[[list[ClientId], np.random.Generator], Sequence[Any]],
    ) -> list[Any]:
        """One value per client, drawn for the whole cohort at once, or per client if participation is secure."""
        # Amplification by sampling assumes that adding one client changes no other client's update. So under secure
        # participation a client's work must not depend on who else takes part.
        if not (self.participation.secure or self.participation.cohort.secure):
            return list(draw(cohort, round_rng(self.seed, round, purpose)))
        seeds = [derive_seed(self.seed, round, purpose, client) for client in cohort]
        return [draw([c], np.random.default_rng(seed))[0] for c, seed in zip(cohort, seeds, strict=True)]

    def _positions(self, round: int, secure: bool = False) -> list[int]:
        rng = SystemRandomness() if secure else round_rng(self.seed, round, "cohort")
        drawn = np.unique(self.participation.cohort.draw(self.sampling, round, rng, self._prepared), return_counts=True)
        positions, counts = drawn[0].tolist(), drawn[1]  # sorted, whatever the order of a user's cohort
        if positions and (counts.max() > 1 or positions[0] < 0 or positions[-1] >= len(self.population)):
            raise ValueError(
                f"{self.participation.cohort!r} drew a client twice or one that does not exist in round {round}; "
                f"expected different integers below {len(self.population)}."
            )
        return positions

    def _secure_positions(self, round: int) -> list[int]:
        # Drawn once per round: a second call must give the same cohort.
        if self._secure_cohort is None or self._secure_cohort[0] != round:
            # The operating system's randomness can't be repeated on another rank, so one rank draws and broadcasts.
            drawn = self._positions(round, secure=True) if self.group.rank == 0 else []
            message = Message(tensors={"cohort": torch.tensor(drawn, dtype=torch.int64)})
            self._secure_cohort = round, self.group.broadcast_message(message).tensors["cohort"].tolist()
        return self._secure_cohort[1]
