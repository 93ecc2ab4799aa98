"""What happens to an update on its way: clip, noise, quantize, compress."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from lightning_fl.aggregation.aggregator import Aggregator
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.types import Aggregate, State, Update


class Transform(ABC):
    """A change of updates with a client half and a server half; the defaults change nothing.

    Client halves run in the order of the list, server halves in reverse.
    """

    keeps_client_state: ClassVar[bool] = False
    """Whether the client half keeps state between a client's rounds, such as an error-feedback residual."""
    needs_secure_sampling: bool = False
    """Whether cohorts must come from the operating system's randomness, so that nobody can foretell them."""
    weighting: ClassVar[Literal["examples", "uniform"] | None] = None
    """What a client must weigh; None: anything."""
    keeps_norm_bound: ClassVar[bool] = False
    """Whether the client half never lengthens an update and the server half leaves the sum as it is."""
    hides_clients: bool = False
    """Whether exact facts about the clients of a round, such as their number, must not reach the loggers."""

    def check(self, later: Sequence[Transform], aggregator: Aggregator, weighting: str) -> None:
        """Called when the strategy is built.

        Args:
            later: The transforms after this one.
            aggregator: How updates become one.
            weighting: What a client weighs.

        Raises:
            ValueError: If the transform can't be right beside these.
        """
        return

    def like(self, update: Update) -> Update:
        """An update of the form that the client half gives, for one of the form that it takes."""
        return update

    def start_round(self, state: State, ctx: RoundContext) -> State:
        """Called on all ranks before the clients of a round train.

        What it puts into the state of the server half stays there even if the round then fails.

        Raises:
            Exception: If the round must not take place.
        """
        return state

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        """Changes one client's update; ``state`` is the client's own, empty before its first round."""
        return update, state

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        """Changes the round's aggregate, a sum that is not yet divided; ``state`` is the federation's.

        A round without clients comes here too, with zeros of weight 0; the model stays as it is unless the weight
        becomes positive.
        """
        return aggregate, state

    def report(self, state: State, ctx: RoundContext) -> Mapping[str, float | str]:
        """What to log and to keep of the finished round: numbers each round, words once."""
        return {}

    def stop_reason(self, state: State, ctx: RoundContext) -> str | None:
        """Why no other round may follow; None if one may."""
        return None
