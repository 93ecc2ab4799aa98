"""Transforms change updates on their way to the aggregator: clip, add noise, quantize, compress."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from lightning_fl.aggregation.aggregator import Aggregator
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.algorithms import Algorithm
from lightning_fl.types import Aggregate, State, Update


class Transform(ABC):
    """Changes updates, with a client half and a server half. The defaults change nothing.

    Client halves run in the order of the list, server halves in reverse. State is passed in and returned, never stored
    on the transform, so that checkpoints hold all of it.
    """

    keeps_client_state: ClassVar[bool] = False
    """Whether the client half keeps state between a client's rounds, such as an error-feedback residual."""
    needs_secure_sampling: bool = False
    """Whether cohorts must be sampled with the operating system's randomness, so that they are unpredictable."""
    client_keys: ClassVar[tuple[str, ...]] = ()
    """The entries of the server half's state that the client half reads as ``ctx.server``: only these are sent to silos
    on other machines, which must not learn the rest, such as the server's noise."""
    needs_start: ClassVar[bool] = False
    """Whether the client half reads ``ctx.start``, the model from which the client has started."""
    weighting: ClassVar[Literal["examples", "uniform"] | None] = None
    """The weighting that the transform requires; None: any."""
    # False unless declared: after a clip that privacy relies on, a transform that doesn't declare it is refused.
    keeps_norm_bound: ClassVar[bool] = False
    """Whether the client half never increases an update's norm and the server half leaves the sum unchanged."""
    is_elementwise: ClassVar[bool] = False
    """Whether each element of the output depends on the same element of the input only, so that processes that each
    hold a shard of an update can transform their shards independently."""
    is_lossy: ClassVar[bool] = False
    """Whether the server gets different changes from those that the clients have computed, such as rounded, clipped or
    scaled ones."""
    hides_clients: bool = False
    """Whether exact facts about a round's clients, such as their number, must not reach the loggers."""
    is_private: bool = False
    """Whether its output is differentially private, as a silo's policy may require."""

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

    def check_algorithm(self, algorithm: Algorithm) -> None:
        """Checks that the transform is correct beside the algorithm; called when the strategy is built.

        Raises:
            ValueError: If it is not.
        """
        if self.is_lossy and algorithm.needs_exact_deltas:
            raise ValueError(
                f"{type(algorithm).__name__} is right only if the server gets the very changes that the clients have "
                f"computed, and with {type(self).__name__} it gets others. Leave that out, or use another algorithm, "
                "such as 'fedavg' or 'scaffold'."
            )

    def like(self, update: Update) -> Update:
        """Returns a template of the client half's output, given a template of its input."""
        return update

    def book(self, state: State, release: Any) -> State:
        """Records a release about the clients' data before training in the server half's state.

        Called when a fit starts, on all ranks, even if it resumes from a checkpoint that has recorded the same release.

        Args:
            state: The server half's state.
            release: The datamodule's ``release``, an object with the attributes ``id``, ``event`` and ``unit``.

        Raises:
            ValueError: If the release does not protect the same unit as the transform.
        """
        return state

    def start_round(self, state: State, ctx: RoundContext) -> State:
        """Returns the server half's updated state; called on all ranks before the clients of a round train.

        The state is kept even if the round then fails: a privacy ledger must count every possible release.

        Raises:
            Exception: If the round must not take place.
        """
        return state

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        """Changes one client's update; ``state`` is that client's, empty before its first round."""
        return update, state

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        """Changes the round's aggregate, a sum that is not yet divided by the weight; ``state`` is the server half's.

        It is also called for a round without clients, with zeros and weight 0. The model then changes only if the
        returned weight is positive.
        """
        return aggregate, state

    def report(self, state: State, ctx: RoundContext) -> Mapping[str, float | str]:
        """Returns what to log for the finished round; numbers are logged every round, strings once."""
        return {}

    def stop_reason(self, state: State, ctx: RoundContext) -> str | None:
        """Returns why training must stop after this round; None if it may continue."""
        return None
