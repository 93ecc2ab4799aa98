"""Partitioners: how one data set is split among simulated clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from lightning_fl.clients.targets import label_groups
from lightning_fl.types import ClientId

DEFAULT_NUM_CLIENTS = 10
_STREAM = 0x5117


class Partitioner(ABC):
    """Splits a data set among clients: every sample goes to exactly one of them.

    A partitioner of your own overrides :meth:`split` and draws its randomness from the ``rng`` it is given.
    """

    names_clients: bool = False
    """Whether the data says who the clients are, so that ``num_clients`` is left out."""

    changes_examples: bool = False
    """Whether clients see examples other than those of the data set, see :meth:`client_dataset`."""

    def __call__(self, dataset: Any, num_clients: int | None = None, seed: int = 0) -> list[torch.Tensor]:
        """Splits ``dataset`` among ``num_clients`` clients; equal arguments give equal splits.

        Args:
            dataset: A map-style data set.
            num_clients: Number of clients, at least 1 and at most the number of samples. None: 10, or those that the
                data names.
            seed: Seed of the split, at least 0.

        Returns:
            For each client the indices of its samples: int64, sorted, shape ``[num_samples_of_client]``.

        Raises:
            ValueError: If the data set has no length, the number of clients does not fit it, or a partitioner of your
                own leaves out a sample or gives one away twice.
        """
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{type(dataset).__name__} cannot be partitioned: a map-style data set with a length is needed. Give "
                "each client its own loader with fl.datamodules.ClientLoaders."
            )
        if num_clients is None or num_clients > 0:
            num_clients = len(self.client_ids(dataset, num_clients))
        if not 1 <= num_clients <= len(dataset):
            raise ValueError(
                f"num_clients={num_clients} does not fit a data set of {len(dataset)} samples: it must be at least 1 "
                "and at most the number of samples. Change num_clients or use more data."
            )
        parts = self.split(dataset, num_clients, np.random.default_rng([seed, _STREAM]))
        owner = _owners(parts, len(dataset), str(self))
        ends = np.cumsum(np.bincount(owner, minlength=num_clients))[:-1]
        return list(torch.from_numpy(np.argsort(owner, kind="stable")).tensor_split(torch.from_numpy(ends)))

    def client_ids(self, dataset: Any, num_clients: int | None = None) -> Sequence[ClientId]:
        """The clients' ids in the order of the parts: ``0 .. num_clients-1`` unless the data names them."""
        return range(DEFAULT_NUM_CLIENTS if num_clients is None else num_clients)

    def client_dataset(self, dataset: Any, part: torch.Tensor, client: int, num_clients: int, seed: int) -> Dataset:
        """What a client sees of the data set.

        Args:
            dataset: The data set that was split.
            part: The indices of the client's samples, or of some of them.
            client: The client's position, ``0 .. num_clients-1``.
            num_clients: Number of clients.
            seed: Seed of the split.
        """
        return Subset(dataset, part.tolist())

    @abstractmethod
    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """The clients' sample indices, in any order.

        Args:
            dataset: A map-style data set with at least ``num_clients`` samples.
            num_clients: Number of clients, at least 1.
            rng: The only source of randomness.
        """


@dataclass(frozen=True)
class IID(Partitioner):
    """Shuffles the samples and deals them out evenly: the clients' sizes differ by at most 1."""

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        return np.array_split(rng.permutation(len(dataset)), num_clients)


