"""Fewer bytes between clients and server; the code is in ``aggregation/compression/``."""

from lightning_fl.aggregation.compression import *  # noqa: F403
from lightning_fl.aggregation.compression import __all__ as __all__
