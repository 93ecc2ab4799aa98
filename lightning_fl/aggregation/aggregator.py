"""The aggregator's interface: how updates become one."""

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
    """What every rank may know before it trains or evaluates.

    Args:
        silos: Whether each rank is a silo with its own data.
        cohort_size: Clients in a round.
        is_training: Whether training is about to start, rather than an evaluation.
        max_weight: Returns the largest weight of a client, or None if nobody may know it.
        min_cohort_size: The fewest clients that a round may have. None: ``cohort_size``.
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
    run on each rank for its clients, ``merge`` once over all ranks, and ``result`` last. State is passed in and
    returned; an aggregator never changes.
    """

    # False unless declared: client-level privacy rests on the claim, and refuses an aggregator that does not make it.
    is_sum: ClassVar[bool] = False
    """Whether the aggregate is the weighted sum of the updates, up to floating-point rounding. If so, one client moves
    it by no more than its weight times the norm of its update."""
    hides_reports: ClassVar[bool] = False
    """Whether :meth:`merge` and :meth:`gather` reveal only the sums over ranks of a report's field ``"sums"``, a dict
    of numbers by name. The first report they return then holds those sums."""

    @property
    def moves_frozen(self) -> bool:
        """Whether :meth:`moves` names any frozen parameters."""
        return False

    weighting: ClassVar[Literal["examples", "uniform"] | None] = None
    """The weighting that the aggregator requires; None: any."""

    @property
    def server_data(self) -> Any:
        """The loader of the server's own data; None if there is none.

        In each round the server trains on it as a client does; the update is ``ctx.root``.
        """
        return None

    @property
    def needs_server(self) -> bool:
        """Whether the server looks at updates with data of its own, which takes a simulation."""
        return self.server_data is not None

    def check(self, algorithm: Algorithm) -> None:
        """Checks that the aggregator is correct beside the algorithm; called when the strategy is built.

        Raises:
            ValueError: If it is not.
        """
        return

    def moves(self, names: Sequence[str], trained: Mapping[str, torch.Tensor]) -> Sequence[str]:
        """The frozen parameters that :meth:`result` moves; they count as buffers, to which clients add nothing.

        Args:
            names: The module's frozen parameters.
            trained: The shared parameters.
        """
        return ()

    def check_cohort(self, num_clients: int) -> None:
        """Checks that rounds with so many clients can be aggregated; called when the strategy is built, if it is known.

        Raises:
            ValueError: If they can't.
        """
        return

    @property
    def integer_bits(self) -> int | None:
        """Bits of the modulus in which integer tensors of unit weight are summed exactly; None if they are not."""
        return None

    def min_clients_of(self, cohort_size: int) -> int:
        """Returns the fewest of a cohort's clients whose updates are summed; with fewer :meth:`merge` raises."""
        return 1

    def open(self, group: Group, facts: FederationFacts) -> Any:
        """Returns the session: what lasts for a whole fit or evaluation, such as agreed keys. None if there is nothing.

        Called on every rank, before ranks exchange anything else. The caller keeps the session and passes it to
        :meth:`init` and :meth:`gather`; it is not stored on the aggregator.

        Args:
            group: The ranks of the federation.
            facts: Who is going to train or evaluate.

        Raises:
            ValueError: On every rank, if the updates of this federation can't be aggregated.
        """
        return None

    @abstractmethod
    def init(self, template: Update, device: torch.device, session: Any = None) -> Any:
        """Returns an empty accumulator, which carries what it needs of the session.

        Args:
            template: An update with the names and shapes of all that will come; in a round, its delta and buffers hold
                the global model.
            device: Where the updates will be.
            session: What :meth:`open` returned.
        """

    @abstractmethod
    def add(self, acc: Any, update: Update, ctx: RoundContext) -> Any:
        """Returns the accumulator with one client's update added.

        The result may reuse the memory of ``acc``, which must not be used afterwards.

        Raises:
            ClientLost: If the client has vanished; the round goes on without it, and with ``acc`` as it was.
        """

    @property
    def adds_groups(self) -> bool:
        """Whether :meth:`add_group` does for several updates what :meth:`add` does for one."""
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
        """Joins the ranks' accumulators; the only place with the tensor collective.

        ``acc`` stays valid, so that a merge that failed can be retried.

        Args:
            acc: This rank's accumulator.
            group: The ranks of the federation.
            report: What this rank tells the others of the round (metrics, timings). It goes through the aggregator so
                that one that hides updates can hide the report as well.
            ctx: Facts of the round.

        Returns:
            The federation's accumulator, the same on every rank, and the reports of all ranks.
        """

    def gather(self, session: Any, group: Group, report: Message, topic: str) -> list[Message]:
        """Returns the reports of all ranks outside a round, such as the results of an evaluation.

        Args:
            session: What :meth:`open` returned.
            group: The ranks of the federation.
            report: What this rank tells the others.
            topic: What the report is about; the same on every rank.
        """
        return group.all_gather(report, topic)

    @abstractmethod
    def result(self, acc: Any, ctx: RoundContext) -> Aggregate:
        """Returns the aggregate of the merged accumulator.

        Raises:
            ValueError: If the weights add up to nothing.
        """

    def shares(self, acc: Any, ctx: RoundContext) -> Mapping[ClientId, float]:
        """Returns each client's share in the merged accumulator; empty if it has none that could be told."""
        return {}

    def remember(self, acc: Any, ctx: RoundContext) -> State:
        """Returns what to keep of the merged accumulator: ``ctx.memory`` of the next round.

        It stands in the checkpoint. A round without clients leaves it as it is.
        """
        return ctx.memory

    def report(self, acc: Any, ctx: RoundContext) -> Mapping[str, Any]:
        """Returns what to keep of the merged accumulator in the round's entry of ``strategy.history``.

        Numbers are logged every round, strings once. ``left_out`` names the clients that do not count, each with why.
        """
        return {}
