"""How updates become one: aggregators, and the transforms on their way."""

from lightning_fl.aggregation.aggregator import Aggregator, ClientLost, FederationFacts
from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.transform import Transform
from lightning_fl.aggregation.weighted_mean import WeightedMean

__all__ = ["Aggregator", "ClientLost", "FederationFacts", "RoundContext", "Transform", "WeightedMean"]
