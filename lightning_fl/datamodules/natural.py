"""What data sets that belong to clients by nature have in common: loaders by client, and all of them together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.holdout import Holdout, Part
from lightning_fl.datamodules.base import check_batch_sizes
from lightning_fl.datamodules.client_datasets import wants_clients
from lightning_fl.types import ClientId

_OPEN_CLIENTS = 64


@dataclass(frozen=True)
class ClientData:
    """The samples of each client, opened when they are asked for.

    Args:
        ids: The clients, in order.
        size: Number of samples of a client, told without opening it.
        open: The samples of a client, a map-style data set.
        test: Samples that the source itself keeps for test; None: ``test_share`` of each client's samples.
    """

    ids: Sequence[ClientId]
    size: Callable[[Any], int]
    open: Callable[[Any], Dataset]
    test: ClientData | None = None


class NaturalDataModule(L.LightningDataModule):
    """Data that belongs to clients by nature.

    A federated strategy trains on the clients' loaders, made when they are asked for; any other strategy gets one
    shuffled loader over all the clients' training data, which is the centralised baseline. Each client keeps a part of
    its samples for validation and test. Validation and test of the global model use the union of them;
    ``client_val_dataloaders()`` and ``client_test_dataloaders()`` give them by client. Without ``val_share`` validation
    uses the test data. Subclasses override :meth:`read`.

    Args:
        batch_size: Examples in a training batch.
        val_share: Share of each client's samples kept for validation, in [0, 1).
        test_share: Share of each client's samples kept for test, in [0, 1).
        seed: Seed of every split.
        num_workers: Worker processes of each loader.
        eval_batch_size: Examples in a batch of validation, test and prediction. None: the larger of ``batch_size`` and
            256.
        brings_test: Whether :meth:`read` may bring data for test, so that no share of the clients' is needed.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        val_share: float = 0.0,
        test_share: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
        brings_test: bool = False,
    ) -> None:
        super().__init__()
        self.eval_batch_size = check_batch_sizes(batch_size, eval_batch_size)
        self.holdout = Holdout(val_share, test_share)
        self.holdout.check()
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._data: ClientData | None = None
        if val_share == test_share == 0 and not brings_test:
            for name in ("val_dataloader", "test_dataloader", "predict_dataloader"):
                setattr(self, name, MethodType(getattr(L.LightningDataModule, name), self))

    @abstractmethod
    def read(self) -> ClientData:
        """The clients and their samples."""

    def setup(self, stage: str | None = None) -> None:
        """Reads what is needed to tell who the clients are, once."""
        if self._data is None:
            self._data = self.read()

    @property
    def data(self) -> ClientData:
        """The clients and their samples, after :meth:`setup`."""
        if self._data is None:
            self.setup()
        assert self._data is not None
        return self._data

    @property
    def client_ids(self) -> Sequence[ClientId]:
        """The clients, in order."""
        return self.data.ids

    def client_dataset(self, client: ClientId, part: Part = "train") -> Dataset:
        """A client's samples for training, validation or test."""
        source, holdout = self._source(part)
        samples = source.open(client)
        if sum(holdout) == 0:
            return samples
        return Subset(samples, holdout.indices(source.size(client), part, self.seed, client).tolist())

    def num_samples(self, client: ClientId, part: Part = "train") -> int:
        """Number of a client's samples for training, validation or test."""
        source, holdout = self._source(part)
        return source.size(client) if sum(holdout) == 0 else holdout.size(source.size(client), part)

    def pooled(self, part: Part = "train") -> Dataset:
        """All clients' samples for training, validation or test together."""
        ids = self._ids(part)
        sizes = np.fromiter((self.num_samples(client, part) for client in ids), dtype=np.int64, count=len(ids))
        return _Pooled(ids, sizes, lambda client: self.client_dataset(client, part))

    def train_dataloader(self) -> ClientLoaders | DataLoader:
        """The clients' loaders, or one loader over all their data if the strategy is not federated."""
        return self._client_loaders("train") if wants_clients(self.trainer) else self._loader(self.pooled(), True)

    def val_dataloader(self) -> DataLoader | list:
        """All clients' validation data; their test data without ``val_share``."""
        return self._evaluation_loader("val" if self.holdout.val_share > 0 else "test")

    def test_dataloader(self) -> DataLoader | list:
        """All clients' test data."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader | list:
        """All clients' test data."""
        return self._evaluation_loader("test")

    def client_val_dataloaders(self) -> ClientLoaders:
        """Each client's own validation data, in order; its test data without ``val_share``."""
        return self._client_loaders("val" if self.holdout.val_share > 0 else "test")

    def client_test_dataloaders(self) -> ClientLoaders:
        """Each client's own test data, in order."""
        return self._client_loaders("test")

    def _source(self, part: Part) -> tuple[ClientData, Holdout]:
        """Where a part comes from, and how it is cut out of there (a holdout of 0: all of it)."""
        if self.data.test is None:
            return self.data, self.holdout
        if part == "test":
            return self.data.test, Holdout()
        return self.data, Holdout(self.holdout.val_share)

    def _ids(self, part: Part) -> Sequence[ClientId]:
        return self._source(part)[0].ids

    def _has(self, part: Part) -> bool:
        return (
            part == "train"
            or (part == "test" and self.data.test is not None)
            or getattr(self.holdout, f"{part}_share") > 0
        )

    def _client_loaders(self, part: Part) -> ClientLoaders:
        if not self._has(part):
            raise ValueError(f"The clients keep no data for their {part}; set {part}_share.")
        return ClientLoaders(
            self._ids(part),
            lambda client: self._loader(self.client_dataset(client, part), part == "train"),
            num_examples=lambda client: self.num_samples(client, part),
        )

    def _evaluation_loader(self, part: Part) -> DataLoader | list:
        return self._loader(self.pooled(part)) if self._has(part) else []

    def _loader(self, dataset: Dataset, train: bool = False) -> DataLoader:
        shuffle = train and len(dataset) > 0  # type: ignore[arg-type]
        size = self.batch_size if train else self.eval_batch_size
        return DataLoader(dataset, batch_size=size, shuffle=shuffle, num_workers=self.num_workers)


class _Pooled(Dataset):
    """The clients' samples one after the other; a few clients are kept open."""

    def __init__(self, ids: Sequence[ClientId], sizes: np.ndarray, open_client: Callable[[Any], Dataset]) -> None:
        self.ids = ids
        self.ends = np.cumsum(sizes)
        self._open = lru_cache(_OPEN_CLIENTS)(open_client)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        client = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[client - 1]) if client else 0
        return self._open(self.ids[client])[index - start]
