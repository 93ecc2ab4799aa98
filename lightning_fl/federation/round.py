"""One round on one rank: open it, start and finish each client group, then close it."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_fl.aggregation import ClientLost, RoundContext
from lightning_fl.algorithms import ProbeKind
from lightning_fl.clients import ClientStore
from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.data.client_loaders import Loader, batch_size
from lightning_fl.engines import ClientFacts, LocalTrainer, Schedule, ScheduleEnd
from lightning_fl.engines.buffers import moved
from lightning_fl.engines.evaluation_mode import evaluating
from lightning_fl.engines.local_trainer import GradTransform
from lightning_fl.engines.vectorized.stacking import StackedBatch, are_finite, part
from lightning_fl.federation.client_batches import ClientBatches
from lightning_fl.federation.client_group import ClientGroup, GroupUpdate
from lightning_fl.federation.client_task import ClientTask
from lightning_fl.federation.federation import Federation
from lightning_fl.federation.group_data import StackedData
from lightning_fl.federation.report import RankReport
from lightning_fl.federation.server import Closing, ServerRound, contexts_of, continued, update_templates
from lightning_fl.federation.settings import FederationSettings, FederationState, Version
from lightning_fl.seeding import ClientRandomness, client_generator, derive_seed, visit_seed
from lightning_fl.tree import (
    Layout,
    cast_like,
    clone,
    is_finite,
    leaves,
    move,
    norm,
    squared_norms,
    to_sum_dtype,
    update_trees,
)
from lightning_fl.types import Aggregate, ClientId, LocalRun, Phase, State, Update

Probe = Callable[[ProbeKind, Iterator[Any], Mapping[str, Tensor]], Any]
"""Measures what an algorithm's ``probe`` asks for: ``(kind, batches, params)``; the module holds the global model."""


UNTOLD_ERROR = "an error that it alone has seen"


class GroupData(Protocol):
    """The data of a client group in a round."""

    @property
    def clients(self) -> Sequence[ClientId]:
        """The clients of the group."""

    @property
    def sizes(self) -> Sequence[int | None]:
        """Number of examples in one pass over each client's data; None if it is known only after training."""

    @property
    def loader(self) -> Loader | None:
        """The loader of a client alone, which is seeded with the client's randomness; None for several."""

    def read(self, next_phase: Callable[[], None]) -> Iterator[tuple[Any, BatchPosition]]:
        """The group's batches and their positions."""

    def read_once(self) -> Iterator[Any]:
        """The batches of one pass outside local training, for the algorithm's probe; of a client alone only."""


@dataclass(frozen=True)
class ClientData:
    """The data of a client that trains alone.

    Args:
        batches: The client's batches.
        size: Number of examples in one pass; None if it is known only after training.
    """

    batches: ClientBatches
    size: int | None

    @property
    def clients(self) -> Sequence[ClientId]:
        return (self.batches.client,)

    @property
    def sizes(self) -> Sequence[int | None]:
        return (self.size,)

    @property
    def loader(self) -> Loader | None:
        return self.batches.loader

    def read(self, next_phase: Callable[[], None]) -> Iterator[tuple[Any, BatchPosition]]:
        return self.batches.read(next_phase)

    def read_once(self) -> Iterator[Any]:
        return self.batches.read_once()


@dataclass(frozen=True)
class GroupOutcome:
    """The outcome of a finished group.

    Args:
        runs: The facts of each client's training.
        accepted: For each client, whether its update was finite and so was added.
        update: The update of a client alone; None if it was not accepted, and for several.
        num_steps: Optimizer steps of all clients.
    """

    runs: Sequence[LocalRun]
    accepted: Sequence[bool]
    update: Update | None
    num_steps: int


