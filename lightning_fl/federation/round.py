"""The life of a round on one rank, as a plain object that any base strategy can drive."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_fl.aggregation import Aggregator, ClientLost, RoundContext, Transform
from lightning_fl.algorithms import Algorithm, Weighting
from lightning_fl.clients import ClientStore, Sampling
from lightning_fl.communication import Group, Message
from lightning_fl.communication.objects import decode, encode
from lightning_fl.engines import LocalResult, Schedule, ScheduleEnd, SequentialEngine, VectorizedEngine
from lightning_fl.engines.vectorized.stacking import are_finite, part
from lightning_fl.federation.client_group import ClientGroup
from lightning_fl.federation.report_masking import mask, unmask
from lightning_fl.seeding import client_generator
from lightning_fl.tree import clone, is_finite, leaves, move, norm, scale, squared_norms, to_sum_dtype, zeros_like
from lightning_fl.types import Aggregate, ClientId, Context, LocalRun, State, Tree, Update


@dataclass(frozen=True)
class FederationSettings:
    """What does not change from round to round.

    Args:
        algorithm: The mathematics.
        aggregator: How updates become one.
        transforms: What happens to updates on their way.
        weighting: What a client weighs in the mean.
        seed: Seed of all randomness that privacy does not rest on.
        population: Number of clients in the federation.
        sampling: How the cohorts are drawn.
        silos: Whether each rank is a silo with its own data.
    """

    algorithm: Algorithm
    aggregator: Aggregator
    transforms: Sequence[Transform]
    weighting: Weighting
    seed: int
    population: int
    sampling: Sampling | None = None
    silos: bool = False

    @property
    def hides_clients(self) -> bool:
        """Whether a transform must not let on who has taken part; a client that is refused then counts as zeros."""
        return any(transform.hides_clients for transform in self.transforms)

    @property
    def transforms_gradients(self) -> bool:
        """Whether the algorithm changes gradients at all."""
        return type(self.algorithm).grad_transform is not Algorithm.grad_transform


@dataclass(frozen=True)
class FederationState:
    """What changes from round to round, on every rank alike.

    Args:
        server: The algorithm's server state; empty before the first round.
        transforms: The state of each transform's server half.
    """

    server: State = field(default_factory=dict)
    transforms: Sequence[State] = ()


@dataclass(frozen=True)
class RoundResult:
    """What a round gave, the same on every rank.

    Args:
        state: The federation's next state.
        aggregate: The round's aggregate after the transforms.
        reports: What each rank told of the round.
        refused: Clients whose update was not finite.
        lost: Clients that have vanished before their update was taken in.
        seconds: This rank's seconds of ``read`` (waiting for the clients' data), ``train``, ``wait`` (for other ranks),
            ``communicate`` and ``server``.
        num_bytes: Bytes that this rank has handed to the others.
        facts: What the transforms report.
        hides_clients: Whether exact facts about the clients must not reach the loggers.
        stop_reason: Why no other round may follow; None if one may.
    """

    state: FederationState
    aggregate: Aggregate
    reports: list[Message]
    refused: list[ClientId]
    lost: list[ClientId]
    seconds: dict[str, float]
    num_bytes: int
    facts: dict[str, float | str]
    hides_clients: bool
    stop_reason: str | None

    @property
    def spread(self) -> float:
        """How far the clients' updates point apart, ``1 - |mean|^2 / mean |update|^2``: 0 if they are the same."""
        squares = sum(message.fields["squared_norm"] for message in self.reports)
        mean_square = squares / max(sum(message.fields["weight"] for message in self.reports), 1e-300)
        return 1 - self.norm**2 / mean_square if mean_square > 0 else 0.0

    @cached_property
    def norm(self) -> float:
        """Euclidean norm of the mean update."""
        return norm(self.aggregate.delta) / (self.aggregate.weight or 1.0)


