"""Poisson batches for DP-SGD: each example is in each batch independently, with the same probability."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.collation import with_fast_collation
from lightning_fl.data.splitting import check_plain
from lightning_fl.privacy.accounting.sampling import FALSE_ALARM_PROBABILITY, Full, Poisson, Sampling
from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.privacy.sample_level.rows import take_rows
from lightning_fl.seeding import Randomness, SystemRandomness
from lightning_fl.torch_internals import pytree
from lightning_fl.types import ClientId

Drawn = Callable[[np.ndarray], None]


class PoissonBatches(Sampler[list[int]]):
    """Draws each example into each batch with probability ``rate``, from the operating system's randomness.

    Args:
        num_examples: Examples to draw from.
        rate: The probability, in (0, 1].
        num_batches: Batches in one pass.
        randomness: Source of the draws. None: the operating system.
    """

    def __init__(self, num_examples: int, rate: float, num_batches: int, randomness: Randomness | None = None) -> None:
        self.num_examples = num_examples
        self.rate = rate
        self.num_batches = num_batches
        self.randomness = randomness or SystemRandomness()

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.num_batches):
            yield np.flatnonzero(self.randomness.random(self.num_examples) < self.rate).tolist()


class PoissonLoader(DataLoader):
    """A client's loader with Poisson batches instead of its own: as many per pass, of the same expected size.

    Args:
        loader: A plain ``DataLoader``, in order or shuffled. All its examples can be drawn, even with ``drop_last``.
        drawn: Called with the examples of each batch, just before the batch is yielded.
        randomness: Source of the draws. None: the operating system.
        alone: Whether each example is read and collated alone, so that it can't depend on others.

    Raises:
        ValueError: If the loader is not a plain DataLoader.
    """

    def __init__(
        self, loader: DataLoader, drawn: Drawn, randomness: Randomness | None = None, alone: bool = False
    ) -> None:
        _check_plain(loader)
        dataset, collate_fn = with_fast_collation(loader.dataset, loader.collate_fn)
        # The package's own data sets of tensors index rows, which is collating alone.
        if alone and dataset is loader.dataset:
            dataset, collate_fn = OneByOne(dataset, collate_fn or default_collate), _joined
        self._drawn = drawn
        self.num_examples, size = len(dataset), loader.batch_size
        assert size is not None
        self.rate = min(1.0, size / max(self.num_examples, 1))
        self._draws = _Recorded(PoissonBatches(self.num_examples, self.rate, -(-self.num_examples // size), randomness))
        super().__init__(
            dataset,
            batch_sampler=self._draws,
            num_workers=loader.num_workers,
            collate_fn=collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
        )

    @property
    def sampling(self) -> Sampling:
        """The draw of a batch as a ledger records it."""
        return Poisson(self.rate) if self.rate < 1 else Full()

    @property
    def expected_batch_size(self) -> float:
        """The expected number of examples in a batch, by which a sum of gradients is divided."""
        return self.rate * self.num_examples

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Workers prefetch, so several batches are drawn before the first is yielded; the queue matches them up.
        # An interrupted pass leaves draws whose batches were never yielded.
        self._draws.drawn.clear()
        for batch in super().__iter__():
            chosen = self._draws.drawn.popleft()
            self._drawn(chosen)
            yield batch if len(chosen) else take_rows(batch, slice(0))


class OneByOne(Dataset):
    """A data set whose examples are collated batches of one.

    Args:
        dataset: The data set of examples.
        collate_fn: Makes a batch from a list of examples.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.examples_of = dataset
        self.collate_fn = collate_fn

    def __len__(self) -> int:
        return len(self.examples_of)

    def __getitem__(self, index: int) -> Any:
        if hasattr(self.examples_of, "__getitems__"):
            return self.collate_fn(self.examples_of.__getitems__([index]))
        return self.collate_fn([self.examples_of[index]])


def _joined(batches: list[Any]) -> Any:
    """Joins batches of one example."""
    flat = [pytree.tree_flatten(batch) for batch in batches]
    kinds = {(spec, tuple(getattr(leaf, "shape", None) for leaf in leaves)) for leaves, spec in flat}
    if len(kinds) > 1:
        raise ValueError(
            "SampleLevelDP(strict=True) collates each example alone, so that none depends on another, but the examples "
            "have different shapes. Let the data set or collate_fn pad all of them to the same length."
        )
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return pytree.tree_unflatten(
        [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns], flat[0][1]
    )


class _Recorded(Sampler[list[int]]):
    """Queues every draw for :class:`PoissonLoader`.

    An empty batch is read as the first example, because a collate function needs one; the loader removes it again.
    """

    def __init__(self, batches: PoissonBatches) -> None:
        self.batches = batches
        self.drawn: deque[np.ndarray] = deque()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for chosen in self.batches:
            self.drawn.append(np.asarray(chosen, dtype=np.int64))
            yield chosen or [0]


