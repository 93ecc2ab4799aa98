"""The batches of a round: the cohort's loaders one after the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count, islice
from typing import Any

from lightning_fl.clients.local_work import LocalWork
from lightning_fl.data.client_loaders import Loader, count_batches
from lightning_fl.data.prefetch import PrefetchedLoader, can_prefetch
from lightning_fl.federation.plan import RoundPlan
from lightning_fl.types import ClientId

LoadTogether = Callable[[ClientId, Callable[[Loader], Loader]], list[Any]]
UNKNOWN_LENGTH = sys.maxsize // 2
_END = object()


def raise_error(client: ClientId, error: Exception) -> None:
    """Raises what a client's loader has raised, with the client named."""
    if f"client {client!r}" in str(error):
        raise error
    raise ValueError(
        f"The loader of client {client!r} raised {type(error).__name__}: {error}. Fix it, or let the round go on "
        "without such clients with FederatedStrategy(on_client_error='skip')."
    ) from error


class LoaderFailed(Exception):
    """A client's loader has raised ``error`` outside its local training."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class RoundLoader:
    """The batches of this rank's clients, client after client; sized and lazy.

    A rank without clients yields one batch ``None``, so that it passes through the round's hooks as the others do.

    Args:
        load: Makes a client's loader.
        plan: Gives the plan of the round at hand, and how much the client that trains the most trains.
        open_round: Called before a round's first batch is read.
        open_client: Called with a client and its loader before the client's first batch is read; returns the loader.
            May raise :class:`LoaderFailed`.
        resolved: Called when the number of batches has become known or has changed.
        failed: Called when a client's loader raises; raises itself, or returns for the client to be left out.
        work_of: How much a client trains in the round at hand, phase by phase. None: all as much as ``plan`` says.
        open_together: Called with the index of a unit of several clients, and a function that reads a client's
            batches; returns the unit's batches, or None once it has split the unit.
        prefetch: Called with the next client and its loader once the first batch of a client whose loader has workers
            has been read; returns the loader, whose workers may read from then on.
    """

    def __init__(
        self,
        load: Callable[[ClientId], Loader],
        plan: Callable[[], tuple[RoundPlan, LocalWork]],
        open_round: Callable[[], None],
        open_client: Callable[[ClientId, Loader], Loader],
        resolved: Callable[[], None],
        failed: Callable[[ClientId, Exception], None] = raise_error,
        work_of: Callable[[ClientId], Sequence[LocalWork]] | None = None,
        open_together: Callable[[int, LoadTogether], Iterator[Any] | None] = lambda index, load: None,
        prefetch: Callable[[ClientId, Loader], Loader] = lambda client, loader: loader,
    ) -> None:
        self._load_client = load
        self._plan = plan
        self._open_round = open_round
        self._open_client = open_client
        self._resolved = resolved
        self._failed = failed
        self._work_of = work_of or (lambda client: [plan()[1]])
        self._open_together = open_together
        self._open_ahead = prefetch
        self._ahead: dict[ClientId, Loader] = {}
        self.seconds_reading = 0.0
        """Seconds in which the round has waited for the clients' data."""

    def __len__(self) -> int:
        num_batches = self._plan()[0].num_batches
        return UNKNOWN_LENGTH if num_batches is None else num_batches

    def __iter__(self) -> Iterator[Any]:
        self.seconds_reading = 0.0
        try:
            yield from self._round()
        finally:
            self._ahead.clear()

    def _round(self) -> Iterator[Any]:
        self._open_round()
        plan, _ = self._plan()
        self._num_yielded = 0
        position, opened = -1, set()
        while (position := position + 1) < len(plan.units):
            if len(plan.units[position]) > 1:
                batches = self._open_together(position, self._load)
                if batches is None:
                    position -= 1
                    continue
                for batch in batches:
                    self._num_yielded += 1
                    yield batch
                continue
            client = plan.units[position][0]
            if client in opened:
                continue
            opened.add(client)
            try:
                loader = self._make(client)
            except Exception as error:
                self._leave_out(client, error)
                continue
            try:
                loader = self._open_client(client, loader)
            except LoaderFailed as failed:
                self._leave_out(client, failed.error)
                continue
            try:
                for batch in self._batches(client, loader):
                    self._num_yielded += 1
                    yield batch
            except Exception as error:
                self._leave_out(client, error)
        if plan.is_empty(self._num_yielded):
            yield None

    def _make(self, client: ClientId) -> Loader:
        loader = self._ahead.pop(client) if client in self._ahead else self._load_client(client)
        if isinstance(loader, PrefetchedLoader) or can_prefetch(loader):
            self._make_next(client)
        return loader

    def _make_next(self, client: ClientId) -> None:
        """Makes the next client's loader before this one is opened, with the random numbers of its own turn."""
        in_turn = [other for unit in self._plan()[0].units for other in unit]
        following = next((other for other in in_turn[in_turn.index(client) :] if other != client), None)
        if following is not None and not self._ahead:
            with suppress(Exception):  # it will be raised, and its client named, when its turn comes
                self._ahead[following] = self._load_client(following)

    def _open_next(self) -> None:
        for client, loader in self._ahead.items():
            with suppress(Exception):
                self._ahead[client] = self._open_ahead(client, loader)

    def _load(self, client: ClientId, prepare: Callable[[Loader], Loader]) -> list[Any]:
        return list(self._batches(client, prepare(self._make(client))))

    def _leave_out(self, client: ClientId, error: Exception) -> None:
        self._failed(client, error)
        self._plan()[0].cut(self._num_yielded)
        self._resolved()

    def _batches(self, client: ClientId, loader: Loader) -> Iterator[Any]:
        batches, is_first = self._passes(client, loader), True
        while True:
            start = time.perf_counter()
            batch = next(batches, _END)
            if is_first:
                self._open_next()
            self.seconds_reading += time.perf_counter() - start
            if batch is _END:
                return
            is_first = False
            yield batch

    def _passes(self, client: ClientId, loader: Loader) -> Iterator[Any]:
        plan, most = self._plan()
        num_batches = count_batches(loader)
        works = self._work_of(client)
        num_passes = most.epochs if len(works) == 1 else sum(work.epochs for work in works)
        number = plan.round * num_passes
        for phase, work in enumerate(works):
            for segment in work.segments(num_batches):
                if work.steps is not None:
                    length = work.max_pass_length if num_batches is None else work.pass_length(num_batches)
                    yield from islice(_cycle(client, loader, length, plan.round * len(works) + phase), segment)
                    continue
                begin_pass(loader, number)
                number += 1
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


def one_pass(loader: Loader, number: int, work: LocalWork) -> Iterator[Any]:
    """The batches of one pass over a client's loader, outside its local training.

    Raises:
        LoaderFailed: If the loader raises, or can't be read once more than training reads it.
    """
    try:
        num_batches = count_batches(loader)
        length = work.max_pass_length if num_batches is None else work.pass_length(num_batches)
        if isinstance(loader, Iterator):
            raise ValueError(
                "it is an iterator, which can be read once only, and the algorithm needs a pass of its own"
            )
        if length is None and work.steps is not None:
            raise ValueError(
                "it has no length, so that the pass which the algorithm needs may never end; give "
                "limit_train_batches=n, or the loader a length"
            )
        begin_pass(loader, number)
        yield from islice(loader, length)
    except Exception as error:
        raise LoaderFailed(error) from error


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
            f"The loader of client {client!r} yielded {index + 1} batches, but its length promised {length}. Fix its "
            "`__len__`, or remove it if the length is not known."
        )
