"""Cohorts: which clients take part in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from zlib import crc32

import numpy as np

from lightning_fl.clients.population import Population
from lightning_fl.seeding import Randomness

ClientsPerRound = int | float | None


def cohort_size(clients_per_round: ClientsPerRound, population: int) -> int:
    """Number of clients in a round.

    Args:
        clients_per_round: A count (int), a share in (0, 1] (float), or None for all. A share is rounded to the nearest
            count, a half to the even one as Python's ``round`` does, and to at least 1: 0.5 of 5 clients are 2.
        population: Number of clients in the federation.

    Raises:
        ValueError: If the count or the share is out of range.
    """
    if clients_per_round is None:
        return population
    # A bool is an int to Python, and True would pass as one client.
    if isinstance(clients_per_round, bool) or not isinstance(clients_per_round, int | float):
        raise ValueError(
            f"clients_per_round={clients_per_round!r} is neither a count (int), a share (float) nor None (all)."
        )
    # The type decides, not the value: 1.0 is all clients, and 1 is one.
    if isinstance(clients_per_round, float):
        if not 0.0 < clients_per_round <= 1.0:
            raise ValueError(
                f"clients_per_round={clients_per_round} as a float is a share and must lie in (0, 1]; write an int for "
                "a count."
            )
        return max(1, round(clients_per_round * population))
    if clients_per_round < 1:
        raise ValueError(f"clients_per_round={clients_per_round} must be at least 1.")
    if clients_per_round > population:
        raise ValueError(
            f"clients_per_round={clients_per_round} is more than the federation's {population} clients. Lower it, or "
            "give a share such as 0.1."
        )
    return clients_per_round


@dataclass(frozen=True)
class CohortSampling:
    """Describes how a federation draws its cohorts; returned by :meth:`Cohort.sampling`.

    Not to be confused with :class:`lightning_fl.privacy.Sampling`, which describes draws for privacy accounting.

    Args:
        kind: ``"full"``: all clients in each round; ``"fixed"``: a fixed number, uniformly without replacement;
            ``"poisson"``: each client independently with probability ``rate``; ``"other"``: anything else.
        num_clients: Number of clients in the federation.
        size: Number of clients in a round; the expected number for ``"poisson"``.
        rate: Share of the federation's clients in a round; for ``"poisson"`` and ``"fixed"`` each client's probability.
        separation: Minimum number of rounds from one participation of a client to its next. 1: it may take part in
            consecutive rounds.
    """

    kind: Literal["full", "fixed", "poisson", "other"]
    num_clients: int
    size: float
    rate: float
    separation: int = 1


Sampling = CohortSampling
"""The public name in ``fl.clients``."""


class Cohort(ABC):
    """Draws the clients of each round, as a pure function of the round and the random generator it gets.

    For a cohort of your own, derive a frozen dataclass and override :meth:`draw`. The number of clients is the
    strategy's ``clients_per_round``.
    """

    secure: bool = False
    """Whether to draw from the operating system's randomness; such cohorts cannot be reproduced."""

    def check(self, clients_per_round: ClientsPerRound) -> None:
        """Checks that the strategy's ``clients_per_round`` fits this cohort.

        Raises:
            ValueError: If it is missing, or would be ignored.
        """
        if clients_per_round is None:
            raise ValueError(f"cohort={self!r} needs clients_per_round: a count such as 10, or a share such as 0.1.")

    def sampling(self, num_clients: int, clients_per_round: ClientsPerRound) -> CohortSampling:
        """Describes the cohorts of a federation with ``num_clients`` clients.

        Raises:
            ValueError: If ``clients_per_round`` does not fit the number of clients.
        """
        size = cohort_size(clients_per_round, num_clients)
        return CohortSampling("full" if size == num_clients else "other", num_clients, size, size / num_clients)

    def prepare(self, population: Population, sampling: CohortSampling) -> Any:
        """Computes once what :meth:`draw` needs about the clients, such as their probabilities.

        Raises:
            ValueError: If this cohort cannot be drawn from these clients.
        """
        return None

    @abstractmethod
    def draw(self, sampling: CohortSampling, round: int, rng: Randomness, prepared: Any) -> np.ndarray:
        """The positions of the round's clients in the order of all clients.

        Args:
            sampling: The number of clients and the size of the cohort.
            round: Number of the round, from 0.
            rng: The only source of randomness: seeded by (seed, round), or the operating system's.
            prepared: What :meth:`prepare` returned.

        Returns:
            Different integers in ``[0, num_clients)``, in any order: int64, shape ``[cohort_size]``.
        """


def describe_sampling(cohort: Cohort, num_clients: int, clients_per_round: ClientsPerRound) -> CohortSampling:
    """A cohort's own description of its sampling if it can be trusted; otherwise kind ``"other"``.

    A subclass that overrides ``draw`` but inherits ``sampling`` would declare its parent's distribution. Privacy
    accounting based on that would be wrong, so the declaration is ignored. A class that overrides both is tested by
    :func:`~lightning_fl.clients.draw_test.check_draws` before privacy accounting relies on it.

    Raises:
        ValueError: If ``clients_per_round`` does not fit the number of clients.
    """
    sampling = cohort.sampling(num_clients, clients_per_round)
    most_derived = next(cls for cls in type(cohort).__mro__ if not {"draw", "sampling"}.isdisjoint(vars(cls)))
    if "sampling" in vars(most_derived) or sampling.kind == "full":
        return sampling
    return replace(sampling, kind="other", separation=1)


