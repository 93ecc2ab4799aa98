"""How updates become one: aggregators, and the transforms on their way."""

from lightning_fl.aggregation.aggregator import Aggregator, WeightedMean
from lightning_fl.aggregation.transform import RoundContext, Transform

__all__ = ["Aggregator", "RoundContext", "Transform", "WeightedMean"]
