"""Label skew: partitioners whose clients have different mixes of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np

from lightning_fl.data.partitioners.partitioner import Partitioner
from lightning_fl.data.targets import label_groups


@dataclass(frozen=True)
class Dirichlet(Partitioner):
    r"""Label skew from a Dirichlet distribution; the smaller ``alpha``, the more the clients differ.

    ``per="class"`` (NIID-Bench): each class :math:`k` is divided among the :math:`m` clients in proportions

    .. math:: p_k \sim \mathrm{Dir}_m(\alpha, \dots, \alpha),

    so clients differ in label distribution and size, and :math:`E \sum_i p_{ki}^2 = (\alpha+1)/(m\alpha+1)`.

    ``per="client"`` (Hsu et al.): each client :math:`i` draws its own mix of the classes

    .. math:: q_i \sim \mathrm{Dir}(\alpha \pi)

    with :math:`\pi` the class proportions of the data set, and gets :math:`n_i q_{ik}` samples of class :math:`k`,
    rounded stochastically without bias. All clients have the same size :math:`n_i` (to within 1), and with :math:`K`
    equally large classes :math:`E \sum_k q_{ik}^2 = (\alpha/K+1)/(\alpha+1)`. Clients are filled in the order of their
    ids; when a class is used up, the mix is renormalised over the others, so the last clients deviate from their mix
    the most.

    Args:
        alpha: Concentration, positive and finite. For identically distributed clients use :class:`IID`.
        per: The convention, ``"class"`` or ``"client"``.
        min_size: Minimum number of samples per client. A draw that gives a client fewer is repeated.
        max_tries: Number of draws before giving up.
        num_bins: Number of quantile bins that serve as classes if the targets are continuous.

    Raises:
        ValueError: If an argument is out of range; when called, if no draw met ``min_size`` or the targets can't be
            grouped (see :func:`targets`).

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
            raise ValueError(
                f"alpha={self.alpha} must be positive and finite; for identically distributed clients use IID()."
            )
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
        """Number of samples per client and class, ``[num_clients, num_classes]``, at least ``min_size`` per client."""
        if self.min_size * num_clients > class_sizes.sum():
            raise ValueError(
                f"min_size={self.min_size} for {num_clients} clients needs {self.min_size * num_clients} samples, "
                f"found {class_sizes.sum()}. Use fewer clients or a smaller min_size."
            )
        draw = _counts_per_class if self.per == "class" else _counts_per_client
        largest_min = 0
        for _ in range(self.max_tries):
            counts = draw(self.alpha, class_sizes, num_clients, rng)
            smallest = counts.sum(axis=1).min()
            if smallest >= self.min_size:
                return counts
            largest_min = max(largest_min, smallest)
        raise ValueError(
            f"In {self.max_tries} draws of {self} over {num_clients} clients and {class_sizes.sum()} samples the "
            f"smallest client had at most {largest_min} samples, expected at least {self.min_size}. Use a larger "
            "alpha, fewer clients or a smaller min_size."
        )


