"""Secure aggregation: the federation learns the sum of the updates, and no party learns another's update."""

from typing import TYPE_CHECKING

from lightning_fl.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_fl.privacy.secagg.aggregator import SecureAggregation
    from lightning_fl.privacy.secagg.errors import ProtocolError, RetryRefused, SecureAggregationError

__all__ = ["ProtocolError", "RetryRefused", "SecureAggregation", "SecureAggregationError"]

# Reading a key file needs no torch.
__getattr__, __dir__ = lazy_names(__name__)
