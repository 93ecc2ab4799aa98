"""Simulated dropouts: which clients vanish, and when."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fl.aggregation import RoundContext
from lightning_fl.seeding import round_rng
from lightning_fl.types import ClientId

STAGES = ("advertise", "share", "send", "agree", "unmask")
"""A client's messages in the double-masking protocol, in order. One that drops out at a stage sends nothing more."""


def num_dropouts(share: float, num_clients: int) -> int:
    """Returns how many clients of a round drop out."""
    return round(share * num_clients)


def plan_dropouts(share: float, seed: int, ctx: RoundContext, stages: Sequence[str] = STAGES) -> dict[ClientId, str]:
    """Draws the clients of a round that drop out, and the stage at which each does.

    Args:
        share: Share of the round's clients.
        seed: Seed of the draw.
        ctx: Facts of the round.
        stages: The stages to draw from.
    """
    rng = round_rng(seed, ctx.round, "dropouts")
    who = rng.permutation(len(ctx.cohort))[: num_dropouts(share, len(ctx.cohort))]
    return {ctx.cohort[index]: stages[int(rng.integers(len(stages)))] for index in sorted(who.tolist())}
