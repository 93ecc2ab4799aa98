"""The life of a round on one rank, as a plain object that any base strategy can drive."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from torch.optim import Optimizer

from lightning_fl.aggregation import Aggregator, ClientLost, RoundContext, Transform
from lightning_fl.algorithms import Algorithm, Weighting
from lightning_fl.clients import ClientStore, client_generator
from lightning_fl.communication import Group, Message
from lightning_fl.communication.objects import decode, encode
from lightning_fl.engines import Schedule, ScheduleEnd, SequentialEngine
from lightning_fl.strategies.hidden_report import hide, reveal
from lightning_fl.tree import is_finite, leaves, move, norm, scale, to_sum_dtype, zeros_like
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
    """

    algorithm: Algorithm
    aggregator: Aggregator
    transforms: Sequence[Transform]
    weighting: Weighting
    seed: int
    population: int

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
        seconds: This rank's seconds of ``train``, ``wait``, ``communicate`` and ``server``.
        num_bytes: Bytes that this rank has handed to the others.
    """

    state: FederationState
    aggregate: Aggregate
    reports: list[Message]
    refused: list[ClientId]
    lost: list[ClientId]
    seconds: dict[str, float]
    num_bytes: int

    @property
    def spread(self) -> float:
        """How far the clients' updates point apart, ``1 - |mean|^2 / mean |update|^2``: 0 if they are the same."""
        squares = sum(message.fields["squared_norm"] for message in self.reports)
        mean_square = squares / max(sum(message.fields["weight"] for message in self.reports), 1e-300)
        return 1 - self.norm**2 / mean_square if mean_square > 0 else 0.0

    @cached_property
    def norm(self) -> float:
        """Euclidean norm of the mean update."""
        return norm(self.aggregate.delta) / self.aggregate.weight


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
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.store = store
        self.group = group
        self.ctx = RoundContext(round=index, cohort=cohort, population=settings.population)
        self.refused: list[ClientId] = []
        self.lost: list[ClientId] = []
        self.num_steps = 0
        self.num_examples = 0
        self.schedule_end: ScheduleEnd | None = None
        self._squared_norm = 0.0
        self._opened = time.perf_counter()
        self._traffic = replace(group.traffic)
        params = engine.begin_round(state.server.get("params"), schedules)
        self.server = _continue_server(settings, state.server, params)
        self.transform_states = list(state.transforms) or [{} for _ in settings.transforms]
        like = Update(
            delta=params,
            buffers=to_sum_dtype(engine.tensors.buffers),
            aux=settings.algorithm.aux_like(params),
        )
        self._like = like
        self._acc = settings.aggregator.init(like, engine.device)
        self._client: ClientId | None = None

    def start_client(self, client: ClientId) -> None:
        """Loads a client; the caller then runs its local training."""
        self._client = client
        self._kept = move(self.store.get(client) or {}, self.engine.device)
        self._context: Context = self.settings.algorithm.client_init(self.server, self._kept.get("algorithm"))
        self.engine.start_client(self._context["params"], self._kept)

    def transform_grads(self, optimizer: Optimizer) -> None:
        """Lets the algorithm change the gradients that ``optimizer`` is about to step, unscaled and not yet clipped."""
        if self.settings.transforms_gradients:
            algorithm, context = self.settings.algorithm, self._context
            self.engine.transform_grads(
                lambda grads, params: algorithm.grad_transform(grads, params, context), optimizer
            )

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
        update, transform_states = self._transform(client, update)
        kept.update(transform_states)
        self.num_steps += run.num_steps
        if self.schedule_end is None or self.schedule_end.num_optimizer_steps < result.num_steps:
            self.schedule_end = result.schedule_end
        personal = self.engine.tensors.personal_params.values()
        stateful = leaves({name: value for name, value in kept.items() if name != "personal"})
        if not is_finite([*_tensors(update), *stateful, *personal]):
            self.refused.append(client)
            return run, None
        try:
            self._acc = self.settings.aggregator.add(self._acc, update, replace(self.ctx, client=client))
        except ClientLost:
            self.lost.append(client)
            return run, None
        self.num_examples += num_examples
        self._squared_norm += update.weight * norm(update.delta) ** 2
        if kept:
            self.store.stage(client, move(kept, "cpu"))
        return run, update

    def drop_client(self) -> bool:
        """Leaves out the client at hand; tells whether there was one."""
        client, self._client = self._client, None
        return client is not None

    def close(self, report: Message, look: Callable[[list[Message]], None] = lambda reports: None) -> RoundResult:
        """Joins the ranks' updates and loads the new global model; every rank calls it once a round.

        Args:
            report: What this rank tells the others besides.
            look: Is shown the reports of all ranks before anything is made of them.

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
        acc, reports = self.settings.aggregator.merge(self._acc, self.group, hide(own) if hides else own, self.ctx)
        reports = reveal(reports) if hides else reports
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
        aggregate = self.settings.aggregator.result(acc, self.ctx)
        for index, transform in reversed(list(enumerate(self.settings.transforms))):
            aggregate, self.transform_states[index] = transform.server(
                aggregate, self.transform_states[index], self.ctx
            )
        server = self.settings.algorithm.server_update(self.server, aggregate)
        self.engine.end_round(
            server["params"],
            scale(aggregate.buffers, 1 / aggregate.weight),
            _furthest([message.fields["schedule_end"] for message in reports]),
        )
        self.store.commit()
        traffic = self.group.traffic
        seconds = {
            "train": trained - self._opened,
            "wait": traffic.seconds_waiting - self._traffic.seconds_waiting,
            "communicate": traffic.seconds_reducing - self._traffic.seconds_reducing,
            "server": time.perf_counter() - merged,
        }
        num_bytes = traffic.num_bytes - self._traffic.num_bytes
        state = FederationState(server, self.transform_states)
        return RoundResult(state, aggregate, reports, refused, lost, seconds, num_bytes)

    def abandon(self) -> None:
        """Puts the module and the clients' states back to the round's start, when the round can't be finished."""
        self.store.roll_back()
        self.engine.end_round(self.server["params"], zeros_like(self._like.buffers), None)

    def _transform(self, client: ClientId, update: Update) -> tuple[Update, dict[str, State]]:
        states = {}
        for index, transform in enumerate(self.settings.transforms):
            generator = client_generator(self.settings.seed, self.ctx.round, client, f"transform {index}")
            ctx = replace(self.ctx, client=client, generator=generator)
            key = f"transform {index}"
            update, states[key] = transform.client(update, self._kept.get(key, {}), ctx)
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


def _furthest(ends: Sequence[Any]) -> ScheduleEnd | None:
    reached = [ScheduleEnd(**decode(end)) for end in ends if end is not None]
    return max(reached, key=lambda end: end.num_optimizer_steps, default=None)


def _tensors(update: Update) -> list[Any]:
    trees = [update.delta, update.buffers, *update.aux.values()]
    return [tensor for tree in trees for tensor in tree.values()]


def _some(values: Sequence[Any]) -> str:
    return ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
