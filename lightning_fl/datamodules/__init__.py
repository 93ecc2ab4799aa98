"""Federated data: whose data is whose, as LightningDataModules."""

from lightning_fl.clients.loaders import ClientLoaders
from lightning_fl.clients.partition import IID, Dirichlet, Partitioner
from lightning_fl.datamodules.client_datasets import ClientDatasets
from lightning_fl.datamodules.digits import DigitsDataModule
from lightning_fl.datamodules.digits_silos import DigitsSiloDataModule
from lightning_fl.datamodules.partitioned import PartitionedDataModule

__all__ = [
    "IID",
    "ClientDatasets",
    "ClientLoaders",
    "DigitsDataModule",
    "DigitsSiloDataModule",
    "Dirichlet",
    "PartitionedDataModule",
    "Partitioner",
]
