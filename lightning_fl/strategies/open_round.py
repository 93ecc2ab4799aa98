"""A round in progress on this rank, as Lightning sees it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L

from lightning_fl.engines import Schedule
from lightning_fl.federation import Round
from lightning_fl.federation.planner import PlannedGroup
from lightning_fl.strategies import internals
from lightning_fl.strategies.batch_steps import BatchSteps
from lightning_fl.strategies.client_session import ClientSession
from lightning_fl.strategies.logged_values import LoggedValues
from lightning_fl.strategies.round_loaders import ClientVisit, RoundLoaders
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
        schedules: The schedules that step inside local training, each with Lightning's record of it.
        paused: What :func:`~lightning_fl.strategies.internals.pause_by_step` has paused.
        current: The group that is being trained, once one is.
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
    schedules: Sequence[tuple[Any, Schedule]]
    paused: list[Any]
    current: PlannedGroup = field(init=False)
    session: ClientSession = field(init=False)
    failed: dict[ClientId, str] = field(default_factory=dict)
    num_batches_done: int = 0
    num_batches_before: int = 0
    has_trained: bool = False
    more_logger_steps: int = 0
    first_batch: bytes = b""

    def split(self, parts: Sequence[Sequence[ClientId]]) -> None:
        """Lets parts of the current group train in its place."""
        self.pending.extendleft(self.current.of(part) for part in reversed(parts))

    def following(self, visit: ClientVisit) -> ClientVisit | None:
        """The client, and the number of its visit, that trains after ``visit``."""
        in_turn = [(client, group.number) for group in (self.current, *self.pending) for client in group.clients]
        after = in_turn[in_turn.index(visit) + 1 :] if visit in in_turn else in_turn
        return next(iter(after), None)

    def rewind(self, checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
        """Puts the round's start into a checkpoint that was made while clients train, for a job that is about to end.

        Training itself goes on undisturbed.
        """
        local, optimizers = self.round.trainer, self.round.trainer.optimizers
        start, held = local.state_of_start(self.round.state.server["params"]), checkpoint["state_dict"]
        held.update({name: value for name, value in start.items() if name in held})
        checkpoint["optimizer_states"] = optimizers.state_dicts_of_start()
        precision = type(trainer.precision_plugin).__qualname__
        if checkpoint.get(precision):
            checkpoint[precision] = dict(optimizers.start.scaler)
        inside = [id(config) for config, _ in self.schedules]
        states = dict(zip(inside, optimizers.start.schedules, strict=True))
        checkpoint["lr_schedulers"] = [
            states.get(id(config), state)
            for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True)
        ]
        checkpoint["loops"]["fit_loop"] = self.loops_before

    def abandon(self) -> None:
        """Rolls the round back, because it can't be finished."""
        self.loaders.close()
        self.round.abandon()
        self.steps.loop.set_global_step(self.first_step)
        internals.resume_by_step(self.paused)
