"""What happens to an update on its way: clip, noise, quantize, compress."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from lightning_fl.clients.cohorts import Sampling
from lightning_fl.communication import Group, LocalGroup
from lightning_fl.types import Aggregate, ClientId, State, Tree, Update

if TYPE_CHECKING:
    from lightning_fl.aggregation.aggregator import Aggregator


@dataclass(frozen=True)
class RoundContext:
    """Facts of the round that transforms and aggregators may use.

    Args:
        round: Number of the round, from 0.
        cohort: The clients of this round, on all ranks.
        population: Number of clients in the federation.
        sampling: How the cohorts are drawn; None where nobody has said.
        client: The client at hand, or None in server halves.
        generator: Randomness of (seed, round, client); not for privacy.
        group: The ranks of the federation; server halves run on all of them.
        silos: Whether each rank is a silo with its own data, rather than a part of one simulation.
        server: In client halves, the state of the transform's server half.
        frozen: The module's parameters that do not train, which all clients must have alike.
    """

    round: int
    cohort: Sequence[ClientId]
    population: int
    sampling: Sampling | None = None
    client: ClientId | None = None
    generator: torch.Generator | None = None
    group: Group = field(default_factory=LocalGroup)
    silos: bool = False
    server: State = field(default_factory=dict)
    frozen: Tree = field(default_factory=dict)


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
