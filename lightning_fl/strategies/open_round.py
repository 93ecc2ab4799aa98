"""A round in progress on this rank, as Lightning sees it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from lightning_fl.federation import Round
from lightning_fl.federation.planner import PlannedGroup
from lightning_fl.strategies.batch_steps import BatchSteps
from lightning_fl.strategies.client_session import ClientSession
from lightning_fl.strategies.logged_values import LoggedValues
from lightning_fl.strategies.round_loaders import RoundLoaders
from lightning_fl.types import ClientId


@dataclass
class OpenRound:
    """A round in progress on this rank.

    Args:
        round: The round.
        loaders: Opens the clients' loaders.
        steps: Trains on batches.
        values: The values that the clients have logged.
        pending: The client groups that have not trained yet.
        first_step: ``trainer.global_step`` when the round began.
        first_logger_step: The x-axis of the loggers when the round began.
        loops_before: The progress of Lightning's loops before the round.
        paused: What :func:`~lightning_fl.strategies.internals.pause_by_step` has paused.
        current: The group that is being trained.
        session: Its logged values and torchmetrics.
        failed: For each client of this rank whose loader has raised, the description of the error.
        num_batches_done: Batches that this rank has trained.
        num_batches_before: Those before the current group.
        has_trained: Whether this rank has finished a client.
        more_logger_steps: Steps by which the loggers' x-axis advances beyond those that Lightning counts.
        first_batch: A digest of the first batch, if ranks are to compare it; it does not leave this rank.
    """

    round: Round
    loaders: RoundLoaders
    steps: BatchSteps
    values: LoggedValues
    pending: deque[PlannedGroup]
    first_step: int
    first_logger_step: int
    loops_before: dict[str, Any]
    paused: list[Any]
    current: PlannedGroup = field(default_factory=lambda: PlannedGroup((), 0))
    session: ClientSession | None = None
    failed: dict[ClientId, str] = field(default_factory=dict)
    num_batches_done: int = 0
    num_batches_before: int = 0
    has_trained: bool = False
    more_logger_steps: int = 0
    first_batch: bytes = b""
