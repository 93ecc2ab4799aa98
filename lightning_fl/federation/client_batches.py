"""A client's batches in a round, each with its position in the client's local work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

from lightning_fl.clients.local_work import BatchPosition, LocalWork
from lightning_fl.data.client_loaders import Loader, count_batches
from lightning_fl.types import ClientId

# None can't mark the end: it is a batch that a loader may yield, and that training skips.
_END = object()


class _Place(NamedTuple):
    """The place of a batch in its pass: its index, and the length of the pass."""

    offset: int
    length: int | None


class _Read(NamedTuple):
    """A batch, its index in the segment, its place in the pass, and whether it ends segment and phase."""

    batch: Any
    in_segment: int
    place: _Place
    ends_segment: bool
    ends_phase: bool


def _place(index: int, length: int, pass_length: int | None) -> _Place:
    """The place of the batch at ``index`` of ``length`` batches that are read in passes over a loader."""
    if pass_length is None:  # without a length, the end of a pass is unknown
        return _Place(index, length)
    offset = index % pass_length
    return _Place(offset, min(pass_length, length - index + offset))


class LoaderFailed(Exception):
    """Raised when a client's loader raises an error.

    Args:
        client: The client.
        error: The error that its loader raised.
    """

    def __init__(self, client: ClientId, error: Exception) -> None:
        super().__init__(f"The loader of client {client!r} raised {type(error).__name__}: {error}")
        self.client = client
        self.error = error


class ClientBatches:
    """The batches of one client in a round, phase after phase.

    Args:
        client: The client.
        loader: The client's loader.
        works: The client's local work in each phase.
        round: Number of the round.
        max_work: The largest local work of any client: passes are numbered over all rounds, for samplers that shuffle
            by epoch, and no number may repeat.
        on_first_batch: Called once the first batch has been read.
    """

    def __init__(
        self,
        client: ClientId,
        loader: Loader,
        works: Sequence[LocalWork],
        round: int,
        max_work: LocalWork,
        on_first_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.client = client
        self.loader = loader
        self.works = works
        self.round = round
        self.max_work = max_work
        self.on_first_batch = on_first_batch
        self.seconds_waiting = 0.0
        """Seconds that training has waited for the loader."""
        # At least as many passes as any client makes in any round, so that no pass number repeats.
        self.first_pass = round * sum(max(work.epochs, max_work.epochs) for work in works)

    def read(self, next_phase: Callable[[], None] = lambda: None) -> Iterator[tuple[Any, BatchPosition]]:
        """Yields each batch with its position.

        Args:
            next_phase: Called between the last batch of a phase and the first of the next.

        Raises:
            LoaderFailed: If the loader raises, yields nothing, or fewer batches than its length promises.
        """
        for phase, (work, pass_length, batches) in enumerate(self._phases()):
            if phase:
                next_phase()
            window, is_last_phase = work.accumulate, phase + 1 == len(self.works)
            # Without a length the end of a pass is seen where the loader ends; cycled by steps, it is not.
            ends_unseen = pass_length is None and work.steps is None
            for batch, index, place, ends_segment, ends_phase in batches:
                # The index starts at 0 in each segment, so that no accumulation window straddles two passes.
                yield (
                    batch,
                    BatchPosition(
                        place.offset,
                        starts_window=index % window == 0,
                        ends_window=(index + 1) % window == 0 or ends_segment,
                        window=window,
                        ends_pass=place.offset + 1 == pass_length or (ends_unseen and ends_segment),
                        ends_phase=ends_phase,
                        is_last=ends_phase and is_last_phase,
                        ends_epoch=ends_segment or place.offset + 1 == place.length,
                        epoch_length=place.length,
                    ),
                )

    def _phases(self) -> Iterator[tuple[LocalWork, int | None, Iterator[_Read]]]:
        """Yields the work of each phase, the length of a pass, and its batches as :meth:`_phase` yields them."""
        number = self.first_pass
        for phase, work in enumerate(self.works):
            segments, pass_length = self._lengths(work)
            yield work, pass_length, self._timed(self._phase(phase, work, segments, number))
            number += len(segments)

    def _lengths(self, work: LocalWork) -> tuple[list[int | None], int | None]:
        """The segments of a phase, and the length of a pass."""
        try:
            num_batches = count_batches(self.loader)
            return work.segments(num_batches), work.pass_length(num_batches)
        except Exception as error:
            raise LoaderFailed(self.client, error) from error

    def read_once(self) -> Iterator[Any]:
        """Yields the batches of one pass outside the client's local training, such as for a probe.

        Raises:
            LoaderFailed: If the loader raises, can be read only once, or may never end.
        """
        work, loader = self.max_work, self.loader
        try:
            num_batches = count_batches(loader)
            length = work.max_pass_length if num_batches is None else work.pass_length(num_batches)
            # Checked before anything is read: the batches that a probe takes from an iterator would be missing in
            # training.
            if isinstance(loader, Iterator):
                raise ValueError(
                    "it is an iterator, which can be read once only, and the algorithm needs a pass of its own"
                )
            if length is None and work.steps is not None:
                raise ValueError(
                    "it has no length, so that the pass which the algorithm needs may never end; give "
                    "limit_train_batches=n, or the loader a length"
                )
            begin_pass(loader, self.first_pass)
            yield from islice(loader, length)
        except Exception as error:
            raise LoaderFailed(self.client, error) from error

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        is_first = True
        while True:
            start = time.perf_counter()
            try:
                item = next(batches, _END)
            except Exception as error:
                raise LoaderFailed(self.client, error) from error
            if is_first:
                self.on_first_batch()
                is_first = False
            self.seconds_waiting += time.perf_counter() - start
            if item is _END:
                return
            yield item

    def _phase(self, phase: int, work: LocalWork, segments: Sequence[int | None], number: int) -> Iterator[_Read]:
        """Yields the batches of a phase, each with its places and whether it ends segment and phase."""
        num_batches = count_batches(self.loader)
        for position, length in enumerate(segments):
            is_last = position + 1 == len(segments)
            batches: Iterator[Any]
            if work.steps is not None:
                pass_length = work.max_pass_length if num_batches is None else work.pass_length(num_batches)
                batches = islice(self._cycle(pass_length, self.round * len(self.works) + phase), length)
            else:
                begin_pass(self.loader, number + position)
                batches = islice(self.loader, work.max_pass_length if length is None else length)
            if length is None:
                yield from self._until_end(batches, is_last)
                continue
            index = -1
            cycle = length if work.steps is None else pass_length
            for index, batch in enumerate(batches):
                ends = index + 1 == length
                yield _Read(batch, index, _place(index, length, cycle), ends, ends and is_last)
            # The positions rest on the promised length: with fewer batches none is the last one, and the last optimizer
            # step of the segment would silently be missing.
            if index + 1 != length:
                raise ValueError(
                    f"The loader of client {self.client!r} yielded {index + 1} batches, but its length promised "
                    f"{length}. Fix its `__len__`, or remove it if the length is not known."
                )

    def _until_end(self, batches: Iterator[Any], is_last: bool) -> Iterator[_Read]:
        # Reads one batch ahead: the optimizer steps on the last batch even if it does not fill an accumulation window.
        batch = next(batches, _END)
        if batch is _END:
            raise ValueError(f"The loader of client {self.client!r} has no length and yielded no batch.")
        for index in count():
            following = next(batches, _END)
            ends = following is _END
            yield _Read(batch, index, _Place(index, None), ends, ends and is_last)
            if ends:
                return
            batch = following

    def _cycle(self, pass_length: int | None, round: int) -> Iterator[Any]:
        for number in count():
            # The number of passes that the steps take is not known beforehand; room for 65,536 of them keeps the
            # numbers of different rounds and phases apart.
            begin_pass(self.loader, (round << 16) + number)
            batch = _END
            for batch in islice(self.loader, pass_length):
                yield batch
            if batch is _END:
                raise ValueError(
                    f"The loader of client {self.client!r} yields no batch, but local_steps asks for some."
                )


def begin_pass(loader: Any, number: int) -> None:
    """Calls ``set_epoch`` on samplers that have it, such as ``DistributedSampler``."""
    # A DataLoader that was given a batch sampler has an unused default as its `sampler`; the one that shuffles is
    # inside the batch sampler. Otherwise both are the same object, which is called once.
    samplers: tuple[Any, Any] = (
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    )
    for sampler in {id(sampler): sampler for sampler in samplers}.values():
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(number)


def raise_to_user(failed: LoaderFailed) -> None:
    """Re-raises the error of a client's loader, with the client named."""
    # An error that names the client already needs no second message around it.
    if f"client {failed.client!r}" in str(failed.error):
        raise failed.error
    raise ValueError(
        f"{failed}. Fix it, or let the round go on without such clients with FederatedStrategy(on_client_error='skip')."
    ) from failed.error
