"""The mathematics: one algorithm a file, pure functions over state."""

from lightning_fl.algorithms.base import Algorithm, Weighting
from lightning_fl.algorithms.fedavg import FedAvg
from lightning_fl.algorithms.registry import get_algorithm, register, registered
from lightning_fl.algorithms.scaffold import Scaffold

__all__ = ["Algorithm", "FedAvg", "Scaffold", "Weighting", "get_algorithm", "register", "registered"]
