"""What a run leaves behind: its partition, the metrics of each round, plots and an HTML report."""

from lightning_fl.tracking.partition import PartitionSummary, summarise
from lightning_fl.tracking.run import Run
from lightning_fl.tracking.silo_logger import SiloWandbLogger

__all__ = ["PartitionSummary", "Run", "SiloWandbLogger", "summarise"]
