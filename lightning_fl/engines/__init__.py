"""How a rank trains its clients."""

from lightning_fl.engines.optimizer_states import OptimizerStates, Schedule, ScheduleEnd
from lightning_fl.engines.sequential import LocalResult, SequentialEngine
from lightning_fl.engines.vectorized.engine import Vectorized, VectorizedEngine

__all__ = [
    "LocalResult",
    "OptimizerStates",
    "Schedule",
    "ScheduleEnd",
    "SequentialEngine",
    "Vectorized",
    "VectorizedEngine",
]
