"""Federated data: whose data is whose, as LightningDataModules."""

from lightning_fl.clients.feature_skew import FeatureNoise
from lightning_fl.clients.label_skew import LabelsPerClient, Shards
from lightning_fl.clients.loaders import ClientLoaders
from lightning_fl.clients.natural import MappingFile, NaturalColumn, save_mapping
from lightning_fl.clients.partition import IID, Dirichlet, Partitioner
from lightning_fl.clients.quantity_skew import DirichletSizes, LognormalSizes
from lightning_fl.datamodules.client_datasets import ClientDatasets
from lightning_fl.datamodules.digits import DigitsDataModule
from lightning_fl.datamodules.digits_silos import DigitsSiloDataModule
from lightning_fl.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
from lightning_fl.datamodules.partitioned import PartitionedDataModule
from lightning_fl.datamodules.synthetic import SyntheticDataModule
from lightning_fl.datamodules.table_schema import TableSchema
from lightning_fl.datamodules.tabular import TabularDataModule

__all__ = [
    "IID",
    "ClientDatasets",
    "ClientLoaders",
    "DigitsDataModule",
    "DigitsSiloDataModule",
    "Dirichlet",
    "DirichletSizes",
    "FashionMNISTDataModule",
    "FeatureNoise",
    "LabelsPerClient",
    "LognormalSizes",
    "MNISTDataModule",
    "MappingFile",
    "NaturalColumn",
    "PartitionedDataModule",
    "Partitioner",
    "Shards",
    "SyntheticDataModule",
    "TableSchema",
    "TabularDataModule",
    "save_mapping",
]
