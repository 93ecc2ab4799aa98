"""The facts of a round that transforms and aggregators may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_fl.clients.cohorts import CohortSampling
from lightning_fl.communication import Group, LocalGroup
from lightning_fl.types import ClientId, State, Tree, Update


@dataclass(frozen=True)
class RoundContext:
    """Facts of the round that transforms and aggregators may use.

    Args:
        round: Number of the round, from 0.
        cohort: The clients of this round, on all ranks.
        population: Number of clients in the federation.
        sampling: How the cohorts are drawn; None if unknown.
        client: The current client; None in server halves.
        clients: The clients of the current group, where several are added at once.
        generator: Seeded by (seed, round, client), so it is predictable: never use it for privacy.
        group: The ranks of the federation; server halves run on all of them.
        seed: Seed of the federation's random choices, which is no secret.
        silos: Whether each rank is a silo with its own data, rather than a part of one simulation.
        server: In client halves, the state of the transform's server half.
        frozen: The module's frozen parameters, which must be the same on all clients.
        templates: For each transform, an update like those that its client half is given, and one like those that the
            aggregator receives.
        template: In transforms, an update with the names, shapes and dtypes of those that the client half is given.
        min_clients: The fewest clients whose updates are summed; with fewer the aggregator gives the round up.
        staleness: In client halves, how many server updates the client's start is behind the present model.
        start: In client halves, the model from which the client started, as parameters and buffers. None: the present
            one, where nothing tells them apart.
        integer_bits: Bits of the modulus in which the aggregator sums integers exactly; None if it does not.
        memory: What the aggregator has kept of the rounds before; empty in the first.
        root: The update of the server's own data, where the aggregator has such.
        model_of: In a simulation, the model that an update leads to, in evaluation mode, as a function of its input.
    """

    round: int
    cohort: Sequence[ClientId]
    population: int
    sampling: CohortSampling | None = None
    client: ClientId | None = None
    clients: Sequence[ClientId] = ()
    generator: torch.Generator | None = None
    group: Group = field(default_factory=LocalGroup)
    seed: int = 0
    silos: bool = False
    server: State = field(default_factory=dict)
    frozen: Tree = field(default_factory=dict)
    templates: Sequence[Update] = ()
    template: Update | None = None
    min_clients: int = 1
    staleness: int = 0
    start: Update | None = None
    integer_bits: int | None = None
    memory: State = field(default_factory=dict)
    root: Update | None = None
    model_of: Callable[[Update], Callable[..., Any]] | None = None
