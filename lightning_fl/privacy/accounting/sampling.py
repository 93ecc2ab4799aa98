"""Descriptions of how contributors are sampled, for privacy accounting. They draw nothing themselves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

FALSE_ALARM_PROBABILITY = 1e-12
"""Probability with which a correct sampler is reported as broken."""

Participation = Literal["visible", "hidden"]


class Sampling(ABC):
    """Describes, for a ledger, how the contributors to a release were drawn.

    Not to be confused with :class:`lightning_fl.clients.CohortSampling`, which describes the cohorts of a federation.

    Sampling amplifies privacy only if nobody can predict the draw, so use the other classes only for draws from the
    operating system's randomness. A draw from a known seed, or an unknown one, is :class:`Full`: no amplification.
    """

    @abstractmethod
    def expected(self, population: int) -> float:
        """Returns the expected number of contributors, by which a sum is divided."""

    def check(self, drawn: int, population: int) -> str | None:
        """Returns evidence that more were drawn than the description allows; None if there is none.

        Args:
            drawn: Contributors drawn so far, summed over all releases.
            population: Candidates, summed over all releases.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Returns the description as plain data."""
        return {"kind": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Full(Sampling):
    """Everybody contributes, or it is unknown who does: no amplification."""

    def expected(self, population: int) -> float:
        return float(population)


@dataclass(frozen=True)
class Distributed(Full):
    """Everybody contributes, each with a share of integer noise.

    The Rényi divergences are at most those of a Gaussian with the recorded noise multiplier. With a ``slack``, the
    probabilities are also close to those of post-processing a release with such Gaussian noise; without one, a ledger
    uses ``"rdp"``, whatever method is requested.

    Args:
        noise: The kind of noise. For ``"skellam"`` the bound holds for integer orders only.
        slack: Maximum difference of the logarithms of these probabilities. None: unknown.
    """

    noise: Literal["discrete_gaussian", "skellam"] = "discrete_gaussian"
    slack: float | None = None


@dataclass(frozen=True)
class Poisson(Sampling):
    """Each candidate contributes with probability ``rate``, independently of the others.

    This class describes a draw for a ledger; :class:`lightning_fl.clients.Poisson` draws cohorts that way.

    Args:
        rate: The probability, in (0, 1].

    Raises:
        ValueError: If the rate is out of range.
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"Poisson got rate={self.rate}; expected a probability in (0, 1], such as 256 / 60000.")

    def expected(self, population: int) -> float:
        return self.rate * population

    def check(self, drawn: int, population: int) -> str | None:
        # Chernoff: a binomial count lies this far above its mean with at most probability exp(-n KL).
        share = drawn / population
        if share <= self.rate or population * _divergence(share, self.rate) <= -math.log(FALSE_ALARM_PROBABILITY):
            return None
        return f"{drawn} of {population} were drawn, which Poisson sampling at rate {self.rate:g} does not give"


@dataclass(frozen=True)
class FixedSize(Sampling):
    """``cohort`` of ``population`` candidates are drawn uniformly, without replacement.

    Args:
        cohort: Number of contributors drawn.
        population: Number of candidates.

    Raises:
        ValueError: If ``cohort`` is not between 1 and ``population``.
    """

    cohort: int
    population: int

    def __post_init__(self) -> None:
        if not 1 <= self.cohort <= self.population:
            raise ValueError(f"FixedSize got cohort={self.cohort} of population={self.population}; expected 1 to all.")

    def expected(self, population: int) -> float:
        return float(self.cohort)

    def check(self, drawn: int, population: int) -> str | None:
        if drawn * self.population <= self.cohort * population:
            return None
        return f"{drawn} of {population} were drawn, expected {self.cohort} of {self.population}"


@dataclass(frozen=True)
class LocalSteps(Sampling):
    r"""A round of local training under example-level privacy: clients are drawn once, then each draws its batches.

    All steps of a round share the draw of their client, so they are composed first, and the sampling of clients is
    applied to the result. A rate of :math:`q_\text{client} q_\text{batch}` for every step would overstate privacy.

    Args:
        clients: How the clients of a round are drawn.
        batches: How a client draws the batch of a step.
        num_steps: Steps of a client in a round.
        participation: ``"visible"``: the adversary may know in which rounds a client took part. This holds in general,
            because the client's other examples can reveal it. ``"hidden"``: nobody can know, which requires clients
            that hold nothing but the protected example.

    Raises:
        ValueError: If ``num_steps`` is not positive, or one of the draws is itself a :class:`LocalSteps`.
    """

    clients: Sampling
    batches: Sampling
    num_steps: int
    participation: Participation = "visible"

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"LocalSteps got num_steps={self.num_steps}; expected at least 1.")
        if isinstance(self.clients, LocalSteps) or isinstance(self.batches, LocalSteps):
            raise ValueError("LocalSteps takes Poisson, FixedSize or Full for clients and for batches.")
        if self.participation not in ("visible", "hidden"):
            raise ValueError(f"participation={self.participation!r} is not known; expected 'visible' or 'hidden'.")

    def expected(self, population: int) -> float:
        return self.clients.expected(population)

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "LocalSteps",
            "clients": self.clients.state_dict(),
            "batches": self.batches.state_dict(),
            "num_steps": self.num_steps,
            "participation": self.participation,
        }


KINDS: dict[str, type[Sampling]] = {kind.__name__: kind for kind in (Full, Distributed, Poisson, FixedSize, LocalSteps)}


def load_sampling(state: Mapping[str, Any]) -> Sampling:
    """Restores a description from :meth:`Sampling.state_dict`.

    Raises:
        ValueError: If ``state`` is not one.
    """
    if not isinstance(state, Mapping) or state.get("kind") not in KINDS:
        raise ValueError(f"{state!r} describes no sampling; expected a kind of {', '.join(KINDS)}.")
    kind, fields = KINDS[state["kind"]], {key: value for key, value in state.items() if key != "kind"}
    fields = {key: load_sampling(value) if isinstance(value, Mapping) else value for key, value in fields.items()}
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"{state!r} describes no sampling: {error}.") from error


def client_rate(sampling: Sampling) -> float:
    """Returns the probability that one candidate is drawn."""
    if isinstance(sampling, Poisson):
        return sampling.rate
    if isinstance(sampling, FixedSize):
        return sampling.cohort / sampling.population
    return 1.0


def _divergence(found: float, expected: float) -> float:
    """Returns the Kullback-Leibler divergence between two Bernoulli distributions."""
    total = 0.0
    for p, q in ((found, expected), (1 - found, 1 - expected)):
        if p > 0:
            total += p * math.log(p / q) if q > 0 else math.inf
    return total
