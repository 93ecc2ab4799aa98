"""The ledger of releases, and the resulting epsilon."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_fl.privacy.accounting.bounds import (
    GRID,
    Entry,
    Method,
    Relation,
    default_relation,
    epsilon_of,
    usable_method,
)
from lightning_fl.privacy.accounting.sampling import Full, Sampling, load_sampling

Adversary = Literal["model", "server"]
"""The adversary from which noise hides contributors: anyone who sees the models, or also the server."""


class Epsilon(float):
    """An upper bound on epsilon that carries its conditions; infinite if something was released without noise.

    Attributes:
        delta: The delta at which it holds.
        method: The method by which it was computed.
        relation: How two neighbouring data sets differ.
        group: The number of contributors in which they differ.
    """

    delta: float
    method: Method
    relation: Relation
    group: int

    def __new__(cls, value: float, delta: float, method: Method, relation: Relation, group: int = 1) -> Epsilon:
        self = super().__new__(cls, value)
        self.delta, self.method, self.relation, self.group = delta, method, relation, group
        return self

    def __repr__(self) -> str:
        group = f", groups of {self.group}" if self.group > 1 else ""
        return f"{float(self):.6g} (at most; delta={self.delta:g}, {self.relation}, {self.method}{group})"

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)  # pickled as a plain number, so that a checkpoint loads with weights_only=True


@dataclass(frozen=True)
class Gaussian:
    r"""One release of a noisy sum: :math:`\sum_i x_i + \mathcal{N}(0, z^2 C^2)`, with norms of at most C.

    Args:
        noise_multiplier: The standard deviation of the noise :math:`z`, relative to the largest norm :math:`C` of
            one contribution. This holds for ``"replace_one"`` too, although replacing one contribution changes the sum
            by up to 2C. 0: no noise.
        sampling: How the contributors were sampled. Default: everybody contributes, or it is unknown who does.
        adversary: The strongest party from which the noise hides the contributors. ``"server"``: everybody, because the
            noise was added before anyone saw the contribution; ``"model"``: anyone who sees the models, except the
            server, which added the noise.

    Raises:
        ValueError: If the noise multiplier is negative or not finite, or another argument is not known.
    """

    noise_multiplier: float
    sampling: Sampling = field(default_factory=Full)
    adversary: Adversary = field(default="server", compare=False)

    def __post_init__(self) -> None:
        if not (0 <= self.noise_multiplier < math.inf):
            raise ValueError(f"Gaussian got noise_multiplier={self.noise_multiplier}; expected a finite number >= 0.")
        if not isinstance(self.sampling, Sampling):
            raise ValueError(
                f"Gaussian got sampling={self.sampling!r}; expected fl.privacy.Poisson(rate), FixedSize(cohort, "
                "population), LocalSteps(...) or Full()."
            )

        if self.adversary not in ("model", "server"):
            raise ValueError(f"Gaussian got adversary={self.adversary!r}; expected 'model' or 'server'.")

    def state_dict(self) -> dict[str, Any]:
        """Returns the event as plain data."""
        return {
            "noise_multiplier": float(self.noise_multiplier),
            "sampling": self.sampling.state_dict(),
            "adversary": self.adversary,
        }


class Ledger:
    """The record of everything released so far; it only grows.

    Example:
        >>> ledger = Ledger()
        >>> ledger.record(Gaussian(noise_multiplier=2.0), count=4)
        >>> ledger.epsilon(delta=1e-5)
        4.37718 (at most; delta=1e-05, add_or_remove_one, pld)
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[Gaussian, Adversary], int] = {}

    def record(self, event: Gaussian, count: int = 1) -> None:
        """Adds ``count`` releases.

        Raises:
            ValueError: If ``event`` is not a :class:`Gaussian`, or ``count`` is not a whole number of at least 1.
        """
        if not isinstance(event, Gaussian):
            raise ValueError(f"A ledger records fl.privacy.Gaussian(...), found {event!r}.")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count={count!r} must be a whole number of at least 1.")
        key = event, event.adversary
        self._counts[key] = self._counts.get(key, 0) + count

    def epsilon(
        self,
        delta: float,
        method: Method = "pld",
        relation: Relation | None = None,
        grid: float = GRID,
        group: int = 1,
        adversary: Adversary = "model",
    ) -> Epsilon:
        """Returns an upper bound on epsilon for everything recorded.

        Args:
            delta: The delta at which to answer, in (0, 1).
            method: ``"pld"``: privacy loss distributions, the tightest; ``"rdp"``: Renyi differential privacy.
            relation: How two neighbouring data sets differ: ``"add_or_remove_one"`` contributor (or one set to
                zero), or ``"replace_one"``. None: the first, unless something was drawn without replacement.
            grid: Discretization interval of the privacy loss for ``"pld"``. A coarser one is faster and gives a larger
                bound.
            group: The number of contributors in which they differ, such as the number of examples of one person; also
                the number of clients that hold the same example, each with a ledger that costs no more than this one.
            adversary: ``"model"``: anyone who sees the models; ``"server"``: also the server, from which noise that it
                added itself hides nothing.

        Returns:
            A float with the attributes ``delta``, ``method``, ``relation`` and ``group``.

        Raises:
            ValueError: If an argument is out of range, or ``"add_or_remove_one"`` is requested for draws of fixed size.
            ImportError: If dp-accounting is not installed.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta={delta} must lie between 0 and 1, well below 1 / number of contributors.")
        if method not in ("pld", "rdp"):
            raise ValueError(f"method={method!r} is not known; expected 'pld' or 'rdp'.")
        if relation not in (None, "add_or_remove_one", "replace_one"):
            raise ValueError(f"relation={relation!r} is not known; expected 'add_or_remove_one' or 'replace_one'.")
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise ValueError(f"group={group!r} must be a whole number of at least 1 contributor.")
        if adversary not in ("model", "server"):
            raise ValueError(f"adversary={adversary!r} is not known; expected 'model' or 'server'.")
        entries = self._entries(adversary)
        relation = relation or default_relation(entries)
        method = usable_method(entries, method)
        found = epsilon_of(entries, float(delta), method, relation, grid, group)
        return Epsilon(found, delta, method, relation, group)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Everything recorded, in an order that does not depend on when it was recorded."""
        return self._entries("model")

    def _entries(self, adversary: Adversary) -> tuple[Entry, ...]:
        counts: dict[tuple[float, Sampling], int] = {}
        for event, count in self:
            sees_all = adversary == "server" and event.adversary == "model"
            key = 0.0 if sees_all else float(event.noise_multiplier), event.sampling
            counts[key] = counts.get(key, 0) + count
        # Sorted, so that ledgers of the same releases share the cached epsilon, to the last bit.
        return tuple(sorted(((sigma, sampling, count) for (sigma, sampling), count in counts.items()), key=repr))

    def state_dict(self) -> dict[str, Any]:
        """Returns everything recorded, as lists, dicts, numbers and strings."""
        return {"events": [[event.state_dict(), count] for event, count in self]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces everything recorded by the contents of a :meth:`state_dict`.

        Raises:
            ValueError: If ``state`` is not valid; the ledger is then unchanged.
        """
        loaded = Ledger()
        try:
            for event, count in state["events"]:
                # Older ledgers did not record who added the noise; the server is the weakest claim.
                adversary = event.get("adversary", "model")
                sampling = load_sampling(event["sampling"])
                loaded.record(Gaussian(event["noise_multiplier"], sampling, adversary), count)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{state!r} is not the state of a ledger.") from error
        self._counts = loaded._counts

    def __add__(self, other: Ledger) -> Ledger:
        """Returns a ledger of everything that both have recorded."""
        total = Ledger()
        for event, count in [*self, *other]:
            total.record(event, count)
        return total

    def __iter__(self) -> Iterator[tuple[Gaussian, int]]:
        return iter([(event, count) for (event, _), count in self._counts.items()])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self.entries == other.entries

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ledger({', '.join(f'{count} x {event}' for event, count in self)})"
