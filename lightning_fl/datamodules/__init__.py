"""LightningDataModules for federated data, which belongs to clients or is split among them."""

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.partitioners.feature_skew import FeatureNoise
from lightning_fl.data.partitioners.label_skew import Dirichlet, LabelsPerClient, Shards
from lightning_fl.data.partitioners.natural import MappingFile, NaturalColumn, save_mapping
from lightning_fl.data.partitioners.partitioner import IID, Partitioner
from lightning_fl.data.partitioners.quantity_skew import DirichletSizes, LognormalSizes
from lightning_fl.datamodules.central import CentralDataModule
from lightning_fl.datamodules.client_datasets import ClientDatasets
from lightning_fl.datamodules.datasets.breast_cancer import BreastCancerDataModule
from lightning_fl.datamodules.datasets.cifar import CIFAR10DataModule, CIFAR100DataModule
from lightning_fl.datamodules.datasets.digits import DigitsDataModule
from lightning_fl.datamodules.datasets.digits_silos import DigitsSiloDataModule
from lightning_fl.datamodules.datasets.leaf import FEMNISTDataModule, LEAFDataModule
from lightning_fl.datamodules.datasets.lung import LungDataModule
from lightning_fl.datamodules.datasets.mnist import FashionMNISTDataModule, MNISTDataModule
from lightning_fl.datamodules.datasets.mnist1d import MNIST1DDataModule
from lightning_fl.datamodules.datasets.movements import MovementsDataModule
from lightning_fl.datamodules.datasets.shakespeare import LEAFShakespeareDataModule, ShakespeareDataModule
from lightning_fl.datamodules.datasets.shapes import ShapesDataModule
from lightning_fl.datamodules.datasets.synthetic import SyntheticDataModule
from lightning_fl.datamodules.image_folders import ImageFolderDataModule
from lightning_fl.datamodules.instructions import InstructionDataModule, train_tokenizer
from lightning_fl.datamodules.map_style import HuggingFaceDataModule, TorchDataModule
from lightning_fl.datamodules.natural import ClientData, NaturalDataModule
from lightning_fl.datamodules.partitioned import PartitionedDataModule
from lightning_fl.datamodules.silo_clients import SiloClients
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
    "InstructionDataModule",
    "LEAFDataModule",
    "LEAFShakespeareDataModule",
    "LabelsPerClient",
    "LognormalSizes",
    "LungDataModule",
    "MNIST1DDataModule",
    "MNISTDataModule",
    "MappingFile",
    "MovementsDataModule",
    "NaturalColumn",
    "NaturalDataModule",
    "PartitionedDataModule",
    "Partitioner",
    "ShakespeareDataModule",
    "ShapesDataModule",
    "Shards",
    "SiloClients",
    "SyntheticDataModule",
    "TableSchema",
    "TabularDataModule",
    "TorchDataModule",
    "save_mapping",
    "train_tokenizer",
]
