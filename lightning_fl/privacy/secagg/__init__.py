"""Secure aggregation: the federation learns a sum of updates, and nobody one client's."""

from lightning_fl.privacy.secagg.aggregator import SecureAggregation
from lightning_fl.privacy.secagg.errors import ProtocolError, RetryRefused, SecureAggregationError

__all__ = ["ProtocolError", "RetryRefused", "SecureAggregation", "SecureAggregationError"]
