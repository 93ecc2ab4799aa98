"""A silo's side of a federation over a network."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_fl.aggregation import Aggregator, RoundContext
from lightning_fl.clients import ClientStore
from lightning_fl.clients.state_files import StateFiles
from lightning_fl.communication import LocalGroup, Message
from lightning_fl.coordinator import wire
from lightning_fl.coordinator.audit import AuditLog
from lightning_fl.coordinator.client import CLOCK_S, CallRefused, Client
from lightning_fl.coordinator.disk import Disk, read_json
from lightning_fl.coordinator.identity import Kit
from lightning_fl.coordinator.line_client import LineClient
from lightning_fl.coordinator.policy import Policy, PolicyBroken, read_policy
from lightning_fl.coordinator.secure_silo import SecureSums, SumDropped
from lightning_fl.coordinator.service import PROTOCOL
from lightning_fl.engines.tensors import FederatedTensors, load
from lightning_fl.federation import (
    Closing,
    Federation,
    FederationSettings,
    FederationState,
    Opening,
    RankReport,
    ServerRound,
)
from lightning_fl.federation.report_masking import mask
from lightning_fl.privacy.secagg import RetryRefused, SecureAggregation, SecureAggregationError
from lightning_fl.privacy.secagg.participant import MIN_CLIENTS
from lightning_fl.privacy.secagg.primitives import digest as hash_of
from lightning_fl.tree import flatten, to_sum_dtype, unflatten, update_trees
from lightning_fl.types import Aggregate, State, Tree

ALIVE_S = 30.0
log = logging.getLogger("lightning_fl.network")


class SiloFolder:
    """What a silo must remember when its process dies: the client state of the update that it is sending.

    The state is staged before the update is sent. By the round's outcome it becomes the client's state or is dropped,
    also after a restart.

    Args:
        root: The folder.
        name: The silo.
        disk: Does every change.
    """

    def __init__(self, root: Path, name: str, disk: Disk | None = None) -> None:
        self.root = root
        self.name = name
        self.disk = disk or Disk()
        self.disk.make_folder(root)
        self.files = StateFiles(root / "client_states")
        self.audit = AuditLog(root / "audit.jsonl")

    @property
    def update(self) -> Path:
        """The file that is sent."""
        return self.root / "update.safetensors"

    @property
    def model(self) -> Path:
        """The global model as it was loaded."""
        return self.root / "model.safetensors"

    def stage(self, round: int, digest: str, state: Mapping[str, Any] | None) -> None:
        """Notes what belongs to an update, before it is sent."""
        version = None if not state else self.files.write(self.name, state)
        self.disk.write_json(self.root / "staged.json", {"round": round, "digest": digest, "version": version})

    def staged(self) -> dict[str, Any] | None:
        """What was noted; None if nothing waits for an outcome."""
        return read_json(self.root / "staged.json")

    def settle(self, accepted: Sequence[Any] | None) -> bool:
        """Makes the staged state the client's if its update counts, else drops it; returns whether it counts.

        Args:
            accepted: The last round in which an update of this silo counts, and its digest; None if none does yet.
        """
        round, digest = accepted or (-1, None)
        staged = self.staged()
        # In asynchronous rounds an update may count in a later round than the one whose model it started from.
        counts = staged is not None and staged["round"] <= round and staged["digest"] == digest
        if counts:
            self.audit.append("counted", round=round, digest=digest)
        if staged is not None and counts and staged["version"] is not None:
            self.disk.write_json(self.root / "state.json", {"round": round, "version": staged["version"]})
            for path in self.files.root.glob("versions/*/*.safetensors"):
                if path.stem != staged["version"]:
                    self.disk.delete(path)
        self.disk.delete(self.root / "staged.json")
        return counts

    def note_sending(self, update: str) -> None:
        """Notes an update that is about to leave the silo."""
        if update not in (sent := self.sent()):
            self.disk.write_json(self.root / "sent.json", [*sent, update])

    def sent(self) -> list[str]:
        """The updates that have left the silo, or tried to."""
        return read_json(self.root / "sent.json") or []

    def restore(self, store: ClientStore) -> None:
        """Gives the client's state to a store."""
        state = read_json(self.root / "state.json")
        if state is not None:
            store.restore(self.files, {self.name: state["version"]})


