"""What the coordinator answers: one method a call, without sockets. The time is passed in.

It joins the state machine, the folder and the server's half of the mathematics: the same ``close_server`` that every
other federation runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightning_fl
from lightning_fl.aggregation import RoundContext
from lightning_fl.aggregation.weighted_mean import WeightedSum
from lightning_fl.communication import LocalGroup, Message
from lightning_fl.coordinator import wire
from lightning_fl.coordinator.audit import AuditLog
from lightning_fl.coordinator.machine import Exchange, RoundMachine, Rules
from lightning_fl.coordinator.model_files import Model, ModelFiles
from lightning_fl.coordinator.refused import Refused
from lightning_fl.coordinator.report_check import check_evaluation, read_report
from lightning_fl.coordinator.store import OUTCOME, Store, Upload
from lightning_fl.federation import (
    Closing,
    FederationSettings,
    FederationState,
    RankReport,
    ServerRound,
    close_server,
    open_server,
)
from lightning_fl.federation.agreement import differences, several
from lightning_fl.federation.server import nothing, update_templates
from lightning_fl.tree import SEPARATOR, flatten, unflatten, update_trees
from lightning_fl.types import Tree, Update

PROTOCOL = 1
MAX_REPORT_BYTES = 1 << 26
"""64 MiB: what a silo may send beside its update, such as the states of metrics."""
START = "start"
UPDATE = "update"
EVALUATION = "evaluation"
MAX_REASON = 2000
"""Characters of a reason in the audit log."""
_TOPIC = re.compile(r"[a-z]{1,32}(\.[0-9]{1,6}(\.[a-z]{1,32})?)?")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass
class Progress:
    """What silos need to catch up, and what people want to see.

    Args:
        global_step: Optimizer steps of all silos so far.
        logger_steps: How far the loggers' x-axis has come.
        members: Who took part in the last round.
        accepted: For each silo the last round in which it took part, and the digest of what it sent.
        history: One entry for each finished round.
        over: Why no other round follows, before the last one.
        models: Where rounds are asynchronous, the digests of the models from which silos train, by round.
    """

    global_step: int = 0
    logger_steps: int = 0
    members: list[str] = field(default_factory=list)
    accepted: dict[str, list[Any]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    over: str | None = None
    models: dict[str, str] = field(default_factory=dict)


class Coordinator:
    """A federation's coordinator.

    Args:
        settings: The federation's settings; their population is the number of silos.
        expected: The settings by name that every silo must have.
        rules: When rounds open and close.
        store: The federation's folder.
        audit: Where every join, refusal and round is written down.
        now: The time, in seconds of a clock that never goes back.
    """

    def __init__(
        self,
        settings: FederationSettings,
        expected: Mapping[str, str],
        rules: Rules,
        store: Store,
        audit: AuditLog,
        now: float = 0.0,
    ) -> None:
        self.settings = replace(settings, population=len(rules.silos))
        self.expected = dict(expected)
        self.rules = rules
        self.store = store
        self.files = ModelFiles(store, self.settings)
        self.audit = audit
        self.seen: dict[str, float] = {}
        self._joined: dict[str, int] = {}
        """By silo the round in which it has joined last: it knows nothing of those before."""
        self._template: Update | None = None
        self._templates: list[Update] = []
        self._shapes: wire.Shapes = {}
        self._said: set[str] = set()
        self.prepare()
        self.load(now)

    def prepare(self) -> None:
        """Looks at settings and rules before anything is read or written.

        Raises:
            ValueError: If they don't go together.
        """

    def load(self, now: float) -> None:
        """Reads from its folder how far the federation is: at the start, and when a change could not be written."""
        self.exchanges: dict[tuple[int, str], Exchange] = {}
        self.start: str | None = None
        self.manifest: wire.Shapes = {}
        self.common: dict[str, str] = {}
        self.progress = Progress()
        self.machine = self.make_machine(0, set())
        self._model: Model | None = None
        commit = self.store.load()
        if not commit:
            return
        self.start = commit["start"]
        self._read_start()
        self.progress = Progress(**commit["progress"])
        self._use(self.files.read(commit["shared"], commit["private"]))
        round = commit["round"]
        self.machine = self.make_machine(round, set(self.progress.members) & set(self.rules.silos))
        cohort = self.store.read_cohort(round)
        if self.progress.over is not None:
            self.machine.phase = "over"
        elif cohort is None:
            self.store.forget_updates(round)
        elif self.machine.phase != "over":
            silos, age = cohort
            self.machine.resume(silos, self.store.whole(self.store.folder(round, UPDATE)), now, age)
        for folder in self.store.folder(round - 1).glob("*.*"):
            if folder.is_dir() and is_exchange(folder.name) and not (folder / OUTCOME).exists():
                exchange = self._exchange(round - 1, folder.name)
                for silo, digest in self.store.whole(folder).items():
                    exchange.accept(silo, digest, now)
        self.audit.append("restart", round=round, phase=self.machine.phase, cohort=sorted(self.machine.cohort))

    def make_machine(self, round: int, expected: set[str]) -> RoundMachine:
        """The state machine of the rounds from ``round`` on."""
        return RoundMachine(self.rules, round=round, expected=expected)

    # ---- joining

    def join(self, silo: str, request: Mapping[str, Any], now: float) -> dict[str, Any]:
        """A silo introduces itself.

        Raises:
            Refused: 403 if it is not of this federation, 422 if it would train something else.
        """
        try:
            self._check_join(silo, request)
        except Refused as refused:
            self.audit.append("join refused", silo=silo, reason=str(refused)[:MAX_REASON])
            raise
        self.seen[silo] = now
        self.machine.join(silo)
        self._joined[silo] = self.machine.round
        for (round, _), exchange in self.exchanges.items():
            if round < self.machine.round:
                exchange.expected.discard(silo)
        self.audit.append("join", silo=silo, round=self.machine.round, versions=_short(request.get("versions")))
        return {
            "silos": sorted(self.rules.silos),
            "rounds": self.rules.rounds,
            "round": self.machine.round,
            "start": self.start,
            "accepted": self.progress.accepted.get(silo),
            "already_sent": self.machine.done.get(silo),
            "max_report_bytes": MAX_REPORT_BYTES,
            "evaluation_s": self.rules.evaluation_s,
        }

    def _check_join(self, silo: str, request: Mapping[str, Any]) -> None:
        if silo not in self.rules.silos:
            raise Refused(403, f"{silo!r} is not among the silos of federation.yaml.")
        if request.get("protocol") != PROTOCOL:
            raise Refused(
                422,
                f"Silo {silo!r} speaks protocol {request.get('protocol')!r}, the coordinator {PROTOCOL}: install "
                "the same version of lightning_fl.",
            )
        found, common = request.get("settings"), request.get("common")
        if not isinstance(found, Mapping) or not isinstance(common, Mapping):
            raise Refused(422, f"Silo {silo!r} sent no settings.")
        who, versions, present = f"silo {silo}", request.get("versions"), lightning_fl.__version__
        release = versions.get("lightning_fl", present) if isinstance(versions, Mapping) else present
        unlike = differences({"lightning_fl": present}, {"lightning_fl": release}, who, "the coordinator")
        known = {name: found.get(name) for name in self.expected}
        unlike += differences(self.expected, known, who, "the coordinator")
        if self.start is not None:
            unlike += differences(self.common, common, who, "the silo that came first")
        if unlike:
            raise Refused(422, f"{who.capitalize()} is set up to train something else: {several(unlike)}.")
        try:
            manifest = {n: (str(dtype), tuple(shape)) for n, (dtype, shape) in request["manifest"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Refused(422, f"Silo {silo!r} sent no manifest of its model.") from error
        if self.start is not None:
            try:
                wire.check_shapes(self.manifest, manifest)
            except wire.BadFile as error:
                raise Refused(422, f"The model of silo {silo!r} is another one: {error}.") from error

    # ---- rounds

    def next_round(self, silo: str, after: int, now: float) -> Message | None:
        """A silo asks for the round after ``after``; None if it is to ask again later.

        Raises:
            Refused: 410 if no other round follows, 409 if the silo is ahead.
        """
        self.seen[silo] = now
        machine = self.machine
        if after >= machine.round:
            raise Refused(
                409,
                f"Silo {silo!r} has finished round {after}, but the coordinator is at round {machine.round}. Has its "
                "folder been lost? Give it back, or start the silo without its checkpoint and state folder.",
            )
        if self._model is None:
            return None
        facts = {"global_step": self.progress.global_step, "logger_steps": self.progress.logger_steps}
        if machine.phase == "over":
            reason = self.progress.over or f"All {self.rules.rounds} rounds are done."
            raise Refused(410, reason, over=True, round=machine.round, state=self._model.shared, facts=facts)
        if machine.ask(silo, now):
            self._note_member(silo)
        if machine.phase != "training" or silo not in machine.cohort:
            return None
        states = [
            {key: state[key] for key in transform.client_keys if key in state}
            for transform, state in zip(self.settings.transforms, self._model.state.transforms, strict=True)
        ]
        fields = {
            "round": machine.round,
            "cohort": sorted(machine.cohort),
            "fewest": max(self.rules.min_silos, machine.fewest(len(machine.cohort))),
            "seconds_left": machine.closes_at - now,
            "state": self._model.shared,
            "already_sent": machine.done.get(silo),
            "accepted": self.progress.accepted.get(silo),
            "facts": facts,
        }
        return Message(fields, flatten({str(index): state for index, state in enumerate(states)}))

    def _note_member(self, silo: str) -> None:
        """Writes down that a silo has become a member of the open round, before it is told."""
        self.store.write_cohort(self.machine.round, self.machine.cohort)
        self.audit.append("late join", silo=silo, round=self.machine.round)

    def step(self, now: float) -> bool:
        """Does what is due; returns whether the open round is to be closed."""
        due = self.machine.due(now)
        for (round, topic), exchange in list(self.exchanges.items()):
            if exchange.due(now, self.machine.left):
                self._close_exchange(round, topic, exchange, now)
        if due == "open" and self._has_space():
            self._open(now)
        machine = self.machine
        if machine.phase == "training" and now >= machine.closes_at and machine.lacks:
            self._say(f"Round {machine.round} is over its deadline and waits for {machine.lacks} more silos.")
        if machine.phase == "gathering" and machine.asked and now >= machine.gather_until and machine.lacks:
            self._say(f"Round {machine.round} can't open: it waits for {machine.lacks} more silos.")
        return due == "close"

    def _open(self, now: float) -> None:
        assert self._model is not None
        machine, model = self.machine, self._model
        try:
            opened = open_server(self.settings, model.state, model.state.server["params"], self._context())
        except Exception as error:  # a transform that must not take part any more, such as a spent privacy budget
            self._end(str(error))
            return
        # What a round spends stays spent, whatever becomes of it: written down before any silo knows of the round.
        if self.settings.transforms:
            self._commit(opened, model.buffers, machine.round)
        self.store.write_cohort(machine.round, machine.asked)
        machine.open(now)
        self.audit.append("round opened", round=machine.round, cohort=sorted(machine.cohort))

    def begin_close(self) -> None:
        """Takes nothing more in for the open round."""
        self.machine.begin_close()

    def close(self) -> None:
        """Adds up the round's updates and makes the result the federation's model."""
        assert self._model is not None
        machine, model = self.machine, self._model
        reports, digests, closing = self._aggregate()
        joined = RankReport.join(list(reports.values()))
        progress = self.progress
        members = sorted(reports)
        lost = machine.lost(members)
        entry = {
            "round": machine.round,
            "members": members,
            "lost": lost,
            "refused": machine.refused,
            "num_examples": joined.num_examples,
            "num_steps": joined.num_steps,
            "update_norm": closing.norm,
            **closing.facts,
        }
        newest = self.files.write(closing.state, closing.buffers)
        shared = newest.shared
        self.progress = Progress(
            global_step=progress.global_step + joined.num_steps,
            logger_steps=progress.logger_steps + joined.logger_steps,
            members=members,
            accepted={**progress.accepted, **{silo: [machine.round, digests[silo]] for silo in members}},
            history=[*progress.history, entry],
            over=closing.stop_reason,
            models=self._models_to_keep(shared),
        )
        fields = {
            "round": machine.round,
            "members": members,
            "digests": digests,
            "accepted": self.progress.accepted,
            "lost": lost,
            "refused": machine.refused,
            "state": shared,
            "reports": [reports[silo].to_message().fields for silo in members],
            "weight": closing.aggregate.weight,
            "num_clients": closing.aggregate.num_clients,
            "norm": closing.norm,
            "facts": dict(closing.facts),
            "stop_reason": closing.stop_reason,
        }
        tensors = flatten({silo: reports[silo].tensors for silo in members})
        self.store.write_outcome(self.store.folder(machine.round, UPDATE), tensors, fields)
        self._save(newest, machine.round + 1)
        self.audit.append(
            "round closed", round=machine.round, members=digests, lost=lost, refused=machine.refused, state=shared
        )
        machine.closed(is_last=closing.stop_reason is not None)
        self.exchanges = {key: value for key, value in self.exchanges.items() if key[0] >= machine.round - 1}
        self.store.collect(
            {self.start or "", shared, newest.private, model.shared, *self._models_in_use()}, machine.round
        )

    def _aggregate(self) -> tuple[dict[str, RankReport], dict[str, str], Closing]:
        """The reports and digests of those whose update was accepted, and what the round has become."""
        assert self._model is not None
        assert self._template is not None
        aggregator, ctx, round = self.settings.aggregator, self._context(), self.machine.round
        digests = dict(sorted(self.machine.done.items()))
        acc, reports = self._in_file(aggregator.init(self._template, torch.device("cpu"))), {}
        for silo, digest in digests.items():  # in the order of their names, as one process trains them
            path = Upload(self.store.folder(round, UPDATE), silo, digest).ok
            update, reports[silo] = self._read_update(silo, path)
            if update is not None:
                acc = aggregator.add(acc, self._received(update, silo, ctx), replace(ctx, client=silo))
        acc, _ = aggregator.merge(acc, _Alone(), Message(), ctx)
        opened = ServerRound(self.settings, self._model.state, self._model.buffers, self._template, ctx)
        joined = RankReport.join(list(reports.values()))
        if joined.num_clients or self.settings.hides_clients:
            return reports, digests, close_server(opened, acc, joined)
        # Every silo has refused its own update, and will say so: the model stays.
        return reports, digests, Closing(self._model.state, self._model.buffers, nothing(opened), 0.0, {}, None)

    def _in_file(self, acc: Any) -> Any:
        """The accumulator with its sums in a file, so that of a large model less has to be in memory."""
        if not isinstance(acc, WeightedSum):
            return acc
        sums = {dtype: self.store.zeros_like(flat) for dtype, flat in acc.sums.items()}
        return replace(acc, sums=sums, views=acc.layout.unflatten(sums))

    def _received(self, update: Update, silo: str, ctx: RoundContext) -> Update:
        """What of an update is added."""
        return update

    def _models_to_keep(self, newest: str) -> dict[str, str]:
        """The models of which a round that closes leaves the files, by round, beside the last two."""
        return {}

    def _models_in_use(self) -> set[str]:
        """Digests of models beside the last two that silos may still read."""
        return set()

    def _context(self) -> RoundContext:
        cohort = sorted(self.machine.cohort or self.machine.asked)
        settings = self.settings
        return RoundContext(
            self.machine.round,
            cohort,
            settings.population,
            settings.sampling,
            seed=settings.seed,
            templates=self._templates,
            memory={} if self._model is None else self._model.state.memory,
        )

    # ---- uploads

    @property
    def max_update_bytes(self) -> int:
        """The most bytes that an update may have."""
        return wire.num_bytes(self._shapes) + wire.MAX_HEADER_BYTES + MAX_REPORT_BYTES

    def target(self, silo: str, round: int | None, topic: str, digest: str, length: int) -> Upload:
        """Where a file that a silo sends goes.

        Raises:
            Refused: 400 for names that are none, 404, 410 if it comes too late, 413 if it is too large.
        """
        check_names(topic, digest)
        limit = MAX_REPORT_BYTES
        if topic == START:
            folder = self.store.root / "states" / "incoming"
            if self.start is not None:
                raise Refused(410, "The federation has its start already.", start=self.start)
            limit = 1 << 40
        elif topic == UPDATE:
            folder = self._place_of_update(silo, -1 if round is None else round, digest)
            limit = self.max_update_bytes
        else:
            if round != self.machine.round - 1 or silo not in self.rules.silos:
                raise Refused(410, f"Round {round} takes no {topic} any more.", newest=self.machine.round - 1)
            if self._exchange(round, topic).is_over:
                raise Refused(410, f"The {topic} of round {round} is over.", newest=self.machine.round - 1)
            self._check_topic(round, topic)
            folder = self.store.folder(round, topic)
        if not 0 < length <= limit:
            raise Refused(413, f"Silo {silo!r} wants to send {length} bytes; at most {limit} are taken.")
        self.store.disk.make_folder(folder)
        upload = Upload(folder, silo, digest)
        for other in folder.glob(f"{silo}.*.part"):
            if other != upload.part:
                self.store.disk.delete(other)
        return upload

    def _check_topic(self, round: int, topic: str) -> None:
        """Makes sure that silos do not fill the disk with exchanges that nobody waits for.

        Raises:
            Refused: 400 for another topic than those that silos exchange, or if the exchange before it is not over.
        """
        name, _, number = topic.partition(".")
        if name != EVALUATION or not number.isdigit():
            raise Refused(400, f"Silos exchange no {topic}.")
        before = self.store.folder(round, f"{name}.{int(number) - 1}") / OUTCOME
        if int(number) and not before.exists():
            raise Refused(400, f"The exchange before {topic} is not over.")

    def _place_of_update(self, silo: str, round: int, digest: str) -> Path:
        """The folder into which an update comes.

        Raises:
            Refused: 410 if it comes too late.
        """
        if self.machine.done.get(silo) != digest and not self.machine.takes(silo, round):
            raise Refused(410, f"Round {round} takes no update of {silo!r}.", newest=self.machine.round - 1)
        return self.store.folder(self.machine.round, UPDATE)

    def is_busy(self, topic: str) -> bool:
        """Whether a file that has come whole has to wait before it is taken in."""
        return False

    def progressed(self, silo: str, now: float) -> None:
        """A piece of a file has come."""
        self.seen[silo] = now
        self.machine.progress(silo, now)

    def check(self, upload: Upload, topic: str) -> None:
        """Looks at a file that has come whole.

        Raises:
            Refused: 422 if it is not what it has to be; silo and field are named.
        """
        try:
            if wire.sha256(upload.part) != upload.digest:
                raise wire.BadFile("its bytes are not those that were announced")
            header = wire.read_header(upload.part)
            if topic == START:
                self._check_start(upload, header)
            else:
                self._check_content(upload, topic, header)
        except wire.BadFile as error:
            self.store.disk.delete(upload.part)
            raise Refused(422, f"What silo {upload.silo!r} has sent as its {topic} is refused: {error}.") from error

    def _check_content(self, upload: Upload, topic: str, header: wire.Header) -> None:
        if topic == UPDATE:
            self._read_update(upload.silo, upload.part)
            return
        tensors, message = wire.read(upload.part), header.fields.get("message")
        if not isinstance(message, dict):
            raise wire.BadFile("it holds no message")
        check_evaluation(message, tensors)

    def accept(self, upload: Upload, round: int | None, topic: str, now: float) -> None:
        """Takes in a file that is sound.

        Raises:
            Refused: 410 if it has become too late meanwhile.
        """
        if topic == START:
            if self.start is None:
                self._begin(upload)
            return
        if topic == UPDATE:
            if not self.machine.takes(upload.silo, -1 if round is None else round):
                raise Refused(410, f"Round {round} takes no update any more.", newest=self.machine.round - 1)
            self.store.keep(upload)
            self.machine.accept(upload.silo, upload.digest)
            self.audit.append("update accepted", silo=upload.silo, round=round, digest=upload.digest)
            return
        assert round is not None
        exchange = self._exchange(round, topic)
        if exchange.is_over:
            raise Refused(410, f"The {topic} of round {round} is over.", newest=self.machine.round - 1)
        self.store.keep(upload)
        exchange.accept(upload.silo, upload.digest, now)

    def refuse(self, upload: Upload, topic: str, reason: str) -> None:
        """Notes that a file was refused."""
        if topic == UPDATE:
            self.machine.refuse(upload.silo, reason)
        self.audit.append("refused", silo=upload.silo, topic=topic, reason=reason)

    def _read_update(self, silo: str, path: Any) -> tuple[Update | None, RankReport]:
        header = wire.read_header(path)
        # Names of tensors of the report begin with it; all others are the update's.
        is_report = {name: name.startswith(f"report{SEPARATOR}") for name in header.shapes}
        own = {name: shape for name, shape in header.shapes.items() if is_report[name]}
        if wire.num_bytes(own) > MAX_REPORT_BYTES:
            raise wire.BadFile(f"its report has {wire.num_bytes(own)} bytes, at most {MAX_REPORT_BYTES} are taken")
        weight = header.fields.get("weight")
        has_update = weight is not None
        if has_update:
            wire.check_shapes(self._shapes, {n: s for n, s in header.shapes.items() if not is_report[n]})
            if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
                raise wire.BadFile(f"its weight is {weight!r}, expected a positive number")
            if self.settings.weighting == "uniform" and weight != 1:
                raise wire.BadFile(f"its weight is {weight!r}, but all clients weigh 1")
        elif not all(is_report.values()):
            raise wire.BadFile("it holds tensors without a weight")
        trees = unflatten(wire.read(path))
        tensors = trees.pop("report", {})
        update = None
        if has_update:
            bad = wire.finite_error(flatten(trees))
            if bad is not None:
                raise wire.BadFile(f"{wire.readable(bad)!r} holds NaN or Inf")
            aux = {name.removeprefix("aux/"): tree for name, tree in trees.items() if name.startswith("aux/")}
            update = Update(trees.get("delta", {}), trees.get("buffers", {}), float(weight or 0), aux)
        fields = header.fields.get("report")
        if not isinstance(fields, dict):
            raise wire.BadFile("it holds no report")
        counted = {**fields, "num_clients": int(has_update), "weight": float(weight or 0)}
        report = read_report(Message(counted, tensors), silo)
        return update, report

    # ---- exchanges after a round

    def _exchange(self, round: int, topic: str) -> Exchange:
        key = round, topic
        if key not in self.exchanges:
            expected = {silo for silo in self.progress.members if self._joined.get(silo, 0) <= round}
            self.exchanges[key] = Exchange(expected, self.rules.evaluation_s)
        return self.exchanges[key]

    def _close_exchange(self, round: int, topic: str, exchange: Exchange, now: float) -> None:
        folder, messages, tensors = self.store.folder(round, topic), [], {}
        members = sorted(exchange.done)
        for silo in members:
            path = Upload(folder, silo, exchange.done[silo]).ok
            messages.append(wire.read_header(path).fields["message"])
            tensors[silo] = wire.read(path)
        self.store.write_outcome(folder, flatten(tensors), {"members": members, "messages": messages})
        exchange.is_over = True

    def outcome(self, round: int, topic: str, silo: str = "") -> Path | None:
        """The file with what a round, or an exchange after it, has become; None before it is there.

        Raises:
            Refused: 410 if it is too long ago, 400 for names that are none.
        """
        check_names(topic)
        if topic == UPDATE and round >= self.machine.round:
            return None
        path = self.store.folder(round, topic) / OUTCOME
        if path.exists():
            return path
        if topic == UPDATE or round < self.machine.round - 1:
            raise Refused(410, f"The outcome of round {round} is gone.", newest=self.machine.round - 1)
        return None

    def may_read(self, digest: str) -> bool:
        """Whether silos may load a state."""
        return self._model is not None and digest in (self.start, self._model.shared)

    # ---- the model

    def _check_start(self, upload: Upload, header: wire.Header) -> None:
        if any(name.count(SEPARATOR) != 1 for name in header.shapes):
            raise wire.BadFile("its tensors are nested")
        tensors = unflatten(wire.read(upload.part))
        if not isinstance(header.fields.get("common"), dict):
            raise wire.BadFile("it says nothing of its settings")
        if not tensors.get("params") or not tensors.keys() <= {"params", "buffers", "rest"}:
            raise wire.BadFile("it holds no parameters")
        bad = wire.finite_error(flatten({"params": tensors["params"]}))
        if bad is not None:
            raise wire.BadFile(f"{wire.readable(bad)!r} holds NaN or Inf")

    def _begin(self, upload: Upload) -> None:
        """Takes a silo's model as the one from which all begin."""
        with upload.part.open("rb"):
            self.store.disk.replace(upload.part, self.store.state_path(upload.digest))
        tensors = unflatten(self.store.read_state(upload.digest))
        state = self.files.begin(tensors["params"])
        self.start = upload.digest
        self._read_start()
        self._commit(state, tensors.get("buffers", {}), 0)
        self.audit.append("start", silo=upload.silo, digest=upload.digest)

    def _read_start(self) -> None:
        assert self.start is not None
        header = wire.read_header(self.store.state_path(self.start))
        self.manifest, self.common = header.shapes, header.fields["common"]

    def _commit(self, state: FederationState, buffers: Tree, round: int) -> None:
        self._save(self.files.write(state, buffers), round)

    def _save(self, model: Model, round: int) -> None:
        self.files.commit(model, round, self.start, self.progress)
        self._use(model)

    def _use(self, model: Model) -> None:
        self._model = model
        if self._template is None:
            self._templates = update_templates(self.settings, model.state.server["params"], model.buffers)
            self._template = self._templates[-1]
            self._shapes = wire.shapes_of(flatten(update_trees(self._template)))

    # ---- other

    def leave(self, silo: str, reason: str) -> None:
        """A silo leaves."""
        self.machine.leave(silo)
        self.audit.append("leave", silo=silo, round=self.machine.round, reason=reason[:200])

    def alive(self, silo: str, now: float) -> int:
        """A silo says that it is there; returns the round."""
        self.seen[silo] = now
        return self.machine.round

    def status(self, now: float) -> dict[str, Any]:
        """What people want to see."""
        machine = self.machine
        return {
            "round": machine.round,
            "rounds": self.rules.rounds,
            "phase": machine.phase,
            "cohort": sorted(machine.cohort),
            "sent": sorted(machine.done),
            "refused": machine.refused,
            "lacks": machine.lacks,
            "seconds_left": max(0.0, machine.closes_at - now) if machine.phase == "training" else None,
            "seen": {silo: now - self.seen[silo] if silo in self.seen else None for silo in self.rules.silos},
            "last": self.progress.history[-1] if self.progress.history else None,
        }

    def _has_space(self) -> bool:
        """Whether the updates of a round and the next state fit onto the disk."""
        needed = wire.num_bytes(self._shapes) * (self._num_awaited() + 2)
        free = self.store.free_bytes()
        if free < needed:
            self._say(f"Round {self.machine.round} needs {needed} bytes of disk, but {free} are free: it waits.")
        return free >= needed

    def _num_awaited(self) -> int:
        """How many updates the round that opens may get."""
        return len(self.machine.asked)

    def _say(self, what: str) -> None:
        """Writes down what keeps the federation waiting, once."""
        if what not in self._said:
            self._said.add(what)
            self.audit.append("waiting", reason=what)

    def _end(self, reason: str) -> None:
        self.progress = replace(self.progress, over=reason)
        self.machine.phase = "over"
        if self._model is not None:
            self._save(self._model, self.machine.round)
        self.audit.append("over", round=self.machine.round, reason=reason)


class _Alone(LocalGroup):
    """Merges what one process has, without a copy: there is no other attempt."""

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return tensor if op == "sum" else super().all_reduce(tensor, op)


def check_names(topic: str, digest: str = "0" * 64) -> None:
    """Looks at what becomes part of a path.

    Raises:
        Refused: 400 if it is no name, such as one of a file elsewhere.
    """
    if not _DIGEST.fullmatch(digest) or not _TOPIC.fullmatch(topic):
        raise Refused(400, "There is no such place.")


def is_exchange(topic: str) -> bool:
    """Whether a topic is that of messages after a round, such as ``evaluation.0``."""
    return topic.count(".") == 1 and not topic.startswith(f"{UPDATE}.")


def _short(versions: Any) -> dict[str, str]:
    """What a silo says of its versions, no longer than an audit log bears."""
    found = versions if isinstance(versions, Mapping) else {}
    return {str(name)[:64]: str(version)[:64] for name, version in list(found.items())[:32]}
