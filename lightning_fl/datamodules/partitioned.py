"""Splits the training data of any LightningDataModule among simulated clients."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.holdout import Holdout, Part
from lightning_fl.data.partitioners.partitioner import Partitioner
from lightning_fl.data.splitting import check_loader_options, check_splittable, split_loader, with_dataset
from lightning_fl.datamodules.loader_hooks import OptionalLoaders, wants_client_loaders
from lightning_fl.types import ClientId

DatasetOfClient = Callable[[int, torch.Tensor], Dataset]

_FORWARDED_HOOKS = (
    "prepare_data",
    "setup",
    "teardown",
    "predict_dataloader",
    "state_dict",
    "load_state_dict",
    "on_exception",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
)


class PartitionedDataModule(OptionalLoaders):
    """Splits the training data of another datamodule among simulated clients and forwards everything else to it.

    A federated strategy trains on the clients' loaders, which keep the batch size, shuffling, collation and workers of
    the datamodule's training loader; any other strategy gets one loader over the same training data, which is the
    centralised baseline.

    With ``val_share`` or ``test_share`` each client holds out a part of its samples for its own validation or test;
    ``client_val_dataloaders()`` and ``client_test_dataloaders()`` return these parts by client. The global model is
    validated and tested on the data of ``data``, or on the union of the clients' parts if ``data`` has none.

    Args:
        data: The datamodule. Its training loader must be one ``DataLoader`` over a map-style data set.
        partitioner: How the training data is split.
        num_clients: Number of clients. None: the clients that the data names (see ``NaturalColumn``), or 10.
        seed: Seed of the split. None: the seed of ``seed_everything``, or 0.
        val_share: Fraction of each client's samples held out for its own validation, in [0, 1).
        test_share: Fraction of each client's samples held out for its own test, in [0, 1).
        **loader_options: Arguments of ``DataLoader`` that replace those of the training loader of ``data``;
            ``sampler`` and ``batch_sampler`` are functions that create one for a client's data set.

    Raises:
        ValueError: If a fraction is out of range, or a loader option is unknown; when the loaders are created, if the
            training loader cannot be split.

    Example:
        >>> from lightning_fl.datamodules import DigitsDataModule, Dirichlet
        >>> data = PartitionedDataModule(DigitsDataModule(), Dirichlet(0.3), num_clients=5)
        >>> data.setup("fit")
        >>> clients = data.train_dataloader()
        >>> sum(clients.num_examples(client) for client in clients)
        1437
    """

    def __init__(
        self,
        data: L.LightningDataModule,
        partitioner: Partitioner,
        num_clients: int | None = None,
        seed: int | None = None,
        val_share: float = 0.0,
        test_share: float = 0.0,
        **loader_options: Any,
    ) -> None:
        # Before the base class, which sets `trainer`: here that is a property of `data`.
        self.data = data
        super().__init__()
        self.partitioner = partitioner
        self.num_clients = num_clients
        self.seed = seed
        self.holdout = Holdout(val_share, test_share)
        self.holdout.check()
        check_loader_options(loader_options)
        self.loader_options = loader_options
        self.prepare_data_per_node = data.prepare_data_per_node
        self.allow_zero_length_dataloader_with_multiple_devices = (
            data.allow_zero_length_dataloader_with_multiple_devices
        )
        # Lightning checks which hooks are overridden, so only those that `data` overrides are forwarded.
        for hook in _FORWARDED_HOOKS:
            if is_overridden(hook, data):
                setattr(self, hook, getattr(data, hook))
        if val_share == 0 and not is_overridden("val_dataloader", data):
            self._hide_loaders("val_dataloader")
        if test_share == 0 and not is_overridden("test_dataloader", data):
            self._hide_loaders("test_dataloader")

    @property
    def learned_from_data(self) -> str:
        """What the preprocessing of ``data`` learned from the training data without noise."""
        return str(getattr(self.data, "learned_from_data", ""))

    @property
    def release(self) -> Any:
        """The release of the preprocessing of ``data`` under differential privacy; None if there is none."""
        return getattr(self.data, "release", None)

    @property
    def trainer(self) -> L.Trainer | None:
        """The Trainer, shared with ``data``."""
        return self.data.trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        self.data.trainer = trainer

    def train_dataloader(self) -> ClientLoaders | Any:
        """The clients' loaders; one loader over all their data if the strategy is not federated."""
        if wants_client_loaders(self.trainer):
            return self._client_loaders("train")
        # Only then does the centralised baseline need a separate loader to train on the same examples.
        if self.partitioner.changes_examples or sum(self.holdout) > 0 or self.loader_options:
            return self._pooled_loader("train")
        return self.data.train_dataloader()

    def val_dataloader(self) -> Any:
        """Validation data of ``data``; the union of the clients' validation data if it has none."""
        overridden = is_overridden("val_dataloader", self.data)
        return self.data.val_dataloader() if overridden else self._pooled_loader("val")

    def test_dataloader(self) -> Any:
        """Test data of ``data``; the union of the clients' test data if it has none."""
        overridden = is_overridden("test_dataloader", self.data)
        return self.data.test_dataloader() if overridden else self._pooled_loader("test")

    def public_dataloader(self) -> Any:
        """The public data of ``data``, which no client has.

        Raises:
            ValueError: If it has none.
        """
        if not hasattr(self.data, "public_dataloader"):
            raise ValueError(f"{type(self.data).__name__} has no method public_dataloader().")
        return self.data.public_dataloader()

    def client_val_dataloaders(self) -> ClientLoaders:
        """Validation data by client."""
        return self._client_loaders("val")

    def client_test_dataloaders(self) -> ClientLoaders:
        """Test data by client."""
        return self._client_loaders("test")

    def _client_loaders(self, part: Part) -> ClientLoaders:
        loader, clients, parts, dataset_of, options = self._split(part)
        return split_loader(loader, parts, clients, dataset_of, options)

    def _pooled_loader(self, part: Part) -> DataLoader:
        loader, _, parts, dataset_of, options = self._split(part)
        # A client may have too few samples to hold any out.
        datasets = [dataset_of(client, indices) for client, indices in enumerate(parts) if len(indices)]
        return with_dataset(loader, ConcatDataset(datasets), torch.cat(parts).tolist(), options)

    def _split(
        self, part: Part
    ) -> tuple[DataLoader, Sequence[ClientId], list[torch.Tensor], DatasetOfClient, Mapping[str, Any]]:
        loader, options = self.data.train_dataloader(), self.loader_options
        check_splittable(loader, options)
        dataset = loader.dataset
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        clients = self.partitioner.client_ids(dataset, self.num_clients)
        parts = self.partitioner(dataset, self.num_clients, seed)
        if sum(self.holdout) > 0:
            parts = [
                indices[torch.from_numpy(self.holdout.indices(len(indices), part, seed, client))]
                for client, indices in zip(clients, parts, strict=True)
            ]
        elif part != "train":
            raise ValueError(f"The clients have no {part} data; set {part}_share of PartitionedDataModule.")

        def dataset_of(client: int, indices: torch.Tensor) -> Dataset:
            return self.partitioner.client_dataset(dataset, indices, client, len(parts), seed)

        if part != "train":
            loader, options = with_dataset(loader, dataset, None, options, evaluate=True), {}
        return loader, clients, parts, dataset_of, options