@dataclass(frozen=True)
class Uniform(Cohort):
    """``clients_per_round`` clients, each subset equally likely; the default.

    Args:
        secure: Whether to draw from the operating system's randomness, as differential privacy requires. Default
            False: from (seed, round). A transform that needs secure cohorts turns this on itself. Such cohorts cannot
            be reproduced.
    """

    secure: bool = False

    def check(self, clients_per_round: ClientsPerRound) -> None:
        """See :meth:`Cohort.check`; None stands for all clients."""
        if self.secure and clients_per_round is None:
            raise ValueError("cohort=Uniform(secure=True) has no effect if all clients take part. Leave it out.")

    def sampling(self, num_clients: int, clients_per_round: ClientsPerRound) -> CohortSampling:
        """See :meth:`Cohort.sampling`."""
        size = cohort_size(clients_per_round, num_clients)
        return CohortSampling("full" if size == num_clients else "fixed", num_clients, size, size / num_clients)

    def draw(self, sampling: CohortSampling, round: int, rng: Randomness, prepared: Any) -> np.ndarray:
        """See :meth:`Cohort.draw`."""
        if sampling.kind == "full":
            return np.arange(sampling.num_clients)
        # Not shuffled, because the caller sorts the positions anyway.
        return rng.choice(sampling.num_clients, int(sampling.size), replace=False, shuffle=False)


@dataclass(frozen=True)
class Poisson(Cohort):
    r"""Each client takes part independently with probability ``rate``: the sampling that differential privacy assumes.

    The number of clients in a round is :math:`\mathrm{Binomial}(n, q)`, with mean :math:`nq` and variance
    :math:`nq(1-q)`. A round without clients does not change the model, unless a transform adds noise to it.

    Args:
        rate: The probability :math:`q`, in (0, 1].
        secure: Whether to draw from the operating system's randomness. Default False: from (seed, round). A transform
            that needs secure cohorts turns this on itself. Such cohorts cannot be reproduced.

    Raises:
        ValueError: If ``rate`` is out of range.
    """

    rate: float
    secure: bool = False

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if not 0 < self.rate <= 1:
            raise ValueError(f"Poisson got rate={self.rate}; expected a probability in (0, 1].")

    def check(self, clients_per_round: ClientsPerRound) -> None:
        """See :meth:`Cohort.check`; the rate alone decides how many clients take part."""
        if clients_per_round is not None:
            raise ValueError(
                f"cohort={self!r} draws a random number of clients, so clients_per_round={clients_per_round} would be "
                "ignored. Leave it out; the share of clients in a round is `rate`."
            )

    def sampling(self, num_clients: int, clients_per_round: ClientsPerRound) -> CohortSampling:
        """See :meth:`Cohort.sampling`."""
        return CohortSampling("full" if self.rate == 1 else "poisson", num_clients, self.rate * num_clients, self.rate)

    def draw(self, sampling: Sampling, round: int, rng: Randomness, prepared: Any) -> np.ndarray:
        """See :meth:`Cohort.draw`."""
        if self.rate == 1:
            return np.arange(sampling.num_clients)
        # The gaps between the drawn clients are geometric. Drawing gaps instead of one coin per client takes time
        # proportional to the cohort, not to the population. One chunk almost always suffices.
        chunk = int(sampling.size + 5 * sampling.size**0.5) + 1
        drawn, last = [], -1.0
        while last < sampling.num_clients:
            # `random` is below 1, so the logarithm is finite.
            gaps = np.floor(np.log1p(-rng.random(chunk)) / np.log1p(-self.rate)) + 1
            drawn.append(last + np.cumsum(gaps))
            last = drawn[-1][-1]
        positions = np.concatenate(drawn)
        return positions[positions < sampling.num_clients].astype(np.int64)


@dataclass(frozen=True)
class RoundRobin(Cohort):
    """Clients take turns in the order of their ids, ``clients_per_round`` at a time.

    All ``n`` clients have taken part after ``ceil(n / clients_per_round)`` rounds, and none returns before ``floor(n /
    clients_per_round)``. Nothing is random.

    Args:
        reverse: Whether to start with the last client. Default False.
    """

    reverse: bool = False

    def sampling(self, num_clients: int, clients_per_round: ClientsPerRound) -> CohortSampling:
        """See :meth:`Cohort.sampling`."""
        sampling = super().sampling(num_clients, clients_per_round)
        return replace(sampling, separation=num_clients // int(sampling.size))

    def draw(self, sampling: CohortSampling, round: int, rng: Randomness, prepared: Any) -> np.ndarray:
        """See :meth:`Cohort.draw`."""
        places = (round * int(sampling.size) + np.arange(int(sampling.size))) % sampling.num_clients
        return sampling.num_clients - 1 - places if self.reverse else places


def describe(values: Any) -> str:
    """A mapping in full if it is short, otherwise its length and a checksum.

    Ranks compare the ``repr`` of their settings; a mapping of a million clients must not make it a long message.
    """
    if not isinstance(values, Mapping) or len(values) <= 20:
        return repr(values)
    # A sum, because mappings that differ in order only are equal. Not `hash`, which differs between processes for
    # strings.
    checksum = sum(crc32(repr(item).encode()) for item in values.items())
    return f"<{len(values)} clients, checksum {checksum:x}>"
