"""What a run leaves behind to be looked at: who had what, what each round gave, pictures and a page of them."""

from lightning_fl.tracking.partition import PartitionSummary, summarise
from lightning_fl.tracking.run import Run
from lightning_fl.tracking.silo_logger import SiloWandbLogger

__all__ = ["PartitionSummary", "Run", "SiloWandbLogger", "summarise"]
