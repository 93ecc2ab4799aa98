"""Secure aggregation: the federation learns the sum of the updates, and no party learns another's update."""

from lightning_fl.privacy.secagg.aggregator import SecureAggregation
from lightning_fl.privacy.secagg.errors import ProtocolError, RetryRefused, SecureAggregationError

__all__ = ["ProtocolError", "RetryRefused", "SecureAggregation", "SecureAggregationError"]
