"""The server's side of a round, as pure functions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_fl.aggregation import RoundContext
from lightning_fl.engines.buffers import contributions_like, moved
from lightning_fl.engines.within_silo import WithinSilo
from lightning_fl.federation.checks import check_aggregate, check_next_model, check_server_state
from lightning_fl.federation.report import RankReport
from lightning_fl.federation.settings import FederationSettings, FederationState
from lightning_fl.tree import norm, scale, zeros_like
from lightning_fl.types import Aggregate, State, Tree, Update


@dataclass(frozen=True)
class ServerRound:
    """The server's side of an open round.

    Args:
        settings: The federation's settings.
        state: The state that :func:`open_server` returned.
        buffers: The shared buffers at the round's start.
        template: An update with the names and shapes that every update of the round has.
        ctx: Facts of the round.
    """

    settings: FederationSettings
    state: FederationState
    buffers: Tree
    template: Update
    ctx: RoundContext


@dataclass(frozen=True)
class Closing:
    """The result of a round.

    Args:
        state: The federation's next state.
        buffers: The next shared buffers.
        aggregate: The round's aggregate after the transforms.
        norm: Euclidean norm of the mean update.
        facts: Facts reported by the transforms.
        stop_reason: Why no further round may follow; None if one may.
        seconds_transforming: Seconds that the server halves of the transforms took in this process.
    """

    state: FederationState
    buffers: Tree
    aggregate: Aggregate
    norm: float
    facts: Mapping[str, Any]
    stop_reason: str | None
    seconds_transforming: float = 0.0


def open_server(
    settings: FederationSettings, state: FederationState, params: Tree, ctx: RoundContext
) -> FederationState:
    """The state with which a round starts.

    Transforms may spend privacy budget here, which stays spent if the round then fails: the caller must keep the
    ``transforms`` of the returned state in any case.

    Args:
        settings: The federation's settings.
        state: The state after the last round.
        params: The global parameters.
        ctx: Facts of the round.

    Raises:
        ValueError: If the shared tensors have changed under an algorithm whose clients keep state for each of them.
    """
    states = state.of_transforms(settings)
    contexts = contexts_of(settings, ctx)
    started = [t.start_round(own, c) for t, own, c in zip(settings.transforms, states, contexts, strict=True)]
    return replace(state, server=_continue(settings, state.server, params), transforms=started)


def update_template(settings: FederationSettings, params: Tree, buffers: Mapping[str, Tensor]) -> Update:
    """An update with the names and shapes of those that the aggregator receives; it holds the global model."""
    return update_templates(settings, params, buffers)[-1]


def update_templates(
    settings: FederationSettings, params: Tree, buffers: Mapping[str, Tensor], server: State | None = None
) -> list[Update]:
    """For each transform, an update like those that its client half receives; last, one like those that are sent."""
    # Noise would turn a value that no client has into a number.
    like = contributions_like(buffers, counts_known=not settings.hides_clients)
    algorithm = settings.algorithm
    aux = {**algorithm.aux_like(params), **algorithm.aux_of_clients(settings.population)}
    templates = [Update(algorithm.delta_like(params, server or {}), like, aux=aux)]
    # The client halves' outputs may have other shapes than the model.
    for transform in settings.transforms:
        templates.append(transform.like(templates[-1]))
    return templates


def contexts_of(settings: FederationSettings, ctx: RoundContext) -> list[RoundContext]:
    """The context of each transform, with its template."""
    templates: Sequence[Update | None] = ctx.templates or [None] * len(settings.transforms)
    return [replace(ctx, template=own) for _, own in zip(settings.transforms, templates, strict=False)]


def server_step(
    settings: FederationSettings,
    state: FederationState,
    aggregate: Aggregate,
    ctx: RoundContext,
    seconds: dict[str, float] | None = None,
) -> tuple[FederationState, Aggregate, dict[str, Any]]:
    """Updates the global model by the aggregate of a round.

    The server halves of the transforms run in reverse order, then the algorithm's ``server_update``. If the aggregate's
    weight is still 0, the algorithm's state does not change.

    Args:
        settings: The federation's settings.
        state: The state that :func:`open_server` returned.
        aggregate: The sums of the round's updates, not yet divided.
        ctx: Facts of the round.
        seconds: A dict in which the transforms' seconds are stored as ``"transform"``.

    Returns:
        The next state, the aggregate after the transforms, and the facts that the transforms report.

    Raises:
        NotFiniteError: If the algorithm's next state holds NaN or Inf.
    """
    # The caller's state is not changed: it is restored if the round can't be closed.
    states, contexts = list(state.transforms), contexts_of(settings, ctx)
    start, before = time.perf_counter(), aggregate
    # The last client half's change must be undone first.
    for index, transform in reversed(list(enumerate(settings.transforms))):
        aggregate, states[index] = transform.server(aggregate, states[index], contexts[index])
        if index == 0:
            delta = settings.algorithm.delta_like(state.server["params"], state.server)
            check_aggregate(transform, "server", aggregate, delta, before.buffers)
    if seconds is not None:
        seconds["transform"] = time.perf_counter() - start
    if aggregate.neighbours is not None and not settings.algorithm.mixes_neighbours:
        aggregate = replace(aggregate, nodes=aggregate.neighbours.gather(aggregate.nodes), neighbours=None)
    # Checked after the transforms, since one that adds noise gives weight to a round without clients.
    server = state.server
    if aggregate.weight:
        server = check_next_model(
            settings.algorithm, settings.algorithm.server_update(server, aggregate), server["params"], aggregate
        )
    facts: dict[str, Any] = {}
    start = time.perf_counter()
    for transform, own, context in zip(settings.transforms, states, contexts, strict=True):
        facts.update(transform.report(own, context))
    if seconds is not None:  # privacy accounting may take longer than the noise
        seconds["transform"] += time.perf_counter() - start
    return replace(state, server=server, transforms=states), aggregate, facts


def close_server(opened: ServerRound, acc: Any, joined: RankReport) -> Closing:
    """Updates the global model and the shared buffers by a round's updates.

    A round without clients does not change the model or the algorithm's state, unless a transform gives it weight, as
    one that adds noise for differential privacy does.

    Args:
        opened: The round.
        acc: The merged accumulator.
        joined: The reports of all parties.

    Raises:
        ValueError: If the updates of all clients were refused.
    """
    settings, ctx = opened.settings, opened.ctx
    # All ranks hold the same joined report, so all of them raise, and before the model has changed.
    if joined.refused and not joined.num_clients:
        raise ValueError(
            f"Round {ctx.round} has no update left: those of all its clients ({some(joined.refused)}) hold NaN or Inf. "
            "The global model is unchanged. Lower the learning rate, clip gradients, or check the clients' data."
        )
    # If all clients should take part and none has contributed, something is wrong: the aggregator's `result` then
    # raises.
    may_be_empty = settings.hides_clients or len(ctx.cohort) < ctx.population
    is_empty = may_be_empty and not joined.num_clients
    if is_empty:
        aggregate = nothing(opened)
    else:
        like = opened.template
        aggregate = check_aggregate(
            settings.aggregator, "result", settings.aggregator.result(acc, ctx), like.delta, like.buffers
        )
    seconds: dict[str, float] = {}
    state, aggregate, facts = server_step(settings, opened.state, aggregate, ctx, seconds)
    if not is_empty:
        facts.update(settings.aggregator.report(acc, ctx))
        if aggregate.neighbours is None:
            facts.update(settings.algorithm.report(state.server))
        state = replace(state, memory=settings.aggregator.remember(acc, ctx))
    if joined.num_clients:
        state = replace(state, moving=sorted({*(state.moving or ()), *joined.moved}))
    weight = aggregate.weight or 1.0
    # Algorithms do not see buffers, so their mean is taken here.
    buffers = moved(opened.buffers, scale(aggregate.buffers, 1 / weight))
    start = time.perf_counter()
    reason = stop_reason(settings, state, ctx)
    seconds["transform"] += time.perf_counter() - start
    total = WithinSilo(ctx.group).joint_norm(norm(aggregate.delta))
    return Closing(state, buffers, aggregate, total / weight, facts, reason, seconds["transform"])


def nothing(opened: ServerRound) -> Aggregate:
    """The aggregate of a round without clients."""
    template = opened.template
    aux = {name: zeros_like(tree) for name, tree in template.aux.items()}
    return Aggregate(zeros_like(template.delta), zeros_like(template.buffers), 0.0, aux, 0, opened.ctx.population)


def stop_reason(settings: FederationSettings, state: FederationState, ctx: RoundContext) -> str | None:
    """Why training must stop after this round, such as a spent privacy budget; None if it need not."""
    transforms = zip(settings.transforms, state.transforms, contexts_of(settings, ctx), strict=True)
    reasons = (transform.stop_reason(own, context) for transform, own, context in transforms)
    return next((reason for reason in reasons if reason is not None), None)


def _first(settings: FederationSettings, params: Tree) -> State:
    algorithm = settings.algorithm
    return check_server_state(algorithm, "server_init", algorithm.server_init(params, settings.population), params)


def _continue(settings: FederationSettings, server: State, params: Tree) -> State:
    if not server:
        return _first(settings, params)
    # The module's values take precedence over the state's: users and callbacks may change the model between rounds.
    if server["params"].keys() == params.keys():
        return {**server, "params": params}
    if settings.algorithm.keeps_client_state:
        changed = sorted(server["params"].keys() ^ params.keys())
        raise ValueError(
            f"The shared tensors have changed between rounds ({some(changed)}), but the clients of "
            f"{type(settings.algorithm).__name__} keep state for each of them. Freeze and unfreeze before `fit`, or "
            "use an algorithm without client state."
        )
    # Layers were frozen or unfrozen: parameters that are still shared keep their entries, such as momentum, and the
    # others start afresh.
    fresh = _first(settings, params)
    return {key: _complete(server.get(key), value) for key, value in fresh.items()} | {"params": params}


def continued(settings: FederationSettings, old: State, present: State) -> State:
    """The server state of an earlier round, with entries for the parameters that are shared now."""
    params = present["params"]
    if old["params"].keys() == params.keys():
        return old
    return {
        **_continue(settings, old, params),
        "params": {name: old["params"].get(name, value) for name, value in params.items()},
    }


def _complete(old: Any, fresh: Any) -> Any:
    if not isinstance(fresh, Mapping):
        return fresh if old is None else old
    return {name: (old or {}).get(name, value) for name, value in fresh.items()}


def some(values: Sequence[Any]) -> str:
    """The first few of the values, for an error message."""
    return ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
