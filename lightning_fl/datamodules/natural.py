"""Base class for data that naturally belongs to clients: loaders by client, and pooled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.holdout import Holdout, Part
from lightning_fl.datamodules.central import check_batch_sizes
from lightning_fl.datamodules.loader_hooks import OptionalLoaders, wants_client_loaders
from lightning_fl.types import ClientId

_MAX_OPEN_CLIENTS = 64


@dataclass(frozen=True)
class ClientData:
    """The clients and their samples, which are read only when a client is opened.

    Args:
        ids: The clients' ids, in order.
        size: Returns the number of samples of a client without opening it.
        open: Returns the samples of a client, a map-style data set.
        test: Separate test data. None: ``test_share`` of each client's samples is held out.
    """

    ids: Sequence[ClientId]
    size: Callable[[Any], int]
    open: Callable[[Any], Dataset]
    test: ClientData | None = None


class NaturalDataModule(OptionalLoaders):
    """Data that naturally belongs to clients, such as writers, hospitals or shops.

    A federated strategy trains on the clients' loaders, which are created when they are needed; any other strategy gets
    one shuffled loader over all training data, which is the centralised baseline. Each client holds out a part of its
    samples for validation and test. The global model is validated and tested on the union of these parts;
    ``client_val_dataloaders()`` and ``client_test_dataloaders()`` return them by client. Subclasses override
    :meth:`read`; an optional method ``collate`` makes a batch from a list of examples.

    Args:
        batch_size: Examples per training batch.
        val_share: Fraction of each client's samples held out for validation, in [0, 1). 0: validate on the test data.
        test_share: Fraction of each client's samples held out for test, in [0, 1).
        seed: Seed of the data set's splits.
        num_workers: Worker processes per loader.
        eval_batch_size: Examples per batch in validation, test and prediction. None: the larger of ``batch_size`` and
            256.
        brings_test: Whether :meth:`read` may return separate test data, so that ``test_share`` can be 0.

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
            self._hide_loaders("val_dataloader", "test_dataloader", "predict_dataloader")

    @abstractmethod
    def read(self) -> ClientData:
        """The clients and their samples."""

    def setup(self, stage: str | None = None) -> None:
        """Finds the clients; reads the data only once."""
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
        """The clients' ids, in order."""
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
        """The samples of all clients for training, validation or test."""
        ids = self._ids(part)
        sizes = np.fromiter((self.num_samples(client, part) for client in ids), dtype=np.int64, count=len(ids))
        return _Pooled(ids, sizes, lambda client: self.client_dataset(client, part))

    def train_dataloader(self) -> ClientLoaders | DataLoader:
        """The clients' loaders; one loader over all their data if the strategy is not federated."""
        return (
            self._client_loaders("train") if wants_client_loaders(self.trainer) else self.loader_of(self.pooled(), True)
        )

    def val_dataloader(self) -> DataLoader | list:
        """Validation data of all clients; their test data if ``val_share`` is 0."""
        return self._evaluation_loader("val" if self.holdout.val_share > 0 else "test")

    def test_dataloader(self) -> DataLoader | list:
        """Test data of all clients."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader | list:
        """Test data of all clients."""
        return self._evaluation_loader("test")

    def client_val_dataloaders(self) -> ClientLoaders:
        """Validation data by client; test data if ``val_share`` is 0."""
        return self._client_loaders("val" if self.holdout.val_share > 0 else "test")

    def client_test_dataloaders(self) -> ClientLoaders:
        """Test data by client."""
        return self._client_loaders("test")

    def _source(self, part: Part) -> tuple[ClientData, Holdout]:
        """The data that a part is taken from, and the holdout that selects it (all fractions 0: the whole data)."""
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
            raise ValueError(f"The clients have no {part} data; set {part}_share.")
        return ClientLoaders(
            self._ids(part),
            lambda client: self.loader_of(self.client_dataset(client, part), part == "train"),
            num_examples=lambda client: self.num_samples(client, part),
        )

    def _evaluation_loader(self, part: Part) -> DataLoader | list:
        return self.loader_of(self.pooled(part)) if self._has(part) else []

    def loader_of(self, dataset: Dataset, train: bool = False) -> DataLoader:
        """A loader over some of the samples, with the settings of training or of evaluation."""
        # `RandomSampler` refuses an empty data set, which a client may have.
        shuffle = train and len(dataset) > 0  # type: ignore[arg-type]
        size = self.batch_size if train else self.eval_batch_size
        collate = getattr(self, "collate", None)
        return DataLoader(dataset, batch_size=size, shuffle=shuffle, num_workers=self.num_workers, collate_fn=collate)


class _Pooled(Dataset):
    """The clients' samples one after the other; the clients read last stay open."""

    def __init__(self, ids: Sequence[ClientId], sizes: np.ndarray, open_client: Callable[[Any], Dataset]) -> None:
        self.ids = ids
        self.ends = np.cumsum(sizes)
        # shuffled reading jumps between clients, but keeping thousands of them open would hold all data in memory
        self._open = lru_cache(_MAX_OPEN_CLIENTS)(open_client)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        client = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[client - 1]) if client else 0
        return self._open(self.ids[client])[index - start]
