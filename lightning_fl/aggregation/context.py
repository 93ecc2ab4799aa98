"""Facts about the round for transforms and aggregators."""

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
    """Facts about the round for transforms and aggregators.

    Args:
        round: Number of the round, from 0.
        cohort: The clients of this round, on all ranks.
        population: Number of clients in the federation.
        sampling: How the cohorts are sampled; None if unknown.
        client: The current client; None in server halves.
        clients: The clients of the current group, if several are added at once.
        generator: Seeded by (seed, round, client), so it is predictable: never use it for privacy.
        group: The ranks of the federation; server halves run on all of them.
        seed: Seed of the federation's random choices, which is no secret.
        silos: Whether each rank is a silo with its own data, rather than a part of one simulation.
        server: In client halves, the state of the transform's server half.
        frozen: The module's frozen parameters, which must be the same on all clients.
        templates: For each transform a template of its client half's input, then a template of the aggregator's input.
        template: In transforms, an update with the names, shapes and dtypes of the client half's input.
        min_clients: Smallest number of updates that are summed; with fewer, the aggregator drops the round.
        staleness: In client halves, the number of server updates by which the client's starting model is behind the
            current one.
        start: In client halves, the model from which the client started, as parameters and buffers. None: the current
            one.
        integer_bits: Bits of the modulus in which the aggregator sums integers exactly; None if it does not.
        memory: What the aggregator has kept of earlier rounds; empty in the first.
        root: The update from the server's own data, if the aggregator has such data.
        model_of: In a simulation, returns the model after an update, in evaluation mode, as a function of its input.
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
