"""A summary of the partition: the clients' sizes and labels, and one number for their heterogeneity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PartitionSummary:
    r"""The clients' sizes and labels.

    Args:
        num_clients: Number of all clients; the summary may show fewer.
        ids: The clients shown.
        sizes: Examples in one pass over the data of each client shown; None if unknown before training.
        labels: Names of the classes, or of up to ten ranges between quantiles of a numeric target; empty if unknown.
        counts: Number of examples of each label, for each client shown; empty if unknown.
    """

    num_clients: int
    ids: Sequence[int | str]
    sizes: Sequence[int | None]
    labels: Sequence[str] = ()
    counts: Sequence[Sequence[int]] = ()

    @property
    def label_skew(self) -> float | None:
        r"""The difference between the clients' labels: 0 if all have the same mix, close to 1 if none share a label.

        The mean total variation distance of the clients' label shares :math:`p_i` from those of all clients together,
        weighted by size: :math:`\sum_i \frac{n_i}{n} \frac{1}{2} \lVert p_i - p \rVert_1`.
        """
        return _label_skew(np.asarray(self.counts, dtype=float)) if len(self.counts) else None

    @property
    def label_skew_if_iid(self) -> float | None:
        """The :attr:`label_skew` expected by chance: for clients of the same sizes with randomly drawn labels.

        Small clients differ by chance alone, so compare the skew with this number.
        """
        if not len(self.counts):
            return None
        counts = np.asarray(self.counts)
        total = counts.sum()
        if not total:
            return None
        # A fixed seed, so that a report that is created again shows the same number.
        rng = np.random.default_rng(0)
        draws = [rng.multinomial(size, counts.sum(axis=0) / total) for size in counts.sum(axis=1)]
        return _label_skew(np.asarray(draws, dtype=float))

    @property
    def known_sizes(self) -> list[int]:
        """The sizes that are known before training."""
        return [size for size in self.sizes if size is not None]

    def as_dict(self) -> dict[str, Any]:
        """The summary as a value that JSON can represent."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PartitionSummary:
        """Restores a summary from the result of :meth:`as_dict`."""
        return cls(**{name: fields[name] for name in ("num_clients", "ids", "sizes", "labels", "counts")})


def _label_skew(counts: np.ndarray) -> float | None:
    sizes = counts.sum(axis=1)
    if not sizes.sum():
        return None
    shares = counts[sizes > 0] / sizes[sizes > 0, None]
    pooled = counts.sum(axis=0) / sizes.sum()
    distances = 0.5 * np.abs(shares - pooled).sum(axis=1)
    return float((distances * sizes[sizes > 0]).sum() / sizes.sum())
