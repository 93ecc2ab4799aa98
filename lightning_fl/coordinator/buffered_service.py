"""A coordinator whose rounds nobody waits for: each silo trains from the newest model that there is when it asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_fl.aggregation import RoundContext
from lightning_fl.communication import Message
from lightning_fl.coordinator.buffered_machine import BufferedMachine
from lightning_fl.coordinator.refused import Refused
from lightning_fl.coordinator.service import UPDATE, Coordinator
from lightning_fl.coordinator.store import OUTCOME, Upload
from lightning_fl.federation import Closing, FederationState, RankReport
from lightning_fl.federation.server import update_templates
from lightning_fl.schedules import Asynchronous
from lightning_fl.types import Tree, Update


class BufferedCoordinator(Coordinator):
    """A coordinator of a federation under :class:`~lightning_fl.schedules.Buffered` or ``FedAsync``.

    An update is of the round with whose model its silo has started, and goes into the round that is open when it comes.
    The history has, for each round, the version from which each member started: all that a replay needs.

    Args:
        settings: The federation's settings.
        expected: The settings by name that every silo must have.
        rules: When rounds open, and when one closes that has fewer updates than the schedule wants.
        store: The federation's folder.
        audit: Where every join, refusal and round is written down.
        now: The time, in seconds of a clock that never goes back.
    """

    machine: BufferedMachine

    def prepare(self) -> None:
        rules = self.rules
        assert isinstance(self.settings.schedule, Asynchronous)
        self.schedule = self.settings.schedule
        if not rules.min_silos <= self.schedule.size <= len(rules.silos):
            raise ValueError(
                f"{self.schedule!r} closes a round with {self.schedule.size} updates, but federation.yaml has "
                f"min_silos={rules.min_silos} and {len(rules.silos)} silos, and a round takes one update of each; "
                "expected min_silos <= size <= number of silos."
            )
        self.told: dict[str, str] = {}
        """For each silo that has read an outcome the model that it may be loading."""

    def load(self, now: float) -> None:
        super().load(now)
        saved = self.store.read_versions()
        if saved["round"] == self.machine.round:
            self.machine.too_stale = saved["too_stale"]

    def make_machine(self, round: int, expected: set[str]) -> BufferedMachine:
        # A version whose update has become part of a round is over, also if the process died before it wrote that.
        accepted = {silo: own[0] for silo, own in self.progress.accepted.items()}
        versions = {s: v for s, v in self.store.read_versions()["versions"].items() if v > accepted.get(s, -1)}
        size, limit = self.schedule.size, self.schedule.max_staleness
        return BufferedMachine(
            self.rules,
            round=round,
            expected=expected | versions.keys(),
            size=size,
            max_staleness=limit,
            versions=versions,
        )

    def _write_versions(self) -> None:
        machine = self.machine
        self.store.write_versions(machine.round, machine.versions, machine.too_stale)

    # ---- rounds

    def _note_member(self, silo: str) -> None:
        self._write_versions()

    def next_round(self, silo: str, after: int, now: float) -> Message | None:
        message = super().next_round(silo, after, now)
        if message is None:
            return None
        self.told.pop(silo, None)
        # Who will be in the round with this silo is not known yet, but how many at least.
        own = {"cohort": sorted(self.machine.expected - self.machine.left), "fewest": self.rules.min_silos}
        return Message({**message.fields, **own}, message.tensors)

    def outcome(self, round: int, topic: str, silo: str = "") -> Path | None:
        if topic != UPDATE:
            return super().outcome(round, topic, silo)
        # What a silo waits for is a model that holds its update, or any newer one if there is no such update.
        if self._model is None or silo in self.machine.done or round >= self.machine.round:
            return None
        self.told[silo] = self._model.shared
        return self.store.folder(self.machine.round - 1, UPDATE) / OUTCOME

    def may_read(self, digest: str) -> bool:
        return super().may_read(digest) or digest in self._models_in_use()

    def _models_in_use(self) -> set[str]:
        return {*self.progress.models.values(), *list(self.told.values())}

    def _models_to_keep(self, newest: str) -> dict[str, str]:
        machine, round = self.machine, self.machine.round + 1
        oldest = 0 if machine.max_staleness is None else round - machine.max_staleness
        training = {str(v) for silo, v in list(machine.versions.items()) if silo not in machine.done and v >= oldest}
        kept = {version: digest for version, digest in self.progress.models.items() if version in training}
        return {**kept, str(round): newest}

    def _commit(self, state: FederationState, buffers: Tree, round: int) -> None:
        model = self.files.write(state, buffers)
        self.progress = replace(self.progress, models={**self.progress.models, str(round): model.shared})
        self._save(model, round)

    def _num_awaited(self) -> int:
        return self.schedule.size

    # ---- updates

    def _place_of_update(self, silo: str, round: int, digest: str) -> Path:
        if self.machine.done.get(silo) == digest:  # the answer to an earlier call was lost
            return self.store.folder(self.machine.round, UPDATE)
        self._check_version(silo, round)
        return self.store.root / "arriving"

    def _check_version(self, silo: str, version: int) -> None:
        machine, newest = self.machine, self.machine.round - 1
        if not machine.takes(silo, version):
            raise Refused(410, f"No update of {silo!r} from version {version} is taken.", newest=newest)
        if machine.is_too_stale(silo):
            machine.drop(silo)
            self._write_versions()
            reason = (
                f"The update of {silo!r} has started from version {version}, but the newest is {machine.round}, and "
                f"the schedule has max_staleness={machine.max_staleness}."
            )
            self.audit.append("too stale", silo=silo, round=machine.round, version=version)
            raise Refused(410, reason, newest=newest)

    def is_busy(self, topic: str) -> bool:
        return topic == UPDATE and self.machine.is_busy

    def accept(self, upload: Upload, round: int | None, topic: str, now: float) -> None:
        if topic != UPDATE:
            super().accept(upload, round, topic, now)
            return
        silo, machine, version = upload.silo, self.machine, -1 if round is None else round
        self._check_version(silo, version)
        self.store.keep(upload, self.store.folder(machine.round, UPDATE))
        machine.accept(silo, upload.digest)
        self.audit.append("update accepted", silo=silo, round=machine.round, version=version, digest=upload.digest)

    def _context(self) -> RoundContext:
        return replace(super()._context(), cohort=sorted(self.machine.done))

    def _received(self, update: Update, silo: str, ctx: RoundContext) -> Update:
        """The update with the weight of its age, which only the coordinator knows."""
        version, start = self.machine.versions[silo], None
        staleness = ctx.round - version
        if staleness and any(transform.needs_start for transform in self.schedule.transforms):
            assert self._model is not None
            start = self.files.start_of(self.progress.models[str(version)])
            present = update_templates(self.settings, self._model.state.server["params"], self._model.buffers)
            ctx = replace(ctx, template=present[0])
        ctx = replace(ctx, client=silo, staleness=staleness, start=start)
        for transform in self.schedule.transforms:
            update, _ = transform.client(update, {}, ctx)
        return update

    def _aggregate(self) -> tuple[dict[str, RankReport], dict[str, str], Closing]:
        reports, digests, closing = super()._aggregate()
        machine = self.machine
        versions = {silo: machine.versions[silo] for silo in reports}
        ages = [machine.round - version for version in versions.values()]
        facts = {
            "versions": versions,
            "staleness": [ages.count(age) for age in range(max(ages, default=0) + 1)],
            "too_stale": sorted(machine.too_stale),
        }
        return reports, digests, replace(closing, facts={**closing.facts, **facts})

    def status(self, now: float) -> dict[str, Any]:
        machine = self.machine
        return {**super().status(now), "versions": dict(machine.versions), "too_stale": list(machine.too_stale)}
