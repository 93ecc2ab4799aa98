"""How long clients take to train, on a simulated clock."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_fl.clients.cohorts import describe
from lightning_fl.clients.population import Population
from lightning_fl.seeding import derive_seed
from lightning_fl.types import ClientId

NANOSECONDS = 1_000_000_000
"""The clock counts whole nanoseconds, so that simultaneous arrivals are exactly equal."""


class Durations(ABC):
    """The seconds from a client's receiving the model to its returning the update, for its full local work."""

    is_measured: bool = False
    """Whether the seconds of clients that have trained are measured, and given to :meth:`seconds`."""

    def check(self, population: Population) -> None:
        """Checks that the durations fit the clients.

        Raises:
            ValueError: If they do not.
        """
        return

    @abstractmethod
    def seconds(self, client: ClientId, number: int, seed: int, measured: Mapping[ClientId, float]) -> float:
        """The seconds of one visit of a client, positive; a pure function, the same on all ranks.

        Args:
            client: The client.
            number: Number of earlier visits of all clients.
            seed: Seed of the federation.
            measured: The measured seconds of clients; empty unless :attr:`is_measured`.
        """

    def nanoseconds(self, client: ClientId, number: int, seed: int, measured: Mapping[ClientId, float]) -> int:
        """:meth:`seconds` in whole nanoseconds, at least 1.

        Raises:
            ValueError: If they are not a positive number.
        """
        seconds = self.seconds(client, number, seed, measured)
        if not 0 < seconds < math.inf:
            raise ValueError(f"{self!r} gives client {client!r} a duration of {seconds} s; expected a positive number.")
        return max(1, round(seconds * NANOSECONDS))


@dataclass(frozen=True)
class FixedDurations(Durations):
    """The same duration in every visit; ``durations={client: seconds}`` is short for it.

    Args:
        durations: The seconds by client.

    Raises:
        ValueError: If a duration is not a positive number; when training starts, if a client is missing or unknown.
    """

    durations: Mapping[int | str, float]

    def __post_init__(self) -> None:
        wrong = {client: s for client, s in self.durations.items() if not _is_positive(s)}
        if wrong or not self.durations:
            raise ValueError(f"durations={describe(self.durations)} must hold positive seconds by client.")

    def __repr__(self) -> str:
        return f"FixedDurations({describe(self.durations)})"

    def check(self, population: Population) -> None:
        """See :meth:`Durations.check`."""
        unknown = next((client for client in self.durations if client not in population), None)
        missing = next((client for client in population.ids if client not in self.durations), None)
        if unknown is not None:
            raise ValueError(f"durations names client {unknown!r}, which is not in the federation.")
        if missing is not None:
            raise ValueError(f"durations does not name client {missing!r}. Give the seconds of each client.")

    def seconds(self, client: ClientId, number: int, seed: int, measured: Mapping[ClientId, float]) -> float:
        """See :meth:`Durations.seconds`."""
        return self.durations[client]


@dataclass(frozen=True)
class Lognormal(Durations):
    r"""Log-normal durations: a few slow clients among many fast ones, with standard normal :math:`z`.

    .. math::
        d_{i,v} = m \, \exp(\sigma z_i + \sigma_v z_{i,v})

    At :math:`\sigma = 1` one client in 100 takes 10 times the median.

    Args:
        median: The median :math:`m` in seconds. Default 1.
        sigma: Standard deviation :math:`\sigma` of the logarithm between clients, constant over visits. Default 1.
        visit_sigma: Standard deviation :math:`\sigma_v` of the logarithm between the visits of a client. Default 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import lightning_fl as fl
        >>> strategy = fl.FederatedStrategy(
        ...     num_clients=100, schedule=fl.schedules.Buffered(10, 30), durations=fl.clients.Lognormal(median=20)
        ... )
    """

    median: float = 1.0
    sigma: float = 1.0
    visit_sigma: float = 0.0

    def __post_init__(self) -> None:
        if not (_is_positive(self.median) and self.sigma >= 0 and self.visit_sigma >= 0):
            raise ValueError(f"{self!r} needs a positive median, and spreads of at least 0.")

    def seconds(self, client: ClientId, number: int, seed: int, measured: Mapping[ClientId, float]) -> float:
        """See :meth:`Durations.seconds`."""
        exponent = self.sigma * _normal(seed, "speed", client)
        if self.visit_sigma:
            exponent += self.visit_sigma * _normal(seed, "duration", client, number)
        return self.median * math.exp(exponent)


@dataclass(frozen=True)
class Measured(Durations):
    """The seconds that a client's last training took on this machine; ``durations="measured"``.

    A client that has not trained yet takes the mean of those that have, or ``first`` seconds. Such a run is not
    reproducible.

    Args:
        first: Seconds of a client before any has trained. Default 1.
    """

    first: float = 1.0
    is_measured = True

    def seconds(self, client: ClientId, number: int, seed: int, measured: Mapping[ClientId, float]) -> float:
        """See :meth:`Durations.seconds`."""
        mean = math.fsum(measured.values()) / len(measured) if measured else self.first
        return measured.get(client, mean)


def as_durations(durations: "Durations | Mapping[int | str, float] | str | None") -> Durations | None:
    """Converts the user's setting to durations.

    Raises:
        ValueError: If the setting is not valid.
    """
    if isinstance(durations, Mapping):
        return FixedDurations(durations)
    if durations == "measured":
        return Measured()
    if durations is not None and not isinstance(durations, Durations):
        raise ValueError(
            f"durations={durations!r} is not known; expected seconds by client such as {{0: 1.5, 1: 20}}, a "
            'distribution such as fl.clients.Lognormal(median=20), or "measured".'
        )
    return durations


def _normal(*parts: int | str) -> float:
    return float(np.random.default_rng(derive_seed(*parts)).standard_normal())


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
