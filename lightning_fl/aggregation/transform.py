"""Transforms change updates on their way to the aggregate: clip, noise, quantize, compress."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from lightning_fl.aggregation.aggregator import Aggregator
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.types import Aggregate, State, Update


class Transform(ABC):
    """A change of updates, with a client half and a server half. The defaults change nothing.

    Client halves run in the order of the list, server halves in reverse. State is passed in and returned, never stored
    on the transform, so that checkpoints hold all of it.
    """

    keeps_client_state: ClassVar[bool] = False
    """Whether the client half keeps state between a client's rounds, such as an error-feedback residual."""
    needs_secure_sampling: bool = False
    """Whether cohorts must be drawn from the operating system's randomness, so that nobody can predict them."""
    client_keys: ClassVar[tuple[str, ...]] = ()
    """The entries of the server half's state that the client half reads as ``ctx.server``: only these are sent to silos
    on other machines, which must not learn the rest, such as the noise of a server."""
    needs_start: ClassVar[bool] = False
    """Whether the client half reads ``ctx.start``, the model from which the client has started."""
    weighting: ClassVar[Literal["examples", "uniform"] | None] = None
    """The weighting that the transform requires; None: any."""
    # False unless declared: after a clip that privacy rests on, a transform that makes no such claim is refused.
    keeps_norm_bound: ClassVar[bool] = False
    """Whether the client half never increases an update's norm and the server half leaves the sum unchanged."""
    is_elementwise: ClassVar[bool] = False
    """Whether each element of what it returns depends on the same element of what it gets only, so that processes which
    hold a part of an update can each change theirs."""
    hides_clients: bool = False
    """Whether exact facts about the clients of a round, such as their number, must not reach the loggers."""
    is_private: bool = False
    """Whether what it releases is differentially private, as a silo's policy may require."""

    def check(self, later: "Sequence[Transform]", aggregator: Aggregator, weighting: str) -> None:
        """Checks that the transform is correct in this combination; called when the strategy is built.

        Args:
            later: The transforms after this one.
            aggregator: The aggregator of the federation.
            weighting: How clients are weighted, ``"examples"`` or ``"uniform"``.

        Raises:
            ValueError: If it is not.
        """
        return

    def like(self, update: Update) -> Update:
        """Returns a template of the client half's output, given a template of its input."""
        return update

    def book(self, state: State, release: Any) -> State:
        """Records, in the server half's state, what was released about the clients' data before training.

        Called when a fit starts, on all ranks, also if it goes on from a checkpoint that has recorded the same release.

        Args:
            state: The server half's state.
            release: The datamodule's ``release``, an object with the attributes ``id``, ``event`` and ``unit``.

        Raises:
            ValueError: If the release does not protect what the transform protects.
        """
        return state

    def start_round(self, state: State, ctx: RoundContext) -> State:
        """Returns the server half's next state; called on all ranks before the clients of a round train.

        The state is kept even if the round then fails: a privacy ledger must count what may have been released.

        Raises:
            Exception: If the round must not take place.
        """
        return state

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        """Changes one client's update; ``state`` is that client's, empty before its first round."""
        return update, state

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        """Changes the round's aggregate, a sum that is not yet divided; ``state`` is the federation's.

        It is called for a round without clients too, with zeros and weight 0. The model then changes only if the
        returned weight is positive.
        """
        return aggregate, state

    def report(self, state: State, ctx: RoundContext) -> Mapping[str, float | str]:
        """Returns what to log of the finished round; numbers are logged every round, strings once."""
        return {}

    def stop_reason(self, state: State, ctx: RoundContext) -> str | None:
        """Returns why no other round may follow; None if one may."""
        return None
