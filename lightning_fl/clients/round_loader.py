"""The batches of a round: the cohort's loaders one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

from lightning_fl.clients.loaders import ClientLoaders, Loader
from lightning_fl.clients.plan import LocalWork, RoundPlan
from lightning_fl.clients.population import count_batches
from lightning_fl.types import ClientId

UNKNOWN_LENGTH = sys.maxsize // 2
_END = object()


def raise_error(client: ClientId, error: Exception) -> None:
    """Raises what a client's loader has raised, with the client named."""
    if f"client {client!r}" in str(error):
        raise error
    raise ValueError(
        f"The loader of client {client!r} raised {type(error).__name__}: {error}. Mend it, or let the round go on "
        "without such clients with FederatedStrategy(on_client_error='skip')."
    ) from error


class RoundLoader:
    """The batches of this rank's clients, client after client; sized and lazy.

    A rank without clients yields one batch ``None``, so that it passes through the round's hooks as the others do.

    Args:
        loaders: The clients' data.
        plan: Gives the plan of the round at hand, and how much the client that trains the most trains.
        open_round: Called before a round's first batch is read.
        open_client: Called with a client and its loader before the client's first batch is read; returns the loader.
        resolved: Called when the number of batches has become known or has changed.
        failed: Called when a client's loader raises; raises itself, or returns for the client to be left out.
        work_of: How much a client trains in the round at hand. None: all as much as ``plan`` says.
    """

    def __init__(
        self,
        loaders: ClientLoaders,
        plan: Callable[[], tuple[RoundPlan, LocalWork]],
        open_round: Callable[[], None],
        open_client: Callable[[ClientId, Loader], Loader],
        resolved: Callable[[], None],
        failed: Callable[[ClientId, Exception], None] = raise_error,
        work_of: Callable[[ClientId], LocalWork] | None = None,
    ) -> None:
        self._loaders = loaders
        self._plan = plan
        self._open_round = open_round
        self._open_client = open_client
        self._resolved = resolved
        self._failed = failed
        self._work_of = work_of or (lambda client: plan()[1])

    def __len__(self) -> int:
        num_batches = self._plan()[0].num_batches
        return UNKNOWN_LENGTH if num_batches is None else num_batches

    def __iter__(self) -> Iterator[Any]:
        self._open_round()
        plan, _ = self._plan()
        self._num_yielded = 0
        for client in plan.clients:
            try:
                loader = self._loaders[client]
            except Exception as error:
                self._leave_out(client, error)
                continue
            loader = self._open_client(client, loader)
            try:
                for batch in self._batches(client, loader):
                    self._num_yielded += 1
                    yield batch
            except Exception as error:
                self._leave_out(client, error)
        if plan.is_empty(self._num_yielded):
            yield None

    def _leave_out(self, client: ClientId, error: Exception) -> None:
        self._failed(client, error)
        self._plan()[0].cut(self._num_yielded)
        self._resolved()

    def _batches(self, client: ClientId, loader: Loader) -> Iterator[Any]:
        plan, work = self._plan()
        num_batches = count_batches(loader)
        for number, segment in enumerate(self._work_of(client).segments(num_batches)):
            if work.steps is not None:
                length = work.max_pass_length if num_batches is None else work.pass_length(num_batches)
                yield from islice(_cycle(client, loader, length, plan.round), segment)
                continue
            begin_pass(loader, plan.round * work.epochs + number)
            if segment is not None:
                yield from _exactly(client, loader, segment)
            else:
                yield from self._until_end(client, loader, work.max_pass_length, plan)

    def _until_end(self, client: ClientId, loader: Loader, max_length: int | None, plan: RoundPlan) -> Iterator[Any]:
        batches = islice(loader, max_length)
        batch, index = next(batches, _END), 0
        if batch is _END:
            raise ValueError(f"The loader of client {client!r} has no length and yielded no batch.")
        while batch is not _END:
            following, index = next(batches, _END), index + 1
            if following is _END:
                plan.resolve(index)
                self._resolved()
            yield batch
            batch = following


def begin_pass(loader: Any, number: int) -> None:
    """Tells samplers that order by epoch, such as ``DistributedSampler``, which pass comes."""
    samplers: tuple[Any, Any] = (
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    )
    for sampler in {id(sampler): sampler for sampler in samplers}.values():
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(number)


def _cycle(client: ClientId, loader: Loader, length: int | None, round: int) -> Iterator[Any]:
    for number in count():
        begin_pass(loader, (round << 16) + number)
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
