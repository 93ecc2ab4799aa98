"""Fewer bytes between clients and server; the code is in ``aggregation/compression/``."""

from lightning_fl.aggregation.compression import (
    EDEN,
    QSGD,
    Cast,
    Compress,
    CompressedMean,
    Compressor,
    PowerSGD,
    Quantize,
    RandomK,
    ScaledSign,
    TopK,
)

__all__ = [
    "EDEN",
    "QSGD",
    "Cast",
    "Compress",
    "CompressedMean",
    "Compressor",
    "PowerSGD",
    "Quantize",
    "RandomK",
    "ScaledSign",
    "TopK",
]
