"""What happens to an update on its way: clip, noise, quantize, compress."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_fl.clients.sampling import Sampling
from lightning_fl.types import Aggregate, ClientId, State, Update


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
    """

    round: int
    cohort: Sequence[ClientId]
    population: int
    sampling: Sampling | None = None
    client: ClientId | None = None
    generator: torch.Generator | None = None


class Transform(ABC):
    """A change of updates with a client half and a server half; the defaults change nothing.

    Client halves run in the order of the list, server halves in reverse.
    """

    keeps_client_state: ClassVar[bool] = False
    """Whether the client half keeps state between a client's rounds, such as an error-feedback residual."""
    needs_secure_sampling: bool = False
    """Whether cohorts must come from the operating system's randomness, so that nobody can foretell them."""

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        """Changes one client's update; ``state`` is the client's own, empty before its first round."""
        return update, state

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        """Changes the round's aggregate, a sum that is not yet divided; ``state`` is the federation's.

        A round without clients comes here too, with zeros of weight 0; the model stays as it is unless the weight
        becomes positive.
        """
        return aggregate, state
