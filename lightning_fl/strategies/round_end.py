"""The end of a round inside Lightning: what this rank reports, and what is shown of all ranks' reports."""

from __future__ import annotations

import lightning as L

from lightning_fl.federation import RankPlan, RankReport
from lightning_fl.federation.metric_entries import Entries, as_numbers
from lightning_fl.strategies import internals
from lightning_fl.strategies.logged_values import hide_unmerged, late_entries, logged_metric_entries
from lightning_fl.strategies.metric_states import MetricStates
from lightning_fl.strategies.open_round import OpenRound


def rank_report(
    trainer: L.Trainer,
    opened: OpenRound,
    plan: RankPlan,
    metric_states: MetricStates,
    deferred_checkpoints: dict[str, bool],
) -> RankReport:
    """What this rank tells the others of the round, besides what the round itself has added up.

    Args:
        trainer: The Trainer.
        opened: The round.
        plan: What this rank was to do in it.
        metric_states: The module's torchmetrics.
        deferred_checkpoints: The checkpoints that were asked for inside the round.
    """
    results = internals.train_results(trainer)
    descriptions, tensors = metric_states.report()
    own_steps = internals.logger_steps(trainer) - opened.first_logger_step + opened.more_logger_steps
    return RankReport(
        metrics=as_numbers({**opened.values.entries, **logged_metric_entries(results)}),
        metric_states=descriptions,
        has_late_values=bool(late_entries(results)),
        first_batch=opened.first_batch,
        empty=list(plan.empty),
        failed=list(opened.failed.items()),
        logger_steps=own_steps if opened.has_trained else 0,
        should_stop=trainer.should_stop,
        deferred_checkpoints=deferred_checkpoints,
        tensors=tensors,
    )


def show_result(trainer: L.Trainer, opened: OpenRound, joined: RankReport, last_step: int) -> Entries:
    """Brings Lightning's schedules and counters to where the round has taken them on every rank.

    Args:
        trainer: The Trainer.
        opened: The round, which has been closed.
        joined: The report of all ranks.
        last_step: ``trainer.global_step`` after the round.

    Returns:
        What the clients of all ranks have logged.
    """
    loop = opened.steps.loop
    if trainer.lightning_module.automatic_optimization:
        loop.step_epoch_schedules()
    loop.set_global_step(last_step)
    internals.set_logger_steps(trainer, opened.first_logger_step + joined.logger_steps)
    hide_unmerged(internals.train_results(trainer), joined.metrics)
    return joined.metrics
