"""What the contract suites share: ranks as threads, who is under contract, YAML, the steps of an aggregator."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser

from lightning_fl.aggregation import Aggregator, FederationFacts, RoundContext
from lightning_fl.communication import Group, LocalGroup, Message, RankLost, TorchGroup
from lightning_fl.types import Aggregate, Tree, Update

CPU = torch.device("cpu")


def shipped(base: type, *rooms: str) -> set[type]:
    """The subclasses of ``base`` in these packages, wherever they stand; each must be in the ``__all__`` of one."""
    packages = [importlib.import_module(room) for room in rooms]
    for package in packages:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found = {
        kind
        for kind in _subclasses(base)
        if kind.__module__.startswith(tuple(f"{room}." for room in rooms))
        and not kind.__name__.startswith("_")
        and not inspect.isabstract(kind)
    }
    public = {getattr(package, name) for package in packages for name in package.__all__}
    assert found <= public, f"not in __all__: {found - public}"
    return found


def _subclasses(base: type) -> set[type]:
    return {kind for child in base.__subclasses__() for kind in (child, *_subclasses(child))}


def from_yaml(base: type, class_path: str, init_args: Mapping[str, Any]) -> Any:
    """What a YAML file gives where a ``base`` is expected, also after it has been saved and read again."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=base)
    config = parser.parse_object({"value": {"class_path": class_path, "init_args": dict(init_args)}})
    return parser.instantiate_classes(parser.parse_string(parser.dump(config))).value


def run_threads(
    size: int, check: Callable[[Group], Any], timeout: float = 60.0, kind: type[TorchGroup] = TorchGroup
) -> list[Any]:
    """What ``check`` returns on each of ``size`` ranks: threads of this process, joined by a real Gloo group.

    If several ranks raise, any other error comes before `RankLost`: such a rank only waited for one that failed.
    """
    store, limit = dist.HashStore(), timedelta(seconds=timeout)

    def run(rank: int) -> Any:
        return check(kind(store, rank, size, CPU, limit))

    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for rank in ranks if (error := rank.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, RankLost)):
        raise error
    return [rank.result() for rank in ranks]


def trees(total: Aggregate | Update) -> dict[str, Tree]:
    """All trees of an aggregate or an update by name."""
    aux = {f"aux/{name}": tree for name, tree in total.aux.items()}
    return {"delta": total.delta, "buffers": total.buffers, **aux}


# ---- the steps of an aggregator, each called from here only


def open_session(aggregator: Aggregator, group: Group, num_clients: int, max_weight: float) -> Any:
    """Opens the aggregator for the training of simulated clients; gives what the other steps are called with."""
    facts = FederationFacts(silos=False, cohort_size=num_clients, is_training=True, max_weight=lambda: max_weight)
    return aggregator.open(group, facts)


def init(aggregator: Aggregator, like: Update, session: Any) -> Any:
    """An empty accumulator on the CPU."""
    return aggregator.init(like, CPU, session)


def gather(aggregator: Aggregator, session: Any, group: Group, report: Message) -> list[Message]:
    """The reports of all ranks, outside a round."""
    return aggregator.gather(session, group, report, "evaluation")


def context(num_clients: int, **changes: Any) -> RoundContext:
    """A round with all of ``num_clients`` clients."""
    return RoundContext(3, [f"client {i}" for i in range(num_clients)], population=num_clients, **changes)


def aggregate(
    aggregator: Aggregator,
    updates: Sequence[Update],
    clients: Sequence[int] | None = None,
    group: Group | None = None,
    report: Message | None = None,
) -> tuple[Aggregate, list[Message]]:
    """A round in which this rank adds the updates of ``clients``, in that order; None: of all.

    Returns:
        The aggregate, and the reports of all ranks.
    """
    group, ctx = group or LocalGroup(), context(len(updates))
    session = open_session(aggregator, group, len(updates), max(1.0, *(update.weight for update in updates)))
    acc = init(aggregator, updates[0], session)
    for client in range(len(updates)) if clients is None else clients:
        acc = aggregator.add(acc, updates[client], replace(ctx, client=ctx.cohort[client]))
    acc, reports = aggregator.merge(acc, group, report or Message(), ctx)
    return aggregator.result(acc, ctx), reports
