"""What transforms and aggregators may know of the round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lightning_fl.clients.cohorts import Sampling
from lightning_fl.communication import Group, LocalGroup
from lightning_fl.types import ClientId, State, Tree


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
