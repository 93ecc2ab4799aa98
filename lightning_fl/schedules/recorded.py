"""Replays the rounds of a federation over a network in one process."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_fl.aggregation import Transform
from lightning_fl.clients.durations import NANOSECONDS
from lightning_fl.schedules.clock import Clients, Clock, Flush, Job, Visit
from lightning_fl.schedules.schedule import RoundSchedule


@dataclass(frozen=True)
class Recorded(RoundSchedule):
    """Replays a coordinator's record: which silos were in each round, and from which version each started.

    With the silos' data in one place, as ``ClientLoaders`` with the silos' names, the result is the federation's model.
    Each round takes one second on the clock.

    Args:
        folder: The coordinator's folder.
        schedule: The schedule of the federation, for the weights of stale updates. None: it had none.

    """

    folder: str
    schedule: RoundSchedule | None = None

    draws_cohorts = False
    needs_durations = False
    seeds_by_version = True

    @cached_property
    def rounds(self) -> list[list[Visit]]:
        """The visits of each round.

        Raises:
            ValueError: If the folder is not that of a coordinator.
        """
        path = Path(self.folder) / "state.json"
        try:
            history = json.loads(path.read_text(encoding="utf-8"))["progress"]["history"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} can't be read: {error}. Expected the folder of a coordinator.") from error
        return [_visits(entry) for entry in history]

    def check(self, num_clients: int) -> None:
        """See :meth:`RoundSchedule.check`."""
        _ = self.rounds

    def check_learning_rates(self) -> None:
        """Checks that learning-rate schedules by round saw the same round numbers as in this replay.

        Raises:
            ValueError: If they did not.
        """
        if any(visit.version != index for index, visits in enumerate(self.rounds) for visit in visits):
            raise ValueError(
                "At a silo, a learning-rate schedule followed the version from which the silo trained; here it would "
                "follow the round that aggregates the update. A federation with stale updates can only be replayed "
                "without a learning-rate schedule."
            )

    def check_work(self, local_steps: object, local_epochs: object = None) -> None:
        """See :meth:`RoundSchedule.check_work`."""
        for name, work in (("local_steps", local_steps), ("local_epochs", local_epochs)):
            if not (work is None or isinstance(work, int)):
                raise ValueError(
                    f"{self!r} can't replay {name}={work!r}, because each silo drew its amount of work itself. Use a "
                    "fixed number."
                )

    @property
    def transforms(self) -> Sequence[Transform]:
        """See :attr:`RoundSchedule.transforms`."""
        return () if self.schedule is None else self.schedule.transforms

    def clients_per_round(self, given: int | float | None) -> int | float | None:
        """See :meth:`RoundSchedule.clients_per_round`."""
        if given is not None:
            raise ValueError(f"The cohorts are recorded, so clients_per_round={given} would be ignored. Leave it out.")
        return None

    def next(self, clock: Clock, clients: Clients) -> tuple[Flush, Clock]:
        """See :meth:`RoundSchedule.next`."""
        index = clock.version
        if index >= len(self.rounds):
            raise ValueError(
                f"{self.folder} records {len(self.rounds)} rounds, but round {index} was requested. Set "
                f"max_epochs={len(self.rounds)}."
            )
        strangers = {visit.client for visit in self.rounds[index]} - set(clients.population.ids)
        if strangers:
            raise ValueError(
                f"Round {index} of {self.folder} has the silos {sorted(map(str, strangers))}, which have no loader "
                f"here; there are {list(clients.population.ids)}. Give ClientLoaders with the silos' names."
            )
        time = clock.time + NANOSECONDS
        # Visits that have started and are aggregated later: their versions must be kept.
        later = [visit for visits in self.rounds[index + 1 :] for visit in visits if visit.version <= index]
        training = tuple(Job(visit.client, visit.version, time) for visit in later)
        return Flush(time, self.rounds[index]), replace(clock, time=time, version=index + 1, training=training)


def _visits(entry: dict[str, Any]) -> list[Visit]:
    versions = entry.get("versions", {})
    return [Visit(silo, versions.get(silo, entry["round"])) for silo in entry["members"]]
