"""Vertical federated learning: parties that hold different columns of the same rows."""

from lightning_fl.vertical.channel import PartyLost
from lightning_fl.vertical.loader import SharedOrder, aligned_loader
from lightning_fl.vertical.protection import GradientNoise
from lightning_fl.vertical.psi import SharedIds, psi
from lightning_fl.vertical.reference import BreastCancerPartiesDataModule, SplitClassifier
from lightning_fl.vertical.strategy import Party, VerticalStrategy

__all__ = [
    "BreastCancerPartiesDataModule",
    "GradientNoise",
    "Party",
    "PartyLost",
    "SharedIds",
    "SharedOrder",
    "SplitClassifier",
    "VerticalStrategy",
    "aligned_loader",
    "psi",
]
