"""Partitioners: how one data set is split among simulated clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

_STREAM = 0x5117
_LABEL_KEYS = ("label", "labels", "target")


class Partitioner(ABC):
    """Splits a data set among clients: every sample goes to exactly one of them.

    A partitioner of your own overrides :meth:`split` and draws its randomness from the ``rng`` it is given.
    """

    def __call__(self, dataset: Any, num_clients: int, seed: int = 0) -> list[torch.Tensor]:
        """Splits ``dataset`` among ``num_clients`` clients; equal arguments give equal splits.

        Args:
            dataset: A map-style data set.
            num_clients: Number of clients, at least 1 and at most the number of samples.
            seed: Seed of the split, at least 0.

        Returns:
            For each client the indices of its samples: int64, sorted, shape ``[num_samples_of_client]``.

        Raises:
            ValueError: If the data set has no length or the number of clients does not fit it.
        """
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{type(dataset).__name__} cannot be partitioned: a map-style data set with a length is needed. Give "
                "each client its own loader with fl.datamodules.ClientLoaders."
            )
        if not 1 <= num_clients <= len(dataset):
            raise ValueError(
                f"num_clients={num_clients} does not fit a data set of {len(dataset)} samples: it must be at least 1 "
                "and at most the number of samples. Change num_clients or use more data."
            )
        parts = self.split(dataset, num_clients, np.random.default_rng([seed, _STREAM]))
        return [torch.from_numpy(np.sort(part).astype(np.int64)) for part in parts]

    @abstractmethod
    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        """The clients' sample indices, in any order.

        Args:
            dataset: A map-style data set with at least ``num_clients`` samples.
            num_clients: Number of clients, at least 1.
            rng: The only source of randomness.
        """


@dataclass(frozen=True)
class IID(Partitioner):
    """Shuffles the samples and deals them out evenly: the clients' sizes differ by at most 1."""

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
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

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        _, labels, class_sizes = np.unique(targets(dataset), return_inverse=True, return_counts=True)
        counts = self._draw_counts(class_sizes, num_clients, rng)
        owner = np.empty(len(labels), dtype=np.int64)
        for label in range(len(class_sizes)):
            members = rng.permutation(np.flatnonzero(labels == label))
            owner[members] = np.repeat(np.arange(num_clients), counts[:, label])
        return np.split(np.argsort(owner, kind="stable"), np.cumsum(counts.sum(axis=1))[:-1])

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


def targets(dataset: Any) -> np.ndarray:
    """The class labels of a data set, int64, shape ``[num_samples]``.

    Taken from the attributes ``targets`` or ``labels``, the last tensor of a ``TensorDataset``, or the same of what a
    ``Subset`` or ``ConcatDataset`` is made of; else read sample by sample: the last entry of a tuple or list, or the
    entry ``label``, ``labels`` or ``target`` of a mapping.

    Args:
        dataset: A map-style data set.

    Raises:
        ValueError: If the samples hold no labels or those are not one integer each.
    """
    labels = _stored_targets(dataset)
    if labels is None:
        labels = _as_array([_target_of(dataset[index]) for index in range(len(dataset))])
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise ValueError(
            f"The targets of {type(dataset).__name__} are {labels.dtype} of shape {list(labels.shape)}; a split by "
            "label needs one integer class label a sample. Split other targets with IID()."
        )
    return labels.astype(np.int64)


def _stored_targets(dataset: Any) -> np.ndarray | None:
    if isinstance(dataset, Subset):
        labels = _stored_targets(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        pieces = [_stored_targets(piece) for piece in dataset.datasets]
        return None if any(piece is None for piece in pieces) else np.concatenate(pieces)  # type: ignore[arg-type]
    if isinstance(dataset, TensorDataset):
        return _as_array(dataset.tensors[-1])
    for name in ("targets", "labels"):
        values: Any = getattr(dataset, name, None)
        if hasattr(values, "__len__") and len(values) == len(dataset):
            return _as_array(values)
    return None


def _target_of(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        for key in _LABEL_KEYS:
            if key in sample:
                return _as_array(sample[key]).tolist()
    elif isinstance(sample, tuple | list) and len(sample) > 1:
        return _as_array(sample[-1]).tolist()
    raise ValueError(
        f"No label was found in a sample of type {type(sample).__name__}: expected a tuple or list that ends with the "
        f"label, or a mapping with one of the keys {', '.join(_LABEL_KEYS)}. Split data without labels with IID()."
    )


def _as_array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()
    try:
        return np.asarray(values)
    except ValueError:
        return np.asarray(values, dtype=object)
