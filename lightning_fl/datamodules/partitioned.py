"""Any LightningDataModule, its training data split among simulated clients."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fl.clients.loaders import ClientLoaders
from lightning_fl.clients.partition import Partitioner
from lightning_fl.clients.split import partition_loader
from lightning_fl.datamodules.client_datasets import wants_clients

_PASSED_ON = (
    "prepare_data",
    "setup",
    "teardown",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "state_dict",
    "load_state_dict",
    "on_exception",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
)


class PartitionedDataModule(L.LightningDataModule):
    """Splits the training data of another datamodule among simulated clients; everything else is passed on to it.

    A federated strategy trains on the clients' loaders, which keep the batch size, shuffling, collation and workers of
    the datamodule's own loader; any other strategy gets that loader itself, which is the centralised baseline.

    Args:
        data: The datamodule. It trains on one ``DataLoader`` over a map-style data set.
        partitioner: How the training data is split.
        num_clients: Number of clients.
        seed: Seed of the split. None: the one of ``seed_everything``, else 0.

    Raises:
        ValueError: When the loaders are made, if the training loader cannot be split, with the remedy.

    Example:
        >>> from lightning_fl.datamodules import DigitsDataModule, Dirichlet
        >>> data = PartitionedDataModule(DigitsDataModule(), Dirichlet(0.3), num_clients=5)
        >>> data.setup("fit")
        >>> clients = data.train_dataloader()
        >>> sum(clients.num_examples(client) for client in clients)
        1437
    """

    def __init__(
        self, data: L.LightningDataModule, partitioner: Partitioner, num_clients: int = 10, seed: int | None = None
    ) -> None:
        self.data = data
        super().__init__()
        self.partitioner = partitioner
        self.num_clients = num_clients
        self.seed = seed
        self.prepare_data_per_node = data.prepare_data_per_node
        self.allow_zero_length_dataloader_with_multiple_devices = (
            data.allow_zero_length_dataloader_with_multiple_devices
        )
        for hook in _PASSED_ON:
            if is_overridden(hook, data):
                setattr(self, hook, getattr(data, hook))

    @property
    def trainer(self) -> L.Trainer | None:
        """The Trainer, also of the datamodule inside."""
        return self.data.trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        self.data.trainer = trainer

    def train_dataloader(self) -> ClientLoaders | Any:
        """The clients' loaders, or the datamodule's own loader if the strategy is not federated."""
        loader = self.data.train_dataloader()
        if not wants_clients(self.trainer):
            return loader
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        return partition_loader(loader, self.partitioner, self.num_clients, seed)