@dataclass(frozen=True)
class RoundResult:
    """The result of a round, the same on every rank except for ``seconds``.

    Args:
        closing: What the round has become.
        report: The joined report of all ranks.
        seconds: This rank's seconds of ``read`` (waiting for the clients' data), ``train``, ``wait`` (for other ranks),
            ``communicate``, ``server``, and ``transform`` (clip, noise, accounting, compression), none part of another.
        num_bytes: Bytes that this rank has sent to the others.
        hides_clients: Whether exact facts about the clients must not reach the loggers.
        unsent: Frozen parameters that clients have moved for the first time, and so without sending their movement.
    """

    closing: Closing
    report: RankReport
    seconds: dict[str, float]
    num_bytes: int
    hides_clients: bool
    unsent: Sequence[str] = ()

    @property
    def state(self) -> FederationState:
        """The federation's next state."""
        return self.closing.state

    @property
    def aggregate(self) -> Aggregate:
        """The round's aggregate after the transforms."""
        return self.closing.aggregate

    @property
    def norm(self) -> float:
        """Euclidean norm of the mean update."""
        return self.closing.norm

    @property
    def spread(self) -> float:
        """How much the clients' updates differ, ``1 - |mean|^2 / mean |update|^2``: 0 if they are equal."""
        mean_square = self.report.squared_norm / max(self.report.weight, 1e-300)
        return 1 - self.norm**2 / mean_square if mean_square > 0 else 0.0


@dataclass
class RankTotals:
    """This rank's sums over the clients of a round."""

    acc: Any
    num_steps: int = 0
    num_examples: int = 0
    squared_norm: float = 0.0
    refused: list[ClientId] = field(default_factory=list)
    lost: list[ClientId] = field(default_factory=list)
    schedule_end: ScheduleEnd | None = None
    client_seconds: list[tuple[ClientId, float]] = field(default_factory=list)

    def count(self, facts: ClientFacts) -> None:
        """Adds the steps of a client."""
        self.num_steps += facts.num_steps_of_all
        end = facts.schedule_end
        if self.schedule_end is None or self.schedule_end.num_optimizer_steps < end.num_optimizer_steps:
            self.schedule_end = end


