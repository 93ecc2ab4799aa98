"""Uneven work: different amounts of local training, and stragglers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_fl.clients.cohorts import describe
from lightning_fl.clients.population import Population
from lightning_fl.types import ClientId


class Amount(ABC):
    """Local epochs or local steps that differ between clients; accepted wherever the strategy accepts a number."""

    @property
    @abstractmethod
    def max_work(self) -> int:
        """The largest amount that a client can get; learning-rate schedules are built for it."""

    def check(self, population: Population) -> None:
        """Checks that the amounts fit the clients.

        Raises:
            ValueError: If they do not.
        """
        return

    @abstractmethod
    def draw(self, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[int]:
        """The amount of each client in one round, from 1 to :attr:`max_work`.

        Args:
            clients: The clients of the round; if participation is secure, one client per call.
            rng: The only source of randomness.
        """


@dataclass(frozen=True)
class Between(Amount):
    """A uniformly random whole number from ``low`` to ``high``, drawn for each client and round.

    Args:
        low: The smallest amount, at least 1.
        high: The largest amount.

    Raises:
        ValueError: Unless ``low`` and ``high`` are whole numbers with ``1 <= low <= high``.

    Example:
        >>> import lightning_fl as fl
        >>> strategy = fl.FederatedStrategy("fednova", local_epochs=fl.clients.Between(2, 5))
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if not (_is_count(self.low) and _is_count(self.high) and self.low <= self.high):
            raise ValueError(f"{self!r} must hold whole numbers with 1 <= low <= high.")

    @property
    def max_work(self) -> int:
        """See :attr:`Amount.max_work`."""
        return self.high

    def draw(self, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[int]:
        """See :meth:`Amount.draw`."""
        return rng.integers(self.low, self.high, size=len(clients), endpoint=True).tolist()


@dataclass(frozen=True)
class PerClient(Amount):
    """A fixed amount per client, the same in all rounds: fast and slow devices.

    Args:
        amounts: The amounts by client.
        default: The amount of clients that are not named. None: every client must be named.

    Raises:
        ValueError: If an amount is not a whole number of at least 1; when training starts, if a client is unknown or
            missing.
    """

    amounts: Mapping[int | str, int]
    default: int | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if not isinstance(self.amounts, Mapping):
            raise ValueError(f"PerClient got amounts={self.amounts!r}; expected a mapping by client.")
        wrong = {client: amount for client, amount in self.amounts.items() if not _is_count(amount)}
        if wrong or not (self.default is None or _is_count(self.default)):
            raise ValueError(f"{self!r} must hold whole numbers, at least 1; found {describe(wrong)}.")

    def __repr__(self) -> str:
        return f"PerClient({describe(self.amounts)}, default={self.default})"

    @property
    def max_work(self) -> int:
        """See :attr:`Amount.max_work`."""
        return max([*self.amounts.values(), self.default or 1])

    def check(self, population: Population) -> None:
        """See :meth:`Amount.check`."""
        unknown = [client for client in self.amounts if client not in population]
        if unknown:
            raise ValueError(f"{self!r} names client {unknown[0]!r}, which is not in the federation.")
        if self.default is None and len(self.amounts) < len(population):
            missing = next(client for client in population.ids if client not in self.amounts)
            raise ValueError(f"{self!r} does not name client {missing!r}. Name each client, or give a default.")

    def draw(self, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[int]:
        """See :meth:`Amount.draw`."""
        # The 1 is never used: without a default, `check` has refused clients that are not named.
        return [self.amounts.get(client, self.default or 1) for client in clients]


@dataclass(frozen=True)
class Stragglers:
    """In each round a share of the cohort does not finish its local training.

    With policy ``"partial"`` a straggler contributes an update after a uniformly random number of optimizer steps, from
    1 to all of its work (whole passes, if its loader has no length). With policy ``"drop"`` it is left out of the
    round. Stragglers depend only on (seed, round), so runs of different algorithms have the same ones. Under secure
    participation, which differential privacy needs, each client straggles independently with probability ``share``.

    FedProx's experiments compare ``Stragglers(0.9)`` for FedProx with ``Stragglers(0.9, policy="drop")`` for FedAvg, at
    20 local epochs; the authors draw whole epochs.

    Args:
        share: Share of the cohort, in [0, 1]. If it is not a whole number of clients, it is rounded up or down at
            random without bias.
        policy: ``"partial"`` or ``"drop"``. Default ``"partial"``.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020.
    """

    share: float
    policy: Literal["partial", "drop"] = "partial"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"Stragglers got share={self.share}; expected a share of the cohort in [0, 1].")
        if self.policy not in ("partial", "drop"):
            raise ValueError(f"Stragglers got policy={self.policy!r}; expected 'partial' or 'drop'.")
        if self.share == 1 and self.policy == "drop":
            raise ValueError("Stragglers(1.0, policy='drop') leaves no client to train. Lower the share.")

    def draw(self, num_clients: int, rng: np.random.Generator) -> np.ndarray:
        """The share of the local work that each client of a round finishes.

        Args:
            num_clients: Clients in the cohort.
            rng: The only source of randomness.

        Returns:
            Numbers in (0, 1], 0 for a client that is dropped: shape ``[num_clients]``.
        """
        parts = np.ones(num_clients)
        # Rounded at random once for the cohort: one coin per client would have the same mean but a larger variance.
        num_late = int(self.share * num_clients + rng.random())
        late = rng.permutation(num_clients)[:num_late]
        # random() is in [0, 1), so 1 - random() is never 0, which would stand for a dropped client.
        parts[late] = 1 - rng.random(len(late)) if self.policy == "partial" else 0.0
        return parts


def _is_count(value: object) -> bool:
    # To Python, True is an int.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
