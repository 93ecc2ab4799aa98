"""The gateway's answers to devices: one method per call, without sockets; the time is passed in.

It stores nothing about a device that is training: a task is signed, and names the version of the model from which the
device started. A device may send one update per version, so a task counts once, even if device or gateway restart.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from lightning_fl.aggregation import RoundContext
from lightning_fl.communication import LocalGroup, Message
from lightning_fl.coordinator import wire
from lightning_fl.coordinator.audit import AuditLog
from lightning_fl.coordinator.model_files import Model, ModelFiles
from lightning_fl.coordinator.refused import Refused
from lightning_fl.coordinator.store import Store, Upload
from lightning_fl.devices.admission import DAY_S, Admission, AdmissionRules, Refusals
from lightning_fl.devices.registry import Registry
from lightning_fl.devices.training_step import START
from lightning_fl.federation import (
    Closing,
    FederationSettings,
    RankReport,
    ServerRound,
    close_server,
    open_server,
)
from lightning_fl.federation.errors import NotFiniteError
from lightning_fl.federation.server import update_templates
from lightning_fl.files import write_whole
from lightning_fl.schedules import Asynchronous
from lightning_fl.tree import flatten, unflatten, update_trees
from lightning_fl.types import Update

PROTOCOL = 1
ROOM_FOR_FIELDS = 1 << 16
"""Bytes of an update besides its tensors and their names."""
MAX_LOSS = 1e30
"""Largest accepted loss, far below where a mean of losses overflows."""
KEPT_ROUNDS = 100
"""Number of newest rounds in the commit, which is rewritten with each update."""
KEPT_MODELS = 3
"""Number of newest models that a device may load, since a round may close between a task and the download."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LocalPlan:
    """The local training of a task.

    Args:
        step: The file of the training step; the initial parameters are in the file next to it.
        lr: Learning rate.
        batch_size: Number of examples in a step; the last batch of an epoch may be smaller.
        epochs: Passes over the device's data.
        steps: Steps instead of passes. None: passes.
        shuffle: Whether a device shuffles its examples, by seed, version, its name and the epoch.
        seed: The seed.
    """

    step: Path
    lr: float
    batch_size: int
    epochs: int = 1
    steps: int | None = None
    shuffle: bool = True
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The plan as sent to a device."""
        names = ("lr", "batch_size", "epochs", "steps", "shuffle", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass
class Progress:
    """The progress of the federation, part of a commit.

    Args:
        global_step: Optimizer steps of all devices so far.
        accepted: For each device, the newest version whose update is in the model, and the update's digest.
        updates: For each device, the times at which its updates of the last 24 hours were accepted, by the wall clock.
        history: One entry for each of the newest finished rounds; the audit log has all.
        models: Digests of the models from which devices may still train, by round, if the schedule needs them.
        over: Why the algorithm has ended before the last round; None if it has not.
    """

    global_step: int = 0
    accepted: dict[str, list[Any]] = field(default_factory=dict)
    updates: dict[str, list[float]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    over: str | None = None


@dataclass(frozen=True)
class Arrived:
    """An update that waits for its round to close.

    Args:
        version: The version of the model from which its device started.
        digest: SHA-256 of the file.
    """

    version: int
    digest: str


class _Unusable(Exception):
    """Updates that can't be in a round, each with the reason."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


