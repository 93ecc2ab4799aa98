"""The interface of an aggregator, which combines the clients' updates."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.algorithms import Algorithm
from lightning_fl.communication import Group, Message
from lightning_fl.types import Aggregate, ClientId, State, Update


class ClientLost(Exception):
    """A client vanished before its update was added."""


@dataclass(frozen=True)
class FederationFacts:
    """Facts about the federation that every rank knows before it trains or evaluates.

    Args:
        silos: Whether each rank is a silo with its own data.
        cohort_size: Number of clients in a round.
        is_training: Whether training is about to start, rather than an evaluation.
        max_weight: Returns the largest weight of a client, or None if it must stay unknown.
        min_cohort_size: Smallest number of clients in a round. None: ``cohort_size``.
        clients: All clients; empty in an evaluation.
        seed: Seed of the federation's random choices.
        weights: Returns the weights of the clients whose number of examples this rank knows before training.
    """

    silos: bool
    cohort_size: int
    is_training: bool
    max_weight: Callable[[], float | None] = lambda: None
    min_cohort_size: int | None = None
    clients: Collection[ClientId] = ()
    seed: int = 0
    weights: Callable[[], Mapping[ClientId, float]] = dict


class Aggregator(ABC):
    """Turns the updates of a round into one aggregate.

    ``open`` runs once at the start of a fit or evaluation and returns a session. In each round, ``init`` and ``add``
    run on each rank for its clients, then ``merge`` once over all ranks, and ``result`` last. State is passed in and
    returned; the aggregator itself never changes.
    """

    # False unless declared: client-level privacy relies on it, and refuses an aggregator that doesn't declare it.
    is_sum: ClassVar[bool] = False
    """Whether the aggregate is the weighted sum of the updates, up to floating-point rounding. Then one client changes
    it by at most its weight times the norm of its update."""
    hides_reports: ClassVar[bool] = False
    """Whether :meth:`merge` and :meth:`gather` reveal only the sums over ranks of a report's field ``"sums"``, a dict
    of numbers by name. The first report they return then holds those sums."""

    @property
    def moves_frozen(self) -> bool:
        """Whether :meth:`moves` may name frozen parameters."""
        return False

    weighting: ClassVar[Literal["examples", "uniform"] | None] = None
    """The weighting that the aggregator requires; None: any."""

    @property
    def server_data(self) -> Any:
        """The DataLoader of the server's own data; None if there is none.

        In each round the server trains on it like a client; the update is ``ctx.root``.
        """
        return None

    @property
    def needs_server(self) -> bool:
        """Whether the server evaluates updates on its own data, which is possible in a simulation only."""
        return self.server_data is not None

    def check(self, algorithm: Algorithm) -> None:
        """Checks that the aggregator is correct for the algorithm; called when the strategy is built.

        Raises:
            ValueError: If it is not.
        """
        return

    def moves(self, names: Sequence[str], trained: Mapping[str, torch.Tensor]) -> Sequence[str]:
        """The frozen parameters that :meth:`result` changes; they are treated as buffers that clients leave unchanged.

        Args:
            names: The module's frozen parameters.
            trained: The shared parameters.
        """
        return ()

    def check_cohort(self, num_clients: int) -> None:
        """Checks that rounds of ``num_clients`` can be aggregated; called when the strategy is built, if it is known.

        Raises:
            ValueError: If they can't.
        """
        return

    @property
    def integer_bits(self) -> int | None:
        """Bits of the modulus in which integer tensors of weight 1 are summed exactly; None if they are not."""
        return None

    def min_clients_of(self, cohort_size: int) -> int:
        """Returns the smallest number of a cohort's updates that are summed; with fewer, :meth:`merge` raises."""
        return 1

    def open(self, group: Group, facts: FederationFacts) -> Any:
        """Returns the session, which lasts for a whole fit or evaluation, such as agreed keys. None if not needed.

        Called on every rank, before ranks exchange anything else. The caller keeps the session and passes it to
        :meth:`init` and :meth:`gather`; it is not stored on the aggregator.

        Args:
            group: The ranks of the federation.
            facts: Facts about the federation.

        Raises:
            ValueError: On every rank, if the updates of this federation can't be aggregated.
        """
        return None

    @abstractmethod
    def init(self, template: Update, device: torch.device, session: Any = None) -> Any:
        """Returns an empty accumulator; it also holds whatever later methods need of the session.

        Args:
            template: An update with the names and shapes of all updates to come; in a round, its delta and buffers hold
                the global model.
            device: Device of the updates.
            session: The session that :meth:`open` returned.
        """

    @abstractmethod
    def add(self, acc: Any, update: Update, ctx: RoundContext) -> Any:
        """Returns the accumulator with one client's update added.

        The result may reuse the memory of ``acc``, which must not be used afterwards.

        Raises:
            ClientLost: If the client has vanished; the round goes on without it, and with ``acc`` unchanged.
        """

    @property
    def adds_groups(self) -> bool:
        """Whether :meth:`add_group` is implemented."""
        # A subclass that overrides only `add` would be bypassed by the `add_group` it inherits.
        owner = {name: next(c for c in type(self).__mro__ if name in vars(c)) for name in ("add", "add_group")}
        return issubclass(owner["add_group"], owner["add"])

    def add_group(self, acc: Any, updates: Update, weights: Sequence[float], ctx: RoundContext) -> Any:
        """Returns the accumulator with the updates of a client group added; ``acc`` as for :meth:`add`.

        Args:
            acc: This rank's accumulator.
            updates: The group's updates, each tensor stacked over the clients.
            weights: The clients' weights; ``updates.weight`` is ignored.
            ctx: Facts of the round; ``ctx.clients`` are those of the group.
        """
        raise NotImplementedError

    @abstractmethod
    def merge(self, acc: Any, group: Group, report: Message, ctx: RoundContext) -> tuple[Any, list[Message]]:
        """Merges the ranks' accumulators; the only method that exchanges tensors between ranks.

        ``acc`` stays valid, so that a failed merge can be retried.

        Args:
            acc: This rank's accumulator.
            group: The ranks of the federation.
            report: This rank's report on the round (metrics, timings). It goes through the aggregator, so that an
                aggregator that hides updates can hide the report as well.
            ctx: Facts of the round.

        Returns:
            The federation's accumulator, the same on every rank, and the reports of all ranks.
        """

    def gather(self, session: Any, group: Group, report: Message, topic: str) -> list[Message]:
        """Returns the reports of all ranks outside a round, such as the results of an evaluation.

        Args:
            session: The session that :meth:`open` returned.
            group: The ranks of the federation.
            report: This rank's report.
            topic: The subject of the report; the same on every rank.
        """
        return group.all_gather(report, topic)

    @abstractmethod
    def result(self, acc: Any, ctx: RoundContext) -> Aggregate:
        """Returns the aggregate of the merged accumulator.

        Raises:
            ValueError: If the weights add up to 0.
        """

    def shares(self, acc: Any, ctx: RoundContext) -> Mapping[ClientId, float]:
        """Returns each client's share in the merged accumulator; empty if shares are not defined or unknown."""
        return {}

    def remember(self, acc: Any, ctx: RoundContext) -> State:
        """Returns what the aggregator keeps for the next round, where it is ``ctx.memory``.

        It is part of the checkpoint. A round without clients leaves it unchanged.
        """
        return ctx.memory

    def report(self, acc: Any, ctx: RoundContext) -> Mapping[str, Any]:
        """Returns facts about the merged accumulator for the round's entry in ``strategy.history``.

        Numbers are logged every round, strings once. ``left_out`` maps each client that was left out to the reason.
        """
        return {}
