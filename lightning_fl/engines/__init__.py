"""How a rank trains its clients."""

from lightning_fl.engines.optimizers import OptimizerStates, Schedule, ScheduleEnd
from lightning_fl.engines.sequential import LocalResult, SequentialEngine
from lightning_fl.engines.vectorized import Vectorized, VectorizedEngine

__all__ = [
    "LocalResult",
    "OptimizerStates",
    "Schedule",
    "ScheduleEnd",
    "SequentialEngine",
    "Vectorized",
    "VectorizedEngine",
]