class Gateway:
    """A federation of devices under :class:`~lightning_fl.schedules.Buffered` or ``FedAsync``.

    Args:
        settings: The federation's settings.
        plan: The devices' local training.
        rounds: Number of rounds.
        rules: The admission rules.
        store: The federation's folder.
        audit: The log of rounds and refusals.
        registry: The devices.
        clock: The wall clock, in seconds.

    Raises:
        ValueError: If devices can't do what the settings require.
    """

    def __init__(
        self,
        settings: FederationSettings,
        plan: LocalPlan,
        rounds: int,
        rules: AdmissionRules,
        store: Store,
        audit: AuditLog,
        registry: Registry,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_settings(settings)
        assert isinstance(settings.schedule, Asynchronous)
        self.schedule = settings.schedule
        self.plan, self.rounds, self.registry = plan, rounds, registry
        self.store, self.audit, self.clock = store, audit, clock
        self.settings = replace(settings, population=max(1, len(registry.names)))
        self.files = ModelFiles(store, self.settings)
        self.admission = Admission(rules, self._secret())
        self.refusals = Refusals()
        self.accepted = 0
        self.arrived: dict[str, Arrived] = {}
        self.downloads: dict[int, bytes] = {}
        self._training: dict[str, float] = {}
        self._lock = threading.Lock()  # updates are handled by another thread than check-ins
        self.store.disk.delete(self.store.root / "arriving")  # devices send those again
        self.load()

    def load(self) -> None:
        """Reads the federation's progress from the folder: at the start, and after a failed write."""
        self._fault: str | None = None
        commit = self.store.load()
        if not commit:
            self._begin()
            return
        self.start, self.round = commit["start"], commit["round"]
        self.progress = Progress(**commit["progress"])
        self._use(self.files.read(commit["shared"], commit["private"]))
        whole = self.store.whole(self._folder).items()
        # Assigned at once, because check-ins continue while the folder is read again.
        self.arrived = {name: self._arrived(Upload(self._folder, name, digest)) for name, digest in whole}
        if self.progress.history and not self._is_noted():
            self._note_round()
        self.audit.append("restart", round=self.round, arrived=len(self.arrived))
        self._close_full_rounds()

    def _arrived(self, upload: Upload) -> Arrived:
        try:
            version = wire.read_header(upload.ok).fields.get("version")
        except wire.BadFile:
            version = None
        # An unusable update is dropped when its round closes.
        return Arrived(version if type(version) is int else -1, upload.digest)

    @property
    def over(self) -> str | None:
        """Why no other round follows; None if one does.

        A round that can't be closed is tried again after a restart, possibly with changed settings.
        """
        done = f"All {self.rounds} rounds are done." if self.round >= self.rounds else None
        return self.progress.over or self._fault or done

    @property
    def is_over(self) -> bool:
        """Whether no other round follows."""
        return self.over is not None

    @property
    def _folder(self) -> Path:
        return self.store.folder(self.round, "update")

    # ---- requests of devices

    def who(self, authorization: str, now: float) -> str:
        """The device that makes a request.

        Args:
            authorization: The header ``Authorization``.
            now: Seconds of a monotonic clock.

        Raises:
            Refused: 401 if no device has this token, 429 if it makes too many requests.
        """
        device = self.registry.device_of(authorization.removeprefix("Bearer "))
        if device is None:
            raise Refused(401, "No device has this token.", kind="token")
        self.admission.check_rate(device, now)
        return device

    def check_in(self, device: str, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Handles a device that wants to train; returns its task, or None if it has to ask again later.

        Raises:
            Refused: 410 if the federation is over, 400 or 422 for an invalid request, 401 if the device was revoked
                meanwhile, and if :class:`~lightning_fl.devices.admission.Admission` refuses it.
        """
        self._check_known(device)
        if request.get("protocol") != PROTOCOL:
            raise Refused(422, f"The device uses protocol {request.get('protocol')!r}, the gateway {PROTOCOL}.")
        conditions = request.get("conditions", [])
        if not isinstance(conditions, list) or not all(isinstance(own, str) for own in conditions):
            raise Refused(400, "conditions is not a list of strings.")
        if self.over is not None:
            raise Refused(410, self.over, kind="over")
        wall = self.clock()
        self.admission.check_conditions(conditions)
        self.admission.check_quota(self.progress.updates.get(device, ()), wall)
        # Its next update must start from a model that contains its last one.
        if device in self.arrived or not self._starts(device, wall):
            return None
        version = self.round
        return {
            "task": self.admission.sign(device, version, wall),
            "device": device,
            "version": version,
            "rounds": self.rounds,
            "seconds": self.admission.rules.task_s,
            **self.plan.to_json(),
        }

    def _starts(self, device: str, wall: float) -> bool:
        limit = self.schedule.concurrency
        with self._lock:
            self._training = {name: until for name, until in self._training.items() if until > wall}
            may_start = limit is None or device in self._training or len(self._training) < limit
            if may_start:
                self._training[device] = wall + self.admission.rules.task_s
        return may_start

    def max_bytes(self) -> int:
        """Maximum size of an update."""
        names = sum(len(name) + 200 for name in self._shapes)
        return wire.num_bytes(self._shapes) + names + ROOM_FOR_FIELDS

    def arriving(self, device: str) -> Path:
        """The file for a device's update while it is being received."""
        return self.store.disk.make_folder(self.store.root / "arriving") / f"{device}.part"

    def receive(self, device: str, task: str, path: Path) -> dict[str, Any]:
        """Accepts an update from a file, and closes the round if it is complete.

        Returns:
            The round that contains the update.

        Raises:
            Refused: 401, 403, 409, 410, 422 or 429 if it is refused; then it has no effect.
        """
        self._check_known(device)
        version = self.admission.read(device, task, self.clock())
        digest = wire.sha256(path)
        self._check_version(device, version, digest)
        # Checked here too, because a device may have collected many tasks.
        self.admission.check_quota(self.progress.updates.get(device, ()), self.clock())
        try:
            self._read(path, version)
        except wire.BadFile as error:
            kind = "not finite" if "NaN" in str(error) else "malformed"
            raise Refused(422, f"The update is refused: {error}.", kind=kind) from error
        with self._lock:
            self._training.pop(device, None)
        self.store.disk.make_folder(self._folder)
        upload = Upload(path.parent, device, digest)
        path.rename(upload.part)
        self.store.keep(upload, self._folder)
        round = self.round
        self.arrived[device] = Arrived(version, digest)
        self.accepted += 1
        self._close_full_rounds()
        return {"round": round, "version": version, "digest": digest}

    def _check_known(self, device: str) -> None:
        if device not in self.registry:
            raise Refused(401, "This device was revoked.", kind="token")

    def _check_version(self, device: str, version: int, digest: str) -> None:
        own = self.arrived.get(device)
        last = self.progress.accepted.get(device)
        # The digest tells a device that lost the response that its own update was accepted.
        if own is not None:
            reason = f"An update of {device!r} is already waiting for round {self.round}."
            raise Refused(409, reason, kind="replay", digest=own.digest)
        if last is not None and version <= last[0]:
            reason = f"The update of {device!r} from version {last[0]} is already in the model."
            raise Refused(409, reason, kind="replay", digest=last[1])
        if self.is_over:
            raise Refused(410, "The federation is over.", kind="over")
        if version > self.round:  # the model could not be written
            raise Refused(410, f"There is no version {version}; the newest is {self.round}.", kind="stale")
        limit = self.schedule.max_staleness
        if limit is not None and self.round - version > limit:
            reason = f"The update started from version {version}, the newest is {self.round}; max_staleness is {limit}."
            raise Refused(410, reason, kind="stale")

    def _read(self, path: Path, version: int) -> tuple[Update, RankReport, float]:
        header = wire.read_header(path)
        fields = header.fields
        wire.check_shapes(self._shapes, header.shapes)
        if type(fields.get("version")) is not int or fields["version"] != version:
            raise wire.BadFile(f"its version is {fields.get('version')!r}, but its task has {version}")
        examples, steps, loss = (fields.get(name) for name in ("num_examples", "num_steps", "loss"))
        limit = self.admission.rules.max_examples
        if type(examples) is not int or not 0 < examples <= limit:
            raise wire.BadFile(f"it has num_examples {examples!r}, expected 1 to {limit}")
        if type(steps) is not int or not 0 < steps < 1 << 31:
            raise wire.BadFile(f"it has num_steps {steps!r}, expected a positive number")
        if isinstance(loss, bool) or not isinstance(loss, int | float) or not abs(loss) < MAX_LOSS:
            raise wire.BadFile(f"its loss is {loss!r}, expected a number that is neither NaN nor too large")
        trees = unflatten(wire.read(path))
        bad = wire.finite_error(flatten(trees))
        if bad is not None:
            raise wire.BadFile(f"{wire.readable(bad)!r} holds NaN or Inf")
        norm = math.hypot(*(float(own.double().norm()) for own in trees["delta"].values()))
        if norm > (most := self.admission.rules.max_norm):
            raise wire.BadFile(f"its change has norm {norm:g}, expected at most {most:g}")
        weight = self.settings.weight_of(examples)
        report = RankReport(num_clients=1, weight=weight, num_steps=steps, num_examples=examples, logger_steps=1)
        return Update(trees["delta"], {}, weight), report, float(loss)

    # ---- rounds

    def _close_full_rounds(self) -> None:
        try:
            while len(self.arrived) >= self.schedule.size and not self.is_over:
                self._close()
        except (ValueError, RuntimeError, ArithmeticError) as error:  # of the rule or the algorithm
            self._fault = (
                f"Round {self.round} can't be closed: {error} Change the strategy, or delete {self._folder}/*.ok, and "
                "start the gateway again."
            )
            self.audit.append("stopped", round=self.round, reason=self._fault)

    def _drop(self, reasons: Mapping[str, str]) -> None:
        """Drops updates of the open round; their devices may send others."""
        self.audit.append("dropped", round=self.round, reasons=dict(reasons))
        for device in reasons:
            self.store.disk.delete(Upload(self._folder, device, self.arrived[device].digest).ok)
        self.arrived = {device: own for device, own in self.arrived.items() if device not in reasons}

    def _aggregate(self) -> tuple[Closing, RankReport, list[tuple[int, float]]]:
        """The round's result, and the number of examples and the loss of each update.

        Raises:
            _Unusable: If it can't include some updates.
        """
        unusable = {device: "revoked" for device in self.arrived if device not in self.registry}
        if unusable:
            raise _Unusable(unusable)
        ctx, folder, aggregator = self._context(), self._folder, self.settings.aggregator
        params = self.model.state.server["params"]
        state, present = open_server(self.settings, self.model.state, params, ctx), Update(params)
        acc, reports, losses = aggregator.init(self._templates[-1], torch.device("cpu")), [], []
        for device in map(str, ctx.cohort):
            own = self.arrived[device]
            path = Upload(folder, device, own.digest).ok
            try:
                # Checked again, since the rules may have changed since its arrival.
                update, report, loss = self._read(path, own.version)
            except wire.BadFile as error:
                unusable[device] = str(error)
                continue
            losses.append((report.num_examples, loss))
            staleness, start = ctx.round - own.version, self._start_of(own.version)
            aged = replace(ctx, client=device, staleness=staleness, start=start, template=present)
            for transform in self.schedule.transforms:
                update, _ = transform.client(update, {}, aged)
            acc = aggregator.add(acc, update, replace(ctx, client=device))
            reports.append(report)
        if unusable:
            raise _Unusable(unusable)
        acc, _ = aggregator.merge(acc, LocalGroup(), Message(), ctx)
        joined = RankReport.join(reports)
        try:
            closing = close_server(ServerRound(self.settings, state, {}, self._templates[-1], ctx), acc, joined)
        except NotFiniteError as error:
            raise _Unusable(dict.fromkeys(self.arrived, str(error))) from error
        bad = wire.finite_error(flatten({"server": closing.state.server, "memory": closing.state.memory}))
        if bad is not None:
            raise _Unusable(dict.fromkeys(self.arrived, f"{wire.readable(bad)!r} would hold NaN or Inf"))
        return closing, joined, losses

    def _close(self) -> None:
        """Closes the round, or drops what can't be in it."""
        try:
            closing, joined, losses = self._aggregate()
        except _Unusable as error:
            self._drop(error.reasons)
            return
        ages = [self.round - own.version for own in self.arrived.values()]
        entry = {
            "round": self.round,
            "members": sorted(self.arrived),
            "versions": {device: own.version for device, own in sorted(self.arrived.items())},
            "staleness": [ages.count(age) for age in range(max(ages) + 1)],
            "num_examples": joined.num_examples,
            "num_steps": joined.num_steps,
            "train_loss": sum(count * loss for count, loss in losses) / sum(count for count, _ in losses),
            "update_norm": closing.norm,
            **closing.facts,
        }
        newest = self.files.write(closing.state, {})
        before, wall = self.progress, self.clock()
        recent = {name: [at for at in times if at > wall - DAY_S] for name, times in before.updates.items()}
        recent |= {name: [*recent.get(name, []), wall] for name in self.arrived}
        self.progress = Progress(
            before.global_step + joined.num_steps,
            {**before.accepted, **{name: [own.version, own.digest] for name, own in self.arrived.items()}},
            {name: times for name, times in recent.items() if times},
            [*before.history, entry][-KEPT_ROUNDS:],
            self._models_to_keep(newest.shared),
            closing.stop_reason,
        )
        old = self.model.shared
        self.round += 1
        self._save(newest)
        self._note_round()
        self.arrived = {}
        self.refusals.new_round()
        self.store.collect({self.start, newest.shared, newest.private, old, *self.progress.models.values()}, self.round)

    def _note_round(self) -> None:
        """Writes the last round to the audit log."""
        figures = dict(self.progress.history[-1])
        del figures["versions"]
        # One line for all members, since one line per update would cost another disk write each.
        members = {device: self.progress.accepted[device] for device in figures.pop("members")}
        number = figures.pop("round")
        self.audit.append("round closed", round=number, members=members, state=self.model.shared, figures=figures)

    def _is_noted(self) -> bool:
        # The process may have died between the commit and the line about it.
        if not self.audit.path.exists():
            return False
        rounds = (line for line in reversed(self.audit.path.read_bytes().splitlines()) if b'"round closed"' in line)
        found = (json.loads(line) for line in rounds)
        return next((line["round"] for line in found if line["event"] == "round closed"), -1) == self.round - 1

    def _context(self) -> RoundContext:
        members = sorted(self.arrived)
        settings = self.settings = replace(self.settings, population=max(len(self.registry.names), len(members), 1))
        return RoundContext(
            self.round,
            members,
            settings.population,
            seed=settings.seed,
            templates=self._templates,
            memory=self.model.state.memory,
        )

    @property
    def _needs_start(self) -> bool:
        return any(transform.needs_start for transform in self.schedule.transforms)

    def _start_of(self, version: int) -> Update | None:
        if version == self.round or not self._needs_start:
            return None
        return self.files.start_of(self.progress.models[str(version)])

    def _models_to_keep(self, newest: str) -> dict[str, str]:
        if not self._needs_start:
            return {}
        oldest = self.round + 1 - (self.schedule.max_staleness or 0)
        kept = {version: digest for version, digest in self.progress.models.items() if int(version) >= oldest}
        return {**kept, str(self.round + 1): newest}

    # ---- the model

    def _begin(self) -> None:
        params = load_file(self.plan.step.with_suffix(START))
        self.start = self.store.write_state(flatten({"params": params, "buffers": {}, "rest": {}}))
        self.round, self.progress = 0, Progress()
        model = self.files.write(self.files.begin(params), {})
        if self._needs_start:
            self.progress.models["0"] = model.shared
        self._save(model)
        self.audit.append("start", digest=self.start)

    def _save(self, model: Model) -> None:
        self.files.commit(model, self.round, self.start, self.progress)
        self._use(model)

    def _use(self, model: Model) -> None:
        self.model, params = model, model.state.server["params"]
        self._templates = update_templates(self.settings, params, {})
        self._shapes = wire.shapes_of(flatten(update_trees(self._templates[-1])))
        newest = {**self.downloads, self.round: save({name: own.contiguous() for name, own in params.items()})}
        self.downloads = dict(sorted(newest.items())[-KEPT_MODELS:])

    def _secret(self) -> bytes:
        """The key that signs tasks; it survives a restart, so that devices that are training are not refused."""
        path = self.store.root / "secret"
        if not path.exists():
            write_whole(path, secrets.token_bytes(32))
        return path.read_bytes()

    # ---- other

    def refuse(self, device: str | None, refused: Refused) -> None:
        """Counts a refusal, and logs it if it is the first of its kind for this device in the round."""
        if refused.facts.get("kind") == "over":  # a normal answer
            return
        if self.refusals.note(device, refused.facts):
            self.audit.append("refused", device=device, kind=refused.facts.get("kind"), reason=str(refused)[:500])

    def status(self) -> dict[str, Any]:
        """The state of the federation for its operators."""
        wall = self.clock()
        with self._lock:
            training = sum(until > wall for until in self._training.values())
        return {
            "round": self.round,
            "rounds": self.rounds,
            "is_over": self.is_over,
            "devices": len(self.registry.names),
            "training": training,
            "arrived": len(self.arrived),
            "wanted": self.schedule.size,
            "accepted": self.accepted,
            "refused": dict(self.refusals.counts),
            "last": self.progress.history[-1] if self.progress.history else None,
        }


def check_settings(settings: FederationSettings) -> None:
    """Checks that devices, which can only run training steps, can do what the settings require.

    Raises:
        ValueError: If they can't.
    """
    from lightning_fl.algorithms import Algorithm

    if not isinstance(settings.schedule, Asynchronous):
        raise ValueError(
            f"The schedule is {settings.schedule!r}, but a gateway can't wait for single devices. Set it to "
            "Buffered(size), which is {class_path: Buffered, init_args: {size: 10}} in YAML."
        )
    if any(transform.needs_start for transform in settings.schedule.transforms) and (
        settings.schedule.max_staleness is None
    ):
        raise ValueError(f"{settings.schedule!r} needs the models from which devices started. Set max_staleness.")
    own = type(settings.algorithm)
    on_clients = [
        name
        for name in (
            "client_init",
            "client_finish",
            "phases",
            "grad_transform",
            "delta_like",
            "aux_like",
            "aux_of_clients",
        )
        if getattr(own, name) is not getattr(Algorithm, name)
    ]
    if on_clients or own.probe or own.keeps_client_state or own.keeps_nodes:
        raise ValueError(
            f"Clients of {own.__name__} do more than training steps ({', '.join(on_clients) or 'a probe'}), which "
            "devices can't. Use a server-side algorithm, such as FedAvg, FedAvgM or FedAdam."
        )
    if settings.transforms:
        names = ", ".join(type(transform).__name__ for transform in settings.transforms)
        raise ValueError(f"{names} would have to run on the devices, which is not supported. Leave transforms out.")
    aggregator = settings.aggregator
    if aggregator.hides_reports:
        raise ValueError("Secure aggregation needs devices that mask their updates, which is not supported yet.")
    if aggregator.needs_server or aggregator.moves_frozen:
        raise ValueError(
            f"{aggregator!r} needs the module, which the gateway does not have. Use the mean or a rule on updates."
        )
    aggregator.check(settings.algorithm)
    aggregator.check_cohort(settings.schedule.size)
