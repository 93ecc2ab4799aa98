"""The end of a round inside Lightning: this rank's report, and the counters that follow from all ranks' reports."""

from __future__ import annotations

import lightning as L

from lightning_fl.engines.vectorized.grouping_memory import GroupingMemory
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
    found: GroupingMemory,
) -> RankReport:
    """This rank's report of the round, without the sums that the round itself adds.

    Args:
        trainer: The Trainer.
        opened: The round.
        plan: This rank's plan of the round.
        metric_states: The module's torchmetrics.
        deferred_checkpoints: The checkpoints that were requested inside the round.
        found: What this rank has found out about training clients together, to send to the others.
    """
    results = internals.train_results(trainer)
    descriptions, tensors = metric_states.report()
    # A rank without clients has counted one batch that does not exist, which must not advance the x-axis.
    own_steps = internals.logger_steps(trainer) - opened.first_logger_step + opened.more_logger_steps
    return RankReport(
        metrics=as_numbers({**opened.values.entries, **logged_metric_entries(results)}),
        metric_states=descriptions,
        has_late_values=bool(late_entries(results)),
        empty=list(plan.empty),
        failed=list(opened.failed.items()),
        logger_steps=own_steps if opened.has_trained else 0,
        should_stop=trainer.should_stop,
        deferred_checkpoints=deferred_checkpoints,
        grouping=[found.pack()] if found != GroupingMemory() else [],
        tensors=tensors,
    )


def advance_trainer(trainer: L.Trainer, opened: OpenRound, joined: RankReport, last_step: int) -> Entries:
    """Advances Lightning's schedules and counters by the round, equally on every rank.

    Args:
        trainer: The Trainer.
        opened: The round, which has been closed.
        joined: The report of all ranks.
        last_step: ``trainer.global_step`` after the round.

    Returns:
        The values that the clients of all ranks have logged.
    """
    loop = opened.steps.loop
    if trainer.lightning_module.automatic_optimization:
        loop.step_epoch_schedules()
    loop.set_global_step(last_step)
    internals.set_logger_steps(trainer, opened.first_logger_step + joined.logger_steps)
    hide_unmerged(internals.train_results(trainer), joined.metrics)
    return joined.metrics
