"""Engines: local training of a rank's clients, one after the other or many in one step."""

from lightning_fl.engines.local_trainer import ClientFacts, ClientOptimizer, LocalResult, LocalTrainer, StepFunctions
from lightning_fl.engines.optimizer_states import OptimizerStates, Schedule, ScheduleEnd
from lightning_fl.engines.sequential import SequentialEngine
from lightning_fl.engines.vectorized.engine import Vectorized, VectorizedEngine

__all__ = [
    "ClientFacts",
    "ClientOptimizer",
    "LocalResult",
    "LocalTrainer",
    "OptimizerStates",
    "Schedule",
    "ScheduleEnd",
    "SequentialEngine",
    "StepFunctions",
    "Vectorized",
    "VectorizedEngine",
]