class Round:
    """One round on one rank: open, then start and finish each client, then close.

    Args:
        settings: What does not change from round to round.
        state: The federation's state before the round.
        engine: Trains this rank's clients.
        store: The states of the clients that live on this rank.
        group: The ranks of the federation.
        index: Number of the round, from 0.
        cohort: The clients of the round, on all ranks.
        schedules: The learning-rate schedules that step inside local training.
        session: What the aggregator's ``open`` returned.

    Raises:
        ValueError: If the shared tensors have changed under an algorithm whose clients keep state for each of them.
    """

    def __init__(
        self,
        settings: FederationSettings,
        state: FederationState,
        engine: SequentialEngine,
        store: ClientStore,
        group: Group,
        index: int,
        cohort: Sequence[ClientId],
        schedules: Sequence[Schedule] = (),
        session: Any = None,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.store = store
        self.group = group
        self.ctx = RoundContext(
            index, cohort, settings.population, settings.sampling, group=group, silos=settings.silos
        )
        self.refused: list[ClientId] = []
        self.lost: list[ClientId] = []
        self.num_steps = 0
        self.num_examples = 0
        self.schedule_end: ScheduleEnd | None = None
        self._squared_norm = 0.0
        self._opened = time.perf_counter()
        self._traffic = replace(group.traffic)
        params = engine.begin_round(state.server.get("params"), schedules)
        self.ctx = replace(self.ctx, frozen=engine.tensors.frozen)
        self.server = _continue_server(settings, state.server, params)
        states = [*state.transforms, *({} for _ in settings.transforms[len(state.transforms) :])]
        for number, transform in enumerate(settings.transforms):
            states[number] = transform.start_round(states[number], self.ctx)
        self.transform_states: list[State] = states
        like = Update(
            delta=params,
            buffers=to_sum_dtype(engine.tensors.buffers),
            aux=settings.algorithm.aux_like(params),
        )
        for transform in settings.transforms:
            like = transform.like(like)
        self._like = like
        self._acc = settings.aggregator.init(like, engine.device, session)
        self._client: ClientId | None = None
        self._unit: ClientGroup | None = None

    def start_client(self, client: ClientId, probe: Callable[[Mapping[str, Tensor]], Any] | None = None) -> None:
        """Loads a client; the caller then runs its local training.

        Args:
            client: The client.
            probe: Called with the module's shared parameters while they are the global model; measures what the
                algorithm's ``probe`` asks for.
        """
        self._client = client
        self._kept = move(self.store.get(client) or {}, self.engine.device)
        measured = None
        if probe is not None:
            self.engine.start_client(self.server["params"], self._kept)
            measured = probe(self.engine.tensors.params)
        kept = self._kept.get("algorithm")
        self._context: Context = self.settings.algorithm.client_init(self.server, kept, measured)
        self._phases = iter(self.settings.algorithm.phases())
        self.phase = next(self._phases)
        self.engine.start_client(self._context["params"], self._kept, self.phase)

    def next_phase(self) -> None:
        """Goes on to the next phase of the client at hand."""
        self.phase = next(self._phases)
        self.engine.next_phase(self.phase)

    def transform_grads(self, optimizer: Optimizer) -> None:
        """Lets the algorithm change the gradients that ``optimizer`` is about to step, unscaled and not yet clipped."""
        if self._unit is not None:
            if self.settings.transforms_gradients:
                self.engine.transform_grads(self._unit.transform_grads, optimizer)
            return
        context, transform = self._context, self.phase.grad_transform
        if transform is None and self.settings.transforms_gradients:
            transform = self.settings.algorithm.grad_transform
        self.engine.mask_frozen_grads(optimizer)
        if transform is not None:
            self.engine.transform_grads(lambda grads, params: transform(grads, params, context), optimizer)

    def start_clients(self, clients: Sequence[ClientId]) -> None:
        """Loads several clients; the caller then runs their local training, in which each step is one of all of them.

        Raises:
            NotStackable: If what the algorithm gives them can't stand side by side.
        """
        kept = [move(self.store.get(client) or {}, self.engine.device) for client in clients]
        unit = ClientGroup(self.settings.algorithm, self.server, clients, kept)
        self._vectorized.start_clients(unit.starts, kept)
        self._unit = unit

    def leave_clients(self) -> None:
        """Forgets the clients loaded by :meth:`start_clients`, before they have trained."""
        self._unit = None
        self._vectorized.leave_clients()

    def choose(self, rows: Sequence[int]) -> None:
        """Lets only some of the clients that :meth:`start_clients` has loaded train in the next step.

        Args:
            rows: Their places among them, in order.
        """
        assert self._unit is not None
        self._vectorized.choose(rows)
        self._unit.choose(rows)

    def finish_clients(
        self, num_examples: Sequence[int], losses: Sequence[float], num_steps: Sequence[int] | None = None
    ) -> tuple[int, list[bool]]:
        """Takes in the clients that have trained together.

        Args:
            num_examples: Examples that one pass of the loader of each of them yields.
            losses: Their mean training losses.
            num_steps: How many steps each has taken, where :meth:`choose` has told them apart. None: all took all.

        Returns:
            How many more steps they have taken in all than the optimizers, and for each client whether its update was
            finite and so taken in.
        """
        assert self._unit is not None
        unit, self._unit = self._unit, None
        num_shared = self._vectorized.optimizers.num_steps
        results = self._vectorized.finish_clients(num_steps)
        result = results[0]
        weights = [float(own) if self.settings.weighting == "examples" else 1.0 for own in num_examples]
        facts = zip(results, num_examples, weights, losses, strict=True)
        runs = [LocalRun(own.num_steps, n, w, loss, own.lr_sum, own.normalizer) for own, n, w, loss in facts]
        update, states = unit.finish(result.params, runs)
        update = replace(update, buffers=result.buffers)
        kept: dict[str, Any] = {**result.kept, **({} if states is None else {"algorithm": states})}
        for own in results:
            self._count_run(own)
        if self.settings.transforms or not self.settings.aggregator.adds_groups:
            each = [replace(update.part(index), weight=weight) for index, weight in enumerate(weights)]
            given = enumerate(zip(unit.clients, unit.kept, each, strict=True))
            taken = [self._take_in(c, own, one, clone(part(kept, i))) is not None for i, (c, own, one) in given]
        else:
            finite = are_finite(self._to_be_finite(update, kept), len(unit.clients))
            taken = finite.tolist()
            self._add_together(update if all(taken) else update.select(finite), list(compress(weights, taken)))
            self.refused += [client for client, is_taken in zip(unit.clients, taken, strict=True) if not is_taken]
            for index, client in enumerate(unit.clients):
                if kept and taken[index]:
                    self.store.stage(client, move(clone(part(kept, index)), "cpu"))
        self.num_examples += sum(compress(num_examples, taken))
        return sum(run.num_steps for run in runs) - num_shared, taken

    def _add_together(self, updates: Update, weights: Sequence[float]) -> None:
        if weights:
            self._acc = self.settings.aggregator.add_group(self._acc, updates, weights, self.ctx)
            squared = squared_norms(updates.delta).tolist()
            self._squared_norm += sum(weight * own for weight, own in zip(weights, squared, strict=True))

    def finish_client(self, num_examples: int, loss: float) -> tuple[LocalRun, Update | None]:
        """Takes in the client at hand.

        Args:
            num_examples: Examples that one pass of its loader yields.
            loss: Its mean training loss.

        Returns:
            The facts of its local training, and its update, or None if that was refused because it was not finite, or
            has got lost.
        """
        assert self._client is not None
        client, self._client = self._client, None
        result = self.engine.finish_client()
        weight = float(num_examples) if self.settings.weighting == "examples" else 1.0
        run = LocalRun(result.num_steps, num_examples, weight, loss, result.lr_sum, result.normalizer)
        kept: dict[str, Any] = dict(result.kept)
        update, algorithm_state = self.settings.algorithm.client_finish(
            result.params, self._context, self._kept.get("algorithm"), run
        )
        update = replace(update, buffers=result.buffers, weight=weight)
        if algorithm_state is not None:
            kept["algorithm"] = algorithm_state
        self._count_run(result)
        taken = self._take_in(client, self._kept, update, kept)
        if taken is not None:
            self.num_examples += num_examples
        return run, taken

    def _count_run(self, result: LocalResult) -> None:
        self.num_steps += result.num_steps_of_all
        end = result.schedule_end
        if self.schedule_end is None or self.schedule_end.num_optimizer_steps < end.num_optimizer_steps:
            self.schedule_end = end

    def _take_in(
        self, client: ClientId, before: Mapping[str, Any], update: Update, kept: dict[str, Any]
    ) -> Update | None:
        """Adds an update, and stages what its client keeps; None if one of them is not finite."""
        is_sound = is_finite(leaves(self._to_be_finite(update, kept)))
        is_sendable = is_sound
        transform_states: dict[str, State] = {}
        if self.settings.transforms:
            update, transform_states = self._transform(client, before, update)
            is_sound = is_sound and is_finite(leaves(transform_states))
            is_sendable = is_finite(leaves(self._to_be_finite(update, {}))) and (
                is_sound or self.settings.hides_clients
            )
        if not is_sound:
            self.refused.append(client)
        if not is_sendable:
            return None
        try:
            self._acc = self.settings.aggregator.add(self._acc, update, replace(self.ctx, client=client))
        except ClientLost:
            self.lost.append(client)
            return None
        self._squared_norm += update.weight * norm(update.delta) ** 2
        if is_sound and (kept or transform_states):
            self.store.stage(client, move({**kept, **transform_states}, "cpu"))
        return update if is_sound else None

    def drop_client(self) -> bool:
        """Leaves out the client at hand; tells whether there was one."""
        client, self._client = self._client, None
        return client is not None

    def close(
        self,
        report: Message,
        look: Callable[[list[Message]], None] = lambda reports: None,
        seconds_reading: float = 0.0,
    ) -> RoundResult:
        """Joins the ranks' updates and loads the new global model; every rank calls it once a round.

        A round in which nobody was there to train leaves the model and the algorithm's state as they are, unless a
        transform gives it weight, as one that adds noise for differential privacy does.

        Args:
            report: What this rank tells the others besides.
            look: Is shown the reports of all ranks before anything is made of them.
            seconds_reading: Seconds since the round was opened in which it has waited for the clients' data.

        Raises:
            ValueError: If no client has given an update that can be used.
        """
        trained = time.perf_counter()
        hides = self.settings.aggregator.hides_reports and self.group.size > 1
        end = self.schedule_end
        if hides and end is not None and not any(end.num_steps):
            end = replace(end, num_optimizer_steps=0)
        fields = {
            **report.fields,
            "num_steps": self.num_steps,
            "num_examples": self.num_examples,
            "schedule_end": None if end is None else encode(asdict(end)),
            "refused": self.refused,
            "lost": self.lost,
            "squared_norm": self._squared_norm,
        }
        own = Message(fields, report.tensors)
        acc, reports = self.settings.aggregator.merge(self._acc, self.group, mask(own) if hides else own, self.ctx)
        reports = unmask(reports) if hides else reports
        merged = time.perf_counter()
        look(reports)
        refused, lost = (
            [client for message in reports for client in message.fields[kind]] for kind in ("refused", "lost")
        )
        if refused and not any(message.fields["num_clients"] for message in reports):
            raise ValueError(
                f"Round {self.ctx.round} has no update left: those of all its clients ({_some(refused)}) hold NaN or "
                "Inf. The global model is as it was. Lower the learning rate, clip gradients, or look at their data."
            )
        may_be_empty = self.settings.hides_clients or len(self.ctx.cohort) < self.ctx.population
        is_empty = may_be_empty and not any(message.fields["num_clients"] for message in reports)
        aggregate = self._nothing() if is_empty else self.settings.aggregator.result(acc, self.ctx)
        for index, transform in reversed(list(enumerate(self.settings.transforms))):
            aggregate, self.transform_states[index] = transform.server(
                aggregate, self.transform_states[index], self.ctx
            )
        server = self.settings.algorithm.server_update(self.server, aggregate) if aggregate.weight else self.server
        self.engine.end_round(
            server["params"],
            scale(aggregate.buffers, 1 / (aggregate.weight or 1.0)),
            _longest_schedule([message.fields["schedule_end"] for message in reports]),
        )
        self.store.commit()
        traffic = self.group.traffic
        seconds = {
            "read": seconds_reading,
            "train": trained - self._opened - seconds_reading,
            "wait": traffic.seconds_waiting - self._traffic.seconds_waiting,
            "communicate": traffic.seconds_reducing - self._traffic.seconds_reducing,
            "server": time.perf_counter() - merged,
        }
        num_bytes = traffic.num_bytes - self._traffic.num_bytes
        state = FederationState(server, self.transform_states)
        transforms = list(zip(self.settings.transforms, self.transform_states, strict=False))
        facts = {key: value for one, own in transforms for key, value in one.report(own, self.ctx).items()}
        reasons = (one.stop_reason(own, self.ctx) for one, own in transforms)
        stop_reason = next((reason for reason in reasons if reason is not None), None)
        hidden = self.settings.hides_clients
        return RoundResult(state, aggregate, reports, refused, lost, seconds, num_bytes, facts, hidden, stop_reason)

    @property
    def _vectorized(self) -> VectorizedEngine:
        assert isinstance(self.engine, VectorizedEngine)
        return self.engine

    def abandon(self) -> None:
        """Puts the module and the clients' states back to the round's start, when the round can't be finished."""
        self.store.roll_back()
        self.engine.end_round(self.server["params"], zeros_like(self._like.buffers), None)

    def _nothing(self) -> Aggregate:
        like = self._like
        aux = {name: zeros_like(tree) for name, tree in like.aux.items()}
        return Aggregate(zeros_like(like.delta), zeros_like(like.buffers), 0.0, aux, 0, self.ctx.population)

    def _to_be_finite(self, update: Update, kept: Mapping[str, Any]) -> dict[str, Any]:
        """What of a client must be finite; a personal buffer may hold an infinity, as an attention mask does."""
        own = self.engine.tensors.trainable
        personal = {name: value for name, value in kept.get("personal", {}).items() if name in own}
        return {**kept, "personal": personal, "delta": update.delta, "buffers": update.buffers, "aux": update.aux}

    def _transform(
        self, client: ClientId, before: Mapping[str, Any], update: Update
    ) -> tuple[Update, dict[str, State]]:
        states = {}
        for index, transform in enumerate(self.settings.transforms):
            generator = client_generator(self.settings.seed, self.ctx.round, client, f"transform {index}")
            server = self.transform_states[index]
            ctx = replace(self.ctx, client=client, generator=generator, server=server)
            key = f"transform {index}"
            update, states[key] = transform.client(update, before.get(key, {}), ctx)
        return update, {key: state for key, state in states.items() if state}


def _continue_server(settings: FederationSettings, server: State, params: Tree) -> State:
    if not server:
        return settings.algorithm.server_init(params, settings.population)
    if server["params"].keys() == params.keys():
        return {**server, "params": params}
    if settings.algorithm.keeps_client_state:
        changed = sorted(server["params"].keys() ^ params.keys())
        raise ValueError(
            f"The shared tensors have changed between rounds ({_some(changed)}), but the clients of "
            f"{type(settings.algorithm).__name__} keep state for each of them. Freeze and unfreeze before `fit`, or "
            "take an algorithm without client state."
        )
    fresh = settings.algorithm.server_init(params, settings.population)
    return {key: _complete(server.get(key), value) for key, value in fresh.items()} | {"params": params}


def _complete(old: Any, fresh: Any) -> Any:
    if not isinstance(fresh, Mapping):
        return fresh if old is None else old
    return {name: (old or {}).get(name, value) for name, value in fresh.items()}


def _longest_schedule(ends: Sequence[Any]) -> ScheduleEnd | None:
    reached = [ScheduleEnd(**decode(end)) for end in ends if end is not None]
    return max(reached, key=lambda end: end.num_optimizer_steps, default=None)


def _some(values: Sequence[Any]) -> str:
    return ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
