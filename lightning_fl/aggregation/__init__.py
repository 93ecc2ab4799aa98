"""How updates become one: aggregators, and the transforms on their way."""

from lightning_fl.aggregation.aggregator import Aggregator, ClientLost, FederationFacts
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.corruption import Corruption
from lightning_fl.aggregation.robust import (
    FLAME,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CoordinateRule,
    DnC,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Gram,
    GramRule,
    Krum,
    MeanAroundMedian,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    NormBound,
    PreAggregator,
    RowAggregator,
    TrimmedMean,
)
from lightning_fl.aggregation.transform import Transform
from lightning_fl.aggregation.weighted_mean import WeightedMean

__all__ = [
    "FLAME",
    "Aggregator",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "ClientLost",
    "CoordinateRule",
    "Corruption",
    "DnC",
    "FLTrust",
    "FederationFacts",
    "FoolsGold",
    "GeometricMedian",
    "Gram",
    "GramRule",
    "Krum",
    "MeanAroundMedian",
    "Median",
    "MultiKrum",
    "NearestNeighborMixing",
    "NormBound",
    "PreAggregator",
    "RoundContext",
    "RowAggregator",
    "Transform",
    "TrimmedMean",
    "WeightedMean",
]
