"""Partitioners, which split one data set among simulated clients."""

from lightning_fl.data.partitioners.feature_skew import FeatureNoise
from lightning_fl.data.partitioners.label_skew import Dirichlet, LabelsPerClient, Shards
from lightning_fl.data.partitioners.natural import MappingFile, NaturalColumn, save_mapping
from lightning_fl.data.partitioners.partitioner import DEFAULT_NUM_CLIENTS, IID, Partitioner
from lightning_fl.data.partitioners.quantity_skew import DirichletSizes, LognormalSizes

__all__ = [
    "DEFAULT_NUM_CLIENTS",
    "IID",
    "Dirichlet",
    "DirichletSizes",
    "FeatureNoise",
    "LabelsPerClient",
    "LognormalSizes",
    "MappingFile",
    "NaturalColumn",
    "Partitioner",
    "Shards",
    "save_mapping",
]
