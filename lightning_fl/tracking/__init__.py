"""The record of a run: its partition, the metrics of each round, plots and an HTML report."""

from typing import TYPE_CHECKING

from lightning_fl.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fl.tracking.notebook import show_report
    from lightning_fl.tracking.partition import PartitionSummary
    from lightning_fl.tracking.partition_reading import summarise
    from lightning_fl.tracking.run import Run
    from lightning_fl.tracking.silo_logger import SiloWandbLogger

__all__ = ["PartitionSummary", "Run", "SiloWandbLogger", "show_report", "summarise"]

# Reading a run needs no torch.
__getattr__, __dir__ = lazy_names(__name__)
