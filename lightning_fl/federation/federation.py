"""How a round opens and closes: in one process, over a group of ranks, or through a coordinator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lightning_fl.aggregation import Aggregator, RoundContext
from lightning_fl.communication import Group, LocalGroup, Message
from lightning_fl.federation.report import RankReport
from lightning_fl.federation.report_masking import mask, unmask
from lightning_fl.federation.server import Closing, ServerRound, close_server, open_server
from lightning_fl.federation.settings import FederationSettings, FederationState
from lightning_fl.types import ClientId, Tree


@dataclass(frozen=True)
class Opening:
    """A round that may begin.

    Args:
        round: Number of the round, from 0.
        cohort: The clients of the round. None: the ranks draw them.
        state: The federation's state with which the round starts. None: the ranks have it.
        buffers: The shared buffers that belong to ``state``.
        facts: Values that a party needs to catch up after missed rounds, such as the optimizer steps so far.
    """

    round: int
    cohort: Sequence[ClientId] | None = None
    state: FederationState | None = None
    buffers: Tree = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Federation(ABC):
    """A party's communication with the others between its local phases.

    Args:
        group: The ranks of this launch.
        place: This process's index among all that hold clients, from 0.
        size: Number of processes that hold clients.
    """

    knows_all_clients: ClassVar[bool] = True
    """Whether this launch knows all clients, from its own data or from what its ranks have told each other."""

    def __init__(self, group: Group, place: int, size: int) -> None:
        self.group = group
        self.place = place
        self.size = size

    @abstractmethod
    def open_round(self, done: int) -> Opening | None:
        """Waits for the next round and returns it; None if no other will follow.

        Args:
            done: The last round that this party has finished; -1 before its first.
        """

    def ending(self, done: int) -> Opening | None:
        """The model with which the federation has ended; None if this party has it. Asked once no round follows.

        Args:
            done: As for :meth:`open_round`.
        """
        return None

    @abstractmethod
    def start(
        self, settings: FederationSettings, state: FederationState, params: Tree, ctx: RoundContext
    ) -> FederationState:
        """The state with which the clients of a round start, as :func:`~lightning_fl.federation.open_server`."""

    @abstractmethod
    def merge(self, opened: ServerRound, acc: Any, report: RankReport) -> tuple[Any, list[RankReport]]:
        """Merges the accumulators of all parties; returns the result and the parties' reports."""

    @abstractmethod
    def close_round(self, opened: ServerRound, acc: Any, joined: RankReport) -> Closing:
        """Updates the global model.

        Args:
            opened: The round.
            acc: The accumulator that :meth:`merge` returned.
            joined: The parties' reports, joined.

        Raises:
            ValueError: If the updates of all clients were refused.
        """

    @abstractmethod
    def gather(self, message: Message, topic: str) -> list[Message]:
        """The messages of all parties that take part, in the same order for each of them."""

    @abstractmethod
    def gather_sums(self, aggregator: Aggregator, session: Any, message: Message, topic: str) -> list[Message]:
        """As :meth:`gather`, but the aggregator reveals only the sums of the messages' field ``"sums"``.

        Args:
            aggregator: An aggregator that hides reports.
            session: The session that its ``open`` returned.
            message: This party's message.
            topic: The message's topic.
        """


class GroupFederation(Federation):
    """Ranks that communicate by collectives; each of them computes the server's side.

    Args:
        group: The ranks.
    """

    def __init__(self, group: Group) -> None:
        super().__init__(group, group.rank, group.size)

    def open_round(self, done: int) -> Opening | None:
        return Opening(done + 1)

    def start(
        self, settings: FederationSettings, state: FederationState, params: Tree, ctx: RoundContext
    ) -> FederationState:
        return open_server(settings, state, params, ctx)

    def merge(self, opened: ServerRound, acc: Any, report: RankReport) -> tuple[Any, list[RankReport]]:
        aggregator = opened.settings.aggregator
        hides = aggregator.hides_reports and self.group.size > 1
        message = mask(report.without_steps().to_message()) if hides else report.to_message()
        acc, messages = aggregator.merge(acc, self.group, message, opened.ctx)
        return acc, [RankReport.from_message(one) for one in (unmask(messages) if hides else messages)]

    def close_round(self, opened: ServerRound, acc: Any, joined: RankReport) -> Closing:
        return close_server(opened, acc, joined)

    def gather(self, message: Message, topic: str) -> list[Message]:
        return self.group.all_gather(message, topic)

    def gather_sums(self, aggregator: Aggregator, session: Any, message: Message, topic: str) -> list[Message]:
        return aggregator.gather(session, self.group, message, topic)


class LocalFederation(GroupFederation):
    """One process that holds all clients."""

    def __init__(self) -> None:
        super().__init__(LocalGroup())
