"""The ledger of releases, and the epsilon it amounts to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_fl.privacy.accounting.bounds import GRID, Entry, Method, Relation, default_relation, epsilon_of
from lightning_fl.privacy.accounting.sampling import Distributed, Full, Sampling, load_sampling


class Epsilon(float):
    """An upper bound on epsilon that carries its conditions; infinite if something was released without noise.

    Attributes:
        delta: The delta at which it holds.
        method: How it was computed.
        relation: How two neighbouring data sets differ.
    """

    delta: float
    method: Method
    relation: Relation

    def __new__(cls, value: float, delta: float, method: Method, relation: Relation) -> Epsilon:
        self = super().__new__(cls, value)
        self.delta, self.method, self.relation = delta, method, relation
        return self

    def __repr__(self) -> str:
        return f"{float(self):.6g} (at most; delta={self.delta:g}, {self.relation}, {self.method})"

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)  # pickled as a plain number, so that a checkpoint loads with weights_only=True


@dataclass(frozen=True)
class Gaussian:
    r"""One release of a noisy sum: :math:`\sum_i x_i + \mathcal{N}(0, z^2 C^2)`, with norms of at most C.

    Args:
        noise_multiplier: The standard deviation of the noise :math:`z`, relative to the largest norm :math:`C` of
            one contribution. This holds for ``"replace_one"`` too, although replacing one contribution moves the sum
            by up to 2C. 0: no noise.
        sampling: How the contributors were drawn. Default: everybody contributes, or it is unknown who does.

    Raises:
        ValueError: If the noise multiplier is negative or not finite, or ``sampling`` is not a :class:`Sampling`.
    """

    noise_multiplier: float
    sampling: Sampling = field(default_factory=Full)

    def __post_init__(self) -> None:
        if not (0 <= self.noise_multiplier < math.inf):
            raise ValueError(f"Gaussian got noise_multiplier={self.noise_multiplier}; expected a finite number >= 0.")
        if not isinstance(self.sampling, Sampling):
            raise ValueError(
                f"Gaussian got sampling={self.sampling!r}; expected fl.privacy.Poisson(rate), FixedSize(cohort, "
                "population), LocalSteps(...) or Full()."
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the event as plain data."""
        return {"noise_multiplier": float(self.noise_multiplier), "sampling": self.sampling.state_dict()}


class Ledger:
    """The record of everything released so far; it only grows.

    Example:
        >>> ledger = Ledger()
        >>> ledger.record(Gaussian(noise_multiplier=2.0), count=4)
        >>> ledger.epsilon(delta=1e-5)
        4.37718 (at most; delta=1e-05, add_or_remove_one, pld)
    """

    def __init__(self) -> None:
        self._counts: dict[Gaussian, int] = {}

    def record(self, event: Gaussian, count: int = 1) -> None:
        """Adds ``count`` releases.

        Raises:
            ValueError: If ``event`` is not a :class:`Gaussian`, or ``count`` is not a whole number of at least 1.
        """
        if not isinstance(event, Gaussian):
            raise ValueError(f"A ledger records fl.privacy.Gaussian(...), found {event!r}.")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count={count!r} must be a whole number, at least 1.")
        self._counts[event] = self._counts.get(event, 0) + count

    def epsilon(
        self, delta: float, method: Method = "pld", relation: Relation | None = None, grid: float = GRID
    ) -> Epsilon:
        """Returns an upper bound on epsilon for everything recorded.

        Args:
            delta: The delta at which to answer, in (0, 1).
            method: ``"pld"``: privacy loss distributions, the tightest; ``"rdp"``: Renyi differential privacy.
            relation: How two neighbouring data sets differ: ``"add_or_remove_one"`` contributor (or one set to
                zero), or ``"replace_one"``. None: the first, unless something was drawn without replacement.
            grid: Discretization interval of the privacy loss for ``"pld"``. A coarser one is faster and gives a larger
                bound.

        Returns:
            A float with the attributes ``delta``, ``method`` and ``relation``.

        Raises:
            ValueError: If an argument is out of range, or ``"add_or_remove_one"`` is asked for of draws of fixed size.
            ImportError: If dp-accounting is not installed.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta={delta} must lie between 0 and 1, well below 1 / number of contributors.")
        if method not in ("pld", "rdp"):
            raise ValueError(f"method={method!r} is not known; expected 'pld' or 'rdp'.")
        if relation not in (None, "add_or_remove_one", "replace_one"):
            raise ValueError(f"relation={relation!r} is not known; expected 'add_or_remove_one' or 'replace_one'.")
        relation = relation or default_relation(self.entries)
        if any(isinstance(sampling, Distributed) for _, sampling, _ in self.entries):
            method = "rdp"
        return Epsilon(epsilon_of(self.entries, float(delta), method, relation, grid), delta, method, relation)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Everything recorded, in an order that does not depend on when it was recorded."""
        # Sorted, so that ledgers of the same releases share the cached epsilon, to the last bit.
        return tuple(
            sorted(((float(event.noise_multiplier), event.sampling, count) for event, count in self), key=repr)
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns everything recorded, as lists, dicts, numbers and strings."""
        return {"events": [[event.state_dict(), count] for event, count in self]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces everything recorded by a :meth:`state_dict`.

        Raises:
            ValueError: If ``state`` is not one; the ledger is then unchanged.
        """
        loaded = Ledger()
        try:
            for event, count in state["events"]:
                loaded.record(Gaussian(event["noise_multiplier"], load_sampling(event["sampling"])), count)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{state!r} is not the state of a ledger.") from error
        self._counts = loaded._counts

    def __add__(self, other: Ledger) -> Ledger:
        """Returns a ledger of everything that both have recorded."""
        total = Ledger()
        for event, count in [*self, *other]:
            total.record(event, count)
        return total

    def __iter__(self) -> Iterator[tuple[Gaussian, int]]:
        return iter(self._counts.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._counts == other._counts

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ledger({', '.join(f'{count} x {event}' for event, count in self)})"