@dataclass(frozen=True)
class WholeTensors:
    """A module's tensors by the roles that :class:`~lightning_fl.engines.tensors.FederatedTensors` names."""

    params: Tree
    buffers: Tree
    frozen: Tree
    personal: Tree


@dataclass(frozen=True)
class Introduction:
    """What a silo says when it joins.

    Args:
        settings: The settings that must be those of the coordinator.
        common: What must be the same at all silos, and the coordinator does not know: that of the first one counts.
        versions: The versions of the libraries.
        protections: What protects this silo: ``"differential privacy"``, ``"secure aggregation"``.
        aggregator: The settings of secure sums. None: the coordinator sees each update.
        weighting: How the federation weighs its silos.
        is_asynchronous: Whether rounds close without this silo.
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    common: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    protections: Collection[str] = ()
    aggregator: SecureAggregation | None = None
    weighting: str = "examples"
    is_asynchronous: bool = False


class NetworkFederation(Federation):
    """A silo of a federation over a network; one process of it, which alone talks to the coordinator.

    Args:
        address: The coordinator's address, ``https://host`` or ``https://host:port``.
        kit: The folder with the silo's key and certificate.
        folder: What the silo must remember between starts. None: ``state`` in the kit.

    Raises:
        ValueError: If address or kit can't be used.
    """

    knows_all_clients = False

    def __init__(self, address: str, kit: str | Path, folder: str | Path | None = None) -> None:
        own = Kit(kit)
        root = Path(folder) if folder else own.folder / "state"
        self._begin(Client(address, own), own.name, root, read_policy(own.folder / "policy.yaml"))
        self._keys = own.folder / "keys"

    def _begin(self, client: Client | LineClient, name: str, folder: Path, policy: Policy) -> None:
        super().__init__(LocalGroup(), 0, 1)
        self.client = client
        self.name = name
        self.folder = SiloFolder(folder, name)
        self.policy = policy
        self._keys = folder / "keys"
        self.silos: Sequence[str] = (self.name,)
        self.store: ClientStore | None = None
        self.went_back = False
        """Whether the store has been given the state that the folder holds, since somebody last set this to False."""
        self._next_state: State | None = None
        self.update_counts = False
        """Whether this silo's update counts in the last round."""
        self._loaded: tuple[str, FederationState, Tree] | None = None
        self._last = -1
        self._num_gathered = 0
        self._outcome: dict[str, Any] = {}
        self._alive: _Alive | None = None
        self._has_joined = False
        self.secure: SecureSums | None = None
        self.is_asynchronous = False
        self._opening: dict[str, Any] = {}
        self._over: Mapping[str, Any] = {}
        self._told_of_clipping = False

    # ---- joining

    def join(self, tensors: FederatedTensors | WholeTensors, introduction: Introduction) -> None:
        """Introduces this silo, and loads the model from which all begin.

        Args:
            tensors: The module's tensors.
            introduction: What it says.

        Raises:
            ValueError: If this silo has no keys for secure sums.
            PolicyBroken: If this silo's policy forbids to take part.
            CallRefused: If the coordinator does not take this silo, with the reason.
            NotAdmitted: If one side does not accept the other's certificate.
        """
        own, aggregator, weighting = introduction, introduction.aggregator, introduction.weighting
        self.is_asynchronous = own.is_asynchronous
        self._refuse_unless(lambda: self.policy.check_algorithm(own.settings.get("algorithm", ""), own.protections))
        if aggregator is not None:  # before the coordinator is told: without keys there is nothing to join
            SecureSums(aggregator, weighting, self._keys, start="")
        answer = self._introduce(tensors, own)
        self._refuse_unless(lambda: self.policy.check_start(answer["start"]))
        self.folder.audit.append("joined", address=self.client.address, silos=answer["silos"], start=answer["start"])
        if abs(answer["time"] - time.time()) > CLOCK_S:
            log.warning(
                "The clocks of this machine and of the coordinator differ by %.0f s. Rounds do not depend on it, but "
                "certificates do.",
                answer["time"] - time.time(),
            )
        path = self.folder.root / "start.safetensors"
        self.client.download(f"/v1/states/{answer['start']}", path, answer["start"])
        start = unflatten(wire.read(path))
        load(tensors.params, start.get("params", {}))
        load(tensors.buffers, start.get("buffers", {}))
        load({**tensors.frozen, **tensors.personal}, start.get("rest", {}))
        if aggregator is not None:
            self.secure = SecureSums(aggregator, weighting, self._keys, answer["start"])
        self.silos = answer["silos"]
        self.place, self.size = self.silos.index(self.name), len(self.silos)
        self._settle_staged(answer)
        self._has_joined = True

    def _introduce(self, tensors: FederatedTensors | WholeTensors, introduction: Introduction) -> dict[str, Any]:
        """The coordinator's answer, once it has a model from which all begin: this silo's, if no other has sent one."""
        common = dict(introduction.common)
        rest = _cpu({**tensors.frozen, **tensors.personal})
        start = flatten({"params": to_sum_dtype(tensors.params), "buffers": _cpu(tensors.buffers), "rest": rest})
        request = {
            "protocol": PROTOCOL,
            "settings": dict(introduction.settings),
            "common": common,
            "versions": dict(introduction.versions),
            "manifest": wire.shapes_of(start),
        }
        answer: dict[str, Any] = self.client.ask("POST", "/v1/join", request)
        self._refuse_unless(lambda: self.policy.check_silos(answer["silos"]))
        while answer["start"] is None:
            file = self.folder.root / "start.safetensors"
            wire.write(file, start, {"common": common})
            try:
                self.client.upload("/v1/start", file)
            except CallRefused as refused:
                if refused.status != 410:  # another silo was faster
                    raise
            file.unlink()
            answer = self.client.ask("POST", "/v1/join", request)
        return answer

    def _refuse_unless(self, check: Callable[[], None]) -> None:
        try:
            check()
        except PolicyBroken as error:
            self.folder.audit.append("refused by policy", reason=str(error))
            raise

    def _check_rounds(self) -> None:
        self.policy.check_rounds(len(self.folder.sent()))

    def _settle_staged(self, told: Mapping[str, Any]) -> bool:
        """Keeps or drops what was staged before the process died; returns whether it was kept.

        Args:
            told: The coordinator's ``round``, what it has ``accepted`` last, and what it has ``already_sent`` to it.
        """
        staged = self.folder.staged()
        if staged is None or staged["round"] >= told["round"] or staged["digest"] == told["already_sent"]:
            return False
        return self.folder.settle(told["accepted"])

    def restore(self, store: ClientStore, optimizers: Sequence[Optimizer] = ()) -> None:
        """Gives the client's state of the last round that counted to a store, which is then the client's.

        Args:
            store: The store.
            optimizers: The module's optimizers; parts of their states are put together where a silo's parameters are
                spread over its processes.
        """
        self.store = store
        self._go_back()

    def _go_back(self) -> None:
        if self.store is not None:
            self.folder.restore(self.store)
            self.went_back = True

    def leave(self, reason: str, error: BaseException | None = None) -> None:
        """Tells the coordinator, if it can be reached, that this silo does not go on.

        Args:
            reason: Why, in words for the others.
            error: The error by which it ends, if it does.
        """
        if self._alive is not None:
            self._alive.stop()
            self._alive = None
        if self._has_joined:
            self._has_joined = False
            client = self.client.impatient()
            try:
                client.ask("POST", "/v1/leave", {"reason": reason})
            except (OSError, RuntimeError, ValueError) as error:
                log.info("The coordinator was not told that this silo leaves: %s", error)
            client.close()
        self.client.close()

    # ---- rounds

    def open_round(self, done: int) -> Opening | None:
        if self.folder.staged() is None:  # else it asks what has become of its last update
            self._refuse_unless(self._check_rounds)
        while True:
            try:
                status, _, body = self.client.call("GET", f"/v1/rounds?after={done}")
            except CallRefused as refused:
                if refused.status == 410:
                    log.info("The federation is over: %s", refused)
                    self._over = refused.facts
                    return None
                raise
            if status == 204:
                continue
            message = Message.decode(body)
            fields = message.fields
            # A silo that has joined while the round was being added up has not been told what became of its update.
            if self._settle_staged(fields):
                self._go_back()
            if fields["already_sent"] is None:
                self._refuse_unless(self._check_rounds)
                self._refuse_unless(partial(self.policy.check_cohort, fields["cohort"], fields["fewest"]))
                try:
                    state, buffers = self._load(fields["state"])
                    break
                except CallRefused as refused:
                    if refused.status != 404 or not self.is_asynchronous:
                        raise
                    continue  # rounds went on while it was loading: the model is gone, and there is a newer one
            # The process died after its update had been accepted: the update counts, and nothing is trained again.
            self._wait_for_outcome(fields["round"])
            done = self._last
            self._go_back()
        transforms = unflatten(message.tensors)
        own = [transforms.get(str(index), {}) for index in range(len(transforms))]
        if self._alive is None:
            self._alive = _Alive(self.client)
        self._opening = fields
        return Opening(fields["round"], fields["cohort"], replace(state, transforms=own), buffers, fields["facts"])

    def ending(self, done: int) -> Opening | None:
        over = self._over
        if over["round"] - 1 <= done:
            return None
        state, buffers = self._load(over["state"])
        return Opening(over["round"], None, state, buffers, over["facts"])

    def start(
        self, settings: FederationSettings, state: FederationState, params: Tree, ctx: RoundContext
    ) -> FederationState:
        if self.secure is not None:
            self.secure.check_model(ctx.templates[-1])
        missing = len(settings.transforms) - len(state.transforms)
        return replace(state, transforms=[*state.transforms, *({} for _ in range(missing))])

    def merge(
        self, opened: ServerRound, acc: Any, report: RankReport, client_state: State | None = None
    ) -> tuple[Any, list[RankReport]]:
        """As :meth:`Federation.merge`.

        Args:
            opened: The round.
            acc: What the silo has accumulated.
            report: The silo's report.
            client_state: The client's next state. None: what is staged in the store.
        """
        assert self.store is not None
        self._next_state = client_state or self.store.staged(self.name)
        round, start = opened.ctx.round, time.perf_counter()
        (self._send_update if self.secure is None else self._add_up)(opened, acc, report)
        traffic = self.group.traffic
        traffic.seconds_reducing += time.perf_counter() - start
        start = time.perf_counter()
        counts = self._wait_for_outcome(round)
        traffic.seconds_waiting += time.perf_counter() - start
        outcome = self._outcome
        assert self.store is not None
        self.update_counts = counts
        if not counts:
            log.warning("Round %d was closed without this silo's update.", round)
            self.store.roll_back()
        # What another silo wishes for itself, or wants to save where, is no concern of this one.
        reports = [
            replace(own, should_stop=report.should_stop, deferred_checkpoints=report.deferred_checkpoints)
            for own in (RankReport.from_message(message) for message in outcome["reports"])
        ]
        return outcome, reports

    def _send_update(self, opened: ServerRound, acc: Any, report: RankReport) -> None:
        """Sends this silo's update, for the coordinator to add."""
        round = opened.ctx.round
        trees: dict[str, Tree] = {} if acc is None else update_trees(acc)
        tensors = flatten({**{name: _cpu(tree) for name, tree in trees.items()}, "report": report.tensors})
        fields = {"report": report.to_message().fields, "weight": None if acc is None else acc.weight}
        digest = wire.write(self.folder.update, tensors, fields)
        self.folder.stage(round, digest, self._next_state)
        self.folder.note_sending(f"round {round}, {digest}")
        self.folder.audit.append(
            "sending",
            round=round,
            digest=digest,
            bytes=self.folder.update.stat().st_size,
            tensors=[wire.readable(name) for name in tensors],
            weight=fields["weight"],
            metrics=sorted({str(entry["name"]) for entry in report.metrics.values()}),
        )
        self._upload(f"/v1/rounds/{round}/update", self.folder.update)

    def _add_up(self, opened: ServerRound, acc: Any, report: RankReport) -> None:
        """Adds this silo's update to those of the others under masks.

        Raises:
            SecureAggregationError: If the federation has ended because the sum could not be made.
            RetryRefused: If this silo has sent its vector for a sum that was dropped.
        """
        secure, round, cohort = self.secure, opened.ctx.round, list(self._opening["cohort"])
        assert secure is not None
        message = mask(report.without_steps().to_message())
        public = {name: value for name, value in message.fields.items() if name != "sums"}
        scalars: dict[str, float] = message.fields["sums"]
        while True:
            attempt = int(self._opening["attempt"])
            base = f"update.{attempt}"
            fields: dict[str, Any] = {"report": public}
            if acc is not None:
                params = secure.params_of_round(round, attempt, cohort, opened.template, opened.ctx.frozen)
                client, advert = secure.advertise(params, cohort.index(self.name) + 1, sorted(scalars))
                fields["advert"] = advert.fields()
            digest = wire.write(self.folder.update, {}, fields)
            self.folder.stage(round, digest, self._next_state)
            # One of all attempts of a round: no other than the first is sent a vector.
            self.folder.note_sending(f"round {round}")
            size = self.folder.update.stat().st_size
            names = sorted({str(entry["name"]) for entry in report.metrics.values()})
            self.folder.audit.append("sending", round=round, topic="keys", digest=digest, bytes=size, metrics=names)
            try:
                is_in_time = self._upload(f"/v1/rounds/{round}/update", self.folder.update)
                if not is_in_time or acc is None:  # it has nothing to add, and waits with the others
                    if "dropped" in (found := self._step_outcome(round, f"{base}.unmask") or {}):
                        raise SumDropped(found["dropped"])
                else:
                    secure.take_part(
                        self.name,
                        base,
                        params,
                        client,
                        secure.vector_of(acc, opened.template, cohort),
                        scalars,
                        secure.model_id(opened.template),
                        partial(self._post, round),
                        partial(self._step_outcome, round),
                    )
            except SumDropped as dropped:
                log.warning("Round %d: %s", round, dropped)
                if acc is not None:
                    secure.check_model(opened.template)
                if self._asks_again(round, dropped):
                    cohort = list(self._opening["cohort"])
                    continue
            return

    def _asks_again(self, round: int, dropped: SumDropped) -> bool:
        """Waits until a round that was given up is open again; returns whether this silo is in it."""
        while True:
            try:
                status, _, body = self.client.call("GET", f"/v1/rounds?after={round - 1}")
            except CallRefused as refused:
                raise SecureAggregationError(f"The federation is over. {dropped}") from refused
            if status != 204:
                break
        fields = Message.decode(body).fields
        if fields["round"] != round:
            return False
        self._refuse_unless(lambda: self.policy.check_cohort(fields["cohort"], fields["fewest"]))
        self._opening = fields
        return True

    def close_round(self, opened: ServerRound, acc: Any, joined: RankReport) -> Closing:
        if joined.refused and not joined.num_clients:
            raise ValueError(
                f"Round {acc['round']} has no update left: those of all its silos hold NaN or Inf. The global model is "
                "unchanged. Lower the learning rate, clip gradients, or check the silos' data."
            )
        state, buffers = self._load_outcome()
        aggregate = Aggregate({}, {}, acc["weight"], {}, acc["num_clients"], opened.ctx.population)
        state = replace(state, transforms=opened.state.transforms)
        facts = dict(acc["facts"])
        if facts.pop("num_clipped", 0) and not self._told_of_clipping:
            self._told_of_clipping = True
            log.warning(
                "Silos had coordinates beyond clip or aux_clip; they were clipped. If that is not intended, give "
                "SecureAggregation a larger one."
            )
        return Closing(state, buffers, aggregate, acc["norm"], facts, acc["stop_reason"])

    def gather(self, message: Message, topic: str) -> list[Message]:
        # Outside the rounds, and where each silo has rounds of its own, there is nothing that all have in common.
        if self._last < 0 or not self._has_joined or self.is_asynchronous:
            return [message]
        place = f"/v1/rounds/{self._last}/{topic}.{self._num_gathered}"
        self._num_gathered += 1
        self._post(self._last, f"{topic}.{self._num_gathered - 1}", message.tensors, {"message": message.fields})
        try:
            _, found = self._outcome_of(place)
        except CallRefused as refused:
            if refused.status != 410:
                raise
            return [message]
        return found

    def gather_sums(self, aggregator: Aggregator, session: Any, message: Message, topic: str) -> list[Message]:
        secure, round = self.secure, self._last
        if secure is None or round < 0 or not self._has_joined:
            return [message]
        base, members = f"{topic}.{self._num_gathered}", list(self._outcome["members"])
        self._num_gathered += 1
        if self.name not in members or len(members) < MIN_CLIENTS:
            return [message]
        scalars: dict[str, float] = message.fields["sums"]
        public = {name: value for name, value in message.fields.items() if name != "sums"}
        params = secure.params_of_messages(round, base, members)
        client, advert = secure.advertise(params, members.index(self.name) + 1, sorted(scalars))
        self._post(round, base, {}, {"message": public, "advert": advert.fields()})
        vector_id = hash_of(f"{base} of round {round}".encode(), repr(sorted(scalars.items())).encode())
        post, get = partial(self._post, round), partial(self._step_outcome, round)
        try:
            secure.take_part(self.name, base, params, client, secure.empty_vector(), scalars, vector_id, post, get)
            _, found = self._outcome_of(f"/v1/rounds/{round}/{base}")
        except (SumDropped, RetryRefused) as error:
            log.warning("The %s of round %d is this silo's own: %s", topic, round, error)
            found = []
        except CallRefused as refused:
            if refused.status != 410:
                raise
            found = []
        return found or [message]

    # ---- parts

    def _upload(self, place: str, file: Path) -> bool:
        """Sends a file; returns False if it comes too late."""
        self.group.traffic.num_bytes += file.stat().st_size
        try:
            self.client.upload(place, file)
        except CallRefused as refused:
            if refused.status != 410:
                raise
            return False
        return True

    def _post(self, round: int, topic: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> bool:
        """Sends a message about a topic; returns False if it comes too late."""
        file = self.folder.root / "message.safetensors"
        digest = wire.write(file, _cpu(tensors), fields)
        self.folder.audit.append("sending", round=round, topic=topic, digest=digest, bytes=file.stat().st_size)
        return self._upload(f"/v1/rounds/{round}/{topic}", file)

    def _step_outcome(self, round: int, topic: str) -> dict[str, Any] | None:
        """What a step of a secure sum has become; None if its round is over."""
        try:
            return wire.read_header(self._read_outcome(f"/v1/rounds/{round}/{topic}")).fields
        except CallRefused as refused:
            if refused.status != 410:
                raise
            return None

    def _wait_for_outcome(self, round: int) -> bool:
        """Waits until a round is closed and settles this silo's state; returns whether its update counts.

        If the round was closed so long ago that its outcome is gone, it reads the newest one.
        """
        newest = round
        while True:
            try:
                fields, messages = self._outcome_of(f"/v1/rounds/{newest}/update")
                break
            except CallRefused as refused:
                if refused.status != 410:
                    raise
                newest = int(refused.facts["newest"])
        self._outcome = {**fields, "reports": messages}
        self._last, self._num_gathered = fields["round"], 0
        return self.folder.settle(fields["accepted"].get(self.name))

    def _load_outcome(self) -> tuple[FederationState, Tree]:
        """The model after the round that is closed; in asynchronous rounds the newest one that there is."""
        while True:
            try:
                return self._load(self._outcome["state"])
            except CallRefused as refused:
                if refused.status != 404 or not self.is_asynchronous:
                    raise
                self._wait_for_outcome(self._last)

    def _outcome_of(self, place: str) -> tuple[dict[str, Any], list[Message]]:
        file = self._read_outcome(place)
        fields = wire.read_header(file).fields
        tensors = unflatten(wire.read(file))
        reports = fields["reports"] if "reports" in fields else fields["messages"]
        messages = [Message(own, tensors.get(silo, {})) for silo, own in zip(fields["members"], reports, strict=True)]
        return fields, messages

    def _read_outcome(self, place: str) -> Path:
        """Waits for an outcome; returns the file with it."""
        file = self.folder.root / "outcome.safetensors"
        while True:
            file.unlink(missing_ok=True)  # tensors of the last one may still be read from it

            def read(response: Any) -> None:
                with file.open("wb") as opened:
                    while piece := response.read(1 << 20):
                        opened.write(piece)

            status, _, _ = self.client.call("GET", place, read=read)
            if status == 200:
                return file

    def _load(self, digest: str) -> tuple[FederationState, Tree]:
        if self._loaded is None or self._loaded[0] != digest:
            self.client.download(f"/v1/states/{digest}", self.folder.model, digest)
            trees = unflatten(wire.read(self.folder.model))
            self._loaded = digest, FederationState(trees["server"]), trees.get("buffers", {})
        return self._loaded[1], self._loaded[2]


class _Alive:
    """Says every half minute that the silo is there, also while it trains."""

    def __init__(self, client: Client | LineClient) -> None:
        self._client = client.impatient()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alive", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ends.wait(ALIVE_S):
            try:
                self._client.ask("POST", "/v1/alive", {})
            except (OSError, RuntimeError, ValueError, json.JSONDecodeError) as error:
                log.debug("The coordinator does not answer: %s", error)

    def stop(self) -> None:
        self._ends.set()
        self._thread.join()
        self._client.close()


def _cpu(tree: Mapping[str, Tensor]) -> Tree:
    return {name: tensor.detach().cpu() for name, tensor in tree.items()}