@dataclass(frozen=True)
class Dirichlet(Partitioner):
    r"""Label skew drawn from a Dirichlet distribution; the smaller ``alpha``, the more the clients differ.

    ``per="class"`` (NIID-Bench): each class :math:`k` is shared out among the :math:`m` clients by

    .. math:: p_k \sim \mathrm{Dir}_m(\alpha, \dots, \alpha),

    so clients differ in their labels and in their sizes, and :math:`E \sum_i p_{ki}^2 = (\alpha+1)/(m\alpha+1)`.

    ``per="client"`` (Hsu et al.): each client :math:`i` draws its own mix of the classes

    .. math:: q_i \sim \mathrm{Dir}(\alpha \pi)

    with :math:`\pi` the class shares of the data set, and gets :math:`n_i q_{ik}` samples of class :math:`k`, rounded
    up or down at random without bias. Clients have equal sizes :math:`n_i` (to within 1), and with :math:`K` equal
    classes :math:`E \sum_k q_{ik}^2 = (\alpha/K+1)/(\alpha+1)`. Clients are filled in the order of their ids; when a
    class has run out, the mix is renormalised over the others, so the last clients depart from their mix the most.

    Args:
        alpha: Concentration, positive and finite. For clients that do not differ use :class:`IID`.
        per: Which of the two conventions, ``"class"`` or ``"client"``.
        min_size: Smallest number of samples of a client. A draw that gives a client less is repeated.
        max_tries: Number of draws before giving up.
        num_bins: Number of groups of equal size that stand for the classes when targets are numbers.

    Raises:
        ValueError: If an argument is out of range; when called, if no draw met ``min_size`` or the labels are no
            class labels (see :func:`targets`).

    References:
        Li, Diao, Chen, He, *Federated Learning on Non-IID Data Silos: An Experimental Study* (NIID-Bench), 2022,
        arXiv:2102.02079. Hsu, Qi, Brown, *Measuring the Effects of Non-Identical Data Distribution for Federated
        Visual Classification*, 2019, arXiv:1909.06335.
    """

    alpha: float
    _: KW_ONLY
    per: Literal["class", "client"] = "class"
    min_size: int = 1
    max_tries: int = 100
    num_bins: int = 10

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha} must be positive and finite; for clients that are alike use IID().")
        if self.per not in ("class", "client"):
            raise ValueError(
                f"per={self.per!r} is unknown; 'class' is the convention of NIID-Bench, 'client' that of Hsu et al."
            )
        if self.min_size < 0:
            raise ValueError(f"min_size={self.min_size} must be at least 0.")
        if self.max_tries < 1:
            raise ValueError(f"max_tries={self.max_tries} must be at least 1.")

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        groups = label_groups(dataset, self.num_bins)
        counts = self._draw_counts(np.bincount(groups), num_clients, rng)
        return deal_groups(groups, counts, rng)

    def _draw_counts(self, class_sizes: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
        """Samples of each client and class, ``[num_clients, num_classes]``, with at least ``min_size`` a client."""
        if self.min_size * num_clients > class_sizes.sum():
            raise ValueError(
                f"min_size={self.min_size} for {num_clients} clients needs {self.min_size * num_clients} samples, "
                f"found {class_sizes.sum()}. Use fewer clients or a smaller min_size."
            )
        draw = _counts_per_class if self.per == "class" else _counts_per_client
        best = 0
        for _ in range(self.max_tries):
            counts = draw(self.alpha, class_sizes, num_clients, rng)
            smallest = counts.sum(axis=1).min()
            if smallest >= self.min_size:
                return counts
            best = max(best, smallest)
        raise ValueError(
            f"In {self.max_tries} draws of {self} over {num_clients} clients and {class_sizes.sum()} samples the "
            f"smallest client had at most {best} samples, expected at least {self.min_size}. Use a larger alpha, fewer "
            "clients or a smaller min_size."
        )


def _counts_per_class(alpha: float, class_sizes: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
    shares = rng.dirichlet(np.full(num_clients, alpha), size=len(class_sizes))
    edges = np.rint(np.cumsum(shares, axis=1) * class_sizes[:, None]).astype(np.int64)
    edges[:, -1] = class_sizes
    return np.diff(edges, axis=1, prepend=0).T


def _counts_per_client(alpha: float, class_sizes: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
    prior = class_sizes / class_sizes.sum()
    left = class_sizes.copy()
    counts = np.zeros((num_clients, len(class_sizes)), dtype=np.int64)
    client_sizes = np.diff(np.arange(num_clients + 1) * class_sizes.sum() // num_clients)
    for count, missing in zip(counts, client_sizes, strict=True):
        mix = rng.dirichlet(alpha * prior)
        while missing > 0:
            mix = np.where(left > 0, mix, 0.0)
            if mix.sum() == 0.0:
                mix[left > 0] = rng.dirichlet(alpha * prior[left > 0])
            taken = np.minimum(_apportion(missing, mix, rng), left)
            count += taken
            left -= taken
            missing -= taken.sum()
    return counts


def _apportion(total: int, mix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Counts that sum to ``total``, each ``total * mix / sum(mix)`` rounded up or down, right in expectation."""
    order = rng.permutation(len(mix))
    edges = np.cumsum(mix[order])
    edges = np.floor(edges / edges[-1] * total + rng.random()).astype(np.int64)
    counts = np.empty_like(edges)
    counts[order] = np.diff(edges, prepend=0)
    return counts


def deal_groups(groups: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Deals the samples of each group out at random.

    Args:
        groups: The group of each sample, int64 of shape ``[num_samples]``.
        counts: How many samples of each group a client gets, int64 of shape ``[num_clients, num_groups]``.
        rng: Source of randomness.
    """
    owner = np.empty(len(groups), dtype=np.int64)
    shuffled = rng.permutation(len(groups))
    members = shuffled[np.argsort(groups[shuffled], kind="stable")]
    owner[members] = np.repeat(np.tile(np.arange(len(counts)), counts.shape[1]), counts.T.ravel())
    return np.split(np.argsort(owner, kind="stable"), np.cumsum(counts.sum(axis=1))[:-1])


def _owners(parts: Sequence[np.ndarray], num_samples: int, name: str) -> np.ndarray:
    """The client of each sample; refuses parts that are no partition."""
    samples = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    inside = samples[(samples >= 0) & (samples < num_samples)]
    times = np.bincount(inside, minlength=num_samples)
    if len(inside) != len(samples) or (times != 1).any():
        raise ValueError(
            f"{name} gave {(times == 0).sum()} of {num_samples} samples to no client, {(times > 1).sum()} to several, "
            f"and {len(samples) - len(inside)} that do not exist; every sample must go to exactly one client."
        )
    owner = np.empty(num_samples, dtype=np.int64)
    owner[samples] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return owner