def poisson_loaders(loaders: ClientLoaders, make: Callable[[ClientId, Any], PoissonLoader]) -> ClientLoaders:
    """Returns loaders of the same clients with Poisson batches.

    Args:
        loaders: The clients' own loaders.
        make: Makes a client's Poisson loader from its own loader.
    """

    def size(client: ClientId) -> int:
        return make(client, loaders[client]).num_examples

    return ClientLoaders(loaders.ids, lambda client: make(client, loaders[client]), num_examples=size)


def _check_plain(loader: Any) -> None:
    try:
        check_plain(loader)
    except ValueError as error:
        reason = str(error).partition("; it must")[0]
        raise ValueError(
            f"{reason}. Under sample-level privacy every batch is drawn independently, each example with the same "
            "probability. Give the client a plain DataLoader(dataset, batch_size=...) over a map-style data set."
        ) from error
    if loader.batch_size is None:
        raise ValueError(
            "The loader has batch_size=None, so its data set makes the batches. Under sample-level privacy each "
            "example is drawn independently: give the client a data set of examples and a batch_size."
        )


class DrawCheck:
    r"""A statistical test of whether batches were drawn by Poisson sampling, over all clients and rounds so far.

    Three sums are compared with their expectation under Poisson sampling: the number of examples drawn, the squared
    deviations of how often each example was drawn, and those of the batch sizes. The bounds (Bernstein's; for a sum of
    non-negative numbers below its mean, :math:`\exp(-t^2 / 2 \sum E y^2)`) hold for any number of batches, so each
    check fails for a sound sampler with probability at most 1e-12.
    """

    def __init__(self) -> None:
        self._drawn = _Sum()
        self._of_examples = _Sum()
        self._of_batches = _Sum()

    def add(self, counts: np.ndarray, sizes: np.ndarray, rate: float) -> None:
        """Adds one client's batches.

        Args:
            counts: How often each of its examples was drawn, of shape ``[num_examples]``.
            sizes: The sizes of its batches, of shape ``[num_batches]``.
            rate: The probability with which an example is in a batch.
        """
        trials = len(counts) * len(sizes)
        self._drawn.add(float(sizes.sum()), trials * rate, trials * rate * (1 - rate), trials * rate, 1.0)
        # At a rate of 1 nothing varies, and the squares would be divided by a variance of 0.
        if rate < 1:
            _add_squares(self._of_examples, counts, len(sizes), rate)
            _add_squares(self._of_batches, sizes, len(counts), rate)

    @property
    def problem(self) -> str | None:
        """Evidence that the batches were not drawn by Poisson sampling; None if there is none."""
        if self._drawn.is_wrong:
            return f"{self._drawn.found:.0f} examples were drawn, expected {self._drawn.expected:.0f}"
        for what, total in (("each example is drawn", self._of_examples), ("the batches are", self._of_batches)):
            if total.is_wrong:
                noun = "often" if total is self._of_examples else "large"
                ratio = total.found / total.expected
                return f"how {noun} {what} varies {ratio:.2g} times as much as with Poisson sampling"
        return None


class _Sum:
    """A sum of independent non-negative numbers, with the moments that bound its distribution."""

    def __init__(self) -> None:
        self.found = self.expected = self.variance = self.second = self.largest = 0.0

    def add(self, found: float, expected: float, variance: float, second: float, largest: float) -> None:
        self.found += found
        self.expected += expected
        self.variance += variance
        self.second += second
        self.largest = max(self.largest, largest)

    @property
    def is_wrong(self) -> bool:
        distance = abs(self.found - self.expected)
        # Rounding of the sums; with a rate of 1 the bound below leaves no room for any distance.
        if distance <= 1e-9 * max(self.expected, 1.0):
            return False
        # Bernstein's inequality above the mean; below it, the sharper bound for non-negative numbers.
        spread = self.second if self.found < self.expected else self.variance + self.largest * distance / 3
        return distance**2 > 2 * spread * -math.log(FALSE_ALARM_PROBABILITY)


def _add_squares(total: _Sum, counts: np.ndarray, trials: int, rate: float) -> None:
    """Adds the squared deviations of binomial counts, each divided by its variance."""
    variance = trials * rate * (1 - rate)
    fourth = 2 + (1 - 6 * rate * (1 - rate)) / variance  # Var of the square of a binomial, standardised
    found = float(((counts - trials * rate) ** 2).sum() / variance)
    largest = (trials * max(rate, 1 - rate)) ** 2 / variance
    total.add(found, len(counts), len(counts) * fourth, len(counts) * (fourth + 1), largest)


def check_sampler() -> None:
    """Checks that the sampler draws Poisson batches, and not the same batches twice.

    Raises:
        PrivacyError: If it does not.
    """
    size, rate, num_batches = 1000, 0.1, 300
    first, second = (
        [np.array(batch, dtype=np.int64) for batch in PoissonBatches(size, rate, num_batches)] for _ in "ab"
    )
    check = DrawCheck()
    counts = np.bincount(np.concatenate(first), minlength=size)
    check.add(counts, np.array([len(batch) for batch in first]), rate)
    problem = check.problem
    if all(np.array_equal(*pair) for pair in zip(first, second, strict=True)):
        problem = "two passes drew the same"
    if problem is not None:
        raise PrivacyError(f"The batches are not drawn by Poisson sampling: {problem}. The run stops.")
