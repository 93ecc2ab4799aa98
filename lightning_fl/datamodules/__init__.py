"""Federated data: whose data is whose, as LightningDataModules."""

from lightning_fl.clients.feature_skew import FeatureNoise
from lightning_fl.clients.label_skew import LabelsPerClient, Shards
from lightning_fl.clients.loaders import ClientLoaders
from lightning_fl.clients.natural import MappingFile, NaturalColumn, save_mapping
from lightning_fl.clients.partition import IID, Dirichlet, Partitioner
from lightning_fl.clients.quantity_skew import DirichletSizes, LognormalSizes
from lightning_fl.datamodules.base import CentralDataModule
from lightning_fl.datamodules.breast_cancer import BreastCancerDataModule
from lightning_fl.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from lightning_fl.datamodules.client_datasets import ClientDatasets
from lightning_fl.datamodules.digits import DigitsDataModule
from lightning_fl.datamodules.digits_silos import DigitsSiloDataModule
from lightning_fl.datamodules.image_folders import ImageFolderDataModule
from lightning_fl.datamodules.leaf import FEMNISTDataModule, LEAFDataModule
from lightning_fl.datamodules.map_style import HuggingFaceDataModule, TorchDataModule
from lightning_fl.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
from lightning_fl.datamodules.mnist1d import MNIST1DDataModule
from lightning_fl.datamodules.natural import ClientData, NaturalDataModule
from lightning_fl.datamodules.partitioned import PartitionedDataModule
from lightning_fl.datamodules.shakespeare import LEAFShakespeareDataModule, ShakespeareDataModule
from lightning_fl.datamodules.synthetic import SyntheticDataModule
from lightning_fl.datamodules.table_schema import TableSchema
from lightning_fl.datamodules.tabular import TabularDataModule

__all__ = [
    "IID",
    "BreastCancerDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CentralDataModule",
    "ClientData",
    "ClientDatasets",
    "ClientLoaders",
    "DigitsDataModule",
    "DigitsSiloDataModule",
    "Dirichlet",
    "DirichletSizes",
    "FEMNISTDataModule",
    "FashionMNISTDataModule",
    "FeatureNoise",
    "HuggingFaceDataModule",
    "ImageFolderDataModule",
    "LEAFDataModule",
    "LEAFShakespeareDataModule",
    "LabelsPerClient",
    "LognormalSizes",
    "MNIST1DDataModule",
    "MNISTDataModule",
    "MappingFile",
    "NaturalColumn",
    "NaturalDataModule",
    "PartitionedDataModule",
    "Partitioner",
    "ShakespeareDataModule",
    "Shards",
    "SyntheticDataModule",
    "TableSchema",
    "TabularDataModule",
    "TorchDataModule",
    "save_mapping",
]
