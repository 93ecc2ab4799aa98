"""Data that already belongs to clients: one data set each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.splitting import check_loader_options, examples_per_pass, make_loader
from lightning_fl.datamodules.loader_hooks import OptionalLoaders, wants_client_loaders
from lightning_fl.types import ClientId, as_client_id

Source = Dataset | Callable[[], Dataset]


class ClientDatasets(OptionalLoaders):
    """Clients that each have their own data set.

    A federated strategy trains on the clients' loaders; any other strategy gets one loader over the data of all
    clients, which is the centralised baseline.

    Args:
        train: Training data of each client, as a mapping from client id or a sequence (the ids are then ``0 .. n-1``).
            Each entry is a data set, or a function without arguments that opens it when it is needed.
        val: Validation data: one data set for all clients, or one per client in the form of ``train``, which are
            pooled. None: no validation.
        test: Test data, in the form of ``val``.
        batch_size: Examples per batch. None: all of a client's examples in one batch.
        shuffle: Whether training data is reshuffled at every pass.
        num_workers: Worker processes per loader.
        drop_last: Whether training drops an incomplete last batch.
        **loader_options: Any other argument of ``DataLoader``, such as ``collate_fn`` or ``pin_memory``; ``sampler``
            and ``batch_sampler`` are functions that create one for a client's training data.

    Raises:
        ValueError: If ``train`` is empty or neither a sequence nor a mapping, ``batch_size`` is less than 1, or a
            loader option is unknown; when a client's data set is opened, if it has no length.

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
        **loader_options: Any,
    ) -> None:
        super().__init__()
        check_loader_options(loader_options)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1, or None for one batch of all examples.")
        self._train = _by_client(train)
        self._val = _sources("val", val)
        self._val_by_client = _by_client(val) if isinstance(val, Mapping | Sequence) else {}
        self._test = _sources("test", test)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.loader_options = loader_options
        if val is None:
            self._hide_loaders("val_dataloader")
        if test is None:
            self._hide_loaders("test_dataloader")

    def train_dataloader(self) -> ClientLoaders | DataLoader:
        """The clients' loaders; one loader over all their data if the strategy is not federated."""
        if wants_client_loaders(self.trainer):
            has_own = {"sampler", "batch_sampler"}.isdisjoint(self.loader_options)
            size = self._num_examples if has_own else None
            return ClientLoaders(self._train.keys(), self._client_loader, num_examples=size)
        return self._loader(_union(self._train.values()), train=True)

    def val_dataloader(self) -> DataLoader:
        """Validation data of all clients."""
        return self._loader(_union(self._val))

    def test_dataloader(self) -> DataLoader:
        """Test data of all clients."""
        return self._loader(_union(self._test))

    def client_val_dataloaders(self) -> Mapping[ClientId, Callable[[], DataLoader]]:
        """For each client a function that opens its validation data; empty if ``val`` is one data set for all."""
        return {
            client: partial(self._open_loader, source)
            for client, source in self._val_by_client.items()
            if client in self._train
        }

    def _open_loader(self, source: Source) -> DataLoader:
        return self._loader(_open(source))

    def _client_loader(self, client: ClientId) -> DataLoader:
        return self._loader(_open(self._train[client]), train=True)

    def _num_examples(self, client: ClientId) -> int:
        num_samples = len(_open(self._train[client]))  # type: ignore[arg-type]
        return examples_per_pass(num_samples, self.batch_size or max(num_samples, 1), self.drop_last)

    def _loader(self, dataset: Dataset, train: bool = False) -> DataLoader:
        own = {
            "batch_size": self.batch_size or max(len(dataset), 1),  # type: ignore[arg-type]
            "shuffle": train and self.shuffle,
            "num_workers": self.num_workers,
            "drop_last": train and self.drop_last,
        }
        samplers = {} if train else {"sampler": None, "batch_sampler": None}
        return make_loader(dataset, {**own, **self.loader_options, **samplers})


def _by_client(train: Any) -> Mapping[ClientId, Source]:
    if not isinstance(train, Mapping | Sequence) or isinstance(train, str):
        raise ValueError(
            f"train is a {type(train).__name__}; expected one data set per client, in a sequence or a mapping from "
            "client id. To split one data set among clients, use fl.datamodules.PartitionedDataModule."
        )
    if not train:
        raise ValueError("train is empty; a federation needs the data set of at least one client.")
    return {
        as_client_id(name): own for name, own in (train.items() if isinstance(train, Mapping) else enumerate(train))
    }


def _sources(name: str, data: Any) -> Collection[Source]:
    if not isinstance(data, Mapping | Sequence):
        return [data]
    if not data:
        raise ValueError(f"{name} is empty; give at least one data set, or None for no {name} data.")
    return data.values() if isinstance(data, Mapping) else data


def _union(sources: Collection[Source]) -> Dataset:
    datasets = [_open(source) for source in sources]
    return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)


def _open(source: Source) -> Dataset:
    # A data set may itself be callable.
    dataset: Any = source() if callable(source) and not hasattr(source, "__getitem__") else source
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"A client's data set is a {type(dataset).__name__}, which has no length; expected a map-style data set. "
            "Pass streams as loaders in fl.datamodules.ClientLoaders."
        )
    return dataset
