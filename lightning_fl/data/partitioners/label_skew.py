"""Partitioners that give a client only some of the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np

from lightning_fl.data.partitioners.partitioner import Partitioner
from lightning_fl.data.targets import label_groups


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


@dataclass(frozen=True)
class Shards(Partitioner):
    """Sorts the samples by label, cuts them into shards of equal size, and gives each client some of them at random.

    With 60,000 images of 10 equal classes, 100 clients and 2 shards each (200 shards of 300) a client has 1 to 4
    labels, mostly 2.

    Args:
        shards_per_client: Number of shards of a client, at least 1.
        num_bins: Number of groups of equal size that stand for the classes when targets are numbers.

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
                f"{self.shards_per_client} shards for each of {num_clients} clients are {num_shards} shards of "
                f"{len(dataset)} samples. Use fewer clients or shards."
            )
        groups = label_groups(dataset, self.num_bins)
        shuffled = rng.permutation(len(groups))
        by_label = shuffled[np.argsort(groups[shuffled], kind="stable")]
        shard_owner = rng.permutation(np.repeat(np.arange(num_clients), self.shards_per_client))
        shard_sizes = np.diff(np.arange(num_shards + 1) * len(groups) // num_shards)
        owner = np.repeat(shard_owner, shard_sizes)
        ends = np.cumsum(np.bincount(owner, minlength=num_clients))[:-1]
        return np.split(by_label[np.argsort(owner, kind="stable")], ends)


@dataclass(frozen=True)
class LabelsPerClient(Partitioner):
    r"""Gives every client exactly ``num_labels`` labels (#C=k), and shares each label among those that hold it.

    Labels are dealt out evenly at random, so that their numbers of holders differ by at most 1. With ``sigma=0`` the
    holders of a label get equal parts of it; else each gets ``min_per_label`` samples and a part of the rest in
    proportion to :math:`e^{\sigma z}`, :math:`z \sim N(0, 1)`, so that the clients' sizes follow a power law.
    ``LabelsPerClient(2, sigma=2.0, min_per_label=5)`` with 1,000 clients is the MNIST set of FedProx.

    Args:
        num_labels: Number of labels of a client, at least 1 and at most the number of labels.
        sigma: Spread of the sizes.
        min_per_label: Smallest number of samples of each of a client's labels, at least 1.
        num_bins: Number of groups of equal size that stand for the classes when targets are numbers.

    Raises:
        ValueError: If an argument is out of range; when called, if the labels or samples are too few.

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
                f"{num_clients} clients with num_labels={self.num_labels} do not fit data of {len(sizes)} labels: a "
                "client needs no more labels than there are, and together the clients must hold all of them."
            )
        holds = _deal_labels(num_clients, self.num_labels, len(sizes), rng)
        needed = holds.sum(axis=0) * self.min_per_label
        if (needed > sizes).any():
            label = int(np.argmax(needed - sizes))
            raise ValueError(
                f"Label {label} has {sizes[label]} samples, but its {holds[:, label].sum()} clients need "
                f"min_per_label={self.min_per_label} each. Use fewer clients, labels a client or samples a label."
            )
        counts = np.zeros((num_clients, len(sizes)), dtype=np.int64)
        for label, size in enumerate(sizes):
            clients = np.flatnonzero(holds[:, label])
            counts[clients, label] = share_out(size, len(clients), self.min_per_label, self.sigma, rng)
        return deal_groups(groups, counts, rng)


def _deal_labels(num_clients: int, num_labels: int, num_groups: int, rng: np.random.Generator) -> np.ndarray:
    """Which client holds which label, bool ``[num_clients, num_groups]``: the rarest labels first, ties at random."""
    holds = np.zeros((num_clients, num_groups), dtype=bool)
    num_holders = np.zeros(num_groups)
    for client in range(num_clients):
        labels = np.argsort(num_holders + rng.random(num_groups))[:num_labels]
        holds[client, labels] = True
        num_holders[labels] += 1
    return holds


def share_out(total: int, num_parts: int, least: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Parts of a total: ``least`` each, the rest in proportion to ``exp(sigma z)``; equal parts if sigma is 0."""
    if sigma == 0:
        return rng.permutation(np.diff(np.arange(num_parts + 1) * total // num_parts))
    return least + apportion(total - least * num_parts, np.exp(sigma * rng.standard_normal(num_parts)))


def apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to ``total`` and are in proportion to ``weights`` to within 1."""
    edges = np.cumsum(weights)
    return np.diff(np.rint(edges / edges[-1] * total).astype(np.int64), prepend=0)
