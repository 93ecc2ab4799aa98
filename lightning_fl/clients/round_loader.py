"""The batches of a round: the cohort's loaders one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from lightning_fl.clients.loaders import ClientLoaders, Loader
from lightning_fl.clients.plan import LocalWork, RoundPlan
from lightning_fl.clients.population import count_batches
from lightning_fl.types import ClientId

UNKNOWN_LENGTH = sys.maxsize // 2
_END = object()


class RoundLoader:
    """The batches of this rank's clients, client after client; sized and lazy.

    A rank without clients yields one batch ``None``, so that it passes through the round's hooks as the others do.

    Args:
        loaders: The clients' data.
        plan: Gives the plan of the round at hand.
        work: How much each client trains.
        open_round: Called before a round's first batch is read.
        prepare: Called with a client and its loader before the client's first batch is read; returns the loader.
    """

    def __init__(
        self,
        loaders: ClientLoaders,
        plan: Callable[[], RoundPlan],
        work: LocalWork,
        open_round: Callable[[], None],
        prepare: Callable[[ClientId, Loader], Loader],
    ) -> None:
        self._loaders = loaders
        self._plan = plan
        self._work = work
        self._open_round = open_round
        self._prepare = prepare

    def __len__(self) -> int:
        num_batches = self._plan().num_batches
        return UNKNOWN_LENGTH if num_batches is None else num_batches

    def __iter__(self) -> Iterator[Any]:
        plan, work = self._plan(), self._work
        self._open_round()
        if not plan.clients:
            yield None
        for client in plan.clients:
            loader = self._prepare(client, self._loaders[client])
            num_batches = count_batches(loader)
            for segment in work.segments(num_batches):
                if work.steps is not None:
                    length = work.max_pass_length if num_batches is None else work.pass_length(num_batches)
                    yield from islice(_cycle(client, loader, length), segment)
                elif segment is not None:
                    yield from _exactly(client, loader, segment)
                else:
                    yield from _until_end(client, loader, work.max_pass_length, plan)


def _cycle(client: ClientId, loader: Loader, length: int | None) -> Iterator[Any]:
    while True:
        batch = _END
        for batch in islice(loader, length):
            yield batch
        if batch is _END:
            raise ValueError(f"The loader of client {client!r} yields no batch, but local_steps asks for some.")


def _exactly(client: ClientId, loader: Loader, length: int) -> Iterator[Any]:
    index = -1
    for index, batch in enumerate(islice(loader, length)):  # noqa: B007
        yield batch
    if index + 1 != length:
        raise ValueError(
            f"The loader of client {client!r} yielded {index + 1} batches, but its length promised {length}. Mend its "
            "`__len__`, or remove it if the length is not known."
        )


def _until_end(client: ClientId, loader: Loader, max_length: int | None, plan: RoundPlan) -> Iterator[Any]:
    batches = islice(loader, max_length)
    batch, index = next(batches, _END), 0
    if batch is _END:
        raise ValueError(f"The loader of client {client!r} has no length and yielded no batch.")
    while batch is not _END:
        following, index = next(batches, _END), index + 1
        if following is _END:
            plan.resolve(index)
        yield batch
        batch = following
