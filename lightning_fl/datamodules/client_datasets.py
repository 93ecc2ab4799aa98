"""Data that already belongs to clients: one data set each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.collation import with_fast_collation
from lightning_fl.data.splitting import examples_per_pass
from lightning_fl.types import ClientId

Source = Dataset | Callable[[], Dataset]


class ClientDatasets(L.LightningDataModule):
    """Clients that each bring their own data set.

    A federated strategy trains on the clients' loaders; any other strategy gets one loader over all the clients' data
    together, which is the centralised baseline.

    Args:
        train: For each client its training data, as a sequence (the ids are then ``0 .. n-1``) or as a mapping from
            client id. Instead of a data set a function without arguments may stand, which opens it when needed.
        val: Validation data: one data set for all, or one per client, given like ``train``, of which the union counts.
            None: no validation.
        test: Test data, given like ``val``.
        batch_size: Examples in a batch. None: one batch of all the client's examples.
        shuffle: Whether training data is read in a new order at every pass.
        num_workers: Worker processes of each loader.
        drop_last: Whether training leaves out a last batch that is not full.

    Raises:
        ValueError: If ``train`` names no client or is neither a sequence nor a mapping, ``batch_size`` is below 1, or,
            when it is opened, a client's data set has no length.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> hospitals = {"north": TensorDataset(torch.randn(20, 4)), "south": TensorDataset(torch.randn(5, 4))}
        >>> ClientDatasets(hospitals, batch_size=8).train_dataloader().num_examples("south")
        5
    """

    def __init__(
        self,
        train: Sequence[Source] | Mapping[ClientId, Source],
        val: Source | Sequence[Source] | Mapping[ClientId, Source] | None = None,
        test: Source | Sequence[Source] | Mapping[ClientId, Source] | None = None,
        *,
        batch_size: int | None = 32,
        shuffle: bool = True,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1, or None for one batch of all the examples.")
        self._train = _by_client(train)
        self._val = _sources("val", val)
        self._val_by_client = _by_client(val) if isinstance(val, Mapping | Sequence) else {}
        self._test = _sources("test", test)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.drop_last = drop_last
        if val is not None:
            self.val_dataloader = self._val_dataloader  # type: ignore[method-assign]
        if test is not None:
            self.test_dataloader = self._test_dataloader  # type: ignore[method-assign]

    def train_dataloader(self) -> ClientLoaders | DataLoader:
        """The clients' loaders, or one loader over all their data if the strategy is not federated."""
        if wants_clients(self.trainer):
            return ClientLoaders(self._train.keys(), self._client_loader, num_examples=self._num_examples)
        return self._loader(_union(self._train.values()), shuffle=self.shuffle, drop_last=self.drop_last)

    def client_val_dataloaders(self) -> Mapping[ClientId, Callable[[], DataLoader]]:
        """By client what opens the loader of its own validation data; empty if ``val`` is one data set for all."""
        own = {client: source for client, source in self._val_by_client.items() if client in self._train}
        return {client: partial(self._open_loader, source) for client, source in own.items()}

    def _open_loader(self, source: Source) -> DataLoader:
        return self._loader(_open(source))

    def _val_dataloader(self) -> DataLoader:
        return self._loader(_union(self._val))

    def _test_dataloader(self) -> DataLoader:
        return self._loader(_union(self._test))

    def _client_loader(self, client: ClientId) -> DataLoader:
        dataset, collate_fn = with_fast_collation(_open(self._train[client]), None)
        return self._loader(dataset, self.shuffle, self.drop_last, collate_fn)

    def _num_examples(self, client: ClientId) -> int:
        num_samples = len(_open(self._train[client]))  # type: ignore[arg-type]
        return examples_per_pass(num_samples, self.batch_size or max(num_samples, 1), self.drop_last)

    def _loader(
        self, dataset: Dataset, shuffle: bool = False, drop_last: bool = False, collate_fn: Any = None
    ) -> DataLoader:
        num_samples = len(dataset)  # type: ignore[arg-type]
        return DataLoader(
            dataset,
            batch_size=self.batch_size or max(num_samples, 1),
            shuffle=shuffle and num_samples > 0,
            num_workers=self.num_workers,
            drop_last=drop_last,
            collate_fn=collate_fn,
        )


def wants_clients(trainer: L.Trainer | None) -> bool:
    """Whether a datamodule should give loaders by client: under a federated strategy, and outside a Trainer."""
    return trainer is None or getattr(trainer.strategy, "is_federated", False)


def _by_client(train: Any) -> Mapping[ClientId, Source]:
    if not isinstance(train, Mapping | Sequence) or isinstance(train, str):
        raise ValueError(
            f"train is a {type(train).__name__}; expected one data set per client, in a sequence or a mapping from "
            "client id. To split one data set among clients use fl.datamodules.PartitionedDataModule."
        )
    if not train:
        raise ValueError("train names no client; a federation needs at least one data set.")
    return train if isinstance(train, Mapping) else dict(enumerate(train))


def _sources(name: str, data: Any) -> Collection[Source]:
    if not isinstance(data, Mapping | Sequence):
        return [data]
    if not data:
        raise ValueError(f"{name} names no data set; give at least one, or None for none.")
    return data.values() if isinstance(data, Mapping) else data


def _union(sources: Collection[Source]) -> Dataset:
    datasets = [_open(source) for source in sources]
    return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)


def _open(source: Source) -> Dataset:
    dataset: Any = source() if callable(source) and not hasattr(source, "__getitem__") else source
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"A client's data set is a {type(dataset).__name__}, which has no length; expected a map-style data set. "
            "Give streams as loaders with fl.datamodules.ClientLoaders."
        )
    return dataset
