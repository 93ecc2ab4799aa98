"""Which schedules fit the strategy's other settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_fl.aggregation import Aggregator, Transform
from lightning_fl.algorithms import Algorithm
from lightning_fl.clients import Cohort, Durations, Population, Stragglers, Uniform, as_durations
from lightning_fl.schedules import Recorded, RoundSchedule, Synchronous
from lightning_fl.strategies.validation import misconfiguration


def choose_schedule(
    schedule: RoundSchedule | None,
    durations: Durations | Mapping[int | str, float] | str | None,
    in_real_time: bool = False,
) -> tuple[RoundSchedule | None, Durations | None]:
    """The schedule and the durations that two settings of the strategy stand for.

    Args:
        schedule: The strategy's ``schedule``.
        durations: The strategy's ``durations``.
        in_real_time: Whether silos arrive when they arrive, so that there are no durations.

    Raises:
        ValueError: If one is of the wrong kind, or a schedule has no durations.
    """
    if schedule is not None and not isinstance(schedule, RoundSchedule):
        raise ValueError(
            f"schedule={schedule!r} is a {type(schedule).__name__}; expected a schedule such as "
            "fl.schedules.Buffered(size=10)."
        )
    chosen = as_durations(durations)
    if schedule is not None and not schedule.needs_durations and chosen is not None:
        raise ValueError(f"With {schedule!r} durations={durations!r} would be ignored. Leave it out.")
    if schedule is not None and schedule.needs_durations and chosen is None and not in_real_time:
        raise ValueError(
            f"schedule={schedule!r} needs durations, by which clients arrive: seconds by client such as "
            "{0: 1.5, 1: 20}, "
            'fl.clients.Lognormal(median=20), or "measured". Where each rank is a silo that trains in real time, give '
            'transport="gloo" instead.'
        )
    return (Synchronous() if chosen is not None and schedule is None else schedule), chosen


def check_schedule(
    schedule: RoundSchedule,
    num_clients: int | None,
    local_steps: object,
    local_epochs: object,
    cohort: Cohort,
    stragglers: Stragglers | None,
    transforms: Sequence[Transform],
    aggregator: Aggregator,
    algorithm: Algorithm,
) -> None:
    """Makes sure that a schedule fits the other settings of a strategy.

    Raises:
        ValueError: If it does not.
    """
    if num_clients is not None:
        schedule.check(num_clients)
    schedule.check_work(local_steps, local_epochs)
    if stragglers is not None:
        raise ValueError(
            f"stragglers={stragglers!r} says who is late, and so do the durations of {schedule!r}. Leave stragglers "
            'out; fl.schedules.Deadline(seconds, late="partial") is their counterpart on a clock.'
        )
    hiding = next((own for own in transforms if own.hides_clients or own.needs_secure_sampling), None)
    if hiding is not None:
        raise ValueError(
            f"{type(hiding).__name__} hides who takes part in a round, and its privacy rests on how the cohort is "
            f"drawn. With {schedule!r} the speed of clients decides. Leave schedule and durations out."
        )
    if schedule.draws_cohorts:
        return
    name = type(algorithm).__name__
    remedy = "Use a schedule with cohorts, such as fl.schedules.Deadline, or another algorithm, such as 'fedavg'."
    if algorithm.aux_role == "divisor":
        raise ValueError(
            f"The step of {name} is a ratio of what clients send, all from one model and in full. Those of a round of "
            f"{schedule!r} start from different models, and the schedule may scale their changes. {remedy}"
        )
    if algorithm.aux_role == "factor" and any(transform.needs_start for transform in schedule.transforms):
        raise ValueError(
            f"{schedule!r} adds the way between two models to what a client sends, and {name} sends changes in other "
            f"units, with a side channel that gives them back. {remedy}"
        )
    if algorithm.needs_exact_deltas and schedule.transforms:
        raise ValueError(
            f"{name} is right only if the server gets the very changes that the clients have computed, and "
            f"{schedule!r} scales them. {remedy}"
        )
    if not (isinstance(cohort, Uniform) and not cohort.secure):
        raise ValueError(
            f"{schedule!r} has no cohorts, so cohort={cohort!r} would be ignored: whoever returns is taken in. "
            "Leave it out."
        )
    if aggregator.hides_reports:
        raise ValueError(
            f"{type(aggregator).__name__} sums updates that nobody sees, but those of a round of {schedule!r} start "
            "from different versions, and each has to be weighted by its age. Use a synchronous schedule, or another "
            "aggregator."
        )


def check_learning_rates(schedule: RoundSchedule | None, trainer: L.Trainer) -> None:
    """Makes sure that learning-rate schedules mean the same in a replay.

    Raises:
        MisconfigurationException: If they do not.
    """
    if isinstance(schedule, Recorded) and trainer.lr_scheduler_configs:
        with misconfiguration():
            schedule.check_learning_rates()


def check_clients(schedule: RoundSchedule, durations: Durations | None, population: Population) -> None:
    """Makes sure that schedule and durations fit the clients.

    Raises:
        MisconfigurationException: If the clients are silos, which have a clock of their own.
        ValueError: If they do not fit.
    """
    if population.silos is not None:
        raise MisconfigurationException(
            f"{schedule!r} is a simulated clock, but the clients are silos that train in real time. Leave durations "
            "out and set transport='gloo', give the coordinator's address with federation='https://...', or "
            "simulate: set num_clients, or give ClientLoaders."
        )
    schedule.check(len(population))
    if durations is not None:
        durations.check(population)
