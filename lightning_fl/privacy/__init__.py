"""Differential privacy and secure aggregation."""

from lightning_fl.privacy.secagg import SecureAggregation

__all__ = [
    "SecureAggregation",
]
