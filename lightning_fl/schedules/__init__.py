"""Round schedules on a simulated clock: asynchronous rounds, deadlines."""

from lightning_fl.schedules.buffered import Asynchronous, Buffered, FedAsync
from lightning_fl.schedules.clock import Clients, Clock, Flush, Job, Visit
from lightning_fl.schedules.compass import Compass
from lightning_fl.schedules.deadline import Deadline, Fastest
from lightning_fl.schedules.recorded import Recorded
from lightning_fl.schedules.schedule import RoundSchedule, Synchronous
from lightning_fl.schedules.staleness import Hinge, Mixed, Polynomial, Stale, StalenessFunction

__all__ = [
    "Asynchronous",
    "Buffered",
    "Clients",
    "Clock",
    "Compass",
    "Deadline",
    "Fastest",
    "FedAsync",
    "Flush",
    "Hinge",
    "Job",
    "Mixed",
    "Polynomial",
    "Recorded",
    "RoundSchedule",
    "Stale",
    "StalenessFunction",
    "Synchronous",
    "Visit",
]
