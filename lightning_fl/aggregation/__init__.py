"""How updates become one: aggregators, and the transforms on their way."""

from lightning_fl.aggregation.aggregator import Aggregator, ClientLost, FederationFacts, WeightedMean
from lightning_fl.aggregation.transform import RoundContext, Transform

__all__ = ["Aggregator", "ClientLost", "FederationFacts", "RoundContext", "Transform", "WeightedMean"]
