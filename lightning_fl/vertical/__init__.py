"""Vertical federated learning: parties that hold other columns of the same rows."""

from lightning_fl.vertical.psi import SharedIds, psi

__all__ = ["SharedIds", "psi"]