def _counts_per_class(alpha: float, class_sizes: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
    shares = rng.dirichlet(np.full(num_clients, alpha), size=len(class_sizes))
    # The cumulative shares are rounded, not the shares, so that the counts sum to the size of the class.
    edges = np.rint(np.cumsum(shares, axis=1) * class_sizes[:, None]).astype(np.int64)
    # Cumulative shares may end slightly off 1.
    edges[:, -1] = class_sizes
    return np.diff(edges, axis=1, prepend=0).T


def _counts_per_client(alpha: float, class_sizes: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
    prior = class_sizes / class_sizes.sum()
    remaining = class_sizes.copy()
    counts = np.zeros((num_clients, len(class_sizes)), dtype=np.int64)
    client_sizes = np.diff(np.arange(num_clients + 1) * class_sizes.sum() // num_clients)
    for count, missing in zip(counts, client_sizes, strict=True):
        mix = rng.dirichlet(alpha * prior)
        while missing > 0:
            mix = np.where(remaining > 0, mix, 0.0)
            if mix.sum() == 0.0:  # all classes of the mix are used up: draw a mix of the others
                mix[remaining > 0] = rng.dirichlet(alpha * prior[remaining > 0])
            drawn = np.minimum(_apportion_randomly(missing, mix, rng), remaining)
            count += drawn
            remaining -= drawn
            missing -= drawn.sum()
    return counts


def _apportion_randomly(total: int, mix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Counts that sum to ``total``; each is ``total * mix / sum(mix)``, rounded stochastically without bias."""
    # Systematic sampling: one uniform offset for all edges keeps the sum exact. Without the random order, neighbouring
    # classes would always be rounded against each other.
    order = rng.permutation(len(mix))
    edges = np.cumsum(mix[order])
    edges = np.floor(edges / edges[-1] * total + rng.random()).astype(np.int64)
    counts = np.empty_like(edges)
    counts[order] = np.diff(edges, prepend=0)
    return counts


def deal_groups(groups: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Distributes the samples of each group among the clients at random.

    Args:
        groups: The group of each sample, int64 of shape ``[num_samples]``.
        counts: Number of samples of each group that a client gets, int64 of shape ``[num_clients, num_groups]``. Its
            column sums are the sizes of the groups.
        rng: Source of randomness.

    Returns:
        For each client the indices of its samples, sorted.
    """
    owner = np.empty(len(groups), dtype=np.int64)
    shuffled = rng.permutation(len(groups))
    # Shuffled first: the stable sort alone would keep the data set's order within a group, and the first clients would
    # get the first samples.
    members = shuffled[np.argsort(groups[shuffled], kind="stable")]
    owner[members] = np.repeat(np.tile(np.arange(len(counts)), counts.shape[1]), counts.T.ravel())
    return np.split(np.argsort(owner, kind="stable"), np.cumsum(counts.sum(axis=1))[:-1])


@dataclass(frozen=True)
class Shards(Partitioner):
    """Sorts the samples by label, cuts them into shards of equal size, and gives each client some shards at random.

    With 60,000 images in 10 equally large classes and 100 clients with 2 shards each (200 shards of 300), a client has
    1 to 4 labels, mostly 2.

    Args:
        shards_per_client: Number of shards per client, at least 1.
        num_bins: Number of quantile bins that serve as classes if the targets are continuous.

    Raises:
        ValueError: If an argument is out of range; when called, if there are more shards than samples.

    References:
        McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, 2017,
        arXiv:1602.05629.
    """

    shards_per_client: int = 2
    _: KW_ONLY
    num_bins: int = 10

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if self.shards_per_client < 1:
            raise ValueError(f"shards_per_client={self.shards_per_client} must be at least 1.")

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        num_shards = num_clients * self.shards_per_client
        if num_shards > len(dataset):
            raise ValueError(
                f"{num_clients} clients with {self.shards_per_client} shards each need {num_shards} shards, but there "
                f"are only {len(dataset)} samples. Use fewer clients or shards."
            )
        groups = label_groups(dataset, self.num_bins)
        shuffled = rng.permutation(len(groups))
        # Shuffled first, so that the shards of a label are random samples of it.
        by_label = shuffled[np.argsort(groups[shuffled], kind="stable")]
        shard_owner = rng.permutation(np.repeat(np.arange(num_clients), self.shards_per_client))
        shard_sizes = np.diff(np.arange(num_shards + 1) * len(groups) // num_shards)
        owner = np.repeat(shard_owner, shard_sizes)
        ends = np.cumsum(np.bincount(owner, minlength=num_clients))[:-1]
        return np.split(by_label[np.argsort(owner, kind="stable")], ends)


@dataclass(frozen=True)
class LabelsPerClient(Partitioner):
    r"""Gives every client exactly ``num_labels`` labels (#C=k) and divides each label among the clients that hold it.

    Labels are assigned at random such that their numbers of clients differ by at most 1. With ``sigma=0`` a label is
    divided equally; otherwise each of its clients gets ``min_per_label`` samples and a part of the rest proportional to
    :math:`e^{\sigma z}`, :math:`z \sim N(0, 1)`, so that the clients' sizes are log-normal (the "power law" of the
    FedProx paper). ``LabelsPerClient(2, sigma=2.0, min_per_label=5)`` with 1,000 clients is FedProx's MNIST.

    Args:
        num_labels: Number of labels per client, at least 1 and at most the number of labels.
        sigma: Standard deviation of the logarithm of the sizes, at least 0.
        min_per_label: Minimum number of samples of each of a client's labels, at least 1.
        num_bins: Number of quantile bins that serve as classes if the targets are continuous.

    Raises:
        ValueError: If an argument is out of range; when called, if there are too few labels or samples.

    References:
        Li, Diao, Chen, He, *Federated Learning on Non-IID Data Silos: An Experimental Study* (NIID-Bench), 2022,
        arXiv:2102.02079. Li et al., *Federated Optimization in Heterogeneous Networks* (FedProx), 2020,
        arXiv:1812.06127.
    """

    num_labels: int
    _: KW_ONLY
    sigma: float = 0.0
    min_per_label: int = 1
    num_bins: int = 10

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if self.num_labels < 1 or self.min_per_label < 1:
            raise ValueError(f"num_labels={self.num_labels} and min_per_label={self.min_per_label} must be at least 1.")
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma={self.sigma} must be at least 0 and finite; 0 gives equal sizes.")

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        groups = label_groups(dataset, self.num_bins)
        sizes = np.bincount(groups)
        if not self.num_labels <= len(sizes) <= num_clients * self.num_labels:
            raise ValueError(
                f"{num_clients} clients with num_labels={self.num_labels} do not fit data with {len(sizes)} labels: a "
                "client can't have more labels than there are, and together the clients must hold all of them. Change "
                "num_labels or num_clients."
            )
        holds = _assign_labels(num_clients, self.num_labels, len(sizes), rng)
        needed = holds.sum(axis=0) * self.min_per_label
        if (needed > sizes).any():
            label = int(np.argmax(needed - sizes))
            raise ValueError(
                f"Label {label} has {sizes[label]} samples, but its {holds[:, label].sum()} clients need "
                f"min_per_label={self.min_per_label} each. Use fewer clients, or a smaller num_labels or min_per_label."
            )
        counts = np.zeros((num_clients, len(sizes)), dtype=np.int64)
        for label, size in enumerate(sizes):
            clients = np.flatnonzero(holds[:, label])
            counts[clients, label] = random_sizes(size, len(clients), self.min_per_label, self.sigma, rng)
        return deal_groups(groups, counts, rng)


def _assign_labels(num_clients: int, num_labels: int, num_groups: int, rng: np.random.Generator) -> np.ndarray:
    """Which client holds which label, bool ``[num_clients, num_groups]``; balanced, with ties broken at random."""
    holds = np.zeros((num_clients, num_groups), dtype=bool)
    num_holders = np.zeros(num_groups)
    for client in range(num_clients):
        # The random part is below 1, so it only breaks ties between labels that equally many clients hold.
        labels = np.argsort(num_holders + rng.random(num_groups))[:num_labels]
        holds[client, labels] = True
        num_holders[labels] += 1
    return holds


def random_sizes(total: int, num_parts: int, min_size: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Sizes that sum to ``total``: ``min_size`` plus log-normal parts of the rest; equal to within 1 if sigma is 0."""
    if sigma == 0:
        # Permuted, so that the larger parts of all labels do not go to the same clients.
        return rng.permutation(np.diff(np.arange(num_parts + 1) * total // num_parts))
    return min_size + apportion(total - min_size * num_parts, lognormal(num_parts, sigma, rng))


def lognormal(size: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers proportional to log-normal ones, which themselves may overflow, or all be 0."""
    exponents = min(sigma, 1e300) * rng.standard_normal(size)
    largest = exponents.max()
    return np.exp(exponents - largest if abs(largest) > 600 else exponents)


def apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Integers that sum to ``total`` and are proportional to ``weights``, to within 1."""
    edges = np.cumsum(weights)
    return np.diff(np.rint(edges / edges[-1] * total).astype(np.int64), prepend=0)
