"""Feature skew: clients whose features are distributed differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_fl.data.partitioners.partitioner import IID, Partitioner
from lightning_fl.seeding import derive_seed
from lightning_fl.types import ClientId


@dataclass(frozen=True)
class FeatureNoise(Partitioner):
    r"""Feature skew: adds noise from :math:`N(0, \sigma i / N)` to the samples of client :math:`i` of :math:`N`.

    :math:`\sigma i/N` is the variance, :math:`i = 1, \dots, N`. A sample has the same noise whenever it is read. The
    noise is added to the first entry of the sample, which must be a float tensor. The centralised baseline of a
    ``PartitionedDataModule`` trains on the same noisy samples.

    Args:
        sigma: Variance of the last client's noise, at least 0.
        partitioner: How the samples are split.

    Raises:
        ValueError: If ``sigma`` is out of range; when a sample is read, if its first entry is not a float tensor.

    References:
        Li, Diao, Chen, He, *Federated Learning on Non-IID Data Silos: An Experimental Study* (NIID-Bench), 2022,
        arXiv:2102.02079.
    """

    sigma: float
    partitioner: Partitioner = field(default_factory=IID)

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma={self.sigma} must be at least 0 and finite; 0 adds no noise.")

    @property
    def names_clients(self) -> bool:  # type: ignore[override]
        """See :class:`Partitioner`; the same as for ``partitioner``."""
        return self.partitioner.names_clients

    @property
    def changes_examples(self) -> bool:  # type: ignore[override]
        """True: the noise changes them."""
        return True

    def client_ids(self, dataset: Any, num_clients: int | None = None) -> Sequence[ClientId]:
        """See :class:`Partitioner`; the same as for ``partitioner``."""
        return self.partitioner.client_ids(dataset, num_clients)

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :class:`Partitioner`; the same as for ``partitioner``."""
        return self.partitioner.split(dataset, num_clients, rng)

    def client_dataset(self, dataset: Any, part: Tensor, client: int, num_clients: int, seed: int) -> Dataset:
        """The client's samples with noise added."""
        inner = self.partitioner.client_dataset(dataset, part, client, num_clients, seed)
        return _Noisy(inner, part, (self.sigma * (client + 1) / num_clients) ** 0.5, seed)


@dataclass(frozen=True, eq=False)
class _Noisy(Dataset):
    dataset: Dataset
    part: Tensor
    std: float
    seed: int

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Any:
        sample: Any = self.dataset[index]
        if not isinstance(sample, tuple | list) or not (
            isinstance(sample[0], Tensor) and sample[0].is_floating_point()
        ):
            found = "a mapping" if isinstance(sample, Mapping) else f"a {type(sample).__name__}"
            raise ValueError(
                f"FeatureNoise got {found}; expected a tuple or list whose first entry is a float tensor. Convert the "
                "features to float tensors first."
            )
        # seeded by the sample's index in the whole data set, not in this part: held-out samples keep their noise
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "noise", int(self.part[index])))
        noise = torch.randn(sample[0].shape, generator=generator, dtype=sample[0].dtype)
        return (sample[0] + self.std * noise, *sample[1:])