class Round:
    """One round on one rank; made by :meth:`open`.

    Args:
        opened: The round as the server's side sees it.
        trainer: Trains this rank's clients; it has begun the round.
        store: The states of the clients that live on this rank.
        federation: The way to the other parties.
        totals: This rank's sums, with an empty accumulator.
    """

    def __init__(
        self,
        opened: ServerRound,
        trainer: LocalTrainer,
        store: ClientStore,
        federation: Federation,
        totals: RankTotals,
    ) -> None:
        self.opened = opened
        self.settings = opened.settings
        self.state = opened.state
        self.ctx = opened.ctx
        self.trainer = trainer
        self.store = store
        self.federation = federation
        self.totals = totals
        present = Version(opened.state.server, trainer.round_start.buffers)
        self.versions = {**opened.state.versions, opened.ctx.round: present}
        """The models from which clients of this round start, and that of the round itself, by round."""
        self._randomness = ClientRandomness()
        self._opened = self._trained = time.perf_counter()
        self._transforming = 0.0
        # A copy, because the group goes on counting in the same object; a round's figures are differences.
        self._traffic = replace(federation.group.traffic)

    @classmethod
    def open(
        cls,
        settings: FederationSettings,
        state: FederationState,
        trainer: LocalTrainer,
        store: ClientStore,
        federation: Federation,
        index: int,
        cohort: Sequence[ClientId],
        schedules: Sequence[Schedule] = (),
        session: Any = None,
    ) -> Round:
        """Begins a round: the trainer takes the module as the global model, the transforms prepare their server halves.

        Args:
            settings: The federation's settings.
            state: The federation's state before the round.
            trainer: Trains this rank's clients.
            store: The states of the clients that live on this rank.
            federation: The way to the other parties.
            index: Number of the round, from 0.
            cohort: The clients of the round, on all ranks.
            schedules: The learning-rate schedules that step inside local training.
            session: What the aggregator's ``open`` returned.

        Raises:
            ValueError: If the shared tensors have changed under an algorithm whose clients keep state for each of them.
        """
        # Before the server is opened: the server's state starts from the tensors that the module holds now.
        moving = state.moving
        # Under differential privacy none may move: which ones do would tell of the data.
        if moving is None and settings.is_differentially_private:
            moving = ()
        is_alone = settings.population == 1
        params = trainer.begin_round(
            state.server.get("params"),
            schedules,
            counts_known=not settings.hides_clients,  # noise would turn what no client knows into a value
            moving=moving,
            is_alone=is_alone,
            is_shared=not is_alone and not settings.silos,
            is_private=settings.is_differentially_private,
            moves=settings.aggregator.moves,
        )
        templates = update_templates(settings, params, trainer.tensors.buffers, state.server)
        ctx = RoundContext(
            index,
            cohort,
            settings.population,
            settings.sampling,
            group=federation.group,
            seed=settings.seed,
            silos=settings.silos,
            frozen=trainer.tensors.frozen,
            templates=templates,
            min_clients=settings.aggregator.min_clients_of(len(cohort)),
            integer_bits=settings.aggregator.integer_bits,
            memory=state.memory,
        )
        opened = federation.start(settings, state, params, ctx)
        template = templates[-1]
        totals = RankTotals(settings.aggregator.init(template, trainer.device, session))
        server = ServerRound(settings, opened, trainer.round_start.buffers, template, ctx)
        return cls(server, trainer, store, federation, totals)

    # ---- a client group

    def start(
        self,
        data: GroupData,
        probe: Probe | None = None,
        version: int | None = None,
        number: int = 0,
        on_next_phase: Callable[[], None] = lambda: None,
    ) -> ClientTask:
        """Loads a client group, and sets the random generators to those of its (first) client.

        Args:
            data: The group's clients and their batches.
            probe: Measures what the algorithm's ``probe`` asks for.
            version: The round with whose first model the clients start. None: this one.
            number: How many other visits of these clients in this round come before.
            on_next_phase: Called when a phase other than the first has been loaded, before its data are read.

        Raises:
            LoaderFailed: If the loader raises in the pass that the probe needs.
            NotStackable: If the contexts that the algorithm returns for several clients can't be stacked.
        """
        # Seeded before anything of the client runs, so that nothing it draws depends on who was trained before it.
        seeds_by_version = self.settings.schedule is not None and self.settings.schedule.seeds_by_version
        index = version if seeds_by_version and version is not None else self.ctx.round
        seed = partial(self._seed, index, data.clients[0], data.loader, number)
        seed()
        server = self._server_of(version)
        self.trainer.start_from(self.versions[self.ctx.round if version is None else version].buffers)
        states = [move(self.store.get(own) or {}, self.trainer.device) for own in data.clients]
        kind, measured = self.settings.algorithm.probe, None
        if kind is not None and probe is not None:
            found = []
            for params in self.settings.algorithm.candidates(server):
                self.trainer.start([params], states)
                seed("probe")
                own: ProbeKind = "loss" if kind == "losses" else kind
                found.append(self.trainer.within.mean_of(probe(own, data.read_once(), self.trainer.tensors.params)))
            measured = torch.stack(found) if kind == "losses" else found[0]
            seed()  # training draws the same random numbers as without a probe
        stacked = isinstance(data, StackedData)
        group = ClientGroup(self.settings, server, data.clients, states, measured, version, number, stacked)
        phases = self.settings.algorithm.phases()
        # Task and batches need each other: a change of phase while reading acts on the task.
        task = ClientTask(group, iter(()), phases, data.sizes, data.loader)
        self.trainer.start(group.starts, states, phases[0], self._transform_of(group, phases[0]))
        if self.trainer.is_shared:
            self.trainer.seed(derive_seed(visit_seed(self.settings.seed, number), index, "module", data.clients[0]))

        def next_phase() -> None:
            self._next_phase(task)
            on_next_phase()

        task.batches = data.read(next_phase)
        return task

    def _server_of(self, version: int | None) -> State:
        index = self.ctx.round if version is None else version
        return continued(self.settings, self.versions[index].server, self.state.server)

    def _next_phase(self, task: ClientTask) -> None:
        phase = task.next_phase()
        self.trainer.next_phase(phase, self._transform_of(task.group, phase), task.group.context)

    def _transform_of(self, group: ClientGroup, phase: Phase) -> GradTransform | None:
        return group.grad_transform(phase, self.trainer.gradient_at)

    def _seed(self, index: int, client: ClientId, loader: Loader | None, number: int, purpose: str = "client") -> None:
        seed, place = visit_seed(self.settings.seed, number), self.trainer.within.inner.rank
        # The processes of a silo read different examples of one order, with different dropout.
        self._randomness.enter(seed, index, client, f"{purpose} {place}" if place else purpose)
        if loader is not None:
            self._randomness.seed_loader(loader, seed, index, client)

    def step(self, task: ClientTask, batch: Any, position: BatchPosition) -> None:
        """Trains a group on one batch, for callers that have no training loop of their own."""
        mask = batch.mask if isinstance(batch, StackedBatch) else None
        # Before the trainer's step, which calls `grad_transform` with the contexts selected here.
        if mask is not None:
            task.group.select(mask)
        size = batch_size(batch if mask is None else part(batch.content, 0))
        losses = self.trainer.step(batch, position)
        task.record(position, 1 if size is None else size, losses, mask, is_known=size is not None)

    def finish(self, task: ClientTask) -> GroupOutcome:
        """Ends a group's training: adds its updates to the sum, and stages its states until the round is closed.

        An update, or a client's next state, that is not finite is refused: it reaches neither the sum nor the store.
        The random generators stay the client's until the next client starts; :meth:`merge` restores the process's own.
        """
        result = self.trainer.finish(task.steps_by_client)
        if self.settings.measures_clients:
            # Clients that train side by side share the time.
            seconds = (time.perf_counter() - task.started) / len(task.clients)
            self.totals.client_seconds += [(client, seconds) for client in task.clients]
        within = self.trainer.within
        # Algorithms may look at the loss, and all processes of a silo must compute the same.
        runs = [replace(run, loss=within.mean(run.loss)) for run in task.runs(result.facts)]
        group_update = task.group.finish(result, runs)
        totals = self.totals
        # Steps count for refused clients too, because they were taken and the schedules have advanced with them;
        # examples count below only where they have reached the model.
        for facts in result.facts:
            totals.count(facts)
        # Transforms have state and random numbers of their own for each client, so they see one update at a time.
        if self.settings.transforms or not self.settings.aggregator.adds_groups:
            updates = [self._add_one(task.group, group_update, index) for index in range(len(runs))]
            accepted = [update is not None for update in updates]
        else:
            accepted = self._add_group(task.group, group_update)
            updates = [group_update.update_of(0) if accepted[0] else None]
        # Where clients are hidden, a refused one has sent zeros and counts like any other.
        counted = [True] * len(runs) if self.settings.hides_clients else accepted
        totals.num_examples += sum(run.num_examples for run in compress(runs, counted))
        num_steps = sum(facts.num_steps_of_all for facts in result.facts)
        return GroupOutcome(runs, accepted, updates[0] if len(runs) == 1 else None, num_steps)

    def _add_group(self, group: ClientGroup, own: GroupUpdate) -> list[bool]:
        """Adds the updates of a group at once; returns which were accepted."""
        totals, size = self.totals, len(group.clients)
        squares = self.trainer.within.joint_squares(squared_norms(own.updates.delta, size))
        rest = self._must_be_finite(own.updates, own.client_states)
        # A norm that is not finite proves nothing, since finite elements may overflow it; the elements then decide.
        if all(map(math.isfinite, squares)):
            del rest["delta"]  # finite norms imply finite elements
        accepted = [is_finite(leaves(rest))] if size == 1 else are_finite(rest, size).tolist()
        accepted = self.trainer.within.all_agree(accepted)
        totals.refused += [
            client for client, is_accepted in zip(group.clients, accepted, strict=True) if not is_accepted
        ]
        if any(accepted):
            updates = own.updates if all(accepted) else own.updates.select(torch.tensor(accepted))
            weights = list(compress(own.weights, accepted))
            ctx = replace(self.ctx, clients=list(compress(group.clients, accepted)))
            totals.acc = self.settings.aggregator.add_group(totals.acc, updates, weights, ctx)
            totals.squared_norm += sum(map(operator.mul, weights, compress(squares, accepted)))
        if own.client_states:
            for index in compress(range(size), accepted):
                self._stage(group, index, own.state_of(index))
        return accepted

    def _add_one(self, group: ClientGroup, own: GroupUpdate, index: int) -> Update | None:
        """Adds the update of one client, on its way through the transforms; None if it was not accepted."""
        client, update, client_state = group.clients[index], own.update_of(index), own.state_of(index)
        within, totals = self.trainer.within, self.totals
        is_sound = is_sendable = is_finite(leaves(self._must_be_finite(update, client_state)))
        transform_states: dict[str, State] = {}
        if self.settings.transforms:
            start = time.perf_counter()
            update, transform_states = self._transform(group, index, update)
            self._transforming += time.perf_counter() - start
            is_sound = is_sound and is_finite(leaves(transform_states))
            is_sendable = is_finite(leaves(self._must_be_finite(update, {})))
        is_sound, is_sendable = within.all_agree([is_sound, is_sendable])
        if not is_sound:
            totals.refused.append(client)
        # Where clients are hidden, a refused one still sends zeros: to leave it out would show that it was there.
        if not is_sendable or not (is_sound or self.settings.hides_clients):
            return None
        try:
            totals.acc = self.settings.aggregator.add(totals.acc, update, replace(self.ctx, client=client))
        except ClientLost:
            # The client's state is not staged either: the server never got the update that it belongs to.
            totals.lost.append(client)
            return None
        # The norm of an update in integers is in other units than the model's; and as long as each has a share of the
        # noise only, it would be a release of its own.
        if all(tensor.is_floating_point() for tensor in update.delta.values()):
            (square,) = within.joint_squares([norm(update.delta) ** 2])
            totals.squared_norm += update.weight * square
        if is_sound and (client_state or transform_states):
            self._stage(group, index, {**client_state, **transform_states})
        return update if is_sound else None

    def _stage(self, group: ClientGroup, index: int, state: Mapping[str, Any]) -> None:
        # A part of a stacked state is a view: stored without a copy, it would keep the states of the whole group in
        # memory.
        own = state if len(group.clients) == 1 else clone(state)
        self.store.stage(group.clients[index], move(own, "cpu"))

    def _transform(self, group: ClientGroup, place: int, update: Update) -> tuple[Update, dict[str, State]]:
        client, before = group.clients[place], group.client_states[place]
        seed, ctx = visit_seed(self.settings.seed, group.number), self.ctx
        if group.version is not None:
            start = Update(self._server_of(group.version)["params"], to_sum_dtype(self.trainer.start_buffers))
            ctx = replace(ctx, start=start, staleness=ctx.round - group.version)
        states, contexts = {}, contexts_of(self.settings, ctx)
        for index, transform in enumerate(self.settings.transforms):
            # By position, because the same transform may occur twice.
            key = f"transform {index}"
            generator = client_generator(seed, self.ctx.round, client, key)
            server = self.state.transforms[index]
            ctx = replace(contexts[index], client=client, generator=generator, server=server)
            update, states[key] = transform.client(update, before.get(key, {}), ctx)
        # Empty states are left out, so that clients of transforms without state leave nothing in the store.
        return update, {key: state for key, state in states.items() if state}

    def _must_be_finite(self, update: Update, client_state: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors of a client that must be finite; a personal buffer, such as a mask, may hold an infinity."""
        found = {**client_state, "delta": update.delta, "buffers": update.buffers, "aux": update.aux}
        if "personal" in client_state:
            trainable = self.trainer.tensors.trainable
            found["personal"] = {n: value for n, value in client_state["personal"].items() if n in trainable}
        return found

    def restore_randomness(self) -> None:
        """Puts the random generators back to where they were before the round's first client."""
        self._randomness.exit()

    def leave(self) -> None:
        """Discards the group that is being trained, because it will not be finished."""
        self.trainer.leave()
        self.restore_randomness()

    # ---- the server's own data

    def start_root(self, batches: ClientBatches) -> ClientTask:
        """Lets the server train on data of its own, as a client without state does."""
        return self.start(ClientData(batches, None))

    def finish_root(self, task: ClientTask) -> Update:
        """Ends that training; the update counts for nothing but what the aggregator does with it.

        Raises:
            ValueError: If it holds NaN or Inf.
        """
        result = self.trainer.finish(task.steps_by_client)
        update = task.group.finish(result, task.runs(result.facts)).update_of(0)
        if not is_finite(leaves(self._must_be_finite(update, {}))):
            raise ValueError(
                "Training on the server's own data has led to NaN or Inf, so no client can be measured by it. Lower "
                "the learning rate, or check these data."
            )
        return update

    def take_root(self, update: Update | None) -> None:
        """Gives the aggregator the update of the server's data.

        Args:
            update: The update on the first rank, which sends it to the others; None on those.
        """
        trees = update_trees(self.opened.template if update is None else update)
        layout = Layout.of(trees)
        sent = {dtype: self.federation.group.broadcast(flat) for dtype, flat in layout.flatten(trees).items()}
        received = layout.unflatten(sent)
        aux = {name.removeprefix("aux/"): tree for name, tree in received.items() if name.startswith("aux/")}
        root = Update(received.get("delta", {}), received.get("buffers", {}), aux=aux)
        self.opened = replace(self.opened, ctx=replace(self.opened.ctx, root=root))

    def model_of(self, update: Update) -> Callable[..., Any]:
        """The model that an update leads to, in evaluation mode, as a function of its input."""
        trainer, start = self.trainer, self.state.server["params"]
        own = {n: cast_like(start[n] + update.delta[n], param) for n, param in trainer.tensors.params.items()}
        tensors = {**trainer.round_start.personal, **own, **moved(self.opened.buffers, update.buffers)}

        def predict(*inputs: Any) -> Any:
            with evaluating(trainer.module), torch.no_grad():
                return functional_call(trainer.module, tensors, inputs)

        return predict

    # ---- the round's end

    def report(self, report: RankReport) -> RankReport:
        """Completes this rank's report with the round's sums.

        Args:
            report: The fields that the caller fills in.
        """
        totals = self.totals
        if self.settings.is_private and self.federation.size > 1:
            # The text of an error may quote the client's data.
            report = replace(report, failed=[(client, UNTOLD_ERROR) for client, _ in report.failed])
        return replace(
            report,
            num_steps=totals.num_steps,
            num_examples=totals.num_examples,
            squared_norm=totals.squared_norm,
            schedule_end=totals.schedule_end,
            refused=[] if self.settings.hides_refusals else totals.refused,
            lost=totals.lost,
            client_seconds=totals.client_seconds,
            moved=self.trainer.all_moved(),
        )

    def merge(self, report: RankReport) -> list[RankReport]:
        """Joins the ranks' accumulators and exchanges their reports; every rank calls it once a round.

        Args:
            report: The fields of this rank's report that the caller fills in.

        Returns:
            The reports of all ranks, the first rank's first.
        """
        self.restore_randomness()
        # Taken before the collective, in which a rank waits for slower ones.
        self._trained = time.perf_counter()
        opened = replace(self.opened, ctx=replace(self.opened.ctx, model_of=self.model_of))
        own, inner = self.report(report), self.trainer.within.inner
        if inner.size > 1:
            messages = inner.all_gather(own.to_message(), f"end of round {self.ctx.round} in the silo")
            own = RankReport.of_silo([RankReport.from_message(message) for message in messages])
        self.totals.acc, reports = self.federation.merge(opened, self.totals.acc, own)
        return reports

    def close(self, reports: Sequence[RankReport], seconds_reading: float = 0.0) -> RoundResult:
        """Computes the next global model from the merged updates, as :func:`~lightning_fl.federation.close_server`.

        Args:
            reports: What :meth:`merge` returned.
            seconds_reading: Seconds since the round was opened in which it has waited for the clients' data.

        Raises:
            ValueError: If the updates of all clients were refused.
        """
        merged = time.perf_counter()
        joined = RankReport.join(reports)
        closing = self.federation.close_round(self.opened, self.totals.acc, joined)
        self.trainer.end_round(closing.state.server["params"], closing.buffers, joined.schedule_end)
        # After the server's step, so that every client keeps its state of the last round if that step raises.
        self.store.commit()
        traffic, before = self.federation.group.traffic, self._traffic
        seconds = {
            "read": seconds_reading,
            "train": self._trained - self._opened - seconds_reading - self._transforming,
            "wait": traffic.seconds_waiting - before.seconds_waiting,
            "communicate": traffic.seconds_reducing - before.seconds_reducing,
            "server": time.perf_counter() - merged - closing.seconds_transforming,
            "transform": self._transforming + closing.seconds_transforming,
        }
        unsent = [name for name in joined.moved if name not in self.opened.buffers]
        num_bytes = traffic.num_bytes - before.num_bytes
        return RoundResult(closing, joined, seconds, num_bytes, self.settings.hides_clients, unsent)

    def abandon(self) -> None:
        """Restores the module and the clients' states of the round's start, because the round can't be finished."""
        self.restore_randomness()
        self.store.roll_back()
        self.trainer.put_back(also_alone=True)
        self.trainer.end_round(self.state.server["params"], self.opened.buffers, None)
