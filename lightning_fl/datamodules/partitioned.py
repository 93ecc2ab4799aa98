"""Any LightningDataModule, its training data split among simulated clients."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.holdout import Holdout, Part
from lightning_fl.data.partitioners.partitioner import Partitioner
from lightning_fl.data.splitting import check_splittable, split_loader, with_dataset
from lightning_fl.datamodules.client_datasets import wants_clients
from lightning_fl.types import ClientId

View = Callable[[int, torch.Tensor], Dataset]

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
    the datamodule's own loader; any other strategy gets one loader over the same training data together, which is the
    centralised baseline.

    With ``val_share`` or ``test_share`` each client keeps a part of its samples for its own validation or test, which
    ``client_val_dataloaders()`` and ``client_test_dataloaders()`` give by client. Validation and test of the global
    model stay those of the datamodule inside; if it has none, they are the union of the clients' own.

    Args:
        data: The datamodule. It trains on one ``DataLoader`` over a map-style data set.
        partitioner: How the training data is split.
        num_clients: Number of clients. None: 10, or those that the data names (see ``NaturalColumn``).
        seed: Seed of the split. None: the one of ``seed_everything``, else 0.
        val_share: Share of each client's samples that it keeps for its own validation, in [0, 1).
        test_share: Share of each client's samples that it keeps for its own test, in [0, 1).

    Raises:
        ValueError: If the shares are out of range; when the loaders are made, if the training loader cannot be split,
            with the remedy.

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
    ) -> None:
        self.data = data
        super().__init__()
        self.partitioner = partitioner
        self.num_clients = num_clients
        self.seed = seed
        self.holdout = Holdout(val_share, test_share)
        self.holdout.check()
        self.prepare_data_per_node = data.prepare_data_per_node
        self.allow_zero_length_dataloader_with_multiple_devices = (
            data.allow_zero_length_dataloader_with_multiple_devices
        )
        for hook in _PASSED_ON:
            if is_overridden(hook, data):
                setattr(self, hook, getattr(data, hook))
        if val_share > 0 and not is_overridden("val_dataloader", data):
            self.val_dataloader = partial(self._pooled_loader, "val")  # type: ignore[method-assign]
        if test_share > 0 and not is_overridden("test_dataloader", data):
            self.test_dataloader = partial(self._pooled_loader, "test")  # type: ignore[method-assign]

    @property
    def trainer(self) -> L.Trainer | None:
        """The Trainer, also of the datamodule inside."""
        return self.data.trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        self.data.trainer = trainer

    def train_dataloader(self) -> ClientLoaders | Any:
        """The clients' loaders, or one loader over their data together if the strategy is not federated."""
        if wants_clients(self.trainer):
            return self._client_loaders("train")
        if self.partitioner.changes_examples or sum(self.holdout) > 0:
            return self._pooled_loader("train")
        return self.data.train_dataloader()

    def client_val_dataloaders(self) -> ClientLoaders:
        """Each client's own validation data, in order."""
        return self._client_loaders("val")

    def client_test_dataloaders(self) -> ClientLoaders:
        """Each client's own test data, in order."""
        return self._client_loaders("test")

    def _client_loaders(self, part: Part) -> ClientLoaders:
        loader, clients, parts, view = self._split(part)
        return split_loader(loader, parts, clients, view)

    def _pooled_loader(self, part: Part) -> DataLoader:
        loader, _, parts, view = self._split(part)
        return with_dataset(loader, ConcatDataset([view(client, own) for client, own in enumerate(parts) if len(own)]))

    def _split(self, part: Part) -> tuple[DataLoader, Sequence[ClientId], list[torch.Tensor], View]:
        loader = self.data.train_dataloader()
        check_splittable(loader)
        dataset = loader.dataset
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        clients = self.partitioner.client_ids(dataset, self.num_clients)
        parts = self.partitioner(dataset, self.num_clients, seed)
        if sum(self.holdout) > 0:
            parts = [
                whole[torch.from_numpy(self.holdout.indices(len(whole), part, seed, client))]
                for client, whole in zip(clients, parts, strict=True)
            ]
        elif part != "train":
            raise ValueError(f"The clients keep no data for their {part}; set {part}_share of PartitionedDataModule.")

        def view(client: int, own: torch.Tensor) -> Dataset:
            return self.partitioner.client_dataset(dataset, own, client, len(parts), seed)

        return loader if part == "train" else with_dataset(loader, dataset, evaluate=True), clients, parts, view
