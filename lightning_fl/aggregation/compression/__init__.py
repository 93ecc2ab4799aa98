"""Compressors, error feedback, and the mean of compressed updates."""

from lightning_fl.aggregation.compression.casts import Cast, Quantize
from lightning_fl.aggregation.compression.compress import Compress
from lightning_fl.aggregation.compression.compressed_mean import CompressedMean
from lightning_fl.aggregation.compression.compressor import Compressor
from lightning_fl.aggregation.compression.eden import EDEN
from lightning_fl.aggregation.compression.low_rank import LowRank
from lightning_fl.aggregation.compression.powersgd import PowerSGD
from lightning_fl.aggregation.compression.signs import QSGD, ScaledSign
from lightning_fl.aggregation.compression.sparse import RandomK, TopK

__all__ = [
    "EDEN",
    "QSGD",
    "Cast",
    "Compress",
    "CompressedMean",
    "Compressor",
    "LowRank",
    "PowerSGD",
    "Quantize",
    "RandomK",
    "ScaledSign",
    "TopK",
]
